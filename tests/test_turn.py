"""The turn: who has it, who has it next, and that no greenlet waits for ever."""

import errno
import sys
import threading

import gevent
import gevent.monkey
import pytest
from gevent.event import Event
from greenlet import getcurrent

import greenaio
from greenaio._files import sleeper as _sleeper
from greenaio._files import turn as _turn
from greenaio._files import waiter as _waiter
from greenaio._files.turn import LEFT, Turn, taking
from tests.support.processes import run_python

native_sleep = gevent.monkey.get_original('time', 'sleep')


def in_thread(function, has_hub=True):
    """Start *function* in a thread of its own, which this one may join without its hub."""
    def run():
        if has_hub:
            gevent.get_hub()
        try:
            function()
        finally:
            if has_hub:
                gevent.get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def join(thread):
    """Block this thread and its hub."""
    thread.join(10)
    assert not thread.is_alive(), 'the thread waits for ever'


def wait_natively(is_true):
    for _ in range(10000):
        if is_true():
            return
        native_sleep(0.001)
    raise AssertionError('it never comes true')


# In one thread -------------------------------------------------------------------------------------

@pytest.mark.parametrize('favours_leaver', [False, True])
def test_greenlet_that_does_not_park_has_the_turn_again_first_only_if_it_is_favoured(favours_leaver):
    """Else greenlets have it in the order in which they asked for it, as `gzip` needs it."""
    turn, order = Turn(), []
    turn.favours_leaver = favours_leaver

    def work(name):
        for _ in range(3):
            with taking(turn):
                order.append(name)
                gevent.sleep(0)

    gevent.joinall([gevent.spawn(work, name) for name in 'ab'], raise_error=True)
    assert order == (list('aaabbb') if favours_leaver else list('ababab'))
    assert turn.owner is None and turn.leaver is None and not turn.queue


def test_greenlet_that_parks_lets_the_first_in_the_queue_go_before_it():
    turn, order = Turn(), []

    def work(name):
        for _ in range(3):
            with taking(turn):
                order.append(name)
                gevent.sleep(0)
            gevent.sleep(0)

    gevent.joinall([gevent.spawn(work, name) for name in 'abc'], raise_error=True)
    assert order == list('abc') * 3


def test_greenlet_that_parks_only_in_its_turn_does_not_keep_it_for_ever():
    turn = Turn()
    turn.favours_leaver = True

    def greedy():
        while True:
            with taking(turn):
                gevent.sleep(0)

    job = gevent.spawn(greedy)
    gevent.sleep(0)
    with gevent.Timeout(10):
        for _ in range(3):
            with taking(turn):
                assert turn.owner is getcurrent()
    job.kill()
    assert turn.owner is None


def test_greenlet_that_has_just_come_waits_behind_the_queue():
    turn, order = Turn(), []

    def work(name):
        with taking(turn):
            order.append(name)

    with taking(turn):
        first = gevent.spawn(work, 'first')
        gevent.sleep(0)
        late = gevent.spawn(work, 'late')       # runs before the hub wakes the first
    gevent.joinall([first, late], raise_error=True)
    assert order == ['first', 'late']


def test_killed_waiter_passes_its_wake_on():
    turn = Turn()
    turn.owner = getcurrent()
    jobs = [gevent.spawn(turn.wait) for _ in range(3)]
    gevent.sleep(0)
    gevent.killall(jobs[:2], block=False)
    turn.leave()
    jobs[2].join(10)
    assert turn.owner is jobs[2] and not turn.queue


def test_turn_is_free_after_its_last_waiter_is_killed():
    turn = Turn()
    turn.owner = getcurrent()
    job = gevent.spawn(turn.wait)
    gevent.sleep(0)
    job.kill(block=False)
    turn.leave()
    job.join()
    assert turn.owner is None
    with taking(turn):
        pass


