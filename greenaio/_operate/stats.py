"""Tell an operator how much greenaio has done, and which requests wait: `stats` and `dump`."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from time import monotonic_ns
from types import MappingProxyType
from typing import Any

from greenaio._core.counters import COUNTERS
from greenaio._core.describe import describe, path_of
from greenaio._files import pool as _pool
from greenaio._files.extension import native

if native:
    from greenaio._core import hub as _hub
    from greenaio._core import job as _job
    from greenaio._core.tally import bounds_of
    from greenaio._files import route as _route

__all__ = ['Latency', 'Stats', 'dump', 'stats']

WAYS = ('aio', 'thread')                        # in the order of the engine's numbers
DIRECTIONS = ('read', 'write', 'sync', 'other')
BOUNDS = tuple(1 << octave for octave in range(10, 37))     # ns, of `Latency.buckets`


@dataclass(frozen=True, slots=True)
class Latency:
    """How long requests of one way and direction took, in seconds, from when they were first offered to the
    kernel or to a thread (or held back, where the device had its share already) until their result was taken.
    What the kernel declined with EAGAIN is not among them. Percentiles are right to a sixteenth; they are nan
    where there is nothing to tell."""

    count: int          #: requests
    sum: float          #: of all their times
    #: (upper bound, how many took less), from 1.024 µs by twos to 69 s
    buckets: tuple[tuple[float, int], ...]
    p50: float          #: the median
    p90: float          #: what nine in ten had at most
    p99: float          #: 99 in 100
    p999: float         #: 999 in 1000
    max: float          #: the longest


@dataclass(frozen=True, slots=True)
class Stats:
    """The result of `stats`. Gauges are as they are at this moment, over all hubs; counters count from the
    start of the process, or of its parent before the fork."""

    hubs: int
    in_flight: int
    with_threads: int
    pending: int
    blocked: int
    waiting: int
    submitted: int
    completed: int
    batches: int
    in_line: int
    by_thread: int
    abandoned: int
    slow_submits: int
    demoted: int
    #: by (way, direction): ``'aio'`` or ``'thread'``; ``'read'``, ``'write'``, ``'sync'`` or ``'other'``
    latency: Mapping[tuple[str, str], Latency]


def stats() -> Stats:
    """Return what all hubs of this process do and have done, as a frozen `Stats`. Takes well under a
    millisecond; from any thread."""
    numbers = dict.fromkeys((counter.name for counter in COUNTERS), 0)
    if native:
        tally = _hub.tally()
        numbers |= {name: getattr(tally, name) for name in numbers if hasattr(tally, name)} | _gauges()
        numbers['demoted'] = _route.demotions()
    else:
        calls = len(_pool.jobs())
        numbers |= {'with_threads': calls, 'waiting': calls, 'by_thread': _pool.jobs_made()}
    return Stats(**numbers, latency=MappingProxyType({
        (way, direction): _latency(*(tally.latency(i, j) if native else ([], 0, 0)))
        for i, way in enumerate(WAYS) for j, direction in enumerate(DIRECTIONS)}))


def _gauges() -> dict[str, int]:
    drivers = _hub.all_drivers()
    engines = [driver.engine for driver in drivers]
    return {
        'hubs': len(drivers),
        'in_flight': sum(len(engine.in_flight) for engine in engines),
        'with_threads': sum(len(engine.lent) for engine in engines),
        'pending': sum(len(engine.pending) + sum(len(share.held) for share in list(engine.shares.values()))
                       for engine in engines),
        'blocked': sum(engine.blocked for engine in engines),
        'waiting': sum(driver.waiting for driver in drivers),
    }


def _latency(counts: list[int], total: int, longest: int) -> Latency:
    number = sum(counts)
    sums = list(accumulate(counts))

    def percentile(p: float) -> float:
        rank = math.ceil(number * p)
        for bucket, below in enumerate(sums):
            if below >= rank > 0:
                return min(sum(bounds_of(bucket)) / 2, longest) / 1e9
        return math.nan

    coarse, at = [], 0
    for bound in BOUNDS:
        while at < len(counts) and bounds_of(at)[1] <= bound:
            at += 1
        coarse.append((bound / 1e9, sums[at - 1] if counts else 0))
    return Latency(number, total / 1e9, tuple(coarse), percentile(0.5), percentile(0.9), percentile(0.99),
                   percentile(0.999), longest / 1e9 if number else math.nan)


def dump(stacks: bool = True) -> str:
    """Return a text of the greenlets that wait for a disk: for each request, oldest first, its
    operation, file, offset and length in bytes, where it is, and for how many seconds; then its
    greenlet, and where that waits in the program unless *stacks* is false. A request whose greenlet is
    gone is 'abandoned'. Nothing waiting is an empty text. From any thread."""
    now = monotonic_ns()
    told: list[tuple[str, traceback.StackSummary | None]] = []
    for began, waiter, is_abandoned, what in sorted(_waiting(now), key=itemgetter(0)):
        operation, file, offset, nbytes, where = what
        text = f'{operation} of {file or "?"}' + (f', {nbytes} bytes at {offset}' if nbytes else '') \
            + f', {where} for {max(0, now - began) / 1e9:.3f} s' + ', abandoned' * is_abandoned
        if waiter is None:
            told.append((text, None))
            continue
        frame = waiter.gr_frame if stacks else None
        told.append((f'{text}\n  {waiter!r}', frame and traceback.StackSummary.extract(
            traceback.walk_stack(frame), lookup_lines=False)))
    return ''.join(f'{text}\n' + _indented(stack) for text, stack in told)


def _indented(stack: traceback.StackSummary | None) -> str:
    """*stack* as a text. Its source is read only here: in a patched program that waits for a disk, and
    the greenlets that `dump` describes go on during that time."""
    if stack is None:
        return ''
    stack.reverse()                     # it was walked from the inside
    return ''.join(f'  {line}\n' for line in ''.join(stack.format()).splitlines())


def _waiting(now: int) -> list[tuple[int, Any, bool, tuple[str, str, int, int, str]]]:
    """(when it began, its greenlet, whether that is gone, what it is) of each request."""
    if not native:
        return [(job.began, job.waiter, False,
                 (job.function.__name__.strip('_'), path_of(job.fd), 0, 0, 'with a thread'))
                for job in _pool.jobs()]
    return [(request.began or now, request.waiter, request.abandoned,
             describe(_job.operation(request), request, where))
            for driver in _hub.all_drivers() for request, where in driver.engine.requests()]
