"""From samples to medians, targets with their verdicts, tables and plots; pure but for the plots' files."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30
MIB = 1 << 20

LOCAL = "local file"
RAW = "raw download"
OURS = "modelfs kernel"
RIVAL = "rclone"


@dataclass(frozen=True, slots=True)
class Unit:
    """What a figure is measured in, and whether more of it is better."""

    name: str
    more_is_better: bool
    show: Callable[[float], str]


RATE = Unit("GB/s", True, lambda value: f"{value / 1e9:.2f}")
IOPS = Unit("1/s", True, lambda value: f"{value:,.0f}")
SECONDS = Unit("s", False, lambda value: f"{value:.2f}")
CPU = Unit("CPU s per GiB", False, lambda value: f"{value:.2f}")
MEMORY = Unit("MiB", False, lambda value: f"{value / MIB:.0f}")
COUNT = Unit("requests", False, lambda value: f"{value:,.0f}")

FIGURES: dict[str, Unit] = {
    "cold sequential read": RATE,
    "cold sequential read, shaped": RATE,
    "cold read, 8 processes": RATE,
    "warm sequential read": RATE,
    "warm mmap load of safetensors": RATE,
    "warm read, 1 process": RATE,
    "warm read, 8 processes": RATE,
    "warm random reads of 4 KiB": IOPS,
    "warm random reads of 1 MiB": IOPS,
    "cold from_pretrained": SECONDS,
    "cold from_pretrained, shaped": SECONDS,
    "cold from_pretrained and first answer": SECONDS,
    "cold from_pretrained and first answer, shaped": SECONDS,
    "warm from_pretrained": SECONDS,
    "mount": SECONDS,
    "first ls -lR of 10,000 files": SECONDS,
    "second ls -lR of 10,000 files": SECONDS,
    "first ls -lR of 100,000 files": SECONDS,
    "second ls -lR of 100,000 files": SECONDS,
    "open and stat of missing names": IOPS,
    "store requests for missing names": COUNT,
    "CPU of the daemon, cold read": CPU,
    "CPU of the daemon, warm read": CPU,
    "peak RSS of the daemon": MEMORY,
}
"""What is measured, in the order of the table."""

Samples = dict[tuple[str, str], list[float]]
"""All values of (figure, contender), in the unit's base: bytes or counts per second, seconds, bytes."""

Medians = dict[tuple[str, str], float]


def medians(samples: Samples) -> Medians:
    """Return the median of each; of the memory, the most there ever was."""
    return {
        (figure, contender): (max if FIGURES[figure] is MEMORY else statistics.median)(values)
        for (figure, contender), values in samples.items()
    }


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a ratio: a figure of the best of some contenders."""

    figure: str
    contenders: tuple[str, ...]

    def value(self, found: Medians) -> float | None:
        """Return the best value there is, or None."""
        values = [found[self.figure, each] for each in self.contenders if (self.figure, each) in found]
        best = max if FIGURES[self.figure].more_is_better else min
        return best(values) if values else None


@dataclass(frozen=True, slots=True)
class Target:
    """`ours` ÷ `theirs`, or `ours` alone, shall be at least or at most `bound`."""

    work: str
    ours: Side
    theirs: Side | None
    at_least: bool
    bound: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a target; `value` is None if one of its sides was not measured."""

    work: str
    bound: str
    value: str
    met: bool | None


def _ratio(work: str, ours: Side, theirs: Side, bound: float, at_least: bool = True) -> Target:
    return Target(work, ours, theirs, at_least, bound)


def _of(figure: str, *contenders: str) -> Side:
    return Side(figure, contenders or (OURS,))


RAWS = (f"{RAW} (8)", f"{RAW} (16)")
"""The raw download over so many connections; targets compare with the faster one."""

TARGETS = (
    _ratio(
        "warm sequential read ÷ local file",
        _of("warm sequential read"),
        _of("warm sequential read", LOCAL),
        0.95,
    ),
    _ratio(
        "warm mmap load ÷ local file",
        _of("warm mmap load of safetensors"),
        _of("warm mmap load of safetensors", LOCAL),
        0.95,
    ),
    _ratio(
        "warm sequential read ÷ rclone", _of("warm sequential read"), _of("warm sequential read", RIVAL), 8
    ),
    _ratio(
        "cold sequential read ÷ fastest raw download",
        _of("cold sequential read"),
        _of("cold sequential read", *RAWS),
        0.80,
    ),
    _ratio(
        "cold sequential read ÷ fastest raw download, shaped",
        _of("cold sequential read, shaped"),
        _of("cold sequential read, shaped", *RAWS),
        0.95,
    ),
    _ratio(
        "cold sequential read ÷ rclone", _of("cold sequential read"), _of("cold sequential read", RIVAL), 3
    ),
    _ratio(
        "cold sequential read ÷ rclone, shaped",
        _of("cold sequential read, shaped"),
        _of("cold sequential read, shaped", RIVAL),
        3,
    ),
    _ratio(
        "cold from_pretrained ÷ download, then load",
        _of("cold from_pretrained"),
        _of("cold from_pretrained", *RAWS),
        0.85,
        at_least=False,
    ),
    _ratio(
        "cold from_pretrained ÷ download, then load, shaped",
        _of("cold from_pretrained, shaped"),
        _of("cold from_pretrained, shaped", *RAWS),
        0.85,
        at_least=False,
    ),
    _ratio(
        "cold read by 8 processes ÷ by one",
        _of("cold read, 8 processes"),
        _of("cold sequential read"),
        1.0,
    ),
    _ratio(
        "warm read by 8 processes ÷ by one",
        _of("warm read, 8 processes"),
        _of("warm read, 1 process"),
        1.0,
    ),
    Target("store requests for missing names", _of("store requests for missing names"), None, False, 0),
    _ratio(
        "missing names ÷ rclone",
        _of("open and stat of missing names"),
        _of("open and stat of missing names", RIVAL),
        5,
    ),
    Target("peak RSS of the daemon, MiB", _of("peak RSS of the daemon"), None, False, 200 * MIB),
)


