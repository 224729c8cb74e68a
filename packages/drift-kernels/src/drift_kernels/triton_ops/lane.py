"""The buffers of one lane's attention: made once, refilled each step by one copy, at addresses that never change.

Knows nothing of requests, streams or graphs, except that the host must not overwrite what a copy still reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drift_kernels.inputs import AttentionInputs, PageTables
from drift_kernels.triton_ops import plan, tiles
from drift_kernels.triton_ops.attention import DeviceWork, launch_attention
from drift_kernels.triton_ops.plan import Ints

_ALIGNED_WORDS = 16  # of 4 bytes; every array starts at a multiple, so that loads vectorise
_STAGES = 2  # host buffers: one is filled while the other may still be read by a copy

Words = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What of a model decides the kernels: query heads, kv heads, head size, tokens per page."""

    heads: int
    kv_heads: int
    head: int
    page_tokens: int

    def __post_init__(self) -> None:
        tiles.check_head(self.head)
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} kv heads evenly")
        if self.page_tokens < 16:
            raise ValueError(
                f"page_tokens is {self.page_tokens}; the kernels take pages of 16 tokens or more"
            )

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class PlannedInputs(AttentionInputs):
    """AttentionInputs whose work is already cut and on the device; valid until the lane plans the next step."""

    narrow: DeviceWork
    wide: DeviceWork | None  # None: no sequence has more rows than a narrow tile
    num_sms: int

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, out: Tensor) -> None:
        """Fill out[T, Hq, D], narrow and wide sequences each in their own launches; padding rows are left alone."""
        for work in (self.narrow, self.wide):
            if work is not None:
                launch_attention(
                    q, k_pages, v_pages, out, self.query_starts, self.context_lens, self.page_table,
                    work, self.scale, self.window, self.num_sms,
                )  # fmt: skip


