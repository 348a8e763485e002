from libc.stdint cimport int64_t, uint64_t

from greenaio._core.abi cimport aio_context_t, aio_ring, io_event, iocb
from greenaio._core.eventfd cimport Eventfd

cdef enum:
    # Requests in one `io_submit`. QEMU has the same bound, and a larger batch gains nothing.
    BATCH_MAX = 32
    # Events that are copied out at once: one drain pass.
    PEEK_MAX = 64

# The numbers are the kernel's, see <linux/aio_abi.h>.
cpdef enum Opcode:
    PREAD = 0
    PWRITE = 1
    FSYNC = 2
    FDSYNC = 3
    PREADV = 7
    PWRITEV = 8

cdef uint64_t monotonic_ns() noexcept nogil
cdef long times_waited() noexcept nogil

cdef class Context(Eventfd):
    # 0 if no context is set up, or if it belongs to the parent after a fork.
    cdef aio_context_t _ctx
    # NULL if the ring can't be read from user space. Then `io_getevents` reads it.
    cdef aio_ring *_ring
    # An array of BATCH_MAX. The kernel copies each iocb in `io_submit`.
    cdef iocb *_iocbs
    cdef iocb **_pointers
    # An array of PEEK_MAX: the copies that `peek` makes.
    cdef io_event *_events
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
    cpdef after_fork_in_child(self)
    cpdef destroy(self)
    cdef bint _probe(self)
    cdef int _unmap_from_children(self) except -1
