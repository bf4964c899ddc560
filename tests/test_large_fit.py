"Layers born sparse in fastai's loop, through `DynamicSparseTrainingCallback`."
from functools import partial
import pytest, torch
from torch import nn
from fastai.basics import Adam, Callback, CancelStepException, SGD, ranger
from fastai.callback.training import GradientAccumulation, GradientClip
from fastsparse.callback import DynamicSparseTrainingCallback, EverActive, RigL_presets, SET_presets, SNFS_presets, SparseKernelsCallback, Sparsity
from fastsparse.checkpoint import CheckpointCallback, ResumeCallback
from fastsparse.large import large_layers
from fastsparse.layers import SparseLinear
from fastsparse.score import momentum_redistribution
from fastsparse.topology import add_mask_hooks, sparse_params, sparsify_model
from conftest import fit, masks, same, toy_learner, toy_net
from test_large import assert_sound, net, snapshot, twin


def learner(opt_func=partial(SGD, mom=.9), model=None, dls=None, **kw):
    return toy_learner(None, opt_func, model if model is not None else net((6,20,16,3)), dls, **kw)

def dst(presets=RigL_presets, **kw): return DynamicSparseTrainingCallback(**presets, **{'batches_per_update':2, **kw})

@pytest.mark.parametrize('presets', [RigL_presets, SET_presets])
@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9), Adam, ranger])
def test_a_fit_moves_connections(presets, opt_func):
    learn = learner(opt_func)
    n,cb = [p.n_active for p in large_layers(learn.model)],dst(presets)
    fit(learn, 3, cbs=cb)
    assert cb.updates and all(sum(u['grown']) for u in cb.updates[:3])
    for u in cb.updates: assert u['before'] == u['after'] == n and u['names'] == ['0.weight','2.weight','4.weight']
    assert_sound(learn.model, learn.opt, sum(n))
    for p in large_layers(learn.model): assert not p.module._forward_hooks and not p.param._backward_hooks

class Skip(Callback):
    "Skips the step of one batch, as a guard against NaN would."
    order = 90
    def before_step(self):
        if self.learn.train_iter == 2: raise CancelStepException

@pytest.mark.parametrize('cbs', [[], [lambda: GradientAccumulation(16)], [lambda: GradientClip(.1)], [Skip]])
@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9), Adam])
def test_a_fit_with_all_candidates_is_the_masked_fit(cbs, opt_func):
    a,b = learner(opt_func),learner(opt_func)
    b.model = twin(b.model)
    b.create_opt()
    add_mask_hooks(b.model)
    for l in (a,b): fit(l, 4, cbs=[dst(candidates=float('inf'), sparse_kernels=False), *[f() for f in cbs]])
    for p,q in zip(large_layers(a.model), sparse_params(b.model)):
        assert p.module.mask.equal(q.mask)
        assert torch.allclose(p.module.dense_weight(), q.param, rtol=1e-3, atol=1e-5)

def test_gradients_that_are_zero_choose_nothing():
    learn = learner(loss_func=lambda y, t: 0*y.sum())
    before,cb = [p.index.clone() for p in large_layers(learn.model)],dst()
    fit(learn, 2, cbs=cb)
    assert cb.updates and all(torch.equal(i, p.index) for i,p in zip(before, large_layers(learn.model)))

def test_the_gradient_of_a_skipped_step_moves_nothing():
    "On the kernels as without them, a late update goes by the batch that it sees."
    def run(on):
        learn = toy_learner(.9, model=toy_net(sizes=(6,64,64,3)))
        cb = dst(sparse_kernels=on)
        fit(learn, 2, cbs=[Skip(), cb])
        return [u['step'] for u in cb.updates],masks(learn.model)
    (a,want),(b,got) = run(False),run(True)
    assert a == b and len(a) > 2 and same(want, got)

class Sometimes(nn.Module):
    "Every other batch skips a layer."
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c,self.i = SparseLinear(6, 20, sparsity=.7),SparseLinear(20, 20, sparsity=.7),nn.Linear(20, 3),0
    def forward(self, x):
        self.i += self.training
        x = self.a(x).tanh()
        return self.c(x + self.b(x) if self.i%2 else x)

@pytest.mark.parametrize('presets', [RigL_presets, SET_presets])
def test_a_layer_that_the_batch_of_an_update_does_not_reach(presets):
    torch.manual_seed(0)
    learn,cb = learner(Adam, model=Sometimes()),dst(presets, batches_per_update=3)
    n = [p.n_active for p in large_layers(learn.model)]
    fit(learn, 3, cbs=cb)
    assert_sound(learn.model, learn.opt, sum(n))
    assert {'a.weight'} < {name for u in cb.updates for name in u['names']}

def test_a_fit_with_masked_layers_beside():
    torch.manual_seed(0)
    model = nn.Sequential(SparseLinear(6, 20, sparsity=.7), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3))
    sparsify_model(model, .6)
    learn,cb = learner(model=model),dst()
    fit(learn, 3, cbs=cb)
    assert cb.updates[0]['names'] == ['2.weight', '4.weight', '0.weight'] and all(u['before']==u['after'] for u in cb.updates)

def test_snfs_is_refused_before_anything_moves():
    with pytest.raises(ValueError, match='0.weight was born sparse'): fit(learner(), cbs=dst(SNFS_presets))

