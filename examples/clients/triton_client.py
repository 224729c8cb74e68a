"""Stream text from Drift with NVIDIA's unmodified Triton client: pip install 'tritonclient[grpc]'.

drift serve --compat kserve
python triton_client.py 127.0.0.1:50051 "A list is" [--tokens 40] [--how sync|stream|aio|aio-stream]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio

MODEL = "demo"


def tensors(prompt: str, tokens: int, stream: bool) -> list[Any]:
    """The inputs of Triton's vLLM backend."""
    parameters = json.dumps({"max_tokens": tokens, "temperature": 0})
    found = []
    for name, value, kind in (
        ("text_input", prompt.encode(), "BYTES"),
        ("sampling_parameters", parameters.encode(), "BYTES"),
        ("stream", stream, "BOOL"),
        ("exclude_input_in_output", True, "BOOL"),
    ):
        tensor = triton.InferInput(name, [1], kind)
        tensor.set_data_from_numpy(np.array([value], dtype=object if kind == "BYTES" else bool))
        found.append(tensor)
    return found


def text(result: Any) -> str:
    """The new text of one response."""
    return str(result.as_numpy("text_output")[0].decode())


def infer(target: str, prompt: str, tokens: int) -> str:
    """One request, one response."""
    with triton.InferenceServerClient(target) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(MODEL)
        assert client.get_model_config(MODEL).config.model_transaction_policy.decoupled
        assert client.get_model_metadata(MODEL).name == MODEL
        return text(client.infer(MODEL, tensors(prompt, tokens, stream=False)))


def stream(target: str, prompt: str, tokens: int) -> str:
    """One request on a stream, responses to a callback in another thread."""
    responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
    parts = []
    with triton.InferenceServerClient(target) as client:
        client.start_stream(lambda result, error: responses.put((result, error)))
        client.async_stream_infer(MODEL, tensors(prompt, tokens, stream=True), request_id="1")
        while True:
            result, error = responses.get(timeout=60)
            if error is not None:
                raise error
            parts.append(text(result))
            if result.get_response().parameters["triton_final_response"].bool_param:
                break
        client.stop_stream()
    return "".join(parts)


async def infer_aio(target: str, prompt: str, tokens: int) -> str:
    """As `infer`, with asyncio."""
    async with triton_aio.InferenceServerClient(target) as client:
        assert await client.is_server_ready()
        return text(await client.infer(MODEL, tensors(prompt, tokens, stream=False)))


async def stream_aio(target: str, prompt: str, tokens: int) -> str:
    """As `stream`, with asyncio."""

    async def requests() -> Any:
        yield {"model_name": MODEL, "inputs": tensors(prompt, tokens, stream=True), "request_id": "1"}

    parts = []
    async with triton_aio.InferenceServerClient(target) as client:
        async for result, error in client.stream_infer(requests()):
            if error is not None:
                raise error
            parts.append(text(result))
    return "".join(parts)


def main() -> None:
    """Print the text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--how", choices=("sync", "stream", "aio", "aio-stream"), default="stream")
    given = parser.parse_args()
    asked = (given.target, given.prompt, given.tokens)
    match given.how:
        case "sync":
            print(infer(*asked))
        case "stream":
            print(stream(*asked))
        case "aio":
            print(asyncio.run(infer_aio(*asked)))
        case "aio-stream":
            print(asyncio.run(stream_aio(*asked)))


if __name__ == "__main__":
    main()
