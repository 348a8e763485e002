"""Files to WSGI clients: what is promised is sent, and nobody else waits for the disk meanwhile."""

import contextlib
import gc
import io
import os
import subprocess
import sys

import gevent
import pytest
from conftest import CONTROL, MIB, make_plugin_visible, pattern, run_python
from gevent import pywsgi, socket
from werkzeug.test import EnvironBuilder

import greenaio
from greenaio.wsgi import FileWrapper, WSGIHandler, send_file, with_file_wrapper


@contextlib.contextmanager
def serving(app, **options):
    server = pywsgi.WSGIServer(('127.0.0.1', 0), app, log=None, **options)
    server.start()
    try:
        yield server.server_port
    finally:
        server.stop(1)
        gc.collect()


def ask(port, method='GET', **headers):
    """Status, headers and body of one request, read to the end of the connection."""
    with socket.create_connection(('127.0.0.1', port), timeout=10) as connection:
        lines = [f'{method} / HTTP/1.1', 'Host: x', 'Connection: close']
        lines += [f'{name.replace("_", "-")}: {value}' for name, value in headers.items()]
        connection.sendall('\r\n'.join([*lines, '', '']).encode())
        answer = []
        while data := connection.recv(1 << 20):
            answer.append(data)
    head, _, body = b''.join(answer).partition(b'\r\n\r\n')
    status, *lines = head.decode().split('\r\n')
    return int(status.split()[1]), dict(line.split(': ', 1) for line in lines), body


@pytest.mark.parametrize('nbytes', [0, 1, 3 * MIB + 1])
def test_file_is_sent_whole_in_part_and_not_again(folder, nbytes):
    path = os.path.join(folder, 'file.txt')
    data = pattern(nbytes + 8)[:nbytes]
    with open(path, 'wb') as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with serving(lambda environ, start: send_file(environ, path)(environ, start)) as port:
        status, headers, body = ask(port)
        assert (status, body) == (200, data)
        assert int(headers['Content-Length']) == nbytes
        assert headers['Content-Type'].startswith('text/plain')
        assert headers['Accept-Ranges'] == 'bytes'
        status, _, body = ask(port, 'HEAD')
        assert (status, body) == (200, b'')
        assert ask(port, If_None_Match=headers['ETag'])[::2] == (304, b'')
        assert ask(port, If_Modified_Since=headers['Last-Modified'])[::2] == (304, b'')
        if nbytes:
            assert ask(port, Range=f'bytes={nbytes + 1}-')[0] == 416
        if nbytes > MIB:
            for asked, wanted in (('0-0', data[:1]), ('700001-1400000', data[700_001:1_400_001]),
                                  (f'{nbytes - 3}-', data[-3:]), ('-7', data[-7:])):
                status, headers, body = ask(port, Range=f'bytes={asked}')
                assert (status, body) == (206, wanted)
                assert headers['Content-Range'].endswith(f'/{nbytes}')
            assert ask(port, Range='bytes=0-9', If_Range='"other"')[::2] == (200, data)
        os.utime(path, (1, 1))
        assert ask(port, If_None_Match=headers.get('ETag', '"x"'))[0] == 200


@pytest.mark.parametrize('path, kind', [('/no/such/file', FileNotFoundError), ('/', IsADirectoryError)])
def test_what_cannot_be_opened_raises(path, kind):
    with pytest.raises(kind):
        send_file(EnvironBuilder().get_environ(), path)


@pytest.mark.parametrize('asked', ['bytes=0-99', 'bytes=99999999999-', None])
def test_open_file_is_sent_and_closed(data_file, asked):
    files = []

    def app(environ, start):
        files.append(greenaio.open(data_file, 'rb', 0))
        os.rename(data_file, data_file + '-renamed')
        try:
            response = send_file(environ, files[0], mimetype='x/y', etag='tag')
        finally:
            os.rename(data_file + '-renamed', data_file)
        return response(environ, start)

    with open(data_file, 'rb') as file:
        wanted = file.read()
    with serving(app) as port:
        status, headers, body = ask(port, **({'Range': asked} if asked else {}))
    if asked == 'bytes=99999999999-':
        assert (status, headers['Content-Range']) == (416, f'bytes */{len(wanted)}')
    else:
        assert (status, body) == ((206, wanted[:100]) if asked else (200, wanted))
        assert (headers['Content-Type'], headers['ETag']) == ('x/y', '"tag"')
    assert files[0].closed


