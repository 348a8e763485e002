"""Waiting in the loop of the hub for files that epoll accepts: pipes, sockets, terminals, /proc/kmsg.

A greenlet waits for a number. The number may be closed during the wait, and a forked child has numbers for
which greenlets of its parent waited. A loop that watches a closed number aborts the process. So each close
calls `lose` first, and a greenlet that has waited calls `check_kept` before it uses the number again.
"""

from __future__ import annotations

import errno
import os
import posix
from typing import Any

from gevent import get_hub
from gevent._hub_local import get_hub_if_exists
from gevent.exceptions import BlockingSwitchOutError

from greenaio._core.bell import generation, listen
from greenaio._core.ends import thrown
from greenaio._core.handle import file_of, inherited
from greenaio._core.uninterrupted import REFUSED, is_uninterrupted
from greenaio._files.sharing import share

# The numbers of the events, the same in libev and libuv.
READ, WRITE = 1, 2

# For each inherited number, the generation in which this process has closed it.
_lost: dict[int, int] = {}
# For each watcher of `wait_for`, its hub and the number that it watches.
_watched: dict[Any, tuple[Any, int]] = {}


def has_position(fd: int, event: int) -> bool:
    """Return whether the file has a position that reads (READ) or writes (WRITE) move. Some files of FUSE and
    tracefs have none, and writes to seq_files of the kernel, such as /proc/self/comm, move none. This does
    not need the lock of the position, which another process may have."""
    try:
        # If the file has no position the kernel refuses the offset. A call for no bytes goes no further.
        (posix.preadv if event == READ else posix.pwritev)(fd, [], 0)
    except OSError as error:
        return error.errno != errno.ESPIPE
    return True


def wait_for(fd: int, event: int) -> None:
    """Wait in the loop until *fd*, which epoll accepts, is readable (READ) or writable (WRITE). Raise OSError
    (EBADF) in a forked child that has closed *fd*, and BlockingSwitchOutError inside `uninterrupted`."""
    hub, forks = get_hub(), generation()
    if is_uninterrupted():
        raise BlockingSwitchOutError(REFUSED)
    blocking = os.get_blocking(fd)
    watcher = hub.loop.io(fd, event)
    _watched[watcher] = hub, fd
    try:
        hub.wait(watcher)
    except BaseException as error:
        thrown(error)
        raise
    finally:
        del _watched[watcher]
        watcher.close()
        if _is_kept(fd, forks):
            # libuv sets O_NONBLOCK.
            os.set_blocking(fd, blocking)
    check_kept(fd, forks)


def lose(fd: int) -> None:
    """Note that *fd* is about to be closed. Greenlets that have waited for it since before a fork get EBADF.
    A loop that watches a closed number aborts the process."""
    now = generation()
    # Forget that the number is ours, because the next file with that number may be shared.
    share(fd)
    if fd not in inherited:
        return
    _lost[fd] = now
    here: Any = get_hub_if_exists()
    for watcher, (hub, number) in list(_watched.items()):
        if number == fd and hub is here and watcher.callback is not None:
            waiter = watcher.callback.__self__
            watcher.stop()
            hub.loop.run_callback(waiter.throw, OSError(errno.EBADF, os.strerror(errno.EBADF)))


def check_kept(fd: int, forks: int) -> None:
    """Raise OSError (EBADF) if this process was forked since the `generation` *forks*, and has since closed
    *fd* or given it to another file.

    A greenlet that has waited calls this before it uses the number again. The original greenlet goes on in
    the parent, and in the child the number may mean another file."""
    if not _is_kept(fd, forks):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def _is_kept(fd: int, forks: int) -> bool:
    if forks == generation():
        return True
    return _lost.get(fd, 0) <= forks and (fd not in inherited or file_of(fd) == inherited[fd])


def _after_fork_in_child() -> None:
    for _, fd in _watched.values():
        inherited[fd] = file_of(fd)


listen(_after_fork_in_child)
