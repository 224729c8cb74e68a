"""Offline generation in vLLM's manner: `LLM(model).generate(prompts, SamplingParams(...))`.

The engine runs on a thread of its own in this process; tokenising, stop strings and fan-out happen on the
caller's. Knows nothing of scheduling.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Self

from drift_core.engine import Engine, Progress, engine_config
from drift_core.frames import Submit, TokenLogprob
from drift_core.model.config import model_directory
from drift_core.sampling_params import SamplingParams
from drift_core.starting import start_engine
from drift_core.tokenizer import IncrementalDetokenizer, Tokenizer
from drift_scheduler.domain import Finished, FinishReason, Output, RequestTiming, Step, Tokens
from drift_scheduler.errors import DriftError

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]

log = logging.getLogger("drift.llm")

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


@dataclass(slots=True)
class CompletionOutput:
    """One output. `finish_reason`: "stop", "length", "cancelled" or "failed"; `stop_reason`: the stop string or token.

    `logprobs[i]`: of `token_ids[i]`, where the parameters asked. `message`: why, where it failed.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    message: str = ""
    metrics: RequestTiming | None = None


@dataclass(slots=True)
class RequestOutput:
    """One prompt and its outputs; `prompt` is `None` where token ids were given. `metrics`: of the first output."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def finished(self) -> bool:
        """Whether every output has ended."""
        return all(output.finish_reason is not None for output in self.outputs)

    @property
    def metrics(self) -> RequestTiming | None:
        """When what happened to the first output, in seconds on the monotonic clock."""
        return self.outputs[0].metrics

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        outputs = [
            {
                "text": output.text,
                "token_ids": output.token_ids,
                "finish_reason": output.finish_reason,
                "stop_reason": output.stop_reason,
                "cumulative_logprob": output.cumulative_logprob,
                "timing": None if output.metrics is None else asdict(output.metrics),
            }
            for output in self.outputs
        ]
        return {
            "request_id": self.request_id,
            "prompt": self.prompt,
            "prompt_token_ids": self.prompt_token_ids,
            "outputs": outputs,
        }


class LLM:
    """A model to generate with, in this process.

    `model`: a local Hugging Face directory, or "demo". Further options are those of `EngineConfig`
    (`dispatch="chunked-prefill"`, `kv_memory_bytes=…`). Raises DriftError on whatever is wrong with them.
    Close it, or use it in a `with` statement. Safe to use from several threads, which take turns.
    """

    def __init__(
        self,
        model: str,
        device: str = "auto",
        dtype: str = "auto",
        dispatch: str = "drift",
        *,
        progress: Progress = lambda phase, fraction: None,
        **options: Any,
    ) -> None:
        config = engine_config(model=model, device=device, dtype=dtype, dispatch=dispatch, **options)
        self._engine = start_engine(config, progress)
        try:
            self.tokenizer = Tokenizer.load(model_directory(model))
        except BaseException:
            self._engine.close()
            raise
        self._news: queue.SimpleQueue[tuple[Output, ...] | Exception] = queue.SimpleQueue()
        self._turn = threading.Lock()
        self._numbers = itertools.count()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="drift-engine", daemon=True)
        self._thread.start()

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        priority: int = 0,
    ) -> list[RequestOutput]:
        """Continue every prompt, all at once; outputs in the prompts' order.

        `prompts`: a text, token ids, or a list of either. `sampling_params`: for all, or one each; vLLM's
        defaults without. `use_tqdm`: show a progress bar. Raises DriftError when a prompt or its parameters
        cannot be served, before anything is started.
        """
        texts = _as_list(prompts)
        params = _as_params(sampling_params, len(texts))
        with self._turn:
            if self._closed:
                raise DriftError("this LLM is closed")
            work = _Work(self._engine, self.tokenizer)
            for text, chosen in zip(texts, params, strict=True):
                work.add(str(next(self._numbers)), *self._tokens(text), chosen)
            with _bar(sum(len(output.outputs) for output in work.outputs), use_tqdm) as advance:
                return work.run(self._news, priority, advance)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, under the model's chat template. Raises as `generate`."""
        single = not messages or isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        texts = [
            self.tokenizer.apply_chat_template(each, add_generation_prompt=True) for each in conversations
        ]
        return self.generate(texts, sampling_params, use_tqdm=use_tqdm)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, as `generate` would see it."""
        return self.tokenizer.encode(text)

    def close(self) -> None:
        """End the engine; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._engine.shut_down()
            self._thread.join()
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self) -> None:
        try:
            self._engine.run(self._deliver)
        except Exception as error:
            log.exception("the engine failed")
            self._closed = True
            self._news.put(error)

    def _deliver(self, step: Step) -> None:
        if step.outputs:
            self._news.put(step.outputs)

    def _tokens(self, prompt: str | Sequence[int]) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        return None, list(prompt)


