"What the lesson in 11_interpret does not show: every layer type against counts made by hand, and that counting leaves no trace."
from math import prod
import matplotlib; matplotlib.use('Agg')
import matplotlib.pyplot as plt
import pytest, torch
from torch import nn
from fastsparse import sparsify_model, sparse_params
from fastsparse.interpret import count_flops, plot_sparsity, plot_training, plot_updates, sparsity_report

N = 3
layers = {
    'Linear':           (lambda: nn.Linear(8, 6), (N,8), N),
    'Linear, 3 axes':   (lambda: nn.Linear(8, 6), (N,5,8), N*5),
    'Conv1d':           (lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1), (N,4,9), N*5),
    'Conv2d':           (lambda: nn.Conv2d(4, 8, (3,5), stride=(2,1), dilation=(1,2)), (N,4,9,12), N*4*4),
    'Conv2d, groups':   (lambda: nn.Conv2d(4, 8, 3, groups=4, padding='same'), (N,4,6,7), N*6*7),
    'Conv2d, no batch': (lambda: nn.Conv2d(4, 8, 3), (4,6,7), 4*5),
    'Conv3d':           (lambda: nn.Conv3d(2, 4, 3, stride=2), (N,2,7,9,5), N*3*4*2),
    'ConvTranspose1d':  (lambda: nn.ConvTranspose1d(4, 8, 4, stride=3), (N,4,5), N*5),
    'ConvTranspose2d':  (lambda: nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2), (N,4,5,6), N*5*6),
    'RNN':              (lambda: nn.RNN(8, 6, num_layers=2), (5,N,8), 5*N),
    'GRU':              (lambda: nn.GRU(8, 6, batch_first=True, bidirectional=True), (N,5,8), 5*N),
    'LSTM, projection': (lambda: nn.LSTM(8, 6, proj_size=4), (5,N,8), 5*N),
    'LSTM, no batch':   (lambda: nn.LSTM(8, 6), (5,8), 5),
    'GRUCell':          (lambda: nn.GRUCell(8, 6), (N,8), N),
}

@pytest.mark.parametrize('name', layers)
def test_each_weight_is_used_equally_often(name):
    make,shape,uses = layers[name]
    torch.manual_seed(0)
    m = nn.Sequential(make())
    sparsify_model(m, 0.5)
    df = count_flops(m, torch.randn(shape))
    for p in sparse_params(m):
        assert df.loc[p.name, 'dense_flops'] == 2*uses*p.n_weights
        assert df.loc[p.name, 'sparse_flops'] == 2*uses*p.n_active
    assert df.loc['total', 'sparse_flops'] == df.sparse_flops[:-1].sum()

def test_packed_sequence_counts_real_steps():
    x = nn.utils.rnn.pack_padded_sequence(torch.randn(5,2,8), [5,2])
    m = nn.LSTM(8, 6)
    assert count_flops(m, x).loc['weight_ih_l0', 'dense_flops'] == 2*7*prod(m.weight_ih_l0.shape)

def test_transformer_layer_off_its_fast_path():
    m = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    df = count_flops(m, torch.randn(2,5,16))
    assert df.loc['total', 'dense_flops'] == 2*10*(4*16*16 + 2*16*32)
    assert df.loc['self_attn.out_proj.weight', 'dense_flops'] == 2*10*16*16

def test_attention_with_separate_projections():
    m = nn.MultiheadAttention(16, 4, kdim=8, vdim=12)
    df = count_flops(m, torch.randn(7,2,16), torch.randn(5,2,8), torch.randn(5,2,12))
    assert df.dense_flops.tolist()[:4] == [2*14*16*16, 2*10*16*8, 2*10*16*12, 2*14*16*16]

def test_tied_weights_cost_twice_and_exist_once():
    m = nn.Sequential(nn.Linear(8,8), nn.ReLU(), nn.Linear(8,8))
    m[2].weight = m[0].weight
    sparsify_model(m, 0.5)
    df = count_flops(m, torch.randn(1,8))
    assert len(df) == 2 and df.loc['total', 'dense_flops'] == 2*2*64 and df.loc['total', 'sparse_flops'] == 2*2*32

