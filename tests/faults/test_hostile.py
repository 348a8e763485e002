"""Hostile arguments to every public call get the answer of `os`, `io` and `shutil`: HOSTILE of the matrix."""

from __future__ import annotations

import array
import builtins
import ctypes
import fcntl
import io
import os
import select
import shutil
import socket

import gevent
import pytest
from conftest import pattern

import greenaio
import greenaio.os
from greenaio import File, aligned_buffer
from greenaio.block import BlockDevice

SIZE = 16384
DATA = pattern(SIZE)
CLOSED = 99999                          # a number that no open file has
DIRECT = [0, os.O_DIRECT]
HERE = -100                             # AT_FDCWD: to statx it is the working folder


class Index:
    """A number that is asked for by running code."""

    def __init__(self, ask):
        self._ask = ask

    def __index__(self):
        return self._ask()

    __fspath__ = fileno = __index__


class Refused(Exception):
    pass


def refuse(*args):
    raise Refused


NUMBERS = {'None': None, 'float': 1.0, 'str': '1', 'bytes': b'1', 'object': object(), 'list': [1],
           '-1': -1, '-2': -2, 'AT_FDCWD': HERE, '2^31-1': (1 << 31) - 1, '2^31': 1 << 31, '2^32': 1 << 32,
           '2^63-1': (1 << 63) - 1, '2^63': 1 << 63, '-2^63': -(1 << 63), '-2^63-1': -(1 << 63) - 1,
           '2^64': 1 << 64, '2^1000': 1 << 1000, '-2^1000': -(1 << 1000), 'refused': Index(refuse),
           'index str': Index(lambda: 'x'), 'index': Index(lambda: 1), 'index of 2^64': Index(lambda: 1 << 64),
           'switching': Index(lambda: gevent.sleep(0) or 1), 'closed': CLOSED}


def outcome(function, *args, **kwargs):
    """What a call comes to: its value, or the kind of exception and its errno."""
    try:
        value = function(*args, **kwargs)
    except OSError as error:
        return type(error), error.errno
    except Exception as error:
        return type(error)
    return tuple(value)[:7] if isinstance(value, os.stat_result) else value


@pytest.fixture
def two(folder):
    """Two files alike, to do to one by os what is done to the other by greenaio.os."""
    fds = []
    for name in ('ours', 'theirs'):
        fds.append(os.open(os.path.join(folder, name), os.O_RDWR | os.O_CREAT))
    yield fds
    for fd in fds:
        os.close(fd)


def fill(*fds):
    for fd in fds:
        os.ftruncate(fd, SIZE)
        os.pwrite(fd, DATA, 0)
        os.lseek(fd, 0, os.SEEK_SET)


# Numbers -----------------------------------------------------------------------------------------

class Fd:
    """In a table: the file that is worked on."""


GRANTED = {'2^31-1', '2^31', '2^32'}   # so many bytes os would allocate, or write

CALLS = {       # name: arguments that work, and by their number the values left out: EFAULT, says os.stat of -1
    'pread': ((Fd, 10, 0), {1: {'2^32'}}), 'preadv': ((Fd, [bytearray(9)], 0, 0), {}),
    'pwrite': ((Fd, b'data', 0), {}), 'pwritev': ((Fd, [b'data', b'more'], 0, 0), {}),
    'read': ((Fd, 10), {1: {'2^32'}}), 'readv': ((Fd, [bytearray(9)]), {}), 'write': ((Fd, b'data'), {}),
    'writev': ((Fd, [b'data', b'more']), {}), 'fsync': ((Fd,), {}), 'fdatasync': ((Fd,), {}),
    'ftruncate': ((Fd, 100), {}), 'posix_fallocate': ((Fd, 0, 100), {2: GRANTED}),
    'copy_file_range': ((Fd, Fd, 10, 0, 100), {}), 'sendfile': ((Fd, Fd, 0, 10), {}), 'fstat': ((Fd,), {}),
    'stat': ((Fd,), {0: {'-1'}}), 'close': ((Fd,), {0: {'index', 'switching'}}),      # that is stdout
    'open': (('/dev/null', os.O_RDONLY, 0o600), {}),
}


