# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Requests and the queue that they pass through, without gevent and without waiting.

A request is in one place at a time, and these are all its ways:

    ==========  ==============  =====================================  =================
    from        to              when                                   list
    ==========  ==============  =====================================  =================
    NEW         PENDING         `Engine.enqueue`                       pending, or held
                                                                       by its `Share`
    PENDING     IN_FLIGHT       ``io_submit`` took it                  in_flight
    PENDING     DONE            ``io_submit`` refused it, or the       ready
                                process gave up (`refuse`, `cancel`)
    PENDING     NEW             `Engine.withdraw`                      none
    NEW         IN_FLIGHT       `Engine.lend`: a native thread's       lent
    IN_FLIGHT   NEW             `Engine.take_back`: none had begun it  none
    IN_FLIGHT   DONE            its event came, or its thread's        ready
                                result, or a fork took both away
                                (`cancel`)
    IN_FLIGHT,  DECLINED        the kernel did not do it, or not all,  declined; moving,
    PENDING                     and it may move to another way         while that is chosen
    DECLINED    PENDING         `Engine.enqueue_again`                 pending
    DECLINED    IN_FLIGHT       `Engine.lend`                          lent
    DECLINED    NEW             `Engine.withdraw`                      none
    DECLINED    DONE            no way was left, or a fork (`cancel`)  ready
    NEW         DONE            `Engine.settle`: done in line          ready
    DONE        --              handed over: `Engine.ready` loses it   none
    ==========  ==============  =====================================  =================

A request that the kernel declines is moved to its next way by the driver. Its greenlet stays parked, and its buffers
stay pinned. The result of a DONE request is final.

