"""examples/nbd_server.py, started as a user would, driven by the clients that its users have."""

import contextlib
import filecmp
import gc
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time

import gevent
import gevent.socket
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import missing
from tests.support.disks import MIB, pattern, real_disk
from tests.support.processes import run

SERVER = pathlib.Path(__file__).parent.parent / 'examples' / 'nbd_server.py'
SIZE = 32 * MIB


def need(*tools):
    for tool in tools:
        if shutil.which(tool) is None:
            missing(f'needs {tool}')


class Server:
    def __init__(self, *args, where=None, program=(SERVER,)):
        command = [sys.executable, *program, *(where or ('--tcp', '127.0.0.1:0')), *args]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.uri = self.process.stdout.readline().strip()
        assert self.uri, self.process.stderr.read()
        self.port = int(self.uri.rstrip('/').rpartition(':')[2]) if where is None else None

    def connect(self):
        return socket.create_connection(('127.0.0.1', self.port), timeout=10)

    def rss(self):
        """MiB."""
        with open(f'/proc/{self.process.pid}/statm') as file:
            return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / MIB

    def peak(self):
        """MiB: the most that it ever had."""
        with open(f'/proc/{self.process.pid}/status') as file:
            return next(int(line.split()[1]) for line in file if line.startswith('VmHWM')) >> 10

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            _, errors = self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        assert 'Traceback' not in errors, errors
        assert self.process.returncode == 0, errors
        return errors


@pytest.fixture
def image(folder):
    path = os.path.join(folder, 'disk.img')
    with open(path, 'wb') as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def server(image):
    server = Server(image)
    yield server
    server.stop()


@pytest.fixture
def unix_server(image, tmp_path):
    server = Server(image, where=('--unix', str(tmp_path / 'sock')))
    yield server
    server.stop()


# The clients that there are ----------------------------------------------------------------------

def test_nbdinfo(image, tmp_path):
    need('nbdinfo')
    with open(tmp_path / 'other', 'wb') as file:
        file.truncate(MIB + 1)
    server = Server(image, f'second={tmp_path / "other"}')
    try:
        exports = json.loads(run('nbdinfo', '--json', '--list', server.uri))['exports']
        assert [(one['export-name'], one['export-size']) for one in exports] == [
            ('disk.img', SIZE), ('second', MIB + 1)]
        facts = json.loads(run('nbdinfo', '--json', server.uri))['exports'][0]
        for name in ('can_multi_conn', 'can_fua', 'can_flush', 'can_trim', 'can_zero', 'can_df', 'can_cache'):
            assert facts[name], name
        assert not facts['is_read_only']
        assert facts['contexts'] == ['base:allocation']
        with open(image, 'r+b') as file:
            file.seek(MIB)
            file.write(b'x' * MIB)
            os.fsync(file.fileno())
        extents = json.loads(run('nbdinfo', '--json', '--map', server.uri))
        assert [(one['offset'], one['length'], one['type']) for one in extents] == [
            (0, MIB, 3), (MIB, MIB, 0), (2 * MIB, SIZE - 2 * MIB, 3)]
        assert subprocess.run(['nbdinfo', server.uri + 'no-such'], capture_output=True).returncode != 0
    finally:
        server.stop()


def refused(*arguments):
    done = subprocess.run([sys.executable, SERVER, *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode in (1, 2) and 'Traceback' not in done.stderr
    return done.stderr.splitlines()[-1]


def test_socket_of_a_server_that_runs_is_not_taken_away(unix_server, tmp_path):
    (tmp_path / 'other').write_bytes(bytes(4096))       # not the image, which has a lock
    assert 'Address already in use' in refused('--unix', tmp_path / 'sock', tmp_path / 'other')
    assert (tmp_path / 'sock').exists()


def test_socket_of_a_server_that_was_is_used_again(image, tmp_path):
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / 'sock'))
    Server(image, where=('--unix', str(tmp_path / 'sock'))).stop()
    assert not (tmp_path / 'sock').exists()         # of this one, which has stopped


