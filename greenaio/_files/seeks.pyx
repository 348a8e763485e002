# cython: language_level=3, boundscheck=False, wraparound=False
"""Calls at the file's own position that move no bytes: a seek may wait for the lock that a read holds."""

import os
# `posix` has the plain calls, also while the functions of `os` are patched.
import posix
from io import FileIO

from cpython.ref cimport PyObject
from libc.errno cimport EIO, ENXIO, errno as c_errno
from libc.stdint cimport int64_t
from posix.unistd cimport lseek as seek

from greenaio._files import arguments as _arguments, loop as _loop

from greenaio._core.job cimport new_call, new_chain
from greenaio._core.memory cimport AlignedBuffer, scratch
from greenaio._files.arguments cimport failed
from greenaio._files.facts cimport LOCKED, STORED, block_size
from greenaio._files.route cimport Known, know_open, perform, seek_may_wait

cdef extern from *:
    """
    #include <fcntl.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* The beginning of io.FileIO's object, in CPython since 3.0. */
    struct raw_file { PyObject_HEAD int fd; };
    """
    struct raw_file:
        int fd
    const long SYS_lseek
    const int SEEK_CUR
    const int SEEK_END
    const int SEEK_DATA
    const int SEEK_HOLE
    const int O_CLOEXEC


def initialize(object raw, int fd, str mode, bint is_shared=False):
    """Do the work of ``FileIO.__init__(raw, fd, mode, False)`` without a wait in the hub.

    `io.FileIO` asks for the size and moves to the end. A server may not answer that, and a block device may
    be locked. So it first gets another file, which has a position if *fd* has one, and afterwards the number
    *fd*."""
    cdef raw_file *memory
    cdef bint appends = 'a' in mode
    cdef bint has_position = not appends or know_open(fd).kind & LOCKED != 0
    # The kernel answers this without the server.
    if not has_position:
        has_position = _loop.has_position(fd, _loop.WRITE) if is_shared else seek(fd, 0, SEEK_CUR) >= 0
    others = (posix.open(os.devnull, os.O_RDONLY | O_CLOEXEC),) if has_position else posix.pipe2(O_CLOEXEC)
    try:
        FileIO.__init__(raw, others[0], mode, False)
        memory = <raw_file *><PyObject *>raw
        if memory.fd != others[0]:
            # The object has another layout than `raw_file`, so its own `__init__` has to do.
            FileIO.__init__(raw, fd, mode, False)
            return
        memory.fd = fd
    finally:
        for other in others:
            posix.close(other)
    # The buffers above *raw* take this as their size.
    if hasattr(raw, '_blksize'):
        try:
            raw._blksize = block_size(fd)
        except AttributeError:
            # The attribute is read-only since Python 3.14.
            pass
    if appends and has_position:
        lseek(fd, 0, SEEK_END, is_shared)


def lseek(int fd, int64_t offset, int whence, bint is_shared=False):
    """Move the file's own position. Return the new one, in bytes. Raise OSError.

    The call runs inline if it needs no data that may have to be fetched, and no read can hold the lock of the
    position. If the position *is_shared*, a read of another process or thread may hold the lock."""
    cdef Known known = know_open(fd)
    cdef int64_t result
    if (whence > SEEK_END or whence == SEEK_END and not known.device.is_local or seek_may_wait(known)
            or is_shared and known.kind & STORED and not known.device.in_memory):
        result = perform(new_call(fd, None, SYS_lseek, fd, offset, whence), known)
        if result < 0:
            raise failed(result, None)
        return result
    return os.lseek(fd, offset, whence)


cdef struct extent:
    int64_t nbytes
    int64_t is_data

# The arguments of `_find_extents`, and its result: up to `room` extents in `found`.
cdef struct survey:
    int fd
    int64_t offset
    int64_t end
    int room
    extent *found


cdef int64_t _next_border(int fd, int64_t offset, int64_t end, int whence) noexcept nogil:
    """Return the offset where the next data or the next hole begins, at most *end*; or minus the errno. The
    result is kept between *offset* and *end*, because a server may give any answer."""
    cdef int64_t found = seek(fd, offset, whence) if offset < end else end
    if found < 0:
        # ENXIO means that no data follows.
        return end if c_errno == ENXIO else -c_errno
    return min(max(found, offset), end)


cdef long _find_extents(void *arg) noexcept nogil:
    """List the extents from `survey.offset` on, in a thread. Return their number; or minus the errno, if an
    error comes before the first one. The number of seeks is bounded, because a server may answer with the
    same offset for ever."""
    cdef survey this = (<survey *>arg)[0]
    cdef int64_t offset = this.offset
    cdef int64_t border
    cdef int n = 0
    cdef int steps = 0
    cdef bint is_data = False
    while offset < this.end and n < this.room and steps < 2 * this.room:
        border = _next_border(this.fd, offset, this.end, SEEK_HOLE if is_data else SEEK_DATA)
        if border < 0:
            return n if n else border
        if border > offset:
            this.found[n].nbytes, this.found[n].is_data = border - offset, is_data
            n += 1
        offset = border
        is_data = not is_data
        steps += 1
    return n if n or offset >= this.end else -EIO


def extents(int fd, int64_t offset, int64_t end):
    """Return a list of pairs: the length of an extent in bytes, and whether it has data. A hole reads as
    zeros. The list goes from *offset* to *end*, or less far if there are many extents. The call moves the
    file's own position. Raise OSError."""
    cdef int room = _arguments.EXTENTS_MAX
    cdef AlignedBuffer memory = scratch(sizeof(survey) + room * sizeof(extent))
    cdef survey *this = <survey *>memory.address
    cdef Known known = know_open(fd)
    this.fd, this.offset, this.end, this.room = fd, offset, end, room
    this.found = <extent *>(memory.address + sizeof(survey))
    cdef int64_t n = perform(new_chain(fd, memory, 'lseek', _find_extents, this, False), known)
    if n < 0:
        raise failed(n, None)
    return [(this.found[i].nbytes, this.found[i].is_data != 0) for i in range(n)]
