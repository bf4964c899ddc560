"Layers born sparse against their dense twins and the masked engine: draws, gradients, counts, slots, interruptions, memory."
import os, signal, subprocess, sys
from copy import deepcopy
from functools import partial
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from fastsparse import large
from fastsparse.large import *
from fastsparse.layers import SparseConv2d, SparseLinear, check_csr, csr_from_index
from fastsparse.schedule import drop_fraction
from fastsparse.score import dense_grad, gradient_magnitude, gradient_momentum, momentum_redistribution, opt_slots, random_score, weight_magnitude
from fastsparse.topology import SparseParam, attach_mask, drop_and_grow, set_masks, sparse_params

fast = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
pytestmark = pytest.mark.filterwarnings('ignore::fastsparse.layers.DenseFallbackWarning')
every = float('inf')

def net(sizes=(12,20,16,3), sparsity=.8, seed=0):
    "Smooth, so that no two gradients tie"
    torch.manual_seed(seed)
    layers = [l for i,o in zip(sizes, sizes[1:]) for l in (SparseLinear(i, o, sparsity=sparsity), nn.Tanh())]
    return nn.Sequential(*layers[:-1])

def batch(n=32, n_in=12, n_out=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, n_in, generator=g), torch.randint(n_out, (n,), generator=g)

def backward(model, xb, yb, candidates=None):
    with GradientSampler(large_layers(model) if candidates else [], candidates or 1.) as s: F.cross_entropy(model(xb), yb).backward()
    return s

def twin(model):
    "The same network, dense with masks, its masks enforced by nobody but the test."
    res = nn.Sequential(*[m.to_dense() if isinstance(m, SparseLinear) else m for m in model])
    for m in res:
        if isinstance(m, nn.Linear): attach_mask(SparseParam('weight', m, 'weight'), m.weight_mask)
    return res

def snapshot(model, opt=None):
    "Position → value and every slot, for each layer."
    return [{k: dict(zip(p.index.tolist(), t.tolist())) for k,t in dict(w=p.param.detach(), **opt_slots(opt, p.param)).items()} for p in large_layers(model)]

