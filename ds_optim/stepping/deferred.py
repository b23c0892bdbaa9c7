"""While an engine is being built, steps are not meant."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_is_deferred: ContextVar[bool] = ContextVar("ds_optim_deferred", default=False)


@contextmanager
def deferred_steps() -> Iterator[None]:
    """While an engine is being built, ``step()`` does nothing.

    DeepSpeed at ZeRO-0 takes a real step on zero gradients during initialization (`unfused_optimizer.py`,
    `initialize_optimizer_states`), which would count.
    """
    token = _is_deferred.set(True)
    try:
        yield
    finally:
        _is_deferred.reset(token)


def is_deferred() -> bool:
    """Whether a step is to do nothing."""
    return _is_deferred.get()
