"""One accelerator, ten minutes: rates, waits, bits, matrix algebra, and how six optimizers train a small Llama.

    python benchmarks/accelerator.py [--minutes 10] [--only SECTION...] [--small] [--out docs/results]

Writes accelerator.json after every finding, and accelerator.md from it at the end: a run that is cut off leaves what it
found. Without an accelerator it ends with status 2, unless ``--small`` tries the same code on the CPU with toy sizes,
whose numbers mean nothing. Exit status 1 if a target is missed.

What convergence takes is decided by the time that is left: every optimizer trains with its middle learning rate first,
then with the others, from the same weights on the same windows, 20 tokens per parameter, as `benchmarks/convergence.py`
does with fewer on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from convergence import RECIPES, TEXT_CACHE, Setting, corpus, llama, next_token_loss
from processor import processor
from torch import Tensor, nn

import ds_optim
from ds_optim.linalg import triangle
from ds_optim.linalg.inverse_roots import inverse_roots
from ds_optim.linalg.polar import newton_schulz, newton_schulz_flops
from ds_optim.linalg.precision import PRECISIONS, MatmulPrecision
from ds_optim.selftest import checks
from ds_optim.selftest.result import CheckResult, judged

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
OF_COPY, OF_ONE_TENSOR, OF_MATMUL = 0.85, 1.1, 0.5
STREAMS = {"AdamW": 7, "Lion": 5, "Adan": 11, "AdamMini": 5}  # read and written per element


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """How large everything is; ``small`` is to try the code.

    Attributes:
        numel: elements of what is streamed.
        side: of matrices.
        layers: of a Llama of that width.
        rank: of the factors whose roots are taken.
        batches: sequences per step that are tried.
        setting: of the small Llama.
        tokens_per_parameter: that it is trained with.
        text: files to train on; None for the interpreter's own source.
    """

    numel: int
    side: int
    layers: int
    rank: int
    batches: tuple[int, ...]
    setting: Setting
    tokens_per_parameter: float = 20
    text: Sequence[Path] | None = None

    @classmethod
    def chosen(cls, small: bool) -> Sizes:
        if not small:
            return cls(500_000_000, 2048, 12, 1024, (128, 16), Setting())
        llama = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        tiny = Setting(**llama, seq_length=16, held_out_sequences=8, warmup=0.5)  # type: ignore[arg-type]
        return cls(60_000, 128, 1, 64, (8,), tiny, 0.1, [Path(__file__).parent])


class Bench:
    """The device, the sizes, and the clock."""

    def __init__(self, device: torch.device, sizes: Sizes, minutes: float) -> None:
        self.device, self.sizes = device, sizes
        self.ends = time.monotonic() + 60 * minutes

    @property
    def seconds_left(self) -> float:
        return self.ends - time.monotonic()

    def milliseconds(self, *contenders: Callable[[], object], rounds: int = 7) -> list[float]:
        """Medians of contenders that run in turn."""
        return checks.milliseconds(list(contenders), self.device, rounds)


# -- sections ----------------------------------------------------------------------------------------------------------


def selftest(bench: Bench) -> Iterator[CheckResult]:
    """`ds-optim selftest`."""
    yield from checks.run()


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
            (taken,) = bench.milliseconds(optimizer.step)
            moved = numel * (3 * dtype.itemsize + (streams - 3) * kept.itemsize)
            share = moved / taken / copied
            said = f"{taken:.2f} ms, {share:.0%} of a copy's rate ({copied / 1e9:.2f} TB/s), at least {OF_COPY:.0%}"
            what = f"{name}, {numel:,} elements in {str(dtype)[6:]}, state in {str(kept)[6:]}"
            yield judged(what, share >= OF_COPY, said, ms=taken, of_copy=share, copy_bytes_per_ms=copied)
            del optimizer, parameter


def _copied(bench: Bench, shape: tuple[int, int]) -> float:
    """Bytes that a copy reads and writes per ms."""
    one, other = torch.zeros(shape, device=bench.device), torch.empty(shape, device=bench.device)
    (taken,) = bench.milliseconds(lambda: other.copy_(one))
    return 2 * one.nbytes / taken


def many_tensors(bench: Bench) -> Iterator[CheckResult]:
    """300 tensors against one of as many elements."""
    rows, columns = max(bench.sizes.numel // 300 // 512, 2), 512 if bench.sizes.numel > 1_000_000 else 60
    whole = nn.Parameter(torch.zeros(300 * rows, columns, device=bench.device))
    parts = [
        (f"layers.{index}.weight", nn.Parameter(torch.zeros(rows, columns, device=bench.device)))
        for index in range(300)
    ]
    for parameter in (whole, *(one for _, one in parts)):
        parameter.grad = torch.randn_like(parameter)
    fused = torch.optim.AdamW([one for _, one in parts], lr=1e-4, fused=True)
    for name in STREAMS:
        made = [
            getattr(ds_optim, name)(given, lr=1e-4, roles={"*": "linear"}) for given in ([("weight", whole)], parts)
        ]
        single, many, theirs = bench.milliseconds(*(one.step for one in made), fused.step)
        said = (
            f"{many:.2f} ms, one tensor {single:.2f} ms, at most {OF_ONE_TENSOR} of it; torch's fused {theirs:.2f} ms"
        )
        yield judged(f"{name}, 300 tensors", many <= OF_ONE_TENSOR * single, said, ms=many, one=single, fused=theirs)


def matrices(bench: Bench) -> Iterator[CheckResult]:
    """SWAN's step and Newton-Schulz in every precision against torch.matmul's rate in bf16."""
    side, layers = bench.sizes.side, bench.sizes.layers
    one = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
    (product,) = bench.milliseconds(lambda: one @ one)
    rate = 2 * side**3 / product  # flops per ms
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
        flops = sum(_flops(precision, *weight.shape) for _, weight in weights)
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


def _flops(precision: MatmulPrecision, rows: int, columns: int) -> float:
    """Of ten Newton-Schulz steps of a matrix, as they are taken: of X X^T one triangle, where that is computed."""
    short, long = sorted((rows, columns))
    has_triangle = precision != "ieee" and short >= triangle.SMALLEST
    return newton_schulz_flops(short, long, 10, precision) * (0.75 if has_triangle else 1)


def roots(bench: Bench) -> Iterator[CheckResult]:
    """Inverse roots by products against fp64 eigendecomposition: how right, and how fast."""
    side = bench.sizes.rank
    settings = {"eps": 1e-6, "relative": True}
    for condition in (1e2, 1e6):
        generator = torch.Generator().manual_seed(0)
        q, _ = torch.linalg.qr(torch.randn(side, side, dtype=torch.float64, generator=generator))
        eigenvalues = torch.logspace(0, -math.log10(condition), side, dtype=torch.float64)
        factor = ((q * eigenvalues) @ q.T).float()[None]
        exact, _ = inverse_roots(factor, -0.25, method="eigh", **settings)  # type: ignore[arg-type]
        here = factor.to(bench.device).expand(4, side, side).contiguous()
        for precision in ("ieee", "bf16"):

            def take(precision: str = precision, here: Tensor = here) -> tuple[Tensor, Tensor]:
                return inverse_roots(here, -0.25, method="newton", precision=precision, **settings)  # type: ignore[arg-type]

            found, failed = take()
            error = float((found[:1].cpu() - exact).norm() / exact.norm())
            (taken,) = bench.milliseconds(take, rounds=3)
            said = f"{error:.1e} from fp64, at most 1e-02; {taken / 4:.2f} ms each"
            good = not bool(failed.any()) and error <= 1e-2
            yield judged(
                f"root of {side}, condition {condition:.0e}, {precision}", good, said, error=error, ms=taken / 4
            )


def convergence(bench: Bench) -> Iterator[CheckResult]:
    """Held-out losses after 20 tokens per parameter, as many runs as there is time for."""
    with tempfile.TemporaryDirectory() as folder:
        cache = TEXT_CACHE if bench.sizes.text is None else Path(folder)
        text = corpus.load(corpus.prepare(bench.sizes.text, bench.sizes.setting.vocab_size, cache))
        longest = 0.0
        for batch in bench.sizes.batches:
            for index in (1, 0, 2):
                for name, recipe in RECIPES.items():
                    lr = recipe.learning_rates[index] * math.sqrt(batch / 16)
                    if bench.seconds_left < 1.2 * longest + 5:
                        return
                    begin = time.monotonic()
                    loss, tokens = trained(bench, text, name, lr, batch)
                    seconds = time.monotonic() - begin
                    longest = max(longest, seconds)
                    said = f"held-out loss {loss:.4f} after {tokens:,} tokens, {seconds:.0f} s"
                    what = f"{name}, {batch} sequences, learning rate {lr:.1e}"
                    yield judged(what, math.isfinite(loss), said, loss=loss, tokens=tokens, lr=lr, seconds=seconds)


def trained(bench: Bench, text: Any, name: str, lr: float, batch: int) -> tuple[float, int]:
    """One run: its last held-out loss, and its tokens."""
    setting, device = bench.sizes.setting, bench.device
    torch.manual_seed(0)
    model = llama(setting).to(device)
    parameters = sum(one.numel() for one in model.parameters())
    tokens = round(bench.sizes.tokens_per_parameter * parameters)
    setting = dataclasses.replace(setting, tokens=tokens, batch_size=batch)
    groups = ds_optim.param_groups(model, RECIPES[name].weight_decay)
    optimizer = getattr(ds_optim, name)(groups, lr=lr, roles=model, **RECIPES[name].options)
    windows = corpus.Windows(text.train, setting.seq_length, 0)
    held_out = corpus.Windows(text.held_out, setting.seq_length, 0).global_batch(0, setting.held_out_sequences)

    for step in range(setting.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * setting.learning_rate_share(step)
        ids = torch.from_numpy(windows.global_batch(step, batch)).to(device, non_blocking=True)
        next_token_loss(model, ids).backward()
        nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        losses = [next_token_loss(model, ids.to(device)) for ids in torch.from_numpy(held_out).split(batch)]
        return float(torch.stack(losses).mean()), setting.steps * setting.tokens_per_step


SECTIONS = {one.__name__: one for one in (selftest, bandwidth, many_tensors, matrices, roots, convergence)}


# -- the page ----------------------------------------------------------------------------------------------------------


def page(where: str, findings: dict[str, list[CheckResult]]) -> str:
    """accelerator.md."""
    lines = ["# On one accelerator", "", f"`python benchmarks/accelerator.py`: {where}.", ""]
    for section, found in findings.items():
        lines += [f"## {section.replace('_', ' ').capitalize()}", "", "| what | | found |", "|---|---|---|"]
        lines += [f"| {one.check} | {one.verdict} | {one.said} |" for one in found]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="at most, about (default: 10)")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="only these")
    parser.add_argument("--small", action="store_true", help="toy sizes, on the CPU if need be: tries the code")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: docs/results)")
    arguments = parser.parse_args()
    device = checks.devices()[-1]
    if device.type == "cpu" and not arguments.small:
        print("no accelerator here: --small tries the code on the CPU", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    named = processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    where = f"{named}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    bench = Bench(device, Sizes.chosen(arguments.small), arguments.minutes)
    findings: dict[str, list[CheckResult]] = {}
    for section in arguments.only:
        found = findings.setdefault(section, [])
        try:
            for one in SECTIONS[section](bench):
                found.append(one)
                print(f"{one.verdict} {one.check}: {one.said}", flush=True)
                _write(arguments.out, where, findings)
        except Exception as error:  # the other sections follow
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            found.append(CheckResult(f"the section {section}", "FAIL", said))
            print(f"FAIL {section}: {said}", flush=True)
            _write(arguments.out, where, findings)
    return int(any(one.verdict == "FAIL" for found in findings.values() for one in found))


def _write(folder: Path, where: str, findings: dict[str, list[CheckResult]]) -> None:
    content = {"where": where, "sections": {name: list(map(dataclasses.asdict, one)) for name, one in findings.items()}}
    (folder / "accelerator.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "accelerator.md").write_text(page(where, findings), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
