from greenaio._core.engine cimport Engine

cdef int give_up(Engine engine) except -1
