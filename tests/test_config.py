"""Settings come from the environment and say where they came from. A program that asked for greenaio learns
of a mistake, other programs do not."""

import json
import os
import subprocess
import sys
import warnings

import pytest

from greenaio import _config
from greenaio._config import SETTINGS, Config
from tests.support.processes import make_plugin_visible, run_python


@pytest.fixture
def environment(monkeypatch):
    """Without any of our variables; for ``setenv``."""
    for setting in SETTINGS:
        monkeypatch.delenv(setting.variable, raising=False)
    return monkeypatch


def test_defaults_suit_a_server(environment):
    config = Config()
    assert (config.depth, config.poll_max_us, config.threads, config.stuck_after) == (256, 0, 16, 30)
    assert {config.source(setting.name) for setting in SETTINGS} == {'default'}


def test_each_setting_is_an_attribute_a_variable_and_a_paragraph():
    assert [setting.name for setting in SETTINGS] != []
    assert {setting.name for setting in SETTINGS} == set(Config.__slots__) - {'_mistake', '_sources'}
    for setting in SETTINGS:
        assert setting.default in setting.allowed and setting.unit
        assert (f'``{setting.name}`` ({setting.variable}, default {setting.default} {setting.unit}'
                in Config.__doc__)
        assert setting.description in Config.__doc__


def test_attributes_are_slots_that_cython_reads_fast():
    assert not hasattr(Config(), '__dict__')
    assert type(Config.__dict__['poll_max_us']).__name__ == 'member_descriptor'


def test_a_value_knows_where_it_came_from(environment):
    environment.setenv('GREENAIO_DEPTH', ' 64 ')
    environment.setenv('GREENAIO_THREADS', '')          # as if it were not there
    config = Config()
    config.poll_max_us = 50
    assert (config.depth, config.threads, config.poll_max_us) == (64, 16, 50)
    assert [config.source(name) for name in ('depth', 'threads', 'poll_max_us')] == [
        'GREENAIO_DEPTH', 'default', 'program']
    config.depth = 64
    assert config.source('depth') == 'program'


@pytest.mark.parametrize('variable, text, complaint', [
    ('GREENAIO_DEPTH', '0', 'GREENAIO_DEPTH must be from 1 to 65536 requests, not 0'),
    ('GREENAIO_DEPTH', '65537', 'GREENAIO_DEPTH must be from 1'),
    ('GREENAIO_THREADS', 'many', "GREENAIO_THREADS must be a whole number of threads, not 'many'"),
    ('GREENAIO_STUCK_AFTER', '1.5', "GREENAIO_STUCK_AFTER must be a whole number of s, not '1.5'"),
    ('GREENAIO_STUCK_AFTER', '86401', 'GREENAIO_STUCK_AFTER must be from 0 to 86400 s, not 86401'),
    ('GREENAIO_POLL_MAX_US', '-1', 'GREENAIO_POLL_MAX_US must be from 0 to 1000000 µs, not -1'),
])
def test_a_mistake_in_a_variable_is_named(environment, variable, text, complaint):
    environment.setenv(variable, text)
    config = Config()
    environment.setattr(_config, 'config', config)
    for _ in range(2):
        with pytest.raises(ValueError) as caught:
            _config.check_environment()
        assert complaint in str(caught.value)
    assert {config.source(setting.name) for setting in SETTINGS} == {'default'}


@pytest.mark.parametrize('variable, complaint', [
    ('GREENAIO_DEPHT', 'GREENAIO_DEPHT is in the environment, but greenaio knows no such variable: '
                       'did you mean GREENAIO_DEPTH?'),
    ('GREENAIO_PACTH', 'GREENAIO_PACTH is in the environment, but greenaio knows no such variable: '
                       'did you mean GREENAIO_PATCH?'),
    ('GREENAIO_ZQXJ', 'GREENAIO_ZQXJ is in the environment, but greenaio knows no such variable'),
])
def test_an_unknown_variable_is_a_warning_once(environment, variable, complaint):
    environment.setenv(variable, '1')
    environment.setattr(_config, '_is_checked', False)
    with pytest.warns(RuntimeWarning) as caught:
        _config.check_environment()
        _config.check_environment()
    assert [str(one.message) for one in caught] == [complaint]


