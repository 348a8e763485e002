# cython: language_level=3
"""What is known of devices and file systems, and which way an operation on them goes without waiting.

The kernel is asked in ways that never wait themselves: ``statfs`` would, on a frozen FUSE file system, but
the list of mounts and sysfs do not. What only use can tell, whether RWF_NOWAIT helps, is learned from
the answers, and forgotten again.
"""

import contextlib
import errno
import fcntl
import logging
import os
import posix            # for what may be patched in os
import re
import stat
import struct

from gevent import spawn

cimport cython
from libc.stdint cimport int64_t, uint64_t
from posix.stat cimport S_ISBLK, S_ISCHR, S_ISREG
from posix.unistd cimport close as close_fd

from greenaio._context cimport monotonic_ns
from greenaio._threads cimport Pool, pool_of

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <poll.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <sys/sysmacros.h>
    #include <unistd.h>

    /* What the kernel has in memory of a file: DONT_SYNC, for a frozen FUSE or network file system would
       have to be asked else. */
    struct facts { uint64_t device, inode, size; unsigned mode, links, align, align_memory; };

    static inline int facts_of(int dir, const char *path, struct facts *f)
    {
        struct { unsigned mask, blksize; uint64_t attributes; unsigned nlink, uid, gid; uint16_t mode, spare;
                 uint64_t ino, size, blocks, attributes_mask; uint64_t times[8];
                 unsigned rdev_major, rdev_minor, dev_major, dev_minor; uint64_t mnt_id;
                 unsigned dio_mem_align, dio_offset_align; uint64_t more[16]; } st = { 0 };
        if (syscall(SYS_statx, dir, path, 0x1000 /* AT_EMPTY_PATH */ | 0x4000 /* AT_STATX_DONT_SYNC */,
                    0x7ffu | 0x2000u /* STATX_BASIC_STATS, STATX_DIOALIGN: Linux 6.1 */, &st) < 0)
            return -errno;
        f->mode = st.mode;
        f->links = st.nlink;
        f->inode = st.ino;
        f->size = st.size;
        f->device = S_ISBLK(st.mode) ? makedev(st.rdev_major, st.rdev_minor)
                                     : makedev(st.dev_major, st.dev_minor);
        f->align = st.mask & 0x2000u ? st.dio_offset_align : 0;
        f->align_memory = st.mask & 0x2000u ? st.dio_mem_align : 0;
        return 0;
    }

    /* What a path leads to, as far as that is cached: an fd for it, or minus the errno, which is EAGAIN for
       what is not cached. Without a wait. */
    static inline int cached_path(int dir, const char *path, int flags)
    {
        struct { uint64_t flags, mode, resolve; } how = { O_PATH | O_CLOEXEC | flags, 0, 0x20 /* RESOLVE_CACHED */ };
        long fd = syscall(437 /* openat2 */, dir, path, &how, sizeof how);
        return fd < 0 ? -errno : (int)fd;
    }

    /* The file that an O_PATH fd is of, opened: this one, whatever its path leads to by now. */
    static inline int reopen(int fd, int flags)
    {
        char link[32];
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        fd = openat(AT_FDCWD, link, flags | O_CLOEXEC | O_NONBLOCK);    /* or it waits for who has a lease */
        if (fd < 0)
            return -errno;
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
        return fd;
    }

    /* The device that it is on, or 0. */
    static inline uint64_t path_device(int dir, const char *path)
    {
        struct facts f = { 0 };
        int fd = cached_path(dir, path, 0);
        int error;
        if (fd < 0)
            return 0;
        error = facts_of(fd, "", &f);
        close(fd);
        return error ? 0 : f.device;
    }

    /* The path by which *fd* was opened, not terminated; minus 1 if that is not known. */
    static inline ssize_t path_of(int fd, char *path, size_t n)
    {
        char link[32];
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        return readlink(link, path, n);
    }

    /* Whether the list of mounts that *fd* is open on has changed since this was last asked. */
    static inline int mounts_changed(int fd)
    {
        struct pollfd one = { fd, POLLPRI, 0 };
        return fd < 0 || (poll(&one, 1, 0) == 1 && one.revents & (POLLPRI | POLLERR));
    }
    """
    struct facts:
        uint64_t device
        uint64_t inode
        uint64_t size
        unsigned int mode
        unsigned int links
        unsigned int align
        unsigned int align_memory
    int facts_of(int dir, const char *path, facts *found)
    int cached_path(int dir, const char *path, int flags)
    int reopen(int fd, int flags)
    uint64_t path_device(int dir, const char *path)
    int __builtin_popcountll(unsigned long long)
    bint mounts_changed(int fd)
    ssize_t path_of(int fd, char *path, size_t n)

cdef extern from "<fcntl.h>":
    const int O_APPEND
    const int O_CLOEXEC
    const int O_NOFOLLOW
    const int O_NOATIME
    const int O_LARGEFILE
    const int O_DIRECT
    const int O_PATH
    const int O_ACCMODE
    const int O_RDONLY
    const int F_GETFL
    int c_fcntl "fcntl"(int fd, int command, ...)

cdef enum:
    REFUSED_MAX = 32            # of the last 64 answers: above it, asking costs more than it saves
    DEFAULT_QUEUE = 64          # requests: where sysfs does not know the device, as for btrfs

cdef uint64_t PAUSE_NS = 1000000000         # then ask again: a habit may be that of one file
cdef uint64_t DEMOTED_NS = 60000000000      # how long a file takes threads whose submission stalled
BLKSSZGET = 0x1268

log = logging.getLogger('greenaio')

# File systems that keep their bytes in the kernel's memory: no disk to wait for, so `os` itself will do.
IN_MEMORY = frozenset({'tmpfs', 'ramfs', 'devtmpfs', 'hugetlbfs'})

# File systems without bytes: a read or write calls a function of the kernel, which may take its time. /proc/PID/
# cmdline waits for that process's page faults, a sensor in sysfs for its bus, memory.reclaim for a disk.
ANSWERING = frozenset({'proc', 'sysfs', 'cgroup', 'cgroup2', 'debugfs', 'tracefs', 'securityfs', 'configfs',
                       'mqueue', 'devpts', 'bpf', 'binfmt_misc', 'efivarfs', 'fusectl', 'pstore', 'resctrl',
                       'selinuxfs'})

# Of those, files that programs read often and that answer at once; and files that mean the calling thread.
_AT_ONCE = re.compile(rb'.*/(?:proc/(?:cmdline|filesystems|loadavg|meminfo|uptime|version)'
                      rb'|[0-9]+/(?:limits|stat|statm|status|attr/[a-z/]+)|trace_marker(?:_raw)?)')

# On these file systems poll does not tell whether a read would wait: it tells of changes, and by telling forgets
# them, as for /proc/mounts. So they are not asked, but for the file that is the exception.
_POLL_TELLS_OF_CHANGES = frozenset({'proc', 'sysfs', 'cgroup', 'cgroup2'})
_HAS_EVENTS = re.compile(rb'.*/proc/kmsg')

# Those that tell no server of a close, besides all that are mounted from a block device.
LOCAL = frozenset({'btrfs', 'zfs', 'overlay'})


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

    cpdef void answered(self, bint again) noexcept:
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
        self.answers = file_system in ANSWERING
        self.is_local = self.in_memory or self.answers or file_system in LOCAL or (
            os.major(number) != 0 and file_system != 'fuseblk')
        self.limit = max(1, _nr_requests(number) // 2)
        self.reads = Nowait()
        self.writes = Nowait()

    cdef Pool pool(self):
        return pool_of(self.number)     # asked for each time: a fork makes new ones

    cdef Way way(self, Nowait direction) noexcept:
        """How an aligned O_DIRECT read or overwrite goes."""
        if direction.asks():
            return ASK
        if self.in_memory:
            return PLAIN
        # xfs says EAGAIN to every overwrite, and does not wait. To a read it says so because of dirty pages,
        # and would wait for them.
        if direction is self.writes and not direction._unknown and self.file_system == 'xfs':
            return PLAIN
        return THREAD

    def ways(self):
        """The `Way` that an aligned O_DIRECT read and an overwrite go at present."""
        names = {ASK: 'native AIO, asked not to wait', PLAIN: 'native AIO', THREAD: 'thread'}
        return names[self.way(self.reads)], names[self.way(self.writes)]

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
        close_fd(_mounts)
    try:
        _mounts = posix.open('/proc/self/mountinfo', os.O_RDONLY)
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


# Files -------------------------------------------------------------------------------------------

@cython.final
cdef class Known:
    """What is known of an open file; for a raw fd asked at each call, for numbers are reused."""

    def stalled(self, uint64_t ns):
        """The submission of a request on this file waited *ns* for something: threads, for a while. Return
        what `events.FileDemoted` has."""
        global _demotions
        _demotions += 1
        _demoted[self.device.number, self.inode] = monotonic_ns() + DEMOTED_NS
        if _demotions == 1:
            # In a greenlet: a handler may have to wait for its lock, and this is amidst a pass.
            spawn(log.warning, 'a request on %r, inode %d, held io_submit and its hub for %d ms; this file takes '
                  'threads for %d s. Further ones are only counted', self.device, self.inode,
                  ns // 1000000, DEMOTED_NS // 1000000000)
        return (f'{os.major(self.device.number)}:{os.minor(self.device.number)} {self.device.file_system}',
                self.inode, ns / 1e9, DEMOTED_NS / 1e9)

    def is_open_as(self, int fd):
        """Whether *fd* is this file, still."""
        cdef facts found
        return not facts_of(fd, b'', &found) and found.inode == self.inode and found.device == self.device.number

    cdef bint is_demoted(self) except -1:
        if not _demoted:
            return False
        until = _demoted.get((self.device.number, self.inode), 0)
        if until == 0:
            return False
        if monotonic_ns() < until:
            return True
        del _demoted[self.device.number, self.inode]
        return False


cdef dict _demoted = {}                 # (device, inode): until when, ns
cdef int _demotions = 0


def forgive():
    """Forget what was learned: let every file that was sent to threads take native AIO again, and ask every
    file system again whether it would wait."""
    cdef Device device
    _demoted.clear()
    for device in _devices.values():
        device.reads, device.writes = Nowait(), Nowait()


def demotions():
    """How often a file was sent to threads for a while because a submission on it stalled."""
    return _demotions


cdef Known know(int fd, object name):
    """What kind of file *fd* is, and on which device. Asks nothing that could wait."""
    cdef Known known = Known.__new__(Known)
    cdef facts found
    cdef int error = facts_of(fd, b'', &found) if fd >= 0 else -errno.EBADF     # AT_FDCWD is negative, and a folder
    if error:
        raise failed(error, name)
    known.kind = _kind(found.mode, c_fcntl(fd, F_GETFL))
    known.mode = found.mode
    known.inode = found.inode
    known.device = device_of(found.device)
    known.is_nameless = found.links == 0 and (found.size > IN_LINE_MAX or not known.device.in_memory)
    if known.device.answers and known.kind & STORED:
        known.kind |= _kind_of_answer(fd, known.device.file_system)
    if known.kind & DIRECT:
        known.align = found.align or _sector_size(fd, found.mode)
        known.align_memory = found.align_memory or known.align
    return known


cdef int _kind(unsigned int mode, int flags) noexcept:
    if S_ISCHR(mode):
        return UNSURE
    if not (S_ISREG(mode) or S_ISBLK(mode)) or flags & O_PATH:
        return 0
    return (STORED | (REGULAR if S_ISREG(mode) else 0) | (DIRECT if flags & O_DIRECT else 0)
            | (APPEND if flags & O_APPEND else 0) | (WRITABLE if flags & O_ACCMODE != O_RDONLY else 0))


cdef int _kind_of_answer(int fd, str file_system) except -1:
    cdef char path[128]
    cdef ssize_t n = path_of(fd, path, sizeof(path))
    name = path[:max(n, 0)]
    cdef int kind = ANSWER
    if _AT_ONCE.fullmatch(name):
        kind |= AT_ONCE
    elif file_system not in _POLL_TELLS_OF_CHANGES or _HAS_EVENTS.fullmatch(name):
        kind |= EVENTS
    return kind


cdef unsigned int _sector_size(int fd, unsigned int mode) except 0:
    """What O_DIRECT wants, where statx does not tell: before Linux 6.1, or in memory."""
    if stat.S_ISBLK(mode):
        return struct.unpack('i', fcntl.ioctl(fd, BLKSSZGET, bytes(4)))[0]
    return 512


cdef bint in_line(Known known, uint64_t nbytes) except -1:
    """Whether the plain system call will do, here and now: it has no disk to wait for."""
    if nbytes > IN_LINE_MAX or known.kind & UNSURE:
        return False
    return not known.kind & STORED or known.device.in_memory or known.kind & AT_ONCE != 0


cdef int64_t file_size(int fd) noexcept:
    """In bytes; 0 for what has none."""
    cdef facts found
    return 0 if facts_of(fd, b'', &found) else found.size


cdef Device device_of_path(bytes path, int dir_fd):
    """The device that *path* is on: as the kernel has it in memory, else by its longest mount point."""
    cdef uint64_t device = path_device(dir_fd, path)
    cdef bytes folder
    if device == 0:                     # it may be about to be created
        folder = os.path.dirname(path) or b'.'
        device = path_device(dir_fd, folder)
    if device == 0:
        device = mounted_at(os.path.abspath(path))
    return device_of(device)


cdef int path_at_hand(bytes path, int dir_fd, int flags, object name) except -2:
    """An O_PATH fd of what *path* leads to, if finding that out took no disk and no server, and a stat of it or
    an open won't; else -1. Raises what is known not to work. *flags*: O_NOFOLLOW or 0."""
    cdef facts found
    cdef Device device
    cdef int fd = cached_path(dir_fd, path, flags)
    if fd < 0:
        if fd in (-errno.ENOENT, -errno.ENOTDIR, -errno.EACCES, -errno.ELOOP, -errno.ENAMETOOLONG):
            raise failed(fd, name)
        return -1
    cdef bint is_good = False
    try:
        if facts_of(fd, b'', &found) == 0:
            device = device_of(found.device)
            is_good = device.is_local and device.file_system != 'overlay'       # that has two below it
    finally:
        if not is_good:
            close_fd(fd)
    return fd if is_good else -1


cdef int open_at_hand(bytes path, int dir_fd, int flags, object name) except -2:
    """A regular file that is to be read, opened here and now, if it waits for nobody; else -1."""
    cdef facts found
    cdef int opened = -1
    cdef int fd
    if flags & ~(O_CLOEXEC | O_NOFOLLOW | O_DIRECT | O_NOATIME | O_LARGEFILE):
        return -1
    fd = path_at_hand(path, dir_fd, flags & O_NOFOLLOW, name)
    if fd < 0:
        return -1
    if facts_of(fd, b'', &found) == 0 and S_ISREG(found.mode):
        opened = max(-1, reopen(fd, flags & ~O_NOFOLLOW))
    close_fd(fd)
    return opened


cdef object failed(long code, name):
    """The exception for minus the errno *code*, with the file's name where it has one."""
    if name is None or isinstance(name, int):
        return OSError(-code, os.strerror(-code))
    return OSError(-code, os.strerror(-code), name)