class AttentionLane:
    """Device buffers for steps of up to `sequences`, `tokens` query tokens and `context` tokens per sequence.

    `most_sms` bounds the partitions this lane will run on. Lanes that run at the same time need one each: scratch
    must not be shared.
    """

    def __init__(
        self,
        shape: AttentionShape,
        sequences: int,
        tokens: int,
        context: int,
        most_sms: int,
        architecture: int,
        device: str | torch.device,
    ) -> None:
        self.shape = shape
        self.sequences, self.tokens, self.context, self.most_sms = sequences, tokens, context, most_sms
        self._narrow = tiles.narrow_tile(architecture, shape.head)
        self._wide = tiles.wide_tile(architecture, shape.head)
        if shape.group > self._narrow.rows:
            self._narrow = self._wide
        self._layout, total = _lay_out(self._sizes())
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        on_device = self._device.device.type == "cuda"
        self._staging = [torch.zeros(total, dtype=torch.int32, pin_memory=on_device) for _ in range(_STAGES)]
        self._copied = [_event() if on_device else None for _ in range(_STAGES)]
        self._turn = 0
        self._scratch = torch.empty(self._scratch_elements(shape.head), dtype=torch.float32, device=device)
        self._weights = torch.empty(self._scratch_elements(1), dtype=torch.float32, device=device)

    def plan(
        self,
        query_lens: Sequence[int] | npt.NDArray[np.integer],
        context_lens: Sequence[int] | npt.NDArray[np.integer],
        page_tables: PageTables,
        scale: float,
        num_sms: int,
        window: int | None = None,
        padded_tokens: int | None = None,
    ) -> PlannedInputs:
        """Cut one step's work for a partition of `num_sms` and send it to the device on the current stream.

        padded_tokens: rows of a captured graph's bucket; those past the last query token get slot -1. Raises ValueError
        when the step exceeds the lane's buffers, or as AttentionInputs.build does.
        """
        laid = AttentionInputs.build(
            query_lens, context_lens, page_tables, self.shape.page_tokens, scale, window
        )
        query, context = np.asarray(query_lens, np.int64), np.asarray(context_lens, np.int64)
        rows = padded_tokens or laid.slots.shape[0]
        self._check(laid, rows, num_sms)
        host = self._next_staging()
        self._fill(host, "query_starts", laid.query_starts.numpy())
        self._fill(host, "context_lens", laid.context_lens.numpy())
        table = laid.page_table.numpy()
        self._view(host, "page_table").reshape(self.sequences, -1)[: len(table), : table.shape[1]] = table
        self._view(host, "slots").view(np.int64)[: self.tokens] = -1
        self._fill(host, "slots", laid.slots.numpy().view(np.int32))
        self._fill(host, "positions", laid.positions.numpy().view(np.int32))
        fits = query * self.shape.group <= self._narrow.rows
        wide_too = not bool(fits.all())
        for name, tile, chosen in (("narrow", self._narrow, fits), ("wide", self._wide, ~fits)):
            self._fill_work(host, name, tile, chosen.nonzero()[0], query, context, num_sms, window)
        self._send(host)
        return self._planned(laid, rows, wide_too, num_sms)

    def _fill_work(
        self,
        host: Words,
        name: str,
        tile: tiles.Tile,
        sequences: Ints,
        query: Ints,
        context: Ints,
        num_sms: int,
        window: int | None,
    ) -> None:
        programs = num_sms * tile.programs_per_sm
        if not len(sequences):  # a captured launch finds nothing to do
            self._view(host, f"{name}_bounds")[:] = 0
            self._view(host, f"{name}_merge_count")[0] = 0
            return
        work = plan.build_work_list(
            sequences, query, context, self.shape.group, self.shape.kv_heads, tile, programs, window
        )
        self._fill(host, f"{name}_bounds", work.bounds)
        self._fill(host, f"{name}_items", work.items.reshape(-1))
        self._fill(host, f"{name}_merges", work.merges.reshape(-1))
        self._view(host, f"{name}_merge_count")[0] = len(work.merges)

    def _planned(self, laid: AttentionInputs, rows: int, wide_too: bool, num_sms: int) -> PlannedInputs:
        sequences = laid.context_lens.shape[0]
        return PlannedInputs(
            query_starts=self._tensor("query_starts")[: sequences + 1],
            context_lens=self._tensor("context_lens")[:sequences],
            page_table=self._tensor("page_table").view(self.sequences, -1)[:sequences],
            slots=self._tensor("slots").view(torch.int64)[:rows],
            positions=self._tensor("positions").view(torch.int64)[:rows],
            max_query=laid.max_query,
            max_context=laid.max_context,
            scale=laid.scale,
            window=laid.window,
            narrow=self._work("narrow", self._narrow, num_sms),
            wide=self._work("wide", self._wide, num_sms) if wide_too else None,
            num_sms=num_sms,
        )

    def _work(self, name: str, tile: tiles.Tile, num_sms: int) -> DeviceWork:
        return DeviceWork(
            tile=tile,
            bounds=self._tensor(f"{name}_bounds")[: num_sms * tile.programs_per_sm + 1],
            items=self._tensor(f"{name}_items").view(-1, plan.ITEM_WORDS),
            merges=self._tensor(f"{name}_merges").view(-1, plan.MERGE_WORDS),
            merge_count=self._tensor(f"{name}_merge_count")[:1],
            partial=self._scratch,
            partial_weight=self._weights,
        )

    def _sizes(self) -> dict[str, int]:
        """int32 words of every array."""
        sizes = {
            "query_starts": self.sequences + 1,
            "context_lens": self.sequences,
            "page_table": self.sequences * -(-self.context // self.shape.page_tokens),
            "slots": 2 * self.tokens,
            "positions": 2 * self.tokens,
        }
        # A narrow sequence is one tile of rows; a step's query tokens bound the tiles of the wide ones.
        spans = {
            "narrow": self.sequences * self.shape.kv_heads,
            "wide": plan.most_spans(
                self.sequences, self.tokens, self.shape.group, self.shape.kv_heads, self._wide.rows
            ),
        }
        for name, tile in (("narrow", self._narrow), ("wide", self._wide)):
            programs = self.most_sms * tile.programs_per_sm
            sizes[f"{name}_bounds"] = programs + 1
            sizes[f"{name}_items"] = plan.most_items(spans[name], programs) * plan.ITEM_WORDS
            sizes[f"{name}_merges"] = plan.most_slots(programs) * plan.MERGE_WORDS
            sizes[f"{name}_merge_count"] = 1
        return sizes

    def _scratch_elements(self, head: int) -> int:
        """Of the larger of the two launches: they follow each other on one stream."""
        return max(
            plan.most_slots(self.most_sms * tile.programs_per_sm) * tile.rows * head
            for tile in (self._narrow, self._wide)
        )

    def _check(self, laid: AttentionInputs, rows: int, num_sms: int) -> None:
        have = {
            "sequences": (laid.context_lens.shape[0], self.sequences),
            "query tokens": (max(rows, laid.slots.shape[0]), self.tokens),
            "tokens of context": (laid.max_context, self.context),
            "multiprocessors": (num_sms, self.most_sms),
        }
        for what, (wanted, most) in have.items():
            if wanted > most:
                raise ValueError(f"the step has {wanted} {what}; this lane's buffers take {most}")
        if rows < laid.slots.shape[0]:
            raise ValueError(f"padded_tokens is {rows}, the step has {laid.slots.shape[0]} query tokens")
        if num_sms < 1:
            raise ValueError(f"num_sms must be at least 1, got {num_sms}")

    def _next_staging(self) -> Words:
        self._turn = (self._turn + 1) % _STAGES
        event = self._copied[self._turn]
        if event is not None:
            event.synchronize()  # the copy of two steps ago: over, unless the host runs far ahead
        return cast(Words, self._staging[self._turn].numpy())

    def _send(self, host: Words) -> None:
        self._device.copy_(self._staging[self._turn], non_blocking=True)
        event = self._copied[self._turn]
        if event is not None:
            event.record()

    def _view(self, host: Words, name: str) -> Words:
        start, size = self._layout[name]
        return host[start : start + size]

    def _fill(self, host: Words, name: str, values: Words) -> None:
        self._view(host, name)[: len(values)] = values

    def _tensor(self, name: str) -> Tensor:
        start, size = self._layout[name]
        return self._device[start : start + size]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _lay_out(sizes: dict[str, int]) -> tuple[dict[str, tuple[int, int]], int]:
    """Where each array lies in one flat buffer: name -> (first word, words), and the total."""
    places: dict[str, tuple[int, int]] = {}
    start = 0
    for name, size in sizes.items():
        places[name] = (start, size)
        start += -(-size // _ALIGNED_WORDS) * _ALIGNED_WORDS
    return places, start
