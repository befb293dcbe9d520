"""The package is built in layers: a module imports what lies below it or beside it, and never in a circle."""

import ast
import graphlib
from pathlib import Path

import pytest

import rmsgd

PACKAGE = Path(rmsgd.__file__).parent

# From the bottom up. A module belongs to the longest of these names that it begins with.
LAYERS = [
    [
        "rmsgd._version",
        "rmsgd._cpu",
        "rmsgd._cuda",
        "rmsgd.element_types",
        "rmsgd.extras",
        "rmsgd.layers",
        "rmsgd.reference",
    ],
    ["rmsgd.backends", "rmsgd.rules"],
    ["rmsgd.lowrank", "rmsgd.metrics", "rmsgd.plots", "rmsgd.tails", "rmsgd.tail_rules"],
    ["rmsgd.inspection.reading"],
    ["rmsgd.inspection.weights"],
    ["rmsgd.inspection.measuring", "rmsgd.inspection.probing", "rmsgd.inspection.selection"],
    ["rmsgd.inspection", "rmsgd.inspection.report"],
    ["rmsgd.optim"],
    ["rmsgd.integrations", "rmsgd.doctor"],
    ["rmsgd", "rmsgd.cli", "rmsgd.__main__"],
]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules():
    """The name of every module and its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


MODULES = dict(modules())
COMPILED = {"rmsgd._cpu", "rmsgd._cuda"}


def level_of(module):
    known = [name for name in LEVELS if module == name or module.startswith(name + ".")]
    return LEVELS[max(known, key=len)]


def imports(module):
    """The modules of the package that a module imports, anywhere in it, with the function they stand in."""

    def visit(node, function):
        if isinstance(node, ast.Import):
            yield from ((alias.name, function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in MODULES or inner in COMPILED else node.module), function
        inside = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return [(name, function) for name, function in visit(tree, None) if name.split(".")[0] == "rmsgd"]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_what_lies_below_it_or_beside_it(module):
    above = [name for name, _ in imports(module) if level_of(name) > level_of(module)]
    assert above == []


def test_no_import_is_circular():
    graph = {module: {name for name, _ in imports(module)} for module in MODULES}
    order = list(
        graphlib.TopologicalSorter(graph).static_order()
    )  # raises CycleError, which names the circle
    assert set(order) >= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_no_import_of_the_package_is_hidden_in_a_function(module):
    hidden = {name for name, function in imports(module) if function is not None}
    # Only what is compiled at installation, and may be missing, is imported where it is needed.
    assert hidden <= COMPILED


def reached(module):
    """All modules of the package that a module imports, directly or not."""
    found, ahead = set(), [module]
    while ahead:
        new = {name for name, _ in imports(ahead.pop()) if name in MODULES} - found
        found |= new
        ahead += new
    return found


def test_the_epoch_end_and_the_step_know_nothing_of_each_other():
    step, epoch_end = {"rmsgd.optim.device_step"}, {"rmsgd.optim.rates", "rmsgd.optim.device_rates"}
    optimizer = {"rmsgd.optim.optimizer"}
    assert all(reached(module).isdisjoint(step | optimizer) for module in epoch_end)
    assert all(reached(module).isdisjoint(epoch_end | optimizer) for module in step)
    assert step | epoch_end <= reached("rmsgd.optim.optimizer")


def test_every_module_has_a_layer_of_its_own_and_the_layers_are_there():
    assert all(level_of(module) is not None for module in MODULES)
    assert set(LEVELS) - COMPILED <= set(MODULES)
    assert len(LEVELS) == sum(map(len, LAYERS))
