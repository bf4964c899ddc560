"Forward and backward of sparse layers against dense PyTorch and other sparse libraries: one process, interleaved, medians."
import argparse, json, os, platform, statistics, sys, time
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from math import exp, log
from pathlib import Path

@dataclass(frozen=True)
class Linear:
    "`batch` rows through a layer of `i` inputs and `o` outputs"
    i:int; o:int; batch:int
    def __str__(self): return f'linear {self.i}>{self.o} B{self.batch}'
    @property
    def weight_shape(self): return self.o, self.i
    @property
    def x_shape(self): return self.batch, self.i
    @property
    def flops(self): return 3 * 2 * self.batch * self.i * self.o

@dataclass(frozen=True)
class Conv:
    "`batch` square images of `c` channels and side `hw` through a `k` x `k` kernel with `o` outputs"
    c:int; o:int; hw:int; k:int=3; stride:int=1; batch:int=64
    def __str__(self): return f'conv{self.k}x{self.k} {self.c}>{self.o} {self.hw}² B{self.batch}' + (f' stride {self.stride}' if self.stride > 1 else '')
    @property
    def pad(self): return self.k//2
    @property
    def weight_shape(self): return self.o, self.c, self.k, self.k
    @property
    def x_shape(self): return self.batch, self.c, self.hw, self.hw
    @property
    def flops(self): return 3 * 2 * self.batch * self.c * self.o * self.k**2 * (self.hw//self.stride)**2

LINEARS = [Linear(512, 256, 128), Linear(768, 3072, 128), Linear(3072, 768, 128), Linear(2048, 2048, 64), Linear(1024, 1024, 512)]
CONVS = [Conv(64, 64, 56), Conv(128, 128, 28), Conv(256, 256, 14), Conv(512, 512, 7), Conv(128, 256, 28, stride=2),
         Conv(256, 64, 56, k=1), Conv(512, 128, 28, k=1)]
SPARSITIES = {'linear': [.5, .8, .9, .95, .99, .995], 'conv': [.8, .9, .95, .99, .995]}
TARGETS = {'linear': {.8: 2.3, .9: 4.5, .95: 8, .99: 18}, 'conv': {.8: 1.6, .9: 3, .95: 5, .99: 12}}

def kind(case): return 'linear' if isinstance(case, Linear) else 'conv'
def slug(sparsity): return f'{100*sparsity:g} %'

# Contenders: each is a function that runs forward and backward once, from and to contiguous tensors

def make_dense(case, w, x, dy, fmt='contiguous', dtype=None):
    import torch, torch.nn.functional as F
    f = getattr(torch, 'channels_last' if fmt == 'channels_last' else 'contiguous_format')
    x, w, dy = (t.detach().to(dtype or t.dtype).contiguous(memory_format=f) for t in (x, w, dy))
    x.requires_grad_(), w.requires_grad_()
    def run():
        y = F.linear(x, w) if kind(case) == 'linear' else F.conv2d(x, w, None, case.stride, case.pad)
        torch.autograd.grad(y, (x, w), dy)
    return run

def make_ours(case, w, x, dy, layout=None):
    import torch
    from fastsparse import kernels as K
    m = (w != 0).numpy()
    if kind(case) == 'linear': plan = K.LinearPlan.from_mask(m)
    else: plan = K.Conv2dPlan.from_mask(m, stride=(case.stride,)*2, padding=(case.pad,)*4, layout=layout)
    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, v):
            ctx.save_for_backward(x, v)
            y = torch.empty_like(dy)
            plan.forward(x, v, None, y)
            return y
        @staticmethod
        def backward(ctx, dy):
            x, v = ctx.saved_tensors
            dx, dv = torch.empty_like(x), torch.empty_like(v)
            plan.backward(x, dy, v, dx, dv)
            return dx, dv
    v, x = w[w != 0].detach().requires_grad_(), x.detach().requires_grad_()
    def run(): torch.autograd.grad(Op.apply(x, v), (x, v), dy)
    run.plan, run.x, run.v, run.dy = plan, x, v, dy
    return run

