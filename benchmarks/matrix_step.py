"""How long a step of the whole-matrix optimizers takes on a CPU: how even it is, how much of it are products.

    python benchmarks/matrix_step.py [--markdown FILE] [--json FILE]

The matrices of a Llama-like model without its embeddings, fp32, one process, fresh random gradients in every round
(outside the timing). All contenders of a table step in turn (who begins, changes), so that whatever else the machine
does hits them alike. The slower of those that only serve the comparison sit out four rounds of five: with rounds in
fifties each has one refresh in ten of its steps. docs/results/matrix_step.md is put together from several runs.

Shampoo is held to the evenness of its steps: their 99th percentile over their median (the largest over the median,
where there are fewer than 100). `products and roots alone` are the same statistics, applications and fp64
eigendecompositions, one matrix after the other into memory that is there already, and nothing else.

SWAN is held to a share of the rate of matrix products: `products alone` are its own `X X^T` and `W X` as plain
``torch.matmul(..., out=...)``; the share is the median over the rounds of their time over SWAN's.

Muon, NorMuon and SOAP stand beside the packages that have them, and are held to nothing.

Rivals are optional: ``pip install --no-deps pytorch-optimizer==4.1.0 heavyball==3.2.1`` (without --no-deps, heavyball's
opt-einsum; with dependencies pip may replace torch). --rivals DIR looks for them in the target of
``pip install --target DIR --no-deps ...`` as well. None has SWAN; none grafts Adam's step length per block. What is
compared with what is said in the column `algorithm`. heavyball runs uncompiled (its ``compile_mode``, None) unless
--compile says "default", which takes minutes per optimizer, or its own "max-autotune-no-cudagraphs", which takes more.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import importlib
import importlib.metadata
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
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
from torch import Tensor

import ds_optim

Shape = tuple[int, ...]
Step = Callable[[], Any]
FREQUENCY = 10  # steps between two roots of a block
NS_STEPS = 10
LARGEST_SPREAD = 1.5  # of Shampoo: 99th percentile of step times over their median
SMALLEST_SHARE = 0.70  # of SWAN: time of its products alone over the time of its step
RARELY = 5  # whoever only serves the comparison takes part in every fifth round
ROLES = {"*": "mlp"}
META = "Meta's Distributed Shampoo"
RIVALS = ("pytorch-optimizer", "heavyball")
HEAVYBALL_MODE: list[str | None] = [None]  # how heavyball compiles


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
        name: ours begin with ds_optim.
        algorithm: what it computes, where that is not what the table is about.
        build: takes named parameters with gradients, returns the step.
        block: parameters are not whole matrices but their blocks of at most this side, for whoever knows no blocks.
        rare: takes part in every fifth round only.
        held: to the table's limit.
    """

    name: str
    algorithm: str
    build: Callable[[dict[str, torch.nn.Parameter]], Step]
    block: int = 0
    rare: bool = False
    held: bool = False


@dataclass
class Result:
    """One line of a table; times in milliseconds."""

    name: str
    algorithm: str
    steps: int = 0
    mean: float | None = None
    median: float | None = None
    p99: float | None = None
    share: float | None = None
    reached: str = ""
    holds: bool | None = None
    note: str = ""


def llama_like(hidden: int, ffn: int, layers: int) -> dict[str, Shape]:
    """Projections of a Llama-like model, without embeddings and norms."""
    shapes: dict[str, Shape] = {}
    for layer in range(layers):
        for name in ("q", "k", "v", "o"):
            shapes[f"{layer}.{name}_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.gate_proj.weight"] = shapes[f"{layer}.up_proj.weight"] = (ffn, hidden)
        shapes[f"{layer}.down_proj.weight"] = (hidden, ffn)
    return shapes


def grid(matrix: Tensor, side: int) -> list[Tensor]:
    """The blocks of a matrix, as views."""
    rows = matrix.split(side)
    return [block for row in rows for block in row.split(side, dim=1)]


