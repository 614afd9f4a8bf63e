"""Training: configurations, sharding, the step of the paper, checkpoints, log.

    python train.py                                                   # demo on the embedded pictures, on what is there
    torchrun --nproc_per_node=16 train.py --config imagenet_xl        # again = resume
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
import types
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import data
from data import UserError
from model import SIZES, TiM
from sample import generate, initial_noise, save
from transition import (
    KERNELS,
    TAUS,
    TRANSPORTS,
    adaptive,
    check_weight,
    diffusion_count,
    exact_derivative,
    expand,
    finite_difference,
    guided_pair,
    interpolate,
    sample_loss,
    sample_times,
    time_weight,
    transition_target,
    twice,
)

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def opt(default, text, choices=None):
    return field(default=default, metadata=dict(help=text, choices=choices))


@dataclass(frozen=True)
class Config:
    """One run. Every field is a flag; the record travels in the checkpoint."""

    # data
    data: str = opt("demo", "demo, random, or a folder (idx, CIFAR-10, one folder per class)")
    channels: int = opt(0, "channels of the data, 0 = take it from them")
    side: int = opt(0, "height and width of the data, 0 = take it from them")
    classes: int = opt(0, "number of classes, 0 = take it from the data")
    # network
    size: str = opt("demo", "row of model.SIZES", tuple(SIZES))
    patch: int = opt(2, "pixels or latent places per token side")
    shared_time: bool = opt(False, "ablation: one time encoder for t and t - r")
    interval_attention: bool = opt(True, "attention sees t - r")
    # objective
    transport: str = opt("tim", "row of transition.TRANSPORTS", tuple(TRANSPORTS))
    share_diffusion: float = opt(0.5, "share of samples with r = t")
    share_consistency: float = opt(0.1, "share of samples with r = t_min")
    time_mean: float | None = opt(None, "mean of the draw of times, default the row's")
    time_std: float | None = opt(None, "standard deviation of the draw of times, default the row's")
    derivative: str = opt("dde", "df/dt by central difference or forward-mode autodiff", ("dde", "jvp"))
    h: float = opt(0.0, "half width of the difference, as the network sees time; 0 = .005 in fp32, .02 in bf16")
    tau: str = opt("tan", "interval weighting: function of time", tuple(TAUS))
    kernel: str = opt("sqrt", "interval weighting: function of tau(t) - tau(r)", tuple(KERNELS))
    weight_sigma: float = opt(1.0, "interval weighting: sigma of the kernel")
    cosine: bool = opt(True, "add 1 - cosine over channels to the loss")
    adaptive: bool = opt(True, "divide each sample's loss by itself")
    guide_gt: float = opt(1.0, "model guidance in the target: weight of the data's own target")
    guide_cond: float = opt(0.0, "model guidance: weight of the conditional prediction; the rest goes to no condition")
    guide_low: float = opt(0.0, "model guidance from this fraction of the row's times")
    guide_high: float = opt(1.0, "model guidance up to this fraction")
    drop: float = opt(0.1, "share of conditions dropped")
    # optimisation
    steps: int = opt(1000, "length of training in updates")
    batch: int = opt(128, "pictures per update, over all ranks")
    accumulate: int = opt(1, "micro-batches per update")
    lr: float = opt(2e-3, "AdamW learning rate")
    warmup: int = opt(100, "updates of linear warm-up")
    decay: float = opt(0.0, "last share of the updates in which the rate falls linearly to zero")
    beta2: float = opt(0.95, "AdamW's second beta")
    weight_decay: float = opt(0.01, "AdamW weight decay")
    clip: float = opt(1.0, "largest gradient norm")
    ema: float = opt(0.9999, "decay of the averaged weights, approached as (1 + n) / (10 + n)")
    # machine
    precision: str = opt("auto", "of attention and MLP; auto = bf16 on GPUs", ("auto", "fp32", "bf16"))
    compile: bool = opt(False, "compile the blocks")
    device: str = opt("auto", "auto = cuda, mps, cpu, the first that is there")
    # run
    name: str = opt("", "folder under runs/, default the preset's name")
    runs: str = opt("runs", "folder of the run folders")
    seed: int = opt(0, "of weights, data order, noise and times")
    log_every: int = opt(50, "updates per log line")
    save_every: int = opt(1000, "updates per checkpoint; one is written at the end in any case")
    keep: int = opt(2, "checkpoints to keep")
    sample_every: int = opt(0, "updates per sample grid, 0 = at the end only")
    guidance: float = opt(1.0, "default guidance of sampling")


PRESETS = {
    "demo": Config(),
}
FREE = {"steps", "log_every", "save_every", "sample_every", "keep", "keep_every", "guidance", "device", "compile", "runs", "name"}
GRID_STEPS = (1, 2, 4, 8, 32)


def parse_config(argv=None) -> Config:
    """--config NAME picks a preset, --FIELD VALUE replaces one field; argparse refuses the rest with exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", choices=PRESETS, default="demo", help="preset to start from (default demo)")
    for f in fields(Config):
        text = f"{f.metadata['help']} (default {f.default})"
        if f.type is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            kind = float if isinstance(f.type, types.UnionType) else f.type
            choices = f.metadata["choices"]
            parser.add_argument(f"--{f.name}", type=kind, choices=choices, default=argparse.SUPPRESS, help=text)
    given = vars(parser.parse_args(argv))
    preset = given.pop("config")
    cfg = replace(PRESETS[preset], **given)
    return check(replace(cfg, name=cfg.name or preset))


