"""Settings, read from the environment once and changed in place: ``greenaio.config.poll_max_us = 50``."""

from __future__ import annotations

import os

_ALLOWED = {'depth': range(1, 65537), 'poll_max_us': range(1_000_001),
            'threads': range(1, 1025)}


class Config:
    """What may be set; everything has a default that suits a server.

    ``depth`` (GREENAIO_DEPTH, 256): requests in flight per hub, at least 1. It counts when a hub does its
    first I/O. The whole machine has ``/proc/sys/fs/aio-max-nr`` of them, 65536 unless changed.

    ``poll_max_us`` (GREENAIO_POLL_MAX_US, 0): before a hub waits for a disk it may watch for the completion
    for up to this many microseconds, which spares the wake-up and is worth a third more requests per second
    at depth 1, on a fast disk. It burns a processor meanwhile, and *may delay every other greenlet by that
    time*. The time really spent adapts: it doubles from 4 µs while waiting a little longer would have
    paid, and halves when the disk proves slower.

    ``threads`` (GREENAIO_THREADS, 16): native threads per device, at most, for what native AIO can't do. They
    are started when needed, shared by all hubs, and kept.

    Raises TypeError for what is not an int, ValueError for one that is out of range.
    """

    __slots__ = ('depth', 'poll_max_us', 'threads')

    depth: int
    poll_max_us: int
    threads: int

    def __init__(self) -> None:
        self.depth = _from_environment('GREENAIO_DEPTH', 256)
        self.poll_max_us = _from_environment('GREENAIO_POLL_MAX_US', 0)
        self.threads = _from_environment('GREENAIO_THREADS', 16)

    def __setattr__(self, name: str, value: int) -> None:
        allowed = _ALLOWED.get(name)
        if allowed is not None:
            if not isinstance(value, int):
                raise TypeError(f'{name} must be an int, not {type(value).__name__}')
            if value not in allowed:
                raise ValueError(f'{name} must be from {allowed[0]} to {allowed[-1]}, not {value}')
        object.__setattr__(self, name, value)


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, '').strip()
    try:
        return int(text) if text else default
    except ValueError:
        raise ValueError(f'{name} must be a whole number, not {text!r}') from None


config = Config()
