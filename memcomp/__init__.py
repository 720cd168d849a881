"""memcomp: a compiler for attention and memory layers."""
