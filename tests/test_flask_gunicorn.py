"""examples/flask_gunicorn.py under gunicorn's gevent worker, patched by environment alone."""

import contextlib
import hashlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.support.disks import temporary_folder
from tests.support.processes import make_plugin_visible

EXAMPLES = pathlib.Path(__file__).parent.parent / 'examples'
WITH_A_WINDOW = '''
import os
from flask_gunicorn import app
@app.get('/-/patched')
def patched():
    import greenaio.monkey
    return {'patched': greenaio.monkey.is_patched(), 'pid': os.getpid()}
'''


@pytest.fixture
def server(disk_folder, tmp_path):
    """The address of a gunicorn that serves *disk_folder*/files."""
    files = pathlib.Path(disk_folder, 'files')
    files.mkdir()
    with serving(tmp_path, WITH_A_WINDOW, '-w', '2', '--preload', FILES=str(files)) as url:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                if requests.get(f'{url}/ping', timeout=5).text == 'pong':
                    break
            time.sleep(0.1)
        yield url, files


@contextlib.contextmanager
def serving(tmp_path, app, *options, **environment):
    """The address of a patched gunicorn that serves the module *app*. The first request is the caller's."""
    folder = tmp_path / 'app'
    folder.mkdir()
    (folder / 'windowed.py').write_text(app)
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen(100)            # clients that come before gunicorn does wait there
        found = {**os.environ, **make_plugin_visible(tmp_path)}
        path = os.pathsep.join(filter(None, [str(folder), str(EXAMPLES), found.get('PYTHONPATH')]))
        process = subprocess.Popen(
            [sys.executable, '-m', 'gunicorn', '-k', 'gevent', '-b', f'fd://{listener.fileno()}',
             '--log-level', 'error', '--graceful-timeout', '3', *options, 'windowed:app'],
            env={**found, 'PYTHONPATH': path, 'GREENAIO_PATCH': '1', **environment},
            pass_fds=[listener.fileno()])
        address = f'127.0.0.1:{listener.getsockname()[1]}'
    try:
        yield f'http://{address}'
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0


TAKES_UPLOADS = '''
import hashlib
from flask import Flask, request
app = Flask(__name__)
@app.post('/')
def take():
    return hashlib.sha256(request.files['file'].read()).hexdigest()
'''


@pytest.mark.parametrize('kind', ['disk', 'memory'])
def test_first_requests_are_uploads_that_come_at_once(tmp_path, kind):
    """Each is spooled to a temporary file, the first that the worker makes."""
    with temporary_folder(kind) as folder, serving(
            tmp_path, TAKES_UPLOADS, '-w', '1', '--worker-tmp-dir', '/dev/shm', TMPDIR=folder) as url:
        def upload(i):
            data = os.urandom(600_000 + i)
            answer = requests.post(url, files={'file': ('name', data)}, timeout=30)
            return answer.text == hashlib.sha256(data).hexdigest()

        with ThreadPoolExecutor(50) as pool:
            assert all(pool.map(upload, range(50)))


def test_serves_and_takes_files_patched(server):
    url, files = server
    told = [requests.get(f'{url}/-/patched', timeout=10).json() for _ in range(10)]
    assert all(one['patched'] for one in told)

    def round_trip(i):
        data = os.urandom(1000 + i * 300_000)
        assert requests.put(f'{url}/file{i}', data=data, timeout=30).status_code == 201
        got = requests.get(f'{url}/file{i}', timeout=30)
        return hashlib.sha256(got.content).digest() == hashlib.sha256(data).digest()

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(round_trip, range(12)))
    assert requests.get(url, timeout=10).json() == sorted(f'file{i}' for i in range(12))
    assert sorted(os.listdir(files)) == sorted(f'file{i}' for i in range(12))


