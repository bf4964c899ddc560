"Checkpoints: what a resumed run shows, logs and restores, whichever callbacks, loaders and fits there are."
import contextlib, io, subprocess, sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from fastai.basics import Adam, Callback, DataLoaders, Metric, OptimWrapper, ranger
from fastai.callback.progress import CSVLogger, ShowGraphCallback
import fastai.callback.progress as progress
import fastai.callback.schedule
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.torch_core import TensorBase
from torch import nn
from fastsparse import (CheckpointCallback, DynamicSparseTrainingCallback, ResumeCallback, RigL_presets, SET_presets, kernels, load_sparse_model)
from conftest import fit, toy_items, toy_learner

class Stop(Callback):
    "Raise `KeyboardInterrupt` after a batch: the user's Ctrl-C."
    order = 100
    def __init__(self, *at): self.at = at
    def after_batch(self):
        if self.training and (self.learn.epoch, self.learn.iter) == self.at: raise KeyboardInterrupt

def dst(presets=RigL_presets, **kw): return DynamicSparseTrainingCallback(**{**presets, 'sparse_kernels': False, 'batches_per_update': 3, **kw})

def stopped(f, *at):
    with pytest.raises(KeyboardInterrupt): f(Stop(*at))

def same(a, b): return all(v.equal(b.model.state_dict()[k]) for k,v in a.model.state_dict().items())

def resumed_is_the_same(start, path, *at, every=None):
    "`start(*cbs)` builds a learner and fits it: through, and stopped after epoch and batch `at` and resumed."
    through = start()
    stopped(lambda *cbs: start(CheckpointCallback(path, every), *cbs), *at)
    return same(through, start(ResumeCallback(path)))

# ------------------------------------------------------------------------------------------------ progress bars and logs

@pytest.mark.parametrize('at,every', [((1,4), None), ((0,5), 3), ((7,5), 3)])
@pytest.mark.parametrize('bars', ['Console', 'NB'])
def test_a_resumed_run_shows_progress_bars(bars, at, every, tmp_path, monkeypatch):
    import fastprogress.fastprogress as fp
    monkeypatch.setattr(progress, 'master_bar', getattr(fp, bars+'MasterBar'))
    monkeypatch.setattr(progress, 'progress_bar', getattr(fp, bars+'ProgressBar'))
    monkeypatch.setattr('IPython.display.display', lambda *args, **kw: SimpleNamespace(update=lambda o: None))      # a notebook's handle
    shown = []
    class See(Callback):
        order = 61
        def after_batch(self): shown.append((self.learn.progress.mbar.main_bar.last_v, self.learn.progress.pbar.last_v))
    def start(*cbs):
        learn = toy_learner()
        with contextlib.redirect_stdout(io.StringIO()): learn.fit(9, cbs=[dst(), *cbs])
        return learn
    stopped(lambda *cbs: start(CheckpointCallback(tmp_path/'c', every), *cbs), *at)
    start(See(), ResumeCallback(tmp_path/'c'))
    assert {e for e,_ in shown} == set(range(at[0], 9))

def test_a_graph_of_losses_goes_on_after_a_resume(tmp_path):
    seen = []
    class Bar:
        main_bar = SimpleNamespace()
        def update(self, epoch): pass
        def on_iter_end(self): pass
        def add_child(self, child): pass
        def update_graph(self, graphs, *args): seen.append([len(o) for o in graphs[1]])
    class Watch(ShowGraphCallback):
        def before_fit(self):
            self.nb_batches,self.progress.mbar = [],Bar()
    def start(*cbs):
        learn = toy_learner()
        learn.create_mbar = False
        with learn.no_logging(): learn.fit(3, cbs=[Watch(), *cbs])
    stopped(lambda *cbs: start(CheckpointCallback(tmp_path/'c'), *cbs), 2, 1)
    start(ResumeCallback(tmp_path/'c'))
    assert seen == [[1,1], [2,2], [3,3]]

