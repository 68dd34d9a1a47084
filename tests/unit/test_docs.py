"""What the pages and docstrings say: links lead somewhere, files and functions exist, commands parse."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

from common.args import parse
from common.parser import Parser
from scripts.launch.registry import ENTRY_POINTS, RECIPES, recipe_of
from tests.commands import ROOT
from tests.unit.test_imports import absolute_origin

ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("[!.]*/README.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(\w+=\S+ )*(python|torchrun|bash|sbatch|make) ")
FOLDERS = ("common", "scripts", "tests", *(name.partition("/")[0] for name in ENTRY_POINTS.values()))
SCRIPTS = [path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*") if path.suffix in (".py", ".sh")]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def links(page: Path) -> list[tuple[str, str]]:
    """Text and target of each link and image, outside fenced blocks, to a file of the repository."""
    found = re.findall(r"\[((?:\\.|[^\[\]])*)\]\(([^)\s]+)\)", FENCE.sub("", page.read_text()))
    return [(text, target) for text, target in found if "://" not in target]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def defined_names(path: Path) -> set[str]:
    """Functions, classes, methods as Class.method, and constants of a module."""
    names: set[str] = set()

    def add(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                add(node.body, f"{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                names.update(prefix + item.id for item in ast.walk(target or ast.Pass()) if isinstance(item, ast.Name))

    add(ast.parse(path.read_text()).body, "")
    return names


def files_in_tree() -> set[str]:
    """Paths in the first fenced block, whose indentation of two spaces a level stands for folders."""
    block = FENCE.findall(ARCHITECTURE.read_text())[0][1]
    paths: set[str] = set()
    parents: list[str] = []
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name]
        paths.add("".join(parents))
    return paths


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    for _, target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file), target


def test_functions_in_the_walks_are_defined_in_the_linked_files():
    walked = [(text.strip("`"), target) for text, target in links(ARCHITECTURE) if text.startswith("`")]
    assert len(walked) > 60
    for name, target in walked:
        assert name in defined_names(ARCHITECTURE.parent / target), f"{name} in {target}"


def test_the_tree_names_each_module_and_only_what_exists():
    named = files_in_tree()
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
    modules = [*ROOT.glob("common/**/*.py"), *ROOT.glob("scripts/**/*")]
    modules += [path for recipe in ENTRY_POINTS.values() for path in (ROOT / recipe).parent.glob("*.py")]
    modules = [path for path in modules if path.is_file() and path.suffix != ".pyc" and path.name != "__init__.py"]
    assert len(modules) > 60 and [path for path in map(name_of, modules) if path not in named] == []


def test_the_layers_of_common_are_those_of_its_imports():
    (block,) = (text for _, text in FENCE.findall(ARCHITECTURE.read_text()) if text.startswith("cli\n"))
    layer = {name.rstrip("/"): number for number, line in enumerate(block.splitlines()) for name in line.split()}
    paths = [path for path in ROOT.glob("common/**/*.py") if path != ROOT / "common" / "__init__.py"]
    assert {path.relative_to(ROOT / "common").parts[0].removesuffix(".py") for path in paths} == layer.keys()
    for path in paths:
        importer = path.relative_to(ROOT / "common").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            origin = absolute_origin(node, module, path).split(".")
            if origin[0] != "common":
                continue
            modules = [origin[1]] if len(origin) > 1 else [alias.name for alias in node.names]
            for module in modules:
                assert module == importer or layer[module] > layer[importer], f"{name_of(path)} imports {module}"


def commands(path: Path) -> Iterator[list[str]]:
    """Words of the commands in a page's fences and code, or in a module's docstring. A "…" after a flag stands for its
    value; elsewhere it is left out."""
    if path.suffix == ".py":
        docstring = re.sub(r"\\\n *", "", ast.get_docstring(ast.parse(path.read_text())) or "")
        texts = re.findall(r"^    (.+)$", docstring, re.MULTILINE)
        texts = [re.split(r"(?<=\S) {2,}(?![ -])", text)[0] for text in texts]  # an explanation may follow
    elif path.suffix == ".sh":
        texts = re.findall(r"^#     (.+)$", path.read_text(), re.MULTILINE)
    else:
        text = path.read_text()
        texts = [line for language, block in FENCE.findall(text) if not language for line in block.splitlines()]
        texts += re.findall(r"`([^`]+)`", FENCE.sub("", text))
    for text in texts:
        if not COMMAND.match(text):
            continue
        words = shlex.split(text, comments=True)
        while "=" in words[0]:
            del words[0]
        pairs = [(word, previous.startswith("--")) for previous, word in zip(["", *words], words)]
        yield ["x" if word == "…" else word for word, after_flag in pairs if word != "…" or after_flag]


class Parsed(BaseException):
    """Carries what a parser returned out of a script's `main`."""


