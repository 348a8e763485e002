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
operations and to another close, and the last user closes it:

    ===========================  ==========================  ============  ================================
    a request                    a close                     users         the number
    ===========================  ==========================  ============  ================================
    takes the number                                         1
                                 takes it, `close_with`      2             EBADF for new operations
                                 lets go                     1             still the same file
    lets go: it is the last                                  0             the close function is called
                                 `close_number`                            free for another file
    ===========================  ==========================  ============  ================================

A file may have several numbers. All that greenaio remembers of the file itself is in its `Inode`.

This module is compiled where the extension is built, and interpreted elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import operator
import os
import posix  # not patched
import stat
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from greenaio._core.bell import generation, listen

# The number of a block device's inode, on its own device. Its nodes in /dev have a number each.
BLOCK_DEVICE = 0


class Writes:
    """Writes in progress: requests that may still change the file.

    A request counts from the decision that it need not wait. It counts until it is over, also if its greenlet
    was killed or its thread has ended. Until then the *owner* of the writes is kept alive, so that others
    find it."""

    def __init__(self) -> None:
        self.count = 0
        # Set as long as there are any writes.
        self.owner: object = None
        # Called once, when there are no writes any more.
        self.at_end: Callable[[], object] | None = None

    def begin(self, owner: object) -> None:
        """Count one more write. *owner* lives until the last one is over."""
        self.owner = owner
        self.count += 1

    def end(self) -> None:
        """Count one write less. The last one may run any code."""
        self.count -= 1
        if self.count == 0:
            # `owner` may be the last reference, and its end may run any code. The local variable keeps it
            # until the work here is done.
            owner, self.owner = self.owner, None
            # Cleared before the call, because the function may begin writes again and set another.
            at_end, self.at_end = self.at_end, None
            if at_end is not None:
                at_end()
            del owner


class Inode:
    """A file as the kernel tells it from all others: by its device and its number there.

    There is one object for a file as long as anything refers to it. So all open files of one inode share it.
    Call `inode_of` to get it.
    """

    def __init__(self, device: int, number: int) -> None:
        self.key = (device, number)
        # CLOCK_MONOTONIC. Until this time requests for the file take threads, because a submission has
        # stalled.
        self.demoted_until = 0          # ns
        # Ranges of bytes that greenlets hold or wait for, see `sectors`. None if there are none.
        self.ranges: Any = None
        # Writes of requests that hold no range.
        self.writes = Writes()
        # Kept, so that `__del__` can tell its own entry from the entry of a newer object.
        self._entry = weakref.ref(self)

    def __del__(self) -> None:
        # A new object for the same file may have taken the entry between the last reference and this call.
        entry = _inodes.get(self.key)
        if entry is not None and entry is self._entry:
            del _inodes[self.key]

    def __repr__(self) -> str:
        device, number = self.key
        return f'<Inode {os.major(device)}:{os.minor(device)} {number}>'


# Weak references, so that an entry ends with its object.
_inodes: dict[tuple[int, int], weakref.ref[Inode]] = {}


def inode_of(device: int, number: int) -> Inode:
    """Return the `Inode` of that file, a new one if there is none."""
    inode = inode_if_any(device, number)
    if inode is None:
        fresh = Inode(device, number)
        # The constructor may have run a finalizer, or another thread may have run, and made the object first.
        # From here on neither can come between, because this module is compiled where threads use it.
        inode = inode_if_any(device, number)
        if inode is None:
            inode = fresh
            _inodes[fresh.key] = fresh._entry
    return inode


def inode_if_any(device: int, number: int) -> Inode | None:
    """Return the `Inode` of that file, if anything refers to it; else None."""
    # The usual case, which makes no tuple.
    if not _inodes:
        return None
    entry = _inodes.get((device, number))
    return None if entry is None else entry()


def inode_of_facts(facts: os.stat_result) -> Inode | None:
    """Return the `Inode` of the file that `os.fstat` told *facts* of, if anything refers to it; else None."""
    # All device nodes of a block device share its content, so they share one `Inode`.
    if stat.S_ISBLK(facts.st_mode):
        return inode_if_any(facts.st_rdev, BLOCK_DEVICE)
    return inode_if_any(facts.st_dev, facts.st_ino)


def all_inodes() -> list[Inode]:
    """Return each `Inode` that anything refers to."""
    return [inode for entry in list(_inodes.values()) if (inode := entry()) is not None]


