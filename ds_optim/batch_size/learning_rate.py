"""How the learning rate follows the batch size: one rule per optimizer.

Where an update is divided by the size of the gradient, element by element, by its sign or by its whole spectrum, its
length does not fall when noise is averaged away. While noise dominates (a batch well below the noise scale), `k` times
the batch then makes `k` times fewer updates, each of which can be `sqrt(k)` times as long. Plain SGD's update is linear
in the gradient, and so is its rule. All of this holds below the noise scale only: far above it the best rate grows no
more (1812.06162), and for sign-like updates falls again (2405.14578).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

Rule: TypeAlias = Literal["sqrt", "linear", "none"]

# The rule, and where it is from; "judgement" where no publication that we know states it for that optimizer.
RULES: Mapping[str, tuple[Rule, str]] = {
    "AdamW": ("sqrt", "2205.10287 (derived and tested for Adam and RMSprop); used for branching by 2505.23971"),
    "Lion": ("sqrt", "2405.14578 (signs of gradients, below the noise scale; it names Lion)"),
    "Adan": ("sqrt", "judgement: divided by a root mean square of gradients, as Adam is"),
    "AdamMini": ("sqrt", "judgement: divided by a root mean square over each block, as Adam is element by element"),
    "Shampoo": ("sqrt", "judgement: the direction is whitened and the default graft gives it Adam's length"),
    "SWAN": ("sqrt", "judgement: whitened, of fixed length: a sign of the whole matrix; the rest is Adam"),
    "SGD": ("linear", "1706.02677, 1812.06162"),
}


def rule_of(optimizer: str) -> Rule:
    """The rule of an optimizer, by class name.

    Raises:
        ValueError: it is not in `RULES`.
    """
    if optimizer not in RULES:
        raise ValueError(
            f"no learning-rate rule is known for {optimizer}, only for {', '.join(RULES)}: "
            f"give --lr-rule {'|'.join(get_args(Rule))}"
        )
    return RULES[optimizer][0]


def scale(rule: Rule, ratio: float) -> float:
    """What to multiply the learning rate with when the batch is multiplied with ``ratio``."""
    return {"sqrt": math.sqrt(ratio), "linear": ratio, "none": 1.0}[rule]
