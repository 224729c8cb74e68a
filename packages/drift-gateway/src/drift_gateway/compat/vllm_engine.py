"""vllm.grpc.engine.VllmEngine: what smg, a gateway with OpenAI-compatible HTTP, calls; in front of drift.v1.

smg applies the chat template, tokenizes and detokenizes: token ids come and go, and GetTokenizer gives it the model's
tokenizer files, so that it needs no copy of its own. What it cannot be given (grammars, log probabilities of the
prompt) is refused by name.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any, Final

from drift_core.sampling_params import MAX_N
from drift_gateway import __version__
from drift_gateway.access.tenants import current_tenant
from drift_gateway.calls import Call, call_of
from drift_gateway.compat.endings import finish_reason
from drift_gateway.compat.messages import Messages
from drift_gateway.compat.sampling_json import set_form
from drift_gateway.compat.tokenizer_files import PIECE_BYTES, archive
from drift_gateway.compat.wire import vllm_engine_pb2 as vllm
from drift_gateway.compat.wire import vllm_engine_pb2_grpc
from drift_gateway.generation import Generations
from drift_gateway.refusal import Reason, Refusal, invalid, refusals_as_statuses
from drift_gateway.supervisor import State, Supervisor
from drift_gateway.v1 import generation_pb2 as pb

_FORMS: Final = {"json_schema": "json", "regex": "regex", "json_object": "json_object"}


class VllmEngineService(vllm_engine_pb2_grpc.VllmEngineServicer):
    """Serves the supervisor's model by way of `generations`."""

    def __init__(self, supervisor: Supervisor, generations: Generations) -> None:
        self._supervisor = supervisor
        self._generations = generations
        # By tenant and name; Abort reaches nobody else's.
        self._running: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._began = time.monotonic()

    async def Generate(  # type: ignore[override]  # it writes its messages, and yields none
        self, request: vllm.GenerateRequest, context: Any
    ) -> None:
        """Chunks of new tokens where a stream is asked for, and one Complete per output."""
        call = call_of(context)
        async with refusals_as_statuses(context):
            generation = translated(request)
            served = self._supervisor.served
            if served is not None and served.tokenizer is None:
                del generation.stopping.stop[:]  # smg, which then has one, looks for them itself
            answer = _Answer(generation, request.stream)
            messages = Messages(context.write)
            answering = asyncio.ensure_future(self._answer(generation, call, answer, messages))
            if not await self._unless_aborted(request.request_id, answering):
                for response in answer.aborted():
                    await messages.write(response)

    async def _answer(
        self,
        generation: pb.GenerateRequest,
        call: Call,
        answer: _Answer,
        messages: Messages[vllm.GenerateResponse],
    ) -> None:
        async with aclosing(self._generations.responses(generation, call)) as events:
            async for event in events:
                response = answer.take(event)
                if response is not None:
                    await messages.write(response)

    async def _unless_aborted(self, request_id: str, answering: asyncio.Task[None]) -> bool:
        """Wait for it, while Abort finds it under the request's name; False where it was aborted."""
        key = (current_tenant().name, request_id)
        mine = key not in self._running  # admission refuses a name that is in use
        if mine:
            self._running[key] = answering
        try:
            await asyncio.wait((answering,))
        except asyncio.CancelledError:  # the client left
            answering.cancel()
            await asyncio.wait((answering,))
            raise
        finally:
            if mine:
                del self._running[key]
        if answering.cancelled():
            return False
        answering.result()
        return True

    async def Abort(self, request: vllm.AbortRequest, context: Any) -> vllm.AbortResponse:
        """End requests of Generate, by the names they came with; others are passed over."""
        tenant = current_tenant().name
        for request_id in request.request_ids:
            answering = self._running.get((tenant, request_id))
            if answering is not None:
                answering.cancel()
        return vllm.AbortResponse()

    async def HealthCheck(self, request: vllm.HealthCheckRequest, context: Any) -> vllm.HealthCheckResponse:
        """That requests would be served now; UNAVAILABLE otherwise.

        smg takes any answer as a sign that the model can be asked about, and asks once.
        """
        async with refusals_as_statuses(context):
            self._supervisor.serving()
        return vllm.HealthCheckResponse(healthy=True, message="ready")

    async def GetModelInfo(
        self, request: vllm.GetModelInfoRequest, context: Any
    ) -> vllm.GetModelInfoResponse:
        """The model, under the name it is served by."""
        async with refusals_as_statuses(context):
            ready = self._supervisor.serving().ready
        return vllm.GetModelInfoResponse(
            model_path=ready.model,
            is_generation=True,
            max_context_length=ready.max_context,
            vocab_size=ready.vocab_size,
            served_model_name=ready.model,
            eos_token_ids=ready.eos_token_ids,
            max_req_input_len=ready.max_context,
        )

    async def GetServerInfo(
        self, request: vllm.GetServerInfoRequest, context: Any
    ) -> vllm.GetServerInfoResponse:
        """One engine without replicas."""
        served = self._supervisor.served
        return vllm.GetServerInfoResponse(
            active_requests=0 if served is None else self._supervisor.in_flight,
            is_paused=self._supervisor.state is State.STOPPING,
            uptime_seconds=time.monotonic() - self._began,
            server_type="vllm-grpc",
            data_parallel_size=1,
            max_num_seqs=0 if served is None else served.ready.max_running,
        )

    async def GetLoads(self, request: vllm.GetLoadsRequest, context: Any) -> vllm.GetLoadsResponse:
        """How busy the engine is, as it last said."""
        supervisor = self._supervisor
        load = vllm.SchedulerLoad()
        said, served = supervisor.timeline.load, supervisor.served
        if said is not None and served is not None:
            ready = served.ready
            used = max(0, ready.kv_pages - said.free_pages)
            load.num_running_reqs = said.running
            load.num_waiting_reqs = said.waiting
            load.num_total_reqs = said.running + said.waiting
            load.num_used_tokens = used * ready.page_tokens
            load.max_total_num_tokens = ready.kv_tokens
            load.token_usage = used / ready.kv_pages if ready.kv_pages else 0.0
            load.max_running_requests = ready.max_running
        return vllm.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(), version=__version__, dp_rank_count=1, loads=[load]
        )

    async def GetTokenizer(  # type: ignore[override]  # it writes its messages, and yields none
        self, request: vllm.GetTokenizerRequest, context: Any
    ) -> None:
        """The model's tokenizer files as a ZIP archive in pieces, the last with the archive's SHA-256."""
        async with refusals_as_statuses(context):
            served = self._supervisor.serving()
            if served.tokenizer is None:
                raise Refusal(
                    Reason.NO_TOKENIZER, f"model '{served.ready.model}' has no tokenizer; give smg one"
                )
            data, sha256 = await asyncio.to_thread(archive, served.ready.directory)
            for start in range(0, len(data), PIECE_BYTES):
                piece = vllm.GetTokenizerChunk(data=data[start : start + PIECE_BYTES])
                if start + PIECE_BYTES >= len(data):
                    piece.sha256 = sha256
                await context.write(piece)


