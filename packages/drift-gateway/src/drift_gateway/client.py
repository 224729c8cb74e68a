"""Python clients of drift.v1: `DriftClient` (threads) and `AsyncDriftClient` (asyncio).

    with DriftClient("127.0.0.1:50051") as client:
        for event in client.generate("A list is", max_tokens=20):
            ...
        print(client.generate("A list is", temperature=0.0).complete().text)

Times are float seconds, though the wire counts milliseconds and microseconds. Knows only the wire API: neither
engine nor model code is loaded.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self, cast

import grpc
from google.protobuf.message import Message

from drift_gateway.connection import Connection, Tls
from drift_gateway.request_errors import (
    Cancelled,
    DeadlineExceeded,
    InUse,
    InvalidRequest,
    NeverFits,
    NotAllowed,
    NotAuthenticated,
    NotServed,
    Overloaded,
    RequestError,
    ServerFault,
    Unavailable,
    error_of,
)
from drift_gateway.v1 import generation_pb2 as pb
from drift_gateway.v1 import generation_pb2_grpc, info_pb2, info_pb2_grpc
from drift_scheduler.errors import DriftError

__all__ = [
    "CHANNEL_OPTIONS",
    "SLO",
    "Accepted",
    "AsyncDriftClient",
    "AsyncGeneration",
    "Cancelled",
    "Completion",
    "DeadlineExceeded",
    "DriftClient",
    "DriftError",
    "Event",
    "Finished",
    "Generation",
    "InUse",
    "InvalidRequest",
    "Logprobs",
    "NeverFits",
    "NotAllowed",
    "NotAuthenticated",
    "NotServed",
    "Overloaded",
    "RequestError",
    "ServerFault",
    "Timing",
    "TokenDelta",
    "TopLogprob",
    "Unavailable",
    "Usage",
    "build_request",
    "connection_to",
    "error_of",
    "event_of",
    "unanswered",
    "waiting",
]

CHANNEL_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
)
# protoc's grpc plug-in writes no types.
_GENERATION_STUB: Final[Callable[[Any], Any]] = generation_pb2_grpc.GenerationServiceStub
_INFO_STUB: Final[Callable[[Any], Any]] = info_pb2_grpc.InfoServiceStub
_SAMPLING: Final = tuple(pb.Sampling.DESCRIPTOR.fields_by_name)
_STOPPING: Final = tuple(pb.Stopping.DESCRIPTOR.fields_by_name)


# ---------------------------------------------------------------------------------------------- values


@dataclass(frozen=True, slots=True)
class SLO:
    """Latency targets in seconds; `None` takes the server's default.

    `on_infeasible`: what to do when a target cannot be met: "best_effort", "reject" or "demote".
    """

    ttft: float | None = None
    tbt: float | None = None
    e2e: float | None = None
    name: str | None = None
    on_infeasible: str | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The engine has the request, with `queue_position` others ahead of it.

    `cached_tokens`: of the prompt, in the prefix cache, where that is known. `predicted_ttft`: seconds from arrival to
    the first token, where the server can tell. `demoted`: its targets could not be met, and it runs behind the others
    without any, as it asked. `arrival`: on the server's monotonic clock, which the stretches of `watch_stats` are on.
    """

    request_id: str
    model: str
    prompt_tokens: int
    queue_position: int
    cached_tokens: int | None = None
    predicted_ttft: float | None = None
    demoted: bool = False
    arrival: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One likely token of a position."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log probability of the chosen token, and the likeliest ones."""

    logprob: float
    top: tuple[TopLogprob, ...]


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """Tokens of one output. `offsets`: seconds from the request's arrival at the server, one per token."""

    output_index: int
    sequence: int
    text: str
    token_ids: tuple[int, ...]
    offsets: tuple[float, ...]
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one output."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """How one output fared by the server's clock, in seconds; `None` where it did not come to that.

    `prefill_units`, `decode_units`: the split of the device under which most of its tokens were decoded.
    """

    queue: float | None
    prefill: float | None
    ttft: float | None
    tbt_p50: float | None
    tbt_p99: float | None
    tbt_max: float | None
    e2e: float | None
    preemptions: int
    recomputed_tokens: int
    late_tokens: int
    slo: SLO
    ttft_met: bool | None
    tbt_met: bool | None
    e2e_met: bool | None
    gateway: float
    prefill_units: int | None = None
    decode_units: int | None = None
    predicted_ttft: float | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one output. `reason`: "stop", "length", "cancelled", "rejected" or "failed"."""

    output_index: int
    reason: str
    message: str
    stop_string: str | None
    usage: Usage
    timing: Timing


