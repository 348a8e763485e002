# cython: language_level=3
"""Paths: as bytes, the place where a thread begins to look one up, and look-ups in the kernel's cache of names.

Look-ups in the cache wait for nothing, and so do opens of the files that they find.
"""

import os
# `posix` has the plain calls, also while the functions of `os` are patched.
import posix
import sys

cimport cython
from libc.errno cimport EACCES, EAGAIN, EINVAL, ELOOP, ENAMETOOLONG, ENOENT, ENOSYS, ENOTDIR, EPERM, errno as c_errno
from libc.stdint cimport uint64_t
from libc.stdio cimport snprintf
from posix.stat cimport S_ISREG
from posix.unistd cimport close as close_fd

from greenaio._core.fifo cimport close_path_fd
from greenaio._core.handle cimport Handle, check_open, take
from greenaio._core.mailbox cimport WAITED_NS
from greenaio._core.threads cimport any_busy
from greenaio._files.arguments cimport failed
from greenaio._files.device cimport Device, coarse_ns, device_of, waited_in_hub
from greenaio._files.facts cimport facts, facts_of
from greenaio._files.route cimport Known, learn

cdef extern from "<fcntl.h>":
    const int O_CLOEXEC
    const int O_NOFOLLOW
    const int O_NOATIME
    const int O_LARGEFILE
    const int O_DIRECT
    const int O_PATH
    const int O_NONBLOCK
    const int AT_FDCWD
    const int F_SETFL
    int openat(int dir_fd, const char *path, int flags, ...) nogil
    int c_fcntl "fcntl"(int fd, int command, ...) nogil

cdef extern from "<unistd.h>":
    long syscall(long number, ...) nogil

cdef extern from "<sys/syscall.h>":
    const long SYS_gettid

cdef enum:
    SYS_OPENAT2 = 437
    RESOLVE_CACHED = 0x20

cdef struct open_how:
    uint64_t flags
    uint64_t mode
    uint64_t resolve

# False once openat2 was denied, or did not know RESOLVE_CACHED (before Linux 5.12).
cdef bint _has_cached_path = True


cdef int cached_path(int dir_fd, const char *path, int flags) noexcept nogil:
    """Look the path up in the kernel's cache, without a wait. Return an O_PATH fd of the file; or minus the
    errno, which is EAGAIN if a name is not cached."""
    global _has_cached_path
    cdef open_how how
    cdef long fd
    if not _has_cached_path:
        return -EAGAIN
    how.flags, how.mode, how.resolve = O_PATH | O_CLOEXEC | flags, 0, RESOLVE_CACHED
    fd = syscall(SYS_OPENAT2, dir_fd, path, &how, sizeof(how))
    if fd >= 0:
        return <int>fd
    # An open with O_PATH alone never fails with these, so the kernel or a sandbox refuses openat2.
    if c_errno == EPERM or c_errno == ENOSYS or c_errno == EINVAL:
        _has_cached_path = False
        return -EAGAIN
    return -c_errno


cdef int path_fd(int dir_fd, const char *path, int flags) noexcept nogil:
    """Look the path up, and wait for it if need be. Return an O_PATH fd, or minus the errno."""
    cdef int fd = openat(dir_fd, path, O_PATH | O_CLOEXEC | flags)
    return fd if fd >= 0 else -c_errno


cdef int open_leased(int dir_fd, const char *path, int flags, int mode) noexcept nogil:
    """Open a regular file. Fail with EAGAIN instead of a wait for a process that has a lease on it: the
    kernel asks that process to give the lease up, and O_NONBLOCK keeps the open from waiting. The caller
    did not ask for O_NONBLOCK, so the fd gets its own flags afterwards."""
    cdef int fd = openat(dir_fd, path, flags | O_CLOEXEC | O_NONBLOCK, mode)
    if fd < 0:
        return -c_errno
    if not flags & O_NONBLOCK:
        c_fcntl(fd, F_SETFL, flags & ~O_NONBLOCK)
    return fd


cdef int open_fd_again(int fd, int flags) noexcept:
    """Open the file that the O_PATH *fd* stands for, without a wait, even if its path leads to another file
    by now. Return the new fd, or minus the errno."""
    cdef char link[32]
    snprintf(link, sizeof(link), b'/proc/self/fd/%d', fd)
    return open_leased(AT_FDCWD, link, flags, 0)


cdef bint is_certain(int error) noexcept:
    """Return whether *error*, minus an errno, is a fact of the path, so that another attempt would fail in
    the same way."""
    return error in (-ENOENT, -ENOTDIR, -EACCES, -ELOOP, -ENAMETOOLONG)


cdef int folder_at_hand() noexcept:
    """Return an O_PATH fd of the working directory; or minus the errno, which is EAGAIN if a server would
    have to be asked whether the directory may be searched."""
    return cached_path(AT_FDCWD, b'.', 0) if _has_cached_path else path_fd(AT_FDCWD, b'.', 0)


