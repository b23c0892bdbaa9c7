"""How long an optimizer step takes on a CPU, ours against everyone else's, beside what memory traffic predicts.

    python benchmarks/step_time.py [--markdown docs/results/step_time.md] [--json FILE]

All contenders of a case update the same parameters in one process, one step each in turn (who begins, changes), so that
whatever else the machine does hits them alike. Whoever turns out ten times slower than the unit sits out four rounds of
five. Reported are the median over the rounds and its ratio to the unit, torch's fused AdamW on the same parameters.

Traffic counts how often a step must move each element between memory and core (a read or a write of four bytes):
AdamW 7 (param and two states in and out, gradient in), Adam-mini and Lion 5, Adan 11; state in eight bits counts a
quarter. A step bound by memory takes traffic / 7 of AdamW's time.

Extra memory is the process's peak resident memory during one step (Linux: ``/proc/self/clear_refs``, ``VmHWM``) less
what was resident before it, as a share of the partition: the parameters' bytes.

Contenders that are not installed are listed as such: ``pip install "ds-optim[bench]"``. DeepSpeed's are compiled on
first use, which takes minutes.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import importlib.metadata
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pages

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from processor import processor
from rich.console import Console
from rich.progress import track
from rich.table import Table

import ds_optim
from ds_optim.optimizers.registry import optimizers
from ds_optim.rule import WholeMatrix

UNIT = "torch AdamW fused"
STREAMS = {name: cls.rule.streams for name, cls in optimizers().items() if not isinstance(cls.rule, WholeMatrix)}
Parameters = dict[str, torch.nn.Parameter]
Step = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """An optimizer to be built on a case's parameters; ``limit`` is the ratio it is held to, of ``limit_of``.

    ``state_bytes`` is what an element of its state takes.
    """

    name: str
    rule: str
    build: Callable[[Parameters], Step]
    limit: float | None = None
    limit_of: str = UNIT
    state_bytes: int = 4

    def traffic(self, grad_bytes: int) -> float:
        """Values of four bytes that a step moves for each element, over AdamW's in fp32."""
        state = STREAMS[self.rule] - 3
        return (2 + grad_bytes / 4 + state * self.state_bytes / 4) / STREAMS["AdamW"]


@dataclass
class Result:
    """One line of a table."""

    name: str
    rule: str
    milliseconds: float | None = None
    fastest: float | None = None
    ratio: float | None = None
    traffic: float | None = None
    extra_memory: float | None = None
    limit: str = ""
    holds: bool | None = None
    note: str = ""


def ours(name: str, backend: str, **settings: Any) -> Callable[[Parameters], Step]:
    """One of our optimizers, held to one backend."""

    def build(parameters: Parameters) -> Step:
        optimizer = getattr(ds_optim, name)(parameters.items(), **settings)

        def step() -> None:
            with forced(backend):
                optimizer.step()

        return step

    return build


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """``DS_OPTIM_KERNELS`` set to a backend."""
    os.environ["DS_OPTIM_KERNELS"] = backend
    try:
        yield
    finally:
        del os.environ["DS_OPTIM_KERNELS"]


def theirs(module: str, name: str, **settings: Any) -> Callable[[Parameters], Step]:
    """An optimizer of another package, imported only when it is built."""

    def build(parameters: Parameters) -> Step:
        kind = getattr(importlib.import_module(module), name)
        return kind(list(parameters.values()), **settings).step

    return build


def official_adam_mini(parameters: Parameters) -> Step:
    from adam_mini import Adam_mini

    first = next(iter(parameters.values()))
    with open(os.devnull, "w") as devnull, redirect_stdout(devnull):
        return Adam_mini(parameters.items(), lr=1e-3, dim=first.shape[1], n_heads=32, verbose=False).step


