# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""One native AIO context and its completion ring. No policy.

This is the only code above `greenaio._core.abi` that knows an AIO structure of the kernel. A request goes in
as plain words (`Context.stage`, `Context.submit`) and comes out as a token and a result (`Context.peek`,
`Context.commit`). The kernel copies an iocb while it accepts it, so one array of them, on the heap, serves
every batch. Of a request in flight only its data buffer and its token still matter.
"""

import os
# Functions of `os` may be patched, and the patched `os.close` would come back here.
import posix

from libc.errno cimport EBADF, errno as c_errno
from libc.stdlib cimport calloc, free
from libc.time cimport time_t
from posix.mman cimport MADV_DONTFORK, madvise

from greenaio._core.abi cimport (
    AIO_RING_MAGIC, IOCB_FLAG_RESFD, abi_io_destroy, abi_io_getevents, abi_io_setup, abi_io_submit, abi_load_tail,
    abi_relax, abi_store_head,
)
from greenaio._core.eventfd cimport Eventfd, os_error
from greenaio._core.fork cimport forked

cdef extern from "<fcntl.h>" nogil:
    int fcntl(int fd, int command, ...)
    const int F_GETFD

cdef extern from "<time.h>" nogil:
    struct timespec:
        time_t tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec *ts)
    const int CLOCK_MONOTONIC

cdef enum:
    PAGE = 4096                 # bytes
    # An fsync of an empty file in memory takes microseconds. Without an answer after this time the probe says
    # no.
    PROBE_NS = 1000000000


cdef uint64_t monotonic_ns() noexcept nogil:
    """Return nanoseconds of CLOCK_MONOTONIC."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef extern from "<sys/resource.h>" nogil:
    struct rusage:
        long ru_nvcsw
    int getrusage(int who, rusage *usage)
    const int RUSAGE_THREAD


cdef long times_waited() noexcept nogil:
    """Return how often this thread has given up the processor to wait. A preemption does not count."""
    cdef rusage usage
    getrusage(RUSAGE_THREAD, &usage)
    return usage.ru_nvcsw


# The answer of the probe, or None before it. One probe for a process is enough, because its kernel stays the
# same.
cdef object _fdsync = None


