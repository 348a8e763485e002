# cython: language_level=3, boundscheck=False, wraparound=False, binding=False, embedsignature=True, embedsignature.format=clinic
"""`pread`: a read into a new bytes object, of a `File` or of a raw fd."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINVAL, EOPNOTSUPP
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy

from greenaio._core.context cimport BATCH_MAX, PREAD
from greenaio._core.driver cimport Driver
from greenaio._core.handle cimport check_open, closing
from greenaio._core.hub cimport current_driver
from greenaio._core.job cimport new_call
from greenaio._core.memory cimport AlignedBuffer, Filling, scratch
from greenaio._core.request cimport RWF_NOWAIT, Request, iovec, new_request
from greenaio._core.threads cimport any_busy
from greenaio._files.arguments cimport c_int, failed
from greenaio._files.buffered cimport fd_is_direct, read_answer
from greenaio._files.direct cimport direct, misfit, whole_sectors
from greenaio._files.facts cimport ANSWER, DIRECT, EVENTS, LOCKED
from greenaio._files.inline cimport lacks_threads, pread_now, read_in_line
from greenaio._files.route cimport IN_LINE_MAX, Known, in_line, know, knows_block_devices

cdef extern from *:
    """
    #include <errno.h>
    #include <sys/syscall.h>
    """
    const int ECANCELED
    const long SYS_pread64


def pread(fd, Py_ssize_t n, Py_ssize_t offset, /):
    """Read up to *n* bytes at *offset* of the file *fd*, and return them as bytes. The result is shorter only
    at the end of the file, or when the result of os.pread would be.

    Raises OSError.
    """
    return read_bytes(c_int(fd), None, n, offset, None, BATCH_MAX)


cdef object read_bytes(int fd, Known known, Py_ssize_t n, int64_t offset, name, int max_batch):
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
    before = misfit(known, offset)
    if before or misfit(known, n):
        memory = scratch(whole_sectors(known, <uint64_t>before + n))
    else:
        # Read into memory of our own, so that no code sees the bytes of an abandoned read arrive.
        memory = scratch(n)
    request = new_request(PREAD, fd, offset - before, 0, max_batch)
    request.pin(memory)
    got = direct(driver, request, known)
    if got < 0:
        raise failed(got, name)
    return PyBytes_FromStringAndSize(memory.address + before, max(0, min(n, got - before)))


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
            got = pread_now(driver, fd, memory, n, offset)
            if got < 0:
                raise failed(got, name)
            return data if got == n else data[:got]
        asks = not known.kind & (ANSWER | LOCKED) and not lacks_threads(known)
    if asks:
        room.iov_base, room.iov_len = memory, n
        got = read_in_line(fd, &room, 1, n, offset, RWF_NOWAIT, False, &more)
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
        more = pread_now(driver, fd, memory, n, offset)
    else:
        request = new_call(fd, keep, SYS_pread64, fd, <long>memory, n, offset)
        # `dump` shows these two.
        request.offset, request.nbytes = offset, n
        more = driver.perform_by_thread(request, known.device.pool())
    if more < 0 and (got == 0 or more == -ECANCELED):
        raise failed(more, name)
    return got + max(more, 0)


cdef int64_t _pread_event(Driver driver, int fd, Known known, char *memory, Py_ssize_t n, int64_t offset) except? -4096:
    """Read a file that may wait for an event. Return bytes read, or minus the errno. A buffer of its own
    keeps the memory if the greenlet is killed."""
    cdef AlignedBuffer buffer = scratch(n)
    cdef Request request = new_request(PREAD, fd, offset, 0, 1)
    cdef int64_t got
    request.pin(buffer)
    got = read_answer(driver, request, known, buffer)
    if got > 0:
        memcpy(memory, buffer.address, got)
    return got
