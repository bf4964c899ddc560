"Sparse layers in a row hand packed batches on: the same bits, and nobody notices."
import numpy as np, pytest, torch, torch.nn.functional as F
from copy import deepcopy
from functools import partial
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.basics import Adam, Callback, Learner, SGD, TensorBase
from fastai.layers import LinBnDrop
from fastsparse import (DynamicSparseTrainingCallback, RigL_presets, SET_presets, SparseKernelsCallback, SparseLinear, kernels, sparse_kernels_report,
                        sparsify_model)
from fastsparse.layers import compress
from fastsparse.links import KernelEncoder, KernelSequential, LinkedFunction, Row, RowFunction, linking_types, may_link
from fastsparse.neighbours import use_torch
from conftest import quiet, toy_dls

pytestmark = pytest.mark.skipif(not kernels.kernels_available(), reason=kernels.why_not())

@pytest.fixture
def linked_calls(monkeypatch):
    "What layers were linked for, (x packed, y packed, ReLU), whether each by itself or in a row."
    calls,one,whole = [],LinkedFunction.apply,RowFunction.apply
    def in_row(x, r, *params):
        calls.extend((i > 0, i < len(r.plans)-1, relu) for i,relu in enumerate(r.relus))
        return whole(x, r, *params)
    monkeypatch.setattr(LinkedFunction, 'apply', lambda *a: (calls.append((a[-1].x_packed, a[-1].y_packed, a[-1].relu)), one(*a))[1])
    monkeypatch.setattr(RowFunction, 'apply', in_row)
    return calls

def row(sizes, sparsities, acts, bias=True):
    layers = [nn.Linear(a, b, bias=bias) for a,b in zip(sizes, sizes[1:])]
    for l,s in zip(layers, sparsities): compress(l, mask=torch.rand_like(l.weight) >= s)
    return nn.Sequential(*[m for l,a in zip(layers, acts) for m in (l, a)])

def results(m, x, dy):
    x = x.clone().requires_grad_()
    y = m(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *(p for p in m.parameters() if p.requires_grad)], dy)]

def as_kernel(m):
    m = deepcopy(m)
    m.__class__ = KernelSequential
    return m

# kernels, ReLU included, against the same kernels unlinked

@settings(max_examples=60, deadline=None)
@given(st.sampled_from(kernels.available_isas()), st.integers(2, 300), st.integers(1, 70), st.integers(1, 300), st.integers(1, 70), st.floats(0, 1),
       st.booleans(), st.sampled_from([1, 2, 3]), st.integers(0, 2**31))
def test_bits_are_those_of_unlinked_layers(isa, batch, n_in, n_hidden, n_out, density, few, threads, seed):
    old = kernels.isa()
    kernels.set_isa(isa)
    try: _check_pair(batch, n_in, n_hidden, n_out, density*.015 if few else density, threads, seed)
    finally: kernels.set_isa(old)

def _check_pair(batch, n_in, n_hidden, n_out, density, threads, seed):
    rng = np.random.default_rng(seed)
    new = lambda *s: rng.standard_normal(s, dtype=np.float32)
    m1,m2 = rng.random((n_hidden, n_in)) < density,rng.random((n_out, n_hidden)) < density
    a,b = kernels.LinearPlan.from_mask(m1),kernels.LinearPlan.from_mask(m2)
    if a.tile_vectors != b.tile_vectors: return
    v1,v2,b1,b2,x,dy = new(a.nnz),new(b.nnz),new(n_hidden),new(n_out),new(batch, n_in),new(batch, n_out)
    empty = lambda *s: np.full(s, np.nan, np.float32)
    h,y,dh,dx,dv1,dv2,db1 = empty(batch, n_hidden),empty(batch, n_out),empty(batch, n_hidden),empty(batch, n_in),empty(a.nnz),empty(b.nnz),empty(n_hidden)
    a.forward(x, v1, b1, h, threads)
    h = np.maximum(h, 0)
    b.forward(h, v2, b2, y, threads)
    y = np.maximum(y, 0)
    b.backward(h, np.where(y > 0, dy, 0).astype(np.float32), v2, dh, dv2, threads)
    a.backward(x, np.where(h > 0, dh, 0).astype(np.float32), v1, dx, dv1, threads, dbias=db1)

    hp,y_,dhp,dx_,dv1_,dv2_,db1_ = empty(a.packed_size(batch, n_hidden)),empty(*y.shape),empty(a.packed_size(batch, n_hidden)),empty(*x.shape),empty(a.nnz),empty(b.nnz),empty(n_hidden)
    a.forward_linked(x, v1, b1, hp, batch, False, True, True, threads)
    b.forward_linked(hp, v2, b2, y_, batch, True, False, True, threads)
    b.backward_linked(hp, dy, v2, dhp, dv2_, None, y_, batch, True, False, True, True, threads)
    a.backward_linked(x, dhp, v1, dx_, dv1_, db1_, None, batch, False, True, True, False, threads)
    for got,want in ((y_,y), (dx_,dx), (dv1_,dv1), (dv2_,dv2), (db1_,db1)): np.testing.assert_array_equal(got, want)
    rows,again = empty(batch, n_hidden),empty(len(hp))
    a.unpack(hp, rows, threads)
    np.testing.assert_array_equal(rows, h)
    a.pack(rows, again, threads)
    np.testing.assert_array_equal(again, hp)                      # padding included, which is zero

