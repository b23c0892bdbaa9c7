"""How many tokens each optimizer needs to get as far as AdamW: a small Llama on real text, three learning rates each.

    python benchmarks/convergence.py run [--jobs 2]     # hours of one core; what is finished is kept
    python benchmarks/convergence.py report             # docs/results/convergence.{json,md,png}
    python benchmarks/convergence.py axis               # SWAN with each norm_axis: how its default was chosen
    python benchmarks/convergence.py repeat --seed 1    # each optimizer's best learning rate again
    python benchmarks/convergence.py int8               # state in eight bits against fp32, and against other packages'

Every optimizer trains the same model from the same weights on the same batches, under the same schedule (linear
warm-up, cosine to a tenth) and gradient clipping; each has its own three learning rates, AdamW too, and where the best
of them is the smallest or the largest, further ones until it no longer is. The text is the one of
``launcher/corpus.py``, so nothing is downloaded. One process and one thread per run, fp32, an ordinary torch loop: no
DeepSpeed, no sharding.

"Tokens to reach" is read off an optimizer's own full-length run: where its held-out loss is first as low as the best
that AdamW ended with. There the schedule is still under way and the learning rate still high, so this is no forecast of
what a run of that shorter length would end with.

A run is one JSON file in the work folder, written when it ends. An interrupted one begins again; finished ones are kept
whatever has changed in the package since (each says which source it ran): choose another folder to start afresh.

`int8` compares with ``pip install bitsandbytes torchao`` where they are installed (0.50.2 and 0.18.0 were).

Drawing needs matplotlib: ``pip install "ds-optim[plot]"``.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import pages

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launcher"))

import corpus
import typer
from processor import processor
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
TEXT_CACHE = CACHE / "causal-lm-corpus"  # the one of launcher/train.py
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
BASE = "AdamW"  # the optimizer that the others are measured against
STATUS = "running"  # suffix of the file in which a run says how far it is

# glibc returns the large activations to the system after every operation; keeping them is a fifth of the time.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


# ------------------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs have in common. Two layers as wide in the middle as Llama 3 (3.5 times), 2.95 M parameters."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 896
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    seq_length: int = 128
    batch_size: int = 16
    tokens: int = 1_500_000
    warmup: float = 0.1  # share of the steps
    final_lr: float = 0.1  # share of the peak
    clip: float = 1.0
    held_out_sequences: int = 96
    evaluations: int = 24
    compile: bool = True

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_length

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.tokens_per_step)

    def learning_rate_share(self, step: int) -> float:
        """Share of the peak learning rate at ``step`` (from 0), as in launcher/train.py."""
        warmup = round(self.warmup * self.steps)
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - 1 - warmup)
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done))

    def evaluated(self) -> set[int]:
        """Numbers of finished steps after which the held-out loss is taken."""
        return {round(i * self.steps / self.evaluations) for i in range(1, self.evaluations + 1)}


@dataclass(frozen=True, slots=True)
class Recipe:
    """An optimizer's settings and the three learning rates to begin with; neighbours are a factor of two apart."""

    learning_rates: tuple[float, float, float]
    weight_decay: float
    options: dict[str, Any] = field(default_factory=dict)
    aim: str = ""
    limits: tuple[float, float] = (0.0, math.inf)  # of tokens to reach, as a share of AdamW's


