"The command line with made-up files in every format, wrong input of every kind, and interruptions."
import gzip, json, os, struct, subprocess, sys
from pathlib import Path
import matplotlib; matplotlib.use('Agg')
import numpy as np, pytest, torch
import fastsparse
from fastsparse import cli
from fastsparse.cli import InputError, folder_data, main, mnist_data, read_idx

names = 'train-images', 'train-labels', 't10k-images', 't10k-labels'

@pytest.fixture
def arrays():
    "Bright rows tell the class."
    rng = np.random.default_rng(0)
    def make(n):
        y = np.arange(n) % 3
        x = rng.integers(0, 60, (n,12,12))
        for i,c in enumerate(y): x[i, 4*c:4*c+4] += 150
        return x.astype(np.uint8), y.astype(np.uint8)
    return *make(96), *make(30)

def write_idx(folder, arrays, sep='-', gz=False):
    for n,a in zip(names, arrays):
        raw = bytes([0,0,8,a.ndim]) + struct.pack(f'>{a.ndim}I', *a.shape) + a.tobytes()
        (folder/f"{n}{sep}idx{a.ndim}-ubyte{'.gz' if gz else ''}").write_bytes(gzip.compress(raw) if gz else raw)

def write_npz(path, arrays): np.savez(path, **dict(zip(('x_train','y_train','x_test','y_test'), arrays)))

def write_folders(folder, arrays, sets=('training','testing')):
    from PIL import Image
    for kind,(x,y) in zip(sets, (arrays[:2], arrays[2:])):
        for i,(a,c) in enumerate(zip(x, y)):
            d = folder/kind/str(c)
            d.mkdir(parents=True, exist_ok=True)
            Image.fromarray(a).save(d/f'{i:03}.png')

def run(*args):
    with pytest.raises(SystemExit) as e: main([str(a) for a in args])
    return e.value.code

@pytest.mark.parametrize('kind', ['idx', 'idx.gz', 'dotted idx', 'npz', 'npz folder', 'folders', 'train and valid'])
def test_every_format_gives_the_same_images(tmp_path, arrays, kind):
    path = tmp_path
    if 'idx' in kind: write_idx(tmp_path, arrays, '.' if 'dotted' in kind else '-', 'gz' in kind)
    elif 'npz' in kind:
        write_npz(tmp_path/'mnist.npz', arrays)
        if kind == 'npz': path = tmp_path/'mnist.npz'
    else: write_folders(tmp_path, arrays, ('train','valid') if 'valid' in kind else ('training','testing'))
    d = mnist_data(path)
    assert d.train[0].shape == (96,1,12,12) and len(d.valid[1]) == 30 and d.classes == ['0','1','2']
    y = arrays[3]
    order = np.lexsort((y, [(y[:i] == c).sum() for i,c in enumerate(y)])) if kind in ('folders', 'train and valid') else slice(None)      # the first of each class, the second of each, …
    assert (d.valid[0][:,0].numpy() == arrays[2][order]).all() and (d.valid[1].numpy() == arrays[3][order]).all()

def test_broken_files_are_told(tmp_path, arrays):
    write_idx(tmp_path, arrays)
    f = tmp_path/'train-images-idx3-ubyte'
    raw = f.read_bytes()
    for bad,msg in [(raw[:-5], 'Is it complete'), (raw[:6], 'cut short'), (b'PK'+raw, 'not an idx file'), (b'', 'not an idx file'), (gzip.compress(raw)[:-20], 'not a complete gzip')]:
        f.write_bytes(bad)
        with pytest.raises(InputError, match=msg): read_idx(f)
    f.unlink()
    with pytest.raises(InputError, match='none for train-images'): mnist_data(tmp_path)

@pytest.mark.parametrize('change,msg', [
    (dict(x_train=np.zeros((96,12))), 'images of shape'), (dict(x_test=np.zeros((30,9,9))), 'validation images'),
    (dict(y_train=np.zeros(95, int)), 'one for each image'), (dict(y_train=np.full(96, 0.5)), 'whole numbers'),
    (dict(y_test=np.full(30, -1)), 'smallest is -1'), (dict(y_train=np.array(['a']*96)), 'not <U1'), (dict(x_train=np.zeros((0,12,12)), y_train=np.zeros(0, int)), 'n at least 1')])
def test_archives_that_do_not_fit(tmp_path, arrays, change, msg):
    np.savez(tmp_path/'a.npz', **{**dict(zip(('x_train','y_train','x_test','y_test'), arrays)), **change})
    with pytest.raises(InputError, match=msg): mnist_data(tmp_path/'a.npz')

def test_archives_that_are_none(tmp_path):
    (tmp_path/'a.npz').write_bytes(b'PK\3\4 not really')
    with pytest.raises(InputError, match='not a readable .npz'): mnist_data(tmp_path/'a.npz')
    np.savez(tmp_path/'a.npz', x_train=np.zeros(3))
    with pytest.raises(InputError, match='has no y_train, x_test, y_test'): mnist_data(tmp_path)

