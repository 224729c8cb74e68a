"""What `/metrics` says, in Prometheus's text format, computed when it is asked for from counts kept anyway.

Names, labels and meanings of what vLLM has too are vLLM's, so that its dashboards and autoscalers read them; what
only this server has is called `drift_...`. METRICS is the whole list; docs/operations.md is held against it. Every
label has a bounded number of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from drift_gateway.access.tenants import Tenant
from drift_gateway.observe.service_stats import Buckets, Histograms
from drift_gateway.supervisor import Supervisor
from drift_scheduler.domain import FinishReason

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
MODES: Final = ("spatial", "temporal", "fused", "exclusive", "idle")
VLLM_REASONS: Final = {
    FinishReason.STOP.value: "stop",
    FinishReason.LENGTH.value: "length",
    FinishReason.CANCELLED.value: "abort",
    FinishReason.REJECTED.value: "rejected",
    FinishReason.FAILED.value: "error",
}

Sample = tuple[tuple[str, ...], float]
Read = Callable[[Supervisor], Iterable[Sample]]


@dataclass(frozen=True, slots=True)
class Described:
    """One metric: `kind` is counter, gauge or histogram; counters' names have their `_total`.

    `read` gives the samples of counters and gauges, `buckets` a histogram's.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str
    read: Read | None = None
    buckets: Callable[[Histograms], Buckets] | None = None


def _one(value: Callable[[Supervisor], float | None]) -> Read:
    """A metric without labels; no sample where there is no value now."""

    def read(supervisor: Supervisor) -> Iterator[Sample]:
        found = value(supervisor)
        if found is not None:
            yield (), float(found)

    return read


def _kv_usage(supervisor: Supervisor) -> float | None:
    load, served = supervisor.timeline.load, supervisor.last_ready
    if load is None or served is None or not served.ready.kv_pages:
        return None
    return 1.0 - load.free_pages / served.ready.kv_pages


def _ended(supervisor: Supervisor) -> Iterator[Sample]:
    for reason, count in supervisor.stats.ended_by_reason.items():
        yield (VLLM_REASONS.get(reason, "other"),), count


def _partition(supervisor: Supervisor) -> Iterator[Sample]:
    prefill, decode = supervisor.timeline.use.partition or (0, 0)
    yield ("prefill",), prefill
    yield ("decode",), decode


def _sharing(supervisor: Supervisor) -> Iterator[Sample]:
    seconds = supervisor.timeline.sharing_seconds
    for mode in MODES:
        yield (mode,), seconds.get(None if mode == "idle" else mode, 0.0)


def _lanes(supervisor: Supervisor) -> Iterator[Sample]:
    use = supervisor.timeline.use
    yield ("prefill",), use.prefill_requests
    yield ("decode",), use.decode_requests


def _cost_errors(supervisor: Supervisor) -> Iterator[Sample]:
    load = supervisor.timeline.load
    if load is None:
        return
    for phase, error in (("prefill", load.prefill_error), ("decode", load.decode_error)):
        if error is not None:
            yield (phase,), error


def _attained(place: int) -> Read:
    def read(supervisor: Supervisor) -> Iterator[Sample]:
        for labels, counts in sorted(supervisor.stats.by_target.items()):
            yield labels, counts[place]

    return read


def _tenants(value: Callable[[Tenant], float]) -> Read:
    def read(supervisor: Supervisor) -> Iterator[Sample]:
        for tenant in supervisor.known_tenants():
            yield (tenant.name,), value(tenant)

    return read


def _preemptions(supervisor: Supervisor) -> float | None:
    load = supervisor.timeline.load
    return None if load is None else load.preemptions


