"""The contract of a context: the kernel and its double, `ScriptedContext`, say the same to the same script.

A script talks to a `Kernel`. Its requests are *polls*, which end when the script says so. The real kernel
gets polls of a pipe (IOCB_CMD_POLL), which end when the pipe becomes readable. So even the real kernel
completes requests at a time, and in an order, that the script chooses.
"""

import contextlib
import ctypes
import errno
import os
import re
import resource
import select

import pytest

from greenaio import aligned_buffer
from greenaio._core.context import Context, Opcode
from tests.support.disks import pattern
from tests.support.kernel import ScriptedContext

POLL = 5                        # IOCB_CMD_POLL
READABLE = select.POLLIN | select.POLLRDNORM
DEPTH = 16
BATCH = 32                      # requests in one submit, at most
PEEK = 64                       # completions in one peek, at most
BAD_FD = 1 << 20                # beyond the limit of this process: see `no_such_fd`
SEVERAL = 150                   # more completions than a ring of DEPTH has slots


class Kernel:
    """The real one, with the ring read from user space."""

    reads_ring = True

    def __init__(self, depth=DEPTH):
        self.context = self.make(depth)
        self.ends = {}                  # by token: a byte written there ends the poll
        self.pipes = contextlib.ExitStack()

    def make(self, depth):
        context = Context()
        context.open(depth)
        return context

    def stage(self, *tokens):
        """Stage a poll for each token."""
        for token in tokens:
            read_end, self.ends[token] = os.pipe()
            self.pipes.callback(os.close, read_end)
            self.pipes.callback(os.close, self.ends[token])
            self.context.stage(token, POLL, read_end, READABLE, 0, 0, 0)

    def stage_bad(self, token, code):
        """Stage a request that the kernel refuses with *code*."""
        opcode, fd = (Opcode.PREAD, BAD_FD) if code == errno.EBADF else (99, 0)
        self.context.stage(token, opcode, fd, 0, 0, 0, 0)

    def submit(self, answer=None):
        """Submit the batch. The real kernel knows the *answer* by itself."""
        return self.context.submit()

    def finish(self, *tokens):
        """Let the polls end, one after the other: an event each, with result READABLE."""
        for token in tokens:
            before = self.signals()
            os.write(self.ends[token], b'x')
            while self.signals() == before:
                pass

    def signals(self):
        """The count of the eventfd, which stays as it is."""
        return eventfd_count(self.context.eventfd)

    def reap(self):
        """Take all events: a list of tokens and results."""
        events = []
        while n := self.context.peek():
            events += [(self.context.token(i), self.context.result(i)) for i in range(n)]
            self.context.commit(n)
        return events

    def close(self):
        self.context.close()
        self.pipes.close()


class KernelBySystemCall(Kernel):
    """The real one, asked by io_getevents, as if the layout of the ring were unknown."""

    reads_ring = False

    def make(self, depth):
        context = super().make(depth)
        context.read_by_syscall()
        return context


class Double(Kernel):
    """The scripted one. It knows what it is told: *answer* is what the real kernel says."""

    def make(self, depth):
        context = ScriptedContext()
        context.open(depth)
        context.slots = 100             # of the ring: so many may be taken and not reaped
        return context

    def submit(self, answer=None):
        if answer is not None:
            self.context.answers.append(answer)
        return self.context.submit()

    def finish(self, *tokens):
        for token in tokens:
            request, = (request for request in self.context.taken if request['token'] == token)
            self.context.finish(request, READABLE)


@pytest.fixture(params=[Kernel, KernelBySystemCall, Double], ids=['ring', 'io_getevents', 'double'])
def kernel(request):
    kernel = request.param()
    yield kernel
    kernel.close()


@pytest.fixture(params=[Kernel, Double], ids=['ring', 'double'])
def ring(request):
    """A kernel whose events stay where they are until they are committed."""
    kernel = request.param()
    yield kernel
    kernel.close()


def address_of(buffer):
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def eventfd_count(fd):
    with open(f'/proc/self/fdinfo/{fd}') as info:
        return int(re.search(r'eventfd-count:\s*(\w+)', info.read())[1], 16)