@pytest.mark.parametrize('where', ['here', ':10809', '127.0.0.1:', '127.0.0.1:x', '127.0.0.1:65536'])
def test_address_that_is_none(image, where):
    assert f"'{where}' is no HOST:PORT" in refused('--tcp', where, image)


def test_certificate_that_is_not_there_is_named(image):
    assert '/no/such/cert' in refused('--tls', '/no/such/cert', '/no/such/key', image)


def in_use(image):
    return f"nbd_server.py: [Errno 11] The image is in use by another server or by QEMU: '{image}'"


@pytest.mark.parametrize('first, second', [((), ()), ((), ('--read-only',)), (('--read-only',), ())],
                         ids=['both write', 'the first writes', 'the second writes'])
def test_image_that_is_written_has_one_server(image, first, second, tmp_path):
    server = Server(*first, image)
    try:
        link = tmp_path / 'link'
        link.symlink_to(image)
        for path in (image, str(link)):
            done = subprocess.run([sys.executable, SERVER, '--tcp', '127.0.0.1:0', *second, path],
                                  capture_output=True, text=True, timeout=30)
            assert done.returncode == 1
            assert done.stderr.splitlines() == [in_use(path)]
        assert_alive(server)
    finally:
        server.stop()
    Server(*second, image).stop()


def test_image_that_is_only_read_has_many_servers(image):
    servers = [Server('--read-only', image) for _ in range(2)]
    for server in servers:
        assert_alive(server)
    for server in servers:
        server.stop()


def test_image_is_not_served_under_two_names(image):
    assert refused('--tcp', '127.0.0.1:0', f'a={image}', f'b={image}') == in_use(image)


def test_image_of_a_server_that_was_killed_is_free(image):
    server = Server(image)
    server.process.kill()
    server.process.communicate()
    Server(image).stop()


