# cython: language_level=3, boundscheck=False, wraparound=False, binding=False, embedsignature=True, embedsignature.format=clinic
"""`File`: one open file, and the way that each operation on it goes, so that the hub never waits for a disk.

Native AIO serves O_DIRECT reads and overwrites of regular files and block devices, and fsync of both. Bytes
in the page cache are read inline, with RWF_NOWAIT. A file without a disk gets the plain call, inline. Every
other operation runs in a native thread. So does an operation that would have waited on another way, or was
refused there, because only the system call gives the true answer.

The functions at the end do the same for a raw fd. They remember nothing of its file, because numbers are used
again.
"""

import os
# `posix` has the plain calls, also while the functions of `os` are patched.
import posix
import stat

from greenaio._files import loop as _loop, sectors as alignment, sharing as _sharing
from greenaio._files.arguments import flat
from greenaio._files.unclosed import warn_unclosed

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINVAL, EOPNOTSUPP
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy
from posix.stat cimport S_ISDIR

from greenaio._core.context cimport BATCH_MAX, FDSYNC, FSYNC, PREAD, PREADV, PWRITE, PWRITEV
from greenaio._core.engine cimport Engine
from greenaio._core.handle cimport check_open, closing, is_closing
from greenaio._core.dispatch cimport ASK, THREAD
from greenaio._core.driver cimport Driver
from greenaio._core.hub cimport current_driver
from greenaio._core.memory cimport AlignedBuffer, Filling, scratch
from greenaio._core.request cimport IN_FLIGHT, RWF_APPEND, RWF_NOWAIT, Request, advance, iovec, new_request
from greenaio._files.arguments cimport c_int, failed
from greenaio._files.changes cimport (
    fallocate_file, hold_range, in_pages, shield_in, takes_turn, truncate_file, work_in,
)
from greenaio._files.closing cimport close_file
from greenaio._files.device cimport Device, coarse_ns, waited_in_hub
from greenaio._files.facts cimport ANSWER, APPEND, AT_ONCE, DIRECT, EVENTS, LOCKED, REGULAR, STORED, file_size
from greenaio._files.opening cimport open_file
from greenaio._files.route cimport (
    IN_LINE_MAX, Known, in_line, is_swapped_out, know, knows_block_devices, seek_may_wait, swap_is_in_use,
)
from greenaio._core.job cimport as_call, new_call
from greenaio._core.mailbox cimport WAITED_NS
from greenaio._core.threads cimport any_busy, withdraw

