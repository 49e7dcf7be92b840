"""Imports flow downhill, and nothing in the package can run what it reads. Both are read off the syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
PACKAGE = "gpt2lab"

TIERS = [
    ["cli", "commands", "__main__"],
    ["serve", "study", "bench"],
    ["train", "replay", "run", "feed", "settle", "folder", "plan", "memory", "generation", "evaluate"],
    [
        *("data", "checkpoint", "writer", "weights", "optim", "system", "tracking", "health"),
        *("distributed", "rendezvous", "watch", "launch", "strategy", "exact"),
    ],
    ["model"],
    [
        *(
            "config",
            "recipe",
            "tokenizer",
            "words",
            "errors",
            "hub",
            "download",
            "manifest",
            "paths",
            "seeds",
            "tensors",
        ),
        "__init__",
    ],
]
"""From the top of the hill down: a module imports from its own tier and those below."""

FORBIDDEN = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
"""Modules whose files can run code when they are opened."""
CALLS = {"eval", "exec", "__import__", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen"}
KEYWORDS = {"shell", "trust_remote_code", "allow_pickle"}
ALLOWED = {
    "gpt2lab.weights.unpickle calls torch.load(weights_only=True)",
    "gpt2lab.weights.__init__ calls allow_pickle=allow_pickle",
    "gpt2lab.commands.weights calls allow_pickle=arguments.allow_pickle",
}
"""One door, with weights_only=True, for files whose user asked for it, in a child process: tests/weights/test_pickles.py."""


def modules(source: Path) -> dict[str, ast.Module]:
    """Every module below a source folder by its dotted name, parsed; a package is its ``__init__``."""
    paths = sorted((source / PACKAGE).rglob("*.py"))
    return {
        ".".join(path.relative_to(source).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for path in paths
    }


def imports(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """The dotted names that a module imports, wherever in it; those for the type checker alone do not count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "."
            for (
                alias
            ) in node.names:  # `from gpt2lab.data import shards` imports a module, `import Shards` a name in one
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known or f"{inner}.__init__" in known else str(node.module)


def room(module: str) -> str:
    """The part of the house that a module is in: ``gpt2lab.data.shards`` is in data."""
    return module.split(".")[1]


def dangerous_calls(tree: ast.Module) -> Iterator[str]:
    """Calls that run what they are given, and keywords that open a door."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from {ast.unparse(node.func)} & CALLS
            if ast.unparse(node.func) == "torch.load":
                only = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
                yield "torch.load(weights_only=True)" if only else "torch.load"
            for word in node.keywords:
                if word.arg in KEYWORDS and ast.unparse(word.value) != "False":
                    yield f"{word.arg}={ast.unparse(word.value)}"


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """A way that leads back to where it started, or nothing."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for other in sorted(edges[node]):
                if found := visit(other, [*path, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(edges) if (found := visit(node, []))), [])


def problems(source: Path) -> list[str]:
    """Everything that is wrong with the imports and calls of a source folder, in one sentence each."""
    trees, found = modules(source), []
    known = set(trees)
    tier_of = {name: number for number, names in enumerate(TIERS) for name in names}
    edges: dict[str, set[str]] = {module: set() for module in known}
    for module, tree in trees.items():
        if room(module) not in tier_of:
            found.append(f"{module}: {room(module)} has no tier")
            continue
        for name in imports(tree, known):
            top = name.partition(".")[0]
            if name == ".":
                found.append(f"{module} imports by a relative path")
            elif top in FORBIDDEN:
                found.append(f"{module} imports {name}")
            elif top == "transformers" and module != f"{PACKAGE}.weights.export" and room(module) != "bench":
                found.append(f"{module} imports transformers")
            elif top == PACKAGE:
                target = f"{name}.__init__" if f"{name}.__init__" in known else name
                if target not in known:
                    found.append(f"{module} imports {name}, which is not there")
                    continue
                edges[module].add(target)
                if tier_of.get(room(target), 0) < tier_of[room(module)]:
                    found.append(f"{module} imports uphill: {name}")
                if room(module) == "model" and room(target) == "config" and module != f"{PACKAGE}.model.gpt2":
                    found.append(f"{module} knows the config")
        found += {f"{module} calls {call}" for call in dangerous_calls(tree)} - ALLOWED
    if path := cycle(edges):
        found.append(f"in a circle: {' -> '.join(path)}")
    return found


