# cython: language_level=3, boundscheck=False, wraparound=False, binding=False, embedsignature=True, embedsignature.format=clinic
"""`File`: one open file."""

import os
import stat

from greenaio._files.unclosed import warn_unclosed

cimport cython
from libc.stdint cimport int64_t, uint64_t

from greenaio._core.context cimport BATCH_MAX, FDSYNC, FSYNC, PREAD, PWRITE
from greenaio._core.dispatch cimport ASK, THREAD
from greenaio._core.driver cimport Driver
from greenaio._core.engine cimport Engine
from greenaio._core.handle cimport closing, is_closing
from greenaio._core.hub cimport current_driver
from greenaio._core.job cimport as_call
from greenaio._core.request cimport Request, new_request
from greenaio._files.arguments cimport c_int, failed
from greenaio._files.buffered cimport read_at_position
from greenaio._files.buffers cimport check_place, is_ownerless, one_or_many, only
from greenaio._files.changes cimport fallocate_file, hold_range, takes_turn, work_in
from greenaio._files.closing cimport close_file
from greenaio._files.direct cimport is_misaligned
from greenaio._files.facts cimport ANSWER, DIRECT, STORED, file_size
from greenaio._files.opening cimport open_file
from greenaio._files.operation cimport sync, vectored
from greenaio._files.pread cimport read_bytes
from greenaio._files.route cimport Known, know, seek_may_wait
from greenaio._files.underway cimport begin_at_position

cdef extern from "<fcntl.h>":
    const int AT_FDCWD

cdef extern from "<errno.h>":
    const int ECANCELED

# Values of `File._fd` instead of an fd.
cdef enum:
    CLOSED = -1
    OPENING = -2


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
        return read_bytes(self._open_fd(), self._known, n, offset, self.name, self._max_batch)

    def preadv(self, buffers, Py_ssize_t offset, flags=0):
        """Read at *offset* into a sequence of writable *buffers*. Return the number of bytes read. *flags*
        are ``os.RWF_*``.

        If the greenlet is killed or timed out during the read, the kernel may still write into the buffers.
        They stay pinned until the kernel is done.
        """
        cdef int how = c_int(flags)
        # Look at the buffers first, because that may run code that closes this file.
        asked = one_or_many(True, buffers)
        return vectored(True, self._open_fd(), self._known, asked, offset, how, self.name, self._max_batch)

    def read_cached(self, buffer):
        """Read into *buffer* at the file's own position, which the kernel keeps and moves, without a wait.

        Return the number of bytes read; or -1 - n if the page cache had n bytes and the rest would wait.
        Don't call this while another greenlet is about to move the position."""
        return read_at_position(self._open_fd(), self._known, buffer)

    def begin_at_position(self, bint reading, buffers):
        """Begin to read into *buffers*, or to write them, at the file's own position, by one read(2) or
        write(2) in a thread. Return its `Underway`."""
        cdef int fd = self._open_fd()
        return begin_at_position(reading, fd, self._known, one_or_many(reading, buffers), self.name)

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
            if is_misaligned(known, request):
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
        check_place(data, offset, self.name)
        return vectored(False, fd, self._known, only(data), offset, 0, self.name, self._max_batch)

    def pwritev(self, buffers, Py_ssize_t offset, flags=0):
        """Write a sequence of *buffers* at *offset*. Return the number of bytes written. *flags* are
        ``os.RWF_*``. If the greenlet is killed during the write, it may still happen."""
        cdef int how = c_int(flags)
        asked = one_or_many(False, buffers)
        return vectored(False, self._open_fd(), self._known, asked, offset, how, self.name, self._max_batch)

    def fsync(self):
        """Make data and metadata durable. Raise OSError if that failed. An error is never retried, because
        the data that it was about may be lost."""
        sync(self._open_fd(), self._known, FSYNC, self.name)

    def fdatasync(self):
        """Make data durable, and the metadata that is needed to read it. Raise OSError as `fsync` does."""
        sync(self._open_fd(), self._known, FDSYNC, self.name)

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
