"""The console script ``ds-optim``: outside of the package, whose import refuses a torch that does not do.

Where nothing else can be said about an installation it still says, of every package, what is wrong with it.
"""

import sys


def main() -> None:
    """Run `ds_optim.cli`; exit status 1, and no traceback, where the package cannot be imported."""
    try:
        from ds_optim.cli import main as run
    except ImportError as error:
        print(f"ds-optim: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    run()
