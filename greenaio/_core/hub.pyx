# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A hub has at most one driver: it is made on first use, and ends with the hub or with its thread.

    ==========================  ===================================================================
    event                       what happens to the driver
    ==========================  ===================================================================
    the first use in a thread   `current_driver` makes it, and a sentinel in a thread-local owns it
    the hub is destroyed        `HubDriver.close`, before gevent begins (see `greenaio._core.ends`)
    its thread ends             the sentinel is dropped, which closes it: gevent tells of no such end
    the process forks           `HubDriver.after_fork_in_child`, by the bell
    the interpreter ends        nothing: the end of the process frees what the kernel may still write
    ==========================  ===================================================================

After a close, greenlets still parked never return, as with every wait on a destroyed hub. Requests in flight keep
their memory until the kernel is done. io_destroy waits for that, so a native thread calls it.
"""

import logging
import sys

import gevent
from gevent._hub_local import get_hub_noargs
from gevent.monkey import get_original

from greenaio._config import check_environment, config
from greenaio._core.ends import before_destroy, forget

from cpython.ref cimport PyObject
from libc.errno cimport EAGAIN
from libc.stdint cimport int64_t, uint64_t

from greenaio._core.context cimport Context
from greenaio._core.driver cimport Driver
from greenaio._core.engine cimport Engine
from greenaio._core.fork cimport forked
from greenaio._core.mailbox cimport Inbox
from greenaio._core.request cimport Request, RequestList
from greenaio._core.tally cimport Tally
from greenaio._core.threads cimport withdraw

from greenaio._core import pools as _pools
from greenaio._core.bell import listen, ring

cdef extern from *:
    """
    static __thread PyObject *thread_driver;    /* borrowed: _Sentinel owns it */
    """
    PyObject *thread_driver

cdef extern from "<errno.h>":
    const int ECANCELED

# With fewer requests a context is not worth having.
cdef enum:
    DEPTH_MIN = 16

# Time between two attempts to get a context, which cost a few system calls, in ns.
cdef enum:
    ATTACH_AGAIN_NS = 1000000000

# Seconds that the end of a hub waits for the thread that frees its context to begin.
BEGIN_MAX = 1
# Seconds after EAGAIN with nothing in flight that could end it. The time doubles up to the maximum; then the
# requests take threads.
RETRY_MIN = 0.001
RETRY_MAX = 0.05

# Both loops call the event of a readable fd so.
cdef object READ = 1

log = logging.getLogger('greenaio')
_start_new_thread = get_original('_thread', 'start_new_thread')
_new_lock = get_original('_thread', 'allocate_lock')
_get_ident = get_original('_thread', 'get_ident')
_local = get_original('_thread', '_local')()
# The drivers of all threads; a driver that closes leaves.
cdef set _drivers = set()
# Engines of closed drivers, until the kernel is done with them.
cdef set _ending = set()
# The sum of the counters of all closed drivers.
cdef Tally _past = Tally()
_warned = False


cdef class _Sentinel:
    """Lives in a thread-local, so that the end of a thread closes its driver: gevent tells of no such end."""

    cdef HubDriver driver

    def __del__(self):
        global thread_driver
        if sys is None or sys.is_finalizing():
            # The end of the process frees the memory that the kernel may still write.
            thread_driver = NULL
        elif self.driver is not None:
            # In a forked child Python ends the other threads before any hook runs.
            _notice_fork()
            self.driver.close()


cdef HubDriver current_driver():
    """The driver of this thread's hub, made if there is none."""
    cdef HubDriver driver
    _notice_fork()
    if thread_driver != NULL:
        driver = <HubDriver>thread_driver
        if not driver.closed:
            return driver
    return _make_driver()


cdef HubDriver _make_driver():
    global thread_driver
    if sys.is_finalizing():
        raise RuntimeError('the interpreter is shutting down: no greenlet can wait any more')
    check_environment()
    driver = HubDriver(get_hub_noargs())
    if thread_driver != NULL and not (<HubDriver>thread_driver).closed:
        # Another greenlet was here while a handler logged our warning.
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
    thread_driver = <PyObject *>driver
    return driver


def get_driver():
    """Return the `Driver` of the current hub."""
    return current_driver()


