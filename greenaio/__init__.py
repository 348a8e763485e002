"""Cooperative disk I/O for gevent: a greenlet waits for the disk, the hub never does.

`greenaio.os` has the familiar calls, `File` is the fast way, `aligned_buffer` gives memory that O_DIRECT
accepts, `open` is the built-in one, cooperative, `config` has what may be set, `stats` and `dump` tell what
waits and what was done. Inside `uninterrupted` calls block.
"""

from __future__ import annotations

import logging
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if sys.platform != 'linux':
    raise ImportError(f'greenaio is for Linux only, and this is {sys.platform}')

# ``python -m greenaio`` imports this package before the first line of __main__.py, and the import takes a
# while. Until the command begins, Ctrl-C ends the process without a traceback. While Python looks for the
# module that -m names, sys.argv begins with -m.
if (sys.argv[:1] == ['-m'] and sys.orig_argv[-len(sys.argv)].removeprefix('-m') == __name__
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from greenaio._config import config
from greenaio._files.extension import File, aligned_buffer, native, renew_threads

# Python itself would print the warnings of a program that has set up no logging.
logging.getLogger('greenaio').addHandler(logging.NullHandler())

if native:
    from greenaio._core.dispatch import report_to

    def _raise_event(hub: Any, name: str, *facts: Any) -> None:
        # Not imported before there is an event, because `events` takes most of the time of this import.
        from greenaio import events

        events.raise_event(hub, name, *facts)

    report_to(_raise_event)

if TYPE_CHECKING:
    from greenaio._core.uninterrupted import uninterrupted
    from greenaio._files.copies import copyfile
    from greenaio._operate.stats import dump, stats
    from greenaio.fileobject import open

__version__ = '0.1.0'

__all__ = ['File', '__version__', 'aligned_buffer', 'config', 'copyfile', 'dump', 'native', 'open',
           'renew_threads', 'stats', 'uninterrupted']

_AT_FIRST_USE = {'open': 'greenaio.fileobject', 'copyfile': 'greenaio._files.copies',
                 'dump': 'greenaio._operate.stats', 'stats': 'greenaio._operate.stats',
                 'uninterrupted': 'greenaio._core.uninterrupted'}


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: the late names take a third of the time of the import, which
    programs that use only `File` or `greenaio.os` spare."""
    if name not in _AT_FIRST_USE:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = globals()[name] = getattr(import_module(_AT_FIRST_USE[name]), name)
    return value
