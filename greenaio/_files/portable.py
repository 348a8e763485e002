"""The thread way: what native AIO can't do, in a gevent ThreadPool of our own.

Not the hub's pool, for DNS lives in that one. `call` does one operation on an fd; `File` is what
``greenaio.File`` is where the extension was not built.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import posix  # not os: these are called as they are, whatever was patched
import stat as _stat
import warnings
from collections.abc import Callable, Sequence
from io import FileIO
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, cast

from gevent import get_hub, getcurrent, spawn
from gevent._hub_local import get_hub_if_exists
from gevent.exceptions import BlockingSwitchOutError

from greenaio._core.bell import generation, listen
from greenaio._core.ends import before_destroy, thrown, was_thrown
from greenaio._core.handle import Handle, check_open, file_of, handle_of, inherited, take, using
from greenaio._core.uninterrupted import REFUSED, is_uninterrupted
from greenaio._files.sharing import share

if TYPE_CHECKING:
    from gevent.threadpool import ThreadPool

StrPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

THREADS = 10    # per hub, as gevent's own pool
EXTENTS_MAX = 1024      # that `extents` tells at once
READ, WRITE = 1, 2      # the events of both loops


_warning: set[Any] = set()      # greenlets that report a file which was not closed


def warn_unclosed(source: object, stacklevel: int = 1) -> None:
    """Warn that *source* was not closed. *stacklevel* counts from the caller, as for `warnings.warn`.

    ``warnings.showwarning`` may itself forget a file. Its greenlet then reports no second one: each report
    would make the next, and where the recursion ends with RecursionError, a frame below would begin again.
    """
    try:
        me = getcurrent()
    except RuntimeError:                # the interpreter is being finalized
        return
    if me in _warning:
        return
    _warning.add(me)
    try:
        warnings.warn(f'unclosed file {source!r}', ResourceWarning, source=source, stacklevel=stacklevel + 1)
    finally:
        _warning.discard(me)


class _Job:
    """One call that a worker is to make. It is in `_jobs` until the call is over, or never begins."""

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
        # An exception is returned: gevent prints those that a pool's function raises.
        try:
            return self.function(self.fd, *self.args), None
        except BaseException as error:
            return None, error
        finally:
            self.end()

    def end(self) -> None:
        _jobs.discard(self)
        self.waiter = None
        handle, self.handle = self.handle, None
        if handle is not None:
            handle.let_go()


def flat(buffer: Any) -> memoryview:
    """The bytes of *buffer*, without the shape, which can't be cast away where there is a zero in it."""
    view = memoryview(buffer)
    return view.cast('B') if view.nbytes else memoryview(bytearray())


_jobs: set[_Job] = set()
_made = 0
_lost: dict[int, int] = {}      # inherited numbers: in which generation they were closed here
_watched: dict[Any, tuple[Any, int]] = {}       # watchers of `wait_for`: their hub, and the number


def _pool() -> ThreadPool:
    from gevent.threadpool import ThreadPool  # it takes longer than all of greenaio

    hub: Any = get_hub()
    if getcurrent() is hub:
        raise BlockingSwitchOutError('greenaio was called in the hub, where nobody can wait')
    if is_uninterrupted():
        raise BlockingSwitchOutError(REFUSED)
    pool: ThreadPool | None = hub.__dict__.get('_greenaio_pool')
    # In a forked child gevent mends its own pool at once, others only later: make a new one.
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
        spawn(pool.kill)                # it waits for the calls of its threads


def jobs() -> list[_Job]:
    """Return the calls that are not over yet."""
    return list(_jobs)


def jobs_made() -> int:
    """Return how many calls were handed to threads."""
    return _made


def call(function: Callable[..., Any], fd: int, *args: Any) -> Any:
    """Return ``function(fd, *args)``, called in a native thread while this greenlet waits.

    If the greenlet is killed during the call, the call goes on by itself. A negative *fd* is no file.
    """
    global _made
    pool = _pool()
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


def settle(fd: int) -> None:
    """Here nothing is known of writes that are under way."""


def working_directory() -> int:
    """Return a new O_PATH fd of the working directory."""
    return posix.open('.', os.O_PATH | os.O_CLOEXEC)


