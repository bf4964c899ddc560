"""Fill the README's figures from the JSON in bench/results: `python bench/readme.py`. `--check` fails if they are out of date."""
import json, math, re, sys
from pathlib import Path

root = Path(__file__).parent.parent
results = root/'bench'/'results'

def load(name):
    f = results/f'{name}.json'
    return json.loads(f.read_text()) if f.exists() else None

def table(head, rows, left=1):
    line = lambda cells: '| ' + ' | '.join(str(c) for c in cells) + ' |'
    return '\n'.join([line(head), '|' + '---|'*left + '--:|'*(len(head)-left), *map(line, rows)])

def pct(x): return f'{100*x:.4g} %'
def times(x): return '–' if x is None else f'{x:.1f}×'

def demo():
    d = load('demo')
    rows = [(r['method'], f"{100*r['accuracy']:.2f} %", f"{r['valid_loss']:.4f}", f"{r['nonzeros']:,} ({r['nonzeros']/r['weights']:.0%})",
             f"{r['flops']:,} ({r['flops']/r['dense_flops']:.0%})", f"{r['seconds']:.0f}") for r in d['results']]
    return (table(['method', 'accuracy', 'validation loss', 'connections', 'FLOPs per image', 'seconds'], rows) +
            f"\n\nSeed {d['settings']['seed']}, {d['machine']['threads']} thread, {d['machine']['cpu']}, a busy machine ([bench/results/demo.json](bench/results/demo.json)). FLOPs count the weights that exist. "
            "The sparse rows differ by some tenths of a percent from run to run, as kernels are chosen by timing and round differently; `--kernels off` repeats exactly. "
            "The digits are easy, and a mask that stays does as well as one that moves. What the demo shows is that nine tenths of the weights were not needed.")

def geomean(xs): return math.exp(sum(map(math.log, xs))/len(xs)) if xs else None

def means(name):
    "The geometric means of another run of the kernels' benchmark, in words."
    d = load(name)
    by = lambda kind: ', '.join(f"{s['over_dense']:.1f}" for s in d['summary'] if s['kind'] == kind)
    return f"{by('linear')} (Linear) and {by('conv')} (Conv2d)"

def kernels():
    d = load('kernels')
    if d is None: return ''
    aims,rows = {(s['kind'], s['sparsity']): s.get('target') for s in d['summary']},[]
    for kind,s in sorted({(p['kind'], p['sparsity']) for p in d['points']}, key=lambda k: (k[0] != 'linear', k[1])):
        ps = [p for p in d['points'] if (p['kind'], p['sparsity']) == (kind, s)]
        peers = [p['over_sparseprop'] for p in ps if p.get('over_sparseprop')]
        over = [times(geomean([p[k] for p in ps if k in p])) for k in ('products_over_dense', 'over_dense', 'layer_over_dense')]
        rows.append(('Linear' if kind == 'linear' else 'Conv2d', pct(s), len(ps), *over, times(aims.get((kind, s))), times(geomean(peers)), times(min(peers, default=None))))
    m = d['machine']
    return ('**One layer**, forward and backward, from and to ordinary contiguous tensors, geometric means over real layer shapes; the opponent is dense fp32 PyTorch in the better of its two memory formats. "In autograd": in a bare node of its graph, which the aim (what was set out for) and [SparseProp](https://github.com/IST-DASLab/sparseprop) are compared with; "layers": `SparseLinear` and `SparseConv2d` as they are used, with what they check at each call; '
            '"products": the three products of a Linear layer without autograd, into memory that is there, against PyTorch\'s likewise. What is between these is the call, which weighs more the less there is to compute.\n\n' +
            table(['layer', 'sparsity', 'shapes measured', 'products over dense', 'in autograd', 'layers', 'aim', 'over SparseProp', 'at least'], rows, 2) +
            f"\n\n{m['cpu']}, {m['isa']}, {m['threads']} thread, torch {m['versions']['torch']}, SparseProp {m['versions'].get('sparseprop', '–')}; memory kept by the allocator for all contenders, without which large tensors cost "
            "everybody more and the ratios are smaller ([every point](bench/results/kernels.json), [what was tried, and what limits it](bench/NOTES.md), `make bench-kernels`).\n\n"
            f"Likewise at 80, 90, 95 and 99 %, with AVX2 at the most, for dense too: {means('kernels-avx2')}; with two threads: {means('kernels-2threads')}.\n\n"
            "![Speed-up of Linear layers over dense](bench/results/kernels-linear.png)\n![Speed-up of convolutions over dense](bench/results/kernels-conv.png)")

def training():
    d = load('training')
    if d is None: return ''
    rows = [(r['model'], pct(r['sparsity']), f"{r['dense_ms']:.0f}", f"{r['amortised_ms']:.{0 if r['amortised_ms'] >= 100 else 1}f}", f"{r['speedup']:.2f}×", times(r['target']), f"{r['speedup_over_bf16']:.2f}×", times(r.get('speedup_over_sparseprop')), f"{r['update_in_dense_steps']:.1f}", pct(round(r['update_share_of_training'], 3)))
            for res in d['results'] for r in res['rows']]
    peers = [r['speedup_over_sparseprop'] for res in d['results'] for r in res['rows'] if r.get('speedup_over_sparseprop')]
    most = max(r['update_share_without_batch'] for res in d['results'] for r in res['rows'])
    def over_fused(rows): return '/'.join(f"{r['speedup_over_fused']:.1f}" for r in rows)
    fused = ', '.join(f"{res['model']} {over_fused(res['rows'])}" for res in d['results'])
    mean = f' ({geomean(peers):.1f}× slower in geometric mean)' if peers else ''
    return ('**Whole training steps** of a fastai `Learner` with RigL: forward, backward, optimizer, callbacks, and the share of a connectivity update every 100 steps, against the same learner dense.\n\n' +
            table(['model', 'sparsity', 'dense ms', 'sparse ms', 'over dense fp32', 'aim', 'over dense bf16', 'over SparseProp', 'an update, in dense steps', 'updates, share of training'], rows) +
            f"\n\n{d['cpu']}, {d['isa']}, {d['settings']['threads']} threads, torch {d['versions']['torch']}; every contender keeps the memory that tensors free; SparseProp's swap runs the same masked model with a mask that stays{mean}. "
            f"An update counts forward and backward of its batch, whose step it replaces; without them updates take {pct(round(most, 3))} of training at the most. Sparse training steps the optimizer in one pass over each parameter (fastsparse.steps), where fastai's Adam makes nine. Over dense training with that step, too: {fused} ([all figures](bench/results/training.json), `make bench-training`).\n\n"
            "![Speed-up of whole training steps over dense](bench/results/training.png)")

