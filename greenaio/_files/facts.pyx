# cython: language_level=3
"""Facts of a file that the kernel has in memory, so that no question here waits for a disk or a server."""

import fcntl
import re
import struct

from libc.stdint cimport int64_t
from posix.stat cimport S_ISBLK

cdef extern from *:
    """
    #include <stdio.h>
    #include <unistd.h>

    /* Find the path by which *fd* was opened. Return its length; it is not terminated. Return -1 if it is not
       known. */
    static inline ssize_t path_of(int fd, char *path, size_t n)
    {
        char link[32];
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        return readlink(link, path, n);
    }
    """
    ssize_t path_of(int fd, char *path, size_t n)

BLKSSZGET = 0x1268

# Files on those file systems that programs read often and that answer at once; and files that stand for the
# calling thread, so that another thread would read or write the wrong one.
_AT_ONCE = re.compile(rb'.*/(?:proc/(?:cmdline|filesystems|loadavg|meminfo|uptime|version)'
                      rb'|[0-9]+/(?:limits|stat|statm|status|attr/[a-z/]+)|trace_marker(?:_raw)?)')

# On these file systems poll does not tell whether a read would wait. It tells of changes, as for
# /proc/mounts, and a change is told only once, so a poll here would take it from the program. Their files are
# not polled, except for /proc/kmsg.
_POLL_TELLS_OF_CHANGES = frozenset({'proc', 'sysfs', 'cgroup', 'cgroup2'})
_HAS_EVENTS = re.compile(rb'.*/proc/kmsg')


cdef int kind_of_answer(int fd, str file_system) except -1:
    """Return the bits of `Known.kind` for a file of a file system that `answers`: the path of *fd* tells
    them."""
    cdef char path[128]
    cdef ssize_t n = path_of(fd, path, sizeof(path))
    name = path[:max(n, 0)]
    cdef int kind = ANSWER
    if _AT_ONCE.fullmatch(name):
        kind |= AT_ONCE
    elif file_system not in _POLL_TELLS_OF_CHANGES or _HAS_EVENTS.fullmatch(name):
        kind |= EVENTS
    return kind


cdef unsigned int sector_size(int fd, unsigned int mode) except 0:
    """Return the alignment that O_DIRECT wants, in bytes, if statx does not tell it: before Linux 6.1, or in
    memory."""
    if S_ISBLK(mode):
        return struct.unpack('i', fcntl.ioctl(fd, BLKSSZGET, bytes(4)))[0]
    return 512


cdef int64_t file_size(int fd) noexcept:
    """Return the size in bytes; 0 for a file that has none or an fd that is not open."""
    cdef facts found
    return 0 if facts_of(fd, b'', &found) else found.size


cdef unsigned int block_size(int fd) noexcept:
    """Return the number of bytes that the file system likes to have read and written at a time; 0 if *fd* is
    not open."""
    cdef facts found
    return 0 if facts_of(fd, b'', &found) else found.block
