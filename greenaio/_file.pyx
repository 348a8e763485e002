# cython: language_level=3, boundscheck=False, wraparound=False
"""`File`: one open file, and which way each operation on it goes.

Native AIO serves O_DIRECT reads and writes of regular files and block devices, and fsync of both;
everything else takes a thread. What ``io_submit`` itself refuses takes a thread too: the system call
there gives the true answer. The functions at the end are the same for a raw fd, of which nothing is
remembered: numbers are reused.
"""

import fcntl
import os
import stat
import struct
import warnings

from greenaio import _fallback
from greenaio._hub import all_drivers, driver_if_exists

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t

from greenaio._context cimport BATCH_MAX, FDSYNC, FSYNC, PREAD, PREADV, PWRITE, PWRITEV
from greenaio._engine cimport Request, new_request
from greenaio._hub cimport Driver, current_driver
from greenaio._memory cimport AlignedBuffer, scratch

from greenaio._memory import aligned_buffer

cdef extern from *:
    """
    #include <fcntl.h>
    #include <string.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* Whether an fd is a regular file or block device, open with O_DIRECT: 3; without: 1; other: 0. */
    static inline int file_kind(int fd)
    {
        struct stat st;
        int flags;
        if (fstat(fd, &st) < 0 || !(S_ISREG(st.st_mode) || S_ISBLK(st.st_mode)))
            return 0;
        flags = fcntl(fd, F_GETFL);
        return flags >= 0 && (flags & O_DIRECT) && !(flags & O_PATH) ? 3 : 1;
    }

    /* statx(STATX_DIOALIGN), Linux 6.1, which the C library's headers may not know yet. */
    static inline int file_dio_align(int fd, unsigned *memory, unsigned *offset)
    {
        unsigned char buffer[256];
        unsigned mask;
        if (syscall(SYS_statx, fd, "", 0x1000 /* AT_EMPTY_PATH */, 0x2000u, buffer) < 0)
            return 0;
        memcpy(&mask, buffer, 4);
        if (!(mask & 0x2000u))
            return 0;
        memcpy(memory, buffer + 0x98, 4);
        memcpy(offset, buffer + 0x9c, 4);
        return 1;
    }

    /* A memoryview that owns nothing pins nothing: io.BufferedReader hands those out, and frees the
       memory while the kernel is still at it. */
    static inline int is_ownerless(PyObject *buffer)
    { return PyMemoryView_Check(buffer) && PyMemoryView_GET_BASE(buffer) == NULL; }
    """
    bint is_ownerless(object buffer)
    int file_kind(int fd)
    int file_dio_align(int fd, unsigned int *memory, unsigned int *offset)

cdef set _closing = _fallback._closing

cdef enum:
    STORED = 1      # a regular file or block device: fsync by AIO
    DIRECT = 2      # and open with O_DIRECT: reads and writes too
    RWF_HIPRI = 1   # AIO would drop it

BLKSSZGET = 0x1268


