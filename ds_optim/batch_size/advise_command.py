"""The command ``ds-optim batch-size advise``: what a noise scale says about a batch size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ds_optim.batch_size.advice import Estimate, Shares, estimate_of, in_words, sharing_words
from ds_optim.json_file import read_object


def advise(
    run: Annotated[
        Path | None,
        typer.Option("--from", exists=True, help="A run's summary.json, or its --output directory."),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences per step; else the run's.")] = None,
    noise_scale: Annotated[float | None, typer.Option(help="In sequences; else the run's.")] = None,
    interval: Annotated[str | None, typer.Option(help="Of the noise scale: LOW,HIGH.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Sequences per rank and pass; else the run's.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Data-parallel ranks; else the run's.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A transformers config.json: says how much fits."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--deepspeed", exists=True, dir_okay=False, help="The DeepSpeed JSON.")
    ] = None,
    device_memory: Annotated[str | None, typer.Option(help="Of one device: 80GB, as for `ds-optim estimate`.")] = None,
    reserve: Annotated[str, typer.Option(help="Of that, set aside, as for `ds-optim estimate`.")] = "2GiB",
    seq_length: Annotated[int | None, typer.Option(min=1, help="Tokens per sequence; else the run's.")] = None,
    checkpointing: Annotated[bool, typer.Option(help="Activations are recomputed.")] = False,
) -> None:
    """Say where a batch stands against a noise scale, and what doubling or halving it would cost and save.

    With --model, --deepspeed and --device-memory also how micro-batch, accumulation and ranks should change.
    """
    console = Console(highlight=False)
    try:
        said = _summary(run)
        estimate = _estimate(said, noise_scale, interval)
        batch = batch or said.get("batch")
        if batch is None:
            raise ValueError("how large is the batch? Give --batch, or --from a run")
        words = in_words(int(batch), estimate)
        if model is not None:
            asked = {
                "--ranks": ranks or said.get("ranks"),
                "--micro-batch": micro_batch or said.get("micro_batch"),
                "--seq-length": seq_length or said.get("seq_length"),
                "--deepspeed": config,
                "--device-memory": device_memory,
            }
            words += _sharing(batch, estimate, model, asked, reserve, checkpointing)
        elif config is not None or device_memory is not None:
            raise ValueError("--deepspeed and --device-memory need --model too")
    except (ValueError, OSError) as error:
        console.print(Text.assemble(("problem:", "bold red"), f" {error}"), soft_wrap=True)
        raise typer.Exit(1) from error
    for line in words:
        console.print(line, markup=False, soft_wrap=True)


def _sharing(
    batch: int, estimate: Estimate, model: Path, asked: Mapping[str, Any], reserve: str, checkpointing: bool
) -> list[str]:
    """How micro-batch, accumulation and ranks should change.

    Args:
        asked: options that this needs, by name; None where one was not given.

    Raises:
        ValueError: one is missing, or the batch cannot be shared out so.
    """
    missing = [option for option, value in asked.items() if value is None]
    if missing:
        raise ValueError(f"with --model, {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed too")
    ranks, micro_batch, seq_length, config, device_memory = asked.values()
    if batch % (micro_batch * ranks):
        raise ValueError(f"a batch of {batch} is no multiple of {micro_batch} x {ranks} ranks")
    now = Shares(micro_batch, batch // (micro_batch * ranks), ranks)
    sizes = (ranks, 2 * ranks) if batch < estimate.sequences else (ranks, ranks // 2)
    fits = [
        (one, _largest(model, config, one, seq_length, device_memory, reserve, checkpointing)) for one in sizes if one
    ]
    return sharing_words(now, fits, estimate)


def _summary(run: Path | None) -> Mapping[str, Any]:
    if run is None:
        return {}
    return read_object(run / "summary.json" if run.is_dir() else run)


def _estimate(summary: Mapping[str, Any], noise_scale: float | None, interval: str | None) -> Estimate:
    if noise_scale is None:
        if interval is not None:
            raise ValueError("--interval needs --noise-scale")
        if not summary:
            raise ValueError("give --noise-scale, or --from a run that had --noise-scale")
        found, why = estimate_of(summary.get("noise_scale") or {})
        if found is None:
            raise ValueError(f"the run has no noise scale: {why}")
        return found
    if interval is None:
        return Estimate(noise_scale, noise_scale, noise_scale)
    try:
        low, high = map(float, interval.split(","))
    except ValueError as error:
        raise ValueError(f"--interval is {interval!r}: give LOW,HIGH") from error
    return Estimate(noise_scale, low, high)


def _largest(
    model: Path, config: Path, ranks: int, seq_length: int, device_memory: str, reserve: str, checkpointing: bool
) -> int:
    """The largest micro-batch, as ``ds-optim estimate`` predicts it."""
    from ds_optim.memory.estimate import largest_micro_batch, request_of
    from ds_optim.memory.estimate_command import device_bytes, size_bytes

    request = request_of(read_object(model), model.stem, read_object(config), ranks, seq_length)
    return largest_micro_batch(
        replace(
            request,
            device_memory=device_bytes(device_memory),
            reserve=size_bytes(reserve),
            checkpointing=checkpointing,
        )
    )
