"""Names that kernel text uses and that therefore no tensor may have (the list, without importing tvm)."""

_VALUES = """acc across as_bf16 as_f16 as_f32 at before bits cast ceildiv clip eq floordiv floormod from_bf16 join land
lane like lnot lor
masked_load masked_store maximum minimum ne piece prefetch put_turned reaches reg row_sums select splat
store_turned tasks to_bf16 f32 f64 i64 dot_pairs in_order in_pairs pair_up tile_product tile_start tile_stop
unsigned weave field field_pairs reordered same_pairs"""
_FUNCTIONS = """absolute cos erf exp exp2 expm1 floor log log1p log2 pow recip round rsqrt sigmoid sin sqrt tanh
xlogx rough_exp rough_exp2 rough_sigmoid rough_tanh"""
WORDS = frozenset(f"{_VALUES} {_FUNCTIONS} T I inf nan".split())
