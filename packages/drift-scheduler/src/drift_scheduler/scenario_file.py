"""Scenario files of `drift bench`: a TOML grid of devices, models, workloads, targets and policies, checked whole.

Whatever is wrong is one DriftError line `FILE:LINE: KEY: ...`, KEY as in `workloads[1].ttft`. Knows how a grid is
written, not how it is run; names of devices, policies and workloads are checked by whoever resolves them.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from drift_scheduler.errors import DriftError
from drift_scheduler.toml_lines import Source

Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=400)]
Names = Annotated[tuple[Name, ...], msgspec.Meta(min_length=1, max_length=64)]
Targets = Annotated[tuple[Seconds, ...], msgspec.Meta(min_length=1, max_length=32)]
Count = Annotated[int, msgspec.Meta(ge=1, le=200_000)]
Factors = Annotated[
    tuple[Annotated[float, msgspec.Meta(gt=0, le=100)], ...], msgspec.Meta(min_length=1, max_length=32)
]
Seed = Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)]
MAX_CELLS = 2000
MAX_BYTES = 1_000_000


class System(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A device with the model on it. `tbt`: its own targets; `ttft_scale`: multiplies every TTFT target."""

    device: Name
    model: Name
    tbt: Targets | None = None
    ttft_scale: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1.0


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A registered workload or a trace's path (from the scenario file's folder). What is left out is the file's."""

    name: Name
    label: Name | None = None
    ttft: Seconds | None = None
    tbt: Targets | None = None
    requests: Count | None = None
    lifetimes: Annotated[float, msgspec.Meta(ge=0.5, le=1000)] | None = None

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.label or Path(self.name).name.split(".")[0] or self.name


class Search(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """See `drift_scheduler.goodput.SearchPlan`."""

    criterion: Name = "p99"
    seeds: Annotated[tuple[Seed, ...], msgspec.Meta(min_length=1, max_length=100)] = (0, 1, 2)
    requests: Count = 300
    lifetimes: Annotated[float, msgspec.Meta(ge=0.5, le=1000)] = 2.0
    tolerance: Annotated[float, msgspec.Meta(ge=0.001, le=1)] = 0.02


class SimulationSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """See `drift_scheduler.simulation.run.Scenario`."""

    partition: Name = "tightest-decode"
    cost: Name | None = None
    truth: Name | None = None
    noise: Annotated[float, msgspec.Meta(ge=0, le=2)] = 0.0
    kv_pages: Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)] | None = None
    page_tokens: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 16
    max_running: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 256


class DetailSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which cells get curves. `rates`: shares of the best policy's goodput; `scales`: factors on both targets."""

    cells: Literal["first", "all", "none"] = "first"
    rates: Factors = (0.4, 0.7, 0.9, 1.0, 1.1, 1.3)
    scales: Factors = (0.5, 0.75, 1.0, 1.5, 2.0)


class ScenarioFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file. The grid is every system x workload x TBT target x policy; systems are listed, or every
    device x model."""

    title: Name = "Goodput"
    devices: Names | None = None
    models: Names | None = None
    systems: Annotated[tuple[System, ...], msgspec.Meta(min_length=1, max_length=64)] | None = None
    workloads: Annotated[tuple[Workload, ...], msgspec.Meta(min_length=1, max_length=64)]
    policies: Names
    base: Name | None = None
    ttft: Seconds = 1.0
    tbt: Targets = (0.05,)
    search: Search = Search()
    simulation: SimulationSettings = SimulationSettings()
    detail: DetailSettings = DetailSettings()

    def all_systems(self) -> tuple[System, ...]:
        """Listed, or devices x models."""
        if self.systems is not None:
            return self.systems
        return tuple(System(device=d, model=m) for d in self.devices or () for m in self.models or ())


def read_scenario(path: str | Path) -> ScenarioFile:
    """The file, checked. Raises DriftError, one line."""
    return parse_scenario(read_source(path))


def read_source(path: str | Path) -> Source:
    """The file's text. Raises DriftError, one line."""
    try:
        raw = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise DriftError(
            f"scenario file {path}: {getattr(error, 'strerror', None) or 'no such file'}"
        ) from error
    if len(raw) > MAX_BYTES:
        raise DriftError(f"{path}: {len(raw)} bytes are no scenario file (at most {MAX_BYTES})")
    try:
        return Source(str(path), raw.decode())
    except UnicodeDecodeError as error:
        raise DriftError(f"{path}: not UTF-8 text") from error


def parse_scenario(source: Source) -> ScenarioFile:
    """A file's text, checked. Raises DriftError, one line."""
    try:
        values = tomllib.loads(source.text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise DriftError(f"{source.name}: not TOML: {_one_line(error)}") from error
    return check_scenario(values, source)


def check_scenario(values: dict[str, Any], source: Source) -> ScenarioFile:
    """A parsed file's values, checked. Raises DriftError `FILE:LINE: key: ...`."""
    for key, number in _floats(values, ""):
        if not math.isfinite(number):
            raise DriftError(f"{source.at(key)}: {key}: {number} is not a finite number")
    try:
        file = msgspec.convert(values, ScenarioFile)
    except msgspec.ValidationError as error:
        message, _, at = str(error).partition(" - at `$")
        key = at.rstrip("`").lstrip(".")
        place = source.of(key, message)
        raise DriftError(f"{place}: {key + ': ' if key else ''}{_one_line(message)}") from error
    for key, problem in _problems(file):
        raise DriftError(f"{source.at(key)}: {key}: {problem}")
    return file


def _problems(file: ScenarioFile) -> Iterator[tuple[str, str]]:
    """What single keys cannot tell."""
    if file.systems is not None and (file.devices is not None or file.models is not None):
        yield "systems", "give either systems, or devices and models"
    elif file.systems is None and (file.devices is None or file.models is None):
        missing = "devices" if file.devices is None else "models"
        yield missing, "missing; give devices and models, or systems"
    listed: tuple[tuple[str, list[str]], ...] = (
        ("policies", list(file.policies)),
        ("workloads", [workload.title for workload in file.workloads]),
        ("search.seeds", [str(seed) for seed in file.search.seeds]),
    )
    for key, names in listed:
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            yield (
                key,
                f"'{_one_line(twice[0])}' is there twice"
                + ("; tell them apart by label" if key == "workloads" else ""),
            )
    if file.base is not None and file.base not in file.policies:
        yield "base", f"'{_one_line(file.base)}' is not among the policies: {', '.join(file.policies)}"
    targets = max(len(t) for t in (file.tbt, *(s.tbt or () for s in file.all_systems())))
    cells = len(file.all_systems()) * len(file.workloads) * targets * len(file.policies)
    if cells > MAX_CELLS:
        yield "workloads", f"the grid has {cells} cells with policies, at most {MAX_CELLS} are possible"


def _floats(value: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _floats(inner, f"{key}.{name}" if key else _one_line(name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _floats(inner, f"{key}[{i}]")


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
