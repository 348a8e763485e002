"""Files for WSGI clients, read ahead of the client, without stopping the server.

`send_file` answers a request for a path: ranges, ETag, conditional requests, by werkzeug (``pip install
'greenaio[wsgi]'``). `FileWrapper` is a ``wsgi.file_wrapper`` (PEP 3333), which gevent's pywsgi has none of:
`WSGIHandler` puts it there, and `with_file_wrapper` does for any server, gunicorn's gevent worker among them.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import time
from collections.abc import Callable, Iterable
from typing import Any

from gevent import pywsgi

from greenaio._core.ends import was_thrown
from greenaio._files.arguments import StrPath
from greenaio._files.extension import File
from greenaio._files.streams import ReadAhead
from greenaio._files.waiter import can_wait
from greenaio.fileobject import FileIO
from greenaio.os import fstat

__all__ = ['FileWrapper', 'WSGIHandler', 'send_file', 'with_file_wrapper']

BLOCK = 128 << 10               # bytes: handed to the server at a time, if it does not want more
NOT_IN_A_HEADER = re.compile(r'[\0-\x1f\x7f-\x9f\ud800-\udfff]')      # the name of a file may have them

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


class FileWrapper:
    """The rest of *filelike*, in blocks: an iterable for a WSGI server, which calls `close`.

    A file on a disk is read from its present position on, with the kernel's own reading ahead or, for
    O_DIRECT, with ours; anything else is read as it can be.
    """

    def __init__(self, filelike: Any, block_size: int = 8192) -> None:
        self._filelike = filelike
        self._nbytes = max(block_size, BLOCK)
        self._left: int | None = None   # bytes, if so many were promised
        self._position = 0
        self._file = self._stored(filelike)
        self._ahead: ReadAhead | None = None
        if self._file is not None and self._file.direct:
            self._ahead = ReadAhead(self._file, eager=True)

    @property
    def filelike(self) -> FileWrapper:
        """Itself: of a file gunicorn would send what follows the fd's position, without what is buffered."""
        return self

    def _stored(self, filelike: Any) -> File | None:
        below = getattr(filelike, 'raw', filelike) if isinstance(filelike, io.BufferedIOBase) else filelike
        if not can_wait() or not isinstance(below, io.FileIO):      # gzip's fileno is of the compressed file
            return None
        if not filelike.closed and filelike.writable():
            filelike.flush()
        try:
            file = filelike.file if isinstance(filelike, FileIO) else File.from_fd(filelike.fileno())
            if file.kind != stat.S_IFREG:
                return None
            self._position = filelike.tell()
        except (OSError, ValueError) as error:  # closed, or without a position
            if was_thrown(error):
                raise
            return None
        return file

    def __iter__(self) -> FileWrapper:
        return self

    def __next__(self) -> bytes:
        if self._left == 0:
            raise StopIteration
        data = self._read(self._nbytes if self._left is None else min(self._nbytes, self._left))
        if not data:
            if self._left:              # else the client would take the next answer for the rest
                raise OSError(errno.EIO, 'the file has become shorter while it was sent')
            raise StopIteration
        self._position += len(data)
        if self._left is not None:
            self._left -= len(data)
        return data

    def _read(self, nbytes: int) -> bytes:
        if self._file is None:
            return self._filelike.read(nbytes)  # type: ignore[no-any-return]
        if self._filelike.closed:       # its number may be another file's by now
            raise ValueError('I/O operation on closed file')
        if self._ahead is None:
            # Blocks asked for ahead cost more than they bring: the page cache does that by itself.
            return self._file.pread(nbytes, self._position)
        buffer = bytearray(nbytes)
        return bytes(memoryview(buffer)[:self._ahead.readinto(buffer, self._position)])

    def seekable(self) -> bool:
        """Whether `seek` works, as ranges want it."""
        return self._file is not None or bool(getattr(self._filelike, 'seekable', bool)())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> None:
        """Go on from elsewhere."""
        if self._file is not None and whence == os.SEEK_CUR:
            offset, whence = self._position + offset, os.SEEK_SET
        position = self._filelike.seek(offset, whence)
        if self._file is not None:
            self._position = position

    def tell(self) -> int:
        """The offset, in bytes, of the next block."""
        return self._position if self._file is not None else int(self._filelike.tell())

    def close(self) -> None:
        """Close the file, if it can be closed. Blocks read ahead are forgotten."""
        if self._ahead is not None:
            self._ahead.stop()
        if hasattr(self._filelike, 'close'):
            self._filelike.close()


