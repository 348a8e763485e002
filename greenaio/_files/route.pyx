# cython: language_level=3
"""Facts of devices and file systems, and the way that an operation on them goes without a wait in the hub.

The questions to the kernel never wait themselves. ``statfs`` would wait on a frozen FUSE file system;
``statmount``, the list of mounts and sysfs do not. Only use can tell whether RWF_NOWAIT helps. This module
learns that from the answers, and forgets it again.
"""

import errno
import fcntl
import logging
import os
# `posix` has the plain calls, also while the functions of `os` are patched.
import posix
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

# In a forked child, the handler of the hub runs before the handler of this module, because it is registered
# first.
import greenaio._core.hub
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
from greenaio._core.thread cimport start_thread
from greenaio._core.threads cimport Pool, any_busy

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

    /* The facts of a file that the kernel has in memory. AT_STATX_DONT_SYNC has it answer from memory;
       without that flag it would ask a FUSE or network server, which may be frozen. */
    struct facts { uint64_t device, inode, size, mount; unsigned mode, links, align, align_memory, block; };

    /* Do the same as `facts_of` where a sandbox denies statx. This call may ask a server. */
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

    /* Find the facts of *path* in the directory *dir*; with an empty path, the facts of *dir* itself. Return
       0, or minus the errno. A block device has the number of the disk, not of the file system where its node
       is. */
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

    /* 0 once openat2 was denied, or did not know RESOLVE_CACHED (before Linux 5.12). */
    static int has_cached_path = 1;

    /* Return whether the page cache has any page of the range. The answer is no where the kernel can't tell
       (before Linux 6.5). */
    static inline int is_cached(int fd, uint64_t offset, uint64_t n)
    {
        struct { uint64_t offset, n; } range = { offset, n };
        struct { uint64_t cached, dirty, writeback, evicted, recently_evicted; } pages;
        return syscall(451 /* cachestat */, fd, &range, &pages, 0) == 0 && pages.cached != 0;
    }

    /* Look the path up in the kernel's cache, without a wait. Return an O_PATH fd of the file; or minus the
       errno, which is EAGAIN if a name is not cached. */
    static inline int cached_path(int dir, const char *path, int flags)
    {
        struct { uint64_t flags, mode, resolve; } how = { O_PATH | O_CLOEXEC | flags, 0, 0x20 /* RESOLVE_CACHED */ };
        long fd;
        if (!has_cached_path)
            return -EAGAIN;
        fd = syscall(437 /* openat2 */, dir, path, &how, sizeof how);
        if (fd >= 0)
            return (int)fd;
        /* An open with O_PATH alone never fails with these, so the kernel or a sandbox refuses openat2. */
        if (errno == EPERM || errno == ENOSYS || errno == EINVAL) {
            has_cached_path = 0;
            return -EAGAIN;
        }
        return -errno;
    }

    /* Look the path up, and wait for it if need be. Return an O_PATH fd, or minus the errno. */
    static inline int path_fd(int dir, const char *path, int flags)
    {
        int fd = openat(dir, path, O_PATH | O_CLOEXEC | flags);
        return fd < 0 ? -errno : fd;
    }

    /* Open a regular file. Fail with EAGAIN instead of a wait for a process that has a lease on it: the
       kernel asks that process to give the lease up, and O_NONBLOCK keeps the open from waiting. The caller
       did not ask for O_NONBLOCK, so the fd gets its own flags afterwards. */
    static inline int open_leased(int dir, const char *path, int flags, int mode)
    {
        int fd = openat(dir, path, flags | O_CLOEXEC | O_NONBLOCK, mode);
        if (fd < 0)
            return -errno;
        if (!(flags & O_NONBLOCK))
            fcntl(fd, F_SETFL, flags & ~O_NONBLOCK);
        return fd;
    }

    /* Open the file that the O_PATH fd stands for, even if its path leads to another file by now. */
    static inline int reopen(int fd, int flags)
    {
        char link[32];
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        return open_leased(AT_FDCWD, link, flags, 0);
    }

    /* The most bytes of the name of a file system together with its server, such as "fuse.sshfs". */
    #define KIND_MAX 64

    /* Ask statmount(2) which kind of file system the mount of that unique number has. Return 0 if the kernel
       does not tell. */
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

    /* The list of mounts goes from a native thread, which has no GIL, to the hubs, which have it:

           a hub                                   the native thread
           reads_mounts = 1, starts the thread
                                                   reads and parses the list
                                                   puts the table into read_table, by an exchange;
                                                   frees a table there that no hub has taken
                                                   reads_mounts = 0 (release)
           sees reads_mounts == 0 (acquire)
           takes read_table, by an exchange;
           frees its old table

       So a table is never freed while a hub looks a device up in it. */

    /* The table in which hubs look devices up. Only a thread that holds the GIL uses it. */
    static struct mount_table *mount_table;
    /* A new table, which no hub has taken so far. */
    static struct mount_table *read_table;
    /* 1 while a thread reads the list. */
    static int reads_mounts;

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

    /* Read the list of mounts in a thread, because that takes milliseconds where there are many. A list that
       could not be read to its end is dropped, and the hub keeps its old table, if any. */
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

    /* Take the table that the thread has read, if there is one. Return whether the hub has a table and no
       thread reads a newer one. */
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

    /* Find the path by which *fd* was opened. Return its length; it is not terminated. Return -1 if it is not
       known. */
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

    /* Return whether a page of a file in memory is swapped out. cachestat (Linux 6.5) counts such a page as
       evicted. On older kernels mincore says that the page is not there, as it says of a hole. The answer is
       yes if the kernel can't be asked, because then the page may be swapped out. */
    static inline int is_out_of_memory(int fd, int64_t offset, uint64_t n)
    {
        struct { uint64_t offset, n; } range;
        struct { uint64_t cached, dirty, writeback, evicted, recently_evicted; } pages;
        /* One byte a page: IN_LINE_MAX in the smallest pages, and one more page at each end. */
        unsigned char there[66];
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

    /* Return whether the list of mounts that *fd* is open on has changed since the last call, or *fd* was
       closed. */
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
        # The unique number of its mount; 0 before Linux 6.8, and for a block device.
        uint64_t mount
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
    # Refusals among the last 64 answers. With more than that, the question costs more than it saves.
    REFUSED_MAX = 32
    # The number of files that are remembered; the oldest is forgotten first.
    DEMOTED_MAX = 1024
    # The number of requests of a device that sysfs does not know, such as a device of btrfs.
    DEFAULT_QUEUE = 64
    # Links on one walk, as many as the kernel's MAXSYMLINKS.
    LINKS_MAX = 40

# How far a walk came.
cdef enum:
    ARRIVED
    STOPPED
    CROSSED

# After this pause ask the file system again, because the refusals may have come from one file.
cdef uint64_t PAUSE_NS = 1000000000
# The longest pause. One request in that time costs nearly nothing.
cdef uint64_t PAUSE_MAX_NS = 64 * PAUSE_NS
# For this time a file whose submission stalled takes threads.
cdef uint64_t DEMOTED_NS = 60000000000
# The greatest age of the answer whether swap is in use.
cdef uint64_t SWAP_ASKED_NS = 10000000
BLKSSZGET = 0x1268

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

# Files on those file systems that programs read often and that answer at once; and files that stand for the
# calling thread, so that another thread would read or write the wrong one.
_AT_ONCE = re.compile(rb'.*/(?:proc/(?:cmdline|filesystems|loadavg|meminfo|uptime|version)'
                      rb'|[0-9]+/(?:limits|stat|statm|status|attr/[a-z/]+)|trace_marker(?:_raw)?)')

# On these file systems poll does not tell whether a read would wait. It tells of changes, as for
# /proc/mounts, and a change is told only once, so a poll here would take it from the program. Their files are
# not polled, except for /proc/kmsg.
_POLL_TELLS_OF_CHANGES = frozenset({'proc', 'sysfs', 'cgroup', 'cgroup2'})
_HAS_EVENTS = re.compile(rb'.*/proc/kmsg')

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

# An fd of /proc/self/mountinfo, and its device and inode. The program may close the number and open another
# file there.
cdef int _mounts = -1
cdef object _mounts_inode = None

# Whether no mount has changed since a thread began to read the table.
cdef bint _table_is_current = False


cdef Device device_of(uint64_t number, uint64_t mount=0):
    """Return the device with *number* as its ``st_dev``. *mount* is the unique number of its mount, or 0.
    Wait for nothing.

    The kernel uses the number of a file system without a block device (major 0) again after an unmount. So
    the list of mounts is watched for those numbers."""
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
    # `_find_out` may notice a change of the mounts and drop the device; then the next call asks again.
    _find_out(found, mount)
    return found


cdef int _find_out(Device device, uint64_t mount) except -1:
    """Find out which file system *device* has.

    Since Linux 6.8 the kernel can be asked about one mount. Before, only the list of all mounts has it, and
    to read the list takes milliseconds where there are many mounts. So a thread reads the list. Until then
    the device stays a guess, and every operation takes the way of a file system that may wait."""
    global _table_is_current
    cdef char kind[KIND_MAX]
    if mount and kind_of_mount(mount, device.number, kind):
        device.has(kind.decode())
        return 0
    if _mounts < 0:
        # There is no list (no /proc), so the file system stays unknown.
        device.is_guess = False
        return 0
    _notice_mounts()
    if take_mount_table() and _table_is_current:
        device.has(kind_in_table(device.number).decode())
    elif begin_mount_table():
        _table_is_current = start_thread(read_mount_table, NULL) == 0
        if not _table_is_current:
            end_mount_table()
    return 0


cdef int _notice_mounts() except -1:
    """Forget all that may be untrue now, if mounts have changed since the last call."""
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
    """Open the list of mounts, at import and in each forked child. Two processes that share one open file
    also share its changes: the one that polls first takes them from the other."""
    global _mounts, _mounts_inode, _table_is_current
    cdef int low
    # Otherwise the program, such as a daemon, has closed the number and may use it for another file.
    if _mounts >= 0 and _inode_of(_mounts) == _mounts_inode:
        close_fd(_mounts)
    _table_is_current = False
    # In a forked child, the thread that read the list stayed with the parent.
    end_mount_table()
    low = openat(AT_FDCWD, b'/proc/self/mountinfo', O_RDONLY | O_CLOEXEC)
    _mounts = c_fcntl(low, F_DUPFD_CLOEXEC, OWN_MIN)
    # The limit of open files may forbid a number as high as OWN_MIN. Without a list, `low` is -1, too.
    if _mounts < 0:
        _mounts = low
    elif low >= 0:
        close_fd(low)
    _mounts_inode = _inode_of(_mounts)


def _inode_of(fd):
    """Return the device and inode numbers of *fd*; None if it is closed."""
    try:
        facts = posix.fstat(fd)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


_watch_mounts()
listen(_watch_mounts)


def mounted_at(path):
    """Return the number of the device that *path* (bytes) leads to, as far as the kernel has the path in
    memory."""
    cdef Walk walk = Walk(path, AT_FDCWD, True)
    walk.go_on()
    return walk.way.device


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


# Files -------------------------------------------------------------------------------------------

@cython.final
cdef class Known:
    """The facts of an open file. For a raw fd they are asked at each call, because numbers are used again."""

    cdef Inode inode(self):
        """Return the inode, which all open fds of the file share."""
        if self._inode is None:
            self._inode = inode_of(self.device.number, self.number)
        return self._inode

    cdef int demote(self) except -1:
        """Send the file to threads for `DEMOTED_NS`, through any fd of it."""
        cdef Inode inode = self.inode()
        inode.demoted_until = monotonic_ns() + DEMOTED_NS
        # Take the file out first, so that it becomes the youngest in the dict.
        _demoted.pop(inode.key, None)
        _demoted[inode.key] = inode
        if len(_demoted) > DEMOTED_MAX:
            del _demoted[next(iter(_demoted))]
        return 0

    def stalled(self, uint64_t ns):
        """Demote the file, because the submission of a request on it waited *ns* nanoseconds. Return the
        arguments of `events.FileDemoted`: the device, the inode number, the wait and the time of the demotion
        in seconds."""
        global _demotions
        _demotions += 1
        self.demote()
        if _demotions == 1:
            # Log in a greenlet of its own: a handler may have to wait for its lock, and this runs during a
            # pass of the driver in the hub.
            spawn(log.warning, 'a request on %r, inode %d, held io_submit and its hub for %d ms; this file takes '
                  'threads for %d s. Further ones are only counted', self.device, self.number,
                  ns // 1000000, DEMOTED_NS // 1000000000)
        return (f'{os.major(self.device.number)}:{os.minor(self.device.number)} {self.device.file_system}',
                self.number, ns / 1e9, DEMOTED_NS / 1e9)

    cdef int way(self, Driver driver, Request request) except -1:
        """Return the way of an aligned O_DIRECT request by which io_submit does not wait."""
        cdef bint writing = request.direction == WRITE
        cdef Way way
        cdef uint64_t demoted_until = (self._inode if self._inode is not None else self.inode()).demoted_until
        if not driver.has_aio() or demoted_until and monotonic_ns() < demoted_until or writing and self._extends(request):
            return THREAD
        if request.flags & RWF_NOWAIT:
            # The request carries the flag already.
            return PLAIN
        way = self.device.way(self.device.writes if writing else self.device.reads)
        if is_swapped_out(self, request.fd, request.offset, request.nbytes):
            return THREAD
        # io_submit would write dirty pages of the range first, and wait for that. On a file system in memory
        # the pages are the file itself.
        if way == PLAIN and writing and not self.device.in_memory and is_cached(
                request.fd, request.offset, request.nbytes):
            return THREAD
        return way

    cpdef int next_way(self, Driver driver, Request request, int64_t result, bint asked) except -1:
        """Return the way on which *request* goes on after *result*; NONE if it is done. *asked* tells whether
        it went with RWF_NOWAIT.

        Usually a thread goes on, because only its system call gives the true answer. If RWF_NOWAIT has
        brought a part, as when btrfs reads one extent, the rest is asked for again, as long as that brings
        more bytes."""
        # If the caller has set flags, EOPNOTSUPP may be about those flags.
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
        """Return the threads for calls on the file."""
        # A call on a character device waits for no disk, so it may not take the threads of one.
        return lone_threads() if self.kind & UNSURE else self.device.pool()

    cdef int answered(self, Request request, int64_t result) except -1:
        """Learn from *result*, which is the answer to a request with RWF_NOWAIT: bytes or minus the errno."""
        cdef Nowait nowait = self.device.writes if request.direction == WRITE else self.device.reads
        if result == -EOPNOTSUPP:
            nowait.unsupported()
            # ext4 says this of a file with inline data or a journal of its data. Other files of the same file
            # system may be answered, so also remember it for this file.
            self.demote()
        else:
            nowait.answered(result == -EAGAIN)
        return 0

    cdef bint _falls_short(self, Request request, int64_t result) noexcept:
        """Return whether the file may have more bytes than RWF_NOWAIT brought. A read that ends in the middle
        of a sector has come to the end of the file."""
        if result & (self.align - 1):
            return False
        if request.direction == WRITE or not self.kind & REGULAR or not self.device.is_local:
            return True
        return request.offset + result < file_size(request.fd)

    cdef bint _extends(self, Request request) noexcept:
        """Return whether a write makes the file longer. The kernel would do that inside io_submit, and
        wait."""
        if self.kind & APPEND or request.flags & RWF_APPEND:
            return True
        return self.kind & REGULAR and <uint64_t>request.offset + request.nbytes > <uint64_t>file_size(request.fd)

    def is_open_as(self, int fd):
        """Return whether *fd* is still this file."""
        cdef facts found
        return not facts_of(fd, b'', &found) and number_of(&found) == self.number and (
            found.device == self.device.number)


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
        # In a greenlet, as in `Known.stalled`.
        spawn(log.warning, 'a call on %r that waits for no disk held its hub for %d ms: an on-access scanner? '
              'Calls on that device take threads until they are quick again. Further ones are not told',
              device, ns // 1000000)
    return 0


# The inodes that were demoted last, by key, with the oldest first. The dict keeps each `Inode` alive after
# the last close of the file, so that the next open of the file finds it.
cdef dict _demoted = {}
cdef int _demotions = 0


def forgive():
    """Forget all that was learned. Every file that was sent to threads takes native AIO again, and every file
    system is asked with RWF_NOWAIT again."""
    cdef Device device
    for inode in all_inodes():
        inode.demoted_until = 0
    _demoted.clear()
    for device in _devices.values():
        device.reads, device.writes = Nowait(), Nowait()
    _pools.forgive()


def demotions():
    """Return the number of times that a file was sent to threads because a submission on it stalled."""
    return _demotions


cdef bint _knows_block_devices = False


cdef bint knows_block_devices() noexcept:
    """Return whether any fd was a block device so far. If so, a read by number first asks for the kind of its
    file."""
    return _knows_block_devices


cdef bint seek_may_wait(Known known) noexcept:
    """Return whether a read may hold the lock that a seek takes.

    A file of a file system that `answers` is locked until its read returns, even if the greenlet of the read
    was killed. A block device is locked, for all processes, as long as a read or write through its page cache
    waits for the disk."""
    return known.kind & (ANSWER | AT_ONCE) == ANSWER or known.kind & LOCKED != 0


cdef Known know(int fd, object name):
    """Return the facts of the file *fd*. Ask nothing that could wait. Raise OSError, with *name* as its file
    name, if *fd* is not open."""
    cdef Known known = Known.__new__(Known)
    cdef facts found
    # AT_FDCWD is negative, and statx would tell of the working directory instead.
    cdef int error = facts_of(fd, b'', &found) if fd >= 0 else -errno.EBADF
    if error:
        raise failed(error, name)
    _learn(known, fd, &found, c_fcntl(fd, F_GETFL))
    return known


cdef Known know_again(int fd, Known known):
    """Return the facts of the file *fd*, with the present answer whether it has a name. *known* is the
    earlier answer of `know`, or None. The number may mean another file by now; then all facts are asked
    again. Raise OSError if *fd* is not open."""
    cdef facts found
    if known is None or facts_of(fd, b'', &found) or number_of(&found) != known.number or (
            found.device != known.device.number):
        return know(fd, None)
    known.is_nameless = _is_nameless(known, &found)
    return known


cdef inline int _learn(Known known, int fd, facts *found, int flags) except -1:
    """Write into *known* all that *found* and the open *flags* tell of the file *fd*, which may also be an
    O_PATH fd."""
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
    """Return whether the last close of the file frees bytes, and takes time for that."""
    return found.links == 0 and (found.size > IN_LINE_MAX or not known.device.in_memory)


cdef inline uint64_t number_of(facts *found) noexcept:
    """Return the inode number on the device that has the bytes. All nodes of a block device count as one
    inode."""
    return BLOCK_DEVICE if S_ISBLK(found.mode) else found.inode


cdef int _kind(unsigned int mode, int flags) noexcept:
    """Return the bits of `Known.kind` that the st_mode and the open *flags* tell."""
    if S_ISCHR(mode):
        return UNSURE
    if not (S_ISREG(mode) or S_ISBLK(mode)) or flags & O_PATH:
        return 0
    return (STORED | (REGULAR if S_ISREG(mode) else LOCKED) | (DIRECT if flags & O_DIRECT else 0)
            | (APPEND if flags & O_APPEND else 0) | (WRITABLE if flags & O_ACCMODE != O_RDONLY else 0))


cdef int _kind_of_answer(int fd, str file_system) except -1:
    """Return the bits of `Known.kind` for a file of a file system that `answers`: the path of *fd* tells
    them."""
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
    """Return the alignment that O_DIRECT wants, in bytes, if statx does not tell it: before Linux 6.1, or in
    memory."""
    if stat.S_ISBLK(mode):
        return struct.unpack('i', fcntl.ioctl(fd, BLKSSZGET, bytes(4)))[0]
    return 512


cdef bint in_line(Known known, uint64_t nbytes, int fd=-1, int64_t offset=0) except -1:
    """Return whether a plain system call of *nbytes* can run inline, because it has no disk to wait for. With
    *fd*, also find out whether any byte from *offset* on is swapped out; -1 is the file's own position."""
    if nbytes > IN_LINE_MAX or known.kind & UNSURE:
        return False
    if known.kind & STORED and not known.device.in_memory:
        return known.kind & AT_ONCE != 0
    return fd < 0 or not is_swapped_out(known, fd, offset, nbytes)


cdef uint64_t _swap_asked = 0           # ns, monotonic
cdef bint _swap_is_used = False


cdef bint is_swapped_out(Known known, int fd, int64_t offset, uint64_t nbytes) noexcept:
    """Return whether a part of a file in memory has to come from a disk first. That can't be if no swap is in
    use, which is asked every `SWAP_ASKED_NS` at most."""
    if not known.device.is_swapped or not known.kind & STORED:
        return False
    return swap_is_in_use() and is_out_of_memory(fd, offset, nbytes)


cdef bint swap_is_in_use() noexcept:
    """Return whether any page is swapped out. The answer is up to `SWAP_ASKED_NS` old."""
    global _swap_asked, _swap_is_used
    cdef uint64_t now = monotonic_ns()
    if now - _swap_asked > SWAP_ASKED_NS:
        _swap_asked, _swap_is_used = now, swap_is_used()
    return _swap_is_used


cdef int64_t file_size(int fd) noexcept:
    """Return the size in bytes; 0 for a file that has none or an fd that is not open."""
    cdef facts found
    return 0 if facts_of(fd, b'', &found) else found.size


cdef bint is_certain(int error) noexcept:
    """Return whether *error*, minus an errno, is a fact of the path, so that another attempt would fail in
    the same way."""
    return error in (-ENOENT, -ENOTDIR, -EACCES, -ELOOP, -ENAMETOOLONG)


cdef unsigned int block_size(int fd) noexcept:
    """Return the number of bytes that the file system likes to have read and written at a time; 0 if *fd* is
    not open."""
    cdef facts found
    return 0 if facts_of(fd, b'', &found) else found.block


cdef int open_fd_again(int fd, int flags) noexcept:
    """Open the file that the O_PATH *fd* stands for, without a wait. Return the new fd, or minus the
    errno."""
    return reopen(fd, flags)


cdef int folder_at_hand() noexcept:
    """Return an O_PATH fd of the working directory; or minus the errno, which is EAGAIN if a server would
    have to be asked whether the directory may be searched."""
    return cached_path(AT_FDCWD, b'.', 0) if has_cached_path else path_fd(AT_FDCWD, b'.', 0)


cdef int path_at_hand(bytes path, int dir_fd, int flags, object name) except -2:
    """Return an O_PATH fd of the file that *path* leads to, if no disk and no server was asked for it, and
    neither will be for a stat or an open. Return -1 otherwise. *flags* is O_NOFOLLOW or 0. Raise OSError if
    the kernel's cache already tells that the path leads nowhere."""
    cdef facts found
    return _path_at_hand(path, dir_fd, flags, name, &found)


cdef int _path_at_hand(bytes path, int dir_fd, int flags, object name, facts *found) except -2:
    """Do the work of `path_at_hand`, and write the facts of the file into *found*."""
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
            # A file of an overlay belongs to one of the file systems below it, which may have a server.
            is_good = device.is_local and device.file_system != 'overlay'
    finally:
        if not is_good:
            close_fd(fd)
    return fd if is_good else -1


cdef int open_at_hand(bytes path, int dir_fd, int flags, object name, Known known=None) except -2:
    """Open a regular file for reading inline, if the open waits for no disk. Return its fd, or -1. If *known*
    is given, a new object, it gets the facts that were found on the way. Raise OSError if the open was
    refused."""
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
        # The open was refused. A thread does not repeat it, because it may have been born with other rights.
        raise failed(opened, name)
    return max(-1, opened)


# The way to a path -------------------------------------------------------------------------------
#
# A path leads over directories, links and mounts, and each of its names may have to be asked of another
# device. Each wait has to be in a thread of the device that is asked, because a link on a healthy disk to a
# server that hangs may not hold up the disk. So the hub walks as far as the kernel has the names cached. Then
# it hands the walk to the device where it stopped. A thread of that device walks on, waits, and gives the
# walk back at the border of its device.
#
#     hub                                thread of the device
#     STOPPED, at a name of device A
#                                        looks names up, reads links: as long as they are on A
#                                        CROSSED to B: gives it back
#     walks on from the cache: it may
#     come far, or stop at once, on B
#                                        ARRIVED: makes the call, by the path as it was given
#
# The walk decides only in which threads to wait. The call itself takes the whole path again, so the kernel
# checks all that it checks on the way to a file. A local disk has its names cached by then. A server may be
# asked for its names again. So if the way passed a server A, threads of the pair (A, B) make the call, which
# hold up no call that uses only B:
#
#                                        ARRIVED on B: gives it back, too
#     passes A again
#                                        of the pair: makes the call
#
# If the path changes in between, or the cache forgets a name of the way to the first directory, the call may
# wait in a thread of the wrong device. A walk without locks cannot promise more.

cdef void _let_go(way *this) noexcept nogil:
    """Close all fds of the walk, because a call that waits needs no fds besides its own."""
    _close_place(this, this.folder)
    _close_place(this, this.link)
    _close_place(this, this.end)
    this.folder = this.link = this.end = this.copy = -1


cdef void _close_place(way *this, int fd) noexcept nogil:
    """Close one fd of the walk, or nothing if it is negative."""
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
    """Write down the device, mount, inode and mode of *fd*. Return whether the device is another than
    before."""
    cdef facts found
    cdef bint is_other
    if facts_of(fd, b'', &found):
        return False
    is_other = found.device != this.device
    this.device, this.mount, this.inode, this.mode = found.device, found.mount, found.inode, found.mode
    return is_other


cdef int _arrive(way *this, int error) noexcept nogil:
    """End the walk with *error*, minus the errno, or 0. Return ARRIVED."""
    this.is_over = True
    if error:
        this.error = error
        this.mode = 0
    return ARRIVED


cdef int _look_up(way *this, bint may_wait) noexcept nogil:
    """Look up the next name, and go past it. Return an O_PATH fd of it, without following a link, or minus
    the errno."""
    cdef int fd = -ENOTDIR
    cdef char *end = this.ahead
    cdef char kept
    this.name = end
    while end[0] != 0 and end[0] != b'/':
        end += 1
    kept, end[0] = end[0], 0
    # If more names follow, look the name up as a directory, because that triggers an automount.
    if kept:
        fd = (path_fd if may_wait else cached_path)(this.folder, this.name, O_NOFOLLOW | O_DIRECTORY)
    if fd == -ENOTDIR:
        fd = (path_fd if may_wait else cached_path)(this.folder, this.name, O_NOFOLLOW)
    end[0] = kept
    if fd >= 0:
        this.ahead = end
    return fd


cdef int _follow(way *this) noexcept nogil:
    """Read the link, and put its text in front of the names that are still to be walked. Return 0, or minus
    the errno."""
    cdef long n, more = strlen(this.ahead)
    cdef char *text = <char *>malloc(PATH_MAX + more + 2)
    if text == NULL:
        return -ENOMEM
    n = readlinkat(this.link, b'', text, PATH_MAX)
    this.links += 1
    if n <= 0 or this.links > LINKS_MAX:
        free(text)
        return -ELOOP
    # `ahead` is empty, or begins with a slash.
    memcpy(text + n, this.ahead, more + 1)
    free(this.room)
    this.room = this.ahead = text
    return 0


cdef int _jump(way *this) noexcept nogil:
    """Have the kernel follow the link to the file itself, because its text may be no path. Return an O_PATH
    fd, or minus the errno."""
    cdef char kept = this.ahead[0]
    this.ahead[0] = 0
    cdef int fd = path_fd(this.folder, this.name, 0)
    this.ahead[0] = kept
    return fd


cdef int _walk(way *this, bint may_wait) noexcept nogil:
    """Walk on. Return ARRIVED at the end, or STOPPED if the next step would have to wait for `way.device`, or
    CROSSED as soon as the walk is on another device, where it may be at its end, too."""
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
            # The root directory is in memory, so this does not wait.
            fd = path_fd(AT_FDCWD, b'/', 0)
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
    """Walk on in a thread. Return whether other threads have to make the call."""
    return not this.is_over and (_walk(this, True) == CROSSED or this.passes_a_server
                                 or this.stops_at_end and S_ISREG(this.mode))


cdef bint _waits_for_a_peer(way *this) noexcept nogil:
    """Return whether the open waits for the other end of a FIFO, or for a character device to be ready."""
    if not this.opens or this.flags & O_PATH:
        return False
    if S_ISFIFO(this.mode):
        return not this.flags & O_NONBLOCK and this.flags & O_ACCMODE != O_RDWR
    return S_ISCHR(this.mode)


cdef long open_there(void *arg) noexcept nogil:
    """Walk on in a thread, then open. Return the fd, or minus the errno. Return GO_ON if other threads have
    to make the call, and LEASED if a process has to give up its lease first."""
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
    """Walk on in a thread, then stat. Return 0, minus the errno, or GO_ON as `open_there` does."""
    cdef way *this = <way *>arg
    cdef int error
    if _has_to_go_on(this):
        return GO_ON
    # The walk has followed no link, so the kernel has checked each step as in a look-up of the whole path.
    if this.end >= 0 and this.links == 0:
        error = 0 if fstatat(this.end, b'', <c_stat *>this.answer, AT_EMPTY_PATH) == 0 else c_errno
        # Close the fds in this thread: the close of the last fd of a file without a name frees its blocks.
        _let_go(this)
        return -error
    _let_go(this)
    return 0 if fstatat(this.dir_fd, this.path, <c_stat *>this.answer, this.flags) == 0 else -c_errno


cdef long unlink_there(void *arg) noexcept nogil:
    """Walk on in a thread, then unlink. Return 0, minus the errno, or GO_ON as `open_there` does."""
    cdef way *this = <way *>arg
    if _has_to_go_on(this):
        return GO_ON
    _let_go(this)
    return 0 if unlinkat(this.dir_fd, this.path, 0) == 0 else -c_errno


@cython.final
cdef class Walk:
    """The walk to *path* of a call that may have to wait. If it *follows*, it also follows a link at the
    end.

    A request of `_walk` in calls.pyx keeps the object, so a thread may use `way` after the greenlet was
    killed."""

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
        """Begin in the directory of the last name, if the way to it is cached; otherwise where the path
        begins."""
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
            # The root directory is in memory, so this does not wait.
            this.folder = max(-1, path_fd(AT_FDCWD, b'/', 0))
            while this.folder >= 0 and this.ahead[0] == b'/':
                this.ahead += 1
        elif this.folder < 0:
            # AT_FDCWD, the working directory, is no fd and needs no copy.
            this.folder = c_fcntl(this.dir_fd, F_DUPFD_CLOEXEC, 0) if this.dir_fd >= 0 else this.dir_fd
            this.copy = this.folder if this.folder >= 0 else -1
        _note_place(this, this.folder if this.folder >= 0 else AT_FDCWD)
        return 0

    cdef Pool go_on(self):
        """Walk on in the hub, without a wait. Return the threads in which the rest has to wait."""
        cdef Device device = self._device()
        while not self.way.is_over:
            if _walk(self.way, False) == STOPPED:
                if not (device.in_memory or device.answers):
                    return device.pool()
                # On these file systems even a look-up that is not cached waits for nothing. The links of
                # /proc lead to files, not to the paths that they name.
                self.way.jumps = device.file_system == 'proc'
                _walk(self.way, True)
                self.way.jumps = False
            device = self._device()
        self.way.is_alone = self.way.is_patient or _waits_for_a_peer(self.way)
        return lone_threads() if self.way.is_alone else self._pool_to_end(device)

    cdef Device _device(self):
        """Return the device where the walk is, and write it down if it has a server. `_walk` returns at each
        border, so no device on the way is missed."""
        cdef Device device = device_of(self.way.device, self.way.mount)
        self.way.is_local = device.is_local
        if not device.is_local and device.number not in self.servers:
            self.servers += device.number,
        self.way.passes_a_server = len(self.servers) > (device.number in self.servers)
        return device

    cdef Pool _pool_to_end(self, Device device):
        """Return the threads for the call, which passes all servers again and ends on *device*."""
        if not self.way.passes_a_server:
            return device.pool()
        devices = [number for number in self.servers if number != device.number]
        if not (device.in_memory or device.answers):
            devices.append(device.number)
        return pool_of(tuple(devices) if len(devices) > 1 else devices[0])

    cdef bint is_in_memory(self) except -1:
        """Return whether the walk alone, which waited for nothing, tells all that a stat would tell.
        `way.end` or `way.error` then has it."""
        cdef Device device = device_of(self.way.device, self.way.mount)
        return (self.way.is_over and self.way.links == 0 and (device.in_memory or device.answers)
                and (self.way.end >= 0 or is_certain(self.way.error)))

    cdef Known truncated(self):
        """Return the file that the call empties, or None: the call empties none, or the walk is not at its
        end."""
        if not self.way.truncates or not self.way.is_over or not S_ISREG(self.way.mode):
            return None
        cdef Known known = Known.__new__(Known)
        known.kind, known.mode = STORED | REGULAR, self.way.mode
        known.number = self.way.inode
        known.device = device_of(self.way.device, self.way.mount)
        return known

    cdef int arrive(self) noexcept:
        """Close all fds of the walk if it is over. If it leads to a FIFO where an open waits, return an
        O_PATH fd of the FIFO, which the caller has to close. Return -1 otherwise."""
        cdef int fifo = -1
        if self.way.is_over:
            if self.way.is_alone and S_ISFIFO(self.way.mode):
                fifo, self.way.end = self.way.end, -1
            _let_go(self.way)
        return fifo


cdef object failed(long code, name):
    """Return the OSError for *code*, minus the errno, with *name* as its file name unless that is a number or
    None."""
    if name is None or isinstance(name, int):
        return OSError(-code, os.strerror(-code))
    return OSError(-code, os.strerror(-code), name)
