"The callback inside fastai's training loop: reference semantics, invariants at every instant, composition."
import copy, math, warnings
from functools import partial
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate
from fastai.basics import (Adam, Callback, CancelBackwardException, CancelFitException, CancelStepException, Lamb, Larc, OptimWrapper,
                           RAdam, RMSProp, SGD, ranger, params, load_learner, DataLoaders)
from fastai.callback.fp16 import MixedPrecision
import fastai.callback.schedule
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip, ShortEpochCallback
from fastsparse import (DynamicSparseTrainingCallback as DST, EverActive, RigL_presets, SET_presets, SNFS_presets, SparseKernelsCallback, Sparsity, add_mask_hooks, gradient_magnitude,
                        sparse_params, sparsify_model, weight_magnitude)
from fastsparse.kernels import kernels_available
from fastsparse.schedule import is_update_step
from conftest import assert_sparse, counts, fit, masked, masks, quiet, same, slots, state, toy_dls, toy_items, toy_learner, toy_net

pytestmark = pytest.mark.usefixtures('one_thread')
presets = dict(RigL=RigL_presets, SET=SET_presets, SNFS=SNFS_presets)
T = torch.optim
opts = dict(sgd=SGD, momentum=partial(SGD, mom=.9), l2=partial(SGD, mom=.9, wd=.1, decouple_wd=False), adam=Adam, radam=RAdam, lamb=Lamb, ranger=ranger, rmsprop=RMSProp, larc=Larc,
            torch_sgd=partial(OptimWrapper, opt=partial(T.SGD, momentum=.9)), torch_adam=partial(OptimWrapper, opt=T.Adam), torch_adamw=partial(OptimWrapper, opt=T.AdamW))
def dst(method='RigL', every=3, **kw): return DST(**{**presets[method], 'batches_per_update': every, **kw})
each_method = pytest.mark.parametrize('method', presets)

events = ('before_fit before_epoch before_train before_batch after_pred after_loss before_backward after_backward before_step after_cancel_step after_step '
          'after_batch after_train before_validate after_validate after_epoch after_fit').split()

class Watch(Callback):
    "Looks at every event, that of validation too"
    def __init__(self, order=200, total=None, compressed=False): self.order,self.total,self.compressed,self.seen = order,total,compressed,0
    def look(self, e):
        self.seen += 1
        assert_sparse(self.learn.model, self.learn.opt, f'{e}, order {self.order}', self.compressed)
        if self.total is not None: assert sum(counts(self.learn.model).values()) == self.total
for e in events: setattr(Watch, e, lambda self, e=e: self.look(e))

def watches(learn): return [Watch(o, sum(counts(learn.model).values())) for o in (-90, 200)]

class At(Callback):
    "Call `f(learn)` at the `n`th time that `event` comes, from 0, or at every time"
    def __init__(self, event, f, n=None, order=50, valid=False):
        self.order,self.n,self.count,self.f,self.run_valid = order,n,0,f,valid
        def _call():
            self.count += 1
            if self.n in (None, self.count-1): self.f(self.learn)
        setattr(self, event, _call)

def raise_(ex):
    def _f(*args): raise ex
    return _f

class Trace(Callback):
    "Weights and masks after every training batch"
    run_valid,order = False,300
    def before_fit(self): self.weights,self.masks = [],[]
    def after_batch(self):
        self.weights.append({n: p.detach().clone() for n,p in self.learn.model.named_parameters()})
        self.masks.append(masks(self.learn.model))

# --- an independent RigL, SET and SNFS

def fastai_debias(mom, step): return (1-mom)*(1 - mom**step)/(1-mom)

class Reference:
    "A tanh network trained by the papers' algorithms. Masks are decided by numpy's sort; no code of the package."
    def __init__(self, model, method, opt, every, n_steps, lr):
        self.ps,self.ms = {n: p.detach().clone() for n,p in model.named_parameters()},masks(model)
        self.method,self.opt,self.every,self.n_steps,self.lr,self.slots,self.t = method,opt,every,n_steps,lr,{n: {} for n in self.ps},0
        if opt == 'torch_adam': self.torch_opt = T.Adam(self.ps.values(), lr=lr)
        self.f0,self.stop = dict(RigL=(.3, .75), SET=(.3, 1.), SNFS=(.5, 1.))[method]

    def grads(self, x, y):
        ps = {n: p.clone().requires_grad_() for n,p in self.ps.items()}
        for i in (0, 2, 4): x = F.linear(x.tanh() if i else x, ps[f'{i}.weight'], ps[f'{i}.bias'])
        return dict(zip(ps, torch.autograd.grad(F.cross_entropy(x, y), ps.values())))

    def optimize(self, gs):
        self.t += 1
        if self.opt == 'torch_adam':
            for n,p in self.ps.items(): p.grad = gs[n]
            self.torch_opt.step()
            self.slots = {n: {k: v for k,v in self.torch_opt.state[p].items() if k != 'step'} for n,p in self.ps.items()}
            return
        for n,p in self.ps.items():
            g,s = gs[n],self.slots[n]
            if self.opt == 'adam':
                if n.endswith('weight'): p.mul_(1 - self.lr*.01)
                s['avg'] = s.get('avg', torch.zeros_like(g)).mul_(.9).add_(g, alpha=1-.9)
                s['sqr'] = s.get('sqr', torch.zeros_like(g)).mul_(.99).addcmul_(g, g, value=1-.99)
                p.addcdiv_(s['avg'], (s['sqr']/fastai_debias(.99, self.t)).sqrt() + 1e-5, value=-self.lr/fastai_debias(.9, self.t))
            elif self.opt == 'momentum':
                s['avg'] = s.get('avg', torch.zeros_like(g)).mul_(.9).add_(g)
                p.add_(s['avg'], alpha=-self.lr)
            else: p.add_(g, alpha=-self.lr)

    def momentum(self, n):
        m,*sqr = self.slots[n].values()
        return (m/(sqr[0].sqrt() + 1e-8) if sqr else m).abs()

    def shares(self, total, room):
        "In proportion to the mean momentum of active weights; what doesn't fit goes round again; largest remainders get the rest"
        claims = {n: float(self.momentum(n)[m].mean()) for n,m in self.ms.items()}
        got = dict.fromkeys(claims, 0)
        while left := total - sum(got.values()):
            open_ = [n for n in claims if got[n] < room[n]]
            exact = {n: left*claims[n]/sum(claims[o] for o in open_) for n in open_}
            add = {n: min(int(exact[n]), room[n]-got[n]) for n in open_}
            if all(add[n] == int(exact[n]) for n in open_):
                fits = [n for n in open_ if got[n] + add[n] < room[n]]
                for n in sorted(fits, key=lambda n: add[n]-exact[n])[:left-sum(add.values())]: add[n] += 1
            for n in open_: got[n] += add[n]
        return got

    def update(self, gs, i):
        f,new = self.f0/2*(1 + math.cos(math.pi*i/self.n_steps/self.stop)),{}
        drop = {n: int(f*int(m.sum())) for n,m in self.ms.items()}
        for n,m in self.ms.items():
            act = np.flatnonzero(m.numpy())
            new[n] = np.zeros(m.numel(), bool)
            new[n][act[np.argsort(-self.ps[n].abs().numpy().ravel()[act])][:len(act)-drop[n]]] = True
        grow = drop if self.method != 'SNFS' else self.shares(sum(drop.values()), {n: int((~k).sum()) for n,k in new.items()})
        for n,m in self.ms.items():
            score = dict(RigL=lambda: gs[n].abs(), SET=lambda: torch.rand(m.shape), SNFS=lambda: self.momentum(n))[self.method]()
            rest = np.flatnonzero(~new[n])
            new[n][rest[np.argsort(-score.numpy().ravel()[rest])][:grow[n]]] = True
        for n,m in self.ms.items():
            now = torch.from_numpy(new[n]).view(m.shape)
            fresh = now & ~m
            self.ps[n][fresh | ~now] = 0
            for s in self.slots[n].values(): s[fresh if self.method == 'SNFS' else fresh | ~now] = 0
            self.ms[n] = now

    def step(self, i, x, y):
        gs,due = self.grads(x, y),0 < i < self.n_steps-1 and i % self.every == 0 and i < self.stop*self.n_steps
        if not (due and self.method == 'RigL'):
            self.optimize(gs if self.method == 'SNFS' else {n: torch.where(self.ms[n], g, 0) if n in self.ms else g for n,g in gs.items()})
            for n,m in self.ms.items(): self.ps[n][~m] = 0
        if due:
            torch.manual_seed(1000 + i)
            self.update(gs, i)

