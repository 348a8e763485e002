# cython: language_level=3
"""What is known of devices and file systems, and which way an operation on them goes without waiting.

The kernel is asked in ways that never wait themselves: ``statfs`` would, on a frozen FUSE file system, but
``statmount``, the list of mounts and sysfs do not. What only use can tell, whether RWF_NOWAIT helps, is learned from
the answers, and forgotten again.
"""

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
from libc.errno cimport (
    EACCES, EAGAIN, ELOOP, ENAMETOOLONG, ENOENT, ENOMEM, ENOTDIR, EOPNOTSUPP, EPERM, errno as c_errno,
)
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, strlen
from posix.stat cimport S_ISBLK, S_ISCHR, S_ISDIR, S_ISFIFO, S_ISLNK, S_ISREG
from posix.unistd cimport close as close_fd

import greenaio._core.hub       # in a forked child, its handler runs before the one of this module
from greenaio._core import pools as _pools
from greenaio._core.bell import listen
from greenaio._core.handle import all_inodes

from greenaio._core.context cimport OWN_MIN, monotonic_ns
from greenaio._core.handle cimport BLOCK_DEVICE, Inode, inode_of
from greenaio._core.caller cimport creation_mode
from greenaio._core.driver cimport ASK, NONE, PLAIN, THREAD, Driver, Way
from greenaio._core.fifo cimport close_path_fd
from greenaio._core.mailbox cimport WAITED_NS
from greenaio._core.pools cimport lone_threads, pool_of
from greenaio._core.request cimport RWF_APPEND, RWF_NOWAIT, Request
from greenaio._core.tally cimport WRITE
from greenaio._core.threads cimport Pool, any_busy
from greenaio._core.worker cimport start_worker

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <poll.h>
    #include <limits.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <sys/sysinfo.h>
    #include <sys/sysmacros.h>
    #include <unistd.h>

    /* What the kernel has in memory of a file: DONT_SYNC, for a frozen FUSE or network file system would
       have to be asked else. */
    struct facts { uint64_t device, inode, size, mount; unsigned mode, links, align, align_memory, block; };

    /* The same where a sandbox denies statx. It may ask a server. */
    static int old_facts_of(int dir, const char *path, struct facts *f)
    {
        struct stat st;
        if (fstatat(dir, path, &st, 0x1000 /* AT_EMPTY_PATH */) < 0)
            return -errno;
        *f = (struct facts){ .device = S_ISBLK(st.st_mode) ? st.st_rdev : st.st_dev, .inode = st.st_ino,
                             .size = st.st_size, .mode = st.st_mode, .links = st.st_nlink,
                             .block = st.st_blksize };
        return 0;
    }

    __attribute__((always_inline)) static inline int facts_of(int dir, const char *path, struct facts *f)
    {
        struct { unsigned mask, blksize; uint64_t attributes; unsigned nlink, uid, gid; uint16_t mode, spare;
                 uint64_t ino, size, blocks, attributes_mask; uint64_t times[8];
                 unsigned rdev_major, rdev_minor, dev_major, dev_minor; uint64_t mnt_id;
                 unsigned dio_mem_align, dio_offset_align; uint64_t more[16]; } st = { 0 };
        if (syscall(SYS_statx, dir, path, 0x1000 /* AT_EMPTY_PATH */ | 0x4000 /* AT_STATX_DONT_SYNC */,
                    0x7ffu | 0x2000u /* STATX_BASIC_STATS, STATX_DIOALIGN: Linux 6.1 */
                    | 0x4000u /* STATX_MNT_ID_UNIQUE: Linux 6.8 */, &st) < 0)
            return errno == ENOSYS || errno == EPERM ? old_facts_of(dir, path, f) : -errno;
        f->mount = st.mask & 0x4000u && !S_ISBLK(st.mode) ? st.mnt_id : 0;
        f->mode = st.mode;
        f->links = st.nlink;
        f->inode = st.ino;
        f->size = st.size;
        f->block = st.blksize;
        f->device = S_ISBLK(st.mode) ? makedev(st.rdev_major, st.rdev_minor)
                                     : makedev(st.dev_major, st.dev_minor);
        f->align = st.mask & 0x2000u ? st.dio_offset_align : 0;
        f->align_memory = st.mask & 0x2000u ? st.dio_mem_align : 0;
        return 0;
    }

    static int has_cached_path = 1;     /* 0: openat2 is denied, or too old (before Linux 5.12) */

    /* Whether the page cache has anything of the range; no where the kernel can't tell (before Linux 6.5). */
    static inline int is_cached(int fd, uint64_t offset, uint64_t n)
    {
        struct { uint64_t offset, n; } range = { offset, n };
        struct { uint64_t cached, dirty, writeback, evicted, recently_evicted; } pages;
        return syscall(451 /* cachestat */, fd, &range, &pages, 0) == 0 && pages.cached != 0;
    }

    /* What a path leads to, as far as that is cached: an fd for it, or minus the errno, which is EAGAIN for
       what is not cached. Without a wait. */
    static inline int cached_path(int dir, const char *path, int flags)
    {
        struct { uint64_t flags, mode, resolve; } how = { O_PATH | O_CLOEXEC | flags, 0, 0x20 /* RESOLVE_CACHED */ };
        long fd;
        if (!has_cached_path)
            return -EAGAIN;
        fd = syscall(437 /* openat2 */, dir, path, &how, sizeof how);
        if (fd >= 0)
            return (int)fd;
        if (errno == EPERM || errno == ENOSYS || errno == EINVAL) {     /* O_PATH itself is never answered so */
            has_cached_path = 0;
            return -EAGAIN;
        }
        return -errno;
    }

    static inline int path_fd(int dir, const char *path, int flags)
    {
        int fd = openat(dir, path, O_PATH | O_CLOEXEC | flags);
        return fd < 0 ? -errno : fd;
    }

    /* openat for a regular file, which fails with EAGAIN instead of waiting for a process that has a lease. */
    static inline int open_leased(int dir, const char *path, int flags, int mode)
    {
        int fd = openat(dir, path, flags | O_CLOEXEC | O_NONBLOCK, mode);
        if (fd < 0)
            return -errno;
        if (!(flags & O_NONBLOCK))
            fcntl(fd, F_SETFL, flags & ~O_NONBLOCK);
        return fd;
    }

    /* The file that an O_PATH fd is of, opened: this one, whatever its path leads to by now. */
    static inline int reopen(int fd, int flags)
    {
        char link[32];
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        return open_leased(AT_FDCWD, link, flags, 0);
    }

    #define KIND_MAX 64                 /* bytes of a file system's name, and of its server's: "fuse.sshfs" */

    /* The kind of file system that the mount of that unique number has: statmount(2). Whether it is known, and on
       *device*: else that is none of the mount's own, as of a file below an overlay. */
    static int kind_of_mount(uint64_t mount, uint64_t device, char *kind)
    {
        struct { unsigned size, spare; uint64_t mount, wanted; } request = { 24, 0, mount,
            0x1 | 0x20 | 0x100 /* STATMOUNT_SB_BASIC, STATMOUNT_FS_TYPE, STATMOUNT_FS_SUBTYPE */ };
        struct { unsigned size, options; uint64_t mask; unsigned major, minor; uint64_t magic; unsigned flags, type;
                 uint64_t more[10]; unsigned subtype, source; uint64_t rest[48]; char text[512]; } answer = { 0 };
        if (syscall(457 /* statmount */, &request, &answer, sizeof answer, 0) < 0 || !(answer.mask & 0x20))
            return 0;
        snprintf(kind, KIND_MAX, answer.mask & 0x100 ? "%s.%s" : "%s", answer.text + answer.type,
                 answer.text + answer.subtype);
        return 1;
    }

    /* /proc/self/mountinfo, without the paths. */
    struct mount_table { long count; struct { uint64_t device; char kind[KIND_MAX]; } mounts[]; };

    static struct mount_table *mount_table;     /* the hub's */
    static struct mount_table *read_table;      /* from the thread that has read it to the hub, which takes it */
    static int reads_mounts;                    /* a thread is at it */

    static struct mount_table *parse_mounts(char *text)
    {
        long lines = 1;
        char *line, *next;
        struct mount_table *table;
        for (line = text; *line; line++)
            lines += *line == '\\n';
        table = malloc(sizeof *table + lines * sizeof table->mounts[0]);
        if (table == NULL)
            return NULL;
        table->count = 0;
        for (line = text; (next = strchr(line, '\\n')) != NULL; line = next + 1) {
            unsigned number[2];
            char *kind;
            *next = 0;
            kind = strstr(line, " - ");
            if (kind == NULL || sscanf(line, "%*s %*s %u:%u", &number[0], &number[1]) != 2)
                continue;
            table->mounts[table->count].device = makedev(number[0], number[1]);
            sscanf(kind, " - %63s", table->mounts[table->count].kind);
            table->count++;
        }
        return table;
    }

    /* Runs in a thread. */
    static void *read_mount_table(void *unused)
    {
        size_t n = 0, room = 65536;
        char *text = malloc(room);
        int fd = open("/proc/self/mountinfo", O_RDONLY | O_CLOEXEC);
        long got = 0;
        while (fd >= 0 && text != NULL && (got = read(fd, text + n, room - n - 1)) > 0) {
            n += got;
            if (room - n < room / 4) {
                char *more = realloc(text, room *= 2);
                if (more == NULL)
                    break;
                text = more;
            }
        }
        if (fd >= 0)
            close(fd);
        if (fd >= 0 && text != NULL && got == 0) {
            text[n] = 0;
            free(__atomic_exchange_n(&read_table, parse_mounts(text), __ATOMIC_ACQ_REL));
        }
        free(text);
        __atomic_store_n(&reads_mounts, 0, __ATOMIC_RELEASE);
        return unused;
    }

    static inline int begin_mount_table(void)
    { return __atomic_exchange_n(&reads_mounts, 1, __ATOMIC_ACQ_REL) == 0; }

    static inline void end_mount_table(void)
    { __atomic_store_n(&reads_mounts, 0, __ATOMIC_RELEASE); }

    /* Take what the thread has read, if there is something; whether there is a table and no thread at the next. */
    static int take_mount_table(void)
    {
        struct mount_table *table;
        if (__atomic_load_n(&reads_mounts, __ATOMIC_ACQUIRE))
            return 0;
        table = __atomic_exchange_n(&read_table, NULL, __ATOMIC_ACQ_REL);
        if (table != NULL) {
            free(mount_table);
            mount_table = table;
        }
        return mount_table != NULL;
    }

    static const char *kind_in_table(uint64_t device)
    {
        for (long i = 0; i < mount_table->count; i++)
            if (mount_table->mounts[i].device == device)
                return mount_table->mounts[i].kind;
        return "";
    }

    /* The path by which *fd* was opened, not terminated; minus 1 if that is not known. */
    static inline ssize_t path_of(int fd, char *path, size_t n)
    {
        char link[32];
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        return readlink(link, path, n);
    }

    static inline int swap_is_used(void)
    {
        struct sysinfo all;
        return sysinfo(&all) < 0 || all.freeswap != all.totalswap;
    }

    /* Whether a page of a file in memory is swapped out: cachestat (Linux 6.5) counts it as evicted. Elsewhere
       mincore says that it is not there, as it does of a hole. What can't be asked may be. */
    static inline int is_out_of_memory(int fd, int64_t offset, uint64_t n)
    {
        struct { uint64_t offset, n; } range;
        struct { uint64_t cached, dirty, writeback, evicted, recently_evicted; } pages;
        unsigned char there[66];        /* IN_LINE_MAX of the smallest pages, and one more at each end */
        uint64_t page = sysconf(_SC_PAGESIZE), i, count;
        void *map;
        int out = 0;
        if (n == 0)
            return 0;
        range.offset = offset < 0 ? (uint64_t)lseek(fd, 0, SEEK_CUR) : (uint64_t)offset;
        range.n = n;
        if (syscall(451 /* cachestat */, fd, &range, &pages, 0) == 0)
            return pages.evicted != 0;
        n += range.offset & (page - 1);
        count = (n + page - 1) / page;
        if (count > sizeof there)
            return 1;
        map = mmap(NULL, n, PROT_READ, MAP_SHARED, fd, range.offset & ~(page - 1));
        if (map == MAP_FAILED)
            return 1;
        if (mincore(map, n, there) < 0)
            out = 1;
        for (i = 0; !out && i < count; i++)
            out = !(there[i] & 1);
        munmap(map, n);
        return out;
    }

    /* Whether the list of mounts that *fd* is open on has changed since this was last asked, or *fd* was closed. */
    static inline int mounts_changed(int fd)
    {
        struct pollfd one = { fd, POLLPRI, 0 };
        return fd < 0 || (poll(&one, 1, 0) == 1 && one.revents & (POLLPRI | POLLERR | POLLNVAL));
    }
    """
    struct facts:
        uint64_t device
        uint64_t inode
        uint64_t size
        uint64_t mount              # the unique number of its mount; 0 before Linux 6.8, and for a block device
        unsigned int mode
        unsigned int links
        unsigned int align
        unsigned int align_memory
        unsigned int block
    const int KIND_MAX
    unsigned int major(uint64_t device)
    bint kind_of_mount(uint64_t mount, uint64_t device, char *kind)
    void *read_mount_table(void *unused) noexcept nogil
    bint begin_mount_table()
    void end_mount_table()
    bint take_mount_table()
    const char *kind_in_table(uint64_t device)
    bint has_cached_path
    int facts_of(int dir, const char *path, facts *found) nogil
    bint is_cached(int fd, uint64_t offset, uint64_t n)
    int cached_path(int dir, const char *path, int flags) nogil
    int path_fd(int dir, const char *path, int flags) nogil
    int open_leased(int dir, const char *path, int flags, int mode) nogil
    int reopen(int fd, int flags)
    int __builtin_popcountll(unsigned long long)
    bint mounts_changed(int fd)
    bint swap_is_used() nogil
    bint is_out_of_memory(int fd, int64_t offset, uint64_t n) nogil
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
    const int O_RDWR
    const int O_CREAT
    const int O_EXCL
    const int O_DIRECTORY
    const int O_NONBLOCK
    const int AT_EMPTY_PATH
    const int AT_FDCWD
    const int F_GETFL
    const int F_DUPFD_CLOEXEC
    int openat(int dir_fd, const char *path, int flags, ...) nogil
    int c_fcntl "fcntl"(int fd, int command, ...)

cdef extern from "<limits.h>":
    const int PATH_MAX

cdef extern from "<sys/stat.h>":
    struct c_stat "stat":
        pass
    int fstatat(int dir_fd, const char *path, c_stat *found, int flags) nogil

cdef extern from "<unistd.h>":
    long readlinkat(int dir_fd, const char *path, char *text, size_t room) nogil
    int unlinkat(int dir_fd, const char *path, int flags) nogil

cdef enum:
    REFUSED_MAX = 32            # of the last 64 answers: above it, asking costs more than it saves
    DEMOTED_MAX = 1024          # files: the oldest is forgotten first
    DEFAULT_QUEUE = 64          # requests: where sysfs does not know the device, as for btrfs
    LINKS_MAX = 40              # on one way, as the kernel's MAXSYMLINKS

cdef enum:                      # how far a walk came
    ARRIVED
    STOPPED
    CROSSED

cdef uint64_t PAUSE_NS = 1000000000         # then ask again: a habit may be that of one file
cdef uint64_t PAUSE_MAX_NS = 64 * PAUSE_NS  # one request in that time costs nothing
cdef uint64_t DEMOTED_NS = 60000000000      # how long a file takes threads whose submission stalled
cdef uint64_t SWAP_ASKED_NS = 10000000      # how old may be what is known of swap
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
    """Whether RWF_NOWAIT is worth asking for, in one direction on one file system.

    A refusal is a trait of the request (EAGAIN) or of its file (EOPNOTSUPP), until it becomes a habit. Then the
    file system is not asked for a second. The habit of EOPNOTSUPP, as of overlayfs, is broken by an answer of
    another kind only; each time that one more request finds it unbroken, the pause doubles."""

    def __init__(self):
        self._length = PAUSE_NS

    cdef bint asks(self) noexcept:
        if self._pause_until:
            if monotonic_ns() < self._pause_until:
                return False
            self._pause_until = 0
            if not self.is_unsupported():
                self._history = self._unknown = 0
        return True

    cdef bint is_unsupported(self) noexcept:
        return __builtin_popcountll(self._unknown) > REFUSED_MAX

    cdef void _count(self, bint refused, bint is_unknown) noexcept:
        self._history = self._history << 1 | refused
        self._unknown = self._unknown << 1 | is_unknown
        if not is_unknown:
            self._length = PAUSE_NS
        if refused and __builtin_popcountll(self._history) > REFUSED_MAX:
            self._pause_until = monotonic_ns() + self._length
            if self.is_unsupported():
                self._length = min(2 * self._length, PAUSE_MAX_NS)

    cpdef void answered(self, bint again) noexcept:
        """The kernel did it, or said EAGAIN."""
        self._count(again, False)

    cpdef void unsupported(self) noexcept:
        """It said EOPNOTSUPP."""
        self._count(True, True)

    @property
    def state(self):
        """'asking', 'unsupported' or 'pausing'."""
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
        self.file_system = file_system
        self.is_guess = False
        self.in_memory = file_system in IN_MEMORY
        self.answers = file_system in ANSWERING
        self.is_swapped = file_system in ('tmpfs', 'devtmpfs')
        self.is_local = self.in_memory or self.answers or file_system in LOCAL or (
            major(self.number) != 0 and file_system != 'fuseblk')
        return 0

    cdef Pool pool(self):
        return pool_of(self.number)     # asked for each time: a fork makes new ones

    cdef Way way(self, Nowait direction) noexcept:
        """How an aligned O_DIRECT read or overwrite goes."""
        if self.in_memory:
            return PLAIN                # it has no RWF_NOWAIT, and needs none
        if direction.asks():
            return ASK
        # xfs says EAGAIN to every overwrite, and does not wait. To a read it says so because of dirty pages,
        # and would wait for them.
        if direction is self.writes and not direction.is_unsupported() and self.file_system == 'xfs':
            return PLAIN
        return THREAD

    def ways(self):
        """The `Way` that an aligned O_DIRECT read and an overwrite go at present."""
        names = {ASK: 'native AIO, asked not to wait', PLAIN: 'native AIO', THREAD: 'thread'}
        return names[self.way(self.reads)], names[self.way(self.writes)]

    def __repr__(self):
        return f'<Device {os.major(self.number)}:{os.minor(self.number)} {self.file_system}>'


cdef dict _devices = {}
cdef Device _last = None                # of them: the one that was asked for last ...
cdef uint64_t _last_number = 0          # ... and its number
cdef int _mounts = -1                   # /proc/self/mountinfo
cdef object _mounts_inode = None        # its device and inode: the number may be closed, and given out again
cdef bint _table_is_current = False     # no mount has changed since it was read, or began to be


cdef Device device_of(uint64_t number, uint64_t mount=0):
    """The device of that ``st_dev``, which is on the mount of that unique number, if this is known. Waits for nothing.

    Numbers without a real device behind them are reused after an unmount, so for those the list of mounts is
    watched."""
    global _last, _last_number
    cdef Device found
    if major(number) == 0:
        _notice_mounts()
    if _last is not None and number == _last_number:
        return _last
    found = _devices.get(number)
    if found is not None and not found.is_guess:
        _last, _last_number = found, number
        return found
    if found is None:
        found = _devices[number] = Device(number, '')
        found.is_guess = True
    _find_out(found, mount)             # it may notice mounts: then the next call asks again
    return found


cdef int _find_out(Device device, uint64_t mount) except -1:
    """Find out what file system *device* has. The kernel tells that of one mount since Linux 6.8. Before, only the
    list of all mounts has it, which takes milliseconds where there are many: a thread reads it, and until it
    has, every operation takes the way of a file system that may wait."""
    global _table_is_current
    cdef char kind[KIND_MAX]
    if mount and kind_of_mount(mount, device.number, kind):
        device.has(kind.decode())
        return 0
    if _mounts < 0:
        device.is_guess = False         # there is no list: it stays unknown
        return 0
    _notice_mounts()
    if take_mount_table() and _table_is_current:
        device.has(kind_in_table(device.number).decode())
    elif begin_mount_table():
        _table_is_current = start_worker(read_mount_table, NULL) == 0
        if not _table_is_current:
            end_mount_table()
    return 0


cdef int _notice_mounts() except -1:
    """Forget what may not be true since mounts have changed."""
    global _last, _table_is_current
    if mounts_changed(_mounts):
        _table_is_current = False
        if _mounts >= 0 and _inode_of(_mounts) != _mounts_inode:
            _watch_mounts()
        _last = None
        for known in [known for known in _devices if os.major(known) == 0]:
            del _devices[known]
    return 0


def _watch_mounts():
    """At import, and in each forked child: who shares an open file shares what it was told of."""
    global _mounts, _mounts_inode, _table_is_current
    cdef int low
    if _mounts >= 0 and _inode_of(_mounts) == _mounts_inode:    # else a daemon has closed it, and uses its number
        close_fd(_mounts)
    _table_is_current = False
    end_mount_table()                   # the thread that was at it stayed with the parent
    low = openat(AT_FDCWD, b'/proc/self/mountinfo', O_RDONLY | O_CLOEXEC)
    _mounts = c_fcntl(low, F_DUPFD_CLOEXEC, OWN_MIN)
    if _mounts < 0:                     # so many are not allowed; or there is no list, and nothing is remembered
        _mounts = low
    elif low >= 0:
        close_fd(low)
    _mounts_inode = _inode_of(_mounts)


def _inode_of(fd):
    try:
        facts = posix.fstat(fd)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


_watch_mounts()
listen(_watch_mounts)


def mounted_at(path):
    """The device number that *path*, as bytes, leads to, as far as the kernel has it in memory."""
    cdef Walk walk = Walk(path, AT_FDCWD, True)
    walk.go_on()
    return walk.way.device


def _nr_requests(number):
    """How many requests the device's queue holds."""
    if os.major(number) == 0:
        return DEFAULT_QUEUE
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
    """What is known of an open file; for a raw fd asked at each call, because numbers are reused."""

    cdef Inode inode(self):
        if self._inode is None:
            self._inode = inode_of(self.device.number, self.number)
        return self._inode

    cdef int demote(self) except -1:
        """Send the file to threads for a while, however it is opened."""
        cdef Inode inode = self.inode()
        inode.demoted_until = monotonic_ns() + DEMOTED_NS
        _demoted.pop(inode.key, None)       # now it is the youngest
        _demoted[inode.key] = inode
        if len(_demoted) > DEMOTED_MAX:
            del _demoted[next(iter(_demoted))]
        return 0

    def stalled(self, uint64_t ns):
        """The submission of a request on this file waited *ns* for something: threads, for a while. Return
        what `events.FileDemoted` has."""
        global _demotions
        _demotions += 1
        self.demote()
        if _demotions == 1:
            # In a greenlet: a handler may have to wait for its lock, and this is amidst a pass.
            spawn(log.warning, 'a request on %r, inode %d, held io_submit and its hub for %d ms; this file takes '
                  'threads for %d s. Further ones are only counted', self.device, self.number,
                  ns // 1000000, DEMOTED_NS // 1000000000)
        return (f'{os.major(self.device.number)}:{os.minor(self.device.number)} {self.device.file_system}',
                self.number, ns / 1e9, DEMOTED_NS / 1e9)

    cdef int way(self, Driver driver, Request request) except -1:
        """How an aligned O_DIRECT request goes, so that io_submit does not wait."""
        cdef bint writing = request.direction == WRITE
        cdef Way way
        cdef uint64_t demoted_until = (self._inode if self._inode is not None else self.inode()).demoted_until
        if not driver.has_aio() or demoted_until and monotonic_ns() < demoted_until or writing and self._extends(request):
            return THREAD
        if request.flags & RWF_NOWAIT:
            return PLAIN                # it is asked already
        way = self.device.way(self.device.writes if writing else self.device.reads)
        if is_swapped_out(self, request.fd, request.offset, request.nbytes):
            return THREAD
        # Pages that are dirty it would write first, and wait for that. In memory they are the file.
        if way == PLAIN and writing and not self.device.in_memory and is_cached(
                request.fd, request.offset, request.nbytes):
            return THREAD
        return way

    cpdef int next_way(self, Driver driver, Request request, int64_t result, bint asked) except -1:
        """A thread, because only its system call gives the true answer. But where RWF_NOWAIT has brought a part, as
        btrfs reads one extent, the rest is asked for again, for as long as that brings something."""
        # With flags of the caller, EOPNOTSUPP may be about those.
        cdef bint is_unclear = request.flags != 0 and result == -EOPNOTSUPP
        if not asked:
            return THREAD
        if not is_unclear:
            self.answered(request, result)
        if result >= 0:
            if not self._falls_short(request, result):
                return NONE
            request.count_done(result)
        if request.flags or result <= 0 and result != -EOPNOTSUPP:
            return THREAD
        return self.way(driver, request)

    cpdef Pool pool(self):
        # A character device waits for no disk.
        return lone_threads() if self.kind & UNSURE else self.device.pool()

    cdef int answered(self, Request request, int64_t result) except -1:
        """Learn from *result*, an answer to RWF_NOWAIT."""
        cdef Nowait nowait = self.device.writes if request.direction == WRITE else self.device.reads
        if result == -EOPNOTSUPP:
            nowait.unsupported()
            # As ext4 says of a file with inline data or a journal of its data, whatever its file system does
            # with others.
            self.demote()
        else:
            nowait.answered(result == -EAGAIN)
        return 0

    cdef bint _falls_short(self, Request request, int64_t result) noexcept:
        """Whether more can be had than RWF_NOWAIT brought. An end in the middle of a sector is the file's."""
        if result & (self.align - 1):
            return False
        if request.direction == WRITE or not self.kind & REGULAR or not self.device.is_local:
            return True
        return request.offset + result < file_size(request.fd)

    cdef bint _extends(self, Request request) noexcept:
        """Whether a write makes the file longer: the kernel would do that inside io_submit, and wait."""
        if self.kind & APPEND or request.flags & RWF_APPEND:
            return True
        return self.kind & REGULAR and <uint64_t>request.offset + request.nbytes > <uint64_t>file_size(request.fd)

    def is_open_as(self, int fd):
        """Whether *fd* is this file, still."""
        cdef facts found
        return not facts_of(fd, b'', &found) and number_of(&found) == self.number and (
            found.device == self.device.number)


cdef bint _has_waited = False


cdef int waited_in_hub(int fd, uint64_t began) except -1:
    """A call on *fd* that should have waited for nothing has held the hub since *began*: the next ones on its device
    take threads. An on-access scanner (fanotify) does that; or the processor was away, and they soon come back."""
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
        # In a greenlet, as in `Known.stalled`.
        spawn(log.warning, 'a call on %r that waits for no disk held its hub for %d ms: an on-access scanner? '
              'Calls on that device take threads until they are quick again. Further ones are not told',
              device, ns // 1000000)
    return 0


# The inodes that were demoted last. Each stays here, so that the next open of the file finds it.
cdef dict _demoted = {}
cdef int _demotions = 0


def forgive():
    """Forget what was learned: let every file that was sent to threads take native AIO again, and ask every
    file system again whether it would wait."""
    cdef Device device
    for inode in all_inodes():
        inode.demoted_until = 0
    _demoted.clear()
    for device in _devices.values():
        device.reads, device.writes = Nowait(), Nowait()
    _pools.forgive()


def demotions():
    """How often a file was sent to threads for a while because a submission on it stalled."""
    return _demotions


cdef bint _knows_block_devices = False


cdef bint knows_block_devices() noexcept:
    """Whether an fd was a block device: then a read by number asks what it reads first."""
    return _knows_block_devices


cdef bint seek_may_wait(Known known) noexcept:
    """Whether a read may have the lock that a seek takes. A file that the kernel makes up is locked until its read
    returns, even if its greenlet was killed. A block device is locked, for all processes, as long as a read or write
    through its page cache waits for the disk."""
    return known.kind & (ANSWER | AT_ONCE) == ANSWER or known.kind & LOCKED != 0


cdef Known know(int fd, object name):
    """What kind of file *fd* is, and on which device. Asks nothing that could wait."""
    cdef Known known = Known.__new__(Known)
    cdef facts found
    cdef int error = facts_of(fd, b'', &found) if fd >= 0 else -errno.EBADF     # AT_FDCWD is negative, and a folder
    if error:
        raise failed(error, name)
    _learn(known, fd, &found, c_fcntl(fd, F_GETFL))
    return known


cdef Known know_again(int fd, Known known):
    """What kind of file *fd* is, and whether it has a name at present. *known* is what was known of it before, or None;
    the number may mean another file by now."""
    cdef facts found
    if known is None or facts_of(fd, b'', &found) or number_of(&found) != known.number or (
            found.device != known.device.number):
        return know(fd, None)
    known.is_nameless = _is_nameless(known, &found)
    return known


cdef inline int _learn(Known known, int fd, facts *found, int flags) except -1:
    """Note what *found* and the *flags* that it is open with tell of the file *fd*, which may also be an O_PATH fd."""
    global _knows_block_devices
    known.kind = _kind(found.mode, flags)
    if known.kind & LOCKED:
        _knows_block_devices = True
    known.mode, known.size = found.mode, found.size
    known.number = number_of(found)
    known.device = device_of(found.device, found.mount)
    known.is_nameless = _is_nameless(known, found)
    if known.device.answers and known.kind & STORED:
        known.kind |= _kind_of_answer(fd, known.device.file_system)
    if known.kind & DIRECT:
        known.align = found.align or _sector_size(fd, found.mode)
        known.align_memory = found.align_memory or known.align
    return 0


cdef inline bint _is_nameless(Known known, facts *found) noexcept:
    return found.links == 0 and (found.size > IN_LINE_MAX or not known.device.in_memory)


cdef inline uint64_t number_of(facts *found) noexcept:
    """The number of its inode, on the device that its bytes are on."""
    return BLOCK_DEVICE if S_ISBLK(found.mode) else found.inode


cdef int _kind(unsigned int mode, int flags) noexcept:
    if S_ISCHR(mode):
        return UNSURE
    if not (S_ISREG(mode) or S_ISBLK(mode)) or flags & O_PATH:
        return 0
    return (STORED | (REGULAR if S_ISREG(mode) else LOCKED) | (DIRECT if flags & O_DIRECT else 0)
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


cdef bint in_line(Known known, uint64_t nbytes, int fd=-1, int64_t offset=0) except -1:
    """Whether the plain system call will do, here and now: it has no disk to wait for. With *fd*, also whether no
    byte from *offset* (-1: the file's own position) on is swapped out."""
    if nbytes > IN_LINE_MAX or known.kind & UNSURE:
        return False
    if known.kind & STORED and not known.device.in_memory:
        return known.kind & AT_ONCE != 0
    return fd < 0 or not is_swapped_out(known, fd, offset, nbytes)


cdef uint64_t _swap_asked = 0           # ns
cdef bint _swap_is_used = False


cdef bint is_swapped_out(Known known, int fd, int64_t offset, uint64_t nbytes) noexcept:
    """Whether a part of a file in memory has to come from a disk first. Where no swap is in use, which is asked
    once in a while, nothing is."""
    if not known.device.is_swapped or not known.kind & STORED:
        return False
    return swap_is_in_use() and is_out_of_memory(fd, offset, nbytes)


cdef bint swap_is_in_use() noexcept:
    global _swap_asked, _swap_is_used
    cdef uint64_t now = monotonic_ns()
    if now - _swap_asked > SWAP_ASKED_NS:
        _swap_asked, _swap_is_used = now, swap_is_used()
    return _swap_is_used


cdef int64_t file_size(int fd) noexcept:
    """In bytes; 0 for what has none."""
    cdef facts found
    return 0 if facts_of(fd, b'', &found) else found.size


cdef bint is_certain(int error) noexcept:
    """Whether minus the errno *error* tells of the path, not of the moment."""
    return error in (-ENOENT, -ENOTDIR, -EACCES, -ELOOP, -ENAMETOOLONG)


cdef unsigned int block_size(int fd) noexcept:
    """In bytes: what its file system likes to have read and written at a time."""
    cdef facts found
    return 0 if facts_of(fd, b'', &found) else found.block


cdef int open_fd_again(int fd, int flags) noexcept:
    """The file that the O_PATH fd is of, opened by an open that does not wait; or minus the errno."""
    return reopen(fd, flags)


cdef int folder_at_hand() noexcept:
    """An O_PATH fd of the working directory; or minus the errno, which is EAGAIN where a server would have to be asked
    whether it may be searched."""
    return cached_path(AT_FDCWD, b'.', 0) if has_cached_path else path_fd(AT_FDCWD, b'.', 0)


cdef int path_at_hand(bytes path, int dir_fd, int flags, object name) except -2:
    """An O_PATH fd of what *path* leads to, if finding that out took no disk and no server, and a stat of it or
    an open won't; else -1. Raises what is known not to work. *flags*: O_NOFOLLOW or 0."""
    cdef facts found
    return _path_at_hand(path, dir_fd, flags, name, &found)


cdef int _path_at_hand(bytes path, int dir_fd, int flags, object name, facts *found) except -2:
    """`path_at_hand`, and what the kernel tells of it."""
    cdef Device device
    cdef int fd = cached_path(dir_fd, path, flags)
    if fd < 0:
        if is_certain(fd):
            raise failed(fd, name)
        return -1
    cdef bint is_good = False
    try:
        if facts_of(fd, b'', found) == 0:
            device = device_of(found.device, found.mount)
            is_good = device.is_local and device.file_system != 'overlay'       # that has two below it
    finally:
        if not is_good:
            close_fd(fd)
    return fd if is_good else -1


cdef int open_at_hand(bytes path, int dir_fd, int flags, object name, Known known=None) except -2:
    """A regular file that is to be read, opened here and now, if it waits for no disk; else -1. A new *known* then has
    what was found out for that."""
    cdef facts found
    cdef int opened = -EAGAIN
    cdef int fd
    cdef uint64_t began
    if flags & ~(O_CLOEXEC | O_NOFOLLOW | O_DIRECT | O_NOATIME | O_LARGEFILE):
        return -1
    fd = _path_at_hand(path, dir_fd, flags & O_NOFOLLOW, name, &found)
    if fd < 0:
        return -1
    try:
        if S_ISREG(found.mode) and not (
                any_busy() and device_of(found.device, found.mount).pool().is_wary()):
            if known is not None:
                _learn(known, fd, &found, flags)
            began = coarse_ns()
            opened = reopen(fd, flags & ~O_NOFOLLOW)
            if coarse_ns() - began > WAITED_NS:
                waited_in_hub(fd, began)
    finally:
        close_fd(fd)
    if opened == -EACCES or opened == -EPERM:
        raise failed(opened, name)      # refused: no thread, which may have been born with other rights, repeats it
    return max(-1, opened)


# The way to a path -------------------------------------------------------------------------------
#
# A path leads over directories, links and mounts, and each of its names may have to be asked of another device.
# Each wait has to be with the threads of the device that is asked: a link on a healthy disk to a server that hangs
# may not hold up the disk. So the hub walks as far as the kernel has the names cached, and hands the walk to the
# device where it stops; a thread there walks on, waiting, and gives the walk back at the border of its device.
#
#     hub                                thread of the device
#     STOPPED, at a name of device A
#                                        looks names up, reads links: as long as they are on A
#                                        CROSSED to B: gives it back
#     walks on from the cache: it may
#     come far, or stop at once, on B
#                                        ARRIVED: makes the call, by the path as it was given
#
# The walk decides only where to wait. The call itself takes the whole path again, so all that the kernel checks
# on the way to a file, it checks. A local disk has its names cached by then. A server may be asked for its names
# again, so behind a server A the call is made by threads of the pair (A, B), which hold up no call that uses only
# B:
#
#                                        ARRIVED on B: gives it back, too
#     passes A again
#                                        of the pair: makes the call
#
# If the path changes in between, or the cache forgets a name of the way to the first directory, the call may
# wait with the threads of the wrong device; that is as much as a walk without locks can promise.

cdef void _let_go(way *this) noexcept nogil:
    """Close all that the walk has open: a call that waits needs no fds besides its own."""
    _close_place(this, this.folder)
    _close_place(this, this.link)
    _close_place(this, this.end)
    this.folder = this.link = this.end = this.copy = -1


cdef void _close_place(way *this, int fd) noexcept nogil:
    if fd < 0:
        return
    if fd == this.copy:
        close_fd(fd)
    else:
        close_path_fd(fd)


cdef void _free_way(way *this) noexcept nogil:
    _let_go(this)
    free(this.room)
    free(this)


cdef bint _note_place(way *this, int fd) noexcept nogil:
    """Note the device and mount that *fd* is on; whether the device is another than before."""
    cdef facts found
    cdef bint is_other
    if facts_of(fd, b'', &found):
        return False
    is_other = found.device != this.device
    this.device, this.mount, this.inode, this.mode = found.device, found.mount, found.inode, found.mode
    return is_other


cdef int _arrive(way *this, int error) noexcept nogil:
    this.is_over = True
    if error:
        this.error = error
        this.mode = 0
    return ARRIVED


cdef int _look_up(way *this, bint may_wait) noexcept nogil:
    """An O_PATH fd of the name that is next, or of the link that it is; or minus the errno."""
    cdef int fd = -ENOTDIR
    cdef char *end = this.ahead
    cdef char kept
    this.name = end
    while end[0] != 0 and end[0] != b'/':
        end += 1
    kept, end[0] = end[0], 0
    if kept:            # as a directory, because that triggers an automount
        fd = (path_fd if may_wait else cached_path)(this.folder, this.name, O_NOFOLLOW | O_DIRECTORY)
    if fd == -ENOTDIR:
        fd = (path_fd if may_wait else cached_path)(this.folder, this.name, O_NOFOLLOW)
    end[0] = kept
    if fd >= 0:
        this.ahead = end
    return fd


cdef int _follow(way *this) noexcept nogil:
    """Read the link, and put its text ahead of the names that are still to be walked. Or minus the errno."""
    cdef long n, more = strlen(this.ahead)
    cdef char *text = <char *>malloc(PATH_MAX + more + 2)
    if text == NULL:
        return -ENOMEM
    n = readlinkat(this.link, b'', text, PATH_MAX)
    this.links += 1
    if n <= 0 or this.links > LINKS_MAX:
        free(text)
        return -ELOOP
    memcpy(text + n, this.ahead, more + 1)      # nothing, or a slash and the names behind it
    free(this.room)
    this.room = this.ahead = text
    return 0


cdef int _jump(way *this) noexcept nogil:
    """Follow the link as the kernel does, to what it is, whatever its text says: an O_PATH fd, or minus the errno."""
    cdef char kept = this.ahead[0]
    this.ahead[0] = 0
    cdef int fd = path_fd(this.folder, this.name, 0)
    this.ahead[0] = kept
    return fd


cdef int _walk(way *this, bint may_wait) noexcept nogil:
    """Walk on. Return ARRIVED; STOPPED, if the next step would have to wait for `device`; or CROSSED as soon as
    it is on another device, where it may have arrived."""
    cdef int fd
    cdef bint is_other
    while True:
        if this.link >= 0:
            if not may_wait:
                return STOPPED
            fd = _jump(this) if this.jumps else _follow(this)
            close_fd(this.link)
            this.link = -1
            if fd < 0:
                return _arrive(this, fd)
            if not this.jumps:
                continue
        elif this.ahead[0] == b'/':
            while this.ahead[0] == b'/':
                this.ahead += 1
            fd = path_fd(AT_FDCWD, b'/', 0)     # it is in memory
            if fd < 0:
                return _arrive(this, fd)
        elif this.ahead[0] == 0:
            this.end, this.folder = this.folder, -1
            return _arrive(this, 0)
        else:
            fd = _look_up(this, may_wait)
            if fd == -EAGAIN and not may_wait:
                return STOPPED
            if fd < 0:
                return _arrive(this, fd)
        is_other = _note_place(this, fd)
        if S_ISLNK(this.mode) and (this.ahead[0] or this.follows):
            this.link = fd
        elif this.ahead[0] == 0:
            this.end = fd
            _arrive(this, 0)
        elif not S_ISDIR(this.mode):
            close_fd(fd)
            return _arrive(this, -ENOTDIR)
        else:
            while this.ahead[0] == b'/':
                this.ahead += 1
            _close_place(this, this.folder)
            if this.folder == this.copy:
                this.copy = -1
            this.folder = fd
        if is_other:
            return CROSSED
        if this.is_over:
            return ARRIVED


cdef bint _has_to_go_on(way *this) noexcept nogil:
    """In a thread: walk on; return whether the call is for other threads."""
    return not this.is_over and (_walk(this, True) == CROSSED or this.passes_a_server
                                 or this.stops_at_end and S_ISREG(this.mode))


cdef bint _waits_for_a_peer(way *this) noexcept nogil:
    """Whether an open waits there for the other end of a FIFO, or for a device to be ready."""
    if not this.opens or this.flags & O_PATH:
        return False
    if S_ISFIFO(this.mode):
        return not this.flags & O_NONBLOCK and this.flags & O_ACCMODE != O_RDWR
    return S_ISCHR(this.mode)


cdef long open_there(void *arg) noexcept nogil:
    """In a thread: walk on, then open. Or GO_ON: it is for other threads. Or LEASED: a process has to give up its
    lease first."""
    cdef way *this = <way *>arg
    cdef int fd
    cdef int mode
    if _has_to_go_on(this):
        return GO_ON
    if _waits_for_a_peer(this) and not this.is_alone:
        return GO_ON
    _let_go(this)
    mode = creation_mode(this.permissions)
    if S_ISREG(this.mode) and this.is_local and not this.flags & (O_NONBLOCK | O_PATH) and not this.is_patient:
        fd = open_leased(this.dir_fd, this.path, this.flags, mode)
        return LEASED if fd == -EAGAIN else fd
    fd = openat(this.dir_fd, this.path, this.flags | O_CLOEXEC, mode)
    return fd if fd >= 0 else -c_errno


cdef long stat_there(void *arg) noexcept nogil:
    """In a thread: walk on, then stat. Or GO_ON, see `open_there`."""
    cdef way *this = <way *>arg
    cdef int error
    if _has_to_go_on(this):
        return GO_ON
    if this.end >= 0 and this.links == 0:       # each step was checked as in a look-up of the whole path
        error = 0 if fstatat(this.end, b'', <c_stat *>this.answer, AT_EMPTY_PATH) == 0 else c_errno
        _let_go(this)                   # here: to close the last fd of a file without a name frees it
        return -error
    _let_go(this)
    return 0 if fstatat(this.dir_fd, this.path, <c_stat *>this.answer, this.flags) == 0 else -c_errno


cdef long unlink_there(void *arg) noexcept nogil:
    """In a thread: walk on, then unlink. Or GO_ON, see `open_there`."""
    cdef way *this = <way *>arg
    if _has_to_go_on(this):
        return GO_ON
    _let_go(this)
    return 0 if unlinkat(this.dir_fd, this.path, 0) == 0 else -c_errno


@cython.final
cdef class Walk:
    """The way to *path*, for a call that may have to wait; to where it leads, if that is a link and it *follows*."""

    def __cinit__(self, bytes path, int dir_fd, bint follows):
        cdef way *this
        self.path, self.servers = path, ()
        self.way = this = <way *>calloc(1, sizeof(way))
        if this == NULL:
            raise MemoryError
        this.folder = this.link = this.end = this.copy = -1
        this.room = this.ahead = <char *>malloc(len(path) + 1)
        if this.room == NULL:
            raise MemoryError
        memcpy(this.room, <char *>path, len(path) + 1)
        this.dir_fd, this.path, this.follows = dir_fd, path, follows
        if not path:
            _arrive(this, -ENOENT)
        self._begin()

    def __dealloc__(self):
        if self.way != NULL:
            _free_way(self.way)

    cdef int _begin(self) except -1:
        """From the directory that it is in, if that is cached; or from where the path begins."""
        cdef way *this = self.way
        cdef char *slash = NULL
        cdef char *at = this.ahead
        while at[0] != 0:
            if at[0] == b'/' and at[1] != b'/' and at[1] != 0:
                slash = at
            at += 1
        if slash > this.ahead:
            slash[0] = 0
            this.folder = max(-1, cached_path(this.dir_fd, this.ahead, O_DIRECTORY))
            slash[0] = b'/'
            if this.folder >= 0:
                this.ahead = slash + 1
        if this.folder < 0 and this.ahead[0] == b'/':
            this.folder = max(-1, path_fd(AT_FDCWD, b'/', 0))   # it is in memory
            while this.folder >= 0 and this.ahead[0] == b'/':
                this.ahead += 1
        elif this.folder < 0:
            # The directory where the program is has no number, and needs none.
            this.folder = c_fcntl(this.dir_fd, F_DUPFD_CLOEXEC, 0) if this.dir_fd >= 0 else this.dir_fd
            this.copy = this.folder if this.folder >= 0 else -1
        _note_place(this, this.folder if this.folder >= 0 else AT_FDCWD)
        return 0

    cdef Pool go_on(self):
        """Walk on without a wait. Return the threads with which the rest of it has to wait."""
        cdef Device device = self._device()
        while not self.way.is_over:
            if _walk(self.way, False) == STOPPED:
                if not (device.in_memory or device.answers):
                    return device.pool()
                # There even a look-up that is not cached waits for nothing. The links of /proc lead to files,
                # not to the paths that they name.
                self.way.jumps = device.file_system == 'proc'
                _walk(self.way, True)
                self.way.jumps = False
            device = self._device()
        self.way.is_alone = self.way.is_patient or _waits_for_a_peer(self.way)
        return lone_threads() if self.way.is_alone else self._pool_to_end(device)

    cdef Device _device(self):
        """The device where the walk is, and note it if it is a server: `_walk` stops at each one for that."""
        cdef Device device = device_of(self.way.device, self.way.mount)
        self.way.is_local = device.is_local
        if not device.is_local and device.number not in self.servers:
            self.servers += device.number,
        self.way.passes_a_server = len(self.servers) > (device.number in self.servers)
        return device

    cdef Pool _pool_to_end(self, Device device):
        """The threads for the call, which passes all servers again and ends on *device*."""
        if not self.way.passes_a_server:
            return device.pool()
        devices = [number for number in self.servers if number != device.number]
        if not (device.in_memory or device.answers):
            devices.append(device.number)
        return pool_of(tuple(devices) if len(devices) > 1 else devices[0])

    cdef bint is_in_memory(self) except -1:
        """Whether the walk itself, which waited for nothing, tells all that a stat would: `way.end` or `way.error`."""
        cdef Device device = device_of(self.way.device, self.way.mount)
        return (self.way.is_over and self.way.links == 0 and (device.in_memory or device.answers)
                and (self.way.end >= 0 or is_certain(self.way.error)))

    cdef Known truncated(self):
        """The file that the call empties, once it is known. None if it empties none, or may come to one later."""
        if not self.way.truncates or not self.way.is_over or not S_ISREG(self.way.mode):
            return None
        cdef Known known = Known.__new__(Known)
        known.kind, known.mode = STORED | REGULAR, self.way.mode
        known.number = self.way.inode
        known.device = device_of(self.way.device, self.way.mount)
        return known

    cdef int arrive(self) noexcept:
        """Close what is not needed any more, if it is over; return an O_PATH fd of the FIFO that it leads to, if an
        open waits there, or -1. The fd is the caller's."""
        cdef int fifo = -1
        if self.way.is_over:
            if self.way.is_alone and S_ISFIFO(self.way.mode):
                fifo, self.way.end = self.way.end, -1
            _let_go(self.way)
        return fifo


cdef object failed(long code, name):
    """The exception for minus the errno *code*, with the file's name where it has one."""
    if name is None or isinstance(name, int):
        return OSError(-code, os.strerror(-code))
    return OSError(-code, os.strerror(-code), name)
