"""An object store over HTTP on gevent's pywsgi, in which nobody waits for somebody else's disk.

    OBJECT_SERVER_TOKEN=secret python examples/object_server.py /srv/objects
    curl -H 'Authorization: Bearer secret' -T file http://127.0.0.1:8080/name

PUT, GET with ranges, HEAD, DELETE, and ``GET /?prefix=a&after=b&limit=100`` for a list. Who uploads has an
answer when the object is on the disk, under its name, with its SHA-256 as ETag; an upload that ends early
leaves nothing. With If-Match and If-None-Match nobody replaces or deletes what he has not seen.
``GET /metrics`` is for Prometheus, which may have a token of its own that opens nothing else.
Needs werkzeug, and a file system with extended attributes; for metrics prometheus_client.
"""

from __future__ import annotations

import signal

if __name__ == '__main__':      # the imports take a while: Ctrl-C then gives no traceback, either
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import base64
import contextlib
import errno
import fcntl
import hashlib
import heapq
import hmac
import http.client
import json
import os
import re
import socket
import stat
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import gevent
from gevent import pywsgi
from gevent.lock import BoundedSemaphore
from gevent.pool import Pool
from werkzeug.http import parse_etags
from werkzeug.wrappers import Response

import greenaio
import greenaio.wsgi
from greenaio import File

try:
    import prometheus_client

    from greenaio.prometheus import Collector
except ImportError:
    prometheus_client = None            # type: ignore[assignment]

BLOCK = 128 << 10       # bytes of an upload: read, hashed and written at a time
HEAD_MAX = 16 << 10     # bytes of a request's header lines; http.client alone would take 6 MiB
NAME_MAX = 255          # bytes of a file's name; in an object's, a slash counts as three
PAGE_MAX = 1000         # names in a list
UPLOAD = '.upload-'     # begins the names of unfinished uploads, and no object's
CHECKSUM = 'user.sha256'
NAMES = threading.Lock()        # of the pool's threads: nobody comes between a condition and the act
CHANGED = 'the object is not what If-Match or If-None-Match asks for'
METRICS = '/metrics'    # is no object
STATUS = {errno.ENOENT: 404, errno.ELOOP: 404, errno.ENODATA: 404, errno.ENOSPC: 507, errno.EDQUOT: 507}

Environ = dict[str, Any]

# The grammar of RFC 9110 and 9112. No line may end in a bare LF or contain a bare CR or a NUL.
TOKEN, TEXT = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", rb'[\t\x20-\x7e\x80-\xff]*'
REQUEST_LINE = re.compile(rb'%s [\x21-\x7e]+ HTTP/([0-9])\.[0-9]\r\n' % TOKEN)
FIELD = re.compile(rb'(%s):(%s)\r\n' % (TOKEN, TEXT))
HOST = re.compile(rb"[A-Za-z0-9\-._~!$&'()*+,;=%:\[\]]*")
EXTENSION = rb'[ \t]*;[ \t]*%s(?:[ \t]*=[ \t]*(?:%s|"(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\%s)*"))?' % (
    TOKEN, TOKEN, TEXT[:-1])
CHUNK = re.compile(rb'([0-9A-Fa-f]{1,16})(?:%s)*\r\n' % EXTENSION)


class Refused(Exception):
    """To be answered with this."""

    def __init__(self, status: int, why: str, **headers: str) -> None:
        super().__init__(why)
        self.response = answer(status, {'error': why}, **headers)


def answer(status: int, content: Any = None, **headers: str) -> Response:
    response = Response('' if content is None else json.dumps(content) + '\n', status,
                        mimetype='application/json')
    response.headers.extend({name.replace('_', '-'): value for name, value in headers.items()})
    return response


def in_thread(call: Callable[..., Any], *args: Any) -> Any:
    """For what `greenaio.os` has not: gevent's thread pool. *args* are paths, not fds: if this greenlet is
    killed, the thread goes on, and an fd may be another file by then."""
    return gevent.get_hub().threadpool.apply(call, args)


def file_name(path: str) -> str:
    """The one flat name of an object: without a slash, none leads out of the folder. `unquote` undoes it."""
    key = path.encode('latin-1').decode(errors='replace')[1:]
    if (path[:1] != '/' or path == METRICS or {'', '.', '..'} & set(key.split('/')) or '\ufffd' in key
            or not key.isprintable()):
        raise Refused(400, 'no object can have this name')
    name = quote(key, safe='')
    name = '%2E' + name[1:] if name[0] == '.' else name
    if len(name) > NAME_MAX:
        raise Refused(400, 'the name is too long')
    return name


