"""Every hook and every built-in name is documented, and the loop for other engines runs as it is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from drift_scheduler import conformance, hookspecs
from drift_scheduler.plugins import KINDS, load

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "plugins.md").read_text(encoding="utf-8")
OURS = ("drift-scheduler", "drift-kernels", "drift-core", "drift-gateway")
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("drift_"))
NAMES = sorted(
    (kind, name)
    for kind, names in load(strict=False).names.items()
    for name, entry in names.items()
    if entry.plugin in OURS and kind != "command"
)


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_is_documented_with_its_arguments(hook: str) -> None:
    function = getattr(hookspecs, hook)
    arguments = ", ".join(function.__code__.co_varnames[: function.__code__.co_argcount])
    assert f"| `{hook}({arguments})` |" in PAGE, (
        f"docs/plugins.md, 'Every hook': add a row for {hook}({arguments})"
    )
    assert function.__doc__, f"{hook} has no docstring"


def test_no_hook_is_documented_that_is_none() -> None:
    assert set(re.findall(r"`(drift_\w+)\(", PAGE)) == set(HOOKS)
    assert set(KINDS.values()) <= set(HOOKS)


@pytest.mark.parametrize(("kind", "name"), NAMES, ids=str)
def test_each_built_in_name_is_documented(kind: str, name: str) -> None:
    section = PAGE.split("## What is built in")[1].split("\n## ")[0]
    assert f"`{name}`" in section, f"docs/plugins.md, 'What is built in': name the {kind} {name}"


def test_the_conformance_suite_is_documented() -> None:
    section = PAGE.split("## The conformance suite")[1].split("\n## ")[0]
    for name in ("CASES", "run_case", "conform", "exercise", "record_golden", "compare_golden"):
        assert name in conformance.__all__
        assert f"`{name}" in section


def test_the_log_is_documented_key_by_key(tmp_path: Path) -> None:
    """What a log holds is in the table, whatever run wrote it."""
    import json

    conformance.record_golden(_gang(), tmp_path / "log.jsonl")
    head, *steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    section = PAGE.split("## The decision log")[1].split("\n## ")[0]
    keys = {*head, *head["device"], *head["limits"], *head["kv"]}
    for step in steps:
        keys |= {*step, *step["view"], *step.get("gang", ())}
        keys |= {key for lane in step.get("lanes", ()) for key in lane if key not in ("prefill", "decode")}
        keys |= {key for end in step.get("finished", ()) for key in end}
    assert not [key for key in sorted(keys) if f"`{key}`" not in section]


def _gang():  # type: ignore[no-untyped-def]
    from drift_scheduler.dispatch.gang import GangPolicy

    return GangPolicy()


def test_the_loop_for_other_engines_is_short_and_runs(tmp_path: Path) -> None:
    text = (DOCS / "reuse.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(program.splitlines()) < 40
    file = tmp_path / "loop.py"
    file.write_text(program)
    ran = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert re.fullmatch(r"20 requests done at \d+\.\d\d s in \d+ steps, 0 faults\n", ran.stdout)
