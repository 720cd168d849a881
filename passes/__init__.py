"""Rewrites: Program -> Program, one public function per file, in the order of `PIPELINE`."""

PIPELINE = ("reroll", "canonicalize", "specialize", "generalize", "reduce_passes", "places", "fuse", "partition")
