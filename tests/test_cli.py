"""What a person types: help without torch, one clear line for each mistake, and the fields that programs rely on."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gpt2lab import cli, errors
from gpt2lab.commands import training
from gpt2lab.errors import as_lab_error
from gpt2lab.tokenizer import Tokenizer
from tests.test_train import SETTINGS, flags, sentences

ROOT = Path(__file__).parents[1]
PYTHON = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to type commands in, with a text, files that are none, and the run `run`."""
    folder = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GPT2LAB_CACHE", str(folder / "cache"))
        patch.delenv("GPT2LAB_DATA", raising=False)
        Path("text.txt").write_text(sentences())
        Path("empty.txt").touch()
        Path("binary.dat").write_bytes(bytes(range(256)) * 100)
        Path("nul.txt").write_bytes(b"text\0text")
        Path("taken").mkdir()
        Path("taken/file").touch()
        for name, text in RECIPES.items():
            Path(name).write_bytes(text)
        assert cli.run(["train", *TRAIN]) == 0
        write_hf_folder(Path("hf"))
        yield folder


TRAIN = flags(SETTINGS | {"steps": 4, "out": "run", "data.source": "text.txt"})
RECIPES = {
    "good.yaml": b"steps: 3\n",
    "typo.yaml": b"steps: 3\nmodel:\n  num_head: 4\n",
    "twice.yaml": b"steps: 3\nsteps: 4\n",
    "alias.yaml": b"out: &name runs/a\ndata:\n  source: *name\n",
    "python.yaml": b"out: !!python/object/apply:os.getcwd []\n",
    "open.yaml": b"model:\n  windows: [64,\n",
    "list.yaml": b"- steps\n",
    "latin.yaml": b"out: runs/\xe9\n",
    "type.yaml": b"model:\n  windows: wide\noptim:\n  betas: [0.9, 1.5]\n",
    "deep.yaml": b"[" * 1000,
}


def write_hf_folder(folder: Path) -> None:
    """A GPT-2 of two letters in Hugging Face's format."""
    folder.mkdir()
    Tokenizer.chars(["ab"]).save(folder)
    config = {"model_type": "gpt2", "vocab_size": 3, "n_positions": 8, "n_embd": 4, "n_head": 2, "n_layer": 1}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"wte.weight": (3, 4), "wpe.weight": (8, 4)}
    shapes |= {f"{norm}.{kind}": (4,) for norm in ("h.0.ln_1", "h.0.ln_2", "ln_f") for kind in ("weight", "bias")}
    convs = {"attn.c_attn": (4, 12), "attn.c_proj": (4, 4), "mlp.c_fc": (4, 16), "mlp.c_proj": (16, 4)}
    shapes |= {f"h.0.{name}.weight": shape for name, shape in convs.items()}
    shapes |= {f"h.0.{name}.bias": shape[1:] for name, shape in convs.items()}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 8, 8).tril()}, folder / "model.safetensors")


