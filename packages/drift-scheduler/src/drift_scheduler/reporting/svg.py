"""A small SVG writer: a chart with two axes, and marks on it in data coordinates.

Self-contained output: no scripts, fonts or style sheets from elsewhere. Knows scales and marks, not what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
INK, SOFT, GRID = "#1f2933", "#61707f", "#e6eaee"
PALETTE = ("#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e", "#c2255c", "#946c00", "#1864ab", "#495057", "#862e9c")
DASHES = ("", "6 3", "2 3", "8 3 2 3", "4 2", "1 2", "10 4", "5 5", "3 1")

Points = Sequence[tuple[float, float]]


def colour(index: int) -> str:
    """A colour for the i-th of several things; they repeat after the ninth."""
    return PALETTE[index % len(PALETTE)]


@dataclass(frozen=True)
class Scale:
    """From data to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log(self.low), math.log(self.high), math.log(max(value, 1e-300)))
            if self.log
            else (self.low, self.high, value)
        )
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values within, at most about seven."""
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)


def _ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    if high <= low:
        return [low]
    rough = (high - low) / wanted
    power: float = 10 ** math.floor(math.log10(rough))
    step = next((power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough), power * 10)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [s * 10.0**d for d in decades for s in steps if low * 0.999 <= s * 10.0**d <= high * 1.001]
        if len(found) <= 8:
            return found
    return found[:: math.ceil(len(found) / 8)]


def number(value: float) -> str:
    """As a tick label: 0.025, 12, 3k."""
    if value and abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def seconds(value: float) -> str:
    """As a tick label: 500 us, 20 ms, 1.5 s."""
    if value == 0:
        return "0"
    if abs(value) < 0.9995e-3:
        return f"{value * 1e6:.3g} µs"
    return f"{value * 1e3:.3g} ms" if abs(value) < 0.9995 else f"{value:.4g} s"


def percent(value: float) -> str:
    """As a tick label: 95%, 0.1%."""
    return f"{value * 100:.4g}%"


@dataclass
class Chart:
    """A titled plot area of `width` x `height` pixels with axes; marks are added in the order they are drawn.

    `x`, `y`: `(low, high)` in data; `log_x`, `log_y`: need positive bounds. `x_text`, `y_text`: ticks to text.
    """

    title: str
    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False
    x_text: Callable[[float], str] = number
    y_text: Callable[[float], str] = number
    width: int = 640
    height: int = 360
    y_ticks: Sequence[float] | None = None
    marks: list[str] = field(default_factory=list)
    keys: list[tuple[str, str, str]] = field(default_factory=list)
    """Legend: label, colour, dash (`box` for a filled square)."""

    def __post_init__(self) -> None:
        self.left, self.right, self.top, self.bottom = 66, 18, 40, 48
        self.sx = Scale(*self.x, self.left, self.width - self.right, self.log_x)
        self.sy = Scale(*self.y, self.height - self.bottom, self.top, self.log_y)

    def line(
        self,
        points: Points,
        stroke: str,
        label: str = "",
        dash: str = "",
        dots: bool = False,
        width: float = 2,
    ) -> None:
        """A polyline; with a `label` also a legend entry, with `dots` a mark with its values on every point."""
        if not points:
            return
        path = " ".join(f"{self.sx(x):.1f},{self.sy(y):.1f}" for x, y in points)
        style = f' stroke-dasharray="{dash}"' if dash else ""
        self.marks.append(
            f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="{width}" '
            f'stroke-linejoin="round"{style}/>'
        )
        if dots:
            self.dots(points, stroke, 3.2, label)
        if label:
            self.keys.append((label, stroke, dash))

    def dots(self, points: Points, fill: str, radius: float = 2, label: str = "", opacity: float = 1) -> None:
        """A circle per point; with a `label` each says its values when pointed at."""
        style = f' fill-opacity="{opacity:g}"' if opacity < 1 else ""
        for x, y in points:
            text = f"{label}: {self.x_text(x)}, {self.y_text(y)}" if label else ""
            inner = f"<title>{escape(text)}</title>" if text else ""
            end = f">{inner}</circle>" if inner else "/>"
            self.marks.append(
                f'<circle cx="{self.sx(x):.1f}" cy="{self.sy(y):.1f}" r="{radius:g}" fill="{fill}"{style}{end}'
            )

    def box(self, x0: float, x1: float, y0: float, y1: float, fill: str, hint: str = "") -> None:
        """A filled rectangle between two data points."""
        left, right, top, bottom = self.sx(x0), self.sx(x1), self.sy(y1), self.sy(y0)
        inner = f"<title>{escape(hint)}</title>" if hint else ""
        end = f">{inner}</rect>" if inner else "/>"
        self.marks.append(
            f'<rect x="{left:.2f}" y="{top:.2f}" width="{max(right - left, 0.15):.2f}" '
            f'height="{max(bottom - top, 0):.2f}" fill="{fill}"{end}'
        )

    def at_x(self, x: float, text: str = "", stroke: str = SOFT, row: int = 0) -> None:
        """A vertical dashed line with a note at its top."""
        px = self.sx(x)
        self._rule(px, self.top, px, self.height - self.bottom, stroke)
        if text:
            after = px < self.width * 0.75
            anchor, shift = ("start", 4) if after else ("end", -4)
            self.text(px + shift, self.top + 12 + 13 * row, text, anchor, 11, stroke)

    def at_y(self, y: float, text: str = "", stroke: str = SOFT) -> None:
        """A horizontal dashed line with a note at its left end."""
        py = self.sy(y)
        self._rule(self.left, py, self.width - self.right, py, stroke)
        if text:
            self.text(self.left + 4, py - 4, text, "start", 11, stroke)

    def key(self, label: str, fill: str) -> None:
        """A legend entry for filled marks."""
        self.keys.append((label, fill, "box"))

    def text(
        self, x: float, y: float, text: str, anchor: str = "start", size: float = 12, fill: str = INK
    ) -> None:
        """Text at pixels."""
        self.marks.append(_words(x, y, text, anchor, size, fill))

    def render(self) -> str:
        """The whole `<svg>` element."""
        legend, rows = self._legend()
        title = _words(14, 22, self.title, "start", 14, INK, 'font-weight="600"')
        height = self.height + 20 * rows
        body = "".join([*self._axes(), *self.marks, *legend])
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {height}" width="{self.width}" '
            f'height="{height}" font-family="{FONT}" role="img" aria-label="{escape(self.title)}">'
            f'<rect width="{self.width}" height="{height}" fill="#fff"/>'
            f"{title}{body}</svg>\n"
        )

    def _rule(self, x0: float, y0: float, x1: float, y1: float, stroke: str) -> None:
        self.marks.append(
            f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{stroke}" '
            'stroke-dasharray="4 4"/>'
        )

    def _axes(self) -> list[str]:
        parts: list[str] = []
        floor, side = self.height - self.bottom, self.width - self.right
        for y in self.sy.ticks() if self.y_ticks is None else self.y_ticks:
            py = self.sy(y)
            parts.append(f'<line x1="{self.left}" y1="{py:.1f}" x2="{side}" y2="{py:.1f}" stroke="{GRID}"/>')
            parts.append(_words(self.left - 7, py + 4, self.y_text(y), "end", 11, SOFT))
        for x in self.sx.ticks():
            px = self.sx(x)
            parts.append(f'<line x1="{px:.1f}" y1="{floor}" x2="{px:.1f}" y2="{floor + 4}" stroke="{SOFT}"/>')
            parts.append(_words(px, floor + 17, self.x_text(x), "middle", 11, SOFT))
        parts.append(f'<line x1="{self.left}" y1="{floor}" x2="{side}" y2="{floor}" stroke="{SOFT}"/>')
        parts.append(_words((self.left + side) / 2, floor + 36, self.x_label, "middle", 12, SOFT))
        middle = (self.top + floor) / 2
        parts.append(
            _words(16, middle, self.y_label, "middle", 12, SOFT, f'transform="rotate(-90 16 {middle:g})"')
        )
        return parts

    def _legend(self) -> tuple[list[str], int]:
        parts: list[str] = []
        x, row = float(self.left), 0
        for label, stroke, dash in self.keys:
            needed = 34 + 6.6 * len(label)
            if x + needed > self.width and x > self.left:
                x, row = float(self.left), row + 1
            y = self.height + 8 + 20 * row
            if dash == "box":
                parts.append(f'<rect x="{x:.0f}" y="{y - 6}" width="12" height="12" fill="{stroke}"/>')
            else:
                style = f' stroke-dasharray="{dash}"' if dash else ""
                parts.append(
                    f'<line x1="{x:.0f}" y1="{y}" x2="{x + 20:.0f}" y2="{y}" stroke="{stroke}" '
                    f'stroke-width="2.5"{style}/>'
                )
            parts.append(_words(x + (17 if dash == "box" else 25), y + 4, label, "start", 12, INK))
            x += needed
        return parts, (row + 1 if self.keys else 0)


def _words(x: float, y: float, text: str, anchor: str, size: float, fill: str, extra: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:g}" fill="{fill}" {extra}>'
        f"{escape(text)}</text>"
    )
