# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""`Parking.park` is the only code that parks a greenlet; it and `Parking._wake` are all that switches.

Switching follows one rule: *only a drain pass switches into a greenlet, and only into one that is parked on
that very request*. So a request that finishes inside its own submission never switches, and nothing recurses,
however deep submissions complete inline. Completions go to one queue (`Engine.ready`), and one pass in the
hub (`Parking._drain`) resumes greenlets from it.
"""

import os
import sys

from gevent.exceptions import BlockingSwitchOutError, InvalidSwitchError

from greenaio._core.ends import thrown
from greenaio._core.uninterrupted import REFUSED, inside

from cpython.ref cimport PyObject
from libc.stdint cimport uint64_t

from greenaio._core.dispatch cimport Dispatcher, notice_fork
from greenaio._core.engine cimport Engine
from greenaio._core.policy cimport BURST, HITS_MAX, HITS_UNTIMED, RUN_MAX, is_spent
from greenaio._core.request cimport CALL, DONE, Request, new_request
from greenaio._core.threads cimport withdraw

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

# The greenlets that are inside `uninterrupted` and must not be parked. It is empty in most programs.
cdef dict _inside = inside


cdef inline _switch_out(current):
    """Call the method of *current* that gevent's own switch to the hub calls first, if there is one."""
    switch_out = getattr(current, 'switch_out', None)
    if switch_out is not None:
        switch_out()


