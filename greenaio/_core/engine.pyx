# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A request is in one list at a time, and only the engine moves it to another.

The engine takes requests from the driver, hands them to the kernel in batches, and collects what the kernel
and native threads have done. It knows no gevent and never waits, so its tests run it on a scripted kernel. The
table of all states and their changes is in `greenaio._core.request`.

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

# An io_submit that takes as many ns has waited for a disk, or for the processor.
cdef enum:
    STALL_NS = 20000000

# Requests that are offered one by one after a stall: twice the share of a device.
cdef enum:
    SINGLY = 256


cdef class Engine(Tally):
    """Pending, in flight, ready: what `Context` can take, in order, and what it gave back."""

    def __init__(self, Context context not None, int depth=256):
        if depth < 1:
            raise ValueError(f'depth must be at least 1, not {depth}')
        self.context = context
        self.depth = depth
        self.pending = RequestList()
        self.in_flight = RequestList()
        self.lent = RequestList()
        self.declined = RequestList()
        self.moving = RequestList()
        self.ready = RequestList()
        self.shares = {}

    def share_of(self, device, int limit):
        """The share of *device*: *limit* requests, or half of the depth if that is less."""
        return self.share(device, limit)

    cdef Share share(self, device, int limit):
        # Usually it is the device of the last request.
        if device is self._device:
            return self._share
        share = self.shares.get(device)
        if share is None:
            share = self.shares[device] = Share(max(1, min(limit, self.depth // 2)))
        self._device, self._share = device, share
        return share

    # All changes of a request's state -------------------------------------------------------

    cpdef bint enqueue(self, Request request) except -1:
        """NEW → PENDING. Return whether there is a batch now that is worth a `flush`."""
        if request.state != NEW:
            raise ValueError(f'enqueued twice: {request!r}')
        request.hold()
        request.state = PENDING
        if request.share is not None and not request.admitted:
            if request.share.admitted >= request.share.limit:
                request.share.held.append(request)
                request.began = self.context.now()
                return False
            request.share.admitted += 1
            request.admitted = True
        self.pending.append(request)
        return self.pending.count >= self.batch_limit(request) and not self.blocked

    cdef void _taken(self, Request request) noexcept:
        """PENDING → IN_FLIGHT: from here on the kernel may write the buffer at any time."""
        request.state = IN_FLIGHT
        self.pending.remove(request)
        self.in_flight.append(request)
        self.submitted += 1
        # The kernel has the file and no longer needs its number, except if it declines the request.
        if request.handle is not None and not request.asked:
            if request.handle.let_go_unless_last():
                request.handle = None
            else:
                # The close may run any code, so it comes after the flush.
                self._to_close = True

    cdef void finish(self, Request request, int64_t result) noexcept:
        """PENDING or IN_FLIGHT → DONE; or DECLINED, if it has another way."""
        if request.queue == <void *>self.lent:
            self.lent.remove(request)
            self._time(request, BY_THREAD, result)
            self._end(request, result)
            return
        cdef bint declined = request.is_declined_by(result)
        if request.state == IN_FLIGHT:
            self.in_flight.remove(request)
            self.completed += 1
            if not declined:
                self._time(request, BY_AIO, result)
        else:
            self._unqueue(request)
        if declined:
            request.answer = result
            request.state = DECLINED
            self.declined.append(request)
        else:
            self._end(request, result)

    cdef void _end(self, Request request, int64_t result) noexcept:
        """→ DONE, from no list: leave the share, and add up the *result* of all ways.

        A read that failed after a part has read nothing, because a short read would look like the end of the file.
        After a fork, a write has written nothing either."""
        self._leave_share(request)
        if request.done:
            if result >= 0:
                result += <int64_t>request.done
            elif request.direction == WRITE and result != -ECANCELED:
                result = <int64_t>request.done
        request.answer = result
        request.state = DONE
        self.ready.append(request)

    cdef void _time(self, Request request, int way, int64_t result) noexcept:
        """Count how long *request* took, unless the kernel declined it or a fork took it away."""
        if self.reaped_ns > request.began > 0 and result != -EAGAIN:
            count_time(self, way, request.direction, self.reaped_ns - request.began)

    cdef void _unqueue(self, Request request) noexcept:
        """Take a PENDING request out, of `pending` or of the requests that its share holds."""
        if request.queue == <void *>self.pending:
            self.pending.remove(request)
        else:
            request.share.held.remove(request)

    cdef void _leave_share(self, Request request) noexcept:
        """Let in the next request that the share holds. It goes out with the next flush."""
        cdef Share share = request.share
        if not request.admitted:
            return
        request.admitted = False
        if share.held.count == 0:
            share.admitted -= 1
            return
        request = share.held.popleft()
        request.admitted = True
        self.pending.append(request)

    cpdef bint withdraw(self, Request request) except -1:
        """PENDING or DECLINED → NEW, if neither the kernel nor a thread has it; return whether it was so."""
        if request.state == PENDING:
            self._unqueue(request)
        elif request.state == DECLINED:
            self._undecline(request)
        else:
            return False
        self._leave_share(request)
        request.state = NEW
        return True

    cdef Request next_declined(self):
        """Take the first request out of `declined`. It is in `moving` until its next way is known. If it is not there
        any more by then, it has ended."""
        cdef Request request = self.declined.popleft()
        self.moving.append(request)
        return request

    cdef void _undecline(self, Request request) noexcept:
        if request.queue == <void *>self.moving:
            self.moving.remove(request)
        else:
            self.declined.remove(request)

    cdef void settle(self, Request request, int64_t result) noexcept:
        """NEW or DECLINED → DONE: neither the kernel nor a thread has it."""
        if request.state == DECLINED:
            self._undecline(request)
        self._end(request, result)

    cdef int enqueue_again(self, Request request) except -1:
        """DECLINED → PENDING, or held. Return whether there is a batch now that is worth a `flush`."""
        self._undecline(request)
        request.state = NEW
        return self.enqueue(request)

    cdef int cancel_declined(self, int64_t result) noexcept:
        """Every DECLINED → DONE with *result*; return how many."""
        cdef int n = 0
        while self.declined.count or self.moving.count:
            self.settle(self.declined.first() if self.declined.count else self.moving.first(), result)
            n += 1
        return n

    cdef void lend(self, Request request) noexcept:
        """NEW or DECLINED → IN_FLIGHT: a native thread may write the buffer at any time."""
        if request.state == DECLINED:
            self._undecline(request)
        request.state = IN_FLIGHT
        request.began = self.context.now()
        self.lent.append(request)
        self.by_thread += 1

    cdef void take_back(self, Request request) noexcept:
        """IN_FLIGHT → NEW: no thread had begun with it."""
        self.lent.remove(request)
        self._leave_share(request)
        request.state = NEW

    cpdef int refuse(self, int code) except -1:
        """Every PENDING → DONE with minus the errno *code*, or DECLINED; return how many."""
        cdef int n = 0
        while self.pending.count:
            self.finish(self.pending.first(), -code)
            n += 1
        for share in self.shares.values():
            while (<Share>share).held.count:
                self.finish((<Share>share).held.first(), -code)
                n += 1
        self.blocked = False
        return n

    cpdef int cancel(self, int code) except -1:
        """Everything → DONE with minus the errno *code*, even what is ready: in a forked child neither the kernel's
        events nor our own buffers have arrived."""
        cdef int n = self.refuse(code)
        cdef Request request
        while self.in_flight.count:
            self.finish(self.in_flight.first(), -code)
            n += self.refuse(code) + 1
        while self.lent.count:
            self.finish(self.lent.first(), -code)
            n += self.refuse(code) + 1
        n += self.cancel_declined(-code) + self.refuse(code)
        for request in self.ready:
            if request.gives_fd and request.answer >= 0:
                # The child has a copy of this fd, which no code here knows.
                close(<int>request.answer)
            request.answer = -code
        return n

    # Towards the kernel ---------------------------------------------------------------------

    cdef int batch_limit(self, Request request) noexcept:
        cdef int limit = batch_limit(self.in_flight.count, self.pending.count + self.ready.count, self.burst,
                                     self.is_instant)
        cdef int room = self.depth - self.in_flight.count
        if limit > BATCH_MAX:
            limit = BATCH_MAX
        if limit > request.max_batch:
            limit = request.max_batch
        if limit > room:
            limit = room
        return limit if limit > 1 else 1

    cdef long _offer(self) except? -4096:
        """Offer the head of pending, as much as there is room for: what io_submit answers."""
        cdef int room = self.depth - self.in_flight.count
        cdef int n = 0
        cdef void *at = self.pending.head
        cdef Request request
        cdef uint64_t address, length
        cdef long taken, waited = 0
        cdef uint64_t took
        cdef bint alone = self._singly > 0
        if room > BATCH_MAX:
            room = BATCH_MAX
        if alone:
            room = 1
            self._singly -= 1
            waited = times_waited()
        took = self.context.now()
        while at != NULL and n < room:
            request = <Request>at
            if request.opcode == PREADV or request.opcode == PWRITEV:
                address, length = <uint64_t><uintptr_t>request.buffers, request.buffer_count
            elif request.buffer_count:
                address, length = <uint64_t><uintptr_t>request.buffers.iov_base, request.nbytes
            else:
                address, length = 0, 0
            self.context.stage(<uint64_t><uintptr_t><void *>request, request.opcode, request.fd,
                               address, length, request.offset, request.flags)
            if request.began == 0:
                request.began = took
            at = request.following
            n += 1
        taken = self.context.submit()
        self.submitted_ns = self.reaped_ns = self.context.now()
        took = self.submitted_ns - took
        if took > STALL_NS:
            self._stalled(took, n, alone and times_waited() > waited)
        return taken

    cdef void _stalled(self, uint64_t took, int n, bint waited) noexcept:
        """Note that ``io_submit`` has blocked the hub. A batch has no one culprit, and perhaps only the processor was
        away. So the next requests go out one by one, which shows the request that makes the kernel *wait*."""
        self.slow_submits += 1
        self.slow_ns, self.slow_batch = took, n
        self._singly = SINGLY
        if waited and self.culprit is None:
            # No Python code may run here, because the lists are not right yet.
            self.culprit = self.pending.first()
            self.culprit_ns = took

    cpdef Request take_culprit(self):
        """The request whose submission, alone, stalled since this was last called; or None."""
        culprit, self.culprit = self.culprit, None
        return culprit

    cpdef int flush(self) except -1:
        """pending → kernel, first in, first out, until it is empty or the kernel is full; return
        how many the kernel took. A request that the kernel refuses is DONE, the rest goes on."""
        cdef long taken
        cdef int total = 0
        self.blocked = False
        while self.pending.count:
            if self.in_flight.count >= self.depth and self.reap() == 0:
                self.blocked = True
                break
            taken = self._offer()
            if taken > 0:
                self.batches += 1
                total += taken
                # The kernel takes a prefix.
                while taken:
                    self._taken(self.pending.first())
                    taken -= 1
            elif taken == -EINTR:
                continue
            elif taken == -EAGAIN or taken == 0:
                # A finished request frees its slot in the kernel only when it is reaped.
                if self.reap():
                    continue
                self.blocked = True
                break
            else:
                # Any other error belongs to the head alone, and the rest goes on.
                self.finish(self.pending.first(), taken)
        if self._to_close:
            self._close_numbers()
        return total

    cdef int _close_numbers(self) except -1:
        """Close the numbers that were closed while a request needed them that the kernel has now."""
        cdef Request request
        self._to_close = False
        # A request that is done already closes its number in `release`.
        for request in self.in_flight:
            if not request.asked:
                request.let_go_of_numbers()
        return 0

    # From the kernel ------------------------------------------------------------------------

    cpdef int reap(self) except -1:
        """Move all requests whose events are in the ring to `ready`; wake no greenlet. Return how many."""
        cdef int n, i, total = 0
        cdef uint64_t token
        cdef int64_t result
        cdef Request request
        while True:
            n = self.context.peek()
            if n == 0:
                break
            self.reaps()
            for i in range(n):
                token = self.context.token(i)
                # Token 0 is a late event of the probe.
                if token:
                    result = self.context.result(i)
                    # Hold a reference, because the list may hold the last one, and lets go of it.
                    request = <Request><void *><uintptr_t>token
                    self.finish(request, result)
                    total += 1
            self.context.commit(n)
        self.reaped_ns = 0
        return total

    cdef void reaps(self) noexcept:
        """Record the time at which the completions about to be processed count as done. Right after a submission
        its own timestamp serves, which saves a look at the clock."""
        if self.reaped_ns == 0:
            self.reaped_ns = self.context.now()

    def requests(self):
        """Return all requests that are not done, each with its place: 'queued' (also for its next way), 'in flight',
        'with a thread'."""
        cdef Request request
        found = []
        for queue, where in ((self.in_flight, 'in flight'), (self.lent, 'with a thread'), (self.pending, 'queued'),
                             (self.declined, 'queued'), (self.moving, 'queued'),
                             *[((<Share>share).held, 'queued') for share in list(self.shares.values())]):
            found += [(request, where) for request in queue]
        return found

    def stuck(self, uint64_t ns):
        """Return the requests that have been under way, or held, for more than *ns*. Each is returned once."""
        cdef uint64_t now = self.context.now()
        cdef Request request
        found = []
        for request, where in self.requests():
            if not request.reported and 0 < request.began < now - ns:
                request.reported = True
                found.append((request, where, now - request.began))
        return found

    def forget_writes(self):
        """Count no request here as a write under way, because no code will learn when the kernel is done with it."""
        cdef Request request
        for requests in self.in_flight, self.lent:
            for request in requests:
                if request.writes is not None:
                    request.end_write()

    def _check(self):
        """Assert all that must hold between two calls."""
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
                assert not request.abandoned or queue in (self.in_flight, self.lent, self.ready), (
                    f'{request!r} was abandoned, and has a way to go')
                assert id(request) not in seen, f'{request!r} is in two lists'
                assert (<Request>request).handle is not None or request.fd < 0 or queue is self.ready or (
                    queue is self.in_flight and (request.abandoned or not (<Request>request).asked)), (
                    f'{request!r} may go to another file')
                seen.add(id(request))
        assert self.submitted == self.completed + len(self.in_flight), 'an event lost or invented'
        for share in shares:
            admitted = [request for queue in (self.pending, self.in_flight, self.lent, self.declined, self.moving)
                        for request in queue if (<Request>request).share is share and (<Request>request).admitted]
            assert (<Share>share).admitted == len(admitted) <= (<Share>share).limit, 'a share that miscounts'
            assert not len((<Share>share).held) or len(admitted), 'held, and nothing will let it in'
        assert len(self.in_flight) <= self.depth, 'more in flight than there is room for'
        assert self.context.staged == 0, 'staged and never submitted'