@pytest.mark.parametrize('name', CALLS)
def test_numbers_get_the_answer_of_os(two, name):
    args, left_out = CALLS[name]
    wrong = {}
    for at in range(len(args)):
        for label, value in NUMBERS.items():
            if label in left_out.get(at, ()):
                continue
            fill(*two)
            answers = []
            for module, fd in zip((greenaio.os, os), two):
                given = [fd if one is Fd else one for one in args]
                given[at] = value
                if (at == 0 or args[at] is Fd) and label in ('index', 'switching'):
                    given[at] = Index(lambda fd=fd: fd)
                answer = outcome(getattr(module, name), *given)
                if name == 'open' and isinstance(answer, int):
                    os.close(answer)
                    answer = 'an fd'
                if name in ('fstat', 'stat') and isinstance(answer, tuple) and len(answer) == 7:
                    answer = 'an inode'
                answers.append((answer, os.fstat(fd).st_size, os.lseek(fd, 0, os.SEEK_CUR)))
            if answers[0] != answers[1]:
                wrong[at, label] = answers
    assert not wrong, "\n".join(f"{key}: {value}" for key, value in wrong.items())


# Buffers -----------------------------------------------------------------------------------------

class Pair(ctypes.Structure):
    _fields_ = [('a', ctypes.c_int), ('b', ctypes.c_int)]


