"""One accelerator, ten minutes: rates, waits, bits, matrix algebra, and how all optimizers train a small Llama.

    python benchmarks/accelerator.py [--minutes 10] [--only SECTION...] [--small] [--out docs/results]

Writes accelerator.json and accelerator.md after every finding: a run that is cut off leaves what it found. Without an
accelerator it ends with status 2, unless ``--small`` tries the same code on the CPU with toy sizes, whose numbers mean
nothing. Exit status 1 if a target is missed.

Rates are here; what must hold at any rate is in `accelerator_soundness.py`, and the training, which gets the time that
is left, in `accelerator_training.py`. What has not begun when time is up is left out, and said.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pages
import torch
from accelerator_bench import Bench, Sizes, TimeIsUpError
from accelerator_soundness import accounts, bits, engines, noise_scale, surroundings, two_ranks
from accelerator_training import convergence
from processor import processor
from torch import Tensor, nn

import ds_optim
from ds_optim.linalg import triangle
from ds_optim.linalg.inverse_roots import inverse_roots
from ds_optim.linalg.polar import cubic, newton_schulz, polynomial_flops
from ds_optim.linalg.precision import PRECISIONS, MatmulPrecision
from ds_optim.selftest import checks
from ds_optim.selftest.result import CheckResult, failed, judged, not_here

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
OF_COPY, OF_ONE_TENSOR, OF_MATMUL = 0.85, 1.1, 0.5
HOST_MS, OF_FUSED_HOST = 2.0, 1.5  # of a step of 300 tensors, at most
OF_MEAN_STEP = 2.0  # Shampoo's longest of ten, at most
STREAMS = {"AdamW": 7, "Lion": 5, "Adan": 11, "AdamMini": 5}  # read and written per element
PRODUCTS = 20  # that are timed together: of one alone the launch and the wait would be timed


# -- sections ----------------------------------------------------------------------------------------------------------


def selftest(bench: Bench) -> Iterator[CheckResult]:
    """`ds-optim selftest`."""
    for one in checks.run():
        yield one
        bench.look()


def bandwidth(bench: Bench) -> Iterator[CheckResult]:
    """A step over one large tensor against a copy."""
    columns = 4096 if bench.sizes.numel > 1_000_000 else 60
    shape = (bench.sizes.numel // columns, columns)
    numel = math.prod(shape)
    copied = _copied(bench, shape)
    for dtype, kept, options in (
        (torch.float32, torch.float32, {}),
        (torch.bfloat16, torch.float32, {"bf16_stochastic_round": True}),
        (torch.bfloat16, torch.bfloat16, {"bf16_stochastic_round": True}),
    ):
        for name, streams in STREAMS.items():
            parameter = nn.Parameter(torch.zeros(shape, dtype=dtype, device=bench.device))
            parameter.grad = torch.randn_like(parameter)
            settings = {**options, "state_dtype": str(kept).removeprefix("torch."), "roles": {"w.weight": "linear"}}
            optimizer = getattr(ds_optim, name)([("w.weight", parameter)], lr=1e-4, **settings)
            first, extra = bench.one_step(optimizer)
            fused = torch.optim.AdamW([parameter], lr=1e-4, fused=True)
            taken, theirs = bench.milliseconds(optimizer.step, fused.step)
            moved = numel * (3 * dtype.itemsize + (streams - 3) * kept.itemsize)
            share = moved / taken / copied
            said = f"{taken:.2f} ms, {share:.0%} of a copy's rate ({copied / 1e9:.2f} TB/s), at least {OF_COPY:.0%}"
            said += f"; torch's fused AdamW {theirs:.2f} ms; first step {first:.0f} ms and {extra / 1e6:.0f} MB more"
            numbers = {"ms": taken, "of_copy": share, "copy_bytes_per_ms": copied, "fused_ms": theirs}
            numbers |= {"first_step_ms": first, "first_step_extra_bytes": extra}
            what = f"{name}, {numel:,} elements in {str(dtype)[6:]}, state in {str(kept)[6:]}"
            yield judged(what, share >= OF_COPY, said, **numbers)
            del optimizer, fused, parameter


def _copied(bench: Bench, shape: tuple[int, int]) -> float:
    """Bytes that a copy reads and writes per ms."""
    one, other = torch.zeros(shape, device=bench.device), torch.empty(shape, device=bench.device)
    (taken,) = bench.milliseconds(lambda: other.copy_(one))
    return 2 * one.nbytes / taken


def many_tensors(bench: Bench) -> Iterator[CheckResult]:
    """300 tensors against one of as many elements; how long the host takes over them, against torch's fused AdamW."""
    rows, columns = max(bench.sizes.numel // 300 // 512, 2), 512 if bench.sizes.numel > 1_000_000 else 60
    whole = nn.Parameter(torch.zeros(300 * rows, columns, device=bench.device))
    parts = [
        (f"layers.{index}.weight", nn.Parameter(torch.zeros(rows, columns, device=bench.device)))
        for index in range(300)
    ]
    for parameter in (whole, *(one for _, one in parts)):
        parameter.grad = torch.randn_like(parameter)
    fused = torch.optim.AdamW([one for _, one in parts], lr=1e-4, fused=True)
    their_host = bench.host_milliseconds(fused.step)
    for name in STREAMS:
        made = [
            getattr(ds_optim, name)(given, lr=1e-4, roles={"*": "linear"}) for given in ([("weight", whole)], parts)
        ]
        single, many, theirs = bench.milliseconds(*(one.step for one in made), fused.step)
        said = (
            f"{many:.2f} ms, one tensor {single:.2f} ms, at most {OF_ONE_TENSOR} of it; torch's fused {theirs:.2f} ms"
        )
        yield judged(f"{name}, 300 tensors", many <= OF_ONE_TENSOR * single, said, ms=many, one=single, fused=theirs)
        host = bench.host_milliseconds(made[1].step)
        said = f"{host:.2f} ms, at most {HOST_MS:.0f} and {OF_FUSED_HOST} of torch's fused AdamW's {their_host:.2f} ms"
        good = host <= min(HOST_MS, OF_FUSED_HOST * their_host)
        yield judged(f"{name}, 300 tensors, the host's time", good, said, ms=host, fused_ms=their_host)


def matrices(bench: Bench) -> Iterator[CheckResult]:
    """SWAN's step and Newton-Schulz in every precision against torch.matmul's rate in bf16."""
    side, layers = bench.sizes.side, bench.sizes.layers
    rate = matmul_rate(bench)
    wide = side * 8 // 3 // 16 * 16
    shapes = [(side, side)] * 4 + [(wide, side)] * 2 + [(side, wide)]
    weights = [
        (f"layers.{layer}.{index}.weight", nn.Parameter(torch.zeros(shape, device=bench.device)))
        for layer in range(layers)
        for index, shape in enumerate(shapes)
    ]
    for _, weight in weights:
        weight.grad = torch.randn_like(weight)
    for precision in PRECISIONS:
        optimizer = ds_optim.SWAN(weights, lr=1e-4, roles={"*": "linear"}, matmul_precision=precision)
        (taken,) = bench.milliseconds(optimizer.step, rounds=3)
        flops = sum(_flops(precision, weight) for _, weight in weights)
        share = flops / taken / rate
        limit = OF_MATMUL if precision == "bf16" else 0.0
        said = f"{taken:.1f} ms, {flops / taken / 1e9:.0f} TFLOP/s, {share:.0%} of torch.matmul's in bf16"
        said += f", at least {limit:.0%}" if limit else ""
        yield judged(f"SWAN, {layers} layers of {side}, {precision}", share >= limit, said, ms=taken, of_matmul=share)
        del optimizer
    stack = torch.randn(8, side, side, device=bench.device)
    stack /= stack.flatten(1).norm(dim=1)[:, None, None]
    exact = newton_schulz(stack[:1].cpu(), 5, 0.5)
    for precision in PRECISIONS:
        found = newton_schulz(stack[:1], 5, 0.5, precision).cpu()
        error = float((found - exact).norm() / exact.norm())
        bound = {"ieee": 1e-4, "tf32": 1e-2, "bf16": 5e-2}[precision]
        said = f"{error:.1e} from the CPU's in fp32, at most {bound:.0e}"
        yield judged(f"Newton-Schulz in {precision}", error <= bound, said, error=error)
    if triangle.serves(stack):
        operand, out = stack.bfloat16(), torch.empty(8, side, side, device=bench.device, dtype=torch.bfloat16)
        half, full = bench.milliseconds(
            lambda: triangle.times_own_transpose(operand, out=out), lambda: torch.bmm(operand, operand.mT, out=out)
        )
        said = f"{half:.2f} ms, torch.bmm {full:.2f} ms"
        yield judged("X X^T by one triangle, bf16", half <= full, said, ms=half, bmm_ms=full)


def matmul_rate(bench: Bench) -> float:
    """Flops per ms of `torch.matmul` in bf16."""
    side = bench.sizes.side
    one = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
    product = torch.empty_like(one)

    def products() -> None:
        for _ in range(PRODUCTS):
            torch.matmul(one, one, out=product)

    (taken,) = bench.milliseconds(products)
    return PRODUCTS * 2 * side**3 / taken


def _flops(precision: MatmulPrecision, matrix: Tensor) -> float:
    """Of ten Newton-Schulz steps of a matrix, as they are taken: of X X^T one triangle, where that is computed."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    has_triangle = precision != "ieee" and triangle.serves(wide[None])
    return polynomial_flops(*wide.shape, cubic(0.8, 10), precision) * (0.75 if has_triangle else 1)


def roots(bench: Bench) -> Iterator[CheckResult]:
    """Inverse roots by products against fp64 eigendecomposition: how right, and how fast."""
    side = bench.sizes.rank
    settings = {"eps": 1e-6, "relative": True}
    for condition in (1e2, 1e6, 1e10):
        generator = torch.Generator().manual_seed(0)
        q, _ = torch.linalg.qr(torch.randn(side, side, dtype=torch.float64, generator=generator))
        eigenvalues = torch.logspace(0, -math.log10(condition), side, dtype=torch.float64)
        factor = ((q * eigenvalues) @ q.T).float()[None]
        exact, _ = inverse_roots(factor, -0.25, method="eigh", **settings)  # type: ignore[arg-type]
        here = factor.to(bench.device).expand(4, side, side).contiguous()
        double = here[0].double()
        (decomposed,) = bench.milliseconds(lambda double=double: torch.linalg.eigh(double), rounds=3)  # type: ignore[misc]
        for precision in ("ieee", "bf16"):

            def take(precision: str = precision, here: Tensor = here) -> tuple[Tensor, Tensor]:
                return inverse_roots(here, -0.25, method="newton", precision=precision, **settings)  # type: ignore[arg-type]

            found, withheld = take()
            error = float((found[:1].cpu() - exact).norm() / exact.norm())
            (taken,) = bench.milliseconds(take, rounds=3)
            said = f"{error:.1e} from fp64, at most 1e-02; {taken / 4:.2f} ms each, eigh in fp64 {decomposed:.2f} ms"
            good = not bool(withheld.any()) and error <= 1e-2
            what = f"root of {side}, condition {condition:.0e}, {precision}"
            yield judged(what, good, said, error=error, ms=taken / 4, eigh_ms=decomposed)


def shampoo(bench: Bench) -> Iterator[CheckResult]:
    """Ten steps of Shampoo, in which every root is taken anew: none is much longer than the others."""
    side = bench.sizes.rank
    weights = [
        (f"layers.{index}.weight", nn.Parameter(torch.randn(2 * side, 4 * side, device=bench.device)))
        for index in range(8)
    ]
    for _, weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = ds_optim.Shampoo(weights, lr=1e-4, roles={"*": "linear"}, start_preconditioning_step=1)
    times = [bench.one_step(optimizer)[0] for _ in range(13)][3:]
    mean, longest = statistics.mean(times), max(times)
    failures = sum(int(state["failures"].sum()) for state in optimizer.state.values())
    said = f"mean {mean:.1f} ms, longest {longest:.1f} ms, at most {OF_MEAN_STEP} of it; {failures} roots failed"
    good = longest <= OF_MEAN_STEP * mean and not failures
    yield judged(f"Shampoo, 8 x {2 * side} x {4 * side}", good, said, mean_ms=mean, longest_ms=longest)


RATES = selftest, bandwidth, many_tensors, matrices, roots, shampoo
SOUNDNESS = bits, surroundings, accounts, noise_scale, two_ranks, engines
SECTIONS: dict[str, Callable[[Bench], Iterator[CheckResult]]] = {
    one.__name__: one for one in (*RATES, *SOUNDNESS, convergence)
}


# -- the page ----------------------------------------------------------------------------------------------------------


def page(where: str, findings: dict[str, list[CheckResult]]) -> str:
    """accelerator.md."""
    lines = ["# On one accelerator", "", f"`python benchmarks/accelerator.py`: {where}.", ""]
    for section, found in findings.items():
        lines += [f"## {section.replace('_', ' ').capitalize()}", "", "| what | | found |", "|---|---|---|"]
        lines += [f"| {one.check} | {one.verdict} | {one.said} |" for one in found]
        lines.append("")
    return "\n".join(lines)


def name_of(device: torch.device) -> str:
    """What a device is called, as far as it says."""
    if device.type == "cpu":
        return processor()
    ask = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if ask is None else str(ask(device))


def main() -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="at most (default: 10)")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="only these")
    parser.add_argument("--small", action="store_true", help="toy sizes, on the CPU if need be: tries the code")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: docs/results)")
    arguments = parser.parse_args()
    device = checks.devices()[-1]
    if device.type == "cpu" and not arguments.small:
        print("no accelerator here: --small tries the code on the CPU", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    where = f"{name_of(device)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    bench = Bench(device, Sizes.chosen(arguments.small), arguments.minutes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    findings: dict[str, list[CheckResult]] = {}
    for section in arguments.only:
        findings[section] = []
        for one in within(bench, section):
            findings[section].append(one)
            print(f"{one.verdict} {one.check}: {one.said}", flush=True)
            _write(arguments.out, where, findings)
    return int(any(one.verdict == "FAIL" for found in findings.values() for one in found))


def within(bench: Bench, section: str) -> Iterator[CheckResult]:
    """What a section finds until time is up, and the error that ended it: the others follow."""
    try:
        bench.look("the sections above")
        yield from SECTIONS[section](bench)
    except TimeIsUpError as error:
        yield not_here(f"the rest of {section}", str(error))
    except Exception as error:
        yield failed(f"the section {section}", error)


def _write(folder: Path, where: str, findings: dict[str, list[CheckResult]]) -> None:
    content = {"where": where, "sections": {name: list(map(dataclasses.asdict, one)) for name, one in findings.items()}}
    (folder / "accelerator.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    pages.write(folder / "accelerator.md", page(where, findings))


if __name__ == "__main__":
    raise SystemExit(main())
