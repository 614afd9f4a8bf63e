"""The shape of the house: what lies at the top, who may import whom, how long a file may be."""

import ast
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {  # stage: the stages it may import
    "transition": set(),
    "model": set(),
    "data": set(),
    "sample": {"transition", "model", "data"},
    "train": {"transition", "model", "data", "sample"},
    "evaluate": {"transition", "model", "data", "sample", "train"},  # of train: what speed measures
}
LINES = {"transition": 340, "model": 360, "data": 1394, "sample": 609, "train": 983, "evaluate": 654}
ALL_LINES, README_LINES, COLUMNS, WIDER = 4340, 200, 100, 0.02
TOP = {f"{stage}.py" for stage in BELOW} | {
    "README.md",
    "LICENSE",
    "requirements.txt",
    "demo",
    "tests",
}
OPTIONAL = {  # package: the stages that may import it, inside a function
    "diffusers": {"data"},
    "transformers": {"data", "evaluate"},
    "torchvision": {"data", "evaluate"},
    "huggingface_hub": {"sample", "data"},
    "tensorboard": {"train"},
    "matplotlib": {"train", "evaluate"},
    "torch_fidelity": {"evaluate"},
}
POSIX = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix"}


def tracked() -> list[str]:
    """Files of the project, as git knows them; without git, all that .gitignore does not name."""
    try:
        git = ["git", "-C", str(ROOT), "ls-files", "--cached"]
        done = subprocess.run(git, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout:
            return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]
    except FileNotFoundError:
        pass
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    files = (p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file())
    hidden = lambda file: any(fnmatch(part, line) for part in file.parts for line in ignored)
    return [str(file) for file in files if ".git" not in file.parts and not hidden(file)]


def lines(stage) -> list[str]:
    return (ROOT / f"{stage}.py").read_text().splitlines()


def tree(stage) -> ast.Module:
    return ast.parse((ROOT / f"{stage}.py").read_text())


def imports(nodes):
    """Modules that these statements import, wherever in them: a.b.c as {"a", "b", "c"}."""
    found = set()
    for node in (n for statement in nodes for n in ast.walk(statement)):
        if isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            found |= set((node.module or "").split("."))
            found |= {alias.name for alias in node.names if node.module == "torch.utils"}
    return found


def test_the_top_level_holds_the_stages_and_nothing_else():
    found = {Path(name).parts[0] for name in tracked()}
    assert {name for name in found if not name.startswith(".")} == TOP
    assert not list(ROOT.glob("*/__init__.py"))  # no package folder


@pytest.mark.parametrize("stage", BELOW)
def test_imports_point_down(stage):
    assert imports(tree(stage).body) & BELOW.keys() <= BELOW[stage]


@pytest.mark.parametrize("stage", LINES)
def test_a_stage_is_short_enough_to_read(stage):
    assert len(lines(stage)) <= LINES[stage]


def test_the_house_is_short_enough_for_an_afternoon():
    assert sum(len(lines(stage)) for stage in LINES) <= ALL_LINES
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_lines_are_short():
    code = [line for stage in BELOW for line in lines(stage) if line.strip()]
    wide = [line for line in code if len(line) > COLUMNS]
    assert len(wide) <= WIDER * len(code), (
        f"{len(wide)} of {len(code)} lines are wider than {COLUMNS}"
    )


def test_a_line_is_one_statement():
    """No `a; b`, no body behind a colon."""
    for stage in BELOW:
        for node in ast.walk(tree(stage)):
            for body in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
                rows = [n.lineno for n in body] if isinstance(body, list) else []
                assert len(rows) == len(set(rows)), (stage, rows)
                if rows and isinstance(body, list) and isinstance(node, ast.stmt):
                    assert rows[0] > node.lineno, (stage, node.lineno)


def test_optional_packages_are_imported_only_where_they_are_used():
    for stage in BELOW:
        code = tree(stage)
        apart = (ast.FunctionDef, ast.ClassDef)
        always = imports([node for node in code.body if not isinstance(node, apart)])
        assert not always & OPTIONAL.keys(), stage
        for package in imports(code.body) & OPTIONAL.keys():
            assert stage in OPTIONAL[package], (stage, package)


def test_no_stage_needs_a_posix_system():
    for stage in BELOW:
        assert not imports(tree(stage).body) & POSIX, stage


def test_the_network_and_the_formulas_know_of_no_other_process():
    for stage in ("transition", "model"):
        assert "torch.distributed" not in (ROOT / f"{stage}.py").read_text()


def test_namespaces_go_no_further_than_the_command():
    """argparse.Namespace appears in no signature but that of what parses the arguments."""
    for stage in BELOW:
        for node in ast.walk(tree(stage)):
            if isinstance(node, ast.FunctionDef):
                kinds = [ast.unparse(a.annotation) for a in node.args.args if a.annotation]
                assert "argparse.Namespace" not in kinds, (stage, node.name)


def test_rank_and_device_are_looked_up_in_one_place():
    for stage in BELOW.keys() - {"data"}:
        source = (ROOT / f"{stage}.py").read_text()
        assert "WORLD_SIZE" not in source and "LOCAL_RANK" not in source, stage
        assert "get_rank()" not in source and "is_bf16_supported" not in source, stage
