# cython: language_level=3, boundscheck=False, wraparound=False, binding=False, embedsignature=True, embedsignature.format=clinic
"""`File`: one open file, and which way each operation on it goes, so that the hub never waits for a disk.

Native AIO serves O_DIRECT reads and overwrites of regular files and block devices, and fsync of both. What the
page cache has is read in line, with RWF_NOWAIT. What has no disk behind it is asked as it is. Everything
else takes a native thread, and so does what would have waited in one of the other ways, or was refused
there: only the system call gives the true answer. The functions at the end are the same for a raw fd,
of which nothing is remembered: numbers are reused.
"""

import os
import posix            # for what may be patched in os
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

from greenaio._files.calls cimport (
    AT_FDCWD, close_file, fallocate_file, hold_range, in_pages, open_file, shield_in,
    takes_turn, truncate_file, work_in,
)
from greenaio._core.context cimport BATCH_MAX, FDSYNC, FSYNC, PREAD, PREADV, PWRITE, PWRITEV
from greenaio._core.engine cimport Engine
from greenaio._core.handle cimport check_open, closing, is_closing
from greenaio._core.driver cimport ASK, THREAD, Driver
from greenaio._core.hub cimport current_driver
from greenaio._core.memory cimport AlignedBuffer, Filling, scratch
from greenaio._core.request cimport IN_FLIGHT, RWF_APPEND, RWF_NOWAIT, Request, advance, iovec, new_request
from greenaio._files.route cimport (
    ANSWER, APPEND, AT_ONCE, DIRECT, EVENTS, IN_LINE_MAX, LOCKED, REGULAR, STORED, Device, Known, c_int,
    coarse_ns, failed, file_size, in_line, is_ready, is_swapped_out, know, knows_block_devices,
    seek_may_wait, swap_is_in_use, waited_in_hub,
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
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <unistd.h>

    #define RESULT(call) ({ long r_ = (call); r_ < 0 ? -(long)errno : r_; })

    static inline int fd_is_direct(int fd)      /* no for what is no open file: a read will say so */
    { int flags = fcntl(fd, F_GETFL); return flags >= 0 && flags & O_DIRECT; }

    static int is_denied[2];        /* pwritev2, preadv2: by a sandbox */

    /* Whether the call itself is refused, and not this file: of no file it would say EBADF else. */
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
        if (flags == 0 && n == 1) {     /* the oldest calls, which no sandbox denies */
            void *at = v->iov_base;
            size_t length = v->iov_len;
            return offset == -1 ? RESULT(reading ? read(fd, at, length) : write(fd, at, length))
                                : RESULT(reading ? pread(fd, at, length, offset) : pwrite(fd, at, length, offset));
        }
        if (flags == 0)
            return offset == -1 ? RESULT(reading ? readv(fd, v, n) : writev(fd, v, n))
                                : RESULT(reading ? preadv(fd, v, n, offset) : pwritev(fd, v, n, offset));
        if (flags == 8 /* RWF_NOWAIT */ && is_denied[reading])
            return -EOPNOTSUPP;         /* then a thread does it */
        result = RESULT(syscall(reading ? SYS_preadv2 : SYS_pwritev2, fd, v, (long)n, offset, 0L, flags));
        return flags == 8 && denies(reading, result) ? -EOPNOTSUPP : result;
    }

    /* A memoryview that owns nothing pins nothing: io.BufferedReader hands those out, and frees the
       memory while the kernel is still at it. */
    static inline int is_ownerless(PyObject *buffer)
    { return PyMemoryView_Check(buffer) && PyMemoryView_GET_BASE(buffer) == NULL; }
    """
    const int ECANCELED
    const long SYS_pread64
    bint is_ownerless(object buffer)
    bint fd_is_direct(int fd)
    long vector_now(bint reading, int fd, iovec *buffers, int n, int64_t offset, unsigned int flags)

cdef dict _ours = _sharing.ours

cdef enum:
    CLOSED = -1                 # in place of an fd
    OPENING = -2

cdef enum:
    RWF_HIPRI = 1               # AIO would drop it
    IOV_MAX = 1024              # buffers; of more the kernel says EINVAL
    SYNCS_MAX = 4               # requests under way on a device: with as many, a sync takes a thread


@cython.final
cdef class File:
    """An open file whose reads and writes park the calling greenlet, not the hub.

    ``File(path, flags, mode, dir_fd=fd)`` opens as ``os.open`` does. Add ``os.O_DIRECT`` for native AIO: buffers,
    offsets and lengths that are multiples of `alignment` then move without a copy, see `aligned_buffer`;
    others work and cost more. *max_batch* (1 to 32) bounds how many requests may wait for each other to be
    submitted together.

    May be used by any number of greenlets and hubs. Raises OSError with the file's name, ValueError when
    closed, BlockingSwitchOutError when called in the hub itself; only `close` works there.
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
        self._fd = OPENING              # what is asked for its path may come back here, and so may another greenlet
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
        """Open *path* for a file object, which closes the fd itself by `close_for_io`. Audit hooks see its *mode*."""
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
        """Make a File of an open *fd*; with *closefd*, closing it closes the fd. Whether it is O_DIRECT is
        asked here once."""
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
        if self._fd < 0:
            raise ValueError('I/O operation on closed file')
        return self._fd

    def pread(self, Py_ssize_t n, Py_ssize_t offset):
        """Read up to *n* bytes at *offset*; fewer only as ``os.pread`` would. Returns bytes."""
        return _pread(self._open_fd(), self._known, n, offset, self.name, self._max_batch)

    def preadv(self, buffers, Py_ssize_t offset, flags=0):
        """Read at *offset* into a sequence of writable *buffers*; return bytes read. *flags*:
        ``os.RWF_*``.

        If the greenlet is killed or timed out meanwhile, the kernel may still write into the buffers;
        they stay pinned until it is done.
        """
        cdef int how = c_int(flags)
        asked = _asked(True, buffers)   # first: it may run code that closes this
        return _vectored(True, self._open_fd(), self._known, asked, offset, how, self.name, self._max_batch)

    def read_cached(self, buffer):
        """Read into *buffer* at the file's own position, which the kernel keeps and moves on, without waiting.

        Return bytes read; or -1 - n when the page cache had n of them, and what follows would wait. Don't call
        it while another greenlet is about to move the position."""
        return _read_cached(self._open_fd(), self._known, buffer)

    def begin_at_position(self, bint reading, buffers):
        """Have a thread read into, or write, *buffers* at the file's own position, by one read(2) or write(2).
        Return the `Underway` that it is."""
        cdef int fd = self._open_fd()
        return _begin_at_position(reading, fd, self._known, _asked(reading, buffers), self.name)

    def begin(self, bint reading, buffer, Py_ssize_t offset, bint more=False):
        """Ask for a read or write of *buffer*, and wait for nothing: `end` gives the result of what this
        returns. None where it takes more than one request; then `preadv` or `pwrite` has to do. With *more* to
        be asked for at once, the kernel may get it together with that, or when `end` is called.

        Dropping what it returned abandons the request, which keeps *buffer* pinned until it is done."""
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
        """Wait for what `begin` returned; return bytes moved, or minus the errno. What another hub began is
        -ECANCELED. Once."""
        cdef Driver driver
        cdef Request request
        cdef int64_t result
        driver, request, forks = begun
        if driver is None or request is None:
            raise TypeError('that is not what begin() returned')
        if driver is not current_driver() or driver.forks != forks:     # forked: what was read may be wiped here
            return -ECANCELED
        result = driver.end(request)
        if request.asked and self._known is not None:
            self._known.answered(request, result)
        return result

    def pwrite(self, data, Py_ssize_t offset):
        """Write bytes-like *data* at *offset*; return bytes written, fewer than asked only as
        ``os.pwrite`` would. If the greenlet is killed meanwhile, the write may still happen."""
        cdef int fd = self._open_fd()
        _check_place(data, offset, self.name)
        return _vectored(False, fd, self._known, _only(data), offset, 0, self.name, self._max_batch)

    def pwritev(self, buffers, Py_ssize_t offset, flags=0):
        """Write a sequence of *buffers* at *offset*; return bytes written. *flags*: ``os.RWF_*``.
        If the greenlet is killed meanwhile, the write may still happen."""
        cdef int how = c_int(flags)
        asked = _asked(False, buffers)
        return _vectored(False, self._open_fd(), self._known, asked, offset, how, self.name, self._max_batch)

    def fsync(self):
        """Make data and metadata durable. An error is never retried: what it was about may be lost."""
        _sync(self._open_fd(), self._known, FSYNC, self.name)

    def fdatasync(self):
        """Make data durable, and what metadata is needed to read it. Errors as for `fsync`."""
        _sync(self._open_fd(), self._known, FDSYNC, self.name)

    def fallocate(self, mode, Py_ssize_t offset, Py_ssize_t length):
        """Allocate, zero or punch a hole into *length* bytes at *offset*: *mode* is that of fallocate(2). Takes
        its turn with misaligned writes. Raises OSError, EOPNOTSUPP where the file system can't."""
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
        """The file descriptor."""
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
        """Whether a read may have the lock that a seek takes."""
        return seek_may_wait(self._known)

    @property
    def device(self):
        """The device that the bytes are on: ``st_dev``, or ``st_rdev`` of a block device."""
        self._open_fd()
        return self._known.device.number

    @property
    def is_local(self):
        """Whether no server has to be asked about it: not on FUSE, not on a network file system."""
        self._open_fd()
        return self._known.device.is_local

    def _size(self, bint is_fresh=False):
        """The size in bytes, as far as the kernel has it in memory. Of a file that *is_fresh*, which means that nothing was
        read since its open, it is the size at the open."""
        cdef int fd = self._open_fd()
        return self._known.size if is_fresh else file_size(fd)

    @property
    def _is_answer(self):
        """Whether the kernel makes up what is read, and each read is another answer."""
        return self._known.kind & ANSWER != 0

    @property
    def alignment(self):
        """What O_DIRECT wants memory, offsets and lengths to be multiples of, in bytes; 1 for a file
        that is not O_DIRECT."""
        self._open_fd()
        return max(self._known.align, self._known.align_memory) if self._known.kind & DIRECT else 1

    def close(self):
        """Close the file; twice is fine. Waits for no request: those in flight go on to their end. Waits for
        the close itself where that may write data or free the file's blocks: the file was open for writing, or
        it has no name left. In the hub it makes the plain call."""
        self._close(True, False)

    def _stalled(self, uint64_t ns):
        self._known.stalled(ns)

    def close_for_io(self, int fd, *, bint may_wait, bint is_forgotten):
        """Close the number *fd*, which the file object does not use any more."""
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
            finally:                    # a warning may be an error
                self._close(False, True)

    def __repr__(self):
        return f'<greenaio.File name={self.name!r} fd={self._fd}>'


