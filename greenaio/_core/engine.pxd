from cpython.buffer cimport Py_buffer
from libc.stdint cimport int64_t, uint64_t

from greenaio._core.context cimport Context
from greenaio._core.handle cimport Handle, Writes
from greenaio._core.tally cimport Tally

cdef extern from "<sys/uio.h>":
    struct iovec:
        void *iov_base
        size_t iov_len

cdef enum:
    CALL = -1       # no opcode of native AIO: a system call for a thread

cdef enum:
    RWF_NOWAIT = 8
    RWF_APPEND = 16

cpdef enum State:
    NEW
    PENDING
    IN_FLIGHT
    DECLINED
    DONE

cdef class Share

cdef class Request:
    cdef readonly State state
    cdef readonly int opcode
    cdef readonly int fd
    cdef readonly unsigned int flags    # RWF_*
    cdef int direction                  # READ, WRITE, SYNC or OTHER
    cdef readonly uint64_t began        # when it was offered first, or held; ns; 0: not yet
    cdef bint asked                     # not to wait, by a flag of ours
    cdef public bint may_move           # its `file` knows another way, should the kernel decline this one
    cdef readonly int max_batch
    cdef readonly int64_t offset
    cdef readonly uint64_t nbytes       # wanted; the sum where there are several buffers
    cdef uint64_t done                  # bytes that ways before this one have moved
    cdef int64_t _result                # the kernel's answer, once DECLINED; the sum of all ways, once DONE
    cdef readonly object waiter         # the greenlet parked on this very request, or None
    cdef object keep                    # whatever else must live until the kernel is done
    cdef Writes writes                  # that it counts in until it is over; None if it changes no file
    cdef Handle handle                  # of the number `fd`, for as long as it needs that; or None
    cdef Handle other                   # of `other_fd`, likewise
    cdef Py_buffer _view                # the pin on one buffer, named by `_one` ...
    cdef iovec _one
    cdef Py_buffer *_views              # ... or on many, with an iovec on the heap; NULL for one
    cdef iovec *_iovec                  # what is still to be moved
    cdef int _count                     # buffers pinned
    cdef Share share                    # of its device, or None
    cdef bint admitted                  # by its share, on all its ways
    cdef public object file             # learns that its submission stalled, and knows its ways; or None
    cdef void *_job                     # what a thread works on; lives as long as we do
    cdef int other_fd                   # a second one that it needs, or -1
    cdef bint gives_fd                  # its result is an fd, which must not be lost
    cdef str name                       # what its call is called in `os`, if its number does not tell
    cdef int fifo                       # O_PATH, closed with it: the FIFO for whose other end it may wait; or -1
    cdef int peer                       # both ends of that, closed with it; or -1
    cdef bint must_run                  # even if its greenlet is gone before a thread had begun
    cdef bint stays                     # its greenlet may be killed and another come for the result: never abandoned
    cdef readonly bint abandoned        # its greenlet is gone
    cdef bint told                      # somebody was told that it is stuck
    cdef void *_previous                # neighbours in the RequestList that holds us
    cdef void *_next
    cdef void *_list

    cdef _drop(self)
    cdef int pin(self, buffer) except -1
    cdef int pin_all(self, buffers) except -1
    cdef void skip(self, uint64_t nbytes) noexcept
    cpdef int count_done(self, uint64_t nbytes) except -1
    cdef _unpin(self)
    cdef void meet(self) noexcept
    cpdef int ask(self) except -1
    cdef bint stop_asking(self) noexcept
    cdef bint is_declined_by(self, int64_t result) noexcept
    cdef int hold(self) except -1
    cdef int count_in(self, Writes writes, owner) except -1
    cdef end_write(self)
    cdef end_write_unless_under_way(self)
    cdef let_go_of_numbers(self)
    cdef release(self)

cdef class RequestList:
    cdef void *_head
    cdef void *_tail
    cdef readonly int count

    cdef void append(self, Request request) noexcept
    cdef Request popleft(self)
    cdef void remove(self, Request request) noexcept
    cdef Request first(self)

cdef class Share:
    cdef readonly int limit             # requests
    cdef readonly int admitted          # of them pending or in flight
    cdef readonly RequestList held      # the rest, first in, first out

cdef class Engine(Tally):
    cdef readonly Context context
    cdef readonly RequestList pending
    cdef readonly RequestList in_flight
    cdef readonly RequestList lent      # with native threads
    cdef readonly RequestList declined  # to be moved to their next ways ...
    cdef readonly RequestList moving    # ... which they are asked for
    cdef readonly RequestList ready     # DONE, not yet handed over
    cdef readonly dict shares           # by device
    cdef readonly bint blocked          # the kernel is full: the next completion submits
    cdef readonly int depth
    cdef int burst                      # so many may wait for each other, if there is anything in flight; 0 in a pass
    cdef bint is_instant                # what was submitted last was done by the time that it was submitted
    cdef object _device                 # asked for last
    cdef Share _share                   # of it
    cdef readonly uint64_t slow_ns      # how long the last slow submission took
    cdef readonly int slow_batch        # and how many requests it had
    cdef uint64_t _reaped_ns            # when what is being reaped was done, or a little later; 0: not known
    cdef bint _to_close                 # a request that the kernel has taken is the last to need a number
    cdef int _singly                    # so many more are offered one by one, to find who stalls
    cdef uint64_t submitted_ns          # what the clock said after the last io_submit
    cdef readonly Request culprit       # the first found of those, until the driver takes it
    cdef readonly uint64_t culprit_ns   # how long it took

    cdef void reaps(self) noexcept
    cdef void _time(self, Request request, int way, int64_t result) noexcept
    cdef void _taken(self, Request request) noexcept
    cdef int _close_numbers(self) except -1
    cdef void _finish(self, Request request, int64_t result) noexcept
    cdef void _unqueue(self, Request request) noexcept
    cdef void _end(self, Request request, int64_t result) noexcept
    cdef void _leave_share(self, Request request) noexcept
    cdef Request next_declined(self)
    cdef void _undecline(self, Request request) noexcept
    cdef void settle(self, Request request, int64_t result) noexcept
    cdef int enqueue_again(self, Request request) except -1
    cdef int cancel_declined(self, int64_t result) noexcept
    cdef void lend(self, Request request) noexcept
    cdef void take_back(self, Request request) noexcept
    cdef Share share(self, device, int limit)
    cdef int batch_limit(self, Request request) noexcept
    cpdef bint enqueue(self, Request request) except -1
    cpdef int flush(self) except -1
    cpdef int reap(self) except -1
    cpdef bint withdraw(self, Request request) except -1
    cpdef int refuse(self, int code) except -1
    cpdef int cancel(self, int code) except -1
    cdef long _offer(self) except? -4096
    cdef void _stalled(self, uint64_t took, int n, bint waited) noexcept
    cpdef Request take_culprit(self)

cdef void advance(iovec *buffers, int count, uint64_t nbytes) noexcept
cdef void close_path_fd(int fd) noexcept nogil
cdef int meetings() noexcept
cdef int meetings_under_way() noexcept
cdef Request new_request(int opcode, int fd, int64_t offset, unsigned int flags, int max_batch)
