"""What README.md and the notebook say is so: commands parse, names exist, the Python example runs.

The notebook's history keeps commands of the first edition, which need not parse.
"""

import inspect
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import evaluate
import model
import sample
import train
import transition

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
NOTEBOOK = (ROOT / "demo" / "RESULTS.md").read_text()
PRESENT, HISTORY = NOTEBOOK.split("# History of the first edition\n")
REMOVED = re.search(r"## What the second edition removed\n(.*?)\n## ", PRESENT, re.S)[1]
TEXT = README + PRESENT.replace(REMOVED, "")

MODULES = {m.__name__: m for m in (transition, model, data, sample, train, evaluate)}
FENCE = r"^```(\w+)\n(.*?)^```$"
PROSE = re.sub(FENCE, "", TEXT, flags=re.S | re.M)
SPANS = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", PROSE)]


def blocks(text, kind):
    return [body for language, body in re.findall(FENCE, text, re.S | re.M) if language == kind]


def commands():
    """Every command in a bash block or in a code span, without its comment, in sorted order."""
    lines = [line for block in blocks(TEXT, "bash") for line in block.splitlines()]
    lines += [span for span in SPANS if span.startswith(("python ", "torchrun ", "pip "))]
    parts = [part.strip() for line in lines for part in line.split("#")[0].split("&&")]
    return sorted({part for part in parts if part})


def table_rows(text, heading):
    """Cells of the first table below a heading, without its two first lines."""
    rows = []
    for line in text.split(heading + "\n")[1].splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
    return rows[2:]


def parse(script, words):
    if script == "train.py":
        train.parse_config(words)
    elif script == "sample.py":
        sample.parse_arguments(words)
    elif script == "data.py":
        data.parse_arguments(words)
    else:
        assert script == "evaluate.py", script
        arguments, rest = evaluate.parse_arguments(words)
        if arguments.command == "speed":
            train.parse_config(rest)


def test_the_two_commands_come_first_and_the_second_is_what_ci_runs():
    first, second = blocks(README, "bash")[0].splitlines()
    install = "pip install -r requirements.txt"
    assert first == f"{install} && python train.py && python sample.py --steps 1 2 128"
    assert second == f"{install} -r tests/requirements.txt && pytest"
    assert second.replace("install", "install -q") in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("command", commands())
def test_a_command_is_understood(command):
    words = shlex.split(command)
    for name in re.findall(r"-r (\S+)", command if words[0] == "pip" else ""):
        assert (ROOT / name).is_file(), name
    if words[0] in ("pip", "pytest"):
        return
    assert words[0] in ("python", "torchrun"), command
    scripts = [k for k, word in enumerate(words) if word.endswith(".py")]
    assert words[0] == "torchrun" or scripts[0] == 1, command
    script, arguments = words[scripts[0]], words[scripts[0] + 1 :]
    if script.startswith("tests/"):
        source = (ROOT / script).read_text()
        assert all(f'"{word}"' in source for word in arguments if word.startswith("--")), command
        return
    try:
        parse(script, arguments)
    except SystemExit as stop:  # --help ends with status 0
        assert stop.code == 0, command


@pytest.mark.parametrize("heading, column", [
    ("## The study: what is predicted, and the path of the derivative", 1),
    ("## The paper's ablation with the paper's own arms", 3),
])  # fmt: skip
def test_arms_of_an_experiment_are_configurations(heading, column):
    """The first command below the heading, with the flags of each arm behind its own."""
    base = blocks(PRESENT.split(heading + "\n")[1], "bash")[0].splitlines()[0].split()
    arms = [row[column].strip("`") for row in table_rows(PRESENT, heading)]
    found = [train.parse_config([*base[2:], *shlex.split(arm)])[0] for arm in arms]
    assert len(set(found)) == len(arms) == (11 if column == 1 else 10)


