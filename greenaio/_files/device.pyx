# cython: language_level=3
"""Devices: the way that an operation on a file system goes without a wait in the hub.

Only use can tell whether RWF_NOWAIT helps. This module learns that from the answers, and forgets it again.
"""

import logging
import os

from gevent import spawn

from libc.stdint cimport uint64_t

from greenaio._core.context cimport monotonic_ns
from greenaio._core.dispatch cimport ASK, PLAIN, THREAD, Way
from greenaio._core.pools cimport pool_of
from greenaio._core.threads cimport Pool
from greenaio._files.facts cimport facts, facts_of
from greenaio._files.mounts cimport file_system_of, mounts_changed

cdef extern from *:
    """
    #include <sys/sysmacros.h>
    """
    unsigned int major(uint64_t device)
    int __builtin_popcountll(unsigned long long)

cdef enum:
    # Refusals among the last 64 answers. With more than that, the question costs more than it saves.
    REFUSED_MAX = 32
    # The number of requests of a device that sysfs does not know, such as a device of btrfs.
    DEFAULT_QUEUE = 64

# After this pause ask the file system again, because the refusals may have come from one file.
cdef uint64_t PAUSE_NS = 1000000000
# The longest pause. One request in that time costs nearly nothing.
cdef uint64_t PAUSE_MAX_NS = 64 * PAUSE_NS

log = logging.getLogger('greenaio')

# File systems that keep their bytes in the kernel's memory. There is no disk to wait for, so a plain call
# will do.
IN_MEMORY = frozenset({'tmpfs', 'ramfs', 'devtmpfs', 'hugetlbfs'})

# File systems without stored bytes. A read or write calls a function of the kernel, which may take its time:
# /proc/PID/cmdline waits for page faults of that process, a sensor in sysfs for its bus, and memory.reclaim
# for a disk.
ANSWERING = frozenset({'proc', 'sysfs', 'cgroup', 'cgroup2', 'debugfs', 'tracefs', 'securityfs', 'configfs',
                       'mqueue', 'devpts', 'bpf', 'binfmt_misc', 'efivarfs', 'fusectl', 'pstore', 'resctrl',
                       'selinuxfs'})

# File systems that tell no server of a close, though no block device is mounted.
LOCAL = frozenset({'btrfs', 'zfs', 'overlay'})


cdef class Nowait:
    """Decide whether to ask with RWF_NOWAIT, in one direction (reads or writes) on one file system.

    One refusal tells something of the request (EAGAIN) or of its file (EOPNOTSUPP). When more than
    `REFUSED_MAX` of the last 64 answers are refusals, they tell something of the file system, and it is not
    asked for a second. A file system that keeps saying EOPNOTSUPP, such as overlayfs, is asked again after
    the pause. Each time that it still refuses in this way, the pause doubles, up to 64 seconds."""

    def __init__(self):
        self._length = PAUSE_NS

    cdef bint asks(self) noexcept:
        """Return whether the next request may ask with RWF_NOWAIT. After a pause that EAGAIN has caused the
        history begins again; after EOPNOTSUPP it stays, so that one more refusal is enough."""
        if self._pause_until:
            if monotonic_ns() < self._pause_until:
                return False
            self._pause_until = 0
            if not self.is_unsupported():
                self._history = self._unknown = 0
        return True

    cdef bint is_unsupported(self) noexcept:
        """Return whether most of the last answers were EOPNOTSUPP."""
        return __builtin_popcountll(self._unknown) > REFUSED_MAX

    cdef void _count(self, bint refused, bint is_unknown) noexcept:
        """Count one answer, and begin a pause if too many of the last answers were refusals."""
        self._history = self._history << 1 | refused
        self._unknown = self._unknown << 1 | is_unknown
        if not is_unknown:
            self._length = PAUSE_NS
        if refused and __builtin_popcountll(self._history) > REFUSED_MAX:
            self._pause_until = monotonic_ns() + self._length
            if self.is_unsupported():
                self._length = min(2 * self._length, PAUSE_MAX_NS)

    cpdef void answered(self, bint again) noexcept:
        """Note that the kernel did the request, or said EAGAIN (*again*)."""
        self._count(again, False)

    cpdef void unsupported(self) noexcept:
        """Note that the kernel said EOPNOTSUPP."""
        self._count(True, True)

    @property
    def state(self):
        """The state in one word: 'asking', 'unsupported' or 'pausing'."""
        return 'asking' if self.asks() else 'unsupported' if self.is_unsupported() else 'pausing'


