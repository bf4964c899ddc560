"The sparse layers against dense float64, as PyTorch modules, and inside training."
import copy, gc, io, os, pickle, subprocess, sys, warnings
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from fastsparse import kernels
from fastsparse.layers import *
from fastsparse import layers as L

fast = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
needs_kernels = pytest.mark.skipif(not kernels.kernels_available(), reason='no compiled kernels here')
pytestmark = pytest.mark.filterwarnings('ignore::fastsparse.layers.DenseFallbackWarning')

def rand_mask(shape, density, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density

def masked(layer, density, seed=0):
    "A dense layer with its mask, and one active weight that is zero."
    mask = rand_mask(layer.weight.shape, density, seed)
    layer.weight.data.mul_(mask)
    if mask.any(): layer.weight.data.view(-1)[active_index(mask)[0]] = 0
    layer.register_buffer('weight_mask', mask)
    return layer

def run(layer, x, dy=None):
    "Output, input gradient, parameter gradients."
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    if dy is None: dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    ps = [p for p in layer.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *ps], dy.to(y.dtype))]

def check_against_dense(sparse, dense, x):
    "Every result within float32 rounding of the sum of absolute products in float64."
    d64 = copy.deepcopy(dense).double()
    a64 = copy.deepcopy(d64)
    for p in a64.parameters(): p.data.abs_()
    got,want,scale = run(sparse, x),run(d64, x.double()),run(a64, x.double().abs(), torch.ones(d64(x.double()).shape)*4)
    mask = dense.weight_mask
    for name,g,w,s in zip(('y', 'dx', 'dw', 'db'), got, want, scale):
        if name == 'dw': w,s = w[mask],s[mask]
        assert g.dtype == torch.float32 and g.shape == w.shape
        assert ((g.double()-w).abs() <= 1e-5*s.abs() + 1e-6).all(), name

class TestLinear:
    @fast
    @given(st.integers(1,70), st.integers(1,70), st.lists(st.integers(0,9), min_size=0, max_size=3), st.sampled_from([0,.05,.3,.9,1]),
           st.booleans(), st.integers(0,99))
    def test_against_dense(self, n_in, n_out, lead, density, bias, seed):
        torch.manual_seed(seed)
        dense = masked(nn.Linear(n_in, n_out, bias=bias), density, seed)
        check_against_dense(SparseLinear.from_dense(dense), dense, torch.randn(*lead, n_in))

    def test_every_batch_size(self):
        dense = masked(nn.Linear(33, 29), .2)
        sparse = SparseLinear.from_dense(dense)
        for n in range(0, 131): check_against_dense(sparse, dense, torch.randn(n, 33))

    def test_empty_rows_and_columns(self):
        dense = masked(nn.Linear(20, 12), .5)
        dense.weight_mask[3:5] = dense.weight_mask[:, 7:11] = False
        dense.weight.data.mul_(dense.weight_mask)
        check_against_dense(SparseLinear.from_dense(dense), dense, torch.randn(6, 20))

    def test_short_rows_share_vectors(self):
        "Partial sums of several rows are reduced together; which positions they go to must not depend on luck."
        for seed in range(300):
            g = torch.Generator().manual_seed(seed)
            n_out,n_in,n = (int(torch.randint(2, 40, (), generator=g)) for _ in range(3))
            dense = masked(nn.Linear(n_in, n_out, bias=False), .05, seed)
            x,dy = torch.randn(n, n_in, generator=g),torch.randn(n, n_out, generator=g)
            dw = run(SparseLinear.from_dense(dense), x, dy)[2]
            torch.testing.assert_close(dw, (dy.T@x)[dense.weight_mask], rtol=1e-4, atol=1e-4)

    def test_non_contiguous_input_and_gradient(self):
        dense = masked(nn.Linear(20, 12), .5)
        sparse = SparseLinear.from_dense(dense)
        for x in (torch.randn(20, 6).T, torch.randn(6, 40)[:, ::2], torch.randn(1, 20).expand(6, 20)): check_against_dense(sparse, dense, x)
        x = torch.randn(6, 20, requires_grad=True)
        sparse(x).sum().backward()  # the gradient has stride 0
        torch.testing.assert_close(x.grad, dense.weight.sum(0).expand(6, 20))

    def test_wrong_input(self):
        sparse = SparseLinear(8, 4, sparsity=.5)
        with pytest.raises(ValueError, match='expected 8 features'): sparse(torch.randn(3, 9))
        with pytest.raises(ValueError, match='expected 8 features'): sparse(torch.tensor(1.))

    @needs_kernels
    def test_wrong_dtype(self):
        with pytest.raises(TypeError, match='float64'): SparseLinear(8, 4, sparsity=.5)(torch.randn(3, 8).double())

@st.composite
def convs(draw):
    groups = draw(st.sampled_from([1,1,2,3]))
    kernel = draw(st.tuples(st.integers(1,4), st.integers(1,4)))
    dilation = draw(st.tuples(st.integers(1,3), st.integers(1,3)))
    stride = draw(st.tuples(st.integers(1,3), st.integers(1,3)))
    padding = draw(st.sampled_from(['same', 'valid', 'ints', 'ints']))
    if padding == 'ints': padding = draw(st.tuples(st.integers(0,3), st.integers(0,3)))
    if padding == 'same': stride = (1,1)
    mode = draw(st.sampled_from(['zeros', 'zeros', 'reflect', 'replicate', 'circular']))
    size = draw(st.tuples(st.integers(10,15), st.integers(10,15)))
    return (groups*draw(st.integers(1,6)), groups*draw(st.integers(1,9)), kernel, stride, padding, dilation, groups, draw(st.booleans()), mode), size

class TestConv:
    @fast
    @given(convs(), st.sampled_from([None,0,1,2,5,9]), st.sampled_from([0,.1,.5,1]), st.sampled_from([None,True,False]), st.booleans(), st.integers(0,99))
    def test_against_dense(self, conv, batch, density, hint, channels_last, seed):
        torch.manual_seed(seed)
        args,size = conv
        dense = masked(nn.Conv2d(*args), density, seed)
        x = torch.randn(*([] if batch is None else [batch]), args[0], *size)
        if channels_last and batch: x = x.to(memory_format=torch.channels_last)
        check_against_dense(SparseConv2d.from_dense(dense, hint), dense, x)

    @pytest.mark.parametrize('hint', [True, False, None])
    def test_every_batch_size(self, hint):
        dense = masked(nn.Conv2d(3, 5, 3, padding=1), .4)
        sparse = SparseConv2d.from_dense(dense, hint)
        for n in [*range(0, 35), 63, 64, 65, 127, 128, 129, 130]: check_against_dense(sparse, dense, torch.randn(n, 3, 6, 5))

    def test_asymmetric_padding_by_pad(self):
        dense = masked(nn.Conv2d(3, 5, 3), .4)
        check_against_dense(SparseConv2d.from_dense(dense), dense, F.pad(torch.randn(2, 3, 6, 5), (0,2,1,3)))

    def test_wrong_input(self):
        sparse = SparseConv2d(4, 8, 3, sparsity=.5)
        with pytest.raises(ValueError, match='4 channels'): sparse(torch.randn(2, 3, 8, 8))
        with pytest.raises(ValueError, match='smaller than'): sparse(torch.randn(2, 4, 2, 8))
        with pytest.raises(ValueError, match='expected'): sparse(torch.randn(4, 8))

    def test_depthwise_is_dense_and_says_so(self):
        dense = masked(nn.Conv2d(6, 6, 3, groups=6, padding=1), .5)
        sparse = SparseConv2d.from_dense(dense)
        check_against_dense(sparse, dense, torch.randn(2, 6, 7, 7))
        if kernels.kernels_available(): assert 'depthwise' in why_dense(sparse.geometry, torch.randn(1), sparse.weight)

class TestSparsePropBugs:
    "What goes wrong in SparseProp 0.1.14, one by one."
    @pytest.mark.parametrize('kw', [dict(groups=2), dict(dilation=2), dict(kernel_size=(1,5)), dict(kernel_size=(5,2)), dict(padding=(0,2)),
                                    dict(kernel_size=4, padding='same'), dict(stride=(1,2)), dict(padding=1, padding_mode='reflect')],
                             ids=lambda kw: '-'.join(f'{k}={v}' for k,v in kw.items()))
    def test_groups_dilation_rectangles_and_asymmetric_padding(self, kw):
        dense = masked(nn.Conv2d(8, 12, **{'kernel_size':3, **kw}), .3)
        for hint in (True, False): check_against_dense(SparseConv2d.from_dense(dense, hint), dense, torch.randn(3, 8, 11, 10))

    def test_more_than_32767_nonzeros_in_one_output_channel(self):
        dense = masked(nn.Conv2d(4000, 2, 3, padding=1), 1.)
        sparse = SparseConv2d.from_dense(dense)
        assert int(sparse.indptr[1]) == 36_000
        check_against_dense(sparse, dense, torch.randn(2, 4000, 3, 3))

    def test_state_dict_has_the_structure(self):
        a = SparseConv2d.from_dense(masked(nn.Conv2d(4, 8, 3), .3, 1))
        b = SparseConv2d.from_dense(masked(nn.Conv2d(4, 8, 3), .3, 2))
        b.load_state_dict(a.state_dict())
        assert {'weight', 'indptr', 'indices'} <= set(a.state_dict())
        assert torch.equal(a.mask, b.mask) and torch.equal(a.dense_weight(), b.dense_weight())

    @pytest.mark.parametrize('dense', [nn.Linear(12, 9), nn.Conv2d(3, 5, 3)], ids=['Linear', 'Conv2d'])
    def test_active_weights_of_value_zero_survive_and_learn(self, dense):
        dense.register_buffer('weight_mask', rand_mask(dense.weight.shape, .5))
        dense.weight.data.zero_()
        sparse = (SparseLinear if isinstance(dense, nn.Linear) else SparseConv2d).from_dense(dense)
        x = torch.randn(4, 12) if isinstance(dense, nn.Linear) else torch.randn(4, 3, 6, 6)
        sparse(x).pow(2).sum().add(sparse(x).sum()).backward()
        assert sparse.nnz == int(dense.weight_mask.sum()) and sparse.weight.grad.count_nonzero() == sparse.nnz
        assert torch.equal(sparse.to_dense().weight_mask, dense.weight_mask)

    @pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
    def test_other_dtypes_are_never_computed_in_float32(self, dtype):
        dense = masked(nn.Linear(30, 20), .3)
        sparse,dense,x = SparseLinear.from_dense(dense).to(dtype),dense.to(dtype),torch.randn(5, 30).to(dtype)
        assert sparse(x).dtype == dtype and torch.equal(sparse(x), dense(x))
        assert sparse.indptr.dtype == torch.int64 and sparse.indices.dtype == torch.int32

    def test_installs_no_top_level_module_called_backend(self):
        code = 'import fastsparse.layers, importlib.util as u; assert u.find_spec("backend") is None'
        subprocess.run([sys.executable, '-c', code], check=True, env={**os.environ, 'PYTHONWARNINGS': 'ignore'})

