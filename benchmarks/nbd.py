"""examples/nbd_server.py beside ``qemu-nbd --aio=native --cache=none``: the same image, the same clients.

python benchmarks/nbd.py [FOLDER] [--rounds N] [--write]: medians of rounds in which the servers take turns.
With --write the table goes into docs/performance.md. Needs qemu-utils, fio.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

from rich.progress import track

SIZE = 1 << 30                  # bytes: more than the requests of a round touch
REQUESTS = {1: 4000, 16: 20000, 64: 20000}
SECONDS = 1                     # of fio
ROOT = pathlib.Path(__file__).parent.parent
MARKS = re.compile(r'(<!-- nbd -->\n).*?(<!-- /nbd -->)', re.DOTALL)


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
    return n, n / float(re.search(r'completed in ([0-9.]+)', done.stdout)[1])


def fio(server, depth, writes):
    """IOPS of fio with random requests of 4 KiB."""
    kind = 'write' if writes else 'read'
    done = subprocess.run(['fio', '--name=x', '--ioengine=nbd', f'--uri={server.uri}', f'--rw=rand{kind}',
                           '--bs=4k', f'--size={SIZE}', f'--iodepth={depth}', '--time_based',
                           f'--runtime={SECONDS}', '--output-format=json'],
                          check=True, capture_output=True, text=True)
    found = json.loads(done.stdout[done.stdout.index('{'):])['jobs'][0][kind]
    return found['total_ios'], found['iops']


JOBS = [(client, depth, writes) for client in (qemu_img, fio) for writes in (False, True)
        for depth in REQUESTS]


def measure(servers, rounds):
    """{(job, name): [(IOPS, CPU in µs per request), …]}"""
    found = {}
    for i in track(range(rounds * len(JOBS)), 'measuring', transient=True):
        client, depth, writes = job = JOBS[i // rounds]
        for server in servers if i % 2 else servers[::-1]:
            before = server.cpu()
            n, iops = client(server, depth, writes)
            found.setdefault((job, server.name), []).append((iops, (server.cpu() - before) / n * 1e6))
    return found


def table(found):
    lines = ['| client | depth | greenaio | qemu-nbd | IOPS, ratio (lowest, highest) | CPU µs per request |',
             '|---|---:|---:|---:|---|---|']
    for job in JOBS:
        client, depth, writes = job
        ours, theirs = found[job, 'greenaio'], found[job, 'qemu-nbd']
        medians = [statistics.median(column) for column in (*zip(*ours), *zip(*theirs))]
        iops, cpu, their_iops, their_cpu = medians
        ratios = sorted(a[0] / b[0] for a, b in zip(ours, theirs, strict=True))
        what = f'{client.__name__.replace("_", "-")} {"write" if writes else "read"}'
        lines.append(f'| {what} | {depth} | {iops:,.0f} | {their_iops:,.0f} '
                     f'| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) '
                     f'| {cpu:.0f} beside {their_cpu:.0f} |')
    return '\n'.join(lines) + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', nargs='?', default=tempfile.gettempdir())
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--write', action='store_true', help='the table into docs/performance.md')
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        image = os.path.join(folder, 'disk.img')
        with open(image, 'wb') as file:
            for _ in range(SIZE >> 20):
                file.write(os.urandom(1 << 20))
            os.fsync(file.fileno())
        ours, theirs = (os.path.join(folder, name) for name in ('ours', 'theirs'))
        servers = [
            Server('greenaio', ours, sys.executable, ROOT / 'examples' / 'nbd_server.py', '--unix', ours,
                   image),
            Server('qemu-nbd', theirs, 'qemu-nbd', '--aio=native', '--cache=none', '-f', 'raw', '-t', '-k',
                   theirs, image)]
        try:
            text = table(measure(servers, arguments.rounds))
        finally:
            for server in servers:
                server.process.terminate()
                server.process.wait()
    print(text)
    if arguments.write:
        page = ROOT / 'docs' / 'performance.md'
        page.write_text(MARKS.sub(lambda match: match[1] + text + match[2], page.read_text()))


if __name__ == '__main__':
    main()
