"""What was asked for: the command line and the DeepSpeed JSON, joined and checked before anything is built.

Every fault that can be seen from here is reported in one error. The optimizer is what the JSON's ``"optimizer"`` entry
names and nothing else: this file lists config files and knows no optimizer class.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
OPTIMIZERS = tuple(sorted(path.name.removesuffix("_zero2.json") for path in CONFIGS.glob("*_zero2.json")))
STAGES = (0, 1, 2, 3)
CHECKPOINT_FORMS = ("canonical", "deepspeed")


class SettingsError(ValueError):
    """One or more settings cannot work; the message lists all of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(f"  - {problem}" for problem in problems))


@dataclass(frozen=True, slots=True)
class Settings:
    """Checked settings of one run; ``deepspeed`` is the config that DeepSpeed gets, with the command line applied."""

    deepspeed: dict[str, Any]
    deepspeed_path: Path
    model: dict[str, Any]
    model_path: Path
    steps: int
    seq_length: int
    warmup: float
    text: tuple[Path, ...] | None
    cache: Path
    seed: int
    eval_every: int
    eval_sequences: int
    log_every: int
    output: Path | None
    save: Path | None
    save_every: int
    checkpoint_form: str
    keep: int | None
    resume: Path | None
    autoresume: bool
    branch: Path | None
    lr_scale: float
    skip_sequences: int
    fallback: bool
    memory_report: Path | None
    noise_scale: bool
    noise_scale_by_role: bool
    timeout: float

    @property
    def optimizer_name(self) -> str:
        return str(self.deepspeed["optimizer"]["type"])

    @property
    def zero_stage(self) -> int:
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @property
    def micro_batch(self) -> int:
        return int(self.deepspeed["train_micro_batch_size_per_gpu"])

    @property
    def accumulation(self) -> int:
        return int(self.deepspeed.get("gradient_accumulation_steps", 1))


