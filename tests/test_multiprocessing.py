"""The locks and queues of `multiprocessing`, patched: real processes, and greenlets in each of them."""

import os
import subprocess
import sys
import textwrap

import pytest

SCRIPT = '''
import gevent.monkey
gevent.monkey.patch_all()
import greenaio.monkey
greenaio.monkey.patch_all()
import errno, multiprocessing, os, sys, time
import gevent
from gevent.exceptions import BlockingSwitchOutError
from greenaio._files import semaphore as _semaphore

def all_of(*jobs):
    gevent.joinall(jobs, timeout=30, raise_error=True)
    assert all(job.ready() for job in jobs), 'a greenlet waits for ever'
    return [job.value for job in jobs]

def wait_until(condition):
    with gevent.Timeout(20):
        while not condition():
            gevent.sleep(0.005)

def hold(lock, has_it, let_go):
    """What the other process does: it has the lock until it is told."""
    with lock:
        has_it.set()
        let_go.wait()

class Held:
    """A lock that another process holds."""
    def __init__(self, context, lock):
        self.has_it, self.let_go = context.Event(), context.Event()
        self.process = context.Process(target=hold, args=(lock, self.has_it, self.let_go))
        self.process.start()
        self.has_it.wait()
    def end(self):
        self.let_go.set()
        self.process.join(20)   # without a time, gevent blocks where it was spawned
        assert self.process.exitcode == 0
'''


@pytest.fixture
def run_script(tmp_path):
    """Run the ``main(context)`` of a script that a spawned child can import; return the process."""
    def run(code, method='fork'):
        path = tmp_path / 'script.py'
        path.write_text(SCRIPT + textwrap.dedent(code) + textwrap.dedent(f'''
            if __name__ == '__main__':
                # gevent installs its handler of SIGCHLD after the first fork. If the child has ended by then,
                # gevent never hears of it, and waitpid waits for ever. With "spawn" the
                # handler itself makes a test wait for ever: seen with CPython 3.11, the cause is not known.
                gevent.get_hub()
                if {method!r} == 'fork':
                    gevent.get_hub().loop.install_sigchld()
                main(multiprocessing.get_context({method!r}))
        '''))
        done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60,
                              cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, '')
        return done

    return run


def without_libuv(reason):
    return pytest.mark.skipif('libuv' in os.environ.get('GEVENT_LOOP', ''), reason=reason)


def with_children(*parameters):
    """For tests that wait for the end of another process."""
    def mark(test):
        names = ', '.join(['method', 'kind'][:len(parameters[0].split())])
        values = [one.split() if ' ' in one else one for one in parameters]
        test = pytest.mark.parametrize(names, values)(test)
        return without_libuv('there gevent misses the end of a child at times: Process.join hangs')(test)
    return mark


@with_children('fork', 'spawn')
def test_lock_is_held_over_file_calls_by_greenlets_of_two_processes(run_script, method):
    run_script('''
        def add(lock):
            for _ in range(10):
                with lock:
                    with open('count') as file:
                        value = int(file.read())
                    with open('count', 'w') as file:
                        file.write(str(value + 1))
        def child(lock):
            gevent.get_hub()
            all_of(*[gevent.spawn(add, lock) for _ in range(3)])
        def main(context):
            with open('count', 'w') as file:
                file.write('0')
            lock = context.Lock()
            other = context.Process(target=child, args=(lock,))
            other.start()
            child(lock)
            other.join(20)
            assert other.exitcode == 0
            with open('count') as file:
                assert file.read() == '60'
    ''', method)


@with_children('fork Lock', 'fork RLock', 'spawn Lock', 'spawn BoundedSemaphore')
def test_greenlet_waits_for_another_process_and_the_hub_goes_on(run_script, method, kind):
    """Only the hub can tell the other process to let go. gevent's pool has no part in it."""
    run_script(f'''
        def main(context):
            lock = context.{kind}()
            held = Held(context, lock)
            order = []
            def use(timeout):
                assert lock.acquire(True, timeout)
                order.append(timeout)
                gevent.sleep(0.01)
                lock.release()
            waiters = [gevent.spawn(use, None), gevent.spawn(use, 20)]
            gevent.sleep(0.02)
            assert not lock.acquire(False) and not lock.acquire(True, 0.01)
            assert len(_semaphore._servers) == 1
            assert gevent.get_hub().threadpool.size == 0
            held.end()
            all_of(*waiters)
            assert order == [None, 20] and lock.acquire(False)
    ''', method)