def agrees(environ: Environ, path: str) -> bool:
    """Whether what is at *path* is what If-Match and If-None-Match ask for."""
    try:
        etag = os.getxattr(path, CHECKSUM, follow_symlinks=False).hex()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODATA):
            raise
        etag = ''                       # no object
    if 'HTTP_IF_MATCH' in environ and not (etag and parse_etags(environ['HTTP_IF_MATCH']).contains(etag)):
        return False
    return not (etag and parse_etags(environ.get('HTTP_IF_NONE_MATCH')).contains_weak(etag))


def replace(source: str, target: str, environ: Environ) -> int:
    """Return the status to answer with. Nothing is raised: gevent prints what a thread raises."""
    with NAMES:
        if not agrees(environ, target):
            return 412
        existed = os.path.lexists(target)
        os.rename(source, target)
    return 204 if existed else 201


def remove(path: str, environ: Environ) -> int:
    with NAMES:
        if not agrees(environ, path):
            return 412
        os.unlink(path)
    return 204


def page(root: str, prefix: str, after: str, limit: int) -> dict[str, Any]:
    """A part of the list. Looks at every name, holds *limit* of them."""
    with os.scandir(root) as entries:
        names = ((unquote(entry.name), entry.path) for entry in entries
                 if not entry.name.startswith('.') and entry.is_file(follow_symlinks=False))
        found = heapq.nsmallest(limit + 1, (pair for pair in names if pair[0] > after
                                            and pair[0].startswith(prefix)))
    objects = []
    for name, path in found[:limit]:
        with contextlib.suppress(FileNotFoundError):        # deleted since
            objects.append({'name': name, 'size': os.lstat(path).st_size})
    return {'objects': objects, 'after': found[limit - 1][0] if len(found) > limit else None}


def metrics() -> Response:
    if prometheus_client is None:
        raise Refused(501, 'prometheus_client is not installed')
    return Response(prometheus_client.generate_latest(), content_type=prometheus_client.CONTENT_TYPE_LATEST)


