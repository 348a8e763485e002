"""Hostile arguments to every public call get the answer of `os`, `io` and `shutil`: HOSTILE of the matrix."""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import io
import os
import select
import shutil
import socket

import gevent
import pytest

import greenaio
import greenaio.monkey
import greenaio.os
from greenaio import File, aligned_buffer
from greenaio.block import BlockDevice
from tests.support.disks import pattern
from tests.support.processes import run_program, run_python

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
           'index str': Index(lambda: 'x'), 'index': Index(lambda: 1),
           'index of 2^64': Index(lambda: 1 << 64),
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

CALLS = {       # name: arguments that work, and by their number the values left out. os.stat(-1) is EFAULT
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
    'every other': lambda: memoryview(bytearray(16))[::2],
    'backwards': lambda: memoryview(bytearray(8))[::-1],
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
    'memfd': lambda: (os.memfd_create('hostile'), ()),
    'inotify': lambda: (ctypes.CDLL(None).inotify_init1(os.O_NONBLOCK), ()),
    'null': lambda: (os.open('/dev/null', os.O_RDWR), ()), 'closed': lambda: (CLOSED, ()),
    '-1': lambda: (-1, ()),
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
              ('pwritev', (Fd, [b'data'], -1, 0)), ('writev', (Fd, [])), ('write', (Fd, b'')),
              ('read', (Fd, 0))]
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


# What has no counterpart in os -------------------------------------------------------------------

REFUSALS = {    # what a number that is none, or is none that will do, comes to: one of these
    **dict.fromkeys(('None', 'float', 'str', 'bytes', 'object', 'list', 'index str'), {TypeError}),
    **dict.fromkeys(('-1', '-2', 'AT_FDCWD', '-2^63', '-2^63-1', '-2^1000'),
                    {(OSError, errno.EINVAL), OverflowError, ValueError}),
    **dict.fromkeys(('2^63-1', '2^63', '2^64', '2^1000', 'index of 2^64'),
                    {(OSError, errno.EINVAL), (OSError, errno.ENOSPC), (OSError, errno.EFBIG), OverflowError,
                     MemoryError, (OSError, errno.EOVERFLOW)}),
    **dict.fromkeys(('2^31-1', '2^31', '2^32'), {(OSError, errno.ENOSPC)}), 'refused': {Refused},
}

BLOCK_CALLS = {         # arguments that work, and which of them must lie in the device
    'pread': ((512, 0), ()), 'preadv': (([bytearray(512)], 0), ()), 'pwrite': ((b'data', 0), (1,)),
    'pwritev': (([b'data'], 0), (1,)), 'write_zeroes': ((512, 0), (0, 1)), 'discard': ((512, 0), (0, 1)),
    'block_status': ((512, 0), (0, 1)), 'resize': ((SIZE,), ()), 'pread_each': (([(512, 0)],), ()),
}


@pytest.mark.parametrize('direct', [False, True])
@pytest.mark.parametrize('name', BLOCK_CALLS)
def test_block_device_refuses_numbers_that_will_not_do(folder, name, direct):
    path = os.path.join(folder, 'image')
    with BlockDevice(path, direct=direct, create_size=SIZE) as device:
        device.pwrite(DATA, 0)
        args, limited = BLOCK_CALLS[name]
        call = getattr(device, name)
        if name == 'pread_each':        # its numbers are in pairs
            args, limited = (512, 0), ()

            def call(n, offset):
                return list(device.pread_each(iter([(n, offset)])))
        for at in range(len(args)):
            if not isinstance(args[at], int):
                continue
            for label, expected in REFUSALS.items():
                if label in GRANTED and at not in limited or (name, label) == ('resize', '2^63-1'):
                    continue            # zeros behind the end, or a sparse file
                given = list(args)
                given[at] = NUMBERS[label]
                answer = outcome(call, *given)
                if isinstance(answer, list) and isinstance(answer[0], OSError):
                    answer = type(answer[0]), answer[0].errno
                if isinstance(NUMBERS[label], Index) and answer is TypeError:
                    continue            # it reckons with them, and these can't be added to
                assert answer in expected, (at, label)
        assert device.pread(SIZE, 0) == DATA
        assert device.size == SIZE


@pytest.mark.parametrize('kwargs, error', [
    ({'iops': float('nan')}, ValueError), ({'bps': 'fast'}, TypeError), ({'iops': -1}, ValueError),
    ({'zone_size': 4096.5}, ValueError), ({'zone_size': 1 << 1000}, (ValueError, OverflowError, type(None))),
    ({'max_batch': 0}, ValueError), ({'max_batch': 1.5}, TypeError), ({'max_batch': 1 << 64}, OverflowError),
    ({'create_size': SIZE}, FileExistsError), ({'create_size': -1}, ValueError)])
