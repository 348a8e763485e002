# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""`Driver._park` is the only code that parks a greenlet; it and `Driver._wake` are all that switches.

One driver per hub, made on first use. It submits what greenlets ask for, waits for the eventfd with a
gevent watcher, and hands results over. Switching follows one rule: *only a drain pass switches into a
greenlet, and only into one that is parked on that very request*. So a request that finishes inside its own
submission never switches, and nothing recurses however deep submissions complete in line: completions
go to one queue (`Engine.ready`) and one pass in the hub (`Driver._drain`) resumes from it. A greenlet that
parks during the pass goes straight to the next in that queue, where the hub, which waits in `_wake`
meanwhile, would go next anyway: one switch for a request instead of two.
"""

import logging
import os
import sys

import gevent
from gevent._hub_local import get_hub_noargs
from gevent.exceptions import BlockingSwitchOutError, InvalidSwitchError
from gevent.monkey import get_original

from greenaio._config import check_environment, config
from greenaio._core.ends import before_destroy, forget, thrown
from greenaio._core.uninterrupted import REFUSED, inside

from cpython.ref cimport PyObject
from libc.errno cimport EAGAIN, EIO, ENOMEM

from greenaio._core.context cimport BATCH_MAX, Context
from greenaio._core.engine cimport (
    CALL, DECLINED, DONE, IN_FLIGHT, NEW, Engine, Request, RequestList, State, new_request,
)
from greenaio._core.fork cimport forked
from greenaio._core.job cimport as_call, make_here
from greenaio._core.mailbox cimport Inbox
from greenaio._core.tally cimport Tally
from greenaio._core.threads cimport Pool, withdraw

from greenaio._core import pools as _pools
from greenaio._core.bell import listen, ring

cdef extern from *:
    """
    #include "greenlet/greenlet.h"

    static __thread PyObject *thread_driver;    /* borrowed: _Sentinel owns it */

    static inline int greenlet_import(void)
    { PyGreenlet_Import(); return _PyGreenlet_API == NULL ? -1 : 0; }
    static inline PyObject *greenlet_current(void)
    { return (PyObject *)PyGreenlet_GetCurrent(); }
    static inline PyObject *greenlet_switch(PyObject *to)   /* borrowed */
    { return PyGreenlet_Switch((PyGreenlet *)to, NULL, NULL); }
    """
    PyObject *thread_driver
    int greenlet_import() except -1
    object greenlet_current()
    object greenlet_switch(PyObject *to)

greenlet_import()

cdef extern from "<errno.h>":
    const int ECANCELED

cdef enum:
    RUN_MAX = 64                # greenlets woken before the loop has its turn again ...
    HITS_UNTIMED = 8            # for the clock is a tenth of what a hit costs
    HITS_MAX = 256              # or as many operations done in line, which cost less than a wake ...
    RUN_MAX_NS = 200000         # ... or this long: draining to empty starved a 1 ms ticker
    POLL_MIN_NS = 4000          # where a spin starts, as in QEMU
    BURST = 8                   # outside of a pass a turn is short: what comes together goes together
    DEPTH_MIN = 16              # below that a context is not worth having
    ATTACH_AGAIN_NS = 1000000000        # between attempts to get one, which cost a few system calls

BEGIN_MAX = 1                   # seconds that the end of a hub waits for the thread that frees its context to begin
RETRY_MIN = 0.001               # seconds: EAGAIN with nothing in flight that could end it; doubles ...
RETRY_MAX = 0.05                # ... to this: then a thread is asked

cdef object READ = 1            # what both loops call it

log = logging.getLogger('greenaio')
_start_new_thread = get_original('_thread', 'start_new_thread')
_new_lock = get_original('_thread', 'allocate_lock')
_get_ident = get_original('_thread', 'get_ident')
_local = get_original('_thread', '_local')()
cdef dict _inside = inside              # greenlets that must not be parked
cdef set _drivers = set()               # of all threads; close() takes one out
cdef set _ending = set()                # engines of drivers that are closed, until the kernel is done with them
cdef Tally _past = Tally()              # what those had done that are closed
_warned = False
cdef object _report = None              # what `report_to` was given


def report_to(function):
    """Call ``function(hub, name, *facts)`` for each fact that an operator may want to know.

    It is called at once, in the middle of the driver's work: it must not run code of the program, but may have
    the loop of *hub* call that later."""
    global _report
    _report = function


cdef class _Sentinel:
    """Lives in a thread-local, so that a thread's end, of which gevent tells nobody, closes its driver."""

    cdef Driver driver

    def __del__(self):
        global thread_driver
        if sys is None or sys.is_finalizing():
            thread_driver = NULL        # the process's end frees what the kernel may still write
        elif self.driver is not None:
            _notice_fork()              # there Python ends the other threads before any hook runs
            self.driver.close()