def make_products(case, w, x, dy):
    "The three products of a Linear layer without autograd, into memory that is there: dense, and ours"
    import torch
    ours = make_ours(case, w, x, dy)
    plan, v, y, dx, dw, dv = ours.plan, ours.v.detach(), torch.empty_like(dy), torch.empty_like(x), torch.empty_like(w), torch.empty_like(ours.v)
    def dense():
        torch.mm(x, w.T, out=y)
        torch.mm(dy, w, out=dx)
        torch.mm(dy.T, x, out=dw)
    def sparse():
        plan.forward(x, v, None, y)
        plan.backward(x, dy, v, dx, dv)
    return dense, sparse

def _module(m, x, dy):
    import torch
    x, ps = x.detach().requires_grad_(), [p for p in m.parameters() if p.requires_grad]
    def run(): torch.autograd.grad(m(x), [x, *ps], dy)
    return run

def make_layer(case, w, x, dy):
    "The module that people use, with all that it checks on the way"
    import torch
    from fastsparse.layers import SparseConv2d, SparseLinear
    dense = torch.nn.Linear(case.i, case.o, bias=False) if kind(case) == 'linear' else torch.nn.Conv2d(case.c, case.o, case.k, case.stride, case.pad, bias=False)
    dense.weight.data.copy_(w)
    return _module((SparseLinear if kind(case) == 'linear' else SparseConv2d).from_dense(dense), x, dy)

def make_sparseprop(case, w, x, dy, over_on=None):
    from sparseprop.modules import SparseConv2d, SparseLinear
    if kind(case) == 'linear': return _module(SparseLinear(w.clone()), x, dy)
    return _module(SparseConv2d(w.clone(), bias=None, padding=case.pad, stride=case.stride, vectorizing_over_on=over_on), x, dy)

def make_sparselab(case, w, x, dy):
    import sparselab
    m = sparselab.SparseLinear(case.i, case.o, bias=False, sparsity=float((w == 0).float().mean()))
    return _module(m, x, dy)

def contenders(case, w, x, dy, peers):
    import torch
    yield 'dense', lambda: make_dense(case, w, x, dy)
    if kind(case) == 'conv': yield 'dense channels_last', lambda: make_dense(case, w, x, dy, 'channels_last')
    # Without AMX bf16 is emulated, and takes minutes.
    if 'ONEDNN_MAX_CPU_ISA' not in os.environ: yield 'dense bf16', lambda: make_dense(case, w, x, dy, 'channels_last' if kind(case) == 'conv' else 'contiguous', torch.bfloat16)
    yield 'fastsparse', lambda: make_ours(case, w, x, dy)
    yield 'fastsparse layer', lambda: make_layer(case, w, x, dy)
    if kind(case) == 'linear':
        for i, n in enumerate(('products dense', 'products fastsparse')): yield n, lambda i=i: make_products(case, w, x, dy)[i]
    if not peers: return
    if kind(case) == 'linear':
        yield 'sparseprop', lambda: make_sparseprop(case, w, x, dy)
        yield 'sparselab', lambda: make_sparselab(case, w, x, dy)
    else:
        for on in (True, False): yield f'sparseprop on={on}', lambda on=on: make_sparseprop(case, w, x, dy, on)

# Measuring

KEEP = {'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': str(1 << 40)}

def keep_memory():
    """Start over with an allocator that keeps freed memory, for every contender alike.

    Large tensors otherwise come as fresh pages at each call, and clearing those takes the kernel longer than the layer needs."""
    if not KEEP.items() <= os.environ.items(): os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP)

def clock():
    "One thread is timed by its own clock, which stands still while another process has the core"
    import torch
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