def test_a_csv_log_keeps_the_rows_before_a_resume(tmp_path):
    def start(*cbs): return fit(toy_learner(path=tmp_path), 4, cbs=[CSVLogger(), *cbs])
    losses = lambda: [row.split(',')[:3] for row in (tmp_path/'history.csv').read_text().splitlines()]
    start()
    whole = losses()
    stopped(lambda *cbs: start(CheckpointCallback(tmp_path/'c'), *cbs), 2, 3)
    start(ResumeCallback(tmp_path/'c'))
    assert losses() == whole and len(whole) == 5

# ------------------------------------------------------------------------------------------------ what a checkpoint holds

def test_two_callbacks_of_one_class_get_their_own_state_back(tmp_path):
    saves = []
    def start(*cbs):
        learn = toy_learner(path=tmp_path)
        saves[:] = SaveModelCallback(fname='a'),SaveModelCallback('train_loss', fname='b', comp=np.greater)
        layers = [m for m in learn.model if isinstance(m, nn.Linear)]
        return fit(learn, 4, cbs=[dst(sparse_modules=layers[0]), dst(SET_presets, sparse_modules=layers[1], batches_per_update=5), *saves, *cbs])
    assert resumed_is_the_same(start, tmp_path/'c', 2, 3)
    best = [s.best for s in saves]
    start()
    assert best == [s.best for s in saves]

def test_another_number_of_callbacks_is_refused(tmp_path):
    stopped(lambda *cbs: fit(toy_learner(), 3, cbs=[dst(), CheckpointCallback(tmp_path/'c'), *cbs]), 1, 1)
    with pytest.raises(ValueError, match='with 1 of DynamicSparseTrainingCallback, but this one has 2'):
        fit(toy_learner(), 3, cbs=[dst(), dst(), ResumeCallback(tmp_path/'c')])
    fit(toy_learner(), 3, cbs=[dst(), CheckpointCallback(tmp_path/'a'), CheckpointCallback(tmp_path/'b'), ResumeCallback(tmp_path/'c')])      # these have no state

def frozen_learner():
    learn = toy_learner()
    learn.model[0].requires_grad_(False)
    return learn

@pytest.mark.parametrize('make', [lambda: toy_learner(opt_func=Adam), lambda: toy_learner(opt_func=partial(OptimWrapper, opt=torch.optim.SGD)), lambda: toy_learner(splitter=split), frozen_learner])
def test_another_optimizer_is_refused_before_training(make, tmp_path):
    "It failed in the midst of it, in words of its own."
    stopped(lambda *cbs: fit(toy_learner(), 3, cbs=[dst(), CheckpointCallback(tmp_path/'c'), *cbs]), 1, 1)
    learn = make()
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match='from a run whose optimizer had 6 parameters in 1 group with .*, but this one has .*same `opt_func`'):
        fit(learn, 3, cbs=[dst(), ResumeCallback(tmp_path/'c')])
    assert all(v.equal(learn.model.state_dict()[k]) for k,v in before.items())

