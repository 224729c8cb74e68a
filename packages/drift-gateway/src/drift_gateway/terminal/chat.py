"""`drift chat`: a conversation with a served model, each answer with the proof of how fast it came.

A model with a chat template gets the whole conversation every turn; one without continues a text. Where standard
input is no terminal, each of its lines is a turn: answers go to standard output, everything else to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from drift_gateway.client import (
    SLO,
    DriftClient,
    Finished,
    InvalidRequest,
    NeverFits,
    RequestError,
    TokenDelta,
    unanswered,
    waiting,
)
from drift_gateway.connection import Connection
from drift_gateway.v1 import info_pb2
from drift_scheduler.errors import DriftError

START_S: Final = 120.0
PROMPT: Final = "› "
HELP: Final = """\
/reset                start again, keeping the system message
/system [TEXT]        set the system message, or take it away; starts again
/slo TTFT TBT [E2E]   targets in seconds; /slo off takes the server's own
/tokens N             most tokens of an answer
/temperature T        0 always takes the likeliest token
/stats                what the server is doing, in a line
/quit                 leave (or Ctrl-D)
Ctrl-C stops the answer, not the program."""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How to talk. `None`s take the server's defaults."""

    connection: Connection
    system: str | None = None
    slo: SLO = field(default_factory=SLO)
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None


def run(options: ChatOptions, answers: Console, notes: Console) -> int:
    """Talk until the end of input; 1 where a turn failed and nobody was there to see it. Raises DriftError."""
    with DriftClient(options.connection) as client:
        info = _served(client, options.connection.target, notes)
        chat = Conversation(client, info, options, answers, notes)
        chat.greet()
        interactive = sys.stdin.isatty()
        failed = False
        for line in _typed() if interactive else _piped():
            try:
                if not chat.turn(line):
                    break
            except KeyboardInterrupt:  # between the request and its answer, or after it
                if not interactive:
                    raise
                notes.print("stopped", style="dim")
            except RequestError as error:
                failed = True
                notes.print(
                    f"[red]{error.code.name}[/]: {escape(str(error))}", highlight=False, soft_wrap=True
                )
                notes.print(f"  {cure(error)}", style="dim", highlight=False)
    return 1 if failed and not interactive else 0


def _served(client: DriftClient, target: str, notes: Console) -> info_pb2.GetServerInfoResponse:
    try:
        info = client.server_info(5.0)
        if info.readiness != info_pb2.READINESS_READY:
            notes.print(waiting(target, info), style="dim", highlight=False, markup=False, soft_wrap=True)
            info = client.wait_ready(START_S)
    except RequestError as error:
        raise DriftError(unanswered(target, str(error))) from error
    if not info.model.has_tokenizer:
        raise DriftError(
            f"{target}: model '{info.model.name}' has no tokenizer, so it cannot talk; send it token ids with "
            "drift_gateway.client or `drift load`"
        )
    return info


