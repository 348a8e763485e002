from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint64_t

from greenaio._core.engine cimport Engine, Request, RequestList
from greenaio._core.mailbox cimport Inbox
from greenaio._core.threads cimport Pool

cdef enum Way:          # how a request goes
    ASK                 # native AIO with RWF_NOWAIT: what would wait comes back as EAGAIN
    PLAIN               # native AIO: it does not wait here, or there is no way to ask
    THREAD
    NONE                # no way is left: the last result is the result

cdef class Driver

cdef class Ways:
    cpdef int next_way(self, Driver driver, Request request, int64_t result, bint asked) except -1
    cpdef Pool pool(self)

cdef class Driver:
    cdef object __weakref__
    cdef readonly object hub
    cdef readonly Engine engine
    cdef readonly Inbox inbox       # what native threads have done for us
    cdef readonly bint native       # False: the kernel gave us no context, everything takes a thread
    cdef readonly bint closed
    cdef readonly int waiting       # greenlets parked here
    cdef readonly int forks         # between the process that made it and this one
    cdef object _watcher
    cdef bint _holds_loop
    cdef bint _reattach             # forked: the context is to be made anew
    cdef uint64_t _attach_again     # when to ask for native AIO again, which was used up; ns, 0: never
    cdef int _sections              # drain passes under way
    cdef bint _asked_for_pass       # the eventfd is signalled, and its watcher was not called since
    cdef object _turn_end           # the queued callback that ends the section of this hub turn, or None
    cdef object _retry
    cdef double _retry_after        # seconds
    cdef object _stuck              # the timer that looks for what takes too long, while anything is under way
    cdef int _run                   # wakes and in-line completions since the loop had its turn
    cdef uint64_t _run_began        # ns
    cdef uint64_t _poll_ns          # how long the next spin lasts at most
    cdef uint64_t _unpolled_since   # when the last spin ended in vain, ns; 0: it did not

    cdef int64_t perform(self, Request request) except? -4096
    cdef int64_t perform_by_thread(self, Request request, Pool pool) except? -4096
    cdef int begin(self, Request request, bint more) except -1
    cdef int begin_by_thread(self, Request request, Pool pool) except -1
    cdef int let_run(self, Request request, Pool pool) except -1
    cdef bint _lend(self, Request request, Pool pool) except -1
    cdef int _move_declined(self) except -1
    cdef int _move(self, Request request) except -1
    cdef int _move_to(self, int way, Request request, Pool pool) except -1
    cdef int _unready(self, Request request) except -1
    cdef int64_t end(self, Request request) except? -4096
    cpdef bint has_aio(self) except -1
    cdef int _attached_again(self, int depth) except -1
    cdef int check_caller(self) except -1
    cdef int end_in_line(self) except -1
    cdef object _caller(self)
    cdef int64_t _result(self, Request request, current, uint64_t now=*) except? -4096
    cdef int _end_turn_soon(self) except -1
    cdef object _park(self, Request request, current)
    cdef PyObject *_next(self) noexcept
    cdef _leave(self, Request request)
    cdef int _submit_admitted(self) except -1
    cdef int _wake(self, Request request) except -1
    cdef int _reap(self) except -1
    cdef int _drain(self) except -1
    cdef int _flush(self) except -1
    cdef int _ask_for_pass(self) except -1
    cdef int _tell_of_stall(self) except -1
    cdef int _look_for_stuck(self) except -1
    cdef bint _more_is_ready(self) except -1
    cdef bint _run_is_over(self, int limit=*, uint64_t now=*) noexcept
    cdef bint _poll(self) except -1
    cdef int _hold_loop(self) except -1
    cdef int _let_go_of_loop(self) except -1
    cdef int _attach(self) except -1
    cdef int _abandon_all(self, RequestList requests) except -1

cdef Driver current_driver()
