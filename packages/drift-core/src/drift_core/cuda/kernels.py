"""What a lane needs of kernels: ops for a number of multiprocessors, attention over lists of work, choosing
tokens.

`TritonKernels` are the ones of `drift_kernels.triton_ops`; `ReferenceKernels` compute the same in plain torch
on the CPU, for the stub device. Whatever belongs to one lane alone is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from drift_core.cuda.buffers import ListSize, PassBuffers
from drift_core.cuda.decode_work import DecodeWork, Ints, fastest_cut
from drift_core.cuda.device import Accelerator
from drift_core.model.config import ModelConfig
from drift_kernels import reference
from drift_kernels.inputs import AttentionInputs
from drift_kernels.ops import Ops, ReferenceOps, select_ops
from drift_kernels.triton_ops import plan, tiles
from drift_scheduler.domain import Lane

if TYPE_CHECKING:
    from drift_kernels.triton_ops.attention import DeviceWork


class SampleRows(Protocol):
    """How to choose each row's token: arrays on the device, one entry a row."""

    @property
    def temperature(self) -> Tensor: ...

    @property
    def top_k(self) -> Tensor: ...

    @property
    def top_p(self) -> Tensor: ...

    @property
    def min_p(self) -> Tensor: ...

    @property
    def seeds(self) -> Tensor: ...

    @property
    def positions(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Draws:
    """`SampleRows` as stored."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor


@dataclass(frozen=True, slots=True)
class Scratch:
    """One lane's own: partial attention results, and what choosing tokens needs."""

    partial: Tensor
    partial_weight: Tensor
    peaks: Tensor
    places: Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model and its pool decides the kernels."""

    heads: int
    kv_heads: int
    head: int
    page_tokens: int
    window: int | None
    """What lists are cut for: `None` as soon as one layer sees everything."""

    @classmethod
    def of(cls, config: ModelConfig, page_tokens: int) -> Shape:
        """A model's."""
        return cls(config.num_heads, config.num_kv_heads, config.head_dim, page_tokens, config.sliding_window)

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.heads // self.kv_heads


class Kernels(Protocol):
    """See the module."""

    @property
    def description(self) -> str: ...

    def ops(self, num_sms: int) -> Ops: ...

    def narrow_size(self, sequences: int, num_sms: int) -> ListSize:
        """Room for the list of a decode step."""

    def wide_size(self, sequences: int, tokens: int, num_sms: int) -> ListSize:
        """Room for the list of prefill chunks."""

    def cut_narrow(self, context: Ints, num_sms: int) -> DecodeWork:
        """The work of decode rows that see `context` keys each."""

    def cut_wide(self, first: int, query: Ints, context: Ints, num_sms: int) -> plan.WorkList:
        """The work of chunks; they are the sequences from `first` on."""

    def scratch(self, accelerator: Accelerator, lane: Lane, samples: int, num_sms: int) -> Scratch:
        """A lane's own, for up to `num_sms`."""

    def inputs(
        self,
        laid: AttentionInputs,
        buffers: PassBuffers,
        names: tuple[str, ...],
        scratch: Scratch,
        num_sms: int,
    ) -> AttentionInputs:
        """Inputs over static buffers whose lists of work are `names` ("narrow", "wide")."""

    def mask(self, logits: Tensor, picked: Tensor, words: Tensor, num_sms: int) -> None:
        """Forbid tokens of rows `picked` of float32 logits[R, V] in place, by bits; see `reference.mask_logits`."""

    def choose(
        self, logits: Tensor, out: Tensor, rows: SampleRows | None, scratch: Scratch, num_sms: int
    ) -> None:
        """out[R] = a token per row of float32 logits[R, V]; without `rows` the likeliest one."""


class _Lists:
    """Lists of work, cut alike for both."""

    def __init__(self, shape: Shape, architecture: int) -> None:
        self.shape = shape
        self._cut = fastest_cut()
        head = max(shape.head, tiles.HEAD_SIZES[0])  # the reference takes smaller ones too
        self.narrow = tiles.narrow_tile(architecture, head)
        self.wide = tiles.wide_tile(architecture, head)
        if shape.group > self.narrow.rows:
            self.narrow = self.wide

    def narrow_size(self, sequences: int, num_sms: int) -> ListSize:
        programs = num_sms * self.narrow.programs_per_sm
        spans = plan.most_spans(sequences, sequences, self.shape.group, self.shape.kv_heads, self.narrow.rows)
        return ListSize(programs, plan.most_items(spans, programs), plan.most_slots(programs))

    def wide_size(self, sequences: int, tokens: int, num_sms: int) -> ListSize:
        programs = num_sms * self.wide.programs_per_sm
        spans = plan.most_spans(sequences, tokens, self.shape.group, self.shape.kv_heads, self.wide.rows)
        return ListSize(programs, plan.most_items(spans, programs), plan.most_slots(programs))

    def cut_narrow(self, context: Ints, num_sms: int) -> DecodeWork:
        tile, shape = self.narrow, self.shape
        programs = num_sms * tile.programs_per_sm
        if programs < shape.kv_heads or programs % shape.kv_heads > programs * MOST_IDLE:
            return self._cut_together(context, programs)
        return self._cut(context, shape.kv_heads, tile.keys, tile.least_keys, programs, shape.window)

    def _cut_together(self, context: Ints, programs: int) -> DecodeWork:
        """All heads in one line: slower, for programs that the heads cannot share out evenly."""
        shape, rows = self.shape, np.arange(len(context))
        query = np.ones_like(context)
        cut = plan.build_work_list(
            rows, query, context, shape.group, shape.kv_heads, self.narrow, programs, shape.window
        )
        return DecodeWork(
            cut.bounds, cut.items, cut.merges, np.flatnonzero(cut.items[:, 4] == context[cut.items[:, 0]])
        )

    def cut_wide(self, first: int, query: Ints, context: Ints, num_sms: int) -> plan.WorkList:
        shape, programs = self.shape, num_sms * self.wide.programs_per_sm
        lead = np.zeros(first, np.int64)
        return plan.build_work_list(
            first + np.arange(len(query)),
            np.concatenate([lead, query]),
            np.concatenate([lead, context]),
            shape.group,
            shape.kv_heads,
            self.wide,
            programs,
            shape.window,
        )

    def scratch(self, accelerator: Accelerator, lane: Lane, samples: int, num_sms: int) -> Scratch:
        rows = max(
            plan.most_slots(num_sms * tile.programs_per_sm) * tile.rows for tile in (self.narrow, self.wide)
        )
        pieces = samples * MOST_PIECES
        head = tiles.padded_head(self.shape.head)
        return Scratch(
            accelerator.empty((rows * head,), torch.float32, lane),
            accelerator.empty((rows,), torch.float32, lane),
            accelerator.empty((pieces,), torch.float32, lane),
            accelerator.empty((pieces,), torch.int32, lane),
        )


MOST_IDLE = 0.08
"""The share of programs that cutting per kv head may leave without work."""

MOST_PIECES = 64
"""`drift_kernels.triton_ops.sampling.MOST_PIECES`, which cannot be imported without Triton."""


class TritonKernels(_Lists):
    """The kernels for a device of compute capability 8.0 or later. Raises ValueError for a shape they do not take."""

    def __init__(self, shape: Shape, capability: int, dtype: torch.dtype) -> None:
        from drift_kernels.triton_ops import attention, sampling
        from drift_kernels.triton_ops.lane import PlannedInputs

        tiles.check_head(shape.head)
        super().__init__(shape, tiles.nearest_architecture(capability))
        self._attention, self._sampling, self._planned = attention, sampling, PlannedInputs
        self._dtype = dtype
        self._ops: dict[int, Ops] = {}

    @property
    def description(self) -> str:
        """Which kernels."""
        return "Triton kernels"

    def ops(self, num_sms: int) -> Ops:
        """One object per number of multiprocessors."""
        if num_sms not in self._ops:
            self._ops[num_sms] = select_ops("cuda", self._dtype, native=True, num_sms=num_sms)
        return self._ops[num_sms]

    def inputs(
        self,
        laid: AttentionInputs,
        buffers: PassBuffers,
        names: tuple[str, ...],
        scratch: Scratch,
        num_sms: int,
    ) -> AttentionInputs:
        """The lists as the kernels read them."""
        lists = [self._device_work(buffers, name, scratch, num_sms) for name in names]
        return self._planned(
            query_starts=laid.query_starts,
            context_lens=laid.context_lens,
            page_table=laid.page_table,
            slots=laid.slots,
            positions=laid.positions,
            max_query=laid.max_query,
            max_context=laid.max_context,
            scale=laid.scale,
            window=laid.window,
            narrow=lists[0],
            wide=lists[1] if len(lists) > 1 else None,
            num_sms=num_sms,
        )

    def mask(self, logits: Tensor, picked: Tensor, words: Tensor, num_sms: int) -> None:
        """On the device."""
        self._sampling.launch_mask(logits, picked, words, num_sms)

    def choose(
        self, logits: Tensor, out: Tensor, rows: SampleRows | None, scratch: Scratch, num_sms: int
    ) -> None:
        """On the device, without allocating."""
        if rows is None:
            self._sampling.launch_argmax(logits, out, scratch.peaks, scratch.places, num_sms)
            return
        columns = self._sampling.SamplingRows(
            rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seeds, rows.positions
        )
        self._sampling.launch_sample(logits, out, columns, num_sms)

    def _device_work(self, buffers: PassBuffers, name: str, scratch: Scratch, num_sms: int) -> DeviceWork:
        tile = self.narrow if name == "narrow" else self.wide
        return self._attention.DeviceWork(
            tile=tile,
            bounds=buffers.tensor(f"{name}_bounds")[: num_sms * tile.programs_per_sm + 1],
            items=buffers.tensor(f"{name}_items").view(-1, plan.ITEM_WORDS),
            merges=buffers.tensor(f"{name}_merges").view(-1, plan.MERGE_WORDS),
            merge_count=buffers.tensor(f"{name}_count"),
            partial=scratch.partial,
            partial_weight=scratch.partial_weight,
        )


class ReferenceKernels(_Lists):
    """The torch specification, lists of work cut all the same. For the CPU: attention reads lengths on the host."""

    description = "torch reference"

    def __init__(self, shape: Shape, architecture: int = 90) -> None:
        super().__init__(shape, architecture)
        self._shared = ReferenceOps()

    def ops(self, num_sms: int) -> Ops:
        """The same whatever the partition."""
        return self._shared

    def inputs(
        self,
        laid: AttentionInputs,
        buffers: PassBuffers,
        names: tuple[str, ...],
        scratch: Scratch,
        num_sms: int,
    ) -> AttentionInputs:
        """Lengths and pages say it all."""
        return laid

    def mask(self, logits: Tensor, picked: Tensor, words: Tensor, num_sms: int) -> None:
        """The reference."""
        reference.mask_logits(logits, picked, words)

    def choose(
        self, logits: Tensor, out: Tensor, rows: SampleRows | None, scratch: Scratch, num_sms: int
    ) -> None:
        """Argmax, or the reference's filters and draw."""
        if rows is None:
            out.copy_(logits.argmax(-1))
            return
        draws = reference.philox_uniform(rows.seeds, rows.positions)
        out.copy_(reference.sample(logits, rows.temperature, rows.top_k, rows.top_p, rows.min_p, draws))
