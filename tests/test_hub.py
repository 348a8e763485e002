"""The driver: who parks, who is woken, by whom, and what remains when a greenlet is gone.

Most of it over a scripted kernel, which completes exactly when the test says so.
"""

import errno
import gc
import threading
import time
import weakref

import gevent
import pytest
from gevent.exceptions import BlockingSwitchOutError
from greenlet import settrace

from greenaio import config
from greenaio._core import dispatch as _dispatch
from greenaio._core import hub as _hub
from greenaio._core import loop as _loop
from greenaio._core import shutdown as _shutdown
from greenaio._core.context import Opcode
from greenaio._core.request import Request
from tests.support.kernel import ScriptedContext
from tests.support.processes import run_python


def read(offset=0, memory=None):
    return Request(Opcode.PREAD, 3, bytearray(512) if memory is None else memory, offset)


def perform(driver, request):
    return driver.perform_request(request)


def turn():
    """Let the loop come round, callbacks and eventfd, until all that was spawned has begun and asked."""
    gevent.sleep(0.002)
    gevent.sleep(0)             # callbacks run in order: behind those that start greenlets ...
    gevent.sleep(0)             # ... and behind those that end the hub turns which these began


# Attach and detach ---------------------------------------------------------------------------


def test_hub_has_one_driver_made_on_first_use():
    assert _hub.get_driver() is _hub.get_driver()
    assert _hub.get_driver().hub is gevent.get_hub()


def test_destroyed_hub_leaves_no_fd_and_no_context():
    run_python('''
        import os, time, gevent, threading
        from greenaio._core import hub as _hub
        nr = lambda: open('/proc/self/maps').read().count('[aio]')
        fds = lambda: len(os.listdir('/proc/self/fd'))
        def work():
            gevent.get_hub()
            before = fds()
            driver = _hub.get_driver()
            assert fds() == before + 2          # one eventfd, two numbers
            gevent.get_hub().destroy(True)
            assert driver.closed
        start = nr()
        for turn in range(5):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            if turn == 0:               # libuv's first loop opens some that it never closes
                fds_before = fds()
        end = time.monotonic() + 10
        while nr() > start and time.monotonic() < end:
            time.sleep(0.01)
        assert nr() == start, (start, nr())
        assert fds() == fds_before
    ''')


def test_destroyed_hub_waits_until_the_thread_that_frees_its_context_has_begun(monkeypatch):
    """Python 3.11 crashes if it ends while it starts a thread."""
    begun, seen = [], []
    start_new_thread = _shutdown._start_new_thread

    def start(function, args):
        def begin():
            time.sleep(0.1)
            begun.append(function)
            function(*args)
        return start_new_thread(begin, ())

    def work():
        _hub.get_driver()
        gevent.get_hub().destroy(True)
        seen.extend(begun)

    monkeypatch.setattr(_shutdown, '_start_new_thread', start)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen


def test_thread_that_just_ends_leaves_no_context():
    run_python('''
        import os, time, gevent, threading, gc
        from greenaio._core import hub as _hub
        nr = lambda: open('/proc/self/maps').read().count('[aio]')
        start = nr()
        closed = []
        def work():
            closed.append(_hub.get_driver())
        for _ in range(3):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        gc.collect()
        end = time.monotonic() + 10
        while nr() > start and time.monotonic() < end:
            time.sleep(0.01)
        assert all(driver.closed for driver in closed)
        assert nr() == start, (start, nr())
    ''')


def test_new_hub_of_the_thread_gets_a_new_driver():
    run_python('''
        import gevent
        from greenaio._core import hub as _hub
        first = _hub.get_driver()
        gevent.get_hub().destroy(True)
        second = _hub.get_driver()
        assert first.closed and not second.closed
        assert second.hub is gevent.get_hub()
    ''')


