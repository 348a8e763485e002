"""The search for hard English looks at prose, and at nothing else."""

import pytest

from tests import prose


def found(folder, name, text):
    path = folder / name
    path.write_text(text)
    return [(line, words) for line, words, _ in prose.findings(path)]


@pytest.mark.parametrize('text, wanted', [
    ('# Nobody waits; nobody\n', [(1, 'Nobody'), (1, 'nobody')]),
    ('x = 1      # meanwhile\n', [(1, 'meanwhile')]),
    ('"""Do.\n\nWhat is read goes on.\n"""\n', [(3, 'What')]),
    ('# One line,\n# and who reads\n', [(2, 'who')]),
    ('cdef extern from *:\n    """\n    /* those of\n       another */\n    """\n', [(3, 'those of')]),
    ('"""Which files it has."""\n', [(1, 'Which')]),
    ('# It waits; what was asked\n# has changed, by way of others\n', [(1, 'what was'), (2, 'by way of')]),
    ('# Which way ------\n\n# It asks which way, and how often.\n', []),
    ("nobody = 'who' + \"what\"     # a user\n", []),
    ('# `nobody` is a user, and ``meanwhile`` a word\n', []),
])
def test_comments_and_docstrings_are_prose(tmp_path, text, wanted):
    assert found(tmp_path, 'module.pyx', text) == wanted


def test_code_blocks_and_tables_are_no_prose(tmp_path):
    text = 'Text, once more.\n\n```python\nnobody = who\n```\n\n| who | what |\n\nAs a rule, but as a rule.\n'
    assert found(tmp_path, 'page.md', text) == [(1, 'once more'), (9, 'As a rule'), (9, 'as a rule')]


def test_a_file_may_not_get_worse(tmp_path, monkeypatch, capsys):
    page = tmp_path / 'page.md'
    monkeypatch.setattr(prose, 'ROOT', tmp_path)
    monkeypatch.setattr(prose, 'ALLOWED', tmp_path / 'prose.txt')
    monkeypatch.setattr(prose, 'files', lambda: [page])

    def status(text, *args):
        page.write_text(text)
        monkeypatch.setattr('sys.argv', ['prose', *args])
        return prose.main()

    assert status('Nobody, and nobody.\n', '--update') == 0
    assert (tmp_path / 'prose.txt').read_text() == 'page.md 2\n'
    assert status('Once more, nobody.\n') == 0
    assert status('Once more, nobody. Whoever.\n') == 1
    assert 'page.md has 3 findings, not 2' in capsys.readouterr().out
    assert status('Once more, nobody. Whoever.\n', '--update') == 1
    assert status('No greenlet.\n', '--update') == 0
    assert (tmp_path / 'prose.txt').read_text() == ''
