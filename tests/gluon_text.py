"""A kernel in Gluon written by hand: attention over one head, a producer of K and V, two consumers of 64 rows each.

What the model of Gluon and the order of machine code are tested with, apart from any emitter.  Comments name the lines
that tests take out or change.
"""

ATTENTION = '''\
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

fetch = gl.constexpr(getattr(tma, "async_load", None) or tma.async_copy_global_to_shared)


@gluon.jit
def producer(Kd, Vd, Ks, Vs, k_full, k_free, v_full, v_free, n, BN: gl.constexpr, D: gl.constexpr, ST: gl.constexpr):
    for i in range(0, n):
        at = i % ST
        turn = (i // ST) & 1
        mbarrier.wait(k_free.index(at), turn ^ 1)  # k free
        mbarrier.expect(k_full.index(at), BN * D * 2)  # k bytes
        fetch(Kd, [i * BN, 0], k_full.index(at), Ks.index(at))
        mbarrier.wait(v_free.index(at), turn ^ 1)  # v free
        mbarrier.expect(v_full.index(at), BN * D * 2)
        fetch(Vd, [i * BN, 0], v_full.index(at), Vs.index(at))


@gluon.jit
def weights(s, top, total, scale, left, BN: gl.constexpr, mma: gl.constexpr, out: gl.constexpr):
    """Of one block: the greatest so far, the sum so far, what the former sum is to be multiplied by, the weights."""
    key = gl.arange(0, BN, gl.SliceLayout(0, mma))
    s = gl.where((key < left)[None, :], s * scale, -float("inf"))
    new = gl.maximum(top, gl.max(s, 1))
    again = gl.exp2(top - new)
    p = gl.exp2(s - new[:, None])
    total = total * again + gl.sum(p, 1)
    return new, total, again, gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, out, 2))


@gluon.jit
def consumer(part, O, Qs, Ks, Vs, q_full, k_full, k_free, v_full, v_free, n, row0, M, N, scale,
             BN: gl.constexpr, D: gl.constexpr, ST: gl.constexpr):
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    q = Qs.index(part)
    none = gl.zeros([64, BN], gl.float32, mma)
    top = gl.full([64], -float("inf"), gl.float32, gl.SliceLayout(1, mma))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, mma))
    acc = gl.zeros([64, D], gl.float32, out)
    mbarrier.wait(q_full, 0)  # q full
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q, Ks.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    mbarrier.arrive(k_free.index(0), count=1)
    top, total, again, p = weights(s, top, total, scale, N, BN, mma, out)
    mbarrier.wait(v_full.index(0), 0)
    for i in range(1, n):
        at = i % ST
        turn = (i // ST) & 1
        last = (i - 1) % ST
        mbarrier.wait(k_full.index(at), turn)  # k full
        s = warpgroup_mma(q, Ks.index(at).permute((1, 0)), none, use_acc=False, is_async=True)
        more = warpgroup_mma(p, Vs.index(last), acc, is_async=True)
        s = warpgroup_mma_wait(1, [s])  # s done
        mbarrier.arrive(k_free.index(at), count=1)  # k read
        top, total, again, p = weights(s, top, total, scale, N - i * BN, BN, mma, out)
        mbarrier.wait(v_full.index(at), turn)  # v full
        acc = warpgroup_mma_wait(0, [more])  # acc done
        mbarrier.arrive(v_free.index(last), count=1)  # v read
        acc = acc * gl.convert_layout(again, gl.SliceLayout(1, out))[:, None]
    more = warpgroup_mma(p, Vs.index((n - 1) % ST), acc, is_async=True)
    acc = warpgroup_mma_wait(0, [more])  # end
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, out))[:, None]
    row = row0 + part * 64 + gl.arange(0, 64, gl.SliceLayout(1, out))
    col = gl.arange(0, D, gl.SliceLayout(0, out))
    gl.store(O + row[:, None] * D + col[None, :], acc, mask=(row < M)[:, None] & (col < D)[None, :])


@gluon.jit
def attention(Q, K, V, O, M, N, scale, BN: gl.constexpr, D: gl.constexpr, ST: gl.constexpr):
    """Q (M, D), K and V (N, D) in bf16, O (M, D) in f32; `scale` holds the factor log2(e).  N is at least 1."""
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], gl.bfloat16)
    keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], gl.bfloat16)
    Qd = tma.make_tensor_descriptor(Q, [M, D], [D, 1], [64, D], rows)
    Kd = tma.make_tensor_descriptor(K, [N, D], [D, 1], [BN, D], keys)
    Vd = tma.make_tensor_descriptor(V, [N, D], [D, 1], [BN, D], keys)
    Qs = gl.allocate_shared_memory(gl.bfloat16, [2, 64, D], rows)
    Ks = gl.allocate_shared_memory(gl.bfloat16, [ST, BN, D], keys)
    Vs = gl.allocate_shared_memory(gl.bfloat16, [ST, BN, D], keys)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(ST):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)  # both read k
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    row0 = gl.program_id(0) * 128
    n = gl.cdiv(N, BN)
    mbarrier.expect(q_full, 2 * 64 * D * 2)
    fetch(Qd, [row0, 0], q_full, Qs.index(0))
    fetch(Qd, [row0 + 64, 0], q_full, Qs.index(1))
    gl.warp_specialize([
        (consumer, (0, O, Qs, Ks, Vs, q_full, k_full, k_free, v_full, v_free, n, row0, M, N, scale, BN, D, ST)),
        (consumer, (1, O, Qs, Ks, Vs, q_full, k_full, k_free, v_full, v_free, n, row0, M, N, scale, BN, D, ST)),
        (producer, (Kd, Vd, Ks, Vs, k_full, k_free, v_full, v_free, n, BN, D, ST)),
    ], [4, 4], [240, 24])
'''