def check(cfg: Config) -> Config:
    """Raise UserError for values that cannot work together, before anything is built."""
    positive = ("patch", "steps", "batch", "accumulate", "lr", "clip", "log_every", "save_every", "keep")
    for name in positive:
        if not getattr(cfg, name) > 0:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be positive")
    for name in ("share_diffusion", "share_consistency", "drop", "decay", "ema", "guide_low", "guide_high"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise UserError(f"--{name} {getattr(cfg, name)}: a share lies in [0, 1]")
    if cfg.share_diffusion + cfg.share_consistency > 1:
        raise UserError(f"--share_diffusion {cfg.share_diffusion} and --share_consistency {cfg.share_consistency} exceed 1")
    if (cfg.guide_gt, cfg.guide_cond) != (1, 0) and not cfg.drop:
        raise UserError("--guide_gt and --guide_cond need a network that knows no condition: give --drop 0.1")
    if "/" in cfg.name or cfg.name.startswith("."):
        raise UserError(f"--name {cfg.name}: one folder name, without / or a leading dot")
    try:
        if cfg.kernel != "constant":
            check_weight(TRANSPORTS[cfg.transport], cfg.tau)
    except ValueError as error:
        raise UserError(f"--tau {cfg.tau}: {error}") from error
    return cfg


def difference_width(cfg: Config, bf16: bool) -> float:
    """h of the finite difference: rounding asks for a larger one in bf16, truncation for a smaller one in fp32."""
    return cfg.h or (0.02 if bf16 else 0.005)


# ---------------------------------------------------------------------------------------------------------------------
# The step


def see(model, row):
    """The network as the paper writes it, f(x_t, t, r, y): it is shown c_noise(t) and c_noise(r)."""
    return lambda x_t, t, r, y: model(x_t, row.c_noise(t), row.c_noise(r), y)


def guide(ema, row, cfg, x, eps, t, y, null):
    """(x, eps) whose residual is guided by the averaged network, where t is in range and the condition was not dropped."""
    with torch.no_grad():
        x_t, f_cond = interpolate(row, x, eps, t), None
        if cfg.guide_cond:
            s = twice(t)
            f_cond, f_null = see(ema, row)(twice(x_t), s, s, torch.cat([y, null])).chunk(2)
        else:
            f_null = see(ema, row)(x_t, t, t, null)
        pair = guided_pair(row, x, eps, t, f_cond, f_null, cfg.guide_gt, cfg.guide_cond)
        place = (t - row.t_min) / (row.t_max - row.t_min)
        use = expand((y != null) & (cfg.guide_low <= place) & (place <= cfg.guide_high), x)
        return torch.where(use, pair[0], x), torch.where(use, pair[1], eps)


def objective(model, ema, row, cfg, h, x, y, rng):
    """The paper's algorithm on one micro-batch.

    x (B, C, H, W) of unit variance, y (B,), rng owns all chance. Returns the loss to descend (0-d), the raw loss l (B,),
    t and r (B,).
    """
    null = torch.full_like(y, model.classes)
    y = torch.where(torch.rand(len(y), generator=rng, device=x.device) < cfg.drop, null, y)
    t, r = sample_times(row, len(x), cfg.share_diffusion, cfg.share_consistency, rng, cfg.time_mean, cfg.time_std)
    eps = torch.randn(x.shape, generator=rng, device=x.device)
    if (cfg.guide_gt, cfg.guide_cond) != (1, 0):
        x, eps = guide(ema, row, cfg, x, eps, t, y, null)

    df_dt = torch.zeros_like(x)                                                 # not needed where r = t
    free = slice(diffusion_count(len(x), cfg.share_diffusion), None)
    if len(x[free]):
        args = see(model, row), row, x[free], eps[free], t[free], r[free], y[free]
        df_dt[free] = exact_derivative(*args) if cfg.derivative == "jvp" else finite_difference(*args, h)

    f = see(model, row)(interpolate(row, x, eps, t), t, r, y)
    loss = sample_loss(f, transition_target(row, x, eps, t, r, df_dt), cfg.cosine)
    weight = time_weight(row, t, r, cfg.tau, cfg.kernel, cfg.weight_sigma)
    return (weight * (adaptive(loss) if cfg.adaptive else loss)).mean(), loss.detach(), t, r


def train_step(model, ema, optimizer, row, cfg, h, step, batch, slots):
    """One update. batch: an (x, y) per slot of this rank, slots: their numbers. Returns 0-d and (B,) tensors, no host sync.

    Chance is a function of (seed, step, slot): two ranks of one slot and one rank of two draw the same.
    """
    losses = []
    for k, (slot, (x, y)) in enumerate(zip(slots, batch)):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(k + 1 == len(slots))
        loss, *seen = objective(model, ema, row, cfg, h, x, y, data.rng(cfg.seed, step, slot, 1, device=x.device))
        (loss / len(slots)).backward()
        losses.append(seen)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(cfg, step)
    optimizer.step()
    optimizer.zero_grad()
    update_average(ema, model, min(cfg.ema, (1 + step) / (10 + step)))
    loss, t, r = (torch.cat(parts) for parts in zip(*losses))
    return local(norm, whole=True), loss, t, r


def learning_rate(cfg: Config, step: int) -> float:
    """Linear warm-up, constant, and, if cfg.decay, a linear fall to zero over that last share."""
    fall = (cfg.steps - step) / (cfg.decay * cfg.steps) if cfg.decay else 1.0
    return cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup), fall)