def use_driver(HubDriver driver not None):
    """Give this thread *driver*, and return the one that it had. For tests with a kernel of their own."""
    global thread_driver
    cdef HubDriver before = current_driver()
    (<_Sentinel>_local.sentinel).driver = driver
    thread_driver = <PyObject *>driver
    return before


def driver_if_exists():
    """Return the `Driver` of the current hub, or None when it never did any I/O."""
    _notice_fork()
    if thread_driver != NULL and not (<HubDriver>thread_driver).closed:
        return <HubDriver>thread_driver
    return None


def all_drivers():
    """Return the drivers of all threads."""
    # In one step, because other threads add drivers and take them out.
    return list(_drivers)


def all_engines():
    """Return the engines of all threads, and those of ended threads that have something in flight."""
    return [(<HubDriver>driver).engine for driver in all_drivers()] + list(_ending)


def tally():
    """Return the counters of this process: the sum over all drivers, also over closed ones."""
    found = Tally().add(_past)
    for driver in all_drivers():
        found.add((<HubDriver>driver).engine)
    return found


cdef class HubDriver(Driver):
    """The driver of *hub*, over a context of the kernel. Raises OSError if no eventfd is to be had. If the kernel
    refuses only the context, ``native`` is False."""

    def __init__(self, hub, context=None, *, depth=None):
        Driver.__init__(self, hub, Context() if context is None else context,
                        config.depth if depth is None else depth)
        self._retry_after = RETRY_MIN
        self.attach()
        self._watcher = self._new_watcher()
        try:
            self._watcher.start(self._on_eventfd)
            # Before the hub's own end, because the watcher needs the loop.
            before_destroy(hub, self.close)
            _drivers.add(self)
        except BaseException:
            # Otherwise the loop would keep the watcher.
            self.close()
            raise

    def _new_watcher(self):
        loop = self.hub.loop
        # libuv's loop.io() is a proxy whose ref does nothing. The class behind it has a ref, and the watcher is
        # ours alone, because no other code watches our eventfd.
        io = loop._watchers.io if hasattr(loop, '_watchers') else type(loop).io
        return io(loop, self.engine.context.eventfd, READ, ref=False)

    cdef int attach(self) except -1:
        """Get a context of the kernel, with fewer requests if it must be; `native` says whether."""
        global _warned
        cdef Context context = self.engine.context
        cdef int depth = self.engine.depth
        cdef bint again = self._attach_again != 0
        asked = depth
        self.native = True
        self.must_attach = False
        self._attach_again = 0
        while not context.is_open:
            try:
                context.open(depth)
            except OSError as error:
                if error.errno == EAGAIN and depth // 2 >= DEPTH_MIN:
                    depth //= 2
                    continue
                self.native = False
                problem = error
                if error.errno == EAGAIN:
                    # Other processes have it all, and may end.
                    self._attach_again = context.now() + ATTACH_AGAIN_NS
                break
        if again:
            return self._attached_again(depth)
        if self.native:
            self.engine.depth = depth
            if depth == asked:
                return 0
            problem = f'only {depth} were to be had'
        self._tell('Fallback', str(problem), depth if self.native else 0, self.native)
        if not _warned:
            _warned = True
            log.warning(
                'native AIO, asked for %d requests in flight: %s%s. aio-nr is %s, aio-max-nr %s; '
                'if that is the cause: sysctl -w fs.aio-max-nr=1048576', asked, problem,
                '' if self.native else '; using threads, which are slower',
                _proc('aio-nr'), _proc('aio-max-nr'))
        return 0

    cdef int _attached_again(self, int depth) except -1:
        """Report the end of the lack of native AIO, after another attempt. Its beginning was reported before."""
        if self.native:
            self.engine.depth = depth
            self._tell('Fallback', 'to be had again', depth, True)
            self.hub.loop.run_callback(_log_in_greenlet, depth)
        return 0

    cpdef bint has_aio(self) except -1:
        """Return whether native AIO can be used. If it was used up, ask the kernel again, at most once a second."""
        if self.native:
            return True
        if self._attach_again == 0 or self.engine.context.now() < self._attach_again:
            return False
        self.attach()
        return self.native

    # The loop -------------------------------------------------------------------------------

    cdef int hold_loop(self) except -1:
        if not self._holds_loop:
            self._holds_loop = True
            if self._watcher is not None:
                self._watcher.ref = True
            if self._stuck is None and config.stuck_after:
                self._look_for_stuck()
        return 0

    cdef int let_go_of_loop(self) except -1:
        # Abandoned requests do not hold the loop. Otherwise hub.join() would wait for a frozen disk.
        if self._holds_loop and not self.closed:
            self._holds_loop = False
            if self._watcher is not None:
                self._watcher.ref = False
        return 0

    # Requests that take too long ----------------------------------------------------------------------

    cdef int _look_for_stuck(self) except -1:
        self._stuck = self.hub.loop.timer(config.stuck_after / 2, ref=False)
        self._stuck.start(self._on_stuck_timer)
        return 0

    def _on_stuck_timer(self):
        """Report each request that has been under way for too long, and look again while there is any request."""
        _notice_fork()
        cdef Engine engine = self.engine
        self._stuck.close()
        self._stuck = None
        if self.closed or not config.stuck_after:
            return
        for request, where, ns in engine.stuck(<uint64_t><int>config.stuck_after * 1000000000):
            self._tell('RequestStuck', request, where, ns / 1e9)
        if engine.requests():
            self._look_for_stuck()

    cdef int retry_soon(self) except -1:
        if self._retry is not None:
            return 0
        if self._retry_after > RETRY_MAX:
            self._retry_after = RETRY_MIN
            self.engine.refuse(EAGAIN)
            self.ask_for_pass()
        else:
            self._retry = self.hub.loop.timer(self._retry_after)
            self._retry.start(self._on_retry)
        return 0

    def _on_retry(self):
        _notice_fork()
        self._retry.close()
        self._retry = None
        if self.closed:
            return
        self._retry_after *= 2
        try:
            self.flush()
            if self._retry is None:
                self._retry_after = RETRY_MIN
        except BaseException:
            self._failed()
        finally:
            self.ask_for_pass()

    def _check(self):
        """Assert all that must hold between two turns of the loop, and of the engine too.

        E1: pending requests are submitted later, because a completion, a retry or the end of a section will come.
        D1: the watcher holds the loop exactly while a greenlet is parked. A pass may hold it a little longer."""
        cdef Engine engine = self.engine
        engine._check()
        if self.closed:
            return
        will_submit = self._retry is not None or self.turn_end is not None or self.sections or self.asked_for_pass
        assert not engine.pending.count or engine.in_flight.count or will_submit, 'pending for ever'
        assert self._holds_loop or not self.waiting, 'a greenlet waits, and the loop may end'
        assert not self._holds_loop or self.waiting or self.sections, 'held without a greenlet that waits'
        assert self._watcher is None or bool(self._watcher.ref) == self._holds_loop, 'the watcher says another thing'

    # Ends -----------------------------------------------------------------------------------

    def after_fork_in_child(self):
        """Cancel what was inherited; the kernel's context is made again at the next request.

        The watcher stays as it is, over a fresh eventfd: closing or stopping it here would abort the loop
        or rob the parent of its wake-ups. Only if its number is a file of the program by now, it has to go.
        Greenlets of the parent that waited get OSError(ECANCELED).
        """
        watched = self.engine.context.eventfd
        self.forks += 1
        self.engine.context.after_fork_in_child()
        inbox = Inbox(self.engine.context)
        # The parent's workers put their results into the parent's inbox.
        self.inbox.forget()
        self.inbox = inbox
        self.engine.cancel(ECANCELED)
        if self.hub.thread_ident != _get_ident():
            # Its thread stayed with the parent, so no greenlet waits here.
            self.closed = True
            _drivers.discard(self)
            _past.add(self.engine)
            return
        if self.engine.context.eventfd != watched and self.hub.loop is not None:
            # Otherwise the loop would watch the file of the program.
            self._stop(self._watcher)
            self._watcher = None
            # libuv's loop takes no watcher before it is forked as well.
            self.hub.loop.run_callback(self._watch_anew)
        self.must_attach = self.asked_for_pass = True
        self.engine.context.signal()

    def _watch_anew(self):
        if self.closed or self._watcher is not None:
            return
        self._watcher = self._new_watcher()
        self._watcher.ref = self._holds_loop
        self._watcher.start(self._on_eventfd)

    def close(self):
        """Stop watching and give everything back; called when the hub is destroyed or its thread ends.

        Greenlets still parked here never return, as with every gevent wait on a destroyed hub. Requests
        in flight keep their memory until the kernel is done, which a native thread waits for.
        """
        global thread_driver
        _notice_fork()
        if self.closed:
            return
        self.closed = True
        if thread_driver == <PyObject *>self:
            thread_driver = NULL
        # Every step is made, even if the one before it fails.
        try:
            _ending.add(self.engine)
        finally:
            _drivers.discard(self)
            _past.add(self.engine)
            try:
                self._stop_watching()
            finally:
                try:
                    self._give_up()
                finally:
                    self._end()
                if self.hub.thread_ident == _get_ident():
                    _pools.end_own_threads()

    def _stop_watching(self):
        # gevent keeps the hub of an ended thread for ever.
        forget(self.hub, self.close)
        self._stop(self.turn_end)
        self._stop(self._watcher)
        self._stop(self._retry)
        self._stop(self._stuck)

    def _stop(self, watcher):
        try:
            if watcher is not None:
                watcher.stop()
                watcher.close()
        except ValueError:
            # The loop is gone, and its watchers with it.
            pass

    def _give_up(self):
        self.engine.refuse(ECANCELED)
        self.engine.cancel_declined(-<int64_t>ECANCELED)
        self._abandon_all(self.engine.in_flight)
        self._abandon_all(self.engine.lent)
        for request in self.engine.ready:
            # A greenlet that is not parked looks at its request by itself.
            (<Request>request).abandoned = (<Request>request).waiter is not None
        _let_go(self.engine.ready)

    cdef int _abandon_all(self, RequestList requests) except -1:
        cdef Request request, following = requests.first()
        # There may be no memory for a list of them.
        while following is not None:
            request = following
            following = <Request>request.following if request.following != NULL else None
            # No greenlet ends here, because a parked greenlet has itself on its stack.
            request.waiter = None
            request.abandoned = True
            if not request.must_run and withdraw(request):
                self.engine.finish(request, -<int64_t>ECANCELED)
            else:
                request.meet()
        return 0

    def _end(self):
        self.inbox.stop_signalling()
        self.engine.context.close_eventfd()
        if not self.engine.context.is_open and self.engine.lent.count == 0:
            _ending.discard(self.engine)
            return
        begun = _new_lock()
        begun.acquire()
        try:
            _start_new_thread(_end_context, (self.engine, self.inbox, begun))
        except (RuntimeError, MemoryError):
            # There is no thread, or the interpreter ends. The end of the process frees the context.
            log.warning('no thread to free a native AIO context; it stays until the process ends')
            _leaked.append(self.engine)
            self.engine.forget_writes()
            _ending.discard(self.engine)
            return
        # An interpreter that ends frees the state of each thread, also of one that is being started, which then
        # crashes (python/cpython#110052). A thread that has begun finds out and ends. While the interpreter ends
        # none begins.
        if not sys.is_finalizing():
            begun.acquire(True, BEGIN_MAX)


# Engines whose memory the kernel may still write, until the process ends.
_leaked = []


def _end_context(Engine engine, Inbox inbox, begun):
    """Wait, in a native thread, for the disk; then release the memory that it was writing."""
    begun.release()
    engine.context.destroy()
    _let_go(engine.in_flight)
    inbox.wait()
    inbox.reap(engine)
    _let_go(engine.ready)
    _ending.discard(engine)


cdef int _let_go(RequestList requests) except -1:
    cdef Request request
    while requests.count:
        request = requests.popleft()
        request.release()
    return 0


def _log_in_greenlet(depth):
    """Log in a greenlet and not in the hub, because a handler may have to wait for its lock."""
    gevent.spawn(log.info, 'native AIO is to be had again: %d requests in flight', depth)


cdef inline _notice_fork():
    if forked():
        ring()


def _after_fork_in_child():
    # The threads that wait for their disks stayed with the parent.
    _ending.clear()
    for driver in list(_drivers):
        driver.after_fork_in_child()


def _proc(name):
    try:
        with open(f'/proc/sys/fs/{name}') as file:
            return file.read().strip()
    except OSError:
        return 'unknown'


listen(_after_fork_in_child)
