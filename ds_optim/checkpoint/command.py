"""The commands ``ds-optim checkpoint convert | inspect | verify``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from ds_optim.json_file import read_object

checkpoint_app = typer.Typer(
    no_args_is_help=True, help="Canonical checkpoints: made from DeepSpeed's, listed, checked."
)

_Directory = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="Of the checkpoints, or one checkpoint's folder.")
]
_Tag = Annotated[str | None, typer.Option(help="Which checkpoint; else the one that `latest` names.")]


@checkpoint_app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", exists=True, file_okay=False, help="What DeepSpeed's save_checkpoint wrote."),
    ],
    directory: Annotated[
        Path, typer.Argument(metavar="OUT", file_okay=False, help="Of canonical checkpoints; made if missing.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="The transformers config.json: all but AdamW, Lion and Adan; int8; ZeRO-0.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--deepspeed", exists=True, dir_okay=False, help="The DeepSpeed JSON; else what was saved of it."),
    ] = None,
    tag: _Tag = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Also read objects of unknown classes, which may run code.")
    ] = False,
    state_dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or int8: IN is canonical, its state gets this precision.")
    ] = None,
    int8_embeddings: Annotated[bool, typer.Option("--int8-embeddings", help="With int8: embeddings too.")] = False,
) -> None:
    """Turn a checkpoint directory that DeepSpeed wrote with one of our optimizers into the canonical form.

    With --state-dtype: a canonical one into one with state in another precision, which needs --model. One process, no
    engine, no accelerator. Exit status 1, and nothing is written, if it cannot be done.
    """
    from ds_optim.blueprint import meta_model
    from ds_optim.checkpoint.convert import convert as convert_files

    try:
        network = meta_model(read_object(model)) if model else None
        settings = read_object(config) if config else None
        if state_dtype is None and not int8_embeddings:
            made = convert_files(source, directory, model=network, deepspeed_config=settings, tag=tag, trust=trust)
        else:
            made = _restated(_folder(source, tag), directory, network, settings or {}, state_dtype, int8_embeddings)
    except (RuntimeError, ValueError) as error:  # a CheckpointError; a config or roles that are refused
        _stop(error)
    _say(f"written: {made}")


def _restated(
    folder: Path, directory: Path, model: Any, config: Mapping[str, Any], state_dtype: str | None, embeddings: bool
) -> Path:
    """The checkpoint with state of another precision."""
    from ds_optim.checkpoint.restate import restate
    from ds_optim.deepspeed.configuration import DsOptimObject
    from ds_optim.errors import CheckpointError

    if state_dtype is None:
        raise CheckpointError("--int8-embeddings is of state in eight bits: give --state-dtype int8 too")
    if model is None:
        raise CheckpointError("what is kept in which precision depends on what each parameter is: give --model")
    return restate(
        folder.parent,
        directory,
        model=model,
        state_dtype=state_dtype,
        int8_embeddings=embeddings,
        roles=DsOptimObject.of(config).all_options(config).get("roles"),
        tag=folder.name,
    )


@checkpoint_app.command("inspect")
def inspect_checkpoint(
    directory: _Directory,
    tag: _Tag = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """List what a canonical checkpoint holds: optimizer, steps, parameters with shapes, dtypes, state and bytes.

    Its tensors are not read; `verify` checks them. Of one of DeepSpeed's own it says whose it is, what it can be used
    for, and what DeepSpeed's conversion to a universal checkpoint would make of it (exit status 1).
    """
    try:
        folder = _folder(directory, tag, about_deepspeeds=_about_deepspeeds)
        found = _contents(folder)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        _stop(error)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(found)


@checkpoint_app.command()
def verify(directory: _Directory, tag: _Tag = None) -> None:
    """Check every file of a canonical checkpoint against its checksum. Exit status 1 if it is not whole."""
    from ds_optim.checkpoint.directory import MANIFEST, damages

    try:
        folder = _folder(directory, tag)
        problems = damages(folder)
    except (RuntimeError, OSError) as error:
        _stop(error)
    if problems:
        _stop(RuntimeError(f"{folder} is damaged:\n- " + "\n- ".join(problems)))
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    _say(f"{folder} is whole: {len(files)} files, {sum(one['bytes'] for one in files.values()):,} bytes")


def _folder(directory: Path, tag: str | None, about_deepspeeds: Callable[[Path], str] = lambda _: "") -> Path:
    """The folder of the checkpoint that was asked for: by tag, by ``latest``, or the one that was given itself."""
    from ds_optim.checkpoint.directory import MANIFEST, folder_of
    from ds_optim.errors import CheckpointError
    from ds_optim.latest import newest

    tag = newest(directory) if tag is None else tag
    folder = folder_of(directory, tag) if tag else directory
    if not (folder / MANIFEST).exists() and any(folder.glob("*_model_states.pt")):
        raise CheckpointError(
            f"{folder} is DeepSpeed's own checkpoint{about_deepspeeds(folder)}: make it canonical with "
            "ds-optim checkpoint convert"
        )
    return folder


def _about_deepspeeds(folder: Path) -> str:
    """Whose it is and what it is good for; empty if that cannot be read, which ``convert`` explains."""
    from ds_optim.deepspeed.checkpoint_files import DeepSpeedFiles, universal_conversion
    from ds_optim.deepspeed.names import may_be_ours
    from ds_optim.errors import CheckpointError

    try:
        files = DeepSpeedFiles(folder, None, verify=False)
        universal = universal_conversion(files)
    except (CheckpointError, KeyError, ValueError):
        return ""
    ranks = f"{files.world_size} rank{'s' * (files.world_size > 1)}"
    whose = files.optimizer_name or "an optimizer that it does not name"
    goes_anywhere = may_be_ours(files.optimizer_name)
    where = "any ranks and at any ZeRO stage" if goes_anywhere else "the same ranks and at the same stage only"
    return (
        f", of {whose} at ZeRO stage {files.stage} on {ranks}. engine.load_checkpoint goes on from it with the same "
        f"optimizer on {where}{f'; {universal}' if universal else ''}. For anything else"
    )


def _contents(folder: Path) -> dict[str, Any]:
    """What ``about.json`` says, with the bytes of the tensors and files beside it."""
    from ds_optim.checkpoint import ranges
    from ds_optim.checkpoint.directory import ABOUT, MANIFEST, read_about
    from ds_optim.errors import CheckpointError

    if not (folder / ABOUT).is_file():
        raise CheckpointError(f"there is no {ABOUT} in {folder}: no canonical checkpoint, or damaged (see verify)")
    about = read_about(folder)
    stored = {name: numel * dtype.itemsize for name, (numel, dtype) in ranges.lengths(folder).items()}
    totals = {"weights": 0, "state": 0, "module": 0}
    for name, entry in about["parameters"].items():
        weight = stored.get(f"weights.{name}", 0)
        state = sum(stored.get(f"state.{name}.{key}", 0) for key in entry["state"])
        entry["bytes"] = {"weights": weight, "state": state}
        totals["weights"] += weight
        totals["state"] += state
    for name, entry in about["module"].items():
        entry["bytes"] = stored.get(f"module.{name}", 0)
        totals["module"] += entry["bytes"]
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return {"folder": str(folder), **about, "bytes": {**totals, "files": sum(one["bytes"] for one in files.values())}}


def _show(found: dict[str, Any]) -> None:
    parameters, size = found["parameters"], found["bytes"]
    settings = ", ".join(f"{key} {value}" for key, value in found["structure"].items())
    _say(f"{found['folder']}, saved {found['saved']} by {found['world_size']} ranks")
    _say(f"optimizer: {found['optimizer'] or 'none, weights alone'}" + (f" ({settings})" if settings else ""))
    if found["engine"]:
        _say("engine: " + ", ".join(f"{key} {value}" for key, value in found["engine"].items()))
    table = Table()
    for heading, right in (("parameter", False), ("shape", False), ("dtype", False), ("step", True), ("state", False)):
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    table.add_column("bytes", justify="right")
    for name, entry in parameters.items():
        state = ", ".join(f"{key} {one['dtype']} x {one['numel']:,}" for key, one in entry["state"].items())
        step = "-" if entry["step"] is None else str(entry["step"])
        shape = "x".join(map(str, entry["shape"])) or "scalar"
        table.add_row(name, shape, entry["dtype"], step, state or "-", f"{sum(entry['bytes'].values()):,}")
    for name, entry in found["module"].items():
        shape = "x".join(map(str, entry["shape"])) or "scalar"
        table.add_row(name, shape, entry["dtype"], "-", "not trained", f"{entry['bytes']:,}")
    Console().print(table)
    elements = sum(math.prod(entry["shape"]) for entry in parameters.values())
    _say(
        f"{elements:,} trained parameters: weights {size['weights']:,} bytes, state {size['state']:,}; "
        f"not trained {size['module']:,}; files {size['files']:,}"
    )


def _say(text: str) -> None:
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


def _stop(error: BaseException) -> NoReturn:
    Console().print("[bold red]problem:[/]", end=" ")
    _say(str(error) if not isinstance(error, KeyError) else f"{error} is missing in what describes the checkpoint")
    raise typer.Exit(1) from error