def test_client_that_goes_away_leaves_nothing_open(data_file):
    before = len(os.listdir('/proc/self/fd'))
    with open(data_file, 'ab') as file:
        file.truncate(64 * MIB)
    with serving(lambda environ, start: send_file(environ, data_file)(environ, start)) as port:
        for _ in range(20):
            with socket.create_connection(('127.0.0.1', port)) as connection:
                connection.sendall(b'GET / HTTP/1.1\r\nHost: x\r\n\r\n')
                connection.recv(1000)
        for _ in range(200):
            if len(os.listdir('/proc/self/fd')) <= before + 1:
                break
            gevent.sleep(0.01)
        assert len(os.listdir('/proc/self/fd')) <= before + 1       # the listener
        assert ask(port)[0] == 200


class Nameless:
    def __init__(self, data):
        self.read = io.BytesIO(data).read


def test_wrapper_takes_what_has_a_read(data_file):
    data = pattern(MIB)
    with open(data_file, 'rb') as plain, greenaio.open(data_file, 'rb') as ours, \
            greenaio.open(data_file, 'rb', buffering=0) as raw:
        for file in (plain, ours, raw):
            file.read(1000)
            assert file.tell() == 1000
        for filelike in (plain, ours, raw, io.BytesIO(data[1000:]), Nameless(data[1000:])):
            assert b''.join(FileWrapper(filelike)) == data[1000:]


def test_wrapper_goes_on_from_where_it_is_told(data_file):
    for opener in (open, greenaio.open, lambda path, mode: io.BytesIO(pattern(MIB))):
        with opener(data_file, 'rb') as file:
            wrapper = FileWrapper(file, 4096)
            assert wrapper.seekable()
            wrapper.seek(777)
            assert wrapper.tell() == 777
            first = next(wrapper)
            assert first == pattern(MIB)[777:777 + len(first)]
            assert wrapper.tell() == 777 + len(first)
            wrapper.close()
            assert file.closed
    assert not FileWrapper(Nameless(b'')).seekable()


@pytest.mark.parametrize('how', ['handler', 'middleware'])
def test_server_has_a_file_wrapper(data_file, how):
    def app(environ, start):
        assert environ['wsgi.file_wrapper'] is FileWrapper
        start('200 OK', [('Content-Length', str(MIB))])
        return environ['wsgi.file_wrapper'](open(data_file, 'rb'))      # noqa: SIM115

    options = {'handler_class': WSGIHandler} if how == 'handler' else {}
    with serving(app if options else with_file_wrapper(app), **options) as port:
        assert ask(port)[::2] == (200, pattern(MIB))


# Beside a disk that takes its time ---------------------------------------------------------------

SERVE = '''
import gevent.monkey
gevent.monkey.patch_all(greenaio='{patched}' == 'patched')
import gevent, os, subprocess, sys, time
from gevent import pywsgi, socket
path, slow, fast = sys.argv[1:]
folder, name = os.path.split(path)

def werkzeug():
    from werkzeug.utils import send_file
    return lambda environ, start: send_file(path, environ)(environ, start)

def flask():
    import flask
    app = flask.Flask('app')
    app.add_url_rule('/held', view_func=lambda: flask.send_file(path))
    return app

def whitenoise():
    from whitenoise import WhiteNoise
    return WhiteNoise(None, root=folder)

server = pywsgi.WSGIServer(('127.0.0.1', 0), {server}(), log=None)
server.start()

def download():
    with socket.create_connection(('127.0.0.1', server.server_port)) as connection:
        connection.sendall(f'GET /{{name}} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n'.encode())
        size = 0
        while data := connection.recv(1 << 20):
            size += len(data)
    assert size > 4 << 20, size

worst = [0]
def tick():
    while True:
        now = time.monotonic()
        gevent.sleep(0.001)
        worst.append(time.monotonic() - now - 0.001)

download()                              # modules are imported, pages cached
fd = os.open(path, os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
subprocess.run(slow.format(me=os.getpid()), shell=True, check=True)
began = time.monotonic()
ticker = gevent.spawn(tick)
gevent.sleep(0.01)
try:
    download()
finally:
    subprocess.run(fast, shell=True)
print(max(worst), time.monotonic() - began)
'''


@pytest.mark.parametrize('patched', ['patched', 'unpatched'])
@pytest.mark.parametrize('server', ['werkzeug', 'whitenoise', 'flask'])
def test_throttled_disk_stops_only_the_unpatched(held_disk, tmp_path, server, patched):
    slow, fast = held_disk.commands(iops=2)         # the file is 4 MiB: some five reads
    with subprocess.Popen([sys.executable, '-c', CONTROL, '4'], stdout=subprocess.PIPE, text=True) as control:
        done = run_python(SERVE.format(patched=patched, server=server), held_disk.file, slow, fast,
                          env=make_plugin_visible(tmp_path))
        machine = float(control.stdout.read())
    worst, took = map(float, done.stdout.split())
    assert took > 1, 'the disk was not slow: this showed nothing'
    if patched == 'patched':
        assert worst < 0.05 + machine
    else:
        assert worst > 0.3 + machine
