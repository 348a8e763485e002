from greenaio._core.job cimport KINDS, job
from greenaio._core.mailbox cimport pthread_mutex_t
from greenaio._core.processor cimport place

cdef struct worker:             # on the stack of its thread
    worker *next                # in `resting`
    int word                    # AT_WORK, CALLED or ASLEEP
    place at

cdef struct pool:
    pthread_mutex_t lock
    worker *resting             # the last to rest first
    job *first
    job *last
    int queued
    int idle                    # threads that wait for a job
    int threads
    int limit
    int bound                   # threads that are bound: one for each hub at most
    int kept                    # idle threads: one more ends; 0 once it is retired
    int doubted[KINDS]          # so many calls more of this kind are taken for long
    bint was_long[KINDS]        # the last of this kind was: another thread may have had the processor
    int wary                    # so many calls more take threads, for one made in the hub has waited
    pool *older                 # all pools, for any_busy

cdef int start_worker(void *(*run)(void *) noexcept nogil, void *arg) noexcept
cdef void *work(void *arg) noexcept nogil
cdef void unlink(pool *home, job *one) noexcept nogil
cdef void call_to_work(worker *one) noexcept
cdef bint is_asleep(worker *one) noexcept
