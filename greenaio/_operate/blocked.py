"""Say what file a hub is blocked on, in the reports of gevent's monitor thread.

That thread finds that a hub has not run for too long, and where in Python it is. This asks the kernel in
which system call the hub's thread sits, ``/proc/self/task/TID/syscall``, and on which fd. It runs in the
monitor thread while the hub stands still: it does nothing that could wait for the disk the hub waits for.
"""

from __future__ import annotations

import io
import logging
import os
import posix  # not os, which may be patched
import stat
import sys
from collections.abc import Callable
from typing import Any

LOOKS = 5               # at the thread, because it may be on its way from one read to the next
PAUSE = 0.001           # seconds between them
ANSWER = 0.05           # seconds: what takes longer to say what it is, hangs
PATH_MAX = 4096         # bytes
AT_FDCWD = -100

READS, WRITES, SYNCS, OPENS = 'read', 'write', 'sync', 'open'
KINDS = {'read': READS, 'pread': READS, 'readv': READS, 'preadv': READS, 'preadv2': READS,
         'write': WRITES, 'pwrite': WRITES, 'writev': WRITES, 'pwritev': WRITES, 'pwritev2': WRITES,
         'fsync': SYNCS, 'fdatasync': SYNCS, 'open': OPENS, 'openat': OPENS, 'openat2': OPENS}
# The kernel numbers its calls by architecture; the younger ones share one list. Others are told of by frame.
_GENERIC = {63: 'read', 64: 'write', 65: 'readv', 66: 'writev', 67: 'pread', 68: 'pwrite', 69: 'preadv',
            70: 'pwritev', 82: 'fsync', 83: 'fdatasync', 56: 'openat', 286: 'preadv2', 287: 'pwritev2',
            437: 'openat2', 98: 'futex'}
NUMBERS = {
    'x86_64': {0: 'read', 1: 'write', 2: 'open', 17: 'pread', 18: 'pwrite', 19: 'readv', 20: 'writev',
               74: 'fsync', 75: 'fdatasync', 257: 'openat', 295: 'preadv', 296: 'pwritev', 327: 'preadv2',
               328: 'pwritev2', 437: 'openat2', 202: 'futex'},
    'aarch64': _GENERIC, 'riscv64': _GENERIC, 'loongarch64': _GENERIC,
}.get(os.uname().machine if sys.maxsize > 1 << 32 else '', {})
# In Python these call those.
METHODS = {'read': READS, 'read1': READS, 'readinto': READS, 'readinto1': READS, 'readline': READS,
           'readlines': READS, 'readall': READS, 'pread': READS, 'readv': READS, 'preadv': READS,
           'write': WRITES, 'writelines': WRITES, 'flush': WRITES, 'pwrite': WRITES, 'writev': WRITES,
           'pwritev': WRITES, 'fsync': SYNCS, 'fdatasync': SYNCS, 'open': OPENS}

log = logging.getLogger('greenaio.events')
_native_ids: dict[int, int] = {}        # of threads with a hub and a monitor, by Python's ids
_is_asking = False                      # a thread that looks at a file has not come back


def explain_blocked() -> None:
    """Have gevent's monitor thread (``GEVENT_MONITOR_THREAD_ENABLE``) say what file a hub is blocked on.

    Where a report (`gevent.events.EventLoopBlocked`) is about a thread that sits in a read, write, fsync or
    open of a regular file, a folder or a block device, its ``info`` gets one more line, such as ``blocked in
    read(2) of '/srv/data' (fd 7), a plain file read: try greenaio``. Twice is fine.
    """
    from gevent.events import subscribers

    if _explain not in subscribers:
        subscribers.append(_explain)


def stop_explaining() -> None:
    """Undo `explain_blocked`. Twice is fine."""
    from gevent.events import subscribers

    if _explain in subscribers:
        subscribers.remove(_explain)


def _explain(event: Any) -> None:
    """The subscriber. An exception in it would end the monitor thread."""
    from gevent.events import IEventLoopBlocked, IPeriodicMonitorThreadStartedEvent

    try:
        if IEventLoopBlocked.providedBy(event):
            line = _line(_hub_of(event))
            if line is not None:
                event.info.append(line)
        elif IPeriodicMonitorThreadStartedEvent.providedBy(event):      # it comes in the hub's own thread
            _native_ids[event.monitor.hub.thread_ident] = _native_id()
    except Exception:
        log.exception('no explanation of %r', event)


def _native_id() -> int:
    from _thread import get_native_id

    return get_native_id()


def _hub_of(event: Any) -> Any:
    """Older versions of gevent say the greenlet only."""
    found = getattr(event, 'hub', None) or event.greenlet
    while found is not None and not hasattr(found, 'thread_ident'):
        found = found.parent
    return found


def _line(hub: Any) -> str | None:
    """Return a line about *hub*, if it is blocked on a file."""
    if hub is None:
        return None
    for _ in range(LOOKS):
        call = _system_call(hub)
        if call is None:
            break
        name, *arguments = call
        if name in KINDS:
            return _line_of_call(name, arguments)
        if name not in ('', 'futex'):
            return None
        _sleep(PAUSE)                   # it runs, or waits for the interpreter, which we have just now
    return _line_of_frame(hub.thread_ident)


def _sleep(seconds: float) -> None:
    from gevent.monkey import get_original

    get_original('time', 'sleep')(seconds)


# The system call ---------------------------------------------------------------------------------


