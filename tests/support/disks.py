"""Folders on real disks, and disks that can be held or frozen."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import tempfile
import time

import gevent

from tests.support import missing
from tests.support.processes import run
from tests.support.watchdog import tell_watchdog

MIB = 1 << 20


def file_system(path):
    return subprocess.run(['stat', '-f', '-c', '%T', str(path)], capture_output=True, text=True,
                          check=True).stdout.strip()


def real_disk():
    """Return a folder on a disk. A file system in memory completes everything inline, and hides bugs."""
    for folder in (tempfile.gettempdir(), '/var/tmp', os.getcwd()):
        if os.access(folder, os.W_OK) and file_system(folder) not in ('tmpfs', 'ramfs', 'overlayfs'):
            return folder
    return missing('no folder on a real disk')


def temporary_folder(kind):
    return tempfile.TemporaryDirectory(dir='/dev/shm' if kind == 'memory' else real_disk(),
                                       prefix='greenaio-test-')


def pattern(nbytes):
    """Return bytes in which no two aligned groups of 8 are equal."""
    return b''.join(i.to_bytes(8, 'little') for i in range(nbytes // 8))


def make_scattered(path):
    """Make a file of 8 MiB that has data in every other block of 4 KiB."""
    with open(path, 'wb') as file:
        file.truncate(8 * MIB)
        for offset in range(0, 8 * MIB, 8192):
            os.pwrite(file.fileno(), b'x', offset)
        os.fsync(file.fileno())


_cgroup_number = itertools.count()


class HeldDisk:
    """A switch for the disk of a file: ``hold()`` lets no read or write of this process finish, ``release()``
    lets all finish. O_DIRECT only. Root is needed, and the blkio controller of cgroup v1."""

    ROOT = '/sys/fs/cgroup/blkio'

    def __init__(self, path):
        self.file, self.held = path, False
        status = os.stat(path)
        self._device = f'{os.major(status.st_dev)}:{os.minor(status.st_dev)}'
        self._group = f'{self.ROOT}/greenaio-{os.getpid()}-{next(_cgroup_number)}'
        os.mkdir(self._group)

    @classmethod
    def is_possible(cls):
        """Whether the kernel has the controller. Mount the controller if it is not mounted."""
        limit = f'{cls.ROOT}/blkio.throttle.read_iops_device'
        if not os.path.exists(limit):
            subprocess.run(['mkdir', '-p', cls.ROOT], check=False)
            subprocess.run(['mount', '-t', 'cgroup', '-o', 'blkio', 'none', cls.ROOT], check=False,
                           capture_output=True)
        return os.path.exists(limit)

    def _set(self, iops):
        for kind in ('read', 'write'):
            with open(f'{self._group}/blkio.throttle.{kind}_iops_device', 'w') as control:
                control.write(f'{self._device} {iops}')

    def hold(self):
        self._set(1)
        with open(f'{self._group}/cgroup.procs', 'w') as procs:
            procs.write(str(os.getpid()))
        self.held = True

    def release(self):
        self._set(0)
        self.held = False

    def commands(self, iops=1):
        """Return two commands for the shell: limit the process {me} to *iops*, and lift the limit."""
        def limit(iops):
            return '; '.join(f'echo {self._device} {iops} >{self._group}/blkio.throttle.{kind}_iops_device'
                             for kind in ('read', 'write'))
        return f'{limit(iops)}; echo {{me}} >{self._group}/cgroup.procs', limit(0)

    def close(self):
        """Release the disk, and remove the group once the kernel lets it go."""
        self.release()
        with open(f'{self.ROOT}/cgroup.procs', 'w') as procs:
            procs.write(str(os.getpid()))
        for _ in range(100):
            try:
                os.rmdir(self._group)
                break
            except OSError:
                gevent.sleep(0.02)


def is_mounted(folder):
    with open('/proc/self/mounts', errors='surrogateescape') as mounts:
        return any(line.split()[1] == folder for line in mounts)


class FreezableDisk:
    """A disk that stands still on demand: nbdkit serves it, nbdfuse makes it a file, and on that file there
    may be a loop device with a file system. ``path`` is a folder on it, or the file itself; ``pid`` is
    the server."""

    def __init__(self, folder, file_system=None, size='512M'):
        self._undo = []
        try:
            self._make(folder, file_system, size)
        except BaseException:
            self.close()
            raise

    def _make(self, folder, file_system, size):
        socket, pidfile, mount = (os.path.join(folder, name) for name in ('sock', 'pid', 'mnt'))
        os.mkdir(mount)
        run('nbdkit', '-P', pidfile, '-U', socket, 'memory', size)
        self._wait(lambda: os.path.exists(pidfile) and os.path.getsize(pidfile))
        with open(pidfile) as file:
            self.pid = int(file.read())
        tell_watchdog('disk', self.pid)
        self._undo.append(lambda: self._signal(signal.SIGTERM))
        disk = os.path.join(mount, 'disk')
        fuse = subprocess.Popen(['nbdfuse', '-C', '4', disk, f'nbd+unix:///?socket={socket}'])
        self._undo.append(lambda: (is_mounted(mount) and run('umount', mount), fuse.wait(10)))
        self._wait(lambda: os.path.exists(disk))
        self.path = disk
        if file_system is None:
            return
        loop = run('losetup', '--direct-io=on', '-f', '--show', disk).strip()
        self._undo.append(lambda: run('losetup', '-d', loop))
        run(f'mkfs.{file_system}', '-q', loop)
        self.path = os.path.join(folder, 'fs')
        os.mkdir(self.path)
        self._loop = loop
        run('mount', loop, self.path)
        self._undo.append(lambda: run('umount', self.path))

    def remount(self):
        """Make the kernel forget what it has in memory of the file system."""
        run('umount', self.path)
        run('mount', self._loop, self.path)

    @staticmethod
    def _wait(there):
        end = time.monotonic() + 10
        while not there() and time.monotonic() < end:
            time.sleep(0.01)

    def freeze(self):
        subprocess.run(self.commands()[0], shell=True, check=True)

    def commands(self):
        """Return two commands for the shell: freeze the disk, and thaw it. A process that was stopped still
        works until each of its threads has noticed."""
        return (f'kill -STOP {self.pid}; '
                f'while cat /proc/{self.pid}/task/*/stat | grep -qv ") [tT] "; do sleep 0.01; done',
                f'kill -CONT {self.pid}')

    def _signal(self, number):
        with contextlib.suppress(ProcessLookupError):       # tests kill it, too
            os.kill(self.pid, number)

    def close(self):
        if hasattr(self, 'pid'):
            self._signal(signal.SIGCONT)
        while self._undo:
            for attempt in range(50):       # busy for as long as the last requests come home
                try:
                    self._undo[-1]()
                    break
                except (OSError, subprocess.CalledProcessError):
                    if attempt == 49:
                        raise
                    time.sleep(0.1)
            self._undo.pop()
