"""Ten times: fork a process that writes checkpoints back to back, kill -9 it, read the newest.

In turn alone in fp32 and as FSDP in bf16; each is read as the other.
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

import train

CFG = replace(train.Config(), size="demo", patch=2, keep=2)
SIZES = {"depth": 2, "width": 64, "heads": 2, "adaln": 16}
NETWORK = {"channels": 2, "patch": 2, **SIZES, "classes": 3}
DATA = {"mean": 0.0, "std": 1.0}
RECORD = {"model": NETWORK, "data": DATA, "train": asdict(CFG), "fingerprint": ""}
TYPES = (torch.float32, torch.bfloat16)


def start(dtype):
    torch.set_num_threads(1)
    device = torch.device("cpu")
    networks = train.build(CFG, NETWORK, device, dtype)
    if dtype == torch.float32:
        return networks
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.init_device_mesh("cpu", (1,))
    model, ema = (train.wrap(m, mesh, CFG, dtype) for m in networks[:2])
    return train.Networks(model, ema, torch.optim.AdamW(model.parameters()))


def parts(networks):
    parameters = (*networks.model.parameters(), *networks.ema.parameters())
    return [train.local(p) for p in parameters]


def write_for_ever(run, dtype):
    networks = start(dtype)
    step = train.resume(run, networks, RECORD)
    while True:
        step += 1
        with torch.no_grad():
            for part in parts(networks):
                part.fill_(step)
        train.write_checkpoint(run, step, networks, RECORD)


def read(run, dtype):
    networks = start(dtype)
    step = train.resume(run, networks, RECORD)
    values = {float(v) for part in parts(networks) for v in part.unique()}
    print(
        f"step {step} whole" if values == {float(step)} else f"step {step} holds {values}",
        flush=True,
    )


def fork(work, *args):
    child = os.fork()
    if child == 0:
        work(*args)
        if dist.is_initialized():
            dist.destroy_process_group()
        os._exit(0)
    return child


run = Path(sys.argv[1]) / "run"
(run / "checkpoints").mkdir(parents=True)
wait = random.Random(0)
for turn in range(10):
    child = fork(write_for_ever, run, TYPES[turn % 2])
    found = train.checkpoints(run)
    have = found[-1].name if found else ""
    while (
        not train.checkpoints(run) or train.checkpoints(run)[-1].name == have
    ):  # until it is writing
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the writer ended by itself"
        time.sleep(0.005)
    time.sleep(wait.random() * 0.3)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.waitpid(fork(read, run, TYPES[(turn + 1) % 2]), 0)
