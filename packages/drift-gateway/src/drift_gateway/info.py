"""drift.v1.InfoService: what is served and how it is doing, from the supervisor's state."""

from __future__ import annotations

import asyncio
import time

import grpc

from drift_core.frames import Ready
from drift_gateway import __version__
from drift_gateway.installed import installed_plugins
from drift_gateway.observe.service_stats import ClassReport
from drift_gateway.observe.timeline import Stretch, Watcher
from drift_gateway.outputs import wire_slo
from drift_gateway.prompts import not_served
from drift_gateway.refusal import Refusal, abort, invalid, refusals_as_statuses
from drift_gateway.supervisor import Served, State, Supervisor
from drift_gateway.v1 import info_pb2 as pb
from drift_gateway.v1 import info_pb2_grpc
from drift_scheduler.domain import SLO

DEFAULT_INTERVAL_MS = 500
READINESS = {
    State.STARTING: pb.READINESS_STARTING,
    State.READY: pb.READINESS_READY,
    State.RESTARTING: pb.READINESS_RESTARTING,
    State.DRAINING: pb.READINESS_DRAINING,
    State.STOPPING: pb.READINESS_STOPPING,
}
SHARINGS = {
    None: pb.SHARING_IDLE,
    "spatial": pb.SHARING_SPATIAL,
    "temporal": pb.SHARING_TEMPORAL,
    "fused": pb.SHARING_FUSED,
    "exclusive": pb.SHARING_EXCLUSIVE,
}


class InfoService(info_pb2_grpc.InfoServiceServicer):
    """Answers in every state. `stopping` ends the streams of watchers. `process`: which of how many gateways it is."""

    def __init__(
        self,
        supervisor: Supervisor,
        max_in_flight: int,
        stopping: asyncio.Event,
        process: tuple[int, int] = (1, 1),
    ) -> None:
        self._supervisor = supervisor
        self._process = process
        self._max_in_flight = max_in_flight
        self._stopping = stopping

    async def GetServerInfo(
        self,
        request: pb.GetServerInfoRequest,
        context: grpc.aio.ServicerContext[pb.GetServerInfoRequest, pb.GetServerInfoResponse],
    ) -> pb.GetServerInfoResponse:
        """What is served, and whether it is ready."""
        return self.describe()

    def describe(self) -> pb.GetServerInfoResponse:
        """What GetServerInfo answers."""
        supervisor = self._supervisor
        info = pb.GetServerInfoResponse(
            version=__version__, readiness=READINESS[supervisor.state], engine_restarts=supervisor.restarts
        )
        info.gateway, info.gateways = self._process
        if supervisor.served is None and supervisor.phase is not None:
            phase = supervisor.phase
            info.start_up.CopyFrom(pb.StartUp(phase=phase.phase, fraction=phase.fraction))
        if supervisor.last_ready is not None:
            _describe(info, supervisor.last_ready)
        return info

    async def GetModel(
        self,
        request: pb.GetModelRequest,
        context: grpc.aio.ServicerContext[pb.GetModelRequest, pb.GetModelResponse],
    ) -> pb.GetModelResponse:
        """One model that is served."""
        async with refusals_as_statuses(context):
            served = self._supervisor.last_ready or self._supervisor.serving()
            if request.HasField("name") and request.name != served.ready.model:
                raise not_served(request.name, served.ready, field="name")
            return pb.GetModelResponse(model=_model(served))
        raise AssertionError("the call was aborted")

    async def ListModels(
        self,
        request: pb.ListModelsRequest,
        context: grpc.aio.ServicerContext[pb.ListModelsRequest, pb.ListModelsResponse],
    ) -> pb.ListModelsResponse:
        """Every model that is served."""
        served = self._supervisor.last_ready
        return pb.ListModelsResponse(models=[] if served is None else [_model(served)])

    async def ListPlugins(
        self,
        request: pb.ListPluginsRequest,
        context: grpc.aio.ServicerContext[pb.ListPluginsRequest, pb.ListPluginsResponse],
    ) -> pb.ListPluginsResponse:
        """What is installed."""
        async with refusals_as_statuses(context):
            return pb.ListPluginsResponse(plugins=await asyncio.to_thread(installed_plugins))
        raise AssertionError("the call was aborted")

    async def GetLoad(
        self,
        request: pb.GetLoadRequest,
        context: grpc.aio.ServicerContext[pb.GetLoadRequest, pb.GetLoadResponse],
    ) -> pb.GetLoadResponse:
        """How full it is."""
        return pb.GetLoadResponse(load=self._load())

    async def WatchStats(  # type: ignore[override]  # it writes its messages, and yields none
        self,
        request: pb.WatchStatsRequest,
        context: grpc.aio.ServicerContext[pb.WatchStatsRequest, pb.WatchStatsResponse],
    ) -> None:
        """Load and timeline until the client leaves or the server stops."""
        try:
            interval = _interval(request)
        except Refusal as refusal:
            await abort(context, refusal)
        watcher = self.watcher()
        while True:
            last = self.stopping
            await context.write(self.stats(watcher, time.monotonic()))
            if last:
                return
            try:
                await asyncio.wait_for(self._stopping.wait(), interval)
            except TimeoutError:
                continue

    @property
    def stopping(self) -> bool:
        """Whether watchers should leave."""
        return self._stopping.is_set()

    def watcher(self, since: float | None = None) -> Watcher:
        """A reader of the timeline, from now or `since` on, for `stats`."""
        return self._supervisor.timeline.watch(since)

    def stats(self, watcher: Watcher, now: float) -> pb.WatchStatsResponse:
        """What WatchStats tells at `now` a reader that last looked when `watcher` did."""
        stretches, dropped = watcher.take(now)
        return pb.WatchStatsResponse(
            time_us=int(now * 1e6),
            load=self._load(),
            stretches=map(_stretch, stretches),
            dropped=dropped,
            classes=map(_class_stats, self._supervisor.stats.classes(now)),
        )

    def _load(self) -> pb.Load:
        supervisor = self._supervisor
        timeline, served = supervisor.timeline, supervisor.served
        load = pb.Load(
            in_flight=supervisor.in_flight,
            max_in_flight=self._max_in_flight,
            tokens_generated=timeline.tokens_generated,
            requests_finished=timeline.requests_finished,
            waiting_prefill_tokens=supervisor.waiting_prefill_tokens,
            prompt_tokens=supervisor.stats.prompt_tokens,
            cached_tokens=supervisor.stats.cached_tokens,
        )
        if served is not None:
            load.total_pages = served.ready.kv_pages
        if timeline.load is not None:
            load.waiting = timeline.load.waiting
            load.running = timeline.load.running
            load.free_pages = timeline.load.free_pages
            load.preemptions = timeline.load.preemptions
        return load


