"""The engine with no kernel: what is taken, in which order, and what becomes of errors."""

import errno
import gc
import random
import time
import weakref

import pytest

from greenaio._core.context import Opcode
from greenaio._core.engine import Engine
from greenaio._core.request import Request, RequestList, State
from tests.support.kernel import ScriptedContext

PREAD, FDSYNC = Opcode.PREAD, Opcode.FDSYNC


def read(offset=0, nbytes=512, **kwargs):
    return Request(PREAD, 3, bytearray(nbytes), offset, **kwargs)


@pytest.fixture
def engine():
    engine = Engine(ScriptedContext(), depth=64)
    yield engine
    engine._check()
    engine.context.close()


def test_request_is_in_progress_until_the_kernel_says_otherwise(engine):
    request = read()
    assert (request.state, request.result, request.nbytes) == (State.NEW, None, 512)
    engine.enqueue(request)
    assert (request.state, request.result) == (State.PENDING, None)
    engine.flush()
    assert (request.state, request.result) == (State.IN_FLIGHT, None)
    engine.context.finish(result=-errno.EIO)
    assert request.result is None
    engine.reap()
    assert (request.state, request.result) == (State.DONE, -errno.EIO)


def test_pending_goes_out_first_in_first_out_through_short_accepts(engine):
    requests = [read(i) for i in range(20)]
    for request in requests:
        engine.enqueue(request)
    engine.context.answers.extend([7, 1, 3])
    assert engine.flush() == 20
    assert engine.context.order == list(range(20))
    assert engine.context.batches == [7, 1, 3, 9]
    assert list(engine.in_flight) == requests


def test_batch_is_at_most_32(engine):
    for i in range(50):
        engine.enqueue(read(i))
    engine.flush()
    assert engine.context.batches == [32, 18]


def test_batch_is_never_more_than_the_room_left(engine):
    for i in range(100):
        engine.enqueue(read(i))
    engine.flush()
    assert engine.blocked
    assert len(engine.in_flight) == 64 and len(engine.pending) == 36
    for _ in range(3):
        engine.context.finish()
    engine.flush()
    assert engine.context.batches == [32, 32, 3]
    engine.context.finish_all()
    engine.flush()
    assert not engine.blocked
    assert engine.context.order == list(range(100))


