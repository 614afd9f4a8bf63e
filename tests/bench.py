"""How long updates, df/dt and sampling take, and how far df/dt by difference is off. Run by hand.

    python tests/bench.py --config demo --batch 64       # takes every flag of train.py
    python tests/bench.py --errors runs/demo             # relative errors of df/dt over h, and stop
"""

import argparse
import copy
import itertools
import math
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import evaluate
import sample
import train
from model import TiM, lower_precision
from transition import (
    TRANSPORTS, exact_derivative, finite_difference, interpolate, network_f, sample_times
)  # fmt: skip


def measure(action, device: torch.device, limit: float) -> tuple[float, int, float | None]:
    """Median seconds of action(), measured for about `limit` seconds, FLOPs by torch's counter and,
    on a GPU, MiB at the peak. nan seconds where memory runs out."""
    gpu = device.type == "cuda"
    countable = nullcontext() if gpu else sdpa_kernel(SDPBackend.MATH)  # as fused, not counted
    try:
        with FlopCounterMode(display=False) as counter, countable:
            with torch.compiler.set_stance("force_eager"):
                action()
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
        timer = Timer("action()", globals={"action": action}, num_threads=torch.get_num_threads())
        seconds = timer.adaptive_autorange(max_run_time=limit).median
    except torch.OutOfMemoryError:
        return math.nan, 0, None
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if gpu else None
    return seconds, counter.get_total_flops(), peak


def plain_jvp(f, transport, x, eps, t, r, y) -> torch.Tensor:
    """df/dt by torch.func.jvp as one would write it: attention as products, torch's own rules."""
    along = lambda s: f(interpolate(transport, x, eps, s), s, r, y)
    eager = torch.compiler.set_stance("force_eager")
    with eager, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(along, (t,), (torch.ones_like(t),))[1]


def open_setting(cfg: train.Config, device) -> tuple[train.Config, data.Spec, train.MicroBatch]:
    """cfg with nothing left open, the spec, and a batch: noise where the preset knows its shape, and
    for features of captions, as only the time counts. Without alignment and a guide_range."""
    shape = cfg.channels, cfg.side, cfg.side
    if all(shape) and (cfg.classes or cfg.caption):
        source = data.random_data(shape, cfg.classes)
    else:
        source = data.open_data(cfg.data, cfg.side)
    spec, captions = source.spec, source.captions is not None
    width = cfg.caption or data.HASHES["width"]
    if captions:
        spec = replace(spec, text={"width": width})
    cfg = train.resolve(replace(cfg, align=0.0, guide_range=()), spec, device, 1)
    batch = next(data.batches(source, cfg.batch, cfg.seed, [0], 1, patch=cfg.patch))
    if captions:
        size = len(batch.x), 256 if cfg.caption else 8
        mask = torch.ones(size, dtype=torch.bool, device=device)
        y, null = ((torch.randn(*size, width, device=device), mask) for _ in range(2))
    else:
        y, null = data.ClassConditions(len(spec.classes), device)(batch.y)
    return cfg, spec, train.MicroBatch(batch.x.to(device), y, null)


def open_actions(cfg: train.Config, spec, part, device, sampling_steps) -> dict:
    """{name: what is timed}."""
    plain = replace(cfg, guide_gt=1.0, guide_cond=0.0, derivative="dde", tangent="data")
    updates = {
        "update, diffusion only": replace(plain, share_diffusion=1.0, share_consistency=0.0),
        "update, DDE": plain,
        "update, JVP": replace(plain, derivative="jvp"),
        "update, DDE, guided target": replace(plain, guide_cond=0.75),
        "update, DDE, own path": replace(plain, tangent="network"),
    }
    transport, network, actions = TRANSPORTS[cfg.transport], train.network_arguments(cfg, spec), {}
    networks = train.build(cfg, network, device)
    for name, arm in updates.items():
        actions[name] = partial(train.train_step, networks, transport, arm, spec, 0, [part])

    rng = data.seeded(cfg.seed, device=device)
    x = data.network_space(part.x, spec, rng)
    t, r, _ = sample_times(transport, len(x), rng, mean=cfg.time_mean, std=cfg.time_std)
    f = network_f(networks.ema, transport, cfg.predict)
    inputs = f, transport, x, torch.randn_like(x), t, r, part.y
    actions["df/dt, DDE"] = partial(finite_difference, *inputs, cfg.h)
    actions["df/dt, exact_derivative"] = partial(exact_derivative, *inputs)
    actions["df/dt, torch.func.jvp"] = partial(plain_jvp, *inputs)

    model = TiM(**network).to(device).eval().requires_grad_(False)  # as sample.py draws
    lower_precision(model, torch.bfloat16 if cfg.precision == "bf16" else torch.float32)
    for guidance, k in itertools.product((1.0, 1.5), sampling_steps):
        args = model, transport, torch.randn_like(x), part.y, k, guidance
        name = f"sampling, {k} steps, guided {guidance:g}"
        actions[name] = partial(sample.generate, *args, null=part.null)
    return actions


