# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""One system call that a worker makes for a request: a `job`, plain memory that hangs from the request.

A worker never takes the GIL and touches no object of Python's. So the job has all that the call needs: its
number, its arguments, and for whom it is made. The memory that the arguments point into belongs to the request,
which keeps it until the hub has taken the job out of its mailbox.
"""

from greenaio._core.request import Opcode_name

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, errno as c_errno
from libc.stdlib cimport calloc

from greenaio._core.caller cimport act_for, begin_for, creation_mode, take_signal
from greenaio._core.context cimport FDSYNC, FSYNC, PREAD, PREADV, PWRITE, PWRITEV
from greenaio._core.request cimport CALL, Request, iovec, new_request
from greenaio._core.tally cimport READ

cdef extern from *:
    """
    #include <fcntl.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    """
    long syscall(long number, ...) nogil
    const long SYS_openat
    const long SYS_read
    const long SYS_write
    const long SYS_pread64
    const long SYS_pwrite64
    const long SYS_newfstatat
    const long SYS_ftruncate
    const long SYS_fallocate
    const long SYS_copy_file_range
    const long SYS_sendfile
    const long SYS_lseek
    const long SYS_ioctl
    const long SYS_readahead
    const long SYS_sync_file_range
    const long SYS_readv
    const long SYS_writev
    const long SYS_preadv
    const long SYS_pwritev
    const long SYS_preadv2
    const long SYS_pwritev2
    const long SYS_fsync
    const long SYS_fdatasync
    int posix_fallocate(int fd, long offset, long length) nogil
    const int O_CREAT
    const int O_TMPFILE

cdef enum:
    SHORT_BYTES = 8192          # a write of more takes longer to copy than a worker to wake


cdef job *job_of(Request request) except NULL:
    if request.job == NULL:
        request.job = calloc(1, sizeof(job))
        if request.job == NULL:
            raise MemoryError
        (<job *>request.job).request = <void *>request
    return <job *>request.job


cdef void _set(job *one, long a, long b, long c, long d, long e, long f) noexcept:
    one.args[0], one.args[1], one.args[2] = a, b, c
    one.args[3], one.args[4], one.args[5] = d, e, f


cdef Request new_call(int fd, keep, long number, long a=0, long b=0, long c=0, long d=0, long e=0, long f=0):
    """A request for the system call *number*, on *fd*; *keep* is what its pointers point into."""
    cdef Request request = new_request(CALL, fd, 0, 0, 1)
    cdef job *one = job_of(request)
    request.keep = keep
    if number == SYS_pread64:
        request.direction = READ
    one.number = number
    one.kind = LONG
    _set(one, a, b, c, d, e, f)
    return request


cdef Request new_close(keep, chain call, void *arg):
    """A request for ``call(arg)``, which closes a file. It is made even if the greenlet that asks for it is killed."""
    cdef Request request = new_call(-1, keep, CHAIN, <long>call, <long>arg)
    request.name = 'close'
    request.must_run = True
    (<job *>request.job).kind = ON_CLOSE
    return request


cdef Request new_chain(int fd, keep, str name, chain calls, void *arg, bint is_short):
    """A request for ``calls(arg)``: several system calls, of which each may depend on the one before. It gets no
    GIL. *name* is the name of the operation in `os`. The call *is_short* if all it needs is likely to be in
    memory."""
    cdef Request request = new_call(fd, keep, CHAIN, <long>calls, <long>arg)
    request.name = name
    (<job *>request.job).kind = ON_NAMES if is_short else LONG
    return request


_NAMES = {
    SYS_openat: 'open', SYS_pread64: 'pread', SYS_newfstatat: 'stat', SYS_lseek: 'lseek',
    SYS_ioctl: 'ioctl', SYS_ftruncate: 'ftruncate', SYS_fallocate: 'fallocate', POSIX_FALLOCATE: 'posix_fallocate',
    SYS_copy_file_range: 'copy_file_range', SYS_sendfile: 'sendfile', SYS_readahead: 'readahead',
    SYS_sync_file_range: 'sync_file_range'}


def operation(Request request not None):
    """Return the name in `os` of the call of *request*, or a similar one."""
    if request.opcode != CALL:
        return Opcode_name(request.opcode).lower()
    if request.name is not None:
        return request.name
    return _NAMES.get((<job *>request.job).number if request.job != NULL else 0, 'call')


cdef int as_call(Request request) except -1:
    """Give *request* a job: the system call for the operation that native AIO would do."""
    cdef job *one = job_of(request)
    cdef int opcode = request.opcode
    cdef iovec *buffers = request.buffers
    cdef long count = request.buffer_count
    if opcode == FSYNC or opcode == FDSYNC:
        one.number = SYS_fsync if opcode == FSYNC else SYS_fdatasync
        one.kind = LONG
        one.args[0] = request.fd
        return 0
    cdef bint reading = opcode == PREAD or opcode == PREADV
    one.kind = ON_BYTES if not reading and request.nbytes <= SHORT_BYTES else LONG
    cdef bint in_order = request.offset == -1       # at the file's own position
    # A sandbox may deny the newer calls, so each request takes the oldest one that does it.
    if request.flags:
        one.number = SYS_preadv2 if reading else SYS_pwritev2
    elif count == 1:
        if reading:
            one.number = SYS_read if in_order else SYS_pread64
        else:
            one.number = SYS_write if in_order else SYS_pwrite64
        _set(one, request.fd, <long>buffers.iov_base, buffers.iov_len, request.offset, 0, 0)
        return 0
    elif in_order:
        one.number = SYS_readv if reading else SYS_writev
    else:
        one.number = SYS_preadv if reading else SYS_pwritev
    # The offset in two halves, of which a 64-bit kernel takes the first whole.
    _set(one, request.fd, <long>buffers, count, request.offset, 0, request.flags)
    return 0


cdef long make(job *one) noexcept nogil:
    """Make the call. Return its result, or minus the errno."""
    cdef long result
    if one.number == CHAIN:
        return (<chain>one.args[0])(<void *>one.args[1])
    if one.number == POSIX_FALLOCATE:   # the C library's, which can do without the file system's help
        return -posix_fallocate(<int>one.args[0], one.args[1], one.args[2])
    if one.number == SYS_openat and one.args[2] & (O_CREAT | O_TMPFILE):
        one.args[3] = creation_mode(one.args[3])
    result = syscall(one.number, one.args[0], one.args[1], one.args[2], one.args[3], one.args[4], one.args[5])
    return -c_errno if result < 0 else result


cdef void make_for_caller(job *one) noexcept nogil:
    """Make the call in a worker, with the ids, the capabilities and the umask of its caller."""
    one.result = begin_for(&one.by)
    if one.result == 0 or one.kind == ON_CLOSE:     # which needs nothing of the caller
        act_for(&one.by)
        one.result = make(one)
        act_for(NULL)
    one.signal = take_signal(one.result)


cdef int64_t make_here(Request request) except? -4096:
    """Make the call of *request* in this thread, which it blocks. Return its result, or minus the errno."""
    cdef job *one = <job *>request.job
    cdef long result
    while True:
        with nogil:
            result = make(one)
        if result != -EINTR:
            return result
        PyErr_CheckSignals()