Event = Accepted | TokenDelta | Finished


@dataclass(frozen=True, slots=True)
class Completion:
    """One whole output."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    timing: Timing
    stop_string: str | None = None
    message: str = ""
    logprobs: tuple[Logprobs, ...] = ()


def event_of(response: pb.GenerateResponse) -> Event | None:
    """The event in a response; `None` for a kind this client does not know."""
    match response.WhichOneof("event"):
        case "token_delta":
            return _token_delta(response.token_delta)
        case "accepted":
            return _accepted(response.accepted)
        case "finished":
            return _finished(response.finished)
        case _:
            return None


def _accepted(message: pb.Accepted) -> Accepted:
    return Accepted(
        message.request_id,
        message.model,
        message.prompt_tokens,
        message.queue_position,
        message.cached_tokens if message.HasField("cached_tokens") else None,
        message.predicted_ttft_ms / 1e3 if message.HasField("predicted_ttft_ms") else None,
        message.demoted,
        message.arrival_us / 1e6 if message.HasField("arrival_us") else None,
    )


def _token_delta(delta: pb.TokenDelta) -> TokenDelta:
    logprobs = tuple(
        Logprobs(entry.logprob, tuple(TopLogprob(top.token_id, top.logprob) for top in entry.top))
        for entry in delta.logprobs
    )
    offsets = tuple(offset / 1e6 for offset in delta.offsets_us)
    return TokenDelta(
        delta.output_index, delta.sequence, delta.text, tuple(delta.token_ids), offsets, logprobs
    )


def _finished(message: pb.Finished) -> Finished:
    usage = message.usage
    return Finished(
        message.output_index,
        pb.FinishReason.Name(message.reason).removeprefix("FINISH_REASON_").lower(),
        message.message,
        message.stop_string if message.HasField("stop_string") else None,
        Usage(usage.prompt_tokens, usage.cached_tokens, usage.output_tokens),
        _timing(message.timing),
    )


def _timing(timing: pb.RequestTiming) -> Timing:
    def seconds(message: pb.RequestTiming | pb.SLO, name: str) -> float | None:
        return getattr(message, f"{name}_ms") / 1e3 if message.HasField(f"{name}_ms") else None

    def met(name: str) -> bool | None:
        return getattr(timing, f"{name}_met") if timing.HasField(f"{name}_met") else None

    slo = timing.slo
    return Timing(
        **{
            name: seconds(timing, name)
            for name in ("queue", "prefill", "ttft", "tbt_p50", "tbt_p99", "tbt_max", "e2e")
        },
        preemptions=timing.preemptions,
        recomputed_tokens=timing.recomputed_tokens,
        late_tokens=timing.late_tokens,
        slo=SLO(
            seconds(slo, "ttft"), seconds(slo, "tbt"), seconds(slo, "e2e"), getattr(slo, "class") or None
        ),
        ttft_met=met("ttft"),
        tbt_met=met("tbt"),
        e2e_met=met("e2e"),
        gateway=timing.gateway_ms / 1e3,
        prefill_units=timing.prefill_units if timing.HasField("prefill_units") else None,
        decode_units=timing.decode_units if timing.HasField("decode_units") else None,
        predicted_ttft=seconds(timing, "predicted_ttft"),
    )


# -------------------------------------------------------------------------------------------- requests


def build_request(
    prompt: str | None = None,
    *,
    token_ids: Sequence[int] | None = None,
    messages: Sequence[Mapping[str, str]] | None = None,
    slo: SLO | None = None,
    priority: int | None = None,
    request_id: str | None = None,
    model: str | None = None,
    labels: Mapping[str, str] | None = None,
    session: str | None = None,
    reuse_tokens: int | None = None,
    cache_salt: str | None = None,
    json_schema: str | bool | Mapping[str, Any] | None = None,
    regex: str | None = None,
    choice: Sequence[str] | None = None,
    **options: Any,
) -> pb.GenerateRequest:
    """A GenerateRequest. `options` are the fields of Sampling and Stopping (temperature, max_tokens, stop, …).

    `json_schema` (as JSON text, or as what that says), `regex` or `choice` force the output into a form. Raises
    DriftError on none or several inputs, several forms, and on unknown or ill-typed options. `session`,
    `reuse_tokens` and `cache_salt` are PrefixHints.
    """
    if sum(given is not None for given in (prompt, token_ids, messages)) != 1:
        raise DriftError("give exactly one of prompt, token_ids, messages")
    request = pb.GenerateRequest(
        request_id=request_id, model=model, priority=priority, labels=labels or {}, text=prompt
    )
    try:
        if token_ids is not None:
            request.token_ids.ids.extend(token_ids)
            request.token_ids.SetInParent()
        if messages is not None:
            request.chat.messages.extend(pb.ChatMessage(**message) for message in messages)
            request.chat.SetInParent()
        hints = {"session": session, "reuse_tokens": reuse_tokens, "cache_salt": cache_salt}
        for name, hint in hints.items():
            if hint is not None:
                setattr(request.prefix, name, hint)
        _set_form(request, json_schema, regex, choice)
        for name, value in options.items():
            _set_option(request, name, value)
    except (TypeError, ValueError) as error:
        raise DriftError(f"not a request: {error}") from error
    if slo is not None:
        for name, target in (("ttft_ms", slo.ttft), ("tbt_ms", slo.tbt), ("e2e_ms", slo.e2e)):
            if target is not None:
                setattr(request.slo, name, target * 1e3)
        if slo.name is not None:
            setattr(request.slo, "class", slo.name)
        if slo.on_infeasible is not None:
            request.slo.on_infeasible = _on_infeasible(slo.on_infeasible)
    return request


def _on_infeasible(name: str) -> pb.OnInfeasible:
    known = {full.removeprefix("ON_INFEASIBLE_").lower(): full for full in pb.OnInfeasible.keys()[1:]}
    if name not in known:
        raise DriftError(f"on_infeasible '{name}' is none of {', '.join(known)}")
    value: Any = pb.OnInfeasible.Value(known[name])  # a plain int, which the stubs do not take for the enum's
    return cast(pb.OnInfeasible, value)


def _tokenize_request(
    text: str | None,
    messages: Sequence[Mapping[str, str]] | None,
    special_tokens: bool,
    model: str | None,
) -> pb.TokenizeRequest:
    if (text is None) == (messages is None):
        raise DriftError("give exactly one of text, messages")
    request = pb.TokenizeRequest(model=model, text=text, without_special_tokens=not special_tokens)
    if messages is not None:
        try:
            request.chat.messages.extend(pb.ChatMessage(**message) for message in messages)
        except (TypeError, ValueError) as error:
            raise DriftError(f"not a conversation: {error}") from error
        request.chat.SetInParent()
    return request


def _detokenize_request(
    token_ids: Sequence[int], special_tokens: bool, model: str | None
) -> pb.DetokenizeRequest:
    try:
        return pb.DetokenizeRequest(model=model, token_ids=token_ids, with_special_tokens=special_tokens)
    except (TypeError, ValueError) as error:
        raise DriftError(f"not token ids: {error}") from error


def _set_form(
    request: pb.GenerateRequest,
    json_schema: str | bool | Mapping[str, Any] | None,
    regex: str | None,
    choice: Sequence[str] | None,
) -> None:
    if sum(given is not None for given in (json_schema, regex, choice)) > 1:
        raise DriftError("give at most one of json_schema, regex, choice")
    if json_schema is not None:
        text = json_schema if isinstance(json_schema, str) else json.dumps(json_schema)
        request.structured.json_schema = text
    if regex is not None:
        request.structured.regex = regex
    if choice is not None:
        if isinstance(choice, str):
            raise DriftError("choice is a list of texts, not one text")
        request.structured.choice.choices.extend(choice)
        request.structured.choice.SetInParent()


def _set_option(request: pb.GenerateRequest, name: str, value: Any) -> None:
    if name in _SAMPLING:
        message: Any = request.sampling
    elif name in _STOPPING:
        message = request.stopping
    else:
        raise DriftError(
            f"no generation option '{name}'; there are: {', '.join(sorted(_SAMPLING + _STOPPING))}"
        )
    if value is None:
        return
    if name == "logit_bias":
        message.logit_bias.update(value)
    elif name in {"stop", "stop_token_ids"}:
        getattr(message, name).extend([value] if isinstance(value, str) else value)
    else:
        setattr(message, name, value)


@dataclass(slots=True)
class _Collected:
    """One output as it grows."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finished: Finished | None = None


