"The torch-level engine: schedules, distributions, scores, masks. Nothing here needs fastai."
import ast, configparser, copy, math, pickle, re, subprocess, sys, warnings
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
import fastsparse
from fastsparse import (add_mask_hooks, apply_masks, dense_grad, erdos_renyi_sparsity, first_layer_dense_uniform, gradient_magnitude, gradient_momentum,
                        momentum_redistribution, random_score, sparse_params, sparseable_params, sparsify_model, uniform_sparsity, weight_magnitude)
from fastsparse.schedule import cumulative_steps, drop_fraction, is_update_step, sched_const, sched_cos, sched_lin
from fastsparse.score import has_momentum, needs_dense_grad, opt_slots, opt_state
from fastsparse.topology import dense_gradients, drop_and_grow, n_kept, set_masks, share_out, sparse_mask, top_k_mask
from conftest import assert_sparse, counts, masked, masks, same, state, toy_net

pytestmark = pytest.mark.usefixtures('one_thread')
quick = settings(max_examples=40, deadline=None)
root = Path(__file__).parent.parent
pct = st.floats(0, 0.999, allow_nan=False)
shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)

def masked_linear(n_in=8, n_out=6, sparsity=0.5, seed=0):
    torch.manual_seed(seed)
    m = nn.Linear(n_in, n_out)
    sparsify_model(m, sparsity)
    return m, sparse_params(m)

# --- schedules

@quick
@given(st.floats(0, 1), st.floats(0.01, 0.99), st.floats(0.05, 1))
def test_cosine_decay_is_the_papers(pos, initial, stop):
    want = initial/2*(1 + math.cos(math.pi*pos/stop)) if pos < stop else 0
    assert math.isclose(drop_fraction(pos, initial, stop), want, abs_tol=1e-9)

@pytest.mark.parametrize('sched', [sched_cos, sched_lin])
def test_decays_run_from_start_to_end(sched):
    xs = [sched(0.4, 0.1, i/20) for i in range(21)]
    assert math.isclose(xs[0], .4) and math.isclose(xs[-1], .1) and xs == sorted(xs, reverse=True)
    assert sched_const(0.4, 0.1, 0.9) == 0.4

@quick
@given(st.integers(0, 60), st.integers(1, 20), st.floats(0.05, 1))
def test_update_steps(n, every, stop):
    got = [s for s in range(n) if is_update_step(s, n, every, stop)]
    assert got == [s for s in range(1, n-1) if s % every == 0 and s < stop*n]       # neither the first nor the last

@quick
@given(st.lists(st.integers(1, 9), min_size=0, max_size=7), st.integers(0, 4), st.integers(1, 20))
def test_cumulative_steps_is_a_replay(sizes, n_epoch, n_acc):
    seen,steps,want = 0,0,[0]
    for _ in range(n_epoch):
        for b in sizes:
            seen += b
            if seen >= n_acc: seen,steps = 0,steps+1
        want.append(steps)
    assert cumulative_steps(sizes, n_epoch, n_acc) == want

# --- counts

@quick
@given(shapes, pct)
def test_random_mask_count_is_exact(shape, s):
    m = sparse_mask(shape, s)
    assert m.dtype is torch.bool and m.shape == shape and int(m.sum()) == round((1-s)*math.prod(shape)) == n_kept(math.prod(shape), s)

@quick
@given(shapes, pct, pct)
def test_random_masks_nest(shape, a, b):
    old = sparse_mask(shape, a)
    new = sparse_mask(shape, b, within=old)
    assert int(new.sum()) == n_kept(old.numel(), b)
    assert (new <= old).all() or (old <= new).all()

def test_random_mask_is_uniform():
    torch.manual_seed(0)
    hits = sum(sparse_mask((40,), 0.75).double() for _ in range(4000))
    assert abs(hits/4000 - .25).max() < 5*math.sqrt(.25*.75/4000)

@quick
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4), pct, st.sampled_from([uniform_sparsity, erdos_renyi_sparsity, first_layer_dense_uniform]))
def test_sparsified_counts_are_exact(dims, s, sparse_f):
    model = nn.Sequential(*[nn.Linear(i, o) for i,o in dims])
    want = sparse_f([l.weight for l in model], s)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        sparsify_model(model, s, sparse_f=sparse_f)
    for p,w in zip(sparseable_params(model), want):
        assert p.n_active == round((1-w)*p.n_weights) and (p.mask is None) == (w == 0)
    if masked(model): assert_sparse(model)

@quick
@given(st.data())
def test_update_drops_as_many_as_it_grows_in_each_layer(data):
    f,s = data.draw(st.floats(0, .99)),data.draw(pct)
    model = nn.Sequential(*[nn.Linear(data.draw(st.integers(1, 9)), data.draw(st.integers(2, 9))) for _ in range(3)])
    sparsify_model(model, s)
    ps = sparse_params(model)
    if not ps: return
    before = [p.n_active for p in ps]
    old = [p.mask.clone() for p in ps]
    ms = drop_and_grow(ps, None, f, weight_magnitude, random_score)
    assert [p.mask.equal(o) for p,o in zip(ps, old)] == [True]*len(ps)      # deciding changes nothing
    assert [int(m.sum()) for m in ms] == before
    for o,m,n in zip(old, ms, before): assert int((o & ~m).sum()) == int((m & ~o).sum()) <= int(f*n)
    set_masks(ps, ms)
    assert_sparse(model)