def assert_sound(model, opt=None, total=None):
    for p in large_layers(model):
        m = p.module
        check_csr(m.indptr, m.indices, *m.weight_shape[:1], p.n_weights//m.weight_shape[0], len(p.param))
        assert m.indptr.dtype is torch.int64 and m.indices.dtype is torch.int32
        assert p.param.grad is None or p.param.grad.shape == p.param.shape
        for k,t in opt_slots(opt, p.param).items(): assert t.shape == p.param.shape, (p.name, k)
    if total is not None: assert sum(p.n_active for p in large_layers(model)) == total

# Draws

@fast
@given(st.integers(1, 200), st.data())
def test_sample_vacant_draws_distinct_positions_that_are_not_taken(n, data):
    taken = sorted(data.draw(st.sets(st.integers(0, n-1))))
    k = data.draw(st.integers(0, n-len(taken)))
    got = sample_vacant(torch.tensor(taken, dtype=torch.int64), n, k).tolist()
    assert len(got) == k and got == sorted(set(got)) and not set(got) & set(taken) and all(0 <= i < n for i in got)

def test_sample_vacant_is_uniform():
    taken = torch.tensor([0, 1, 5, 17, 18, 19, 299])
    counts = torch.cat([sample_vacant(taken, 300, 5) for _ in range(12000)]).bincount(minlength=300).float()
    assert not counts[taken].any()
    free = torch.ones(300, dtype=torch.bool).index_fill(0, taken, False)
    want = 12000*5/293
    assert ((counts[free]-want)**2/want).sum() < 293 + 5*(2*293)**.5            # chi squared

def test_sample_vacant_refuses_what_is_not_there():
    with pytest.raises(ValueError, match='cannot choose 7 of 6'): sample_vacant(torch.arange(4), 10, 7)

def test_positions_beyond_32_bits():
    n = 10**6*10**6
    taken = torch.cat([torch.arange(1000), torch.arange(n-1000, n)])
    got = sample_vacant(taken, n, 50_000)
    assert got.min() >= 1000 and got.max() < n-1000 and (got.diff() > 0).all() and (got > 2**39).any()

# Gradients

def dense_gradient(layer, x, dy):
    d = layer.to_dense()
    d(x).backward(dy)
    return d.weight.grad.reshape(-1)

@pytest.mark.parametrize('make,x', [
    (lambda **k: SparseLinear(30, 20, sparsity=.9, **k), (8, 30)),
    (lambda **k: SparseLinear(30, 20, sparsity=.9, **k), (2, 5, 30)),
    (lambda **k: SparseLinear(30, 20, sparsity=.9, **k), (30,)),
    (lambda **k: SparseLinear(30, 20, sparsity=1., **k), (4, 30)),
    (lambda **k: SparseConv2d(4, 6, 3, stride=2, padding=1, groups=2, sparsity=.7, **k), (3, 4, 9, 7)),
    (lambda **k: SparseConv2d(4, 6, (3,2), padding=1, padding_mode='circular', sparsity=.7, **k), (3, 4, 9, 7)),
    (lambda **k: SparseConv2d(6, 6, 3, groups=6, sparsity=.5, **k), (3, 6, 9, 7))])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_candidates_have_the_dense_gradient(make, x, dtype):
    layer,x = make(dtype=dtype),torch.randn(x, dtype=dtype)
    with GradientSampler(large_layers(layer), every) as s:
        y = layer(x)
        dy = torch.randn_like(y)
        y.backward(dy)
    c = s.draws[layer]
    assert len(c) == large_layers(layer)[0].n_weights - layer.nnz
    g = dense_gradient(layer, x, dy)
    assert torch.allclose(c.grad, g[c.index], atol=1e-5)
    assert torch.allclose(c.active_grad, g[layer.flat_index], atol=1e-5)

def test_gradients_add_up_over_batches_and_uses():
    layer,xs = SparseLinear(10, 10, sparsity=.8),[torch.randn(4, 10) for _ in range(2)]
    with GradientSampler(large_layers(layer), every) as s:
        for x in xs: layer(torch.tanh(layer(x))).square().sum().backward()
    d = layer.to_dense()
    for x in xs: d(torch.tanh(d(x))).square().sum().backward()
    c = s.draws[layer]
    assert torch.allclose(c.grad, d.weight.grad.view(-1)[c.index], atol=1e-4)
    assert torch.allclose(c.active_grad, layer.weight.grad)

def test_sampler_through_keywords_in_place_activations_and_checkpointing():
    from torch.utils.checkpoint import checkpoint
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = SparseLinear(10, 10, sparsity=.8)
        def forward(self, x): return checkpoint(lambda t: F.relu(self.a(input=t), inplace=True), x, use_reentrant=False)
    model,x = Net(),torch.randn(6, 10)
    with GradientSampler(large_layers(model), every) as s: model(x).sum().backward()
    d,c = model.a.to_dense(),s.draws[model.a]
    F.relu(d(x)).sum().backward()
    assert torch.allclose(c.grad, d.weight.grad.view(-1)[c.index], atol=1e-5)

def test_sampler_under_autocast():
    layer,x = SparseLinear(40, 30, sparsity=.9),torch.randn(8, 40)
    with GradientSampler(large_layers(layer), every) as s, torch.autocast('cpu', torch.bfloat16): layer(x.bfloat16()).sum().backward()
    c = s.draws[layer]
    assert c.grad.dtype is torch.float32
    assert torch.allclose(c.grad, x.bfloat16().float().sum(0).repeat(30)[c.index], atol=1e-2)

def test_sampler_leaves_nothing_behind_and_skips_frozen_layers():
    model = net()
    model[0].weight.requires_grad_(False)
    s = backward(model, *batch(), candidates=2)
    assert model[0] not in s.draws and len(s.draws) == 2 and s.finite
    for p in large_layers(model): assert not p.module._forward_hooks and not p.param._backward_hooks
    with torch.no_grad(), GradientSampler(large_layers(model)) as s: model(batch()[0])
    assert all(c.grad is None for c in s.draws.values())

def test_a_gradient_that_is_not_finite_is_seen():
    layer = SparseLinear(10, 10, sparsity=.8)
    with GradientSampler(large_layers(layer)) as s: (layer(torch.ones(2, 10))*float('inf')).sum().backward()
    assert not s.finite

@pytest.mark.parametrize('candidates', [0, -1, float('nan')])
def test_impossible_candidates(candidates):
    with pytest.raises(ValueError, match='candidates'): GradientSampler([], candidates)

# Updates

def torch_opts():
    o = torch.optim
    return [partial(o.SGD, lr=.1, momentum=.9), partial(o.Adam, lr=.01), partial(o.Adam, lr=.01, amsgrad=True, foreach=True), partial(o.AdamW, lr=.01),
            partial(o.RMSprop, lr=.01, momentum=.9, centered=True), partial(o.Adagrad, lr=.1)]

def fastai_opts():
    from fastai.optimizer import SGD, Adam, Lamb, Lookahead, OptimWrapper, RAdam, RMSProp
    return [partial(SGD, lr=.1, mom=.9), partial(Adam, lr=.01), partial(RAdam, lr=.01), partial(Lamb, lr=.01), partial(RMSProp, lr=.01, mom=.9),
            lambda ps: Lookahead(Adam(ps, lr=.01), k=2), lambda ps: OptimWrapper(ps, torch.optim.Adam, lr=.01)]

opts = [*torch_opts(), *fastai_opts()]

@pytest.mark.parametrize('opt_func', opts)
@pytest.mark.parametrize('rigl', [True, False])
def test_kept_connections_keep_everything_and_new_ones_start_at_zero(opt_func, rigl):
    model = net()
    opt,ps,total = opt_func(list(model.parameters())),large_layers(model),sum(p.n_active for p in large_layers(model))
    params = [id(p.param) for p in ps]
    for i in range(12):
        s = backward(model, *batch(seed=i), candidates=1.5)
        opt.step()
        before,mags = snapshot(model, opt),[p.param.detach().abs() for p in ps]
        index = [p.index for p in ps]
        grown = regrow(ps, opt, .3, grow_score_f=gradient_magnitude if rigl else random_score, sampler=s)
        assert_sound(model, opt, total)
        for old,new,g,mag,idx in zip(before, snapshot(model, opt), grown, mags, index):
            assert len(new['w'].keys()-old['w'].keys()) == g
            assert set(idx[mag.sort(descending=True, stable=True).indices[:len(mag)-int(.3*len(mag))]].tolist()) <= new['w'].keys()
            for k,slot in new.items(): assert all(v == old[k].get(i, 0.) for i,v in slot.items()), k
        assert sum(grown)
        opt.zero_grad()
    assert [id(p.param) for p in large_layers(model)] == params

@pytest.mark.parametrize('opt_func', opts)
def test_with_all_candidates_it_is_the_masked_engine(opt_func):
    model = net(sparsity=.7)
    dense = twin(model)
    opt,opt_d = (opt_func(list(m.parameters())) for m in (model, dense))
    for i in range(24):
        xb,yb = batch(seed=i)
        s = backward(model, xb, yb, candidates=every)
        F.cross_entropy(dense(xb), yb).backward()
        ps = sparse_params(dense)
        if i%4 == 3:
            f = drop_fraction(i/30, .4, 1.)
            regrow(large_layers(model), opt, f, weight_magnitude, gradient_magnitude, sampler=s)
            set_masks(ps, drop_and_grow(ps, opt_d, f, weight_magnitude, gradient_magnitude), opt_d)
        else:
            for p in ps: p.param.grad *= p.mask
            opt.step(); opt_d.step()
        opt.zero_grad(); opt_d.zero_grad()
        for p,q in zip(large_layers(model), ps):
            assert p.module.mask.equal(q.mask), i
            assert torch.allclose(p.module.dense_weight(), q.param, rtol=1e-4, atol=1e-5), i

def test_a_dropped_connection_may_return_with_its_state():
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9)
    s = backward(model, *batch(), candidates=every)
    opt.step()
    for c in s.draws.values(): c.grad.zero_()
    for c in s.draws.values(): c.active_grad.fill_(1.)
    before = snapshot(model, opt)
    assert regrow(large_layers(model), opt, .5, grow_score_f=gradient_magnitude, sampler=s) == [0, 0, 0]
    assert snapshot(model, opt) == before

