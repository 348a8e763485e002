"""examples/object_server.py in a process of its own, and its clients: requests, curl, and bare sockets for
what those would not send."""

import base64
import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.support import missing
from tests.support.disks import pattern, real_disk

requests = pytest.importorskip('requests')
pytest.importorskip('werkzeug')

PROGRAM = pathlib.Path(__file__).parent.parent / 'examples' / 'object_server.py'
TOKEN = 'the token'
AUTHORIZATION = {'Authorization': f'Bearer {TOKEN}'}
GET_OBJECT = f'GET /object HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n'.encode()
MIB = 1 << 20


class Server:
    def __init__(self, root, *options):
        self.root = root
        self.log = f'{root}.log'
        with open(self.log, 'wb') as log:
            self.process = subprocess.Popen(
                [sys.executable, PROGRAM, root, '--port', '0', *options], stdout=subprocess.PIPE, stderr=log,
                text=True, env={**os.environ, 'OBJECT_SERVER_TOKEN': TOKEN})
        self.url = self.process.stdout.readline().strip()
        assert self.url, self.errors()
        self.address = ('127.0.0.1', int(self.url.rpartition(':')[2]))

    def __call__(self, method, path, headers=None, **options):
        headers = {**AUTHORIZATION, **(headers or {})}
        return requests.request(method, self.url + path, headers=headers, timeout=20, **options)

    def raw(self, data, half_close=False, timeout=10):
        """All that the server has to say to these bytes, until it hangs up."""
        with self.connect(timeout) as sock:
            sock.sendall(data)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
            return everything(sock)

    def connect(self, timeout=10):
        return socket.create_connection(self.address, timeout=timeout)

    def ask(self, line, *headers, body=b''):
        """The status of the answer to a request that is sent as it stands here."""
        lines = (line, 'Host: x', 'Connection: close', f'Authorization: Bearer {TOKEN}', *headers, '', '')
        answer = self.raw('\r\n'.join(lines).encode() + body)
        return int(answer.split()[1]) if answer else None

    def names(self):
        return [item['name'] for item in self('GET', '/').json()['objects']]

    def unfinished(self):
        return [name for name in os.listdir(self.root) if name.startswith('.')]

    def fds(self):
        return len(os.listdir(f'/proc/{self.process.pid}/fd'))

    def sockets(self):
        folder, found = f'/proc/{self.process.pid}/fd', 0
        for fd in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):
                found += os.readlink(f'{folder}/{fd}').startswith('socket:')
        return found

    def fds_at_rest(self):
        until(lambda: self.sockets() == 1)      # it listens
        return self.fds()

    def errors(self):
        return pathlib.Path(self.log).read_text()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


def everything(sock):
    received = b''
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65536):
            received += data
    return received


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def put_head(path, length, *headers):
    return '\r\n'.join((f'PUT {path} HTTP/1.1', 'Host: x', f'Authorization: Bearer {TOKEN}',
                        f'Content-Length: {length}', *headers, '', '')).encode()


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    folder = pathlib.Path(real_disk(), f'greenaio-test-objects-{os.getpid()}')
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def serving(root, *options, quiet=True):
    root.mkdir(exist_ok=True)
    server = Server(str(root), *options)
    try:
        yield server
    finally:
        server.stop()
    assert server.process.returncode == 0
    assert not quiet or 'Traceback' not in server.errors(), server.errors()


@pytest.fixture(scope='module')
def patient_server(base):
    """One that gives clients time."""
    with serving(base / 'patient') as server:
        yield server


@pytest.fixture(scope='module')
def strict_server(base):
    """One with limits that a test can reach."""
    with serving(base / 'strict', '--idle-timeout', '0.6', '--object-size', '1000000', '--uploads', '2',
                 '--connections', '20') as server:
        yield server


def empty(server):
    for name in server.names():
        assert server('DELETE', '/' + requests.utils.quote(name, safe='/')).status_code == 204
    until(lambda: not server.unfinished())


@pytest.fixture
def server(patient_server):
    yield patient_server
    empty(patient_server)


@pytest.fixture
def strict(strict_server):
    yield strict_server
    empty(strict_server)


@pytest.fixture
def stored(server):
    """An object, and its bytes."""
    content = pattern(MIB)[:1_000_001]
    assert server('PUT', '/object', data=content).status_code == 201
    return content


# What it is for ----------------------------------------------------------------------------------

def test_many_large_transfers_at_a_time(server):
    def there_and_back(i):
        content = os.urandom(MIB) * 4 + str(i).encode()
        url, checksum = f'{server.url}/large/{i}', hashlib.sha256(content).hexdigest()
        done = requests.put(url, content, headers=AUTHORIZATION, timeout=30)
        assert (done.status_code, done.headers['ETag']) == (201, f'"{checksum}"')
        got = requests.get(url, headers=AUTHORIZATION, timeout=30)
        assert hashlib.sha256(got.content).hexdigest() == checksum
        assert got.headers['ETag'] == f'"{checksum}"'

    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        assert len(list(threads.map(there_and_back, range(24)))) == 24
    assert server.unfinished() == []
    assert len(server.names()) == 24


@pytest.mark.parametrize('how', [[], ['-H', 'Transfer-Encoding: chunked'], ['-0'],
                                 ['-H', 'Expect:'], ['-H', 'Expect:', '-H', 'Transfer-Encoding: chunked']])
