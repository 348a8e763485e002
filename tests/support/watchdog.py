"""A process that ends tests which hang: ``python tests/support/watchdog.py PID SECONDS``.

Nothing inside a process ends a system call that a frozen disk holds, so another process looks on. The tests
tell it, by a line on its standard input, of each test that begins, and of each server of a disk that they
start. If no test begins for SECONDS, it thaws the disks, and makes the tests print where they are and die.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

PATIENCE = 600                  # seconds

_process: subprocess.Popen[str] | None = None


def start_watchdog() -> None:
    """Start the watchdog of this process."""
    global _process
    _process = subprocess.Popen([sys.executable, __file__, str(os.getpid()), str(PATIENCE)],
                                stdin=subprocess.PIPE, text=True, bufsize=1)


def tell_watchdog(kind: str, value: object) -> None:
    """Tell the watchdog of a ``test`` by its name, or of a ``disk`` by the process id of its server."""
    if _process is not None:
        print(kind, value, file=_process.stdin, flush=True)


def stop_watchdog() -> None:
    if _process is not None:
        _process.communicate()


def watch(pid: int, patience: float) -> None:
    """Read lines until there are none for *patience* seconds; then thaw the disks, and end *pid*."""
    test, disks = '', []
    while select.select([0], [], [], patience)[0]:
        told = os.read(0, 65536).decode()
        if not told:
            return
        for line in told.splitlines():
            kind, value = line.split(None, 1)
            if kind == 'disk':
                disks.append(int(value))
            else:
                test, disks = value, []
    print('hangs:', test, file=sys.stderr)
    for number in (signal.SIGABRT, signal.SIGKILL):
        for process in (*disks, pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number if process == pid else signal.SIGCONT)
        time.sleep(5)


if __name__ == '__main__':
    watch(int(sys.argv[1]), float(sys.argv[2]))