cdef int path_at_hand(bytes path, int dir_fd, int flags, object name) except -2:
    """Return an O_PATH fd of the file that *path* leads to, if no disk and no server was asked for it, and
    neither will be for a stat or an open. Return -1 otherwise. *flags* is O_NOFOLLOW or 0. Raise OSError if
    the kernel's cache already tells that the path leads nowhere."""
    cdef facts found
    return _path_at_hand(path, dir_fd, flags, name, &found)


cdef int _path_at_hand(bytes path, int dir_fd, int flags, object name, facts *found) except -2:
    """Do the work of `path_at_hand`, and write the facts of the file into *found*."""
    cdef Device device
    cdef int fd = cached_path(dir_fd, path, flags)
    if fd < 0:
        if is_certain(fd):
            raise failed(fd, name)
        return -1
    cdef bint is_good = False
    try:
        if facts_of(fd, b'', found) == 0:
            device = device_of(found.device, found.mount)
            # A file of an overlay belongs to one of the file systems below it, which may have a server.
            is_good = device.is_local and device.file_system != 'overlay'
    finally:
        if not is_good:
            close_fd(fd)
    return fd if is_good else -1


cdef int open_at_hand(bytes path, int dir_fd, int flags, object name, Known known=None) except -2:
    """Open a regular file for reading inline, if the open waits for no disk. Return its fd, or -1. If *known*
    is given, a new object, it gets the facts that were found on the way. Raise OSError if the open was
    refused."""
    cdef facts found
    cdef int opened = -EAGAIN
    cdef int fd
    cdef uint64_t began
    if flags & ~(O_CLOEXEC | O_NOFOLLOW | O_DIRECT | O_NOATIME | O_LARGEFILE):
        return -1
    fd = _path_at_hand(path, dir_fd, flags & O_NOFOLLOW, name, &found)
    if fd < 0:
        return -1
    try:
        if S_ISREG(found.mode) and not (
                any_busy() and device_of(found.device, found.mount).pool().is_wary()):
            if known is not None:
                learn(known, fd, &found, flags)
            began = coarse_ns()
            opened = open_fd_again(fd, flags & ~O_NOFOLLOW)
            if coarse_ns() - began > WAITED_NS:
                waited_in_hub(fd, began)
    finally:
        close_fd(fd)
    if opened == -EACCES or opened == -EPERM:
        # The open was refused. A thread does not repeat it, because it may have been born with other rights.
        raise failed(opened, name)
    return max(-1, opened)


cdef bytes path_bytes(path, str name=None):
    """Return *path* as bytes. Raise ValueError if it has a null byte; from Python 3.13 on the message has
    *name*, the function of `os`. *name* is None for `io`."""
    cdef bytes encoded
    found = os.fsencode(path)
    # An object of a subclass of bytes is copied, because it may have other methods.
    encoded = found if type(found) is bytes else bytes(memoryview(found))
    if b'\0' in encoded:
        raise ValueError('embedded null byte' if name is None or sys.version_info < (3, 13)
                         else f'{name}: embedded null character in path')
    return encoded


@cython.final
@cython.no_gc_clear
cdef class Place:
    """The place where a thread begins to look up *path*, perhaps after the working directory has changed.

    A relative path begins in the directory that is the working directory now. `dir_fd` is an O_PATH fd of
    that directory, which stays open as long as this object lives. If the caller gave the fd of another
    directory, this object keeps its number taken. The request keeps the object, so both hold if the greenlet
    is killed.

    If no fd is free, or to open the directory would wait for a server, the path is made absolute instead.
    That makes a difference only if the directory is renamed before the look-up.
    """

    def __cinit__(self, bytes path, int dir_fd):
        # This path means the thread that asks, so name that thread: another one makes the call.
        if path.startswith(b'/proc/thread-self/'):
            path = b'/proc/self/task/%d/%s' % (syscall(SYS_gettid), path[len(b'/proc/thread-self/'):])
        self.path, self.dir_fd = path, dir_fd
        if path.startswith(b'/'):
            return
        if dir_fd >= 0:
            check_folder(path, dir_fd)
            self._number = take(dir_fd)
        if dir_fd != AT_FDCWD:
            return
        cdef int fd = folder_at_hand()
        if fd >= 0:
            self.dir_fd, self._is_ours = fd, True
        elif path:
            try:
                self.path = os.path.join(posix.getcwdb(), path)
            except OSError:
                # No path leads to the directory, so the look-up will fail with the true error.
                pass

    def __dealloc__(self):
        if self._is_ours:
            close_path_fd(self.dir_fd)
        if self._number is not None:
            self._number.let_go()


def working_directory():
    """Return a new O_PATH fd of the working directory. Audit hooks don't see it, because the program opens
    nothing. Raise OSError if a server would have to be asked whether the directory may be searched."""
    cdef int fd = folder_at_hand()
    if fd < 0:
        raise failed(fd, None)
    return fd


cdef int check_folder(bytes path, int dir_fd) except -1:
    """Raise EBADF if *path* begins in a directory whose number is being closed."""
    if dir_fd >= 0 and not path.startswith(b'/'):
        check_open(dir_fd)
    return 0
