"""Built-in workloads by name, and traces by path. Factories import what they need when called.

Every factory takes `seed` first and the options `rate` (requests per second), `requests` (how many) and `slo`; the
command line passes those three to any workload, a plugin's included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drift_scheduler.domain import SLO, Request

__all__ = ["FACTORIES"]

DEFAULT_REQUESTS = 1000
DEFAULT_RATE = 1.0


def synthetic(
    seed: int = 0,
    rate: float | None = None,
    requests: int | None = None,
    slo: SLO | None = None,
    input_mean: float = 512.0,
    input_min: int = 1,
    input_max: int = 8192,
    output_mean: float = 128.0,
    output_min: int = 1,
    output_max: int = 1024,
    shared_tokens: int = 0,
) -> Iterable[Request]:
    """Truncated lognormal lengths of your choice, Poisson arrivals, optionally one prefix shared by all."""
    from drift_scheduler.workloads import generated

    lengths = generated.Lengths(
        input=generated.Truncated(input_min, input_mean, input_max),
        output=generated.Truncated(output_min, output_mean, output_max),
        shared_tokens=shared_tokens,
    )
    return generated.independent("synthetic", lengths, seed, rate, requests, slo)


def _published(name: str, summary: str) -> Callable[..., Iterable[Request]]:
    def workload(
        seed: int = 0, rate: float | None = None, requests: int | None = None, slo: SLO | None = None
    ) -> Iterable[Request]:
        from drift_scheduler.workloads import generated

        return generated.published(name, seed, rate, requests, slo)

    workload.__doc__ = summary
    workload.__name__ = name.replace("-", "_")
    return workload


def _sessions(name: str, summary: str) -> Callable[..., Iterable[Request]]:
    def workload(
        seed: int = 0,
        rate: float | None = None,
        requests: int | None = None,
        slo: SLO | None = None,
        think: float | None = None,
    ) -> Iterable[Request]:
        from drift_scheduler.workloads import generated

        return generated.published(name, seed, rate, requests, slo, think)

    workload.__doc__ = summary
    workload.__name__ = name.replace("-", "_")
    return workload


FACTORIES: Mapping[str, Callable[..., Iterable[Request]]] = MappingProxyType(
    {
        "synthetic": synthetic,
        "sharegpt": _published(
            "sharegpt", "Chat, one turn: input 4/226/1024, output 4/195/1838 (min/mean/max)."
        ),
        "loogle": _published("loogle", "Long documents: input 3380/30k/81k, output 2/15/326."),
        "openthoughts": _published(
            "openthoughts", "Reasoning: input 311/709/4633, 243 of them shared by all, output 684/8374/32k."
        ),
        "conversation": _sessions(
            "conversation",
            "Multi-turn chat: input 891/7538/123k, 4496 of them reused on average, output 1/342/2000; option think.",
        ),
        "tool-agent": _sessions(
            "tool-agent",
            "Agents calling tools: input 891/8596/123k, 4905 reused on average, output 1/182/2000; option think.",
        ),
    }
)
"""What the built-in plugin registers under `drift_workloads`."""