class Field:
    """The gradients of a table, drawn anew for every round, whole and in blocks."""

    def __init__(self, shapes: dict[str, Shape], sides: Iterable[int]) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self.grads: dict[int, dict[str, Tensor]] = {0: {name: torch.empty(shape) for name, shape in shapes.items()}}
        for side in sorted(set(sides) - {0}):
            self.grads[side] = {
                f"{name}.{index}": torch.empty(block.shape)
                for name, grad in self.grads[0].items()
                for index, block in enumerate(grid(grad, side))
            }
        self.draw()

    def draw(self) -> None:
        """New gradients, the same for everyone."""
        for grad in self.grads[0].values():
            grad.normal_(std=0.01, generator=self._generator)
        for side, blocks in self.grads.items():
            if side:
                cut = (block for grad in self.grads[0].values() for block in grid(grad, side))
                for target, block in zip(blocks.values(), cut, strict=True):
                    target.copy_(block)

    def parameters(self, side: int) -> dict[str, torch.nn.Parameter]:
        """Parameters to be stepped with these gradients."""
        return {name: torch.nn.Parameter(0.02 * torch.randn_like(grad)) for name, grad in self.grads[side].items()}

    def give(self, parameters: dict[str, torch.nn.Parameter], side: int) -> None:
        """Set the gradients: some rivals write to them or take them away."""
        for name, parameter in parameters.items():
            parameter.grad = self.grads[side][name]


# -- contenders -------------------------------------------------------------------------------------------------------


def ours(name: str, **settings: Any) -> Callable[[dict[str, torch.nn.Parameter]], Step]:
    """One of our optimizers."""
    return lambda parameters: getattr(ds_optim, name)(parameters.items(), roles=ROLES, **settings).step


def theirs(module: str, name: str, **settings: Any) -> Callable[[dict[str, torch.nn.Parameter]], Step]:
    """An optimizer of another package, imported only when it is built."""

    def build(parameters: dict[str, torch.nn.Parameter]) -> Step:
        imported = importlib.import_module(module)
        if module == "heavyball":
            imported.utils.compile_mode = HEAVYBALL_MODE[0]
        kind = getattr(imported, name)
        if (module, name) == ("pytorch_optimizer", "Muon"):
            return kind([{"params": list(parameters.values()), "use_muon": True}], **settings).step
        return kind(list(parameters.values()), **settings).step

    return build


def metas(block: int) -> Callable[[dict[str, torch.nn.Parameter]], Step]:
    """Meta's Distributed Shampoo, of which a checkout is looked for; its decompositions are in fp32."""

    def build(parameters: dict[str, torch.nn.Parameter]) -> Step:
        its = importlib.import_module("distributed_shampoo")
        settings = {"max_preconditioner_dim": block, "precondition_frequency": FREQUENCY}
        graft = its.AdamPreconditionerConfig(beta2=0.95, epsilon=1e-8)
        params = list(parameters.values())
        return its.DistributedShampoo(params, lr=1e-3, betas=(0.9, 0.95), grafting_config=graft, **settings).step

    return build


def products_and_roots(parameters: dict[str, torch.nn.Parameter]) -> Step:
    """What a step of Shampoo cannot do without: of every block four products, and of every tenth the two roots."""
    blocks = [parameter.detach() for parameter in parameters.values()]
    sizes = {size for block in blocks for size in block.shape}
    squares = {size: torch.zeros(size, size) for size in sizes}
    factors = {size: torch.cov(torch.randn(size, 2 * size)).double() for size in sizes}
    outs = {block.shape: (torch.empty_like(block), torch.empty_like(block)) for block in blocks}
    turn = 0

    def step() -> None:
        nonlocal turn
        turn += 1
        for index, block in enumerate(blocks):
            left, right = (squares[size] for size in block.shape)
            first, second = outs[block.shape]
            torch.matmul(block, block.mT, out=left)
            torch.matmul(block.mT, block, out=right)
            torch.matmul(left, block, out=first)
            torch.matmul(first, right, out=second)
            if (index + turn) % FREQUENCY == 0:
                for size in block.shape:
                    eigenvalues, q = torch.linalg.eigh(factors[size])
                    torch.matmul(q * eigenvalues, q.mT)

    return step


