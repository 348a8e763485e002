"""A signal handler writes to files whose turn its greenlets have."""

import gevent.monkey

gevent.monkey.patch_all()
import greenaio.monkey

greenaio.monkey.patch_all()             # gevent finds the plugin only where greenaio is installed
import os
import signal
import sys
import time

import gevent
from gevent.exceptions import BlockingSwitchOutError

gevent.get_hub()
folder = sys.argv[1]
own = open(f'{folder}/own', 'w')            # noqa: SIM115
shared = open(f'{folder}/shared', 'w')      # noqa: SIM115
called = 0


def handler(*_):
    global called
    called += 1
    for file in own, shared:
        try:
            file.write(f'handler {called}\n')
            if called % 10 == 0:
                file.flush()
        except (RuntimeError, BlockingSwitchOutError):
            pass        # reentrant, as io; or in the hub


signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
end = time.monotonic() + 2


def work(k):
    i = 0
    while time.monotonic() < end:
        i += 1
        try:
            shared.write(f'worker {k} {i}\n')
            if i % 50 == 0:
                shared.flush()
                time.sleep(0.001)
        except RuntimeError:
            pass


gevent.joinall([gevent.spawn(work, k) for k in range(3)], raise_error=True)
signal.setitimer(signal.ITIMER_REAL, 0)
os._exit(0)
