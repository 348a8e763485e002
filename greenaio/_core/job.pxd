from libc.stdint cimport int64_t, uint64_t

from greenaio._core.caller cimport caller
from greenaio._core.request cimport Request

cdef enum:
    # These stand where the number of a system call does. This one is the function of the C library.
    POSIX_FALLOCATE = -1
    # A function of ours, which makes several calls.
    CHAIN = -2

# The kind of a call tells on which processor it runs best.
cdef enum:
    # It may copy much, or is likely to wait.
    LONG = 0
    # It is likely to be short, because it looks up names.
    ON_NAMES = 1
    # It is likely to be short, because it writes a few bytes.
    ON_BYTES = 2
    # It is likely to be short, because it closes a file.
    ON_CLOSE = 3
    KINDS = 4

ctypedef long (*chain)(void *arg) noexcept nogil

# Plain memory. The thread that asks fills it, with the GIL. Then the lock of the pool passes it to a worker,
# and the mailbox passes it back to the hub. One side has it at a time. The other side reads nothing of it
# except `home` and, with the lock of the pool, `waiting`.
cdef struct job:
    # The links in the queue of the pool. In the mailbox `next` alone is used.
    job *next
    job *previous
    # The pool, or NULL.
    void *home
    # A field of the pool: the number of calls that are still to take threads. Or NULL.
    int *wary
    # It is still in the queue. The lock of `home` guards this.
    bint waiting
    # The mailbox that it comes back to.
    void *back
    # The request that keeps this memory. No worker touches it.
    void *request
    # The number of the system call, or POSIX_FALLOCATE or CHAIN.
    long number
    # The arguments of the call. For CHAIN: the function and its argument.
    long args[6]
    # Its answer, or minus the errno.
    long result
    # The signal that it sent to the worker, or 0.
    int signal
    # The thread that it is made for.
    caller by
    # LONG or one of ON_...
    int kind

cdef job *job_of(Request request) except NULL
cdef Request new_close(keep, chain call, void *arg)
cdef Request new_chain(int fd, keep, str name, chain calls, void *arg, bint is_short)
cdef Request new_call(int fd, keep, long number, long a=*, long b=*, long c=*, long d=*, long e=*, long f=*)
cdef int as_call(Request request) except -1
cdef int64_t make_here(Request request) except? -4096
cdef long make(job *one) noexcept nogil
cdef void make_for_caller(job *one) noexcept nogil
