"""A small Flask app under gunicorn's gevent worker, with gevent alone and with greenaio's patch."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from functools import partial
from importlib.util import find_spec
from typing import Any

from benchmarks.contest import Bar, Contest
from greenaio._commands import bench

ROOT = pathlib.Path(__file__).parent.parent
# At least so many times the requests per second with gevent alone.
WANTED = {'send_file of 8 KiB': 0.95, 'open and read 8 KiB': 0.95, 'send_file of 1 MiB': 0.95,
          'a log record': 0.95, 'upload of 20 KB': 0.9}
ROUTES = {'no file': 'none', 'send_file of 8 KiB': 'small', 'open and read 8 KiB': 'read',
          'send_file of 1 MiB': 'big', 'a log record': 'log', 'upload of 20 KB': 'upload'}
CONNECTIONS = 16
POST = 'wrk.method = "POST"; wrk.body = string.rep("x", 20000)'
APP = '''
import logging
import os
import tempfile
from flask import Flask, request, send_file

home = os.environ['PRICE_HOME']
log = logging.getLogger('app')
log.setLevel(logging.INFO)
log.propagate = False
log.addHandler(logging.FileHandler(home + '/log'))
app = Flask(__name__)

@app.get('/none')
def none():
    return 'ok'

@app.get('/small')
def small():
    return send_file(home + '/small')

@app.get('/big')
def big():
    return send_file(home + '/big')

@app.get('/read')
def read():
    with open(home + '/small', 'rb') as file:
        return file.read()

@app.get('/log')
def record():
    log.info('served %s', request.path)
    return 'ok'

@app.post('/upload')
def upload():
    with tempfile.NamedTemporaryFile(dir=home) as file:
        file.write(request.get_data())
        file.flush()
    return 'ok'
'''


@contextlib.contextmanager
def serving(home: str, patch: str) -> Any:
    """A gunicorn with one gevent worker. Yields its address."""
    environment = {**os.environ, 'PRICE_HOME': home, 'GREENAIO_PATCH': patch,
                   'PYTHONPATH': os.pathsep.join([home, str(ROOT)])}
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen(100)
        address = f'http://127.0.0.1:{listener.getsockname()[1]}'
        process = subprocess.Popen(
            [sys.executable, '-m', 'gunicorn', '-k', 'gevent', '-w', '1', '-b', f'fd://{listener.fileno()}',
             '--log-level', 'error', 'app:app'],
            env=environment, cwd=home, pass_fds=[listener.fileno()])
    try:
        try:
            # gunicorn finds the connection in the queue of the listener.
            urllib.request.urlopen(f'{address}/none', timeout=20).close()
        except OSError as error:
            raise bench.Failure(f'gunicorn does not answer: {error}') from error
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def requests(address: str, route: str, seconds: float, script: str) -> dict[str, float]:
    """Ask for *route* for *seconds*; return requests per second, and the latency that 1 % exceed."""
    post = ['-s', script] if route == 'upload' else []
    printed = subprocess.check_output(
        ['wrk', '-t1', f'-c{CONNECTIONS}', f'-d{max(1, round(seconds))}', '--latency', *post,
         f'{address}/{route}'], text=True)
    if 'Non-2xx' in printed:
        raise bench.Failure(f'{route} was refused: {printed}')
    per_second, = re.findall(r'Requests/sec:\s+([\d.]+)', printed)
    (value, unit), = re.findall(r'99%\s+([\d.]+)(us|ms|s)', printed)
    return {'per_second': float(per_second), 'p99_ms': float(value) * {'us': 1e-3, 'ms': 1, 's': 1e3}[unit]}


@contextlib.contextmanager
def server(options: Any) -> Any:
    """A Flask app under gunicorn, 16 connections, all files in the page cache."""
    lacks = [name for name, is_there in (('wrk', shutil.which('wrk')), ('flask', find_spec('flask')),
                                         ('gunicorn', find_spec('gunicorn'))) if not is_there]
    if lacks:
        print(f'{", ".join(lacks)}: not installed, left out', file=sys.stderr)
        yield []
        return
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder))
        folder = pathlib.Path(home)
        (folder / 'small').write_bytes(os.urandom(8192))
        (folder / 'big').write_bytes(os.urandom(1 << 20))
        (folder / 'app.py').write_text(APP)
        (folder / 'post.lua').write_text(POST)
        servers = {way: stack.enter_context(serving(home, patch))
                   for way, patch in (('patched', '1'), ('gevent', '0'))}
        yield [Contest(work, {way: partial(requests, address, route, options.seconds, f'{home}/post.lua')
                              for way, address in servers.items()},
                       bars=(Bar(WANTED[work], 'per_second', 'patched', 'gevent'),) if work in WANTED else ())
               for work, route in ROUTES.items()]