def test_curl(server, tmp_path, how):
    if not shutil.which('curl'):
        missing('curl is not installed')
    content = pattern(3 * MIB)[:3_000_001]
    (tmp_path / 'file').write_bytes(content)
    curl = ['curl', '-sSf', '-H', f'Authorization: Bearer {TOKEN}', f'{server.url}/by/curl']
    subprocess.run([*curl, *how, '-T', tmp_path / 'file'], check=True, timeout=20)
    subprocess.run([*curl, '-o', tmp_path / 'copy'], check=True, timeout=20)
    assert (tmp_path / 'copy').read_bytes() == content


@pytest.mark.parametrize('chunked', [False, True])
def test_every_size(server, chunked):
    for size in (0, 1, 131071, 131072, 131073):
        content = pattern(MIB)[:size]
        data = iter([content[:7], content[7:]] if size else [b'']) if chunked else content
        headers = {} if chunked or size else {'Content-Length': '0'}
        assert server('PUT', f'/{size}', data=data, headers=headers).status_code == 201
        assert server('GET', f'/{size}').content == content


def test_ranges(server, stored):
    for asked, first, end in (('0-9', 0, 10), ('500000-600000', 500000, 600001), ('-5', 999996, None),
                              ('999999-', 999999, None), ('1000000-2000000', 1000000, None),
                              ('0-', 0, None), ('131071-131072', 131071, 131073)):
        got = server('GET', '/object', headers={'Range': f'bytes={asked}'})
        part = stored[first:end]
        assert got.status_code == 206, asked
        assert got.content == part
        assert got.headers['Content-Range'] == f'bytes {first}-{first + len(part) - 1}/1000001'


def test_range_beyond_the_end(server, stored):
    got = server('GET', '/object', headers={'Range': 'bytes=1000001-'})
    assert got.status_code == 416
    assert got.headers['Content-Range'] == 'bytes */1000001'


def test_conditions(server, stored):
    etag = server('HEAD', '/object').headers['ETag']
    assert etag == f'"{hashlib.sha256(stored).hexdigest()}"'
    unchanged = server('GET', '/object', headers={'If-None-Match': etag})
    assert (unchanged.status_code, unchanged.content) == (304, b'')
    assert server('GET', '/object', headers={'If-None-Match': '"x"'}).status_code == 200
    some = {'Range': 'bytes=0-9'}
    assert server('GET', '/object', headers={**some, 'If-Range': etag}).status_code == 206
    changed = server('GET', '/object', headers={**some, 'If-Range': '"x"'})
    assert (changed.status_code, changed.content) == (200, stored)


def test_head_has_no_body(server, stored):
    for path, status, length in (('/object', 200, '1000001'), ('/missing', 404, None), ('/', 200, None)):
        head = ('HEAD {} HTTP/1.1', 'Host: x', f'Authorization: Bearer {TOKEN}', 'Connection: close', '', '')
        answer = server.raw('\r\n'.join(head).format(path).encode())
        head, _, body = answer.partition(b'\r\n\r\n')
        assert int(answer.split()[1]) == status
        assert body == b''
        assert length is None or f'Content-Length: {length}'.encode() in head


def test_delete(server, stored):
    assert server('DELETE', '/object').status_code == 204
    assert [server(method, '/object').status_code for method in ('GET', 'HEAD', 'DELETE')] == [404] * 3
    assert os.listdir(server.root) == []


def test_overwrite_keeps_the_old_object_for_who_is_reading_it(server):
    old, new = os.urandom(MIB) * 16, os.urandom(1000)
    assert server('PUT', '/object', data=old).status_code == 201
    with requests.get(f'{server.url}/object', headers=AUTHORIZATION, stream=True, timeout=20) as reading:
        begin = reading.raw.read(1000)
        assert server('PUT', '/object', data=new).status_code == 204
        assert server('GET', '/object').content == new
        assert begin + reading.raw.read() == old
    assert server.names() == ['object']


def test_list(server):
    names = ['.hidden', '..double', 'a', 'a b', 'a/b', 'a/c', 'a%2Fb', 'ä/ü', 'b', 'ß' * 20, '%2e%2e',
             'x' * 255]
    for name in names:
        done = server('PUT', '/' + requests.utils.quote(name, safe='/'), data=name.encode())
        assert done.status_code == 201
    assert server.names() == sorted(names)
    listed = server('GET', '/?prefix=a').json()
    assert listed == {'after': None, 'objects': [{'name': name, 'size': len(name)} for name in sorted(names)
                                                 if name.startswith('a')]}
    found, after, pages = [], '', 0
    while after is not None:
        page = server('GET', '/', params={'limit': 5, 'after': after}).json()
        found += [item['name'] for item in page['objects']]
        after, pages = page['after'], pages + 1
        assert len(page['objects']) <= 5
    assert (found, pages) == (sorted(names), 3)
    for name in names:
        assert server('GET', '/' + requests.utils.quote(name, safe='/')).content == name.encode()
    assert server('GET', '/?prefix=zzz').json() == {'after': None, 'objects': []}


