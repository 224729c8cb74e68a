"""From a GenerateRequest to what the engine is asked: checked field by field, tokenised, bounded.

Everything a client can get wrong is found here, before anything is allocated for it. Knows no sockets and no
state beyond the served model; whether there is room for a request is the gate's business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final
from uuid import uuid4

import msgspec
from google.protobuf.message import Message

from drift_core.frames import Ready, Submit
from drift_core.sampling_params import (
    MAX_LOGIT_BIAS_ENTRIES,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingError,
    SamplingParams,
    Structured,
)
from drift_gateway.access.tenants import current_tenant
from drift_gateway.calls import Call
from drift_gateway.forms import FORMS
from drift_gateway.gate import Asked, Verdict
from drift_gateway.prompts import chat_ids, given_ids, not_served, text_ids, tokenizer_of
from drift_gateway.refusal import Reason, Refusal, invalid
from drift_gateway.supervisor import Served
from drift_gateway.v1 import generation_pb2 as pb
from drift_scheduler.domain import SLO

MAX_LABELS: Final = 16
MAX_LABEL_CHARACTERS: Final = 128
MAX_CLASS_CHARACTERS: Final = 64
MAX_TARGET_MS: Final = 86_400_000.0
MAX_PRIORITY: Final = 1000
MAX_SALT_BYTES: Final = 128
_PRINTABLE: Final = re.compile(r"[ -~]{1,128}")
_REQUEST_ID: Final = re.compile(r"[!-\"$-~]{1,128}")
_SAMPLING_FIELDS: Final = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "logprobs",
)  # fmt: skip
_STOPPING_FIELDS: Final = ("max_tokens", "min_tokens", "ignore_eos")


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may go to the engine. `slo` and `priority`: what it runs under, which the gate may have changed.

    `salt`: what its cached prefixes are shared under, besides the tenant. `predicted_ttft`: seconds from arrival,
    where known. `tenant`: whose it is; each has names of its own.
    """

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    slo: SLO
    priority: int
    arrival: float
    salt: str = ""
    reuse_tokens: int | None = None
    predicted_ttft: float | None = None
    demoted: bool = False
    tenant: str = ""

    @property
    def output_ids(self) -> list[str]:
        """What the engine knows its outputs by: `TENANT REQUEST#NUMBER`, where there are tenants."""
        owner = f"{self.tenant} " if self.tenant else ""
        return [f"{owner}{self.request_id}#{k}" for k in range(self.sampling.n)]

    def frames(self) -> list[Submit]:
        """One per output: `n` requests of one output each that share the prompt."""
        unstopped = (
            self.sampling if self.sampling.stop is None else msgspec.structs.replace(self.sampling, stop=None)
        )
        return [
            Submit(
                id=output_id,
                prompt=self.prompt,
                sampling=unstopped.child(k),
                slo_ttft=self.slo.ttft,
                slo_tbt=self.slo.tbt,
                slo_e2e=self.slo.e2e,
                slo_class=self.slo.name,
                priority=self.priority,
                salt=self.salt,
                arrival=self.arrival,
                reuse_tokens=self.reuse_tokens,
            )
            for k, output_id in enumerate(self.output_ids)
        ]


@dataclass(frozen=True, slots=True)
class Checked:
    """A request whose every field but the prompt was looked at. `prompt_tokens`: at least so many."""

    request_id: str
    sampling: SamplingParams
    slo: SLO
    priority: int
    on_infeasible: int
    prompt_tokens: int
    session: str
    cache_salt: str
    reuse_tokens: int | None

    def asked(self, call: Call, prompt: list[int] | None = None) -> Asked:
        """For the gate, before or after the prompt was tokenised."""
        return Asked(
            slo=self.slo,
            priority=self.priority,
            on_infeasible=self.on_infeasible,
            arrival=call.arrival,
            deadline=call.deadline,
            prompt_tokens=self.prompt_tokens if prompt is None else len(prompt),
            max_tokens=self.sampling.max_tokens or 1,
            outputs=self.sampling.n,
            min_tokens=self.sampling.least_tokens,
        )

    def admitted(self, prompt: list[int], verdict: Verdict, call: Call, now: float) -> Admitted:
        """As the gate has it."""
        return Admitted(
            request_id=self.request_id,
            prompt=prompt,
            sampling=self.sampling,
            slo=verdict.slo,
            priority=verdict.newcomer.priority,
            arrival=call.arrival,
            salt=self.cache_salt,
            reuse_tokens=self.reuse_tokens,
            predicted_ttft=verdict.predicted_ttft(now - call.arrival),
            demoted=verdict.demoted,
            tenant=current_tenant().name,
        )


