"""inference.GRPCInferenceService: KServe's inference protocol, as Triton's clients use it, in front of drift.v1.

One model, version 1, decoupled: text in BYTES tensors as Triton's vLLM backend has it. ModelInfer answers with the
whole output (Triton itself would refuse it for a decoupled model); ModelStreamInfer serves any number of requests at
once on one stream, where a request that fails gets an `error_message` and the others go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final

from drift_gateway import __version__
from drift_gateway.calls import call_of
from drift_gateway.compat.kserve_tensors import INPUTS, OUTPUTS, Answer, Asked, read
from drift_gateway.compat.messages import Messages
from drift_gateway.compat.wire import kserve_pb2 as kserve
from drift_gateway.compat.wire import kserve_pb2_grpc
from drift_gateway.generation import Generations
from drift_gateway.refusal import Reason, Refusal, given_up, invalid, refusal_of, refusals_as_statuses
from drift_gateway.supervisor import Served, State, Supervisor

VERSION: Final = "1"
MAX_AT_ONCE: Final = 256
"""Requests of one ModelStreamInfer in flight; further ones wait in the stream."""

_TYPES: Final = {
    "BYTES": kserve.TYPE_STRING, "BOOL": kserve.TYPE_BOOL, "FP32": kserve.TYPE_FP32, "UINT32": kserve.TYPE_UINT32
}  # fmt: skip


class InferenceService(kserve_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves the supervisor's model by way of `generations`."""

    def __init__(self, supervisor: Supervisor, generations: Generations) -> None:
        self._supervisor = supervisor
        self._generations = generations

    async def ServerLive(self, request: kserve.ServerLiveRequest, context: Any) -> kserve.ServerLiveResponse:
        """Always."""
        return kserve.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: kserve.ServerReadyRequest, context: Any
    ) -> kserve.ServerReadyResponse:
        """Whether requests would be served now."""
        return kserve.ServerReadyResponse(ready=self._supervisor.state is State.READY)

    async def ModelReady(self, request: kserve.ModelReadyRequest, context: Any) -> kserve.ModelReadyResponse:
        """Whether requests of this model would be served now."""
        served = self._supervisor.served
        ready = self._supervisor.state is State.READY and served is not None
        return kserve.ModelReadyResponse(ready=ready and _is(served, request.name, request.version))

    async def ServerMetadata(
        self, request: kserve.ServerMetadataRequest, context: Any
    ) -> kserve.ServerMetadataResponse:
        """Name and version of Drift."""
        return kserve.ServerMetadataResponse(
            name="drift", version=__version__, extensions=["model_configuration", "parameters"]
        )

    async def ModelMetadata(
        self, request: kserve.ModelMetadataRequest, context: Any
    ) -> kserve.ModelMetadataResponse:
        """The tensors of the model."""
        async with refusals_as_statuses(context):
            model = self._known(request.name, request.version).ready.model
        described = kserve.ModelMetadataResponse.TensorMetadata
        return kserve.ModelMetadataResponse(
            name=model,
            versions=[VERSION],
            platform="drift",
            inputs=[described(name=name, datatype=kind, shape=[1]) for name, kind in INPUTS.items()],
            outputs=[described(name=name, datatype=kind, shape=[-1]) for name, kind in OUTPUTS.items()],
        )

    async def ModelConfig(
        self, request: kserve.ModelConfigRequest, context: Any
    ) -> kserve.ModelConfigResponse:
        """The tensors of the model, and that it is decoupled: a request may have many responses."""
        async with refusals_as_statuses(context):
            model = self._known(request.name, request.version).ready.model
        config = kserve.ModelConfig(
            name=model,
            backend="drift",
            max_batch_size=0,
            model_transaction_policy=kserve.ModelTransactionPolicy(decoupled=True),
        )
        for name, kind in INPUTS.items():
            config.input.add(name=name, data_type=_TYPES[kind], dims=[1], optional=name != "text_input")
        for name, kind in OUTPUTS.items():
            config.output.add(name=name, data_type=_TYPES[kind], dims=[-1])
        return kserve.ModelConfigResponse(config=config)

    async def ModelInfer(self, request: kserve.ModelInferRequest, context: Any) -> kserve.ModelInferResponse:
        """The whole output; errors are statuses, as drift.v1's."""
        call = call_of(context)
        async with refusals_as_statuses(context):
            served = self._known(request.model_name, request.model_version)
            asked = read(request)
            if asked.stream:
                raise invalid("stream", "ModelInfer has one response; ask ModelStreamInfer for a stream")
            answer = _answer(asked, served)
            async with aclosing(self._generations.responses(asked.generation, call)) as events:
                async for event in events:
                    answer.take(event)
            return answer.response(request, served.ready.model)
        raise AssertionError("the call was aborted")

    async def ModelStreamInfer(  # type: ignore[override]  # it writes its messages, and yields none
        self, requests: AsyncIterator[kserve.ModelInferRequest], context: Any
    ) -> None:
        """Requests as they come, answered side by side; leaving the stream ends them all."""
        messages: Messages[kserve.ModelStreamInferResponse] = Messages(context.write)
        room = asyncio.Semaphore(MAX_AT_ONCE)
        async with asyncio.TaskGroup() as tasks:
            async for request in requests:
                await room.acquire()
                task = tasks.create_task(self._answer_one(request, context, messages))
                task.add_done_callback(lambda _: room.release())

    async def _answer_one(
        self,
        request: kserve.ModelInferRequest,
        context: Any,
        messages: Messages[kserve.ModelStreamInferResponse],
    ) -> None:
        call = call_of(context)

        async def fail(refusal: Refusal) -> None:
            failed = kserve.ModelStreamInferResponse(error_message=str(refusal))
            failed.infer_response.id = request.id
            failed.infer_response.parameters["triton_final_response"].bool_param = True
            await messages.write(failed)

        try:
            served = self._known(request.model_name, request.model_version)
            asked = read(request)
            answer = _answer(asked, served)
            async with aclosing(self._generations.responses(asked.generation, call)) as events:
                async for event in events:
                    due = answer.take(event)
                    if due and (asked.stream or answer.ended):
                        response = answer.response(request, served.ready.model)
                        await messages.write(kserve.ModelStreamInferResponse(infer_response=response))
        except asyncio.CancelledError as error:
            refusal = given_up(error)
            if refusal is None:
                raise
            await fail(refusal)
        except Exception as error:  # a request's failure is its own; refusal_of logs what nobody foresaw
            await fail(refusal_of(error))

    def _known(self, name: str, version: str) -> Served:
        """What is served, if it is that. Raises Refusal."""
        served = self._supervisor.serving()
        if not _is(served, name, version):
            raise Refusal(
                Reason.MODEL_NOT_FOUND,
                f"Request for unknown model: '{name}' version '{version}' is not found; "
                f"'{served.ready.model}' version '{VERSION}' is served",
                field="model_name",
            )
        return served


def _is(served: Served | None, name: str, version: str) -> bool:
    """Whether that model is served; an empty name or version is any."""
    return served is not None and name in ("", served.ready.model) and version in ("", VERSION)


def _answer(asked: Asked, served: Served) -> Answer:
    tokenizer = served.tokenizer
    return Answer(asked, lambda token_id: "" if tokenizer is None else tokenizer.decode([token_id], False))