@with_children('fork')
def test_waiter_that_is_killed_loses_no_unit(run_script, method):
    run_script('''
        def main(context):
            lock = context.Lock()
            held = Held(context, lock)
            killed = gevent.spawn(lock.acquire)
            gevent.sleep(0.02)
            killed.kill()
            with gevent.Timeout(0.02, False):
                lock.acquire()
            assert len(_semaphore._servers) == 1    # the thread can't be ended
            waiter = gevent.spawn(lock.acquire, True, 20)
            gevent.sleep(0.02)
            assert len(_semaphore._servers) == 1    # and serves the next
            held.end()
            assert all_of(waiter) == [True]
            lock.release()
            wait_until(lambda: not _semaphore._servers)
            held = Held(context, lock)
            killed = gevent.spawn(lock.acquire)
            gevent.sleep(0.02)
            killed.kill()
            held.end()
            wait_until(lambda: not _semaphore._servers)     # nobody came: it gave the unit back
            assert lock.acquire(False)
    ''', method)


@pytest.mark.parametrize('kind', ['Lock', 'RLock'])
def test_child_does_not_release_what_a_greenlet_of_its_parent_holds(run_script, kind):
    """The copy of the greenlet leaves its ``with`` in the child, also if it gets ECANCELED there."""
    run_script(f'''
        def main(context):
            lock = context.{kind}()
            reading, writing = os.pipe()

            def use():
                with lock:
                    os.read(reading, 1)

            user = gevent.spawn(use)
            gevent.sleep(0.02)
            pid = os.fork()
            if pid == 0:
                gevent.get_hub().exception_stream = None
                user.kill()
                taken = lock.acquire(False)
                os._exit(taken)
            status = os.waitpid(pid, 0)[1]
            assert status == 0, 'the child took the lock of its parent'
            assert not gevent.spawn(lock.acquire, False).get(), 'the child released the lock of its parent'
            os.write(writing, b'x')
            all_of(user)
            assert lock.acquire(False)
    ''')


def test_waiter_that_is_killed_with_the_unit_in_its_hand_gives_it_back(run_script):
    run_script('''
        def main(context):
            lock, killed = context.Lock(), 0
            for _ in range(20):
                lock.acquire()
                waiter = gevent.spawn(lock.acquire)
                gevent.sleep(0)
                lock.release()
                while lock._semlock._queue:         # the thread hands it over, the hub does not run
                    pass
                waiter.kill()
                killed += isinstance(waiter.value, gevent.GreenletExit)
                if waiter.value is True:    # its result was quicker
                    lock.release()
                assert lock.acquire(True, 20)
                lock.release()
            assert killed and lock._semlock._get_value() == 1
    ''')


def test_timeout_leaves_no_thread(run_script):
    run_script('''
        def main(context):
            lock = context.Lock()
            lock.acquire()
            before = time.monotonic()
            assert all_of(gevent.spawn(lock.acquire, True, 0.05),
                          gevent.spawn(lock.acquire, timeout=0.1)) == [False, False]
            assert time.monotonic() - before >= 0.09
            assert not lock.acquire(True, 0) and not lock.acquire(True, -1) and not lock.acquire(False, 5)
            wait_until(lambda: not _semaphore._servers)
            assert lock._semlock._get_value() == 0
    ''')


def test_greenlets_of_a_process_get_it_in_order(run_script):
    run_script('''
        def main(context):
            lock, order = context.Lock(), []
            def work(k):
                for _ in range(3):
                    with lock:
                        order.append(k)
                        gevent.sleep(0.001)
            all_of(*[gevent.spawn(work, k) for k in range(3)])
            assert order == [0, 1, 2] * 3, order
    ''')


@with_children('fork', 'spawn')
def test_recursive_lock_belongs_to_a_greenlet(run_script, method):
    run_script('''
        def refused(lock):
            try:
                lock.release()
            except AssertionError:
                return True
        def child(lock):
            assert not lock.acquire(False) and refused(lock)
        def main(context):
            lock = context.RLock()
            assert lock.acquire() and lock.acquire()
            other = context.Process(target=child, args=(lock,))
            other.start()
            other.join(20)
            assert other.exitcode == 0
            assert all_of(gevent.spawn(lock.acquire, False), gevent.spawn(refused, lock)) == [False, True]
            waiter = gevent.spawn(lock.acquire)
            gevent.sleep(0.01)
            lock.release()
            assert lock._semlock._is_mine() and lock._semlock._count() == 1 and not waiter.ready()
            lock.release()
            assert all_of(waiter) == [True]
            assert not lock.acquire(False) and refused(lock)
    ''', method)


