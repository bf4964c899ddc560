"Kernels against dense float64 PyTorch, on every instruction set of the machine."
import os, subprocess, sys
import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from fastsparse import kernels as K

pytestmark = pytest.mark.skipif(not K.kernels_available(), reason=K.why_not())
isas = K.available_isas()
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

@pytest.fixture(params=isas)
def isa(request):
    before = K.isa()
    K.set_isa(request.param)
    yield request.param
    K.set_isa(before)

def randn(rng, *shape): return rng.standard_normal(shape, dtype=np.float32)

def sparse(rng, density, *shape):
    "A weight and its mask; some active weights are zero"
    m = rng.random(shape) < density
    w = randn(rng, *shape) * m
    if m.any(): w[tuple(np.argwhere(m)[0])] = 0
    return w, m

def near(got, want, terms):
    "Within the rounding of a float32 sum of `terms` products"
    want = np.asarray(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-6 * max(terms, 1)**.5 * 8)

def empty(*shape): return np.full(shape, np.nan, np.float32)

def run_linear(w, m, x, dy, bias, **kw):
    p, v = K.LinearPlan.from_mask(m), w[m]
    out, dx, dv, db = empty(x.shape[0], w.shape[0]), empty(*x.shape), empty(p.nnz), empty(w.shape[0])
    p.forward(x, v, bias, out, **kw)
    p.backward(x, dy, v, dx, dv, dbias=db, **kw)
    return out, dx, dv, db

def check_linear(w, m, x, dy, bias):
    out, dx, dv, db = run_linear(w, m, x, dy, bias)
    near(db, dy.astype(np.float64).sum(0), x.shape[0])
    x, w, dy = (a.astype(np.float64) for a in (x, w, dy))
    near(out, x @ w.T + (0 if bias is None else bias), w.shape[1])
    near(dx, dy @ w, w.shape[0])
    near(dv, (dy.T @ x)[m], x.shape[0])

@quick
@given(st.data())
def test_linear_drawn(isa, data):
    draw = data.draw
    b, i, o = draw(st.integers(0, 130)), draw(st.integers(1, 90)), draw(st.integers(1, 90))
    density = draw(st.sampled_from([0, .01, .1, .5, 1]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    w, m = sparse(rng, density, o, i)
    check_linear(w, m, randn(rng, b, i), randn(rng, b, o), randn(rng, o) if draw(st.booleans()) else None)

@pytest.mark.parametrize('b,i,o,density', [(128, 300, 200, .1), (257, 1000, 70, .02), (513, 64, 500, .3), (64, 2048, 33, .05), (1, 700, 300, .1), (33, 3000, 40, .3)])
def test_linear_larger(isa, b, i, o, density):
    rng = np.random.default_rng(0)
    w, m = sparse(rng, density, o, i)
    check_linear(w, m, randn(rng, b, i), randn(rng, b, o), randn(rng, o))

def run_conv(w, m, x, dy, bias, threads=None, **kw):
    p, v = K.Conv2dPlan.from_mask(m, **kw), w[m]
    out, dx, dv = empty(*dy.shape), empty(*x.shape), empty(p.nnz)
    p.forward(x, v, bias, out, threads=threads)
    p.backward(x, dy, v, dx, dv, threads=threads)
    return out, dx, dv

def conv64(w, x, dy, bias, stride, padding, dilation, groups):
    "Output and gradients by dense PyTorch in float64"
    x, w = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, w))
    t, b, l, r = padding
    y = F.conv2d(F.pad(x, (l, r, t, b)), w, None if bias is None else torch.tensor(bias, dtype=torch.float64), stride, 0, dilation, groups)
    y.backward(torch.tensor(dy, dtype=torch.float64))
    return y.detach().numpy(), x.grad.numpy(), w.grad.numpy()

