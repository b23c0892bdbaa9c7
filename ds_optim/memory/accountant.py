"""The memory accountant: measures where the bytes of a training step are.

    with MemoryAccountant() as account:                  # before the model is made
        model = ...
        engine, *_ = deepspeed.initialize(model=model, ...)
        account.watch(engine)                            # plain PyTorch and FSDP2: account.watch(model, optimizer)
        for batch in batches:
            engine.backward(engine(**batch).loss)
            engine.step()
    account.record().save("measured.json")               # account.gather() for all ranks

Every tensor storage is followed from its making to its end (`tracker`) and labelled by where it is kept (`labels`). The
phases are found by themselves: forward begins when the model is called with gradients on, backward when autograd
starts, the step when the engine or the optimizer steps; several passes may come before a step. What nobody claims when
a step is over is unaccounted for, and too much of it is an error. A step's own batch, output and gradients may outlive
it by one step, as in the usual loop; kept for longer, they are unaccounted for too.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ds_optim.deepspeed.events import called_in_training
from ds_optim.memory import cross_checks
from ds_optim.memory.errors import MemoryAccountError
from ds_optim.memory.labels import (
    Labelled,
    Labels,
    basic_optimizer,
    claims,
    local,
    state_entries,
    stepped,
    tensors_in,
    wrapper_of,
)
from ds_optim.memory.phase_hooks import PhaseCalls, Undo, hook_engine, hook_model, hook_optimizer
from ds_optim.memory.provenance import describe
from ds_optim.memory.record import Category, Check, Moment, Phase, RankRecord, Record, StateEntry, merge
from ds_optim.memory.steps import StepAccount, StepLog, balance, judge_unaccounted, named, resolve
from ds_optim.memory.tracker import Storage, StorageTracker
from ds_optim.ranks import ranks_of
from ds_optim.sharding.exchange import Ranks

LETTING_GO = 0.5
"""Seconds at most: a backend's own thread holds what a collective has brought for a moment longer than the caller."""