def nearly(a, b):
    "The same but for the last bits, which PyTorch's dense products don't promise from call to call"
    return torch.allclose(a, b, rtol=1e-5, atol=1e-7)

def run_beside(method, opt, n_epoch=4, every=4):
    learn,trace = toy_learner(opt_func=opts[opt]),Trace()
    ref = Reference(learn.model, method, opt, every, n_epoch*8, .05)
    def seed(learn): torch.manual_seed(1000 + learn.epoch*8 + learn.iter)
    cb = dst(method, every)
    fit(learn, n_epoch, cbs=[cb, trace, At('before_step', seed, order=94)])
    batches = [(torch.stack([x for x,_ in b]), torch.stack([y for _,y in b])) for b in (toy_items()[i:i+8] for i in range(0, 64, 8))]
    for i,(w,m) in enumerate(zip(trace.weights, trace.masks)):
        ref.step(i, *batches[i % 8])
        for n in ref.ms: assert m[n].equal(ref.ms[n]), f'mask of {n} at step {i}'
        for n in ref.ps: assert nearly(w[n], ref.ps[n]), f'{n} at step {i}'
    for n,p in learn.model.named_parameters():
        if n in ref.ms:
            for mine,s in zip(slots(learn.opt, p).values(), ref.slots[n].values()): assert nearly(mine, s*ref.ms[n]), f'slot of {n}'
    assert len(trace.weights) == n_epoch*8 and len(cb.updates) >= 4 and all(u['grown'] != [0, 0, 0] for u in cb.updates[:3])

@pytest.mark.parametrize('method,opt', [(m, o) for m in presets for o in ('sgd', 'momentum', 'adam', 'torch_adam') if (m, o) != ('SNFS', 'sgd')])
def test_reference_semantics(method, opt): run_beside(method, opt)

def test_presets_are_the_papers():
    assert {k: (p['initial_drop_grow_pct'], p['stop_pct'], p.get('update_replaces_step', True)) for k,p in presets.items()} == \
        dict(RigL=(.3, .75, True), SET=(.3, 1., False), SNFS=(.5, 1., False))
    for m,n,steps in (('RigL', 302, [100, 200]), ('SET', 8, [8, 16]), ('SNFS', 8, [8, 16])):        # every 100 steps, and every epoch
        cb = DST(**presets[m])
        fit(toy_learner(n=n*2, bs=2), 1 if m == 'RigL' else 3, cbs=cb)
        assert [u['step'] for u in cb.updates] == steps

def test_once_an_epoch_where_an_epoch_is_no_whole_number_of_steps():
    "1½ steps: every second, not each."
    cb = DST(**SET_presets)
    fit(toy_learner(n=24, bs=8), 12, cbs=[cb, GradientAccumulation(16)])
    assert cb.n_steps == 18 and [u['step'] for u in cb.updates] == list(range(2, 17, 2))

# --- what an update does to a step

def params_of(learn): return {n: p.detach().clone() for n,p in learn.model.named_parameters()}

@each_method
def test_rigls_update_replaces_the_step_and_the_others_do_not(method):
    learn,trace,taken = toy_learner(),Trace(),[]
    step = learn._step
    learn._step = lambda: (taken.append(learn.epoch*8 + learn.iter), step())
    cb = dst(method)
    fit(learn, 2, cbs=[cb, trace])
    due = [u['step'] for u in cb.updates]
    assert due and taken == [i for i in range(16) if method != 'RigL' or i not in due]
    for i in due:
        moved = not trace.weights[i]['0.bias'].equal(trace.weights[i-1]['0.bias'])
        assert moved == (method != 'RigL')

def test_rigls_update_leaves_kept_weights_and_their_slots_alone():
    learn,before,after = toy_learner(opt_func=Adam),{},{}
    def look(into): return lambda learn: into.update({n: (p.detach().clone(), m.clone(), {k: v.clone() for k,v in slots(learn.opt, p).items()}) for n,p,m in masked(learn.model)})
    fit(learn, 1, cbs=[dst(), At('before_step', look(before), n=3), At('after_batch', look(after), n=3)])
    for n in before:
        (w0,m0,s0),(w1,m1,s1) = before[n],after[n]
        stay = m0 & m1
        assert (m0 != m1).any() and w0[stay].equal(w1[stay]) and not w1[m1 & ~m0].any()
        assert len(s0) == 2
        for k in s0: assert s0[k][stay].equal(s1[k][stay]) and s0[k][stay].any() and not s1[k][~stay].any()

@each_method
def test_no_gradient_of_an_update_batch_leaks(method):
    "2020 fastsparse raised CancelBatchException, so that zero_grad was left out."
    learn,grads = toy_learner(),[]
    fit(learn, 1, cbs=[dst(method), At('after_batch', lambda l: grads.append(sum(float(p.grad.abs().sum()) for p in l.model.parameters())), valid=False)])
    assert grads == [0]*8

@each_method
def test_just_dropped_may_return_and_keeps_value_and_state(method):
    learn,seen = toy_learner(opt_func=Adam),[]
    def look(learn): seen.append({n: (p.detach().clone(), m.clone(), {k: v.clone() for k,v in slots(learn.opt, p).items()}) for n,p,m in masked(learn.model)})
    def stay(param, opt, mask): return mask.float()
    def grow(param, opt, mask):
        look(learn)
        return mask.float()
    fit(learn, 1, cbs=[dst(method, grow_score_f=grow, redistribute_f=None), At('after_batch', look, n=3)])
    at_update,after = seen[0],seen[3]
    for n in after:
        assert at_update[n][1].equal(after[n][1]) and at_update[n][0].equal(after[n][0])
        for k,s in after[n][2].items(): assert s.equal(at_update[n][2][k]) and s.any()

# --- when

