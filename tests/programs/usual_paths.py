"""Open, stat and follow links, also where a sandbox denies newer calls; print the type of the file system."""

import os
import sys
import time

import gevent

import greenaio
import greenaio.os
from greenaio._files import device as _device

folder = sys.argv[1]
for i in range(3):
    path = f'{folder}/{i}'
    with greenaio.open(path, 'w') as file:
        file.write('here')
    os.symlink(path, path + '-link')
    for name in (path, path + '-link'):
        with greenaio.open(name) as file:
            assert file.read() == 'here'
        assert greenaio.os.stat(name) == os.stat(name)
    for call in (greenaio.os.stat, greenaio.open):
        try:
            call(path + '-no')
        except FileNotFoundError as error:
            assert error.filename == path + '-no'
        else:
            raise AssertionError
end = time.monotonic() + 10


def file_system():
    found = [device for device in _device.devices() if device.number == os.stat(folder).st_dev]
    greenaio.os.fstat(0), greenaio.os.stat(folder)
    return found[0].file_system if found else ''


while not file_system():
    gevent.sleep(0.01)
    assert time.monotonic() < end
print(file_system())
