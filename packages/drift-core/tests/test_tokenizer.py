from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import drift_core
from drift_core.chat_template import ChatTemplateError
from drift_core.tokenizer import IncrementalDetokenizer, Tokenizer, TokenizerError

DEMO = Path(drift_core.__file__).parent / "demo_model"
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["hello world, hello there"] * 5, trainer)
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(4)
    backend.enable_padding(length=32)
    backend.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def directory(saved, tmp_path) -> Path:
    (tmp_path / "tokenizer.json").write_bytes((saved / "tokenizer.json").read_bytes())
    return tmp_path


def configure(directory: Path, **config) -> Tokenizer:
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(directory)


def test_text_goes_there_and_back(directory):
    tokenizer = Tokenizer.load(directory)
    text = "hello there, wörld 🌍 " * 20
    ids = tokenizer.encode(text)
    assert ids[0] == 0, "the model's first token"
    assert len(ids) > 32, "neither truncated nor padded, whatever the file says"
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>" + text
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.byte_level


def test_the_first_token_is_not_doubled(directory):
    tokenizer = configure(directory, bos_token={"content": "<s>", "lstrip": False}, chat_template=TEMPLATE)
    messages = [{"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(messages)
    assert text == "<s><user>hello"
    assert tokenizer.encode(text).count(0) == 1
    assert tokenizer.encode(text) == tokenizer.encode_chat(messages)
    assert tokenizer.encode("hello").count(0) == 1


def test_end_tokens_come_from_both_configs(directory):
    assert Tokenizer.load(directory).eos_token_ids == ()
    assert configure(directory, eos_token="</s>").eos_token_ids == (1,)
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    assert Tokenizer.load(directory).eos_token_ids == (2, 1)
    (directory / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert Tokenizer.load(directory).eos_token_ids == (2, 1)
    assert configure(directory, eos_token=None).eos_token_ids == (2,)


def test_templates_are_found_where_models_keep_them(directory):
    messages = [{"role": "user", "content": "hi"}]
    plain = Tokenizer.load(directory)
    assert not plain.has_chat_template
    with pytest.raises(ChatTemplateError, match="has no chat template; send text"):
        plain.apply_chat_template(messages)
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert configure(directory, chat_template=named).apply_chat_template(messages) == "yes"
    (directory / "chat_template.jinja").write_text("from the file: {{ messages[0].content }}")
    assert Tokenizer.load(directory).apply_chat_template(messages) == "from the file: hi"
    assert Tokenizer.load(directory).has_chat_template


def test_what_is_missing_or_corrupt_gets_one_clear_line(directory, tmp_path):
    def fault(match):
        with pytest.raises(TokenizerError, match=match) as caught:
            Tokenizer.load(directory)
        assert "\n" not in str(caught.value)
        assert str(directory) in str(caught.value)

    with pytest.raises(TokenizerError, match=r"no model directory '.*nowhere'"):
        Tokenizer.load(tmp_path / "nowhere")
    (directory / "tokenizer_config.json").write_text("{")
    fault(r"tokenizer_config\.json' is not JSON")
    (directory / "tokenizer_config.json").write_text("[1]")
    fault("holds a list, not an object")
    (directory / "tokenizer_config.json").write_bytes(b"\xff\xfe")
    fault("is not UTF-8 text")
    (directory / "tokenizer.json").write_text('{"model": 3}')
    fault(r"tokenizer\.json' is not a tokenizer")
    (directory / "tokenizer.json").unlink()
    fault(r"no tokenizer\.json in")
    (directory / "tokenizer.model").write_text("")
    fault(r"it has tokenizer\.model; convert it to a fast tokenizer")


def test_a_template_that_does_not_parse_is_an_error(directory):
    with pytest.raises(ChatTemplateError, match="does not parse"):
        configure(directory, chat_template="{% for %}")


def test_lone_surrogates_are_an_error(directory):
    with pytest.raises(TokenizerError, match="cannot be encoded"):
        Tokenizer.load(directory).encode("a\ud800b")


@pytest.mark.parametrize("what", ["encode", "decode"])
def test_other_threads_go_on_while_a_long_text_is_worked_on(directory, what):
    tokenizer = Tokenizer.load(directory)
    text = "hello there, world " * 30_000
    ids = tokenizer.encode(text)

    def work(done: threading.Event) -> None:
        if what == "encode":
            assert tokenizer.encode(text) == ids
        else:
            assert tokenizer.decode(ids) == text
        done.set()

    def longest_wait() -> float:
        """Of this thread, as a part of the time that the other one works."""
        done, looks = threading.Event(), [time.perf_counter()]
        thread = threading.Thread(target=work, args=(done,))
        thread.start()
        while not done.wait(0.001):
            looks.append(time.perf_counter())
        looks.append(time.perf_counter())
        thread.join()
        return max(after - before for before, after in pairwise(looks)) / (looks[-1] - looks[0])

    # More than once: a machine that is busy may hold a thread up for as long.
    assert min(longest_wait() for _ in range(4)) < 0.6, "it would be all of the time"


def test_unknown_ids_have_no_text(directory):
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.decode([10**6]) == ""
    assert tokenizer.token_bytes(10**6) == b""


def test_other_decoders_are_not_taken_for_byte_level_ones(directory):
    config = json.loads((directory / "tokenizer.json").read_text())
    for decoder, byte_level in (
        ({"type": "Sequence", "decoders": [config["decoder"]]}, True),
        ({"type": "Sequence", "decoders": [config["decoder"], {"type": "Fuse"}]}, False),
        ({"type": "Fuse"}, False),
        (None, False),
    ):
        (directory / "tokenizer.json").write_text(json.dumps({**config, "decoder": decoder}))
        assert Tokenizer.load(directory).byte_level is byte_level


def test_it_needs_no_torch():
    code = "import sys, drift_core.tokenizer, drift_core.sampling_params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


@pytest.mark.skipif(not (DEMO / "tokenizer.json").is_file(), reason="the demo model is not there")
def test_the_demo_model():
    tokenizer = Tokenizer.load(DEMO)
    assert tokenizer.eos_token_ids
    assert tokenizer.has_chat_template
    ids = tokenizer.encode_chat([{"role": "user", "content": "What is a tuple? 🐍"}])
    assert ids == tokenizer.encode(
        tokenizer.apply_chat_template([{"role": "user", "content": "What is a tuple? 🐍"}])
    )
    assert tokenizer.decode(ids) == "What is a tuple? 🐍"
    detokenizer = IncrementalDetokenizer(tokenizer, ["tuple?"])
    assert "".join(detokenizer.push([token]) for token in ids) == "What is a "
