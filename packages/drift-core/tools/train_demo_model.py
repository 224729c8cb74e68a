"""Train the embedded demo model from the documentation of the Python that runs this script.

    python packages/drift-core/tools/train_demo_model.py --steps 660 --compile --out DIR

Seeded and resumable: the batch of a step depends on the seed and the step alone, the training state is kept
in safetensors, and the same Python, torch, processor and thread count repeat the run. Needs torch,
tokenizers and safetensors. Knows nothing of Drift's runtime: it writes an ordinary Hugging Face directory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_corpus import ASSISTANT, BEGIN, END, PAD, SPECIAL_TOKENS, USER, documents
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] | trim }}{{ eos_token }}"
    "{% else %}<|user|>{{ message['content'] | trim }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROMPTS = (
    "Return a new list containing",
    "The with statement is used to",
    "str.split(sep=None, maxsplit=-1)\n\n",
    "class queue.Queue\n\nCreate a queue object with a given maximum size.",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Llama dimensions. `head_dim` is 64 because the attention kernels support it."""

    vocab: int = 3072
    hidden: int = 256
    ffn: int = 512
    layers: int = 6
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    positions: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


@dataclass(frozen=True, slots=True)
class Recipe:
    """One training run.

    The learning rate is constant for the first `1 - cooldown` of the steps and then falls linearly to zero, so a
    slow run may be resumed with another end before its cool-down: it equals one started with that end.
    Contexts are 256 tokens, and 2048 in the last `long_share` of the steps.
    """

    seed: int
    steps: int
    tokens_per_step: int = 8192
    tokens_per_microbatch: int = 2048
    cooldown: float = 0.23
    long_share: float = 0.05
    warmup: int = 60
    matrix_lr: float = 0.02
    vector_lr: float = 3e-3
    momentum: float = 0.95
    decay: float = 0.1

    @property
    def cooldown_start(self) -> int:
        """First step of the cool-down."""
        return round(self.steps * (1 - self.cooldown))

    def length(self, index: int) -> int:
        """Context length of step `index`."""
        return 256 if index < round(self.steps * (1 - self.long_share)) else 2048

    def rate(self, index: int) -> float:
        """Learning rate of step `index` as a share of the peak: warm-up, constant, linear to zero."""
        falling = (self.steps - index) / (self.steps - self.cooldown_start)
        return min(1.0, (index + 1) / self.warmup, falling)


# ---------------------------------------------------------------- model


class Layer(nn.Module):
    """Pre-norm Llama layer; parameter names are those of Hugging Face's checkpoint."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.input_layernorm = nn.Parameter(torch.ones(s.hidden))
        self.post_attention_layernorm = nn.Parameter(torch.ones(s.hidden))
        self.q_proj = nn.Parameter(_matrix(s.q_heads * s.head_dim, s.hidden))
        self.k_proj = nn.Parameter(_matrix(s.kv_heads * s.head_dim, s.hidden))
        self.v_proj = nn.Parameter(_matrix(s.kv_heads * s.head_dim, s.hidden))
        self.o_proj = nn.Parameter(torch.zeros(s.hidden, s.q_heads * s.head_dim))
        self.gate_proj = nn.Parameter(_matrix(s.ffn, s.hidden))
        self.up_proj = nn.Parameter(_matrix(s.ffn, s.hidden))
        self.down_proj = nn.Parameter(torch.zeros(s.hidden, s.ffn))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """x [batch, length, hidden] -> same; mask [length, length] is added to the scores."""
        s = self.shape
        batch, length, _ = x.shape
        h = F.rms_norm(x, (s.hidden,), self.input_layernorm.to(x.dtype), s.norm_eps)
        qkv = F.linear(h, torch.cat((self.q_proj, self.k_proj, self.v_proj)))
        qkv = qkv.view(batch, length, -1, s.head_dim).transpose(1, 2)
        q, k, v = qkv[:, : s.q_heads], qkv[:, s.q_heads : -s.kv_heads], qkv[:, -s.kv_heads :]
        a = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, mask)
        x = x + F.linear(a.transpose(1, 2).reshape(batch, length, -1), self.o_proj)
        h = F.rms_norm(x, (s.hidden,), self.post_attention_layernorm.to(x.dtype), s.norm_eps)
        gate, up = F.linear(h, torch.cat((self.gate_proj, self.up_proj))).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down_proj)


class Llama(nn.Module):
    """Decoder with tied embeddings."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.embed_tokens = nn.Parameter(torch.randn(s.vocab, s.hidden) * 0.02)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = nn.Parameter(torch.ones(s.hidden))
        self.cos, self.sin = rope_tables(s)
        self.mask = torch.full((s.positions, s.positions), -torch.inf, dtype=torch.bfloat16).triu(1)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [batch, length] -> logits [batch, length, vocab]."""
        length = ids.shape[1]
        x = F.embedding(ids, self.embed_tokens).bfloat16()
        cos, sin = self.cos[:length].bfloat16(), self.sin[:length].bfloat16()
        mask = self.mask[:length, :length]
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        x = F.rms_norm(x, (self.shape.hidden,), self.norm.to(x.dtype), self.shape.norm_eps)
        return F.linear(x, self.embed_tokens)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Causal attention of q [batch, q_heads, length, head_dim] over k, v [batch, kv_heads, length, head_dim].

    Query heads are folded into rows of their KV head: twice as fast on CPU as training through the fused kernel
    at short lengths; beyond 1024 tokens the fused kernel wins.
    """
    batch, heads, length, dim = q.shape
    group = heads // k.shape[1]
    if length > 512:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    folded = (q * dim**-0.5).reshape(batch, -1, group * length, dim)
    scores = (folded @ k.transpose(-1, -2)).view(batch, -1, group, length, length) + mask
    weights = torch.softmax(scores, -1).view(batch, -1, group * length, length)
    return (weights @ v).view(batch, heads, length, dim)


