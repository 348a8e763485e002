"""examples/nbd_server.py beside ``qemu-nbd --aio=native --cache=none``: the same image, the same clients."""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from functools import partial

from benchmarks.contest import Bar, Contest

SIZE = 1 << 30                  # bytes: more than the requests of a round touch
REQUESTS = {1: 4000, 16: 20000, 64: 20000}
SECONDS = 1                     # of fio
ROOT = pathlib.Path(__file__).parent.parent


class Server:
    def __init__(self, name, socket, *command):
        self.name, self.uri = name, f'nbd+unix:///?socket={socket}'
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not os.path.exists(socket):
            time.sleep(0.05)
            if self.process.poll() is not None:
                sys.exit(f'{name} did not start')

    def cpu(self):
        """Seconds so far, all threads together."""
        total = 0
        for task in pathlib.Path(f'/proc/{self.process.pid}/task').iterdir():
            total += int((task / 'schedstat').read_text().split()[0])
        return total / 1e9


def qemu_img(server, depth, writes):
    """IOPS of ``qemu-img bench`` with sequential requests of 4 KiB."""
    n = REQUESTS[depth]
    done = subprocess.run(['qemu-img', 'bench', '-f', 'raw', '-c', str(n), '-d', str(depth), '-s', '4096',
                           '-S', '4096', *(['-w'] if writes else []), server.uri],
                          check=True, capture_output=True, text=True)
    seconds, = re.findall(r'completed in ([0-9.]+)', done.stdout)
    return n, n / float(seconds)


def fio(server, depth, writes):
    """IOPS of fio with random requests of 4 KiB."""
    kind = 'write' if writes else 'read'
    done = subprocess.run(['fio', '--name=x', '--ioengine=nbd', f'--uri={server.uri}', f'--rw=rand{kind}',
                           '--bs=4k', f'--size={SIZE}', f'--iodepth={depth}', '--time_based',
                           f'--runtime={SECONDS}', '--output-format=json'],
                          check=True, capture_output=True, text=True)
    found = json.loads(done.stdout[done.stdout.index('{'):])['jobs'][0][kind]
    return found['total_ios'], found['iops']


def figures(server, client, depth, writes):
    before = server.cpu()
    n, iops = client(server, depth, writes)
    return {'iops': iops, 'cpu_us': (server.cpu() - before) / n * 1e6}


@contextlib.contextmanager
def nbd(options):
    """A network block device server."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, contextlib.ExitStack() as running:
        image = os.path.join(folder, 'disk.img')
        with open(image, 'wb') as file:
            for _ in range(SIZE >> 20):
                file.write(os.urandom(1 << 20))
            os.fsync(file.fileno())
        ours, theirs = (os.path.join(folder, name) for name in ('ours', 'theirs'))
        servers = []
        for name, socket, *command in (
            ('greenaio', ours, sys.executable, ROOT / 'examples' / 'nbd_server.py', '--unix', ours, image),
            # The lock of ours is for images that two servers would write to at the same time.
            ('qemu-nbd', theirs, 'qemu-nbd', '--aio=native', '--cache=none', '-t', '-k', theirs,
             '--image-opts', f'driver=raw,file.driver=file,file.locking=off,file.filename={image}'),
        ):
            servers.append(Server(name, socket, *command))
            running.callback(servers[-1].process.wait)
            running.callback(servers[-1].process.terminate)
        yield [Contest(
            f'{client.__name__.replace("_", "-")} {"write" if writes else "read"}, depth {depth}',
            {server.name: partial(figures, server, client, depth, writes) for server in servers}, depth,
            (Bar(0.95 if depth == 1 else 1.3, 'iops', 'greenaio', 'qemu-nbd'),
             Bar(1.0, 'cpu_us', 'greenaio', 'qemu-nbd', most=True)))
            for client in (qemu_img, fio) for writes in (False, True) for depth in REQUESTS]
