"""Recipes and flags become one config, or one error that names every problem. Bad recipes are files in tests/bad."""

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from gpt2lab import cli, errors
from gpt2lab.config import PRESETS, GPT2Config, RunConfig, fields, to_yaml
from gpt2lab.errors import ConfigError, LabError, as_lab_error
from gpt2lab.recipe import Setting, build_config, load_config, parse_flag, parse_recipe, read_recipe

BAD = Path(__file__).parent / "bad"


def build(text: str) -> RunConfig:
    """The config of a recipe's text."""
    return build_config(parse_recipe(text, "recipe.yaml"))


def complaint(function: Callable[..., Any], *args: Any) -> str:
    """What the ConfigError says that this call must end with."""
    with pytest.raises(ConfigError) as caught:
        function(*args)
    return str(caught.value)


# --- Layers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def layers(tmp_path: Path) -> tuple[str, str]:
    """Two recipes that disagree on the seed and on the position."""
    base, rope = tmp_path / "base.yaml", tmp_path / "rope.yaml"
    base.write_text("seed: 1\nsteps: 50\nmodel:\n  preset: tiny-64\n  position: learned\n")
    rope.write_text("seed: 2\nmodel.position: rope\n")
    return str(base), str(rope)


def test_later_recipes_win_over_earlier_ones_and_flags_over_both(layers: tuple[str, str]) -> None:
    base, rope = layers
    config = load_config([base, rope], ["--seed=3", "--seed=4"])
    assert (config.seed, config.steps, config.model.position, config.model.embed_dim) == (4, 50, "rope", 64)
    swapped = load_config([rope, base])
    assert (swapped.seed, swapped.model.position) == (1, "learned")
    assert load_config([base]).model.num_heads == 2 and load_config([rope]).model.num_heads == 12


def test_nothing_given_is_the_defaults() -> None:
    assert load_config([]) == RunConfig() == build("") == build("# nothing but a comment\n")
    assert load_config([], ["--seed=1"]) != RunConfig()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_its_sizes_and_other_keys_change_them_wherever_they_stand(preset: str) -> None:
    for text in (f"model: {{preset: {preset}, num_layers: 1}}", f"model: {{num_layers: 1, preset: {preset}}}"):
        model = build(text + "\nbatch_tokens: 1024").model
        assert {key: getattr(model, key) for key in PRESETS[preset]} == PRESETS[preset] | {"num_layers": 1}
        assert model == GPT2Config.from_preset(preset, num_layers=1) != GPT2Config.from_preset(preset)


@pytest.mark.parametrize(
    ("flag", "key", "value"),
    [
        ("--model.windows=[64,null]", "model.windows", [64, None]),
        ("--optim.learning-rate=3", "optim.learning_rate", 3),
        ("--out=runs/a=b", "out", "runs/a=b"),
        ("--out=", "out", ""),
    ],
)
def test_flags_are_read_like_recipes(flag: str, key: str, value: Any) -> None:
    assert parse_flag(flag) == (key, Setting(value, f"--{key}"))


@pytest.mark.parametrize(
    "words",
    [
        ["--data.source=my text.txt", "--model.windows=[64, null]"],
        ["--data.source", "my text.txt", "--model.windows", "[64, null]"],
        ["--json", "--data.source=my text.txt", "--model.windows", "[64, null]"],
    ],
    ids=" ".join,
)
def test_a_flag_may_have_spaces_in_its_value(words: list[str]) -> None:
    parsed = cli.parse(["plan", *words])
    assert parsed.recipes == [] and parsed.json == ("--json" in words)
    config = load_config(parsed.recipes, parsed.flags)
    assert (config.data.source, config.model.windows) == ("my text.txt", (64, None))
    assert cli.parse(["plan", "my recipe.yaml", *words]).recipes == ["my recipe.yaml"]


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["1e-3", "1.0e-3", "0.001", "'1e-3'"])
def test_every_way_to_write_a_small_number(written: str) -> None:
    assert build(f"optim: {{learning_rate: {written}}}").optim.learning_rate == 0.001
    assert load_config([], [f"--optim.learning_rate={written}"]).optim.learning_rate == 0.001


