"""From a checkpoint to pictures, in any number of steps.

    python sample.py --steps 1 2 128                          # newest run; a grid, one row per number of steps
    python sample.py --checkpoint runs/demo --num 1000 --steps 8 --out pictures
"""

import argparse
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import data
from data import UserError
from model import TiM, lower_precision
from transition import TRANSPORTS, Transport, shift_times, solve, step_coefficients

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save(path: Path, state: dict[str, Tensor], config: dict) -> None:
    """One safetensors file of weights with its configuration in the metadata; complete, or not there."""
    aside = path.with_name(path.name + ".tmp")
    save_file({k: v.contiguous() for k, v in state.items()}, aside, metadata={"tim": json.dumps(config)})
    os.replace(aside, path)


def load(path, device="cpu") -> tuple[TiM, Transport, dict]:
    """The network of a checkpoint, in fp32 and evaluation mode, its transport and its configuration.

    path     a run folder (its newest ema.safetensors) or a file written by `save`.
    returns  model, row, config; config holds "model" (arguments of TiM), "data" (spec), "train" (a plain record), "step".
    raises   UserError if it is missing, cut short, not a TiM checkpoint, or its tensors do not fit, by name.
    """
    path = Path(path)
    file = path / "ema.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"--checkpoint {path}: there is no {file}; train one with `python train.py`, or give another path")
    try:
        with safe_open(file, "pt", device=str(device)) as f:
            state, config = {k: f.get_tensor(k) for k in f.keys()}, json.loads((f.metadata() or {}).get("tim", "null"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); copy or download it again") from error
    if not isinstance(config, dict) or not {"model", "data", "train"} <= config.keys():
        raise UserError(f"{file}: no TiM configuration in its metadata; give a file that train.py or --export wrote")
    with torch.device("meta"):
        model = TiM(**config["model"])
    fill(model, state, file)
    return model.eval().requires_grad_(False), TRANSPORTS[config["train"]["transport"]], config


def fill(model: TiM, state: dict[str, Tensor], file) -> None:
    """Put tensors in place of the (meta) weights; refuse missing, unknown and misshapen ones by name."""
    want = model.state_dict()
    faults = [f"missing {k}" for k in want.keys() - state.keys()] + [f"unknown {k}" for k in state.keys() - want.keys()]
    faults += [
        f"{k} {tuple(state[k].shape)} instead of {tuple(want[k].shape)}"
        for k in want.keys() & state.keys()
        if want[k].shape != state[k].shape
    ]
    if faults:
        raise UserError(f"{file} does not fit the network: {'; '.join(sorted(faults)[:5])} ({len(faults)} in all)")
    model.load_state_dict(state, assign=True)


def newest(runs="runs") -> Path:
    found = sorted(Path(runs).glob("*/ema.safetensors"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError(f"no checkpoint under {runs}/; train one with `python train.py`, or give --checkpoint PATH")
    return found[-1].parent


# ---------------------------------------------------------------------------------------------------------------------
# The sampler


def initial_noise(shape, seed: int, index, device="cpu", *step: int) -> Tensor:
    """N(0, I), (len(index), *shape) float32. Image i's noise is a function of (seed, i), and of the step if given."""
    return torch.stack([torch.randn(*shape, generator=data.rng(seed, i, *step)) for i in index]).to(device)


def guided(y, null):
    """The condition and then no condition, as one batch of twice the size."""
    return tuple(map(guided, y, null)) if isinstance(y, tuple) else torch.cat([y, null])


@torch.no_grad()
def generate(
    model: TiM, row: Transport, z: Tensor, y, steps, guidance: float = 1.0, interval=(0.0, 1.0), *,
    strict: bool = False, null=None, shift: float = 1.0, stochastic: float = 0.0,
    noise: Callable[[int], Tensor] | None = None, trace: list | None = None,
) -> Tensor:  # fmt: skip
    """Carry noise to data: x_r = A x_t + B f, once per step.

    z           (B, C, H, W) ~ N(0, I); the state keeps its type (fp32 or fp64), times are worked out in fp64.
    y           condition of the model. null: what stands for none; default the no-class row.
    steps       a number of equal steps in t, or the falling list of times itself, t_max first.
    guidance    g: f = f_null + g (f_cond - f_null), one pass of twice the batch, where t lies in `interval`, given as
                fractions of the row's range, both ends included; `strict` leaves the ends out, as the authors do.
    shift       of the times, see `shift_times`.
    stochastic  s >= 0, otfm only: the share of noise renewed in every step but the first and the last; needs
                noise(k), (B, C, H, W) ~ N(0, I) for step k.
    trace       a list that gets (t, r, network evaluations per picture) per step, so NFE is counted, not claimed.
    returns     (B, C, H, W), x at the last time.
    raises      UserError for steps < 1 or times that do not fall within the row's range.
    """
    if isinstance(steps, int):
        if steps < 1:
            raise UserError(f"--steps {steps}: a sample takes at least 1 step")
        times = torch.linspace(row.t_max, row.t_min, steps + 1, dtype=torch.float64)
        times = shift_times(row, times, shift)
    else:
        times = torch.as_tensor(steps, dtype=torch.float64)
        if len(times) < 2 or (times.diff() >= 0).any() or times[0] > row.t_max or times[-1] < row.t_min:
            raise UserError(f"times {times.tolist()} must fall, within [{row.t_min:g}, {row.t_max:g}] of {row.name!r}")
    if stochastic and row.name != "otfm":
        raise UserError(f"--stochastic {stochastic:g} is for the row 'otfm', this network was trained on {row.name!r}")
    if null is None and model.classes is not None:
        null = torch.full_like(y, model.classes)
    low, high = (row.t_min + share * (row.t_max - row.t_min) for share in interval)
    x = z * row.sigma(times[0]).to(z)
    for k, (t, r) in enumerate(zip(times[:-1], times[1:])):
        guide = guidance != 1 and (low < t < high if strict else low <= t <= high)
        copies = 2 if guide else 1
        seen_t, seen_r = (row.c_noise(s).to(x.device, torch.float32).expand(copies * len(x)) for s in (t, r))
        f = model(torch.cat([x] * copies), seen_t, seen_r, guided(y, null) if guide else y).to(x.dtype)
        if guide:
            f_cond, f_null = f.chunk(2)
            f = f_null + guidance * (f_cond - f_null)
        if stochastic and 0 < k < len(times) - 2:
            eps = solve(row, x, f, t[None].to(x))[1]
            x = x - (t - r) * (f + stochastic * eps) + (2 * stochastic * t * (t - r)).sqrt() * noise(k).to(x)
        else:
            a, b = step_coefficients(row, t, r)
            x = a.to(x) * x + b.to(x) * f
        if trace is not None:
            trace.append((float(t), float(r), copies))
    return x


def class_of(index: int, classes: list[int]) -> int:
    return classes[index % len(classes)]


def images(model, row, config, index: list[int], seed: int, steps, classes: list[int], **options) -> np.ndarray:
    """uint8 pictures (len(index), H, W, C): image i has noise (seed, i) and class classes[i mod len(classes)]."""
    device = next(model.parameters()).device
    z = initial_noise(config["data"]["shape"], seed, index, device)
    y = torch.tensor([class_of(i, classes) for i in index], device=device)
    noise = lambda k: initial_noise(config["data"]["shape"], seed, index, device, k)
    return data.to_pixels(config["data"], generate(model, row, z, y, steps, noise=noise, **options))


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--checkpoint", help="run folder or file (default: the newest under runs/)")
    p.add_argument("--steps", type=int, nargs="+", default=[1, 2, 8], help="numbers of steps, a row each (default 1 2 8)")
    p.add_argument("--classes", type=int, nargs="+", help="classes to draw, a column each (default: the first ten)")
    p.add_argument("--guidance", type=float, help="1 = off (default: what the run was trained for)")
    p.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
                   help="guide only at these times, as fractions of the range, ends included (default 0 1)")  # fmt: skip
    p.add_argument("--strict_interval", action="store_true", help="leave the ends of the interval out, as the authors do")
    p.add_argument("--stochastic", type=float, default=0.0, help="share of noise renewed per step, otfm only (default 0)")
    p.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    p.add_argument("--num", type=int, help="write this many single pictures into --out instead of a grid")
    p.add_argument("--out", help="grid PNG (default samples.png), or the folder for --num")
    p.add_argument("--batch", type=int, default=100, help="pictures per pass (default 100)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda, else cpu")
    p.add_argument("--precision", choices=("fp32", "bf16"), help="of attention and MLP (default: bf16 on cuda)")
    return p.parse_args(argv)


def main(argv=None):
    a = parse_arguments(argv)
    path = a.checkpoint or newest()
    try:
        torch.empty(0, device=a.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {a.device}: not to be had here ({str(error).splitlines()[0]}); try cpu") from error
    model, row, config = load(path, a.device)
    if (a.precision or ("bf16" if a.device.startswith("cuda") else "fp32")) == "bf16":
        lower_precision(model)
    known = len(config["data"]["classes"])
    classes = list(range(min(10, known) if a.num is None else known)) if a.classes is None else a.classes
    for k in classes:
        if not 0 <= k < known:
            raise UserError(f"--classes {k}: {path} knows classes 0 to {known - 1}")
    asked = dict(steps=(min(a.steps), 1), batch=(a.batch, 1), seed=(a.seed, 0), stochastic=(a.stochastic, 0))
    if a.num is not None:
        asked["num"] = (a.num, 1)
    for name, (value, bound) in asked.items():
        if not value >= bound:
            raise UserError(f"--{name} {value:g}: at least {bound}")
    if not 0 <= a.interval[0] <= a.interval[1] <= 1:
        raise UserError(f"--interval {a.interval[0]:g} {a.interval[1]:g}: two rising fractions within 0 and 1")
    if a.num is None and a.out and not a.out.endswith(".png"):
        raise UserError(f"--out {a.out}: a grid goes into one .png file; give such a name, or --num for many pictures")
    guidance = config["train"]["guidance"] if a.guidance is None else a.guidance
    if guidance != 1 and not config["train"]["drop"]:
        raise UserError(f"--guidance {guidance:g}: {path} was trained with --drop 0 and knows no condition to guide from; use 1")
    options = dict(guidance=guidance, interval=a.interval, strict=a.strict_interval, stochastic=a.stochastic)
    if a.num is None:
        rows = [images(model, row, config, range(len(classes)), a.seed, n, classes, **options) for n in a.steps]
        out = Path(a.out or "samples.png")
        out.parent.mkdir(parents=True, exist_ok=True)
        data.grid(np.stack(rows), scale=max(1, 64 // rows[0].shape[1])).save(out)
        names = [config["data"]["classes"][k] for k in classes]
        print(f"{out}: rows {a.steps} steps, columns {', '.join(names)}, guidance {guidance:g}, from {path}")
    else:
        many(model, row, config, a, classes, options)


def many(model, row, config, a, classes, options):
    """--num pictures as {index:06}.png, shared over ranks, PNGs written by threads; what is there is not drawn again."""
    if not a.out:
        raise UserError(f"--num {a.num} needs --out FOLDER")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for n in a.steps:
        folder = Path(a.out) / (f"steps_{n}" if len(a.steps) > 1 else "")
        folder.mkdir(parents=True, exist_ok=True)
        todo = [i for i in range(rank, a.num, world) if not (folder / f"{i:06}.png").exists()]
        writes = []
        with ThreadPoolExecutor(2) as pool, tqdm(total=len(todo), desc=f"{n} steps", disable=rank > 0, unit="img") as bar:
            for start in range(0, len(todo), a.batch):
                index = todo[start : start + a.batch]
                for i, pixels in zip(index, images(model, row, config, index, a.seed, n, classes, **options)):
                    writes.append(pool.submit(write_png, pixels, folder / f"{i:06}.png"))
                bar.update(len(index))
        for write in writes:
            write.result()                                                      # raises what the thread met
    if rank == 0:
        print(f"{a.out}: {a.num} pictures at {a.steps} steps, guidance {options['guidance']:g}")


def write_png(pixels, path: Path):
    aside = path.with_suffix(".tmp")
    data.to_image(pixels).save(aside, "PNG")
    os.replace(aside, path)


if __name__ == "__main__":
    data.command(main)
