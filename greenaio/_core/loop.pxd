from libc.stdint cimport uint64_t

from greenaio._core.driver cimport Driver
from greenaio._core.tally cimport Tally

# The driver of one hub, with all that it has in the loop.
cdef class HubDriver(Driver):
    # The watcher of the eventfd. It keeps the loop running
    # while `_holds_loop`, as long as a greenlet is parked.
    cdef object _watcher
    cdef bint _holds_loop
    # The time at which to ask for native AIO again, because it was used up, in ns; 0: never.
    cdef uint64_t _attach_again
    # The timer that flushes again, or None; and the seconds that the next one waits.
    cdef object _retry
    cdef double _retry_after
    # The timer that looks for requests that take too long, while any request is under way.
    cdef object _stuck

    cdef int _attached_again(self, int depth) except -1
    cdef int _look_for_stuck(self) except -1

cdef set drivers
cdef Tally past
