"Batch normalisation and pooling on the kernels: while sparse layers train, and only then."
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.basics import Callback, Learner, SGD
from fastsparse import CheckpointCallback, ResumeCallback, SparseKernelsCallback, kernels, sparsify_model
from fastsparse.neighbours import KernelBatchNorm2d, KernelMaxPool2d, Neighbours, NormFunction, PoolFunction
from fastsparse.training import TimingCache
from conftest import quiet, toy_dls

pytestmark = pytest.mark.skipif(not kernels.kernels_available(), reason=kernels.why_not())

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv,self.bn,self.pool,self.fc = nn.Conv2d(1, 8, 3, padding=1),nn.BatchNorm2d(8),nn.MaxPool2d(2, 1),nn.Linear(16, 3)
    def forward(self, x): return self.fc(self.pool(self.bn(self.conv(x.view(-1,1,2,3)))).flatten(1))

class Classes(Callback):
    "Types of both layers at the end of every training epoch."
    def before_fit(self): self.seen = []
    def after_train(self): self.seen.append((type(self.model.bn), type(self.model.pool)))

def learner(on=True, cbs=()):
    torch.manual_seed(0)
    learn = Learner(toy_dls(64), Net(), loss_func=F.cross_entropy, opt_func=SGD, lr=.05, cbs=[Classes(), *cbs])
    sparsify_model(learn, .7)
    return learn, SparseKernelsCallback(sparse_kernels=on, sparsity_threshold=.5)

def fit(pair, n=2, *cbs):
    with quiet(pair[0]): pair[0].fit(n, cbs=[pair[1], *cbs])
    return pair[0]

def test_on_the_kernels_during_fit_only():
    learn = fit(learner())
    assert set(learn.classes.seen) == {(KernelBatchNorm2d, KernelMaxPool2d)}
    assert (type(learn.model.bn), type(learn.model.pool)) == (nn.BatchNorm2d, nn.MaxPool2d)
    assert set(fit(learner(on=False)).classes.seen) == {(nn.BatchNorm2d, nn.MaxPool2d)}

@pytest.mark.parametrize('make', [lambda cls: cls((3,)), lambda cls: cls([2]), lambda cls: cls(2, (2,)), lambda cls: cls(2, stride=()), lambda cls: cls((2,3), (1,), (1,))])
def test_windows_of_one_number(make):
    x = torch.randn(2, 3, 9, 8)
    assert torch.equal(make(KernelMaxPool2d)(x), make(nn.MaxPool2d)(x))

@pytest.mark.parametrize('change', [dict(running_mean=None, running_var=None), dict(num_batches_tracked=None), dict(num_batches_tracked=None, momentum=None)])
def test_statistics_that_are_not_kept(change):
    a,b = nn.BatchNorm2d(3),KernelBatchNorm2d(3)
    for bn in a,b:
        for k,v in change.items(): setattr(bn, k, v)
    for _ in range(2):
        x = torch.randn(2, 3, 4, 4)
        torch.testing.assert_close(b(x), a(x))
    for k,v in a._buffers.items():
        if v is not None: torch.testing.assert_close(b._buffers[k], v)

def test_nan_reaches_the_running_statistics():
    a,b,x = nn.BatchNorm2d(2),KernelBatchNorm2d(2),torch.randn(2, 2, 4, 4)
    x[0, 0, 1, 1] = np.nan
    a(x); b(x)
    for k in 'running_mean','running_var': torch.testing.assert_close(b._buffers[k], a._buffers[k], equal_nan=True)

def test_pooling_that_returns_positions_stays(tmp_path, monkeypatch):
    monkeypatch.setenv('FASTSPARSE_CACHE', str(tmp_path))
    class Pairs(Net):
        def __init__(self):
            super().__init__()
            self.pool = nn.MaxPool2d(2, 1, return_indices=True)
        def forward(self, x): return self.fc(self.pool(self.bn(self.conv(x.view(-1,1,2,3))))[0].flatten(1))
    for on in ('auto', True):
        model = Pairs()
        near = Neighbours(model, TimingCache() if on == 'auto' else None)
        near.watch()
        model(torch.randn(4, 6))
        near.use_kernels()
        assert near.log['pool']['why'] == 'its positions are asked for' and type(model.pool) is nn.MaxPool2d

def test_same_training():
    a,b = (fit(learner(on), 4).model.state_dict() for on in (True, False))
    for k in a: assert torch.allclose(a[k].float(), b[k].float(), rtol=1e-4, atol=1e-5), k

def test_resumed_run_is_the_whole_run(tmp_path):
    whole = fit(learner(), 4, CheckpointCallback(tmp_path/'run')).model.state_dict()
    class Stop(Callback):
        order = 200
        def after_epoch(self):
            if self.epoch == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(learner(), 4, CheckpointCallback(tmp_path/'part'), Stop())
    half = fit(learner(), 4, ResumeCallback(tmp_path/'part'))
    assert half.classes.seen[-1] == (KernelBatchNorm2d, KernelMaxPool2d)
    rest = half.model.state_dict()
    assert all(torch.equal(whole[k], rest[k]) for k in whole)

def test_an_interrupted_fit_is_settled_by_the_next():
    class Stop(Callback):
        def after_backward(self): raise KeyboardInterrupt
    pair = learner()
    with pytest.raises(KeyboardInterrupt): fit(pair, 2, Stop())
    learn = fit(pair, 1)
    assert (type(learn.model.bn), type(learn.model.pool)) == (nn.BatchNorm2d, nn.MaxPool2d)