def read(arguments: Sequence[str] | None = None, world_size: int = 1) -> Settings:
    """Settings from the command line (``sys.argv`` if None).

    Raises:
        SettingsError: everything that cannot work.
        SystemExit: from argparse, for unknown options and ``--help``.
    """
    given = _parser().parse_args(arguments)
    problems: list[str] = []
    deepspeed_path = given.deepspeed_config or CONFIGS / f"{given.optimizer or 'adam_mini'}_zero2.json"
    deepspeed = _read_json(deepspeed_path, "DeepSpeed config", problems)
    model = _read_json(given.model, "model config", problems)
    if deepspeed is not None:
        _apply(given, deepspeed, world_size, problems)
        _check_deepspeed(deepspeed, deepspeed_path, problems)
    if model is not None:
        _check_model(model, given, problems)
    for option in ("seq_length", "log_every", "eval_sequences"):
        if getattr(given, option) < 1:
            problems.append(f"--{option.replace('_', '-')} is {getattr(given, option)}; it must be 1 or more")
    for option in ("eval_every", "save_every"):
        if getattr(given, option) < 0:
            problems.append(f"--{option.replace('_', '-')} is {getattr(given, option)}; 0 turns it off")
    if not 0 <= given.warmup < 1:
        problems.append(f"--warmup is {given.warmup}; it is the share of the steps, from 0 up to but not including 1")
    _check_checkpoints(given, problems)
    if not given.timeout > 0:
        problems.append(f"--timeout is {given.timeout}; it must be more than 0 seconds")
    if given.memory_report is not None and given.memory_report.exists() and not given.memory_report.is_dir():
        problems.append(f"--memory-report {given.memory_report}: that is a file; give a directory")
    steps = _steps(given, deepspeed, world_size, problems)
    if problems:
        raise SettingsError(problems)
    assert deepspeed is not None
    assert model is not None
    return Settings(
        deepspeed=deepspeed,
        deepspeed_path=deepspeed_path,
        model=model,
        model_path=given.model,
        steps=steps,
        seq_length=given.seq_length,
        warmup=given.warmup,
        text=tuple(given.text) if given.text else None,
        cache=given.cache,
        seed=given.seed,
        eval_every=given.eval_every,
        eval_sequences=given.eval_sequences,
        log_every=given.log_every,
        output=given.output,
        save=given.save,
        save_every=given.save_every,
        checkpoint_form=given.checkpoint_form,
        keep=given.keep,
        resume=given.resume,
        autoresume=given.autoresume,
        branch=given.branch,
        lr_scale=given.lr_scale,
        skip_sequences=given.skip_sequences,
        fallback=given.fallback,
        memory_report=given.memory_report,
        noise_scale=given.noise_scale or given.noise_scale_by_role,
        noise_scale_by_role=given.noise_scale_by_role,
        timeout=given.timeout,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepspeed launcher/train.py",
        description="Train a causal language model from scratch under DeepSpeed.",
        epilog="The optimizer, the ZeRO stage and the precision come from the DeepSpeed JSON (see docs/configs.md).",
    )
    what = parser.add_argument_group("what to train")
    what.add_argument(
        "--model",
        type=Path,
        default=CONFIGS / "models" / "llama_small.json",
        metavar="JSON",
        help="transformers model config (default: configs/models/llama_small.json)",
    )
    what.add_argument(
        "--deepspeed",
        "--deepspeed_config",
        dest="deepspeed_config",
        type=Path,
        metavar="JSON",
        help="DeepSpeed config (default: the one of --optimizer, or configs/adam_mini_zero2.json)",
    )
    what.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help="take the optimizer entry of configs/NAME_zero2.json, whatever the DeepSpeed config says",
    )
    what.add_argument("--zero-stage", type=int, choices=STAGES, help="replaces the config's ZeRO stage")
    what.add_argument("--lr", type=float, help="replaces the config's learning rate")
    what.add_argument("--micro-batch", type=int, metavar="N", help="sequences per rank and backward pass")
    size = what.add_mutually_exclusive_group()
    size.add_argument("--accumulation", type=int, metavar="N", help="backward passes per step")
    size.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="sequences per step, all ranks together, in backward passes of at most the micro-batch",
    )
    what.add_argument("--seq-length", type=int, default=128, metavar="N", help="tokens per sequence (128)")
    length = what.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=240, metavar="N", help="optimizer steps (240)")
    length.add_argument("--tokens", type=float, metavar="N", help="stop after that many tokens instead, e.g. 2e6")
    what.add_argument(
        "--warmup", type=float, default=0.1, metavar="SHARE", help="warm-up, as a share of the steps (0.1)"
    )
    what.add_argument("--seed", type=int, default=0, help="of the initial weights and of the order of the text (0)")

    text = parser.add_argument_group("text")
    text.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="text files, or directories of them (default: source and documentation of the running Python)",
    )
    default_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "causal-lm-corpus"
    text.add_argument("--cache", type=Path, default=default_cache, metavar="DIR", help=f"({default_cache})")

    watch = parser.add_argument_group("watching")
    watch.add_argument("--log-every", type=int, default=10, metavar="N", help="steps between two log lines (10)")
    watch.add_argument("--eval-every", type=int, default=0, metavar="N", help="steps between two held-out losses (off)")
    watch.add_argument("--eval-sequences", type=int, default=64, metavar="N", help="held-out sequences to use (64)")
    watch.add_argument("--output", type=Path, metavar="DIR", help="write every step (JSON lines) and a summary here")
    watch.add_argument(
        "--memory-report",
        type=Path,
        metavar="DIR",
        help="measure where the memory of the fourth step is, and write DIR/measured.json and DIR/report.html",
    )
    watch.add_argument(
        "--noise-scale",
        action="store_true",
        help="measure the gradient noise scale, which batch size to compare with, while training (docs/batch_size.md)",
    )
    watch.add_argument(
        "--noise-scale-by-role", action="store_true", help="and that of attention, mlp, embedding ... by themselves"
    )

    keep = parser.add_argument_group("saving and resuming (see docs/checkpoints.md)")
    keep.add_argument("--save", type=Path, metavar="DIR", help="save a checkpoint at the end, in DIR/global_stepN")
    keep.add_argument("--save-every", type=int, default=0, metavar="N", help="and every N steps (off)")
    keep.add_argument("--keep", type=int, metavar="N", help="only the N newest checkpoints in DIR (all)")
    keep.add_argument(
        "--checkpoint-form",
        choices=CHECKPOINT_FORMS,
        default="canonical",
        help="canonical: resumes on any number of ranks and at any ZeRO stage (default); "
        "deepspeed: DeepSpeed's own, for any optimizer; ours resume from it elsewhere too, others on the same ranks",
    )
    again = keep.add_mutually_exclusive_group()
    again.add_argument("--resume", type=Path, metavar="DIR", help="continue from DIR, or from DIR/global_stepN")
    again.add_argument(
        "--autoresume",
        action="store_true",
        help="continue from the --save directory if it holds a checkpoint: one command starts and restarts a run",
    )
    again.add_argument(
        "--branch",
        type=Path,
        metavar="DIR",
        help="start from DIR's weights, optimizer state and place in the text, for --steps or --tokens at this run's "
        "own batch and the learning rate that DIR was saved with (see docs/batch_size.md)",
    )
    keep.add_argument(
        "--lr-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="of a --branch: its learning rate, as a multiple of the saved one; reached over --warmup (1)",
    )
    keep.add_argument(
        "--skip-sequences", type=int, default=0, metavar="N", help="of a --branch: begin N sequences later (0)"
    )
    keep.add_argument(
        "--fallback", action="store_true", help="if that checkpoint is damaged, take the newest whole one before it"
    )
    several = parser.add_argument_group("several hosts (see docs/multinode.md)")
    several.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds after which ranks that wait for a lost one give up; more than the slowest save (600)",
    )
    # The launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _check_checkpoints(given: argparse.Namespace, problems: list[str]) -> None:
    needing = {"--save-every": given.save_every, "--keep": given.keep is not None, "--autoresume": given.autoresume}
    if given.save is None:
        problems += [f"{option} needs --save DIR" for option, is_given in needing.items() if is_given]
    if given.keep is not None and given.keep < 1:
        problems.append(f"--keep is {given.keep}; it must be 1 or more")
    if given.keep is not None and given.checkpoint_form == "deepspeed":
        problems.append("--keep removes canonical checkpoints only, not those of --checkpoint-form deepspeed")
    if given.fallback and given.resume is None and not given.autoresume:
        problems.append("--fallback needs --resume DIR or --autoresume")
    for option, directory in (("--resume", given.resume), ("--branch", given.branch)):
        if directory is not None and not directory.is_dir():
            problems.append(f"{option} {directory}: no such directory")
    if given.branch is None and (given.lr_scale != 1.0 or given.skip_sequences != 0):
        problems.append("--lr-scale and --skip-sequences need --branch DIR")
    if given.branch is not None and given.save is not None:
        problems.append("--branch only measures: its learning rate has no schedule to go on with; leave --save out")
    if not given.lr_scale > 0 or math.isinf(given.lr_scale):
        problems.append(f"--lr-scale is {given.lr_scale}; it must be more than 0")
    if given.skip_sequences < 0:
        problems.append(f"--skip-sequences is {given.skip_sequences}; it must be 0 or more")


