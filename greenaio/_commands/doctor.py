"""Tell which way each kind of operation takes here, and why.

What is asked for is really done: by greenaio itself, on this kernel, at each PATH, and it is counted what
went to native AIO and what to a thread. A folder gets a file for that, which loses its name at once. A file
is only read, a block device too. Where something has to be told without a try, the report says so.

The exit status is 1 when something is degraded; the end of the report tells what to do about it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import glob
import json
import os
import pickle
import platform
import re
import signal
import stat
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any, NoReturn

import gevent

import greenaio.os
from greenaio import File, aligned_buffer, config
from greenaio._commands.show import PROG, table, tell, wrapped
from greenaio._files.extension import why_not

DEPTH_TRIED = 16        # requests: the least that a hub does with
PATIENCE = 10.0         # seconds for each PATH: a disk that hangs is a finding too
LET_GO = 1.0            # seconds for closing what was opened there
ATTEMPTS = 40           # until a file system that refuses RWF_NOWAIT again and again is not asked any more
BLOCK = 4096            # bytes, or what O_DIRECT wants
LOOKS = 16              # places of a file at which it is asked whether the page cache has them
O_DIRECT = getattr(os, 'O_DIRECT', 0)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EOPNOTSUPP,
                errno.ENOSYS, errno.ENOENT)     # the last is what /proc says
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RWF_NOWAIT = getattr(os, 'RWF_NOWAIT', 8)
FAN_WAITING = 0x170000  # FAN_OPEN_PERM, FAN_ACCESS_PERM, FAN_OPEN_EXEC_PERM and FAN_PRE_ACCESS

# What is told of, in this order.
OPERATIONS = (
    'O_DIRECT read', 'O_DIRECT overwrite', 'O_DIRECT read, overwrite', 'O_DIRECT write, the file gets longer',
    'buffered read, cached', 'buffered read, not cached', 'buffered write', 'fsync, fdatasync', 'fdatasync',
    'fsync', 'open, of what is there', 'open, a new file', 'stat', 'truncate')

AIO, THREAD, IN_LINE, NONE = 'native AIO', 'thread', 'in line', '-'
REFUSED = 'thread, after native AIO'        # which said that it would have waited

# Reasons that no probe can tell. The code that acts on them is in the modules of _files.
EXTENDS = 'the kernel would make the file longer inside io_submit'
MAY_WAIT = 'it waits where much is dirty, or what it changes has to be read first'
CHANGES = 'it changes the file system, which may have to read or write something first'
MISS = 'it waits for the disk'
SYNC = 'a worker of the kernel does it (IO_CMD_FSYNC, IO_CMD_FDSYNC)'
CACHED = 'the page cache had it: preadv2(RWF_NOWAIT)'
AT_HAND = 'the kernel had the path cached: openat2(RESOLVE_CACHED)'
IN_MEMORY = 'in memory: there is no disk to wait for'
ASKED = 'asked not to wait (RWF_NOWAIT); what would wait takes a thread'
NOT_BUILT = 'the extension was not built'

SYSCTL = 'sysctl -w fs.aio-max-nr=1048576'
REBUILD = ('install a C compiler and the headers of Python, then: '
           'pip install --force-reinstall --no-cache-dir greenaio')
ELSEWHERE = ('keep the data on ext4 or xfs on a disk of this machine: in a container on a volume, not on its '
             'own layer')
ALLOW = ('allow {} in the seccomp profile of this container or service (docker: --security-opt '
         'seccomp=PROFILE, systemd: SystemCallFilter={})')
AIO_CALLS = 'io_setup, io_destroy, io_submit and io_getevents'

# System calls that have a substitute: the version of Linux that brought each, and what is lost without it.
NEWER = {
    'statx': ('4.11', 'a call that has to ask a file server may be made in the hub'),
    'preadv2': ('4.6', 'each read takes a thread, also one of cached bytes'),
    'pwritev2': ('4.6', 'os.pwritev with flags such as RWF_DSYNC fails'),
    'openat2': ('5.6', 'open and stat take a thread, also for a cached path'),
    'copy_file_range': ('4.5', 'what is copied goes through the memory of this process'),
    'cachestat': ('6.5', 'an O_DIRECT write may wait in the hub for pages that the page cache has'),
    'statmount': ('6.8', 'a thread reads the list of all mounts to learn the kind of a file system'),
}


class BadPath(Exception):
    """A PATH that cannot be examined: one line, exit status 2."""


class Hangs(Exception):
    """A PATH gave no answer in time."""


@dataclass
class Problem:
    """Something that works, but not as it could."""

    what: str
    remedy: str


@dataclass
class Operation:
    """One kind of operation at one PATH: which way it takes. *tried* means that it was done, and seen to."""

    name: str
    way: str
    why: str
    tried: bool = True


@dataclass
class Aio:
    """What the kernel says to native AIO. *room* is for so many hubs more, of `config.depth` requests."""

    allowed: bool = False
    error: str | None = None        # of the system call that was refused
    denied_by: str | None = None
    depth_asked: int = 0            # requests
    depth: int = 0                  # requests, that a hub really gets
    aio_nr: int | None = None       # requests, of the whole machine
    aio_max_nr: int | None = None
    room: int | None = None
    reads_ring: bool = False
    fdsync: bool = False


@dataclass
class Machine:
    """What is true of every PATH."""

    greenaio: str
    python: str
    kernel: str
    gevent: str
    greenlet: str
    loop: str
    loop_backend: str
    seccomp: int | None             # 0 off, 1 strict, 2 by a filter
    native: bool
    extension: str                  # 'built', or why not
    aio: Aio
    problems: list[Problem] = field(default_factory=list)


@dataclass
class Place:
    """One PATH."""

    path: str
    kind: str                       # folder, file or block device
    mount_point: str | None = None
    source: str | None = None       # what is mounted there
    file_system: str | None = None
    device: str | None = None       # major:minor
    share: int | None = None        # requests of one hub that are under way there at most
    alignment: int | None = None    # bytes; None without O_DIRECT, or where it was not tried
    fdsync: bool | None = None      # whether an fdatasync went by native AIO; None: the kernel was not asked
    nowait: dict[str, str] = field(default_factory=dict)
    writable: bool | None = None
    notes: list[str] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass
class Report:
    machine: Machine
    places: list[Place]
    bad_paths: list[str]                # a sentence for each

    @property
    def problems(self) -> list[Problem]:
        return [*self.machine.problems, *(one for place in self.places for one in place.problems)]


# The machine -------------------------------------------------------------------------------------


def examine_machine() -> Machine:
    """Return what can be told without a PATH. Makes a context of native AIO, and gives it back."""
    loop = gevent.get_hub().loop
    found = Machine(
        greenaio=greenaio.__version__, python=platform.python_version(),
        kernel=f'{platform.system()} {platform.release()} {platform.machine()}',
        gevent=gevent.__version__, greenlet=metadata.version('greenlet'),
        loop=f'{type(loop).__module__}.{type(loop).__name__}',
        loop_backend=str(getattr(loop, 'backend', 'unknown')), seccomp=_seccomp(), native=greenaio.native,
        extension='built' if greenaio.native else _why_not_built(), aio=Aio())
    if greenaio.native:
        _examine_aio(found)
        _examine_newer_calls(found)
    else:
        found.problems.append(Problem(
            f'{NOT_BUILT}, so that all takes a Python thread pool ({found.extension}). There was no '
            'compiler, or pip has used the wheel of an earlier install without one again', REBUILD))
    return found


def _seccomp() -> int | None:
    with contextlib.suppress(OSError), open('/proc/self/status') as status:
        for line in status:
            if line.startswith('Seccomp:'):
                return int(line.split()[1])
    return None


def _why_not_built() -> str:
    """What Python says to the extension, and whether it is there for another Python."""
    folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), '_files')
    others = sorted(name for name in os.listdir(folder) if re.fullmatch(r'file\..*\.so', name))
    return f'{why_not}; there is {", ".join(others)}' if others else why_not


def _number(name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError), open(f'/proc/sys/fs/{name}') as file:
        return int(file.read())
    return None


def _examine_aio(machine: Machine) -> None:
    from greenaio._core.context import Context, Opcode

    aio = machine.aio
    aio.depth_asked = config.depth
    call = 'eventfd2'
    try:
        context = Context()
        try:
            call = 'eventfd2' if context.denied else 'io_setup'
            context.open(DEPTH_TRIED)
            call = 'io_submit'
            _send_one(context)
            aio.allowed, aio.reads_ring = True, context.reads_ring
            aio.fdsync = context.supports(Opcode.FDSYNC)
        finally:
            context.close()
    except OSError as error:
        _explain_denial(machine, call, error)
        return
    aio.depth = _depth_of_a_hub()
    aio.aio_nr, aio.aio_max_nr = _number('aio-nr'), _number('aio-max-nr')
    if aio.aio_nr is not None and aio.aio_max_nr is not None:
        aio.room = max(0, aio.aio_max_nr - aio.aio_nr) // aio.depth_asked
    if aio.depth < aio.depth_asked:
        machine.problems.append(Problem(
            f'a hub gets {aio.depth} requests in flight, not the {aio.depth_asked} of config.depth: '
            f'{_usage(aio)}', SYSCTL))
    if not aio.reads_ring:
        machine.problems.append(Problem(
            'the completion ring has a layout that greenaio does not know, so that each look at it is a '
            'system call', 'report it, with the version of the kernel'))
    if not aio.fdsync:
        machine.problems.append(Problem('the kernel does not know IO_CMD_FDSYNC: fdatasync takes threads',
                                        'use Linux 4.18 or newer'))


def _send_one(context: Any) -> None:
    """Have the kernel do an fsync of nothing. A filter may allow io_setup and refuse this."""
    from greenaio._core.context import Opcode

    fd = os.memfd_create('greenaio-doctor')
    try:
        context.stage(1, Opcode.FSYNC, fd, 0, 0, 0, 0)
        taken = context.submit()
        if taken != 1:
            raise OSError(-taken or errno.EAGAIN, os.strerror(-taken or errno.EAGAIN))
        with gevent.Timeout(PATIENCE, OSError(errno.ETIMEDOUT, 'no completion came')):
            while context.peek() == 0:
                gevent.sleep(0.001)
        context.commit(1)
    finally:
        os.close(fd)


def _depth_of_a_hub() -> int:
    """What this hub's own driver got, which halves what it asks for until the kernel agrees."""
    from greenaio._core.hub import get_driver

    driver = get_driver()
    return driver.engine.depth if driver.native else 0


