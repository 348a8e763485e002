"""The semaphores of `multiprocessing`, cooperative: a greenlet waits for another process, the hub does not.

The locks, conditions, events, barriers and queues of `multiprocessing` are all made of
``_multiprocessing.SemLock``. `SemLock` here has the same methods, and a native one behind it. The
greenlets of this process that want the semaphore stand in a queue, first come, first served, and one native
thread waits in sem_wait(3) for all of them. It is a thread of its own, and belongs to no device and no pool
of gevent, because it may wait for ever.

The thread and the greenlets share the queue without a lock, because `collections.deque` does each step in one
go. *The one that takes a waiter out of the queue decides*:

    the thread                              the greenlet of the waiter
    ------------------------------------    ---------------------------------------------------
    sem_wait returns: it has one unit
    popleft() -> the waiter                 killed or timed out: remove() fails, the unit is its
    watcher.send(), then is_told            waits until is_told, then keeps or posts the unit
                                            killed or timed out: remove() succeeds, it leaves
    popleft() fails: it posts the unit
    ends

So no unit is lost. A thread whose waiters have all been killed stays in sem_wait, which nothing can end. The
next waiter finds it there and starts no other; if none comes, the thread posts the unit that it gets. A
timeout leaves no such thread behind, because the thread waits no longer than the last waiter does.

In a forked child there is no such thread, and a unit that one had was the parent's: inherited waiters get
OSError (ECANCELED), and post nothing. A lock that another greenlet held at the fork is the parent's too: the
copy of that greenlet leaves its ``with`` in the child, and its `release` there does nothing.
"""

from __future__ import annotations

import errno
import os
import weakref
from _multiprocessing import SemLock as Native  # type: ignore[import-not-found]
from collections import deque
from math import inf
from time import monotonic
from typing import Any

from gevent import Timeout, get_hub
from gevent._hub_local import get_hub_if_exists
from gevent.exceptions import BlockingSwitchOutError
from gevent.hub import Waiter
from gevent.monkey import get_original
from greenlet import getcurrent, greenlet

from greenaio._core.bell import generation, listen
from greenaio._core.ends import before_end, forget_end
from greenaio._core.uninterrupted import thread_of
from greenaio._files.waiter import can_wait

__implements__ = ['SemLock']            # for `greenaio.monkey`

# The kinds, as in Modules/_multiprocessing/semaphore.c.
RECURSIVE_MUTEX, SEMAPHORE = 0, 1

native_sleep = get_original('time', 'sleep')
start_new_thread = get_original('_thread', 'start_new_thread')

# The semaphores that a thread waits for, each with a token of that thread.
_servers: dict[SemLock, object] = {}
# All parked waiters and all semaphores. A forked child goes through them.
_waiters: set[_Waiter] = set()
_all: weakref.WeakSet[SemLock] = weakref.WeakSet()


