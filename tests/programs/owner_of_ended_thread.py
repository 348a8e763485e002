"""A thread ends while its greenlets have the turn of a number, and that of a file."""

import errno
import os
import threading

import gevent

from greenaio._files import turn as _turn
from greenaio.fileobject import open as open_file

turn = _turn.Turn()
r, w = os.pipe()
file = open_file(r, 'rb', closefd=False)


def take():
    turn.owner = gevent.spawn(gevent.sleep, 100)
    gevent.spawn(file.read, 4)
    gevent.sleep(0.02)


thread = threading.Thread(target=take)
thread.start()
thread.join()
with gevent.Timeout(10):
    assert turn.wait()
    try:
        file.read(4)
    except OSError as error:
        assert error.errno == errno.EOWNERDEAD, error
    else:
        raise AssertionError('it had its turn')
assert not file._io_turn.queue
file.raw.close()
os._exit(0)
