"""The checks. Each takes a device, and gives findings; none takes more than half a minute on two CPU cores.

Rates are medians of runs of the contenders one after the other, in turn: a machine that others use shows ratios all the
same, and their limits are wide. What is compared with an oracle is compared with plain torch operations on the CPU.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_optim import kernels, known_torch
from ds_optim.blueprint import meta_model
from ds_optim.kernels.rounding import identity_of, key_of
from ds_optim.linalg.polar import newton_schulz
from ds_optim.memory.estimate import Request, predict
from ds_optim.optimizers.registry import optimizers
from ds_optim.selftest.result import CheckResult, failed, judged, not_here
from ds_optim.sharding.exchange import carrier_of

TOLERANCE = {
    **dict.fromkeys(("AdamW", "Lion", "Adan", "AdamMini"), 1e-5),
    **dict.fromkeys(("SWAN", "Muon", "NorMuon"), 1e-3),
    **dict.fromkeys(("Shampoo", "SOAP"), 1e-2),
}
"""Of a weight's movement in five steps. Polar factors, roots and bases magnify the rounding of sums."""
_BLOCKS = {"precondition_frequency": 2, "max_preconditioner_dim": 64}
OPTIONS: dict[str, dict[str, Any]] = {"Shampoo": _BLOCKS, "SOAP": _BLOCKS}
ON_CPU, LEAST, MOST = 2_000, 10_000, 100_000
"""Rows of what is timed, 2048 elements each; on an accelerator as many as it has room for: fewer would fit caches."""
BYTES = 10 * 4 * 2048  # of such a row in all fp32 tensors that are timed
KEPT_BY = ("AdamW", "AdamMini", "Shampoo")  # whose state is counted
BLOCK = 512  # bytes: what allocators of accelerators round up to
TABLES = 0.02
"""Of state, at most: what launches read, and flags of blocks, which lie beside it on an accelerator."""
LLAMA = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def devices() -> list[torch.device]:
    """The CPU, and the accelerator if there is one.

    Of several accelerators the current one; under ``torchrun`` that of this rank's place on its host, which becomes the
    current one. Where a host has more ranks than accelerators, some share one.
    """
    found = [torch.device("cpu")]
    if torch.accelerator.is_available() and (accelerator := torch.accelerator.current_accelerator()) is not None:
        if place := os.environ.get("LOCAL_RANK"):
            torch.accelerator.set_device_index(int(place) % torch.accelerator.device_count())
        found.append(torch.device(accelerator.type, torch.accelerator.current_device_index()))
    return found


def toy(device: torch.device) -> nn.Module:
    """One of every kind of parameter, the same values on every device."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        model = nn.Sequential(nn.Embedding(97, 64), nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 64))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, device="cpu") * 0.1
    return model.to(device)


def stepped(model: nn.Module, optimizer: Any, steps: int) -> None:
    """Steps on gradients that are the same on every device."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator, device="cpu")
            parameter.grad = gradient.to(parameter.device, parameter.dtype)
        optimizer.step()


def made(name: str, weights: Iterable[tuple[str, Tensor]], roles: object = None, **options: Any) -> Any:
    """An optimizer with the options of this test, and others."""
    cls: Any = optimizers()[name]
    return cls(weights, lr=1e-3, roles=roles, **OPTIONS.get(name, {}), **options)


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Updates by plain torch operations."""
    before = os.environ.get("DS_OPTIM_KERNELS")
    os.environ["DS_OPTIM_KERNELS"] = "eager"
    try:
        yield
    finally:
        os.environ.pop("DS_OPTIM_KERNELS")
        if before is not None:
            os.environ["DS_OPTIM_KERNELS"] = before


def updates(device: torch.device) -> Iterator[CheckResult]:
    """Five steps of every optimizer against the formula as it is written."""
    for name, tolerance in TOLERANCE.items():
        found, wanted, start = toy(device), toy(torch.device("cpu")), toy(torch.device("cpu"))
        stepped(found, made(name, found.named_parameters(), found), 5)
        with plain_torch():
            stepped(wanted, made(name, wanted.named_parameters(), wanted), 5)
        worst = apart(found, wanted, start)
        said = f"{worst:.1e} of the movement apart from plain torch operations, at most {tolerance:.0e}"
        yield judged(f"{name} on {device}", worst <= tolerance, said, relative_difference=worst)


def apart(found: nn.Module, wanted: nn.Module, start: nn.Module) -> float:
    """How far weights are from those that are wanted, relative to a weight's movement: the worst of them."""
    together = zip(
        *([one.detach().cpu() for one in model.parameters()] for model in (found, wanted, start)), strict=True
    )
    return max(float((a - b).norm() / (b - c).norm()) for a, b, c in together)


