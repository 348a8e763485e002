# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""An eventfd wakes the loop of a hub. It has two numbers, so that a program can't close it by mistake.

The kernel signals it for each completion, native threads signal it for each job, and the hub signals it to
itself to have a pass run. The loop watches one of its numbers.
"""

import os

from libc.errno cimport EMFILE, ENFILE, ENOMEM
from posix.unistd cimport close

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/eventfd.h>
    #include <sys/stat.h>
    #include <unistd.h>

    /* Neither a clear nor a signal may block the hub, so the eventfd is non-blocking. A program that is
       started must not inherit it. */
    static inline long make_eventfd(void)
    {
        int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        return fd < 0 ? -(long)errno : fd;
    }

    /* Make a pipe with both ends under one number, because a sandbox that has no eventfd has pipes. Like
       an eventfd the pipe can be signalled, cleared and watched, but the kernel does not signal it. */
    static inline long make_pipe(void)
    {
        char path[32];
        int ends[2];
        long fd;
        if (pipe2(ends, O_NONBLOCK | O_CLOEXEC) < 0)
            return -(long)errno;
        /* Opening the FIFO by its number with O_RDWR gives one description for both directions. */
        snprintf(path, sizeof path, "/proc/self/fd/%d", ends[0]);
        fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
        if (fd < 0)
            fd = -(long)errno;
        /* The new description keeps the pipe alive, so both first numbers can go. */
        close(ends[0]);
        close(ends[1]);
        return fd;
    }

    /* Return the kernel's name of an eventfd or a pipe. Two numbers of one file have the same name, so
       this tells whether a number still is ours. Return 0 for an eventfd before Linux 5.2, -1 for any
       other file or none, and -2 where the name can't be asked for: without /proc, or without a free
       number. */
    static inline long name_of(int fd)
    {
        char text[512], *found;
        struct stat facts;
        ssize_t n;
        if (fstat(fd, &facts) < 0)
            return -1;
        if (S_ISFIFO(facts.st_mode))
            /* The high bit keeps the inode numbers of pipes apart from the ids of eventfds. */
            return 1L << 40 | (long)facts.st_ino;
        snprintf(text, sizeof text, "/proc/self/fdinfo/%d", fd);
        /* Reading fdinfo asks no disk. It needs a free number for the moment. */
        int info = open(text, O_RDONLY | O_CLOEXEC);
        if (info < 0)
            return -2;
        n = read(info, text, sizeof text - 1);
        close(info);
        text[n > 0 ? n : 0] = 0;
        /* Linux 5.2 and later write the id. Before that only the count shows that the file is an eventfd. */
        found = strstr(text, "eventfd-id:");
        return found ? strtol(found + 11, NULL, 10) : strstr(text, "eventfd-count:") ? 0 : -1;
    }

    /* Return whether *fd* is an eventfd, where no number is free to open fdinfo. This does not tell which
       eventfd. */
    static inline int is_eventfd(int fd)
    {
        char path[32], name[32];
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        return readlink(path, name, sizeof name) == 20 && memcmp(name, "anon_inode:[eventfd]", 20) == 0;
    }

    /* Signal an eventfd that has two numbers. The first is used, unless the program closed it. The program
       may have closed the second as well, and have a file of its own there. So the name is asked for
       before the second is written to.

       EAGAIN means that the count is at its limit or the pipe is full. Then the eventfd is readable, which
       is all that a signal is for, so the error is ignored. */
    static inline void signal_one(int fd, int same, long name)
    {
        uint64_t one = 1;
        if (write(fd, &one, sizeof one) < 0 && errno == EBADF && name_of(same) == name)
            (void)!write(same, &one, sizeof one);
    }

    /* Make the eventfd unreadable. EAGAIN means that it is so already. */
    static inline void clear_one(int fd, int same, long name)
    {
        /* An eventfd has one count. A pipe that stands for it has one for each signal. If more than 64 are
           left, the pipe stays readable, and one more pass follows. */
        uint64_t counts[64];
        if (read(fd, counts, sizeof counts) < 0 && errno == EBADF && name_of(same) == name)
            (void)!read(same, counts, sizeof counts);
    }
    """
    long make_eventfd() nogil
    long make_pipe() nogil
    long name_of(int fd) nogil
    bint is_eventfd(int fd) nogil
    void signal_one(int fd, int same, long name) nogil
    void clear_one(int fd, int same, long name) nogil
    int dup3(int old, int new, int flags) nogil
    int fcntl(int fd, int command, ...) nogil
    const int F_DUPFD_CLOEXEC
    const int F_GETFD
    const int O_CLOEXEC


cdef os_error(long code, what):
    """Return the OSError of *code*, which is minus an errno."""
    return OSError(-code, f'{what}: {os.strerror(-code)}')


cdef void signal_eventfd(int fd, int same, long name) noexcept nogil:
    """Make the eventfd *name*, which has the numbers *fd* and *same*, readable. Call it from any thread."""
    signal_one(fd, same, name)


