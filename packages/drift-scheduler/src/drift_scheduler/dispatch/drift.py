"""Drift's own policy: the sharing that gets most work done per second and keeps every TBT target.

Each decision prices the candidates with the cost model, worst case: a loose target favours one fused pass, which
reads the weights once for both phases; a tight one favours a spatial split, where decode need not wait for anything;
in between, temporal slicing wins where a split would cost more than it hides. No fixed choice is right for long, so
none is made: the sharing in use is kept unless another is clearly better.

Work is counted in solo seconds, what it would take alone on the whole device, of both phases: prefill progress alone
would fill a loose target with prompt tokens that hardly gain from being fused, while requests pile up in decode until
no more fit. Prefill counts somewhat more (`prefill_weight`), because a first token ends a wait and makes every later
decode step carry one more; and a lot more (`urgent_weight`) when first tokens are due that need all of the device to be
in time, which is how a burst passes. Slots and pages bound that: as they run out, prompts wait for requests to end and
not for prefill.

The prefill queue is served by earliest TTFT deadline, which serves every prompt in time if any order does. Requests
that cannot make it any more by their uncached work go last, shortest first, so that one lost cause does not sink those
behind it. Least slack first would do as well for one decision, but over many it serves equal prompts in turns, and all
of them late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil, inf

from drift_scheduler.dispatch.exclusive import Alternate, exclusive_decode
from drift_scheduler.dispatch.gang import (
    beside_decode,
    beside_prefill,
    layers_within,
    urgent_prompt,
    worst_decode,
    worst_prefill,
)
from drift_scheduler.dispatch.prompts import Fronts, new_batch, next_block, seconds_alone
from drift_scheduler.dispatch.temporal import layers_in
from drift_scheduler.domain import (
    DecodeStep,
    Gang,
    Partition,
    PrefillBatch,
    PrefillChunk,
    PrefillShape,
    Sharing,
    Waiting,
)
from drift_scheduler.errors import OptionError, positive
from drift_scheduler.protocols import CostModel, PartitionPolicy
from drift_scheduler.view import View

FIXED_SHARE = 0.02
"""Of a prefill pass's time, what it may cost whatever its tokens before larger batches are worth their wait."""

TILE = 64  # fused chunks are whole multiples of this, below which a matmul wastes its tiles


@dataclass(frozen=True, slots=True)
class Option:
    """One way to share the device from now on. `speedup`: weighted solo seconds of work, of both phases, done in a
    second. `meets`: whether step after step keeps the target. `first_token`: seconds until the next token of everyone.
    """

    gang: Gang
    speedup: float
    meets: bool
    first_token: float


