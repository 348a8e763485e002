# cython: language_level=3
"""The word that tells a process of its fork, by Python or by C code.

The word lies on a page that the kernel wipes in each child (MADV_WIPEONFORK). So it also shows the forks by
C code, of which Python's hooks hear nothing. `greenaio._core.bell` reacts to it.
"""

from posix.mman cimport (
    MADV_WIPEONFORK, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, madvise, mmap,
)

cdef enum:
    PAGE = 4096

cdef unsigned int *_word = NULL


cdef bint forked() noexcept nogil:
    """Whether this process was forked since `acknowledge` was last called."""
    return _word != NULL and _word[0] == 0


def is_forked():
    """`forked`, for Python."""
    return forked()


def acknowledge(bint done=True):
    """Make `forked` say no again, because the inherited state is put right. Or yes, if it is not."""
    global _word
    cdef void *page
    if _word == NULL:
        page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if page == MAP_FAILED:
            raise MemoryError
        if madvise(page, PAGE, MADV_WIPEONFORK) < 0:
            return              # before Linux 4.14: Python's hooks must do
        _word = <unsigned int *>page
    _word[0] = done


acknowledge()
