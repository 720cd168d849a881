"""Which way of mapping a program is fastest: by the cost model (`model`), or measured (`search`).

`space` says which ways there are; `problem` there is what a measurement is for, and `memcomp.cache` keeps it.
"""
