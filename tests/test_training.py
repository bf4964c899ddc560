"Layers on the compiled kernels while they train: the same training, the same checkpoints, and nothing that an interruption could break."
import copy
from contextlib import nullcontext
from functools import partial
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from fastai.basics import Adam, Callback, CancelFitException, CancelTrainException, DataLoader, DataLoaders, Learner, OptimWrapper, SGD, TensorBase, load_model, save_model
from fastai.callback.fp16 import MixedPrecision
import fastai.callback.hook
import fastai.callback.schedule
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.optimizer import Lamb, RAdam, ranger
from fastai.interpret import Interpretation
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from fastsparse import (DynamicSparseTrainingCallback, RigL_presets, SET_presets, SNFS_presets, CheckpointCallback, ResumeCallback, SparseKernelsCallback,
                        dense_grad, dense_parameters, gradient_magnitude, load_sparse_model, sparse_kernels_report, sparse_params, sparsify_model)
from fastsparse import kernels, layers, links, topology, training
from fastsparse.training import TimingCache, expand_model, param_compressed
from conftest import quiet, toy_items, Items

pytestmark = pytest.mark.skipif(not kernels.kernels_available(), reason=kernels.why_not())
PRESETS = dict(RigL=RigL_presets, SET=SET_presets, SNFS=SNFS_presets)

class Conv(nn.Module):
    "Convolutions, a norm, and a head, on 6 numbers folded into an image."
    def __init__(self):
        super().__init__()
        self.c1,self.bn,self.c2,self.fc = nn.Conv2d(1, 8, 3, padding=1, bias=False),nn.BatchNorm2d(8),nn.Conv2d(8, 16, 3, stride=2, padding=1),nn.Linear(32, 3)
    def forward(self, x):
        x = F.silu(self.bn(self.c1(x.view(-1, 1, 2, 3))))
        return self.fc(self.c2(x).tanh().flatten(1))

def mlp(): return nn.Sequential(nn.Linear(6,32), nn.Tanh(), nn.Linear(32,24), nn.Tanh(), nn.Linear(24,3))

def learner(model_f=mlp, opt_func=partial(SGD, mom=.9), sparsity=.85, bs=8, path='.', seed=0, **kw):
    torch.manual_seed(seed)
    items = Items(toy_items(64))
    learn = Learner(DataLoaders(DataLoader(items, bs=bs), DataLoader(Items(items[:16]), bs=8)), model_f(), loss_func=F.cross_entropy, opt_func=opt_func, lr=.05, path=path, **kw)
    sparsify_model(learn, sparsity)
    return learn

def dst(method='RigL', on=True, every=3, **kw):
    return DynamicSparseTrainingCallback(**{**PRESETS[method], **kw}, batches_per_update=every, sparse_kernels=on, sparsity_threshold=.5)

def run(learn, n=3, *cbs, **kw):
    with quiet(learn): learn.fit(n, cbs=list(cbs), **kw)
    return learn

def dense_slots(learn):
    "Each masked parameter's slots, as a checkpoint shows them."
    sd = learn.opt.state_dict()['state']
    params = [p for g in learn.opt.param_lists for p in g]
    return {id(p): s for p,s in (zip(params, sd) if not isinstance(sd, dict) else ((params[i], s) for i,s in sd.items()))}

def check(learn, counts=None):
    "Every invariant of the engine, whichever way the layers are stored."
    state,slots = learn.model.state_dict(),dense_slots(learn) if learn.opt is not None else {}
    for p in sparse_params(learn.model):
        w,m = state[p.name],state[f'{p.name}_mask']
        assert w.shape == m.shape and not w[~m].any(), p.name
        for k,t in slots.get(id(p.param), {}).items():
            if isinstance(t, torch.Tensor) and t.ndim: assert t.shape == m.shape and not t[~m].any(), (p.name, k)
        if param_compressed(p): assert p.param.shape == (p.n_active,)
        if p.param.grad is not None: assert p.param.grad.shape == p.param.shape
    if counts is not None: assert sum(counts) == sum(p.n_active for p in sparse_params(learn.model))

def counts(learn): return [p.n_active for p in sparse_params(learn.model)]
def close(a, b, rtol=1e-4, atol=2e-6): return a.keys() == b.keys() and all(torch.allclose(v.float(), b[k].float(), rtol=rtol, atol=atol) for k,v in a.items())

# ------------------------------------------------------------------------------------------------ the same training

@pytest.mark.parametrize('method', PRESETS)
@pytest.mark.parametrize('model_f', [mlp, Conv])
def test_same_masks_and_weights_with_and_without_kernels(model_f, method):
    off,on = [run(learner(model_f), 25, dst(method, on)) for on in (False, True)]       # 200 steps
    assert close(off.model.state_dict(), on.model.state_dict())

@pytest.mark.parametrize('opt_func', [partial(SGD), Adam, RAdam, Lamb, ranger, partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, weight_decay=.01),
                                      partial(OptimWrapper, opt=torch.optim.Adam), partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_same_training_with_every_optimizer(opt_func):
    off,on = [run(learner(opt_func=opt_func), 4, dst('RigL', on), lr=.01) for on in (False, True)]
    assert close(off.model.state_dict(), on.model.state_dict(), 1e-3, 1e-5)
    check(on)

@pytest.mark.parametrize('cbs', [lambda: [GradientAccumulation(24)], lambda: [GradientClip(.1)], lambda: [MixedPrecision(amp_mode='bf16')]])
def test_composes(cbs):
    off,on = [run(learner(), 4, dst('RigL', on, every=2), *cbs()) for on in (False, True)]
    assert close(off.model.state_dict(), on.model.state_dict(), 1e-3, 1e-5)

class ByName(Callback):
    "An average of weights as timm keeps it."
    def before_fit(self): self.avg = {k: v.clone().float() for k,v in self.model.state_dict().items()}
    def after_step(self):
        for k,v in self.model.state_dict().items(): self.avg[k].lerp_(v.float(), .1)

class ByParameter(Callback):
    "As torch keeps it."
    def before_fit(self): self.torchs = AveragedModel(self.model, avg_fn=lambda a,b,n: a + .1*(b-a))
    def after_step(self):
        with dense_parameters(self.learn): self.torchs.update_parameters(self.model)
    def after_fit(self): self.avg = self.torchs.module.state_dict()

@pytest.mark.parametrize('ema_f', [ByName, ByParameter])
@pytest.mark.parametrize('order', [-5, 200])
def test_averages_of_weights(ema_f, order):
    avgs = []
    for on in False,True:
        ema,cb = ema_f(),dst(on=on)
        ema.order = order
        learn = run(learner(), 3, cb, ema)
        assert cb.updates
        check(learn)
        avgs.append(ema.avg)
    assert close(*avgs)

def test_dense_parameters_outside_of_fit():
    learn = learner()
    with dense_parameters(learn): pass
    run(learn, 1, dst(keep_kernels=True))
    before,weights = [p.clone() for p in learn.model.parameters()],learn.model.state_dict()
    with dense_parameters(learn):
        assert [p.param.shape for p in sparse_params(learn.model)] == [p.mask.shape for p in sparse_params(learn.model)]
        assert all(v.equal(weights[k]) for k,v in learn.model.state_dict().items())
    assert all(a.equal(b) for a,b in zip(before, learn.model.parameters()))
    with pytest.raises(ZeroDivisionError), dense_parameters(learn): 1/0
    assert all(param_compressed(p) for p in sparse_params(learn.model))

def test_interpretation_of_compressed_layers():
    learn = run(learner(), 1, dst(keep_kernels=True))
    assert all(param_compressed(p) for p in sparse_params(learn.model))
    with quiet(learn): a = Interpretation.from_learner(learn).top_losses(5)
    expand_model(learn.model, learn.opt)
    with quiet(learn): b = Interpretation.from_learner(learn).top_losses(5)
    assert torch.allclose(a[0], b[0], atol=1e-5) and list(a[1]) == list(b[1])

@pytest.mark.parametrize('deterministic', [False, True])
def test_runs_are_identical_on_the_kernels(deterministic):
    torch.use_deterministic_algorithms(deterministic)
    try: a,b = [run(learner(Conv), 4, dst()) for _ in range(2)]
    finally: torch.use_deterministic_algorithms(False)
    assert all(v.equal(b.model.state_dict()[k]) for k,v in a.model.state_dict().items())

@pytest.mark.parametrize('grow', [RigL_presets['grow_score_f'], lambda p,opt: p.grad.abs()])
def test_layers_really_run_compressed(grow):
    "An elementwise score doesn't even need a dense layer for the update; a score that may look at anything gets one."
    seen = []
    class Look(Callback):
        def before_step(self): seen.append([param_compressed(p) for p in sparse_params(self.learn.model)])
    cb = dst(every=6, grow_score_f=grow)
    learn = run(learner(), 3, cb, Look())
    assert seen[0] == [False]*3 and seen[1] == [True]*3 and seen[7] == [True]*3 and cb.updates
    assert seen[6] == [grow is RigL_presets['grow_score_f']]*3
    assert not any(param_compressed(p) for p in sparse_params(learn.model))

@pytest.mark.parametrize('cbs', [lambda: [], lambda: [GradientAccumulation(24)]])
def test_an_update_of_compressed_layers_is_that_of_dense_ones(cbs):
    "The same elementwise score, declared so or not."
    def grow(p, opt): return p.grad.abs()
    a,b = [run(learner(Conv), 4, dst(every=2, grow_score_f=f), *cbs()) for f in (grow, RigL_presets['grow_score_f'])]
    assert close(a.model.state_dict(), b.model.state_dict(), 1e-3, 1e-5)

def test_static_sparsity_on_the_kernels():
    off,on = run(learner(), 3),run(learner(), 3, SparseKernelsCallback(True, .5))
    assert close(off.model.state_dict(), on.model.state_dict())

def test_validation_and_prediction_run_sparse():
    learn = run(learner(), 2, dst(keep_kernels=True))
    assert all(param_compressed(p) for p in sparse_params(learn.model))
    with quiet(learn): kept = learn.get_preds()[0],learn.validate()
    expand_model(learn.model, learn.opt)
    with quiet(learn): plain = learn.get_preds()[0],learn.validate()
    assert torch.allclose(kept[0], plain[0], atol=1e-5) and abs(kept[1][0]-plain[1][0]) < 1e-5

def test_summary_hooks_and_freezing_on_compressed_layers():
    learn = run(learner(), 1, dst(keep_kernels=True))
    with quiet(learn): assert 'Linear' in str(learn.summary())
    got = []
    h = learn.model[0].register_forward_hook(lambda m,i,o: got.append(o.shape))
    learn.model[2].weight.requires_grad_(False)
    learn.model[2].weight.grad = None
    before = learn.model.state_dict()['2.weight'].clone()
    run(learn, 2, dst())
    h.remove()
    assert got and learn.model[2].weight.detach().equal(before)
    check(learn)

def test_transformer_on_the_kernels():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up,self.enc,self.head = nn.Linear(1, 16),nn.TransformerEncoderLayer(16, 2, 32, dropout=0., batch_first=True),nn.Linear(16, 3)
        def forward(self, x): return self.head(self.enc(self.up(x[...,None])).mean(1))
    off,on = [run(learner(Net, Adam), 6, dst('RigL', on), lr=.01) for on in (False, True)]
    assert close(off.model.state_dict(), on.model.state_dict(), 1e-3, 1e-4)
    with quiet(on): on.get_preds()

def test_lstm_trains_through_masks_beside_compressed_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.head = nn.LSTM(1, 16, batch_first=True),nn.Linear(16, 3)
        def forward(self, x): return self.head(self.rnn(x[...,None])[0][:,-1])
    learn = learner(Net)
    run(learn, 2, dst(on='auto'))
    check(learn)
    with pytest.raises(ValueError, match='rnn.weight_ih_l0'): run(learner(Net), 1, dst(on=True))

# ------------------------------------------------------------------------------------------------ decisions

def test_report_says_what_and_why():
    learn = run(learner(), 1, dst(on='auto'))
    rep = sparse_kernels_report(learn)
    assert list(rep.index) == [p.name for p in sparse_params(learn.model)] and rep.chosen.isin(['dense','sparse']).all() and rep.why.str.len().gt(0).all()
    with pytest.raises(ValueError, match='no decision yet'): sparse_kernels_report(learner())

def test_insisting_is_an_error_where_kernels_cant_be():
    learn = learner(lambda: mlp().double())
    learn.dls = DataLoaders(*[DataLoader([(x.double(),y) for x,y in toy_items(16)], bs=8)]*2)
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match='float64'): run(learn, 1, dst(on=True))
    assert all(v.equal(learn.model.state_dict()[k]) for k,v in before.items())