def test_qemu_and_the_server_keep_each_other_from_an_image(image):
    need('qemu-io')
    server = Server(image)
    try:
        done = subprocess.run(['qemu-io', '-f', 'raw', '-c', 'write 0 512', image], capture_output=True,
                              text=True)
        assert done.returncode == 1
        assert 'lock' in done.stderr
    finally:
        server.stop()
    qemu = subprocess.Popen(['qemu-io', '-f', 'raw', image], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert qemu.stdout.read(8) == b'qemu-io>'
        assert refused('--tcp', '127.0.0.1:0', image) == in_use(image)
    finally:
        qemu.communicate()
    Server(image).stop()


def test_nbdcopy_both_ways(unix_server, image, tmp_path):
    need('nbdcopy')
    source, back = tmp_path / 'source', tmp_path / 'back'
    source.write_bytes((pattern(3 * MIB) + bytes(5 * MIB)) * 4)
    run('nbdcopy', '--flush', source, unix_server.uri)
    assert filecmp.cmp(source, image, shallow=False)
    run('nbdcopy', unix_server.uri, back)
    assert filecmp.cmp(source, back, shallow=False)


def test_qemu_img_convert_and_compare(unix_server, tmp_path):
    need('qemu-img')
    source = tmp_path / 'source'
    source.write_bytes(pattern(5 * MIB) + bytes(SIZE - 5 * MIB))
    run('qemu-img', 'convert', '-n', '-f', 'raw', '-O', 'raw', source, unix_server.uri)
    assert 'identical' in run('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', source, unix_server.uri)
    run('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', unix_server.uri, tmp_path / 'back.qcow2')
    assert 'identical' in run('qemu-img', 'compare', source, '-f', 'raw', tmp_path / 'back.qcow2')


def test_qemu_io_asynchronous(server):
    need('qemu-io')
    generator, commands = random.Random(5), []
    for i in range(200):
        offset = i * 100_000 + generator.randrange(1000)
        commands.append(f'aio_write -P {i + 1} {offset} {generator.choice([512, 4096, 70_001])}')
    commands.append('aio_flush')
    commands += [command.replace('aio_write', 'aio_read') for command in commands[:-1]]
    commands += ['aio_flush', 'write -z 0 1000000', 'discard 2000000 500000', 'write -f -P 7 3000000 512',
                 'flush', 'read -P 0 0 1000000', 'read -P 7 3000000 512']
    done = subprocess.run(['qemu-io', '-f', 'raw', server.uri], input='\n'.join(commands),
                          capture_output=True, text=True, timeout=60, check=True)
    assert 'failed' not in done.stdout + done.stderr, done.stdout + done.stderr
    assert done.stdout.count('wrote') == 202
    assert done.stdout.count('read ') == 202


def test_fio_verifies(unix_server):
    need('fio')
    if 'nbd' not in run('fio', '--enghelp').split():
        missing('needs fio with the nbd engine')
    run('fio', '--name=x', '--ioengine=nbd', f'--uri={unix_server.uri}', '--rw=randrw', '--iodepth=32',
        '--bs=4k', f'--size={SIZE}', '--verify=crc32c', '--verify_state_save=0', '--verify_fatal=1')


def test_file_system_lives_on_it(unix_server, tmp_path):
    if os.geteuid() != 0:
        missing('needs root')
    need('nbdfuse', 'losetup', 'mkfs.ext4')
    mount, tree = tmp_path / 'mnt', tmp_path / 'tree'
    disk = mount / 'disk'
    mount.mkdir()
    tree.mkdir()
    fuse = subprocess.Popen(['nbdfuse', disk, unix_server.uri])
    try:
        end = time.monotonic() + 10
        while not disk.exists() and time.monotonic() < end:
            time.sleep(0.01)
        loop = run('losetup', '-f', '--show', disk).strip()
        try:
            run('mkfs.ext4', '-q', loop)
            run('mount', loop, tree)
            source = os.path.join(sysconfig.get_path('stdlib'), 'encodings')
            try:
                shutil.copytree(source, tree / 'copy')
                run('umount', tree)
                run('mount', loop, tree)
                compared = filecmp.dircmp(source, tree / 'copy', ignore=[])
                names = list(compared.common_files)
                assert len(names) > 50
                assert filecmp.cmpfiles(source, tree / 'copy', names, shallow=False)[1:] == ([], [])
            finally:
                run('umount', tree)
            run('fsck.ext4', '-fn', loop)
        finally:
            run('losetup', '-d', loop)
    finally:
        for _ in range(50):
            if subprocess.run(['umount', mount], capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.1)
        fuse.wait(10)


def test_tls(image, tmp_path):
    need('openssl', 'nbdinfo')
    key, certificate = tmp_path / 'key.pem', tmp_path / 'ca-cert.pem'
    run('openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-keyout', key, '-out', certificate,
        '-days', '2', '-subj', '/CN=localhost', '-addext', 'subjectAltName=DNS:localhost,IP:127.0.0.1')
    server = Server('--tls', str(certificate), str(key), image)
    try:
        uri = f'nbds://localhost:{server.port}/?tls-certificates={tmp_path}'
        assert run('nbdinfo', '--size', uri).strip() == str(SIZE)
        source = tmp_path / 'source'
        source.write_bytes(pattern(SIZE))
        run('nbdcopy', '--flush', source, uri)
        assert filecmp.cmp(source, image, shallow=False)
        refused = subprocess.run(['nbdinfo', f'nbd://localhost:{server.port}/'], capture_output=True)
        assert refused.returncode != 0
    finally:
        server.stop()


def test_read_only(image):
    need('qemu-io')
    server = Server('--read-only', image)
    try:
        done = subprocess.run(['qemu-io', '-f', 'raw', '-c', 'write 0 512', server.uri], capture_output=True,
                              text=True)
        assert 'ermi' in done.stdout + done.stderr or 'read-only' in done.stdout + done.stderr
        assert run('nbdinfo', '--is', 'read-only', server.uri) == ''
    finally:
        server.stop()


# What breaks the protocol ------------------------------------------------------------------------

def negotiated(server, name=b''):
    """A connection whose client has just sent NBD_OPT_EXPORT_NAME."""
    sock = server.connect()
    hello = receive(sock, 18)
    assert hello[:16] == b'NBDMAGICIHAVEOPT'
    sock.sendall(struct.pack('>I', 3) + b'IHAVEOPT' + struct.pack('>II', 1, len(name)) + name)
    size, flags = struct.unpack('>QH', receive(sock, 10))
    assert size == SIZE
    assert flags & 1
    return sock


def option(sock, number, data=b''):
    """The type of the last reply to it: 1 is an ACK, those of errors have the highest bit."""
    sock.sendall(b'IHAVEOPT' + struct.pack('>II', number, len(data)) + data)
    kind = 0
    while kind != 1 and not kind >> 31:
        _, _, kind, length = struct.unpack('>QIII', receive(sock, 20))
        receive(sock, length)
    return kind


def receive(sock, n):
    data = b''
    while len(data) < n:
        more = sock.recv(n - len(data))
        assert more, 'closed'
        data += more
    return data


def request(command, offset, length, cookie=1, flags=0, magic=0x25609513):
    return struct.pack('>IHHQQI', magic, flags, command, cookie, offset, length)


def reply(sock):
    magic, error, cookie = struct.unpack('>IIQ', receive(sock, 16))
    assert magic == 0x67446698
    return error, cookie


ALLOCATION = struct.pack('>III15s', 0, 1, 15, b'base:allocation')


@pytest.mark.parametrize('failing, error', [
    (struct.pack('>I4sI', 4, b'none', 0), 6), (b'nonsense', 3), (bytes(17 << 10), 9)],
    ids=['unknown export', 'nonsense', 'too big'])
def test_contexts_that_could_not_be_set_replace_those_before(server, failing, error):
    with server.connect() as sock:
        receive(sock, 18)
        sock.sendall(struct.pack('>I', 3))
        assert option(sock, 8) == option(sock, 10, ALLOCATION) == 1
        assert option(sock, 10, failing) == (1 << 31) + error
        assert option(sock, 7, bytes(6)) == 1
        sock.sendall(request(7, 0, 4096))
        assert struct.unpack('>IHHQI', receive(sock, 20))[2] == (1 << 15) + 1   # an error, no block status


def test_structured_replies_are_asked_for_without_data(server):
    with server.connect() as sock:
        receive(sock, 18)
        sock.sendall(struct.pack('>I', 3))
        assert option(sock, 8, b'data') == option(sock, 10, ALLOCATION) == (1 << 31) + 3
        assert option(sock, 8) == option(sock, 10, ALLOCATION) == 1


def test_errors_are_told_and_the_connection_goes_on(server):
    with negotiated(server) as sock:
        for asked, error in [
                (request(0, SIZE - 1, 2), 22), (request(0, 0, 64 * MIB), 22), (request(9, 0, 0), 22),
                (request(0, 0, 4, flags=1 << 9), 22), (request(1, SIZE, 4) + b'data', 28),
                (request(6, SIZE - 1, 2), 28), (request(4, SIZE, 1), 22), (request(7, 0, 10), 22),
                (request(0, (1 << 64) - 1, 10), 22), (request(3, 0, 0), 0), (request(5, 0, 4096), 0)]:
            sock.sendall(asked)
            assert reply(sock) == (error, 1), asked
        sock.sendall(request(1, 5, 4, cookie=7) + b'data')
        assert reply(sock) == (0, 7)
        sock.sendall(request(0, 4, 6, cookie=8))
        assert reply(sock) == (0, 8)
        assert receive(sock, 6) == b'\0data\0'


def test_many_requests_at_once_are_all_answered(server):
    with negotiated(server) as sock:
        sock.sendall(b''.join(request(1, i * 4096, 4096, cookie=i) + bytes([i % 251]) * 4096
                              for i in range(1000)))
        assert sorted(reply(sock) for _ in range(1000)) == [(0, i) for i in range(1000)]
        sock.sendall(b''.join(request(0, i * 4096, 4096, cookie=i) for i in range(1000)) + request(2, 0, 0))
        for _ in range(1000):
            error, cookie = reply(sock)
            assert error == 0
            assert receive(sock, 4096) == bytes([cookie % 251]) * 4096
        assert sock.recv(1) == b''      # all were answered before the disconnect


def test_who_does_not_take_its_replies_is_held_back(server):
    before = server.rss()
    with negotiated(server) as sock:
        sock.settimeout(1)
        with pytest.raises(TimeoutError):
            while True:
                sock.sendall(request(0, 0, MIB) * 1000)
        assert server.rss() - before < 300
        with negotiated(server) as other:
            other.sendall(request(0, 0, 512))
            assert reply(other) == (0, 1)


def test_clients_that_vanish_leave_nothing(server):
    def fds():
        return len(os.listdir(f'/proc/{server.process.pid}/fd'))

    def vanish():
        with negotiated(server) as sock:
            sock.sendall(b''.join(request(0, i * 65536, 65536, cookie=i) for i in range(200)))
            receive(sock, 1000)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))   # a reset

    for _ in range(10):
        vanish()
    assert_alive(server)
    before = fds()
    for _ in range(8):                  # how many it serves side by side depends on the machine
        rss = server.rss()
        for _ in range(60):
            vanish()
        assert_alive(server)
        if server.rss() - rss < 2:      # MiB; a leak of one buffer in each would be 4
            break
    else:
        raise AssertionError(f'it grows: {rss} MiB, {server.rss()} now')
    end = time.monotonic() + 10
    while fds() > before and time.monotonic() < end:
        time.sleep(0.05)
    assert fds() <= before