RECIPES = {
    "AdamW": Recipe((5e-4, 1e-3, 2e-3), 0.1, {"betas": (0.9, 0.95)}),
    # A fifth of AdamW's rate and five times its decay: the product is the same.
    "Lion": Recipe((2e-4, 4e-4, 8e-4), 0.5, {"betas": (0.95, 0.98)}),
    "Adan": Recipe((4e-3, 8e-3, 1.6e-2), 0.02, aim="<= 1.0", limits=(0.0, 1.0)),
    "AdamMini": Recipe((5e-4, 1e-3, 2e-3), 0.1, {"betas": (0.9, 0.95)}, aim="1.0 +- 0.03", limits=(0.97, 1.03)),
    "Shampoo": Recipe(
        (1e-3, 2e-3, 4e-3),
        0.1,
        {"betas": (0.9, 0.95), "max_preconditioner_dim": 256, "graft": "adam", "precondition_frequency": 10},
        aim="<= 0.7",
        limits=(0.0, 0.7),
    ),
    "SWAN": Recipe((1.5e-3, 3e-3, 6e-3), 0.0, {"alpha": 1.0}, aim="<= 0.5", limits=(0.0, 0.5)),
    # AdamW's own rates: what "match_rms_adamw" promises.
    "Muon": Recipe((5e-4, 1e-3, 2e-3), 0.1),
    "NorMuon": Recipe((5e-4, 1e-3, 2e-3), 0.1),
    "SOAP": Recipe((1e-3, 2e-3, 4e-3), 0.1, {"max_preconditioner_dim": 256}),
}
AXES = ("in", "out", "long")
# Others' AdamW with its state in eight bits; their modules are optional.
RIVALS = {"bitsandbytes.optim.AdamW8bit": RECIPES[BASE], "torchao.optim.AdamW8bit": RECIPES[BASE]}
IN_EIGHT_BITS: tuple[tuple[str, Any], ...] = (("state_dtype", "int8"), ("int8_embeddings", True))
WITHIN = 1.01  # of the final loss with state in fp32


@dataclass(frozen=True, slots=True)
class Run:
    """One training run.

    Attributes:
        optimizer: its name in `ds_optim` and `RECIPES`, or one of `RIVALS`.
        lr: the peak learning rate.
        extra: options beyond the recipe's.
        seed: of the initial weights and of the order of the text.
    """

    optimizer: str
    lr: float
    extra: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    @property
    def name(self) -> str:
        extra = [f"{key}={value}" for key, value in self.extra] + [f"seed={self.seed}"] * (self.seed != 0)
        return "-".join([self.optimizer, f"{self.lr:g}", *extra])

    @classmethod
    def read(cls, content: dict[str, Any]) -> Run:
        """The run that JSON describes."""
        extra = tuple((key, value) for key, value in content["extra"])
        return cls(content["optimizer"], content["lr"], extra, content.get("seed", 0))

    @property
    def recipe(self) -> Recipe:
        return (RECIPES | RIVALS)[self.optimizer]

    @property
    def options(self) -> dict[str, Any]:
        return self.recipe.options | dict(self.extra)


# ------------------------------------------------------------------------------------------------------------- one run


def llama(setting: Setting) -> Any:
    """The model that every run trains, with weights from torch's generator."""
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=setting.vocab_size,
            hidden_size=setting.hidden_size,
            intermediate_size=setting.intermediate_size,
            num_hidden_layers=setting.num_hidden_layers,
            num_attention_heads=setting.num_attention_heads,
            num_key_value_heads=setting.num_attention_heads,
            max_position_embeddings=setting.seq_length,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )


