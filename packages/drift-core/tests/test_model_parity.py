"""The decoder against transformers: the same random weights, the same logits, however the work is cut up."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from drift_core.model.config import Rope, load_config, model_directory
from drift_core.model.decoder import Decoder, KvCache
from drift_core.model.weights import load_weights
from drift_kernels.ops import Ops, ReferenceOps, select_ops

TOLERANCE = 1e-4  # fp32, absolute, on logits with a deviation of 1 to 5
VOCAB = 320
PAGE_TOKENS = 4
LENGTHS = (53, 1, 30, 17)  # of the prompts; page multiples and not
NUM_PAGES = 256

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "attn_implementation": "eager",
    "eos_token_id": None,
    "bos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def hf_config(kind: str, **changes: Any) -> transformers.PreTrainedConfig:
    config: transformers.PreTrainedConfig = transformers.AutoConfig.for_model(kind, **(COMMON | changes))
    return config


VARIANTS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: hf_config("llama", tie_word_embeddings=False),
    "llama-llama3-tied": lambda: hf_config("llama", rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-linear-biases": lambda: hf_config(
        "llama",
        rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
        attention_bias=True,
        mlp_bias=True,
        num_key_value_heads=4,
    ),
    "mistral-window": lambda: hf_config("mistral", sliding_window=16, head_dim=64, num_hidden_layers=4),
    "qwen2": lambda: hf_config("qwen2", tie_word_embeddings=True, num_key_value_heads=1),
    "qwen2-some-windows": lambda: hf_config(
        "qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen3": lambda: hf_config("qwen3", hidden_size=96, head_dim=64, num_hidden_layers=4),
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Every parameter random, norms and biases too: the initial ones and zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed_tokens" in name:  # small beside the layers' output, or a tied head repeats its input
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)


@dataclass(frozen=True)
class Model:
    """One variant: its directory, transformers' logits for each prompt, and our decoder."""

    directory: Path
    hf: Any
    decoder: Decoder
    prompts: list[Tensor]
    expected: list[Tensor]


def hf_logits(hf: Any, prompt: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = hf(prompt[None]).logits[0].float()
    return logits


def make_model(kind: str, directory: Path) -> Model:
    config = VARIANTS[kind]()
    hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(hf, seed=100)
    # A few shards for one variant of each way to tie the head, one file for the others.
    hf.save_pretrained(directory, max_shard_size="200KB" if kind in {"llama", "qwen2"} else "1GB")
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(VOCAB, (n,), generator=generator) for n in LENGTHS]
    decoder = our_decoder(directory, torch.float32)
    return Model(directory, hf, decoder, prompts, [hf_logits(hf, p) for p in prompts])


