"""Every command in the README is one that the program takes, and what it names is there."""

import re
import shlex
from pathlib import Path

import pytest

import data
import evaluate
import sample
import train

ROOT = Path(train.__file__).parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]
COMMANDS = sorted({part.strip() for line in LINES for part in line.split("#")[0].split("&&") if part.strip()})
PARSERS = dict(train=train.parse_config, sample=sample.parse_arguments, data=data.parse_arguments,
               evaluate=evaluate.parse_arguments)  # fmt: skip


def test_the_two_commands_come_first():
    first = BLOCKS[0].splitlines()
    assert first[0] == (
        "pip install -r requirements.txt && python train.py && python sample.py --steps 1 2 128"
    )
    assert first[1] == "pip install -r requirements.txt -r tests/requirements.txt && pytest"
    assert "pip install -q -r requirements.txt -r tests/requirements.txt && pytest" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command):
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = ["python", *[w for w in words[1:] if not w.startswith("--n")]] if "--nproc" in words[1] else words
    if words[0] == "python":
        try:
            PARSERS[words[1].removesuffix(".py")](words[2:])
        except SystemExit as stop:                                              # --help ends so, with status 0
            assert stop.code == 0
    else:
        assert words[0] in ("pip", "pytest", "for", "do", "done"), command
    for name in re.findall(r"-r (\S+)", command):
        assert (ROOT / name).is_file()


def test_names_in_the_table_of_equations_exist():
    for module, name in re.findall(r"`(transition|model|train|sample|data)\.(\w+)[`(]", TEXT):
        assert hasattr(__import__(module), name) or name == "py", f"{module}.{name}"


def test_pictures_are_there():
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT):
        assert (ROOT / name).is_file(), name
