"""The engine without a model: real scheduler, pages and link, simulated times, tokens that can be checked."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from itertools import islice
from typing import Any

import pytest

from drift_core.composition import assemble
from drift_core.engine import Engine, engine_config
from drift_core.frames import Submit
from drift_core.sampling_params import SamplingParams
from drift_core.simulated import SimulatedTokens, parse_subject, token_choices, token_ids
from drift_scheduler import plugins
from drift_scheduler.domain import Finished, Step, Tokens
from drift_scheduler.errors import DriftError

PATIENCE_S = 60.0
FAST = "step_ms=0.5:token_us=1"
OF_CLUSTERS = {"pd-disaggregated", "nanoflow", "loongserve"}
EXPECTED = token_choices(3072, [2])


def started(**fields: Any) -> Engine:
    settings = {
        "model": "demo",
        "device": "simulated",
        "simulate": FAST,
        "max_running": 8,
        "max_context": 256,
    }
    return assemble(engine_config(**(settings | fields)), lambda phase, fraction: None)


def submit(request_id: str, prompt: list[int], **sampling: Any) -> Submit:
    params = SamplingParams(**({"max_tokens": 8} | sampling))
    return Submit(request_id, prompt, params, 2.0, 0.1, None, "default", 0, "", time.monotonic())


def serve_all(engine: Engine, frames: list[Submit]) -> tuple[dict[str, list[int]], dict[str, Finished]]:
    """Tokens and ends of all requests."""
    tokens: dict[str, list[int]] = {frame.id: [] for frame in frames}
    ends: dict[str, Finished] = {}

    def deliver(step: Step) -> None:
        assert not step.faults
        for output in step.outputs:
            if isinstance(output, Tokens):
                assert output.token_ids is not None
                for request_id, token in zip(output.request_ids, output.token_ids, strict=True):
                    tokens[request_id].append(token)
            elif isinstance(output, Finished):
                ends[output.request_id] = output
        if len(ends) == len(frames):
            engine.shut_down()

    for frame in frames:
        engine.submit(frame)
    giving_up = threading.Timer(PATIENCE_S, engine.shut_down)
    giving_up.start()
    engine.run(deliver)
    giving_up.cancel()
    engine.close()
    assert len(ends) == len(frames), "it took too long"
    return tokens, ends


@pytest.mark.parametrize("dispatch", sorted(plugins.load().dispatch_policies))
def test_every_policy_that_runs_on_one_device_serves_the_same_tokens(dispatch: str) -> None:
    frames = [submit(f"r{k}", [3 + k] * (5 + 40 * (k % 3)), max_tokens=5 + k, seed=k) for k in range(12)]
    if dispatch in OF_CLUSTERS:
        with pytest.raises(DriftError, match="simulated clusters only"):
            started(dispatch=dispatch)
        return
    engine = started(dispatch=dispatch)
    tokens, ends = serve_all(engine, frames)
    for frame in frames:
        expected = list(
            islice(token_ids(frame.prompt, frame.sampling.seed, EXPECTED), 5 + frame.prompt[0] - 3)
        )
        assert tokens[frame.id] == expected
        assert ends[frame.id].reason.value == "length"
    assert engine.executor.kv.free_pages == engine.executor.kv.total_pages


def test_preempted_requests_go_on_with_the_same_tokens() -> None:
    frames = [submit(f"r{k}", [5, 6, k], max_tokens=60) for k in range(8)]
    engine = started(
        kv_memory_bytes=256 * 1024, max_context=256
    )  # 16 pages: four of the requests at their end
    tokens, _ = serve_all(engine, frames)
    assert engine.scheduler.preemptions > 0
    for frame in frames:
        assert tokens[frame.id] == list(islice(token_ids(frame.prompt, None, EXPECTED), 60))


def test_stop_tokens_end_an_output_and_logprobs_come_where_asked() -> None:
    prompt = [9, 9]
    first, second, third = islice(token_ids(prompt, None, EXPECTED), 3)
    frames = [
        submit("stops", prompt, max_tokens=50, stop_token_ids=[third], logprobs=1),
        submit("not-yet", prompt, max_tokens=4, stop_token_ids=[first, second], min_tokens=3),
    ]
    tokens, ends = serve_all(started(), frames)
    assert tokens["stops"] == [first, second, third]
    assert ends["stops"].reason.value == "stop"
    assert len(tokens["not-yet"]) >= 3


@pytest.mark.parametrize("count", [None, 0, 1, 5])
def test_as_many_likeliest_tokens_are_told_of_as_were_asked_for(count: int | None) -> None:
    drawn = SimulatedTokens(EXPECTED)
    drawn.add("r", [9, 9], SamplingParams(logprobs=count))
    (token,), _, details = drawn.draw(drawn.members(("r",)))
    if count is None:
        assert details is None
        return
    assert details is not None
    top = [token_id for token_id, _ in details["r"].top]
    assert len(top) == len(set(top)) == count
    assert top[:1] == [token][:count]
    assert {logprob for _, logprob in details["r"].top} <= {details["r"].logprob}


def test_a_described_device_takes_as_long_as_it_is_estimated_to() -> None:
    subject = parse_subject("h200/llama-3.1-8b")
    assert subject.device.total_units == 132
    engine = started(simulate="h200/llama-3.1-8b", max_context=None, dispatch="drift")
    assert engine.max_context == subject.max_context
    _, ends = serve_all(engine, [submit("one", [7] * 100, max_tokens=20)])
    timing = ends["one"].timing
    assert timing.tpot is not None
    assert (
        timing.tpot > 0.003
    )  # the floor of reading 16 GB of weights; no upper bound, as the machine may be busy


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("h200", "DEVICE/MODEL"),
        ("h201/llama-3.1-8b", "h200"),
        ("h200/llama-9", "llama-3.1-8b"),
        ("step_ms=fast", "step_ms is 'fast'"),
        ("step_ms=0", "0.1 to 60000"),
        ("token_us=-1", "0 to 1000000"),
        ("step_ms=10:noise=1", "noise=1"),
        ("rtx4090/llama-3.1-70b", "needs"),
    ],
)
def test_what_cannot_be_simulated_is_said_in_one_line(spec: str, says: str) -> None:
    with pytest.raises(DriftError, match=says) as refused:
        started(simulate=spec)
    assert "\n" not in str(refused.value)


def test_clients_call_the_model_by_the_name_that_it_is_served_under() -> None:
    assert [started(**fields).facts(1).model for fields in ({}, {"served_model_name": "mine"})] == [
        "demo",
        "mine",
    ]


def test_its_process_loads_no_torch() -> None:
    program = (
        "import sys; from drift_core.engine import engine_config; "
        "from drift_core.starting import start_engine; import drift_core.engine_process; "
        "start_engine(engine_config(model='demo', device='simulated')); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.stdout.strip() == "False", done.stderr


def test_what_to_simulate_is_said_for_a_simulated_device_only() -> None:
    with pytest.raises(DriftError, match="add --device simulated"):
        started(device="cpu")