While a request is in a list, the list owns a reference to it: so the memory that the kernel may write
lives until the kernel says that it is done, whoever has forgotten the request meanwhile. Nothing here
runs Python code between a look at the kernel and the lists being right again; buffers are let go by
whoever takes a request out of `Engine.ready`, for that may run anything.
"""

import errno
import os

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.errno cimport EAGAIN, EINTR, EOPNOTSUPP
from libc.stdlib cimport free
from libc.stdint cimport uintptr_t
from posix.unistd cimport close

from greenaio._core.context cimport (
    BATCH_MAX, FDSYNC, FSYNC, PREAD, PREADV, PWRITE, PWRITEV, Context, times_waited,
)
from greenaio._core.handle cimport Handle, take
from greenaio._core.tally cimport BY_AIO, BY_THREAD, OTHER, READ, SYNC, WRITE, Tally, count_time

cdef enum:
    STALL_NS = 20000000 # io_submit took that long: it waited for a disk, or for the processor
    LOAD_SHARE = 4      # in flight for each that waits in a batch: so many keep the device busy
    SINGLY = 256        # requests offered one by one after that: twice a device's share


cdef extern from *:
    """
    #include <fcntl.h>
    #include <pthread.h>
    #include <signal.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <unistd.h>

    /* Both ends of the FIFO that an O_PATH fd is of. */
    static int open_both_ends(int fd)
    {
        char link[32];
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        return open(link, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    }

    /* Close *fd*, if it is still the O_PATH fd that we have opened. A daemon closes all numbers, and opens files
       of its own on them: in a child, while its parent waits for the path that this fd is of. */
    static inline void close_path_fd(int fd)
    {
        if (fcntl(fd, F_GETFL) & O_PATH)    /* -1, too, has that bit: where the kernel does not tell, close it */
            close(fd);
    }

    static void *close_one(void *fd)
    {
        close((int)(intptr_t)fd);
        return NULL;
    }

    /* Close *fd* in a thread: the file may be a server's, which is told. */
    static void close_elsewhere(int fd)
    {
        pthread_t thread;
        pthread_attr_t attributes;
        sigset_t all, before;
        int error;
        sigfillset(&all);
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        pthread_attr_setstacksize(&attributes, 128 * 1024);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        error = pthread_create(&thread, &attributes, close_one, (void *)(intptr_t)fd);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&attributes);
        if (error)
            close(fd);
    }
    """
    void c_close_path_fd "close_path_fd"(int fd) noexcept nogil
    void close_elsewhere(int fd)
    int open_both_ends(int fd)
    const int ECANCELED

cdef int _meetings = 0                  # FIFOs of which both ends were opened by `Request.meet` ...
cdef int _under_way = 0                 # ... and of those, the ones that still are


cdef void close_path_fd(int fd) noexcept nogil:
    """Close an O_PATH fd of ours, but not a file of the program that has its number by now."""
    c_close_path_fd(fd)


cdef int meetings() noexcept:
    """How often `Request.meet` has opened a FIFO."""
    return _meetings


cdef int meetings_under_way() noexcept:
    """How many of those are open still."""
    return _under_way


cdef void advance(iovec *buffers, int count, uint64_t nbytes) noexcept:
    """Move *buffers* behind their first *nbytes*."""
    cdef int i
    cdef uint64_t n
    for i in range(count):
        n = min(nbytes, <uint64_t>buffers[i].iov_len)
        buffers[i].iov_base = <char *>buffers[i].iov_base + n
        buffers[i].iov_len -= n
        nbytes -= n


cdef inline int direction_of(int opcode) noexcept:
    if opcode == PREAD or opcode == PREADV:
        return READ
    if opcode == PWRITE or opcode == PWRITEV:
        return WRITE
    return OTHER if opcode == CALL else SYNC


cdef Request new_request(int opcode, int fd, int64_t offset, unsigned int flags, int max_batch):
    cdef Request request = Request.__new__(Request)
    request.opcode = opcode
    request.direction = direction_of(opcode)
    request.fd = fd
    request.offset = offset
    request.flags = flags
    request.max_batch = max_batch
    request.other_fd = request.fifo = request.peer = -1
    return request


# No garbage collection: what a request refers to is let go at its end, and until then the engine's
# own reference, which no collector can see, keeps it alive anyway.
@cython.freelist(256)
@cython.no_gc
@cython.final
cdef class Request:
    """One operation on a file, from `Engine.enqueue` to its result.

    *buffers* is one bytes-like object, a sequence of them for PREADV and PWRITEV, None for FSYNC and
    FDSYNC; they stay pinned until the kernel is done. *offset* is in bytes, *flags* are ``os.RWF_*``.
    Raises OSError (EIO) for an operation that is none of `Opcode`, and what the buffer protocol
    raises for a buffer that can't be pinned.
    """

    def __init__(self, int opcode, int fd, buffers=None, int64_t offset=0, unsigned int flags=0,
                 *, int max_batch=BATCH_MAX):
        if self.opcode or self.state != NEW or self._count:
            raise ValueError('a request is made once')
        if opcode not in (PREAD, PWRITE, FSYNC, FDSYNC, PREADV, PWRITEV):
            raise OSError(errno.EIO, f'unknown operation {opcode}')
        if max_batch < 1:
            raise ValueError(f'max_batch must be at least 1, not {max_batch}')
        self.opcode = opcode
        self.direction = direction_of(opcode)
        self.fd = fd
        self.offset = offset
        self.flags = flags
        self.max_batch = max_batch
        self.other_fd = self.fifo = self.peer = -1
        if opcode in (PREADV, PWRITEV):
            self.pin_all(buffers)
        elif opcode in (PREAD, PWRITE):
            self.pin(buffers)

    def __dealloc__(self):
        if self._count or self._views != NULL:
            self._unpin()
        free(self._job)
        if self.handle is not None or self.other is not None or self.writes is not None:
            self._drop()                # a request that never began, or was to go again

    cdef _drop(self):
        try:
            self.let_go_of_numbers()
        finally:
            if self.writes is not None:
                self.end_write()

    cdef int pin(self, buffer) except -1:
        """Pin one buffer: writable for a read."""
        PyObject_GetBuffer(buffer, &self._view,
                           PyBUF_WRITABLE if self.opcode == PREAD else PyBUF_SIMPLE)
        self._count = 1
        self._one.iov_base, self._one.iov_len = self._view.buf, self._view.len
        self._iovec = &self._one
        self.nbytes = self._view.len
        return 0

    cdef int pin_all(self, buffers) except -1:
        """Pin a sequence of buffers, and name them in an iovec on the heap."""
        cdef int kind = PyBUF_WRITABLE if self.opcode == PREADV else PyBUF_SIMPLE
        cdef Py_ssize_t n = len(buffers)
        self._views = <Py_buffer *>PyMem_Malloc((n or 1) * (sizeof(Py_buffer) + sizeof(iovec)))
        if self._views == NULL:
            raise MemoryError
        self._iovec = <iovec *>(self._views + n)
        for buffer in buffers:
            if self._count == n:
                break               # it grew under us
            PyObject_GetBuffer(buffer, &self._views[self._count], kind)
            self._iovec[self._count].iov_base = self._views[self._count].buf
            self._iovec[self._count].iov_len = self._views[self._count].len
            self.nbytes += self._views[self._count].len
            self._count += 1
        return 0

    cpdef int count_done(self, uint64_t nbytes) except -1:
        """One of its ways has moved *nbytes*: the next begins behind them, and the result will have them."""
        self.done += nbytes
        advance(self._iovec, self._count, nbytes)
        self.skip(nbytes)
        return 0

    cdef void skip(self, uint64_t nbytes) noexcept:
        """*nbytes* are there already, and the iovec begins behind them."""
        if self.offset >= 0:        # else it is where the file's own position is, which has moved
            self.offset += nbytes
        self.nbytes -= nbytes

    cdef _unpin(self):
        cdef int i
        cdef int count = self._count
        cdef Py_buffer *views = self._views
        self._count = 0             # first: a release may run code that comes back here
        self._views = NULL
        self._iovec = NULL
        if views == NULL:
            if count:
                PyBuffer_Release(&self._view)
            return
        for i in range(count):
            PyBuffer_Release(&views[i])
        PyMem_Free(views)

    cdef int hold(self) except -1:
        """Take the numbers that it names, so that they go on meaning the same files. Raises EBADF if a thread is
        closing one of them."""
        if self.handle is None and self.fd >= 0:
            self.handle = take(self.fd)
        if self.other is None and self.other_fd >= 0:
            self.other = take(self.other_fd)
        return 0

    cdef int count_in(self, Writes writes, owner) except -1:
        """Count it in *writes*, the writes of *owner*, until it is over. Runs no other code, unless it counts
        already."""
        cdef Writes before = self.writes
        writes.begin(owner)
        self.writes = writes
        if before is not None:
            before.end()
        return 0

    cdef release(self):
        """Let go of the buffers, the numbers and all else. May run any code: take the request out of its list
        first."""
        global _under_way
        if self._count:
            self._unpin()
        self.waiter = None
        if self.abandoned and self.gives_fd and self._result >= 0:
            self.gives_fd = False       # no greenlet is there to take it
            if self.fifo >= 0 or self.peer >= 0:
                close(<int>self._result)    # at once: it would be a peer for others
            else:
                close_elsewhere(<int>self._result)
        if self.fifo >= 0:
            close_path_fd(self.fifo)
        if self.peer >= 0:
            close(self.peer)
            _under_way -= 1
        self.fifo = self.peer = -1
        self.keep = None
        self.file = None
        if self.writes is not None:
            self.end_write()
        if self.handle is not None or self.other is not None:
            self.let_go_of_numbers()

    cdef end_write(self):
        """It changes the file no more, nor will it. This may run any code."""
        cdef Writes writes = self.writes
        self.writes = None
        writes.end()

    cdef end_write_unless_under_way(self):
        """Stop counting it, if neither the kernel nor a thread has it: it was done in line, or has failed before."""
        if self.writes is not None and self._list == NULL:
            self.end_write()

    cdef let_go_of_numbers(self):
        """It needs them no more. This may close one of them, and run any code."""
        cdef Handle handle = self.handle, other = self.other
        self.handle = self.other = None
        if handle is not None:
            handle.let_go()
        if other is not None:
            other.let_go()

    cdef void meet(self) noexcept:
        """Have the open of a FIFO, in which a thread waits for the other end, return.

        Opening both ends gives every open that waits there its peer, and also one that is about to begin: other
        greenlets look at `meetings`, other processes find that their peer is gone again. The ends stay open until
        `release`, after the thread's open has returned: if they were closed before, a writer would get SIGPIPE.
        Where this process may not open both ends, the thread goes on waiting, and a peer will end it.
        """
        global _meetings, _under_way
        if self.fifo >= 0 and self.peer < 0:
            self.peer = open_both_ends(self.fifo)
            if self.peer >= 0:
                close(self.fifo)        # fds may be few: where 1,000 are killed, no more than before
                self.fifo = -1
                _meetings += 1
                _under_way += 1

    cpdef int ask(self) except -1:
        """Let native AIO decline it instead of waiting. The caller has not set that flag."""
        self.asked = True
        self.flags |= RWF_NOWAIT
        return 0

    cdef bint stop_asking(self) noexcept:
        """Give it the caller's flags again. Return whether it was asked not to wait."""
        if not self.asked:
            return False
        self.asked = False
        self.flags &= ~<unsigned int>RWF_NOWAIT
        return True

    cdef bint is_declined_by(self, int64_t result) noexcept:
        """Return whether the kernel, with this *result*, leaves something to do for another way.

        An abandoned request goes no other way, because no greenlet waits for it. ECANCELED says that the hub or the
        process ends."""
        if not self.may_move or self.abandoned:
            return False
        if self.state == PENDING:   # io_submit itself refused it
            return result != -ECANCELED
        return self.asked and (result == -EAGAIN or result == -EOPNOTSUPP or 0 <= result < <int64_t>self.nbytes)

    def of(self, Share share):
        """Make it count in *share*; return it. Before it is enqueued."""
        self.share = share
        return self

    @property
    def result(self):
        """Bytes moved, or minus the errno; None while in progress."""
        return self._result if self.state == DONE else None

    @property
    def entered(self):
        """Whether no greenlet is parked on this very request: it must not be switched into."""
        return self.waiter is None

    def __repr__(self):
        return (f'<Request {Opcode_name(self.opcode)} fd={self.fd} offset={self.offset} '
                f'nbytes={self.nbytes} {State_name(self.state)} result={self.result}>')


