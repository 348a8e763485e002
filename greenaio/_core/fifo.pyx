# cython: language_level=3
"""A thread that waits in open(2) for the other end of a FIFO is released by opening both ends here.

Nothing else ends such a wait: a signal would have to hit the one thread, and greenaio sends none. The kernel
wakes every open that waits for a peer when a peer comes, and also an open that is about to begin finds it.
"""

from posix.unistd cimport close

cdef extern from *:
    """
    #include <fcntl.h>
    #include <stdio.h>
    #include <unistd.h>

    /* Open both ends of the FIFO that an O_PATH fd is of. Return an fd, or -1. The link in /proc leads to the
       file itself, even if its path leads to another file by now. With O_RDWR, Linux opens both ends in one
       call and waits for no peer. It needs the permission to read and to write. */
    static int open_both_ends(int fd)
    {
        char link[32];
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        return open(link, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    }

    /* Close *fd*, if it is still the O_PATH fd that we have opened. In a forked child another file may have
       its number: a daemon closes all numbers, and opens files of its own on them. The child then releases
       the requests of its parent, and with them this number.

       A result of -1 has all bits, so the number is also closed if the kernel does not tell. That is right
       for a sandbox that denies the question, and does no harm to a number that is closed already. */
    static inline void close_path_fd(int fd)
    {
        if (fcntl(fd, F_GETFL) & O_PATH)
            close(fd);
    }
    """
    void c_close_path_fd "close_path_fd"(int fd) noexcept nogil
    int open_both_ends(int fd)

# The number of FIFOs that `join` has opened, and the number of them that are
# open now. An open of a FIFO compares them before and after, to find out
# whether its peer was only one of ours. All code that changes them has the GIL.
cdef int _meetings = 0
cdef int _under_way = 0


cdef void close_path_fd(int fd) noexcept nogil:
    """Close an O_PATH fd of ours, but not a file of the program that has its number by now."""
    c_close_path_fd(fd)


#     ==========================  ===================================================================
#     party                       what it sees
#     ==========================  ===================================================================
#     the waiting thread          its open returns an fd, which `Request.release` closes
#     other opens of this FIFO    may return as well: their greenlets compare `meetings` and open again
#     other processes             a peer that comes and goes
#     ==========================  ===================================================================
#
# Both ends stay open until the thread's open has returned. If they were closed before, a writer would get
# SIGPIPE. Where this process may not open both ends, the thread waits until a real peer comes.
cdef int join(int fifo) noexcept:
    """Open both ends of the FIFO that the O_PATH fd *fifo* is of. Return an fd for `leave`, or -1.

    This fails if this process may not both read and write the FIFO, or has no fd left."""
    global _meetings, _under_way
    cdef int both = open_both_ends(fifo)
    # `leave` counts `_under_way` down, and only a request that has an fd from here calls it.
    if both >= 0:
        _meetings += 1
        _under_way += 1
    return both


cdef void leave(int both) noexcept:
    """Close *both*, an fd that `join` returned. No thread of this process waits for it any more."""
    global _under_way
    close(both)
    # Count after the close: as long as `meetings_under_way`
    # counts it, an open may still find our ends as its peer.
    _under_way -= 1


cdef int meetings() noexcept:
    """Return how often `join` has opened a FIFO."""
    return _meetings


cdef int meetings_under_way() noexcept:
    """Return how many of those FIFOs are still open."""
    return _under_way