def with_file_wrapper(app: Application) -> Application:
    """Return *app* with `FileWrapper` as its ``wsgi.file_wrapper``, instead of the server's."""
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


def send_file(environ: dict[str, Any], path_or_file: StrPath | FileIO, **options: Any) -> Any:
    """Return a werkzeug ``Response``, a WSGI application, that sends a file.

    It honours a range, If-Range, If-Match, If-None-Match and If-Modified-Since. *path_or_file* is a path, or
    what ``greenaio.open(path, 'rb', 0)`` returned, which is sent from its position on and closed with the
    response. *options* are as for ``werkzeug.utils.send_file``: mimetype, as_attachment, download_name,
    conditional, etag, last_modified, max_age. Raises OSError if the file can't be opened; while it is sent
    (EIO) if it became shorter. A path that a client named has to be checked before.
    """
    if isinstance(path_or_file, FileIO):
        return _response(environ, path_or_file, **options)
    file = FileIO(os.fspath(path_or_file))
    try:
        return _response(environ, file, **options)
    except BaseException:
        file.close()
        raise


def _response(environ: dict[str, Any], file: FileIO, *, conditional: bool = True,
              etag: bool | str = True, last_modified: Any = None, **options: Any) -> Any:
    from werkzeug.utils import send_file as werkzeug_send_file

    wrapper = FileWrapper(file)
    st = fstat(file.fileno())
    length = wrapper._left = _length(file, st, wrapper)
    if etag is True:
        etag = length is not None and f'{st.st_mtime_ns:x}-{length:x}-{st.st_ino:x}'
    if last_modified is None:           # one in the future must not be told, and none beyond year 9999 can be
        last_modified = min(max(st.st_mtime, 0), time.time())
    if isinstance(name := getattr(file, 'name', None), (str, bytes, os.PathLike)):
        options.setdefault('download_name', NOT_IN_A_HEADER.sub('_', os.path.basename(os.fsdecode(name))))
    response = werkzeug_send_file(
        file, {**environ, 'wsgi.file_wrapper': lambda *_: wrapper}, conditional=False, etag=etag,
        last_modified=last_modified, **options)
    if length is None:
        return response
    response.content_length = length
    return _as_asked(environ, response, wrapper, length) if conditional else response


def _as_asked(environ: dict[str, Any], response: Any, wrapper: FileWrapper, length: int) -> Any:
    from werkzeug.exceptions import PreconditionFailed, RequestedRangeNotSatisfiable

    try:
        response.make_conditional(environ)      # conditions come before ranges
        if response.status_code == 412:
            raise PreconditionFailed
        if response.status_code == 200:
            response.make_conditional(_with_one_range(environ, length), accept_ranges=True,
                                      complete_length=length)
    except (PreconditionFailed, RequestedRangeNotSatisfiable) as error:
        response.close()
        return error.get_response(environ)
    if response.status_code == 206:
        wrapper.seek(response.content_range.start, os.SEEK_CUR)
        wrapper._left = response.content_length
        response.response = wrapper     # werkzeug's would count from the file's beginning
    return response


def _length(file: FileIO, st: os.stat_result, wrapper: FileWrapper) -> int | None:
    """Bytes from its position on; None if it is unknown: in a pipe, and in /proc, where all sizes are 0."""
    if not stat.S_ISREG(st.st_mode) or st.st_size == 0 and file.file.pread(1, 0):
        return None
    return max(st.st_size - wrapper.tell(), 0)


def _with_one_range(environ: dict[str, Any], length: int) -> dict[str, Any]:
    """*environ* as RFC 9110 has it and werkzeug has not: a range is for GET and in bytes, else it is
    ignored, and so may several be; and the last 9 of 5 bytes are all."""
    from werkzeug.http import parse_range_header

    asked = environ.get('HTTP_RANGE', '')
    if environ['REQUEST_METHOD'] != 'GET' or ',' in asked or not asked.lower().startswith('bytes='):
        return {name: value for name, value in environ.items() if name != 'HTTP_RANGE'}
    parsed = parse_range_header(asked)
    if parsed is not None and parsed.ranges[0][0] < -length:
        return {**environ, 'HTTP_RANGE': 'bytes=0-'}
    return environ
