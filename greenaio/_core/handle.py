# cython: language_level=3, annotation_typing=False, boundscheck=False, wraparound=False
"""The numbers (file descriptors) that operations need, and the one way to close a number.

An operation names its file by a number. If the number were closed and given to another file before the kernel
has looked at it, the operation would read or change that other file. So an operation takes the number first:

    ==============================  ======================  ==============================================
    operation                       takes the number        lets go of it
    ==============================  ======================  ==============================================
    a request                       when it is offered      when the kernel has taken it and will not ask
                                                            for it again, or at its end
    an operation of several steps   at the begin of the     at the end of the `using` block
                                    `using` block
    a close by a thread             when the close begins   when the thread is done
    ==============================  ======================  ==============================================

A close never waits for these operations. It marks the `Handle`. From then on the number answers EBADF to new
operations and to another close, and the last user closes it.

A file may have several numbers. All that greenaio remembers of the file itself is in its `Inode`.

This module is compiled where the extension is built, and interpreted elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import operator
import os
import posix  # not os: this is the call itself, not a patched one
import stat
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from greenaio._core.bell import generation, listen

# The number of a block device's inode, on its own device. Its nodes in /dev have a number each.
BLOCK_DEVICE = 0


class Writes:
    """Writes in progress: requests that may still change the file.

    A request counts from the decision that it need not wait until it is over, also if its greenlet was killed
    or its thread has ended. Until then the *owner* of the writes is kept alive, so that others find it."""

    def __init__(self) -> None:
        self.count = 0
        self.owner: object = None       # while there are any
        self.at_end: Callable[[], object] | None = None     # called once, when there are none any more

    def begin(self, owner: object) -> None:
        """One more."""
        self.owner = owner
        self.count += 1

    def end(self) -> None:
        """One is over. The last one may run any code."""
        self.count -= 1
        if self.count == 0:
            owner, self.owner = self.owner, None    # not before this returns
            at_end, self.at_end = self.at_end, None
            if at_end is not None:
                at_end()
            del owner


class Inode:
    """A file as the kernel tells it from all others: by its device and its number there.

    There is one object for a file as long as anything refers to it. So all open files of one inode share it.
    Made by `inode_of`."""

    def __init__(self, device: int, number: int) -> None:
        self.key = (device, number)
        self.demoted_until = 0          # ns
        self.ranges: Any = None         # that greenlets hold or wait for, see `sectors`; or None
        self.writes = Writes()          # of requests that hold no range
        self._entry = weakref.ref(self)

    def __del__(self) -> None:
        entry = _inodes.get(self.key)
        if entry is not None and entry is self._entry:
            del _inodes[self.key]

    def __repr__(self) -> str:
        device, number = self.key
        return f'<Inode {os.major(device)}:{os.minor(device)} {number}>'


_inodes: dict[tuple[int, int], weakref.ref[Inode]] = {}     # the entry of an object ends with it


def inode_of(device: int, number: int) -> Inode:
    """Return the `Inode` of that file: the one that there is, or a new one."""
    inode = inode_if_any(device, number)
    if inode is None:
        fresh = Inode(device, number)
        # Its making may have run a finalizer or another thread, which was quicker. From here on neither
        # can come between, because this is compiled where threads use it.
        inode = inode_if_any(device, number)
        if inode is None:
            inode = fresh
            _inodes[fresh.key] = fresh._entry
    return inode


def inode_if_any(device: int, number: int) -> Inode | None:
    """Return the `Inode` of that file, if anything refers to it; else None."""
    if not _inodes:
        return None
    entry = _inodes.get((device, number))
    return None if entry is None else entry()


def inode_of_facts(facts: os.stat_result) -> Inode | None:
    """Return the `Inode` of the file that `os.fstat` told *facts* of, if anything refers to it; else None."""
    if stat.S_ISBLK(facts.st_mode):
        return inode_if_any(facts.st_rdev, BLOCK_DEVICE)
    return inode_if_any(facts.st_dev, facts.st_ino)


def all_inodes() -> list[Inode]:
    """Return all that anything refers to."""
    return [inode for entry in list(_inodes.values()) if (inode := entry()) is not None]


class Handle:
    """A number that is in use or being closed. Each such number has one handle.

    Between two uses the table keeps the handle: otherwise each request would make one and free it. Such an
    idle handle says nothing about the number, which the program may close and reuse."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.users = 0                  # operations that took it and have not let go
        self.closing = False
        self.stand_in = -1              # the number that a thread closes the file with
        self._close: Callable[[Handle], object] | None = None    # called by the last user

    def again(self) -> Handle:
        """Take it again; for an operation that has it."""
        self.users += 1
        return self

    def let_go(self) -> None:
        """One user fewer. The last one closes the number, if it is being closed. That may run any code."""
        if not self.let_go_unless_last():
            close, self._close = self._close, None
            assert close is not None
            self.users = 0
            close(self)

    def let_go_unless_last(self) -> bool:
        """Let go, unless that would close the number now. Return whether it was done. Runs no other code."""
        if self.users == 1 and self._close is not None:
            return False
        self.users -= 1
        return True

    def close_with(self, close: Callable[[Handle], object]) -> None:
        """Mark the number as being closed; for one of its users. The last one calls *close*, which ends with
        `close_number`."""
        global closing
        assert self.users > 0
        if not self.closing:
            self.closing = True
            closing += 1
        self._close = close

    def close_number(self) -> None:
        """Close the number, and let another file have it. Nothing if this process was forked since, for its
        numbers were closed then."""
        global closing
        if _forget(self):
            closing -= 1
            self._close_numbers()

    def _close_numbers(self) -> None:
        try:                            # noqa: SIM105  # in memory that is there
            posix.close(self.fd)
        except OSError:                 # no caller waits for the answer
            pass
        if self.stand_in >= 0:
            try:                        # noqa: SIM105
                posix.close(self.stand_in)
            except OSError:
                pass

    def is_idle(self) -> bool:
        """Whether no operation uses the number, and none closes it."""
        return self.users == 0 and not self.closing

    def __repr__(self) -> str:
        return f'<Handle fd={self.fd} users={self.users} closing={self.closing}>'


