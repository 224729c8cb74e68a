"""The cost table: measured lane times of one model on one device, as `drift profile` writes them.

JSON, schema `drift.cost/1`. Rows carry the sums that times depend on, so a row stands for any batch of those
sums. This module checks tables and reads and writes them; it fits nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from drift_scheduler.cost.hardware import installed, plain
from drift_scheduler.domain import DecodeShape, Partition, PrefillShape
from drift_scheduler.errors import DriftError, UnknownNameError

SCHEMA = "drift.cost/1"

Units = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Tokens = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
Factor = Annotated[float, msgspec.Meta(ge=1, le=100)]


class PrefillRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All layers of a prefill batch on `units` units took `seconds`, the rest of the device idle."""

    units: Units
    requests: Annotated[int, msgspec.Meta(ge=1)]
    new: Annotated[int, msgspec.Meta(ge=1)]
    reused: Tokens
    new_squared: Tokens
    new_times_reused: Tokens
    seconds: Seconds

    def shape(self) -> PrefillShape:
        """Token sums, as cost models take them."""
        return PrefillShape(self.requests, self.new, self.reused, self.new_squared, self.new_times_reused)


class DecodeRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One decode step on `units` units took `seconds`, the rest of the device idle."""

    units: Units
    batch: Annotated[int, msgspec.Meta(ge=1)]
    context_tokens: Tokens
    seconds: Seconds

    def shape(self) -> DecodeShape:
        """Sums, as cost models take them."""
        return DecodeShape(self.batch, self.context_tokens)


class FusedRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One mixed forward pass of a prefill chunk and a decode step."""

    units: Units
    requests: Annotated[int, msgspec.Meta(ge=1)]
    new: Annotated[int, msgspec.Meta(ge=1)]
    reused: Tokens
    new_squared: Tokens
    new_times_reused: Tokens
    batch: Annotated[int, msgspec.Meta(ge=1)]
    context_tokens: Tokens
    seconds: Seconds

    def prefill(self) -> PrefillShape:
        """Token sums of the chunk."""
        return PrefillShape(self.requests, self.new, self.reused, self.new_squared, self.new_times_reused)

    def decode(self) -> DecodeShape:
        """Sums of the step."""
        return DecodeShape(self.batch, self.context_tokens)


class SlowdownRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Both lanes ran under a split: measured over solo time of each."""

    prefill_units: Units
    decode_units: Units
    new: Tokens
    reused: Tokens
    batch: Tokens
    context_tokens: Tokens
    prefill_factor: Factor
    decode_factor: Factor


class CostTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything measured of one model on one device. `source` says where the numbers come from."""

    schema: Literal["drift.cost/1"] = "drift.cost/1"
    device: str
    model: str
    num_layers: Units
    total_units: Units
    menu: tuple[tuple[int, int], ...]
    prefill: Annotated[tuple[PrefillRow, ...], msgspec.Meta(min_length=1)]
    decode: Annotated[tuple[DecodeRow, ...], msgspec.Meta(min_length=1)]
    fused: tuple[FusedRow, ...] = ()
    slowdown: tuple[SlowdownRow, ...] = ()
    source: str = ""

    def partitions(self) -> tuple[Partition, ...]:
        """The menu."""
        return tuple(Partition(prefill, decode) for prefill, decode in self.menu)


