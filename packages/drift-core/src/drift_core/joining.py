"""Requests with a form join the engine when their form is compiled; until then they wait here, not in a step.

Knows nothing of executors or schedulers: it is told what to do when a request is ready, and keeps a cancellation that
comes before that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from drift_core.sampling_params import Structured
from drift_scheduler.domain import RequestCancelled
from drift_scheduler.errors import DriftError

if TYPE_CHECKING:
    from drift_core.structured import Form, Matcher, Vocabulary

MAX_JOINING = 4096
"""Forms that may be under way at once; whoever submits bounds its requests in flight well below."""


class Joining:
    """Forms over one model's vocabulary, and the requests that wait for theirs. Threads may share it.

    `vocabulary`: `None` where there can be no forms; `why` says why then.
    """

    def __init__(self, vocabulary: Vocabulary | None, why: str = "") -> None:
        from drift_core.structured import Compiler

        self._vocabulary, self._why = vocabulary, why
        self._compiler = Compiler(threads=1, waiting=MAX_JOINING)
        self._lock = threading.Lock()
        self._held: dict[str, list[RequestCancelled]] = {}

    @classmethod
    def of_model(cls, directory: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> Joining:
        """For the model in a directory; where its files do not allow forms, it says so to who asks for one."""
        from drift_core.structured import Vocabulary
        from drift_core.tokenizer import Tokenizer

        try:
            tokenizer = Tokenizer.load(directory)
            return cls(Vocabulary.of(tokenizer, vocab_size, eos_token_ids))
        except DriftError as error:
            return cls(None, str(error))

    def compiled(self, structured: Structured) -> Form:
        """The form, once it is compiled: waits. Raises DriftError naming the field."""
        try:
            return self._start(structured).result()
        except DriftError as error:
            raise DriftError(f"{structured.field}: {error}") from error

    def join(
        self,
        request_id: str,
        structured: Structured,
        ready: Callable[[Matcher], None],
        refused: Callable[[DriftError], None],
        cancel: Callable[[RequestCancelled], None],
    ) -> None:
        """Call `ready` when the form is there, at once if it is already, else on another thread; or `refused`.

        `cancel` is called after `ready` for each cancellation that came meanwhile. Raises DriftError where there can
        be no forms.
        """
        future = self._start(structured)
        with self._lock:
            self._held[request_id] = []

        def joined(done: Future[Form]) -> None:
            error = done.exception()
            if error is None:
                try:
                    ready(done.result().matcher())
                except Exception as refusal:  # whoever waits is told, whatever it is
                    error = refusal
            with self._lock:
                held = self._held.pop(request_id, [])
            if error is not None:
                refused(DriftError(f"{structured.field}: {error}"))
                return
            for event in held:
                cancel(event)

        future.add_done_callback(joined)

    def hold(self, event: RequestCancelled) -> bool:
        """Keep a cancellation for a request that has not joined yet; `False` when it is no such request's."""
        if not self._held:
            return False
        with self._lock:
            held = self._held.get(event.request_id)
            if held is None:
                return False
            held.append(event)
            return True

    def close(self) -> None:
        """Compile no more."""
        self._compiler.close()

    def _start(self, structured: Structured) -> Future[Form]:
        if self._vocabulary is None:
            raise DriftError(f"no output can be held to a form here: {self._why}")
        return self._compiler.start(self._vocabulary, structured).future