@cython.final
cdef class File:
    """An open file whose reads and writes park the calling greenlet, not the hub.

    ``File(path, flags, mode)`` opens as ``os.open`` does. Add ``os.O_DIRECT`` for native AIO: buffers,
    offsets and lengths must then be multiples of `alignment`, see `aligned_buffer`. *max_batch* (1 to 32)
    bounds how many requests may wait for each other to be submitted together.

    May be used by any number of greenlets and hubs. Raises OSError with the file's name, ValueError when
    closed, BlockingSwitchOutError when called in the hub itself; only `close` works there.
    """

    cdef int _fd
    cdef int _kind
    cdef int _max_batch
    cdef bint _closefd
    cdef readonly object name

    def __cinit__(self):
        self._fd = -1

    def __init__(self, path, int flags=os.O_RDONLY, int mode=0o666, *, int max_batch=BATCH_MAX):
        if self._fd >= 0:
            raise ValueError('this File is open already')
        self._set_max_batch(max_batch)
        self.name = os.fspath(path)
        self._closefd = True
        self._fd = _fallback.open(self.name, flags, mode)
        self._kind = file_kind(self._fd)

    @staticmethod
    def from_fd(int fd, closefd=False, *, int max_batch=BATCH_MAX):
        """Make a File of an open *fd*; with *closefd*, closing it closes the fd. Whether it is O_DIRECT is
        asked here once."""
        os.fstat(fd)
        cdef File self = File.__new__(File)
        self._set_max_batch(max_batch)
        self.name = fd
        self._fd = fd
        self._closefd = closefd
        self._kind = file_kind(fd)
        return self

    def _set_max_batch(self, int max_batch):
        if not 1 <= max_batch <= BATCH_MAX:
            raise ValueError(f'max_batch must be from 1 to {BATCH_MAX}, not {max_batch}')
        self._max_batch = max_batch

    cdef int _open_fd(self) except -1:
        if self._fd < 0:
            raise ValueError('I/O operation on closed file')
        return self._fd

    def pread(self, Py_ssize_t n, int64_t offset):
        """Read up to *n* bytes at *offset*; fewer only as ``os.pread`` would. Returns bytes."""
        return _pread(self._kind, self._open_fd(), n, offset, self.name, self._max_batch)

    def preadv(self, buffers, int64_t offset, int flags=0):
        """Read at *offset* into a sequence of writable *buffers*; return bytes read. *flags*:
        ``os.RWF_*``.

        If the greenlet is killed or timed out meanwhile, the kernel may still write into the buffers;
        they stay pinned until it is done.
        """
        return _vectored(True, self._kind, self._open_fd(), buffers, offset, flags, self.name,
                         self._max_batch)

    def pwrite(self, data, int64_t offset):
        """Write bytes-like *data* at *offset*; return bytes written, fewer than asked only as
        ``os.pwrite`` would. If the greenlet is killed meanwhile, the write may still happen."""
        return _vectored(False, self._kind, self._open_fd(), (data,), offset, 0, self.name,
                         self._max_batch)

    def pwritev(self, buffers, int64_t offset, int flags=0):
        """Write a sequence of *buffers* at *offset*; return bytes written. *flags*: ``os.RWF_*``.
        If the greenlet is killed meanwhile, the write may still happen."""
        return _vectored(False, self._kind, self._open_fd(), buffers, offset, flags, self.name,
                         self._max_batch)

    def fsync(self):
        """Make data and metadata durable. An error is never retried: what it was about may be lost."""
        _sync(self._kind, self._open_fd(), FSYNC, self.name)

    def fdatasync(self):
        """Make data durable, and what metadata is needed to read it. Errors as for `fsync`."""
        _sync(self._kind, self._open_fd(), FDSYNC, self.name)

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
        return bool(self._kind & DIRECT)

    @property
    def kind(self):
        """The file's type, as ``stat.S_IFMT`` gives it."""
        return stat.S_IFMT(os.fstat(self._open_fd()).st_mode)

    @property
    def device(self):
        """The device that the bytes are on: ``st_dev``, or ``st_rdev`` of a block device."""
        st = os.fstat(self._open_fd())
        return st.st_rdev if stat.S_ISBLK(st.st_mode) else st.st_dev

    @property
    def alignment(self):
        """What O_DIRECT wants memory, offsets and lengths to be multiples of, in bytes; 1 for a file
        that is not O_DIRECT."""
        return _alignment(self._open_fd()) if self._kind & DIRECT else 1

    def close(self):
        """Close the file; twice is fine. Waits for nobody: requests in flight go on to their end."""
        cdef int fd = self._fd
        self._fd = -1
        if fd >= 0 and self._closefd:
            close(fd)

    def __enter__(self):
        self._open_fd()
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __del__(self):
        if self._fd >= 0 and self._closefd:
            try:
                warnings.warn(f'unclosed file {self!r}', ResourceWarning, source=self)
            finally:                    # a warning may be an error
                self.close()

    def __repr__(self):
        return f'<greenaio.File name={self.name!r} fd={self._fd}>'


# The ways ----------------------------------------------------------------------------------------

cdef object _failed(long code, name):
    if name is None or isinstance(name, int):
        return OSError(-code, os.strerror(-code))
    return OSError(-code, os.strerror(-code), name)


cdef object _by_thread(name, function, fd, args, Request refused=None):
    # What was refused may have been closed meanwhile; what it keeps has its fd still open.
    try:
        return _fallback.call(function, fd, *args, closer=None if refused is None else refused.keep)
    except OSError as error:
        if name is None or isinstance(name, int) or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, name) from None


cdef object _by_aio(Driver driver, Request request, name):
    """Bytes moved; None when the kernel would not even take it, and a thread is to be asked."""
    if _closing:
        _fallback.check_open(request.fd)
    cdef int64_t result = driver.perform(request)
    if result >= 0:
        return result
    if request.refused:
        return None
    raise _failed(result, name)


