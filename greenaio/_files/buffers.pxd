from greenaio._core.context cimport PREAD, PREADV, PWRITE, PWRITEV
from greenaio._core.request cimport Request

cdef extern from *:
    """
    /* Return whether *buffer* is a memoryview that owns nothing, so that pinning it keeps no memory alive.
       io.BufferedReader hands out such views, and may free the memory while the kernel still uses it. */
    static inline int is_ownerless(PyObject *buffer)
    { return PyMemoryView_Check(buffer) && PyMemoryView_GET_BASE(buffer) == NULL; }
    """
    bint is_ownerless(object buffer)

cdef object one_or_many(bint reading, buffers)
cdef int check_place(data, Py_ssize_t offset, name) except -1
cdef object owned(buffers, bint reading)
cdef object bounced(buffer, bint reading)
cdef copy_back(steady, buffers, Py_ssize_t nbytes)

cdef inline object only(buffer):
    """Return *buffer* in the form of `one_or_many`. A tuple is no buffer; in another tuple, pinning it will say
    so."""
    return (buffer,) if type(buffer) is tuple else buffer

cdef inline int opcode_of(bint reading, bint many) noexcept:
    if many:
        return PREADV if reading else PWRITEV
    return PREAD if reading else PWRITE

cdef inline int pin(Request request, buffers) except -1:
    """Pin one buffer or a sequence of them, as the opcode of the request says."""
    if request.opcode == PREAD or request.opcode == PWRITE:
        request.pin(buffers)
    else:
        request.pin_all(buffers)
    return 0
