from libc.stdint cimport uint64_t

cdef str file_system_of(uint64_t device, uint64_t mount)
cdef bint mounts_changed() except -1