def burst(run, seconds, now):
    "Seconds of each of the runs that fit in `seconds`, after one that warms the caches up for this contender"
    run()
    out, end = [], now() + seconds
    while not out or now() < end:
        t = now(); run(); out.append(now() - t)
    return out

def error(e): return f'{type(e).__name__}: {e}'

def interleaved(runs, budget, failed=None):
    """For each of `runs` the median seconds of a burst, burst by burst, in about `budget` seconds. Bursts are taken in turns, and the order turns as well.

    The machine may be half as fast for some seconds: bursts are as short as `budget` allows, so that those of one round meet the same conditions. Peers that fail are noted in `failed`"""
    times, names = {n: [] for n in runs}, list(runs)
    def attempt(n, seconds):
        try: return statistics.median(burst(runs[n], seconds, clock()))
        except Exception as e:
            if failed is None or not n.startswith('sparse'): raise
            failed[n] = error(e)
            del times[n]
    once = sum(filter(None, [attempt(n, 0) for n in names]))
    rounds = max(3, min(15, int(budget/4/once)))
    for i in range(rounds):
        for n in names[i % len(names):] + names[:i % len(names)]:
            if n in times and (t := attempt(n, budget/rounds/len(runs))): times[n].append(t)
    return times

def over(a, b): return statistics.median(x/y for x, y in zip(a, b))   # of bursts of the same round

