"""Patches `os`, `io` and the built-in ``open``, in gevent's own way, so that programs need no change.

``gevent.monkey.patch_all(greenaio=True)``, or ``GREENAIO_PATCH=1`` in the environment of a program that calls
``gevent.monkey.patch_all()`` (a gunicorn gevent worker does), or `patch_all` here. ``GREENAIO_PATCH=os`` and
``GREENAIO_PATCH=open`` patch one part alone, and ``GREENAIO_PATCH=0`` turns all of it off. What is patched
behaves as before; where no greenlet can wait, the original is called. Installed but not asked for, it does
nothing. Code in C that reads files by itself is untouched: sqlite3, mmap, dbm, the import system.
"""

from __future__ import annotations

import abc
import contextlib
import copyreg
import errno
import functools
import importlib._bootstrap
import io
import os
import pathlib
import posix
import socket
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import gevent.os
import gevent.thread  # type: ignore[import-not-found]
import gevent.util
from gevent._hub_local import get_hub_if_exists
from gevent.monkey import get_original, patch_item  # type: ignore[attr-defined]

import greenaio.os
from greenaio import fileobject
from greenaio._config import check_environment
from greenaio._core.handle import in_use
from greenaio._core.uninterrupted import is_uninterrupted
from greenaio._files import loop as _loop
from greenaio._files import position as _position
from greenaio._files import sharing as _sharing
from greenaio._files.extension import _calls
from greenaio._files.waiter import can_wait
from greenaio._operate import blocked as _blocked

__all__ = ['is_patched', 'patch_all', 'patch_builtins', 'patch_locks', 'patch_multiprocessing',
           'patch_os', 'unpatch_all']

class _Builtin(staticmethod):       # type: ignore[type-arg]
    """A function that behaves as a built-in one of *module*: no method of a class that keeps it.

    With ``open = os.open`` in the body of a class, ``self.open(path, flags)`` does not pass *self*. The base
    is `staticmethod` because that forwards a call in C; a ``__call__`` of our own would cost a frame.
    """

    def __init__(self, function: Callable[..., Any], module: str) -> None:
        function.__module__ = module
        function.__annotations__ = {}   # those of ours name types that the module does not have
        super().__init__(function)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self

    def __reduce__(self) -> str:
        return self.__name__            # pickle looks for it in its module

    def __repr__(self) -> str:
        return f'<built-in function {self.__name__}>'


_USUAL = frozenset({int, str, bytes})
_IS_PATH = {'open': 'string, bytes or os.PathLike', 'stat': 'string, bytes, os.PathLike or integer',
            'lstat': 'string, bytes or os.PathLike'}
_IS_FD = {'stat', 'fsync', 'fdatasync'}     # the others take a bool for a number without a word


def _as_usual(name: str, value: Any) -> Any:
    """Return *value*, the first argument of the call *name*, as an object of one of the usual types if it is
    one that `os` takes with a warning. Warn as `os` does, from the line of the caller."""
    if isinstance(value, bool) and name in _IS_FD:
        if sys.version_info >= (3, 13):
            warnings.warn('bool is used as a file descriptor', RuntimeWarning,
                          stacklevel=fileobject.level_of_caller())
        return int(value)
    if (name in _IS_PATH and sys.version_info < (3, 12) and not isinstance(value, bytes)
            and not hasattr(value, '__fspath__')):
        try:
            path = bytes(memoryview(value))
        except TypeError:
            return value
        warnings.warn(f'{name}: path should be {_IS_PATH[name]}, not {type(value).__name__}',
                      DeprecationWarning, stacklevel=fileobject.level_of_caller())
        return path
    return value


# Calls that share a file's position or sectors with parked greenlets, and which argument is the file's fd.
_GUARDED = {'copy_file_range': 1, 'ftruncate': 0, 'posix_fallocate': 0, 'pwrite': 0, 'pwritev': 0, 'read': 0,
            'readv': 0, 'sendfile': 0, 'write': 0, 'writev': 0}


