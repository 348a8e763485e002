"""The driver over a simulated kernel, clock and loop: ``python -m tests.sim --seeds 1000000 [--first N]``.

The kernel takes what it likes of a batch, says EAGAIN in bursts, refuses, stalls, completes in line or much
later, out of order, short, with any errno; its wake-ups come late and merged. It declines requests that it is
asked to do without waiting, and these go on to the kernel again, or to a thread of a scripted pool. The loop
serves callbacks, timers and the eventfd in any order. Greenlets read and write, yield, are killed, and at
every switch others are started, struck, or the process forks, or the hub is destroyed. Nothing here looks at
a real clock: one seed is one history. A seed that fails is printed, and fails again.
"""

import argparse
import concurrent.futures
import ctypes
import errno
import faulthandler
import os
import random
import signal
import sys
import traceback
import weakref
from _thread import allocate_lock, get_ident

from gevent.exceptions import InvalidSwitchError
from greenlet import GreenletExit, getcurrent, greenlet

from greenaio import config
from greenaio._core import dispatch as _dispatch
from greenaio._core import handle as _handle
from greenaio._core import loop as _loop
from greenaio._core import shutdown as _shutdown
from greenaio._core.context import Opcode
from greenaio._core.mailbox import Inbox
from greenaio._core.request import Request, State
from greenaio._core.threads import Pool
from tests.support.kernel import ScriptedContext

NBYTES = 64
NUMBERS = [os.open('/', os.O_PATH) for _ in range(3)]      # a call on one of them is EBADF
CHUNK = 500                     # seeds between two signs of progress
SWITCHES = 100_000              # of one history: beyond, it spins
ERRNOS = sorted(set(errno.errorcode) - {errno.EAGAIN, errno.EINTR, errno.EINPROGRESS})
STALL = 30_000_000              # ns
RWF_NOWAIT = 8
DECLINING = (-errno.EAGAIN, -errno.EOPNOTSUPP)
ASK, PLAIN, THREAD, NONE = range(4)     # `Way` in _core/driver.pxd


class Struck(BaseException):
    """What is thrown into greenlets, as a kill or a Timeout is."""


class Memory(bytearray):
    """A buffer that tells whether it is still there."""

    __slots__ = ('__weakref__',)


def mark(number):
    """What is at offset *number* of the disk, or is to be written there."""
    return 1 + number % 250


