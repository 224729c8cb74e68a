"""What forms cost: `python bench/structured.py [--grow N] [--against sampler.py] [--json PATH]`.

For each form: the time to compile it, to start an output of it, and what each token costs: working out which tokens
may come next, and applying that to a row of logits. The way through a form is random. Then what a step's sampling
costs without any form, optionally beside another version of `drift_core/sampler.py` (`--against`: a file, as from
`git show COMMIT:packages/drift-core/src/drift_core/sampler.py`), in turns, so that other work hits both alike.

The vocabulary is the embedded model's of 3072 tokens; `--tokenizer` takes another `tokenizer.json`, and `--grow N`
adds made-up words until there are N tokens: the time of a mask grows with the vocabulary. Single-threaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import llguidance
import numpy as np
import torch

import drift_core
from drift_core import sampler
from drift_core.sampling_params import SamplingParams, Structured
from drift_core.structured import Vocabulary, compile_form
from drift_scheduler.errors import DriftError

DEMO = Path(drift_core.__file__).parent / "demo_model" / "tokenizer.json"
END = 2  # the embedded model's end-of-text token

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "tags", "age"],
    "additionalProperties": False,
}
MANY = {
    "type": "object",
    "properties": {f"p{n}": {"type": ["string", "integer", "null"]} for n in range(200)},
}
CLOCK = time.thread_time
"""Processor time of this thread: what else runs on the machine does not count."""

FORMS = {
    "any JSON": Structured("json_schema", "{}"),
    "an object": Structured("json_schema", json.dumps(PERSON)),
    "200 properties": Structured("json_schema", json.dumps(MANY)),
    "enum of 4000": Structured("json_schema", json.dumps({"enum": [f"value {n}" for n in range(4000)]})),
    "a date": Structured("regex", r"[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]"),
    "200 words": Structured("regex", r"([a-z]{1,12} ){200}"),
    "1024 choices": Structured("choice", tuple(f"choice number {n}" for n in range(1024))),
    "hostile: product": Structured("json_schema", json.dumps(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(6)]} for i in range(8)]}
    )),
    "hostile: 1500 optional": Structured("json_schema", json.dumps(
        {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(1500)}}
    )),
    "hostile: (a{1000}){1000}": Structured("regex", "(a{1000}){1000}"),
    "hostile: (.{1,300}x){1,300}": Structured("regex", "(.{1,300}x){1,300}"),
}  # fmt: skip


def grown(definition: str, tokens: int) -> str:
    """A tokenizer with made-up words up to `tokens`."""
    described = json.loads(definition)
    vocabulary: dict[str, int] = described["model"]["vocab"]
    draw = random.Random(0)
    parts = [token for token in vocabulary if token.isascii() and token.isalpha() and len(token) < 6]
    number = max(vocabulary.values()) + 1
    while len(vocabulary) < tokens:
        word = draw.choice(("", "Ġ")) + "".join(draw.choice(parts) for _ in range(draw.randint(1, 3)))
        if word not in vocabulary:
            vocabulary[word], number = number, number + 1
    return json.dumps(described)


def seconds(work: Callable[[], Any]) -> float:
    started = CLOCK()
    work()
    return CLOCK() - started


def measure(vocabulary: Vocabulary, structured: Structured, tokens: int) -> dict[str, Any]:
    """Milliseconds to compile; microseconds of the rest."""
    started = CLOCK()
    try:
        form = compile_form(vocabulary, structured)
    except DriftError as error:
        return {"compile_ms": (CLOCK() - started) * 1e3, "refused": str(error)}
    compile_ms = (CLOCK() - started) * 1e3
    copies = [seconds(form.matcher) for _ in range(20)]
    draw = np.random.default_rng(0)
    row = draw.normal(size=vocabulary.vocab_size).astype(np.float32)
    masks: list[float] = []
    applied: list[float] = []
    fault = None
    while len(masks) < tokens and fault is None:
        matcher = form.matcher()
        state = sampler.SamplerState(
            SamplingParams(structured=structured), [], [END], len(row), matcher=matcher
        )
        while len(masks) < tokens:
            masks.append(seconds(matcher.allowed))
            applied.append(seconds(partial(state.edited, row)))
            fault = matcher.fault
            choices = np.flatnonzero(matcher.allowed())
            if fault is not None or END in choices:
                break
            matcher.accept(int(draw.choice(choices)))
    return {
        "compile_ms": compile_ms, "start_us": statistics.median(copies) * 1e6, "tokens": len(masks),
        "mask_us": {"p50": statistics.median(masks) * 1e6, "p99": float(np.quantile(masks, 0.99)) * 1e6,
                    "max": max(masks) * 1e6},
        "apply_us": statistics.median(applied) * 1e6, "fault": fault,
    }  # fmt: skip


def other_sampler(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("other_sampler", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def free_steps(modules: dict[str, ModuleType], rows: int, vocab: int, repeats: int) -> dict[str, Any]:
    """Microseconds of sampling a step of `rows` without forms, least and median, by version and kind."""
    found: dict[str, Any] = {}
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(rows, vocab)).astype(np.float32))
    for kind, params in (
        ("greedy", SamplingParams(temperature=0.0)),
        ("drawn", SamplingParams(seed=1)),
        ("top-p 0.9", SamplingParams(seed=1, top_p=0.9)),
    ):
        states = {
            name: [module.SamplerState(params, [5], [END], vocab) for _ in range(rows)]
            for name, module in modules.items()
        }
        times: dict[str, list[float]] = {name: [] for name in modules}
        for _ in range(repeats):
            for name, module in modules.items():
                times[name].append(seconds(partial(module.sample, logits, states[name])))
        found[kind] = {
            name: {"min_us": min(each) * 1e6, "p50_us": statistics.median(each) * 1e6}
            for name, each in times.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, default=DEMO)
    parser.add_argument("--grow", type=int, default=0, metavar="N")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)

    definition = options.tokenizer.read_text(encoding="utf-8")
    if options.grow:
        definition = grown(definition, options.grow)
    started = CLOCK()
    size = llguidance.LLTokenizer(definition).vocab_size
    vocabulary = Vocabulary(definition, size, [END])
    learn = (CLOCK() - started) / 2
    print(f"llguidance {llguidance.__version__}, {size} tokens, learnt in {learn:.2f} s\n")
    print(
        f"{'form':28}{'compile ms':>11}{'start us':>10}{'mask p50':>10}{'p99':>9}{'max us':>9}{'apply us':>10}"
    )
    forms: dict[str, Any] = {}
    for name, structured in FORMS.items():
        found = forms[name] = measure(vocabulary, structured, options.tokens)
        if "refused" in found:
            print(f"{name:28}{found['compile_ms']:11.1f}  refused: {found['refused']}")
            continue
        mask = found["mask_us"]
        print(
            f"{name:28}{found['compile_ms']:11.1f}{found['start_us']:10.1f}{mask['p50']:10.1f}{mask['p99']:9.1f}"
            f"{mask['max']:9.1f}{found['apply_us']:10.1f}{'  fails on the way' if found['fault'] else ''}"
        )
    modules = {"now": sampler}
    if options.against is not None:
        modules["against"] = other_sampler(options.against)
    free = free_steps(modules, options.rows, size, options.repeats)
    print(f"\na step of {options.rows} rows without forms, us (least / median)")
    for kind, versions in free.items():
        shown = "   ".join(f"{n} {v['min_us']:.1f} / {v['p50_us']:.1f}" for n, v in versions.items())
        print(f"{kind:12}{shown}")
    if options.json is not None:
        report = {
            "schema": "drift.structured/1",
            "tokens": size,
            "learn_s": learn,
            "forms": forms,
            "free": free,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
