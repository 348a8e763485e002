"""A network block device server: ``python examples/nbd_server.py --unix /tmp/nbd.sock disk.img``.

    qemu-img bench -f raw 'nbd+unix:///?socket=/tmp/nbd.sock'
    nbdcopy other.img 'nbd+unix:///disk.img?socket=/tmp/nbd.sock'

Speaks the fixed newstyle protocol of https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, with
structured replies and base:allocation. The requests of a connection run concurrently; the replies that are
ready at the same time leave in one system call. The requests of all clients share a fixed amount of memory.
A client that breaks the protocol or stalls is dropped; the other clients do not notice.
"""

from __future__ import annotations

import signal

if __name__ == '__main__':      # the imports take a while: Ctrl-C then gives no traceback, either
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import errno
import fcntl
import os
import select
import ssl
import stat
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gevent
import gevent.ssl
from gevent import socket
from gevent.event import Event
from gevent.lock import Semaphore
from gevent.pool import Group, Pool
from gevent.server import StreamServer

from greenaio import aligned_buffer
from greenaio.block import BlockDevice

REQUEST_MAX = 32 << 20          # bytes: what clients assume where nobody tells them
TOGETHER_MAX, EACH_MAX = 32, 64 << 10   # requests that one greenlet serves together, and their bytes each
IN_FLIGHT_MAX = 128             # requests of a connection: then nothing more is received from it ...
HELD_MAX = 64 << 20             # ... and likewise with so many bytes
REQUEST_COST = 16 << 10         # bytes of a request without its data: a greenlet, most of it
MISALIGNED = 3                  # copies of misaligned data, at most: O_DIRECT needs aligned ones
MEMORY_MIN = 128                # MiB: more than the dearest request
MIB = 1 << 20
OPTION_MAX = 16 << 10           # bytes
OPTIONS_MAX = 1000              # of a client that can't make up its mind
NEGOTIATION_MAX = 10            # seconds
INPUT = 256 << 10               # bytes: received at once, at most
IOV_MAX = 1024                  # buffers that the kernel sends at once
TLS_RECORD = 16 << 10           # bytes

# Negotiation
NBDMAGIC, IHAVEOPT, REPLY_MAGIC = 0x4e42444d41474943, 0x49484156454f5054, 0x3e889045565a9
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_CONTEXTS, SET_CONTEXTS = (
    1, 2, 3, 5, 6, 7, 8, 9, 10)
ACK, SERVER, INFO_REPLY, CONTEXT = 1, 2, 3, 4
UNSUPPORTED, POLICY, INVALID, TLS_REQUIRED, UNKNOWN, TOO_BIG = ((1 << 31) + n for n in (1, 2, 3, 5, 6, 9))
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3
HELLO, OPTION, OPTION_REPLY = struct.Struct('>QQH'), struct.Struct('>QII'), struct.Struct('>QIII')
ALLOCATION, ALLOCATION_ID = b'base:allocation', 1

# Transmission
HAS_FLAGS, READ_ONLY, CAN_FLUSH, CAN_FUA, CAN_TRIM, CAN_ZERO, CAN_DF, MULTI_CONN, CAN_CACHE = (
    1, 2, 4, 8, 32, 64, 128, 256, 1024)
READ, WRITE, DISCONNECT, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE = 1, 2, 4, 8
ALLOWED = {READ: DF, WRITE: FUA, FLUSH: 0, TRIM: FUA, CACHE: 0, WRITE_ZEROES: FUA | NO_HOLE,
           BLOCK_STATUS: REQ_ONE}
REQUEST_MAGIC, SIMPLE_MAGIC, CHUNK_MAGIC = 0x25609513, 0x67446698, 0x668e33ef
REQUEST, SIMPLE = struct.Struct('>IHHQQI'), struct.Struct('>IIQ')
CHUNK, DATA_CHUNK = struct.Struct('>IHHQI'), struct.Struct('>IHHQIQ')
DONE, DATA, STATUS, ERROR = 1, 1, 5, (1 << 15) + 1
HOLE_AND_ZERO = 3
TOLD = {errno.EPERM: 1, errno.ENOMEM: 12, errno.EINVAL: 22, errno.ENOSPC: 28, errno.EDQUOT: 28,
        errno.EFBIG: 28}