def test_flags_exist(capsys):
    asked = [("train.py", []), ("sample.py", []), ("data.py", ["encode"]), ("data.py", ["inspect"])]
    asked += [("evaluate.py", [name]) for name in ("fid", "consistency", "clip", "speed")]
    for script, words in asked:
        with pytest.raises(SystemExit):
            parse(script, [*words, "--help"])
    known = set(re.findall(r"--\w[\w-]*", capsys.readouterr().out))
    found = {flag for span in SPANS for flag in re.findall(r"(?<![\w-])--\w[\w-]*", span)}
    assert len(found) > 20 and found <= known, found - known


def test_names_of_code_exist():
    pattern = rf"({'|'.join(MODULES)})\.(?!py$)\w+"
    names = [span.split(".") for span in SPANS if re.fullmatch(pattern, span)]
    assert len(names) > 20
    for module, name in names:
        assert hasattr(MODULES[module], name), f"{module}.{name}"


def test_named_files_and_pictures_exist():
    files = [s for s in SPANS if re.fullmatch(r"(demo|tests)/[\w./]+|\w+\.py", s)]
    for base, text in ((ROOT, README), (ROOT / "demo", NOTEBOOK)):
        links = re.findall(r"\]\(([^)#]+)\)", text)
        files += [str(base / link) for link in links if not link.startswith("http")]
    missing = sorted({name for name in files if not (ROOT / name).exists()})
    assert not missing, missing


def test_the_algorithm_is_the_code():
    (code,) = blocks(README, "text")
    code = re.sub("#.*", "", code)
    called = set(re.findall(r"([a-z_]+)\(", code)) - {"f", "mean"}
    source = inspect.getsource(train.objective)
    assert called and all(f"{name}(" in source for name in called), called
    lines = [name for name in re.findall(r"= (\w+)\(", code) if name != "mean"]
    position = [source.index(f"{name}(") for name in lines]
    assert position == sorted(position)  # the same order, too


def test_the_table_of_presets_is_that_of_the_code(capsys):
    (lines,) = re.findall(r"\| preset \|.*?\n\n", README, re.S)
    seen = set()
    for line in lines.strip().splitlines()[2:]:
        names, network, length, parameters, memory = line.split("|")[1:6]
        for name in re.findall(r"`(\w+)`", names):
            cfg = train.PRESETS[name]
            seen.add(name)
            assert network.split()[0].rstrip(",") == f"{cfg.size}/{cfg.patch}", name
            assert length.strip() == f"{cfg.steps:,} x {cfg.batch:,}", name
            train.main(["--config", name, "--dry_run", "--world_size", "16" if memory.strip() else "1"])
            said = capsys.readouterr().out
            assert f"{parameters.strip()} parameters" in said, name
            total = float(re.search(r"total +([\d.]+) GiB", said)[1])
            assert not memory.strip() or memory.strip() == f"{total:.1f}", name
    assert seen == set(train.PRESETS)


def test_the_lines_of_the_log_are_named():
    others = "step loss grad_norm images_per_s waiting lr memory_gib".split()
    for name in (*train.BINS, *others):
        assert f"`{name}`" in README, name
        assert f'"{name}"' in inspect.getsource(train), name


def test_the_python_example_runs(tmp_path, monkeypatch):
    """On an untrained network of the demo's shape."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/demo")
    folder.mkdir(parents=True)
    spec = data.open_data("demo").spec
    network = {"channels": 1, "patch": 7, "depth": 1, "width": 32, "heads": 2, "adaln": 8}
    network["classes"] = 10
    record = {"transport": "tim", "drop": 0.1, "guidance": 1.0}
    config = {"model": network, "data": spec.to_json(), "train": record, "step": 0}
    sample.save(folder / "ema.safetensors", model.TiM(**network).state_dict(), config)
    (code,) = blocks(README, "python")
    assert len(code.splitlines()) <= 6
    values = {}
    exec(code, values)
    assert [type(p) for p in values["pictures"]] == [Image.Image] * 3
    written = np.asarray(Image.open(re.search(r'"(\w+\.png)"', code)[1]))
    assert written.shape == (28, 28) and (written == np.asarray(values["pictures"][0])).all()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_no_figure_is_left_to_fill_in():
    left = re.findall(r"@[A-Z_]+@", README + NOTEBOOK)
    assert not left, f"still to be measured and written: {left}"
