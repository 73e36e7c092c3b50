"""The direction of imports, read from the syntax tree."""

import ast
from pathlib import Path

import pytest

import jaxgen

ROOT = Path(jaxgen.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# design.md, "The house": a floor imports from floors below it, never from beside or above.
FLOORS = [
    ["types"],
    ["trees", "config", "flops", "locks"],
    ["sharding"],
    ["models", "diffusion", "adapters", "weights", "data"],
    ["denoiser", "parts", "refs"],
    ["request", "zoo", "controls"],
    ["plan"],
    ["load", "conditioning"],
    ["save", "generate", "tasks"],
    ["output", "training"],
    ["evaluation"],
    ["seedselect", "cache", "terminal"],
    ["__init__"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ORACLES = {"torch", "diffusers", "transformers", "peft", "torchvision", "accelerate"}


def imported(path):
    """Full names of the modules that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively, line {node.lineno}"
            module = ROOT.parent.joinpath(*node.module.split("."))
            for alias in node.names:  # `from jaxgen import trees` imports a room, not a name
                inner = module / alias.name
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def room(module):
    """The room that holds a module of ours: `jaxgen.models.unet` is in `models`."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["jaxgen", *parts])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    here = room(name(path))
    assert here in FLOOR, f"{here} has no floor; where does it belong in design.md?"
    for module in imported(path):
        if module.split(".")[0] == "jaxgen" and room(module) != here:
            there = room(module)
            assert FLOOR[there] < FLOOR[here], f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_needs_no_oracle(path):
    assert not ORACLES & {module.split(".")[0] for module in imported(path)}


def test_data_and_weights_are_numpy_alone():
    for path in FILES:
        if room(name(path)) in ("data", "weights"):
            assert not {"jax", "flax"} & {m.split(".")[0] for m in imported(path)}, path
