# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A driver performs the requests of the greenlets of one hub: it submits, parks and returns the result.

`perform` does all of this for one request. `begin` and `end` are its two halves, so that one greenlet can
have several requests under way.
"""

from gevent.monkey import get_original

from libc.errno cimport EAGAIN

from greenaio._core.context cimport BATCH_MAX
from greenaio._core.engine cimport Engine
from greenaio._core.parking cimport Parking
from greenaio._core.policy cimport RUN_MAX
from greenaio._core.request cimport DONE, Request
from greenaio._core.threads cimport Pool

_get_ident = get_original('_thread', 'get_ident')


cdef class Driver(Parking):
    """Perform the requests of the greenlets of one hub. Only for the thread of the hub.

    `greenaio._core.hub` makes it, connects it with the loop and the kernel, and ends it."""

    # One request ----------------------------------------------------------------------------

    cdef int64_t perform(self, Request request) except? -4096:
        """Submit *request*, park until it is done, and return the bytes moved or minus the errno.

        If the greenlet is killed or timed out, the exception goes up at once. A request that the kernel does
        not have is withdrawn. Any other is abandoned and finishes by itself, with its buffers pinned. An
        abandoned write may still happen. Raises BlockingSwitchOutError in the hub, and OSError (EBADF) if a
        thread is closing the number.
        """
        cdef Engine engine = self.engine
        # Refuse a caller that can't wait before anything has happened.
        current = self.caller()
        if self.must_attach:
            # This is the first use after a fork. Many children
            # never do I/O, so the context is made only here.
            self.attach()
        if engine.enqueue(request):
            self.flush()
            # Outside of a pass this greenlet has nothing better to do than to wait for its request. In a pass
            # other greenlets are ready, and `_more_is_ready` polls if none is.
            if self.sections == 0 and request.state != DONE:
                self.poll()
        else:
            # The request waits for others to share its system call. The end of the pass or of this hub turn
            # submits it at the latest.
            self.end_turn_soon()
        # A request that is done by now was submitted here, so
        # the time of that submission serves for the budget.
        return self._result(request, current, engine.submitted_ns)

    cdef int64_t perform_by_thread(self, Request request, Pool pool) except? -4096:
        """Do the same as `perform`, by a native thread of *pool*: the same rules, the same result.

        A call that no thread has begun with is withdrawn when the greenlet is killed. If no thread can be
        started, the call is made here and blocks the hub. An open that may wait for ever stays NEW instead,
        and the result is -EAGAIN.
        """
        current = self.caller()
        if not self.lend(request, pool):
            return -EAGAIN
        return self._result(request, current)

    def perform_request(self, Request request not None):
        """Do the same as `perform`, for callers in Python.

        Raises RuntimeError in another thread than the hub's."""
        # Callers in Cython get the driver of their own thread. A caller in Python may have any driver.
        if self.hub.thread_ident != _get_ident():
            raise RuntimeError(f'{self!r} belongs to the hub of another thread')
        return self.perform(request)

    # Several requests of one greenlet -------------------------------------------------------

    # The two halves of `perform`, for a greenlet that has several requests under way:
    #
    #     `begin`     submits, and takes a request that is done at once out of the queue of a pass
    #     `end`       waits; after a kill the request goes on, and `end` may be called again
    #     no `end`    the request goes on to its own end, and a pass releases it
    cdef int begin(self, Request request, bint more) except -1:
        """Submit *request* and wait for nothing: the first half of `perform`. `end` is the other half.

        If `end` is never called, the request goes on to its own end. With *more* coming at once, the requests
        go out together. Raises as `perform` does."""
        self.caller()
        if self.must_attach:
            self.attach()
        # Set this first: a kill of this greenlet must never abandon the request, because another greenlet may
        # come for its result.
        request.stays = True
        self.engine.enqueue(request)
        # A full batch gains nothing by waiting for more.
        if more and self.engine.pending.count < BATCH_MAX:
            return self.end_turn_soon()
        self.flush()
        self.unready(request)
        # The flush may have found other requests done. Their greenlets wait, and this greenlet goes on.
        return self.ask_for_pass()

    cdef int begin_by_thread(self, Request request, Pool pool) except -1:
        """Do the same as `begin`, by a native thread of *pool*."""
        self.caller()
        request.stays = True
        # Begun requests read or write. So this never leaves the request as it is, as it may with an open.
        self.lend(request, pool)
        self.unready(request)
        return 0

    cdef int64_t end(self, Request request) except? -4096:
        """Wait for a request that `begin` has submitted, and return the bytes moved or minus the errno.

        Call it once for each request. If this greenlet is killed, the request goes on, and `end` may be
        called again."""
        current = self.caller()
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

    cdef int64_t _result(self, Request request, current, uint64_t now=0) except? -4096:
        """Park *current* until *request* is done, release the request, and return its answer.

        *now* is the time in ns, or 0 if it is not known."""
        cdef int64_t result
        # A request that is done needs no wait. But a greenlet whose requests are all done inline would keep
        # the hub, so it parks now and then.
        if request.state != DONE or self.run_is_over(RUN_MAX, now):
            self.park(request, current)
        elif request.queue != NULL:
            # No pass has to wake this greenlet.
            self.engine.ready.remove(request)
        result = request.answer
        request.release()
        return result