@pytest.mark.parametrize('grow', [random_score, 'uniform gradient'])
def test_just_dropped_are_as_likely_as_any_other(grow):
    "100 positions, 20 active, 10 dropped: of 90 that are not kept, 10 grow"
    came_back,n = 0,800
    for i in range(n):
        layer = SparseLinear(10, 10, sparsity=.8, bias=False)
        ps,old,mag = large_layers(layer),layer.flat_index,layer.weight.detach().abs()
        s = None
        if grow != random_score:
            s = GradientSampler(ps, 2.)
            c = s.draws[layer]
            c.grad,c.active_grad = torch.rand(len(c)),torch.rand(20)
        new = new_positions(ps, None, .5, grow_score_f=grow if s is None else gradient_magnitude, sampler=s)[0]
        came_back += np.intersect1d(old[mag.topk(10, largest=False).indices], new).size
    assert abs(came_back/n - 10*10/90) < .15

def test_counts_when_candidates_are_few():
    model = net(sparsity=.5)
    ps,n = large_layers(model),[p.n_active for p in large_layers(model)]
    for i in range(5):
        s = backward(model, *batch(seed=i), candidates=.05)
        regrow(ps, None, .5, grow_score_f=gradient_magnitude, sampler=s)
        assert [p.n_active for p in ps] == n