@pytest.mark.parametrize('end', ['kill', 'switch'])
def test_destroyed_with_requests_in_flight_keeps_their_memory_until_the_kernel_is_done(end):
    """
        hub                             native thread
        close: greenlets forgotten
                                        io_destroy: waits for the disk
        the memory is pinned still
                                        the disk is done: io_destroy returns, pins go
    """
    class Slow(ScriptedContext):
        done = threading.Event()

        def destroy(self):
            self.done.wait(30)

    driver = _loop.HubDriver(gevent.get_hub(), Slow(), depth=8)
    memory = bytearray(512)
    greenlet = gevent.spawn(perform, driver, read(memory=memory))
    turn()
    driver.close()
    if end == 'kill':
        greenlet.kill()
    else:                               # a stranger's, who finds nobody's token there any more
        gevent.get_hub().loop.run_callback(greenlet.switch)
        with pytest.raises(gevent.exceptions.InvalidSwitchError):
            greenlet.get(timeout=5)
    for _ in range(5):
        turn()
        with pytest.raises(BufferError):
            memory.append(1)
    Slow.done.set()
    for _ in range(1000):
        try:
            memory.append(1)
            break
        except BufferError:
            time.sleep(0.005)
    assert len(memory) == 513


# Parking and waking --------------------------------------------------------------------------


def test_greenlet_waits_and_the_hub_does_not(driver):
    ticks = []
    greenlet = gevent.spawn(perform, driver, read())
    for _ in range(3):
        gevent.sleep(0.001)
        ticks.append(greenlet.ready())
    assert ticks == [False] * 3
    assert driver.waiting == 1
    driver.engine.context.finish()
    assert greenlet.get(timeout=5) == 512
    assert driver.waiting == 0


def test_result_is_each_requests_own(driver):
    greenlets = [gevent.spawn(perform, driver, read(i)) for i in range(10)]
    turn()
    kernel = driver.engine.context
    for result, request in enumerate(reversed(list(kernel.taken))):
        kernel.finish(request, result)
    gevent.joinall(greenlets, timeout=5)
    assert [greenlet.value for greenlet in greenlets] == list(range(9, -1, -1))


def test_done_during_its_own_submit_never_switches(driver):
    """
        greenlet                         hub
        enqueue, flush: done inside
        reap: ready; takes it itself
                                         (never runs)
    """
    driver.engine.context.inline = True
    ran = []
    gevent.get_hub().loop.run_callback(ran.append, 'hub')
    assert perform(driver, read()) == 512
    assert ran == []
    turn()


def test_inline_completions_yield_to_the_loop_after_a_bounded_run(driver):
    driver.engine.context.inline = True
    ticks = []

    def ticker():
        while True:
            ticks.append(time.monotonic())
            gevent.sleep(0)

    greenlet = gevent.spawn(ticker)
    gevent.sleep(0)
    before = len(ticks)
    for _ in range(64 * 5):
        perform(driver, read())
    greenlet.kill()
    assert len(ticks) - before >= 4


def test_hundred_thousand_inline_completions_use_constant_stack(driver):
    """Woken greenlets submit again from inside the wake, which completes at once, and so on."""
    driver.engine.context.inline = True
    done = []

    def worker():
        for _ in range(10_000):
            perform(driver, read())
        done.append(gevent.getcurrent())

    greenlets = [gevent.spawn(worker) for _ in range(10)]
    gevent.joinall(greenlets, timeout=60, raise_error=True)
    assert len(done) == 10
    assert driver.engine.completed == 100_000


def test_wake_from_another_greenlet_is_queued_for_the_hub(driver):
    """
        A                     B                          hub
        perform, parked
                              drains by hand: only reaps
                              goes on                    wakes A
    """
    order = []
    first = gevent.spawn(lambda: (perform(driver, read()), order.append('A')))
    turn()
    driver.engine.context.finish()
    driver._on_eventfd()
    order.append('B')
    first.join(timeout=5)
    assert order == ['B', 'A']


def test_drain_entered_again_from_a_woken_greenlet_delivers_each_once(driver):
    woken = []

    def worker(i):
        perform(driver, read(i))
        woken.append(i)
        driver._on_eventfd()

    greenlets = [gevent.spawn(worker, i) for i in range(20)]
    turn()
    driver.engine.context.finish_all()
    gevent.joinall(greenlets, timeout=5, raise_error=True)
    assert woken == list(range(20))


def test_completion_in_anothers_wake_is_delivered_in_order(driver):
    kernel = driver.engine.context
    order = []

    def one():
        perform(driver, read(1))
        order.append('one')
        kernel.finish()             # the other's, while the hub is inside our wake
        order.append('one goes on')

    def two():
        perform(driver, read(2))
        order.append('two')

    greenlets = [gevent.spawn(one), gevent.spawn(two)]
    turn()
    kernel.finish()
    gevent.joinall(greenlets, timeout=5, raise_error=True)
    assert order == ['one', 'one goes on', 'two']