def our_decoder(directory: Path, dtype: torch.dtype, ops: Ops | None = None) -> Decoder:
    config = load_config(directory)
    weights = load_weights(directory, config, dtype)
    return Decoder(config, weights, ops or select_ops("cpu", dtype))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(VARIANTS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


@dataclass(frozen=True)
class Part:
    """Positions [start, stop) of one sequence, as a row range of a batch."""

    sequence: int
    start: int
    stop: int


class Paged:
    """Sequences in a paged cache whose pages are handed out shuffled and hold rubbish at first."""

    def __init__(self, decoder: Decoder, sequences: list[Tensor], page_tokens: int = PAGE_TOKENS) -> None:
        self.decoder, self.sequences, self.page_tokens = decoder, sequences, page_tokens
        dtype = decoder.weights.dtype
        self.kv = KvCache.allocate(decoder.config, NUM_PAGES, page_tokens, dtype)
        for cache in self.kv.k + self.kv.v:
            cache.fill_(1e4)
        self.free = list(range(NUM_PAGES))
        random.Random(3).shuffle(self.free)
        self.tables: list[list[int]] = [[] for _ in sequences]

    def inputs(self, parts: list[Part]) -> Any:
        for part in parts:
            table = self.tables[part.sequence]
            while len(table) * self.page_tokens < part.stop:
                table.append(self.free.pop())
        return self.decoder.inputs(
            [p.stop - p.start for p in parts],
            [p.stop for p in parts],
            [self.tables[p.sequence] for p in parts],
            self.page_tokens,
        )

    def embed(self, parts: list[Part]) -> Tensor:
        return self.decoder.embed(torch.cat([self.sequences[p.sequence][p.start : p.stop] for p in parts]))

    def run(self, parts: list[Part], cuts: tuple[int, ...] = ()) -> list[Tensor]:
        """Logits of every row, by part; layers run in slices that end at `cuts`."""
        inputs, hidden = self.inputs(parts), self.embed(parts)
        bounds = (0, *cuts, self.decoder.config.num_layers)
        for start, stop in pairwise(bounds):
            hidden = self.decoder.run_layers(hidden, start, stop, self.kv, inputs)
        return self.rows(parts, hidden)

    def rows(self, parts: list[Part], hidden: Tensor) -> list[Tensor]:
        return list(self.decoder.logits(hidden).split([p.stop - p.start for p in parts]))


def whole(prompts: list[Tensor], *chosen: int) -> list[Part]:
    return [Part(i, 0, len(prompts[i])) for i in (chosen or range(len(prompts)))]


def assert_close(ours: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == torch.float32
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max().item() <= tolerance


def test_logits_are_spread_enough_for_the_tolerance_to_mean_something(model: Model) -> None:
    deviation = model.expected[0].std().item()
    assert 0.5 < deviation < 10
    # The last position depends on far ones, unless windows cut them off.
    other = model.prompts[0].clone()
    other[0] = (other[0] + 1) % VOCAB
    reach = (hf_logits(model.hf, other)[-1] - model.expected[0][-1]).abs().max()
    assert reach > 100 * TOLERANCE


@pytest.mark.parametrize("page_tokens", [1, 4, 16])
def test_whole_prefill_one_by_one_and_together(model: Model, page_tokens: int) -> None:
    together = Paged(model.decoder, model.prompts, page_tokens)
    assert_close(together.run(whole(model.prompts)), model.expected)
    alone = Paged(model.decoder, model.prompts, page_tokens)
    assert_close([alone.run([part])[0] for part in whole(model.prompts)], model.expected)


def test_whole_prefill_with_the_reference_ops(model: Model) -> None:
    decoder = Decoder(model.decoder.config, model.decoder.weights, ReferenceOps())
    assert_close(Paged(decoder, model.prompts).run(whole(model.prompts)), model.expected)


def test_decode_token_by_token(model: Model) -> None:
    paged = Paged(model.decoder, model.prompts)
    prefix = 5
    rows = [paged.run([Part(0, 0, prefix)])[0]]
    rows += [paged.run([Part(0, t, t + 1)])[0] for t in range(prefix, LENGTHS[0])]
    assert_close([torch.cat(rows)], [model.expected[0]])


def test_layer_sliced_prefill_at_every_cut(model: Model) -> None:
    layers = model.decoder.config.num_layers
    cuts = [(cut,) for cut in range(layers + 1)] + [tuple(range(1, layers))]
    for cut in cuts:
        paged = Paged(model.decoder, model.prompts)
        assert_close(paged.run(whole(model.prompts), cut), model.expected)


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 16, 29])
def test_token_chunked_prefill(model: Model, chunk: int) -> None:
    paged = Paged(model.decoder, model.prompts)
    ours: list[list[Tensor]] = [[] for _ in LENGTHS]
    for start in range(0, max(LENGTHS), chunk):
        parts = [Part(i, start, min(n, start + chunk)) for i, n in enumerate(LENGTHS) if start < n]
        for part, rows in zip(parts, paged.run(parts, cuts=(1,)), strict=True):
            ours[part.sequence].append(rows)
    assert_close([torch.cat(rows) for rows in ours], model.expected)


def test_mixed_batch_of_decode_rows_chunks_and_whole_prompts(model: Model) -> None:
    paged = Paged(model.decoder, model.prompts)
    paged.run([Part(0, 0, 52), Part(2, 0, 10), Part(3, 0, 6)])
    mixed = [Part(2, 10, 23), Part(0, 52, 53), Part(1, 0, 1), Part(3, 6, 7)]
    for cuts in ((), (1,), (1, 2)):
        ours = paged.run(mixed, cuts)
        assert_close(ours, [model.expected[p.sequence][p.start : p.stop] for p in mixed])


def test_decode_steps_between_the_layer_blocks_of_a_prefill(model: Model) -> None:
    """What multiplexing does: a prefill batch half-way through its layers while others decode."""
    paged = Paged(model.decoder, model.prompts)
    paged.run([Part(2, 0, 20), Part(3, 0, 9)])
    prefill = whole(model.prompts, 0, 1)
    inputs, hidden = paged.inputs(prefill), paged.embed(prefill)
    for layer in range(model.decoder.config.num_layers):
        decode = [Part(2, 20 + layer, 21 + layer), Part(3, 9 + layer, 10 + layer)]
        hidden = model.decoder.run_layers(hidden, layer, layer + 1, paged.kv, inputs)
        ours = paged.run(decode)
        assert_close(ours, [model.expected[p.sequence][p.start : p.stop] for p in decode])
    assert_close(paged.rows(prefill, hidden), model.expected[:2])


