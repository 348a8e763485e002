from greenaio._core.engine cimport Engine
from greenaio._core.request cimport Request
from greenaio._core.job cimport job

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_cond_init(pthread_cond_t *cond, void *attributes)
    int pthread_cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex)
    int pthread_cond_signal(pthread_cond_t *cond)

cdef enum:
    # In ns. A call that takes this long has waited for a disk or another party.
    WAITED_NS = 20000000
    # The number of calls that take threads after one in the hub has waited.
    WARY = 16

# Shared by one hub and the workers that have a job of it. The comments say which side uses a field, and how.
cdef struct mailbox:
    pthread_mutex_t lock
    # Signalled when no worker has a job for this mailbox any more.
    pthread_cond_t empty
    # A stack of the jobs for the hub, the last one on top. Workers push, the hub takes all. Only atomic
    # operations.
    void *done
    # The number of jobs that are in a queue or with a worker. Each change is atomic. A worker makes its
    # change with the lock.
    int out
    # The number of those jobs that are likely to be short. Only the hub uses it.
    int short_out
    # The hub is about to look at `done`, so a worker need not wake it.
    int looks
    # The hub's eventfd, which a job wakes, or -1 after the hub is gone. The lock guards its two numbers and
    # its name.
    int eventfd
    int same_eventfd
    long name                   # of the eventfd
    # The Inbox is gone, so the last job frees this memory. Guarded by the lock.
    bint orphan

cdef class Inbox:
    cdef mailbox *_box

    cdef int reap(self, Engine engine) except -1
    cdef int look(self, Engine engine) except -1
    cdef wait(self)

cdef int inboxes() noexcept
cdef void post(job *one) noexcept nogil
cdef void give_out(job *one, mailbox *box) noexcept
cdef void take_back(job *one) noexcept
