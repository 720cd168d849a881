"""Capture: from a torch graph to regions, each a Program that means the same."""

from memcomp.capture.find import find_regions
from memcomp.capture.region import Refused, Region
from memcomp.capture.torch_reader import capture, read_exported

__all__ = ["Refused", "Region", "capture", "find_regions", "read_exported"]
