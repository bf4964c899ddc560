"fastai's optimizer steps in one pass: the same numbers, the same state, and only where and while they are meant to be."
import copy, io, pickle
from functools import partial
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.basics import Adam, Callback, CancelFitException, OptimWrapper, RAdam, RMSProp, SGD, Lamb, Larc, QHAdam, ranger
from fastai.torch_core import TensorBase
from fastai.optimizer import Lookahead, Optimizer, average_grad, average_sqr_grad, adam_step, l2_reg, momentum_step, sgd_step, step_stat, weight_decay
from fastsparse import (CheckpointCallback, DynamicSparseTrainingCallback, ResumeCallback, RigL_presets, SET_presets, SNFS_presets, SparseKernelsCallback, kernels, sparse_kernels_report,
                        sparse_params)
from fastsparse.score import opt_slots
from fastsparse.steps import FusedOptimizer, chain_of, fuse_steps, plain_steps, why_not_fused
from conftest import quiet, toy_learner

pytestmark = pytest.mark.usefixtures('one_thread')
needs_kernels = pytest.mark.skipif(not kernels.kernels_available(), reason=kernels.why_not())
OPTS = {f'{k}_{d}': partial(f, lr=.1, wd=.1, decouple_wd=d == 'decoupled') for k,f in dict(adam=Adam, momentum=partial(SGD, mom=.9), sgd=SGD).items() for d in ('decoupled','l2')}
each_opt = pytest.mark.parametrize('opt_func', OPTS.values(), ids=OPTS)

def make(shapes=((5,4),(5,),(3,5),(3,)), dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]

def give_grads(opt, i, without=()):
    g = torch.Generator().manual_seed(1000+i)
    for j,(p,*_) in enumerate(opt.all_params()):
        t = torch.randn(p.shape, generator=g)
        p.grad = None if j in without else torch.empty_like(p).copy_(t)

def take(opt, n=5, start=0):
    for i in range(start, start+n):
        give_grads(opt, i)
        opt.step()

def state_of(opt): return [dict(s, param=p.data) for p,_,s,_ in opt.all_params()]

def assert_close(a, b, tol=2e-6):
    "Parameters and state agree, key by key; tensors relative to their largest entry."
    for s,t in zip(state_of(a), state_of(b), strict=True):
        assert list(s) == list(t)
        for k in s:
            assert type(s[k]) is type(t[k])
            if not isinstance(s[k], torch.Tensor): assert s[k] == t[k], k
            elif s[k].numel(): assert s[k].shape == t[k].shape and (s[k]-t[k]).abs().max() <= tol*max(1, t[k].abs().max()), k

def assert_equal(a, b): assert_close(a, b, 0)

@pytest.fixture
def all_fused(monkeypatch):
    "No parameter takes fastai's step."
    def fail(*args): raise AssertionError('not fused')
    monkeypatch.setattr(FusedOptimizer, '_fastai_step', fail)
    monkeypatch.setattr(Optimizer, 'step', fail)

# ------------------------------------------------------------------------------------------------ the same numbers

hypers = st.fixed_dictionaries({k: st.sampled_from(v) for k,v in dict(lr=(.1,.003,0,1.), mom=(.9,.5,.99,0.), sqr_mom=(.99,.8,.999,0.), eps=(1e-5,.1), wd=(.1,.01,.3,0)).items()})

@each_opt
@settings(deadline=None, max_examples=40)
@given(shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=5), n_groups=st.integers(1, 3),
       steps=st.lists(st.tuples(st.booleans(), st.lists(hypers, min_size=3, max_size=3), st.sets(st.integers(0, 4), max_size=2)), min_size=1, max_size=8),
       no_wd=st.sets(st.integers(0, 4)), seed=st.integers(0, 99))
def test_any_run_is_fastais(opt_func, shapes, n_groups, steps, no_wd, seed):
    "Hypers of each group at each step, parameters without gradient or decay, and changes between both ways at any step."
    opts = []
    for _ in range(2):
        ps = make(shapes, seed=seed)
        opts.append(opt_func([g for i in range(n_groups) if (g := ps[i::n_groups])]))
        for i,(p,_,s,_) in enumerate(opts[-1].all_params()):
            if i in no_wd: s['do_wd'] = False
    plain,ours = opts
    for i,(fuse,hs,without) in enumerate(steps):
        if fuse: assert fuse_steps(ours)
        else: plain_steps(ours)
        for opt in opts:
            give_grads(opt, i, without)
            for h,new in zip(opt.hypers, hs): h.update({k: v for k,v in new.items() if k in h})
            opt.step()
    assert_close(ours, plain, 1e-5)