from greenaio._core.handle import using
from greenaio._core.memory import aligned_buffer

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <poll.h>
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <unistd.h>

    #define RESULT(call) ({ long r_ = (call); r_ < 0 ? -(long)errno : r_; })

    /* Return whether *fd* is open with O_DIRECT; no if it is not open, because a read will say so. */
    static inline int fd_is_direct(int fd)
    { int flags = fcntl(fd, F_GETFL); return flags >= 0 && flags & O_DIRECT; }

    /* Whether a sandbox denies pwritev2 and preadv2, in this order. */
    static int is_denied[2];

    /* Return whether the call itself is refused, and not this file. A call that is allowed says EBADF to fd
       -1. */
    static inline int denies(int reading, long result)
    {
        if (result != -ENOSYS && result != -EPERM)
            return 0;
        result = RESULT(syscall(reading ? SYS_preadv2 : SYS_pwritev2, -1, NULL, 0L, 0L, 0L, 0L));
        return is_denied[reading] = result == -ENOSYS || result == -EPERM;
    }

    static inline long vector_now(int reading, int fd, struct iovec *v, int n, int64_t offset, unsigned flags)
    {
        long result;
        /* No sandbox denies the oldest calls, so use them where they do. */
        if (flags == 0 && n == 1) {
            void *at = v->iov_base;
            size_t length = v->iov_len;
            return offset == -1 ? RESULT(reading ? read(fd, at, length) : write(fd, at, length))
                                : RESULT(reading ? pread(fd, at, length, offset) : pwrite(fd, at, length, offset));
        }
        if (flags == 0)
            return offset == -1 ? RESULT(reading ? readv(fd, v, n) : writev(fd, v, n))
                                : RESULT(reading ? preadv(fd, v, n, offset) : pwritev(fd, v, n, offset));
        if (flags == 8 /* RWF_NOWAIT */ && is_denied[reading])
            /* After this answer a thread does the read or write. */
            return -EOPNOTSUPP;
        result = RESULT(syscall(reading ? SYS_preadv2 : SYS_pwritev2, fd, v, (long)n, offset, 0L, flags));
        return flags == 8 && denies(reading, result) ? -EOPNOTSUPP : result;
    }

    /* Return whether a read of *fd* waits for nothing, as far as poll tells. If poll fails the answer is yes,
       and the read will say why. */
    static inline int is_ready(int fd)
    {
        struct pollfd one = { fd, POLLIN, 0 };
        return poll(&one, 1, 0) != 0;
    }

    /* Return whether *buffer* is a memoryview that owns nothing, so that pinning it keeps no memory alive.
       io.BufferedReader hands out such views, and may free the memory while the kernel still uses it. */
    static inline int is_ownerless(PyObject *buffer)
    { return PyMemoryView_Check(buffer) && PyMemoryView_GET_BASE(buffer) == NULL; }
    """
    const int AT_FDCWD
    const int ECANCELED
    const long SYS_pread64
    bint is_ready(int fd)
    bint is_ownerless(object buffer)
    bint fd_is_direct(int fd)
    long vector_now(bint reading, int fd, iovec *buffers, int n, int64_t offset, unsigned int flags)

cdef dict _ours = _sharing.ours

# Values of `File._fd` instead of an fd.
cdef enum:
    CLOSED = -1
    OPENING = -2

cdef enum:
    # Native AIO would drop this flag, so a thread makes the call.
    RWF_HIPRI = 1
    # In buffers. The kernel says EINVAL to more.
    IOV_MAX = 1024
    # In requests under way on a device. With as many, a sync runs in a thread.
    SYNCS_MAX = 4


@cython.final
cdef class File:
    """An open file whose reads and writes park the calling greenlet and never block the hub.

    ``File(path, flags, mode, dir_fd=fd)`` opens as ``os.open`` does. Add ``os.O_DIRECT`` for native AIO.
    Bytes then move without a copy if buffers, offsets and lengths are multiples of `alignment`, see
    `aligned_buffer`. Others work, too, and cost more. *max_batch* (1 to 32) is the greatest number of
    requests that may wait for each other to be submitted together.

    Any number of greenlets and hubs may use one File. Its methods raise OSError with the file's name,
    ValueError after `close`, and BlockingSwitchOutError when called in the hub itself. Only `close` works
    there.
    """

    cdef int _fd
    cdef Known _known
    cdef int _max_batch
    cdef bint _closefd
    cdef readonly object name

    def __cinit__(self):
        self._fd = CLOSED

    def __init__(self, path, flags=os.O_RDONLY, mode=0o666, *, max_batch=BATCH_MAX, dir_fd=None):
        if self._fd != CLOSED:
            raise ValueError('this File is open already')
        # The `__fspath__` of the path may call this again, and so may another greenlet during the open.
        self._fd = OPENING
        try:
            self._set_max_batch(max_batch)
            self.name = os.fspath(path)
            self._closefd = True
            self._open(self.name, c_int(flags), c_int(mode), AT_FDCWD if dir_fd is None else c_int(dir_fd), None)
        except BaseException:
            if self._fd < 0:
                self._fd = CLOSED
            raise

    @staticmethod
    def open_for_io(path, int flags, mode):
        """Open *path* for a file object, which closes the fd itself by `close_for_io`. Audit hooks see
        *mode*, the mode of the file object. Return the File. Raise OSError."""
        cdef File self = File.__new__(File)
        self._max_batch = BATCH_MAX
        try:
            self._open(os.fspath(path), flags, 0o666, AT_FDCWD, mode)
        except BaseException:
            if self._fd >= 0:
                close_file(self._fd, False)
            raise
        self.name = self._fd
        return self

    cdef int _open(self, path, int flags, int mode, int dir_fd, io_mode) except -1:
        cdef Known known = Known.__new__(Known)
        self._fd = open_file(path, flags, mode, dir_fd, io_mode, known)
        self._known = know(self._fd, path) if known.device is None else known
        return 0

    @staticmethod
    def from_fd(fd, closefd=False, *, max_batch=BATCH_MAX):
        """Return a File for the open *fd*. With *closefd*, `close` closes the fd, too. Whether the fd is open
        with O_DIRECT is asked here, once."""
        cdef File self = File.__new__(File)
        cdef int number = c_int(fd)
        self._set_max_batch(max_batch)
        self.name = number
        self._closefd = closefd
        self._known = know(number, number)
        self._fd = number
        return self

    cdef int _set_max_batch(self, max_batch) except -1:
        if not 1 <= c_int(max_batch) <= BATCH_MAX:
            raise ValueError(f'max_batch must be from 1 to {BATCH_MAX}, not {max_batch}')
        self._max_batch = c_int(max_batch)
        return 0

    cdef int _open_fd(self) except -1:
        """Return the fd. Raise ValueError if the file is closed."""
        if self._fd < 0:
            raise ValueError('I/O operation on closed file')
        return self._fd

    def pread(self, Py_ssize_t n, Py_ssize_t offset):
        """Read up to *n* bytes at *offset*, and return them as bytes. The result is shorter only when the
        result of ``os.pread`` would be."""
        return _pread(self._open_fd(), self._known, n, offset, self.name, self._max_batch)

    def preadv(self, buffers, Py_ssize_t offset, flags=0):
        """Read at *offset* into a sequence of writable *buffers*. Return the number of bytes read. *flags*
        are ``os.RWF_*``.

        If the greenlet is killed or timed out during the read, the kernel may still write into the buffers.
        They stay pinned until the kernel is done.
        """
        cdef int how = c_int(flags)
        # Look at the buffers first, because that may run code that closes this file.
        asked = _asked(True, buffers)
        return _vectored(True, self._open_fd(), self._known, asked, offset, how, self.name, self._max_batch)

    def read_cached(self, buffer):
        """Read into *buffer* at the file's own position, which the kernel keeps and moves, without a wait.

        Return the number of bytes read; or -1 - n if the page cache had n bytes and the rest would wait.
        Don't call this while another greenlet is about to move the position."""
        return _read_cached(self._open_fd(), self._known, buffer)

    def begin_at_position(self, bint reading, buffers):
        """Begin to read into *buffers*, or to write them, at the file's own position, by one read(2) or
        write(2) in a thread. Return its `Underway`."""
        cdef int fd = self._open_fd()
        return _begin_at_position(reading, fd, self._known, _asked(reading, buffers), self.name)

    def begin(self, bint reading, buffer, Py_ssize_t offset, bint more=False):
        """Begin a read into *buffer* or a write of it at *offset*, and wait for nothing. Return an object for
        `end`, which gives the result. Return None if one request is not enough; then call `preadv` or
        `pwrite`.

        *more* says that the caller begins another request at once. The kernel may get this request together
        with that one, or when `end` is called.

        To drop the returned object abandons the request, which keeps *buffer* pinned until it is done."""
        cdef Driver driver = current_driver()
        cdef int fd = self._open_fd()
        cdef Known known = self._known
        cdef Request request = new_request(PREAD if reading else PWRITE, fd, offset, 0, 1)
        cdef int way = THREAD
        driver.check_caller()
        if known.kind & (STORED | ANSWER) != STORED or offset < 0 or is_ownerless(buffer) or closing and is_closing(fd):
            return None
        request.pin(buffer)
        if not reading and takes_turn(known, request):
            return None
        if known.kind & DIRECT:
            if _is_misaligned(known, request):
                return None
            way = known.way(driver, request)
        request.file = known
        if way == THREAD:
            as_call(request)
            driver.begin_by_thread(request, known.device.pool())
            return driver, request, driver.forks
        if way == ASK:
            request.ask()
        request.share = driver.engine.share(known.device.number, known.device.limit)
        request.may_move = True
        driver.begin(request, more)
        return driver, request, driver.forks

    def end(self, begun):
        """Wait for the request of *begun*, which `begin` returned. Return the number of bytes moved, or minus
        the errno. The result is -ECANCELED if another hub has begun it, or the process was forked. Call this
        once."""
        cdef Driver driver
        cdef Request request
        cdef int64_t result
        driver, request, forks = begun
        if driver is None or request is None:
            raise TypeError('that is not what begin() returned')
        # After a fork, the memory that the request has read into may be wiped in the child.
        if driver is not current_driver() or driver.forks != forks:
            return -ECANCELED
        result = driver.end(request)
        if request.asked and self._known is not None:
            self._known.answered(request, result)
        return result

    def pwrite(self, data, Py_ssize_t offset):
        """Write bytes-like *data* at *offset*. Return the number of bytes written, which is less than asked
        only when the result of ``os.pwrite`` would be. If the greenlet is killed during the write, it may
        still happen."""
        cdef int fd = self._open_fd()
        _check_place(data, offset, self.name)
        return _vectored(False, fd, self._known, _only(data), offset, 0, self.name, self._max_batch)

    def pwritev(self, buffers, Py_ssize_t offset, flags=0):
        """Write a sequence of *buffers* at *offset*. Return the number of bytes written. *flags* are
        ``os.RWF_*``. If the greenlet is killed during the write, it may still happen."""
        cdef int how = c_int(flags)
        asked = _asked(False, buffers)
        return _vectored(False, self._open_fd(), self._known, asked, offset, how, self.name, self._max_batch)

    def fsync(self):
        """Make data and metadata durable. Raise OSError if that failed. An error is never retried, because
        the data that it was about may be lost."""
        _sync(self._open_fd(), self._known, FSYNC, self.name)

    def fdatasync(self):
        """Make data durable, and the metadata that is needed to read it. Raise OSError as `fsync` does."""
        _sync(self._open_fd(), self._known, FDSYNC, self.name)

    def fallocate(self, mode, Py_ssize_t offset, Py_ssize_t length):
        """Allocate or zero *length* bytes at *offset*, or punch a hole there. *mode* is the mode of
        fallocate(2). The call takes its turn with misaligned writes. Raise OSError, with EOPNOTSUPP if the
        file system can't do it."""
        cdef int how = c_int(mode)
        cdef int fd = self._open_fd()
        current_driver().check_caller()

        def work():
            return fallocate_file(fd, self._known, how, offset, length, mine)

        mine = hold_range(fd, self._known, offset, <uint64_t>offset + <uint64_t>length)
        cdef int64_t result = work_in(mine, fd, work)
        if result < 0:
            raise failed(result, self.name)

    def fileno(self):
        """Return the file descriptor."""
        return self._open_fd()

    @property
    def closed(self):
        """Whether `close` was called."""
        return self._fd < 0

    @property
    def direct(self):
        """Whether reads and writes take native AIO: O_DIRECT on a regular file or block device."""
        return self._known is not None and bool(self._known.kind & DIRECT)

    @property
    def kind(self):
        """The file's type, as ``stat.S_IFMT`` gives it."""
        self._open_fd()
        return stat.S_IFMT(self._known.mode)

    @property
    def _seek_may_wait(self):
        """Whether a read may hold the lock that a seek takes."""
        return seek_may_wait(self._known)

    @property
    def device(self):
        """The number of the device that has the bytes: ``st_dev``, or ``st_rdev`` of a block device."""
        self._open_fd()
        return self._known.device.number

    @property
    def is_local(self):
        """Whether the file is on no FUSE or network file system, so that no server has to be asked about
        it."""
        self._open_fd()
        return self._known.device.is_local

    def _size(self, bint is_fresh=False):
        """Return the size in bytes, as far as the kernel has it in memory. If the file *is_fresh*, which
        means that nothing was read since its open, return the size at the open."""
        cdef int fd = self._open_fd()
        return self._known.size if is_fresh else file_size(fd)

    @property
    def _is_answer(self):
        """Whether the file has no stored bytes, and the kernel makes a new answer for each read."""
        return self._known.kind & ANSWER != 0

    @property
    def alignment(self):
        """The number of bytes that O_DIRECT wants memory, offsets and lengths to be multiples of; 1 for a
        file that is not open with O_DIRECT."""
        self._open_fd()
        return max(self._known.align, self._known.align_memory) if self._known.kind & DIRECT else 1

    def close(self):
        """Close the file. A second call does nothing.

        The call waits for no request; requests in flight go on to their end. It waits for the close itself if
        that may write data or free the file's blocks, because the file was open for writing or has no name
        left. In the hub it makes the plain call."""
        self._close(True, False)

    def _stalled(self, uint64_t ns):
        self._known.stalled(ns)

    def close_for_io(self, int fd, *, bint may_wait, bint is_forgotten):
        """Close the number *fd*, which the file object does not use any more. See `close_file` for the
        arguments."""
        close_file(fd, may_wait, is_forgotten, self._known)

    cdef int _close(self, bint may_wait, bint is_forgotten) except -1:
        cdef int fd = self._fd
        self._fd = CLOSED
        if fd >= 0 and self._closefd:
            close_file(fd, may_wait, is_forgotten, self._known)
        return 0

    def __enter__(self):
        self._open_fd()
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __del__(self):
        if self._fd >= 0 and self._closefd:
            try:
                warn_unclosed(self)
            finally:
                # A warning may be an error, which has to leave the fd closed, too.
                self._close(False, True)

    def __repr__(self):
        return f'<greenaio.File name={self.name!r} fd={self._fd}>'


