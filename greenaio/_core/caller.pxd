from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    #include <sys/types.h>

    #ifndef GREENAIO_CALLER
    #define GREENAIO_CALLER
    /* The things that a call takes from the thread which asks for it, as they were at that time. */
    struct caller {
        /* The number of changes of the umask before the call, and the umask after them. */
        unsigned umask_changes;
        unsigned umask;
        uid_t fsuid;
        gid_t fsgid;
        /* fsuid and fsgid are known. They may differ from the ids of the process. */
        int has_ids;
        /* The caller is under a seccomp filter. */
        int is_filtered;
        /* The effective capabilities, as a set of bits. */
        uint64_t effective;
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
cdef void forget_creations() noexcept
cdef long creation_mode(long mode, bint may_create) noexcept nogil
cdef int take_signal(long result) noexcept nogil
