"""What the documents tell people to type can be typed, and what they say is there is there."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2lab import cli
from gpt2lab.config import RunConfig
from gpt2lab.errors import ConfigError
from gpt2lab.recipe import load_config

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
TREE = re.compile(r"<!-- tree -->\n(.*?)<!-- end -->", re.DOTALL)
"""The file tree in the README."""


def read(page: str) -> str:
    path = ROOT / page
    if not path.is_file():
        pytest.fail(f"{page} is not there (yet)")
    return path.read_text(encoding="utf-8")


def commands(text: str) -> Iterator[list[str]]:
    """The gpt2lab commands in the shell blocks of a page, as lists of words, without what a shell does with them."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("gpt2lab "):
                yield typed(line)


def typed(line: str) -> list[str]:
    """The words after `gpt2lab`, up to a pipe, a redirection or another command."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if set(word) <= set("|&;<>"):
            break
        words.append(word)
    return words[1:]


def check(words: list[str]) -> None:
    """Parse a command, and its settings; nothing is run."""
    try:
        parsed = cli.parse(words)
    except SystemExit as end:  # --help and --version
        if end.code:
            raise
        return
    if words[0] in ("train", "plan"):
        load_config([str(ROOT / recipe) for recipe in parsed.recipes], parsed.flags)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_is_right_and_so_is_the_command_on_top_of_it(recipe: Path) -> None:
    assert isinstance(load_config([str(recipe)]), RunConfig)
    lines = [line.lstrip("# ") for line in recipe.read_text().splitlines() if line.startswith("#")]
    found = [typed(line) for line in lines if line.startswith("gpt2lab ")]
    assert found, f"the header of {recipe} names no command"
    assert any(str(recipe.relative_to(ROOT)) in words for words in found)
    for words in found:
        check(words)


def test_there_are_recipes() -> None:
    assert ROOT / "recipes" / "tiny.yaml" in RECIPES


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_can_be_typed(page: str) -> None:
    for words in commands(read(page)):
        check(words)


def test_the_readme_shows_commands() -> None:
    assert len(list(commands(read("README.md")))) > 2


@pytest.mark.parametrize(
    "line",
    [
        "gpt2lab trian recipes/tiny.yaml",
        "gpt2lab train recipes/tiny.yaml --stpes=3",
        "gpt2lab train recipes/nowhere.yaml",
        "gpt2lab generate runs/tiny --top-q 3 'a text'",
    ],
)
def test_control_a_wrong_command_is_noticed(line: str) -> None:
    [words] = commands(f"Try this:\n\n```sh\n{line} | head -1\n```\n")
    with pytest.raises(ConfigError):
        check(words)


def test_control_of_the_reader_of_commands() -> None:
    page = (
        "```sh\ngpt2lab plan a.yaml \\\n  --seed=3  # three\ncd x\ngpt2lab --help | head\n```\n```\ngpt2lab no\n```\n"
    )
    assert list(commands(page)) == [["plan", "a.yaml", "--seed=3"], ["--help"]]


def paths_in(tree: str) -> Iterator[str]:
    """The paths in a tree drawn by indentation: a line is a folder and files in it, or files beside each other."""
    folders: list[tuple[int, str]] = []
    for line in tree.splitlines():
        indent, names = len(line) - len(line.lstrip()), re.findall(r"(?<!\S)[\w./-]+(?:/|\.py|\.md)(?!\S)", line)
        if not names:
            continue
        while folders and folders[-1][0] >= indent:
            folders.pop()
        if names[0].endswith("/"):
            folders.append((indent, names.pop(0)))
            yield "".join(folder for _, folder in folders)
        yield from ("".join(folder for _, folder in folders) + name for name in names)


def test_the_tree_in_the_readme_is_the_tree_on_the_disk() -> None:
    found = TREE.search(read("README.md"))
    assert found, "README.md marks no file tree"
    named = set(paths_in(found[1]))
    assert not [path for path in named if not (ROOT / path).exists()]
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "src").rglob("*.py") if path.name[0] != "_"]
    assert len(modules) > 20
    assert not set(modules) - named, "these are not in the README's tree"


def test_control_of_the_reader_of_trees() -> None:
    tree = (
        "```\nsrc/lab/\n  cli.py  the command\n  data/   sources.py (text) shards.py\n  a.py b.py\ntests/  a.b/c\n```\n"
    )
    assert list(paths_in(tree)) == [
        "src/lab/", "src/lab/cli.py", "src/lab/data/", "src/lab/data/sources.py", "src/lab/data/shards.py",
        "src/lab/a.py", "src/lab/b.py", "tests/",
    ]  # fmt: skip


def test_contributing_can_be_read_in_a_minute() -> None:
    assert len(read("CONTRIBUTING.md").splitlines()) < 50


def test_each_fault_of_the_catalogue_names_tests_that_are_there() -> None:
    rows = re.findall(r"^\| ([TCD]\d\d) \| .* \| (.*) \|$", read("docs/reliability.md"), flags=re.MULTILINE)
    last = {"T": 34, "C": 9, "D": 9}
    assert [name for name, _ in rows] == [f"{kind}{n:02}" for kind, most in last.items() for n in range(1, most + 1)]
    named = [test for _, tests in rows for test in re.findall(r"`(tests/\S+)::(\w+)`", tests)]
    assert len(named) > 60
    missing = [f"{path}::{name}" for path, name in named if f"def {name}(" not in read(path)]
    assert not missing