class TestAutograd:
    @pytest.mark.parametrize('sparse,shape', [(SparseLinear(7, 5, sparsity=.6), (3,7)), (SparseConv2d(4, 6, 3, padding=1, stride=2, groups=2, sparsity=.6), (2,4,5,5))],
                             ids=['Linear', 'Conv2d'])
    def test_gradcheck_in_float64(self, sparse, shape):
        sparse = copy.deepcopy(sparse).double()
        def f(x, w, b): return sparse_apply(sparse.geometry, x, w, sparse.indptr, sparse.indices, b)
        args = [torch.randn(shape, dtype=torch.float64, requires_grad=True), sparse.weight, sparse.bias]
        assert torch.autograd.gradcheck(f, args) and torch.autograd.gradgradcheck(f, args)

    def test_gathered_form_of_huge_layers(self, monkeypatch):
        sparse = SparseLinear(7, 5, sparsity=.6).double()
        x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
        want = sparse(x)
        monkeypatch.setattr(L, '_huge', 0)
        torch.testing.assert_close(sparse(x), want)
        def f(x, w, b): return sparse_apply(sparse.geometry, x, w, sparse.indptr, sparse.indices, b)
        assert torch.autograd.gradcheck(f, [x, sparse.weight, sparse.bias])

    @needs_kernels
    @pytest.mark.parametrize('op', [False, True], ids=['eager', 'custom op'])
    def test_double_backward_raises(self, op):
        sparse,x = SparseLinear(7, 5, sparsity=.6),torch.randn(3, 7, requires_grad=True)
        y = sparse.geometry.op(x, sparse.weight, sparse.indptr, sparse.indices, sparse.bias) if op else sparse(x)
        for loss in y.pow(2).sum(),y.sum():      # of the second one, only saved tensors have a second derivative
            g, = torch.autograd.grad(loss, x, create_graph=True, retain_graph=True)
            with pytest.raises(RuntimeError, match='twice|autograd'): g.sum().backward()

    @needs_kernels
    @pytest.mark.parametrize('make,shape', [(lambda: SparseLinear(7, 5, sparsity=.6), (3,7)), (lambda: SparseConv2d(2, 3, 3, sparsity=.5), (2,2,5,5))], ids=['linear', 'conv'])
    def test_double_backward_raises_wherever_it_ends(self, make, shape):
        "No zeros in silence where only some inputs are asked for."
        sparse,x = make(),torch.randn(shape, requires_grad=True)
        for f in torch.autograd.functional.hessian,lambda f, x: torch.autograd.functional.hvp(f, x, x):
            with pytest.raises(RuntimeError, match='twice'): f(lambda x: sparse(x).pow(2).sum(), x.detach())
        g, = torch.autograd.grad(sparse(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match='twice'): g.pow(2).sum().backward(inputs=[sparse.weight])
        want = torch.autograd.grad(sparse(x).pow(2).sum(), [x, *sparse.parameters()])
        for a,b in zip(torch.autograd.grad(sparse(x).pow(2).sum(), [x, *sparse.parameters()], create_graph=True), want): assert a.requires_grad and torch.equal(a, b)

    @needs_kernels
    def test_create_graph_inside_a_checkpoint(self):
        "Which lets nobody read saved tensors twice."
        pre,sparse,out = nn.Linear(7, 7),SparseLinear(7, 5, sparsity=.6),nn.Linear(5, 2)
        x = torch.randn(3, 7)
        def loss(): return out(torch.utils.checkpoint.checkpoint(lambda x: sparse(pre(x)), x, use_reentrant=False)).pow(2).sum()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            loss().backward(create_graph=True)
        got = sparse.weight.grad
        want, = torch.autograd.grad(loss(), sparse.weight)
        torch.testing.assert_close(got, want)

    @pytest.mark.parametrize('n_in,n_out,shape', [(0,5,(2,3,0)), (0,5,(0,)), (5,0,(2,3,5)), (5,0,(5,))])
    def test_no_features(self, n_in, n_out, shape):
        sparse,x = SparseLinear(n_in, n_out, sparsity=.5),torch.zeros(shape, requires_grad=True)
        for f in sparse,lambda x: sparse.geometry.op(x, sparse.weight, sparse.indptr, sparse.indices, sparse.bias):
            y = f(x)
            torch.testing.assert_close(y, sparse.to_dense()(x))
            y.sum().backward()
            assert x.grad.shape == shape and sparse.bias.grad.shape == (n_out,)

    def test_parameters_that_are_not_contiguous(self):
        sparse,x = SparseLinear(7, 5, sparsity=.6),torch.randn(3, 7)
        sparse.weight.data,sparse.bias = torch.randn(sparse.nnz, 2)[:,0],nn.Parameter(torch.ones(1).expand(5))
        torch.testing.assert_close(sparse(x), sparse.to_dense()(x))
        sparse(x).sum().backward()
        torch.testing.assert_close(sparse.weight.grad, x.sum(0)[sparse.indices.long()])

    @needs_kernels
    def test_compiled_forward_mode(self):
        torch._dynamo.reset()
        sparse,x,v = SparseLinear(7, 5, sparsity=.6),torch.randn(3, 7),torch.randn(3, 7)
        def f(x, v): return torch.func.jvp(sparse, (x,), (v,))[1]
        torch.testing.assert_close(torch.compile(f, backend='aot_eager')(x, v), v @ sparse.dense_weight().T)

    def test_loads_into_a_module_without_memory(self):
        sparse,x = SparseLinear(7, 5, sparsity=.6),torch.randn(3, 7)
        m = copy.deepcopy(sparse).to('meta')
        m.load_state_dict(sparse.state_dict(), assign=True)
        assert torch.equal(m(x), sparse(x))

    @needs_kernels
    def test_input_gradient_only_where_asked_for(self):
        sparse = SparseLinear(7, 5, sparsity=.6)
        y = sparse(torch.randn(3, 7))
        assert y.grad_fn.saved_tensors[1] is None
        y.sum().backward()
        sparse.weight.requires_grad_(False)
        x = torch.randn(3, 7, requires_grad=True)
        y = sparse(x)
        assert y.grad_fn.saved_tensors[0] is None
        y.sum().backward()
        torch.testing.assert_close(x.grad, sparse.dense_weight().sum(0).expand(3, 7))

    def test_frozen_and_no_grad(self):
        sparse = SparseLinear(7, 5, sparsity=.6).requires_grad_(False)
        assert not sparse(torch.randn(3, 7)).requires_grad
        with torch.no_grad(): assert not SparseLinear(7, 5, sparsity=.6)(torch.randn(3, 7)).requires_grad
        with torch.inference_mode(): SparseLinear(7, 5, sparsity=.6)(torch.randn(3, 7))

    def test_output_can_be_changed_in_place(self):
        for x in (torch.randn(2, 3, 7), torch.randn(3, 7)):
            y = F.relu_(SparseLinear(7, 5, sparsity=.6)(x))
            y.sum().backward()
        SparseConv2d(3, 5, 3, sparsity=.5)(torch.randn(3, 6, 6)).relu_().sum().backward()

    def test_hooks(self):
        sparse,seen = SparseLinear(7, 5, sparsity=.6),[]
        sparse.register_forward_hook(lambda m, i, o: seen.append('forward'))
        sparse.register_full_backward_hook(lambda m, i, o: seen.append('backward'))
        sparse.weight.register_hook(lambda g: seen.append(tuple(g.shape)))
        sparse(torch.randn(3, 7, requires_grad=True)).sum().backward()
        assert sorted(map(str, seen)) == sorted(['forward', 'backward', str((sparse.nnz,))])

    def test_torch_func(self):
        sparse,x = SparseLinear(7, 5, sparsity=.6),torch.randn(3, 7)
        params = dict(sparse.named_parameters())
        g = torch.func.grad(lambda p: torch.func.functional_call(sparse, p, x).pow(2).sum())(params)
        sparse(x).pow(2).sum().backward()
        torch.testing.assert_close(g['weight'], sparse.weight.grad)
        torch.testing.assert_close(torch.vmap(sparse)(x), sparse(x))

    def test_forward_mode(self):
        sparse,x,t = SparseLinear(7, 5, sparsity=.6),torch.randn(3, 7),torch.randn(3, 7)
        with torch.no_grad():
            _,jvp = torch.func.jvp(sparse, (x,), (t,))
            torch.testing.assert_close(jvp, F.linear(t, sparse.dense_weight()))
            with torch.autograd.forward_ad.dual_level():
                y = sparse(torch.autograd.forward_ad.make_dual(x, t))
                torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, jvp)

    @pytest.mark.filterwarnings('ignore')
    def test_jit_trace(self):
        model,x = nn.Sequential(SparseConv2d(3, 5, 3, sparsity=.5), nn.ReLU()),torch.randn(4, 3, 6, 6)
        torch.testing.assert_close(torch.jit.trace(model, torch.randn(2, 3, 6, 6))(x), model(x))

    def test_many_python_threads(self):
        from concurrent.futures import ThreadPoolExecutor
        sparse,xs = SparseConv2d(8, 16, 3, padding=1, sparsity=.8),[torch.randn(n, 8, 9, 9) for n in (1,3,5,8)]*8
        want = [run(sparse, x) for x in xs]
        with ThreadPoolExecutor(4) as ex: got = list(ex.map(lambda x: run(sparse, x), xs))
        assert all(torch.equal(a, b) for g,w in zip(got, want) for a,b in zip(g, w))

    @needs_kernels
    @pytest.mark.parametrize('sparse,shape', [(SparseLinear(300, 200, sparsity=.9), (130,300)), (SparseConv2d(32, 48, 3, padding=1, sparsity=.9), (17,32,14,14))],
                             ids=['Linear', 'Conv2d'])
    def test_one_and_two_threads_agree_bit_for_bit(self, sparse, shape):
        x,n = torch.randn(shape),torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            one = run(sparse, x)
            torch.set_num_threads(2)
            two = run(sparse, x)
        finally: torch.set_num_threads(n)
        assert all(torch.equal(a, b) for a,b in zip(one, two))
        assert all(torch.equal(a, b) for a,b in zip(one, run(sparse, x)))

    def test_other_default_dtype_and_device(self):
        sparse = SparseLinear(7, 5, sparsity=.6)
        torch.set_default_dtype(torch.float64)
        try: assert run(sparse, torch.randn(3, 7).float())[0].dtype == torch.float32
        finally: torch.set_default_dtype(torch.float32)
        with torch.device('meta'): assert sparse(torch.randn(3, 7, device='cpu')).device.type == 'cpu'

    def test_inf_and_nan_pass_through(self):
        dense = masked(nn.Linear(4, 3, bias=False), 1.)
        x = torch.tensor([[1., float('inf'), 0, 2], [float('nan'), 1, 1, 1]])
        torch.testing.assert_close(SparseLinear.from_dense(dense)(x), dense(x), equal_nan=True)