def local(p: torch.Tensor, whole=False) -> torch.Tensor:
    """This rank's part of a sharded tensor (or all of it); any other tensor as it is."""
    return (p.full_tensor() if whole else p.to_local()) if isinstance(p, DTensor) else p


@torch.no_grad()
def update_average(ema, model, decay: float) -> None:
    torch._foreach_lerp_([local(p) for p in ema.parameters()], [local(p) for p in model.parameters()], 1 - decay)


# ---------------------------------------------------------------------------------------------------------------------
# Many ranks


def connect(device: str):
    """Join the ranks that torchrun started, or be the only one. Returns the device; rank and world are torch.distributed's."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend, **alone)
    return torch.device(device)


def shard(model, mesh, bf16: bool):
    """FSDP2, a unit per block: fp32 master weights and gradient reduction, attention and MLP computed in bf16.

    adaLN is a unit of its own and stays fp32, and inputs are never cast: a bf16 t would turn t +- h into noise.
    """
    fp32 = MixedPrecisionPolicy(cast_forward_inputs=False)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block.adaLN_modulation, mesh=mesh, mp_policy=fp32)
        fully_shard(block, mesh=mesh, mp_policy=half if bf16 else fp32)
    return fully_shard(model, mesh=mesh, mp_policy=fp32, reshard_after_forward=True)


def first_rank(action, *args) -> None:
    """Run action(*args) on rank 0 while the others wait; an error there is raised on every rank, so none hangs."""
    fault = [None]
    if dist.get_rank() == 0:
        try:
            action(*args)
        except (OSError, UserError) as error:
            fault = [str(error)]
    dist.broadcast_object_list(fault)
    if fault[0]:
        raise UserError(fault[0])


def later(tensor):
    """A function that gives the tensor's values and waits for no work that is queued after now."""
    if tensor.device.type != "cuda":
        values = tensor.tolist()
        return lambda: values
    host, event = torch.empty_like(tensor, device="cpu", pin_memory=True), torch.cuda.Event()
    host.copy_(tensor, non_blocking=True)
    event.record()

    def read():
        event.synchronize()
        return host.tolist()

    return read


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def training_state(model, ema, optimizer) -> dict:
    return {
        "model": get_model_state_dict(model),
        "ema": get_model_state_dict(ema),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def checkpoints(run: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step_*") if p.suffix != ".tmp")


def write_checkpoint(run: Path, step: int, model, ema, optimizer, record: dict, keep: int) -> None:
    """Write aside, rename when complete, then let go of the oldest: at any moment the last complete one is there."""
    final = run / "checkpoints" / f"step_{step:08d}"
    aside = final.with_suffix(".tmp")
    if final.is_dir():
        return
    first_rank(lambda: shutil.rmtree(aside, ignore_errors=True))
    try:
        dcp.save(training_state(model, ema, optimizer), checkpoint_id=aside)
    except dcp.api.CheckpointException as error:
        raise UserError(f"{aside}: not written ({error}); the older checkpoints are whole. Free the disk, run again") from error
    whole = get_model_state_dict(ema, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def finish():
        save(aside / "ema.safetensors", whole, record | dict(step=step))
        (aside / "config.json").write_text(json.dumps(record | dict(step=step), indent=1))
        os.replace(aside, final)
        shutil.copyfile(final / "ema.safetensors", run / "ema.safetensors.tmp")
        os.replace(run / "ema.safetensors.tmp", run / "ema.safetensors")
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)

    first_rank(finish)


def resume(run: Path, model, ema, optimizer, record: dict) -> int:
    """Load the newest complete checkpoint, if any; returns the number of updates done.

    raises UserError if it was made with other settings, by name: only those in FREE may differ.
    """
    found = checkpoints(run)
    if not found:
        return 0
    old = json.loads((found[-1] / "config.json").read_text())
    for name in sorted(old["train"].keys() | record["train"].keys()):
        was, now = old["train"].get(name), record["train"].get(name)
        if name not in FREE and was != now:
            raise UserError(f"{found[-1]} was trained with {name}={was}, not {now}; set --{name} back, or use a new --name")
    if old["model"] != record["model"]:
        raise UserError(f"{found[-1]} holds another network: {old['model']}, not {record['model']}; use a new --name")
    state = training_state(model, ema, optimizer)
    dcp.load(state, checkpoint_id=found[-1])
    set_model_state_dict(model, state["model"])
    set_model_state_dict(ema, state["ema"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return old["step"]


# ---------------------------------------------------------------------------------------------------------------------
# The run

EDGES = (0.0, 0.25, 0.5, 0.75)  # bins of (t - r) over the row's range: r = t, then four quarters


class Meter:
    """Sums since the last log line, on the device: raw loss by length of the interval, gradient norm."""

    def __init__(self, row, device):
        self.span, self.edges = row.t_max - row.t_min, torch.tensor(EDGES, device=device)
        self.sums = torch.zeros(2, len(EDGES) + 1, device=device)
        self.norm, self.steps, self.waited, self.began = torch.zeros((), device=device), 0, 0.0, time.perf_counter()

    def add(self, norm, loss, t, r, waited):
        bins = torch.bucketize((t - r) / self.span, self.edges)
        self.sums.index_add_(1, bins, torch.stack([loss, torch.ones_like(loss)]))
        self.norm += norm
        self.steps, self.waited = self.steps + 1, self.waited + waited

    def read(self) -> dict:
        """Averages over all ranks; every rank must call it."""
        dist.all_reduce(self.sums)
        (loss, count), spent = self.sums.tolist(), time.perf_counter() - self.began
        names = ["loss_equal"] + [f"loss_{int(100 * e)}" for e in EDGES[1:]] + ["loss_100"]
        by_length = {n: s / c if c else None for n, s, c in zip(names, loss, count)}
        means = dict(loss=sum(loss) / sum(count), **by_length, grad_norm=float(self.norm) / self.steps)
        return means | dict(images_per_s=sum(count) / spent, waiting=self.waited / spent)


def stop_on_nonfinite(step, seen, rank):
    """Every rank knows that the gradient was not finite; say where, on all of them."""
    loss, t, r = (v.tolist() for v in seen)
    bad = [f"rank {rank}: l={a:g} at t={b:.6f}, r={c:.6f}" for a, b, c in zip(loss, t, r) if not math.isfinite(a)]
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, bad)
    bad = [line for part in parts for line in part] or ["all losses were finite, the gradient was not"]
    raise UserError(
        f"step {step}: loss or gradient is not finite ({'; '.join(bad[:4])}). Nothing of it was saved; the last checkpoint "
        "is good. Try a lower --lr, --precision fp32, or look at the data"
    )


def sample_grid(model, row, spec, cfg, path: Path, columns: int = 10) -> None:
    """One row per number of steps, each column one noise and one class. Every rank joins in, rank 0 writes."""
    device = next(model.parameters()).device
    z = initial_noise(spec["shape"], cfg.seed, range(columns), device)
    y = torch.arange(columns, device=device) % len(spec["classes"])
    rows = [data.to_pixels(spec, generate(model, row, z, y, n, cfg.guidance)) for n in GRID_STEPS]
    if dist.get_rank() == 0:
        path.parent.mkdir(exist_ok=True)
        data.grid(np.stack(rows), scale=max(1, 64 // spec["shape"][1])).save(path)


def train(cfg: Config) -> None:
    device = connect(cfg.device)
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        run_training(cfg, device, rank, world)
    finally:
        dist.destroy_process_group()


def run_training(cfg, device, rank, world):
    run, row = Path(cfg.runs) / cfg.name, TRANSPORTS[cfg.transport]
    if cfg.batch % (world * cfg.accumulate):
        raise UserError(f"--batch {cfg.batch} must divide over {world} ranks x {cfg.accumulate} micro-batches")
    first_rank(lambda: (run / "checkpoints").mkdir(parents=True, exist_ok=True))
    source = data.open_data(cfg.data, (cfg.channels, cfg.side, cfg.side), cfg.classes)
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and device.type == "cuda")
    h = difference_width(cfg, bf16)
    network = dict(
        channels=source.spec["shape"][0], patch=cfg.patch, **SIZES[cfg.size], classes=len(source.spec["classes"]),
        shared_time=cfg.shared_time, interval_attention=cfg.interval_attention,
    )  # fmt: skip
    record = dict(model=network, data=source.spec, train=asdict(cfg))

    torch.manual_seed(cfg.seed)
    model, ema = TiM(**network).to(device), TiM(**network).to(device).requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    if device.type != "mps":                                                    # FSDP knows no mps
        mesh = dist.init_device_mesh(device.type, (world,))
        model, ema = shard(model, mesh, bf16), shard(ema, mesh, bf16)
    if cfg.compile:
        for block in (*model.blocks, *ema.blocks):
            block.compile()
    fused = device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.lr, betas=(0.9, cfg.beta2), eps=1e-6, weight_decay=cfg.weight_decay, fused=fused
    )
    begin = resume(run, model, ema, optimizer, record)
    if begin >= cfg.steps:
        if rank == 0:
            print(f"{run}: {begin} updates are done, --steps {cfg.steps} asks for no more")
        return

    stop = []                                                                   # SIGTERM or SIGINT was seen
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: stop.append(number))
    slots = [rank * cfg.accumulate + k for k in range(cfg.accumulate)]
    share = cfg.batch // (world * cfg.accumulate)
    stream = data.batches(source, share, cfg.seed, slots, world * cfg.accumulate, begin)
    terminal = sys.stderr.isatty()
    bar = tqdm(total=cfg.steps, initial=begin, disable=rank > 0 or not terminal, unit="step", dynamic_ncols=True)
    log = (run / "log.jsonl").open("a") if rank == 0 else None

    def write(line: dict):
        if log:
            log.write(json.dumps(line) + "\n")
            log.flush()

    parameters = sum(p.numel() for p in model.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    write(dict(config=asdict(cfg), begin=begin, parameters=parameters, torch=torch.__version__, device=name, world=world, h=h))
    if rank == 0:
        where = f"{world} x {name}, {'bf16' if bf16 else 'fp32'}, h = {h:g}"
        print(f"{run}: {parameters:,} parameters, {len(source.labels):,} pictures {source.spec['shape']}, {where}, from update {begin}")
    meter, check_last = Meter(row, device), None
    for step in range(begin, cfg.steps):
        waiting = time.perf_counter()
        batch = [next(stream) for _ in slots]
        waited = time.perf_counter() - waiting
        batch = [(x.to(device, non_blocking=True), y.to(device, non_blocking=True)) for x, y in batch]
        norm, *seen = train_step(model, ema, optimizer, row, cfg, h, step, batch, slots)
        meter.add(norm, *seen, waited)

        # What every rank must agree on, read one step late so that no step waits for its own result.
        status = torch.stack([torch.tensor(float(bool(stop)), device=device), (~norm.isfinite()).float()])
        dist.all_reduce(status, dist.ReduceOp.MAX)
        last_one = step + 1 == cfg.steps
        save_now = last_one or (step + 1) % cfg.save_every == 0
        pending, check_last = check_last, (step, seen, later(status))
        stopping = False
        for s, what, status_of in [p for p in (pending, check_last if save_now else None) if p]:
            asked, bad = status_of()
            if bad:
                stop_on_nonfinite(s, what, rank)
            stopping |= bool(asked)

        bar.update()
        if (step + 1) % cfg.log_every == 0 or last_one or stopping:
            means = meter.read() | dict(lr=learning_rate(cfg, step))
            if device.type == "cuda":
                means["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            meter = Meter(row, device)
            write(dict(step=step + 1) | means)
            bar.set_postfix_str(f"loss {means['loss']:.4f}, {means['images_per_s']:.0f} img/s")
            if rank == 0 and not terminal:
                left = (cfg.steps - step - 1) * cfg.batch / means["images_per_s"]
                print(
                    f"step {step + 1:>7} of {cfg.steps}  loss {means['loss']:8.4f}  norm {means['grad_norm']:7.3f}  "
                    f"{means['images_per_s']:6.0f} img/s  {left:5.0f} s left", flush=True,
                )  # fmt: skip
        if save_now or stopping:
            if stopping and not save_now and check_last[2]()[1]:
                stop_on_nonfinite(step, seen, rank)
            write_checkpoint(run, step + 1, model, ema, optimizer, record, cfg.keep)
        if last_one or (cfg.sample_every and (step + 1) % cfg.sample_every == 0):
            sample_grid(ema, row, source.spec, cfg, run / "samples" / f"step_{step + 1:08d}.png")
        if stopping:
            break
    bar.close()
    if rank == 0:
        print(f"{run}: stopped at update {step + 1} and saved" if stopping else f"{run}: done, samples in {run / 'samples'}")


if __name__ == "__main__":
    data.command(lambda: train(parse_config()))
