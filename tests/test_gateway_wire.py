"""Messages put together from tables are those that the generated class makes, byte for byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from drift_gateway.v1 import generation_pb2 as pb
from drift_gateway.wire import serialized, token_delta, varint

EDGES = [0, 1, 127, 128, 2**14 - 1, 2**14, 2**21 - 1, 2**21, 2**28 - 1, 2**28, 2**32 - 1]
UINT32 = st.one_of(st.sampled_from(EDGES), st.integers(0, 2**32 - 1))
UINT64 = st.one_of(UINT32, st.sampled_from([2**35, 2**42, 2**56, 2**64 - 1]), st.integers(0, 2**64 - 1))
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(UINT32, UINT64, TEXT, st.lists(UINT32, max_size=40), st.lists(UINT64, max_size=40))
def test_token_deltas_are_as_protobuf_makes_them(
    output_index: int, sequence: int, text: str, token_ids: list[int], offsets_us: list[int]
) -> None:
    delta = pb.TokenDelta(
        output_index=output_index,
        sequence=sequence,
        text=text,
        token_ids=token_ids,
        offsets_us=offsets_us,
    )
    expected = pb.GenerateResponse(token_delta=delta).SerializeToString()
    assert token_delta(output_index, sequence, text, token_ids, offsets_us) == expected


def test_texts_longer_than_a_table_reaches() -> None:
    for length in EDGES[:7]:
        delta = pb.TokenDelta(text="x" * length)
        expected = pb.GenerateResponse(token_delta=delta).SerializeToString()
        assert token_delta(0, 0, "x" * length, [], []) == expected


@given(UINT64)
def test_varints_end_where_the_number_does(value: int) -> None:
    encoded = varint(value)
    assert sum((byte & 127) << (7 * place) for place, byte in enumerate(encoded)) == value
    assert [byte >> 7 for byte in encoded] == [1] * (len(encoded) - 1) + [0]
    assert len(encoded) == 1 or encoded[-1]


def test_the_fields_are_those_that_this_knows() -> None:
    """A field more has to be thought of in drift_gateway.wire."""
    names = [(field.number, field.name) for field in pb.TokenDelta.DESCRIPTOR.fields]
    assert sorted(names) == [
        (1, "output_index"),
        (2, "sequence"),
        (3, "text"),
        (4, "token_ids"),
        (5, "offsets_us"),
        (6, "logprobs"),
    ]


def test_bytes_go_over_the_wire_as_they_are() -> None:
    response = pb.GenerateResponse(token_delta=pb.TokenDelta(text="a"))
    assert serialized(response) == serialized(response.SerializeToString()) == token_delta(0, 0, "a", [], [])
