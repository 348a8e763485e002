"""Copy whole files, by copy_file_range(2) in threads."""

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

# In bytes: one thread copies so many before `progress` is called, and so many are read ahead.
COPY_BLOCK = 4 << 20
COPY_AHEAD = 8 << 20

NEW = os.O_WRONLY | os.O_CREAT
# Sandboxes, security modules and file systems refuse copy_file_range with these errors. Then reads and writes
# may still copy the file, or raise the true error.
CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES,
               errno.EBADF, errno.EIO, errno.ENOENT, errno.ENOTTY, errno.EOVERFLOW, errno.ETXTBSY)


def copyfile(src: StrPath, dst: StrPath, *, follow_symlinks: bool = True,
             progress: Callable[[int, int], object] | None = None) -> StrPath:
    """Copy the contents of the file *src* to *dst*, and return that, as ``shutil.copyfile`` does.

    The kernel copies, in threads, while it reads ahead and begins to write back. *progress* is called with
    the bytes copied and the bytes in all. Raise OSError, and SameFileError and SpecialFileError of shutil.
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
            # Raise this before the target is emptied.
            if source.kind == stat.S_IFDIR:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), src)
            with _open_target(dst, one, src, here) as target:
                _copy(source, target, one.st_size if one else 0, progress or (lambda done, size: None))
    return dst


@contextlib.contextmanager
def _directory_of_the_call(*paths: str | bytes) -> Iterator[int | None]:
    """Yield an fd of the working directory, in which relative *paths* begin, because the program may change
    it during the copy. Yield None if no path is relative, if no fd is free, or if a server has to be asked
    for the directory; then a thread asks it at each look-up."""
    here = None
    with contextlib.suppress(OSError):
        if not all(map(os.path.isabs, paths)):
            here = _calls.working_directory()
    try:
        yield here
    finally:
        if here is not None:
            # The number stays open until an open that runs in a thread is over.
            _calls.close(here, may_wait=False)


def _open_target(dst: StrPath, one: os.stat_result | None, src: StrPath, here: int | None) -> File:
    """Open the file *dst* and empty it. *one* is the stat of *src*. Raise SameFileError if that is the same
    file."""
    try:
        # A new file can't be the source, so this open saves a stat.
        return File(dst, NEW | os.O_EXCL, dir_fd=here)
    except FileExistsError as error:
        if was_thrown(error):
            raise
        _refuse_same(one, src, dst, here)
        return File(dst, NEW | os.O_TRUNC, dir_fd=here)
    except IsADirectoryError as error:
        if was_thrown(error) or _checked(dst, here):
            raise
        # The kernel takes a name that ends in a slash for a directory. That directory does not exist, so say
        # that.
        raise FileNotFoundError(f'Directory does not exist: {os.fsdecode(dst)}') from error


def _is_link(name: StrPath, here: int | None) -> bool:
    """Return whether *name* is a symbolic link; no if that can't be found out."""
    try:
        return stat.S_ISLNK(_calls.stat(name, dir_fd=here, follow_symlinks=False).st_mode)
    except OSError as error:
        if was_thrown(error):
            raise
        return False


def _refuse_same(one: os.stat_result | None, src: StrPath, dst: StrPath, here: int | None) -> None:
    """Raise SameFileError if *dst* is the file of the stat *one*."""
    # Import it late, because it imports archives and compression.
    import shutil

    other = _checked(dst, here)
    if one and other and os.path.samestat(one, other):
        raise shutil.SameFileError(f'{src!r} and {dst!r} are the same file') from None


def _checked(name: StrPath, here: int | None) -> os.stat_result | None:
    """Return the stat of *name*, or None if it has none. Raise SpecialFileError for a FIFO."""
    import shutil

    try:
        found = _calls.stat(name, dir_fd=here)
    except OSError as error:
        if was_thrown(error):
            raise
        # The open will raise the true error.
        return None
    # An open of a FIFO would wait for the other end.
    if stat.S_ISFIFO(found.st_mode):
        raise shutil.SpecialFileError(f'`{os.fsdecode(name)}` is a named pipe')
    return found


def _copy(source: File, target: File, size: int, progress: Callable[[int, int], object]) -> None:
    """Copy all bytes block by block. *size* is the number of bytes to expect, 0 if it is not known."""
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
                # For a small file this costs more than it brings.
                if size > COPY_BLOCK:
                    _calls.start_writing(target.fileno(), done, n)
                done += n
                progress(done, max(size, done))
                if source.is_local and 0 < source._size() <= done:
                    # Only the length of a local file is reliable. Any other file is read until it gives no
                    # byte.
                    return
        finally:
            if ahead is not None:
                ahead.kill(block=False)


def _copy_block(source: File, target: File, offset: int) -> int:
    """Copy up to `COPY_BLOCK` bytes at *offset*. Return the number of bytes, 0 at the end. Raise OSError."""
    try:
        n = _calls.copy_file_range(source.fileno(), target.fileno(), COPY_BLOCK, offset, offset)
    except OSError as error:
        if was_thrown(error):
            raise
        if error.errno not in CANNOT_COPY:
            # The error may be about either file.
            error.filename, error.filename2 = source.name, target.name
            raise
        n = 0
    if n:
        return n
    # The copy is at its end, or these file systems can't make the call, or they return 0 because they don't
    # know the length of the file, as /proc does.
    data = source.pread(COPY_BLOCK, offset)
    done = 0
    while done < len(data):
        done += target.pwrite(data[done:], offset + done)
    return done