# The order of the eventfd. Both sides have two steps, and take them in opposite orders:
#
#     the kernel, a worker            the hub
#     publishes a completion          clears the eventfd
#     signals the eventfd             looks at the completions
#
# A completion that is published after the look is signalled after the clear, so the loop comes again. A
# completion that is published between the clear and the look is found at once, and its signal at most causes
# an empty pass. In the other order, the look before the clear, a completion between the two would be there
# without a signal, and its greenlet would sleep until some other request ends.
cdef class Eventfd:
    """An eventfd under two numbers, or a pipe that stands for it. Raises OSError without either."""

    def __cinit__(self):
        self.eventfd = self.own_eventfd = -1

    def __init__(self):
        fd = self._make()
        if fd < 0:
            raise os_error(fd, 'eventfd')
        self.eventfd = fd
        # The program may close a number by mistake, such as one that it closes twice. Then the other number
        # is left, because epoll reports an eventfd as long as any number refers to it.
        self.own_eventfd = fcntl(fd, F_DUPFD_CLOEXEC, OWN_MIN)
        # The limit of open files may lie below OWN_MIN. One number must do then.
        if self.own_eventfd < 0:
            self.own_eventfd = fd
        # All numbers of the eventfd have this name. It tells later whether a number still belongs to the
        # eventfd.
        self.name = name_of(fd)

    def __dealloc__(self):
        self._close_numbers()

    cdef long _make(self) noexcept:
        """Return a new eventfd, or minus the errno.

        Where a sandbox denies the eventfd, a pipe stands for it. Threads can signal the pipe, but the kernel
        can't, so there is no native AIO then, and `denied` says why.
        """
        cdef long fd = make_eventfd(), pipe
        self.denied = 0
        # A lack of numbers or of memory is no denial. It is reported as it is, and may end.
        if fd >= 0 or fd == -EMFILE or fd == -ENFILE or fd == -ENOMEM:
            return fd
        pipe = make_pipe()
        # The first error tells the reader more than the error of the substitute.
        if pipe < 0:
            return fd
        self.denied = fd
        return pipe

    cpdef int signal(self) except -1:
        """Make the eventfd readable."""
        signal_one(self.own_eventfd, self.eventfd, self.name)
        return 0

    cpdef int clear(self) except -1:
        """Make the eventfd unreadable.

        Call this *before* `peek`. The kernel publishes the tail first and signals then, so a completion that
        is signalled after the clear is found by the next pass.
        """
        clear_one(self.own_eventfd, self.eventfd, self.name)
        return 0

    cdef void renew(self) noexcept:
        """Put a fresh eventfd under the same numbers, in a forked child.

        The numbers are not closed: the eventfd is shared with the parent, and a watcher of the inherited loop
        sits on one of them. A daemon may have closed a number and given it to a file of its own. Such a
        number is left alone, and `eventfd` is another number then.
        """
        cdef int fresh
        cdef bint keeps, keeps_own
        # It was closed before the fork, so no code here waits for it.
        if self.eventfd < 0:
            return
        # Look before the fresh eventfd is made, because it may get one of these numbers.
        keeps, keeps_own = self._may_take(self.eventfd), self._may_take(self.own_eventfd)
        fresh = <int>self._make()
        # No number is free, not even to ask for a name. So the inherited number has to go, and asking becomes
        # possible. A child that kept it would take wake-ups from its parent.
        if fresh == -EMFILE and is_eventfd(self.own_eventfd):
            close(self.own_eventfd)
            keeps, keeps_own = self._may_take(self.eventfd), False
            fresh = <int>self._make()
        # There is none to be had, so the numbers stay as they are.
        if fresh < 0:
            return
        self.name = name_of(fresh)
        # A number has to be free to ask for the name. The watched number is about to be replaced anyway, so
        # it can be freed for that moment.
        if self.name == -2 and keeps and fresh != self.eventfd:
            close(self.eventfd)
            self.name = name_of(fresh)
        self.eventfd = self._renewed(self.eventfd, fresh) if keeps else fresh
        self.own_eventfd = self._renewed(self.own_eventfd, fresh) if keeps_own else fresh
        # Two numbers of the fresh eventfd are enough. The third would leak with every fork.
        if fresh != self.eventfd and fresh != self.own_eventfd:
            close(fresh)

    cdef bint _may_take(self, int number) noexcept:
        """Return whether *number* belongs to our eventfd or to no file."""
        return fcntl(number, F_GETFD) < 0 or name_of(number) == self.name

    cdef int _renewed(self, int number, int fresh) noexcept:
        """Put the eventfd *fresh* under *number* as well. Return that number."""
        # dup3 replaces the file of the number in one step, so a watcher on the number never sees it closed.
        # If both numbers are the same, dup3 does nothing.
        dup3(fresh, number, O_CLOEXEC)
        return number

    def close_eventfd(self):
        """Close the eventfd. Stop its watcher first. The kernel holds the eventfd as long as a request in
        flight signals it."""
        self._close_numbers()

    cdef void _close_numbers(self) noexcept:
        cdef int own = self.own_eventfd if self.own_eventfd != self.eventfd else -1
        # The program may have closed a number and opened a file under it. A number that has another name is
        # not ours to close.
        if own >= 0 and name_of(own) == self.name:
            close(own)
        if self.eventfd >= 0 and name_of(self.eventfd) == self.name:
            close(self.eventfd)
        self.eventfd = self.own_eventfd = -1