def test_block_device_refuses_settings_that_will_not_do(tmp_path, kwargs, error):
    (tmp_path / 'image').write_bytes(DATA)
    try:
        BlockDevice(tmp_path / 'image', **kwargs).close()
        raised = None
    except Exception as caught:
        raised = caught
    assert isinstance(raised, error)


@pytest.mark.parametrize('make', [lambda path: File.__new__(File), lambda path: closed(File(path)),
                                  lambda path: closed(File(path, os.O_DIRECT)),
                                  lambda path: closed(BlockDevice(path))],
                         ids=['never opened', 'closed', 'closed direct', 'closed device'])
def test_closed_is_a_value_error(data_file, make):
    one = make(data_file)
    calls = {'pread': (9, 0), 'preadv': ([bytearray(9)], 0), 'pwrite': (b'data', 0),
             'pwritev': ([b'data'], 0), 'fsync': (), 'fdatasync': (), 'fileno': (), '__enter__': (),
             'flush': (), 'discard': (9, 0), 'write_zeroes': (9, 0), 'block_status': (9, 0),
             'read_cached': (bytearray(9),), 'begin': (True, bytearray(9), 0), 'fallocate': (0, 0, 9)}
    for name, args in calls.items():
        if hasattr(type(one), name):
            assert outcome(getattr(one, name), *args) is ValueError, name
    for name in ('kind', 'device', 'is_local', 'alignment', 'size'):
        if hasattr(type(one), name):
            assert outcome(getattr, one, name) is ValueError, name
    if isinstance(one, File):
        assert one.direct in (True, False)
    repr(one)
    one.close()


def closed(one):
    one.close()
    return one


class OpensOn:
    """A path that opens the file it is for, when it is asked."""

    def __init__(self, path):
        self._path, self.file = path, File.__new__(File)

    def __fspath__(self):
        self.file.__init__(self._path)


def test_file_is_opened_once(data_file):
    path = OpensOn(data_file)
    assert outcome(path.file.__init__, path) is ValueError
    assert path.file.closed
    path.file.__init__(data_file)       # that one failed, so this may
    assert outcome(path.file.__init__, data_file) is ValueError
    assert path.file.pread(SIZE, 0) == pattern(SIZE)
    path.file.close()


def test_end_wants_what_begin_returned(data_file):
    with File(data_file) as file:
        begun = file.begin(True, bytearray(SIZE), 0)
        for other in (None, 5, (), (None,) * 3, (begun[0], None, 0), (None, *begun[1:]), (begun[0], file, 0)):
            assert outcome(file.end, other) in (TypeError, ValueError)
        assert File.__new__(File).end(begun) == SIZE    # the fd was needed by begin() only
        assert file.end(begun) == SIZE                  # and the result is kept


def test_file_object_that_was_never_opened_dies_in_silence():
    run_python('''
        from greenaio.fileobject import FileIO
        for make in (FileIO, lambda: FileIO.__new__(FileIO), lambda: FileIO('/nowhere/file')):
            try:
                make()
            except (TypeError, FileNotFoundError):
                pass
    ''')


@pytest.mark.parametrize('path', [5, None, 1.5, b'a\0b', 'a\0b', '/nowhere/file'])
def test_patched_lstat_gets_the_answer_of_os(path):
    theirs, ours = outcome(os.lstat, path), outcome(greenaio.monkey._Os.lstat, path)
    assert ours == theirs


def test_file_of_what_is_no_fd_is_refused():
    for label, expected in {**REFUSALS, **dict.fromkeys(('-1', '-2', 'AT_FDCWD', 'closed', '2^31-1'),
                                                        {(OSError, errno.EBADF)})}.items():
        if label in ('2^31', '2^32', '-2^63'):
            expected = {OverflowError}
        assert outcome(File.from_fd, NUMBERS[label]) in expected, label


@pytest.mark.parametrize('args, error', [
    ((None,), TypeError), ((1.0,), TypeError), (('1',), TypeError), ((-1,), ValueError),
    (((1 << 63) - 1,), MemoryError), ((1 << 63,), OverflowError), ((1 << 1000,), OverflowError),
    ((Index(refuse),), Refused), ((8, 0), ValueError), ((8, 3), ValueError), ((8, 1 << 62), MemoryError),
    (((1 << 63) - 1, 1 << 62), MemoryError), ((8, 1 << 63), OverflowError), ((8, None), TypeError)])
def test_aligned_buffer_refuses(args, error):
    assert outcome(aligned_buffer, *args) is error


