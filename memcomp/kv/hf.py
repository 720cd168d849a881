"""A cache for transformers' models that stores what a specification says.

    cache = memcomp.KVCache("kivi{bits=4}", model.config, tokens=2048)
    model.generate(ids, past_key_values=cache)

Attention sees what is stored, decoded: in eager mode torch decodes all of it at every step; compiled with memcomp the
kernels read codes.  Shapes are fixed, so `torch.compile(model, fullgraph=True)` compiles a decoding step once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memcomp.ir.errors import InputError
from memcomp.kv.storage import Storage, regions_of
from memcomp.passes.kv.account import Shape, owner
from memcomp.passes.kv.slots import KVSpec
from memcomp.passes.kv.text import parse

try:
    from transformers.cache_utils import Cache, CacheLayerMixin
except ModuleNotFoundError as error:
    raise InputError("KVCache is a cache for transformers' models, and transformers is not installed",
                     hint="pip install memcomp[hf]; memcomp.kv.storage.Storage needs torch alone") from error


class KVLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a `KVCache`.  reads: the layer whose storage this one has, itself as a rule."""

    is_compileable = True

    def __init__(self, spec: KVSpec, tokens: int, layer: int, layers: int, reads: KVLayer | None = None,
                 tables: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.spec, self.max_cache_len, self.layer, self.layers = spec, tokens, layer, layers
        self.reads, self.tables = reads, tables
        self.storage: Storage | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if self.reads is None:
            batch, heads, _, width = key_states.shape
            if value_states.shape[-1] != width:
                raise InputError(f"keys of {width} channels and values of {value_states.shape[-1]}",
                                 hint="a KVCache stores keys and values of one width")
            self.storage = Storage(self.spec, batch=batch, heads=heads, width=width, tokens=self.max_cache_len,
                                   layer=self.layer, layers=self.layers, dtype=key_states.dtype,
                                   device=key_states.device, tables=self.tables)
            if not torch.compiler.is_compiling():
                for b in self.storage.buffers():
                    torch._dynamo.mark_static_address(b)
        else:
            self.storage = self.reads.storage
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values, [batch, heads, n, width], and give all of them, [batch, heads, tokens, width]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.storage is not None
        if self.reads is None:
            self.storage.append(key_states, value_states)
        return self.storage.read()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_seq_length(self) -> Any:
        return self.storage.length if self.storage is not None else 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        if self.storage is not None:
            self.storage.reset()

    def offload(self) -> None:
        raise InputError("a KVCache stays on its device")

    prefetch = offload

    def crop(self, max_length: int) -> None:
        raise InputError("a KVCache does not take tokens back")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in a new order, for beam search."""
        if self.storage is not None and self.reads is None:
            for b in self.storage.buffers():
                if b.dim() == 4:
                    b.copy_(b.index_select(0, beam_idx.to(b.device)))


class KVCache(Cache):  # type: ignore[misc]
    """spec: a specification, its text, or a system with parameters; config: the model's; tokens: room for so many.

    tables: what a codec must be given, for all layers: "k.T".  One batch size a cache; `reset` forgets all tokens.
    Raises ParseError, and Refusal where the specification is illegal for this model or has no form as torch buffers;
    InputError for more tokens than there is room for.
    """

    def __init__(self, spec: KVSpec | str, config: Any, tokens: int, tables: Mapping[str, Tensor] | None = None
                 ) -> None:
        self.spec = parse(spec) if isinstance(spec, str) else spec
        own = config.get_text_config(decoder=True)
        count, asking = own.num_hidden_layers, own.num_attention_heads
        shape = Shape(layers=count, heads=getattr(own, "num_key_value_heads", None) or asking, tokens=tokens,
                      head=getattr(own, "head_dim", None) or own.hidden_size // asking)
        owners = [owner(self.spec.shares, "layers", n) for n in range(count)]
        for n in dict.fromkeys(owners):
            regions_of(self.spec, shape, n)
        layers: list[KVLayer] = []
        for n, of in enumerate(owners):
            layers.append(KVLayer(self.spec, tokens, n, count, layers[of] if of != n else None, tables))
        super().__init__(layers=layers)

    @property
    def bytes(self) -> int:
        """Of everything that is stored; 0 before the first token."""
        return sum(layer.storage.bytes for layer in self.layers if layer.reads is None and layer.storage is not None)