class _Collector:
    """Events to Completions."""

    def __init__(self) -> None:
        self._outputs: dict[int, _Collected] = {}

    def add(self, event: Event) -> None:
        match event:
            case TokenDelta():
                output = self._outputs.setdefault(event.output_index, _Collected())
                output.text.append(event.text)
                output.token_ids.extend(event.token_ids)
                output.logprobs.extend(event.logprobs)
            case Finished():
                self._outputs.setdefault(event.output_index, _Collected()).finished = event

    def completions(self) -> list[Completion]:
        """One per output, in their order."""
        return [_completion(output) for _, output in sorted(self._outputs.items())]


def _completion(output: _Collected) -> Completion:
    finished = output.finished
    if finished is None:
        raise Unavailable(grpc.StatusCode.UNAVAILABLE, "the stream ended before its output did")
    return Completion(
        "".join(output.text),
        tuple(output.token_ids),
        finished.reason,
        finished.usage,
        finished.timing,
        finished.stop_string,
        finished.message,
        tuple(output.logprobs),
    )


# ---------------------------------------------------------------------------------------------- clients


def connection_to(target: str | Connection, token: str | None, tls: Tls | None) -> Connection:
    """The connection to an address with this token and TLS, both perhaps absent; one that is made stays as it is."""
    return Connection(target, token, tls) if isinstance(target, str) else target


