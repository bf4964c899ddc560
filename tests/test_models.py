"Models of all kinds: which weights get masks, and that they stay on them."
import copy, warnings
import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from fastai.basics import Adam, accuracy, CrossEntropyLossFlat
from fastsparse import DynamicSparseTrainingCallback as DST, RigL_presets, sparse_params, sparseable_params, sparsify_model
from conftest import assert_sparse, counts, fit, masked, masks, same, state, toy_dls, toy_learner
from test_callback import Watch, dst, presets, watches

pytestmark = pytest.mark.usefixtures('one_thread')
each_method = pytest.mark.parametrize('method', presets)

class Last(nn.Module):
    "The last step of a recurrent layer's output, and a head"
    def __init__(self, rnn, n): super().__init__(); self.rnn,self.head = rnn,nn.Linear(n, 3)
    def forward(self, x): return self.head(self.rnn(x)[0][:,-1])

class Cell(nn.Module):
    def __init__(self, cell): super().__init__(); self.cell,self.head = cell,nn.Linear(8, 3)
    def forward(self, x):
        h = None
        for t in x.unbind(1): h = self.cell(t, h)
        return self.head(h[0] if isinstance(h, tuple) else h)

class Attend(nn.Module):
    def __init__(self, **kw):
        super().__init__()
        self.attn,self.k,self.v,self.head = nn.MultiheadAttention(8, 2, batch_first=True, **kw),nn.Linear(8, kw.get('kdim', 8)),nn.Linear(8, kw.get('vdim', 8)),nn.Linear(8, 3)
    def forward(self, x): return self.head(self.attn(x, self.k(x), self.v(x))[0].mean(1))

class Tied(nn.Module):
    "Three layers with one weight, one of them transposed by hand"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.head = nn.Linear(8, 8),nn.Linear(8, 8),nn.Linear(8, 3)
        self.b.weight = self.a.weight
    def forward(self, x): return self.head(F.linear(self.b(self.a(x.mean(1)).tanh()).tanh(), self.a.weight.t()))

class TiedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb,self.out = nn.Embedding(3, 8),nn.Linear(8, 3)
        self.out.weight = self.emb.weight
    def forward(self, x): return self.out(x.mean(1) + self.emb((x[:,0,0] > 0).long()))

def seq(*layers): return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))
class View(nn.Module):
    def __init__(self, *shape): super().__init__(); self.shape = shape
    def forward(self, x): return x.reshape(len(x), *self.shape)