cdef class Device:
    """A file system as its ``st_dev`` names it, or a block device."""

    def __init__(self, number, file_system):
        self.number = number
        self.limit = max(1, _nr_requests(number) // 2)
        self.reads = Nowait()
        self.writes = Nowait()
        self.has(file_system)

    cdef int has(self, str file_system) except -1:
        """Note that the device has *file_system*, a name as in the list of mounts; the empty name if it is
        not known."""
        self.file_system = file_system
        self.is_guess = False
        self.in_memory = file_system in IN_MEMORY
        self.answers = file_system in ANSWERING
        self.is_swapped = file_system in ('tmpfs', 'devtmpfs')
        self.is_local = self.in_memory or self.answers or file_system in LOCAL or (
            major(self.number) != 0 and file_system != 'fuseblk')
        return 0

    cdef Pool pool(self):
        # A forked child has pools of its own, so the pool is not kept here.
        return pool_of(self.number)

    cdef Way way(self, Nowait direction) noexcept:
        """Return the way of an aligned O_DIRECT read or overwrite, in the *direction* `reads` or `writes`."""
        if self.in_memory:
            # Such a file system knows no RWF_NOWAIT, and needs none.
            return PLAIN
        if direction.asks():
            return ASK
        # xfs says EAGAIN to every overwrite, but does not wait in it. It says EAGAIN to a read because of
        # dirty pages, and without RWF_NOWAIT the read would wait for them.
        if direction is self.writes and not direction.is_unsupported() and self.file_system == 'xfs':
            return PLAIN
        return THREAD

    def ways(self):
        """Return the present ways of an aligned O_DIRECT read and of an overwrite, as words for the
        operator."""
        names = {ASK: 'native AIO, asked not to wait', PLAIN: 'native AIO', THREAD: 'thread'}
        return names[self.way(self.reads)], names[self.way(self.writes)]

    def __repr__(self):
        return f'<Device {os.major(self.number)}:{os.minor(self.number)} {self.file_system}>'


cdef dict _devices = {}

# The device that was asked for last, and its number.
cdef Device _last = None
cdef uint64_t _last_number = 0


cdef Device device_of(uint64_t number, uint64_t mount=0):
    """Return the device with *number* as its ``st_dev``. *mount* is the unique number of its mount, or 0.
    Wait for nothing.

    The kernel uses the number of a file system without a block device (major 0) again after an unmount. So
    the list of mounts is watched for those numbers."""
    global _last, _last_number
    cdef Device found
    if major(number) == 0 and mounts_changed():
        _forget_mounted()
    if _last is not None and number == _last_number:
        return _last
    found = _devices.get(number)
    if found is not None and not found.is_guess:
        _last, _last_number = found, number
        return found
    if found is None:
        found = _devices[number] = Device(number, '')
        found.is_guess = True
    if mounts_changed():
        # This may drop the device that was just made; then the next call asks again.
        _forget_mounted()
    name = file_system_of(number, mount)
    # Until the name is known the device stays a guess, and every operation takes the way of a file system
    # that may wait.
    if name is not None:
        found.has(name)
    return found


cdef int _forget_mounted() except -1:
    """Forget the file systems without a block device, because another one may have the number now."""
    global _last
    _last = None
    for known in [known for known in _devices if os.major(known) == 0]:
        del _devices[known]
    return 0


def _nr_requests(number):
    """Return the number of requests that the queue of the device holds; `DEFAULT_QUEUE` if sysfs does not
    tell."""
    if os.major(number) == 0:
        return DEFAULT_QUEUE
    block = f'/sys/dev/block/{os.major(number)}:{os.minor(number)}'
    # A partition has no queue of its own; its disk, one directory above, has.
    for queue in (f'{block}/queue', f'{block}/../queue'):
        try:
            with open(f'{queue}/nr_requests') as file:
                return int(file.read())
        except OSError:
            continue
    return DEFAULT_QUEUE


def devices():
    """Return a list of all devices that were used."""
    return list(_devices.values())


cdef int forget_answers() except -1:
    """Ask every file system with RWF_NOWAIT again."""
    cdef Device device
    for device in _devices.values():
        device.reads, device.writes = Nowait(), Nowait()
    return 0


# Whether `waited_in_hub` has written its warning, which it writes once in a process.
cdef bint _has_waited = False


cdef int waited_in_hub(int fd, uint64_t began) except -1:
    """Note that a call on *fd* has held the hub since *began* (coarse ns), though it should have waited for
    nothing. Until such calls are quick again, the device's calls take threads.

    An on-access scanner (fanotify) makes such calls wait. Or the process had no processor for a while; then
    the calls soon come back to the hub."""
    global _has_waited
    cdef facts found
    cdef Device device
    cdef uint64_t ns = coarse_ns() - began
    if facts_of(fd, b'', &found):
        return 0
    device = device_of(found.device, found.mount)
    device.pool().beware()
    if not _has_waited:
        _has_waited = True
        # In a greenlet, as in `Known.stalled` of route.pyx.
        spawn(log.warning, 'a call on %r that waits for no disk held its hub for %d ms: an on-access scanner? '
              'Calls on that device take threads until they are quick again. Further ones are not told',
              device, ns // 1000000)
    return 0
