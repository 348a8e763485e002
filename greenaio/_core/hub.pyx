# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A hub has at most one driver: it is made on first use, and ends with the hub or with its thread."""

import sys

from gevent._hub_local import get_hub_noargs
from gevent.monkey import get_original

from greenaio._config import check_environment

from cpython.ref cimport PyObject

from greenaio._core.dispatch cimport notice_fork
from greenaio._core.loop cimport HubDriver, drivers, past
from greenaio._core.tally cimport Tally

cdef extern from *:
    """
    static __thread PyObject *thread_driver;    /* borrowed: _Sentinel owns it */
    """
    PyObject *thread_driver

_local = get_original('_thread', '_local')()


cdef class _Sentinel:
    """Close the driver of a thread when the thread ends.

    It lives in a thread-local, because gevent tells of no such end."""

    cdef HubDriver driver

    def __del__(self):
        global thread_driver
        if sys is None or sys.is_finalizing():
            # Close nothing: the end of the process frees the memory that the kernel may still write. Only see
            # to it that no later finalizer uses the driver.
            thread_driver = NULL
        elif self.driver is not None:
            # In a forked child Python ends the other threads before any hook runs.
            # Hear of the fork first, which closes the drivers of those threads:
            # their context is the parent's, and must not be destroyed here.
            try:
                notice_fork()
                self.driver.close()
            finally:
                # The driver goes with this object. The thread may have another by now.
                if thread_driver == <PyObject *>self.driver:
                    thread_driver = NULL


# The life of a driver:
#
#     ==========================  ===================================================================
#     event                       what happens to the driver
#     ==========================  ===================================================================
#     the first use in a thread   `current_driver` makes it, and a sentinel in a thread-local owns it
#     the hub is destroyed        `HubDriver.close`, before gevent begins (see `greenaio._core.ends`)
#     its thread ends             the sentinel is dropped, which closes it: gevent tells of no such end
#     the process forks           `HubDriver.after_fork_in_child`, by the bell
#     the interpreter ends        nothing: the end of the process frees what the kernel may still write
#     ==========================  ===================================================================
cdef HubDriver current_driver():
    """Return the driver of this thread's hub, which is made if there is none.

    Raises RuntimeError while the interpreter shuts down, and OSError if no eventfd can be had."""
    cdef HubDriver driver
    # A child must not find the driver of its parent as it was.
    notice_fork()
    # Each operation comes here, so this is a C variable of the thread, not a look into a Python thread-local.
    # The hub may have been destroyed since, and its thread may have another hub by now.
    if thread_driver != NULL:
        driver = <HubDriver>thread_driver
        if not driver.closed:
            return driver
    return _make_driver()


cdef HubDriver _make_driver():
    """Make the driver of this thread's hub, and a sentinel that owns it."""
    global thread_driver
    # A driver needs a native thread at its end, and none can begin while the interpreter ends.
    if sys.is_finalizing():
        raise RuntimeError('the interpreter is shutting down: no greenlet can wait any more')
    check_environment()
    driver = HubDriver(get_hub_noargs())
    if thread_driver != NULL and not (<HubDriver>thread_driver).closed:
        # A handler that logs our warning may switch to another greenlet, and that one has made a driver. Each
        # hub has one driver, so take the other.
        driver.close()
        return <HubDriver>thread_driver
    cdef _Sentinel sentinel
    try:
        sentinel = _Sentinel()
        sentinel.driver = driver
        _local.sentinel = sentinel
    except BaseException:
        driver.close()
        raise
    # The pointer is borrowed, so set it only now that the sentinel owns the driver.
    thread_driver = <PyObject *>driver
    return driver


def get_driver():
    """Return the `Driver` of the current hub."""
    return current_driver()


def use_driver(HubDriver driver not None):
    """Give this thread *driver*, and return the driver that it had. For tests with a kernel of their own."""
    global thread_driver
    cdef HubDriver before = current_driver()
    # The sentinel owns the driver, and `thread_driver` only borrows it. So change both.
    (<_Sentinel>_local.sentinel).driver = driver
    thread_driver = <PyObject *>driver
    return before


def driver_if_exists():
    """Return the `Driver` of the current hub, or None if the hub has not done any I/O."""
    notice_fork()
    if thread_driver != NULL and not (<HubDriver>thread_driver).closed:
        return <HubDriver>thread_driver
    return None


def all_drivers():
    """Return the drivers of all threads."""
    # Copy the set in one step, because other threads add drivers and take them out.
    return list(drivers)


def tally():
    """Return the counters of this process: the sum over all drivers, also over closed ones."""
    # A closed driver leaves its counters in `past` and goes out of the set, so each event counts once.
    found = Tally().add(past)
    for driver in all_drivers():
        found.add((<HubDriver>driver).engine)
    return found
