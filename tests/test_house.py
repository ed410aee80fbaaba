"""Layout of the packages: who may import whom, sizes of files and classes, what models may not ask.

Everything is read from the source with `ast`, imports inside functions included.
"""

import ast
import functools
import graphlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("medsam_jax", "weights_converter", "datasets")

# Low to high: a module imports from its own line and from the lines above it.
ORDER = (
    "medsam_jax",
    "medsam_jax.datasets",  # other names of folders of a clone
    "medsam_jax.configs",
    "medsam_jax.errors",
    "medsam_jax.cli",
    "medsam_jax.distributed",
    "medsam_jax.io",
    "medsam_jax.ops",
    "medsam_jax.metrics",
    "medsam_jax.drawing",
    "medsam_jax.data",
    "medsam_jax.models",
    "weights_converter",
    "medsam_jax.hub",
    "medsam_jax.inference",
    "medsam_jax.serving",
    "medsam_jax.training",
    "medsam_jax.evaluation",
    "datasets",
    "medsam_jax.train",
    "medsam_jax.evaluate",
    "medsam_jax.predict",
    "medsam_jax.export",
    "medsam_jax.report",
    "medsam_jax.serve",
    "medsam_jax.__main__",  # starts any of the others
)
MAINS = ORDER[-7:-1]
LONGEST_FILE = 400
LONGEST_CLASS = 150
REASON = "Longer than other classes here"  # what a longer class says before it says why
ASKS_FOR_A_DEVICE = re.compile(r"default_backend|ContextVar|platform_dependent|local_devices")


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    _name(path): path for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py"))
}


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text(encoding="utf-8"))


def imported(module: ast.Module, known: set[str], name: str = "") -> set[str]:
    """Returns the modules of `known` that a module, `name`, imports, anywhere in it.

    A string that is a module's name counts: `importlib.import_module` takes such strings.
    """
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom):
            # `datasets` has another name in a wheel.
            assert node.level == 0 or (node.level == 1 and name.startswith("datasets.")), (
                f"line {node.lineno}: write imports with their whole path"
            )
            parent = [name.rpartition(".")[0]] if node.level else []
            source = ".".join([*parent, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                found |= {whole if whole in known else source} & known
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & known - {"datasets", "medsam_jax", "weights_converter"}
    return found


@functools.cache
def imports() -> dict[str, set[str]]:
    public = SOURCES.keys() - {"medsam_jax"}  # it imports its names on their first use
    return {name: imported(tree(name), set(SOURCES), name) - {name} for name in public}


def package(name: str) -> str:
    """Returns the line of `ORDER` that a module belongs to."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "medsam_jax" else 1])


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Returns the imports that run up, or from one main to another."""
    rank = {name: place for place, name in enumerate(ORDER)}
    return [
        f"{importer} imports {name}"
        for importer, names in edges.items()
        for name in sorted(names)
        if rank[package(name)] > rank[package(importer)]
        or (package(name) in MAINS and importer not in (name, ORDER[-1]))
    ]


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Returns the modules of one import circle, [] where there is none."""
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_every_module_has_its_place_in_the_order():
    assert {package(name) for name in SOURCES} == set(ORDER)


def test_imports_run_down():
    assert upward(imports()) == []


def test_no_import_circle():
    assert circles(imports()) == []


def test_the_test_sees_what_it_forbids():
    inside = ast.parse("def f():\n    from medsam_jax.training import loop\n")
    assert imported(inside, set(SOURCES)) == {"medsam_jax.training.loop"}
    late = ast.parse("import importlib\nimportlib.import_module('medsam_jax.hub')\n")
    assert imported(late, set(SOURCES)) == {"medsam_jax.hub"}
    whole = ast.parse("import medsam_jax.hub\nfrom medsam_jax.errors import UserError\n")
    assert imported(whole, set(SOURCES)) == {"medsam_jax.hub", "medsam_jax.errors"}
    beside = ast.parse("from . import slices\nfrom .workers import workers\n")
    assert imported(beside, set(SOURCES), "datasets.medical_slices.building") == {
        "datasets.medical_slices.slices",
        "datasets.medical_slices.workers",
    }
    up = {"medsam_jax.models.sam": {"medsam_jax.hub"}, "medsam_jax.hub": {"medsam_jax.errors"}}
    assert upward(up) == ["medsam_jax.models.sam imports medsam_jax.hub"]
    assert upward({"medsam_jax.train": {"medsam_jax.export"}}) != []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) != []
    assert too_long(ast.parse("class A:\n    '''One.'''\n" + "    x = 1\n" * 149)) == ["A"]
    reasoned = f"class A:\n    '''One.\n\n    {REASON}: many verbs.'''\n"
    assert too_long(ast.parse(reasoned + "    x = 1\n" * 149)) == []


def test_only_the_hub_knows_the_converter():
    knows = {
        name
        for name, found in imports().items()
        if any(package(one) == "weights_converter" for one in found)
    }
    assert {package(name) for name in knows} == {"medsam_jax.hub", "weights_converter", ORDER[-1]}


def test_evaluation_uses_the_slice_predictor_alone():
    used = {
        one
        for name, found in imports().items()
        for one in found
        if package(name) == "medsam_jax.evaluation" and package(one) == "medsam_jax.inference"
    }
    assert used == {"medsam_jax.inference.slice_predictor"}


def test_models_do_not_ask_for_the_device():
    """The form of a program's operations is chosen where it is jitted and handed down."""
    models = [name for name in SOURCES if package(name) == "medsam_jax.models"]
    assert len(models) > 5
    texts = {name: SOURCES[name].read_text(encoding="utf-8") for name in models}
    assert [name for name, text in texts.items() if ASKS_FOR_A_DEVICE.search(text)] == []


def test_files_are_short():
    folders = (*PACKAGES, "benchmarks", "configs", "launch", "scripts", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def too_long(module: ast.Module) -> list[str]:
    """Returns the classes that are too long and whose docstring does not say why."""
    return [
        node.name
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef)
        and node.end_lineno - node.lineno + 1 > LONGEST_CLASS
        and REASON not in re.sub(r"\s+", " ", ast.get_docstring(node) or "")
    ]


def test_long_classes_say_why():
    assert [f"{name}.{one}" for name in SOURCES for one in too_long(tree(name))] == []
