"""A bare grpc.aio server that streams messages of the gateway's shape and does nothing else.

Tokens come a step apart, one per stream, as the simulated engine's do; every `hold` steps a stream gets a message with
those that came. With `--ready` it waits for none of them, and the messages are the same. No engine, no detokenising,
no admission, no checks: what gRPC and Python cost by themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import uvloop

from drift_gateway.server import SERVER_OPTIONS
from drift_gateway.v1 import generation_pb2 as pb
from drift_gateway.v1 import generation_pb2_grpc

TEXT = " token"


class Echo(generation_pb2_grpc.GenerationServiceServicer):
    """Answers every request with `max_tokens` tokens."""

    def __init__(self, step_seconds: float, hold: float, ready: bool) -> None:
        self._step = step_seconds
        self._hold = hold
        self._ready = ready

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        arrival = time.monotonic()
        accepted = pb.Accepted(request_id=request.request_id, arrival_us=int(arrival * 1e6))
        await context.write(pb.GenerateResponse(accepted=accepted))
        left, sequence, sent, due = request.stopping.max_tokens, 0, 0, self._hold
        while left:
            count = min(left, max(1, int(due) - sent))
            if not self._ready:
                await asyncio.sleep(max(0.0, arrival + (sent + count) * self._step - time.monotonic()))
                # What came meanwhile goes along, as it does in the gateway.
                count = min(left, max(count, int((time.monotonic() - arrival) / self._step) - sent))
            positions = range(sent + 1, sent + 1 + count)
            delta = pb.TokenDelta(
                sequence=sequence,
                text=TEXT * count,
                token_ids=[position % 3000 for position in positions],
                offsets_us=[int(position * self._step * 1e6) for position in positions],
            )
            await context.write(pb.GenerateResponse(token_delta=delta))
            sent, left, sequence = sent + count, left - count, sequence + 1
            due = max(due + self._hold, sent + 1.0)
        finished = pb.Finished(reason=pb.FINISH_REASON_LENGTH, usage=pb.Usage(output_tokens=sent))
        await context.write(pb.GenerateResponse(finished=finished))


async def serve(step_seconds: float, hold: float, ready: bool) -> None:
    """Say the port on standard output and serve until ended."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(Echo(step_seconds, hold, ready), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"port {port}", flush=True)
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--hold", type=float, default=1.0, help="steps per message")
    parser.add_argument("--ready", action="store_true", help="all tokens are there from the beginning")
    options = parser.parse_args()
    uvloop.run(serve(options.step_ms / 1e3, options.hold, options.ready))


if __name__ == "__main__":
    main()
