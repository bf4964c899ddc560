"""Whole training steps with real sparsity against dense ones: a fastai `Learner`, data in memory, optimizer, hooks and callbacks included.

    python bench/bench_training.py [--models resnet18 mlp …] [--sparsities 0.9 0.95 0.99] [--threads 2] [--peers DIR] [--out bench/results]

All learners of a model live in one process and take turns, a few steps each, round after round; figures are medians over rounds.
A sparse step counts its share of a connectivity update (RigL, every 100 steps). Dense is the better of NCHW and channels_last in
fp32; dense under bf16 autocast stands beside it, and dense with the fused optimizer step that sparse training gets by itself
(weights in channels_last have none). With `--peers` (see requirements.txt) the same masked model runs through SparseProp's
swap too, its mask static. Every contender keeps the memory that tensors free (bench_kernels.py says why).
`--profile` prints where the time of a sparse step goes.
"""
import argparse, gc, json, platform, statistics, sys, time
from functools import partial
from pathlib import Path
import torch, torch.nn.functional as F
from torch import nn
from fastai.basics import Adam, Callback, CancelValidException, DataLoaders, Learner, SGD, set_seed
from torch.utils.data import DataLoader
import fastsparse
from fastsparse import DynamicSparseTrainingCallback, RigL_presets, sparse_kernels_report, sparsify_model
from fastsparse.kernels import isa
from fastsparse.layers import layer_inputs
from fastsparse.steps import fuse_steps
from fastsparse.training import cpu_name
from bench_kernels import keep_memory

EVERY = 100          # steps between connectivity updates, RigL's

class Encoder(nn.Module):
    "Six transformer layers on 128 tokens of width 512, and a mean-pooled head."
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(1000, 512)
        self.body = nn.ModuleList(nn.TransformerEncoderLayer(512, 8, 2048, dropout=0., batch_first=True) for _ in range(6))
        self.head = nn.Linear(512, 10)
    def forward(self, x):
        x = self.emb(x)
        for l in self.body: x = l(x)
        return self.head(x.mean(1))

def _images(bs): return torch.randn(bs, 3, 64, 64), torch.randint(0, 10, (bs,))
def _resnet(name): return getattr(__import__('torchvision').models, name)(num_classes=10)
def _mlp(): return nn.Sequential(nn.Linear(784,4096), nn.ReLU(), nn.Linear(4096,4096), nn.ReLU(), nn.Linear(4096,10))

# model, a batch, optimizer, layers left dense, learning rate
MODELS = dict(
    resnet18=(partial(_resnet, 'resnet18'), partial(_images, 64), partial(SGD, mom=0.9), ['conv1', 'fc'], 1e-3),
    resnet50=(partial(_resnet, 'resnet50'), partial(_images, 32), partial(SGD, mom=0.9), ['conv1', 'fc'], 1e-3),
    mlp=(_mlp, lambda: (torch.randn(128,784), torch.randint(0,10,(128,))), Adam, ['4'], 1e-4),
    transformer=(Encoder, lambda: (torch.randint(0,1000,(16,128)), torch.randint(0,10,(16,))), Adam, ['head'], 1e-4))

# what the project set out to reach, over dense
TARGETS = dict(resnet18=(1.7, 2.3, 3.2), resnet50=(1.5, 2., 2.8), mlp=(4., 7., 20.), transformer=(2., 3., 5.))

class Timer(Callback):
    "Seconds from the end of one step to the end of the next."
    order = 1000
    def before_validate(self): raise CancelValidException
    def before_train(self): self.times,self.last = [],None
    def after_batch(self):
        now = time.perf_counter()
        if self.last is not None: self.times.append(now-self.last)
        self.last = now

class ChannelsLast(Callback):
    def before_batch(self): self.learn.xb = tuple(x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in self.xb)

class BF16(Callback):
    def before_batch(self):
        self.ac = torch.autocast('cpu', torch.bfloat16)
        self.ac.__enter__()
    def after_loss(self): self.ac.__exit__(None, None, None)

class FusedStep(Callback):
    "What sparse training does by itself, for a dense learner."
    def before_fit(self): fuse_steps(self.learn.opt)

