"""Train, save, start a new process, reload, validate: the loss and the accuracy must be the same to the last digit.

    python bench/bench_mnist_tiny.py --path mnist_tiny [--out bench/results]

`--path` is fastai's folder (`untar_data(URLs.MNIST_TINY)`) or its .tar.gz.
"""
import argparse, json, platform, subprocess, sys, tarfile, tempfile
from pathlib import Path
import torch
from fastai.vision.all import *
import fastsparse
from fastsparse import *

def get_learner(path):
    dls = ImageDataLoaders.from_folder(path, bs=64, num_workers=0)
    return vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)

def reload(path, saved):
    "In a new process: no sparsity, no distribution, no seed is given; the file knows."
    learn = get_learner(path)
    load_sparse_model(saved, learn.model)
    with learn.no_bar(): print(json.dumps([float(v).hex() for v in learn.validate()]))

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--path', required=True); a.add_argument('--out', default='bench/results'); a.add_argument('--seed', type=int, default=0)
    a.add_argument('--epochs', type=int, default=5); a.add_argument('--reload', help=argparse.SUPPRESS)
    a = a.parse_args()
    if a.reload: return reload(Path(a.path), a.reload)
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(a.path)
        if path.is_file():
            tarfile.open(path).extractall(tmp, filter='data')
            path = Path(tmp)/'mnist_tiny'
        set_seed(a.seed, reproducible=True)
        learn = get_learner(path)
        sparsify_model(learn.model, 0.9, sparse_f=erdos_renyi_sparsity)
        learn.fit_flat_cos(a.epochs, cbs=DynamicSparseTrainingCallback(**SNFS_presets, batches_per_update=8))
        save_model(f'{tmp}/sparse', learn.model, learn.opt)
        with learn.no_bar(): here = [float(v).hex() for v in learn.validate()]
        out = subprocess.run([sys.executable, __file__, '--path', path, '--reload', f'{tmp}/sparse'], capture_output=True, text=True, check=True)
        there = json.loads(out.stdout.strip().splitlines()[-1])
    ps = sparse_params(learn.model)
    res = dict(bench='mnist_tiny_reload', settings=dict(model='resnet18', sparsity=0.9, distribution='ERK', method='SNFS', epochs=a.epochs, seed=a.seed, batches_per_update=8),
               valid_loss=float.fromhex(here[0]), accuracy=float.fromhex(here[1]), same_to_the_last_bit=here == there, hex=dict(before=here, after=there),
               active=sum(p.n_active for p in ps), weights=sum(p.n_weights for p in ps), threads=torch.get_num_threads(), machine=platform.machine(),
               versions=dict(fastsparse=fastsparse.__version__, torch=torch.__version__, python=platform.python_version()))
    Path(a.out).mkdir(parents=True, exist_ok=True)
    (Path(a.out)/'mnist_tiny_reload.json').write_text(json.dumps(res, indent=1) + '\n')
    print(f"valid_loss {res['valid_loss']!r}, accuracy {res['accuracy']!r}; reloaded in a new process: {'the same to the last bit' if here == there else f'DIFFERENT: {there}'}")
    if here != there: sys.exit(1)

if __name__ == '__main__': main()
