"""Hash files and trees, cooperatively: ``checksum.py PATH... > SUMS``, then ``sha256sum -c SUMS``.

A greenlet per file, several requests in flight for each, O_DIRECT where the file system has it. A file
that cannot be read costs a line on stderr and the exit status 1, not the run.
"""

from __future__ import annotations

import signal

if __name__ == '__main__':      # the imports take a while: Ctrl-C then gives no traceback, either
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import errno
import hashlib
import os
import stat
import sys
from collections.abc import Iterator

import gevent
from gevent.pool import Pool

import greenaio.os
from greenaio import File, aligned_buffer

CHUNK = 256 * 1024      # bytes in one request
AHEAD = 4               # requests in flight per file
FILES = 32              # files at a time: FILES * AHEAD * CHUNK is the memory used, 32 MiB


def open_direct(path: str) -> File:
    """Open *path* past the page cache if its file system allows that, else through it."""
    try:
        return File(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return File(path)


def chunks(file: File) -> Iterator[memoryview]:
    """The file's bytes in order, AHEAD requests in flight; each piece is good until the next is asked."""
    buffers = [aligned_buffer(CHUNK) for _ in range(AHEAD)]
    reads: list[gevent.Greenlet[..., int]] = []
    try:
        for i in range(AHEAD):
            reads.append(gevent.spawn(file.preadv, [buffers[i]], i * CHUNK))
        turn = at = 0
        while (n := reads[at].get()) == CHUNK:
            yield buffers[at]
            reads[at] = gevent.spawn(file.preadv, [buffers[at]], (turn + AHEAD) * CHUNK)
            turn += 1
            at = turn % AHEAD
        place = turn * CHUNK
        while n:                    # not only the last is short: files in /proc come by the page
            yield buffers[at][:n]
            place += n
            n = file.preadv([buffers[at]], place)
    finally:
        gevent.killall(reads)


def checksum(path: str) -> str:
    """The SHA-256 of the file at *path*, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    if not stat.S_ISREG(greenaio.os.stat(path).st_mode):    # to open a FIFO is to wait for who writes
        raise OSError(errno.EINVAL, 'Not a regular file', path)
    with open_direct(path) as file:
        for piece in chunks(file):
            digest.update(piece)
            gevent.sleep(0)         # hashing is work too: let the others have their turn
    return digest.hexdigest()


def walk(paths: list[str], failed: list[OSError]) -> Iterator[str]:
    """The files at and under *paths*, in a stable order."""
    for path in paths:
        if not os.path.isdir(path):
            yield path
            continue
        folders = [path]                # not os.walk: a tree may be deeper than Python's stack
        while folders:
            try:
                with os.scandir(folders.pop()) as entries:
                    found = sorted((entry.path, entry.is_dir(follow_symlinks=False), entry.is_symlink())
                                   for entry in entries)
            except OSError as error:
                failed.append(error)
                continue
            folders += [name for name, is_folder, _ in reversed(found) if is_folder]
            yield from (name for name, is_folder, is_link in found if not is_folder and not is_link)


def line(digest: str, path: str) -> str:
    """As sha256sum writes it: a name with a newline or backslash is escaped, and marked so."""
    if any(character in path for character in '\\\n\r'):
        path = path.replace('\\', '\\\\').replace('\n', '\\n').replace('\r', '\\r')
        return f'\\{digest}  {path}'
    return f'{digest}  {path}'


class Progress:
    """A line on the terminal; nothing anywhere else."""

    def __init__(self) -> None:
        self.done = 0
        self.shown = bool(sys.stderr) and sys.stderr.isatty()

    def step(self, path: str) -> None:
        self.done += 1
        if self.shown:
            text = f'{self.done} files  {os.path.basename(path)}'
            text = ''.join(c if c.isprintable() else '?' for c in text)     # a name may move the cursor
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            sys.stderr.write(f'\r\033[K{text[:width - 1]}')

    def end(self) -> None:
        if self.shown:
            sys.stderr.write('\r\033[K')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('paths', nargs='+', metavar='PATH')
    arguments = parser.parse_args()
    if sys.stdout is None:
        raise OSError(errno.EBADF, 'Standard output is closed')
    progress = Progress()
    failed: list[OSError] = []

    def one(path: str) -> str | OSError:
        try:
            return line(checksum(path), path)
        except OSError as error:
            return error
        finally:
            progress.step(path)

    try:
        for result in Pool(FILES).imap(one, walk(arguments.paths, failed), maxsize=2 * FILES):
            if isinstance(result, OSError):
                failed.append(result)
            else:
                sys.stdout.buffer.write(os.fsencode(result) + b'\n')
    finally:
        progress.end()
    for error in failed:
        print(f'checksum.py: {error.filename}: {error.strerror}', file=sys.stderr)
    return 1 if failed else 0


def run() -> int:
    """Run `main`. Ctrl-C, a wrong setting, or output that is full or closed ends it without a traceback."""
    # KeyboardInterrupt would reach the hub or any greenlet, and gevent would print it.
    gevent.signal_handler(signal.SIGINT, gevent.kill, gevent.getcurrent(), KeyboardInterrupt)
    try:
        greenaio.os.stat(os.curdir)     # the first call; raises ValueError if a variable GREENAIO_… is wrong
        status = main()
        if sys.stdout:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:
        if not isinstance(error, BrokenPipeError):      # a reader such as head has seen enough
            print(f'checksum.py: {error}', file=sys.stderr)
        # The interpreter would try to write the rest at its end, and complain.
        if sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


if __name__ == '__main__':
    sys.exit(run())
