"""What a real engine logged, the simulator follows decision by decision, prefix reuse included."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from drift_core.engine import EngineConfig
from drift_core.frames import Submit
from drift_core.sampling_params import SamplingParams
from drift_core.starting import start_engine
from drift_kernels.affinity import CpuAffinity
from drift_scheduler.cost.table import CostTable, DecodeRow, PrefillRow, write_table
from drift_scheduler.domain import Finished, Step
from drift_scheduler.plugins import load
from drift_scheduler.replay import replay

REQUESTS = 16
PATIENCE_S = 120.0


def table(path: Path) -> Path:
    """Made-up times of this machine's cores: what the engine believes, and its log says it did."""
    affinity = CpuAffinity(None)
    cores = range(1, affinity.units + 1)
    prefill = [
        PrefillRow(
            units=u, requests=1, new=n, reused=0, new_squared=n * n, new_times_reused=0,
            seconds=(1e-3 + 5e-5 * n) / u**0.9,
        )
        for u in cores for n in (16, 128, 400)
    ]  # fmt: skip
    decode = [
        DecodeRow(units=u, batch=b, context_tokens=b * c, seconds=(2e-3 + 1e-4 * b + 1e-6 * b * c) / u**0.4)
        for u in cores for b in (1, 8) for c in (32, 256)
    ]  # fmt: skip
    write_table(
        CostTable(
            device="cores", model="demo", num_layers=6, total_units=affinity.units, menu=tuple(affinity.menu()),
            prefill=tuple(prefill), decode=tuple(decode),
        ),
        path,
    )  # fmt: skip
    return path


def served(config: EngineConfig) -> None:
    """Requests whose prompts begin alike, some of which quote an earlier answer."""
    engine = start_engine(config)
    ended = threading.Semaphore(0)
    tokens: dict[str, list[int]] = {}

    def deliver(step: Step) -> None:
        for output in step.outputs:
            if isinstance(output, Finished):
                ended.release()
            elif getattr(output, "token_ids", None) is not None:
                for request_id, token in zip(output.request_ids, output.token_ids, strict=True):
                    tokens.setdefault(request_id, []).append(token)

    loop = threading.Thread(target=engine.run, args=(deliver,))
    loop.start()
    draw = random.Random(5)
    common = [draw.randrange(200) for _ in range(64)]
    prompts: dict[int, list[int]] = {}
    for half in range(2):
        for i in range(REQUESTS // 2):
            prompt = common[: draw.choice((0, 32, 64))] + [
                draw.randrange(200) for _ in range(draw.randrange(5, 150))
            ]
            if half and i % 2:
                prompt = [*prompts[i], *tokens[f"r{i}"], *prompt]
            elif not half:
                prompts[i] = prompt
            engine.submit(_submission(f"r{half * REQUESTS // 2 + i}", prompt, draw.randrange(5, 40)))
        for _ in range(REQUESTS // 2):
            assert ended.acquire(timeout=PATIENCE_S), "the engine does not get on"
    engine.shut_down()
    loop.join(PATIENCE_S)
    engine.close()


def _submission(request_id: str, prompt: list[int], tokens: int) -> Submit:
    return Submit(
        id=request_id, prompt=prompt, sampling=SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True),
        slo_ttft=2.0, slo_tbt=0.1, slo_e2e=None, slo_class="test", priority=0, salt="", arrival=time.monotonic(),
    )  # fmt: skip


@pytest.mark.parametrize("dispatch", ["gang", "chunked-prefill"])
def test_an_engines_log_is_followed_to_its_end(tmp_path: Path, dispatch: str) -> None:
    path = tmp_path / "log.jsonl"
    served(
        EngineConfig(
            model="demo",
            device="cpu",
            dispatch=dispatch,
            profile=str(table(tmp_path / "table.json")),
            max_running=8,
            log=str(path),
        )
    )
    (found,) = replay([str(path)], ["prefill-first"], None, load())["logs"]
    assert found["requests"]["finished"] == REQUESTS
    own = found["decisions"]
    assert own["stopped"] is None
    assert own["states_differ"] == 0
    assert own["followed_steps"] == found["steps"]
    assert own["ratio"] == 1.0
    other = found["others"][0]
    assert other["decisions"]["compared"] == own["compared"]
    assert other["report"]["requests"]["finished"] == REQUESTS
    assert other["report"]["kv"]["prefix_hit_ratio"] > 0.1