@with_children('fork Queue', 'fork SimpleQueue', 'spawn Queue', 'spawn JoinableQueue')
def test_greenlets_take_from_a_queue(run_script, method, kind):
    run_script(f'''
        def feed(queue, back):
            for i in range(20):
                queue.put(i)
                if i % 5 == 0:
                    time.sleep(0.01)
            assert back.get() == 'enough'
        def main(context):
            queue, back = context.{kind}(), context.{kind}()
            other = context.Process(target=feed, args=(queue, back))
            other.start()
            got = []
            def take():
                for _ in range(10):
                    got.append(queue.get())
                    {"queue.task_done()" if kind == 'JoinableQueue' else ""}
            ticks = []
            def tick():
                while True:
                    ticks.append(1)
                    gevent.sleep(0.001)
            ticker = gevent.spawn(tick)
            all_of(gevent.spawn(take), gevent.spawn(take))
            ticker.kill()
            assert sorted(got) == list(range(20)), got
            assert len(ticks) > 5
            {"queue.join()" if kind == 'JoinableQueue' else ""}
            back.put('enough')
            other.join(20)
            assert other.exitcode == 0
            if hasattr(queue, 'get_nowait'):
                try:
                    queue.get(timeout=0.01)
                except __import__('queue').Empty:
                    pass
                else:
                    raise AssertionError
    ''', method)


@with_children('fork', 'spawn')
def test_condition_event_and_barrier(run_script, method):
    run_script('''
        def child(condition, event, barrier, ready):
            with condition:
                ready.release()
                assert condition.wait(20)
            barrier.wait(20)
            event.set()
        def main(context):
            condition, event, barrier = context.Condition(), context.Event(), context.Barrier(3)
            ready = context.Semaphore(0)
            other = context.Process(target=child, args=(condition, event, barrier, ready))
            other.start()
            def work():
                with condition:
                    ready.release()
                    assert condition.wait(20)
                barrier.wait(20)
                return event.wait(20)
            with condition:
                assert not condition.wait(0.01)
            job = gevent.spawn(work)
            ready.acquire(), ready.acquire()
            def notify():
                while not (job.ready() and not other.is_alive()):
                    with condition:
                        condition.notify_all()
                    gevent.sleep(0.01)
            all_of(gevent.spawn(notify), gevent.spawn(barrier.wait, 20), job)
            assert job.value and event.is_set()
            other.join(20)
            assert other.exitcode == 0
    ''', method)


@with_children('fork', 'spawn')
def test_pool(run_script, method):
    run_script('''
        from concurrent.futures import ProcessPoolExecutor
        def square(n):
            return n * n
        def main(context):
            with context.Pool(2) as pool:
                assert pool.map(square, range(20)) == [n * n for n in range(20)]
                jobs = [gevent.spawn(pool.apply, square, (n,)) for n in range(5)]
                assert all_of(*jobs) == [0, 1, 4, 9, 16]
                pool.close()
                pool.join()
            with ProcessPoolExecutor(2, mp_context=context) as executor:
                assert list(executor.map(square, range(10))) == [n * n for n in range(10)]
    ''', method)


@with_children('fork')
def test_forked_child_does_not_wait_for_its_parent(run_script, method):
    """An inherited waiter is told; the lock can be used; a unit that the parent got is the parent's."""
    run_script('''
        told = []
        def wait(lock):
            try:
                told.append(lock.acquire())
            except OSError as error:
                told.append(error.errno)
        def main(context):
            lock = context.Lock()
            lock.acquire()
            waiter = gevent.spawn(wait, lock)
            gevent.sleep(0.02)
            child = gevent.os.fork()
            if child == 0:
                waiter.join(20)
                mine = gevent.spawn(lock.acquire, True, 20)
                gevent.sleep(0.02)
                lock.release()                  # for this process or for the other
                os._exit(0 if told == [errno.ECANCELED] else 1)
            waiter.join(20)
            assert told == [True], told
            lock.release()
            assert os.waitpid(child, 0)[1] == 0
            assert told == [True]
    ''', method)


@with_children('fork')
def test_lock_in_a_child_forked_while_the_unit_was_handed_over(run_script, method):
    run_script('''
        def main(context):
            lock, told = context.Lock(), []
            lock.acquire()
            def wait():
                try:
                    told.append(lock.acquire())
                except OSError as error:
                    told.append(error.errno)
            waiter = gevent.spawn(wait)
            gevent.sleep(0)
            lock.release()
            while lock._semlock._queue:         # the thread has given it away, the hub does not know yet
                pass
            child = gevent.os.fork()
            waiter.join(20)
            if child == 0:
                os._exit(0 if told == [errno.ECANCELED] else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert told == [True] and not lock.acquire(False)
            lock.release()
            assert lock._semlock._get_value() == 1
    ''', method)


