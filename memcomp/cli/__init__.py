"""The commands of `memcomp`: a module each, with `add(commands)` for its options and what runs it.

`parser` puts them together, `options` and `given` are what they share: how inputs are named, read, and results written.
"""