EIO = 5
FLOCK = struct.Struct('hhqqi4x')        # linux/fcntl.h: type, whence, start, length, pid


class Broken(Exception):
    """The client does not keep to the protocol."""


class Gone(Broken):
    """The client has closed the connection."""


Data = bytes | memoryview


class Memory:
    """Bytes for the requests of all clients together.

    A request takes its bytes before its data is read or received, and gives them back when its reply has
    left. If too few bytes are free, the request waits; requests are served in the order in which they came.
    """

    def __init__(self, nbytes: int) -> None:
        self.free = nbytes
        self._waiting: deque[tuple[int, Event]] = deque()

    def has(self, nbytes: int) -> bool:
        """Whether `take` would return at once."""
        return nbytes <= self.free and not self._waiting

    def take(self, nbytes: int) -> None:
        if self.has(nbytes):
            self.free -= nbytes
            return
        turn = nbytes, Event()
        self._waiting.append(turn)
        try:
            turn[1].wait()
        except BaseException:                   # killed, perhaps when the bytes were granted already
            if turn in self._waiting:
                self._waiting.remove(turn)
                self.give_back(0)
            else:
                self.give_back(nbytes)
            raise

    def give_back(self, nbytes: int) -> None:
        self.free += nbytes
        while self._waiting and self._waiting[0][0] <= self.free:
            granted, turn = self._waiting.popleft()
            self.free -= granted
            turn.set()


class Limits(NamedTuple):
    memory: Memory
    seconds: float                      # to send a request, and to send or take each MiB of data

    def patience(self) -> gevent.Timeout:
        """A context that a client must not outlast."""
        return gevent.Timeout(self.seconds, Broken('it takes too long'))


class Export(NamedTuple):
    name: str
    device: BlockDevice

    @property
    def flags(self) -> int:
        can_write = CAN_FLUSH | CAN_FUA | CAN_TRIM | CAN_ZERO
        # Any number of connections: a flush on one is for the writes that returned on all.
        return (HAS_FLAGS | CAN_DF | MULTI_CONN | CAN_CACHE
                | (READ_ONLY if self.device.readonly else can_write))


class Input:
    """What the client sends, received in large pieces."""

    def __init__(self, sock: Any, limits: Limits) -> None:
        self.sock, self._limits = sock, limits
        self._is_tls = isinstance(sock, gevent.ssl.SSLSocket)
        self._memory = memoryview(bytearray(INPUT))
        self._begin = self._end = 0

    def peek(self, n: int) -> memoryview:
        """Up to *n* bytes of what is there already, for as long as nothing is taken."""
        return self._memory[self._begin:min(self._begin + n, self._end)]

    def take(self, n: int) -> memoryview:
        """The next *n* bytes, for as long as nothing else is taken. Wait for the first byte for ever, for the
        others as long as the limits allow."""
        if self._end - self._begin < n:
            left = self._end - self._begin
            self._memory[:left] = self._memory[self._begin:self._end]
            self._begin, self._end = 0, left or self._receive(self._memory)
            if self._end < n:
                with self._limits.patience():
                    while self._end < n:
                        self._end += self._receive(self._memory[self._end:])
        self._begin += n
        return self._memory[self._begin - n:self._begin]

    def __len__(self) -> int:
        """Bytes received and not taken."""
        return self._end - self._begin

    def has_more(self) -> bool:
        """Whether there is something to take of which the loop knows nothing."""
        return self._end > self._begin or self._is_tls and self.sock.pending() > 0

    def fill(self, target: memoryview) -> None:
        n = min(len(target), self._end - self._begin)
        target[:n] = self.take(n)
        while n < len(target):
            end = min(n + MIB, len(target))
            with self._limits.patience():
                while n < end:
                    n += self._receive(target[n:end])

    def _receive(self, target: memoryview) -> int:
        n: int = self.sock.recv_into(target)
        if n == 0:
            raise Gone('it is gone')
        return n


# Negotiation -------------------------------------------------------------------------------------