def rope_tables(s: Shape) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, head_dim], halves repeated as in Hugging Face's `rotate_half` layout."""
    inverse = s.rope_theta ** (-torch.arange(0, s.head_dim, 2).float() / s.head_dim)
    angle = torch.outer(torch.arange(s.positions).float(), inverse).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [batch, heads, length, head_dim]."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def _matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) / math.sqrt(columns)


# ---------------------------------------------------------------- optimiser


class Optimiser:
    """Muon (orthogonalised momentum, Jordan 2024) for the matrices, Adam for embeddings and norms."""

    def __init__(self, model: Llama, recipe: Recipe) -> None:
        self.recipe = recipe
        named = dict(model.named_parameters())
        self.vectors = {n: p for n, p in named.items() if p.ndim == 1 or n == "embed_tokens"}
        self.matrices = {n: p for n, p in named.items() if n not in self.vectors}
        self.state = {f"{n}.m": torch.zeros_like(p) for n, p in named.items()}
        self.state |= {f"{n}.v": torch.zeros_like(p) for n, p in self.vectors.items()}

    @torch.no_grad()
    def step(self, index: int) -> None:
        """Apply the gradients of step `index` (from 0) and clear them."""
        r, scale = self.recipe, self.recipe.rate(index)
        for name, p in self.matrices.items():
            assert p.grad is not None
            m = self.state[f"{name}.m"].lerp_(p.grad, 1 - r.momentum)
            update = orthogonal(p.grad.lerp(m, r.momentum)) * max(1.0, p.shape[0] / p.shape[1]) ** 0.5
            p.mul_(1 - r.matrix_lr * scale * r.decay).sub_(update, alpha=r.matrix_lr * scale)
            p.grad = None
        for name, p in self.vectors.items():
            assert p.grad is not None
            m = self.state[f"{name}.m"].lerp_(p.grad, 0.1)
            v = self.state[f"{name}.v"].lerp_(p.grad.square(), 0.05)
            step = (m / (1 - 0.9 ** (index + 1))) / ((v / (1 - 0.95 ** (index + 1))).sqrt() + 1e-10)
            p.mul_(1 - r.vector_lr * scale * (r.decay if p.ndim == 2 else 0.0))
            p.sub_(step, alpha=r.vector_lr * scale)
            p.grad = None


