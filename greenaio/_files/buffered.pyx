# cython: language_level=3, boundscheck=False, wraparound=False
"""Reads and writes through the page cache: inline if they wait for nothing, and the rest by a thread."""

import os
# `posix` has the plain calls, also while the functions of `os` are patched.
import posix

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EAGAIN, EOPNOTSUPP
from libc.stdint cimport int64_t, uint64_t

from greenaio._core.handle import using
from greenaio._files import loop as _loop, sharing as _sharing

from greenaio._core.driver cimport Driver
from greenaio._core.hub cimport current_driver
from greenaio._core.request cimport RWF_NOWAIT, Request, iovec, new_request
from greenaio._core.threads cimport any_busy
from greenaio._files.buffers cimport pin
from greenaio._files.facts cimport ANSWER, AT_ONCE, DIRECT, EVENTS, LOCKED, STORED
from greenaio._files.inline cimport (
    end_in_line, has_place, lacks_threads, means_its_writer, now, read_in_line,
)
from greenaio._files.route cimport (
    IN_LINE_MAX, Known, by_thread, in_line, is_swapped_out, know, knows_block_devices, swap_is_in_use,
)

cdef extern from *:
    """
    #include <errno.h>
    #include <poll.h>

    /* Return whether a read of *fd* waits for nothing, as far as poll tells. If poll fails the answer is yes,
       and the read will say why. */
    static inline int is_ready(int fd)
    {
        struct pollfd one = { fd, POLLIN, 0 };
        return poll(&one, 1, 0) != 0;
    }
    """
    const int ECANCELED
    bint is_ready(int fd)

cdef dict _ours = _sharing.ours


cdef int64_t read_buffered(Driver driver, Request request, Known known, memory) except? -4096:
    """Read inline the bytes that the page cache has, and the rest by a thread. Return bytes read, or minus
    the errno."""
    cdef uint64_t wanted = request.nbytes
    cdef int64_t got = 0, more = -EAGAIN
    driver.check_caller()
    if request.flags & RWF_NOWAIT or in_line(known, wanted, request.fd, request.offset) and has_place(request, known):
        return end_in_line(driver, now(request, request.flags))
    if wanted <= IN_LINE_MAX and not known.kind & (DIRECT | ANSWER | LOCKED) and not lacks_threads(known):
        got = read_in_line(request.fd, request.buffers, request.buffer_count, wanted, request.offset,
                            request.flags | RWF_NOWAIT, False, &more)
        if more != -EAGAIN and more != -EOPNOTSUPP:
            return end_in_line(driver, got if got else more)
        request.skip(got)
    if known.kind & ANSWER:
        return read_answer(driver, request, known, memory)
    more = by_thread(driver, request, known)
    # In a forked child the answer is ECANCELED. Raise that, because a short read would look like the end of
    # the file.
    if more < 0:
        return got if got and more != -ECANCELED else more
    return got + more


cdef int64_t read_answer(Driver driver, Request request, Known known, memory) except? -4096:
    """Read a file of a file system that `answers`, with one call. Return bytes read, or minus the errno.

    A read that waits for an event, such as one of /proc/kmsg, would keep a thread. If its greenlet is killed,
    the thread would still take the next event. So the greenlet first waits in the loop. But trace_pipe may
    still have the rest of a line when poll says that there is nothing; a read with O_NONBLOCK finds that out.
    Other processes that share the open file may see that flag. They see it under libuv, too, which sets it
    for each wait."""
    cdef int fd = request.fd
    cdef int64_t result
    if not known.kind & EVENTS or is_ready(fd) or not os.get_blocking(fd):
        return by_thread(driver, request, known)
    with using(fd):
        while not is_ready(fd):
            os.set_blocking(fd, False)
            try:
                result = by_thread(driver, request, known)
            finally:
                os.set_blocking(fd, True)
            if result != -EAGAIN:
                return result
            _loop.wait_for(fd, _loop.READ)
            request = new_request(request.opcode, fd, request.offset, request.flags, 1)
            pin(request, memory)
        return by_thread(driver, request, known)


cdef int64_t write_buffered(Driver driver, Request request, Known known) except? -4096:
    """Write inline if the file has no disk, otherwise by a thread. Return bytes written, or minus the
    errno."""
    cdef int64_t result
    driver.check_caller()
    if (request.flags & RWF_NOWAIT or in_line(known, request.nbytes, request.fd, request.offset)
            and has_place(request, known) or means_its_writer(request, known)):
        result = now(request, request.flags)
        if request.writes is not None:
            # End the write first, because `end_in_line` may wait for the next turn of the hub.
            request.end_write()
        return end_in_line(driver, result)
    return by_thread(driver, request, known)


cdef bint _may_read_now(int fd, Known known) except -1:
    """Return whether a read at the file's own position may run inline, if RWF_NOWAIT is set."""
    if known is None:
        # Under O_DIRECT the kernel waits for the disk, also with RWF_NOWAIT.
        return not fd_is_direct(fd)
    if known.kind & (STORED | DIRECT | LOCKED) != STORED or known.kind & (ANSWER | AT_ONCE) == ANSWER:
        return False
    return not lacks_threads(known)


cdef int64_t read_at_position(int fd, Known known, buffer) except? -4096:
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
    if not _may_read_now(fd, known):
        return -1
    PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
    cdef bint is_answer = known is not None and known.kind & ANSWER != 0
    cdef unsigned int flags = 0 if is_answer or known is not None and known.device.in_memory else RWF_NOWAIT
    if view.len > IN_LINE_MAX or known is not None and is_swapped_out(known, fd, -1, view.len):
        PyBuffer_Release(&view)
        return -1
    room.iov_base, room.iov_len = view.buf, view.len
    try:
        got = read_in_line(fd, &room, 1, view.len, -1, flags, is_answer, &last)
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
