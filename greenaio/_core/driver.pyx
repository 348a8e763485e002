# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""`Driver._park` is the only code that parks a greenlet; it and `Driver._wake` are all that switches.

A driver submits the requests of the greenlets of one hub, and hands the results over. Switching follows one
rule: *only a drain pass switches into a greenlet, and only into one that is parked on that very request*. So a
request that finishes inside its own submission never switches, and nothing recurses, however deep submissions
complete inline. Completions go to one queue (`Engine.ready`), and one pass in the hub (`Driver._drain`) resumes
greenlets from it.

Park and next
-------------

A pass runs in the hub. It takes the first ready request and switches into its greenlet A (`_wake`). When A parks
on its next request, the obvious target is the hub, which would take the next ready request and switch into
greenlet B. `_next` leaves the hub out: A switches straight to B, and the hub stays suspended in `_wake` until a
greenlet of the pass finds nothing ready, or the budget is spent. This is one switch for a request instead of two.

    ====================  =====================  =====================  ======================
    hub, in the pass      greenlet A             greenlet B             `Engine.ready`
    ====================  =====================  =====================  ======================
    wake A  ----------->  has its result                                B
    (in `_wake`)          perform: enqueue                              B
                          park: next is B        has its result         --
                          (parked)               perform, park          --
    the pass goes on  <------------------------  (parked)               --
    ====================  =====================  =====================  ======================

Three things make this right:

1. `Request.waiter` is the token of a switch. The code that switches into a greenlet first takes the token away.
   So a greenlet that finds its token still there was switched into by other code, and its request is not done.
2. `_park` runs no Python code between the look at the request's list and the switch. A finalizer or a signal
   handler there could run a pass, and the completion would find no waiter and wake no greenlet. Before that
   point any code may run, because the list is looked at again after it.
3. No reference to another greenlet is held across the switch. A parked greenlet has itself in a variable of
   `perform`; a reference from A would keep B alive, dead, for as long as A waits.

The order of the eventfd
------------------------