def memory():
    d,l = load('memory'),load('large')
    res = []
    if d is not None:
        d,s,share = {k: {n: d[k][n] for n in ('state', 'resident')} for k in ('dense', 'sparse')},d['settings'],d['share']
        def all_of(n): return (f"{d['sparse'][n]['steady']:.0f} MiB between updates and {d['sparse'][n]['peak']:.0f} MiB at the peak of an update, against {d['dense'][n]['steady']:.0f} and "
                               f"{d['dense'][n]['peak']:.0f} MiB dense ({share[n]['steady']:.0%} and {share[n]['peak']:.0%})")
        res.append(f"**Memory** that training adds, {s['model']}, {s['optimizer']}, {pct(s['sparsity'])} sparse. Weights, gradients and optimizer state alone: {all_of('state')}. "
                   f"Measured resident, with activations, masks and everything the kernels keep: {all_of('resident')}.")
    if l is not None:
        r = next(r for r in l['runs'] if r['method'] == 'rigl' and r['opt'] == 'adam')
        s = l['settings']
        res.append(f"**Wide**: {s['depth']} layers of {s['width']:,} × {s['width']:,} at {pct(s['sparsity'])} sparsity, born sparse, RigL by sampled gradients, Adam, batch {s['batch']}: {r['step_s']:.1f} s a step and "
                   f"{r['peak_rss_gb']:.1f} GB in all. Dense, the weights alone would take {r['dense_weights_gb']:.0f} GB ([bench/results/large.json](bench/results/large.json)).")
    return '\n\n'.join(res)

def mnist():
    rs = [json.loads(f.read_text()) for f in sorted(results.glob('mnist_resnet34_*.json'))]
    if not rs: return ''
    rows = [(r['settings']['method'], pct(r['settings']['sparsity']), f"{100*r['accuracy'][-1]:.2f} %", f"{r['active']:,} of {r['weights']:,}", r['updates']) for r in sorted(rs, key=lambda r: -r['accuracy'][-1])]
    s = rs[0]['settings']
    return (f"MNIST, ResNet-34 from scratch, `erdos_renyi_sparsity`, {s['epochs']} epochs of one-cycle, batch {s['bs']}, seed {s['seed']} (`python bench/bench_mnist.py --path FOLDER --method METHOD --bs {s['bs']}`):\n\n" +
            table(['method', 'sparsity', 'test accuracy', 'connections (masked layers)', 'updates'], rows))

def cifar():
    d = load('cifar')
    if d is None: return ''
    s,runs = d['settings'],d['runs']
    levels = list(runs[0]['time_to'])
    clock = lambda t: '–' if t is None else f'{t:.0f} s'
    rows = [(r['label'], f"{100*r['accuracy'][-1]:.2f} %", clock(r['seconds'][-1]), *[clock(r['time_to'][l]) for l in levels]) for r in runs]
    dense,short,last = runs
    ahead = max((float(l) for l in levels if last['time_to'][l] and last['time_to'][l] < dense['time_to'][l]), default=0)
    said = (f"Minute for minute the sparse run of {s['epochs']} epochs is ahead of the dense one until it ends, at {100*short['accuracy'][-1]:.1f} %. That of {last['epochs']} epochs, which takes about the dense run's time, is ahead "
            f"by some seconds up to {ahead:.0%} and behind after that: {100*last['accuracy'][-1]:.1f} % at the end, dense {100*dense['accuracy'][-1]:.1f} %.")
    return (f"CIFAR-10, a small ResNet from scratch, {s['epochs']} epochs of one-cycle, batch {s['bs']}, {s['threads']} threads, seed {s['seed']}: wall-clock time of training to a test accuracy (`python bench/bench_cifar.py --path FOLDER --epochs {s['epochs']}{' --as_long' if s.get('as_long') else ''}`).\n\n" +
            table(['', 'final accuracy', 'training'] + [f'to {float(l):.0%}' for l in levels], rows) +
            f"\n\n{said}\n\n![Test accuracy against minutes of training](bench/results/cifar.png)")

def main():
    f = root/'README.md'
    old = new = f.read_text()
    for name,make in dict(demo=demo, kernels=kernels, training=training, memory=memory, mnist=mnist, cifar=cifar).items():
        pattern = re.compile(rf'(<!-- {name}: begin[^>]*-->\n).*?(<!-- {name}: end -->)', re.S)
        if not pattern.search(new): sys.exit(f'README.md has no place for {name}')
        text = make()
        new = pattern.sub(lambda m: m[1] + (text + '\n' if text else '') + m[2], new)
    if '--check' in sys.argv: sys.exit('README.md is out of date: python bench/readme.py' if new != old else 0)
    f.write_text(new)

if __name__ == '__main__': main()
