"""One simulated run: names become objects, the scheduler serves a workload on a simulated device, a report comes out.

Virtual time only, so the same scenario gives the same report, to the byte. Knows nothing of the command line.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from drift_scheduler.cost.contention import Contended
from drift_scheduler.cost.fitted import FittedCost
from drift_scheduler.cost.hardware import (
    DeviceSpec,
    ModelSpec,
    device_spec,
    installed,
    model_spec,
    simulated_device,
)
from drift_scheduler.cost.launch import Launched, innermost
from drift_scheduler.cost.table import table_name
from drift_scheduler.domain import SLO, Device, Request
from drift_scheduler.errors import DriftError, OptionError
from drift_scheduler.loop import serve
from drift_scheduler.metrics import Metrics
from drift_scheduler.plugins import Registry, load
from drift_scheduler.protocols import CostModel, DispatchPolicy, KvPool, Observer
from drift_scheduler.report import Report, build_report
from drift_scheduler.scheduler import Limits, Scheduler
from drift_scheduler.simulation.cluster import Setting, pages_that_fit
from drift_scheduler.simulation.executor import Overheads, SimulatedExecutor
from drift_scheduler.simulation.kv import CountingKv

TRACE_SUFFIXES = (".jsonl", ".json", ".csv", ".gz")


@dataclass(frozen=True, slots=True)
class Scenario:
    """What to simulate. Names may carry options: `chunked-prefill:token_budget=512`.

    `workload`: a registered name or a trace's path. `cost`: what the scheduler believes; `truth`: what the device
    does (`None`: the same model, without what the scheduler learns). `cost` `None`: `fitted` where a built-in table of
    device and model exists, else `roofline`. `requests` `None`: a whole trace, or the workload's default.
    `kv_pages` `None`: what fits beside the weights. `noise`: standard deviation of the logarithm of durations.
    """

    workload: str
    device: str
    model: str
    dispatch: str
    slo: SLO
    partition: str = "tightest-decode"
    cost: str | None = None
    truth: str | None = None
    rate: float | None = None
    requests: int | None = None
    seed: int = 0
    kv_pages: int | None = None
    page_tokens: int = 16
    max_running: int = 256
    noise: float = 0.0

    def config(self) -> dict[str, Any]:
        """Every setting, and the versions that ran it, for the report."""
        return {
            "workload": self.workload,
            "rate": self.rate,
            "requests": self.requests,
            "device": self.device,
            "model": self.model,
            "dispatch": self.dispatch,
            "partition": self.partition,
            "cost": self.cost_name,
            "truth": self.truth or self.cost_name,
            "slo_ttft": self.slo.ttft,
            "slo_tbt": self.slo.tbt,
            "seed": self.seed,
            "kv_pages": self.kv_pages,
            "page_tokens": self.page_tokens,
            "max_running": self.max_running,
            "noise": self.noise,
            "versions": {"drift-scheduler": version("drift-scheduler"), "python": platform.python_version()},
        }

    @property
    def cost_name(self) -> str:
        """The cost model that is used."""
        if self.cost is not None:
            return self.cost
        return "fitted" if table_name(self.device, self.model) in installed("tables") else "roofline"


class Simulation:
    """A scenario made ready: everything that can be wrong with it is found while it is built, nothing has run.

    Raises DriftError (and its kinds) naming what is wrong.
    """

    def __init__(self, scenario: Scenario, registry: Registry | None = None) -> None:
        _check(scenario)
        self.scenario = scenario
        registry = load() if registry is None else registry
        device, model = device_spec(scenario.device), model_spec(scenario.model)
        dispatch = create(registry, "dispatch policy", scenario.dispatch)
        setting = _arrange(_setting(scenario, registry, device, model), dispatch)
        self.costs: CostModel = Launched(setting.costs, device, model.num_layers)
        self.truth: CostModel = Launched(setting.truth, device, model.num_layers)
        if not setting.device.system:
            self.truth = Contended(self.truth, device, model)
        self.device = setting.device
        self.kv: KvPool = setting.kv
        self.scheduler = Scheduler(
            self.device,
            self.kv,
            dispatch,
            create(registry, "partition policy", scenario.partition),
            self.costs,
            Limits(max_running=scenario.max_running, max_context_tokens=setting.max_context),
        )
        self.requests = workload(registry, scenario)
        self.overheads = Overheads(
            block_seconds=device.block_us * 1e-6,
            switch_seconds=device.switch_us * 1e-6,
            noise=scenario.noise,
            launch_layer_seconds=device.launch_seconds,
        )
        self.metrics = Metrics(self.device, self.kv)

    def run(self, observers: Sequence[Observer] = (), stopwatch: Callable[[], float] | None = None) -> Report:
        """Serve the workload to its end. Raises DriftError where requests are left that nothing will ever serve.

        With a `stopwatch` (monotonic seconds) the report says what a scheduler step took; it then differs from
        run to run.
        """
        try:
            executor = SimulatedExecutor(
                self.device, self.truth, self.requests, overheads=self.overheads, seed=self.scenario.seed
            )
            serve(
                self.scheduler,
                executor,
                lambda step: None,
                [self.metrics, *observers],
                stopwatch=stopwatch,
                on_fault=_end_run,
            )
        except ValueError as error:
            raise DriftError(f"simulation of '{self.scenario.workload}': {error}") from error
        left = self.metrics.offered - sum(self.metrics.ends.values())
        if left:
            raise DriftError(
                f"dispatch policy '{self.scenario.dispatch}' left {left} of {self.metrics.offered} requests unserved "
                f"at {self.metrics.now:.3f} s and nothing running"
            )
        return build_report(self.metrics, self.scenario.config())


def simulate(
    scenario: Scenario, registry: Registry | None = None, observers: Sequence[Observer] = ()
) -> Report:
    """Build and run a scenario."""
    return Simulation(scenario, registry).run(observers)


def workload(registry: Registry, scenario: Scenario) -> Iterable[Request]:
    """The scenario's requests: a trace where the name is a path, else a registered workload."""
    name, options = parse_choice(scenario.workload)
    asked: dict[str, Any] = {"rate": scenario.rate, "requests": scenario.requests, "slo": scenario.slo}
    if name.endswith(TRACE_SUFFIXES) or "/" in name or Path(name).is_file():
        from drift_scheduler.workloads.traces import read_trace

        try:
            return read_trace(name, seed=scenario.seed, **asked, **options)
        except TypeError:
            raise OptionError(
                f"trace '{name}' takes the options block_tokens, closed, max_output, not {', '.join(options)}"
            ) from None
    made: Iterable[Request] = registry.create("workload", name, scenario.seed, **asked, **options)
    return _named(made, f"workload '{name}' (plugin {registry.plugin_of('workload', name)})")


