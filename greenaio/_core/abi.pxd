# The kernel's own words for native AIO, verbatim from <linux/aio_abi.h> and fs/aio.c: structures,
# opcodes, five system calls. Each call answers its result or minus errno; none of them raises, none
# touches Python.

from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <errno.h>
    #include <stdint.h>
    #include <linux/aio_abi.h>
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
    unsigned int abi_load_tail(aio_ring *ring) nogil
    void abi_store_head(aio_ring *ring, unsigned int head) nogil
    void abi_relax() nogil
