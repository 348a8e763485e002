"""A greenlet whose thread or hub ends while it waits for the turn of a file."""

import os
import sys
import threading

import gevent

from greenaio.fileobject import open as open_file

start = gevent.monkey.get_original('_thread', 'start_new_thread')
native_sleep = gevent.monkey.get_original('time', 'sleep')
is_over = threading.Event()
keep: list["gevent.Greenlet[..., object]"] = []


def in_thread_that_ends(how, work, at_end=lambda: None):
    """Spawn *work* in another thread, which then ends, or whose hub does; *at_end* is called before."""
    tasks = []

    def thread():
        tasks.append(f'/proc/self/task/{threading.get_native_id()}')
        keep.append(gevent.spawn(work))
        gevent.sleep(0.05)
        at_end()
        if how == 'hub':
            gevent.get_hub().destroy(destroy_loop=True)
        is_over.set()
        if how == 'hub':
            native_sleep(60)
    start(thread, ())
    is_over.wait(10)
    if how == 'thread':
        while os.path.exists(tasks[0]):         # its greenlets are dead when the thread has ended
            native_sleep(0.001)


def has_its_turn(call, *args):
    job = gevent.spawn(call, *args)
    job.join(10)
    assert job.ready()
    job.get()


fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
file = open_file(fd, 'r+b', closefd=False)