def test_who_has_sent_all_still_gets_its_replies(server):
    with negotiated(server) as sock:
        sock.sendall(b''.join(request(0, i * 65536, 65536, cookie=i) for i in range(100)))
        sock.shutdown(socket.SHUT_WR)
        data = b''.join(iter(lambda: sock.recv(1 << 20), b''))
    assert len(data) == 100 * (16 + 65536)


# What clients can take from each other -----------------------------------------------------------

def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def stalled(server, asked):
    """A client that asks and takes nothing."""
    sock = negotiated(server)
    sock.sendall(asked)
    return sock


def without_gc(*args):
    """A server whose memory is only that which is referred to."""
    code = '''
import gc, runpy, sys
gc.disable()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
'''
    return Server(*args, program=('-c', code, SERVER))


@pytest.fixture(scope='module')
def disk_image():
    with tempfile.TemporaryDirectory(dir=real_disk(), prefix='greenaio-test-') as folder:
        path = os.path.join(folder, 'disk.img')
        with open(path, 'wb') as file:
            file.truncate(SIZE)
        yield path


@pytest.fixture(scope='module')
def impatient(disk_image):
    server = Server('--memory', '128', '--timeout', '0.5', disk_image)
    yield server
    assert 'it takes too long' in server.stop()


@pytest.mark.parametrize('clients, asked', [
    (16, request(0, 0, 32 * MIB) * 2), (40, request(0, 0, 64 << 10) * 128), (20, request(0, 1, MIB) * 32)],
    ids=['large', 'medium', 'misaligned'])
