"""What README.md and the notebook say is so: commands parse, names exist, the Python example runs."""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.run as torchrun
from PIL import Image

import data
import evaluate
import model
import sample
import train
import transition

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text("utf-8")
NOTEBOOK = (ROOT / "demo" / "RESULTS.md").read_text("utf-8")
SECTIONS = re.split(r"^(?=## )", README + "\n" + NOTEBOOK, flags=re.M)
TEXT = "".join(s for s in SECTIONS if "removed" not in s.splitlines()[0])  # of what is gone

MODULES = {m.__name__: m for m in (transition, model, data, sample, train, evaluate)}
FENCE = r"^```(\w+)\n(.*?)^```$"
PROSE = re.sub(FENCE, "", TEXT, flags=re.S | re.M)
SPANS = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", PROSE)]
OTHERS = {word for word in re.findall(r"`([\w/]+\.(?:py|sh)) ", PROSE) if not (ROOT / word).exists()}
SPANS = [span for span in SPANS if span.split()[0] not in OTHERS]  # scorers of other projects


class Parsed(Exception):
    """The words of a command are in order; nothing was run."""


def blocks(text, kind):
    return [body for language, body in re.findall(FENCE, text, re.S | re.M) if language == kind]


def split(line) -> list[list[str]]:
    """The commands of a line of bash, each as words; without comments and the end that "..." is."""
    words = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    words.whitespace_split, commands = True, [[]]
    for word in words:
        if set(word) <= set("&|;"):
            commands.append([])
        elif word != "...":
            commands[-1].append(word)
    return [command for command in commands if command]


def commands() -> list[str]:
    """Every command in a bash block or in a code span."""
    text = "\n".join(blocks(TEXT, "bash")).replace("\\\n", " ")
    kinds = r"(python3?|torchrun|pip|pytest) |[\w/]+\.py .*--?\w"
    lines = [*text.splitlines(), *(span for span in SPANS if re.match(kinds, span))]
    return sorted({shlex.join(words) for line in lines for words in split(line)})


def parse(script: str, words: list[str]) -> None:
    """Start a script as a shell does, up to where its words are parsed."""
    if script == "train.py":  # whose configurations are checked, too
        train.parse_config(words)
        return
    genuine = argparse.ArgumentParser.parse_args

    def parse_args(*args):
        genuine(*args)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(sys, "argv", [script, *words])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        runpy.run_path(str(ROOT / script), run_name="__main__")


def tables(text):
    """(text before it, header, rows) of each table, as cells."""
    for table in re.finditer(r"(?:^\|.*\|\n)+", text + "\n", re.M):
        lines = [line.strip("|").split("|") for line in table[0].splitlines()]
        head, _, *rows = [[cell.strip() for cell in line] for line in lines]
        yield text[: table.start()], head, rows


def test_two_commands_from_a_fresh_machine_come_first():
    """Each makes a virtual environment; one trains and samples, one tests, which is what CI runs."""
    made = [line for line in blocks(README, "bash")[0].splitlines() if " -m venv " in line]
    (show,) = [line for line in made if "train.py" in line and "sample.py" in line]
    (test,) = [line for line in made if "pytest" in line]
    for line in (show, test):
        first, install, *_ = split(line)
        assert first[1:3] == ["-m", "venv"] and install[1:4] == ["install", "-r", "requirements.txt"]
    assert test in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("command", commands())
def test_a_command_is_understood(command):
    program, *words = shlex.split(command)
    program = Path(program).name if "/bin/" in program else program
    if program == "torchrun":
        script = any(word.endswith(".py") for word in words)
        found = torchrun.get_args_parser().parse_args(words if script else [*words, "train.py"])
        program, words = found.training_script, found.training_script_args
    elif program in ("python", "python3"):
        program, *words = words
    if program.endswith(".py"):
        parse(program, words)
    else:
        assert program in {"-m", "pip", "pytest", "source", "cd", "git"}, command
        names = [name for flag, name in zip(words, words[1:]) if flag == "-r"]
        assert all((ROOT / name).is_file() for name in names), command