@needs_kernels
class TestFallbackIsVisible:
    @pytest.mark.filterwarnings('default::fastsparse.layers.DenseFallbackWarning')
    def test_warns_once_per_reason(self, monkeypatch):
        monkeypatch.setattr(L, '_said', set())
        sparse,x = SparseLinear(7, 5, sparsity=.6).double(),torch.randn(3, 7).double()
        with pytest.warns(DenseFallbackWarning, match='float64'): sparse(x)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            sparse(x)
            SparseLinear(7, 5, sparsity=.6)(x.float())

    def test_without_kernels(self, monkeypatch):
        dense = masked(nn.Conv2d(4, 6, (3,2), padding='same'), .4)
        monkeypatch.setattr(L, '_no_kernels', 'the compiled kernels are missing: test')
        sparse = SparseConv2d.from_dense(dense)
        assert 'missing' in why_dense(sparse.geometry, torch.randn(1), sparse.weight)
        check_against_dense(sparse, dense, torch.randn(3, 4, 6, 6))
        _,report = swap_modules_with_sparse(dense, (3,4,6,6), threshold=0)
        assert report[0]['chosen'] == 'dense' and 'missing' in report[0]['why']

    def test_float16_autocast_returns_its_dtype_and_computes_in_float32(self):
        dense = masked(nn.Linear(64, 32), .3)
        sparse,x = SparseLinear.from_dense(dense),torch.randn(8, 64)
        with torch.autocast('cpu', torch.float16): y,yh = sparse(x),sparse(x.half())
        assert y.dtype == yh.dtype == torch.float16
        torch.testing.assert_close(y, dense(x).half())
        y.float().sum().backward()
        assert sparse.weight.grad.dtype == torch.float32

def half_case(conv, bias=True, n=5):
    "A masked layer and an input for it"
    if conv: return masked(nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=bias), .4), torch.randn(n, 6, 9, 10)
    return masked(nn.Linear(40, 30, bias=bias), .2), torch.randn(n, 40)

def sparse_of(dense): return (SparseConv2d if isinstance(dense, nn.Conv2d) else SparseLinear).from_dense(dense)

def check_half(module, dense, x, dtypes, mask=None):
    "Output and gradients of a bfloat16 product against float64 from the bfloat16 input, within a rounding of the sum of absolute products"
    x = x.detach().clone().requires_grad_()
    y = module(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    y.backward(dy)
    got = [y.detach(), x.grad, module.weight.grad] + ([] if module.bias is None else [module.bias.grad])
    module.zero_grad()
    d64 = copy.deepcopy(dense).double()
    for p,q in zip(d64.parameters(), (module.weight, module.bias)): p.data = (q if p.dim() == 1 or q.dim() > 1 else scatter(q, dense.weight_mask)).detach().double()
    a64 = copy.deepcopy(d64)
    for p in a64.parameters(): p.data.abs_()
    x = x.detach().bfloat16().double()
    want,scale = run(d64, x, dy.double()),run(a64, x.abs(), dy.double().abs())
    for g,w,s,t in zip(got, want, scale, dtypes):
        if w.dim() == dense.weight.dim() and w.shape == dense.weight.shape and g.dim() == 1: w,s = w[dense.weight_mask],s[dense.weight_mask]
        assert g.dtype == t and g.shape == w.shape and ((g.double()-w).abs() <= 2**-8*s + 1e-30).all()

b16,f32 = torch.bfloat16,torch.float32

@needs_kernels
@pytest.mark.parametrize('conv', [False, True], ids=['Linear', 'Conv2d'])
class TestBf16:
    @pytest.fixture(autouse=True)
    def never_dense(self, monkeypatch):
        def no(*args): raise AssertionError('computed densely')
        monkeypatch.setattr(L, 'dense_apply', no)

    @pytest.mark.parametrize('bias', [False, True])
    @pytest.mark.parametrize('n', [0, 1, 3, 130])
    def test_module(self, conv, n, bias):
        dense,x = half_case(conv, bias, n)
        for m in (sparse_of(dense).bfloat16(), compress(copy.deepcopy(dense)).bfloat16()): check_half(m, dense, x.bfloat16(), [b16]*4)

    @pytest.mark.parametrize('n', [0, 1, 3, 130])
    def test_autocast(self, conv, n):
        dense,x = half_case(conv, n=n)
        for m in (sparse_of(dense), compress(copy.deepcopy(dense))):
            with torch.autocast('cpu', b16):
                check_half(m, dense, x, [b16, f32, f32, f32])
                check_half(m, dense, x.bfloat16(), [b16, b16, f32, f32])

    def test_autocast_of_a_bfloat16_module(self, conv):
        dense,x = half_case(conv)
        with torch.autocast('cpu', b16): check_half(sparse_of(dense).bfloat16(), dense, x, [b16, f32, b16, b16])

    def test_like_dense(self, conv):
        "The dtypes of everything, and the numbers up to a rounding"
        dense,x = half_case(conv)
        dense.weight.data[~dense.weight_mask] = 0
        for cast in (False, True):
            d,m,xd = (dense,sparse_of(dense),x) if cast else (copy.deepcopy(dense).bfloat16(),sparse_of(dense).bfloat16(),x.bfloat16())
            with torch.autocast('cpu', b16, enabled=cast): a,b = run(d, xd),run(m, xd)
            a[2] = a[2][dense.weight_mask]
            for s,t in zip(a, b): torch.testing.assert_close(s, t, rtol=.03, atol=.06)

    def test_bias_gradient_of_a_large_batch(self, conv):
        "Of numbers that would get lost in a bfloat16 sum"
        g = Conv2dGeometry(3, 3, (1,1)) if conv else LinearGeometry(3, 3)
        dy = (1+torch.rand((40, 3, 30, 30) if conv else (5000, 3))).bfloat16()
        want = dy.double().sum((0,2,3) if conv else 0)
        for t in (b16, f32): torch.testing.assert_close(g.bias_grad(dy, t).double(), want, rtol=2**-7, atol=0)
        assert g.bias_grad(dy).dtype == b16 and g.bias_grad(dy, f32).dtype == f32

    def test_mixed_dtypes_raise(self, conv):
        dense,x = half_case(conv)
        with pytest.raises(TypeError, match='float32 for a weight of torch.bfloat16'): sparse_of(dense).bfloat16()(x)
        with pytest.raises(TypeError, match='bfloat16 for a weight of torch.float32'): sparse_of(dense)(x.bfloat16())
        with torch.autocast('cpu', b16), pytest.raises(TypeError, match='float64'): sparse_of(dense)(x.double())

    @pytest.mark.filterwarnings('ignore')
    @pytest.mark.parametrize('cast', [False, True])
    def test_compile_and_operator(self, conv, cast):
        dense,x = half_case(conv)
        m,x = (sparse_of(dense),x) if cast else (sparse_of(dense).bfloat16(),x.bfloat16())
        with torch.autocast('cpu', b16, enabled=cast):
            torch._dynamo.reset()
            for a,b in zip(run(torch.compile(m, backend='aot_eager', fullgraph=True), x), run(m, x)): torch.testing.assert_close(a, b, rtol=.02, atol=.05)
            with FlopCounterMode(display=False) as counter: y = m(x)
        assert counter.get_total_flops() == 2*m.nnz*y.numel()//(8 if conv else 30)
        v = m.weight
        args = x.bfloat16(),v,m.indptr,m.indices,m.bias
        y = m.geometry.op(*args)
        ga,gb = (torch.autograd.grad(f(), (v, m.bias), torch.ones_like(y)) for f in (lambda: m.geometry.op(*args), lambda: L._eager(m.geometry, *args[:2], *args[2:])))
        for a,b in zip(ga, gb): assert a.dtype == b.dtype == v.dtype and torch.allclose(a, b, rtol=.01, atol=.02)

    def test_opcheck(self, conv):
        dense,x = half_case(conv)
        m = sparse_of(dense).bfloat16()
        g,x = m.geometry,x.bfloat16().requires_grad_()
        rest = (g.n_in, g.kernel, g.stride, g.padding, g.dilation, g.groups, g.layout) if conv else (g.n_cols,)
        torch.library.opcheck(torch.ops.fastsparse.conv2d if conv else torch.ops.fastsparse.linear, (x, m.weight, m.indptr, m.indices, m.bias, *rest),
                              test_utils=('test_schema', 'test_faketensor', 'test_aot_dispatch_dynamic'), rtol=.02, atol=.05)

    def test_double_backward_raises(self, conv):
        dense,x = half_case(conv)
        x = x.bfloat16().requires_grad_()
        g, = torch.autograd.grad(sparse_of(dense).bfloat16()(x).pow(2).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match='twice|autograd'): g.sum().backward()

    def test_state_dict_deepcopy_pickle_and_back(self, conv):
        dense,x = half_case(conv)
        x = x.bfloat16()
        for m in (sparse_of(dense).bfloat16(), compress(copy.deepcopy(dense)).bfloat16()):
            y,fresh = m(x),copy.deepcopy(m)
            fresh.weight.data.zero_()
            fresh.load_state_dict(m.state_dict())
            for c in (fresh, copy.deepcopy(m), pickle.loads(pickle.dumps(m))): assert c.weight.dtype == b16 and torch.equal(c(x), y)
        assert expand(m).weight.dtype == b16 and m.weight.shape == dense.weight.shape
        torch.testing.assert_close(m(x), y, rtol=.02, atol=.02)

    def test_strided_input_and_single_image(self, conv):
        dense,x = half_case(conv)
        m,x = sparse_of(dense).bfloat16(),x.bfloat16()
        want = m(x)
        assert torch.equal(m(x.to(memory_format=torch.channels_last) if conv else x.T.contiguous().T), want)
        torch.testing.assert_close(m(x[0]), want[0], rtol=.02, atol=.02)

    @pytest.mark.parametrize('cast', [False, True])
    def test_a_failing_kernel_computes_densely(self, conv, cast):
        dense,x = half_case(conv)
        m,x = (sparse_of(dense),x) if cast else (sparse_of(dense).bfloat16(),x.bfloat16())
        with torch.autocast('cpu', b16, enabled=cast):
            want = run(m, x)
            plan_for(m.geometry, m.indptr, m.indices).broken = True
            for a,b in zip(run(m, x), want): assert a.dtype == b.dtype and torch.allclose(a, b, rtol=.02, atol=.05)

    def test_training_follows_dense(self, conv):
        dense,x = half_case(conv, n=16)
        m = compress(copy.deepcopy(dense)).bfloat16()
        opt,losses = torch.optim.SGD(m.parameters(), lr=.1),[]
        for _ in range(20):
            loss = (m(x.bfloat16()).float()-1).pow(2).mean()
            opt.zero_grad(); loss.backward(); opt.step()
            losses.append(loss.item())
        assert losses[-1] < .8*losses[0] and m.weight.dtype == b16

    def test_selection_measures_in_this_dtype(self, conv, monkeypatch):
        dense,x = half_case(conv)
        seen = []
        def timed(steps, reps=7, budget=1.):
            for f in steps.values(): f()
            return {k: 1. if k == 'sparse' else 2. for k in steps}
        def step(module, x, need_dx=True):
            seen.append((x.dtype, module(x).dtype))
            return training_step(module, x, need_dx)
        monkeypatch.setattr(L, 'interleaved_ms', timed); monkeypatch.setattr(L, 'training_step', step)
        _,report = swap_modules_with_sparse(nn.Sequential(copy.deepcopy(dense).bfloat16()), tuple(x.shape), threshold=0)
        assert set(seen) == {(b16, b16)} and report[0]['chosen'] == 'sparse' and report[0]['why'] == '2.00× the speed of dense in bfloat16'
        seen.clear()
        with torch.autocast('cpu', b16): _,report = swap_modules_with_sparse(nn.Sequential(dense), tuple(x.shape), threshold=0)
        assert set(seen) == {(f32, b16)} and 'in bfloat16' in report[0]['why']
        if conv: assert sparsify_conv2d_auto(copy.deepcopy(dense).bfloat16(), tuple(x.shape)).weight.dtype == b16

class TestStructure:
    @fast
    @given(st.integers(1,6), st.integers(1,6), st.integers(1,4), st.integers(0,99))
    def test_csr_round_trip(self, a, b, c, seed):
        mask = rand_mask((a,b,c), .4, seed)
        indptr,indices = csr_from_mask(mask)
        check_csr(indptr, indices, a, b*c, int(mask.sum()))
        want = kernels.mask_to_csr(mask.numpy())
        assert indptr.tolist() == want[0].tolist() and indices.tolist() == want[1].tolist() and indices.dtype == torch.int32
        w = torch.randn(a, b, c)
        assert torch.equal(gather(w, mask), w[mask]) and torch.equal(scatter(w[mask], mask), w*mask)

    @fast
    @given(st.integers(0,3000), st.data())
    def test_random_index(self, n, data):
        k = data.draw(st.integers(0, n))
        i = random_index(n, k, torch.Generator().manual_seed(1))
        assert i.numel() == k and (i.diff() > 0).all() and (not k or (i[0] >= 0 and i[-1] < n))

    def test_random_index_is_even(self):
        g = torch.Generator().manual_seed(0)
        for n,k in ((10,3), (10,7), (100,5)):
            counts = sum(torch.bincount(random_index(n, k, g), minlength=n) for _ in range(3000))
            assert ((counts-3000*k/n).abs() < 5*(3000*k/n)**.5).all()

    @pytest.mark.parametrize('indptr,indices,match', [
        ([0,1], [0], 'entries, expected 3'), ([0,2,1], [0], 'must rise'), ([0,1,3], [0,1], 'must rise'), ([1,1,2], [0,1], 'must rise'),
        ([0,1,2], [0,4], 'must lie'), ([0,1,2], [-1,1], 'must lie'), ([0,2,2], [1,1], 'must rise'), ([0,2,2], [2,1], 'must rise')])
    def test_wrong_structures(self, indptr, indices, match):
        with pytest.raises(ValueError, match=match): SparseLinear(4, 2, indptr=torch.tensor(indptr), indices=torch.tensor(indices))
        layer = SparseLinear(4, 2, sparsity=.5)
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match=match): layer.set_structure(torch.tensor(indptr), torch.tensor(indices))
        assert all(torch.equal(a, b) for a,b in zip(before.values(), layer.state_dict().values()))

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match='exactly one'): SparseLinear(4, 2)
        with pytest.raises(ValueError, match='exactly one'): SparseLinear(4, 2, sparsity=.5, mask=torch.ones(2, 4))
        with pytest.raises(ValueError, match='exactly one'): SparseLinear(4, 2, indices=torch.zeros(2))
        with pytest.raises(ValueError, match='share of zeros'): SparseLinear(4, 2, sparsity=90)
        with pytest.raises(ValueError, match='mask of shape'): SparseLinear(4, 2, mask=torch.ones(4, 2))
        with pytest.raises(ValueError, match='1-D and integer'): SparseLinear(4, 2, indptr=torch.zeros(3), indices=torch.zeros(0))

    def test_born_sparse(self):
        torch.manual_seed(0)
        layer = SparseLinear(1000, 500, sparsity=.987)
        assert layer.nnz == round(.013*1000*500)
        counts = layer.indptr.diff()
        rows = torch.arange(500).repeat_interleave(counts)
        assert (layer.weight.abs() <= counts.float().rsqrt()[rows]*1.0001).all()
        assert layer.weight.abs().mean().item() == pytest.approx(counts.float().rsqrt()[rows].mean().item()/2, rel=.05)
        same = [SparseLinear(50, 40, sparsity=.9, generator=torch.Generator().manual_seed(3)).indices for _ in range(2)]
        assert torch.equal(*same)
        assert SparseConv2d(8, 16, 3, sparsity=.9).nnz == round(.1*8*16*9)

    def test_born_sparse_never_allocates_the_dense_matrix(self):
        code = '''
import resource, torch
from fastsparse.layers import SparseLinear
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
l = SparseLinear(100_000, 100_000, sparsity=.9999)
y = l(torch.ones(2, 100_000)); y.sum().backward()
assert l.nnz == 10**6 and l.weight.grad.shape == l.weight.shape
assert peak()-before < 600_000, peak()-before'''
        subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)