def _usage(aio: Aio) -> str:
    return f'aio-nr is {aio.aio_nr}, aio-max-nr {aio.aio_max_nr}'


def _explain_denial(machine: Machine, call: str, error: OSError) -> None:
    aio = machine.aio
    aio.aio_nr, aio.aio_max_nr = _number('aio-nr'), _number('aio-max-nr')
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    aio.error = f'{call}: {name}'
    by, remedy = _denied_by(machine, call, error.errno)
    aio.denied_by = by
    machine.problems.append(Problem(
        f'native AIO is denied ({aio.error}) by {by}; threads do its work, which are slower', remedy))


def _examine_newer_calls(machine: Machine) -> None:
    from greenaio._files.calls import errors_of_newer_calls

    kernel = tuple(map(int, re.findall(r'\d+', platform.release())[:2]))
    for call, code in errors_of_newer_calls().items():
        since, loss = NEWER[call]
        if code in (errno.ENOSYS, errno.EPERM) and kernel >= tuple(map(int, since.split('.'))):
            by, remedy = _denied_by(machine, call, code)
            machine.problems.append(Problem(f'{call} is denied ({errno.errorcode[code]}) by {by}: {loss}',
                                            remedy))


def _denied_by(machine: Machine, call: str, code: int | None) -> tuple[str, str]:
    """Whose answer that is, and what to do about it."""
    aio, filtered = machine.aio, machine.seccomp == 2
    used_up = (aio.aio_nr is not None and aio.aio_max_nr is not None
               and aio.aio_nr + DEPTH_TRIED > aio.aio_max_nr)
    if code == errno.EAGAIN and call == 'io_setup' and (used_up or not filtered):
        return f'aio-max-nr, which is used up: {_usage(aio)}', SYSCTL
    if code in (errno.EMFILE, errno.ENFILE):
        return 'the limit of open files', 'raise it: ulimit -n, LimitNOFILE='
    if code == errno.ENOMEM and not filtered:
        return 'want of memory', 'give this process, or its cgroup, more'
    if call.startswith('io_') and code == errno.ENOSYS and aio.aio_nr is None:  # which a kernel with AIO has
        return 'a kernel that was built without CONFIG_AIO', 'use another kernel'
    if filtered:
        calls = (AIO_CALLS, '@aio') if call.startswith('io_') else (call, call)
        return 'a seccomp filter', ALLOW.format(*calls)
    if code == errno.ENOSYS:
        return 'something between this process and the kernel, as gVisor', 'run it without'
    return 'the kernel; there is no seccomp filter, so it may be a security module', 'look into the audit log'


