from greenaio._core.job cimport KINDS, job
from greenaio._core.mailbox cimport pthread_mutex_t
from greenaio._core.processor cimport place

# The number of calls of a kind that are taken for long after two of them in a row were, or after a worker could
# not be bound.
cdef enum:
    DOUBTED = 16

# It lies on the stack of its thread.
cdef struct worker:
    # The link in `resting`.
    worker *next
    # AT_WORK, CALLED or ASLEEP.
    int word
    place at

# The lock guards the changes of all fields. For `limit`, `wary` and `older` the GIL does.
cdef struct pool:
    pthread_mutex_t lock
    # A stack of the workers that rest. The last one to rest is on top.
    worker *resting
    job *first
    job *last
    int queued
    # Threads that have gone to rest and have not come back. Also one that is called, until it takes the lock.
    int idle
    int threads
    int limit
    # Threads that are bound to a processor: one for each hub at most.
    int bound
    # The number of idle threads that a pool keeps. One more ends. 0 after the pool is retired.
    int kept
    # For each kind, the number of calls that are still taken for long.
    int doubted[KINDS]
    # For each kind, whether the last call was long. One alone proves little, because another thread may have
    # had the processor.
    bint was_long[KINDS]
    # The number of calls that still take threads, because one that was made in the hub has waited.
    int wary
    # The link of all pools, for `any_busy`.
    pool *older

cdef void *work(void *arg) noexcept nogil
cdef void unlink(pool *home, job *one) noexcept nogil
cdef void call_to_work(worker *one) noexcept
cdef bint is_asleep(worker *one) noexcept