def _is_path_fd(fd: int) -> bool:
    """Whether *fd* is an O_PATH fd. If one of ours is none any more, a daemon has closed all numbers, and has
    opened files of its own on them."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH != 0
    except OSError:
        return False


class _Place:
    """Where a thread begins to look up a path: *dir_fd*, or the working directory of this moment."""

    __slots__ = ('_is_ours', 'dir_fd')

    def __init__(self, dir_fd: int | None) -> None:
        self._is_ours = False
        self.dir_fd = dir_fd
        if dir_fd is None:
            with contextlib.suppress(OSError):      # without a free fd it is that of later
                self.dir_fd = working_directory()
                self._is_ours = True

    def __del__(self) -> None:
        if self._is_ours and self.dir_fd is not None and _is_path_fd(self.dir_fd):
            posix.close(self.dir_fd)


_umask = 0
_umask_changes = 0


def learn_umask() -> None:
    """Learn the umask before `umask` changes it, unless a sandbox denies both."""
    global _umask
    with contextlib.suppress(OSError):
        _umask = posix.umask(0o077)     # for that moment a file gets no bit too many
        posix.umask(_umask)


def umask(mask: int, /) -> int:
    """`os.umask`. A file whose creation has been asked for and not begun gets no bit that the umask until now
    forbids."""
    global _umask, _umask_changes
    _umask_changes += 1
    old = posix.umask(mask)
    _umask = mask & 0o777
    return old


def open_here(path: StrPath, flags: int, mode: int, *, io_mode: str | None = None) -> int:
    """`open` that blocks this thread."""
    return posix.open(path, flags, mode)


def open(path: StrPath, flags: int, mode: int = 0o777, *, dir_fd: int | None = None,
         io_mode: str | None = None) -> int:
    """As ``os.open``, in a native thread. If the greenlet is killed during the call, the fd is closed."""
    opened: list[int] = []
    left: list[bool] = []
    place = _Place(dir_fd)
    changes, umask_then = _umask_changes, _umask

    def take_back() -> None:
        with contextlib.suppress(IndexError):       # pop() lets only one of the two threads have it
            posix.close(opened.pop())

    def work(_: int) -> None:
        narrowed = mode if changes == _umask_changes else mode & ~umask_then
        opened.append(posix.open(path, flags, narrowed, dir_fd=place.dir_fd))
        if left:
            take_back()

    try:
        call(work, -1 if dir_fd is None else dir_fd)
        return opened.pop()
    except BaseException:
        left.append(True)
        take_back()
        raise


def has_position(fd: int, event: int) -> bool:
    """Whether the file has a position that reads (READ) or writes (WRITE) move. Some files of FUSE and
    tracefs have none, and writes to seq_files of the kernel, such as /proc/self/comm, move none. This does
    not need the lock of the position, which another process may have."""
    try:
        (posix.preadv if event == READ else posix.pwritev)(fd, [], 0)   # no byte: this calls nothing
    except OSError as error:
        return error.errno != errno.ESPIPE
    return True


def wait_for(fd: int, event: int) -> None:
    """Wait in the loop until *fd*, one that epoll accepts, is readable (READ) or writable (WRITE)."""
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
            os.set_blocking(fd, blocking)   # libuv changes that
    check_kept(fd, forks)


def lose(fd: int) -> None:
    """*fd* is about to be closed: let greenlets that have waited for it since before a fork get EBADF. A loop
    that watches a closed number aborts the process."""
    now = generation()
    share(fd)                           # the next file of that number is not known
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
    """Raise EBADF if this process was forked since the `generation` *forks*, and *fd* closed here since, or
    given to another file.

    For a greenlet that has waited and uses the number again. The original goes on in the parent, and here the
    number may mean another file."""
    if not _is_kept(fd, forks):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def _is_kept(fd: int, forks: int) -> bool:
    if forks == generation():
        return True
    return _lost.get(fd, 0) <= forks and (fd not in inherited or file_of(fd) == inherited[fd])


def close(fd: int, *, may_wait: bool = False, is_forgotten: bool = False) -> None:
    """Close *fd*, once all operations that need its number are over. Waits for none of them."""
    check_open(fd)
    lose(fd)
    if handle_of(fd) is None:
        posix.close(fd)
        return
    handle = take(fd)                   # first: its last user, a worker, may let go of it now
    handle.close_with(Handle.close_number)
    handle.let_go()


def _after_fork_in_child() -> None:
    # The threads stayed with the parent, and gevent mends a pool only when its loop next runs.
    for job in list(_jobs):
        if job.result is not None:
            job.result.set((None, OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))))
        job.end()
    for _, fd in _watched.values():
        inherited[fd] = file_of(fd)


listen(_after_fork_in_child)


class File:
    """``greenaio.File`` where the extension was not built: the same, all of it by threads."""

    def __init__(self, path: StrPath, flags: int = os.O_RDONLY, mode: int = 0o666, *,
                 max_batch: int = 32, dir_fd: int | None = None) -> None:
        self.name: Any = os.fspath(path)
        self._fd = open(self.name, flags, mode, dir_fd=dir_fd)
        self._closefd = True

    @classmethod
    def from_fd(cls, fd: int, closefd: bool = False, *, max_batch: int = 32) -> File:
        posix.fstat(fd)
        self = cls.__new__(cls)
        self.name, self._fd, self._closefd = fd, fd, closefd
        return self

    @classmethod
    def open_for_io(cls, path: StrPath, flags: int, mode: str) -> File:
        return cls.from_fd(open(path, flags, 0o666, io_mode=mode))

    def close_for_io(self, fd: int, *, may_wait: bool, is_forgotten: bool) -> None:
        close(fd, may_wait=may_wait, is_forgotten=is_forgotten)

    def fileno(self) -> int:
        if self._fd < 0:
            raise ValueError('I/O operation on closed file')
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd < 0

    @property
    def direct(self) -> bool:
        return False

    @property
    def kind(self) -> int:
        return _stat.S_IFMT(posix.fstat(self.fileno()).st_mode)

    @property
    def _seek_may_wait(self) -> bool:
        return False            # nothing looked

    @property
    def device(self) -> int:
        st = posix.fstat(self.fileno())
        return st.st_rdev if _stat.S_ISBLK(st.st_mode) else st.st_dev

    @property
    def is_local(self) -> bool:
        return False            # nobody looked

    def _size(self, is_fresh: bool = False) -> int:
        return posix.fstat(self.fileno()).st_size

    @property
    def _is_answer(self) -> bool:
        return False            # nothing looked

    @property
    def alignment(self) -> int:
        return mmap.PAGESIZE if fcntl.fcntl(self.fileno(), fcntl.F_GETFL) & os.O_DIRECT else 1

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(function, self.fileno(), *args)
        except OSError as error:
            if isinstance(self.name, int) or was_thrown(error):
                raise
            raise OSError(error.errno, error.strerror, self.name) from None

    def pread(self, n: int, offset: int) -> bytes:
        return cast(bytes, self._call(_pread, n, offset))

    def read_cached(self, buffer: Any) -> int:
        return -1

    def begin_at_position(self, reading: bool, buffers: Sequence[Any]) -> Underway:
        return Underway(posix.readv if reading else posix.writev, self.fileno(), buffers)

    def begin(self, reading: bool, buffer: Any, offset: int, more: bool = False) -> Any:
        return None

    def end(self, begun: Any) -> int:
        raise NotImplementedError       # nothing was begun

    def preadv(self, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        return cast(int, self._call(posix.preadv, buffers, offset, flags))

    def pwrite(self, data: Any, offset: int) -> int:
        return cast(int, self._call(posix.pwrite, data, offset))

    def pwritev(self, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        return cast(int, self._call(posix.pwritev, buffers, offset, flags))

    def fsync(self) -> None:
        self._call(posix.fsync)

    def fdatasync(self) -> None:
        self._call(posix.fdatasync)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), self.name)   # Python has it not

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0 and self._closefd:
            close(fd)

    def __enter__(self) -> File:
        self.fileno()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, '_fd', -1) >= 0 and self._closefd:
            try:
                warn_unclosed(self, 2)
            finally:
                self.close()

    def __repr__(self) -> str:
        return f'<greenaio.File name={self.name!r} fd={self._fd}>'


class Underway:
    """A read(2) or write(2) at the file's own position, which goes on if a greenlet that waits is killed."""

    def __init__(self, function: Callable[..., int], fd: int, buffers: Sequence[Any]) -> None:
        self._error: BaseException | None = None
        self._work = spawn(self._run, function, fd, buffers)

    def _run(self, function: Callable[..., int], fd: int, buffers: Sequence[Any]) -> int:
        try:
            return cast(int, call(function, fd, buffers))
        except BaseException as error:  # not printed, but raised by `get`
            self._error = error
            return -1

    def get(self) -> int:
        try:
            result = self._work.get()
        except BaseException as error:
            thrown(error)
            raise
        if self._error is not None:
            raise self._error
        return result

    def withdraw(self) -> bool:
        return False