def get_learner(model_f, batch_f, opt_func, lr, n_steps, cbs=()):
    set_seed(0)
    model,batch = model_f(),batch_f()
    dls = DataLoaders(DataLoader([batch]*n_steps, batch_size=None), DataLoader([batch], batch_size=None))
    return Learner(dls, model, loss_func=lambda p,y: F.cross_entropy(p.float(), y), opt_func=opt_func, lr=lr, cbs=[Timer(), *cbs], default_cbs=True)

def sparseprop_learner(name, s, n_steps):
    "The masked model with every layer swapped that SparseProp's own test finds faster; attention's projections are not for it to see."
    from sparseprop.modules import sparsify_if_faster
    model_f,batch_f,opt_func,skip,lr = MODELS[name]
    learn = get_learner(model_f, batch_f, opt_func, lr, n_steps)
    sparsify_model(learn, s, skip=skip).remove()
    layers = {n: m for n,m in learn.model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and n not in skip and not n.endswith('out_proj')}
    seen = layer_inputs(learn.model, layers.values(), batch_f()[0])
    for n,m in layers.items():
        parent,_,attr = n.rpartition('.')
        setattr(learn.model.get_submodule(parent), attr, sparsify_if_faster(m, next(iter(seen[m]))[0]))
    return learn

def contestants(name, sparsities, n_steps, every, peers):
    "Learners and the callbacks of their fits."
    model_f,batch_f,opt_func,skip,lr = MODELS[name]
    res = {'dense': (get_learner(model_f, batch_f, opt_func, lr, n_steps), ()), 'dense bf16': (get_learner(model_f, batch_f, opt_func, lr, n_steps, [BF16()]), ()),
           'dense fused': (get_learner(model_f, batch_f, opt_func, lr, n_steps, [FusedStep()]), ())}
    if 'resnet' in name:
        for k,cbs in (('dense channels_last', [ChannelsLast()]), ('dense bf16 channels_last', [ChannelsLast(), BF16()])):
            res[k] = get_learner(model_f, batch_f, opt_func, lr, n_steps, cbs),()
            res[k][0].model.to(memory_format=torch.channels_last)
    for s in sparsities:
        learn = get_learner(model_f, batch_f, opt_func, lr, n_steps)
        sparsify_model(learn, s, skip=skip)
        res[f'sparse {s:g}'] = learn,(DynamicSparseTrainingCallback(**RigL_presets, batches_per_update=every),)
        if peers: res[f'sparseprop {s:g}'] = sparseprop_learner(name, s, n_steps),()
    return res

def run_round(learn, cbs, every):
    "Median seconds of an ordinary step, and seconds that an update costs in all, of one short fit."
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=list(cbs))
    t = learn.timer.times            # t[i] ends with step i+1
    if not cbs: return statistics.median(t[1:]),None
    update = t[every-1] + t[every]   # the update's batch, and the one after, into which swapping may spill
    rest = [x for i,x in enumerate(t) if i > 1 and i not in (every-1, every)]
    return statistics.median(rest), update - statistics.median(rest)

def measure(name, sparsities, rounds, peers, every=6, n_steps=16):
    cs = contestants(name, sparsities, n_steps, every, peers)
    times,updates = {k: [] for k in cs},{k: [] for k in cs}
    for r in range(rounds+1):
        for k,(learn,cbs) in cs.items():
            step,update = run_round(learn, cbs, every)
            if r == 0: continue      # warm-up: timings of layers, caches, pages
            times[k].append(step)
            if update is not None: updates[k].append(update)
    ms = {k: 1e3*statistics.median(v) for k,v in times.items()}
    dense = min(v for k,v in ms.items() if k in ('dense', 'dense channels_last'))
    fused = min(dense, ms['dense fused'])
    bf16 = min(v for k,v in ms.items() if 'bf16' in k)
    until = RigL_presets['stop_pct'] # of training, after which connectivity stays
    rows = []
    for s in sparsities:
        k = f'sparse {s:g}'
        step,update = ms[k],1e3*statistics.median(updates[k])
        mean = (step*(EVERY-1) + update)/EVERY
        rows.append(dict(model=name, sparsity=s, step_ms=step, update_ms=update, amortised_ms=mean, dense_ms=dense, dense_bf16_ms=bf16, dense_fused_ms=fused, speedup=dense/mean,
                         speedup_over_bf16=bf16/mean, speedup_over_fused=fused/mean, sparseprop_ms=ms.get(f'sparseprop {s:g}'), speedup_over_sparseprop=ms[f'sparseprop {s:g}']/mean if peers else None, update_in_dense_steps=update/dense, update_share=update/EVERY/mean,
                         update_share_of_training=until*update/(step*(EVERY-until) + until*update),
                         update_share_without_batch=until*(update-step)/(step*(EVERY-until) + until*update), target=TARGETS[name][[.9,.95,.99].index(s)] if s in (.9,.95,.99) else None,
                         layers=sparse_kernels_report(cs[k][0]).reset_index().to_dict('records')))
    return dict(model=name, all_ms=ms, rows=rows)

