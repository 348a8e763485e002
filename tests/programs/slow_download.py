"""Download a file from a slow disk by a WSGI server.

Print how long the hub stood still, and how long the download took.
"""

import sys

import gevent.monkey

gevent.monkey.patch_all(greenaio=sys.argv[5] == 'patched')
import os
import subprocess
import time

import gevent
from gevent import pywsgi, socket

path, slow, fast, application = sys.argv[1:5]
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
    from whitenoise import WhiteNoise  # type: ignore[import-untyped]
    return WhiteNoise(None, root=folder)


APPLICATIONS = {'flask': flask, 'werkzeug': werkzeug, 'whitenoise': whitenoise}
server = pywsgi.WSGIServer(('127.0.0.1', 0), APPLICATIONS[application](), log=None)
server.start()


def download():
    with socket.create_connection(('127.0.0.1', server.server_port)) as connection:
        connection.sendall(f'GET /{name} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n'.encode())
        size = 0
        while data := connection.recv(1 << 20):
            size += len(data)
    assert size > 4 << 20, size


worst = [0.0]


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