# The ways ----------------------------------------------------------------------------------------

cdef int64_t _by_thread(Driver driver, Request request, Known known) except? -4096:
    request.file = known
    as_call(request)
    return driver.perform_by_thread(request, known.pool())


cdef int64_t _by_aio(Driver driver, Request request, Known known) except? -4096:
    """If native AIO declines it, the driver moves it to its next way."""
    request.share = driver.engine.share(known.device.number, known.device.limit)
    request.file = known
    request.may_move = True
    return driver.perform(request)


cdef int64_t _direct(Driver driver, Request request, Known known) except? -4096:
    """An O_DIRECT read or write. Where the file system can say that it would wait, it is asked to."""
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
    if request.opcode == PREAD or request.opcode == PWRITE:
        request.pin(buffers)
    else:
        request.pin_all(buffers)
    return 0


cdef object _pread(int fd, Known known, Py_ssize_t n, int64_t offset, name, int max_batch):
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
        memory = scratch(n)     # ours: nobody sees an abandoned read land
    request = new_request(PREAD, fd, offset - before, 0, max_batch)
    request.pin(memory)
    got = _direct(driver, request, known)
    if got < 0:
        raise failed(got, name)
    return PyBytes_FromStringAndSize(memory.address + before, max(0, min(n, got - before)))