def test_a_whole_number_is_good_enough_for_a_float_but_not_the_other_way_round() -> None:
    config = build("epochs: 1\noptim: {learning_rate: 1, clip: 0, betas: [0, 0]}\nmodel: {rope_base: 500000}")
    given_ = (config.epochs, config.optim.learning_rate, config.optim.clip, config.model.rope_base, *config.optim.betas)
    assert given_ == (1, 1, 0, 500000, 0, 0) and {type(number) for number in given_} == {float}
    assert "steps should be a valid integer" in complaint(build, "steps: 1.5")


def test_windows_are_a_list_with_null_for_full_attention() -> None:
    assert build("model: {windows: [64, 64, null]}").model.windows == (64, 64, None)
    assert build("model: {windows: null}").model.windows is None
    assert build("model: {windows: [null]}").model.windows == (None,)
    for bad in ("[]", "64", "[64, x]", "[0]", "[[64]]", "{a: 1}"):
        assert "windows" in complaint(build, f"model: {{windows: {bad}}}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", "true"),
        ("seed", "false"),
        ("epochs", "yes"),
        ("optim.learning_rate", "true"),
        ("model.vocab_size", "true"),
        ("model.windows", "[true, null]"),
        ("optim.betas", "[false, 0.5]"),
    ],
)
def test_a_boolean_is_no_number(key: str, value: str) -> None:
    assert f"recipe.yaml:1: {key} should not be " in complaint(build, f"{key}: {value}")
    assert f"--{key} should not be " in complaint(load_config, [], [f"--{key}={value}"])


def test_booleans_are_for_what_is_one_or_the_other() -> None:
    assert build("system: {compile: true}").system.compile is True
    assert build("system: {compile: no}").system.compile is False


@pytest.mark.parametrize("empty", ["model:", "model: {}", "model: null", "model:\noptim: ~"])
def test_a_section_left_empty_is_ignored(empty: str, tmp_path: Path) -> None:
    assert build(f"{empty}\nsteps: 5") == RunConfig(steps=5)
    base, more = tmp_path / "base.yaml", tmp_path / "more.yaml"
    base.write_text("model:\n  position: rope\n")
    more.write_text(f"{empty}\n")
    assert load_config([str(base), str(more)]).model.position == "rope"
    assert "recipe.yaml:1: unknown key model." in complaint(build, "model: 5")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("embed_dim", 0),
        ("num_heads", -1),
        ("num_layers", 2**41),
        ("vocab_size", 0),
        ("dropout", 1.0),
        ("rope_base", 1.0),
    ],
)
def test_sizes_that_no_model_has(key: str, value: float) -> None:
    assert f"model.{key} should be" in complaint(build, f"model: {{{key}: {value}}}")
    with pytest.raises(ValueError, match=key):
        GPT2Config(**{key: value})


