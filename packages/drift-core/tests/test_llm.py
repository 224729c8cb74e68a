"""Offline generation: prompts in, texts out, in vLLM's manner. Uses the embedded model."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from drift_core import LLM, SamplingParams
from drift_core.cli import generate
from drift_scheduler.errors import DriftError

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", profile="none", max_running=16, kv_memory_bytes=64 << 20) as model:
        yield model


def test_outputs_come_in_the_prompts_order_and_know_where_they_came_from(llm: LLM) -> None:
    texts = ["The import statement", "Return", "If the argument is a string, then it"]
    outputs = llm.generate(texts, GREEDY)
    assert [output.prompt for output in outputs] == texts
    assert len({output.request_id for output in outputs}) == 3
    for output in outputs:
        assert output.finished
        assert output.prompt_token_ids == llm.encode(output.prompt or "")
        (completion,) = output.outputs
        assert len(completion.token_ids) == 20
        assert completion.text == llm.tokenizer.decode(completion.token_ids)
        assert (completion.finish_reason, completion.stop_reason) == ("length", None)
        assert output.metrics is not None
        assert output.metrics.output_tokens == 20
        assert 0 < (output.metrics.ttft or 0) <= output.metrics.e2e


def test_a_prompt_may_be_text_token_ids_or_many_of_either(llm: LLM) -> None:
    ids = llm.encode("The import statement")
    text, alone, listed = (
        llm.generate(prompts, GREEDY) for prompts in ("The import statement", ids, [ids, tuple(ids)])
    )
    assert (text[0].prompt, alone[0].prompt) == ("The import statement", None)
    assert len(listed) == 2
    tokens = [output.outputs[0].token_ids for output in (*text, *alone, *listed)]
    assert tokens == [tokens[0]] * 4


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    short, long = llm.generate(["Return the", "Return the"], [
        SamplingParams(temperature=0.0, max_tokens=3), SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    ])  # fmt: skip
    assert len(short.outputs[0].token_ids) <= 3
    assert len(long.outputs[0].token_ids) == 9
    assert long.outputs[0].token_ids[: len(short.outputs[0].token_ids)] == short.outputs[0].token_ids


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    (whole,) = llm.generate("The import statement", GREEDY)
    text = whole.outputs[0].text
    stop = text[len(text) // 2 :][:4]
    at = text.index(stop)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, stop=stop)
    (cut,) = llm.generate("The import statement", params)
    completion = cut.outputs[0]
    assert completion.text == text[:at]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == whole.outputs[0].token_ids[: len(completion.token_ids)]
    included = SamplingParams(
        temperature=0.0, max_tokens=20, ignore_eos=True, stop=[stop], include_stop_str_in_output=True
    )
    assert llm.generate("The import statement", included)[0].outputs[0].text == text[: at + len(stop)]


def test_a_stop_token_is_no_part_of_the_text(llm: LLM) -> None:
    (whole,) = llm.generate("The import statement", GREEDY)
    ids = whole.outputs[0].token_ids
    stop = ids[4]
    (cut,) = llm.generate(
        "The import statement", SamplingParams(temperature=0.0, stop_token_ids=[stop], ignore_eos=True)
    )
    completion = cut.outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == ids[: ids.index(stop) + 1]
    assert completion.text == llm.tokenizer.decode(completion.token_ids[:-1])


def test_n_outputs_are_drawn_with_seeds_of_their_own(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=4, max_tokens=12, ignore_eos=True, logprobs=1)
    (output,) = llm.generate("The", params)
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) > 1
    (again,) = llm.generate("The", params)
    assert [c.token_ids for c in again.outputs] == [c.token_ids for c in output.outputs]
    for completion in output.outputs:
        assert completion.logprobs is not None
        assert len(completion.logprobs) == 12
        assert completion.cumulative_logprob == pytest.approx(
            sum(each.logprob for each in completion.logprobs)
        )


def test_what_cannot_be_served_is_refused_before_anything_starts(llm: LLM) -> None:
    limit = llm._engine.max_context
    with pytest.raises(DriftError, match=f"prompt 1 has {limit} tokens, which leaves no room.*{limit}"):
        llm.generate([[5], [5] * limit], GREEDY)
    with pytest.raises(DriftError, match="the vocabulary has 0 to"):
        llm.generate([[10**6]], GREEDY)
    with pytest.raises(DriftError, match="there are no prompts"):
        llm.generate([], GREEDY)
    with pytest.raises(DriftError, match="2 sampling parameters for 1 prompts"):
        llm.generate(["x"], [GREEDY, GREEDY])
    with pytest.raises(DriftError, match="a list of token ids, not float"):
        llm.generate([1.5], GREEDY)  # type: ignore[list-item]
    assert llm.generate("still here", GREEDY)[0].finished


def test_several_threads_take_turns(llm: LLM) -> None:
    expected = [output.outputs[0].text for output in llm.generate(["Return", "Raise"], GREEDY)]
    found: dict[int, str] = {}

    def ask(index: int) -> None:
        found[index] = llm.generate(("Return", "Raise")[index], GREEDY)[0].outputs[0].text

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [found[0], found[1]] == expected


def test_a_closed_llm_says_so() -> None:
    model = LLM("demo", profile="none", max_running=1, kv_memory_bytes=32 << 20)
    model.close()
    model.close()
    with pytest.raises(DriftError, match="closed"):
        model.generate("x", GREEDY)


def test_generate_prints_texts_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where the profile is kept
    out = tmp_path / "out.json"
    arguments = ["--prompt", "The import", "--prompt", "Return", "--max-tokens", "5", "--json", str(out)]
    result = CliRunner().invoke(generate, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert out.read_text().count('"finish_reason"') == 2


def test_the_package_and_its_plugin_load_without_torch() -> None:
    script = (
        "import sys, drift_core, drift_core.plugin, drift_core.cli, drift_core.engine, drift_core.link\n"
        "drift_core.plugin.drift_cli_commands()\n"
        "drift_core.plugin.drift_executors(), drift_core.plugin.drift_models()\n"
        "drift_core.SamplingParams, drift_core.EngineConfig, drift_core.LLM\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
