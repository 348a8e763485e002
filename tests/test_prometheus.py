"""What Prometheus is told, by a scrape and by its own parser."""

import importlib.util
import math
import os
import shutil
import tempfile
from types import SimpleNamespace

import pytest
from test_object_server import Server

import greenaio
from tests.support.disks import real_disk
from tests.support.processes import run_python

prometheus_client = pytest.importorskip('prometheus_client')
parser = pytest.importorskip('prometheus_client.parser')
requests = pytest.importorskip('requests')

from greenaio._core.counters import COUNTERS  # noqa: E402
from greenaio.prometheus import Collector  # noqa: E402

has_stats = pytest.mark.skipif(importlib.util.find_spec('greenaio._operate.stats') is None,
                               reason='greenaio.stats is not there yet')
WAYS = [(way, direction) for way in ('aio', 'thread') for direction in ('read', 'write', 'sync', 'other')]


def latency(count):
    return SimpleNamespace(count=count, sum=count * 0.5, max=math.nan,
                           p50=math.nan, p90=math.nan, p99=math.nan, p999=math.nan,
                           buckets=((1e-06, 0), (0.5, count // 2), (64.0, count)))


@pytest.fixture
def told(monkeypatch):
    """`greenaio.stats()` says this: each number is another."""
    stats = SimpleNamespace(**{counter.name: 100 + i for i, counter in enumerate(COUNTERS)},
                            latency={labels: latency(2 * i) for i, labels in enumerate(WAYS)})
    monkeypatch.setattr(greenaio, 'stats', lambda: stats, raising=False)
    return stats


def scrape(registry):
    """{name and labels: value}, as who scrapes has it."""
    return values(prometheus_client.generate_latest(registry).decode())


def values(text):
    return {(sample.name, *sorted(sample.labels.items())): sample.value
            for family in parser.text_string_to_metric_families(text) for sample in family.samples}


@pytest.fixture
def registry(told):
    registry = prometheus_client.CollectorRegistry(auto_describe=True)
    Collector(registry)
    return registry


def test_every_number_is_told_under_a_name_of_its_own(registry, told):
    found = scrape(registry)
    for counter in COUNTERS:
        suffix = '_total' if counter.kind == 'counter' else ''
        assert found[f'greenaio_{counter.metric}{suffix}',] == getattr(told, counter.name)


def test_latency_is_a_histogram_per_way_and_direction(registry, told):
    found = scrape(registry)
    name = 'greenaio_request_duration_seconds'
    for (way, direction), expected in told.latency.items():
        labels = (('direction', direction), ('way', way))
        assert found[(f'{name}_count', *labels)] == expected.count
        assert found[(f'{name}_sum', *labels)] == expected.sum
        for bound, count in ((1e-06, 0), (0.5, expected.count // 2), (64.0, expected.count),
                             ('+Inf', expected.count)):
            assert found[f'{name}_bucket', labels[0], ('le', str(bound)), labels[1]] == count


def test_names_follow_the_conventions(registry):
    for family in parser.text_string_to_metric_families(prometheus_client.generate_latest(registry).decode()):
        assert family.name.startswith('greenaio_') and family.name == family.name.lower()
        assert family.documentation.endswith('.') and family.type in ('gauge', 'counter', 'histogram')
        if family.type == 'histogram':
            assert family.name.endswith('_seconds') and family.unit in ('', 'seconds')


def test_registering_asks_for_no_numbers(monkeypatch):
    monkeypatch.setattr(greenaio, 'stats', lambda: pytest.fail('asked'), raising=False)
    registry = prometheus_client.CollectorRegistry(auto_describe=True)
    collector = Collector(registry)
    with pytest.raises(ValueError):
        Collector(registry)             # one is enough
    registry.unregister(collector)
    Collector(registry)
    Collector(None)


def test_without_a_registry_it_is_that_of_prometheus_client(told):
    collector = Collector()
    try:
        assert ('greenaio_hubs',) in scrape(prometheus_client.REGISTRY)
    finally:
        prometheus_client.REGISTRY.unregister(collector)


def test_importing_greenaio_imports_nothing_of_it():
    done = run_python('import sys, gevent, greenaio, greenaio.os; print(*sys.modules)')
    assert not {'prometheus_client', 'greenaio.prometheus'} & set(done.stdout.split())


# examples/object_server.py -----------------------------------------------------------------------

@pytest.fixture
def serve(monkeypatch):
    """Start the object store with more in its environment."""
    folder = tempfile.mkdtemp(dir=real_disk(), prefix='greenaio-test-')
    started = []

    def serve(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        started.append(Server(os.path.join(folder, 'root')))
        return started[-1]

    os.mkdir(os.path.join(folder, 'root'))
    yield serve
    for server in started:
        server.stop()
    shutil.rmtree(folder)


def test_without_prometheus_client_the_server_says_so(serve, tmp_path):
    (tmp_path / 'prometheus_client.py').write_text('raise ImportError')
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get('PYTHONPATH')]))
    server = serve(PYTHONPATH=path)
    answer = server('GET', '/metrics')
    assert answer.status_code == 501
    assert answer.json() == {'error': 'prometheus_client is not installed'}
    assert server('GET', '/').status_code == 200


def test_who_scrapes_has_a_token_that_opens_nothing_else(serve):
    server = serve(OBJECT_SERVER_METRICS_TOKEN='scrape')
    scraper = {'Authorization': 'Bearer scrape'}
    assert requests.get(server.url + '/metrics', timeout=20).status_code == 401
    for method, path in (('GET', '/'), ('PUT', '/object'), ('DELETE', '/metrics'), ('PUT', '/metrics')):
        assert server(method, path, headers=scraper, data=b'x').status_code == 401
    for method in ('PUT', 'DELETE'):                            # and nobody has an object of that name
        assert server(method, '/metrics', data=b'x').status_code == 400


@has_stats
def test_prometheus_scrapes_the_server(serve):
    server = serve(OBJECT_SERVER_METRICS_TOKEN='scrape')
    scraper = {'Authorization': 'Bearer scrape'}
    assert requests.get(server.url + '/metrics', timeout=20).status_code == 401
    before = server('GET', '/metrics')
    assert before.status_code == 200 and before.headers['Content-Type'].startswith('text/plain; version=')
    for i in range(3):
        assert server('PUT', f'/{i}', data=os.urandom(300_000)).status_code == 201
        assert server('GET', f'/{i}').status_code == 200
    before, after = values(before.text), values(server('GET', '/metrics', headers=scraper).text)

    def grown(name, *labels):
        return after[(name, *labels)] - before[(name, *labels)]

    # Each upload is written by threads, and made durable by native AIO or by those.
    duration = 'greenaio_request_duration_seconds_count'
    written = grown(duration, ('direction', 'write'), ('way', 'thread'))
    assert written >= 3
    assert grown('greenaio_requests_by_thread_total') >= written
    assert sum(grown(duration, ('direction', 'sync'), ('way', way)) for way in ('aio', 'thread')) >= 6
    assert grown('greenaio_requests_submitted_total') >= grown('greenaio_requests_completed_total') >= 0
    assert after['greenaio_hubs',] == 1 and after['greenaio_requests_in_flight',] == 0
    assert after['process_open_fds',] > 0       # what else an operator wants
    for way, direction in WAYS:
        mine = [key for key in after if key[0] == duration.replace('count', 'bucket')
                and ('way', way) in key and ('direction', direction) in key]
        counts = [after[key] for key in sorted(mine, key=lambda key: float(dict(key[1:])['le']))]
        assert counts == sorted(counts) and len(counts) > 20
        assert counts[-1] == after[duration, ('direction', direction), ('way', way)]