def next_token_loss(model: Any, ids: Any) -> Any:
    """The mean over all positions of (sequences, tokens) but the last."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(run: Run, setting: Setting, status: Path, cache: Path) -> dict[str, Any]:
    """Trains once, in this process.

    Returns:
        The run's record: settings, machine, date, seconds and ``curve``, rows of (tokens, mean training loss since the
        row before, held-out loss). A run whose loss is no longer finite ends there and is marked ``diverged``.
    """
    import torch
    import transformers

    import ds_optim

    torch.set_num_threads(1)
    text = corpus.load(corpus.prepare(None, setting.vocab_size, cache))
    torch.manual_seed(run.seed)
    model = llama(setting)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        return next_token_loss(model, ids)

    step_loss = torch.compile(loss_of, dynamic=False) if setting.compile else loss_of
    groups = ds_optim.param_groups(model, run.recipe.weight_decay)
    module, _, kind = run.optimizer.rpartition(".")
    roles = {} if module else {"roles": model}
    optimizer = getattr(importlib.import_module(module or "ds_optim"), kind)(groups, lr=run.lr, **roles, **run.options)
    windows = corpus.Windows(text.train, setting.seq_length, run.seed)
    held_out = torch.from_numpy(
        corpus.Windows(text.held_out, setting.seq_length, 0).global_batch(0, setting.held_out_sequences)
    ).split(setting.batch_size)

    def held_out_loss() -> float:
        with torch.no_grad():
            return sum(step_loss(ids).item() for ids in held_out) / len(held_out)

    curve: list[tuple[int, float | None, float]] = [(0, None, held_out_loss())]
    losses: list[float] = []
    evaluated = setting.evaluated()
    seconds = in_optimizer = 0.0
    for step in range(setting.steps):
        started = time.perf_counter()
        rate = run.lr * setting.learning_rate_share(step)
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):  # torchao's
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        ids = torch.from_numpy(windows.global_batch(step, setting.batch_size))
        loss = step_loss(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
        losses.append(loss.item())
        before = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        now = time.perf_counter()
        seconds, in_optimizer = seconds + now - started, in_optimizer + now - before
        done = step + 1
        if done in evaluated:
            curve.append((done * setting.tokens_per_step, sum(losses) / len(losses), held_out_loss()))
            losses.clear()
        if done % 5 == 0 or done in evaluated:
            status.write_text(f"{done} {setting.steps} {loss.item():.4f} {curve[-1][2]:.4f}")
        if not math.isfinite(loss.item()):
            break
    return {
        "run": asdict(run) | {"name": run.name},
        "options": run.options,
        "weight_decay": run.recipe.weight_decay,
        "setting": asdict(setting) | {"steps": setting.steps},
        "parameters": sum(p.numel() for p in model.parameters()),
        "text": text.about,
        "diverged": not math.isfinite(curve[-1][2]) or len(curve) <= setting.evaluations,
        "curve": curve,
        "seconds": round(seconds, 1),
        "seconds_in_optimizer": round(in_optimizer, 1),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": _machine(),
        "source": _source(Path(ds_optim.__file__).parent),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **({"package": f"{module} {importlib.metadata.version(module.partition('.')[0])}"} if module else {}),
    }


def _machine() -> str:
    return f"{processor()}, {os.cpu_count()} cores"


def _source(package: Path) -> str:
    """A short hash of the package's source, so that runs of different sources can be told apart."""
    digest = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".cpp", ".h")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


# ----------------------------------------------------------------------------------------------------- finished records


@dataclass(frozen=True, slots=True)
class Record:
    """A finished run, as its file holds it."""

    run: Run
    content: dict[str, Any]

    @property
    def curve(self) -> list[tuple[int, float | None, float]]:
        """Tokens, mean training loss since the row before, held-out loss."""
        return [(tokens, train_loss, held_out) for tokens, train_loss, held_out in self.content["curve"]]

    @property
    def tokens(self) -> int:
        return self.curve[-1][0]

    @property
    def final_loss(self) -> float:
        """Held-out loss at the end; infinite if the run diverged."""
        return math.inf if self.content["diverged"] else self.curve[-1][2]

    def tokens_to_reach(self, target: float) -> float | None:
        """Where the held-out loss is first at or under ``target``, on straight lines between evaluations."""
        before = (0, math.inf)
        for tokens, _, loss in self.curve:
            if loss <= target:
                if not math.isfinite(before[1]):
                    return tokens
                return before[0] + (tokens - before[0]) * (before[1] - target) / (before[1] - loss)
            before = (tokens, loss)
        return None


def finished(out: Path) -> dict[Run, Record]:
    """All finished runs of a work folder."""
    records = {}
    for path in sorted(out.glob("*.json")):
        content = json.loads(path.read_text())
        run = Run.read(content["run"])
        records[run] = Record(run, content)
    return records


def best(records: Iterable[Record]) -> Record:
    """The record that ended lowest."""
    return min(records, key=lambda record: record.final_loss)


# ----------------------------------------------------------------------------------------------------------- many runs


def wanted(optimizer: str, records: dict[Run, Record], extensions: int) -> list[Run]:
    """The optimizer's runs: its three learning rates, then outwards while the best is the smallest or the largest."""
    low, middle, high = RECIPES[optimizer].learning_rates
    runs = [Run(optimizer, lr) for lr in (middle, high, low)]
    for _ in range(extensions):
        if not all(run in records for run in runs):
            break
        rates = sorted(run.lr for run in runs)
        lr = best(records[run] for run in runs).run.lr
        if lr == rates[0]:
            runs.append(Run(optimizer, float(f"{lr / 2:g}")))
        elif lr == rates[-1]:
            runs.append(Run(optimizer, float(f"{lr * 2:g}")))
        else:
            break
    return runs


