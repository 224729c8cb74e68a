"""Tile shapes per architecture, as data: what the table of docs/kernels.md was compiled from.

Knows nothing of Triton: an architecture is its compute capability as one number, 90 for 9.0. Shapes are bounded
by registers and shared memory (tests hold every row to both); which of the fitting ones is fastest is for a
device to say.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD_SIZES = (64, 80, 96, 128, 256)


@dataclass(frozen=True, slots=True)
class Tile:
    """One shape of the attention kernel. A row is one query token of one query head."""

    rows: int
    keys: int
    warps: int
    stages: int  # depth of the software pipeline over keys
    programs_per_sm: int  # programs that the shared memory and registers of one multiprocessor hold at once
    least_keys: int  # a program's share is not cut finer than this

    @property
    def most_registers(self) -> int:
        """Registers of a thread with which `programs_per_sm` still fit."""
        return min(255, 65536 // (self.programs_per_sm * self.warps * 32) // 8 * 8)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one architecture has. Bytes of shared memory: of one program, and of a multiprocessor."""

    program_shared: int
    sm_shared: int
    registers: int = 65536  # 32-bit, per multiprocessor
    reserved_shared: int = 1024  # of each program, taken by the system


LIMITS = {
    80: Limits(166912, 167936),
    89: Limits(101376, 102400),
    90: Limits(232448, 233472),
    100: Limits(232448, 233472),
    120: Limits(101376, 102400),
}
ARCHITECTURES = tuple(LIMITS)


def nearest_architecture(capability: int) -> int:
    """The architecture of the tables whose tiles fit a device: 86 is served by 89's, 103 by 100's.

    Raises ValueError below 8.0, where bf16 matrix instructions are missing.
    """
    if capability < 80:
        raise ValueError(
            f"compute capability {capability / 10:.1f} is not supported; the kernels need 8.0 or later"
        )
    if capability in (86, 87, 88):
        return 89  # their shared memory is the smaller one
    return max(known for known in ARCHITECTURES if known <= capability)


def padded_head(head: int) -> int:
    """Head size rounded up to a power of two."""
    return 1 << (head - 1).bit_length()


# Few rows per sequence, bound by memory: enough bytes in flight matter. Key: padded head size.
_NARROW = {
    80: {64: Tile(16, 64, 4, 5, 3, 128), 128: Tile(16, 64, 4, 3, 3, 128), 256: Tile(16, 32, 4, 3, 2, 128)},
    89: {64: Tile(16, 64, 4, 4, 3, 128), 128: Tile(16, 32, 4, 5, 2, 128), 256: Tile(16, 32, 4, 3, 2, 128)},
    90: {64: Tile(16, 64, 4, 4, 4, 128), 128: Tile(16, 64, 4, 5, 3, 128), 256: Tile(16, 32, 4, 5, 2, 128)},
    100: {64: Tile(16, 64, 4, 4, 4, 128), 128: Tile(16, 64, 4, 5, 3, 128), 256: Tile(16, 32, 4, 5, 2, 128)},
    120: {64: Tile(16, 64, 4, 4, 3, 128), 128: Tile(16, 32, 4, 5, 2, 128), 256: Tile(16, 32, 4, 3, 2, 128)},
}
# Many rows per sequence, bound by the matrix units. Where the accumulator is in registers, larger tiles spill.
_WIDE = {
    80: {64: Tile(128, 64, 8, 3, 1, 256), 128: Tile(128, 32, 8, 2, 1, 256), 256: Tile(64, 32, 8, 3, 1, 256)},
    89: {64: Tile(128, 64, 8, 3, 1, 256), 128: Tile(64, 32, 4, 2, 2, 256), 256: Tile(64, 32, 8, 3, 1, 256)},
    90: {64: Tile(128, 64, 8, 3, 1, 256), 128: Tile(128, 64, 8, 3, 1, 256), 256: Tile(64, 32, 8, 3, 1, 256)},
    100: {64: Tile(128, 64, 8, 3, 1, 256), 128: Tile(128, 64, 8, 3, 1, 256), 256: Tile(64, 16, 8, 3, 1, 256)},
    120: {64: Tile(128, 64, 8, 3, 1, 256), 128: Tile(64, 32, 4, 2, 2, 256), 256: Tile(64, 32, 8, 3, 1, 256)},
}


def narrow_tile(architecture: int, head: int) -> Tile:
    """For sequences with at most `rows` query rows per kv head: decode."""
    return _NARROW[architecture][padded_head(head)]


def wide_tile(architecture: int, head: int) -> Tile:
    """For sequences with more rows: prefill."""
    return _WIDE[architecture][padded_head(head)]


def check_head(head: int) -> None:
    """Raises ValueError for a head size without tiles."""
    if head not in HEAD_SIZES:
        raise ValueError(f"head size {head} has no kernel; choose {', '.join(map(str, HEAD_SIZES))}")
