"""Built-in cost models by name. Factories import what they need when called, so listing them costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drift_scheduler.protocols import CostModel

__all__ = ["FACTORIES"]


def fitted(
    table: str = "",
    device: str = "",
    model: str = "",
    slowdown_prefill: float | None = None,
    slowdown_decode: float | None = None,
) -> CostModel:
    """The two formulas of the paper, fitted to a cost table: a file, or the built-in one of `device` and `model`."""
    from drift_scheduler.cost.fitted import fitted as build

    return build(table, device, model, slowdown_prefill, slowdown_decode)


def roofline(
    device: str,
    model: str,
    slowdown_prefill: float | None = None,
    slowdown_decode: float | None = None,
) -> CostModel:
    """First principles from a device and a model description, built in or TOML files."""
    from drift_scheduler.cost.roofline import roofline as build

    return build(device, model, slowdown_prefill, slowdown_decode)


def online(
    device: str,
    model: str,
    base: str = "",
    table: str = "",
    rate: float = 0.05,
    ceiling: float = 2.0,
) -> CostModel:
    """Either of the others (`base`; by default the fitted one where a table exists), corrected from observed steps."""
    from drift_scheduler.cost.hardware import installed, model_spec
    from drift_scheduler.cost.online import OnlineCost
    from drift_scheduler.cost.table import table_name
    from drift_scheduler.errors import OptionError

    if not base:
        base = "fitted" if table or table_name(device, model) in installed("tables") else "roofline"
    if base not in ("fitted", "roofline"):
        raise OptionError(f"option 'base' is '{base}', need fitted or roofline")
    named = {"device": device, "model": model}
    inner = FACTORIES[base](**named, table=table) if base == "fitted" else FACTORIES[base](**named)
    return OnlineCost(inner, model_spec(model).num_layers, rate, ceiling)


FACTORIES: Mapping[str, Callable[..., CostModel]] = MappingProxyType(
    {"fitted": fitted, "roofline": roofline, "online": online}
)
"""What the built-in plugin registers under `drift_cost_models`."""