# inputs are 4 steps of 8 numbers
models = dict(
    lstm=(lambda: Last(nn.LSTM(8, 8, num_layers=2, bidirectional=True, batch_first=True), 16), 9),
    lstm_proj=(lambda: Last(nn.LSTM(8, 8, proj_size=4, batch_first=True), 4), 4),
    gru=(lambda: Last(nn.GRU(8, 8, batch_first=True), 8), 3),
    rnn=(lambda: Last(nn.RNN(8, 8, batch_first=True), 8), 3),
    lstm_cell=(lambda: Cell(nn.LSTMCell(8, 8)), 3), gru_cell=(lambda: Cell(nn.GRUCell(8, 8)), 3), rnn_cell=(lambda: Cell(nn.RNNCell(8, 8)), 3),
    attention=(Attend, 5), attention_kv=(lambda: Attend(kdim=5, vdim=6), 7), attention_no_bias=(lambda: Attend(bias=False, add_bias_kv=True), 5),
    transformer=(lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(32, 3)), 5),
    decoder=(lambda: Decode(), 7),
    conv1d=(lambda: seq(nn.Conv1d(4, 8, 3), nn.Tanh()), 2),
    conv2d_groups=(lambda: seq(View(4, 2, 4), nn.Conv2d(4, 8, (2, 3), padding=(1, 0), groups=2, dilation=(1, 1), bias=False), nn.BatchNorm2d(8), nn.Tanh()), 2),
    depthwise=(lambda: seq(View(4, 2, 4), nn.Conv2d(4, 8, 2, groups=4), nn.Tanh()), 2),
    conv3d=(lambda: seq(View(1, 4, 2, 4), nn.Conv3d(1, 6, 2), nn.Tanh()), 2),
    transposed1d=(lambda: seq(nn.ConvTranspose1d(4, 8, 3), nn.Tanh()), 2),
    transposed2d=(lambda: seq(View(4, 2, 4), nn.ConvTranspose2d(4, 8, 2, groups=2), nn.Tanh()), 2),
    transposed3d=(lambda: seq(View(1, 4, 2, 4), nn.ConvTranspose3d(1, 4, 2), nn.Tanh()), 2),
    weight_norm=(lambda: seq(nn.Flatten(), old_style(nn.utils.weight_norm, nn.Linear(32, 8)), nn.Tanh()), 2),
    spectral_norm=(lambda: seq(nn.Flatten(), nn.utils.spectral_norm(nn.Linear(32, 8)), nn.Tanh()), 2),
    tied=(Tied, 2), tied_embedding=(TiedEmbedding, 1),
    same_module_twice=(lambda: (lambda l: nn.Sequential(View(32), nn.Linear(32, 8), l, nn.Tanh(), l, nn.Linear(8, 3)))(nn.Linear(8, 8)), 3),
    lazy=(lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3)), 2),
    channels_last=(lambda: seq(View(4, 2, 4), nn.Conv2d(4, 8, 2), nn.Tanh(), nn.Conv2d(8, 8, (1, 2)), nn.Tanh()), 3),
    transposed_storage=(lambda: TransposedStorage(), 2),
    double=(lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 3)), 2))

class TransposedStorage(nn.Module):
    "A weight that isn't contiguous"
    def __init__(self):
        super().__init__()
        self.a,self.head = nn.Linear(32, 8),nn.Linear(8, 3)
        self.a.weight = nn.Parameter(torch.randn(32, 8).t()/6)
    def forward(self, x): return self.head(self.a(x.flatten(1)).tanh())

class Decode(nn.Module):
    def __init__(self): super().__init__(); self.layer,self.head = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True),nn.Linear(8, 3)
    def forward(self, x): return self.head(self.layer(x, x).mean(1))

def old_style(f, m):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(m)

def items(n=32, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, 8, generator=g)
    return list(zip(x.to(dtype), (x[:,0,0] > 0).long() + (x[:,1,1] > 0).long()))

def make(kind):
    "The model, ready, and how many weights of it should get masks"
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = models[kind][0]()
        model(torch.randn(5, 4, 8))
    as_kind = dict(double=dict(dtype=torch.float64), channels_last=dict(memory_format=torch.channels_last))
    return model.to(**as_kind[kind]) if kind in as_kind else model,models[kind][1]

def model_learner(kind, sparsity=.6):
    model,n = make(kind)
    learn = toy_learner(sparsity, model=model, dls=toy_dls(items=items(dtype=next(model.parameters()).dtype)), opt_func=Adam, lr=.01,
                        loss_func=lambda p,y: F.cross_entropy(p.float(), y))        # fastai's Recorder takes single precision only
    return learn,n

@pytest.mark.parametrize('kind', models)
def test_every_weight_is_masked_once_and_trains_on_its_mask(kind):
    "2020 fastsparse crashed on LSTM, GRU and attention, or passed them over."
    for method in (None, 'RigL', 'SNFS'):
        learn,n = model_learner(kind)
        ms = {n_: m for n_,_,m in masked(learn.model)}
        assert len(sparse_params(learn.model)) == n and len({id(m) for m in ms.values()}) == n
        before = masks(learn.model)
        for p in sparse_params(learn.model): assert p.n_active == round(.4*p.n_weights)
        fit(learn, 1, cbs=[Watch(200, sum(p.n_active for p in sparse_params(learn.model))), Watch(-90), *([dst(method, 1, initial_drop_grow_pct=.5)] if method else [])])
        assert same(before, masks(learn.model)) == (method is None)
        assert all(torch.isfinite(p).all() for p in learn.model.parameters())

