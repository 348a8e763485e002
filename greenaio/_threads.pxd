from greenaio._engine cimport Engine, Request

cdef enum:
    POSIX_FALLOCATE = -1            # in place of a system call's number

cdef struct mailbox
cdef struct pool

cdef class Inbox:
    cdef mailbox *_box

    cdef int reap(self, Engine engine) except -1
    cdef wait(self)

cdef class Pool:
    cdef pool *_pool
    cdef readonly object device         # st_dev

    cdef int submit(self, Request request, Inbox inbox) except -1
    cdef bint all_busy(self) noexcept
    cdef int busy(self) noexcept

cdef bint withdraw(Request request) noexcept
cdef bint any_busy() noexcept
cdef Pool pool_of(device)
cdef Request new_call(int fd, keep, long number, long a=*, long b=*, long c=*, long d=*, long e=*, long f=*)
cdef int as_call(Request request) except -1