@each_method
@pytest.mark.parametrize('every', [1, 2, 5])
def test_no_update_on_the_first_and_the_last_step(method, every):
    learn,trace = toy_learner(),Trace()
    start = masks(learn.model)
    cb = dst(method, every, initial_drop_grow_pct=.5, stop_pct=1., drop_grow_sched=lambda s,e,p: s)
    fit(learn, 2, cbs=[cb, trace])
    changed = [i for i,(a,b) in enumerate(zip([start, *trace.masks], trace.masks)) if not same(a, b)]
    assert changed == [u['step'] for u in cb.updates] == [i for i in range(1, 15) if i % every == 0]

def test_nothing_moves_from_the_stop_on():
    learn,trace = toy_learner(),Trace()
    cb = dst('RigL', 1, stop_pct=.5)
    fit(learn, 2, cbs=[cb, trace])
    assert [u['step'] for u in cb.updates] == list(range(1, 8)) and all(same(trace.masks[7], m) for m in trace.masks[7:])

class Steps(Callback):
    "Counts optimizer steps, those that an update replaces too, and notes at which the masks change"
    order,run_valid = 94,False
    def before_fit(self): self.n,self.changed,self.last = 0,[],masks(self.learn.model)
    def before_step(self): self.n += 1
    def after_batch(self):
        now = masks(self.learn.model)
        if not same(now, self.last): self.changed.append(self.n-1)
        self.last = now

torch_dls = lambda items,bs: DataLoaders(torch.utils.data.DataLoader(items, batch_size=bs), torch.utils.data.DataLoader(items[:16], batch_size=bs))
@pytest.mark.parametrize('method,loaders', [('RigL', None), ('SNFS', None), ('RigL', torch_dls)], ids=['RigL', 'SNFS', 'torch loader'])
@pytest.mark.parametrize('n,n_acc,every', [(64, 16, 1), (64, 24, 2), (60, 16, 1), (60, 20, 2), (61, 8, 3), (58, 64, 1)])
def test_position_counts_optimizer_steps_under_accumulation(method, n, n_acc, every, loaders):
    learn,steps = toy_learner(n=n, dls=loaders and loaders(toy_items(n), 8)),Steps()
    cb = dst(method, every, initial_drop_grow_pct=.5, stop_pct=1., drop_grow_sched=lambda s,e,p: s)
    fit(learn, 3, cbs=[cb, steps, GradientAccumulation(n_acc)])
    assert cb.n_steps == steps.n
    assert steps.changed == [u['step'] for u in cb.updates] == [i for i in range(steps.n) if is_update_step(i, steps.n, every, 1.)]

def test_accumulated_update_sees_the_dense_gradient_of_all_its_batches():
    learn,got = toy_learner(opt_func=partial(SGD, mom=0)),[]
    def grow(p, opt, name, mask):
        got.append((name, p.grad.clone(), mask.clone(), copy.deepcopy(learn.model)))
        return p.grad.abs()
    fit(learn, 2, cbs=[dst(grow_score_f=grow, every=2, stop_pct=1.), GradientAccumulation(16)])
    h,y = (torch.stack(t) for t in zip(*toy_items()[32:48]))               # the third step: batches 4 and 5
    model = got[0][3]
    ws = [model[i].weight.detach().clone().requires_grad_() for i in (0, 2, 4)]     # fresh leaves, so that no hook sees their gradients
    for i,w in zip((0, 2, 4), ws): h = F.linear(h.tanh() if i else h, w, model[i].bias)
    for (name,g,m,_),dense in zip(got, torch.autograd.grad(F.cross_entropy(h, y), ws)): assert torch.allclose(g, dense, atol=1e-6) and g[~m].any()

def test_short_epochs_and_skipped_ones_keep_the_position():
    learn = toy_learner()
    cb = dst(every=1)
    fit(learn, 4, cbs=[cb, ShortEpochCallback(.5)])
    assert all(u['step'] % 8 <= 4 for u in cb.updates)                  # position is that of the whole run
    cb = dst(every=1)
    fit(learn, 4, start_epoch=2, cbs=cb)
    assert [u['step'] for u in cb.updates] == list(range(16, 24))

@each_method
def test_counts_never_drift(method):
    "sparse_learning's counts are approximate; 2020 fastsparse's total drifted."
    learn = toy_learner()
    cb = dst(method, 1, stop_pct=1., initial_drop_grow_pct=.9, drop_grow_sched=lambda s,e,p: s)
    fit(learn, 6, cbs=[cb, *watches(learn)])
    assert len(cb.updates) == 46
    for u in cb.updates: assert (sum(u['before']) == sum(u['after'])) if method == 'SNFS' else u['before'] == u['after']

def test_redistribution_moves_connections_between_layers():
    learn = toy_learner()
    before = counts(learn.model)
    fit(learn, 2, cbs=dst('SNFS'))
    assert counts(learn.model) != before and sum(counts(learn.model).values()) == sum(before.values())

def test_a_dense_layer_can_shrink_again_in_training():
    learn,seen = toy_learner(),[]
    def claim(p, opt, name): return float((name == '4.weight') == (len(seen) < 4))
    fit(learn, 3, cbs=[dst('SNFS', 1, redistribute_f=claim), At('after_batch', lambda l: seen.append(counts(l.model)), valid=False), *watches(learn)])
    assert max(s['4.weight'] for s in seen) == 36 > seen[-1]['4.weight']

def test_drops_the_smallest_weights():
    "sparse_learning's `--prune SET` removes the wrong end."
    learn,seen = toy_learner(),{}
    fit(learn, 1, cbs=[dst('RigL', 3, grow_score_f=lambda p,o,mask: -mask.float()), At('before_step', lambda l: seen.update(w={n: p.detach().abs().clone() for n,p,_ in masked(l.model)}, m=masks(l.model)), n=3),
                       At('after_batch', lambda l: seen.update(after=masks(l.model)), n=3)])
    for n,w in seen['w'].items():
        old,new = seen['m'][n],seen['after'][n]
        assert (old & ~new).any() and w[old & ~new].max() <= w[old & new].min()

def test_a_large_negative_momentum_grows():
    "2020 fastsparse ranked by signed momentum."
    learn = toy_learner()
    w,m = learn.model[0].weight,learn.model[0].weight_mask
    i = tuple((~m).nonzero()[0])
    def push(learn): w.grad[i] = 1e3
    fit(learn, 1, cbs=[dst('SNFS', 4), At('after_backward', push)])
    assert m[i]

# --- zero off the masks, always

def torch_loop(learn):
    opt = T.SGD(learn.model.parameters(), lr=.1, momentum=.9)
    for x,y in learn.dls.train:
        F.cross_entropy(learn.model(x), y).backward()
        for n,p,m in masked(learn.model): assert p.shape != m.shape or not p.grad[~m].any()
        opt.step(); opt.zero_grad()
        assert_sparse(learn.model, opt, compressed=True)