_handles: list[Handle | None] = []      # by number
closing = 0                             # how many of them are being closed


def _forget(handle: Handle) -> bool:
    if handle.fd >= len(_handles) or _handles[handle.fd] is not handle:
        return False
    _handles[handle.fd] = None
    return True


def handle_of(fd: int) -> Handle | None:
    """Return the handle of a number that is in use or being closed; else None."""
    handle = _handles[fd] if 0 <= fd < len(_handles) else None
    return None if handle is None or handle.is_idle() else handle


def _is_open(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError as error:
        return error.errno != errno.EBADF
    return True


def take(fd: int) -> Handle:
    """Take the number *fd*, which keeps its file until `Handle.let_go`. For a step of an operation, which has
    asked `check_open` before. Raises EBADF if a thread is closing it, after its last use."""
    handle = _handles[fd] if 0 <= fd < len(_handles) else None
    if handle is None:
        handle = _add(fd)
    if handle.closing and handle._close is None:
        _refuse()
    handle.users += 1
    return handle


def _add(fd: int) -> Handle:
    if fd < 0:
        _refuse()
    if fd >= len(_handles):
        if not _is_open(fd):
            return Handle(fd)           # there is no file to keep, and no room for any number
        _handles.extend([None] * (fd + 1 - len(_handles)))
    fresh = Handle(fd)
    handle = _handles[fd]
    if handle is None:                  # no other thread was quicker
        handle = _handles[fd] = fresh
    return handle


def _refuse() -> NoReturn:
    raise OSError(errno.EBADF, os.strerror(errno.EBADF))


@contextlib.contextmanager
def using(fd: int) -> Iterator[Handle]:
    """Keep the number *fd* the same file in this block, even if it is closed there. Raises EBADF if it is
    being closed already."""
    generation()
    fd = operator.index(fd)
    check_open(fd)
    handle = take(fd)
    try:
        yield handle
    finally:
        handle.let_go()


def in_use(fd: int) -> bool:
    """Whether an operation needs the number *fd*."""
    generation()                        # after a fork, the parent's operations do not count
    handle = handle_of(fd)
    return handle is not None and handle.users > 0


def is_closing(fd: int) -> bool:
    """Whether the number *fd* is being closed."""
    handle = handle_of(fd)
    return handle is not None and handle.closing


def check_open(fd: int) -> None:
    """Raise EBADF for a number that is being closed, and for one below zero."""
    if fd < 0 or is_closing(fd):
        _refuse()


def all_handles() -> list[Handle]:
    """Return the handles of all numbers that are in use or being closed."""
    return [handle for handle in _handles if handle is not None and not handle.is_idle()]


def _check() -> None:
    """Assert what must hold between two calls."""
    assert closing == sum(handle.closing for handle in all_handles())
    for handle in all_handles():
        assert handle_of(handle.fd) is handle
        assert handle.users > 0, f'no user: {handle!r}'
    assert len(_inodes) == len(all_inodes()), 'an entry without its inode'


# The numbers that were in use when this process was forked: their files.
inherited: dict[int, str | None] = {}


def file_of(fd: int) -> str | None:
    """Return the kernel's name of the file *fd*. Not its inode: a server may be asked for that."""
    try:
        return posix.readlink(f'/proc/self/fd/{fd}').removesuffix(' (deleted)')
    except OSError:
        return None


def _after_fork_in_child() -> None:
    # An operation on a number goes on in the parent, or is over: no close here waits for it. The numbers that
    # the parent was closing are closed here now, because no code of this process knows them any more.
    global closing
    for inode in all_inodes():          # the parent's writes never end here
        inode.writes = Writes()
    while _handles:                     # one by one: without memory for one of them it comes here again
        handle = _handles[len(_handles) - 1]
        if handle is not None:
            handle._close = None
            if handle.closing:
                handle._close_numbers()
            elif handle.users > 0:
                inherited[handle.fd] = file_of(handle.fd)
        _handles.pop()
    closing = 0


listen(_after_fork_in_child)
