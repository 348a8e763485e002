# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Native threads make the system calls that native AIO can't: a bounded pool for each device.

A worker never takes the GIL and touches nothing of Python's. It gets a `job`, plain memory that hangs from a
Request; makes its one system call; and puts the job into the mailbox of the hub that asked. `Engine.lent` keeps
request, job and buffers until the hub has taken it out there. A pool starts a thread when there is more to do
than there are idle ones, and keeps it for as long as the process lives: starting and ending threads is a
latency spike of its own. A frozen disk fills its own pool and nobody else's.

A call that waits for a peer, such as the open of a FIFO, waits for no disk, and may do so for ever. It gets a
thread of its own from `lone_threads`, which ends afterwards.
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
    WARY, Inbox, give_out, inboxes, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, take_back,
)
from greenaio._core.processor cimport bind_worker, filters_allow, is_ordinary, release_worker
from greenaio._core.worker cimport call_to_work, is_asleep, pool, start_worker, unlink, work, worker

cdef extern from *:
    """
    #include <limits.h>
    #include <sched.h>
    """
    const int INT_MAX
    int sched_getcpu() noexcept nogil

cdef enum:
    LONE_KEPT = 4               # idle threads of `lone_threads`, for opens that wait briefly
    DOUBTED = 16                # calls of a kind that go everywhere after a worker could not be bound
    WHEREVER = -1               # instead of a processor: a worker wherever it is ...
    EVERYWHERE = -2             # ... or one that may run on all

cdef pool *_newest = NULL
cdef bint _may_bind = True              # False: the kernel refuses it
cdef bint _told_of_no_thread = False

log = logging.getLogger('greenaio')


cdef class Pool:
    """The threads of one device, ``config.threads`` of them at most; without *device*, as many as there are
    calls."""

    def __cinit__(self, device, Pool used=None):
        """The memory of a pool is never freed, because its threads wait on it and a job may still name it. It can
        be that of a *used* pool, which is over."""
        global _newest
        self.device = device
        if used is not None:
            self._pool = used._pool
        else:
            self._pool = <pool *>calloc(1, sizeof(pool))
            if self._pool == NULL:
                raise MemoryError
            pthread_mutex_init(&self._pool.lock, NULL)
        self._pool.kept = INT_MAX if device is not None else LONE_KEPT
        self._pool.wary = 0
        self._pool.older = _newest
        _newest = self._pool

    @property
    def threads(self):
        """How many were started."""
        return self._pool.threads

    @property
    def queued(self):
        """How many calls wait for a thread."""
        return self._pool.queued

    cdef void beware(self) noexcept:
        """A call on this device has held the hub. The next ones take threads, until `WARY` more of them were quick
        than slow: an on-access scanner answers late, for what is cached as well."""
        self._pool.wary = WARY

    cdef void forgive(self) noexcept:
        """Forget that calls on this device have held the hub."""
        self._pool.wary = 0

    cdef bint is_wary(self) noexcept:
        """Whether calls that would be made in the hub had better take a thread."""
        return self._pool.wary > 0

    cdef bint all_busy(self) noexcept:
        """Whether a call would have to wait for a thread, or may wait without one."""
        return _is_all_busy(self._pool)

    cdef int busy(self) noexcept:
        """Calls that threads have, or are to have."""
        return _busy(self._pool)

    cdef void retire(self) noexcept:
        """Let each thread end when it has made the calls that were asked for before."""
        global _newest
        cdef pool *one = self._pool
        cdef pool **link = &_newest
        cdef worker *called
        while link[0] != one and link[0] != NULL:
            link = &link[0].older
        if link[0] != NULL:
            link[0] = one.older
        pthread_mutex_lock(&one.lock)
        one.kept = 0
        while one.resting != NULL:
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
        """Queue the call of *request*, first in, first out; return whether it is. Nothing is queued if there is no
        thread, and none can be started."""
        cdef pool *home = self._pool
        cdef job *one = <job *>request.job
        cdef bint more, failed = False
        cdef worker *called
        cdef int cpu = WHEREVER
        if self.device is None:
            one.kind = LONG
        home.limit = config.threads if self.device is not None else INT_MAX
        note_caller(&one.by)
        one.home, one.wary, one.previous, one.next = home, &home.wary, NULL, NULL
        give_out(one, inbox._box)
        if one.kind == LONG:
            cpu = EVERYWHERE
        elif inbox._box.short_out == 1:
            cpu = sched_getcpu()
            if home.bound and not one.by.is_filtered and not is_ordinary():
                cpu = EVERYWHERE        # since it bound one
        pthread_mutex_lock(&home.lock)
        one.previous = home.last
        if home.last != NULL:
            home.last.next = one
        else:
            home.first = one
        home.last = one
        one.waiting = True
        home.queued += 1
        if cpu >= 0 and home.doubted[one.kind]:
            home.doubted[one.kind] -= 1
            cpu = EVERYWHERE
        called = _choose(home, one, cpu, home.threads < home.limit)
        more = called == NULL and home.threads < home.limit
        if more:
            home.threads += 1
        pthread_mutex_unlock(&home.lock)
        if more:
            error = start_worker(work, home)
            if error:
                pthread_mutex_lock(&home.lock)
                home.threads -= 1
                called = _choose(home, one, cpu, False)     # one that has hardly come to rest
                failed = called == NULL and (home.threads == 0 or self.device is None)
                pthread_mutex_unlock(&home.lock)
                if failed and withdraw(request):
                    _tell_of_no_thread(error)
                    return False
        if called != NULL:
            inbox._box.looks = cpu >= 0
            call_to_work(called)
        return True