@pytest.mark.parametrize('method', [None, *presets])
@pytest.mark.parametrize('opt', opts)
def test_every_optimizer_at_every_event(opt, method):
    learn = toy_learner(opt_func=opts[opt])
    if opt in ('sgd', 'rmsprop') and method == 'SNFS':
        with pytest.raises(ValueError, match='momentum'): fit(learn, 1, cbs=dst(method))
        return
    ws = watches(learn)
    before,cb = masks(learn.model),dst(method) if method else None
    start = params_of(learn)
    fit(learn, 1, cbs=[*ws, *([cb] if cb else [])])
    assert same(before, masks(learn.model)) == (method is None) and all(w.seen > 50 for w in ws)
    assert_sparse(learn.model, learn.opt)
    assert all(torch.isfinite(p).all() and not p.equal(start[n]) for n,p in learn.model.named_parameters())

interrupts = [(e, o) for e in events[2:-1] for o in ((50, 200) if e == 'before_step' else (50,))]
def interrupted(method, event, order, ex, opt='momentum'):
    learn = toy_learner(opt_func=opts[opt])
    total = sum(counts(learn.model).values())
    n = 3 if event in 'before_batch after_pred after_loss before_backward after_backward before_step after_step after_batch' else 0
    stop = At(event, raise_(ex), n=n, order=order, valid='valid' in event)
    try: fit(learn, 2, cbs=[dst(method), stop])
    except KeyboardInterrupt: pass
    assert stop.count == n+1 or (method, order) == ('SNFS', 200) 
    assert_sparse(learn.model, learn.opt, f'after {ex} in {event}')
    assert sum(counts(learn.model).values()) == total
    return learn

@each_method
@pytest.mark.parametrize('event,order', interrupts)
def test_interrupted_at_any_event(method, event, order): interrupted(method, event, order, KeyboardInterrupt)

@each_method
@pytest.mark.parametrize('event', ['before_batch', 'after_loss', 'before_step', 'after_step', 'after_batch', 'after_train', 'after_epoch'])
def test_cancelled_fit(method, event): interrupted(method, event, 50, CancelFitException)

@each_method
@pytest.mark.parametrize('at', [1, 2, 20, 35])
def test_interrupted_inside_the_optimizer(method, at):
    n = []
    def boom(p, **kw):
        n.append(1)
        if len(n) == at: raise KeyboardInterrupt
    def opt_func(ps, **kw):
        opt = SGD(ps, mom=.9, **kw)
        opt.cbs.append(boom)
        return opt
    learn = toy_learner(opt_func=opt_func)
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, cbs=dst(method, stop_pct=1.))
    assert_sparse(learn.model, learn.opt)
    fit(learn, 1, cbs=watches(learn))

@each_method
@pytest.mark.parametrize('ex', [KeyboardInterrupt, CancelFitException])
@pytest.mark.parametrize('event', ['after_backward', 'before_step', 'after_step', 'after_batch'])
def test_the_fit_after_an_interrupted_one_stays_sparse(method, ex, event):
    learn = interrupted(method, event, 50, ex)
    fit(learn, 1, cbs=watches(learn))

@each_method
def test_the_torch_loop_after_an_interrupted_fit_stays_sparse(method):
    learn = interrupted(method, 'after_backward', 50, KeyboardInterrupt)
    torch_loop(learn)

@each_method
def test_the_fit_after_a_failed_score_stays_sparse(method):
    learn = toy_learner()
    def fails(p, opt): raise RuntimeError('oh')
    with pytest.raises(ValueError, match='0.weight'): fit(learn, 1, cbs=dst(method, grow_score_f=fails))
    assert_sparse(learn.model, learn.opt)
    fit(learn, 1, cbs=watches(learn))

class Boom(T.Adam):
    n = 0
    def step(self, closure=None):
        super().step()
        self.n += 1
        if self.n == 6: raise KeyboardInterrupt

@each_method
def test_interrupted_inside_a_torch_optimizer(method):
    learn = toy_learner(opt_func=partial(OptimWrapper, opt=Boom))
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, cbs=dst(method))
    assert_sparse(learn.model, learn.opt)

@each_method
@pytest.mark.parametrize('role', ['keep_score_f', 'grow_score_f', 'redistribute_f'])
def test_interrupted_inside_a_score(method, role):
    learn = toy_learner()
    before = masks(learn.model)
    def score(p, opt, name):
        if name == '2.weight': raise KeyboardInterrupt
        return 1. if role == 'redistribute_f' else p.detach().abs()
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, cbs=dst(method, **{role: score}))
    assert same(before, masks(learn.model))
    assert_sparse(learn.model, learn.opt)

@pytest.mark.parametrize('other', presets)
def test_two_callbacks_due_at_once(other):
    "Neither's step moves what the other has a dense gradient of."
    learn = toy_learner(.7)
    first,*rest = [p.module for p in sparse_params(learn.model)]
    kw = dict(sparse_kernels=False, every=2)
    fit(learn, 3, cbs=[dst('SET', sparse_modules=first, **kw), dst(other, sparse_modules=rest, **kw), *watches(learn)])

@pytest.mark.parametrize('first,second', [(a, b) for a in presets for b in presets])
def test_two_callbacks_keep_their_schedules(first, second):
    learn = toy_learner(.7)
    one,*rest = [p.module for p in sparse_params(learn.model)]
    cbs = [dst(first, 3, sparse_modules=one, sparse_kernels=False), dst(second, 4, sparse_modules=rest, sparse_kernels=False)]
    fit(learn, 3, cbs=[*cbs, *watches(learn)])
    for cb in cbs: assert [u['step'] for u in cb.updates] == [i for i in range(24) if is_update_step(i, 24, cb.every, cb.stop_pct)]

@pytest.mark.parametrize('method', ['RigL', 'SNFS'])
def test_one_step_serves_two_callbacks(method):
    "Two that do the same, each in a part of the model, are one that does it everywhere."
    def run(split):
        learn = toy_learner(.7)
        parts = [p.module for p in sparse_params(learn.model)]
        fit(learn, 3, cbs=[dst(method, sparse_modules=o, redistribute_f=None, sparse_kernels=False) for o in ([parts[:1], parts[1:]] if split else [parts])])
        return state(learn.model)
    assert same(run(False), run(True))

def test_ever_active_of_two_callbacks():
    learn = toy_learner(.7)
    one,*rest = [p.module for p in sparse_params(learn.model)]
    seen = masks(learn.model)
    def see(learn):
        for n,m in masks(learn.model).items(): seen[n] |= m
    learn.metrics = [EverActive()]
    fit(learn, 3, cbs=[dst('SET', 2, sparse_modules=one), dst('RigL', 2, sparse_modules=rest), At('after_batch', see, order=300)])
    assert learn.recorder.values[-1][-1] == sum(int(m.sum()) for m in seen.values())/sum(m.numel() for m in seen.values())

def test_of_two_callbacks_for_one_layer_the_second_waits():
    learn = toy_learner(.7)
    cbs = [dst(m, 4, sparse_kernels=False) for m in ('SET', 'RigL')]
    fit(learn, 3, cbs=[*cbs, *watches(learn)])
    assert [[u['step'] for u in cb.updates] for cb in cbs] == [[4, 8, 12, 16, 20], [5, 9, 13, 17]]

def test_whole_numbers_of_numpy_are_whole_numbers():
    cb = dst('SET', np.int64(3))
    fit(toy_learner(), 1, cbs=cb)
    assert cb.updates

