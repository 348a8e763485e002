from cpython.ref cimport PyObject

cdef class AlignedBuffer:
    cdef char *address
    cdef readonly Py_ssize_t nbytes
    cdef char *_block           # what mmap returned, _capacity bytes of it
    cdef size_t _capacity

cdef class Filling:
    cdef PyObject *_data        # ours alone, or the size could not be changed; NULL once it was taken
    cdef Py_ssize_t _exports
    cdef int _check_there(self) except -1

cdef AlignedBuffer scratch(Py_ssize_t nbytes)