class Tied(nn.Module):
    "Two layers born sparse with one weight."
    def __init__(self):
        super().__init__()
        self.a,self.b = SparseLinear(6, 6, sparsity=.5),SparseLinear(6, 6, sparsity=.5)
        self.b.weight,self.b.indptr,self.b.indices = self.a.weight,self.a.indptr,self.a.indices
    def forward(self, x): return self.b(self.a(x).tanh())[:,:3]

def test_a_shared_weight_is_refused_before_anything_is_trained():
    "It was at the first update."
    learn = learner(model=Tied())
    before = snapshot(learn.model)
    with pytest.raises(ValueError, match="shared by several sparse layers can't move"): fit(learn, 2, cbs=dst())
    assert before == snapshot(learn.model)
    learn.model.a.weight.requires_grad_(False)
    fit(learn, 1, cbs=dst())

def test_layers_born_sparse_need_no_callback_for_kernels():
    with pytest.raises(ValueError, match='Layers born sparse are on the kernels by themselves'): fit(learner(), 1, cbs=SparseKernelsCallback())

def test_only_chosen_modules_move_in_a_fit():
    learn = learner()
    before = [p.index for p in large_layers(learn.model)]
    fit(learn, 2, cbs=dst(sparse_modules=learn.model[2]))
    assert [p.index.equal(i) for p,i in zip(large_layers(learn.model), before)] == [True, False, True]

def test_a_fit_interrupted_anywhere_stays_sound():
    for when in ('after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_batch'):
        def stop(self):
            if self.learn.epoch == 1 and self.learn.iter == 2 and self.learn.training: raise KeyboardInterrupt
        Stop = type('Stop', (Callback,), {'order': 50, when: stop})
        learn = learner()
        n = sum(p.n_active for p in large_layers(learn.model))
        with pytest.raises(KeyboardInterrupt): fit(learn, 2, cbs=[dst(), Stop()])
        assert_sound(learn.model, learn.opt, n)
        fit(learn, 2, cbs=dst())
        assert_sound(learn.model, learn.opt, n)

def test_the_sparsity_metric_counts_layers_born_sparse():
    learn = learner(metrics=Sparsity())
    fit(learn, 1, cbs=dst())
    assert abs(learn.recorder.values[-1][-1]-.8) < .01

@pytest.mark.parametrize('presets', [RigL_presets, SET_presets])
def test_the_share_that_was_ever_active_counts_layers_born_sparse(presets, tmp_path):
    "As positions, where a masked layer has bits; without the metric nothing is kept."
    seen = []
    class Look(Callback):
        order = 200
        def before_fit(self): seen.append([set(p.index.tolist()) for p in large_layers(self.learn.model)])
        def after_batch(self):
            for s,p in zip(seen[-1], large_layers(self.learn.model)): s.update(p.index.tolist())
    def run(*cbs):
        learn = learner(metrics=EverActive(), model=nn.Sequential(SparseLinear(6, 40, sparsity=.9), nn.Tanh(), nn.Linear(40, 20), nn.Tanh(), SparseLinear(20, 3, sparsity=.8)))
        fit(learn, 3, cbs=[dst(presets), *cbs])
        return learn.recorder.values[-1][-1]
    share = run(Look())
    assert share == (sum(map(len, seen[0])) + 800)/(240+800+60) < .95
    class Stop(Callback):
        order = 200
        def after_batch(self):
            if self.learn.training and self.learn.train_iter == 12: raise KeyboardInterrupt
    torch.manual_seed(0)
    whole = run()
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt): run(CheckpointCallback(tmp_path/'c', every_batches=3), Stop())
    assert run(ResumeCallback(tmp_path/'c')) == whole
    learn,cb = learner(),dst(presets)
    fit(learn, 1, cbs=cb)
    assert not cb.seen

def test_a_gradient_that_is_not_finite_postpones_the_update():
    class Bad(Callback):
        order = 90
        def before_step(self):
            if self.learn.iter == 4 and self.learn.epoch == 0: self.learn.model[0].weight.grad[0] = float('nan')
    learn,cb = learner(),dst(batches_per_update=4)
    fit(learn, 2, cbs=[cb, Bad()])
    assert cb.updates[0]['step'] == 5

def test_learn_save_and_load_midway(tmp_path):
    learn = learner(path=tmp_path)
    fit(learn, 1, cbs=dst())
    learn.save('m')
    other = learner(path=tmp_path)
    other.create_opt()
    other.load('m', with_opt=True)
    assert snapshot(learn.model, learn.opt) == snapshot(other.model, other.opt)
    for l in (learn, other):
        torch.manual_seed(3)
        fit(l, 1, cbs=dst())
    assert snapshot(learn.model, learn.opt) == snapshot(other.model, other.opt)

@pytest.mark.parametrize('presets', [RigL_presets, SET_presets])
@pytest.mark.parametrize('redist', [False, True])
def test_a_run_resumes_bit_for_bit(tmp_path, presets, redist):
    kw = dict(redistribute_f=momentum_redistribution) if redist else {}
    def run(seed, *cbs, n=4):
        learn = learner(path=tmp_path, model=net((6,20,16,3), seed=seed))
        torch.manual_seed(4)
        fit(learn, n, cbs=[dst({**presets, **kw}), *cbs])
        return learn
    whole = run(0)
    class Stop(Callback):
        order = 200
        def after_batch(self):
            if self.learn.training and self.learn.epoch == 2 and self.learn.iter == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run(0, CheckpointCallback(tmp_path/'c', every_batches=3), Stop())
    resumed = run(7, ResumeCallback(tmp_path/'c'))
    assert snapshot(whole.model, whole.opt) == snapshot(resumed.model, resumed.opt)