class DriftPolicy:
    """`max_batch_tokens`: uncomputed tokens after which a prefill batch is full; twice as many where a pass of so many
    still costs much apart from its tokens, as with tensor parallelism. `scan`: queued requests weighed at a
    time. `hysteresis`: by how much another sharing must be better to displace the one in use. `margin`: share
    of a TBT target that estimates may use. `prefill_weight`: what a second of prefill work counts against one of decode
    work; `urgent_weight`, not less: what it counts when the queue needs the whole device to keep its TTFT targets."""

    ahead = True  # and so `_last` may be what was meant to be launched and was not: no worse a hint

    def __init__(
        self,
        max_batch_tokens: int = 4096,
        scan: int = 64,
        hysteresis: float = 0.05,
        margin: float = 0.99,
        prefill_weight: float = 1.25,
        urgent_weight: float = 10.0,
    ) -> None:
        self._max_tokens = positive("max_batch_tokens", max_batch_tokens)
        self._scan = positive("scan", scan)
        if not 0 <= hysteresis < 10:
            raise OptionError(f"option 'hysteresis' is {hysteresis!r}, need a number from 0 to 10")
        if not 0 < margin <= 1:
            raise OptionError(f"option 'margin' is {margin!r}, need a number above 0 and at most 1")
        if not 0 < prefill_weight <= 100:
            raise OptionError(
                f"option 'prefill_weight' is {prefill_weight!r}, need a number above 0 and at most 100"
            )
        if not prefill_weight <= urgent_weight <= 1000:
            raise OptionError(
                f"option 'urgent_weight' is {urgent_weight!r}, need a number from prefill_weight "
                f"({prefill_weight!r}) to 1000"
            )
        self._weight = prefill_weight
        self._urgent = urgent_weight
        self._load = 0.0  # share of the device that the queue needs to keep its TTFT targets
        self._keep = 1.0 + hysteresis
        self._margin = margin
        self._last: Sharing | None = None
        self._undivided = Alternate(max_batch_tokens)

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        """What the idle lanes do next."""
        partitions = _Reserved(partitions, self._margin)
        if view.prefill_lane.busy:
            return beside_prefill(view, costs, partitions)
        if view.decode_lane.busy:
            return beside_decode(view, costs, partitions, self._next_batch)
        step = view.decode_step()
        batch = self._next_batch(view, costs)
        if batch is None:
            return exclusive_decode(view)
        if step is None:
            left = view.device.num_layers - batch.next_layer
            return Gang(Sharing.EXCLUSIVE, view.device.all_prefill, prefill=next_block(batch, left))
        return self._best(view, costs, partitions, batch, step)

    # --------------------------------------------------------------------------- sharings, priced

    def _best(
        self, view: View, costs: CostModel, partitions: PartitionPolicy, batch: PrefillBatch, step: DecodeStep
    ) -> Gang | None:
        slack = float(view.tbt_slack().min())
        target = view.tbt_target * self._margin
        weight = self._weigh_prefill(view)
        options: list[Option] = []
        if Sharing.SPATIAL in view.device.sharings and view.device.splits():
            options.append(_spatial(view, costs, partitions, batch, step, target, weight))
        if Sharing.FUSED in view.device.sharings and batch.next_layer == 0 and not view.prefills:
            budget = min(slack * self._margin, target)
            fused = _fused(view, costs, batch, step, budget, weight)
            if fused is not None:
                options.append(fused)
        if Sharing.TEMPORAL in view.device.sharings:
            temporal = _temporal(view, costs, batch, step, target, weight)
            if temporal is not None:
                options.append(temporal)
        if not options:
            return self._undivided.choose(view, costs, partitions)
        best = max(options, key=self._rank)
        self._last = best.gang.sharing
        if best.meets and best.first_token > slack:
            # It would keep the target from the second token on; a step of decode alone makes up for what was spent.
            return exclusive_decode(view)
        return best.gang

    def _weigh_prefill(self, view: View) -> float:
        """What prefill work counts now: more from where the queue needs half of the device, for as long as there is
        room for what it would bring to decode."""
        urgency = min(1.0, max(0.0, 2.0 * self._load - 1.0))
        room = min(1.0 - view.num_running / view.max_running, view.free_pages / view.total_pages)
        return self._weight + (self._urgent - self._weight) * urgency * max(0.0, room)

    def _rank(self, option: Option) -> tuple[bool, float]:
        kept = option.gang.sharing is self._last
        return option.meets, option.speedup * (self._keep if kept else 1.0)

    # ------------------------------------------------------------------------------------- the queue

    def _next_batch(self, view: View, costs: CostModel) -> PrefillBatch | None:
        """The batch under way, an urgent prompt that may overtake it, or the prompts that are due first."""
        if view.prefills:
            return urgent_prompt(view, costs, self._scan) or view.prefills[-1]
        if not view.num_waiting:
            return None
        return self._by_deadline(view, costs)

    def _by_deadline(self, view: View, costs: CostModel) -> PrefillBatch | None:
        units, now = view.device.total_units, view.now
        queue = view.waiting(self._scan)
        timely: list[tuple[float, int, float, Waiting]] = []  # (deadline, order, seconds alone, prompt)
        late: list[tuple[float, int, float, Waiting]] = []  # (seconds alone, ...)
        for order, (waiting, took) in enumerate(zip(queue, seconds_alone(costs, queue, units), strict=True)):
            if waiting.deadline < now + took:
                late.append((took, order, took, waiting))
            else:
                timely.append((waiting.deadline, order, took, waiting))
        timely.sort()
        late.sort()
        self._load = _load(view, costs, timely)
        chunks: list[PrefillChunk] = []
        tokens, pages = 0, view.free_pages
        most = self._max_tokens
        for _, _, _, waiting in chain(timely, late):
            if chunks and tokens + waiting.uncomputed > most == self._max_tokens:
                most *= _batches_worth(costs, units, most)
            if chunks and (tokens + waiting.uncomputed > most or waiting.pages > pages):
                break
            chunks.append(PrefillChunk(waiting.request.id, waiting.computed, waiting.total))
            tokens += waiting.uncomputed
            pages -= waiting.pages
        return new_batch(tuple(chunks)) if chunks else None


@dataclass(frozen=True, slots=True)
class _Reserved:
    """A partition policy whose splits also keep the margin: the next split with more decode units where one does."""

    inner: PartitionPolicy
    margin: float

    def split(self, view: View, prefill: PrefillShape, decode: DecodeStep, costs: CostModel) -> Partition:
        """The inner policy's, unless only another one keeps the margin."""
        chosen = self.inner.split(view, prefill, decode, costs)
        target = view.tbt_target * self.margin
        if worst_decode(costs, prefill, decode, chosen) <= target:
            return chosen
        for split in view.device.splits():
            if split.decode > chosen.decode and worst_decode(costs, prefill, decode, split) <= target:
                return split
        return chosen


def _spatial(
    view: View,
    costs: CostModel,
    partitions: PartitionPolicy,
    batch: PrefillBatch,
    step: DecodeStep,
    target: float,
    weight: float,
) -> Option:
    """Decode on its part, prefill layers beside it for as long as it runs."""
    split = partitions.split(view, batch.shape, step, costs)
    t_decode = worst_decode(costs, batch.shape, step, split)
    layers = layers_within(view, costs, batch, step, split, t_decode)
    gang = Gang(Sharing.SPATIAL, split, prefill=next_block(batch, layers), decode=step)
    t_prefill = worst_prefill(costs, batch.shape, step, split)
    units = view.device.total_units
    speedup = weight * _per(costs.prefill(batch.shape, units), t_prefill)
    speedup += _per(costs.decode(step.shape(), units), t_decode)
    return Option(gang, speedup, t_decode <= target, t_decode)


