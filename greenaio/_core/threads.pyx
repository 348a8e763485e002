# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Native threads make the system calls that native AIO can't: a bounded pool for each device.

A worker never takes the GIL and touches no object of Python. It gets a `job`, plain memory that hangs from a
Request, makes its one system call, and puts the job into the mailbox of the hub that asked. `Engine.lent`
keeps request, job and buffers until the hub has taken the job out there. A pool starts a thread if there are
more calls than idle threads, and keeps it for as long as the process lives, because starting and ending
threads is a latency spike of its own. A frozen disk fills its own pool and no other.
"""

import logging
import os

from greenaio._config import config
from greenaio._core.bell import listen

from libc.errno cimport EACCES, EAGAIN, ENOSYS, EPERM
from libc.stdlib cimport calloc

from greenaio._core.caller cimport note_caller
from greenaio._core.request cimport Request
from greenaio._core.job cimport LONG, job
from greenaio._core.mailbox cimport (
    WARY, Inbox, give_out, inboxes, mailbox, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
    take_back,
)
from greenaio._core.processor cimport bind_worker, filters_allow, is_ordinary, release_worker
from greenaio._core.thread cimport start_thread
from greenaio._core.worker cimport DOUBTED, call_to_work, is_asleep, pool, unlink, work, worker

cdef extern from *:
    """
    #include <limits.h>
    #include <sched.h>
    """
    const int INT_MAX
    int sched_getcpu() noexcept nogil

cdef enum:
    # Idle threads that `lone_threads` keeps, for opens that wait briefly.
    LONE_KEPT = 4
    # These stand where a processor does. This one means a worker on any processor, bound or not.
    WHEREVER = -1
    # A worker that may run on all processors.
    EVERYWHERE = -2

# The first of the list of all pools, linked by `older`. The GIL guards the list.
cdef pool *_newest = NULL
# False after the kernel has refused to bind a worker.
cdef bint _may_bind = True
cdef bint _told_of_no_thread = False

log = logging.getLogger('greenaio')


# The way of a call.
#
#     ==========================================  ==========================================================
#     the hub, with the GIL                       a worker, without it
#     ==========================================  ==========================================================
#     `note_caller`: ids, capabilities, umask
#     `give_out`: the mailbox expects the job
#     with the lock: queues the job, chooses a
#     worker that rests or counts a new thread
#     calls the worker, or starts the thread
#                                                 with the lock: takes the first job of the queue
#                                                 makes the call
#                                                 with the lock: takes the next job, or goes to rest
#                                                 `post`: the job is in the mailbox, the hub is woken
#     `Inbox.reap`: the request is done
#     ==========================================  ==========================================================
#
# A called worker need not get the job that it was called for, because another worker may come from its own
# call and be quicker. Then the called worker finds no job and rests again.
#
# If the greenlet is killed, `withdraw` takes the job out of the queue, unless a worker has it already. A call
# that has begun can't be stopped, and its request is abandoned. After a fork the child has none of these
# threads, and their locks may be held for ever, so it begins with new pools.
#
# A call that waits for a peer, such as the open of a FIFO, waits for no disk, and may do so for ever. It gets
# a thread of its own from `lone_threads`, which ends afterwards.
cdef class Pool:
    """The threads of one device, ``config.threads`` of them at most. Without *device* there is one for each
    call."""

    def __cinit__(self, device, Pool used=None):
        """Make a pool. Its memory is never freed, because its threads wait on it and a job may still name it.

        The memory can come from a *used* pool, which has neither threads nor calls any more. Raise
        MemoryError.
        """
        global _newest
        self.device = device
        if used is not None:
            self._pool = used._pool
        else:
            self._pool = <pool *>calloc(1, sizeof(pool))
            if self._pool == NULL:
                raise MemoryError
            pthread_mutex_init(&self._pool.lock, NULL)
        # The threads of a disk stay, because the next call is likely to come soon.
        self._pool.kept = INT_MAX if device is not None else LONE_KEPT
        self._pool.wary = 0
        self._pool.older = _newest
        _newest = self._pool

    @property
    def threads(self):
        """The number of threads that were started and have not ended."""
        return self._pool.threads

    @property
    def queued(self):
        """The number of calls that wait for a thread."""
        return self._pool.queued

    cdef void beware(self) noexcept:
        """Have the next calls take threads, because a call on this device has held the hub.

        It ends after `WARY` more quick calls than slow ones. An on-access scanner is such a case: it answers
        late, also for cached files.
        """
        self._pool.wary = WARY

    cdef void forgive(self) noexcept:
        """Forget that calls on this device have held the hub."""
        self._pool.wary = 0

    cdef bint is_wary(self) noexcept:
        """Return whether calls that would be made in the hub should take a thread."""
        return self._pool.wary > 0

    cdef bint all_busy(self) noexcept:
        """Return whether a call would have to wait for a thread, or may wait without one."""
        return _is_all_busy(self._pool)

    cdef int busy(self) noexcept:
        """Return the number of calls that threads have, or are to have."""
        return _busy(self._pool)

    cdef void retire(self) noexcept:
        """Let each thread end when it has made the calls that were asked for before."""
        global _newest
        cdef pool *one = self._pool
        cdef pool **link = &_newest
        cdef worker *called
        # Out of the list first, so that `any_busy` does not count it. A used pool enters the list again.
        while link[0] != one and link[0] != NULL:
            link = &link[0].older
        # It may be out of the list already, if the process was forked.
        if link[0] != NULL:
            link[0] = one.older
        pthread_mutex_lock(&one.lock)
        # A worker that is at work reads this after its call. Those that rest have to be called.
        one.kept = 0
        while one.resting != NULL:
            # Read the link before the call, because the worker's memory may be gone after it.
            called = one.resting
            one.resting = called.next
            call_to_work(called)
        pthread_mutex_unlock(&one.lock)

    cdef bint is_over(self) noexcept:
        """Return whether this pool has neither threads nor calls for them."""
        cdef bint is_over
        pthread_mutex_lock(&self._pool.lock)
        is_over = self._pool.threads == 0 and self._pool.first == NULL
        pthread_mutex_unlock(&self._pool.lock)
        return is_over

    cpdef int submit(self, Request request, Inbox inbox) except -1:
        """Queue the call of *request*, first in, first out. Return whether it is queued. Nothing is queued if
        there is no thread and none can be started. No Python code runs here, except for a warning in that
        case."""
        cdef pool *home = self._pool
        cdef job *one = <job *>request.job
        cdef bint more
        cdef worker *called
        cdef int cpu, error = 0
        # Such a call waits for a peer, so it must not take the processor of the hub.
        if self.device is None:
            one.kind = LONG
        # Read at each call, so that a change of the configuration counts at once.
        home.limit = config.threads if self.device is not None else INT_MAX
        cpu = _prepare(home, one, inbox._box)
        pthread_mutex_lock(&home.lock)
        # From here on the job may be taken by any worker that comes from its call.
        _append(home, one)
        if cpu >= 0 and _doubts(home, one.kind):
            cpu = EVERYWHERE
        # Without a worker at rest and without a free place, a worker that comes from its call takes this one.
        called = _choose(home, one, cpu, home.threads < home.limit)
        more = called == NULL and home.threads < home.limit
        if more:
            # Counted before the thread exists, because the thread counts itself out at its end.
            home.threads += 1
        pthread_mutex_unlock(&home.lock)
        # Without the lock, because starting a thread takes long, and its first step is to take the lock.
        if more:
            error = start_thread(work, home)
        # The lock was free in between. If a worker has taken the job, all is well.
        if error and _is_stranded(home, one, cpu, self.device is None, &called) and withdraw(request):
            _tell_of_no_thread(error)
            return False
        if called != NULL:
            # Before the call, because the worker reads it when its job is done. `Inbox.look` follows.
            inbox._box.looks = cpu >= 0
            call_to_work(called)
        return True


cdef int _processor_for(pool *home, job *one, int short_out) noexcept:
    """Return the processor on which the call of *one* runs best, or WHEREVER, or EVERYWHERE. *short_out* is
    the number of short calls of this hub that are out, with this one."""
    if one.kind == LONG:
        return EVERYWHERE
    # If this is the only short call, its worker may run on the hub's processor. A second one would only wait
    # for the first there.
    if short_out != 1:
        return WHEREVER
    # A thread that has changed its policy since it bound a worker might leave that no time.
    if home.bound and not one.by.is_filtered and not is_ordinary():
        return EVERYWHERE
    return sched_getcpu()


cdef int _prepare(pool *home, job *one, mailbox *box) noexcept:
    """Make *one* ready for the queue of *home*. Return the processor on which it runs best."""
    # In this thread, because it is the caller.
    note_caller(&one.by)
    one.home, one.wary, one.previous, one.next = home, &home.wary, NULL, NULL
    # Before the job is in the queue, because a worker may bring it back at once.
    give_out(one, box)
    return _processor_for(home, one, box.short_out)


cdef bint _doubts(pool *home, int kind) noexcept:
    """Return whether a call of *kind* may run anywhere, because the last attempt to bind a worker failed or
    calls of this kind took long. The call counts towards the next attempt. With the lock."""
    if not home.doubted[kind]:
        return False
    home.doubted[kind] -= 1
    return True


cdef void _append(pool *home, job *one) noexcept:
    """Put *one* at the end of the queue. With the lock."""
    one.previous = home.last
    if home.last != NULL:
        home.last.next = one
    else:
        home.first = one
    home.last = one
    one.waiting = True
    home.queued += 1


cdef bint _is_stranded(pool *home, job *one, int cpu, bint waits_for_peer, worker **called) noexcept:
    """Return whether no thread can make the call of *one*, because the one for it could not be started.
    Otherwise set *called* to a worker that has come to rest since, if there is one."""
    cdef bint is_stranded
    pthread_mutex_lock(&home.lock)
    # The thread that does not exist was counted.
    home.threads -= 1
    called[0] = _choose(home, one, cpu, False)
    # With other threads the call waits for one of them. A call that waits for a peer must not, because theirs
    # may last for ever.
    is_stranded = called[0] == NULL and (home.threads == 0 or waits_for_peer)
    pthread_mutex_unlock(&home.lock)
    return is_stranded


cdef worker *_choose(pool *home, job *one, int cpu, bint may_start) noexcept:
    """Take a worker out of `resting` for the call of *one*, and bind it to *cpu*, or to none for EVERYWHERE.
    Return NULL if there is none, or if another *may_start* and no worker that may run everywhere is asleep:
    one that is awake may wait for the processor of the hub. With the lock."""
    cdef worker **link = &home.resting
    cdef worker **free = NULL
    cdef worker **bound = NULL
    cdef worker *it
    # `link` is the pointer to the worker, not the worker, so that the worker can be taken out of the list.
    while link[0] != NULL and not (bound != NULL and bound[0].at.cpu == cpu):
        if link[0].at.cpu < 0:
            # The list has the last to rest first. A short call gets that one, which may be awake and need no
            # wake-up. A long call gets the one that has slept longest.
            if free == NULL or cpu == EVERYWHERE and is_asleep(link[0]):
                free = link
        elif bound == NULL or link[0].at.cpu == cpu:
            bound = link
        link = &link[0].next
    # A bound worker is the choice if it is on this processor already, or if no other worker may be bound.
    cdef bint is_bound = cpu >= 0 and (home.bound >= inboxes() or bound != NULL and bound[0].at.cpu == cpu)
    link = bound if bound != NULL and is_bound or free == NULL else free
    # A new thread is better for a long call than to wait for a worker that is about to rest on the hub's
    # processor, or to set a bound worker free.
    if link == NULL or cpu == EVERYWHERE and may_start and (link == bound or not is_asleep(link[0])):
        return NULL
    it = link[0]
    link[0] = it.next
    # The usual case of short calls one after another: no system call is needed.
    if it.at.cpu == cpu:
        return it
    # Count the worker out, and in again below, if it is bound then. Binding may fail either way.
    home.bound -= it.at.cpu >= 0
    if cpu >= 0 and home.bound < inboxes() and _may_bind:
        _bind(home, it, one, cpu)
    # If it can't be released from here, the worker does it itself before the call.
    elif cpu == EVERYWHERE and it.at.cpu >= 0 and filters_allow():
        release_worker(&it.at)
    home.bound += it.at.cpu >= 0
    return it


cdef void _bind(pool *home, worker *it, job *one, int cpu) noexcept:
    """Bind the worker *it* to *cpu* for the call of *one*, if that is allowed. With the lock."""
    global _may_bind
    cdef int error = bind_worker(&it.at, cpu) if filters_allow() else -EAGAIN
    # The kernel will refuse it next time as well, so it is not asked again.
    if error == -EPERM or error == -EACCES or error == -ENOSYS:
        _may_bind = False
    if error:
        # Any error may pass. After so many calls the next one tries again.
        home.doubted[one.kind] = DOUBTED


cdef _tell_of_no_thread(int error):
    """Warn, once for the life of the process, that *error* (an errno) keeps threads from starting."""
    global _told_of_no_thread
    if not _told_of_no_thread:
        # First, because a handler may write to a file, which may come here again.
        _told_of_no_thread = True
        log.warning("can't start a thread: %s. Calls that need one block their hub, until one can be started. "
                    'pids.max, ulimit -u?', os.strerror(error))


cdef bint withdraw(Request request) noexcept:
    """Take *request* out of its pool's queue. Return False if a worker has it already."""
    cdef job *one = <job *>request.job
    cdef pool *home
    cdef bint waiting
    # A request that was never given to a pool is in no queue.
    if one == NULL or one.home == NULL:
        return False
    home = <pool *>one.home
    pthread_mutex_lock(&home.lock)
    waiting = one.waiting
    if waiting:
        unlink(home, one)
    pthread_mutex_unlock(&home.lock)
    if waiting:
        # After the lock is free: only the hub counts its jobs here, so no other thread waits for it.
        take_back(one)
    return waiting


cdef bint _is_all_busy(pool *one) noexcept nogil:
    """Return whether no thread of *one* is free, or the pool is wary."""
    # These are read without the lock. A worker that comes from its call at the same time only makes it
    # better, so the answer errs on the safe side.
    return one.wary > 0 or one.limit > 0 and _busy(one) >= one.limit


cdef int _busy(pool *one) noexcept nogil:
    """Return the number of calls of *one* that threads have, or are to have."""
    return one.queued + one.threads - one.idle


cdef bint any_busy() noexcept:
    """Return whether some pool is all busy, or wary."""
    cdef pool *one = _newest
    while one != NULL:
        if _is_all_busy(one):
            return True
        one = one.older
    return False


def _after_fork_in_child():
    """Forget all pools. The threads stayed with the parent, and may have held any lock."""
    global _newest
    _newest = NULL


listen(_after_fork_in_child)