@pytest.mark.parametrize('kind', models)
def test_copy_save_and_remove(kind, tmp_path):
    learn,n = model_learner(kind)
    if kind not in ('weight_norm', 'spectral_norm'):                # torch itself can't deepcopy these after a forward
        twin = copy.deepcopy(learn.model)
        assert same(state(twin), state(learn.model)) and len(sparse_params(twin)) == n
    x = learn.dls.one_batch()[0]
    learn.path = tmp_path
    fit(learn, 1, cbs=dst('SET', 2))
    learn.save('m')
    saved = state(learn.model)
    with torch.no_grad(): want = learn.model.eval()(x)
    fit(learn, 1, cbs=dst('SET', 2))
    learn.load('m')
    assert same(saved, state(learn.model))
    with torch.no_grad(): assert torch.allclose(learn.model.eval()(x), want, atol=1e-6)
    from fastsparse import add_mask_hooks
    add_mask_hooks(learn.model).remove()
    assert_sparse(learn.model)
    assert not any(m._forward_pre_hooks and 'MaskHook' in str(m._forward_pre_hooks) for m in learn.model.modules())

def test_names_of_what_is_sparseable():
    assert [p.name for p in sparseable_params(nn.LSTM(4, 4, 2))] == ['weight_ih_l0', 'weight_hh_l0', 'weight_ih_l1', 'weight_hh_l1']
    assert [p.name for p in sparseable_params(nn.MultiheadAttention(4, 1))] == ['in_proj_weight', 'out_proj.weight']
    assert [p.name for p in sparseable_params(nn.MultiheadAttention(4, 1, kdim=2, vdim=3))] == ['q_proj_weight', 'k_proj_weight', 'v_proj_weight', 'out_proj.weight']
    assert [p.name for p in sparseable_params(nn.Sequential(nn.Embedding(3, 3), nn.LayerNorm(3), nn.BatchNorm1d(3), nn.PReLU(), nn.Bilinear(2, 2, 2)))] == []

def test_tied_weights_are_masked_once_and_counted_once():
    m = Tied()
    sparsify_model(m, .5)
    assert [p.name for p in sparse_params(m)] == ['a.weight', 'head.weight'] and m.a.weight is m.b.weight and 'weight_mask' not in m.b._buffers
    twin = copy.deepcopy(m)
    assert twin.a.weight is twin.b.weight
    assert len(m.a.weight._backward_hooks) == 1

def test_attention_fast_path_uses_masked_weights():
    torch.manual_seed(0)
    m = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.)
    sparsify_model(m, .7)
    x = torch.randn(2, 4, 8)
    slow = m(x)
    with torch.no_grad(): assert torch.allclose(m.eval()(x), slow, atol=1e-6)

def test_module_without_bias_and_nested_and_eval_mode():
    "ActuallySparse broke on nested models, `bias=None`, `train()` and `eval()`."
    m = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(8, 8, bias=False))), nn.Dropout(.5), nn.Linear(8, 3, bias=False))
    sparsify_model(m, .5)
    assert set(counts(m)) == {'0.0.0.weight', '2.weight'}
    m.eval(); m.train(); m.eval()
    x = torch.randn(3, 8)
    assert m(x).equal(m(x))
    assert_sparse(m)

# --- what can't be sparse

def unchanged(model, match, *args, **kw):
    before,hooks = {k: v for k,v in model.state_dict().items() if type(v).__name__ != 'UninitializedParameter'},[dict(m._forward_pre_hooks) for m in model.modules()]
    before = {k: v.clone() for k,v in before.items()}
    with pytest.raises(ValueError, match=match): sparsify_model(model, .5, *args, **kw)
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k,v in before.items()) and not [k for k in after if k.endswith('_mask')]
    assert [dict(m._forward_pre_hooks) for m in model.modules()] == hooks