def test_batch_follows_the_load(engine):
    """One waits for each four in flight; alone, a request goes out at once."""
    full = []
    for _ in range(48):
        waiting = 1
        while not engine.enqueue(read()):
            waiting += 1
        full.append((len(engine.in_flight), waiting))
        engine.flush()
        if len(engine.in_flight) > 48:
            break
    assert full[:4] == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert all(waiting == max(1, in_flight // 4) for in_flight, waiting in full)


def test_caller_bounds_the_batch(engine):
    for _ in range(60):
        engine.enqueue(read())
        engine.flush()
    assert not engine.enqueue(read())
    assert engine.enqueue(read(max_batch=1))


def test_again_with_something_reaped_is_tried_at_once(engine):
    engine.enqueue(read(0))
    engine.flush()
    engine.context.finish()
    engine.enqueue(read(1))
    engine.context.answers.extend([-errno.EAGAIN])
    assert engine.flush() == 1
    assert not engine.blocked
    assert len(engine.ready) == 1


def test_again_blocks_until_the_next_completion(engine):
    engine.enqueue(read(0))
    engine.flush()
    engine.enqueue(read(1))
    engine.context.answers.extend([-errno.EAGAIN])
    assert engine.flush() == 0
    assert engine.blocked
    assert not engine.enqueue(read(2))      # no use in trying again for each
    engine.context.finish()
    engine.reap()
    assert engine.flush() == 2
    assert not engine.blocked
    assert engine.context.order == [0, 1, 2]


def test_interrupted_submit_is_tried_again(engine):
    engine.enqueue(read())
    engine.context.answers.extend([-errno.EINTR, -errno.EINTR])
    assert engine.flush() == 1
    assert engine.context.submits == 3


@pytest.mark.parametrize('place', [0, 1, 15, 31])
@pytest.mark.parametrize('code', [errno.EBADF, errno.EINVAL, errno.EFAULT, errno.EPERM])
def test_bad_request_fails_alone_at_each_place_of_a_batch(engine, place, code):
    def kernel(batch):
        offsets = [request['offset'] for request in batch]
        if offsets[0] == place:
            return -code
        return offsets.index(place) if place in offsets else len(batch)

    requests = [read(i) for i in range(32)]
    engine.context.answers.extend([kernel] * 3)
    for request in requests:
        engine.enqueue(request)
    engine.flush()
    assert [r for r in requests if r.state != State.IN_FLIGHT] == [requests[place]]
    assert requests[place].result == -code
    assert engine.context.order == [i for i in range(32) if i != place]


def movable(asked=False):
    request = read()
    request.may_move = True
    if asked:
        request.ask()
    return request


def test_what_io_submit_refuses_is_declined(engine):
    request = movable()
    engine.context.answers.append(-errno.EINVAL)
    engine.enqueue(request)
    engine.flush()
    assert (request.state, request.result) == (State.DECLINED, None) and list(engine.declined) == [request]


def test_event_is_not_a_refusal(engine):
    request = movable()
    engine.enqueue(request)
    engine.flush()
    engine.context.finish(result=-errno.EINVAL)
    engine.reap()
    assert (request.state, request.result) == (State.DONE, -errno.EINVAL)


ANSWERS = [(-errno.EAGAIN, True), (-errno.EOPNOTSUPP, True), (0, True), (511, True), (512, False),
           (-errno.EIO, False)]


@pytest.mark.parametrize(('result', 'declined'), ANSWERS)
def test_request_asked_not_to_wait_is_declined_where_it_would_or_fell_short(engine, result, declined):
    request = movable(asked=True)
    engine.enqueue(request)
    engine.flush()
    engine.context.finish(result=result)
    assert engine.reap() == 1
    assert list(engine.declined if declined else engine.ready) == [request]
    assert engine.completed == 1 and sum(engine.latency(0, 0)[0]) == (not declined)


def test_declined_request_keeps_its_place_in_the_share_of_its_device(engine):
    share = engine.share('disk', 1)
    one, other = movable(asked=True).of(share), movable().of(share)
    engine.enqueue(one)
    engine.enqueue(other)
    engine.flush()
    engine.context.finish(result=-errno.EAGAIN)
    engine.reap()
    assert share.admitted == 1 and list(share.held) == [other]
    assert engine.withdraw(one) and one.state == State.NEW
    assert list(engine.pending) == [other]


@pytest.mark.parametrize('code', [errno.ECANCELED, errno.EAGAIN])
def test_engine_that_gives_up_declines_but_one_that_ends_is_the_end(engine, code):
    request = movable()
    engine.enqueue(request)
    assert engine.refuse(code) == 1
    assert request.state == (State.DONE if code == errno.ECANCELED else State.DECLINED)


def test_child_cancels_what_was_declined(engine):
    request = movable(asked=True)
    engine.enqueue(request)
    engine.flush()
    engine.context.finish(result=-errno.EAGAIN)
    engine.reap()
    assert engine.cancel(errno.ECANCELED) == 1
    assert request.result == -errno.ECANCELED and list(engine.ready) == [request]


def test_withdrawn_request_never_reaches_the_kernel(engine):
    requests = [read(i) for i in range(3)]
    for request in requests:
        engine.enqueue(request)
    assert engine.withdraw(requests[1])
    engine.flush()
    assert engine.context.order == [0, 2]
    assert not engine.withdraw(requests[0])


def test_reap_entered_from_inside_itself_delivers_each_once():
    """A peek that reaps again, as code that runs in a drain may:

        outer reap             inner reap
        peek: 3 events
                               peek: 3 events, finish all, commit
        peek again: none
    """
    class Nested(ScriptedContext):
        depth_now = 0

        def peek(self):
            if self.events and self.depth_now == 0:
                self.depth_now += 1
                engine.reap()
                self.depth_now -= 1
            return super().peek()

    engine = Engine(Nested(), depth=64)
    requests = [read(i) for i in range(3)]
    for request in requests:
        engine.enqueue(request)
    engine.flush()
    engine.context.finish_all()
    engine.reap()
    assert list(engine.ready) == requests
    assert engine.completed == 3
    engine._check()
    engine.context.close()


def test_inline_completions_are_found_by_the_reap_after_the_flush(engine):
    engine.context.inline = True
    for i in range(200):
        engine.enqueue(read(i))
    engine.flush()
    engine.reap()
    assert len(engine.ready) == 200
    assert engine.submitted == engine.completed == 200


def test_probe_event_that_comes_late_is_nobodys(engine):
    engine.context.events.append((0, 0))
    assert engine.reap() == 0
    assert engine.context.committed == 1


def test_memory_lives_until_the_event_though_all_forgot_the_request(engine):
    class Memory(bytearray):
        pass

    memory = Memory(512)
    gone = weakref.ref(memory)
    engine.enqueue(Request(PREAD, 3, memory, 0))
    engine.flush()
    del memory
    gc.collect()
    assert gone() is not None
    engine.context.finish(fill=0xAB)
    engine.reap()
    assert bytes(gone()) == b'\xab' * 512
    request, = engine.ready
    del request
    assert gone() is not None               # until it is handed over


def test_buffer_is_pinned_while_in_flight(engine):
    memory = bytearray(512)
    engine.enqueue(Request(PREAD, 3, memory, 0))
    engine.flush()
    with pytest.raises(BufferError):
        memory.extend(b'x')
    engine.context.finish()
    engine.reap()


def test_vectors_are_named_in_order(engine):
    buffers = [bytearray(10), bytearray(0), bytearray(30)]
    request = Request(Opcode.PREADV, 3, buffers, 0)
    engine.enqueue(request)
    engine.flush()
    assert request.nbytes == 40
    assert engine.context.taken[0]['nbytes'] == 3       # the length of the iovec


def test_unknown_operation_is_refused_by_number():
    with pytest.raises(OSError, match='unknown operation 42') as caught:
        Request(42, 3, bytearray(1))
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize('args, error', [
    ((PREAD, 3, b'immutable'), BufferError), ((PREAD, 3, 7), TypeError),
    ((Opcode.PREADV, 3, [bytearray(1), b'']), BufferError), ((PREAD, 3, None), TypeError),
])
def test_buffer_that_cannot_be_pinned_is_refused(args, error):
    with pytest.raises(error):
        Request(*args)


def test_request_is_enqueued_once(engine):
    request = read()
    engine.enqueue(request)
    with pytest.raises(ValueError, match='twice'):
        engine.enqueue(request)


@pytest.mark.parametrize('max_batch', [0, -1])
def test_max_batch_is_positive(max_batch):
    with pytest.raises(ValueError, match='max_batch'):
        read(max_batch=max_batch)


def test_list_that_dies_keeps_what_the_kernel_may_still_write():
    class Memory(bytearray):
        pass

    memory = Memory(512)
    gone = weakref.ref(memory)
    engine = Engine(ScriptedContext(), depth=4)
    engine.enqueue(Request(PREAD, 3, memory, 0))
    engine.flush()
    engine.context.close()
    del engine, memory
    gc.collect()
    assert gone() is not None


def test_cancel_ends_everything(engine):
    requests = [read(i) for i in range(6)]
    for request in requests[:4]:
        engine.enqueue(request)
    engine.flush()
    engine.context.finish()
    engine.reap()
    for request in requests[4:]:
        engine.enqueue(request)
    engine.cancel(errno.ECANCELED)
    assert {request.result for request in requests} == {-errno.ECANCELED}
    assert len(engine.pending) == len(engine.in_flight) == 0


@pytest.mark.parametrize('seed', range(20))
def test_random_steps_keep_every_invariant(seed):
    """enqueue, flush, finish, reap, withdraw, short accepts, EAGAIN, errors: _check() after each."""
    rng = random.Random(seed)
    context = ScriptedContext()
    engine = Engine(context, depth=rng.choice([1, 4, 64]))
    alive, made = [], 0
    for _ in range(2000):
        step = rng.random()
        if step < 0.4:
            request = read(made)
            made += 1
            alive.append(request)
            engine.enqueue(request)
        elif step < 0.6:
            context.inline = rng.random() < 0.3
            for _ in range(rng.randrange(3)):
                context.answers.append(rng.choice([
                    lambda batch: rng.randrange(1, len(batch) + 1), -errno.EAGAIN, -errno.EINTR,
                    -errno.EBADF]))
            engine.flush()
            context.answers.clear()
        elif step < 0.8 and context.taken:
            context.finish(rng.choice(context.taken), rng.choice([None, 0, 100, -errno.EIO]))
        elif step < 0.9:
            engine.reap()
        elif alive:
            engine.withdraw(rng.choice(alive))
        engine._check()
    context.answers.clear()
    while len(engine.pending) or context.taken or context.events:
        engine.flush()
        context.finish_all()
        engine.reap()
        engine._check()
    context.close()
    assert all(r.state in (State.DONE, State.NEW) for r in alive)
    assert engine.submitted == engine.completed == len(context.order)
    assert sorted(context.order) == context.order, 'not first in, first out'


def test_list_knows_its_members():
    queue = RequestList()
    assert len(queue) == 0 and list(queue) == []
    assert read() not in queue


# Shares and stalls ---------------------------------------------------------------------------


def test_device_gets_its_share_and_the_rest_waits_in_order(engine):
    frozen, other = engine.share('frozen', 10), engine.share('other', 1000)
    assert (frozen.limit, other.limit) == (10, 32)          # at most half of what there is room for
    for i in range(100):
        engine.enqueue(read(i).of(frozen))
    for i in range(100, 120):
        engine.enqueue(read(i).of(other))
    engine.flush()
    assert engine.context.order == [*range(10), *range(100, 120)]
    assert len(frozen.held) == 90
    for request in list(engine.context.taken)[10:]:
        engine.context.finish(request)                      # the other goes on, the frozen one does not
    engine.reap()
    engine.flush()
    assert engine.context.order == [*range(10), *range(100, 120)]
    while engine.context.taken:
        engine.context.finish()
        engine.reap()
        engine._check()
        engine.flush()
    assert [i for i in engine.context.order if i < 100] == list(range(100))


def test_abandoned_request_counts_in_its_share_until_its_event(engine):
    share = engine.share('device', 2)
    requests = [read(i).of(share) for i in range(4)]
    for request in requests:
        engine.enqueue(request)
    engine.flush()
    del request, requests[:2]                               # nobody asks for them any more
    assert engine.withdraw(requests[0])                     # one that was held
    engine._check()
    assert share.admitted == 2 and list(share.held) == requests[1:]
    engine.context.finish()
    engine.reap()
    engine.flush()
    assert engine.context.order == [0, 1, 3]
    engine.context.finish_all()
    engine.reap()
    assert share.admitted == 0


def test_withdrawing_a_pending_one_lets_the_next_of_its_share_in(engine):
    share = engine.share('device', 1)
    requests = [read(i).of(share) for i in range(3)]
    for request in requests:
        engine.enqueue(request)
    engine.withdraw(requests[0])
    engine._check()
    assert list(engine.pending) == [requests[1]]
    engine.refuse(errno.ECANCELED)
    assert [request.result for request in requests] == [None, -errno.ECANCELED, -errno.ECANCELED]
    assert share.admitted == 0


class Slow:
    """A file whose submissions take their time, and which is told of it."""

    def __init__(self):
        self.told = 0

    def stalled(self, ns):
        self.told += 1


def test_stall_is_pinned_on_a_request_only_when_it_went_out_alone(engine):
    culprit = Slow()

    def answer(batch):
        if any(request['offset'] == 7 for request in batch):
            time.sleep(0.03)
        return len(batch)

    engine.context.answers.extend([answer] * 100)
    for i in range(8):
        request = read(i)
        request.file = culprit if i == 7 else Slow()
        engine.enqueue(request)
    engine.flush()
    assert engine.slow_submits == 1
    assert engine.take_culprit() is None                    # one of eight: nobody knows which
    engine.context.finish_all()
    engine.reap()
    for i in range(8):
        request = read(i)
        request.file = culprit if i == 7 else Slow()
        engine.enqueue(request)
    engine.flush()
    assert engine.context.batches == [8] + [1] * 8
    assert engine.take_culprit().file is culprit
    assert engine.culprit_ns > 20_000_000
    assert engine.take_culprit() is None
    engine.context.finish_all()
    engine.reap()


def test_processor_that_is_away_is_nobodys_fault(engine):
    """Preempted inside io_submit, again and again: it took long, but waited for nothing."""
    def away(batch):
        end = time.perf_counter() + 0.03
        while time.perf_counter() < end:
            pass
        return len(batch)

    engine.context.answers.extend([away] * 5)
    for i in range(5):
        request = read(i)
        request.file = Slow()
        engine.enqueue(request)
        engine.flush()
        engine.context.finish_all()
        engine.reap()
    assert engine.slow_submits == 5
    assert engine.take_culprit() is None