# rows of layers, tile by tile

def _draw_row(rng, sizes, density, batch, relus):
    plans = [kernels.LinearPlan.from_mask(rng.random((o, i)) < density) for i,o in zip(sizes, sizes[1:])]
    new = lambda *s: rng.standard_normal(s, dtype=np.float32)
    return plans,new(batch, sizes[0]),new(batch, sizes[-1]),[new(p.nnz) for p in plans],[new(p.n_rows) if i else None for i,p in enumerate(plans)],relus

def _layer_by_layer(plans, x, dy, values, biases, relus, threads):
    hs,grads = [x],[]
    for p,v,b,relu in zip(plans, values, biases, relus):
        h = np.empty((len(x), p.n_rows), np.float32)
        p.forward(hs[-1], v, b, h, threads)
        hs.append(np.maximum(h, 0) if relu else h)
    for p,v,b,relu,h,y in reversed([*zip(plans, values, biases, relus, hs, hs[1:])]):
        g = np.where(y > 0, dy, 0).astype(np.float32) if relu else dy
        dy,dv,db = np.empty_like(h),np.empty_like(v),np.empty(p.n_rows, np.float32)
        p.backward(h, g, v, dy, dv, threads, dbias=db)
        grads.append((dv, db))
    return hs[-1], dy, grads[::-1]

@settings(max_examples=80, deadline=None)
@given(st.sampled_from(kernels.available_isas()), st.integers(2, 700), st.lists(st.integers(1, 250), min_size=2, max_size=5), st.floats(0, 1), st.booleans(),
       st.booleans(), st.booleans(), st.sampled_from([1, 2, 3]), st.integers(0, 2**31))
def test_bits_of_a_row(isa, batch, sizes, density, few, keep, last_relu, threads, seed):
    old = kernels.isa()
    kernels.set_isa(isa)
    try: _check_row(batch, sizes, density*.015 if few else density, keep, last_relu, threads, seed)
    finally: kernels.set_isa(old)

def _check_row(batch, sizes, density, keep, last_relu, threads, seed):
    rng = np.random.default_rng(seed)
    plans,x,dy,values,biases,relus = _draw_row(rng, sizes, density, batch, [True]*(len(sizes)-2) + [last_relu])
    args = plans,x,values,biases,relus
    empty = lambda *s: np.full(s, np.nan, np.float32)
    kept,y,dx,dvs,dbs = [empty(p.packed_size(batch, p.n_rows)) for p in plans[:-1]] if keep else [],empty(*dy.shape),empty(*x.shape),[empty(p.nnz) for p in plans],[empty(p.n_rows) for p in plans]
    if not plans[0].whole_tiles(batch, threads) or len({p.tile_vectors for p in plans}) > 1:
        with pytest.raises(ValueError, match='tiles'): kernels.row_forward(*args, kept, y, threads)
        return
    want,want_dx,grads = _layer_by_layer(plans, x, dy, values, biases, relus, threads)
    kernels.row_forward(*args, kept, y, threads)
    back = lambda dx, dvs, dbs: kernels.row_backward(plans, x, dy, values, biases, relus, kept, y, dx, dvs, dbs, threads)
    back(dx, dvs, dbs)
    for got,ok in ((y,want), (dx,want_dx), *zip(dvs, [g for g,_ in grads]), *zip(dbs, [g for _,g in grads])): np.testing.assert_array_equal(got, ok)
    some = lambda xs: [np.full_like(o, np.nan) if rng.random() < .5 else None for o in xs]
    for _ in range(3):
        few = some([dx]),some(dvs),some(dbs)
        back(few[0][0], *few[1:])
        for got,ok in zip(sum(few, []), [dx, *dvs, *dbs]): assert got is None or np.array_equal(got, ok)

