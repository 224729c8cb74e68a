"""OpenTelemetry spans: one per request, and in it each output's queue, prefill and decode. Needs the extra `otel`.

A request's span continues the trace that its call's metadata names (`traceparent`). Spans are made when a request has
ended, from times that are kept anyway, so that they cost a running stream nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from drift_gateway.observe.request_record import RequestRecord
from drift_gateway.observe.service_stats import EndedOutput
from drift_scheduler.errors import DriftError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    Attributes = dict[str, str | int | float | bool]

NAME: Final = "drift.generate"
INSTALL: Final = "pip install 'drift-gateway[otel]'"


class Spans:
    """Makes a request's spans from its record. `close` sends what is still kept back."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("drift_gateway")
        self._extract = TraceContextTextMapPropagator().extract
        self._inside = trace.set_span_in_context
        self._error = trace.Status(trace.StatusCode.ERROR)
        self._server = trace.SpanKind.SERVER

    def __call__(self, record: RequestRecord) -> None:
        """Export one request."""
        epoch = time.time_ns() - time.monotonic_ns()

        def at(seconds: float) -> int:
            return epoch + int(seconds * 1e9)

        span = self._tracer.start_span(
            NAME,
            context=self._extract(dict(record.call.trace)),
            kind=self._server,
            attributes=_attributes(record),
            start_time=at(record.call.arrival),
        )
        if record.code != "OK":
            span.set_status(self._error)
        inside = self._inside(span)
        for index, output in enumerate(record.outputs):
            for name, start, stop in _phases(output):
                phase = self._tracer.start_span(
                    name, context=inside, attributes=_of_output(index, output), start_time=at(start)
                )
                phase.end(at(stop))
        span.end(at(record.ended))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _phases(output: EndedOutput) -> list[tuple[str, float, float]]:
    """Name, start and end of what it went through."""
    found = []
    for name, start, stop in (
        ("queue", output.arrival, output.scheduled),
        ("prefill", output.scheduled, output.first_token),
        ("decode", output.first_token, output.last_token),
    ):
        if start is not None and stop is not None:
            found.append((name, start, stop))
    return found


def _attributes(record: RequestRecord) -> Attributes:
    found: Attributes = {
        "drift.request_id": record.request_id or "",
        "drift.slo_class": record.slo_class,
        "drift.priority": record.priority,
        "drift.demoted": record.demoted,
        "rpc.grpc.status": record.code,
        "gen_ai.usage.input_tokens": record.outputs[0].prompt_tokens if record.outputs else 0,
        "gen_ai.usage.output_tokens": sum(output.output_tokens for output in record.outputs),
    }
    for name in ("tenant", "session", "reason", "incident"):
        if value := getattr(record, name):
            found[f"drift.{name}"] = value
    return found


def _of_output(index: int, output: EndedOutput) -> Attributes:
    found: Attributes = {"drift.output": index, "drift.cached_tokens": output.cached_tokens}
    for metric, met in output.met.items():
        found[f"drift.{metric}_met"] = met
    return found


def spans_to(where: str) -> Spans:
    """Spans for "otlp" (configured by OTEL_EXPORTER_OTLP_... as everywhere) or "console". Raises DriftError."""
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

        make: Callable[[], SpanExporter] = ConsoleSpanExporter
        if where == "otlp":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            make = OTLPSpanExporter
    except ImportError as error:
        raise DriftError(f"--spans {where} needs {error.name}, which is not installed: {INSTALL}") from error
    resource = Resource.create({SERVICE_NAME: "drift"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(make()))
    return Spans(provider)