@needs_kernels
class TestPlans:
    def layer(self): return SparseLinear(16, 8, mask=rand_mask((8,16), .5))
    def same_as_dense(self, l):
        x = torch.randn(3, 16)
        torch.testing.assert_close(l(x), F.linear(x, l.dense_weight(), l.bias))

    def test_in_place_change_is_seen(self):
        l = self.layer()
        self.same_as_dense(l)
        l.indices.copy_(torch.cat([torch.arange(16)[-n:] for n in l.indptr.diff().tolist()]))
        self.same_as_dense(l)
        l.indices[0] = 999
        with pytest.raises(Exception, match='999|range'): l(torch.randn(3, 16))

    def test_change_between_forward_and_backward(self):
        l,x = self.layer(),torch.randn(3, 16, requires_grad=True)
        y,w = l(x),l.dense_weight()
        l.indices.zero_()
        y.sum().backward()  # of the structure that the forward used
        torch.testing.assert_close(x.grad, w.sum(0).expand(3, 16))

    def test_new_structure_between_forward_and_backward_raises(self):
        l,x = self.layer(),torch.randn(3, 16, requires_grad=True)
        y = l(x)
        l.apply_further_mask(torch.arange(l.nnz) > 3)
        with pytest.raises(RuntimeError): y.sum().backward()

    def test_data_set_to_other_memory(self):
        l = self.layer()
        self.same_as_dense(l)
        new = torch.cat([torch.arange(16)[-n:] for n in l.indptr.diff().tolist()]).int()
        l.indices.data = torch.empty(0, dtype=torch.int32)
        l.indices.data = new.clone()  # may not get the address that the plan was built from
        self.same_as_dense(l)

    def test_freed_structures_leave_no_plans(self):
        gc.collect()        # what earlier tests left behind
        n = len(L.plan_cache)
        x = torch.randn(2, 16)
        for seed in range(30):  # addresses are reused all the time
            l = SparseLinear(16, 8, mask=rand_mask((8,16), .5, seed))
            torch.testing.assert_close(l(x), F.linear(x, l.dense_weight(), l.bias))
        del l
        gc.collect()
        assert len(L.plan_cache) == n

    def test_one_structure_many_geometries(self):
        l = SparseConv2d(4, 8, 3, padding=1, sparsity=.5)
        x = torch.randn(2, 4, 8, 8)
        for stride in (1,2):
            l.stride = (stride,stride)
            torch.testing.assert_close(l(x), F.conv2d(x, l.dense_weight(), l.bias, stride, 1), rtol=1e-4, atol=1e-5)

    def test_inference_tensors_have_no_version(self):
        with torch.inference_mode():
            l = self.layer()
            self.same_as_dense(l)
            l.indices.copy_(torch.cat([torch.arange(16)[-n:] for n in l.indptr.diff().tolist()]))
            self.same_as_dense(l)

def both():
    return [SparseLinear.from_dense(masked(nn.Linear(12, 9), .3)), SparseConv2d.from_dense(masked(nn.Conv2d(3, 5, 3, padding=1), .3))]

def input_of(m): return torch.randn(4, 12) if isinstance(m, (SparseLinear, nn.Linear)) else torch.randn(4, 3, 6, 6)

