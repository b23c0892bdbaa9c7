"""What ranks will do in a training that has not begun: the plan of a whole-matrix optimizer for any number of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ds_optim.optimizers.whole_matrix import WholeMatrixOptimizer
from ds_optim.sharding.plan import Plan
from ds_optim.sharding.predict import predicted_layouts
from ds_optim.subject import meta_model, subject


def plans(
    model_config: Mapping[str, Any],
    deepspeed_config: Mapping[str, Any],
    optimizer: str | None,
    stage: int | None,
    ranks: Sequence[int],
) -> Iterator[tuple[Plan, dict[str, int], str]]:
    """One plan per number of ranks, with what `Plan.explain` must know of the exchange, and a title.

    None at all for an optimizer whose elements never travel.

    Args:
        model_config: a transformers ``config.json``.
        deepspeed_config: a DeepSpeed JSON; its optimizer entry, ``ds_optim`` object and ZeRO stage are used.
        optimizer: a name of ours, which prevails over the JSON's.
        stage: ZeRO stage, which prevails over the JSON's; 2 if neither says.
        ranks: data-parallel ranks.

    Raises:
        SubjectError: no such model or optimizer.
        ValueError: options or roles that the optimizer refuses.
    """
    about = subject(meta_model(model_config), deepspeed_config, optimizer, {})
    made = about.optimizer
    if not isinstance(made, WholeMatrixOptimizer):
        return  # nothing travels
    zero = int(deepspeed_config.get("zero_optimization", {}).get("stage", 2)) if stage is None else stage
    for world_size in ranks:
        plan = made.plan_over(predicted_layouts(about.groups, zero, world_size))
        exchange = {"bucket_size": made.exchange_bucket_size, "exchange_bytes": made.exchange_dtype.itemsize}
        yield plan, exchange, f"{type(made).__name__}, ZeRO {zero}, {world_size} ranks"