def translated(request: vllm.GenerateRequest) -> pb.GenerateRequest:
    """The same request in drift.v1's words. Raises Refusal (INVALID_FIELD) for what it has none for.

    Zero means absent where vLLM's protocol has no way to say so.
    """
    generation = pb.GenerateRequest()
    if request.request_id:
        generation.request_id = request.request_id
    match request.WhichOneof("input"):
        case "tokenized":
            generation.token_ids.ids.extend(request.tokenized.input_ids)
        case "text":
            generation.text = request.text
    params = request.sampling_params
    _refuse_unserved(params)
    _set_sampling(generation.sampling, params)
    _set_stopping(generation.stopping, params)
    constraint = params.WhichOneof("constraint")
    if constraint == "choice":
        generation.structured.choice.choices.extend(params.choice.choices)
    elif constraint in _FORMS:
        set_form(generation.structured, _FORMS[constraint], getattr(params, constraint))
    elif constraint is not None:
        raise invalid(f"sampling_params.{constraint}", "is not served; json_schema, regex and choice are")
    return generation


def _refuse_unserved(params: vllm.SamplingParams) -> None:
    for name in ("prompt_logprobs", "truncate_prompt_tokens"):
        if params.HasField(name):
            raise invalid(f"sampling_params.{name}", "is not served")
    if params.HasField("logprobs") and params.logprobs < 0:
        raise invalid("sampling_params.logprobs", "all of the vocabulary's are not served; at most 20 are")


