# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The mailbox of a hub: workers put there the jobs that they have done.

There is no lock around the jobs, because a worker that had it could lose its processor to the hub. The lock guards
the eventfd, which may be closed, and the count of jobs that are not back.

    the worker                                      the hub
    pushes the job
    wakes the hub, if the hub does not look
                                                    is woken, or looks
                                                    takes all jobs, and finishes their requests

A hub that is about to look need not be woken. It says so in `looks`. Before it looks for the last time it takes
that back. The worker pushes, and then asks whether the hub looks. Between these two stands a barrier on each
side, so at least one of them sees what the other has done.
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from greenaio._core.context cimport Context, signal_eventfd
from greenaio._core.engine cimport Engine
from greenaio._core.request cimport Request
from greenaio._core.job cimport LONG, job, job_of

cdef extern from *:
    """
    #include <signal.h>

    /* Put *one*, whose link is *next*, on the stack. Return whether the stack was empty. There is no lock,
       because a worker that had it could lose its processor to the hub. */
    static int push(void **stack, void *one, void **next)
    {
        void *top = __atomic_load_n(stack, __ATOMIC_RELAXED);
        do
            *next = top;
        while (!__atomic_compare_exchange_n(stack, &top, one, 1, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
        return top == NULL;
    }

    static void *pop_all(void **stack)
    { return __atomic_exchange_n(stack, NULL, __ATOMIC_ACQ_REL); }

    static void look_no_more(int *looks)
    {
        __atomic_store_n(looks, 0, __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
    }

    static int hub_looks(int *looks)
    {
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        return __atomic_load_n(looks, __ATOMIC_RELAXED);
    }
    """
    bint push(void **stack, void *one, void **next) noexcept nogil
    void *pop_all(void **stack) noexcept nogil
    void look_no_more(int *looks) noexcept nogil
    bint hub_looks(int *looks) noexcept nogil
    int atomic_add "__atomic_add_fetch"(int *count, int n, int order) noexcept nogil
    const int ACQ_REL "__ATOMIC_ACQ_REL"
    int c_raise "raise"(int number) noexcept nogil

cdef int _inboxes = 0                   # how many there are: one for each hub


cdef int inboxes() noexcept:
    return _inboxes


cdef void give_out(job *one, mailbox *box) noexcept:
    """The job is about to be queued for a worker, which brings it back here."""
    one.back = box
    atomic_add(&box.out, 1, ACQ_REL)
    if one.kind != LONG:
        box.short_out += 1


cdef void take_back(job *one) noexcept:
    """The job was taken out of the queue again: no worker has it."""
    cdef mailbox *box = <mailbox *>one.back
    atomic_add(&box.out, -1, ACQ_REL)
    if one.kind != LONG:
        box.short_out -= 1


cdef void post(job *one) noexcept nogil:
    """Bring the job back to the hub that asked. From here on it is the hub's, which may free it at once."""
    cdef mailbox *box = <mailbox *>one.back
    cdef bint was_empty, forgotten
    was_empty = push(&box.done, one, <void **>&one.next)
    pthread_mutex_lock(&box.lock)
    # The number is read with the lock, because it may be closed and mean another file.
    if was_empty and not hub_looks(&box.looks) and box.eventfd >= 0:
        signal_eventfd(box.eventfd, box.same_eventfd, box.name)
    forgotten = atomic_add(&box.out, -1, ACQ_REL) == 0
    if forgotten:
        pthread_cond_signal(&box.empty)
    forgotten = forgotten and box.orphan
    pthread_mutex_unlock(&box.lock)
    if forgotten:
        free(box)


cdef void _waited(int *wary, uint64_t ns) noexcept:
    """A call that a thread made on this wary device took *ns*: count it. A device whose calls are mostly quick is
    not wary for long, even if one of many waits for its disk."""
    if ns <= WAITED_NS:
        wary[0] -= 1
    elif wary[0] < WARY:
        wary[0] += 1


cdef class Inbox:
    """The mailbox of one hub. The eventfd of *context* wakes the hub."""

    def __cinit__(self, Context context):
        global _inboxes
        self._box = <mailbox *>calloc(1, sizeof(mailbox))
        if self._box == NULL:
            raise MemoryError
        pthread_mutex_init(&self._box.lock, NULL)
        pthread_cond_init(&self._box.empty, NULL)
        self._box.eventfd = context.own_eventfd
        self._box.same_eventfd = context.eventfd
        _inboxes += 1
        self._box.name = context.name

    def __dealloc__(self):
        global _inboxes
        cdef bint unused
        if self._box == NULL:
            return
        _inboxes -= 1
        pthread_mutex_lock(&self._box.lock)
        self._box.orphan = True
        self._box.eventfd = -1
        unused = self._box.out == 0
        pthread_mutex_unlock(&self._box.lock)
        if unused:
            free(self._box)

    cdef int reap(self, Engine engine) except -1:
        """Move the requests of all done jobs to the ready ones. Return how many. No greenlet is resumed here."""
        cdef job *one = NULL
        cdef job *last
        cdef job *following
        cdef int n = 0
        if self._box.done == NULL:      # a worker that pushes now signals afterwards
            return 0
        last = <job *>pop_all(&self._box.done)
        while last != NULL:             # in the order in which they were done
            following = last.next
            last.next = one
            one, last = last, following
        engine.reaps()
        while one != NULL:
            following = one.next
            if one.signal:
                c_raise(one.signal)     # as if this thread had made the call
            if one.kind != LONG:
                self._box.short_out -= 1
            if one.wary != NULL and one.wary[0] > 0 and engine.reaped_ns > (<Request>one.request).began:
                _waited(one.wary, engine.reaped_ns - (<Request>one.request).began)
            engine.finish(<Request>one.request, one.result)
            one = following
            n += 1
        engine.reaped_ns = 0
        return n

    def put(self, Request request not None, long result):
        """Put *request* here, done with *result*, as a worker does; for a scripted pool."""
        cdef job *one = job_of(request)
        one.result = result
        push(&self._box.done, one, <void **>&one.next)

    def stop_signalling(self):
        """The eventfd is about to be closed: workers signal it no more."""
        pthread_mutex_lock(&self._box.lock)
        self._box.eventfd = -1
        pthread_mutex_unlock(&self._box.lock)

    cdef int look(self, Engine engine) except -1:
        """`reap` after `submit`, if the call went to a worker on this processor: it may have run already."""
        if not self._box.looks:
            return 0
        look_no_more(&self._box.looks)
        return self.reap(engine)

    cdef wait(self):
        """Wait, without the GIL, until no worker has a job of ours."""
        with nogil:
            pthread_mutex_lock(&self._box.lock)
            while self._box.out:
                pthread_cond_wait(&self._box.empty, &self._box.lock)
            pthread_mutex_unlock(&self._box.lock)

    def forget(self):
        """In a forked child: the lock may be held for ever, and the workers are the parent's."""
        global _inboxes
        _inboxes -= 1
        self._box = NULL