# The ways ----------------------------------------------------------------------------------------

cdef int64_t _by_thread(Driver driver, Request request, Known known) except? -4096:
    """Have a thread make the request. Return bytes moved, or minus the errno."""
    request.file = known
    as_call(request)
    return driver.perform_by_thread(request, known.pool())


cdef int64_t _by_aio(Driver driver, Request request, Known known) except? -4096:
    """Submit the request by native AIO. Return bytes moved, or minus the errno. If native AIO declines the
    request, the driver moves it to its next way."""
    request.share = driver.engine.share(known.device.number, known.device.limit)
    request.file = known
    request.may_move = True
    return driver.perform(request)


cdef int64_t _direct(Driver driver, Request request, Known known) except? -4096:
    """Make an O_DIRECT read or write. Return bytes moved, or minus the errno. If the file system can say that
    it would wait, it is asked to say so."""
    cdef int way = known.way(driver, request)
    cdef int64_t result
    if way == THREAD:
        return _by_thread(driver, request, known)
    if way == ASK:
        request.ask()
    result = _by_aio(driver, request, known)
    if request.asked:
        known.answered(request, result)
    return result


cdef int _pin(Request request, buffers) except -1:
    """Pin one buffer or a sequence of them, as the opcode of the request says."""
    if request.opcode == PREAD or request.opcode == PWRITE:
        request.pin(buffers)
    else:
        request.pin_all(buffers)
    return 0


