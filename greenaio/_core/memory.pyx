# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Memory of our own that the kernel may write: aligned for O_DIRECT, zeroed in forked children.

O_DIRECT into a private mapping must not run while the process forks, unless the child never sees that memory
(open(2), NOTES). So every block is a mapping with MADV_WIPEONFORK.

Blocks that come back are kept for the next request of their size, because a mapping costs two system calls
and a page fault for each page. A block comes back only after its last reference is gone. A request in flight
has a reference, so the kernel never writes a block that is kept.
"""

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.ref cimport PyObject, Py_XDECREF
from libc.string cimport memset
from posix.mman cimport (
    MADV_WIPEONFORK, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, madvise, mmap, munmap,
)

cdef extern from "Python.h":
    # Declared with PyObject, because Cython's own declaration counts references, and a resize allows only
    # one.
    PyObject *new_bytes "PyBytes_FromStringAndSize"(const char *content, Py_ssize_t nbytes) except NULL
    int _PyBytes_Resize(PyObject **data, Py_ssize_t nbytes) except -1

cdef enum:
    PAGE = 4096                 # bytes
    # Sizes of the blocks that are kept: 4 KiB << 0 to 4 KiB << 8. Larger blocks are unmapped at once.
    CLASSES = 9
    # Bytes that are kept of each class at most. A full queue of 256 requests of 16 KiB needs as many.
    KEPT_BYTES = 4194304
    # KEPT_BYTES / PAGE: the number of blocks that the smallest class keeps.
    KEPT_BLOCKS = 1024

# A stack for each class. The block that came back last goes out first, because it is likely to be in the
# processor's cache. The GIL guards the stacks.
cdef char *_kept[CLASSES][KEPT_BLOCKS]
cdef int _kept_count[CLASSES]


cdef int _class_of(size_t capacity) noexcept:
    """Return the class of the smallest blocks that have *capacity* bytes, or CLASSES if they are too large to
    be kept."""
    cdef int i = 0
    cdef size_t size = PAGE
    # The second condition ends the loop for sizes near the limit of `size_t`, where `size` would become 0.
    while size < capacity and i < CLASSES:
        size <<= 1
        i += 1
    return i


cdef class AlignedBuffer:
    """*nbytes* of writable memory at a multiple of *alignment* bytes, through the buffer protocol."""

    def __cinit__(self, Py_ssize_t nbytes, size_t alignment=PAGE):
        cdef int kind
        # mmap aligns to a page. For more than that the block is longer, and the memory begins somewhere
        # inside it.
        cdef size_t spare = alignment - PAGE if alignment > PAGE else 0
        cdef size_t capacity = nbytes + spare
        cdef size_t misfit
        kind = _class_of(capacity)
        if kind < CLASSES:
            self._capacity = <size_t>PAGE << kind
            # A kept block holds old bytes. `aligned_buffer` overwrites them with zeros, `scratch` does not
            # need to.
            if _kept_count[kind]:
                _kept_count[kind] -= 1
                self._block = _kept[kind][_kept_count[kind]]
        else:
            # A multiple of the page size, because munmap wants one.
            self._capacity = (capacity + PAGE - 1) & ~<size_t>(PAGE - 1)
        if self._block == NULL:
            self._block = <char *>mmap(NULL, self._capacity, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
            if self._block == <char *>MAP_FAILED:
                # `__dealloc__` runs after this error, and must find no block.
                self._block = NULL
                raise MemoryError
            # Linux 4.14 and later wipe the block in a child. Before that the call fails, and a program must
            # not fork during O_DIRECT. The error is ignored, because nothing else could be done.
            madvise(self._block, self._capacity, MADV_WIPEONFORK)
        misfit = <size_t>self._block % alignment
        self.address = self._block + (alignment - misfit if misfit else 0)
        self.nbytes = nbytes

    def __dealloc__(self):
        cdef int kind
        if self._block == NULL:
            return
        # The capacity of a kept block is the full size of its class, so it goes back to the class it came
        # from.
        kind = _class_of(self._capacity)
        if kind < CLASSES and _kept_count[kind] < <int>(KEPT_BYTES // self._capacity):
            _kept[kind][_kept_count[kind]] = self._block
            _kept_count[kind] += 1
        else:
            # No request in flight has this memory, or its reference would have kept the object.
            munmap(self._block, self._capacity)

    def __getbuffer__(self, Py_buffer *view, int flags):
        """Give the memory out through the buffer protocol. The view keeps this object, and so the block."""
        PyBuffer_FillInfo(view, self, self.address, self.nbytes, False, flags)

    def __len__(self):
        return self.nbytes


cdef AlignedBuffer scratch(Py_ssize_t nbytes):
    """Return a block of *nbytes* with any content. The result of a read copies its bytes out of it."""
    return AlignedBuffer.__new__(AlignedBuffer, nbytes)


def aligned_buffer(nbytes, alignment=PAGE):
    """Return *nbytes* of zeroed memory that O_DIRECT accepts, as a writable memoryview of bytes.

    *alignment* is a power of two, in bytes. In a forked child the memory reads as zeros (MADV_WIPEONFORK), so
    a fork never disturbs a request in flight. Raise ValueError for a negative size or an alignment that is no
    power of two, and MemoryError if there is no memory.
    """
    cdef AlignedBuffer buffer
    cdef Py_ssize_t n = nbytes
    cdef Py_ssize_t a = alignment
    # Checked here, because the arithmetic below it has no sign.
    if n < 0:
        raise ValueError(f'nbytes must not be negative, but is {n}')
    if a < 1 or a & (a - 1):
        raise ValueError(f'alignment must be a power of two, not {a}')
    buffer = AlignedBuffer.__new__(AlignedBuffer, n, a)
    # The block may have been used before, and its old bytes must not be shown.
    memset(buffer.address, 0, n)
    return memoryview(buffer)


cdef class Filling:
    """A bytes object of *nbytes* that is still to be filled: writable memory, through the buffer protocol,
    until `take` gives the object away. So bytes that are read in one piece are in memory once.

    The kernel may write there as long as a request pins the buffer. `resize` and `take` raise BufferError
    during that time.
    """

    def __cinit__(self, Py_ssize_t nbytes):
        self._data = new_bytes(NULL, nbytes)

    def __dealloc__(self):
        Py_XDECREF(self._data)

    def __getbuffer__(self, Py_buffer *view, int flags):
        self._check_there()
        PyBuffer_FillInfo(view, self, PyBytes_AS_STRING(<object>self._data), len(self), False, flags)
        # Counted after the view is filled, because an export that failed is never released.
        self._exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self._exports -= 1

    def __len__(self):
        self._check_there()
        return PyBytes_GET_SIZE(<object>self._data)

    cdef int _check_there(self) except -1:
        """Raise ValueError if the bytes were taken."""
        if self._data == NULL:
            raise ValueError('the bytes were taken')
        return 0

    def resize(self, Py_ssize_t nbytes):
        """Make the object *nbytes* long. New bytes have no defined content. Raise BufferError if a view
        exists."""
        self._check_there()
        # A resize may move the bytes, and the kernel would go on writing to the old place.
        if self._exports:
            raise BufferError('the memory is in use')
        # Python resizes bytes only if there is one reference to them. If it fails, `_data` is NULL and the
        # bytes are gone.
        _PyBytes_Resize(&self._data, nbytes)

    def take(self, Py_ssize_t nbytes):
        """Return the first *nbytes* as bytes. Afterwards this object is of no use. Raise BufferError if a
        view exists."""
        self.resize(nbytes)
        # `data` has a reference of its own, so the one of `_data` is dropped. From here on the bytes never
        # change.
        data = <object>self._data
        Py_XDECREF(self._data)
        self._data = NULL
        return data
