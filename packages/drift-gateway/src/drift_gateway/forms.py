"""The forms that requests hold their outputs to: compiled here before a request is accepted, off the event loop.

The engine compiles them again for itself; what is found here is that it can. Bounded by the sizes of
`drift_core.sampling_params.Structured`, by the limits of `drift_core.structured`, by a pool of two threads with a
bounded queue, and by a time after which a request does not wait for its form any longer. Knows nothing of gRPC calls.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final
from weakref import WeakKeyDictionary

from drift_core.frames import Ready
from drift_core.sampling_params import Structured
from drift_core.structured import Compiler, CompilerBusyError, FormError, Job, Vocabulary
from drift_core.tokenizer import Tokenizer
from drift_gateway.refusal import Reason, Refusal, invalid

COMPILE_SECONDS: Final = 5.0
"""What a form may take to compile, from its turn, and what it may wait for its turn."""

log = logging.getLogger("drift.gateway")


class Forms:
    """Compiled forms of the tokenizers served. `seconds`: as COMPILE_SECONDS."""

    def __init__(self, compiler: Compiler | None = None, seconds: float = COMPILE_SECONDS) -> None:
        self._compiler = compiler or Compiler()
        self._seconds = seconds
        self._vocabularies: WeakKeyDictionary[Tokenizer, Vocabulary | FormError] = WeakKeyDictionary()

    def learn(self, tokenizer: Tokenizer | None, ready: Ready) -> None:
        """Make ready for forms over a tokenizer: about a second for a large one, in which no other code runs."""
        if tokenizer is None or tokenizer in self._vocabularies:
            return
        try:
            self._vocabularies[tokenizer] = Vocabulary.of(tokenizer, ready.vocab_size, ready.eos_token_ids)
        except FormError as error:
            log.warning("outputs cannot be held to a form: %s", error)
            self._vocabularies[tokenizer] = error

    async def check(self, tokenizer: Tokenizer | None, ready: Ready, structured: Structured | None) -> None:
        """Return once the form is compiled. Raises Refusal: it is none, took too long, or too many wait."""
        if structured is None:
            return
        vocabulary = self._vocabulary(tokenizer, ready, structured.field)
        try:
            job = self._compiler.start(vocabulary, structured)
            if not job.future.done():
                await self._wait(job, structured.field)
            job.future.result()
        except CompilerBusyError as busy:
            raise Refusal(Reason.QUEUE_FULL, f"{structured.field}: {busy}; try again later") from busy
        except FormError as error:
            raise invalid(structured.field, str(error)) from error

    def _vocabulary(self, tokenizer: Tokenizer | None, ready: Ready, field: str) -> Vocabulary:
        if tokenizer is None:
            raise Refusal(
                Reason.NO_TOKENIZER,
                f"{field}: model '{ready.model}' has no tokenizer, so no output can be held to a form",
            )
        self.learn(tokenizer, ready)
        known = self._vocabularies[tokenizer]
        if isinstance(known, FormError):
            raise Refusal(Reason.NO_TOKENIZER, f"{field}: {known}")
        return known

    async def _wait(self, job: Job, field: str) -> None:
        """Wait for a job, as long as it may take. Raises Refusal when it takes longer."""
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def tell(_: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(done.set)

        job.future.add_done_callback(tell)
        patience = self._seconds
        while not job.future.done() and patience > 0:
            try:
                await asyncio.wait_for(done.wait(), patience)
            except TimeoutError:
                started = job.started
                if started is None:
                    raise Refusal(
                        Reason.QUEUE_FULL, f"{field}: too many forms wait to be compiled; try again later"
                    ) from None
                patience = started + self._seconds - time.monotonic()
        if not job.future.done():
            raise invalid(field, f"takes longer than {self._seconds:g} s to compile")


FORMS: Final = Forms()
