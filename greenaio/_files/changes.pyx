# cython: language_level=3, boundscheck=False, wraparound=False
"""Changes of a file: each holds the range that it changes if greenlets hold ranges of the file.

See `ranges`. Here are also the calls that change the length of a file, or its blocks.
"""

import sys

from libc.stdint cimport int64_t, uint64_t

from greenaio._files import ranges
from greenaio._files.shield import Shielded

from greenaio._core.handle cimport Inode
from greenaio._core.hub cimport current_driver
from greenaio._core.job cimport POSIX_FALLOCATE, make_here, new_call
from greenaio._core.request cimport Request
from greenaio._core.threads cimport Pool
from greenaio._files.arguments cimport c_int, failed
from greenaio._files.facts cimport REGULAR, file_size
from greenaio._files.route cimport Known, in_line, know, know_open, perform

cdef extern from "<sys/syscall.h>":
    const long SYS_ftruncate
    const long SYS_fallocate

cdef enum:
    PAGE = 4096                 # bytes


cdef (uint64_t, uint64_t) in_pages(uint64_t start, uint64_t end) noexcept:
    """Return the range that a buffered write changes, in bytes. The page cache reads and writes back whole
    pages."""
    return start & ~<uint64_t>(PAGE - 1), (end + PAGE - 1) & ~<uint64_t>(PAGE - 1)


cdef bint takes_turn(Known known, Request request) except -1:
    """Return whether *request*, which changes the file, has to hold a range of it, because greenlets hold
    ranges. If not, the request counts in the writes of the inode from now on.

    No other thread runs between the look at the ranges and the count. The greenlet that asks for the first
    range of the file looks at the writes afterwards, so it sees this request."""
    if known._inode is None:
        known.inode()
    if known._inode.ranges is not None:
        return True
    # In memory no write has to be one of whole sectors, so none waits for this request.
    if not known.device.in_memory:
        request.count_in(known._inode.writes, known._inode)
    return False


cdef object hold_range(int fd, Known known, start, end):
    """Wait for the range, and return it held. The number *fd* stays the same file until then."""
    return ranges.hold(fd, known.inode(), start, end)


cdef object hold_to(int fd, Known known, uint64_t start, uint64_t end):
    """Return the range from *start* to *end*, held; without an end if the write makes the file longer.

    Earlier writes of greenlets that were waited for may have made the file shorter. So look at the size again
    when the range is granted, and take a longer range if need be."""
    cdef bint grows
    while True:
        grows = known.kind & REGULAR and end > <uint64_t>file_size(fd)
        mine = hold_range(fd, known, start, ranges.EVERYTHING if grows else end)
        if grows or not known.kind & REGULAR or end <= <uint64_t>file_size(fd):
            return mine
        mine.let_go()


cdef object shield_in(mine, int fd, work):
    """Return the `Shielded` of ``work()``, which runs in the range that *mine* holds and gives the range back
    at its end. If the work can't begin because memory is short, give the range back at once and raise."""
    try:
        return Shielded(fd, work, mine)
    except BaseException:
        mine.let_go()
        raise


cdef object work_in(mine, int fd, work):
    """Wait for the end of ``work()`` in the range of *mine*, and return its result. See `shield_in`."""
    return shield_in(mine, fd, work).get()


def settle(int fd):
    """Wait until no write to the file *fd* is under way in this process, not even one of a killed greenlet.
    Then the file ends where it seems to end. Until the caller waits again, no other greenlet of this thread
    writes there."""
    cdef Known known = know(fd, None)
    cdef Inode inode = known.inode()
    if inode.ranges is not None or inode.writes.count:
        hold_range(fd, known, 0, ranges.EVERYTHING).let_go()


cdef object change(int fd, Known known, int64_t start, Request request, Pool pool=None):
    """Make the call *request*, which changes the file *fd* from *start* on. Return its result, or minus the
    errno. The call holds the file from *start* on if greenlets hold ranges of it."""
    current_driver().check_caller()
    request.file = known
    if not takes_turn(known, request):
        return perform(request, known, pool)

    def work():
        try:
            request.count_in(mine.writes, mine)
            return perform(request, known, pool)
        finally:
            request.end_write_unless_under_way()

    mine = hold_range(fd, known, max(0, start), ranges.EVERYTHING)
    return work_in(mine, fd, work)


cdef int64_t _change_in(mine, Request request, Known known) except? -4096:
    """Make a call that changes the file, in the range that *mine* holds. Return its result, or minus the
    errno."""
    request.file = known
    request.count_in(mine.writes, mine)
    return perform(request, known)


def ftruncate(fd, Py_ssize_t length, *, bint is_told=False):
    """Set the size of the file *fd* to *length* bytes. Raise OSError. With *is_told* audit hooks see the
    call: they see `os.ftruncate`, but no truncation by a file object."""
    cdef int number = c_int(fd)
    cdef Known known
    cdef int64_t result
    if is_told:
        sys.audit('os.truncate', number, length)
    known = know_open(number)
    # The call frees the memory of the bytes that it cuts off, and a large amount takes time.
    if in_line(known, max(0, file_size(number) - length)):
        result = make_here(new_call(number, None, SYS_ftruncate, number, length))
    else:
        result = change(number, known, length, new_call(number, None, SYS_ftruncate, number, length))
    if result < 0:
        raise failed(result, None)


cdef int64_t truncate_file(int fd, Known known, int64_t length, mine) except? -4096:
    """Set the size of the file to *length* bytes, in the range that *mine* holds. Return 0, or minus the
    errno."""
    return _change_in(mine, new_call(fd, None, SYS_ftruncate, fd, length), known)


def posix_fallocate(fd, Py_ssize_t offset, Py_ssize_t length):
    """Allocate *length* bytes at *offset* of the file *fd*, as `os.posix_fallocate` does. Raise OSError."""
    cdef int number = c_int(fd)
    cdef Known known = know_open(number)
    cdef int64_t result
    result = change(number, known, offset, new_call(number, None, POSIX_FALLOCATE, number, offset, length))
    if result < 0:
        raise failed(result, None)


cdef int64_t fallocate_file(int fd, Known known, int mode, int64_t offset, int64_t length, mine) except? -4096:
    """Make the call fallocate(2), in the range that *mine* holds. Return 0, or minus the errno."""
    return _change_in(mine, new_call(fd, None, SYS_fallocate, fd, mode, offset, length), known)