@pytest.mark.parametrize('kw', [dict(sparse_kernels='yes'), dict(sparsity_threshold=1.), dict(sparsity_threshold=-1)])
def test_bad_arguments(kw):
    with pytest.raises(ValueError): DynamicSparseTrainingCallback(**kw)

def test_timings_are_kept_and_a_broken_file_is_done_without(tmp_path):
    f,n = tmp_path/'t.json',[]
    for _ in range(5): assert TimingCache(f)('layer', lambda: n.append(1) or dict(dense=1., sparse=2.))['sparse'] == 2.
    assert len(n) == 3
    f.write_text('{broken')
    assert TimingCache(f)('layer', lambda: dict(dense=3.))['dense'] == 3.
    for odd in ('{"a machine": [1]}', '{"a machine": {"layer": [1]}}', '[]'):
        f.write_text(odd)
        assert TimingCache(f)('layer', lambda: dict(dense=3., sparse=4.))['dense'] == 3.
    assert TimingCache('/proc/no/such/place')('layer', lambda: dict(dense=1.))['dense'] == 1.

def test_timings_of_two_runs_at_once_are_both_kept(tmp_path):
    a,b = (TimingCache(tmp_path/'t.json') for _ in range(2))
    for c,n in ((a, 'x'), (b, 'y'), (a, 'z')): c(n, lambda: dict(dense=1., sparse=2.))
    assert TimingCache(tmp_path/'t.json').times[training._machine()].keys() == {'x', 'y', 'z'}
    a,b = (TimingCache(tmp_path/'t.json') for _ in range(2))
    for c,ms in ((a, 1.), (b, 9.)): assert c('same', lambda: dict(dense=ms, sparse=ms+1)) == dict(dense=1., sparse=2., runs=1 if c is a else 2)

def test_a_layer_that_cannot_be_compressed_keeps_its_optimizer_slots():
    lin = nn.Linear(8, 8)
    lin.register_buffer('mine', torch.zeros(3))
    sparsify_model(lin, .5)
    opt = torch.optim.Adam(lin.parameters())
    lin(torch.randn(2, 8)).sum().backward()
    opt.step()
    with pytest.raises(TypeError, match='mine'): training.compress_param(sparse_params(lin)[0], opt)
    assert all(t.shape in ((8, 8), ()) for t in opt.state[lin.weight].values()) and lin.weight.shape == (8, 8)

def test_attention_asks_for_the_mask_that_torch_asks_for():
    m = nn.MultiheadAttention(8, 2)
    sparsify_model(m, .5)
    training.compress_params(m, sparse_params(m))
    x = torch.randn(3, 2, 8)
    with pytest.raises(RuntimeError, match='Need attn_mask'): m(x, x, x, is_causal=True, need_weights=False)
    m.eval()
    for batch_first,key,raises in (False, x, True),(True, x, False),(True, x.clone(), True):      # torch's fast path doesn't ask
        m.batch_first = batch_first
        with torch.no_grad(), pytest.raises(RuntimeError, match='Need attn_mask') if raises else nullcontext(): m(x, key, x, is_causal=True, need_weights=False)

@pytest.fixture
def always_faster(monkeypatch): monkeypatch.setattr(training, 'layer_timing', lambda *a: dict(dense=2., sparse=1.))

class Doubled(nn.MultiheadAttention):
    def forward(self, *args, **kw):
        y,w = super().forward(*args, **kw)
        return 2*y, w

class Attending(nn.Module):
    "Two queries that look at 6 numbers."
    def __init__(self, cls=nn.MultiheadAttention, size=16, **kw):
        super().__init__()
        self.embed,self.q,self.attn,self.head = nn.Linear(1, size),nn.Parameter(torch.randn(2, 16)),cls(16, 2, batch_first=True, **kw),nn.Linear(32, 3)
    def forward(self, x):
        h = self.embed(x[...,None])
        return self.head(self.attn(self.q.expand(len(x), -1, -1), h, h)[0].flatten(1))

@pytest.mark.parametrize('kw', [dict(add_bias_kv=True), dict(add_zero_attn=True), dict(size=5, kdim=5, vdim=5), dict(cls=Doubled)])
def test_attention_that_the_kernels_do_not_know_stays_as_it_is(kw, always_faster):
    "All of it: its output projection is only called by it."
    a,b = (run(learner(partial(Attending, **kw)), 2, dst(on=on)) for on in ('auto', False))
    for (n,p),q in zip(a.model.named_parameters(), b.model.parameters()): torch.testing.assert_close(p, q, msg=n)
    assert type(a.model.attn) is type(b.model.attn) is kw.get('cls', nn.MultiheadAttention)
    assert 'attention' in sparse_kernels_report(a).why['attn.out_proj.weight'].lower()
    with pytest.raises(ValueError, match='attn.out_proj.weight: .*ttention'): run(learner(partial(Attending, **kw)), 1, dst())

