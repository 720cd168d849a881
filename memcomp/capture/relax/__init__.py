"""Relax as an input: functions of TVM's Relax become graphs of torch operators, which the rules of capture read."""

from memcomp.capture.relax.reader import Block, functions, read

__all__ = ["Block", "functions", "read"]