@each_method
def test_a_compiled_model_moves_the_same_connections(method):
    torch._dynamo.reset()
    def run(wrap):
        learn,cb = toy_learner(),dst(method, sparse_kernels=False)
        learn.model = wrap(learn.model)
        torch.manual_seed(0)
        fit(learn, 2, cbs=cb)
        return [sum(u['grown']) for u in cb.updates],list(masks(learn.model).values())
    (n,want),(m,got) = run(lambda m: m),run(lambda m: torch.compile(m, backend='eager'))
    assert n == m and sum(n) and all(a.equal(b) for a,b in zip(got, want, strict=True))

@pytest.mark.skipif(not kernels_available(), reason='no compiled kernels here')
@each_method
@pytest.mark.parametrize('event', ['after_pred', 'after_backward', 'before_step', 'after_step', 'after_batch'])
def test_interrupted_on_the_compiled_kernels(method, event, tmp_path):
    "Whatever form the weights are left in, the model can be used, saved, copied and trained in every way."
    def start():
        learn = toy_learner(.9, model=toy_net(sizes=(6,64,64,3)), path=tmp_path)
        total = sum(counts(learn.model).values())
        with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=[dst(method, sparse_kernels=True), At(event, raise_(KeyboardInterrupt), n=4)])
        assert_sparse(learn.model, learn.opt, compressed=True)
        assert sum(counts(learn.model).values()) == total
        return learn
    learn = start()
    x = learn.dls.one_batch()[0]
    want = learn.model(x)
    learn.save('m')
    twin = toy_learner(.9, model=toy_net(sizes=(6,64,64,3)), path=tmp_path).load('m')
    for m in (twin.model, copy.deepcopy(learn.model)): assert torch.allclose(m(x), want, atol=1e-5)
    assert_sparse(twin.model, twin.opt)
    torch_loop(start())
    fit(start(), 1, cbs=[Watch(o, compressed=True) for o in (-90, 200)])
    learn = fit(start(), 1, cbs=[dst(method, sparse_kernels=True), *[Watch(o, compressed=True) for o in (-90, 200)]])
    assert_sparse(learn.model, learn.opt)

@each_method
def test_sparse_after_save_load_and_remove(method, tmp_path):
    learn = toy_learner(path=tmp_path, opt_func=Adam)
    hooks = add_mask_hooks(learn.model)
    fit(learn, 2, cbs=dst(method))
    learn.save('m')
    saved,old = state(learn.model),masks(learn.model)
    raw = torch.load(tmp_path/'models'/'m.pth', weights_only=False)['model']
    assert all(not raw[n][~raw[f'{n}_mask']].any() for n in old)
    fit(learn, 2, cbs=dst(method))
    assert not same(old, masks(learn.model))
    learn.load('m')
    assert same(saved, state(learn.model))
    assert_sparse(learn.model, learn.opt)
    fresh = toy_learner(path=tmp_path, opt_func=Adam).load('m')
    assert same(saved, state(fresh.model))
    fit(fresh, 1, cbs=[dst(method), *watches(fresh)])
    hooks.remove()
    assert_sparse(learn.model, learn.opt)
    with quiet(learn): learn.validate()
    assert_sparse(learn.model, learn.opt)

@pytest.mark.parametrize('enforce', [True, False])
@each_method
def test_without_hooks_the_callback_keeps_the_masks(method, enforce):
    learn = toy_learner(None)
    hooks = sparsify_model(learn, .7, enforce_masks=enforce)
    hooks.remove()
    fit(learn, 2, cbs=[dst(method), *watches(learn)])
    assert_sparse(learn.model, learn.opt)
    assert not any(m._forward_pre_hooks or p._backward_hooks for m in learn.model.modules() for p in m._parameters.values() if p is not None)

@each_method
def test_after_the_fit_the_model_is_an_ordinary_sparse_one(method):
    "Gradients are on the mask again, also for a torch loop"
    learn = toy_learner()
    fit(learn, 2, cbs=dst(method))
    torch_loop(learn)

def test_a_score_sees_each_method_s_gradient():
    "Dense where it is asked for, on the mask elsewhere"
    for method,dense in (('RigL', {3}), ('SET', set()), ('SNFS', set(range(8)))):
        learn,got = toy_learner(),set()
        def look(learn): got.update({learn.iter} if any(p.grad[~m].any() for _,p,m in masked(learn.model)) else ())
        fit(learn, 1, cbs=[dst(method, 3, stop_pct=.6), At('after_backward', look)])
        assert got == dense

# --- gradients that are not finite

def poison(at, value=math.nan):
    def _f(learn):
        if learn.epoch*8 + learn.iter in at: learn.loss_grad = learn.loss_grad*value
    return At('after_loss', _f)

@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('at,want', [({3}, [4, 6, 9]), ({3, 4}, [5, 6, 9]), ({3, 4, 5, 6}, [7, 9]), ({9, 10, 11}, [3, 6])])
def test_a_gradient_that_is_not_finite_postpones_the_update(value, at, want):
    learn,trace = toy_learner(),Trace()
    start = masks(learn.model)
    cb = dst()
    fit(learn, 2, cbs=[cb, trace, poison(at, value), *watches(learn)])
    changed = [i for i,(a,b) in enumerate(zip([start, *trace.masks], trace.masks)) if not same(a, b)]
    assert [u['step'] for u in cb.updates] == changed == want
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())

def test_one_layer_that_is_not_finite_postpones_all():
    learn = toy_learner()
    def spoil(learn):
        if learn.iter == 3: learn.model[4].weight.grad[0,0] = math.inf
    cb = dst()
    fit(learn, 1, cbs=[cb, At('after_backward', spoil)])
    assert [u['step'] for u in cb.updates] == [4]

def test_gradients_that_are_never_finite_change_nothing():
    learn = toy_learner()
    before = state(learn.model)
    cb = dst(every=1, stop_pct=1.)
    fit(learn, 1, cbs=[cb, poison(range(1, 7)), At('before_step', lambda l: [p.grad.zero_() for p in l.model.parameters()], n=0), At('before_step', raise_(CancelStepException()), n=7)])
    assert cb.updates == [] and same({k: v for k,v in before.items()}, state(learn.model))

class CPUMixedPrecision(MixedPrecision):
    "fastai's, which knows CUDA only, on the CPU: bfloat16 autocast, and the real gradient scaler"
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.**8, enabled=self.kwargs['enabled'])

@each_method
@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_mixed_precision(method, mode):
    learn = toy_learner()
    cb = dst(method)
    fit(learn, 2, cbs=[cb, CPUMixedPrecision(mode), *watches(learn)])
    assert [u['step'] for u in cb.updates] == ([3, 6, 9] if method == 'RigL' else [3, 6, 9, 12])

@each_method
def test_a_step_that_amp_skips_moves_neither_weights_nor_position(method):
    learn,trace,steps = toy_learner(),Trace(),Steps()
    cb = dst(method)
    fit(learn, 2, cbs=[cb, trace, steps, poison({0, 3, 4}, math.inf), CPUMixedPrecision('fp16'), *watches(learn)])
    assert [u['step'] for u in cb.updates][:1] == steps.changed[:1] == [3]
    for i in (3, 4): assert same(trace.weights[i], trace.weights[i-1]) and same(trace.masks[i], trace.masks[i-1])
    assert not same(trace.masks[5], trace.masks[6])                     # two steps, then three more: batches 1, 2, 5 come first
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())