@each_opt
def test_every_parameter_is_fused(opt_func, all_fused):
    opt = opt_func(make())
    assert fuse_steps(opt)
    take(opt)

@each_opt
@pytest.mark.parametrize('n', [1, 30])
def test_state_is_fastais_from_the_first_step_on(opt_func, n):
    plain,ours = opt_func(make()),opt_func(make())
    fuse_steps(ours)
    take(plain, n), take(ours, n)
    assert_close(ours, plain)

def test_it_really_steps_from_the_second_moment():
    "A sanity check of the comparison itself: another eps, or one step too many, is seen."
    a,b,c = Adam(make(), lr=.1),Adam(make(), lr=.1, eps=1e-4),Adam(make(), lr=.1)
    for o in (a,b,c): fuse_steps(o)
    take(a), take(b), take(c, 6)
    for o in (b,c):
        with pytest.raises(AssertionError): assert_close(o, a)

@each_opt
def test_one_call_for_groups_of_the_same_hypers(opt_func, monkeypatch):
    from fastsparse import steps
    calls = []
    monkeypatch.setattr(steps, 'chains', [c._replace(run=lambda w,*args,run=c.run: (calls.append(len(w)), run(w, *args))) for c in steps.chains])
    ps = make()
    opt = opt_func([ps[:1], ps[1:2], ps[2:]])
    fuse_steps(opt)
    take(opt, 1)
    assert calls == [4]
    opt.set_hyper('lr', [.1, .2, .1])
    opt.state[ps[3]]['do_wd'] = False
    take(opt, 1)
    assert calls == [4, 2, 1, 1]

@each_opt
def test_weights_change_unseen_by_autograd_and_gradients_not_at_all(opt_func):
    ps = make()
    opt = opt_func(ps)
    fuse_steps(opt)
    give_grads(opt, 0)
    before,grads = [p._version for p in ps],[p.grad.clone() for p in ps]
    opt.step()
    assert [p._version for p in ps] == before and all(p.grad.equal(g) for p,g in zip(ps, grads))

@each_opt
def test_a_gradient_with_a_graph(opt_func):
    ps = make(((3,),))
    opt = opt_func(ps)
    fuse_steps(opt)
    for _ in range(2):
        ps[0].grad, = torch.autograd.grad((ps[0]**3).sum(), ps, create_graph=True)
        opt.step()
    assert ps[0].grad.requires_grad and ps[0].is_leaf and not any(t.requires_grad for t in opt_slots(opt, ps[0]).values())

# ------------------------------------------------------------------------------------------------ what the fused step can't have

def odd(kind):
    p, = make(((4,3,3,3),))
    if kind == 'channels_last': return nn.Parameter(p.data.to(memory_format=torch.channels_last))
    if kind == 'float64': return nn.Parameter(p.data.double())
    if kind == 'bfloat16': return nn.Parameter(p.data.bfloat16())
    if kind == 'transposed': return nn.Parameter(p.data.transpose(0, 1))
    return nn.Parameter(TensorBase(p.data))

@each_opt
@pytest.mark.parametrize('kind', ['channels_last', 'float64', 'bfloat16', 'transposed', 'subclass'])
def test_odd_parameters_step_as_ever_beside_the_others(opt_func, kind):
    opts = [opt_func([odd(kind), *make()]) for _ in range(2)]
    assert fuse_steps(opts[1])
    for o in opts: take(o)
    (p,*_),(q,*_) = [o.param_lists[0] for o in opts]
    assert p.equal(q) and all(t.equal(opts[0].state[p][k]) and t.stride() == p.stride() for k,t in opt_slots(opts[1], q).items())
    assert_close(*opts)

