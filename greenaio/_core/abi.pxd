# The kernel's own words for native AIO, verbatim from <linux/aio_abi.h> and fs/aio.c: structures,
# opcodes, five system calls. Each call answers its result or minus errno; none of them raises, none
# touches Python.

from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/stat.h>
    #include <linux/aio_abi.h>
    #include <sys/eventfd.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>

    /* The completion ring of fs/aio.c. The kernel maps it into this process, and its address *is* the
       aio_context_t. */
    struct aio_ring {
        /* `nr` is the number of slots. The kernel rounds it up, so it is larger than the depth that was
           asked for. */
        unsigned id, nr;
        /* This side stores it, the kernel loads it. */
        unsigned head;
        /* The kernel stores it, this side loads it. */
        unsigned tail;
        /* These words tell the layout. A reader that finds others must not touch the events. */
        unsigned magic, compat_features, incompat_features, header_length;
        struct io_event io_events[];
    };
    #define AIO_RING_MAGIC 0xa10a10a1u

    /* The C library answers -1 and sets errno, which the next call may change. One word holds both from
       here on. */
    static inline long abi_result(long r) { return r < 0 ? -(long)errno : r; }

    /* The C library has no functions for these calls, so they are made by their numbers. */
    static inline long abi_io_setup(unsigned nr_events, aio_context_t *ctx)
    { return abi_result(syscall(SYS_io_setup, nr_events, ctx)); }

    /* Free a context. The call waits until the kernel has done all that is in flight. */
    static inline long abi_io_destroy(aio_context_t ctx)
    { return abi_result(syscall(SYS_io_destroy, ctx)); }

    /* Submit *n* iocbs. The result is the number of the first ones that the kernel took, which may be
       smaller than *n*. It is an error only if the first one was refused. */
    static inline long abi_io_submit(aio_context_t ctx, long n, struct iocb **iocbs)
    { return abi_result(syscall(SYS_io_submit, ctx, n, iocbs)); }

    /* Wait until *min_nr* events are there, for *timeout_ns* at most. Unlike a read of the ring it stores
       `head` itself. */
    static inline long abi_io_getevents(aio_context_t ctx, long min_nr, long nr,
                                        struct io_event *events, long timeout_ns)
    {
        struct timespec ts = { timeout_ns / 1000000000, timeout_ns % 1000000000 };
        return abi_result(syscall(SYS_io_getevents, ctx, min_nr, nr, events, &ts));
    }

    /* Neither a clear nor a signal may block the hub, so the eventfd is non-blocking. A program that is
       started must not inherit it. */
    static inline long abi_eventfd(void)
    { return abi_result(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)); }

    /* Make a pipe with both ends under one number, because a sandbox that has no eventfd has pipes. Like
       an eventfd the pipe can be signalled, cleared and watched, but the kernel does not signal it. */
    static inline long abi_pipe(void)
    {
        char path[32];
        int ends[2];
        long fd;
        if (pipe2(ends, O_NONBLOCK | O_CLOEXEC) < 0)
            return -(long)errno;
        /* Opening the FIFO by its number with O_RDWR gives one description for both directions. */
        snprintf(path, sizeof path, "/proc/self/fd/%d", ends[0]);
        fd = abi_result(open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC));
        /* The new description keeps the pipe alive, so both first numbers can go. */
        close(ends[0]);
        close(ends[1]);
        return fd;
    }

    /* Return the kernel's name of an eventfd or a pipe. Two numbers of one file have the same name, so
       this tells whether a number still is ours. Return 0 for an eventfd before Linux 5.2, -1 for any
       other file or none, and -2 where the name can't be asked for: without /proc, or without a free
       number. */
    static inline long abi_name(int fd)
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
    static inline int abi_is_eventfd(int fd)
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
    static inline void abi_signal(int fd, int same, long name)
    {
        uint64_t one = 1;
        if (write(fd, &one, sizeof one) < 0 && errno == EBADF && abi_name(same) == name)
            (void)!write(same, &one, sizeof one);
    }

    /* Make the eventfd unreadable. EAGAIN means that it is so already. */
    static inline void abi_clear(int fd, int same, long name)
    {
        /* An eventfd has one count. A pipe that stands for it has one for each signal. If more than 64 are
           left, the pipe stays readable, and one more pass follows. */
        uint64_t counts[64];
        if (read(fd, counts, sizeof counts) < 0 && errno == EBADF && abi_name(same) == name)
            (void)!read(same, counts, sizeof counts);
    }

    /* The other party of both functions is aio_complete() in the kernel, on any processor. It writes an
       event, then stores `tail`. It loads `head` to see what room there is.

       Acquire: no event is read before the tail that announces it. Release: `head` is stored after the
       events before it were copied. */
    static inline unsigned abi_load_tail(struct aio_ring *r)
    { return __atomic_load_n(&r->tail, __ATOMIC_ACQUIRE); }
    static inline void abi_store_head(struct aio_ring *r, unsigned head)
    { __atomic_store_n(&r->head, head, __ATOMIC_RELEASE); }

    /* A hint for a loop that waits for memory to change. It lets the other hyper-thread run and saves
       power. */
    #if defined(__x86_64__) || defined(__i386__)
    #define abi_relax() __builtin_ia32_pause()
    #elif defined(__aarch64__)
    #define abi_relax() __asm__ __volatile__("yield")
    #else
    #define abi_relax() __asm__ __volatile__("" ::: "memory")
    #endif
    """
    # The declarations below repeat the C ones for Cython, which trusts them. The C compiler takes layouts and
    # sizes from <linux/aio_abi.h>.
    ctypedef uint64_t aio_context_t

    struct iocb:
        uint64_t aio_data
        uint32_t aio_rw_flags
        unsigned short aio_lio_opcode
        short aio_reqprio
        uint32_t aio_fildes
        uint64_t aio_buf
        uint64_t aio_nbytes
        int64_t aio_offset
        uint32_t aio_flags
        uint32_t aio_resfd

    # `data` is the token of the request, `res` its result.
    struct io_event:
        uint64_t data
        uint64_t obj
        int64_t res
        int64_t res2

    struct aio_ring:
        unsigned int id
        unsigned int nr
        unsigned int head
        unsigned int tail
        unsigned int magic
        unsigned int compat_features
        unsigned int incompat_features
        unsigned int header_length
        io_event io_events[1]

    const unsigned int AIO_RING_MAGIC
    const int IOCB_FLAG_RESFD

    # All calls are `nogil`: none of them touches a Python object. Whether the GIL is released is the caller's
    # choice.
    long abi_io_setup(unsigned int nr_events, aio_context_t *ctx) nogil
    long abi_io_destroy(aio_context_t ctx) nogil
    long abi_io_submit(aio_context_t ctx, long n, iocb **iocbs) nogil
    long abi_io_getevents(aio_context_t ctx, long min_nr, long nr, io_event *events,
                          long timeout_ns) nogil
    long abi_eventfd() nogil
    long abi_pipe() nogil
    long abi_name(int fd) nogil
    bint abi_is_eventfd(int fd) nogil
    void abi_signal(int fd, int same, long name) nogil
    void abi_clear(int fd, int same, long name) nogil
    unsigned int abi_load_tail(aio_ring *ring) nogil
    void abi_store_head(aio_ring *ring, unsigned int head) nogil
    void abi_relax() nogil
