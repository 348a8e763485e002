"""A Flask app that takes uploads and sends files, and knows nothing of greenaio:

    GREENAIO_PATCH=1 FILES=/srv/files gunicorn -k gevent -w 2 --preload --chdir examples flask_gunicorn:app

gunicorn's gevent worker calls ``gevent.monkey.patch_all()``, and greenaio's plugin, asked by the environment,
patches `os` and ``open`` there. What Flask and werkzeug read and write stops no other request then.

    curl -T picture.jpg http://127.0.0.1:8000/picture.jpg
    curl -r 0-99 http://127.0.0.1:8000/picture.jpg

Needs Flask and gunicorn, and a folder that is there; without FILES that is the temporary one.
"""

from __future__ import annotations

import os
import pathlib
import tempfile

from flask import Flask, Response, abort, jsonify, request, send_from_directory
from werkzeug.utils import secure_filename

FILES = pathlib.Path(os.environ.get('FILES') or tempfile.gettempdir()).resolve()
if not FILES.is_dir():
    raise SystemExit(f'flask_gunicorn.py: FILES={FILES} is no folder')
BLOCK = 256 << 10                       # bytes

app = Flask(__name__)
app.config['MAX_CONTENT_LENGTH'] = 64 << 20


@app.get('/ping')
def ping() -> str:
    return 'pong'


@app.get('/')
def names() -> Response:
    return jsonify(sorted(entry.name for entry in os.scandir(FILES) if not entry.name.startswith('.')))


@app.get('/<name>')
def download(name: str) -> Response:
    return send_from_directory(FILES, secure_filename(name) or abort(400))


@app.put('/<name>')
def upload(name: str) -> tuple[str, int]:
    """Written beside it, durable, then renamed: a torn upload leaves nothing."""
    if not name or name != secure_filename(name) or 'Content-Range' in request.headers:
        abort(400)                      # Content-Range: a part is not the file
    if (FILES / name).is_dir():
        abort(409)
    with tempfile.NamedTemporaryFile(dir=FILES, prefix='.upload-', delete=False) as file:
        try:
            done = 0
            while block := request.stream.read(BLOCK):
                done += file.write(block)
            if done != request.content_length and request.headers.get('Transfer-Encoding') != 'chunked':
                abort(400)              # of chunks gunicorn saw the end
            file.flush()
            os.fsync(file.fileno())
            os.rename(file.name, FILES / name)
        except BaseException:
            os.unlink(file.name)
            raise
    folder = os.open(FILES, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return '', 201
