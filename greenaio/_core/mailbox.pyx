# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The mailbox of a hub: workers put the jobs there that they have done.

No lock is around the jobs, because a worker that had it could lose its processor to the hub. The lock guards
the eventfd, which may be closed, and the count of jobs that are not back.

    the worker                                      the hub
    pushes the job
    wakes the hub, if the hub does not look
                                                    is woken, or looks
                                                    takes all jobs, and finishes their requests
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from greenaio._core.context cimport Context
from greenaio._core.eventfd cimport signal_eventfd
from greenaio._core.engine cimport Engine
from greenaio._core.request cimport Request
from greenaio._core.job cimport LONG, job, job_of

cdef extern from *:
    """
    #include <signal.h>

    /* Put *one*, whose link is *next*, on the stack. Return whether the stack was empty. There is no lock,
       because a worker that had it could lose its processor to the hub.

       The exchange looks at the top only. The top may have left and come back between the load and the
       exchange (ABA). That does no harm, because *one* only needs the right top below it. */
    static int push(void **stack, void *one, void **next)
    {
        void *top = __atomic_load_n(stack, __ATOMIC_RELAXED);
        do
            *next = top;
        /* Release: the hub that takes the job sees its result. A failed exchange has loaded the new top. */
        while (!__atomic_compare_exchange_n(stack, &top, one, 1, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
        return top == NULL;
    }

    /* Take all jobs in one step. Acquire: their results are visible afterwards. */
    static void *pop_all(void **stack)
    { return __atomic_exchange_n(stack, NULL, __ATOMIC_ACQ_REL); }

    /* The hub's half of the agreement on `looks`: the store, the barrier, then a look at the stack by the
       caller. */
    static void look_no_more(int *looks)
    {
        __atomic_store_n(looks, 0, __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
    }

    /* The worker's half: the push by the caller, the barrier, then the load. */
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

# The number of mailboxes: one for each hub.
cdef int _inboxes = 0


cdef int inboxes() noexcept:
    """Return the number of mailboxes, which is the number of hubs."""
    return _inboxes


cdef void give_out(job *one, mailbox *box) noexcept:
    """Count a job that is about to be queued. A worker brings it back to *box*."""
    one.back = box
    # Before the job is in a queue, because a worker may bring it back at once.
    atomic_add(&box.out, 1, ACQ_REL)
    if one.kind != LONG:
        box.short_out += 1


cdef void take_back(job *one) noexcept:
    """Count a job that was taken out of the queue again, so that no worker has it."""
    cdef mailbox *box = <mailbox *>one.back
    atomic_add(&box.out, -1, ACQ_REL)
    if one.kind != LONG:
        box.short_out -= 1


# A hub that is about to look need not be woken. It says so in `looks`. Before it looks for the last time it
# takes that back. The worker pushes, and then asks whether the hub looks. A barrier stands between the two
# steps of each side, so at least one of them sees the step of the other.
#
#     the worker                                      the hub
#     pushes the job                                  looks = 0
#     barrier                                         barrier
#     reads `looks`                                   reads `done`
#
# If the worker reads 1, its push came before the hub's last look, which finds the job. If the hub finds no
# job, the worker reads 0 and signals. If both see the other, the signal causes one empty pass.
#
# Only a push onto an empty stack signals. The jobs that are pushed onto it later are taken together with it.
cdef void post(job *one) noexcept nogil:
    """Bring the job back to the hub that asked. From here on the job is the hub's, which may free it at once.
    """
    cdef mailbox *box = <mailbox *>one.back
    cdef bint was_empty, forgotten
    # Push first and ask whether the hub looks afterwards. `box` was read before, because the job may be
    # gone after this.
    was_empty = push(&box.done, one, <void **>&one.next)
    pthread_mutex_lock(&box.lock)
    # The number of the eventfd is read with the lock, because the number may be closed and mean another file.
    if was_empty and not hub_looks(&box.looks) and box.eventfd >= 0:
        signal_eventfd(box.eventfd, box.same_eventfd, box.name)
    # Last, and with the lock held. If no job is out, another thread may free the mailbox as soon as it has
    # the lock.
    forgotten = atomic_add(&box.out, -1, ACQ_REL) == 0
    # The thread that ends a hub waits for this.
    if forgotten:
        pthread_cond_signal(&box.empty)
    forgotten = forgotten and box.orphan
    pthread_mutex_unlock(&box.lock)
    # No Inbox and no job refers to it any more.
    if forgotten:
        free(box)


cdef void _waited(int *wary, uint64_t ns) noexcept:
    """Count a call of *ns* nanoseconds that a thread made on a wary device. Mostly quick calls end the
    wariness soon, even if one of many waits for its disk."""
    if ns <= WAITED_NS:
        wary[0] -= 1
    elif wary[0] < WARY:
        wary[0] += 1


# The memory of a mailbox belongs to its `Inbox`, and after the Inbox is gone to the jobs that are still out.
# A hub can't wait for them, because a disk may be frozen. A forked child leaves the memory alone: see
# `Inbox.forget`.
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
        # Decided with the lock. Either this side or the last job sees that the other has gone, never both.
        unused = self._box.out == 0
        pthread_mutex_unlock(&self._box.lock)
        if unused:
            free(self._box)

    cdef int reap(self, Engine engine) except -1:
        """Move the requests of all done jobs to the ready ones. Return how many. No greenlet is resumed here.
        """
        cdef job *one = NULL
        cdef job *last
        cdef job *following
        cdef int n = 0
        # A plain look is enough. A worker that pushes after it signals afterwards.
        if self._box.done == NULL:
            return 0
        last = <job *>pop_all(&self._box.done)
        # Turn the stack around, so that requests finish in the order in which their calls were done.
        while last != NULL:
            following = last.next
            last.next = one
            one, last = last, following
        # One time for all of them, because they are found together.
        engine.reaps()
        while one != NULL:
            # Read the link first. The job belongs to its request, and no code here keeps that after `finish`.
            following = one.next
            # A worker blocks all signals. Raise it here, as if this thread had made the call.
            if one.signal:
                c_raise(one.signal)
            if one.kind != LONG:
                self._box.short_out -= 1
            # Only a wary device learns from this. `began` and `reaped_ns` are both CLOCK_MONOTONIC, and the
            # pool's memory is never freed.
            if one.wary != NULL and one.wary[0] > 0 and engine.reaped_ns > (<Request>one.request).began:
                _waited(one.wary, engine.reaped_ns - (<Request>one.request).began)
            engine.finish(<Request>one.request, one.result)
            one = following
            n += 1
        # The next reaping asks the clock again.
        engine.reaped_ns = 0
        return n

    def put(self, Request request not None, long result):
        """Put *request* here, done with *result*, as a worker does. For a scripted pool."""
        cdef job *one = job_of(request)
        one.result = result
        push(&self._box.done, one, <void **>&one.next)

    def stop_signalling(self):
        """Keep workers from signalling the eventfd, which is about to be closed."""
        pthread_mutex_lock(&self._box.lock)
        # After the lock is free again no worker is between its look at the number and its write.
        self._box.eventfd = -1
        pthread_mutex_unlock(&self._box.lock)

    cdef int look(self, Engine engine) except -1:
        """Reap after `submit`, if the call went to a worker on this processor, because it may have run
        already. Return how many."""
        if not self._box.looks:
            return 0
        # The order matters: see the docstring of this module.
        look_no_more(&self._box.looks)
        return self.reap(engine)

    cdef wait(self):
        """Wait, without the GIL, until no worker has a job of this mailbox. On a frozen disk this lasts until
        the disk answers."""
        with nogil:
            pthread_mutex_lock(&self._box.lock)
            while self._box.out:
                pthread_cond_wait(&self._box.empty, &self._box.lock)
            pthread_mutex_unlock(&self._box.lock)

    def forget(self):
        """Leave the parent's mailbox alone, in a forked child. Its lock may be held for ever, and the workers
        are the parent's."""
        global _inboxes
        _inboxes -= 1
        # The memory is lost to the child: a worker of the parent may have been in the middle of a change.
        self._box = NULL