def orthogonal(g: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix of g by five quintic Newton-Schulz iterations."""
    x: Tensor = g.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


# ---------------------------------------------------------------- data


def train_tokenizer(texts: Iterator[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with all 256 byte symbols, so that every text round-trips; encoding adds `<|begin|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, begin)]
    )
    return tokenizer


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token streams: training documents (joined anew each epoch), and one held-out stream."""

    train: list[Tensor]
    held_out: Tensor

    def epochs(self, seed: int, tokens: int) -> Tensor:
        """At least `tokens` training tokens; every epoch is a fresh permutation of the documents."""
        rng = torch.Generator().manual_seed(seed)
        per_epoch = sum(len(d) for d in self.train)
        streams = [
            torch.cat([self.train[i] for i in torch.randperm(len(self.train), generator=rng).tolist()])
            for _ in range(math.ceil(tokens / per_epoch))
        ]
        return torch.cat(streams)


def make_corpus(seed: int, tokenizer: Tokenizer) -> Corpus:
    """Tokenize every document; the documents carry their own begin and end marks."""
    docs = documents(seed)
    encoded = tokenizer.encode_batch_fast([d.text for d in docs], add_special_tokens=False)
    ids = [torch.tensor(e.ids, dtype=torch.int16) for e in encoded]
    train = [i for i, d in zip(ids, docs, strict=True) if not d.held_out]
    held_out = torch.cat([i for i, d in zip(ids, docs, strict=True) if d.held_out])
    return Corpus(train, held_out)


# ---------------------------------------------------------------- running


def train(args: argparse.Namespace) -> None:
    """Train or resume, then export."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    shape, recipe = Shape(), Recipe(seed=args.seed, steps=args.steps)
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = get_tokenizer(args.work / "tokenizer.json", args.seed, shape.vocab)
    corpus = make_corpus(args.seed, tokenizer)
    stream = corpus.epochs(args.seed, recipe.steps * recipe.tokens_per_step + 1)
    per_epoch = sum(len(d) for d in corpus.train)
    print(f"{per_epoch} tokens an epoch, {len(stream) / per_epoch:.0f} epochs prepared", flush=True)
    model = Llama(shape)
    optimiser = Optimiser(model, recipe)
    state_file = args.work / "state.safetensors"
    first = load_state(state_file, model, optimiser, recipe) if state_file.exists() else 0
    forward = torch.compile(model, dynamic=False) if args.compile else model
    began = saved = time.monotonic()
    for index in range(first, recipe.steps):
        chosen = (
            forward if recipe.length(index) == 256 else model
        )  # the last stage is too short to compile for
        loss = train_step(chosen, optimiser, stream, recipe, index)
        if index % 25 == 0:
            rate = (index - first + 1) / (time.monotonic() - began)
            left = (recipe.steps - index) / rate / 60
            print(f"step {index} loss {loss:.4f} {rate:.3f} steps/s {left:.1f} min left", flush=True)
        if time.monotonic() - saved > args.save_every or args.stop_after == index + 1:
            save_state(state_file, model, optimiser, recipe, index + 1)
            saved = time.monotonic()
            print(f"step {index} held-out loss {held_out_loss(model, corpus.held_out):.4f}", flush=True)
        if args.stop_after == index + 1:
            break
    done = min(recipe.steps, args.stop_after or recipe.steps)
    loss = held_out_loss(model, corpus.held_out)
    export(args.out, model, tokenizer, {"recipe": asdict(recipe), "steps_done": done, "held_out_loss": loss})
    print(f"wrote {args.out}: held-out loss {loss:.4f} after {done} steps", flush=True)


def train_step(
    forward: Callable[[Tensor], Tensor], optimiser: Optimiser, stream: Tensor, r: Recipe, index: int
) -> float:
    """One optimiser step on the `index`-th run of the token stream; returns its mean loss."""
    length = r.length(index)
    start = index * r.tokens_per_step
    run = stream[start : start + r.tokens_per_step + 1].long()
    inputs, targets = run[:-1].view(-1, length), run[1:].view(-1, length)
    rows = max(1, r.tokens_per_microbatch // length)
    total = 0.0
    for i in range(0, len(inputs), rows):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = forward(inputs[i : i + rows])
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets[i : i + rows].flatten())
        torch.autograd.backward(loss * (rows / len(inputs)))
        total += loss.item() * rows / len(inputs)
    optimiser.step(index)
    return total


@torch.no_grad()
def held_out_loss(model: Llama, stream: Tensor, length: int = 512) -> float:
    """Mean cross-entropy (nats a token) over whole windows of the held-out stream."""
    windows = (len(stream) - 1) // length
    inputs = stream[: windows * length].long().view(windows, length)
    targets = stream[1 : windows * length + 1].long().view(windows, length)
    total = 0.0
    for i in range(0, windows, 8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(inputs[i : i + 8])
        total += F.cross_entropy(
            logits.float().flatten(0, 1), targets[i : i + 8].flatten(), reduction="sum"
        ).item()
    return total / (windows * length)


def get_tokenizer(path: Path, seed: int, vocab: int) -> Tokenizer:
    """The tokenizer of an earlier start of this run, or a new one."""
    if not path.exists():
        texts = (d.text for d in documents(seed) if not d.held_out)
        tokenizer = train_tokenizer(texts, vocab)
        tokenizer.save(str(path), pretty=False)
    return Tokenizer.from_file(str(path))


def save_state(path: Path, model: Llama, optimiser: Optimiser, recipe: Recipe, step: int) -> None:
    """Weights and optimiser state, replaced atomically."""
    tensors = {f"p.{n}": p.detach() for n, p in model.named_parameters()}
    tensors |= {f"s.{n}": t for n, t in optimiser.state.items()}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, {"step": str(step), "recipe": json.dumps(asdict(recipe))})
    os.replace(temporary, path)


def load_state(path: Path, model: Llama, optimiser: Optimiser, recipe: Recipe) -> int:
    """Continue from `path`; returns the next step. ValueError if it belongs to another recipe."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    step, earlier = int(metadata["step"]), Recipe(**json.loads(metadata["recipe"]))
    ends = {name: getattr(recipe, name) for name in ("steps", "cooldown", "long_share")}
    same = replace(earlier, **ends) == recipe
    if not same or (earlier != recipe and step > min(earlier.cooldown_start, recipe.cooldown_start)):
        raise ValueError(f"{path} was written at step {step} of {earlier}; choose another --work")
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"p.{name}"])
        for name, tensor in optimiser.state.items():
            tensor.copy_(tensors[f"s.{name}"])
    return step