def test_failure_in_one_wake_loses_nothing_of_the_rest(driver):
    hub = gevent.get_hub()
    errors = []
    hub.handle_error = lambda context, kind, value, tb: errors.append(kind)
    try:
        done = []

        def raw(i):
            perform(driver, read(i))
            if i == 1:
                raise KeyError(i)
            done.append(i)

        for i in range(4):
            gevent.spawn_raw(raw, i)
        turn()
        driver.engine.context.finish_all()
        turn()
    finally:
        del hub.handle_error
    assert errors == [KeyError]
    assert done == [0, 2, 3]


def test_one_that_parks_in_a_pass_goes_straight_to_the_next(driver):
    """
        hub       one       two       three
        wakes one
                  parks
                            parks
                                      parks, nobody is next
        goes on
    """
    hub, kernel = gevent.get_hub(), driver.engine.context
    names = {hub: 'hub'}

    def twice(i):
        perform(driver, read(i))
        perform(driver, read(i))

    for i, name in enumerate(('one', 'two', 'three')):
        names[gevent.spawn(twice, i)] = name
    turn()
    kernel.finish_all()
    switches = []
    settrace(lambda event, pair: switches.append([names.get(who) for who in pair]))
    try:
        turn()
    finally:
        settrace(None)
    passed = [pair for pair in switches if None not in pair]
    assert passed == [['hub', 'one'], ['one', 'two'], ['two', 'three'], ['three', 'hub']]
    kernel.finish_all()
    gevent.joinall([who for who in names if who is not hub], timeout=5, raise_error=True)


def test_one_that_parks_in_a_pass_leaves_an_abandoned_one_to_the_hub(driver):
    kernel, done = driver.engine.context, []

    def twice(i):
        perform(driver, read(i))
        done.append(i)
        perform(driver, read(i))
        done.append(i)

    greenlets = [gevent.spawn(twice, i) for i in range(4)]
    turn()
    greenlets[1].kill()
    kernel.finish_all()
    turn()
    kernel.finish_all()
    gevent.joinall(greenlets, timeout=5)
    assert done == [0, 2, 3, 0, 2, 3]


def test_one_that_parks_keeps_nothing_of_the_one_it_went_to(driver):
    kernel = driver.engine.context

    class Value:
        pass

    values = []

    def waits():
        perform(driver, read())
        perform(driver, read())

    def ends():
        perform(driver, read())
        value = Value()
        values.append(weakref.ref(value))
        return value

    parked = gevent.spawn(waits)
    gevent.spawn(ends)
    turn()
    kernel.finish_all()
    turn()
    gc.collect()
    assert not parked.dead
    assert values[0]() is None
    kernel.finish_all()
    parked.get(timeout=5)


def test_failure_of_one_that_another_went_to_is_reported_and_nothing_lost(driver):
    hub, kernel = gevent.get_hub(), driver.engine.context
    errors, done = [], []
    hub.handle_error = lambda context, kind, value, tb: errors.append(kind)
    try:

        def raw(i):
            perform(driver, read(i))
            if i == 2:
                raise KeyError(i)
            perform(driver, read(i))
            done.append(i)

        for i in range(5):
            gevent.spawn_raw(raw, i)
        turn()
        kernel.finish_all()
        turn()
        kernel.finish_all()
        turn()
    finally:
        del hub.handle_error
    assert errors == [KeyError]
    assert done == [0, 1, 3, 4]


def test_one_pass_wakes_a_bounded_number_and_returns_to_the_loop():
    driver = _loop.HubDriver(gevent.get_hub(), ScriptedContext(), depth=1000)
    driver.engine.context.frozen_at = 1
    woken, after_passes = [], []
    greenlets = [gevent.spawn(lambda i=i: (perform(driver, read(i)), woken.append(i)))
                 for i in range(500)]
    turn()
    driver.engine.context.finish_all()

    def one_pass():
        driver._on_eventfd()
        after_passes.append(len(woken))

    gevent.get_hub().loop.run_callback(one_pass)
    gevent.joinall(greenlets, timeout=10, raise_error=True)
    assert after_passes[0] == 64
    assert woken == list(range(500))
    driver.close()


