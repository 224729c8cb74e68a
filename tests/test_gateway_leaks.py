"""What requests leave behind that are cancelled at random or whose client is killed: nothing, and at once."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cancel_storm import PATIENCE_S, Storm, storm
from gateway_under_test import UnderTest, run_with_gateway

from drift_core.frames import StepFrame, Submit
from drift_core.link import EngineClient, Submission

CLIENT = """
import sys
from drift_gateway.client import DriftClient
client = DriftClient(sys.argv[1])
streams = [iter(client.generate(token_ids=[5] * 100, max_tokens=400)) for _ in range(6)]
while True:
    for stream in streams:
        print(type(next(stream)).__name__, flush=True)
"""


def run(body: Any, **options: Any) -> None:
    async def with_storm() -> None:
        async with storm(**options) as storming:
            await asyncio.wait_for(body(storming), 4 * PATIENCE_S)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(with_storm())


def test_random_cancellations_leave_no_page_no_task_and_no_descriptor() -> None:
    async def body(storming: Storm) -> None:
        await storming.blow(20, at_once=20, seed=1)  # what is made once and kept is there afterwards
        before = await storming.settled()
        await storming.blow(300, at_once=50, seed=2)
        after = await storming.settled()
        assert storming.ends["cancelled"] > 50, storming.ends
        assert set(storming.ends) <= {"cancelled", "finished"}, storming.ends
        assert after.free_pages == storming.total_pages
        assert after.tasks <= before.tasks
        assert after.descriptors <= before.descriptors

    run(body)


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_cancelled_request_is_gone_without_a_look_for_garbage(
    monkeypatch: pytest.MonkeyPatch, outputs: int
) -> None:
    """Such looks are rare in a gateway, and it keeps all of a request until then: tokens, times, its text."""
    submitted: list[weakref.ref[Submission]] = []
    submit = EngineClient.submit

    def noting(self: EngineClient, frames: Sequence[Submit]) -> Submission:
        submission = submit(self, frames)
        submitted.append(weakref.ref(submission))
        return submission

    monkeypatch.setattr(EngineClient, "submit", noting)

    async def body(under: UnderTest) -> None:
        gc.disable()
        try:
            for number in range(1, 4):
                generation = under.client.generate(token_ids=[1], max_tokens=4000, n=outputs)
                events = aiter(generation)
                under.engine.step(3)
                for _ in range(2):
                    await anext(events)
                generation.cancel()
                await under.until(lambda engine, due=number * outputs: len(engine.cancels()) == due)
            async with asyncio.timeout(10.0):
                while any(reference() is not None for reference in submitted):
                    await asyncio.sleep(0.01)
        finally:
            gc.enable()
        assert len(submitted) == 3

    run_with_gateway(body, paused=True)


def test_a_killed_clients_pages_are_free_within_a_step_of_its_being_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Six streams of one process; the engine's steps take 50 ms."""
    noticed: list[float] = []
    forget = EngineClient.forget

    def noting(self: EngineClient, request_id: str, cancel: bool) -> None:
        if cancel:
            noticed.append(time.monotonic())
        forget(self, request_id, cancel)

    monkeypatch.setattr(EngineClient, "forget", noting)
    program = tmp_path / "client.py"
    program.write_text(CLIENT)

    async def body(storming: Storm) -> None:
        frames: list[StepFrame] = []
        ahead = storming.supervisor.ahead.step

        def watching(frame: StepFrame, steps: int) -> None:
            frames.append(frame)
            ahead(frame, steps)

        monkeypatch.setattr(storming.supervisor.ahead, "step", watching)
        client = subprocess.Popen(
            [sys.executable, str(program), f"127.0.0.1:{storming.gateway.port}"], stdout=subprocess.PIPE
        )
        assert client.stdout is not None
        for _ in range(24):  # accepted, and three messages of tokens each
            await asyncio.to_thread(client.stdout.readline)
        client.send_signal(signal.SIGKILL)
        await asyncio.to_thread(client.wait)
        await storming.settled()
        client.stdout.close()
        assert len(noticed) == 6
        freed = next(
            place
            for place, frame in enumerate(frames)
            if frame.time > noticed[0] and frame.load and frame.load.free_pages == storming.total_pages
        )
        decoded = [frame for frame in frames[:freed] if frame.tokens and frame.time > noticed[-1]]
        assert len(decoded) <= 1, f"{len(decoded)} steps were made before the pages were free"

    run(body, step_ms=50.0)