cdef object _pread(int fd, Known known, Py_ssize_t n, int64_t offset, name, int max_batch):
    """Return up to *n* bytes at *offset*. *known* is None for a raw fd. Raise OSError."""
    cdef AlignedBuffer memory
    cdef Driver driver = current_driver()
    cdef Request request
    cdef int64_t got, before
    if closing:
        check_open(fd)
    if n < 0 or offset < 0:
        raise failed(-EINVAL, name)
    if not (fd_is_direct(fd) if known is None else known.kind & DIRECT):
        return _pread_buffered(driver, fd, known, n, offset, name)
    if known is None:
        known = know(fd, name)
    before = _misfit(known, offset)
    if before or _misfit(known, n):
        memory = scratch(_span(known, <uint64_t>before + n))
    else:
        # Read into memory of our own, so that no code sees the bytes of an abandoned read arrive.
        memory = scratch(n)
    request = new_request(PREAD, fd, offset - before, 0, max_batch)
    request.pin(memory)
    got = _direct(driver, request, known)
    if got < 0:
        raise failed(got, name)
    return PyBytes_FromStringAndSize(memory.address + before, max(0, min(n, got - before)))


cdef bint _lacks_threads(Known known) except -1:
    """Return whether a read that misses the page cache would wait for a thread. Then the read may not run
    inline: a miss starts read-ahead, which waits if the queue of the device is full."""
    return any_busy() and known.device.pool().all_busy()


cdef int64_t _read_in_line(int fd, iovec *buffers, int count, uint64_t wanted, int64_t offset, unsigned int flags,
                           bint once, int64_t *last) except -1:
    """Read inline the part of *wanted* bytes that the page cache has. Return its length in bytes. If the rest
    is missing, *buffers* begin behind that part afterwards.

    *last* is set to the kernel's last answer: bytes, 0 at the end of the file, or minus the errno, which is
    EAGAIN or EOPNOTSUPP if the rest would wait. *offset* -1 is the file's own position. With *once* there is
    one call."""
    cdef uint64_t began = coarse_ns()
    cdef int64_t got = 0, more
    while True:
        more = vector_now(True, fd, buffers, count, offset, flags)
        if coarse_ns() - began > WAITED_NS:
            waited_in_hub(fd, began)
        if more > 0:
            got += more
        if more <= 0 or once or <uint64_t>got == wanted:
            last[0] = more
            return got
        advance(buffers, count, more)
        if offset >= 0:
            offset += more


cdef object _pread_buffered(Driver driver, int fd, Known known, Py_ssize_t n, int64_t offset, name):
    """Return up to *n* bytes at *offset* of a file that is not O_DIRECT: inline if the page cache has them,
    otherwise by a thread."""
    cdef bytes data
    cdef char *memory
    cdef iovec room
    cdef int64_t got = 0, more
    cdef bint asks = True
    driver.check_caller()
    if known is None and (any_busy() or knows_block_devices()):
        known = know(fd, name)
    if n > IN_LINE_MAX:
        return _pread_large(driver, fd, known, n, offset, name)
    # No other code has this object so far, so it may be written to.
    data = PyBytes_FromStringAndSize(NULL, n)
    memory = PyBytes_AS_STRING(data)
    if known is not None:
        if in_line(known, n, fd, offset):
            got = _pread_now(driver, fd, memory, n, offset)
            if got < 0:
                raise failed(got, name)
            return data if got == n else data[:got]
        asks = not known.kind & (ANSWER | LOCKED) and not _lacks_threads(known)
    if asks:
        room.iov_base, room.iov_len = memory, n
        got = _read_in_line(fd, &room, 1, n, offset, RWF_NOWAIT, False, &more)
        if more >= 0 or got and more != -EAGAIN and more != -EOPNOTSUPP:
            driver.end_in_line()
            # Return the bytes also if an error came after them, as preadv(2) does. The next read will raise
            # it.
            return data if got == n else data[:got]
        if more != -EAGAIN and more != -EOPNOTSUPP:
            raise failed(more, name)
    got = _pread_rest(driver, fd, known, data, memory, n, offset, got, name)
    return data if got == n else data[:got]


cdef object _pread_large(Driver driver, int fd, Known known, Py_ssize_t n, int64_t offset, name):
    """Return up to *n* bytes, more than `IN_LINE_MAX`. A short result is cut without a copy."""
    cdef Filling data = Filling.__new__(Filling, n)
    return data.take(_pread_rest(driver, fd, known, data, PyBytes_AS_STRING(<object>data._data), n, offset, 0, name))