# A PATH ------------------------------------------------------------------------------------------


def examine_path(path: str, machine: Machine) -> Place:
    """Return what is found at *path*. Raises BadPath for one that is not there, may not be opened, or is
    something else than a file, a folder or a block device."""
    try:
        with gevent.Timeout(PATIENCE, Hangs()):
            mode = greenaio.os.stat(path).st_mode
            kind = next((name for is_one, name in (
                (stat.S_ISDIR, 'folder'), (stat.S_ISREG, 'file'), (stat.S_ISBLK, 'block device'))
                if is_one(mode)), None)
            if kind is None:
                raise BadPath(f'{path}: neither a file, a folder nor a block device')
    except Hangs:
        place = Place(path, 'unknown')
        _tell_that_it_hangs(place, 'stat')
        return place
    except (OSError, ValueError) as error:
        raise BadPath(f'{path}: {getattr(error, "strerror", None) or error}') from None
    place = Place(path, kind)
    examination = _Examination(place, machine)
    try:
        with examination:
            examination.run()
    except Hangs:
        _tell_that_it_hangs(place, examination.step)
    except OSError as error:
        if examination.step == 'open':
            raise BadPath(f'{path}: {error.strerror}') from None
        place.problems.append(Problem(
            f'{path}: {examination.step}: {error.strerror}',
            'make room there, or raise the limit (quota, ulimit -f)' if error.errno in NO_ROOM else
            'see what the kernel says of the disk: dmesg'))
    return place


