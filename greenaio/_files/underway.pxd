from greenaio._core.request cimport Request
from greenaio._files.route cimport Known

cdef enum:
    # Native AIO would drop this flag, so a thread makes the call.
    RWF_HIPRI = 1

cdef object shield_in_turn(Known known, Request request)
cdef object begin_at_position(bint reading, int fd, Known known, asked, name)