def test_wrong_rows_are_exceptions():
    plans,x,dy,values,biases,relus = _draw_row(np.random.default_rng(0), (6, 5, 4), 1., 9, (True, True))
    y,kept = np.empty_like(dy),[np.empty(plans[0].packed_size(9, 5), np.float32)]
    ok = dict(plans=plans, x=x, values=values, biases=biases, relus=relus, kept=kept, out=y, threads=1)
    kernels.row_forward(**ok)
    wrong = dict(plans=plans[:1]), dict(plans=[]), dict(plans=plans[::-1], values=values[::-1], biases=[None, None], kept=[]), dict(values=values[:1]), dict(biases=[None]), dict(relus=[True]), dict(x=x[:, :5]), dict(x=x[:1], out=y[:1], kept=[]), \
            dict(kept=kept*2), dict(kept=[kept[0][1:]]), dict(out=y[1:]), dict(values=[values[0], values[1][1:]])
    for w in wrong:
        with pytest.raises(ValueError): kernels.row_forward(**{**ok, **w})
    for w in dict(x=x.astype(np.float64)), dict(out=None), dict(plans=[1, 2]):
        with pytest.raises((TypeError, AttributeError)): kernels.row_forward(**{**ok, **w})
    back = {**ok, 'dy': dy, 'dx': np.empty_like(x), 'dvalues': [None, None], 'dbiases': [None, None]}
    kernels.row_backward(**back)
    for w in dict(dvalues=[None]), dict(dbiases=[]), dict(dy=dy[1:]), dict(dx=x[1:]), dict(dvalues=[None, values[0]]):
        with pytest.raises(ValueError): kernels.row_backward(**{**back, **w})
    with pytest.raises(TypeError): kernels.row_backward(**{**back, 'out': None})

def test_what_a_row_keeps():
    plan = lambda density, n=2048: kernels.LinearPlan.from_mask(np.random.default_rng(0).random((n, 64)) < density)
    keeps = lambda batch, *ds, trains=True: Row((batch,), 1, 'scalar', (*map(plan, ds), plan(.5, 8)), (True,)*(len(ds)+1), trains).keeps
    assert keeps(2048, .1) and keeps(1024, .01) and not keeps(2048, .01) and not keeps(600, .01, .01) and not keeps(64, .1, trains=False)