ROLES = {
    "*q_proj.weight": {"kind": "query", "head_dim": 64},
    "*k_proj.weight": {"kind": "key", "head_dim": 64},
    "*norm.weight": "norm",
    "*conv1d.weight": {"kind": "linear", "output_dim": 1},
    "*": "mlp",
}


def adam_mini(backend: str, parameters: Parameters, **settings: Any) -> Step:
    """AdamMini with the roles that apply to the names at hand."""
    claimed = {name: next(role for pattern, role in ROLES.items() if Path(name).match(pattern)) for name in parameters}
    return ours("AdamMini", backend, roles=claimed, **settings)(parameters)


INT8 = {"state_dtype": "int8", "roles": {"*": "mlp"}}


def in_eight_bits(name: str, build: Callable[[Parameters], Step], limit: float | None = None) -> Contender:
    """One of ours with its state in eight bits; a limit is of its own time in fp32."""
    return Contender(f"ds_optim {name} int8", name, build, limit, f"ds_optim {name}", state_bytes=1)


ALL = [
    Contender(UNIT, "AdamW", theirs("torch.optim", "AdamW", fused=True)),
    Contender("torch AdamW foreach", "AdamW", theirs("torch.optim", "AdamW", foreach=True)),
    Contender("DeepSpeedCPUAdam", "AdamW", theirs("deepspeed.ops.adam", "DeepSpeedCPUAdam", adamw_mode=True)),
    Contender("ds_optim AdamW", "AdamW", ours("AdamW", "native"), 1.05),
    Contender("ds_optim AdamW eager", "AdamW", ours("AdamW", "eager")),
    Contender("official adam-mini", "AdamMini", official_adam_mini),
    Contender("ds_optim AdamMini", "AdamMini", functools.partial(adam_mini, "native"), 0.80),
    Contender("ds_optim AdamMini eager", "AdamMini", functools.partial(adam_mini, "eager")),
    Contender("DeepSpeedCPULion", "Lion", theirs("deepspeed.ops.lion", "DeepSpeedCPULion")),
    Contender("lion-pytorch Lion", "Lion", theirs("lion_pytorch", "Lion")),
    Contender("pytorch-optimizer Lion", "Lion", theirs("pytorch_optimizer", "Lion")),
    Contender("ds_optim Lion", "Lion", ours("Lion", "native"), 1.0, "DeepSpeedCPULion"),
    Contender("ds_optim Lion eager", "Lion", ours("Lion", "eager")),
    Contender("adan-pytorch Adan", "Adan", theirs("adan_pytorch", "Adan")),
    Contender("pytorch-optimizer Adan", "Adan", theirs("pytorch_optimizer", "Adan", foreach=True)),
    Contender("timm Adan", "Adan", theirs("timm.optim.adan", "Adan", foreach=True)),
    Contender("ds_optim Adan", "Adan", ours("Adan", "native"), 1.6),
    Contender("ds_optim Adan eager", "Adan", ours("Adan", "eager")),
    in_eight_bits("AdamW", ours("AdamW", "native", **INT8), 1.1),
    in_eight_bits("AdamMini", functools.partial(adam_mini, "native", state_dtype="int8")),
    in_eight_bits("Lion", ours("Lion", "native", **INT8)),
    in_eight_bits("Adan", ours("Adan", "native", **INT8)),
]
PRODUCT = [
    each for each in ALL if each.name in (UNIT, *(f"ds_optim {rule}" for rule in STREAMS)) or "DeepSpeed" in each.name
]


