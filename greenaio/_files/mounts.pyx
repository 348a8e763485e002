# cython: language_level=3
"""The name of the file system of each mount, which the kernel tells without a wait.

``statfs`` would wait on a frozen FUSE file system; ``statmount`` and the list of mounts do not. The kernel
uses the number of a file system without a block device again after an unmount, so the list is also watched.
"""

# `posix` has the plain calls, also while the functions of `os` are patched.
import posix

from libc.stdint cimport uint64_t
from posix.unistd cimport close as close_fd

# In a forked child, the handler of the hub runs before the handler of this module, because it is registered
# first.
import greenaio._core.hub
from greenaio._core.bell import listen

from greenaio._core.eventfd cimport OWN_MIN
from greenaio._core.thread cimport start_thread

cdef extern from *:
    """
    #include <fcntl.h>
    #include <poll.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/syscall.h>
    #include <sys/sysmacros.h>
    #include <unistd.h>

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

    /* Return whether the list of mounts that *fd* is open on has changed since the last call, or *fd* was
       closed. */
    static inline int list_changed(int fd)
    {
        struct pollfd one = { fd, POLLPRI, 0 };
        return fd < 0 || (poll(&one, 1, 0) == 1 && one.revents & (POLLPRI | POLLERR | POLLNVAL));
    }
    """
    const int KIND_MAX
    bint kind_of_mount(uint64_t mount, uint64_t device, char *kind)
    void *read_mount_table(void *unused) noexcept nogil
    bint begin_mount_table()
    void end_mount_table()
    bint take_mount_table()
    const char *kind_in_table(uint64_t device)
    bint list_changed(int fd)

cdef extern from "<fcntl.h>":
    const int O_CLOEXEC
    const int O_RDONLY
    const int AT_FDCWD
    const int F_DUPFD_CLOEXEC
    int openat(int dir_fd, const char *path, int flags, ...) nogil
    int c_fcntl "fcntl"(int fd, int command, ...)

# An fd of /proc/self/mountinfo, and its device and inode. The program may close the number and open another
# file there.
cdef int _mounts = -1
cdef object _mounts_inode = None

# Whether no mount has changed since a thread began to read the table.
cdef bint _table_is_current = False


cdef str file_system_of(uint64_t device, uint64_t mount):
    """Return the name of the file system of *device*, as in the list of mounts. *mount* is the unique number
    of its mount, or 0. The name is empty if the kernel does not tell it, and None if it is not known so far.

    Since Linux 6.8 the kernel can be asked about one mount. Before, only the list of all mounts has it, and
    to read the list takes milliseconds where there are many mounts. So a thread reads the list."""
    global _table_is_current
    cdef char kind[KIND_MAX]
    if mount and kind_of_mount(mount, device, kind):
        return kind.decode()
    if _mounts < 0:
        # There is no list (no /proc).
        return ''
    if take_mount_table() and _table_is_current:
        return kind_in_table(device).decode()
    if begin_mount_table():
        _table_is_current = start_thread(read_mount_table, NULL) == 0
        if not _table_is_current:
            end_mount_table()
    return None


cdef bint mounts_changed() except -1:
    """Return whether mounts have changed since the last call, or there is no list of mounts to watch."""
    return list_changed(_mounts) and _begin_again()


cdef bint _begin_again() except -1:
    """Note that the table is out of date, and watch the list again if the program has closed its fd. Return
    True."""
    global _table_is_current
    _table_is_current = False
    if _mounts >= 0 and _inode_of(_mounts) != _mounts_inode:
        _watch_mounts()
    return True


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
