# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A dispatcher sends requests on their ways and collects them. It never switches into a greenlet.

This is the half of a driver that faces the kernel and the native threads. `flush` and `lend` send requests
out. `reap` brings them back, and moves the requests that the kernel has declined to their next ways. Requests
that are done wait in `Engine.ready` until a drain pass of the `Driver` hands them over. So all code may call
these methods, also code that a release or a signal handler runs: no greenlet goes on in the middle of them.
"""

import sys

from libc.errno cimport EAGAIN, EIO, ENOMEM

from greenaio._config import config
from greenaio._core.bell import ring

from greenaio._core.context cimport Context
from greenaio._core.engine cimport Engine
from greenaio._core.job cimport as_call, make_here
from greenaio._core.mailbox cimport Inbox
from greenaio._core.policy cimport BURST, RUN_MAX, adapt
from greenaio._core.request cimport DECLINED, DONE, IN_FLIGHT, NEW, Request, State
from greenaio._core.threads cimport Pool

# The function that `report_to` was given, or None.
cdef object _report = None


def report_to(function):
    """Call ``function(hub, name, *facts)`` for each fact that an operator may want to know.

    *function* is called at once, in the middle of the driver's work. It must not run code of the program, but
    it may have the loop of *hub* call that code later."""
    global _report
    _report = function


cdef class Ways:
    """An object that knows the ways of a request: its `Request.file`, if it `may_move`."""

    cpdef int next_way(self, Dispatcher driver, Request request, int64_t result, bint asked) except -1:
        """Choose the `Way` that *request* goes next.

        The kernel's answer was *result*. It is minus an errno, or fewer bytes than wanted, if the request was
        *asked* not to wait. This adds these bytes to `Request.done`. It may run any Python code."""
        raise NotImplementedError

    cpdef Pool pool(self):
        """Return the pool of the threads that make the calls of such requests."""
        raise NotImplementedError


cdef class Dispatcher:
    """Send the requests of one hub to the kernel and to threads, and collect them. Only for the thread of the
    hub."""

    def __init__(self, hub, Context context, int depth):
        self.hub = hub
        self.engine = Engine(context, depth)
        # This is the number outside of passes. `_drain` changes it for the time of a pass.
        self.engine.burst = BURST
        # Threads wake the loop by the eventfd of the context, as the kernel does.
        self.inbox = Inbox(context)

    cdef int attach(self) except -1:
        """Get a context from the kernel; `native` says whether there is one."""
        raise NotImplementedError

    cpdef bint has_aio(self) except -1:
        """Return whether native AIO can be used. If it was used up before, ask the kernel again."""
        raise NotImplementedError

    cdef int retry_soon(self) except -1:
        """Flush again after a while, because no completion will come that could do it."""
        raise NotImplementedError

    # Towards the kernel ---------------------------------------------------------------------

    cdef int flush(self) except -1:
        """Submit the pending requests, and reap at once, because some of them may be done already.

        No greenlet is woken here. Requests that are ready need a pass: see `ask_for_pass`."""
        cdef Engine engine = self.engine
        if engine.pending.count:
            engine.flush()
            if engine.slow_ns:
                # The engine only notes a stall, because its lists are not right at that moment. Now they are.
                self._tell_of_stall()
            engine.reap()
            # If the device has done all in the submission, later requests may wait for each other at no loss.
            engine.is_instant = engine.in_flight.count == 0
        else:
            engine.reap()
        self.inbox.reap(engine)
        # Do this after both reaps, so that all declined requests move together.
        if engine.declined.count:
            self._move_declined()
        if engine.blocked and engine.in_flight.count == 0:
            # The kernel takes no request although it has none of ours, such as for lack of memory. No
            # completion will come that could submit the pending requests, so a timer does.
            self.retry_soon()
        return 0

    cdef int _tell_of_stall(self) except -1:
        """Report the last slow submission. Its culprit, if there is one, takes threads for a while."""
        cdef Engine engine = self.engine
        cdef uint64_t took = engine.slow_ns
        cdef Request culprit = engine.take_culprit()
        # Reset it before the report, so that it is reported once, also if the report fails.
        engine.slow_ns = 0
        self._tell('SlowSubmit', took / 1e9, engine.slow_batch)
        if culprit is not None and culprit.file is not None:
            self._tell('FileDemoted', *culprit.file.stalled(engine.culprit_ns))
        return 0

    def _tell(self, name, *facts):
        """Call the function that `report_to` was given, if any."""
        if _report is not None:
            _report(self.hub, name, *facts)

    cdef int end_turn_soon(self) except -1:
        """Have the pending requests submitted at the end of this hub turn, and the budget begin again there.

        A pass needs no such end, because it submits at its own end."""
        if self.sections == 0 and self.turn_end is None:
            self.turn_end = self.hub.loop.run_callback(self._on_turn_end)
        return 0

    def _on_turn_end(self):
        """Submit the requests that the greenlets of this hub turn have asked for. The loop calls this."""
        notice_fork()
        # Reset it first: code that runs below may need another end of a turn.
        self.turn_end = None
        # The loop is about to serve timers and sockets, so the run of this turn is over.
        self._budget.run = 0
        if not self.closed:
            try:
                self.flush()
                # With a request ready there is work to do, and no reason to spin.
                if self.engine.ready.count == 0:
                    self.poll()
            except BaseException:
                # An exception must not get into the loop, because no greenlet would see it there.
                self.failed()
            finally:
                self.ask_for_pass()

    cdef int ask_for_pass(self) except -1:
        """Have the next turn of the loop run a drain pass, if a request is ready or was declined.

        The pass is not run here, because greenlets call this as well, and only the hub may wake them. The
        eventfd brings the watcher's callback, in the same way as a completion of the kernel. One signal is
        enough for any number of requests."""
        if (self.engine.ready.count or self.engine.declined.count) and not self.asked_for_pass:
            # Set the flag after the signal: if the signal raises, the next call tries again.
            self.engine.context.signal()
            self.asked_for_pass = True
        return 0

    def failed(self):
        """Report an exception that belongs to no greenlet.

        It must not get into the loop, which would stop the watcher. Pending requests may have no completion
        left that could submit them, so a timer does."""
        self.hub.handle_error(self, *sys.exc_info())
        if (self.engine.pending.count or self.engine.declined.count) and not self.closed:
            self.retry_soon()

    # Towards the threads --------------------------------------------------------------------

    cdef bint lend(self, Request request, Pool pool) except -1:
        """Give *request* to a thread of *pool*, or make its call here if there is no thread.

        Return False if it must not be made here, because it may wait for ever. Then the request is as
        before."""
        # The thread gets a number, which must not mean another file by the time the thread uses it.
        request.hold()
        cdef State before = request.state
        # Between a `submit` that succeeds and `lend` no Python code runs, so no
        # kill can come between them. The worker may do the job before `lend`.
        # That is no race, because only this thread takes jobs out of the mailbox.
        if pool.submit(request, self.inbox):
            self.engine.lend(request)
            if self.inbox.look(self.engine) and self.engine.ready.count > (request.state == DONE):
                # The look has found other requests as well. Their workers may not signal for them, so their
                # greenlets need a pass.
                self.ask_for_pass()
            return True
        # An open in the pool for calls that wait for no disk, such as the open of a FIFO, may wait for ever.
        # The hub must not do that.
        if request.gives_fd and pool.device is None:
            return False
        if request.state != before:
            # `submit` logs the lack of a thread, and a handler
            # may run any code. In that time the request ended.
            return True
        return self._call_here(request)

    cdef bint _call_here(self, Request request) except -1:
        """Make the call of *request* in this thread, which holds up the hub. Return True."""
        cdef int64_t result
        # The request counts as lent for that time, because a signal handler may run in it, and look at the
        # request, or fork.
        self.engine.lend(request)
        try:
            result = make_here(request)
        except BaseException:
            # A signal has interrupted the call (EINTR), and its handler raised this.
            if request.state == IN_FLIGHT:
                self.engine.take_back(request)
            raise
        # After a fork in a signal handler, the child has cancelled the request already.
        if request.state == IN_FLIGHT:
            self.engine.finish(request, result)
        return True

    cdef int let_run(self, Request request, Pool pool) except -1:
        """Have a thread of *pool* make the call of *request*, and wait for nothing.

        No greenlet waits for the result, so this may be called from anywhere in the thread of the hub."""
        self.lend(request, pool)
        # The call may be done already, by a quick worker or here. A pass then releases the request.
        if self.sections == 0:
            self.ask_for_pass()
        return 0

    # From way to way ------------------------------------------------------------------------

    cdef int _move_declined(self) except -1:
        """Move the requests that the kernel declined to their next ways. Their greenlets stay parked.

        The code that chooses a way may run any Python code, such as a finalizer. During the choice the
        request is in `Engine.moving`. A kill withdraws it from there, a fork or the end of the hub cancels
        it, and then it goes no way. From the choice until the request is in another list no Python code
        runs, except the log of a lack of threads. After that `lend` looks at the request again.

        At most `RUN_MAX` are moved at once. The rest waits for a pass."""
        cdef Engine engine = self.engine
        # A request that is declined again during the loop waits for the next call.
        cdef int n = min(engine.declined.count, <int>RUN_MAX)
        cdef int waited = engine.pending.count
        while n > 0 and engine.declined.count and not self.closed:
            n -= 1
            self._move(engine.next_declined())
        if not self.closed:
            # Some go to the kernel again. They go out together, at the end of this hub turn or of the pass.
            if engine.pending.count > waited:
                self.end_turn_soon()
            # Some may be done, because no way was left, and some
            # may still be declined. A pass takes care of both.
            if self.sections == 0:
                self.ask_for_pass()
        return 0

    cdef int _move(self, Request request) except -1:
        """Choose the next way of *request*, which is in `Engine.moving`, and move it there.

        An error in the choice ends the request: with ENOMEM without memory, else with EIO and a report to the
        hub. It must not end the loop of the caller, or the other declined requests would stay there."""
        cdef Engine engine = self.engine
        cdef Ways ways
        cdef Pool pool = None
        cdef int way
        try:
            ways = <Ways?>request.file
            # The request gets back the flags of the caller first. The next way asks again if it wants to.
            way = ways.next_way(self, request, request.answer, request.stop_asking())
            # Prepare all that may run Python code or need memory before the last look at the list.
            if way == THREAD and request.state == DECLINED:
                as_call(request)
                pool = ways.pool()
            # The choice may have run code that ended the request: a kill, a fork, the end of the hub. Then it
            # is in `moving` no more, and goes no way.
            if request.queue == <void *>engine.moving:
                self._move_to(way, request, pool)
        except BaseException as error:
            # The request may be in `moving` still, or NEW because its number is being
            # closed or a signal handler has interrupted its call. Then its greenlet is
            # parked and needs an answer. A request that a kill has withdrawn is NEW as
            # well. It has no waiter, so a pass only releases it again, which does nothing.
            is_memory = isinstance(error, MemoryError)
            if request.state == DECLINED or request.state == NEW and not request.abandoned:
                engine.settle(request, -<int64_t>ENOMEM if is_memory else -<int64_t>EIO)
            if not is_memory:
                self.hub.handle_error(self, *sys.exc_info())
        return 0

    cdef int _move_to(self, int way, Request request, Pool pool) except -1:
        """Move a DECLINED request to *way*.

        No Python code runs before it is in another list, except the log of a lack of threads: see `lend`."""
        if way == NONE:
            # The answer of the last way is the result.
            self.engine.settle(request, request.answer)
        elif way == THREAD:
            # This moves it in any case: only an open may be left as it is, and an open is never declined.
            self.lend(request, pool)
        else:
            if way == ASK:
                request.ask()
            # The answer is not needed: `_move_declined` has the whole batch submitted at the end of the turn.
            self.engine.enqueue_again(request)
        return 0

    # From the kernel and the threads --------------------------------------------------------

    cdef int reap(self) except -1:
        """Reap the ring and the mailbox, and return how many requests ended. No greenlet is woken.

        If requests wait for room in the kernel, submit them before any greenlet wakes, to keep the device
        busy."""
        cdef int n = self.engine.reap() + self.inbox.reap(self.engine)
        # A completion has made room in the kernel. The flush also moves the declined requests.
        if n and self.engine.blocked:
            self.flush()
        elif self.engine.declined.count:
            self._move_declined()
        return n

    cdef int unready(self, Request request) except -1:
        """Take a request that was begun and is done out of `Engine.ready`. `end` finds its answer in it."""
        if request.state == DONE and request.queue != NULL:
            # No greenlet has to be woken, so the request takes no place in a pass.
            self.engine.ready.remove(request)
            request.release()
        return 0

    cdef bint poll(self) except -1:
        """Watch the ring for a while, if the user wishes it and it seems to pay.

        Return whether a request is ready. The spin holds up all greenlets of this hub, but not other threads,
        because it gives the GIL away."""
        cdef Engine engine = self.engine
        cdef uint64_t limit
        # No completion can come.
        if engine.in_flight.count == 0:
            return False
        # Read the setting each time, because a program may change it at any time. 0 switches polling off.
        limit = <uint64_t><int>config.poll_max_us * 1000
        if limit == 0:
            self._polling.spin_ns = self._polling.unpolled_since = 0
            return False
        # The setting may have been lowered since.
        self._polling.spin_ns = min(self._polling.spin_ns, limit)
        if self._polling.spin_ns and engine.context.spin(self._polling.spin_ns):
            self._polling.unpolled_since = 0
            self.reap()
            return engine.ready.count != 0
        # The completion did not come in time. `_on_eventfd` measures how much later it comes.
        self._polling.unpolled_since = engine.context.now()
        return False

    def _adapt_poll(self, uint64_t waited):
        """Adapt the length of the next spin: the completion came *waited* ns after the last one ended."""
        adapt(&self._polling, waited, <uint64_t><int>config.poll_max_us * 1000)


cdef int react_to_fork() except -1:
    ring()
    return 0