class Endless:
    """Never raises the IndexError that ends an iteration."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return bytearray(b'data')


class Liar(list):
    """Empty, and says otherwise."""

    def __len__(self):
        return 2


def released():
    view = memoryview(bytearray(8))
    view.release()
    return view


BUFFERS = {
    'None': lambda: None, 'str': lambda: 'text', 'int': lambda: 8, 'object': object, 'list': lambda: [1],
    'read-only': lambda: memoryview(b'12345678'), 'bytes': lambda: b'12345678',
    'every other': lambda: memoryview(bytearray(16))[::2], 'backwards': lambda: memoryview(bytearray(8))[::-1],
    'released': released, 'doubles': lambda: memoryview(array.array('d', [1.5, 2.5])),
    'array': lambda: array.array('d', [1.5, 2.5]), 'empty': lambda: memoryview(bytearray()),
    'two dimensions': lambda: memoryview(bytearray(range(24))).cast('B', (4, 6)),
    'no dimension': lambda: memoryview(bytearray(range(8))).cast('d', ()),
    'zeros in its shape': lambda: (ctypes.c_char * 0 * 3)(), 'of 3 by 4': lambda: (ctypes.c_int * 4 * 3)(),
    'little-endian': lambda: (ctypes.c_int * 4)(1, 2, 3, 4), 'structures': lambda: (Pair * 3)(),
    'StringIO': io.StringIO, 'BytesIO': lambda: io.BytesIO(b'12345678'),
}

VECTORS = {
    'generator': lambda: (one for one in [bytearray(8)]), 'iterator': lambda: iter([bytearray(8)]),
    'dict': lambda: {0: bytearray(8)}, 'set': set, 'bytes': lambda: b'1234', 'str': lambda: 'text',
    'endless': Endless, 'liar': lambda: Liar(), 'liar of 2': lambda: Liar([bytearray(3), bytearray(4)]),
    'range': lambda: range(3), 'view': lambda: memoryview(b'1234'), 'mixed': lambda: [bytearray(3), None],
    'none of many': lambda: [bytearray()] * 1024, 'too many': lambda: [bytearray(1)] * 1025,
}


def as_bytes(one):
    try:
        return bytes(one)
    except (TypeError, ValueError):
        return type(one)


@pytest.mark.parametrize('flags', DIRECT, ids=['buffered', 'direct'])
@pytest.mark.parametrize('name', ['preadv', 'readv', 'pwrite', 'pwritev', 'write', 'writev'])
def test_buffers_get_the_answer_of_os(two, folder, name, flags):
    """O_DIRECT does not matter: what it would refuse is done in another way."""
    ours = os.open(os.path.join(folder, 'ours'), os.O_RDWR | flags)
    theirs = two[1]
    wrong = {}
    cases = [(label, make, False) for label, make in BUFFERS.items()]
    if name.endswith('v'):
        cases += [(label, make, True) for label, make in VECTORS.items()]
    for offset in (0, 3, 4096) if name.startswith('p') else (None,):
        for label, make, is_vector in cases:
            fill(*two)
            if flags:
                os.fsync(two[0])        # or O_DIRECT finds dirty pages
            answers = []
            for module, fd in ((greenaio.os, ours), (os, theirs)):
                os.lseek(fd, 0, os.SEEK_SET)
                buffers = make() if is_vector else [make()]
                given = buffers if name.endswith('v') else buffers[0]
                answer = outcome(getattr(module, name), fd, given, *(() if offset is None else (offset,)))
                seen = [as_bytes(one) for one in buffers] if isinstance(buffers, list) else None
                at = 0 if fd == ours else 1
                answers.append((answer, seen, os.pread(two[at], SIZE, 0), os.lseek(fd, 0, os.SEEK_CUR)))
            if answers[0] != answers[1]:
                wrong[label, offset] = [answer[:2] + answer[3:] for answer in answers]
    os.close(ours)
    assert not wrong, '\n'.join(f'{key}: {value}' for key, value in wrong.items())


# What is no file ---------------------------------------------------------------------------------

def epoll():
    poll = select.epoll()
    fd = os.dup(poll.fileno())
    poll.close()
    return fd, ()


def one_end(make, end):
    def made():
        fds = list(make())
        fd = fds.pop(end)
        return fd, fds
    return made


def sockets():
    return [one.detach() for one in socket.socketpair(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK)]


ODD_FDS = {     # each gives an fd, and others to close after it
    'folder': lambda: (os.open('/tmp', os.O_RDONLY), ()), 'path': lambda: (os.open('/tmp', os.O_PATH), ()),
    'pipe to read': one_end(lambda: os.pipe2(os.O_NONBLOCK), 0), 'pipe to write': one_end(os.pipe, 1),
    'pipe nobody reads': lambda: (lambda fds: (fds[1], os.close(fds[0]) or ()))(os.pipe()),
    'waiting pipe to read': one_end(os.pipe, 0), 'socket': one_end(sockets, 0), 'epoll': epoll,
    'memfd': lambda: (os.memfd_create('hostile'), ()), 'inotify': lambda: (ctypes.CDLL(None).inotify_init1(os.O_NONBLOCK), ()),
    'null': lambda: (os.open('/dev/null', os.O_RDWR), ()), 'closed': lambda: (CLOSED, ()), '-1': lambda: (-1, ()),
    'AT_FDCWD': lambda: (HERE, ()), 'full': lambda: (os.open('/dev/full', os.O_RDWR), ()),
    'sealed': lambda: (sealed(), ()), 'write-only': lambda: (os.open('/dev/null', os.O_WRONLY), ()),
}


def sealed():
    fd = os.memfd_create('sealed', os.MFD_ALLOW_SEALING)
    os.write(fd, b'sealed')
    fcntl.fcntl(fd, 1033, 0xf)          # F_ADD_SEALS: all
    return fd


@pytest.mark.parametrize('odd', ODD_FDS)
def test_what_is_no_file_gets_the_answer_of_os(two, odd):
    wrong = {}
    calls = [(name, args) for name, (args, _) in CALLS.items() if name not in ('open', 'close')]
    calls += [('pread', (Fd, 10, -1)), ('preadv', (Fd, [bytearray(9)], -1, 0)), ('readv', (Fd, [])),
              ('pwritev', (Fd, [b'data'], -1, 0)), ('writev', (Fd, [])), ('write', (Fd, b'')), ('read', (Fd, 0))]
    for name, args in calls:
        if odd == 'waiting pipe to read' and (name in ('read', 'readv') or args[2:3] == (-1,)):
            continue                    # os would wait for ever
        if (odd, name) == ('-1', 'stat'):
            continue
        for at in [i for i, one in enumerate(args) if one is Fd]:
            fill(*two)
            answers = []
            for module, fd in zip((greenaio.os, os), two):
                strange, others = ODD_FDS[odd]()
                given = [fd if one is Fd else one for one in args]
                given[at] = strange
                with gevent.Timeout(0.5, RuntimeError(f'{name} hangs')):
                    answer = outcome(getattr(module, name), *given)
                answers.append('an inode' if isinstance(answer, tuple) and len(answer) == 7 else answer)
                for one in (strange, *others):
                    if 0 <= one < CLOSED:
                        os.close(one)
            if answers[0] != answers[1]:
                wrong[name, at] = answers
    assert not wrong, '\n'.join(f'{key}: {value}' for key, value in wrong.items())
