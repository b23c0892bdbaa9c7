"""Wrapping a method of one object: its class and other objects stay as they are, and it goes with the object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import wrapt

MethodWrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]
"""Called instead of the method, with the method, the object, and the arguments, as `wrapt` does."""


def wrap(owner: Any, method: str, wrapper: MethodWrapper) -> Callable[[], None]:
    """Wrap ``owner.method``.

    A wrapper that is to die with another object than ``owner`` must not hold ``owner`` or what leads to it.

    Returns:
        What takes the wrapping back. If somebody else wrapped it since, the wrapper stays: give it nothing to do.
    """
    before = vars(owner).get(method)
    ours = wrapt.FunctionWrapper(getattr(owner, method), wrapper)

    def undo() -> None:
        if vars(owner).get(method) is not ours:
            return
        if before is None:
            delattr(owner, method)
        else:
            setattr(owner, method, before)

    setattr(owner, method, ours)
    return undo


def after(owner: Any, method: str, action: Callable[[], object]) -> Callable[[], None]:
    """Let ``action()`` follow every call of ``owner.method`` that does not raise; see `wrap`."""

    def followed(wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = wrapped(*args, **kwargs)
        action()
        return result

    return wrap(owner, method, followed)
