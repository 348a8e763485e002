"""Files for WSGI clients, read ahead of what the client takes, without stopping the server.

`send_file` answers a request for a path: ranges, ETag, conditional requests, by werkzeug (``pip install
'greenaio[wsgi]'``). `FileWrapper` is a ``wsgi.file_wrapper`` (PEP 3333), which gevent's pywsgi has none of:
`WSGIHandler` puts it there, and `with_file_wrapper` does for any server, gunicorn's gevent worker among them.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterable
from typing import Any

from gevent import pywsgi

from greenaio._position import can_wait
from greenaio.fileobject import FileIO
from greenaio.os import fstat
from greenaio.streams import ReadAhead

try:
    from greenaio._file import File
except ImportError:
    from greenaio._fallback import File  # type: ignore[assignment]

__all__ = ['FileWrapper', 'WSGIHandler', 'send_file', 'with_file_wrapper']

BLOCK = 128 << 10               # bytes: handed to the server at a time, if it does not want more

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


class FileWrapper:
    """The rest of *filelike*, in blocks: an iterable for a WSGI server, which calls `close`.

    A file on a disk is read from its present position on, with the kernel's own reading ahead or, for
    O_DIRECT, that of `streams`; anything else is read as it can be.
    """

    def __init__(self, filelike: Any, block_size: int = 8192) -> None:
        self.filelike = filelike
        self._nbytes = max(block_size, BLOCK)
        self._position = 0
        self._file = self._stored(filelike)
        self._ahead: ReadAhead | None = None
        if self._file is not None and self._file.direct:
            self._ahead = ReadAhead(self._file, eager=True)

    def _stored(self, filelike: Any) -> File | None:
        below = getattr(filelike, 'raw', filelike) if isinstance(filelike, io.BufferedIOBase) else filelike
        if not can_wait() or not isinstance(below, io.FileIO):      # gzip's fileno is of what is compressed
            return None
        try:
            file = filelike.file if isinstance(filelike, FileIO) else File.from_fd(filelike.fileno())
            if file.kind != stat.S_IFREG:
                return None
            self._position = filelike.tell()
        except (OSError, ValueError):   # closed, or without a position
            return None
        return file

    def __iter__(self) -> FileWrapper:
        return self

    def __next__(self) -> bytes:
        data: bytes
        if self._file is None:
            data = self.filelike.read(self._nbytes)
        elif self._ahead is None:
            # Blocks asked for ahead cost more than they bring: the page cache does that by itself.
            data = self._file.pread(self._nbytes, self._position)
        else:
            buffer = bytearray(self._nbytes)
            data = bytes(memoryview(buffer)[:self._ahead.readinto(buffer, self._position)])
        if not data:
            raise StopIteration
        self._position += len(data)
        return data

    def seekable(self) -> bool:
        """Whether `seek` works, as ranges want it."""
        return self._file is not None or bool(getattr(self.filelike, 'seekable', bool)())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> None:
        """Go on from elsewhere."""
        if self._file is None:
            self.filelike.seek(offset, whence)
        else:
            self._position = offset + (self._position if whence == os.SEEK_CUR else 0)

    def tell(self) -> int:
        """The offset, in bytes, of what comes next."""
        return self._position if self._file is not None else int(self.filelike.tell())

    def close(self) -> None:
        """Close the file, if it can be closed. What is read ahead is forgotten."""
        if self._ahead is not None:
            self._ahead.stop()
        if hasattr(self.filelike, 'close'):
            self.filelike.close()


def with_file_wrapper(app: Application) -> Application:
    """Return *app* with `FileWrapper` as its ``wsgi.file_wrapper``, whatever the server has."""
    def wrapped(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        environ['wsgi.file_wrapper'] = FileWrapper
        return app(environ, start_response)

    return wrapped


class WSGIHandler(pywsgi.WSGIHandler):
    """For ``pywsgi.WSGIServer(..., handler_class=WSGIHandler)``."""

    def get_environ(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environ()
        environ['wsgi.file_wrapper'] = FileWrapper
        return environ


def send_file(environ: dict[str, Any], path_or_file: str | os.PathLike[str] | FileIO, **options: Any) -> Any:
    """Return a werkzeug ``Response``, a WSGI application, that sends a file.

    It honours ranges, If-Range, If-None-Match and If-Modified-Since. *path_or_file* is a path, or what
    ``greenaio.open(path, 'rb', 0)`` returned, which is closed with the response. *options* are those of
    ``werkzeug.utils.send_file``: mimetype, as_attachment, download_name, conditional, etag, last_modified,
    max_age. Raises OSError if the file can't be opened. A path that a client named has to be checked before.
    """
    if isinstance(path_or_file, FileIO):
        return _response(environ, path_or_file, **options)
    name = os.fspath(path_or_file)
    file = FileIO(name)
    try:
        return _response(environ, file, **{'download_name': os.path.basename(name), **options})
    except BaseException:
        file.close()
        raise


def _response(environ: dict[str, Any], file: FileIO, *, conditional: bool = True,
              etag: bool | str = True, last_modified: Any = None, **options: Any) -> Any:
    from werkzeug.exceptions import RequestedRangeNotSatisfiable
    from werkzeug.utils import send_file as werkzeug_send_file

    st = fstat(file.fileno())
    if etag is True:
        etag = f'{st.st_mtime_ns:x}-{st.st_size:x}-{st.st_ino:x}'
    response = werkzeug_send_file(
        file, {**environ, 'wsgi.file_wrapper': FileWrapper}, conditional=False, etag=etag,
        last_modified=st.st_mtime if last_modified is None else last_modified, **options)
    response.content_length = st.st_size
    if conditional:
        try:
            response = response.make_conditional(environ, accept_ranges=True, complete_length=st.st_size)
        except RequestedRangeNotSatisfiable as error:
            response.close()
            return error.get_response(environ)
    return response