def test_a_row_with_more_shares_than_are_kept_at_a_time():
    "Two groups of tiles, whose gradients add up as those of one."
    rng = np.random.default_rng(0)
    plans,x,dy,values,biases,relus = _draw_row(rng, (1200, 1500, 40), .5, 1900, (True, False))
    assert 2*-(-1900//128) * sum(p.nnz for p in plans) > 2**22
    y,dx,dvs,dbs = np.empty_like(dy),np.empty_like(x),[np.empty(p.nnz, np.float32) for p in plans],[np.empty(p.n_rows, np.float32) for p in plans]
    if not plans[0].whole_tiles(1900, 2): pytest.skip('tiles of another instruction set')
    want,want_dx,grads = _layer_by_layer(plans, x, dy, values, biases, relus, 2)
    kernels.row_forward(plans, x, values, biases, relus, [], y, 2)
    kernels.row_backward(plans, x, dy, values, biases, relus, [], y, dx, dvs, dbs, 2)
    for got,ok in ((y,want), (dx,want_dx), *zip(dvs, [g for g,_ in grads]), *zip(dbs, [g for _,g in grads])): np.testing.assert_array_equal(got, ok)

def test_a_row_is_made_for_torchs_number_of_threads(monkeypatch, linked_calls):
    m = row((20, 30, 10), (.8, .8), (nn.ReLU(), nn.ReLU()))
    x = torch.randn(300, 20)
    want,seen = m(x),[]
    monkeypatch.setattr(kernels.LinearPlan, 'whole_tiles', lambda self, batch, threads: (seen.append(threads), False)[1])
    monkeypatch.setattr('fastsparse.links.torch.get_num_threads', lambda: 5)
    assert torch.equal(as_kernel(m)(x), want) and seen == [5]

@pytest.mark.parametrize('much', [True, False])
def test_backward_twice_and_changes_in_between(much, monkeypatch, one_thread):
    monkeypatch.setattr('fastsparse.links._much', 0 if much else 2**21)
    m = as_kernel(row((100, 200, 30), (.995, .995), (nn.ReLU(), nn.ReLU())))
    x,dy = torch.randn(40, 100),torch.randn(40, 30)
    y = m(x)
    grads = [torch.autograd.grad(y, list(m.parameters()), dy, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a,b in zip(*grads))
    with torch.no_grad(): m[2].bias.add_(1)                       # nobody reads it again
    if not much:
        torch.autograd.grad(y, list(m.parameters()), dy, retain_graph=True)
        with torch.no_grad(): m[0].weight.add_(1); m[0].bias.add_(1)      # x needs no gradient
        assert all(torch.equal(a, b) for a,b in zip(torch.autograd.grad(y, list(m.parameters()), dy, retain_graph=True), grads[0]))
    with torch.no_grad(): m[2].weight.add_(1)
    with pytest.raises(RuntimeError, match='inplace'): torch.autograd.grad(y, list(m.parameters()), dy)

@pytest.mark.parametrize('name', ['row_forward', 'row_backward'])
def test_after_a_failure_layers_go_one_by_one(name, monkeypatch, linked_calls, one_thread):
    k = as_kernel(row((20, 30, 10), (.8, .8), (nn.ReLU(), nn.ReLU())))
    x,dy = torch.randn(37, 20),torch.randn(37, 10)
    want = results(k, x, dy)
    def fail(*a, **kw): raise RuntimeError('out of luck')
    with monkeypatch.context() as mp:
        mp.setattr(kernels, name, fail)
        for a,b in zip(results(k, x, dy), want): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        mp.setattr(RowFunction, 'apply', lambda *a: 1/0)
        assert all(torch.equal(a, b) for a,b in zip(results(k, x, dy), want))

@pytest.mark.parametrize('sparsity', [.8, .995])
def test_a_large_row_is_trained_like_its_layers(sparsity, one_thread):
    m = row((40, 2000, 30), (sparsity, sparsity), (nn.ReLU(), nn.ReLU()))
    x,dy = torch.randn(1200, 40),torch.randn(1200, 30)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.numel()), t)[1], lambda t: t): as_kernel(m)(x.requires_grad_())
    assert (max(seen) >= 1200*2000) == (sparsity == .8)          # what is between is kept, or isn't
    for a,b in zip(results(m, x.detach(), dy), results(as_kernel(m), x.detach(), dy)): assert torch.equal(a, b)

