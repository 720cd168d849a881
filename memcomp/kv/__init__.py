"""Key-value caches for torch: where what `memcomp.passes.kv` describes lies in memory, and who may write it."""