cdef bint _lacks_threads(Known known) except -1:
    """Whether a read that misses the page cache would wait for a thread. A miss starts read-ahead, which waits if the
    queue of the device is full."""
    return any_busy() and known.device.pool().all_busy()


cdef int64_t _read_in_line(int fd, iovec *buffers, int count, uint64_t wanted, int64_t offset, unsigned int flags,
                           bint once, int64_t *last) except -1:
    """Read what the page cache has of *wanted* bytes; return how many. If that is not all, *buffers* begin behind it.

    *last* is set to the kernel's last answer: bytes, 0 at the end of the file, or minus the errno: EAGAIN or
    EOPNOTSUPP if the rest would wait. *offset* -1 is the file's own position. With *once* there is one call."""
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
    data = PyBytes_FromStringAndSize(NULL, n)       # no other code has it so far
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
            return data if got == n else data[:got]     # after an error too, as preadv: the next read tells
        if more != -EAGAIN and more != -EOPNOTSUPP:
            raise failed(more, name)
    got = _pread_rest(driver, fd, known, data, memory, n, offset, got, name)
    return data if got == n else data[:got]


cdef object _pread_large(Driver driver, int fd, Known known, Py_ssize_t n, int64_t offset, name):
    """A short result is cut without a copy."""
    cdef Filling data = Filling.__new__(Filling, n)
    return data.take(_pread_rest(driver, fd, known, data, PyBytes_AS_STRING(<object>data._data), n, offset, 0, name))


