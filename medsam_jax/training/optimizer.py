"""Labels of trained and frozen parameters, and the optax transformation that follows them."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from medsam_jax.errors import UserError
from medsam_jax.ops.form import PLAIN, Form
from medsam_jax.ops.global_norm import global_norm
from medsam_jax.training.lora import Leaf, is_adapter, kernel_of, matching

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

    Raises UserError for a regex that is invalid or matches nothing, for nothing left to train, and
    for an adapter on a kernel that is trained itself.
    """
    trained = set(parameters)
    for regex in frozen:
        found = matching("frozen", regex, arrays)
        if not found:
            example = next(iter(arrays))
            raise UserError(f"config.frozen: {regex!r} matches no variable, such as {example}")
        trained -= set(found)
    adapters = [name for name in arrays if is_adapter(name)]
    labels = dict.fromkeys(arrays, FROZEN) | dict.fromkeys(adapters, UNDECAYED)
    labels |= {name: DECAYED if name.endswith(".kernel") else UNDECAYED for name in trained}
    if set(labels.values()) == {FROZEN}:
        raise UserError("config.frozen: nothing is left to train; remove a pattern")
    for name in adapters:
        if labels[kernel_of(name)] != FROZEN:
            raise UserError(
                f"config.lora.targets: {kernel_of(name)} is trained itself; freeze it by "
                "config.frozen or leave its adapter out"
            )
    return labels


def learning_rate_schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Returns the learning rate by step: a linear warm-up from zero, then `config.schedule`.

    The optax schedule starts at `config.learning_rate` and takes the steps that are left, unless
    `config.schedule_args` says otherwise. Raises UserError for what optax does not know.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    steps = max(config.num_steps - warmup, 1)
    defaults = dict.fromkeys(("value", "init_value", "peak_value"), peak)
    defaults |= dict.fromkeys(("decay_steps", "transition_steps"), steps)
    after = _from_optax(config, "schedule", _optax_schedules(), defaults)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(
    config: ml_collections.ConfigDict, labels: Mapping[str, str], form: Form = PLAIN
) -> optax.GradientTransformation:
    """Returns the optimiser of the trained arrays; frozen ones get no update and no state.

    Raises UserError for an optimiser, schedule or argument that optax does not know, and for a
    regex of `config.learning_rates` that is invalid or matches nothing trained.
    """
    clip = _clip(config.clip_norm, form) if config.clip_norm else optax.identity()
    optimizer = optimizer_from_optax(config, learning_rate_schedule(config), labels)
    trained = {name: "frozen" if label == FROZEN else "trained" for name, label in labels.items()}
    train = optax.chain(clip, optimizer, *_rate_factors(config, labels))
    return optax.partition({"trained": train, "frozen": optax.set_to_zero()}, trained)


