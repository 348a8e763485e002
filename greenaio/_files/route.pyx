# cython: language_level=3
"""`Known`: an open file, and the way that each operation on it goes without a wait in the hub.

The questions to the kernel never wait themselves.
"""

import logging
import os

from gevent import spawn

cimport cython
from libc.errno cimport EAGAIN, EBADF, EOPNOTSUPP
from libc.stdint cimport int64_t, uint64_t

from greenaio._core import pools as _pools
from greenaio._core.handle import all_inodes

from greenaio._core.context cimport monotonic_ns
from greenaio._core.dispatch cimport ASK, NONE, PLAIN, THREAD, Dispatcher, Way
from greenaio._core.driver cimport Driver
from greenaio._core.handle cimport Inode, check_open, inode_of
from greenaio._core.hub cimport current_driver
from greenaio._core.job cimport as_call
from greenaio._core.pools cimport lone_threads
from greenaio._core.request cimport RWF_APPEND, RWF_NOWAIT, Request
from greenaio._core.tally cimport WRITE
from greenaio._core.threads cimport Pool
from greenaio._files.arguments cimport failed
from greenaio._files.device cimport Device, Nowait, device_of, forget_answers
from greenaio._files.facts cimport (
    ANSWER, APPEND, AT_ONCE, DIRECT, LOCKED, REGULAR, STORED, UNSURE, WRITABLE, facts, facts_of, file_size,
    kind_of, kind_of_answer, number_of, sector_size,
)

cdef extern from *:
    """
    #include <stdint.h>
    #include <stdlib.h>
    #include <sys/mman.h>
    #include <sys/syscall.h>
    #include <sys/sysinfo.h>
    #include <unistd.h>

    /* Return whether the page cache has any page of the range. The answer is no where the kernel can't tell
       (before Linux 6.5). */
    static inline int is_cached(int fd, uint64_t offset, uint64_t n)
    {
        struct { uint64_t offset, n; } range = { offset, n };
        struct { uint64_t cached, dirty, writeback, evicted, recently_evicted; } pages;
        return syscall(451 /* cachestat */, fd, &range, &pages, 0) == 0 && pages.cached != 0;
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
    """
    bint is_cached(int fd, uint64_t offset, uint64_t n)
    bint swap_is_used() nogil
    bint is_out_of_memory(int fd, int64_t offset, uint64_t n) nogil

cdef extern from "<fcntl.h>":
    const int F_GETFL
    int c_fcntl "fcntl"(int fd, int command, ...)

cdef enum:
    # The number of files that are remembered; the oldest is forgotten first.
    DEMOTED_MAX = 1024

# For this time a file whose submission stalled takes threads.
cdef uint64_t DEMOTED_NS = 60000000000
# The greatest age of the answer whether swap is in use.
cdef uint64_t SWAP_ASKED_NS = 10000000

log = logging.getLogger('greenaio')


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

    cdef int way(self, Dispatcher driver, Request request) except -1:
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

    cpdef int next_way(self, Dispatcher driver, Request request, int64_t result, bint asked) except -1:
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


# The inodes that were demoted last, by key, with the oldest first. The dict keeps each `Inode` alive after
# the last close of the file, so that the next open of the file finds it.
cdef dict _demoted = {}
cdef int _demotions = 0


def forgive():
    """Forget all that was learned. Every file that was sent to threads takes native AIO again, and every file
    system is asked with RWF_NOWAIT again."""
    for inode in all_inodes():
        inode.demoted_until = 0
    _demoted.clear()
    forget_answers()
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
    cdef int error = facts_of(fd, b'', &found) if fd >= 0 else -EBADF
    if error:
        raise failed(error, name)
    _learn(known, fd, &found, c_fcntl(fd, F_GETFL))
    return known


cdef Known know_open(int fd):
    """Return the facts of *fd*. Raise EBADF if it is not open, also if the program has closed it and
    operations that are under way still keep its number."""
    check_open(fd)
    return know(fd, None)


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


cdef int learn(Known known, int fd, facts *found, int flags) except -1:
    """Do the work of `_learn`, for another module."""
    return _learn(known, fd, found, flags)


cdef inline int _learn(Known known, int fd, facts *found, int flags) except -1:
    """Write into *known* all that *found* and the open *flags* tell of the file *fd*, which may also be an
    O_PATH fd."""
    global _knows_block_devices
    known.kind = kind_of(found.mode, flags)
    if known.kind & LOCKED:
        _knows_block_devices = True
    known.mode, known.size = found.mode, found.size
    known.number = number_of(found)
    known.device = device_of(found.device, found.mount)
    known.is_nameless = _is_nameless(known, found)
    if known.device.answers and known.kind & STORED:
        known.kind |= kind_of_answer(fd, known.device.file_system)
    if known.kind & DIRECT:
        known.align = found.align or sector_size(fd, found.mode)
        known.align_memory = found.align_memory or known.align
    return 0


cdef inline bint _is_nameless(Known known, facts *found) noexcept:
    """Return whether the last close of the file frees bytes, and takes time for that."""
    return found.links == 0 and (found.size > IN_LINE_MAX or not known.device.in_memory)


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


cdef int64_t perform(Request request, Known known, Pool pool=None) except? -4096:
    """Have a thread make the call. Return its result, or minus the errno. *pool* is None for the threads of
    the device."""
    return current_driver().perform_by_thread(request, known.device.pool() if pool is None else pool)


cdef int64_t by_thread(Driver driver, Request request, Known known) except? -4096:
    """Have a thread make the request. Return bytes moved, or minus the errno."""
    request.file = known
    as_call(request)
    return driver.perform_by_thread(request, known.pool())