def newton_schulz_products(parameters: dict[str, torch.nn.Parameter], steps: int, is_quintic: bool) -> Step:
    """The matrix products of so many cubic or quintic steps on every matrix, in fp32, and nothing else."""
    wide = [tuple(sorted(parameter.shape)) for parameter in parameters.values()]
    buffers = {shape: (torch.randn(shape), *torch.empty(2, shape[0], shape[0]), torch.empty(shape)) for shape in wide}

    def step() -> None:
        for shape in wide:
            x, s, w, y = buffers[shape]
            for _ in range(steps):
                torch.matmul(x, x.mT, out=s)
                if is_quintic:
                    torch.matmul(s, s, out=w)
                torch.matmul(w if is_quintic else s, x, out=y)

    return step


def shampoo(block: int) -> list[Contender]:
    """Shampoo's field at one block size."""
    settings = {"max_preconditioner_dim": block, "precondition_frequency": FREQUENCY, "graft": "adam"}
    scalable = {
        "lr": 1e-3,
        "start_preconditioning_step": FREQUENCY,
        "preconditioning_compute_steps": FREQUENCY,
        "block_size": block,
        "graft_type": 3,  # RMSProp, the nearest to Adam's
    }
    eigen = {"lr": 1e-3, "precondition_frequency": FREQUENCY, "merge_dims": False}
    given = f"; given the blocks of {block} as parameters, since it has none"
    return [
        Contender("ds_optim Shampoo", "Shampoo, Adam graft", ours("Shampoo", **settings), held=True),
        Contender(
            "ds_optim Shampoo, together",
            "all roots in one step",
            ours("Shampoo", **settings, refresh="together"),
            rare=True,
        ),
        Contender("products and roots alone", "nothing else", products_and_roots, block=block),
        Contender(META, "Shampoo, Adam graft, all roots in one step", metas(block)),
        Contender(
            "pytorch-optimizer ScalableShampoo",
            "Shampoo, RMSProp graft per parameter, Schur-Newton",
            theirs("pytorch_optimizer", "ScalableShampoo", **scalable),
            rare=True,
        ),
        Contender(
            "pytorch-optimizer ScalableShampoo, SVD",
            "the same with its SVD",
            theirs("pytorch_optimizer", "ScalableShampoo", **scalable, use_svd=True),
            rare=True,
        ),
        Contender(
            "pytorch-optimizer Shampoo",
            "Shampoo as in the paper, no graft, SVD" + given,
            theirs("pytorch_optimizer", "Shampoo", lr=1e-3, preconditioning_compute_steps=FREQUENCY),
            block=block,
            rare=True,
        ),
        Contender(
            "heavyball KLShampoo",
            "nearest there: factors by KL, eigenbases by QR" + given,
            theirs("heavyball", "KLShampoo", **eigen),
            block=block,
            rare=True,
        ),
        Contender(
            "heavyball SOAP",
            "Adam in Shampoo's eigenbases, by QR" + given,
            theirs("heavyball", "SOAP", **eigen),
            block=block,
            rare=True,
        ),
    ]


PRODUCTS_ALONE = "products alone"
SWAN = [
    Contender("ds_optim SWAN", f"SWAN, {NS_STEPS} steps of 2 products", ours("SWAN", ns_steps=NS_STEPS), held=True),
    Contender(
        PRODUCTS_ALONE, "nothing else", functools.partial(newton_schulz_products, steps=NS_STEPS, is_quintic=False)
    ),
    Contender("torch Muon", "momentum, 5 steps of 3 products, bf16", theirs("torch.optim", "Muon"), rare=True),
]
MUON = [
    Contender(PRODUCTS_ALONE, "nothing else", functools.partial(newton_schulz_products, steps=5, is_quintic=True)),
    Contender("ds_optim Muon", "momentum, 5 steps of 3 products", ours("Muon")),
    Contender("ds_optim Muon, bf16", "the same, products in bf16", ours("Muon", matmul_precision="bf16")),
    Contender("ds_optim NorMuon", "the same, rows of equal length", ours("NorMuon")),
    Contender("torch Muon", "momentum, 5 steps of 3 products, bf16", theirs("torch.optim", "Muon")),
    Contender("pytorch-optimizer Muon", "momentum, 5 steps of 3 products, bf16", theirs("pytorch_optimizer", "Muon")),
    Contender("heavyball Muon", "momentum, 5 steps of 3 products, bf16", theirs("heavyball", "Muon")),
]


