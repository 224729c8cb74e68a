"""drift.v1.GenerationService: a request's stream, from admission to its last Finished.

One task per stream; it takes what the engine told since it last looked, so a reader that lags gets fewer, larger
messages and never a queue of them. Leaving the stream, however it happens, cancels what still runs.
"""

from __future__ import annotations

import logging
import time

import grpc

from drift_core.link import Submission
from drift_core.tokenizer import IncrementalDetokenizer
from drift_gateway.admission import Admitted, admit
from drift_gateway.outputs import Output
from drift_gateway.refusal import Reason, Refusal, refusals_as_statuses
from drift_gateway.supervisor import Served, Supervisor
from drift_gateway.v1 import generation_pb2 as pb
from drift_gateway.v1 import generation_pb2_grpc
from drift_scheduler.domain import FinishReason

log = logging.getLogger("drift.gateway")

Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Serves Generate from whatever engine the supervisor keeps; at most `max_in_flight` outputs at a time."""

    def __init__(self, supervisor: Supervisor, max_in_flight: int) -> None:
        self._supervisor = supervisor
        self._max_in_flight = max_in_flight

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """One request's stream; see proto/drift_gateway/v1/generation.proto for what it promises."""
        arrival = time.monotonic()
        async with refusals_as_statuses(context):
            await self._generate(request, context, arrival)

    async def _generate(self, request: pb.GenerateRequest, context: Context, arrival: float) -> None:
        served = self._supervisor.serving()
        self._check_room(served, 1)
        admitted = await admit(request, served, arrival)
        self._check_room(served, admitted.sampling.n)
        log.debug(
            "%s: %d prompt tokens, labels %s", admitted.request_id, len(admitted.prompt), request.labels
        )
        submission = self._supervisor.submit(served, admitted.frames())
        try:
            await _stream(served, admitted, submission, context)
        finally:  # also on CancelledError, which goes on: the client left or its deadline passed
            self._supervisor.ended(submission)

    def _check_room(self, served: Served, outputs: int) -> None:
        in_flight = served.client.in_flight
        if in_flight + outputs > self._max_in_flight:
            raise Refusal(
                Reason.QUEUE_FULL,
                f"{in_flight} outputs are in flight and at most {self._max_in_flight} are let in; try again later",
            )


async def _stream(served: Served, admitted: Admitted, submission: Submission, context: Context) -> None:
    """Write every message of the request. Raises Refusal or EngineGone where the stream ends with a status."""
    outputs = [_output(served, admitted, k, submission) for k in range(len(submission.requests))]
    admission_seconds = time.monotonic() - admitted.arrival
    announced = False
    running = outputs
    while running:
        await submission.changed()
        if submission.lagging:
            raise Refusal(Reason.SLOW_READER, "the client reads too slowly; its tokens were piling up")
        if not announced:
            await context.write(_accepted(served, admitted, submission))
            announced = True
        for output in running:
            for message in output.advance(admission_seconds):
                await context.write(message)
            if output.stop_due:
                output.stop_due = False
                served.client.cancel(output.progress.id, stop=True)
        running = [output for output in running if not output.ended]


def _output(served: Served, admitted: Admitted, index: int, submission: Submission) -> Output:
    sampling = admitted.sampling
    detokenizer = None
    if served.tokenizer is not None:
        detokenizer = IncrementalDetokenizer(
            served.tokenizer, sampling.stop_strings, sampling.include_stop_str_in_output
        )
    progress = submission.requests[index]
    return Output(index, progress, detokenizer, bool(sampling.stop), admitted.arrival, admitted.slo)


def _accepted(served: Served, admitted: Admitted, submission: Submission) -> pb.GenerateResponse:
    """The Accepted message, once the engine has said something. Raises Refusal when that was a rejection."""
    for request in submission.requests:
        end = request.finished
        if end is not None and end.reason == FinishReason.REJECTED.value:
            raise Refusal(Reason.NEVER_FITS, end.message or "the scheduler rejected the request")
    accepted = pb.Accepted(
        request_id=admitted.request_id, model=served.ready.model, prompt_tokens=len(admitted.prompt)
    )
    known = [request.accepted for request in submission.requests if request.accepted is not None]
    if known:
        accepted.queue_position = known[0].queue_position
        if known[0].cached_tokens is not None:
            accepted.cached_tokens = known[0].cached_tokens
    return pb.GenerateResponse(accepted=accepted)