@pytest.mark.parametrize('batch', [3, 16, 37])
@pytest.mark.parametrize('bad', [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_goes_where_it_goes_in_dense(batch, bad):
    "Padding must not meet it: 0·inf would reach a gradient that dense leaves alone."
    torch.manual_seed(0)
    m = row((20, 30, 10), (.8, .8), (nn.ReLU(), nn.ReLU()))
    with torch.no_grad(): m[0].bias[3],m[2].bias[4],m[2].weight[5] = bad,bad,bad
    x,dy = torch.randn(batch, 20),torch.randn(batch, 10)
    for a,b in zip(results(m, x, dy), results(as_kernel(m), x, dy)): torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)

def test_wrong_arguments_are_exceptions():
    p = kernels.LinearPlan.from_mask(np.ones((4, 6)))
    x,v,out,packed = np.ones((5, 6), np.float32),np.ones(24, np.float32),np.ones((5, 4), np.float32),np.ones(p.packed_size(5, 4), np.float32)
    ok = dict(x=x, values=v, bias=None, out=packed, batch=5, x_packed=False, y_packed=True, relu=True)
    p.forward_linked(**ok)
    for wrong in dict(out=out), dict(x=x[:4]), dict(x_packed=True), dict(batch=4), dict(batch=-1), dict(values=v[1:]), dict(out=packed[1:]):
        with pytest.raises(ValueError): p.forward_linked(**{**ok, **wrong})
    for wrong in dict(out=None), dict(x=x.astype(np.float64)):
        with pytest.raises(TypeError): p.forward_linked(**{**ok, **wrong})
    one = dict(x=x[:1], batch=1, out=np.ones(p.packed_size(1, 4), np.float32))
    with pytest.raises(ValueError, match='linked'): p.forward_linked(**{**ok, **one})
    back = dict(x=x, dy=out, values=v, dx=np.ones_like(x), dvalues=np.ones_like(v), dbias=None, out=out, batch=5, x_packed=False, y_packed=False, relu=True, gated=False)
    p.backward_linked(**back)
    with pytest.raises(ValueError, match='gated'): p.backward_linked(**{**back, 'gated': True})
    with pytest.raises(ValueError): p.backward_linked(**{**back, 'out': packed})
    for wrong in dict(dy=packed), dict(dx=packed), dict(dvalues=v[1:]), dict(y_packed=True):
        with pytest.raises(ValueError): p.backward_linked(**{**back, **wrong})
    with pytest.raises(ValueError): p.pack(out, packed[1:])
    with pytest.raises(ValueError): p.unpack(packed[1:], out)

# modules in a row

@pytest.mark.parametrize('acts', [(nn.ReLU(), nn.ReLU(inplace=True)), (nn.GELU(), nn.ReLU()), (nn.Sequential(), nn.Sigmoid()), (nn.Identity(), nn.Dropout(0.))])
@pytest.mark.parametrize('lead', [(33,), (4, 9), (2, 3, 5)])
def test_same_results_as_the_plain_row(acts, lead):
    m = row((20, 30, 10), (.8, .9), acts)
    x,dy = torch.randn(*lead, 20),torch.randn(*lead, 10)
    for a,b in zip(results(m, x, dy), results(as_kernel(m), x, dy)): assert a.shape == b.shape and torch.equal(a, b)

def test_what_is_handed_on(linked_calls):
    m = as_kernel(row((20, 30, 10, 10, 5), (.8,)*4, (nn.ReLU(), nn.Dropout(.5), nn.GELU(), nn.ReLU())))
    m(torch.randn(8, 20))
    assert linked_calls == [(False, True, True), (True, False, False), (False, True, False), (True, False, True)]
    linked_calls.clear()
    m.eval()(torch.randn(8, 20))
    assert [c[:2] for c in linked_calls] == [(False, True), (True, True), (True, True), (True, False)]

def test_an_activation_after_the_relu_of_a_linked_pair():
    m = nn.Sequential(*row((20, 30), (.8,), (nn.ReLU(),)), nn.Tanh(), *row((30, 10), (.8,), (nn.ReLU(),)), nn.Tanh())
    x,dy = torch.randn(8, 20),torch.randn(8, 10)
    for a,b in zip(results(m, x, dy), results(as_kernel(m), x, dy)): torch.testing.assert_close(a, b)

@pytest.mark.parametrize('frozen', [['0.weight'], ['0.weight', '0.bias'], ['2.weight'], ['2.weight', '2.bias', '0.bias']])
@pytest.mark.parametrize('x_grad', [False, True])
def test_frozen_parameters(frozen, x_grad):
    m = row((20, 30, 10), (.8, .8), (nn.ReLU(), nn.ReLU()))
    for n,p in m.named_parameters(): p.requires_grad_(n not in frozen)
    def grads(m):
        x = torch.ones(8, 20, requires_grad=x_grad)
        m(x).square().sum().backward()
        return [None if p.grad is None else p.grad.clone() for p in (x, *m.parameters())]
    for a,b in zip(grads(deepcopy(m)), grads(as_kernel(m))): assert (a is None) == (b is None) and (a is None or torch.equal(a, b))

def test_layers_of_different_tiles_are_not_linked(linked_calls):
    "Widely different sparsity: one layer packs half as many items side by side."
    if kernels.isa() != 'avx512': pytest.skip('tiles differ on AVX-512 only')
    m = as_kernel(row((200, 300, 200), (.8, .999), (nn.ReLU(), nn.ReLU())))
    m(torch.randn(64, 200))
    assert linked_calls == [(False, False, True), (False, False, True)]

@pytest.mark.parametrize('what', ['hook on a layer', 'hook on a ReLU', 'pre-hook', 'global hook', 'forward replaced', 'float64', 'autocast', 'functorch', 'one item', 'no item', 'dense', 'nested'])
def test_not_linked_where_somebody_looks_or_rows_are_needed(what, linked_calls):
    m = row((20, 30, 10), (.8, .8), (nn.ReLU(), nn.Softmax(-1)))
    want = m(x := torch.randn(8, 20)).detach()
    k,seen = as_kernel(m),[]
    see = lambda *a: seen.append(a)
    if what == 'hook on a layer': k[0].register_forward_hook(see); k[2].register_forward_hook(see)
    if what == 'hook on a ReLU': k[1].register_forward_hook(see)
    if what == 'pre-hook': k[0].register_forward_pre_hook(see); k[2].register_forward_pre_hook(see)
    if what == 'forward replaced': k[0].forward = lambda x: m[0](x); k[2].forward = lambda x: m[2](x)
    if what == 'float64': k,x,want = k.double(),x.double(),want.double()
    if what == 'dense': use_torch(k); k = as_kernel(nn.Sequential(*map(nn.Linear, (20, 30), (30, 10)))); want = k(x).detach()
    if what in ('one item', 'no item'): x = x[:what == 'one item']; want = m(x).detach()
    if what == 'global hook':
        h = nn.modules.module.register_module_forward_hook(see)
        try: got = k(x)
        finally: h.remove()
    elif what == 'autocast':
        with torch.autocast('cpu', torch.bfloat16): want,got = m(x),k(x)
    elif what == 'nested':
        xs = torch.nested.nested_tensor(list(x.view(2, 4, 20)))
        got = torch.nested.to_padded_tensor(k(xs), 0).view(8, 10)
    elif what == 'functorch': got = torch.func.vmap(k)(x[None])[0]
    else: got = k(x)
    torch.testing.assert_close(got, want)
    assert not linked_calls
    assert seen or 'hook' not in what

def test_a_subclass_of_tensor_stays_one(linked_calls):
    m = row((20, 30, 10), (.8, .8), (nn.ReLU(), nn.ReLU()))
    x = TensorBase(torch.randn(8, 20), author='Ada')
    y = as_kernel(m)(x)
    assert type(y) is TensorBase and y.author == 'Ada' and torch.equal(y, m(x)) and len(linked_calls) == 2

def test_other_modules_are_called_as_ever():
    "Torch's function modes and subclasses are at work in all steps but the linked ones."
    class Maker(nn.Module):
        def forward(self, x): return torch.zeros(1).device.type
    m = nn.Sequential(*row((20, 30, 10), (.8, .8), (nn.ReLU(), nn.ReLU())), nn.Softmax(-1))
    k,seen = as_kernel(m),[]
    k[-1].register_forward_hook(lambda m,i,o: seen.append((type(i[0]), type(o))))
    k(TensorBase(torch.randn(8, 20)))
    assert seen == [(TensorBase, TensorBase)]
    k.append(Maker())
    x = torch.randn(8, 20)
    with torch.device('meta'): assert k(x) == 'meta'

def test_the_result_is_no_view():
    k = as_kernel(row((20, 30), (.8,), (nn.ReLU(),)))
    for x in torch.randn(8, 20),torch.randn(2, 4, 20): assert not k(x)._is_view() and k(x).detach_().shape == (*x.shape[:-1], 30)

@pytest.mark.parametrize('much', [0, 2**21])
def test_another_instruction_set_in_between_is_an_error(much, monkeypatch):
    monkeypatch.setattr('fastsparse.links._much', much)
    monkeypatch.setattr('fastsparse.links._few', 0 if much else 1)
    old = kernels.isa()
    y = as_kernel(row((20, 30, 10), (.8, .8), (nn.ReLU(), nn.ReLU())))(torch.randn(128, 20))
    try:
        kernels.set_isa('scalar')
        with pytest.raises(RuntimeError, match=old): y.sum().backward()
    finally: kernels.set_isa(old)

def test_an_activation_that_has_no_hash():
    from dataclasses import dataclass
    @dataclass
    class Act:
        def __call__(self, x): return x.abs()
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True, activation=Act())
    x,sparse = torch.randn(2, 3, 8),{compress(l, mask=torch.rand_like(l.weight) > .5) for l in (layer.linear1, layer.linear2)}
    want = layer(x)
    assert not may_link(layer, sparse)
    layer.__class__ = linking_types[nn.TransformerEncoderLayer]
    assert torch.equal(layer(x), want)

