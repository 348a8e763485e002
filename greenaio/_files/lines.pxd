# The C types of _files/lines.py, for its compiled form.

cimport cython

@cython.final
cdef class Cutter:
    cdef str _encoding
    cdef bint _translates
    cdef object _text
    cdef bytes _tail
    cdef Py_ssize_t _block
    cdef bint _is_left_to_io
    cdef public bint is_iterating
    cdef public bint has_cut
    cpdef bint is_cutting(self)
    cpdef decoded_line(self)
    cpdef next_line(self, file)
    cpdef cut(self, file)
    cpdef give_back(self, file)
    cdef bint _begin(self, file) except -1
    cdef _finish(self, file)
    cdef str _leave_to_io(self, file)
    cdef str _decode(self, bytes data, bint is_whole)

@cython.final
cdef class Lines:
    cdef object _file
    cdef Cutter _cutter