@pytest.mark.parametrize('opt_func', [Adam, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_the_same_optimizer_is_taken(opt_func, tmp_path):
    assert resumed_is_the_same(lambda *cbs: fit(toy_learner(opt_func=opt_func), 3, cbs=[dst(), *cbs]), tmp_path/'c', 1, 1)

@pytest.mark.skipif(sys.platform == 'win32', reason='limits the size of files')
def test_a_full_disk_is_named_and_leaves_the_earlier_file(tmp_path):
    code = f"""if True:
        import resource, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from conftest import fit, toy_learner
        from fastsparse.checkpoint import CheckpointCallback
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        fit(toy_learner(), 1, cbs=CheckpointCallback({str(tmp_path/'c')!r}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        try: fit(toy_learner(), 1, cbs=CheckpointCallback({str(tmp_path/'c')!r}))
        except OSError as e: print(e)"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'could not be written, is the disk full?' in r.stdout, r.stderr
    assert [f.name for f in tmp_path.iterdir()] == ['c'] and 'model' in torch.load(tmp_path/'c', weights_only=False)

def test_a_file_with_one_state_for_each_name_is_read(tmp_path):
    through = fit(toy_learner(), 3, cbs=dst())
    stopped(lambda *cbs: fit(toy_learner(), 3, cbs=[dst(), CheckpointCallback(tmp_path/'c'), *cbs]), 1, 1)
    s = torch.load(tmp_path/'c', weights_only=False)
    del s['fit'], s['frozen'], s['rng']['generators']
    torch.save({**s, 'cbs': {k: v[0] for k,v in s['cbs'].items()}}, tmp_path/'c')
    assert same(through, fit(toy_learner(), 3, cbs=[dst(), ResumeCallback(tmp_path/'c')]))

class Arrays(Metric):
    name = 'arrays'
    def __init__(self, value): self._value = value
    def reset(self): pass
    def accumulate(self, learn): pass
    @property
    def value(self): return self._value

def test_a_metric_that_is_an_array_can_be_read_back(tmp_path):
    def start(*cbs): return fit(toy_learner(metrics=Arrays(np.array([.5, .25]))), 3, cbs=[dst(), *cbs])
    stopped(lambda *cbs: start(CheckpointCallback(tmp_path/'c'), *cbs), 1, 1)
    assert all((v[2] == [.5, .25]).all() for v in start(ResumeCallback(tmp_path/'c')).recorder.values)

def test_a_state_that_could_not_be_read_back_is_not_written(tmp_path):
    learn = toy_learner(metrics=Arrays(Arrays(1)))
    with pytest.raises(ValueError, match="state of Recorder can't go into a checkpoint: .*Arrays was not an allowed global"): fit(learn, 1, cbs=CheckpointCallback(tmp_path/'c'))
    assert not (tmp_path/'c').exists()

@pytest.mark.parametrize('every', [None, 3])
def test_a_torch_loader_with_a_generator_of_its_own_resumes(every, tmp_path):
    def start(*cbs):
        loader = torch.utils.data.DataLoader(toy_items(64), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(1))
        return fit(toy_learner(dls=DataLoaders(loader, torch.utils.data.DataLoader(toy_items(8), batch_size=8))), 4, cbs=[dst(), *cbs])
    assert resumed_is_the_same(start, tmp_path/'c', 2, 5, every=every)

@pytest.mark.skipif(not kernels.kernels_available(), reason=kernels.why_not())
@pytest.mark.parametrize('every,n_acc,updates,at', [(1, 16, 3, (2,2)), (1, 16, 3, (2,3)), (1, 16, 3, (3,0)), (None, 24, 5, (2,0)), (None, 24, 5, (2,3))])
def test_no_checkpoint_within_an_accumulated_step_that_updates(every, n_acc, updates, at, tmp_path):
    def start(*cbs): return fit(toy_learner(.85), 6, cbs=[dst(sparse_kernels=True, sparsity_threshold=.5, batches_per_update=updates), GradientAccumulation(n_acc), *cbs])
    assert resumed_is_the_same(start, tmp_path/'c', *at, every=every)

def test_a_learner_without_recorder_is_checkpointed(tmp_path):
    def start(*cbs):
        learn = toy_learner()
        learn.remove_cbs([learn.progress, learn.recorder])
        learn.fit(3, cbs=[dst(), *cbs])
        return learn
    assert resumed_is_the_same(start, tmp_path/'c', 1, 5, every=2)

# ------------------------------------------------------------------------------------------------ several fits of a learner

def split(m): return [list(m[0].parameters()), list(m[2:].parameters())]
def tuned(*cbs, learn=None):
    learn = learn or toy_learner(splitter=split, opt_func=Adam)
    return fit(learn, 2, how='fine_tune', freeze_epochs=2, cbs=[dst(), *cbs])

def test_the_second_fit_of_fine_tune_is_not_taken_for_the_first(tmp_path):
    assert same(tuned(), tuned(CheckpointCallback(tmp_path/'c'), ResumeCallback(tmp_path/'c')))

class StopInFit(Stop):
    "In the first or the second fit of a `fine_tune`."
    def __init__(self, fit, *at): self.fit,self.at,self.n = fit,at,-1
    def before_fit(self): self.n += 1
    def after_batch(self):
        if self.n == self.fit: super().after_batch()

@pytest.mark.parametrize('which,at', [(0, (1,3)), (0, (1,7)), (1, (0,3)), (1, (1,3))])
@pytest.mark.parametrize('every', [None, 2])
def test_a_stopped_fine_tune_resumes_in_the_fit_where_it_was(which, at, every, tmp_path):
    both = CheckpointCallback(tmp_path/'c', every),ResumeCallback(tmp_path/'c')
    with pytest.raises(KeyboardInterrupt): tuned(*both, StopInFit(which, *at))
    n = []
    class Count(Callback):
        order,run_valid = 100,False
        def after_step(self): n.append(1)
    resumed = tuned(CheckpointCallback(tmp_path/'c', every), ResumeCallback(tmp_path/'c'), Count())
    assert same(tuned(), resumed) and len(n) <= 32 - 8*(2*which+at[0])

def test_fine_tune_called_again_on_a_learner_stopped_in_its_second_fit_is_refused(tmp_path):
    learn = toy_learner(splitter=split, opt_func=Adam)
    both = CheckpointCallback(tmp_path/'c'),ResumeCallback(tmp_path/'c')
    with pytest.raises(KeyboardInterrupt): tuned(*both, StopInFit(1, 1, 3), learn=learn)
    with pytest.raises(ValueError, match='0 frozen parameters, but this one has 2'): tuned(*both, learn=learn)

def test_lr_find_ignores_a_resume_callback_that_stays(tmp_path):
    stopped(lambda *cbs: fit(toy_learner(), 2, cbs=[CheckpointCallback(tmp_path/'c'), *cbs]), 1, 1)
    learn = toy_learner(cbs=ResumeCallback(tmp_path/'c'), path=tmp_path)
    with learn.no_bar(): learn.lr_find(num_it=10, show_plot=False)
    assert same(fit(learn, 2), fit(toy_learner(), 2))

# ------------------------------------------------------------------------------------------------ files that are none

def test_a_file_of_another_kind_is_told_without_advice_to_unpickle_it(tmp_path):
    (tmp_path/'x.png').write_bytes(b'\x89PNG\r\n' + b'0'*500)
    learn = toy_learner()
    for f in (lambda: load_sparse_model(tmp_path/'x.png', learn.model), lambda: fit(learn, 1, cbs=ResumeCallback(tmp_path/'x.png'))):
        with pytest.raises(ValueError, match='expected a file that `learn.save`, `save_model` or `CheckpointCallback` wrote') as e: f()
        assert 'weights_only' not in str(e.value)

def test_a_model_file_is_no_checkpoint(tmp_path):
    torch.save(toy_learner().model.state_dict(), tmp_path/'m.pth')
    with pytest.raises(ValueError, match='m.pth is no checkpoint'): fit(toy_learner(), 1, cbs=ResumeCallback(tmp_path/'m.pth'))

def test_plain_files_are_read_without_fastai_and_its_tensors_too(tmp_path):
    state = nn.Linear(3, 2).state_dict()
    torch.save(state, tmp_path/'plain.pth')
    torch.save(dict(model=state, losses=[TensorBase(1.)]), tmp_path/'fastai.pth')
    code = f"""
import sys
from torch import nn
from fastsparse import load_sparse_model
for f in 'plain', 'fastai':
    load_sparse_model({str(tmp_path)!r} + f'/{{f}}', nn.Linear(3, 2))
    assert any(m.startswith('fastai') for m in sys.modules) == (f == 'fastai')
"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