# --- beside fastai's other callbacks

@each_method
@pytest.mark.parametrize('how,kw', [('fit_one_cycle', {}), ('fit_flat_cos', {}), ('fit', dict(wd=.1))])
def test_fit_methods(method, how, kw):
    learn = toy_learner(opt_func=Adam)
    cb = dst(method)
    fit(learn, 2, how=how, cbs=[cb, *watches(learn)], **kw)
    assert len(cb.updates) == (3 if method == 'RigL' else 4)

@each_method
def test_gradient_clip(method):
    learn,norms = toy_learner(),[]
    fit(learn, 1, cbs=[dst(method), GradientClip(.01), At('before_step', lambda l: norms.append(float(torch.stack([p.grad.norm() for p in l.model.parameters()]).norm()))), *watches(learn)])
    assert len(norms) == 8 and max(norms) < .0101

def halves(m): return [params(m[0]), params(m[2:])]

@each_method
def test_a_frozen_layers_mask_stays(method):
    learn = toy_learner(splitter=halves)
    before = masks(learn.model)
    learn.freeze()
    fit(learn, 2, cbs=[dst(method), *watches(learn)])
    now = masks(learn.model)
    assert now['0.weight'].equal(before['0.weight']) and not now['2.weight'].equal(before['2.weight'])
    learn.unfreeze()
    fit(learn, 2, cbs=[dst(method), *watches(learn)])
    assert not masks(learn.model)['0.weight'].equal(now['0.weight'])
    now = masks(learn.model)
    learn.freeze()
    fit(learn, 2, cbs=[dst(method), *watches(learn)])
    assert masks(learn.model)['0.weight'].equal(now['0.weight'])

@each_method
def test_fine_tune(method):
    learn,seen = toy_learner(splitter=halves),[]
    start = masks(learn.model)['0.weight']
    fit(learn, 2, how='fine_tune', freeze_epochs=1, cbs=[dst(method), At('after_fit', lambda l: seen.append(masks(l.model)['0.weight'])), *watches(learn)])
    assert seen[0].equal(start) and not seen[1].equal(start)

def test_layers_that_are_all_frozen_or_chosen():
    learn = toy_learner()
    before = masks(learn.model)
    cb = dst(sparse_modules=[learn.model[2]])
    fit(learn, 1, cbs=[cb, *watches(learn)])
    assert [n for n,m in masks(learn.model).items() if not m.equal(before[n])] == ['2.weight'] and cb.updates[0]['names'] == ['2.weight']
    with pytest.raises(ValueError, match='none of the `sparse_modules` has a mask'): fit(learn, 1, cbs=dst(sparse_modules=[nn.Linear(2, 2)]))
    for given,names in ((learn.model[2], '2'), (learn.model[2:], '24'), ([learn.model], '024')):       # a module, a container
        cb = dst(sparse_modules=given)
        fit(learn, 1, cbs=cb)
        assert cb.updates[0]['names'] == [f'{n}.weight' for n in names]

@each_method
def test_save_model_callback(method, tmp_path):
    learn = toy_learner(path=tmp_path)
    worse = At('after_validate', lambda l: setattr(l.model[4].bias, 'data', l.model[4].bias.data + 10*l.epoch), valid=True)       # the first epoch stays the best
    fit(learn, 3, cbs=[dst(method, 2, stop_pct=1.), SaveModelCallback(with_opt=True), worse, *watches(learn)])
    best = torch.load(tmp_path/'models'/'model.pth', weights_only=False)['model']
    assert same({k: best[k] for k in state(learn.model)}, state(learn.model))
    assert_sparse(learn.model, learn.opt)
    fit(learn, 1, cbs=[dst(method), *watches(learn)])

def test_early_stopping():
    learn = toy_learner(lr=0.)
    cb = dst('SET', 1)
    fit(learn, 9, cbs=[cb, EarlyStoppingCallback(min_delta=100, patience=2), *watches(learn)])
    assert cb.updates[-1]['step'] < 40
    assert_sparse(learn.model, learn.opt)

@each_method
@pytest.mark.parametrize('persistent', [True, False])
def test_export_and_load_learner(method, persistent, tmp_path):
    learn = toy_learner(path=tmp_path, cbs=dst(method) if persistent else None)
    fit(learn, 1, cbs=None if persistent else dst(method))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.export('x.pkl')
        twin = load_learner(tmp_path/'x.pkl')
    assert same(state(learn.model), state(twin.model))
    for l in (learn, twin):
        l.dls = toy_dls()
        before = masks(l.model)
        fit(l, 1, cbs=[*watches(l), *([] if persistent else [dst(method)])])
        assert not same(before, masks(l.model))
        fit(toy_learner(None, model=l.model), 1, cbs=watches(l))            # static

@pytest.mark.parametrize('persistent', [True, False])
@pytest.mark.parametrize('opt', ['momentum', 'adam', 'torch_adam', 'ranger'])
def test_lr_find_leaves_masks_and_weights(opt, persistent, tmp_path):
    cb = dst('SNFS')
    learn = toy_learner(path=tmp_path, opt_func=opts[opt], cbs=cb if persistent else None)
    before = state(learn.model)
    with quiet(learn): learn.lr_find(num_it=12, show_plot=False)
    assert same(before, state(learn.model))
    fit(learn, 1, cbs=[*([] if persistent else [cb]), *watches(learn)])
    before = state(learn.model)
    with quiet(learn): learn.lr_find(num_it=12, show_plot=False)
    assert same(before, state(learn.model))
    assert_sparse(learn.model, learn.opt)
    torch_loop(learn)

@each_method
def test_validation_and_prediction_move_nothing(method):
    learn = toy_learner(cbs=dst(method))
    fit(learn, 1)
    before = state(learn.model)
    with quiet(learn): learn.validate(), learn.get_preds()
    assert same(before, state(learn.model))

class Averaged(Callback):
    "Keeps a deepcopy of the model, averaged after every batch"
    order,run_valid = 200,False
    def before_fit(self): self.copy = copy.deepcopy(self.learn.model)
    def after_batch(self):
        with torch.no_grad():
            for a,b in zip(self.copy.parameters(), self.learn.model.parameters()): a.lerp_(b, .1)
            for a,b in zip(self.copy.buffers(), self.learn.model.buffers()): a.copy_(b)

@each_method
def test_a_callback_that_deepcopies_the_model(method):
    learn,ema = toy_learner(),Averaged()
    x = torch.randn(4, 6)
    fit(learn, 2, cbs=[dst(method), ema, *watches(learn)])
    before = state(learn.model)
    assert ema.copy(x).isfinite().all() and same(masks(ema.copy), masks(learn.model))
    assert_sparse(ema.copy)
    torch_loop(toy_learner(None, model=ema.copy))
    assert same(before, state(learn.model))