class Kernel(ScriptedContext):
    """Looks at a buffer when it completes the request, not before: it has to be there still."""

    def __init__(self, history):
        super().__init__()
        self.rng, self.history = history.rng, history
        self.time = 1
        self.busy = 0               # so many submits get EAGAIN
        self.signalled = False
        self.pending_wake = False   # the kernel is done, and has not said so yet
        self.results = {}           # by number
        self.calm = False           # the end: it only completes
        self.clumsy = history.rng.random() < 0.3    # says EAGAIN when it has nothing in flight, too

    def now(self):
        self.time += self.rng.choice([50, 500, 20_000])
        return self.time

    def submit(self):
        rng, batch = self.rng, self._batch
        if self.calm:
            return super().submit()
        if rng.random() < 0.01:
            self.time += STALL
        if not self.busy and rng.random() < 0.1 and (self.taken or self.clumsy):
            self.busy = rng.choice([1, 2, 3, 3, 30])
        if self.busy:
            self.busy -= 1
            self._batch = []
            return rng.choice([-errno.EAGAIN, -errno.EINTR, -errno.EAGAIN])
        if rng.random() < 0.05:
            self._batch = []
            number, answer = batch[0]['offset'] // NBYTES, -rng.choice(ERRNOS)
            self.history.answered(number, answer)
            self.history.note('refused', number, answer)
            return answer
        if rng.random() < 0.3:
            self.answers.append(rng.randrange(0, len(batch) + 1))
        taken = super().submit()
        self.history.note('taken', *(request['offset'] // NBYTES for request in batch[:taken]))
        eager = rng.choice([0, 0.2, 1])
        for request in batch[:taken]:
            if rng.random() < eager:
                self.complete(request)
        return taken

    def complete(self, request):
        rng, number = self.rng, request['offset'] // NBYTES
        if request['flags'] & RWF_NOWAIT and rng.random() < 0.4:
            result = rng.choice(DECLINING)
        else:
            result = self.history.move(number, request['nbytes'])
            memory = self.history.memories[number]()
            done = NBYTES - request['nbytes']
            assert ctypes.addressof(ctypes.c_char.from_buffer(memory, done)) == request['address']
        self.history.answered(number, result)
        self.history.note('done', number, result)
        self.taken.remove(request)
        self.events.append((request['token'], result))
        self.pending_wake = True
        if self.calm or rng.random() < 0.7:
            self.tell()

    def tell(self):
        """The kernel signals the eventfd, once for all that it has done meanwhile."""
        self.signalled, self.pending_wake = self.signalled or self.pending_wake, False

    def signal(self):
        self.signalled = True
        return 0

    def clear(self):
        self.signalled = False
        return 0

    def peek(self):
        return self.rng.randrange(1, min(len(self.events), 64) + 1) if self.events else 0

    def spin(self, limit_ns):
        self.time += limit_ns
        if self.taken and self.rng.random() < 0.5:
            self.complete(self.taken[0])
        return 1 if self.events else 0

    def after_fork_in_child(self):
        self.taken.clear()
        self.events.clear()
        self.signalled = self.pending_wake = False

    def destroy(self):
        """io_destroy waits for the disk."""
        while self.taken:
            self.complete(self.rng.choice(self.taken))
        self.history.threads.end_all()


class Threads(Pool):
    """A pool without threads: the history says when a call is over."""

    def begin(self, history):
        self.history = history
        self.calls = []                 # requests, each with the inbox that waits for it
        return self

    def submit(self, request, inbox):
        history, number = self.history, request.offset // NBYTES
        assert not request.abandoned and not request.flags, f'{number} was abandoned, or still has our flag'
        if history.rng.random() < 0.1 and not history.kernel.calm:
            history.note('no thread', number)
            history.answered(number, -errno.EBADF)      # the call is made there and then
            return 0
        history.note('lent', number)
        self.calls.append((request, inbox))
        return 1

    def end(self, request, inbox: Inbox):
        self.calls.remove((request, inbox))
        number = request.offset // NBYTES
        result = self.history.move(number, request.nbytes)
        self.history.answered(number, result)
        self.history.note('done by a thread', number, result)
        inbox.put(request, result)
        self.history.kernel.pending_wake = True
        self.history.kernel.tell()

    def end_all(self):
        while self.calls:
            self.end(*self.history.rng.choice(self.calls))


THREADS = Threads('the disk')           # one for all histories: the memory of a pool is never freed


class Ways(_dispatch.Ways):
    """Any way may come next, as long as a part of the request is left."""

    def __init__(self, history):
        self.history = history

    def next_way(self, driver, request, result, asked):
        history, rng, number = self.history, self.history.rng, request.offset // NBYTES
        assert request.state == State.DECLINED and request.result is None, f'{number} was done'
        assert not request.abandoned, f'{number} was abandoned, and goes on'
        if rng.random() < 0.1:
            history.do_anything()       # the next way is chosen by code that may run any other
            if request.state != State.DECLINED:
                return THREAD           # it was killed, forked or closed
        if result > 0:
            assert asked
            if rng.random() < 0.2:
                return NONE             # the end of the file
            history.parts[number] = history.parts.get(number, 0) + result
            request.count_done(result)
        way = rng.choice([ASK, PLAIN, THREAD, THREAD])
        history.note('declined', number, result, way)
        history.kernel.results.pop(number, None)    # none if the driver gave up
        return way

    def pool(self):
        return self.history.threads

    def stalled(self, ns):
        return '8:0 any', 1, ns / 1e9, 0.0


class Loop:
    """What the driver asks of gevent's loop: callbacks, timers, one io watcher."""

    def __init__(self, history):
        self.history = history
        self.callbacks, self.timers = [], []
        self.watcher = None

    def run_callback(self, function, *args):
        callback = Callback(function, args)
        self.callbacks.append(callback)
        return callback

    def timer(self, seconds, ref=True):
        return Timer(self, seconds)

    class io:       # noqa: N801 - gevent's word
        def __init__(self, loop, fd, events, ref):
            self.loop, self.ref, self.callback = loop, ref, None

        def start(self, callback):
            self.callback, self.loop.watcher = callback, self

        def stop(self):
            self.callback = self.loop.watcher = None

        def close(self):
            assert self.callback is None

    def run_once(self):
        """What there is to do now, in an order of its own. Return whether there was anything."""
        kernel, now = self.history.kernel, self.history.kernel.time
        calls, self.callbacks = self.callbacks, []
        due = [timer for timer in self.timers if timer.at <= now]
        groups = [[call.fire for call in calls], [timer.fire for timer in due]]
        if kernel.signalled and self.watcher:
            groups.append([self.watcher.callback])
        self.history.rng.shuffle(groups)
        for group in groups:
            for fire in group:
                try:
                    fire()
                except Exception as error:      # the real one reports it, and goes on
                    self.history.errors.append(error)
        return any(groups)


class Callback:
    def __init__(self, function, args):
        self.function, self.args = function, args

    def stop(self):
        self.function = None

    close = stop

    def fire(self):
        if self.function is not None:
            self.function(*self.args)


class Timer:
    def __init__(self, loop, seconds):
        self.loop, self.at, self.callback = loop, loop.history.kernel.time + int(seconds * 1e9), None

    def start(self, callback):
        self.callback = callback
        self.loop.timers.append(self)

    def stop(self):
        if self in self.loop.timers:
            self.loop.timers.remove(self)

    close = stop

    def fire(self):
        if self in self.loop.timers:
            self.stop()
            self.callback()


class Hub(greenlet):
    """Every switch to it lets the loop go round once, and comes back to the history."""

    def __init__(self, history):
        super().__init__()
        self.loop = Loop(history)
        self.history, self.thread_ident = history, get_ident()

    def run(self):
        while True:
            self.parent.switch(self.loop.run_once())

    def destroy(self):
        pass

    def handle_error(self, context, kind, error, trace):
        self.history.errors.append(error)


class Worker(greenlet):
    """Does one operation after another; what each says must be what the kernel said of it."""

    def __init__(self, history, operations):
        super().__init__(parent=history.hub)
        self.history, self.operations = history, operations

    def run(self):
        for _ in range(self.operations):
            if self.history.closed:
                return
            try:
                if self.history.rng.random() < 0.2:
                    self.history.loop.run_callback(self.switch_if_there)
                    self.history.hub.switch()
                self.operate(self.history.next_number())
            except (Struck, GreenletExit):
                if self.history.closed or self.history.rng.random() < 0.7:
                    return
            except AssertionError as error:
                self.history.errors.append(error)

    def switch_if_there(self):
        if not self.dead and self not in self.history.parked:
            self.switch()

    def operate(self, number):
        history, rng = self.history, self.history.rng
        writes = rng.random() < 0.4
        memory = Memory([mark(number) if writes else 0]) * NBYTES
        memory = Memory(memory)
        history.memories[number] = weakref.ref(memory)
        if writes:
            history.writes.add(number)
        opcode = Opcode.PWRITE if writes else Opcode.PREAD
        request = Request(opcode, NUMBERS[number % 3], memory, number * NBYTES,
                          max_batch=rng.choice([1, 4, 32]))
        request.may_move = rng.random() < 0.7
        if request.may_move:
            request.file = Ways(history)
            if rng.random() < 0.7:
                request.ask()
        history.requests[number] = request
        self.parks = 0
        if rng.random() < 0.5:
            request.of(history.driver.engine.share(rng.randrange(3), rng.choice([1, 3, 100])))
        history.parked[self] = number
        try:
            result = history.driver.perform_request(request)
        except (Struck, GreenletExit) as error:
            history.end(number, type(error).__name__)
            history.requests.pop(number, None)
            del memory, request         # who asks for the same memory next must never see the kernel in it
            history.guards.append(bytearray(b'\xee' * NBYTES))
            raise
        except InvalidSwitchError:
            history.end(number, 'switched')
            history.requests.pop(number, None)
            assert history.strangers, f'{number} was woken by nobody'
            return
        finally:
            del history.parked[self]
        assert request.state == State.DONE
        del history.requests[number]
        history.end(number, result)
        wanted = history.wanted(number, writes)
        assert result == wanted or wanted is None and result in history.excuses, (number, result, wanted)
        memory.append(0)                # nothing pins it any more
        if result > 0 and not writes:
            assert memory == bytes([mark(number)]) * result + bytes(NBYTES - result) + b'\0', number
        if rng.random() < 0.3:
            history.do_anything()       # inside a pass: others are ready, and not woken yet

    def switch_out(self):
        """The driver calls this before it parks, as gevent's greenlets may have it."""
        self.parks += 1
        assert self.parks == 1, f'parked again for {self.history.parked[self]}'
        if self.history.rng.random() < 0.2:
            self.history.do_anything()


class History:
    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.trace = []
        self.errors = []
        self.hub = Hub(self)
        self.loop = self.hub.loop
        self.threads = THREADS.begin(self)
        self.kernel = Kernel(self)
        self.driver = _loop.HubDriver(self.hub, self.kernel, depth=self.rng.choice([1, 2, 8, 64]))
        self.workers = []
        self.parked = {}                # in a call of the driver's: the number
        self.memories = {}              # weak: who else has them is what this is about
        self.requests = {}              # by number, until their greenlets go
        self.finals = {}                # by number: results of requests that are DONE
        self.parts = {}                 # by number: bytes that a way has moved which is not the last
        self.guards = []                # memory that was given back too early would be theirs
        self.ended = {}
        self.numbers = 0
        self.excuses = {-errno.EAGAIN}  # results that come from no kernel
        self.strangers = False
        self.closed = False
        self.writes = set()
        self.native_threads = []

    def note(self, *what):
        self.trace.append(what)

    def next_number(self):
        self.numbers += 1
        return self.numbers

    def end(self, number, how):
        assert number not in self.ended, f'{number} ended twice'
        self.ended[number] = how
        self.note('ended', number, how)

    def answered(self, number, result):
        assert number not in self.kernel.results, f'{number} went two ways at once'
        self.kernel.results[number] = result

    def move(self, number, nbytes):
        """Do some of the last *nbytes* of a request; return what the system says of that."""
        rng, done = self.rng, NBYTES - nbytes
        chance = rng.random()
        result = nbytes if chance < 0.8 else rng.randrange(nbytes) if chance < 0.9 else -rng.choice(ERRNOS)
        memory = self.memories[number]()
        assert memory is not None, f'the memory of {number} is gone, and something still has it'
        try:
            memory.append(0)
            raise AssertionError(f'the memory of {number} is not pinned')
        except BufferError:
            pass
        if number in self.writes:
            assert memory == bytes([mark(number)]) * NBYTES, f'what {number} writes is something else by now'
        elif result > 0:
            memory[done:done + result] = bytes([mark(number)]) * result
        return result

    def wanted(self, number, writes):
        """What the request must say: the sum of its ways; None if the last of them was not asked."""
        result, part = self.kernel.results.get(number), self.parts.get(number, 0)
        if result is None:
            return None
        if result >= 0:
            return part + result
        return part if part and writes and result != -errno.ECANCELED else result

    def _check(self):
        """Assert what must hold of each request after each step."""
        for number, request in self.requests.items():
            if request.state == State.DONE:
                first = self.finals.setdefault(number, request.result)
                assert request.result == first, f'{number} was done, and has another result'

    def _check_engine(self, engine):
        """Assert that a pass will come for each request that is ready or was declined. The kernel signals its
        completion, or the driver signals, or a section ends."""
        kernel = self.kernel
        assert (kernel.signalled or kernel.pending_wake or self.loop.callbacks
                or not len(engine.ready) + len(engine.declined)), 'no pass will come'

    # What may happen at any time -----------------------------------------------------------

    def do_anything(self):
        self.rng.choices([self.start_some, self.complete_some, self.strike, self.kernel.tell,
                          self.pass_time, self.fork, self.close, self.switch_from_outside],
                         [6, 8, 4, 3, 2, 0.2, 0.1, 0.1])[0]()

    def pass_time(self):
        self.kernel.time += self.rng.choice([1_000_000, 60_000_000])

    def start_some(self):
        if self.kernel.calm:
            return
        for _ in range(self.rng.randrange(1, 5)):
            worker = Worker(self, self.rng.choice([1, 1, 3, 10]))
            self.workers.append(worker)
            self.loop.run_callback(worker.switch)

    def complete_some(self):
        for _ in range(self.rng.randrange(1, 6)):
            if self.kernel.taken and not self.closed:
                self.kernel.complete(self.rng.choice(self.kernel.taken))
            if self.threads.calls and not self.closed:
                self.threads.end(*self.rng.choice(self.threads.calls))

    def strike(self):
        if self.workers:
            self.loop.run_callback(self.throw, self.rng.choice(self.workers))

    def throw(self, victim):
        if victim and not self.closed:
            self.note('struck', self.parked.get(victim))
            victim.throw(Struck)

    def switch_from_outside(self):
        self.strangers = True
        self.loop.run_callback(lambda: [worker.switch() for worker in list(self.parked)[:1] if worker])

    def fork(self):
        """From here on this is the child: what the kernel had is the parent's."""
        self.note('fork')
        if self.closed:
            return
        for number in self.parked.values():
            if number not in self.ended:
                self.kernel.results[number] = -errno.ECANCELED
        self.excuses.add(-errno.ECANCELED)
        self.threads.calls.clear()
        self.finals.clear()
        self.driver.after_fork_in_child()

    def close(self):
        """The hub is destroyed: greenlets in it never return."""
        if not self.closed:
            self.note('close')
            self.closed = True
            self.excuses.add(-errno.ECANCELED)
            for number, request in self.requests.items():
                if request.state == State.DECLINED:
                    self.kernel.results[number] = -errno.ECANCELED
            self.hub.destroy()

    def start_thread(self, function, args):
        """Note a native thread. It tells at once that it has begun, and goes on in `leave_nothing`."""
        engine, inbox, begun = args
        begun.release()
        again = allocate_lock()
        again.acquire()
        self.native_threads.append((function, (engine, inbox, again)))

    # From the beginning to the end ---------------------------------------------------------

    def run(self):
        config.poll_max_us = self.rng.choice([0, 0, 0, 20])
        starter = _shutdown._start_new_thread
        _shutdown._start_new_thread = self.start_thread
        try:
            self.start_some()
            for _ in range(self.rng.choice([3, 10, 40])):
                self.do_anything()
                self.turn()
                if self.closed:
                    break
            self.kernel.calm = True
            if not self.closed:
                self.come_to_rest()
            self.close()
            self.leave_nothing()
        finally:
            _shutdown._start_new_thread = starter
            config.poll_max_us = 0
        if self.errors:
            raise self.errors[0]
        return self.trace

    def turn(self):
        busy = self.hub.switch()
        if not self.closed:
            self.driver._check()
            self._check_engine(self.driver.engine)
            self._check()
        return busy

    def come_to_rest(self):
        """The kernel completes everything: then everybody has ended, and nothing is left."""
        kernel = self.kernel
        for _ in range(SWITCHES):
            while kernel.taken:
                kernel.complete(kernel.taken[0])
            self.threads.end_all()
            kernel.tell()
            busy = self.turn()
            if self.closed:
                return
            if busy or kernel.taken or self.threads.calls:
                continue
            if not self.loop.timers:
                break
            kernel.time = max(kernel.time, min(timer.at for timer in self.loop.timers))
        else:
            raise AssertionError('it spins')
        hanging = [self.parked.get(worker) for worker in self.workers if worker]
        assert not hanging, f'for ever: {hanging}'
        _handle._check()
        assert not any(map(_handle.in_use, NUMBERS)), 'a number is kept for ever'
        assert self.driver.waiting == 0 and not self.loop.watcher.ref, 'the loop would never end'
        engine = self.driver.engine
        assert not any(map(len, (engine.in_flight, engine.ready, engine.pending, engine.lent, engine.declined,
                                 engine.moving)))

    def leave_nothing(self):
        for function, args in self.native_threads:
            function(*args)
        for worker in self.workers:     # for ever in a hub that is gone, and each has itself on its stack
            if worker:
                worker.parent = getcurrent()
                worker.throw(Struck)
        self.hub.throw()                # it has itself on its stack as well, and a million of them would stay
        self.workers.clear()
        self.parked.clear()
        self.requests.clear()
        self.loop.callbacks.clear()
        self.loop.timers.clear()
        assert all(guard == b'\xee' * NBYTES for guard in self.guards), 'memory given back before its time'
        assert not self.errors, self.errors
        left = [number for number, memory in self.memories.items() if memory() is not None]
        assert not left, f'memory of {left} is kept for ever'


def run(seed):
    """What happened, as a list; raises AssertionError."""
    return History(seed).run()


def run_many(first, count):
    """The seeds that failed, each with its traceback."""
    failed = []
    faulthandler.register(signal.SIGVTALRM, chain=True)     # a seed that hangs is busy: nothing here waits
    for seed in range(first, first + count):
        signal.setitimer(signal.ITIMER_VIRTUAL, 60)
        try:
            run(seed)
        except Exception:
            failed.append((seed, traceback.format_exc()))
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return failed


def main():
    from rich.progress import track

    parser = argparse.ArgumentParser(prog='python -m tests.sim', description=__doc__)
    parser.add_argument('--seeds', type=int, default=10_000)
    parser.add_argument('--first', type=int, default=0)
    parser.add_argument('--jobs', type=int, default=os.cpu_count())
    parser.add_argument('--trace', action='store_true', help='print what happens')
    arguments = parser.parse_args()
    if arguments.trace:
        history = History(arguments.first)
        history.note = lambda *what: print(*what)
        return history.run() and 0
    last = arguments.first + arguments.seeds
    chunks = range(arguments.first, last, CHUNK)
    done = failed = 0
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs) as pool:
        jobs = [pool.submit(run_many, first, min(CHUNK, last - first)) for first in chunks]
        try:
            for first, job in track(list(zip(chunks, jobs)), 'seeds'):
                for seed, trace in job.result():
                    print(trace, f'again: python -m tests.sim --first {seed} --trace', sep='\n', flush=True)
                    failed += 1
                done = min(first + CHUNK, last) - arguments.first
        except (KeyboardInterrupt, concurrent.futures.process.BrokenProcessPool) as error:
            pool.shutdown(cancel_futures=True)
            print(f'{type(error).__name__}; from here: python -m tests.sim --first {arguments.first + done}')
            failed += not isinstance(error, KeyboardInterrupt)
    print(f'{done} seeds, {failed} failed')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