@pytest.mark.parametrize('m', both(), ids=['Linear', 'Conv2d'])
class TestModule:
    def test_deepcopy_pickle_and_save(self, m):
        m(input_of(m))
        f,x = io.BytesIO(),input_of(m)
        torch.save(m, f)
        f.seek(0)
        for c in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), torch.load(f, weights_only=False)):
            assert torch.equal(c(x), m(x)) and c.indices is not m.indices
            c.weight.data.zero_()
            assert m.weight.any()

    def test_state_dict_loads_with_weights_only(self, m):
        f = io.BytesIO()
        torch.save(m.state_dict(), f)
        f.seek(0)
        sd = torch.load(f, weights_only=True)
        c = copy.deepcopy(m)
        c.set_structure(torch.zeros_like(c.indptr), c.indices[:0])
        w = c.weight
        c.load_state_dict(sd)
        assert c.weight is w and torch.equal(c.mask, m.mask) and torch.equal(c.dense_weight(), m.dense_weight())
        c.load_state_dict(sd, assign=True)
        assert torch.equal(c(x := input_of(m)), m(x))

    def test_misfit_leaves_the_module_untouched(self, m):
        before = {k:v.clone() for k,v in m.state_dict().items()}
        sd = m.state_dict()
        wrong = [{**sd, 'indices': sd['indices']+1000}, {**sd, 'weight': sd['weight'][:-1]}, {k:v for k,v in sd.items() if k != 'indices'},
                 {**sd, 'bias': sd['bias'][:-1]}, {**sd, 'dense_shape': sd['dense_shape']+1}, {**sd, 'weight': m.dense_weight()}]
        for w in wrong:
            w = {k: v+1 if k == 'weight' else v for k,v in w.items()}
            with pytest.raises(RuntimeError, match='Error'): m.load_state_dict(w)
            assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())

    def test_round_trip_is_exact(self, m):
        m = copy.deepcopy(m)
        m.register_buffer('weight_sparsity', torch.tensor(.7))
        m.bias.requires_grad_(False)
        d = m.eval().to_dense()
        back = type(m).from_dense(d)
        assert type(d) in (nn.Linear, nn.Conv2d) and not d.training and not back.training
        assert torch.equal(back.weight, m.weight) and torch.equal(back.indices, m.indices) and torch.equal(back.bias, m.bias)
        assert d.weight_sparsity.dim() == 0 and back.weight_sparsity == d.weight_sparsity
        assert d.weight.requires_grad and back.weight.requires_grad and not d.bias.requires_grad and not back.bias.requires_grad

    def test_conversion_draws_no_random_numbers(self, m):
        before = torch.get_rng_state()
        type(m).from_dense(m.to_dense())
        assert torch.equal(torch.get_rng_state(), before)

    def test_apply_further_mask(self, m):
        for dense_shape in (False, True):
            c = copy.deepcopy(m)
            c(input_of(m)).sum().backward()
            keep,w,g = torch.arange(c.nnz)%3 != 0,c.weight.detach().clone(),c.weight.grad.clone()
            new = torch.ones(c.weight_shape, dtype=torch.bool)
            new.view(-1)[c.flat_index[~keep]] = False
            param,opt = c.weight,torch.optim.SGD(c.parameters(), lr=.1)
            kept = c.apply_further_mask(new if dense_shape else keep)
            assert c.weight is param and torch.equal(kept, keep)
            assert torch.equal(c.weight, w[keep]) and torch.equal(c.weight.grad, g[keep])
            c(input_of(m)).sum().backward()
            opt.step()
        with pytest.raises(ValueError, match='nonzeros'): c.apply_further_mask(torch.ones(3, dtype=torch.bool))

    def test_learns_as_the_dense_layer_does(self, m):
        torch.manual_seed(0)
        m,d = copy.deepcopy(m),m.to_dense()
        mask = d.weight_mask
        opts = [torch.optim.Adam(l.parameters(), lr=.01) for l in (m, d)]
        for _ in range(20):
            x = input_of(m)
            for l,o in zip((m, d), opts):
                o.zero_grad()
                l(x).tanh().pow(2).mean().backward()
                if l is d: d.weight.grad.mul_(mask)
                o.step()
        torch.testing.assert_close(m.dense_weight(), d.weight*mask, rtol=1e-3, atol=1e-4)

    def test_repr(self, m): assert f'nnz={m.nnz}' in repr(m) and 'sparsity=0.' in repr(m)

    @needs_kernels
    def test_compile_without_graph_breaks(self, m):
        torch._dynamo.reset()
        c,x = torch.compile(m, backend='aot_eager', fullgraph=True),input_of(m)
        for a,b in zip(run(c, x), run(m, x)): torch.testing.assert_close(a, b)
        with torch.no_grad(): torch.testing.assert_close(c(x), m(x))
        bad = copy.deepcopy(m).double()
        torch.testing.assert_close(torch.compile(bad, backend='aot_eager', fullgraph=True)(x.double()), bad(x.double()))

    @needs_kernels
    def test_compile_of_the_other_forms(self, m):
        torch._dynamo.reset()
        d = compress(m.to_dense())
        x = input_of(m)
        for a,b in zip(run(torch.compile(d, backend='aot_eager', fullgraph=True), x), run(m, x)): torch.testing.assert_close(a, b)
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(torch.compile(m, backend='aot_eager', fullgraph=True)(x), m(x))

    @needs_kernels
    def test_compile_with_dynamic_shapes(self, m):
        torch._dynamo.reset()
        compiles = []
        def backend(gm, inputs): return compiles.append(1) or gm.forward
        c,lead = torch.compile(m, backend=backend, dynamic=True, fullgraph=True),[2,5,11,7]
        for n in lead:
            x = torch.randn(n, 12) if isinstance(m, SparseLinear) else torch.randn(n, 3, n+5, 14-n)
            torch.testing.assert_close(c(x), m(x))
        assert len(compiles) == 1

    @needs_kernels
    @pytest.mark.parametrize('strict', [False, True])
    def test_export(self, m, strict):
        x = input_of(m)
        ep = torch.export.export(m, (x,), strict=strict, dynamic_shapes=({0:torch.export.Dim('batch', min=2, max=64)},))
        assert any('fastsparse' in str(n.target) for n in ep.graph.nodes)
        x = torch.cat([x, x, x])
        torch.testing.assert_close(ep.module()(x), m(x))

    @needs_kernels
    def test_operators_pass_torch_opcheck(self, m):
        g = m.geometry
        args = (input_of(m).requires_grad_(), m.weight, m.indptr, m.indices, m.bias, *g[1:]) if len(g) > 2 else \
               (input_of(m).requires_grad_(), m.weight, m.indptr, m.indices, m.bias, g.n_cols)
        op = torch.ops.fastsparse.conv2d if len(g) > 2 else torch.ops.fastsparse.linear
        torch.library.opcheck(op.default, args, test_utils=('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic'))

    @needs_kernels
    def test_operators_give_each_gradient_alone(self, m):
        x,w = input_of(m),m.weight.detach()
        def grads(need_x, need_w):
            a,b = x.detach().requires_grad_(need_x),w.clone().requires_grad_(need_w)
            y = m.geometry.op(a, b, m.indptr, m.indices, m.bias)
            return torch.autograd.grad(y, [t for t in (a,b) if t.requires_grad], torch.ones_like(y))
        for got,want in zip((*grads(True, False), *grads(False, True)), grads(True, True)): torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    @needs_kernels
    def test_flops_are_those_of_the_nonzeros(self, m):
        x = input_of(m).requires_grad_()
        with FlopCounterMode(display=False) as dense_fwd: m.to_dense()(x)
        share = m.nnz/np.prod(m.weight_shape)
        with FlopCounterMode(display=False) as fwd: m(x)
        assert fwd.get_total_flops() == round(dense_fwd.get_total_flops()*share)
        with FlopCounterMode(display=False) as both: m(x).sum().backward()
        assert both.get_total_flops() == 3*fwd.get_total_flops()

def net():
    torch.manual_seed(0)
    n = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
                      nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10))
    for i in (3,7): n[i].weight.data[torch.rand_like(n[i].weight) < .99] = 0
    return n

@pytest.fixture
def sparse_wins(monkeypatch):
    "Timing is not what these tests are about."
    monkeypatch.setattr(L, 'measure_layer', lambda *a, **k: dict(sparse=1., dense=2.))

