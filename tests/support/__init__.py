"""Helpers of several tests: the scripted kernel, disks, processes, a watchdog."""

from __future__ import annotations

import os

import pytest

IN_CI = bool(os.environ.get('CI'))


def missing(reason):
    """Skip the test, because a tool or a right is missing. In CI, which has all of them, fail instead."""
    if IN_CI:
        pytest.fail(reason)
    pytest.skip(reason)


def known_fault(reason, raises=AssertionError):
    """Mark a test of a fault that is not mended yet: the test must fail, with an exception of *raises*."""
    return pytest.mark.xfail(strict=True, raises=raises, reason=reason)