@quick
@given(st.data())
def test_redistribution_keeps_the_models_count(data):
    model = nn.Sequential(*[nn.Linear(data.draw(st.integers(1, 9)), data.draw(st.integers(2, 9))) for _ in range(4)])
    sparsify_model(model, data.draw(st.floats(.05, .95)))
    ps = sparse_params(model)
    for _ in range(3):
        total,claims = sum(p.n_active for p in ps),{p.name: data.draw(st.sampled_from([0., 1e-9, .3, 1., 1e9])) for p in ps}
        ms = drop_and_grow(ps, None, data.draw(st.floats(0, .9)), weight_magnitude, random_score, lambda p,opt,name: claims[name])
        assert sum(int(m.sum()) for m in ms) == total
        set_masks(ps, ms)
        assert_sparse(model)

def test_a_layer_made_dense_by_redistribution_can_shrink_again():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(30, 30))
    sparsify_model(model, .5)
    ps,total = sparse_params(model),8 + 450
    def turn(first):
        set_masks(ps, drop_and_grow(ps, None, .5, weight_magnitude, random_score, lambda p,o,name: float((name == '0.weight') == first)))
        return [p.n_active for p in ps]
    assert turn(True) == [16, 442]
    assert sum(turn(True)) == total and ps[0].n_active == 16
    assert turn(False) == [8, 450]

@quick
@given(st.integers(0, 60), st.lists(st.tuples(st.sampled_from([0., 1e-12, .1, .5, 1., 3., 1e12]), st.integers(0, 30)), min_size=1, max_size=6))
def test_share_out_adds_up_and_fits(total, layers):
    claims,room = [c for c,_ in layers],[r for _,r in layers]
    total = min(total, sum(room))
    got = share_out(total, claims, room)
    assert sum(got) == total and all(0 <= g <= r for g,r in zip(got, room))

@quick
@given(st.integers(0, 500), st.lists(st.floats(0.01, 10), min_size=1, max_size=12))
def test_share_out_is_proportional(total, claims):
    "Each layer within one connection of its exact share, where there is room"
    got = share_out(total, claims, [total]*len(claims))
    assert all(abs(g - total*c/sum(claims)) < 1 + 1e-9 for g,c in zip(got, claims))

def test_largest_remainders_get_the_rest(): assert share_out(7, [3., 1.], [99, 99]) == [5, 2] and share_out(9, [1.]*10, [99]*10) == [1]*9 + [0]

# --- choosing

@quick
@given(st.lists(st.sampled_from([-math.inf, -1., 0., 0., 2., 2., math.inf]), min_size=1, max_size=30), st.data())
def test_top_k_takes_the_best_candidates(xs, data):
    s = torch.tensor(xs)
    cand = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(xs), max_size=len(xs))))
    k = data.draw(st.integers(0, int(cand.sum())))
    m = top_k_mask(s, k, cand)
    assert int(m.sum()) == k and (m <= cand).all()
    assert sorted(s[m].tolist()) == sorted(s[cand].tolist())[len(s[cand])-k:]

def wide_scores():
    n,g = 200_003,torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=g)
    return dict(random=x, rising=torch.arange(n).float(), falling=-torch.arange(n).float(), constant=torch.zeros(n), ties=x.round(), few=(x > 4).float(), integers=(x*1e6).long(),
                sparse=torch.where(x > 2, x, -math.inf), high=torch.where(x > 3, math.inf, x), half=x.half(), flags=(x > 1).byte(), periodic=torch.arange(n) % 7, spikes=(torch.arange(n) % 1000 == 3).float())

