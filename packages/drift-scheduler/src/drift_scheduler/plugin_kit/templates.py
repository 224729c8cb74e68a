"""The files that `drift plugins new` writes: path -> text, with `$name`, `$module`, `$Class` and so on to fill in."""

from __future__ import annotations

from collections.abc import Mapping

PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.25"]
build-backend = "hatchling.build"

[project]
name = "drift-plugin-$name"
version = "0.1.0"
description = "A policy for Drift."
requires-python = ">=3.11"
dependencies = ["drift-scheduler>=$version"]

[project.entry-points.drift]
$name = "$module"

[tool.hatch.build.targets.wheel]
packages = ["src/$module"]
"""

README = """\
# drift-plugin-$name

A policy for Drift: a plugin of `drift-scheduler`.

```console
$$ pip install -e . pytest
$$ pytest
$$ drift plugins check $name
```
"""

DISPATCH_INIT = '''\
"""Registers the dispatch policy `$name`."""

from drift_scheduler.plugins import hookimpl

from $module.policy import $Class

__all__ = ["$Class", "drift_dispatch_policies"]


@hookimpl
def drift_dispatch_policies():
    """Name -> factory. Options on the command line (`$name:scan=8`) are its arguments."""
    return {"$name": $Class}
'''

DISPATCH_POLICY = '''\
"""Shortest prompt first: prefill the shortest waiting prompt when decode can spare the time, or it waited long."""

from __future__ import annotations

from drift_scheduler.domain import Gang, PrefillBlock, PrefillChunk, Sharing
from drift_scheduler.protocols import CostModel, PartitionPolicy
from drift_scheduler.view import View


class $Class:
    """`scan`: how many waiting requests are looked at."""

    def __init__(self, scan: int = 32) -> None:
        self._scan = scan

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        """The next gang for the idle lanes, or None to wait for the next event.

        This policy gives the whole device to one phase at a time. Try Sharing.SPATIAL with `partitions.split(...)`
        where `view.device.splits()` has any, or Sharing.FUSED: `drift_scheduler.legality` says what makes a gang legal.
        """
        if view.prefill_lane.busy or view.decode_lane.busy:
            return None
        step = view.decode_step()
        waiting = sorted(view.waiting(self._scan), key=lambda w: w.uncomputed)
        if waiting:
            shortest = waiting[0]
            chunk = PrefillChunk(shortest.request.id, shortest.computed, shortest.total)
            block = PrefillBlock(-1, (chunk,), 0, view.device.num_layers)  # -1: a new batch
            seconds = costs.prefill(block.shape(), view.device.total_units)
            long = view.now >= shortest.deadline - shortest.request.slo.ttft / 2  # half of its time is over
            if step is None or long or seconds <= float(view.tbt_slack().min()):
                return Gang(Sharing.EXCLUSIVE, view.device.all_prefill, prefill=block)
        if step is None:
            return None
        return Gang(Sharing.EXCLUSIVE, view.device.all_decode, decode=step)
'''

DISPATCH_TEST = '''\
"""The policy keeps the scheduler's rules, whatever the device, the pool and the clients do."""

import pytest
from drift_scheduler.conformance import CASES, conform, run_case

from $module import $Class


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_conforms(case):
    outcome = run_case(case, dispatch=$Class())
    conform(outcome)
    assert len(outcome.reasons) == case.requests  # every request ended


def test_it_is_registered():
    from drift_scheduler.plugins import load

    assert load().plugin_of("dispatch policy", "$name") == "drift-plugin-$name"
'''

PARTITION_INIT = '''\
"""Registers the partition policy `$name`."""

from drift_scheduler.plugins import hookimpl

from $module.policy import $Class

__all__ = ["$Class", "drift_partition_policies"]


@hookimpl
def drift_partition_policies():
    """Name -> factory. Options on the command line (`$name:headroom=0.5`) are its arguments."""
    return {"$name": $Class}
'''

PARTITION_POLICY = '''\
"""The split whose decode step comes closest to a share of the TBT target, without passing it."""

from __future__ import annotations

from drift_scheduler.domain import DecodeStep, Partition, PrefillShape
from drift_scheduler.protocols import CostModel
from drift_scheduler.view import View


class $Class:
    """`headroom`: share of the TBT target left free, from 0 to below 1."""

    def __init__(self, headroom: float = 0.2) -> None:
        if not 0 <= headroom < 1:
            raise ValueError(f"option 'headroom' is {headroom!r}, need 0 to below 1")
        self._share = 1.0 - headroom

    def split(self, view: View, prefill: PrefillShape, decode: DecodeStep, costs: CostModel) -> Partition:
        """A menu entry with units for both lanes; `splits()` has them, fewest decode units first."""
        target = view.tbt_target * self._share
        shape = decode.shape()
        splits = view.device.splits()
        for partition in splits:
            slowdown = costs.slowdown(prefill, shape, partition)[1]
            if costs.decode(shape, partition.decode) * slowdown <= target:
                return partition
        return splits[-1]
'''

PARTITION_TEST = '''\
"""The policy keeps the scheduler's rules, whatever the device, the pool and the clients do."""

import pytest
from drift_scheduler.conformance import CASES, conform, run_case

from $module import $Class


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_conforms(case):
    outcome = run_case(case, partitions=$Class())  # under the dispatch policy `gang`
    conform(outcome)
    assert len(outcome.reasons) == case.requests  # every request ended


def test_it_is_registered():
    from drift_scheduler.plugins import load

    assert load().plugin_of("partition policy", "$name") == "drift-plugin-$name"
'''

DISPATCH: Mapping[str, str] = {
    "pyproject.toml": PYPROJECT,
    "README.md": README,
    "src/$module/__init__.py": DISPATCH_INIT,
    "src/$module/policy.py": DISPATCH_POLICY,
    "tests/$test.py": DISPATCH_TEST,
}

PARTITION: Mapping[str, str] = {
    "pyproject.toml": PYPROJECT,
    "README.md": README,
    "src/$module/__init__.py": PARTITION_INIT,
    "src/$module/policy.py": PARTITION_POLICY,
    "tests/$test.py": PARTITION_TEST,
}
