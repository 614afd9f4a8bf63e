"""Ten times: fork a process that writes checkpoints back to back, kill -9 it, read the newest.

In turn alone in fp32 and as FSDP in bf16; each is read as the other. Every wait has a deadline, and
no child outlives this process.
"""

import os
import random
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import sample
import train

DEADLINE = 120  # seconds a wait, on a busy machine
CFG = replace(train.Config(), size="demo", patch=2, keep=2, precision="fp32")
SIZES = {"depth": 2, "width": 64, "heads": 2, "adaln": 16}
NETWORK = {"channels": 2, "patch": 2, **SIZES, "classes": 3}
DATA = {"mean": 0.0, "std": 1.0}
RECORD = {"model": NETWORK, "data": DATA, "train": asdict(CFG), "fingerprint": ""}


def build(sharded):
    torch.set_num_threads(1)
    networks = train.build(CFG, NETWORK, torch.device("cpu"))
    if not sharded:
        return networks
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh, cfg = dist.init_device_mesh("cpu", (1,)), replace(CFG, precision="bf16")
    model, ema = (train.shard(m, mesh, cfg, m is networks.model) for m in (networks.model, networks.ema))
    return train.Networks(model, ema, torch.optim.AdamW(model.parameters()))


def parts(networks):
    parameters = (*networks.model.parameters(), *networks.ema.parameters())
    return [p.to_local() if isinstance(p, DTensor) else p for p in parameters]


def write(run, sharded):
    """Until it is killed, or its parent is gone."""
    networks, parent = build(sharded), os.getppid()
    step = train.resume(run, networks, RECORD)
    while os.getppid() == parent:
        step += 1
        with torch.no_grad():
            for part in parts(networks):
                part.fill_(step)
        train.write_checkpoint(run, step, networks, RECORD)


def read(run, sharded):
    networks = build(sharded)
    step = train.resume(run, networks, RECORD)
    model, _, config = sample.load(run)
    read_back = (*parts(networks), *model.parameters())
    found = {float(v) for part in read_back for v in part.detach().unique()}
    left = [str(file) for file in run.rglob("*.tmp")]
    whole = found == {float(step)} and config["step"] == step and not left
    print(f"step {step} whole" if whole else f"step {step} holds {found}, beside {left}", flush=True)


def fork(work, *args):
    child = os.fork()
    if child == 0:
        signal.alarm(2 * DEADLINE)  # which ends it whatever it waits for
        status = 1
        try:
            work(*args)
            status = 0
        finally:
            os._exit(status)
    return child


def until(done, what):
    """Wait until done() is true; past the deadline this process ends."""
    last = time.monotonic() + DEADLINE
    while not done():
        if time.monotonic() > last:
            sys.exit(f"{what}: not within {DEADLINE} s")
        time.sleep(0.005)


def has_ended(child):
    return os.waitpid(child, os.WNOHANG) != (0, 0)


def kill_and_read(run, turn, pause):
    have = train.checkpoints(run)[-1:]
    child = fork(write, run, turn % 2 == 1)

    def is_writing():
        assert not has_ended(child), "the writer ended by itself"
        return train.checkpoints(run)[-1:] != have

    until(is_writing, "a new checkpoint")
    time.sleep(pause)
    os.kill(child, signal.SIGKILL)
    until(lambda: has_ended(child), "the end of the writer")
    child = fork(read, run, turn % 2 == 0)
    until(lambda: has_ended(child), "a reader")


if __name__ == "__main__":
    folder, pauses = Path(sys.argv[1]) / "run", random.Random(0)
    (folder / "checkpoints").mkdir(parents=True)
    for number in range(10):
        kill_and_read(folder, number, pauses.random() * 0.3)
