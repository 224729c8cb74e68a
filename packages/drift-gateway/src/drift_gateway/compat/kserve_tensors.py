"""Tensors of KServe's inference protocol: what a request of text asks, and the tensors of its answer.

The tensors and their defaults are those of Triton's vLLM backend. Knows the messages of both protocols, no socket.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from drift_core.sampling_params import MAX_N
from drift_gateway.compat.endings import finish_reason
from drift_gateway.compat.sampling_json import apply_parameters, parameters_of
from drift_gateway.compat.wire import kserve_pb2 as kserve
from drift_gateway.refusal import invalid
from drift_gateway.v1 import generation_pb2 as pb

FLAGS: Final = (
    "return_finish_reason", "return_cumulative_logprob", "return_logprobs", "return_num_input_tokens",
    "return_num_output_tokens",
)  # fmt: skip
INPUTS: Final = {
    "text_input": "BYTES", "stream": "BOOL", "sampling_parameters": "BYTES", "exclude_input_in_output": "BOOL",
    **dict.fromkeys(FLAGS, "BOOL"),
}  # fmt: skip
"""Name and type of every input; each has one element, and all but the first may be left out."""
OUTPUTS: Final = {
    "text_output": "BYTES", "finish_reason": "BYTES", "cumulative_logprob": "FP32", "logprobs": "BYTES",
    "num_input_tokens": "UINT32", "num_output_tokens": "UINT32",
}  # fmt: skip
"""Name and type of every output; those after the first come when asked for."""

TARGETS: Final = {
    "drift_slo_ttft_ms": "ttft_ms",
    "drift_slo_tbt_ms": "tbt_ms",
    "drift_slo_e2e_ms": "e2e_ms",
    "drift_slo_class": "class",
    "drift_slo_on_infeasible": "on_infeasible",
}
"""Parameters of a request that set its latency targets."""
WAYS_OUT: Final = {
    "best_effort": pb.ON_INFEASIBLE_BEST_EFFORT,
    "reject": pb.ON_INFEASIBLE_REJECT,
    "demote": pb.ON_INFEASIBLE_DEMOTE,
}
"""What to do with a request whose targets cannot be met, as `drift_slo_on_infeasible` says it."""
_RESERVED: Final = ("sequence_id", "sequence_start", "sequence_end", "priority", "timeout")
_LABEL_CHARACTERS: Final = 128


@dataclass(frozen=True, slots=True)
class Asked:
    """A request of text, understood. `prepend`: the prompt's text goes before each output's."""

    generation: pb.GenerateRequest
    stream: bool
    prepend: bool
    outputs: tuple[str, ...]


def read(request: kserve.ModelInferRequest) -> Asked:
    """What a request asks. Raises Refusal (INVALID_FIELD), naming the tensor."""
    values = _inputs(request)
    if "text_input" not in values:
        raise invalid("text_input", "is missing; it is the BYTES tensor with the prompt")
    stream = bool(values.get("stream", False))
    prepend = not values.get("exclude_input_in_output", stream)
    if prepend and stream:
        raise invalid("exclude_input_in_output", "cannot be false when streaming")
    generation = pb.GenerateRequest(text=_text("text_input", values["text_input"]))
    if request.model_name:
        generation.model = request.model_name
    if request.id.strip():
        generation.labels["request_id"] = request.id[:_LABEL_CHARACTERS]
    _apply(request, values.get("sampling_parameters"), generation)
    outputs = _outputs(request, values)
    if not generation.sampling.HasField("logprobs") and "cumulative_logprob" in outputs:
        generation.sampling.logprobs = 0
    return Asked(generation, stream, prepend, outputs)


def _apply(request: kserve.ModelInferRequest, given: bytes | None, generation: pb.GenerateRequest) -> None:
    """Sampling parameters from their tensor, or else from the request's parameters; targets from the latter."""
    parameters: dict[str, Any] = {}
    for name, parameter in request.parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if name in TARGETS:
            _target(generation.slo, name, getattr(parameter, choice) if choice else None)
        elif name == "priority":
            generation.priority = _whole(name, getattr(parameter, choice) if choice else 0)
        elif name.startswith("drift_"):
            raise invalid(f"parameters.{name}", f"is not known here; there are: {', '.join(TARGETS)}")
        elif name not in _RESERVED and not name.startswith("triton_") and choice:
            parameters[name] = getattr(parameter, choice)
    if given is not None:
        parameters = parameters_of(_text("sampling_parameters", given), "sampling_parameters")
        apply_parameters(parameters, generation, "sampling_parameters")
    else:
        apply_parameters(parameters, generation, "parameters")