def gpt2lab(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    command = [sys.executable, "-m", "gpt2lab", *words]
    return subprocess.run(command, env=os.environ | PYTHON, text=True, capture_output=True, timeout=300, **options)


# --- Help -------------------------------------------------------------------------------------------------------------


def help_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.run([*words, "--help"])
    out, err = capsys.readouterr()
    assert end.value.code in (0, None) and err == ""
    return out


def commands_in(text: str) -> list[str]:
    """The words at the start of the lines that argparse writes below `COMMAND`."""
    return re.findall(r"^    ([a-z]+)(?: {2,}|$)", text, flags=re.MULTILINE)


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    waiting = [[name] for name in commands_in(help_of([], capsys))]
    while waiting:
        words = waiting.pop()
        text = help_of(words, capsys)
        assert text.startswith(f"usage: gpt2lab {' '.join(words)}")
        assert "-h, --help" in text and len(text.splitlines()) > 4
        seen.append(" ".join(words))
        waiting += [[*words, name] for name in commands_in(text)]
    promised = "demo, train, plan, generate, eval, import, data prepare, data inspect, tokenizer train"
    assert set(promised.split(", ")) <= set(seen)


def test_help_of_train_shows_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(["train"], capsys)
    for key in [
        "out",
        "micro_batch",
        "model.preset",
        "model.windows",
        "data.source",
        "optim.betas",
        "system.precision",
    ]:
        assert re.search(rf"^  {re.escape(key)}( |$)", text, flags=re.MULTILINE), key
    lines = text.splitlines()
    assert "itself included" in lines[next(i for i, line in enumerate(lines) if "model.windows" in line) + 1]


def heavy_imports(code: str, *words: str) -> set[str]:
    """Which of the large libraries a piece of code imports."""
    code += "\nfor name in sys.modules: print(name, file=sys.stderr)"
    command = [sys.executable, "-c", f"import sys\n{code}", *words]
    done = subprocess.run(command, env=os.environ | PYTHON, text=True, capture_output=True, check=True, timeout=300)
    return set(done.stderr.split()) & {"torch", "transformers", "accelerate"}


MISTAKEN = [["nonsense"], ["train", "nowhere.yaml"]]


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], *MISTAKEN], ids=" ".join)
def test_torch_is_not_imported_for_help_or_a_mistake(words: list[str]) -> None:
    code = "from gpt2lab import cli\ntry: cli.run(sys.argv[1:])\nexcept SystemExit: pass"
    assert heavy_imports(code, *words) == set()


def test_control_torch_is_imported_to_train() -> None:
    assert {"torch", "accelerate"} <= heavy_imports("import gpt2lab.train")


def test_without_a_command_it_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0
    assert "train" in commands_in(capsys.readouterr().out)


# --- Mistakes ---------------------------------------------------------------------------------------------------------

GENERATE = ["generate", "run"]
EVAL = ["eval", "run"]


def named(argv: list[str], code: int, words: list[str]) -> Any:
    """A case whose id is its command."""
    name = " ".join(word for word in argv if word not in TRAIN)
    return pytest.param(argv, code, words, id=name[:70])


