cdef extern from *:
    """
    #include <sched.h>
    #include <sys/types.h>

    #ifndef GREENAIO_PLACE
    #define GREENAIO_PLACE
    /* The processors of one worker. The worker uses it while it works. While it rests, the holder of the
       pool's lock does. */
    struct place {
        pid_t thread;
        /* The processor to which the worker is bound, or -1. */
        int cpu;
        /* The user had restricted the worker, before it was bound, to these processors. */
        int is_restricted;
        cpu_set_t cpus;
    };
    #endif
    """
    struct place:
        int thread
        int cpu

cdef int bind_worker(place *at, int cpu) noexcept nogil
cdef void release_worker(place *at) noexcept nogil
cdef bint filters_allow() noexcept nogil
cdef bint is_ordinary() noexcept nogil