def unanswered(target: str, why: str) -> str:
    """A line for people on a server that did not answer, and what to do."""
    if "failed to connect" in why.lower() and why.lower().endswith("socket closed"):
        why = "the connection was closed at once; where a server speaks TLS, give --tls-ca or --tls"
    elif "failed to connect" in why.lower():
        why = f"nobody answers ({why.rpartition(': ')[2].lower()}); start a server with `drift serve --listen {target}`"
    return f"{target}: {why}"


def waiting(target: str, info: info_pb2.GetServerInfoResponse) -> str:
    """A line for people on a server that does not serve yet, or no more, and is waited for."""
    return f"{target}: {_state(info)}; waiting for it"


class Generation:
    """A running request: iterate over its events, or take it whole. Leaving the iteration early cancels it."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Iterator[Event]:
        try:
            for response in self._call:
                if (event := event_of(response)) is not None:
                    yield event
        except grpc.RpcError as error:
            raise error_of(error) from error
        finally:
            self._call.cancel()

    def complete(self) -> Completion:
        """Wait for the end; the first output. Raises RequestError."""
        return self.completions()[0]

    def completions(self) -> list[Completion]:
        """Wait for the end; all `n` outputs. Raises RequestError."""
        collector = _Collector()
        for event in self:
            collector.add(event)
        return collector.completions()

    def cancel(self) -> None:
        """Abort the request."""
        self._call.cancel()


class DriftClient:
    """A blocking client of one server: HOST:PORT, or a Connection with token and TLS. May be shared by threads."""

    def __init__(self, target: str | Connection, token: str | None = None, tls: Tls | None = None) -> None:
        self._channel = connection_to(target, token, tls).open(CHANNEL_OPTIONS)
        self._generation = _GENERATION_STUB(self._channel)
        self._info = _INFO_STUB(self._channel)

    def generate(
        self, prompt: str | None = None, *, timeout: float | None = None, **fields: Any
    ) -> Generation:
        """Start a request; `fields` as in `build_request`, `timeout` in seconds."""
        return Generation(self._generation.Generate(build_request(prompt, **fields), timeout=timeout))

    def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        special_tokens: bool = True,
        model: str | None = None,
        timeout: float = 30.0,
    ) -> list[int]:
        """The token ids that the server makes of a text or a conversation. Raises RequestError."""
        request = _tokenize_request(text, messages, special_tokens, model)
        answer: pb.TokenizeResponse = self._ask(self._generation.Tokenize, request, timeout)
        return list(answer.token_ids)

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        special_tokens: bool = False,
        model: str | None = None,
        timeout: float = 30.0,
    ) -> str:
        """The text of token ids. Raises RequestError."""
        request = _detokenize_request(token_ids, special_tokens, model)
        answer: pb.DetokenizeResponse = self._ask(self._generation.Detokenize, request, timeout)
        return answer.text

    def model(self, name: str | None = None, timeout: float = 10.0) -> info_pb2.Model:
        """The model of that name, or the one that is served. Raises RequestError."""
        request = info_pb2.GetModelRequest(name=name)
        answer: info_pb2.GetModelResponse = self._ask(self._info.GetModel, request, timeout)
        return answer.model

    def models(self, timeout: float = 10.0) -> list[info_pb2.Model]:
        """Every model that is served: none while the server starts. Raises RequestError."""
        request = info_pb2.ListModelsRequest()
        answer: info_pb2.ListModelsResponse = self._ask(self._info.ListModels, request, timeout)
        return list(answer.models)

    def plugins(self, timeout: float = 30.0) -> list[info_pb2.Plugin]:
        """The policies, cost models and other parts that are installed there. Raises RequestError."""
        request = info_pb2.ListPluginsRequest()
        answer: info_pb2.ListPluginsResponse = self._ask(self._info.ListPlugins, request, timeout)
        return list(answer.plugins)

    def server_info(self, timeout: float = 10.0) -> info_pb2.GetServerInfoResponse:
        """What is served there. Raises RequestError."""
        request = info_pb2.GetServerInfoRequest()
        info: info_pb2.GetServerInfoResponse = self._ask(self._info.GetServerInfo, request, timeout)
        return info

    def load(self, timeout: float = 10.0) -> info_pb2.Load:
        """How full the server is. Raises RequestError."""
        request = info_pb2.GetLoadRequest()
        answer: info_pb2.GetLoadResponse = self._ask(self._info.GetLoad, request, timeout)
        return answer.load

    @staticmethod
    def _ask(method: Any, request: Message, timeout: float) -> Any:
        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise error_of(error) from error

    def watch_stats(self, interval: float = 0.5) -> Iterator[info_pb2.WatchStatsResponse]:
        """Load and timeline every `interval` seconds, until the iteration is left."""
        call = self._info.WatchStats(info_pb2.WatchStatsRequest(interval_ms=round(interval * 1e3)))
        try:
            yield from call
        except grpc.RpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()

    def wait_ready(self, timeout: float = 120.0) -> info_pb2.GetServerInfoResponse:
        """Wait until requests are served. Raises Unavailable after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        state = "nobody answers"
        while (left := deadline - time.monotonic()) > 0:
            try:
                info = self.server_info(timeout=min(left, 5.0))
                if info.readiness == info_pb2.READINESS_READY:
                    return info
                state = _state(info)
            except (Unavailable, DeadlineExceeded) as error:
                state = str(error)
            time.sleep(0.1)
        raise Unavailable(grpc.StatusCode.UNAVAILABLE, f"not ready after {timeout:g} s: {state}")

    def close(self) -> None:
        """Close the connection; running requests are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncGeneration:
    """A running request on an asyncio loop. Leaving the iteration early cancels it."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._cancelled = False

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            async for response in self._call:
                if (event := event_of(response)) is not None:
                    yield event
        except grpc.RpcError as error:
            raise error_of(error) from error
        except (
            asyncio.CancelledError
        ) as error:  # which is also what gRPC raises for a call that was cancelled
            task = asyncio.current_task()
            if not self._cancelled or (task is not None and task.cancelling()):
                raise
            raise Cancelled(grpc.StatusCode.CANCELLED, "the request was cancelled here") from error
        finally:
            self._call.cancel()

    async def complete(self) -> Completion:
        """Wait for the end; the first output. Raises RequestError."""
        return (await self.completions())[0]

    async def completions(self) -> list[Completion]:
        """Wait for the end; all `n` outputs. Raises RequestError."""
        collector = _Collector()
        async for event in self:
            collector.add(event)
        return collector.completions()

    def cancel(self) -> None:
        """Abort the request: whoever waits for it gets `Cancelled`."""
        self._cancelled = True
        self._call.cancel()


