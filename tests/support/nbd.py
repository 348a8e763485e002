"""A server of block devices in this process, and a client that asks it where their data is."""

from __future__ import annotations

import struct
import sys
from typing import Any

import gevent
from gevent import socket

from tests.support.processes import EXAMPLES

sys.path.insert(0, str(EXAMPLES))
import nbd_server

NAME = b'disk'


def connect(device: Any) -> Any:
    """Return the socket of a client of *device*, whose server is a greenlet."""
    limits = nbd_server.Limits(nbd_server.Memory(256 << 20), 60)
    server = nbd_server.Server({NAME.decode(): nbd_server.Export(NAME.decode(), device)}, limits)
    ours, theirs = socket.socketpair()
    gevent.spawn(server, theirs, None)
    return ours


class Client:
    """A connection that has asked for base:allocation."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._receive(nbd_server.HELLO.size)
        sock.sendall(struct.pack('>I', nbd_server.FIXED_NEWSTYLE | nbd_server.NO_ZEROES))
        name = struct.pack('>I', len(NAME)) + NAME
        context = struct.pack('>I', len(nbd_server.ALLOCATION)) + nbd_server.ALLOCATION
        self._ask(nbd_server.STRUCTURED, b'')
        self._ask(nbd_server.SET_CONTEXTS, name + struct.pack('>I', 1) + context)
        self._ask(nbd_server.GO, name + struct.pack('>H', 0))

    def _receive(self, nbytes: int) -> bytes:
        data = b''
        while len(data) < nbytes:
            more = self._sock.recv(nbytes - len(data))
            assert more, 'the server has hung up'
            data += more
        return data

    def _ask(self, option: int, data: bytes) -> None:
        self._sock.sendall(nbd_server.OPTION.pack(nbd_server.IHAVEOPT, option, len(data)) + data)
        kind = None
        while kind != nbd_server.ACK:
            _, _, kind, length = nbd_server.OPTION_REPLY.unpack(
                self._receive(nbd_server.OPTION_REPLY.size))
            assert kind < 1 << 31, f'refused: {kind:#x}'
            self._receive(length)

    def block_status(self, nbytes: int, offset: int) -> list[tuple[int, int]]:
        """Return lengths and flags, as the server tells them."""
        self._sock.sendall(nbd_server.REQUEST.pack(
            nbd_server.REQUEST_MAGIC, 0, nbd_server.BLOCK_STATUS, 1, offset, nbytes))
        _, _, kind, _, length = nbd_server.CHUNK.unpack(self._receive(nbd_server.CHUNK.size))
        data = self._receive(length)
        assert kind == nbd_server.STATUS, data
        return list(struct.iter_unpack('>II', data[4:]))
