"""Another process holds the lock of the position, inside read(2), until the disk thaws.

Print how long the hub stood still, and how long a process beside it did.
"""

import subprocess
import sys
import time

import gevent

import greenaio
import greenaio.os

path, freeze, thaw, call, control = sys.argv[1:]
worst = 0.0


def tick():
    global worst
    while True:
        before = time.monotonic()
        gevent.sleep(0.001)
        worst = max(worst, time.monotonic() - before - 0.001)


file = greenaio.open(path, 'rb', 0)
subprocess.run(freeze, shell=True, check=True)
reader = subprocess.Popen(['cat'], stdin=file.fileno(), stdout=subprocess.DEVNULL)
time.sleep(0.3)
thawing = subprocess.Popen(f'sleep 1.5; {thaw}', shell=True)
beside = subprocess.Popen([sys.executable, control, '1.5'], stdout=subprocess.PIPE, text=True)
ticker = gevent.spawn(tick)
gevent.sleep(0.05)
user = gevent.spawn(lambda: eval(call))
gevent.sleep(1)
print(worst)
thawing.wait()
user.join(5)
reader.wait()
print(beside.communicate()[0])
