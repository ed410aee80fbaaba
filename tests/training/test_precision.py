"""Types and precision of the steps: products at the stated precision, norms and loss in float32."""

import dataclasses
import re
from collections import Counter

import jax
import jax.extend
import numpy as np
import pytest

from medsam_jax.errors import UserError
from medsam_jax.inference.predictor import Predictor
from medsam_jax.inference.stablehlo import export_model
from medsam_jax.models.image_encoder import ViTConfig
from medsam_jax.models.sam import SamConfig
from medsam_jax.ops.compile import jit
from medsam_jax.ops.form import MATMUL_PRECISIONS, form_for
from medsam_jax.ops.kernels import product
from medsam_jax.training.config import base_config, validate
from medsam_jax.training.setup import set_up
from tests.tiny import tiny_sam

VIT = dataclasses.replace(SamConfig.tiny(), encoder=ViTConfig(16, 2, 2, (1,), window_size=2))


def operations(jaxpr):
    """Yields the equations of a program, those of its loops and functions too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from operations(inner)


def traced_step(stored, **fields):
    """A training step of both encoder and decoder, traced for a TPU: setup and operations."""
    config = base_config()
    config.update({"frozen": (), "batch_size": 2, "point_share": 0.5} | fields)
    config.losses.iou = 1.0
    plan = set_up(config, stored, platform="tpu")
    traced = plan.train_step.trace(plan.state, plan.train_batch())
    return plan, traced, list(operations(traced.jaxpr.jaxpr))


def types(steps, *names):
    """Returns the type of the first operand of each operation with one of these names."""
    return [x.invars[0].aval.dtype.name for x in steps if x.primitive.name in names]


def precisions(steps):
    """Returns the precision of each product, without those that ask for a higher one themselves."""
    products = [x.params["precision"] for x in steps if "precision" in x.params]
    return Counter(precision[0].name for precision in products)


@pytest.mark.parametrize("stored", [SamConfig.tiny(), VIT], ids=["tiny_vit", "vit"])
def test_bfloat16_keeps_parameters_norms_and_loss_in_float32(stored):
    plan, traced, steps = traced_step(stored, dtype="bfloat16", matmul_precision="default")
    state, scalars = traced.out_info
    leaves = [*jax.tree.leaves(plan.state), *jax.tree.leaves(state), *scalars.values()]
    assert {x.dtype.name for x in leaves} == {"float32", "int32"}
    assert set(types(steps, "rsqrt", "log1p", "reduce_max", "exp")) == {"float32"}
    products = types(steps, "dot_general", "conv_general_dilated")
    assert products.count("bfloat16") > 0.9 * len(products) > 200
    assert precisions(steps)["DEFAULT"] > 0.9 * len(products)


def test_float32_is_float32_by_default():
    _, _, steps = traced_step(SamConfig.tiny())
    assert set(types(steps, "dot_general", "conv_general_dilated")) == {"float32"}
    assert precisions(steps).keys() == {"HIGHEST"}


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_kernels_for_tpus_multiply_bfloat16_at_the_one_precision_that_mosaic_has(dtype, expected):
    matrix = jax.ShapeDtypeStruct((8, 8), dtype)
    with jax.default_matmul_precision("highest"):
        [step] = jax.make_jaxpr(lambda a, b: product(a, b, 1, 0))(matrix, matrix).eqns
    assert {one.name for one in step.params["precision"]} == {expected}
    assert step.outvars[0].aval.dtype == "float32"


@pytest.mark.parametrize("precision", MATMUL_PRECISIONS)
def test_programs_are_compiled_at_the_precision_of_their_form(precision):
    double = jit(lambda x: x @ x, form_for("tpu", matmul_precision=precision))
    text = double.lower(np.ones((2, 2), np.float32)).as_text()
    assert re.findall(r"precision = \[(\w+), ", text) == [precision.upper()]


def test_an_unknown_precision_is_refused_wherever_it_is_given():
    message = "matmul_precision: 'float16' given; use one of highest, high, default"
    model = tiny_sam()
    with pytest.raises(UserError, match=message):
        Predictor(model, matmul_precision="float16")
    with pytest.raises(UserError, match=message):
        export_model(model, "nowhere", matmul_precision="float16")
    config = base_config()
    config.data_dir, config.matmul_precision = "somewhere", "float16"
    with pytest.raises(UserError, match=f"config.{message}"):
        validate(config)
