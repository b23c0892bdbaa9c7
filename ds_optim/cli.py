"""The command ``ds-optim``.

``doctor``: what is installed, what resolves to what, what is refused. ``estimate``: what a training will hold and what
every rank will do. ``claims``: the published savings, judged. ``report``: a page about recorded runs.
``checkpoint``: convert, inspect, verify. ``batch-size``: measured by branching; advice from a noise scale.
``selftest``: what this machine does with our updates, and how fast.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from importlib import import_module
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ds_optim import extension_builds, releases
from ds_optim.batch_size.command import batch_size_app
from ds_optim.checkpoint.command import checkpoint_app
from ds_optim.json_file import read_object
from ds_optim.memory import estimate_command
from ds_optim.memory.claims_command import claims
from ds_optim.memory.report_command import report
from ds_optim.selftest.command import selftest

EXAMPLES = """
Examples:

  ds-optim estimate --model configs/models/llama2_7b.json --optimizer AdamMini --stage 3 --ranks 8 --compare adamw

  ds-optim estimate --model config.json --deepspeed ds.json --ranks 64 --micro-batch 2 --device-memory 80GB

  ds-optim doctor --deepspeed ds.json

  ds-optim checkpoint inspect runs/mine

"ds-optim COMMAND --help" shows more.
"""

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, epilog=EXAMPLES)


@app.callback()
def _commands() -> None:
    """Sharded optimizers for DeepSpeed ZeRO: tools around them."""


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Option("--deepspeed", exists=True, dir_okay=False, help="A DeepSpeed JSON to judge.")
    ] = None,
) -> None:
    """Print versions and what follows from them, whether the hook is installed, which names resolve to what, and what
    would be refused and why.

    Locks that killed builds of operators left behind are among the problems: a start would wait for them for ever.

    Exit status 1 if something is wrong with this installation, or with the JSON that was given.
    """
    console = Console()
    problems = _print_versions(console)
    problems += _print_builds(console)
    import ds_optim_autoload

    autoload = os.getenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1"
    entry = bool(importlib.metadata.entry_points(group="torch.backends", name="ds_optim"))
    console.print(f"entry point registered with torch: {_yes(entry)}; torch runs entry points: {_yes(autoload)}")
    if not (entry and autoload):
        console.print("  a script must say `import ds_optim` before it uses DeepSpeed")
    try:
        import_module(ds_optim_autoload.ENGINE)  # this is what the hook waits for
    except Exception as error:
        _judge(console, [*problems, f"deepspeed cannot be imported: {type(error).__name__}: {error}"])
    hooked = ds_optim_autoload.installed and ds_optim_autoload.failure is None
    console.print(f"hook on {ds_optim_autoload.ENGINE} installed: {_yes(hooked)}")
    if not hooked:
        remedy = "" if releases.problems() else "; install again: pip install ."
        problems.append(f"registration failed: {ds_optim_autoload.failure}{remedy}")
    else:
        problems += _print_names(console)
        _print_kernels(console)
        problems += _print_refusals(console, config)
    _judge(console, problems)


def _judge(console: Console, problems: list[str]) -> NoReturn:
    for problem in problems:
        console.print("[bold red]problem:[/]", end=" ")
        _say(console, problem)  # a command in it is not broken into lines
    raise typer.Exit(1 if problems else 0)


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def _print_versions(console: Console) -> list[str]:
    """What is installed, where it stands among the releases that work, and why it does not do."""
    title = f"Python {platform.python_version()} on {platform.platform()}"
    table = Table("package", "version", "works", "stands", "tested", title=title)
    table.add_row("ds-optim", importlib.metadata.version("ds-optim"))
    for one in releases.ALL:
        works = f"{one.first} and later, below {one.end}"
        standing = one.standing(one.installed)
        table.add_row(one.package, one.installed or "not installed", works, standing, ", ".join(one.tested))
    console.print(table)
    for follows in filter(None, (one.follows(one.installed) for one in releases.ALL)):
        _say(console, follows)
    return releases.problems()


def _print_builds(console: Console) -> list[str]:
    """Where operators are built; what is in the way there is said before DeepSpeed is imported, which may build."""
    chosen = os.environ.get(extension_builds.VARIABLE)
    for folder in extension_builds.folders():
        whose = extension_builds.VARIABLE if chosen else "shared by all environments of this user"
        if not chosen and folder == extension_builds.own_folder():
            whose = "of this environment; launcher/ uses it"
        _say(console, f"operators are built in {folder} ({whose})")
    locks = extension_builds.locks(extension_builds.folders())
    for lock in locks:
        if not lock.is_stale:
            _say(console, f"  {lock}")
    return [str(lock) for lock in locks if lock.is_stale]


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _print_names(console: Console) -> list[str]:
    import torch

    from ds_optim.deepspeed.names import names

    table = Table('"type" in the JSON', "resolves to", title="Names")
    problems = []
    for name, cls in names().items():
        found = getattr(torch.optim, name, None)
        table.add_row(name, f"{cls.__module__}.{cls.__name__}" if found is cls else f"{found} (not ours)")
        if found is not cls and "." in name:
            problems.append(
                f"{name} resolves to {found}: something else took that name in torch.optim, import ds_optim before it"
            )
    for name in ("Adam", "AdamW", "Lion"):
        table.add_row(name, "DeepSpeed's own")
    console.print(table)
    return problems


def _print_kernels(console: Console) -> None:
    import torch

    from ds_optim import kernels

    devices = ["cpu"]
    if torch.accelerator.is_available():
        devices.append(str(torch.accelerator.current_accelerator()))
    for device in devices:
        console.print(f"kernels on {device}: {kernels.backend_for(None, torch.device(device))}")


def _print_refusals(console: Console, config: Path | None) -> list[str]:
    from ds_optim.deepspeed.configuration import notes
    from ds_optim.deepspeed.refusals import REFUSALS, judge

    if config is None:
        console.print("Refused at start (give a JSON with --deepspeed to judge it):")
        for refusal in REFUSALS:
            if refusal.may_apply:
                console.print(f"  - {refusal.reason}", highlight=False)
        return []
    try:
        content = read_object(config)
    except ValueError as error:
        return [str(error)]
    name, reasons = judge(content)
    who = name or '"optimizer" is not one of ours; judged for an AdamMini made by hand'
    console.print(f"{config}: {who}: {'refused' if reasons else 'accepted'}")
    for note in notes(content):
        console.print(f"[bold yellow]note:[/] {escape(note)}", highlight=False)
    return reasons


app.command(epilog=estimate_command.EXAMPLES)(estimate_command.estimate)
app.command()(claims)
app.command()(report)
app.command()(selftest)
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(batch_size_app, name="batch-size")


def main() -> None:
    """Entry point of the console script."""
    app()
