from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    #include <sys/types.h>

    #ifndef GREENAIO_CALLER
    #define GREENAIO_CALLER
    struct caller {
        unsigned umask_changes;
        unsigned umask;
        uid_t fsuid;
        gid_t fsgid;
        int has_ids;                    /* fsuid and fsgid are known, and perhaps differ from the ids of the process */
        int is_filtered;
        uint64_t effective;             /* capabilities */
    };
    #endif
    """
    struct caller:
        bint is_filtered

cdef bint is_filtered() noexcept nogil
cdef void note_caller(caller *one) noexcept
cdef int begin_for(caller *one) noexcept nogil
cdef void act_for(caller *one) noexcept nogil
cdef void forget_first_permitted() noexcept
cdef long creation_mode(long mode) noexcept nogil
cdef int take_signal(long result) noexcept nogil