def test_clients_that_take_nothing_share_the_memory_and_leave_none(disk_image, clients, asked):
    server = without_gc('--memory', '128', disk_image)
    try:
        assert_alive(server)
        before = server.rss()
        socks = [stalled(server, asked) for _ in range(clients)]
        time.sleep(0.5)
        for sock in socks:
            sock.close()
        until(lambda: server.rss() < before + 40)       # MiB; forty buffers of the input are 10
        assert server.peak() - before < 220             # of 128, and what malloc cannot use again
    finally:
        server.stop()


def test_request_waits_for_memory_until_those_who_hold_it_have_stalled_for_too_long(impatient):
    socks = [stalled(impatient, request(0, 0, 32 * MIB) * 2) for _ in range(4)]
    with negotiated(impatient) as other:
        other.sendall(request(0, 0, 32 * MIB))
        assert reply(other) == (0, 1)
        assert receive(other, 32 * MIB) == bytes(32 * MIB)
    for sock in socks:
        sock.close()


def test_client_that_has_hung_up_does_not_take_memory_that_it_waited_for(example, image):
    memory = example.Memory(128 * MIB)
    device = example.BlockDevice(image)
    memory.take(128 * MIB)
    ours, theirs = gevent.socket.socketpair()
    serve = example.Server({'': example.Export('', device)}, example.Limits(memory, 5))
    server = gevent.spawn(serve, theirs, None)
    ours.sendall(struct.pack('>I', 3) + b'IHAVEOPT' + struct.pack('>II', 1, 0) + request(0, 0, MIB))
    receive(ours, 28)
    gevent.sleep(0.05)
    asked = []
    device.preadv = lambda *args: asked.append(args)
    ours.close()
    memory.give_back(128 * MIB)
    server.join(10)
    assert server.ready()
    assert asked == []
    assert memory.free == 128 * MIB
    device.close()