def _set_sampling(sampling: pb.Sampling, params: vllm.SamplingParams) -> None:
    for name in ("temperature", "logprobs", "seed"):
        if params.HasField(name):
            setattr(sampling, name, getattr(params, name))
    for name in (
        "n",
        "top_p",
        "top_k",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
    ):
        if getattr(params, name):
            setattr(sampling, name, getattr(params, name))
    for token_id, bias in params.logit_bias.items():
        if token_id < 0:
            raise invalid("sampling_params.logit_bias", f"{token_id} is no token id")
        sampling.logit_bias[token_id] = bias


def _set_stopping(stopping: pb.Stopping, params: vllm.SamplingParams) -> None:
    if params.HasField("max_tokens"):
        stopping.max_tokens = params.max_tokens
    if params.min_tokens:
        stopping.min_tokens = params.min_tokens
    stopping.stop.extend(params.stop)
    stopping.stop_token_ids.extend(params.stop_token_ids)
    stopping.ignore_eos = params.ignore_eos
    stopping.include_stop_in_text = params.include_stop_str_in_output


class _Answer:
    """Turns drift.v1's events into vLLM's responses. Without `stream`, tokens wait for their output's end."""

    def __init__(self, generation: pb.GenerateRequest, stream: bool) -> None:
        self._stream = stream
        self._stop_token_ids = frozenset(generation.stopping.stop_token_ids)
        self._top = generation.sampling.logprobs
        self._accepted = pb.Accepted()
        self._last: dict[int, int] = {}
        # Admission has not looked at n yet, so it is not believed here.
        count = min(max(1, generation.sampling.n), MAX_N)
        self._outputs = {index: vllm.GenerateComplete(index=index) for index in range(count)}

    def take(self, message: pb.GenerateResponse) -> vllm.GenerateResponse | None:
        """What to send for one event, if anything. Raises Refusal for ends that are errors."""
        match message.WhichOneof("event"):
            case "accepted":
                self._accepted = message.accepted
            case "token_delta" if message.token_delta.token_ids:
                return self._tokens(message.token_delta)
            case "finished":
                return self._end(message.finished)
        return None

    def aborted(self) -> list[vllm.GenerateResponse]:
        """The ends of the outputs that had none, as vLLM tells of an abort."""
        ends = []
        for complete in self._outputs.values():
            complete.finish_reason = "abort"
            complete.prompt_tokens = self._accepted.prompt_tokens
            complete.completion_tokens = len(complete.output_ids)
            complete.cached_tokens = self._accepted.cached_tokens
            ends.append(vllm.GenerateResponse(complete=complete))
        return ends

    def _tokens(self, delta: pb.TokenDelta) -> vllm.GenerateResponse | None:
        index, token_ids = delta.output_index, delta.token_ids
        self._last[index] = token_ids[-1]
        if not self._stream:
            complete = self._outputs[index]
            complete.output_ids.extend(token_ids)
            if delta.logprobs:
                self._add_logprobs(complete.output_logprobs, delta)
            return None
        chunk = vllm.GenerateStreamChunk(
            token_ids=token_ids,
            prompt_tokens=self._accepted.prompt_tokens,
            completion_tokens=len(token_ids),
            cached_tokens=self._accepted.cached_tokens,
            index=index,
        )
        if delta.logprobs:
            self._add_logprobs(chunk.output_logprobs, delta)
        return vllm.GenerateResponse(chunk=chunk)

    def _end(self, finished: pb.Finished) -> vllm.GenerateResponse:
        index = finished.output_index
        complete = self._outputs.pop(index)
        complete.finish_reason = finish_reason(finished)
        complete.prompt_tokens = finished.usage.prompt_tokens
        complete.completion_tokens = 0 if self._stream else finished.usage.output_tokens
        complete.cached_tokens = finished.usage.cached_tokens
        if finished.HasField("stop_string"):
            complete.matched_stop_str = finished.stop_string
        elif complete.finish_reason == "stop" and self._last.get(index) in self._stop_token_ids:
            complete.matched_token_id = self._last[index]
        return vllm.GenerateResponse(complete=complete)

    def _add_logprobs(self, found: vllm.OutputLogProbs, delta: pb.TokenDelta) -> None:
        for token_id, logprobs in zip(delta.token_ids, delta.logprobs, strict=False):
            found.token_ids.append(token_id)
            found.token_logprobs.append(logprobs.logprob)
            if self._top:
                top = found.top_logprobs.add()
                top.token_ids.extend(candidate.token_id for candidate in logprobs.top)
                top.values.extend(candidate.logprob for candidate in logprobs.top)
