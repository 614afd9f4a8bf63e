"""The shape of the house: what lies at the top, who may import whom, and what has one place."""

import ast
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = {"transition", "model", "data"}
BELOW = {  # stage: the stages it may import
    "transition": set(), "model": set(), "data": set(),
    "sample": LEAVES, "train": LEAVES | {"sample"}, "evaluate": LEAVES | {"sample"},
}  # fmt: skip
TOP = {f"{stage}.py" for stage in BELOW} | {
    "README.md", "LICENSE", "requirements.txt", "demo", "tests"
}  # fmt: skip
OPTIONAL = {  # package: the stages that may import it, inside a function
    "diffusers": {"data"},
    "transformers": {"data", "evaluate"},
    "torchvision": {"data", "evaluate"},
    "huggingface_hub": {"sample", "data"},
    "matplotlib": {"data"},
    "torch_fidelity": {"evaluate"},
}
SYSTEM = {"resource", "fcntl", "msvcrt", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix"}
RANK = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}  # torchrun's environment
DEVICE = {"is_available", "is_bf16_supported", "device_count", "set_device"}


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


def tree(stage) -> ast.Module:
    return ast.parse((ROOT / f"{stage}.py").read_text("utf-8"))


def dotted(nodes) -> set[str]:
    """What these statements import, wherever in them: a.b for `import a.b` and `from a import b`."""
    found = set()
    for node in (n for statement in nodes for n in ast.walk(statement)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports(nodes) -> set[str]:
    """The packages of these names."""
    return {name.split(".")[0] for name in dotted(nodes)}


def test_the_top_level_holds_the_stages_and_nothing_else():
    found = {Path(name).parts[0] for name in tracked()}
    assert {name for name in found if not name.startswith(".")} == TOP
    assert not list(ROOT.glob("*/__init__.py"))  # no package folder


@pytest.mark.parametrize("stage", BELOW)
def test_a_stage_imports_those_below_it(stage):
    assert imports(tree(stage).body) & BELOW.keys() <= BELOW[stage]


@pytest.mark.parametrize("stage", BELOW)
def test_a_line_is_one_statement(stage):
    """No `a; b`, no body behind a colon."""
    for node in ast.walk(tree(stage)):
        for body in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            rows = [n.lineno for n in body] if isinstance(body, list) else []
            assert len(rows) == len(set(rows)) and getattr(node, "lineno", 0) not in rows, rows


@pytest.mark.parametrize("stage", BELOW)
def test_what_may_be_missing_is_imported_where_it_is_used(stage):
    """Optional packages inside functions; what only some systems have, in the lock alone."""
    body = tree(stage).body
    apart = (ast.FunctionDef, ast.ClassDef)
    always = imports([node for node in body if not isinstance(node, apart)])
    assert not always & (OPTIONAL.keys() | SYSTEM)
    for package in imports(body) & OPTIONAL.keys():
        assert stage in OPTIONAL[package], package
    locks = [n for n in body if stage == "data" and getattr(n, "name", "") == "take_lock"]
    assert not imports([node for node in body if node not in locks]) & SYSTEM
    assert not [name for name in dotted(body) if "tensorboard" in name]


@pytest.mark.parametrize("stage", BELOW)
def test_rank_and_device_are_looked_up_in_one_place(stage):
    nodes = list(ast.walk(tree(stage)))
    if stage != "data":
        assert not {n.value for n in nodes if isinstance(n, ast.Constant)} & RANK
        used = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
        assert not used & (DEVICE | {"get_rank", "get_world_size"})
    if stage in ("transition", "model"):  # formulas and network know of no other process
        assert not [name for name in dotted(nodes) if name.startswith("torch.distributed")]


@pytest.mark.parametrize("stage", BELOW)
def test_namespaces_go_no_further_than_the_command(stage):
    """argparse.Namespace is in no signature."""
    nodes = [n for n in ast.walk(tree(stage)) if isinstance(n, ast.FunctionDef)]
    kinds = [ast.unparse(a.annotation) for n in nodes for a in n.args.args if a.annotation]
    assert not [kind for kind in kinds if "Namespace" in kind]
