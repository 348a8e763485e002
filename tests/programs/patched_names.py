"""Print what a program sees of the names that greenaio patches, in a process that is *plain* or *patched*."""

import sys

if sys.argv[1] == 'patched':
    import gevent.monkey
    gevent.monkey.patch_all(greenaio=False)
    import greenaio.monkey
    greenaio.monkey.patch_all()
    gevent.get_hub()

import array
import contextlib
import copy
import functools
import inspect
import io
import os
import pathlib
import pickle
import re
import typing
import unittest.mock
import warnings
from typing import Any

base = sys.argv[2]
path, written = base + '/file', base + '/written'
for name in (path, written):
    with open(name, 'w') as file:
        file.write('hello')
fd, directory = os.open(path, os.O_RDWR), os.open(base, os.O_RDONLY)
KEEP = array, contextlib       # for the cases below


class Index:
    def __index__(self):
        return fd


class Path:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return self.path


class Fileno:
    def fileno(self):
        return 'x'


class Bytes(bytes):
    pass


def show(*label, call, arguments=()):
    """Print what *call* returns or raises, and its warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        try:
            outcome = repr(call(*arguments))
        except Exception as error:
            # The text of some counts arguments, in the words of C or of Python.
            text = '' if isinstance(error, (TypeError, OverflowError)) else str(error)
            outcome = f'{type(error).__name__} {text} {getattr(error, "filename", None)!r}'
        # A file in a frame of ours that an exception went through is warned of later.
        warned = [f'{one.category.__name__} {one.message} '
                  f'{one.filename if one.category is not ResourceWarning else ""}' for one in seen]
    line = ' '.join(map(str, [*label, outcome, *warned]))
    print(re.sub('0x[0-9a-f]+|(?<=name=)[0-9]+', '#', line).replace(base, 'BASE'))


NAMES = ('close', 'copy_file_range', 'fdatasync', 'fstat', 'fsync', 'ftruncate', 'lstat', 'open',
         'posix_fallocate', 'pread', 'preadv', 'pwrite', 'pwritev', 'read', 'readv', 'sendfile', 'stat',
         'umask', 'write', 'writev')
LOOKS = (repr, inspect.signature, inspect.getdoc, inspect.isroutine, inspect.isfunction, inspect.isclass,
         inspect.ismethod, inspect.iscoroutinefunction, inspect.getsource, typing.get_type_hints,
         functools.partial, callable, bool)
ARGUMENTS: Any = ([], [None], [1.5], [9999], [-1], [''], [b''], ['no\0', 0], ['/nowhere/x', 0],
                  [b'/nowhere/y', 0],
                  [Bytes(b'/nowhere')], [pathlib.Path('/nowhere')], [Path(7)], [Path(b'/nowhere')],
                  [Fileno()], range(9))
calls = {f'os.{name}': getattr(os, name) for name in NAMES}


def look_at(name, call):
    for attribute in ('__name__', '__qualname__', '__doc__'):
        show(name, attribute, call=getattr, arguments=[call, attribute])
    for look in LOOKS:
        show(name, look.__name__, call=look, arguments=[call])
    show(name, 'the same', call=lambda: [
        copy.copy(call) is call, copy.deepcopy(call) is call, {call: 1}[call],
        pickle.loads(pickle.dumps(call)) is call, type('Kept', (), {'call': call})().call is call])
    needed = [one for one in inspect.signature(call).parameters.values() if one.default is one.empty]
    with unittest.mock.patch(name if '.' in name else 'builtins.open', autospec=True) as double:
        double.return_value = 5
        show(name, 'mocked', call=lambda: eval(name)(*needed))
    for arguments in ARGUMENTS if name != 'os.umask' else ():
        show(name, arguments, call=call, arguments=arguments)
    show(name, 'keyword', call=lambda: call(nonsense=1))


for name, call in {**calls, 'open': open, 'io.open': io.open}.items():
    look_at(name, call)
for name in ('supports_dir_fd', 'supports_fd', 'supports_follow_symlinks', 'supports_effective_ids'):
    show(name, call=list, arguments=[[call in getattr(os, name) for call in calls.values()]])

CASES = r"""
os.stat('file', dir_fd=directory).st_size
os.stat(fd, dir_fd=directory)
os.stat(fd, follow_symlinks=False)
os.stat(path=path, follow_symlinks='yes').st_size
os.stat(Index()).st_size
os.stat('x/' * 3000)
os.lstat(path.encode()).st_size
os.lstat(fd)
os.fsync(open(path))
os.open(path, 0, 'x')
os.open(path, 1.0)
os.open(base, os.O_WRONLY)
os.open(path, os.O_CREAT | os.O_EXCL)
os.open('no', 0, dir_fd=9999)
os.open('no', 0, dir_fd=1.5)
os.get_inheritable(os.open(path, flags=0, mode=7, dir_fd=None))
os.read(fd, -1)
os.read(fd, '1')
os.read(directory, 1)
os.pread(fd, -1, 0)
os.pread(fd, 1, -1)
os.pread(fd, 1, (1 << 63) - 1)
os.pwrite(fd, 'text', 0)
os.pwrite(fd, memoryview(b'abcd')[::2], 0)
os.write(fd, array.array('i', [1]))
os.write(directory, b'x')
os.readv(fd, [])
os.readv(fd, [b'x'])
os.readv(fd, None)
os.writev(fd, ['text'])
os.writev(fd, [b'a'] * 2000)
os.preadv(fd, [bytearray(3)], 0, 1 << 20)
os.ftruncate(directory, 3)
os.ftruncate(fd, -3)
os.posix_fallocate(fd, 0, 0)
os.posix_fallocate(directory, 0, 5)
os.copy_file_range(fd, fd, -1)
os.copy_file_range(fd, fd, 2, 0, 1)
os.sendfile(9999, fd, None, 1)
[os.umask(True), os.umask(0o7777), os.umask(-1), os.umask(0o22)]
os.umask('x')
os.fdopen('x')
[open(path), open(path, 'rb'), open(path, 'rb', 0), open(path, 'r+b'), os.fdopen(os.dup(fd)), io.FileIO(path)]
[isinstance(open(path, 'rb'), kind) for kind in vars(io).values() if isinstance(kind, type)]
[isinstance(open(path, 'rb', 0), kind) for kind in vars(io).values() if isinstance(kind, type)]
[isinstance(open(path), kind) for kind in vars(io).values() if isinstance(kind, type)]
(lambda f: [f.name, f.mode, f.buffer.name, f.buffer.mode, f.buffer.raw.mode, f.isatty()])(open(path))
open(None)
open(1.5)
open(Index(), closefd=False).read()
open(path, 'rb', 1).read()
open(path, 'U')
open(path, 'r\0')
open(path, buffering=1.5)
open(path, buffering=-5).read()
open(path, mode=b'r')
open(path, encoding='nope')
open(path, errors=b'strict')
open(path, newline='x')
open(path, closefd=False)
open(path, opener=5)
open(path, opener=lambda *a: -1)
open(path, 'rb', encoding='ascii')
open(path, direct=True)
pickle.dumps(open(path))
copy.copy(open(path, 'rb', 0))
open(path, 'rb', 0).read(Index()) is None
open(path, 'rb', 0).read(True)
open(path, 'rb', 0).read(1.5)
open(path, 'rb', 0).read(None)
open(path, 'rb', 0).readinto(b'xx')
open(path, 'rb', 0).readinto('xx')
open(path, 'rb').readinto(None)
open(path, 'rb', 0).write(b'x')
open(written, 'wb', 0).read()
open(written, 'wb', 0).write('text')
open(written, 'wb', 0).truncate(1.5)
open(path, 'rb', 0).seek(-1)
open(path, 'rb').seek(1, 9)
open(path).seek(1, 1)
(lambda f: [f.close(), f, f.closed])(open(path, 'rb', 0))
(lambda f: [f.close(), f.read()])(open(path, 'rb', 0))
(lambda f: [f.close(), f.fileno()])(open(path))
(lambda f: [f.detach(), f])(open(path))
[repr(kind) for kind in map(io.__dict__.get, io.__all__)]
[inspect.signature(getattr(io, name)) for name in dir(io) if name.startswith('Buffered') or name == 'FileIO']
inspect.signature(io.TextIOWrapper)
inspect.signature(type('Sub', (io.BufferedReader,), {}))
inspect.signature(type('Sub', (io.BufferedReader,), {'__init__': lambda self, one, two=2: None}))
inspect.signature(type('Sub', (io.BufferedReader,), {'__new__': lambda cls, one, three=2: None}))
io.BufferedReader(5)
io.TextIOWrapper()
"""
for case in CASES.strip().splitlines():
    show(case, call=eval, arguments=[case])