@pytest.mark.parametrize('method', PRESETS)
@pytest.mark.parametrize('skip', ['start_epoch', 'cancelled'])
def test_an_update_may_be_the_first_step_of_all(method, skip):
    "Where training begins with a later epoch, or something has ended the first before its first step."
    kw,cbs = (dict(start_epoch=1),lambda: []) if skip == 'start_epoch' else ({},lambda: [Raise('before_batch', 1, CancelTrainException)])
    off,on = [run(learner(), 3, cb := dst(method, on, every=8), *cbs(), **kw) for on in (False, True)]
    assert cb.updates[0]['step'] == 8 and close(off.model.state_dict(), on.model.state_dict())

class Tied(nn.Module):
    "An autoencoder whose decoder is its encoder transposed."
    def __init__(self):
        super().__init__()
        self.enc,self.fc = nn.Linear(6, 32),nn.Linear(6, 3)
    def forward(self, x): return self.fc(F.linear(self.enc(x).tanh(), self.enc.weight.t()))

class TiedInBf16(Tied):
    def forward(self, x):
        with torch.autocast('cpu', torch.bfloat16): return self.fc(self.enc(x).tanh() @ self.enc.weight).float()

class TiedAndCheckpointed(Tied):
    "Within `backward`, the encoder is called again."
    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant
    def forward(self, x):
        h = checkpoint(self.enc, x.detach().requires_grad_(), use_reentrant=self.use_reentrant)
        return self.fc(F.linear(h.tanh(), self.enc.weight.t()))

class TiedToATeacher(Tied):
    def forward(self, x):
        with torch.no_grad(): h = self.enc(x)
        return super().forward(x) + self.fc.bias*h.mean()

def norms(m): return sum(p.norm(dim=1).sum() for p in m.parameters() if p.ndim == 2)
def means(m): return sum(p.abs().mean() for p in m.parameters())

class InputGradient(Callback):
    "A penalty on the gradient by the input."
    def before_batch(self): self.learn.xb = (self.xb[0].requires_grad_(),)
    def after_loss(self):
        if self.training: self.learn.loss_grad = self.loss_grad + torch.autograd.grad(self.pred.sum(), self.xb[0], create_graph=True)[0].pow(2).mean()

@pytest.mark.parametrize('on', ['auto', True])
@pytest.mark.parametrize('model,penalty,cbs', [(Tied, None, []), (mlp, norms, []), (mlp, means, []), (mlp, None, [InputGradient]), (Conv, None, [InputGradient])],
                         ids=['decoder', 'norms', 'means', 'gradient', 'gradient_conv'])
def test_weights_that_others_read_stay_dense(model, penalty, cbs, on, always_faster):
    "The model elsewhere, or the loss: either would see a vector of nonzeros."
    def start(on):
        learn = learner(model)
        if penalty is not None: learn.loss_func = lambda y, t: F.cross_entropy(y, t) + .01*penalty(learn.model)
        return run(learn, 2, dst(on=on), *[cb() for cb in cbs])
    if on is True:
        with pytest.raises(ValueError, match='outside of the layer'): start(True)
        return
    a,b = start('auto'),start(False)
    assert close(a.model.state_dict(), b.model.state_dict())
    why = sparse_kernels_report(a).why
    assert 'outside' in why[why.index[0]] and (model is not Tied or 'faster' in why['fc.weight'])

@pytest.mark.parametrize('model', [TiedInBf16, partial(TiedAndCheckpointed, False), partial(TiedAndCheckpointed, True), TiedToATeacher])
def test_what_stands_in_for_calls_of_a_layer_is_none(model, always_faster):
    "A weight that autocast keeps converted for all who ask, calls within `backward`, calls without a graph."
    learn = run(learner(model), 2, dst(on='auto'))
    assert sparse_kernels_report(learn).chosen.to_dict() == {'enc.weight': 'dense', 'fc.weight': 'sparse'}

class CalledTwice(nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.a,self.b,self.c,self.calls = nn.Linear(6, 32),nn.Linear(32, 32),nn.Linear(32, 3),calls
    def forward(self, x): return self.c(self.calls(lambda h: self.b(self.b(h).tanh()), self.a(x)).float())

def in_bf16(f, x):
    with torch.autocast('cpu', torch.bfloat16): return f(x)

@pytest.mark.parametrize('calls', [lambda f, x: f(x), in_bf16, partial(checkpoint, use_reentrant=False), partial(checkpoint, use_reentrant=True)])
def test_calls_of_a_layer_are_no_other_uses(calls): run(learner(partial(CalledTwice, calls)), 2, dst())

def test_a_resumed_run_knows_which_weights_others_read(tmp_path, always_faster):
    def start(*cbs): return run(learner(Tied), 2, dst(on='auto'), CheckpointCallback(tmp_path/'c', 2), *cbs)
    through = start()
    (tmp_path/'c').unlink()
    with pytest.raises(KeyboardInterrupt): start(Raise('after_batch', 8, order=100))
    assert close(through.model.state_dict(), start(ResumeCallback(tmp_path/'c')).model.state_dict(), 0, 0)

def test_an_interrupted_run_leaves_memory_to_the_next_to_give_back(monkeypatch):
    asked = []
    monkeypatch.setattr(training.kernels, 'keep_freed_memory', lambda on: asked.append(on) or True)
    class Stop(Callback):
        def after_step(self): raise RuntimeError('stop')
    cb = SparseKernelsCallback(sparse_kernels=True, sparsity_threshold=.5)
    with pytest.raises(RuntimeError, match='stop'): run(learner(), 1, cb, Stop())
    assert asked[-1]
    run(learner(), 1, SparseKernelsCallback(sparsity_threshold=.99))
    assert not asked[-1] and asked.count(False) == 1

# ------------------------------------------------------------------------------------------------ checkpoints

@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9), Adam, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)])
@pytest.mark.parametrize('there', [False, True])
def test_checkpoints_don_t_show_how_a_layer_ran(opt_func, there, tmp_path):
    "Saved in the midst of training on the kernels, carried on with or without; and the other way round."
    class Save(Callback):
        order = 97
        def after_batch(self):
            if self.training and self.learn.train_iter == 13: save_model(tmp_path/'m', self.learn.model, self.learn.opt)
    run(learner(opt_func=opt_func), 3, dst(on=there), Save())
    res = []
    for on in (False, True):
        learn = learner(opt_func=opt_func, seed=5)
        run(learn, 1, dst(on=on, keep_kernels=True))
        load_model(tmp_path/'m', learn.model, learn.opt)
        check(learn)
        res.append(run(learn, 1, dst(on=on, every=4), lr=.01))
    assert close(res[0].model.state_dict(), res[1].model.state_dict(), 1e-3, 1e-5)

def test_save_model_callback_loads_the_best_of_a_compressed_run(tmp_path):
    learn = learner(path=tmp_path)
    run(learn, 4, dst(), SaveModelCallback(with_opt=True))
    check(learn)
    other = mlp()
    load_sparse_model(tmp_path/'models'/'model', other)
    assert close(other.state_dict(), learn.model.state_dict(), 0, 0)

@pytest.mark.parametrize('method', PRESETS)
@pytest.mark.parametrize('every', [None, 3])
def test_resume_on_the_kernels_is_bit_identical(method, every, tmp_path):
    class Stop(Callback):
        order = 100
        def after_batch(self):
            if self.training and self.learn.train_iter == 21: raise KeyboardInterrupt
    through = run(learner(), 4, dst(method))
    with pytest.raises(KeyboardInterrupt): run(learner(), 4, dst(method), CheckpointCallback(tmp_path/'c', every), Stop())
    resumed = run(learner(seed=3), 4, dst(method), CheckpointCallback(tmp_path/'c', every), ResumeCallback(tmp_path/'c'))
    assert close(through.model.state_dict(), resumed.model.state_dict(), 0, 0)

@pytest.mark.parametrize('second', [None, 'SNFS'])
def test_a_run_resumed_where_an_update_is_due_is_on_the_kernels_at_once(second, tmp_path):
    "In the first batch of an epoch."
    class Look(Callback):
        run_valid = False
        def before_fit(self): self.seen = {}
        def after_pred(self): self.seen[self.learn.epoch,self.learn.iter] = [param_compressed(p) for p in sparse_params(self.learn.model)]
    def start(seed, *cbs):
        learn = learner(Conv, seed=seed)
        parts = [learn.model.c1, learn.model.c2] if second else [None]
        return run(learn, 4, *[dst(n, every=8, sparse_modules=m) for n,m in zip(('RigL', second), parts)], *cbs)
    looks = Look(),Look()
    through = start(0, looks[0])
    with pytest.raises(KeyboardInterrupt): start(0, CheckpointCallback(tmp_path/'c'), Raise('after_batch', 12, order=100))
    resumed = start(3, ResumeCallback(tmp_path/'c'), looks[1])
    assert any(looks[0].seen[1,0]) and looks[0].seen[1,0] == looks[1].seen[1,0]
    assert close(through.model.state_dict(), resumed.model.state_dict(), 0, 0)

@pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat(), FocalLossFlat()], ids=['flat', 'focal'])
def test_a_run_with_fastais_losses_resumes(loss_func, tmp_path):
    "Their values are tensors of fastai's own kind."
    def start(*cbs):
        learn = learner()
        learn.loss_func = loss_func
        return run(learn, 2, dst(), *cbs)
    through = start(CheckpointCallback(tmp_path/'c', 3))
    with pytest.raises(KeyboardInterrupt): start(CheckpointCallback(tmp_path/'c', 3), Raise('after_batch', 8, order=100))
    resumed = start(CheckpointCallback(tmp_path/'c', 3), ResumeCallback(tmp_path/'c'))
    assert close(through.model.state_dict(), resumed.model.state_dict(), 0, 0)

def test_a_run_that_had_finished_resumes_as_it_ended(tmp_path):
    def start(seed): return run(learner(seed=seed), 3, dst(), CheckpointCallback(tmp_path/'c'), ResumeCallback(tmp_path/'c'))
    first,again = start(0),start(5)
    assert close(first.model.state_dict(), again.model.state_dict(), 0, 0) and again.recorder.values == first.recorder.values
    assert close(first.model.state_dict(), start(6).model.state_dict(), 0, 0)

@pytest.mark.parametrize('size', [0, 1, 1000, 5000, -10])
def test_a_file_cut_short_is_a_value_error_that_names_it(size, tmp_path):
    learn = run(learner(), 1, CheckpointCallback(tmp_path/'c'))
    raw = (tmp_path/'c').read_bytes()
    (tmp_path/'c').write_bytes(raw[:size])
    with pytest.raises(ValueError, match=r"/c can't be read: .+"): load_sparse_model(tmp_path/'c', learn.model)
    for text in 'hello','epoch,loss\n1,2\n':
        (tmp_path/'c').write_text(text)
        with pytest.raises(ValueError, match=r"/c can't be read: .+"): load_sparse_model(tmp_path/'c', learn.model)

def test_a_copied_learner_has_its_own_optimizer_state():
    learn = run(learner(), 2, dst(keep_kernels=True))
    twin = copy.deepcopy(learn)
    before = copy.deepcopy(learn.opt.state_dict())
    run(twin, 2, dst(keep_kernels=True))
    def close_states(a, b): return all(torch.equal(v, y[k]) for x,y in zip(a['state'], b['state'], strict=True) for k,v in x.items() if isinstance(v, torch.Tensor))
    assert close_states(learn.opt.state_dict(), before) and not close_states(twin.opt.state_dict(), before)
    twins = copy.deepcopy(twin.opt.state_dict())
    twin.opt.load_state_dict(before)
    learn.opt.load_state_dict(twins)
    assert not close_states(learn.opt.state_dict(), before) and not close_states(twin.opt.state_dict(), twins)

def test_an_interrupted_update_leaves_nothing_behind(tmp_path):
    learn = learner()
    with pytest.raises(KeyboardInterrupt): run(learn, 2, dst(every=2), Raise('after_loss', 3))
    run(learn, 1, dst())
    assert not any(m._forward_hooks or '_watch' in vars(m) for m in learn.model.modules())
    torch.save(learn.model, tmp_path/'m')

def test_compressed_attention_of_no_sequences():
    m = nn.MultiheadAttention(8, 2, batch_first=True)
    sparsify_model(m, .5)
    x = torch.randn(0, 5, 8)
    want = m(x, x, x)
    training.compress_params(m, sparse_params(m))
    for need in True,False: assert m(x, x, x, need_weights=need)[0].shape == want[0].shape == (0, 5, 8)

def test_a_depthwise_convolution_cannot_be_insisted_on():
    m = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.LazyLinear(3))
    m(torch.randn(2, 8, 6, 6))
    sparsify_model(m, .9)
    assert 'depthwise' in training.why_not_param(sparse_params(m)[0]) and training.why_not_param(sparse_params(m)[1]) is None
    with pytest.raises(ValueError, match='depthwise'): training.SparseCompute(m, None, True)

# ------------------------------------------------------------------------------------------------ reliability

class Raise(Callback):
    "Raise at the nth time that an event happens."
    def __init__(self, event, n, ex=KeyboardInterrupt, order=50):
        self.order,self.n = order,n
        def f():
            self.n -= 1
            if self.n == 0: raise ex('on purpose')
        setattr(self, event, f)

EVENTS = ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step', 'after_batch', 'after_epoch', 'before_validate']

@pytest.mark.parametrize('method', PRESETS)
@pytest.mark.parametrize('ex', [KeyboardInterrupt, CancelFitException, RuntimeError])
def test_interrupted_anywhere(method, ex, tmp_path):
    for event in EVENTS:
        for n in (1, 2, 4) if 'batch' in event or 'step' in event else (1,):
            for order in (50, 98):
                learn = learner()
                c = counts(learn)
                try: run(learn, 2, dst(method), Raise(event, n, ex, order))
                except (KeyboardInterrupt, RuntimeError): pass
                check(learn, c)
                save_model(tmp_path/'m', learn.model, learn.opt)
                load_sparse_model(tmp_path/'m', mlp())
                run(learn, 1)
                check(learn, c)
                run(learn, 1, dst(method))
                check(learn, c)

@pytest.mark.parametrize('role', ['keep_score_f', 'grow_score_f', 'redistribute_f'])
@pytest.mark.parametrize('ex', [KeyboardInterrupt, RuntimeError('my score')])
def test_interrupted_in_a_users_function(role, ex):
    def f(param, opt): raise ex
    learn = learner()
    c = counts(learn)
    with pytest.raises((KeyboardInterrupt, ValueError)): run(learn, 2, dst(**{role: f}))
    check(learn, c)
    run(learn, 1, dst())
    check(learn, c)

def test_interrupted_in_forward_and_backward():
    class Bomb(torch.autograd.Function):
        at = 0
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g):
            Bomb.at -= 1
            if Bomb.at == 0: raise KeyboardInterrupt
            return g
    for n in range(1, 6):
        learn = learner(lambda: nn.Sequential(*mlp()[:3], type('M', (nn.Module,), dict(forward=lambda s,x: Bomb.apply(x)))(), *mlp()[3:]))
        Bomb.at,c = n,counts(learn)
        with pytest.raises(KeyboardInterrupt): run(learn, 2, dst())
        check(learn, c)
        run(learn, 1, dst())
        check(learn, c)

def test_a_kernel_that_fails_falls_back_to_dense_with_one_warning(monkeypatch):
    learn = run(learner(), 1, dst(keep_kernels=True))
    expect = run(learner(), 1, dst(keep_kernels=True))
    def broken(*a, **k): raise RuntimeError('illegal instruction')
    x = torch.randn(5, 6, requires_grad=True)
    want = expect.model(x)
    for name in 'forward','backward','forward_linked','backward_linked': monkeypatch.setattr(kernels.LinearPlan, name, broken)
    with pytest.warns(UserWarning, match='illegal instruction') as w:
        got = learn.model(x)
        got.sum().backward()
        learn.model(x).sum().backward()
    assert torch.allclose(got, want, atol=1e-5) and len([o for o in w if 'illegal' in str(o.message)]) == 1

ACTIONS = st.lists(st.one_of(
    st.tuples(st.just('fit'), st.sampled_from(list(PRESETS)), st.sampled_from([False, True]), st.booleans()),
    st.tuples(st.just('interrupt'), st.sampled_from(EVENTS), st.integers(1, 4)),
    st.sampled_from([('static',), ('save',), ('load',), ('load', 'no opt'), ('freeze',), ('unfreeze',), ('batch', 5), ('batch', 16), ('eval',), ('kernels',), ('expand',), ('resparsify',)])),
    min_size=2, max_size=7)

@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS)
def test_any_sequence_of_actions_keeps_every_invariant(actions, tmp_path):
    learn = learner(path=tmp_path)
    c = counts(learn)
    with quiet(learn): learn.save('s')
    for a,*args in actions:
        if a == 'fit': run(learn, 1, dst(args[0], args[1], keep_kernels=args[2]))
        elif a == 'static': run(learn, 1)
        elif a == 'kernels': run(learn, 1, SparseKernelsCallback(True, .5, keep_kernels=True))
        elif a == 'interrupt':
            try: run(learn, 1, dst(), Raise(*args))
            except KeyboardInterrupt: pass
        elif a == 'save': learn.save('s')
        elif a == 'load': learn.load('s', with_opt=not args)
        elif a in ('freeze', 'unfreeze'): learn.model[2].weight.requires_grad_(a == 'unfreeze')
        elif a == 'batch': learn.dls = DataLoaders(DataLoader(Items(toy_items(64)), bs=args[0]), learn.dls.valid)
        elif a == 'eval':
            with quiet(learn): learn.get_preds()
        elif a == 'expand' and learn.opt is not None: expand_model(learn.model, learn.opt)
        elif a == 'resparsify' and learn.opt is not None:
            expand_model(learn.model, learn.opt)
            sparsify_model(learn, .85)
        check(learn, c)

