"""Rewrites: Program -> Program, one public function per file, in the order of `PIPELINE`."""

PIPELINE = ("canonicalize", "generalize", "reduce_passes", "fuse", "partition")
