"""drift.v1.GenerationService, and the one way from a GenerateRequest to its stream of events that all services use.

One task per stream; it takes what the engine told since it last looked, so a reader that lags gets fewer, larger
messages and never a queue of them. Leaving the stream, however it happens, cancels what still runs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc

from drift_core.frames import FinishedItem
from drift_core.link import Submission
from drift_core.submission import TOO_SLOW
from drift_core.tokenizer import IncrementalDetokenizer
from drift_gateway import prompts
from drift_gateway.admission import Admitted, check, tokenized
from drift_gateway.calls import Call, call_of
from drift_gateway.direct import DirectWriter, Write
from drift_gateway.gate import Gate, GateLimits, Verdict
from drift_gateway.observe.request_record import Recorder, RequestRecord, tell
from drift_gateway.observe.splits_used import SplitsUsed
from drift_gateway.outputs import Output
from drift_gateway.refusal import Reason, Refusal, invalid, refusals_as_statuses
from drift_gateway.supervisor import Served, Supervisor, in_use
from drift_gateway.v1 import generation_pb2 as pb
from drift_gateway.v1 import generation_pb2_grpc
from drift_scheduler.domain import FinishReason

log = logging.getLogger("drift.gateway")

Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]


class Generations:
    """Serves requests from whatever engine the supervisor keeps, as far as the gate lets them in."""

    def __init__(self, supervisor: Supervisor, limits: GateLimits) -> None:
        self._supervisor = supervisor
        self._gate = Gate(supervisor.ahead, limits)
        self.recorders: list[Recorder] = []
        """Told of every request when it has ended, refused ones included."""

    async def responses(
        self, request: pb.GenerateRequest, call: Call, write: Write | None = None
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """The events of one request, from Accepted to its last Finished, as fast as they are taken.

        With `write`, most events of tokens are not yielded but written with it, which costs half; never while the
        one that was yielded is still looked at.

        Raises Refusal or EngineGone (`refusal.refusal_of` makes a Refusal of either) where the stream ends with a
        status. Close it, with `contextlib.aclosing`: that cancels what still runs.
        """
        record = RequestRecord.begin(request, call)
        error: BaseException | None = None
        try:
            async with aclosing(self._responses(request, call, record, write)) as responses:
                async for response in responses:
                    yield response
        except BaseException as raised:  # the client left too: everything goes on as it came
            error = raised
            raise
        finally:
            record.end(error)
            error = None  # whose traceback has this frame: a cycle that would keep all of the request
            tell(self.recorders, record)

    async def _responses(
        self, request: pb.GenerateRequest, call: Call, record: RequestRecord, write: Write | None
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        supervisor = self._supervisor
        served = supervisor.serving()
        admitted, verdict = await self._admit(request, served, call)
        record.request_id, record.demoted = admitted.request_id, admitted.demoted
        await served.client.free(admitted.output_ids)
        supervisor.serving()  # that took its time, and whoever drains or stops meanwhile waits for no such request
        submission = supervisor.submit(served, admitted.frames())
        supervisor.ahead.add(admitted.output_ids, verdict.newcomer, time.monotonic(), verdict.forecast)
        supervisor.splits.watch(admitted.output_ids)
        outputs: list[Output] = []
        timer = _end_at(call.deadline, submission)
        try:
            for k in range(len(submission.requests)):
                outputs.append(_output(served, admitted, k, submission, supervisor.splits))
            async with aclosing(_events(served, admitted, submission, outputs, write)) as events:
                async for event in events:
                    yield event
        finally:  # also on CancelledError, which goes on: the client left or its deadline passed
            if timer is not None:
                timer.cancel()
            for output_id in admitted.output_ids:
                supervisor.ahead.remove(output_id)
            supervisor.splits.forget(admitted.output_ids)
            record.too_slow = submission.lagging
            stopped_after = {output.progress.id: output.stopped_after for output in outputs}
            record.outputs = supervisor.ended(submission, stopped_after)

    async def _admit(
        self, request: pb.GenerateRequest, served: Served, call: Call
    ) -> tuple[Admitted, Verdict]:
        """Check, judge, tokenise, judge again: what can be refused before tokenising is. Raises Refusal."""
        checked = check(request, served.ready)
        self._gate.judge(checked.asked(call), self._supervisor.in_flight, time.monotonic())
        checked, prompt = await tokenized(request, checked, served)
        now = time.monotonic()
        verdict = self._gate.judge(checked.asked(call, prompt), self._supervisor.in_flight, now)
        admitted = checked.admitted(prompt, verdict, call, now)
        log.debug(
            "%s: %d prompt tokens, session %r, labels %s",
            admitted.request_id, len(prompt), checked.session, request.labels,
        )  # fmt: skip
        return admitted, verdict


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """See proto/drift_gateway/v1/generation.proto for what it promises."""

    def __init__(self, supervisor: Supervisor, generations: Generations) -> None:
        self._supervisor = supervisor
        self._generations = generations

    async def Generate(  # type: ignore[override]  # it writes its messages, and yields none
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        """One request's stream."""
        call = call_of(context)
        responses = self._generations.responses(request, call, context.write)
        async with refusals_as_statuses(context), aclosing(responses):
            async for response in responses:
                await context.write(response)

    async def Tokenize(
        self,
        request: pb.TokenizeRequest,
        context: grpc.aio.ServicerContext[pb.TokenizeRequest, pb.TokenizeResponse],
    ) -> pb.TokenizeResponse:
        """The token ids that Generate would make of the same input."""
        async with refusals_as_statuses(context):
            return await prompts.tokenize(request, self._described())
        raise AssertionError("the call was aborted")

    async def Detokenize(
        self,
        request: pb.DetokenizeRequest,
        context: grpc.aio.ServicerContext[pb.DetokenizeRequest, pb.DetokenizeResponse],
    ) -> pb.DetokenizeResponse:
        """The text of token ids."""
        async with refusals_as_statuses(context):
            return await prompts.detokenize(request, self._described())
        raise AssertionError("the call was aborted")

    def _described(self) -> Served:
        """The model, also while its engine is being started again. Raises Refusal before it was first ready."""
        return self._supervisor.last_ready or self._supervisor.serving()