# ------------------------------------------------------------------------------------------------ what a fresh pair of eyes found

@pytest.mark.parametrize('cb', [lambda: dst(), lambda: SparseKernelsCallback(True, .5, keep_kernels=True)])
def test_validation_is_no_fit_for_a_callback_that_stays(cb):
    learn = learner(cbs=cb())
    with quiet(learn): learn.validate(), learn.get_preds()
    run(learn, 2)
    report,state = sparse_kernels_report(learn),[param_compressed(p) for p in sparse_params(learn.model)]
    n = len(getattr(learn.cbs[-1], 'updates', []))
    with quiet(learn): learn.validate(), learn.get_preds()
    assert sparse_kernels_report(learn).equals(report) and [param_compressed(p) for p in sparse_params(learn.model)] == state
    assert len(getattr(learn.cbs[-1], 'updates', [])) == n

def test_a_checkpoint_callback_that_stays_does_not_write_for_validation(tmp_path):
    learn = learner(cbs=CheckpointCallback(tmp_path/'c'))
    with quiet(learn): learn.validate()
    assert not (tmp_path/'c').exists()

def test_tied_weights_stay_dense():
    def tied():
        m = nn.Sequential(nn.Linear(6,6), nn.Tanh(), nn.Linear(6,6), nn.Linear(6,3))
        m[2].weight = m[0].weight
        return m
    with pytest.raises(ValueError, match='shared with another module'): run(learner(tied, sparsity=.6), 1, dst())
    learn = run(learner(tied, sparsity=.6), 2, dst(on='auto'))
    check(learn)

def test_a_new_optimizer_over_layers_that_stay_on_the_kernels(tmp_path):
    learn = run(learner(path=tmp_path), 1, dst(keep_kernels=True))
    with quiet(learn): learn.export('e.pkl')
    run(learn, 1, dst(keep_kernels=True))
    learn.create_opt()
    run(learn, 1)
    check(learn)
    learn.save('x')
    learn.load('x')
    check(learn)
    run(learn, 1, dst())

@pytest.mark.parametrize('grow', [lambda p,opt,**kw: p.grad.abs() + p.detach().abs(), lambda p,opt,**kw: p.detach().abs()])
def test_elementwise_scores_see_weights_and_gradients(grow):
    from fastsparse import dense_grad
    f = dense_grad('update', elementwise=True)(grow)
    off,on = [run(learner(), 4, dst(on=on, grow_score_f=f)) for on in (False, True)]
    assert close(off.model.state_dict(), on.model.state_dict(), 1e-3, 1e-5)

@pytest.mark.parametrize('when', ['never', 'update'])
def test_an_elementwise_keep_score_sees_the_gradient_of_active_connections(when):
    from fastsparse import dense_grad
    f = dense_grad(when, elementwise=True)(lambda p,opt: (p*p.grad).abs())
    off,on = [run(learner(), 4, dst(on=on, keep_score_f=f)) for on in (False, True)]
    assert close(off.model.state_dict(), on.model.state_dict(), 1e-3, 1e-5)

@dense_grad('update', elementwise=True)
def signed(p, opt, **kw): return p.grad.detach().clone()

class Dead(nn.Sequential):
    "Outputs that no connection can change: only a bias gets a gradient other than zeros."
    def __init__(self):
        super().__init__(nn.Linear(6,32), nn.ReLU(), nn.Linear(32,24), nn.ReLU(), nn.Linear(24,3))
        nn.init.constant_(self[2].bias, -100.)

@pytest.mark.parametrize('score', [gradient_magnitude, signed])
@pytest.mark.parametrize('acc', [False, True])
def test_gradients_that_are_zero_choose_nothing(acc, score):
    "Positions at the weight's beginning were as good as any."
    for on in False,True:
        learn = learner(Dead)
        before = [p.mask.clone() for p in sparse_params(learn.model)]
        run(learn, 4, cb := dst(on=on, grow_score_f=score), *[GradientAccumulation(16)]*acc)
        assert cb.updates and not any(u['names'] for u in cb.updates)
        assert all(torch.equal(m, p.mask) for m,p in zip(before, sparse_params(learn.model)))

def test_updates_under_cpu_autocast_and_of_layers_called_by_keyword():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(6,32),nn.Linear(32,3)
        def forward(self, x): return self.b(input=self.a(x).tanh())
    class Autocast(Callback):
        def before_batch(self):
            self.ac = torch.autocast('cpu', torch.bfloat16)
            self.ac.__enter__()
        def after_pred(self):
            self.ac.__exit__(None, None, None)
            self.learn.pred = self.pred.float()
    cb = dst()
    check(run(learner(Net), 3, cb, Autocast()))
    assert cb.updates
    auto = learner(Net)
    check(run(auto, 3, dst(on='auto'), Autocast()))
    why = sparse_kernels_report(auto)['why']
    assert why.str.contains('measured').all() and why.str.endswith('in bfloat16').all(), list(why)

def test_a_run_resumed_within_an_epoch_logs_what_the_other_logs(tmp_path):
    through = run(learner(), 3, dst())
    with pytest.raises(KeyboardInterrupt): run(learner(), 3, dst(), CheckpointCallback(tmp_path/'c', 3), Raise('after_batch', 14, order=100))
    resumed = run(learner(seed=4), 3, dst(), ResumeCallback(tmp_path/'c'))
    assert [list(v) for v in resumed.recorder.values] == [list(v) for v in through.recorder.values] and resumed.train_iter == through.train_iter

# ------------------------------------------------------------------------------------------------ updates block by block

def chosen_densely(score, kept, k):
    "The update's rule, by a sort: the best of what is not kept; among equals, what comes first."
    s = score.abs().flatten().masked_fill(kept.flatten(), -1.)
    best = torch.zeros_like(kept).flatten()
    best[s.sort(descending=True, stable=True).indices[:k]] = True
    return best.view(kept.shape)

@pytest.mark.parametrize('native', [True, False])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 9), cols=st.integers(1, 70), step=st.integers(1, 9), density=st.sampled_from([0., .1, .5, 1.]), levels=st.sampled_from([1, 2, 5, 10**6]),
       share=st.sampled_from([0., .1, .5, 1.]), floor=st.sampled_from([None, 0., .3, 1e30]), room=st.sampled_from([0, 2**16]), seed=st.integers(0, 99))
def test_the_best_vacant_positions_block_by_block_are_those_of_a_sort(native, rows, cols, step, density, levels, share, floor, room, seed, monkeypatch):
    monkeypatch.setattr(training, '_LEAST', room)
    if not native: monkeypatch.setattr(kernels, 'kernels_available', lambda: False)
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, cols, generator=g) < density
    score = torch.randint(-levels, levels+1, (rows, cols), generator=g)/levels
    k = int(share*int((~mask).sum()))
    blocks = lambda: ((i, score[i:i+step].clone()) for i in range(0, rows, step))
    pos,val,active = training.best_vacant(blocks, mask, *layers.csr_from_mask(mask), k, floor)
    assert pos.equal(layers.active_index(chosen_densely(score, mask, k))) and val.equal(score.abs().flatten()[pos]) and active.equal(score.abs()[mask])

@pytest.mark.parametrize('native', [True, False])
@pytest.mark.parametrize('bad', [float('inf'), float('-inf'), float('nan')])
@pytest.mark.parametrize('k', [0, 3])
def test_a_score_that_is_not_finite_is_found_anywhere(native, bad, k, monkeypatch):
    if not native: monkeypatch.setattr(kernels, 'kernels_available', lambda: False)
    mask = torch.rand(5, 40) < .5
    for i in range(0, 200, 7):
        score = torch.rand(5, 40)
        score.view(-1)[i] = bad
        assert training.best_vacant(lambda: [(0, score[:3]), (3, score[3:])], mask, *layers.csr_from_mask(mask), k, .9) is None

collects_bf16 = pytest.mark.skipif(not kernels.kernels_available() or not kernels._kernels.collects_bf16(), reason='a path of AVX-512 only')

def drawn_product(seed, batch, rows, cols, density=.02, skew=0.):
    "Factors of a gradient, what is active, the gradient in float64 and a guess of the floor: the score of the k-th best vacant position."
    g = torch.Generator().manual_seed(seed)
    x,dy = torch.randn(batch, cols, generator=g).relu(),torch.randn(batch, rows, generator=g)*torch.logspace(0, -skew, rows)
    mask,exact = torch.rand(rows, cols, generator=g) < density,(dy.double().t() @ x.double()).abs()
    k = int(.004*mask.numel())
    return x, dy, mask, exact, k, float(exact[~mask].sort().values[-k])

