"""`drift chat`: turns through a pipe and in a terminal, against a gateway whose engine follows a script."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gateway_under_test import PATIENCE_S, UnderTest, ready_in, run_with_gateway

from drift_core.frames import Submit
from drift_gateway.client import SLO, Finished, Timing, Usage
from drift_gateway.terminal.chat import printable, proof, targets

COMMAND = (sys.executable, "-m", "drift_scheduler.cli", "chat", "--target")


def answer(submit: Submit) -> list[int]:
    """`<` and the last character of what was asked, and `>`."""
    return [ord("<"), submit.prompt[-1], ord(">")]


async def talk(under: UnderTest, lines: str, *options: str, status: int = 0) -> tuple[str, str]:
    """What `drift chat` writes when its input is a pipe."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, under.target, *options,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(lines.encode()), PATIENCE_S)
    assert process.returncode == status, err.decode()
    return out.decode(), err.decode()


def asked(under: UnderTest) -> list[str]:
    return [bytes(submit.prompt).decode() for submit in under.engine.submits()]


def test_the_whole_conversation_goes_through_the_models_template(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        out, err = await talk(under, "one\n\ntwo\n/reset\nthree\n", "--system", "be brief")
        assert out == "<]>\n" * 3
        first = "[system]be brief[user]one[assistant]"
        assert asked(under) == [
            first,
            f"{first}<]>[user]two[assistant]",
            "[system]be brief[user]three[assistant]",
        ]
        assert "started again" in err
        assert err.count("TTFT") == 3
        assert "3 tokens after 36 (1 cached)" in err

    run_with_gateway(body, ready=ready_in(tmp_path), script=answer)


def test_settings_go_with_the_request(tmp_path: Path) -> None:
    lines = "a\n/slo 1.5 0.25\n/tokens 7\n/temperature 0\nb\n/slo off\n/slo 1\n/frob\n/system hi\nc\n/stats\n/quit\nd\n"

    async def body(under: UnderTest) -> None:
        _, err = await talk(under, lines, "--slo-ttft", "0.5", "--seed", "3")
        first, second, third = under.engine.submits()
        assert (first.slo_ttft, first.slo_tbt) == (0.5, 0.1)
        assert (first.sampling.max_tokens, first.sampling.temperature, first.sampling.seed) == (512, 1.0, 3)
        assert (second.slo_ttft, second.slo_tbt) == (1.5, 0.25)
        assert (second.sampling.max_tokens, second.sampling.temperature) == (7, 0.0)
        assert (third.slo_ttft, third.slo_tbt) == (2.0, 0.1)
        assert asked(under)[2] == "[system]hi[user]c[assistant]"
        assert "/slo: give TTFT and TBT in seconds" in err
        assert "no command /frob; there are: /help" in err
        assert "0 in flight" in err

    run_with_gateway(body, ready=ready_in(tmp_path), script=answer)


def test_a_model_without_a_template_continues_a_text_and_says_so(tmp_path: Path) -> None:
    ready = ready_in(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    plain = {k: v for k, v in msgspec.json.decode(settings.read_bytes()).items() if k != "chat_template"}
    settings.write_bytes(msgspec.json.encode(plain))

    async def body(under: UnderTest) -> None:
        out, err = await talk(under, "one\ntwo\n/system x\n/reset\nthree\n")
        assert asked(under) == ["one", "one<e>\ntwo", "three"]
        assert out == "<e>\n<o>\n<e>\n"
        assert "no chat template: it continues the text" in err
        assert "/system: this model has no chat template" in err

    run_with_gateway(body, ready=ready, script=answer)


def test_a_failed_turn_is_said_with_a_cure_and_never_was(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        _, err = await talk(under, f"{'x' * 5000}\nshort\n", status=1)
        assert "FAILED_PRECONDITION" in err
        assert "/reset starts again" in err
        assert asked(under) == ["[user]short[assistant]"]

    run_with_gateway(body, ready=ready_in(tmp_path), script=answer)


def test_a_model_without_a_tokenizer_cannot_talk() -> None:
    async def body(under: UnderTest) -> None:
        _, err = await talk(under, "hello\n", status=2)
        assert "has no tokenizer" in err
        assert "drift load" in err

    run_with_gateway(body)


def test_nobody_there_is_one_line_that_says_what_to_do() -> None:
    done = subprocess.run(
        [*COMMAND, "127.0.0.1:1"], input=b"", capture_output=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 2
    assert b"nobody answers" in done.stderr
    assert b"drift serve --listen 127.0.0.1:1" in done.stderr


def test_a_server_that_does_not_serve_is_waited_for_and_that_is_said(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        under.supervisor.drain(True)
        process = await asyncio.create_subprocess_exec(
            *COMMAND, under.target, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        line = await asyncio.wait_for(process.stderr.readline(), PATIENCE_S)
        assert line.decode() == f"{under.target}: draining; waiting for it\n"
        under.supervisor.drain(False)
        out, _ = await asyncio.wait_for(process.communicate(b"one\n"), PATIENCE_S)
        assert out == b"<]>\n"

    run_with_gateway(body, ready=ready_in(tmp_path), script=answer)


@pytest.mark.skipif(shutil.which("setsid") is None, reason="setsid is not installed")
def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        ours, theirs = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            "setsid", "--ctty", "--wait", *COMMAND, under.target,
            stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(theirs)
        try:
            await conversation(under, ours)
            assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0
        finally:  # a child that lives on keeps the event loop from closing
            if process.returncode is None:
                process.kill()
                await asyncio.wait_for(process.wait(), PATIENCE_S)
            os.close(ours)

    async def conversation(under: UnderTest, terminal: int) -> None:
        seen = _Terminal(terminal)
        await seen.until("› ")
        os.write(terminal, b"talk on\n")
        await seen.until("aaaaaaaaaa")
        os.write(terminal, b"\x03")
        await seen.until("stopped")
        await under.until(lambda engine: len(engine.cancels()) == 1)
        await seen.until("› ")
        os.write(terminal, b"\x03")
        await seen.until("› ")
        os.write(terminal, b"\x04")

    run_with_gateway(
        body, ready=ready_in(tmp_path), script=lambda submit: [ord("a")] * 4000, step_seconds=0.005
    )


class _Terminal:
    """Reads what a program shows."""

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a read may end in the middle of a character
        self._text = ""

    async def until(self, wanted: str) -> None:
        """Wait, boundedly, for these words; what came before them is forgotten."""

        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while wanted not in self._text:
            if asyncio.get_running_loop().time() > deadline:
                raise AssertionError(f"{wanted!r} never came after {self._text!r}")
            with contextlib.suppress(BlockingIOError):
                self._text += self._decoder.decode(os.read(self._descriptor, 4096))
            await asyncio.sleep(0.01)
        self._text = self._text.split(wanted, 1)[1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("naïve 日本語 🙂\tx\n", None),
        ("a\x1b[2Jb\x07\r", "a\ufffd[2Jb\ufffd\ufffd"),
        ("\u202eevil", "\ufffdevil"),
    ],
)
def test_what_a_model_says_never_steers_the_terminal(text: str, shown: str | None) -> None:
    assert printable(text) == (text if shown is None else shown)


@pytest.mark.parametrize(
    ("text", "slo"), [("off", SLO()), ("1 0.05", SLO(1.0, 0.05)), ("1 .1 9", SLO(1.0, 0.1, 9.0))]
)
def test_targets_as_typed(text: str, slo: SLO) -> None:
    assert targets(text) == slo


@pytest.mark.parametrize("text", ["1", "a b", "0 1", "-1 1", "nan 1", "1 2 3 4"])
def test_targets_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        targets(text)


def finished(**changes: Any) -> Finished:
    fields = dict.fromkeys(
        ("queue", "prefill", "ttft", "tbt_p50", "tbt_p99", "tbt_max", "e2e", "ttft_met", "tbt_met", "e2e_met")
    )
    fields |= {
        "preemptions": 0,
        "recomputed_tokens": 0,
        "late_tokens": 0,
        "slo": SLO(1.0, 0.05),
        "gateway": 0.0,
    }
    return Finished(0, "stop", "", None, Usage(5, 2, 9), Timing(**{**fields, **changes}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ttft": 0.25, "ttft_met": True}, ["TTFT 250 ms ✓ of 1.00 s", "9 tokens after 5 (2 cached)"]),
        (
            {"ttft": 2.0, "ttft_met": False, "tbt_p50": 0.011, "tbt_p99": 0.2, "tbt_met": False},
            ["TTFT 2.00 s ✗", "TBT p50/p99 11.0 ms / 200 ms ✗ of 50.0 ms"],
        ),
        ({}, ["TTFT –"]),
    ],
)
def test_every_answer_shows_how_fast_it_came(changes: dict[str, Any], words: Sequence[str]) -> None:
    line = proof(finished(**changes)).plain
    for word in words:
        assert word in line