@each_method
def test_deepcopy_of_a_trained_model_is_independent(method):
    learn = toy_learner()
    fit(learn, 1, cbs=dst(method))
    twin = toy_learner(None, model=copy.deepcopy(learn.model))
    before = state(learn.model)
    fit(twin, 1, cbs=[dst(method), *watches(twin)])
    assert same(before, state(learn.model)) and not same(masks(twin.model), masks(learn.model))

@each_method
def test_callback_in_a_second_fit_and_a_second_learner(method):
    "State is that of one fit, and nothing of the first learner is held or touched."
    cb = dst(method)
    a,b = toy_learner(),toy_learner()
    fit(a, 1, cbs=cb)
    fit(a, 1, cbs=[cb, *watches(a)])
    assert [u['step'] for u in cb.updates] == ([3] if method == 'RigL' else [3, 6])
    before = state(a.model)
    fit(b, 1, cbs=[cb, *watches(b)])
    assert same(before, state(a.model))
    torch_loop(a)
    alone = toy_learner()
    torch.manual_seed(5); fit(alone, 1, cbs=dst(method))
    again = toy_learner()
    torch.manual_seed(5); fit(again, 1, cbs=cb)
    assert same(state(alone.model), state(again.model))

@each_method
def test_persistent_callback(method):
    cb = dst(method)
    learn = toy_learner(cbs=cb)
    for _ in range(2):
        before = masks(learn.model)
        fit(learn, 1, cbs=watches(learn))
        assert not same(before, masks(learn.model)) and len(cb.updates) == (1 if method == 'RigL' else 2)
    torch_loop(learn)

def test_presets_are_shared_and_not_changed():
    before = {k: dict(v) for k,v in presets.items()}
    for m in presets: fit(toy_learner(), 1, cbs=DST(**presets[m], batches_per_update=2))
    assert before == presets
    DST(**{**RigL_presets, 'stop_pct': 0.6})

def test_two_learners_at_once():
    "One is trained from inside the other's fit"
    a,b = toy_learner(),toy_learner()
    fit(a, 1, cbs=[dst('SNFS'), At('after_backward', lambda l: fit(b, 1, cbs=[dst('RigL'), *watches(b)]), n=3), *watches(a)])

def test_sparsify_a_learner_in_the_midst_of_its_life():
    learn = toy_learner(None, opt_func=Adam)
    fit(learn, 1)
    sparsify_model(learn, .7)
    assert_sparse(learn.model, learn.opt)
    fit(learn, 1, cbs=[dst(), *watches(learn)])
    sparsify_model(learn, .9)
    assert_sparse(learn.model, learn.opt)
    fit(learn, 1, cbs=[dst(), *watches(learn)])

# --- custom scores

def saliency(param, opt): return (param*param.grad).abs()
def age(param, opt, **kw): return kw['mask'].int()
class Noise:
    def __call__(self, param, opt): return torch.rand_like(param)

@pytest.mark.parametrize('keep,grow', [(saliency, gradient_magnitude), (weight_magnitude, age), (partial(saliency), Noise()), (lambda p,o: p.abs() > .1, lambda p,o,**kw: torch.zeros_like(p).long()),
                                       (lambda p,o: torch.full_like(p, -math.inf), lambda p,o: torch.full_like(p, math.inf))])
def test_custom_scores(keep, grow):
    learn = toy_learner()
    before = counts(learn.model)
    cb = DST(batches_per_update=2, keep_score_f=keep, grow_score_f=grow)
    fit(learn, 2, cbs=[cb, *watches(learn)])
    assert len(cb.updates) == 5 and counts(learn.model) == before

@pytest.mark.parametrize('bad,say', [(lambda p,o: p.grad.t(), 'shape'), (lambda p,o: 'x', 'str'), (lambda p,o: p/0*0, 'NaN'), (lambda p: p, 'argument'), (lambda p,o: 1/0, 'zero')])
@each_method
def test_a_score_that_fails_names_the_layer_and_moves_nothing(method, bad, say):
    learn,trace = toy_learner(),Trace()
    before = masks(learn.model)
    def grow(p, opt, name): return bad(p, opt) if name == '2.weight' else p.abs()
    with pytest.raises(ValueError, match=f'(?s)grow.*layer .2.weight.*{say}.*No mask was changed'): fit(learn, 1, cbs=[trace, dst(method, grow_score_f=grow)])
    assert same(before, masks(learn.model)) and len(trace.masks) == 3
    assert_sparse(learn.model, learn.opt)
    if method == 'RigL': assert same(trace.weights[-1], params_of(learn))

def run_seeded(method, seed=3, threads=1):
    torch.set_num_threads(threads)
    learn = toy_learner(opt_func=Adam)
    torch.manual_seed(seed)
    fit(learn, 2, cbs=dst(method))
    return state(learn.model)

@each_method
def test_same_seed_same_masks_at_one_and_two_threads(method):
    a = run_seeded(method)
    assert same(a, run_seeded(method)) and same({k: v for k,v in a.items() if 'mask' in k}, {k: v for k,v in run_seeded(method, threads=2).items() if 'mask' in k})
    if method == 'SET': assert not same(a, run_seeded(method, seed=4))

# --- bad input

@pytest.mark.parametrize('kw', [dict(initial_drop_grow_pct=1), dict(initial_drop_grow_pct=-.1), dict(initial_drop_grow_pct='x'), dict(sparse_modules=RigL_presets), dict(sparse_modules='0'), dict(candidates=-1), dict(stop_pct=0), dict(stop_pct=1.1), dict(stop_pct=math.nan), dict(batches_per_update=0),
                                dict(batches_per_update=2.5), dict(batches_per_update='x'), dict(batches_per_update=math.inf), dict(batches_per_update=-1), dict(keep_score_f='w'), dict(grow_score_f=None), dict(drop_grow_sched=.3)])
def test_bad_arguments(kw):
    with pytest.raises(ValueError, match='score or schedule' if any('_f' in k or 'sched' in k for k in kw) else [*kw][0]): DST(**kw)

@pytest.mark.parametrize('where', [dict(batch_size=None), dict(batch_sampler=[range(i, i+8) for i in range(0, 64, 8)])], ids=str)
def test_accumulation_over_batches_of_unknown_size_is_told(where):
    items = [default_collate(toy_items()[i:i+8]) for i in range(0, 64, 8)] if 'batch_size' in where else toy_items()
    dl = torch.utils.data.DataLoader(items, **where)
    learn = lambda: toy_learner(dls=DataLoaders(dl, dl))
    cb = dst()
    fit(learn(), 1, cbs=cb)
    assert cb.updates
    with pytest.raises(ValueError, match='batch size'): fit(learn(), 1, cbs=[dst(), GradientAccumulation(16)])

@pytest.mark.parametrize('value', [1.5, -.5, math.nan])
def test_a_schedule_out_of_range_is_told(value):
    learn = toy_learner()
    before = masks(learn.model)
    with pytest.raises(ValueError, match='drop_grow_sched'): fit(learn, 1, cbs=dst(drop_grow_sched=lambda s,e,p: value))
    assert same(before, masks(learn.model))

def test_fit_of_no_epochs():
    fit(toy_learner(), 0, cbs=dst('SET', None))