def _read_json(path: Path, what: str, problems: list[str]) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        problems.append(f"{what} {path}: {error.strerror}")
    except ValueError as error:
        problems.append(f"{what} {path} is not JSON: {error}")
    else:
        if isinstance(content, dict):
            return content
        problems.append(f"{what} {path} holds a {type(content).__name__}, not an object")
    return None


def _apply(given: argparse.Namespace, config: dict[str, Any], world_size: int, problems: list[str]) -> None:
    """The command line prevails over the file."""
    if given.optimizer is not None:
        donor = _read_json(CONFIGS / f"{given.optimizer}_zero2.json", "DeepSpeed config", problems) or {}
        config["optimizer"] = donor.get("optimizer")
    if given.zero_stage is not None:
        config.setdefault("zero_optimization", {})["stage"] = given.zero_stage
    if given.lr is not None and isinstance(config.get("optimizer"), dict):
        config["optimizer"].setdefault("params", {})["lr"] = given.lr
    if given.micro_batch is not None:
        config["train_micro_batch_size_per_gpu"] = given.micro_batch
        config.pop("train_batch_size", None)  # DeepSpeed works it out from the micro-batch
    if given.accumulation is not None:
        config["gradient_accumulation_steps"] = given.accumulation
        config.pop("train_batch_size", None)
        if given.accumulation < 1:
            problems.append(f"--accumulation is {given.accumulation}; it must be 1 or more")
    if given.batch is not None:
        _share_out(given.batch, config, world_size, problems)


