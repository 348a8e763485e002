# cython: language_level=3
"""What is known of devices and file systems, and which way an operation on them goes without waiting.

The kernel is asked in ways that never wait themselves: ``statfs`` would, on a frozen FUSE file system, but
the list of mounts and sysfs do not. What only use can tell, whether RWF_NOWAIT helps, is learned from
the answers, and forgotten again.
"""

import contextlib
import os
import re

from libc.stdint cimport uint64_t

from greenaio._context cimport monotonic_ns
from greenaio._threads cimport Pool, pool_of

cdef extern from *:
    """
    #include <fcntl.h>
    #include <poll.h>

    /* Whether the list of mounts that *fd* is open on has changed since this was last asked. */
    static inline int mounts_changed(int fd)
    {
        struct pollfd one = { fd, POLLPRI, 0 };
        return fd < 0 || (poll(&one, 1, 0) == 1 && one.revents & (POLLPRI | POLLERR));
    }
    """
    int __builtin_popcountll(unsigned long long)
    bint mounts_changed(int fd)

cdef enum:
    REFUSED_MAX = 32            # of the last 64 answers: above it, asking costs more than it saves
    DEFAULT_QUEUE = 64          # requests: where sysfs does not know the device, as for btrfs

cdef uint64_t PAUSE_NS = 30000000000        # then ask again

# File systems in the kernel's own memory: no disk to wait for, so `os` itself will do.
IN_MEMORY = frozenset({'tmpfs', 'ramfs', 'devtmpfs', 'hugetlbfs', 'proc', 'sysfs', 'cgroup', 'cgroup2',
                       'debugfs', 'tracefs', 'securityfs', 'configfs', 'mqueue', 'devpts', 'bpf'})


cdef class Nowait:
    """Whether RWF_NOWAIT is worth asking for, in one direction on one file system."""

    cdef bint asks(self) noexcept:
        if self._unknown:
            return False
        if self._pause_until:
            if monotonic_ns() < self._pause_until:
                return False
            self._pause_until = self._history = 0
        return True

    cdef void answered(self, bint again) noexcept:
        """The kernel did it, or said EAGAIN: a trait of the request, until it becomes a habit."""
        self._history = self._history << 1 | again
        if again and __builtin_popcountll(self._history) > REFUSED_MAX:
            self._pause_until = monotonic_ns() + PAUSE_NS

    @property
    def state(self):
        """'asking', 'unsupported' or 'pausing'."""
        return 'asking' if self.asks() else 'unsupported' if self._unknown else 'pausing'

    def unsupported(self):
        """EOPNOTSUPP: a trait of the file system."""
        self._unknown = True


cdef class Device:
    """A file system as its ``st_dev`` names it, or a block device."""

    def __init__(self, number, file_system):
        self.number = number
        self.file_system = file_system
        self.in_memory = file_system in IN_MEMORY
        self.limit = max(1, _nr_requests(number) // 2)
        self.reads = Nowait()
        self.writes = Nowait()

    cdef Pool pool(self):
        return pool_of(self.number)     # asked for each time: a fork makes new ones

    cdef Way way(self, Nowait direction) noexcept:
        """How an aligned O_DIRECT read or overwrite goes."""
        if direction.asks():
            return ASK
        if self.in_memory or (not direction._unknown and self.file_system == 'xfs'):
            return PLAIN                # xfs says EAGAIN to every overwrite, and does not wait
        return THREAD

    def __repr__(self):
        return f'<Device {os.major(self.number)}:{os.minor(self.number)} {self.file_system}>'


cdef dict _devices = {}
cdef int _mounts = -1                   # /proc/self/mountinfo


cdef Device device_of(uint64_t number):
    """The device of that ``st_dev``. Numbers without a real device behind them are reused after an
    unmount, so for those the list of mounts is watched."""
    if os.major(number) == 0 and mounts_changed(_mounts):
        for known in [known for known in _devices if os.major(known) == 0]:
            del _devices[known]
    found = _devices.get(number)
    if found is None:
        found = _devices[number] = Device(number, _file_systems().get(number, ''))
    return found


def _watch_mounts():
    """At import, and in each forked child: who shares an open file shares what it was told of."""
    global _mounts
    if _mounts >= 0:
        os.close(_mounts)
    try:
        _mounts = os.open('/proc/self/mountinfo', os.O_RDONLY)
    except OSError:
        _mounts = -1                    # then nothing is remembered


_watch_mounts()
os.register_at_fork(after_in_child=_watch_mounts)


def _mount_table():
    """(device number, mount point, file system type) of each mount."""
    found = []
    with contextlib.suppress(OSError), open('/proc/self/mountinfo', 'rb') as mounts:
        for line in mounts:
            fields, _, rest = line.partition(b' - ')
            major, minor = fields.split()[2].split(b':')
            point = re.sub(rb'\\([0-7]{3})', lambda octal: bytes([int(octal[1], 8)]), fields.split()[4])
            found.append((os.makedev(int(major), int(minor)), point, rest.split()[0].decode()))
    return found


def _file_systems():
    return {number: kind for number, _, kind in _mount_table()}


def mounted_at(path):
    """The device number of the longest mount point above *path*, absolute and as bytes; 0 if unknown."""
    number, longest = 0, -1
    for this, point, _ in _mount_table():
        if len(point) >= longest and (path + b'/').startswith(point.rstrip(b'/') + b'/'):
            number, longest = this, len(point)
    return number


def _nr_requests(number):
    """How many requests the device's queue holds."""
    block = f'/sys/dev/block/{os.major(number)}:{os.minor(number)}'
    for queue in (f'{block}/queue', f'{block}/../queue'):       # a partition's is its disk's
        try:
            with open(f'{queue}/nr_requests') as file:
                return int(file.read())
        except OSError:
            continue
    return DEFAULT_QUEUE


def devices():
    """Return all devices that were used."""
    return list(_devices.values())
