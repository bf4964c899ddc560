"""Resident memory that training adds: an MLP 784-4096-4096-10 with Adam, batch 128, dense and at 95 % sparsity on the kernels.

    python bench/bench_memory.py [--sparsity 0.95] [--out bench/results]

Each side runs in a process of its own. What the process holds before the optimizer exists, less the weights, is taken off; the rest is
weights, gradients, optimizer state, structure and whatever the kernels keep: `resident`. `state` is weights, gradients and optimizer
state alone, counted from the tensors that are alive; during an update also the scores and decisions that it holds. Both are taken
between updates (`steady`, the largest of its kind for `state`) and over all batches with their updates (`peak`; RigL, every 5 steps
here), but for the first batch, on which a model that was born dense still is.
"""
import argparse, ctypes, gc, json, platform, subprocess, sys
from pathlib import Path

def rss(field='VmRSS'): return next(int(l.split()[1])/1024 for l in open('/proc/self/status') if l.startswith(field))

def trim():
    "Give freed memory back, so that resident means used."
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)

def size(o):
    "MiB of the tensors in `o`, a container or not."
    import torch
    if isinstance(o, torch.Tensor): return o.nbytes/2**20
    return sum(map(size, o)) if isinstance(o, (list, tuple)) else 0.

def state(learn, cb=None, *more):
    "MiB of weights, gradients and optimizer slots, and of what the updates in progress hold."
    ps = list(learn.model.parameters())
    held = [v for u in (cb.plans.values() if cb else ()) for v in vars(u).values()]
    return sum(size([p.data, p.grad, *learn.opt.state[p].values()]) for p in ps) + size(held) + size(more)

def one(sparsity, steps):
    import torch, torch.nn.functional as F
    from torch import nn
    from torch.utils.data import DataLoader
    from fastai.basics import Adam, Callback, CancelValidException, DataLoaders, Learner
    import fastai.callback.training
    from fastsparse import training
    from fastsparse import DynamicSparseTrainingCallback, RigL_presets, sparsify_model
    torch.set_num_threads(2)
    batch = torch.randn(128, 784),torch.randint(0, 10, (128,))
    warm = nn.Linear(784, 64)
    warm(batch[0]).sum().backward()      # whatever torch allocates once
    trim()
    base,seen,counted,cbs = rss(),dict(steady=[], peak=0.),dict(steady=[], peak=[0.]),[]
    def count(*more): counted['peak'].append(state(learn, cbs[0] if cbs else None, *more))
    class Watch(Callback):
        order = 1000
        def before_validate(self): raise CancelValidException
        def after_backward(self): count()
        def after_step(self): count()
        def after_cancel_step(self): count()
        def after_batch(self):
            if self.learn.iter == 1: open('/proc/self/clear_refs', 'w').write('5'), counted['peak'].clear()       # start the high-water marks anew
            if self.learn.iter >= 2:
                seen['peak'] = rss('VmHWM')
                trim()
                seen['steady'].append(rss())
                counted['steady'].append(counted['peak'][-1])
    model = nn.Sequential(nn.Linear(784,4096), nn.ReLU(), nn.Linear(4096,4096), nn.ReLU(), nn.Linear(4096,10))
    learn = Learner(DataLoaders(*[DataLoader([batch]*steps, batch_size=None)]*2), model, loss_func=F.cross_entropy, opt_func=Adam, lr=1e-4, cbs=Watch())
    if sparsity:
        collect = training._collect
        def counting(score, taken, floor, room):      # where an update holds most
            count(score, *(torch.from_numpy(t) for t in room if len(t)))
            return collect(score, taken, floor, room)
        training._collect = counting
        sparsify_model(learn, sparsity, skip='4')
        cbs.append(DynamicSparseTrainingCallback(**RigL_presets, batches_per_update=5, sparse_kernels=True))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=cbs)
    n = len(seen['steady'])
    print(json.dumps(dict(resident=dict(steady=sorted(seen['steady'])[n//2]-base, peak=seen['peak']-base),
                          state=dict(steady=sorted(counted['steady'])[n//2], peak=max(counted['peak'])))))

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
    share = {what: {k: res['sparse'][what][k]/res['dense'][what][k] for k in ('steady', 'peak')} for what in ('resident', 'state')}
    Path(a.out).mkdir(parents=True, exist_ok=True)
    import torch, fastsparse
    (Path(a.out)/'memory.json').write_text(json.dumps(dict(bench='memory', settings=dict(model='MLP 784-4096-4096-10', optimizer='Adam', batch=128, sparsity=a.sparsity), unit='MiB', **res, share=share,
        machine=platform.machine(), versions=dict(fastsparse=fastsparse.__version__, torch=torch.__version__, python=platform.python_version())), indent=1) + '\n')
    for what,ks in share.items():
        for k,v in ks.items(): print(f"{what} {k}: dense {res['dense'][what][k]:.0f} MiB, sparse {res['sparse'][what][k]:.0f} MiB: {v:.0%}")

if __name__ == '__main__': main()
