"""What one rank sends, multiplies, keeps and takes its time for, counted in real DeepSpeed engines.

Collectives are counted where torch dispatches them, under DeepSpeed and under the optimizer alike, so that nothing of
the product counts for itself. For `benchmarks/scaling.py`, on the ranks of any job.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ds_optim.blueprint import meta_model

_WARM_UP = 2  # steps, in which kernels are built and layouts resolved


def zero_config(stage: int) -> dict[str, Any]:
    """``zero_optimization`` of the engines that are counted.

    A small model would stay gathered between its forward and its backward pass, which a large one is too big for: at
    stage 3 nothing is kept and nothing is fetched ahead, so that both gathers happen.
    """
    config: dict[str, Any] = {"stage": stage}
    if stage == 3:
        nothing = ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
        config |= dict.fromkeys(nothing, 0)
    return config


@dataclass(slots=True)
class Counts:
    """Of one step on one rank.

    Attributes:
        sent: bytes, by who sends ("optimizer" or "zero") and collective.
        messages: collectives, by who calls them.
        flops: of matrix products in the optimizer's step.
    """

    sent: dict[tuple[str, str], float] = field(default_factory=dict)
    messages: Counter[str] = field(default_factory=Counter)
    flops: int = 0

    def of(self, who: str) -> float:
        """Bytes that ``who`` sends."""
        return sum(size for (its, _), size in self.sent.items() if its == who)


class Counting(TorchDispatchMode):
    """Counts collectives and, inside the optimizer's step, matrix products.

    Bytes are those that a rank must send under an algorithm that wastes none, with n bytes in N ranks: all-reduce 2 n
    (N-1)/N, reduce-scatter, all-gather, reduce and broadcast n (N-1)/N of the larger side (the last two on average),
    all-to-all what is for others.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = Counts()
        self.in_optimizer = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not isinstance(func, torch._ops.OpOverload):
            return out
        if func.namespace == "c10d":
            self._collective(func, args, kwargs or {})
        elif self.in_optimizer and func._overloadpacket in flop_registry:
            self.counts.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

    def _collective(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        name = func._overloadpacket.__name__.strip("_").replace("_base", "")
        if name in ("barrier", "monitored_barrier"):
            return
        group = dist.ProcessGroup.unbox(given["process_group"])
        ranks, rank = group.size(), group.rank()
        tensors = {key: _bytes(value) for key, value in given.items()}
        sent: float
        if name.startswith("alltoall"):
            whole = tensors.get("input", 0) or tensors.get("input_tensors", 0)
            splits = given.get("input_split_sizes") or [1] * ranks
            sent = whole * (sum(splits) - splits[rank]) / max(1, sum(splits))
        else:
            ways = 2 if name.startswith("allreduce") else 1
            sent = ways * max(tensors.values()) * (ranks - 1) / ranks
        who = "optimizer" if self.in_optimizer else "zero"
        self.counts.sent[who, name] = self.counts.sent.get((who, name), 0.0) + sent
        self.counts.messages[who] += 1


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(one) for one in value) if isinstance(value, list | tuple) else 0


@dataclass(slots=True)
class Contender:
    """One engine, and what its optimizer's hooks note."""

    name: str
    engine: Any
    counting: Counting = field(default_factory=Counting)
    seconds: list[float] = field(default_factory=list)
    in_optimizer: list[float] = field(default_factory=list)
    _since: float = 0.0
    _inside: float = 0.0

    def __post_init__(self) -> None:
        self.engine.basic_optimizer.register_step_pre_hook(self._enter)
        self.engine.basic_optimizer.register_step_post_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        self.counting.in_optimizer = True
        _synchronize()
        self._since = time.perf_counter()

    def _leave(self, *_: Any) -> None:
        _synchronize()
        self._inside += time.perf_counter() - self._since
        self.counting.in_optimizer = False

    def step(self, ids: Tensor) -> None:
        """Forward, backward, step, and their times."""
        self._inside, started = 0.0, time.perf_counter()
        self.engine.backward(self.engine(input_ids=ids, labels=ids).loss)
        self.engine.step()
        _synchronize()
        self.seconds.append(time.perf_counter() - started)
        self.in_optimizer.append(self._inside)

    @property
    def state_bytes(self) -> int:
        """Of optimizer state on this rank, each storage once."""
        storages = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for state in self.engine.basic_optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.untyped_storage().nbytes()
        }
        return sum(storages.values())


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def measure(
    model: Mapping[str, Any],
    optimizers: Mapping[str, Mapping[str, Any]],
    stage: int,
    tokens: int,
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """One rank's figures, by optimizer. All ranks call it together.

    Every optimizer has an engine of its own over the same small model; the timed steps take turns.

    Args:
        model: a transformers ``config.json``.
        optimizers: options by name of ours.
        stage: of ZeRO.
        tokens: per rank and step, in sequences as long as the model allows.
        rounds: timed steps of each engine.

    Returns:
        Of each optimizer: ``sent`` (bytes of its step), ``zero`` (bytes of everything else, and by collective),
        ``flops``, ``state``, ``share`` (of its step in the whole, over all rounds) and ``seconds`` (of its step, mean).
    """
    length = min(tokens, int(model.get("max_position_embeddings") or model.get("n_positions") or tokens))
    if tokens % length:
        raise ValueError(f"{tokens} tokens are no whole number of sequences of {length}: give a multiple")
    contenders = [
        Contender(name, _engine(model, name, options, stage, tokens // length)) for name, options in optimizers.items()
    ]
    ids = torch.arange(tokens).remainder(int(model["vocab_size"])).view(-1, length).to(contenders[0].engine.device)
    for one in contenders:
        for _ in range(_WARM_UP):
            one.step(ids)
        with one.counting:
            one.step(ids)
        one.seconds.clear()
        one.in_optimizer.clear()
    for _ in range(rounds):
        for one in contenders:
            one.step(ids)
    found = {}
    for one in contenders:
        counts = one.counting.counts
        found[one.name] = {
            "sent": counts.of("optimizer"),
            "zero": counts.of("zero"),
            "collectives": {f"{who} {kind}": size for (who, kind), size in counts.sent.items()},
            "messages": dict(counts.messages),
            "flops": counts.flops,
            "state": one.state_bytes,
            "share": sum(one.in_optimizer) / sum(one.seconds),
            "seconds": sum(one.in_optimizer) / rounds,
        }
        one.engine.destroy()
    contenders.clear()
    gc.collect()
    return found


def _engine(model: Mapping[str, Any], optimizer: str, options: Mapping[str, Any], stage: int, micro_batch: int) -> Any:
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "bf16": {"enabled": True},
        "zero_optimization": zero_config(stage),
        "optimizer": {"type": f"ds_optim.{optimizer}", "params": dict(options)},
    }
    meta_model(model)  # imports what the model needs: inside zero.Init, torch's own modules cannot be
    torch.manual_seed(0)
    sliced: Any = deepspeed.zero.Init(config_dict_or_path=config) if stage == 3 else contextlib.nullcontext()
    with sliced:
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model))
    engine, *_ = deepspeed.initialize(model=network, model_parameters=network.parameters(), config=config)
    return engine


def gathered(mine: Any) -> Sequence[Any]:
    """Every rank's value, in the order of the ranks."""
    found = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found
