from cpython.number cimport PyNumber_Index
from libc.string cimport strerror

cdef extern from "Python.h":
    object PyUnicode_DecodeLocale(const char *text, const char *errors)

cdef inline int c_int(value) except? -1:
    """Return *value* as an int, by the same rules as the functions of `os`. Raise TypeError if it is no
    integer.

    An argument that is declared as int is asked for its ``__int__``, so that a float would be cut off and an
    object with ``__index__`` alone refused. Py_ssize_t asks for ``__index__``, so offsets are declared as
    Py_ssize_t."""
    return PyNumber_Index(value)

cdef inline object failed(long code, name):
    """Return the OSError for *code*, minus the errno, with *name* as its file name unless that is a number or
    None."""
    text = PyUnicode_DecodeLocale(strerror(<int>-code), b'surrogateescape')
    if name is None or isinstance(name, int):
        return OSError(-code, text)
    return OSError(-code, text, name)
