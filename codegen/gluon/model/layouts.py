"""Gluon's layouts by their names: which thread holds which element.

They decide nothing here but whether two tensors may meet: Gluon refuses an operation on two layouts, and so does this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np


class Layout:
    """Lists are kept as tuples, so that two that say the same are equal."""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, f.name, _plain(getattr(self, f.name)))


def _plain(x: Any) -> Any:
    return tuple(_plain(y) for y in x) if isinstance(x, list | tuple) else x


@dataclass(frozen=True)
class AutoLayout(Layout):
    pass


@dataclass(frozen=True)
class BlockedLayout(Layout):
    size_per_thread: Any
    threads_per_warp: Any
    warps_per_cta: Any
    order: Any
    cga_layout: Any = ()

    @property
    def rank(self) -> int:
        return len(self.order)


@dataclass(frozen=True)
class NVMMADistributedLayout(Layout):
    version: Any
    warps_per_cta: Any
    instr_shape: Any
    cga_layout: Any = ()
    rank = 2


@dataclass(frozen=True)
class SliceLayout(Layout):
    dim: int
    parent: Any

    @property
    def rank(self) -> int:
        return int(self.parent.rank) - 1


@dataclass(frozen=True)
class DotOperandLayout(Layout):
    operand_index: int
    parent: Any
    k_width: int
    rank = 2


@dataclass(frozen=True)
class SwizzledSharedLayout(Layout):
    vec: int
    per_phase: int
    max_phase: int
    order: Any
    cga_layout: Any = ()


class MBarrierLayout(SwizzledSharedLayout):
    def __init__(self, cga_layout: Any = ()) -> None:
        super().__init__(1, 1, 1, (0,), cga_layout)


@dataclass(frozen=True)
class NVMMASharedLayout(Layout):
    swizzle_byte_width: int
    element_bitwidth: int
    rank: int = 2
    transposed: bool = False
    fp4_padded: bool = False
    cga_layout: Any = ()

    @staticmethod
    def get_default_for(block_shape: Sequence[int], dtype: Any, transposed: bool = False, fp4_padded: bool = False,
                        cga_layout: Any = ()) -> NVMMASharedLayout:
        """The widest swizzle that rows of this length allow."""
        shape = [block_shape[-1], *block_shape[1:-1], block_shape[0]] if transposed else list(block_shape)
        inner = shape[-1] * dtype.bits // 8
        width = next((w for w in (128, 64, 32) if inner >= w and inner % w == 0), 0)
        if len(shape) < 2 or int(np.prod(shape[:-1])) < 8:
            width = 0
        return NVMMASharedLayout(width, dtype.bits, len(shape), transposed, fp4_padded, cga_layout)


AUTO = AutoLayout()

__all__ = ["AutoLayout", "BlockedLayout", "DotOperandLayout", "NVMMADistributedLayout", "NVMMASharedLayout",
           "SliceLayout", "SwizzledSharedLayout"]
