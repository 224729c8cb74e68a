"""Where a key of a TOML text stands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drift_scheduler.toml_lines import Source, line_of

TEXT = """\
title = "x"  # the first
devices = [
  "h200",
]

[search]
seeds = [0, 1]
inner.deep = 3

[[workloads]]
name = "sharegpt"

[[workloads]] # another
"name" = "loogle"
ttft = 1.0
"""


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("title", 1),
        ("devices[0]", 2),
        ("search.seeds", 7),
        ("search.seeds[1]", 7),
        ("search.inner.deep", 8),
        ("search.missing", 6),
        ("workloads", 10),
        ("workloads[0].name", 11),
        ("workloads[1].name", 14),
        ("workloads[1].ttft", 15),
        ("workloads[1].tbt[3]", 13),
        ("workloads[7].name", 10),
        ("nothing", None),
        ("", None),
    ],
)
def test_a_key_is_found_or_what_holds_it(key: str, line: int | None) -> None:
    assert line_of(TEXT, key) == line


def test_a_place_names_the_line_where_it_is_known() -> None:
    source = Source("f.toml", TEXT)
    assert source.at("title") == "f.toml:1"
    assert source.at("models") == "f.toml"
    assert source.of("workloads[1]", "Object contains unknown field `ttft`") == "f.toml:15"
    assert Source("f.toml").at("title") == "f.toml"


@given(st.text(max_size=80), st.text(max_size=20))
def test_any_text_and_any_key_is_an_answer(text: str, key: str) -> None:
    line = line_of(text, key)
    assert line is None or 1 <= line <= len(text.splitlines())


@pytest.mark.parametrize("key", [".", "[", "]", "a.]", "[]].", "..", "workloads[1", "a" * 100_000 + ".b"])
def test_a_key_of_any_shape_comes_to_an_end(key: str) -> None:
    assert line_of("b = 1\n", key) is None
