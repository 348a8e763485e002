from libc.stdint cimport int64_t, uint64_t

from greenaio._core.driver cimport Driver
from greenaio._core.request cimport Request, iovec
from greenaio._core.threads cimport any_busy
from greenaio._files.route cimport Known

cdef extern from *:
    """
    #include <errno.h>
    #include <unistd.h>

    /* Read by a plain call. Return bytes read, or minus the errno. */
    static inline int64_t plain_pread(int fd, void *memory, size_t n, int64_t offset)
    {
        ssize_t result = pread(fd, memory, n, offset);
        return result < 0 ? -errno : result;
    }
    """
    int64_t plain_pread(int fd, void *memory, size_t n, int64_t offset)

cdef int64_t read_in_line(int fd, iovec *buffers, int count, uint64_t wanted, int64_t offset, unsigned int flags,
                          bint once, int64_t *last) except -1
cdef int64_t now(Request request, unsigned int flags) noexcept
cdef bint has_place(Request request, Known known) noexcept
cdef bint means_its_writer(Request request, Known known) noexcept

cdef inline bint lacks_threads(Known known) except -1:
    """Return whether a read that misses the page cache would wait for a thread. Then the read may not run
    inline: a miss starts read-ahead, which waits if the queue of the device is full."""
    return any_busy() and known.device.pool().all_busy()

cdef inline int64_t end_in_line(Driver driver, int64_t result) except? -4096:
    """Tell the driver that a call ran inline, which may let other greenlets run. Return *result*."""
    driver.end_in_line()
    return result

cdef inline int64_t pread_now(Driver driver, int fd, char *memory, Py_ssize_t n, int64_t offset) except? -4096:
    """Read inline by a plain call. Return bytes read, or minus the errno."""
    return end_in_line(driver, plain_pread(fd, memory, n, offset))