MISTAKES = [
    # commands and flags
    named(["nonsense"], 2, ["'nonsense'", "train", "generate"]),
    named(["data"], 2, ["COMMAND", "gpt2lab data --help"]),
    named(["generate"], 2, ["MODEL, PROMPT", "gpt2lab generate --help"]),
    named([*GENERATE, "the", "--max-new-token", "3"], 2, ["--max-new-token)", "perhaps you meant --max-new-tokens"]),
    named([*GENERATE, "the", "--tempreature=1"], 2, ["perhaps you meant --temperature"]),
    named([*GENERATE, "the", "--seed", "many"], 2, ["--seed", "'many'"]),
    named([*EVAL, "--zzz"], 2, ["--zzz", "--help"]),
    # settings
    named(["train", "--modle.num_heads=3"], 2, ["modle.num_heads", "Perhaps you meant --model.num_heads"]),
    named(["train", "--position=rope"], 2, ["position", "Perhaps you meant --model.position"]),
    named(["train", "--setps", "3"], 2, ["setps", "Perhaps you meant --steps"]),
    named(["train", "--steps"], 2, ["--steps", "a flag without a value", "--steps=VALUE"]),
    named(["train", "--steps=0"], 2, ["--steps", "greater than or equal to 1", "0"]),
    named(["train", "--steps=1e400"], 2, ["--steps"]),
    named(["train", "--steps=three"], 2, ["--steps", "integer", "'three'"]),
    named(["train", "--optim.learning_rate=.nan"], 2, ["--optim.learning_rate", "finite"]),
    named(["train", "--model.dropout=1"], 2, ["--model.dropout", "less than 1"]),
    named(["train", "--model.windows=[64,0]"], 2, ["--model.windows", "greater than or equal to 1", "0"]),
    named(["train", "--model.windows=[1,"], 2, ["--model.windows", "[1,"]),
    named(["train", "--model.preset=huge"], 2, ["--model.preset", "'huge'", "124M"]),
    named(["train", "--model.embed_dim=32", "--model.num_heads=5"], 2, ["num_heads 5", "embed_dim 32"]),
    named(["train", "--model.num_heads=6", "--model.num_kv_heads=4"], 2, ["num_kv_heads 4", "num_heads 6"]),
    named(["train", "--model.position=rope", "--model.embed_dim=12"], 2, ["rope", "odd"]),
    named(["train", "--seq_len=64", "--model.max_seq_len=32"], 2, ["seq_len 64", "max_seq_len 32"]),
    named(["train", "--seq_len=64", "--batch_tokens=100"], 2, ["batch_tokens 100", "seq_len 64", "128 is"]),
    named(["train", "--steps=3", "--epochs=1"], 2, ["steps 3", "epochs 1"]),
    named(["train", "--steps=0", "--seed=-1", "--sed=3"], 2, ["--steps", "--seed", "--sed", "Perhaps"]),  # all at once
    named(["train", *TRAIN, "--system.precision=fp16"], 2, ["fp16", "scaler", "--system.precision=auto"]),
    named(["plan", *TRAIN, "--model.vocab_size=5"], 2, ["model.vocab_size", "5 tokens", "23"]),
    # recipes
    named(["train", "god.yaml"], 2, ["god.yaml", "No such file"]),
    named(["train", "taken"], 2, ["taken", "directory"]),
    named(["train", "typo.yaml"], 2, ["typo.yaml:3", "model.num_head", "Perhaps you meant --model.num_heads"]),
    named(["train", "twice.yaml"], 2, ["twice.yaml:2", "steps stands there twice"]),
    named(["train", "alias.yaml"], 2, ["alias.yaml", "alias"]),
    named(["train", "python.yaml"], 2, ["python.yaml", "python/object"]),
    named(["train", "open.yaml"], 2, ["open.yaml", "not YAML"]),
    named(["train", "list.yaml"], 2, ["list.yaml:1", "key: value"]),
    named(["train", "latin.yaml"], 2, ["latin.yaml", "UTF-8"]),
    named(["train", "type.yaml"], 2, ["type.yaml:2", "type.yaml:4", "'wide'", "1.5"]),
    named(["train", "deep.yaml"], 2, ["deep.yaml", "not YAML"]),
    named(["train", "good.yaml", *TRAIN, "--out=taken/file"], 2, ["taken/file", "--out="]),
    named(["train", *TRAIN, "--out=taken/file/run"], 2, ["taken/file/run", "--out="]),
    named(["train", *TRAIN, "--out=" + "x" * 300], 2, ["xxx"]),
    # text
    named(["train", *TRAIN, "--data.source=nowhere"], 3, ["nowhere", "No such file"]),
    named(["train", *TRAIN, "--data.source=empty.txt"], 3, ["empty.txt", "empty"]),
    named(["train", *TRAIN, "--data.source=binary.dat"], 3, ["binary.dat", "NUL", "UTF-8"]),
    named(["train", *TRAIN, "--data.source=nul.txt"], 3, ["nul.txt", "NUL"]),
    named(["train", *TRAIN, "--data.source=taken"], 3, ["taken", "no text"]),
    named(["train", *TRAIN, "--out=new", "--tokenizer=gpt3"], 2, ["'gpt3'", "bytes"]),
    named(["data", "prepare", "empty.txt", "--out", "shards"], 3, ["empty.txt", "empty"]),
    named(["data", "prepare", "text.txt", "--out", "taken"], 3, ["taken", "new folder"]),
    named(["data", "prepare", "text.txt", "--out", "taken/file"], 3, ["taken/file", "new folder"]),
    named(["data", "inspect", "taken"], 3, ["taken", "gpt2lab data prepare"]),
    named(["tokenizer", "train", "text.txt", "--vocab-size", "5", "--out", "t"], 2, ["5 tokens", "257"]),
    named(["tokenizer", "train", "text.txt", "--out", "taken/file"], 2, ["taken/file"]),
    # models
    named(["generate", "nowhere", "the"], 4, ["nowhere", "no such model"]),
    named(["generate", "taken", "the"], 4, ["taken", "no such model"]),
    named(["eval", "text.txt"], 4, ["text.txt"]),
    named(["import", "nowhere", "new"], 4, ["nowhere"]),
    named(["import", "hf", "taken"], 2, ["taken", "not empty"]),
    named(["import", "hf", "taken/file"], 2, ["taken/file"]),
    named(["import", "run", "new"], 4, ["run", "config.json"]),
    named(["train", *TRAIN, "--out=new", "--init_from=nowhere"], 4, ["nowhere"]),
    named(["train", *TRAIN, "--seed=5"], 4, ["run", "seed 1337 is now 5"]),
    # generation and evaluation
    named([*GENERATE, ""], 2, ["empty prompt"]),
    named([*GENERATE, "the cat sees birds"], 2, ["18 tokens", "16"]),
    named([*GENERATE, "Ünique"], 3, ["'\\xdc'"]),
    # the last is a byte on the command line that is no UTF-8
    named([*GENERATE, "the \udcff"], 3, ["udcff"]),
    named([*GENERATE, "the", "--seed=-1"], 2, ["--seed", "-1"]),
    named([*GENERATE, "the", "--num-samples=0"], 2, ["--num-samples", "0"]),
    named([*GENERATE, "the", "--max-new-tokens=-3"], 2, ["--max-new-tokens", "-3"]),
    named([*GENERATE, "the", "--temperature=-1"], 2, ["--temperature", "-1.0"]),
    named([*GENERATE, "the", "--temperature=nan"], 2, ["--temperature", "nan"]),
    named([*GENERATE, "the", "--top-k=0"], 2, ["--top-k", "0"]),
    named([*GENERATE, "the", "--top-p=1.5"], 2, ["--top-p", "1.5"]),
    named([*EVAL, "--tasks", "perplexity,wisdom"], 2, ["'wisdom'", "perplexity"]),
    named([*EVAL, "--tasks", ""], 2, ["--tasks"]),
    named([*EVAL, "--stride=0"], 2, ["--stride", "0"]),
    named([*EVAL, "--stride=17"], 2, ["--stride", "17", "1 to 16"]),
    named([*EVAL, "--data", "empty.txt"], 3, ["empty.txt"]),
    named(["eval", "hf"], 2, ["hf", "--data=FILE"]),
]


