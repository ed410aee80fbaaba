"""Every recipe's steps lower for TPUs and GPUs on any machine, on one device and on a mesh.

In the form that every accelerator takes, with the kernels of each platform.
"""

import dataclasses
import importlib.util
import pathlib
import re

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from medsam_jax.models.image_encoder import ViTConfig
from medsam_jax.models.unet import UNetConfig
from medsam_jax.training.setup import set_up
from weights_converter.known import known_config
from weights_converter.registry import REGISTRY

ACCELERATORS = ["tpu", "cuda"]
# jax vouches for old programs with TPU kernels, not for those with Triton's.
TRITON = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
RECIPES = sorted(pathlib.Path(__file__).parents[2].joinpath("configs").glob("*.py"))
# The steps of lite_medsam, boxes_and_points and the U-Net once more.
SAME = ("demo", "boxes_and_points_augmented", "unet_small")
DISTINCT = [recipe for recipe in RECIPES if recipe.stem not in SAME]
MESH = AbstractMesh((4, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def load(recipe: pathlib.Path):
    """The recipe's configuration, and that of the checkpoint it starts from."""
    spec = importlib.util.spec_from_file_location(recipe.stem, recipe)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    known = config.checkpoint in REGISTRY
    return config, known_config(config.checkpoint) if known else UNetConfig()


def export(plan, cached=False) -> list[jax.export.Exported]:
    steps = (
        (plan.train_step, plan.state, plan.train_batch(cached)),
        (plan.eval_step, plan.state.evaluated(), plan.eval_batch(cached)),
    )
    exported = [
        jax.export.export(step, platforms=ACCELERATORS, disabled_checks=[TRITON])(*args)
        for step, *args in steps
    ]
    assert all(one.platforms == ("tpu", "cuda") for one in exported)
    return exported


@pytest.mark.parametrize("recipe", DISTINCT, ids=lambda recipe: recipe.stem)
def test_steps_lower_for_one_accelerator(recipe):
    train, evaluate = export(set_up(*load(recipe), platform="tpu"))
    assert train.nr_devices == evaluate.nr_devices == 1
    outputs = jax.tree.unflatten(evaluate.out_tree, evaluate.out_avals)
    assert outputs.keys() >= {"dice", "nsd", "prediction"}
    if recipe.stem == "lite_medsam":  # where a CPU sums shifted copies, see ops/depthwise.py
        groups = re.findall(r"feature_group_count = (\d+)", evaluate.mlir_module())
        assert max(map(int, groups)) > 1, "the accelerator's form, not this machine's"


def shortened(stored):
    """Three of a ViT's blocks, of both kinds: a mesh treats all alike, tracing takes a while."""
    if not isinstance(getattr(stored, "encoder", None), ViTConfig):
        return stored
    encoder = dataclasses.replace(stored.encoder, depth=3, global_attn_indexes=(2,))
    return dataclasses.replace(stored, encoder=encoder)


@pytest.mark.parametrize("recipe", DISTINCT, ids=lambda recipe: recipe.stem)
def test_steps_lower_for_a_mesh(recipe):
    config, stored = load(recipe)
    config.batch_size = config.eval_batch_size = 32
    plan = set_up(config, shortened(stored), MESH, platform="tpu")
    train, evaluate = export(plan)
    assert train.nr_devices == evaluate.nr_devices == 16
    text = train.mlir_module()
    arguments = text[text.index("@main(") :].split("->")[0]
    divisible = [x for x in jax.tree.leaves(plan.state) if any(side % 4 == 0 for side in x.shape)]
    assert arguments.count('"fsdp"') == len(divisible) + len(plan.train_batch())
    assert arguments.count('"data"') == len(plan.train_batch())


def test_the_cached_step_lowers_without_an_encoder():
    config, stored = load(next(path for path in RECIPES if path.stem == "medsam_v1"))
    plan = set_up(config, stored, platform="tpu")
    assert plan.train_batch(cached=True)["embedding"].shape == (8, 64, 64, 256)
    text = export(plan, cached=True)[0].mlir_module()
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", text)
    assert len(products) > 50
    width = re.compile(r"[<x]768x")  # in a tensor's type, not the name of a value
    assert not any(width.search(product) for product in products), "the width of ViT-B"
