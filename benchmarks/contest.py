"""Contestants take turns, and a ratio is one of the same round: a machine that is noisy is so for both.

A `Contest` is one piece of work and the ways to do it. `run` goes through all contests round by round, with
another way first in each; what is said of them are medians of rounds, with the lowest and the highest.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Figures = dict[str, float]      # of one round, by name: 'iops', 'cpu_us' …


@dataclass(frozen=True)
class Bar:
    """What is wanted: the ratio of *way*'s figure to that of *beside*, at least or at most *bound*. Without
    *beside* it is the figure itself."""

    bound: float
    figure: str
    way: str
    beside: str = ''
    most: bool = False

    def is_met(self, value: float) -> bool:
        return value <= self.bound if self.most else value >= self.bound


@dataclass
class Contest:
    work: str
    ways: dict[str, Callable[[], Figures]]
    depth: int = 0              # for the plots; 0: it has none
    bars: tuple[Bar, ...] = ()
    rounds: dict[str, list[Figures]] = field(default_factory=dict)

    def one_round(self, number: int, step: Callable[[str], None]) -> None:
        names = list(self.ways)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            step(f'{self.work}: {name}')
            self.rounds.setdefault(name, []).append(self.ways[name]())

    def figures(self) -> list[str]:
        return list(dict.fromkeys(name for way in self.ways for one in self.rounds[way] for name in one))

    def median(self, way: str, figure: str) -> float | None:
        values = [one[figure] for one in self.rounds[way] if figure in one]
        return statistics.median(values) if values else None

    def ratios(self, figure: str, way: str, beside: str = '') -> list[float]:
        """Of each round, sorted; of the figure itself without *beside*."""
        ours = self.rounds[way]
        others = self.rounds[beside] if beside else [{figure: 1.0}] * len(ours)
        pairs = zip(ours, others, strict=True)
        return sorted(one[figure] / (other[figure] or math.nan) for one, other in pairs)


def run(contests: Iterable[Contest], rounds: int, step: Callable[[str], None]) -> None:
    for number in range(rounds):
        for contest in contests:
            contest.one_round(number, step)


# What is said of it ------------------------------------------------------------------------------

LABELS = {'iops': 'IOPS', 'mib_s': 'MiB/s', 'cpu_us': 'CPU µs', 'p50_us': 'p50 µs', 'p99_us': 'p99 µs',
          'gap_p99_ms': 'gap p99 ms', 'gap_max_ms': 'gap max ms', 'us': 'µs', 'least_us': 'least µs',
          'seconds': 's', 'ms': 'ms', 'p99_ms': 'p99 ms', 'cpu': 'processors', 'per_second': 'requests/s'}


def number(value: float | None) -> str:
    if value is None:
        return '–'
    return f'{value:,.0f}' if value >= 1000 else f'{value:.1f}' if value >= 100 else f'{value:.2f}'


def spread(ratios: list[float]) -> str:
    return f'{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})'


def table(contests: list[Contest]) -> str:
    """In Markdown: medians, and the first figure's ratio to that of the first way."""
    figures = list(dict.fromkeys(name for contest in contests for name in contest.figures()))
    heads = ' | '.join(LABELS[name] for name in figures)
    lines = [f'| work | way | {heads} | ratio (lowest, highest) |',
             '|---|---|' + '---:|' * len(figures) + '---|']
    for contest in contests:
        first = next(iter(contest.ways))
        figure = contest.figures()[0]
        for way in contest.ways:
            cells = [number(contest.median(way, name)) for name in figures]
            ratio = '1' if way == first else spread(contest.ratios(figure, first, way))
            lines.append(f'| {contest.work} | {way} | ' + ' | '.join(cells) + f' | {ratio} |')
    return '\n'.join(lines) + '\n'


def verdicts(contests: Iterable[Contest]) -> list[dict[str, Any]]:
    """Of each bar: what it is, the median ratio with its spread, whether that reaches it."""
    found = []
    for contest in contests:
        for bar in contest.bars:
            if bar.way not in contest.ways or bar.beside and bar.beside not in contest.ways:
                continue
            ratios = contest.ratios(bar.figure, bar.way, bar.beside)
            found.append({
                'work': contest.work, 'figure': LABELS[bar.figure], 'way': bar.way, 'beside': bar.beside,
                'wanted': f'{"at most" if bar.most else "at least"} {bar.bound:.3g}'
                          + (' ×' if bar.beside else ''),
                'measured': spread(ratios), 'is_met': bar.is_met(statistics.median(ratios))})
    return found


def bars_table(found: list[dict[str, Any]]) -> str:
    lines = ['| work | figure | wanted | measured (lowest, highest) | |', '|---|---|---|---|---|']
    for one in found:
        who = f'{one["way"]}, {one["figure"]}' + (f', beside {one["beside"]}' if one['beside'] else '')
        lines.append(f'| {one["work"]} | {who} | {one["wanted"]} | {one["measured"]} '
                     f'| {"reached" if one["is_met"] else "**not reached**"} |')
    return '\n'.join(lines) + '\n'


def plot(contests: list[Contest], title: str, path: str) -> None:
    """Over the depth where there is one, else as bars."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    deep = [contest for contest in contests if contest.depth]
    if len({contest.depth for contest in deep}) > 1:
        figures = [name for name in ('iops', 'cpu_us', 'p99_us') if name in deep[0].figures()]
        kinds = list(dict.fromkeys(contest.work.rpartition(',')[0] for contest in deep))
        size = (6 * len(figures), 4.5 * len(kinds))
        drawing, axes = pyplot.subplots(len(kinds), len(figures), figsize=size, layout='constrained',
                                        squeeze=False)
        for row, kind in zip(axes, kinds):
            mine = [contest for contest in deep if contest.work.rpartition(',')[0] == kind]
            for axis, figure in zip(row, figures):
                for way in dict.fromkeys(way for contest in mine for way in contest.ways):
                    points = [(contest.depth, contest.median(way, figure)) for contest in mine
                              if way in contest.ways and contest.median(way, figure) is not None]
                    if points:
                        axis.plot(*zip(*points), 'o-', label=way)
                axis.set(xscale='log', yscale='log', xlabel='depth', title=f'{kind}: {LABELS[figure]}')
                depths = sorted({contest.depth for contest in mine})
                axis.set_xticks(depths, map(str, depths))
                axis.grid(alpha=0.3)
            row[0].legend(fontsize='small')
    else:
        drawing, axes = pyplot.subplots(1, len(contests), figsize=(5 * len(contests), 4),
                                        layout='constrained', squeeze=False)
        for axis, contest in zip(axes[0], contests):
            first = contest.figures()[0]
            ways = list(contest.ways)
            axis.bar(ways, [contest.median(way, first) for way in ways])
            axis.set(title=f'{contest.work}: {LABELS[first]}')
            axis.tick_params(axis='x', rotation=20)
    drawing.suptitle(title)
    drawing.savefig(path, dpi=100)
    pyplot.close(drawing)
