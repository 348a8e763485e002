cdef class AlignedBuffer:
    cdef char *address
    cdef readonly Py_ssize_t nbytes
    cdef char *_block           # what mmap returned, _capacity bytes of it
    cdef size_t _capacity

cdef AlignedBuffer scratch(Py_ssize_t nbytes)