def rounding(device: torch.device) -> Iterator[CheckResult]:
    """Stochastic rounding has the same bits everywhere."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(257, 129, generator=generator, device="cpu").bfloat16()
    update = torch.randn(257, 129, generator=generator, device="cpu") * 1e-3
    ends = []
    for where, backend in ((torch.device("cpu"), "eager"), (device, kernels.backend_for(None, device))):
        here = target.clone().to(where)
        kernels.descend(backend, here, update.to(where), 0.999, (identity_of("w"), 5, key_of(0, 1)))  # type: ignore[arg-type]
        ends.append(here.cpu().view(torch.int16))
    differ = int((ends[0] != ends[1]).sum())
    yield judged(f"stochastic rounding on {device}", differ == 0, f"{differ} of {target.numel():,} bits differ")


def waits(device: torch.device) -> Iterator[CheckResult]:
    """No step waits for the device: torch raises where one does."""
    check = f"no host synchronisation on {device}"
    if device.type != "cuda":
        yield not_here(check, "torch finds waits on CUDA alone")
        return
    waiting = []
    for name, dtype in itertools.product(TOLERANCE, (torch.float32, torch.bfloat16)):
        model = toy(device).to(dtype)
        rounds = dtype == torch.bfloat16
        optimizer = made(name, model.named_parameters(), model, bf16_stochastic_round=rounds)
        stepped(model, optimizer, 4)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
            optimizer.step()
        except RuntimeError as error:
            waiting.append(f"{name} in {str(dtype)[6:]}: {' '.join(str(error).split())[:100]}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    yield judged(
        check, not waiting, "; ".join(waiting) or f"{len(TOLERANCE)} optimizers, fp32 and bf16, two steps each"
    )


def milliseconds(contenders: list[Callable[[], object]], device: torch.device, rounds: int = 7) -> list[float]:
    """The median time of each, taken in turn."""
    times: list[list[float]] = [[] for _ in contenders]
    for turn in range(rounds + 2):
        for contender, taken in zip(contenders, times, strict=True):
            synchronize(device)
            begin = time.perf_counter()
            contender()
            synchronize(device)
            if turn >= 2:  # the first ones build and fill caches
                taken.append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(taken) for taken in times]


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def step_time(device: torch.device) -> Iterator[CheckResult]:
    """AdamW and Adam-mini against torch's fused AdamW, and against a copy of as many bytes."""
    rows = ON_CPU if device.type == "cpu" else rows_with_room(device)
    if rows < LEAST and device.type != "cpu":
        wanted, there = (2 * BYTES * one / 1e9 for one in (LEAST, rows))
        said = f"needs {wanted:.1f} GB of free memory; this rank's share of what is free is {there:.1f} GB"
        yield not_here(f"step time on {device}", said)
        return
    shape = (rows, 2048)
    numel = math.prod(shape)
    parameters = [nn.Parameter(torch.zeros(shape, device=device)) for _ in range(3)]
    gradient = torch.randn(shape, device=device)
    for parameter in parameters:
        parameter.grad = gradient
    roles = {"w.weight": "linear"}
    ours, mini = (
        made(name, [("w.weight", one)], roles) for name, one in zip(("AdamW", "AdamMini"), parameters, strict=False)
    )
    fused = torch.optim.AdamW([parameters[2]], lr=1e-4, fused=True)
    other = torch.empty_like(gradient)
    found = milliseconds([ours.step, mini.step, fused.step, lambda: other.copy_(gradient)], device)
    copied = 2 * 4 * numel / found[3]  # bytes per ms
    for name, taken, streams in (("AdamW", found[0], 7), ("AdamMini", found[1], 5)):
        share = streams * 4 * numel / taken / copied
        said = (
            f"{taken:.2f} ms; torch's fused AdamW {found[2]:.2f} ms, at most twice that; {share:.0%} of a copy's rate"
        )
        check = f"{name}'s step on {device}, {numel:,} elements"
        yield judged(check, taken <= 2 * found[2], said, ms=taken, fused_ms=found[2], of_copy=share)


