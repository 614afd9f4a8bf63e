"""Runs of train.py for the tests: in this process, as a shell starts it, and several in turn.

As a script, torchrun starts it: python launch.py FILE 0|1 trains every list of flags in FILE (JSON), in
the same processes; what a rank is refused is written to FILE.RANK.
"""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import data
import train

ROOT = Path(train.__file__).parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# Noise, and an objective that is written out, so that no test hangs on what the presets say today.
TINY = (
    "--data random --channels 2 --side 4 --classes 3 --size demo --patch 2 --batch 8 --lr 1e-3 "
    "--warmup 0 --decay 0 --log_every 1 --ema 0.998 --no-compile --device cpu --predict f "
    "--tangent data --time_mean 0 --time_std 1.6 --no-cosine --guide_gt 2 --name run"
).split()


def flags_of(runs, *flags) -> list[str]:
    return [*TINY, "--runs", str(runs), *map(str, flags)]


def no_picture(*args) -> None:
    """In place of grids and curve, which take longer than the updates of a test."""


def train_here(runs, *flags, pictures=False) -> Path:
    """Train in this process; returns the folder runs/run (or of --name)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv = flags_of(runs, *flags)
    with pytest.MonkeyPatch.context() as patch:
        if not pictures:
            patch.setattr(train, "sample_grid", no_picture)
            patch.setattr(train, "draw_curve", no_picture)
        try:
            train.main(argv)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Path(runs) / train.parse_config(argv)[0].name


def torchrun(ranks: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={ranks}",
        "--standalone",
    ]


def command(runs, *flags, ranks=0, script="train.py") -> list[str]:
    """The command line of a run, under torchrun if ranks > 0."""
    python = torchrun(ranks) if ranks else [sys.executable]
    return [*python, str(ROOT / script), *flags_of(runs, *flags)]


def shell(argv, **how) -> tuple[int, str]:
    """Exit status, and stdout with stderr."""
    how = {"env": ENV, "capture_output": True, "text": True, "timeout": 240} | how
    done = subprocess.run([str(part) for part in argv], **how)
    return done.returncode, done.stdout + done.stderr


def succeed(runs, *flags, **how) -> str:
    code, text = shell(command(runs, *flags, **how))
    assert code == 0, text
    return text


def in_turn(folder: Path, ranks: int, lines: list[list[str]], pictures=False):
    """Train all lines on the same ranks; with pictures, the first makes them.

    returns  what each rank was refused, list[list[str]], and the output
    """
    (folder / "lines.json").write_text(json.dumps(lines))
    code, text = shell([*torchrun(ranks), __file__, folder / "lines.json", int(pictures)])
    if "terminate called without an active exception" in text:  # a thread of gloo, in one of many
        # times that groups follow each other in a process; runs that are done stay as they are
        code, text = shell([*torchrun(ranks), __file__, folder / "lines.json", int(pictures)])
    assert code == 0, text
    refused = [json.loads((folder / f"lines.json.{rank}").read_text()) for rank in range(ranks)]
    return refused, text


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
            train.sample_grid = train.draw_curve = no_picture
        # each group meets in a file of its own: torchrun's store still has the keys of the last one
        store = dist.FileStore(f"{file}.store{k}", world_size)
        dist.init_process_group = partial(join, store=store, rank=rank, world_size=world_size)
        try:
            train.main(line)
        except data.UserError as error:
            refused.append(str(error))
    Path(f"{file}.{rank}").write_text(json.dumps(refused))