def soap(block: int) -> list[Contender]:
    """SOAP's field at one block size; those without blocks are given them as parameters."""
    eigen = {"lr": 1e-3, "precondition_frequency": FREQUENCY}
    settings = {"max_preconditioner_dim": block, "precondition_frequency": FREQUENCY}
    whole = f"all bases in one step; given the blocks of {block} as parameters, since it has none"
    return [
        Contender("ds_optim SOAP", "SOAP, bases in turn", ours("SOAP", **settings)),
        Contender("ds_optim SOAP, together", "all bases in one step", ours("SOAP", **settings, refresh="together")),
        Contender("pytorch-optimizer SOAP", whole, theirs("pytorch_optimizer", "SOAP", **eigen), block=block),
        Contender("heavyball SOAP", whole, theirs("heavyball", "SOAP", **eigen, merge_dims=False), block=block),
    ]


RULES = ("Shampoo", "SWAN", "Muon", "SOAP")


# -- measuring --------------------------------------------------------------------------------------------------------


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that so many percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-percent * len(ordered) // 100) - 1)]


def measure(
    title: str, contenders: list[Contender], shapes: dict[str, Shape], rounds: int, warmup: int
) -> list[Result]:
    """All results of a table, in the order of its contenders."""
    field = Field(shapes, (contender.block for contender in contenders))
    results, running = {}, []
    for contender in contenders:
        result = results[contender.name] = Result(contender.name, contender.algorithm)
        parameters = field.parameters(contender.block)
        try:
            field.give(parameters, contender.block)
            step = contender.build(parameters)
            for _ in track(range(warmup), description=f"warm-up: {contender.name}"[:40], transient=True):
                field.give(parameters, contender.block)
                step()
        except ImportError as problem:
            result.note = f"not installed ({problem.name})"
        except Exception as problem:  # somebody else's failure is a result
            if contender.name.startswith("ds_optim"):
                raise
            result.note = f"fails: {type(problem).__name__}: {problem}".splitlines()[0][:90]
        else:
            running.append((contender, parameters, step))
        gc.collect()
    seconds: dict[str, dict[int, float]] = {contender.name: {} for contender, _, _ in running}
    for turn in track(range(rounds), description=title[:40]):
        running.append(running.pop(0))  # everyone comes after everyone's caches and sleeping threads once
        field.draw()
        for contender, parameters, step in running:
            if contender.rare and turn % RARELY:
                continue
            field.give(parameters, contender.block)
            begin = time.perf_counter()
            step()
            seconds[contender.name][turn] = time.perf_counter() - begin
    for contender, _, _ in running:
        result, times = results[contender.name], list(seconds[contender.name].values())
        result.steps, result.mean = len(times), 1e3 * statistics.fmean(times)
        result.median, result.p99 = 1e3 * statistics.median(times), 1e3 * percentile(times, 99)
        alone = seconds.get(PRODUCTS_ALONE)
        if alone and contender.held:
            mine = seconds[contender.name]
            result.share = statistics.median(alone[turn] / mine[turn] for turn in mine)
            result.reached, result.holds = f"{result.share:.2f} >= {SMALLEST_SHARE}", result.share >= SMALLEST_SHARE
        elif contender.held:
            spread = result.p99 / result.median
            result.reached, result.holds = f"{spread:.2f} <= {LARGEST_SPREAD}", spread <= LARGEST_SPREAD
    return list(results.values())


COLUMNS = ("optimizer", "algorithm", "steps", "mean ms", "median ms", "p99 ms", "p99 / p50", "held to")


