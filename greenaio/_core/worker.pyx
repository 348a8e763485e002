# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A worker: the native thread that makes the calls of a pool, one after another.

The worker                                       The hub
goes to rest: into `pool.resting`, `word` AT_WORK
pushes the job that it has done
wakes the hub, if that does not look
                                                 takes the job
                                                 queues the next, takes the worker out of `resting`
                                                 CALLED
sees CALLED: it need not sleep, and goes on

So one worker answers a greenlet that makes one short call after another. A worker that sees no call
in time puts ASLEEP there and sleeps, until the hub puts CALLED there and wakes it. It comes back
from rest only after that, and its `word`, on its stack, lives until then. The futex call needs an
address only.
"""

from libc.stdint cimport uint64_t

from greenaio._core.context cimport monotonic_ns
from greenaio._core.job cimport LONG, job, make_for_caller
from greenaio._core.mailbox cimport post, pthread_mutex_lock, pthread_mutex_unlock
from greenaio._core.processor cimport filters_allow, release_worker

cdef extern from *:
    """
    #include <linux/futex.h>
    #include <pthread.h>
    #include <signal.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    #define WORKER_STACK (128 * 1024)   /* a system call needs little; the C library wants some for itself */

    static int start_worker(void *(*work)(void *), void *pool)
    {
        pthread_t thread;
        pthread_attr_t attributes;
        sigset_t all, before;
        int error;
        sigfillset(&all);
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        pthread_attr_setstacksize(&attributes, WORKER_STACK);
        pthread_sigmask(SIG_SETMASK, &all, &before);    /* inherited: signals are for Python's threads */
        error = pthread_create(&thread, &attributes, work, pool);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&attributes);
        return error;
    }

    enum { AT_WORK, CALLED, ASLEEP };

    static void rest(int *word)
    {
        int expected = AT_WORK;
        if (__atomic_compare_exchange_n(word, &expected, ASLEEP, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
            while (__atomic_load_n(word, __ATOMIC_ACQUIRE) == ASLEEP)
                syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, ASLEEP, NULL, NULL, 0);
    }

    static void call_to_work(int *word)
    {
        if (__atomic_exchange_n(word, CALLED, __ATOMIC_ACQ_REL) == ASLEEP)
            syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    }

    static int is_asleep(int *word)
    { return __atomic_load_n(word, __ATOMIC_RELAXED) == ASLEEP; }
    """
    int start_native "start_worker"(void *(*run)(void *) noexcept nogil, void *arg)
    int AT_WORK
    void rest(int *word) noexcept nogil
    void c_call_to_work "call_to_work"(int *word) noexcept nogil
    bint c_is_asleep "is_asleep"(int *word) noexcept nogil
    long syscall(long number, ...) nogil
    const long SYS_gettid

cdef enum:
    DOUBTED = 16                # calls of a kind that are taken for long after two in a row were

cdef uint64_t SHORT_NS = 100000     # a call that takes longer gains little by being on the hub's processor


cdef int start_worker(void *(*run)(void *) noexcept nogil, void *arg) noexcept:
    """Start a native thread that calls ``run(arg)``, with signals blocked. Return 0 or an errno."""
    return start_native(run, arg)


cdef void call_to_work(worker *one) noexcept:
    """Let a worker that was taken out of `resting` look for a job. Its memory may be gone afterwards."""
    c_call_to_work(&one.word)


cdef bint is_asleep(worker *one) noexcept:
    """Return whether a worker that rests sleeps, rather than being about to."""
    return c_is_asleep(&one.word)


cdef void unlink(pool *home, job *one) noexcept nogil:
    """Take the job out of the queue. With the lock."""
    if one.previous != NULL:
        one.previous.next = one.next
    else:
        home.first = one.next
    if one.next != NULL:
        one.next.previous = one.previous
    else:
        home.last = one.previous
    one.waiting = False
    home.queued -= 1


cdef bint _takes_long(job *one) noexcept nogil:
    """Make the call. Return whether it took long."""
    cdef uint64_t began
    if one.kind == LONG:
        make_for_caller(one)
        return True
    began = monotonic_ns()
    make_for_caller(one)
    return monotonic_ns() - began > SHORT_NS


cdef void _learn(pool *home, int kind, bint took_long) noexcept nogil:
    """With the lock: a call of that kind was made."""
    if took_long and (home.was_long[kind] or home.doubted[kind]):
        home.doubted[kind] = DOUBTED
    home.was_long[kind] = took_long


cdef void _release(pool *home, worker *me) noexcept nogil:
    release_worker(&me.at)
    pthread_mutex_lock(&home.lock)
    home.bound -= me.at.cpu < 0
    pthread_mutex_unlock(&home.lock)


cdef void *work(void *arg) noexcept nogil:
    """Make the calls of a pool, until there is nothing to do and enough threads are idle."""
    cdef pool *home = <pool *>arg
    cdef worker me
    cdef job *one
    cdef job *done = NULL
    cdef bint rests = False, took_long = False
    cdef int kind = LONG
    me.at.thread, me.at.cpu = <int>syscall(SYS_gettid), -1
    while True:
        pthread_mutex_lock(&home.lock)
        if rests:
            home.idle -= 1
        if done != NULL:
            _learn(home, kind, took_long)
        one = home.first
        rests = one == NULL and home.idle < home.kept
        if one != NULL:
            unlink(home, one)
        elif rests:
            home.idle += 1
            me.word, me.next, home.resting = AT_WORK, home.resting, &me
        else:
            home.threads -= 1
            home.bound -= me.at.cpu >= 0
        pthread_mutex_unlock(&home.lock)
        if done != NULL:
            post(done)
            done = NULL
        if one != NULL:
            if me.at.cpu >= 0 and one.kind == LONG and filters_allow():
                _release(home, &me)
            kind, took_long = one.kind, _takes_long(one)
            done = one
        elif rests:
            rest(&me.word)
        else:
            return NULL
