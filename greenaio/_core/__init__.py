"""Requests and the greenlets that wait for them. No module here knows a file by its name.

The engine and the modules below it run, and are tested, without gevent. Only `abi` and `context` know a
structure of the kernel's AIO. Only the driver of a hub parks a greenlet for the kernel or for a native
thread, and only the driver wakes it.
"""
