"""Runs of train.py for the tests: in this process, as a shell starts it, and several in turn.

As a script, torchrun starts it: python launch.py FILE 0|1 trains every list of flags in FILE (JSON), in
the same processes; what a rank is refused is written to FILE.RANK.
A list may begin with "apart": each rank is in a folder of its own; or with "told": the last rank
gets a SIGTERM in its third update.
"""

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import data
import train

ROOT = Path(train.__file__).parent
LEFT_OVER = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}  # of a job that runs the tests
ENV = {name: value for name, value in os.environ.items() if name not in LEFT_OVER}
ENV |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# Noise, and an objective that is written out, so that no test hangs on what the presets say today.
TINY = (
    "--data random --channels 2 --side 4 --classes 3 --size demo --patch 2 --batch 8 --lr 1e-3 "
    "--warmup 0 --decay 0 --log_every 1 --ema 0.998 --no-compile --device cpu --predict f "
    "--tangent data --time_mean 0 --time_std 1.6 --no-cosine --guide_range --guide_gt 2 "
    "--guidance 1 --name run"
).split()


def flags_of(runs, *flags) -> list[str]:
    return [*TINY, "--runs", str(runs), *map(str, flags)]


def no_picture(*args) -> None:
    """In place of grids and curve, which take longer than the updates of a test."""


def without_pictures(patch) -> None:
    """patch(object, name, value), as that of pytest's monkeypatch."""
    for name in ("draw_grid", "draw_curve", "show_data"):
        patch(train, name, no_picture)


def train_here(runs, *flags, pictures=False) -> Path:
    """Train in this process; returns the folder runs/run (or of --name)."""
    argv = flags_of(runs, *flags)
    with pytest.MonkeyPatch.context() as patch:
        if not pictures:
            without_pictures(patch.setattr)
        train.main(argv)
    return Path(runs) / train.parse_config(argv)[0].name


def torchrun(ranks: int) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"
    ]  # fmt: skip


def command(runs, *flags, ranks=0, script="train.py") -> list[str]:
    """The command line of a run, under torchrun if ranks > 0."""
    python = torchrun(ranks) if ranks else [sys.executable]
    return [*python, str(ROOT / script), *flags_of(runs, *flags)]


def start(argv, **how) -> subprocess.Popen:
    """A process in a group of its own, so that `end` reaches what it starts, too."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    how = {"env": ENV, "text": True, "start_new_session": True} | pipes | how
    return subprocess.Popen([str(part) for part in argv], **how)


def end(process: subprocess.Popen) -> None:
    """Kill a process of `start` and all that it started, if any of them still runs."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def shell(argv, timeout=400, **how) -> tuple[int, str]:
    """Exit status, and stdout with stderr. Past the time, workers of torchrun end with it."""
    process = start(argv, **how)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        end(process)
    return process.returncode, out + err


def succeed(runs, *flags, **how) -> str:
    code, text = shell(command(runs, *flags, **how))
    assert code == 0, text
    return text


def crashed(text: str) -> bool:
    """Whether a process was ended by a fault of the libraries below Python: SIGABRT or SIGSEGV."""
    return bool(re.search(r"terminate called|Signal (6|11) \(|exitcode\s*:\s*-(6|11)\b", text))


def in_turn(folder: Path, ranks: int, lines: list[list[str]], pictures=False):
    """Train all lines on the same ranks; with pictures, the first makes them.

    returns  of each rank what it was refused; and the output
    """
    (folder / "lines.json").write_text(json.dumps(lines))
    argv = [*torchrun(ranks), __file__, folder / "lines.json", int(pictures)]
    for _ in range(3):  # a thread of gloo aborts, in one of many times that groups follow each other
        for store in folder.glob("lines.json.store*"):
            store.unlink()
        code, text = shell(argv)
        if code == 0 or not crashed(text):
            break
    assert code == 0, text
    refused = [json.loads((folder / f"lines.json.{rank}").read_text()) for rank in range(ranks)]
    return refused, text


def with_signal(step, at: int, *numbers):
    """train_step, in whose `at`-th call, counted from 1, this process sends itself these signals."""
    calls = count(1)

    def told(*args):
        if next(calls) == at:
            for number in numbers:
                os.kill(os.getpid(), number)
        return step(*args)

    return told


def log(run: Path) -> list[dict]:
    """The lines of log.jsonl that are of updates."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "step" in line]


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in log(run)}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "ema.safetensors")


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], **tolerance, msg=lambda m, k=k: f"{k}: {m}")


if __name__ == "__main__":
    file, refused = sys.argv[1], []
    (rank, world_size), join = data.ranks(), dist.init_process_group
    for k, line in enumerate(json.loads(Path(file).read_text())):
        if k or sys.argv[2] == "0":
            without_pictures(setattr)
        how, step = line[0], train.train_step
        line = line[how in ("apart", "told") :]
        if how == "apart":
            Path(f"{file}.apart{rank}").mkdir(exist_ok=True)
            os.chdir(f"{file}.apart{rank}")
        if how == "told" and rank == world_size - 1:
            train.train_step = with_signal(step, 3, signal.SIGTERM)
        # each group meets in a file of its own: torchrun's store still has the keys of the last one
        store = dist.FileStore(f"{file}.store{k}", world_size)
        dist.init_process_group = partial(join, store=store, rank=rank, world_size=world_size)
        try:
            train.main(line)
        except data.UserError as error:
            refused.append(str(error))
            if dist.is_initialized():
                dist.destroy_process_group()
        train.train_step = step
    Path(f"{file}.{rank}").write_text(json.dumps(refused))
