# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The driver of a hub has its part in the loop: a watcher of the eventfd, and two timers.

It asks the kernel for the context at its first request, and again in a forked child. After a close, greenlets
still parked never return, as with every wait on a destroyed hub.
"""

import logging

import gevent
from gevent.monkey import get_original

from greenaio._config import config
from greenaio._core.ends import before_destroy, forget

from libc.errno cimport EAGAIN
from libc.stdint cimport uint64_t

from greenaio._core.context cimport Context
from greenaio._core.dispatch cimport notice_fork
from greenaio._core.driver cimport Driver
from greenaio._core.engine cimport Engine
from greenaio._core.mailbox cimport Inbox
from greenaio._core.shutdown cimport give_up
from greenaio._core.tally cimport Tally

from greenaio._core import pools as _pools
from greenaio._core.bell import listen
from greenaio._core.shutdown import leave

cdef extern from "<errno.h>":
    const int ECANCELED

# The smallest depth that the kernel is asked for. With fewer requests a context is not worth having.
cdef enum:
    DEPTH_MIN = 16

# The time between two attempts to get a context, which cost a few system calls, in ns.
cdef enum:
    ATTACH_AGAIN_NS = 1000000000

# The seconds after which the driver submits again, if io_submit answered EAGAIN and nothing is in flight that
# could end the lack. The time doubles up to the maximum. Then the requests that have another way take
# threads, and the others end with EAGAIN.
RETRY_MIN = 0.001
RETRY_MAX = 0.05

# The event of a readable fd. libev and libuv use the same number.
cdef object READ = 1

log = logging.getLogger('greenaio')
_get_ident = get_original('_thread', 'get_ident')
# The drivers of all threads. A driver that closes leaves this set.
cdef set drivers = set()
# The sum of the counters of all closed drivers.
cdef Tally past = Tally()
# The lack of native AIO was logged. Every hub has the same lack, so one message is enough.
_warned = False


cdef class HubDriver(Driver):
    """Drive the requests of *hub*, with a context of the kernel and a watcher in the loop.

    *depth* is the number of requests in flight, by default `config.depth`. Raises OSError if no eventfd can
    be had. If the kernel refuses only the context, `native` is False, and threads make all calls."""

    def __init__(self, hub, context=None, *, depth=None):
        Driver.__init__(self, hub, Context() if context is None else context,
                        config.depth if depth is None else depth)
        self._retry_after = RETRY_MIN
        # Without a context this sets `native` to False and goes on. Only a lack of the eventfd is an error,
        # and that was raised above.
        self.attach()
        self._watcher = self._new_watcher()
        try:
            self._watcher.start(self._on_eventfd)
            # gevent destroys the loop at the end of a hub. Close
            # before that, because the watcher needs the loop.
            before_destroy(hub, self.close)
            drivers.add(self)
        except BaseException:
            # Otherwise the loop would keep the watcher, and call a driver that no code knows.
            self.close()
            raise

    def _new_watcher(self):
        """Return a watcher of the eventfd, not started. It does not hold the loop before `hold_loop`."""
        loop = self.hub.loop
        # gevent's loop.io() for libuv returns a proxy whose `ref` does nothing, because several watchers of
        # an fd share one handle there. The class behind the proxy has a `ref` that works. The handle is ours
        # alone, because no other code watches our eventfd.
        io = loop._watchers.io if hasattr(loop, '_watchers') else type(loop).io
        return io(loop, self.engine.context.eventfd, READ, ref=False)

    # The kernel allows all processes together `aio-max-nr` requests. io_setup fails with EAGAIN if they are
    # used up. Then the driver asks for half as many, down to `DEPTH_MIN`. Without a context it works with
    # threads, and asks again at most once in `ATTACH_AGAIN_NS`. Other errors, such as ENOSYS or EPERM in a
    # sandbox, will not go away.
    cdef int attach(self) except -1:
        """Get a context from the kernel, with fewer requests if needed. `native` says whether there is one."""
        cdef Context context = self.engine.context
        cdef int depth = self.engine.depth
        cdef bint again = self._attach_again != 0
        asked = depth
        # Set the flags first. The report and the log below may run code that uses this driver.
        self.native = True
        self.must_attach = False
        self._attach_again = 0
        # An open context is kept, so a second call is harmless.
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
                    # Other processes have all requests that the kernel allows, and may end.
                    self._attach_again = context.now() + ATTACH_AGAIN_NS
                break
        # The lack was reported when it began.
        if again:
            return self._attached_again(depth)
        if self.native:
            # The engine must not have more in flight than the context was made for.
            self.engine.depth = depth
            if depth == asked:
                return 0
            problem = f'only {depth} were to be had'
        self._tell('Fallback', str(problem), depth if self.native else 0, self.native)
        _warn(asked, problem, self.native)
        return 0

    cdef int _attached_again(self, int depth) except -1:
        """Report that native AIO can be had again, if another attempt has succeeded."""
        if self.native:
            self.engine.depth = depth
            self._tell('Fallback', 'to be had again', depth, True)
            self.hub.loop.run_callback(_log_in_greenlet, depth)
        return 0

    cpdef bint has_aio(self) except -1:
        """Return whether native AIO can be used.

        If it was used up before, ask the kernel again, at most once a second."""
        if self.native:
            return True
        # 0 means that the kernel or a sandbox refuses native AIO altogether.
        if self._attach_again == 0 or self.engine.context.now() < self._attach_again:
            return False
        self.attach()
        return self.native

    # The loop -------------------------------------------------------------------------------

    cdef int hold_loop(self) except -1:
        """Keep the loop running, because a greenlet is parked.

        The watcher is in the loop all the time. Only its `ref` changes, which costs less than to start and
        stop it."""
        if not self._holds_loop:
            self._holds_loop = True
            if self._watcher is not None:
                self._watcher.ref = True
            # The timer ends by itself when no request is under way. The next greenlet that waits starts it.
            if self._stuck is None and config.stuck_after:
                self._look_for_stuck()
        return 0

    cdef int let_go_of_loop(self) except -1:
        """Let the loop end, because no greenlet is parked."""
        # Abandoned requests do not hold the loop. Otherwise hub.join() would wait for a frozen disk.
        if self._holds_loop and not self.closed:
            self._holds_loop = False
            if self._watcher is not None:
                self._watcher.ref = False
        return 0

    # Requests that take too long ----------------------------------------------------------------------

    cdef int _look_for_stuck(self) except -1:
        """Look for requests that take too long after a while.

        At half of the limit each time, a stuck request is reported after one and a half of the limit at the
        latest. The timer does not keep the loop running, because only a greenlet that waits does so."""
        self._stuck = self.hub.loop.timer(config.stuck_after / 2, ref=False)
        self._stuck.start(self._on_stuck_timer)
        return 0

    def _on_stuck_timer(self):
        """Report each request that is under way for too long, and look again while there is any request."""
        notice_fork()
        cdef Engine engine = self.engine
        # The timer has run once. A new one is made below, if there is anything to look for.
        self._stuck.close()
        self._stuck = None
        if self.closed or not config.stuck_after:
            return
        for request, where, ns in engine.stuck(<uint64_t><int>config.stuck_after * 1000000000):
            self._tell('RequestStuck', request, where, ns / 1e9)
        # Abandoned requests count: an operator hears of a frozen disk even if no greenlet waits.
        if engine.requests():
            self._look_for_stuck()

    cdef int retry_soon(self) except -1:
        """Flush again after a while, because no completion will come that could do it.

        Each attempt waits twice as long as the one before. After the last one the driver gives up: requests
        that have another way are declined, and a pass moves them to threads. The others end with EAGAIN."""
        # A timer runs already, and one is enough for all pending requests.
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
        """Flush again. If that fails in the same way, `flush` has started the next timer."""
        notice_fork()
        self._retry.close()
        self._retry = None
        if self.closed:
            return
        # First, because the flush uses it.
        self._retry_after *= 2
        try:
            self.flush()
            # The kernel took the requests.
            if self._retry is None:
                self._retry_after = RETRY_MIN
        except BaseException:
            self.failed()
        finally:
            self.ask_for_pass()

    def _check(self):
        """Assert all that must hold between two turns of the loop, and of the engine too. For tests.

        E1: pending requests are submitted later, because a completion, a retry or the end of a turn or pass
        will come.

        D1: the watcher holds the loop while a greenlet is parked. A pass may hold it a little longer."""
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

    # A fork copies what this process has, but not what the kernel and the threads have:
    #
    #     ==================  ======================================  ==================================
    #     part                in the parent                           in the child
    #     ==================  ======================================  ==================================
    #     the context         goes on                                 forgotten, never destroyed
    #     the eventfd         goes on                                 a fresh one under the same numbers
    #     native threads      go on, and fill the parent's inbox      there are none
    #     requests            go on                                   done with ECANCELED
    #     parked greenlets    get their results                       copies get OSError (ECANCELED)
    #     ==================  ======================================  ==================================
    #
    # The watcher stays as it is, over a fresh eventfd. To close or stop it here would abort the loop, or take
    # wake-ups from the parent. It has to go only if its number is a file of the program by now.
    def after_fork_in_child(self):
        """Cancel all inherited requests. The context of the kernel is made again at the next request."""
        watched = self.engine.context.eventfd
        self.forks += 1
        # The context comes first, because the new inbox signals its fresh eventfd.
        self.engine.context.after_fork_in_child()
        inbox = Inbox(self.engine.context)
        # The workers of the parent put their results into the inbox of the parent. Do not free our copy in
        # the usual way: a worker may have held its lock at the fork, and here that lock is held for ever.
        self.inbox.forget()
        self.inbox = inbox
        self.engine.cancel(ECANCELED)
        if self.hub.thread_ident != _get_ident():
            # Its thread stayed with the parent, so no greenlet waits here. Its watcher and its loop are left
            # alone, because no code will run that loop.
            self.closed = True
            drivers.discard(self)
            past.add(self.engine)
            return
        if self.engine.context.eventfd != watched and self.hub.loop is not None:
            # Otherwise the loop would watch the file of the program.
            self._stop(self._watcher)
            self._watcher = None
            # libuv's loop takes no watcher before it has been told of the fork as well. So the new watcher is
            # made in the next turn of the loop.
            self.hub.loop.run_callback(self._watch_anew)
        # Copies of greenlets wait for the cancelled requests, so the next turn of the loop has to run a pass.
        # There is no context before the first request of the child, because many children never do I/O.
        self.must_attach = self.asked_for_pass = True
        self.engine.context.signal()

    def _watch_anew(self):
        """Watch the fresh eventfd, in a child where the old number is a file of the program."""
        if self.closed or self._watcher is not None:
            return
        self._watcher = self._new_watcher()
        # A greenlet may be parked here by now.
        self._watcher.ref = self._holds_loop
        self._watcher.start(self._on_eventfd)

    def close(self):
        """Stop watching and give everything back, because the hub is destroyed or its thread ends.

        Greenlets that are still parked here never return, as with every gevent wait on a destroyed hub.
        Requests in flight keep their memory until the kernel is done, and a native thread waits for that. A
        second call does nothing.
        """
        notice_fork()
        if self.closed:
            return
        # Set this first. The steps below may run any code, and from here on that code gets another driver,
        # and no pass runs here.
        self.closed = True
        drivers.discard(self)
        past.add(self.engine)
        # Every step is made, even if the one before it fails. First the loop, so that it calls nothing here
        # any more. Then the requests that have not begun. At last the context, which may have to wait for the
        # disk.
        try:
            self._stop_watching()
        finally:
            try:
                give_up(self.engine)
            finally:
                leave(self.engine, self.inbox)
            # Threads that belong to this hub alone have no more
            # work. Only the thread of the hub knows which they are.
            if self.hub.thread_ident == _get_ident():
                _pools.end_own_threads()

    def _stop_watching(self):
        """Stop all that may call this driver from the loop."""
        # gevent keeps the hub of an ended thread for ever, and with it `close` and the driver.
        forget(self.hub, self.close)
        self._stop(self.turn_end)
        self._stop(self._watcher)
        self._stop(self._retry)
        self._stop(self._stuck)

    def _stop(self, watcher):
        """Stop *watcher*, which may be None."""
        try:
            if watcher is not None:
                watcher.stop()
                watcher.close()
        except ValueError:
            # The loop is destroyed already, and its watchers with it.
            pass


cdef _warn(int asked, problem, bint native):
    """Log, once for the life of the process, that there is less native AIO than the *asked* requests."""
    global _warned
    # Set it before the log call, because a handler may use files, and come here again in another hub.
    if not _warned:
        _warned = True
        log.warning(
            'native AIO, asked for %d requests in flight: %s%s. aio-nr is %s, aio-max-nr %s; '
            'if that is the cause: sysctl -w fs.aio-max-nr=1048576', asked, problem,
            '' if native else '; using threads, which are slower', _proc('aio-nr'), _proc('aio-max-nr'))


def _log_in_greenlet(depth):
    """Log in a greenlet and not in the hub, because a handler may have to wait for its lock."""
    gevent.spawn(log.info, 'native AIO is to be had again: %d requests in flight', depth)


def _proc(name):
    """Return the value of a setting in /proc/sys/fs, or 'unknown'."""
    try:
        with open(f'/proc/sys/fs/{name}') as file:
            return file.read().strip()
    except OSError:
        return 'unknown'


def _after_fork_in_child():
    """Make the drivers fit for this process. The bell calls this in each forked child."""
    # A driver of another thread leaves the set during the loop.
    for driver in list(drivers):
        driver.after_fork_in_child()


# The modules of files, which import this one, hear of a fork after the drivers.
listen(_after_fork_in_child)