class _Work:
    """The requests of one call, followed until each has ended."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.outputs: list[RequestOutput] = []
        self._engine = engine
        self._tokenizer = tokenizer
        self._pending: dict[str, _Pending] = {}
        self._submissions: list[tuple[str, list[int], SamplingParams]] = []

    def add(self, request_id: str, text: str | None, prompt: list[int], params: SamplingParams) -> None:
        """Check a prompt and note it with its `n` outputs. Raises DriftError."""
        limit = self._engine.max_context
        if len(prompt) >= limit:
            raise DriftError(
                f"prompt {len(self.outputs)} has {len(prompt)} tokens, which leaves no room for output in a "
                f"context of {limit}"
            )
        self._engine.check(prompt, params)
        self._engine.prepare(params)
        output = RequestOutput(request_id, text, prompt, [])
        for index in range(params.n):
            child = request_id if params.n == 1 else f"{request_id}#{index}"
            completion = CompletionOutput(index)
            output.outputs.append(completion)
            self._pending[child] = _Pending(
                completion, params, self._stop_ids(params), self._tokenizer, prompt
            )
            self._submissions.append((child, prompt, params.child(index)))
        self.outputs.append(output)

    def run(
        self,
        news: queue.SimpleQueue[tuple[Output, ...] | Exception],
        priority: int,
        advance: Callable[[], None],
    ) -> list[RequestOutput]:
        """Submit all, then listen. What has not ended when the caller is interrupted is cancelled."""
        try:
            for request_id, prompt, params in self._submissions:
                self._engine.submit(self._submission(request_id, prompt, params, priority), news.put)
            while self._pending:
                outputs = news.get()
                if isinstance(outputs, DriftError):  # a request whose form turned out to be none
                    raise outputs
                if isinstance(outputs, Exception):
                    raise DriftError(f"the engine failed: {type(outputs).__name__}: {outputs}") from outputs
                for output in outputs:
                    self._take(output, advance)
        finally:
            for request_id in self._pending:
                self._engine.cancel(request_id)
        return self.outputs

    def _submission(
        self, request_id: str, prompt: list[int], params: SamplingParams, priority: int
    ) -> Submit:
        config = self._engine.config
        return Submit(
            id=request_id,
            prompt=prompt,
            sampling=params,
            slo_ttft=config.slo_ttft,
            slo_tbt=config.slo_tbt,
            slo_e2e=None,
            slo_class="offline",
            priority=priority,
            salt="",
            arrival=time.monotonic(),
        )

    def _take(self, output: Output, advance: Callable[[], None]) -> None:
        match output:
            case Tokens(request_ids=ids, token_ids=tokens, details=details) if tokens is not None:
                for request_id, token in zip(ids, tokens, strict=True):
                    pending = self._pending.get(request_id)
                    if pending is not None and pending.push(token, (details or {}).get(request_id)):
                        self._engine.cancel(request_id, stop=True)
            case Finished(request_id=request_id):
                pending = self._pending.pop(request_id, None)  # an earlier call's was cancelled
                if pending is not None:
                    pending.end(output)
                    advance()
            case _:
                pass

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        eos = () if params.ignore_eos else self._engine.model.eos_token_ids
        return frozenset(eos) | frozenset(params.stop_token_ids or ())


class _Pending:
    """One output on its way: text grows with its tokens until a stop string or the end."""

    def __init__(
        self,
        output: CompletionOutput,
        params: SamplingParams,
        stop_ids: frozenset[int],
        tokenizer: Tokenizer,
        prompt: list[int],
    ) -> None:
        self.output = output
        self._params = params
        self._stop_ids = stop_ids
        self._text: list[str] = []
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            params.stop_strings,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            prompt=prompt,
        )
        if params.logprobs is not None:
            output.logprobs, output.cumulative_logprob = [], 0.0

    def push(self, token: int, logprob: TokenLogprob | None) -> bool:
        """Take a token; `True` when it completed a stop string."""
        output = self.output
        if output.stop_reason is not None:
            return False
        output.token_ids.append(token)
        if output.logprobs is not None and output.cumulative_logprob is not None and logprob is not None:
            output.logprobs.append(logprob)
            output.cumulative_logprob += logprob.logprob
        ends = len(output.token_ids) > self._params.min_tokens or self._params.structured is not None
        if token in self._stop_ids and ends:
            output.stop_reason = None if token not in (self._params.stop_token_ids or ()) else token
            return False  # the engine ends it; its text is no part of the output
        self._text.append(self._detokenizer.push([token]))
        output.stop_reason = self._detokenizer.stopped
        return output.stop_reason is not None

    def end(self, finished: Finished) -> None:
        """The request ended."""
        output = self.output
        self._text.append(self._detokenizer.finish())
        output.text = "".join(self._text)
        output.finish_reason = finished.reason.value
        # A stop string may be complete only now, and the engine may have ended for another reason meanwhile.
        if self._detokenizer.stopped is not None:
            output.finish_reason = FinishReason.STOP.value
            output.stop_reason = self._detokenizer.stopped
        output.message = finished.message
        output.metrics = finished.timing


def _as_list(prompts: Prompts) -> list[str | Sequence[int]]:
    """One prompt or many, as many."""
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    if not items:
        raise DriftError("there are no prompts")
    if all(isinstance(item, int) for item in items):
        return [items]
    for item in items:
        if not isinstance(item, str | list | tuple):
            raise DriftError(f"a prompt is a text or a list of token ids, not {type(item).__name__}")
    return items


def _as_params(
    given: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    if len(given) != count:
        raise DriftError(
            f"{len(given)} sampling parameters for {count} prompts: give one for all, or one each"
        )
    return given


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """Something to call when an output has ended; a bar on the terminal if wanted."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(),
                  console=Console(stderr=True)) as progress:  # fmt: skip
        task = progress.add_task("outputs", total=total)
        yield lambda: progress.advance(task)
