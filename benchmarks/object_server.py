"""64 clients download cold objects of 8 MiB from examples/object_server.py, as it is, and with the same
blocks read by gevent.fileobject.FileObjectThread. One more asks for a small object that is in memory. Server,
clients and the one more are processes of their own.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial

MIB = 1 << 20
SIZE = 8 * MIB
TOKEN = 'token'
CLIENTS, OBJECTS = 64, 256
EXAMPLES = pathlib.Path(__file__).parent.parent / 'examples'


# The server --------------------------------------------------------------------------------------

def serve(way, root):
    sys.path.insert(0, str(EXAMPLES))
    import object_server

    import greenaio.wsgi
    if way == 'threads':
        greenaio.wsgi.FileWrapper = by_threads(greenaio.wsgi.BLOCK)  # type: ignore[misc]
    sys.argv = ['object_server.py', root, '--token', TOKEN, '--port', '0']
    return object_server.main()


def by_threads(block):
    from gevent.fileobject import FileObjectThread

    class FileWrapper:
        """In the place of greenaio's, with blocks as large; the file is opened by greenaio all the same."""

        def __init__(self, filelike, block_size=0):
            self._raw = filelike
            self._file = FileObjectThread(os.dup(filelike.fileno()), 'rb', 0)

        def __iter__(self):
            return iter(lambda: self._file.read(block), b'')

        def seekable(self):
            return True

        def seek(self, offset, whence=os.SEEK_SET):
            self._file.seek(offset, whence)

        def tell(self):
            return self._file.tell()

        def close(self):
            self._file.close()
            self._raw.close()

    return FileWrapper


# The clients -------------------------------------------------------------------------------------

def request(name):
    return f'GET /{name} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n'.encode()


def receive(sock, size, buffer):
    """The head, and *size* bytes that nobody looks at: with MSG_TRUNC the kernel does not even copy them."""
    head = b''
    while b'\r\n\r\n' not in head:
        data = sock.recv(4096)
        assert data, head
        head += data
    head, _, body = head.partition(b'\r\n\r\n')
    assert head.startswith(b'HTTP/1.1 200'), head
    left = size - len(body)
    while left:
        n = sock.recv_into(buffer, min(left, len(buffer)), socket.MSG_TRUNC)
        assert n, f'{left} bytes are missing'
        left -= n


def download(port, clients, objects):
    """Seconds for *clients* to download all *objects*, each its share."""
    import gevent
    import gevent.socket

    def client(names):
        buffer = bytearray(MIB)
        with gevent.socket.create_connection(('127.0.0.1', port)) as sock:
            for name in names:
                sock.sendall(request(name))
                receive(sock, SIZE, buffer)

    names = list(range(objects))
    random.shuffle(names)
    began = time.perf_counter()
    gevent.joinall([gevent.spawn(client, names[i::clients]) for i in range(clients)], raise_error=True)
    print(json.dumps(time.perf_counter() - began))


def ask(port):
    """Latencies of small requests, one every few milliseconds, until stdin ends."""
    import threading
    over, buffer, found = threading.Event(), bytearray(4096), []

    def wait_for_end():
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait_for_end).start()
    with socket.create_connection(('127.0.0.1', port)) as sock:
        while not over.wait(0.002):
            began = time.perf_counter()
            sock.sendall(request('small'))
            receive(sock, 1024, buffer)
            found.append(time.perf_counter() - began)
    print(json.dumps(found))


# The rounds --------------------------------------------------------------------------------------

def start(*args):
    return subprocess.Popen([sys.executable, __file__, *map(str, args)], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True)


def make_objects(root, count):
    """As the server would, without asking it."""
    for name, size in (*((str(i), SIZE) for i in range(count)), ('small', 1024)):
        path = os.path.join(root, name)
        with open(path, 'wb') as file:
            file.write(os.urandom(size))
            file.flush()
            os.setxattr(path, 'user.sha256', bytes(32))
            os.fsync(file.fileno())


def forget(root, count):
    for i in range(count):
        fd = os.open(os.path.join(root, str(i)), os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def percentile(values, p):
    return sorted(values)[int(len(values) * p / 100)]


def cpu_seconds(pid):
    with open(f'/proc/{pid}/stat') as file:
        fields = file.read().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def one_round(way, root):
    server = start('--serve', way, root)
    try:
        port = int(server.stdout.readline().rpartition(':')[2])
        beside = start('--ask', port)
        time.sleep(0.3)                 # until both are there
        forget(root, OBJECTS)
        before = cpu_seconds(server.pid)
        took = json.loads(start('--download', port, CLIENTS, OBJECTS).communicate()[0])
        cpu = cpu_seconds(server.pid) - before
        latencies = [value * 1e3 for value in json.loads(beside.communicate()[0])]
    finally:
        server.terminate()
        server.communicate()
    return {'mib_s': OBJECTS * SIZE / MIB / took, 'p99_ms': percentile(latencies, 99), 'cpu': cpu / took}


def disk_alone(root):
    """One reader of the same files through the page cache, the best that may be expected of it."""
    forget(root, OBJECTS)
    buffer = bytearray(MIB)
    began = time.perf_counter()
    for i in range(OBJECTS):
        with open(os.path.join(root, str(i)), 'rb', 0) as file:
            while file.readinto(buffer):
                pass
    return {'mib_s': OBJECTS * SIZE / MIB / (time.perf_counter() - began)}


@contextlib.contextmanager
def object_server(options):
    """64 clients download cold objects of 8 MiB; p99 is that of another, who asks for a small one."""
    from benchmarks.contest import Bar, Contest
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        make_objects(root, OBJECTS)
        yield [Contest('downloads', {'greenaio': partial(one_round, 'greenaio', root),
                                     'FileObjectThread': partial(one_round, 'threads', root),
                                     'one reader, no server': partial(disk_alone, root)},
                       bars=(Bar(1.3, 'mib_s', 'greenaio', 'FileObjectThread'),
                             Bar(1 / 3, 'p99_ms', 'greenaio', 'FileObjectThread', most=True)))]


def main():
    """What the benchmark starts: a server, the clients."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--serve', nargs=2)
    parser.add_argument('--download', nargs=3, type=int)
    parser.add_argument('--ask', type=int)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(*arguments.serve)
    if arguments.download:
        return download(*arguments.download)
    return ask(arguments.ask)


if __name__ == '__main__':
    sys.exit(main())