@pytest.mark.parametrize(("argv", "code", "words"), MISTAKES)
def test_a_mistake_gets_one_line(
    argv: list[str], code: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """... with the place, the values and the fix; nothing is left behind."""
    before = sorted(os.listdir())
    assert cli.run(argv) == code
    line, end, more = capsys.readouterr().err.rpartition("gpt2lab: ")[2].partition("\n")
    assert end == "\n" and more == ""
    assert re.fullmatch(r"[^.].*\. Fix: .{3,}\.", line), line
    assert not [word for word in words if word not in line], line
    assert "Traceback" not in line and "bug" not in line
    assert sorted(os.listdir()) == before


def test_each_code_of_the_contract_is_an_error_of_ours() -> None:
    codes = {kind.__name__: kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    assert {"ConfigError": 2, "DataError": 3, "CheckpointError": 4, "ResourceError": 5, "NumbersError": 7}.items() <= (
        codes.items()
    )
    assert (codes["UntrustedFileError"], codes["LabError"], codes["Interrupted"]) == (8, 70, 75)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/a/model"), 5, ["disk full", "runs/a/model"]),
        (OSError(errno.EDQUOT, "Quota exceeded"), 5, ["quota"]),
        (OSError(errno.EMFILE, "Too many open files"), 5, ["ulimit -n"]),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 5, ["disk full"]),
        (MemoryError(), 5, ["out of memory", "gpt2lab plan"]),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 2, ["runs", "Permission denied"]),
        (OSError(errno.EROFS, "Read-only file system", "runs"), 2, ["runs"]),
        (OSError(errno.EFBIG, "File too large", "runs"), 5, ["runs"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 5, ["memory"]),
        (ZeroDivisionError("division"), None, []),
        (FileNotFoundError(errno.ENOENT, "No such file"), None, []),
    ],
    ids=repr,
)
def test_what_the_machine_says_is_worded(error: Exception, code: int | None, words: list[str]) -> None:
    ours = as_lab_error(error)
    assert (ours.exit_code if ours else None) == code
    assert all(word in str(ours) for word in words)