def _class_stats(report: ClassReport) -> pb.ClassStats:
    message = pb.ClassStats(finished=report.finished, goodput=report.goodput)
    setattr(message, "class", report.name)
    for field, share in (
        ("ttft_attainment", report.ttft_attainment),
        ("tbt_attainment", report.tbt_attainment),
    ):
        if share is not None:
            setattr(message, field, share)
    for field, seconds in (
        ("ttft_p50_ms", report.ttft_p50),
        ("ttft_p99_ms", report.ttft_p99),
        ("tbt_p50_ms", report.tbt_p50),
        ("tbt_p99_ms", report.tbt_p99),
        ("ttft_target_ms", report.ttft_target),
        ("tbt_target_ms", report.tbt_target),
    ):
        if seconds is not None:
            setattr(message, field, seconds * 1e3)
    return message


def _interval(request: pb.WatchStatsRequest) -> float:
    interval_ms = request.interval_ms if request.HasField("interval_ms") else DEFAULT_INTERVAL_MS
    if not 20 <= interval_ms <= 60_000:
        raise invalid("interval_ms", f"{interval_ms} is not from 20 to 60000")
    return interval_ms / 1e3


def _describe(info: pb.GetServerInfoResponse, served: Served) -> None:
    ready = served.ready
    info.model.CopyFrom(_model(served))
    info.device.CopyFrom(pb.Device(name=ready.device, units=ready.units, partition_menu=_menu(ready)))
    info.policies.CopyFrom(pb.Policies(dispatch=ready.dispatch, partition=ready.partition))
    info.kv_pool.CopyFrom(
        pb.KvPool(
            page_tokens=ready.page_tokens,
            total_pages=ready.kv_pages,
            total_tokens=ready.kv_tokens,
            max_running=ready.max_running,
        )
    )
    info.slo_defaults.CopyFrom(wire_slo(SLO(ready.slo_ttft, ready.slo_tbt)))


def _model(served: Served) -> pb.Model:
    ready, tokenizer = served.ready, served.tokenizer
    return pb.Model(
        name=ready.model,
        vocab_size=ready.vocab_size,
        max_context_tokens=ready.max_context,
        num_layers=ready.num_layers,
        dtype=ready.dtype,
        has_tokenizer=tokenizer is not None,
        has_chat_template=tokenizer is not None and tokenizer.has_chat_template,
    )


def _menu(ready: Ready) -> list[pb.Partition]:
    return [pb.Partition(prefill_units=prefill, decode_units=decode) for prefill, decode in ready.menu]


def _stretch(stretch: Stretch) -> pb.Stretch:
    use = stretch.use
    message = pb.Stretch(
        start_us=int(stretch.start * 1e6),
        stop_us=int(stretch.stop * 1e6),
        sharing=SHARINGS.get(use.sharing, pb.SHARING_UNSPECIFIED),
        prefill_requests=use.prefill_requests,
        decode_requests=use.decode_requests,
    )
    if use.partition is not None:
        prefill, decode = use.partition
        message.partition.CopyFrom(pb.Partition(prefill_units=prefill, decode_units=decode))
    return message
