"""Recipes and flags: dotted keys from YAML and from the command line, in layers, as one config or one error.

A recipe, a layer over it and the flags of a command all become one mapping of dotted keys (``model.position``), later ones
win, and one parser turns it into a ``RunConfig``, or into one error that names every problem and where it was written.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from gpt2lab.config import GPT2Config, RunConfig, fields, preset, to_yaml
from gpt2lab.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    """One value and the place it was written in, for error messages."""

    value: Any
    where: str


def read_recipe(path: str | Path) -> dict[str, Setting]:
    """A recipe file as dotted keys, each with its line.

    Raises:
        ConfigError: no such file, not YAML, a key twice, or something other than plain keys and values.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError("cannot read the recipe", where=str(path), cause=cause, fix=_recipe_fix(path)) from None
    return parse_recipe(text, str(path))


def parse_recipe(text: str, name: str) -> dict[str, Setting]:
    """The text of a recipe as dotted keys; `name` stands in error messages."""
    settings: dict[str, Setting] = {}

    def flatten(node: yaml.Node, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            raise _recipe_error(name, node.start_mark.line, "expected `key: value` lines", "write one setting a line")
        for key_node, value_node in node.value:
            key, line = f"{prefix}{key_node.value}", key_node.start_mark.line
            if key in settings or any(known.startswith(key + ".") for known in settings):
                raise _recipe_error(name, line, f"{key} stands there twice", "keep one of the two")
            if isinstance(value_node, yaml.MappingNode) and value_node.value:
                flatten(value_node, key + ".")
            else:
                try:
                    value = loader.construct_object(value_node, deep=True)
                except Exception as error:  # whatever PyYAML's constructors raise on `!!int ''` and the like
                    cause = f"{key} cannot be read as {value_node.tag.removeprefix('tag:yaml.org,2002:')}"
                    raise _recipe_error(name, line, cause, "write a plain value") from error
                settings[key] = Setting(value, f"{name}:{line + 1}")

    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ConfigError(
                "cannot read the recipe", where=name, cause="it uses a YAML alias", fix="write values out"
            )
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is not None:
            flatten(root, "")
    except ConfigError:
        raise
    except (yaml.YAMLError, RecursionError) as error:
        if isinstance(error, yaml.reader.ReaderError):
            line, cause = text.count("\n", 0, error.position), f"character #x{error.character:02x} is not allowed"
        else:
            mark = getattr(error, "problem_mark", None)
            line, cause = mark.line if mark else 0, getattr(error, "problem", None) or str(error)
        fix = "mend that line; recipes/tiny.yaml shows the form"
        raise _recipe_error(name, line, f"not YAML: {cause}", fix) from None
    return settings


def parse_flag(flag: str) -> tuple[str, Setting]:
    """``--model.windows=[64,null]`` as a dotted key and its value; values are read as YAML, so as in a recipe.

    Raises:
        ConfigError: no ``=``, or a value that is not YAML.
    """
    key, equals, text = flag.removeprefix("--").partition("=")
    key = key.replace("-", "_")
    if not equals:
        raise ConfigError(
            "a flag without a value", where=flag, cause="settings are written with =", fix=f"{flag}=VALUE"
        )
    try:
        value = yaml.safe_load(text) if text else text
    except Exception:  # YAML's own, and whatever its constructors raise
        raise ConfigError(
            "cannot read the value", where=f"--{key}", cause=f"{text!r:.80}", fix="quote it, or mend it"
        ) from None
    return key, Setting(value, f"--{key}")


def read_model_flags(flags: Sequence[str]) -> dict[str, Any]:
    """``--num-kv-heads=4`` as a field of the model and its value.

    Raises:
        ConfigError: no such field, or no value.
    """
    known = [key.removeprefix("model.") for key, _, _ in fields() if key.startswith("model.") and key != "model.preset"]
    given = dict(map(parse_flag, flags))
    for key, setting in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            fix = f"perhaps --{near[0].replace('_', '-')}" if near else "`gpt2lab convert --help` lists all keys"
            raise ConfigError("unknown key", where=setting.where, cause="the model has no such field", fix=fix)
    return {key: setting.value for key, setting in given.items()}


def load_config(recipes: Sequence[str], flags: Sequence[str] = (), /) -> RunConfig:
    """Recipes, then flags, layered into one config; later ones win.

    Raises:
        ConfigError: with every problem that was found.
    """
    settings: dict[str, Setting] = {}
    for recipe in recipes:
        settings |= read_recipe(recipe)
    settings |= dict(map(parse_flag, flags))
    return build_config(settings)


def build_config(settings: Mapping[str, Setting]) -> RunConfig:
    """Dotted keys as a RunConfig: unknown keys, wrong types and impossible combinations are refused together."""
    defaults = {key: default for key, default, _ in fields()}
    known = list(defaults)
    sections = {key.partition(".")[0] for key in known if "." in key}
    settings = {
        k: s for k, s in settings.items() if k not in sections or s.value not in (None, {})
    }  # an empty `model:`
    problems = [
        f"{setting.where}: unknown key {key}{_perhaps(key, known)}"
        for key, setting in settings.items()
        if key not in known
    ]
    booleans = _booleans(settings, defaults)
    problems += booleans.values()
    values: dict[str, Any] = {}
    named = settings.get("model.preset")
    if named is not None and named.value is not None:
        try:
            values |= {f"model.{key}": value for key, value in preset(str(named.value)).items()}
        except ConfigError as error:
            problems.append(f"{named.where}: {error.cause}")
    usable = set(known) - set(booleans) - {"model.preset"}
    values |= {key: setting.value for key, setting in settings.items() if key in usable}
    try:
        config = TypeAdapter(RunConfig).validate_python(_nest(values))
    except ValidationError as error:
        problems += [_explain(details, settings) for details in error.errors()]
    if problems:
        raise ConfigError(
            "bad configuration",
            cause="; ".join(problems),
            fix="mend what is named; `gpt2lab train --help` lists all keys",
        )
    return config


def build_model_config(settings: Mapping[str, Setting]) -> GPT2Config:
    """The model that dotted keys describe; the keys of other sections are not looked at."""
    settings = {key: setting for key, setting in settings.items() if key.startswith("model.")}
    values = {key.removeprefix("model."): setting.value for key, setting in settings.items()}
    try:
        if booleans := _booleans(settings, {key: default for key, default, _ in fields()}):
            raise ConfigError("bad model configuration", cause="; ".join(booleans.values()), fix="mend what is named")
        return TypeAdapter(GPT2Config).validate_python(values)
    except ValidationError as error:
        cause = "; ".join(
            _explain(details | {"loc": ("model", *details["loc"])}, settings) for details in error.errors()
        )
        raise ConfigError("bad model configuration", cause=cause, fix="mend what is named") from None


def flat(config: RunConfig) -> dict[str, Any]:
    """A config as dotted keys and values, for comparing two of them."""
    return {key: setting.value for key, setting in parse_recipe(to_yaml(config), "config").items()}


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def _perhaps(key: str, known: list[str]) -> str:
    elsewhere = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]]
    near = elsewhere or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f". Perhaps you meant --{near[0]}" if near else ""


