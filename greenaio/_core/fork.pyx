# cython: language_level=3
"""The word that tells a process of its fork, by Python or by C code.

The word lies on a page that the kernel wipes in each child (MADV_WIPEONFORK). So it also shows the forks by
C code, of which Python's hooks hear nothing. `greenaio._core.bell` reacts to it.
"""

from posix.mman cimport (
    MADV_WIPEONFORK, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, madvise, mmap,
)

cdef enum:
    PAGE = 4096                 # bytes

# NULL until `acknowledge` was called, or where the kernel can't wipe a page. Then `forked` always says no.
cdef unsigned int *_word = NULL


#     the parent                          the child
#     word is 1: `forked` says no
#     forks                               word is 0: `forked` says yes
#                                         rings the bell, which writes 1: `forked` says no
#
# To look at the word costs one load. To ask for the number of the process would be a system call in each
# operation.
cdef bint forked() noexcept nogil:
    """Return whether this process was forked since `acknowledge` was last called."""
    # No atomic operation is needed. The kernel wipes the page before the child runs, and a child begins with
    # one thread.
    return _word != NULL and _word[0] == 0


def is_forked():
    """Return `forked`, for Python."""
    return forked()


def acknowledge(bint done=True):
    """Make `forked` say no again, because the inherited state was put right. Or yes, if it was not (*done* is
    False). Raise MemoryError."""
    global _word
    cdef void *page
    if _word == NULL:
        page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if page == MAP_FAILED:
            raise MemoryError
        if madvise(page, PAGE, MADV_WIPEONFORK) < 0:
            # The kernel is older than Linux 4.14. Python's hooks must do, so forks by C code stay unseen.
            return
        # Only a page that is wiped may become the word. Another would say in a child that there was no fork.
        _word = <unsigned int *>page
    _word[0] = done


acknowledge()