The kernel and the threads first publish a completion and then signal the eventfd. The watcher's callback does
the opposite: it clears the eventfd first and looks at the completions after that. A completion that comes
between the two is found at once, and its signal at most causes an empty pass. In the other order a completion
between the look and the clear would be in the ring without a signal, and its greenlet would sleep until some
other request ends.
"""

import os
import sys

from gevent.exceptions import BlockingSwitchOutError, InvalidSwitchError
from gevent.monkey import get_original

from greenaio._config import config
from greenaio._core.ends import thrown
from greenaio._core.uninterrupted import REFUSED, inside

from cpython.ref cimport PyObject
from libc.errno cimport EAGAIN, EIO, ENOMEM

from greenaio._core.context cimport BATCH_MAX, Context
from greenaio._core.engine cimport Engine
from greenaio._core.fork cimport forked
from greenaio._core.job cimport as_call, make_here
from greenaio._core.mailbox cimport Inbox
from greenaio._core.policy cimport BURST, HITS_MAX, HITS_UNTIMED, RUN_MAX, adapt, is_spent
from greenaio._core.request cimport CALL, DECLINED, DONE, IN_FLIGHT, NEW, Request, State, new_request
from greenaio._core.threads cimport Pool, withdraw

from greenaio._core.bell import ring

cdef extern from *:
    """
    #include "greenlet/greenlet.h"

    static inline int greenlet_import(void)
    { PyGreenlet_Import(); return _PyGreenlet_API == NULL ? -1 : 0; }
    static inline PyObject *greenlet_current(void)
    { return (PyObject *)PyGreenlet_GetCurrent(); }
    static inline PyObject *greenlet_switch(PyObject *to)   /* borrowed */
    { return PyGreenlet_Switch((PyGreenlet *)to, NULL, NULL); }
    """
    int greenlet_import() except -1
    object greenlet_current()
    object greenlet_switch(PyObject *to)

greenlet_import()

cdef extern from "<errno.h>":
    const int ECANCELED

_get_ident = get_original('_thread', 'get_ident')
# Greenlets that must not be parked.
cdef dict _inside = inside
# The function that `report_to` was given.
cdef object _report = None


def report_to(function):
    """Call ``function(hub, name, *facts)`` for each fact that an operator may want to know.

    It is called at once, in the middle of the driver's work: it must not run code of the program, but may have
    the loop of *hub* call that later."""
    global _report
    _report = function


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
    """Native AIO for the greenlets of one hub. Not for other threads than the hub's own.

    `greenaio._core.hub` makes it, connects it with the loop and the kernel, and ends it."""

    def __init__(self, hub, Context context, int depth):
        self.hub = hub
        self.engine = Engine(context, depth)
        self.engine.burst = BURST
        self.inbox = Inbox(context)

    cdef int attach(self) except -1:
        """Get a context from the kernel; `native` says whether there is one."""
        raise NotImplementedError

    cpdef bint has_aio(self) except -1:
        """Return whether native AIO can be used. If it was used up before, ask the kernel again."""
        raise NotImplementedError

    cdef int hold_loop(self) except -1:
        """Keep the loop running, because a greenlet is parked."""
        raise NotImplementedError

    cdef int let_go_of_loop(self) except -1:
        """Let the loop end, because no greenlet is parked."""
        raise NotImplementedError

    cdef int retry_soon(self) except -1:
        """Flush again after a while, because no completion will come that could do it."""
        raise NotImplementedError

    # A request, seen from its greenlet ------------------------------------------------------

    cdef int64_t perform(self, Request request) except? -4096:
        """Enqueue, park until it is done, return bytes moved or minus the errno.

        If the greenlet is killed or timed out, the exception goes up at once. A request that the kernel does not have
        is withdrawn. Any other is abandoned and finishes by itself, with its buffers pinned.
        An abandoned write may still happen. Raises BlockingSwitchOutError in the hub.
        """
        cdef Engine engine = self.engine
        current = self._caller()
        if self.must_attach:
            # The first use after a fork.
            self.attach()
        if engine.enqueue(request):
            self.flush()
            if self.sections == 0 and request.state != DONE:
                self._poll()
        else:
            self._end_turn_soon()
        # A request that is done by now was submitted here, so its clock serves for the budget as well.
        return self._result(request, current, engine.submitted_ns)

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
        # No Python code runs in `submit`, nor before the request is in a list.
        if pool.submit(request, self.inbox):
            self.engine.lend(request)
            if self.inbox.look(self.engine) and self.engine.ready.count > (request.state == DONE):
                # Others are done as well.
                self.ask_for_pass()
            return True
        if request.gives_fd and pool.device is None:
            return False
        if request.state != before:
            # It ended while the lack of a thread was logged.
            return True
        self.engine.lend(request)
        try:
            result = make_here(request)
        except BaseException:
            # A signal handler raised it.
            if request.state == IN_FLIGHT:
                self.engine.take_back(request)
            raise
        if request.state == IN_FLIGHT:
            self.engine.finish(request, result)
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
            if self.sections == 0:
                self.ask_for_pass()
        return 0

    cdef int _move(self, Request request) except -1:
        cdef Engine engine = self.engine
        cdef Ways ways
        cdef Pool pool = None
        cdef int way
        try:
            ways = <Ways?>request.file
            way = ways.next_way(self, request, request.answer, request.stop_asking())
            if way == THREAD and request.state == DECLINED:
                as_call(request)
                pool = ways.pool()
            if request.queue == <void *>engine.moving:
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
            self.engine.settle(request, request.answer)
        elif way == THREAD:
            self._lend(request, pool)
        else:
            if way == ASK:
                request.ask()
            self.engine.enqueue_again(request)
        return 0

    cdef int begin(self, Request request, bint more) except -1:
        """The first half of `perform`: submit now, wait for nothing. `end` is the other half. Without it the request
        is abandoned, and goes on to its own end. With *more* coming at once, it goes out together with that."""
        self._caller()
        if self.must_attach:
            self.attach()
        request.stays = True
        self.engine.enqueue(request)
        if more and self.engine.pending.count < BATCH_MAX:
            return self._end_turn_soon()
        self.flush()
        self._unready(request)
        return self.ask_for_pass()

    cdef int _unready(self, Request request) except -1:
        if request.state == DONE and request.queue != NULL:
            # No greenlet has to be woken, so the request takes no place in a pass.
            self.engine.ready.remove(request)
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
        if self.sections == 0:
            self.ask_for_pass()
        return 0

    cdef int64_t end(self, Request request) except? -4096:
        """Wait for a request that `begin` has submitted; return bytes moved or minus the errno. Call it once for each
        request. If this greenlet is killed, the request goes on, and `end` may be called again."""
        current = self._caller()
        cdef int64_t result
        if request.state != DONE:
            self.flush()
        if request.state == DONE and request.queue == NULL:
            # A drain pass has released it.
            result = request.answer
            self.end_in_line()
            return result
        return self._result(request, current)

    cdef int end_in_line(self) except -1:
        """Call this after an operation that was done inline. A greenlet that has only such operations gives the loop
        its turn here, once in a bounded run of them. It must not do so before the operation, because its fd could be
        closed in that time and the number reused. Raises OSError (ECANCELED) in a child that was forked here."""
        cdef Request request
        self.engine.in_line += 1
        if self._budget.run == 0:
            self._end_turn_soon()
            self._budget.began = self.engine.context.now()
        self._budget.run += 1
        if self._budget.run % HITS_UNTIMED == 0 and self._run_is_over(HITS_MAX):
            request = new_request(CALL, -1, 0, 0, 1)
            self.engine.settle(request, 0)
            self._park(request, greenlet_current())
            # Forked here: this process may have zeros where the bytes were read to.
            if request.answer < 0:
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
        elif request.queue != NULL:
            self.engine.ready.remove(request)
        result = request.answer
        request.release()
        return result

    cdef int _end_turn_soon(self) except -1:
        """Begin a section, which ends with this hub turn. A pass needs none, because it has an end of its own."""
        if self.sections == 0 and self.turn_end is None:
            self.turn_end = self.hub.loop.run_callback(self._on_turn_end)
        return 0

    def perform_request(self, Request request not None):
        """`perform`, for callers in Python. Raises RuntimeError in another thread than the hub's."""
        if self.hub.thread_ident != _get_ident():
            raise RuntimeError(f'{self!r} belongs to the hub of another thread')
        return self.perform(request)

    cdef object _park(self, Request request, current):
        cdef PyObject *to
        if self.sections == 0:
            self.ask_for_pass()
        self.waiting += 1
        try:
            self.hold_loop()
            switch_out = getattr(current, 'switch_out', None)
            if switch_out is not None:
                switch_out()
            # No Python code runs from here to the switch: see "Park and next". A request that is still in a list will
            # be found there, with its waiter. Otherwise the code above has let the hub hand it over already.
            if request.queue != NULL:
                # Ask for the next before there is a waiter, because the next may be this very request.
                to = self._next()
                request.waiter = current
                greenlet_switch(to)
                # `close` takes the waiter away from requests in flight, so its absence alone tells nothing.
                if request.waiter is not None or request.state != DONE:
                    raise InvalidSwitchError(f'{current!r} was switched into, but waits for {request!r}')
        except BaseException as error:
            # The greenlet was killed, timed out, or thrown into.
            request.waiter = None
            self._leave(request)
            thrown(error)
            raise
        finally:
            self.waiting -= 1
            if self.waiting == 0 and self.sections == 0:
                self.let_go_of_loop()

    cdef PyObject *_next(self) noexcept:
        """Return where a greenlet that parks goes: to the hub, or in a pass to the greenlet that the hub would wake
        next. The reference is borrowed: see "Park and next"."""
        cdef PyObject *waiter
        cdef Request request
        if self.sections == 0 or self.engine.ready.count == 0 or self._run_is_over():
            return <PyObject *>self.hub
        request = self.engine.ready.first()
        waiter = <PyObject *>request.waiter
        if request.waiter is None:
            # The request was abandoned, and its release may run any code, so the hub does it.
            return <PyObject *>self.hub
        self.engine.ready.remove(request)
        request.waiter = None
        return waiter

    cdef int _leave(self, Request request) except -1:
        """Withdraw *request*, or abandon it: its greenlet goes without the result."""
        cdef Engine engine = self.engine
        # In a child, a lock of the parent's pool may be held for ever.
        _notice_fork()
        if request.stays:
            # A drain pass releases it at its end.
            return 0
        if engine.withdraw(request):
            request.release()
            self._submit_admitted()
        elif request.state == DONE:
            if request.queue != NULL:
                engine.ready.remove(request)
            request.abandoned = True
            request.release()
        elif not request.must_run and withdraw(request):
            engine.take_back(request)
            request.release()
            self._submit_admitted()
        else:
            # The engine keeps it, and a pass releases it after its event.
            request.abandoned = True
            engine.abandoned += 1
            request.meet()
            if request.queue == <void *>engine.in_flight:
                # The kernel has the file, and the request goes no other way.
                request.let_go_of_numbers()
        return 0

    cdef int _submit_admitted(self) except -1:
        """A request has left its share, which let in another."""
        if self.engine.pending.count and not self.closed:
            self._end_turn_soon()
        return 0

    cdef bint _run_is_over(self, int limit=RUN_MAX, uint64_t now=0) noexcept:
        """Count a wake or a completion. Completions inline never enter the loop, so they are counted as well: past the
        bound the greenlet parks on a request that is done, and a later pass resumes it."""
        return is_spent(&self._budget, limit, now if now else self.engine.context.now())

    # Towards the kernel ---------------------------------------------------------------------

    cdef int flush(self) except -1:
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
            # No completion will come that could submit it.
            self.retry_soon()
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
        self.turn_end = None
        self._budget.run = 0
        if not self.closed:
            try:
                self.flush()
                if self.engine.ready.count == 0:
                    self._poll()
            except BaseException:
                self._failed()
            finally:
                self.ask_for_pass()

    cdef int ask_for_pass(self) except -1:
        """Have the next turn of the loop run a drain pass, if a request is ready or was declined."""
        if (self.engine.ready.count or self.engine.declined.count) and not self.asked_for_pass:
            self.engine.context.signal()
            self.asked_for_pass = True
        return 0

    # From the kernel ------------------------------------------------------------------------

    def _on_eventfd(self):
        """Clear, reap, hand over, submit: the watcher calls this."""
        _notice_fork()
        if self.closed:
            return
        if self._polling.unpolled_since:
            self._adapt_poll(self.engine.context.now() - self._polling.unpolled_since)
        # This is the pass.
        self.asked_for_pass = True
        # Clear before the look: see "The order of the eventfd".
        self.engine.context.clear()
        try:
            try:
                self._reap()
            finally:
                self.asked_for_pass = False
            if greenlet_current() is self.hub:
                self._drain()
            else:
                # Only the hub hands over.
                self.engine.context.signal()
        except BaseException:
            self._failed()
        finally:
            if not self.closed:
                self.ask_for_pass()

    def _failed(self):
        """Report an exception that belongs to no greenlet. It must not get into the loop, which would stop the watcher.
        Pending requests may have no completion left that could submit them, so a timer does."""
        self.hub.handle_error(self, *sys.exc_info())
        if (self.engine.pending.count or self.engine.declined.count) and not self.closed:
            self.retry_soon()

    cdef int _reap(self) except -1:
        """Reap. If requests wait for room, submit them before any greenlet wakes, to keep the device busy."""
        cdef int n = self.engine.reap() + self.inbox.reap(self.engine)
        if n and self.engine.blocked:
            self.flush()
        elif self.engine.declined.count:
            self._move_declined()
        return n

    cdef int _drain(self) except -1:
        """Hand over a bounded run of ready requests. New requests of these greenlets go out together at its end."""
        cdef Engine engine = self.engine
        cdef Request request
        # Requests without a greenlet do not count, or more could be abandoned in a turn than a pass releases.
        cdef int nobodys = 0
        self._budget.run = 0
        self.sections += 1
        engine.burst = 0
        try:
            while not self.closed and self._more_is_ready() and not self._run_is_over(RUN_MAX + nobodys):
                request = engine.ready.popleft()
                if request.waiter is None:
                    nobodys += 1
                    # It was abandoned, or its greenlet is about to look by itself.
                    request.release()
                else:
                    self._wake(request)
        finally:
            self.sections -= 1
            engine.burst = BURST
            self._budget.run = 0
            if not self.closed:
                try:
                    self.flush()
                finally:
                    self.ask_for_pass()
                    if self.waiting == 0:
                        self.let_go_of_loop()
        return 0

    cdef bint _more_is_ready(self) except -1:
        """Return whether a request is ready, after a look at the ring, a submission and a spin if there is none."""
        cdef Engine engine = self.engine
        if engine.ready.count == 0:
            self._reap()
        if engine.ready.count == 0:
            self.flush()
        return engine.ready.count != 0 or self._poll()

    cdef int _wake(self, Request request) except -1:
        waiter = request.waiter
        request.waiter = None
        try:
            greenlet_switch(<PyObject *>waiter)
        except BaseException:
            # It comes from this greenlet, or from one that it went on to.
            self.hub.handle_error(None, *sys.exc_info())
        return 0

    # Polling --------------------------------------------------------------------------------

    cdef bint _poll(self) except -1:
        """Watch the ring for a while, if the user wishes it and it seems to pay. Return whether a request is ready."""
        cdef Engine engine = self.engine
        cdef uint64_t limit
        if engine.in_flight.count == 0:
            return False
        limit = <uint64_t><int>config.poll_max_us * 1000
        if limit == 0:
            self._polling.spin_ns = self._polling.unpolled_since = 0
            return False
        self._polling.spin_ns = min(self._polling.spin_ns, limit)
        if self._polling.spin_ns and engine.context.spin(self._polling.spin_ns):
            self._polling.unpolled_since = 0
            self._reap()
            return engine.ready.count != 0
        self._polling.unpolled_since = engine.context.now()
        return False

    def _adapt_poll(self, uint64_t waited):
        adapt(&self._polling, waited, <uint64_t><int>config.poll_max_us * 1000)


cdef inline _notice_fork():
    if forked():
        ring()