def _explain(details: Any, settings: Mapping[str, Setting]) -> str:
    """One of pydantic's findings in our words: the place it was written, the key, the value."""
    names = [
        str(part) for part in details["loc"] if not str(part).startswith(("constrained", "function", "int", "none"))
    ]
    key = ".".join(names[:2]) if names and names[0] in ("model", "data", "optim", "system") else ".".join(names[:1])
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if details["type"] == "value_error":
        places = sorted({settings[k].where for k in settings if k.rpartition(".")[2] in message and k.startswith(key)})
        return f"{', '.join(places)}: {message}" if places else message
    subject = _subject(key, settings)
    if details["type"] == "missing":
        return f"{subject} is incomplete: {_show(details['input'])}"
    return f"{subject} should be {message}, not {_show(details['input'])}"


def _booleans(settings: Mapping[str, Setting], defaults: Mapping[str, Any]) -> dict[str, str]:
    """A problem for each key that is true or false, or holds one, where a number or a name belongs: true is not 1."""
    return {
        key: f"{_subject(key, settings)} should not be {_show(setting.value)}"
        for key, setting in settings.items()
        if any(isinstance(value, bool) for value in _flat_list(setting.value))
        and not isinstance(defaults.get(key), bool)
    }


def _flat_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _subject(key: str, settings: Mapping[str, Setting]) -> str:
    """A key as the start of a complaint: where it was written, and its name where that does not say it."""
    where = settings[key].where if key in settings else key
    return where if where in (key, f"--{key}") else f"{where}: {key}"


def _show(value: Any) -> str:
    """A value as it may stand in one line."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # a number with thousands of digits
        return "that number"


def _recipe_error(name: str, line: int, cause: str, fix: str) -> ConfigError:
    return ConfigError("cannot read the recipe", where=f"{name}:{line + 1}", cause=cause, fix=fix)


def _recipe_fix(path: str | Path) -> str:
    folder = Path("recipes")
    names = sorted(str(p) for p in folder.glob("*.yaml")) if folder.is_dir() else []
    near = difflib.get_close_matches(str(path), names, n=1, cutoff=0.5)
    return f"perhaps {near[0]}" if near else "give the path of a YAML file; recipes/ has some to start from"
