"""Train a causal language model from scratch under DeepSpeed: the main job.

    deepspeed --num_gpus 2 launcher/train.py --optimizer adam_mini

Which optimizer runs is said by the DeepSpeed JSON alone. This file is an ordinary DeepSpeed script: it builds a model,
calls ``deepspeed.initialize`` with a config, and goes forward, backward, step. At the end it says how the held-out loss
moved, what share of the step the optimizer took, and how many bytes of optimizer state each rank holds.

`settings` reads the command line, `corpus` the text, `progress` shows what happens, `checkpoints` saves and resumes,
`builds` looks after DeepSpeed's operators, `state_table` counts the bytes of state; if asked to, `memory_report`
measures all memory of one step, and `noise_watch` the gradient noise scale.
"""

import contextlib
import datetime
import functools
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# DeepSpeed builds a small extension at the first start and looks for `ninja` on the PATH; it lies beside the
# interpreter, which is not on the PATH where the environment was not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

import builds
import checkpoints
import corpus
import deepspeed
import settings
import torch
import torch.distributed as dist
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfigError
from memory_report import MemoryReport
from noise_watch import NoiseWatch
from progress import OptimizerClock, Progress
from state_table import ModelStates, StateMeter, figures, table
from torch.nn.functional import cross_entropy


def main(arguments: Sequence[str] | None = None) -> int:
    # DeepSpeed 0.19 calls a collective by the name that torch 2.13 has just deprecated; it warns on every rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    status = 0
    try:
        _say_on_every_host(builds.judge())
        run(settings.read(arguments, world_size=int(os.environ.get("WORLD_SIZE", "1"))))
    except builds.StaleLockError as error:
        _say_on_every_host([f"cannot start {error}"])
        status = 2
    except (settings.SettingsError, corpus.TextError) as error:
        # The same on every rank; one of them says it.
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"train.py cannot start:\n{error}", file=sys.stderr, flush=True)
        status = 2
    except checkpoints.SaveError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"train.py stopped: {error}", file=sys.stderr, flush=True)
        status = 1
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


def _say_on_every_host(lines: Sequence[str]) -> None:
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        for line in lines:
            print(f"train.py: {line}", file=sys.stderr, flush=True)


def run(chosen: settings.Settings) -> None:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    _check_optimizer_is_known(chosen)
    get_accelerator().set_device(local_rank)
    deepspeed.init_distributed()
    text = shared_text(chosen, local_rank)

    torch.manual_seed(chosen.seed)
    about = chosen.model, chosen.model_path.stem, chosen.deepspeed, chosen.seq_length
    with contextlib.ExitStack() as ending, MemoryReport(chosen.memory_report, *about) as memory:
        engine, model = _engine(chosen)
        ending.callback(engine.destroy)
        # From here on; hosts may start at very different times. DeepSpeed has a group of its own for gradients.
        for group in (dist.group.WORLD, engine.data_parallel_group):
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=chosen.timeout), group)
        checkpoints.check(engine, chosen)
        memory.watch(engine)
        _train(chosen, engine, model, text, memory)
    page = memory.page()
    if page is not None:
        print(f"\nmemory report: {page.resolve()}", flush=True)


def _train(
    chosen: settings.Settings, engine: Any, model: torch.nn.Module, text: corpus.Corpus, memory: MemoryReport
) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    optimizer = engine.basic_optimizer
    batch = chosen.micro_batch * chosen.accumulation * ranks
    plan = {option: getattr(chosen, option) for option in ("steps", "seed", "seq_length")}
    plan["text"] = text.directory.name  # made of the text itself
    start = checkpoints.Start()
    if chosen.branch:
        start = checkpoints.branch(engine, chosen, plan, batch)
        chosen = replace(chosen, steps=start.steps + chosen.steps)
    elif chosen.resume or chosen.autoresume:
        start = checkpoints.resume(engine, chosen, plan, batch)
    first = start.steps
    if first >= chosen.steps:  # a restarted run that had reached its end
        if rank == 0:
            print(f"nothing to do: {start.origin}", flush=True)
        return

    def state_after(step: int) -> dict[str, Any]:
        return {**plan, "batch": batch, "sequences": batches.taken(step), **noise.state()}

    clock = OptimizerClock(optimizer, get_accelerator().synchronize)
    meter = StateMeter(model, optimizer)
    windows = corpus.Windows(text.train, chosen.seq_length, chosen.seed)
    batches = Batches(windows, chosen, rank, ranks, engine.device, start)
    evaluation = HeldOut(corpus.Windows(text.held_out, chosen.seq_length, 0), chosen, rank, ranks, engine.device)
    noise = NoiseWatch(engine, chosen, start.noise_scale)

    with Progress(rank == 0, first, chosen.steps, chosen.log_every, chosen.output) as progress:
        progress.say(_opening(chosen, model, text, batches, engine, start))
        before = evaluation.loss(engine)
        progress.held_out(first, before)
        shares: list[float] = []
        for step in range(first, chosen.steps):
            started = time.perf_counter()
            lr = engine.get_lr()[0]
            losses = []
            for ids in batches.of_step(step):
                loss = engine(input_ids=ids, labels=ids).loss
                engine.backward(loss)
                engine.step()
                losses.append(loss.detach().float())
            mean = _mean_over_ranks(torch.stack(losses).mean())
            seconds, in_optimizer = time.perf_counter() - started, clock.take()
            norm = engine.get_global_grad_norm()
            if step == first:
                meter.step_done()
            else:
                shares.append(in_optimizer / seconds)  # the first step also builds kernels
            progress.step(
                step + 1,
                mean,
                lr,
                math.nan if norm is None else float(norm),
                batches.tokens_per_step,
                seconds,
                in_optimizer,
            )
            memory.step_done()
            done = step + 1
            noise.step_done(progress, done)
            if chosen.eval_every and done % chosen.eval_every == 0 and done < chosen.steps:
                progress.held_out(done, evaluation.loss(engine))
            if chosen.save_every and done % chosen.save_every == 0 and done < chosen.steps:
                checkpoints.save(engine, chosen, done, state_after(done))
        after = evaluation.losses(engine)
        progress.held_out(chosen.steps, after.mean().item())
        if chosen.save:
            checkpoints.save(engine, chosen, chosen.steps, state_after(chosen.steps))
    _close(progress, chosen, meter, before, after, shares, chosen.steps - first, noise)


