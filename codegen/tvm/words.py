"""Names that kernel text uses and that therefore no tensor may have (the list without importing tvm)."""

WORDS = frozenset((
    "acc", "across", "at", "bits", "cast", "clip", "eq", "ne", "floordiv", "floormod", "ceildiv", "from_bf16", "join", "land", "lane", "like", "lnot", "lor", "masked_load",
    "masked_store", "maximum", "minimum", "piece", "prefetch", "put_turned", "reg", "row_sums", "select", "splat", "store_turned", "to_bf16", "vector", "width",
    "exp", "exp2", "log", "log2", "tanh", "sigmoid", "erf", "xlogx", "sqrt", "rsqrt", "recip", "sin", "cos", "pow", "floor",
    "round", "absolute", "f32", "f64", "i64", "T", "I", "inf", "nan",
))
