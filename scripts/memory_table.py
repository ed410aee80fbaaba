"""Prints XLA's planned peak memory per device of a training step on ViT-B at 1024 x 1024.

Examples:
  python scripts/memory_table.py --recipe=medsam_v1_cached,medsam_v1 --remat=off
  python scripts/memory_table.py --recipe=medsam_v2 --batch=1,2
  python scripts/memory_table.py --recipe=medsam_v2 --dtype=bfloat16 --remat=on --devices=16

The steps are those of a run (`training/setup.py`). They are compiled from shapes: no weights, data
or accelerators are needed. The peak is arguments + temporaries + outputs - memory that outputs
share with arguments. By default the step is that of an accelerator, which processes a whole batch
at once. With `--platform=cpu` it is that of a CPU, which processes one slice at a time.

The compiler is always this machine's CPU compiler, which computes bfloat16 products in float32. It
would remove the barriers that `remat` needs; this script prevents that. `--devices` simulates
several devices, with batch, parameters and optimiser state split over them (`mesh.fsdp`).
"""

import importlib.util
import itertools
import os
import pathlib
import sys
import time

from absl import flags

from medsam_jax import cli, errors

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
GIB = 2**30

_RECIPE = flags.DEFINE_list(
    "recipe",
    ["medsam_v1_cached", "medsam_v1", "medsam_v2"],
    "Configs of configs/ that start from ViT-B; with _cached the batch holds embeddings.",
)
_DTYPE = flags.DEFINE_list("dtype", ["float32", "bfloat16"], "Of the computation.")
_REMAT = flags.DEFINE_list("remat", ["off", "on"], "Whether to recompute the ViT's blocks.")
_PLATFORM = flags.DEFINE_enum("platform", "gpu", ["gpu", "cpu"], "Whose step to compile.")
_BATCH = flags.DEFINE_list("batch", ["1", "2", "4"], "Slices a device.")
_DEVICES = flags.DEFINE_integer("devices", 1, "How many to split the work over.", lower_bound=1)


def main(_) -> None:
    for flag, choices in ((_DTYPE, ("float32", "bfloat16")), (_REMAT, ("off", "on"))):
        for value in flag.value:
            if value not in choices:
                raise errors.UserError(
                    f"--{flag.name}: {value!r} given; use {' or '.join(choices)}"
                )
    if not all(value.isdigit() and int(value) > 0 for value in _BATCH.value):
        raise errors.UserError(f"--batch: {','.join(_BATCH.value)} given; use whole numbers from 1")
    settings = (
        f"--xla_force_host_platform_device_count={_DEVICES.value}",
        "--xla_disable_hlo_passes=cse_barrier_expander",
    )
    os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *settings))
    os.environ["JAX_PLATFORMS"] = "cpu"
    print("| recipe | compute | remat | batch | arguments | temporaries | peak, GiB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    cases = itertools.product(_RECIPE.value, _DTYPE.value, _REMAT.value, _BATCH.value)
    for recipe, dtype, remat, batch in cases:
        start = time.perf_counter()
        sizes = step_memory(recipe, dtype, remat == "on", int(batch), _DEVICES.value)
        arguments, temporaries, peak = (f"{size / GIB:.2f}" for size in sizes)
        print(
            f"| `{recipe}` | {dtype} | {remat} | {batch} | {arguments} | {temporaries} | {peak} |",
            flush=True,
        )
        print(f"compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr)


def step_memory(
    recipe: str, dtype: str, remat: bool, batch: int, devices: int
) -> tuple[int, int, int]:
    """Returns the bytes of arguments, temporaries and the total with outputs, on one device.

    Raises:
      UserError: unknown config.
    """
    from medsam_jax.models.sam import SamConfig
    from medsam_jax.training.setup import set_up
    from medsam_jax.training.sharding import make_mesh

    name, cached = recipe.removesuffix("_cached"), recipe.endswith("_cached")
    config = load_recipe(name)
    config.dtype, config.remat, config.batch_size = dtype, remat, batch * devices
    config.eval_batch_size = devices  # not used here, but the mesh must divide it
    config.mesh.data, config.mesh.fsdp = 1, devices
    run = set_up(config, SamConfig.vit_b(), make_mesh(config), platform=_PLATFORM.value)
    compiled = run.train_step.lower(run.state, run.train_batch(cached)).compile()
    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    new_outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return arguments, temporaries, arguments + temporaries + new_outputs


def load_recipe(name: str):
    """Returns the configuration of `configs/NAME.py`. Raises UserError if it does not exist."""
    path = CONFIGS / f"{name}.py"
    if not path.is_file():
        raise errors.UserError(f"--recipe: {name!r} is not in {CONFIGS}")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


if __name__ == "__main__":
    cli.run(main)