def profile(name, s):
    "Where the time of ordinary sparse steps goes."
    model_f,batch_f,opt_func,skip,lr = MODELS[name]
    learn = get_learner(model_f, batch_f, opt_func, lr, 10)
    sparsify_model(learn, s, skip=skip)
    cb = DynamicSparseTrainingCallback(**RigL_presets, batches_per_update=1000, keep_kernels=True)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=cb)
    (xb,yb),opt = next(iter(learn.dls.train)),learn.opt
    learn.model.train()
    def steps(n):
        for _ in range(n):
            learn.loss_func(learn.model(xb), yb).backward()
            opt.step(); opt.zero_grad()
    with torch.profiler.profile(): steps(10)     # its own allocations settle
    with torch.profiler.profile() as prof: steps(5)
    print(prof.key_averages().table(sort_by='self_cpu_time_total', row_limit=25, max_name_column_width=60))

def plot(results, path):
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig,ax = plt.subplots(figsize=(7,4.2), layout='constrained')
    for i,res in enumerate(results):
        xs = [100*r['sparsity'] for r in res['rows']]
        ax.plot(xs, [r['speedup'] for r in res['rows']], 'o-', color=f'C{i}', label=res['model'])
        ax.plot(xs, [r['target'] for r in res['rows']], ':', color=f'C{i}', alpha=.5)
    ax.axhline(1, color='gray', lw=.8)
    ax.set(xlabel='sparsity (%)', ylabel='speed-up of a training step over dense fp32', yscale='log', title='dotted: what the project set out to reach')
    ax.set_yticks([1,2,5,10,20], ['1×','2×','5×','10×','20×'])
    ax.legend()
    fig.savefig(path, dpi=110)

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--models', nargs='+', choices=MODELS, default=list(MODELS)); a.add_argument('--sparsities', nargs='+', type=float, default=[.9,.95,.99])
    a.add_argument('--threads', type=int, default=2); a.add_argument('--rounds', type=int, default=5)
    a.add_argument('--out', default='bench/results'); a.add_argument('--profile', type=float, metavar='SPARSITY')
    a.add_argument('--peers', help='folder with sparseprop')
    a = a.parse_args()
    keep_memory()
    if a.peers: sys.path.append(a.peers)
    torch.set_num_threads(a.threads)
    if a.profile: return [profile(m, a.profile) for m in a.models]
    out,results = Path(a.out),[]
    out.mkdir(parents=True, exist_ok=True)
    for m in a.models:
        results.append(measure(m, a.sparsities, a.rounds, bool(a.peers)))
        gc.collect()
        for r in results[-1]['rows']:
            print(f"{m:12} {r['sparsity']:.0%}: {r['amortised_ms']:8.1f} ms, dense {r['dense_ms']:8.1f} (bf16 {r['dense_bf16_ms']:.1f}): {r['speedup']:.2f}× (wanted {r['target']}), "
                  f"update {r['update_in_dense_steps']:.1f} dense steps, {r['update_share']:.1%} of the time while they go on, {r['update_share_of_training']:.1%} of training "
                  f"({r['update_share_without_batch']:.1%} without forward and backward of its batch); over dense with a fused step {r['speedup_over_fused']:.2f}×", flush=True)
        res = dict(bench='training', settings=dict(threads=a.threads, rounds=a.rounds, every=EVERY), cpu=cpu_name(), machine=platform.machine(), isa=isa(),
                   versions=dict(fastsparse=fastsparse.__version__, torch=torch.__version__, python=platform.python_version()), results=results)
        (out/'training.json').write_text(json.dumps(res, indent=1) + '\n')
    plot(results, out/'training.png')

if __name__ == '__main__': main()
