"""What several tests need, by kind: the scripted kernel, disks, processes, a watchdog."""

from __future__ import annotations

import os

import pytest

IN_CI = bool(os.environ.get('CI'))


def missing(reason):
    """Skip for want of a tool; in CI, where the project installs its tools, fail instead."""
    if IN_CI:
        pytest.fail(reason)
    pytest.skip(reason)


def known_fault(reason, raises=AssertionError):
    """Mark a test that has to pass one day, and must fail until then: in this way, and for this reason."""
    return pytest.mark.xfail(strict=True, raises=raises, reason=reason)