def _tell_that_it_hangs(place: Place, step: str) -> None:
    place.problems.append(Problem(
        f'{place.path} gave no answer in {PATIENCE:g} s: {step}',
        'look after the disk, or the server behind it; its users wait, and no others'))


class _Examination:
    """Opens, asks, counts and closes, at one PATH. `step` is what it is at."""

    def __init__(self, place: Place, machine: Machine) -> None:
        self.place, self.machine = place, machine
        self.step = 'open'
        self.device: Any = None         # greenaio's own, of the extension
        self.block = BLOCK
        self._files: list[File] = []
        self._timeout = gevent.Timeout(PATIENCE, Hangs())

    def __enter__(self) -> None:
        self._timeout.start()

    def __exit__(self, *exc_info: object) -> None:
        self._timeout.close()
        gevent.with_timeout(LET_GO, self._close, timeout_value=None)

    def _close(self) -> None:
        for file in self._files:
            file.close()

    def run(self) -> None:
        self._find_mount()
        {'folder': self._folder, 'file': self._file, 'block device': self._file}[self.place.kind]()

    def open(self, path: str, flags: int, mode: int = 0o600) -> File:
        file = File(path, flags, mode)
        self._files.append(file)
        return file

    # What it is on ------------------------------------------------------------------------------

    def _find_mount(self) -> None:
        place = self.place
        real = _in_pool(os.path.realpath, place.path)
        longest = -1
        for point, kind, source in _mounts():
            if len(point) >= longest and (real + '/').startswith(point.rstrip('/') + '/'):
                longest = len(point)
                place.mount_point, place.file_system, place.source = point, kind, source

    def _know(self, file: File) -> None:
        place = self.place
        place.device = f'{os.major(file.device)}:{os.minor(file.device)}'
        if place.kind == 'block device':
            place.file_system = place.mount_point = place.source = None
        if self.machine.native:
            from greenaio._files.device import devices

            self.device = next(device for device in devices() if device.number == file.device)
            place.share = self.device.limit
            if place.kind != 'block device' and self.device.file_system not in ('', place.file_system):
                place.file_system = self.device.file_system     # what the ways go by
        self._look_for_scanners(file)

    def _look_for_scanners(self, file: File) -> None:
        for scanner in _scanners(file.fileno()):
            self.place.problems.append(Problem(
                f'{self.place.path}: {scanner} looks at files before they are opened or read (fanotify). '
                'Calls wait for it, also where the kernel has all in its caches, and so may the hub',
                'exempt the data of this server from the scanner'))

    @property
    def _name(self) -> str:
        return self.place.file_system or self.place.kind

    @property
    def _extends(self) -> str:
        return EXTENDS + ('' if self._in_memory else ', and wait for the disk')

    @property
    def _in_memory(self) -> bool:
        return self.device is not None and bool(self.device.in_memory)

    def _open_direct(self, path: str, flags: int) -> File | None:
        """*path*, O_DIRECT; None where there is no such thing."""
        try:
            file = self.open(path, flags | O_DIRECT)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._tell('O_DIRECT read, overwrite', NONE, f'open(O_DIRECT): {error.strerror}')
            if not self._in_memory:
                self._degraded(f'{self._name} refuses O_DIRECT, which native AIO needs')
            return None
        self.place.alignment = file.alignment
        self.block = max(BLOCK, file.alignment)
        return file

    # Which way ----------------------------------------------------------------------------------

    def _observe(self, step: str, call: Callable[[], object]) -> str:
        """Do it, and tell by what is counted which way it went."""
        self.step = step
        before = self._counts()
        call()
        by_aio, by_thread = (now - then for now, then in zip(self._counts(), before))
        if by_thread or not self.machine.native:
            return REFUSED if by_aio else THREAD
        return AIO if by_aio else IN_LINE

    def _counts(self) -> tuple[int, int]:
        if not self.machine.native:
            return 0, 0
        from greenaio._core.hub import get_driver

        engine = get_driver().engine
        return engine.submitted, engine.by_thread

    def _observe_habit(self, step: str, call: Callable[[], object], wanted: str) -> str:
        """What it comes to: the kernel refuses now and then, and a file system that always does is not asked
        for ever."""
        way = THREAD
        for _ in range(ATTEMPTS):
            way = self._observe(step, call)
            if way == wanted or way == THREAD and wanted == AIO:
                break
        return way

    def _knows_nowait(self, what: str, call: Callable[[], object]) -> None:
        self.step = f'{what} with RWF_NOWAIT'
        try:
            call()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EINVAL):
                raise                   # EPERM is a sandbox's
            self.place.nowait[what] = 'yes (it would have waited)' if error.errno == errno.EAGAIN else 'no'
        else:
            self.place.nowait[what] = 'yes'

    # What is told -------------------------------------------------------------------------------

    def _tell(self, name: str, way: str, why: str, *, tried: bool = True) -> None:
        self.place.operations.append(Operation(name, way, why if self.machine.native else NOT_BUILT, tried))
        self.place.operations.sort(key=lambda one: OPERATIONS.index(one.name))

    def _degraded(self, what: str) -> None:
        problem = Problem(f'{self.place.path}: {what}', ELSEWHERE)
        if problem not in self.place.problems and self.machine.native:
            self.place.problems.append(problem)

    def _no_nowait(self) -> str:
        self._degraded(f'{self._name} does not know RWF_NOWAIT, so that what could be done without a wait '
                       'takes threads')
        return f'{self._name} does not know RWF_NOWAIT (EOPNOTSUPP), and might wait'

    def _tell_direct(self, name: str, way: str, direction: str, *, tried: bool = True) -> None:
        """Of an aligned O_DIRECT request, by what `Device` has learned."""
        state = '' if self.device is None else getattr(self.device, direction).state
        if way == AIO:
            why = ASKED if state == 'asking' else IN_MEMORY if self._in_memory else (
                f'{self._name} says to RWF_NOWAIT that it would wait, and does not')
        elif not self.machine.aio.allowed:
            why = self._denial()
        elif state == 'unsupported':
            why = self._no_nowait()
        elif state == 'pausing':
            why = f'{self._name} refused RWF_NOWAIT so often (EAGAIN) that it is not asked for a while'
        else:
            why = 'asked not to wait (RWF_NOWAIT), the kernel said that it would (EAGAIN)'
        self._tell(name, way, why, tried=tried)

    def _denial(self) -> str:
        return f'native AIO is denied ({self.machine.aio.error})'

    def _tell_sync(self, name: str, way: str, *, tried: bool = True) -> None:
        aio = self.machine.aio
        if way == THREAD:
            why = self._denial() if not aio.allowed else (
                'the kernel does not know IO_CMD_FDSYNC' if not aio.fdsync else 'native AIO refused it')
        else:
            why = SYNC if way == AIO else IN_MEMORY
        self._tell(name, way, why, tried=tried)

    def _tell_path(self, name: str, way: str, *, regular: bool = True) -> None:
        if way == IN_LINE:
            why = AT_HAND if not self._in_memory else IN_MEMORY
        elif not regular:
            why = 'only a regular file is opened in line'
        elif self.device is not None and self.device.file_system == 'overlay':
            why = 'an overlay asks the file systems below it, which are not looked at'
        elif self.device is not None and not self.device.is_local:
            why = f'{self._name} may have to ask a server, or another process'
        else:
            why = 'the path was not cached'
        self._tell(name, way, why)

    def _tell_plain(self, name: str, way: str, why: str, *, tried: bool = True) -> None:
        """Of what takes a thread, unless it is in memory."""
        self._tell(name, way, IN_MEMORY if way == IN_LINE else why, tried=tried)

    # Probes -------------------------------------------------------------------------------------

    def _reads(self, direct: File | None, buffered: File) -> None:
        """The O_DIRECT read, and the buffered one of what is cached by now."""
        if direct is not None:
            buffer = self._buffer()
            way = self._observe_habit('O_DIRECT read', lambda: direct.preadv([buffer], 0), AIO)
            self._tell_direct('O_DIRECT read', way, 'reads')
            self._knows_nowait('O_DIRECT read', lambda: direct.preadv([buffer], 0, RWF_NOWAIT))
        buffered.pread(self.block, 0)
        self._knows_nowait('buffered read',
                           lambda: buffered.preadv([bytearray(self.block)], 0, RWF_NOWAIT))
        way = self._observe_habit('buffered read', lambda: buffered.pread(self.block, 0), IN_LINE)
        if way == IN_LINE:
            why = CACHED if not self._in_memory else IN_MEMORY
        elif self.place.nowait['buffered read'] == 'no':
            why = self._no_nowait()
        else:
            why = 'the kernel said that it would wait (EAGAIN)'
        self._tell('buffered read, cached', way, why)

    def _buffer(self) -> memoryview:
        return aligned_buffer(self.block, self.block if self.machine.native else BLOCK)

    def _folder(self) -> None:
        place = self.place
        folder = self.open(place.path, os.O_RDONLY | os.O_DIRECTORY)
        self._know(folder)
        name = os.path.join(place.path, f'.greenaio-doctor-{os.getpid()}-{os.urandom(4).hex()}')
        files: list[File] = []
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            way = self._observe('open', lambda: files.append(self.open(name, flags)))
            self._tell_plain('open, a new file', way, CHANGES)
            self._paths(name)
            self.step = 'open(O_DIRECT)'
            direct = self._open_direct(name, os.O_RDWR)
        except OSError as error:
            if files or error.errno not in NOT_WRITABLE:
                raise
            place.writable = False
            place.notes.append(f'no file can be made here ({error.strerror}): what is in brackets was not '
                               'tried')
            self._untried(reads=True)
            self._paths(place.path)
            return
        finally:
            with contextlib.suppress(OSError):
                gevent.with_timeout(LET_GO, _in_pool, os.unlink, name, timeout_value=None)
        place.writable = True
        self._writes(direct, files[0])
        self._reads(direct, files[0])
        self._miss(files[0])
        way = self._observe('truncate', lambda: greenaio.os.ftruncate(files[0].fileno(), 0))
        self._tell_plain('truncate', way, CHANGES)

    def _paths(self, path: str) -> None:
        opened: list[int] = []
        try:
            way = self._observe('open', lambda: opened.append(greenaio.os.open(path, os.O_RDONLY)))
        finally:
            for fd in opened:
                os.close(fd)
        is_regular = self.place.kind == 'file' or path != self.place.path
        self._tell_path('open, of what is there', way, regular=is_regular)
        self._tell_path('stat', self._observe('stat', lambda: greenaio.os.stat(path)))

    def _writes(self, direct: File | None, buffered: File) -> None:
        if direct is not None:
            buffer = self._buffer()
            way = self._observe('O_DIRECT write', lambda: direct.pwrite(buffer, 0))
            self._tell('O_DIRECT write, the file gets longer', way, self._extends)
            self._sync(buffered)
            way = self._observe_habit('O_DIRECT overwrite', lambda: direct.pwrite(buffer, 0), AIO)
            self._tell_direct('O_DIRECT overwrite', way, 'writes')
            self._knows_nowait('O_DIRECT overwrite', lambda: direct.pwritev([buffer], 0, RWF_NOWAIT))
        way = self._observe('buffered write', lambda: buffered.pwrite(bytes(self.block), 0))
        self._tell_plain('buffered write', way, MAY_WAIT)
        if direct is None:
            self._sync(buffered)
        else:
            buffered.fdatasync()        # or the reads find dirty pages

    def _sync(self, file: File) -> None:
        ways = [self._observe('fdatasync', file.fdatasync), self._observe('fsync', file.fsync)]
        self.place.fdsync = ways[0] == AIO if ways[0] != IN_LINE else None
        if ways[0] == ways[1]:
            self._tell_sync('fsync, fdatasync', ways[0])
        else:
            self._tell_sync('fdatasync', ways[0])
            self._tell_sync('fsync', ways[1])

    def _miss(self, file: File) -> None:
        """A read of what was put out of the page cache. The look there begins read-ahead, and a disk may be
        quick enough to have it when the look ends; now and then, but not each time."""
        for _ in range(ATTEMPTS):
            self.step = 'posix_fadvise'
            _in_pool(os.posix_fadvise, file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            way = self._observe('buffered read', lambda: file.pread(self.block, 0))
            if way != IN_LINE or self._in_memory:
                break
        if way == IN_LINE and not self._in_memory:
            self._tell('buffered read, not cached', THREAD, MISS, tried=False)
        else:
            self._tell_plain('buffered read, not cached', way, MISS)

    def _file(self) -> None:
        """A file or a block device that is somebody's: nothing is written, nor put out of the page cache."""
        place = self.place
        buffered = self.open(place.path, os.O_RDONLY)
        self._know(buffered)
        self.step = 'open(O_DIRECT)'
        direct = self._open_direct(place.path, os.O_RDONLY)
        if not self._find_miss(buffered):
            place.notes.append('all of it that was looked at is in the page cache')
        self._reads(direct, buffered)
        place.notes.append('it is only read: what is in brackets was not tried')
        self._untried(reads=False, direct=direct is not None)
        self._paths(place.path)

    def _find_miss(self, file: File) -> bool:
        """Look for a part that is not in the page cache, and read it."""
        self.step = 'buffered read'
        size = greenaio.os.fstat(file.fileno()).st_size or self._size_of_device(file)
        for i in range(LOOKS):
            offset = size * i // LOOKS // self.block * self.block
            try:
                file.preadv([bytearray(self.block)], offset, RWF_NOWAIT)
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    break               # it does not know the flag
                way = self._observe('buffered read', lambda: file.pread(self.block, offset))  # noqa: B023
                if way != IN_LINE:      # else the look itself had it read ahead
                    self._tell('buffered read, not cached', way, MISS)
                    return True
        self._tell('buffered read, not cached', IN_LINE if self._in_memory else THREAD,
                   IN_MEMORY if self._in_memory else MISS, tried=False)
        return False

    @staticmethod
    def _size_of_device(file: File) -> int:
        fd = file.fileno()
        return os.lseek(fd, 0, os.SEEK_END)

    def _untried(self, *, reads: bool, direct: bool = True) -> None:
        """What was not tried, by the rules that `File` goes by."""
        aio, is_disk = self.machine.aio, self.place.kind == 'block device'
        plain = IN_LINE if self._in_memory else THREAD
        if direct:
            for i, (name, direction) in enumerate((('O_DIRECT read', 'reads'),
                                                   ('O_DIRECT overwrite', 'writes'))):
                if direction == 'writes' or reads:
                    way = AIO if aio.allowed and self.device.ways()[i].startswith(AIO) else THREAD
                    self._tell_direct(name, way, direction, tried=False)
        if direct and not is_disk:
            self._tell('O_DIRECT write, the file gets longer', THREAD, self._extends, tried=False)
        if reads:
            self._tell('buffered read, cached', IN_LINE if self.machine.native else THREAD,
                       IN_MEMORY if self._in_memory else CACHED, tried=False)
            self._tell_plain('buffered read, not cached', plain, MISS, tried=False)
        self._tell_plain('buffered write', plain, MAY_WAIT, tried=False)
        self._tell_sync('fsync, fdatasync', IN_LINE if self._in_memory else
                        AIO if aio.allowed and aio.fdsync else THREAD, tried=False)
        if not is_disk:
            self._tell_plain('truncate', plain, CHANGES, tried=False)


def _in_pool(call: Callable[..., Any], *args: Any) -> Any:
    """For what greenaio has not: the hub must not wait here either, or nothing ends what hangs."""
    return gevent.get_hub().threadpool.apply(call, args)


def _mounts() -> Iterator[tuple[str, str, str]]:
    """(mount point, type, source) of each."""
    def plain(field: bytes) -> str:
        return os.fsdecode(re.sub(rb'\\([0-7]{3})', lambda octal: bytes([int(octal[1], 8)]), field))

    # As bytes: a name need not be text, and text has more kinds of space than the kernel escapes.
    with contextlib.suppress(OSError), open('/proc/self/mountinfo', 'rb') as mounts:
        for line in mounts:
            fields, _, rest = line.partition(b' - ')
            kind, source, *_ = rest.split(b' ')
            yield plain(fields.split(b' ')[4]), plain(kind), plain(source)


# On-access scanners ------------------------------------------------------------------------------


def _scanners(fd: int) -> Iterator[str]:
    """Yield each process that can hold an open or a read of the file behind *fd*, by fanotify. Only root sees
    the processes of other users, and no container sees those outside it."""
    mount, file = _mount_of(fd), os.fstat(fd)
    device = os.major(file.st_dev) << 20 | os.minor(file.st_dev)        # as the kernel writes it inside
    for path in glob.iglob('/proc/[0-9]*/fd/*'):
        with contextlib.suppress(OSError):
            if os.readlink(path) != 'anon_inode:[fanotify]':
                continue
            process, _, number = path.removeprefix('/proc/').split('/')
            with open(f'/proc/{process}/fdinfo/{number}') as info:
                if any(_holds(line, mount, device, file.st_ino) for line in info):
                    with open(f'/proc/{process}/comm') as comm:
                        yield f'{comm.read().strip()} (process {process})'


def _mount_of(fd: int) -> int | None:
    with open(f'/proc/self/fdinfo/{fd}') as info:
        return next((int(line.split()[1]) for line in info if line.startswith('mnt_id:')), None)


def _holds(line: str, mount: int | None, device: int, inode: int) -> bool:
    """Whether *line* of fdinfo is a mark on the mount, the file system or the inode, with an event that waits
    for an answer. Numbers are hexadecimal there."""
    if not line.startswith('fanotify '):
        return False
    mark = {name: int(value, 16) for name, _, value in (word.partition(':') for word in line.split()[1:])}
    if not mark.get('mask', 0) & FAN_WAITING:
        return False
    return mark.get('mnt_id') == mount or mark.get('sdev') == device and mark.get('ino', inode) == inode


# What is shown -----------------------------------------------------------------------------------


def _print(report: Report) -> None:
    table(('', ''), _facts_of_machine(report.machine), title=f'greenaio {report.machine.greenaio}')
    for place in report.places:
        print()
        table(('', ''), _facts_of_place(place), title=f'{place.path}: a {place.kind}')
        rows = [(one.name, one.way if one.tried else f'({one.way})', one.why) for one in place.operations]
        if rows:
            print()
            table(('operation', 'way', 'why'), rows)
        for note in place.notes:
            print(wrapped(note[0].upper() + note[1:] + '.'))
    print()
    problems = report.problems
    if not problems:
        print('Nothing is degraded.')
    for i, problem in enumerate(problems, 1):
        print(wrapped(f'{i}. Degraded: {problem.what}.'))
        print(wrapped(f'   To do: {problem.remedy}'))


def _facts_of_machine(machine: Machine) -> list[tuple[str, str]]:
    aio = machine.aio
    if not machine.native:
        said = f'not asked: {NOT_BUILT}'
    elif not aio.allowed:
        said = f'denied: {aio.error}, by {aio.denied_by}'
    else:
        said = f'allowed: {aio.depth} requests in flight per hub, of {aio.depth_asked} asked for'
        if aio.room is not None:
            said += f'. {_usage(aio)}: room for {aio.room} hubs more'
    return [
        ('kernel', machine.kernel),
        ('Python', machine.python),
        ('gevent', f'{machine.gevent}, greenlet {machine.greenlet}'),
        ('loop', f'{machine.loop}, {machine.loop_backend}'),
        ('extension', machine.extension if machine.native else f'not built: {machine.extension}'),
        ('native AIO', said),
        ('seccomp', {0: 'none', 1: 'strict', 2: 'a filter', None: 'unknown'}.get(
            machine.seccomp, str(machine.seccomp))),
    ]


def _facts_of_place(place: Place) -> list[tuple[str, str]]:
    rows = []
    if place.file_system is not None:
        rows.append(('file system', f'{place.file_system}, {place.source} at {place.mount_point}'))
    if place.device is not None:
        share = '' if place.share is None else f', at most {place.share} requests of a hub under way'
        rows.append(('device', place.device + share))
    if place.alignment is not None:
        rows.append(('O_DIRECT alignment', f'{place.alignment} bytes'))
    rows.append(('FDSYNC', {True: 'yes', False: 'no', None: 'not asked'}[place.fdsync]))
    if place.nowait:
        rows.append(('NOWAIT', '; '.join(f'{what}: {answer}' for what, answer in place.nowait.items())))
    return rows


# The command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('paths', nargs='*', metavar='PATH', default=['.'],
                        help='a folder, a file or a block device (default: the current folder)')
    parser.add_argument('--json', action='store_true', help='for machines')