def verdicts(found: Medians, targets: Iterable[Target] = TARGETS) -> list[Verdict]:
    """Hold the medians against the targets. before they are rounded."""
    return [_verdict(found, target) for target in targets]


def _verdict(found: Medians, target: Target) -> Verdict:
    unit = FIGURES[target.ours.figure]
    show: Callable[[float], str] = unit.show if target.theirs is None else lambda value: f"{value:.2f}"
    bound = ("≥ " if target.at_least else "≤ ") + show(target.bound)
    ours = target.ours.value(found)
    theirs = 1.0 if target.theirs is None else target.theirs.value(found)
    if ours is None or not theirs:
        return Verdict(target.work, bound, "–", None)
    value = ours / theirs
    met = value >= target.bound if target.at_least else value <= target.bound
    return Verdict(target.work, bound, show(value), met)


def targets_table(held: Iterable[Verdict]) -> str:
    """Return the verdicts as a Markdown table."""
    words = {True: "met", False: "**missed**", None: "not measured"}
    lines = ["| target | wanted | measured | |", "|---|---:|---:|---|"]
    lines += [f"| {each.work} | {each.bound} | {each.value} | {words[each.met]} |" for each in held]
    return "\n".join(lines)


def full_table(found: Medians, contenders: Iterable[str]) -> str:
    """Return all medians as a Markdown table, contenders side by side."""
    names = [name for name in contenders if any(contender == name for _, contender in found)]
    lines = ["| work | | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]
    for figure, unit in FIGURES.items():
        if any((figure, name) in found for name in names):
            cells = (unit.show(found[figure, name]) if (figure, name) in found else "" for name in names)
            lines.append(f"| {figure} | {unit.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


PLOTS = {
    "reads": (
        "cold sequential read",
        "cold sequential read, shaped",
        "warm sequential read",
        "warm mmap load of safetensors",
    ),
    "loads": ("cold from_pretrained", "cold from_pretrained, shaped", "warm from_pretrained"),
    "costs": (
        "open and stat of missing names",
        "CPU of the daemon, cold read",
        "CPU of the daemon, warm read",
        "peak RSS of the daemon",
    ),
}
"""The figures of each picture."""


def plot(found: Medians, contenders: Iterable[str], directory: Path) -> list[Path]:
    """Write each picture of `PLOTS` that has something to show, as PNG and as SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "modelfs"
    from matplotlib import pyplot

    names = list(contenders)
    written = []
    for picture, figures in PLOTS.items():
        shown = [each for each in figures if any(figure == each for figure, _ in found)]
        if not shown:
            continue
        canvas, axes = pyplot.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.2), squeeze=False)
        for axis, figure in zip(axes[0], shown, strict=True):
            _bars(axis, figure, {name: found[figure, name] for name in names if (figure, name) in found})
        canvas.tight_layout()
        for suffix in ("png", "svg"):
            path = directory / f"{picture}.{suffix}"
            canvas.savefig(path, dpi=110, metadata={"Date": None} if suffix == "svg" else None)
            written.append(path)
        pyplot.close(canvas)
    return written


def _bars(axis: object, figure: str, values: dict[str, float]) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes)
    unit = FIGURES[figure]
    names = list(values)[::-1]
    colors = [
        "#1f77b4" if name.startswith("modelfs") else "#999999" if name in (LOCAL, *RAWS) else "#d9883a"
        for name in names
    ]
    bars = axis.barh(names, [values[name] for name in names], color=colors)
    axis.bar_label(bars, [unit.show(values[name]) for name in names], padding=3, fontsize=8)
    axis.set_xlim(0, max(values.values()) * 1.2 or 1)
    axis.set_title(
        f"{figure}\n{unit.name}, {'more' if unit.more_is_better else 'less'} is better", fontsize=9
    )
    axis.tick_params(labelsize=8)
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)