class Store:
    """A WSGI application. *limits*: object_size, uploads, idle_timeout."""

    def __init__(self, root: str, token: str, limits: argparse.Namespace, metrics_token: str = '') -> None:
        self.root, self.limits = os.path.realpath(root), limits
        self._authorization = b'Bearer ' + os.fsencode(token)
        self._scraper = b'Bearer ' + os.fsencode(metrics_token or token)
        self._uploads = BoundedSemaphore(limits.uploads)
        self._folder = File(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:                            # the kernel gives the lock up when this process ends, however it does
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(error.errno, 'Another server has the folder', self.root) from None
        # No server is left to finish these uploads.
        for name in os.listdir(self.root):
            if name.startswith(UPLOAD):
                os.unlink(os.path.join(self.root, name))

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        method = environ['REQUEST_METHOD']
        try:
            response = self._serve(environ, method)
        except Refused as refused:
            response = refused.response
        except OSError as error:
            if error.errno not in STATUS:
                raise
            response = answer(STATUS[error.errno], {'error': os.strerror(error.errno)})
        has_body = environ.get('CONTENT_LENGTH', '0') != '0' or 'HTTP_TRANSFER_ENCODING' in environ
        if has_body and (method != 'PUT' or response.status_code >= 400):
            response.headers['Connection'] = 'close'    # what is left of the body would be the next request
        return response(environ, start_response)

    def _serve(self, environ: Environ, method: str) -> Response:
        authorization = environ.get('HTTP_AUTHORIZATION', '').encode('latin-1')
        is_scrape = environ['PATH_INFO'] == METRICS and method in ('GET', 'HEAD')
        if not hmac.compare_digest(authorization, self._authorization) and not (
                is_scrape and hmac.compare_digest(authorization, self._scraper)):
            raise Refused(401, 'no token, or a wrong one', WWW_Authenticate='Bearer')
        if method not in ('GET', 'HEAD', 'PUT', 'DELETE'):
            raise Refused(405, 'no such method', Allow='GET, HEAD, PUT, DELETE')
        if is_scrape:
            return metrics()
        if environ['PATH_INFO'] == '/' and method in ('GET', 'HEAD'):
            return self._list(environ['QUERY_STRING'])
        path = os.path.join(self.root, file_name(environ['PATH_INFO']))
        if method == 'PUT':
            return self._put(environ, path)
        if not stat.S_ISREG(greenaio.os.stat(path, follow_symlinks=False).st_mode):
            raise Refused(404, 'no such object')
        return self._delete(environ, path) if method == 'DELETE' else self._get(environ, path)

    def _get(self, environ: Environ, path: str) -> Response:
        """The checksum is of the file that is sent, whatever has its name by then."""
        file = greenaio.open(path, 'rb', 0, opener=lambda path, flags: greenaio.os.open(path,
                                                                                      flags | os.O_NOFOLLOW))
        try:
            checksum = os.getxattr(file.fileno(), CHECKSUM)     # in memory, as the inode
            response: Response = greenaio.wsgi.send_file(environ, file, mimetype='application/octet-stream',
                                                         etag=checksum.hex())
            return response
        except BaseException:
            file.close()
            raise

    def _list(self, query: str) -> Response:
        try:
            asked = {name: values[0] for name, values in parse_qs(query, max_num_fields=3).items()}
            limit = int(asked.get('limit', PAGE_MAX))
        except ValueError:
            limit = 0
        if not 1 <= limit <= PAGE_MAX:
            raise Refused(400, f'a list takes a prefix, after, and a limit up to {PAGE_MAX}')
        return answer(200, in_thread(page, self.root, asked.get('prefix', ''), asked.get('after', ''), limit))

    def _delete(self, environ: Environ, path: str) -> Response:
        status = in_thread(remove, path, environ)
        if status == 412:
            raise Refused(status, CHANGED)
        self._folder.fsync()
        return answer(status)

    def _put(self, environ: Environ, path: str) -> Response:
        """Who reads meanwhile has the old object, until all of the new one is on the disk."""
        if 'HTTP_CONTENT_RANGE' in environ:
            raise Refused(400, 'an object is put as a whole')
        blocks = self._body(environ)
        if not self._uploads.acquire(blocking=False):
            raise Refused(503, 'too many uploads at a time', Retry_After='1')
        unfinished = os.path.join(self.root, UPLOAD + uuid.uuid4().hex)
        try:
            checksum = self._write(unfinished, blocks)
            digest = f'sha-256=:{base64.b64encode(checksum).decode()}:'     # RFC 9530
            sent = environ.get('HTTP_REPR_DIGEST', '').replace(' ', '').split(',')
            if any(one.startswith('sha-256=') and one != digest for one in sent):
                raise Refused(400, 'the content does not have the Repr-Digest that was sent')
            status = in_thread(replace, unfinished, path, environ)
            if status == 412:
                raise Refused(status, CHANGED)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                in_thread(os.unlink, unfinished)
            raise
        finally:
            self._uploads.release()
        self._folder.fsync()                    # the name
        return answer(status, ETag=f'"{checksum.hex()}"')

    def _write(self, path: str, blocks: Iterator[bytes]) -> bytes:
        """Make a new file, durable but for its name; return its checksum."""
        digest = hashlib.sha256()
        with greenaio.open(path, 'xb') as file:
            for block in blocks:
                digest.update(block)
                file.write(block)
            file.flush()
            in_thread(os.setxattr, path, CHECKSUM, digest.digest())
            greenaio.os.fsync(file)             # fdatasync may leave out the checksum
        return digest.digest()

    def _body(self, environ: Environ) -> Iterator[bytes]:
        length = environ.get('CONTENT_LENGTH')
        if length is None and 'HTTP_TRANSFER_ENCODING' not in environ:
            raise Refused(411, 'a Content-Length is needed')
        if int(length or 0) > self.limits.object_size:
            raise Refused(413, 'the object is too large')
        return self._blocks(environ['wsgi.input'])

    def _blocks(self, body: Any) -> Iterator[bytes]:
        """What the client sends. Each block has its time: a byte now and then keeps no upload alive."""
        size = 0
        while True:
            try:
                with gevent.Timeout(self.limits.idle_timeout, TimeoutError('timed out')):
                    block = body.read(BLOCK)
            except (OSError, ValueError) as error:      # not all came, or not as chunks should
                raise Refused(408 if isinstance(error, TimeoutError) else 400, str(error)) from error
            if not block:
                return
            size += len(block)
            if size > self.limits.object_size:
                raise Refused(413, 'the object is too large')
            yield block


class BadRequest(ValueError):
    """The client has sent no request: it is answered with *status*, and the connection is closed."""

    def __init__(self, why: str, status: str = '400 Bad Request') -> None:
        super().__init__(why)
        self.status = status


class Head:
    """A request's header lines, or the trailers of its body, as long as each is well-formed and there are not
    too many. http.client would take a folded value, or the rest of a line behind a bare CR, for a field."""

    def __init__(self, file: Any) -> None:
        self._file, self._left = file, HEAD_MAX
        self.fields: list[tuple[bytes, bytes]] = []

    def readline(self, limit: int) -> bytes:
        line: bytes = self._file.readline(min(limit, self._left + 1))
        self._left -= len(line)
        if self._left < 0:
            raise BadRequest('the header is too large', '431 Request Header Fields Too Large')
        if line != b'\r\n':
            field = FIELD.fullmatch(line)
            if not field:
                raise BadRequest(f'a line is no header field: {line[:100]!r}')
            self.fields.append((field[1].lower(), field[2].strip(b' \t')))
        return line

    def check(self, version: str) -> None:
        """Refuse a request whose length or host two servers might read differently (RFC 9112, 3.2 and 6)."""
        def values(name: bytes) -> list[bytes]:
            return [value for key, value in self.fields if key == name]

        hosts, lengths = values(b'host'), values(b'content-length')
        codings = [coding.strip(b' \t').lower() for value in values(b'transfer-encoding')
                   for coding in value.split(b',')]
        if len(hosts) > 1 or not hosts and version != 'HTTP/1.0' or hosts and not HOST.fullmatch(hosts[0]):
            raise BadRequest('no Host, or more than one, or none that can be')
        if len(lengths) > 1 or lengths and not re.fullmatch(rb'[0-9]+', lengths[0]):
            raise BadRequest('a Content-Length is no number, or there are several')
        if codings and (lengths or version == 'HTTP/1.0'):
            raise BadRequest('a Transfer-Encoding beside a Content-Length, or in HTTP/1.0')
        if codings and (codings[-1] != b'chunked' or codings.count(b'chunked') > 1):
            raise BadRequest('the last Transfer-Encoding is not chunked, or it is not the only chunked one')
        if len(codings) > 1:
            raise BadRequest('no Transfer-Encoding but chunked', '501 Not Implemented')


class Chunks:
    """A body with Transfer-Encoding: chunked (RFC 9112, 7.1). pywsgi's takes any bytes for an extension of a
    chunk or for the value of a trailer. *waiting* is the socket of a client that waits for "100 Continue"."""

    def __init__(self, file: Any, waiting: Any) -> None:
        self._file, self._waiting = file, waiting
        self._left: int | None = None           # bytes of this chunk; None before the first

    def read(self, size: int) -> bytes:
        """Return *size* bytes, or fewer at the end. Raises ValueError."""
        if self._waiting:
            self._waiting.sendall(b'HTTP/1.1 100 Continue\r\n\r\n')
            self._waiting = None
        blocks: list[bytes] = []
        while size and self._left != 0:
            if self._left is None:
                self._left = self._begin()
                continue
            block = self._file.read(min(size, self._left))
            self._left -= len(block)
            size -= len(block)
            blocks.append(block)
            if not block or not self._left and self._file.read(2) != b'\r\n':
                raise ValueError('a chunk is incomplete, or longer than it says')
            self._left = self._left or None
        return b''.join(blocks)

    def _begin(self) -> int:
        """Return the size of the next chunk; of the last one, which has none, read the trailers."""
        line = CHUNK.fullmatch(self._file.readline(HEAD_MAX))
        if not line:
            raise ValueError('a chunk has no size, or an extension that is none')
        size = int(line[1], 16)
        trailers = Head(self._file)
        while not size and trailers.readline(HEAD_MAX) != b'\r\n':
            pass
        return size


class Handler(pywsgi.WSGIHandler):
    """pywsgi's, which bounds neither the header nor the time that a client takes, and reads a request from
    much that is none. A request that is refused is the last one of its connection."""

    ignored_socket_errors: Any = (*pywsgi.WSGIHandler.ignored_socket_errors, errno.ETIMEDOUT, 'timed out')

    def __init__(self, sock: Any, address: Any, server: Any) -> None:
        self._timeout = server.application.limits.idle_timeout
        sock.settimeout(self._timeout)          # for sendall: of a block of the answer
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)      # the head and the body come apart
        super().__init__(sock, address, server)

    def read_requestline(self) -> str:
        with gevent.Timeout(self._timeout, TimeoutError('timed out')):
            line = super().read_requestline()
            return super().read_requestline() if line == '\r\n' else line      # RFC 9112, 2.2

    def read_request(self, line: str) -> Any:
        match = REQUEST_LINE.fullmatch(line.encode('latin-1'))
        if not match:
            raise BadRequest(f'no request line: {line[:100]!r}')
        if match[1] != b'1':
            raise BadRequest(f'no such version: {line[:100]!r}', '505 HTTP Version Not Supported')
        try:
            with gevent.Timeout(self._timeout, TimeoutError('timed out')):
                super().read_request(line)
        except http.client.HTTPException as error:
            raise BadRequest(str(error), '431 Request Header Fields Too Large') from error
        except OSError as error:                # pywsgi prints a traceback of all but ValueError
            raise BadRequest(str(error)) from error
        options = ','.join(self.headers.get_all('Connection', [])).lower().replace(' ', '').split(',')
        self.close_connection = self.close_connection or 'close' in options     # not alone, to pywsgi
        return True

    def MessageClass(self, file: Any, *args: Any) -> Any:
        head: Any = Head(file)
        message = super().MessageClass(head, *args)
        head.check(self.request_version)
        return message

    def _handle_client_error(self, error: Exception) -> tuple[str, bytes]:
        super()._handle_client_error(error)     # type: ignore[misc]  # a line in the log
        status = getattr(error, 'status', '400 Bad Request')
        return status[:3], f'HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n'.encode()

    def get_environ(self) -> Environ:
        environ = super().get_environ()
        environ['wsgi.input'] = self.wsgi_input     # not the bare socket, if the client says "Upgrade"
        if 'HTTP_TRANSFER_ENCODING' in environ:
            expects = environ.get('HTTP_EXPECT', '').lower() == '100-continue'
            environ['wsgi.input'] = Chunks(self.rfile, self.socket if expects else None)
        # And of this one pywsgi reads what the application did not, as long as the client sends. Now a client
        # that is refused may see a reset instead of the answer; "Expect: 100-continue" is for that.
        self.wsgi_input = pywsgi.Input(self.rfile, 0)
        return environ


