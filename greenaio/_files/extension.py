"""The extension, or its replacement by Python threads: this module alone chooses.

The modules of the extension use the structures and C functions of each other, so they work all together or
not at all. A compiler may refuse one of them, and a clone may have one of an earlier build. Then all modules
of greenaio use `portable`.
"""

from __future__ import annotations

try:
    from greenaio._core.memory import Filling, aligned_buffer
    from greenaio._core.pools import renew_threads
    from greenaio._files import calls as _calls
    from greenaio._files import operation as _file
    from greenaio._files.file import File
except Exception as error:
    # ImportError: there is no such module. The checks of Cython raise ValueError for a structure of another
    # size, TypeError for another signature of a function, KeyError for a class without C methods.
    from greenaio._files import portable as _calls  # type: ignore[no-redef]
    from greenaio._files import portable_file as _file  # type: ignore[no-redef]
    from greenaio._files.pool import renew_threads
    from greenaio._files.portable_file import File, Filling, aligned_buffer  # type: ignore[assignment]

    native, why_not = False, str(error)
else:
    native, why_not = True, ''

__all__ = ['File', 'Filling', '_calls', '_file', 'aligned_buffer', 'native', 'renew_threads', 'why_not']