@each_opt
@pytest.mark.parametrize('kind', ['transposed', 'sparse', 'expanded'])
def test_odd_gradients_step_as_ever(opt_func, kind):
    opts = [opt_func(make(((6,5),(7,)))) for _ in range(2)]
    assert fuse_steps(opts[1])
    if kind == 'sparse' and (chain_of(opts[0].cbs)[0].slots or l2_reg in opts[0].cbs): return      # fastai can't either
    for i in range(3):
        for opt in opts:
            give_grads(opt, i)
            p = opt.param_lists[0][0]
            p.grad = p.grad.t().contiguous().t() if kind == 'transposed' else p.grad.to_sparse() if kind == 'sparse' else torch.full((), .5+i).expand(6, 5)
            if kind == 'expanded' and l2_reg in opt.cbs: p.grad = p.grad.clone()
            opt.step()
    assert_close(*opts)

@pytest.mark.parametrize('key', ['grad_avg', 'sqr_avg'])
@pytest.mark.parametrize('slot', [lambda t: t[:2].clone(), lambda t: t.double(), lambda t: t.t().contiguous().t(), lambda t: t.view(-1).clone()])
def test_slots_that_do_not_fit_meet_fastai(key, slot):
    "Memory outside of a slot is never touched: what fastai makes of it, error or not, is what happens."
    res = []
    for fuse in (False, True):
        opt = Adam(make(((6,5),)), lr=.1)
        take(opt)
        s, = opt.state.values()
        s[key] = slot(s[key])
        if fuse: fuse_steps(opt)
        try: take(opt)
        except RuntimeError as e: res.append(str(e))
        else: res.append(opt)
    assert_equal(*res) if isinstance(res[0], Optimizer) else None
    assert isinstance(res[0], Optimizer) or res[0] == res[1]

@pytest.mark.parametrize('hyper', [dict(dampening=True), dict(do_wd=False), dict(mom=0.), dict(mom=-.1), dict(mom=1.5)])
@pytest.mark.parametrize('name', ['momentum_decoupled', 'adam_l2'])
def test_hypers_that_a_fused_step_does_not_know_meet_fastai(name, hyper):
    opts = [OPTS[name](make()) for _ in range(2)]
    fuse_steps(opts[1])
    for o in opts:
        take(o, 2)
        for h in o.hypers: h.update(hyper)
        take(o, 3)
    assert_close(*opts)
    for o in opts: del o.hypers[0]['lr']
    for o in opts:
        with pytest.raises(TypeError, match='lr'): o.step()

def test_a_momentum_of_one_is_an_error_as_ever():
    opt = Adam(make(), lr=.1)
    fuse_steps(opt)
    opt.set_hyper('mom', 1)
    with pytest.raises(ZeroDivisionError): take(opt)

def test_dampening_in_a_parameters_state_counts():
    opts = [OPTS['momentum_l2'](make()) for _ in range(2)]
    fuse_steps(opts[1])
    for o in opts:
        o.state[o.param_lists[0][0]]['dampening'] = True
        take(o)
    assert_close(*opts)

# ------------------------------------------------------------------------------------------------ which optimizers

class MyOptimizer(Optimizer): pass
def mine(p, **kw): pass
def my_chain(*cbs): return lambda ps: Optimizer(ps, cbs, lr=.1, mom=.9, sqr_mom=.9, eps=1e-5, wd=.1)
dampened = partial(average_grad, dampening=True)
OTHERS = dict(radam=partial(RAdam, lr=.1), rmsprop=partial(RMSProp, lr=.1), rmsprop_momentum=partial(RMSProp, lr=.1, mom=.9), lamb=partial(Lamb, lr=.1), larc=partial(Larc, lr=.1), qhadam=partial(QHAdam, lr=.1),
              ranger=partial(ranger, lr=.1), torch=lambda ps: OptimWrapper(ps, opt=torch.optim.Adam), subclass=lambda ps: MyOptimizer(ps, [weight_decay, sgd_step], lr=.1),
              no_decay=my_chain(sgd_step), nothing=my_chain(), decay_only=my_chain(weight_decay), mine_too=my_chain(weight_decay, sgd_step, mine), mine_first=my_chain(mine, sgd_step), twice=my_chain(weight_decay, sgd_step, sgd_step),
              dampened_sgd=my_chain(weight_decay, dampened, momentum_step), undampened_adam=my_chain(weight_decay, average_grad, average_sqr_grad, step_stat, adam_step),
              other_order=my_chain(weight_decay, average_sqr_grad, dampened, step_stat, adam_step), more_said=my_chain(weight_decay, partial(average_grad, dampening=True, eps=1), average_sqr_grad, step_stat, adam_step),
              wrapped=my_chain(weight_decay, partial(sgd_step)))

