cimport cython
from cpython.buffer cimport Py_buffer
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport EAGAIN, EOPNOTSUPP
from libc.stdint cimport int64_t, uint64_t

from greenaio._core.handle cimport Handle, Writes, take

cdef extern from "<errno.h>":
    const int ECANCELED

cdef extern from "<sys/uio.h>":
    struct iovec:
        void *iov_base
        size_t iov_len

# The opcode of a request that native AIO does not know: a system call for a thread.
cdef enum:
    CALL = -1

# Flags of the kernel, from <linux/fs.h>. RWF_NOWAIT makes it decline a request that would wait.
cdef enum:
    RWF_NOWAIT = 8
    RWF_APPEND = 16

# The states of a request. The table at the begin of request.pyx has all changes between them.
cpdef enum State:
    NEW
    PENDING
    IN_FLIGHT
    DECLINED
    DONE

cdef class Share


# The methods that the engine and the driver call for each request are in line here: a call into another
# module costs twice as much as what they do.
@cython.final
cdef class Request:
    cdef readonly State state

    # The operation, as the caller asked for it. `flags` are RWF_*; `direction` is READ, WRITE, SYNC or OTHER;
    # `nbytes` is the sum over all buffers; `other_fd` is a second number that the call needs, or -1; `name`
    # is what the call is called in `os`, if its number does not tell.
    cdef readonly int opcode
    cdef readonly int fd
    cdef int other_fd
    cdef readonly unsigned int flags
    cdef int direction
    cdef readonly int max_batch
    cdef readonly int64_t offset
    cdef readonly uint64_t nbytes
    cdef str name

    # Its progress. `began` is the time at which it was first offered to the kernel or a thread, or held back,
    # in ns; 0: not yet. `done` counts the bytes that earlier ways have moved. `answer` is the answer of the
    # last way while the request is DECLINED, and the sum of all ways once it is DONE.
    cdef readonly uint64_t began
    cdef uint64_t done
    cdef int64_t answer

    # Its greenlet. `waiter` is the greenlet that is parked on this very request, or None. `abandoned`: that
    # greenlet is gone. `stays`: the greenlet may be killed and another come for the result, so the request is
    # never abandoned. `must_run`: a thread makes the call even if the greenlet is gone before the thread
    # began. `reported`: an operator was told that the request is stuck.
    cdef readonly object waiter
    cdef readonly bint abandoned
    cdef bint stays
    cdef bint must_run
    cdef bint reported

    # Its ways. `asked`: it has RWF_NOWAIT because we have added that flag.
    # `may_move`: if the kernel declines the request, `file`, a `Ways`, knows
    # another way. `file` also learns that a submission has stalled; it may be None.
    cdef bint asked
    cdef public bint may_move
    cdef public object file

    # The buffers. A single one has its pin in `_view` and its address in
    # `_one`. Several have their pins in `_views`, and an iovec behind them
    # in the same block. `buffers` names the part that is still to be moved.
    cdef Py_buffer _view
    cdef iovec _one
    cdef Py_buffer *_views
    cdef iovec *buffers
    cdef int buffer_count

    # Objects that it holds until its end. `keep` is any object that must live until the kernel is done.
    # `writes` are the writes in which it counts until it is over; None if it changes no file. `handle` and
    # `other` keep `fd` and `other_fd` open while they are needed. `job` is the memory that a native thread
    # works on. If `gives_fd`, the answer is an fd, which must not be lost. `fifo` (O_PATH) and `peer` (both
    # ends) belong to the FIFO for whose other end an open may wait; or -1.
    cdef object keep
    cdef Writes writes
    cdef Handle handle
    cdef Handle other
    cdef void *job
    cdef bint gives_fd
    cdef int fifo
    cdef int peer

    # Its place. `share` is the share of its device, or None, and `admitted` says whether
    # the share counts it. `queue` is the list that owns it, or NULL, and the other two
    # are its neighbours there. They are plain pointers, because the list has one
    # reference for each of its requests, and a change of the links must not run any code.
    cdef Share share
    cdef bint admitted
    cdef void *queue
    cdef void *preceding
    cdef void *following

    cdef int pin(self, buffer) except -1
    cdef _drop(self)
    cdef int count_in(self, Writes writes, owner) except -1
    cdef end_write(self)
    cdef end_write_unless_under_way(self)
    cdef int pin_all(self, buffers) except -1
    cdef void skip(self, uint64_t nbytes) noexcept
    cpdef int count_done(self, uint64_t nbytes) except -1
    cdef unpin(self)
    cdef void meet(self) noexcept
    cpdef int ask(self) except -1
    cdef let_go_of_numbers(self)
    cdef release(self)

    cdef inline int hold(self) except -1:
        """Keep the numbers of the request, so that they go on meaning the same files.

        Raises OSError (EBADF) if a thread is closing one of them. A number that is kept already is left
        alone."""
        if self.handle is None and self.fd >= 0:
            self.handle = take(self.fd)
        if self.other is None and self.other_fd >= 0:
            self.other = take(self.other_fd)
        return 0

    cdef inline bint stop_asking(self) noexcept:
        """Give the request the caller's flags again. Return whether it was asked not to wait."""
        # The flag may also be the caller's own, and then it stays.
        if not self.asked:
            return False
        self.asked = False
        self.flags &= ~<unsigned int>RWF_NOWAIT
        return True

    cdef inline bint is_declined_by(self, int64_t result) noexcept:
        """Return whether the kernel, with this *result*, leaves something to do for another way.

        An abandoned request goes no other way, because no greenlet waits for it. ECANCELED says that the hub
        or the process ends."""
        if not self.may_move or self.abandoned:
            return False
        # io_submit itself refused it, and another way may still do it.
        if self.state == PENDING:
            return result != -ECANCELED
        # The kernel has tried. Without RWF_NOWAIT its answer is final. With it,
        # two errors and a short result may only mean "this would wait". A short
        # result may also be the end of the file: `Ways.next_way` tells them apart.
        return self.asked and (result == -EAGAIN or result == -EOPNOTSUPP or 0 <= result < <int64_t>self.nbytes)