def examine(paths: Sequence[str]) -> Report:
    """Return what is found here and at each of *paths*.

    The process must do nothing else during that time, or its requests are counted too."""
    report = Report(examine_machine(), [], [])
    for path in paths:
        try:
            report.places.append(examine_path(path, report.machine))
        except BadPath as error:
            report.bad_paths.append(str(error))
    return report


def _examine_apart(paths: Sequence[str]) -> Report:
    """`examine`, in a child: no process ends while a thread of it is in a disk that hangs, and no pipe that
    it holds has an end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _answer(paths, writing)
    os.close(writing)
    try:
        with open(reading, 'rb') as pipe:
            answer = pickle.load(pipe)
    except BaseException:               # Ctrl-C; the child removes its files
        os.kill(child, signal.SIGTERM)
        raise
    finally:
        _wait_for(child)
    if isinstance(answer, BaseException):
        raise answer
    report: Report = answer
    return report


def _wait_for(child: int) -> None:
    for _ in range(int(LET_GO / 0.01)):
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.01)


def _answer(paths: Sequence[str], fd: int) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # of the terminal: the parent has it, too
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        answer: Report | BaseException
        try:
            answer = examine(paths)
        except Exception:
            answer = RuntimeError(traceback.format_exc())
        with open(fd, 'wb') as pipe:
            pickle.dump(answer, pipe)
    finally:
        os._exit(0)


def main(arguments: argparse.Namespace) -> int:
    report = _examine_apart(arguments.paths)
    for bad_path in report.bad_paths:
        tell(f'{PROG} doctor', bad_path)
    if report.bad_paths and not report.places:
        return 2
    if arguments.json:
        found = {'machine': asdict(report.machine), 'paths': [asdict(place) for place in report.places],
                 'degraded': [asdict(problem) for problem in report.problems]}
        print(json.dumps(found, indent=1))      # in ASCII, as a path may be no text
    else:
        _print(report)
    return 2 if report.bad_paths else 1 if report.problems else 0