@needs_kernels
class TestSwap:
    def test_swaps_what_wins(self, sparse_wins):
        model,x = net(),torch.randn(4, 3, 12, 12)
        stats = model[1].running_mean.clone()
        rng = torch.get_rng_state()
        fast,report = swap_modules_with_sparse(model, (4,3,12,12))
        assert torch.equal(torch.get_rng_state(), rng) and torch.equal(stats, model[1].running_mean) and model.training
        assert [r['chosen'] for r in report] == ['dense', 'sparse', 'sparse', 'dense']
        assert type(fast[3]) is SparseConv2d and type(fast[7]) is SparseLinear and type(model[3]) is nn.Conv2d
        assert report[1]['input'] == (4,32,12,12) and report[1]['sparsity'] > .98 and report[1]['dense_ms'] == 2.
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
        assert 'speed of dense' in repr(report) and report._repr_markdown_().count('\n') == 5
        import pandas as pd
        assert list(pd.DataFrame(report).columns) == list(report[0])

    def test_measures(self):
        _,report = swap_modules_with_sparse(net(), (4,3,12,12), verbose=True)
        assert report[1]['dense_ms'] > 0 and report[1]['sparse_ms'] > 0
        assert (report[1]['chosen'] == 'sparse') == (report[1]['sparse_ms'] < report[1]['dense_ms'])

    def test_sparse_that_loses_stays_dense(self, monkeypatch):
        monkeypatch.setattr(L, 'measure_layer', lambda *a, **k: dict(sparse=2., dense=1.))
        fast,report = swap_modules_with_sparse(net(), (4,3,12,12))
        assert {r['chosen'] for r in report} == {'dense'} and '0.50×' in report[1]['why']
        _,report = swap_modules_with_sparse(net(), (4,3,12,12), only_if_faster=False)
        assert report[1]['chosen'] == 'sparse' and report[1]['sparse_ms'] == 2.

    def test_without_measuring(self):
        model = net()
        same,report = swap_modules_with_sparse(model, inplace=True, only_if_faster=False)
        assert same is model and type(model[3]) is SparseConv2d and report[1]['why'] == 'not measured'
        with pytest.raises(ValueError, match='input_shape'): swap_modules_with_sparse(net())

    @pytest.mark.parametrize('skip', ['7', '3,7', ['7'], nn.Linear, 'module', '[37]'])
    def test_skip(self, sparse_wins, skip):
        model = net()
        fast,report = swap_modules_with_sparse(model, (2,3,12,12), skip_modules=model[7] if skip == 'module' else skip)
        assert type(fast[7]) is nn.Linear and 'skipped' in report[2]['why']
        assert type(fast[3]) is (nn.Conv2d if skip in ('3,7', '[37]') else SparseConv2d)

    def test_skip_that_names_nothing(self):
        with pytest.raises(ValueError, match='nosuch.*The layers are: 0, 3'): swap_modules_with_sparse(net(), (2,3,12,12), skip_modules='nosuch')
        with pytest.raises(TypeError, match='3'): swap_modules_with_sparse(net(), (2,3,12,12), skip_modules=3)

    def test_frozen_layers(self, sparse_wins):
        model = net()
        model[3].requires_grad_(False)
        fast,_ = swap_modules_with_sparse(model, (2,3,12,12))
        assert not fast[3].weight.requires_grad and not fast[3].bias.requires_grad and fast[7].weight.requires_grad

    def test_shared_layers_are_swapped_once_in_all_places(self, sparse_wins):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = masked(nn.Linear(32, 32), .05)
                self.b = nn.ModuleDict(dict(again=self.a))
            def forward(self, x): return self.b['again'](self.a(x))
        model = Twice()
        fast,report = swap_modules_with_sparse(model, (4,32))
        assert len(report) == 1 and report[0]['name'] == 'a, b.again'
        assert type(fast.a) is SparseLinear and fast.a is fast.b['again'] and len(list(fast.parameters())) == 2
        x = torch.randn(4, 32)
        torch.testing.assert_close(fast(x), model(x))

    def test_tied_weights_stay_dense(self, sparse_wins):
        model = nn.Sequential(nn.Embedding(50, 16), masked(nn.Linear(16, 50), .05))
        model[0].weight = model[1].weight
        _,report = swap_modules_with_sparse(model, example_inputs=torch.arange(4))
        assert report[0]['chosen'] == 'dense' and 'tied to 0' in report[0]['why']

    @pytest.mark.parametrize('inputs', [lambda a,b: (a,b), lambda a,b: dict(a=a, b=b)], ids=['tuple', 'dict'])
    def test_several_inputs(self, sparse_wins, inputs):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.p,self.q,self.unused = masked(nn.Linear(8, 6), .1),masked(nn.Linear(9, 6), .1),masked(nn.Linear(4, 4), .1)
            def forward(self, a, b): return self.p(input=a) + self.q(b)
        fast,report = swap_modules_with_sparse(Two(), example_inputs=inputs(torch.randn(3, 8), torch.randn(3, 9)))
        assert [type(m) for m in (fast.p, fast.q, fast.unused)] == [SparseLinear, SparseLinear, nn.Linear]
        assert 'never reached' in report[2]['why']
        fast(torch.randn(3, 8), torch.randn(3, 9))
        if isinstance(inputs(0,0), tuple): assert swap_modules_with_sparse(Two(), [(3,8),(3,9)])[1][0]['chosen'] == 'sparse'

    def test_model_that_is_one_layer(self, sparse_wins):
        fast,report = swap_modules_with_sparse(masked(nn.Linear(8, 6), .1), (2,8), inplace=True)
        assert type(fast) is SparseLinear and report[0]['name'] == ''

    def test_what_cannot_be_swapped_says_why(self, sparse_wins):
        model = nn.ModuleDict(dict(par=nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), mha=nn.MultiheadAttention(4, 2), comp=compress(masked(nn.Linear(4, 4), .2))))
        _,report = swap_modules_with_sparse(model, only_if_faster=False, threshold=0)
        assert {r['chosen'] for r in report} == {'dense'} and [r['why'][:9] for r in report] == ['it is a P', 'it is a N', 'it is com']
        with pytest.raises(TypeError, match='learn.model'): swap_modules_with_sparse('a learner', (2,2))
        for bad in 512,():
            with pytest.raises(ValueError, match='shape of a batch'): swap_modules_with_sparse(nn.Sequential(nn.Linear(3, 3)), bad, threshold=0)
        with pytest.raises(ValueError, match='no shape yet'): swap_modules_with_sparse(nn.LazyLinear(3), (2,2))

    def test_pruned_by_torch(self, sparse_wins):
        lin = nn.Linear(20, 10)
        nn.utils.prune.random_unstructured(lin, 'weight', .9)
        lin.weight_orig.data.add_(1)  # what an optimizer step does: `weight` is stale now
        old = nn.Sequential(lin)
        old(torch.randn(2, 20))
        stale = lin.weight
        copied,_ = swap_modules_with_sparse(old, (2,20))
        assert type(copied[0]) is SparseLinear and old[0] is lin and lin.weight is stale and lin._forward_pre_hooks
        fast,report = swap_modules_with_sparse(nn.Sequential(lin), (2,20), inplace=True)
        assert type(fast[0]) is SparseLinear and fast[0].nnz == 20 and torch.equal(copied[0].weight, fast[0].weight)
        assert torch.equal(SparseLinear.from_dense(lin).dense_weight(), lin.weight_orig*lin.weight_mask)
        x = torch.randn(2, 20)
        torch.testing.assert_close(fast(x), nn.Sequential(lin)(x))

    def test_hooks_are_carried_but_not_those_that_mask(self, sparse_wins):
        model,seen = net(),[]
        model[7].register_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
        class MaskHook:
            def __call__(self, m, *a): raise AssertionError('kept a mask on a layer without')
        model[7]._forward_pre_hooks[99] = MaskHook()
        swap_modules_with_sparse(model, only_if_faster=False)[0](torch.randn(2, 3, 12, 12))
        assert seen == ['SparseLinear']
        handle = model[3].register_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
        swap_modules_with_sparse(model, only_if_faster=False, inplace=True)
        model(torch.randn(2, 3, 12, 12))
        handle.remove()
        model(torch.randn(2, 3, 12, 12))
        assert seen == ['SparseLinear', 'SparseConv2d', 'SparseLinear', 'SparseLinear']

    def test_model_does_not_run_without_a_candidate(self):
        model = nn.Sequential(nn.Linear(4, 4))
        model.register_forward_hook(lambda *a: 1/0)
        assert swap_modules_with_sparse(model, (2,4))[1][0]['chosen'] == 'dense'

    @pytest.mark.filterwarnings('ignore:.*nested')
    def test_transformer_encoder(self, sparse_wins):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
        for m in model.modules():
            if type(m) is nn.Linear: masked(m, .1)
        fast,report = swap_modules_with_sparse(model, (3,5,16))
        assert sum(r['chosen'] == 'sparse' for r in report) == 4
        x,pad = torch.randn(3, 5, 16),torch.tensor([[False]*5, [False]*3+[True]*2, [False]*5])
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(fast(x, src_key_padding_mask=pad)[:,:3], model(x, src_key_padding_mask=pad)[:,:3], rtol=1e-4, atol=1e-4)

    def test_sparsify_conv2d_auto(self, capsys):
        dense = masked(nn.Conv2d(4, 8, 3, padding=1), .1)
        sparse = sparsify_conv2d_auto(dense, (2,4,8,8), verbose=True)
        assert sparse.vectorizing_over_on in (True, False) and 'over pixels' in capsys.readouterr().out
        check_against_dense(sparse, dense, torch.randn(2, 4, 8, 8))

def dense_layers(): return [masked(nn.Linear(12, 9), .3), masked(nn.Conv2d(3, 5, 3, padding=1), .3)]

@pytest.mark.parametrize('d', dense_layers(), ids=['Linear', 'Conv2d'])
class TestCompress:
    def test_round_trip_keeps_identity(self, d):
        d = copy.deepcopy(d)
        w,weight,x = d.weight.detach().clone(),d.weight,input_of(d)
        d(x).sum().backward()
        g,bias = weight.grad.clone(),d.bias
        assert compress(d) is d and is_compressed(d) and isinstance(d, (nn.Linear, nn.Conv2d))
        assert d.weight is weight and d.bias is bias and torch.equal(weight.data, w[d.weight_mask]) and torch.equal(weight.grad, g[d.weight_mask])
        assert compress(d) is d and f'nnz={d.nnz}' in repr(d)
        assert expand(d) is d and not is_compressed(d) and type(d) in (nn.Linear, nn.Conv2d)
        assert d.weight is weight and torch.equal(weight.data, w) and torch.equal(weight.grad, g*d.weight_mask)
        assert expand(d) is d and set(d._buffers) == {'weight_mask'}

    def test_computes_as_sparse(self, d):
        d = copy.deepcopy(d)
        dense = copy.deepcopy(d)
        check_against_dense(compress(d), dense, input_of(d))

    @pytest.mark.parametrize('opt', [lambda ps: torch.optim.SGD(ps, lr=.1, momentum=.9, weight_decay=.01), lambda ps: torch.optim.Adam(ps, lr=.01)], ids=['SGD', 'Adam'])
    def test_training_through_compress_and_expand(self, d, opt):
        "Same weights as the masked layer; live losses, tensor hooks and the optimizer hold the parameter all along."
        torch.manual_seed(0)
        d = copy.deepcopy(d)
        ref,mask = copy.deepcopy(d),d.weight_mask
        shapes,losses,opts = [],[],[opt(l.parameters()) for l in (d, ref)]
        ref.weight.register_hook(lambda g: g*mask)
        d.weight.register_hook(lambda g: shapes.append(tuple(g.shape)) or (g*mask if g.dim() > 1 else g))
        d.weight.register_post_accumulate_grad_hook(lambda p: shapes.append(tuple(p.grad.shape)))
        for i in range(12):
            if i%4 == 1:
                compress(d)
                opts[0].state[d.weight] = gather_state(opts[0].state[d.weight], mask)
            if i%4 == 3:
                opts[0].state[d.weight] = scatter_state(opts[0].state[d.weight], mask)
                expand(d)
            x = input_of(d)
            for l,o in zip((d, ref), opts):
                o.zero_grad()
                loss = l(x).tanh().pow(2).mean()
                losses.append(loss)  # keeps every graph, and with it the gradient accumulators, alive
                loss.backward()
                o.step()
        assert len(shapes) == 24 and len(set(shapes)) == 2
        torch.testing.assert_close(expand(d).weight, ref.weight, rtol=1e-3, atol=1e-4)

    def test_state_dict_is_the_dense_one(self, d):
        d = copy.deepcopy(d)
        d.register_buffer('weight_sparsity', torch.tensor(.7))
        model = nn.Sequential(d)
        want = {k:v.clone() for k,v in model.state_dict().items()}
        compress(d)
        got = model.state_dict()
        assert list(got) == list(want) and all(torch.equal(got[k], want[k]) for k in want)
        other = copy.deepcopy(model)
        mask = rand_mask(d.weight_mask.shape, .6, 5)
        w = torch.randn_like(want['0.weight'])*mask
        other.load_state_dict({**want, '0.weight':w, '0.weight_mask':mask})
        assert is_compressed(other[0]) and torch.equal(other[0].weight.data, w[mask]) and torch.equal(other.state_dict()['0.weight'], w)
        expand(d)
        model.load_state_dict(other.state_dict())
        assert torch.equal(d.weight.data, w)

    def test_wrong_state_dict_leaves_it_compressed(self, d):
        d = compress(copy.deepcopy(d))
        w = d.weight.detach().clone()
        with pytest.raises(RuntimeError, match='size mismatch'): d.load_state_dict({**d.state_dict(), 'weight':torch.zeros(2, 2)})
        assert is_compressed(d) and torch.equal(d.weight, w)

    def test_deepcopy_pickle_save(self, d):
        d,f = compress(copy.deepcopy(d)),io.BytesIO()
        torch.save(d, f)
        f.seek(0)
        x = input_of(d)
        for c in (copy.deepcopy(d), pickle.loads(pickle.dumps(d)), torch.load(f, weights_only=False)):
            assert torch.equal(c(x), d(x)) and torch.equal(expand(c).weight, copy.deepcopy(expand(copy.deepcopy(d))).weight)

    def test_new_mask(self, d):
        d = compress(copy.deepcopy(d))
        dense,buf = d.state_dict()['weight'],d.weight_mask
        new = rand_mask(d.weight_mask.shape, .5, 7)
        compress(d, mask=new)
        assert d.weight_mask is buf and torch.equal(buf, new) and torch.equal(d.weight.data, dense[new])
        with pytest.raises(ValueError, match='mask of shape'): compress(d, mask=new[:1])
        assert is_compressed(d)

    def test_dtypes(self, d):
        for dtype in (torch.float64, torch.bfloat16):
            c = compress(copy.deepcopy(d)).to(dtype)
            x = input_of(d).to(dtype)
            c(x).sum().backward()
            assert c(x).dtype == c.weight.dtype == dtype
            expand(c)
            assert c.weight.dtype == c.weight.grad.dtype == dtype and c.weight.shape == d.weight.shape

    def test_frozen(self, d):
        d = compress(copy.deepcopy(d).requires_grad_(False))
        assert not d(input_of(d)).requires_grad and not expand(d).weight.requires_grad

    def test_without_a_mask_takes_the_nonzeros(self, d):
        d = copy.deepcopy(d)
        mask = d.weight_mask
        del d.weight_mask
        zero = active_index(mask)[0]
        compress(d)
        assert d.nnz == int(mask.sum())-1 and not d.weight_mask.view(-1)[zero]
        assert torch.equal(expand(d).weight_mask, d.weight != 0)

