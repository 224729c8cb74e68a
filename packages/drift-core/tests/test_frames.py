"""Frames survive the wire however it cuts them, and nothing else gets through."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drift_core import frames
from drift_core.frames import (
    AcceptedItem,
    Cancel,
    Failed,
    FinishedItem,
    FrameError,
    FrameSplitter,
    LoadItem,
    Ready,
    Shutdown,
    Starting,
    StepFrame,
    Submit,
    TokenLogprob,
    TokensItem,
    decode_to_engine,
    encode_frame,
    pack_ids,
)
from drift_core.sampling_params import SamplingParams

TO_ENGINE = [
    Submit(
        "a#0",
        [1, 2, 3],
        SamplingParams(temperature=0.5, seed=7, stop_token_ids=[5], logit_bias={3: 1.5}, max_tokens=9),
        0.5,
        0.05,
        None,
        "chat",
        -3,
        "",
        12.25,
    ),
    Cancel("a#0"),
    Cancel("a#0", stop=True),
    Shutdown(),
]
TO_GATEWAY = [
    Starting("load weights", 0.5),
    Ready("demo", "/models/demo", 7, 4096, 2048, 4, "float32", "cpu", 2, [(1, 1), (2, 0)], "gang",
          "tightest-decode", 16, 100, 1600, 64, 2.0, 0.1, [0]),
    StepFrame(1.5),
    StepFrame(
        1.5,
        [AcceptedItem("a#0", 2)],
        [TokensItem(["a#0", "b#1"], pack_ids([4, 5]), True, {"a#0": TokenLogprob(-0.5, [(4, -0.5), (9, -2.0)])})],
        [FinishedItem("c#0", "stop", "", 1.0, 1.1, 1.2, 1.5, 10, 3)],
        (1, 1),
        "spatial",
        1,
        2,
        LoadItem(1, 2, 50),
    ),
    Failed("no model directory", usage=True),
]  # fmt: skip


def decode_to_gateway(body: bytes) -> frames.ToGateway:
    return frames.FramesOfEngine().decode(body)


def bodies(data: bytes) -> list[bytes]:
    return FrameSplitter().feed(data)


@pytest.mark.parametrize("frame", TO_ENGINE, ids=lambda frame: type(frame).__name__)
def test_frames_of_the_gateway_come_back_equal(frame: frames.ToEngine) -> None:
    (body,) = bodies(encode_frame(frame))
    assert decode_to_engine(body) == frame


@pytest.mark.parametrize("frame", TO_GATEWAY, ids=lambda frame: type(frame).__name__)
def test_frames_of_the_engine_come_back_equal(frame: frames.ToGateway) -> None:
    (body,) = bodies(encode_frame(frame))
    assert decode_to_gateway(body) == frame


@given(st.lists(st.integers(min_value=1, max_value=40), max_size=200))
def test_however_the_bytes_are_cut_the_frames_are_the_same(cuts: list[int]) -> None:
    data = b"".join(encode_frame(frame) for frame in TO_GATEWAY)
    splitter, found, position = FrameSplitter(), [], 0
    for length in [*cuts, len(data)]:
        found += splitter.feed(data[position : position + length])
        position += length
    decoder = frames.FramesOfEngine()
    assert [decoder.decode(body) for body in found] == TO_GATEWAY


def test_ids_that_are_the_same_again_are_sent_once_and_are_the_same_list() -> None:
    encoder, decoder = frames.FramesForGateway(), frames.FramesOfEngine()
    sizes: list[int] = []

    def through(*items: TokensItem) -> list[TokensItem]:
        data = encoder.encode(StepFrame(1.0, tokens=list(items)))
        sizes.append(len(data))
        (body,) = bodies(data)
        frame = decoder.decode(body)
        assert frame == StepFrame(1.0, tokens=list(items))
        assert isinstance(frame, StepFrame)
        return frame.tokens

    (one,) = through(TokensItem(["a", "b" * 100], pack_ids([1, 2])))
    first, two = through(
        TokensItem(["c"], pack_ids([9]), first=True), TokensItem(["a", "b" * 100], pack_ids([3, 4]))
    )
    assert two.ids is one.ids
    assert first.ids == ["c"]
    (logprobs,) = through(TokensItem(["a", "b" * 100], pack_ids([3, 4]), False, {"a": TokenLogprob(-1.0)}))
    assert logprobs.ids is one.ids
    (more,) = through(TokensItem(["a", "b" * 100, "c"], pack_ids([5, 6, 7])))
    (again,) = through(TokensItem(["a", "b" * 100, "c"], pack_ids([8, 9, 10])))
    assert again.ids is more.ids
    through()
    through(
        TokensItem(["d"], pack_ids([11])),
        TokensItem(["e"], pack_ids([12])),
        TokensItem(["e"], pack_ids([13])),
    )
    assert [size > 100 for size in sizes] == [True, False, False, True, False, False, False]


def test_ids_of_a_frame_that_was_not_sent_are_sent_with_the_next() -> None:
    encoder = frames.FramesForGateway()
    huge = FinishedItem("a", "length", "x" * frames.MAX_FRAME_BYTES)
    with pytest.raises(FrameError, match="longer than"):
        encoder.encode(StepFrame(1.0, tokens=[TokensItem(["a"], pack_ids([1]))], finished=[huge]))
    (body,) = bodies(encoder.encode(StepFrame(1.0, tokens=[TokensItem(["a"], pack_ids([1]))])))
    assert decode_to_gateway(body) == StepFrame(1.0, tokens=[TokensItem(["a"], pack_ids([1]))])


def test_ids_that_are_no_texts_are_refused() -> None:
    (body,) = bodies(encode_frame(StepFrame(1.0, tokens=[TokensItem(["a"], pack_ids([1]))])))
    with pytest.raises(FrameError, match="not a frame from an engine"):
        decode_to_gateway(body.replace(b"\xa1a", b"\x07"))


def test_a_length_above_the_cap_is_refused_before_its_bytes_come() -> None:
    with pytest.raises(FrameError, match="longer than"):
        FrameSplitter().feed((frames.MAX_FRAME_BYTES + 1).to_bytes(4, "big"))


def test_a_frame_above_the_cap_is_not_sent() -> None:
    with pytest.raises(FrameError, match="longer than"):
        encode_frame(Failed("x" * frames.MAX_FRAME_BYTES))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(["no-such-frame", 1]),
        msgspec.msgpack.encode(["cancel", 7]),
        msgspec.msgpack.encode(["step", "soon"]),
        encode_frame(Shutdown())[4:-1],
    ],
)
def test_what_is_no_frame_is_refused(body: bytes) -> None:
    with pytest.raises(FrameError, match="not a frame from an engine"):
        decode_to_gateway(body)
    with pytest.raises(FrameError, match="not a frame from a gateway"):
        decode_to_engine(body)


def test_sampling_out_of_bounds_does_not_decode() -> None:
    body = msgspec.msgpack.encode(
        ["submit", "a", [1], {"temperature": 1e9}, 1.0, 0.1, None, "default", 0, "", 0.0]
    )
    with pytest.raises(FrameError, match="temperature"):
        decode_to_engine(body)