# ----------------------------------------------------------------------------------------------------------- the parts


def _engine(chosen: settings.Settings) -> tuple[Any, torch.nn.Module]:
    """The DeepSpeed engine, and the model inside it.

    Raises:
        SettingsError: transformers cannot read the model config, or the optimizer or DeepSpeed refuses its own.
    """
    try:
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**chosen.model))
    except (ValueError, TypeError, KeyError) as error:
        raise settings.SettingsError([f"model config {chosen.model_path}: {error}"]) from error
    scheduler = None
    if "scheduler" not in chosen.deepspeed:
        shape = functools.partial(learning_rate_share, steps=chosen.steps, warmup=round(chosen.warmup * chosen.steps))
        scheduler = functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=shape)
    try:
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=chosen.deepspeed, lr_scheduler=scheduler
        )
    except (ValueError, TypeError, DeepSpeedConfigError) as error:
        raise settings.SettingsError([f"DeepSpeed config {chosen.deepspeed_path}: {error}"]) from error
    return engine, model


def learning_rate_share(step: int, steps: int, warmup: int, end: float = 0.1) -> float:
    """Share of the peak learning rate at ``step`` (from 0): linear warm-up, then a cosine down to ``end``."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * done))


def _check_optimizer_is_known(chosen: settings.Settings) -> None:
    """A clear error instead of an AttributeError inside DeepSpeed. Lower-case names are DeepSpeed's own."""
    name = chosen.optimizer_name
    if name.lower() not in DEEPSPEED_OPTIMIZERS and not hasattr(torch.optim, name):
        raise settings.SettingsError(
            [
                f"the optimizer {name!r} is known neither to DeepSpeed nor to torch.optim. Is its package installed "
                f"for {sys.executable}? (bash launcher/quickstart.sh installs this repository; "
                "TORCH_DEVICE_BACKEND_AUTOLOAD=0 in the environment keeps it from registering)"
            ]
        )


def shared_text(chosen: settings.Settings, local_rank: int) -> corpus.Corpus:
    """The encoded text. One rank per machine makes it; the others wait, and learn if that failed.

    Raises:
        TextError: on every rank alike.
    """
    made: dict[str, str] = {}
    if local_rank == 0:
        try:
            say = functools.partial(print, flush=True) if dist.get_rank() == 0 else lambda _: None
            directory = corpus.prepare(chosen.text, int(chosen.model["vocab_size"]), chosen.cache, say)
            made = {"directory": str(directory), "fingerprint": corpus.fingerprint(directory)}
        except Exception as error:  # whatever it was: the other ranks are waiting and must hear of it
            made = {"error": f"  - {type(error).__name__}: {error}"}
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, made)
    errors = [other["error"] for other in everyone if "error" in other]
    if errors:
        raise corpus.TextError("\n".join(errors))
    if len({other["fingerprint"] for other in everyone if other}) > 1:
        raise corpus.TextError(
            "  - the machines of this job hold different text (different Python versions, perhaps): "
            "give the same files to all of them with --text"
        )
    text = corpus.load(Path(everyone[dist.get_rank() - local_rank]["directory"]))
    for tokens, part in ((text.train, "the text"), (text.held_out, "the held-out part of the text")):
        needed = chosen.seq_length * dist.get_world_size()
        if len(tokens) < needed:
            raise corpus.TextError(f"  - {part} has {len(tokens)} tokens; {needed} are needed: give more --text")
    return text