@pytest.mark.parametrize('kind', wide_scores())
def test_top_k_of_a_wide_layer_is_exact(kind):
    "Large enough for any shortcut; whatever the distribution, the chosen are the best"
    s,g = wide_scores()[kind],torch.Generator().manual_seed(1)
    for density in (1., .5, .01, 1e-4):
        cand = torch.rand(len(s), generator=g) < density
        n = int(cand.sum())
        for k in {0, min(1, n), n//1000, n//10, n*9//10, n}:
            m = top_k_mask(s.view(1, -1), k, cand.view(1, -1)).flatten()
            assert int(m.sum()) == k and (m <= cand).all()
            if 0 < k < n: assert s[m].double().min() >= s[cand & ~m].double().max()
            assert m.equal(top_k_mask(s, k, cand))

@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_any_real_type(dtype):
    m,ps = masked_linear()
    n = ps[0].n_active
    masks = drop_and_grow(ps, None, .5, lambda p,o: (p > 0).to(dtype), lambda p,o: torch.ones_like(p).to(dtype))
    assert int(masks[0].sum()) == n

@pytest.mark.parametrize('value', [-math.inf, math.inf, 0., -5.])
def test_constant_and_infinite_scores_still_count_exactly(value):
    m,ps = masked_linear()
    n = ps[0].n_active
    f = lambda p,o: torch.full_like(p, value)
    for _ in range(3):
        set_masks(ps, drop_and_grow(ps, None, .4, f, f))
        assert ps[0].n_active == n

def test_infinite_scores_rank_first_and_last():
    m,(p,) = masked_linear(sparsity=.5)
    act = p.mask.flatten().nonzero().flatten()
    keep = torch.zeros(p.mask.numel()); keep[act[:3]] = -math.inf; keep[act[3:6]] = math.inf
    new, = drop_and_grow([p], None, 3.01/len(act), lambda *_: keep.view_as(p.mask), lambda q,o,mask: torch.where(mask, -math.inf, 1.))
    assert not new.flatten()[act[:3]].any() and new.flatten()[act[3:]].all()

def test_ties_are_decided_alike_at_any_number_of_threads():
    m,ps = masked_linear(200, 300, .8)
    f = lambda p,o: torch.ones_like(p)
    def decide(n):
        torch.set_num_threads(n)
        return drop_and_grow(ps, None, .3, f, f)[0]
    assert all(decide(n).equal(decide(1)) for n in (1, 2, 1, 2))

def test_just_dropped_may_return_and_keeps_its_value():
    m,(p,) = masked_linear()
    old,w = p.mask.clone(),p.param.detach().clone()
    new = drop_and_grow([p], None, .5, weight_magnitude, lambda q,o,mask: mask.float())     # growth prefers what has just been dropped
    set_masks([p], new)
    assert p.mask.equal(old) and p.param.detach().equal(w)

def test_candidates_are_everything_not_kept():
    m,(p,) = masked_linear(10, 10, .5)
    k = int(.4*p.n_active)
    grown = []
    def grow(q, o, mask):
        s = torch.rand_like(q)
        grown.append(s)
        return s
    old = p.mask.clone()
    new, = drop_and_grow([p], None, .4, weight_magnitude, grow)
    w = p.param.detach().abs().numpy().ravel()
    act = np.flatnonzero(old.numpy().ravel())
    kept = act[np.argsort(-w[act])][:len(act)-k]
    rest = np.setdiff1d(np.arange(w.size), kept)
    want = np.zeros(w.size, bool)
    want[kept] = True
    want[rest[np.argsort(-grown[0].numpy().ravel()[rest])][:k]] = True
    assert (new.numpy().ravel() == want).all()

def test_new_connections_start_at_zero_with_clear_state_and_kept_ones_keep_theirs():
    "2020 fastsparse reset the momentum of the kept weights and left that of the new ones."
    m,(p,) = masked_linear(10, 10, .5)
    opt = torch.optim.Adam(m.parameters(), lr=.1)
    for _ in range(3):
        m(torch.randn(8, 10)).square().sum().backward()
        opt.step(); opt.zero_grad()
    old,w,avg,sq = p.mask.clone(),p.param.detach().clone(),*(opt.state[p.param][k].clone() for k in ('exp_avg', 'exp_avg_sq'))
    with torch.no_grad():                                                   # stale state, as an engine without masked slots would leave
        opt.state[p.param]['exp_avg'][~old] = 7
        p.param[~old] = 7
    new = drop_and_grow([p], opt, .4, weight_magnitude, random_score)
    n_new, = set_masks([p], new, opt)
    fresh,stay = new[0] & ~old,new[0] & old
    assert n_new == int(fresh.sum()) > 0
    for t,before in ((p.param.detach(), w), (opt.state[p.param]['exp_avg'], avg), (opt.state[p.param]['exp_avg_sq'], sq)):
        assert not t[fresh].any() and not t[old & ~new[0]].any()
        assert t[stay].equal(before[stay]) and t[stay].all()

def test_interrupted_commit_is_completed(monkeypatch):
    model = toy_net()
    sparsify_model(model, .6)
    ps,n = sparse_params(model),[]
    new = drop_and_grow(ps, None, .5, weight_magnitude, random_score)
    real = fastsparse.topology._commit
    def once(*args, **kw):
        n.append(1)
        if len(n) == 2: raise KeyboardInterrupt
        return real(*args, **kw)
    monkeypatch.setattr(fastsparse.topology, '_commit', once)
    with pytest.raises(KeyboardInterrupt): set_masks(ps, new)
    assert [p.mask.equal(m) for p,m in zip(ps, new)] == [True]*3
    assert_sparse(model)

# --- scores

def test_weight_gradient_and_random_scores():
    m,(p,) = masked_linear()
    w = p.param
    assert weight_magnitude(w, None).equal(w.detach().abs())
    with pytest.raises(ValueError, match='gradient'): gradient_magnitude(w, None)
    w.grad = -torch.arange(48.).view(6, 8)
    assert gradient_magnitude(w, None).equal(torch.arange(48.).view(6, 8))
    torch.manual_seed(3); a = random_score(w, None)
    torch.manual_seed(3); assert a.equal(torch.rand(6, 8)) and not a.equal(random_score(w, None))

@pytest.mark.parametrize('name', ['sgd', 'adam', 'adamw', 'amsgrad'])
def test_momentum_of_torch_optimizers_is_absolute(name):
    "2020 fastsparse grew by signed momentum, so a large negative one never grew; and read no torch optimizer."
    m = nn.Linear(4, 3)
    T = torch.optim
    opt = dict(sgd=partial(T.SGD, momentum=.9), adam=T.Adam, adamw=T.AdamW, amsgrad=partial(T.Adam, amsgrad=True))[name](m.parameters(), lr=.1)
    with pytest.raises(ValueError, match='momentum'): gradient_momentum(m.weight, opt)
    m.weight.grad = -torch.arange(1., 13).view(3, 4)
    opt.step()
    s = gradient_momentum(m.weight, opt)
    assert (s > 0).all() and has_momentum(opt)
    st_ = opt.state[m.weight]
    want = st_['momentum_buffer'].abs() if name == 'sgd' else (st_['exp_avg']/(st_['exp_avg_sq'].sqrt() + 1e-8)).abs()
    assert torch.allclose(s, want)
    mask = torch.zeros(3, 4, dtype=torch.bool); mask[0] = True
    assert math.isclose(momentum_redistribution(m.weight, opt, mask=mask), float(s[0].mean()), rel_tol=1e-6)
    assert momentum_redistribution(m.weight, opt, mask=~(mask | True)) == 0
    assert set(opt_slots(opt, m.weight)) == {k for k,v in st_.items() if k != 'step'}

def test_no_momentum_is_known():
    ps = [nn.Parameter(torch.ones(2))]
    assert not has_momentum(torch.optim.SGD(ps, lr=1)) and opt_state(None, ps[0]) == {} and opt_slots(None, ps[0]) == {}

def two(param, opt): return param.abs()
def kws(param, opt, **kw):
    assert kw['mask'].shape == param.shape and kw['name'] == 'weight'
    return param.abs()
def named(param, opt, mask): return mask*param.abs()
def scaled(param, opt, scale=1): return param.abs()*scale
class Obj:
    def __call__(self, param, opt): return param.abs()

@pytest.mark.parametrize('f', [two, kws, named, scaled, partial(scaled, scale=2), partial(kws, other=1), lambda p,o: p.abs(), lambda p,o,**kw: p.abs(), Obj(),
                               lambda p,o,*args: p.abs(), lambda p,o,mask=None,name=None: p.abs()], ids=str)
def test_scores_of_any_signature(f):
    m,ps = masked_linear()
    a = drop_and_grow(ps, None, .5, f, lambda p,o: torch.ones_like(p))
    b = drop_and_grow(ps, None, .5, weight_magnitude, lambda p,o: torch.ones_like(p))
    assert a[0].equal(b[0])

def raising(param, opt): raise RuntimeError('out of luck')
bad_scores = dict(shape=(lambda p,o: p[0], 'shape'), scalar=(lambda p,o: p.sum(), 'shape'), none=(lambda p,o: None, 'NoneType'), number=(lambda p,o: 1., 'float'),
                  numpy=(lambda p,o: p.numpy(), 'ndarray'), complex=(lambda p,o: p*1j, 'complex'), nan=(lambda p,o: p*math.nan, 'NaN'), raises=(raising, 'out of luck'))

@pytest.mark.parametrize('kind', bad_scores)
@pytest.mark.parametrize('role', ['keep', 'grow'])
def test_bad_score_names_the_layer_and_changes_nothing(kind, role):
    f,say = bad_scores[kind]
    model = toy_net()
    sparsify_model(model, .6)
    before = state(model)
    def only_last(p, o, name): return f(p, o) if name == '4.weight' else p.abs()
    args = (only_last, random_score) if role == 'keep' else (weight_magnitude, only_last)
    with pytest.raises(ValueError, match=f"(?s)4.weight.*{say}"): drop_and_grow(sparse_params(model), None, .5, *args)
    assert same(before, state(model))

@pytest.mark.parametrize('value', [math.nan, -1., math.inf, 'much', None])
def test_bad_redistribution_names_the_layer(value):
    model = toy_net()
    sparsify_model(model, .6)
    before = state(model)
    def claim(p, o, name): return value if name == '2.weight' else 1.
    with pytest.raises(ValueError, match='claim.*2.weight'): drop_and_grow(sparse_params(model), None, .5, weight_magnitude, random_score, claim)
    assert same(before, state(model))

def test_scores_say_when_they_need_the_dense_gradient():
    assert [needs_dense_grad(f) for f in (None, weight_magnitude, random_score, gradient_magnitude, gradient_momentum, momentum_redistribution)] == \
        ['never', 'never', 'never', 'update', 'always', 'never']
    assert needs_dense_grad(two) == 'update' and needs_dense_grad(partial(gradient_momentum, x=1)) == 'always'
    assert needs_dense_grad(dense_grad('never')(lambda p,o: p)) == 'never'
    with pytest.raises(ValueError): dense_grad('sometimes')

# --- distributions

@quick
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3])), min_size=1, max_size=6), pct, st.booleans(), st.sampled_from([1., .5, 0.]))
def test_erdos_renyi(dims, s, kernel, power):
    ps = [torch.empty(o, i, k, k) for o,i,k in dims]
    got = erdos_renyi_sparsity(ps, s, include_kernel=kernel, erk_power_scale=power)
    assert all(0 <= g < 1 for g in got)
    n = [p.numel() for p in ps]
    assert math.isclose(sum((1-g)*k for g,k in zip(got, n)), (1-s)*sum(n), rel_tol=1e-6, abs_tol=1e-6)
    raw = [((o+i+2*k)/(o*i*k*k) if kernel else (o+i)/(o*i))**power for o,i,k in dims]
    eps = [(1-g)/r for g,r in zip(got, raw) if g > 1e-9]
    assert not eps or max(eps)/min(eps) < 1.0001                    # sparse layers share one factor

