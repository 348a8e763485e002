from cpython.buffer cimport Py_buffer
from libc.stdint cimport int64_t, uint64_t

from greenaio._context cimport Context

cdef extern from "<sys/uio.h>":
    struct iovec:
        void *iov_base
        size_t iov_len

cpdef enum State:
    NEW
    PENDING
    IN_FLIGHT
    DONE

cdef class Request:
    cdef readonly State state
    cdef readonly int opcode
    cdef readonly int fd
    cdef readonly unsigned int flags    # RWF_*
    cdef readonly bint refused          # io_submit itself said no: the kernel never had it
    cdef readonly int max_batch
    cdef readonly int64_t offset
    cdef readonly uint64_t nbytes       # wanted; the sum where there are several buffers
    cdef int64_t _result                # the kernel's word, once DONE
    cdef object waiter                  # the greenlet parked on this very request, or None
    cdef public object keep             # whatever else must live until the kernel is done
    cdef Py_buffer _view                # the pin on one buffer ...
    cdef Py_buffer *_views              # ... or on many, with the iovec that names them
    cdef iovec *_iovec
    cdef int _count                     # buffers pinned
    cdef void *_previous                # neighbours in the RequestList that holds us
    cdef void *_next
    cdef void *_list

    cdef int pin(self, buffer) except -1
    cdef int pin_all(self, buffers) except -1
    cdef _unpin(self)
    cdef release(self)

cdef class RequestList:
    cdef void *_head
    cdef void *_tail
    cdef readonly int count

    cdef void append(self, Request request) noexcept
    cdef Request popleft(self)
    cdef void remove(self, Request request) noexcept
    cdef Request first(self)

cdef class Engine:
    cdef readonly Context context
    cdef readonly RequestList pending
    cdef readonly RequestList in_flight
    cdef readonly RequestList ready     # DONE, not yet handed over
    cdef readonly bint blocked          # the kernel is full: the next completion submits
    cdef readonly int depth
    cdef readonly uint64_t submitted
    cdef readonly uint64_t completed
    cdef readonly uint64_t batches

    cdef void _taken(self, Request request) noexcept
    cdef void _finish(self, Request request, int64_t result) noexcept
    cdef int batch_limit(self, Request request) noexcept
    cpdef bint enqueue(self, Request request) except -1
    cpdef int flush(self) except -1
    cpdef int reap(self) except -1
    cpdef bint withdraw(self, Request request) except -1
    cpdef int refuse(self, int code) except -1
    cpdef int cancel(self, int code) except -1
    cdef long _offer(self) except? -4096

cdef Request new_request(int opcode, int fd, int64_t offset, unsigned int flags, int max_batch)