def test_no_grad_inference_compile_and_threads():
    m = row((20, 30, 10), (.8, .8), (nn.ReLU(), nn.ReLU()))
    k,x = as_kernel(m),torch.randn(200, 20)
    want = m(x)
    with torch.no_grad(): assert torch.equal(k(x), want)
    with torch.inference_mode(): assert torch.equal(k(x), want)
    assert torch.allclose(torch.compile(k, fullgraph=True, backend='eager')(x), want, atol=1e-6)
    old,y = torch.get_num_threads(),k(x)
    try:
        torch.set_num_threads(3 if old != 3 else 1)        # between forward and backward
        g = torch.autograd.grad(y.sum(), list(k.parameters()))
    finally: torch.set_num_threads(old)
    for a,b in zip(g, torch.autograd.grad(want.sum(), list(m.parameters()))): assert torch.equal(a, b)

def test_born_sparse_layers_are_linked(linked_calls):
    m,x = KernelSequential(SparseLinear(20, 30, sparsity=.8), nn.ReLU(), SparseLinear(30, 10, sparsity=.8)),torch.randn(8, 20)
    assert torch.equal(m(x), m[2](F.relu(m[0](x)))) and len(linked_calls) == 2

@pytest.mark.parametrize('where,name', [(kernels.LinearPlan, 'forward_linked'), (kernels.LinearPlan, 'backward_linked'), (kernels, 'row_forward'), (kernels, 'row_backward')])
def test_a_failing_kernel_falls_back_to_dense(where, name, monkeypatch, one_thread):
    m = row((20, 30, 10, 10), (.8, .8, .8), (nn.ReLU(), nn.GELU() if 'linked' in name else nn.Identity(), nn.ReLU()))
    if 'row' in name: m[0].bias.requires_grad_(False)
    x,dy = torch.randn(37, 20),torch.randn(37, 10)
    want = results(m, x, dy)
    k = as_kernel(m)
    failed = []
    def fail(*a, **kw):
        failed.append(name)
        raise RuntimeError('out of luck')
    monkeypatch.setattr(where, name, fail)
    for a,b in zip(results(k, x, dy), want): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert failed