def test_the_package() -> None:
    assert len(modules(SOURCE)) == len(list((SOURCE / PACKAGE).rglob("*.py"))) > 30
    assert not problems(SOURCE)


SOUND = {
    "__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gpt2lab.train import train\n",
    "cli.py": "def run():\n    from gpt2lab.train import train\n",
    "train.py": "import torch\nfrom gpt2lab.model.gpt2 import GPT2\nmodel = GPT2()\nmodel.eval()\n",
    "model/__init__.py": "",
    "model/gpt2.py": "from gpt2lab import config\nfrom gpt2lab.config import GPT2Config\n",
    "model/mlp.py": "import torch\n",
    "config.py": "import yaml\nyaml.safe_load('')\nimport ast\nast.literal_eval('1')\n",
    "errors.py": "",
}

VIOLATIONS = [
    ("errors.py", "from gpt2lab.model.gpt2 import GPT2", "gpt2lab.errors imports uphill: gpt2lab.model.gpt2"),
    ("model/mlp.py", "import gpt2lab.train", "gpt2lab.model.mlp imports uphill: gpt2lab.train"),
    ("model/mlp.py", "def f():\n    from gpt2lab import cli", "gpt2lab.model.mlp imports uphill: gpt2lab.cli"),
    ("model/mlp.py", "from gpt2lab.config import GPT2Config", "gpt2lab.model.mlp knows the config"),
    ("model/mlp.py", "from gpt2lab import config", "gpt2lab.model.mlp knows the config"),
    ("model/mlp.py", "from .gpt2 import GPT2", "gpt2lab.model.mlp imports by a relative path"),
    ("train.py", "import transformers.models", "gpt2lab.train imports transformers"),
    ("train.py", "from pickle import load", "gpt2lab.train imports pickle"),
    ("train.py", "from gpt2lab.nowhere import nothing", "gpt2lab.train imports gpt2lab.nowhere, which is not there"),
    ("train.py", "eval('1')", "gpt2lab.train calls eval"),
    ("train.py", "exec('1')", "gpt2lab.train calls exec"),
    ("train.py", "torch.load('x')", "gpt2lab.train calls torch.load"),
    ("train.py", "import yaml\nyaml.load('')", "gpt2lab.train calls yaml.load"),
    ("train.py", "import subprocess\nsubprocess.run('ls', shell=True)", "gpt2lab.train calls shell=True"),
    ("train.py", "AutoModel.from_pretrained('x', trust_remote_code=True)", "calls trust_remote_code=True"),
    ("kitchen.py", "", "gpt2lab.kitchen: kitchen has no tier"),
    ("errors.py", "import gpt2lab.config", "in a circle: gpt2lab.config -> gpt2lab.errors -> gpt2lab.config"),
]


@pytest.mark.parametrize(("name", "code", "sentence"), VIOLATIONS, ids=[sentence for *_, sentence in VIOLATIONS])
def test_a_planted_violation_is_found(name: str, code: str, sentence: str, tmp_path: Path) -> None:
    tree = SOUND | ({"config.py": "import gpt2lab.errors"} if "circle" in sentence else {})
    for path, content in tree.items():
        (tmp_path / PACKAGE / path).parent.mkdir(exist_ok=True)
        (tmp_path / PACKAGE / path).write_text(content)
    assert problems(tmp_path) == []
    with (tmp_path / PACKAGE / name).open("a") as file:
        file.write(f"\n{code}\n")
    assert len(problems(tmp_path)) == 1 and sentence in problems(tmp_path)[0]


def test_every_public_name_can_be_had() -> None:
    import gpt2lab

    assert all(getattr(gpt2lab, name) is not None for name in gpt2lab.__all__)
    assert {"GPT2", "GPT2Config", "load_model", "load_tokenizer", "generate"} <= set(gpt2lab.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gpt2lab.nothing