@pytest.mark.parametrize('sparsity', [0., 1., .99])
@pytest.mark.parametrize('grow', [random_score, gradient_magnitude])
def test_full_and_empty_layers(sparsity, grow):
    model = net(sparsity=sparsity)
    opt,n = torch.optim.Adam(model.parameters()),[p.n_active for p in large_layers(model)]
    for fraction in (0., .3, 1.):
        s = backward(model, *batch(), candidates=2)
        opt.step()
        regrow(large_layers(model), opt, fraction, grow_score_f=grow, sampler=s)
        assert_sound(model, opt)
        assert [p.n_active for p in large_layers(model)] == n

@pytest.mark.parametrize('grow', [random_score, gradient_magnitude])
def test_redistribution_moves_connections_between_layers(grow):
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9)
    n = None
    for i in range(8):
        s = backward(model, *batch(seed=i), candidates=2)
        opt.step()
        n = n or [p.n_active for p in large_layers(model)]
        regrow(large_layers(model), opt, .4, grow_score_f=grow, redistribute_f=momentum_redistribution, sampler=s)
        assert_sound(model, opt, sum(n))
        opt.zero_grad()
    assert [p.n_active for p in large_layers(model)] != n

def test_a_score_of_ones_own_needs_no_gradient():
    @dense_grad('never')
    def low_positions(param, opt, mask): return -torch.arange(len(param)).float()-1e6*mask
    layer = SparseLinear(30, 30, sparsity=.9)
    old = layer.flat_index
    new, = new_positions(large_layers(layer), None, .5, grow_score_f=low_positions, candidates=every)
    fresh = np.setdiff1d(new, old)
    assert len(fresh) == 45 and fresh.max() == np.setdiff1d(np.arange(900), old)[44]

@pytest.mark.parametrize('opt_func', [partial(torch.optim.Adam, lr=.01)])
def test_same_seed_same_training_at_any_number_of_threads(opt_func):
    def run(threads):
        torch.set_num_threads(threads)
        model = net((64,256,128,3), .95)
        opt = opt_func(model.parameters())
        torch.manual_seed(5)
        for i in range(10):
            s = backward(model, *batch(n_in=64, seed=i), candidates=3)
            if i%2: regrow(large_layers(model), opt, .3, grow_score_f=gradient_magnitude if i%4 == 1 else random_score, sampler=s)
            else: opt.step()
            opt.zero_grad()
        return model.state_dict()
    n = torch.get_num_threads()
    try: a,b,c = run(1),run(2),run(2)
    finally: torch.set_num_threads(n)
    for k in a: assert a[k].equal(b[k]) and b[k].equal(c[k]), k

# When something goes wrong

def test_a_failing_score_changes_nothing():
    model = net()
    opt,before = torch.optim.SGD(model.parameters(), lr=.1),snapshot(model)
    def bad(param, opt, name):
        if name.startswith('4'): raise RuntimeError('broken')
        return param.abs()
    for kw in (dict(keep_score_f=bad), dict(grow_score_f=bad, sampler=backward(model, *batch(), candidates=1)),
               dict(keep_score_f=lambda p, opt: p.abs()*float('nan')), dict(keep_score_f=lambda p, opt: p[1:])):
        with pytest.raises(ValueError, match=r"'[04]\.weight'.*No mask was changed"): regrow(large_layers(model), opt, .3, **kw)
        assert snapshot(model) == before

def test_ctrl_c_in_a_score_changes_nothing():
    model = net()
    before = snapshot(model)
    def interrupted(param, opt, name):
        if name == '4.weight': raise KeyboardInterrupt
        return param.abs()
    with pytest.raises(KeyboardInterrupt): regrow(large_layers(model), None, .3, interrupted)
    assert snapshot(model) == before