def test_switch_from_elsewhere_does_not_give_the_turn():
    turn = Turn()
    turn.owner = getcurrent()
    job = gevent.spawn(turn.wait)
    gevent.sleep(0)
    for _ in range(3):
        gevent.get_hub().loop.run_callback(job.switch)
        gevent.sleep(0)
    assert turn.owner is getcurrent() and len(turn.queue) == 1
    turn.leave()
    job.join(10)
    assert turn.owner is job


def test_two_greenlets_that_would_wait_for_each_other():
    """As a signal handler does that uses another file than the greenlet which it interrupts."""
    one, two, errors = Turn(), Turn(), []

    def work(first, second):
        try:
            with taking(first):
                gevent.sleep(0)
                with taking(second):
                    pass
        except RuntimeError as error:
            errors.append(error)

    with gevent.Timeout(10):
        gevent.joinall([gevent.spawn(work, one, two), gevent.spawn(work, two, one)], raise_error=True)
    assert len(errors) == 1
    assert one.owner is two.owner is None


def test_waiter_below_a_signal_handler_is_passed_over():
    """The handler waits for another turn, whose owner waits behind the interrupted greenlet."""
    one, two, order = Turn(), Turn(), []

    class Interrupted(_turn.Waiter):
        def wait(self):
            if self.turn is one and self.greenlet is below and self.outer is None and 'handler' not in order:
                order.append('handler')
                with taking(two):
                    order.append('two')
            super().wait()

    def wait_for_one():
        with taking(one):
            order.append('below')

    def have_two():
        with taking(two):
            gevent.sleep(0)
            gevent.sleep(0)
            with taking(one):
                order.append('one')

    _turn.Waiter, plain = Interrupted, _turn.Waiter
    try:
        with gevent.Timeout(10), taking(one):
            other = gevent.spawn(have_two)
            below = gevent.spawn(wait_for_one)
            for _ in range(4):
                gevent.sleep(0)
        with gevent.Timeout(10):
            gevent.joinall([below, other], raise_error=True)
    finally:
        _turn.Waiter = plain
    assert order == ['handler', 'one', 'two', 'below']


# Signal handlers -------------------------------------------------------------------------------------

FILES = (_turn.__file__, _waiter.__file__, _sleeper.__file__)


class Hit(Exception):
    pass


def hit_at(count):
    """Raise Hit at a place where Python runs signal handlers, in the code of turns: at the begin of a
    function or after the call of one. The places are counted."""
    def profile(frame, event, _):
        nonlocal count
        if event == 'call' and frame.f_lasti >= 0 and sys.version_info < (3, 11):
            # A generator goes on. A signal handler raises inside it, but an exception of this function would
            # end the generator of Python 3.10 without its ``finally``.
            return
        if event in ('call', 'c_return') and frame.f_code.co_filename in FILES:
            count -= 1
            if not count:
                raise Hit
    return profile


class _Scene:
    """Three greenlets take a turn, one after the other. In the one called *who* comes an exception."""

    def __init__(self, who, place):
        self.who, self.place = who, place
        self.turn, self.inside, self.was_hit = Turn(), set(), False
        self.jobs = [gevent.spawn(self.work, name) for name in ('owner', 'waiter', 'behind')]

    def work(self, name):
        try:
            if name == self.who:
                sys.setprofile(hit_at(self.place))
            self.use(name)
        except Hit:
            self.was_hit = True
        finally:
            if name == self.who:
                sys.setprofile(None)

    def use(self, name):
        with taking(self.turn):
            assert not self.inside
            self.inside.add(name)
            try:
                gevent.sleep(0)
                gevent.sleep(0)
            finally:
                self.inside.remove(name)


