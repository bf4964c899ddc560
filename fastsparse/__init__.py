"Dynamic sparse training for fastai and PyTorch in which sparsity is real."
__version__ = '0.1.0'

from importlib import import_module

_public = dict(
    distribution='uniform_sparsity first_layer_dense_uniform erdos_renyi_sparsity',
    score='weight_magnitude gradient_magnitude gradient_momentum random_score momentum_redistribution dense_grad opt_state opt_slots',
    topology='sparsify_model sparse_params sparseable_params add_mask_hooks apply_masks SparseHooks dense_gradients drop_and_grow set_masks',
    layers='SparseLinear SparseConv2d sparsify_conv2d_auto swap_modules_with_sparse',
    training='expand_model',
    reload='load_sparse_model load_sparse_state',
    checkpoint='save_checkpoint CheckpointCallback ResumeCallback',
    callback='DynamicSparseTrainingCallback SparseKernelsCallback sparse_kernels_report dense_parameters SET_presets SNFS_presets RigL_presets '
             'Sparsity EverActive',
    interpret='sparsity_report count_flops plot_sparsity plot_updates plot_training')
_home = {name: module for module,names in _public.items() for name in names.split()}
__all__ = list(_home)

def __getattr__(name):
    "Import a public name's module when it is first asked for, so that what needs no fastai doesn't import it."
    if name not in _home: raise AttributeError(f"module 'fastsparse' has no attribute {name!r}")
    return getattr(import_module(f'fastsparse.{_home[name]}'), name)

def __dir__(): return sorted([*globals(), *__all__])
