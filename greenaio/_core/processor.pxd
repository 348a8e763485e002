cdef extern from *:
    """
    #include <sched.h>
    #include <sys/types.h>

    #ifndef GREENAIO_PLACE
    #define GREENAIO_PLACE
    struct place {
        pid_t thread;
        int cpu;                        /* to which it is bound, or -1 */
        int is_restricted;              /* by the user, before it was bound, to ... */
        cpu_set_t cpus;                 /* ... these */
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