def test_client_that_takes_a_little_now_and_then_is_dropped(impatient):
    with stalled(impatient, request(0, 0, 32 * MIB)) as sock:
        for _ in range(20):
            assert len(receive(sock, 1000)) == 1000     # of what the kernel holds
            time.sleep(0.05)
        taken = 0
        with contextlib.suppress(ConnectionResetError):
            taken = sum(map(len, iter(lambda: sock.recv(MIB), b'')))
        assert taken < 30 * MIB


def test_client_has_any_time_between_two_requests(impatient):
    with negotiated(impatient) as sock:
        for _ in range(2):
            time.sleep(0.8)
            sock.sendall(request(0, 0, 512))
            assert reply(sock) == (0, 1)
            receive(sock, 512)


HALVES = {
    'half a header': [request(0, 0, 512)[:27]], 'no data': [request(1, 0, 4096)],
    'half the data': [request(1, 0, 4096), bytes(2000)], 'half of much': [request(1, 0, MIB), bytes(400_000)],
    'a header by bytes': [b'\x25', b'\x60', *[b'\x95'] * 200],
    'data by bytes': [request(1, 0, 4096), *[b'x'] * 200], 'behind another': [request(0, 0, 512) + bytes(5)]}


@pytest.mark.parametrize('pieces', HALVES.values(), ids=HALVES)
def test_half_a_request_is_not_waited_for_for_ever(impatient, pieces):
    with negotiated(impatient) as sock:
        sock.settimeout(0.05)
        said, began = None, time.monotonic()
        for piece in [*pieces, *[b''] * 200]:
            try:
                sock.sendall(piece)
                said = sock.recv(10_000)
            except TimeoutError:
                continue
            except ConnectionError:
                said = b''
            if said == b'':
                break
        assert said == b''
        assert time.monotonic() - began > 0.4
    assert_alive(impatient)


def test_large_and_misaligned_requests_have_the_right_bytes(server, image):
    content = pattern(4 * MIB)
    with negotiated(server) as sock:
        for offset, length in ((0, 2 * MIB), (7, MIB + 3), (4096, MIB), (511, 70_000),
                               (SIZE - MIB - 1, MIB + 1)):
            sock.sendall(request(1, offset, length) + content[:length])
            assert reply(sock) == (0, 1)
            sock.sendall(request(0, offset, length))
            assert reply(sock) == (0, 1)
            assert receive(sock, length) == content[:length]