class MemoryAccountant:
    """Follows a training run; enter it before the model is made.

    Entered later, it still counts whatever model, optimizer and strategy keep, but not what somebody else does.

    Args:
        tolerance: largest share of the total that may be unaccounted for after init and after a step.
        strict: whether `record` raises above the tolerance; otherwise the record only shows it.
        timeline: whether the last step's course is kept.
        cross_check: who else counts each followed step: the profiler's memory ``events`` (slow), the ``process`` as the
            operating system sees it (asked for from the start), or nobody. May be changed between steps: the profiler
            takes memory itself, so the two are not for the same step; the record keeps the last checks of each.
        os_tolerance: how far the operating system's view may lie from ours, relative to it; None shows both and judges
            nothing, which is right for small models and where libraries meet a model's shapes of matrices for the
            first time (see `ds_optim.memory.cross_checks`).
        os_allowance: bytes by which the operating system may see more than that: what libraries keep for themselves.
        extra: tensors that only the user can name: ``{"teacher": (Category.PARAMETERS, tensor)}``; lists of tensors
            too.

    Raises:
        MemoryAccountError: this torch cannot be followed.
    """

    def __init__(
        self,
        tolerance: float = 0.005,
        *,
        strict: bool = True,
        timeline: bool = True,
        cross_check: cross_checks.Witness | None = None,
        os_tolerance: float | None = None,
        os_allowance: int = cross_checks.LIBRARIES,
        extra: Mapping[str, tuple[Category, Any]] | None = None,
    ) -> None:
        self.tolerance, self.strict, self.timeline = tolerance, strict, timeline
        self.cross_check, self.os_tolerance, self.os_allowance = cross_check, os_tolerance, os_allowance
        self.extra = dict(extra or {})
        self.running: list[Moment] = []
        """The moment after each measured step."""
        self._tracker = StorageTracker()
        self._labels = Labels(self._tracker)
        self._watched: Any = None
        self._model: nn.Module | None = None
        self._ranks = Ranks.of_job()
        self._optimizer: Any = None
        self._restore: list[Undo] = []
        self._at_init: dict[Storage, int] | None = None
        self._init_moment: Moment | None = None
        self._init_nobodys: dict[Storage, int] = {}
        self._log: StepLog | None = None
        self._phase: Phase | None = None
        self._last: StepAccount | None = None
        self._state: list[StateEntry] = []  # as of the last moment
        self._checks: dict[cross_checks.Witness, list[Check]] = {}
        self._allocator: list[Check] = []
        self._probe: cross_checks.Probe | None = None
        self._before: cross_checks.ProcessView | None = None
        self._began = 0.0
        self._seconds: dict[bool, list[float]] = {True: [], False: []}  # of steps, by whether they were followed

    # -- entering and leaving ---------------------------------------------------------------------------------------

    def __enter__(self) -> MemoryAccountant:
        if self.cross_check == "process":
            cross_checks.give_back_freed_blocks(at_once=True)
            self._restore.append(lambda: cross_checks.give_back_freed_blocks(at_once=False))
            self._before = cross_checks.ProcessView.now()
        self._tracker.__enter__()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        try:
            self._stop_following()
        except MemoryAccountError:
            self._tracker.abandon()
            if exc_type is None:  # the user's own error matters more
                raise
        finally:
            for restore in reversed(self._restore):
                restore()
            self._restore.clear()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Steps inside run bare, and are timed, to know what following costs. Between steps only."""
        self._stop_following()
        try:
            yield
        finally:
            self._tracker.__enter__()

    def _stop_following(self) -> None:
        self._log = None
        self._tracker.recording = False
        if self._tracker.is_entered:
            self._tracker.suspend()

    # -- watching ---------------------------------------------------------------------------------------------------

    def watch(self, model: Any, optimizer: Any = None) -> None:
        """Follow the training of a DeepSpeed engine, or of a model and its optimizer. Call it before the first step.

        Hooks are put on the model and the optimizer; on an engine ``step`` is wrapped. All of it is undone on exit.

        Raises:
            MemoryAccountError: a wrapper of DeepSpeed that is not known here, or a tensor labelled twice.
            TypeError: no optimizer was given, and this is no engine.
        """
        is_engine = hasattr(model, "is_gradient_accumulation_boundary") and hasattr(model, "module")
        if optimizer is None and not is_engine:
            raise TypeError("give watch() a DeepSpeed engine, or a model and its optimizer")
        self._watched = model
        self._model = model.module if is_engine else model
        self._optimizer = model.optimizer if is_engine else optimizer
        self._ranks = ranks_of(model, basic_optimizer(self._optimizer))
        self._claim()
        until = time.perf_counter() + (LETTING_GO if self._ranks.size > 1 else 0)
        while any(self._labels.of(one) is None for one in self._tracker.live) and time.perf_counter() < until:
            time.sleep(0.01)
        self._at_init = {storage: storage.bytes for storage in self._tracker.live}
        self._state = state_entries(self._tracker, basic_optimizer(self._optimizer))
        calls = PhaseCalls(
            forward=self._begin_forward,
            optimizer_step=self._begin_optimizer_step,
            handed=self._claim_gradients,
            step_done=self.step_done,
            passing=self._hint,
        )
        self._restore.extend(hook_model(called_in_training(model) if is_engine else model, calls))
        basic = basic_optimizer(self._optimizer)
        self._restore.extend(hook_engine(model, basic, calls) if is_engine else hook_optimizer(basic, calls))

    def _hint(self, values: Any, category: Category) -> None:
        if self._log is not None:
            for tensor in tensors_in(values):
                self._labels.hint(tensor, category)

    def _claim(self) -> None:
        assert self._model is not None
        given = [
            Labelled(category, f"extra {name!r}", tensor)
            for name, (category, tensors) in self.extra.items()
            for tensor in ([tensors] if isinstance(tensors, Tensor) else tensors)
        ]
        self._labels.claim([*claims(self._model, self._optimizer), *given])

    def _claim_gradients(self) -> None:
        """What the optimizer is handed may live no longer than its call."""
        if self._log is not None:
            tensors = stepped(self._optimizer)
            found = [
                Labelled(Category.GRADIENTS, "gradient of the optimizer", t.grad) for t in tensors if t.grad is not None
            ]
            self._labels.claim(found)

    # -- phases -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Say what is going on, where it cannot be seen: a loop that never calls the watched model itself.

        End the step by `step_done`.
        """
        {"forward": self._begin_forward, "backward": self._begin_backward, "step": self._begin_optimizer_step}[name]()
        yield

    def _begin_forward(self) -> None:
        if self._phase is None:
            self._begin_step()
        elif self._phase == "backward":
            self._mark_backward()
        self._enter("forward")

    def _begin_step(self) -> None:
        self._began = time.perf_counter()
        if not self._tracker.is_entered:
            return
        if self._init_moment is None and self._at_init is not None and self._last is not None:
            self._settle_init()
        self._labels.begin_step()
        tracker = self._tracker
        cross_checks.reset_allocator_peak(self._device)
        tracker.log.clear()
        tracker.recording = True
        self._log = StepLog({storage: storage.bytes for storage in tracker.live}, tracker.log)
        if self.cross_check is not None:
            limits = self.os_tolerance, self.os_allowance
            self._probe = cross_checks.start(self.cross_check, tracker.total, self._before, *limits)

    def _begin_backward(self) -> None:
        if self._phase == "forward":
            self._mark("after forward")
            self._enter("backward")

    def _begin_optimizer_step(self) -> None:
        if self._phase == "step":
            return
        if self._phase is None:
            if self._tracker.is_entered:
                warnings.warn(
                    "the optimizer steps, but no forward pass of the watched model was seen, so this step is not "
                    "accounted for: call the model that was given to watch(), or say the phases (account.phase)",
                    stacklevel=2,
                )
            return
        self._mark_backward()
        self._enter("step")
        self._claim_gradients()

    def _mark_backward(self) -> None:
        if self._log is not None:
            self._claim()
        self._mark("after backward")

    def _mark(self, name: Any) -> None:
        if self._log is not None:
            self._log.marks[name] = len(self._log.events)

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._tracker.phase = phase
        self._tracker.on_backward = self._begin_backward if phase == "forward" else None

    def step_done(self) -> None:
        """The training step is over. Called by itself when an engine or an optimizer has stepped."""
        if self._phase != "step":
            return
        seconds = time.perf_counter() - self._began
        self._seconds[self._log is not None].append(seconds)
        if self._log is not None:
            self._claim()
            self._state = state_entries(self._tracker, basic_optimizer(self._optimizer))
            account = resolve(
                self._log,
                self._tracker.live,
                self._labels,
                timeline=self.timeline,
                on_accelerator=self._on_accelerator,
            )
            if self._probe is not None:
                peak = max(moment.total for moment in account.moments)
                self._checks[self._probe.kind] = self._probe.checks(self._log, self._tracker.total, peak)
                self._probe = None
            self._allocator = cross_checks.allocator_checks(self._device, account.moments)
            self._last = account
            self.running.append(account.moments[-1])
            if self._init_moment is None:
                self._settle_init()
        self._phase, self._log = None, None
        self._tracker.recording, self._tracker.phase, self._tracker.on_backward = False, "between steps", None
        self._tracker.log = []

    def _settle_init(self) -> None:
        """Labels found in the first step (its batch, say) serve for what was alive before it."""
        assert self._at_init is not None
        self._init_nobodys = {s: size for s, size in self._at_init.items() if self._labels.of(s) is None}
        on_host = sum(size for s, size in self._at_init.items() if s.is_host) if self._on_accelerator else 0
        self._init_moment = named("after init", balance(self._at_init, self._labels), on_host)

    @property
    def _on_accelerator(self) -> bool:
        return self._device.type != "cpu"

    @property
    def _device(self) -> torch.device:
        """Where the model computes: under FSDP2's offload its parameters lie elsewhere."""
        assert self._model is not None
        parameters = [p for p in self._model.parameters() if p.device.type != "meta"]
        meshes = {p.device_mesh.device_type for p in parameters if isinstance(p, DTensor)} - {"cpu"}
        if meshes:
            return torch.device(meshes.pop(), torch.accelerator.current_device_index())
        return next((p.device for p in parameters), torch.device("cpu"))

    # -- results ----------------------------------------------------------------------------------------------------

    @property
    def overhead(self) -> float | None:
        """Time of the last step that was followed over the median of those that were not (see `paused`)."""
        followed, bare = self._seconds[True], self._seconds[False]
        return followed[-1] / statistics.median(bare) if followed and bare else None

    def record(self, **provenance: Any) -> Record:
        """The account of this rank: after init, and the last whole step.

        Args:
            **provenance: fields of `ds_optim.memory.record.Provenance` that replace what was found out.

        Raises:
            MemoryAccountError: nothing was watched, or more than the tolerance is unaccounted for (if ``strict``); the
                largest such storages are named with the phase and the line that made them.
        """
        if self._model is None or self._at_init is None:
            raise MemoryAccountError("nothing was watched: call watch(engine) or watch(model, optimizer) first")
        if self._init_moment is None:
            self._settle_init()
        assert self._init_moment is not None
        if self.strict:
            judge_unaccounted(self._init_moment, self._init_nobodys, self.tolerance)
            if self._last is not None:
                judge_unaccounted(self._last.moments[-1], self._last.nobodys, self.tolerance)
        slack = cross_checks.allocator_slack(self._device)
        moments = [self._init_moment, *(self._last.moments if self._last else [])]
        if slack is not None and self._last is not None:
            last = moments.pop()
            moments.append(last.model_copy(update={"amounts": {**last.amounts, Category.SLACK: slack}}))
        rank = RankRecord(
            rank=self._ranks.index,
            host=socket.gethostname(),
            elements=sum(local(tensor).numel() for tensor in stepped(self._optimizer)),
            moments=moments,
            state=self._state,
            checks=[check for checks in (*self._checks.values(), self._allocator) for check in checks],
            timeline=self._last.timeline if self._last else [],
        )
        found = describe(
            self._watched, self._model, self._optimizer, wrapper_of(self._optimizer), world_size=self._ranks.size
        )
        about = {**found, "overhead": self.overhead, **provenance}
        return Record.model_validate({"kind": "measured", "provenance": about, "ranks": [rank]})

    def gather(self, **provenance: Any) -> Record:
        """As `record`, of all ranks, on all ranks: a collective. If it fails on one rank it fails on all.

        The ranks are those of the engine or model that is watched, see `ds_optim.ranks.ranks_of`.
        """
        mine: Record | str
        try:
            mine = self.record(**provenance)
        except MemoryAccountError as error:
            mine = str(error)
        everyones = self._ranks.everyones(mine)
        problems = [f"rank {rank}: {one}" for rank, one in everyones.items() if isinstance(one, str)]
        if problems:
            raise MemoryAccountError("\n".join(problems))
        return merge([one for one in everyones.values() if isinstance(one, Record)])