class AsyncDriftClient:
    """A client of one server on the running asyncio loop: HOST:PORT, or a Connection with token and TLS."""

    def __init__(self, target: str | Connection, token: str | None = None, tls: Tls | None = None) -> None:
        self._channel = connection_to(target, token, tls).open_async(CHANNEL_OPTIONS)
        self._generation = _GENERATION_STUB(self._channel)
        self._info = _INFO_STUB(self._channel)

    def generate(
        self, prompt: str | None = None, *, timeout: float | None = None, **fields: Any
    ) -> AsyncGeneration:
        """Start a request; `fields` as in `build_request`, `timeout` in seconds."""
        return AsyncGeneration(self._generation.Generate(build_request(prompt, **fields), timeout=timeout))

    async def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        special_tokens: bool = True,
        model: str | None = None,
        timeout: float = 30.0,
    ) -> list[int]:
        """The token ids that the server makes of a text or a conversation. Raises RequestError."""
        request = _tokenize_request(text, messages, special_tokens, model)
        answer: pb.TokenizeResponse = await self._ask(self._generation.Tokenize, request, timeout)
        return list(answer.token_ids)

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        special_tokens: bool = False,
        model: str | None = None,
        timeout: float = 30.0,
    ) -> str:
        """The text of token ids. Raises RequestError."""
        request = _detokenize_request(token_ids, special_tokens, model)
        answer: pb.DetokenizeResponse = await self._ask(self._generation.Detokenize, request, timeout)
        return answer.text

    async def model(self, name: str | None = None, timeout: float = 10.0) -> info_pb2.Model:
        """The model of that name, or the one that is served. Raises RequestError."""
        request = info_pb2.GetModelRequest(name=name)
        answer: info_pb2.GetModelResponse = await self._ask(self._info.GetModel, request, timeout)
        return answer.model

    async def models(self, timeout: float = 10.0) -> list[info_pb2.Model]:
        """Every model that is served: none while the server starts. Raises RequestError."""
        request = info_pb2.ListModelsRequest()
        answer: info_pb2.ListModelsResponse = await self._ask(self._info.ListModels, request, timeout)
        return list(answer.models)

    async def plugins(self, timeout: float = 30.0) -> list[info_pb2.Plugin]:
        """The policies, cost models and other parts that are installed there. Raises RequestError."""
        request = info_pb2.ListPluginsRequest()
        answer: info_pb2.ListPluginsResponse = await self._ask(self._info.ListPlugins, request, timeout)
        return list(answer.plugins)

    async def server_info(self, timeout: float = 10.0) -> info_pb2.GetServerInfoResponse:
        """What is served there. Raises RequestError."""
        request = info_pb2.GetServerInfoRequest()
        info: info_pb2.GetServerInfoResponse = await self._ask(self._info.GetServerInfo, request, timeout)
        return info

    async def load(self, timeout: float = 10.0) -> info_pb2.Load:
        """How full the server is. Raises RequestError."""
        request = info_pb2.GetLoadRequest()
        answer: info_pb2.GetLoadResponse = await self._ask(self._info.GetLoad, request, timeout)
        return answer.load

    @staticmethod
    async def _ask(method: Any, request: Message, timeout: float) -> Any:
        try:
            return await method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise error_of(error) from error

    async def watch_stats(self, interval: float = 0.5) -> AsyncIterator[info_pb2.WatchStatsResponse]:
        """Load and timeline every `interval` seconds, until the iteration is left."""
        call = self._info.WatchStats(info_pb2.WatchStatsRequest(interval_ms=round(interval * 1e3)))
        try:
            async for response in call:
                yield response
        except grpc.RpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()

    async def wait_ready(self, timeout: float = 120.0) -> info_pb2.GetServerInfoResponse:
        """Wait until requests are served. Raises Unavailable after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        state = "nobody answers"
        while (left := deadline - time.monotonic()) > 0:
            try:
                info = await self.server_info(timeout=min(left, 5.0))
                if info.readiness == info_pb2.READINESS_READY:
                    return info
                state = _state(info)
            except (Unavailable, DeadlineExceeded) as error:
                state = str(error)
            await asyncio.sleep(0.1)
        raise Unavailable(grpc.StatusCode.UNAVAILABLE, f"not ready after {timeout:g} s: {state}")

    async def close(self) -> None:
        """Close the connection; running requests are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _state(info: info_pb2.GetServerInfoResponse) -> str:
    state = info_pb2.Readiness.Name(info.readiness).removeprefix("READINESS_").lower()
    return f"{state} ({info.start_up.phase})" if info.HasField("start_up") else state
