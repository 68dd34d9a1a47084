"""The rules of the house, read from the source: who may import whom, and how long a file may be."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("deit", "mae", "swin", "resnet_rsb")
PACKAGES = ("common", *RECIPES, "scripts")

# inside common/, from top to bottom: a module imports its own layer and those below it, without cycles
LAYERS = (
    {"common.cli"},
    {"common.train"},
    {"common.evaluation", "common.run", "common.run_report", "common.logger"},
    {"common.trainer", "common.engine", "common.data_config"},
    {"common.data", "common.checkpoint"},
    {"common"},  # the small modules: all others
)
METHOD = {
    *("common.augsub", "common.criteria", "common.drop_layers", "common.drops", "common.foreign"),
    *("common.masking", "common.step_checks", "common.token_drop"),
}
SETTINGS = ("common.args", "common.train_args", "common.recipe")  # the modules that know all settings
MAX_LINES, MAX_FMT_SKIPS = 400, 40


@cache
def sources() -> dict[str, Path]:
    """Module names → files of all code but the tests."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text())


@cache
def imports(module: str, as_command: bool = True) -> frozenset[str]:
    """What a module imports anywhere: at its top, inside functions and under TYPE_CHECKING.

    `as_command`: also under `if __name__ == "__main__"`.
    """
    names = set()
    nodes = [node for node in tree(module).body if as_command or not is_main_guard(node)]
    for node in (child for parent in nodes for child in ast.walk(parent)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = absolute_origin(node, module, sources()[module])
            names |= {name if (name := f"{origin}.{alias.name}") in sources() else origin for alias in node.names}
    return frozenset(names)


def absolute_origin(node: ast.ImportFrom, module: str, path: Path) -> str:
    """Return the module that `from … import` names: common.drops for `from .drops import x` in common/augsub.py."""
    parents = module.split(".") + ["__init__"] * (path.name == "__init__.py")
    return (
        ".".join([*parents[: -node.level], *([node.module] if node.module else [])])
        if node.level
        else node.module or ""
    )


def is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def local_imports(module: str) -> set[str]:
    """Those of this repository."""
    return {name for name in imports(module) if top(name) in PACKAGES}


def top(module: str) -> str:
    return module.partition(".")[0]


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def layer(module: str) -> int:
    """Position of a module of common/ in LAYERS."""
    layers = (i for i, members in enumerate(LAYERS) if any(within(module, member) for member in members))
    return next(layers, len(LAYERS))


def is_command(module: str) -> bool:
    """Whether a file is run: an entry point or a script's command line."""
    return top(module) != "common" and any(map(is_main_guard, tree(module).body))


def allowed(module: str, imported: str) -> bool:
    """Entry point → recipe → common, and scripts → recipes → common."""
    if within(imported, "common"):
        return True
    if within(module, "scripts"):
        return within(imported, "scripts") or not is_command(imported)
    return top(module) == top(imported) != "common" and not is_command(imported)


def violations(modules: list[str], rule) -> list[str]:
    """The imports that break a rule, as "module → imported"."""
    return [
        f"{module} → {name}" for module in modules for name in sorted(local_imports(module)) if not rule(module, name)
    ]


def common_modules() -> list[str]:
    return [module for module in sources() if top(module) == "common"]


def test_imports_are_found_wherever_they_stand():
    assert "common.train" in imports("common.cli")  # inside a function
    assert {"torch", "common.masking"} <= imports("common.augsub")
    assert len(common_modules()) > 20 and len(sources()) > 40


def test_imports_run_one_way():
    """Common imports no recipe and no script, a recipe no script and no other recipe, and nobody an entry point."""
    found = violations(list(sources()), allowed)
    assert not found, "\n".join(map(str, found))


def test_packages_of_scripts_import_no_command_line():
    modules = [module for module in sources() if within(module, "scripts.launch") or within(module, "scripts.bench")]
    commands = {module for module in sources() if is_command(module) and module.count(".") == 1}
    found = violations(modules, lambda module, name: name not in commands)
    assert not found, "\n".join(map(str, found))


def test_the_layers_of_common():
    found = violations(common_modules(), lambda module, name: layer(module) <= layer(name))
    assert not found, "\n".join(map(str, found))


def test_no_cycles():
    """Also none that functions or TYPE_CHECKING hide."""
    graph, found = {module: local_imports(module) - {module} for module in sources()}, []
    while cycle := find_cycle(graph):
        found.append(" → ".join(cycle))
        graph[cycle[0]].remove(cycle[1])
    assert not found, "\n".join(found)


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next one; none where there is no cycle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def test_no_module_is_named_by_a_string():
    """An import hidden in "module:function" or import_module("module") would pass the other tests."""
    names = []
    for module in sources():
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = re.fullmatch(r"(\w+(?:\.\w+)+):\w+", node.value)
                names += [f"{module}:{node.lineno} {node.value}"] if found and not found[1].isdigit() else []
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
                literal = node.args and isinstance(node.args[0], ast.Constant)
                names += [f"{module}:{node.lineno} {ast.unparse(node)}"] if literal or top(module) == "common" else []
    assert not names, "\n".join(names)


def test_recipe_imports_no_module_that_imports_it():
    importers = {module for module in sources() if "common.recipe" in imports(module)}
    assert local_imports("common.recipe") & importers == set()


def test_the_method_needs_torch_and_timm_only():
    for module in METHOD:
        others = {name for name in imports(module, as_command=False) if top(name) not in sys.stdlib_module_names}
        assert {name for name in others if top(name) not in ("torch", "timm")} <= METHOD, module


def test_the_package_holds_the_modules_that_it_imports():
    """pyproject.toml lists them; by relative imports, since `common` is called `augsub` there; torch and timm only, but for
    the integrations, of which each imports its own library."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = {name.replace("augsub", "common", 1) for name in settings["py-modules"]} | {"common"}
    packages = [name.replace("augsub", "common", 1) for name in settings.get("packages", [])]
    listed |= {module for module in sources() if any(within(module, package) for package in packages)}
    assert listed <= sources().keys() and listed >= METHOD
    for module in listed:
        assert local_imports(module) <= listed, module
        nodes = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {name for node in nodes for name in absolute_names(node)}
        assert not names & {"augsub", *PACKAGES}, module
        libraries = names - sys.stdlib_module_names
        assert libraries <= {"torch", "timm"} or within(module, "common.integrations"), module


def absolute_names(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Return the top-level packages that an absolute import names."""
    if isinstance(node, ast.Import):
        return {top(alias.name) for alias in node.names}
    return set() if node.level else {top(node.module or "")}


def test_the_repository_imports_the_method_by_one_name():
    """Installed, `common` is called `augsub`; both in one process would be two classes of each name."""
    found = []
    for path in [*sources().values(), *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom) and "augsub" in absolute_names(node):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found, "import from `common`: " + ", ".join(found)


def test_data_and_checkpoints_take_values():
    """They import none of SETTINGS, and no function takes all settings."""
    found = []
    for module in sources():
        if not within(module, "common.data") and not within(module, "common.checkpoint"):
            continue
        found += [f"{module} → {name}" for name in SETTINGS if name in imports(module)]
        found += [f"{module}:{node.lineno} {ast.unparse(node)}" for node in ast.walk(tree(module))
                  if isinstance(node, ast.arg) and node.annotation and re.search("Namespace|TrainArgs", ast.unparse(node))]  # fmt: skip
    assert not found, "\n".join(map(str, found))


def test_common_knows_no_recipe_by_name():
    names = []
    for module in common_modules():
        names += [f"{module}:{node.lineno}" for node in ast.walk(tree(module))
                  if isinstance(node, ast.Constant) and node.value in RECIPES]  # fmt: skip
    assert not names, "\n".join(names)


def test_no_file_is_long():
    lines = {module: len(file.read_text().splitlines()) for module, file in sources().items()}
    found = [(module, count) for module, count in lines.items() if count > MAX_LINES]
    assert not found, "\n".join(map(str, found))


def test_the_formatter_has_its_way():
    count = sum(file.read_text().count("# fmt: " + "skip") for file in sources().values())
    assert count <= MAX_FMT_SKIPS
