"""The engine end to end: what it generates, whatever the policy, and what becomes of requests that end early."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from drift_core.engine import Engine, EngineConfig, engine_config
from drift_core.frames import Submit
from drift_core.sampling_params import SamplingParams
from drift_core.starting import start_engine
from drift_scheduler.dispatch.exclusive import exclusive_decode, exclusive_prefill
from drift_scheduler.dispatch.prompts import new_batch, next_block, whole_prompts
from drift_scheduler.domain import Accepted, Finished, FinishReason, Gang, Sharing, Step, Tokens
from drift_scheduler.errors import DriftError
from drift_scheduler.protocols import CostModel, DispatchPolicy, PartitionPolicy
from drift_scheduler.scheduler import Limits, Scheduler
from drift_scheduler.view import View

VOCAB = 131
EOS = 1
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint, random but not indifferent: its greedy continuations depend on the prompt."""
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=EOS,
        bos_token_id=0,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("tiny")
    transformers.LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(directory: Path) -> Callable[[Sequence[int], int], list[int]]:
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def greedy(prompt: Sequence[int], tokens: int) -> list[int]:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(tokens):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    return greedy


class Session:
    """An engine on a thread, and everything it said."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, Finished] = {}
        self.accepted: set[str] = set()
        self.gangs: list[Gang] = []
        self.details: dict[str, list[Any]] = {}
        self.changed = threading.Condition()
        self._thread = threading.Thread(target=engine.run, args=(self._deliver,))
        self._thread.start()

    def submit(
        self, request_id: str, prompt: list[int], sampling: SamplingParams = GREEDY, **fields: Any
    ) -> None:
        values: dict[str, Any] = {"slo_ttft": 2.0, "slo_tbt": 0.1, "priority": 0, "salt": ""} | fields
        self.engine.submit(
            Submit(
                id=request_id, prompt=prompt, sampling=sampling, slo_e2e=None, slo_class="test",
                arrival=time.monotonic(), **values,
            )
        )  # fmt: skip

    def wait(self, *request_ids: str) -> list[Finished]:
        self.until(lambda: all(each in self.finished for each in request_ids))
        return [self.finished[each] for each in request_ids]

    def until(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE_S), "the engine does not get on"

    def close(self) -> None:
        self.engine.shut_down()
        self._thread.join(PATIENCE_S)
        self.engine.close()
        assert not self.engine.scheduler.policy_faults

    def _deliver(self, step: Step) -> None:
        with self.changed:
            if step.gang is not None:
                self.gangs.append(step.gang)
            for output in step.outputs:
                match output:
                    case Tokens(request_ids=ids, token_ids=tokens, details=details):
                        for request_id, token in zip(ids, tokens or (), strict=True):
                            self.tokens.setdefault(request_id, []).append(token)
                            if details and request_id in details:
                                self.details.setdefault(request_id, []).append(details[request_id])
                    case Accepted(request_id=request_id):
                        self.accepted.add(request_id)
                    case Finished(request_id=request_id):
                        self.finished[request_id] = output
            self.changed.notify_all()


def config(directory: Path, **fields: Any) -> EngineConfig:
    return engine_config(**({"model": str(directory), "profile": "none", "max_running": 12} | fields))


@pytest.fixture
def serving(directory: Path) -> Iterator[Callable[..., Session]]:
    sessions: list[Session] = []

    def start(policy: DispatchPolicy | None = None, **fields: Any) -> Session:
        engine = start_engine(config(directory, **fields))
        if policy is not None:
            old = engine.scheduler
            engine.scheduler = Scheduler(
                old.device, old.kv, policy, old._partitions, old.costs, Limits(max_running=12)
            )
        sessions.append(Session(engine))
        return sessions[-1]

    yield start
    for session in sessions:
        session.close()


def prompts(seed: int, count: int, longest: int = 120) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(2, VOCAB) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


class Temporal:
    """Decode, then a layer or two of prefill, on the whole device: the sharing no built-in policy uses yet."""

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        if view.prefill_lane.busy or view.decode_lane.busy:
            return None
        step = view.decode_step()
        if step is None:
            return exclusive_prefill(view, 64)
        if view.prefills:
            batch = view.prefills[-1]
        else:
            chunks = whole_prompts(view, 64)
            if not chunks:
                return exclusive_decode(view)
            batch = new_batch(chunks)
        layers = min(2, view.device.num_layers - batch.next_layer)
        return Gang(Sharing.TEMPORAL, view.device.all_decode, prefill=next_block(batch, layers), decode=step)


CHOICES: dict[str, dict[str, Any]] = {
    "gang": {"dispatch": "gang"},
    "gang, static split": {"dispatch": "gang:max_batch_tokens=64", "partition": "static:decode_units=1"},
    "chunked-prefill": {"dispatch": "chunked-prefill:token_budget=40"},
    "alternate": {"dispatch": "alternate"},
    "prefill-first": {"dispatch": "prefill-first"},
    "temporal": {"policy": Temporal()},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_ragged_requests_together_generate_what_transformers_does(
    choice: str, serving: Callable[..., Session], reference: Callable[[Sequence[int], int], list[int]]
) -> None:
    session = serving(**CHOICES[choice])
    given = prompts(1, 10)
    for index, prompt in enumerate(given):
        if index == 4:  # the rest arrives while these decode
            session.until(lambda: "r0" in session.tokens)
        session.submit(f"r{index}", prompt)
    session.wait(*(f"r{index}" for index in range(10)))
    for index, prompt in enumerate(given):
        assert session.tokens[f"r{index}"] == reference(prompt, 24), f"prompt {index} of {len(prompt)} tokens"
        end = session.finished[f"r{index}"]
        assert (end.reason, end.timing.output_tokens) == (FinishReason.LENGTH, 24)
    used = {gang.sharing for gang in session.gangs}
    expected = {"chunked-prefill": Sharing.FUSED, "temporal": Sharing.TEMPORAL}.get(choice)
    assert expected is None or expected in used


@pytest.mark.parametrize("dispatch", ["gang", "chunked-prefill"])
def test_a_common_prefix_is_computed_once(
    dispatch: str, serving: Callable[..., Session], reference: Callable[[Sequence[int], int], list[int]]
) -> None:
    session = serving(dispatch=dispatch)
    (common,) = prompts(2, 1, 2)
    common = (common * 100)[:70]
    first, second = [*common, 5, 6, 7], [*common, 9, 10]
    session.submit("a", first)
    session.wait("a")
    session.submit("b", second)
    session.submit("other tenant", second, salt="them")
    session.wait("b", "other tenant")
    assert session.finished["a"].timing.cached_tokens == 0
    assert session.finished["b"].timing.cached_tokens == 64  # whole pages of 16
    assert session.finished["other tenant"].timing.cached_tokens == 0
    assert session.tokens["a"] == reference(first, 24)
    assert session.tokens["b"] == session.tokens["other tenant"] == reference(second, 24)


@pytest.mark.parametrize("dispatch", ["gang", "chunked-prefill", "alternate"])
def test_preemption_by_recomputation_changes_no_token(
    dispatch: str, serving: Callable[..., Session], reference: Callable[[Sequence[int], int], list[int]]
) -> None:
    page = 2 * 5 * 16 * 2 * 8 * 4  # keys and values, layers, tokens, heads, size, bytes
    session = serving(dispatch=dispatch, max_context=128, kv_memory_bytes=14 * page)
    sampled = SamplingParams(temperature=1.0, seed=11, max_tokens=60, ignore_eos=True)
    greedy = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    given = prompts(3, 6, 40)
    for index, prompt in enumerate(given):
        session.submit(f"r{index}", prompt, sampled if index % 2 else greedy)
    ends = session.wait(*(f"r{index}" for index in range(6)))
    assert sum(end.timing.preemptions for end in ends) > 0
    assert all(end.timing.recomputed_tokens > 0 for end in ends if end.timing.preemptions)
    for index in range(0, 6, 2):
        assert session.tokens[f"r{index}"] == reference(given[index], 60)
    for index in range(1, 6, 2):  # alone, without preemption
        session.submit("again", given[index], sampled)
        (end,) = session.wait("again")
        assert end.timing.preemptions == 0
        assert session.tokens.pop("again") == session.tokens[f"r{index}"]
        del session.finished["again"]


def test_sampling_depends_on_the_seed_and_not_on_the_company(serving: Callable[..., Session]) -> None:
    session = serving()
    sampling = SamplingParams(temperature=1.0, seed=5, max_tokens=12, ignore_eos=True, logprobs=2)
    session.submit("alone", [3, 4, 5], sampling)
    session.wait("alone")
    for index, prompt in enumerate(prompts(4, 5)):
        session.submit(f"r{index}", prompt)
    session.submit("together", [3, 4, 5], sampling)
    session.wait("together", *(f"r{index}" for index in range(5)))
    assert session.tokens["alone"] == session.tokens["together"]
    assert [len(entry.top) for entry in session.details["together"]] == [2] * 12
    assert "r0" not in session.details


def test_end_of_text_ends_a_request(
    serving: Callable[..., Session], reference: Callable[[Sequence[int], int], list[int]]
) -> None:
    session = serving()
    expected = reference([9, 8, 7], 24)
    stop = expected[5]
    session.submit("a", [9, 8, 7], SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=[stop]))
    (end,) = session.wait("a")
    assert end.reason is FinishReason.STOP
    assert session.tokens["a"] == expected[: expected.index(stop) + 1]


def test_cancellation_gives_the_pages_back(serving: Callable[..., Session]) -> None:
    session = serving()
    kv = session.engine.executor.kv
    endless = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    for index, prompt in enumerate(prompts(5, 4, 40)):
        session.submit(f"r{index}", prompt, endless)
    session.until(lambda: len(session.tokens) == 4)
    session.engine.cancel("r0")
    session.engine.cancel("r1", stop=True)
    ends = session.wait("r0", "r1")
    assert [end.reason for end in ends] == [FinishReason.CANCELLED, FinishReason.STOP]
    session.engine.cancel("nobody")
    session.engine.cancel("r0")
    session.wait("r2", "r3")
    session.submit("last", [4, 5], SamplingParams(max_tokens=1))
    session.wait("last")
    assert kv.free_pages == kv.total_pages
    assert len(session.engine.executor._sequences) == 0  # type: ignore[attr-defined]


def test_the_name_of_a_cancelled_request_may_be_used_again_at_once(
    serving: Callable[..., Session], reference: Callable[[Sequence[int], int], list[int]]
) -> None:
    """Its end is told while a lane still works on it."""
    session = serving()
    endless = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    session.submit("a", [9, 8, 7], endless)
    for turn in range(8):
        session.until(lambda turn=turn: len(session.tokens.get("a", ())) > turn)  # type: ignore[misc]
        session.engine.cancel("a", stop=True)
        session.wait("a")
        session.finished.clear()
        session.tokens.clear()
        session.submit("a", [turn + 2, 4], endless)
    session.engine.cancel("a")
    session.wait("a")
    session.finished.clear()
    session.tokens.clear()
    session.submit("a", [3, 4, 5])
    assert session.wait("a")[0].reason is FinishReason.LENGTH
    assert session.tokens["a"] == reference([3, 4, 5], 24)


def test_a_lane_that_raises_fails_its_requests_and_serves_the_next(
    serving: Callable[..., Session],
    reference: Callable[[Sequence[int], int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = serving()
    decoder = session.engine.executor._decoder  # type: ignore[attr-defined]
    broken = threading.Event()
    broken.set()

    def run_layers(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        if broken.is_set():
            raise RuntimeError("a cable came loose")
        return original(hidden, *rest)

    original = decoder.run_layers
    monkeypatch.setattr(decoder, "run_layers", run_layers)
    session.submit("a", [2, 3, 4])
    (end,) = session.wait("a")
    assert end.reason is FinishReason.FAILED
    assert "prefill lane failed: RuntimeError: a cable came loose" in end.message
    broken.clear()
    session.submit("b", [2, 3, 4])
    session.until(lambda: "b" in session.tokens)
    broken.set()
    (end,) = session.wait("b")
    assert end.reason is FinishReason.FAILED
    assert "decode lane failed" in end.message
    broken.clear()
    session.submit("c", [2, 3, 4])
    session.wait("c")
    assert session.tokens["c"] == reference([2, 3, 4], 24)


def test_a_prompt_longer_than_the_context_is_rejected(serving: Callable[..., Session]) -> None:
    session = serving(max_context=64)
    session.submit("a", [5] * 64)
    (end,) = session.wait("a")
    assert end.reason is FinishReason.REJECTED
    assert "64" in end.message
    assert "context" in end.message
    session.submit("b", [5] * 63, SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True))
    (end,) = session.wait("b")
    assert (end.reason, end.timing.output_tokens) == (FinishReason.LENGTH, 1)


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], GREEDY, "no tokens"),
        ([4, VOCAB], GREEDY, f"token id {VOCAB}; the vocabulary has 0 to {VOCAB - 1}"),
        ([-1], GREEDY, "token id -1"),
        ([4], SamplingParams(stop_token_ids=[VOCAB]), "stop_token_ids"),
        ([4], SamplingParams(logit_bias={VOCAB: 1.0}), "logit_bias"),
    ],
)
def test_what_the_model_cannot_take_is_refused_in_one_line(
    prompt: list[int], sampling: SamplingParams, message: str, serving: Callable[..., Session]
) -> None:
    session = serving()
    with pytest.raises(DriftError, match=message) as caught:
        session.submit("a", prompt, sampling)
    assert "\n" not in str(caught.value)


def test_an_id_in_use_is_refused(serving: Callable[..., Session]) -> None:
    session = serving()
    session.submit("a", [3], SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True))
    with pytest.raises(DriftError, match="'a' is in use"):
        session.submit("a", [3])
    session.wait("a")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "nowhere"}, "no model directory 'nowhere'.*'demo'"),
        ({"dispatch": "gong"}, "no dispatch policy 'gong'.*did you mean 'gang'.*installed: "),
        ({"dispatch": "gang:urgency=3"}, "takes no option 'urgency'; options: "),
        ({"partition": "halves"}, "no partition policy 'halves'.*installed: "),
        ({"device": "tpu"}, "no device 'tpu'.*auto.*cpu"),
        ({"dtype": "int3"}, "no dtype 'int3'.*bfloat16"),
        ({"cost": "guess"}, "no cost model 'guess'"),
        ({"profile": "missing.json"}, "cost table missing.json: No such file"),
        ({"max_context": 100000}, "max_context 100000 is more than the 256"),
        ({"kv_memory_bytes": 1000}, "KV memory.*less than one request"),
        ({"kv_memory_bytes": 1 << 60}, "too little memory"),
        ({"cores": 100000}, "cores is 100000"),
        ({"slo_tbt": -1.0}, "slo_tbt"),
        ({"page_tokens": 0}, "page_tokens"),
        ({"turbo": True}, "turbo"),
        ({"log": "/nowhere/at/all.jsonl"}, "log /nowhere/at/all.jsonl"),
    ],
)
def test_bad_configuration_is_one_clear_line(directory: Path, fields: dict[str, Any], message: str) -> None:
    before = threading.active_count()
    with pytest.raises(DriftError, match=message) as caught:
        start_engine(config(directory, **fields))
    assert "\n" not in str(caught.value)
    assert threading.active_count() == before, "something is half-started"


def test_without_a_wish_the_context_is_what_memory_holds(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = 2 * 5 * 16 * 2 * 8 * 4
    monkeypatch.setattr("drift_core.assembly.available_bytes", lambda: 4 * 10 * page)  # a quarter is 10 pages
    monkeypatch.setattr("drift_core.assembly.check_weights_fit", lambda *rest: None)
    engine = start_engine(config(directory))
    engine.close()
    assert (engine.max_context, engine.executor.plan.num_pages) == (160, 10)
    with pytest.raises(DriftError, match="less than one request of 256"):
        start_engine(config(directory, max_context=256))
    with pytest.raises(DriftError, match="too little memory: a KV budget of"):
        start_engine(config(directory, kv_memory_bytes=41 * page))


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drift_core.assembly.available_bytes", lambda: 1000)
    with pytest.raises(DriftError, match=r"too little memory: the weights of .* take .* KiB, and 1000 bytes"):
        start_engine(config(directory))


def test_a_corrupt_checkpoint_is_named(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{bad")
    with pytest.raises(DriftError, match=r"model\.safetensors is corrupt"):
        start_engine(config(tmp_path))


def test_the_decision_log_is_written(serving: Callable[..., Session], tmp_path: Path) -> None:
    session = serving(log=str(tmp_path / "log.jsonl"))
    session.submit("a", [3, 4])
    session.wait("a")
    session.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert '"drift.log/1"' in lines[0]
    assert len(lines) > 24


def test_facts_say_what_is_served(serving: Callable[..., Session], directory: Path) -> None:
    facts = serving().engine.facts(42)
    assert (facts.pid, facts.vocab_size, facts.max_context, facts.num_layers) == (42, VOCAB, 256, 5)
    assert facts.directory == str(directory)
    assert facts.kv_tokens == facts.kv_pages * 16
    assert (facts.dtype, facts.eos_token_ids) == ("float32", [EOS])
