"""The kernels of packed_attention, which each work on equally long sequences.

Tensors are (tokens, H, d) with numbers of a head side by side, and come with their strides from token to token and from
head to head; rows, of a number for each query and head, are (H, M) of which a launch sees the part of its sequences.
"""

import triton
import triton.language as tl

from fastdino_kernels._backend import LOG2_E

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _place(tokens, H, BLOCK: tl.constexpr):
    # What a program works on: sequence, head, and the first token of a tile. Neighbours share a sequence.
    num_blocks = tl.cdiv(tokens, BLOCK)
    rest = tl.program_id(0) // num_blocks
    return (rest // H).to(tl.int64), (rest % H).to(tl.int64), tl.program_id(0) % num_blocks * BLOCK


@triton.jit
def _head(x_ptr, strides, token, head):
    return x_ptr + token * strides[0] + head * strides[1]


@triton.jit
def _tile(x_ptr, first, tokens, stride, BLOCK: tl.constexpr, D: tl.constexpr):
    # Addresses of BLOCK tokens of a head from the first on, and which of them are there.
    i = first + tl.arange(0, BLOCK)
    return x_ptr + i[:, None].to(tl.int64) * stride + tl.arange(0, D)[None, :], (i < tokens)[:, None]


@triton.jit
def _load(x_ptr, first, tokens, stride, BLOCK: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr):
    x, inside = _tile(x_ptr, first, tokens, stride, BLOCK, D)
    return tl.load(x, mask=inside, other=0.0).to(DTYPE)


@triton.jit
def _store(x_ptr, x, first, tokens, stride, BLOCK: tl.constexpr, D: tl.constexpr):
    pointers, inside = _tile(x_ptr, first, tokens, stride, BLOCK, D)
    tl.store(pointers, x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit(do_not_specialize=["M", "H", "num_queries", "num_keys"])
def _attention_kernel(
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    log_sum_ptr,
    M,
    H,
    num_queries,
    num_keys,
    out_strides,
    q_strides,
    k_strides,
    v_strides,
    D: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: BLOCK_Q queries of one head in one sequence, over all of its keys. ``top`` is the greatest score so
    # far, in units of log2, and ``total`` the sum of exponentials over it.
    sequence, head, first = _place(num_queries, H, BLOCK_Q)
    q_ptr = _head(q_ptr, q_strides, sequence * num_queries, head)
    k_ptr = _head(k_ptr, k_strides, sequence * num_keys, head)
    v_ptr = _head(v_ptr, v_strides, sequence * num_keys, head)
    out_ptr = _head(out_ptr, out_strides, sequence * num_queries, head)
    q = _load(q_ptr, first, num_queries, q_strides[0], BLOCK_Q, D, DTYPE)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, D], tl.float32)
    for start in range(0, num_keys, BLOCK_K):
        k = _load(k_ptr, start, num_keys, k_strides[0], BLOCK_K, D, DTYPE)
        scores = _product(q, tl.trans(k)) * (_LOG2_E * D**-0.5)
        there = start + tl.arange(0, BLOCK_K) < num_keys
        scores = tl.where(there[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(weights, 1)
        v = _load(v_ptr, start, num_keys, v_strides[0], BLOCK_K, D, DTYPE)
        out = out * rescale[:, None] + _product(weights.to(DTYPE), v)
        top = new_top
    _store(out_ptr, out / total[:, None], first, num_queries, out_strides[0], BLOCK_Q, D)
    i = first + tl.arange(0, BLOCK_Q)
    log_sum_ptr += head * M + sequence * num_queries
    tl.store(log_sum_ptr + i, top + tl.log2(total), mask=i < num_queries)


# The gradients, with p a query's weights and g its output's gradient: of v sum(p g), of the scores s = p (<g, v> -
# <g, out>), of q scale sum(s k), of k scale sum(s q). Weights are taken again from the scores and log_sum.


@triton.jit(do_not_specialize=["M", "H", "num_queries", "num_keys"])
def _attention_gradient_queries_kernel(
    grad_q_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    out_ptr,
    log_sum_ptr,
    dot_ptr,
    M,
    H,
    num_queries,
    num_keys,
    grad_q_strides,
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    out_strides,
    D: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: BLOCK_Q queries of one head in one sequence, over all of its keys. The next kernel gets its <g, out>.
    sequence, head, first = _place(num_queries, H, BLOCK_Q)
    grad_q_ptr = _head(grad_q_ptr, grad_q_strides, sequence * num_queries, head)
    q_ptr = _head(q_ptr, q_strides, sequence * num_queries, head)
    k_ptr = _head(k_ptr, k_strides, sequence * num_keys, head)
    v_ptr = _head(v_ptr, v_strides, sequence * num_keys, head)
    grad_ptr = _head(grad_ptr, grad_strides, sequence * num_queries, head)
    out_ptr = _head(out_ptr, out_strides, sequence * num_queries, head)
    row = head * M + sequence * num_queries
    i = first + tl.arange(0, BLOCK_Q)
    q = _load(q_ptr, first, num_queries, q_strides[0], BLOCK_Q, D, DTYPE)
    grad = _load(grad_ptr, first, num_queries, grad_strides[0], BLOCK_Q, D, DTYPE)
    out = _load(out_ptr, first, num_queries, out_strides[0], BLOCK_Q, D, tl.float32)
    dot = tl.sum(grad.to(tl.float32) * out, 1)
    tl.store(dot_ptr + row + i, dot, mask=i < num_queries)
    log_sum = tl.load(log_sum_ptr + row + i, mask=i < num_queries, other=0.0)
    grad_q = tl.zeros([BLOCK_Q, D], tl.float32)
    for start in range(0, num_keys, BLOCK_K):
        k = _load(k_ptr, start, num_keys, k_strides[0], BLOCK_K, D, DTYPE)
        v = _load(v_ptr, start, num_keys, v_strides[0], BLOCK_K, D, DTYPE)
        weights = tl.exp2(_product(q, tl.trans(k)) * (_LOG2_E * D**-0.5) - log_sum[:, None])
        slopes = weights * (_product(grad, tl.trans(v)) - dot[:, None])
        there = start + tl.arange(0, BLOCK_K) < num_keys
        slopes = tl.where(there[None, :], slopes, 0.0)  # a key that is not there has score 0, and any weight
        grad_q += _product(slopes.to(DTYPE), k)
    _store(grad_q_ptr, grad_q * D**-0.5, first, num_queries, grad_q_strides[0], BLOCK_Q, D)


@triton.jit(do_not_specialize=["M", "H", "num_queries", "num_keys"])
def _attention_gradient_keys_kernel(
    grad_k_ptr,
    grad_v_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    log_sum_ptr,
    dot_ptr,
    M,
    H,
    num_queries,
    num_keys,
    grad_k_strides,
    grad_v_strides,
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    D: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: BLOCK_K keys of one head in one sequence, over all of its queries. Scores are transposed, so that
    # weights and slopes are left factors, which stay in registers.
    sequence, head, first = _place(num_keys, H, BLOCK_K)
    grad_k_ptr = _head(grad_k_ptr, grad_k_strides, sequence * num_keys, head)
    grad_v_ptr = _head(grad_v_ptr, grad_v_strides, sequence * num_keys, head)
    q_ptr = _head(q_ptr, q_strides, sequence * num_queries, head)
    k_ptr = _head(k_ptr, k_strides, sequence * num_keys, head)
    v_ptr = _head(v_ptr, v_strides, sequence * num_keys, head)
    grad_ptr = _head(grad_ptr, grad_strides, sequence * num_queries, head)
    row = head * M + sequence * num_queries
    k = _load(k_ptr, first, num_keys, k_strides[0], BLOCK_K, D, DTYPE)
    v = _load(v_ptr, first, num_keys, v_strides[0], BLOCK_K, D, DTYPE)
    grad_k = tl.zeros([BLOCK_K, D], tl.float32)
    grad_v = tl.zeros([BLOCK_K, D], tl.float32)
    for start in range(0, num_queries, BLOCK_Q):
        # A query that is not there has weight 1 and gradient 0.
        i = start + tl.arange(0, BLOCK_Q)
        log_sum = tl.load(log_sum_ptr + row + i, mask=i < num_queries, other=0.0)
        dot = tl.load(dot_ptr + row + i, mask=i < num_queries, other=0.0)
        q = _load(q_ptr, start, num_queries, q_strides[0], BLOCK_Q, D, DTYPE)
        grad = _load(grad_ptr, start, num_queries, grad_strides[0], BLOCK_Q, D, DTYPE)
        weights = tl.exp2(_product(k, tl.trans(q)) * (_LOG2_E * D**-0.5) - log_sum[None, :])
        grad_v += _product(weights.to(DTYPE), grad)
        slopes = weights * (_product(v, tl.trans(grad)) - dot[None, :])
        grad_k += _product(slopes.to(DTYPE), q)
    _store(grad_k_ptr, grad_k * D**-0.5, first, num_keys, grad_k_strides[0], BLOCK_K, D)
    _store(grad_v_ptr, grad_v, first, num_keys, grad_v_strides[0], BLOCK_K, D)


@triton.jit(do_not_specialize=["M", "H", "num_queries", "num_keys"])
def _attention_gradient_kernel(
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    out_ptr,
    log_sum_ptr,
    M,
    H,
    num_queries,
    num_keys,
    grad_q_strides,
    grad_k_strides,
    grad_v_strides,
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    out_strides,
    D: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: one head of a sequence that fits into a tile, and all of its gradients.
    sequence, head, _ = _place(1, H, 1)
    grad_q_ptr = _head(grad_q_ptr, grad_q_strides, sequence * num_queries, head)
    grad_k_ptr = _head(grad_k_ptr, grad_k_strides, sequence * num_keys, head)
    grad_v_ptr = _head(grad_v_ptr, grad_v_strides, sequence * num_keys, head)
    q_ptr = _head(q_ptr, q_strides, sequence * num_queries, head)
    k_ptr = _head(k_ptr, k_strides, sequence * num_keys, head)
    v_ptr = _head(v_ptr, v_strides, sequence * num_keys, head)
    grad_ptr = _head(grad_ptr, grad_strides, sequence * num_queries, head)
    out_ptr = _head(out_ptr, out_strides, sequence * num_queries, head)
    i = tl.arange(0, BLOCK_Q)
    log_sum_ptr += head * M + sequence * num_queries
    log_sum = tl.load(log_sum_ptr + i, mask=i < num_queries, other=0.0)
    q = _load(q_ptr, 0, num_queries, q_strides[0], BLOCK_Q, D, DTYPE)
    k = _load(k_ptr, 0, num_keys, k_strides[0], BLOCK_K, D, DTYPE)
    v = _load(v_ptr, 0, num_keys, v_strides[0], BLOCK_K, D, DTYPE)
    grad = _load(grad_ptr, 0, num_queries, grad_strides[0], BLOCK_Q, D, DTYPE)
    out = _load(out_ptr, 0, num_queries, out_strides[0], BLOCK_Q, D, tl.float32)
    weights = tl.exp2(_product(q, tl.trans(k)) * (_LOG2_E * D**-0.5) - log_sum[:, None])
    weights = tl.where((tl.arange(0, BLOCK_K) < num_keys)[None, :], weights, 0.0)
    grad_v = _product(tl.trans(weights.to(DTYPE)), grad)
    dot = tl.sum(grad.to(tl.float32) * out, 1)
    slopes = (weights * (_product(grad, tl.trans(v)) - dot[:, None])).to(DTYPE)
    _store(grad_v_ptr, grad_v, 0, num_keys, grad_v_strides[0], BLOCK_K, D)
    _store(grad_q_ptr, _product(slopes, k) * D**-0.5, 0, num_queries, grad_q_strides[0], BLOCK_Q, D)
    _store(grad_k_ptr, _product(tl.trans(slopes), q) * D**-0.5, 0, num_keys, grad_k_strides[0], BLOCK_K, D)