def measure(case, sparsity, budget, peers):
    "One point: seconds of every contender, and what follows from them"
    import torch
    torch.manual_seed(0)
    w = torch.randn(case.weight_shape) * (torch.rand(case.weight_shape) >= sparsity)
    x = torch.randn(case.x_shape)
    dy = torch.randn(case.batch, case.o, *([] if kind(case) == 'linear' else [case.hw//case.stride]*2))
    runs, failed = {}, {}
    for n, make in contenders(case, w, x, dy, peers):
        try: runs[n] = make(); runs[n]()
        except Exception as e: failed[n] = error(e)
    t = interleaved(runs, budget, failed=failed)
    return point(case, sparsity, int((w != 0).sum()), t, failed)

def best(times, prefix): return min((t for n, t in times.items() if n.startswith(prefix) and 'bf16' not in n), key=statistics.median, default=None)

def point(case, sparsity, nnz, times, failed):
    seconds = {n: statistics.median(t) for n, t in times.items()}
    dense, ours, layer = best(times, 'dense'), times['fastsparse'], times['fastsparse layer']
    p = dict(case=str(case), kind=kind(case), sparsity=sparsity, nnz=nnz, seconds=seconds, rounds=len(ours), failed=failed, dense_gflops=case.flops/statistics.median(dense)/1e9,
             gflops=case.flops*(nnz/(case.weight_shape[0]*case.flops_per_row()))/seconds['fastsparse']/1e9, over_dense=over(dense, ours), layer_over_dense=over(dense, layer))
    if 'products dense' in times: p['products_over_dense'] = over(times['products dense'], times['products fastsparse'])
    for peer in ('sparseprop', 'sparselab'):
        if (t := best(times, peer)): p[f'over_{peer}'] = over(t, ours)
    return p

def flops_per_row(self):
    n = 1
    for d in self.weight_shape[1:]: n *= d
    return n
Linear.flops_per_row = Conv.flops_per_row = flops_per_row

def gemm_peak():
    "GFLOP/s of a large dense product, the machine's practical peak"
    import torch
    a = torch.randn(1536, 1536)
    t = interleaved({'gemm': lambda: a @ a}, .5)['gemm']
    return 2 * 1536**3 / statistics.median(t) / 1e9

def machine():
    import torch
    from fastsparse import kernels as K
    from fastsparse.training import cpu_name
    vs = {}
    for p in ('torch', 'numpy', 'sparseprop', 'sparselab'):
        try: vs[p] = version(p)
        except Exception: pass
    return dict(cpu=cpu_name(), isa=K.isa(), threads=torch.get_num_threads(), clock=clock().__name__, memory_kept=KEEP.items() <= os.environ.items(), versions=vs, python=platform.python_version(),
                dense_limits={k: os.environ[k] for k in ('ATEN_CPU_CAPABILITY', 'ONEDNN_MAX_CPU_ISA') if k in os.environ},
                peak_gflops=gemm_peak(), date=datetime.now(timezone.utc).isoformat(timespec='seconds'))

# Reporting

def geomean(xs): return exp(sum(map(log, xs))/len(xs)) if xs else float('nan')

def summary(points):
    "Geometric means over the cases, for each kind and sparsity"
    out = []
    for k in ('linear', 'conv'):
        for s in sorted({p['sparsity'] for p in points if p['kind'] == k}):
            ps = [p for p in points if p['kind'] == k and p['sparsity'] == s]
            row = dict(kind=k, sparsity=s, over_dense=geomean([p['over_dense'] for p in ps]), layer_over_dense=geomean([p['layer_over_dense'] for p in ps]), target=TARGETS[k].get(s))
            if all('products_over_dense' in p for p in ps): row['products_over_dense'] = geomean([p['products_over_dense'] for p in ps])
            for peer in ('sparseprop', 'sparselab'):
                rs = [p[f'over_{peer}'] for p in ps if f'over_{peer}' in p]
                if rs: row |= {f'over_{peer}': geomean(rs), f'least_over_{peer}': min(rs)}
            out.append(row)
    return out

def show(p, peak=None):
    line = f"{p['case']:34} {slug(p['sparsity']):7} {p['over_dense']:6.2f}x dense (layer {p['layer_over_dense']:5.2f}x"
    if 'products_over_dense' in p: line += f", products {p['products_over_dense']:5.2f}x"
    line += f") {p['gflops']:6.1f} GFLOP/s"
    if peak: line += f" {100*p['gflops']/peak:4.0f} % of peak"
    for peer in ('sparseprop', 'sparselab'):
        if f'over_{peer}' in p: line += f"  {p[f'over_{peer}']:5.2f}x {peer}"
    print(line, flush=True)

def save(a, info, points):
    "JSON and plots; points measured before, of other cases but under the same conditions, are kept"
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    f, new = Path(f'{a.out}.json'), {(p['case'], p['sparsity']) for p in points}
    old = json.loads(f.read_text()) if f.exists() else None
    if old and all(old['machine'].get(k) == info[k] for k in ('cpu', 'isa', 'threads', 'versions', 'dense_limits', 'memory_kept')):
        points = [p for p in old['points'] if (p['case'], p['sparsity']) not in new] + points
    order = [str(c) for c in LINEARS + CONVS]
    points = sorted(points, key=lambda p: (order.index(p['case']), p['sparsity']))
    f.write_text(json.dumps(dict(machine=info, summary=summary(points), points=points), indent=1))
    plots(points, a.out)

def plots(points, stem):
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    for k in ('linear', 'conv'):
        cases = list(dict.fromkeys(p['case'] for p in points if p['kind'] == k))
        if not cases: continue
        fig, (a, b) = plt.subplots(1, 2, figsize=(12, 4.5))
        for c in cases:
            ps = sorted((p for p in points if p['case'] == c), key=lambda p: p['sparsity'])
            a.plot([slug(p['sparsity']) for p in ps], [p['over_dense'] for p in ps], 'o-', label=c)
            b.plot([p['nnz'] for p in ps], [1e3*p['seconds']['fastsparse'] for p in ps], 'o-', label=c)
        a.axhline(1, c='k', lw=.5); a.set(xlabel='sparsity', ylabel='speed-up over the best dense fp32', yscale='log', title='forward + backward')
        a.set_yticks([1,2,5,10,20], ['1×','2×','5×','10×','20×'])
        b.set(xlabel='nonzeros', ylabel='ms', xscale='log', yscale='log', title='time against nonzeros')
        a.legend(fontsize=7); fig.tight_layout(); fig.savefig(f'{stem}-{k}.png', dpi=110); plt.close(fig)

def parts(case, sparsity):
    "GFLOP/s of forward, input gradient and weight gradient alone, and what they take besides: all of them with one nonzero in each row"
    import torch
    w = torch.randn(case.weight_shape) * (torch.rand(case.weight_shape) >= sparsity)
    x = torch.randn(case.x_shape)
    dy = torch.randn(case.batch, case.o, *([] if kind(case) == 'linear' else [case.hw//case.stride]*2))
    r, few = make_ours(case, w, x, dy), torch.zeros(len(w), w[0].numel())
    rows = torch.arange(len(w))
    few[rows, rows % few.shape[1]] = 1
    q = make_ours(case, few.view_as(w), x, dy)
    qv, qdv = q.v.detach().numpy(), torch.empty(len(q.v)).numpy()
    def besides(): q.plan.forward(x, qv, None, y); q.plan.backward(x, dy, qv, dx, qdv)
    p, x, v, dy, y, dx, dv = r.plan, x.numpy(), r.v.detach().numpy(), dy.numpy(), torch.empty_like(dy).numpy(), torch.empty_like(x).numpy(), torch.empty_like(r.v).numpy()
    bursts = interleaved({'forward': lambda: p.forward(x, v, None, y), 'dx': lambda: p.backward_input(dy, v, dx),
                     'dvalues': lambda: p.backward_weight(x, dy, dv), 'both': lambda: p.backward(x, dy, v, dx, dv), 'besides': besides}, .4)
    t = {n: statistics.median(b) for n, b in bursts.items()}
    rest = t.pop('besides')
    f = case.flops/3*len(v)/w.numel()/1e9
    print(f'{str(case):34} {slug(sparsity):7} ' + '  '.join(f'{n} {(2 if n == "both" else 1)*f/s:6.1f} ({1e3*s:.2f} ms)' for n, s in t.items()) + f'  besides {1e3*rest:.2f} ms', flush=True)

def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--quick', action='store_true', help='two sparsities, short runs')
    ap.add_argument('--parts', action='store_true', help='only GFLOP/s of our three products')
    ap.add_argument('--kind', choices=['linear', 'conv'])
    ap.add_argument('--case', help='only cases whose name contains this')
    ap.add_argument('--sparsity', type=float, nargs='*')
    ap.add_argument('--threads', type=int, default=1)
    ap.add_argument('--isa', help="ours; dense is limited by ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA")
    ap.add_argument('--peers', help='folder with sparseprop and sparselab')
    ap.add_argument('--budget', type=float, default=2., help='seconds for one point')
    ap.add_argument('--fresh', action='store_true', help='let the allocator return large tensors to the system between calls, its default')
    ap.add_argument('--out', help='stem of the JSON and the plots')
    a = ap.parse_args()
    if not a.fresh: keep_memory()
    if a.peers: sys.path.append(a.peers)
    import torch
    from fastsparse import kernels as K
    torch.set_num_threads(a.threads)
    if a.isa: K.set_isa(a.isa)
    cases = [c for c in LINEARS + CONVS if a.kind in (None, kind(c)) and (not a.case or a.case in str(c))]
    def sparsities(case): return a.sparsity or ([.9, .99] if a.quick else SPARSITIES[kind(case)])
    if a.parts:
        for c in cases:
            for s in sparsities(c): parts(c, s)
        return
    info, points = machine(), []
    print(json.dumps(info))
    for c in cases:
        for s in sparsities(c):
            points.append(measure(c, s, .3 if a.quick else a.budget, bool(a.peers)))
            points[-1] |= dict(share_of_peak=points[-1]['gflops']/info['peak_gflops'], date=info['date'])
            show(points[-1], info['peak_gflops'])
        if a.out: save(a, info, points)
    for r in summary(points): print({k: round(v, 3) if isinstance(v, float) else v for k, v in r.items()})

if __name__ == '__main__': main()
