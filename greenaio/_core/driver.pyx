# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""`Driver._park` is the only code that parks a greenlet; it and `Driver._wake` are all that switches.

A driver submits the requests of the greenlets of one hub, and hands the results over. Switching follows one
rule: *only a drain pass switches into a greenlet, and only into one that is parked on that very request*. So
a request that finishes inside its own submission never switches, and nothing recurses, however deep
submissions complete inline. Completions go to one queue (`Engine.ready`), and one pass in the hub
(`Driver._drain`) resumes greenlets from it.

Park and next
-------------

A pass runs in the hub. It takes the first ready request and switches into its greenlet A (`_wake`). When A
parks on its next request, the obvious target is the hub, which would take the next ready request and switch
into greenlet B. `_next` leaves the hub out: A switches straight to B, and the hub stays suspended in `_wake`
until a greenlet of the pass finds nothing ready, or the budget is spent. This is one switch for a request
instead of two.

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

1. `Request.waiter` is the token of a switch. The code that switches into a greenlet first takes the token
   away. So a greenlet that finds its token still there was switched into by other code, and its request is
   not done.
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

# The C interface of greenlet: a switch through a method of Python would cost more. The target is a
# plain pointer, so Cython takes no reference to it across the switch: see point 3 of "Park and next".
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
# The greenlets that are inside `uninterrupted` and must not be parked. It is empty in most programs.
cdef dict _inside = inside
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

    cpdef int next_way(self, Driver driver, Request request, int64_t result, bint asked) except -1:
        """Choose the `Way` that *request* goes next.

        The kernel's answer was *result*. It is minus an errno, or fewer bytes than wanted, if the request was
        *asked* not to wait. This adds these bytes to `Request.done`. It may run any Python code."""
        raise NotImplementedError

    cpdef Pool pool(self):
        """Return the pool of the threads that make the calls of such requests."""
        raise NotImplementedError