# The completion ring.
#
# The ring is one piece of memory that the kernel and this thread share. `tail` belongs to the kernel, `head`
# to us.
#
#     ============================  ==================================  =======================================
#     the kernel, any processor     this thread                         why in this order
#     ============================  ==================================  =======================================
#     writes an event                                                   the event is whole before it can be seen
#     stores `tail`                                                     the event can be seen from here on
#     signals the eventfd                                               a wake-up always finds its event
#                                   clears the eventfd                  a later signal is not lost
#                                   loads `tail` (acquire)              all events before `tail` are whole
#                                   copies the events out               `peek`: the slots are still ours
#                                   stores `head` (release)             `commit`: the copies are made by then
#     may overwrite the slots
#     ============================  ==================================  =======================================
#
# A finished request frees no place in the kernel. Only the store to `head` does, so a full context stays full
# until `commit`.
#
# After a fork the child must not touch the ring. The ring is not mapped there, and a store to `head` would
# lose an event of the parent if it were. The kernel refuses the parent's context to the child.
cdef class Context(Eventfd):
    """An eventfd and, once `open` was called, an ``io_context_t`` that signals it.

    Only one thread at a time may use it. A test may subclass it in Python and override any method.
    """

    def __cinit__(self):
        # On the heap and zeroed once. A greenlet's stack moves, so nothing that the kernel reads may lie on
        # it.
        self._iocbs = <iocb *>calloc(BATCH_MAX, sizeof(iocb))
        self._pointers = <iocb **>calloc(BATCH_MAX, sizeof(iocb *))
        self._events = <io_event *>calloc(PEEK_MAX, sizeof(io_event))
        # `__dealloc__` runs after this error, and frees the arrays that there are.
        if self._iocbs == NULL or self._pointers == NULL or self._events == NULL:
            raise MemoryError
        cdef int i
        for i in range(BATCH_MAX):
            # The kernel wants pointers. They never change, because each batch begins at the first iocb.
            self._pointers[i] = &self._iocbs[i]

    def __dealloc__(self):
        # Only a context that never had a request is still set up here, because `destroy` may wait for a disk.
        # In a forked child the address may belong to a context of its own.
        if self._ctx and not forked():
            abi_io_destroy(self._ctx)
        free(self._iocbs)
        free(self._pointers)
        free(self._events)

    cpdef open(self, int depth):
        """Set the context up for *depth* requests in flight. Raise OSError as ``io_setup`` does, or as
        ``eventfd`` did."""
        cdef long code
        if self._ctx:
            raise ValueError('the context is set up already')
        if depth < 1:
            raise ValueError(f'depth must be at least 1, not {depth}')
        # The kernel signals only an eventfd, so without one no completion would wake the hub.
        if self.denied:
            raise os_error(self.denied, 'eventfd')
        # EAGAIN means that the system has no room for so many requests (aio-max-nr). The caller then tries a
        # smaller depth.
        code = abi_io_setup(depth, &self._ctx)
        if code < 0:
            self._ctx = 0
            raise os_error(code, f'io_setup({depth})')
        self.depth = depth
        # The kernel's handle of a context is the address of its ring in our memory.
        self._ring = <aio_ring *>self._ctx
        # Another layout than the known one must not be guessed. `io_getevents` works with each.
        if self._ring.magic != AIO_RING_MAGIC or self._ring.incompat_features != 0:
            self._ring = NULL
        try:
            # The ring must be hidden from children before the first request, or a fork could come between.
            self._unmap_from_children()
        except OSError:
            # A ring that children would inherit is worse than no native AIO.
            self.destroy()
            raise
        global _fdsync
        # Nothing is in flight yet, so the probe needs no token.
        if _fdsync is None:
            _fdsync = self._probe()

    cdef int _unmap_from_children(self) except -1:
        # A child would inherit the ring writable and *shared*, and its store to `head` would lose events of
        # the parent. So the ring is taken out of every later child. A read there is a SIGSEGV, which `peek`
        # avoids.
        #
        # A ring of an unknown layout is never read or written here, so a child does not do it either.
        # Without a readable ring the kernel does all that the code below does.
        if self._ring == NULL:
            return 0
        # The kernel maps the header and all events, rounded up to whole pages.
        cdef size_t size = self._ring.header_length + self._ring.nr * sizeof(io_event)
        size = (size + PAGE - 1) & ~<size_t>(PAGE - 1)
        if madvise(<void *>self._ctx, size, MADV_DONTFORK) < 0:
            raise OSError(c_errno, os.strerror(c_errno))
        return 0

    @property
    def is_open(self):
        """Whether the kernel holds a context for us."""
        return self._ctx != 0

    @property
    def reads_ring(self):
        """Whether completions are read from the ring in user space, without a system call."""
        return self._ring != NULL

    def read_by_syscall(self):
        """Use ``io_getevents`` from now on, as for a ring whose layout is not known."""
        self._ring = NULL

    def supports(self, int opcode):
        """Return whether the kernel knows *opcode*. For FDSYNC the probe has found out, which `open` made
        once."""
        if opcode == FDSYNC:
            return bool(_fdsync)
        return opcode in (PREAD, PWRITE, FSYNC, PREADV, PWRITEV)

    cdef bint _probe(self):
        # Nothing else is in flight yet, so the first event is the event of the probe, and it is reaped here.
        # Its token is 0. If it comes later than the probe waits, the engine ignores it by this token.
        try:
            fd = os.memfd_create('greenaio-probe')
        except OSError:
            return False
        try:
            self.stage(0, FDSYNC, fd, 0, 0, 0, 0)
            # Without IOCB_FLAG_RESFD the event signals no eventfd, so it causes no pass.
            self._iocbs[0].aio_flags = 0
            # A kernel that does not know FDSYNC refuses the request at once.
            if self.submit() != 1:
                return False
            # This call stores `head` itself, in the kernel, so no `commit` follows.
            return abi_io_getevents(self._ctx, 1, 1, self._events, PROBE_NS) == 1
        finally:
            posix.close(fd)

    cpdef int stage(self, uint64_t token, int opcode, int fd, uint64_t address, uint64_t nbytes,
                    int64_t offset, unsigned int flags) except -1:
        """Add a request to the batch that the next `submit` offers.

        *address* and *nbytes* name the buffer in bytes, or for PREADV and PWRITEV the iovec array and its
        length. *flags* are RWF flags. Raise ValueError if the batch is full.
        """
        if self.staged >= BATCH_MAX:
            raise ValueError(f'a batch holds {BATCH_MAX} requests')
        cdef iocb *cb = &self._iocbs[self.staged]
        # The kernel returns this word with the event and does not look at it.
        cb.aio_data = token
        cb.aio_rw_flags = flags
        cb.aio_lio_opcode = opcode
        cb.aio_reqprio = 0
        cb.aio_fildes = fd
        cb.aio_buf = address
        cb.aio_nbytes = nbytes
        cb.aio_offset = offset
        # The kernel signals this eventfd after it has published the event. It looks the number up in
        # `io_submit`, and holds the eventfd until then.
        cb.aio_flags = IOCB_FLAG_RESFD
        cb.aio_resfd = self.own_eventfd
        self.staged += 1
        return 0

    cpdef long submit(self) except? -4096:
        """Offer the staged batch, which is empty afterwards. Return how many of its *first* requests the
        kernel took, or minus the errno that its head got."""
        # The GIL stays here. A thread that releases the GIL for 1 us may wait up to 5 ms to get it back, if
        # other threads run Python code.
        cdef long n = self.staged, result
        cdef int i
        # The batch is gone with any answer of the kernel. The engine stages the rest again.
        self.staged = 0
        result = abi_io_submit(self._ctx, n, self._pointers)
        # EBADF means the file of the head or our own eventfd. If the program has closed our number, the other
        # number serves, and the batch is offered again. With EBADF the kernel took nothing of it.
        if result == -EBADF and fcntl(self.own_eventfd, F_GETFD) < 0:
            self.own_eventfd = self.eventfd
            for i in range(n):
                self._iocbs[i].aio_resfd = self.own_eventfd
            result = abi_io_submit(self._ctx, n, self._pointers)
        return result

    cpdef int peek(self) except -1:
        """Copy out up to PEEK_MAX completions, and return how many.

        `token` and `result` read the copies. `commit` must follow before the next peek, or the same
        completions are copied again.
        """
        cdef unsigned int head, tail, nr
        cdef int n = 0
        if self._ring == NULL:
            if not self._ctx:
                return 0
            # It takes the events out at once, so `commit` has nothing to do then. With a time of 0 it does
            # not wait.
            n = <int>abi_io_getevents(self._ctx, 0, PEEK_MAX, self._events, 0)
            return n if n > 0 else 0
        # The ring of the parent is not mapped in a child, and a look at it would be a SIGSEGV.
        if forked():
            return 0
        nr = self._ring.nr
        # Only this thread stores `head`, so a plain load will do.
        head = self._ring.head
        # Acquire: all events before this tail were written by the kernel before it stored the tail. So they
        # are whole.
        tail = abi_load_tail(self._ring)
        while head != tail and n < PEEK_MAX:
            # The slot is copied, because the kernel may overwrite it after `commit`, and requests are
            # finished later.
            self._events[n] = self._ring.io_events[head]
            n += 1
            head += 1
            # In this ring `head` and `tail` are indices, below `nr`, and not counters that only grow.
            if head >= nr:
                head = 0
        return n

    cpdef uint64_t token(self, int index) except? 0:
        """Return the token of the peeked completion at *index*. 0 belongs to no request."""
        return self._events[index].data

    cpdef int64_t result(self, int index) except? -4096:
        """Return the bytes moved by the peeked completion at *index*, or minus its errno."""
        return self._events[index].res

    cpdef int commit(self, int count) except -1:
        """Give *count* peeked slots back to the kernel, which may overwrite them at once."""
        cdef unsigned int head
        if self._ring == NULL or count == 0:
            # `io_getevents` took them out already.
            return 0
        # *count* is below `nr`, so one subtraction is enough.
        head = self._ring.head + <unsigned int>count
        if head >= self._ring.nr:
            head -= self._ring.nr
        # Release: our copies are made before the kernel can see the new `head`.
        abi_store_head(self._ring, head)
        return 0

    cpdef int spin(self, uint64_t limit_ns) except -1:
        """Watch the ring for up to *limit_ns* without the GIL. Return 1 as soon as there is an event, else 0.
        Without a readable ring return 0 at once."""
        cdef aio_ring *ring = self._ring
        cdef uint64_t end
        cdef bint found = False
        if ring == NULL or forked():
            return 0
        with nogil:
            # No other thread uses this context, so nothing else stores `head` while the GIL is away.
            end = monotonic_ns() + limit_ns
            while True:
                # No event is read here. `peek` loads `tail` again, in the right order, before it reads one.
                if ring.head != abi_load_tail(ring):
                    found = True
                    break
                if monotonic_ns() >= end:
                    break
                abi_relax()
        return found

    cpdef uint64_t now(self) except? 0:
        """Return nanoseconds of CLOCK_MONOTONIC. It is a method of the context, because a test that simulates
        the kernel simulates time as well."""
        return monotonic_ns()

    cpdef after_fork_in_child(self):
        """Forget the parent's context, and put a fresh eventfd under the same numbers.

        The context is not destroyed, because its address may be a context of this child's soon.
        """
        self._ctx = 0
        self._ring = NULL
        # A batch that was staged at the fork belongs to the parent, which submits it.
        self.staged = 0
        self.renew()

    cpdef destroy(self):
        """Free the context. Wait, without the GIL, until the kernel has done all that is in flight.

        On a frozen disk this lasts until the disk answers. So the driver calls it in a native thread.
        """
        cdef aio_context_t ctx = self._ctx
        # First, because other threads may run while the GIL is away. They must find no context to destroy.
        self._ctx = 0
        self._ring = NULL
        # In a child the address may be a context of its own.
        if ctx and not forked():
            with nogil:
                abi_io_destroy(ctx)

    def close(self):
        """Call `close_eventfd` and `destroy`. A second call does nothing."""
        self.close_eventfd()
        self.destroy()
