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
    WAITED_NS = 20000000        # a call that takes as long has waited for something
    WARY = 16                   # calls by threads that have to be quick

cdef struct mailbox:
    pthread_mutex_t lock
    pthread_cond_t empty        # no worker has a job for it any more
    void *done                  # jobs for the hub to take, the last first
    int out                     # jobs that are in a queue or with a worker
    int short_out               # of those, the ones likely to be short; the hub's alone
    int looks                   # the hub is about to look at `done`, so need not be woken
    int eventfd                 # the hub's, which a job wakes; -1 when the hub is gone
    int same_eventfd
    long name                   # of the eventfd
    bint orphan                 # the Inbox is gone: the last job frees this

cdef class Inbox:
    cdef mailbox *_box

    cdef int reap(self, Engine engine) except -1
    cdef int look(self, Engine engine) except -1
    cdef wait(self)

cdef int inboxes() noexcept
cdef void post(job *one) noexcept nogil
cdef void give_out(job *one, mailbox *box) noexcept
cdef void take_back(job *one) noexcept
