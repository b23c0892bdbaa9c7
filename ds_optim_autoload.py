"""The entry point that `import torch` runs (group ``torch.backends``): makes ds_optim's names known to DeepSpeed.

Costs nothing until DeepSpeed's engine is imported, and cannot raise: an error here would break `import torch` for
every program on the machine. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns it off; `import ds_optim` then does the same.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

ENGINE = "deepspeed.runtime.engine"

installed = False
"""Whether the hook on `ENGINE` is in place; `ds-optim doctor` prints it."""

failure: str | None = None
"""Why registration failed, if it did."""


def autoload() -> None:
    """Have `ds_optim.plugin` imported when DeepSpeed's engine is, or at once if it was."""
    global installed, failure
    if installed:
        return
    try:
        import wrapt

        installed = True
        wrapt.register_post_import_hook(_register, ENGINE)
    except Exception as error:  # whatever is wrong with this installation must not break torch
        installed, failure = False, f"{type(error).__name__}: {error}"


def _register(engine: ModuleType) -> None:
    global failure
    try:
        import ds_optim.plugin  # noqa: F401  (importing it installs it)
    except Exception as error:  # nor break DeepSpeed
        failure = f"{type(error).__name__}: {error}"
        print(
            f"ds_optim could not register its optimizers with DeepSpeed and stays out of the way ({failure}); "
            "`ds-optim doctor` says more",
            file=sys.stderr,
        )
        _explain_in(engine)


def _explain_in(engine: ModuleType) -> None:
    """Let an engine that is to have an optimizer of ours say why it cannot; all others are made as ever."""
    import wrapt

    reason = f"ds_optim could not register with DeepSpeed ({failure}); `ds-optim doctor` says more"

    def supported(wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not wrapped(*args, **kwargs):
            raise RuntimeError(f"{args[0]!r} is no optimizer of DeepSpeed's or torch's, and {reason}")
        return True

    def configured(wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(
            cls.__module__.startswith("ds_optim.") for given in (*args, *kwargs.values()) for cls in type(given).__mro__
        ):
            raise RuntimeError(reason)
        return wrapped(*args, **kwargs)

    for method, wrapper in (("_is_supported_optimizer", supported), ("_configure_optimizer", configured)):
        if hasattr(engine.DeepSpeedEngine, method):
            wrapt.wrap_function_wrapper(engine, f"DeepSpeedEngine.{method}", wrapper)