def _temporal(
    view: View,
    costs: CostModel,
    batch: PrefillBatch,
    step: DecodeStep,
    target: float,
    weight: float,
) -> Option | None:
    """Decode, then the layers that leave time for the next decode step before the tightest token is late."""
    device = view.device
    slow_prefill, slow_decode = costs.slowdown(batch.shape, step.shape(), device.all_decode)
    solo_decode = costs.decode(step.shape(), device.total_units)
    t_decode = solo_decode * slow_decode
    fitting = layers_in(view, costs, batch, (target - t_decode) / slow_prefill)
    layers = min(fitting, device.num_layers - batch.next_layer)
    if layers < 1:
        return None
    solo_block = costs.prefill(batch.shape, device.total_units) * layers / device.num_layers
    gang = Gang(Sharing.TEMPORAL, device.all_decode, prefill=next_block(batch, layers), decode=step)
    seconds = t_decode + solo_block * slow_prefill + _launching(costs)
    return Option(gang, _per(solo_decode + weight * solo_block, seconds), True, t_decode)


def _fused(
    view: View, costs: CostModel, batch: PrefillBatch, step: DecodeStep, budget: float, weight: float
) -> Option | None:
    """One pass over decode and the number of prompt tokens within the budget that pays most."""
    units, total = view.device.total_units, batch.shape.new_tokens
    decode, launch = step.shape(), _launching(costs)
    slow = max(costs.slowdown(batch.shape, decode, view.device.all_decode))

    fronts = Fronts(batch)
    priced: dict[int, float] = {}

    def seconds(tokens: int) -> float:
        took = priced.get(tokens)
        if took is None:
            took = priced[tokens] = costs.fused(fronts.shape(tokens), decode, units) * slow + launch
        return took

    most = _largest_within(seconds, total, budget)
    if most is None:
        return None
    per_token = costs.prefill(batch.shape, units) / total
    t_decode = costs.decode(decode, units)
    speedup, tokens = max((_per(weight * n * per_token + t_decode, seconds(n)), n) for n in _sizes(most))
    part = PrefillBatch(-1, fronts.chunks(tokens), 0, inf, fronts.shape(tokens))
    block = next_block(part, view.device.num_layers)
    gang = Gang(Sharing.FUSED, view.device.all_decode, prefill=block, decode=step)
    return Option(gang, speedup, True, seconds(tokens))


def _load(view: View, costs: CostModel, queue: Sequence[tuple[float, int, float, Waiting]]) -> float:
    """Share of the device that prefill needs from now on to give each of these its first token in time; at most 1
    where all can be. `queue`: deadline (ahead of now), a number, seconds alone, prompt; earliest deadline first.

    That of the hardest deadline: the work due until then over the time until then. Prompts share passes, so that they
    take less together than one after another.
    """
    if not queue:
        return 0.0
    shape = PrefillShape.of([(w.total - w.computed, w.computed) for _, _, _, w in queue])
    alone = sum([took for _, _, took, _ in queue])
    shared = costs.prefill(shape, view.device.total_units) / alone if alone > 0 else 1.0
    now, work, load = view.now, 0.0, 0.0
    for deadline, _, took, _ in queue:
        work += took * shared
        if work > load * (deadline - now):
            load = _per(work, deadline - now)
    return load


def _batches_worth(costs: CostModel, units: int, tokens: int) -> int:
    """2 where two passes over so many tokens take notably longer than one over all, else 1."""
    half = [(max(1, tokens // 8), 0)] * 4  # requests of some length: attention is the same in one pass or two
    whole = costs.prefill(PrefillShape.of(half * 2), units)
    fixed = 2 * costs.prefill(PrefillShape.of(half), units) - whole
    return 2 if fixed > FIXED_SHARE * whole else 1


def _sizes(most: int) -> list[int]:
    """`most` tokens, and every power of two of tiles below."""
    sizes, tokens = [most], TILE
    while tokens < most:
        sizes.append(tokens)
        tokens *= 2
    return sizes


def _per(work: float, seconds: float) -> float:
    """Work in a second; without limit for a cost model that says nothing takes any time."""
    return work / seconds if seconds > 0 else inf


def _launching(costs: CostModel) -> float:
    """Seconds that launching a prefill block adds."""
    return float(getattr(costs, "block_seconds", 0.0))


def _largest_within(seconds: Callable[[int], float], total: int, budget: float) -> int | None:
    """The most tokens, in whole tiles, that take at most `budget` seconds; `None` when not one tile does."""
    if seconds(total) <= budget:
        return total
    low, high = 0, ceil(total / TILE)  # in tiles; `low` fits, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        if seconds(middle * TILE) <= budget:
            low = middle
        else:
            high = middle
    return low * TILE if low else None
