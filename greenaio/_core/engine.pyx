# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The engine takes requests, hands them to the kernel in batches, and collects what the kernel has done.

It knows no gevent and never waits, so its tests run it on a scripted kernel. Nothing here runs Python code
between a look at the kernel and the moment at which the lists are right again.
"""

from libc.errno cimport EAGAIN, EINTR
from libc.stdint cimport uintptr_t

from greenaio._core.context cimport BATCH_MAX, PREADV, PWRITEV, Context, times_waited
from greenaio._core.policy cimport batch_limit
from greenaio._core.queues cimport Queues
from greenaio._core.request cimport NEW, Request

# An io_submit that takes longer than this has waited for a disk or for the
# processor, in ns. A submission that waits for nothing takes microseconds,
# so 20 ms is far above it. The counter `slow_submits` promises this limit.
cdef enum:
    STALL_NS = 20000000

# The number of requests that are offered one by one after a stall, so that a further stall has one culprit.
# It is twice the largest share that a device can have with the default depth.
cdef enum:
    SINGLY = 256


cdef class Engine(Queues):
    """Queue requests, offer them to a `Context` in order, and collect their results."""

    cpdef bint enqueue(self, Request request) except -1:
        """Move a NEW request to PENDING. Return whether there is a batch now that is worth a `flush`.

        Raises ValueError if the request is not NEW, and OSError (EBADF) if a thread is closing its number."""
        # While the kernel is full, a submission would only be refused. `Dispatcher.reap` flushes when the first
        # completion has made room.
        return self.queue(request) and self.pending.count >= self._batch_limit(request) and not self.blocked

    cdef int enqueue_again(self, Request request) except -1:
        """Move a DECLINED request to PENDING. Return whether there is a batch now that is worth a `flush`.

        Raises as `enqueue` does. Then the request is NEW and in no list."""
        self.undecline(request)
        # It keeps its place in the share: `enqueue` sees that the request is admitted.
        request.state = NEW
        return self.enqueue(request)

    # Towards the kernel ---------------------------------------------------------------------

    cdef int _batch_limit(self, Request request) noexcept:
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
        # No reference is taken, because `pending` owns its requests and nothing here changes that list.
        while at != NULL and n < room:
            request = <Request>at
            self._stage(request)
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

    cdef int _stage(self, Request request) except -1:
        """Add *request* to the batch of the context."""
        cdef uint64_t address = 0, length = 0
        # The vector operations pass the address of their iovec and the number of its entries. It lies on the
        # heap and lives as long as the request. The others pass the buffer itself, and an fsync has none.
        if request.opcode == PREADV or request.opcode == PWRITEV:
            address, length = <uint64_t><uintptr_t>request.buffers, request.buffer_count
        elif request.buffer_count:
            address, length = <uint64_t><uintptr_t>request.buffers.iov_base, request.nbytes
        # The token of a request is its address. It stays valid until the event comes, because `in_flight`
        # keeps the request alive.
        return self.context.stage(<uint64_t><uintptr_t><void *>request, request.opcode, request.fd, address, length,
                                  request.offset, request.flags)

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
            # `depth` is the limit, also where the kernel has more room. A reap may make room at once.
            if self.in_flight.count >= self.depth and self.reap() == 0:
                self.blocked = True
                break
            taken = self._offer()
            if taken > 0:
                self.batches += 1
                total += taken
                # The kernel stops at the first request that it refuses, so it took a prefix of the batch.
                while taken:
                    self.taken(self.pending.first())
                    taken -= 1
            elif taken == -EINTR:
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
        if self.to_close:
            self._close_numbers()
        return total

    cdef int _close_numbers(self) except -1:
        """Close the numbers whose close waited for a request that the kernel has now."""
        cdef Request request
        # Reset it first, because a close may run code that flushes, and that flush may set it again.
        self.to_close = False
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
        Queues._check(self)
        # A staged request would go out with the next batch, when its memory may be gone.
        assert self.context.staged == 0, 'staged and never submitted'
