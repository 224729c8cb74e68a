"""The text behind the demo model: documentation that every Python installation carries.

Three sources, all local: the help topics of `pydoc_data.topics`, the docstrings in the standard library's `.py` files
(parsed, never imported) and the docstrings of the built-in types and a few C modules (read by reflection).
Knows nothing of tokens or tensors: it yields `Document`s in a fixed order, so one Python version gives one corpus.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import random
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

BEGIN, END, USER, ASSISTANT, PAD = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"
SPECIAL_TOKENS = (PAD, BEGIN, END, USER, ASSISTANT)

_SKIPPED_FOLDERS = {
    "__pycache__", "test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload",
    "turtledemo", "_bundled", "pydoc_data",
}  # fmt: skip
_REFLECTED_MODULES = (
    "builtins", "array", "binascii", "cmath", "_collections", "_functools", "gc", "_io", "itertools", "math",
    "_operator", "posix", "_random", "select", "_signal", "_socket", "_struct", "sys", "_thread", "time",
    "unicodedata", "_weakref", "zlib", "_datetime", "_decimal", "_csv", "_heapq", "_bisect", "_json", "_sqlite3",
    "_ast", "_codecs", "_string", "_asyncio", "_contextvars", "_queue", "_hashlib", "_ssl", "_lzma", "_bz2",
)  # fmt: skip
_QUESTIONS = (
    "What does {name} do?",
    "What is {name}?",
    "Explain {name}.",
    "Describe {name} in Python.",
    "How do I use {name}?",
    "Tell me about {name}.",
)
_TOPIC_WEIGHT = 2
_CHAT_SHARE = 0.5
_HELD_OUT_PERCENT = 3


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented object: its dotted name, `(arguments)` or "", and its cleaned docstring."""

    name: str
    signature: str
    doc: str


@dataclass(frozen=True, slots=True)
class Document:
    """Text ready for the tokenizer, and whether it is kept out of training."""

    text: str
    held_out: bool


def documents(seed: int) -> list[Document]:
    """Every document once per weight, unshuffled; whole modules and whole topics are held out, never halves."""
    rng = random.Random(seed)
    seen: set[str] = set()
    found: list[Document] = []
    for name, text in _topics():
        held_out = _is_held_out(name)
        page = Document(f"{BEGIN}{text}{END}", held_out)
        found += [page] * (1 if held_out else _TOPIC_WEIGHT)
        found.append(_chat(f"the topic {name}", text[:1500], rng, held_out))
    for module, entries in [*_reflected(), *_parsed()]:
        fresh = [e for e in entries if e.doc not in seen]
        seen.update(e.doc for e in fresh)
        if not fresh:
            continue
        held_out = _is_held_out(module)
        found.append(Document(f"{BEGIN}{_page(module, fresh)}{END}", held_out))
        for entry in fresh:
            if len(entry.doc) >= 40 and (module == "C builtins" or rng.random() < _CHAT_SHARE):
                found.append(_chat(entry.name, _paragraphs(entry), rng, held_out))
    return found


def _is_held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % 100 < _HELD_OUT_PERCENT


def _chat(name: str, answer: str, rng: random.Random, held_out: bool) -> Document:
    question = rng.choice(_QUESTIONS).format(name=name)
    return Document(f"{BEGIN}{USER}{question}{ASSISTANT}{answer}{END}", held_out)


def _paragraphs(entry: Entry) -> str:
    return f"{entry.name}{entry.signature}\n\n{entry.doc}"


def _page(module: str, entries: list[Entry]) -> str:
    return "\n\n\n".join(_paragraphs(entry) for entry in entries)


def _topics() -> Iterator[tuple[str, str]]:
    table: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(table):
        yield name, table[name].strip()


def _parsed() -> Iterator[tuple[str, list[Entry]]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS.intersection(parts[:-1]) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        name = ".".join(part for part in parts if part != "__init__")
        try:
            with tokenize.open(path) as file:
                tree = ast.parse(file.read())
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates and samples that are not Python of this version
        entries = list(_entries_of_tree(tree, name))
        if entries:
            yield name, entries


def _entries_of_tree(node: ast.Module | ast.ClassDef, name: str) -> Iterator[Entry]:
    doc = ast.get_docstring(node)
    if doc and isinstance(node, ast.Module):
        yield Entry(f"module {name}", "", doc)
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            inner = f"{name}.{child.name}"
            if text := ast.get_docstring(child):
                bases = ", ".join(ast.unparse(base) for base in child.bases)
                yield Entry(f"class {inner}", f"({bases})" if bases else "", text)
            yield from _entries_of_tree(child, inner)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(child)):
            yield Entry(f"{name}.{child.name}", f"({_arguments(child.args)})", text)


def _arguments(arguments: ast.arguments) -> str:
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(arguments)


def _reflected() -> Iterator[tuple[str, list[Entry]]]:
    for name in _REFLECTED_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # not built on this platform
        yield f"C {name}", list(_entries_of_module(module, name.lstrip("_")))


def _entries_of_module(module: ModuleType, name: str) -> Iterator[Entry]:
    prefix = "" if name == "builtins" else f"{name}."
    if doc := inspect.getdoc(module):
        yield Entry(f"module {name}", "", doc)
    for attribute, value in sorted(vars(module).items()):
        if attribute.startswith("__"):
            continue
        if isinstance(value, type):
            if doc := _own_doc(value):
                yield Entry(f"class {prefix}{attribute}", _signature(value), doc)
            for member, inner in sorted(vars(value).items()):
                if (doc := _own_doc(inner)) and member not in ("__doc__", "__new__"):
                    yield Entry(f"{prefix}{attribute}.{member}", _signature(inner), doc)
        elif callable(value) and (doc := _own_doc(value)):
            yield Entry(f"{prefix}{attribute}", _signature(value), doc)


def _own_doc(value: object) -> str | None:
    doc = getattr(value, "__doc__", None)
    return (
        inspect.cleandoc(doc) if isinstance(doc, str) and not isinstance(value, str | int | float) else None
    )


def _signature(value: object) -> str:
    text = getattr(value, "__text_signature__", None)
    if not isinstance(text, str):
        return ""
    for hidden in ("$module, /, ", "$module, ", "$module", "$self, /, ", "$self, ", "$type, /, ", "$type, "):
        text = text.replace(f"({hidden}", "(")
    return text.replace("$", "").replace("(/)", "()")
