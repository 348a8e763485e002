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

    /* fs/aio.c; the kernel maps it into us, and the address of it *is* the aio_context_t. */
    struct aio_ring {
        unsigned id, nr;
        unsigned head;                 /* ours to store, the kernel loads it */
        unsigned tail;                 /* the kernel's to store, ours to load */
        unsigned magic, compat_features, incompat_features, header_length;
        struct io_event io_events[];
    };
    #define AIO_RING_MAGIC 0xa10a10a1u

    static inline long abi_result(long r) { return r < 0 ? -(long)errno : r; }

    static inline long abi_io_setup(unsigned nr_events, aio_context_t *ctx)
    { return abi_result(syscall(SYS_io_setup, nr_events, ctx)); }

    static inline long abi_io_destroy(aio_context_t ctx)
    { return abi_result(syscall(SYS_io_destroy, ctx)); }

    static inline long abi_io_submit(aio_context_t ctx, long n, struct iocb **iocbs)
    { return abi_result(syscall(SYS_io_submit, ctx, n, iocbs)); }

    static inline long abi_io_getevents(aio_context_t ctx, long min_nr, long nr,
                                        struct io_event *events, long timeout_ns)
    {
        struct timespec ts = { timeout_ns / 1000000000, timeout_ns % 1000000000 };
        return abi_result(syscall(SYS_io_getevents, ctx, min_nr, nr, events, &ts));
    }

    static inline long abi_eventfd(void)
    { return abi_result(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)); }

    /* A pipe, both ends of it under one number: a sandbox that has no eventfd has it. As an eventfd it can be
       signalled, cleared and watched, but the kernel does not signal it. */
    static inline long abi_pipe(void)
    {
        char path[32];
        int ends[2];
        long fd;
        if (pipe2(ends, O_NONBLOCK | O_CLOEXEC) < 0)
            return -(long)errno;
        snprintf(path, sizeof path, "/proc/self/fd/%d", ends[0]);
        fd = abi_result(open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC));
        close(ends[0]);
        close(ends[1]);
        return fd;
    }

    /* What the kernel calls an eventfd or a pipe: two numbers of one have the same name. 0 for an eventfd before
       Linux 5.2, -1 for all else, -2 without /proc. */
    static inline long abi_name(int fd)
    {
        char text[512], *found;
        struct stat facts;
        ssize_t n;
        if (fstat(fd, &facts) < 0)
            return -1;
        if (S_ISFIFO(facts.st_mode))
            return 1L << 40 | (long)facts.st_ino;
        snprintf(text, sizeof text, "/proc/self/fdinfo/%d", fd);
        int info = open(text, O_RDONLY | O_CLOEXEC);
        if (info < 0)
            return -2;
        n = read(info, text, sizeof text - 1);
        close(info);
        text[n > 0 ? n : 0] = 0;
        found = strstr(text, "eventfd-id:");
        return found ? strtol(found + 11, NULL, 10) : strstr(text, "eventfd-count:") ? 0 : -1;
    }

    /* The same where no number is free to ask with: this tells less. */
    static inline int abi_is_eventfd(int fd)
    {
        char path[32], name[32];
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        return readlink(path, name, sizeof name) == 20 && memcmp(name, "anon_inode:[eventfd]", 20) == 0;
    }

    /* An eventfd under two numbers: the first, unless a program closed that. It may have closed the second as
       well, and have a file of its own there. EAGAIN: it is readable, and how; nothing was signalled. */
    static inline void abi_signal(int fd, int same, long name)
    {
        uint64_t one = 1;
        if (write(fd, &one, sizeof one) < 0 && errno == EBADF && abi_name(same) == name)
            (void)!write(same, &one, sizeof one);
    }

    static inline void abi_clear(int fd, int same, long name)
    {
        uint64_t counts[64];           /* a pipe in the place of an eventfd has one for each signal */
        if (read(fd, counts, sizeof counts) < 0 && errno == EBADF && abi_name(same) == name)
            (void)!read(same, counts, sizeof counts);
    }

    /* The other side of both is aio_complete() in the kernel, on any processor: it writes an event,
       then the tail; it loads head to see what room there is. */
    static inline unsigned abi_load_tail(struct aio_ring *r)
    { return __atomic_load_n(&r->tail, __ATOMIC_ACQUIRE); }
    static inline void abi_store_head(struct aio_ring *r, unsigned head)
    { __atomic_store_n(&r->head, head, __ATOMIC_RELEASE); }

    #if defined(__x86_64__) || defined(__i386__)
    #define abi_relax() __builtin_ia32_pause()
    #elif defined(__aarch64__)
    #define abi_relax() __asm__ __volatile__("yield")
    #else
    #define abi_relax() __asm__ __volatile__("" ::: "memory")
    #endif
    """
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
