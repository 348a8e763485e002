"""How a hub ends, and how a wait ended.

gevent has no hook that runs before a hub is destroyed: `before_destroy` adds one. Nor does it tell of the
end of a thread, which leaves the hub as it is: `before_end` calls in both cases.

A wait ends in one of two ways. The awaited operation answers, with a result or an error. Or another greenlet
throws an exception into the waiting one: a kill, a Timeout, a close of the file. The class of the exception
says nothing: ``Timeout(1, OSError(ENOSPC, ...))`` is a Timeout. So the code that parks marks the exception
that is thrown into it, and the layers above ask for the mark.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

from gevent.exceptions import BlockingSwitchOutError
from gevent.monkey import get_original

from greenaio._core.bell import generation, is_forked

# An object of our own, so that no other code can have set the attribute to it by chance.
_THROWN = object()


# All code that parks a greenlet tells the two ends apart:
#
#     ==========================================  =======================  ==========================
#     code that parks a greenlet                  an answer                an exception thrown into it
#     ==========================================  =======================  ==========================
#     `Parking.park`                              a number in the request  marked
#     `_files.pool.call`, `Shielded.get`          returned by the job      marked
#     `_files.loop.wait_for`, `Turn.wait`         none                     marked
#     ==========================================  =======================  ==========================
def thrown(error: BaseException) -> BaseException:
    """Mark *error*, which was thrown into a greenlet that waited. Return it."""
    # A class may define its own `__setattr__`, which might refuse or run any code.
    object.__setattr__(error, '_greenaio_thrown', _THROWN)
    return error


def was_thrown(error: BaseException) -> bool:
    """Return whether *error* ended or prevented a wait. Then the operation has no answer, and nothing may be
    dropped."""
    # Read from `__dict__`, because the class may define a `__getattr__`. Errors that are no Exception, such
    # as GreenletExit and Timeout, answer no operation.
    return (error.__dict__.get('_greenaio_thrown') is _THROWN or not isinstance(error, Exception)
            or isinstance(error, BlockingSwitchOutError))


def before_destroy(hub: Any, function: Callable[[], object]) -> None:
    """Call *function* once, when ``hub.destroy()`` is called and before it begins."""
    # `before_destroy` replaces the method of this one hub. The class stays as gevent made it.
    functions = hub.__dict__.get('_greenaio_before_destroy')
    if functions is None:
        functions = hub._greenaio_before_destroy = []
        hub.destroy = _Destroy(hub)
    functions.append(function)


def forget(hub: Any, function: Callable[[], object]) -> None:
    """Don't call *function* after all. Do nothing if it was not registered."""
    functions = hub.__dict__.get('_greenaio_before_destroy', ())
    if function in functions:
        functions.remove(function)


class _ThreadEnd:
    """Call functions when a thread ends. It lives in a thread-local, which ends with the thread."""

    def __init__(self) -> None:
        self.generation = generation()
        self.functions: list[Callable[[], object]] = []

    def __del__(self) -> None:
        # In a forked child Python ends the other threads before any hook. They hold the objects that they
        # held for ever. At the end of the interpreter the process gives everything back.
        if sys is None or sys.is_finalizing() or is_forked() or generation() != self.generation:
            return
        # A copy, because a function may call `forget_end`.
        for function in list(self.functions):
            function()


# A patched local belongs to a greenlet. This one has to end with the native thread.
_local = get_original('_thread', '_local')()


def before_end(hub: Any, function: Callable[[], object]) -> None:
    """Call *function* before *hub*, the one of this thread, is destroyed, and also when its thread ends. So
    it may be called twice."""
    before_destroy(hub, function)
    end = getattr(_local, 'end', None)
    if end is None:
        end = _local.end = _ThreadEnd()
    # An earlier hub of this thread may have registered it.
    if function not in end.functions:
        end.functions.append(function)


def forget_end(hub: Any, function: Callable[[], object]) -> None:
    """Don't call *function* after all. Call this in the thread that called `before_end`."""
    forget(hub, function)
    end = getattr(_local, 'end', None)
    if end is not None and function in end.functions:
        end.functions.remove(function)


class _Destroy:
    """Stand before ``Hub.destroy`` on one hub, without keeping that hub alive."""

    def __init__(self, hub: Any) -> None:
        self._hub = weakref.ref(hub)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hub = self._hub()
        # A reference to this method has outlived the hub, so there is nothing to destroy.
        if hub is None:
            return None
        # First, so that `hub.destroy` below is gevent's method, and a second call comes straight to it.
        hub.__dict__.pop('destroy', None)
        _call_all(hub)
        return hub.destroy(*args, **kwargs)


def _call_all(hub: Any) -> None:
    # Not in the frame that destroys the hub: in a thread, gevent keeps that one and its variables for ever.
    for function in hub.__dict__.pop('_greenaio_before_destroy', ()):
        function()
