"""Settings, read from the environment once and changed in place: ``greenaio.config.poll_max_us = 50``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import NamedTuple

DEFAULT, PROGRAM = 'default', 'program'     # where a value came from; else it is the name of a variable
PREFIX = 'GREENAIO_'


class Setting(NamedTuple):
    """One that may be set. `allowed` values are whole numbers of `unit`."""

    name: str
    default: int
    unit: str
    allowed: range
    description: str

    @property
    def variable(self) -> str:
        """The environment variable."""
        return PREFIX + self.name.upper()

    @property
    def summary(self) -> str:
        """The description in one line."""
        return ' '.join(self.description.split())


# The one table: `Config`, its documentation and ``python -m greenaio config`` are made of it.
SETTINGS = (
    Setting('depth', 256, 'requests', range(1, 65537), """\
    In flight per hub. It counts when a hub does its first I/O. The whole machine has
    /proc/sys/fs/aio-max-nr of them, 65536 unless changed."""),
    Setting('poll_max_us', 0, 'µs', range(1_000_001), """\
    Before a hub waits for a disk it may watch for the completion for up to this time, which spares the
    wake-up and is worth a third more requests per second at depth 1, on a fast disk. It burns a processor
    meanwhile, and may delay every other greenlet by that time. The time really spent adapts: it doubles
    from 4 µs while waiting a little longer would have paid, and halves when the disk proves slower.
    0: off."""),
    Setting('threads', 16, 'threads', range(1, 1025), """\
    Native ones per device, at most, for what native AIO can't do. They are started when needed, shared by
    all hubs, and kept."""),
    Setting('stuck_after', 30, 's', range(86401), """\
    A request older than that is notified, see greenaio.events. 0: never."""),
)

# Known too, but read where it matters and no attribute.
OTHER_VARIABLES = {'GREENAIO_PATCH': 'whether gevent.monkey.patch_all() patches os, io and open as well: '
                                     'empty, 0, no, off and false mean no; see greenaio.monkey'}


def _documentation() -> str:
    """Of `Config`: a paragraph for each setting."""
    return 'What may be set; everything has a default that suits a server.\n\n' + ''.join(
        f'    ``{one.name}`` ({one.variable}, default {one.default} {one.unit}, '
        f'from {one.allowed[0]} to {one.allowed[-1]}):\n{one.description}\n\n' for one in SETTINGS) + """\
    Raises TypeError for what is not an int, ValueError for one that is out of range; at import ValueError,
    which names it, for a variable that is out of range, no number, or not known at all.
    """


class Config:
    __doc__ = _documentation()
    # Real attributes: poll_max_us is read at each wait.
    __slots__ = ('_sources', 'depth', 'poll_max_us', 'stuck_after', 'threads')

    _sources: dict[str, str]
    depth: int
    poll_max_us: int
    stuck_after: int
    threads: int

    def __init__(self) -> None:
        _check_names()
        object.__setattr__(self, '_sources', {})
        for setting in SETTINGS:
            text = os.environ.get(setting.variable, '').strip()
            object.__setattr__(self, setting.name, _parse(setting, text) if text else setting.default)
            self._sources[setting.name] = setting.variable if text else DEFAULT

    def __setattr__(self, name: str, value: int) -> None:
        setting = _BY_NAME.get(name)
        if setting is None:
            raise AttributeError(f'there is no setting {name!r}{_nearest(name, _BY_NAME)}')
        if not isinstance(value, int):
            raise TypeError(f'{name} must be an int, not {type(value).__name__}')
        _check_range(setting, name, value)
        object.__setattr__(self, name, value)
        self._sources[name] = PROGRAM

    def source(self, name: str) -> str:
        """Tell where the value of the setting *name* came from: 'default', 'program', or the name of an
        environment variable. Raises KeyError for what is no setting."""
        return self._sources[name]


def _check_names() -> None:
    known = {*OTHER_VARIABLES, *(setting.variable for setting in SETTINGS)}
    for name in os.environ:
        if name.startswith(PREFIX) and name not in known:
            raise ValueError(f'{name} is in the environment, but greenaio knows no such variable'
                             f'{_nearest(name, known)}')


def _nearest(name: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches  # only ever for a message

    found = get_close_matches(name, sorted(known), 1)
    return f': did you mean {found[0]}?' if found else ''


def _parse(setting: Setting, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f'{setting.variable} must be a whole number of {setting.unit}, '
                         f'not {text!r}') from None
    _check_range(setting, setting.variable, value)
    return value


def _check_range(setting: Setting, name: str, value: int) -> None:
    if value not in setting.allowed:
        raise ValueError(f'{name} must be from {setting.allowed[0]} to {setting.allowed[-1]} {setting.unit}, '
                         f'not {value}')


_BY_NAME = {setting.name: setting for setting in SETTINGS}
try:
    config = Config()
except ValueError as error:
    if sys.argv[:1] != ['-m'] or '-m greenaio' not in ' '.join(sys.orig_argv):
        raise
    print(f'python -m greenaio: {error}', file=sys.stderr)      # to who typed it a traceback tells nothing
    raise SystemExit(2) from None
