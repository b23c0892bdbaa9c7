"""The right batch size: the noise scale while training, the direct measurement by branching, and advice.

`estimator` is arithmetic on norms, `gradient_hooks` and `strategies` take the norms where each strategy has them,
`noise_scale` joins them, and `callback` puts it into other people's loops. Nothing is imported until a name is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_optim.batch_size.estimator import Reading as Reading
    from ds_optim.batch_size.noise_scale import NoiseScale as NoiseScale
    from ds_optim.batch_size.noise_scale import NothingToCompareError as NothingToCompareError
    from ds_optim.batch_size.noise_scale import UnequalBatchesError as UnequalBatchesError
    from ds_optim.batch_size.strategies import NoiseScaleError as NoiseScaleError

_HOME = {
    "NoiseScale": "ds_optim.batch_size.noise_scale",
    "NoiseScaleError": "ds_optim.batch_size.strategies",
    "NothingToCompareError": "ds_optim.batch_size.noise_scale",
    "Reading": "ds_optim.batch_size.estimator",
    "UnequalBatchesError": "ds_optim.batch_size.noise_scale",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ds_optim.batch_size' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