def one_matrix(elements: int) -> dict[str, tuple[int, ...]]:
    """One partition: rows of 4,096."""
    return {"mlp.weight": (max(1, elements // 4096), 4096)}


def llama(elements: int) -> dict[str, tuple[int, ...]]:
    """A slice of a Llama: heads of 64 x 1,024, rows of 1,024 and 2,736, norms, and an embedding of half of it all."""
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (elements // 2048, 1024)}
    layers = max(1, round((elements - elements // 2) / (4 * 1024 * 1024 + 3 * 1024 * 2736)))
    for layer in range(layers):
        for name in ("q", "k", "v", "o"):
            shapes[f"{layer}.{name}_proj.weight"] = (1024, 1024)
        shapes[f"{layer}.gate_proj.weight"] = shapes[f"{layer}.up_proj.weight"] = (2736, 1024)
        shapes[f"{layer}.down_proj.weight"] = (1024, 2736)
        shapes[f"{layer}.input_norm.weight"] = shapes[f"{layer}.post_norm.weight"] = (1024,)
    return shapes


def conv1d(elements: int) -> dict[str, tuple[int, ...]]:
    """Fused projections of GPT-2 XL, (in, out): a block is a column."""
    return {f"{layer}.conv1d.weight": (1600, 4800) for layer in range(max(1, elements // (1600 * 4800)))}


CASES: list[tuple[str, Callable[[int], dict[str, tuple[int, ...]]], torch.dtype, list[Contender]]] = [
    ("One matrix, rows of 4,096, fp32", one_matrix, torch.float32, ALL),
    ("A slice of a Llama: heads, rows, norms, embedding", llama, torch.float32, PRODUCT),
    ("Conv1D weights (in, out): blocks are columns", conv1d, torch.float32, PRODUCT),
    ("One matrix, bf16 gradients into fp32 state (the unit has fp32 gradients)", one_matrix, torch.bfloat16, PRODUCT),
]


def parameters_of(shapes: dict[str, tuple[int, ...]], grad_dtype: torch.dtype) -> tuple[Parameters, Parameters]:
    """Parameters with gradients of ``grad_dtype``, and the same memory with fp32 gradients for those who need them."""
    generator = torch.Generator().manual_seed(0)
    wanted: Parameters = {}
    ordinary: Parameters = {}
    for name, shape in shapes.items():
        values, grad = (torch.randn(shape, generator=generator) * scale for scale in (0.02, 0.01))
        wanted[name], ordinary[name] = torch.nn.Parameter(values), torch.nn.Parameter(values)
        ordinary[name].grad = grad
        if grad_dtype != torch.float32:
            wanted[name].grad_dtype = grad_dtype
        wanted[name].grad = grad.to(grad_dtype)
    return wanted, ordinary


def resident(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def extra_memory(step: Step) -> float | None:
    """Bytes by which the peak of resident memory during a step exceeds what was there before."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def measure(case: int, elements: int, rounds: int) -> list[Result]:
    """All results of a case, in the order of its contenders."""
    title, shapes, grad_dtype, contenders = CASES[case]
    wanted, ordinary = parameters_of(shapes(elements), grad_dtype)
    partition = sum(4 * parameter.numel() for parameter in wanted.values())
    results, steps = [], {}
    for contender in contenders:
        result = Result(contender.name, contender.rule, traffic=contender.traffic(4))
        results.append(result)
        mine = contender.name.startswith("ds_optim")
        if grad_dtype != torch.float32 and not mine and contender.name != UNIT:
            result.note = "takes no bf16 gradients for fp32 parameters"
            continue
        if grad_dtype != torch.float32 and mine:
            result.traffic = contender.traffic(grad_dtype.itemsize)
        try:
            step = contender.build(wanted if mine else ordinary)
            step()  # state is allocated, kernels are built
            step()
        except ImportError as problem:
            result.note = f"not installed ({problem.name})"
        except Exception as problem:  # somebody else's failure is a result
            result.note = f"fails: {type(problem).__name__}: {problem}".splitlines()[0][:90]
        else:
            steps[contender.name] = step
            gc.collect()
            extra = extra_memory(step)
            result.extra_memory = None if extra is None else extra / partition
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps.items())
    for turn in track(range(rounds), description=title[:40]):
        order.append(order.pop(0))  # everyone comes after everyone's caches and sleeping threads once
        for name, step in order:
            slow = len(seconds[name]) > 1 and min(seconds[name]) > 10 * min(seconds[UNIT])
            if slow and turn % 5:
                continue
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for contender, result in zip(contenders, results, strict=True):
        if contender.name not in medians:
            continue
        result.milliseconds = 1e3 * medians[contender.name]
        result.fastest = 1e3 * min(seconds[contender.name])
        result.ratio = medians[contender.name] / medians[UNIT]
        if case == 0 and contender.limit is not None and contender.limit_of in medians:
            reached = medians[contender.name] / medians[contender.limit_of]
            result.limit = f"{reached:.2f} <= {contender.limit:.2f}"
            result.limit += "" if contender.limit_of == UNIT else f" of {contender.limit_of}"
            result.holds = reached <= contender.limit
    return results


COLUMNS = ("optimizer", "median ms", "best ms", "ratio", "traffic", "extra memory", "held to")


def cells(result: Result) -> list[str]:
    """A result as the text of a table row."""
    if result.milliseconds is None:
        return [result.name, *[""] * 5, result.note]
    extra = "?" if result.extra_memory is None else f"{100 * result.extra_memory:.2f} %"
    verdict = "" if result.holds is None else f"{result.limit}{'' if result.holds else '  MISSED'}"
    return [
        result.name,
        f"{result.milliseconds:.1f}",
        f"{result.fastest:.1f}",
        f"{result.ratio:.2f}",
        f"{result.traffic:.2f}",
        extra,
        verdict,
    ]


def machine() -> str:
    """Where and when, in one line."""
    model = processor()
    versions = [f"torch {torch.__version__}"]
    for package in ("deepspeed", "pytorch-optimizer", "adan-pytorch", "lion-pytorch", "adam-mini", "timm"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{datetime.date.today()}, {model}, {torch.get_num_threads()} threads of {os.cpu_count()}, "
        f"{', '.join(versions)}; load average before the run {load}"
    )


def main() -> int:
    """Run the benchmark; returns 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=32 << 20, help="parameters per case (default 32 Mi)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="which of the cases, from 0")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--markdown", type=Path, help="where to write the tables")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    where = machine()
    console = Console(width=None if sys.stdout.isatty() else 120)
    tables: dict[str, list[Result]] = {}
    for case in arguments.cases:
        title = CASES[case][0]
        tables[title] = measure(case, arguments.elements, arguments.rounds)
        gc.collect()
        table = Table(*COLUMNS, title=title)
        for result in tables[title]:
            table.add_row(*cells(result), style="bold" if result.name.startswith("ds_optim") else "")
        console.print(table)
    console.print(where)
    if arguments.json:
        data = {"machine": where, "cases": {title: [asdict(one) for one in found] for title, found in tables.items()}}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if arguments.markdown:
        pages.write(arguments.markdown, markdown(where, arguments, tables))
    return int(any(result.holds is False for found in tables.values() for result in found))


def markdown(where: str, arguments: argparse.Namespace, tables: dict[str, list[Result]]) -> str:
    """The committed form of the tables."""
    lines = [
        "# Step time on a CPU",
        "",
        f"`python benchmarks/step_time.py`: {where}.",
        "",
        f"{arguments.elements:,} fp32 parameters, {arguments.rounds} rounds; one step of every contender per round, in "
        "turn, in one process (very slow ones in every fifth round). `ratio`: median over torch's fused AdamW's. "
        "`traffic`: what counting bytes predicts for it. `extra memory`: peak resident memory during a step less what "
        "was resident before, over the parameters' bytes. Why state in eight bits takes longer than its traffic says: "
        "[counted_instructions.md](counted_instructions.md).",
    ]
    for title, results in tables.items():
        lines += ["", f"## {title}", "", f"| {' | '.join(COLUMNS)} |", "|---|" + "---:|" * 5 + "---|"]
        lines += [f"| {' | '.join(cells(result))} |" for result in results]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