def Opcode_name(int opcode):
    return {PREAD: 'PREAD', PWRITE: 'PWRITE', FSYNC: 'FSYNC', FDSYNC: 'FDSYNC',
            PREADV: 'PREADV', PWRITEV: 'PWRITEV', CALL: 'CALL'}.get(opcode, str(opcode))


def State_name(int state):
    return ('NEW', 'PENDING', 'IN_FLIGHT', 'DECLINED', 'DONE')[state]


@cython.final
cdef class RequestList:
    """A first-in-first-out list of requests that owns them; removal from the middle costs nothing."""

    def __dealloc__(self):
        # What is in flight is leaked: the kernel may still write it.
        cdef Request request
        while self._head != NULL and (<Request>self._head).state != IN_FLIGHT:
            request = <Request>self._head
            self.remove(request)

    def __len__(self):
        return self.count

    def __iter__(self):
        requests = []               # first: making it may run a finalizer, which may change the list
        cdef void *at = self._head
        while at != NULL:
            requests.append(<Request>at)
            at = (<Request>at)._next
        return iter(requests)

    def __contains__(self, Request request not None):
        return request._list == <void *>self

    cdef void append(self, Request request) noexcept:
        Py_INCREF(request)
        request._list = <void *>self
        request._previous = self._tail
        request._next = NULL
        if self._tail != NULL:
            (<Request>self._tail)._next = <void *>request
        else:
            self._head = <void *>request
        self._tail = <void *>request
        self.count += 1

    cdef void remove(self, Request request) noexcept:
        if request._previous != NULL:
            (<Request>request._previous)._next = request._next
        else:
            self._head = request._next
        if request._next != NULL:
            (<Request>request._next)._previous = request._previous
        else:
            self._tail = request._previous
        request._list = request._previous = request._next = NULL
        self.count -= 1
        Py_DECREF(request)          # the caller has a reference: nothing ends here

    cdef Request first(self):
        return <Request>self._head if self._head != NULL else None

    cdef Request popleft(self):
        cdef Request request = self.first()
        if request is not None:
            self.remove(request)
        return request


