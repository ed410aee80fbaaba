"""Every field of a training configuration, with its meaning. Configs in `configs/` change some."""

import dataclasses
import math

import ml_collections
from flax.traverse_util import flatten_dict
from ml_collections import config_dict

from medsam_jax.data.augment import Augmentation
from medsam_jax.data.recipes import PREPROCESSING
from medsam_jax.data.splits import parse_fold
from medsam_jax.errors import UserError
from medsam_jax.ops.form import MATMUL_PRECISIONS
from medsam_jax.training.losses import LOSSES
from medsam_jax.training.optimizer import learning_rate_schedule, optimizer_from_optax

# Fields that hold arguments of an optax function, under that function's names.
OPTAX_ARGS = ("optimizer_args", "schedule_args")

_FROM_ONE = ("batch_size", "num_steps", "accumulation_steps", "eval_every", "eval_batch_size")
_FROM_ONE += ("checkpoint_every", "keep_checkpoints", "log_every", "prompts_per_image")
_FROM_ONE += ("positive_points", "sampling_temperature", "embedding_variants")
_LEAST = dict.fromkeys(_FROM_ONE, 1) | {"negative_points": 0, "lora.rank": 0}


def base_config() -> ml_collections.ConfigDict:
    """Returns MedSAM v1's protocol on LiteMedSAM: the mask decoder is trained on box prompts."""
    config = ml_collections.ConfigDict()

    # Starting point and data.
    config.checkpoint = "lite_medsam"  # registry name or checkpoint directory to start from
    config.preprocessing = ""  # contract to train for ("v1", "v2", ...); "": the checkpoint's own
    # Logits above this are in the mask; 0 is probability 0.5. None: the checkpoint's own.
    config.mask_threshold = config_dict.placeholder(float)
    config.dtype = "float32"  # of the computation: or "bfloat16"; parameters stay float32
    # Of float32 products on a GPU or TPU: "highest" is float32; "high" and "default" are faster.
    config.matmul_precision = "highest"
    config.remat = False  # ViT: recompute blocks in the backward pass, for memory
    config.data_dir = ""  # data set written by `python -m datasets.build`
    config.fold = ""  # "2/5": hold out the second of five folds of the patients; "": the splits
    config.task = ""  # train and score this task of the data set only: a specialist; "": all
    config.seed = 0  # of data order, box jitter and label choice
    config.batch_size = 8  # over all devices and hosts
    config.sampling_temperature = 1.0  # n slices of a task and modality weigh n ** (1 / this)
    config.num_workers = 0  # loader processes a host; 0 loads in the training process

    # Prompts: a prompt asks for one object of a slice, by its box or by points.
    config.prompts_per_image = 1  # prompts of a slice share its embedding
    config.box_jitter = 5  # each side of the box moves by up to this many pixels of the slice
    config.point_share = 0.0  # probability that a prompt is points instead of the box
    config.positive_points = 1  # a point prompt has 1 to this many points on the object
    config.negative_points = 0  # and 0 to this many points beside it

    # Random changes of a training slice, drawn at every step, or cached in `embedding_variants`:
    # flip, rotation, scale and intensity of `data.augment.Augmentation`. By default none.
    config.augmentation = ml_collections.ConfigDict(dataclasses.asdict(Augmentation()))

    # A parameter is frozen if one of these regexes matches its whole path; the rest is trained.
    config.frozen = (r"image_encoder\..*", r"prompt_encoder\..*")

    # Low-rank adapters of frozen kernels; an export holds kernel plus adapter.
    config.lora = ml_collections.ConfigDict(
        {
            "rank": 0,  # 0: no adapters
            "alpha": 8.0,  # an adapter's product is scaled by alpha / rank
            "targets": (r"image_encoder\..*\.attn\.(qkv|proj)\.kernel",),  # matched as `frozen`
        }
    )

    # With the image encoder frozen its embeddings are computed once and kept in this directory.
    config.embedding_cache = ""  # "": encode at every step
    config.embedding_dtype = "bfloat16"  # as stored; float32 doubles the size
    config.embedding_variants = 1  # versions of each training slice: as stored, others augmented

    # Weights of the losses of `losses.py`, on the mask logits at the size of the stored slice.
    # "iou" is the squared error of the predicted IoU. A loss of weight 0 is not computed.
    weights = dict.fromkeys(LOSSES, 0.0) | {"dice": 1.0, "cross_entropy": 1.0}
    config.losses = ml_collections.ConfigDict(weights)
    config.multimask = True  # half the loss of one point trains the best of the three masks

    # Optimiser and learning rate: functions of optax by name.
    config.num_steps = 1000
    config.accumulation_steps = 1  # equal parts of a batch, processed one after another
    config.learning_rate = 1e-4  # the highest one
    config.learning_rates = ()  # (regex, factor) pairs: multipliers; the first match applies
    config.schedule = "constant"  # after the warm-up: or "cosine", "exponential", ...
    config.schedule_args = ml_collections.ConfigDict()  # others than peak and number of steps
    config.warmup_steps = 0  # the rate rises linearly from 0
    config.optimizer = "adamw"  # or "adam", "sgd", "lion", ...
    config.optimizer_args = ml_collections.ConfigDict()  # such as {"b1": 0.9}, {"momentum": 0.9}
    config.weight_decay = 0.01  # of kernels, by optimisers that decay ("adamw" does, "adam" not)
    config.clip_norm = 1.0  # largest norm of the gradient; 0: no clipping
    config.ema_decay = 0.0  # decay of the parameters' average, which is evaluated; 0: no average

    # Devices: parameters are split over `fsdp`, the batch over both axes; -1 takes what is left.
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1})

    # Evaluation on the tune split, checkpoints and log.
    config.eval_every = 100  # steps; also before the first and after the last
    config.eval_batch_size = 8
    config.tolerance = 2.0  # of the NSD, in pixels of the stored slice
    config.eval_overlays = 8  # pictures of the tune objects with the lowest DSC
    config.checkpoint_every = 100  # steps
    config.keep_checkpoints = 2  # the latest ones; `best/` holds the best model
    config.log_every = 10  # steps
    config.report = True  # at the end write report.html: before and after on validation slices
    config.profile_steps = ""  # "10:13": write a trace of the steps 10 to 13; "": none
    config.early_stop_evals = 0  # stop after so many evaluations without a better score; 0: never
    config.lock()
    for name in OPTAX_ARGS:
        config[name].unlock()
    return config


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for unknown fields, missing fields and values that cannot work."""
    known = _flat(base_config())
    given = _flat(config)
    for name in given.keys() - known.keys():
        raise UserError(f"config.{name}: unknown field; known ones are {', '.join(sorted(known))}")
    for name in known.keys() - given.keys():
        raise UserError(f"config.{name}: missing; start the recipe from base_config()")
    if not config.data_dir:
        raise UserError("config.data_dir: empty; give --config.data_dir=DIR of a built data set")
    types = ("bfloat16", "float32")
    choices = {"dtype": types, "embedding_dtype": types, "preprocessing": ("", *PREPROCESSING)}
    choices["matmul_precision"] = MATMUL_PRECISIONS
    for name, allowed in choices.items():
        if config[name] not in allowed:
            shown = ", ".join(allowed)
            raise UserError(f"config.{name}: {config[name]!r} given; use one of {shown}")
    if config.fold:
        parse_fold(config.fold)
    profile_steps(config)
    for name, least in _LEAST.items():
        if not given[name] >= least:
            raise UserError(f"config.{name}: {given[name]} given; it must be at least {least}")
    if config.batch_size % config.accumulation_steps:
        raise UserError(
            f"config.accumulation_steps: {config.accumulation_steps} does not divide "
            f"batch_size {config.batch_size}"
        )
    _check_losses(config)
    _check_variants(config)
    _check_learning_rates(config)
    optimizer_from_optax(config, learning_rate_schedule(config), labels={})
    if config.mask_threshold is not None and not math.isfinite(config.mask_threshold):
        raise UserError(f"config.mask_threshold: {config.mask_threshold} given; use a finite logit")
    if not 0.0 <= config.point_share <= 1.0:
        raise UserError(f"config.point_share: {config.point_share} given; it must be in [0, 1]")
    if not 0.0 <= config.ema_decay < 1.0:
        raise UserError(f"config.ema_decay: {config.ema_decay} given; it must be in [0, 1)")


def _check_losses(config: ml_collections.ConfigDict) -> None:
    for name, weight in config.losses.items():
        if not 0 <= weight < math.inf:
            raise UserError(f"config.losses.{name}: {weight} given; it must be at least 0")
    if not any(config.losses.values()):
        raise UserError("config.losses: every weight is 0; set one, such as config.losses.dice=1")


def _check_variants(config: ml_collections.ConfigDict) -> None:
    augmented, cached = augmentation_of(config) is not None, bool(config.embedding_cache)
    variants = config.embedding_variants
    if variants > 1 and not (augmented and cached):
        raise UserError(
            f"config.embedding_variants: {variants} given; several need config.embedding_cache and "
            "config.augmentation; set both, or 1"
        )
    if augmented and cached and variants == 1:
        raise UserError(
            "config.augmentation: set beside config.embedding_cache, which holds embeddings of "
            "unchanged slices; use one of the two, or cache augmented slices too with "
            "config.embedding_variants=4"
        )


def _check_learning_rates(config: ml_collections.ConfigDict) -> None:
    for pair in config.learning_rates:
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2
        if not is_pair or not isinstance(pair[0], str) or not isinstance(pair[1], float | int):
            raise UserError(
                f"config.learning_rates: {pair!r} is no pair of regex and factor; write "
                "(('image_encoder.*', 0.1),)"
            )
        if not pair[1] > 0:
            raise UserError(
                f"config.learning_rates: factor {pair[1]} of {pair[0]!r}; it must be above 0; to "
                "leave a part untrained, add it to config.frozen"
            )


def augmentation_of(config: ml_collections.ConfigDict) -> Augmentation | None:
    """Returns the augmentation, None if it changes nothing. Raises UserError out of range."""
    augmentation = Augmentation(**config.augmentation.to_dict())
    return None if augmentation == Augmentation() else augmentation


def profile_steps(config: ml_collections.ConfigDict) -> range:
    """Returns the steps to trace, an empty range for none. Raises UserError outside of the run."""
    if not config.profile_steps:
        return range(0)
    first, _, last = config.profile_steps.partition(":")
    if not (first.isdecimal() and last.isdecimal()) or not (
        1 <= int(first) <= int(last) <= config.num_steps
    ):
        raise UserError(
            f"config.profile_steps: {config.profile_steps!r} given; use FIRST:LAST, steps of 1 to "
            f"{config.num_steps} (config.num_steps)"
        )
    return range(int(first), int(last) + 1)


def _flat(config: ml_collections.ConfigDict) -> dict[str, object]:
    """Returns the fields by dotted path; the arguments of an optax function are one field."""
    args = {(name,) for name in OPTAX_ARGS}
    return flatten_dict(config.to_dict(), is_leaf=lambda path, _: path in args, sep=".")