def test_folders_that_do_not_fit(tmp_path, arrays):
    write_folders(tmp_path, arrays)
    (tmp_path/'testing'/'9').mkdir()
    (tmp_path/'testing'/'9'/'a.png').write_bytes(b'no image')
    with pytest.raises(InputError, match='no training images for 9'): folder_data(tmp_path)
    (tmp_path/'testing'/'9'/'a.png').rename(tmp_path/'testing'/'1'/'zzz.png')
    with pytest.raises(InputError, match='not a readable image'): folder_data(tmp_path)

def test_without_path_fastai_fetches(monkeypatch, tmp_path, arrays):
    import fastai.data.external as ext
    write_folders(tmp_path, arrays)
    monkeypatch.setattr(ext, 'untar_data', lambda url: tmp_path)
    assert len(mnist_data().train[1]) == 96
    def offline(url): raise OSError('no network')
    monkeypatch.setattr(ext, 'untar_data', offline)
    with pytest.raises(InputError, match='Give --path'): mnist_data()

def test_train_on_files_and_validate_again(tmp_path, arrays, capsys):
    write_npz(tmp_path/'a.npz', arrays)
    out = tmp_path/'new'/'run'
    code = run('train', '--data', 'mnist', '--path', tmp_path/'a.npz', '--method', 'all', '--epochs', 2, '--bs', 16, '--batches-per-update', 3,
               '--sparsity', 0.8, '--seed', 3, '--threads', 1, '--out', out, '--save', 'sparse.pth')
    assert code == 0
    r = json.loads((out/'report.json').read_text())
    assert sorted(f.name for f in out.iterdir()) == ['report.json', 'report.png', 'sparse.pth']
    assert [o['method'] for o in r['results']] == list(cli.methods) and r['saved'] == 'rigl' and r['settings']['seed'] == 3
    assert all(abs(o['nonzeros']/o['weights'] - 0.2) < 1e-3 for o in r['results'][1:]) and r['results'][0]['nonzeros'] == r['results'][0]['weights']
    assert r['reload']['identical'] and r['layers']['total']['nonzeros'] == r['results'][-1]['nonzeros']
    assert 'agree to the last bit' in capsys.readouterr().out
    assert run('validate', out) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == r['reload']['trained']
    (out/'sparse.pth').write_bytes((out/'sparse.pth').read_bytes()[:99])
    assert run('validate', tmp_path) == 2

def test_bad_input_exits_with_2_and_writes_nothing(tmp_path, capsys):
    (tmp_path/'file').write_text('x')
    for args,msg in [('--sparsity 0', 'sparsity'), ('--sparsity nan', 'sparsity'), ('--epochs 0', 'whole number'), ('--lr -1', 'positive'), ('--method a', 'expected one or several'),
                     ('--stop_pct 1.5', 'at most 1'), ('--initial_drop_grow_pct 1', 'share'), ('--data cifar', 'invalid choice'), ('--seed -1', 'whole number'),
                     ('--distribution x', 'invalid choice'), ('--model vgg', 'invalid choice'), ('--save ../m.pth', 'plain file name'), ('--save ..', 'plain file name'), ('--device moon', '--device moon'),
                     (f'--data mnist --path {tmp_path}/none', 'no such file'), (f'--path {tmp_path}', 'digits come with')]:
        assert run('train', '--out', tmp_path/'out', *args.split()) == 2, args
        assert msg in capsys.readouterr().err, args
    assert run('train', '--out', tmp_path/'file'/'out') == 2
    if Path('/proc/self').exists(): assert run('train', '--out', '/proc/out') == 2      # root may write there, it seems
    assert run('validate', tmp_path) == 2
    assert run() == 2
    assert [f.name for f in tmp_path.iterdir()] == ['file']

@pytest.mark.parametrize('where', ['train_method', 'validate_in_fresh_process', '_write_picture'])
def test_interrupt_keeps_what_was_there(monkeypatch, tmp_path, arrays, where):
    write_npz(tmp_path/'a.npz', arrays)
    out = tmp_path/'out'
    out.mkdir()
    (out/'model.pth').write_text('earlier')
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(cli, 'validate_in_fresh_process', lambda d: {k: json.loads((d/'report.json').read_text())['results'][-1][k] for k in ('valid_loss', 'accuracy')})
    monkeypatch.setattr(cli, where, stop)
    assert run('train', '--data', 'mnist', '--path', tmp_path/'a.npz', '--method', 'static', '--epochs', 1, '--bs', 32, '--out', out) == 130
    assert [f.name for f in out.iterdir()] == ['model.pth'] and (out/'model.pth').read_text() == 'earlier'