def test_one_pass_lets_go_of_all_that_nobody_waits_for():
    """They come as fast as others ask for them, not one for each greenlet: counted, a server that was asked
    for more than it could deliver kept the memory of all."""
    driver = _loop.HubDriver(gevent.get_hub(), ScriptedContext(), depth=1000)
    driver.engine.context.frozen_at = 1         # a pass is as long as it needs to be
    greenlets = [gevent.spawn(perform, driver, read(i)) for i in range(500)]
    turn()
    gevent.killall(greenlets)
    driver.engine.context.finish_all()
    left = []
    gevent.get_hub().loop.run_callback(lambda: (driver._on_eventfd(), left.append(len(driver.engine.ready))))
    turn()
    assert left == [0]
    driver.close()


def test_stranger_switching_in_is_an_error_not_a_result(driver):
    parked = gevent.spawn(perform, driver, read())
    turn()
    gevent.get_hub().loop.run_callback(parked.switch)
    with pytest.raises(gevent.exceptions.InvalidSwitchError):
        parked.get(timeout=5)
    driver.engine.context.finish()
    turn()


def test_called_in_the_hub_it_raises(driver):
    caught = []

    def callback():
        try:
            perform(driver, read())
        except BlockingSwitchOutError as error:
            caught.append(error)

    gevent.get_hub().loop.run_callback(callback)
    turn()
    assert len(caught) == 1
    assert len(driver.engine.pending) == 0


def test_switch_out_hook_is_called(driver):
    class Noted(gevent.Greenlet):
        left = 0

        def switch_out(self):
            self.left += 1

    greenlet = Noted.spawn(perform, driver, read())
    turn()
    driver.engine.context.finish()
    greenlet.get(timeout=5)
    assert greenlet.left == 1


def test_completion_while_the_switch_out_hook_runs_is_not_missed(driver):
    class Finishing(gevent.Greenlet):
        def switch_out(self):
            driver.engine.context.finish()
            driver.engine.reap()

    assert Finishing.spawn(perform, driver, read()).get(timeout=5) == 512


def test_pass_while_the_switch_out_hook_waits_is_not_missed(driver):
    """The hub hands over what nobody waits for yet."""
    class Sleeping(gevent.Greenlet):
        slept = False

        def switch_out(self):
            if not self.slept:
                self.slept = True
                driver.engine.context.finish()
                gevent.sleep(0)
                driver._on_eventfd()
                gevent.sleep(0.01)

    assert Sleeping.spawn(perform, driver, read()).get(timeout=5) == 512


def test_exception_in_the_switch_out_hook_takes_the_request_back(driver):
    class Bad(gevent.Greenlet):
        def switch_out(self):
            raise KeyError('hook')

    greenlet = Bad.spawn(perform, driver, read())
    with pytest.raises(KeyError):
        greenlet.get(timeout=5)
    assert driver.waiting == 0
    driver.engine.context.finish_all()
    turn()


# Submitting ----------------------------------------------------------------------------------


def test_alone_it_goes_out_at_once(driver):
    greenlet = gevent.spawn(perform, driver, read())
    gevent.sleep(0)
    assert driver.engine.context.batches == [1]
    driver.engine.context.finish()
    greenlet.join()


def test_turn_of_the_hub_is_one_section(driver):
    kernel = driver.engine.context
    first = [gevent.spawn(perform, driver, read(i)) for i in range(48)]
    turn()
    del kernel.batches[:]
    more = [gevent.spawn(perform, driver, read(i)) for i in range(2)]
    turn()                          # 48 about: a batch of 3 would be full
    assert kernel.batches == [2]
    kernel.finish_all()
    gevent.joinall(first + more, timeout=5)


def test_requests_that_come_in_one_turn_go_out_together(driver):
    """The first at once, for the device has nothing to do; the other requests of that moment in batches."""
    kernel = driver.engine.context
    greenlets = [gevent.spawn(perform, driver, read(i * 512)) for i in range(20)]
    turn()
    assert kernel.batches == [1, 8, 8, 3]
    kernel.finish_all()
    gevent.joinall(greenlets, timeout=5, raise_error=True)


