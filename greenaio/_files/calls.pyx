# cython: language_level=3, boundscheck=False, wraparound=False
"""The system calls on files that are neither a read nor a write, in one place for the layers above.

`portable` has the same names. Any of these calls may wait for a disk, because a path is not cached, a journal
is full or a close has pages to write. So a thread of its device makes it. Only calls on files that have no
disk run inline.
"""

from libc.errno cimport errno as c_errno
from libc.stdint cimport int64_t
from libc.string cimport memcpy

from greenaio._core.caller import learn_umask, umask
from greenaio._files.changes import ftruncate, posix_fallocate, settle
from greenaio._files.closing import close
from greenaio._files.names import fstat, stat, unlink
from greenaio._files.opening import open, open_here
from greenaio._files.paths import working_directory
from greenaio._files.seeks import extents, initialize, lseek
from greenaio._files.transfers import copy_file_range, readahead, sendfile, start_writing

from greenaio._core.job cimport new_call
from greenaio._core.memory cimport AlignedBuffer, scratch
from greenaio._files.arguments cimport failed
from greenaio._files.route cimport know_open, perform

cdef extern from *:
    """
    #include <sys/syscall.h>
    #include <unistd.h>
    """
    long syscall(long number, ...) nogil
    const long SYS_statx
    const long SYS_preadv2
    const long SYS_pwritev2
    const long SYS_copy_file_range
    const long SYS_ioctl


def ioctl(int fd, unsigned long number, bytes argument):
    """Make the call ``ioctl(fd, number, argument)``. Return the bytes of *argument* as the call has left
    them. Raise OSError."""
    cdef AlignedBuffer memory = scratch(len(argument))
    memcpy(memory.address, <char *>argument, len(argument))
    cdef int64_t result = perform(new_call(fd, memory, SYS_ioctl, fd, number, <long>memory.address), know_open(fd))
    if result < 0:
        raise failed(result, None)
    return memory.address[:memory.nbytes]


def errors_of_newer_calls():
    """Return a dict from the name of each newer system call that has a substitute here to its errno. The
    calls are made with arguments that no kernel accepts, so the errno is EBADF, EFAULT or EINVAL unless the
    call is denied or unknown."""
    return {name: c_errno if syscall(number, -1, NULL, NULL, NULL, NULL, NULL) < 0 else 0 for name, number in (
        ('statx', SYS_statx), ('preadv2', SYS_preadv2), ('pwritev2', SYS_pwritev2), ('openat2', 437),
        ('copy_file_range', SYS_copy_file_range), ('cachestat', 451), ('statmount', 457))}
