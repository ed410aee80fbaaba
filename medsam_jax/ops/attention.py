"""Self-attention of SAM's ViT: a grid of tokens with decomposed relative positions."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medsam_jax.ops.form import Form

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
    in parts, or pass the bias to cuDNN's flash kernel in longer vectors.

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
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if form.cudnn and half and q.shape[-1] + sum(q.shape[1:3]) <= form.cudnn_head_dim:
        return _flash(q, k, v, bias_h, bias_w)
    return _strips(q, k, v, bias_h, bias_w, form)


def _flash(q: Array, k: Array, v: Array, bias_h: Array, bias_w: Array) -> Array:
    """Runs cuDNN's kernel; a score is `[scale * q, q.Rh, q.Rw] . [k, onehot(y'), onehot(x')]`."""
    batch, rows, columns, heads, head_dim = k.shape
    length = -(-(head_dim + rows + columns) // 8) * 8  # the kernel needs a multiple of 8
    row, column = np.divmod(np.arange(rows * columns), columns)
    one_hot = np.concatenate([np.eye(rows)[row], np.eye(columns)[column]], axis=1)  # [N, Y + X]
    position = jnp.asarray(one_hot, k.dtype)[None, :, None]
    position = jnp.broadcast_to(position, (batch, rows * columns, heads, rows + columns))

    def extend(x: Array, *more: Array) -> Array:
        parts = [part.reshape(batch, -1, heads, part.shape[-1]) for part in (x, *more)]
        vectors = jnp.concatenate(parts, axis=-1)
        return jnp.pad(vectors, ((0, 0), (0, 0), (0, 0), (0, length - vectors.shape[-1])))

    out = _cudnn(extend(q, bias_h, bias_w), extend(k, position), extend(v))
    return out[..., :head_dim].reshape(q.shape)


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation="cudnn")


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
