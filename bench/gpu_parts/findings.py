"""What a part found: numbers, and checks against the bounds that are aimed for. Plain data, written as JSON.

After every measurement what there is so far goes to the file named by `keep_in`, so that a part that is killed
loses the measurement under way and nothing else.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


class Skipped(Exception):
    """A part that cannot run here; the text says why."""


@dataclass(frozen=True)
class Check:
    """A number against its bound. `unit`: for people."""

    name: str
    value: float
    bound: float
    at_least: bool
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def line(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{'ok  ' if self.met else 'MISS'} {self.name}: {self.value:.4g}{self.unit} ({sign} {self.bound:g})"


_kept: list[Path] = []  # where findings go as they come


def keep_in(path: Path) -> None:
    """From now on every finding is written there at once, marked as cut short; the end of the part replaces it."""
    _kept[:] = [path]


def write(path: Path, entry: dict[str, Any]) -> None:
    """JSON, whole or not at all."""
    made = path.with_suffix(".tmp")
    made.write_text(json.dumps(entry, default=str))
    os.replace(made, path)


@dataclass
class Findings:
    """Numbers by name, checks, and lines for people."""

    data: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def at_least(self, name: str, value: float, bound: float, unit: str = "") -> None:
        self.checks.append(Check(name, value, bound, True, unit))
        self.keep()

    def at_most(self, name: str, value: float, bound: float, unit: str = "") -> None:
        self.checks.append(Check(name, value, bound, False, unit))
        self.keep()

    def attempt(self, name: str, measure: Callable[[], object]) -> None:
        """Run one measurement of several; a failure is noted as its result."""
        try:
            self.data[name] = measure()
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.data[name] = {"failed": text}
            self.lines.append(f"FAILED {name}: {text}")
            self.at_least(f"{name} ran", 0, 1)
        self.keep()

    def keep(self) -> None:
        """Write what there is so far, where `keep_in` said."""
        for path in _kept:
            write(path, {"status": "cut short"} | self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        checks = [asdict(check) | {"met": check.met} for check in self.checks]
        return {"data": self.data, "checks": checks, "lines": self.lines}


@dataclass(frozen=True)
class Options:
    """How a part is run. `deadline`: monotonic seconds by which it should be done; `folder`: for its files."""

    quick: bool
    deadline: float
    folder: Path
    root: Path
    model: str = "llama-3.1-8b"
    cells: tuple[str, ...] = ()

    @property
    def late(self) -> bool:
        """Whether the time is up; what was not measured by then is left out."""
        return time.monotonic() > self.deadline


def need_cuda() -> Any:
    """torch, where it has a device. Raises Skipped."""
    import torch

    if not torch.cuda.is_available():
        raise Skipped("no CUDA device")
    return torch


def milliseconds(run: Callable[[], object], repeats: int = 20, warm_up: int = 3) -> float:
    """The median of timed runs on the current stream, by events."""
    import torch

    for _ in range(warm_up):
        run()
    pairs: list[tuple[Any, Any]] = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        pairs.append((start, stop))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in pairs)


def graph_of(run: Callable[[], object], stream: Any = None) -> Any:
    """`run` captured, so that timing it leaves launches out."""
    import torch

    side = stream or torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="thread_local")
        run()
        graph.capture_end()
    torch.cuda.synchronize()
    return graph


def relative_error(out: Any, reference: Any) -> float:
    """||out - reference|| / ||reference|| in double; infinite for anything not finite."""
    import torch

    out, reference = out.double(), reference.double()
    if not bool(torch.isfinite(out).all()):
        return float("inf")
    return float((out - reference).norm() / reference.norm().clamp_min(1e-30))