def test_the_arms_of_an_experiment_are_configurations():
    """Each cell of a column "flags", behind the last command above it; no two are the same."""
    found = 0
    for section in SECTIONS:
        for text, head, rows in tables(section):
            for k in (k for k, name in enumerate(head) if name in ("flag", "flags")):
                base = shlex.split(re.findall(r"python train\.py ([^`\n]*)", text)[-1])
                arms = [shlex.split(row[k].strip("`")) for row in rows]
                assert len({train.parse_config(base + arm) for arm in arms}) == len(arms), head
                found += len(arms)
    assert found


def test_flags_exist(capsys):
    known = {word for a in torchrun.get_args_parser()._actions for word in a.option_strings}
    asked = [["train.py"], ["sample.py"], ["data.py", "prepare"], ["demo/benchmarks.py"]]
    asked += [["evaluate.py", name] for name in ("fid", "consistency", "clip")] + [["tests/bench.py"]]
    for script, *words in asked:
        with pytest.raises(SystemExit):
            parse(script, [*words, "--help"])
    known |= set(re.findall(r"--\w[\w-]*", capsys.readouterr().out))
    found = {flag for span in SPANS for flag in re.findall(r"(?<![\w-])--\w[\w-]*", span)}
    assert found and found <= known, found - known


def test_names_of_code_exist():
    pattern = rf"({'|'.join(MODULES)})\.(?!py$)\w+"
    names = [span.split(".") for span in SPANS if re.fullmatch(pattern, span)]
    missing = [f"{m}.{name}" for m, name in names if not hasattr(MODULES[m], name)]
    assert names and not missing, missing
    assert {span for span in SPANS if re.fullmatch(r"loss_\w+", span)} <= {*train.BINS}


def test_named_files_and_pictures_exist():
    files = [s for s in SPANS if re.fullmatch(r"(demo|tests)/[\w./]+|\w+\.py", s)]
    for base, text in ((ROOT, README), (ROOT / "demo", NOTEBOOK)):
        links = re.findall(r"\]\(([^)#]+)\)", text)
        files += [str(base / link) for link in links if not link.startswith("http")]
    missing = sorted({name for name in files if not (ROOT / name).exists()})
    assert files and not missing, missing


def test_the_table_of_presets_is_that_of_the_code(capsys):
    """The numbers that it states: size and patch, updates and batch, parameters."""
    (rows,) = [rows for _, head, rows in tables(README) if head[0].startswith("preset")]
    seen = []
    for names, *cells in rows:
        for name in re.findall(r"`(\w+)`", names):
            seen.append(name)
            train.main(["--config", name, "--dry_run"])
            said, cfg, row = capsys.readouterr().out, train.PRESETS[name], " | ".join(cells)
            network, parameters = re.search(r"(\w+/\d+), ([\d,]+) parameters", said).groups()
            batch = cfg.batch
            if not batch:  # as it is chosen on a CPU
                spec = data.open_data(cfg.data).spec
                batch = train.resolve(cfg, spec, torch.device("cpu"), 1).batch
            for fact in (network, parameters, f"{cfg.steps:,} x {batch:,}"):
                assert re.search(rf"(?<![\w,]){fact}(?![\w,]\d)", row), (name, fact)
    assert sorted(seen) == sorted(train.PRESETS)


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_a_python_example_runs(code, tmp_path, monkeypatch):
    """On an untrained network of the demo's shape; the pictures that it names are written."""
    monkeypatch.chdir(tmp_path)
    spec = data.open_data("demo").spec
    network = {"channels": 1, "patch": 7, "depth": 1, "width": 32, "heads": 2, "adaln": 8}
    network["classes"] = 10
    record = {"transport": "tim", "drop": 0.1, "guidance": 1.0}
    config = {"model": network, "data": spec.to_json(), "train": record, "step": 0}
    Path("runs/demo").mkdir(parents=True)
    state = model.TiM(**network).state_dict()
    sample.save(Path("runs/demo/ema.safetensors"), state, config)
    exec(code, {})
    for name in re.findall(r'"(\w+\.png)"', code):
        assert Image.open(name).size == (28, 28)


def test_no_figure_is_left_to_fill_in():
    left = re.findall(r"@[A-Z_]+@|^[A-Z_]{6,}$|TODO|to be filled", README + NOTEBOOK, re.M)
    assert not left, f"still to be measured and written: {left}"
