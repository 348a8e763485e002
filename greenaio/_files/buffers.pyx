# cython: language_level=3, boundscheck=False, wraparound=False
"""Buffers of the caller: which the kernel may use, and the memory of ours that it uses instead of others."""

from libc.errno cimport EINVAL

from greenaio._core.memory import aligned_buffer
from greenaio._files.arguments import flat

from greenaio._files.arguments cimport failed


cdef object one_or_many(bint reading, buffers):
    """Return *buffers* as a tuple; or the only buffer, as in most calls."""
    if type(buffers) is list and len(<list>buffers) == 1:
        return only((<list>buffers)[0])
    cdef tuple sequence = _sequence(reading, buffers)
    return only(sequence[0]) if len(sequence) == 1 else sequence


cdef tuple _sequence(bint reading, buffers):
    """Return the present buffers as a tuple. The kernel moves bytes to and from these, also if the list
    changes later."""
    if type(buffers) is tuple:
        return buffers
    if type(buffers) is list:
        return tuple(buffers)
    if not hasattr(type(buffers), '__getitem__') or isinstance(buffers, dict):
        raise TypeError(f"{'preadv' if reading else 'pwritev'}() arg 2 must be a sequence")
    # Ask by index up to the length, because some sequences never end an iteration.
    return tuple([buffers[i] for i in range(len(buffers))])


cdef int check_place(data, Py_ssize_t offset, name) except -1:
    """Raise OSError if a pwrite has a negative *offset*. For pwritev2, which the call becomes, an offset of
    -1 would be the file's own position."""
    if offset < 0:
        # If *data* is not bytes-like, raise TypeError instead.
        memoryview(data)
        raise failed(-EINVAL, name)
    return 0


cdef object owned(buffers, bint reading):
    """Return *buffers*, with memory of our own instead of each buffer that is ownerless."""
    for buffer in buffers:
        if is_ownerless(buffer):
            return [bounced(buffer, reading) if is_ownerless(buffer) else buffer
                    for buffer in buffers]
    return buffers


cdef object bounced(buffer, bint reading):
    """Return memory of our own for an ownerless *buffer*, with its bytes unless it is for reading."""
    bounce = aligned_buffer(buffer.nbytes)
    if not reading:
        bounce[:] = flat(buffer)
    return bounce


cdef copy_back(steady, buffers, Py_ssize_t nbytes):
    """Copy the *nbytes* that were read from the memory of our own into the caller's buffers."""
    cdef Py_ssize_t n
    for bounce, buffer in zip(steady, buffers):
        n = min(nbytes, memoryview(buffer).nbytes)
        if bounce is not buffer:
            flat(buffer)[:n] = bounce[:n]
        nbytes -= n