def test_eventfd_is_signalled_once_for_all_that_is_ready(driver):
    """
        greenlets of one turn                   kernel
        0 asks: submitted at once               has it
        1 asks, and 6 more: they wait
        8 asks: a batch of 8                    has finished 0, which is found now, and signalled
        9 to 24 ask: two batches more           (what is found again needs no second signal)
    """
    kernel, signals = driver.engine.context, []
    kernel.now = lambda: 1              # a pass that takes long goes on later, and signals for that
    signal = kernel.signal

    def counted():
        signals.append(1)
        return signal()

    def answer(batch):
        kernel.signal = signal          # of the kernel's own nobody asks
        for request in [*kernel.taken, *batch][:1]:
            if request in kernel.taken:
                kernel.finish(request)
        kernel.signal = counted
        return len(batch)

    kernel.signal = counted
    kernel.answers.extend([1, answer, answer, answer])
    greenlets = [gevent.spawn(perform, driver, read(i * 512)) for i in range(25)]
    turn()
    assert kernel.batches == [1, 8, 8, 8]
    assert len(signals) == 1
    kernel.finish_all()
    gevent.joinall(greenlets, timeout=5, raise_error=True)


def test_drain_pass_is_a_section_and_the_outermost_end_submits(driver):
    """Ten greenlets woken by one pass ask again: their requests go out in batches, not one by one."""
    kernel = driver.engine.context

    def worker(i):
        perform(driver, read(i))
        perform(driver, read(100 + i))

    greenlets = [gevent.spawn(worker, i) for i in range(40)]
    turn()
    del kernel.batches[:]
    kernel.finish_all()
    turn()
    assert sum(kernel.batches) == 40
    assert max(kernel.batches) > 1
    kernel.finish_all()
    gevent.joinall(greenlets, timeout=5, raise_error=True)


def test_failure_at_the_end_of_a_pass_stops_nobody(driver):
    """Raised into the loop, gevent would stop the watcher for it."""
    kernel, hub, done, errors = driver.engine.context, gevent.get_hub(), [], []

    def fails(batch):
        raise KeyError

    def worker(i):
        perform(driver, read(i))
        if i == 0:
            perform(driver, read(100))          # goes out as the pass ends
        done.append(i)

    greenlets = [gevent.spawn(worker, i) for i in range(60)]
    turn()
    for _ in range(20):             # with 40 in flight, one request does not go out at once
        kernel.finish()
    kernel.answers.append(fails)
    hub.handle_error = lambda context, kind, value, tb: errors.append(kind)
    try:
        with gevent.Timeout(5):
            while len(done) < 60:
                gevent.sleep(0.001)
                kernel.finish_all()
    finally:
        del hub.handle_error
    gevent.joinall(greenlets, raise_error=True)
    assert errors == [KeyError]


def test_pass_ends_after_two_hundred_microseconds_too(driver):
    """Greenlets that take 50 us each: the loop has its turn after every fifth."""
    kernel, order = driver.engine.context, []

    def worker(i):
        perform(driver, read(i))
        order.append(i)
        kernel.frozen_at += 50_000
        if i == 0:
            gevent.get_hub().loop.run_callback(order.append, 'loop')

    greenlets = [gevent.spawn(worker, i) for i in range(20)]
    turn()
    kernel.finish_all()
    gevent.joinall(greenlets, timeout=5, raise_error=True)
    assert order.index('loop') == 5


def test_device_that_does_all_at_once_is_asked_for_what_a_pass_asks_for_together(driver):
    """Nobody waits for the disk, so they need not go one by one; each has its turn, however fast it is."""
    kernel, order = driver.engine.context, []
    kernel.inline = True

    def worker(i):
        for _ in range(2 * 256):        # more than a run
            perform(driver, read(i))
            order.append(i)

    greenlets = [gevent.spawn(worker, i) for i in range(8)]
    gevent.joinall(greenlets, timeout=20, raise_error=True)
    assert kernel.batches.count(8) + kernel.batches.count(7) > len(kernel.batches) / 2
    assert sum(a != b for a, b in zip(order, order[1:])) > len(order) / 2


def test_section_never_spans_a_park(driver):
    """What a greenlet asked for goes out though it parks in the middle of the pass."""
    kernel = driver.engine.context

    def worker(i):
        perform(driver, read(i))
        gevent.sleep(0.001)         # parks elsewhere, inside the drain pass
        perform(driver, read(100 + i))

    greenlets = [gevent.spawn(worker, i) for i in range(40)]
    turn()
    kernel.finish_all()
    with gevent.Timeout(5):
        while len(kernel.taken) < 40:
            gevent.sleep(0.001)
    kernel.finish_all()
    gevent.joinall(greenlets, timeout=5, raise_error=True)


