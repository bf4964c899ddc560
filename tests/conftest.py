"Learners that train in milliseconds, and the invariants that tests look at. Nothing here uses the code under test but `sparsify_model`."
import contextlib, io, signal, warnings
import pytest, torch
from torch import nn
import torch.nn.functional as F

def toy_net(dtype=torch.float32, seed=0, sizes=(6,16,12,3)):
    "Smooth, so that no two gradients tie"
    torch.manual_seed(seed)
    layers = [l for i,o in zip(sizes, sizes[1:]) for l in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)

def toy_items(n=64, dtype=torch.float32, n_in=6, n_out=3):
    g = torch.Generator().manual_seed(42)
    x = torch.randn(n, n_in, generator=g, dtype=torch.float64).to(dtype)
    return list(zip(x, (x @ torch.randn(n_in, n_out, generator=g, dtype=torch.float64).to(dtype)).argmax(1)))

class Items(list):
    def new_empty(self): return Items()

def toy_dls(n=64, bs=8, dtype=torch.float32, items=None):
    "Without shuffling: batch `i` is the same in every epoch"
    from fastai.basics import DataLoader, DataLoaders
    items = Items(items or toy_items(n, dtype))
    return DataLoaders(DataLoader(items, bs=bs), DataLoader(Items(items[:8]), bs=bs))

def toy_learner(sparsity=0.7, opt_func=None, model=None, dls=None, cbs=None, path='.', lr=0.05, n=64, bs=8, dtype=torch.float32, loss_func=F.cross_entropy, **kw):
    from fastai.basics import Learner, SGD
    from functools import partial
    import fastai.callback.training                     # brings `no_bar`
    from fastsparse import sparsify_model
    opt_func = opt_func or partial(SGD, mom=0.9)
    model = toy_net(dtype) if model is None else model
    learn = Learner(dls or toy_dls(n, bs, dtype), model, loss_func=loss_func, opt_func=opt_func, cbs=cbs, path=path, lr=lr, **kw)
    if sparsity is not None:
        torch.manual_seed(1)
        sparsify_model(learn, sparsity)
    return learn

@contextlib.contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings('ignore', message='connectivity will not change')
        warnings.filterwarnings('ignore', message='.*(CUDA|lr_scheduler|nested tensor).*')
        yield

def fit(learn, n_epoch=2, *args, how='fit', **kw):
    with quiet(learn): getattr(learn, how)(n_epoch, *args, **kw)
    return learn

def masked(model):
    "(name, parameter, mask) of whatever has a buffer `<param>_mask`, found the plain way"
    buffers = dict(model.named_buffers())
    return [(n, p, buffers[f'{n}_mask']) for n,p in model.named_parameters(remove_duplicate=False) if f'{n}_mask' in buffers]

def slots(opt, p):
    "Every per-weight tensor that an optimizer keeps, through fastai's wrappers"
    res = {}
    while opt is not None:
        state = opt.__dict__.get('state') or {}
        if p in state: res.update({k: v for k,v in state[p].items() if isinstance(v, torch.Tensor) and v.shape == p.shape})
        for ps,ss in zip(opt.param_lists, opt.__dict__['slow_weights'] or []) if 'slow_weights' in opt.__dict__ else ():
            res.update({'slow': s for q,s in zip(ps, ss) if q is p})
        opt = opt.__dict__.get('opt')
    return res

def assert_sparse(model, opt=None, where='', compressed=False):
    "`compressed`: also where only the nonzeros are stored"
    ms = masked(model)
    assert ms, 'nothing is masked'
    for n,p,m in ms:
        assert m.dtype is torch.bool, (n, where)
        if compressed and p.shape == (int(m.sum()),): continue
        assert m.shape == p.shape, (n, where)
        assert not p.detach()[~m].any(), f'{n} has weights off its mask {where}'
        for k,t in slots(opt, p).items(): assert not t[~m].any(), f'{k} of {n} is not 0 off the mask {where}'

def counts(model): return {n: int(m.sum()) for n,_,m in masked(model)}
def masks(model): return {n: m.clone() for n,_,m in masked(model)}
def state(model): return {k: v.clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.fixture
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(autouse=True)
def _seeded(): torch.manual_seed(0)

@pytest.fixture(autouse=True)
def _ctrl_c():
    "A shell that runs the tests in the background makes them ignore Ctrl-C; the tests of it need Python's own answer."
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)