def _target(slo: pb.SLO, name: str, value: object) -> None:
    if TARGETS[name] == "on_infeasible":
        if value not in WAYS_OUT:
            raise invalid(f"parameters.{name}", f"{value!a} is none of {', '.join(WAYS_OUT)}")
        slo.on_infeasible = WAYS_OUT[str(value)]
        return
    try:
        setattr(slo, TARGETS[name], float(value) if isinstance(value, int) else value)
    except TypeError as error:
        raise invalid(f"parameters.{name}", f"does not fit: {error}") from error


def _whole(name: str, value: object) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise invalid(f"parameters.{name}", "is not a whole number of at least 0")
    return value


def _outputs(request: kserve.ModelInferRequest, values: dict[str, Any]) -> tuple[str, ...]:
    """Names of the tensors to answer with: those asked for by name, or text and what flags ask for."""
    flagged = [flag.removeprefix("return_") for flag in FLAGS if values.get(flag)]
    named = [output.name for output in request.outputs]
    for name in named:
        if name not in OUTPUTS:
            raise invalid("outputs", f"there is no output '{name}'; there are: {', '.join(OUTPUTS)}")
    wanted = {*named, *flagged} if named else {"text_output", *flagged}
    return tuple(name for name in OUTPUTS if name in wanted)


