"""A device whose only thread is busy until `set_free`: it sends a file to a blocking socket that is full."""

import os
import socket
import sys

import gevent

import greenaio
import greenaio.os

folder = sys.argv[1]
os.chdir(folder)
os.mkdir('here')
os.mkdir('there')
greenaio.os.stat(folder)            # the hub has its fds
sending: "gevent.Greenlet[..., object]"
sender: socket.socket
receiver: socket.socket
big: int


def open_fds():
    return sorted(os.listdir('/proc/self/fd'))


def keep_busy():
    global sending, receiver, sender, big
    with open(folder + '/big', 'wb') as file:
        file.write(bytes(1 << 20))
    big = os.open(folder + '/big', os.O_RDONLY)
    sender, receiver = socket.socketpair()
    sending = gevent.spawn(greenaio.os.sendfile, sender.fileno(), big, 0, 1 << 20)
    gevent.sleep(0.05)


def set_free():
    receiver.setblocking(False)
    while not sending.ready():
        try:
            receiver.recv(1 << 20)
        except BlockingIOError:
            gevent.sleep(0.001)
    receiver.close()
    sender.close()
    os.close(big)


def call_in(directory, function, *args, **kwargs):
    """A greenlet that makes the call while *directory* is the working directory, and another afterwards."""
    def call():
        os.chdir(directory)
        return function(*args, **kwargs)
    greenlet = gevent.spawn(call)
    gevent.sleep(0.01)
    assert not greenlet.ready()
    os.chdir(folder)
    return greenlet