cdef int64_t _pread_rest(Driver driver, int fd, Known known, keep, char *memory, Py_ssize_t n, int64_t offset,
                         int64_t got, name) except -1:
    """Read the rest of *n* bytes, of which *got* are there, to *memory*, a part of *keep*. Return the number
    of bytes that are there now."""
    cdef int64_t more
    cdef Request request
    if known is None:
        known = know(fd, name)
    memory += got
    n -= got
    offset += got
    if known.kind & EVENTS:
        more = _pread_event(driver, fd, known, memory, n, offset)
    elif in_line(known, n, fd, offset):
        more = _pread_now(driver, fd, memory, n, offset)
    else:
        request = new_call(fd, keep, SYS_pread64, fd, <long>memory, n, offset)
        # `dump` shows these two.
        request.offset, request.nbytes = offset, n
        more = driver.perform_by_thread(request, known.device.pool())
    if more < 0 and (got == 0 or more == -ECANCELED):
        raise failed(more, name)
    return got + max(more, 0)


cdef inline int64_t _pread_now(Driver driver, int fd, char *memory, Py_ssize_t n, int64_t offset) except? -4096:
    """Read inline by a plain call. Return bytes read, or minus the errno."""
    cdef iovec room
    room.iov_base, room.iov_len = memory, n
    return _done_in_line(driver, vector_now(True, fd, &room, 1, offset, 0))


cdef int64_t _pread_event(Driver driver, int fd, Known known, char *memory, Py_ssize_t n, int64_t offset) except? -4096:
    """Read a file that may wait for an event. Return bytes read, or minus the errno. A buffer of its own
    keeps the memory if the greenlet is killed."""
    cdef AlignedBuffer buffer = scratch(n)
    cdef Request request = new_request(PREAD, fd, offset, 0, 1)
    cdef int64_t got
    request.pin(buffer)
    got = _read_answer(driver, request, known, buffer)
    if got > 0:
        memcpy(memory, buffer.address, got)
    return got


cdef tuple _sequence(bint reading, buffers):
    """Return the present buffers as a tuple. The kernel moves bytes to and from these, also if the list
    changes later."""
    if type(buffers) is tuple:
        return buffers
    if type(buffers) is list:
        return tuple(buffers)
    if not hasattr(type(buffers), '__getitem__') or isinstance(buffers, dict):
        raise TypeError(f"{'preadv' if reading else 'pwritev'}() arg 2 must be a sequence")
    # Ask by index up to the length, because some sequences never end an iteration.
    return tuple([buffers[i] for i in range(len(buffers))])


cdef object _asked(bint reading, buffers):
    """Return *buffers* as a tuple; or the only buffer, as in most calls."""
    if type(buffers) is list and len(<list>buffers) == 1:
        return _only((<list>buffers)[0])
    cdef tuple sequence = _sequence(reading, buffers)
    return _only(sequence[0]) if len(sequence) == 1 else sequence


cdef inline object _only(buffer):
    """Return *buffer* in the form of `_asked`. A tuple is no buffer; in another tuple, pinning it will say
    so."""
    return (buffer,) if type(buffer) is tuple else buffer


cdef int _check_place(data, Py_ssize_t offset, name) except -1:
    """Raise OSError if a pwrite has a negative *offset*. For pwritev2, which the call becomes, an offset of
    -1 would be the file's own position."""
    if offset < 0:
        # If *data* is not bytes-like, raise TypeError instead.
        memoryview(data)
        raise failed(-EINVAL, name)
    return 0


cdef object _vectored(bint reading, int fd, Known known, asked, int64_t offset, int flags, name,
                      int max_batch):
    """Read into or write *asked*, the buffers as `_asked` or `_only` return them, at *offset*. Return bytes
    moved. Raise OSError."""
    cdef Driver driver = current_driver()
    cdef Request request
    cdef bint many = type(asked) is tuple
    cdef int64_t got
    if closing:
        check_open(fd)
    if many:
        memory = _steady(asked, reading)
    else:
        memory = _bounce(asked, reading) if is_ownerless(asked) else asked
    if known is None:
        known = know(fd, name)
    request = new_request(_opcode(reading, many), fd, offset, flags, max_batch)
    _pin(request, memory)
    if known.kind & DIRECT and not flags & RWF_HIPRI and offset >= 0:
        if (request.buffer_count <= IOV_MAX and not flags & (RWF_NOWAIT | RWF_APPEND)
                and _is_misaligned(known, request)):
            driver.check_caller()
            steady = memory if many else (memory,)
            if reading:
                got = _read_misaligned(driver, known, request, steady)
            else:
                got = _write_misaligned(known, request, steady)
        elif not reading and takes_turn(known, request):
            driver.check_caller()
            got = _write_in_turn(known, request)
        else:
            got = _direct(driver, request, known)
    elif reading:
        got = _read_buffered(driver, request, known, memory)
    elif known.kind & STORED and takes_turn(known, request):
        driver.check_caller()
        got = _write_in_turn(known, request)
    else:
        got = _write_buffered(driver, request, known)
    if got < 0:
        raise failed(got, name)
    if reading and memory is not asked:
        if many:
            _copy_back(memory, asked, got)
        else:
            _copy_back((memory,), (asked,), got)
    return got


cdef inline int _opcode(bint reading, bint many) noexcept:
    if many:
        return PREADV if reading else PWRITEV
    return PREAD if reading else PWRITE


# Requests that O_DIRECT does not take as they are ------------------------------------------------

cdef int64_t _misfit(Known known, int64_t n) noexcept:
    """Return the distance of *n* from the last border of a sector, in bytes. In memory each offset fits."""
    return 0 if known.device.in_memory else n & (known.align - 1)


cdef int64_t _span(Known known, uint64_t nbytes) noexcept:
    """Return *nbytes*, rounded up to whole sectors."""
    cdef uint64_t more = known.align - 1
    return (nbytes + more) & ~more


