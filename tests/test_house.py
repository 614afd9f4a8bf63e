"""The shape of the house: what may lie at the top, who may import whom, how long a file may be."""

import ast
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parent.parent
STAGES = {  # file: the files it may import
    "transition": set(),
    "model": set(),
    "data": set(),
    "sample": {"transition", "model", "data"},
    "train": {"transition", "model", "data", "sample"},
    "evaluate": {"transition", "model", "data", "sample", "train"},  # speed: its step
}
TOP = {f"{name}.py" for name in STAGES} | {"tests", "demo", "requirements.txt", "README.md", "LICENSE"}
ON_DEMAND = {"diffusers", "transformers"}  # only latent and text runs need them


def present(folder, pattern):
    """Files here that are part of the project: neither hidden nor ignored."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    found = [p for p in folder.glob(pattern) if not p.name.startswith(".")]
    return [p for p in found if not any(fnmatch(p.name, line) for line in ignored)]


def imports(body):
    """Names of the modules that these statements import, wherever in them."""
    for node in (n for statement in body for n in ast.walk(statement)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or ".").split(".")[0]


def test_arrows_point_down():
    for name, below in STAGES.items():
        path = ROOT / f"{name}.py"
        if path.exists():
            assert set(imports(ast.parse(path.read_text()).body)) & STAGES.keys() <= below, name


def test_top_level_holds_the_stages_and_nothing_else():
    assert {p.name for p in present(ROOT, "*")} <= TOP
    assert {"transition.py", "model.py", "data.py", "sample.py", "train.py"} <= {p.name for p in present(ROOT, "*.py")}


def test_files_are_short_enough_to_read():
    for path in [*present(ROOT, "*.py"), *present(ROOT / "tests", "*.py")]:
        lines = len(path.read_text().splitlines())
        assert lines <= 1150, f"{path.name} has {lines} lines, 1150 are the most"


def test_large_libraries_are_imported_only_where_needed():
    for name in STAGES:
        path = ROOT / f"{name}.py"
        if path.exists():
            tree = ast.parse(path.read_text())
            top = [n for n in tree.body if not isinstance(n, (ast.FunctionDef, ast.ClassDef))]
            assert not ON_DEMAND & set(imports(top)), name


def test_the_network_and_the_formulas_know_of_no_other_process():
    for name in ("transition", "model"):
        assert "torch.distributed" not in (ROOT / f"{name}.py").read_text()