def test_erdos_renyi_of_the_rigl_paper():
    "LeNet-300-100: the small output layer comes out dense, wide ones sparsest."
    s = erdos_renyi_sparsity([torch.empty(300, 784), torch.empty(100, 300), torch.empty(10, 100)], .9)
    assert s[2] == 0 and s[0] > .9 > s[1]

def test_first_layer_dense():
    model = toy_net()
    sparsify_model(model, .5, sparse_f=first_layer_dense_uniform)
    assert counts(model) == {'2.weight': 96, '4.weight': 18}

@pytest.mark.parametrize('s', [1, 1., -.1, 2, math.nan, math.inf, 'half', None, [.5], True])
def test_sparsity_outside_its_range(s):
    model = toy_net()
    before = state(model)
    with pytest.raises(ValueError, match='share of zeros'): sparsify_model(model, s)
    with pytest.raises(ValueError, match='share of zeros'): sparsify_model(model, .5, sparse_f=lambda ps,_: [.5, .5, s])
    with pytest.raises(ValueError, match='share of zeros'): sparsify_model(model, .5, sparse_f={'2*': s})
    assert same(before, state(model)) and not masked(model)

# --- sparsify_model

def conv_net(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()), nn.Flatten(), nn.Linear(32, 10))

def test_dict_of_patterns():
    model = conv_net()
    sparsify_model(model, .9, sparse_f={'2.*': .75, '*.weight': .5})
    assert counts(model) == {'0.weight': 108, '2.0.weight': 16, '4.weight': 160}       # the first pattern that matches
    model = conv_net()
    sparsify_model(model, .9, sparse_f={'0': 0.})                                      # names of layers do too
    assert counts(model) == {'2.0.weight': n_kept(64, .9), '4.weight': 32}             # the others: the model's
    with pytest.raises(ValueError, match='0.weight.*2.0.weight'): sparsify_model(conv_net(), .9, sparse_f={'head*': .5})