@pytest.mark.parametrize('how', ['disconnect', 'gone', 'reset', 'nonsense', 'stalled', 'half', 'killed'])
def test_connection_is_freed_when_it_ends_without_the_collector(example, image, how):
    memory = example.Memory(128 * MIB)
    device = example.BlockDevice(image)
    serve = example.Server({'': example.Export('', device)}, example.Limits(memory, 0.2))

    def left():
        kinds = example.Transmission, example.Negotiation, example.Input
        return [thing for thing in gc.get_objects() if isinstance(thing, kinds)]

    gc.collect()
    gc.disable()
    try:
        ours, theirs = gevent.socket.socketpair()
        server = gevent.spawn(serve, theirs, None)
        ours.sendall(struct.pack('>I', 3) + b'IHAVEOPT' + struct.pack('>II', 1, 0))
        receive(ours, 28)
        ours.sendall(request(1, 0, 4096) + bytes(4096) + request(0, 0, 4096) + request(0, 0, MIB))
        receive(ours, 3 * 16 + 4096 + MIB)
        assert left()
        if how == 'stalled':
            ours.sendall(request(0, 0, 16 * MIB) * 4)
        elif how != 'killed':
            ours.sendall({'disconnect': request(2, 0, 0), 'nonsense': bytes(28), 'half': bytes(7)}.get(
                how, request(0, 0, 16 * MIB) * 4))
        if how in ('gone', 'reset'):
            gevent.sleep(0.1)
            if how == 'gone':
                ours.recv(1000)
            ours.close()
        if how == 'killed':
            server.kill()
        server.join(10)
        assert server.ready()
        del server, theirs
        gevent.sleep(0)
        assert memory.free == 128 * MIB
        assert left() == []
    finally:
        gc.enable()
        ours.close()
        device.close()


def test_memory_is_taken_in_the_order_of_asking(example):
    memory, order = example.Memory(100), []

    def take(name, nbytes):
        memory.take(nbytes)
        order.append(name)

    take('first', 90)
    waiting = [gevent.spawn(take, name, nbytes) for name, nbytes in (('large', 50), ('small', 5))]
    gevent.sleep(0)
    assert not memory.has(5)            # there is enough, but the large request is before it
    assert order == ['first']
    memory.give_back(90)
    gevent.joinall(waiting)
    assert order == ['first', 'large', 'small']
    assert memory.free == 45


@pytest.mark.parametrize('granted', [False, True])
def test_memory_of_a_killed_greenlet_is_given_to_the_next(example, granted):
    memory = example.Memory(100)
    memory.take(60)
    killed, following = gevent.spawn(memory.take, 100), gevent.spawn(memory.take, 40)
    gevent.sleep(0)
    killed.kill(block=False)
    if granted:
        memory.give_back(60)            # before it runs again
    following.join(5)
    assert following.successful()
    memory.give_back(40 if granted else 100)
    assert memory.free == 100


@pytest.mark.parametrize('limit', [
    ('--connections', '0'), ('--connections', '-1'), ('--connections', 'x'), ('--memory', '127'),
    ('--memory', '1e3'), ('--timeout', '0'), ('--timeout', '-1'), ('--timeout', 'nan'), ('--timeout', 'inf'),
    ('--iops', '0'), ('--iops', 'nan'), ('--bps', '-5'), ('--bps', 'inf')], ids=' '.join)
def test_limit_that_is_none_is_refused(example, monkeypatch, capsys, limit):
    monkeypatch.setattr(sys, 'argv', ['nbd_server.py', *limit, 'image'])
    with pytest.raises(SystemExit) as stopped:
        example.main()
    assert stopped.value.code == 2
    assert f"argument {limit[0]}: '{limit[1]}' is no number from" in capsys.readouterr().err.splitlines()[-1]