def _share_out(batch: int, config: dict[str, Any], world_size: int, problems: list[str]) -> None:
    """Micro-batch and accumulation of a batch: the largest micro-batch that divides it and is no larger than asked."""
    each, left = divmod(batch, world_size)
    if each < 1 or left:
        problems.append(f"--batch is {batch}; it must be a multiple of the {world_size} ranks")
        return
    largest = config.get("train_micro_batch_size_per_gpu")
    if isinstance(largest, int) and largest >= 1:  # else reported as the micro-batch's fault
        micro_batch = max(n for n in range(1, min(each, largest) + 1) if each % n == 0)
        config["train_micro_batch_size_per_gpu"] = micro_batch
        config["gradient_accumulation_steps"] = each // micro_batch
        config.pop("train_batch_size", None)


def _check_deepspeed(config: dict[str, Any], path: Path, problems: list[str]) -> None:
    optimizer = config.get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("type"), str):
        problems.append(f'{path} names no optimizer: it needs "optimizer": {{"type": NAME, "params": {{...}}}}')
    micro_batch = config.get("train_micro_batch_size_per_gpu")
    if micro_batch is None:
        problems.append(f'{path} has no "train_micro_batch_size_per_gpu"; add it, or give --micro-batch')
    elif micro_batch != "auto" and not (isinstance(micro_batch, int) and micro_batch >= 1):
        problems.append(f"the micro-batch is {micro_batch!r}; it must be a whole number, 1 or more")
    automatic = sorted(_automatic(config))
    if automatic:
        problems.append(
            f'{path} leaves {", ".join(automatic)} to "auto", which only the Hugging Face Trainer can fill in: '
            "write the values, or take another file of configs/"
        )


def _automatic(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _automatic(value, f"{prefix}{key}.")
        elif value == "auto":
            yield prefix + key


def _check_model(model: dict[str, Any], given: argparse.Namespace, problems: list[str]) -> None:
    if "model_type" not in model:
        problems.append(f'{given.model} has no "model_type" (it should be the config.json of a transformers model)')
    longest = model.get("max_position_embeddings", model.get("n_positions"))
    if isinstance(longest, int) and given.seq_length > longest:
        problems.append(f"--seq-length is {given.seq_length}; {given.model} allows {longest}")


def _steps(given: argparse.Namespace, config: dict[str, Any] | None, world_size: int, problems: list[str]) -> int:
    steps: int = given.steps
    if given.tokens is not None and not math.isfinite(given.tokens):
        problems.append(f"--tokens is {given.tokens:g}; it must be a number of tokens")
        return 1
    if given.tokens is not None and config is not None:
        sequences = (config.get("train_micro_batch_size_per_gpu"), config.get("gradient_accumulation_steps", 1))
        if not all(isinstance(n, int) and n >= 1 for n in sequences) or given.seq_length < 1:
            return 1  # reported already
        per_step = math.prod(sequences) * world_size * given.seq_length
        steps = math.ceil(given.tokens / per_step)
    if steps < 1:
        problems.append("--steps or --tokens asks for no step at all")
    return steps
