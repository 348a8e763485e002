# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A request is one operation; while it is in a list, the list owns it.

A request is in one place at a time, and these are all its ways:

    ==========  ==============  =====================================  =================
    from        to              when                                   list
    ==========  ==============  =====================================  =================
    NEW         PENDING         `Engine.enqueue`                       pending, or held
                                                                       by its `Share`
    PENDING     IN_FLIGHT       ``io_submit`` took it                  in_flight
    PENDING     DONE            ``io_submit`` refused it, or the       ready
                                process gave up (`refuse`, `cancel`)
    PENDING     NEW             `Queues.withdraw`                      none
    NEW         IN_FLIGHT       `Queues.lend`: a native thread's       lent
    IN_FLIGHT   NEW             `Queues.take_back`: none had begun it  none
    IN_FLIGHT   DONE            its event came, or its thread's        ready
                                result; or a fork (`cancel`) or the
                                end of the hub took both away
    IN_FLIGHT,  DECLINED        the kernel did not do it, or not all,  declined; moving,
    PENDING                     and it may move to another way         while that is chosen
    DECLINED    PENDING         `Engine.enqueue_again`                 pending
    DECLINED    IN_FLIGHT       `Queues.lend`                          lent
    DECLINED    NEW             `Queues.withdraw`                      none
    DECLINED    DONE            no way was left, or a fork (`cancel`)  ready
    NEW         DONE            `Queues.settle`: done in line          ready
    DONE        --              handed over: `Engine.ready` loses it   none
    ==========  ==============  =====================================  =================