cdef int64_t _pread_rest(Driver driver, int fd, Known known, keep, char *memory, Py_ssize_t n, int64_t offset,
                         int64_t got, name) except -1:
    """Read the rest of *n* bytes, of which *got* are there, to *memory*, a part of *keep*. Return how many bytes are
    there now."""
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
        request.offset, request.nbytes = offset, n      # shown by `dump`
        more = driver.perform_by_thread(request, known.device.pool())
    if more < 0 and (got == 0 or more == -ECANCELED):
        raise failed(more, name)
    return got + max(more, 0)


cdef inline int64_t _pread_now(Driver driver, int fd, char *memory, Py_ssize_t n, int64_t offset) except? -4096:
    cdef iovec room
    room.iov_base, room.iov_len = memory, n
    return _done_in_line(driver, vector_now(True, fd, &room, 1, offset, 0))


cdef int64_t _pread_event(Driver driver, int fd, Known known, char *memory, Py_ssize_t n, int64_t offset) except? -4096:
    cdef AlignedBuffer buffer = scratch(n)
    cdef Request request = new_request(PREAD, fd, offset, 0, 1)
    cdef int64_t got
    request.pin(buffer)
    got = _read_answer(driver, request, known, buffer)
    if got > 0:
        memcpy(memory, buffer.address, got)
    return got


cdef tuple _sequence(bint reading, buffers):
    """What *buffers* are now: the kernel moves bytes to and from these, whatever becomes of the list."""
    if type(buffers) is tuple:
        return buffers
    if type(buffers) is list:
        return tuple(buffers)
    if not hasattr(type(buffers), '__getitem__') or isinstance(buffers, dict):
        raise TypeError(f"{'preadv' if reading else 'pwritev'}() arg 2 must be a sequence")
    return tuple([buffers[i] for i in range(len(buffers))])     # some would never say that they are at an end


cdef object _asked(bint reading, buffers):
    """*buffers* as a tuple; or the only one that there is, as in most calls."""
    if type(buffers) is list and len(<list>buffers) == 1:
        return _only((<list>buffers)[0])
    cdef tuple sequence = _sequence(reading, buffers)
    return _only(sequence[0]) if len(sequence) == 1 else sequence


cdef inline object _only(buffer):
    """A tuple is no buffer, and pinning it will say so."""
    return (buffer,) if type(buffer) is tuple else buffer


cdef int _check_place(data, Py_ssize_t offset, name) except -1:
    """For pwrite. To pwritev2, which it becomes, an offset of -1 is the file's own position."""
    if offset < 0:
        memoryview(data)                # what is no data is a TypeError
        raise failed(-EINVAL, name)
    return 0


cdef object _vectored(bint reading, int fd, Known known, asked, int64_t offset, int flags, name,
                      int max_batch):
    """*asked*: what `_asked` or `_only` made of the buffers."""
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


# What O_DIRECT does not take as it is ------------------------------------------------------------

cdef int64_t _misfit(Known known, int64_t n) noexcept:
    return 0 if known.device.in_memory else n & (known.align - 1)


cdef int64_t _span(Known known, uint64_t nbytes) noexcept:
    """*nbytes* in whole sectors."""
    cdef uint64_t more = known.align - 1
    return (nbytes + more) & ~more