def cells(result: Result) -> list[str]:
    """A result as the text of a table row."""
    if result.median is None or result.mean is None or result.p99 is None:
        return [result.name, result.algorithm, *[""] * 5, result.note]
    return [
        result.name,
        result.algorithm,
        str(result.steps),
        f"{result.mean:.0f}",
        f"{result.median:.0f}",
        f"{result.p99:.0f}",
        f"{result.p99 / result.median:.2f}",
        result.reached + ("  MISSED" if result.holds is False else ""),
    ]


def machine() -> str:
    """Where and when, in one line."""
    model = processor()
    versions = [f"torch {torch.__version__}"]
    for package in RIVALS:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{datetime.date.today()}, {model}, {torch.get_num_threads()} threads of {os.cpu_count()}, "
        f"{', '.join(versions)}; load average before the run {load}"
    )


def main() -> int:
    """Run the benchmark; returns 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="timed steps of whatever is held to something")
    parser.add_argument("--warmup", type=int, default=20, help="steps before, so that all roots exist")
    parser.add_argument("--blocks", type=int, nargs="*", default=[256, 512], help="block sizes of Shampoo and SOAP")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1376)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--only", default="", help="contenders whose names contain this")
    parser.add_argument("--rules", nargs="*", choices=RULES, default=RULES, help="only the tables of these")
    parser.add_argument("--compile", help="how heavyball compiles; not at all by default")
    parser.add_argument("--rivals", type=Path, help="a folder that rivals were installed to")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--markdown", type=Path, help="where to write the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    HEAVYBALL_MODE[0] = arguments.compile
    if arguments.rivals:
        sys.path.append(str(arguments.rivals))
    warnings.simplefilter("ignore")
    where = machine()
    console = Console(width=None if sys.stdout.isatty() else 180)
    shapes = llama_like(arguments.hidden, arguments.ffn, arguments.layers)
    fields = {f"Shampoo, blocks of {block}": shampoo(block) for block in arguments.blocks}
    fields |= {"SWAN": SWAN, "Muon": MUON}
    fields |= {f"SOAP, blocks of {block}": soap(block) for block in arguments.blocks}
    fields = {title: field for title, field in fields.items() if title.split(",")[0] in arguments.rules}
    tables: dict[str, list[Result]] = {}
    for title, everyone in fields.items():
        contenders = [each for each in everyone if arguments.only in each.name]
        tables[title] = measure(title, contenders, shapes, arguments.rounds, arguments.warmup)
        gc.collect()
        table = Table(*COLUMNS, title=title)
        for result in tables[title]:
            table.add_row(*cells(result), style="bold" if result.name.startswith("ds_optim") else "")
        console.print(table)
    console.print(where)
    if arguments.json:
        data = {"machine": where, "tables": {title: [asdict(one) for one in found] for title, found in tables.items()}}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if arguments.markdown:
        pages.write(arguments.markdown, markdown(where, arguments, shapes, tables))
    return int(any(result.holds is False for found in tables.values() for result in found))


def markdown(
    where: str, arguments: argparse.Namespace, shapes: dict[str, Shape], tables: dict[str, list[Result]]
) -> str:
    """The committed form of the tables."""
    numel = sum(rows * columns for rows, columns in shapes.values())
    command = " ".join(["python benchmarks/matrix_step.py", *sys.argv[1:]])
    lines = [
        "# The time of a matrix step",
        "",
        f"`{command}`: {where}.",
        "",
        f"{numel:,} fp32 elements in {len(shapes)} matrices: {arguments.layers} layers of a Llama of width "
        f"{arguments.hidden} with an MLP of {arguments.ffn}. {arguments.rounds} rounds after {arguments.warmup} steps; "
        "one step of every contender per round, in turn, in one process (where `steps` is smaller, in every fifth "
        f"round). Roots every {FREQUENCY} steps. `p99`: the largest, where `steps` is below 100. The share of SWAN is "
        "the time of its own matrix products alone over that of its step, the median over the rounds.",
    ]
    for title, results in tables.items():
        lines += ["", f"## {title}", "", f"| {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * 5 + "---|"]
        lines += [f"| {' | '.join(cells(result))} |" for result in results]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