def test_counting_leaves_no_trace():
    m = nn.Sequential(nn.Conv2d(1,4,3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144,2))
    m[2].eval()
    sparsify_model(m, 0.5)
    state = {k: v.clone() for k,v in m.state_dict().items()}
    hooks = [len(o._forward_hooks) + len(o._forward_pre_hooks) for o in m.modules()]
    rng = torch.get_rng_state()
    count_flops(m, torch.randn(2,1,8,8, generator=torch.Generator().manual_seed(0)))
    assert m.training and not m[2].training and torch.is_grad_enabled()
    assert all(v.equal(state[k]) for k,v in m.state_dict().items())
    assert [len(o._forward_hooks) + len(o._forward_pre_hooks) for o in m.modules()] == hooks
    assert torch.get_rng_state().equal(rng)
    with pytest.raises(RuntimeError): count_flops(m, torch.randn(2,3,8,8))
    assert m.training and [len(o._forward_hooks) + len(o._forward_pre_hooks) for o in m.modules()] == hooks
    with pytest.raises(ValueError, match='needs a batch'): count_flops(m)

def test_weight_dropout():
    from fastai.text.models.awdlstm import AWD_LSTM
    m = AWD_LSTM(50, 8, 12, 1)
    sparsify_model(m, 0.5)
    df = count_flops(m, torch.randint(50, (2,7)))
    for p in sparse_params(m): assert df.loc[p.name, 'sparse_flops'] == 2*14*p.n_active, p.name

def test_compressed_layers_report_as_before():
    from fastsparse.layers import compress
    m = nn.Sequential(nn.Conv2d(2,4,3), nn.Flatten(), nn.Linear(64,10))
    sparsify_model(m, 0.8)
    x = torch.randn(2,2,6,6)
    before = sparsity_report(m),count_flops(m, x)
    for i in (0,2): compress(m[i])
    assert sparsity_report(m).equals(before[0]) and count_flops(m, x).equals(before[1])

def test_layers_that_store_nonzeros_only():
    from fastsparse import SparseLinear, swap_modules_with_sparse
    m = nn.Sequential(nn.Conv2d(2,4,3,groups=2), nn.Flatten(), nn.Linear(64,10))
    sparsify_model(m, 0.8)
    x = torch.randn(2,2,6,6)
    before = sparsity_report(m),count_flops(m, x)
    fast,_ = swap_modules_with_sparse(m, threshold=0, only_if_faster=False)
    after = sparsity_report(fast)
    cols = ['shape', 'weights', 'nonzeros', 'sparsity', 'target']
    assert after[cols].equals(before[0][cols]) and count_flops(fast, x).equals(before[1])
    plt.close(plot_sparsity(fast).figure)
    huge = SparseLinear(10**6, 10**6, sparsity=1-1e-9)      # a mask of it would take 10^12 bytes
    r = sparsity_report(nn.Sequential(huge, nn.Linear(3, 2)))
    assert r.loc['total', 'weights'] == 10**12+6 and r.loc['0.weight', 'nonzeros'] == huge.nnz

def test_lazy_layer_is_named():
    with pytest.raises(ValueError, match='not initialised yet: 0.weight'): sparsity_report(nn.Sequential(nn.LazyLinear(3)))

def test_pictures_of_many_layers_and_of_plain_records():
    m = nn.Sequential(*[nn.Linear(8,8) for _ in range(40)])
    sparsify_model(m, 0.5, skip='0')
    names = [p.name for p in sparse_params(m)]
    ups = [dict(step=s, fraction=0.2, names=names, before=[32]*39, after=[32]*39, grown=[4]*39) for s in (10,20)]
    assert len(plot_sparsity(m).get_yticklabels()) == 40
    assert len(plot_updates(ups)[1].get_yticklabels()) == 39
    plot_training(m, ups, 'two\nlines').canvas.draw()
    plt.close('all')
