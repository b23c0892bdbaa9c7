"""The commands ``ds-optim batch-size measure | advise``."""

from __future__ import annotations

import typer

from ds_optim.batch_size.advise_command import advise
from ds_optim.batch_size.measure_command import measure

batch_size_app = typer.Typer(
    no_args_is_help=True, help="The right batch size: measured by branching, and what a noise scale says about it."
)
batch_size_app.command()(measure)
batch_size_app.command()(advise)
