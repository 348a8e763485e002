# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A request is in one list at a time, and only the engine moves it to another.

The engine takes requests from the driver, hands them to the kernel in batches, and collects what the kernel
and native threads have done. It knows no gevent and never waits, so its tests run it on a scripted kernel.
The table of all states and their changes is in `greenaio._core.request`.

Nothing here runs Python code between a look at the kernel and the moment at which the lists are right again.
A request may run any Python code when it releases its buffers, so the engine never does that: the driver
releases a request after it has taken it out of `Engine.ready`.
"""

from libc.errno cimport EAGAIN, EINTR
from libc.stdint cimport uintptr_t
from posix.unistd cimport close

from greenaio._core.context cimport BATCH_MAX, PREADV, PWRITEV, Context, times_waited
from greenaio._core.policy cimport batch_limit
from greenaio._core.request cimport (
    DECLINED, DONE, IN_FLIGHT, NEW, PENDING, Request, RequestList, Share,
)
from greenaio._core.tally cimport BY_AIO, BY_THREAD, WRITE, Tally, count_time

cdef extern from "<errno.h>":
    const int ECANCELED

# An io_submit that takes longer than this has waited for a disk or for the
# processor, in ns. A submission that waits for nothing takes microseconds,
# so 20 ms is far above it. The counter `slow_submits` promises this limit.
cdef enum:
    STALL_NS = 20000000

# The number of requests that are offered one by one after a stall, so that a further stall has one culprit.
# It is twice the largest share that a device can have with the default depth.
cdef enum:
    SINGLY = 256


cdef class Engine(Tally):
    """Queue requests, offer them to a `Context` in order, and collect their results.

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

    def share_of(self, device, int limit):
        """Return the `Share` of *device*: *limit* requests, or half of the depth if that is less.

        *limit* counts only when the share is made, at the first call for *device*."""
        return self.share(device, limit)

    cdef Share share(self, device, int limit):
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

    # All changes of a request's state -------------------------------------------------------

    cpdef bint enqueue(self, Request request) except -1:
        """Move a NEW request to PENDING. Return whether there is a batch now that is worth a `flush`.

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
        # While the kernel is full, a submission would only be refused. `Dispatcher.reap` flushes when the first
        # completion has made room.
        return self.pending.count >= self.batch_limit(request) and not self.blocked

    cdef void _taken(self, Request request) noexcept:
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
                self._to_close = True

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

    cpdef bint withdraw(self, Request request) except -1:
        """Move a PENDING or DECLINED request back to NEW. Return whether this was possible.

        It is not if the kernel or a thread has the request, or if the request is DONE."""
        if request.state == PENDING:
            self._unqueue(request)
        elif request.state == DECLINED:
            self._undecline(request)
        else:
            return False
        # The place in the share is free again. This may admit
        # another request, which the caller has to submit.
        self._leave_share(request)
        request.state = NEW
        return True

    cdef Request next_declined(self):
        """Move the first request of `declined` to `moving`, and return it.

        It stays in `moving` until its next way is chosen. The choice may run any Python code, and in that
        time a kill may withdraw the request, or a fork or the end of the hub may cancel it. The caller finds
        out because the request is not in `moving` any more."""
        cdef Request request = self.declined.popleft()
        self.moving.append(request)
        return request

    cdef void _undecline(self, Request request) noexcept:
        # A kill finds the request in `declined`, or in `moving` while its next way is chosen.
        if request.queue == <void *>self.moving:
            self.moving.remove(request)
        else:
            self.declined.remove(request)

    cdef void settle(self, Request request, int64_t result) noexcept:
        """Move a NEW or DECLINED request to DONE with *result*. Neither the kernel nor a thread has it."""
        if request.state == DECLINED:
            self._undecline(request)
        self._end(request, result)

    cdef int enqueue_again(self, Request request) except -1:
        """Move a DECLINED request to PENDING. Return whether there is a batch now that is worth a `flush`.

        Raises as `enqueue` does. Then the request is NEW and in no list."""
        self._undecline(request)
        # It keeps its place in the share: `enqueue` sees that the request is admitted.
        request.state = NEW
        return self.enqueue(request)

    cdef int cancel_declined(self, int64_t result) noexcept:
        """Move every DECLINED request to DONE with *result*. Return how many there were."""
        cdef int n = 0
        # A request in `moving` has a `Dispatcher._move` on the stack of some greenlet. That code finds the
        # request gone from `moving`, and does nothing with it.
        while self.declined.count or self.moving.count:
            self.settle(self.declined.first() if self.declined.count else self.moving.first(), result)
            n += 1
        return n

    cdef void lend(self, Request request) noexcept:
        """Move a NEW or DECLINED request to IN_FLIGHT: a native thread may write the buffer at any time."""
        if request.state == DECLINED:
            self._undecline(request)
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

    # Towards the kernel ---------------------------------------------------------------------

    cdef int batch_limit(self, Request request) noexcept:
        # A greenlet that is about to be woken will probably submit another request, so the ready requests
        # count as requests that come.
        cdef int limit = batch_limit(self.in_flight.count, self.pending.count + self.ready.count, self.burst,
                                     self.is_instant)
        # A batch can't be larger than `Context` stages, or than the kernel has room for. `max_batch` is a
        # limit of the request itself.
        cdef int room = self.depth - self.in_flight.count
        if limit > BATCH_MAX:
            limit = BATCH_MAX
        if limit > request.max_batch:
            limit = request.max_batch
        if limit > room:
            limit = room
        # Without room the answer is 1 as well: the flush then
        # reaps, and sets `blocked` if that frees nothing.
        return limit if limit > 1 else 1

    cdef long _offer(self) except? -4096:
        """Offer the head of `pending` to the kernel, as far as there is room.

        Return the number of requests that the kernel took, or minus the errno that the first one got. The
        requests stay in `pending`: the caller moves them."""
        cdef int room = self.depth - self.in_flight.count
        cdef int n = 0
        cdef void *at = self.pending.head
        cdef Request request
        cdef uint64_t address, length
        cdef long taken, waited = 0
        cdef uint64_t took
        # After a stall requests go out one by one for a while, see `_stalled`.
        cdef bint alone = self._singly > 0
        if room > BATCH_MAX:
            room = BATCH_MAX
        if alone:
            room = 1
            self._singly -= 1
            # A thread that is preempted loses time as well. Only the number of times that it gave up the
            # processor tells a wait from that. The question costs a system call, so it is asked only here.
            waited = times_waited()
        # One look at the clock serves as the begin of the submission and of all its requests.
        took = self.context.now()
        # No reference is taken in the loop, because `pending` owns
        # its requests and nothing in the loop changes that list.
        while at != NULL and n < room:
            request = <Request>at
            # The vector operations pass the address of their iovec and the
            # number of its entries. It lies on the heap and lives as long as the
            # request. The others pass the buffer itself, and an fsync has none.
            if request.opcode == PREADV or request.opcode == PWRITEV:
                address, length = <uint64_t><uintptr_t>request.buffers, request.buffer_count
            elif request.buffer_count:
                address, length = <uint64_t><uintptr_t>request.buffers.iov_base, request.nbytes
            else:
                address, length = 0, 0
            # The token of a request is its address. It stays valid until the event comes, because `in_flight`
            # keeps the request alive.
            self.context.stage(<uint64_t><uintptr_t><void *>request, request.opcode, request.fd,
                               address, length, request.offset, request.flags)
            # A request that its share held, or that goes another way, began before.
            if request.began == 0:
                request.began = took
            at = request.following
            n += 1
        taken = self.context.submit()
        # One look at the clock serves three times: it ends the submission, it is the time of completions that
        # are found right after it (`reaps`), and the budget of `Driver.perform` begins with it.
        self.submitted_ns = self.reaped_ns = self.context.now()
        took = self.submitted_ns - took
        if took > STALL_NS:
            self._stalled(took, n, alone and times_waited() > waited)
        return taken

    cdef void _stalled(self, uint64_t took, int n, bint waited) noexcept:
        """Note that ``io_submit`` has blocked the hub for *took* ns, with a batch of *n* requests.

        A batch has no one culprit, and perhaps only the processor was away. So the next requests go out one
        by one, which shows the request that makes the kernel wait. *waited* says that one went alone and did
        so."""
        self.slow_submits += 1
        self.slow_ns, self.slow_batch = took, n
        # A further stall begins the count again.
        self._singly = SINGLY
        if waited and self.culprit is None:
            # The request that went alone is still the head of `pending`, because
            # `flush` moves it after this. Only keep it: no Python code may run
            # before the lists are right. `Dispatcher._tell_of_stall` reports it.
            self.culprit = self.pending.first()
            self.culprit_ns = took

    cpdef Request take_culprit(self):
        """Return the first request that stalled when it went alone, or None. Each is returned once."""
        culprit, self.culprit = self.culprit, None
        return culprit

    cpdef int flush(self) except -1:
        """Submit the pending requests, first in, first out, until none is left or the kernel is full.

        Return how many the kernel took. A request that the kernel refuses is DONE or DECLINED, and the rest
        goes on. If the kernel is full, `blocked` is set: the next completion makes room, and the caller
        flushes again then."""
        cdef long taken
        cdef int total = 0
        self.blocked = False
        while self.pending.count:
            # The kernel may have room for more requests than `depth`, but then `depth` is the limit. A reap
            # may make room at once.
            if self.in_flight.count >= self.depth and self.reap() == 0:
                self.blocked = True
                break
            taken = self._offer()
            if taken > 0:
                self.batches += 1
                total += taken
                # The kernel stops at the first request that it refuses, so the requests that it took are a
                # prefix of the batch. Move them in the same order.
                while taken:
                    self._taken(self.pending.first())
                    taken -= 1
            elif taken == -EINTR:
                # No request was taken. The next round stages the same requests again.
                continue
            elif taken == -EAGAIN or taken == 0:
                # The kernel has no slot free. A finished request gives its slot back only when its event is
                # reaped. So reap, and try again if there was any event. Otherwise stop, because a loop on
                # EAGAIN would spin in the hub until a disk answers.
                if self.reap():
                    continue
                self.blocked = True
                break
            else:
                # Any other error belongs to the head of the batch alone: the kernel returns an errno only if
                # it took no request before. The requests behind it are offered in the next round.
                self.finish(self.pending.first(), taken)
        # The lists are right again, so this may run any code.
        if self._to_close:
            self._close_numbers()
        return total

    cdef int _close_numbers(self) except -1:
        """Close the numbers whose close waited for a request that the kernel has now."""
        cdef Request request
        # Reset it first, because a close may run code that flushes, and that flush may set it again.
        self._to_close = False
        # The loop runs over a copy of the list, so a close may change the list. A request that is done by now
        # closes its number in `release`.
        for request in self.in_flight:
            if not request.asked:
                request.let_go_of_numbers()
        return 0

    # From the kernel ------------------------------------------------------------------------

    cpdef int reap(self) except -1:
        """Move all requests whose events are in the ring to `ready`, or to `declined`. Return how many there
        were.

        No greenlet is woken here."""
        cdef int n, i, total = 0
        cdef uint64_t token
        cdef int64_t result
        cdef Request request
        # The work is bounded: nothing is submitted in this loop, so there are at most `depth` events.
        while True:
            n = self.context.peek()
            if n == 0:
                break
            self.reaps()
            for i in range(n):
                token = self.context.token(i)
                # Token 0 is the event of the probe that `Context.open`
                # makes, if it came late. It belongs to no request.
                if token:
                    result = self.context.result(i)
                    # The token is the address of a request in `in_flight`. Hold
                    # a reference of our own, because `finish` takes the request
                    # out of that list, which may have the last other reference.
                    request = <Request><void *><uintptr_t>token
                    self.finish(request, result)
                    total += 1
            # Give the slots back to the kernel after the copies have
            # been used. `peek` must not be called again before.
            self.context.commit(n)
        # The timestamp is for the completions of this reap only.
        self.reaped_ns = 0
        return total

    cdef void reaps(self) noexcept:
        """Record the time at which the completions about to be processed count as done.

        Right after a submission its own timestamp serves, which saves a look at the clock."""
        if self.reaped_ns == 0:
            self.reaped_ns = self.context.now()

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

    def stuck(self, uint64_t ns):
        """Return the requests that have been under way, or held, for more than *ns*. Each is returned once.

        The list has tuples: the request, its place as in `requests`, and its age in ns."""
        cdef uint64_t now = self.context.now()
        cdef Request request
        found = []
        for request, where in self.requests():
            # A request that was neither offered nor held has `began` 0. Usually it waits for room in the
            # kernel, and the requests that take that room are reported.
            if not request.reported and 0 < request.began < now - ns:
                request.reported = True
                found.append((request, where, now - request.began))
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
        # A staged request would go out with the next batch, when its memory may be gone.
        assert self.context.staged == 0, 'staged and never submitted'
