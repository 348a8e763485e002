# cython: language_level=3, boundscheck=False, wraparound=False
"""Native AIO: the requests on O_DIRECT files, also those whose memory, offset or length O_DIRECT refuses."""

from libc.stdint cimport int64_t, uint64_t

from greenaio._core.memory import aligned_buffer
from greenaio._files import ranges, sectors
from greenaio._files.arguments import flat

from greenaio._core.context cimport BATCH_MAX, PREAD, PWRITE
from greenaio._core.dispatch cimport ASK, THREAD
from greenaio._core.driver cimport Driver
from greenaio._core.hub cimport current_driver
from greenaio._core.memory cimport AlignedBuffer, scratch
from greenaio._core.request cimport Request, new_request
from greenaio._files.changes cimport hold_to, truncate_file, work_in
from greenaio._files.facts cimport APPEND, REGULAR, file_size
from greenaio._files.route cimport Known, by_thread


cdef int64_t by_aio(Driver driver, Request request, Known known) except? -4096:
    """Submit the request by native AIO. Return bytes moved, or minus the errno. If native AIO declines the
    request, the driver moves it to its next way."""
    request.share = driver.engine.share(known.device.number, known.device.limit)
    request.file = known
    request.may_move = True
    return driver.perform(request)


cdef int64_t direct(Driver driver, Request request, Known known) except? -4096:
    """Make an O_DIRECT read or write. Return bytes moved, or minus the errno. If the file system can say that
    it would wait, it is asked to say so."""
    cdef int way = known.way(driver, request)
    cdef int64_t result
    if way == THREAD:
        return by_thread(driver, request, known)
    if way == ASK:
        request.ask()
    result = by_aio(driver, request, known)
    if request.asked:
        known.answered(request, result)
    return result


cdef bint is_misaligned(Known known, Request request) noexcept:
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


cdef int64_t read_misaligned(Driver driver, Known known, Request asked, buffers) except? -4096:
    """Read whole sectors into a buffer of our own, and copy the bytes asked for. Return bytes read, or minus
    the errno."""
    cdef int64_t before = misfit(known, asked.offset)
    cdef AlignedBuffer memory = scratch(whole_sectors(known, before + asked.nbytes))
    cdef Request request = new_request(PREAD, asked.fd, asked.offset - before, asked.flags, asked.max_batch)
    cdef int64_t got
    request.pin(memory)
    got = direct(driver, request, known)
    if got < 0:
        return got
    got = max(0, min(<int64_t>asked.nbytes, got - before))
    view = memoryview(memory)[before:before + got]
    for buffer in buffers:
        target = flat(buffer)[:len(view)]
        target[:] = view[:len(target)]
        view = view[len(target):]
    return got


cdef object write_misaligned(Known known, Request asked, buffers):
    """Write by reading and writing whole sectors, in the range that it holds. Return bytes written, or minus
    the errno. The data is copied first, so the caller's buffers may change."""
    data = b''.join([flat(buffer) for buffer in buffers])
    cdef int fd = asked.fd
    cdef int flags = asked.flags
    # Past 2^63 the kernel returns the right error.
    cdef uint64_t offset = asked.offset, end = offset + len(data)
    cdef uint64_t start = offset - misfit(known, offset)

    def aligned(bint reading, memory, at):
        cdef Request request = new_request(
            PREAD if reading else PWRITE, fd, at, 0 if reading else flags, BATCH_MAX)
        request.pin(memory)
        if not reading:
            request.count_in(mine.writes, mine)
        return direct(current_driver(), request, known)

    def work():
        span = aligned_buffer(whole_sectors(known, end - start))
        size = (lambda: file_size(fd)) if known.kind & REGULAR else (lambda: ranges.EVERYTHING)
        return sectors.write(data, offset, known.align, size, lambda memory, at: aligned(True, memory, at),
                               lambda memory, at: aligned(False, memory, at),
                               lambda size: truncate_file(fd, known, size, mine), span)

    mine = hold_to(fd, known, start, start + whole_sectors(known, end - start))
    return work_in(mine, fd, work)
