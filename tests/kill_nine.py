"""Ten times: fork a process that writes checkpoints back to back, kill -9 it at a random moment, read the newest one."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import train

CFG = train.replace(train.PRESETS["demo"], keep=2)
NETWORK = dict(channels=2, patch=2, **train.SIZES["demo"], classes=3)
RECORD = dict(model=NETWORK, data={}, train=train.asdict(CFG))


def start():
    torch.set_num_threads(1)
    train.connect("cpu")
    return train.build(CFG, NETWORK, torch.device("cpu"), False)


def write_for_ever(run):
    parts = start()
    step = train.resume(run, *parts, RECORD)
    while True:
        step += 1
        with torch.no_grad():
            for p in (*parts[0].parameters(), *parts[1].parameters()):
                train.local(p).fill_(step)
        train.write_checkpoint(run, step, *parts, RECORD)


def read(run):
    parts = start()
    step = train.resume(run, *parts, RECORD)
    values = {float(v) for p in (*parts[0].parameters(), *parts[1].parameters()) for v in train.local(p).unique()}
    print(f"step {step} whole" if values == {float(step)} else f"step {step} holds {values}", flush=True)


def fork(work):
    child = os.fork()
    if child == 0:
        work()
        dist.destroy_process_group()
        os._exit(0)
    return child


run = Path(sys.argv[1]) / "run"
(run / "checkpoints").mkdir(parents=True)
chance = random.Random(0)
for _ in range(10):
    child = fork(lambda: write_for_ever(run))
    have = len(train.checkpoints(run)) and train.checkpoints(run)[-1].name
    while not train.checkpoints(run) or train.checkpoints(run)[-1].name == have:  # it is writing now
        time.sleep(0.005)
    time.sleep(chance.random() * 0.3)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.waitpid(fork(lambda: read(run)), 0)