def test_a_bug_of_ours_is_one_line_and_a_traceback_with_debug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(training, "load_config", fail)
    assert cli.run(["train"]) == 70
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ZeroDivisionError):
        cli.run(["train", "--debug"])


@pytest.mark.parametrize(
    "words", [["--debug", "generate", "nowhere", "the"], ["generate", "nowhere", "the", "--debug"]]
)
def test_debug_shows_a_traceback(words: list[str]) -> None:
    done = gpt2lab(*words)
    assert done.returncode != 0
    assert done.stderr.startswith("Traceback") and "CheckpointError" in done.stderr.splitlines()[-1]


def test_a_mistake_in_a_process_of_its_own() -> None:
    done = gpt2lab("generate", "nowhere", "the")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1)
    assert done.stderr.startswith("gpt2lab: no such model (nowhere): ")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["generate", "run", "the"]])
def test_a_reader_that_has_enough_is_no_error(words: list[str]) -> None:
    """`gpt2lab train --help | head -1`: the pipe is closed before all is written."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "gpt2lab", *words]
    environment = (
        os.environ | PYTHON | {"PYTHONUNBUFFERED": ""}
    )  # as usual: what is written lies in a buffer until the end
    done = subprocess.run(command, env=environment, stdout=writing, stderr=subprocess.PIPE, timeout=300)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


# --- JSON -------------------------------------------------------------------------------------------------------------


def output(*words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The one JSON object on stdout."""
    capsys.readouterr()
    assert cli.run([*words, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_json_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    result = output("train", *TRAIN, capsys=capsys)
    assert result["run"] == "run" and result["step"] == 4
    assert {"tokens", "loss", "val_loss", "val_perplexity"} <= result.keys()


def test_json_of_generate(capsys: pytest.CaptureFixture[str]) -> None:
    def sample(*words: str) -> dict[str, Any]:
        return output("generate", "run", "the", *words, capsys=capsys)

    result = sample("--num-samples", "2", "--max-new-tokens=5")
    assert result["prompt"] == "the" and result["tokens_per_second"] > 0
    assert [set(row) for row in result["samples"]] == [{"text", "token_ids", "finish_reason"}] * 2
    assert all(len(row["token_ids"]) <= 5 for row in result["samples"])
    assert sample("--max-new-tokens=5")["samples"] == result["samples"][:1]
    assert sample("--max-new-tokens=5", "--seed=1")["samples"] != result["samples"][:1]


def test_generate_streams_the_text_that_json_has(capsys: pytest.CaptureFixture[str]) -> None:
    texts = [row["text"] for row in output("generate", "run", "the", "--num-samples=2", capsys=capsys)["samples"]]
    assert cli.run(["generate", "run", "the", "--num-samples=2"]) == 0
    out, err = capsys.readouterr()
    assert out == f"the{texts[0]}\n{'-' * 12}\nthe{texts[1]}\n" and err == ""


def test_json_of_eval(capsys: pytest.CaptureFixture[str]) -> None:
    result = output("eval", "run", "--tasks", "perplexity", capsys=capsys)
    assert result["model"] == "run"
    task = result["tasks"]["perplexity"]
    assert {"loss", "perplexity", "bits_per_byte", "tokens", "bytes"} <= task.keys()
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert task["loss"] == pytest.approx(last["val_loss"], abs=1e-6)
    other = output("eval", "run", "--data=text.txt", "--stride=4", capsys=capsys)["tasks"]["perplexity"]
    assert other["bytes"] == len(sentences()) and other["loss"] != task["loss"]
    checkpoint = output("eval", "run/checkpoints/step-00000004", "--data=text.txt", "--stride=4", capsys=capsys)
    assert checkpoint["tasks"]["perplexity"] == other


def test_json_of_plan(capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.listdir())
    result = output("plan", *TRAIN, "--out=planned", capsys=capsys)
    assert {"parameters", "flops_per_token", "memory_bytes", "kv_bytes_per_token"} <= result.keys()
    parts = result["memory_bytes"]
    assert parts.keys() == {"weights", "gradients", "optimizer", "activations", "logits", "total"}
    assert parts["total"] == sum(parts.values()) - parts["total"]
    assert result["kv_bytes_per_token"] == 2 * 2 * 32 * 2  # keys and values, layers, width, 16 bits
    shared = output("plan", *TRAIN, "--out=planned", "--model.num_kv_heads=1", capsys=capsys)
    assert shared["kv_bytes_per_token"] * 2 == result["kv_bytes_per_token"]
    assert sorted(os.listdir()) == before


def test_json_of_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fields = {"documents", "tokens", "bytes_in", "bytes_tokenised", "bytes_skipped", "skipped"}
    prepared = output("data", "prepare", "text.txt", "--out", str(tmp_path / "shards"), capsys=capsys)
    assert fields <= prepared.keys()
    assert prepared["bytes_in"] == len(sentences()) == prepared["bytes_tokenised"] + prepared["bytes_skipped"]
    inspected = output("data", "inspect", str(tmp_path / "shards"), capsys=capsys)
    assert {name: inspected[name] for name in fields} == {name: prepared[name] for name in fields}
    assert isinstance(inspected["problems"], list)
    letters = output("data", "prepare", "text.txt", "--out", str(tmp_path / "c"), "--tokenizer=chars", capsys=capsys)
    assert letters["vocab_size"] == len(set(sentences())) + 1 != prepared["vocab_size"]


def test_shards_can_be_prepared_from_shards(tmp_path: Path) -> None:
    assert cli.run(["data", "prepare", "text.txt", "--out", str(tmp_path / "one")]) == 0
    code = cli.run(["data", "prepare", str(tmp_path / "one"), "--out", str(tmp_path / "two")])
    assert code != 0 or (tmp_path / "two" / "prepared.json").is_file()


def test_json_of_import(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = output("import", "hf", str(tmp_path / "ours"), capsys=capsys)
    assert {"loaded", "transposed", "cut", "missing", "left_over"} <= result.keys()
    assert all(isinstance(names, list) for names in result.values())
    assert len(result["transposed"]) == 4 and len(result["loaded"]) == 12 and result["missing"] == []
    assert [name.split(" ")[0] for name in result["left_over"]] == ["h.0.attn.bias"]
    samples = output("generate", str(tmp_path / "ours"), "ab", "--temperature=0", capsys=capsys)["samples"]
    assert samples == output("generate", "hf", "ab", "--temperature=0", capsys=capsys)["samples"]


def test_people_see_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    loss = output("eval", "run", capsys=capsys)["tasks"]["perplexity"]["loss"]
    assert cli.run(["eval", "run"]) == 0
    assert f"loss {loss:,.4f}" in capsys.readouterr().out
    parameters = output("plan", *TRAIN, capsys=capsys)["parameters"]
    assert cli.run(["plan", *TRAIN]) == 0
    assert f"parameters   {parameters:,}" in capsys.readouterr().out


def test_a_tokenizer_can_be_trained_and_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.run(["tokenizer", "train", "text.txt", "--vocab-size=270", "--out", str(tmp_path / "bpe")]) == 0
    assert "270 tokens" in capsys.readouterr().out
    result = output("train", *TRAIN, f"--tokenizer={tmp_path / 'bpe'}", f"--out={tmp_path / 'run'}", capsys=capsys)
    assert result["step"] == 4


def test_a_setting_may_stand_after_a_space(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = output("plan", "good.yaml", "--batch_tokens", "256", *TRAIN[:5], "--steps", "7", capsys=capsys)
    assert (result["config"]["batch_tokens"], result["config"]["steps"]) == (256, 7)


@pytest.mark.parametrize(
    "words",
    [
        ["--sample_prompt=the cat"],
        ["--sample_prompt=the cat", "--steps=7"],
        ["--sample_prompt", "the cat"],
    ],
    ids=" ".join,
)
def test_a_setting_may_have_a_space_in_it(words: list[str]) -> None:
    parsed = cli.parse(["train", "good.yaml", *words])
    assert parsed.recipes == ["good.yaml"] and parsed.flags[0] == "--sample_prompt=the cat"
