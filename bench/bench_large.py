"""Layers of 100,000 × 100,000 that were born sparse, trained with connections that move: memory, seconds a step, seconds an update.

    python bench/bench_large.py [--width 100000] [--depth 3] [--sparsity 0.9995] [--methods rigl set] [--opts adam sgd] [--threads 2] [--out bench/results]

An MLP of `depth` such layers and a head with 1 % of its weights sees scikit-learn's digits, enlarged to `width` pixels. Each method and optimizer
runs in a process of its own, so that the peak of its memory is its own. RigL's update takes the place of a step, SET's comes after it.
"""
import argparse, json, os, platform, resource, statistics, subprocess, sys, time
from pathlib import Path
import numpy, torch, torch.nn.functional as F
from torch import nn
import fastsparse
from fastsparse.kernels import isa
from fastsparse.large import GradientSampler, large_layers, regrow
from fastsparse.layers import SparseLinear
from fastsparse.score import gradient_magnitude, random_score
from fastsparse.training import cpu_name

GB = 1e9
OPTS = dict(adam=lambda ps: torch.optim.Adam(ps, lr=1e-3, foreach=False), sgd=lambda ps: torch.optim.SGD(ps, lr=.02, momentum=.9, foreach=False))

def rss(): return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/GB
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024/GB
def image_size(width): return next((h, width//h) for h in range(int(width**.5), 0, -1) if width%h == 0)

def make_model(a):
    hidden = [l for _ in range(a.depth) for l in (SparseLinear(a.width, a.width, sparsity=a.sparsity), nn.ReLU())]
    for l in hidden[::2]: l.weight.data *= 6**.5        # He's variance
    return nn.Sequential(*hidden, SparseLinear(a.width, 10, sparsity=.99))

def digits(a):
    "Batch after batch, enlarged only when it is needed."
    from sklearn.datasets import load_digits
    x,y = (torch.tensor(t) for t in load_digits(return_X_y=True))
    x,y,g = (x.float().view(-1, 1, 8, 8)-5)/6, y.long(), torch.Generator().manual_seed(a.seed)
    while True:
        i = torch.randint(len(x), (a.batch,), generator=g)
        yield F.interpolate(x[i], image_size(a.width), mode='bilinear').flatten(1), y[i]

def step(model, opt, xb, yb, a, due, fraction):
    "One batch; (loss, seconds of forward and backward, of the rest, new connections)."
    rigl,t = a.method == 'rigl',time.perf_counter()
    ps = large_layers(model)
    with GradientSampler(ps if due and rigl else [], a.candidates) as sampler:
        loss = F.cross_entropy(model(xb), yb)
        loss.backward()
    mid,grown = time.perf_counter(),0
    if not (due and rigl): opt.step()
    if due: grown = sum(regrow(ps, opt, fraction, grow_score_f=gradient_magnitude if rigl else random_score, sampler=sampler))
    opt.zero_grad()
    return loss.item(), mid-t, time.perf_counter()-mid, grown

def train(a):
    "One method and optimizer, in this process."
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    start,data = rss(),digits(a)
    next(data)
    t = time.perf_counter()
    model = make_model(a)
    built,opt,rows = time.perf_counter()-t, OPTS[a.opt](model.parameters()), []
    for i in range(a.steps):
        due = i > 0 and i%a.every == 0 and i < a.steps-1
        loss,passes,rest,grown = step(model, opt, *next(data), a, due, a.fraction*(1-i/a.steps))
        rows.append(dict(loss=loss, passes_s=passes, rest_s=rest, update=due, grown=grown))
        print(f'{i:4d}  loss {loss:.4f}  {passes+rest:.2f} s' + (f'  {grown} new connections' if due else ''), file=sys.stderr, flush=True)
    return summary(a, model, opt, rows, built, start)

def summary(a, model, opt, rows, built, start):
    med = lambda rs: statistics.median(r['passes_s']+r['rest_s'] for r in rs)
    after = [r for q,r in zip(rows, rows[1:]) if q['update'] and not r['update']]
    plain = [r for q,r in zip(rows[1:], rows[2:]) if not q['update'] and not r['update']]
    losses = [r['loss'] for r in rows]
    weights,nnz = sum(p.n_weights for p in large_layers(model)),sum(p.n_active for p in large_layers(model))
    slots = sum(t.numel()*t.element_size() for s in opt.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    ups = [r for r in rows if r['update']]
    step_s,update_s,after_s = med(plain),med(ups),med(after)
    return dict(method=a.method, opt=a.opt, weights=weights, nonzeros=nnz, build_s=built, step_s=step_s, update_batch_s=update_s,
                first_step_after_s=after_s, update_cost_in_steps=(update_s+after_s)/step_s - 2,
                peak_rss_gb=peak(), rss_before_gb=start, optimizer_state_gb=slots/GB, dense_weights_gb=4*weights/GB,
                dense_training_gb=4*weights*(4 if a.opt == 'adam' else 3)/GB, updates=len(ups), grown=sum(r['grown'] for r in ups),
                loss_first=statistics.mean(losses[:5]), loss_last=statistics.mean(losses[-5:]), losses=losses)

def settings(a): return {k: getattr(a, k) for k in ('width', 'depth', 'sparsity', 'batch', 'steps', 'every', 'fraction', 'candidates', 'seed')}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--width', type=int, default=100_000); p.add_argument('--depth', type=int, default=3); p.add_argument('--sparsity', type=float, default=.9995)
    p.add_argument('--batch', type=int, default=64); p.add_argument('--steps', type=int, default=40); p.add_argument('--every', type=int, default=8)
    p.add_argument('--fraction', type=float, default=.3); p.add_argument('--candidates', type=float, default=1.); p.add_argument('--seed', type=int, default=0)
    p.add_argument('--methods', nargs='+', default=['rigl', 'set'], choices=['rigl', 'set']); p.add_argument('--opts', nargs='+', default=list(OPTS), choices=list(OPTS))
    p.add_argument('--threads', type=int, default=2); p.add_argument('--out', default='bench/results'); p.add_argument('--name', default='large')
    p.add_argument('--method', help=argparse.SUPPRESS); p.add_argument('--opt', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.method: return print(json.dumps(train(a)))
    runs = []
    for method in a.methods:
        for opt in a.opts:
            cmd = [sys.executable, __file__, *sys.argv[1:], '--method', method, '--opt', opt]
            out = subprocess.run(cmd, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, 'OMP_NUM_THREADS': str(a.threads)})
            runs.append(r := json.loads(out.stdout))
            print(f"{method} {opt}: peak {r['peak_rss_gb']:.2f} GB (dense weights alone: {r['dense_weights_gb']:.0f} GB), {r['step_s']:.2f} s a step, "
                  f"an update costs {r['update_cost_in_steps']:.1f} steps; loss {r['loss_first']:.3f} → {r['loss_last']:.3f}", flush=True)
    res = dict(bench='large', settings=settings(a), runs=runs, cpu=cpu_name(), isa=isa(), threads=a.threads, load=os.getloadavg()[0],
               versions=dict(fastsparse=fastsparse.__version__, torch=torch.__version__, numpy=numpy.__version__, python=platform.python_version()))
    Path(a.out).mkdir(parents=True, exist_ok=True)
    (Path(a.out)/f'{a.name}.json').write_text(json.dumps(res, indent=1) + '\n')

if __name__ == '__main__': main()
