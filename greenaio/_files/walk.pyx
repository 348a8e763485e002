# cython: language_level=3
"""`Walk`: the way to a path, each part of which waits in threads of the device that it asks.

A path leads over directories, links and mounts, and each of its names may have to be asked of another
device. Each wait has to be in a thread of the device that is asked, because a link on a healthy disk to a
server that hangs may not hold up the disk. So the hub walks as far as the kernel has the names cached. Then
it hands the walk to the device where it stopped. A thread of that device walks on, waits, and gives the
walk back at the border of its device.

    hub                                thread of the device
    STOPPED, at a name of device A
                                       looks names up, reads links: as long as they are on A
                                       CROSSED to B: gives it back
    walks on from the cache: it may
    come far, or stop at once, on B
                                       ARRIVED: makes the call, by the path as it was given

The walk decides only in which threads to wait. The call itself takes the whole path again, so the kernel
checks all that it checks on the way to a file. A local disk has its names cached by then. A server may be
asked for its names again. So if the way passed a server A, threads of the pair (A, B) make the call, which
hold up no call that uses only B:

                                       ARRIVED on B: gives it back, too
    passes A again
                                       of the pair: makes the call

If the path changes in between, or the cache forgets a name of the way to the first directory, the call may
wait in a thread of the wrong device. A walk without locks cannot promise more.
"""

cimport cython
from libc.errno cimport ENOENT
from libc.stdlib cimport calloc, malloc
from libc.string cimport memcpy
from posix.stat cimport S_ISFIFO, S_ISREG

from greenaio._core.fifo cimport close_path_fd
from greenaio._core.pools cimport lone_threads, pool_of
from greenaio._core.threads cimport Pool
from greenaio._files.device cimport Device, device_of
from greenaio._files.facts cimport REGULAR, STORED
from greenaio._files.paths cimport cached_path, is_certain, path_fd
from greenaio._files.route cimport Known
from greenaio._files.steps cimport STOPPED, arrive, free_way, let_go, note_place, waits_for_a_peer, walk_on, way

cdef extern from "<fcntl.h>":
    const int O_DIRECTORY
    const int AT_FDCWD
    const int F_DUPFD_CLOEXEC
    int c_fcntl "fcntl"(int fd, int command, ...)


@cython.final
cdef class Walk:
    """The walk to *path* of a call that may have to wait. If it *follows*, it also follows a link at the
    end.

    A request of `walk_there` in opening.pyx keeps the object, so a thread may use `way` after the greenlet was
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
            arrive(this, -ENOENT)
        self._begin()

    def __dealloc__(self):
        if self.way != NULL:
            free_way(self.way)

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
        note_place(this, this.folder if this.folder >= 0 else AT_FDCWD)
        return 0

    cdef Pool go_on(self):
        """Walk on in the hub, without a wait. Return the threads in which the rest has to wait."""
        cdef Device device = self._device()
        while not self.way.is_over:
            if walk_on(self.way, False) == STOPPED:
                if not (device.in_memory or device.answers):
                    return device.pool()
                # On these file systems even a look-up that is not cached waits for nothing. The links of
                # /proc lead to files, not to the paths that they name.
                self.way.jumps = device.file_system == 'proc'
                walk_on(self.way, True)
                self.way.jumps = False
            device = self._device()
        self.way.is_alone = self.way.is_patient or waits_for_a_peer(self.way)
        return lone_threads() if self.way.is_alone else self._pool_to_end(device)

    cdef Device _device(self):
        """Return the device where the walk is, and write it down if it has a server. `walk_on` returns at each
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
            let_go(self.way)
        return fifo