@pytest.mark.parametrize('dtype', [torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_integer_and_complex_weights(dtype):
    l = nn.Linear(4, 4)
    l.weight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    unchanged(nn.Sequential(nn.Linear(4, 4), l), str(dtype).replace('torch.', ''))

@pytest.mark.parametrize('dtype', [torch.int8, torch.complex64])
def test_what_cant_be_sparse_can_be_skipped(dtype):
    l = nn.Linear(4, 4)
    l.weight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    m = nn.Sequential(nn.Linear(4, 4), l, nn.LazyLinear(3))
    sparsify_model(m, .5, skip=['1', nn.LazyLinear])
    assert set(counts(m)) == {'0.weight'}

def test_lazy_layer(): unchanged(nn.Sequential(nn.Linear(4, 4), nn.LazyConv2d(4, 3)), '1.weight.*not initialised')
def test_empty_model(): unchanged(nn.Sequential(), 'no sparseable layer')
def test_model_without_sparseable_layer(): unchanged(nn.Sequential(nn.Embedding(3, 3), nn.LayerNorm(3)), 'no sparseable layer.*Linear')
def test_layer_without_weights(): unchanged(old_style(lambda _: nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 4)), None), '0.weight')

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(dtype):
    m = nn.Linear(10, 10).to(dtype)
    sparsify_model(m, .9, sparse_init_mode='fan_in')
    assert counts(m) == {'weight': 10} and m.weight.dtype is dtype
    assert_sparse(m)

class Double(nn.Module):
    def forward(self, w): return 2*w

@pytest.mark.parametrize('wrap', [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal, lambda m: parametrize.register_parametrization(m, 'weight', Double())])
def test_a_computed_weight_is_left_alone(wrap):
    "Its parameter isn't the layer's own; the others are masked"
    torch.manual_seed(0)
    m = nn.Sequential(nn.Flatten(), wrap(nn.Linear(32, 8)), nn.Tanh(), nn.Linear(8, 3))
    with pytest.warns(UserWarning, match='stay dense: 1.weight$'): learn = toy_learner(.6, model=m, dls=toy_dls(items=items()))
    assert set(counts(m)) == {'3.weight'}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        sparsify_model(nn.Sequential(wrap(nn.Linear(8, 8)), nn.Linear(8, 3)), .5, skip='0')
    with pytest.raises(ValueError, match='not parametrizations'): sparsify_model(wrap(nn.Linear(8, 8)), .5)
    fit(learn, 1, cbs=[dst('RigL', 2), *watches(learn)])

def test_frozen_weights_are_masked_and_never_moved():
    m = nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 3))
    m[1].requires_grad_(False)
    learn = toy_learner(.6, model=m, dls=toy_dls(items=items()))
    before = masks(m)
    fit(learn, 1, cbs=[dst('SNFS', 2), *watches(learn)])
    assert masks(m)['1.weight'].equal(before['1.weight']) and not masks(m)['3.weight'].equal(before['3.weight'])

class Sometimes(nn.Module):
    "A layer that not every batch uses"
    def __init__(self): super().__init__(); self.a,self.b,self.never,self.n = nn.Linear(32, 3),nn.Linear(32, 3),nn.Linear(32, 3),0
    def forward(self, x):
        self.n += 1
        return (self.a if self.n % 3 else self.b)(x.flatten(1))

@each_method
def test_layers_that_a_batch_does_not_use(method):
    learn = toy_learner(.6, model=Sometimes(), dls=toy_dls(items=items()))
    before = masks(learn.model)
    fit(learn, 2, cbs=[dst(method, 2), *watches(learn)])
    assert masks(learn.model)['never.weight'].equal(before['never.weight'])

# --- fastai's applications