def test_the_report_shows_them():
    from fastsparse import sparse_kernels_report
    learn = fit(learner())
    assert list(sparse_kernels_report(learn).index) == ['conv.weight', 'fc.weight']
    assert {'bn','pool'} <= set(sparse_kernels_report(learn, neighbours=True).index)

@settings(deadline=None, max_examples=60)
@given(n=st.integers(1,5), c=st.integers(1,40), h=st.integers(1,40), w=st.integers(1,40), isa=st.sampled_from(kernels.available_isas() or ['']), seed=st.integers(0,99))
def test_norm_of_any_shape_is_double_precisions(n, c, h, w, isa, seed):
    if n*h*w < 2: return
    kernels.set_isa(isa)
    try:
        torch.manual_seed(seed)
        x,weight,bias,dy = torch.randn(n,c,h,w)*2+5,torch.randn(c),torch.randn(c),torch.randn(n,c,h,w)
        ts = [t.clone().requires_grad_() for t in (x,weight,bias)]
        ys = [t.double().requires_grad_() for t in (x,weight,bias)]
        y,z = NormFunction.apply(*ts, 1e-1)[0],F.batch_norm(ys[0], None, None, *ys[1:], True, eps=1e-1)
        for a,b in zip((y, *torch.autograd.grad(y, ts, dy)), (z, *torch.autograd.grad(z, ys, dy.double()))):
            assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4*max(1, b.abs().max().item()))
    finally: kernels.set_isa(kernels.available_isas()[0])

@settings(deadline=None, max_examples=60)
@given(n=st.integers(1,3), c=st.integers(1,4), h=st.integers(1,40), w=st.integers(1,40), kh=st.integers(1,5), kw=st.integers(1,5), sh=st.integers(1,4), sw=st.integers(1,4),
       ph=st.integers(0,2), pw=st.integers(0,2), isa=st.sampled_from(kernels.available_isas() or ['']), seed=st.integers(0,99))
def test_pooling_of_any_window_is_torchs(n, c, h, w, kh, kw, sh, sw, ph, pw, isa, seed):
    ph,pw = min(ph, kh//2),min(pw, kw//2)
    if h+2*ph < kh or w+2*pw < kw: return
    kernels.set_isa(isa)
    try:
        torch.manual_seed(seed)
        x = torch.randn(n,c,h,w).mul(2).round()
        x[torch.rand(x.shape) < .1] = float('-inf'); x[torch.rand(x.shape) < .02] = float('nan')
        x.requires_grad_()
        y,z = PoolFunction.apply(x, (kh,kw), (sh,sw), (ph,pw)),F.max_pool2d(x, (kh,kw), (sh,sw), (ph,pw))
        assert torch.equal(y.nan_to_num(99.), z.nan_to_num(99.))
        dy = torch.randint(-4, 5, y.shape).float()      # sums are exact
        assert torch.equal(*(torch.autograd.grad(t, x, dy)[0] for t in (y,z)))
    finally: kernels.set_isa(kernels.available_isas()[0])

def test_one_and_two_threads_agree():
    import numpy as np
    rng = np.random.default_rng(0)
    x,dy,res = rng.standard_normal((7,37,9,9), np.float32),rng.standard_normal((7,37,9,9), np.float32),[]
    for t in (1,2):
        out,dx,(m,v,dw,db) = np.empty_like(x),np.empty_like(x),np.empty((4,37), np.float32)
        kernels.batch_norm_forward(x, None, None, 1e-5, m, v, out, t)
        kernels.batch_norm_backward(x, dy, m, v, None, 1e-5, dx, dw, db, t)
        res.append([out, dx, m, v, dw, db])
    assert all((a == b).all() for a,b in zip(*res))

def test_wrong_arrays_are_errors():
    import numpy as np
    x,v,i = np.zeros((2,3,4,4), np.float32),np.zeros(3, np.float32),np.zeros((2,3,2,2), np.uint8)
    o = np.zeros((2,3,2,2), np.float32)
    for call in (lambda: kernels.batch_norm_forward(x, v[:2], None, 0., v, v.copy(), x.copy()), lambda: kernels.batch_norm_forward(x, None, None, 0., v, v.copy(), o),
                 lambda: kernels.batch_norm_forward(x[:0], None, None, 0., v, v.copy(), x[:0]), lambda: kernels.batch_norm_forward(v, None, None, 0., v, v.copy(), v),
                 lambda: kernels.max_pool_forward(x, (2,2), (0,2), (0,0), o, i), lambda: kernels.max_pool_forward(x, (2,2), (2,2), (2,2), o, i),
                 lambda: kernels.max_pool_forward(x, (16,16), (2,2), (8,8), o, i), lambda: kernels.max_pool_forward(x, (2,2), (2,2), (0,0), o, i[:1]),
                 lambda: kernels.max_pool_backward(o, i+4, (2,2), (2,2), (0,0), x.copy())):
        with pytest.raises(ValueError): call()
    with pytest.raises(TypeError): kernels.batch_norm_forward(x.astype(np.float64), None, None, 0., v, v.copy(), x.copy())

def test_read_only_index_is_refused():
    index = np.zeros((1, 1, 2, 2), np.uint8)
    index.setflags(write=False)
    x = np.random.default_rng(0).random((1, 1, 4, 4), dtype=np.float32)
    with pytest.raises(ValueError, match='index is read-only'):
        kernels.max_pool_forward(x, (2, 2), (2, 2), (0, 0), np.empty((1, 1, 2, 2), np.float32), index)
    assert not index.any()