@pytest.mark.parametrize('f,msg', [(lambda ps,s: None, 'returned None'), (lambda ps,s: {'weight': .5}, 'returned {'), ([.5, .5, .5], 'function or a dict'), ({0: .5}, 'names and patterns')])
def test_no_distribution(f, msg):
    with pytest.raises(ValueError, match=msg): sparsify_model(conv_net(), .9, sparse_f=f)

def test_what_went_wrong_in_a_score_is_named():
    m,ps = masked_linear()
    def fisher(p, opt): return opt_state(opt, p)['sqr_avg']
    with pytest.raises(ValueError, match=r"`fisher` failed on layer 'weight': KeyError: 'sqr_avg'\. No mask was changed"):
        drop_and_grow(ps, torch.optim.SGD(m.parameters(), lr=.1), .3, weight_magnitude, fisher)

@pytest.mark.parametrize('bad', [None, 'x', 2., -.1, math.nan])
def test_decays_that_are_no_share(bad):
    with pytest.raises(ValueError, match='drop_grow_sched'): drop_fraction(.1, sched=lambda a,b,p: bad)

def test_an_optimizer_that_has_stepped():
    m = nn.Linear(16, 16)
    opt = torch.optim.Adam(m.parameters())
    def step():
        opt.zero_grad()
        m(torch.randn(4, 16)).square().sum().backward()
        opt.step()
    step()
    sparsify_model(m, .9, opt=opt)
    for _ in range(3):
        step()
        assert_sparse(m, opt)

def test_weight_norm_is_warned_of_outputs_without_connection():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        m = torch.nn.utils.weight_norm(nn.Linear(8, 64))
    with pytest.warns(UserWarning, match='NaN in: weight_v'): sparsify_model(m, .95)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)
        m = torch.nn.utils.weight_norm(nn.Linear(8, 64), dim=None)      # one norm for all
        warnings.simplefilter('error')
        sparsify_model(m, .99)

def test_masked_models_under_torch_func():
    "Gradients, by sample too, second derivatives by some of the weights, ensembles."
    from torch.func import functional_call, grad, hessian, stack_module_state, vmap
    m,x = toy_net(),torch.randn(5, 6)
    sparsify_model(m, .6)
    def loss(ps, x): return functional_call(m, ps, (x,)).square().sum()
    m(x).square().sum().backward()
    for leaf in True,False:
        ps = {n: p if leaf else p.detach() for n,p in m.named_parameters()}
        one,each = grad(loss)(ps, x),vmap(grad(loss), (None, 0))(ps, x[:,None])
        for n,p in m.named_parameters():
            torch.testing.assert_close(one[n].detach(), p.grad)
            torch.testing.assert_close(each[n].detach().sum(0), p.grad)
    twice = grad(lambda ps: loss(ps, x) + loss(ps, x))(ps)
    for n,p in m.named_parameters(): torch.testing.assert_close(twice[n], 2*p.grad)
    h = hessian(loss)({'0.bias': m[0].bias.detach()}, x)['0.bias']['0.bias']
    assert h.shape == (16, 16) and h.any()
    several = [toy_net(seed=i) for i in range(3)]
    for o in several: sparsify_model(o, .6)
    base,(ps,bs) = copy.deepcopy(m).to('meta'),stack_module_state(several)
    def output(ps, bs): return functional_call(base, (ps, bs), (x,))
    torch.testing.assert_close(vmap(output)(ps, bs), torch.stack([o(x) for o in several]))
    each = vmap(grad(lambda ps, bs: output(ps, bs).square().sum()))({n: p.detach() for n,p in ps.items()}, bs)
    for i,o in enumerate(several):
        o(x).square().sum().backward()
        for n,p in o.named_parameters(): torch.testing.assert_close(each[n][i], p.grad)
    vmap(output)(ps, bs).sum().backward()
    assert all(isinstance(p.param, nn.Parameter) for p in sparse_params(m))