def train_all(ask: Callable[[dict[Run, Record]], list[Run]], out: Path, jobs: int, setting: Setting) -> None:
    """Trains what is missing, ``jobs`` processes at a time.

    Args:
        ask: which runs are wanted, given the finished ones; it may want more as more is known.
        out: the work folder.
        jobs: processes at a time.
        setting: of every run.

    Raises:
        typer.Exit: with status 1, after everything else has ended, if a run failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    corpus.prepare(None, setting.vocab_size, TEXT_CACHE, console.print)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    failed: set[Run] = set()
    running: dict[Run, tuple[subprocess.Popen[bytes], TaskID]] = {}
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        total = progress.add_task("runs")
        while True:
            for run, (process, task) in list(running.items()):
                _show(progress, task, run, out)
                if process.poll() is None:
                    continue
                progress.remove_task(task)
                del running[run]
                if process.returncode == 0:
                    record = finished(out)[run]
                    progress.print(f"{run.name}: {record.final_loss:.4f}, {record.content['seconds']:.0f} s")
                else:
                    failed.add(run)
                    progress.print(f"{run.name} FAILED (exit status {process.returncode}): {out / run.name}.log")
            records = finished(out)
            runs = ask(records)
            progress.update(total, total=len(runs), completed=sum(run in records for run in runs))
            waiting = [run for run in runs if run not in records and run not in failed and run not in running]
            for run in waiting[: jobs - len(running)]:
                running[run] = _start(run, out, setting), progress.add_task(run.name, total=setting.steps)
            if not running:
                break
            time.sleep(1)
    if failed:
        raise typer.Exit(1)


def _start(run: Run, out: Path, setting: Setting) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(Path(__file__).resolve()), "one", json.dumps(asdict(run)), "--out", str(out)]
    with (out / f"{run.name}.log").open("wb") as log:
        return subprocess.Popen(
            [*command, "--setting", json.dumps(asdict(setting))],
            env=os.environ | ONE_THREAD,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _show(progress: Progress, task: TaskID, run: Run, out: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        done, _, loss, held_out = (out / f"{run.name}.{STATUS}").read_text().split()
        progress.update(task, completed=int(done), description=f"{run.name}  loss {loss}  held out {held_out}")


# -------------------------------------------------------------------------------------------------------- what it means


def by_optimizer(records: dict[Run, Record]) -> dict[str, list[Record]]:
    """Each optimizer's runs with its recipe and the first seed, by learning rate; empty lists where there are none."""
    plain = sorted((r for r in records.values() if not r.run.extra and r.run.seed == 0), key=lambda r: r.run.lr)
    return {name: [record for record in plain if record.run.optimizer == name] for name in RECIPES}


def is_bracketed(records: Sequence[Record]) -> bool:
    """Whether the best learning rate has a worse one on either side."""
    return best(records) not in (records[0], records[-1])