@collects_bf16
@settings(max_examples=25, deadline=None)
@given(batch=st.integers(2, 300), rows=st.integers(20, 300), cols=st.integers(20, 300), skew=st.sampled_from([0., .3]), seed=st.integers(0, 10**6))
def test_what_bfloat16_rules_out_is_not_among_the_best(batch, rows, cols, skew, seed):
    "Even if the floor leaves nothing to spare: then a bound that is too small loses some of the k."
    x,dy,mask,exact,k,floor = drawn_product(seed, batch, rows, cols, skew=skew)
    found = training.best_by_bf16(x, dy, mask, *layers.csr_from_mask(mask), k, floor*(1-1e-5))
    if found is None:      # the bound is too wide for this batch
        assert (floor - training._error_bf16(x, dy)).min() < .1*floor or ((dy.t() @ x).abs() > (floor - training._error_bf16(x, dy))[:,None]*.98).float().mean() > .05
        return
    pos,val,active = found
    vacant = exact.masked_fill(mask, -1.).flatten()
    assert len(pos) == k and (pos.diff() > 0).all() and not mask.flatten()[pos].any()
    near = 1e-5*float(exact.max())      # rounding in float32 may swap equals
    assert vacant[pos].min() >= vacant.clone().index_fill_(0, pos, -1.).max() - near
    assert torch.allclose(val.double(), vacant[pos], atol=near) and torch.allclose(active.double(), exact[mask], atol=near)

@collects_bf16
@pytest.mark.parametrize('up', [True, False])
def test_the_bound_holds_where_all_roundings_go_the_same_way(up):
    "Numbers just below or above the middle of two that bfloat16 has, in factors that point the same way: nothing is further off."
    x,dy,mask,*_ = drawn_product(0, 64, 100, 120, density=0.)
    middle = 1 + 2**-8 + (2**-20 if up else -2**-20)
    x[:,7] = dy[:,9] = middle
    x,dy = (t*middle*8/t.norm(dim=0) if up else t for t in (x, dy))      # none longer than these two
    if not up: x,dy = (t*8/t.norm(dim=0)*torch.where(torch.arange(t.shape[1]) == i, middle, 1.) for t,i in ((x,7), (dy,9)))
    exact,rounded = ((a.t() @ b).abs() for a,b in ((dy.double(), x.double()), (dy.bfloat16().double(), x.bfloat16().double())))
    off = (exact-rounded).abs()
    assert off.argmax() == 9*120+7 and .9 < float(off.max()/training._error_bf16(x, dy)[9]) < 1
    pos,*_ = training.best_by_bf16(x, dy, mask, *layers.csr_from_mask(mask), 1, float(exact.max())*(1-1e-6))
    assert pos.tolist() == [9*120+7]

@collects_bf16
def test_when_bfloat16_says_too_little():
    x,dy,mask,exact,k,floor = drawn_product(0, 64, 100, 120)
    best = lambda x=x, dy=dy, floor=floor*.99, k=k: training.best_by_bf16(x, dy, mask, *layers.csr_from_mask(mask), k, floor)
    assert best() is not None
    assert best(floor=floor*1.2) is None                                  # the guess was too high
    assert best(x*1e-12, dy) is None and best(x, dy*1e-30, floor*1e-30) is None      # AMX takes denormals for 0
    loud = x.clone(); loud[:,3] *= 1000
    assert best(loud) is None                                             # one feature drowns the others' bound
    for bad in float('inf'), float('nan'):
        for t in x,dy:
            broken = t.clone(); broken[5,7] = bad
            assert best(*(broken if o is t else o for o in (x, dy))) is None
    assert best(x*1e20, dy*1e19, floor*1e39) is None

@collects_bf16
def test_an_update_by_bfloat16_is_that_without(monkeypatch):
    torch.manual_seed(2)
    x,dy,calls,best = torch.randn(32, 1100),torch.randn(32, 1300),[],training.best_by_bf16
    monkeypatch.setattr(training, 'best_by_bf16', lambda *a: (calls.append(best(*a)), calls[-1])[1])
    res = []
    for on in True,False:
        monkeypatch.setattr(training, '_quick_bf16', lambda isa: on)
        res.append(updated(lambda: nn.Linear(1100, 1300), x, dy, None, .3, .99, True))
    assert len(calls) == 1 and calls[0] is not None
    assert res[0][2] == res[1][2] > 1000 and (res[0][0] != res[1][0]).sum() <= 2      # sums in another order may swap equals
    monkeypatch.setattr(training, '_quick_bf16', lambda isa: True)
    updated(lambda: nn.Linear(1100, 1300), x, dy, None, .3, .99, uses=2)
    updated(lambda: nn.Linear(1100, 1300), x, dy, None, 0., .99)
    updated(lambda: nn.Linear(1100, 1300), x, dy, None, .3, .99, grow=SET_presets['grow_score_f'])
    updated(lambda: nn.Linear(110, 130), x[:,:110], dy[:,:130], None, .3, .99)
    assert len(calls) == 1