@dataclass(frozen=True, slots=True)
class Batches:
    """This rank's share of every global batch. The text goes on where a resumed run left it, whatever its batch was."""

    windows: corpus.Windows
    chosen: settings.Settings
    rank: int
    ranks: int
    device: torch.device | str
    start: checkpoints.Start = checkpoints.Start()  # noqa: RUF009 (frozen)

    @property
    def sequences_per_step(self) -> int:
        return self.chosen.micro_batch * self.chosen.accumulation * self.ranks

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.chosen.seq_length

    def taken(self, steps: int) -> int:
        """Sequences of the text that the run's first ``steps`` steps took, all ranks together."""
        return self.start.sequences + (steps - self.start.steps) * self.sequences_per_step

    def of_step(self, step: int) -> Iterator[torch.Tensor]:
        """Token ids (micro_batch, seq_length), int64, one per accumulation step; ranks never share a sequence."""
        ids = torch.from_numpy(self.windows.sequences(self.taken(step), self.sequences_per_step))
        own = ids.view(self.chosen.accumulation, self.ranks, self.chosen.micro_batch, -1)[:, self.rank]
        return (micro.to(self.device) for micro in own)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Loss of a fixed set of held-out sequences, shared out over the ranks."""

    windows: corpus.Windows
    chosen: settings.Settings
    rank: int
    ranks: int
    device: torch.device | str

    def loss(self, engine: Any) -> float:
        """The mean over the sequences."""
        return self.losses(engine).mean().item()

    @torch.no_grad()
    def losses(self, engine: Any) -> torch.Tensor:
        """Of each sequence, float32 on every rank: which they are and their order do not follow from the batch."""
        # The same number on every rank: under ZeRO-3 each forward pass is a collective call.
        each = max(1, min(self.chosen.eval_sequences, len(self.windows)) // self.ranks)
        own = torch.from_numpy(self.windows.global_batch(0, each * self.ranks))[self.rank :: self.ranks]
        engine.eval()
        found = []
        for ids in own.to(self.device).split(self.chosen.micro_batch):
            logits = engine(input_ids=ids).logits[:, :-1].float()
            tokens = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            found.append(tokens.view(len(ids), -1).mean(dim=1))
        engine.train()
        mine = torch.cat(found)
        everyones = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(everyones, mine)
        return torch.stack(everyones, dim=1).flatten()


def _mean_over_ranks(value: torch.Tensor) -> float:
    value = value.clone()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


# -------------------------------------------------------------------------------------------------- opening and ending


def _opening(
    chosen: settings.Settings,
    model: torch.nn.Module,
    text: corpus.Corpus,
    batches: Batches,
    engine: Any,
    start: checkpoints.Start,
) -> str:
    # Under ZeRO-3 the parameters are empty by now; DeepSpeed keeps their sizes beside them.
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    return (
        f"model      {chosen.model_path.name}: {parameters:,} parameters\n"
        f"optimizer  {chosen.optimizer_name} ({type(engine.basic_optimizer).__module__}), "
        f"ZeRO-{chosen.zero_stage}, {batches.ranks} ranks, {engine.device}\n"
        f"text       {text.about}\n"
        f"run        {chosen.steps} steps of {batches.tokens_per_step:,} tokens"
        + (f"\nresumed    {start.origin}" if start.origin else "")
    )


def _close(
    progress: Progress,
    chosen: settings.Settings,
    meter: StateMeter,
    before: float,
    after_each: torch.Tensor,
    shares: list[float],
    steps: int,
    noise: NoiseWatch,
) -> None:
    """The last lines: loss, the optimizer's share, and the table."""
    after, ranks = after_each.mean().item(), dist.get_world_size()
    everyone: list[ModelStates | None] = [None] * ranks
    dist.all_gather_object(everyone, meter.read())
    states = [each for each in everyone if each is not None]
    share = statistics.median(shares) if shares else math.nan
    # torch's exp says inf where math's raises: a run that diverged still ends with its summary.
    perplexity = torch.tensor([before, after], dtype=torch.float64).exp().tolist()
    progress.say(
        f"\nheld-out loss {before:.4f} -> {after:.4f} (perplexity {perplexity[0]:,.0f} -> {perplexity[1]:,.1f})"
    )
    progress.say(f"optimizer step: {100 * share:.2f} % of the training step (median, without the first step)\n")
    progress.console.print(table(chosen.optimizer_name, states))
    progress.summary(
        {
            "optimizer": chosen.deepspeed["optimizer"],
            "held_out_loss_before": before,
            "held_out_loss_after": after,
            "held_out_losses_after": after_each.tolist(),
            "steps": steps,
            "batch": chosen.micro_batch * chosen.accumulation * ranks,
            "micro_batch": chosen.micro_batch,
            "accumulation": chosen.accumulation,
            "ranks": ranks,
            "seq_length": chosen.seq_length,
            "optimizer_share": share,
            "bytes_per_rank": figures(states),
            **noise.summary(),
        }
    )


if __name__ == "__main__":
    sys.exit(main())