cdef class Driver:
    """Submit the requests of the greenlets of one hub, and hand the results over. Only for the thread of the
    hub.

    `greenaio._core.hub` makes it, connects it with the loop and the kernel, and ends it."""

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
        """Submit *request*, park until it is done, and return the bytes moved or minus the errno.

        If the greenlet is killed or timed out, the exception goes up at once. A request that the kernel does
        not have is withdrawn. Any other is abandoned and finishes by itself, with its buffers pinned. An
        abandoned write may still happen. Raises BlockingSwitchOutError in the hub, and OSError (EBADF) if a
        thread is closing the number.
        """
        cdef Engine engine = self.engine
        # Refuse a caller that can't wait before anything has happened.
        current = self._caller()
        if self.must_attach:
            # This is the first use after a fork. Many children
            # never do I/O, so the context is made only here.
            self.attach()
        if engine.enqueue(request):
            self.flush()
            # Outside of a pass this greenlet has nothing better to do than to wait for its request. In a pass
            # other greenlets are ready, and `_more_is_ready` polls if none is.
            if self.sections == 0 and request.state != DONE:
                self._poll()
        else:
            # The request waits for others to share its system call. The end of the pass or of this hub turn
            # submits it at the latest.
            self._end_turn_soon()
        # A request that is done by now was submitted here, so
        # the time of that submission serves for the budget.
        return self._result(request, current, engine.submitted_ns)

    cdef int64_t perform_by_thread(self, Request request, Pool pool) except? -4096:
        """Do the same as `perform`, by a native thread of *pool*: the same rules, the same result.

        A call that no thread has begun with is withdrawn when the greenlet is killed. If no thread can be
        started, the call is made here and blocks the hub. An open that may wait for ever stays NEW instead,
        and the result is -EAGAIN.
        """
        current = self._caller()
        if not self._lend(request, pool):
            return -EAGAIN
        return self._result(request, current)

    cdef bint _lend(self, Request request, Pool pool) except -1:
        """Give *request* to a thread of *pool*, or make its call here if there is no thread.

        Return False if it must not be made here, because it may wait for ever. Then the request is as
        before."""
        cdef int64_t result
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
        # The call is made in this thread and holds up the hub. The request counts as lent for that time,
        # because a signal handler may run in it, and look at the request, or fork.
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

    # From way to way ------------------------------------------------------------------------

    cdef int _move_declined(self) except -1:
        """Move the requests that the kernel declined to their next ways. Their greenlets stay parked.

        The code that chooses a way may run any Python code, such as a finalizer. During the choice the
        request is in `Engine.moving`. A kill withdraws it from there, a fork or the end of the hub cancels
        it, and then it goes no way. From the choice until the request is in another list no Python code
        runs, except the log of a lack of threads. After that `_lend` looks at the request again.

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
                self._end_turn_soon()
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

        No Python code runs before it is in another list, except the log of a lack of threads: see `_lend`."""
        if way == NONE:
            # The answer of the last way is the result.
            self.engine.settle(request, request.answer)
        elif way == THREAD:
            # This moves it in any case: only an open may be left as it is, and an open is never declined.
            self._lend(request, pool)
        else:
            if way == ASK:
                request.ask()
            # The answer is not needed: `_move_declined` has the whole batch submitted at the end of the turn.
            self.engine.enqueue_again(request)
        return 0

    cdef int begin(self, Request request, bint more) except -1:
        """Submit *request* and wait for nothing: the first half of `perform`. `end` is the other half.

        If `end` is never called, the request goes on to its own end. With *more* coming at once, the requests
        go out together. Raises as `perform` does."""
        self._caller()
        if self.must_attach:
            self.attach()
        # Set this first: a kill of this greenlet must never abandon the request, because another greenlet may
        # come for its result.
        request.stays = True
        self.engine.enqueue(request)
        # A full batch gains nothing by waiting for more.
        if more and self.engine.pending.count < BATCH_MAX:
            return self._end_turn_soon()
        self.flush()
        self._unready(request)
        # The flush may have found other requests done. Their greenlets wait, and this greenlet goes on.
        return self.ask_for_pass()

    cdef int _unready(self, Request request) except -1:
        """Take a request that was begun and is done out of `Engine.ready`. `end` finds its answer in it."""
        if request.state == DONE and request.queue != NULL:
            # No greenlet has to be woken, so the request takes no place in a pass.
            self.engine.ready.remove(request)
            request.release()
        return 0

    cdef int begin_by_thread(self, Request request, Pool pool) except -1:
        """Do the same as `begin`, by a native thread of *pool*."""
        self._caller()
        request.stays = True
        # Begun requests read or write. So this never leaves the request as it is, as it may with an open.
        self._lend(request, pool)
        self._unready(request)
        return 0

    cdef int let_run(self, Request request, Pool pool) except -1:
        """Have a thread of *pool* make the call of *request*, and wait for nothing.

        No greenlet waits for the result, so this may be called from anywhere in the thread of the hub."""
        self._lend(request, pool)
        # The call may be done already, by a quick worker or here. A pass then releases the request.
        if self.sections == 0:
            self.ask_for_pass()
        return 0

    cdef int64_t end(self, Request request) except? -4096:
        """Wait for a request that `begin` has submitted, and return the bytes moved or minus the errno.

        Call it once for each request. If this greenlet is killed, the request goes on, and `end` may be
        called again."""
        current = self._caller()
        cdef int64_t result
        if request.state != DONE:
            # `begin` may have left it pending, because more was to come.
            self.flush()
        if request.state == DONE and request.queue == NULL:
            # A drain pass or `begin` has released it, and only its answer is left. The greenlet did not park,
            # so this counts in its run of inline operations: otherwise a loop of `begin` and `end` would
            # never give the loop its turn.
            result = request.answer
            self.end_in_line()
            return result
        return self._result(request, current)

    cdef int end_in_line(self) except -1:
        """Count an operation that was done inline, and give the loop its turn after a bounded run of them.

        Call this after the operation. During a wait before it, its fd could be closed and the number reused.
        Raises OSError (ECANCELED) in a child that was forked during the wait."""
        cdef Request request
        self.engine.in_line += 1
        if self._budget.run == 0:
            # This is the first operation since the loop had its
            # turn. Have the end of this hub turn reset the count.
            self._end_turn_soon()
            self._budget.began = self.engine.context.now()
        self._budget.run += 1
        # Most operations are not timed: see "Budget" in policy.pxd.
        if self._budget.run % HITS_UNTIMED == 0 and self._run_is_over(HITS_MAX):
            # Park on a request that does nothing and is done already. It is in `ready`, so a pass of the next
            # hub turn resumes this greenlet, after the others that are ready.
            request = new_request(CALL, -1, 0, 0, 1)
            self.engine.settle(request, 0)
            self._park(request, greenlet_current())
            # A fork has cancelled the request, and this is the child. The kernel may have filled pages that
            # only the parent has, and this process may have zeros where the bytes were read to.
            if request.answer < 0:
                raise OSError(ECANCELED, os.strerror(ECANCELED))
        return 0

    cdef int check_caller(self) except -1:
        """Raise BlockingSwitchOutError in the hub and inside `uninterrupted`, where no greenlet can wait."""
        self._caller()
        return 0

    cdef object _caller(self):
        """Return the current greenlet. Raises BlockingSwitchOutError if it must not wait."""
        current = greenlet_current()
        # The hub wakes all greenlets of its thread. If it waited itself, no code would wake it.
        if current is self.hub:
            raise BlockingSwitchOutError('greenaio was called in the hub, where nobody can wait')
        # The dictionary is empty in most programs, so look at that first.
        if _inside and current in _inside:
            raise BlockingSwitchOutError(REFUSED)
        return current

    cdef int64_t _result(self, Request request, current, uint64_t now=0) except? -4096:
        """Park *current* until *request* is done, release the request, and return its answer.

        *now* is the time in ns, or 0 if it is not known."""
        cdef int64_t result
        # A request that is done needs no wait. But a greenlet whose requests are all done inline would keep
        # the hub, so it parks now and then.
        if request.state != DONE or self._run_is_over(RUN_MAX, now):
            self._park(request, current)
        elif request.queue != NULL:
            # No pass has to wake this greenlet.
            self.engine.ready.remove(request)
        result = request.answer
        request.release()
        return result

    cdef int _end_turn_soon(self) except -1:
        """Have the pending requests submitted at the end of this hub turn, and the budget begin again there.

        A pass needs no such end, because it submits at its own end."""
        if self.sections == 0 and self.turn_end is None:
            self.turn_end = self.hub.loop.run_callback(self._on_turn_end)
        return 0

    def perform_request(self, Request request not None):
        """Do the same as `perform`, for callers in Python.

        Raises RuntimeError in another thread than the hub's."""
        # Callers in Cython get the driver of their own thread. A caller in Python may have any driver.
        if self.hub.thread_ident != _get_ident():
            raise RuntimeError(f'{self!r} belongs to the hub of another thread')
        return self.perform(request)

    cdef object _park(self, Request request, current):
        """Park the greenlet *current* until *request* is done. See "Park and next".

        Raises the exception that another greenlet throws into it, and marks that as thrown. By then the
        request is withdrawn or abandoned."""
        cdef PyObject *to
        # The hub is next, and must find the requests that are ready. In a pass it will look for them anyway.
        if self.sections == 0:
            self.ask_for_pass()
        self.waiting += 1
        try:
            self.hold_loop()
            # A greenlet may have a method that gevent's own switch
            # to the hub calls first. This switch does the same.
            switch_out = getattr(current, 'switch_out', None)
            if switch_out is not None:
                switch_out()
            # No Python code runs from here to the switch: see "Park and next". A request
            # that is still in a list will be found there, with its waiter. Otherwise the
            # code above has run a pass, which handed the request over and found no waiter.
            # Then this greenlet must not wait, because no other pass would wake it.
            if request.queue != NULL:
                # Ask for the next before there is a waiter, because the next may be this very request.
                to = self._next()
                request.waiter = current
                greenlet_switch(to)
                # The code that wakes this greenlet takes the waiter away from a request that is DONE. Any
                # other switch comes from a stranger. Both signs are needed, because `close` also takes the
                # waiter away from requests in flight.
                if request.waiter is not None or request.state != DONE:
                    raise InvalidSwitchError(f'{current!r} was switched into, but waits for {request!r}')
        except BaseException as error:
            # The greenlet was killed, timed out, or thrown into. Take the token away first: no pass may
            # switch into this greenlet from here on, although the request may be ready in a moment.
            request.waiter = None
            self._leave(request)
            # The layers above ask for this mark, to tell a kill from the answer of the operation.
            thrown(error)
            raise
        finally:
            self.waiting -= 1
            # A pass lets go at its end, because its next greenlet probably parks again.
            if self.waiting == 0 and self.sections == 0:
                self.let_go_of_loop()

    cdef PyObject *_next(self) noexcept:
        """Return the greenlet to switch to: the hub, or in a pass the greenlet that the hub would wake next.

        The reference is borrowed: see "Park and next". It stays valid, because a parked greenlet has itself
        in a variable of `perform`."""
        cdef PyObject *waiter
        cdef Request request
        # Outside of a pass no greenlet may be woken from here. In a pass the hub is next if nothing is ready,
        # because it looks at the ring, and if the budget is spent, because it ends the pass.
        if self.sections == 0 or self.engine.ready.count == 0 or self._run_is_over():
            return <PyObject *>self.hub
        request = self.engine.ready.first()
        waiter = <PyObject *>request.waiter
        if request.waiter is None:
            # The request was abandoned, or belongs to the greenlet that parks just now. The release of an
            # abandoned one may run any code, so the hub does it.
            return <PyObject *>self.hub
        # Do as `_wake` does: take the request out and the token away before the switch.
        self.engine.ready.remove(request)
        request.waiter = None
        return waiter

    cdef int _leave(self, Request request) except -1:
        """Withdraw *request*, or abandon it, because its greenlet goes without the result.

            ==========================  ==========================================================
            the request is              it is
            ==========================  ==========================================================
            begun by `begin`            left alone
            PENDING or DECLINED         withdrawn: it never happens
            DONE                        released here instead of in a pass
            with no thread yet          taken out of the queue: it never happens
            with the kernel or thread   abandoned: it may happen, and a pass releases it
            ==========================  ==========================================================
        """
        cdef Engine engine = self.engine
        # In a forked child the lock of a pool may be held for ever, by a thread of the parent. Hear of the
        # fork first: then the request is cancelled, and no lock is needed.
        _notice_fork()
        if request.stays:
            # Another greenlet may come for its result, and a drain pass releases it when it is done.
            return 0
        if engine.withdraw(request):
            # Neither the kernel nor a thread has the request, so its buffers may go at once.
            request.release()
            self._submit_admitted()
        elif request.state == DONE:
            # Its result is dropped. `release` closes an fd that it may have opened.
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
                # The kernel has the file, and an abandoned request goes no other way. So a close of its
                # number need not wait for it. A thread still needs the number, until it is done.
                request.let_go_of_numbers()
        return 0

    cdef int _submit_admitted(self) except -1:
        """Have the request submitted that a share has let in, because another one has left it."""
        if self.engine.pending.count and not self.closed:
            self._end_turn_soon()
        return 0

    cdef bint _run_is_over(self, int limit=RUN_MAX, uint64_t now=0) noexcept:
        """Count a wake or a completion, and return whether the budget of this turn is spent.

        Completions inline never enter the loop, so they are counted as well. Past the bound the greenlet
        parks on a request that is done, and a later pass resumes it. *now* is the time in ns, or 0 if it is
        not known."""
        return is_spent(&self._budget, limit, now if now else self.engine.context.now())

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

    def _on_turn_end(self):
        """Submit the requests that the greenlets of this hub turn have asked for. The loop calls this."""
        _notice_fork()
        # Reset it first: code that runs below may need another end of a turn.
        self.turn_end = None
        # The loop is about to serve timers and sockets, so the run of this turn is over.
        self._budget.run = 0
        if not self.closed:
            try:
                self.flush()
                # With a request ready there is work to do, and no reason to spin.
                if self.engine.ready.count == 0:
                    self._poll()
            except BaseException:
                # An exception must not get into the loop, because no greenlet would see it there.
                self._failed()
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

    # From the kernel ------------------------------------------------------------------------

    def _on_eventfd(self):
        """Clear the eventfd, reap, hand over, and submit. The watcher calls this."""
        _notice_fork()
        if self.closed:
            return
        # A spin has ended in vain, and here is the completion that
        # it waited for. Learn how much longer it should have been.
        if self._polling.unpolled_since:
            self._adapt_poll(self.engine.context.now() - self._polling.unpolled_since)
        # This is the pass, so code that runs during the reap must not ask for another one. From the end of
        # the reap on, a signal is needed again.
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
                # The loop runs in another greenlet than the hub, and
                # only the hub hands over. Have this called again.
                self.engine.context.signal()
        except BaseException:
            self._failed()
        finally:
            if not self.closed:
                self.ask_for_pass()

    def _failed(self):
        """Report an exception that belongs to no greenlet.

        It must not get into the loop, which would stop the watcher. Pending requests may have no completion
        left that could submit them, so a timer does."""
        self.hub.handle_error(self, *sys.exc_info())
        if (self.engine.pending.count or self.engine.declined.count) and not self.closed:
            self.retry_soon()

    cdef int _reap(self) except -1:
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

    cdef int _drain(self) except -1:
        """Hand over a bounded run of ready requests, and submit the new requests of their greenlets together.

        Only the hub runs this. If more requests are ready than the budget allows, the pass asks for the next
        one, and the loop serves timers and sockets in between."""
        cdef Engine engine = self.engine
        cdef Request request
        # Requests without a greenlet do not count in the budget. Otherwise more could be abandoned in a turn
        # than a pass releases.
        cdef int nobodys = 0
        # This turn of the loop begins with a full budget.
        self._budget.run = 0
        self.sections += 1
        # A pass may be long, so its requests wait for each other only while the device has plenty to do.
        engine.burst = 0
        try:
            # A greenlet that was woken may destroy the hub, so look at `closed` first.
            while not self.closed and self._more_is_ready() and not self._run_is_over(RUN_MAX + nobodys):
                request = engine.ready.popleft()
                if request.waiter is None:
                    nobodys += 1
                    # It was abandoned, or its greenlet is about to look by itself. That greenlet finds the
                    # request DONE and in no list, and takes the answer from it.
                    request.release()
                else:
                    self._wake(request)
        finally:
            # All of this is also done if a wake fails: requests
            # that were enqueued in the pass count on its end.
            self.sections -= 1
            engine.burst = BURST
            self._budget.run = 0
            if not self.closed:
                try:
                    self.flush()
                finally:
                    self.ask_for_pass()
                    # `_park` leaves this to the pass.
                    if self.waiting == 0:
                        self.let_go_of_loop()
        return 0

    cdef bint _more_is_ready(self) except -1:
        """Return whether a request is ready. If none is, reap, submit, and spin for a while.

        The cheapest step comes first. The submission comes before the spin, because the device must have work
        while the hub waits for it, and may do that work inside the submission."""
        cdef Engine engine = self.engine
        if engine.ready.count == 0:
            self._reap()
        if engine.ready.count == 0:
            self.flush()
        return engine.ready.count != 0 or self._poll()

    cdef int _wake(self, Request request) except -1:
        """Switch into the greenlet that is parked on *request*, until the pass comes back to the hub."""
        waiter = request.waiter
        # Take the token away before the switch: it tells the greenlet that its request is done.
        request.waiter = None
        try:
            greenlet_switch(<PyObject *>waiter)
        except BaseException:
            # A greenlet has ended with an exception, and its parent, the hub, gets it here. It is this
            # greenlet or one that the pass went on to. The other greenlets must still be woken, so the
            # exception is only reported.
            self.hub.handle_error(None, *sys.exc_info())
        return 0

    # Polling --------------------------------------------------------------------------------

    cdef bint _poll(self) except -1:
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
            self._reap()
            return engine.ready.count != 0
        # The completion did not come in time. `_on_eventfd` measures how much later it comes.
        self._polling.unpolled_since = engine.context.now()
        return False

    def _adapt_poll(self, uint64_t waited):
        """Adapt the length of the next spin: the completion came *waited* ns after the last one ended."""
        adapt(&self._polling, waited, <uint64_t><int>config.poll_max_us * 1000)


cdef inline _notice_fork():
    """Run the handlers of the bell, if this process was forked by C code and has not heard of it."""
    if forked():
        ring()
