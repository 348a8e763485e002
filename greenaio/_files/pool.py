"""Calls by Python threads, in a gevent ThreadPool of greenaio's own, for builds without the extension.

They do not use the pool of the hub, because DNS look-ups need its threads.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from gevent import get_hub, getcurrent, spawn
from gevent.exceptions import BlockingSwitchOutError

from greenaio._core.bell import generation, listen
from greenaio._core.ends import before_destroy, thrown
from greenaio._core.handle import check_open, take
from greenaio._core.uninterrupted import REFUSED, is_uninterrupted

if TYPE_CHECKING:
    from gevent.threadpool import ThreadPool

# The threads of one hub, as many as in the pool of gevent.
THREADS = 10


class _Job:
    """One call for a worker. It is in `_jobs` until the call is over, or can't begin any more."""

    __slots__ = ('args', 'began', 'fd', 'function', 'handle', 'result', 'waiter')

    def __init__(self, function: Callable[..., Any], fd: int, args: tuple[Any, ...]) -> None:
        self.began = monotonic_ns()
        self.waiter: Any = getcurrent()         # None when it is over
        self.function = function
        self.fd = fd
        self.args = args
        self.handle = take(fd) if fd >= 0 else None
        self.result: Any = None

    def __call__(self) -> tuple[Any, BaseException | None]:
        # An exception is returned, because gevent prints an exception that the function of a pool raises.
        try:
            return self.function(self.fd, *self.args), None
        except BaseException as error:
            return None, error
        finally:
            self.end()

    def end(self) -> None:
        """Note that the call is over, and let go of the number. May be called twice."""
        _jobs.discard(self)
        self.waiter = None
        handle, self.handle = self.handle, None
        if handle is not None:
            handle.let_go()


_jobs: set[_Job] = set()
_made = 0


def thread_pool() -> ThreadPool:
    """Return the pool of this hub. Raise BlockingSwitchOutError if the caller may not wait: in the hub, or
    inside `uninterrupted`."""
    # Import it late, because it takes longer than the import of all of greenaio.
    from gevent.threadpool import ThreadPool

    hub: Any = get_hub()
    if getcurrent() is hub:
        raise BlockingSwitchOutError('greenaio was called in the hub, where no greenlet can wait')
    if is_uninterrupted():
        raise BlockingSwitchOutError(REFUSED)
    pool: ThreadPool | None = hub.__dict__.get('_greenaio_pool')
    # In a forked child gevent repairs its own pool at once, and other pools only later. So make a new one.
    if pool is None or hub._greenaio_generation != generation():
        hub._greenaio_generation = generation()
        pool = hub._greenaio_pool = ThreadPool(THREADS, hub)
        before_destroy(hub, pool.kill)
    return pool


def renew_threads() -> None:
    """Let new native threads make the calls of this hub from now on, instead of the present ones."""
    hub: Any = get_hub()
    pool = hub.__dict__.pop('_greenaio_pool', None)
    if pool is not None:
        # `kill` waits for the calls of the threads, so a new greenlet calls it.
        spawn(pool.kill)


def jobs() -> list[_Job]:
    """Return the calls that are not over yet."""
    return list(_jobs)


def jobs_made() -> int:
    """Return the number of calls that were handed to threads."""
    return _made


def call(function: Callable[..., Any], fd: int, *args: Any) -> Any:
    """Return ``function(fd, *args)``, called in a native thread while this greenlet waits.

    If the greenlet is killed during the call, the call goes on by itself. A negative *fd* is no file. Raise
    the exception of the call, and EBADF if *fd* is being closed.
    """
    global _made
    pool = thread_pool()
    if fd >= 0:
        check_open(fd)
    _made += 1
    job = _Job(function, fd, args)
    _jobs.add(job)
    try:
        job.result = pool.spawn(job)
    except BaseException:
        job.end()
        raise
    try:
        value, error = job.result.get()
    except BaseException as killed:
        thrown(killed)
        raise
    if error is not None:
        raise error
    return value


def _after_fork_in_child() -> None:
    # The threads stayed with the parent, and gevent repairs a pool only when its loop next runs. So end the
    # jobs here.
    for job in list(_jobs):
        if job.result is not None:
            job.result.set((None, OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))))
        job.end()


listen(_after_fork_in_child)
