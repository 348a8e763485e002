"""Projects whose suites are pytest's: each a row."""

from __future__ import annotations

from tests.suites.frame import PYTEST, Suite, pytest_of

SUITES = {
    'flask': Suite(
        {'tests': pytest_of('tests')}, 'flask==3.1.3',
        [*PYTEST, 'flask==3.1.3', 'werkzeug==3.1.9', 'asgiref==3.13.0', 'python-dotenv==1.2.4']),
}