def test_list_is_bounded(server):
    for query in ('limit=0', 'limit=1001', 'limit=x', 'limit=-1', 'a=1&b=1&c=1&d=1'):
        assert server('GET', f'/?{query}').status_code == 400, query


def test_checksum_of_the_client_is_verified(server, stored):
    new = os.urandom(1000)
    digest = base64.b64encode(hashlib.sha256(new).digest()).decode()
    for wrong in (f'sha-256=:{digest[::-1]}:', 'sha-256=', f'md5=:eA==:, sha-256=:{digest[::-1]}:'):
        assert server('PUT', '/object', data=new, headers={'Repr-Digest': wrong}).status_code == 400
        assert server.unfinished() == []
    assert server('GET', '/object').content == stored
    both = f'md5=:eA==:, sha-256=:{digest}:'
    assert server('PUT', '/object', data=new, headers={'Repr-Digest': both}).status_code == 204
    assert server('GET', '/object').content == new
    for other in ('sha-512=:eA==:', ''):        # of others it knows nothing, and RFC 9530 lets it
        assert server('PUT', '/object', data=new, headers={'Repr-Digest': other}).status_code == 204


def test_part_does_not_replace_the_object(server, stored):
    part = {'Content-Range': 'bytes 5-9/1000001'}
    assert server('PUT', '/object', data=b'parts', headers=part).status_code == 400
    assert server('GET', '/object').content == stored


def test_conditions_on_what_is_replaced_or_deleted(server):
    def put(content, **headers):
        done = server('PUT', '/object', data=content, headers={name.replace('_', '-'): value
                                                               for name, value in headers.items()})
        return done.status_code, done.headers.get('ETag')

    assert put(b'1', If_Match='*') == (412, None)
    status, first = put(b'1', If_None_Match='*')
    assert status == 201
    for unmet in ('*', first, f'"x", W/{first}'):
        assert put(b'2', If_None_Match=unmet) == (412, None)
    for unmet in ('"x"', f'W/{first}', ''):
        assert put(b'2', If_Match=unmet) == (412, None)
    assert server('GET', '/object').content == b'1'
    assert server.unfinished() == []
    status, second = put(b'2', If_Match=f'"x", {first}', If_None_Match='"y"')
    assert status == 204
    for unmet in ({'If-Match': first}, {'If-None-Match': second}, {'If-None-Match': '*'}):
        assert server('DELETE', '/object', headers=unmet).status_code == 412
    assert server('DELETE', '/object', headers={'If-Match': second}).status_code == 204


def test_one_of_many_makes_an_object_that_was_not_there(server):
    def put(i):
        return server('PUT', '/object', data=str(i), headers={'If-None-Match': '*'}).status_code

    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        assert sorted(threads.map(put, range(32))) == [201] + [412] * 31


# Clients that go away ----------------------------------------------------------------------------