def _typed() -> Iterator[str]:
    """Lines from the terminal, with editing and history; Ctrl-C gives up the line, Ctrl-D ends."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() its editing
    while True:
        try:
            yield input(PROMPT)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def _piped() -> Iterator[str]:
    for line in sys.stdin:
        yield line.rstrip("\n")


def cure(error: RequestError) -> str:
    """What the user can do about it."""
    match error:
        case NeverFits():
            return "the conversation is too long for the model or its memory: /reset starts again"
        case InvalidRequest():
            return "the server does not take this value; /help shows what can be set"
        case _ if error.retry_after is not None:
            return f"try again in {error.retry_after:.1f} s"
        case _:
            return "try again; nothing of this turn was kept"


class Conversation:
    """The history, the settings, and one turn at a time."""

    def __init__(
        self,
        client: DriftClient,
        info: info_pb2.GetServerInfoResponse,
        options: ChatOptions,
        answers: Console,
        notes: Console,
    ) -> None:
        self.options = options
        self.messages: list[dict[str, str]] = []
        self.text = ""
        """What a model without a chat template continues."""
        self._client = client
        self._model = info.model
        self._answers = answers
        self._notes = notes

    def greet(self) -> None:
        """What is served there, and how it will be talked to."""
        model = self._model
        self._note(f"{model.name} at {self.options.connection.target}; /help shows the commands")
        if not model.has_chat_template:
            self._note("this model has no chat template: it continues the text that your lines add to")
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.text = ""
        system = self.options.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def turn(self, line: str) -> bool:
        """A command or a message; False ends. Raises RequestError, and then the turn never was."""
        if line.startswith("/"):
            return self._command(line)
        if not line.strip():
            return True
        said = self._ask(line)
        if said is None:
            return True
        if self._model.has_chat_template:
            self.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": said}]
        else:
            self.text = f"{self.text}{line}{said}\n"
        return True

    def _ask(self, line: str) -> str | None:
        """Stream one answer; what was said of it, if anything."""
        generation = self._client.generate(**self._input(line), **self._settings())
        said: list[str] = []
        finished: Finished | None = None
        stopped = False
        try:
            for event in generation:
                if isinstance(event, TokenDelta):
                    said.append(event.text)
                    self._show(event.text)
                elif isinstance(event, Finished):
                    finished = event
        except KeyboardInterrupt:
            generation.cancel()
            stopped = True
        finally:
            if said:
                self._show("\n")
        if stopped:
            self._note("stopped")
        elif finished is not None:
            self._notes.print(proof(finished), soft_wrap=True)
        return "".join(said) or None

    def _input(self, line: str) -> dict[str, Any]:
        if self._model.has_chat_template:
            return {"messages": [*self.messages, {"role": "user", "content": line}]}
        return {"prompt": f"{self.text}{line}"}

    def _settings(self) -> dict[str, Any]:
        options = self.options
        return {
            "slo": options.slo,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "seed": options.seed,
        }

    def _show(self, text: str) -> None:
        """What a model says never steers the terminal."""
        self._answers.file.write(printable(text))
        self._answers.file.flush()

    def _note(self, line: str) -> None:
        self._notes.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)

    # ------------------------------------------------------------------------------------ commands

    def _command(self, line: str) -> bool:
        name, _, rest = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self._note(HELP),
            "reset": self._reset,
            "system": self._system,
            "slo": self._slo,
            "tokens": self._tokens,
            "temperature": self._temperature,
            "stats": self._stats,
        }
        if name in ("quit", "exit"):
            return False
        command = commands.get(name)
        if command is None:
            self._note(
                f"no command /{name}; there are: {', '.join(f'/{known}' for known in (*commands, 'quit'))}"
            )
            return True
        try:
            command(rest.strip())
        except ValueError as error:
            self._note(f"/{name}: {error}")
        return True

    def _reset(self, _: str) -> None:
        self.reset()
        self._note("started again")

    def _system(self, text: str) -> None:
        if text and not self._model.has_chat_template:
            raise ValueError("this model has no chat template, and so no system message")
        self.options = replace(self.options, system=text or None)
        self.reset()
        self._note("system message set; started again" if text else "no system message; started again")

    def _slo(self, text: str) -> None:
        if not text:
            slo = self.options.slo
            self._note(f"TTFT {_or_server(slo.ttft)}, TBT {_or_server(slo.tbt)}, e2e {_or_server(slo.e2e)}")
            return
        self.options = replace(self.options, slo=targets(text))
        self._slo("")

    def _tokens(self, text: str) -> None:
        if not text.isdigit() or int(text) < 1:
            raise ValueError("give a whole number of at least 1")
        self.options = replace(self.options, max_tokens=int(text))

    def _temperature(self, text: str) -> None:
        self.options = replace(self.options, temperature=_number(text, "a temperature"))

    def _stats(self, _: str) -> None:
        load = self._client.load()
        self._note(
            f"{load.in_flight} in flight, {load.waiting} waiting, {load.running} running; "
            f"{load.total_pages - load.free_pages} of {load.total_pages} KV pages in use; `drift top` shows more"
        )


def targets(text: str) -> SLO:
    """Targets from `TTFT TBT [E2E]`, in seconds, or from `off`. Raises ValueError."""
    if text == "off":
        return SLO()
    parts = text.split()
    if len(parts) not in (2, 3):
        raise ValueError("give TTFT and TBT in seconds, as in /slo 1 0.05, or off")
    values = [_number(part, "seconds") for part in parts]
    if min(values) <= 0:
        raise ValueError("targets are above 0 seconds")
    return SLO(values[0], values[1], values[2] if len(values) == 3 else None)


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"'{text}' is no number for {what}") from None
    if not 0 <= value < float("inf"):
        raise ValueError(f"'{text}' is no number for {what}")
    return value


def _or_server(target: float | None) -> str:
    return "the server's" if target is None else f"{target:g} s"


def printable(text: str) -> str:
    """Without the control characters that terminals obey; line ends and tabs stay."""
    return "".join(
        c if c in "\n\t" or (c.isprintable() or c in JOINERS) else "\N{REPLACEMENT CHARACTER}" for c in text
    )


JOINERS: Final = "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}\N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}"


def proof(finished: Finished) -> Text:
    """One line: TTFT and TBT against the targets the answer ran under, measured by the server."""
    timing, usage = finished.timing, finished.usage
    parts: list[Iterable[tuple[str, str]]] = [
        [("TTFT ", "dim"), (_time(timing.ttft), "bold"), *_held(timing.slo.ttft, timing.ttft_met)]
    ]
    if timing.tbt_p99 is not None:
        times = f"{_time(timing.tbt_p50)} / {_time(timing.tbt_p99)}"
        parts.append([("TBT p50/p99 ", "dim"), (times, "bold"), *_held(timing.slo.tbt, timing.tbt_met)])
    if timing.slo.e2e is not None:
        parts.append(
            [("in all ", "dim"), (_time(timing.e2e), "bold"), *_held(timing.slo.e2e, timing.e2e_met)]
        )
    tokens = f"{usage.output_tokens} tokens after {usage.prompt_tokens} ({usage.cached_tokens} cached)"
    parts.append([(tokens if finished.reason != "length" else f"{tokens}, cut at the limit", "dim")])
    line = Text()
    for number, pieces in enumerate(parts):
        line.append("  ·  " if number else "", "dim")
        for text, style in pieces:
            line.append(text, style)
    if finished.reason not in ("stop", "length"):
        line.append(f"  {finished.reason} {finished.message}", "red")
    return line


def _held(target: float | None, met: bool | None) -> list[tuple[str, str]]:
    if target is None or met is None:
        return []
    return [(" ✓" if met else " ✗", "green" if met else "red"), (f" of {_time(target)}", "dim")]


def _time(value: float | None) -> str:
    if value is None:
        return "–"
    return (
        f"{value:.2f} s"
        if value >= 1
        else f"{value * 1e3:.0f} ms"
        if value >= 0.1
        else f"{value * 1e3:.1f} ms"
    )
