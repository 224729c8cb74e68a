"""The engine: one model, one KV pool, one scheduler and one executor, and the process body around them.

Importing this module does not load torch, so that `run_engine` can settle how OpenMP waits before it does. The
engine knows token ids, not text: tokenising, chat templates, stop strings and fan-out happen in its callers.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import msgspec

from drift_core.frames import Ready, Submit
from drift_core.names import Names
from drift_core.sampling_params import SamplingParams, Structured
from drift_scheduler.domain import (
    SLO,
    DecodeShape,
    Event,
    FinishReason,
    PrefillShape,
    Request,
    RequestCancelled,
    Step,
)
from drift_scheduler.errors import DriftError
from drift_scheduler.loop import serve
from drift_scheduler.protocols import Executor, KvPool

if TYPE_CHECKING:
    from drift_core.joining import Joining
    from drift_core.kv import PoolPlan
    from drift_core.lanes_now import LanesNow
    from drift_core.model.config import ModelConfig
    from drift_core.profile import Grid
    from drift_core.structured import Matcher
    from drift_scheduler.cost.table import CostTable
    from drift_scheduler.decision_log import DecisionLog
    from drift_scheduler.protocols import Observer
    from drift_scheduler.scheduler import Scheduler

log = logging.getLogger("drift.engine")

NO_TARGET_S = 86400.0
"""The target in force where a request has none."""

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]
Progress = Callable[[str, float], None]
"""Told `(phase, fraction)`: what start-up does, and how much of it is done, 0 to 1."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to serve and how.

    `model`: a local Hugging Face directory, or "demo". `served_model_name`: what clients call it, `model` when not
    given. `cost`: "auto" fits the profile; any other name is an installed cost model. `profile`: "short" measures
    at start (or takes the cached table of an earlier start), "none" does not, anything else is the path of a table
    that `drift profile` wrote. `log`: path of a decision log. `cores`: how many CPU cores to use, all allowed ones
    when not given. `load_format`: "auto" reads the checkpoint, "dummy" makes random weights of its shape.
    `simulate`: what the device "simulated" pretends to be, "DEVICE/MODEL" or "step_ms=10" (see
    `drift_core.simulated`). Times are seconds.
    """

    model: str
    served_model_name: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    device: str = "auto"
    dtype: str = "auto"
    dispatch: str = "drift"
    dispatch_options: dict[str, Any] = {}
    partition: str = "tightest-decode"
    partition_options: dict[str, Any] = {}
    cost: str = "auto"
    cost_options: dict[str, Any] = {}
    slo_ttft: Seconds = 2.0
    slo_tbt: Seconds = 0.1
    kv_memory_bytes: Annotated[int, msgspec.Meta(ge=1)] | None = None
    page_tokens: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 16
    max_running: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64
    max_context: Annotated[int, msgspec.Meta(ge=2)] | None = None
    seed: int = 0
    profile: str = "short"
    log: str | None = None
    cores: Annotated[int, msgspec.Meta(ge=1)] | None = None
    load_format: str = "auto"
    simulate: str | None = None


def engine_config(**fields: Any) -> EngineConfig:
    """An EngineConfig whose every value was checked. Raises DriftError naming the field and its bounds."""
    try:
        return msgspec.convert(fields, EngineConfig)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$.")
        raise DriftError(f"engine option {where.rstrip('`')}: {message}" if where else str(error)) from error


@dataclass(frozen=True, slots=True)
class Setup:
    """What is settled before the model is loaded; executor factories (hook `drift_executors`) get it."""

    config: EngineConfig
    model: ModelConfig
    directory: Path
    progress: Progress

    @property
    def max_context(self) -> int:
        """Tokens one request may have. Raises DriftError when more is asked for than the model has."""
        wanted, most = self.config.max_context, self.model.max_context
        if wanted is not None and wanted > most:
            raise DriftError(
                f"max_context {wanted} is more than the {most} tokens that {self.config.model} was made for"
            )
        return most if wanted is None else wanted


class ModelExecutor(Executor, Protocol):
    """What the engine needs of an executor beyond what the scheduler does; factories of `drift_executors` make it.

    Optional: `meanwhile`, a call without arguments that the engine sets and `wait` makes while the device works and
    nothing else is to be done; it says whether it did anything. Optional: `planned`, a call that the engine sets beside
    it: the gang that will most likely be submitted next, where that was decided ahead.
    """

    kv: KvPool
    plan: PoolPlan

    @property
    def dtype(self) -> str:
        """Of weights and KV, as "bfloat16"."""

    @property
    def identity(self) -> tuple[object, ...]:
        """All that its times depend on, short of the processor."""

    def arrive(self, request: Request, sampling: SamplingParams, matcher: Matcher | None = None) -> None:
        """Queue a request with its prompt, from any thread. Raises DriftError when its id is in use.

        `matcher`: of the form its output must have. An executor that cannot keep to one raises DriftError.
        """

    def post(self, event: Event) -> None:
        """Queue another event, from any thread."""

    def lanes_now(self) -> LanesNow:
        """What the lanes do."""

    def profile(self, grid: Grid, model: str, progress: Callable[[float], None]) -> CostTable:
        """Measure a cost table, before serving."""

    def warm_up(self) -> None:
        """Make the first request as fast as the next."""

    def shut_down(self) -> None:
        """Make `wait` return `None`, from any thread."""

    def close(self) -> None:
        """End its threads."""


class Engine:
    """A started engine. `submit`, `cancel` and `shut_down` may be called from any thread; `run` blocks on one."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        directory: Path,
        executor: ModelExecutor,
        scheduler: Scheduler,
        observers: Iterable[Observer] = (),
        decisions: DecisionLog | None = None,
        joining: Joining | None = None,
    ) -> None:
        """joining: what compiles the forms of outputs; without, there are none."""
        self.config = config
        self.model = model
        self.directory = directory
        self.executor = executor
        self.scheduler = scheduler
        self._observers = list(observers)
        self._decisions = decisions
        self._joining = joining
        self._arriving = threading.Lock()
        self._names = Names()
        if decisions is not None:
            self._observers.append(decisions)

    @property
    def max_context(self) -> int:
        """Prompt and output tokens that one request may have together."""
        return self.executor.plan.max_context

    def facts(self, pid: int) -> Ready:
        """What clients may want to know of it."""
        device, plan, config = self.executor.device, self.executor.plan, self.config
        return Ready(
            model=config.served_model_name or config.model,
            directory=str(self.directory),
            pid=pid,
            vocab_size=self.model.vocab_size,
            max_context=self.max_context,
            num_layers=device.num_layers,
            dtype=self.executor.dtype,
            device=device.name,
            units=device.total_units,
            menu=[(entry.prefill, entry.decode) for entry in device.menu],
            dispatch=config.dispatch,
            partition=config.partition,
            page_tokens=plan.page_tokens,
            kv_pages=plan.num_pages,
            kv_tokens=plan.tokens,
            max_running=config.max_running,
            slo_ttft=config.slo_ttft,
            slo_tbt=config.slo_tbt,
            eos_token_ids=list(self.model.eos_token_ids),
            prefill_seconds=self._prefill_seconds(),
            decode_seconds=self._decode_seconds(),
        )

    def _prefill_seconds(self) -> list[tuple[int, float]]:
        """What the cost model expects of prompts of a few lengths, each alone on the whole device."""
        units, costs, longest = self.executor.device.total_units, self.scheduler.costs, self.max_context
        lengths = sorted({min(length, longest) for length in (64, 512, 4096)})
        return [(length, float(costs.prefill(PrefillShape.of([(length, 0)]), units))) for length in lengths]

    def _decode_seconds(self) -> list[tuple[int, float]]:
        """What the cost model expects of decode steps over a few numbers of requests, alone on the whole device."""
        units, costs, most = self.executor.device.total_units, self.scheduler.costs, self.config.max_running
        batches = sorted({min(batch, most) for batch in (1, 8, 64)})
        return [(batch, float(costs.decode(DecodeShape(batch, batch * 64), units))) for batch in batches]

    def submit(self, submission: Submit, refused: Callable[[DriftError], None] | None = None) -> None:
        """Queue a request. Raises DriftError when its prompt or sampling is not one this model can take.

        One whose output has a form is queued when that is compiled, on another thread where that takes time;
        `refused` is called instead, perhaps on that thread, when it turns out not to be one. One of the name of a
        request that was cancelled is queued when no lane works on that any more.
        """
        sampling, prompt = submission.sampling, submission.prompt
        self.check(prompt, sampling)
        room = max(
            self.max_context - len(prompt), 1
        )  # a prompt that leaves none is the scheduler's to reject
        request = Request(
            id=submission.id,
            arrival=submission.arrival,
            prompt_tokens=len(prompt),
            max_output_tokens=room if sampling.max_tokens is None else min(sampling.max_tokens, room),
            slo=_targets(submission),
            priority=submission.priority,
            prompt=prompt,
            salt=submission.salt,
            reuse_tokens=submission.reuse_tokens,
        )
        told = refused if refused is not None else _unheard

        def arrive(matcher: Matcher | None = None) -> None:
            with self._arriving:
                self.executor.arrive(request, sampling, matcher)

        if sampling.structured is None:
            self._names.take(request.id, arrive, told)
            return

        def ready(matcher: Matcher) -> None:
            self._names.take(request.id, partial(arrive, matcher), told)

        self._forms(sampling.structured).join(request.id, sampling.structured, ready, told, self._cancel)

    def prepare(self, sampling: SamplingParams) -> None:
        """Compile the form of outputs, if they have one, so that their requests need not wait for it: waits itself.

        Raises DriftError naming the field when it is none.
        """
        if sampling.structured is not None:
            self._forms(sampling.structured).compiled(sampling.structured)

    def check(self, prompt: list[int], sampling: SamplingParams) -> None:
        """Raise DriftError unless prompt and sampling are ones this model can take; lengths are not looked at."""
        sampling.validate(self.model.vocab_size)
        if not prompt:
            raise DriftError("the prompt has no tokens")
        low, high, size = min(prompt), max(prompt), self.model.vocab_size
        if low < 0 or high >= size:
            bad = low if low < 0 else high
            raise DriftError(f"the prompt holds token id {bad}; the vocabulary has 0 to {size - 1}")

    def cached_tokens(self, request_id: str) -> int | None:
        """Leading prompt tokens of a live request that the prefix cache has, or had when it was admitted.

        A look-up, which changes nothing, and which its admission does not have to do again. On the engine's thread.
        """
        tracked = self.scheduler.live.get(request_id)
        if tracked is None:
            return None
        if tracked.scheduled_at is not None:
            return tracked.cached
        return self.executor.kv.lookup(tracked.request, tracked.known)

    def cancel(self, request_id: str, *, stop: bool = False) -> None:
        """End a request; `stop`: it has said enough, which is no cancellation. Unknown ids are no fault."""
        event = RequestCancelled(request_id, FinishReason.STOP if stop else FinishReason.CANCELLED)
        if self._joining is None or not self._joining.hold(event):
            self._cancel(event)

    def observe(self, observer: Observer) -> None:
        """Tell another observer of every step. Before `run`."""
        self._observers.append(observer)

    def run(self, deliver: Callable[[Step], None]) -> None:
        """Serve until `shut_down`, on the calling thread; `deliver` gets every step once."""
        gc.collect()
        gc.freeze()  # looking through the model, torch and the rest for garbage took 80 to 110 ms amid a step
        try:
            serve(
                self.scheduler,
                self.executor,
                lambda step: self._deliver(step, deliver),
                self._observers,
                stopwatch=time.perf_counter,
                on_fault=_dropped,
            )
        finally:
            gc.unfreeze()

    def shut_down(self) -> None:
        """Make `run` return; requests under way are dropped."""
        self.executor.shut_down()

    def close(self) -> None:
        """End the lanes and the decision log. After `run` has returned."""
        if self._joining is not None:
            self._joining.close()
        self.executor.close()
        if self._decisions is not None:
            self._decisions.close()

    def _forms(self, structured: Structured) -> Joining:
        if self._joining is None:
            raise DriftError(f"{structured.field}: this engine holds no output to a form")
        return self._joining

    def _cancel(self, event: RequestCancelled) -> None:
        self._names.leave(event.request_id, partial(self.executor.post, event))

    def _deliver(self, step: Step, deliver: Callable[[Step], None]) -> None:
        if step.ended:
            self._names.free(step.ended)
        for fault in step.faults:
            log.warning("scheduler: %s", fault)
        deliver(step)


def _targets(submission: Submit) -> SLO:
    """Policies reckon with targets, so that none is a very long one."""
    ttft, tbt = min(submission.slo_ttft, NO_TARGET_S), min(submission.slo_tbt, NO_TARGET_S)
    return SLO(ttft, tbt, submission.slo_e2e, submission.slo_class)


def _unheard(error: DriftError) -> None:
    log.error("a request was refused and nobody is there to be told: %s", error)


def _dropped(observer: Observer, error: Exception) -> None:
    log.error("observer %s raised and was dropped", type(observer).__name__, exc_info=error)
