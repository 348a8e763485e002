from greenaio._core.loop cimport HubDriver

cdef HubDriver current_driver()