class Negotiation:
    """Until a client has chosen an export: `run` returns that."""

    def __init__(self, sock: Any, exports: dict[str, Export], limits: Limits,
                 tls: ssl.SSLContext | None) -> None:
        self.sock, self.exports, self.limits, self.tls = sock, exports, limits, tls
        self.input = Input(sock, limits)
        self.structured = False
        self.context: str | None = None         # the export for which base:allocation is wanted

    def run(self) -> Export | None:
        self.sock.sendall(HELLO.pack(NBDMAGIC, IHAVEOPT, FIXED_NEWSTYLE | NO_ZEROES))
        client, = struct.unpack('>I', self.input.take(4))
        if client & ~(FIXED_NEWSTYLE | NO_ZEROES) or not client & FIXED_NEWSTYLE:
            raise Broken('flags that nobody knows')
        for _ in range(OPTIONS_MAX):
            magic, option, length = OPTION.unpack(self.input.take(OPTION.size))
            if magic != IHAVEOPT:
                raise Broken('no option')
            if option == SET_CONTEXTS:
                self.context = None     # whatever comes of it
            if length > OPTION_MAX:
                self._pass_over(length)
                self._reply(option, TOO_BIG)
                continue
            data = bytes(self.input.take(length))
            if option == ABORT:
                with contextlib.suppress(OSError):      # it need not wait for that
                    self._reply(option, ACK)
                return None
            if option == EXPORT_NAME:
                return self._by_name(data, bool(client & NO_ZEROES))
            if self.tls and option != STARTTLS:
                self._reply(option, TLS_REQUIRED)
                continue
            try:
                export = self._answer(option, data)
            except (struct.error, UnicodeDecodeError, IndexError):
                self._reply(option, INVALID)
                continue
            if export:
                return export
        raise Broken('no end of options')

    def _pass_over(self, length: int) -> None:
        while length:
            length -= len(self.input.take(min(length, OPTION_MAX)))

    def _reply(self, option: int, kind: int, data: bytes = b'') -> None:
        self.sock.sendall(OPTION_REPLY.pack(REPLY_MAGIC, option, kind, len(data)) + data)

    def _by_name(self, data: bytes, no_zeroes: bool) -> Export:
        """An old client: it can be told nothing but yes."""
        export = self.exports.get(data.decode(errors='replace'))
        if export is None or self.tls:
            raise Broken('no such export')
        told = struct.pack('>QH', export.device.size, export.flags)
        self.sock.sendall(told + bytes(0 if no_zeroes else 124))
        return export

    def _answer(self, option: int, data: bytes) -> Export | None:
        if data and option in (LIST, STRUCTURED):
            raise IndexError
        if option == LIST:
            for name in self.exports:
                if name:                # that of the default is another's too
                    self._reply(option, SERVER, struct.pack('>I', len(name.encode())) + name.encode())
            self._reply(option, ACK)
        elif option in (INFO, GO):
            return self._info(option, data)
        elif option == STRUCTURED:
            self.structured = True
            self._reply(option, ACK)
        elif option in (LIST_CONTEXTS, SET_CONTEXTS):
            self._contexts(option, data)
        elif option == STARTTLS:
            self._start_tls(option)
        else:
            self._reply(option, UNSUPPORTED)
        return None

    def _info(self, option: int, data: bytes) -> Export | None:
        length, = struct.unpack_from('>I', data)
        name, = struct.unpack_from(f'>{length}s', data, 4)
        count, = struct.unpack_from('>H', data, 4 + length)
        wanted = struct.unpack(f'>{count}H', data[6 + length:])
        export = self.exports.get(name.decode())
        if export is None:
            self._reply(option, UNKNOWN)
            return None
        self._reply(option, INFO_REPLY, struct.pack('>HQH', INFO_EXPORT, export.device.size, export.flags))
        if INFO_BLOCK_SIZE in wanted:
            preferred = max(4096, export.device.alignment)
            self._reply(option, INFO_REPLY, struct.pack('>HIII', INFO_BLOCK_SIZE, 1, preferred, REQUEST_MAX))
        self._reply(option, ACK)
        if option == INFO:
            return None
        if self.context != name.decode():
            self.context = None
        return export

    def _contexts(self, option: int, data: bytes) -> None:
        length, = struct.unpack_from('>I', data)
        name, count = struct.unpack_from(f'>{length}sI', data, 4)
        place, queries = 8 + length, []
        for _ in range(count):
            length, = struct.unpack_from('>I', data, place)
            queries.append(struct.unpack_from(f'>{length}s', data, place + 4)[0])
            place += 4 + length
        if place != len(data) or not self.structured:
            raise IndexError
        if name.decode() not in self.exports:
            self._reply(option, UNKNOWN)
            return
        found = ALLOCATION in queries
        if option == LIST_CONTEXTS:
            found = found or not queries or b'base:' in queries
        elif found:
            self.context = name.decode()
        if found:
            self._reply(option, CONTEXT, struct.pack('>I', ALLOCATION_ID) + ALLOCATION)
        self._reply(option, ACK)

    def _start_tls(self, option: int) -> None:
        if self.tls is None:
            self._reply(option, POLICY)
            return
        self._reply(option, ACK)
        self.sock = self.tls.wrap_socket(self.sock, server_side=True)
        self.input = Input(self.sock, self.limits)      # nothing that came in clear counts any more
        self.tls, self.structured, self.context = None, False, None


