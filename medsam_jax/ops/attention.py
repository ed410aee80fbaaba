"""Self-attention of SAM's ViT: a grid of tokens with decomposed relative positions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from medsam_jax.ops import flash_tpu, flash_triton
from medsam_jax.ops.form import ACCELERATOR, Form

# Bytes of scores in memory at a time: of one head, of all heads. On a CPU the scores of a head fit
# a core's cache: 128 queries over 4096 keys. All heads of a row of windows are one batch of small
# products.
_CPU_SCORES_BYTES = (1 << 21, 1 << 24)
_ACCELERATOR_SCORES_BYTES = (1 << 28, 1 << 28)


def grid_attention(
    q: Float[Array, "b y x heads d"],
    k: Float[Array, "b y x heads d"],
    v: Float[Array, "b y x heads d"],
    rel_h: Float[Array, "y y d"],
    rel_w: Float[Array, "x x d"],
    form: Form,
) -> Float[Array, "b y x heads d"]:
    """Softmax attention between all grid positions; the softmax is in float32.

    The score of query (y, x) and key (y', x') is `scale * q.k + q.Rh[y, y'] + q.Rw[x, x']`
    (`add_decomposed_rel_pos` of segment_anything/modeling/image_encoder.py). Plain form: the first
    lines. The scores of one head at 1024 pixels take 64 MB. The other forms therefore compute them
    in parts: TPUs and NVIDIA GPUs in a flash kernel, which has no forward-mode derivative.

    Queries are not yet scaled by ``d ** -0.5``. `rel_h` and `rel_w` are relative position vectors
    by (query row, key row) and (query column, key column).
    """
    rel_h, rel_w = rel_h.astype(q.dtype), rel_w.astype(q.dtype)
    bias_h = jnp.einsum("byxnd,ykd->byxnk", q, rel_h)
    bias_w = jnp.einsum("byxnd,xkd->byxnk", q, rel_w)
    q = q * q.shape[-1] ** -0.5
    if form.device == "plain":
        scores = jnp.einsum("byxnd,bjind->bnyxji", q, k, preferred_element_type=jnp.float32)
        scores += jnp.moveaxis(bias_h, 3, 1)[..., None] + jnp.moveaxis(bias_w, 3, 1)[..., None, :]
        weights = jax.nn.softmax(scores, axis=(-2, -1)).astype(v.dtype)
        return jnp.einsum("bnyxji,bjind->byxnd", weights, v)
    grid = (q.shape[1], q.shape[2])
    if form.cpu or not form.kernels or max(grid) > flash_triton.MOST_COLUMNS:
        return _strips(q, k, v, bias_h, bias_w, form)
    attend = _flash
    if form.mesh is not None and form.mesh.size > 1:
        # The compiler cannot split a kernel: without this, every device would attend for all.
        share = PartitionSpec(form.mesh.axis_names)
        attend = jax.shard_map(
            attend, mesh=form.mesh, in_specs=share, out_specs=share, check_vma=False
        )
    return attend(q, k, v, bias_h, bias_w)


@jax.custom_vjp
def _flash(q: Array, k: Array, v: Array, bias_h: Array, bias_w: Array) -> Array:
    return _flash_forward(q, k, v, bias_h, bias_w)[0]


def _flash_forward(*inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    """Runs the kernel of the platform that is compiled for; strips where there is none."""

    def strips(*inputs: Array) -> tuple[Array, Array]:
        batch, rows, columns, heads, _ = inputs[0].shape
        return _strips(*inputs, ACCELERATOR), jnp.zeros((batch, heads, rows * columns))

    kernels = {"tpu": flash_tpu.forward, "cuda": flash_triton.forward}
    out, sums = jax.lax.platform_dependent(*inputs, default=strips, **kernels)
    return out, (*inputs, out, sums)


def _flash_backward(saved: tuple[Array, ...], gradient: Array) -> tuple[Array, ...]:
    def strips(q, k, v, bias_h, bias_w, out, sums, gradient):
        _, pull_back = jax.vjp(partial(_strips, form=ACCELERATOR), q, k, v, bias_h, bias_w)
        return pull_back(gradient)

    kernels = {"tpu": flash_tpu.backward, "cuda": flash_triton.backward}
    return tuple(jax.lax.platform_dependent(*saved, gradient, default=strips, **kernels))


_flash.defvjp(_flash_forward, _flash_backward)


def _strips(
    q: Array, k: Array, v: Array, bias_h: Array, bias_w: Array, form: Form
) -> Float[Array, "b y x heads d"]:
    """Computes some heads and a strip of query rows at a time; gradients recompute the scores."""
    batch, rows, columns, heads, head_dim = q.shape
    per_strip, heads_at_once = _strip_size(rows, columns, form)

    def by_head(x: Array) -> Array:  # [B, Y, X, heads, D] -> [B * heads, Y, X, D]
        return x.transpose(0, 3, 1, 2, 4).reshape(batch * heads, rows, columns, -1)

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
    return out.reshape(batch, heads, rows, columns, head_dim).transpose(0, 2, 3, 1, 4)


def _strip_size(rows: int, columns: int, form: Form) -> tuple[int, int]:
    """Returns query rows per strip (a divisor of `rows`) and heads at a time, by memory limit."""
    of_head, of_all = _CPU_SCORES_BYTES if form.cpu else _ACCELERATOR_SCORES_BYTES
    row_bytes = columns * rows * columns * np.dtype(np.float32).itemsize
    fitting = [n for n in range(1, rows + 1) if rows % n == 0 and n * row_bytes <= of_head]
    per_strip = max(fitting, default=1)
    return per_strip, max(1, of_all // (rows * row_bytes))