cdef worker *_choose(pool *home, job *one, int cpu, bint may_start) noexcept:
    """Take a worker out of `resting` for the call of *one*, and bind it to *cpu*, or to none if that is
    EVERYWHERE. Return NULL if there is none; or if another *may_start*, and none that may run everywhere is
    asleep: one that is awake may wait for the processor of the hub."""
    cdef worker **link = &home.resting
    cdef worker **free = NULL
    cdef worker **bound = NULL
    cdef worker *it
    while link[0] != NULL and not (bound != NULL and bound[0].at.cpu == cpu):
        if link[0].at.cpu < 0:
            if free == NULL or cpu == EVERYWHERE and is_asleep(link[0]):
                free = link             # for a long call the one that has rested longest
        elif bound == NULL or link[0].at.cpu == cpu:
            bound = link
        link = &link[0].next
    cdef bint is_bound = cpu >= 0 and (home.bound >= inboxes() or bound != NULL and bound[0].at.cpu == cpu)
    link = bound if bound != NULL and is_bound or free == NULL else free
    if link == NULL or cpu == EVERYWHERE and may_start and (link == bound or not is_asleep(link[0])):
        return NULL
    it = link[0]
    link[0] = it.next
    if it.at.cpu == cpu:
        return it
    home.bound -= it.at.cpu >= 0
    if cpu >= 0 and home.bound < inboxes() and _may_bind:
        _bind(home, it, one, cpu)
    elif cpu == EVERYWHERE and it.at.cpu >= 0 and filters_allow():
        release_worker(&it.at)
    home.bound += it.at.cpu >= 0
    return it


cdef void _bind(pool *home, worker *it, job *one, int cpu) noexcept:
    global _may_bind
    cdef int error = bind_worker(&it.at, cpu) if filters_allow() else -EAGAIN
    if error == -EPERM or error == -EACCES or error == -ENOSYS:
        _may_bind = False
    if error:
        home.doubted[one.kind] = DOUBTED        # try again later


cdef _tell_of_no_thread(int error):
    global _told_of_no_thread
    if not _told_of_no_thread:
        _told_of_no_thread = True       # first: a handler may write to a file
        log.warning("can't start a thread: %s. Calls that need one block their hub, until one can be started. "
                    'pids.max, ulimit -u?', os.strerror(error))


cdef bint withdraw(Request request) noexcept:
    """Take *request* out of its pool's queue; False when a worker has it already."""
    cdef job *one = <job *>request.job
    cdef pool *home
    cdef bint waiting
    if one == NULL or one.home == NULL:
        return False
    home = <pool *>one.home
    pthread_mutex_lock(&home.lock)
    waiting = one.waiting
    if waiting:
        unlink(home, one)
    pthread_mutex_unlock(&home.lock)
    if waiting:
        take_back(one)
    return waiting


cdef bint _is_all_busy(pool *one) noexcept nogil:
    # Read without the lock: workers only make it better.
    return one.wary > 0 or one.limit > 0 and _busy(one) >= one.limit


cdef int _busy(pool *one) noexcept nogil:
    return one.queued + one.threads - one.idle


cdef bint any_busy() noexcept:
    """Whether some pool is all busy, or wary."""
    cdef pool *one = _newest
    while one != NULL:
        if _is_all_busy(one):
            return True
        one = one.older
    return False


def _after_fork_in_child():
    """The threads stayed with the parent, and may have held any lock."""
    global _newest
    _newest = NULL


listen(_after_fork_in_child)