cdef class Parking(Dispatcher):
    """Park the greenlets of one hub until their requests are done, and wake them. Only for the thread of the
    hub."""

    cdef int hold_loop(self) except -1:
        """Keep the loop running, because a greenlet is parked."""
        raise NotImplementedError

    cdef int let_go_of_loop(self) except -1:
        """Let the loop end, because no greenlet is parked."""
        raise NotImplementedError

    # Park -----------------------------------------------------------------------------------

    # Park and next.
    #
    # A pass runs in the hub. It takes the first ready request and switches into its greenlet A (`_wake`).
    # When A parks on its next request, the obvious target is the hub, which would take the next ready request
    # and switch into greenlet B. `_next` leaves the hub out: A switches straight to B, and the hub stays
    # suspended in `_wake` until a greenlet of the pass finds nothing ready, or the budget is spent. This is
    # one switch for a request instead of two.
    #
    #     ====================  =====================  =====================  ======================
    #     hub, in the pass      greenlet A             greenlet B             `Engine.ready`
    #     ====================  =====================  =====================  ======================
    #     wake A  ----------->  has its result                                B
    #     (in `_wake`)          perform: enqueue                              B
    #                           park: next is B        has its result         --
    #                           (parked)               perform, park          --
    #     the pass goes on  <------------------------  (parked)               --
    #     ====================  =====================  =====================  ======================
    #
    # Three things make this right:
    #
    # 1. `Request.waiter` is the token of a switch. The code that switches into a greenlet first takes the
    #    token away. So a greenlet that finds its token still there was switched into by other code, and its
    #    request is not done.
    # 2. `park` runs no Python code between the look at the request's list and the switch. A finalizer or a
    #    signal handler there could run a pass, and the completion would find no waiter and wake no greenlet.
    #    Before that point any code may run, because the list is looked at again after it.
    # 3. No reference to another greenlet is held across the switch. A parked greenlet has itself in a
    #    variable of `perform`; a reference from A would keep B alive, dead, for as long as A waits.
    cdef object park(self, Request request, current):
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
            _switch_out(current)
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
        if self.sections == 0 or self.engine.ready.count == 0 or self.run_is_over():
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

    # The end of a request whose greenlet goes without the result:
    #
    #     ==========================  ==========================================================
    #     the request is              it is
    #     ==========================  ==========================================================
    #     begun by `begin`            left alone
    #     PENDING or DECLINED         withdrawn: it never happens
    #     DONE                        released here instead of in a pass
    #     with no thread yet          taken out of the queue: it never happens
    #     with the kernel or thread   abandoned: it may happen, and a pass releases it
    #     ==========================  ==========================================================
    cdef int _leave(self, Request request) except -1:
        """Withdraw *request*, or abandon it, because its greenlet goes without the result."""
        cdef Engine engine = self.engine
        # In a forked child the lock of a pool may be held for ever, by a thread of the parent. Hear of the
        # fork first: then the request is cancelled, and no lock is needed.
        notice_fork()
        if request.stays:
            # Another greenlet may come for its result, and a drain pass releases it when it is done.
            return 0
        if engine.withdraw(request):
            # Neither the kernel nor a thread has the request, so its buffers may go at once.
            request.release()
        elif request.state == DONE:
            # Its result is dropped. `release` closes an fd that it may have opened.
            if request.queue != NULL:
                engine.ready.remove(request)
            request.abandoned = True
            request.release()
        elif not request.must_run and withdraw(request):
            engine.take_back(request)
            request.release()
        else:
            # The engine keeps it, and a pass releases it after its event.
            request.abandoned = True
            engine.abandoned += 1
            request.meet()
            if request.queue == <void *>engine.in_flight:
                # The kernel has the file, and an abandoned request goes no other way. So a close of its
                # number need not wait for it. A thread still needs the number, until it is done.
                request.let_go_of_numbers()
        # A request that leaves its share lets in another, which has to be submitted.
        if engine.pending.count and not self.closed:
            self.end_turn_soon()
        return 0

    # Callers and budget ----------------------------------------------------------------------

    cdef int check_caller(self) except -1:
        """Raise BlockingSwitchOutError in the hub and inside `uninterrupted`, where no greenlet can wait."""
        self.caller()
        return 0

    cdef object caller(self):
        """Return the current greenlet. Raises BlockingSwitchOutError if it must not wait."""
        current = greenlet_current()
        # The hub wakes all greenlets of its thread. If it waited itself, no code would wake it.
        if current is self.hub:
            raise BlockingSwitchOutError('greenaio was called in the hub, where nobody can wait')
        # The dictionary is empty in most programs, so look at that first.
        if _inside and current in _inside:
            raise BlockingSwitchOutError(REFUSED)
        return current

    cdef int end_in_line(self) except -1:
        """Count an operation that was done inline, and give the loop its turn after a bounded run of them.

        Call this after the operation. During a wait before it, its fd could be closed and the number reused.
        Raises OSError (ECANCELED) in a child that was forked during the wait."""
        cdef Request request
        self.engine.in_line += 1
        if self._budget.run == 0:
            # This is the first operation since the loop had its
            # turn. Have the end of this hub turn reset the count.
            self.end_turn_soon()
            self._budget.began = self.engine.context.now()
        self._budget.run += 1
        # Most operations are not timed: see "Budget" in policy.pxd.
        if self._budget.run % HITS_UNTIMED == 0 and self.run_is_over(HITS_MAX):
            # Park on a request that does nothing and is done already. It is in `ready`, so a pass of the next
            # hub turn resumes this greenlet, after the others that are ready.
            request = new_request(CALL, -1, 0, 0, 1)
            self.engine.settle(request, 0)
            self.park(request, greenlet_current())
            # A fork has cancelled the request, and this is the child. The kernel may have filled pages that
            # only the parent has, and this process may have zeros where the bytes were read to.
            if request.answer < 0:
                raise OSError(ECANCELED, os.strerror(ECANCELED))
        return 0

    cdef bint run_is_over(self, int limit=RUN_MAX, uint64_t now=0) noexcept:
        """Count a wake or a completion, and return whether the budget of this turn is spent.

        Completions inline never enter the loop, so they are counted as well. Past the bound the greenlet
        parks on a request that is done, and a later pass resumes it. *now* is the time in ns, or 0 if it is
        not known."""
        return is_spent(&self._budget, limit, now if now else self.engine.context.now())

    # Wake -----------------------------------------------------------------------------------

    def _on_eventfd(self):
        """Clear the eventfd, reap, hand over, and submit. The watcher calls this."""
        notice_fork()
        if self.closed:
            return
        # A spin has ended in vain, and here is the completion that
        # it waited for. Learn how much longer it should have been.
        if self._polling.unpolled_since:
            self._adapt_poll(self.engine.context.now() - self._polling.unpolled_since)
        # This is the pass, so code that runs during the reap must not ask for another one. From the end of
        # the reap on, a signal is needed again.
        self.asked_for_pass = True
        # Clear before the look: see "The order of the eventfd" in eventfd.pyx.
        self.engine.context.clear()
        try:
            try:
                self.reap()
            finally:
                self.asked_for_pass = False
            if greenlet_current() is self.hub:
                self._drain()
            else:
                # The loop runs in another greenlet than the hub, and
                # only the hub hands over. Have this called again.
                self.engine.context.signal()
        except BaseException:
            self.failed()
        finally:
            if not self.closed:
                self.ask_for_pass()

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
            while not self.closed and self._more_is_ready() and not self.run_is_over(RUN_MAX + nobodys):
                request = engine.ready.popleft()
                if request.waiter is None:
                    nobodys += 1
                    # It was abandoned, or its greenlet is about to look by itself. That greenlet finds the
                    # request DONE and in no list, and takes the answer from it.
                    request.release()
                else:
                    self._wake(request)
        finally:
            # Also if a wake fails: requests that were enqueued in the pass count on its end.
            self.sections -= 1
            engine.burst = BURST
            self._budget.run = 0
            if not self.closed:
                try:
                    self.flush()
                finally:
                    self.ask_for_pass()
                    # `park` leaves this to the pass.
                    if self.waiting == 0:
                        self.let_go_of_loop()
        return 0

    cdef bint _more_is_ready(self) except -1:
        """Return whether a request is ready. If none is, reap, submit, and spin for a while.

        The cheapest step comes first. The submission comes before the spin, because the device must have work
        while the hub waits for it, and may do that work inside the submission."""
        cdef Engine engine = self.engine
        if engine.ready.count == 0:
            self.reap()
        if engine.ready.count == 0:
            self.flush()
        return engine.ready.count != 0 or self.poll()

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