cdef bint _is_misaligned(Known known, Request request) noexcept:
    cdef uint64_t memory = 0, length = 0
    cdef int i
    if known.device.in_memory or known.kind & APPEND:   # the one takes all; the other knows no offset
        return False
    for i in range(request.buffer_count):
        memory |= <uint64_t>request.buffers[i].iov_base
        length |= request.buffers[i].iov_len
    if request.buffer_count > 1:
        memory |= length                # then each buffer begins where one ended
    return ((length | <uint64_t>request.offset) & (known.align - 1)) != 0 or memory & (known.align_memory - 1) != 0


cdef int64_t _read_misaligned(Driver driver, Known known, Request asked, buffers) except? -4096:
    """Through a buffer of ours."""
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
    """Hold the range to *end*; to the end of all if the write makes the file longer, once the range is granted: those
    before it may have made it shorter."""
    cdef bint grows
    while True:
        grows = known.kind & REGULAR and end > <uint64_t>file_size(fd)
        mine = hold_range(fd, known, start, alignment.EVERYTHING if grows else end)
        if grows or not known.kind & REGULAR or end <= <uint64_t>file_size(fd):
            return mine
        mine.let_go()


def _write_misaligned(Known known, Request asked, buffers):
    data = b''.join([flat(buffer) for buffer in buffers])
    cdef int fd = asked.fd
    cdef int flags = asked.flags
    cdef uint64_t offset = asked.offset, end = offset + len(data)    # past 2^63 the kernel says what it is
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
    """The `Shielded` of an aligned or buffered write, while some greenlet holds a part of the file. At the file's own
    position it holds all of it, because the position may have moved when the write begins."""
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
    """See `File.read_cached`. Without *known* nothing is remembered of the file, because numbers are reused."""
    cdef Driver driver = current_driver()
    cdef Py_buffer view
    cdef iovec room
    cdef int64_t got, last = 0
    driver.check_caller()
    if fd not in _ours:                 # another process or thread may have the lock of the position
        return -1
    if known is None and (any_busy() or knows_block_devices() or swap_is_in_use()):
        known = know(fd, fd)
    if known is None:
        if fd_is_direct(fd):            # with RWF_NOWAIT, too, the kernel waits for the disk
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
    except BaseException:           # killed there: it has read nothing
        if fd in _ours:             # else there was a fork, and another process may read on
            posix.lseek(fd, -got, os.SEEK_CUR)
        raise
    return got


@cython.final
cdef class Underway:
    """A read(2) or write(2) at the file's own position, by a thread. The kernel moves the position when the bytes
    have landed, and until then a call of the hub that takes the lock of the position would wait for the disk."""

    cdef Driver _driver
    cdef Request _request
    cdef object _shield                 # instead of these two: the greenlet that works in a range
    cdef object _asked                  # the buffers ...
    cdef object _memory                 # ... and what stands for those that own nothing
    cdef object _name
    cdef int64_t _result

    def get(self):
        """Wait for it; return bytes moved. Raises OSError. If this greenlet is killed, the call goes on, and
        another greenlet may wait for it."""
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
        """Whether it never happens, because no thread has begun with it. For a greenlet that was killed."""
        if self._request is None or self._request.state != IN_FLIGHT or not withdraw(self._request):
            return False
        self._driver.engine.take_back(self._request)
        self._request.release()
        return True


cdef object _begin_at_position(bint reading, int fd, Known known, asked, name):
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
    if more < 0:                        # in a forked child it is over: a short read would look like the end
        return got if got and more != -ECANCELED else more
    return got + more


cdef int64_t _read_answer(Driver driver, Request request, Known known, memory) except? -4096:
    """Read a file that the kernel makes up, with one call.

    A read that waits for an event, as of /proc/kmsg, would keep a thread, and if its greenlet is killed it would
    take the next event all the same. So it waits in the loop first. But when poll says that there is nothing,
    trace_pipe may still have the rest of a line: a read with O_NONBLOCK finds out. (Who shares the open file may
    see that flag, as they do under libuv, which sets it for each wait.)"""
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
    cdef int64_t result
    driver.check_caller()
    if (request.flags & RWF_NOWAIT or in_line(known, request.nbytes, request.fd, request.offset)
            and _has_place(request, known) or _means_its_writer(request, known)):
        result = _now(request, request.flags)
        if request.writes is not None:
            request.end_write()         # before this greenlet may wait for the next turn of the hub
        return _done_in_line(driver, result)
    return _by_thread(driver, request, known)