A request that the kernel declines is moved to its next way by the driver. Its greenlet stays parked, and its
buffers stay pinned. The result of a DONE request is final.
"""

import errno

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdlib cimport free
from posix.unistd cimport close

from greenaio._core.context cimport BATCH_MAX, FDSYNC, FSYNC, PREAD, PREADV, PWRITE, PWRITEV
from greenaio._core.fifo cimport close_path_fd, join, leave
from greenaio._core.thread cimport close_elsewhere
from greenaio._core.handle cimport Handle, Writes
from greenaio._core.tally cimport OTHER, READ, SYNC, WRITE


cdef void advance(iovec *buffers, int count, uint64_t nbytes) noexcept:
    """Move the begin of *buffers* behind their first *nbytes*. Buffers that are passed become empty ones."""
    cdef int i
    cdef uint64_t n
    for i in range(count):
        # Bytes that are left over after this buffer come out of the next one.
        n = min(nbytes, <uint64_t>buffers[i].iov_len)
        buffers[i].iov_base = <char *>buffers[i].iov_base + n
        buffers[i].iov_len -= n
        nbytes -= n


cdef inline int direction_of(int opcode) noexcept:
    """Return the kind of operation that the statistics count *opcode* as."""
    if opcode == PREAD or opcode == PREADV:
        return READ
    if opcode == PWRITE or opcode == PWRITEV:
        return WRITE
    # A call for a thread may be of any kind. The code that
    # makes such a request sets the direction, if it matters.
    return OTHER if opcode == CALL else SYNC


cdef Request new_request(int opcode, int fd, int64_t offset, unsigned int flags, int max_batch):
    """Return a NEW request without buffers. The caller pins them with `Request.pin` or `Request.pin_all`."""
    # `__new__` skips `__init__`, whose checks are for callers in Python and cost more than the rest.
    cdef Request request = Request.__new__(Request)
    request.opcode = opcode
    request.direction = direction_of(opcode)
    request.fd = fd
    request.offset = offset
    request.flags = flags
    request.max_batch = max_batch
    request.other_fd = request.fifo = request.peer = -1
    return request


# The garbage collector does not look at requests. `release` lets go of all objects that
# a request refers to, so a finished request is in no cycle. Until then the reference of
# its list keeps the request alive, and no collector can see that reference. A request
# is made for each operation, so the memory of 256 of them is kept for reuse.
@cython.freelist(256)
@cython.no_gc
@cython.final
cdef class Request:
    """One operation on a file, from `Engine.enqueue` to its result.

    *buffers* is one bytes-like object, a sequence of them for PREADV and PWRITEV, None for FSYNC and FDSYNC;
    they stay pinned until the kernel is done. *offset* is in bytes, *flags* are ``os.RWF_*``. *max_batch* is
    the largest batch that this request waits for. Raises OSError (EIO) for an operation that is none of
    `Opcode`, and the error of the buffer protocol for a buffer that can't be pinned.
    """

    def __init__(self, int opcode, int fd, buffers=None, int64_t offset=0, unsigned int flags=0,
                 *, int max_batch=BATCH_MAX):
        # A second `__init__` would lose the pins of the first. PREAD is 0, so the opcode alone does not tell.
        if self.opcode or self.state != NEW or self.buffer_count:
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
        # Pin last: if pinning fails, `__dealloc__` unpins the buffers that were pinned before the error.
        if opcode in (PREADV, PWRITEV):
            self.pin_all(buffers)
        elif opcode in (PREAD, PWRITE):
            self.pin(buffers)

    def __dealloc__(self):
        # Usually `release` was called before, and only `job` is left, unless the request never began.
        if self.buffer_count or self._views != NULL:
            self.unpin()
        # A list keeps the request until the hub has taken the job out of its mailbox, so no worker has it now.
        free(self.job)
        if self.handle is not None or self.other is not None or self.writes is not None:
            self._drop()

    cdef _drop(self):
        """Let go of the numbers and writes of a request that never began, or was withdrawn."""
        # A failed close must not leave the file with a write that never ends.
        try:
            self.let_go_of_numbers()
        finally:
            if self.writes is not None:
                self.end_write()

    cdef int pin(self, buffer) except -1:
        """Pin one buffer, which must be writable for a read.

        Raises BufferError or TypeError if it can't be pinned."""
        # The buffer protocol forbids its owner to move or free the memory from here to `PyBuffer_Release`. A
        # bytearray refuses to be resized, and a memory map refuses to be closed.
        PyObject_GetBuffer(buffer, &self._view,
                           PyBUF_WRITABLE if self.opcode == PREAD else PyBUF_SIMPLE)
        self.buffer_count = 1
        self._one.iov_base, self._one.iov_len = self._view.buf, self._view.len
        self.buffers = &self._one
        self.nbytes = self._view.len
        return 0

    cdef int pin_all(self, buffers) except -1:
        """Pin a sequence of buffers, and name them in an iovec on the heap.

        Raises as `pin` does, or MemoryError."""
        cdef int kind = PyBUF_WRITABLE if self.opcode == PREADV else PyBUF_SIMPLE
        cdef Py_ssize_t n = len(buffers)
        # One block holds all pins and behind them the iovec. Not on the stack: the stack of a parked greenlet
        # is copied away, and a thread would then read the iovec of another greenlet.
        self._views = <Py_buffer *>PyMem_Malloc((n or 1) * (sizeof(Py_buffer) + sizeof(iovec)))
        if self._views == NULL:
            raise MemoryError
        self.buffers = <iovec *>(self._views + n)
        for buffer in buffers:
            if self.buffer_count == n:
                # A buffer's own code runs when it is pinned, and has
                # made the sequence longer. There is room for *n* only.
                break
            # This may raise. The count says how many pins `unpin`
            # has to release, so it grows only after each of them.
            PyObject_GetBuffer(buffer, &self._views[self.buffer_count], kind)
            self.buffers[self.buffer_count].iov_base = self._views[self.buffer_count].buf
            self.buffers[self.buffer_count].iov_len = self._views[self.buffer_count].len
            self.nbytes += self._views[self.buffer_count].len
            self.buffer_count += 1
        return 0

    cpdef int count_done(self, uint64_t nbytes) except -1:
        """Note that a way has moved *nbytes* only.

        The next way begins behind them, and the result includes them."""
        # `Queues._end` adds these bytes to the result of the last way.
        self.done += nbytes
        advance(self.buffers, self.buffer_count, nbytes)
        self.skip(nbytes)
        return 0

    cdef void skip(self, uint64_t nbytes) noexcept:
        """Begin *nbytes* later in the file. The caller has moved the begin of the iovec already."""
        # An offset of -1 means the file's own position, which has moved by itself.
        if self.offset >= 0:
            self.offset += nbytes
        self.nbytes -= nbytes

    cdef unpin(self):
        """Release all pins. The owners of the buffers may run any code in that moment."""
        cdef int i
        cdef int count = self.buffer_count
        cdef Py_buffer *views = self._views
        # Empty the fields first, because a release may run code that comes back here. A second release of the
        # same pin would free memory that another request uses.
        self.buffer_count = 0
        self._views = NULL
        self.buffers = NULL
        if views == NULL:
            if count:
                PyBuffer_Release(&self._view)
            return
        for i in range(count):
            PyBuffer_Release(&views[i])
        PyMem_Free(views)

    # Ownership is what makes native AIO safe in Python. Three parties use the memory of a request:
    #
    #     ============  =========================================  ========================================
    #     party         uses                                       until
    #     ============  =========================================  ========================================
    #     the greenlet  the buffers, and the result                it is killed or timed out, at any moment
    #     the kernel    the buffers, without asking                its event is in the ring
    #     the program   the buffers, if it kept them               it forgets them
    #     ============  =========================================  ========================================
    #
    # The kernel names a request by its address (the iocb's data), and a reference that no Python object holds
    # is invisible to all other code. So the `RequestList` of a request holds one reference for it, from
    # `Engine.enqueue` until the request is DONE and handed over. The request in turn pins its buffers (buffer
    # protocol), so that a bytearray cannot be resized and a memory map cannot be closed below the kernel. A
    # greenlet that is killed leaves its request in `in_flight`: the request is *abandoned*, and finishes by
    # itself.
    #
    # `Request.release` ends all this: it unpins the buffers and lets go of the numbers. Both may run any
    # Python code, even code that submits requests. Therefore a request is out of its list before it is
    # released, and each field is empty before the object that was in it is let go.
    cdef release(self):
        """Let go of the buffers, the numbers and all else that the request refers to.

        This may run any code, so the caller takes the request out of its list first. A second call does
        nothing."""
        if self.buffer_count:
            self.unpin()
        self.waiter = None
        if self.abandoned and self.gives_fd and self.answer >= 0:
            # A thread has opened a file, and the greenlet that asked for it was killed in that time. No other
            # code knows this fd.
            self.gives_fd = False
            if self.fifo >= 0 or self.peer >= 0:
                # Close it here and now, because until then it is a peer for other opens of the FIFO.
                close(<int>self.answer)
            else:
                # The file may be on a server, and its close may wait for that server.
                close_elsewhere(<int>self.answer)
        if self.fifo >= 0:
            close_path_fd(self.fifo)
        # The open of the thread has returned, so both ends of the FIFO are not needed any more.
        if self.peer >= 0:
            leave(self.peer)
        self.fifo = self.peer = -1
        # `keep` may own the memory that the call has used. It is let go after the call is over.
        self.keep = None
        self.file = None
        if self.writes is not None:
            self.end_write()
        # This may close a number, whose close has waited for this request.
        if self.handle is not None or self.other is not None:
            self.let_go_of_numbers()

    cdef int count_in(self, Writes writes, owner) except -1:
        """Count the request in *writes*, the writes of *owner*, until it is over.

        This runs no other code, unless the request counts already."""
        cdef Writes before = self.writes
        # Begin the new count before the old one ends. If both are the same, their count does not fall to 0 in
        # between, so nothing that waits for the last write is told of it.
        writes.begin(owner)
        self.writes = writes
        if before is not None:
            before.end()
        return 0

    cdef end_write(self):
        """Stop counting the request, because it no longer changes the file. This may run any code."""
        cdef Writes writes = self.writes
        # Empty the field first, because the code that `end` runs may come here again.
        self.writes = None
        writes.end()

    cdef end_write_unless_under_way(self):
        """Stop counting the request, unless it is under way.

        For a request that was done inline, or has failed before it began."""
        if self.writes is not None and self.queue == NULL:
            self.end_write()

    cdef let_go_of_numbers(self):
        """Let go of `handle` and `other`, because the request needs them no more.

        This may close one of the numbers, and run any code."""
        cdef Handle handle = self.handle, other = self.other
        # Empty the fields first, because a close may run code that comes here again.
        self.handle = self.other = None
        if handle is not None:
            handle.let_go()
        if other is not None:
            other.let_go()

    cdef void meet(self) noexcept:
        """Let the open of a FIFO return, in which a thread waits. See `greenaio._core.fifo`.

        For a request that was just abandoned. A request that opens no FIFO is left alone."""
        if self.fifo >= 0 and self.peer < 0:
            # Until `release` closes it, this fd is the other end that the open of the thread finds.
            self.peer = join(self.fifo)
            if self.peer >= 0:
                # One fd takes the place of the other: 1,000 killed opens need no more fds than before.
                close(self.fifo)
                self.fifo = -1

    cpdef int ask(self) except -1:
        """Ask native AIO to decline the request instead of waiting. The caller has not asked for that."""
        self.asked = True
        self.flags |= RWF_NOWAIT
        return 0

    def of(self, Share share):
        """Make the request count in *share*, and return it. Call this before it is enqueued."""
        self.share = share
        return self

    @property
    def result(self):
        """The number of bytes moved, or minus the errno; None while in progress."""
        return self.answer if self.state == DONE else None

    @property
    def entered(self):
        """Whether no greenlet is parked on this very request, so that none may be resumed for it."""
        # The code that switches into a greenlet takes the waiter away first.
        return self.waiter is None

    def __repr__(self):
        return (f'<Request {Opcode_name(self.opcode)} fd={self.fd} offset={self.offset} '
                f'nbytes={self.nbytes} {State(self.state).name} result={self.result}>')