def number(kind: Callable[[str], float], least: float, most: float) -> Callable[[str], Any]:
    """The type of an argument: a number from *least* to *most*."""
    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if least <= (value := kind(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(f'{text!r} is no number from {least:,} to {most:,}')
    return parse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('root', metavar='ROOT', help='a folder for nothing else')
    add('--token', default=os.environ.get('OBJECT_SERVER_TOKEN'),
        help='who knows it may do everything; by OBJECT_SERVER_TOKEN, ps does not show it')
    add('--metrics-token', default=os.environ.get('OBJECT_SERVER_METRICS_TOKEN', ''),
        help='who knows it may see /metrics, and nothing else; by OBJECT_SERVER_METRICS_TOKEN')
    add('--host', default='127.0.0.1')
    add('--port', type=number(int, 0, 65535), default=8080)
    add('--object-size', type=number(int, 0, 1 << 60), default=5 << 30, help='bytes at most (%(default)s)')
    add('--uploads', type=number(int, 1, 100_000), default=64, help='at a time (%(default)s); 503 for more')
    add('--connections', type=number(int, 1, 100_000), default=400,
        help='at a time (%(default)s), of two fds each; more wait')
    add('--idle-timeout', type=number(float, 0.1, 86400), default=30,
        help=f'seconds to send a header, and to send or take {BLOCK >> 10} KiB (%(default)s)')
    arguments = parser.parse_args()
    if not arguments.token:
        parser.error('give a token in the environment, as OBJECT_SERVER_TOKEN')
    if prometheus_client is not None:
        Collector()
    try:
        store = Store(arguments.root, arguments.token, arguments, arguments.metrics_token)
        server = pywsgi.WSGIServer((arguments.host.strip('[]'), arguments.port), store, log=None,
                                   handler_class=Handler, spawn=Pool(arguments.connections))
        server.start()
    except (OSError, ValueError) as error:      # a variable of the environment may be wrong, too
        print(f'object_server.py: {error}', file=sys.stderr)
        return 1
    status = 0

    def interrupt() -> None:
        nonlocal status
        status = 130
        server.close()

    gevent.signal_handler(signal.SIGTERM, server.close)
    gevent.signal_handler(signal.SIGINT, interrupt)
    try:
        host = str(server.server_host)
        print(f'http://{f"[{host}]" if ":" in host else host}:{server.server_port}', flush=True)
    except OSError as error:            # full or closed; the interpreter would try again at its end
        print(f'object_server.py: standard output: {error.strerror}', file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    server.serve_forever()
    return status


if __name__ == '__main__':
    sys.exit(main())
