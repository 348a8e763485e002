"""Settings, read from the environment once and changed in place: ``greenaio.config.poll_max_us = 50``.

Importing this never fails, because gevent's plugin imports greenaio into each program that patches with
gevent. `check_environment` reports a mistake when the program itself asks for greenaio.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable
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
    during that time, and may delay every other greenlet by it. The time really spent adapts: it doubles
    from 4 µs while waiting a little longer would have paid, and halves when the disk proves slower.
    0: off."""),
    Setting('threads', 16, 'threads', range(1, 1025), """\
    Native ones per device, at most, for operations that native AIO can't do. They are started when
    needed, shared by all hubs, and kept."""),
    Setting('stuck_after', 30, 's', range(86401), """\
    A request older than that is notified, see greenaio.events. 0: never."""),
)

# Known too, but read where it matters and no attribute.
OTHER_VARIABLES = {'GREENAIO_PATCH': 'what gevent.monkey.patch_all() patches as well: 0 for nothing, 1 for '
                                     'all, or a list of parts such as os,open; see greenaio.monkey'}

# Kubernetes describes each service of a pod's namespace this way, also one that is named greenaio.
SERVICE = re.compile(r'(.*_)?(SERVICE_(HOST|PORT(_.+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)')


def _documentation() -> str:
    """Of `Config`: a paragraph for each setting."""
    return 'What may be set; everything has a default that suits a server.\n\n' + ''.join(
        f'    ``{one.name}`` ({one.variable}, default {one.default} {one.unit}, '
        f'from {one.allowed[0]} to {one.allowed[-1]}):\n{one.description}\n\n' for one in SETTINGS) + """\
    Raises TypeError for a value that is not an int, and ValueError for one that is out of range. A variable
    that is out of range or no number raises ValueError, which names it, when the program patches or does its
    first I/O; a variable that greenaio does not know is a RuntimeWarning there.
    """


class Config:
    __doc__ = _documentation()
    # Real attributes: poll_max_us is read at each wait.
    __slots__ = ('_mistake', '_sources', 'depth', 'poll_max_us', 'stuck_after', 'threads')

    _mistake: str                       # in the environment, until it is reported
    _sources: dict[str, str]
    depth: int
    poll_max_us: int
    stuck_after: int
    threads: int

    def __init__(self) -> None:
        object.__setattr__(self, '_sources', {})
        object.__setattr__(self, '_mistake', '')
        for setting in SETTINGS:
            value, source = setting.default, DEFAULT
            text = os.environ.get(setting.variable, '').strip()
            if text:
                try:
                    value, source = _parse(setting, text), setting.variable
                except ValueError as error:
                    object.__setattr__(self, '_mistake', self._mistake or str(error))
            object.__setattr__(self, setting.name, value)
            self._sources[setting.name] = source

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
        environment variable. Raises KeyError if *name* is no setting."""
        return self._sources[name]


def _warn(problem: str) -> None:
    warnings.warn(problem, RuntimeWarning, stacklevel=4)


def check_environment(tell: Callable[[str], object] = _warn) -> None:
    """Report the mistakes in our variables when the program asks for greenaio: *tell* once of each variable
    that is not known, and raise ValueError for the first value that cannot be used."""
    global _is_checked
    if not _is_checked:
        _is_checked = True
        for problem in _unknown_variables():
            tell(problem)
    if config._mistake:
        raise ValueError(config._mistake)


def _unknown_variables() -> list[str]:
    """Return a sentence for each variable of the environment that looks like ours and is not."""
    known = {name.removeprefix(PREFIX) for name in OTHER_VARIABLES} | {name.upper() for name in _BY_NAME}
    ours = [name.removeprefix(PREFIX) for name in os.environ if name.startswith(PREFIX)]
    return [f'{PREFIX}{name} is in the environment, but greenaio knows no such variable'
            f'{_nearest(name, known, PREFIX)}'
            for name in ours if name not in known and not SERVICE.fullmatch(name)]


def _nearest(name: str, known: Iterable[str], prefix: str = '') -> str:
    from difflib import get_close_matches  # only ever for a message

    found = get_close_matches(name, sorted(known), 1)
    return f': did you mean {prefix}{found[0]}?' if found else ''


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
_is_checked = False
config = Config()
