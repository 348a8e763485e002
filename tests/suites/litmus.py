"""``litmus.py RESULTS``: run litmus against WsgiDAV on gevent's server, and write the outcomes as JUnit."""

from __future__ import annotations

import json
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree

WAIT = 60                       # seconds for the server to start


def main(results: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        root, config = pathlib.Path(folder, 'root'), pathlib.Path(folder, 'config.json')
        root.mkdir()
        port = free_port()
        config.write_text(json.dumps({
            'host': '127.0.0.1', 'port': port, 'server': 'gevent', 'provider_mapping': {'/': str(root)},
            'simple_dc': {'user_mapping': {'*': True}}, 'property_manager': True, 'lock_storage': True}))
        # In this folder it is the WsgiDAV that was installed.
        command = [sys.executable, '-m', 'wsgidav.server.server_cli', '--config', str(config)]
        with subprocess.Popen(command, cwd=folder) as server:
            try:
                wait_for(port)
                done = subprocess.run(['litmus', '-k', f'http://127.0.0.1:{port}/'], cwd=folder,
                                      stdout=subprocess.PIPE, text=True, errors='replace')
            finally:
                server.kill()
    print(done.stdout)
    suite = ElementTree.Element('testsuite')
    for case in cases(done.stdout):
        suite.append(case)
    ElementTree.ElementTree(suite).write(results)
    return done.returncode


def free_port() -> int:
    with socket.create_server(('127.0.0.1', 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def wait_for(port: int) -> None:
    end = time.monotonic() + WAIT
    while True:
        try:
            socket.create_connection(('127.0.0.1', port)).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(.1)


def cases(output: str) -> list[ElementTree.Element]:
    """Return an element for each line such as `` 3. put_get_utf8_segment.. pass``."""
    found, program = [], ''
    for line in output.splitlines():
        if match := re.match(r"-> running `(\w+)'", line):
            program = match[1]
        elif match := re.match(r' *\d+\. (\w+)\.* (pass|FAIL|SKIPPED)', line):
            case = ElementTree.Element('testcase', classname=program, name=match[1])
            if match[2] != 'pass':
                ElementTree.SubElement(case, {'FAIL': 'failure', 'SKIPPED': 'skipped'}[match[2]])
            found.append(case)
    return found


if __name__ == '__main__':
    sys.exit(main(sys.argv[1]))