def test_ctrl_c_in_the_middle_waits_for_the_end(monkeypatch):
    model = net()
    opt = torch.optim.Adam(model.parameters())
    s = backward(model, *batch(), candidates=1)
    opt.step()
    new = new_positions(large_layers(model), opt, .5, grow_score_f=gradient_magnitude, sampler=s)
    calls = []
    def kill(*args):
        calls.append(os.kill(os.getpid(), signal.SIGINT))
        return csr_from_index(*args)
    monkeypatch.setattr(large, 'csr_from_index', kill)
    with pytest.raises(KeyboardInterrupt): set_positions(large_layers(model), new, opt)
    assert len(calls) == 3
    for p,i in zip(large_layers(model), new): assert p.index.equal(i)
    assert_sound(model, opt)

def test_errors_say_what_to_do():
    model = net()
    ps = large_layers(model)
    def err(match, f=.3, ps=ps, **kw):
        with pytest.raises(ValueError, match=match): regrow(ps, None, f, **kw)
    err('between 0 and 1', 1.2)
    err('0.weight needs.*GradientSampler', grow_score_f=gradient_magnitude)
    err('no momentum to grow by', grow_score_f=gradient_momentum)
    with GradientSampler(ps) as s: pass
    err('no gradient has reached 0.weight', grow_score_f=gradient_magnitude, sampler=s)
    s = backward(model, *batch(), candidates=1)
    regrow(ps, None, .3)
    err('0.weight have changed', grow_score_f=gradient_magnitude, sampler=s)
    model[4].weight = model[0].weight
    err('share', ps=large_layers(model))

def test_a_state_dict_brings_structure_weights_and_slots_back():
    model,other = net(),net(seed=1)
    opt,opt2 = (torch.optim.Adam(m.parameters(), lr=.01) for m in (model, other))
    for i in range(4):
        s = backward(model, *batch(seed=i), candidates=1)
        opt.step()
        regrow(large_layers(model), opt, .3, grow_score_f=gradient_magnitude, sampler=s)
        opt.zero_grad()
    other.load_state_dict(model.state_dict())
    opt2.load_state_dict(deepcopy(opt.state_dict()))       # torch would share the tensors
    assert snapshot(model, opt) == snapshot(other, opt2)
    for m,o in ((model, opt), (other, opt2)):
        torch.manual_seed(9)
        s = backward(m, *batch(seed=9), candidates=1)
        o.step()
        regrow(large_layers(m), o, .3, grow_score_f=gradient_magnitude, sampler=s)
    assert snapshot(model, opt) == snapshot(other, opt2)

# Size

def test_memory_is_that_of_the_nonzeros():
    "40,000 × 40,000: a bool mask would be 1.6 GB"
    code = """if True:
        import resource, torch
        from fastsparse.large import *
        from fastsparse.layers import SparseLinear
        from fastsparse.score import gradient_magnitude
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
        SparseLinear(100, 100, sparsity=.9)(torch.randn(4, 100)).sum().backward()
        start = peak()
        m = SparseLinear(40_000, 40_000, sparsity=.9999)
        opt = torch.optim.Adam(m.parameters())
        for grow in (None, gradient_magnitude):
            with GradientSampler(large_layers(m)) as s: m(torch.randn(16, 40_000)).square().mean().backward()
            opt.step()
            regrow(large_layers(m), opt, .3, sampler=s, **({} if grow is None else dict(grow_score_f=grow)))
        assert m.nnz == 160_000 and int(m.flat_index[-1]) > 2**30
        print(peak()-start)"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 400, out.stdout                                       # MiB

@pytest.mark.parametrize('native', [True, False])
def test_merging_counts_as_searching_does(native, monkeypatch):
    from fastsparse import kernels, large
    if native and not kernels.kernels_available(): pytest.skip(kernels.why_not())
    if not native: monkeypatch.setattr(kernels, 'kernels_available', lambda: False)
    for n,m,top in ((0, 5, 9), (5, 0, 9), (300, 200_000, 100), (200_000, 150_000, 10**6)):
        a,q = (torch.randint(top, (k,)).sort().values for k in (n, m))
        assert large._ranks(a, q).equal(torch.searchsorted(a, q, right=True))
