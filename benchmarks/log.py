"""Commits to a log by 64 greenlets: examples/write_ahead_log.py beside a thread pool."""

import contextlib
import pathlib
import re
import subprocess
import sys

from benchmarks.contest import Bar, Contest

EXAMPLE = pathlib.Path(__file__).parent.parent / 'examples' / 'write_ahead_log.py'


@contextlib.contextmanager
def log(options):
    """Commits to a log by 64 greenlets, records of 100 bytes."""
    def commits(way, *more):
        printed = subprocess.check_output([sys.executable, EXAMPLE, options.folder, *more,
                                           '--seconds', str(options.seconds)], text=True)
        number, = re.findall(rf'{way}.* ([\d,]+) commits/s', printed)
        return {'iops': float(number.replace(',', ''))}

    yield [Contest('commits', {'group commit': lambda: commits('group commit'),
                               'threadpool': lambda: commits('thread pool', '--compare')},
                   bars=(Bar(8, 'iops', 'group commit', 'threadpool'),))]
