"""How the learning rate follows the batch size: one rule per optimizer.

Where an update is divided by the size of the gradient, element by element, by its sign or by its whole spectrum, its
length does not fall when noise is averaged away. While noise dominates (a batch well below the noise scale), `k` times
the batch then makes `k` times fewer updates, each of which can be `sqrt(k)` times as long. Plain SGD's update is linear
in the gradient, and so is its rule. All of this holds below the noise scale only: far above it the best rate grows no
more (1812.06162), and for sign-like updates falls again (2405.14578).
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

from ds_optim.optimizers.registry import optimizers
from ds_optim.rule import BatchScaling

ScalingRule: TypeAlias = Literal["sqrt", "linear", "none"]

_OTHERS = {"SGD": BatchScaling("linear", "1706.02677, 1812.06162")}


def scaling_rules() -> dict[str, BatchScaling]:
    """The rule of every optimizer that is known, by class name, and where it is from.

    The source is "judgement" where no publication that we know states it for that optimizer.
    """
    return {**{name: cls.rule.batch_scaling for name, cls in optimizers().items()}, **_OTHERS}


def rule_of(optimizer: str) -> ScalingRule:
    """The rule of an optimizer, by class name.

    Raises:
        ValueError: it is not in `scaling_rules`.
    """
    known = scaling_rules()
    if optimizer not in known:
        raise ValueError(
            f"no learning-rate rule is known for {optimizer}, only for {', '.join(known)}: "
            f"give --lr-rule {'|'.join(get_args(ScalingRule))}"
        )
    return known[optimizer].law


def scale(rule: ScalingRule, ratio: float) -> float:
    """What to multiply the learning rate with when the batch is multiplied with ``ratio``."""
    return {"sqrt": math.sqrt(ratio), "linear": ratio, "none": 1.0}[rule]
