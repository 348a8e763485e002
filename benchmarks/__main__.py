"""Everything that greenaio is compared with, on this machine: figures in JSON, tables in Markdown, pictures.

The ways to do a piece of work take turns, round by round; ratios are of the same round, quoted as their
median with the lowest and the highest. What is not installed is left out, and said.
"""

import signal

# The imports take a while: Ctrl-C then gives no traceback, either.
if __name__ == '__main__' and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import json
import os
import pathlib
import re
import sys
import time
from importlib.util import find_spec
from typing import Any

try:
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.progress import MofNCompleteColumn, Progress
    if find_spec('matplotlib') is None:
        raise ImportError('no module matplotlib')
except ImportError as error:
    sys.exit(f"python -m benchmarks: {error}: pip install '.[bench]'")

from benchmarks.buffered import reads, start
from benchmarks.contest import bars_table, plot, run, table, verdicts
from benchmarks.loads import ASYNCIO, ENGINES, buffered, disk, kinds, many, memory, sync
from benchmarks.log import log
from benchmarks.nbd import nbd
from benchmarks.object_server import object_server
from benchmarks.price import price, price_overlay
from benchmarks.server import server
from benchmarks.streams import streams
from greenaio.__main__ import end_on_signals, without_traceback
from greenaio._commands import bench

GROUPS = {group.__name__: group for group in (
    disk, kinds, memory, many, reads, buffered, sync, streams, log, object_server, nbd, start, price,
    price_overlay, server)}
PROG = 'python -m benchmarks'
PAGE = pathlib.Path(__file__).parent.parent / 'docs' / 'performance.md'


def arguments():
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='groups:\n' + '\n'.join(f'  {name:14} {group.__doc__}' for name, group in GROUPS.items()))
    parser.add_argument('groups', nargs='*', metavar='GROUP', help='these alone (default: all)')
    parser.add_argument('--only', type=lambda text: text.split(','), metavar='WAYS',
                        help='these ways alone, where a contest has any of them')
    parser.add_argument('--folder', default=bench._real_folder(), help='on the disk (default %(default)s)')
    parser.add_argument('--memory', default='/dev/shm', help='a folder in memory (default %(default)s)')
    parser.add_argument('--rounds', type=bench.number(int, 1, 10_000), default=5, help='(default 5)')
    parser.add_argument('--seconds', type=bench.number(float, 0.01, 86_400), default=1.0,
                        help='each way in each round, where it can be chosen (default 1)')
    parser.add_argument('--output', default='benchmark-results', metavar='FOLDER',
                        help='(default %(default)s)')
    parser.add_argument('--write', action='store_true', help='the tables into docs/performance.md as well')
    given = parser.parse_args()
    for name in given.groups:
        if name not in GROUPS:
            parser.error(f'{name!r} is none of {", ".join(GROUPS)}')
    for folder in (given.folder, given.memory):
        if not os.path.isdir(folder):
            parser.error(f'{folder!r} is no folder')
    return given


def measure(group, options, progress):
    """The contests of *group*, over."""
    with group(options) as contests:
        for contest in contests:
            contest.ways = {name: way for name, way in contest.ways.items()
                            if name in (options.only or contest.ways)}
        contests = [contest for contest in contests if contest.ways]
        steps = options.rounds * sum(len(contest.ways) for contest in contests)
        task = progress.add_task(group.__name__, total=steps)
        run(contests, options.rounds, lambda text: progress.update(
            task, description=f'{group.__name__}, {text}', advance=1))
        progress.remove_task(task)
    return contests


def write_into(page, name, text):
    """Put *text* between the marks of *name*, where *page* has them."""
    marks = re.compile(f'(<!-- {name} -->\n).*?(<!-- /{name} -->)', re.DOTALL)
    page.write_text(marks.sub(lambda match: match[1] + text + match[2], page.read_text()))


def main():
    options = arguments()
    end_on_signals()
    output = pathlib.Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[dict[str, Any]]] = {}
    bars: list[dict[str, Any]] = []
    report = {'machine': bench._machine(), 'versions': bench._versions(), 'command': sys.argv[1:],
              'file_system': bench._file_system(options.folder), 'began': time.time(),
              'groups': groups, 'bars': bars}
    for way in {*ENGINES, *ASYNCIO}:
        if not bench._installed(way):
            print(f'{way} is not installed, left out', file=sys.stderr)
    console, pages = Console(), []
    for name in options.groups or GROUPS:
        group = GROUPS[name]
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True),
                      transient=True, disable=not sys.stderr.isatty()) as progress:
            try:
                contests = measure(group, options, progress)
            except bench.Failure as error:
                sys.exit(f'{PROG}: {error}')
        if not contests:                # none of the ways that are wanted
            continue
        text, found = table(contests), verdicts(contests)
        groups[name] = [{'work': contest.work, 'ways': contest.rounds} for contest in contests]
        bars += found
        plot(contests, str(group.__doc__), str(output / f'{name}.png'))
        pages.append(f'## {group.__doc__}\n\n{text}' + (f'\n{bars_table(found)}' if found else ''))
        # After each group, because an interrupt must not cost the groups before.
        (output / 'results.json').write_text(json.dumps(report, indent=1))
        (output / 'tables.md').write_text('\n'.join(pages))
        if options.write:
            write_into(PAGE, name, text + (f'\n{bars_table(found)}' if found else ''))
        console.print(Markdown(pages[-1]))
    if not groups:
        why = f'no group has any of the ways {", ".join(options.only)}' if options.only else 'nothing is left'
        sys.exit(f'{PROG}: {why}')
    return 0


if __name__ == '__main__':
    sys.exit(without_traceback(PROG, main))