cdef bint _is_misaligned(Known known, Request request) noexcept:
    """Return whether O_DIRECT would refuse the memory, the offset or the length of the request."""
    cdef uint64_t memory = 0, length = 0
    cdef int i
    # A file in memory takes every request, and a write with O_APPEND has no offset.
    if known.device.in_memory or known.kind & APPEND:
        return False
    for i in range(request.buffer_count):
        memory |= <uint64_t>request.buffers[i].iov_base
        length |= request.buffers[i].iov_len
    if request.buffer_count > 1:
        # The length of each buffer has to fit, too, because the next buffer goes on where this one ends.
        memory |= length
    return ((length | <uint64_t>request.offset) & (known.align - 1)) != 0 or memory & (known.align_memory - 1) != 0


cdef int64_t _read_misaligned(Driver driver, Known known, Request asked, buffers) except? -4096:
    """Read whole sectors into a buffer of our own, and copy the bytes asked for. Return bytes read, or minus
    the errno."""
    cdef int64_t before = _misfit(known, asked.offset)
    cdef AlignedBuffer memory = scratch(_span(known, before + asked.nbytes))
    cdef Request request = new_request(PREAD, asked.fd, asked.offset - before, asked.flags, asked.max_batch)
    cdef int64_t got
    request.pin(memory)
    got = _direct(driver, request, known)
    if got < 0:
        return got
    got = max(0, min(<int64_t>asked.nbytes, got - before))
    view = memoryview(memory)[before:before + got]
    for buffer in buffers:
        target = flat(buffer)[:len(view)]
        target[:] = view[:len(target)]
        view = view[len(target):]
    return got


def _hold_to(int fd, Known known, uint64_t start, uint64_t end):
    """Return the range from *start* to *end*, held; without an end if the write makes the file longer.

    Earlier writes of greenlets that were waited for may have made the file shorter. So look at the size again
    when the range is granted, and take a longer range if need be."""
    cdef bint grows
    while True:
        grows = known.kind & REGULAR and end > <uint64_t>file_size(fd)
        mine = hold_range(fd, known, start, alignment.EVERYTHING if grows else end)
        if grows or not known.kind & REGULAR or end <= <uint64_t>file_size(fd):
            return mine
        mine.let_go()


def _write_misaligned(Known known, Request asked, buffers):
    """Write by reading and writing whole sectors, in the range that it holds. Return bytes written, or minus
    the errno. The data is copied first, so the caller's buffers may change."""
    data = b''.join([flat(buffer) for buffer in buffers])
    cdef int fd = asked.fd
    cdef int flags = asked.flags
    # Past 2^63 the kernel returns the right error.
    cdef uint64_t offset = asked.offset, end = offset + len(data)
    cdef uint64_t start = offset - _misfit(known, offset)

    def aligned(bint reading, memory, at):
        cdef Request request = new_request(
            PREAD if reading else PWRITE, fd, at, 0 if reading else flags, BATCH_MAX)
        request.pin(memory)
        if not reading:
            request.count_in(mine.writes, mine)
        return _direct(current_driver(), request, known)

    def work():
        span = aligned_buffer(_span(known, end - start))
        size = (lambda: file_size(fd)) if known.kind & REGULAR else (lambda: alignment.EVERYTHING)
        return alignment.write(data, offset, known.align, size, lambda memory, at: aligned(True, memory, at),
                               lambda memory, at: aligned(False, memory, at),
                               lambda size: truncate_file(fd, known, size, mine), span)

    mine = _hold_to(fd, known, start, start + _span(known, end - start))
    return work_in(mine, fd, work)


cdef object _shield_in_turn(Known known, Request request):
    """Return the `Shielded` of an aligned or buffered write, when greenlets hold ranges of the file. A write
    at the file's own position holds the whole file, because the position may have moved when the write
    begins."""
    cdef bint direct = known.kind & DIRECT and not request.flags & RWF_HIPRI
    cdef uint64_t start = request.offset, end = start + request.nbytes

    def work():
        try:
            request.count_in(mine.writes, mine)
            if direct:
                return _direct(current_driver(), request, known)
            return _write_buffered(current_driver(), request, known)
        finally:
            request.end_write_unless_under_way()

    if known.kind & APPEND or request.flags & RWF_APPEND or request.offset < 0:
        start, end = 0, alignment.EVERYTHING
    elif not direct:
        start, end = in_pages(start, end)
    mine = _hold_to(request.fd, known, start, end)
    return shield_in(mine, request.fd, work)


cdef object _write_in_turn(Known known, Request request):
    return _shield_in_turn(known, request).get()


# At the file's own position ----------------------------------------------------------------------

cdef int64_t _read_cached(int fd, Known known, buffer) except? -4096:
    """Do the work of `File.read_cached`. *known* is None for a raw fd, of which nothing is remembered,
    because numbers are used again."""
    cdef Driver driver = current_driver()
    cdef Py_buffer view
    cdef iovec room
    cdef int64_t got, last = 0
    driver.check_caller()
    if fd not in _ours:
        # Another process or thread may hold the lock of the position.
        return -1
    if known is None and (any_busy() or knows_block_devices() or swap_is_in_use()):
        known = know(fd, fd)
    if known is None:
        if fd_is_direct(fd):
            # Under O_DIRECT the kernel waits for the disk, also with RWF_NOWAIT.
            return -1
    elif known.kind & (STORED | DIRECT | LOCKED) != STORED or known.kind & (ANSWER | AT_ONCE) == ANSWER:
        return -1
    elif _lacks_threads(known):
        return -1
    PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
    cdef bint is_answer = known is not None and known.kind & ANSWER != 0
    cdef unsigned int flags = 0 if is_answer or known is not None and known.device.in_memory else RWF_NOWAIT
    if view.len > IN_LINE_MAX or known is not None and is_swapped_out(known, fd, -1, view.len):
        PyBuffer_Release(&view)
        return -1
    room.iov_base, room.iov_len = view.buf, view.len
    try:
        got = _read_in_line(fd, &room, 1, view.len, -1, flags, is_answer, &last)
    finally:
        PyBuffer_Release(&view)
    if last < 0:
        return -1 - got
    try:
        driver.end_in_line()
    except BaseException:
        # The greenlet was killed in `end_in_line`, so undo its read. If the fd is not ours any more there was
        # a fork, and another process may read on.
        if fd in _ours:
            posix.lseek(fd, -got, os.SEEK_CUR)
        raise
    return got


