"""Work that goes on to its end when the greenlet that waits for it is killed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import gevent

from greenaio._core.bell import generation
from greenaio._core.ends import thrown
from greenaio._files import loop as _loop
from greenaio._files.ranges import staying


class _Held(Protocol):
    def let_go(self) -> None: ...


class Shielded:
    """Do ``work()`` in a greenlet of its own. If a greenlet that waits for it is killed, the work still goes
    on to its end. Until then the number *fd* stays on the same file, even if it is closed. *held* is given
    back at the end. If the constructor raises, the caller has to give it back."""

    def __init__(self, fd: int, work: Callable[[], int], held: _Held | None = None) -> None:
        self._work, self._fd, self._forks = work, fd, generation()
        self._result = -1
        # The error of `get` if the greenlet is killed before it has begun.
        self._error: BaseException | None = gevent.GreenletExit()
        self._stays = staying(fd)
        try:
            if held is not None:
                self._stays.callback(held.let_go)
            self.greenlet = gevent.Greenlet(self._capture)
            # The link runs also if the greenlet is killed before it has begun.
            self.greenlet.rawlink(self._end)
            self.greenlet.start()
        except BaseException:
            self._stays.close()
            raise

    def _end(self, _: object) -> None:
        self._stays.close()

    def _capture(self) -> None:
        with self._stays:
            try:
                _loop.check_kept(self._fd, self._forks)
                self._result, self._error = self._work(), None
            except BaseException as error:
                # `get` raises the error. Raised here, gevent would print it.
                self._error = error

    def get(self) -> int:
        """Wait for the work. Return its result, or raise its exception. Call this once, and again after a
        kill."""
        try:
            self.greenlet.join()
        except BaseException as error:
            thrown(error)
            raise
        if self._error is None:
            return self._result
        try:
            raise self._error
        finally:
            # Its traceback refers to this object, so end the cycle.
            self._error = None


def shielded(fd: int, work: Callable[[], int]) -> int:
    """Return ``work()``, which goes on to its end if this greenlet is killed, so that no sector is left half
    done."""
    return Shielded(fd, work).get()
