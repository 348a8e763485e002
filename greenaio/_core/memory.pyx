# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Memory of our own that the kernel may write: aligned for O_DIRECT, zeroed in forked children.

O_DIRECT into a private mapping must not run while the process forks, unless the child never sees that
memory (open(2), NOTES). So every block is a mapping with MADV_WIPEONFORK. Blocks that come back are kept
for the next request of their size, for a mapping costs two system calls and a page fault a page.
"""

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.ref cimport PyObject, Py_XDECREF
from libc.string cimport memset
from posix.mman cimport (
    MADV_WIPEONFORK, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, madvise, mmap, munmap,
)

cdef extern from "Python.h":
    PyObject *new_bytes "PyBytes_FromStringAndSize"(const char *content, Py_ssize_t nbytes) except NULL
    int _PyBytes_Resize(PyObject **data, Py_ssize_t nbytes) except -1

cdef enum:
    PAGE = 4096
    CLASSES = 9                 # 4 KiB << 0 to 4 KiB << 8: larger blocks are not kept
    KEPT_BYTES = 4194304        # at most, of each class: what a full queue of 256 x 16 KiB needs
    KEPT_BLOCKS = 1024          # KEPT_BYTES / PAGE: the smallest class keeps as many

cdef char *_kept[CLASSES][KEPT_BLOCKS]
cdef int _kept_count[CLASSES]


cdef int _class_of(size_t capacity) noexcept:
    cdef int i = 0
    cdef size_t size = PAGE
    while size < capacity and i < CLASSES:     # size would end at 0
        size <<= 1
        i += 1
    return i


cdef class AlignedBuffer:
    """*nbytes* of writable memory at a multiple of *alignment*, by the buffer protocol."""

    def __cinit__(self, Py_ssize_t nbytes, size_t alignment=PAGE):
        cdef int kind
        cdef size_t spare = alignment - PAGE if alignment > PAGE else 0
        cdef size_t capacity = nbytes + spare
        cdef size_t misfit
        kind = _class_of(capacity)
        if kind < CLASSES:
            self._capacity = <size_t>PAGE << kind
            if _kept_count[kind]:
                _kept_count[kind] -= 1
                self._block = _kept[kind][_kept_count[kind]]
        else:
            self._capacity = (capacity + PAGE - 1) & ~<size_t>(PAGE - 1)
        if self._block == NULL:
            self._block = <char *>mmap(NULL, self._capacity, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
            if self._block == <char *>MAP_FAILED:
                self._block = NULL
                raise MemoryError
            madvise(self._block, self._capacity, MADV_WIPEONFORK)   # Linux 4.14; before, K2 holds
        misfit = <size_t>self._block % alignment
        self.address = self._block + (alignment - misfit if misfit else 0)
        self.nbytes = nbytes

    def __dealloc__(self):
        cdef int kind
        if self._block == NULL:
            return
        kind = _class_of(self._capacity)
        if kind < CLASSES and _kept_count[kind] < <int>(KEPT_BYTES // self._capacity):
            _kept[kind][_kept_count[kind]] = self._block
            _kept_count[kind] += 1
        else:
            munmap(self._block, self._capacity)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.address, self.nbytes, False, flags)

    def __len__(self):
        return self.nbytes


cdef AlignedBuffer scratch(Py_ssize_t nbytes):
    """A block with whatever was in it: for a read whose bytes are copied out by its result."""
    return AlignedBuffer.__new__(AlignedBuffer, nbytes)


def aligned_buffer(nbytes, alignment=PAGE):
    """Return *nbytes* of zeroed memory that O_DIRECT accepts, as a writable memoryview of bytes.

    *alignment* is a power of two, in bytes. In a forked child the memory reads as zeros
    (MADV_WIPEONFORK), so a fork never disturbs a request in flight. Raises ValueError for a negative
    size or an alignment that is no power of two, MemoryError when there is none.
    """
    cdef AlignedBuffer buffer
    cdef Py_ssize_t n = nbytes
    cdef Py_ssize_t a = alignment
    if n < 0:
        raise ValueError(f'nbytes must not be negative, but is {n}')
    if a < 1 or a & (a - 1):
        raise ValueError(f'alignment must be a power of two, not {a}')
    buffer = AlignedBuffer.__new__(AlignedBuffer, n, a)
    memset(buffer.address, 0, n)
    return memoryview(buffer)


cdef class Filling:
    """A bytes object of *nbytes* that is still to be filled: writable memory, by the buffer protocol, until
    `take` gives the object away. So what is read whole is in memory once.

    The kernel may write there as long as a request pins the buffer. `resize` and `take` raise BufferError then.
    """

    def __cinit__(self, Py_ssize_t nbytes):
        self._data = new_bytes(NULL, nbytes)

    def __dealloc__(self):
        Py_XDECREF(self._data)

    def __getbuffer__(self, Py_buffer *view, int flags):
        self._check_there()
        PyBuffer_FillInfo(view, self, PyBytes_AS_STRING(<object>self._data), len(self), False, flags)
        self._exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self._exports -= 1

    def __len__(self):
        self._check_there()
        return PyBytes_GET_SIZE(<object>self._data)

    cdef int _check_there(self) except -1:
        if self._data == NULL:
            raise ValueError('the bytes were taken')
        return 0

    def resize(self, Py_ssize_t nbytes):
        """Make it *nbytes* long. The new bytes have no defined content."""
        self._check_there()
        if self._exports:
            raise BufferError('the memory is in use')
        _PyBytes_Resize(&self._data, nbytes)

    def take(self, Py_ssize_t nbytes):
        """Return the first *nbytes* as bytes. Afterwards this is of no use."""
        self.resize(nbytes)
        data = <object>self._data
        Py_XDECREF(self._data)
        self._data = NULL
        return data