def _system_call(hub: Any) -> tuple[Any, ...] | None:
    """The name of the system call that the thread of *hub* is in, and its arguments; an empty name if it
    runs, a number for one that we are not interested in. None if the kernel does not say."""
    native_id = os.getpid() if hub.main_hub else _native_ids.get(hub.thread_ident)
    if native_id is None or not NUMBERS:
        return None
    try:
        words = _read(f'/proc/self/task/{native_id}/syscall').split()
    except OSError:                     # the kernel was built without, or a security module forbids it
        return None
    if words[0] in (b'running', b'-1'):         # or it waits for a page that is mapped
        return ('',)
    number = int(words[0])
    return (NUMBERS.get(number, number), *(int(word, 16) for word in words[1:7]))


def _read(path: str) -> bytes:
    fd = posix.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return posix.read(fd, PATH_MAX)
    finally:
        posix.close(fd)


def _line_of_call(name: str, arguments: list[int]) -> str | None:
    if KINDS[name] != OPENS:
        return _line_of_fd(name, KINDS[name], _signed(arguments[0]))
    folder = AT_FDCWD if name == 'open' else _signed(arguments[0])
    path = _string_at(arguments[0 if name == 'open' else 1])
    return None if path is None else _line_of_path(path, folder)


def _signed(register: int) -> int:
    """The int that is in a 64-bit register."""
    low = register & 0xffffffff
    return low - (1 << 32) if low >> 31 else low


def _string_at(address: int) -> str | None:
    """The C string at *address* of this process, if there is one: the kernel looks, so nothing can crash."""
    try:
        fd = posix.open('/proc/self/mem', os.O_RDONLY | os.O_CLOEXEC)
        try:
            text, nul, _ = posix.pread(fd, PATH_MAX, address).partition(b'\0')
        finally:
            posix.close(fd)
    except (OSError, OverflowError):
        return None
    return os.fsdecode(text) if nul else None


# The frame ---------------------------------------------------------------------------------------


def _line_of_frame(thread_ident: int) -> str | None:
    """The same by the call that Python makes just now, if the kernel does not say."""
    import ast

    frame = sys._current_frames().get(thread_ident)
    if frame is None:
        return None
    for call in _calls_under_way(frame):
        function = call.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, 'id', '')
        if name not in METHODS:
            continue
        owner = _value(function.value, frame) if isinstance(function, ast.Attribute) else None
        if isinstance(owner, io.IOBase):
            return _line_of_fd(name, METHODS[name], owner.fileno())
        target = _value(call.args[0], frame) if call.args else None
        if METHODS[name] == OPENS and isinstance(target, (str, bytes, os.PathLike)):
            return _line_of_path(os.fsdecode(target), AT_FDCWD)
        if isinstance(target, int):
            return _line_of_fd(name, METHODS[name], target)
    return None


def _calls_under_way(frame: Any) -> list[Any]:
    """The calls at which *frame* is: from Python 3.11 on the one, before that all of its line."""
    import ast
    import linecache

    code = frame.f_code
    lines = linecache.getlines(code.co_filename, frame.f_globals)
    first = last = frame.f_lineno
    start: int | None = None
    if hasattr(code, 'co_positions'):
        first, last, start, end = list(code.co_positions())[frame.f_lasti // 2]
    if not first or not last or last > len(lines):
        return []
    text = [line.encode() for line in lines[first - 1:last]]
    if start is None:
        source = text[0].strip()
        source += b' pass' if source.endswith(b':') else b''
    else:
        text[-1] = text[-1][:end]
        source = b''.join(text)[start:]
    try:
        return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    except (SyntaxError, ValueError):
        return []


def _value(node: Any, frame: Any) -> Any:
    """Return the value of a name, or of an attribute of one, without running code; None for all else."""
    import ast

    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        for names in (frame.f_locals, frame.f_globals, frame.f_builtins):
            if node.id in names:
                return names[node.id]
    if isinstance(node, ast.Attribute):
        return getattr(_value(node.value, frame), '__dict__', {}).get(node.attr)
    return None


# The file ----------------------------------------------------------------------------------------


def _line_of_fd(name: str, kind: str, fd: int) -> str | None:
    path = os.readlink(f'/proc/self/fd/{fd}')       # as the kernel has it in memory
    if not path.startswith('/') or not _is_on_disk(path, posix.fstat, fd):
        return None
    return f'blocked in {name}(2) of {path!r} (fd {fd}), a plain file {kind}: try greenaio'


def _line_of_path(path: str, folder: int) -> str | None:
    at = {} if folder == AT_FDCWD else {'dir_fd': folder}
    if not _is_on_disk(path, posix.stat, path, **at):
        return None
    return f'blocked in open(2) of {path!r}, a plain file open: try greenaio'


def _is_on_disk(path: str, ask: Callable[..., os.stat_result], *args: Any, **kwargs: Any) -> bool:
    """Whether that is a regular file, a folder or a block device. One that does not answer in time is."""
    if path.startswith(('/proc/', '/sys/')):
        return False                    # regular files by name; greenaio would do the same
    found = _in_time(ask, *args, **kwargs)
    if isinstance(found, OSError):
        return False
    return found is None or stat.S_IFMT(found.st_mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFBLK)


def _in_time(ask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return the result of *ask*, or the OSError that it raises; None if it takes too long. A native thread
    asks, one at a time: else the monitor would hang with the hub."""
    global _is_asking
    from gevent.monkey import get_original

    if _is_asking:
        return None
    answers: list[Any] = []
    done = get_original('_thread', 'allocate_lock')()

    def work() -> None:
        global _is_asking
        try:
            answers.append(ask(*args, **kwargs))
        except OSError as error:
            answers.append(error)
        finally:
            _is_asking = False
            done.release()

    done.acquire()
    _is_asking = True
    try:
        get_original('_thread', 'start_new_thread')(work, ())
    except BaseException:
        _is_asking = False
        raise
    done.acquire(timeout=ANSWER)
    return answers[0] if answers else None
