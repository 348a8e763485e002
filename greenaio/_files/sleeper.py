"""A greenlet, or a thread without a hub, that waits until any thread wakes it.

Both kinds of sleeper have the same three names: `wait`, `wake` and `is_parked`. A wake that comes before
`wait` is not lost: `wait` then returns at once. It may also return for no reason, so callers wait in a loop
with a condition. There is no exception of a timeout, which a signal handler could delay until it comes to
code of the user.
"""

from __future__ import annotations

import contextlib
from typing import Any

from gevent import get_hub
from gevent._hub_local import get_hub_if_exists
from gevent.hub import Waiter
from gevent.monkey import get_original

FOR_EVER = 86400.0              # seconds

_make_lock = get_original('_thread', 'allocate_lock')


class _Hold:
    """A timer that keeps the loop of a hub running while its greenlets sleep, because another thread may wake
    them. A loop with nothing to do would end, and gevent would raise LoopExit."""

    def __init__(self, hub: Any) -> None:
        self._watcher = hub.loop.timer(FOR_EVER, FOR_EVER)
        self._sleepers: set[Sleeper] = set()
        hub._greenaio_hold = self

    def add(self, one: Sleeper) -> None:
        self._sleepers.add(one)
        if not self._watcher.active:
            self._watcher.start(_nothing)

    def discard(self, one: Sleeper) -> None:
        self._sleepers.discard(one)
        if not self._sleepers:
            self._watcher.stop()


def _nothing() -> None:
    pass


class Sleeper:
    """A sleeper for the calling greenlet. Its hub serves other greenlets during the wait."""

    __slots__ = ('_hold', '_waiter', 'hub')

    def __init__(self) -> None:
        self.hub = hub = get_hub()
        self._waiter: Any = Waiter(hub)
        self._hold: _Hold = hub.__dict__.get('_greenaio_hold') or _Hold(hub)

    @property
    def is_parked(self) -> bool:
        """Whether the greenlet waits here now; no while a signal handler that interrupted it waits for
        something else."""
        return self._waiter.greenlet is not None

    def wait(self) -> None:
        try:
            self._hold.add(self)
            self._waiter.get()
        finally:
            if self.hub.loop is not None:
                self._hold.discard(self)
        # Drop the result of a wake that came before the wait.
        self._waiter.clear()

    def wake(self) -> None:
        """Wake the greenlet, from any thread. Do nothing if its hub was destroyed, because the greenlet never
        goes on."""
        loop = self.hub.loop
        if loop is None:
            return
        try:
            if get_hub_if_exists() is self.hub:
                loop.run_callback(self._waiter.switch, None)
            else:
                loop.run_callback_threadsafe(self._waiter.switch, None)
        except ValueError:
            # The loop is being destroyed.
            pass


class NativeSleeper:
    """A sleeper for the calling thread, which serves no greenlet during the wait."""

    __slots__ = ('_lock', 'is_parked')

    def __init__(self) -> None:
        self._lock = _make_lock()
        self._lock.acquire()
        self.is_parked = False

    def wait(self) -> None:
        self.is_parked = True
        try:
            self._lock.acquire()
        finally:
            self.is_parked = False

    def wake(self) -> None:
        """Wake the thread, from any thread."""
        # The lock is free if the thread is awake already.
        with contextlib.suppress(RuntimeError):
            self._lock.release()
