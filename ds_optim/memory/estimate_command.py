"""The command ``ds-optim estimate``: what a training will hold, whether it fits, and what each rank will do."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_optim.json_file import read_object

if TYPE_CHECKING:
    from ds_optim.memory.estimate import Request
    from ds_optim.memory.record import Phase, Record

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def device_bytes(text: str) -> int:
    """Bytes of a device's memory: ``80GB`` is what a card sold as 80 GB has, 80 x 2**30, and so is ``80GiB``.

    Raises:
        typer.BadParameter: no such size.
    """
    number, unit = _parsed(text)
    return round(number * 2**30) if unit == "gb" else round(number * _UNITS[unit])


def size_bytes(text: str) -> int:
    """Bytes: ``1.5GB`` is 1.5e9, ``1.5GiB`` 1.5 x 2**30.

    Raises:
        typer.BadParameter: no such size.
    """
    number, unit = _parsed(text)
    return round(number * _UNITS[unit])


def _parsed(text: str) -> tuple[float, str]:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].lower() not in _UNITS:
        raise typer.BadParameter(f"{text!r} is no size: write 80GB or 79.5GiB")
    return float(found[1]), found[2].lower()


EXAMPLES = """
Examples:

ds-optim estimate --model config.json --optimizer Shampoo --stage 3 --ranks 64

ds-optim estimate --model config.json --deepspeed ds.json --ranks 8 --ranks 64 --compare adamw

ds-optim estimate --model config.json --optimizer SWAN --plain --precision pure-bf16 --ranks 1 --device-memory 24GB

