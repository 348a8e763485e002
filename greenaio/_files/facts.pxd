from libc.stdint cimport int64_t, uint64_t
from posix.stat cimport S_ISBLK, S_ISCHR, S_ISREG

from greenaio._core.handle cimport BLOCK_DEVICE

cdef extern from "<fcntl.h>":
    const int O_APPEND
    const int O_DIRECT
    const int O_PATH
    const int O_ACCMODE
    const int O_RDONLY

cdef extern from *:
    """
    #include <errno.h>
    #include <stdint.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <sys/sysmacros.h>
    #include <unistd.h>

    /* The facts of a file that the kernel has in memory. AT_STATX_DONT_SYNC has it answer from memory;
       without that flag it would ask a FUSE or network server, which may be frozen. */
    struct facts { uint64_t device, inode, size, mount; unsigned mode, links, align, align_memory, block; };

    /* Do the same as `facts_of` where a sandbox denies statx. This call may ask a server. */
    static inline int old_facts_of(int dir, const char *path, struct facts *f)
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
    int facts_of(int dir, const char *path, facts *found) nogil

# The bits of `Known.kind`.
cdef enum:
    # A regular file or a block device; fsync goes by native AIO.
    STORED = 1
    # Open with O_DIRECT; reads and writes go by native AIO, too.
    DIRECT = 2
    # Open with O_APPEND; every write makes the file longer.
    APPEND = 4
    REGULAR = 8
    # A character device. Its driver alone knows what a call waits for.
    UNSURE = 16
    WRITABLE = 32
    # A file of a file system that `answers`. Each read or write is one call, because each has its own answer.
    ANSWER = 64
    # Such a file, whose reads wait for nothing.
    AT_ONCE = 128
    # Such a file, whose reads may wait for an event; poll tells whether they would.
    EVENTS = 256
    # A block device. A call through its page cache locks it, and a seek waits for that lock.
    LOCKED = 512

cdef inline uint64_t number_of(facts *found) noexcept:
    """Return the inode number on the device that has the bytes. All nodes of a block device count as one
    inode."""
    return BLOCK_DEVICE if S_ISBLK(found.mode) else found.inode

cdef inline int kind_of(unsigned int mode, int flags) noexcept:
    """Return the bits of `Known.kind` that the st_mode and the open *flags* tell."""
    if S_ISCHR(mode):
        return UNSURE
    if not (S_ISREG(mode) or S_ISBLK(mode)) or flags & O_PATH:
        return 0
    return (STORED | (REGULAR if S_ISREG(mode) else LOCKED) | (DIRECT if flags & O_DIRECT else 0)
            | (APPEND if flags & O_APPEND else 0) | (WRITABLE if flags & O_ACCMODE != O_RDONLY else 0))

cdef int kind_of_answer(int fd, str file_system) except -1
cdef unsigned int sector_size(int fd, unsigned int mode) except 0
cdef int64_t file_size(int fd) noexcept
cdef unsigned int block_size(int fd) noexcept
