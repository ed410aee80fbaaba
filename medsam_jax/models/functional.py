"""Variables of a module as arrays by dotted path, for saving, training and `jax.jit`."""

import copy
import dataclasses
from collections.abc import Mapping

import jax
from flax import nnx
from jaxtyping import Array

from medsam_jax.models.common import Derived
from medsam_jax.ops.form import PLAIN, Form


class Functional:
    """A module split into its static part and a flat dict of arrays, for `jax.jit` over the dict.

    `nnx.jit` traverses the module's graph at every call, `Functional` once. The module's arrays may
    be abstract. `form` (`ops.form`) is that of every program that is jitted with the model.
    """

    def __init__(self, module: nnx.Module, form: Form = PLAIN):
        self.form = form
        self._graphdef, self._derived, state = nnx.split(module, Derived, ...)
        keyed, self._treedef = jax.tree.flatten_with_path(state)
        self.arrays = {_dotted(path): leaf for path, leaf in keyed}
        leaves = jax.tree.leaves(self._derived)
        self._abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)

    def bind(self, arrays: Mapping[str, Array | jax.ShapeDtypeStruct]) -> nnx.Module:
        """Returns the module with these arrays, which may be traced, in the chosen form."""
        derived = jax.tree.map(lambda x: x, self._derived)  # variables of this trace
        state = jax.tree.unflatten(self._treedef, [arrays[name] for name in self.arrays])
        module = nnx.merge(self._graphdef, derived, state)
        module.set_attributes(form=self.form, raise_if_not_found=False)
        if self._abstract:
            derive(module)
        return module

    def for_inference(self) -> "Functional":
        """Returns the same function of arrays from which nothing is left to compute.

        Kernels are in the compute dtype and contain their norm's scale, and tables are expanded.
        Only for an accelerator's form. A program that takes these arrays computes none of this.
        """
        if self.form.device != "accelerator" or self.form.folded:
            return self

        def fold(arrays: Mapping[str, Array]) -> dict[str, Array]:
            module = self.bind(arrays)
            for _, part in nnx.iter_modules(module):
                if hasattr(part, "fold"):
                    part.fold()
                elif isinstance(part, nnx.Linear | nnx.Conv) and part.dtype is not None:
                    for parameter in (part.kernel, part.bias):
                        if parameter is not None:
                            parameter.set_value(parameter[...].astype(part.dtype))
            return Functional(module).arrays

        abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in self.arrays.values())
        arrays = jax.eval_shape(fold, self.arrays) if abstract else jax.jit(fold)(self.arrays)
        folded = copy.copy(self)
        folded.form = dataclasses.replace(self.form, folded=True)
        # jax sorts the names of a result; `bind` needs the order of the module.
        folded.arrays = {name: arrays[name] for name in self.arrays}
        return folded


def derive(module: nnx.Module) -> None:
    """Computes a module's `Derived` arrays; call it after a change of the other arrays."""
    for _, part in nnx.iter_modules(module):
        if hasattr(part, "derive"):
            part.derive()


def _dotted(path: tuple) -> str:
    return ".".join(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))


def flatten_state(module: nnx.Module) -> dict[str, Array | jax.ShapeDtypeStruct]:
    """Returns the variables of `module` by dotted path, without `Derived` ones."""
    return Functional(module).arrays


def parameter_names(module: nnx.Module) -> list[str]:
    """Returns the dotted paths of trainable variables: parameters, not statistics or buffers."""
    keyed, _ = jax.tree.flatten_with_path(nnx.state(module, nnx.Param))
    return [_dotted(path) for path, _ in keyed]