OPENED = {'mode': ['q', 'rw', '', '+', 'rr', 'bt', 'rU', 'w+x', 'a\0', '\ud800', None, 7, b'r'],
          'buffering': [None, 1.0, '1', -2, 0, 1, 1 << 1000, Index(refuse), Index(lambda: 7),
                        Index(lambda: 'x')],
          'encoding': [7, b'utf-8', 'latin-17', 'a\0b', '\ud800'], 'errors': [7, b'strict'],
          'newline': [7, 'x', b'\n'], 'closefd': [False, 0],
          'opener': [7, refuse, *(lambda *args, value=value: value
                                  for value in (None, -1, 1.5, '1', 1 << 31))],
          'file': [None, 1.0, [], object(), Index(refuse), -1, HERE, CLOSED, '', 'a\0b', '/nowhere/file',
                   b'/tmp', '/tmp']}


@pytest.mark.parametrize('name', OPENED)
def test_open_gets_the_answer_of_io(data_file, name):
    for value in OPENED[name]:
        answers = []
        for function in (greenaio.open, io.open):
            answer = outcome(function, **{'file': data_file, name: value})
            if isinstance(answer, io.IOBase):
                answer.close()
                answer = 'a file'
            answers.append(answer)
        assert answers[0] == answers[1], value


def test_copyfile_gets_the_answer_of_shutil(folder):
    path, new = os.path.join(folder, 'data'), os.path.join(folder, 'new')
    with open(path, 'wb') as file:
        file.write(DATA)
    for value in (None, 1.5, [], object(), Index(refuse), '', 'a\0b', folder, '/nowhere/file', path):
        for args in ((value, new), (path, value)):
            theirs, ours = (outcome(module.copyfile, *args) for module in (shutil, greenaio))
            assert ours == theirs, args
    assert outcome(greenaio.copyfile, path, new, progress=7) is TypeError
    assert outcome(greenaio.copyfile, path, new, progress=refuse) is Refused


# What changes meanwhile --------------------------------------------------------------------------

class Closing:
    """A sequence, or a number, that does something else first."""

    def __init__(self, act):
        self._act = act

    def __len__(self):
        return 1

    def __getitem__(self, i):
        self._act()
        return b'data'

    def __index__(self):
        self._act()
        return 0


@pytest.mark.parametrize('args', [lambda act: (Closing(act), 0), lambda act: ([b'data'], Closing(act)),
                                  lambda act: ([b'data'], 0, Closing(act))])
def test_file_closed_by_its_own_arguments_writes_into_no_other(two, folder, args):
    fill(*two)
    path = os.path.join(folder, 'ours')
    file = File(path, os.O_RDWR)
    number = file.fileno()

    def reuse():
        file.close()
        os.dup2(two[1], number)

    assert outcome(file.pwritev, *args(reuse)) is ValueError
    os.close(number)
    assert os.pread(two[1], SIZE, 0) == DATA


@pytest.mark.parametrize('nbytes', [1000, 4096])
def test_list_changed_in_flight_changes_nothing(data_file, nbytes):
    """Direct: 1000 bytes are read into memory of ours, and copied when they are there."""
    file = File(data_file, os.O_DIRECT)
    mine, other = aligned_buffer(nbytes), bytearray(nbytes)
    buffers = [mine, aligned_buffer(nbytes)]
    second = buffers[1]
    reading = gevent.spawn(file.preadv, buffers, 4096)
    gevent.spawn(buffers.__setitem__, slice(None), [other]).join()  # runs when that has parked
    assert reading.get() == 2 * nbytes
    assert bytes(mine) + bytes(second) == pattern(16384)[4096:4096 + 2 * nbytes]
    assert other == bytes(nbytes)
    file.close()


@pytest.mark.parametrize('flags', DIRECT, ids=['buffered', 'direct'])
def test_bytearray_is_not_resized_in_flight_and_is_afterwards(disk_folder, flags):
    path = os.path.join(disk_folder, 'data')
    with open(path, 'wb') as file:
        file.write(DATA)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    file = File(path, os.O_RDWR | flags)
    for call in (file.preadv, file.pwritev):
        for _ in range(100):            # now and then the call is done before its greenlet could park
            buffer = bytearray(DATA)
            moving = gevent.spawn(call, [buffer], 0)
            gevent.sleep(0)             # it begins
            was_under_way = not moving.ready()
            tried = outcome(buffer.extend, b'more') if was_under_way else None
            assert moving.get() == SIZE
            if was_under_way:
                break
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert tried is BufferError
        assert buffer == DATA
        buffer.extend(b'more')
        assert os.path.getsize(path) == SIZE
    file.close()


# Re-entered --------------------------------------------------------------------------------------


@pytest.mark.parametrize('mode', ['del', 'weakref', 'gc', 'callback', 'signal', 'raise', 'thread'])
def test_reentered_from_anywhere_it_reads_right_or_says_why_not(data_file, mode):
    # gevent prints what was raised
    done = run_program('reentrant', data_file, mode, check=mode != 'raise')
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'intact\n'