def test_impossible_shapes_are_refused_through_every_door() -> None:
    sentence = "num_heads 5 does not divide embed_dim 768; num_kv_heads 3 does not divide num_heads 5"
    assert sentence in complaint(build, "model: {num_heads: 5, num_kv_heads: 3}")
    with pytest.raises(ValueError, match=sentence):
        GPT2Config(num_heads=5, num_kv_heads=3)
    with pytest.raises(ValueError, match=sentence.split(";")[0]):
        GPT2Config.from_preset("124M", num_heads=5)
    assert "no size is called '125M'" in complaint(GPT2Config.from_preset, "125M")
    GPT2Config(num_heads=6, num_kv_heads=3)


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_one_error_names_every_problem_with_its_line_or_flag(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("stepz: 50\nseed: -1\nmodel:\n  preset: 125M\n  dropout: 1\n")
    said = complaint(load_config, [str(recipe)], ["--optim.name=adam", "--model.postion=rope"])
    for sentence in (
        f"{recipe}:1: unknown key stepz. Perhaps you meant --steps;",
        f"{recipe}:2: seed should be greater than or equal to 0, not -1",
        f"{recipe}:4: no size is called '125M'",
        f"{recipe}:5: model.dropout should be less than 1, not 1",
        "--optim.name should be 'adamw' or 'sgd', not 'adam'",
        "--model.postion: unknown key model.postion. Perhaps you meant --model.position",
    ):
        assert sentence in said
    assert said.count("\n") == 0


def test_a_guess_is_offered_only_where_something_is_near() -> None:
    assert "Perhaps you meant --batch_tokens" in complaint(build, "batch_token: 4096")
    assert "Perhaps you meant --optim.clip" in complaint(build, "clip: 1")
    assert "--model.clip: unknown key model.clip. Perhaps you meant --optim.clip." in complaint(
        load_config, [], ["--model.clip=1"]
    )
    assert "Perhaps you meant --seed." in complaint(build, "data: {seed: 1}")
    assert "Perhaps" not in complaint(build, "flibbertigibbet: 1")


def test_a_missing_recipe_is_answered_with_one_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny.yaml").write_text("steps: 50\n")
    monkeypatch.chdir(tmp_path)
    assert "Fix: perhaps recipes/tiny.yaml." in complaint(read_recipe, "recipes/tiney.yaml")
    assert "perhaps" not in complaint(read_recipe, "x")
    assert read_recipe("recipes/tiny.yaml") == {"steps": Setting(50, "recipes/tiny.yaml:1")}


RECIPES = sorted(BAD.glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_bad_recipes(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The first line of each file says the exit code and the sentence: ``# exit 2: ...``."""
    monkeypatch.chdir(BAD)
    first = path.read_bytes().split(b"\n")[0].decode()
    code, sentence = first.removeprefix("# exit ").split(": ", 1)
    assert cli.run(["plan", path.name]) == int(code)
    out, err = capsys.readouterr()
    assert sentence in err and "Fix: " in err and err.count("\n") == 1 and not out


def test_the_folder_of_bad_recipes_is_there() -> None:
    assert len(RECIPES) >= 26


CODES = {
    "ConfigError": 2, "DataError": 3, "CheckpointError": 4, "ResourceError": 5, "ProcessError": 6, "NumbersError": 7,
    "UntrustedFileError": 8, "Interrupted": 75,
}  # fmt: skip


def test_exit_codes_are_those_of_the_contract() -> None:
    """70 is for a bug of ours: whatever is no LabError."""
    assert {kind.__name__: kind.exit_code for kind in LabError.__subclasses__()} == CODES
    assert len(set(CODES.values())) == len(CODES) and LabError.exit_code == 70


@pytest.mark.parametrize("name", CODES)
def test_an_error_is_one_line_with_place_cause_and_fix(name: str) -> None:
    error = getattr(errors, name)("bad thing", where="file:3", cause="it is 3.", fix="make it 4.")
    assert str(error) == "bad thing (file:3): it is 3. Fix: make it 4."
    assert str(type(error)("bad thing", cause="it is 3", fix="make it 4")) == "bad thing: it is 3. Fix: make it 4."


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 5),
        (OSError(errno.EMFILE, "Too many open files"), 5),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), 5),
        (MemoryError(), 5),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2),
        (ConfigError("bad", cause="c", fix="f"), 2),
        (KeyError("a"), None),
        (OSError(errno.EIO, "Input/output error"), None),
    ],
)
def test_what_the_machine_says_is_worded_by_us_and_bugs_stay_bugs(error: Exception, code: int | None) -> None:
    ours = as_lab_error(error)
    assert (ours and ours.exit_code) == code


# --- Every field is documented, and every config can be written down --------------------------------------------------


def test_every_field_has_a_docstring() -> None:
    texts = {key: text for key, _, text in fields()}
    assert len(texts) >= 39
    assert not [key for key, text in texts.items() if not text or not text.rstrip().endswith(".")]

    @dataclass(config=ConfigDict(use_attribute_docstrings=True))
    class Half:
        said: int = 1
        """Said."""
        unsaid: int = 2

    assert [text for _, _, text in fields(Half)] == ["Said.", None]