def test_masked_models_are_exported():
    m,x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval(),torch.randn(2, 8)
    sparsify_model(m, .5)
    for strict in False,True: torch.testing.assert_close(torch.export.export(m, (x,), strict=strict).module()(x), m(x))

@pytest.mark.parametrize('f', [lambda ps,s: [s], lambda ps,s: [s]*9, lambda ps,s: []])
def test_distribution_of_wrong_length(f):
    model = conv_net()
    before = state(model)
    with pytest.raises(ValueError, match='3 layers'): sparsify_model(model, .9, sparse_f=f)
    assert same(before, state(model))

def skips(m): return dict(name=['2.0.weight'], layer='2.0', glob='2.*', type=nn.Linear, module=m[2][0], many=['0', nn.Linear, m[2][0]][:2])
@pytest.mark.parametrize('how,dense', [('name', '2.0'), ('layer', '2.0'), ('glob', '2.0'), ('type', '4'), ('module', '2.0'), ('many', '0 4')])
def test_skip(how, dense):
    model = conv_net()
    sparsify_model(model, .9, skip=skips(model)[how])
    assert {n[:-7] for n in counts(model)} == {'0', '2.0', '4'} - set(dense.split())

def test_skip_errors_change_nothing():
    model = conv_net()
    before = state(model)
    for skip,say in (('head', 'matches no layer'), (['0', 'nope*'], 'nope'), (3, '3'), ([None], 'None'), ('*', r"skip='\*' leaves no layer")):
        with pytest.raises(ValueError, match=say): sparsify_model(model, .9, skip=skip)
    assert same(before, state(model)) and not masked(model) and not any(m._forward_pre_hooks for m in model.modules())

def test_sparsify_twice_refines():
    model = conv_net()
    sparsify_model(model, .8)
    old = masks(model)
    hooks = sparsify_model(model, .95)
    assert all((m <= old[n]).all() for n,m in masks(model).items())
    assert counts(model) == {n: n_kept(m.numel(), .95) for n,m in old.items()}
    assert len(hooks) == 3 and all(len(m._forward_pre_hooks) == 1 for m in (model[0], model[2][0], model[4]))
    now = masks(model)
    sparsify_model(model, .5)
    assert all((now[n] <= m).all() for n,m in masks(model).items())
    sparsify_model(model, 0.)
    assert all(m.all() for m in masks(model).values())                      # it had a mask, so it keeps one
    assert [float(p.target) for p in sparse_params(model)] == [0, 0, 0]

def test_a_mask_put_there_by_hand_is_respected():
    model = nn.Linear(10, 10)
    hand = torch.rand(10, 10) > .7
    model.register_buffer('weight_mask', hand)
    apply_masks(model)
    assert_sparse(model)
    w = model.weight.detach().clone()
    with add_mask_hooks(model) as hooks: assert len(hooks) == 1
    sparsify_model(model, .95)
    assert int(model.weight_mask.sum()) == 5 and (model.weight_mask <= hand).all()
    assert model.weight.detach().equal(w*model.weight_mask)

@pytest.mark.parametrize('mask', [torch.ones(6, 8), torch.ones(6, 7).bool()])
def test_a_hand_made_mask_that_cant_be_one_is_told(mask):
    m = nn.Linear(8, 6)
    m.register_buffer('weight_mask', mask)
    try: sparsify_model(m, .5)
    except ValueError as e: assert 'weight' in str(e) and 'mask' in str(e) and m.weight_mask is mask
    else: assert m.weight_mask.dtype is torch.bool and int(m.weight_mask.sum()) == 24

def test_targets_are_float_buffers_beside_the_parameter():
    model = conv_net()
    sparsify_model(model, .9)
    sd = model.state_dict()
    for n in ('0', '2.0', '4'):
        assert sd[f'{n}.weight_mask'].dtype is torch.bool and sd[f'{n}.weight_sparsity'].dtype is torch.float32 and math.isclose(sd[f'{n}.weight_sparsity'], .9, rel_tol=1e-6)
    assert '4.bias_mask' not in sd and '1.weight_mask' not in sd

def true_fans(m, mask):
    "Fan of each weight by brute force: how many active weights feed its output, and how many its input feeds."
    g,t = getattr(m, 'groups', 1),'Transpose' in type(m).__name__
    fan_in,fan_out = np.zeros(mask.shape),np.zeros(mask.shape)
    a,per = mask.numpy(),mask.shape[0]//g
    for i in range(mask.shape[0]):
        for j in range(mask.shape[1]):
            grp = slice(i//per*per, i//per*per + per)
            fan_in[i,j],fan_out[i,j] = (a[grp,j].sum(), a[i].sum()) if t else (a[i].sum(), a[grp,j].sum())
    return fan_in,fan_out

@pytest.mark.parametrize('make', [lambda: nn.Linear(300, 200), lambda: nn.Conv2d(32, 48, 3), lambda: nn.Conv2d(32, 64, 3, groups=4), lambda: nn.Conv1d(64, 64, 5),
                                  lambda: nn.ConvTranspose2d(32, 48, 3), lambda: nn.ConvTranspose2d(32, 64, 3, groups=4), lambda: nn.LSTMCell(64, 64)], ids=lambda f: str(f()))
@pytest.mark.parametrize('mode', ['fan_in', 'fan_out', 'fan_in_out'])
def test_sparse_init_by_each_units_real_fan(make, mode):
    torch.manual_seed(0)
    m = make()
    sparsify_model(m, .8, sparse_init_mode=mode)
    assert_sparse(m)
    for p in sparse_params(m):
        i,o = true_fans(m, p.mask)
        fan = dict(fan_in=i, fan_out=o, fan_in_out=(i+o)/2)[mode][p.mask.numpy()]
        z = p.param.detach()[p.mask].numpy()*np.sqrt(fan)               # unit variance times the gain's square
        gain2 = 1 if isinstance(m, nn.LSTMCell) else 2
        assert abs((z**2).mean()/gain2 - 1) < 6/math.sqrt(len(z)/2) and abs(z.mean()) < 6*math.sqrt(gain2/len(z))

def test_sparse_init_none_keeps_weights_and_unknown_mode_is_an_error():
    model = toy_net()
    w = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match='fan_in'): sparsify_model(model, .5, sparse_init_mode='kaiming')
    assert not masked(model)
    sparsify_model(model, .5)
    assert model[0].weight.detach().equal(w*model[0].weight_mask)