def _clip(most: float, form: Form) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` with the norm of `ops.global_norm`."""

    def clip(updates: Any, _: Any) -> Any:
        norm = global_norm(updates, form)
        return jax.tree.map(lambda x: jnp.where(norm < most, x, x / norm * most), updates)

    return optax.stateless(clip)


def optimizer_from_optax(
    config: ml_collections.ConfigDict, schedule: optax.Schedule, labels: Mapping[str, str]
) -> optax.GradientTransformation:
    """Returns optax's function `config.optimizer`, called with `config.optimizer_args`.

    Optimisers whose decay takes a mask get `config.weight_decay` for the arrays labelled DECAYED.
    Raises UserError for an unknown one, a wrong argument, or one that needs more than gradients.
    """

    def decayed(arrays: Mapping[str, Any]) -> dict[str, bool]:
        return {name: labels.get(name) == DECAYED for name in arrays}

    defaults = {"learning_rate": schedule, "weight_decay": config.weight_decay}
    defaults |= {"mask": decayed, "weight_decay_mask": decayed}
    tx = _from_optax(config, "optimizer", _optax_optimizers(), defaults)
    try:
        example = {"kernel": jnp.zeros((2, 2))}
        jax.eval_shape(lambda x: tx.update(x, tx.init(x), x), example)
    except TypeError as error:  # optax.lbfgs wants the value of the loss too
        reason = str(error).splitlines()[0]
        raise UserError(
            f"config.optimizer: {config.optimizer!r} with {config.optimizer_args.to_dict()} takes "
            f"no step from gradients alone ({reason}); choose another, such as 'adamw'"
        ) from None
    return tx


def _optax_optimizers() -> dict[str, Callable]:
    """Functions of optax whose first parameter is the learning rate."""
    functions = {n: x for n, x in vars(optax).items() if inspect.isfunction(x)}
    with_rate = {n: f for n, f in functions.items() if "learning_rate" in _parameters(f)}
    return {n: f for n, f in with_rate.items() if not n.startswith("scale_by_")}


def _optax_schedules() -> dict[str, Callable]:
    """Schedules of optax under their names, and without `_schedule` or `_decay_schedule`."""
    found = {}
    for name, function in vars(optax).items():
        if not name.startswith("scale_by_") and name.endswith(("_schedule", "_decay")):
            short = name.removesuffix("_schedule").removesuffix("_decay")
            found |= {name: function, short: function}
    return found


def _parameters(function: Callable) -> set[str]:
    return set(inspect.signature(function).parameters)


def _from_optax(
    config: ml_collections.ConfigDict,
    field: str,
    functions: Mapping[str, Callable],
    defaults: dict[str, Any],
) -> Any:
    """Calls the function `config.FIELD` with `config.FIELD_args` and the defaults that it has."""
    if config[field] not in functions:
        raise UserError(
            f"config.{field}: {config[field]!r} is not in optax; use one of "
            f"{', '.join(sorted(functions))}"
        )
    function = functions[config[field]]
    args, parameters = config[f"{field}_args"].to_dict(), _parameters(function)
    if not {"mask", "weight_decay_mask"} & parameters:  # it would decay every array
        defaults = {name: x for name, x in defaults.items() if name != "weight_decay"}
    for name in sorted(args.keys() - parameters):
        raise UserError(
            f"config.{field}_args: {config[field]} of optax has no argument {name!r}; it has "
            f"{', '.join(sorted(parameters - defaults.keys()))}"
        )
    try:
        return function(**{name: x for name, x in defaults.items() if name in parameters} | args)
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"config.{field}_args: {args} given; {reason}; correct it for optax's {config[field]}"
        ) from None


def _rate_factors(
    config: ml_collections.ConfigDict, labels: Mapping[str, str]
) -> list[optax.GradientTransformation]:
    """Returns the multipliers of `config.learning_rates`; the first regex that matches applies."""
    left = {name for name, label in labels.items() if label != FROZEN}
    factors = []
    for regex, factor in config.learning_rates:
        found = set(matching("learning_rates", regex, left))
        if not found:
            raise UserError(
                f"config.learning_rates: {regex!r} matches no trained parameter that is left by "
                "the regexes before it; correct it, or see config.frozen"
            )
        left -= found
        mask = {name: name in found for name in labels}
        factors.append(optax.masked(optax.scale(factor), mask))
    return factors


def split_frozen(
    arrays: Mapping[str, Leaf], labels: Mapping[str, str]
) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """Returns the trained arrays and the frozen ones."""
    trained = {name: value for name, value in arrays.items() if labels[name] != FROZEN}
    return trained, {name: value for name, value in arrays.items() if name not in trained}


def apply_gradients(
    tx: optax.GradientTransformation,
    arrays: Mapping[str, jax.Array],
    gradients: Mapping[str, jax.Array],
    opt_state: optax.OptState,
    form: Form = PLAIN,
) -> tuple[dict[str, jax.Array], optax.OptState, jax.Array]:
    """Returns all arrays after one step, the optimiser's state and the global norm of the update.

    `gradients` are those of the trained arrays. optax expects one for every array, so a frozen one
    gets a scalar zero. Nothing is added to a frozen array: adding zero would turn -0.0 into 0.0.
    """
    everything = {name: gradients.get(name, jnp.zeros(())) for name in arrays}
    updates, opt_state = tx.update(everything, opt_state, arrays)
    updates = {name: updates[name] for name in gradients}
    trained = optax.apply_updates({name: arrays[name] for name in gradients}, updates)
    return {**arrays, **trained}, opt_state, global_norm(updates, form)


def parameter_table(
    arrays: Mapping[str, Leaf], labels: Mapping[str, str], opt_state: optax.OptState
) -> str:
    """Formats numbers and bytes of trained and frozen arrays for each part of the model."""
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
