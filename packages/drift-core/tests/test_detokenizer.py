from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from drift_core.detokenizer import MAX_PENDING_TOKENS, IncrementalDetokenizer
from drift_core.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. Stop here. ### Stop there.",
    "naïve façade — Grüße aus Köln, 東京の天気は晴れ。🤦🏽‍♂️👩‍👩‍👧‍👦🇺🇳",
]


def byte_level() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens(["<tool> é"])  # added, not special, and no byte-level text
    return Tokenizer(backend)


def byte_fallback() -> Tokenizer:
    """A vocabulary in the manner of Llama 2: pieces with ▁ for spaces, bytes for everything else."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdeo",
        "▁a",
        "▁do",
    ]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True
        )
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend)


BYTES, FALLBACK = byte_level(), byte_fallback()
HARD = [
    "🤦🏽‍♂️",
    "👩‍👩‍👧‍👦",
    "e\u0301\u0323",
    "𝔘𝔫𝔦",
    "\u200d",
    "\ufffd",
    "\r\n",
    "\x00",
    " ",
    "東京",
    "ﷺ",
    "Z̡a͢l̴g̸o",
]
UNICODE = st.lists(st.one_of(st.text(max_size=6), st.sampled_from(HARD)), max_size=8).map("".join)
IDS = st.lists(st.integers(0, BYTES.vocab_size + 3), max_size=40)
CHUNKS = st.lists(st.integers(1, 5), min_size=40, max_size=40)


def pieces(ids, sizes):
    start = 0
    for size in sizes:
        yield ids[start : start + size]
        start += size
    yield ids[start:]


@settings(max_examples=400, deadline=None)
@given(ids=IDS, sizes=CHUNKS, skip=st.booleans())
def test_any_tokens_give_the_text_of_decoding_them_at_once(ids, sizes, skip):
    detokenizer = IncrementalDetokenizer(BYTES, skip_special_tokens=skip)
    whole, shown = BYTES.decode(ids, skip), ""
    for piece in pieces(ids, sizes):
        shown += detokenizer.push(piece)
        assert whole.startswith(shown)
    assert shown + detokenizer.finish() == whole


@settings(max_examples=300, deadline=None)
@given(text=UNICODE, tokenizer=st.sampled_from([BYTES, FALLBACK]))
def test_no_piece_ends_in_half_a_character(text, tokenizer):
    ids = tokenizer.encode(text)
    detokenizer = IncrementalDetokenizer(tokenizer)
    shown = [detokenizer.push([token]) for token in ids]
    whole = tokenizer.decode(ids)
    assert "".join(shown) + detokenizer.finish() == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in shown)


def test_a_character_appears_with_its_last_byte():
    ids = [BYTES._backend.token_to_id(c) for c in pre_tokenizers.ByteLevel().pre_tokenize_str("🤦")[0][0][1:]]
    assert len(ids) == 4
    for tokenizer, tokens in ((BYTES, ids), (FALLBACK, [3 + byte for byte in "🤦".encode()])):
        detokenizer = IncrementalDetokenizer(tokenizer)
        assert [detokenizer.push([token]) for token in tokens] == ["", "", "", "🤦"]


def test_an_invalid_byte_is_shown_once_it_is_certain_and_an_unfinished_character_at_the_end():
    lead, letter = BYTES._backend.token_to_id("Ã"), BYTES._backend.token_to_id("A")
    detokenizer = IncrementalDetokenizer(BYTES)
    assert detokenizer.push([lead]) == ""
    assert detokenizer.push([letter]) == "\ufffdA"
    assert detokenizer.push([lead]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


@settings(max_examples=300, deadline=None)
@given(prompt=UNICODE, text=UNICODE, tokenizer=st.sampled_from([BYTES, FALLBACK]), sizes=CHUNKS)
def test_what_follows_a_prompt_reads_as_it_does_behind_it(prompt, text, tokenizer, sizes):
    before, ids = tokenizer.encode(f"{prompt}a"), tokenizer.encode(text)
    detokenizer = IncrementalDetokenizer(tokenizer, prompt=before)
    shown = "".join(detokenizer.push(piece) for piece in pieces(ids, sizes)) + detokenizer.finish()
    assert tokenizer.decode(before) + shown == tokenizer.decode([*before, *ids])


def test_a_first_word_keeps_the_space_before_it():
    word, again = FALLBACK._backend.token_to_id("▁do"), FALLBACK._backend.token_to_id("▁a")
    for before, shown in (
        ([word], " do a"), ([1], "do a"), ([], "do a"), ([1, word, 2], " do a"), ([word, 3 + 0xF0], "do a")
    ):  # fmt: skip
        detokenizer = IncrementalDetokenizer(FALLBACK, prompt=before)
        assert detokenizer.push([word, again]) == shown, before


@pytest.mark.parametrize("prompt", ["東京", "a東京の天", "🤦🤦", "a🤦🤦🤦🤦"])
def test_a_first_word_keeps_its_space_behind_characters_of_several_tokens(prompt):
    detokenizer = IncrementalDetokenizer(FALLBACK, prompt=FALLBACK.encode(prompt))
    assert detokenizer.push([FALLBACK._backend.token_to_id("▁do")]) == " do"


def test_special_tokens_are_left_out_unless_wanted():
    ids = [0, *BYTES.encode("dog"), 1]
    for skip, text in ((True, "dog"), (False, "<s>dog</s>")):
        detokenizer = IncrementalDetokenizer(BYTES, skip_special_tokens=skip)
        assert detokenizer.push(ids) + detokenizer.finish() == text
    detokenizer = IncrementalDetokenizer(FALLBACK)
    ids = FALLBACK.encode("a")
    shown = "".join(detokenizer.push([token]) for token in [1, *ids, 2, FALLBACK._backend.token_to_id("▁do")])
    assert shown == "a do"


@pytest.mark.parametrize("token", [3 + 0xFF, 1], ids=["invalid bytes", "nothing but special tokens"])
def test_a_window_never_grows_without_bound(token):
    detokenizer = IncrementalDetokenizer(FALLBACK)
    shown = ""
    for _ in range(1000):
        shown += detokenizer.push([token])
        assert len(detokenizer._decoder._window) <= 2 * MAX_PENDING_TOKENS + 1
    assert shown + detokenizer.finish() == FALLBACK.decode([token] * 1000)


# ----------------------------------------------------------------------------------------- stop strings


def expected(text, stops, include):
    """The string whose last character comes first; of several, the longest."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    text=st.text("ab #é", max_size=30),
    stops=st.lists(st.text("ab #é", min_size=1, max_size=5), min_size=1, max_size=4),
    sizes=CHUNKS,
    include=st.booleans(),
)
def test_a_stop_string_ends_the_text_however_it_is_cut_into_tokens(text, stops, sizes, include):
    detokenizer = IncrementalDetokenizer(BYTES, stops, include)
    kept, stop = expected(text, stops, include)
    shown = ""
    for piece in pieces(BYTES.encode(text), sizes):
        shown += detokenizer.push(piece)
        assert kept.startswith(shown), "something was shown that belongs to a stop string"
    assert shown + detokenizer.finish() == kept
    assert detokenizer.stopped == stop