def rows_with_room(device: torch.device) -> int:
    """What is timed has half of the memory that is free, which ranks on one accelerator share.

    One that does not say how much is free gets the least.
    """
    free = known_torch.free(device)
    if free is None:
        return LEAST
    sharing = math.ceil(int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / torch.accelerator.device_count())
    return min(MOST, free // (2 * sharing * BYTES))


def matrix_rate(device: torch.device) -> Iterator[CheckResult]:
    """Newton-Schulz steps against products of the same sizes, both in fp32 though the environment may allow TF32."""
    side, steps = (256, 3) if device.type == "cpu" else (2048, 5)
    stack = torch.randn(4, side, side, device=device)
    stack = stack / stack.flatten(1).norm(dim=1)[:, None, None]
    one, two = torch.empty_like(stack), torch.empty_like(stack)

    def products() -> None:
        for _ in range(steps):
            torch.bmm(stack, stack.mT, out=one)
            torch.bmm(one, stack, out=two)

    with known_torch.fp32_products("ieee"):
        schulz, plain = milliseconds([lambda: newton_schulz(stack, steps, 0.5), products], device)
    share = plain / schulz
    said = f"{share:.0%} of the rate of torch.bmm in fp32, at least 50 %"
    yield judged(f"Newton-Schulz on {device}, 4 x {side} x {side}", share >= 0.5, said, of_products=share)


def memory(device: torch.device) -> Iterator[CheckResult]:
    """State as it is predicted, as it is kept, and as the allocator saw it."""
    meta = meta_model(LLAMA)
    for name in KEPT_BY:
        first = toy(device)
        stepped(first, made(name, first.named_parameters(), first), 1)  # libraries take what they keep for good
        weights = {key: nn.Parameter(torch.zeros(one.shape, device=device)) for key, one in meta.named_parameters()}
        optimizer = made(name, list(weights.items()), meta)
        for one in weights.values():
            one.grad = torch.zeros_like(one)
        del first
        gc.collect()  # nothing of earlier checks is to go away meanwhile
        before = known_torch.allocated(device)
        optimizer.step()
        after = known_torch.allocated(device)
        values = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        kept = sum(value.nbytes for value in values)
        request = Request(LLAMA, "toy", name, OPTIONS.get(name, {}), precision="fp32", seq_length=16, states_only=True)
        promised = sum(entry.bytes for entry in predict(request).fullest.state)
        numbers = {"kept_bytes": float(kept), "predicted_bytes": float(promised)}
        said = f"{kept:,} bytes kept, {promised:,} predicted"
        passes = math.isclose(kept, promised, rel_tol=1e-3)
        if before is not None and after is not None:
            there = [value.nbytes for value in values if value.device == device]  # step counts are the host's
            least, most = sum(there), round(sum(-(-one // BLOCK) * BLOCK for one in there) + TABLES * sum(there))
            numbers["allocated_bytes"] = float(after - before)
            said += f"; {after - before:,} more at the allocator, which rounds up: {least:,} to {most:,}"
            passes = passes and least <= after - before <= most
        yield judged(f"{name}'s state on {device}", passes, said, **numbers)


def ranks() -> Iterator[CheckResult]:
    """The ranks of ``torchrun`` train the same weights, and those that one rank trains alone.

    On the accelerator, if there is one whose memory their group carries; gloo carries CUDA's.
    """
    check = "the same weights on all ranks"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield not_here(check, "start it with: torchrun --no-python --nproc-per-node 2 ds-optim selftest")
        return
    group, everyone = dist.group.WORLD, dist.get_world_size()
    assert group is not None
    cpu, device = torch.device("cpu"), devices()[-1]
    device = device if carrier_of(device, group) == device else cpu
    for name in ("AdamMini", "SWAN", "Shampoo"):
        alone = toy(device)
        stepped(alone, made(name, alone.named_parameters(), alone), 5)
        shared = nn.parallel.DistributedDataParallel(toy(device), process_group=group)
        stepped(shared, made(name, shared.named_parameters(), shared), 5)
        mine = torch.cat([parameter.detach().flatten() for parameter in shared.parameters()]).cpu()
        theirs = [torch.empty_like(mine) for _ in range(everyone)]
        dist.all_gather(theirs, mine)
        differ = sum(not torch.equal(mine, other) for other in theirs)
        far = apart(shared, alone, toy(cpu))
        most = 1e-5 if device == cpu else TOLERANCE[name]  # there no result depends on how many blocks a rank has
        said = f"{everyone} ranks, {differ} with other weights; {far:.1e} of the movement from one rank's"
        said += f", at most {most:.0e}"
        yield judged(f"{name} on {device}: {check}", differ == 0 and far <= most, said, relative_difference=far)


CHECKS = (updates, rounding, waits, step_time, matrix_rate, memory)
"""Of a device, in the order of the table."""


def run() -> Iterator[CheckResult]:
    """All checks on all devices; what goes wrong in one is its finding, and the others follow."""
    found = [torch.device("cpu")]
    try:
        found = devices()
    except Exception as error:
        yield failed("the accelerator", error)
    for device in found:
        for check in CHECKS:
            yield from _caught(f"{check.__name__.replace('_', ' ')} on {device}", check, device)
    yield from _caught("ranks", ranks)


def _caught(name: str, check: Callable[..., Iterator[CheckResult]], *given: torch.device) -> Iterator[CheckResult]:
    """What a check found, and the error that ended it: of a driver, a compiler, a device, another rank."""
    try:
        yield from check(*given)
    except Exception as error:
        yield failed(name, error)
