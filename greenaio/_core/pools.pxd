from greenaio._core.threads cimport Pool

cdef Pool pool_of(device)
cdef Pool lone_threads()
