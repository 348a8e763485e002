from libc.stdint cimport int64_t, uint64_t

from greenaio._core.caller cimport caller
from greenaio._core.request cimport Request

cdef enum:
    POSIX_FALLOCATE = -1        # in place of a system call's number
    CHAIN = -2                  # a function of ours, which makes several

# The kind of a call tells on which processor it runs best.
cdef enum:
    LONG = 0                    # may copy much, or is likely to wait
    ON_NAMES = 1                # likely to be short: looks up names ...
    ON_BYTES = 2                # ... or writes a few bytes ...
    ON_CLOSE = 3                # ... or closes a file
    KINDS = 4

ctypedef long (*chain)(void *arg) noexcept nogil

cdef struct job:
    job *next                   # in the queue of the pool, then in the mailbox
    job *previous
    void *home                  # the pool, or NULL
    int *wary                   # of the pool: so many calls more take threads; or NULL
    bint waiting                # in the queue still; home's lock guards it
    void *back                  # the mailbox
    void *request               # keeps this memory; no worker touches it
    long number                 # the system call ...
    long args[6]                # ... and its arguments
    long result                 # its answer, or minus the errno
    int signal                  # that it sent to the worker, or 0
    caller by                   # for whom it is made
    int kind                    # LONG or ON_...

cdef job *job_of(Request request) except NULL
cdef Request new_close(keep, chain call, void *arg)
cdef Request new_chain(int fd, keep, str name, chain calls, void *arg, bint is_short)
cdef Request new_call(int fd, keep, long number, long a=*, long b=*, long c=*, long d=*, long e=*, long f=*)
cdef int as_call(Request request) except -1
cdef int64_t make_here(Request request) except? -4096
cdef long make(job *one) noexcept nogil
cdef void make_for_caller(job *one) noexcept nogil