def parse_in_main(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a script's parser makes of its command line; the script is left there."""
    main = import_module(module).main  # imported first, since modules of the launcher parse variants when they load
    method = "parse_known_args" if module == "scripts.compare_digits" else "parse_args"
    for kind in (argparse.ArgumentParser, Parser):
        if module == "scripts.compare_digits" and kind is Parser:
            continue
        original = vars(kind)[method]

        def stop(self: Any, *args: Any, original: Any = original) -> None:
            raise Parsed(original(self, *args))

        monkeypatch.setattr(kind, method, stop)
    monkeypatch.setattr("sys.argv", [module, *words])
    with pytest.raises(Parsed) as parsed:
        main()
    monkeypatch.undo()
    return parsed.value.args[0]


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in words:
            pattern = rf"^{word.partition('=')[0]} \?=" if "=" in word else rf"^{word}:"
            assert re.search(pattern, makefile, re.MULTILINE), word
        return
    if program == "torchrun":
        launch = torchrun_parser().parse_args(words)
        script, words = launch.training_script, launch.training_script_args
    elif words[0] == "-m":
        module = re.sub(r"^augsub\b", "common", words[1]).replace(".", "/")  # the installed package's name
        script, words = f"{module}/__main__.py" if (ROOT / module).is_dir() else f"{module}.py", words[2:]
    else:
        script, *words = words
    assert (ROOT / script).is_file(), script
    module = script.removesuffix(".py").replace("/", ".")
    if script in ENTRY_POINTS.values():
        parse(recipe_of(script), words)
    elif script == "scripts/reproduce_table.sh":
        parse_in_main("scripts.reproduce", words, monkeypatch)
    elif script in ("common/__main__.py", "common/augsub.py"):
        parse_in_main("common.survey", words, monkeypatch)
    elif script == "scripts/submit.py":
        launch = parse_in_main(module, words, monkeypatch)
        parse(RECIPES[launch.recipe], words[words.index("--") + 1 :])
    elif script == "scripts/compare_digits.py":
        launch, flags = parse_in_main(module, words, monkeypatch)
        parse(recipe_of(launch.entry), flags)
    elif script == "scripts/launch/job.py":
        assert len(words) == 1
    elif words and ".parse_args(" in (ROOT / script).read_text():  # any other `main` would do its work
        parse_in_main(module, words, monkeypatch)


@pytest.mark.parametrize("path", [path for path in [*PAGES, *SCRIPTS] if any(commands(path))], ids=name_of)
def test_commands_parse(path, monkeypatch):
    for words in commands(path):
        if "scripts/benchmark.py" not in words:  # test_benchmark.py parses those
            check_command(words, monkeypatch)


def test_commands_are_seen():
    counts = {name_of(path): len(list(commands(path))) for path in [*PAGES, *SCRIPTS]}
    assert counts["README.md"] >= 25 and counts["deit/README.md"] >= 13 and counts["swin/README.md"] >= 6
    assert counts["scripts/reproduce.py"] >= 3 and all(counts[name] for name in ENTRY_POINTS.values())
