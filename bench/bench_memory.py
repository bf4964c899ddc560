"""Resident memory that training adds: an MLP 784-4096-4096-10 with Adam, batch 128, dense and at 95 % sparsity on the kernels.

    python bench/bench_memory.py [--sparsity 0.95] [--out bench/results]

Each side runs in a process of its own. What the process holds before the optimizer exists, less the weights, is taken off; the rest is
weights, gradients, optimizer state, structure and whatever the kernels keep. `peak` includes connectivity updates (RigL, every
5 steps here), but not the first batch, on which a model that was born dense still is.
"""
import argparse, ctypes, gc, json, platform, subprocess, sys
from pathlib import Path

def rss(field='VmRSS'): return next(int(l.split()[1])/1024 for l in open('/proc/self/status') if l.startswith(field))

def trim():
    "Give freed memory back, so that resident means used."
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)

def one(sparsity, steps):
    import torch, torch.nn.functional as F
    from torch import nn
    from torch.utils.data import DataLoader
    from fastai.basics import Adam, Callback, CancelValidException, DataLoaders, Learner
    import fastai.callback.training
    from fastsparse import DynamicSparseTrainingCallback, RigL_presets, sparsify_model
    torch.set_num_threads(2)
    batch = torch.randn(128, 784),torch.randint(0, 10, (128,))
    warm = nn.Linear(784, 64)
    warm(batch[0]).sum().backward()      # whatever torch allocates once
    trim()
    base,seen = rss(),dict(steady=[], peak=0.)
    class Watch(Callback):
        order = 1000
        def before_validate(self): raise CancelValidException
        def after_batch(self):
            if self.learn.iter == 1: open('/proc/self/clear_refs', 'w').write('5')       # start the high-water mark anew
            if self.learn.iter >= 2:
                seen['peak'] = rss('VmHWM')
                trim()
                seen['steady'].append(rss())
    model = nn.Sequential(nn.Linear(784,4096), nn.ReLU(), nn.Linear(4096,4096), nn.ReLU(), nn.Linear(4096,10))
    learn = Learner(DataLoaders(*[DataLoader([batch]*steps, batch_size=None)]*2), model, loss_func=F.cross_entropy, opt_func=Adam, lr=1e-4, cbs=Watch())
    cbs = []
    if sparsity:
        sparsify_model(learn, sparsity, skip='4')
        cbs = [DynamicSparseTrainingCallback(**RigL_presets, batches_per_update=5, sparse_kernels=True)]
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=cbs)
    n = len(seen['steady'])
    print(json.dumps(dict(steady=sorted(seen['steady'])[n//2]-base, peak=seen['peak']-base)))

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--sparsity', type=float, default=0.95); a.add_argument('--steps', type=int, default=24)
    a.add_argument('--out', default='bench/results'); a.add_argument('--one', type=float, help=argparse.SUPPRESS)
    a = a.parse_args()
    if a.one is not None: return one(a.one, a.steps)
    res = {}
    for name,s in (('dense', 0.), ('sparse', a.sparsity)):
        out = subprocess.run([sys.executable, __file__, '--one', str(s), '--steps', str(a.steps)], capture_output=True, text=True, check=True)
        res[name] = json.loads(out.stdout.strip().splitlines()[-1])
    share = {k: res['sparse'][k]/res['dense'][k] for k in ('steady', 'peak')}
    Path(a.out).mkdir(parents=True, exist_ok=True)
    import torch, fastsparse
    (Path(a.out)/'memory.json').write_text(json.dumps(dict(bench='memory', settings=dict(model='MLP 784-4096-4096-10', optimizer='Adam', batch=128, sparsity=a.sparsity), unit='MiB', **res, share=share,
        machine=platform.machine(), versions=dict(fastsparse=fastsparse.__version__, torch=torch.__version__, python=platform.python_version())), indent=1) + '\n')
    for k in share: print(f"{k}: dense {res['dense'][k]:.0f} MiB, sparse {res['sparse'][k]:.0f} MiB: {share[k]:.0%}")

if __name__ == '__main__': main()
