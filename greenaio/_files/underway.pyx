# cython: language_level=3, boundscheck=False, wraparound=False
"""Reads and writes that go on to their end when their greenlet is killed, because others wait for that end."""

cimport cython
from libc.stdint cimport int64_t, uint64_t

from greenaio._files import ranges

from greenaio._core.driver cimport Driver
from greenaio._core.hub cimport current_driver
from greenaio._core.job cimport as_call
from greenaio._core.request cimport IN_FLIGHT, RWF_APPEND, Request, new_request
from greenaio._core.threads cimport withdraw
from greenaio._files.arguments cimport failed
from greenaio._files.buffered cimport write_buffered
from greenaio._files.buffers cimport bounced, copy_back, is_ownerless, opcode_of, owned, pin
from greenaio._files.changes cimport hold_to, in_pages, shield_in, takes_turn
from greenaio._files.direct cimport direct
from greenaio._files.facts cimport APPEND, DIRECT, STORED
from greenaio._files.inline cimport end_in_line, means_its_writer, now
from greenaio._files.route cimport Known, in_line


cdef object shield_in_turn(Known known, Request request):
    """Return the `Shielded` of an aligned or buffered write, when greenlets hold ranges of the file. A write
    at the file's own position holds the whole file, because the position may have moved when the write
    begins."""
    cdef bint is_direct = known.kind & DIRECT and not request.flags & RWF_HIPRI
    cdef uint64_t start = request.offset, end = start + request.nbytes

    def work():
        try:
            request.count_in(mine.writes, mine)
            if is_direct:
                return direct(current_driver(), request, known)
            return write_buffered(current_driver(), request, known)
        finally:
            request.end_write_unless_under_way()

    if known.kind & APPEND or request.flags & RWF_APPEND or request.offset < 0:
        start, end = 0, ranges.EVERYTHING
    elif not is_direct:
        start, end = in_pages(start, end)
    mine = hold_to(request.fd, known, start, end)
    return shield_in(mine, request.fd, work)


@cython.final
cdef class Underway:
    """A read(2) or write(2) at the file's own position, which runs in a thread.

    The kernel moves the position when the bytes have landed. Until then a call that takes the lock of the
    position would wait for the disk, so the hub may not make one."""

    cdef Driver _driver
    cdef Request _request
    # Used instead of these two: the `Shielded` of a write that works in a range.
    cdef object _shield
    # The buffers of the caller, and the memory that is used instead of buffers that own nothing.
    cdef object _asked
    cdef object _memory
    cdef object _name
    cdef int64_t _result

    def get(self):
        """Wait for the call. Return the number of bytes moved. Raise OSError. If this greenlet is killed, the
        call goes on, and another greenlet may wait for it."""
        cdef bint reading
        if self._shield is not None:
            self._result = self._shield.get()
        elif self._request is not None:
            try:
                self._result = self._driver.end(self._request)
            except BaseException:
                # The caller was killed, and buffers that own no memory may be gone with it. The greenlet that
                # waits next must not write there.
                self._asked = self._memory
                raise
        if self._result < 0:
            raise failed(self._result, self._name)
        reading = self._request is not None and self._request.direction == 0
        if reading and self._memory is not self._asked:
            if type(self._asked) is tuple:
                copy_back(self._memory, self._asked, self._result)
            else:
                copy_back((self._memory,), (self._asked,), self._result)
        return self._result

    def withdraw(self):
        """Take the call of a killed greenlet back if no thread has begun it. Return whether that was possible;
        then the call never happens."""
        if self._request is None or self._request.state != IN_FLIGHT or not withdraw(self._request):
            return False
        self._driver.engine.take_back(self._request)
        self._request.release()
        return True


cdef object begin_at_position(bint reading, int fd, Known known, asked, name):
    """Do the work of `File.begin_at_position`. A call that waits for no disk runs inline, and its `Underway`
    has the result."""
    cdef Driver driver = current_driver()
    cdef Underway one = Underway.__new__(Underway)
    cdef bint many = type(asked) is tuple
    cdef Request request = new_request(opcode_of(reading, many), fd, -1, 0, 1)
    driver.check_caller()
    if many:
        one._memory = owned(asked, reading)
    else:
        one._memory = bounced(asked, reading) if is_ownerless(asked) else asked
    one._asked, one._name = asked, name
    pin(request, one._memory)
    if in_line(known, request.nbytes, fd, -1) or not reading and means_its_writer(request, known):
        one._result = end_in_line(driver, now(request, 0))
        if reading and one._memory is not asked:
            copy_back(one._memory if many else (one._memory,), asked if many else (asked,), one._result)
    elif not reading and known.kind & STORED and takes_turn(known, request):
        one._shield = shield_in_turn(known, request)
    else:
        request.file = known
        as_call(request)
        one._driver, one._request = driver, request
        driver.begin_by_thread(request, known.pool())
    return one
