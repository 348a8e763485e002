# cython: language_level=3
"""How a native thread begins: detached, with a small stack, and with all signals blocked.

No code joins these threads. They never take the GIL, and the signals of the process are for the threads of
Python: a handler must not run here.
"""

from libc.stdint cimport intptr_t
from posix.unistd cimport close

cdef extern from *:
    """
    #include <pthread.h>
    #include <signal.h>

    /* In bytes. A system call needs little, and the C library wants some for itself. */
    #define THREAD_STACK (128 * 1024)

    static int start_thread(void *(*run)(void *), void *arg)
    {
        pthread_t thread;
        pthread_attr_t attributes;
        sigset_t all, before;
        int error;
        sigfillset(&all);
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        pthread_attr_setstacksize(&attributes, THREAD_STACK);
        /* A new thread inherits the mask of the thread that starts it, so the mask is set around the start. */
        pthread_sigmask(SIG_SETMASK, &all, &before);
        error = pthread_create(&thread, &attributes, run, arg);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&attributes);
        return error;
    }
    """
    int c_start_thread "start_thread"(void *(*run)(void *) noexcept nogil, void *arg)


cdef int start_thread(void *(*run)(void *) noexcept nogil, void *arg) noexcept:
    """Start a native thread that calls ``run(arg)``. Return 0 or an errno."""
    return c_start_thread(run, arg)


cdef void *_close(void *fd) noexcept nogil:
    close(<int><intptr_t>fd)
    return NULL


cdef void close_elsewhere(int fd) noexcept:
    """Close *fd* in a thread of its own, because the file may be on a server, and close(2) may wait until the
    server has been told."""
    # If no thread can be started, the call is made here, and the hub may wait. A number that stays open would
    # be worse.
    if start_thread(_close, <void *><intptr_t>fd):
        close(fd)