class Handle:
    """A number that is in use or being closed. Each such number has one handle.

    Between two uses the table keeps the handle: otherwise each request would make one and free it. Such an
    idle handle says nothing about the number, which the program may close and reuse."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        # The number of operations that took it and have not let go.
        self.users = 0
        self.closing = False
        # The number with which a thread closes the file, or -1.
        self.stand_in = -1
        # Called by the last user. None if no close has begun, or after the call.
        self._close: Callable[[Handle], object] | None = None

    def again(self) -> Handle:
        """Take the number again, for an operation that has it. Return this handle."""
        self.users += 1
        return self

    def let_go(self) -> None:
        """Count one user less. The last one closes the number, if it is being closed. That may run any code.
        """
        if not self.let_go_unless_last():
            # From here on `take` refuses the number: see there.
            close, self._close = self._close, None
            assert close is not None
            # Before the call, which may look at this handle.
            self.users = 0
            close(self)

    def let_go_unless_last(self) -> bool:
        """Let go, unless that would close the number now. Return whether it was done. No other code runs
        here.

        The engine calls it while its lists are not right yet.
        """
        if self.users == 1 and self._close is not None:
            return False
        self.users -= 1
        return True

    def close_with(self, close: Callable[[Handle], object]) -> None:
        """Mark the number as being closed. Call it as one of its users. The last user calls *close*, which
        ends with `close_number`."""
        global closing
        assert self.users > 0
        # Two closes may meet. They count once in `closing`, and only the later function is called.
        if not self.closing:
            self.closing = True
            closing += 1
        self._close = close

    def close_number(self) -> None:
        """Close the number, and let another file have it. Do nothing if this process was forked since,
        because its numbers were closed then."""
        global closing
        # Out of the table first. As soon as the number is closed, another thread may open a file and take it.
        if _forget(self):
            closing -= 1
            self._close_numbers()

    def _close_numbers(self) -> None:
        # No caller waits for the answer, so an error is dropped. `contextlib.suppress` would make an object,
        # and there may be no memory for one.
        try:                            # noqa: SIM105
            posix.close(self.fd)
        except OSError:
            pass
        if self.stand_in >= 0:
            try:                        # noqa: SIM105
                posix.close(self.stand_in)
            except OSError:
                pass

    def is_idle(self) -> bool:
        """Return whether no operation uses the number, and none closes it."""
        return self.users == 0 and not self.closing

    def __repr__(self) -> str:
        return f'<Handle fd={self.fd} users={self.users} closing={self.closing}>'


# The handles by number. A list, because numbers are small and dense.
_handles: list[Handle | None] = []
# The number of handles that are being closed.
closing = 0


def _forget(handle: Handle) -> bool:
    """Take *handle* out of the table. Return False if it is not there, because this process was forked since.
    """
    if handle.fd >= len(_handles) or _handles[handle.fd] is not handle:
        return False
    _handles[handle.fd] = None
    return True


def handle_of(fd: int) -> Handle | None:
    """Return the handle of a number that is in use or being closed, else None."""
    # An idle handle says nothing about the number, so it counts as none.
    handle = _handles[fd] if 0 <= fd < len(_handles) else None
    return None if handle is None or handle.is_idle() else handle


def _is_open(fd: int) -> bool:
    """Return whether any file has the number *fd*. A sandbox that denies the question counts as yes."""
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError as error:
        return error.errno != errno.EBADF
    return True


def take(fd: int) -> Handle:
    """Take the number *fd*, which keeps its file until `Handle.let_go`. For a step of an operation, which has
    called `check_open` before. Raise EBADF if a thread is closing it, after its last use."""
    handle = _handles[fd] if 0 <= fd < len(_handles) else None
    if handle is None:
        handle = _add(fd)
    # A number whose close has begun may still be taken as long as it has users, because an operation of
    # several steps must be able to finish. After the last user it is gone.
    if handle.closing and handle._close is None:
        _refuse()
    handle.users += 1
    return handle


def _add(fd: int) -> Handle:
    """Return a handle for *fd* in the table, which grows if it must. Raise EBADF if *fd* is below zero."""
    if fd < 0:
        _refuse()
    if fd >= len(_handles):
        # No file has this number, so there is none to keep. The number may be any, so the table must not grow
        # for it.
        if not _is_open(fd):
            return Handle(fd)
        _handles.extend([None] * (fd + 1 - len(_handles)))
    fresh = Handle(fd)
    handle = _handles[fd]
    # The constructor may have run other code, or another thread may have been quicker.
    if handle is None:
        handle = _handles[fd] = fresh
    return handle


def _refuse() -> NoReturn:
    """Raise EBADF."""
    raise OSError(errno.EBADF, os.strerror(errno.EBADF))


@contextlib.contextmanager
def using(fd: int) -> Iterator[Handle]:
    """Keep the number *fd* the same file in this block, even if it is closed there. Raise EBADF if it is
    being closed already."""
    # After a fork the handles of the parent are forgotten first.
    generation()
    fd = operator.index(fd)
    check_open(fd)
    handle = take(fd)
    try:
        yield handle
    finally:
        handle.let_go()


def in_use(fd: int) -> bool:
    """Return whether an operation needs the number *fd*."""
    # After a fork the parent's operations do not count.
    generation()
    handle = handle_of(fd)
    return handle is not None and handle.users > 0


def is_closing(fd: int) -> bool:
    """Return whether the number *fd* is being closed."""
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


# The names of the files of those numbers that were in use when this process was forked.
inherited: dict[int, str | None] = {}


def file_of(fd: int) -> str | None:
    """Return the kernel's name of the file *fd*, or None. Its inode is not asked for, because a server may
    have to answer that."""
    try:
        return posix.readlink(f'/proc/self/fd/{fd}').removesuffix(' (deleted)')
    except OSError:
        return None


def _after_fork_in_child() -> None:
    # An operation on a number goes on in the parent, or is over, so no close waits for it here. Numbers that
    # the parent was closing are closed here now, because no code of this process knows them any more.
    global closing
    # The parent's writes never end here.
    for inode in all_inodes():
        inode.writes = Writes()
    # One by one: if there is no memory for one of them, the bell calls this function again, and it goes on
    # there.
    while _handles:
        handle = _handles[len(_handles) - 1]
        if handle is not None:
            # The close function belongs to an operation of the parent, and would run in its name.
            handle._close = None
            if handle.closing:
                handle._close_numbers()
            elif handle.users > 0:
                # The parent's operation may still change this file, and code that waits for the number in
                # this child has to know the file.
                inherited[handle.fd] = file_of(handle.fd)
        _handles.pop()
    closing = 0


listen(_after_fork_in_child)
