"""A kernel that does what a script says."""

from __future__ import annotations

import ctypes
import errno
from collections import deque
from typing import Any

from greenaio._core.context import Context

BATCH_MAX = 32                  # requests in one io_submit
PEEK_MAX = 64                   # events copied out at once


class ScriptedContext(Context):
    """A scripted kernel. It takes as many requests as `answers` says, and the test completes them.

    It keeps the contract of the real one, which test_contract checks.
    """

    is_open = True
    depth = 0

    def __init__(self):
        super().__init__()
        self.answers: deque[Any] = deque()      # of the next submits: requests taken, or minus an errno
        self.slots = None           # the requests that fit, until their events are committed
        self.disk = None            # bytes that reads find when they end
        self.inline = False         # complete each request inside its own submit
        self.frozen_at = None       # nanoseconds: this time, instead of the real one
        self.batches = []           # sizes, as taken
        self.submits = 0
        self.taken = []             # requests in the kernel's hands: dicts
        self.order = []             # offsets, in the order in which they were taken
        self.events = []
        self.committed = 0
        self._batch = []
        self.opened = []

    @property
    def staged(self):
        return len(self._batch)

    def open(self, depth):
        if depth < 1:
            raise ValueError(f'depth must be at least 1, not {depth}')
        self.opened.append(depth)
        self.depth = depth

    def now(self):
        return self.frozen_at or super().now()

    def stage(self, token, opcode, fd, address, nbytes, offset, flags):
        if len(self._batch) >= BATCH_MAX:
            raise ValueError(f'a batch holds {BATCH_MAX} requests')
        self._batch.append({'token': token, 'opcode': opcode, 'fd': fd, 'address': address,
                            'nbytes': nbytes, 'offset': offset, 'flags': flags})
        return 0

    def submit(self):
        batch, self._batch = self._batch, []
        self.submits += 1
        answer = self.answers.popleft() if self.answers else self._answer(len(batch))
        if callable(answer):
            answer = answer(batch)
        if answer > 0:
            assert answer <= len(batch)
            self.batches.append(answer)
            self.taken += batch[:answer]
            self.order += [request['offset'] for request in batch[:answer]]
            if self.inline:
                for request in batch[:answer]:
                    self.finish(request)
        return answer

    def _answer(self, n):
        if not self.is_open:
            return -errno.EINVAL
        if self.slots is None:
            return n
        return min(n, self.slots - len(self.taken) - len(self.events)) or (-errno.EAGAIN if n else 0)

    def finish(self, request=None, result=None, fill=None):
        """Complete *request*, by default the oldest one."""
        request = self.taken[0] if request is None else request
        self.taken.remove(request)
        if fill is not None:
            ctypes.memset(request['address'], fill, request['nbytes'])
        elif self.disk is not None:
            found = self.disk[request['offset']:][:request['nbytes']]
            ctypes.memmove(request['address'], found, len(found))
        self.events.append((request['token'], request['nbytes'] if result is None else result))
        self.signal()

    def finish_all(self, **kwargs):
        while self.taken:
            self.finish(**kwargs)

    def peek(self):
        return min(len(self.events), PEEK_MAX)

    def token(self, index):
        return self.events[index][0]

    def result(self, index):
        return self.events[index][1]

    def commit(self, count):
        del self.events[:count]
        self.committed += count
        return 0

    def spin(self, limit_ns):
        return 1 if self.events else 0

    def after_fork_in_child(self):
        super().after_fork_in_child()
        self.is_open = False
        self._batch, self.taken, self.events = [], [], []

    def destroy(self):
        """Wait for the disk, as io_destroy does. The events go with the ring."""
        self.finish_all()
        self.events.clear()
        self.is_open = False