def test_sparse_init_of_units_without_any_input():
    torch.manual_seed(0)
    m = nn.Linear(50, 200)
    sparsify_model(m, .99, sparse_init_mode='fan_in')
    assert not m.weight_mask.any(1).all() and torch.isfinite(m.weight).all()

def test_enforce_masks_false_installs_nothing():
    model = toy_net()
    hooks = sparsify_model(model, .5, enforce_masks=False)
    assert len(hooks) == 0 and not any(m._forward_pre_hooks for m in model.modules()) and len(masked(model)) == 3
    assert_sparse(model)
    model(torch.randn(4, 6)).sum().backward()
    assert model[0].weight.grad[~model[0].weight_mask].any()
    hooks.remove()

def torch_steps(model, n=3, opt=None, x=None):
    opt = opt or torch.optim.SGD(model.parameters(), lr=.1, momentum=.9, weight_decay=.01)
    for _ in range(n):
        model(torch.randn(8, 6) if x is None else x).square().sum().backward()
        opt.step(); opt.zero_grad()
    return opt

def test_hooks_context_manager_and_idempotence():
    model = toy_net()
    with sparsify_model(model, .6) as hooks:
        add_mask_hooks(model); add_mask_hooks(model)
        assert len(hooks) == 3 and all(len(m._forward_pre_hooks) == 1 for m in model[::2])
        opt = torch_steps(model)
        assert_sparse(model, opt)
        for m in model[::2]: assert len(m.weight._backward_hooks) == 1
    assert len(hooks) == 0 and not any(m._forward_pre_hooks or m._load_state_dict_post_hooks or m.weight._backward_hooks for m in model[::2])
    assert_sparse(model, opt)
    hooks.remove(); hooks.remove()
    before = masks(model)
    torch_steps(model)
    assert same(before, masks(model)) and model[0].weight.detach()[~model[0].weight_mask].any()        # an ordinary model again

@pytest.mark.parametrize('opt', ['sgd', 'nesterov', 'adam', 'adamw', 'rmsprop', 'adagrad'])
def test_no_torch_optimizer_can_move_a_masked_weight(opt):
    T = torch.optim
    make = dict(sgd=T.SGD, nesterov=partial(T.SGD, momentum=.9, nesterov=True), adam=partial(T.Adam, weight_decay=.1, amsgrad=True), adamw=T.AdamW,
                rmsprop=partial(T.RMSprop, momentum=.9, centered=True), adagrad=T.Adagrad)[opt]
    model = toy_net()
    sparsify_model(model, .7)
    o = make(model.parameters(), lr=.1)
    for _ in range(3):
        torch_steps(model, 1, o)
        assert_sparse(model, o)                       # straight after a step, without another forward
    assert sum(p.detach()[m].ne(0).sum() for _,p,m in masked(model)) == sum(counts(model).values())

def test_whatever_is_written_off_the_mask_is_gone_after_the_next_forward():
    model = toy_net()
    sparsify_model(model, .7)
    x = torch.randn(4, 6)
    want = model(x)
    with torch.no_grad():
        for _,p,m in masked(model): p[~m] = math.nan
    assert model(x).equal(want)
    assert_sparse(model)

def test_loading_masks_again():
    "Also a file whose weights aren't zero off its masks, and masks that differ from the model's."
    model,other = toy_net(),toy_net(seed=1)
    sparsify_model(model, .7); sparsify_model(other, .7)
    sd = other.state_dict()
    sd = {k: v + (~sd[f'{k}_mask']) if f'{k}_mask' in sd else v for k,v in sd.items()}
    model.load_state_dict(sd)
    assert same(masks(model), masks(other)) and same(state(model), state(other))
    assert_sparse(model, torch_steps(model))

def test_save_without_a_forward_after_the_last_step(tmp_path):
    "2020 fastsparse masked in the forward only, so a saved model wasn't sparse."
    model = toy_net()
    sparsify_model(model, .9)
    torch_steps(model)
    torch.save(model.state_dict(), tmp_path/'m.pth')
    sd = torch.load(tmp_path/'m.pth', weights_only=True)
    assert sum(int(v.count_nonzero()) for k,v in sd.items() if k.endswith('weight')) <= sum(counts(model).values())

