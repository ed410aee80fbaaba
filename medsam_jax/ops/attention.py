"""Self-attention over a grid of tokens with decomposed relative positions, as SAM's ViT has it.

The score of query (y, x) and key (y', x') is `scale * q.k + q.Rh[y, y'] + q.Rw[x, x']`. PyTorch
SAM adds the bias as a second tensor of the scores' size, [heads, 4096, 4096] at 1024 pixels: 0.8 GB
for each of the two. Neither is ever whole here:

* everywhere, a loop over heads and strips of query rows adds the two terms by broadcasting;
* on a GPU in half precision, the whole score is one dot product of longer vectors,
  `[scale * q, q.Rh, q.Rw] . [k, onehot(y'), onehot(x')]`, which cuDNN's flash kernel can take.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medsam_jax.ops.strips import on_cpu

# Bytes of scores held at once, of one head and of all. On a CPU a head's stay in a core's cache:
# 128 queries over 4096 keys. All heads of a row of windows are one batch of small products.
_CPU_SCORES_BYTES = (1 << 21, 1 << 24)
_ACCELERATOR_SCORES_BYTES = (1 << 28, 1 << 28)
_CUDNN_MAX_HEAD_DIM = 256  # on Hopper and later; 128 before


def grid_attention(
    q: Float[Array, "b qy qx heads d"],
    k: Float[Array, "b y x heads d"],
    v: Float[Array, "b y x heads d"],
    rel_h: Float[Array, "y y d"],
    rel_w: Float[Array, "x x d"],
) -> Float[Array, "b qy qx heads d"]:
    """Softmax attention of every grid position to every other; the softmax is in float32.

    Follows `Attention.forward` of segment_anything/modeling/image_encoder.py.

    Args:
      q: queries (not yet scaled by ``d ** -0.5``), of all positions or of the first rows and
        columns of the grid.
      k, v: keys and values.
      rel_h, rel_w: relative position vectors by (query row, key row) and (query, key column).
    """
    rel_h = rel_h[: q.shape[1]].astype(q.dtype)
    rel_w = rel_w[: q.shape[2]].astype(q.dtype)
    bias_h = jnp.einsum("byxnd,ykd->byxnk", q, rel_h)
    bias_w = jnp.einsum("byxnd,xkd->byxnk", q, rel_w)
    q = q * q.shape[-1] ** -0.5
    attend = _flash if _flash_applies(k) else _strips
    return attend(q, k, v, bias_h, bias_w)


def head_after_head(grid_shape: tuple[int, ...], heads: int) -> bool:
    """Whether `grid_attention` of q [b, y, x, ...] takes single heads here, one after the other.

    Then it is best to project them one by one as well: 0.9 of the time for 12 heads of 4096 tokens,
    and queries, keys and values of all heads never exist (38 MB, and as much for their transposes).
    """
    batch = grid_shape[0]
    return on_cpu() and batch * heads > 1 == _strip_size(grid_shape[1:], grid_shape[1:])[1]


def _flash_applies(k: Array) -> bool:
    rows, columns, _, head_dim = k.shape[1:]
    if on_cpu() or jax.default_backend() != "gpu" or k.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    hopper = float(jax.devices("gpu")[0].compute_capability) >= 9.0
    limit = _CUDNN_MAX_HEAD_DIM if hopper else _CUDNN_MAX_HEAD_DIM // 2
    return head_dim + rows + columns <= limit


def _flash(q: Array, k: Array, v: Array, bias_h: Array, bias_w: Array) -> Array:
    return _augmented(q, k, v, bias_h, bias_w, _cudnn)


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation="cudnn")


def _augmented(
    q: Array, k: Array, v: Array, bias_h: Array, bias_w: Array, attention: Callable[..., Array]
) -> Array:
    """Hands `attention(q, k, v)` vectors [B, N, heads, D + rows + columns] that hold the bias."""
    batch, rows, columns, heads, head_dim = k.shape
    length = -(-(head_dim + rows + columns) // 8) * 8  # the kernel takes multiples of 8
    row, column = np.divmod(np.arange(rows * columns), columns)
    one_hot = np.concatenate(
        [np.eye(rows)[row], np.eye(columns)[column]], axis=1
    )  # [N, rows + columns]
    position = jnp.asarray(one_hot, k.dtype)[None, :, None]
    position = jnp.broadcast_to(position, (batch, rows * columns, heads, rows + columns))

    def extend(x: Array, *more: Array) -> Array:
        parts = [part.reshape(batch, -1, heads, part.shape[-1]) for part in (x, *more)]
        vectors = jnp.concatenate(parts, axis=-1)
        return jnp.pad(vectors, ((0, 0), (0, 0), (0, 0), (0, length - vectors.shape[-1])))

    out = attention(extend(q, bias_h, bias_w), extend(k, position), extend(v))
    return out[..., :head_dim].reshape(q.shape)


def _strips(q: Array, k: Array, v: Array, bias_h: Array, bias_w: Array) -> Array:
    """Some heads and a strip of query rows at a time; gradients recompute the scores of a strip."""
    batch, query_rows, query_columns, heads, head_dim = q.shape
    rows, columns = k.shape[1:3]
    per_strip, heads_at_once = _strip_size(q.shape[1:3], k.shape[1:3])

    def by_head(x: Array) -> Array:  # [B, Y, X, heads, D] -> [B * heads, Y, X, D]
        return x.transpose(0, 3, 1, 2, 4).reshape(batch * heads, *x.shape[1:3], -1)

    def by_strip(x: Array) -> Array:  # [Y, X, D] -> [strips, queries, D]
        return x.reshape(query_rows // per_strip, per_strip * query_columns, -1)

    def attend_head(of_head: tuple[Array, ...]) -> Array:
        q, k, v, bias_h, bias_w = of_head
        keys, values = k.reshape(-1, head_dim).T, v.reshape(-1, head_dim)

        @jax.checkpoint
        def attend_strip(strip: tuple[Array, ...]) -> Array:
            q, bias_h, bias_w = strip  # [Q, D], [Q, Y], [Q, X]
            scores = jnp.matmul(q, keys, preferred_element_type=jnp.float32)
            scores = scores.reshape(-1, rows, columns) + bias_h[:, :, None]
            # Over rows first: that vectorises, and 4096 columns become 64 before the second bias
            # is added (on a CPU 0.86 of the time).
            most = (scores.max(axis=1) + bias_w).max(axis=-1, keepdims=True)
            weights = jnp.exp(scores + (bias_w - most)[:, None, :])
            total = weights.sum(axis=1).sum(axis=-1, keepdims=True)
            weights = weights.reshape(-1, rows * columns).astype(values.dtype)
            out = jnp.matmul(weights, values, preferred_element_type=jnp.float32) / total
            return out.astype(values.dtype)

        if per_strip == query_rows:
            return attend_strip(tuple(by_strip(x)[0] for x in (q, bias_h, bias_w)))
        return jax.lax.map(attend_strip, tuple(map(by_strip, (q, bias_h, bias_w))))

    of_heads = tuple(map(by_head, (q, k, v, bias_h, bias_w)))
    if heads_at_once >= batch * heads:
        out = jax.vmap(attend_head)(of_heads)
    else:
        out = jax.lax.map(attend_head, of_heads, batch_size=heads_at_once)
    out = out.reshape(batch, heads, query_rows, query_columns, head_dim)
    return out.transpose(0, 2, 3, 1, 4)


def _strip_size(queries: tuple[int, int], keys: tuple[int, int]) -> tuple[int, int]:
    """Query rows of a strip (they divide the grid) and heads at once that keep the scores small.

    Args:
      queries, keys: rows and columns of each.
    """
    of_head, of_all = _CPU_SCORES_BYTES if on_cpu() else _ACCELERATOR_SCORES_BYTES
    rows, columns = queries
    row_bytes = columns * math.prod(keys) * np.dtype(np.float32).itemsize
    fitting = [n for n in range(1, rows + 1) if rows % n == 0 and n * row_bytes <= of_head]
    per_strip = max(fitting, default=1)
    return per_strip, max(1, of_all // (rows * row_bytes))
