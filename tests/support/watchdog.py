"""A process that ends tests which hang: ``python tests/support/watchdog.py PID SECONDS``.

Code inside a process can't end a system call that a frozen disk holds, so another process looks on until the
process of the tests is gone. The tests tell it, by a line on its standard input, of each test that begins,
and of each server of a disk that is no child of theirs. If no test begins for SECONDS, the watchdog makes the
tests print where they are, and ends them.

A call to a FUSE server that is stopped can't be killed: the process stays, and so does the shell that waits
for it. So all servers go on before the process is killed, and are killed after it.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import select
import signal
import subprocess
import sys
from collections.abc import Iterable

PATIENCE = 600                  # seconds
GRACE = 5                       # seconds, to print where the tests are

_process: subprocess.Popen[str] | None = None


def start_watchdog(patience: float = PATIENCE) -> None:
    """Start the watchdog of this process. It ends when the process has ended."""
    global _process
    _process = subprocess.Popen([sys.executable, __file__, str(os.getpid()), str(patience)],
                                stdin=subprocess.PIPE, text=True, bufsize=1)


def tell_watchdog(kind: str, value: object) -> None:
    """Tell the watchdog of a ``test`` by its name, or of a ``disk`` by the process id of its server."""
    if _process is not None:
        print(kind, value, file=_process.stdin, flush=True)


def leave_watchdog() -> None:
    """Tell the watchdog that this process is about to end. It stays until that is done."""
    global _process
    if _process is not None and _process.stdin is not None:
        tell_watchdog('test', 'the end of the process')
        _process.stdin.close()
        _process.returncode = 0         # or Python would warn of it
        _process = None


def watch(pid: int, patience: float) -> None:
    """Read lines until process *pid* has ended. End it if there is no line for *patience* seconds."""
    test, disks = '', []
    # A forked child may have the pipe, too, so its end does not tell that the process has ended.
    process = os.pidfd_open(pid)
    sources = [0, process]
    while (ready := select.select(sources, [], [], patience)[0]) and process not in ready:
        told = os.read(0, 65536).decode()
        if not told:
            sources.remove(0)
        for line in told.splitlines():
            kind, value = line.split(None, 1)
            if kind == 'disk':
                disks.append(int(value))
            else:
                test, disks = value, []
    if not ready:
        print('hangs:', test, file=sys.stderr)
        end(pid, process, [*disks, *descendants(pid)])


def end(pid: int, process: int, servers: list[int]) -> None:
    """End process *pid*, whose pidfd is *process*, and then its *servers*."""
    for number in (signal.SIGABRT, signal.SIGKILL):
        send(signal.SIGCONT, servers)
        send(number, [pid])
        if select.select([process], [], [], GRACE)[0]:
            break
    send(signal.SIGKILL, servers)


def send(number: int, processes: Iterable[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def descendants(pid: int) -> list[int]:
    """Return the children of process *pid* but this one, and their children."""
    children: dict[int, list[int]] = {}
    for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(')')[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [child for child in children.get(pid, []) if child != os.getpid()]
    for child in found:
        found += children.get(child, [])
    return found


if __name__ == '__main__':
    watch(int(sys.argv[1]), float(sys.argv[2]))