def test_full_queue_is_first_in_first_out_and_all_finish(driver):
    kernel = driver.engine.context
    greenlets = [gevent.spawn(perform, driver, read(i)) for i in range(256)]    # depth is 64
    turn()
    assert len(kernel.taken) == 64 and len(driver.engine.pending) == 192
    submits = kernel.submits
    turn()
    assert kernel.submits == submits        # held, it costs nothing
    while len(kernel.order) < 256:
        kernel.finish()
        turn()
    kernel.finish_all()
    gevent.joinall(greenlets, timeout=5, raise_error=True)
    assert kernel.order == list(range(256))


def test_full_queue_is_filled_up_before_anybody_wakes(driver):
    kernel = driver.engine.context
    taken_when_woken = []

    def worker(i):
        perform(driver, read(i))
        taken_when_woken.append(len(kernel.order))

    greenlets = [gevent.spawn(worker, i) for i in range(100)]       # depth is 64
    turn()
    for _ in range(10):
        kernel.finish()
    turn()
    assert taken_when_woken == [74] * 10
    kernel.finish_all()
    turn()
    kernel.finish_all()
    gevent.joinall(greenlets, timeout=5, raise_error=True)


def test_again_with_nothing_in_flight_is_retried_by_a_timer(driver):
    kernel = driver.engine.context
    kernel.answers.extend([-errno.EAGAIN] * 3)
    greenlet = gevent.spawn(perform, driver, read())
    with gevent.Timeout(5):
        while not kernel.batches:
            gevent.sleep(0.001)
    assert kernel.batches == [1]
    kernel.finish()
    assert greenlet.get(timeout=5) == 512


def test_again_for_ever_is_refused_so_that_a_thread_is_asked(driver):
    class Always(list):
        def popleft(self):
            return -errno.EAGAIN

        def __bool__(self):
            return True

    class Ways(_dispatch.Ways):
        def next_way(self, driver, request, result, asked):
            asked_for.append((result, asked))
            return 3                    # none

    asked_for = []
    driver.engine.context.answers = Always()
    request = read()
    request.file, request.may_move = Ways(), True
    assert perform(driver, request) == -errno.EAGAIN
    assert asked_for == [(-errno.EAGAIN, False)]
    assert 5 <= driver.engine.context.submits < 20
    driver.engine.context.answers = type(ScriptedContext().answers)()
    greenlet = gevent.spawn(perform, driver, read())
    turn()
    driver.engine.context.finish()
    assert greenlet.get(timeout=5) == 512


# Kill and Timeout ----------------------------------------------------------------------------


def test_killed_while_pending_is_withdrawn_and_lets_go_at_once(driver):
    kernel = driver.engine.context
    kernel.answers.append(-errno.EAGAIN)
    memory = bytearray(512)
    greenlet = gevent.spawn(perform, driver, read(memory=memory))
    gevent.sleep(0)
    assert len(driver.engine.pending) == 1
    greenlet.kill()
    memory.append(1)                # not pinned
    gevent.sleep(0.01)
    assert kernel.order == []


def test_killed_in_flight_keeps_buffer_until_done(driver):
    class Memory(bytearray):
        pass

    memory = Memory(512)
    gone = weakref.ref(memory)
    greenlet = gevent.spawn(perform, driver, read(memory=memory))
    turn()
    started = time.monotonic()
    greenlet.kill()
    assert time.monotonic() - started < 1
    assert driver.waiting == 0
    del memory, greenlet
    gc.collect()
    assert gone() is not None
    driver.engine.context.finish(fill=0xCD)
    turn()
    gc.collect()
    assert gone() is None


def test_timeout_in_flight_goes_up_at_once_and_the_rest_goes_on(driver):
    def worker():
        with pytest.raises(gevent.Timeout), gevent.Timeout(0.001):
            perform(driver, read(0))
        return perform(driver, read(1))

    greenlet = gevent.spawn(worker)
    kernel = driver.engine.context
    with gevent.Timeout(5):
        while len(kernel.taken) < 2:
            gevent.sleep(0.001)
    kernel.finish(kernel.taken[0], 5)
    kernel.finish(kernel.taken[0], 7)
    assert greenlet.get(timeout=5) == 7


