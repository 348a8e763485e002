# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A request is in one list at a time, and only its queues move it to another.

All changes of a request's state are here. The table of them is in `greenaio._core.request`. No method of
this module submits anything, looks at the kernel, or wakes a greenlet.

No method runs Python code while the lists are not right. A request may run any Python code when it releases
its buffers, so that never happens here: the driver releases a request after it has taken it out of `ready`.
"""

from libc.errno cimport EAGAIN
from posix.unistd cimport close

from greenaio._core.context cimport Context
from greenaio._core.request cimport (
    DECLINED, DONE, IN_FLIGHT, NEW, PENDING, Request, RequestList, Share,
)
from greenaio._core.tally cimport BY_AIO, BY_THREAD, WRITE, Tally, count_time

cdef extern from "<errno.h>":
    const int ECANCELED


cdef class Queues(Tally):
    """The requests of one hub, by their places.

    *depth* is the number of requests that may be in flight at once. Raises ValueError if it is less than 1.
    """

    def __init__(self, Context context not None, int depth=256):
        if depth < 1:
            raise ValueError(f'depth must be at least 1, not {depth}')
        self.context = context
        self.depth = depth
        # A list exists for each place in the table of `greenaio._core.request`. A request is in exactly one
        # of them, or in the `held` list of its share, and that list owns the only reference that a request in
        # flight can rely on.
        self.pending = RequestList()
        self.in_flight = RequestList()
        self.lent = RequestList()
        self.declined = RequestList()
        self.moving = RequestList()
        self.ready = RequestList()
        self.shares = {}

    cpdef Share share(self, device, int limit):
        """Return the `Share` of *device*: *limit* requests, or half of the depth if that is less.

        *limit* counts only when the share is made, at the first call for *device*."""
        # Most requests go to the device of the request before, so the last answer is kept. An equal number
        # that is another object only takes the look-up.
        if device is self._device:
            return self._share
        share = self.shares.get(device)
        if share is None:
            # A device gets at most half of the depth. A frozen device then fills its half, and the other half
            # is left for the other devices. Without this limit its requests would take all slots of the
            # context, and the kernel gives a slot back only when the request ends.
            share = self.shares[device] = Share(max(1, min(limit, self.depth // 2)))
        self._device, self._share = device, share
        return share

    # To the kernel and the threads ----------------------------------------------------------

    cdef bint queue(self, Request request) except -1:
        """Move a NEW request to PENDING. Return whether it is in `pending`; else its share holds it.

        Raises ValueError if the request is not NEW, and OSError (EBADF) if a thread is closing its number."""
        if request.state != NEW:
            raise ValueError(f'enqueued twice: {request!r}')
        # Take the numbers first, because this step may fail, and then the request is still NEW and in no
        # list. From here on a close leaves the number open until the request lets go of it, so the number
        # cannot mean another file by the time the kernel looks it up.
        request.hold()
        request.state = PENDING
        # A request that the kernel declined comes here again. It still counts in its share, so it does not
        # wait for admission a second time.
        if request.share is not None and not request.admitted:
            if request.share.admitted >= request.share.limit:
                # The device has as many requests as it can queue. The request waits here until one of them
                # ends: `_leave_share` moves it on. Its time runs from now, so that `stuck` also finds a
                # request that a frozen device keeps from ever being offered.
                request.share.held.append(request)
                request.began = self.context.now()
                return False
            request.share.admitted += 1
            request.admitted = True
        self.pending.append(request)
        return True

    cdef void taken(self, Request request) noexcept:
        """Move a PENDING request to IN_FLIGHT: from here on the kernel may write the buffer at any time."""
        request.state = IN_FLIGHT
        self.pending.remove(request)
        self.in_flight.append(request)
        self.submitted += 1
        # The kernel looked up the number in io_submit and holds the file itself, so the program may close the
        # number from here on. A request that was asked not to wait keeps its number, because the kernel may
        # decline it, and the next way needs the number again.
        if request.handle is not None and not request.asked:
            if request.handle.let_go_unless_last():
                request.handle = None
            else:
                # The number is being closed and this request is its last user. The
                # close may run any code, and the lists are not right before the whole
                # batch has been moved. So the close comes at the end of the flush.
                self.to_close = True

    cdef void lend(self, Request request) noexcept:
        """Move a NEW or DECLINED request to IN_FLIGHT: a native thread may write the buffer at any time."""
        if request.state == DECLINED:
            self.undecline(request)
        request.state = IN_FLIGHT
        # The time of the thread counts from here. An attempt by
        # native AIO that was declined before is not its fault.
        request.began = self.context.now()
        self.lent.append(request)
        self.by_thread += 1

    cdef void take_back(self, Request request) noexcept:
        """Move a request that no thread has begun with from IN_FLIGHT back to NEW."""
        # No thread can begin with it now: the caller has taken the job out of the queue of its pool, under
        # the lock of the pool, or has made the call itself. So the buffers are ours again.
        self.lent.remove(request)
        self._leave_share(request)
        request.state = NEW

    cpdef bint withdraw(self, Request request) except -1:
        """Move a PENDING or DECLINED request back to NEW. Return whether this was possible.

        It is not if the kernel or a thread has the request, or if the request is DONE."""
        if request.state == PENDING:
            self._unqueue(request)
        elif request.state == DECLINED:
            self.undecline(request)
        else:
            return False
        # The place in the share is free again. This may admit
        # another request, which the caller has to submit.
        self._leave_share(request)
        request.state = NEW
        return True

    # To the end -----------------------------------------------------------------------------

    cdef void finish(self, Request request, int64_t result) noexcept:
        """Move a PENDING or IN_FLIGHT request to DONE; or to DECLINED, if it has another way.

        *result* is the number of bytes moved, or minus the errno."""
        # A native thread made the system call without RWF_NOWAIT,
        # so its answer is the true one and needs no other way.
        if request.queue == <void *>self.lent:
            self.lent.remove(request)
            self._time(request, BY_THREAD, result)
            self._end(request, result)
            return
        # Ask before the state changes, because the answer
        # depends on whether io_submit or an event declined it.
        cdef bint declined = request.is_declined_by(result)
        if request.state == IN_FLIGHT:
            self.in_flight.remove(request)
            # An answer that declines the request is still an event of the kernel, and counts as one. So
            # `submitted` is always the sum of `completed` and the requests in flight.
            self.completed += 1
            # The latency of native AIO is only known for a request that it has done.
            if not declined:
                self._time(request, BY_AIO, result)
        else:
            # io_submit refused the request, or `refuse` gives up
            # on it. The kernel never had it, so it has no time.
            self._unqueue(request)
        if declined:
            # Only note the request here. The choice of its next way may run Python code, and a reap is under
            # way, so `Dispatcher._move_declined` makes that choice later. The request stays in its share until
            # then, because it will go on.
            request.answer = result
            request.state = DECLINED
            self.declined.append(request)
        else:
            self._end(request, result)

    cdef void _end(self, Request request, int64_t result) noexcept:
        """Move a request that is in no list to DONE, and add up the *result* of all its ways.

        A read that fails after a part has read nothing, because a short read would look like the end of the
        file. A write that fails after a part has written that part, as write(2) reports it. With ECANCELED,
        such as after a fork, it answers the error."""
        self._leave_share(request)
        if request.done:
            if result >= 0:
                result += <int64_t>request.done
            elif request.direction == WRITE and result != -ECANCELED:
                result = <int64_t>request.done
        request.answer = result
        request.state = DONE
        # No greenlet is woken here. A drain pass takes the request out of `ready`, or its own greenlet does,
        # if it has not parked.
        self.ready.append(request)

    cdef void _time(self, Request request, int way, int64_t result) noexcept:
        """Count how long *request* took, unless the kernel declined it or a fork took it away."""
        # `reaped_ns` is 0 if no completion is being processed, such as when a forked child cancels its
        # requests. EAGAIN means that no work was done, so its time would only flatter the statistics.
        if self.reaped_ns > request.began > 0 and result != -EAGAIN:
            count_time(self, way, request.direction, self.reaped_ns - request.began)

    cdef void _unqueue(self, Request request) noexcept:
        """Take a PENDING request out, of `pending` or of the requests that its share holds."""
        # PENDING has two places. The pointer to the list tells them apart without a search.
        if request.queue == <void *>self.pending:
            self.pending.remove(request)
        else:
            request.share.held.remove(request)

    cdef void _leave_share(self, Request request) noexcept:
        """Let in the next request that the share holds. It goes out with the next flush."""
        cdef Share share = request.share
        # The request has no share, or was held and never admitted, or has left before. So this may be called
        # at every end of a request.
        if not request.admitted:
            return
        request.admitted = False
        # With requests held, the place passes straight to the first of them, and `admitted` stays as it is.
        if share.held.count == 0:
            share.admitted -= 1
            return
        request = share.held.popleft()
        request.admitted = True
        # Do not flush here, because this runs in the middle of a reap. The callers see that `pending` is not
        # empty and submit at the end of their pass or turn.
        self.pending.append(request)

    cdef void settle(self, Request request, int64_t result) noexcept:
        """Move a NEW or DECLINED request to DONE with *result*. Neither the kernel nor a thread has it."""
        if request.state == DECLINED:
            self.undecline(request)
        self._end(request, result)

    cpdef int refuse(self, int code) except -1:
        """Move every PENDING request to DONE with minus the errno *code*, or to DECLINED.

        Return how many there were. Held requests are among them."""
        cdef int n = 0
        # A request that ends may let another of its share into `pending`. The loop takes those as well.
        while self.pending.count:
            self.finish(self.pending.first(), -code)
            n += 1
        # A share may still hold requests, because its other requests are in flight or with threads.
        for share in self.shares.values():
            while (<Share>share).held.count:
                self.finish((<Share>share).held.first(), -code)
                n += 1
        # Nothing waits for room in the kernel any more.
        self.blocked = False
        return n

    cpdef int cancel(self, int code) except -1:
        """Move all requests to DONE with minus the errno *code*, also the ready ones. Return how many ended.

        A forked child calls this. The context of the kernel and the threads stayed with the parent, so no
        event or result will arrive here. The buffers of a request that is ready may be pages that the child
        did not get."""
        cdef int n = self.refuse(code)
        cdef Request request
        # Each request that ends may let another of its share into `pending`, so `refuse` follows each step.
        # No request is submitted, because the child has no context.
        while self.in_flight.count:
            self.finish(self.in_flight.first(), -code)
            n += self.refuse(code) + 1
        # The workers are threads of the parent, so they do not write the memory of this process.
        while self.lent.count:
            self.finish(self.lent.first(), -code)
            n += self.refuse(code) + 1
        n += self.cancel_declined(-code) + self.refuse(code)
        # This includes the requests that were moved to `ready` just now.
        for request in self.ready:
            if request.gives_fd and request.answer >= 0:
                # An open has succeeded in the parent before the fork. The child has a copy of the fd, and its
                # greenlet gets an error, so no code here would ever close it.
                close(<int>request.answer)
            request.answer = -code
        return n

    # From way to way ------------------------------------------------------------------------

    cdef Request next_declined(self):
        """Move the first request of `declined` to `moving`, and return it.

        It stays in `moving` until its next way is chosen. The choice may run any Python code, and in that
        time a kill may withdraw the request, or a fork or the end of the hub may cancel it. The caller finds
        out because the request is not in `moving` any more."""
        cdef Request request = self.declined.popleft()
        self.moving.append(request)
        return request

    cdef void undecline(self, Request request) noexcept:
        # A kill finds the request in `declined`, or in `moving` while its next way is chosen.
        if request.queue == <void *>self.moving:
            self.moving.remove(request)
        else:
            self.declined.remove(request)

    cdef int cancel_declined(self, int64_t result) noexcept:
        """Move every DECLINED request to DONE with *result*. Return how many there were."""
        cdef int n = 0
        # A request in `moving` has a `Dispatcher._move` on the stack of some greenlet. That code finds the
        # request gone from `moving`, and does nothing with it.
        while self.declined.count or self.moving.count:
            self.settle(self.declined.first() if self.declined.count else self.moving.first(), result)
            n += 1
        return n

    # For operators and tests ----------------------------------------------------------------

    def requests(self):
        """Return a list of all requests that are not done, as pairs of the request and its place.

        The place is 'queued' (also while the next way is chosen), 'in flight' or 'with a thread'."""
        cdef Request request
        found = []
        for queue, where in ((self.in_flight, 'in flight'), (self.lent, 'with a thread'), (self.pending, 'queued'),
                             (self.declined, 'queued'), (self.moving, 'queued'),
                             *[((<Share>share).held, 'queued') for share in list(self.shares.values())]):
            found += [(request, where) for request in queue]
        return found

    def _check(self):
        """Assert all that must hold between two calls. For tests."""
        seen = set()
        shares = [<Share>share for share in self.shares.values()]
        for queue, states in ((self.pending, (PENDING,)), (self.in_flight, (IN_FLIGHT,)),
                              (self.lent, (IN_FLIGHT,)), (self.declined, (DECLINED,)),
                              (self.moving, (DECLINED,)), (self.ready, (DONE,)),
                              *[((<Share>share).held, (PENDING,)) for share in shares]):
            requests = list(queue)
            assert len(requests) == len(queue), 'a list that miscounts'
            for request in requests:
                assert request.state in states, f'{request!r} is in the wrong list'
                assert request in queue
                # A request is abandoned only if the kernel or a
                # thread has it, and it goes no other way afterwards.
                assert not request.abandoned or queue in (self.in_flight, self.lent, self.ready), (
                    f'{request!r} was abandoned, and has a way to go')
                assert id(request) not in seen, f'{request!r} is in two lists'
                # The kernel may still have to look up the number, so the request must keep the number from
                # reuse. It need not once the kernel has the file and the request will go no other way.
                assert (<Request>request).handle is not None or request.fd < 0 or queue is self.ready or (
                    queue is self.in_flight and (request.abandoned or not (<Request>request).asked)), (
                    f'{request!r} may go to another file')
                seen.add(id(request))
        # Each request that the kernel took has exactly one event.
        assert self.submitted == self.completed + len(self.in_flight), 'an event lost or invented'
        for share in shares:
            admitted = [request for queue in (self.pending, self.in_flight, self.lent, self.declined, self.moving)
                        for request in queue if (<Request>request).share is share and (<Request>request).admitted]
            assert (<Share>share).admitted == len(admitted) <= (<Share>share).limit, 'a share that miscounts'
            # A held request moves on when an admitted one ends, so there must be one.
            assert not len((<Share>share).held) or len(admitted), 'held, and nothing will let it in'
        assert len(self.in_flight) <= self.depth, 'more in flight than there is room for'
