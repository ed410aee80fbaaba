"""What is trained, what is frozen, and the optax transformation that respects it."""

import math
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from medsam_jax.errors import UserError
from medsam_jax.training.lora import Leaf, is_adapter, kernel_of

FROZEN, DECAYED, UNDECAYED = "frozen", "decayed", "undecayed"


def label_parameters(
    arrays: Mapping[str, Leaf], parameters: Iterable[str], frozen: Iterable[str]
) -> dict[str, str]:
    """Labels each array `frozen`, `decayed` or `undecayed`.

    Args:
      arrays: every variable of the model by dotted path.
      parameters: the paths that may be trained at all; statistics and buffers are not among them.
      frozen: regexes; a parameter that one of them matches as a whole is frozen. Adapters
        (`lora.py`) are always trained, and the kernels below them have to be frozen.

    Raises:
      UserError: a regex that is not one or matches nothing, nothing left to train, or an adapter on
        a kernel that is trained itself.
    """
    parameters = set(parameters)
    labels = {}
    used = set()
    for name in arrays:
        matching = {regex for regex in frozen if _fullmatch("frozen", regex, name)}
        used |= matching
        if is_adapter(name):
            labels[name] = UNDECAYED
        elif matching or name not in parameters:
            labels[name] = FROZEN
        else:
            labels[name] = DECAYED if name.endswith(".kernel") else UNDECAYED
    for regex in frozen:
        if regex not in used:
            example = next(iter(arrays))
            raise UserError(f"config.frozen: {regex!r} matches no variable, such as {example}")
    if all(label == FROZEN for label in labels.values()):
        raise UserError("config.frozen: nothing is left to train; remove a pattern")
    for name in labels:
        if is_adapter(name) and labels[kernel_of(name)] != FROZEN:
            raise UserError(
                f"config.lora.targets: {kernel_of(name)} is trained itself; freeze it by "
                "config.frozen or leave its adapter out"
            )
    return labels


def _fullmatch(field: str, regex: str, name: str) -> bool:
    try:
        return re.fullmatch(regex, name) is not None
    except re.error as error:
        raise UserError(f"config.{field}: {regex!r} is no regular expression: {error}") from None


def learning_rate_schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Linear warm-up from zero, then constant or a cosine to zero at the last step."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(config.num_steps - warmup, 1))
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(
    config: ml_collections.ConfigDict, labels: Mapping[str, str]
) -> optax.GradientTransformation:
    """Adam or AdamW for what is trained; frozen arrays get no update and no state.

    Raises:
      UserError: a regex of `config.learning_rates` that is not one or matches nothing trained.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2)
    rate = optax.scale_by_learning_rate(learning_rate_schedule(config))
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    decay = optax.identity()
    if config.optimizer == "adamw" and config.weight_decay:
        decayed = {name: label == DECAYED for name, label in labels.items()}
        decay = optax.masked(optax.add_decayed_weights(config.weight_decay), decayed)
    trained = {name: "frozen" if label == FROZEN else "trained" for name, label in labels.items()}
    train = optax.chain(clip, adam, decay, rate, *_rate_factors(config, labels))
    return optax.partition({"trained": train, "frozen": optax.set_to_zero()}, trained)


def _rate_factors(
    config: ml_collections.ConfigDict, labels: Mapping[str, str]
) -> list[optax.GradientTransformation]:
    """The factors of `config.learning_rates`, each on what its regex is the first to match."""
    left = {name for name, label in labels.items() if label != FROZEN}
    factors = []
    for regex, factor in config.learning_rates:
        matching = {name for name in left if _fullmatch("learning_rates", regex, name)}
        if not matching:
            raise UserError(
                f"config.learning_rates: {regex!r} matches no trained parameter that no regex "
                "before it matches; `frozen` says what is trained"
            )
        left -= matching
        mask = {name: name in matching for name in labels}
        factors.append(optax.masked(optax.scale(factor), mask))
    return factors


def split_frozen(
    arrays: Mapping[str, Leaf], labels: Mapping[str, str]
) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """The trained arrays and the frozen ones."""
    trained = {name: value for name, value in arrays.items() if labels[name] != FROZEN}
    frozen = {name: value for name, value in arrays.items() if labels[name] == FROZEN}
    return trained, frozen


def apply_gradients(
    tx: optax.GradientTransformation,
    arrays: Mapping[str, jax.Array],
    gradients: Mapping[str, jax.Array],
    opt_state: optax.OptState,
) -> tuple[dict[str, jax.Array], optax.OptState, jax.Array]:
    """One optimiser step from the gradients of the trained arrays alone.

    optax wants a gradient for every array, so a frozen one gets a scalar zero: nothing is computed
    or stored for it, and nothing is added to it, which would already turn -0.0 into 0.0.

    Returns:
      All arrays, the optimiser's state and the global norm of the update.
    """
    everything = {name: gradients.get(name, jnp.zeros(())) for name in arrays}
    updates, opt_state = tx.update(everything, opt_state, arrays)
    updates = {name: updates[name] for name in gradients}
    trained = optax.apply_updates({name: arrays[name] for name in gradients}, updates)
    return {**arrays, **trained}, opt_state, optax.tree.norm(updates)


def parameter_table(
    arrays: Mapping[str, jax.Array | np.ndarray],
    labels: Mapping[str, str],
    opt_state: optax.OptState,
) -> str:
    """What is trained and what is frozen, per part of the model: numbers and bytes of both."""
    rows: dict[str, np.ndarray] = {}

    def part_of(name: str) -> str:
        return name.split(".")[0] + (" adapters" if is_adapter(name) else "")

    for name, value in arrays.items():
        row = rows.setdefault(part_of(name), np.zeros(5))
        column = 1 if labels[name] == FROZEN else 0
        row[column] += math.prod(value.shape)
        row[2 + column] += value.nbytes
    for path, leaf in jax.tree.leaves_with_path(opt_state):
        owners = [key.key for key in path if getattr(key, "key", None) in arrays]
        if owners:
            rows[part_of(owners[-1])][4] += leaf.nbytes
    rows["sum"] = sum(rows.values())
    columns = ("trained", "frozen", "trained MiB", "frozen MiB", "optimiser MiB")
    lines = [f"{'part':<24}" + "".join(f"{column:>15}" for column in columns)]
    for part, (trained, frozen, *sizes) in rows.items():
        numbers = f"{int(trained):>15,}{int(frozen):>15,}"
        lines.append(f"{part:<24}{numbers}" + "".join(f"{size / 2**20:>15.1f}" for size in sizes))
    return "\n".join(lines)
