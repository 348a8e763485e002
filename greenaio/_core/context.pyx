# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""One native AIO context: its completion ring, its eventfd, no policy.

The only code besides ``_abi`` that knows an AIO structure of the kernel. A request goes in as plain
words (`Context.stage`, `Context.submit`) and comes out as a token and a result (`Context.peek`,
`Context.commit`). The kernel copies an iocb while it accepts it, so one array of them, on the heap,
serves every batch; of a request in flight only its data buffer and its token still matter.
"""

import os
import posix            # for what may be patched in os

from libc.errno cimport EBADF, EMFILE, ENFILE, ENOMEM, errno as c_errno
from libc.stdlib cimport calloc, free
from libc.time cimport time_t
from posix.mman cimport MADV_DONTFORK, madvise
from posix.unistd cimport close

from greenaio._core.abi cimport (
    AIO_RING_MAGIC, IOCB_FLAG_RESFD, abi_clear, abi_eventfd, abi_io_destroy, abi_io_getevents, abi_io_setup,
    abi_io_submit, abi_is_eventfd, abi_load_tail, abi_name, abi_pipe, abi_relax, abi_signal, abi_store_head,
)
from greenaio._core.fork cimport forked

cdef extern from "<unistd.h>" nogil:
    int dup3(int old, int new, int flags)

cdef extern from "<fcntl.h>" nogil:
    int fcntl(int fd, int command, ...)
    const int F_DUPFD_CLOEXEC
    const int F_GETFD
    const int O_CLOEXEC

cdef extern from "<time.h>" nogil:
    struct timespec:
        time_t tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec *ts)
    const int CLOCK_MONOTONIC

cdef enum:
    PAGE = 4096
    PROBE_NS = 1000000000       # an fsync of an empty memory file: microseconds, unless all is lost


cdef uint64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef extern from "<sys/resource.h>" nogil:
    struct rusage:
        long ru_nvcsw
    int getrusage(int who, rusage *usage)
    const int RUSAGE_THREAD


cdef long times_waited() noexcept nogil:
    """How often this thread has given up the processor to wait; being preempted does not count."""
    cdef rusage usage
    getrusage(RUSAGE_THREAD, &usage)
    return usage.ru_nvcsw


cdef object _fdsync = None      # what the probe found; a kernel does not change its mind


def _os_error(long code, what):
    return OSError(-code, f'{what}: {os.strerror(-code)}')


cdef void signal_eventfd(int fd, int same, long name) noexcept nogil:
    """Make readable the eventfd *name* that has the numbers *fd* and *same*. From any thread."""
    abi_signal(fd, same, name)


cdef class Context:
    """An eventfd and, once `open` was called, an ``io_context_t`` that signals it.

    Not for more than one thread. A test may subclass it in Python and override any method.
    """

    def __cinit__(self):
        self.eventfd = self.own_eventfd = -1
        self._iocbs = <iocb *>calloc(BATCH_MAX, sizeof(iocb))
        self._pointers = <iocb **>calloc(BATCH_MAX, sizeof(iocb *))
        self._events = <io_event *>calloc(PEEK_MAX, sizeof(io_event))
        if self._iocbs == NULL or self._pointers == NULL or self._events == NULL:
            raise MemoryError
        cdef int i
        for i in range(BATCH_MAX):
            self._pointers[i] = &self._iocbs[i]

    def __init__(self):
        fd = self._make_eventfd()
        if fd < 0:
            raise _os_error(fd, 'eventfd')
        self.eventfd = fd
        # Closed by mistake, one number leaves the other: epoll reports an eventfd while it has any.
        self.own_eventfd = fcntl(fd, F_DUPFD_CLOEXEC, OWN_MIN)
        if self.own_eventfd < 0:        # so many are not allowed
            self.own_eventfd = fd
        self.name = abi_name(fd)

    cdef long _make_eventfd(self) noexcept:
        """Return a new eventfd, or minus the errno. Where a sandbox denies it, a pipe stands for it: threads can
        signal that, but native AIO can't, so there is none."""
        cdef long fd = abi_eventfd(), pipe
        self.denied = 0
        if fd >= 0 or fd == -EMFILE or fd == -ENFILE or fd == -ENOMEM:
            return fd
        pipe = abi_pipe()
        if pipe < 0:
            return fd
        self.denied = fd
        return pipe

    def __dealloc__(self):
        # Only a context that never had a request is still set up here: see destroy().
        if self._ctx and not forked():
            abi_io_destroy(self._ctx)
        self._close_eventfd()
        free(self._iocbs)
        free(self._pointers)
        free(self._events)

    cpdef open(self, int depth):
        """Set the context up for *depth* requests in flight. Raises OSError as ``io_setup`` does, or as ``eventfd``
        did."""
        cdef long code
        if self._ctx:
            raise ValueError('the context is set up already')
        if depth < 1:
            raise ValueError(f'depth must be at least 1, not {depth}')
        if self.denied:
            raise _os_error(self.denied, 'eventfd')
        code = abi_io_setup(depth, &self._ctx)
        if code < 0:
            self._ctx = 0
            raise _os_error(code, f'io_setup({depth})')
        self.depth = depth
        self._ring = <aio_ring *>self._ctx
        if self._ring.magic != AIO_RING_MAGIC or self._ring.incompat_features != 0:
            self._ring = NULL       # another layout than we know: never guess, ask io_getevents
        try:
            self._unmap_from_children()
        except OSError:
            self.destroy()
            raise
        global _fdsync
        if _fdsync is None:
            _fdsync = self._probe()

    cdef int _unmap_from_children(self) except -1:
        # A child inherits the ring writable and *shared*: its store to head loses events of ours.
        if self._ring == NULL:
            return 0
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
        """Tell whether the kernel knows *opcode*; for FDSYNC by the probe that `open` made once."""
        if opcode == FDSYNC:
            return bool(_fdsync)
        return opcode in (PREAD, PWRITE, FSYNC, PREADV, PWRITEV)

    cdef bint _probe(self):
        # Nothing else is in flight yet, so the first event is the probe's own, and it is reaped
        # here. Its token is 0, which peek() drops should it come later than we wait.
        try:
            fd = os.memfd_create('greenaio-probe')
        except OSError:
            return False
        try:
            self.stage(0, FDSYNC, fd, 0, 0, 0, 0)
            self._iocbs[0].aio_flags = 0        # and it wakes nobody
            if self.submit() != 1:
                return False
            return abi_io_getevents(self._ctx, 1, 1, self._events, PROBE_NS) == 1
        finally:
            posix.close(fd)

    cpdef int stage(self, uint64_t token, int opcode, int fd, uint64_t address, uint64_t nbytes,
                    int64_t offset, unsigned int flags) except -1:
        """Add a request to the batch that the next `submit` offers. *address* and *nbytes* name
        the buffer, or for PREADV and PWRITEV the iovec array and its length."""
        if self.staged >= BATCH_MAX:
            raise ValueError(f'a batch holds {BATCH_MAX} requests')
        cdef iocb *cb = &self._iocbs[self.staged]
        cb.aio_data = token
        cb.aio_rw_flags = flags
        cb.aio_lio_opcode = opcode
        cb.aio_reqprio = 0
        cb.aio_fildes = fd
        cb.aio_buf = address
        cb.aio_nbytes = nbytes
        cb.aio_offset = offset
        cb.aio_flags = IOCB_FLAG_RESFD
        cb.aio_resfd = self.own_eventfd
        self.staged += 1
        return 0

    cpdef long submit(self) except? -4096:
        """Offer the staged batch, which is then gone, and return how many of its *first* requests
        the kernel took, or minus the errno that its head got."""
        # The GIL stays: to give it away around 1 µs is to wait 5 ms for it in a threaded program.
        cdef long n = self.staged, result
        cdef int i
        self.staged = 0
        result = abi_io_submit(self._ctx, n, self._pointers)
        if result == -EBADF and fcntl(self.own_eventfd, F_GETFD) < 0:
            self.own_eventfd = self.eventfd     # somebody has closed it
            for i in range(n):
                self._iocbs[i].aio_resfd = self.own_eventfd
            result = abi_io_submit(self._ctx, n, self._pointers)
        return result

    cpdef int peek(self) except -1:
        """Copy out up to PEEK_MAX completions, and return how many; `token` and `result` read
        them, `commit` must follow before the next peek."""
        cdef unsigned int head, tail, nr
        cdef int n = 0, i, kept
        if self._ring == NULL:
            if not self._ctx:
                return 0
            n = <int>abi_io_getevents(self._ctx, 0, PEEK_MAX, self._events, 0)
            return n if n > 0 else 0
        if forked():
            return 0                        # the parent's ring: it is not mapped here
        nr = self._ring.nr
        head = self._ring.head              # only we store it
        tail = abi_load_tail(self._ring)    # acquire: the events before it are the kernel's, whole
        while head != tail and n < PEEK_MAX:
            self._events[n] = self._ring.io_events[head]
            n += 1
            head += 1
            if head >= nr:
                head = 0
        return n

    cpdef uint64_t token(self, int index) except? 0:
        """The token of the peeked completion at *index*; 0 is nobody's."""
        return self._events[index].data

    cpdef int64_t result(self, int index) except? -4096:
        """The peeked completion's bytes moved, or minus its errno."""
        return self._events[index].res

    cpdef int commit(self, int count) except -1:
        """Give *count* peeked slots back to the kernel, which may overwrite them at once."""
        cdef unsigned int head
        if self._ring == NULL or count == 0:
            return 0                        # io_getevents took them out already
        head = self._ring.head + <unsigned int>count
        if head >= self._ring.nr:
            head -= self._ring.nr
        abi_store_head(self._ring, head)    # release: our copies are made before the kernel looks
        return 0

    cpdef int spin(self, uint64_t limit_ns) except -1:
        """Watch the ring for up to *limit_ns* without the GIL; return 1 as soon as there is an
        event, else 0. Without a readable ring there is nothing to watch."""
        cdef aio_ring *ring = self._ring
        cdef uint64_t end
        cdef bint found = False
        if ring == NULL or forked():
            return 0
        with nogil:
            end = monotonic_ns() + limit_ns
            while True:
                if ring.head != abi_load_tail(ring):
                    found = True
                    break
                if monotonic_ns() >= end:
                    break
                abi_relax()
        return found

    cpdef uint64_t now(self) except? 0:
        """Nanoseconds of CLOCK_MONOTONIC. Here, because who simulates the kernel simulates time as well."""
        return monotonic_ns()

    cpdef int signal(self) except -1:
        """Make the eventfd readable."""
        abi_signal(self.own_eventfd, self.eventfd, self.name)
        return 0

    cpdef int clear(self) except -1:
        """Make the eventfd unreadable. Do so *before* peeking: the kernel publishes the tail
        first and signals then, so what is signalled later is peeked later."""
        abi_clear(self.own_eventfd, self.eventfd, self.name)
        return 0

    cpdef after_fork_in_child(self):
        """Forget the parent's context, and put a fresh eventfd under the same numbers.

        The context's address may be a context of this child's soon, the eventfd is shared with
        the parent, and a watcher of the inherited loop sits on its number: so nothing is
        destroyed, closed or stopped here. But a number that a daemon has closed and given to a file of its own
        is left alone, and `eventfd` is another then.
        """
        cdef int fresh
        cdef bint keeps, keeps_own
        self._ctx = 0
        self._ring = NULL
        self.staged = 0
        if self.eventfd < 0:
            return
        keeps, keeps_own = self._may_take(self.eventfd), self._may_take(self.own_eventfd)
        fresh = <int>self._make_eventfd()
        if fresh == -EMFILE and abi_is_eventfd(self.own_eventfd):
            close(self.own_eventfd)     # else the child would take wake-ups from its parent
            keeps, keeps_own = self._may_take(self.eventfd), False
            fresh = <int>self._make_eventfd()
        if fresh < 0:
            return
        self.name = abi_name(fresh)
        if self.name == -2 and keeps and fresh != self.eventfd:
            close(self.eventfd)         # a number has to be free to ask for the name
            self.name = abi_name(fresh)
        self.eventfd = self._renewed(self.eventfd, fresh) if keeps else fresh
        self.own_eventfd = self._renewed(self.own_eventfd, fresh) if keeps_own else fresh
        if fresh != self.eventfd and fresh != self.own_eventfd:
            close(fresh)

    cdef bint _may_take(self, int number) noexcept:
        """Whether *number* is our eventfd's, or no file's."""
        return fcntl(number, F_GETFD) < 0 or abi_name(number) == self.name

    cdef int _renewed(self, int number, int fresh) noexcept:
        """Put the eventfd *fresh* under *number* as well. Return its number."""
        dup3(fresh, number, O_CLOEXEC)  # which does nothing if they are the same
        return number

    cpdef destroy(self):
        """Free the context: waits, without the GIL, until the kernel has done all in flight."""
        cdef aio_context_t ctx = self._ctx
        self._ctx = 0
        self._ring = NULL
        if ctx and not forked():            # in a child the address may be a context of its own
            with nogil:
                abi_io_destroy(ctx)

    def close_eventfd(self):
        """Close the eventfd; stop what watches it first. The kernel holds it for what is in flight."""
        self._close_eventfd()

    cdef void _close_eventfd(self) noexcept:
        cdef int own = self.own_eventfd if self.own_eventfd != self.eventfd else -1
        if own >= 0 and abi_name(own) == self.name:
            close(own)
        if self.eventfd >= 0 and abi_name(self.eventfd) == self.name:      # else a file of the program
            close(self.eventfd)
        self.eventfd = self.own_eventfd = -1

    def close(self):
        """`close_eventfd` and `destroy`. May be called twice."""
        self.close_eventfd()
        self.destroy()
