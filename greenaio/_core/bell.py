"""The fork bell: each forked child hears of its fork once, by Python or by C code.

A child has one thread, copies of its greenlets, and all numbers of its parent. The context of the kernel,
the native threads and the locks that another thread held stayed with the parent. A module that keeps any of
these registers a handler by `listen`.

    ==================  ================================  ===================================
    fork by             Python (os.fork, subprocess)      C
    ==================  ================================  ===================================
    rings the bell      Python's hook, before os.fork     the next use of greenaio, which asks
                        returns                           for the `generation`
    ==================  ================================  ===================================

The handlers run in the order of the layers: a module is imported, and listens, after those below it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

try:
    from greenaio._core.fork import acknowledge
    from greenaio._core.fork import is_forked as is_forked
except ImportError:             # the extension was not built
    _acknowledged = os.getpid()

    def is_forked() -> bool:
        return os.getpid() != _acknowledged

    def acknowledge(done: bool = True) -> None:
        global _acknowledged
        _acknowledged = os.getpid() if done else 0


_process = os.getpid()
_generation = 0
_handlers: list[Callable[[], object]] = []
_due: list[Callable[[], object]] = []       # handlers that have not run in this child


def listen(handler: Callable[[], object]) -> None:
    """Call *handler* once in each forked child, after the handlers that are registered already. One that
    raises MemoryError is called again at the next use of greenaio."""
    _handlers.append(handler)


def generation() -> int:
    """Return a number that changes once in each forked child. Rings the bell, if nothing has yet."""
    if is_forked():
        ring()
    return _generation


def ring() -> None:
    """Run the handlers that have not run in this child. Raises MemoryError, and the last other error of a
    handler after all have run."""
    global _generation, _process
    process = os.getpid()
    if process == _process and not is_forked():
        return                          # a use in another hook came before ours
    if process != _process or not _due:     # else there was no memory for the rest of them
        _due[:] = _handlers
        _generation += 1
        _process = process
    acknowledge()                       # a handler uses what those below it have put right
    failure = None
    while _due:
        handler = _due[0]
        try:
            handler()
        except MemoryError:
            acknowledge(False)
            raise
        except BaseException as error:
            failure = error
        if _due and _due[0] is handler:     # another thread may have come here
            del _due[0]
    if failure is not None:
        raise failure


os.register_at_fork(after_in_child=ring)
