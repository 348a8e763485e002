"""The mutants and the changes of the sanitizers fit the code: to run them takes a while."""

import pytest

from tests import sanitizers
from tests.mutants.edits import Misfit, Mutant, Sources, names

CODE = '''
class Reader:
    def read(self, n):
        """Read."""
        if n < 0:
            raise ValueError(n)
        return self.file.read(n)

    def skip(self, n):
        return self.file.read(n)
'''
MUTANT = '''A negative size is taken.
Tests: tests/faults/test_mutants.py

@ Reader.read
 if n < 0:
-    raise ValueError(n)
+    n = 0
'''


def applied(folder, code, mutant=MUTANT):
    """The code of a package with one module, after *mutant*."""
    package = folder / 'greenaio'
    package.mkdir()
    (package / 'reader.py').write_text(code)
    Mutant.parse('mutant', mutant).write(folder)
    return (package / 'reader.py').read_text()


def test_each_mutant_fits_the_code():
    sources = Sources()
    misfits = {name: Mutant.read(name).misfit(sources) for name in names()}
    assert misfits == dict.fromkeys(names(), '')


def test_each_change_of_the_sanitizers_fits_the_code():
    texts = [change[:2] for change in sanitizers.CHANGES] + [row[1:3] for row in sanitizers.BREAKS]
    misfits = [(name, old) for name, old in texts if (sanitizers.ROOT / name).read_text().count(old) != 1]
    assert misfits == []


def test_a_mutant_edits_one_place(tmp_path):
    assert applied(tmp_path, CODE) == CODE.replace('raise ValueError(n)', 'n = 0')


@pytest.mark.parametrize('old, new', [
    ('    def skip', '    def skip_over'),
    ('"""Read."""', '"""Read *n* bytes."""'),
    ('        if n < 0:\n', '        if n < 0:              # from a caller\n\n            # Refuse it.\n'),
    ('return self.file.read(n)', 'return self.stream.read(n)'),
    ('class Reader', 'import io\n\nclass Reader'),
])
def test_a_mutant_fits_when_the_code_beside_its_anchor_changes(tmp_path, old, new):
    code = CODE.replace(old, new)
    assert code != CODE
    assert applied(tmp_path, code) == code.replace('raise ValueError(n)', 'n = 0')


def test_a_mutant_fits_code_that_is_indented_deeper(tmp_path):
    inner = CODE.replace('        if n < 0:\n            raise', '        with self:\n'
                         '            if n < 0:\n                raise')
    assert '                n = 0\n' in applied(tmp_path, inner)


@pytest.mark.parametrize('old, new', [
    ('raise ValueError(n)', 'raise OSError(n)'),                            # none left
    ('        return self.file.read(n)\n\n', '        if n < 0:\n            raise ValueError(n)\n\n'),
    ('def read', 'def pull'),
    ('class Reader', 'class Puller'),
])
def test_a_mutant_without_one_place_is_a_misfit(tmp_path, old, new):
    with pytest.raises(Misfit):
        applied(tmp_path, CODE.replace(old, new))


@pytest.mark.parametrize('text', [
    MUTANT.replace('Tests: tests/faults/test_mutants.py', ''),
    MUTANT.partition('@')[0],
    MUTANT.replace(' if n < 0:\n-    raise ValueError(n)\n', ''),           # nothing to be found
    MUTANT.replace('+    n = 0', '?    n = 0'),
])
def test_a_mutant_that_is_not_whole_is_refused(text):
    with pytest.raises(ValueError, match='a mutant has|bad edit'):
        Mutant.parse('mutant', text)