@pytest.mark.parametrize('mask', [torch.ones(16, 6), torch.ones(16, 5).bool()])
def test_a_hand_made_mask_that_cant_be_one_is_told(mask):
    learn = toy_learner(None)
    learn.model[0].register_buffer('weight_mask', mask)
    with pytest.raises(ValueError, match='0.weight.*mask'): fit(learn, 1, cbs=dst())

@pytest.mark.parametrize('opt_func', [SGD, RMSProp, partial(OptimWrapper, opt=T.SGD)])
def test_snfs_without_momentum_is_told_before_anything_moves(opt_func):
    learn = toy_learner(opt_func=opt_func)
    before = state(learn.model)
    with pytest.raises(ValueError, match='momentum'): fit(learn, 1, cbs=dst('SNFS'))
    assert same(before, state(learn.model))
    fit(learn, 1, cbs=[dst('RigL'), *watches(learn)])

def test_a_dense_model_is_told():
    learn = toy_learner(None)
    with pytest.raises(ValueError, match='sparsify_model'): fit(learn, 1, cbs=dst())

def test_a_run_without_any_update_is_told():
    learn = toy_learner()
    with pytest.warns(UserWarning, match='connectivity will not change'), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=DST(**RigL_presets))

def test_metrics():
    learn = toy_learner(metrics=[Sparsity(), EverActive()])
    fit(learn, 2, cbs=dst('SET', 2))
    (_,_,s1,e1),(_,_,s2,e2) = learn.recorder.values
    n = sum(m.numel() for _,_,m in masked(learn.model))
    assert math.isclose(s1, 1 - sum(counts(learn.model).values())/n) and s1 == s2 and 1-s1 < e1 < e2 <= 1

def test_callback_state_round_trip():
    learn = toy_learner()
    cb,sd = dst('SNFS'),{}
    fit(learn, 1, cbs=[cb, At('after_batch', lambda l: sd.update(copy.deepcopy(cb.state_dict())), n=5)])
    assert len(sd['updates']) == 1 and set(sd['off_mask']) == set(counts(learn.model)) and not cb.off_mask

class TestQuickCallback:
    def test_a_missing_event_asks_neither_learner_nor_model(self):
        asked = []
        class Nosy(nn.Sequential):
            def __getattr__(self, name):
                asked.append(name)
                return super().__getattr__(name)
        learn,cb = toy_learner(model=Nosy(nn.Linear(6, 3))),dst()
        learn.add_cb(cb)
        asked.clear()
        for e in ('after_pred', 'after_loss', 'after_step'): assert cb(e) is None
        assert not asked

    def test_an_event_that_comes_later_is_sent(self):
        class Late(DST):
            def after_loss(self): self.got = True
        cb,late = dst(),Late()
        hits = []
        cb.after_pred = lambda: hits.append(1)
        cb('after_pred')
        late('after_loss')
        assert hits == [1] and late.got

    def test_shadowing_the_learner_is_said_once(self):
        learn,cb = toy_learner(),dst()
        learn.add_cb(cb)
        with pytest.warns(UserWarning, match='shadowing'): cb.loss_func = 1
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            cb.loss_func = 2
        assert cb.loss_func == 2

def test_a_torch_loader_over_an_iterable():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(toy_items())
        def __len__(self): return 64
    dl,cb = torch.utils.data.DataLoader(Stream(), batch_size=10),dst()
    fit(toy_learner(dls=DataLoaders(dl, dl)), 2, cbs=cb)
    assert cb.n_steps == 14 and cb.updates

class Branched(nn.Module):
    "Two branches, of which a batch takes one."
    def __init__(self):
        super().__init__()
        self.a,self.b,self.head,self.i = nn.Linear(6, 16),nn.Linear(6, 16),nn.Linear(16, 3),0
    def forward(self, x):
        self.i += self.training
        return self.head((self.a if self.i % 2 else self.b)(x).tanh())

@pytest.mark.parametrize('kernels', [False, True] if kernels_available() else [False])
def test_a_branch_that_the_batch_of_an_update_does_not_take_keeps_its_connections(kernels):
    "Zeros, which fastai leaves for gradients, rate nothing."
    learn = toy_learner(.9, model=Branched())
    cb = DST(**RigL_presets, batches_per_update=4, sparse_kernels=kernels)
    before = masks(learn.model)
    fit(learn, 2, cbs=cb)
    assert len(cb.updates) == 2 and not any('b.weight' in u['names'] for u in cb.updates)
    after = masks(learn.model)
    assert not torch.equal(before['a.weight'], after['a.weight']) and torch.equal(before['b.weight'], after['b.weight'])

class SkipsBackward(Callback):
    "Leaves out backward of one batch, as does a loss that is not finite."
    order = 90
    def __init__(self, at): self.at = at
    def before_backward(self):
        if self.learn.train_iter == self.at: raise CancelBackwardException

@pytest.mark.skipif(not kernels_available(), reason='compares with the kernels')
@pytest.mark.parametrize('at', [3, 4])
@pytest.mark.parametrize('presets', [RigL_presets, SET_presets])
def test_a_batch_without_backward_at_and_after_an_update_is_the_same_on_the_kernels(presets, at):
    "Momentum goes on."
    a,b = (fit(toy_learner(.9, model=toy_net(sizes=(6,64,64,3))), 3, cbs=[SkipsBackward(at), DST(**presets, batches_per_update=3, sparse_kernels=k)]).model.state_dict()
           for k in (False, True))
    assert all(torch.allclose(a[n].float(), b[n].float(), atol=1e-5) for n in a)

def test_a_layer_unfrozen_within_an_epoch_grows_by_its_gradient():
    seen = []
    def grow(p, opt, name=None, mask=None):
        if name == '0.weight': seen.append(int((p.grad[~mask] != 0).sum()))
        return p.grad.abs()
    learn = toy_learner(sparsity=None)
    learn.model[0].weight.requires_grad_(False)
    sparsify_model(learn, .7)
    fit(learn, 1, cbs=[dst(every=4, grow_score_f=grow), At('before_batch', lambda l: l.model[0].weight.requires_grad_(True), n=1)])
    assert seen and min(seen) > 0

@pytest.mark.parametrize('how', [lambda m: nn.utils.prune.l1_unstructured(m, 'weight', .5), nn.utils.parametrizations.weight_norm])
@pytest.mark.parametrize('cb', [lambda: DST(**RigL_presets, batches_per_update=3), SparseKernelsCallback])
def test_a_masked_weight_that_is_computed_now_is_told(how, cb):
    "Pruning overwrites the mask of the same name, and the layer was left out without a word."
    learn = toy_learner(.7)
    how(learn.model[2])
    with pytest.raises(ValueError, match=r'2\.weight: masked, but computed from other parameters'): fit(learn, 1, cbs=cb())

def test_layers_pruned_by_torch_train_beside_masked_ones():
    learn = toy_learner(None)
    learn.model[2].register_buffer('target_sparsity', torch.tensor(.5))      # of the user's own: nothing was masked there
    sparsify_model(learn.model, .7, skip='2.weight')
    nn.utils.prune.random_unstructured(learn.model[2], 'weight', .5)
    cb = DST(**RigL_presets, batches_per_update=3)
    fit(learn, 2, cbs=cb)
    assert cb.updates[0]['names'] == ['0.weight', '4.weight']
