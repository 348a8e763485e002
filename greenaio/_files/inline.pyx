# cython: language_level=3, boundscheck=False, wraparound=False
"""Calls that run inline, in the hub's own thread: each waits for nothing, or the kernel was asked not to wait."""

from libc.stdint cimport int64_t, uint64_t

from greenaio._core.context cimport PREAD, PREADV
from greenaio._core.driver cimport Driver
from greenaio._core.mailbox cimport WAITED_NS
from greenaio._core.request cimport Request, advance, iovec
from greenaio._files.device cimport coarse_ns, waited_in_hub
from greenaio._files.facts cimport ANSWER, STORED
from greenaio._files.route cimport Known

cdef extern from *:
    """
    #include <errno.h>
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <unistd.h>

    #define RESULT(call) ({ long r_ = (call); r_ < 0 ? -(long)errno : r_; })


    /* Whether a sandbox denies pwritev2 and preadv2, in this order. */
    static int is_denied[2];

    /* Return whether the call itself is refused, and not this file. A call that is allowed says EBADF to fd
       -1. */
    static inline int denies(int reading, long result)
    {
        if (result != -ENOSYS && result != -EPERM)
            return 0;
        result = RESULT(syscall(reading ? SYS_preadv2 : SYS_pwritev2, -1, NULL, 0L, 0L, 0L, 0L));
        return is_denied[reading] = result == -ENOSYS || result == -EPERM;
    }

    static inline long vector_now(int reading, int fd, struct iovec *v, int n, int64_t offset, unsigned flags)
    {
        long result;
        /* No sandbox denies the oldest calls, so use them where they do. */
        if (flags == 0 && n == 1) {
            void *at = v->iov_base;
            size_t length = v->iov_len;
            return offset == -1 ? RESULT(reading ? read(fd, at, length) : write(fd, at, length))
                                : RESULT(reading ? pread(fd, at, length, offset) : pwrite(fd, at, length, offset));
        }
        if (flags == 0)
            return offset == -1 ? RESULT(reading ? readv(fd, v, n) : writev(fd, v, n))
                                : RESULT(reading ? preadv(fd, v, n, offset) : pwritev(fd, v, n, offset));
        if (flags == 8 /* RWF_NOWAIT */ && is_denied[reading])
            /* After this answer a thread does the read or write. */
            return -EOPNOTSUPP;
        result = RESULT(syscall(reading ? SYS_preadv2 : SYS_pwritev2, fd, v, (long)n, offset, 0L, flags));
        return flags == 8 && denies(reading, result) ? -EOPNOTSUPP : result;
    }
    """
    long vector_now(bint reading, int fd, iovec *buffers, int n, int64_t offset, unsigned int flags)


cdef int64_t read_in_line(int fd, iovec *buffers, int count, uint64_t wanted, int64_t offset, unsigned int flags,
                           bint once, int64_t *last) except -1:
    """Read inline the part of *wanted* bytes that the page cache has. Return its length in bytes. If the rest
    is missing, *buffers* begin behind that part afterwards.

    *last* is set to the kernel's last answer: bytes, 0 at the end of the file, or minus the errno, which is
    EAGAIN or EOPNOTSUPP if the rest would wait. *offset* -1 is the file's own position. With *once* there is
    one call."""
    cdef uint64_t began = coarse_ns()
    cdef int64_t got = 0, more
    while True:
        more = vector_now(True, fd, buffers, count, offset, flags)
        if coarse_ns() - began > WAITED_NS:
            waited_in_hub(fd, began)
        if more > 0:
            got += more
        if more <= 0 or once or <uint64_t>got == wanted:
            last[0] = more
            return got
        advance(buffers, count, more)
        if offset >= 0:
            offset += more


cdef int64_t now(Request request, unsigned int flags) noexcept:
    """Make the system call in this thread. Return bytes moved, or minus the errno."""
    cdef bint reading = request.opcode == PREAD or request.opcode == PREADV
    return vector_now(reading, request.fd, request.buffers, request.buffer_count, request.offset, flags)


cdef bint has_place(Request request, Known known) noexcept:
    """Return whether the request has an offset or the file is stored. A pipe or socket has no offset, so a
    request without one may wait there. With an offset, the kernel returns an error at once."""
    return request.offset >= 0 or known.kind & STORED


cdef bint means_its_writer(Request request, Known known) noexcept:
    """Return whether the request writes the 0 that moves the writing thread into a control group. Only a call
    in this thread moves this thread."""
    return (known.kind & ANSWER and request.buffer_count == 1 and 0 < request.nbytes <= 2
            and (<char *>request.buffers.iov_base)[0] == c'0' and known.device.file_system in ('cgroup', 'cgroup2'))