class SemLock:
    """The class that `greenaio.monkey` puts into `_multiprocessing` instead of the native one. A recursive
    lock belongs to the greenlet that acquired it."""

    SEM_VALUE_MAX = Native.SEM_VALUE_MAX

    def __init__(self, kind: int, value: int, maxvalue: int, name: str, unlink: bool) -> None:
        # The native lock is a plain semaphore. A native recursive lock would count for a whole thread, not
        # for a greenlet.
        self._stand_before(Native(SEMAPHORE, value, maxvalue, name, unlink), kind)

    @classmethod
    def _rebuild(cls, handle: int, kind: int, maxvalue: int, name: str) -> SemLock:
        self = cls.__new__(cls)
        self._stand_before(Native._rebuild(handle, SEMAPHORE, maxvalue, name), kind)
        return self

    def _stand_before(self, native: Any, kind: int) -> None:
        self._native = native
        self.kind = kind
        self.handle, self.maxvalue, self.name = native.handle, native.maxvalue, native.name
        self._get_value, self._is_zero = native._get_value, native._is_zero
        self._queue: deque[_Waiter] = deque()
        # The greenlet that last acquired it.
        self._owner: weakref.ref[greenlet] | None = None
        # How often that greenlet holds a recursive lock.
        self._depth = 0
        # In a forked child, the greenlet that holds the lock in the parent.
        self._left_behind: weakref.ref[greenlet] | None = None
        _all.add(self)

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Acquire the semaphore, and return whether that was possible. *timeout* is in seconds."""
        me = getcurrent()
        if self.kind == RECURSIVE_MUTEX and self._belongs_to(me):
            self._depth += 1
            return True
        waits = block and (timeout is None or timeout > 0)
        must_wait = waits and self._queue or not self._native.acquire(False)
        if must_wait and not (waits and self._wait(me, timeout)):
            return False
        if self._is_left_behind(me):
            self._left_behind = None
        self._owner, self._depth = weakref.ref(me), 1
        return True

    __enter__ = acquire

    def release(self) -> None:
        """Release the semaphore. Raise AssertionError if a recursive lock belongs to another greenlet, and
        ValueError if it is not held."""
        if self.kind == RECURSIVE_MUTEX:
            if not self._belongs_to(getcurrent()):
                raise AssertionError('attempt to release recursive lock not owned by thread')
            if self._depth > 1:
                self._depth -= 1
                return
            # Forget the owner before another greenlet can acquire the lock.
            self._owner = None
        if self._is_left_behind(getcurrent()):
            self._left_behind = None
            return
        self._native.release()

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def _belongs_to(self, one: greenlet) -> bool:
        owner = self._owner
        return owner is not None and owner() is one and self._count() > 0

    def _is_left_behind(self, one: greenlet) -> bool:
        return self._left_behind is not None and self._left_behind() is one

    def _is_mine(self) -> bool:
        return self._belongs_to(getcurrent())

    def _count(self) -> int:
        if self.kind == RECURSIVE_MUTEX:
            return 0 if self._owner is None else self._depth
        count: int = self._native._count()
        return count

    def _after_fork(self) -> None:
        self._native._after_fork()
        self._owner = None

    # In the greenlets ------------------------------------------------------------------------

    def _wait(self, me: greenlet, timeout: float | None) -> bool:
        if not can_wait():
            if timeout is None:
                self._refuse_if_stuck(me)
            acquired: bool = self._native.acquire(True, timeout)
            return acquired
        # Notice a fork by C code, because the thread that serves the queue may have stayed with the parent.
        generation()
        waiter = _Waiter(self, timeout)
        self._queue.append(waiter)
        try:
            self._ensure_served()
            with Timeout(timeout, False):   # type: ignore[arg-type]
                waiter.parked.get()
            acquired = waiter.leave()
            if waiter.error is not None:
                raise waiter.error
            return acquired
        except BaseException:
            # The greenlet was killed, the process was forked, or no thread could be started.
            if waiter.leave():
                self._native.release()
            raise
        finally:
            waiter.close()

    def _refuse_if_stuck(self, me: greenlet) -> None:
        """Raise BlockingSwitchOutError if a greenlet of this thread holds the lock. It could not release the
        lock while the thread waits."""
        owner = None if self._owner is None else self._owner()
        if (self.maxvalue == 1 and owner is not None and owner is not me and self._belongs_to(owner)
                and thread_of(owner) is thread_of(me)):
            raise BlockingSwitchOutError(
                'a greenlet of this thread holds the lock of multiprocessing, and can\'t go on to release it')

    def _ensure_served(self) -> None:
        """Start a thread that waits for the semaphore, unless one does. Raise RuntimeError if no thread can
        be started."""
        token = object()
        if _servers.setdefault(self, token) is token:
            try:
                start_new_thread(self._serve, ())
            except BaseException:
                _servers.pop(self, None)
                raise

    # In the thread ---------------------------------------------------------------------------

    def _serve(self) -> None:
        """Wait for the semaphore, in a thread, as long as a greenlet waits for it."""
        token = object()
        while True:
            patience = self._patience()
            if patience == 0:
                _servers.pop(self, None)
                # The next waiter may have come before the pop, and may have started no thread. So look again.
                patience = self._patience()
                if patience == 0 or _servers.setdefault(self, token) is not token:
                    return
            try:
                if self._native.acquire(True, None if patience == inf else patience):
                    self._hand_over(None)
            except Exception as error:
                self._hand_over(error)

    def _patience(self) -> float:
        """Return the time until the last waiter gives up, in seconds; 0 if no waiter is left."""
        return max(0, max((waiter.deadline for waiter in self._queue.copy()), default=0) - monotonic())

    def _hand_over(self, error: Exception | None) -> None:
        """Give the unit, or the error, to the first waiter. Without a waiter, post the unit."""
        try:
            waiter = self._queue.popleft()
        except IndexError:
            if error is None:
                self._native.release()
            return
        waiter.error = error
        try:
            waiter.watcher.send()
        finally:
            waiter.is_told = True


class _Waiter:
    """A greenlet that is parked until a semaphore is acquired for it."""

    __slots__ = ('deadline', 'error', 'has_left', 'hub', 'is_told', 'parked', 'semaphore', 'watcher')

    def __init__(self, semaphore: SemLock, timeout: float | None) -> None:
        self.semaphore = semaphore
        self.deadline = inf if timeout is None else monotonic() + timeout
        self.error: Exception | None = None
        self.is_told = self.has_left = False
        self.hub: Any = get_hub()
        self.parked: Any = Waiter(self.hub)
        # The watcher also keeps the loop running. It starts before the thread knows of the waiter, because an
        # earlier send would be lost.
        self.watcher = self.hub.loop.async_()
        self.watcher.start(self.parked.switch, None)
        before_end(self.hub, self.abandon)
        _waiters.add(self)

    def leave(self) -> bool:
        """Leave the queue. Return whether the semaphore was acquired for this greenlet. A second call returns
        False."""
        if self.has_left:
            return False
        self.has_left = True
        try:
            self.semaphore._queue.remove(self)
        except ValueError:
            while not self.is_told:
                # The thread uses the watcher at this moment.
                native_sleep(0)
            return self.error is None
        return False

    def abandon(self) -> None:
        """Leave the queue and post the unit, before the hub is destroyed or the thread ends. The greenlet
        never goes on."""
        _waiters.discard(self)
        if self.leave():
            self.semaphore._native.release()

    def close(self) -> None:
        _waiters.discard(self)
        forget_end(self.hub, self.abandon)
        # With a destroyed hub the watcher is gone, too.
        if self.hub.loop is not None:
            self.watcher.stop()
            self.watcher.close()


def _after_fork_in_child() -> None:
    """End the waits that were inherited, and note the locks that other greenlets hold in the parent."""
    here: Any = get_hub_if_exists()
    me = getcurrent()
    for lock in list(_all):
        if lock.maxvalue == 1 and lock._owner is not None and lock._owner() is not me and lock._count() > 0:
            lock._left_behind = lock._owner
    _servers.clear()
    for waiter in list(_waiters):
        waiter.semaphore._queue.clear()
        waiter.has_left = True
        waiter.error = OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        if waiter.hub is here:
            waiter.hub.loop.run_callback(waiter.parked.throw, waiter.error)
    _waiters.clear()


listen(_after_fork_in_child)