@cython.final
cdef class Underway:
    """A read(2) or write(2) at the file's own position, which runs in a thread.

    The kernel moves the position when the bytes have landed. Until then a call that takes the lock of the
    position would wait for the disk, so the hub may not make one."""

    cdef Driver _driver
    cdef Request _request
    # Used instead of these two: the `Shielded` of a write that works in a range.
    cdef object _shield
    # The buffers of the caller, and the memory that is used instead of buffers that own nothing.
    cdef object _asked
    cdef object _memory
    cdef object _name
    cdef int64_t _result

    def get(self):
        """Wait for the call. Return the number of bytes moved. Raise OSError. If this greenlet is killed, the
        call goes on, and another greenlet may wait for it."""
        cdef bint reading
        if self._shield is not None:
            self._result = self._shield.get()
        elif self._request is not None:
            self._result = self._driver.end(self._request)
        if self._result < 0:
            raise failed(self._result, self._name)
        reading = self._request is not None and self._request.direction == 0
        if reading and self._memory is not self._asked:
            if type(self._asked) is tuple:
                _copy_back(self._memory, self._asked, self._result)
            else:
                _copy_back((self._memory,), (self._asked,), self._result)
        return self._result

    def withdraw(self):
        """Take the call of a killed greenlet back if no thread has begun it. Return whether that was possible;
        then the call never happens."""
        if self._request is None or self._request.state != IN_FLIGHT or not withdraw(self._request):
            return False
        self._driver.engine.take_back(self._request)
        self._request.release()
        return True


cdef object _begin_at_position(bint reading, int fd, Known known, asked, name):
    """Do the work of `File.begin_at_position`. A call that waits for no disk runs inline, and its `Underway`
    has the result."""
    cdef Driver driver = current_driver()
    cdef Underway one = Underway.__new__(Underway)
    cdef bint many = type(asked) is tuple
    cdef Request request = new_request(_opcode(reading, many), fd, -1, 0, 1)
    driver.check_caller()
    if many:
        one._memory = _steady(asked, reading)
    else:
        one._memory = _bounce(asked, reading) if is_ownerless(asked) else asked
    one._asked, one._name = asked, name
    _pin(request, one._memory)
    if in_line(known, request.nbytes, fd, -1) or not reading and _means_its_writer(request, known):
        one._result = _done_in_line(driver, _now(request, 0))
        if reading and one._memory is not asked:
            _copy_back(one._memory if many else (one._memory,), asked if many else (asked,), one._result)
    elif not reading and known.kind & STORED and takes_turn(known, request):
        one._shield = _shield_in_turn(known, request)
    else:
        request.file = known
        as_call(request)
        one._driver, one._request = driver, request
        driver.begin_by_thread(request, known.pool())
    return one


# Buffered ----------------------------------------------------------------------------------------

cdef int64_t _read_buffered(Driver driver, Request request, Known known, memory) except? -4096:
    """Read inline the bytes that the page cache has, and the rest by a thread. Return bytes read, or minus
    the errno."""
    cdef uint64_t wanted = request.nbytes
    cdef int64_t got = 0, more = -EAGAIN
    driver.check_caller()
    if request.flags & RWF_NOWAIT or in_line(known, wanted, request.fd, request.offset) and _has_place(request, known):
        return _done_in_line(driver, _now(request, request.flags))
    if wanted <= IN_LINE_MAX and not known.kind & (DIRECT | ANSWER | LOCKED) and not _lacks_threads(known):
        got = _read_in_line(request.fd, request.buffers, request.buffer_count, wanted, request.offset,
                            request.flags | RWF_NOWAIT, False, &more)
        if more != -EAGAIN and more != -EOPNOTSUPP:
            return _done_in_line(driver, got if got else more)
        request.skip(got)
    if known.kind & ANSWER:
        return _read_answer(driver, request, known, memory)
    more = _by_thread(driver, request, known)
    # In a forked child the answer is ECANCELED. Raise that, because a short read would look like the end of
    # the file.
    if more < 0:
        return got if got and more != -ECANCELED else more
    return got + more


cdef int64_t _read_answer(Driver driver, Request request, Known known, memory) except? -4096:
    """Read a file of a file system that `answers`, with one call. Return bytes read, or minus the errno.

    A read that waits for an event, such as one of /proc/kmsg, would keep a thread. If its greenlet is killed,
    the thread would still take the next event. So the greenlet first waits in the loop. But trace_pipe may
    still have the rest of a line when poll says that there is nothing; a read with O_NONBLOCK finds that out.
    Other processes that share the open file may see that flag. They see it under libuv, too, which sets it
    for each wait."""
    cdef int fd = request.fd
    cdef int64_t result
    if not known.kind & EVENTS or is_ready(fd) or not os.get_blocking(fd):
        return _by_thread(driver, request, known)
    with using(fd):
        while not is_ready(fd):
            os.set_blocking(fd, False)
            try:
                result = _by_thread(driver, request, known)
            finally:
                os.set_blocking(fd, True)
            if result != -EAGAIN:
                return result
            _loop.wait_for(fd, _loop.READ)
            request = new_request(request.opcode, fd, request.offset, request.flags, 1)
            _pin(request, memory)
        return _by_thread(driver, request, known)