# in training

class Types(Callback):
    def before_fit(self): self.seen = set()
    def after_train(self): self.seen |= {type(m) for m in self.model.modules() if type(m) in linking_types.values()}

def mlp(): return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 3))
class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer,self.head = nn.TransformerEncoderLayer(6, 2, 24, dropout=0., batch_first=True),nn.Linear(6, 3)
    def forward(self, x): return self.head(self.layer(x[:,None].repeat(1, 3, 1)).mean(1))
def drops(): return nn.Sequential(LinBnDrop(6, 32, bn=False, act=nn.ReLU(), lin_first=True), LinBnDrop(32, 24, act=nn.ReLU()), nn.Linear(24, 3))

def learner(model_f, opt_func=partial(SGD, mom=.9), n=64, cbs=()):
    torch.manual_seed(0)
    learn = Learner(toy_dls(n), model_f(), loss_func=F.cross_entropy, opt_func=opt_func, lr=.05, cbs=[Types(), *cbs])
    sparsify_model(learn, .7)
    return learn

def dst(presets=RigL_presets): return DynamicSparseTrainingCallback(**presets, batches_per_update=3, sparse_kernels=True, sparsity_threshold=.3)

@pytest.mark.parametrize('model_f', [mlp, Encoder, drops])
@pytest.mark.parametrize('presets', [RigL_presets, SET_presets])
@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9), Adam])
def test_training_is_the_same_to_the_bit(model_f, presets, opt_func, monkeypatch):
    states = []
    for on in True,False:
        if not on: monkeypatch.setattr('fastsparse.neighbours.may_link', lambda *a: False)
        learn = learner(model_f, opt_func=opt_func)
        with quiet(learn): learn.fit(3, cbs=dst(presets))
        assert bool(learn.types.seen) == on
        assert not any(type(m) in linking_types.values() for m in learn.model.modules())
        states.append(learn.model.state_dict())
    assert states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k,v in states[0].items())

