"""The fork bell: each forked child hears of its fork once, by Python or by C code.

A child has one thread, copies of its greenlets, and all numbers of its parent. The context of the kernel,
the native threads and the locks that another thread held stayed with the parent. A module that keeps any of
these registers a handler by `listen`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

try:
    from greenaio._core.fork import acknowledge
    from greenaio._core.fork import is_forked as is_forked
except ImportError:
    # The extension was not built. The number of the process tells of a fork as well, at the cost of a call.
    _acknowledged = os.getpid()

    def is_forked() -> bool:
        """Return whether this process was forked since the last `acknowledge`."""
        return os.getpid() != _acknowledged

    def acknowledge(done: bool = True) -> None:
        """Make `is_forked` say no again. Or yes, if not *done*."""
        global _acknowledged
        _acknowledged = os.getpid() if done else 0


# The process in which the handlers were last asked to run, and the number of forks before it.
_process = os.getpid()
_generation = 0
_handlers: list[Callable[[], object]] = []
# Handlers that have not run in this child.
_due: list[Callable[[], object]] = []


def listen(handler: Callable[[], object]) -> None:
    """Call *handler* once in each forked child, after the handlers that are registered already. A handler
    that raises MemoryError is called again at the next use of greenaio."""
    _handlers.append(handler)


def generation() -> int:
    """Return a number that changes once in each forked child. Ring the bell, if nothing has yet."""
    if is_forked():
        ring()
    return _generation


# Both kinds of forks ring the bell:
#
#     ==================  ================================  ===================================
#     fork by             Python (os.fork, subprocess)      C
#     ==================  ================================  ===================================
#     rings the bell      Python's hook, before os.fork     the next use of greenaio, which asks
#                         returns                           for the `generation`
#     ==================  ================================  ===================================
#
# The handlers run in the order of the layers: a module is imported, and listens, after those below it.
def ring() -> None:
    """Run the handlers that have not run in this child. Raise MemoryError at once, and the last other error
    of a handler after all have run."""
    global _generation, _process
    process = os.getpid()
    if process == _process and not is_forked():
        # Another hook of Python came before ours, and used greenaio. That use has rung the bell.
        return
    # A new fork has another process number, except for one into a PID namespace. There nothing is due and the
    # word was wiped. Otherwise a handler had no memory, and the rest of the handlers is still due.
    if process != _process or not _due:
        _due[:] = _handlers
        _generation += 1
        _process = process
    # Before the handlers, because each uses the layers below it, which are right by now and must not ring
    # again.
    acknowledge()
    failure = None
    while _due:
        handler = _due[0]
        try:
            handler()
        except MemoryError:
            # The next use of greenaio rings again. Without this it would work with the parent's state.
            acknowledge(False)
            raise
        # The other handlers must run even so: each of them makes another part safe.
        except BaseException as error:
            failure = error
        # Another thread may have come here during the handler, and have finished the list.
        if _due and _due[0] is handler:
            del _due[0]
    if failure is not None:
        raise failure


# Python calls this in the child before `os.fork` returns. Forks by C code are found by `is_forked`.
os.register_at_fork(after_in_child=ring)
