"""The gradient noise scale while a model trains: under DeepSpeed, DDP, FSDP2 or on one device.

    noise = NoiseScale(engine, seq_length=2048)
    ...                                              # train as before
    print(noise.read())

The small batch is one rank's micro-batch: hooks on the parameters see its gradient before it is accumulated, reduced or
sharded. The big batch is a whole optimizer step: its averaged gradient is measured before clipping. Only norms are
kept, no gradient is copied, nothing waits for the device, and one small all-reduce is added to a step.

A micro-batch's gradient arrives divided by the number n of micro-batches in the step; n times it is what is measured. A
loss that is not divided, or any scaled loss, changes |G|² and tr Σ alike and leaves the noise scale as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_optim.batch_size.estimator import Estimator, Reading
from ds_optim.batch_size.gradient_hooks import GradientHooks, norms, square_sum
from ds_optim.batch_size.strategies import (
    EngineStrategy,
    GradientPiece,
    NoiseScaleError,
    Strategy,
    TorchStrategy,
)
from ds_optim.instance_methods import after
from ds_optim.roles import infer_roles
from ds_optim.roles.role import Role

IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's
_FOLD = 4096  # norms that are kept before they are added up
_UNEQUAL = 0.01  # standard deviation / mean of the token counts from which on micro-batches count as unequal

# Why a step was left out: of several reasons the first counts.
_LEFT_OUT = (
    "one micro-batch on one rank made the step",
    "the ranks made different numbers of backward passes",
    "a micro-batch did not have {size} sequences",
    "the micro-batches had different numbers of tokens",
    "a gradient came in parts (a parameter shared by several checkpointed segments), or without a forward pass",
    "overflow, NaN, or a parameter that was first used late in the step",
)
_SIZE, _TOKENS = 2, 3  # positions of those that `read` may raise


class NothingToCompareError(NoiseScaleError):
    """One micro-batch on one rank makes the whole step: there is no smaller batch to compare it with."""


class UnequalBatchesError(NoiseScaleError):
    """Micro-batches differ in sequences or tokens, so that their gradients are not equally noisy."""


class NoiseScale:
    """Measures the gradient noise scale of every optimizer step, from when it is made until `detach`.

    All ranks make one, at the same place in the program. Steps that would mislead are left out and counted: skipped for
    micro-batches of another size, or of other numbers of tokens where ``labels`` tell them.

    Args:
        target: a DeepSpeed engine; or the module that the training loop calls: under DDP, under FSDP2's
            ``fully_shard``, or plain.
        optimizer: whose ``step()`` ends a batch; a DeepSpeed engine has its own.
        micro_batch_size: sequences in each backward pass of each rank; a DeepSpeed engine knows it.
        seq_length: tokens per sequence, for `Reading.tokens`.
        by_role: also for attention, mlp, embedding, head, norm and other parameters by themselves.
        beta: see `Estimator`; 0.99 looks back about 100 steps.
        min_updates: steps before a reading can be ready.
        batch_dim: the dimension of the first tensor that the model is called with which counts sequences; None: they
            are not checked (packed inputs, several forward passes of other sizes).

    Raises:
        NothingToCompareError: one rank and no gradient accumulation, if that is known; else at the first step.
        NoiseScaleError: a strategy under which a rank's gradient is not one of whole sequences.

    Source: McCandlish et al., 1812.06162, appendix A.
    """

    def __init__(
        self,
        target: Any,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        micro_batch_size: int | None = None,
        seq_length: int | None = None,
        by_role: bool = False,
        beta: float = 0.99,
        min_updates: int = 50,
        batch_dim: int | None = 0,
    ) -> None:
        is_engine = hasattr(target, "train_micro_batch_size_per_gpu")
        self._size = _micro_batch_size(target, micro_batch_size, is_engine)
        self._seq_length, self._batch_dim = seq_length, batch_dim
        self._strategy: Strategy
        if is_engine:
            self._strategy = EngineStrategy(target, self.part_measured, self.step_measured)
        else:
            self._strategy = TorchStrategy(target, _basic(optimizer), self.part_measured, self.step_measured)
        try:
            if is_engine and target.gradient_accumulation_steps() * self._ranks < 2:
                raise _nothing_to_compare()
            roles = infer_roles(self._strategy.module) if by_role else {}
            self._roles = sorted({family(role) for name, role in roles.items() if name in self._strategy.parameters})
            rows = {role: row for row, role in enumerate(self._roles)}
            self._row = {name: rows[family(roles[name])] if by_role else 0 for name in self._strategy.parameters}
            self._estimator = Estimator(1 + len(self._roles), beta, min_updates)
        except BaseException:
            self._strategy.detach()
            raise
        self._counts = torch.zeros(1 + len(_LEFT_OUT), dtype=torch.float64, device="cpu")
        self._batch = 0
        self._start_step()
        self._hooks = GradientHooks(self._strategy.module, self._strategy.parameters, self.gradient_arrived)
        self._forward = self._strategy.module.register_forward_pre_hook(self._called, with_kwargs=True)
        if is_engine:
            after(target, "destroy", self.detach)

    # ------------------------------------------------------------------------------------------------- what users call

    def read(self) -> Reading:
        """The estimate now. The only place that waits for the device; asks nothing of other ranks.

        Raises:
            UnequalBatchesError: all steps so far were left out for the sizes of their micro-batches.
        """
        good, *left_out = (int(count) for count in self._counts.tolist())
        reasons = [
            f"{count} of {good + sum(left_out)} steps left out: {reason.format(size=self._size)}"
            for count, reason in zip(left_out, _LEFT_OUT, strict=True)
            if count
        ]
        if good == 0 and (left_out[_SIZE] or left_out[_TOKENS]):
            raise UnequalBatchesError(
                f"{'; '.join(reasons)}. Their gradients are not equally noisy. Use micro-batches of one size "
                "(drop_last=True, and micro_batch_size as it is; batch_dim=None if the first input does not count "
                "sequences), and sequences of one length (pack them instead of padding)"
            )
        about = "; ".join(reasons)
        total, *parts = (
            self._estimator.read(row, good, batch=self._batch, seq_length=self._seq_length, about=about)
            for row in range(1 + len(self._roles))
        )
        return replace(total, roles=dict(zip(self._roles, parts, strict=True)))

    def detach(self) -> None:
        """Remove every hook; the readings stay."""
        self._hooks.remove()
        self._forward.remove()
        self._strategy.detach()

    def __enter__(self) -> NoiseScale:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, the same on every rank. Waits for the device."""
        return {**self._estimator.state_dict(), "counts": self._counts.tolist(), "batch": self._batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another one was, with the same ``beta`` and ``by_role``, on any number of ranks, at any stage.

        Raises:
            ValueError: they are not.
        """
        self._estimator.load_state_dict(state)
        self._counts = torch.tensor(state["counts"], dtype=torch.float64, device=self._counts.device)
        self._batch = int(state["batch"])

    # ------------------------------------------------------------------------------------------------ what hooks call

    @property
    def _rows(self) -> int:
        return max(1, len(self._roles))

    @property
    def _ranks(self) -> int:
        return 1 if self._strategy.group is None else dist.get_world_size(self._strategy.group)

    def _start_step(self) -> None:
        self._passes: dict[str, int] = {}  # backward passes that reached each parameter
        self._device = torch.device("cpu")  # where gradients arrive
        self._scale = 1.0  # of the loss
        self._forwards = 0
        self._is_size_wrong = False
        self._tokens: list[Tensor] = []
        self._norms: list[list[Tensor]] = [[] for _ in range(self._rows)]
        self._small: list[list[Tensor]] = [[] for _ in range(self._rows)]  # sums of squares
        self._big: dict[int, Tensor] = {}  # (rows,) sums of squares of each part of the averaged gradient

    def _called(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins."""
        if not torch.is_grad_enabled():
            return
        if self._strategy.starts_anew():
            self._start_step()
        self._forwards += 1
        if self._batch_dim is not None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
            self._is_size_wrong |= bool(tensors) and tensors[0].shape[self._batch_dim] != self._size
        labels = kwargs.get("labels")
        if isinstance(labels, Tensor):
            self._tokens.append((labels != IGNORED_LABEL).sum().double())

    def gradient_arrived(self, name: str, gradient: Tensor) -> None:
        """Called by hooks: a parameter's gradient of one micro-batch is there."""
        if self._forwards == 0 and self._strategy.starts_anew():
            self._start_step()
        self._strategy.gradient_arrives()
        if not self._passes:
            self._scale = self._strategy.loss_scale()  # DeepSpeed may double it before the step is measured
        self._passes[name] = self._passes.get(name, 0) + 1
        self._device = gradient.device
        row = self._row[name]
        found = self._norms[row]
        found += norms(gradient)
        if len(found) > _FOLD:
            self._small[row].append(square_sum(found))
            found.clear()

    def part_measured(self, part: int, pieces: Iterator[GradientPiece]) -> None:
        """Called by hooks: a part of the averaged gradient can be measured; measured again, it counts as it was last.

        Args:
            part: its number.
            pieces: of its gradients.
        """
        found: dict[tuple[int, float], list[Tensor]] = {}
        for name, values, share in pieces:
            found.setdefault((self._row[name], share), []).extend(norms(values))
        sums: list[list[Tensor]] = [[] for _ in range(self._rows)]
        for (row, share), of_row in found.items():
            sums[row].append(square_sum(of_row) * share)
        self._big[part] = self._totals(sums)

    def _totals(self, sums: list[list[Tensor]]) -> Tensor:
        """(rows,) float64, where gradients arrive; a row may have nothing to add up."""
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        return torch.stack([torch.stack([zero, *(one.to(zero) for one in row)]).sum() for row in sums])

    def step_measured(self) -> None:
        """Called by hooks: all parts of a step were measured. One all-reduce, then the averages."""
        passes, ranks = max(self._passes.values(), default=0), self._ranks
        if passes == 0:  # a framework makes or loads optimizer state
            return
        if passes * ranks == 1 and self._batch == 0:
            raise _nothing_to_compare()
        scale = self._scale
        for sums, found in zip(self._small, self._norms, strict=True):
            if found:
                sums.append(square_sum(found))
        small = self._totals(self._small)
        big = torch.stack(list(self._big.values())).sum(0) if self._big else torch.full_like(small, torch.nan)
        tokens = self._totals([self._tokens, [count.square() for count in self._tokens]])
        told = [passes, passes**2, self._is_size_wrong, passes > self._forwards, len(self._tokens)]
        # Filled on the device: a copy from the host would wait for it.
        everyones = torch.cat([small, big, torch.stack([small.new_full((), float(one)) for one in told]), tokens])
        if ranks > 1:
            dist.all_reduce(everyones, group=self._strategy.group)
        self._batch = passes * ranks * self._size
        self._start_step()
        self._enter(everyones, ranks, scale)

    def _enter(self, sums: Tensor, ranks: int, scale: float) -> None:
        """A step's sums over all ranks into the averages. Nothing here waits for the device."""
        small, big, told = sums.split([self._rows, self._rows, sums.numel() - 2 * self._rows])
        passes, passes_sq, wrong_size, in_parts, token_counts, tokens, tokens_sq = told.unbind()
        # Each micro-batch's gradient times the passes per rank, squared, averaged over all passes.
        small = small * passes / ranks**2 / scale**2
        big = big / scale**2
        if self._roles:
            small, big = (torch.cat([one.sum()[None], one]) for one in (small, big))
        left_out = torch.stack(
            [
                passes < 2,
                ranks * passes_sq != passes.square(),
                wrong_size > 0,
                token_counts * tokens_sq > (1 + _UNEQUAL**2) * tokens.square(),
                in_parts > 0,
                ~(small.isfinite().all() & big.isfinite().all()),
            ]
        )
        is_good = ~left_out.any()
        is_first = left_out & (left_out.cumsum(0) == 1)
        self._counts = self._counts.to(sums.device) + torch.cat([is_good[None], is_first])
        size = torch.full_like(passes, self._size)
        self._estimator.update(small, big, size, size * passes, is_good)


def family(role: Role) -> str:
    """The part of a model that a role belongs to: attention, mlp, embedding, head, norm or other."""
    kinds = {part.kind for part in role.parts} or {role.kind}
    if kinds <= {"query", "key", "value", "attention_output"}:
        return "attention"
    if kinds <= {"mlp", "router"}:
        return "mlp"
    if role.kind in ("norm", "bias"):
        return "norm"
    return role.kind if role.kind in ("embedding", "head") else "other"


def _micro_batch_size(target: Any, given: int | None, is_engine: bool) -> int:
    size = target.train_micro_batch_size_per_gpu() if is_engine and given is None else given
    if size is None:
        raise NoiseScaleError("micro_batch_size is not given: say how many sequences a backward pass of a rank has")
    if size < 1:
        raise NoiseScaleError(f"micro_batch_size is {size}; it must be 1 or more")
    return int(size)


def _basic(optimizer: Any) -> torch.optim.Optimizer:
    while hasattr(optimizer, "optimizer"):  # Accelerate's wrapper
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise NoiseScaleError("optimizer is not given: without a DeepSpeed engine its step() tells where a batch ends")
    return optimizer


def _nothing_to_compare() -> NothingToCompareError:
    return NothingToCompareError(
        "one micro-batch on one rank makes the whole step, so there is no smaller batch to compare it with: accumulate "
        "gradients over 2 micro-batches or more (half the micro-batch size keeps the batch), or train on more ranks"
    )