@pytest.mark.parametrize('clone', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_copies_enforce_their_own_masks(clone):
    model = toy_net()
    sparsify_model(model, .7)
    torch_steps(model)
    twin = clone(model)
    before = state(model)
    set_masks(sparse_params(twin), drop_and_grow(sparse_params(twin), None, .5, weight_magnitude, random_score))
    assert_sparse(twin, torch_steps(twin))
    assert same(before, state(model)) and not same(masks(model), masks(twin))
    assert_sparse(model, torch_steps(model))

def test_same_seed_same_masks():
    def run(seed):
        model = toy_net()
        torch.manual_seed(seed)
        sparsify_model(model, .7, sparse_init_mode='fan_in')
        return state(model)
    assert same(run(0), run(0)) and not same(run(0), run(1))

def test_a_layer_left_without_any_connection_is_said():
    with pytest.warns(UserWarning, match='no connection.*0.weight'): sparsify_model(nn.Sequential(nn.Linear(2, 2)), .99)

@pytest.mark.parametrize('what', [None, 3, 'model', [nn.Linear(2, 2)]])
def test_not_a_model(what):
    with pytest.raises(TypeError, match='nn.Module or a Learner'): sparsify_model(what, .5)

# --- the package

def test_growing_by_gradients_that_were_masked_is_told():
    m,ps = masked_linear()
    m(torch.randn(4, 8)).square().sum().backward()
    before = ps[0].mask.clone()
    with pytest.raises(ValueError, match='dense_gradients'): drop_and_grow(ps, None, .5, weight_magnitude, gradient_magnitude)
    assert torch.equal(before, ps[0].mask)
    drop_and_grow(ps, None, .5, weight_magnitude, random_score)
    drop_and_grow(ps, None, .5, weight_magnitude, dense_grad('never')(lambda p, opt: torch.rand_like(p)))

def test_dense_gradients_are_there_for_one_update_and_gone_after():
    m,ps = masked_linear()
    x = torch.randn(4, 8)
    with dense_gradients(m): m(x).square().sum().backward()
    off = m.weight.grad.abs()*~ps[0].mask
    new, = drop_and_grow(ps, None, .5, weight_magnitude, gradient_magnitude)
    grown = new & ~ps[0].mask
    assert off[grown].min() >= off[~new & ~ps[0].mask].max() > 0
    m(x).square().sum().backward()
    assert not m.weight.grad[~ps[0].mask].any()

def numbered():
    "Module name to notebook number"
    res = {}
    for nb in sorted((root/'nbs').glob('[0-9]*.ipynb')):
        m = re.search(r'#\| ?default_exp ([\w.]+)', nb.read_text(encoding='utf-8'))
        if m: res[m[1]] = re.match(r'\d+[a-z]?', nb.name)[0]      # '05' before '05b' before '06a'
    return res

def imports(path):
    "Names that a module imports, anywhere in it: ours as `.name`"
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            mod = '.'*node.level + (node.module or '')
            names = [mod] if node.module and mod != 'fastsparse' else [f'.{a.name}' if node.level else f'{mod}.{a.name}' for a in node.names]
        else: continue
        yield from (re.sub(r'^fastsparse\.', '.', n) for n in names)

def test_nothing_imports_upward():
    order = numbered()
    assert len(order) >= 6
    for mod,n in order.items():
        for imp in imports(root/'fastsparse'/f'{mod}.py'):
            if imp[:1] != '.' or imp[1:] not in order: continue
            assert order[imp[1:]] < n, f'{mod} (notebook {n}) imports {imp[1:]} (notebook {order[imp[1:]]})'

def test_fastai_is_imported_by_the_steps_first():
    order = numbered()
    for mod,n in order.items():
        if n < order['steps']: assert not [i for i in imports(root/'fastsparse'/f'{mod}.py') if i.split('.')[0] in ('fastai', 'torchvision')], mod
        assert ('.steps' in imports(root/'fastsparse'/f'{mod}.py')) == (mod == 'callback'), mod

def test_importing_brings_no_more_than_it_needs():
    "Nothing but the standard library for `fastsparse`, no fastai for its torch level, no vision for the callback"
    order = numbered()
    mods = [m for m,n in order.items() if n < order['steps'] or m == 'reload']
    code = f"""
import sys
def loaded(*names): return [m for m in sys.modules if m.split('.')[0] in names or m in names]
import fastsparse
assert not loaded('torch', 'fastai', 'numpy')
for m in {mods}: __import__('fastsparse.' + m)
fastsparse.sparsify_model, fastsparse.weight_magnitude, fastsparse.load_sparse_model
assert not loaded('fastai', 'torchvision', 'matplotlib', 'pandas')
import fastsparse.callback
from fastai.learner import Learner
assert Learner.load._without_masks      # which zeroes the slots of what a file has pruned
assert loaded('fastai') and not loaded('torchvision', 'fastai.vision')
"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root)
    assert r.returncode == 0, r.stderr

def test_version_is_that_of_settings():
    c = configparser.ConfigParser()
    c.read(root/'settings.ini', encoding='utf-8')
    assert fastsparse.__version__ == c['DEFAULT']['version']

def test_public_names_exist_and_star_import_works():
    assert [n for n in fastsparse.__all__ if not hasattr(fastsparse, n)] == []
    space = {}
    exec('from fastsparse import *', space)
    assert set(fastsparse.__all__) <= set(space) and set(fastsparse.__all__) <= set(dir(fastsparse))
    with pytest.raises(AttributeError): fastsparse.no_such_name
