from cpython.ref cimport PyObject

cdef class AlignedBuffer:
    cdef char *address
    cdef readonly Py_ssize_t nbytes
    # The address that mmap returned, with `_capacity` bytes behind it.
    cdef char *_block
    cdef size_t _capacity

cdef class Filling:
    # The only reference to the bytes, or their size could not be changed. NULL after they were taken.
    cdef PyObject *_data
    # Views that exist of the bytes.
    cdef Py_ssize_t _exports
    cdef int _check_there(self) except -1

cdef AlignedBuffer scratch(Py_ssize_t nbytes)
