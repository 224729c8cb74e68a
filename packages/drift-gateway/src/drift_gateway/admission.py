"""From a GenerateRequest to what the engine is asked: checked field by field, tokenised, bounded.

Everything a client can get wrong is found here, before anything is allocated for it. Knows no sockets and no
state beyond the served model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

import msgspec
from google.protobuf.message import Message

from drift_core.frames import Ready, Submit
from drift_core.sampling_params import SamplingError, SamplingParams
from drift_gateway.prompts import chat_ids, given_ids, not_served, text_ids
from drift_gateway.refusal import Reason, Refusal, invalid
from drift_gateway.supervisor import Served
from drift_gateway.v1 import generation_pb2 as pb
from drift_scheduler.domain import SLO

MAX_LABELS: Final = 16
MAX_LABEL_CHARACTERS: Final = 128
MAX_CLASS_CHARACTERS: Final = 64
MAX_TARGET_MS: Final = 86_400_000.0
MAX_PRIORITY: Final = 1000

_REQUEST_ID: Final = re.compile(r"[!-\"$-~]{1,128}")
_SAMPLING_FIELDS: Final = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "logprobs",
)  # fmt: skip
_STOPPING_FIELDS: Final = ("max_tokens", "min_tokens", "ignore_eos")


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may go to the engine."""

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    slo: SLO
    priority: int
    arrival: float

    def frames(self) -> list[Submit]:
        """One per output: `n` requests of one output each that share the prompt."""
        unstopped = msgspec.structs.replace(self.sampling, stop=None)
        return [
            Submit(
                id=f"{self.request_id}#{k}",
                prompt=self.prompt,
                sampling=unstopped.child(k),
                slo_ttft=self.slo.ttft,
                slo_tbt=self.slo.tbt,
                slo_e2e=self.slo.e2e,
                slo_class=self.slo.name,
                priority=self.priority,
                salt="",
                arrival=self.arrival,
            )
            for k in range(self.sampling.n)
        ]


async def admit(request: pb.GenerateRequest, served: Served, arrival: float) -> Admitted:
    """Check and tokenise a request. Raises Refusal with the status and a line that names the field."""
    ready = served.ready
    if request.HasField("model") and request.model != ready.model:
        raise not_served(request.model, ready)
    request_id = _request_id(request)
    slo = _slo(request.slo, ready)
    priority = _within("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)
    _check_labels(request.labels)
    sampling = _sampling(request, ready)
    prompt = await _prompt(request, served)
    if len(prompt) >= ready.max_context:
        raise Refusal(
            Reason.NEVER_FITS,
            f"the prompt has {len(prompt)} tokens and the model's context {ready.max_context}; "
            "at least one must be left to generate",
        )
    if len(prompt) >= ready.kv_tokens:
        raise Refusal(
            Reason.NEVER_FITS, f"the prompt has {len(prompt)} tokens and the whole KV pool {ready.kv_tokens}"
        )
    room = min(ready.max_context, ready.kv_tokens) - len(prompt)
    wanted = room if sampling.max_tokens is None else sampling.max_tokens
    tokens = min(wanted, room)
    sampling = msgspec.structs.replace(
        sampling, max_tokens=tokens, min_tokens=min(sampling.min_tokens, tokens)
    )
    return Admitted(request_id, prompt, sampling, slo, priority, arrival)


def _request_id(request: pb.GenerateRequest) -> str:
    if not request.HasField("request_id"):
        return uuid4().hex
    if not _REQUEST_ID.fullmatch(request.request_id):
        raise invalid("request_id", "is not 1 to 128 printable ASCII characters other than space and '#'")
    return request.request_id


def _slo(asked: pb.SLO, ready: Ready) -> SLO:
    def seconds(field: str) -> float | None:
        if not asked.HasField(field):
            return None
        value = getattr(asked, field)
        if not 0 < value <= MAX_TARGET_MS:  # false for NaN too
            raise invalid(f"slo.{field}", f"{value:g} is not above 0 and at most {MAX_TARGET_MS:.0f}")
        return float(value) / 1e3

    name = getattr(asked, "class") or "default"
    if len(name) > MAX_CLASS_CHARACTERS:
        raise invalid("slo.class", f"has {len(name)} characters, more than {MAX_CLASS_CHARACTERS}")
    ttft, tbt, e2e = seconds("ttft_ms"), seconds("tbt_ms"), seconds("e2e_ms")
    return SLO(ready.slo_ttft if ttft is None else ttft, ready.slo_tbt if tbt is None else tbt, e2e, name)


def _check_labels(labels: Mapping[str, str]) -> None:
    if len(labels) > MAX_LABELS:
        raise invalid("labels", f"{len(labels)} labels are more than {MAX_LABELS}")
    for name, value in labels.items():
        if not name or max(len(name), len(value)) > MAX_LABEL_CHARACTERS:
            raise invalid(
                "labels", f"a name or value is empty or longer than {MAX_LABEL_CHARACTERS} characters"
            )


def _sampling(request: pb.GenerateRequest, ready: Ready) -> SamplingParams:
    """SamplingParams from what is present. They check their own bounds; the complaint gets the field's path."""
    stopping = request.stopping
    fields: dict[str, Any] = {
        "max_tokens": None,
        "logit_bias": dict(request.sampling.logit_bias),
        "stop": list(stopping.stop),
        "stop_token_ids": list(stopping.stop_token_ids),
        "include_stop_str_in_output": stopping.include_stop_in_text,
        **_present(request.sampling, _SAMPLING_FIELDS),
        **_present(stopping, _STOPPING_FIELDS),
    }
    try:
        sampling = SamplingParams(**fields)
        sampling.validate(ready.vocab_size)
    except SamplingError as error:
        message = "stopping" if error.field in pb.Stopping.DESCRIPTOR.fields_by_name else "sampling"
        problem = str(error).removeprefix(f"{error.field} ")
        raise invalid(f"{message}.{error.field}", problem) from error
    return sampling


def _present(message: Message, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}


async def _prompt(request: pb.GenerateRequest, served: Served) -> list[int]:
    match request.WhichOneof("input"):
        case "text":
            return await text_ids(served, request)
        case "token_ids":
            return given_ids("token_ids.ids", request.token_ids.ids, served.ready.vocab_size)
        case "chat":
            return await chat_ids(served, request)
        case _:
            raise invalid("input", "is missing; give one of text, token_ids, chat")


def _within(field: str, value: int, lowest: int, highest: int) -> int:
    if not lowest <= value <= highest:
        raise invalid(field, f"{value} is not from {lowest} to {highest}")
    return value
