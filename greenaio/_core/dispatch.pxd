cimport cython
from libc.stdint cimport int64_t, uint64_t

from greenaio._core.engine cimport Engine
from greenaio._core.fork cimport forked
from greenaio._core.mailbox cimport Inbox
from greenaio._core.policy cimport budget, polling
from greenaio._core.request cimport Request
from greenaio._core.threads cimport Pool

# The ways that a request can go. ASK: native AIO with RWF_NOWAIT, so that a request that would wait comes
# back with EAGAIN. PLAIN: native AIO; the request does not wait here, or there is no way to ask. THREAD: a
# native thread makes the system call, and may wait. NONE: no way is left, and the last result is the result.
cdef enum Way:
    ASK
    PLAIN
    THREAD
    NONE

cdef class Dispatcher

# An open file implements this. The driver asks it for the next way of a request that the kernel has declined.
cdef class Ways:
    cpdef int next_way(self, Dispatcher driver, Request request, int64_t result, bint asked) except -1
    cpdef Pool pool(self)

cdef class Dispatcher:
    cdef object __weakref__
    cdef readonly object hub
    cdef readonly Engine engine
    cdef readonly Inbox inbox
    # False: the kernel gave no context, and threads make all calls.
    cdef readonly bint native
    cdef readonly bint closed
    # After a fork the next use attaches the driver to the kernel again.
    cdef bint must_attach
    # The number of drain passes under way. In a pass, `Parking.park` may
    # switch to the next greenlet, and the end of the pass submits.
    cdef int sections
    # The eventfd is signalled, and the watcher was not called since.
    cdef bint asked_for_pass
    # The queued callback that submits at the end of this hub turn, or None.
    cdef object turn_end
    # See policy.pxd for both.
    cdef budget _budget
    cdef polling _polling

    cdef int flush(self) except -1
    cdef int end_turn_soon(self) except -1
    cdef int ask_for_pass(self) except -1
    cdef bint lend(self, Request request, Pool pool) except -1
    cdef int let_run(self, Request request, Pool pool) except -1
    cdef int reap(self) except -1
    cdef int unready(self, Request request) except -1
    cdef bint poll(self) except -1

    # For dispatch.pyx alone.
    @cython.final
    cdef int _tell_of_stall(self) except -1
    @cython.final
    cdef bint _call_here(self, Request request) except -1
    @cython.final
    cdef int _move_declined(self) except -1
    @cython.final
    cdef int _move(self, Request request) except -1
    @cython.final
    cdef int _move_to(self, int way, Request request, Pool pool) except -1

    # `hub.HubDriver` implements these: it knows the loop, and opens the context of the kernel.
    cdef int attach(self) except -1
    cpdef bint has_aio(self) except -1
    cdef int retry_soon(self) except -1

# Run the handlers of the bell.
cdef int react_to_fork() except -1

cdef inline int notice_fork() except -1:
    """Run the handlers of the bell, if this process was forked by C code and has not heard of it. Each
    operation asks this, so a call is made only if the answer is yes."""
    return react_to_fork() if forked() else 0
