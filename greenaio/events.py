"""Tell an operator of slow requests and files, by events of gevent: append a function to its `subscribers`.

Those are in `gevent.events`. They are called by the loop, in the hub, and no greenlet runs during the call: a
subscriber must not wait. One that raises is logged, under ``greenaio.events``, and does no harm.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from greenaio._core.describe import describe
from greenaio._operate.blocked import explain_blocked, stop_explaining

__all__ = ['Fallback', 'FileDemoted', 'RequestStuck', 'SlowSubmit', 'explain_blocked', 'notify',
           'stop_explaining']

log = logging.getLogger('greenaio.events')


@dataclass(frozen=True, slots=True)
class SlowSubmit:
    """An ``io_submit`` held the hub: every greenlet of it stood still for *seconds*, while *requests* were
    handed over together. One request alone names the file, see `FileDemoted`."""

    seconds: float
    requests: int


@dataclass(frozen=True, slots=True)
class FileDemoted:
    """A file takes threads for a while, because the submission of a request on it held the hub.

    *device* is as ``'8:1 ext4'``, *inode* the file's number there. ``io_submit`` was held for *seconds*; the
    file takes native AIO again *until* seconds from now.
    """

    device: str
    inode: int
    seconds: float
    until: float


@dataclass(frozen=True, slots=True)
class Fallback:
    """The kernel gave a hub less of native AIO than was asked for, or none.

    *reason* is its answer. *depth* requests may be in flight; if *native* is False threads do it all. A hub
    that had none because it was used up, and gets it later, sends this again with *native* True.
    """

    reason: str
    depth: int
    native: bool


@dataclass(frozen=True, slots=True)
class RequestStuck:
    """A request has no answer after `config.stuck_after`; it is notified once.

    *operation* is as ``'pread'``, on *file*, a path or ``''`` where there is none, for *nbytes* bytes at
    *offset*. *way* says where it is: ``'queued'``, ``'in flight'`` or ``'with a thread'``. It was first
    offered to the kernel or a thread, or held back, *seconds* ago.
    """

    operation: str
    file: str
    offset: int
    nbytes: int
    way: str
    seconds: float


def notify(event: object) -> None:
    """Tell all subscribers of *event*. Raises nothing that a subscriber does: it is logged."""
    try:
        from gevent.events import notify as notify_all  # type: ignore[attr-defined]

        notify_all(event)
    except Exception:
        log.exception('a subscriber failed on %r', event)


def raise_event(hub: Any, name: str, *facts: Any) -> None:
    """Have the loop of *hub* notify the event *name* of *facts*. It calls no subscriber itself, because it is
    called in the middle of the driver's work.

    A `RequestStuck` is described here and now: later its file may be closed."""
    if name == 'RequestStuck':
        from greenaio._core.job import operation

        request, where, seconds = facts
        facts = *describe(operation(request), request, where), seconds
    hub.loop.run_callback(lambda: notify(globals()[name](*facts)))