def test_what_may_begin_a_stop_string_is_held_back_no_longer_than_needed():
    detokenizer = IncrementalDetokenizer(BYTES, ["###"])
    one = {c: BYTES.encode(c) for c in "x#"}
    assert detokenizer.push(one["x"]) == "x"
    assert detokenizer.push(one["#"]) == ""
    assert detokenizer.push(one["#"]) == ""
    assert detokenizer.push(one["x"]) == "##x"
    assert detokenizer.push(one["#"]) == ""
    assert detokenizer.finish() == "#"
    assert detokenizer.stopped is None


def test_after_a_stop_nothing_follows():
    detokenizer = IncrementalDetokenizer(BYTES, ["Stop"])
    assert detokenizer.push(BYTES.encode("The fox. Stop here.")) == "The fox. "
    assert detokenizer.stopped == "Stop"
    assert detokenizer.push(BYTES.encode("dog")) == ""
    assert detokenizer.finish() == ""


def test_a_stop_string_may_come_with_the_last_flush():
    lead = BYTES._backend.token_to_id("Ã")
    detokenizer = IncrementalDetokenizer(BYTES, ["\ufffd"])
    assert detokenizer.push([*BYTES.encode("dog"), lead]) == "dog"
    assert detokenizer.finish() == ""
    assert detokenizer.stopped == "\ufffd"


def test_an_empty_stop_string_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        IncrementalDetokenizer(BYTES, [""])