ds-optim estimate --model config.json --optimizer AdamMini --stage 1 --mesh dp=8,tp=4,pp=2
"""


def estimate(
    model: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="A transformers config.json.")],
    config: Annotated[
        Path | None, typer.Option("--deepspeed", exists=True, dir_okay=False, help="A DeepSpeed JSON.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="A name of ours, with its defaults, instead of a JSON's.")
    ] = None,
    stage: Annotated[int | None, typer.Option(min=0, max=3, help="ZeRO stage; else the JSON's, else 2.")] = None,
    world_size: Annotated[
        list[int], typer.Option("--world-size", "--ranks", help="Data-parallel ranks; may be given several times.")
    ] = [8],  # noqa: B006
    mesh: Annotated[
        str | None,
        typer.Option(help="Model parallelism: dp=8,tp=4,pp=2,ep=4, in the place of --world-size; states only."),
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Sequences per rank and pass; else the JSON's, else 1.")
    ] = None,
    seq_length: Annotated[
        int | None, typer.Option(help="Tokens per sequence; else 2048, or what the model has positions for.")
    ] = None,
    accumulation: Annotated[
        int | None, typer.Option(help="Micro-batches per step; else the JSON's, else 1.", min=1)
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; else the JSON's, else bf16.")] = None,
    plain: Annotated[
        bool, typer.Option(help="Plain PyTorch or DDP instead of ZeRO; --precision may then be pure-bf16.")
    ] = False,
    checkpointing: Annotated[bool, typer.Option(help="Activations are recomputed, layer by layer.")] = False,
    device_memory: Annotated[
        str | None, typer.Option(help="Of one device: 80GB is a card sold as such, 80 x 2**30 bytes.")
    ] = None,
    reserve: Annotated[
        str, typer.Option(help="Of that, what context, communication library and fragmentation take: an assumption.")
    ] = "2GiB",
    compare: Annotated[str | None, typer.Option(help="Another optimizer to hold it against (adamw).")] = None,
    plan: Annotated[bool, typer.Option(help="Also each rank's work, state and traffic (whole-matrix rules).")] = True,
    all_ranks: Annotated[bool, typer.Option(help="Every rank's line in that, however many there are.")] = False,
    accelerator: Annotated[
        bool, typer.Option(help="Whole-matrix rules stack as many blocks as an accelerator would.")
    ] = False,
    states_only: Annotated[bool, typer.Option(help="Leave activations out.")] = False,
    output: Annotated[Path | None, typer.Option(help="A folder for predicted.json (and baseline.json).")] = None,
) -> None:
    """Predict every category of memory from a model's config, without allocating the model.

    Nothing is downloaded and no process is started: one machine can predict for 1,024 ranks.
    """
    console = Console()
    given = {"optimizer": optimizer, "micro_batch": micro_batch, "passes": accumulation, "checkpointing": checkpointing}
    given |= {"accelerator": accelerator, "states_only": states_only, **_device(device_memory, reserve)}
    try:
        ranks, meshed = _over(mesh, world_size)
        for request in _requests(model, config, ranks, seq_length, stage, precision, plain, {**given, **meshed}):
            folder = output / f"ranks_{request.world_size}" if output and len(ranks) > 1 else output
            _answer(console, request, compare, folder, plan, all_ranks)
    except ValueError as error:
        console.print(Text.assemble(("problem:", "bold red"), f" {error}"), soft_wrap=True)
        raise typer.Exit(1) from error


def _over(mesh: str | None, world_sizes: list[int]) -> tuple[list[int], dict[str, Any]]:
    """Data-parallel ranks, and fields of a request that say how each of them is cut further."""
    from ds_optim.memory.mesh import Mesh

    if mesh is None:
        return world_sizes, {}
    found = Mesh.parsed(mesh)
    return [found.dp], {"mesh": found, **({} if found.is_plain else {"states_only": True})}


def _answer(
    console: Console, request: Request, compare: str | None, folder: Path | None, plan: bool, all_ranks: bool
) -> None:
    asked = [request, replace(request, optimizer=compare)] if compare else [request]
    found = _predicted(console, asked, folder)
    if plan and request.stage is not None:
        _show_plan(console, request, all_ranks)
    if request.device_memory is not None:
        _show_fit(console, asked, found)


def _device(memory: str | None, reserve: str) -> dict[str, Any]:
    """What is known of the device, as fields of a request."""
    capacity = None if memory is None else device_bytes(memory)
    set_aside = size_bytes(reserve)
    if capacity is not None and set_aside >= capacity:
        raise typer.BadParameter(f"--reserve {reserve} leaves nothing of --device-memory {memory}")
    return {"device_memory": capacity, "reserve": set_aside if capacity else 0}


def _requests(
    model: Path,
    config: Path | None,
    world_sizes: Sequence[int],
    seq_length: int | None,
    stage: int | None,
    precision: str | None,
    plain: bool,
    given: Mapping[str, Any],
) -> Iterator[Request]:
    """One for each number of ranks: what the options say, else the JSON, else the defaults.

    Args:
        given: further fields of a request; None leaves one to the JSON.
    """
    from ds_optim.memory.estimate import positions_of, request_of

    content = read_object(config) if config else {}
    shape = read_object(model)
    if seq_length is None:  # 0 is refused later
        seq_length = min(2048, positions_of(shape) or 2048)
    for ranks in world_sizes:
        request = request_of(shape, model.stem, content, ranks, seq_length)
        changes = {name: value for name, value in given.items() if value is not None}
        changes["stage"] = None if plain else stage if stage is not None else request.stage if config else 2
        changes["precision"] = _precision(precision, plain) or (request.precision if config else "bf16")
        changes["command"] = shlex.join(["ds-optim", *sys.argv[1:]])
        yield replace(request, **changes)


def _predicted(console: Console, asked: Sequence[Request], folder: Path | None) -> list[Record]:
    """The record, and the baseline's after it if one was asked for: shown, and written where a folder was named."""
    from ds_optim.memory.estimate import predict

    records = [predict(request) for request in asked]
    _show(console, records)
    if folder is not None:
        for record, name in zip(records, ("predicted.json", "baseline.json"), strict=False):
            record.save(folder / name)
        console.print(f"written: {folder / 'predicted.json'}", highlight=False, soft_wrap=True)
    return records


def _precision(asked: str | None, plain: bool) -> str | None:
    known = ("fp32", "pure-bf16") if plain else ("fp32", "bf16", "fp16")
    if asked is not None and asked not in known:
        raise typer.BadParameter(f"--precision is {' or '.join(known)} {'with' if plain else 'without'} --plain")
    if plain:
        return (asked or "pure-bf16").replace("-", " ")
    return asked


