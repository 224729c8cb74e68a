"""The specification itself, held against torch's attention and transformers' Llama, and the shapes it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from drift_kernels import AttentionInputs, reference, select_ops


def paged(contexts: list[int], page_tokens: int, heads: int, size: int) -> tuple[Any, Any, list[list[int]]]:
    """Shuffled pages of random KV for sequences of these lengths."""
    needed = [-(-c // page_tokens) for c in contexts]
    order = torch.randperm(sum(needed) + 3).tolist()
    tables = [[order.pop() for _ in range(n)] for n in needed]
    shape = (sum(needed) + 3, page_tokens, heads, size)
    return torch.randn(shape), torch.randn(shape), tables


@pytest.mark.parametrize("window", [None, 1, 7, 64])
@pytest.mark.parametrize(("queries", "context"), [(1, 1), (1, 50), (50, 50), (13, 50), (16, 32)])
def test_attend_is_torchs_attention(queries: int, context: int, window: int | None) -> None:
    torch.manual_seed(0)
    k_pages, v_pages, tables = paged([9, context], 16, 2, 32)
    q = torch.randn(1 + queries, 6, 32)
    inputs = AttentionInputs.build([1, queries], [9, context], tables, 16, 0.2, window)
    got = reference.attend(q, k_pages, v_pages, inputs)[1:]
    k, v = (p[tables[1]].flatten(0, 1)[:context].transpose(0, 1) for p in (k_pages, v_pages))
    age = torch.arange(context - queries, context)[:, None] - torch.arange(context)
    visible = (age >= 0) & (age < (window or context + 1))
    want = F.scaled_dot_product_attention(
        q[1:].transpose(0, 1)[None], k[None], v[None], attn_mask=visible, scale=0.2, enable_gqa=True
    )
    torch.testing.assert_close(got, want[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_norm_and_rotary_are_transformers() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(5, 64).to(dtype), torch.randn(64).to(dtype)
        norm = llama.LlamaRMSNorm(64, eps=1e-5).to(dtype)
        with torch.no_grad():
            norm.weight.copy_(weight)
            assert torch.equal(reference.rms_norm(x, weight, 1e-5), norm(x))
        q, k = torch.randn(5, 6, 32).to(dtype), torch.randn(5, 2, 32).to(dtype)
        angles = torch.randn(5, 16).repeat(1, 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        want = llama.apply_rotary_pos_emb(
            q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None]
        )
        for got, theirs in zip(reference.apply_rotary(q, k, cos, sin), want, strict=True):
            assert torch.equal(got, theirs[0].transpose(0, 1))


@pytest.mark.parametrize("kind", ["lists", "arrays", "one array"])
def test_inputs_lay_out_a_mixed_batch(kind: str) -> None:
    lists = [[7, 2], [5], [9, 1, 4]]
    tables: Any = {
        "lists": lists,
        "arrays": [np.array(t) for t in lists],
        "one array": np.array([[7, 2, -1, -1], [5, -1, -1, -1], [9, 1, 4, -1]]),
    }[kind]
    inputs = AttentionInputs.build([1, 3, 2], [5, 3, 10], tables, 4, 0.5, window=3)
    assert inputs.query_starts.tolist() == [0, 1, 4, 6]
    assert inputs.context_lens.tolist() == [5, 3, 10]
    assert inputs.positions.tolist() == [4, 0, 1, 2, 8, 9]
    assert inputs.slots.tolist() == [8, 20, 21, 22, 16, 17]
    assert (inputs.max_query, inputs.max_context, inputs.window) == (3, 10, 3)
    assert inputs.page_table[2].tolist() == [9, 1, 4]
    assert [t.dtype for t in (inputs.query_starts, inputs.context_lens, inputs.page_table)] == [
        torch.int32
    ] * 3
    assert [t.dtype for t in (inputs.slots, inputs.positions)] == [torch.int64] * 2


def test_inputs_of_a_decode_batch_agree_with_the_general_layout() -> None:
    lens = [1, 16, 17, 33]
    tables = [[i * 3 + j for j in range(3)] for i in range(4)]
    decode = AttentionInputs.build([1] * 4, lens, tables, 16, 1.0)
    mixed = AttentionInputs.build([1] * 4 + [2], [*lens, 2], [*tables, [50]], 16, 1.0)
    assert decode.slots.tolist() == mixed.slots.tolist()[:4] == [0, 63, 112, 176]
    assert decode.positions.tolist() == mixed.positions.tolist()[:4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], [], 4, 1.0), "query_lens must list at least one"),
        (([0], [3], [[1]], 4, 1.0), r"query_lens\[0\] is 0"),
        (([1, 4], [9, 3], [[1] * 9, [1]], 4, 1.0), r"context_lens\[1\] is 3, less than the 4"),
        (([1], [3, 3], [[1]], 4, 1.0), "context_lens has shape"),
        (([1, 1], [3, 5], [[1], [1]], 4, 1.0), r"page_tables\[1\] has 1 pages, its context needs 2"),
        (([1], [3], [[1], [2]], 4, 1.0), "page_tables has 2 rows for 1"),
        (([1], [9], np.zeros((1, 2), np.int32), 4, 1.0), "longest context needs 3"),
        (([1], [3], [[1]], 0, 1.0), "page_tokens must be at least 1"),
        (([1], [3], [[1]], 4, 1.0, 0), "window must be None or at least 1"),
    ],
)
def test_inputs_refuse_what_does_not_fit(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionInputs.build(*arguments)


def refusals() -> list[Any]:
    f, b = torch.float32, torch.bfloat16
    kv, inputs = torch.zeros(2, 4, 2, 16), AttentionInputs.build([1], [3], [[1]], 4, 1.0)
    z = torch.zeros
    return [
        ("rms_norm", (z(2, 8), z(7), 1e-6), "weight"),
        ("rms_norm", (z(2, 8), z(8, dtype=b), 1e-6), "weight"),
        ("rms_norm", (torch.tensor(1.0), z(1), 1e-6), "x"),
        ("add_rms_norm", (z(2, 8), z(3, 8), z(8), 1e-6), "residual"),
        ("silu_and_mul", (z(2, 7),), "gate_up"),
        ("apply_rotary", (z(2, 8), z(2, 1, 8), z(2, 8), z(2, 8)), "q"),
        ("apply_rotary", (z(2, 2, 8), z(3, 1, 8), z(2, 8), z(2, 8)), "k"),
        ("apply_rotary", (z(2, 2, 8), z(2, 1, 8), z(3, 8), z(2, 8)), "cos"),
        ("apply_rotary", (z(2, 2, 8), z(2, 1, 8), z(2, 8), z(2, 4)), "sin"),
        ("write_kv", (z(1, 2, 8), z(1, 2, 16), kv, kv, z(1, dtype=torch.int64)), "k"),
        ("write_kv", (z(1, 2, 16), z(2, 2, 16), kv, kv, z(1, dtype=torch.int64)), "v"),
        ("write_kv", (z(1, 2, 16), z(1, 2, 16), kv, kv, z(1, dtype=torch.int32)), "slots"),
        ("write_kv", (z(1, 2, 16), z(1, 2, 16), kv.transpose(1, 2), kv, z(1, dtype=torch.int64)), "k_pages"),
        ("write_kv", (z(1, 2, 16), z(1, 2, 16), kv, kv.to(b), z(1, dtype=torch.int64)), "v_pages"),
        ("attend", (z(1, 3, 16), kv, kv, inputs), "q"),
        ("attend", (z(1, 4, 16, dtype=b), kv, kv, inputs), "q"),
        ("attend", (z(2, 4, 16), kv, kv, inputs), "inputs"),
        ("attend", (z(1, 4, 16), kv, kv[:1], inputs), "v_pages"),
        ("linear", (z(2, 8), z(4, 7)), "x"),
        ("linear", (z(2, 8), z(8)), "weight"),
        ("linear", (z(2, 8), z(4, 8), z(5)), "bias"),
        ("linear", (z(2, 8, dtype=f), z(4, 8, dtype=b)), "x"),
    ]


@pytest.mark.parametrize("native", [False, None])
@pytest.mark.parametrize(("name", "arguments", "culprit"), refusals())
def test_bad_shapes_name_the_argument(
    name: str, arguments: tuple[Any, ...], culprit: str, native: bool | None
) -> None:
    with pytest.raises(ValueError, match=rf"^{culprit} "):
        getattr(select_ops("cpu", torch.float32, native=native), name)(*arguments)


def test_an_unknown_dtype_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="choose float32, bfloat16 or float16"):
        select_ops("cpu", torch.int8)