@pytest.mark.parametrize("shared_pages", [1, 6])
def test_prefix_hit(model: Model, shared_pages: int) -> None:
    """A second request starts with another's pages and computes only what follows them."""
    shared = shared_pages * PAGE_TOKENS
    second = torch.cat((model.prompts[0][:shared], model.prompts[2]))
    paged = Paged(model.decoder, [model.prompts[0], second])
    paged.run([Part(0, 0, LENGTHS[0])])
    paged.tables[1] = paged.tables[0][:shared_pages]
    suffix, decode = Part(1, shared, len(second)), Part(0, LENGTHS[0] - 1, LENGTHS[0])
    ours = paged.run([suffix, decode], cuts=(2,))
    assert_close(ours, [hf_logits(model.hf, second)[shared:], model.expected[0][-1:]])


def greedy_outputs(model: Model, new: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Prompts and what transformers makes of them; left out where a near tie makes the choice arbitrary, or the
    output repeats one token and would prove nothing."""
    generator = torch.Generator().manual_seed(11)
    for length in (1, 17, 30, 6, 23, 11, 2, 8):
        prompt = torch.randint(VOCAB, (length,), generator=generator)
        output = model.hf.generate(prompt[None], max_new_tokens=new, do_sample=False, pad_token_id=0)[0]
        best = hf_logits(model.hf, output)[length - 1 : -1].topk(2).values
        if (best[:, 0] - best[:, 1]).min() > 2 * TOLERANCE and len(set(output[-new:].tolist())) > 10:
            yield prompt, output


def test_greedy_output_for_128_tokens(model: Model) -> None:
    new = 128
    prompts, expected = zip(*islice(greedy_outputs(model, new), 3), strict=True)
    assert len(prompts) == 3
    paged = Paged(model.decoder, list(prompts))
    rows = paged.run(whole(paged.sequences))
    for _ in range(new):
        tokens = [r[-1:].argmax(-1) for r in rows]
        paged.sequences = [torch.cat(pair) for pair in zip(paged.sequences, tokens, strict=True)]
        rows = paged.run([Part(i, len(s) - 1, len(s)) for i, s in enumerate(paged.sequences)])
    for ours, theirs in zip(paged.sequences, expected, strict=True):
        assert len(theirs) >= new
        assert ours.tolist() == theirs.tolist()


def test_two_threads_run_one_decoder_at_once(model: Model) -> None:
    paged = Paged(model.decoder, model.prompts)
    paged.run([Part(3, 0, 1)])
    failures: list[BaseException] = []
    start = threading.Barrier(2)
    prefill = whole(model.prompts, 0, 2)
    prefill_inputs = paged.inputs(prefill)
    decode_inputs = [paged.inputs([Part(3, t, t + 1)]) for t in range(1, LENGTHS[3])]

    def prefill_lane() -> None:
        start.wait(60)
        for _ in range(3):
            hidden = paged.embed(prefill)
            for layer in range(model.decoder.config.num_layers):
                hidden = model.decoder.run_layers(hidden, layer, layer + 1, paged.kv, prefill_inputs)
            assert_close(paged.rows(prefill, hidden), [model.expected[0], model.expected[2]])

    def decode_lane() -> None:
        start.wait(60)
        for t, inputs in enumerate(decode_inputs, start=1):
            hidden = paged.embed([Part(3, t, t + 1)])
            hidden = model.decoder.run_layers(hidden, 0, model.decoder.config.num_layers, paged.kv, inputs)
            assert_close([model.decoder.logits(hidden)], [model.expected[3][t : t + 1]])

    def guarded(lane: Callable[[], None]) -> None:
        try:
            lane()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(lane,)) for lane in (prefill_lane, decode_lane)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures, failures


# ---------------------------------------------------------------- bf16 and fp16

# Relative error of the worst prompt against fp32 arithmetic on the same rounded weights. Measured with seven
# variants: bf16 0.019 to 0.029, fp16 0.0023 to 0.0037 (transformers' own error over a whole prompt set is 4 to
# 20% larger than ours); the planted mistakes give 0.14 to 1.0. A single decode row is up to 0.044 and 0.0049.
HALF_TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.006}


def relative(ours: list[Tensor], truth: list[Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, truth, strict=True))


def rounded_truth(model: Model, dtype: torch.dtype) -> list[Tensor]:
    rounded = transformers.AutoModelForCausalLM.from_pretrained(
        model.directory, dtype=dtype, attn_implementation="eager"
    )
    return [hf_logits(rounded.float().eval(), p) for p in model.prompts]


def without(decoder: Decoder, **layer_fields: None) -> Decoder:
    """The same decoder with fields of every layer's weights dropped."""
    layers = tuple(replace(layer, **layer_fields) for layer in decoder.weights.layers)
    return Decoder(decoder.config, replace(decoder.weights, layers=layers), decoder.ops)


def with_config(decoder: Decoder, **changes: Any) -> Decoder:
    return Decoder(replace(decoder.config, **changes), decoder.weights, decoder.ops)


def mistakes(decoder: Decoder) -> dict[str, Decoder]:
    """The decoder with one mistake each, of those its architecture can make."""
    config, first = decoder.config, decoder.weights.layers[0]
    made = {"other rope base": with_config(decoder, rope=replace(config.rope, theta=2 * config.rope.theta))}
    if config.rope.kind != "default":
        made["no rope scaling"] = with_config(decoder, rope=Rope(config.rope.theta))
    if any(config.layer_windows):
        made["no window"] = with_config(decoder, layer_windows=(None,) * config.num_layers)
        wider = tuple(w and w + 1 for w in config.layer_windows)
        made["window one wider"] = with_config(decoder, layer_windows=wider)
    if first.qkv_bias is not None:
        made["no qkv bias"] = without(decoder, qkv_bias=None)
    if first.q_norm is not None:
        made["no qk-norm"] = without(decoder, q_norm=None, k_norm=None)
    return made


@pytest.mark.parametrize("dtype", HALF_TOLERANCE, ids=str)
def test_half_precision(model: Model, dtype: torch.dtype) -> None:
    truth, tolerance = rounded_truth(model, dtype), HALF_TOLERANCE[dtype]
    decoder = our_decoder(model.directory, dtype)
    error = relative(Paged(decoder, model.prompts).run(whole(model.prompts), cuts=(1,)), truth)
    assert error <= tolerance
    for name, wrong in mistakes(decoder).items():
        error = relative(Paged(wrong, model.prompts).run(whole(model.prompts)), truth)
        assert error > tolerance, name


@pytest.mark.parametrize("dtype", HALF_TOLERANCE, ids=str)
def test_half_precision_decode_and_a_wrong_page(model: Model, dtype: torch.dtype) -> None:
    """One page of the context exchanged for another's is beyond the tolerance; the right pages are within."""
    last = [truth[-1:] for truth in rounded_truth(model, dtype)[:1]]
    decoder = our_decoder(model.directory, dtype)
    paged = Paged(decoder, model.prompts)
    paged.run([Part(0, 0, 52), Part(2, 0, LENGTHS[2])])
    step = [Part(0, 52, 53)]
    assert relative(paged.run(step), last) <= 2 * HALF_TOLERANCE[dtype]  # one row varies more than a prompt
    paged.tables[0][-2] = paged.tables[2][0]
    assert relative(paged.run(step), last) > 2 * HALF_TOLERANCE[dtype]


def test_planted_mistakes_exceed_the_fp32_tolerance(model: Model) -> None:
    for name, wrong in mistakes(model.decoder).items():
        ours = Paged(wrong, model.prompts).run(whole(model.prompts))
        errors = [(a - b).abs().max().item() for a, b in zip(ours, model.expected, strict=True)]
        assert max(errors) > 100 * TOLERANCE, name


# ---------------------------------------------------------------- checkpoints from elsewhere


def test_the_embedded_model_agrees_with_transformers() -> None:
    directory = model_directory("demo")
    if not (directory / "model.safetensors").is_file():
        pytest.skip("the embedded model is not there: it is made by tools/train_demo_model.py")
    decoder = our_decoder(directory, torch.float32)
    hf = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(decoder.config.vocab_size, (n,), generator=generator) for n in LENGTHS]
    paged = Paged(decoder, prompts, page_tokens=16)
    assert_close(paged.run(whole(prompts), cuts=(2,)), [hf_logits(hf, p) for p in prompts])