def test_process_ends_though_a_thread_waits(run_script):
    done = run_script('''
        import atexit
        def main(context):
            lock = context.Lock()
            lock.acquire()
            gevent.spawn(lock.acquire)
            gevent.sleep(0.02)
            assert len(_semaphore._servers) == 1
            print('ends')
    ''')
    assert done.stdout == 'ends\n'


def test_where_no_greenlet_can_wait_the_plain_call_is_made_or_refused(run_script):
    run_script('''
        import greenaio
        def main(context):
            for lock in (context.Lock(), context.RLock()):
                told = []
                def use(timeout=None):
                    try:
                        told.append(lock.acquire(True, timeout))
                        if told[-1]:
                            lock.release()
                    except BlockingSwitchOutError:
                        told.append('refused')
                def inside():
                    with greenaio.uninterrupted():
                        use()
                        use(0.01)
                use_in_hub = lambda: gevent.get_hub().loop.run_callback(use)
                lock.acquire()
                all_of(gevent.spawn(inside))
                use_in_hub()
                gevent.sleep(0.01)
                lock.release()
                all_of(gevent.spawn(inside))
                use_in_hub()
                gevent.sleep(0.01)
                native = gevent.get_hub().threadpool.spawn(use)     # a thread that has no hub
                native.get()
                assert told == ['refused', False, 'refused', True, True, True, True], told
    ''')


@without_libuv('there gevent itself hangs when a hub of a thread is destroyed')
def test_unit_of_a_hub_that_is_destroyed_is_given_back(run_script):
    run_script('''
        def main(context):
            lock = context.Lock()
            lock.acquire()
            def thread():
                gevent.spawn(lock.acquire)
                gevent.sleep(0.02)
                gevent.get_hub().destroy(destroy_loop=True)
            gevent.get_hub().threadpool.spawn(thread).get()
            lock.release()
            wait_until(lambda: not _semaphore._servers)
            assert lock.acquire(False)
    ''')


@pytest.mark.parametrize('is_in_hand', [False, True])
def test_unit_of_a_greenlet_whose_thread_ends_is_given_back(run_script, is_in_hand):
    run_script(f'''
        start = gevent.monkey.get_original('_thread', 'start_new_thread')
        keep = []
        def main(context):
            lock = context.Lock()
            lock.acquire()
            def thread():
                keep.append(gevent.spawn(lock.acquire))
                gevent.sleep(0.02)
                if {is_in_hand}:
                    lock.release()
                    while lock._semlock._queue:     # the hub of this thread does not run any more
                        pass
            start(thread, ())
            wait_until(lambda: keep and keep[0].dead)
            if not {is_in_hand}:
                lock.release()
            with gevent.Timeout(10):
                assert lock.acquire()
            assert not _semaphore._waiters
    ''')


def test_unpatching_puts_the_native_one_back(run_script):
    run_script('''
        import _multiprocessing, multiprocessing.connection, posix
        def main(context):
            connection = multiprocessing.connection.Connection
            send, receive = connection._send, connection._recv
            assert send.__defaults__ == (os.write,) and receive.__defaults__ == (os.read,)
            lock = context.Lock()
            assert type(lock._semlock) is _semaphore.SemLock
            for _ in range(2):
                greenaio.monkey.unpatch_all()
                assert _multiprocessing.SemLock is _semaphore.Native
                assert send.__defaults__ == (posix.write,) and receive.__defaults__ == (posix.read,)
                assert type(context.RLock()._semlock) is _semaphore.Native
                with lock:
                    pass
                greenaio.monkey.patch_all()
                greenaio.monkey.patch_all()
                assert type(context.RLock()._semlock) is _semaphore.SemLock
                assert send.__defaults__ == (os.write,) and receive.__defaults__ == (os.read,)
    ''')


def test_modules_that_were_imported_before_are_patched(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(textwrap.dedent('''
        import multiprocessing.connection, multiprocessing.queues, multiprocessing.synchronize, posix
        import gevent.monkey
        gevent.monkey.patch_all()
        import greenaio.monkey
        greenaio.monkey.patch_all()
        import gevent, os
        gevent.get_hub()
        lock = multiprocessing.Lock()
        r, w = multiprocessing.Pipe(duplex=False)
        lock.acquire()
        jobs = [gevent.spawn(lock.acquire), gevent.spawn(r.recv)]
        gevent.sleep(0.01)
        assert not any(job.ready() for job in jobs)
        lock.release()
        w.send(7)
        gevent.joinall(jobs, timeout=20)
        assert [job.value for job in jobs] == [True, 7]
        greenaio.monkey.unpatch_all()
        assert multiprocessing.connection.Connection._recv.__defaults__ == (posix.read,)
    '''))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60,
                          env={**os.environ})
    assert (done.returncode, done.stderr) == (0, '')
