"""Self-attention of SAM's ViT: a grid of tokens with decomposed relative positions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medsam_jax.ops.form import ACCELERATOR, AnyMesh, Form
from medsam_jax.ops.kernels import run_kernel

# Bytes of scores in memory at a time: of one head, of all heads. On a CPU the scores of a head fit
# a core's cache: 128 queries over 4096 keys. All heads of a row of windows are one batch of small
# products.
_CPU_SCORES_BYTES = (1 << 21, 1 << 24)
_ACCELERATOR_SCORES_BYTES = (1 << 28, 1 << 28)
_LONGEST_SIDE = 128  # of a grid that the flash kernels take: a row of keys is one block for a GPU


def grid_attention(
    qkv: Float[Array, "b n 3 heads d"],
    rel_h: Float[Array, "y y d"],
    rel_w: Float[Array, "x x d"],
    form: Form,
) -> Float[Array, "b n heads d"]:
    """Softmax attention between all positions of a grid, n = y * x; the softmax is in float32.

    The score of query (y, x) and key (y', x') is `scale * q.k + q.Rh[y, y'] + q.Rw[x, x']`
    (`add_decomposed_rel_pos` of segment_anything/modeling/image_encoder.py). Plain form: the first
    lines. The scores of one head at 1024 pixels take 64 MB. The other forms therefore compute them
    in parts: TPUs and NVIDIA GPUs in a flash kernel, which has no forward-mode derivative.

    `qkv` are queries, not yet scaled by ``d ** -0.5``, keys and values. `rel_h` and `rel_w` are
    relative position vectors by (query row, key row) and (query column, key column).
    """
    rows, columns = len(rel_h), len(rel_w)
    rel_h, rel_w = rel_h.astype(qkv.dtype), rel_w.astype(qkv.dtype)
    if form.device == "plain":
        bias_h, bias_w = position_bias(qkv, rel_h, rel_w)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        scores = jnp.einsum("bqnd,bknd->bnqk", q * q.shape[-1] ** -0.5, k, **_FLOAT32)
        scores = scores.reshape(*scores.shape[:3], rows, columns)
        scores += jnp.moveaxis(bias_h, 2, 1)[..., None] + jnp.moveaxis(bias_w, 2, 1)[..., None, :]
        weights = jax.nn.softmax(scores, axis=(-2, -1)).astype(v.dtype)
        return jnp.einsum("bnqk,bknd->bqnd", weights.reshape(*scores.shape[:3], -1), v)
    if form.cpu or not form.kernels or max(rows, columns) > _LONGEST_SIDE:
        return _strips(qkv, *position_bias(qkv, rel_h, rel_w), form)
    return _flash(form.mesh, qkv, rel_h, rel_w)


_FLOAT32 = {"preferred_element_type": jnp.float32}


def position_bias(
    qkv: Float[Array, "b n 3 heads d"], rel_h: Float[Array, "y y d"], rel_w: Float[Array, "x x d"]
) -> tuple[Float[Array, "b n heads y"], Float[Array, "b n heads x"]]:
    """Returns the factors of the bias of each query, by key row and by key column."""
    batch, _, _, heads, head_dim = qkv.shape
    q = qkv[:, :, 0].reshape(batch, len(rel_h), len(rel_w), heads, head_dim)
    bias_h = jnp.einsum("byxnd,ykd->byxnk", q, rel_h)
    bias_w = jnp.einsum("byxnd,xkd->byxnk", q, rel_w)
    return tuple(x.reshape(batch, -1, heads, x.shape[-1]) for x in (bias_h, bias_w))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(mesh: AnyMesh, qkv: Array, rel_h: Array, rel_w: Array) -> Array:
    return _flash_forward(mesh, qkv, rel_h, rel_w)[0]


def _flash_forward(
    mesh: AnyMesh, qkv: Array, rel_h: Array, rel_w: Array
) -> tuple[Array, tuple[Array, ...]]:
    """Runs the kernel of the platform that is compiled for; strips where there is none."""
    from medsam_jax.ops import flash_tpu, flash_triton

    def strips(qkv: Array, bias_h: Array, bias_w: Array) -> tuple[Array, Array]:
        batch, tokens, _, heads, _ = qkv.shape
        sums = jnp.zeros((batch, heads, tokens))  # recomputed in the backward pass
        return _strips(qkv, bias_h, bias_w, ACCELERATOR), sums

    kernels = {"cuda": flash_triton.position_bias, "default": position_bias}
    bias = run_kernel(kernels, mesh, qkv, shared=(rel_h, rel_w))
    kernels = {"tpu": flash_tpu.forward, "cuda": flash_triton.forward, "default": strips}
    out, sums = run_kernel(kernels, mesh, qkv, *bias)
    return out, (qkv, rel_h, rel_w, *bias, out, sums)


def _flash_backward(
    mesh: AnyMesh, saved: tuple[Array, ...], gradient: Array
) -> tuple[Array, Array, Array]:
    from medsam_jax.ops import flash_tpu, flash_triton

    def strips(qkv, bias_h, bias_w, out, sums, gradient):
        _, pull_back = jax.vjp(partial(_strips, form=ACCELERATOR), qkv, bias_h, bias_w)
        return pull_back(gradient)

    qkv, rel_h, rel_w, *inner = saved
    kernels = {"tpu": flash_tpu.backward, "cuda": flash_triton.backward, "default": strips}
    by_scores, *by_bias = run_kernel(kernels, mesh, qkv, *inner, gradient)
    _, pull_back = jax.vjp(position_bias, qkv, rel_h, rel_w)
    by_qkv, by_rel_h, by_rel_w = pull_back(tuple(by_bias))
    return by_scores + by_qkv, by_rel_h, by_rel_w


_flash.defvjp(_flash_forward, _flash_backward)


def _strips(
    qkv: Float[Array, "b n 3 heads d"], bias_h: Array, bias_w: Array, form: Form
) -> Float[Array, "b n heads d"]:
    """Computes some heads and a strip of query rows at a time; gradients recompute the scores."""
    batch, _, _, heads, head_dim = qkv.shape
    rows, columns = bias_h.shape[-1], bias_w.shape[-1]
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    q = q * head_dim**-0.5
    per_strip, heads_at_once = _strip_size(rows, columns, form)

    def by_head(x: Array) -> Array:  # [B, N, heads, D] -> [B * heads, Y, X, D]
        return x.swapaxes(1, 2).reshape(batch * heads, rows, columns, -1)

    def by_strip(x: Array) -> Array:  # [Y, X, D] -> [strips, queries, D]
        return x.reshape(rows // per_strip, per_strip * columns, -1)

    def attend_head(of_head: tuple[Array, ...]) -> Array:
        q, k, v, bias_h, bias_w = of_head
        keys, values = k.reshape(-1, head_dim).T, v.reshape(-1, head_dim)

        @jax.checkpoint
        def attend_strip(strip: tuple[Array, ...]) -> Array:
            q, bias_h, bias_w = strip  # [Q, D], [Q, Y], [Q, X]
            scores = jnp.matmul(q, keys, preferred_element_type=jnp.float32)
            scores = scores.reshape(-1, rows, columns) + bias_h[:, :, None]
            # The maximum over rows comes first: it vectorises, and 64 of 4096 columns are left when
            # the second bias is added.
            most = (scores.max(axis=1) + bias_w).max(axis=-1, keepdims=True)
            weights = jnp.exp(scores + (bias_w - most)[:, None, :])
            total = weights.sum(axis=1).sum(axis=-1, keepdims=True)
            weights = weights.reshape(-1, rows * columns).astype(values.dtype)
            out = jnp.matmul(weights, values, preferred_element_type=jnp.float32) / total
            return out.astype(values.dtype)

        if per_strip == rows:
            return attend_strip(tuple(by_strip(x)[0] for x in (q, bias_h, bias_w)))
        return jax.lax.map(attend_strip, tuple(map(by_strip, (q, bias_h, bias_w))))

    of_heads = tuple(map(by_head, (q, k, v, bias_h, bias_w)))
    if heads_at_once >= batch * heads:
        out = jax.vmap(attend_head)(of_heads)
    else:
        out = jax.lax.map(attend_head, of_heads, batch_size=heads_at_once)
    return out.reshape(batch, heads, rows * columns, head_dim).swapaxes(1, 2)


def _strip_size(rows: int, columns: int, form: Form) -> tuple[int, int]:
    """Returns query rows per strip (a divisor of `rows`) and heads at a time, by memory limit."""
    of_head, of_all = _CPU_SCORES_BYTES if form.cpu else _ACCELERATOR_SCORES_BYTES
    row_bytes = columns * rows * columns * np.dtype(np.float32).itemsize
    fitting = [n for n in range(1, rows + 1) if rows % n == 0 and n * row_bytes <= of_head]
    per_strip = max(fitting, default=1)
    return per_strip, max(1, of_all // (rows * row_bytes))