def check(request: pb.GenerateRequest, ready: Ready) -> Checked:
    """Look at all that takes no tokenizer. Raises Refusal with a line that names the field."""
    _check_counts(request)
    if request.HasField("model") and request.model != ready.model:
        raise not_served(request.model, ready)
    checked = Checked(
        request_id=_request_id(request),
        sampling=_sampling(request, ready),
        slo=_slo(request.slo, ready),
        priority=_within("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY),
        on_infeasible=_on_infeasible(request.slo),
        prompt_tokens=max(1, len(request.token_ids.ids)),
        session=_printable("prefix.session", request.prefix.session),
        cache_salt=_salt(request.prefix),
        reuse_tokens=request.prefix.reuse_tokens if request.prefix.HasField("reuse_tokens") else None,
    )
    _check_labels(request.labels)
    if request.WhichOneof("input") is None:
        raise invalid("input", "is missing; give one of text, token_ids, chat")
    return _fitting(checked, checked.prompt_tokens, ready)


async def tokenized(
    request: pb.GenerateRequest, checked: Checked, served: Served
) -> tuple[Checked, list[int]]:
    """The prompt, and the request bounded by what is left of the context; its form is compiled. Raises Refusal."""
    match request.WhichOneof("input"):
        case "text":
            prompt = await text_ids(served, request)
        case "chat":
            prompt = await chat_ids(served, request)
        case _:
            prompt = given_ids("token_ids.ids", request.token_ids.ids, served.ready.vocab_size)
    fitting = _fitting(checked, len(prompt), served.ready)
    if fitting.sampling.stop is not None:
        tokenizer_of(served, "stopping.stop", cure=", so there is no text to look in; give stop_token_ids")
    await FORMS.check(served.tokenizer, served.ready, fitting.sampling.structured)
    return fitting, prompt


def _fitting(checked: Checked, prompt_tokens: int, ready: Ready) -> Checked:
    """With as many tokens to generate as there is room for after the prompt. Raises Refusal when there is none."""
    if prompt_tokens >= ready.max_context:
        raise Refusal(
            Reason.NEVER_FITS,
            f"the prompt has {prompt_tokens} tokens and the model's context {ready.max_context}; "
            "at least one must be left to generate",
        )
    if prompt_tokens >= ready.kv_tokens:
        raise Refusal(
            Reason.NEVER_FITS,
            f"the prompt has {prompt_tokens} tokens and the whole KV pool {ready.kv_tokens}",
        )
    room = min(ready.max_context, ready.kv_tokens) - prompt_tokens
    sampling = checked.sampling
    tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
    fitting = msgspec.structs.replace(
        sampling, max_tokens=tokens, min_tokens=min(sampling.min_tokens, tokens)
    )
    return replace(checked, sampling=fitting)


def _on_infeasible(slo: pb.SLO) -> int:
    if slo.on_infeasible not in pb.OnInfeasible.values():
        known = ", ".join(name.removeprefix("ON_INFEASIBLE_") for name in pb.OnInfeasible.keys()[1:])
        raise invalid("slo.on_infeasible", f"{slo.on_infeasible} is none of {known}")
    return slo.on_infeasible or pb.ON_INFEASIBLE_BEST_EFFORT


def _printable(field: str, text: str) -> str:
    if text and not _PRINTABLE.fullmatch(text):
        raise invalid(field, "is not 1 to 128 printable ASCII characters")
    return text


def _salt(prefix: pb.PrefixHints) -> str:
    size = len(prefix.cache_salt.encode())
    if size > MAX_SALT_BYTES:
        raise invalid("prefix.cache_salt", f"has {size} bytes, more than {MAX_SALT_BYTES}")
    return prefix.cache_salt


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
    if not name.isprintable():  # it is shown in terminals, labels metrics and stands in logs
        raise invalid("slo.class", f"{name!a} has characters that cannot be printed")
    ttft, tbt, e2e = seconds("ttft_ms"), seconds("tbt_ms"), seconds("e2e_ms")
    return SLO(ready.slo_ttft if ttft is None else ttft, ready.slo_tbt if tbt is None else tbt, e2e, name)


def _check_counts(request: pb.GenerateRequest) -> None:
    """Before anything is copied: a message has room for a million of each, and all streams wait meanwhile."""
    for field, found, most in (
        ("labels", request.labels, MAX_LABELS),
        ("sampling.logit_bias", request.sampling.logit_bias, MAX_LOGIT_BIAS_ENTRIES),
        ("stopping.stop", request.stopping.stop, MAX_STOP_STRINGS),
        ("stopping.stop_token_ids", request.stopping.stop_token_ids, MAX_STOP_TOKEN_IDS),
    ):
        if len(found) > most:
            raise invalid(field, f"{len(found)} are more than {most}")


def _check_labels(labels: Mapping[str, str]) -> None:
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
        sampling = SamplingParams(structured=_structured(request), **fields)
        sampling.validate(ready.vocab_size)
    except SamplingError as error:
        raise invalid(_path(error.field), str(error).removeprefix(f"{error.field} ")) from error
    return sampling


def _path(field: str) -> str:
    """Where a field of SamplingParams comes from in the request."""
    if field.startswith("structured"):
        return field
    return f"stopping.{field}" if field in pb.Stopping.DESCRIPTOR.fields_by_name else f"sampling.{field}"


def _structured(request: pb.GenerateRequest) -> Structured | None:
    """The form the output must have. Raises Refusal, and SamplingError when it is larger than any may be."""
    if not request.HasField("structured"):
        return None
    match request.structured.WhichOneof("form"):
        case "json_schema":
            return Structured("json_schema", request.structured.json_schema)
        case "regex":
            return Structured("regex", request.structured.regex)
        case "choice":
            return Structured("choice", tuple(request.structured.choice.choices))
        case _:
            raise invalid("structured", "has no form; give one of json_schema, regex, choice")


def _present(message: Message, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _within(field: str, value: int, lowest: int, highest: int) -> int:
    if not lowest <= value <= highest:
        raise invalid(field, f"{value} is not from {lowest} to {highest}")
    return value
