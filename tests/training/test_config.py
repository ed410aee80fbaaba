"""Configurations are refused by the name of the field."""

import dataclasses

import pytest

from medsam_jax.errors import UserError
from medsam_jax.models.sam import SamConfig
from medsam_jax.training.config import base_config, validate
from medsam_jax.training.setup import trained_for


def valid_config():
    config = base_config()
    config.data_dir = "somewhere"
    return config


def test_the_base_is_valid():
    validate(valid_config())


def test_a_typing_error_in_a_recipe_raises_at_once():
    with pytest.raises(AttributeError, match="learning_rat"):
        base_config().learning_rat = 1.0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data_dir", "", "config.data_dir: empty"),
        ("optimizer", "adamW", "config.optimizer: 'adamW' is not in optax; use one of .*adamw"),
        ("schedule", "step", "config.schedule: 'step'"),
        ("num_steps", 0, "config.num_steps: 0"),
        ("accumulation_steps", 3, "config.accumulation_steps: 3 does not divide"),
        ("ema_decay", 1.0, "config.ema_decay: 1.0"),
        ("point_share", 1.5, "config.point_share: 1.5"),
        ("positive_points", 0, "config.positive_points: 0"),
        ("learning_rates", (("a", 0.0),), "config.learning_rates: factor 0.0 of 'a'"),
        ("learning_rates", ("a", 0.1), "config.learning_rates: 'a' is no pair"),
        ("sampling_temperature", 0.5, "config.sampling_temperature: 0.5"),
        (
            "matmul_precision",
            "float16",
            "config.matmul_precision: 'float16' given; use one of high",
        ),
        ("profile_steps", "10", "config.profile_steps: '10' given; use FIRST:LAST, steps of 1 to"),
        ("profile_steps", "0:3", "config.profile_steps: '0:3' given"),
        ("profile_steps", "4:3", "config.profile_steps: '4:3' given"),
        ("profile_steps", "9:1001", r"'9:1001' given; use .* 1 to 1000 \(config.num_steps\)"),
        ("embedding_variants", 0, "config.embedding_variants: 0 given"),
        ("embedding_variants", 2, "config.embedding_variants: 2 given; several need"),
    ],
)
def test_a_value_that_cannot_work_is_named(field, value, message):
    config = valid_config()
    config[field] = value
    with pytest.raises(UserError, match=message):
        validate(config)


def test_unknown_and_missing_fields_are_named():
    config = valid_config().unlock()
    config.mesh.pipeline = 2
    with pytest.raises(UserError, match=r"config.mesh.pipeline: unknown field"):
        validate(config)
    config = valid_config().unlock()
    del config.tolerance
    with pytest.raises(UserError, match="config.tolerance: missing"):
        validate(config)


def test_augmentation_and_cache_exclude_each_other():
    config = valid_config()
    config.augmentation.flip = 0.5
    validate(config)
    config.embedding_cache = "cache"
    with pytest.raises(UserError, match="config.augmentation: set beside config.embedding_cache"):
        validate(config)
    config.embedding_variants = 3
    validate(config)
    config.augmentation.flip = 2.0
    with pytest.raises(UserError, match="augmentation.flip: 2.0 is not in"):
        validate(config)


def test_a_mask_threshold_becomes_part_of_the_contract():
    config, stored = valid_config(), SamConfig.tiny()
    assert trained_for(stored, config).preprocessing == stored.preprocessing
    config.mask_threshold = -0.5
    validate(config)
    contract = trained_for(stored, config).preprocessing
    assert contract == dataclasses.replace(stored.preprocessing, mask_threshold=-0.5)
    windows = ("lung", "brain")
    trained = trained_for(stored, config, windows)
    assert trained.preprocessing == dataclasses.replace(contract, ct_windows=windows)
    assert trained_for(trained, valid_config()).preprocessing.ct_windows == windows, "without CT"
    config.mask_threshold = float("nan")
    with pytest.raises(UserError, match="config.mask_threshold: nan given"):
        validate(config)
