# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A worker: the native thread that makes the calls of a pool, one after another.

    The worker                                       The hub
    goes to rest: into `pool.resting`, `word` AT_WORK
    pushes the job that it has done
    wakes the hub, if the hub does not look
                                                     takes the job
                                                     queues the next, takes the worker out of `resting`
                                                     CALLED
    sees CALLED: it need not sleep, and goes on

So one worker answers a greenlet that makes one short call after another. The worker rests before it pushes.
In the other order the hub would find no worker at rest when it queues the next call, and might start another
thread.

A worker is never killed. A process that ends takes it along in the middle of a call. In a forked child it
does not exist.
"""

from libc.stdint cimport uint64_t

from greenaio._core.context cimport monotonic_ns
from greenaio._core.job cimport LONG, job, make_for_caller
from greenaio._core.mailbox cimport post, pthread_mutex_lock, pthread_mutex_unlock
from greenaio._core.processor cimport filters_allow, release_worker

cdef extern from *:
    """
    #include <linux/futex.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* The states of `word`. See the docstring of this module. */
    enum { AT_WORK, CALLED, ASLEEP };

    /* Return when the hub has called this worker. */
    static void rest(int *word)
    {
        int expected = AT_WORK;
        /* A call that came before this step is found here, without a system call. */
        if (__atomic_compare_exchange_n(word, &expected, ASLEEP, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
            /* A futex wait may end early, by a wake-up for an earlier user of this address. The word alone
               decides. */
            while (__atomic_load_n(word, __ATOMIC_ACQUIRE) == ASLEEP)
                syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, ASLEEP, NULL, NULL, 0);
    }

    /* Call a worker, and wake it if it sleeps. Release: the worker sees all that this thread has written
       before. */
    static void call_to_work(int *word)
    {
        if (__atomic_exchange_n(word, CALLED, __ATOMIC_ACQ_REL) == ASLEEP)
            syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    }

    /* A hint, so no order is needed: the worker may fall asleep right after this look. */
    static int is_asleep(int *word)
    { return __atomic_load_n(word, __ATOMIC_RELAXED) == ASLEEP; }
    """
    int AT_WORK
    void rest(int *word) noexcept nogil
    void c_call_to_work "call_to_work"(int *word) noexcept nogil
    bint c_is_asleep "is_asleep"(int *word) noexcept nogil
    long syscall(long number, ...) nogil
    const long SYS_gettid

# In ns. A call that takes longer gains little by being on the hub's processor.
cdef uint64_t SHORT_NS = 100000


cdef void call_to_work(worker *one) noexcept:
    """Let a worker that was taken out of `resting` look for a job. Its memory may be gone afterwards."""
    c_call_to_work(&one.word)


cdef bint is_asleep(worker *one) noexcept:
    """Return whether a worker that rests sleeps, rather than being about to."""
    return c_is_asleep(&one.word)


cdef void unlink(pool *home, job *one) noexcept nogil:
    """Take the job out of the queue. With the lock."""
    # The links go both ways, because `withdraw` takes jobs out of the middle.
    if one.previous != NULL:
        one.previous.next = one.next
    else:
        home.first = one.next
    if one.next != NULL:
        one.next.previous = one.previous
    else:
        home.last = one.previous
    # From here on `withdraw` leaves the job alone.
    one.waiting = False
    home.queued -= 1


cdef bint _takes_long(job *one) noexcept nogil:
    """Make the call. Return whether it took long."""
    cdef uint64_t began
    # Two looks at the clock are saved, because nothing is learned from such a call.
    if one.kind == LONG:
        make_for_caller(one)
        return True
    began = monotonic_ns()
    make_for_caller(one)
    return monotonic_ns() - began > SHORT_NS


cdef void _learn(pool *home, int kind, bint took_long) noexcept nogil:
    """Learn from a call of that *kind*, which has been made. With the lock."""
    # Two in a row are needed, because another thread may have had the processor during one.
    if took_long and (home.was_long[kind] or home.doubted[kind]):
        home.doubted[kind] = DOUBTED
    home.was_long[kind] = took_long


cdef void _release(pool *home, worker *me) noexcept nogil:
    """Give this worker back its processors, because a long call would keep the hub's processor from the hub.
    """
    # It may fail or find that the user bound the worker, so the place says what has become of it.
    release_worker(&me.at)
    pthread_mutex_lock(&home.lock)
    home.bound -= me.at.cpu < 0
    pthread_mutex_unlock(&home.lock)


cdef job *_take_job(pool *home, worker *me, bint *rests) noexcept nogil:
    """Come back from rest, and take the first job. Without a job go to rest, or count this thread out because
    enough others are idle. *rests* says whether this worker rests. With the lock."""
    cdef job *one = home.first
    # The hub has taken this worker out of `resting` already, but left the count to it.
    if rests[0]:
        home.idle -= 1
    # Another worker may have been quicker. Then there is no job, and this worker rests again or ends. More
    # idle threads than the pool keeps are not needed.
    rests[0] = one == NULL and home.idle < home.kept
    if one != NULL:
        unlink(home, one)
    elif rests[0]:
        home.idle += 1
        # Before the lock is free, because the hub may call this worker as soon as it is.
        me.word, me.next, home.resting = AT_WORK, home.resting, me
    else:
        # After the lock is free this thread does not touch the pool again, so it may be used for other
        # threads.
        home.threads -= 1
        home.bound -= me.at.cpu >= 0
    return one


# A worker that sees no call in time puts ASLEEP into its `word` and sleeps, until the hub puts CALLED there
# and wakes it. Each side changes the word in one atomic step, so one of two things happens:
#
#     the worker's step comes first: ASLEEP             the hub's step comes first: CALLED
#     the hub reads ASLEEP, and makes the futex call    the worker's exchange fails, and it does not sleep
#
# A worker comes back from rest only after CALLED. Its `word`, on its stack, lives until then. After that the
# memory may be gone, and the hub makes the futex call nevertheless, because the call needs an address only.
cdef void *work(void *arg) noexcept nogil:
    """Make the calls of the pool *arg*, until there is nothing to do and enough threads are idle.

    One hold of the lock does all that has to change together: come back from rest, learn, take a job or go to
    rest.
    """
    cdef pool *home = <pool *>arg
    # It may lie on the stack, because no greenlet runs in this thread and its stack never moves.
    cdef worker me
    cdef job *one
    cdef job *done = NULL
    cdef bint rests = False, took_long = False
    cdef int kind = LONG
    # The hub binds a worker by the kernel's number of its thread.
    me.at.thread, me.at.cpu = <int>syscall(SYS_gettid), -1
    while True:
        pthread_mutex_lock(&home.lock)
        if done != NULL:
            _learn(home, kind, took_long)
        one = _take_job(home, &me, &rests)
        pthread_mutex_unlock(&home.lock)
        # Only now, so that the hub finds this worker at rest. The job is the hub's after this.
        if done != NULL:
            post(done)
            done = NULL
        if one != NULL:
            # A bound worker has got a long call, which must not take the hub's processor.
            if me.at.cpu >= 0 and one.kind == LONG and filters_allow():
                _release(home, &me)
            # The kind is kept, because the job belongs to the hub after `post`.
            kind, took_long = one.kind, _takes_long(one)
            done = one
        elif rests:
            rest(&me.word)
        else:
            return NULL