def test_killed_when_done_but_not_delivered_drops_the_result(driver):
    greenlet = gevent.spawn(perform, driver, read())
    turn()
    driver.engine.context.finish()
    driver.engine.reap()
    assert len(driver.engine.ready) == 1
    greenlet.kill()
    assert len(driver.engine.ready) == 0
    assert isinstance(greenlet.value, gevent.GreenletExit)


def test_woken_and_killed_in_one_turn_ends_once(driver):
    ends = []

    def worker():
        try:
            ends.append(perform(driver, read()))
            gevent.sleep(10)
        except gevent.GreenletExit:
            ends.append('killed')

    greenlet = gevent.spawn(worker)
    turn()
    driver.engine.context.finish()
    greenlet.kill(block=False)
    greenlet.join(timeout=5)
    assert ends in ([512, 'killed'], ['killed'])
    turn()


def test_abandoned_requests_still_count_as_in_flight(driver):
    kernel = driver.engine.context
    greenlets = [gevent.spawn(perform, driver, read(i)) for i in range(64)]
    turn()
    gevent.killall(greenlets)
    late = gevent.spawn(perform, driver, read(99))
    turn()
    assert kernel.order[-1] == 63           # no room: the kernel has them all still
    kernel.finish()
    turn()
    assert kernel.order[-1] == 99
    kernel.finish_all()
    assert late.get(timeout=5) == 512


# The loop ------------------------------------------------------------------------------------


def test_loop_is_held_while_somebody_waits():
    run_python('''
        import gevent, time
        from tests.support.kernel import ScriptedContext
        from greenaio._core import loop as _loop
        from greenaio._core.request import Request
        driver = _loop.HubDriver(gevent.get_hub(), ScriptedContext(), depth=8)
        def later():
            time.sleep(0.2)
            driver.engine.context.finish()
        import gevent.monkey
        gevent.monkey.get_original('_thread', 'start_new_thread')(later, ())
        # nothing else is there to hold the loop: without our watcher this is LoopExit
        assert driver.perform_request(Request(0, 3, bytearray(10))) == 10
    ''')


def test_loop_ends_when_only_abandoned_requests_are_left():
    run_python('''
        import gevent
        from tests.support.kernel import ScriptedContext
        from greenaio._core import loop as _loop
        from greenaio._core.request import Request
        driver = _loop.HubDriver(gevent.get_hub(), ScriptedContext(), depth=8)
        greenlet = gevent.spawn(driver.perform_request, Request(0, 3, bytearray(10)))
        gevent.sleep(0.01)
        greenlet.kill()
        assert gevent.get_hub().join(timeout=5) is True
        assert len(driver.engine.in_flight) == 1
    ''')


def test_idle_driver_does_not_hold_the_loop():
    run_python('''
        import gevent
        from greenaio._core import hub as _hub
        _hub.get_driver()
        assert gevent.get_hub().join(timeout=5) is True
    ''')


# Polling -------------------------------------------------------------------------------------


@pytest.fixture
def polling():
    config.poll_max_us = 100
    yield
    config.poll_max_us = 0


def test_polling_is_off_unless_asked_for(driver):
    spun = []
    driver.engine.context.spin = lambda limit: spun.append(limit) or 0
    greenlet = gevent.spawn(perform, driver, read())
    turn()
    driver.engine.context.finish()
    greenlet.join()
    assert spun == []


def test_spin_grows_when_it_would_have_paid_and_shrinks_when_not(polling):
    class Timed(ScriptedContext):
        spun = ()

        def spin(self, limit_ns):
            self.spun += (limit_ns,)
            return 0

    driver = _loop.HubDriver(gevent.get_hub(), Timed(), depth=8)
    kernel = driver.engine.context
    driver._adapt_poll(10_000)              # came 10 µs after a spin of 0: begin
    grown = []
    for _ in range(6):
        greenlet = gevent.spawn(perform, driver, read())
        gevent.sleep(0)
        kernel.finish()
        grown.append(kernel.spun[-1])
        driver._adapt_poll(10_000)
        greenlet.join()
    assert grown[0] == 4000
    assert grown == sorted(grown) and grown[-1] <= 100_000
    for _ in range(8):
        driver._adapt_poll(5_000_000)       # 5 ms: no spin of ours catches that
    kernel.spun = ()
    greenlet = gevent.spawn(perform, driver, read())
    gevent.sleep(0)
    kernel.finish()
    greenlet.join()
    assert kernel.spun == ()
    driver.close()


