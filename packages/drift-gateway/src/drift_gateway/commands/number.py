"""The type of options that are numbers within a range."""

from __future__ import annotations

import math
from typing import Any

import click


class Number(click.FloatRange):
    """As click's FloatRange, which takes "nan" for any range: nothing is below or above it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"'{value}' is no number", param, ctx)
        return number
