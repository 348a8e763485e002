from libc.stdint cimport int64_t, uint64_t

from greenaio._core.abi cimport aio_context_t, aio_ring, io_event, iocb

cdef enum:
    BATCH_MAX = 32      # requests in one io_submit: QEMU's bound; above it nothing is gained
    PEEK_MAX = 64       # events copied out at once: one drain pass
    OWN_MIN = 500       # numbers of our own: who closes one twice closes a low number, which is in use again

cpdef enum Opcode:
    PREAD = 0
    PWRITE = 1
    FSYNC = 2
    FDSYNC = 3
    PREADV = 7
    PWRITEV = 8

cdef uint64_t monotonic_ns() noexcept nogil
cdef void signal_eventfd(int fd, int same, long name) noexcept nogil
cdef long times_waited() noexcept nogil

cdef class Context:
    cdef aio_context_t _ctx         # 0: not set up, or not ours after a fork
    cdef aio_ring *_ring            # NULL: not readable from user space, io_getevents instead
    cdef iocb *_iocbs               # BATCH_MAX of them; the kernel copies each in io_submit
    cdef iocb **_pointers
    cdef io_event *_events          # PEEK_MAX, the copies that peek() makes
    cdef long _getevents_ns         # io_getevents: how long to wait, for the probe alone
    cdef readonly long denied       # minus the errno that eventfd gave, where a pipe stands for it; else 0
    cdef readonly int eventfd       # this number is for the loop, which watches it
    cdef readonly int own_eventfd   # the same, for us and the kernel
    cdef readonly int depth
    cdef readonly int staged

    cpdef open(self, int depth)
    cpdef int stage(self, uint64_t token, int opcode, int fd, uint64_t address, uint64_t nbytes,
                    int64_t offset, unsigned int flags) except -1
    cpdef long submit(self) except? -4096
    cpdef int peek(self) except -1
    cpdef uint64_t token(self, int index) except? 0
    cpdef int64_t result(self, int index) except? -4096
    cpdef int commit(self, int count) except -1
    cpdef int spin(self, uint64_t limit_ns) except -1
    cpdef uint64_t now(self) except? 0
    cpdef int signal(self) except -1
    cpdef int clear(self) except -1
    cpdef after_fork_in_child(self)
    cpdef destroy(self)
    cdef long _make_eventfd(self) noexcept
    cdef long name                  # by which the kernel knows the eventfd
    cdef bint _may_take(self, int number) noexcept
    cdef int _renewed(self, int number, int fresh) noexcept
    cdef void _close_eventfd(self) noexcept
    cdef bint _probe(self)
    cdef int _unmap_from_children(self) except -1