cdef object _pread(int kind, int fd, Py_ssize_t n, int64_t offset, name, int max_batch):
    cdef AlignedBuffer memory
    cdef Driver driver
    cdef Request request = None
    if not kind & DIRECT or n < 0 or offset < 0:       # os.preadv takes -1 for "here", pread does not
        return _by_thread(name, os.pread, fd, (n, offset))
    memory = scratch(n)         # ours: nobody sees an abandoned read land
    got = None
    driver = current_driver()
    if driver.native:
        request = new_request(PREAD, fd, offset, 0, max_batch)
        request.pin(memory)
        got = _by_aio(driver, request, name)
    if got is None:
        got = _by_thread(name, os.preadv, fd, ((memory,), offset), request)
    return PyBytes_FromStringAndSize(memory.address, got)


cdef object _vectored(bint reading, int kind, int fd, buffers, int64_t offset, int flags, name,
                      int max_batch):
    cdef Driver driver
    cdef Request request = None
    cdef Py_ssize_t count
    cdef object got = None
    if not isinstance(buffers, (list, tuple)):
        if not hasattr(type(buffers), '__getitem__') or isinstance(buffers, dict):
            raise TypeError(f"{'preadv' if reading else 'pwritev'}() arg 2 must be a sequence")
        buffers = tuple(buffers)
    count = len(buffers)
    if count == 1 and not is_ownerless(buffers[0]):     # as most are
        steady = buffers
    else:
        steady = _steady(buffers, reading)
    if kind & DIRECT and not flags & RWF_HIPRI:
        driver = current_driver()
        if driver.native:
            if count == 1:
                request = new_request(PREAD if reading else PWRITE, fd, offset, flags, max_batch)
                request.pin(steady[0])
            else:
                request = new_request(PREADV if reading else PWRITEV, fd, offset, flags, max_batch)
                request.pin_all(steady)
            got = _by_aio(driver, request, name)
    if got is None:
        got = _by_thread(name, os.preadv if reading else os.pwritev, fd, (steady, offset, flags), request)
    if reading and steady is not buffers:
        _copy_back(steady, buffers, got)
    return got


cdef object _sync(int kind, int fd, int opcode, name):
    cdef Driver driver
    cdef Request request = None
    cdef object done = None
    if kind & STORED:
        driver = current_driver()
        if driver.native and driver.engine.context.supports(opcode):
            request = new_request(opcode, fd, 0, 0, BATCH_MAX)
            done = _by_aio(driver, request, name)
    if done is None:
        _by_thread(name, os.fdatasync if opcode == FDSYNC else os.fsync, fd, (), request)


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
        bounce[:] = buffer.cast('B')
    return bounce


cdef _copy_back(steady, buffers, Py_ssize_t nbytes):
    cdef Py_ssize_t n
    for bounce, buffer in zip(steady, buffers):
        n = min(nbytes, memoryview(buffer).nbytes)
        if bounce is not buffer:
            buffer.cast('B')[:n] = bounce[:n]
        nbytes -= n


def _alignment(int fd):
    cdef unsigned int memory = 0, offset = 0
    if file_dio_align(fd, &memory, &offset) and offset:
        return max(memory, offset)
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return struct.unpack('i', fcntl.ioctl(fd, BLKSSZGET, bytes(4)))[0]
    return 512


# The same for a raw fd ---------------------------------------------------------------------------

def pread(int fd, Py_ssize_t n, int64_t offset):
    return _pread(file_kind(fd), fd, n, offset, None, BATCH_MAX)


def preadv(int fd, buffers, int64_t offset, int flags=0):
    return _vectored(True, file_kind(fd), fd, buffers, offset, flags, None, BATCH_MAX)


def pwrite(int fd, data, int64_t offset):
    return _vectored(False, file_kind(fd), fd, (data,), offset, 0, None, BATCH_MAX)


def pwritev(int fd, buffers, int64_t offset, int flags=0):
    return _vectored(False, file_kind(fd), fd, buffers, offset, flags, None, BATCH_MAX)


def fsync(int fd):
    _sync(file_kind(fd), fd, FSYNC, None)


def fdatasync(int fd):
    _sync(file_kind(fd), fd, FDSYNC, None)


def close(int fd):
    driver = driver_if_exists()
    if driver is not None:
        driver.submit_now()
    _fallback.close(fd, [request for driver in all_drivers() for request in driver.engine.queued(fd)])
