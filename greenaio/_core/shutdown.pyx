# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A hub may end while the kernel and threads still write its memory: a native thread waits for them.

The hub itself must not wait: io_destroy lasts for ever on a frozen disk. Until the native thread has released
them, the lists of the engine keep the requests, and the requests keep their memory.
"""

import logging
import sys

from gevent.monkey import get_original

from libc.stdint cimport int64_t

from greenaio._core.engine cimport Engine
from greenaio._core.mailbox cimport Inbox
from greenaio._core.request cimport Request, RequestList
from greenaio._core.threads cimport withdraw

cdef extern from "<errno.h>":
    const int ECANCELED

# The seconds that the end of a hub waits for the thread that frees its context to begin.
BEGIN_MAX = 1

log = logging.getLogger('greenaio')
# gevent may have patched the module `_thread`. A real thread and a real lock are needed here.
_start_new_thread = get_original('_thread', 'start_new_thread')
_new_lock = get_original('_thread', 'allocate_lock')
# The engines whose memory the kernel may still write, and for
# which no thread waits. They stay until the process ends.
_leaked = []


cdef int give_up(Engine engine) except -1:
    """End the requests that have not begun, and leave the others to the thread of `leave`."""
    # After ECANCELED no request goes another way, so this leaves none declined.
    engine.refuse(ECANCELED)
    engine.cancel_declined(-<int64_t>ECANCELED)
    # The kernel may still write the buffers of these, and
    # a worker may be busy with a call of those below.
    _abandon_all(engine, engine.in_flight)
    _abandon_all(engine, engine.lent)
    for request in engine.ready:
        # A request with a waiter has a greenlet that never returns, so an fd that it opened is closed. A
        # greenlet that is not parked looks at its request by itself, and takes the fd.
        (<Request>request).abandoned = (<Request>request).waiter is not None
    _let_go(engine.ready)
    return 0


cdef int _abandon_all(Engine engine, RequestList requests) except -1:
    """Abandon all of *requests*. A call that no thread has begun with ends with ECANCELED."""
    cdef Request request, following = requests.first()
    # Go from link to link, because there may be no memory for a list of them. Take the next one first:
    # the loop may move the request to another list, and then its link is another.
    while following is not None:
        request = following
        following = <Request>request.following if request.following != NULL else None
        # No greenlet ends here, because a parked greenlet has itself on its stack.
        request.waiter = None
        request.abandoned = True
        # A request of native AIO has no job, and `withdraw` says no. An open of a FIFO may wait for ever,
        # so it is made to return.
        if not request.must_run and withdraw(request):
            engine.finish(request, -<int64_t>ECANCELED)
        else:
            request.meet()
    return 0


#     ==========================  =================================  =========================================
#     the hub, at its end         a native thread                    the kernel, the workers
#     ==========================  =================================  =========================================
#     `give_up`: requests that                                       go on with the requests that they have
#     have not begun are done
#     `leave`: closes the                                            signal no eventfd any more
#     eventfd, starts the thread
#     may be freed                io_destroy waits                   the last event
#                                 releases the requests in flight
#                                 waits for the mailbox              the last job
#                                 releases the lent requests
#     ==========================  =================================  =========================================
def leave(Engine engine, Inbox inbox):
    """Free the context, or have a native thread wait for the disk and free it then.

    io_destroy waits for all requests in flight. In the hub it would hold up the end of the thread, for
    ever on a frozen disk."""
    # Workers must not signal an eventfd whose number may
    # mean another file in a moment. So tell them first.
    inbox.stop_signalling()
    engine.context.close_eventfd()
    # Without a context the kernel has no memory of ours, and
    # no thread has any either. So do not start a thread.
    if not engine.context.is_open and engine.lent.count == 0:
        return
    # A real lock, which the new thread releases as its first step.
    begun = _new_lock()
    begun.acquire()
    try:
        _start_new_thread(_end_context, (engine, inbox, begun))
    except (RuntimeError, MemoryError):
        # There is no thread, or the interpreter ends. The end of the
        # process frees the context. Until then the memory is kept, and code
        # that waits for the last write of a file must not wait for these.
        log.warning('no thread to free a native AIO context; it stays until the process ends')
        _leaked.append(engine)
        _forget_writes(engine)
        return
    # An interpreter that ends frees the state of each thread, also of one that is being started, which
    # then crashes (python/cpython#110052). So wait until the thread has begun: then it finds out by
    # itself and ends. While the interpreter ends, no thread begins, and there is nothing to wait for.
    if not sys.is_finalizing():
        begun.acquire(True, BEGIN_MAX)


def _end_context(Engine engine, Inbox inbox, begun):
    """Wait for the disk in a native thread. Then release the memory that it was writing."""
    begun.release()
    # io_destroy returns when the kernel has finished all requests. From here on it writes no memory of ours,
    # so the requests may go, although their events were never read.
    engine.context.destroy()
    _let_go(engine.in_flight)
    # Then the same for the native threads: wait until all jobs are back.
    inbox.wait()
    inbox.reap(engine)
    _let_go(engine.ready)


cdef _forget_writes(Engine engine):
    """Stop counting the writes in flight, because no code learns when the kernel is done with them.

    Other code that waits until a file has no writes would wait for ever otherwise."""
    cdef Request request
    for requests in engine.in_flight, engine.lent:
        for request in requests:
            if request.writes is not None:
                request.end_write()


cdef int _let_go(RequestList requests) except -1:
    """Release all of *requests*."""
    cdef Request request
    # A release may run any code and change the list, so take
    # each request out first and look at the list again.
    while requests.count:
        request = requests.popleft()
        request.release()
    return 0