@pytest.mark.parametrize('variable', [
    'GREENAIO_SERVICE_HOST', 'GREENAIO_SERVICE_PORT', 'GREENAIO_SERVICE_PORT_HTTP', 'GREENAIO_PORT',
    'GREENAIO_API_PORT_8080_TCP', 'GREENAIO_PORT_53_UDP_ADDR', 'GREENAIO_DEPTH_SERVICE_HOST'])
def test_variables_of_a_service_that_is_named_greenaio_are_no_mistake(environment, variable):
    environment.setenv(variable, 'tcp://10.0.0.1:8080')
    environment.setattr(_config, '_is_checked', False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        _config.check_environment()


MISTAKES = {'GREENAIO_DEPTH': 'deep', 'GREENAIO_ZQXJ': '1'}
FIRST_READ = 'import greenaio.os, os; greenaio.os.pread(os.open("/etc/hostname", 0), 1, 0)'


@pytest.mark.parametrize('program', [
    'import greenaio', 'import gevent.monkey; gevent.monkey.patch_all()'], ids=['imports', 'patches'])
def test_program_that_does_not_use_greenaio_hears_of_no_mistake(program, tmp_path):
    run_python(program, env={**MISTAKES, **make_plugin_visible(tmp_path)})


@pytest.mark.parametrize('program', [
    'import greenaio.monkey; greenaio.monkey.patch_all()',
    'import greenaio.monkey; greenaio.monkey.patch_os()',
    'import greenaio.monkey; greenaio.monkey.patch_builtins()',
    'import gevent.monkey; gevent.monkey.patch_all(greenaio=True)', FIRST_READ])
def test_program_that_asks_for_greenaio_hears_of_a_mistake(program, tmp_path):
    done = run_python(program, env={**MISTAKES, **make_plugin_visible(tmp_path)}, check=False)
    assert done.returncode == 1
    assert "ValueError: GREENAIO_DEPTH must be a whole number of requests, not 'deep'" in done.stderr
    assert 'RuntimeWarning: GREENAIO_ZQXJ is in the environment' in done.stderr


@pytest.mark.parametrize('name, value, error', [
    ('depth', 0, ValueError), ('depth', 65537, ValueError), ('depth', 1.5, TypeError),
    ('depth', '5', TypeError), ('poll_max_us', -1, ValueError), ('threads', 1025, ValueError),
    ('stuck_after', None, TypeError), ('stuck_after', -1, ValueError), ('detph', 5, AttributeError),
])
def test_what_the_program_sets_is_looked_at_too(environment, name, value, error):
    config = Config()
    with pytest.raises(error) as caught:
        setattr(config, name, value)
    assert name in str(caught.value)
    assert {config.source(setting.name) for setting in SETTINGS} == {'default'}


def show(*arguments, **env):
    done = command(*arguments, **env)
    assert (done.returncode, done.stderr) == (0, '')
    return done.stdout


def command(*arguments, **env):
    return run_python('''
        import runpy, sys
        for name in sys.argv.pop().split():
            sys.modules[name] = None        # importing it raises ImportError
        sys.argv[0] = 'greenaio'
        runpy.run_module('greenaio', run_name='__main__', alter_sys=True)
    ''', 'config', *arguments, env.pop('without', ''), env=env, check=False)


@pytest.mark.parametrize('without', ['', 'rich'])
def test_command_prints_each_setting_with_where_it_came_from(without):
    lines = show(GREENAIO_STUCK_AFTER='5', GREENAIO_PATCH='1', without=without).splitlines()

    def words(name):
        return next(line for line in lines if f' {name} ' in f' {line}').replace('│', ' ').split()

    assert words('depth')[:4] == ['depth', '256', 'requests', 'default']
    assert words('stuck_after')[:4] == ['stuck_after', '5', 's', 'GREENAIO_STUCK_AFTER']
    assert words('GREENAIO_PATCH')[:2] == ['GREENAIO_PATCH', '1']
    assert max(map(len, lines)) <= 120


def test_command_prints_json_for_machines():
    found = json.loads(show('--json', GREENAIO_DEPTH='32'))
    assert [one['name'] for one in found] == [setting.name for setting in SETTINGS]
    assert found[0]['value'] == 32 and found[0]['source'] == found[0]['variable'] == 'GREENAIO_DEPTH'
    assert found[3] == {'name': 'stuck_after', 'variable': 'GREENAIO_STUCK_AFTER', 'value': 30, 'default': 30,
                        'unit': 's', 'from': 0, 'to': 86400, 'source': 'default',
                        'description': SETTINGS[3].summary}


def test_command_needs_none_of_what_others_need():
    done = run_python('''
        import sys
        from greenaio import __main__
        sys.argv[1:] = ['config', '--json']
        assert __main__.main() == 0
        print(*sys.modules, file=sys.stderr)
    ''', check=False)
    loaded = set(done.stderr.split())
    assert 'greenaio._config' in loaded
    assert not loaded & {'greenaio._commands.bench', 'greenaio._commands.doctor', 'greenaio.monkey', 'rich'}


def test_unknown_command_is_one_line():
    done = subprocess.run([sys.executable, '-m', 'greenaio', 'confg'], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 2
    assert "'confg'" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize('arguments, told', [
    (['doctr'], 'python -m greenaio: there is no command \'doctr\', did you mean doctor?; --help tells more'),
    (['config', '--jsno'], 'python -m greenaio config: there is no --jsno; --help tells more'),
    ([], 'python -m greenaio: a command is missing, one of bench, config, doctor, run; --help tells more'),
    (['--versoin'], 'python -m greenaio: there is no --versoin; --help tells more'),
    (['run'], 'python -m greenaio run: the following arguments are required: script; --help tells more'),
    (['run', '-m', 'no_such.module'], 'python -m greenaio run: there is no module no_such.module'),
])
def test_mistake_in_a_command_is_one_line_that_helps(arguments, told):
    done = subprocess.run([sys.executable, '-m', 'greenaio', *arguments], capture_output=True, text=True,
                          timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, '', told + '\n')


def test_reader_of_the_output_may_go():
    reading, writing = os.pipe()
    os.close(reading)
    for without in ('', 'sys.modules["rich"] = None; '):
        done = subprocess.run(
            [sys.executable, '-c', f'import runpy, sys; {without}'
             'runpy.run_module("greenaio", run_name="__main__", alter_sys=True)', 'config'],
            stdout=writing, stderr=subprocess.PIPE, timeout=60)
        assert (done.returncode, done.stderr) == (1, b'')
    os.close(writing)


@pytest.mark.parametrize('arguments', [['config'], ['doctor'],
                                       ['bench', '--size', '1M', '--seconds', '0.1', '--depths', '1']])
@pytest.mark.parametrize('without', ['', 'import sys; sys.modules["rich"] = None; '], ids=['rich', 'plain'])
def test_output_that_takes_nothing_is_one_line(arguments, without):
    with open('/dev/full', 'w') as full:
        done = subprocess.run(
            [sys.executable, '-c', f'import runpy; {without}'
             'runpy.run_module("greenaio", run_name="__main__", alter_sys=True)', *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.endswith(f' {arguments[0]}: standard output: No space left on device\n')
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize('variable, value, status, told', [
    ('GREENAIO_DEPTH', 'deep', 2, "GREENAIO_DEPTH must be a whole number of requests, not 'deep'"),
    ('GREENAIO_DEPHT', '3', 0, 'GREENAIO_DEPHT is in the environment, but greenaio knows no such variable: '
                               'did you mean GREENAIO_DEPTH?')])
def test_mistake_in_the_environment_is_one_line_on_the_command_line(variable, value, status, told):
    done = subprocess.run([sys.executable, '-m', 'greenaio', 'config'], capture_output=True, text=True,
                          timeout=60, env={**os.environ, variable: value})
    assert (done.returncode, bool(done.stdout)) == (status, status == 0)
    assert done.stderr == f'python -m greenaio: {told}\n'


@pytest.mark.parametrize('arguments', [['config'], ['doctor', '/etc/passwd']], ids=lambda words: words[0])
def test_output_fits_into_a_narrow_terminal(arguments):
    done = subprocess.run(
        [sys.executable, '-c', 'import runpy, sys; sys.modules["rich"] = None; '
         'runpy.run_module("greenaio", run_name="__main__", alter_sys=True)', *arguments],
        text=True, capture_output=True, timeout=60, env={**os.environ, 'COLUMNS': '80'})
    assert done.stdout and done.stderr == ''
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_nothing_of_the_table_is_lost_on_the_way():
    assert _config.config.source('depth') in ('default', 'GREENAIO_DEPTH', 'program')
    with pytest.raises(KeyError):
        _config.config.source('patch')
