"""Files to WSGI clients: what is promised is sent, and nobody else waits for the disk meanwhile."""

import contextlib
import gc
import io
import os
import subprocess
import sys

import gevent
import pytest
from gevent import pywsgi, socket
from werkzeug.test import EnvironBuilder

import greenaio
from greenaio.wsgi import FileWrapper, WSGIHandler, send_file, with_file_wrapper
from tests.support.disks import MIB, pattern
from tests.support.processes import CONTROL, make_plugin_visible, run_program


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
        lines = [f'{method} / HTTP/1.1', 'Host: x']
        lines += [f'{name.replace("_", "-")}: {value}' for name, value in
                  {'Connection': 'close', **headers}.items()]
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


def sends_what_changes(path, direct, change):
    """An application that sends 100 bytes, which *change* makes more or less once it has looked."""
    def app(environ, start):
        with open(path, 'wb') as file:
            file.write(pattern(104)[:100])
        response = send_file(environ, greenaio.open(path, 'rb', 0, direct=direct))
        change()
        return response(environ, start)

    return app


@pytest.mark.parametrize('asked', [None, 'bytes=90-'])
@pytest.mark.parametrize('direct', [False, True])
def test_file_that_grows_is_sent_as_long_as_was_said(folder, direct, asked):
    path = os.path.join(folder, 'log.txt')

    def grow():
        with open(path, 'ab') as file:
            file.write(b'HTTP/1.1 200 OK\r\n\r\nforged')

    with serving(sends_what_changes(path, direct, grow)) as port:
        status, headers, body = ask(port, **({'Range': asked} if asked else {}))
    assert (status, body) == ((206, pattern(104)[90:100]) if asked else (200, pattern(104)[:100]))
    assert int(headers['Content-Length']) == len(body)


@pytest.mark.parametrize('asked', [None, 'bytes=10-'])
@pytest.mark.parametrize('direct', [False, True])
def test_file_that_shrinks_ends_the_connection(folder, direct, asked):
    path = os.path.join(folder, 'log.txt')
    app = sends_what_changes(path, direct, lambda: os.truncate(path, 50))
    with serving(app) as port:          # else this waits until it has no more time
        body = ask(port, Connection='keep-alive', **({'Range': asked} if asked else {}))[2]
    assert body == pattern(104)[10 if asked else 0:50]


def test_file_is_sent_from_its_position_on(data_file):
    def app(environ, start):
        file = greenaio.open(data_file, 'rb', 0)
        file.seek(10)
        return send_file(environ, file)(environ, start)

    data = pattern(MIB)[10:]
    with serving(app) as port:
        status, headers, body = ask(port)
        assert (status, body) == (200, data)
        assert int(headers['Content-Length']) == len(data)
        status, headers, body = ask(port, Range='bytes=5-9')
        assert (status, body) == (206, data[5:10])
        assert headers['Content-Range'] == f'bytes 5-9/{len(data)}'


def test_file_without_a_length_is_sent_without_one():
    with open('/proc/version', 'rb') as file:
        wanted = file.read()
    with serving(lambda environ, start: send_file(environ, '/proc/version')(environ, start)) as port:
        status, headers, body = ask(port, Range='bytes=0-3')
        assert status == 200
        assert wanted in body           # in a chunk
        assert not {'Content-Length', 'ETag', 'Accept-Ranges'} & set(headers)
        assert ask(port, If_Modified_Since=headers['Last-Modified'])[0] == 200


@pytest.mark.parametrize('method, asked, wanted', [
    ('GET', 'bytes=-99999999', (206, slice(None))),
    ('GET', 'pages=1-2', (200, slice(None))),
    ('GET', 'bytes=0-1,5-9', (200, slice(None))),
    ('GET', 'BYTES=5-9', (206, slice(5, 10))),
    ('GET', 'bytes=x', (416, None)),
    ('GET', 'bytes=-0', (416, None)),
    ('HEAD', 'bytes=5-9', (200, slice(0)))])
def test_range_is_what_rfc_9110_makes_of_it(data_file, method, asked, wanted):
    with serving(lambda environ, start: send_file(environ, data_file)(environ, start)) as port:
        status, _, body = ask(port, method, Range=asked)
    assert status == wanted[0]
    if wanted[1] is not None:
        assert body == pattern(MIB)[wanted[1]]


@pytest.mark.parametrize('more', [{}, {'Range': 'bytes=0-9'}])
def test_condition_that_fails_sends_no_file(data_file, more):
    files = []

    def app(environ, start):
        files.append(greenaio.open(data_file, 'rb', 0))
        return send_file(environ, files[-1], etag='tag')(environ, start)

    with serving(app) as port:
        status, _, body = ask(port, If_Match='"other"', **more)
        assert status == 412
        assert len(body) < 1000
        assert ask(port, If_None_Match='"tag"', **more)[::2] == (304, b'')
        assert ask(port, If_Match='"tag"', **more)[0] == (206 if more else 200)
    assert [file.closed for file in files] == [True] * 3


