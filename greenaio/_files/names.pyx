# cython: language_level=3, boundscheck=False, wraparound=False
"""`stat` and `unlink`: calls that walk to the end of a path and open nothing there."""

import os
# `posix` has the plain calls, also while the functions of `os` are patched.
import posix
import sys

from cpython.number cimport PyIndex_Check
from libc.stdint cimport int64_t, uint64_t
from posix.unistd cimport close as close_fd

from greenaio._core.ends import was_thrown

from greenaio._core.handle cimport closing
from greenaio._core.hub cimport current_driver
from greenaio._core.job cimport new_call
from greenaio._core.memory cimport AlignedBuffer, scratch
from greenaio._files.arguments cimport c_int, failed
from greenaio._files.opening cimport walk_there
from greenaio._files.paths cimport Place, check_folder, path_at_hand, path_bytes
from greenaio._files.route cimport Known, in_line, know_open, perform
from greenaio._files.steps cimport stat_there, unlink_there
from greenaio._files.walk cimport Walk

cdef extern from *:
    """
    #include <fcntl.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    """
    const long SYS_newfstatat
    const int AT_EMPTY_PATH
    const int AT_FDCWD
    const int AT_SYMLINK_NOFOLLOW
    const int O_NOFOLLOW
    struct timespec:
        long tv_sec
        long tv_nsec
    struct c_stat "stat":
        uint64_t st_dev
        uint64_t st_ino
        unsigned int st_mode
        uint64_t st_nlink
        unsigned int st_uid
        unsigned int st_gid
        uint64_t st_rdev
        int64_t st_size
        long st_blksize
        int64_t st_blocks
        timespec st_atim
        timespec st_mtim
        timespec st_ctim


def stat(path, *, dir_fd=None, follow_symlinks=True):
    """Return the stat of *path*, or of an fd, as `os.stat` does: inline if the kernel's cache tells all,
    otherwise by threads of the devices on the way. Raise OSError."""
    cdef bytes encoded
    cdef int flags = 0 if follow_symlinks else AT_SYMLINK_NOFOLLOW
    if PyIndex_Check(path):
        return _stat_number(path, dir_fd, follow_symlinks)
    path = os.fspath(path)
    encoded = path_bytes(path, 'stat')
    cdef int where = AT_FDCWD if dir_fd is None else c_int(dir_fd)
    current_driver().check_caller()
    if closing:
        check_folder(encoded, where)
    cdef int fd = path_at_hand(encoded, where, 0 if follow_symlinks else O_NOFOLLOW, path)
    if fd >= 0:
        try:
            found = posix.fstat(fd)
        finally:
            close_fd(fd)
        current_driver().end_in_line()
        return found
    cdef Place place = Place(encoded, where)
    cdef Walk walk = Walk(place.path, place.dir_fd, follow_symlinks)
    cdef AlignedBuffer memory
    walk.go_on()
    if walk.is_in_memory():
        if walk.way.error:
            raise failed(walk.way.error, path)
        return posix.fstat(walk.way.end)
    memory = scratch(sizeof(c_stat))
    walk.way.flags, walk.way.answer = flags, memory.address
    walk.keep = place, memory
    cdef int64_t result = walk_there(current_driver(), walk, 'stat', stat_there)
    if result < 0:
        raise failed(result, path)
    return _stat_result(<c_stat *>memory.address)


cdef object _stat_number(fd, dir_fd, bint follow_symlinks):
    """Do the work of `stat` for an fd. Raise ValueError if an argument has a meaning for paths only."""
    if dir_fd is not None:
        raise ValueError("stat: can't specify dir_fd without matching path")
    if not follow_symlinks:
        raise ValueError('stat: cannot use fd and follow_symlinks together')
    if c_int(fd) < 0:
        # `posix.stat` has an error of its own for a negative number.
        return posix.stat(fd)
    try:
        return fstat(fd)
    except OSError as error:
        if not was_thrown(error):
            error.filename = fd
        raise


def unlink(path):
    """Remove *path* as `os.unlink` does. Raise OSError."""
    cdef bytes encoded = path_bytes(os.fspath(path), 'unlink')
    cdef Place place
    cdef Walk walk
    cdef int64_t result
    sys.audit('os.remove', path, -1)
    current_driver().check_caller()
    place = Place(encoded, AT_FDCWD)
    walk = Walk(place.path, place.dir_fd, False)
    walk.keep = place
    result = walk_there(current_driver(), walk, 'unlink', unlink_there)
    if result < 0:
        raise failed(result, path)


def fstat(fd):
    """Return the stat of the open *fd*, as `os.fstat` does: inline unless a server has to be asked. Raise
    OSError."""
    cdef int number = c_int(fd)
    cdef Known known = know_open(number)
    if in_line(known, 0) or known.device.is_local:
        return posix.fstat(number)
    cdef AlignedBuffer memory = scratch(sizeof(c_stat))
    cdef int64_t result = perform(new_call(number, memory, SYS_newfstatat, number, <long><char *>b'',
                                           <long>memory.address, AT_EMPTY_PATH), known)
    if result < 0:
        raise failed(result, None)
    return _stat_result(<c_stat *>memory.address)


cdef object _stat_result(c_stat *st):
    """Return the `os.stat_result` for the answer of the kernel, with the fields that `os.stat` gives on
    Linux."""
    atime, mtime, ctime = _ns(st.st_atim), _ns(st.st_mtim), _ns(st.st_ctim)
    return os.stat_result(
        (st.st_mode, st.st_ino, st.st_dev, st.st_nlink, st.st_uid, st.st_gid, st.st_size,
         st.st_atim.tv_sec, st.st_mtim.tv_sec, st.st_ctim.tv_sec),
        {'st_atime': _seconds(st.st_atim), 'st_mtime': _seconds(st.st_mtim),
         'st_ctime': _seconds(st.st_ctim), 'st_atime_ns': atime, 'st_mtime_ns': mtime,
         'st_ctime_ns': ctime, 'st_blksize': st.st_blksize, 'st_blocks': st.st_blocks,
         'st_rdev': st.st_rdev})


cdef object _ns(timespec when):
    """Return the time in nanoseconds, as an int of any size."""
    return <object>when.tv_sec * 1000000000 + when.tv_nsec


cdef double _seconds(timespec when) noexcept:
    return <double>when.tv_sec + 1e-9 * when.tv_nsec