def _named(requests: Iterable[Request], what: str) -> Iterator[Request]:
    """The requests of a workload, which may see only when it begins that an option is wrong. Raises OptionError."""
    try:
        yield from requests
    except (TypeError, ValueError) as error:
        raise OptionError(f"{what}: {error}") from error


def cost_model(registry: Registry, choice: str, scenario: Scenario) -> CostModel:
    """A registered cost model, told the device's and the model's names."""
    name, options = parse_choice(choice)
    named = {"device": scenario.device, "model": scenario.model, **options}
    made: CostModel = registry.create("cost model", name, **named)
    return made


def create(registry: Registry, kind: str, choice: str) -> Any:
    """A registered object from `NAME` or `NAME:option=value:...`."""
    name, options = parse_choice(choice)
    return registry.create(kind, name, **options)


def parse_choice(text: str) -> tuple[str, dict[str, Any]]:
    """`NAME:option=value:...` as a name and its options; values are numbers and true/false where they look so."""
    name, *parts = text.split(":")
    options: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise OptionError(f"'{text}': options are written NAME:option=value, not ':{part}'")
        options[key] = _value(value)
    return name, options


def _value(text: str) -> int | float | bool | str:
    if text in ("true", "false"):
        return text == "true"
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def _end_run(observer: Observer, error: Exception) -> None:
    """A report with steps missing would be worse than none."""
    raise error


def _check(scenario: Scenario) -> None:
    """What the objects themselves cannot see. Raises OptionError."""
    for name, value in (("ttft", scenario.slo.ttft), ("tbt", scenario.slo.tbt)):
        if not (value > 0 and math.isfinite(value)):
            raise OptionError(f"slo-{name} is {value} seconds, need a positive number")
    if not 0 <= scenario.noise <= 2:
        raise OptionError(f"noise is {scenario.noise}, need 0 to 2")
    for name, count in (("page-tokens", scenario.page_tokens), ("max-running", scenario.max_running)):
        if count < 1:
            raise OptionError(f"{name} is {count}, need at least 1")


def _setting(scenario: Scenario, registry: Registry, device: DeviceSpec, model: ModelSpec) -> Setting:
    """The device as it is, before a policy of another system lays it out its own way."""
    costs = cost_model(registry, scenario.cost_name, scenario)
    return Setting(
        spec=device,
        model=model,
        device=_device(device, model, costs),
        costs=costs,
        truth=cost_model(registry, scenario.truth or scenario.cost_name, scenario),
        kv=CountingKv(_pages(scenario, device, model), scenario.page_tokens),
        kv_pages=scenario.kv_pages,
        page_tokens=scenario.page_tokens,
        max_context=model.max_context,
    )


def _arrange(setting: Setting, dispatch: DispatchPolicy) -> Setting:
    """As the policy wants it, where it has a say (`DispatchPolicy.arrange`)."""
    arrange = getattr(dispatch, "arrange", None)
    if arrange is None:
        return setting
    arranged: Setting = arrange(setting)
    return arranged


def _device(spec: DeviceSpec, model: ModelSpec, costs: CostModel) -> Device:
    """The simulated device; a fitted table brings its own menu, and must be of this device and model."""
    costs = innermost(costs)
    if not isinstance(costs, FittedCost):
        return simulated_device(spec, model)
    table = costs.table
    if (table.total_units, table.num_layers) != (spec.units, model.num_layers):
        raise DriftError(
            f"cost table of '{table.model}' on '{table.device}' has {table.total_units} units and {table.num_layers} "
            f"layers; '{model.name}' on '{spec.label}' has {spec.units} and {model.num_layers}"
        )
    return simulated_device(spec, model, table.partitions())


def _pages(scenario: Scenario, device: DeviceSpec, model: ModelSpec) -> int:
    if scenario.kv_pages is None:
        return pages_that_fit(device, model, scenario.page_tokens)
    if scenario.kv_pages < 1:
        raise OptionError(f"kv-pages is {scenario.kv_pages}, need at least 1")
    return scenario.kv_pages