METRICS: Final = (
    Described("vllm:num_requests_running", "gauge", (), "Requests that hold KV.",
              _one(lambda s: s.timeline.load.running if s.timeline.load else None)),
    Described("vllm:num_requests_waiting", "gauge", (), "Requests that wait for prefill.",
              _one(lambda s: s.timeline.load.waiting if s.timeline.load else None)),
    Described("vllm:kv_cache_usage_perc", "gauge", (), "Share of the KV pool's pages that requests hold, 0 to 1.",
              _one(_kv_usage)),
    Described("vllm:num_preemptions_total", "counter", (), "Times that a request lost its KV to others.",
              _one(_preemptions)),
    Described("vllm:prefix_cache_queries_total", "counter", (), "Prompt tokens of requests that ended.",
              _one(lambda s: s.stats.prompt_tokens)),
    Described("vllm:prefix_cache_hits_total", "counter", (), "Of those, the ones whose KV was in the prefix cache.",
              _one(lambda s: s.stats.cached_tokens)),
    Described("vllm:prompt_tokens_total", "counter", (), "Prompt tokens of requests that ended.",
              _one(lambda s: s.stats.prompt_tokens)),
    Described("vllm:generation_tokens_total", "counter", (), "Tokens generated.",
              _one(lambda s: s.timeline.tokens_generated)),
    Described("vllm:request_success_total", "counter", ("finished_reason",),
              "Outputs that ended, by reason: stop, length, abort, rejected, error.", _ended),
    Described("vllm:time_to_first_token_seconds", "histogram", (), "Arrival to first token.",
              buckets=lambda h: h.first_token),
    Described("vllm:inter_token_latency_seconds", "histogram", (), "Gaps between consecutive tokens of an output.",
              buckets=lambda h: h.inter_token),
    Described("vllm:e2e_request_latency_seconds", "histogram", (), "Arrival to last token.", buckets=lambda h: h.whole),
    Described("vllm:request_queue_time_seconds", "histogram", (), "Arrival to the start of prefill.",
              buckets=lambda h: h.queue),
    Described("vllm:request_prefill_time_seconds", "histogram", (), "Start of prefill to first token.",
              buckets=lambda h: h.prefill),
    Described("vllm:request_decode_time_seconds", "histogram", (), "First token to last token.",
              buckets=lambda h: h.decode),
    Described("vllm:request_prompt_tokens", "histogram", (), "Prompt tokens per output.",
              buckets=lambda h: h.prompt_tokens),
    Described("vllm:request_generation_tokens", "histogram", (), "Tokens generated per output.",
              buckets=lambda h: h.output_tokens),
    Described("drift_partition_units", "gauge", ("lane",),
              "Units (SMs or cores) of each lane under the partition in force; 0 while nothing runs.", _partition),
    Described("drift_partition_switches_total", "counter", (), "Times that the partition changed.",
              _one(lambda s: s.timeline.partition_switches)),
    Described("drift_sharing_seconds_total", "counter", ("mode",),
              "Seconds the device was shared this way: spatial, temporal, fused, exclusive, idle.", _sharing),
    Described("drift_lane_requests", "gauge", ("lane",), "Requests in each lane now; 0 is an idle lane.", _lanes),
    Described("drift_cost_model_error_ratio", "gauge", ("phase",),
              "How far the cost model's predictions were from what was measured lately, 0.1 being 10%.", _cost_errors),
    Described("drift_slo_attained_total", "counter", ("class", "metric"),
              "Outputs within their target of ttft, tbt (its 99th percentile) or e2e, by SLO class.", _attained(0)),
    Described("drift_slo_outputs_total", "counter", ("class", "metric"),
              "Outputs that had such a target, attained or not.", _attained(1)),
    Described("drift_waiting_prefill_tokens", "gauge", (),
              "Prompt tokens of outputs in flight that have no token yet.",
              _one(lambda s: s.waiting_prefill_tokens)),
    Described("drift_outputs_in_flight", "gauge", (), "Outputs let in that have not ended.",
              _one(lambda s: s.in_flight)),
    Described("drift_tenant_requests_total", "counter", ("tenant",), "Requests of this tenant that were let in.",
              _tenants(lambda t: t.total.requests)),
    Described("drift_tenant_rate_limited_total", "counter", ("tenant",), "Those refused for one of its limits.",
              _tenants(lambda t: t.total.refused)),
    Described("drift_tenant_prompt_tokens_total", "counter", ("tenant",), "Prompt tokens of this tenant.",
              _tenants(lambda t: t.total.prompt_tokens)),
    Described("drift_tenant_output_tokens_total", "counter", ("tenant",), "Tokens generated for this tenant.",
              _tenants(lambda t: t.total.output_tokens)),
    Described("drift_tenant_outputs_in_flight", "gauge", ("tenant",), "Outputs of this tenant that have not ended.",
              _tenants(lambda t: t.total.in_flight)),
    Described("drift_engine_ready", "gauge", (), "1 when new requests are served, 0 otherwise.",
              _one(lambda s: s.healthy)),
    Described("drift_engine_restarts_total", "counter", (), "Times the engine was started again.",
              _one(lambda s: s.restarts)),
    Described("drift_gateways_serving", "gauge", (), "Gateway processes that serve; see --gateways.",
              _one(lambda s: s.gateways())),
    Described("drift_gateway_restarts_total", "counter", (), "Times one of several gateways was started again.",
              _one(lambda s: s.gateway_restarts)),
)  # fmt: skip


class GatewayCollector(Collector):
    """Reads everything in METRICS off a supervisor."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are not checked against other collectors."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every metric with what it is now."""
        served = self._supervisor.last_ready
        model = served.ready.model if served is not None else ""
        for metric in METRICS:
            yield self._family(metric, model)

    def _family(self, metric: Described, model: str) -> Metric:
        own = metric.name.startswith("drift_")
        extra = {} if own else {"model_name": model, "engine": "0"}
        labels = (*metric.labels, *extra)
        values = tuple(extra.values())
        if metric.buckets is not None:
            buckets = metric.buckets(self._supervisor.stats.histograms)
            histogram = HistogramMetricFamily(metric.name, metric.help, labels=labels)
            histogram.add_metric(values, buckets.cumulative(), buckets.total)
            return histogram
        assert metric.read is not None, f"{metric.name} has no source"
        family: CounterMetricFamily | GaugeMetricFamily
        if metric.kind == "counter":
            family = CounterMetricFamily(metric.name, metric.help, labels=labels)
        else:
            family = GaugeMetricFamily(metric.name, metric.help, labels=labels)
        for found, value in metric.read(self._supervisor):
            family.add_metric((*found, *values), value)
        return family


class MetricsPage:
    """The text of `/metrics`: ours, and what Prometheus's client knows of the process."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._registry = CollectorRegistry()
        self._registry.register(GatewayCollector(supervisor))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def text(self, now: float) -> bytes:
        """Everything as it is `now` (monotonic seconds)."""
        self._supervisor.timeline.cut(now)
        return generate_latest(self._registry)


def table() -> str:
    """METRICS as a Markdown table, for docs/operations.md."""
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