def _end_at(deadline: float | None, submission: Submission) -> asyncio.TimerHandle | None:
    """Have the submission fail once the call's deadline has passed, whatever its reader waits for."""
    if deadline is None:
        return None
    late = Refusal(Reason.DEADLINE_EXCEEDED, "the deadline of the call passed")
    loop = asyncio.get_running_loop()
    return loop.call_later(max(0.0, deadline - time.monotonic()), submission.fail, late)


async def _events(
    served: Served,
    admitted: Admitted,
    submission: Submission,
    outputs: list[Output],
    write: Write | None,
) -> AsyncGenerator[pb.GenerateResponse, None]:
    """Every message of the request. Raises Refusal or EngineGone where the stream ends with a status."""
    admission_seconds = time.monotonic() - admitted.arrival
    announced = False
    running = outputs
    while running:
        await submission.changed()
        if submission.lagging:
            raise Refusal(Reason.SLOW_READER, TOO_SLOW)
        if not announced:
            yield _accepted(served, admitted, submission)
            announced = True
            if write is not None and len(outputs) == 1:
                _write_tokens(outputs[0], submission, write)
        for output in running:
            for message in output.advance(admission_seconds):
                yield message
            if output.stop_due:
                output.stop_due = False
                served.client.cancel(output.progress.id, stop=True)
        running = [output for output in running if not output.ended]


def _write_tokens(output: Output, submission: Submission, write: Write) -> None:
    """Have tokens, as long as there is nothing else to tell, written in the reader's turn without waking it."""
    submission.short_cut(output.tokens, DirectWriter(write, submission.passed_on).start)


def _output(
    served: Served, admitted: Admitted, index: int, submission: Submission, splits: SplitsUsed
) -> Output:
    sampling = admitted.sampling
    detokenizer = None
    if served.tokenizer is not None:
        detokenizer = IncrementalDetokenizer(
            served.tokenizer,
            sampling.stop_strings,
            sampling.include_stop_str_in_output,
            prompt=admitted.prompt,
        )
    progress = submission.requests[index]
    return Output(
        index,
        progress,
        detokenizer,
        bool(sampling.stop),
        admitted.arrival,
        admitted.slo,
        predicted_ttft=admitted.predicted_ttft,
        split=splits.of,
    )


def _accepted(served: Served, admitted: Admitted, submission: Submission) -> pb.GenerateResponse:
    """The Accepted message, once the engine has said something. Raises Refusal when that was a rejection."""
    for request in submission.requests:
        end = request.finished
        if end is not None and end.reason == FinishReason.REJECTED.value:
            raise _rejected(admitted, end)
    accepted = pb.Accepted(
        request_id=admitted.request_id,
        model=served.ready.model,
        prompt_tokens=len(admitted.prompt),
        arrival_us=int(admitted.arrival * 1e6),
    )
    known = [request.accepted for request in submission.requests if request.accepted is not None]
    if known:
        accepted.queue_position = known[0].queue_position
        if known[0].cached_tokens is not None:
            accepted.cached_tokens = known[0].cached_tokens
    if admitted.predicted_ttft is not None:
        accepted.predicted_ttft_ms = admitted.predicted_ttft * 1e3
    if admitted.demoted:
        accepted.demoted = True
    return pb.GenerateResponse(accepted=accepted)


def _rejected(admitted: Admitted, end: FinishedItem) -> Refusal:
    """What an engine's rejection is to the client: a form that it does not take is the field's fault."""
    if end.id_in_use:
        return in_use(admitted.request_id)
    form = admitted.sampling.structured
    if form is not None and end.message.startswith(f"{form.field}: "):
        return invalid(form.field, end.message.removeprefix(f"{form.field}: "))
    return Refusal(Reason.NEVER_FITS, end.message or "the scheduler rejected the request")