def speed(cfg: train.Config, sampling_steps: list[int], seconds: float) -> None:
    """Print a row of each action, and append them to RUNS/bench.jsonl."""
    device = data.open_device(cfg.device)
    torch._dynamo.config.suppress_errors = device.type == "cpu"  # no C++ compiler: run uncompiled
    cfg, spec, part = open_setting(cfg, device)
    actions = open_actions(cfg, spec, part, device, sampling_steps)
    side = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    square = torch.randn(side, side, device=device).to(dtype)
    rate = 2 * side**3 / measure(lambda: square @ square, device, seconds)[0]
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{cfg.config}: batches of {tuple(part.x.shape)}, {cfg.precision}, {what}")
    print(f"matrix product of side {side}: {rate / 1e12:.4g} TFLOP/s")
    n, first, rows = len(part.x), None, []
    for name, action in actions.items():
        spent, flops, peak = measure(action, device, seconds)
        first = first or spent
        row = {"what": name, "ms": 1e3 * spent, "images/s": n / spent, "GFLOPs": flops / 1e9}
        row |= {"of matmul": flops / spent / rate, "MiB": peak, "x diffusion": spent / first}
        evaluate.print_row(row, heads=not rows)
        rows.append(row)
    about = {"config": asdict(cfg), "device": what, "matmul": rate, "rows": rows}
    evaluate.append_record(Path(cfg.runs) / "bench.jsonl", about)


WIDTHS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # h, in what the network sees


def errors(checkpoint: Path, n: int, device: torch.device, seed: int) -> list[dict]:
    """Print, and return, the relative error of df/dt by difference over h, against autodiff in fp64.

    n pictures of the set the checkpoint names, or noise if it names none; times as training draws
    them, r < t. fp64 shows truncation alone, fp32 and bf16 (attention, MLP) what rounding adds.
    """
    model, transport, config = sample.load(checkpoint, device)
    spec, trained = data.Spec.from_json(config["data"]), config["train"]
    source = data.random_data(spec.shape, len(spec.classes))
    if trained.get("data", "random") != "random":
        source = data.open_data(trained["data"], spec.shape[1], mirror=False)
    conditions = data.open_conditions(spec, device, not model.caption_mask)
    rng, batch = data.seeded(seed, device=device), next(data.batches(source, n, seed, [0], 1))
    x = data.network_space(batch.x.to(device), source.spec, rng)
    eps = torch.randn(x.shape, generator=rng, device=device)
    options = {"share_diffusion": 0.0, "mean": trained.get("time_mean"), "std": trained.get("time_std")}
    t, r, _ = sample_times(transport, len(x), rng, **options)
    y, _ = conditions(batch.y)
    y = (y, torch.ones(len(x), device=device)) if model.guide_range else y

    single, double = (x, eps, t, r), [v.double() for v in (x, eps, t, r)]
    models = {"fp64": copy.deepcopy(model).double(), "fp32": model}
    models["bf16"] = lower_precision(copy.deepcopy(model))
    nets = {name: network_f(net, transport, model.predict) for name, net in models.items()}
    exact, rows = exact_derivative(nets["fp64"], transport, *double, y), []
    for h in WIDTHS:
        row = {"half width h": f"{h:g}"}
        for name, f in nets.items():
            inputs = double if name == "fp64" else single
            gap = finite_difference(f, transport, *inputs, y, h) - exact
            row[name] = float(gap.norm() / exact.norm())
        evaluate.print_row(row, heads=not rows)
        rows.append(row)
    return rows


def main(argv=None) -> None:
    style = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=style)
    add = parser.add_argument
    add("--seconds", type=data.positive_float, default=5.0, help="per figure (default 5)")
    add("--sampling_steps", type=data.positive_int, nargs="+", default=[1, 8], help="default 1 8")
    add("--errors", type=Path, metavar="CHECKPOINT", help="print the errors of df/dt of this one")
    a, rest = parser.parse_known_args(argv)
    cfg, _ = train.parse_config(rest)
    if a.errors:
        errors(a.errors, cfg.batch or 64, data.open_device(cfg.device), cfg.seed)
    else:
        speed(cfg, a.sampling_steps, a.seconds)


if __name__ == "__main__":
    data.command(main)
