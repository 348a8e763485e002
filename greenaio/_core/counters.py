"""The table of counters: `greenaio.stats`, Prometheus and the documentation read their names and texts here.

To count something new, add a row, a field of `Tally` that the engine counts in, and a field of `Stats`.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple


class Counter(NamedTuple):
    #: A field of `Stats`.
    name: str
    #: A gauge is the value at this moment. A counter counts since the process began.
    kind: Literal['gauge', 'counter']
    #: The name in Prometheus, without ``greenaio_``.
    metric: str
    #: The text in Prometheus and in the documentation.
    help: str


GAUGE: Final = 'gauge'
COUNTER: Final = 'counter'

# Prometheus shows them in this order.
COUNTERS = (
    Counter('hubs', GAUGE, 'hubs', 'Hubs that have done I/O and are not destroyed.'),
    Counter('in_flight', GAUGE, 'requests_in_flight', 'Requests that the kernel has.'),
    Counter('with_threads', GAUGE, 'requests_with_threads',
            'System calls that native threads have or will have.'),
    Counter('pending', GAUGE, 'requests_pending',
            'Requests that wait for a batch, for room in the kernel, or for the share of their device.'),
    Counter('blocked', GAUGE, 'hubs_blocked', 'Hubs whose context in the kernel is full.'),
    Counter('waiting', GAUGE, 'greenlets_waiting', 'Greenlets that are parked.'),
    Counter('submitted', COUNTER, 'requests_submitted', 'Requests that the kernel took.'),
    Counter('completed', COUNTER, 'requests_completed', 'Requests that the kernel has answered.'),
    Counter('batches', COUNTER, 'batches_submitted', 'Calls of `io_submit` that took any request.'),
    Counter('in_line', COUNTER, 'operations_in_line',
            'Operations done at once in the hub: hits in the page cache, files in memory.'),
    Counter('by_thread', COUNTER, 'requests_by_thread', 'System calls that native threads made.'),
    Counter('abandoned', COUNTER, 'requests_abandoned',
            'Requests whose greenlet was killed or timed out while the kernel or a thread had them.'),
    Counter('slow_submits', COUNTER, 'slow_submits',
            'Calls of `io_submit` that blocked their hub for more than 20 ms.'),
    Counter('demoted', COUNTER, 'files_demoted', 'Files that took threads for a minute because of that.'),
)
