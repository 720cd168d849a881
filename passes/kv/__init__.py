"""KV caches as values: what is stored of keys and values, where, and what it costs (docs/kv.md).

    slots words        the twelve slots, and the kinds of each as a table
    text systems       the text form; named systems, a row each (systems/*.kv)
    rules status       what is legal; what a specification promises, and what cannot run yet
    account            exact bytes
    cells side choose  encoded tokens as bytes; what is done to values before; which tokens are chosen
    store              the numpy interpreter: append, attend, rollback
    codecs/            formats of numbers, as cascades
    reader writer      programs over what codecs store
    programs linear    the program that reads a whole specification; what goes around its reader
"""