@pytest.mark.parametrize('opt_func', OTHERS.values(), ids=OTHERS)
def test_other_optimizers_stay_as_they_are(opt_func):
    opt = opt_func(make())
    types = type(opt),type(getattr(opt, 'opt', None))
    assert fuse_steps(opt) is False and why_not_fused(opt)
    assert types == (type(opt), type(getattr(opt, 'opt', None)))
    plain_steps(opt)
    assert types == (type(opt), type(getattr(opt, 'opt', None)))

@each_opt
def test_a_parameter_in_two_groups_steps_twice_as_ever(opt_func):
    ps = make()
    opt = opt_func([ps, ps[:2]])
    assert not fuse_steps(opt) and 'twice' in why_not_fused(opt) and type(opt) is Optimizer

@each_opt
def test_fused_and_back(opt_func):
    opt = opt_func(make())
    for _ in range(2):
        assert fuse_steps(opt) and fuse_steps(opt) and type(opt) is FusedOptimizer and isinstance(opt, Optimizer) and why_not_fused(opt) is None
        plain_steps(opt), plain_steps(opt)
        assert type(opt) is Optimizer

def test_a_step_of_the_users_own_is_called():
    opt,n = Adam(make(), lr=.1),[]
    step = opt.step
    opt.step = lambda: (n.append(1), step())
    assert not fuse_steps(opt) and 'replaced' in why_not_fused(opt)
    take(opt, 3)
    assert len(n) == 3

@pytest.mark.parametrize('change', [lambda cbs: cbs.append(mine), lambda cbs: cbs.pop(0), lambda cbs: cbs.__setitem__(0, l2_reg)])
def test_callbacks_changed_in_the_midst(change):
    opts = [Adam(make(), lr=.1, wd=.1) for _ in range(2)]
    fuse_steps(opts[1])
    for o in opts:
        take(o, 5)
        change(o.cbs)
        take(o, 5, 5)
    assert_close(*opts)

def test_a_callback_that_joins_is_called_for_each_parameter(monkeypatch):
    seen = []
    opt = SGD(make(), lr=.1)
    fuse_steps(opt)
    opt.cbs.append(lambda p, **kw: seen.append(p))
    take(opt, 2)
    assert len(seen) == 8
    opt.cbs.pop()
    take(opt, 2)
    assert len(seen) == 8

def test_lookahead_steps_by_a_fused_optimizer(all_fused, monkeypatch):
    opt = Lookahead(Adam(make(), lr=.1), k=3)
    assert fuse_steps(opt) and type(opt) is Lookahead and type(opt.opt) is FusedOptimizer
    take(opt, 7)
    monkeypatch.undo()
    other = Lookahead(Adam(make(), lr=.1), k=3)
    take(other, 7)
    assert_close(opt, other)
    for a,b in zip(opt.slow_weights, other.slow_weights):
        for s,t in zip(a, b): assert torch.allclose(s, t, rtol=1e-5, atol=1e-6)
    plain_steps(opt)
    assert type(opt.opt) is Optimizer

@each_opt
def test_no_closure(opt_func):
    opt = opt_func(make())
    fuse_steps(opt)
    give_grads(opt, 0)
    with pytest.raises(NotImplementedError, match='closure'): opt.step(lambda: 0)

# ------------------------------------------------------------------------------------------------ copies and checkpoints