def read_cached(fd: int, buffer: Any) -> int:
    return -1


class Filling(bytearray):
    """What is to become bytes, where the extension was not built: those are a copy."""

    def resize(self, nbytes: int, /) -> None:
        del self[nbytes:]
        self.extend(bytes(nbytes - len(self)))

    def take(self, nbytes: int) -> bytes:
        return bytes(memoryview(self)[:nbytes])


def aligned_buffer(nbytes: int, alignment: int = 4096) -> memoryview:
    if nbytes < 0:
        raise ValueError(f'nbytes must not be negative, but is {nbytes}')
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f'alignment must be a power of two, not {alignment}')
    if alignment > mmap.PAGESIZE:
        raise ValueError('without the extension, alignment is a page at most')
    return memoryview(mmap.mmap(-1, max(nbytes, 1)))[:nbytes]


def _pread(fd: int, n: int, offset: int) -> bytes:
    try:
        return posix.pread(fd, n, offset)
    except OSError as error:
        if error.errno != errno.EINVAL or min(n, offset) < 0:
            raise
    buffer = aligned_buffer(n)          # it may be O_DIRECT, which refuses the memory of most bytes
    return bytes(buffer[:posix.preadv(fd, [buffer], offset)])


def pread(fd: int, n: int, offset: int, /) -> bytes:
    """As os.pread; by a thread."""
    return cast(bytes, call(_pread, fd, n, offset))