def test_the_keys_are_the_fields_of_the_classes() -> None:
    def keys(config: Any, prefix: str = "") -> list[str]:
        return [
            key
            for field in dataclasses.fields(config)
            for value in [getattr(config, field.name)]
            for key in (keys(value, f"{field.name}.") if dataclasses.is_dataclass(value) else [prefix + field.name])
        ]

    assert sorted(keys(RunConfig())) == sorted({key for key, _, _ in fields()} - {"model.preset"})


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
COUNT = st.integers(1, 2**40)
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "out": TEXT, "steps": st.none() | COUNT, "seed": st.integers(0, 2**40), "keep_checkpoints": COUNT,
    "sample_prompt": TEXT, "init_from": st.none() | TEXT, "tokenizer": st.none() | TEXT, "data.source": TEXT,
    "model.vocab_size": st.none() | COUNT, "model.num_kv_heads": st.sampled_from([None, 1, 2, 3, 12]),
    "model.position": st.sampled_from(["learned", "rope"]), "model.rope_base": st.floats(1, 1e300, exclude_min=True),
    "model.windows": st.none() | st.lists(st.none() | COUNT, min_size=1, max_size=12),
    "model.dropout": st.floats(0, 1, exclude_max=True), "optim.name": st.sampled_from(["adamw", "sgd"]),
    "optim.learning_rate": st.floats(0, 1e300, exclude_min=True), "optim.weight_decay": st.floats(0, 1e300),
    "optim.betas": st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2).map(list), "system.compile": st.booleans(),
    "system.precision": st.sampled_from(["auto", "fp32", "tf32", "bf16", "fp16"]),
}  # fmt: skip


@given(st.fixed_dictionaries({}, optional=GOOD))
def test_a_config_written_as_yaml_gives_itself_back(values: dict[str, Any]) -> None:
    config = build_config({key: Setting(value, key) for key, value in values.items()})
    assert build(to_yaml(config)) == config
    other = dataclasses.replace(config, seed=config.seed + 1 if config.seed < 2**40 else 0)
    assert build(to_yaml(other)) != config


# --- Whatever stands in a recipe, the answer is a config or a ConfigError ---------------------------------------------

PLAIN = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Cn"]), max_size=20
)  # what PyYAML reads; the others: below
KEYS = st.sampled_from([key for key, _, _ in fields()]) | st.sampled_from(["model", "<<", "{a: b}", "? [a]"]) | PLAIN
VALUES = (
    st.sampled_from(
        ["", "null", "true", "~", "[", "[1, null]", "{a: 1}", "*a", "&a 1", "-", "|", "1e999", "0o9", "1:99"]
    )
    | st.sampled_from(["2024-99-99", "!!binary é", "!!set {a}", "!!omap [1]", "!!python/name:os.system", "!x 1", "'"])
    | st.integers().map(str)
    | st.floats().map(str)
    | PLAIN
)
LINES = st.lists(st.tuples(KEYS, VALUES).map(": ".join), max_size=5).map("\n".join)


def config_or_complaint(make: Callable[[], RunConfig]) -> None:
    try:
        config = make()
    except ConfigError:
        return
    assert isinstance(config, RunConfig)


@given(LINES)
@example("[" * 600 + "]" * 600)
@example("{a: " * 600 + "}" * 600)
@example("a: &a [&b [*a, *a], *b]")
def test_no_recipe_ends_in_another_exception(text: str) -> None:
    config_or_complaint(lambda: build(text))


def test_no_file_ends_in_another_exception(tmp_path: Path) -> None:
    @given(
        st.binary(max_size=60) | st.text(max_size=20).map(str.encode) | LINES.map(lambda text: text.encode("utf-16"))
    )
    def check(content: bytes) -> None:
        (tmp_path / "any.yaml").write_bytes(content)
        config_or_complaint(lambda: load_config([str(tmp_path / "any.yaml")]))

    check()


@given(KEYS, VALUES)
def test_no_flag_ends_in_another_exception(key: str, value: str) -> None:
    config_or_complaint(lambda: load_config([], [f"--{key}={value}"]))


@pytest.mark.parametrize("value", ["!!int ''", "!!float ''", "!!bool x", "!!timestamp x"])
def test_tags_with_values_that_do_not_fit_them(value: str) -> None:
    assert "cannot read the recipe (recipe.yaml:1): steps cannot be read as" in complaint(build, f"steps: {value}")
    assert f"cannot read the value (--steps): {value!r}" in complaint(load_config, [], [f"--steps={value}"])


@pytest.mark.parametrize("value", ["!!int ''", "a\x01b"], ids=ascii)
def test_the_line_of_what_is_not_yaml(value: str) -> None:
    assert "(recipe.yaml:2): " in complaint(build, f"seed: 1\nout: {value}\nsteps: 3\n")