cdef int64_t _write_buffered(Driver driver, Request request, Known known) except? -4096:
    """Write inline if the file has no disk, otherwise by a thread. Return bytes written, or minus the
    errno."""
    cdef int64_t result
    driver.check_caller()
    if (request.flags & RWF_NOWAIT or in_line(known, request.nbytes, request.fd, request.offset)
            and _has_place(request, known) or _means_its_writer(request, known)):
        result = _now(request, request.flags)
        if request.writes is not None:
            # End the write first, because `_done_in_line` may wait for the next turn of the hub.
            request.end_write()
        return _done_in_line(driver, result)
    return _by_thread(driver, request, known)


cdef bint _has_place(Request request, Known known) noexcept:
    """Return whether the request has an offset or the file is stored. A pipe or socket has no offset, so a
    request without one may wait there. With an offset, the kernel returns an error at once."""
    return request.offset >= 0 or known.kind & STORED


cdef bint _means_its_writer(Request request, Known known) noexcept:
    """Return whether the request writes the 0 that moves the writing thread into a control group. Only a call
    in this thread moves this thread."""
    return (known.kind & ANSWER and request.buffer_count == 1 and 0 < request.nbytes <= 2
            and (<char *>request.buffers.iov_base)[0] == c'0' and known.device.file_system in ('cgroup', 'cgroup2'))


cdef int64_t _done_in_line(Driver driver, int64_t result) except? -4096:
    """Tell the driver that a call ran inline, which may let other greenlets run. Return *result*."""
    driver.end_in_line()
    return result


cdef int64_t _now(Request request, unsigned int flags) noexcept:
    """Make the system call in this thread. Return bytes moved, or minus the errno."""
    cdef bint reading = request.opcode == PREAD or request.opcode == PREADV
    return vector_now(reading, request.fd, request.buffers, request.buffer_count, request.offset, flags)


cdef object _sync(int fd, Known known, int opcode, name):
    """Make the file durable as *opcode* says, FSYNC or FDSYNC. *known* is None for a raw fd. Raise
    OSError."""
    cdef Driver driver = current_driver()
    cdef Request request
    cdef int64_t result
    if closing:
        check_open(fd)
    if fd < 0:
        raise ValueError(f'file descriptor cannot be a negative integer ({fd})')
    if known is None:
        known = know(fd, name)
    if in_line(known, 0) and (not S_ISDIR(known.mode) or known.device.in_memory):
        driver.check_caller()
        (posix.fdatasync if opcode == FDSYNC else posix.fsync)(fd)
        driver.end_in_line()
        return
    request = new_request(opcode, fd, 0, 0, BATCH_MAX)
    if known.kind & STORED and driver.has_aio() and driver.engine.context.supports(opcode) and not (
            _is_crowded(driver, known.device)):
        result = _by_aio(driver, request, known)
    else:
        result = _by_thread(driver, request, known)
    if result < 0:
        raise failed(result, name)


cdef bint _is_crowded(Driver driver, Device device) except -1:
    """Return whether a sync should run in a thread. The kernel makes the syncs of native AIO one after the
    other, on the processor that submits them, which is the hub's."""
    return driver.engine.share(device.number, device.limit).admitted + device.pool().busy() >= SYNCS_MAX


cdef object _steady(buffers, bint reading):
    """Return *buffers*, with memory of our own instead of each buffer that is ownerless."""
    for buffer in buffers:
        if is_ownerless(buffer):
            return [_bounce(buffer, reading) if is_ownerless(buffer) else buffer
                    for buffer in buffers]
    return buffers


cdef object _bounce(buffer, bint reading):
    """Return memory of our own for an ownerless *buffer*, with its bytes unless it is for reading."""
    bounce = aligned_buffer(buffer.nbytes)
    if not reading:
        bounce[:] = flat(buffer)
    return bounce


cdef _copy_back(steady, buffers, Py_ssize_t nbytes):
    """Copy the *nbytes* that were read from the memory of our own into the caller's buffers."""
    cdef Py_ssize_t n
    for bounce, buffer in zip(steady, buffers):
        n = min(nbytes, memoryview(buffer).nbytes)
        if bounce is not buffer:
            flat(buffer)[:n] = bounce[:n]
        nbytes -= n


# The same for a raw fd ---------------------------------------------------------------------------

def pread(fd, Py_ssize_t n, Py_ssize_t offset, /):
    """Read up to *n* bytes at *offset* of the file *fd*, and return them as bytes. The result is shorter only
    at the end of the file, or when the result of os.pread would be.

    Raises OSError.
    """
    return _pread(c_int(fd), None, n, offset, None, BATCH_MAX)


def preadv(fd, buffers, Py_ssize_t offset, flags=0, /):
    """Read at *offset* into a sequence of writable *buffers*. Return the number of bytes read.

    *flags* are ``os.RWF_*``; a flag that can't be honoured raises OSError (EOPNOTSUPP).
    """
    return _vectored(True, c_int(fd), None, _asked(True, buffers), offset, c_int(flags), None, BATCH_MAX)


def read_cached(fd, buffer):
    """Do the work of `File.read_cached` for a raw fd."""
    return _read_cached(c_int(fd), None, buffer)


def pwrite(fd, data, Py_ssize_t offset, /):
    """Write bytes-like *data* at *offset*. Return the number of bytes written. Raise OSError."""
    cdef int number = c_int(fd)
    _check_place(data, offset, None)
    return _vectored(False, number, None, _only(data), offset, 0, None, BATCH_MAX)


def pwritev(fd, buffers, Py_ssize_t offset, flags=0, /):
    """Write a sequence of *buffers* at *offset*. Return the number of bytes written.

    *flags* are ``os.RWF_DSYNC``, ``os.RWF_APPEND`` and the like; a flag that can't be honoured raises
    OSError.
    """
    return _vectored(False, c_int(fd), None, _asked(False, buffers), offset, c_int(flags), None, BATCH_MAX)


def fsync(fd):
    """Make data and metadata of the file *fd* durable. Raise OSError."""
    _sync(c_int(fd), None, FSYNC, None)


def fdatasync(fd):
    """Make data of the file *fd* durable, and the metadata that is needed to read it. Raise OSError."""
    _sync(c_int(fd), None, FDSYNC, None)