def started(tmp_path, arrays, out, shell='exec "$@"', **kw):
    "The command in a process of its own."
    write_npz(tmp_path/'a.npz', arrays)
    cmd = [sys.executable, '-c', 'from fastsparse.command import main; main()', 'train', '--data', 'mnist', '--path', 'a.npz', '--method', 'static', '--epochs', '1', '--bs', '32', '--out', out]
    return subprocess.Popen(['sh', '-c', shell, 'sh', *cmd], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

@pytest.mark.skipif(sys.platform == 'win32', reason='a shell')
def test_output_that_nobody_reads_ends_the_command_quietly(tmp_path, arrays):
    p = started(tmp_path, arrays, 'out')
    p.stdout.readline()
    p.stdout.close()
    err = p.stderr.read()
    assert p.wait() == 141 and 'Error' not in err, err      # when it finds out is a matter of buffers

@pytest.mark.skipif(sys.platform == 'win32', reason='a shell')
@pytest.mark.parametrize('shell,env', [('exec "$@" >&-', {}), ('exec "$@"', dict(PYTHONIOENCODING='ascii'))])
def test_any_output_will_do(tmp_path, arrays, shell, env):
    "Closed, or unable to show the folder's name."
    p = started(tmp_path, arrays, 'o\u00fct', shell, env={**os.environ, **env})
    out,err = p.communicate()
    assert p.returncode == 0, err
    assert (tmp_path/'o\u00fct'/'report.json').exists() and (not env or r'written to o\xfct' in out)

def test_version(capsys):
    assert run('--version') == 0
    assert capsys.readouterr().out.strip() == f'fastsparse {fastsparse.__version__}'

def test_models_fit_the_data():
    for name,make in cli.models.items():
        assert make(1, 7).eval()(torch.randn(2,1,12,12)).shape == (2,7), name

def test_validate_finds_data_that_was_moved(tmp_path, arrays, capsys):
    write_npz(tmp_path/'a.npz', arrays)
    assert run('train', '--data', 'mnist', '--path', tmp_path/'a.npz', '--method', 'static', '--epochs', 1, '--bs', 32, '--threads', 1, '--out', tmp_path/'out') == 0
    (tmp_path/'a.npz').rename(tmp_path/'b.npz')
    capsys.readouterr()
    assert run('validate', tmp_path/'out') == 2
    assert '--path' in capsys.readouterr().err
    assert run('validate', tmp_path/'out', '--path', tmp_path/'b.npz') == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads((tmp_path/'out'/'report.json').read_text())['reload']['trained']

def test_validate_on_another_machine_and_of_reports_that_it_cannot_use(tmp_path, arrays, capsys):
    write_npz(tmp_path/'a.npz', arrays)
    out = tmp_path/'run'
    assert run('train', '--data', 'mnist', '--path', tmp_path/'a.npz', '--method', 'static', '--epochs', 1, '--bs', 32, '--threads', 1, '--out', out) == 0
    report = json.loads((out/'report.json').read_text())
    def validate(**settings):
        (out/'report.json').write_text(json.dumps({**report, 'settings': {k: v for k,v in {**report['settings'], **settings}.items() if v != 'gone'}}))
        return run('validate', out), *capsys.readouterr()
    capsys.readouterr()
    code,said,err = validate(device='xpu:7')
    assert code == 0 and "trained on xpu:7, which isn't here" in err and json.loads(said) == report['reload']['trained']
    for settings,msg in [(dict(model='vgg'), "model is 'vgg', which is none of small"), (dict(data='cifar'), "data is 'cifar'"), (dict(bs='gone'), "it has no 'bs'")]:
        code,_,err = validate(**settings)
        assert code == 2 and msg in err

def test_help_is_ascii(capsys):
    for command in 'train', 'validate':
        assert run(command, '--help') == 0
        assert capsys.readouterr().out.isascii()

def test_help_waits_for_no_imports():
    code = "import sys\nfrom fastsparse.command import main\ntry: main(['train', '--help'])\nfinally: assert not {'torch', 'numpy', 'fastai'} & {*sys.modules}"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0 and 'connectivity updates' in r.stdout, r.stderr

def test_a_log_has_a_line_for_each_epoch_and_no_bars(tmp_path, arrays, capsys):
    write_npz(tmp_path/'a.npz', arrays)
    settings = dict(model='small', bs=32, n_train=None, device='cpu', seed=0, epochs=2, lr=1e-3)
    cli.train_method('dense', mnist_data(tmp_path/'a.npz'), settings)
    lines = capsys.readouterr().out.splitlines()
    assert [l.split('  ')[0] for l in lines] == ['epoch 0', 'epoch 1'] and all('  accuracy 0.' in l or '  accuracy 1.' in l for l in lines)

def test_folders_keep_colour(tmp_path, arrays):
    from PIL import Image
    write_folders(tmp_path, arrays)
    f = sorted((tmp_path/'testing'/'1').iterdir())[0]
    Image.fromarray(np.stack([arrays[2][1]]*2 + [255-arrays[2][1]], -1)).save(f)
    d = mnist_data(tmp_path)
    assert d.n_channels == 3 and d.valid[0].shape == (30,3,12,12)
    coloured = [(x[0] != x[2]).any().item() for x in d.valid[0]]
    assert sum(coloured) == 1 and d.valid[1][coloured.index(True)] == 1 and (d.train[0][:,0] == d.train[0][:,2]).all()
