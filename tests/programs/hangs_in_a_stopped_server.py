"""Ask a server that is stopped, under a watchdog which waits for half a second: FOLDER MOUNT.

Prints the process id of the server."""

import os
import signal
import subprocess
import sys
import time

from tests.support.disks import is_mounted
from tests.support.processes import ROOT
from tests.support.watchdog import start_watchdog, tell_watchdog

folder, mount = sys.argv[1:]
start_watchdog(0.5)
server = subprocess.Popen([sys.executable, ROOT / 'tests' / 'loopback.py', folder, mount])
print(server.pid, flush=True)
while not is_mounted(mount):
    time.sleep(0.01)
server.send_signal(signal.SIGSTOP)
tell_watchdog('test', 'one that hangs')
while True:
    os.stat(f'{mount}/file')