@cython.final
cdef class Share:
    """What one device may have of an engine: *limit* requests from admission to event.

    A full device queue blocks ``io_submit`` whatever the flags say, so no device gets more than it can
    queue; and a frozen one fills its share, not the engine.
    """

    def __init__(self, int limit):
        self.limit = limit
        self.held = RequestList()


cdef class Engine(Tally):
    """Pending, in flight, ready: what `Context` can take, in order, and what it gave back."""

    def __init__(self, Context context not None, int depth=256):
        if depth < 1:
            raise ValueError(f'depth must be at least 1, not {depth}')
        self.context = context
        self.depth = depth
        self.pending = RequestList()
        self.in_flight = RequestList()
        self.lent = RequestList()
        self.declined = RequestList()
        self.moving = RequestList()
        self.ready = RequestList()
        self.shares = {}

    def share_of(self, device, int limit):
        """The share of *device*: *limit* requests, or half of what there is room for."""
        return self.share(device, limit)

    cdef Share share(self, device, int limit):
        if device is self._device:      # as a rule it is that of the last one
            return self._share
        share = self.shares.get(device)
        if share is None:
            share = self.shares[device] = Share(max(1, min(limit, self.depth // 2)))
        self._device, self._share = device, share
        return share

    # All changes of a request's state -------------------------------------------------------

    cpdef bint enqueue(self, Request request) except -1:
        """NEW → PENDING. Return whether there is a batch now that is worth a `flush`."""
        if request.state != NEW:
            raise ValueError(f'enqueued twice: {request!r}')
        request.hold()
        request.state = PENDING
        if request.share is not None and not request.admitted:
            if request.share.admitted >= request.share.limit:
                request.share.held.append(request)
                request.began = self.context.now()
                return False
            request.share.admitted += 1
            request.admitted = True
        self.pending.append(request)
        return self.pending.count >= self.batch_limit(request) and not self.blocked

    cdef void _taken(self, Request request) noexcept:
        """PENDING → IN_FLIGHT: from here on the kernel may write the buffer at any time."""
        request.state = IN_FLIGHT
        self.pending.remove(request)
        self.in_flight.append(request)
        self.submitted += 1
        # The kernel has the file, and needs the number no more; unless it says that it would have to wait.
        if request.handle is not None and not request.asked:
            if request.handle.let_go_unless_last():
                request.handle = None
            else:
                self._to_close = True       # after the flush: it may run any code

    cdef void _finish(self, Request request, int64_t result) noexcept:
        """PENDING or IN_FLIGHT → DONE; or DECLINED, if it has another way."""
        if request._list == <void *>self.lent:
            self.lent.remove(request)
            self._time(request, BY_THREAD, result)
            self._end(request, result)
            return
        cdef bint declined = request.is_declined_by(result)
        if request.state == IN_FLIGHT:
            self.in_flight.remove(request)
            self.completed += 1
            if not declined:
                self._time(request, BY_AIO, result)
        else:
            self._unqueue(request)
        if declined:
            request._result = result
            request.state = DECLINED
            self.declined.append(request)
        else:
            self._end(request, result)

    cdef void _end(self, Request request, int64_t result) noexcept:
        """→ DONE, from no list: leave the share, and add up the *result* of all ways.

        A read that failed after a part has read nothing, because a short read would look like the end of the file.
        After a fork, a write has written nothing either."""
        self._leave_share(request)
        if request.done:
            if result >= 0:
                result += <int64_t>request.done
            elif request.direction == WRITE and result != -ECANCELED:
                result = <int64_t>request.done
        request._result = result
        request.state = DONE
        self.ready.append(request)

    cdef void _time(self, Request request, int way, int64_t result) noexcept:
        """Count how long *request* took, unless the kernel declined it or a fork took it away."""
        if self._reaped_ns > request.began > 0 and result != -EAGAIN:
            count_time(self, way, request.direction, self._reaped_ns - request.began)

    cdef void _unqueue(self, Request request) noexcept:
        """Take a PENDING request out, of `pending` or of what its share holds."""
        if request._list == <void *>self.pending:
            self.pending.remove(request)
        else:
            request.share.held.remove(request)

    cdef void _leave_share(self, Request request) noexcept:
        """Let in the next request that the share holds. It goes out with the next flush."""
        cdef Share share = request.share
        if not request.admitted:
            return
        request.admitted = False
        if share.held.count == 0:
            share.admitted -= 1
            return
        request = share.held.popleft()
        request.admitted = True
        self.pending.append(request)

    cpdef bint withdraw(self, Request request) except -1:
        """PENDING or DECLINED → NEW, if neither the kernel nor a thread has it; return whether it was so."""
        if request.state == PENDING:
            self._unqueue(request)
        elif request.state == DECLINED:
            self._undecline(request)
        else:
            return False
        self._leave_share(request)
        request.state = NEW
        return True

    cdef Request next_declined(self):
        """Take the first request out of `declined`. It is in `moving` until its next way is known. If it is not there
        any more by then, it has ended."""
        cdef Request request = self.declined.popleft()
        self.moving.append(request)
        return request

    cdef void _undecline(self, Request request) noexcept:
        if request._list == <void *>self.moving:
            self.moving.remove(request)
        else:
            self.declined.remove(request)

    cdef void settle(self, Request request, int64_t result) noexcept:
        """NEW or DECLINED → DONE: neither the kernel nor a thread has it."""
        if request.state == DECLINED:
            self._undecline(request)
        self._end(request, result)

    cdef int enqueue_again(self, Request request) except -1:
        """DECLINED → PENDING, or held. Return whether there is a batch now that is worth a `flush`."""
        self._undecline(request)
        request.state = NEW
        return self.enqueue(request)

    cdef int cancel_declined(self, int64_t result) noexcept:
        """Every DECLINED → DONE with *result*; return how many."""
        cdef int n = 0
        while self.declined.count or self.moving.count:
            self.settle(self.declined.first() if self.declined.count else self.moving.first(), result)
            n += 1
        return n

    cdef void lend(self, Request request) noexcept:
        """NEW or DECLINED → IN_FLIGHT: a native thread may write the buffer at any time."""
        if request.state == DECLINED:
            self._undecline(request)
        request.state = IN_FLIGHT
        request.began = self.context.now()
        self.lent.append(request)
        self.by_thread += 1

    cdef void take_back(self, Request request) noexcept:
        """IN_FLIGHT → NEW: no thread had begun with it."""
        self.lent.remove(request)
        self._leave_share(request)
        request.state = NEW

    cpdef int refuse(self, int code) except -1:
        """Every PENDING → DONE with minus the errno *code*, or DECLINED; return how many."""
        cdef int n = 0
        while self.pending.count:
            self._finish(self.pending.first(), -code)
            n += 1
        for share in self.shares.values():
            while (<Share>share).held.count:
                self._finish((<Share>share).held.first(), -code)
                n += 1
        self.blocked = False
        return n

    cpdef int cancel(self, int code) except -1:
        """Everything → DONE with minus the errno *code*, delivered or not: in a forked child, where
        neither the kernel's events nor our own buffers have arrived."""
        cdef int n = self.refuse(code)
        cdef Request request
        while self.in_flight.count:
            self._finish(self.in_flight.first(), -code)
            n += self.refuse(code) + 1
        while self.lent.count:
            self._finish(self.lent.first(), -code)
            n += self.refuse(code) + 1
        n += self.cancel_declined(-code) + self.refuse(code)
        for request in self.ready:
            if request.gives_fd and request._result >= 0:
                close(<int>request._result)     # a copy, which nobody here knows of
            request._result = -code
        return n

    # Towards the kernel ---------------------------------------------------------------------

    cdef int batch_limit(self, Request request) noexcept:
        # Follows the load: while the device has plenty to do a batch may fill, for each submission
        # costs (a doorbell is microseconds on a virtual disk); when it has little, waiting would let
        # it run dry. One that does all inside the submission can't run dry: those whom the pass wakes
        # next share the system call.
        cdef int limit = self.in_flight.count // LOAD_SHARE
        if self.in_flight.count == 0:
            if self.is_instant and self.burst == 0:
                limit = self.pending.count + self.ready.count
        elif limit < self.burst:
            limit = self.burst
        cdef int room = self.depth - self.in_flight.count
        if limit > BATCH_MAX:
            limit = BATCH_MAX
        if limit > request.max_batch:
            limit = request.max_batch
        if limit > room:
            limit = room
        return limit if limit > 1 else 1

    cdef long _offer(self) except? -4096:
        """Offer the head of pending, as much as there is room for: what io_submit answers."""
        cdef int room = self.depth - self.in_flight.count
        cdef int n = 0
        cdef void *at = self.pending._head
        cdef Request request
        cdef uint64_t address, length
        cdef long taken, waited = 0
        cdef uint64_t took
        cdef bint alone = self._singly > 0
        if room > BATCH_MAX:
            room = BATCH_MAX
        if alone:
            room = 1
            self._singly -= 1
            waited = times_waited()
        took = self.context.now()
        while at != NULL and n < room:
            request = <Request>at
            if request._views != NULL:
                address, length = <uint64_t><uintptr_t>request._iovec, request._count
            elif request._count:
                address, length = <uint64_t><uintptr_t>request._one.iov_base, request.nbytes
            else:
                address, length = 0, 0
            self.context.stage(<uint64_t><uintptr_t><void *>request, request.opcode, request.fd,
                               address, length, request.offset, request.flags)
            if request.began == 0:
                request.began = took
            at = request._next
            n += 1
        taken = self.context.submit()
        self.submitted_ns = self._reaped_ns = self.context.now()
        took = self.submitted_ns - took
        if took > STALL_NS:
            self._stalled(took, n, alone and times_waited() > waited)
        return taken

    cdef void _stalled(self, uint64_t took, int n, bint waited) noexcept:
        """``io_submit`` took long, and the hub stood still. A batch has no one culprit, and perhaps only the
        processor was away: so what follows goes out one by one, and who makes the kernel *wait* then is
        found."""
        self.slow_submits += 1
        self.slow_ns, self.slow_batch = took, n
        self._singly = SINGLY
        if waited and self.culprit is None:
            self.culprit = self.pending.first()     # no Python here: the lists are not right yet
            self.culprit_ns = took

    cpdef Request take_culprit(self):
        """The request whose submission, alone, stalled since this was last called; or None."""
        culprit, self.culprit = self.culprit, None
        return culprit

    cpdef int flush(self) except -1:
        """pending → kernel, first in, first out, until it is empty or the kernel is full; return
        how many the kernel took. A request that the kernel refuses is DONE, the rest goes on."""
        cdef long taken
        cdef int total = 0
        self.blocked = False
        while self.pending.count:
            if self.in_flight.count >= self.depth and self.reap() == 0:
                self.blocked = True
                break
            taken = self._offer()
            if taken > 0:
                self.batches += 1
                total += taken
                while taken:                # it takes a prefix
                    self._taken(self.pending.first())
                    taken -= 1
            elif taken == -EINTR:
                continue
            elif taken == -EAGAIN or taken == 0:
                if self.reap():             # finished I/O frees no slot, reaping does
                    continue
                self.blocked = True
                break
            else:                           # the head's own error: the rest knows nothing of it
                self._finish(self.pending.first(), taken)
        if self._to_close:
            self._close_numbers()
        return total

    cdef int _close_numbers(self) except -1:
        """Close the numbers that were closed while a request needed them that the kernel has now."""
        cdef Request request
        self._to_close = False
        for request in self.in_flight:      # it may be done already: then `release` closes the number
            if not request.asked:
                request.let_go_of_numbers()
        return 0

    # From the kernel ------------------------------------------------------------------------

    cpdef int reap(self) except -1:
        """ring → ready, all that is there; resumes nobody. Return how many."""
        cdef int n, i, total = 0
        cdef uint64_t token
        cdef int64_t result
        cdef Request request
        while True:
            n = self.context.peek()
            if n == 0:
                break
            self.reaps()
            for i in range(n):
                token = self.context.token(i)
                if token:                   # 0: the probe's, come late
                    result = self.context.result(i)
                    # A reference of our own: the list may hold the last one, and lets go of it.
                    request = <Request><void *><uintptr_t>token
                    self._finish(request, result)
                    total += 1
            self.context.commit(n)
        self._reaped_ns = 0
        return total

    cdef void reaps(self) noexcept:
        """What is finished next is done by now. Right after a submission its own look at the clock will do."""
        if self._reaped_ns == 0:
            self._reaped_ns = self.context.now()

    def requests(self):
        """All that are not done yet, each with where it is: 'queued' (also for its next way), 'in flight', 'with a
        thread'."""
        cdef Request request
        found = []
        for queue, where in ((self.in_flight, 'in flight'), (self.lent, 'with a thread'), (self.pending, 'queued'),
                             (self.declined, 'queued'), (self.moving, 'queued'),
                             *[((<Share>share).held, 'queued') for share in list(self.shares.values())]):
            found += [(request, where) for request in queue]
        return found

    def stuck(self, uint64_t ns):
        """Those that have been under way, or held, for more than *ns*: each is told once."""
        cdef uint64_t now = self.context.now()
        cdef Request request
        found = []
        for request, where in self.requests():
            if not request.told and 0 < request.began < now - ns:
                request.told = True
                found.append((request, where, now - request.began))
        return found

    def forget_writes(self):
        """Count no request here as a write under way: no code will learn when the kernel is done with it."""
        cdef Request request
        for requests in self.in_flight, self.lent:
            for request in requests:
                if request.writes is not None:
                    request.end_write()

    def _check(self):
        """Assert all that must hold between two calls."""
        seen = set()
        shares = [<Share>share for share in self.shares.values()]
        for queue, states in ((self.pending, (PENDING,)), (self.in_flight, (IN_FLIGHT,)),
                              (self.lent, (IN_FLIGHT,)), (self.declined, (DECLINED,)),
                              (self.moving, (DECLINED,)), (self.ready, (DONE,)),
                              *[((<Share>share).held, (PENDING,)) for share in shares]):
            requests = list(queue)
            assert len(requests) == len(queue), 'a list that miscounts'
            for request in requests:
                assert request.state in states, f'{request!r} is in the wrong list'
                assert request in queue
                assert not request.abandoned or queue in (self.in_flight, self.lent, self.ready), (
                    f'{request!r} was abandoned, and has a way to go')
                assert id(request) not in seen, f'{request!r} is in two lists'
                assert (<Request>request).handle is not None or request.fd < 0 or queue is self.ready or (
                    queue is self.in_flight and (request.abandoned or not (<Request>request).asked)), (
                    f'{request!r} may go to another file')
                seen.add(id(request))
        assert self.submitted == self.completed + len(self.in_flight), 'an event lost or invented'
        for share in shares:
            admitted = [request for queue in (self.pending, self.in_flight, self.lent, self.declined, self.moving)
                        for request in queue if (<Request>request).share is share and (<Request>request).admitted]
            assert (<Share>share).admitted == len(admitted) <= (<Share>share).limit, 'a share that miscounts'
            assert not len((<Share>share).held) or len(admitted), 'held, and nothing will let it in'
        assert len(self.in_flight) <= self.depth, 'more in flight than there is room for'
        assert self.context.staged == 0, 'staged and never submitted'