# Transmission ------------------------------------------------------------------------------------

class Request(NamedTuple):
    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    held: int                           # bytes taken from the memory
    data: memoryview | None


class Transmission:
    """Requests and replies: each greenlet receives one and serves it, then another the next."""

    def __init__(self, negotiated: Negotiation, device: BlockDevice) -> None:
        self.sock, self.input, self.device = negotiated.sock, negotiated.input, device
        self.size, self.alignment = device.size, device.alignment
        self.limits, self.memory = negotiated.limits, negotiated.limits.memory
        self.structured, self.has_context = negotiated.structured, negotiated.context is not None
        self._workers, self._idle = Group(), 0
        self._turn = Semaphore(0)       # to receive
        self._readable = gevent.get_hub().loop.io(self.sock.fileno(), 1)
        self._end = Event()             # nothing more will be received
        self._failure = ''              # why the client is dropped; not the exception, which refers to us
        self._in_flight = self._held = 0        # requests, and their bytes, until their replies have left
        self._room = Event()
        self._replies: list[Data] = []
        self._unsent = self._unsent_bytes = 0   # of the requests that these replies are for
        self._sending = False
        self._ready = Event()

    def run(self) -> None:
        """Serve the client until it disconnects. Raises Broken if it is dropped.

        In either case the requests in flight come to their end first: one that was killed would leave its
        buffer to the kernel, and the memory of an impatient client's requests would be counted no more."""
        sender = gevent.spawn(self._send_what_is_ready)
        try:
            self._let_receive()
            self._end.wait()
            self._in_flight_is(0)
        finally:
            self._readable.stop()
            self._workers.kill()
            sender.kill()
            self._readable.close()
            self.memory.give_back(self._held)
        if self._failure:
            raise Broken(self._failure)

    def _fail(self, error: object) -> None:
        """Drop the client: replies are thrown away from now on."""
        self._failure = self._failure or str(error) or repr(error)
        self._end.set()
        # The greenlet that receives sees an end. By SSLSocket.shutdown it would see a ValueError.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def _let_receive(self) -> None:
        self._readable.stop()
        if not self._idle:
            self._workers.spawn(self._work)
        self._turn.release()

    def _work(self) -> None:
        while not self._end.is_set():
            self._idle += 1
            self._turn.acquire()        # which nobody has again after the last request
            self._idle -= 1
            self._receive_and_serve()   # a call: a greenlet that waits for its turn refers to no request

    def _receive_and_serve(self) -> None:
        try:
            request = self._receive()
        except (Broken, OSError, MemoryError) as error:
            self._fail(error)
            return
        if request is None:
            self._end.set()
            return
        try:
            requests = self._more_like(request)
            if self.input.has_more():
                self._let_receive()
            else:                       # so a client that asks for one thing at a time has one greenlet here
                self._readable.start(self._let_receive)
            if len(requests) > 1:
                self._serve_together(requests)
            else:
                self._serve(request)
        except Exception as error:      # a fault of ours: the client is dropped, not left to wait
            self._in_flight = 0
            self._fail(f'a fault of the server: {error!r}')
            raise

    def _receive(self) -> Request | None:
        try:
            header = self.input.take(REQUEST.size)
        except Gone:
            if self.input:
                raise
            return None                 # between two requests: it has asked for all that it wants
        magic, flags, command, cookie, offset, length = REQUEST.unpack(header)
        if magic != REQUEST_MAGIC:
            raise Broken('no request')
        if command == DISCONNECT:
            return None
        if command == WRITE and length > REQUEST_MAX:
            raise Broken('a write that is too large')
        data, cost = None, self._cost(command, offset, length)
        if self._in_flight >= IN_FLIGHT_MAX or self._held + cost > HELD_MAX:
            self._in_flight_is(IN_FLIGHT_MAX - 1, HELD_MAX - cost)
        must_wait = not self.memory.has(cost)
        self.memory.take(cost)
        try:
            if must_wait and has_hung_up(self.sock):
                raise Broken('it has gone')     # a queue of such requests is not to keep others waiting
            if command == WRITE:
                data = aligned_buffer(length)
                self.input.fill(data)
        except BaseException:
            self.memory.give_back(cost)
            raise
        self._in_flight += 1
        self._held += cost
        return Request(flags, command, cookie, offset, length, cost, data)

    def _cost(self, command: int, offset: int, length: int) -> int:
        """Bytes of memory that a request needs until its reply has left."""
        if command not in (READ, WRITE) or length > REQUEST_MAX:
            return REQUEST_COST
        if (offset | length) % self.alignment:
            length *= MISALIGNED
        return REQUEST_COST + length

    def _more_like(self, first: Request) -> list[Request]:
        """It, and others that have come with it: if it is an ordinary read or write, and they are, too."""
        found = [first]
        if not self.input or not self._is_ordinary(first.command, *first):
            return found
        while len(found) < TOGETHER_MAX and len(self.input) >= REQUEST.size:
            magic, flags, command, cookie, offset, length = REQUEST.unpack(self.input.peek(REQUEST.size))
            cost = self._cost(command, offset, length)
            request = Request(flags, command, cookie, offset, length, cost, None)
            if (magic != REQUEST_MAGIC or not self._is_ordinary(first.command, *request)
                    or self._in_flight >= IN_FLIGHT_MAX or self._held + cost > HELD_MAX
                    or not self.memory.has(cost)
                    or command == WRITE and len(self.input) < REQUEST.size + length):
                break
            found.append(self._receive())       # type: ignore[arg-type]  # it is here, whole
        return found

    def _is_ordinary(self, kind: int, flags: int, command: int, cookie: int, offset: int, length: int,
                     *_: object) -> bool:
        return (command == kind and (command == READ and flags in (0, DF)
                                     or command == WRITE and not flags and not self.device.readonly)
                and 0 < length <= EACH_MAX and offset + length <= self.size)

    def _serve_together(self, requests: list[Request]) -> None:
        """In flight together, and woken less often than a greenlet for each would be."""
        results: Iterator[memoryview | int | OSError]
        if requests[0].command == READ:
            results = self.device.pread_each([(request.length, request.offset) for request in requests])
        else:
            results = self.device.pwrite_each([(request.data, request.offset) for request in requests])
        held, last = sum(request.held for request in requests), requests[-1]
        for request, result in zip(requests, results, strict=True):
            if isinstance(result, OSError):
                parts = self._error(request.cookie, result)
            elif isinstance(result, int):
                parts = [SIMPLE.pack(SIMPLE_MAGIC, 0, request.cookie)]
            else:
                parts = self._data(request.cookie, request.offset, result)
            self._reply(held if request is last else 0, parts)      # they have one piece of memory together

    def _in_flight_is(self, wanted: int, held: int = HELD_MAX) -> None:
        """Wait until it is, at most."""
        while self._in_flight > wanted or self._in_flight and self._held > held:
            self._room.clear()
            self._room.wait()

    def _serve(self, request: Request) -> None:
        try:
            reply = self._perform(request)
        except (OSError, MemoryError) as error:
            self._reply(request.held, self._error(request.cookie, error))
        else:
            self._reply(request.held, reply)

    def _perform(self, request: Request) -> list[Data]:
        flags, command, cookie, offset, length, _, data = request
        device, size = self.device, self.device.size
        if command not in ALLOWED or flags & ~ALLOWED[command]:
            raise OSError(errno.EINVAL, 'no such command')
        if device.readonly and command in (WRITE, TRIM, WRITE_ZEROES):
            raise OSError(errno.EPERM, 'the export is read-only')
        if command != FLUSH and offset + length > size:
            code = errno.ENOSPC if command in (WRITE, WRITE_ZEROES) else errno.EINVAL
            raise OSError(code, 'beyond the end')
        fua = bool(flags & FUA)
        if command == READ:
            if length > REQUEST_MAX:
                raise OSError(errno.EINVAL, 'too large')
            return self._data(cookie, offset, self._read(length, offset))
        if command == BLOCK_STATUS:
            return self._block_status(request)
        if command == WRITE:
            device.pwrite(data, offset, fua=fua)
        elif command == FLUSH:
            device.flush()
        elif command == WRITE_ZEROES:
            device.write_zeroes(length, offset, may_unmap=not flags & NO_HOLE, fua=fua)
        elif command == TRIM:
            device.discard(length, offset)
            if fua:
                device.flush()
        # CACHE: O_DIRECT has no cache to bring it into.
        return [SIMPLE.pack(SIMPLE_MAGIC, 0, cookie)]

    def _read(self, length: int, offset: int) -> Data:
        if length <= EACH_MAX:
            return self.device.pread(length, offset)
        data = aligned_buffer(length)       # the bytes of pread would be a second copy
        self.device.preadv([data], offset)
        return data

    def _block_status(self, request: Request) -> list[Data]:
        if not self.has_context or not request.length:
            raise OSError(errno.EINVAL, 'nothing to tell')
        extents = self.device.block_status(request.length, request.offset)
        if request.flags & REQ_ONE:
            del extents[1:]
        told = b''.join(struct.pack('>II', n, 0 if is_data else HOLE_AND_ZERO) for n, is_data in extents)
        return [CHUNK.pack(CHUNK_MAGIC, DONE, STATUS, request.cookie, 4 + len(told)),
                struct.pack('>I', ALLOCATION_ID), told]

    def _data(self, cookie: int, offset: int, data: Data) -> list[Data]:
        if not data:                    # a chunk of data has some; and sendmsg would send nothing for ever
            return [CHUNK.pack(CHUNK_MAGIC, DONE, 0, cookie, 0) if self.structured
                    else SIMPLE.pack(SIMPLE_MAGIC, 0, cookie)]
        if self.structured:
            return [DATA_CHUNK.pack(CHUNK_MAGIC, DONE, DATA, cookie, 8 + len(data), offset), data]
        return [SIMPLE.pack(SIMPLE_MAGIC, 0, cookie), data]

    def _error(self, cookie: int, error: Exception) -> list[Data]:
        code = TOLD.get(getattr(error, 'errno', None) or 0, EIO)
        if self.structured:
            return [CHUNK.pack(CHUNK_MAGIC, DONE, ERROR, cookie, 6), struct.pack('>IH', code, 0)]
        return [SIMPLE.pack(SIMPLE_MAGIC, code, cookie)]

    def _reply(self, held: int, parts: list[Data]) -> None:
        self._replies += parts
        parts.clear()                   # the caller's frame refers to it for longer than it is counted
        self._unsent += 1
        self._unsent_bytes += held
        if self._in_flight == self._unsent:
            self._send()                # nobody else is going to reply soon
        elif self._unsent == 1:
            self._ready.set()           # the sender comes after all who are woken with this one

    def _send_what_is_ready(self) -> None:
        while True:
            self._ready.wait()
            self._ready.clear()
            self._send()

    def _send(self) -> None:
        if self._sending:
            return                      # it looks for more
        parts, n, held = self._replies, self._unsent, self._unsent_bytes
        self._replies, self._unsent, self._unsent_bytes = [], 0, 0
        self._sending = True
        try:
            if not self._failure:
                self._send_all(parts)
        except (Broken, OSError) as error:
            self._fail(error)
        finally:
            self._sending = False
        parts.clear()
        self._in_flight -= n
        self._held -= held
        self.memory.give_back(held)
        self._room.set()
        if self._unsent:
            self._ready.set()

    def _send_all(self, parts: list[Data]) -> None:
        send: Callable[[list[Data]], int] = self.sock.sendmsg
        if isinstance(self.sock, gevent.ssl.SSLSocket):
            send = self._send_tls
        else:                           # usually the kernel takes everything at once: that needs no timer
            with contextlib.suppress(BlockingIOError):
                forget(parts, self.sock.sendmsg(parts[:IOV_MAX], (), socket.MSG_DONTWAIT))
        while parts:
            left = MIB
            with self.limits.patience():
                while parts and left > 0:
                    sent = send(parts[:IOV_MAX])
                    forget(parts, sent)
                    left -= sent

    def _send_tls(self, parts: list[Data]) -> int:
        """Send the first parts in one record if they are small, and as they are if the first is large."""
        n = size = 0
        while n < len(parts) and size + len(parts[n]) <= TLS_RECORD:
            size += len(parts[n])
            n += 1
        sent: int = self.sock.send(b''.join(parts[:n]) if n else parts[0][:MIB])
        return sent