@pytest.mark.parametrize('who', ['owner', 'waiter'])
def test_exception_of_a_signal_handler_costs_no_greenlet_its_turn(who):
    """Wherever it comes, once: in the owner of the turn or in a waiter."""
    for place in range(1, 500):
        scene = _Scene(who, place)
        gevent.joinall(scene.jobs, timeout=10)
        assert all(job.successful() for job in scene.jobs), (place, scene.turn.owner, scene.turn.queue)
        assert scene.turn.owner is None and not scene.turn.queue, place
        assert not _waiter._waiters
        if not scene.was_hit:
            break
    assert 20 < place < 499


def test_killed_waiter_leaves_the_queue_also_if_a_signal_handler_raises_there(monkeypatch):
    class Struck(_turn.Waiter):
        was_hit = False

        def go(self):
            if not self.was_hit:
                self.was_hit = True
                raise Hit
            super().go()

    monkeypatch.setattr(_turn, 'Waiter', Struck)
    turn = Turn()
    turn.owner = getcurrent()
    waiter = gevent.spawn(turn.wait)
    gevent.sleep(0)
    waiter.kill()
    assert isinstance(waiter.exception, Hit)
    assert not turn.queue and not _waiter._waiters


# Several threads -------------------------------------------------------------------------------------

@pytest.mark.parametrize('has_hub', [True, False])
@pytest.mark.parametrize('is_first', [True, False])
def test_thread_that_its_leaver_joins_has_the_turn_at_once(has_hub, is_first):
    """The hub of the leaver does not run, so a greenlet that waits in it cannot take the turn."""
    turn = Turn()
    turn.owner = getcurrent()

    def other():
        with taking(turn):
            pass

    jobs = []
    if not is_first:
        jobs.append(gevent.spawn(turn.wait))
        gevent.sleep(0)
    thread = in_thread(other, has_hub)
    wait_natively(lambda: len(turn.queue) > len(jobs) and turn.queue[-1].sleeper.is_parked)
    turn.leave()
    join(thread)
    gevent.joinall(jobs, timeout=10)
    assert turn.owner is (jobs[0] if jobs else None)


def test_thread_that_comes_when_the_owner_has_left_need_not_wait_for_its_hub():
    turn = Turn()
    turn.owner = getcurrent()
    job = gevent.spawn(turn.wait)
    gevent.sleep(0)
    turn.leave()
    assert turn.owner is LEFT

    def other():
        with taking(turn):
            pass

    join(in_thread(other))
    job.join(10)
    assert turn.owner is job


def test_leaver_that_goes_on_does_not_come_before_another_thread():
    turn = Turn()
    turn.favours_leaver = True
    turn.owner = getcurrent()
    done = []

    def other():
        with taking(turn):
            done.append(True)

    thread = in_thread(other)
    wait_natively(lambda: turn.queue and turn.queue[0].sleeper.is_parked)
    turn.leave()
    with taking(turn):
        assert done
    join(thread)


def test_loop_with_nothing_but_a_waiter_goes_on():
    """gevent would raise LoopExit there: no greenlet of this loop could wake the waiter."""
    turn, errors = Turn(), []
    turn.owner = getcurrent()

    def other():
        try:
            with taking(turn):
                pass
        except BaseException as error:
            errors.append(error)

    thread = in_thread(other)
    native_sleep(0.1)
    turn.leave()
    join(thread)
    assert errors == []