@pytest.mark.parametrize('name, told', [
    (b'a.txt', 'a.txt'),
    (b'a\n\x7f.txt', 'a__.txt'),
    (b'a\xff.txt', 'a_.txt'),
    ('a\u20ac.txt'.encode(), "a.txt; filename*=UTF-8''a%E2%82%AC.txt")])
def test_file_is_told_by_its_name(folder, name, told):
    path = os.path.join(os.fsencode(folder), name)
    with open(path, 'wb') as file:
        file.write(b'data')
    for one in (path, os.fsdecode(path), greenaio.open(path, 'rb', 0)):
        response = send_file(EnvironBuilder().get_environ(), one)
        assert response.mimetype == 'text/plain'
        assert response.headers['Content-Disposition'] == f'inline; filename={told}'
        response.close()


def test_file_from_the_future_is_as_old_as_its_answer(data_file):
    os.utime(data_file, (1 << 40, 1 << 40))     # beyond the year 9999, if the file system has such
    response = send_file(EnvironBuilder().get_environ(), data_file)
    assert response.last_modified <= response.date
    response.close()


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
            wrapper.seek(-6, os.SEEK_END)
            wrapper.seek(2, os.SEEK_CUR)
            assert wrapper.tell() == MIB - 4
            assert b''.join(wrapper) == pattern(MIB)[-4:]
            wrapper.close()
            assert file.closed
    assert not FileWrapper(Nameless(b'')).seekable()


@pytest.mark.parametrize('opener', [open, greenaio.open, lambda path, mode: greenaio.open(path, mode, 0)])
def test_closed_file_is_not_the_next_with_its_number(data_file, opener):
    with opener(data_file, 'rb') as file:
        wrapper = FileWrapper(file)
        next(wrapper)
        number = file.fileno()
    with open(data_file, 'rb') as other:
        if other.fileno() != number:
            os.dup2(other.fileno(), number)
        try:
            with pytest.raises(ValueError, match='closed file'):
                next(wrapper)
        finally:
            if other.fileno() != number:
                os.close(number)


@pytest.mark.parametrize('options', [{}, {'direct': True}, {'direct': True, 'buffering': 0}])
def test_wrapper_sends_what_was_just_written(folder, options):
    with greenaio.open(os.path.join(folder, 'data'), 'w+b', **options) as file:
        file.write(pattern(300_000))
        file.seek(0)
        file.write(b'begin')
        assert b''.join(FileWrapper(file)) == pattern(300_000)[5:]


@pytest.mark.parametrize('how', ['handler', 'middleware'])
def test_server_has_a_file_wrapper(data_file, how):
    def app(environ, start):
        assert environ['wsgi.file_wrapper'] is FileWrapper
        start('200 OK', [('Content-Length', str(MIB))])
        return environ['wsgi.file_wrapper'](open(data_file, 'rb'))      # noqa: SIM115

    options = {'handler_class': WSGIHandler} if how == 'handler' else {}
    with serving(app if options else with_file_wrapper(app), **options) as port:
        assert ask(port)[::2] == (200, pattern(MIB))


GUNICORN = """
import greenaio, greenaio.wsgi
@greenaio.wsgi.with_file_wrapper
def app(environ, start):
    file = greenaio.open({path!r}, 'rb')
    file.read(10)
    start('200 OK', [('Content-Length', '{length}')])
    return environ['wsgi.file_wrapper'](file)
"""


def test_gunicorn_sends_what_is_buffered_too(data_file, tmp_path):
    (tmp_path / 'wrapped.py').write_text(GUNICORN.format(path=data_file, length=MIB - 10))
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    with subprocess.Popen([sys.executable, '-m', 'gunicorn', '-k', 'gevent', '-b', f'127.0.0.1:{port}',
                           '--log-level', 'error', '--graceful-timeout', '3', '--chdir', str(tmp_path),
                           'wrapped:app']) as process:
        try:
            with gevent.Timeout(20):
                while True:
                    with contextlib.suppress(ConnectionError):
                        status, _, body = ask(port)
                        break
                    gevent.sleep(0.1)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
    assert (status, len(body)) == (200, MIB - 10)
    assert body == pattern(MIB)[10:]


# Beside a disk that takes its time ---------------------------------------------------------------


@pytest.mark.parametrize('patched', ['patched', 'unpatched'])
@pytest.mark.parametrize('server', ['werkzeug', 'whitenoise', 'flask'])
def test_throttled_disk_stops_only_the_unpatched(held_disk, tmp_path, server, patched):
    slow, fast = held_disk.commands(iops=2)         # the file is 4 MiB: some five reads
    with subprocess.Popen([sys.executable, CONTROL, '4'], stdout=subprocess.PIPE, text=True) as control:
        done = run_program('slow_download', held_disk.file, slow, fast, server, patched,
                           env=make_plugin_visible(tmp_path))
        machine = float(control.stdout.read())
    worst, took = map(float, done.stdout.split())
    assert took > 1, 'the disk was not slow: this showed nothing'
    if patched == 'patched':
        assert worst < 0.05 + machine
    else:
        assert worst > 0.3 + machine
