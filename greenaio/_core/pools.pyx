# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The pools of this process: one for each device, shared by all hubs until `renew_threads` is called.

A thread inherits much from the thread that starts it: a Landlock domain, seccomp filters, namespaces, and more. So threads
that one hub has started may do what another hub may not. Until `renew_threads` is called all hubs share threads,
which is right if all hubs may do the same. From then on each hub has threads of its own, a *domain*. The hub
starts them itself, so they have what it has. The number of a domain belongs to the thread of the hub and is never
used again. The number of a thread would be.
"""

from greenaio._core.bell import listen

from greenaio._core.caller cimport forget_first_permitted
from greenaio._core.threads cimport Pool

cdef extern from *:
    """
    static __thread long own_domain;    /* 0: none */
    """
    long own_domain

cdef long _domains = 0                  # how many there were
_pools = {}                             # by device, or by device and domain; kept for the life of the process
_retired = []                           # to be used again, when their last thread has ended


cdef Pool pool_of(device):
    """Return the pool of *device*, an ``st_dev``: one for all hubs, or since `renew_threads` one for each."""
    key = (device, _domain()) if _domains else device
    found = _pools.get(key)
    if found is None:
        found = _pools[key] = Pool(device, _used_pool())
    return found


cdef Pool lone_threads():
    """Return the pool for calls that wait for something that is no disk: each has a thread of its own at once."""
    return pool_of(None)


cdef long _domain() noexcept:
    global own_domain, _domains
    if own_domain == 0:
        _domains += 1
        own_domain = _domains
    return own_domain


def renew_threads():
    """Let new native threads make the calls from now on, instead of the present ones.

    A native thread is born with the Landlock domain, the seccomp filters, the namespaces, the I/O priority and all
    else that the thread which started it had. Call this in a thread that has changed one of these for itself, after
    the change: its later calls are made by threads that begin as it is now. So are the calls of other threads,
    each by threads of its own.

    A present thread ends when it has made the calls that were asked for before. One that hangs in a call stays until
    the call returns."""
    forget_first_permitted()
    if _domains == 0:
        _domain()
        for pool in list(_pools.values()):
            _retire(pool)
        _pools.clear()
    else:
        end_own_threads()
        _domain()


def end_own_threads():
    """Let the threads that only this thread's hub uses end, because the hub does."""
    global own_domain
    if own_domain == 0:
        return
    for key in [key for key in _pools if key[1] == own_domain]:
        _retire(_pools.pop(key))
    own_domain = 0


cdef _retire(Pool one):
    one.retire()
    try:
        _retired.append(one)
    except MemoryError:                 # then it is not used again
        pass


cdef Pool _used_pool():
    """Return a retired pool without threads, or None."""
    for one in _retired:
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
    """The threads stayed with the parent."""
    forget_first_permitted()
    _pools.clear()
    _retired.clear()


listen(_after_fork_in_child)
