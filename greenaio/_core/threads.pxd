from libc.stdint cimport int64_t, uint64_t

from greenaio._core.engine cimport Engine, Request

cdef enum:
    WAITED_NS = 20000000            # a call that takes as long has waited for something
    POSIX_FALLOCATE = -1            # in place of a system call's number
    CHAIN = -2                      # a function of ours, which makes several

ctypedef long (*chain)(void *arg) noexcept nogil

cdef struct mailbox
cdef struct pool

cdef class Inbox:
    cdef mailbox *_box

    cdef int reap(self, Engine engine) except -1
    cdef int look(self, Engine engine) except -1
    cdef wait(self)

cdef class Pool:
    cdef pool *_pool
    cdef readonly object device         # st_dev; None: for calls that wait for no disk

    cpdef int submit(self, Request request, Inbox inbox) except -1
    cdef bint all_busy(self) noexcept
    cdef bint is_wary(self) noexcept
    cdef void beware(self) noexcept
    cdef int busy(self) noexcept

cdef long creation_mode(long mode) noexcept nogil
cdef int64_t make_here(Request request) except? -4096
cdef bint withdraw(Request request) noexcept
cdef bint any_busy() noexcept
cdef Pool pool_of(device)
cdef Pool lone_threads()
cdef int start_worker(void *(*work)(void *) noexcept nogil, void *arg) noexcept
cdef Request new_close(keep, chain call, void *arg)
cdef Request new_chain(int fd, keep, str name, chain calls, void *arg, bint is_short)
cdef Request new_call(int fd, keep, long number, long a=*, long b=*, long c=*, long d=*, long e=*, long f=*)
cdef int as_call(Request request) except -1
