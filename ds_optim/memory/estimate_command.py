"""The command ``ds-optim estimate``: what a training will hold, whether it fits, and what each rank will do."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

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
    micro_batch: Annotated[
        int | None, typer.Option(help="Sequences per rank and pass; else the JSON's, else 1.")
    ] = None,
    seq_length: Annotated[
        int | None, typer.Option(help="Tokens per sequence; else 2048, or what the model has positions for.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16; else the JSON's, else bf16.")] = None,
    checkpointing: Annotated[bool, typer.Option(help="Activations are recomputed, layer by layer.")] = False,
    device_memory: Annotated[
        str | None, typer.Option(help="Of one device: 80GB is a card sold as such, 80 x 2**30 bytes.")
    ] = None,
    reserve: Annotated[
        str, typer.Option(help="Of that, what context, communication library and fragmentation take: an assumption.")
    ] = "2GiB",
    compare: Annotated[str | None, typer.Option(help="Another optimizer to hold it against (adamw).")] = None,
    plan: Annotated[bool, typer.Option(help="Also what each rank computes, keeps and sends (Shampoo, SWAN).")] = True,
    all_ranks: Annotated[bool, typer.Option(help="Every rank's line in that, however many there are.")] = False,
    states_only: Annotated[bool, typer.Option(help="Leave activations out.")] = False,
    output: Annotated[Path | None, typer.Option(help="A folder for predicted.json (and baseline.json).")] = None,
) -> None:
    """Predict every category of memory from a model's config, without allocating the model.

    Nothing is downloaded and no process is started: one machine can predict for 1,024 ranks.
    """
    from ds_optim.estimate import plans
    from ds_optim.memory.estimate import Request, micro_batch_of, precision_of, predict, stage_of
    from ds_optim.optimizers.whole_matrix import WholeMatrixOptimizer

    console = Console()
    capacity = None
    if device_memory is not None:
        capacity = device_bytes(device_memory) - size_bytes(reserve)
    try:
        content = _json(config) if config else {}
        chosen = stage if stage is not None else stage_of(content) if config else 2
        found = precision or (precision_of(content) if config else "bf16")
        if found not in ("fp32", "bf16"):
            raise typer.BadParameter(f"--precision is fp32 or bf16, not {found!r}")
        if micro_batch is None:
            micro_batch = micro_batch_of(content)
        shape = _json(model)
        positions = shape.get("max_position_embeddings") or shape.get("n_positions") or 2048
        for ranks in world_size:
            request = Request(
                model=shape,
                model_name=model.stem,
                optimizer=optimizer,
                stage=chosen,
                world_size=ranks,
                precision=found,  # type: ignore[arg-type]
                micro_batch=micro_batch,
                seq_length=seq_length or min(2048, int(positions)),
                checkpointing=checkpointing,
                deepspeed=content,
                device_memory=capacity,
                states_only=states_only,
                command=shlex.join(["ds-optim", *sys.argv[1:]]),
            )
            baseline = replace(request, optimizer=compare) if compare else None
            record = predict(request)
            beside = predict(baseline) if baseline else None
            _show(console, request, record, baseline, beside)
            if output is not None:
                record.save(output / "predicted.json")
                console.print(f"written: {output / 'predicted.json'}", highlight=False, soft_wrap=True)
                if beside is not None:
                    beside.save(output / "baseline.json")
            cls = record.provenance.optimizer.removeprefix("ds_optim.")
            is_matrix = any(cls == sub.__name__ for sub in WholeMatrixOptimizer.__subclasses__())
            if plan and is_matrix:
                for made, exchange, title in plans(request.model, content, optimizer, chosen, [ranks]):
                    console.print(f"\n{title}", style="bold", highlight=False)
                    console.print(made.explain(**exchange, all_ranks=all_ranks), highlight=False)
    except ValueError as error:
        console.print(f"[bold red]problem:[/] {error}", highlight=False)
        raise typer.Exit(1) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not an object")
    return content


def _show(console: Console, request: Request, record: Record, baseline: Request | None, beside: Record | None) -> None:
    from ds_optim.memory.record import Category

    about = record.provenance
    console.print(
        f"{about.model}: {about.parameters:,} parameters, {about.strategy}, {about.world_size} ranks, "
        f"{about.precision}, micro-batch {about.micro_batch} x {about.seq_length} tokens"
        + (", checkpointing" if about.checkpointing else ""),
        style="bold",
        highlight=False,
    )
    table = Table(title="Predicted bytes on the fullest rank", title_justify="left")
    table.add_column("")
    shown = [record, *([beside] if beside else [])]
    for one in shown:
        table.add_column(one.provenance.optimizer.removeprefix("ds_optim."), justify="right")
    if beside:
        table.add_column("saved", justify="right")

    def row(label: str, values: list[int], *, section: bool = False) -> None:
        cells = [_size(value) for value in values]
        if len(values) == 2:
            cells.append(f"{100 * (1 - values[0] / values[1]):.1f} %" if values[1] else "-")
        table.add_row(label, *cells, end_section=section)

    fullest = [one.fullest for one in shown]
    for category in (Category.PARAMETERS, Category.MASTER, Category.GRADIENTS, Category.OPTIMIZER):
        values = [rank.model_states[category] for rank in fullest]
        if any(values):
            row(category.value, values, section=category is Category.OPTIMIZER)
    row("all model states", [sum(rank.model_states.values()) for rank in fullest], section=True)
    phases: tuple[Phase, ...] = ("forward", "backward", "step")
    for phase in phases:
        peaks = [peak for rank in fullest if (peak := rank.peak_of(phase))]
        if len(peaks) == len(shown):
            row(f"peak of {phase}", [peak.on_device for peak in peaks])
    kept = [moment for rank in fullest if (moment := rank.moment("after forward"))]
    if len(kept) == len(shown):
        row("activations kept", [moment.bytes_of(Category.ACTIVATIONS) for moment in kept])
    console.print(table)
    if any(moment.on_host for rank in fullest for moment in rank.moments):
        console.print("Peaks are the device's; optimizer state, master and gradients are in host memory.")
    if request.device_memory is not None:
        _show_fit(console, [request, *([baseline] if baseline else [])], shown)


def _show_fit(console: Console, requests: list[Request], records: list[Record]) -> None:
    from ds_optim.memory.estimate import highest, largest_micro_batch
    from ds_optim.memory.record import human

    capacity = requests[0].device_memory
    assert capacity is not None
    console.print(f"A rank has {human(capacity)}, the reserve taken off.", highlight=False)
    for request, record in zip(requests, records, strict=True):
        name = record.provenance.optimizer.removeprefix("ds_optim.")
        peak = highest(record)
        verdict = "fits" if peak <= capacity else "does NOT fit"
        line = f"{name}: highest peak {human(peak)}: {verdict} at micro-batch {request.micro_batch}"
        if not request.states_only:
            plain, recomputed = (largest_micro_batch(replace(request, checkpointing=on)) for on in (False, True))
            line += f"; largest micro-batch {plain or 'none'}, with checkpointing {recomputed or 'none'}"
        console.print(line, highlight=False)


def _size(count: int) -> str:
    unit, size, binary = ("GB", 1e9, 2**30) if count >= 1e9 else ("MB", 1e6, 2**20)
    return f"{count / size:.2f} {unit} ({count / binary:.2f} {unit[0]}iB)"