@pytest.mark.parametrize('cold', [False, True])
def test_ranges_return_what_was_promised(server, cold):
    url, files = server
    data = os.urandom(3_000_001)
    with open(files / 'data', 'wb') as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for asked, wanted in (('0-99', data[:100]), ('1000000-2000000', data[1_000_000:2_000_001]),
                          ('2999000-', data[2_999_000:]), ('-5', data[-5:])):
        got = requests.get(f'{url}/data', headers={'Range': f'bytes={asked}'}, timeout=10)
        assert got.status_code == 206
        assert got.content == wanted
        assert int(got.headers['Content-Length']) == len(wanted)
        begin = data.index(wanted)
        assert got.headers['Content-Range'] == f'bytes {begin}-{begin + len(wanted) - 1}/{len(data)}'
    assert requests.get(f'{url}/data', headers={'Range': 'bytes=9999999-'}, timeout=10).status_code == 416
    whole = requests.get(f'{url}/data', timeout=10)
    assert whole.content == data
    again = requests.get(f'{url}/data', headers={'If-None-Match': whole.headers['ETag']}, timeout=10)
    assert (again.status_code, again.content) == (304, b'')
    part = requests.get(f'{url}/data', headers={'Range': 'bytes=0-9', 'If-Range': '"another"'}, timeout=10)
    assert (part.status_code, part.content) == (200, data)


def assert_soon_empty(files):
    end = time.monotonic() + 5
    while os.listdir(files) and time.monotonic() < end:
        time.sleep(0.05)
    assert os.listdir(files) == []


@pytest.mark.parametrize('data', [b'', os.urandom(1_000_001)], ids=['empty', 'large'])
def test_takes_chunks(server, data):
    url, files = server
    parts = iter([data[:7], data[7:]] if data else [])
    assert requests.put(f'{url}/file', data=parts, timeout=30).status_code == 201
    assert (files / 'file').read_bytes() == data


def test_chunks_that_are_too_many_leave_nothing(server):
    url, files = server
    with contextlib.suppress(requests.ConnectionError):         # reset, before the answer was read
        assert requests.put(f'{url}/big', data=iter([bytes(1 << 20)] * 65), timeout=30).status_code == 413
    assert_soon_empty(files)


def test_torn_chunks_leave_nothing(server):
    url, files = server
    host, port = url.removeprefix('http://').split(':')
    for rest in (b'', b'5\r\nab', b'zz\r\n', b'\r\n'):
        with socket.create_connection((host, int(port)), timeout=10) as torn:
            torn.sendall(b'PUT /torn HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n'
                         b'3\r\nabc\r\n' + rest)
            torn.shutdown(socket.SHUT_WR)
            assert not torn.recv(100).startswith(b'HTTP/1.1 201'), rest
    assert_soon_empty(files)


def test_neither_a_part_nor_a_folder_is_replaced(server):
    url, files = server
    (files / 'file').write_bytes(b'0123456789')
    (files / 'folder').mkdir()
    part = {'Content-Range': 'bytes 5-9/10'}
    assert requests.put(f'{url}/file', data=b'ABCDE', headers=part, timeout=10).status_code == 400
    assert requests.put(f'{url}/folder', data=b'x', timeout=10).status_code == 409
    assert (files / 'file').read_bytes() == b'0123456789'
    assert sorted(os.listdir(files)) == ['file', 'folder']


def test_refuses_and_leaves_nothing(server):
    url, files = server
    assert requests.get(f'{url}/no-such-file', timeout=10).status_code == 404
    for name in ('.hidden', '..%2fescaped', '%2e%2e', 'a%00b'):
        assert requests.put(f'{url}/{name}', data=b'x', timeout=10).status_code in (400, 404, 405)
    host, port = url.removeprefix('http://').split(':')
    with socket.create_connection((host, int(port)), timeout=10) as big:
        big.sendall(b'PUT /big HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n')
        assert big.recv(100).startswith(b'HTTP/1.1 413')
    with socket.create_connection((host, int(port)), timeout=10) as endless:
        endless.sendall(b'PUT /endless HTTP/1.1\r\nHost: x\r\n\r\n')
        assert endless.recv(100).startswith(b'HTTP/1.1 400')
    with socket.create_connection((host, int(port))) as torn:
        torn.sendall(b'PUT /torn HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n' + bytes(1000))
    assert_soon_empty(files)
    assert os.listdir(files.parent) == ['files']