cdef Driver current_driver():
    """The driver of this thread's hub, made if there is none."""
    cdef Driver driver
    _notice_fork()
    if thread_driver != NULL:
        driver = <Driver>thread_driver
        if not driver.closed:
            return driver
    return _make_driver()


cdef Driver _make_driver():
    global thread_driver
    if sys.is_finalizing():
        raise RuntimeError('the interpreter is shutting down: no greenlet can wait any more')
    check_environment()
    driver = Driver(get_hub_noargs())
    if thread_driver != NULL and not (<Driver>thread_driver).closed:
        driver.close()                  # another greenlet was here while a handler logged our warning
        return <Driver>thread_driver
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


def use_driver(Driver driver not None):
    """Make *driver* that of this thread, and return the one before. For tests with a kernel of their own."""
    global thread_driver
    cdef Driver before = current_driver()
    (<_Sentinel>_local.sentinel).driver = driver
    thread_driver = <PyObject *>driver
    return before


def driver_if_exists():
    """Return the `Driver` of the current hub, or None when it never did any I/O."""
    _notice_fork()
    if thread_driver != NULL and not (<Driver>thread_driver).closed:
        return <Driver>thread_driver
    return None


def all_drivers():
    """Return the drivers of all threads."""
    return list(_drivers)               # in one go: other threads add and take out


def all_engines():
    """Return the engines of all threads, and those of ended threads that have something in flight."""
    return [(<Driver>driver).engine for driver in all_drivers()] + list(_ending)


def tally():
    """Return what all drivers of this process have done, closed ones too."""
    found = Tally().add(_past)
    for driver in all_drivers():
        found.add((<Driver>driver).engine)
    return found


cdef class Ways:
    """An object that knows the ways of a request: its `Request.file`, if it `may_move`."""

    cpdef int next_way(self, Driver driver, Request request, int64_t result, bint asked) except -1:
        """Choose the `Way` that *request* goes next.

        The kernel's answer was *result*: minus an errno; or, only if the request was *asked* not to wait, fewer bytes
        than wanted, which this adds to `Request.done`."""
        raise NotImplementedError

    cpdef Pool pool(self):
        """Return the threads that make its calls."""
        raise NotImplementedError


