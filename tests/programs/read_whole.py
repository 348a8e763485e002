"""Read a whole file each way, and see that its bytes are in memory once."""

import sys

import gevent

import greenaio

gevent.get_hub()
path, size, options = sys.argv[1], 64 << 20, eval(sys.argv[2])


def peak():
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith('VmHWM'))


def reset():
    with open('/proc/self/clear_refs', 'w') as file:
        file.write('5')


def whole(data):
    return all(data[i << 20] == data[(i + 1 << 20) - 1] == i for i in range(64)) and len(data) == size


greenaio.open(path, 'rb', **options).close()
with greenaio.open(path, 'rb', **options) as file, greenaio.open(path, 'rb', 0, **options) as raw, \
        greenaio.File(path) as plain:
    ways = [file.read, lambda: file.read(size), raw.read, lambda: plain.pread(size + 4096, 0)]
    if 'direct' not in options:
        ways += [lambda: raw.read(size), lambda: raw.read(size + 4096)]
    for way in ways:
        file.seek(0)
        raw.seek(0)
        reset()
        before = peak()
        data = way()
        grown = peak() - before
        assert whole(data)
        del data
        assert grown < size * 1.3, (ways.index(way), grown >> 20)