def test_spin_that_catches_the_completion_needs_no_switch(polling):
    class Catching(ScriptedContext):
        def spin(self, limit_ns):
            self.finish()
            return 1

    caught = _loop.HubDriver(gevent.get_hub(), Catching(), depth=8)
    caught._adapt_poll(1000)
    ran = []
    gevent.get_hub().loop.run_callback(ran.append, 'hub')
    assert perform(caught, read()) == 512
    assert ran == []
    caught.close()


@pytest.mark.parametrize('name, value, error', [
    ('poll_max_us', -1, ValueError), ('poll_max_us', 1.5, TypeError), ('depth', 0, ValueError),
    ('nothing', 1, AttributeError),
])
def test_bad_setting_is_refused(name, value, error):
    with pytest.raises(error):
        setattr(config, name, value)


def test_bad_setting_in_the_environment_is_refused():
    use = 'import greenaio; greenaio.File("/dev/null")'
    done = run_python(use, env={'GREENAIO_POLL_MAX_US': 'much'}, check=False)
    assert 'GREENAIO_POLL_MAX_US must be a whole number' in done.stderr


# AIO refused or used up ------------------------------------------------------------------------


class Refusing(ScriptedContext):
    is_open = False

    def __init__(self, code, below=0):
        super().__init__()
        self.code, self.below = code, below

    def open(self, depth):
        super().open(depth)
        if depth >= self.below:
            raise OSError(self.code, 'refused')
        self.is_open = True


@pytest.fixture
def warnings_of(caplog):
    _loop._warned = False
    caplog.set_level('WARNING', 'greenaio')
    yield caplog
    _loop._warned = True


def test_setup_again_halves_the_depth(warnings_of):
    driver = _loop.HubDriver(gevent.get_hub(), Refusing(errno.EAGAIN, below=40), depth=256)
    assert driver.native and driver.engine.depth == 32
    assert driver.engine.context.opened == [256, 128, 64, 32]
    message, = warnings_of.messages
    for part in ('256', 'aio-nr', 'aio-max-nr', 'sysctl -w fs.aio-max-nr'):
        assert part in message
    driver.close()


@pytest.mark.parametrize('code', [errno.EAGAIN, errno.EPERM, errno.ENOSYS, errno.ENOMEM])
def test_setup_refused_means_threads_and_one_warning(warnings_of, code):
    for _ in range(2):
        driver = _loop.HubDriver(gevent.get_hub(), Refusing(code), depth=256)
        assert not driver.native
        driver.close()
    assert len(warnings_of.messages) == 1


def test_native_aio_that_was_used_up_is_asked_for_again_at_most_once_a_second(caplog):
    caplog.set_level('INFO', 'greenaio')

    class UsedUp(ScriptedContext):
        is_open = False
        is_used_up = True
        frozen_at = 1

        def open(self, depth):
            self.opened.append(depth)
            if self.is_used_up:
                raise OSError(errno.EAGAIN, 'used up')
            self.is_open = True

    context = UsedUp()
    context.frozen_at = now = context.now()
    driver = _loop.HubDriver(gevent.get_hub(), context, depth=64)
    try:
        assert not driver.native
        assert context.opened == [64, 32, 16]
        for _ in range(3):
            assert not driver.has_aio()
        assert len(context.opened) == 3
        context.frozen_at = now + 10 ** 9
        for _ in range(3):
            assert not driver.has_aio()
        assert len(context.opened) == 6
        context.is_used_up = False
        assert not driver.has_aio()
        context.frozen_at = now + 2 * 10 ** 9
        assert driver.has_aio() and driver.native
        assert driver.has_aio()
        assert context.opened[6:] == [64]
        assert driver.engine.depth == 64
        gevent.sleep(0.01)
        assert [record.message for record in caplog.records if 'again' in record.message] == [
            'native AIO is to be had again: 64 requests in flight']
    finally:
        driver.close()


def test_native_aio_that_is_denied_is_not_asked_for_again():
    class Denied(ScriptedContext):
        is_open = False

        def open(self, depth):
            self.opened.append(depth)
            raise OSError(errno.EPERM, 'denied')

    context = Denied()
    context.frozen_at = context.now()
    driver = _loop.HubDriver(gevent.get_hub(), context, depth=64)
    try:
        context.frozen_at += 10 ** 11
        assert not driver.has_aio()
        assert context.opened == [64]
    finally:
        driver.close()