def check_conv(rng, n, h, w, cin, cout, k, density=.3, stride=(1,1), padding=(0,0,0,0), dilation=(1,1), groups=1, bias=True, layout=None):
    wt, m = sparse(rng, density, cout, cin//groups, *k)
    kw = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    oh, ow = K.Conv2dPlan.from_mask(m, **kw).out_size(h, w)
    x, dy, b = randn(rng, n, cin, h, w), randn(rng, n, cout, oh, ow), randn(rng, cout) if bias else None
    out, dx, dv = run_conv(wt, m, x, dy, b, layout=layout, **kw)
    y64, dx64, dw64 = conv64(wt, x, dy, b, **kw)
    near(out, y64, cin*k[0]*k[1])
    near(dx, dx64, cout*k[0]*k[1])
    near(dv, dw64[m], n*oh*ow)

@pytest.mark.parametrize('layout', [None, 'planes', 'batch'])
@quick
@given(st.data())
def test_conv_drawn(isa, layout, data):
    draw = data.draw
    def pair(lo, hi): return draw(st.integers(lo, hi)), draw(st.integers(lo, hi))
    k, stride, dilation, groups = pair(1, 4), pair(1, 3), pair(1, 3), draw(st.sampled_from([1, 1, 2, 4]))
    padding = pair(0, 4) + pair(0, 4)
    h = max(1, dilation[0]*(k[0]-1) + 1 - sum(padding[:2])) + draw(st.integers(0, 12))
    w = max(1, dilation[1]*(k[1]-1) + 1 - sum(padding[2:])) + draw(st.integers(0, 30))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    check_conv(rng, draw(st.integers(0, 35)), h, w, groups*draw(st.integers(1, 5)), groups*draw(st.integers(1, 5)), k,
               draw(st.sampled_from([0, .05, .3, 1])), stride, padding, dilation, groups, draw(st.booleans()), layout)

@pytest.mark.parametrize('layout', ['planes', 'batch'])
@pytest.mark.parametrize('n,h,w,cin,cout,k,stride,pad', [
    (18, 28, 28, 20, 70, 3, 1, 1), (16, 7, 7, 70, 90, 3, 1, 1), (3, 56, 56, 8, 10, 3, 1, 1), (17, 28, 28, 24, 40, 3, 2, 1), (20, 14, 14, 80, 66, 1, 1, 0), (2, 65, 63, 3, 9, 7, 2, 3),
    (20, 16, 16, 80, 66, 1, 1, 0), (2, 36, 44, 200, 90, 1, 1, 0), (5, 16, 16, 9, 70, 1, 2, 0), (19, 4, 4, 300, 70, 3, 1, 1)])
def test_conv_larger(isa, layout, n, h, w, cin, cout, k, stride, pad):
    check_conv(np.random.default_rng(1), n, h, w, cin, cout, (k, k), .1, (stride, stride), (pad,)*4, layout=layout)

@pytest.mark.parametrize('n,h,w,cin,cout,k,stride,pad,groups', [
    (19, 3, 28, 12, 20, (3, 4), (1, 1), (0, 2, 2, 3), 2), (9, 6, 15, 6, 36, (2, 4), (1, 1), (0, 1, 1, 1), 3), (7, 30, 56, 7, 6, (5, 5), (1, 2), (0, 4, 1, 2), 1), (9, 28, 28, 8, 9, (3, 3), (2, 2), (1,)*4, 1)])
def test_nothing_of_an_earlier_call_counts(isa, n, h, w, cin, cout, k, stride, pad, groups):
    "Kernels read around what they have written; scratch memory still holds the NaN of the call before"
    rng = np.random.default_rng(0)
    wt, m = sparse(rng, .5, cout, cin//groups, *k)
    kw = dict(stride=stride, padding=pad, dilation=(1, 1), groups=groups)
    x, dy = randn(rng, n, cin, h, w), randn(rng, n, cout, *K.Conv2dPlan.from_mask(m, **kw).out_size(h, w))
    run_conv(wt, m, np.full_like(x, np.nan), np.full_like(dy, np.nan), None, threads=1, **kw)
    out, dx, dv = run_conv(wt, m, x, dy, None, threads=1, **kw)
    y64, dx64, dw64 = conv64(wt, x, dy, None, **kw)
    near(out, y64, cin*k[0]*k[1]), near(dx, dx64, cout*k[0]*k[1]), near(dv, dw64[m], n*h*w)

@pytest.mark.parametrize('layout', ['planes', 'batch'])
def test_rows_of_more_nonzeros_than_are_collected_at_a_time(isa, layout):
    rng = np.random.default_rng(5)
    w, m = sparse(rng, 1, 30, 1700)
    check_linear(w, m, randn(rng, 16, 1700), randn(rng, 16, 30), None)
    check_conv(rng, 3, 12, 12, 24, 5, (7, 7), 1, (1, 1), (3,)*4, layout=layout)

@pytest.mark.parametrize('n,cin,cout,hw,k,stride,density', [
    (11, 64, 64, 56, 1, 1, .05), (9, 80, 80, 56, 1, 1, .6), (24, 32, 32, 56, 3, 1, .1), (60, 180, 184, 14, 3, 1, .02),
    (40, 72, 280, 28, 3, 2, .05), (40, 80, 280, 27, 3, 2, .05), (40, 72, 280, 28, 1, 2, .1)])
def test_results_that_go_past_the_caches(isa, n, cin, cout, hw, k, stride, density):
    "Tensors of more than 8 MB that start on a cache line, of planes that may not end on one"
    rng = np.random.default_rng(15)
    w, m = sparse(rng, density, cout, cin, k, k)
    p, v, dv = K.Conv2dPlan.from_mask(m, stride=(stride,)*2, padding=(k//2,)*4, layout='planes'), w[m], empty(m.sum())
    x, dy = randn(rng, n, cin, hw, hw), randn(rng, n, cout, *p.out_size(hw, hw))
    out, dx = (torch.full(a.shape, float('nan')).numpy() for a in (dy, x))
    assert all(a.size > 2**21 and a.ctypes.data % 64 == 0 for a in (out, dx))
    p.forward(x, v, None, out)
    p.backward(x, dy, v, dx, dv)
    y64, dx64, dw64 = conv64(w, x, dy, None, (stride,)*2, (k//2,)*4, (1, 1), 1)
    near(out, y64, cin*k*k)
    near(dx, dx64, cout*k*k)
    np.testing.assert_allclose(dv, dw64[m], rtol=1e-3, atol=2e-3)

@pytest.mark.parametrize('b,i,o', [(1031, 2048, 2064), (1031, 2064, 2048), (1031, 2050, 2056)])
def test_linear_results_that_go_past_the_caches(isa, b, i, o):
    "More than 8 MB from a cache line on, and the same from the middle of one, where nothing does"
    rng = np.random.default_rng(17)
    n = 4000
    m = np.unique(rng.integers(0, o, n)*i + rng.integers(0, i, n))
    p = K.LinearPlan(np.append(0, np.bincount(m//i, minlength=o).cumsum()), (m % i).astype(np.int32), o, i)
    x, dy, v = randn(rng, b, i), randn(rng, b, o), randn(rng, len(m))
    def results(skip, threads):
        out, dx = (torch.full((a.size + skip,), float('nan')).numpy()[skip:].reshape(a.shape) for a in (dy, x))
        assert all(a.size > 2**21 and (a.ctypes.data % 64 == 0) == (skip == 0) for a in (out, dx))
        p.forward(x, v, None, out, threads=threads)
        p.backward_input(dy, v, dx, threads=threads)
        return out, dx
    out, dx = results(0, 1)
    w = torch.sparse_coo_tensor(np.stack(divmod(m, i)), v.astype(np.float64), (o, i), check_invariants=True)
    near(out, (w @ torch.tensor(x, dtype=torch.float64).T).T, i)
    near(dx, (w.T @ torch.tensor(dy, dtype=torch.float64).T).T, o)
    for skip, threads in ((0, 2), (3, 1)):
        for a, again in zip((out, dx), results(skip, threads)): assert a.tobytes() == again.tobytes()

@pytest.mark.parametrize('layout', ['planes', 'batch'])
@pytest.mark.parametrize('k,stride,pad', [(3, 1, 1), (1, 1, 0), (3, 2, 1), (3, 1, 0), (5, 1, 1)])
@pytest.mark.parametrize('hw', [7, 14, 16, 30, 120])
def test_each_gradient_alone(isa, layout, k, stride, pad, hw):
    "With AVX-512 both come from one sweep if rows are whole vectors, as those of 14 and 30 pixels"
    rng = np.random.default_rng(14)
    w, m = sparse(rng, .2, 20, 12, k, k)
    n = 2 if hw > 100 else 17
    p, v, x = K.Conv2dPlan.from_mask(m, stride=(stride,)*2, padding=(pad,)*4, layout=layout), w[m], randn(rng, n, 12, hw, hw)
    dy = randn(rng, n, 20, *p.out_size(hw, hw))
    both, alone = (empty(*x.shape), empty(p.nnz)), (empty(*x.shape), empty(p.nnz))
    p.backward(x, dy, v, *both)
    p.backward(None, dy, v, alone[0], None)
    p.backward(x, dy, None, None, alone[1])
    assert both[0].tobytes() == alone[0].tobytes()
    near(both[1], alone[1], dy.size//20)

# What SparseProp gets wrong

@pytest.mark.parametrize('n', [1, 3, 7, 9, 12, 20])
def test_sparseprop_batch_not_divisible_by_8(isa, n):
    check_conv(np.random.default_rng(2), n, 8, 8, 4, 6, (3, 3), padding=(1,)*4)

def test_sparseprop_groups(isa): check_conv(np.random.default_rng(3), 9, 8, 8, 6, 9, (3, 3), groups=3, density=.5)

def test_sparseprop_depthwise(isa): check_conv(np.random.default_rng(3), 9, 8, 8, 6, 6, (3, 3), groups=6, density=.5)

def test_sparseprop_dilation(isa): check_conv(np.random.default_rng(4), 9, 12, 13, 4, 6, (3, 3), dilation=(2, 3))

def test_sparseprop_rectangular_kernel(isa): check_conv(np.random.default_rng(5), 9, 12, 13, 4, 6, (1, 5), padding=(0, 0, 2, 2))

def test_sparseprop_asymmetric_padding(isa): check_conv(np.random.default_rng(6), 9, 8, 8, 4, 6, (4, 2), padding=(2, 1, 0, 1))

def test_sparseprop_more_than_32767_nonzeros_per_output_channel(isa):
    check_conv(np.random.default_rng(7), 2, 3, 3, 4000, 2, (3, 3), density=1, padding=(1,)*4)
    rng = np.random.default_rng(7)
    w, m = sparse(rng, 1, 2, 40000)
    check_linear(w, m, randn(rng, 3, 40000), randn(rng, 3, 2), None)

def test_sparseprop_zero_valued_active_weights_survive(isa):
    rng = np.random.default_rng(8)
    m = rng.random((20, 30)) < .2
    w, x, dy = np.zeros((20, 30), np.float32), randn(rng, 16, 30), randn(rng, 16, 20)
    out, dx, dv, _ = run_linear(w, m, x, dy, None)
    assert not out.any() and not dx.any() and dv.shape == (m.sum(),)
    near(dv, (dy.T.astype(np.float64) @ x)[m], 16)

@pytest.mark.parametrize('dtype', [np.float64, np.float16, np.uint16, np.int32])
def test_sparseprop_other_dtypes_are_refused(isa, dtype):
    p = K.LinearPlan.from_mask(np.eye(4))
    with pytest.raises(TypeError, match='float32'): p.forward(np.ones((2, 4), dtype), np.ones(4, np.float32), None, empty(2, 4))
    with pytest.raises(TypeError, match='float32'): p.forward(np.ones((2, 4), np.float32), np.ones(4, dtype), None, empty(2, 4))

# Special values

def test_inf_and_nan_pass_through_at_the_nonzeros(isa):
    rng = np.random.default_rng(9)
    w, m = sparse(rng, 1, 9, 12)
    x, dy = randn(rng, 20, 12), randn(rng, 20, 9)
    x[3, 4], x[5, 6], dy[7, 8] = np.inf, np.nan, -np.inf
    w[w == 0] = 1
    out, dx, dv, _ = run_linear(w, m, x, dy, None)
    with np.errstate(invalid='ignore'): want = x@w.T, dy@w, (dy.T@x)[m]
    for got, ref in zip((out, dx, dv), want): np.testing.assert_allclose(got, ref, rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('bad', [np.inf, np.nan])
def test_masked_positions_contribute_nothing(isa, bad):
    rng = np.random.default_rng(10)
    m = np.ones((5, 6), bool); m[:, 2] = False; m[1] = False
    w, x, dy = randn(rng, 5, 6)*m, randn(rng, 18, 6), randn(rng, 18, 5)
    x[:, 2], dy[:, 1] = bad, bad
    out, dx, dv, _ = run_linear(w, m, x, dy, None)
    assert np.isfinite(out).all() and np.isfinite(dx).all() and np.isfinite(dv).all() and not out[:, 1].any()

@pytest.mark.parametrize('layout', ['planes', 'batch'])
def test_inf_in_an_image_reaches_only_its_own_pixels(isa, layout):
    rng = np.random.default_rng(11)
    w, m = sparse(rng, 1, 3, 2, 3, 3)
    w[w == 0] = 1
    x, dy = randn(rng, 5, 2, 6, 7), randn(rng, 5, 3, 6, 7)
    x[2, 1, 3, 3] = np.inf
    out, _, _ = run_conv(w, m, x, dy, None, padding=(1,)*4, layout=layout)
    bad = np.zeros(out.shape, bool); bad[2, :, 2:5, 2:5] = True
    assert (np.isfinite(out) == ~bad).all()

def test_denormals_are_not_flushed(isa):
    x, w = np.full((17, 1), 1e-40, np.float32), np.ones((3, 1), np.float32)
    out, dx, dv, _ = run_linear(w, w != 0, x, np.ones((17, 3), np.float32), None)
    assert (out == x).all() and (dv > 0).all()

# bfloat16: numpy has none, so its bits travel as 16-bit integers

def bits(a): return K.float32_to_bf16(np.ascontiguousarray(a, np.float32))

def plain_rounding(u):
    "To the nearest, ties to even, in 64-bit integers; u: the bits of float32 numbers. NaNs keep their sign and upper payload"
    u = u.astype(np.uint64)
    nan = (u & 0x7fffffff) > 0x7f800000
    return np.where(nan, u >> 16 | 0x40, (u + 0x7fff + (u >> 16 & 1)) >> 16).astype(np.uint16)

@pytest.mark.parametrize('row', [k for k in K.kernel_table() if k['dtype'] == 'bf16'], ids=lambda k: f"{k['isa']}-{k['op']}")
def test_conversions_of_the_table(row):
    before = K.isa()
    K.set_isa(row['isa'])
    try: {'widen': check_widen, 'narrow': check_narrow}[row['op']]()
    finally: K.set_isa(before)

def check_widen():
    every = np.arange(2**16, dtype=np.uint16)
    want = every.astype(np.uint32) << 16
    assert (K.bf16_to_float32(every).view(np.uint32) == want).all()
    for n in range(70): assert (K.bf16_to_float32(every[16000:16000+n]).view(np.uint32) == want[16000:16000+n]).all()
    assert (K.bf16_to_float32(every.view(np.int16)).view(np.uint32) == want).all()

def check_narrow():
    "Around every bfloat16: itself, its tie, and both neighbours of each; with that all denormals, infinities and kinds of NaN"
    upper = np.arange(2**16, dtype=np.uint32) << 16
    for low in (0, 1, 0x3fff, 0x7fff, 0x8000, 0x8001, 0xffff):
        u = upper | np.uint32(low)
        got = K.float32_to_bf16(u.view(np.float32))
        assert (got == plain_rounding(u)).all(), low
        ref = torch.from_numpy(u.view(np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        nan = np.isnan(u.view(np.float32))
        assert (got[~nan] == ref[~nan]).all() and np.isnan(K.bf16_to_float32(got))[nan].all() and not np.isnan(K.bf16_to_float32(got))[~nan].any()
    rng = np.random.default_rng(0)
    u = rng.integers(0, 2**32, 2**20, dtype=np.uint32)
    assert (K.float32_to_bf16(u.view(np.float32)) == plain_rounding(u)).all()
    for n in range(70): assert (K.float32_to_bf16(u[:n].view(np.float32)) == plain_rounding(u[:n])).all()

def near16(got, want, scale, exact=False):
    "Within bfloat16's rounding of the sum of the absolute products; `exact`: float32's"
    got = got if exact else K.bf16_to_float32(got)
    assert got.shape == want.shape and (np.abs(got - want) <= (2e-6 if exact else 2**-8) * scale + 1e-30).all()

def check16(p, conv, w, m, x, dy, bias, fp32_values, threads=None):
    "Output and gradients of bfloat16 arguments against float64 from the same numbers"
    x, dy = bits(x), bits(dy)
    v, b = (w[m], bias) if fp32_values else (bits(w[m]), None if bias is None else bits(bias))
    out, dx, dv = np.full(dy.shape, 0x7fc0, np.uint16), np.full(x.shape, 0x7fc0, np.uint16), np.full(p.nnz, np.nan, np.float32) if fp32_values else np.full(p.nnz, 0x7fc0, np.uint16)
    kw = dict(threads=threads, dtype='bfloat16')
    p.forward(x, v, b, out, **kw)
    p.backward(x, dy, v, dx, dv, **kw)
    w64 = np.zeros(w.shape); w64[m] = v if fp32_values else K.bf16_to_float32(v)
    x64, dy64 = (K.bf16_to_float32(a).astype(np.float64) for a in (x, dy))
    b64 = None if b is None else (b if fp32_values else K.bf16_to_float32(b)).astype(np.float64)
    want = conv(w64, x64, dy64, b64)
    scale = conv(np.abs(w64), np.abs(x64), np.abs(dy64), None if b is None else np.abs(b64))
    near16(out, want[0], scale[0]); near16(dx, want[1], scale[1]); near16(dv, want[2][m], scale[2][m], fp32_values)
    return out, dx, dv

def linear64(w, x, dy, bias): return x @ w.T + (0 if bias is None else bias), dy @ w, dy.T @ x

@quick
@given(st.data())
def test_bf16_linear_drawn(isa, data):
    draw = data.draw
    b, i, o = draw(st.one_of(st.sampled_from([0, 1, 3, 130, 600]), st.integers(0, 300))), draw(st.integers(1, 90)), draw(st.integers(1, 90))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    w, m = sparse(rng, draw(st.sampled_from([0, .01, .1, .5, 1])), o, i)
    check16(K.LinearPlan.from_mask(m), linear64, w, m, randn(rng, b, i), randn(rng, b, o), randn(rng, o) if draw(st.booleans()) else None, draw(st.booleans()))

@pytest.mark.parametrize('fp32_values', [False, True])
@pytest.mark.parametrize('b,i,o,density', [(1025, 700, 300, .05), (2000, 3000, 40, .01), (128, 300, 200, .1), (1, 700, 300, .1)])
def test_bf16_linear_in_many_pieces(isa, b, i, o, density, fp32_values):
    rng = np.random.default_rng(0)
    w, m = sparse(rng, density, o, i)
    check16(K.LinearPlan.from_mask(m), linear64, w, m, randn(rng, b, i), randn(rng, b, o), randn(rng, o), fp32_values)

def check_conv16(rng, n, h, w, cin, cout, k, density=.3, bias=True, fp32_values=False, layout=None, threads=None, **kw):
    kw = dict(stride=(1,1), padding=(0,0,0,0), dilation=(1,1), groups=1) | kw
    wt, m = sparse(rng, density, cout, cin//kw['groups'], *k)
    p = K.Conv2dPlan.from_mask(m, layout=layout, **kw)
    x, dy = randn(rng, n, cin, h, w), randn(rng, n, cout, *p.out_size(h, w))
    return check16(p, lambda *a: conv64(*a, **kw), wt, m, x, dy, randn(rng, cout) if bias else None, fp32_values, threads)

@pytest.mark.parametrize('layout', [None, 'planes', 'batch'])
@quick
@given(st.data())
def test_bf16_conv_drawn(isa, layout, data):
    draw = data.draw
    def pair(lo, hi): return draw(st.integers(lo, hi)), draw(st.integers(lo, hi))
    k, stride, dilation, groups = pair(1, 4), pair(1, 3), pair(1, 3), draw(st.sampled_from([1, 1, 2, 4]))
    padding = pair(0, 4) + pair(0, 4)
    h = max(1, dilation[0]*(k[0]-1) + 1 - sum(padding[:2])) + draw(st.integers(0, 12))
    w = max(1, dilation[1]*(k[1]-1) + 1 - sum(padding[2:])) + draw(st.integers(0, 30))
    check_conv16(np.random.default_rng(draw(st.integers(0, 999))), draw(st.integers(0, 35)), h, w, groups*draw(st.integers(1, 5)), groups*draw(st.integers(1, 5)), k,
                 draw(st.sampled_from([0, .05, .3, 1])), draw(st.booleans()), draw(st.booleans()), layout, stride=stride, padding=padding, dilation=dilation, groups=groups)

@pytest.mark.parametrize('layout', ['planes', 'batch'])
@pytest.mark.parametrize('n,h,w,cin,cout,k,stride,pad', [(18, 56, 56, 40, 30, 3, 1, 1), (70, 28, 28, 24, 40, 3, 2, 1), (40, 28, 28, 80, 66, 1, 1, 0)])
def test_bf16_conv_in_many_pieces(isa, layout, n, h, w, cin, cout, k, stride, pad):
    check_conv16(np.random.default_rng(1), n, h, w, cin, cout, (k, k), .05, layout=layout, stride=(stride,)*2, padding=(pad,)*4)

@pytest.mark.parametrize('n', [3, 20])
def test_bf16_same_bits_for_any_number_of_threads(isa, n):
    def run(t):
        conv = check_conv16(np.random.default_rng(1), n, 28, 28, 20, 90, (3, 3), .03, padding=(1,)*4, threads=t)
        rng = np.random.default_rng(12)
        w, m = sparse(rng, .1, 900, 500)
        return *conv, *check16(K.LinearPlan.from_mask(m), linear64, w, m, randn(rng, 60*n, 500), randn(rng, 60*n, 900), None, True, t)
    one = run(1)
    for t in (2, 3):
        for a, b in zip(one, run(t)): assert a.tobytes() == b.tobytes()

@pytest.mark.parametrize('wanted', ['dx', 'dvalues'])
def test_bf16_each_gradient_alone(isa, wanted):
    rng = np.random.default_rng(14)
    for p, xs, ys in [(K.LinearPlan.from_mask(rng.random((30, 20)) < .3), (50, 20), (50, 30)),
                      (K.Conv2dPlan.from_mask(rng.random((8, 5, 3, 3)) < .3, padding=(1,)*4), (7, 5, 9, 9), (7, 8, 9, 9))]:
        x, dy, v, kw = bits(randn(rng, *xs)), bits(randn(rng, *ys)), bits(randn(rng, p.nnz)), dict(dtype='bfloat16')
        both, alone = (np.zeros(xs, np.uint16), np.zeros(p.nnz, np.uint16)), (np.zeros(xs, np.uint16), np.zeros(p.nnz, np.uint16))
        p.backward(x, dy, v, *both, **kw)
        if wanted == 'dx': p.backward_input(dy, v, alone[0], **kw); assert (alone[0] == both[0]).all() and not alone[1].any()
        else: p.backward_weight(x, dy, alone[1], **kw); assert np.abs(K.bf16_to_float32(alone[1]) - K.bf16_to_float32(both[1])).max() <= .1 and not alone[0].any()

def test_bf16_inf_and_nan_pass_through(isa):
    rng = np.random.default_rng(9)
    m = np.ones((9, 12), bool)
    x, dy, w = randn(rng, 20, 12), randn(rng, 20, 9), randn(rng, 9, 12)
    x[3, 4], x[5, 6], dy[7, 8] = np.inf, np.nan, -np.inf
    p, out, dx, dv = K.LinearPlan.from_mask(m), *(np.zeros(s, np.uint16) for s in [(20, 9), (20, 12), 108])
    p.forward(bits(x), bits(w[m]), None, out, dtype='bfloat16')
    p.backward(bits(x), bits(dy), bits(w[m]), dx, dv, dtype='bfloat16')
    with np.errstate(invalid='ignore'): want = x@w.T, dy@w, (dy.T@x)[m]
    for got, ref in zip((out, dx, dv), want): np.testing.assert_allclose(K.bf16_to_float32(got), ref, rtol=.05, atol=.2)

def test_bf16_overflow_is_inf_and_denormals_stay(isa):
    p = K.LinearPlan.from_mask(np.ones((1, 2)))
    for a, want in [(3e38, np.inf), (1e-39, None)]:
        out = np.zeros((17, 1), np.uint16)
        p.forward(bits(np.full((17, 2), a)), np.ones(2, np.float32), None, out, dtype='bfloat16')
        got = K.bf16_to_float32(out)
        assert (got == want).all() if want else ((got > 1.9e-39) & (got < 2.1e-39)).all()

def call16(**change):
    a = dict(x=np.ones((4, 3), np.uint16), values=np.ones(3, np.uint16), bias=None, out=np.empty((4, 2), np.uint16), dtype='bfloat16') | change
    K.LinearPlan(*linear_args()).forward(**a)

@pytest.mark.parametrize('change,error,text', [
    (dict(x=np.ones((4, 3), np.float32)), TypeError, 'bfloat16'),
    (dict(x=np.ones((4, 3), np.float16)), TypeError, 'bfloat16'),
    (dict(x=np.ones((4, 3), '>u2')), TypeError, 'bfloat16'),
    (dict(x=np.ones((4, 3), np.int32)), TypeError, 'bfloat16'),
    (dict(x=np.ones((4, 4), np.uint16)), ValueError, 'shape'),
    (dict(x=np.ones((4, 6), np.uint16)[:, ::2]), ValueError, 'contiguous'),
    (dict(values=np.ones(3, np.float64)), TypeError, 'float32'),
    (dict(values=np.ones(4, np.uint16)), ValueError, 'shape'),
    (dict(values=None), TypeError, None),
    (dict(bias=np.ones(2, np.float16)), TypeError, 'float32'),
    (dict(out=np.empty((4, 2), np.float32)), TypeError, 'bfloat16'),
    (dict(out=np.empty((4, 3), np.uint16)), ValueError, 'shape'),
    (dict(out=np.frombuffer(bytes(16), np.uint16).reshape(4, 2)), ValueError, 'read-only'),
    (dict(threads=0), ValueError, 'threads'),
    (dict(dtype='float16'), ValueError, 'float16'),
    (dict(dtype='float32'), TypeError, 'float32'),
])
def test_bf16_a_wrong_argument_is_an_error(change, error, text):
    with pytest.raises(error, match=text): call16(**change)

def test_bf16_degenerate_sizes(isa):
    for o, i, b in [(0, 5, 3), (5, 0, 3), (0, 0, 3), (5, 4, 0)]:
        p = K.LinearPlan.from_mask(np.zeros((o, i)))
        none, x, dy, out, dx = np.empty(0, np.uint16), *(np.ones(s, np.uint16) for s in [(b, i), (b, o), (b, o), (b, i)])
        p.forward(x, none, None, out, dtype='bfloat16')
        p.backward(x, dy, none, dx, none, dtype='bfloat16')
        assert not out.any() and not dx.any()
    p, dv = K.LinearPlan.from_mask(np.ones((5, 4))), np.ones(20, np.uint16)
    p.backward_weight(np.ones((0, 4), np.uint16), np.ones((0, 5), np.uint16), dv, dtype='bfloat16')
    assert not dv.any()
    p, dv = K.Conv2dPlan.from_mask(np.ones((5, 4, 3, 3))), np.ones(180, np.float32)
    p.backward_weight(np.ones((0, 4, 6, 6), np.uint16), np.ones((0, 5, 4, 4), np.uint16), dv, dtype='bfloat16')
    assert not dv.any()

# Repeatable

@pytest.mark.parametrize('layout', ['planes', 'batch'])
def test_same_bits_for_any_number_of_threads(isa, layout):
    rng = np.random.default_rng(12)
    w, m = sparse(rng, .1, 40, 20, 3, 3)
    x, dy = randn(rng, 37, 20, 15, 15), randn(rng, 37, 40, 15, 15)
    one, two, three = (run_conv(w, m, x, dy, None, padding=(1,)*4, layout=layout, threads=t) for t in (1, 2, 3))
    for a, b, c in zip(one, two, three): assert a.tobytes() == b.tobytes() == c.tobytes()
    w, m = sparse(rng, .1, 300, 200)
    args = w, m, randn(rng, 200, 200), randn(rng, 200, 300), None
    one, two, again = (run_linear(*args, threads=t) for t in (1, 2, 2))
    for a, b, c in zip(one, two, again): assert a.tobytes() == b.tobytes() == c.tobytes()

@pytest.mark.parametrize('b,i,o', [(128*5, 70, 40), (128*4, 40, 90), (128*9+5, 50, 50)])
@pytest.mark.parametrize('density', [.02, .6])
def test_same_bits_when_threads_take_whole_tiles(isa, b, i, o, density):
    rng = np.random.default_rng(13)
    w, m = sparse(rng, density, o, i)
    args = w, m, randn(rng, b, i), randn(rng, b, o), randn(rng, o)
    one, *more = (run_linear(*args, threads=t) for t in (1, 2, 3, 4))
    for got in more:
        for a, b in zip(one, got): assert a.tobytes() == b.tobytes()

@pytest.mark.parametrize('b', [17, 32, 64, 70, 96, 128, 128*3])
@pytest.mark.parametrize('density', [.005, .1, .6])
def test_same_bits_when_threads_share_a_tile(isa, b, density):
    rng = np.random.default_rng(15)
    w, m = sparse(rng, density, 210, 400)
    args = w, m, randn(rng, b, 400), randn(rng, b, 210), randn(rng, 210)
    one, *more = (run_linear(*args, threads=t) for t in (1, 2, 3, 4))
    for got in more:
        for a, b in zip(one, got): assert a.tobytes() == b.tobytes()

@pytest.mark.parametrize('b', [2, 16, 33, 48, 64, 80, 96, 112, 128, 400])
@pytest.mark.parametrize('i,o', [(400, 210), (210, 400)])
@pytest.mark.parametrize('density', [.005, .1, .9])
def test_both_gradients_at_once_are_those_of_each_alone(isa, b, i, o, density):
    "With AVX-512 they come from one sweep, with tiles of 1 to 8 vectors, whole or in halves"
    rng = np.random.default_rng(16)
    w, m = sparse(rng, density, o, i)
    p, x, dy, v = K.LinearPlan.from_mask(m), randn(rng, b, i), randn(rng, b, o), w[m]
    for t in (1, 2):
        dx, dv, dx1, dv1 = empty(b, i), empty(p.nnz), empty(b, i), empty(p.nnz)
        p.backward(x, dy, v, dx, dv, threads=t)
        p.backward_input(dy, v, dx1, threads=t)
        p.backward_weight(x, dy, dv1, threads=t)
        assert dx.tobytes() == dx1.tobytes() and dv.tobytes() == dv1.tobytes()

def test_same_bits_when_tiles_come_in_groups():
    "More weight gradients than are kept at a time."
    rng = np.random.default_rng(14)
    w, m = sparse(rng, .9, 1300, 1200)
    args = w, m, randn(rng, 128*8, 1200), randn(rng, 128*8, 1300), None
    for a, b in zip(run_linear(*args, threads=1), run_linear(*args, threads=2)): assert a.tobytes() == b.tobytes()

def test_one_openmp_runtime_and_torch_governs_it():
    code = '''
import torch, numpy as np
from fastsparse import kernels as K
torch.set_num_threads(2); torch.ones(1000, 1000) @ torch.ones(1000, 1000)
assert K.threading().startswith('openmp'), K.threading()
assert K.max_threads() == 2
p = K.LinearPlan.from_mask(np.ones((500, 500)))
x, out = np.ones((300, 500), np.float32), np.empty((300, 500), np.float32)
p.forward(x, np.ones(p.nnz, np.float32), None, out)
torch.set_num_threads(1)
assert K.max_threads() == 1
maps = {l.split()[-1] for l in open('/proc/self/maps') if any(n in l for n in ('libgomp', 'libomp', 'libiomp'))}
assert len(maps) == 1, maps
'''
    subprocess.run([sys.executable, '-c', code], check=True)

def test_other_threads_of_python_take_as_many_threads():
    code = '''
import threading, torch
from fastsparse import kernels as K
seen = []
for n in (1, 3):
    torch.set_num_threads(n)
    t = threading.Thread(target=lambda: seen.append(K.max_threads()))
    t.start(); t.join()
assert seen == [1, 3], seen
'''
    subprocess.run([sys.executable, '-c', code], check=True, env={**os.environ, 'OMP_NUM_THREADS': '2'})

def test_serial_without_openmp():
    code = '''
from fastsparse import _kernels
assert 'torch' not in __import__('sys').modules
assert _kernels.threading().startswith('serial') and _kernels.max_threads() == 1
'''
    env = os.environ | {'PYTHONPATH': '.'}
    code = "import sys, types, importlib.machinery\npkg = types.ModuleType('fastsparse'); pkg.__path__ = ['fastsparse']; sys.modules['fastsparse'] = pkg\n" + code
    subprocess.run([sys.executable, '-c', code], check=True, env=env)

# Which instructions

@pytest.mark.parametrize('name', isas)
def test_the_environment_forces_an_isa(name):
    code = 'from fastsparse import kernels as K; print(K.isa())'
    r = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True, env=os.environ | {'FASTSPARSE_ISA': name})
    assert r.stdout.split()[-1] == name

def test_an_isa_that_is_missing_is_a_clear_error():
    r = subprocess.run([sys.executable, '-c', 'import fastsparse.kernels'], capture_output=True, text=True, env=os.environ | {'FASTSPARSE_ISA': 'sse9'})
    assert "FASTSPARSE_ISA: ISA 'sse9' is not available" in r.stderr
    with pytest.raises(ValueError, match="'sse9' is not available"): K.set_isa('sse9')

def test_every_kernel_is_in_the_table():
    t = K.kernel_table()
    assert {k['isa'] for k in t} == set(isas) and {k['lay'] for k in t} - {'shifted'} == {'packed', 'unit', 'strided'}
    own = [k for k in t if k['lay'] == 'shifted' or k['op'] == 'both']
    per = {i: sum(k['isa'] == i and k not in own for k in t) for i in isas}
    assert len(set(per.values())) == 1
    assert {k['isa'] for k in own} <= {'avx512'}

@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('tile', sorted({k['tile'] for k in K.kernel_table()}))
def test_every_tile(isa, tile, stride):
    "An image as wide and as high as the tile, so that each kernel of the table runs"
    h, w = tile
    check_conv(np.random.default_rng(13), 20, stride*h, stride*w, 5, 6, (1, 1), .4, (stride, stride))

@pytest.mark.parametrize('vectors', range(1, 17))
def test_every_tile_of_whole_rows(isa, vectors):
    "So many rows of 14 pixels, a vector each with AVX-512, and rows of so many vectors"
    rng = np.random.default_rng(14)
    check_conv(rng, 5, vectors, 14, 6, 70, (3, 3), .3, padding=(1,)*4, layout='planes')
    check_conv(rng, 2, 5, 16*vectors - 3, 3, 4, (3, 3), .5, padding=(1,)*4, layout='planes')

@pytest.mark.parametrize('n', [1, 2, 3, 4, 7])
@pytest.mark.parametrize('k,padding,dilation,stride', [
    ((3, 3), (1,)*4, (1, 1), (1, 1)), ((3, 3), (0,)*4, (1, 1), (1, 1)), ((1, 3), (0, 0, 1, 1), (1, 1), (1, 1)), ((5, 5), (2, 2, 0, 4), (1, 1), (1, 1)),
    ((3, 3), (2,)*4, (2, 2), (1, 1)), ((3, 1), (1, 1, 0, 0), (1, 1), (1, 1)), ((3, 3), (1, 1, 3, 0), (1, 1), (1, 1)), ((4, 3), (1,)*4, (1, 2), (1, 2))])
def test_rows_of_whole_vectors(isa, n, k, padding, dilation, stride):
    "Widths at which, with AVX-512, several images lie side by side, one fits exactly, or pixels have to be left out"
    for w in (6, 7, 13, 14, 15, 28, 30):
        rng = np.random.default_rng(w)
        check_conv(rng, n, 9, w, 10, 66, k, .1, padding=padding, dilation=dilation, stride=stride, groups=2, layout='planes')

@pytest.mark.parametrize('layout', [None, 'planes', 'batch'])
@pytest.mark.parametrize('cin,cout', [(0, 5), (5, 0), (0, 0)])
def test_no_channels(isa, layout, cin, cout):
    p = K.Conv2dPlan.from_mask(np.ones((cout, cin, 3, 3), bool), padding=(1,)*4, layout=layout)
    x, dy, dx = np.ones((5, cin, 14, 14), np.float32), np.ones((5, cout, 14, 14), np.float32), empty(5, cin, 14, 14)
    out, bias = empty(*dy.shape), np.arange(cout, dtype=np.float32)
    p.forward(x, empty(0), bias, out)
    p.backward(x, dy, empty(0), dx, empty(0))
    assert not dx.any() and (out == bias[:, None, None]).all()

# Wrong arguments

def linear_args(): return np.array([0, 2, 3], np.int64), np.array([0, 2, 1], np.int32), 2, 3

@pytest.mark.parametrize('change,error,text', [
    (dict(indptr=np.array([0, 2], np.int64)), ValueError, 'rows\\+1'),
    (dict(indptr=np.array([0, 4, 3], np.int64)), ValueError, 'decreases'),
    (dict(indptr=np.array([1, 2, 3], np.int64)), ValueError, 'expected 0'),
    (dict(indptr=np.array([0, 2, 9], np.int64)), ValueError, 'expected nnz'),
    (dict(indptr=np.array([0, -5, 3], np.int64)), ValueError, 'decreases'),
    (dict(indptr=np.array([0, 2, 3], np.int32)), TypeError, 'int64'),
    (dict(indices=np.array([0, 3, 1], np.int32)), IndexError, 'outside'),
    (dict(indices=np.array([0, -1, 1], np.int32)), IndexError, 'outside'),
    (dict(indices=np.array([2, 0, 1], np.int32)), ValueError, 'ascend'),
    (dict(indices=np.array([2, 2, 1], np.int32)), ValueError, 'duplicates'),
    (dict(indices=np.array([0, 2, 1], np.int64)), TypeError, 'int32'),
    (dict(indices=np.array([[0, 2, 1]], np.int32)), ValueError, 'dimensions'),
    (dict(indices=np.arange(6, dtype=np.int32)[::2]), ValueError, 'contiguous'),
    (dict(n_rows=-1), ValueError, 'rows\\+1|negative|32-bit'),
    (dict(n_cols=2**40), OverflowError, '32-bit'),
])
def test_a_wrong_structure_is_an_error(change, error, text):
    args = dict(zip(('indptr', 'indices', 'n_rows', 'n_cols'), linear_args())) | change
    with pytest.raises((error, OverflowError) if 'n_rows' in change else error, match=text): K.LinearPlan(**args)

def call(**change):
    a = dict(x=np.ones((4, 3), np.float32), values=np.ones(3, np.float32), bias=None, out=empty(4, 2)) | change
    K.LinearPlan(*linear_args()).forward(**a)

@pytest.mark.parametrize('change,error,text', [
    (dict(x=np.ones((4, 4), np.float32)), ValueError, 'shape'),
    (dict(x=np.ones(3, np.float32)), ValueError, 'dimensions'),
    (dict(x=np.ones((4, 6), np.float32)[:, ::2]), ValueError, 'contiguous'),
    (dict(x=np.ones((4, 3), '>f4')), TypeError, 'float32'),
    (dict(values=np.ones(4, np.float32)), ValueError, 'shape'),
    (dict(bias=np.ones(3, np.float32)), ValueError, 'shape'),
    (dict(out=empty(4, 3)), ValueError, 'shape'),
    (dict(out=np.empty((4, 2))), TypeError, 'float32'),
    (dict(out=None), TypeError, None),
    (dict(x=None), TypeError, None),
    (dict(x=[[1., 2., 3.]]), TypeError, None),
    (dict(threads=0), ValueError, 'threads'),
])
def test_a_wrong_argument_is_an_error(change, error, text):
    with pytest.raises(error, match=text): call(**change)

def test_a_read_only_output_is_an_error():
    out = empty(4, 2); out.flags.writeable = False
    with pytest.raises(ValueError, match='read-only'): call(out=out)

@pytest.mark.parametrize('change', [dict(stride=(0, 1)), dict(dilation=(1, 0)), dict(padding=(-1, 0, 0, 0)), dict(groups=0), dict(groups=3), dict(layout='diagonal')])
def test_wrong_convolution_arguments_are_errors(change):
    with pytest.raises(ValueError): K.Conv2dPlan.from_mask(np.ones((4, 2, 3, 3)), **change)

def test_sizes_beyond_32_bits_are_errors():
    with pytest.raises(OverflowError): K.Conv2dPlan(np.zeros(2, np.int64), np.empty(0, np.int32), 1, 2**31, 1, 1)
    with pytest.raises(OverflowError): K.Conv2dPlan(np.zeros(2, np.int64), np.empty(0, np.int32), 1, 2**20, 2**10, 2**10)

def test_an_image_of_more_pixels_than_32_bits_count():
    h, w = 2**23 + 2**16, 255
    try: x, dy = (np.zeros((1, 1, h, w), np.float32) for _ in range(2))   # the system's zeros, which take no memory
    except MemoryError: pytest.skip('not enough address space')
    x[0, 0, -1, 100:103], dy[0, 0, -1, 101], dv = (1, 2, 3), 10, empty(3)
    K.Conv2dPlan.from_mask(np.ones((1, 1, 1, 3)), padding=(0, 0, 1, 1)).backward_weight(x, dy, dv, 1)
    assert dv.tolist() == [10, 20, 30]

def test_degenerate_sizes(isa):
    for o, i, b in [(0, 5, 3), (5, 0, 3), (0, 0, 3), (5, 4, 0)]:
        p = K.LinearPlan.from_mask(np.zeros((o, i)))
        out, dx = empty(b, o), empty(b, i)
        p.forward(np.ones((b, i), np.float32), np.empty(0, np.float32), None, out)
        p.backward(np.ones((b, i), np.float32), np.ones((b, o), np.float32), np.empty(0, np.float32), dx, np.empty(0, np.float32))
        assert not out.any() and not dx.any()

def test_weight_gradient_of_rows_that_no_input_reaches_meets_no_stale_memory():
    "A kernel and padding by which the input gradient leaves rows of dy out: the weight gradient must not take its packed copy."
    poison = K.LinearPlan.from_mask(np.ones((64, 64)))
    nan = np.full((64, 64), np.nan, np.float32)
    poison.forward(nan, np.full(64*64, np.nan, np.float32), None, nan.copy())
    poison.backward(nan, nan, np.full(64*64, np.nan, np.float32), nan.copy(), np.empty(64*64, np.float32))
    rng = np.random.default_rng(0)
    m = rng.random((12, 10, 1, 4)) < .1
    w = rng.standard_normal(m.shape, np.float32)*m
    x,dy = rng.standard_normal((2, 10, 3, 12), np.float32),rng.standard_normal((2, 12, 7, 12), np.float32)
    plan = K.Conv2dPlan.from_mask(m, padding=(1,3,3,0), layout='planes')
    dx,dv = np.empty_like(x),np.empty(plan.nnz, np.float32)
    plan.backward(x, dy, w[m], dx, dv)
    ts = [torch.from_numpy(t).double().requires_grad_() for t in (x, w)]
    y = F.conv2d(F.pad(ts[0], (3,0,1,3)), ts[1])
    gx,gw = torch.autograd.grad(y, ts, torch.from_numpy(dy).double())
    assert np.allclose(dx, gx, atol=1e-4) and np.allclose(dv, gw.numpy()[m], atol=1e-4)

# Tensors in place of arrays

def tensor_args(dtype=torch.float32):
    return dict(x=torch.randn(4, 3).to(dtype), values=torch.randn(3).to(dtype), bias=torch.randn(2).to(dtype), out=torch.empty(4, 2, dtype=dtype))

def test_tensors_are_as_good_as_arrays():
    p, a = K.LinearPlan(*linear_args()), tensor_args()
    want = empty(4, 2)
    p.forward(*(a[k].numpy() for k in ('x', 'values', 'bias')), want)
    p.forward(**(a | dict(values=torch.nn.Parameter(a['values']))))
    assert np.array_equal(a['out'].numpy(), want)
    grads, arrays = [torch.empty(4, 3), torch.empty(3)], [empty(4, 3), empty(3)]
    p.backward(a['x'], a['out'], a['values'], *grads)
    p.backward(a['x'].numpy(), want, a['values'].numpy(), *arrays)
    assert all(np.array_equal(g.numpy(), w) for g, w in zip(grads, arrays))

def test_bfloat16_tensors_are_as_good_as_their_bits():
    p, a = K.LinearPlan(*linear_args()), tensor_args(torch.bfloat16)
    want = np.empty((4, 2), np.int16)
    p.forward(*(a[k].view(torch.int16).numpy() for k in ('x', 'values', 'bias')), want, dtype='bfloat16')
    p.forward(**a, dtype='bfloat16')
    assert np.array_equal(a['out'].view(torch.int16).numpy(), want)

def without_memory():
    t = torch.empty(4, 3)
    t.untyped_storage().resize_(0)
    return t

def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(): return torch.empty(4, 3)

@pytest.mark.parametrize('change,error,text', [
    (dict(x=torch.ones(4, 3).double()), TypeError, 'float64, expected float32'),
    (dict(x=torch.ones(4, 3).bfloat16()), TypeError, 'expected float32'),
    (dict(x=torch.ones(4, 3, dtype=torch.cfloat)), TypeError, 'complex64'),
    (dict(x=torch.ones(4, 4)), ValueError, 'shape'),
    (dict(x=torch.ones(4, 6)[:, ::2]), ValueError, 'contiguous'),
    (dict(x=torch.ones(()).expand(4, 3)), ValueError, 'contiguous'),
    (dict(x=torch.ones(4, 3).to_sparse()), TypeError, 'cannot read'),
    (dict(x=torch.ones(4, 3, device='meta')), TypeError, 'cannot read'),
    (dict(x=torch._neg_view(torch.ones(4, 3))), TypeError, 'cannot read'),
    (dict(x=without_memory()), ValueError, 'without memory'),
    (dict(x=fake()), (TypeError, ValueError), None),
    (dict(values=torch.ones(4)), ValueError, 'shape'),
    (dict(bias=torch.ones(3)), ValueError, 'shape'),
    (dict(bias=[1., 2.]), TypeError, 'expected an array or a tensor'),
    (dict(out=torch.empty(4, 3)), ValueError, 'shape'),
])
def test_a_wrong_tensor_is_an_error(change, error, text):
    with pytest.raises(error, match=text): K.LinearPlan(*linear_args()).forward(**(tensor_args() | change))

@pytest.mark.parametrize('method', ['forward', 'backward'])
def test_none_is_no_bfloat16_weight(method):
    p, a = K.LinearPlan(*linear_args()), tensor_args(torch.bfloat16)
    args = (a['x'], None, None, a['out']) if method == 'forward' else (a['x'], a['out'], None, torch.empty_like(a['x']), None)
    with pytest.raises(TypeError): getattr(p, method)(*args, dtype='bfloat16')
