"""The algebra behind `reduce_passes`: separation, order lifting, gauges, states, finalise maps (docs/derivation.md).

Nothing here knows a named operator: every step asks the law table `memcomp.ir.ops` and says which law it used.
"""