def read_table(path: str | Path) -> CostTable:
    """The table in a file. Raises DriftError naming the file and the row."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DriftError(f"cost table {path}: {error.strerror or error}") from error
    return _decode(data, str(path))


def write_table(table: CostTable, path: str | Path) -> None:
    """Write it, checked, rows one a line. Raises DriftError."""
    _check(table, str(path))
    try:
        Path(path).write_bytes(encode(table))
    except OSError as error:
        raise DriftError(f"cost table {path}: {error.strerror or error}") from error


def encode(table: CostTable) -> bytes:
    """JSON with one row a line, so that tables can be compared."""
    parts = []
    for field in table.__struct_fields__:
        value = getattr(table, field)
        if field in ("prefill", "decode", "fused", "slowdown"):
            rows = ",\n".join("    " + msgspec.json.encode(row).decode() for row in value)
            parts.append(f'  "{field}": [\n{rows}\n  ]' if rows else f'  "{field}": []')
        else:
            parts.append(f'  "{field}": {msgspec.json.encode(value).decode()}')
    return ("{\n" + ",\n".join(parts) + "\n}\n").encode()


def built_in_table(name: str) -> CostTable:
    """A table shipped with Drift. Raises UnknownNameError."""
    names = installed("tables")
    if name not in names:
        raise UnknownNameError("cost table", name, names)
    return _decode(
        resources.files("drift_scheduler").joinpath("data", "tables", f"{name}.json").read_bytes(), name
    )


def find_table(table: str, device: str, model: str) -> CostTable:
    """The table named or pathed by `table`, else the built-in one of `device` and `model`. Raises DriftError."""
    if table:
        is_path = table.endswith(".json") or "/" in table or "\\" in table
        return read_table(table) if is_path else built_in_table(table)
    name = table_name(device, model)
    if name not in installed("tables"):
        raise DriftError(
            f"no built-in cost table of model '{model}' on device '{device}'; give one (option table=PATH, as "
            f"`drift profile` writes), use the roofline cost model, or one of: {', '.join(installed('tables'))}"
        )
    return built_in_table(name)


def table_name(device: str, model: str) -> str:
    """How built-in tables are called."""
    return f"{device}--{model}"


def _decode(data: bytes, where: str) -> CostTable:
    try:
        table = msgspec.json.decode(data, type=CostTable)
    except msgspec.ValidationError as error:
        raise DriftError(f"cost table {where}: {plain(error)}") from error
    except msgspec.DecodeError as error:
        raise DriftError(f"cost table {where}: not JSON: {error}") from error
    _check(table, where)
    return table


def _check(table: CostTable, where: str) -> None:
    """What the types cannot say. Raises DriftError naming the row (counted from 0, as in `prefill[3]`)."""
    total = table.total_units
    for i, (prefill, decode) in enumerate(table.menu):
        if prefill < 0 or decode < 0 or not 0 < prefill + decode <= total:
            raise DriftError(f"cost table {where}: menu[{i}]: {prefill}+{decode} units of {total}")
    _check_rows(table, where)
    for i, row in enumerate(table.slowdown):
        if row.prefill_units + row.decode_units > total:
            split = f"{row.prefill_units}+{row.decode_units}"
            raise DriftError(f"cost table {where}: slowdown[{i}]: {split} units of {total}")


def _check_rows(table: CostTable, where: str) -> None:
    groups: tuple[tuple[str, Sequence[PrefillRow | DecodeRow | FusedRow]], ...] = (
        ("prefill", table.prefill),
        ("decode", table.decode),
        ("fused", table.fused),
    )
    for name, rows in groups:
        for i, row in enumerate(rows):
            at = f"cost table {where}: {name}[{i}]"
            if row.units > table.total_units:
                raise DriftError(f"{at}: field units: {row.units} of a device of {table.total_units}")
            if not math.isfinite(row.seconds):
                raise DriftError(f"{at}: field seconds: {row.seconds} is not a finite number")
            if not isinstance(row, DecodeRow):
                _check_sums(row, at)


def _check_sums(row: PrefillRow | FusedRow, at: str) -> None:
    """Sums of n, n^2 and n*r of `requests` requests must be possible together."""
    if not row.new * row.new <= row.new_squared * row.requests or row.new_squared > row.new * row.new:
        low = -(-row.new * row.new // row.requests)
        raise DriftError(
            f"{at}: field new_squared: {row.new_squared}; {row.new} new tokens of {row.requests} "
            f"requests make {low} to {row.new * row.new}"
        )
    if row.new_times_reused > row.new * row.reused:
        raise DriftError(f"{at}: field new_times_reused: {row.new_times_reused} exceeds new x reused")