def Opcode_name(int opcode):
    """Return the name of *opcode*, or its number as text."""
    return {PREAD: 'PREAD', PWRITE: 'PWRITE', FSYNC: 'FSYNC', FDSYNC: 'FDSYNC',
            PREADV: 'PREADV', PWRITEV: 'PWRITEV', CALL: 'CALL'}.get(opcode, str(opcode))


@cython.final
cdef class RequestList:
    """Keep requests first in, first out, and own them. A removal from the middle takes constant time.

    The links lie in the requests. So a change of the list needs no memory and can't fail, also in code that
    may not raise, and `Request.queue` tells in which list a request is."""

    def __dealloc__(self):
        # A request in flight is leaked, because the kernel or a thread may still write its memory. The list
        # of the requests in flight has no others, so the loop stops at the first.
        cdef Request request
        while self.head != NULL and (<Request>self.head).state != IN_FLIGHT:
            request = <Request>self.head
            self.remove(request)

    def __len__(self):
        return self.count

    def __iter__(self):
        # Make the Python list before the look at `head`: making it may run a finalizer, which may change this
        # list. The iterator goes over the copy, so the code that uses it may change this list as well.
        requests = []
        cdef void *at = self.head
        while at != NULL:
            requests.append(<Request>at)
            at = (<Request>at).following
        return iter(requests)

    def __contains__(self, Request request not None):
        return request.queue == <void *>self


@cython.final
cdef class Share:
    """Limit the requests that one device has in an engine to *limit*, from admission to event.

    A full device queue blocks ``io_submit``, even for requests with RWF_NOWAIT. So no device gets more than
    it can queue. A frozen device fills its share, and the rest of the engine goes on.
    """

    def __init__(self, int limit):
        self.limit = limit
        self.held = RequestList()


