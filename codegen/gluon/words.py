"""What an emitted Gluon module begins with.  Elementwise words have the names that they have in Triton."""

from __future__ import annotations

import re

HEAD = '''\
import triton
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

INTERPRET = gl.constexpr(False)
NAN = gl.constexpr(triton.language.PropagateNan.ALL)
fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the second until Triton 3.6
'''
RESERVED = {"gl", "gluon", "fence_async_shared", "mbarrier", "tma", "warpgroup_mma", "warpgroup_mma_wait", "fetch",
            "half"}


def spoken(text: str) -> str:
    """Triton text as Gluon text."""
    return re.sub(r"\btl\.", "gl.", text).replace("@triton.jit", "@gluon.jit")