def has_hung_up(sock: Any) -> bool:
    """Whether the client is known to take no replies: of a TCP client, only once it was sent one."""
    poll = select.poll()
    poll.register(sock, 0)              # POLLHUP and POLLERR are told unasked
    return bool(poll.poll(0))


def forget(parts: list[Data], sent: int) -> None:
    """Remove the first *sent* bytes from *parts*."""
    n = 0
    while n < len(parts) and sent >= len(parts[n]):
        sent -= len(parts[n])
        n += 1
    del parts[:n]
    if sent:
        parts[0] = memoryview(parts[0])[sent:]


# The server --------------------------------------------------------------------------------------

class Server:
    """Serves *exports* by name; *tls* is then the only way."""

    def __init__(self, exports: dict[str, Export], limits: Limits, tls: ssl.SSLContext | None = None) -> None:
        self.exports, self.limits, self.tls = exports, limits, tls

    def __call__(self, sock: Any, address: Any) -> None:
        negotiation = Negotiation(sock, self.exports, self.limits, self.tls)
        try:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with gevent.Timeout(NEGOTIATION_MAX, Broken('it takes too long')):
                export = negotiation.run()
            if export:
                Transmission(negotiation, export.device).run()
        except (Broken, OSError) as error:
            print(f'nbd_server.py: a client was dropped: {error}', file=sys.stderr)
        finally:
            with contextlib.suppress(OSError):
                negotiation.sock.close()