TWO_THREADS = '''
import errno, gevent, os, sys, threading
from gevent.monkey import get_original
from greenaio._files import sleeper as _sleeper, turn as _turn, waiter as _waiter
from tests.programs.turn_and_thread import file, native_sleep, start
is_file, how, waiter = sys.argv[2] == 'file', sys.argv[3], sys.argv[4]
turn = _turn.Turn(guards_io=is_file)
owns, waits = threading.Event(), threading.Event()

def owner():
    with _turn.taking(turn):
        _waiter.can_wait()        # as each call of a file asks
        owns.set()
        gevent.sleep(60)

def thread():
    gevent.spawn(owner)
    gevent.sleep(0)
    waits.wait(10)
    native_sleep(0.2)           # its loop does not run again
    if how == 'hub':
        gevent.get_hub().destroy(destroy_loop=True)
        native_sleep(60)

def wait():
    try:
        turn.wait()
    except OSError as error:
        assert is_file and error.errno == errno.EOWNERDEAD
    else:
        assert not is_file
        turn.leave()
    done.append(True)

done = []
start(thread, ())
owns.wait(10)
if waiter == 'greenlets':
    jobs = [gevent.spawn(wait) for _ in range(3)]
    gevent.sleep(0)
    waits.set()
    gevent.joinall(jobs, timeout=10)
    assert len(done) == 3, done
else:
    lock = get_original('_thread', 'allocate_lock')()
    lock.acquire()
    start(lambda: (wait(), lock.release()), ())
    while not turn.queue:
        native_sleep(0.001)
    waits.set()
    assert lock.acquire(timeout=10)
    assert done
os._exit(0)
'''


@pytest.mark.parametrize('waiter', ['greenlets', 'a thread without a hub'])
@pytest.mark.parametrize('how', ['thread', 'hub'])
@pytest.mark.parametrize('kind', ['file', 'number'])
def test_waiters_hear_of_the_end_of_the_owners_thread(disk_folder, kind, how, waiter):
    run_python(TWO_THREADS, f'{disk_folder}/data', kind, how, waiter)


def test_forked_child_takes_the_turn_from_a_greenlet_of_another_thread(disk_folder):
    """Its waiters, whose originals go on waiting in the parent, take it when they hear of the fork."""
    run_python('''
import gevent, os, sys, threading
from greenaio._files import sleeper as _sleeper, turn as _turn, waiter as _waiter
native_sleep = gevent.monkey.get_original('time', 'sleep')
turn, owns = _turn.Turn(), threading.Event()

def thread():
    with _turn.taking(turn):
        owns.set()
        native_sleep(60)

threading.Thread(target=thread, daemon=True).start()
owns.wait(10)
job = gevent.spawn(turn.wait)
gevent.sleep(0)
child = os.fork()
if not child:
    job.join(10)
    os._exit(not (turn.owner is job and not turn.queue))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert turn.owner is not job and len(turn.queue) == 1
os._exit(0)
''', env={'PYTHONWARNINGS': 'ignore::DeprecationWarning'})        # of a fork beside threads


# The hub ---------------------------------------------------------------------------------------------

def test_hub_takes_a_turn_that_its_owner_has_left():
    turn, answers = Turn(), []
    turn.owner = getcurrent()
    job = gevent.spawn(turn.wait)
    gevent.sleep(0)

    def in_hub():
        try:
            with taking(turn):
                answers.append(turn.owner)
        except BaseException as error:
            answers.append(type(error))

    gevent.get_hub().loop.run_callback(in_hub)
    gevent.sleep(0)
    assert answers == [gevent.exceptions.BlockingSwitchOutError]
    gevent.get_hub().loop.run_callback(in_hub)      # before the first in the queue is woken
    turn.leave()
    job.join(10)
    assert answers[1:] == [gevent.get_hub()]
    assert turn.owner is job


def test_closer_sends_those_away_that_wait(disk_folder):
    path = f'{disk_folder}/file'
    file = greenaio.open(path, 'wb')
    turn = file._io_turn
    is_over, errors = Event(), []

    def have_it():
        with taking(turn):
            is_over.wait(10)

    def write():
        try:
            file.write(b'x')
        except OSError as error:
            errors.append(error.errno)

    owner = gevent.spawn(have_it)
    gevent.sleep(0)
    writers = [gevent.spawn(write) for _ in range(3)]
    gevent.sleep(0)
    closer = gevent.spawn(file.close)
    gevent.sleep(0)
    is_over.set()
    gevent.joinall([owner, closer, *writers], timeout=10, raise_error=True)
    assert errors == [errno.EBADF] * 3
    assert file.closed