cdef bint _has_place(Request request, Known known) noexcept:
    """Whether it is not a pipe or the like, asked without an offset: the answer to one with an offset is an error."""
    return request.offset >= 0 or known.kind & STORED


cdef bint _means_its_writer(Request request, Known known) noexcept:
    """Whether it is the 0 that moves the thread that writes it into a control group."""
    return (known.kind & ANSWER and request.buffer_count == 1 and 0 < request.nbytes <= 2
            and (<char *>request.buffers.iov_base)[0] == c'0' and known.device.file_system in ('cgroup', 'cgroup2'))


cdef int64_t _done_in_line(Driver driver, int64_t result) except? -4096:
    driver.end_in_line()
    return result


cdef int64_t _now(Request request, unsigned int flags) noexcept:
    """The system call, here and now."""
    cdef bint reading = request.opcode == PREAD or request.opcode == PREADV
    return vector_now(reading, request.fd, request.buffers, request.buffer_count, request.offset, flags)


cdef object _sync(int fd, Known known, int opcode, name):
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
    """Whether a sync had better take a thread: those of native AIO the kernel does one after the other, on the
    processor that submits them, which here is the hub's."""
    return driver.engine.share(device.number, device.limit).admitted + device.pool().busy() >= SYNCS_MAX


cdef object _steady(buffers, bint reading):
    """*buffers*, with memory of ours in place of each that is ownerless."""
    for buffer in buffers:
        if is_ownerless(buffer):
            return [_bounce(buffer, reading) if is_ownerless(buffer) else buffer
                    for buffer in buffers]
    return buffers


cdef object _bounce(buffer, bint reading):
    bounce = aligned_buffer(buffer.nbytes)
    if not reading:
        bounce[:] = flat(buffer)
    return bounce


cdef _copy_back(steady, buffers, Py_ssize_t nbytes):
    cdef Py_ssize_t n
    for bounce, buffer in zip(steady, buffers):
        n = min(nbytes, memoryview(buffer).nbytes)
        if bounce is not buffer:
            flat(buffer)[:n] = bounce[:n]
        nbytes -= n


# The same for a raw fd ---------------------------------------------------------------------------

def pread(fd, Py_ssize_t n, Py_ssize_t offset, /):
    """Read at most *n* bytes at *offset* of the file *fd*; fewer only at its end, or as os.pread would.

    Raises OSError.
    """
    return _pread(c_int(fd), None, n, offset, None, BATCH_MAX)


def preadv(fd, buffers, Py_ssize_t offset, flags=0, /):
    """Read at *offset* into a sequence of writable *buffers*; return the number of bytes read.

    *flags* are ``os.RWF_*``; one that can't be honoured raises OSError (EOPNOTSUPP).
    """
    return _vectored(True, c_int(fd), None, _asked(True, buffers), offset, c_int(flags), None, BATCH_MAX)


def read_cached(fd, buffer):
    """`File.read_cached` of a number."""
    return _read_cached(c_int(fd), None, buffer)


def pwrite(fd, data, Py_ssize_t offset, /):
    """Write bytes-like *data* at *offset*; return the number of bytes written. Raises OSError."""
    cdef int number = c_int(fd)
    _check_place(data, offset, None)
    return _vectored(False, number, None, _only(data), offset, 0, None, BATCH_MAX)


def pwritev(fd, buffers, Py_ssize_t offset, flags=0, /):
    """Write a sequence of *buffers* at *offset*; return the number of bytes written.

    *flags* are ``os.RWF_DSYNC``, ``os.RWF_APPEND`` and the like; one that can't be honoured raises OSError.
    """
    return _vectored(False, c_int(fd), None, _asked(False, buffers), offset, c_int(flags), None, BATCH_MAX)


def fsync(fd):
    _sync(c_int(fd), None, FSYNC, None)


def fdatasync(fd):
    _sync(c_int(fd), None, FDSYNC, None)