def torn(how, content):
    """The head and body of an upload that does not come to its end."""
    chunk = b'%x\r\n%s\r\n' % (len(content), content)
    if how == 'half the body':
        return put_head('/object', 2 * len(content)) + content
    if how == 'a Content-Length too large by one':
        return put_head('/object', len(content) + 1) + content
    head = put_head('/object', 0).replace(b'Content-Length: 0', b'Transfer-Encoding: chunked')
    return head + {'no last chunk': chunk, 'half a chunk': chunk[:len(content) // 2],
                   'no number': chunk + b'zz\r\n', 'an empty number': chunk + b'\r\n',
                   'no end of a chunk': chunk[:-2] + b'xx0\r\n\r\n',
                   'a huge number': b'f' * 17 + b'\r\n'}[how]


@pytest.mark.parametrize('closed', ['closed', 'half closed', 'reset'])
@pytest.mark.parametrize('how', ['half the body', 'a Content-Length too large by one', 'no last chunk',
                                 'half a chunk', 'no number', 'an empty number', 'no end of a chunk',
                                 'a huge number'])
def test_torn_upload_leaves_nothing(server, stored, how, closed):
    fds = server.fds_at_rest()
    data = torn(how, os.urandom(300_000))
    if closed == 'half closed':
        answer = server.raw(data, half_close=True)
        assert answer.split()[1] == b'400'
    else:
        with server.connect() as sock:
            sock.sendall(data)
            until(lambda: server.unfinished() or 'number' in how or 'end' in how)
            if closed == 'reset':
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
    until(lambda: server.fds() <= fds)
    assert server.unfinished() == []
    assert server.names() == ['object']
    assert server('GET', '/object').content == stored


def test_more_body_than_said_is_not_in_the_object(server):
    answer = server.raw(put_head('/object', 5, 'Connection: close') + b'hello, world')
    assert answer.split()[1] == b'201'
    assert server('GET', '/object').content == b'hello'


def test_clients_gone_while_they_download(server):
    server('PUT', '/object', data=os.urandom(MIB) * 16)
    fds = server.fds_at_rest()
    socks = []
    for _ in range(10):
        sock = server.connect()
        sock.sendall(GET_OBJECT)
        assert sock.recv(1000).startswith(b'HTTP/1.1 200')
        socks.append(sock)
    until(lambda: server.fds() >= fds + 20)     # a connection and a file each
    for sock in socks:
        sock.close()
    until(lambda: server.fds() <= fds)


def test_unfinished_uploads_of_a_server_that_was_killed(base):
    root = base / 'killed'
    root.mkdir()
    server = Server(str(root))
    try:
        assert server('PUT', '/object', data=b'content').status_code == 201
        with server.connect() as sock:
            sock.sendall(put_head('/object', MIB) + bytes(1000))
            until(server.unfinished)
            server.process.kill()
            server.process.wait()
        assert len(server.unfinished()) == 1
    finally:
        server.stop()
    with serving(root) as server:
        assert server.unfinished() == []
        assert server('GET', '/object').content == b'content'


def test_sigterm_ends_it_in_the_middle_of_transfers(base):
    with serving(base / 'ended') as server:
        server('PUT', '/object', data=os.urandom(MIB) * 16)
        with server.connect() as download, server.connect() as upload:
            download.sendall(GET_OBJECT)
            download.recv(1000)
            upload.sendall(put_head('/new', MIB) + bytes(1000))
            until(server.unfinished)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(1.9) == 0        # one second of which is for who is nearly done
        assert os.listdir(server.root) == ['object']


# Clients that mean harm --------------------------------------------------------------------------

@pytest.fixture
def secret(server):
    """A file beside the root, which nobody must read."""
    path = pathlib.Path(server.root).parent / 'secret'
    path.write_text('secret')
    yield path
    assert path.read_text() == 'secret'
    path.unlink()


NO_NAMES = (
    '/../secret', '/..', '/.', '//', '//secret', '/a/../../secret', '/a/..', '/a/./b', '/a//b', '/a/',
    '/%2e%2e/secret', '/%2e%2e%2fsecret', '/..%2fsecret', '/%2E%2E%2Fsecret', '/%2e', '/%2fetc%2fpasswd',
    '//etc/passwd', '/a%00', '/%00', '/a%0ab', '/a%7f', '/%ff%fe', '/' + 'x' * 256, '/' + '%C3%A4' * 50,
    'secret', 'http://x/secret', '*', '..', '/%c0%ae%c0%ae/secret')

STRANGE_NAMES = ('/%252e%252e%252fsecret', '/%252fetc%252fpasswd', '/..\\secret', '/...', '/%2e%2e%5csecret',
                 '/~root', '/.upload-x', '/C:%5c', '/%25')


def test_names_that_no_object_can_have(server, secret):
    for path in NO_NAMES:
        for method in ('GET', 'HEAD', 'DELETE'):
            assert server.ask(f'{method} {path} HTTP/1.1') == 400, (method, path)
        assert server.ask(f'PUT {path} HTTP/1.1', 'Content-Length: 5', body=b'outer') == 400, path
    assert os.listdir(server.root) == []


def test_names_that_only_look_strange_lead_nowhere_else(server, secret):
    for path in STRANGE_NAMES:
        assert server.ask(f'GET {path} HTTP/1.1') == 404, path
        assert server.ask(f'PUT {path} HTTP/1.1', 'Content-Length: 5', body=b'inner') == 201, path
        name, = os.listdir(server.root)
        assert not name.startswith('.')
        assert server.ask(f'DELETE {path} HTTP/1.1') == 204, path


def test_what_is_no_object_is_not_followed_and_not_waited_for(server, secret):
    root = pathlib.Path(server.root)
    (root / 'link').symlink_to(secret)
    (root / 'relative').symlink_to('../secret')
    (root / 'above').symlink_to('..')
    (root / 'self').symlink_to('self')
    (root / 'folder').mkdir()
    (root / 'folder' / 'file').write_text('secret')
    os.mkfifo(root / 'pipe')
    (root / 'by hand').write_text('secret')
    names = os.listdir(root)
    for name in (*names, 'above/secret', 'folder/file', 'above%2fsecret'):
        for method in ('GET', 'HEAD', 'DELETE'):
            assert server.ask(f'{method} /{name.replace(" ", "%20")} HTTP/1.1') == 404, (method, name)
    assert sorted(os.listdir(root)) == sorted(names)
    assert server.names() == ['by hand']
    assert server('PUT', '/link', data=b'new').status_code == 204       # instead of the link
    assert server('GET', '/link').content == b'new'
    assert not (root / 'link').is_symlink()
    for name in (*names,):
        if name != 'link':
            (shutil.rmtree if name == 'folder' else os.unlink)(root / name)


@pytest.mark.parametrize('header', [
    '', 'Authorization: Bearer', 'Authorization: Bearer ', 'Authorization: Bearer wrong',
    'Authorization: the token', f'Authorization: Bearer {TOKEN}x', f'Authorization: Bearer {TOKEN[:-1]}',
    f'Authorization: bearer  {TOKEN}', f'Authorization: Basic {TOKEN}',
    f'Authorization: Bearer \xff{TOKEN}', f'X-Authorization: Bearer {TOKEN}',
    f'Authorization: Bearer x\r\nAuthorization: Bearer {TOKEN}', 'Authorization: Bearer \u20ac'])
def test_without_the_token_nothing(server, stored, header):
    for line in ('GET /object', 'HEAD /object', 'GET /missing', 'GET /', 'DELETE /object', 'FOO /'):
        answer = server.raw(f'{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\n\r\n'.encode())
        assert answer.split()[1] == b'401', line
    # Before anything is read: the body is not even asked for.
    head = ('PUT /object HTTP/1.1', 'Host: x', 'Content-Length: 1000', 'Expect: 100-continue', header, '', '')
    answer = server.raw('\r\n'.join(head).encode())
    assert answer.split()[1] == b'401'
    assert server('GET', '/object').content == stored


def test_too_large_is_refused_before_it_is_read(strict):
    answer = strict.raw(put_head('/object', 1_000_001, 'Expect: 100-continue'))
    assert answer.split()[1] == b'413'
    assert strict.raw(put_head('/object', 10 ** 30, 'Expect: 100-continue')).split()[1] == b'413'
    assert strict('PUT', '/object', data=bytes(1_000_000)).status_code == 201


def test_too_large_in_chunks_is_refused_once_it_is(strict):
    def chunks():
        for _ in range(11):
            yield bytes(100_000)

    with contextlib.suppress(requests.ConnectionError):         # reset, before the answer was read
        assert strict('PUT', '/object', data=chunks()).status_code == 413
    head = put_head('/object', 0, 'Connection: close').replace(b'Content-Length: 0',
                                                               b'Transfer-Encoding: chunked')
    chunk = b'186a0\r\n' + bytes(100_000) + b'\r\n'
    assert strict.raw(head + 10 * chunk + b'1\r\nx\r\n0\r\n\r\n').split()[1] == b'413'
    assert strict.names() == strict.unfinished() == []
    assert strict.raw(head + 10 * chunk + b'0\r\n\r\n').split()[1] == b'201'


@pytest.mark.parametrize('headers, status', [
    ([], 411), (['Transfer-Encoding: gzip, chunked'], 501), (['Transfer-Encoding: identity'], 400),
    (['Transfer-Encoding: gzip', 'Content-Length: 5'], 400), (['Content-Length: -1'], 400),
    (['Content-Length: x'], 400), (['Content-Length: 1e3'], 400)])
def test_body_of_unknown_length(server, headers, status):
    assert server.ask('PUT /object HTTP/1.1', *headers, body=b'hello') == status
    assert server.names() == server.unfinished() == []


def test_upgrade_does_not_give_more_than_was_announced(server):
    answer = server.raw(put_head('/object', 5, 'Connection: Upgrade', 'Upgrade: websocket') + b'hello, world',
                        half_close=True)
    assert answer.split()[1] == b'201'
    assert server('GET', '/object').content == b'hello'


def test_too_many_uploads(strict):
    with strict.connect() as one, strict.connect() as other:
        for i, sock in enumerate((one, other)):
            sock.sendall(put_head(f'/{i}', 1000) + bytes(500))
        until(lambda: len(strict.unfinished()) == 2)
        answer = strict.raw(put_head('/more', 1000, 'Expect: 100-continue'))
        assert answer.split()[1] == b'503'
        assert b'\r\nRetry-After: ' in answer
    until(lambda: not strict.unfinished())
    assert strict('PUT', '/more', data=b'1').status_code == 201


def test_too_many_connections_wait(strict):
    socks = [strict.connect() for _ in range(20)]
    try:
        began = time.monotonic()
        assert strict.ask('GET / HTTP/1.1') == 200              # once the others were dropped
        assert 0.2 < time.monotonic() - began < 5
    finally:
        for sock in socks:
            sock.close()


def request_in(server, pieces, pause=0.1):
    """Seconds until the server hung up on a client that sends *pieces* with pauses; and what it said."""
    began, said = time.monotonic(), []
    with server.connect() as sock:
        listener = threading.Thread(target=lambda: said.append(everything(sock)))
        listener.start()
        with contextlib.suppress(OSError):
            for piece in pieces:
                sock.sendall(piece)
                if not listener.is_alive():
                    break
                time.sleep(pause)
        listener.join()
    return time.monotonic() - began, said[0]


@pytest.mark.parametrize('pieces', [
    [], [b'GET'], [b'GET / HTTP/1.1\r\n'], [b'GET / HTTP/1.1\r\nX: y\r\n'], [b'G'] * 100,
    [b'GET / HTTP/1.1\r\n', *[b'X: y\r\n'] * 100], [put_head('/object', 1000)],
    [put_head('/object', 1000), *[b'x'] * 100],
    [put_head('/object', 0).replace(b'Content-Length: 0', b'Transfer-Encoding: chunked'),
     *[b'1\r\nx\r\n'] * 100]],
    ids=['nothing', 'half a line', 'a line', 'a header', 'a line by bytes', 'headers by and by', 'no body',
         'a body by bytes', 'chunks of a byte'])
def test_slow_sender_is_dropped(strict, pieces):
    seconds, said = request_in(strict, pieces)
    assert 0.3 < seconds < 3
    assert b' 200 ' not in said
    assert b' 201 ' not in said
    until(lambda: not strict.unfinished())
    assert strict.names() == []


def test_slow_reader_is_dropped(base):
    with serving(base / 'reader', '--idle-timeout', '0.5') as server:
        server('PUT', '/object', data=os.urandom(MIB) * 32)
        fds = server.fds_at_rest()
        with server.connect() as sock:
            sock.sendall(GET_OBJECT)
            until(lambda: server.fds() >= fds + 2)
            until(lambda: server.fds() <= fds, 5)
            assert len(everything(sock)) < 32 * MIB


@pytest.mark.parametrize('bomb, status', [
    (b'GET /' + b'x' * 9000 + b' HTTP/1.1\r\n\r\n', 414),
    (b'GET / HTTP/1.1\r\nX: ' + b'y' * 20_000 + b'\r\n\r\n', 431),
    (b'GET / HTTP/1.1\r\n' + b'X: y\r\n' * 101 + b'\r\n', 431),
    (b'GET / HTTP/1.1\r\n' + (b'X: ' + b'y' * 1000 + b'\r\n') * 17 + b'\r\n', 431),
    (b'GET / HTTP/1\r\n\r\n', 400), (b'GET / HTTP/x\r\n\r\n', 400), (b'GET\r\n\r\n', 400),
    (b'\0\xff\r\n\r\n', 400),
    (b'GET / HTTP/1.1\r\nno colon\r\n\r\n', 400)])
def test_header_bomb(server, bomb, status):
    assert server.raw(bomb, half_close=True).split()[1] == str(status).encode()


def test_body_of_a_refused_request_is_not_read(server):
    """The server hangs up on a client that would send for ever."""
    for method, status in (('GET', b'404'), ('DELETE', b'404'), ('POST', b'405')):
        head = f'{method} /missing HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n'
        with server.connect() as sock:
            sock.sendall(head.encode() + b'Transfer-Encoding: chunked\r\n\r\n')
            assert everything(sock).split()[1] == status


# RFC 9112 ----------------------------------------------------------------------------------------

CHUNKED, ONE = b'Transfer-Encoding: chunked', b'1\r\nx\r\n'
HOST, AUTHORIZED = b'Host: x', f'Authorization: Bearer {TOKEN}'.encode()


def put(*fields, body=b'', line=b'PUT /new HTTP/1.1', host=HOST):
    return b'\r\n'.join((line, *([host] if host else []), AUTHORIZED, *fields, b'', b'')) + body


def get(line=b'GET /object HTTP/1.1', *fields):
    return put(*fields, line=line)


def chunked(body):
    return put(CHUNKED, body=body)


REFUSED = {
    # Section 2.2: lines end in CRLF, and contain no CR and no NUL.
    'request line with a bare LF': (get().replace(b'\r\n', b'\n', 1), 400),
    'field with a bare LF': (get().replace(b'x\r\n', b'x\n', 1), 400),
    'every line with a bare LF': (get().replace(b'\r\n', b'\n'), 400),
    'bare CR in the request line': (get(b'GET /object\rx HTTP/1.1'), 400),
    'bare CR in a field': (put(b'X: y\rContent-Length: 0'), 400),
    'NUL in the request line': (get(b'GET /obj\0ect HTTP/1.1'), 400),
    'NUL in a field': (put(b'X: y\0', b'Content-Length: 0'), 400),
    'control character in a field': (put(b'X: y\x0b', b'Content-Length: 0'), 400),
    'blanks before the first field': (get(b'GET /object HTTP/1.1\r\n X: y'), 400),
    'no end of the header': (get()[:-2], 400),
    # Section 2.3 and 3: the request line.
    'HTTP/0.9': (b'GET /object\r\n', 400),
    'HTTP/2': (get(b'GET /object HTTP/2.0'), 505),
    'version of one digit': (get(b'GET /object HTTP/1'), 400),
    'version of three digits': (get(b'GET /object HTTP/1.10'), 400),
    'version with a sign': (get(b'GET /object HTTP/1.+1'), 400),
    'version in small letters': (get(b'GET /object http/1.1'), 400),
    'version of another protocol': (get(b'GET /object HTTPS/1.1'), 400),
    'two blanks': (get(b'GET  /object HTTP/1.1'), 400),
    'tab for a blank': (get(b'GET\t/object HTTP/1.1'), 400),
    'vertical tab for a blank': (get(b'GET\x0b/object HTTP/1.1'), 400),
    'no-break space for a blank': (get(b'GET\xa0/object HTTP/1.1'), 400),
    'blank before the method': (get(b' GET /object HTTP/1.1'), 400),
    'blank behind the version': (get(b'GET /object HTTP/1.1 '), 400),
    'blank in the target': (get(b'GET /obj ect HTTP/1.1'), 400),
    'method that is no token': (get(b'G(T /object HTTP/1.1'), 400),
    'no method': (get(b' /object HTTP/1.1'), 400),
    'no target': (get(b'GET HTTP/1.1'), 400),
    'target that is not ASCII': (get(b'GET /\xe4 HTTP/1.1'), 400),
    'too long a target': (get(b'GET /' + b'x' * 9000 + b' HTTP/1.1'), 414),
    # Section 3.2: Host.
    'no Host': (put(b'Content-Length: 0', host=None), 400),
    'two Hosts': (put(HOST, b'Content-Length: 0'), 400),
    'Host with a path': (put(b'Content-Length: 0', host=b'Host: x/y'), 400),
    'Host with a blank': (put(b'Content-Length: 0', host=b'Host: x y'), 400),
    'Host with a user': (put(b'Content-Length: 0', host=b'Host: u@x'), 400),
    # Section 5: fields.
    'blank before the colon': (put(b'Content-Length : 0'), 400),
    'tab before the colon': (put(b'Content-Length\t: 0'), 400),
    'no colon': (put(b'Content-Length', b'Content-Length: 0'), 400),
    'no name': (put(b': x', b'Content-Length: 0'), 400),
    'name that is no token': (put(b'X(y): z', b'Content-Length: 0'), 400),
    'name that is not ASCII': (put(b'\xe4: z', b'Content-Length: 0'), 400),
    'folded field': (put(b'X: y\r\n z', b'Content-Length: 0'), 400),
    'folded by a tab': (put(b'X: y\r\n\tz', b'Content-Length: 0'), 400),
    'folded length': (put(b'Content-Length:\r\n 0'), 400),
    'folded Transfer-Encoding': (put(b'X: y\r\n ' + CHUNKED, b'Content-Length: 0'), 400),
    'too large a field': (put(b'X: ' + b'y' * (16 << 10)), 431),
    'too many fields': (put(*[b'X: y'] * 120), 431),
    # Section 6: how long the body is.
    'both lengths': (put(CHUNKED, b'Content-Length: 5', body=b'0\r\n\r\n'), 400),
    'both lengths, the other way round': (put(b'Content-Length: 5', CHUNKED, body=b'0\r\n\r\n'), 400),
    'different lengths': (put(b'Content-Length: 0', b'Content-Length: 5', body=b'hello'), 400),
    'the same length twice': (put(b'Content-Length: 5', b'content-length: 5', body=b'hello'), 400),
    'list of lengths': (put(b'Content-Length: 5, 5', body=b'hello'), 400),
    'Transfer-Encoding in HTTP/1.0': (put(CHUNKED, line=b'PUT /new HTTP/1.0', body=ONE + b'0\r\n\r\n'), 400),
    'chunked is not the last': (put(b'Transfer-Encoding: chunked, gzip', body=b'0\r\n\r\n'), 400),
    'chunked twice': (put(b'Transfer-Encoding: chunked, chunked', body=b'0\r\n\r\n'), 400),
    'chunked in two fields': (put(CHUNKED, CHUNKED, body=b'0\r\n\r\n'), 400),
    'chunked and another field': (put(CHUNKED, b'Transfer-Encoding: identity', body=b'0\r\n\r\n'), 400),
    'coding before chunked': (put(b'Transfer-Encoding: gzip, chunked', body=b'0\r\n\r\n'), 501),
    'empty Transfer-Encoding': (put(b'Transfer-Encoding:', b'Content-Length: 0'), 400),
    'GET with both lengths': (get(b'GET /object HTTP/1.1', CHUNKED, b'Content-Length: 0'), 400),
    # Section 7: chunks, their extensions and trailers.
    'trailer that is none': (chunked(ONE + b'0\r\nno colon\r\n\r\n'), 400),
    'trailer with a bare LF': (chunked(ONE + b'0\r\nX: y\nZ: z\r\n\r\n'), 400),
    'trailer with a bare CR': (chunked(ONE + b'0\r\nX: y\rZ: z\r\n\r\n'), 400),
    'trailer with a NUL': (chunked(ONE + b'0\r\nX: \0\r\n\r\n'), 400),
    'trailer with a blank before the colon': (chunked(ONE + b'0\r\nX : y\r\n\r\n'), 400),
    'folded trailer': (chunked(ONE + b'0\r\nX: y\r\n z\r\n\r\n'), 400),
    'end of the trailers with a bare LF': (chunked(ONE + b'0\r\n\n'), 400),
    'too large a trailer': (chunked(ONE + b'0\r\nX: ' + b'y' * 15_000 + b'\r\nX: ' + b'y' * 1400), 400),
    'data longer than the chunk': (chunked(b'1\r\nxy\r\n0\r\n\r\n'), 400),
    'data with a bare LF behind it': (chunked(b'1\r\nx\n0\r\n\r\n'), 400),
    'data with a bare CR behind it': (chunked(b'1\r\nx\r0\r\n\r\n'), 400),
}
REFUSED |= {f'Content-Length {value[:9]!r}': (
    put(b'Content-Length: ' + value, body=b'hello'), 400) for value in (
    b'', b'+5', b'-5', b'5_0', b'0x5', b'5.0', b'5e0', b'5 5', b'5,', b'five', b'\xb2', b'"5"', b'9' * 5000)}
REFUSED |= {f'Transfer-Encoding {value!r}': (
    put(b'Transfer-Encoding: ' + value, body=b'0\r\n\r\n'), 400) for value in (
    b'xchunked', b'chunked;q=1', b'"chunked"', b'identity', b'chunked,', b'gzip', b'chunked\x0b',
    b'chunked x')}
REFUSED |= {f'chunk size {size[:9]!r}': (chunked(size + b'\r\nx\r\n0\r\n\r\n'), 400) for size in (
    b'', b'+1', b'-1', b'0x1', b'1_', b' 1', b'1 ', b'g', b'\xb2', b'1\n', b'1\r', b'\n1', b'f' * 17)}
REFUSED |= {f'chunk extension {extension[:9]!r}': (
    chunked(b'1' + extension + b'\r\nx\r\n0\r\n\r\n'), 400) for extension in (
    b';', b';a=', b';=b', b';a b', b';a="b', b';a\nb', b';a\rb', b';a\0', b';a="\n"', b';a,b',
    b';' + b'x' * 17_000)}


@pytest.fixture
def small_object(server):
    assert server('PUT', '/object', data=b'content').status_code == 201


@pytest.mark.parametrize('request_, status', REFUSED.values(), ids=REFUSED)
def test_request_that_rfc_9112_refuses(server, small_object, request_, status):
    """It has one answer, and what follows it is not taken for the next request."""
    with server.connect() as sock:
        sock.sendall(request_ + put(line=b'DELETE /object HTTP/1.1'))
        said = everything(sock)
    assert [int(line.split()[1]) for line in said.splitlines() if line.startswith(b'HTTP/1.1 ')] == [status]
    assert b'\r\nconnection: close\r\n' in said.lower()
    assert os.listdir(server.root) == ['object']


ACCEPTED = {
    'empty line before it': (b'\r\n' + put(b'Content-Length: 0'), b''),
    'blanks around a value': (put(b'Content-Length: \t 5 \t'), b'hello'),
    'no blank before a value': (put(b'Content-Length:5'), b'hello'),
    'zeros before a length': (put(b'Content-Length: 005'), b'hello'),
    'value that is not ASCII': (put(b'X: \xe4\t\xff', b'Content-Length: 0'), b''),
    'empty value': (put(b'X:', b'Content-Length: 0'), b''),
    'Host with a port': (put(b'Content-Length: 0', host=b'Host: [::1]:80'), b''),
    'empty Host': (put(b'Content-Length: 0', host=b'Host:'), b''),
    'Transfer-Encoding in capitals': (put(b'TRANSFER-ENCODING: Chunked', body=b'1\r\nx\r\n0\r\n\r\n'), b'x'),
    'chunks': (chunked(b'2\r\nhe\r\n003\r\nllo\r\n00\r\n\r\n'), b'hello'),
    'size in capitals': (chunked(b'A\r\n0123456789\r\n0\r\n\r\n'), b'0123456789'),
    'chunk extensions': (chunked(b'5;a;b=c ; d = "e\\"; \\\\"\r\nhello\r\n0;x\r\n\r\n'), b'hello'),
    'trailers': (chunked(b'5\r\nhello\r\n0\r\nX: y\r\nContent-Length: 7\r\n\r\n'), b'hello')}


@pytest.mark.parametrize('request_, content', ACCEPTED.values(), ids=ACCEPTED)
def test_request_that_only_looks_strange_is_followed_by_the_next(server, small_object, request_, content):
    request_ += content if b'chunked' not in request_.lower() else b''
    said = server.raw(request_ + get(b'GET /object HTTP/1.1', b'Connection: TE, Close'))
    statuses = [line.split()[1] for line in said.splitlines() if line.startswith(b'HTTP/1.1 ')]
    assert statuses == [b'201', b'200']
    assert server('GET', '/new').content == content


def test_http_1_0_needs_no_host(server, stored):
    said = server.raw(put(line=b'GET /object HTTP/1.0', host=None))
    assert said.startswith(b'HTTP/1.1 200 ')


def test_chunked_upload_that_expects_100_continue_is_told(server):
    with server.connect() as sock:
        sock.sendall(put(CHUNKED, b'Expect: 100-continue'))
        assert sock.recv(100) == b'HTTP/1.1 100 Continue\r\n\r\n'
        sock.sendall(b'5\r\nhello\r\n0\r\n\r\n')
        assert sock.recv(1000).startswith(b'HTTP/1.1 201 ')


def test_connection_is_kept_after_what_was_answered(server, stored):
    one = f'GET /missing HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n'
    last = GET_OBJECT.decode().replace('Host: x', 'Host: x\r\nConnection: close')
    answer = server.raw((one + put_head('/new', 3).decode() + 'abc' + last).encode())
    assert [line.split()[1] for line in answer.splitlines() if line.startswith(b'HTTP/1.1')] == [
        b'404', b'201', b'200']


# The command -------------------------------------------------------------------------------------

def run(*args, **env):
    return subprocess.run([sys.executable, PROGRAM, *args], capture_output=True, text=True, timeout=20,
                          env={**os.environ, **env})


def test_bad_arguments(tmp_path):
    assert run().returncode == 2
    no_token = run(tmp_path)
    assert (no_token.returncode, 'OBJECT_SERVER_TOKEN' in no_token.stderr) == (2, True)
    nowhere = run(tmp_path / 'missing', '--token', 'x', '--port', '0')
    assert nowhere.returncode == 1
    assert nowhere.stderr.count('\n') == 1


def test_one_server_for_a_root(server):
    second = run(server.root, '--token', 'x', '--port', '0')
    assert second.returncode == 1
    assert second.stderr == (
        f'object_server.py: [Errno 11] Another server has the folder: {os.path.realpath(server.root)!r}\n')
    link = pathlib.Path(f'{server.root}-link')
    link.symlink_to(server.root)
    assert 'Another server' in run(link, '--token', 'x', '--port', '0').stderr
    link.unlink()


def test_token_as_an_argument(base):
    with serving(base / 'argument', '--token', 'other') as server:
        assert server('GET', '/').status_code == 401
        assert server('GET', '/', headers={'Authorization': 'Bearer other'}).json()['objects'] == []