def is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(':')
    if ':' in host and host[0] != '[':
        host = f'[{host}]'              # as a URI has IPv6
    if not host or not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f'{text!r} is no HOST:PORT')
    return host, int(port)


def lock(path: str, readonly: bool) -> None:
    """Lock the image at *path* for as long as this process lives: against all other servers, or, if it is
    only read, against those that write. QEMU takes such locks too. The lock is of the open file, which is not
    closed again; a POSIX lock would end with any close of the image. Raises OSError."""
    fd = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
    kind = fcntl.F_RDLCK if readonly else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except (BlockingIOError, PermissionError) as error:
        os.close(fd)
        raise OSError(error.errno, 'The image is in use by another server or by QEMU', path) from None


def number(kind: Callable[[str], float], least: float, most: float) -> Callable[[str], Any]:
    """The type of an argument: a number from *least* to *most*."""
    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if least <= (value := kind(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(f'{text!r} is no number from {least:,} to {most:,}')
    return parse


def bind(sock: Any, where: Any, name: str) -> None:
    try:
        sock.bind(where)
    except OSError as error:            # which does not name the address
        sock.close()
        raise OSError(error.errno or errno.ENAMETOOLONG, error.strerror or str(error), name) from None


def listen(arguments: argparse.Namespace) -> tuple[Any, str]:
    """The listening socket, and its URI. Raises OSError."""
    if arguments.unix:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(arguments.unix).st_mode):
                if is_served(arguments.unix):
                    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), arguments.unix)
                os.unlink(arguments.unix)       # of a server that was
        sock = socket.socket(socket.AF_UNIX)
        bind(sock, arguments.unix, arguments.unix)
        uri = f'nbd+unix:///?socket={arguments.unix}'
    else:
        host, port = arguments.tcp
        sock = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bind(sock, (host.strip('[]'), port), f'{host}:{port}')
        uri = f'nbd{"s" if arguments.tls else ""}://{host}:{sock.getsockname()[1]}/'
    sock.listen(128)
    return sock, uri


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('exports', nargs='+', metavar='[NAME=]PATH',
        help='a disk or image; the first is the default export too')
    where = parser.add_mutually_exclusive_group()
    where.add_argument('--unix', metavar='SOCKET')
    where.add_argument('--tcp', metavar='HOST:PORT', type=address, default='127.0.0.1:10809',
                       help='(%(default)s)')
    add('--tls', nargs=2, metavar=('CERT', 'KEY'), help='and no client without it')
    add('--read-only', action='store_true')
    add('--iops', type=number(float, 0.1, 10 ** 9), help='operations a second of each export, at most')
    add('--bps', type=number(float, 1, 10 ** 15), help='bytes a second, likewise')
    add('--connections', type=number(int, 1, 100_000), default=100, metavar='N',
        help='at a time (%(default)s), of 0.5 MiB each; more wait')
    add('--memory', type=number(int, MEMORY_MIN, 1 << 20), default=256, metavar='MIB',
        help='for the requests of all connections together (%(default)s); more requests wait')
    add('--timeout', type=number(float, 0.1, 86400), default=30, metavar='SECONDS',
        help='for a client to send a request that it has begun, and to send or take each MiB of data '
        '(%(default)s); between two requests it has any time')
    arguments = parser.parse_args()
    if arguments.unix == '':
        parser.error('argument --unix: a path is missing')
    exports: dict[str, Export] = {}
    try:
        for text in arguments.exports:
            name, equals, path = text.partition('=')
            if not equals or os.path.exists(text):
                name, path = os.path.basename(text), text
            if name in exports:
                parser.error(f'there are two exports {name!r}')
            exports[name] = Export(name, BlockDevice(path, readonly=arguments.read_only, iops=arguments.iops,
                                                     bps=arguments.bps))
            lock(path, arguments.read_only)
        exports.setdefault('', next(iter(exports.values())))
        tls = None
        if arguments.tls:
            tls = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            for path in arguments.tls:
                open(path).close()              # or the error does not say which it was
            tls.load_cert_chain(*arguments.tls)
        sock, uri = listen(arguments)
    except (OSError, ValueError) as error:
        print(f'nbd_server.py: {error}', file=sys.stderr)
        return 1
    limits = Limits(Memory(arguments.memory * MIB), arguments.timeout)
    server = StreamServer(sock, Server(exports, limits, tls), spawn=Pool(arguments.connections))
    status = serve(server, uri)
    if arguments.unix and not is_served(arguments.unix):        # by another one, since
        with contextlib.suppress(FileNotFoundError):
            os.unlink(arguments.unix)
    for device in {export.device for export in exports.values()}:
        try:
            device.flush()
            device.close()
        except OSError as error:
            print(f'nbd_server.py: {error}', file=sys.stderr)
            status = 1
    return status


def serve(server: StreamServer, uri: str) -> int:
    """Serve until a signal ends it; return the exit status."""
    status = 0

    def interrupt() -> None:
        nonlocal status
        status = 130
        server.close()

    gevent.signal_handler(signal.SIGTERM, server.close)
    gevent.signal_handler(signal.SIGINT, interrupt)
    try:
        print(uri, flush=True)
    except OSError as error:            # full or closed; the interpreter would try again at its end
        print(f'nbd_server.py: standard output: {error.strerror}', file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        server.close()
        return 1
    server.serve_forever()
    return status


if __name__ == '__main__':
    sys.exit(main())
