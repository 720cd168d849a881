"""Rewrites: Program -> Program, one public function per file, in the order of `PIPELINE`."""

PIPELINE = ("canonicalize", "specialize", "generalize", "reduce_passes", "fuse", "partition")