# A list that goes through its requests, by `preceding` and `following`. A request is in
# one list at a time, so two links are enough. `append` and `remove` run no other code.
@cython.final
cdef class RequestList:
    cdef void *head
    cdef void *_tail
    cdef readonly int count

    cdef inline void append(self, Request request) noexcept:
        # This is the reference that keeps a request in flight alive after its greenlet is gone.
        Py_INCREF(request)
        request.queue = <void *>self
        request.preceding = self._tail
        request.following = NULL
        if self._tail != NULL:
            (<Request>self._tail).following = <void *>request
        else:
            self.head = <void *>request
        self._tail = <void *>request
        self.count += 1

    cdef inline void remove(self, Request request) noexcept:
        if request.preceding != NULL:
            (<Request>request.preceding).following = request.following
        else:
            self.head = request.following
        if request.following != NULL:
            (<Request>request.following).preceding = request.preceding
        else:
            self._tail = request.preceding
        request.queue = request.preceding = request.following = NULL
        self.count -= 1
        # The caller has a reference as well, so no request ends
        # here, and no destructor runs in the middle of a change.
        Py_DECREF(request)

    cdef inline Request first(self):
        return <Request>self.head if self.head != NULL else None

    cdef inline Request popleft(self):
        # The local variable has a reference of its own, which outlives the reference of the list.
        cdef Request request = self.first()
        if request is not None:
            self.remove(request)
        return request


# The share of one device in an engine: at most `limit` requests from admission to event, of which `admitted`
# are there now. The rest is in `held`, first in, first out.
@cython.final
cdef class Share:
    cdef readonly int limit
    cdef readonly int admitted
    cdef readonly RequestList held


cdef void advance(iovec *buffers, int count, uint64_t nbytes) noexcept
cdef Request new_request(int opcode, int fd, int64_t offset, unsigned int flags, int max_batch)
