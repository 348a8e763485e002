from greenaio._core.threads cimport Pool
from greenaio._files.device cimport Device
from greenaio._files.route cimport Known
from greenaio._files.steps cimport way

cdef class Walk:
    cdef bytes path
    # Keeps the other objects alive that `way` points into.
    cdef object keep
    # The numbers of the devices on the way that are not local.
    cdef tuple servers
    cdef way *way

    cdef int _begin(self) except -1
    cdef Pool go_on(self)
    cdef Device _device(self)
    cdef Pool _pool_to_end(self, Device device)
    cdef bint is_in_memory(self) except -1
    cdef Known truncated(self)
    cdef int arrive(self) noexcept