def test_an_open_context_has_its_depth_and_nothing_to_say(kernel):
    assert kernel.context.is_open
    assert kernel.context.depth == DEPTH
    assert kernel.context.staged == 0
    assert kernel.context.peek() == 0
    assert kernel.signals() == 0


@pytest.mark.parametrize('kind', [Context, ScriptedContext])
@pytest.mark.parametrize('depth', [0, -1])
def test_a_depth_is_positive(kind, depth):
    context = kind()
    with pytest.raises(ValueError, match='depth must be at least 1'):
        context.open(depth)
    context.close()


def test_a_submit_takes_the_batch_and_empties_it(kernel):
    kernel.stage(1, 2, 3)
    assert kernel.context.staged == 3
    assert kernel.submit() == 3
    assert kernel.context.staged == 0
    assert kernel.reap() == []


def test_a_submit_of_an_empty_batch_takes_nothing(kernel):
    assert kernel.submit() == 0


def test_a_batch_has_a_bound(kernel):
    kernel.stage(*range(1, BATCH + 1))
    with pytest.raises(ValueError, match=f'a batch holds {BATCH} requests'):
        kernel.stage(BATCH + 1)
    assert kernel.submit() == BATCH


@pytest.mark.parametrize('code', [errno.EBADF, errno.EINVAL], ids=errno.errorcode.get)
def test_the_requests_before_a_bad_one_are_taken_and_the_rest_is_gone(kernel, code):
    kernel.stage(1, 2)
    kernel.stage_bad(3, code)
    kernel.stage(4)
    assert kernel.submit(answer=2) == 2
    assert kernel.context.staged == 0
    assert kernel.submit() == 0
    kernel.finish(1, 2)
    assert kernel.reap() == [(1, READABLE), (2, READABLE)]


@pytest.mark.parametrize('code', [errno.EBADF, errno.EINVAL], ids=errno.errorcode.get)
def test_a_bad_head_gets_its_errno_and_no_event(kernel, code):
    kernel.stage_bad(1, code)
    kernel.stage(2)
    assert kernel.submit(answer=-code) == -code
    assert kernel.context.staged == 0
    assert (kernel.reap(), kernel.signals()) == ([], 0)
    kernel.stage(3)                     # and the next batch is taken
    assert kernel.submit() == 1
    kernel.finish(3)
    assert kernel.reap() == [(3, READABLE)]


def test_a_full_context_takes_a_prefix_then_says_eagain_until_events_are_reaped(kernel):
    taken = 0
    while True:
        kernel.stage(*range(taken + 1, taken + BATCH + 1))
        answer = kernel.submit()
        if answer <= 0:
            break
        assert answer <= BATCH
        taken += answer
    assert answer == -errno.EAGAIN
    assert taken >= DEPTH
    kernel.finish(1, 2)                 # the requests are done, and keep their slots
    kernel.stage(1001)
    assert kernel.submit() == -errno.EAGAIN
    assert kernel.reap() == [(1, READABLE), (2, READABLE)]
    kernel.stage(1001, 1002)
    assert kernel.submit() == 2


def test_events_come_in_the_order_in_which_requests_end(kernel):
    kernel.stage(1, 2, 3, 4)
    kernel.submit()
    kernel.finish(3)
    kernel.finish(1, 4)
    assert kernel.reap() == [(3, READABLE), (1, READABLE), (4, READABLE)]
    kernel.finish(2)
    assert kernel.reap() == [(2, READABLE)]
    assert kernel.reap() == []


def test_a_token_has_64_bits(kernel):
    token = (1 << 64) - 2
    kernel.stage(token)
    kernel.submit()
    kernel.finish(token)
    assert kernel.reap() == [(token, READABLE)]


def test_the_eventfd_counts_events_and_signals(kernel):
    kernel.stage(1, 2, 3)
    kernel.submit()
    assert kernel.signals() == 0
    kernel.finish(1)
    assert kernel.signals() == 1
    kernel.finish(2, 3)
    kernel.context.signal()
    assert kernel.signals() == 4
    kernel.context.clear()
    assert kernel.signals() == 0
    kernel.context.clear()              # does not wait for a signal
    assert len(kernel.reap()) == 3      # reaping has nothing to do with the eventfd
    kernel.context.signal()
    assert kernel.reap() == []