def _show_plan(console: Console, request: Request, all_ranks: bool) -> None:
    """Who computes what, where blocks have owners."""
    from ds_optim.memory.estimate import planned

    for stage, made in enumerate(planned(request)):
        title = f"{made.owner}, ZeRO {request.stage}, {request.whole_mesh.of_stage} ranks"
        title += f", stage {stage} of {request.mesh.pp}" if request.mesh.pp > 1 else ""
        console.print(f"\n{title}", style="bold", highlight=False)
        options = made.options
        exchange = {"bucket_size": options.exchange_bucket_size, "exchange_bytes": options.exchange_dtype.itemsize}
        console.print(made.plans.listed[0].explain(**exchange, all_ranks=all_ranks), highlight=False)


def _show(console: Console, records: Sequence[Record]) -> None:
    """The record, and the baseline's beside it if there is one."""
    from ds_optim.memory.record import Category, human

    about = records[0].provenance
    console.print(
        f"{about.model}: {about.parameters:,} parameters, {about.strategy}, {about.world_size} "
        f"rank{'s'[: about.world_size > 1]}, {about.precision}, "
        f"micro-batch {about.micro_batch} x {about.seq_length} tokens"
        + (", checkpointing" if about.checkpointing else ""),
        style="bold",
        highlight=False,
    )
    table = Table(title="Predicted bytes on the fullest rank", title_justify="left")
    table.add_column("")
    for one in records:
        table.add_column(one.provenance.optimizer.removeprefix("ds_optim."), justify="right")
    if len(records) == 2:
        table.add_column("saved", justify="right")

    def row(label: str, values: list[int], *, section: bool = False) -> None:
        cells = [human(value) for value in values]
        if len(values) == 2:
            cells.append(f"{100 * (1 - values[0] / values[1]):.1f} %" if values[1] else "-")
        table.add_row(label, *cells, end_section=section)

    fullest = [one.fullest for one in records]
    for category in (Category.PARAMETERS, Category.MASTER, Category.GRADIENTS, Category.OPTIMIZER):
        values = [rank.model_states[category] for rank in fullest]
        if any(values):
            row(category.value, values, section=category is Category.OPTIMIZER)
    row("all model states", [sum(rank.model_states.values()) for rank in fullest], section=True)
    phases: tuple[Phase, ...] = ("forward", "backward", "step")
    for phase in phases:
        peaks = [peak for rank in fullest if (peak := rank.peak_of(phase))]
        if len(peaks) == len(records):
            row(f"peak of {phase}", [peak.on_device for peak in peaks])
    kept = [moment for rank in fullest if (moment := rank.moment("after forward"))]
    if len(kept) == len(records):
        row("activations kept", [moment.bytes_of(Category.ACTIVATIONS) for moment in kept])
    console.print(table)
    if any(moment.on_host for rank in fullest for moment in rank.moments):
        console.print("Peaks are the device's; optimizer state, master and gradients are in host memory.")


def _show_fit(console: Console, requests: list[Request], records: list[Record]) -> None:
    from ds_optim.memory.estimate import highest, largest_micro_batch
    from ds_optim.memory.record import human

    assert requests[0].device_memory is not None
    capacity = requests[0].device_memory - requests[0].reserve
    console.print(
        f"A rank has {human(capacity)}: {human(requests[0].device_memory)}, {human(requests[0].reserve)} set aside.",
        highlight=False,
    )
    for request, record in zip(requests, records, strict=True):
        name = record.provenance.optimizer.removeprefix("ds_optim.")
        peak = highest(record)
        verdict = "fits" if peak <= capacity else "does NOT fit"
        line = f"{name}: highest peak {human(peak)}: {verdict} at micro-batch {request.micro_batch}"
        if not request.states_only:
            plain, recomputed = (largest_micro_batch(replace(request, checkpointing=on)) for on in (False, True))
            line += f"; largest micro-batch {plain or 'none'}, with checkpointing {recomputed or 'none'}"
        console.print(line, highlight=False)
