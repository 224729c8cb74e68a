"""One output of a request: engine tokens become TokenDeltas and one Finished.

Detokenises, looks for stop strings, numbers the deltas and keeps the proof of latency. Knows nothing of sockets
or streams: it is asked for the messages that are due.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import ceil, isfinite
from typing import Protocol

import numpy as np
import numpy.typing as npt

from drift_core.frames import FinishedItem, TokenLogprob
from drift_core.link import Progress
from drift_gateway.v1 import generation_pb2 as pb
from drift_scheduler.domain import SLO, FinishReason

REASONS = {
    FinishReason.STOP.value: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH.value: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED.value: pb.FINISH_REASON_CANCELLED,
    FinishReason.REJECTED.value: pb.FINISH_REASON_REJECTED,
    FinishReason.FAILED.value: pb.FINISH_REASON_FAILED,
}


class Detokenizer(Protocol):
    """What is asked of `drift_core.tokenizer.IncrementalDetokenizer`."""

    @property
    def stopped(self) -> str | None:
        """The stop string that came, if one did."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that is safe to show after these tokens."""

    def finish(self) -> str:
        """Text still held back."""


class Output:
    """Turns what one engine request tells into messages.

    `detokenizer` is `None` for a model without a tokenizer: token ids only. `stops`: whether there are stop
    strings, so that tokens are looked at one by one. `arrival` is when the gateway received the request, on
    `time.monotonic()`. `predicted_ttft`: seconds from then, where something was predicted. `split` tells, of an ended
    engine request, units of prefill and decode lane when most of its tokens were decoded.
    """

    __slots__ = (
        "_arrival",
        "_arrival_us",
        "_detokenizer",
        "_kept",
        "_plain",
        "_predicted_ttft",
        "_push",
        "_sequence",
        "_slo",
        "_split",
        "_stop_string",
        "_stops",
        "ended",
        "index",
        "progress",
        "stop_due",
    )

    def __init__(
        self,
        index: int,
        progress: Progress,
        detokenizer: Detokenizer | None,
        stops: bool,
        arrival: float,
        slo: SLO,
        predicted_ttft: float | None = None,
        split: Callable[[str], tuple[int, int] | None] = lambda output_id: None,
    ) -> None:
        self.index = index
        self.progress = progress
        self.ended = False
        self.stop_due = False
        """Set when a stop string came and the engine is to be told."""
        self._detokenizer = detokenizer
        self._stops = stops and detokenizer is not None
        self._arrival = arrival
        self._arrival_us = int(arrival * 1e6)
        self._slo = slo
        self._predicted_ttft = predicted_ttft
        self._split = split
        self._sequence = 0
        self._kept = 0  # leading tokens of the engine's that belong to the output
        self._plain = not self._stops
        self._push = None if detokenizer is None else detokenizer.push
        self._stop_string: str | None = None

    @property
    def stopped_after(self) -> int | None:
        """The tokens after which a stop string came, if one did."""
        return None if self._stop_string is None else self._kept

    def advance(self, gateway_seconds: float) -> Sequence[pb.GenerateResponse]:
        """Messages for what came since the last call. `gateway_seconds`: what admission took."""
        if self.ended:
            return ()
        if (message := self.tokens()) is not None:
            return (message,)
        return self._advance(self.progress.finished, gateway_seconds)

    def tokens(self) -> pb.GenerateResponse | None:
        """The message for what came since the last call, where that is tokens and nothing else; `None` where it is
        not, or where it has to be looked at."""
        progress = self.progress
        if progress.finished is not None or not self._plain or progress.logprobs is not None:
            return None
        token_ids, offsets = progress.take_offsets(self._arrival_us)
        if not token_ids:
            return None
        self._kept += len(token_ids)
        push = self._push
        return self._delta("" if push is None else push(token_ids), token_ids, offsets)

    def _advance(self, finished: FinishedItem | None, gateway_seconds: float) -> list[pb.GenerateResponse]:
        """Whatever comes: stop strings, log probabilities, the end."""
        noticed = time.monotonic()
        messages = []
        token_ids, _, logprobs = self.progress.take()
        begun, text = self._arrival_us, ""
        if self._stop_string is not None:
            token_ids = []  # the engine was not told in time
        elif token_ids:
            kept, text = self._text_of(token_ids, finished)
            token_ids = token_ids[:kept]
        if self._detokenizer is not None and finished is not None and self._stop_string is None:
            text += self._detokenizer.finish()
            self._stop_string = self._detokenizer.stopped
        if token_ids or text:
            self._kept += len(token_ids)
            offsets = [max(at - begun, 0) for at in self.progress.micros[: len(token_ids)]]
            delta = self._delta(text, token_ids, offsets)
            if logprobs is not None:
                delta.token_delta.logprobs.extend(map(_logprobs, logprobs[: len(token_ids)]))
            messages.append(delta)
        if finished is not None:
            self.ended = True
            messages.append(self._finished(finished, gateway_seconds + time.monotonic() - noticed))
        return messages

    def _text_of(self, token_ids: list[int], finished: FinishedItem | None) -> tuple[int, str]:
        """How many of the tokens belong to the output, and the text they release."""
        if self._detokenizer is None:
            return len(token_ids), ""
        shown: Sequence[int] = token_ids
        if finished is not None and finished.reason == FinishReason.STOP.value:
            shown = token_ids[:-1]  # the stop token itself has no text
        if not self._stops:
            return len(token_ids), self._detokenizer.push(shown)
        text = ""
        for position, token_id in enumerate(shown):
            text += self._detokenizer.push((token_id,))
            if self._detokenizer.stopped is not None:
                self._stop_string = self._detokenizer.stopped
                self.stop_due = finished is None
                return position + 1, text
        return len(token_ids), text

    def _delta(self, text: str, token_ids: Sequence[int], offsets_us: Sequence[int]) -> pb.GenerateResponse:
        """Filled in place: a message made apart and then copied into the response costs half as much again."""
        response = pb.GenerateResponse()
        delta = response.token_delta
        if self.index:
            delta.output_index = self.index
        delta.sequence = self._sequence
        delta.text = text
        delta.token_ids.extend(token_ids)
        delta.offsets_us.extend(offsets_us)
        self._sequence += 1
        return response

    def _finished(self, item: FinishedItem, gateway_seconds: float) -> pb.GenerateResponse:
        reason = pb.FINISH_REASON_STOP if self._stop_string is not None else REASONS[item.reason]
        finished = pb.Finished(
            output_index=self.index,
            reason=reason,
            message=item.message,
            usage=pb.Usage(
                prompt_tokens=item.prompt_tokens,
                cached_tokens=item.cached_tokens,
                output_tokens=self._kept,
            ),
            timing=timing(item, self._arrival, self.progress.times[: self._kept], self._slo, gateway_seconds),
        )
        self._add_hindsight(finished.timing)
        if self._stop_string is not None:
            finished.stop_string = self._stop_string
        return pb.GenerateResponse(finished=finished)

    def _add_hindsight(self, proof: pb.RequestTiming) -> None:
        if self._predicted_ttft is not None:
            proof.predicted_ttft_ms = self._predicted_ttft * 1e3
        split = self._split(self.progress.id)
        if split is not None and self._kept > 1:
            proof.prefill_units, proof.decode_units = split