def _inputs(request: kserve.ModelInferRequest) -> dict[str, Any]:
    """The one element of each input, by name: bytes or a truth value."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise invalid(
            "raw_input_contents", f"{len(raw)} contents are not one for each of {len(request.inputs)} inputs"
        )
    values: dict[str, Any] = {}
    for position, tensor in enumerate(request.inputs):
        name = tensor.name
        if name not in INPUTS:
            raise invalid("inputs", f"there is no input '{name}'; there are: {', '.join(INPUTS)}")
        if name in values:
            raise invalid(name, "is given twice")
        if tensor.datatype != INPUTS[name]:
            raise invalid(name, f"has type {tensor.datatype or 'none'}, not {INPUTS[name]}")
        if math.prod(tensor.shape) != 1 or "shared_memory_region" in tensor.parameters:
            raise invalid(name, "does not hold one element (shared memory is not served)")
        values[name] = _element(tensor, raw[position] if raw else None)
    return values


def _element(tensor: kserve.ModelInferRequest.InferInputTensor, raw: bytes | None) -> bytes | bool:
    if tensor.datatype == "BOOL":
        bools = tensor.contents.bool_contents if raw is None else raw
        if len(bools) == 1:
            return bool(bools[0])
    elif raw is None:
        if len(tensor.contents.bytes_contents) == 1:
            return tensor.contents.bytes_contents[0]
    elif len(raw) >= 4 and struct.unpack_from("<I", raw)[0] == len(raw) - 4:
        return raw[4:]
    raise invalid(tensor.name, "its contents are not one element")


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise invalid(name, f"is not UTF-8: {error.reason} at byte {error.start}") from error


@dataclass(slots=True)
class _Output:
    """What came of one output since it was last told, and how it stands."""

    text: str = ""
    tokens: int = 0
    cumulative: float = 0.0
    logprobs: list[tuple[int, pb.TokenLogprobs]] = field(default_factory=list)
    reason: str | None = None


class Answer:
    """The outputs of one request as its events come. `word` gives a token's text, for `logprobs`."""

    def __init__(self, asked: Asked, word: Callable[[int], str]) -> None:
        self._asked = asked
        self._word = word
        self._prompt_tokens = 0
        self._finished: pb.Finished | None = None
        sampling = asked.generation.sampling
        # Admission has not looked at n yet, so it is not believed here.
        self._outputs = [_Output() for _ in range(min(sampling.n, MAX_N) if sampling.HasField("n") else 1)]

    @property
    def ended(self) -> bool:
        """Whether every output has ended."""
        return all(output.reason is not None for output in self._outputs)

    def take(self, message: pb.GenerateResponse) -> bool:
        """Note one event; whether a stream has something to tell now. Raises Refusal."""
        match message.WhichOneof("event"):
            case "accepted":
                self._prompt_tokens = message.accepted.prompt_tokens
                return False
            case "token_delta":
                self._note(message.token_delta)
                return True
            case "finished":
                self._finished = message.finished
                self._outputs[message.finished.output_index].reason = finish_reason(message.finished)
                return self.ended
        return False

    def _note(self, delta: pb.TokenDelta) -> None:
        output = self._outputs[delta.output_index]
        output.text += delta.text
        output.tokens += len(delta.token_ids)
        output.cumulative += sum(logprobs.logprob for logprobs in delta.logprobs)
        output.logprobs.extend(zip(delta.token_ids, delta.logprobs, strict=False))

    def response(self, request: kserve.ModelInferRequest, model: str) -> kserve.ModelInferResponse:
        """The answer of what came since the last one; of all of it where this is the only one."""
        response = kserve.ModelInferResponse(model_name=model, model_version="1", id=request.id)
        for name in self._asked.outputs:
            shape, raw = self._tensor(name)
            tensor = response.outputs.add(name=name, datatype=OUTPUTS[name])
            tensor.shape.append(shape)
            response.raw_output_contents.append(raw)
        for output in self._outputs:
            output.text, output.tokens = "", 0
            output.logprobs.clear()
        response.parameters["triton_final_response"].bool_param = self.ended
        if self.ended and self._finished is not None:
            _prove(response, self._finished.timing)
        return response

    def _tensor(self, name: str) -> tuple[int, bytes]:
        """Elements and bytes of one output tensor."""
        outputs = self._outputs
        match name:
            case "text_output":
                prompt = self._asked.generation.text if self._asked.prepend else ""
                return len(outputs), _packed([prompt + output.text for output in outputs])
            case "finish_reason":
                return len(outputs), _packed([str(output.reason) for output in outputs])
            case "cumulative_logprob":
                return len(outputs), struct.pack(f"<{len(outputs)}f", *(o.cumulative for o in outputs))
            case "logprobs":
                return len(outputs), _packed([self._logprobs(output) for output in outputs])
            case "num_input_tokens":
                return 1, struct.pack("<I", self._prompt_tokens)
            case _:
                return len(outputs), struct.pack(f"<{len(outputs)}I", *(o.tokens for o in outputs))

    def _logprobs(self, output: _Output) -> str:
        """For each token its id and those of the likeliest, with log probability, rank and text; as JSON."""
        if not self._asked.generation.sampling.HasField("logprobs"):
            return "null"
        return json.dumps([self._position(token_id, found) for token_id, found in output.logprobs])

    def _position(self, token_id: int, found: pb.TokenLogprobs) -> dict[str, dict[str, Any]]:
        ranks = {top.token_id: (top.logprob, rank) for rank, top in enumerate(found.top, start=1)}
        listed = {token_id: ranks.get(token_id, (found.logprob, None)), **ranks}
        return {
            str(token): {"logprob": logprob, "rank": rank, "decoded_token": self._word(token)}
            for token, (logprob, rank) in listed.items()
        }


def _packed(texts: Sequence[str]) -> bytes:
    """A BYTES tensor: each element's length in four little-endian bytes, then its bytes."""
    parts = []
    for text in texts:
        data = text.encode()
        parts += [struct.pack("<I", len(data)), data]
    return b"".join(parts)


def _prove(response: kserve.ModelInferResponse, timing: pb.RequestTiming) -> None:
    """How the targets fared, of the output that ended last."""
    for name in ("ttft_ms", "tbt_p50_ms", "tbt_p99_ms", "e2e_ms"):
        if timing.HasField(name):
            response.parameters[f"drift_{name}"].double_param = getattr(timing, name)
    for name in ("ttft_met", "tbt_met", "e2e_met"):
        if timing.HasField(name):
            response.parameters[f"drift_{name}"].bool_param = getattr(timing, name)