@pytest.mark.parametrize('isa', kernels.available_isas())
@pytest.mark.parametrize('n', [0, 1, 31, 32, 33, 70_001])
def test_collecting_what_reaches_a_floor(isa, n):
    old,k,rng = kernels.isa(),kernels._kernels,np.random.default_rng(n)
    g = rng.standard_normal(n).astype(np.float32)
    taken,bits = rng.random(n) < .3,(g.view(np.uint32) >> 16).astype(np.uint16)
    cut = (bits.astype(np.uint32) << 16).view(np.float32)       # bfloat16, towards 0
    kernels.set_isa(isa)
    try:
        for floor in -1., 0., .5, 1.6, 9., float('nan'):
            lowest = floor if floor > 0 else 0.
            pos,val = np.empty(n, np.int32),np.empty(n, np.float32)
            found,finite = k.collect(g, taken, floor, pos, val)
            want = np.flatnonzero((abs(g) >= lowest) & ~taken)
            assert finite and np.array_equal(pos[:found], want) and np.array_equal(val[:found], abs(g[want]))
            if k.collects_bf16():
                found,finite = k.collect(bits, taken, floor, pos, None)
                lower = (np.float32(lowest).view(np.uint32) >> 16 << 16).view(np.float32)
                assert finite and np.array_equal(pos[:found], np.flatnonzero((abs(cut) >= lower) & ~taken))
            else:
                with pytest.raises(ValueError): k.collect(bits, taken, floor, pos, None)
        for bad in [np.inf, -np.inf, np.nan] if n else []:
            g[n//2] = bad
            taken[n//2] = True
            assert not k.collect(g, taken, 3., pos, val)[1]
            if k.collects_bf16(): assert not k.collect((g.view(np.uint32) >> 16).astype(np.uint16), taken, 3., pos, None)[1]
    finally: kernels.set_isa(old)

@pytest.mark.parametrize('native', [True, False])
def test_a_structure_after_an_update(native, monkeypatch):
    if not native: monkeypatch.setattr(kernels, 'kernels_available', lambda: False)
    for seed in range(20):
        torch.manual_seed(seed)
        old = torch.rand(7, 11) < .4
        ptr,idx = layers.csr_from_mask(old)
        kept = torch.rand(len(idx)) < .6
        fresh = layers.active_index((torch.rand(7, 11) < .2) & ~old)
        new,where = old.clone(),torch.full((77,), len(idx))
        new.view(-1)[layers.active_index(old)[~kept]] = False
        new.view(-1)[fresh] = True
        where[layers.active_index(old)] = torch.arange(len(idx))
        p,i,source,dropped = training._regrow(ptr, idx, 11, kept, fresh)
        assert all(a.equal(b) for a,b in zip((p, i), layers.csr_from_mask(new)))
        assert source.long().equal(where[layers.active_index(new)]) and dropped.equal(layers.active_index(old)[~kept])

def test_native_helpers_refuse_what_does_not_fit():
    k,i,n = kernels._kernels,torch.arange(4, dtype=torch.int32).numpy(),torch.tensor
    f,b,room = torch.rand(4).numpy(),torch.zeros(4, dtype=torch.bool).numpy(),i.copy()
    with pytest.raises(ValueError): k.collect(f, b[:3], 0., room, f.copy())
    with pytest.raises(TypeError): k.collect(f.astype('float64'), b, 0., room, f.copy())
    with pytest.raises(TypeError): k.collect(f, b, 0., room, None)
    with pytest.raises(IndexError): k.pick(f.reshape(2, 2), n([0,2,4]).numpy(), i, f.copy())
    with pytest.raises(ValueError): k.pick(f.reshape(2, 2), n([0,5,4]).numpy(), i, f.copy())
    for bad in ([0,1,2,4], [-1,1,2,3], [0,1,3,2], [0,0,2,3]):
        with pytest.raises(IndexError): k.regrow(n([0,2,4]).numpy(), n(bad, dtype=torch.int32).numpy(), 4, b, n([], dtype=torch.int64).numpy())
    for ptr,fresh in (([0,2,3], []), ([0,5,4], []), ([0,2,4], [3,3]), ([0,2,4], [8]), ([0,2,4], [-1])):
        with pytest.raises(ValueError): k.regrow(n(ptr).numpy(), i, 4, b, n(fresh, dtype=torch.int64).numpy())

def updated(model_f, x, dy, step, k, sparsity=.6, compressed=True, native=True, rows=2, grow=RigL_presets['grow_score_f'], uses=1, seed=0):
    "Mask and weight of a layer after one update; integers, so that every way to add up gives the same gradient, with ties."
    torch.manual_seed(seed)
    model = nn.Sequential(model_f())
    sparsify_model(model, sparsity).remove()
    p = sparse_params(model)[0]
    with torch.no_grad(): p.param.copy_((p.param*20).round()*p.mask)
    opt = Adam(list(model.parameters()), lr=.01)
    if compressed: training.compress_params(model, [p], opt)
    u = training.CompressedUpdate(p, opt, k, RigL_presets['keep_score_f'], grow, grow is RigL_presets['grow_score_f'], one_batch=uses == 1) if compressed else None
    for i in range(uses): (model(x+i)*dy).sum().backward()
    torch.manual_seed(7)
    if compressed:
        assert u.ready and u.is_finite()
        u.decide(); u.remove()
        n = u.commit()
        expand_model(model, opt)
    else: n, = topology.set_masks([p], topology.drop_and_grow([p], opt, k, RigL_presets['keep_score_f'], grow), opt)
    return p.mask.clone(), p.param.detach().clone(), n

@pytest.mark.parametrize('rows', [1, 3, 100])
@pytest.mark.parametrize('kind', ['linear', 'conv', 'groups'])
@pytest.mark.parametrize('k', [0., .3, 1.])
@pytest.mark.parametrize('what', ['gradient', 'zeros', 'random', 'twice'])
def test_an_update_block_by_block_is_the_dense_one(rows, kind, k, what, monkeypatch):
    monkeypatch.setattr(training, '_n_block', lambda geom: rows if getattr(geom, 'groups', 1) == 1 else geom.weight_shape[0])
    g = torch.Generator().manual_seed(3)
    def ints(*shape): return torch.randint(-2, 3, shape, generator=g).float()
    model_f = dict(linear=lambda: nn.Linear(12, 9), conv=lambda: nn.Conv2d(3, 8, 3, padding=1), groups=lambda: nn.Conv2d(4, 8, 3, padding=1, groups=2))[kind]
    x,dy = (ints(4, 12), ints(4, 9)) if kind == 'linear' else (ints(2, 3 if kind == 'conv' else 4, 5, 5), ints(2, 8, 5, 5))
    if what == 'zeros': dy[:,1:] = 0
    kw = dict(grow=SET_presets['grow_score_f']) if what == 'random' else dict(uses=2) if what == 'twice' else {}
    dense,*blocks = [updated(model_f, x, dy, rows, k, compressed=c, **kw) for c in (False, True)]
    assert dense[2] == blocks[0][2] and all(a.equal(b) for a,b in zip(dense[:2], blocks[0][:2]))

def test_a_wide_layer_is_updated_alike_from_a_sampled_floor():
    "Large enough for a grid, blocks and a cut; ties and rows without any gradient among them."
    torch.manual_seed(2)
    x,dy = torch.randint(-3, 4, (16, 1100)).float(),torch.randint(-3, 4, (16, 1300)).float()
    dy[:,::3] = 0
    for sparsity in (.95, .7):
        a,b = [updated(lambda: nn.Linear(1100, 1300), x, dy, None, .3, sparsity, c) for c in (False, True)]
        assert a[2] == b[2] and a[0].equal(b[0]) and a[1].equal(b[1])

@pytest.mark.parametrize('same', [True, False])
def test_attention_is_updated_as_it_is_stored(same):
    res = []
    for compressed in (False, True):
        torch.manual_seed(0)
        m = nn.MultiheadAttention(8, 2, batch_first=True)
        sparsify_model(m, .6).remove()
        ps,opt = sparse_params(m),SGD(list(m.parameters()), lr=.01)
        if compressed: training.compress_params(m, ps, opt)
        ups = [training.CompressedUpdate(p, opt, .3, RigL_presets['keep_score_f'], RigL_presets['grow_score_f'], True) for p in ps] if compressed else []
        q,kv = torch.randn(2, 3, 8),torch.randn(2, 5, 8)
        y = m(q, q, q)[0] if same else m(q, kv, kv+1)[0]
        y.square().sum().backward()
        if compressed:
            assert all(u.ready and u.is_finite() for u in ups)
            for u in ups: u.decide(); u.remove(); u.commit()
            assert all(param_compressed(p) for p in ps)
            again = m(q, q, q)[0] if same else m(q, kv, kv+1)[0]
            expand_model(m, opt)
            assert type(m) is nn.MultiheadAttention and '_watch' not in vars(m)
        else:
            topology.set_masks(ps, topology.drop_and_grow(ps, opt, .3, RigL_presets['keep_score_f'], RigL_presets['grow_score_f']), opt)
            again = m(q, q, q)[0] if same else m(q, kv, kv+1)[0]
        res.append(([p.mask.clone() for p in ps], again))
    assert all(a.equal(b) for a,b in zip(res[0][0], res[1][0])) and torch.allclose(res[0][1], res[1][1], atol=1e-5)

@pytest.mark.parametrize('tokens,batch_first,batched', [(64, True, True), (100, False, True), (256, True, True), (70, True, False)])
def test_short_self_attention_is_pytorchs(tokens, batch_first, batched, monkeypatch):
    torch.manual_seed(0)
    m = nn.MultiheadAttention(24, 3, batch_first=batch_first)
    sparsify_model(m, .6)
    x = torch.randn(tokens, 24) if not batched else torch.randn(2, tokens, 24) if batch_first else torch.randn(tokens, 2, 24)
    dy,calls,apply = torch.randn(x.shape),[],training.AttentionFunction.apply
    monkeypatch.setattr(training.AttentionFunction, 'apply', lambda *a: (calls.append(1), apply(*a))[1])
    def results(m, **kw):
        t = x.clone().requires_grad_()
        y = m(t, t, t, need_weights=False, **kw)[0]
        y.backward(dy)
        grads = [p.param.grad[p.mask] if p.param.grad.shape == p.mask.shape else p.param.grad for p in sparse_params(m)] + [m.in_proj_bias.grad, m.out_proj.bias.grad]
        m.zero_grad(set_to_none=True)
        return [y.detach(), t.grad, *grads]
    want = results(m)
    assert not calls
    training.compress_params(m, sparse_params(m))
    for a,b in zip(results(m), want): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(calls) == 1
    with torch.no_grad(): torch.testing.assert_close(m(x, x, x, need_weights=False)[0], want[0], rtol=1e-4, atol=1e-5)
    assert len(calls) == 2
    y = m(t := x.clone().requires_grad_(), t, t, need_weights=False)[0]
    with pytest.raises(RuntimeError, match='once_differentiable'): torch.autograd.grad(y.sum(), t, create_graph=True)[0].sum().backward()

def twice(f, *inputs):
    "Every gradient of `f`'s sum, differentiated again by every input, is an error rather than zeros."
    for a in inputs:
        for b in inputs:
            g, = torch.autograd.grad(f().sum(), a, create_graph=True)
            with pytest.raises(RuntimeError, match='twice'): torch.autograd.grad(g.sum(), b, allow_unused=True)

def test_no_node_gives_zeros_for_second_derivatives():
    torch.manual_seed(0)
    leaf = lambda *shape: torch.randn(*shape, requires_grad=True)
    sparse,x = layers.SparseLinear(7, 5, sparsity=.6),leaf(7, 3)
    twice(lambda: sparse(x.t()), x, sparse.weight)
    conv,x2 = layers.SparseConv2d(2, 3, 3, sparsity=.5),leaf(2, 5, 5, 2)
    twice(lambda: conv(x2.permute(0, 3, 1, 2)), x2, conv.weight)
    dense,x = nn.Linear(7, 5),leaf(3, 7)
    sparsify_model(dense, .6).remove()
    training.set_dense_grad(dense, True)
    twice(lambda: dense(x), x, dense.weight)
    for batch,f in ((2, 5), (3, 300)):      # layer by layer or tile by tile, what is between kept or not
        row = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
        sparsify_model(row, .8).remove()
        for l in row[::2]: layers.compress(l)
        row.__class__,x = links.KernelSequential,leaf(batch, f, 20)
        twice(lambda: row(x), x, row[0].weight, row[2].weight)
        x = leaf(20, batch*f)
        twice(lambda: row(x.t()), x, row[0].weight, row[2].weight)
    m,x = nn.MultiheadAttention(24, 3, batch_first=True),leaf(2, 80, 24)
    sparsify_model(m, .6)
    training.compress_params(m, sparse_params(m))
    twice(lambda: m(x, x, x, need_weights=False)[0], x, m.in_proj_weight)

def test_other_attention_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(training.AttentionFunction, 'apply', lambda *a: 1/0)
    torch.manual_seed(0)
    m = nn.MultiheadAttention(24, 3, batch_first=True)
    sparsify_model(m, .6)
    x = torch.randn(2, 80, 24)
    for kw in dict(), dict(need_weights=False, key_padding_mask=torch.zeros(2, 80, dtype=torch.bool)), dict(need_weights=False, attn_mask=torch.zeros(80, 80)):
        want = m(x, x, x, **kw)[0]
        training.compress_params(m, sparse_params(m))
        torch.testing.assert_close(m(x, x, x, **kw)[0], want, rtol=1e-4, atol=1e-5)
        expand_model(m)
    training.compress_params(m, sparse_params(m))
    plain = dict(need_weights=False)
    m(x, x+1, x, **plain); m(x[:,:60], x[:,:60], x[:,:60], **plain); m(*[torch.randn(1, 300, 24)]*3, **plain)
    t = x[:,:63]; m(t, t, t, **plain)
    with torch.autocast('cpu', torch.bfloat16): m(x, x, x, **plain)
    torch.compile(m, backend='eager')(x, x, x, **plain)
    m.double()(*[x.double()]*3, **plain); m.float()
    m.dropout = .5; m(x, x, x, **plain)
    with pytest.raises(ZeroDivisionError): m.eval()(x, x, x, **plain)
    monkeypatch.setattr(training, '_most_scores', 2*3*80*80-1)
    m(x, x, x, **plain)

def test_short_attention_of_a_subclass_of_tensor():
    torch.manual_seed(0)
    m = nn.MultiheadAttention(24, 3, batch_first=True)
    sparsify_model(m, .6)
    training.compress_params(m, sparse_params(m))
    x,res = torch.randn(2, 80, 24),[]
    for t in TensorBase(x.clone()),x.clone():
        y = m(t.requires_grad_(), t, t, need_weights=False)[0]
        y.square().sum().backward()
        res.append((y, t.grad, *[p.grad.clone() for p in m.parameters()]))
        m.zero_grad()
    assert type(res[0][0]) is TensorBase
    for a,b in zip(*res): assert torch.equal(a.as_subclass(torch.Tensor), b)

def test_ever_active_is_kept_in_bits_and_older_checkpoints_load():
    cb = dst(every=2)
    learn = learner(cbs=None)
    class Look(Callback):
        def before_fit(self): self.seen = {p.name: p.mask.clone() for p in sparse_params(self.learn.model)}
        def after_batch(self):
            for p in sparse_params(self.learn.model): self.seen[p.name] |= p.mask
        def after_fit(self): self.packed,self.bools = cb.state_dict(),cb.ever_active
    look = Look()
    run(learn, 3, cb, look)
    assert cb.updates and all(v.equal(look.seen[k]) for k,v in look.bools.items()) and look.bools.keys() == look.seen.keys()
    assert all(v.dtype is torch.uint8 and len(v) == -(-look.seen[k].numel()//8) for k,v in look.packed['ever_active'].items())
    for sd in (look.packed, {**look.packed, 'ever_active': look.bools}):
        cb.seen = {}
        cb.learn = learn
        cb.load_state_dict({**sd, 'kernels': {}})
        assert all(v.equal(look.seen[k]) for k,v in cb.ever_active.items()) and cb.ever_active.keys() == look.seen.keys()

@pytest.mark.parametrize('preset', PRESETS)
def test_channels_last_models_are_updated_on_the_kernels(preset):
    def run(fmt):
        learn = learner(Conv)
        learn.model.to(memory_format=fmt)
        with quiet(learn): learn.fit(1, cbs=DynamicSparseTrainingCallback(**{**PRESETS[preset], 'batches_per_update': 3}, sparse_kernels=True, sparsity_threshold=.5))
        return [p.mask for p in sparse_params(learn.model)]
    for a,b in zip(run(torch.contiguous_format), run(torch.channels_last)): assert torch.equal(a, b)

@pytest.mark.parametrize('every', [3, 4])
@pytest.mark.parametrize('names', [('SNFS', 'RigL'), ('RigL', 'SNFS'), ('SNFS', 'SNFS'), ('SNFS', None), ('RigL', 'own'), ('own', 'SET'), ('SNFS', 'own'), ('own', None)], ids=str)
def test_beside_another_callback_that_switches_kernels(names, every):
    presets = dict(PRESETS, own=dict(RigL_presets, grow_score_f=lambda p,opt: p.grad.abs()))      # looks at whole layers
    def run(kernels):
        learn = learner()
        parts = [learn.model[0], learn.model[2]]
        cbs = [DynamicSparseTrainingCallback(**{**presets[n], 'batches_per_update': every if i else 3}, sparse_modules=parts[i], sparse_kernels=kernels, sparsity_threshold=.5) if n else SparseKernelsCallback(kernels, .5)
               for i,n in enumerate(names) if n or kernels]
        torch.manual_seed(5)
        with quiet(learn): learn.fit(2, cbs=cbs)
        assert all(cb.updates for cb in cbs if hasattr(cb, 'updates'))
        return learn.model.state_dict()
    a,b = run(False),run(True)
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-5, msg=k)

@pytest.mark.parametrize('names', [('RigL', 'own', 'kernels'), ('kernels', 'RigL', 'own'), ('RigL', 'own'), ('own', 'RigL')], ids=str)
def test_layers_that_another_callback_puts_on_the_kernels(names):
    "After an update by whole layers, the next by what is stored: in whichever order callbacks are asked, and though only the last wants kernels."
    learn = learner()
    def make(n):
        if n == 'kernels': return SparseKernelsCallback(True, .5)
        return dst('RigL', n == names[-1], **dict(RigL=dict(sparse_modules=learn.model[0]), own=dict(every=4, sparse_modules=learn.model[2], grow_score_f=lambda p,opt: p.grad.abs()))[n])
    cbs = {n: make(n) for n in names}
    run(learn, 2, *cbs.values())
    check(learn)
    assert [u['step'] for u in cbs['RigL'].updates] == [3, 6, 9]

@pytest.mark.parametrize('event', ['before_batch', 'after_loss', 'after_batch'])
@pytest.mark.parametrize('one,other', [('SNFS', 'RigL'), ('SNFS', 'SET'), ('RigL', 'SNFS'), ('RigL', None)])
def test_a_callback_is_taken_out_of_a_fit(one, other, event):
    learn = learner()
    cbs = [dst(n, sparse_modules=learn.model[2*i]) for i,n in enumerate((one, other)) if n]
    class TakeOut(Callback):
        def take_out(self):
            if self.training and self.learn.train_iter == 4: self.learn.remove_cb(cbs[0])
    setattr(TakeOut, event, TakeOut.take_out)
    run(learn, 2, *cbs, TakeOut())
    check(learn)
    assert len(cbs) == 1 or len(cbs[1].updates) > 2

def test_an_update_does_not_look_at_whole_layers_because_the_next_step_of_another_callback_does():
    "`own` moves at step 4, the others at step 3."
    def run(kernels):
        learn = learner(lambda: nn.Sequential(nn.Linear(6,32), nn.Tanh(), nn.Linear(32,24), nn.Tanh(), nn.Linear(24,24), nn.Tanh(), nn.Linear(24,3)))
        own,SET,RigL = (dst(m, kernels, every, sparse_modules=learn.model[2*i], **kw) for i,(m,every,kw) in
                        enumerate([('RigL', 4, dict(grow_score_f=lambda p,opt: p.grad.abs())), ('SET', 3, {}), ('RigL', 3, {})]))
        torch.manual_seed(5)
        with quiet(learn): learn.fit(2, cbs=[own, SET, RigL])
        assert RigL.updates[0]['step'] == 3 and own.updates[0]['step'] == 4
        return learn.model.state_dict()
    assert close(run(False), run(True))

def test_measuring_a_layer_takes_no_random_numbers_from_training():
    p,before = sparse_params(learner().model)[1],torch.get_rng_state()
    for dense in (False, True): training._measure(p.module, p.mask, (8, 32), True, dense, '')
    assert torch.equal(before, torch.get_rng_state())