class Life:
    "A layer, the optimizer that holds its parameter, and what may happen to them during training."
    def __init__(self, layer, seed):
        self.rng,self.layer = torch.Generator().manual_seed(seed),layer
        self.opt = torch.optim.Adam(layer.parameters(), lr=.05)
        self.losses = []

    @property
    def state(self): return self.opt.state[self.layer.weight]
    def set_state(self, s): self.opt.state[self.layer.weight] = s

    def step(self):
        self.opt.zero_grad()
        loss = self.layer(input_of(self.layer)).tanh().pow(2).mean()
        loss.backward()
        self.losses.append(loss)
        if not is_compressed(self.layer): self.layer.weight.grad.mul_(self.layer.weight_mask)
        self.opt.step()

    def compress(self):
        if is_compressed(self.layer): return
        self.set_state(gather_state(self.state, self.layer.weight_mask))
        compress(self.layer)

    def expand(self):
        if not is_compressed(self.layer): return
        expand(self.layer)
        self.set_state(scatter_state(self.state, self.layer.weight_mask))

    def update(self):
        self.expand()
        l = self.layer
        l.weight_mask = torch.rand(l.weight.shape, generator=self.rng) < .4
        l.weight.data.mul_(l.weight_mask)
        for v in self.state.values():
            if v.shape == l.weight.shape: v.mul_(l.weight_mask)

    def freeze(self): self.layer.weight.requires_grad_(not self.layer.weight.requires_grad) if is_compressed(self.layer) else None

    def save_and_load(self):
        f = io.BytesIO()
        torch.save(dict(model=self.layer.state_dict()), f)
        f.seek(0)
        before = self.layer.state_dict()
        self.layer.load_state_dict(torch.load(f, weights_only=True)['model'])
        assert all(torch.equal(a, b) for a,b in zip(before.values(), self.layer.state_dict().values()))

    def copy(self):
        x = input_of(self.layer)
        assert torch.equal(copy.deepcopy(self.layer)(x), self.layer(x)) and torch.equal(pickle.loads(pickle.dumps(self.layer))(x), self.layer(x))

    def check(self):
        l = self.layer
        sd,mask = l.state_dict(),l.weight_mask
        assert l.weight is self.opt.param_groups[0]['params'][0]
        assert sd['weight'].shape == mask.shape and not sd['weight'][~mask].any()
        assert l.weight.shape == ((int(mask.sum()),) if is_compressed(l) else mask.shape)
        assert l.weight.grad is None or l.weight.grad.shape == l.weight.shape
        assert all(v.shape in ((), l.weight.shape) for v in self.state.values())
        x = input_of(l)
        want = F.linear(x, sd['weight'], sd['bias']) if isinstance(l, nn.Linear) else F.conv2d(x, sd['weight'], sd['bias'], padding=1)
        torch.testing.assert_close(l(x), want, rtol=1e-4, atol=1e-5)

@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.booleans(), st.integers(0,99), st.lists(st.sampled_from(['step', 'compress', 'expand', 'update', 'freeze', 'save_and_load', 'copy']), max_size=12))
def test_any_order_of_events_keeps_the_invariants(conv, seed, events):
    life = Life(masked(nn.Conv2d(3, 5, 3, padding=1) if conv else nn.Linear(12, 9), .3, seed), seed)
    for e in events:
        if e == 'step' and not life.layer.weight.requires_grad: continue
        getattr(life, e)()
        life.check()

@pytest.mark.parametrize('opt_func', ['SGD', 'Adam'])
def test_fastai_optimizers_follow(opt_func):
    optimizer = pytest.importorskip('fastai.optimizer')
    torch.manual_seed(0)
    d = masked(nn.Linear(12, 9), .3)
    ref,mask = copy.deepcopy(d),d.weight_mask
    ref.weight.register_hook(lambda g: g*mask)
    kw = dict(mom=.9) if opt_func == 'SGD' else {}
    opts = [getattr(optimizer, opt_func)(list(l.parameters()), lr=.05, wd=.01, **kw) for l in (d, ref)]
    for i in range(8):
        if i == 3:
            opts[0].state[d.weight] = gather_state(opts[0].state[d.weight], mask)
            compress(d)
        x = torch.randn(6, 12)
        for l,o in zip((d, ref), opts):
            l(x).tanh().pow(2).mean().backward()
            if l is d and not is_compressed(d): d.weight.grad.mul_(mask)
            o.step()
            o.zero_grad()
    torch.testing.assert_close(d.state_dict()['weight'], ref.weight*mask, rtol=1e-3, atol=1e-4)

def test_compress_says_what_it_cannot():
    with pytest.raises(TypeError, match='Conv1d, not exactly'): compress(nn.Conv1d(2, 2, 2))
    with pytest.raises(TypeError, match='NonDynamically'): compress(nn.MultiheadAttention(4, 2).out_proj)
    with pytest.raises(TypeError, match='not `weight`'): compress(nn.Linear(2, 2), 'bias')
    pruned = nn.Linear(4, 4)
    nn.utils.prune.random_unstructured(pruned, 'weight', .5)
    with pytest.raises(TypeError, match='computed from'): compress(pruned)

def test_channels_last_weights_come_back_as_they_were():
    conv = masked(nn.Conv2d(3, 5, 3), .3).to(memory_format=torch.channels_last)
    w = conv.weight.detach().clone()
    expand(compress(conv))
    assert conv.weight.is_contiguous(memory_format=torch.channels_last) and torch.equal(conv.weight, w)

def test_ctrl_c_waits_until_a_layer_is_whole(monkeypatch):
    import signal
    lin,old = masked(nn.Linear(8, 4), .5),L.replace_storage
    def interrupted(*a):
        signal.raise_signal(signal.SIGINT)
        old(*a)
    monkeypatch.setattr(L, 'replace_storage', interrupted)
    with pytest.raises(KeyboardInterrupt): compress(lin)
    assert is_compressed(lin) and lin.weight.dim() == 1
    with pytest.raises(KeyboardInterrupt): expand(lin)
    assert not is_compressed(lin) and lin.weight.dim() == 2 and 'weight_indptr' not in lin._buffers

def test_ctrl_c_in_a_block_that_fails_is_not_lost():
    import signal
    with pytest.raises(KeyboardInterrupt):
        with L.hold_interrupts():
            signal.raise_signal(signal.SIGINT)
            raise ValueError

def test_mask_hooks_of_the_topology_leave_compressed_layers_alone():
    topology = pytest.importorskip('fastsparse.topology')
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    topology.sparsify_model(model, .9)
    compress(model[0])
    nnz = model[0].nnz
    model(torch.randn(3, 20)).sum().backward()
    assert model[0].weight.shape == model[0].weight.grad.shape == (nnz,)
    want = model.state_dict()
    model.load_state_dict(want)
    assert is_compressed(model[0])

def test_fastai_tensors_keep_their_type():
    TensorImage = pytest.importorskip('fastai.torch_core').TensorImage
    conv = SparseConv2d(3, 5, 3, sparsity=.5)
    x = torch.randn(2, 3, 6, 6)
    y = conv(TensorImage(x))
    if kernels.kernels_available(): assert 'SparseFunction' in type(y.grad_fn).__name__
    assert type(y) is TensorImage and torch.equal(torch.Tensor(y), conv(x))
    y.sum().backward()

def test_fx_trace():
    model = nn.Sequential(SparseLinear(7, 5, sparsity=.6), nn.ReLU())
    x = torch.randn(3, 7)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))

# What a second reader found

def test_empty_batches_of_any_stride():
    "PyTorch calls a tensor without elements contiguous, whatever its strides."
    with torch.no_grad():
        assert SparseLinear(8, 4, sparsity=.5)(torch.randn(0, 16)[:, ::2]).shape == (0, 4)
        x = torch.randn(0, 4, 8, 8).to(memory_format=torch.channels_last)
        assert SparseConv2d.from_dense(nn.Conv2d(4, 6, 3))(x).shape == (0, 6, 6, 6)
    m,x = SparseLinear(8, 4, sparsity=.5),torch.randn(0, 8, requires_grad=True)
    m(x).backward(torch.randn(0, 8)[:, ::2])
    assert x.grad.shape == (0, 8) and not m.weight.grad.any()

def test_a_bias_replaced_during_a_call_stays_readable(monkeypatch):
    "The kernel runs without the GIL: it must hold the memory itself, not the parameter that may get another."
    m = SparseLinear(8, 4, sparsity=.5)
    seen = []
    monkeypatch.setattr(kernels.LinearPlan, 'forward', lambda self, x, v, bias, out, *a: seen.append(bias) or out.zero_())
    m(torch.randn(2, 8))
    old = m.bias.data_ptr()
    m.bias.data = torch.zeros(4)
    assert seen[0].data_ptr() == old != m.bias.data_ptr()

# Layers that something else changed, shares or wraps

@pytest.mark.parametrize('mode', ['zeros', 'circular'])
@pytest.mark.parametrize('padding', [(2,2), 'same', 'valid', 2])
def test_convolutions_follow_attributes_changed_later(mode, padding):
    conv,x = masked(nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode), .3),torch.randn(2, 8, 9, 9)
    sparse = SparseConv2d.from_dense(conv)
    sparse(x)  # plans for the old geometry
    for m in (conv, sparse): m.dilation,m.padding = (2,2),padding
    want = conv(x)
    for m in (sparse, SparseConv2d.from_dense(conv), sparse.to_dense(), compress(conv)): torch.testing.assert_close(m(x), want)

@needs_kernels
def test_a_pruned_layer_is_still_trained_after_a_forward_without_gradients(sparse_wins):
    m = nn.Sequential(nn.Linear(20, 10))
    nn.utils.prune.random_unstructured(m[0], 'weight', .9)
    with torch.no_grad(): m(torch.randn(2, 20))
    assert SparseLinear.from_dense(m[0]).weight.requires_grad
    assert swap_modules_with_sparse(m, only_if_faster=False)[0][0].weight.requires_grad
    m[0].weight_orig.requires_grad_(False)
    assert not SparseLinear.from_dense(m[0]).weight.requires_grad

@needs_kernels
@pytest.mark.parametrize('inplace', [False, True])
def test_a_tied_bias_stays_tied(inplace):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias,self.dec,self.other = nn.Parameter(torch.zeros(6)),masked(nn.Linear(8, 6), .1),masked(nn.Linear(8, 6), .1)
            self.dec.bias = self.other.bias = self.bias
    old = Head()
    m,_ = swap_modules_with_sparse(old, inplace=inplace, only_if_faster=False)
    assert type(m.dec) is SparseLinear and m.dec.bias is m.bias is m.other.bias and (m.bias is old.bias) == inplace