def timing(
    item: FinishedItem, arrival: float, times: Sequence[float], slo: SLO, gateway_seconds: float
) -> pb.RequestTiming:
    """The proof: token `times` and the engine's account against the targets."""
    proof = pb.RequestTiming(
        preemptions=item.preemptions,
        recomputed_tokens=item.recomputed_tokens,
        slo=wire_slo(slo),
        gateway_ms=gateway_seconds * 1e3,
    )
    if item.scheduled is not None:
        proof.queue_ms = (item.scheduled - arrival) * 1e3
    if not times:
        return proof
    proof.ttft_ms = (times[0] - arrival) * 1e3
    if isfinite(slo.ttft):
        proof.ttft_met = times[0] - arrival <= slo.ttft
    proof.e2e_ms = (times[-1] - arrival) * 1e3
    if slo.e2e is not None:
        proof.e2e_met = times[-1] - arrival <= slo.e2e
    if item.scheduled is not None:
        proof.prefill_ms = (times[0] - item.scheduled) * 1e3
    gaps = np.sort(
        np.diff(times)
    )  # all other streams wait for this, and in Python thousands take milliseconds
    if len(gaps):
        proof.tbt_p50_ms = percentile(gaps, 0.5) * 1e3
        proof.tbt_p99_ms = percentile(gaps, 0.99) * 1e3
        proof.tbt_max_ms = float(gaps[-1]) * 1e3
        proof.late_tokens = int(np.count_nonzero(gaps > slo.tbt))
        if isfinite(slo.tbt):
            proof.tbt_met = percentile(gaps, 0.99) <= slo.tbt
    return proof


def percentile(ordered: npt.NDArray[np.float64], fraction: float) -> float:
    """Nearest rank: the smallest value with at least `fraction` of all values at or below it."""
    return float(ordered[max(0, ceil(fraction * len(ordered)) - 1)])


def wire_slo(slo: SLO) -> pb.SLO:
    """Targets as they go over the wire; those that there are not are absent."""
    message = pb.SLO()
    setattr(message, "class", slo.name)
    for field, target in (("ttft_ms", slo.ttft), ("tbt_ms", slo.tbt), ("e2e_ms", slo.e2e)):
        if target is not None and isfinite(target):
            setattr(message, field, target * 1e3)
    return message


def _logprobs(logprob: TokenLogprob | None) -> pb.TokenLogprobs:
    if logprob is None:
        return pb.TokenLogprobs()
    top = [pb.TopLogprob(token_id=token_id, logprob=value) for token_id, value in logprob.top]
    return pb.TokenLogprobs(logprob=logprob.logprob, top=top)