def test_classes_come_back_after_an_interrupt():
    class Stop(Callback):
        def after_backward(self):
            if self.iter == 5: raise KeyboardInterrupt
    learn = learner(mlp, cbs=[Stop()])
    with pytest.raises(KeyboardInterrupt), quiet(learn): learn.fit(1, cbs=dst())
    learn.remove_cb(learn.stop)
    with quiet(learn): learn.fit(1, cbs=SparseKernelsCallback(sparse_kernels=True, sparsity_threshold=.3))
    assert type(learn.model) is nn.Sequential

def test_report_names_what_is_linked():
    learn = learner(Encoder)
    with quiet(learn): learn.fit(1, cbs=dst())
    rows = sparse_kernels_report(learn, neighbours=True)
    row = rows.loc['layer'] if 'layer' in rows.index else rows[rows['layer'] == 'layer'].iloc[0]
    assert row['chosen'] == 'kernel' and 'packed' in row['why']

def test_may_link():
    L,sparse = partial(nn.Linear, 4, 4),set()
    def S():
        sparse.add(m := L())
        return m
    for yes in [S(), nn.ReLU()], [S(), nn.Tanh(), S()], [S(), S()], [L(), S(), nn.Dropout(), nn.ReLU()], [SparseLinear(3, 4, sparsity=.5), nn.ReLU()]:
        assert may_link(nn.Sequential(*yes), sparse)
    for no in [], [S()], [L(), nn.ReLU()], [S(), nn.BatchNorm1d(4), nn.ReLU()], [nn.ReLU(), S()], [S(), nn.Tanh()], [S(), L()]:
        assert not may_link(nn.Sequential(*no), sparse)

def test_padded_batches_of_an_encoder_in_evaluation():
    "PyTorch would make nested tensors of them, which no kernel reads."
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.up,self.head = nn.Linear(6, 8),nn.Linear(8, 3)
            self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 32, dropout=0., batch_first=True), 2)
        def forward(self, x):
            mask = torch.tensor([False, False, True]).expand(len(x), 3)
            return self.head(self.body(self.up(x)[:,None].repeat(1, 3, 1), src_key_padding_mask=mask)[:,0])
    for skip in None,['*self_attn*']:
        res = []
        for on in True,False:
            torch.manual_seed(0)
            learn = Learner(toy_dls(64), Padded(), loss_func=F.cross_entropy, opt_func=SGD, lr=.05, cbs=Types())
            sparsify_model(learn, .7, skip=skip)
            with quiet(learn): learn.fit(1, cbs=SparseKernelsCallback(sparse_kernels=on, sparsity_threshold=.3))
            assert (KernelEncoder in learn.types.seen) == on and type(learn.model.body) is nn.TransformerEncoder and learn.model.body.use_nested_tensor
            res.append(list(learn.recorder.values[-1]))
        np.testing.assert_allclose(*res, rtol=1e-4)

def test_only_sparse_layers_are_reported():
    m = nn.Sequential(nn.Sequential(nn.Linear(6, 32), nn.ReLU()), nn.Sequential(nn.Linear(32, 24), nn.ReLU()), nn.Linear(24, 3))
    learn = Learner(toy_dls(64), m, loss_func=F.cross_entropy, opt_func=SGD, lr=.05)
    sparsify_model(learn, .5, sparse_f={'0.0': .9, '1.0': .3, '2': .5})
    with quiet(learn): learn.fit(1, cbs=SparseKernelsCallback(sparse_kernels=True, sparsity_threshold=.8))
    assert set(sparse_kernels_report(learn, neighbours=True).reset_index()['layer']) >= {'0'} and '1' not in set(sparse_kernels_report(learn, neighbours=True).reset_index()['layer'])