@each_method
def test_tabular_learner(method):
    from fastai.tabular.all import CategoryBlock, Categorify, Normalize, TabularDataLoaders, tabular_learner
    import numpy as np, pandas as pd
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.normal(size=96).astype('float32'), b=rng.normal(size=96).astype('float32'), c=rng.choice(list('xyz'), 96)))
    df['y'] = ((df.a + df.b > 0).astype(int)).map({0: 'no', 1: 'yes'})
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=['c'], cont_names=['a', 'b'], y_names='y', y_block=CategoryBlock(), bs=16, valid_idx=list(range(80, 96)))
    learn = tabular_learner(dls, layers=[20, 10], n_out=2, metrics=accuracy)
    sparsify_model(learn, .6)
    assert set(counts(learn.model)) == {'layers.0.0.weight', 'layers.1.0.weight', 'layers.2.0.weight'}
    before = masks(learn.model)
    fit(learn, 2, how='fit_one_cycle', cbs=[dst(method, 2), *watches(learn)])
    assert not same(before, masks(learn.model))

def language_model():
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
    from fastai.text.models.core import get_language_model
    torch.manual_seed(0)
    return get_language_model(AWD_LSTM, 20, config={**awd_lstm_lm_config, 'emb_sz': 12, 'n_hid': 16, 'n_layers': 2})

@pytest.mark.parametrize('method,skip_decoder', [(None, False), ('RigL', True), ('SET', False), ('SNFS', False)])
def test_text_learner(method, skip_decoder):
    "AWD_LSTM: fastai's WeightDropout holds the raw recurrent weights, and the decoder's are tied to the embedding's"
    from fastai.callback.rnn import ModelResetter, rnn_cbs
    g = torch.Generator().manual_seed(0)
    seqs = torch.randint(20, (24, 8), generator=g)
    learn = toy_learner(None, model=language_model(), dls=toy_dls(bs=4, items=[(s[:-1], s[1:]) for s in seqs]), loss_func=CrossEntropyLossFlat(), opt_func=Adam, lr=.01)
    learn.add_cbs(rnn_cbs(alpha=2, beta=1))
    sparsify_model(learn, .6, skip='1.decoder' if skip_decoder else None)
    want = {f'0.rnns.{i}.{n}' for i in (0, 1) for n in ('weight_hh_l0_raw', 'module.weight_ih_l0')}
    assert {p.name for p in sparse_params(learn.model)} == (want if skip_decoder else want | {'1.decoder.weight'})
    before = masks(learn.model)
    fit(learn, 2, cbs=[*watches(learn), *([dst(method, 2)] if method else [])])
    assert same(before, masks(learn.model)) == (method is None)
    for r in learn.model[0].rnns:                                       # the weight that the LSTM really used
        learn.model.eval(); learn.model.reset()
        with torch.no_grad(): learn.model(seqs[:2])
        assert not r.module.weight_hh_l0.detach()[~r.weight_hh_l0_raw_mask].any()
    if not skip_decoder: assert learn.model[1].decoder.weight is learn.model[0].encoder.weight

@pytest.fixture(scope='module')
def images():
    "Three classes of noise of different brightness, through fastai's vision pipeline"
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, PILImage
    import numpy as np
    rng = np.random.default_rng(0)
    arrays = [(rng.random((32, 32, 3))*85 + 85*(i % 3)).astype('uint8') for i in range(16)]
    block = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: PILImage.create(arrays[i]), get_y=lambda i: 'abc'[i % 3], splitter=lambda o: (list(range(12)), list(range(12, 16))))
    return block.dataloaders(list(range(16)), bs=4, num_workers=0)

def test_vision_learner(images):
    "The README's four lines"
    from fastai.vision.all import resnet18, vision_learner
    from fastsparse import erdos_renyi_sparsity
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = vision_learner(images, resnet18, pretrained=False, metrics=accuracy)
    hooks = sparsify_model(learn.model, 0.95, sparse_f=erdos_renyi_sparsity)
    ps = sparseable_params(learn.model)
    n = sum(p.n_active for p in ps)
    assert abs(n - .05*sum(p.n_weights for p in ps)) <= len(ps)/2                  # each layer rounds
    before = masks(learn.model)
    fit(learn, 1, how='fit_one_cycle', cbs=DST(**RigL_presets, batches_per_update=1))
    assert not same(before, masks(learn.model)) and sum(p.n_active for p in ps) == n
    hooks.remove()
    assert_sparse(learn.model, learn.opt)
