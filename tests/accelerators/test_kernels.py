"""Attention's kernels as the compiler for TPUs makes them, values and gradients.

Those for GPUs are compiled in processes of their own: `test_limits.py`.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.hlo import count
from benchmarks.targets import Target, prepare

prepare()

from medsam_jax.ops.attention import grid_attention  # noqa: E402
from medsam_jax.ops.compile import at_precision  # noqa: E402
from medsam_jax.ops.form import Form  # noqa: E402
from medsam_jax.ops.window_attention import window_attention  # noqa: E402


def compiled(target, batch, side, heads, head_dim, dtype, gradient):
    """Compiles attention over a square grid, its batch sharded over the target's devices."""
    target = Target.named(target)
    form = Form("accelerator", mesh=target.mesh())

    def attend(qkv, rel_h, rel_w):
        return grid_attention(qkv, rel_h, rel_w, form)

    def gradients(*given):
        return jax.grad(lambda *given: attend(*given).astype(jnp.float32).sum(), (0, 1, 2))(*given)

    qkv = batch, side * side, 3, heads, head_dim
    function = gradients if gradient else attend
    return compile_for(target, form, function, dtype, qkv, *[(side, side, head_dim)] * 2)


def compile_for(target, form, function, dtype, by_item, *shared):
    """Compiles a function of arrays of these shapes, the first one sharded over the devices."""

    def shape(sides, *axes):
        sharding = NamedSharding(form.mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(sides, dtype, sharding=sharding)

    arrays = shape(by_item, "data"), *(shape(sides) for sides in shared)
    traced = jax.jit(at_precision(function, form)).trace(*arrays)
    lowered = traced.lower(lowering_platforms=(target.chip.platform,))
    return lowered.compile(compiler_options=dict(target.compiler_options))


GRIDS = [  # batch, side, heads, head_dim
    (1, 64, 12, 64),
    (1, 64, 16, 80),  # vit_h
    (25, 14, 12, 64),
    (2, 50, 2, 64),  # 2500 tokens fill no whole number of blocks
]


@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_scores_in_memory(grid, dtype, gradient):
    batch, side, heads, _ = grid
    program = compiled("v5e", *grid, dtype, gradient)
    assert "grid_attention" in program.as_text()
    assert count(program.as_text()).loops == 0
    if side > 14:  # the scores of a window are no larger than its vectors
        scores = batch * heads * side**4 * jnp.dtype(dtype).itemsize
        assert program.memory_analysis().temp_size_in_bytes < scores / 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("windows", "tokens", "heads"), [(100, 49, 10), (25, 196, 5)])
def test_windows_of_tiny_vit(windows, tokens, heads, dtype):
    target = Target.named("v5e")
    form = Form("accelerator", mesh=target.mesh())
    shapes = (windows, tokens, heads, 3, 32), (heads, tokens, tokens)
    program = compile_for(target, form, lambda *x: window_attention(*x, form), dtype, *shapes)
    assert "window_attention" in program.as_text()


def test_each_device_attends_for_its_share():
    text = compiled("v5e-4", 8, 64, 12, 64, jnp.bfloat16, gradient=False).as_text()
    assert count(text).collectives == 0
    assert "bf16[2,12,64,4096]" in text  # the attention of two of eight items


def test_gradients_of_the_shares_are_added():
    work = count(compiled("v5e-4", 8, 64, 12, 64, jnp.bfloat16, gradient=True).as_text())
    tables = 2 * 64 * 64 * 64 * 4
    assert 0 < work.collective_bytes <= 2 * tables  # those of the position vectors alone
