# cython: language_level=3, boundscheck=False, wraparound=False
"""Transfers from one file to another inside the kernel, by threads that hold up neither of the two devices."""

from libc.errno cimport EAGAIN
from libc.stdint cimport int64_t

from greenaio._core.handle import using
from greenaio._files import loop as _loop

from greenaio._core.job cimport new_call
from greenaio._core.memory cimport AlignedBuffer, scratch
from greenaio._core.pools cimport pool_of
from greenaio._core.request cimport Request
from greenaio._core.threads cimport Pool
from greenaio._files.arguments cimport c_int, failed
from greenaio._files.changes cimport change
from greenaio._files.facts cimport STORED
from greenaio._files.route cimport Known, know_open, perform

cdef extern from *:
    """
    #include <fcntl.h>
    #include <sys/syscall.h>
    """
    const long SYS_copy_file_range
    const long SYS_sendfile
    const long SYS_readahead
    const long SYS_sync_file_range
    const int SYNC_FILE_RANGE_WRITE


cdef Pool _pool_between(Known source, Known target):
    """Return the threads for a call that reads from *source* and writes to *target*. Either may hang, so a
    pair of devices has threads of its own, which hold up no call that uses only one of the two."""
    if not target.kind & STORED or target.device.number == source.device.number or target.device.in_memory:
        return source.device.pool()
    if source.device.in_memory:
        return target.device.pool()
    return pool_of((source.device.number, target.device.number))


def copy_file_range(src, dst, Py_ssize_t count, offset_src=None, offset_dst=None):
    """Copy up to *count* bytes from the file *src* to the file *dst*, as `os.copy_file_range` does. Return
    the number of bytes copied. Raise OSError. An offset of None is the file's own position."""
    cdef int source = c_int(src), target = c_int(dst)
    cdef Known known
    cdef AlignedBuffer memory = scratch(16)
    cdef Py_ssize_t *offsets = <Py_ssize_t *>memory.address
    cdef int64_t result
    if count < 0:
        raise ValueError('negative value for \'count\' not allowed')
    offsets[0] = 0 if offset_src is None else offset_src
    offsets[1] = 0 if offset_dst is None else offset_dst
    known = know_open(source)
    cdef Known other = know_open(target)
    # The numbers stay taken, also during the wait for a range of the target.
    with using(source), using(target):
        result = _copy(target, other, offsets[1], new_call(
            source, memory, SYS_copy_file_range, source, 0 if offset_src is None else <long>&offsets[0],
            target, 0 if offset_dst is None else <long>&offsets[1], count), source, known)
    if result < 0:
        raise failed(result, None)
    return result


cdef int64_t _copy(int target, Known other, int64_t start, Request request, int source, Known known) except? -4096:
    """Make the call *request*, which copies from *source* to *target*, from *start* on. Return its result, or
    minus the errno."""
    cdef Pool pool = _pool_between(known, other)
    if other.kind & STORED:
        request.fd, request.other_fd = target, source
        return change(target, other, start, request, pool)
    request.other_fd = target
    return perform(request, known, pool)


def sendfile(out_fd, in_fd, offset, Py_ssize_t count):
    """Send up to *count* bytes of the file *in_fd*, from *offset* on, to *out_fd*, as `os.sendfile` does.
    Return the number of bytes sent. Raise OSError. An *offset* of None is the file's own position."""
    cdef int target = c_int(out_fd), source = c_int(in_fd)
    cdef Known known, other
    cdef AlignedBuffer memory = scratch(8)
    cdef Py_ssize_t *at = <Py_ssize_t *>memory.address
    cdef int64_t result
    at[0] = 0 if offset is None else offset
    known = know_open(source)
    other = know_open(target)
    # The numbers stay taken, also during the wait for the socket.
    with using(source), using(target):
        while True:
            result = _copy(target, other, 0, new_call(
                source, memory, SYS_sendfile, target, source, 0 if offset is None else <long>at, count),
                source, known)
            if result != -EAGAIN:
                break
            # The target is a non-blocking socket that is full. The sockets of gevent are non-blocking.
            _loop.wait_for(target, _loop.WRITE)
    if result < 0:
        raise failed(result, None)
    return result


def readahead(int fd, int64_t offset, Py_ssize_t count):
    """Have the page cache read *count* bytes at *offset* ahead. An error is ignored, because a read will tell
    it."""
    perform(new_call(fd, None, SYS_readahead, fd, offset, count), know_open(fd))


def start_writing(int fd, int64_t offset, int64_t nbytes):
    """Have the page cache begin to write the dirty pages of the range. An error is ignored, because fsync
    will tell it."""
    perform(new_call(fd, None, SYS_sync_file_range, fd, offset, nbytes, SYNC_FILE_RANGE_WRITE), know_open(fd))
