"""On-access scanners, by fanotify."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

from tests.support import missing
from tests.support.processes import run

FAN_OPEN_PERM, FAN_ACCESS_PERM = 0x10000, 0x20000
FANOTIFY_INIT = 300 if os.uname().machine == 'x86_64' else 262
SCANNER = '''
import ctypes, os, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.syscall(int(sys.argv[3]), 4, os.O_RDONLY | os.O_LARGEFILE)         # fanotify_init
if fd < 0 or libc.syscall(int(sys.argv[3]) + 1, fd, 0x11, ctypes.c_uint64(int(sys.argv[2])), -100,
                          sys.argv[1].encode()) < 0:
    sys.exit(print('no fanotify', flush=True))
print('scans', flush=True)
while data := os.read(fd, 4096):
    while data:
        length, _, _, _, _, opened, _ = struct.unpack_from('=IBBHQii', data)
        time.sleep(0.1)
        os.write(fd, struct.pack('=iI', opened, 1))                             # FAN_ALLOW
        os.close(opened)
        data = data[length:]
'''


@contextlib.contextmanager
def scanned(folder, mask):
    """Have a process answer 0.1 s late to the events of *mask* on *folder*, which becomes a mount of its own;
    yield that process."""
    if os.geteuid() != 0:
        missing('needs root')
    run('mount', '--bind', folder, folder)
    scanner = subprocess.Popen([sys.executable, '-c', SCANNER, folder, str(mask), str(FANOTIFY_INIT)],
                               stdout=subprocess.PIPE, text=True)
    assert scanner.stdout
    try:
        if scanner.stdout.readline() != 'scans\n':
            missing('needs fanotify')
        yield scanner
    finally:
        scanner.kill()
        scanner.wait()
        scanner.stdout.close()
        for _ in range(50):
            with contextlib.suppress(subprocess.CalledProcessError):
                run('umount', folder)
                break
            time.sleep(0.1)
