"""Copy a tree, several files at a time: ``python examples/copy_tree.py SRC DST``.

Modes, times, extended attributes and symbolic links are kept. A file that can't be copied costs a line on
stderr and the exit status 1, not the run. With rich installed, a terminal shows how far it is.
"""

from __future__ import annotations

import signal

if __name__ == '__main__':      # the imports take a while: Ctrl-C then gives no traceback, either
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import importlib.util
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator

import gevent
from gevent.pool import Pool

import greenaio.os

FILES = 16                      # at a time: as many as greenaio has threads for a device
Step = Callable[[int], object]  # is told of bytes, as they are copied


def walk(source: str, target: str, failed: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Folders, top down, where they go, and the names in each of what is no folder."""
    pairs = [(source, target)]          # not os.walk: a tree may be deeper than Python's stack
    while pairs:
        folder, there = pairs.pop()
        try:
            with os.scandir(folder) as entries:
                is_folder = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        except OSError as error:
            failed.append(str(error))
            continue
        yield folder, there, [name for name in is_folder if not is_folder[name]]
        pairs += [(os.path.join(folder, name), os.path.join(there, name))
                  for name in is_folder if is_folder[name]]


def copy_file(source: str, target: str, progress: Step) -> None:
    copied = 0

    def step(done: int, size: int) -> None:
        nonlocal copied
        progress(done - copied)
        copied = done

    if stat.S_IFMT(os.lstat(source).st_mode) not in (stat.S_IFREG, stat.S_IFLNK):
        raise shutil.SpecialFileError(f'{source!r} is no file, no folder and no symbolic link')
    try:
        greenaio.copyfile(source, target, follow_symlinks=False, progress=step)
    except BaseException:               # Ctrl-C, a full disk: half a file would look like a whole one
        with contextlib.suppress(OSError):
            os.unlink(target)
        raise
    shutil.copystat(source, target, follow_symlinks=False)


def copy_tree(source: str, target: str, progress: Step) -> tuple[int, list[str]]:
    """Copy it; return how many files there were, and what went wrong."""
    failed: list[str] = []
    folders, count, pool = [], 0, Pool(FILES)
    lost: set[str] = set()          # folders that could not be made

    def attempt(call: Callable[..., None], *args: object) -> bool:
        try:
            call(*args)
            return True
        except OSError as error:        # which names no file, if it was being read or written
            failed.append(str(error) if error.filename or not error.errno else f'{error}: {args[0]!r}')
        except Exception as error:      # or it would end the greenlet, and not be counted
            failed.append(f'{error!r}: {args[0]!r}')
        return False

    try:
        for folder, there, names in walk(source, target, failed):
            if os.path.dirname(there) in lost or not attempt(os.mkdir, there):
                lost.add(there)
                continue
            folders.append((folder, there))
            count += len(names)
            for name in names:          # waits for one to be done, while FILES are under way
                one, other = os.path.join(folder, name), os.path.join(there, name)
                pool.spawn(attempt, copy_file, one, other, progress)
        pool.join()
    finally:
        pool.kill()                     # after Ctrl-C
    for pair in reversed(folders):      # last: what is made in a folder changes its time
        attempt(shutil.copystat, *pair)
    return count, failed


@contextlib.contextmanager
def progress_bar() -> Iterator[Step]:
    if not sys.stdout or not sys.stdout.isatty() or not importlib.util.find_spec('rich'):
        yield lambda nbytes: None
        return
    from rich.progress import DownloadColumn, Progress, SpinnerColumn, TransferSpeedColumn
    with Progress(SpinnerColumn(), DownloadColumn(), TransferSpeedColumn(), transient=True) as bar:
        task = bar.add_task('', total=None)
        yield lambda nbytes: bar.advance(task, nbytes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', metavar='SRC', help='a folder')
    parser.add_argument('target', metavar='DST', help='where there is nothing yet')
    arguments = parser.parse_args()
    source, target = arguments.source, arguments.target
    if not os.path.isdir(source):
        parser.error(f'{source} is not a folder')
    inside = os.path.join(os.path.realpath(source), '')
    if os.path.lexists(target) or os.path.realpath(target).startswith(inside):
        parser.error(f'{target} exists already, or is in {source}')
    if not os.path.isdir(os.path.dirname(os.path.abspath(target))):
        parser.error(f'{target} would be in a folder that is not there')
    with progress_bar() as progress:
        count, failed = copy_tree(source, target, progress)
    for line in failed:
        print(f'copy_tree.py: {line}', file=sys.stderr)
    print(f'{count} files, {len(failed)} errors')
    return 1 if failed else 0


def run() -> int:
    """Run `main`. Ctrl-C, a wrong setting, or output that is full or closed ends it without a traceback."""
    # KeyboardInterrupt would reach the hub or any greenlet, and gevent would print it.
    gevent.signal_handler(signal.SIGINT, gevent.kill, gevent.getcurrent(), KeyboardInterrupt)
    gevent.signal_handler(signal.SIGTERM, gevent.kill, gevent.getcurrent(), SystemExit(143))
    try:
        greenaio.os.stat(os.curdir)     # the first call; raises ValueError if a variable GREENAIO_… is wrong
        status = main()
        if sys.stdout:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print('copy_tree.py: interrupted: the copy is incomplete', file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        if not isinstance(error, BrokenPipeError):      # a reader such as head has seen enough
            print(f'copy_tree.py: {error}', file=sys.stderr)
        # The interpreter would try to write the rest at its end, and complain.
        if sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


if __name__ == '__main__':
    sys.exit(run())
