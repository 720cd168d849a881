"""Rewrites: Program -> Program, one public function per file, in the order of `PIPELINE`."""

PIPELINE = ("reroll", "canonicalize", "specialize", "generalize", "fold", "reduce_passes", "spell_places", "fuse",
            "partition")