def preadv(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0, /) -> int:
    """As os.preadv; by a thread."""
    return cast(int, call(posix.preadv, fd, buffers, offset, flags))


def pwrite(fd: int, data: Any, offset: int, /) -> int:
    """As os.pwrite; by a thread."""
    return cast(int, call(posix.pwrite, fd, data, offset))


def pwritev(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0, /) -> int:
    """As os.pwritev; by a thread."""
    return cast(int, call(posix.pwritev, fd, buffers, offset, flags))


def fsync(fd: int) -> None:
    call(posix.fsync, fd)


def fdatasync(fd: int) -> None:
    call(posix.fdatasync, fd)


def ftruncate(fd: int, length: int, *, is_told: bool = False) -> None:
    call(posix.ftruncate, fd, length)


def posix_fallocate(fd: int, offset: int, length: int) -> None:
    call(posix.posix_fallocate, fd, offset, length)


def copy_file_range(src: int, dst: int, count: int, offset_src: int | None = None,
                    offset_dst: int | None = None) -> int:
    return cast(int, call(posix.copy_file_range, src, dst, count, offset_src, offset_dst))


def sendfile(out_fd: int, in_fd: int, offset: int | None, count: int) -> int:
    with using(in_fd), using(out_fd):   # also while it waits for the socket
        while True:
            try:
                return cast(int, call(posix.sendfile, out_fd, in_fd, offset, count))
            except BlockingIOError as error:
                if was_thrown(error):
                    raise
            wait_for(out_fd, WRITE)


def stat(path: int | StrPath, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> os.stat_result:
    place = _Place(dir_fd) if not isinstance(path, int) else None

    def work(_: int) -> os.stat_result:
        where = place.dir_fd if place is not None else dir_fd
        return posix.stat(path, dir_fd=where, follow_symlinks=follow_symlinks)

    return cast(os.stat_result, call(work, -1 if dir_fd is None else dir_fd))


def fstat(fd: int) -> os.stat_result:
    return cast(os.stat_result, call(posix.fstat, fd))


def readahead(fd: int, offset: int, count: int) -> None:
    call(posix.posix_fadvise, fd, offset, count, os.POSIX_FADV_WILLNEED)


def start_writing(fd: int, offset: int, nbytes: int) -> None:
    pass                        # Python has no call for it, and none is needed


def lseek(fd: int, offset: int, whence: int, is_shared: bool = False) -> int:
    return cast(int, call(posix.lseek, fd, offset, whence)) if is_shared else posix.lseek(fd, offset, whence)


def unlink(path: StrPath) -> None:
    call(lambda _: posix.unlink(path), -1)


def ioctl(fd: int, number: int, argument: bytes) -> bytes:
    memory = bytearray(argument)
    call(fcntl.ioctl, fd, number, memory, True)
    return bytes(memory)


def extents(fd: int, offset: int, end: int) -> list[tuple[int, bool]]:
    return cast(list[tuple[int, bool]], call(_extents, fd, offset, end))


def _extents(fd: int, offset: int, end: int) -> list[tuple[int, bool]]:
    found: list[tuple[int, bool]] = []
    while offset < end and len(found) < EXTENTS_MAX:
        try:
            data = min(posix.lseek(fd, offset, os.SEEK_DATA), end)
            hole = min(posix.lseek(fd, data, os.SEEK_HOLE), end) if data < end else end
        except OSError as error:
            if error.errno == errno.ENXIO:          # nothing comes any more
                data = hole = end
            elif found:
                return found
            else:
                raise
        found += [(n, is_data) for n, is_data in ((data - offset, False), (hole - data, True)) if n]
        offset = hole
    return found


def initialize(raw: Any, fd: int, mode: str, is_shared: bool = False) -> None:
    call(lambda _: FileIO.__init__(raw, fd, mode, False), fd)
