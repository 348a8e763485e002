# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The pools of this process: one for each device, shared by all hubs until `renew_threads` is called.

A thread inherits much from the thread that starts it: a Landlock domain, seccomp filters, namespaces, and
more. So threads that one hub has started may do things that another hub may not. Until `renew_threads` is
called all hubs share threads, which is right if all hubs may do the same. From then on each hub has threads
of its own, a *domain*. The hub starts them itself, so they have the restrictions that it has. The number of a
domain belongs to the thread of the hub and is never used again. The number of a thread would be.
"""

from greenaio._core.bell import listen

from greenaio._core.caller cimport forget_creations, forget_first_permitted
from greenaio._core.threads cimport Pool

cdef extern from *:
    """
    /* The domain of this thread. */
    static __thread long own_domain;    /* 0: none */
    """
    long own_domain

# The number of domains that there ever were. 0 until `renew_threads` is called.
cdef long _domains = 0
# The pools by device, or by device and domain. They are kept for the life of the process.
_pools = {}
# Pools whose memory is used again after their last thread has ended.
_retired = []


cdef Pool pool_of(device):
    """Return the pool of *device*, an ``st_dev``: one for all hubs, or since `renew_threads` one for each."""
    # The shared pools have plain keys, so the usual case makes no tuple.
    key = (device, _domain()) if _domains else device
    found = _pools.get(key)
    if found is None:
        found = _pools[key] = Pool(device, _used_pool())
    return found


cdef Pool lone_threads():
    """Return the pool for calls that wait for a peer and not for a disk. Each call has a thread of its own at
    once."""
    return pool_of(None)


cdef long _domain() noexcept:
    """Return the domain of this thread, a new one if it has none."""
    global own_domain, _domains
    if own_domain == 0:
        _domains += 1
        own_domain = _domains
    return own_domain


def renew_threads():
    """Let new native threads make the calls from now on, instead of the present ones.

    A native thread is born with the Landlock domain, the seccomp filters, the namespaces, the I/O priority
    and all else that the thread which started it had. Call this in a thread that has changed one of these for
    itself, after the change: its later calls are made by threads that begin as it is now. So are the calls of
    other threads, each by threads of its own.

    A present thread ends when it has made the calls that were asked for before. One that hangs in a call
    stays until the call returns."""
    # The thread has changed itself on purpose, so its present capabilities are the new beginning.
    forget_first_permitted()
    # The first call ends the threads that all hubs share. Each hub starts its own at its next call.
    if _domains == 0:
        _domain()
        for pool in list(_pools.values()):
            _retire(pool)
        _pools.clear()
    else:
        # Only the threads of this hub are older than the change. Those of other hubs stay.
        end_own_threads()
        _domain()


def end_own_threads():
    """Let the threads that only this thread's hub uses end, because the hub does."""
    global own_domain
    if own_domain == 0:
        return
    # With a domain each key is a pair, because `renew_threads` has dropped the pools without one.
    for key in [key for key in _pools if key[1] == own_domain]:
        _retire(_pools.pop(key))
    # A later call in this thread begins a new domain, whose number was never used.
    own_domain = 0


cdef _retire(Pool one):
    """Retire a pool, and keep it for later. A thread may hang in a call for ever, so no code waits for it
    here."""
    one.retire()
    try:
        _retired.append(one)
    except MemoryError:
        # Then its memory is not used again. Nothing else depends on it.
        pass


cdef Pool _used_pool():
    """Return a retired pool without threads, or None."""
    for one in _retired:
        # A pool may have a thread that hangs in a call. Its memory stays until the call returns.
        if (<Pool>one).is_over():
            _retired.remove(one)
            return one
    return None


def forgive():
    """Forget that calls on a device have waited in the hub."""
    for one in _pools.values():
        (<Pool>one).forgive()


def pools():
    """Return all pools there are."""
    return list(_pools.values())


def _after_fork_in_child():
    """Forget all pools. Their threads stayed with the parent, and may have held their locks. So the child
    does not use their memory again."""
    forget_first_permitted()
    forget_creations()
    _pools.clear()
    _retired.clear()


listen(_after_fork_in_child)
