"""`read` and `write` at the kernel's own file position, which stays in the kernel.

Others look there: gunicorn and ``sendfile`` ask ``lseek(fd, 0, SEEK_CUR)``. But a thread inside read(2) holds
the position, and the hub's lseek would wait for it. So what takes a thread is a positional request between
two lseeks, and greenlets that use one fd take turns. What epoll accepts waits for the loop, as gevent does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import posix  # not os: these are called as they are, whatever was patched
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gevent._fileobjectcommon import cancel_wait_ex
from gevent._hub_local import get_hub_if_exists
from gevent.event import Event
from gevent.exceptions import BlockingSwitchOutError
from gevent.monkey import get_original
from greenlet import getcurrent, greenlet

from greenaio._fallback import using, wait_for

try:
    from greenaio import _calls, _file
except ImportError:
    from greenaio import _fallback as _calls  # type: ignore[no-redef]
    from greenaio import _fallback as _file  # type: ignore[no-redef]

native_sleep = get_original('time', 'sleep')

READ, WRITE = 1, 2              # what both loops call them
MEMORY = 1                      # the device number's major part of /dev/null, /dev/zero, /dev/urandom
ANOTHER_LOOK = 0.005            # seconds: how often who waits for another thread's greenlet looks
PIPE_BUF = 4096                 # bytes: a pipe that poll says is writable takes as much without waiting

class Turn:
    """What one greenlet has at a time, first come, first served; and who has it may take it again.

    ``if turn.owner is None: turn.owner = getcurrent()`` takes it, else `wait` says whether it is to be given
    back, with `leave`. (gevent's RLock does the same, at three times the price of what it protects.)
    """

    __slots__ = ('_process', 'closer', 'finalizing', 'owner', 'queue')

    def __init__(self) -> None:
        self.owner: greenlet | None = None
        self.queue: deque[tuple[greenlet, Event]] = deque()
        self.closer: greenlet | None = None     # others who had to wait meanwhile get EBADF
        self.finalizing = False     # nobody waits any more
        self._process = os.getpid()

    def wait(self) -> bool:
        """Wait until this greenlet has the turn; return False if it had it already. Raises OSError (EBADF)
        when it comes too late, because somebody closes what this is the turn of."""
        me = getcurrent()
        if self.owner is me:
            return False
        if self._process != os.getpid():        # who had it, or waits for it, is the parent's
            self._process = os.getpid()
            self.owner = self.closer = None
            self.queue.clear()
        if not can_wait():
            return self._wait_natively(me)
        mine = me, Event()
        self.queue.append(mine)
        try:
            while self.owner is not me:
                if self.owner is None and self.queue[0] is mine:        # another thread left meanwhile
                    self.queue.popleft()
                    self.owner = me
                else:
                    mine[1].wait(ANOTHER_LOOK)  # the owner may be in another thread: then no loop tells us
        except BaseException:           # killed, timed out
            if mine in self.queue:
                self.queue.remove(mine)
            else:
                self.leave()            # it was ours already
            raise
        if self.closer not in (None, me):
            self.leave()
            raise cancel_wait_ex()
        return True

    def _wait_natively(self, me: greenlet) -> bool:
        """In a thread without a hub: it is another thread's turn, and will pass."""
        if get_hub_if_exists() is me:
            raise BlockingSwitchOutError('the hub can\'t wait for its turn with a file')
        while self.owner is not None:
            native_sleep(ANOTHER_LOOK / 50)
        self.owner = me
        return True

    def leave(self) -> None:
        """Give the turn to the next."""
        if self.queue:
            self.owner, event = self.queue.popleft()
            event.set()
        else:
            self.owner = None


_is_fresh_child = False


def can_wait() -> bool:
    """Whether the caller is a greenlet whose hub can serve others while it waits.

    Not in a forked child before its hub has run for another reason: between fork and exec, as in
    `gevent.subprocess`, it would run the parent's greenlets there.
    """
    if _is_fresh_child or sys.is_finalizing():
        return False
    hub = get_hub_if_exists()
    return hub is not None and getcurrent() is not hub


def _after_fork_in_child() -> None:
    global _is_fresh_child
    hub = get_hub_if_exists()
    if hub is not None and hub.loop is not None:
        _is_fresh_child = True
        hub.loop.run_callback(_hub_runs)


def _hub_runs() -> None:
    global _is_fresh_child
    _is_fresh_child = False


os.register_at_fork(after_in_child=_after_fork_in_child)

turns: dict[int, Turn] = {}             # by fd, as long as somebody has it


@contextlib.contextmanager
def turn_of(fd: int) -> Iterator[None]:
    """One greenlet at a time, for each fd."""
    turn = turns.setdefault(fd, Turn())
    mine = False
    try:
        if turn.owner is None:
            turn.owner = getcurrent()
            mine = True
        else:
            mine = turn.wait()
        yield
    finally:
        if mine:
            turn.leave()
        if turn.owner is None and turns.get(fd) is turn:
            del turns[fd]


def _wait(fd: int, mode: int, event: int) -> bool:
    """Wait for the loop to say that *fd* is ready, if it is one that epoll accepts; return whether so."""
    if stat.S_ISDIR(mode) or stat.S_ISCHR(mode) and os.major(posix.fstat(fd).st_rdev) == MEMORY:
        return False                    # os itself: an error, or /dev/null and the like
    if os.get_blocking(fd):
        wait_for(fd, event)
    return True


def _at_position(fd: int, call: Callable[[int], int]) -> int:
    """Make a positional request of what is asked for at the kernel's position, and move that on."""
    with using(fd), turn_of(fd):
        at = os.lseek(fd, 0, os.SEEK_CUR)
        moved = call(at)
        if moved and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND and call.__name__ == 'writing':
            at = _calls.facts(fd)[1] - moved    # the kernel wrote at the end
        os.lseek(fd, at + moved, os.SEEK_SET)
    return moved


def read(fd: int, n: int) -> bytes:
    mode = _calls.facts(fd)[0]
    data = b''

    def reading(at: int) -> int:
        nonlocal data
        data = _file.pread(fd, n, at)
        return len(data)

    if _is_stored(mode):
        _at_position(fd, reading)
        return data
    if n > 0:
        _wait(fd, mode, READ)
    return posix.read(fd, n)


def readv(fd: int, buffers: Sequence[Any]) -> int:
    mode = _calls.facts(fd)[0]
    if _is_stored(mode):
        return _at_position(fd, lambda at: _file.preadv(fd, buffers, at))
    _wait(fd, mode, READ)
    return posix.readv(fd, buffers)


def write(fd: int, data: Any) -> int:
    mode = _calls.facts(fd)[0]

    def writing(at: int) -> int:
        return _file.pwrite(fd, data, at)

    if _is_stored(mode):
        return _at_position(fd, writing)
    return _write_all(fd, mode, memoryview(data).cast('B'))


def writev(fd: int, buffers: Sequence[Any]) -> int:
    mode = _calls.facts(fd)[0]

    def writing(at: int) -> int:
        return _file.pwritev(fd, buffers, at)

    if _is_stored(mode):
        return _at_position(fd, writing)
    if stat.S_ISFIFO(mode) and os.get_blocking(fd):
        return _write_all(fd, mode, memoryview(b''.join(buffers)))
    _wait(fd, mode, WRITE)
    return posix.writev(fd, buffers)


def _is_stored(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def _write_all(fd: int, mode: int, data: memoryview) -> int:
    """As a blocking write, in pieces that a pipe which is ready takes without waiting."""
    written = 0
    while _wait(fd, mode, WRITE) and os.get_blocking(fd) and len(data) - written > PIPE_BUF:
        try:
            written += posix.write(fd, data[written:written + PIPE_BUF])
        except OSError:
            if written:
                return written
            raise
    try:
        return written + posix.write(fd, data[written:])
    except OSError:
        if written:
            return written
        raise
