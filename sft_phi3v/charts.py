"""Numbers → small charts as inline SVG, for a page that is read on a phone, on a wide screen, in the dark and on paper.

Every chart has one natural width, about a phone's, so that its letters are read there. Colours are variables of the
page. No text of the rows stands in a chart, since no one font knows every letter: it stands in the page around it.
"""

import io
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

WIDTH, HEIGHT = 380, 230  # points
STEPS = [1, 2, 2.5, 5, 10]  # between ticks
Points = Sequence[tuple[float, float]]

# Matplotlib wants colours; the page's variables take their place.
INK, MUTED, LINE, ACCENT = "#010101", "#020202", "#030303", "#040404"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", ACCENT: "var(--accent)"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "butt",
}


@dataclass(frozen=True)
class Chart:
    """A chart, and what it shows in words."""

    title: str
    text: str
    svg: Markup  # empty where words are enough


def dots(
    title: str, rows: Mapping[str, tuple[float | None, Sequence[float] | None]], *, accent: str | None = None
) -> Chart:
    """
    Args:
        title (`str`): What is measured.
        rows (`dict`): By label a share, `None` if unknown, and the two ends of its interval, `None` if there is none.
        accent (`str`, *optional*): The label that counts.

    Returns:
        [`Chart`]: A dot per label, with its interval.
    """
    texts = [f"{value:.1%}" if value is not None else "–" for value, _ in rows.values()]

    def draw(axes: Axes) -> None:
        for place, (label, (value, interval)) in enumerate(rows.items()):
            colour = ACCENT if label == accent else MUTED
            if interval:
                axes.plot(interval, [place, place], color=colour, linewidth=3, clip_on=False)
            if value is not None:
                axes.plot(value, place, "o", color=colour, markersize=9, clip_on=False)
            axes.text(1.05, place, texts[place], transform=axes.get_yaxis_transform(), va="center")
        axes.grid(visible=False, axis="y")
        axes.set(xlim=(0, 1), xticks=[0, 0.5, 1], ylim=(len(rows) - 0.5, -0.5))
        # A name that somebody wrote into metrics.json may have letters that the font does not.
        axes.set_yticks(range(len(rows)), [re.sub(r"[^ -~’]", "?", label) for label in rows])
        axes.tick_params(axis="y", labelcolor=INK, pad=10)
        axes.xaxis.set_major_formatter(_PERCENT)

    text = ", ".join(f"{label} {text}" for label, text in zip(rows, texts, strict=True))
    return _chart(title, text, draw, 45 + 30 * len(rows))


def curve(
    title: str,
    points: Points,
    marked: Points = (),
    *,
    share: bool = False,
    logarithmic: bool = False,
    names: tuple[str, str],
) -> Chart:
    """
    Args:
        title (`str`): What is measured.
        points (sequence of pairs): Steps and values; faint if others are marked.
        marked (sequence of pairs): Steps and values that count more.
        share (`bool`, *optional*, defaults to `False`): Whether it goes from 0 to 100 %.
        logarithmic (`bool`, *optional*, defaults to `False`): Whether it may be, where values differ twentyfold.
        names (`tuple[str, str]`): What the points are, and the marked ones.

    Returns:
        [`Chart`]: The values over the steps.
    """
    values = [value for _, value in [*points, *marked]]
    logarithmic = logarithmic and min(values) > 0 and max(values) > 20 * min(values)

    def draw(axes: Axes) -> None:
        if points:
            style = "o-" if len(points) == 1 else "-"
            axes.plot(*zip(*points, strict=True), style, color=MUTED if marked else ACCENT, linewidth=1.5)
        if marked:
            axes.plot(*zip(*marked, strict=True), "o-", color=ACCENT, linewidth=2, markersize=7, clip_on=False)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=STEPS))
        axes.grid(visible=False, axis="x")
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter("")
        else:
            axes.set_ylim(min(0, *values), 1.02 if share else None)
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axes.yaxis.set_major_formatter(_PERCENT if share else _NUMBER)

    said = [_said(name, some, share) for name, some in zip(names, (points, marked), strict=True) if some]
    return _chart(title, "; ".join(said) + (". Logarithmic." if logarithmic else "."), draw)


def _said(name: str, points: Points, share: bool) -> str:
    (first, start), (last, end) = points[0], points[-1]
    shown = _percent if share else _number
    if len(points) == 1:
        return f"{name} {shown(end)} at step {last:,.0f}"
    return f"{name} {shown(start)} at step {first:,.0f}, {shown(end)} at step {last:,.0f}"


def histogram(title: str, edges: Sequence[float], counts: Sequence[int], unit: str) -> Chart:
    """
    Args:
        title (`str`): What is counted.
        edges (sequence of `float`): Where the bars begin and end, between whole numbers; one more than bars.
        counts (sequence of `int`): How high they are.
        unit (`str`): Of what they are.

    Returns:
        [`Chart`]: The bars; only words where there is but one.
    """

    def draw(axes: Axes) -> None:
        axes.stairs(counts, edges, fill=True, color=ACCENT)
        axes.grid(visible=False, axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=STEPS))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(_NUMBER)

    if len(counts) == 1:
        return Chart(title, f"{sum(edges) / 2:,.0f} in each of {counts[0]:,} {unit}.", Markup(""))
    most = max(range(len(counts)), key=lambda place: counts[place])
    low, high = math.ceil(edges[most]), math.floor(edges[most + 1])
    return _chart(
        title,
        f"{sum(counts):,} {unit}, from {math.ceil(edges[0]):,} to {math.floor(edges[-1]):,}; the highest bar, "
        f"{counts[most]:,}, " + (f"at {low:,}." if low == high else f"from {low:,} to {high:,}."),
        draw,
    )


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


_PERCENT = FuncFormatter(lambda value, _: f"{value:.0%}")
_NUMBER = FuncFormatter(lambda value, _: _number(value))


def _chart(title: str, text: str, draw: Callable[[Axes], None], height: int = HEIGHT) -> Chart:
    name = f"c{zlib.crc32(title.encode()):08x}"  # charts share a page, and references within one must stay in it
    bare = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(file := io.StringIO(), format="svg", transparent=True, metadata=bare)
    svg = re.sub(r"^.*?<svg[^>]*>", "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub("|".join(VARIABLES), lambda found: VARIABLES[found[0]], svg)
    head = Markup('<svg role="img" aria-label="{}" viewBox="0 0 {} {}">').format(f"{title}. {text}", WIDTH, height)
    return Chart(title, text, head + Markup(svg))