def test_a_peek_has_a_bound(kernel):
    for first in range(1, PEEK + 7, BATCH):
        tokens = range(first, min(first + BATCH, PEEK + 7))
        kernel.stage(*tokens)
        assert kernel.submit() == len(tokens)
    kernel.finish(*range(1, PEEK + 7))
    assert kernel.context.peek() == PEEK
    kernel.context.commit(PEEK)
    assert kernel.context.peek() == 6
    assert kernel.context.token(0) == PEEK + 1


def test_an_event_stays_until_it_is_committed(ring):
    ring.stage(1, 2, 3)
    ring.submit()
    ring.finish(1, 2, 3)
    assert ring.context.peek() == 3
    ring.context.commit(0)
    assert ring.context.peek() == 3
    ring.context.commit(1)
    assert ring.context.peek() == 2
    assert ring.context.token(0) == 2
    ring.context.commit(2)
    assert ring.context.peek() == 0


def test_events_go_on_where_the_ring_begins_again(kernel):
    for token in range(1, SEVERAL, 3):
        kernel.stage(token, token + 1, token + 2)
        assert kernel.submit() == 3
        kernel.finish(token + 1, token, token + 2)
        assert [token for token, _ in kernel.reap()] == [token + 1, token, token + 2]


def test_a_spin_ends_with_an_event_or_after_its_time(ring):
    ring.stage(1)
    ring.submit()
    assert ring.context.spin(1000) == 0         # nanoseconds
    ring.finish(1)
    assert ring.context.spin(10_000_000_000) == 1
    assert ring.reap() == [(1, READABLE)]
    assert ring.context.spin(0) == 0


def test_a_destroyed_context_has_no_events_and_takes_no_requests(kernel):
    kernel.stage(1, 2, 3)
    kernel.submit()
    kernel.finish(1)
    kernel.context.destroy()
    assert not kernel.context.is_open
    assert kernel.context.peek() == 0
    kernel.stage(4)
    assert kernel.submit() == -errno.EINVAL
    assert kernel.context.staged == 0
    kernel.context.destroy()            # may be called twice
    kernel.context.close()


@pytest.mark.parametrize('kind', [Context, ScriptedContext])
def test_a_destroy_waits_for_requests_in_flight(data_file, kind):
    context, memory = kind(), [aligned_buffer(4096) for _ in range(8)]
    context.open(DEPTH)
    fd = os.open(data_file, os.O_RDONLY | os.O_DIRECT)
    for i, buffer in enumerate(memory):
        context.stage(i + 1, Opcode.PREAD, fd, address_of(buffer), 4096, i * 4096, 0)
    if kind is ScriptedContext:
        context.disk = pattern(len(memory) * 4096)
    assert context.submit() == len(memory)
    context.destroy()
    assert b''.join(bytes(buffer) for buffer in memory) == pattern(len(memory) * 4096)
    os.close(fd)
    context.close()


def test_a_forked_child_finds_no_events_and_an_eventfd_of_its_own(kernel):
    kernel.stage(1, 2)
    kernel.submit()
    kernel.finish(1)
    kernel.stage(3)
    pid = os.fork()
    if pid == 0:
        found = 1
        with contextlib.suppress(BaseException):
            kernel.context.after_fork_in_child()
            found = [kernel.context.staged, kernel.signals(), kernel.context.peek()] != [0, 0, 0]
            kernel.context.signal()
        os._exit(found)
    assert os.waitpid(pid, 0)[1] == 0
    assert kernel.signals() == 1
    assert kernel.submit() == 1
    kernel.finish(2, 3)
    assert kernel.reap() == [(1, READABLE), (2, READABLE), (3, READABLE)]


def test_closing_leaves_no_eventfd(kernel):
    fd = kernel.context.eventfd
    kernel.context.close()
    assert kernel.context.eventfd == -1
    with pytest.raises(OSError):
        os.fstat(fd)


@pytest.fixture(autouse=True, scope='module')
def no_such_fd():
    """No fd has the number BAD_FD."""
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= BAD_FD
