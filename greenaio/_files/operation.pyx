# cython: language_level=3, boundscheck=False, wraparound=False, binding=False, embedsignature=True, embedsignature.format=clinic
"""The way that each read, write and sync goes, of a `File` or of a raw fd.

Native AIO serves O_DIRECT reads and overwrites of regular files and block devices, and fsync of both. Bytes
in the page cache are read inline, with RWF_NOWAIT. A file without a disk gets the plain call, inline. Every
other operation runs in a native thread. So does an operation that would have waited on another way, or was
refused there, because only the system call gives the true answer.

The functions for a raw fd remember nothing of its file, because numbers are used again.
"""

# `posix` has the plain calls, also while the functions of `os` are patched.
import posix

from greenaio._files.pread import pread

from libc.stdint cimport int64_t, uint64_t
from posix.stat cimport S_ISDIR

from greenaio._core.context cimport BATCH_MAX, FDSYNC, FSYNC
from greenaio._core.driver cimport Driver
from greenaio._core.engine cimport Engine
from greenaio._core.handle cimport check_open, closing
from greenaio._core.hub cimport current_driver
from greenaio._core.request cimport RWF_APPEND, RWF_NOWAIT, Request, new_request
from greenaio._files.arguments cimport c_int, failed
from greenaio._files.buffered cimport read_at_position, read_buffered, write_buffered
from greenaio._files.buffers cimport (
    bounced, check_place, copy_back, is_ownerless, one_or_many, only, opcode_of, owned, pin,
)
from greenaio._files.changes cimport takes_turn
from greenaio._files.device cimport Device
from greenaio._files.direct cimport by_aio, direct, is_misaligned, read_misaligned, write_misaligned
from greenaio._files.facts cimport DIRECT, STORED
from greenaio._files.route cimport Known, by_thread, in_line, know
from greenaio._files.underway cimport RWF_HIPRI, shield_in_turn

cdef enum:
    # In buffers. The kernel says EINVAL to more.
    IOV_MAX = 1024
    # In requests under way on a device. With as many, a sync runs in a thread.
    SYNCS_MAX = 4


cdef object vectored(bint reading, int fd, Known known, asked, int64_t offset, int flags, name, int max_batch):
    """Read into or write *asked*, the buffers as `one_or_many` or `only` return them, at *offset*. Return bytes
    moved. Raise OSError."""
    cdef Driver driver = current_driver()
    cdef Request request
    cdef bint many = type(asked) is tuple
    cdef int64_t got
    if closing:
        check_open(fd)
    if many:
        memory = owned(asked, reading)
    else:
        memory = bounced(asked, reading) if is_ownerless(asked) else asked
    if known is None:
        known = know(fd, name)
    request = new_request(opcode_of(reading, many), fd, offset, flags, max_batch)
    pin(request, memory)
    got = _moved(driver, request, known, memory, reading, many)
    if got < 0:
        raise failed(got, name)
    if reading and memory is not asked:
        if many:
            copy_back(memory, asked, got)
        else:
            copy_back((memory,), (asked,), got)
    return got


cdef int64_t _moved(Driver driver, Request request, Known known, memory, bint reading, bint many) except? -4096:
    """Make the read or write, whose buffers are *memory*. Return bytes moved, or minus the errno."""
    cdef bint is_direct = known.kind & DIRECT and not request.flags & RWF_HIPRI and request.offset >= 0
    if (is_direct and request.buffer_count <= IOV_MAX and not request.flags & (RWF_NOWAIT | RWF_APPEND)
            and is_misaligned(known, request)):
        driver.check_caller()
        steady = memory if many else (memory,)
        return read_misaligned(driver, known, request, steady) if reading else (
            write_misaligned(known, request, steady))
    if not reading and known.kind & STORED and takes_turn(known, request):
        driver.check_caller()
        return shield_in_turn(known, request).get()
    if is_direct:
        return direct(driver, request, known)
    return read_buffered(driver, request, known, memory) if reading else write_buffered(driver, request, known)


cdef object sync(int fd, Known known, int opcode, name):
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
        result = by_aio(driver, request, known)
    else:
        result = by_thread(driver, request, known)
    if result < 0:
        raise failed(result, name)


cdef bint _is_crowded(Driver driver, Device device) except -1:
    """Return whether a sync should run in a thread. The kernel makes the syncs of native AIO one after the
    other, on the processor that submits them, which is the hub's."""
    return driver.engine.share(device.number, device.limit).admitted + device.pool().busy() >= SYNCS_MAX


def preadv(fd, buffers, Py_ssize_t offset, flags=0, /):
    """Read at *offset* into a sequence of writable *buffers*. Return the number of bytes read.

    *flags* are ``os.RWF_*``; a flag that can't be honoured raises OSError (EOPNOTSUPP).
    """
    return vectored(True, c_int(fd), None, one_or_many(True, buffers), offset, c_int(flags), None, BATCH_MAX)


def read_cached(fd, buffer):
    """Do the work of `File.read_cached` for a raw fd."""
    return read_at_position(c_int(fd), None, buffer)


def pwrite(fd, data, Py_ssize_t offset, /):
    """Write bytes-like *data* at *offset*. Return the number of bytes written. Raise OSError."""
    cdef int number = c_int(fd)
    check_place(data, offset, None)
    return vectored(False, number, None, only(data), offset, 0, None, BATCH_MAX)


def pwritev(fd, buffers, Py_ssize_t offset, flags=0, /):
    """Write a sequence of *buffers* at *offset*. Return the number of bytes written.

    *flags* are ``os.RWF_DSYNC``, ``os.RWF_APPEND`` and the like; a flag that can't be honoured raises
    OSError.
    """
    return vectored(False, c_int(fd), None, one_or_many(False, buffers), offset, c_int(flags), None, BATCH_MAX)


def fsync(fd):
    """Make data and metadata of the file *fd* durable. Raise OSError."""
    sync(c_int(fd), None, FSYNC, None)


def fdatasync(fd):
    """Make data of the file *fd* durable, and the metadata that is needed to read it. Raise OSError."""
    sync(c_int(fd), None, FDSYNC, None)