def test_a_weight_tied_to_the_model_itself_says_so():
    m = nn.ModuleDict(dict(dec=masked(nn.Linear(8, 6), .1)))
    m.table = m['dec'].weight
    assert 'tied to a parameter of the model' in swap_modules_with_sparse(m, only_if_faster=False)[1][0]['why']

@needs_kernels
@pytest.mark.parametrize('form', ['sparse', 'compressed'])
def test_type_leaves_the_structure_alone(form):
    m = masked(nn.Linear(300, 400), .05)
    m = nn.Sequential(SparseLinear.from_dense(m) if form == 'sparse' else compress(m))
    before = {n: b.clone() for n,b in m.named_buffers()}
    m.type(torch.bfloat16)
    assert m[0].weight.dtype is torch.bfloat16 and all(torch.equal(b, before[n]) and b.dtype is before[n].dtype for n,b in m.named_buffers())
    m(torch.randn(2, 300).bfloat16())

@needs_kernels
def test_an_averaged_structure_says_what_averaged_it():
    m = SparseLinear(350, 40, sparsity=.5, generator=torch.Generator().manual_seed(0))
    m.indices.copy_(m.indices*.95 + m.indices*.05)
    m.indices[1] = m.indices[0]
    with pytest.raises(ValueError, match='use_buffers=False'): m(torch.randn(2, 350))

@pytest.mark.parametrize('how', [lambda m: nn.utils.prune.random_unstructured(m, 'weight', .5), nn.utils.parametrizations.weight_norm,
                                 nn.utils.weight_norm], ids=['prune', 'parametrization', 'weight_norm'])
@pytest.mark.filterwarnings('ignore:.*weight_norm')
def test_computed_weights_load_their_own_state(how):
    def make(seed): return how(SparseLinear(20, 12, sparsity=.5, generator=torch.Generator().manual_seed(seed)))
    a,b,other = make(0),make(0),make(1)
    with torch.no_grad(): [p.add_(1) for p in a.parameters()]
    b.load_state_dict(a.state_dict())
    x = torch.randn(3, 20)
    assert torch.equal(a(x), b(x))
    with pytest.raises(RuntimeError, match='another structure'): other.load_state_dict(a.state_dict())

def test_a_dense_checkpoint_says_what_to_do():
    with pytest.raises(RuntimeError, match='from_dense'): SparseLinear(20, 12, sparsity=.5).load_state_dict(nn.Linear(20, 12).state_dict())

def test_measuring_leaves_modes_buffers_and_random_numbers_alone():
    class Merged(nn.Linear):
        merged = False
        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('n', torch.zeros(()))
        def forward(self, x):
            self.n += 1
            return x + torch.rand(())
    lin = Merged(4, 4)
    m = nn.Sequential(nn.Sequential(lin, nn.BatchNorm1d(4).eval()), Counts(), Merged(4, 4).eval(), nn.Sequential(lin))
    modes,n,rng = [l.training for l in m.modules()],m[1].n,torch.get_rng_state()
    layer_inputs(m, [lin], torch.randn(3, 4, generator=torch.Generator()))
    assert [l.training for l in m.modules()] == modes and not lin.merged and m[2].merged
    assert m[1].n is n and n == 0 and torch.equal(torch.get_rng_state(), rng)

@needs_kernels
@pytest.mark.parametrize('skip', ['0', nn.ModuleList, 'module'])
def test_skipping_a_container_skips_all_within(skip):
    m = nn.Sequential(nn.ModuleList([masked(nn.Linear(8, 8), .1)]), masked(nn.Linear(8, 8), .1))
    _,report = swap_modules_with_sparse(m, only_if_faster=False, skip_modules=m[0] if skip == 'module' else skip)
    assert [r['chosen'] for r in report] == ['dense', 'sparse'] and 'skipped' in report[0]['why']

@pytest.mark.parametrize('skip', [nn.Linear(8, 8), nn.ReLU(), [nn.Linear, nn.ReLU()]])
def test_skipping_what_matches_no_layer_raises(skip):
    with pytest.raises(ValueError, match='matches no layer'): swap_modules_with_sparse(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (2,8), skip_modules=skip)
    swap_modules_with_sparse(nn.Sequential(nn.Linear(8, 8)), (2,8), skip_modules=nn.Conv2d)      # a type may be one that other models have

@needs_kernels
@pytest.mark.parametrize('pruned', [False, True])
def test_layers_that_were_added_to_stay_dense(pruned):
    def own_forward(l):
        f = l.forward
        l.forward = lambda x: 2*f(x)
    for add in (own_forward, lambda l: l.add_module('lora', nn.Linear(8, 2))):
        l = masked(nn.Linear(8, 8), .1)
        if pruned: nn.utils.prune.custom_from_mask(l := nn.Linear(8, 8), 'weight', rand_mask((8,8), .1))
        add(l)
        _,report = swap_modules_with_sparse(nn.Sequential(l), only_if_faster=False)
        assert report[0]['chosen'] == 'dense' and 'of its own' in report[0]['why']
        with pytest.raises(TypeError, match='of its own'): compress(l)

def test_a_forward_replaced_on_a_compressed_layer_does_not_hinder_loading():
    l = compress(masked(nn.Linear(8, 8), .3))
    f,sd = l.forward,l.state_dict()
    l.forward = lambda x: 2*f(x)
    l.load_state_dict(sd)
    assert is_compressed(l) and torch.equal(l(x := torch.randn(2, 8)), 2*f(x))

@needs_kernels
@pytest.mark.parametrize('add', [lambda l: l.register_state_dict_post_hook(lambda *a: None), lambda l: l.register_state_dict_pre_hook(lambda *a: None),
                                 lambda l: l.register_load_state_dict_pre_hook(lambda *a: None), lambda l: l.register_load_state_dict_post_hook(lambda *a: None)])
def test_layers_with_hooks_on_their_state_stay_dense(add):
    add(l := masked(nn.Linear(8, 8), .1))
    assert 'state_dict' in swap_modules_with_sparse(nn.Sequential(l), only_if_faster=False)[1][0]['why']

def test_set_structure_changes_nothing_if_gradient_or_values_do_not_fit():
    m = SparseLinear(8, 4, sparsity=.5)
    before,w = state_of(m),torch.ones(4)
    indptr,indices = torch.arange(5),torch.arange(4)
    for kw in (dict(values=w[:,None]), dict(values=w, grad=torch.ones(3)), dict(grad=w[:,None])):
        with pytest.raises(ValueError, match=r'expected \(4,\)'): m.set_structure(indptr, indices, **kw)
        assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())
    m.set_structure(indptr, indices, w, w)
    w.zero_()
    assert m.weight.all() and m.weight.grad.all()

def state_of(m): return {k: v.clone() for k,v in m.state_dict().items()}

@needs_kernels
@pytest.mark.parametrize('m', both(), ids=['Linear', 'Conv2d'])
def test_batches_of_gradients(m):
    d,x = m.to_dense(),input_of(m)
    for frozen in (False, True):
        for l in (m, d): l.weight.requires_grad_(not frozen)
        jac = [torch.autograd.functional.jacobian(l, x, vectorize=True) for l in (m, d)]
        torch.testing.assert_close(*jac, rtol=1e-4, atol=1e-5)
    def grads(l):
        y = l(x)
        return torch.autograd.grad(y, list(l.parameters()), torch.ones(2, *y.shape), is_grads_batched=True)
    for l in (m, d): l.weight.requires_grad_(True)
    (gw,gb),(dw,db) = grads(m),grads(d)
    torch.testing.assert_close(gw, dw[:, m.mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gb, db)
    with pytest.raises(RuntimeError, match='once_differentiable'): torch.autograd.functional.jacobian(m, x, vectorize=True, create_graph=True)

@needs_kernels
def test_swapping_in_inference_mode():
    m = nn.Sequential(masked(nn.Linear(64, 64), .05))
    with torch.inference_mode():
        x = torch.randn(4, 64)
        fast,_ = swap_modules_with_sparse(m, example_inputs=x)
        swap_modules_with_sparse(m, (4,64))
        assert sparsify_conv2d_auto(masked(nn.Conv2d(3, 5, 3), .3), (2,3,6,6)).weight.requires_grad
        torch.testing.assert_close(fast(x), m(x))
    assert not any(p.is_inference() for p in fast.parameters())

def test_a_default_device_holds_the_structure_too():
    with torch.device('meta'): m = SparseLinear(1000, 1000, sparsity=.99)
    assert {t.device.type for t in m.state_dict().values()} == {'meta'} and m.nnz == 10000
    m.to_empty(device='cpu').load_state_dict((other := SparseLinear(1000, 1000, sparsity=.99)).state_dict())
    assert torch.equal(m(x := torch.randn(2, 1000)), other(x))

def test_wrong_arguments_say_what_is_expected():
    with pytest.raises(TypeError, match='expand'): SparseLinear.from_dense(compress(nn.Linear(20, 12)))
    with pytest.raises(TypeError, match='to_dense'): SparseLinear.from_dense(SparseLinear(20, 12, sparsity=.5))
    with pytest.raises(ValueError, match="share of zeros in 0…1, got '0.5'"): SparseLinear(10, 10, sparsity='0.5')
    with pytest.raises(ValueError, match='threshold is a share of zeros'): swap_modules_with_sparse(nn.Sequential(nn.Linear(8, 8)), (2,8), threshold=80)
    with pytest.raises(TypeError, match='takes an nn.Conv2d, not Linear'): sparsify_conv2d_auto(nn.Linear(8, 8), (2,8))

@pytest.mark.parametrize('layout', ['to_sparse', 'to_sparse_csr'])
@pytest.mark.filterwarnings('ignore:Sparse CSR')
def test_inputs_of_sparse_layout(layout):
    m = SparseLinear(20, 12, sparsity=.5)
    x = torch.randn(3, 20).relu()
    for l in (m, compress(m.to_dense())):
        y = l(getattr(x, layout)())
        torch.testing.assert_close(y, m(x))
        l.weight.grad = None
        y.sum().backward()
        torch.testing.assert_close(l.weight.grad, x.sum(0).expand(12, 20)[m.mask])

@needs_kernels
def test_what_fails_while_measuring_leaves_all_layers_dense(monkeypatch):
    n = iter(range(9))
    monkeypatch.setattr(L, 'measure_layer', lambda *a, **k: dict(sparse=.5, dense=1/(1-next(n))))
    m = net()
    with pytest.raises(ZeroDivisionError): swap_modules_with_sparse(m, (4,3,12,12), inplace=True)
    assert type(m[3]) is nn.Conv2d and type(m[7]) is nn.Linear