# ---------------------------------------------------------------- export


def export(out: Path, model: Llama, tokenizer: Tokenizer, training: dict[str, object]) -> None:
    """Write the Hugging Face directory; every file is replaced atomically."""
    out.mkdir(parents=True, exist_ok=True)
    ids = {token: index for index, token in enumerate(SPECIAL_TOKENS)}  # the trainer numbers them first
    training = training | {"python": platform.python_version(), "torch": torch.__version__}
    weights = {hugging_face_name(n): p.detach().bfloat16().contiguous() for n, p in model.named_parameters()}
    temporary = out / "model.safetensors.tmp"
    save_file(weights, temporary, {"format": "pt"})
    os.replace(temporary, out / "model.safetensors")
    write(out / "tokenizer.json", tokenizer.to_str(pretty=False))
    write_json(out / "config.json", config(model.shape, ids))
    write_json(out / "generation_config.json", token_ids(ids))
    write_json(out / "tokenizer_config.json", tokenizer_config(model.shape))
    write_json(out / "training.json", training)


def hugging_face_name(name: str) -> str:
    """`layers.0.q_proj` -> `model.layers.0.self_attn.q_proj.weight`."""
    parts = name.split(".")
    leaf = parts[-1]
    if leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
        parts[-1] = f"self_attn.{leaf}"
    elif leaf in ("gate_proj", "up_proj", "down_proj"):
        parts[-1] = f"mlp.{leaf}"
    return f"model.{'.'.join(parts)}.weight"


def config(s: Shape, ids: dict[str, int]) -> dict[str, object]:
    """config.json of a `LlamaForCausalLM`."""
    return token_ids(ids) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "intermediate_size": s.ffn,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.q_heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "max_position_embeddings": s.positions,
        "rope_theta": s.rope_theta,
        "rms_norm_eps": s.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def token_ids(ids: dict[str, int]) -> dict[str, object]:
    """The entries that config.json and generation_config.json share."""
    return {"bos_token_id": ids[BEGIN], "eos_token_id": ids[END], "pad_token_id": ids[PAD]}


def tokenizer_config(s: Shape) -> dict[str, object]:
    """tokenizer_config.json with the chat template."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": s.positions,
        "chat_template": CHAT_TEMPLATE,
    }


def write_json(path: Path, content: dict[str, object]) -> None:
    """Indented JSON, atomically."""
    write(path, json.dumps(content, indent=2) + "\n")


def write(path: Path, text: str) -> None:
    """Text, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    """Read the flags and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, required=True, help="length of the schedule")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="torch.compile (1.3x; needs a C++ compiler)")
    parser.add_argument("--work", type=Path, default=Path("build/demo-model"), help="training state")
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--save-every", type=float, default=180.0, help="seconds between saved states")
    parser.add_argument("--stop-after", type=int, help="stop and export after this step of the schedule")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