def test_export_that_has_its_limit_holds_up_no_other(image, tmp_path):
    with open(tmp_path / 'other', 'wb') as file:
        file.truncate(SIZE)
    server = Server('--iops', '20', image, f'other={tmp_path / "other"}')
    try:
        with negotiated(server) as busy, negotiated(server, b'other') as other:
            busy.sendall(b''.join(request(0, i * 512, 512, cookie=i) for i in range(100)))
            for i in range(5):
                other.sendall(request(0, 0, 512, cookie=i))
                assert reply(other) == (0, i)
                receive(other, 512)
            busy.setblocking(False)
            assert len(busy.recv(1 << 20, socket.MSG_PEEK)) < 100 * 528     # it takes 5 s
    finally:
        server.stop()


def test_flush_covers_the_writes_of_other_connections(server):
    with negotiated(server) as one, negotiated(server) as other:
        one.sendall(request(1, 0, 4096) + b'x' * 4096)
        assert reply(one) == (0, 1)
        other.sendall(request(3, 0, 0))
        assert reply(other) == (0, 1)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.one_of(
    st.binary(max_size=80),
    st.tuples(st.integers(0, 12), st.binary(max_size=60)).map(
        lambda pair: b'IHAVEOPT' + struct.pack('>II', pair[0], len(pair[1])) + pair[1]),
    st.tuples(st.sampled_from([6, 7, 9, 10]), st.integers(0, 70), st.binary(max_size=60)).map(
        lambda three: b'IHAVEOPT' + struct.pack('>III', three[0], len(three[2]) + 4, three[1]) + three[2]),
    st.integers(0, 1 << 32).map(lambda n: struct.pack('>I', n & 0xffffffff))), max_size=6), st.booleans())
def test_nonsense_in_the_negotiation_disturbs_nobody(server, parts, begins_well):
    with server.connect() as sock:
        sock.sendall((struct.pack('>I', 3) if begins_well else b'') + b''.join(parts))
        sock.shutdown(socket.SHUT_WR)
        drained(sock)
    assert_alive(server)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.one_of(
    st.binary(max_size=60),
    st.builds(request, st.integers(0, 9), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 32) - 1),
              st.integers(0, 3), st.integers(0, 31)),
    st.builds(request, st.sampled_from([0, 4, 6, 7]), st.integers(0, SIZE), st.integers(0, MIB))),
    max_size=8))
def test_nonsense_in_requests_disturbs_nobody(server, parts):
    with negotiated(server) as sock:
        sock.sendall(b''.join(parts))
        sock.shutdown(socket.SHUT_WR)
        drained(sock)
    assert_alive(server)


def drained(sock):
    try:
        while sock.recv(1 << 20):
            pass
    except ConnectionResetError:
        pass


def assert_alive(server):
    with negotiated(server) as sock:
        sock.sendall(request(0, 0, 512))
        assert reply(sock) == (0, 1)
        assert len(receive(sock, 512)) == 512
    assert server.process.poll() is None


def test_bad_command_lines(tmp_path, image):
    for args in ([], ['/no/such'], ['a=/dev/null'], [image, image], ['--tcp', 'x:y', image],
                 ['--tls', '/no/cert', '/no/key', image]):
        done = subprocess.run([sys.executable, SERVER, *args], capture_output=True, text=True, timeout=20)
        assert done.returncode in (1, 2), args
        assert 'Traceback' not in done.stderr, done.stderr
        assert done.stderr
    precious = tmp_path / 'precious'
    precious.write_text('mine')
    done = subprocess.run([sys.executable, SERVER, '--unix', precious, image], capture_output=True, text=True,
                          timeout=20)
    assert done.returncode == 1
    assert precious.read_text() == 'mine'
