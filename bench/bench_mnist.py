"""MNIST with a ResNet-34 from scratch at 99 % sparsity (ERK), five epochs of one-cycle: the promise of the 2020 fastsparse's README.

    python bench/bench_mnist.py --path mnist.npz --method snfs [--out bench/results]
"""
import argparse, json, platform, time
from pathlib import Path
import numpy as np, torch
from fastai.vision.all import *
from torch.utils.data import TensorDataset
import fastsparse
from fastsparse import *

methods = dict(snfs=SNFS_presets, rigl=RigL_presets, set=SET_presets, static=None)

def mnist_dls(path, bs, n_train=None):
    "Batches of (bs,3,28,28) floats; statistics of the training set."
    d = np.load(path)
    def xy(x, y, n=None):
        x = torch.from_numpy(d[x][:n]).float().div_(255).sub_(0.1307).div_(0.3081)
        return TensorDataset(x[:,None].expand(-1,3,-1,-1), torch.from_numpy(d[y][:n]).long())
    train = DataLoader(xy('x_train', 'y_train', n_train), bs=bs, shuffle=True, drop_last=True, num_workers=0)
    return DataLoaders(train, DataLoader(xy('x_test', 'y_test'), bs=1000, num_workers=0))

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--path', required=True); a.add_argument('--method', choices=methods, required=True)
    a.add_argument('--sparsity', type=float, default=0.99); a.add_argument('--epochs', type=int, default=5)
    a.add_argument('--bs', type=int, default=128); a.add_argument('--lr', type=float, default=3e-3)
    a.add_argument('--batches_per_update', type=int, default=32); a.add_argument('--seed', type=int, default=0)
    a.add_argument('--n_train', type=int); a.add_argument('--kernels', choices=['auto','off'], default='auto')
    a.add_argument('--out', default='bench/results')
    a = a.parse_args()
    set_seed(a.seed, reproducible=True)
    from torchvision.models import resnet34
    model = resnet34(weights=None, num_classes=10)
    if a.kernels == 'off': model = model.to(memory_format=torch.channels_last)      # the faster one for dense convolutions
    learn = Learner(mnist_dls(a.path, a.bs, a.n_train), model, loss_func=CrossEntropyLossFlat(), metrics=[accuracy, Sparsity(), EverActive()])
    sparsify_model(learn, a.sparsity, sparse_f=erdos_renyi_sparsity)
    preset = methods[a.method]
    kernels = 'auto' if a.kernels == 'auto' else False
    cb = (DynamicSparseTrainingCallback(**preset, batches_per_update=a.batches_per_update, sparse_kernels=kernels) if preset
          else SparseKernelsCallback() if kernels else None)
    t0 = time.time()
    learn.fit_one_cycle(a.epochs, a.lr, cbs=cb)
    ps = sparse_params(model)
    settings = {k: v for k,v in vars(a).items() if k not in ('path','out')}
    res = dict(bench='mnist_resnet34', settings=settings, accuracy=[float(v[2]) for v in learn.recorder.values],
               valid_loss=[float(v[1]) for v in learn.recorder.values], seconds=time.time()-t0, updates=len(cb.updates) if preset else 0,
               active=sum(p.n_active for p in ps), weights=sum(p.mask.numel() for p in ps),
               threads=torch.get_num_threads(), machine=platform.machine(),
               versions=dict(fastsparse=fastsparse.__version__, torch=torch.__version__, python=platform.python_version()))
    out = Path(a.out); out.mkdir(parents=True, exist_ok=True)
    (out/f'mnist_resnet34_{a.method}_seed{a.seed}.json').write_text(json.dumps(res, indent=1) + '\n')
    print(f"{a.method}: {res['accuracy'][-1]:.4f} with {res['active']} of {res['weights']} weights")

if __name__ == '__main__': main()