def markdown(records: dict[Run, Record]) -> str:
    """The page: what was run, the table, how to read it, every run."""
    tables = {name: runs for name, runs in by_optimizer(records).items() if runs}
    base = best(tables[BASE])
    shared = base.content["setting"]
    dates = sorted(record.content["date"][:10] for record in records.values())
    parts = [
        "# Convergence: tokens to AdamW's loss",
        f"`python benchmarks/convergence.py run`, then `report`: {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, "
        f"{_all(records, 'machine')}, one thread per run, torch {_all(records, 'torch')}, transformers "
        f"{_all(records, 'transformers')}. Raw curves: [convergence.json](convergence.json).",
        f"A Llama of {base.content['parameters']:,} parameters ({shared['num_hidden_layers']} layers, "
        f"{shared['hidden_size']} wide, vocabulary {shared['vocab_size']:,}, untied), fp32, on the source and language "
        f"reference of Python ({base.content['text']}). {shared['steps']} steps of {shared['batch_size']} sequences "
        f"of {shared['seq_length']} tokens: {base.tokens:,} tokens, less than one epoch. Warm-up over "
        f"{shared['warmup']:.0%} of the steps, cosine to {shared['final_lr']:.0%}, gradients clipped to "
        f"{shared['clip']:g}. Held-out loss on {shared['held_out_sequences']} sequences, {shared['evaluations']} "
        "times. Same weights, same batches, same schedule for all; only the optimizer and its settings differ.",
        "![Held-out loss against tokens, and final loss against learning rate](convergence.png)",
        f"## Tokens until {BASE}'s best final loss, {base.final_loss:.4f} (lr {base.run.lr:g})",
        "\n".join(_summary(tables, base)),
        "## Reading",
        "\n".join(f"- {sentence}" for sentence in _reading(records, tables, base)),
        "## Every run",
        "\n".join(_every(records, base)),
    ]
    if any("norm_axis" in dict(run.extra) for run in records):
        parts[-2:-2] = ["## SWAN's `norm_axis`", "\n".join(_axes(records, base))]
    if pairs := in_both(records):
        parts[-2:-2] = ["## State in eight bits", "\n".join(_eight_bits(records, pairs))]
    return "\n\n".join(parts) + "\n"


def _all(records: dict[Run, Record], key: str) -> str:
    """What the records have for a key, each once."""
    return ", ".join(sorted({record.content[key] for record in records.values() if key in record.content}))