cdef class Driver:
    """Native AIO for one hub: `perform` is all of it.

    Not for other threads than the hub's own. Raises OSError when there is no eventfd to be had; when the
    kernel refuses only the context, ``native`` is False.
    """

    def __init__(self, hub, context=None, *, depth=None):
        self.hub = hub
        self._retry_after = RETRY_MIN
        self.engine = Engine(Context() if context is None else context,
                             config.depth if depth is None else depth)
        self.inbox = Inbox(self.engine.context)
        self.engine.burst = BURST
        self._attach()
        self._watcher = self._new_watcher()
        try:
            self._watcher.start(self._on_eventfd)
            before_destroy(hub, self.close)     # first: it watches through the loop
            _drivers.add(self)
        except BaseException:           # or the loop would keep it
            self.close()
            raise

    def _new_watcher(self):
        loop = self.hub.loop
        # libuv's loop.io() is a proxy whose ref does nothing. The class behind it has a ref, and the watcher is
        # ours alone, because no other code watches our eventfd.
        io = loop._watchers.io if hasattr(loop, '_watchers') else type(loop).io
        return io(loop, self.engine.context.eventfd, READ, ref=False)

    cdef int _attach(self) except -1:
        """Get a context of the kernel, with fewer requests if it must be; `native` says whether."""
        global _warned
        cdef Context context = self.engine.context
        cdef int depth = self.engine.depth
        cdef bint again = self._attach_again != 0
        asked = depth
        self.native = True
        self._reattach = False
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
                if error.errno == EAGAIN:       # others have it all, and may end
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
        """The kernel was asked again: the loss was told already, so only tell of its end."""
        if self.native:
            self.engine.depth = depth
            self._tell('Fallback', 'to be had again', depth, True)
            self.hub.loop.run_callback(_log_in_greenlet, depth)
        return 0

    cpdef bint has_aio(self) except -1:
        """Whether native AIO is to be had. If it was used up, ask the kernel again, at most once a second."""
        if self.native:
            return True
        if self._attach_again == 0 or self.engine.context.now() < self._attach_again:
            return False
        self._attach()
        return self.native

    # A request, seen from its greenlet ------------------------------------------------------

    cdef int64_t perform(self, Request request) except? -4096:
        """Enqueue, park until it is done, return bytes moved or minus the errno.

        If the greenlet is killed or timed out meanwhile, the exception goes up at once: a request that
        the kernel has not got is withdrawn, any other is abandoned to finish by itself, buffers pinned.
        An abandoned write may still happen. Raises BlockingSwitchOutError in the hub.
        """
        cdef Engine engine = self.engine
        current = self._caller()
        if self._reattach:
            self._attach()              # after a fork: the first use here
        if engine.enqueue(request):
            self._flush()
            if self._sections == 0 and request.state != DONE:
                self._poll()
        else:
            self._end_turn_soon()
        return self._result(request, current, engine.submitted_ns)     # if it is done, it was submitted here

    cdef int64_t perform_by_thread(self, Request request, Pool pool) except? -4096:
        """`perform`, by a native thread of *pool*: the same rules, the same result.

        A call that no thread has begun with is withdrawn when the greenlet is killed. Where no thread can be
        started, it is the plain call, and blocks. An open that may wait for ever stays NEW instead, and the
        result is -EAGAIN.
        """
        current = self._caller()
        if not self._lend(request, pool):
            return -EAGAIN
        return self._result(request, current)

    cdef bint _lend(self, Request request, Pool pool) except -1:
        cdef int64_t result
        request.hold()
        cdef State before = request.state
        if pool.submit(request, self.inbox):    # no Python code ran in there, nor before it is in a list
            self.engine.lend(request)
            if self.inbox.look(self.engine) and self.engine.ready.count > (request.state == DONE):
                self._ask_for_pass()    # others are done as well
            return True
        if request.gives_fd and pool.device is None:
            return False
        if request.state != before:
            return True                 # it ended while the lack of a thread was logged
        self.engine.lend(request)
        try:
            result = make_here(request)
        except BaseException:           # of a signal handler
            if request.state == IN_FLIGHT:
                self.engine.take_back(request)
            raise
        if request.state == IN_FLIGHT:
            self.engine._finish(request, result)
        return True

    # From way to way ------------------------------------------------------------------------

    cdef int _move_declined(self) except -1:
        """Move the requests that the kernel declined to their next ways. Their greenlets stay parked.

        The code that chooses a way may run any Python code, such as a finalizer. During the choice the request is in
        `Engine.moving`. A kill withdraws it from there, a fork or the end of the hub cancels it, and then it goes no
        way. From the choice until the request is in another list no Python code runs.

        At most `RUN_MAX` are moved at once. The rest waits for a pass."""
        cdef Engine engine = self.engine
        cdef int n = min(engine.declined.count, <int>RUN_MAX)
        cdef int waited = engine.pending.count
        while n > 0 and engine.declined.count and not self.closed:
            n -= 1
            self._move(engine.next_declined())
        if not self.closed:
            if engine.pending.count > waited:
                self._end_turn_soon()
            if self._sections == 0:
                self._ask_for_pass()
        return 0

    cdef int _move(self, Request request) except -1:
        cdef Engine engine = self.engine
        cdef Ways ways
        cdef Pool pool = None
        cdef int way
        try:
            ways = <Ways?>request.file
            way = ways.next_way(self, request, request._result, request.stop_asking())
            if way == THREAD and request.state == DECLINED:
                as_call(request)
                pool = ways.pool()
            if request._list == <void *>engine.moving:
                self._move_to(way, request, pool)
        except BaseException as error:
            is_memory = isinstance(error, MemoryError)
            if request.state == DECLINED or request.state == NEW and not request.abandoned:
                engine.settle(request, -<int64_t>ENOMEM if is_memory else -<int64_t>EIO)
            if not is_memory:
                self.hub.handle_error(self, *sys.exc_info())
        return 0

    cdef int _move_to(self, int way, Request request, Pool pool) except -1:
        if way == NONE:
            self.engine.settle(request, request._result)
        elif way == THREAD:
            self._lend(request, pool)
        else:
            if way == ASK:
                request.ask()
            self.engine.enqueue_again(request)
        return 0

    cdef int begin(self, Request request, bint more) except -1:
        """The first half of `perform`: submit now, wait for nothing. `end` is the other; who never calls it
        has abandoned the request, which goes on to its own end. With *more* coming at once, it goes out with that."""
        self._caller()
        if self._reattach:
            self._attach()
        request.stays = True
        self.engine.enqueue(request)
        if more and self.engine.pending.count < BATCH_MAX:
            return self._end_turn_soon()
        self._flush()
        self._unready(request)
        return self._ask_for_pass()

    cdef int _unready(self, Request request) except -1:
        if request.state == DONE and request._list != NULL:
            self.engine.ready.remove(request)   # nobody is to be woken: it takes no place in a pass
            request.release()
        return 0

    cdef int begin_by_thread(self, Request request, Pool pool) except -1:
        self._caller()
        request.stays = True
        self._lend(request, pool)
        self._unready(request)
        return 0

    cdef int let_run(self, Request request, Pool pool) except -1:
        """Have a thread of *pool* make the call of *request*, and wait for nothing. From anywhere in the hub's
        thread."""
        self._lend(request, pool)
        if self._sections == 0:
            self._ask_for_pass()
        return 0

    cdef int64_t end(self, Request request) except? -4096:
        """Wait for what `begin` began; return bytes moved or minus the errno. Once, for each request; but if this
        greenlet is killed, the request goes on, and `end` may be called again."""
        current = self._caller()
        cdef int64_t result
        if request.state != DONE:
            self._flush()
        if request.state == DONE and request._list == NULL:
            result = request._result    # a drain pass let go of it
            self.end_in_line()
            return result
        return self._result(request, current)

    cdef int end_in_line(self) except -1:
        """Call this after an operation that was done in line: a greenlet that only ever has such gives the
        loop its turn here, once in a bounded run of them. Not before it, when an fd could be closed and
        its number reused meanwhile. Raises OSError (ECANCELED) in a child that was forked meanwhile."""
        cdef Request request
        self.engine.in_line += 1
        if self._run == 0:
            self._end_turn_soon()
            self._run_began = self.engine.context.now()
        self._run += 1
        if self._run % HITS_UNTIMED == 0 and self._run_is_over(HITS_MAX):
            request = new_request(CALL, -1, 0, 0, 1)
            self.engine.settle(request, 0)
            self._park(request, greenlet_current())
            if request._result < 0:     # forked meanwhile: where it was read to, this process may have zeros
                raise OSError(ECANCELED, os.strerror(ECANCELED))
        return 0

    cdef int check_caller(self) except -1:
        """Raise BlockingSwitchOutError in the hub and inside `uninterrupted`, where no greenlet can wait."""
        self._caller()
        return 0

    cdef object _caller(self):
        current = greenlet_current()
        if current is self.hub:
            raise BlockingSwitchOutError('greenaio was called in the hub, where nobody can wait')
        if _inside and current in _inside:
            raise BlockingSwitchOutError(REFUSED)
        return current

    cdef int64_t _result(self, Request request, current, uint64_t now=0) except? -4096:
        cdef int64_t result
        if request.state != DONE or self._run_is_over(RUN_MAX, now):
            self._park(request, current)
        elif request._list != NULL:
            self.engine.ready.remove(request)
        result = request._result
        request.release()
        return result

    cdef int _end_turn_soon(self) except -1:
        """A section of the hub's turn begins, if this is none already; a pass has an end of its own."""
        if self._sections == 0 and self._turn_end is None:
            self._turn_end = self.hub.loop.run_callback(self._on_turn_end)
        return 0

    def perform_request(self, Request request not None):
        """`perform`, for callers in Python. Raises RuntimeError in another thread than the hub's."""
        if self.hub.thread_ident != _get_ident():
            raise RuntimeError(f'{self!r} belongs to the hub of another thread')
        return self.perform(request)

    cdef object _park(self, Request request, current):
        cdef PyObject *to
        if self._sections == 0:
            self._ask_for_pass()
        self.waiting += 1
        try:
            self._hold_loop()
            switch_out = getattr(current, 'switch_out', None)
            if switch_out is not None:
                switch_out()
            # No Python code from here to the switch. The request is in a list still, so the hub
            # will find it and its waiter there; or that code has let the hub hand it over already.
            if request._list != NULL:
                to = self._next()       # first: our own request may be the next
                request.waiter = current
                greenlet_switch(to)
                # `close` takes the waiter away from what is in flight: that alone tells nothing.
                if request.waiter is not None or request.state != DONE:
                    raise InvalidSwitchError(f'{current!r} was switched into, but waits for {request!r}')
        except BaseException as error:  # killed, timed out, thrown into
            request.waiter = None
            self._leave(request)
            thrown(error)
            raise
        finally:
            self.waiting -= 1
            if self.waiting == 0 and self._sections == 0:
                self._let_go_of_loop()

    cdef PyObject *_next(self) noexcept:
        """Where a greenlet that parks goes: the hub, or in its pass the greenlet it would wake next.

        Borrowed: a parked greenlet has itself in a variable of `perform`. A reference held across the
        switch would keep it, dead, for as long as the one that parks here waits.
        """
        cdef PyObject *waiter
        cdef Request request
        if self._sections == 0 or self.engine.ready.count == 0 or self._run_is_over():
            return <PyObject *>self.hub
        request = self.engine.ready.first()
        waiter = <PyObject *>request.waiter
        if request.waiter is None:
            return <PyObject *>self.hub     # abandoned: letting go of it may run any code
        self.engine.ready.remove(request)
        request.waiter = None           # the token that this switch is its own
        return waiter

    cdef _leave(self, Request request):
        """The greenlet of *request* goes without its result: withdraw or abandon."""
        cdef Engine engine = self.engine
        _notice_fork()                  # a lock of the parent's pool may be held for ever here
        if request.stays:
            return                      # a drain pass lets go of it at its end
        if engine.withdraw(request):
            request.release()
            self._submit_admitted()
        elif request.state == DONE:
            if request._list != NULL:
                engine.ready.remove(request)
            request.abandoned = True
            request.release()
        elif not request.must_run and withdraw(request):
            engine.take_back(request)
            request.release()
            self._submit_admitted()
        else:                           # the engine keeps it, and _drain lets go of it at its event
            request.abandoned = True
            engine.abandoned += 1
            request.meet()
            if request._list == <void *>engine.in_flight:
                request.let_go_of_numbers()     # the kernel has the file, and it goes no other way

    cdef int _submit_admitted(self) except -1:
        """A request has left its share, which let in another."""
        if self.engine.pending.count and not self.closed:
            self._end_turn_soon()
        return 0

    cdef bint _run_is_over(self, int limit=RUN_MAX, uint64_t now=0) noexcept:
        # Completions in line never enter the loop, so they too are counted: past the bound the
        # greenlet parks on a request that is done, and a later drain pass resumes it.
        if now == 0:
            now = self.engine.context.now()
        if self._run == 0:
            self._run_began = now
        self._run += 1
        return self._run > limit or now - self._run_began > RUN_MAX_NS

    # Towards the kernel ---------------------------------------------------------------------

    cdef int _flush(self) except -1:
        """Submit what is pending, and reap at once: something may be done already."""
        cdef Engine engine = self.engine
        if engine.pending.count:
            engine.flush()
            if engine.slow_ns:
                self._tell_of_stall()
            engine.reap()
            engine.is_instant = engine.in_flight.count == 0
        else:
            engine.reap()
        self.inbox.reap(engine)
        if engine.declined.count:
            self._move_declined()
        if engine.blocked and engine.in_flight.count == 0:
            self._retry_soon()          # no completion will come that could submit it
        return 0

    cdef int _tell_of_stall(self) except -1:
        cdef Engine engine = self.engine
        cdef uint64_t took = engine.slow_ns
        cdef Request culprit = engine.take_culprit()
        engine.slow_ns = 0
        self._tell('SlowSubmit', took / 1e9, engine.slow_batch)
        if culprit is not None and culprit.file is not None:
            self._tell('FileDemoted', *culprit.file.stalled(engine.culprit_ns))
        return 0

    def _tell(self, name, *facts):
        if _report is not None:
            _report(self.hub, name, *facts)

    def _on_turn_end(self):
        """The section of a hub turn ends: submit what the greenlets of this turn asked for."""
        _notice_fork()
        self._turn_end = None
        self._run = 0
        if not self.closed:
            try:
                self._flush()
                if self.engine.ready.count == 0:
                    self._poll()
            except BaseException:
                self._failed()
            finally:
                self._ask_for_pass()

    cdef int _ask_for_pass(self) except -1:
        """What is ready, or was declined, needs a drain pass: the next turn of the loop has one."""
        if (self.engine.ready.count or self.engine.declined.count) and not self._asked_for_pass:
            self.engine.context.signal()
            self._asked_for_pass = True
        return 0

    def _retry_soon(self):
        if self._retry is not None:
            return
        if self._retry_after > RETRY_MAX:
            self._retry_after = RETRY_MIN
            self.engine.refuse(EAGAIN)
            self._ask_for_pass()
        else:
            self._retry = self.hub.loop.timer(self._retry_after)
            self._retry.start(self._on_retry)

    def _on_retry(self):
        _notice_fork()
        self._retry.close()
        self._retry = None
        if self.closed:
            return
        self._retry_after *= 2
        try:
            self._flush()
            if self._retry is None:
                self._retry_after = RETRY_MIN
        except BaseException:
            self._failed()
        finally:
            self._ask_for_pass()

    # From the kernel ------------------------------------------------------------------------

    def _on_eventfd(self):
        """The watcher's callback: clear, reap, hand over, submit."""
        _notice_fork()
        if self.closed:
            return
        if self._unpolled_since:
            self._adapt_poll(self.engine.context.now() - self._unpolled_since)
        self._asked_for_pass = True     # this is the pass
        self.engine.context.clear()     # first: what is signalled later is reaped later
        try:
            try:
                self._reap()
            finally:
                self._asked_for_pass = False
            if greenlet_current() is self.hub:
                self._drain()
            else:                       # only the hub hands over
                self.engine.context.signal()
        except BaseException:
            self._failed()
        finally:
            if not self.closed:
                self._ask_for_pass()

    def _failed(self):
        """Report what nobody here is to blame for. Raised into the loop, it would stop the watcher, and nobody
        be woken any more; and what is pending may have nothing in flight that could submit it."""
        self.hub.handle_error(self, *sys.exc_info())
        if (self.engine.pending.count or self.engine.declined.count) and not self.closed:
            self._retry_soon()

    cdef int _reap(self) except -1:
        """Reap; and where requests wait for room, hand the device the next before anybody wakes."""
        cdef int n = self.engine.reap() + self.inbox.reap(self.engine)
        if n and self.engine.blocked:
            self._flush()
        elif self.engine.declined.count:
            self._move_declined()
        return n

    cdef int _drain(self) except -1:
        """One pass: hand over a bounded run of what is ready; what is asked for meanwhile goes out
        together at its end."""
        cdef Engine engine = self.engine
        cdef Request request
        cdef int nobodys = 0            # they only take time: counted, more could come in a turn than go
        self._run = 0
        self._sections += 1
        engine.burst = 0
        try:
            while not self.closed and self._more_is_ready() and not self._run_is_over(RUN_MAX + nobodys):
                request = engine.ready.popleft()
                if request.waiter is None:
                    nobodys += 1
                    request.release()   # abandoned; or its greenlet is about to look by itself
                else:
                    self._wake(request)
        finally:
            self._sections -= 1
            engine.burst = BURST
            self._run = 0
            if not self.closed:
                try:
                    self._flush()
                finally:
                    self._ask_for_pass()
                    if self.waiting == 0:
                        self._let_go_of_loop()
        return 0

    cdef bint _more_is_ready(self) except -1:
        """Look, look again at the ring, submit, poll: whatever gives something to hand over."""
        cdef Engine engine = self.engine
        if engine.ready.count == 0:
            self._reap()
        if engine.ready.count == 0:
            self._flush()
        return engine.ready.count != 0 or self._poll()

    cdef int _wake(self, Request request) except -1:
        waiter = request.waiter
        request.waiter = None           # the token that this switch is its own
        try:
            greenlet_switch(<PyObject *>waiter)
        except BaseException:           # of this greenlet, or of one that it went on to
            self.hub.handle_error(None, *sys.exc_info())
        return 0

    # Polling --------------------------------------------------------------------------------

    cdef bint _poll(self) except -1:
        """Watch the ring for a while, if that is wished for and seems to pay; whether it did."""
        cdef Engine engine = self.engine
        cdef uint64_t limit
        if engine.in_flight.count == 0:
            return False
        limit = <uint64_t><int>config.poll_max_us * 1000
        if limit == 0:
            self._poll_ns = self._unpolled_since = 0
            return False
        if self._poll_ns > limit:
            self._poll_ns = limit
        if self._poll_ns and engine.context.spin(self._poll_ns):
            self._unpolled_since = 0
            self._reap()
            return engine.ready.count != 0
        self._unpolled_since = self.engine.context.now()
        return False

    def _adapt_poll(self, uint64_t waited):
        """The last spin was in vain, and the completion came *waited* ns after its end."""
        cdef uint64_t limit = <uint64_t><int>config.poll_max_us * 1000
        cdef uint64_t least = POLL_MIN_NS
        self._unpolled_since = 0
        if self._poll_ns + waited <= limit:
            self._poll_ns = min(2 * self._poll_ns, limit) if self._poll_ns else min(least, limit)
        else:
            self._poll_ns = self._poll_ns // 2 if self._poll_ns // 2 >= least else 0

    # The loop -------------------------------------------------------------------------------

    cdef int _hold_loop(self) except -1:
        if not self._holds_loop:
            self._holds_loop = True
            if self._watcher is not None:
                self._watcher.ref = True
            if self._stuck is None and config.stuck_after:
                self._look_for_stuck()
        return 0

    cdef int _let_go_of_loop(self) except -1:
        # Abandoned requests hold nothing: else hub.join() would wait for a frozen disk.
        if self._holds_loop and not self.closed:
            self._holds_loop = False
            if self._watcher is not None:
                self._watcher.ref = False
        return 0

    # What takes too long ----------------------------------------------------------------------

    cdef int _look_for_stuck(self) except -1:
        self._stuck = self.hub.loop.timer(config.stuck_after / 2, ref=False)
        self._stuck.start(self._on_stuck_timer)
        return 0

    def _on_stuck_timer(self):
        """While anything is under way, tell of each request that has been for too long."""
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

    def _check(self):
        """Assert all that must hold between two turns of the loop, and of the engine too.

        E1: pending requests are submitted later, because a completion, a retry or the end of a section will come.
        D1: the watcher holds the loop exactly while a greenlet is parked. A pass may hold it a little longer."""
        cdef Engine engine = self.engine
        engine._check()
        if self.closed:
            return
        will_submit = self._retry is not None or self._turn_end is not None or self._sections or self._asked_for_pass
        assert not engine.pending.count or engine.in_flight.count or will_submit, 'pending for ever'
        assert self._holds_loop or not self.waiting, 'a greenlet waits, and the loop may end'
        assert not self._holds_loop or self.waiting or self._sections, 'held without a greenlet that waits'
        assert self._watcher is None or bool(self._watcher.ref) == self._holds_loop, 'the watcher says another thing'

    # Ends -----------------------------------------------------------------------------------

    def after_fork_in_child(self):
        """Cancel what was inherited; the kernel's context is made anew at the next request.

        The watcher stays as it is, over a fresh eventfd: closing or stopping it here would abort the loop
        or rob the parent of its wake-ups. Only if its number is a file of the program by now, it has to go.
        Greenlets of the parent that waited get OSError(ECANCELED).
        """
        watched = self.engine.context.eventfd
        self.forks += 1
        self.engine.context.after_fork_in_child()
        inbox = Inbox(self.engine.context)
        self.inbox.forget()             # what a worker of the parent does goes to the parent
        self.inbox = inbox
        self.engine.cancel(ECANCELED)
        if self.hub.thread_ident != _get_ident():
            self.closed = True          # its thread stayed with the parent: nobody is left to wait
            _drivers.discard(self)
            _past.add(self.engine)
            return
        if self.engine.context.eventfd != watched and self.hub.loop is not None:
            self._stop(self._watcher)       # or the loop would watch the file of the program
            self._watcher = None
            self.hub.loop.run_callback(self._watch_anew)    # libuv's takes none before it is forked as well
        self._reattach = self._asked_for_pass = True
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
        try:                            # each step, whatever becomes of the one before it
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
        forget(self.hub, self.close)    # gevent keeps the hub of a thread that just ended for ever
        self._stop(self._turn_end)
        self._stop(self._watcher)
        self._stop(self._retry)
        self._stop(self._stuck)

    def _stop(self, watcher):
        try:
            if watcher is not None:
                watcher.stop()
                watcher.close()
        except ValueError:
            pass                        # the loop is gone, and its watchers with it

    def _give_up(self):
        self.engine.refuse(ECANCELED)
        self.engine.cancel_declined(-<int64_t>ECANCELED)
        self._abandon_all(self.engine.in_flight)
        self._abandon_all(self.engine.lent)
        for request in self.engine.ready:
            (<Request>request).abandoned = (<Request>request).waiter is not None    # else it looks by itself
        _let_go(self.engine.ready)

    cdef int _abandon_all(self, RequestList requests) except -1:
        cdef Request request, following = requests.first()
        while following is not None:    # no list of them: there may be no memory for it
            request = following
            following = <Request>request._next if request._next != NULL else None
            request.waiter = None       # a greenlet that is parked has itself on its stack: none ends here
            request.abandoned = True
            if not request.must_run and withdraw(request):
                self.engine._finish(request, -<int64_t>ECANCELED)
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
        except (RuntimeError, MemoryError):     # no thread, or the interpreter ends: the process's end does it
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


_leaked = []                            # engines whose memory the kernel may still write


def _end_context(Engine engine, Inbox inbox, begun):
    """Runs in a native thread: wait for the disk, then let go of the memory it was writing."""
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
    """Not in the hub: a handler may have to wait for its lock."""
    gevent.spawn(log.info, 'native AIO is to be had again: %d requests in flight', depth)


cdef inline _notice_fork():
    if forked():
        ring()


def _after_fork_in_child():
    _ending.clear()                     # the threads that wait for their disks stayed with the parent
    for driver in list(_drivers):
        driver.after_fork_in_child()


def _proc(name):
    try:
        with open(f'/proc/sys/fs/{name}') as file:
            return file.read().strip()
    except OSError:
        return 'unknown'


listen(_after_fork_in_child)
