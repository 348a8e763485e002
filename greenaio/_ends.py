"""How a hub ends, and how a wait ended.

gevent has no hook that runs before a hub is destroyed: `before_destroy` adds one.

A wait ends in one of two ways. The awaited operation answers, with a result or an error. Or another greenlet
throws an exception into the waiting one: a kill, a Timeout, a close of the file. The class of the exception
says nothing: ``Timeout(1, OSError(ENOSPC, ...))`` is a Timeout. So the code that parks marks the exception
that is thrown into it, and the layers above ask for the mark.

    ==================================  =============================  ==========================
    code that parks a greenlet          an answer                      an exception thrown into it
    ==================================  =============================  ==========================
    `Driver._park`                      a number, in the request       marked
    `_fallback.call`, `shielded`        returned by the job            marked
    `_fallback.wait_for`, `Turn.wait`   none                           marked
    ==================================  =============================  ==========================
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from gevent.exceptions import BlockingSwitchOutError

_THROWN = object()


def thrown(error: BaseException) -> BaseException:
    """Mark *error*, which was thrown into a greenlet that waited; return it."""
    object.__setattr__(error, '_greenaio_thrown', _THROWN)
    return error


def was_thrown(error: BaseException) -> bool:
    """Whether *error* ended or prevented a wait: the operation has no answer, and nothing may be dropped."""
    return (error.__dict__.get('_greenaio_thrown') is _THROWN or not isinstance(error, Exception)
            or isinstance(error, BlockingSwitchOutError))


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
