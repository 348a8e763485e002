"""What must happen before a hub is destroyed; gevent itself has no hook for that."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


def before_destroy(hub: Any, function: Callable[[], object]) -> None:
    """Call *function* once, when ``hub.destroy()`` is called and before it begins."""
    functions = hub.__dict__.get('_greenaio_before_destroy')
    if functions is None:
        functions = hub._greenaio_before_destroy = []
        hub.destroy = _Destroy(hub)
    functions.append(function)


def forget(hub: Any, function: Callable[[], object]) -> None:
    """Don't call *function* after all."""
    functions = hub.__dict__.get('_greenaio_before_destroy', ())
    if function in functions:
        functions.remove(function)


class _Destroy:
    """Stands before ``Hub.destroy`` on one hub, and does not keep that hub alive."""

    def __init__(self, hub: Any) -> None:
        self._hub = weakref.ref(hub)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hub = self._hub()
        if hub is None:
            return None
        hub.__dict__.pop('destroy', None)
        _call_all(hub)
        return hub.destroy(*args, **kwargs)


def _call_all(hub: Any) -> None:
    # Not in the frame that destroys the hub: in a thread, gevent keeps that one and its variables for ever.
    for function in hub.__dict__.pop('_greenaio_before_destroy', ()):
        function()
