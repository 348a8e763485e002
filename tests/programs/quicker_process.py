"""Another process empties or fills a pipe between the poll of a greenlet and its call."""

import os
import sys

import gevent

import greenaio.os
from greenaio._files import pollable as _pollable

reader, writer = os.pipe()


def wait(fd, event):
    """Another process is quicker, the first time."""
    plain(fd, event)
    if sys.argv[1].startswith('read'):
        os.read(reader, 100)
    else:
        os.write(writer, bytes(4096))
    _pollable.wait_for = plain      # type: ignore[attr-defined]


plain = _pollable.wait_for          # type: ignore[attr-defined]
_pollable.wait_for = wait           # type: ignore[attr-defined]
calls = {'read': lambda: greenaio.os.read(reader, 100),
         'readv': lambda: greenaio.os.readv(reader, [bytearray(9)]),
         'write': lambda: greenaio.os.write(writer, b'here'),
         'writev': lambda: greenaio.os.writev(writer, [b'here'])}
os.write(writer, bytes(15 * 4096))
if sys.argv[1].startswith('read'):
    os.read(reader, 15 * 4096)
    os.write(writer, b'theirs')
waiting = gevent.spawn(calls[sys.argv[1]])
gevent.sleep(0.1)
assert not waiting.ready()
if sys.argv[1].startswith('read'):
    os.write(writer, b'ours')
    assert waiting.get(timeout=10) in (b'ours', 4)
else:
    os.read(reader, 16 * 4096)
    assert waiting.get(timeout=10) == 4
    assert os.read(reader, 100) == b'here'
assert os.get_blocking(reader) and os.get_blocking(writer)