@contextlib.contextmanager
def _naming(value: Any) -> Iterator[None]:
    """Let an error that names its file name it by *value*, which the caller passed."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            error.filename = value
        raise


def _cooperative(name: str) -> Callable[..., Any]:
    original, ours = getattr(posix, name), getattr(greenaio.os, name)
    guarded = _GUARDED.get(name, sys.maxsize)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if args and type(args[0]) not in _USUAL:
            usual = _as_usual(name, args[0])
            if usual is not args[0]:
                with _naming(args[0]):
                    return call(usual, *args[1:], **kwargs)
        if can_wait():
            return ours(*args, **kwargs)
        if guarded < len(args) and is_uninterrupted() and type(args[guarded]) is int:
            return _position.blocking(original, *args, place=guarded, **kwargs)
        return original(*args, **kwargs)

    return call


# Fds that gevent's ``os.close`` is about to close (from gevent 25.8 on).
_closing = getattr(gevent.os, '_closing_fd_to_event', None)


def _is_watched(hub: Any, fd: int) -> bool:
    """Whether greenlets wait for *fd* in the loop, which `gevent.os.close` wakes before it closes the fd."""
    if _closing is None:
        return False
    _loop.lose(fd)
    return fd in _closing or not in_use(fd) and bool(hub.loop.closing_fd(fd))


@functools.wraps(posix.close)
def _close(fd: int) -> None:
    hub = get_hub_if_exists()
    if hub is not None and type(fd) is int and _is_watched(hub, fd):
        try:
            gevent.os.close(fd)
        except OSError:                 # it was closed before, which gevent says without an errno
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None
    else:
        _calls.close(fd, may_wait=can_wait())


@functools.wraps(posix.lstat)
def _lstat(path: Any, *, dir_fd: int | None = None) -> os.stat_result:
    stat: Callable[..., os.stat_result] = _Os.stat  # type: ignore[attr-defined]
    usual = path if type(path) in _USUAL else _as_usual('lstat', path)
    with contextlib.nullcontext() if usual is path else _naming(path):
        return stat(os.fspath(usual), dir_fd=dir_fd, follow_symlinks=False)


@functools.wraps(posix.umask)
def _umask(mask: int, /) -> int:
    return _calls.umask(mask)


@functools.wraps(io.open)       # noqa: UP020
def _open(file: Any, mode: str = 'r', buffering: int = -1, encoding: str | None = None,
          errors: str | None = None, newline: str | None = None, closefd: bool = True,
          opener: fileobject.Opener | None = None) -> Any:
    return fileobject.open(file, mode, buffering, encoding, errors, newline, closefd, opener)


class _Os:
    """The names that `patch_os` copies into `os`."""

    __implements__ = [name for name in greenaio.os.__all__ if hasattr(posix, name)] + ['lstat', 'umask']


_OWN: dict[str, Callable[..., Any]] = {'close': _close, 'lstat': _lstat, 'umask': _umask}
for _name in _Os.__implements__:
    setattr(_Os, _name, _Builtin(_OWN.get(_name) or _cooperative(_name), 'os'))


class _Builtins:
    """What it copies into `builtins` and `io`."""

    __implements__ = ['open']
    open = _Builtin(_open, 'io')


# Objects of `io`'s own classes on one of these have no file of ours below, so they stay `io`'s, and as fast.
_FOREIGN = frozenset({io.FileIO, io.BytesIO, socket.SocketIO})
_LAYERS = frozenset({io.BufferedReader, io.BufferedWriter, io.BufferedRandom})


def _is_foreign(below: Any) -> bool:
    kind = type(below)
    return kind in _FOREIGN or kind is _PLAIN_PAIR or kind in _LAYERS and type(below.raw) in _FOREIGN


_PLAIN_PAIR = io.BufferedRWPair


class _Kind(abc.ABCMeta):
    """The class of classes that stand for those of `io`, and of their subclasses."""

    @property
    def __signature__(cls) -> Any:
        """What `inspect` would find without our ``__new__``. Raises AttributeError if a subclass has one."""
        import inspect  # hardly ever

        ours = next(kind for kind in cls.__mro__ if vars(_Io).get(kind.__name__) is kind)
        if cls.__new__ is not ours.__new__:
            raise AttributeError('__signature__')
        if cls.__init__ is ours.__init__:   # type: ignore[misc]
            return inspect.signature(get_original('io', ours.__name__))
        found = inspect.signature(cls.__init__)     # type: ignore[misc]
        return found.replace(parameters=[*found.parameters.values()][1:])


def _pickle_kind(kind: _Kind) -> Any:
    """Name a class for pickle: in `_io`, where those of `io` say that they are, it would find another."""
    import pkgutil  # hardly ever

    name = kind.__qualname__
    return (pkgutil.resolve_name, (f'io:{name}',)) if vars(_Io).get(name) is kind else name


copyreg.pickle(_Kind, _pickle_kind)


def _stand_in(name: str) -> type:
    """A class to stand in `io` for the one called *name*: its objects may be shared by greenlets.

    `gzip` and others read and write through such an object. With one of `io`'s own, a second greenlet that
    comes while the file below waits would get ``RuntimeError: reentrant call``.

    ``sys.stdin``, subclasses from before the patch and all else that is of `io`'s own class counts as an
    instance or subclass of this one. That takes a metaclass; one derived from ABCMeta goes with most.
    """
    plain, ours = getattr(io, name), getattr(fileobject, name)

    def __new__(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is stand_in and args and all(map(_is_foreign, args[:_FILES_BELOW.get(name, 1)])):
            return plain(*args, **kwargs)
        return ours.__new__(cls)

    def __subclasshook__(cls: Any, kind: type) -> Any:
        return issubclass(kind, plain) if cls is stand_in else NotImplemented

    stand_in: Any = _Kind(name, (ours,), {
        '__new__': __new__, '__subclasshook__': classmethod(__subclasshook__), '__doc__': plain.__doc__,
        '__module__': plain.__module__})
    return stand_in  # type: ignore[no-any-return]


_FILES_BELOW = {'BufferedRWPair': 2}


class _Io:
    """What it copies into `io`."""

    __implements__ = ['BufferedReader', 'BufferedWriter', 'BufferedRandom', 'BufferedRWPair', 'TextIOWrapper']


for _name in _Io.__implements__:
    setattr(_Io, _name, _stand_in(_name))


def _copy_into(module: Any, source: Any) -> None:
    """Put the names that *source* implements into *module*; gevent keeps the originals.

    gevent's `patch_module` does so, too. But it also tells subscribers of `gevent.events` of one more module,
    when they have heard already that all are patched.
    """
    for name in source.__implements__:
        patch_item(module, name, getattr(source, name))


# Calls that copy a number or pass it on: from then on other code may move the position of its file.
_SHARING = (
    ('os', 'dup'), ('os', 'dup2'), ('os', 'set_inheritable'), ('os', 'posix_spawn'), ('os', 'posix_spawnp'),
    ('socket', 'send_fds'), ('_posixsubprocess', 'fork_exec'),
    ('gevent.subprocess', 'Popen._execute_child'), ('subprocess', 'Popen._execute_child'),
    ('multiprocessing.reduction', 'sendfds'),
)
_sharing_calls: list[tuple[Any, str, Any]] = []     # owner, name, the original


def _watch_numbers() -> None:
    """Have `_sharing` hear of each number that the program copies or passes on."""
    for module, path in _SHARING:
        *owners, name = path.split('.')
        try:
            owner: Any = functools.reduce(getattr, owners, sys.modules[module])
            call = getattr(owner, name)
        except (KeyError, AttributeError):      # not imported, or another version of it
            continue
        if not hasattr(call, '_greenaio_shares'):
            setattr(owner, name, _sharing_call(call))
            _sharing_calls.append((owner, name, call))
    _sharing.watch(True)


def _sharing_call(call: Any) -> Any:
    @functools.wraps(call)
    def sharing(*args: Any, **kwargs: Any) -> Any:
        _sharing.share(args)
        _sharing.share([*kwargs.values()])
        return call(*args, **kwargs)

    shares = sharing if isinstance(call, types.FunctionType) else _Builtin(sharing, call.__module__)
    shares._greenaio_shares = True      # type: ignore[union-attr]
    return shares


def _stop_watching_numbers() -> None:
    while _sharing_calls:
        owner, name, call = _sharing_calls.pop()
        setattr(owner, name, call)
    _sharing.watch(False)


def patch_os() -> None:
    """Replace in `os` the calls that `greenaio.os` has, ``lstat`` and ``umask``, by cooperative ones. Twice
    is fine."""
    check_environment()
    _calls.learn_umask()
    _watch_numbers()
    _copy_into(os, _Os)
    for ours, names in _supported():
        names.add(ours)
    _replace_copies()


def _supported() -> Iterator[tuple[Any, set[Any]]]:
    """Each of ours and the sets of `os` that say what it can, in which `shutil` and others look it up."""
    for name in _Os.__implements__:
        for names in (os.supports_dir_fd, os.supports_effective_ids, os.supports_fd,
                      os.supports_follow_symlinks):
            if get_original('os', name) in names:
                yield getattr(_Os, name), names


def patch_builtins() -> None:
    """Replace the built-in ``open`` and ``io.open``, which `pathlib`, `tempfile`, `logging` and others call,
    and the classes of `io` that buffer, of which `gzip` makes objects over a file. Twice is fine."""
    check_environment()
    for module in _modules():
        _copy_into(module, _Builtins)
    _copy_into(io, _Io)
    _replace_copies()


def _modules() -> list[Any]:
    return [sys.modules['builtins'], io]


# Modules of the standard library that keep a copy of a name from their import on. gevent's look-up of plugins
# imports some of them, so that even a program whose first line patches would find the old functions there.
_COPIES = [('bz2', '_builtin_open'), ('tarfile', 'bltn_open'), ('tokenize', '_builtin_open')]


def _replace_copies() -> None:
    """Have those that keep a copy keep one of what `os` and `io` have now."""
    for module, name in _COPIES:
        if module in sys.modules:
            setattr(sys.modules[module], name, io.open)
    if 'tarfile' in sys.modules:        # files of an archive are objects of a subclass
        sys.modules['tarfile'].ExFileObject.__bases__ = (io.BufferedReader,)
    accessor = getattr(pathlib, '_NormalAccessor', None)    # of Python 3.10
    if accessor is not None:
        accessor.open, accessor.stat = io.open, os.stat


# Locks that a module makes when it is imported, and holds over calls that are cooperative now. A name such as
# <lock> is that of a variable which a function has from the function around it.
# If the import came before gevent's patch, the lock is a native one: the second greenlet that wants it stops
# the thread, and with it the greenlet that has it. gevent's search for plugins imports `tempfile`; some
# programs import the others early. gevent replaces those of `logging`, `threading`, `concurrent.futures`.
_LOCKS = (
    ('tempfile', '_once_lock'),
    ('_pyio', 'Lock'),          # the function that makes them, of which it keeps the native one
    ('multiprocessing.forkserver', '_forkserver._lock'),
    ('multiprocessing.heap', 'BufferWrapper._heap._lock'),
    ('multiprocessing.resource_sharer', '_resource_sharer._lock'),
    ('multiprocessing.resource_tracker', '_resource_tracker._lock'),
    ('sysconfig', '_CONFIG_VARS_LOCK'),
    ('webbrowser', '_lock'),
    ('dateutil.tz', 'gettz._cache_lock'),
    ('prometheus_client.registry', 'REGISTRY._lock'),
    ('prometheus_client.values', 'ValueClass.inc.<lock>'),  # gunicorn.conf.py imports it, before the patch
)
_replaced_locks: list[tuple[Any, str, Any]] = []        # where they are: owner, name; and the native lock


def patch_locks() -> None:
    """Replace native locks by gevent's, where a module of the standard library, `prometheus_client` or
    `dateutil` made one before gevent's patch and holds it while it uses files. A lock that is held just now
    stays. Twice is fine."""
    for module, path in _LOCKS:
        *owners, name = path.split('.')
        try:
            owner: Any = functools.reduce(getattr, owners, sys.modules[module])
            if name.startswith('<'):
                owner, name = _variable(owner, name[1:-1]), 'cell_contents'
            lock = getattr(owner, name)
        except (KeyError, AttributeError, ValueError):      # not imported, or another version of it
            continue
        cooperative = _cooperative_lock(lock)
        if cooperative is not None:
            setattr(owner, name, cooperative)
            _replaced_locks.append((owner, name, lock))
    _let_greenlets_wait_for_imports()


def _variable(function: Any, name: str) -> Any:
    """The cell with the variable *name* of *function*. Raises ValueError if it has none."""
    return function.__closure__[function.__code__.co_freevars.index(name)]


def _let_greenlets_wait_for_imports() -> None:
    """Replace the lock in which greenlets wait for a module that is being imported now, such as a package
    whose ``__init__`` patches. The import system made it before the patch."""
    bootstrap: Any = importlib._bootstrap
    for ref in list(bootstrap._module_locks.values()):
        lock = ref()
        cooperative = _cooperative_lock(getattr(lock, 'wakeup', None))
        if cooperative is not None:
            lock.wakeup = cooperative


def _cooperative_lock(lock: Any) -> Any:
    """Return the lock that replaces *lock*; None if *lock* is not native, or is held."""
    allocate: Any = get_original('_thread', 'allocate_lock')
    if lock is allocate:
        return gevent.thread.allocate_lock
    if isinstance(lock, type(allocate())):
        return None if lock.locked() else gevent.thread.allocate_lock()
    # The recursive one of threads is native where gevent has not patched it.
    if not isinstance(lock, get_original('_thread', 'RLock')) or isinstance(threading.RLock(), type(lock)):
        return None
    if lock._is_owned() or not lock.acquire(False):
        return None
    lock.release()
    return threading.RLock()


def _unpatch_locks() -> None:
    while _replaced_locks:
        owner, name, lock = _replaced_locks.pop()
        setattr(owner, name, lock)


def patch_multiprocessing() -> None:
    """Make `multiprocessing` cooperative: its connections, and the locks, semaphores, conditions and queues
    that are made from now on. Twice is fine."""
    try:
        import _multiprocessing  # type: ignore[import-not-found]

        from greenaio._files import semaphore as _semaphore
    except ImportError:                 # a platform without semaphores
        return
    _copy_into(_multiprocessing, _semaphore)
    _let_connections_use(os.read, os.write)


def _unpatch_multiprocessing() -> None:
    module: Any = sys.modules.get('_multiprocessing')
    if module is not None and 'greenaio._files.semaphore' in sys.modules:
        module.SemLock = get_original('_multiprocessing', 'SemLock')
        _let_connections_use(get_original('os', 'read'), get_original('os', 'write'))


def _let_connections_use(read: Any, write: Any) -> None:
    """`multiprocessing.connection` keeps the calls that it found, as defaults of arguments."""
    module: Any = sys.modules.get('multiprocessing.connection')
    if module is not None:              # else it finds these
        module.Connection._recv.__defaults__ = (read,)
        module.Connection._send.__defaults__ = (write,)


# Its stub says that it returns nothing.
_plain_run_info: Callable[..., list[str]] = gevent.util.format_run_info  # type: ignore[assignment]


@functools.wraps(_plain_run_info)
def _format_run_info(*args: Any, **kwargs: Any) -> list[str]:
    """What `gevent.util.print_run_info` prints; and the files that greenlets wait for."""
    stars = '*' * 80
    waiting = greenaio.dump().splitlines()      # first: the other reads source files, and waits too
    return [*_plain_run_info(*args, **kwargs), stars, '* Greenlets that wait for a disk', stars, *waiting]


def patch_all() -> None:
    """`patch_os`, `patch_builtins`, `patch_locks` and `patch_multiprocessing`; and
    `greenaio.events.explain_blocked` for the calls that the patch does not reach.

    Call ``gevent.monkey.patch_all()`` before, for sockets and threads. Twice is fine."""
    patch_os()
    patch_builtins()
    patch_locks()
    patch_multiprocessing()
    _blocked.explain_blocked()
    gevent.util.format_run_info = _format_run_info  # type: ignore[assignment]


def unpatch_all() -> None:
    """Put back what was there before."""
    _blocked.stop_explaining()
    _unpatch_locks()
    _unpatch_multiprocessing()
    _stop_watching_numbers()
    if not is_patched():
        return
    for name in _Os.__implements__:
        setattr(os, name, get_original('os', name))
    for ours, names in _supported():
        names.discard(ours)
    for module in _modules():
        module.open = get_original(module.__name__, 'open')
    for name in _Io.__implements__:
        setattr(io, name, get_original('io', name))
    _replace_copies()
    gevent.util.format_run_info = _plain_run_info  # type: ignore[assignment]


def is_patched() -> bool:
    """Whether `patch_os` or `patch_builtins` was called, and not undone."""
    return os.read is _Os.read or io.open is _Builtins.open          # type: ignore[attr-defined]


def _did_patch_all(event: Any) -> None:
    """gevent's plugin: called at the end of each ``gevent.monkey.patch_all()``."""
    named = parts_named(os.environ.get('GREENAIO_PATCH', '').strip())
    asked = event.patch_all_kwargs.get('greenaio')
    if asked is None:
        asked = bool(named)
    if not asked or named == []:
        return
    if named in (None, [*PARTS]):
        patch_all()
    else:
        for part in named:
            PARTS[part]()


PARTS = {'os': patch_os, 'open': patch_builtins}


def parts_named(text: str) -> list[str] | None:
    """Return the parts that a value of GREENAIO_PATCH names: none for ``0``, all for ``1``, else those of a
    list with commas; None where it is empty. Raises ValueError."""
    if text in ('', '0', '1'):
        return {'': None, '0': [], '1': [*PARTS]}[text]
    parts = [part.strip() for part in text.split(',')]
    if not set(parts) <= set(PARTS):
        raise ValueError(f'GREENAIO_PATCH must be 0, 1, or a list of parts ({", ".join(PARTS)}), '
                         f'not {text!r}')
    return parts