def _summary(tables: dict[str, list[Record]], base: Record) -> list[str]:
    lines = [
        f"| optimizer | best lr | final held-out loss | minus {BASE}'s | tokens to reach | share of {BASE}'s | aim | |",
        "|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for name, runs in tables.items():
        chosen = best(runs)
        reached = chosen.tokens_to_reach(base.final_loss)
        share = math.inf if reached is None else reached / base.tokens
        low, high = RECIPES[name].limits
        verdict = ("met" if low <= share <= high else "missed") if RECIPES[name].aim else ""
        if verdict and len(runs) < 3:
            verdict += " so far"
        lines.append(
            f"| {name} | {chosen.run.lr:g}{'' if is_bracketed(runs) else ' (edge)'} | {chosen.final_loss:.4f} | "
            f"{chosen.final_loss - base.final_loss:+.4f} | {_count(reached)} | "
            f"{'' if reached is None else f'{share:.3f}'} | {RECIPES[name].aim} | {verdict} |"
        )
    return lines


def _reading(records: dict[Run, Record], tables: dict[str, list[Record]], base: Record) -> list[str]:
    sentences = []
    repeated = [record for record in records.values() if record.run.seed and not record.run.extra]
    if repeated:
        sentences.append("Other seeds, at the learning rate that was best with the first: " + _seeds(records, repeated))
    else:
        sentences.append(
            "One seed. How much the final losses would move under another was not measured, so small differences "
            "between optimizers mean nothing here."
        )
    sentences.append(
        "Tokens to reach are read off the full-length curve, where the learning rate is still high: a run planned for "
        f"that many tokens would decay earlier and most likely end lower. {BASE} itself gets its last stretch from the "
        "decay too, so the shares say how far ahead an optimizer is, not what a shorter training would cost."
    )
    behind = [best(runs) for name, runs in tables.items() if best(runs).tokens_to_reach(base.final_loss) is None]
    for record in behind:
        there = base.tokens_to_reach(record.final_loss)
        sentences.append(
            f"{record.run.optimizer} did not get there: it ended {record.final_loss - base.final_loss:.4f} higher, "
            + (
                "without a finite loss."
                if there is None
                else f"where {BASE} was after {there / base.tokens:.1%} of its tokens."
            )
        )
    edges = [name for name, runs in tables.items() if not is_bracketed(runs)]
    bracketed = [name for name in tables if name not in edges]
    sentences.append(
        f"The best learning rate lies between worse ones for {', '.join(bracketed) or 'none'}."
        + (f" It is the smallest or largest one tried for {', '.join(edges)}: better ones may exist." if edges else "")
    )
    few = [f"{name} ({len(tables.get(name, []))})" for name in RECIPES if len(tables.get(name, [])) < 3]
    if few:
        sentences.append(f"Not finished: fewer than three learning rates (how many) of {', '.join(few)}.")
    sentences.append(
        f"{BASE} had {len(tables[BASE])} learning rates, a factor of two apart, and one weight decay: it could be "
        "tuned further (betas, decay, schedule), and so could the others. The model is tiny, the training short and "
        "the batches are small; nothing here says that the shares hold at the size of real models."
    )
    sources = sorted({record.content["source"] for record in records.values()})
    if len(sources) > 1:
        runs_of = {s: sorted({r.run.optimizer for r in records.values() if r.content["source"] == s}) for s in sources}
        sentences.append(
            "The package changed between runs: "
            + "; ".join(f"source {source} ran {', '.join(names)}" for source, names in runs_of.items())
            + "."
        )
    return sentences


def _seeds(records: dict[Run, Record], repeated: Sequence[Record]) -> str:
    found = []
    for record in sorted(repeated, key=lambda r: (r.run.seed, list(RECIPES).index(r.run.optimizer))):
        first = records[replace(record.run, seed=0)]
        base = [r for r in repeated if r.run.seed == record.run.seed and r.run.optimizer == BASE]
        share = record.tokens_to_reach(base[0].final_loss) if base and record is not base[0] else None
        found.append(
            f"{record.run.optimizer} {record.final_loss:.4f} (seed {record.run.seed}; {first.final_loss:.4f} with 0"
            + (f"; share of {BASE}'s tokens {share / base[0].tokens:.3f}" if share is not None else "")
            + ")"
        )
    return ", ".join(found) + "."


def _axes(records: dict[Run, Record], base: Record) -> list[str]:
    """Final loss (tokens to reach) by axis and learning rate; SWAN's own default has its runs without the option."""
    rates = sorted({run.lr for run in records if "norm_axis" in dict(run.extra)})
    lines = [f"| norm_axis | {' | '.join(f'lr {lr:g}' for lr in rates)} |", f"|---|{'---:|' * len(rates)}"]
    for axis_name in (None, *AXES):
        extra = () if axis_name is None else (("norm_axis", axis_name),)
        found = [records.get(Run("SWAN", lr, extra)) for lr in rates]
        if any(found):
            cells = [f"{r.final_loss:.4f} ({_count(r.tokens_to_reach(base.final_loss))})" if r else "" for r in found]
            lines.append(f"| {axis_name or 'default'} | {' | '.join(cells)} |")
    return [*lines, "", f"Final held-out loss, and tokens to reach {BASE}'s best. One seed."]


def in_both(records: dict[Run, Record]) -> list[tuple[Record, Record]]:
    """Runs in fp32 beside those that differ only in keeping their state in eight bits."""
    found = [(records.get(replace(run, extra=())), records[run]) for run in records if run.extra == IN_EIGHT_BITS]
    return [(plain, coded) for plain, coded in found if plain is not None]


def _eight_bits(records: dict[Run, Record], pairs: list[tuple[Record, Record]]) -> list[str]:
    """Final losses with either state, and of other packages' AdamW, all at the recipe's middle learning rate."""
    lines = [
        "| optimizer | lr | final held-out loss, fp32 | in eight bits | difference | within 1 % |",
        "|---|---:|---:|---:|---:|---|",
    ]
    rivals = [(records.get(Run(BASE, run.lr)), records[run]) for run in records if run.optimizer in RIVALS]
    for plain, coded in [*pairs, *rivals]:
        if plain is not None:
            share = coded.final_loss / plain.final_loss
            lines.append(
                f"| {coded.run.optimizer} | {coded.run.lr:g} | {plain.final_loss:.4f} | {coded.final_loss:.4f} | "
                f"{share - 1:+.2%} | {'yes' if share <= WITHIN else 'NO'} |"
            )
    return [
        *lines,
        "",
        f"Embeddings' state too is in eight bits. In fp32 the other packages' is our {BASE}'s run. One seed. "
        f"{_all(records, 'package')}".rstrip(),
    ]


def _every(records: dict[Run, Record], base: Record) -> list[str]:
    lines = [
        "| run | final held-out loss | tokens to reach | seconds | of them in the optimizer | source |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for record in sorted(
        records.values(), key=lambda r: ([*RECIPES, *RIVALS].index(r.run.optimizer), r.run.seed, r.run.name)
    ):
        content = record.content
        final = "diverged" if content["diverged"] else f"{record.final_loss:.4f}"
        reached = _count(record.tokens_to_reach(base.final_loss)) if record.run.seed == 0 else ""
        lines.append(
            f"| {record.run.name} | {final} | {reached} | {content['seconds']:.0f} | "
            f"{content['seconds_in_optimizer'] / content['seconds']:.1%} | {content['source']} |"
        )
    return [*lines, "", "Seconds are of a machine that had other work; they include the compilation of the model."]


def _count(tokens: float | None) -> str:
    return "not reached" if tokens is None else f"{tokens:,.0f}"


def draw(records: dict[Run, Record], path: Path) -> None:
    """Held-out loss against tokens at each optimizer's best learning rate; final loss against learning rate.

    Raises:
        typer.Exit: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        Console(stderr=True).print(f'{path} was not drawn: pip install "ds-optim\\[plot]" for matplotlib')
        raise typer.Exit(1) from None
    from colors import COLORS

    tables = {name: runs for name, runs in by_optimizer(records).items() if runs}
    target = best(tables[BASE]).final_loss
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    curves, rates = figure.subplots(1, 2, width_ratios=(3, 2))
    lowest = min(record.final_loss for runs in tables.values() for record in runs)
    highest = target
    for name, runs in tables.items():
        record = best(runs)
        points = [(tokens / 1e6, loss) for tokens, _, loss in record.curve[1:]]
        highest = max(highest, points[len(points) // 6][1])
        curves.plot(
            *zip(*points, strict=True), color=COLORS[name], label=f"{name}, lr {record.run.lr:g}", linewidth=1.8
        )
        reached = record.tokens_to_reach(target)
        if reached is not None and name != BASE:
            curves.plot(reached / 1e6, target, "o", color=COLORS[name], markersize=7)
        ended = [(r.run.lr, r.final_loss) for r in runs if math.isfinite(r.final_loss)]
        if ended:
            rates.plot(*zip(*ended, strict=True), "o-", color=COLORS[name], label=name, linewidth=1.8)
    for panel in (curves, rates):
        panel.axhline(target, color="black", linestyle="--", linewidth=1, label=f"{BASE}'s best, {target:.3f}")
        panel.grid(alpha=0.25)
        panel.set_ylabel("held-out loss")
        panel.spines[["top", "right"]].set_visible(False)
    curves.set(xlabel="training tokens, millions", xlim=(0, None), ylim=(lowest - 0.05, highest))
    curves.set_title("Each optimizer at its best learning rate; dots: where it reaches AdamW's best")
    curves.legend(frameon=False)
    rates.set(xlabel="peak learning rate", xscale="log")
    rates.set_title("Loss at the end of training")
    rates.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)


# ------------------------------------------------------------------------------------------------------------- commands

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Out = Annotated[Path, typer.Option(help="The work folder: one JSON for each finished run.")]
Jobs = Annotated[int, typer.Option(min=1, help="Processes at a time, each with one thread.")]
Compiled = Annotated[bool, typer.Option("--compile/--eager", help="The model through torch.compile, or not.")]
DEFAULT_OUT = CACHE / "ds-optim" / "convergence"


@app.command("run")
def run_all(
    optimizer: Annotated[list[str] | None, typer.Option(help="Only these (may be given several times).")] = None,
    out: Out = DEFAULT_OUT,
    jobs: Jobs = 1,
    compile_model: Compiled = True,
    extensions: Annotated[int, typer.Option(help="Further learning rates, at most, where the best is an edge.")] = 2,
) -> None:
    """Train every optimizer at its learning rates; runs that are finished are skipped."""
    names = _known(optimizer)

    def ask(records: dict[Run, Record]) -> list[Run]:
        return [run for name in names for run in wanted(name, records, extensions)]

    train_all(ask, out, jobs, replace(Setting(), compile=compile_model))


@app.command()
def axis(
    learning_rate: Annotated[list[float] | None, typer.Option(help="May be given several times.")] = None,
    norm_axis: Annotated[list[str] | None, typer.Option(help="Only these (may be given several times).")] = None,
    out: Out = DEFAULT_OUT,
    jobs: Jobs = 1,
    compile_model: Compiled = True,
) -> None:
    """Train SWAN with each norm_axis at the same learning rates (default: the recipe's middle one)."""
    rates = learning_rate or [RECIPES["SWAN"].learning_rates[1]]
    runs = [Run("SWAN", lr, (("norm_axis", name),)) for lr in rates for name in norm_axis or AXES]
    train_all(lambda _: runs, out, jobs, replace(Setting(), compile=compile_model))


@app.command("int8")
def in_eight_bits(
    optimizer: Annotated[list[str] | None, typer.Option(help="Of these (may be given several times).")] = None,
    out: Out = DEFAULT_OUT,
    jobs: Jobs = 1,
    compile_model: Compiled = True,
) -> None:
    """Train with state in fp32 and in eight bits at the recipe's middle learning rate, and compare the ends.

    With AdamW train bitsandbytes' and torchao's AdamW8bit as well, where they are installed.
    """
    names = _known(optimizer or ["AdamW", "AdamMini", "Lion"])
    runs = [Run(name, RECIPES[name].learning_rates[1], extra) for name in names for extra in ((), IN_EIGHT_BITS)]
    if BASE in names:
        installed = [name for name in RIVALS if importlib.util.find_spec(name.partition(".")[0])]
        runs += [Run(name, RECIPES[BASE].learning_rates[1]) for name in installed]
    train_all(lambda _: runs, out, jobs, replace(Setting(), compile=compile_model))
    records = {run: record for run, record in finished(out).items() if run in runs}
    pairs = in_both(records)
    Console(soft_wrap=True).print("\n".join(_eight_bits(records, pairs)), markup=False)
    raise typer.Exit(int(any(coded.final_loss > WITHIN * plain.final_loss for plain, coded in pairs)))


@app.command()
def repeat(
    seed: Annotated[list[int], typer.Option(help="May be given several times.")],
    optimizer: Annotated[list[str] | None, typer.Option(help="Only these (may be given several times).")] = None,
    out: Out = DEFAULT_OUT,
    jobs: Jobs = 1,
    compile_model: Compiled = True,
) -> None:
    """Train each optimizer's best finished learning rate again, from other weights and in another order of the text."""
    names = _known(optimizer)
    tables = by_optimizer(finished(out))
    runs = [replace(best(tables[name]).run, seed=number) for number in seed for name in names if tables[name]]
    train_all(lambda _: runs, out, jobs, replace(Setting(), compile=compile_model))


@app.command()
def report(out: Out = DEFAULT_OUT, directory: Annotated[Path, typer.Option(help="Where to write.")] = RESULTS) -> None:
    """Write convergence.json, .md and .png from the finished runs."""
    records = finished(out)
    if not by_optimizer(records)[BASE]:
        raise typer.BadParameter(f"{out} holds no finished run of {BASE} to compare with")
    runs = [record.content for _, record in sorted(records.items(), key=lambda item: item[0].name)]
    (directory / "convergence.json").write_text(json.dumps(runs, separators=(",", ":")) + "\n", encoding="utf-8")
    pages.write(directory / "convergence.md", markdown(records))
    draw(records, directory / "convergence.png")


def _known(names: list[str] | None) -> list[str]:
    unknown = set(names or ()) - RECIPES.keys()
    if unknown:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: there are {', '.join(RECIPES)}")
    return names or list(RECIPES)


@app.command(hidden=True)
def one(run: str, out: Out, setting: Annotated[str, typer.Option()]) -> None:
    """Train one run in this process; `run` and `axis` start it."""
    chosen = Run.read(json.loads(run))
    status = out / f"{chosen.name}.{STATUS}"
    record = train(chosen, Setting(**json.loads(setting)), status, TEXT_CACHE)
    writing = out / f"{chosen.name}.writing"
    writing.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    writing.rename(out / f"{chosen.name}.json")
    status.unlink(missing_ok=True)


if __name__ == "__main__":
    app()
