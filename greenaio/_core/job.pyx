# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""One system call that a worker makes for a request: a `job`, plain memory that hangs from the request.

A worker never takes the GIL and touches no object of Python. So the job has all that the call needs: its
number, its arguments, and the attributes of the thread that it is made for. The memory that the arguments
point into belongs to the request, which keeps it until the hub has taken the job out of its mailbox.
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

# In bytes. To copy more than this takes longer than to wake a worker, so a larger write is no short call.
cdef enum:
    SHORT_BYTES = 8192


cdef job *job_of(Request request) except NULL:
    """Return the job of *request*, a new one if it has none. Raise MemoryError. The request frees it."""
    if request.job == NULL:
        request.job = calloc(1, sizeof(job))
        if request.job == NULL:
            raise MemoryError
        # Not counted as a reference: the job is a part of the request.
        (<job *>request.job).request = <void *>request
    return <job *>request.job


cdef void _set(job *one, long a, long b, long c, long d, long e, long f) noexcept:
    """Set the six arguments of the call."""
    one.args[0], one.args[1], one.args[2] = a, b, c
    one.args[3], one.args[4], one.args[5] = d, e, f


cdef Request new_call(int fd, keep, long number, long a=0, long b=0, long c=0, long d=0, long e=0, long f=0):
    """Return a request for the system call *number*, on *fd*. It keeps *keep*, the object that its pointers
    point into."""
    cdef Request request = new_request(CALL, fd, 0, 0, 1)
    cdef job *one = job_of(request)
    request.keep = keep
    # The histograms count this call as a read.
    if number == SYS_pread64:
        request.direction = READ
    one.number = number
    one.kind = LONG
    _set(one, a, b, c, d, e, f)
    return request


cdef Request new_close(keep, chain call, void *arg):
    """Return a request for ``call(arg)``, which closes a file. It is made even if the greenlet that asks for
    it is killed."""
    cdef Request request = new_call(-1, keep, CHAIN, <long>call, <long>arg)
    request.name = 'close'
    # Without this a kill would withdraw the request, and its file would stay open.
    request.must_run = True
    (<job *>request.job).kind = ON_CLOSE
    return request


cdef Request new_chain(int fd, keep, str name, chain calls, void *arg, bint is_short):
    """Return a request for ``calls(arg)``: several system calls, of which each may depend on the one before.

    *calls* runs without the GIL. *name* is the name of the operation in `os`. The call *is_short* if all it
    needs is likely to be in memory.
    """
    cdef Request request = new_call(fd, keep, CHAIN, <long>calls, <long>arg)
    request.name = name
    (<job *>request.job).kind = ON_NAMES if is_short else LONG
    return request


# The names of `os` for the calls, as an operator reads them in messages and events.
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
    # A request without a job has not been offered to a thread, so only 'call' is known of it.
    return _NAMES.get((<job *>request.job).number if request.job != NULL else 0, 'call')


cdef int as_call(Request request) except -1:
    """Give *request* a job: the system call for the operation that native AIO would do. Raise MemoryError."""
    cdef job *one = job_of(request)
    cdef int opcode = request.opcode
    cdef iovec *buffers = request.buffers
    cdef long count = request.buffer_count
    if opcode == FSYNC or opcode == FDSYNC:
        # A sync waits for the disk.
        one.number = SYS_fsync if opcode == FSYNC else SYS_fdatasync
        one.kind = LONG
        one.args[0] = request.fd
        return 0
    cdef bint reading = opcode == PREAD or opcode == PREADV
    # A read may have to wait for the disk, a short write usually goes into the page cache.
    one.kind = ON_BYTES if not reading and request.nbytes <= SHORT_BYTES else LONG
    # The offset -1 means the file's own position.
    cdef bint in_order = request.offset == -1
    # A sandbox may deny the newer calls, so each request takes the oldest call that does it. Only the calls
    # with a 2 know flags.
    if request.flags:
        one.number = SYS_preadv2 if reading else SYS_pwritev2
    # One buffer needs no vector.
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
    # These calls take the offset in two halves. A 64-bit kernel takes the whole offset from the first.
    _set(one, request.fd, <long>buffers, count, request.offset, 0, request.flags)
    return 0


cdef long make(job *one) noexcept nogil:
    """Make the call. Return its result, or minus the errno."""
    cdef long result
    if one.number == CHAIN:
        # The function itself returns minus the errno.
        return (<chain>one.args[0])(<void *>one.args[1])
    # The function of the C library does without the help of the file system where it must. It returns its
    # errno.
    if one.number == POSIX_FALLOCATE:
        return -posix_fallocate(<int>one.args[0], one.args[1], one.args[2])
    # Only these flags make the kernel read the mode. O_TMPFILE contains O_DIRECTORY, so this includes opens
    # of directories, whose mode the kernel ignores.
    if one.number == SYS_openat and one.args[2] & (O_CREAT | O_TMPFILE):
        one.args[3] = creation_mode(one.args[3], True)
    # All calls get six arguments, because the kernel ignores any that it does not need.
    result = syscall(one.number, one.args[0], one.args[1], one.args[2], one.args[3], one.args[4], one.args[5])
    return -c_errno if result < 0 else result


cdef void make_for_caller(job *one) noexcept nogil:
    """Make the call in a worker, with the ids, the capabilities and the umask of its caller. Set `result` and
    `signal`."""
    one.result = begin_for(&one.by)
    # A close needs no rights of the caller. It is made even if they can't be put on, or its file would stay
    # open.
    if one.result == 0 or one.kind == ON_CLOSE:
        # `begin_for` has put on the ids and capabilities. This adds the umask, for this call only.
        act_for(&one.by)
        one.result = make(one)
        act_for(NULL)
    # The signal is for the caller, so the hub raises it in its own thread.
    one.signal = take_signal(one.result)


cdef int64_t make_here(Request request) except? -4096:
    """Make the call of *request* in this thread, which it blocks. Return its result, or minus the errno.
    Raise the exception of a signal handler."""
    cdef job *one = <job *>request.job
    cdef long result
    while True:
        # Other threads go on during the call. The greenlets of this hub wait.
        with nogil:
            result = make(one)
        # As Python does: a call that a signal has interrupted is made again after the handler.
        if result != -EINTR:
            return result
        PyErr_CheckSignals()