@each_opt
@pytest.mark.parametrize('how', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_alike(opt_func, how):
    opt = opt_func(make())
    fuse_steps(opt)
    take(opt, 3)
    other = how(opt)
    assert type(other) is FusedOptimizer and other.param_lists[0][0] is not opt.param_lists[0][0]
    take(opt), take(other)
    assert_equal(opt, other)

@each_opt
@pytest.mark.parametrize('first', [False, True])
def test_a_checkpoint_of_either_kind_goes_on_as_the_other(opt_func, first):
    whole,a = opt_func(make()),opt_func(make())
    take(whole, 8)
    if first: fuse_steps(a)
    take(a, 4)
    f = io.BytesIO()
    torch.save(dict(opt=a.state_dict(), ps=[p.data for p,*_ in a.all_params()]), f)
    f.seek(0)
    sd = torch.load(f, weights_only=False)
    b = opt_func([nn.Parameter(p) for p in sd['ps']])
    b.load_state_dict(sd['opt'])
    if not first: fuse_steps(b)
    take(b, 4, 4)
    assert_close(b, whole)

@each_opt
def test_cleared_state_starts_anew(opt_func):
    opts = [opt_func(make()) for _ in range(2)]
    fuse_steps(opts[1])
    for o in opts:
        o.state[o.param_lists[0][1]]['do_wd'] = False
        take(o, 3)
        o.clear_state()
        take(o, 3)
    assert_close(*opts)

# ------------------------------------------------------------------------------------------------ while layers are on the kernels

class Types(Callback):
    "The optimizer's type at each step, and after each training batch."
    order = 300
    def before_fit(self): self.seen,self.later = [],[]
    def after_step(self): self.seen.append(self.kind())
    def after_cancel_step(self): self.seen.append(self.kind())
    def after_batch(self):
        if self.training: self.later.append(self.kind())
    def kind(self): return type(getattr(self.learn.opt, 'opt', self.learn.opt))

METHODS = dict(RigL=RigL_presets, SET=SET_presets, SNFS=SNFS_presets)
def dst(method='RigL', on=True, every=3, **kw):
    return DynamicSparseTrainingCallback(**{**METHODS[method], **kw}, batches_per_update=every, sparse_kernels=on, sparsity_threshold=.5)
def static(on=True, **kw): return SparseKernelsCallback(sparse_kernels=on, sparsity_threshold=.5, **kw)
def learner(opt_func=Adam, **kw): return toy_learner(.8, opt_func, cbs=[Types()], lr=.01, **kw)

def run(learn, n=2, *cbs):
    with quiet(learn): learn.fit(n, cbs=list(cbs))
    return learn

@needs_kernels
@pytest.mark.parametrize('opt_func', [Adam, SGD, partial(SGD, mom=.9), lambda ps, **kw: Lookahead(Adam(ps, **kw))])
@pytest.mark.parametrize('cb', [static, dst, partial(dst, 'SNFS'), partial(dst, 'SET')])
def test_fused_during_fit_only(opt_func, cb):
    if getattr(cb, 'args', ()) == ('SNFS',) and opt_func is SGD: return
    learn = run(learner(opt_func), 2, cb())
    assert set(learn.types.seen) | set(learn.types.later) == {FusedOptimizer} and learn.types.kind() is Optimizer
    assert set(run(learn, 1, cb(on=False)).types.later) == {Optimizer}
    assert set(run(learn, 1).types.later) == {Optimizer}

@needs_kernels
def test_every_parameter_of_a_sparse_model_is_fused(monkeypatch):
    def fail(*args): raise AssertionError('not fused')
    monkeypatch.setattr(FusedOptimizer, '_fastai_step', fail)
    for cb in (static, dst, partial(dst, 'SNFS'), partial(dst, 'SET')): run(learner(), 2, cb())

@needs_kernels
@pytest.mark.parametrize('opt_func', [Adam, partial(SGD, mom=.9, wd=.1), partial(Adam, decouple_wd=False)])
@pytest.mark.parametrize('cb', [static, dst, partial(dst, 'SNFS')])
def test_same_training_as_by_fastais_steps(opt_func, cb, monkeypatch):
    ours = run(learner(opt_func), 4, cb())
    monkeypatch.setattr('fastsparse.callback.fuse_steps', lambda opt: False)
    theirs = run(learner(opt_func), 4, cb())
    assert set(theirs.types.later) == {Optimizer}
    a,b = ours.model.state_dict(),theirs.model.state_dict()
    for k in a: assert torch.allclose(a[k].float(), b[k].float(), rtol=1e-3, atol=1e-5), k
    assert_close(ours.opt, theirs.opt, 1e-4)
    for p in sparse_params(ours.model):
        for t in (p.param, *opt_slots(ours.opt, p.param).values()): assert not t[~p.mask].any()

@needs_kernels
def test_kept_kernels_keep_it_until_the_next_fit():
    learn = run(learner(), 1, static(keep_kernels=True))
    assert type(learn.opt) is FusedOptimizer
    assert set(run(learn, 1).types.later) == {FusedOptimizer}
    assert set(run(learn, 1, dst(on=False)).types.seen) == {Optimizer}
    run(learn, 1, static(keep_kernels=True))
    run(learn, 1, static())
    assert type(learn.opt) is Optimizer

@needs_kernels
@pytest.mark.parametrize('event', ['before_step', 'after_step', 'after_batch', 'before_validate'])
def test_an_interrupted_fit_is_settled_by_the_next(event):
    class Stop(Callback):
        order,n = 310,0
        def stop(self):
            self.n += 1
            if self.n == 2 or event == 'before_validate': raise KeyboardInterrupt
    setattr(Stop, event, Stop.stop)
    for cb in (static, dst):
        learn = learner()
        with pytest.raises(KeyboardInterrupt): run(learn, 2, cb(), Stop())
        assert type(learn.opt) is FusedOptimizer
        assert set(run(learn, 1, cb(on=False)).types.seen) == {Optimizer} and type(learn.opt) is Optimizer
        with pytest.raises(KeyboardInterrupt): run(learn, 2, cb(), Stop())
        assert set(run(learn, 1, cb()).types.seen) == {FusedOptimizer} and type(learn.opt) is Optimizer

@needs_kernels
def test_a_cancelled_fit_ends_plain():
    class Cancel(Callback):
        def after_batch(self): raise CancelFitException
    assert type(run(learner(), 2, static(), Cancel()).opt) is Optimizer

@needs_kernels
def test_callbacks_changed_during_fit_are_followed():
    seen = []
    class Change(Callback):
        def before_epoch(self):
            if self.epoch == 1: self.opt.cbs.append(lambda p, **kw: seen.append(p))
    run(learner(), 3, static(), Change())
    assert len(seen) == 2*8*6

@needs_kernels
def test_the_report_has_a_row():
    def row(opt_func=Adam, **kw): return sparse_kernels_report(run(learner(opt_func), 1, static(**kw)), neighbours=True).loc['(optimizer)']
    assert (row().chosen, row().why) == ('fused', 'one pass over each parameter')
    assert row(RAdam).chosen == 'fastai' and 'callbacks' in row(RAdam).why
    assert row(partial(OptimWrapper, opt=torch.optim.Adam)).why.startswith('OptimWrapper')
    learn = run(learner(), 1, static())
    assert '(optimizer)' not in sparse_kernels_report(learn).index
    learn = run(learner(), 1, SparseKernelsCallback(True, .99))
    assert learn.sparse_compute.log and not any(r['chosen'] == 'sparse' for r in learn.sparse_compute.log.values())
    r = sparse_kernels_report(learn, neighbours=True).loc['(optimizer)']
    assert r.chosen == 'fastai' and 'no layer' in r.why and set(learn.types.later) == {Optimizer}

@needs_kernels
def test_no_layer_left_on_the_kernels():
    "A later decision may go against them: the steps follow, in a resumed run as well."
    class Against(Callback):
        order = 94
        def after_batch(self):
            if self.training and self.epoch == 1 and self.iter == 0: self.learn.sparse_compute.threshold,self.learn.dst_kernels.stale = 1.,True
    learn,cb = learner(),static()
    learn.dst_kernels = cb.kernels
    run(learn, 2, cb, Against())
    assert learn.types.later == [FusedOptimizer]*8 + [Optimizer]*8

@needs_kernels
@pytest.mark.parametrize('every', [None, 3])
@pytest.mark.parametrize('cb', [static, dst, partial(dst, 'SNFS'), partial(dst, 'SET')])
def test_resumed_run_is_the_whole_run(cb, every, tmp_path):
    class Stop(Callback):
        order = 301
        def after_batch(self):
            if self.training and self.learn.train_iter == 21: raise KeyboardInterrupt
    whole = run(learner(), 4, cb())
    with pytest.raises(KeyboardInterrupt): run(learner(), 4, cb(), CheckpointCallback(tmp_path/'c', every), Stop())
    part = run(learner(), 4, cb(), ResumeCallback(tmp_path/'c'))
    assert set(part.types.seen) == {FusedOptimizer}
    a,b = whole.model.state_dict(),part.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert_equal(part.opt, whole.opt)
