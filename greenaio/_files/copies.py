"""Copies of whole files."""

from __future__ import annotations

import contextlib
import errno
import os
import posix
import stat
import sys
from collections.abc import Callable, Iterator
from typing import Any

import gevent

from greenaio._core.ends import was_thrown
from greenaio._core.handle import using
from greenaio._files.arguments import StrPath
from greenaio._files.extension import File, _calls

# Bytes that one thread copies before it tells how far it is, and bytes that are read ahead.
COPY_BLOCK = 4 << 20
COPY_AHEAD = 8 << 20

NEW = os.O_WRONLY | os.O_CREAT
# Sandboxes, security modules and file systems refuse copy_file_range with these errors. Then reads and writes
# may copy the file, or tell the error.
CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES,
               errno.EBADF, errno.EIO, errno.ENOENT, errno.ENOTTY, errno.EOVERFLOW, errno.ETXTBSY)


def copyfile(src: StrPath, dst: StrPath, *, follow_symlinks: bool = True,
             progress: Callable[[int, int], object] | None = None) -> StrPath:
    """Copy the contents of the file *src* to *dst*, and return that, as ``shutil.copyfile`` does.

    The kernel copies, in threads, while it reads ahead and begins to write back. *progress* is called with
    the bytes copied and the bytes in all. Raises OSError, and shutil's SameFileError and SpecialFileError.
    """
    sys.audit('shutil.copyfile', src, dst)
    src = os.fspath(src)
    with _directory_of_the_call(src, os.fspath(dst)) as here:
        one = _checked(src, here)
        if not follow_symlinks and _is_link(src, here):
            _refuse_same(one, src, dst, here)
            os.symlink(posix.readlink(src, dir_fd=here), os.fspath(dst),    # type: ignore[type-var, arg-type]
                       dir_fd=here)
            return dst
        with File(src, dir_fd=here) as source:
            if source.kind == stat.S_IFDIR:     # before the target is emptied
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), src)
            with _open_target(dst, one, src, here) as target:
                _copy(source, target, one.st_size if one else 0, progress or (lambda done, size: None))
    return dst


@contextlib.contextmanager
def _directory_of_the_call(*paths: str | bytes) -> Iterator[int | None]:
    """An fd of the directory in which relative *paths* begin: later it may be another. None where that makes
    no difference, without a free fd, or where a server has to be asked: then each look-up asks it in a
    thread."""
    here = None
    with contextlib.suppress(OSError):
        if not all(map(os.path.isabs, paths)):
            here = _calls.working_directory()
    try:
        yield here
    finally:
        if here is not None:
            _calls.close(here, may_wait=False)  # not before an open that is with a thread


def _open_target(dst: StrPath, one: os.stat_result | None, src: StrPath, here: int | None) -> File:
    """The file *dst*, emptied. *one* is the stat of *src*, which must be another file."""
    try:
        # There is nothing to look at first, and that costs nothing.
        return File(dst, NEW | os.O_EXCL, dir_fd=here)
    except FileExistsError as error:
        if was_thrown(error):
            raise
        _refuse_same(one, src, dst, here)
        return File(dst, NEW | os.O_TRUNC, dir_fd=here)
    except IsADirectoryError as error:
        if was_thrown(error) or _checked(dst, here):
            raise
        # The kernel takes a name that ends in a slash for a directory, which is not there: say that.
        raise FileNotFoundError(f'Directory does not exist: {os.fsdecode(dst)}') from error


def _is_link(name: StrPath, here: int | None) -> bool:
    try:
        return stat.S_ISLNK(_calls.stat(name, dir_fd=here, follow_symlinks=False).st_mode)
    except OSError as error:
        if was_thrown(error):
            raise
        return False


def _refuse_same(one: os.stat_result | None, src: StrPath, dst: StrPath, here: int | None) -> None:
    import shutil  # it imports archives and compression

    other = _checked(dst, here)
    if one and other and os.path.samestat(one, other):
        raise shutil.SameFileError(f'{src!r} and {dst!r} are the same file') from None


def _checked(name: StrPath, here: int | None) -> os.stat_result | None:
    import shutil

    try:
        found = _calls.stat(name, dir_fd=here)
    except OSError as error:
        if was_thrown(error):
            raise
        return None                     # opening it will say why
    if stat.S_ISFIFO(found.st_mode):    # an open would wait for the other end
        raise shutil.SpecialFileError(f'`{os.fsdecode(name)}` is a named pipe')
    return found


def _copy(source: File, target: File, size: int, progress: Callable[[int, int], object]) -> None:
    done = 0
    ahead: Any = None
    with using(source.fileno()), using(target.fileno()):
        try:
            while True:
                if size > COPY_BLOCK and (ahead is None or ahead.ready()):
                    ahead = gevent.spawn(_calls.readahead, source.fileno(), done + COPY_BLOCK, COPY_AHEAD)
                n = _copy_block(source, target, done)
                if n == 0:
                    return
                if size > COPY_BLOCK:   # else it costs more than it brings
                    _calls.start_writing(target.fileno(), done, n)
                done += n
                progress(done, max(size, done))
                if source.is_local and 0 < source._size() <= done:
                    return              # of others, and in /proc, the length says little
        finally:
            if ahead is not None:
                ahead.kill(block=False)


def _copy_block(source: File, target: File, offset: int) -> int:
    try:
        n = _calls.copy_file_range(source.fileno(), target.fileno(), COPY_BLOCK, offset, offset)
    except OSError as error:
        if was_thrown(error):
            raise
        if error.errno not in CANNOT_COPY:
            error.filename, error.filename2 = source.name, target.name  # either may be meant
            raise
        n = 0
    if n:
        return n
    # At the end; or these file systems can't, or say 0 of files whose length they don't know, as /proc does.
    data = source.pread(COPY_BLOCK, offset)
    done = 0
    while done < len(data):
        done += target.pwrite(data[done:], offset + done)
    return done
