"""Training: configurations, sharding, the step of the paper, checkpoints, log.

    python train.py                                                   # demo on the embedded pictures, on what is there
    torchrun --nproc_per_node=16 train.py --config imagenet_xl        # again = resume
    python train.py --config emoji                                    # text to image
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
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
from data import UserError
from model import SIZES, TiM, lower_precision
from sample import Texts, fill, generate, initial_noise, load, load_text_encoder, save, see
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
    resolution_shift,
    sample_loss,
    sample_times,
    shift_times,
    solve,
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
    data: str = opt("demo", "demo, emoji, random, or a folder: latents of data.py encode, idx, CIFAR-10, a folder per\n"
        "class, pictures with captions.jsonl")  # fmt: skip
    text_encoder: str = opt("bytes", "of captions: bytes, or a folder or hub name of transformers")
    autoencoder: str = opt("", "the latents must be of this autoencoder: sd-vae, dc-ae or a place; default any")
    channels: int = opt(0, "channels of the data, 0 = take it from them")
    side: int = opt(0, "height and width of the data, 0 = take it from them")
    classes: int = opt(0, "number of classes, 0 = take it from the data")
    caption: int = opt(0, "width of the features of captions, 0 = take it from the encoder")
    # network
    size: str = opt("demo", "row of model.SIZES", tuple(SIZES))
    patch: int = opt(2, "pixels or latent places per token side")
    shared_time: bool = opt(False, "ablation: one time encoder for t and t - r")
    interval_attention: bool = opt(True, "attention sees t - r")
    caption_mask: bool = opt(True, "captions' padding is not seen; the released text weights see it")
    rope_layout: str = opt("grid", "token places off the square, see model.rope_table", ("grid", "released"))
    predict: str = opt("f", "read the network's output as the paper's f, or as the x that f is made of", ("f", "x"))
    # objective
    transport: str = opt("tim", "row of transition.TRANSPORTS", tuple(TRANSPORTS))
    share_diffusion: float = opt(0.5, "share of samples with r = t")
    share_consistency: float = opt(0.1, "share of samples with r = t_min")
    time_mean: float | None = opt(None, "mean of the draw of times, default the row's")
    time_std: float | None = opt(None, "standard deviation of the draw of times, default the row's")
    diffusion_at: str = opt("later", "of the two draws of a sample with r = t; the authors: later",
        ("later", "one", "earlier"))  # fmt: skip
    shift: int = opt(0, "tokens of a picture whose times stay; s = sqrt(its tokens / this) shifts them, 0 = never")
    derivative: str = opt("dde", "df/dt by central difference or forward-mode autodiff", ("dde", "jvp"))
    tangent: str = opt("data", "df/dt along the path of the data's (x, eps), as the paper, or of the pair that the\n"
        "network itself sees at (t, t): less variance, one pass more", ("data", "network", "average"))  # fmt: skip
    h: float = opt(0.0, "half width of the difference, as the network sees time; 0 = .001 in fp32, .01 in bf16")
    tau: str = opt("tan", "interval weighting: function of time", tuple(TAUS))
    kernel: str = opt("sqrt", "interval weighting: function of tau(t) - tau(r)", tuple(KERNELS))
    weight_sigma: float = opt(1.0, "interval weighting: sigma of the kernel")
    cosine: bool = opt(True, "add 1 - cosine over channels to the loss")
    adaptive: bool = opt(True, "divide each sample's loss by itself")
    guide_gt: float = opt(1.0, "model guidance in the target: weight of the data's own target")
    guide_cond: float = opt(0.0, "model guidance: weight of the conditional prediction; the rest goes to no condition")
    guide_low: float = opt(0.0, "model guidance from this fraction of the row's times")
    guide_high: float = opt(1.0, "model guidance up to this fraction")
    align: float = opt(0.0, "weight of the loss that aligns tokens with the set's image features, 0 = off")
    align_depth: int = opt(8, "block whose tokens are aligned; the authors: 4 for B, 8 for XL")
    drop: float = opt(0.1, "share of conditions dropped")
    # optimisation
    init: str = opt("", "start from the weights of this run folder or file")
    steps: int = opt(1000, "length of training in updates")
    batch: int = opt(128, "pictures per update, over all ranks")
    accumulate: int = opt(1, "micro-batches per update and rank")
    mix: int = opt(1, "buckets per update on a --native set; divides ranks x accumulate")
    lr: float = opt(2e-3, "AdamW learning rate")
    warmup: int = opt(100, "updates of linear warm-up")
    decay: float = opt(0.0, "last share of the updates in which the rate falls linearly to zero")
    beta2: float = opt(0.95, "AdamW's second beta")
    weight_decay: float = opt(0.01, "AdamW weight decay")
    clip: float = opt(1.0, "largest gradient norm")
    ema: float = opt(0.9999, "decay of the averaged weights, approached as (1 + n) / (10 + n)")
    # machine
    precision: str = opt("auto", "of attention and MLP; auto = bf16 on GPUs", ("auto", "fp32", "bf16"))
    reduce: str = opt("fp32", "gradients are summed over ranks in", ("fp32", "bf16"))
    replicate: int = opt(1, "copies of the sharded network, such as one per node; must divide the number of ranks")
    checkpointing: bool = opt(False, "recompute each block's activations in the backward pass")
    compile: bool = opt(False, "compile the blocks")
    device: str = opt("auto", "auto = the first there is", ("auto", "cuda", "mps", "cpu"))
    # run
    name: str = opt("", "folder under runs/, default the preset's name")
    runs: str = opt("runs", "folder of the run folders")
    seed: int = opt(0, "of weights, data order, noise and times")
    log_every: int = opt(50, "updates per log line")
    save_every: int = opt(1000, "updates per checkpoint; one is written at the end in any case")
    keep: int = opt(2, "newest checkpoints to keep")
    keep_every: int = opt(0, "keep checkpoints at multiples of this many updates as well, 0 = none")
    tensorboard: bool = opt(False, "write tensorboard events into the run folder, too")
    sample_every: int = opt(0, "updates per sample grid, 0 = at the end only")
    guidance: float = opt(1.0, "default guidance of sampling")


IMAGENET = Config(
    data="latents/imagenet256", autoencoder="sd-vae", channels=4, side=32, classes=1000, size="XL", patch=2,
    steps=750_000, batch=512, lr=2e-4, warmup=0, compile=True, log_every=100, save_every=5_000, keep_every=50_000,
    sample_every=10_000, guidance=2.5,
)  # fmt: skip
LATENT_512 = dict(data="latents/imagenet512", autoencoder="dc-ae", channels=32, side=16, patch=1, guidance=3.0)
GUIDED = dict(guide_gt=1.0, guide_cond=0.75, guide_low=0.3, guide_high=0.8, guidance=1.0)
PRESETS = {
    # 10,000 pictures, 9.6 epochs, 4 minutes on two cores
    "demo": Config(
        patch=7, steps=1500, batch=64, lr=4e-3, time_mean=0.0, time_std=1.6, cosine=False, guide_gt=2.0, ema=0.998,
        decay=0.2, log_every=20,
    ),
    # 1,561 pictures with their names, 57 epochs
    "emoji": Config(
        data="emoji", size="emoji", patch=8, steps=2800, batch=32, lr=1.5e-3, time_mean=0.0, time_std=1.6, cosine=False,
        guide_gt=2.0, ema=0.998, decay=0.2, log_every=20,
    ),
    # images = steps x batch, epochs = images / 1,281,167; for bytes per rank see --dry_run
    "imagenet_b": replace(IMAGENET, size="B", patch=4, steps=100_000, batch=1024, lr=4e-4),
    "imagenet_xl": IMAGENET,
    "imagenet_xl_512": replace(IMAGENET, **LATENT_512),
    "imagenet_xl_guided": replace(IMAGENET, **GUIDED),
    "imagenet_xl_512_guided": replace(IMAGENET, **(LATENT_512 | GUIDED)),
    "t2i_xl": replace(
        IMAGENET, **LATENT_512 | dict(data="latents/t2i", classes=0, guidance=2.5), text_encoder=data.GEMMA,
        caption=1152, time_mean=0.0, time_std=1.6, shift=256, steps=500_000, batch=2048, accumulate=2, lr=4e-4,
    ),
}  # fmt: skip
FREE = set(  # what a resumed run may change
    "steps log_every save_every sample_every keep keep_every guidance device compile runs name tensorboard init "
    "checkpointing reduce replicate accumulate".split()
)
GRID_STEPS = (1, 2, 4, 8, 32)
CAPTION_STEP = 64  # compiled code is made per shape, so there captions are padded to multiples of this


def parse_config(argv=None) -> tuple[Config, int]:
    """--config NAME picks a preset, --FIELD VALUE replaces one field, argparse refuses the rest with exit status 2.

    returns  the configuration, and the number of ranks of a --dry_run (0 = train).
    """
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=form)
    parser.add_argument("--config", choices=PRESETS, default="demo", help="preset to start from (default demo)")
    parser.add_argument("--dry_run", action="store_true", help="say what the run would be and take, and stop")
    parser.add_argument("--world_size", type=int, default=1, help="number of ranks to work that out for (default 1)")
    for f in fields(Config):
        text = f"{f.metadata['help']} (default {f.default})"
        if f.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        else:
            how = dict(type=float if isinstance(f.type, types.UnionType) else f.type, choices=f.metadata["choices"])
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **how)
    given = vars(parser.parse_args(argv))
    preset, dry, world = given.pop("config"), given.pop("dry_run"), given.pop("world_size")
    cfg = replace(PRESETS[preset], **given)
    cfg = check(replace(cfg, name=cfg.name or preset))
    return cfg, world if dry else 0


def check(cfg: Config) -> Config:
    """Raise UserError for values that cannot work together, before anything is built."""
    positive = ("patch", "steps", "batch", "accumulate", "mix", "lr", "clip", "log_every", "save_every", "keep")
    for name in positive:
        if not getattr(cfg, name) > 0:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be positive")
    for name in ("h", "align", "shift", "warmup", "weight_decay", "weight_sigma", "sample_every", "keep_every", "seed"):
        if not getattr(cfg, name) >= 0:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be 0 or more")
    for name in ("share_diffusion", "share_consistency", "drop", "decay", "ema", "guide_low", "guide_high"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise UserError(f"--{name} {getattr(cfg, name)}: a share lies in [0, 1]")
    if cfg.share_diffusion + cfg.share_consistency > 1:
        raise UserError(f"--share_diffusion {cfg.share_diffusion} --share_consistency {cfg.share_consistency}: over 1")
    if (cfg.guide_gt, cfg.guide_cond) != (1, 0) and not cfg.drop:
        raise UserError("--guide_gt and --guide_cond need a network that knows no condition: give --drop 0.1")
    if "/" in cfg.name or cfg.name.startswith("."):
        raise UserError(f"--name {cfg.name}: one folder name, without / or a leading dot")
    try:
        if cfg.kernel != "constant":
            check_weight(TRANSPORTS[cfg.transport], cfg.tau)
    except ValueError as error:
        raise UserError(f"--tau {cfg.tau}: {error}") from error
    try:
        shift_times(TRANSPORTS[cfg.transport], torch.ones(1), 2.0 if cfg.shift else 1.0)
    except ValueError as error:
        raise UserError(f"--shift {cfg.shift}: {error}; use 0") from error
    return cfg


def difference_width(cfg: Config, bf16: bool) -> float:
    """h of the finite difference: truncation asks for a small one, rounding in bf16 for a larger (README, Measured)."""
    return cfg.h or (0.01 if bf16 else 0.001)


# ---------------------------------------------------------------------------------------------------------------------
# The step


def guide(ema, row, cfg, x, eps, t, y, null, texts=None):
    """(x, eps) with a residual guided by the averaged network, where t is in range and the condition not dropped."""
    with torch.no_grad():
        x_t, f_cond = interpolate(row, x, eps, t), None
        if cfg.guide_cond:
            s = twice(t)
            f_cond, f_null = see(ema, row, texts)(twice(x_t), s, s, torch.cat([y, null])).chunk(2)
        else:
            f_null = see(ema, row, texts)(x_t, t, t, null)
        pair = guided_pair(row, x, eps, t, f_cond, f_null, cfg.guide_gt, cfg.guide_cond)
        place = (t - row.t_min) / (row.t_max - row.t_min)
        use = expand((y != null) & (cfg.guide_low <= place) & (place <= cfg.guide_high), x)
        return torch.where(use, pair[0], x), torch.where(use, pair[1], eps)


@torch.no_grad()
def own_pair(net, row, x, eps, t, y):
    """The (x, eps) that the network itself sees behind the state x_t: a path with less variance (arXiv 2512.02012)."""
    x_t = interpolate(row, x, eps, t)
    return solve(row, x_t, net(x_t, t, t, y), t)


def objective(model, ema, row, cfg, h, x, y, rng, features=None, texts=None):
    """The paper's algorithm on one micro-batch.

    x (B, C, H, W) of unit variance, y (B,) classes or numbers of captions in `texts` (sample.Texts), features (B, N, F)
    if cfg.align, rng owns all chance. Returns the loss to descend (0-d), the raw loss l (B,), t and r (B,).
    """
    null = torch.full_like(y, texts.null if texts else model.classes)
    y = torch.where(torch.rand(len(y), generator=rng, device=x.device) < cfg.drop, null, y)
    shares = cfg.share_diffusion, cfg.share_consistency
    shift = resolution_shift(x[0, 0].numel() // cfg.patch**2, cfg.shift)
    t, r = sample_times(row, len(x), *shares, rng, cfg.time_mean, cfg.time_std, shift, cfg.diffusion_at)
    eps = torch.randn(x.shape, generator=rng, device=x.device)
    if (cfg.guide_gt, cfg.guide_cond) != (1, 0):
        x, eps = guide(ema, row, cfg, x, eps, t, y, null, texts)

    df_dt = torch.zeros_like(x)                                                 # not needed where r = t
    free = slice(diffusion_count(len(x), cfg.share_diffusion), None)
    if len(x[free]):
        pair = x[free], eps[free]
        if cfg.tangent != "data":
            pair = own_pair(see(ema if cfg.tangent == "average" else model, row, texts), row, *pair, t[free], y[free])
        args = see(model, row, texts), row, *pair, t[free], r[free], y[free]
        df_dt[free] = exact_derivative(*args) if cfg.derivative == "jvp" else finite_difference(*args, h)

    f = see(model, row, texts)(interpolate(row, x, eps, t), t, r, y, aligned=cfg.align > 0)
    alignment = 0.0
    if cfg.align:
        f, tokens = f                                                           # tokens (B, N, F)
        alignment = cfg.align * (1 - torch.cosine_similarity(tokens.float(), features, dim=2)).mean()
    loss = sample_loss(f, transition_target(row, x, eps, t, r, df_dt), cfg.cosine)
    weight = time_weight(row, t, r, cfg.tau, cfg.kernel, cfg.weight_sigma)
    return (weight * (adaptive(loss) if cfg.adaptive else loss)).mean() + alignment, loss.detach(), t, r


def train_step(model, ema, optimizer, row, cfg, h, step, batch, slots, texts=None):
    """One update, without a host sync. batch: an (x, y[, features]) per slot of this rank; slots: their numbers.

    Chance is a function of (seed, step, slot): two ranks of one slot and one rank of two draw the same.
    Returns the gradient norm (0-d), and of this rank's pictures raw loss, t and r.
    """
    losses = []
    for k, (slot, (x, y, *features)) in enumerate(zip(slots, batch)):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(k + 1 == len(slots))
        rng = data.rng(cfg.seed, step, slot, 1, device=x.device)
        loss, *seen = objective(model, ema, row, cfg, h, x, y, rng, *features or (None,), texts)
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


def connect(device: str) -> torch.device:
    """Join the ranks that torchrun started, or be the only one. Returns the device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch._dynamo.config.suppress_errors = device == "cpu"                      # no C++ compiler: run uncompiled
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend, **alone)
    return torch.device(device)


def shard(model, mesh, cfg: Config, bf16: bool):
    """FSDP2, a unit per block: fp32 master weights, attention and MLP computed in bf16.

    adaLN is a unit of its own and stays fp32, and inputs are never cast: a bf16 t would turn t +- h into noise.
    """
    reduce = torch.bfloat16 if cfg.reduce == "bf16" else torch.float32
    whole = MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False)
    half = replace(whole, param_dtype=torch.bfloat16) if bf16 else whole
    for block in model.blocks:
        if cfg.checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if cfg.compile:
            block.compile(dynamic=False)                                        # a bucket's shape is compiled as it is
        if mesh is not None:
            fully_shard(block.adaLN_modulation, mesh=mesh, mp_policy=whole)
            fully_shard(block, mesh=mesh, mp_policy=half)
    return model if mesh is None else fully_shard(model, mesh=mesh, mp_policy=whole, reshard_after_forward=True)


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


def write_checkpoint(run: Path, step: int, model, ema, optimizer, record: dict) -> None:
    """Write aside, rename when complete, then let go of old ones: at any moment the last complete one is there."""
    final = run / "checkpoints" / f"step_{step:08d}"
    aside, record = final.with_suffix(".tmp"), record | dict(step=step)
    first_rank(lambda: shutil.rmtree(aside, ignore_errors=True))
    try:
        dcp.save(training_state(model, ema, optimizer), checkpoint_id=aside)
    except CheckpointException as error:
        raise UserError(f"{aside} not written ({error}); older ones are whole. Free the disk, run again") from error
    whole = get_model_state_dict(ema, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def finish():
        save(run / "ema.safetensors", whole, record)
        (aside / "config.json").write_text(json.dumps(record, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        keep, every = record["train"]["keep"], record["train"]["keep_every"]
        for old in checkpoints(run)[:-keep]:
            if not every or int(old.name[5:]) % every:
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
    old["train"] = asdict(Config()) | old["train"]                              # settings younger than the run
    for part, free in (("train", FREE), ("model", set()), ("data", {"mean", "std"})):
        for name in sorted(old[part].keys() | record[part].keys()):
            was, now = old[part].get(name), record[part].get(name)
            if name not in free and was != now:
                rule = f"{found[-1]} was trained with {part} {name} = {was}, not {now}"
                raise UserError(f"{rule}; set it back or use a new --name")
    state = training_state(model, ema, optimizer)
    try:
        dcp.load(state, checkpoint_id=found[-1])
    except (CheckpointException, OSError) as error:
        raise UserError(f"{found[-1]} cannot be read ({error}); remove it to go on from the one before") from error
    set_model_state_dict(model, state["model"])
    set_model_state_dict(ema, state["ema"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return old["step"]


# ---------------------------------------------------------------------------------------------------------------------
# The log

EDGES = (0.0, 0.25, 0.5, 0.75)  # bins of (t - r) over the row's range: r = t, then four quarters
BINS = ("loss_equal", "loss_25", "loss_50", "loss_75", "loss_100")


class Log:
    """Sums on the device since the last line; a line on the screen and in log.jsonl on rank 0."""

    def __init__(self, run: Path, cfg: Config, row, device, begin: int, first: dict):
        self.cfg, self.span, self.edges = cfg, row.t_max - row.t_min, torch.tensor(EDGES, device=device)
        self.first, terminal = dist.get_rank() == 0, sys.stderr.isatty()
        self.bar = tqdm(total=cfg.steps, initial=begin, disable=not (self.first and terminal), dynamic_ncols=True)
        self.lines, self.board = self.first and not terminal, None
        if self.first:
            self.file = (run / "log.jsonl").open("a")
            self.write(first)
            if cfg.tensorboard:
                self.board = open_board(run)
        self.clear()

    def clear(self):
        self.sums = torch.zeros(2, len(BINS), device=self.edges.device)         # loss and count by length
        self.norm, self.steps, self.waited, self.began = 0.0, 0, 0.0, time.perf_counter()

    def write(self, line: dict):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def add(self, norm, loss, t, r, waited: float):
        place = torch.bucketize((t - r) / self.span, self.edges)
        self.sums.index_add_(1, place, torch.stack([loss, torch.ones_like(loss)]))
        self.norm, self.steps, self.waited = self.norm + norm, self.steps + 1, self.waited + waited
        self.bar.update()

    def flush(self, step: int):
        """Averages over all ranks since the last line; every rank must call it."""
        dist.all_reduce(self.sums)
        (loss, count), spent = self.sums.tolist(), time.perf_counter() - self.began
        line = dict(step=step, loss=sum(loss) / sum(count), grad_norm=float(self.norm) / self.steps)
        line |= {name: a / b for name, a, b in zip(BINS, loss, count) if b}
        line |= dict(images_per_s=sum(count) / spent, waiting=self.waited / spent, lr=learning_rate(self.cfg, step - 1))
        if self.edges.is_cuda:
            line["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.clear()
        if not self.first:
            return
        self.write(line)
        self.bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['images_per_s']:.0f} img/s")
        if self.lines:
            left = (self.cfg.steps - step) * self.cfg.batch / line["images_per_s"]
            figures = f"loss {line['loss']:.4f}  norm {line['grad_norm']:.3f}  {line['images_per_s']:.0f} img/s"
            print(f"step {step} of {self.cfg.steps}  {figures}  {left:.0f} s left", flush=True)
        if self.board:
            for name, value in line.items():
                self.board.add_scalar(name, value, step)


def open_board(run: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--tensorboard: {error}; pip install tensorboard, or leave it out") from error
    return SummaryWriter(run)


def fail_nonfinite(step: int, seen) -> None:
    """The gradient was not finite, as every rank knows; say at which loss, t and r, on all of them."""
    loss, t, r = (v.tolist() for v in seen)
    rank, parts = dist.get_rank(), [None] * dist.get_world_size()
    bad = [f"rank {rank}: l = {a:g}, t = {b:g}, r = {c:g}" for a, b, c in zip(loss, t, r) if not math.isfinite(a)]
    dist.all_gather_object(parts, bad)
    where = [line for part in parts for line in part] or [f"finite losses, t <= {max(t):g}, r >= {min(r):g}"]
    raise UserError(
        f"step {step}: the gradient is not finite ({'; '.join(where[:4])}). Nothing of it was saved, the last "
        "checkpoint is good. Try a lower --lr or --precision fp32, and look at the data"
    )


def sample_grid(model, row, spec, cfg, path: Path, texts=None, columns: int = 10) -> None:
    """One row per number of steps, each column one noise and one class or one of spec["prompts"], which `texts` has.

    Every rank joins in, rank 0 writes.
    """
    device, names = next(model.parameters()).device, spec["prompts"] if texts else []
    columns = len(names) or columns
    z = initial_noise(spec["shape"], cfg.seed, range(columns), device)
    y, null = torch.arange(columns, device=device), None
    if texts:
        texts.fetch(y)
        y, null = texts(y), texts(torch.full_like(y, texts.null))
    else:
        y = y % len(spec["classes"])
    try:
        decode = data.decoder(spec, device)
    except UserError as error:                                                  # a run does not end for a picture
        decode = lambda x: data.to_pixels(dict(kind="random"), x)
        if dist.get_rank() == 0:
            print(f"{path} shows latent channels: {error}", flush=True)
    with torch.compiler.set_stance("force_eager"):                              # no compiling for a picture's batch
        shift = resolution_shift(z[0, 0].numel() // cfg.patch**2, cfg.shift)
        options = dict(guidance=cfg.guidance, local=cfg.share_diffusion == 1, null=null, shift=shift)
        rows = [decode(generate(model, row, z, y, n, **options)) for n in GRID_STEPS]
    path.parent.mkdir(exist_ok=True)
    first_rank(lambda: data.grid(np.stack(rows), scale=max(1, 64 // rows[0].shape[1]), names=names).save(path))


# ---------------------------------------------------------------------------------------------------------------------
# The run


def network_of(cfg: Config, shape, classes: int, features=(0, 0), caption: int = 0, buckets=()) -> dict:
    """Arguments of TiM for pictures of `shape` (C, H, W) or `buckets` (H, W), with classes, or with captions whose
    features have width `caption`; features (N, F) are aligned with if cfg.align."""
    for h, w in (shape[1:], *buckets):
        if h % cfg.patch or w % cfg.patch:
            way = f"choose another, or encode --native with --patch {cfg.patch}"
            raise UserError(f"--patch {cfg.patch}: {h}x{w} must be a multiple of it; {way}")
    if not (classes or caption):
        rule = "give a set with one folder per class, or captions.jsonl"
        raise UserError(f"--data {cfg.data} has neither classes nor captions to learn; {rule}")
    if cfg.caption not in (0, caption):
        rule = f"--text_encoder {cfg.text_encoder} gives {caption}" if caption else f"--data {cfg.data} has no captions"
        raise UserError(f"--caption {cfg.caption}: {rule}; change either")
    switches = dict(shared_time=cfg.shared_time, interval_attention=cfg.interval_attention)
    if cfg.align:
        tokens, depth = (shape[1] // cfg.patch) * (shape[2] // cfg.patch), SIZES[cfg.size]["depth"]
        if features[0] != tokens or not 1 <= cfg.align_depth <= depth:
            rule = f"{features[0]} features per picture for {tokens} tokens, after block {cfg.align_depth} of {depth}"
            raise UserError(f"--align: {rule}; encode them with another --grid, or choose another --align_depth")
        switches["projector"] = [cfg.align_depth, 2048, features[1]]
    switches |= dict(caption=caption) if caption else dict(classes=classes)
    if cfg.predict != "f":
        switches["predict"] = cfg.predict
    if caption and not cfg.caption_mask:
        switches["caption_mask"] = False
    if cfg.rope_layout != "grid":
        switches["rope_layout"] = cfg.rope_layout
    return dict(channels=shape[0], patch=cfg.patch, **SIZES[cfg.size], **switches)


def build(cfg: Config, network: dict, device, bf16: bool):
    """The network, its average and the optimizer, sharded over all ranks.

    A rank alone in fp32 has nothing to shard and is spared FSDP's copies, a fifth of the demo's step on a CPU; alone in
    bf16, FSDP holds the fp32 master weights. FSDP knows no mps.
    """
    torch.manual_seed(cfg.seed)                                                 # every rank the same weights
    model, ema = TiM(**network), TiM(**network).requires_grad_(False)
    if cfg.init:
        start_from(model, cfg.init)
    ema.load_state_dict(model.state_dict())
    world, mesh = dist.get_world_size(), None
    if (world > 1 or bf16) and device.type != "mps":
        shape, names = ((world,), None) if cfg.replicate == 1 else (
            (cfg.replicate, world // cfg.replicate), ("replicate", "shard"))
        mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=names)
    model, ema = (shard(m.to(device) if mesh is None else m, mesh, cfg, bf16) for m in (model, ema))
    rates = dict(lr=cfg.lr, betas=(0.9, cfg.beta2), eps=1e-6, weight_decay=cfg.weight_decay)
    return model, ema, torch.optim.AdamW(model.parameters(), fused=device.type != "mps", **rates)


def start_from(model, path: str) -> None:
    """--init: weights of a run or file. With another number of classes the table's class rows start fresh (the last
    row, no class, is kept); everything else must fit."""
    old, table = load(path)[0], "y_embedder.embedding_table.weight"
    for name in ("caption_mask", "rope_layout") if old.classes is None else ():
        if (was := getattr(old, name)) != getattr(model, name):
            way = "--no-caption_mask" if name == "caption_mask" and not was else f"--{name} {was}"
            raise UserError(f"--init {path}: was trained with {name} {was}; give {way}")
    state, fresh = old.state_dict(), model.state_dict()
    if table in state and table in fresh and state[table].shape[0] != fresh[table].shape[0]:
        state[table] = torch.cat([fresh[table][:-1], state[table][-1:]])
    state = {k: v for k, v in state.items() if k in fresh or not k.startswith("projector.")}
    fill(model, state | {k: v for k, v in fresh.items() if k.startswith("projector.") and k not in state}, path)


def dry_run(cfg: Config, world: int) -> None:
    """Print what a run on `world` ranks would be and take, from the network's shapes alone: no data, no device."""
    if not (cfg.channels and cfg.side and (cfg.classes or cfg.caption)):
        rule = "give --channels, --side, and --classes or --caption"
        raise UserError(f"--dry_run does not open --data {cfg.data}: {rule}")
    network = network_of(cfg, (cfg.channels, cfg.side, cfg.side), cfg.classes, caption=cfg.caption)
    share = cfg.batch // (world * cfg.accumulate)
    with torch.device("meta"):
        model = TiM(**network)
        x, t, y = torch.empty(share, cfg.channels, cfg.side, cfg.side), torch.empty(share), torch.empty(share).long()
        y = torch.empty(share, 256, cfg.caption) if cfg.caption else y          # captions of the full length
    saved, own = {}, {p.untyped_storage()._cdata for p in model.parameters()}
    tokens = (cfg.side // cfg.patch) ** 2

    def count(v):                                                               # flash attention keeps no N x N matrix
        if v.untyped_storage()._cdata not in own and v.shape[-2:] != (tokens, tokens):
            saved[v.untyped_storage()._cdata] = v
        return v

    if cfg.precision != "fp32":
        lower_precision(model)
        own |= {p.untyped_storage()._cdata for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda v: v):
        model(x, t, t, y)
    n, gib = sum(p.numel() for p in model.parameters()), 2**30
    activations, unit = sum(v.nbytes for v in saved.values()), sum(p.numel() for p in model.blocks[0].parameters())
    if cfg.checkpointing:
        depth, inputs = len(model.blocks), 4 * share * tokens * SIZES[cfg.size]["width"]
        activations = activations // depth + depth * inputs
    shards, images = world // cfg.replicate, cfg.steps * cfg.batch
    print(f"{cfg.name}: {cfg.size}/{cfg.patch}, {n:,} parameters in {len(list(model.parameters()))} tensors")
    epochs = f" = {images / 1_281_167:.1f} epochs of ImageNet" if cfg.classes else ""
    print(f"{cfg.steps:,} updates x {cfg.batch} = {images:,} images{epochs}")
    print(f"{world} ranks, {len(model.blocks)} block units in {shards} shards, {share} images a rank and micro-batch")
    parts = dict(weights=4 * n / shards, gradients=4 * n / shards, optimizer=8 * n / shards, average=4 * n / shards)
    parts |= {"gathered blocks": 2 * unit * (4 if cfg.precision == "fp32" else 2), "activations": activations}
    for name, size in (parts | dict(total=sum(parts.values()))).items():
        print(f"  {name:16} {size / gib:8.3f} GiB a rank")


def train(cfg: Config) -> None:
    """Train or resume; every rank of a torchrun calls it with the same configuration."""
    device = connect(cfg.device)
    try:
        run_training(cfg, device)
    finally:
        dist.destroy_process_group()


def read_texts(cfg: Config, source, device):
    """The captions of a set and the prompts of its sample grids, as `Texts`; puts both into the set's spec."""
    encode, source.spec["text"] = load_text_encoder(cfg.text_encoder, device, whole=not cfg.caption_mask)
    source.spec["text"]["captions"] = source.captions.digest()
    texts = Texts(source.captions, encode, device, CAPTION_STEP if cfg.compile else 1)
    some = np.linspace(0, texts.null - 1, min(10, texts.null)).astype(int)
    prompts = source.spec.setdefault("prompts", [source.captions[i][:1000] for i in some])
    return texts, Texts(data.Captions([[text] for text in prompts]), encode, device)


def run_training(cfg: Config, device) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    run, row = Path(cfg.runs) / cfg.name, TRANSPORTS[cfg.transport]
    if cfg.batch % (world * cfg.accumulate) or world % cfg.replicate or world * cfg.accumulate % cfg.mix:
        rule = f"--batch {cfg.batch} must divide over {world} ranks x {cfg.accumulate} micro-batches, those over"
        raise UserError(f"{rule} --mix {cfg.mix}, and {world} ranks over --replicate {cfg.replicate}")
    first_rank(lambda: (run / "checkpoints").mkdir(parents=True, exist_ok=True))
    shape = (cfg.channels, cfg.side, cfg.side)
    source = data.open_data(cfg.data, shape, cfg.classes, cfg.autoencoder, features=cfg.align > 0)
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and device.type == "cuda")
    h = difference_width(cfg, bf16)
    features = source.features.shape[1:] if cfg.align else (0, 0)
    texts = shown = None
    if hasattr(source, "captions"):
        texts, shown = read_texts(cfg, source, device)
    caption = source.spec["text"]["width"] if texts else 0
    buckets = source.spec.get("buckets", ())
    network = network_of(cfg, source.spec["shape"], len(source.spec["classes"]), features, caption, buckets)
    room = 4 * max(2, len(buckets))                     # the gradient's, the difference's, the guidance's batch; spare
    room *= -(-source.spec["text"]["length"] // CAPTION_STEP) if texts else 1
    torch._dynamo.config.recompile_limit = room
    torch._dynamo.config.accumulated_recompile_limit = max(256, room)
    record = dict(model=network, data=source.spec, train=asdict(cfg))
    model, ema, optimizer = build(cfg, network, device, bf16)
    begin = resume(run, model, ema, optimizer, record)

    stop = []                                                                   # the signals seen
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: stop.append(number))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    weights = sum(p.numel() for p in model.parameters())
    first = dict(config=asdict(cfg), begin=begin, parameters=weights, torch=torch.__version__, device=name, world=world)
    if rank == 0:
        what = f"{len(buckets)} buckets about " if buckets else ""
        what = f"{weights:,} parameters, {len(source.labels):,} pictures {what}{source.spec['shape']}, {world} x {name}"
        print(f"{run}: {what}, {'bf16' if bf16 else 'fp32'}, h = {h:g}, from update {begin}", flush=True)
        unit, epochs = cfg.batch // cfg.mix, cfg.steps * cfg.batch / len(source.labels)
        rare = [c for c in getattr(source, "counts", ()) if c * epochs < unit]
        if rare:
            what = f"{sum(rare)} pictures in {len(rare)} buckets fill no batch of {unit} in {epochs:.3g} epochs"
            print(f"{what} and are never seen; use a larger --mix or leave them out", flush=True)
    log = Log(run, cfg, row, device, begin, first)
    slots = [rank * cfg.accumulate + k for k in range(cfg.accumulate)]
    of = world * cfg.accumulate
    stream = data.batches(source, cfg.batch // of, cfg.seed, slots, of, begin, mix=cfg.mix)
    unread, stopping = None, False
    for step in range(begin, cfg.steps):
        began = time.perf_counter()
        batch = [next(stream) for _ in slots]
        waited = time.perf_counter() - began
        if texts:
            texts.fetch(torch.cat([y for _, y, *_ in batch]))
        to_device = lambda v: v.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else v.to(device)
        batch = [tuple(map(to_device, part)) for part in batch]
        norm, *seen = train_step(model, ema, optimizer, row, cfg, h, step, batch, slots, texts)
        log.add(norm, *seen, waited)

        # What all ranks must agree on: was anyone told to stop, is the gradient finite? Read one step late, so that
        # no step waits for its own result, but never written to a checkpoint unread.
        status = torch.stack([torch.tensor(float(bool(stop)), device=device), (~norm.isfinite()).float()])
        dist.all_reduce(status, dist.ReduceOp.MAX)
        unread, before = (step, seen, later(status)), unread
        stopping = before is not None and bool(check_status(*before))
        done = step + 1
        saving = stopping or done == cfg.steps or done % cfg.save_every == 0
        if saving:
            check_status(*unread)
        if saving or done % cfg.log_every == 0:
            log.flush(done)
        if saving:
            write_checkpoint(run, done, model, ema, optimizer, record)
        if done == cfg.steps or (cfg.sample_every and done % cfg.sample_every == 0):
            sample_grid(ema, row, source.spec, cfg, run / "samples" / f"step_{done:08d}.png", shown)
        if stopping:
            break
    log.bar.close()
    if rank == 0:
        said = f"all {cfg.steps} updates are done, samples in {run / 'samples'}"
        print(f"{run}: stopped after update {done}, run again to go on" if stopping else f"{run}: {said}")


def check_status(step: int, seen, read) -> float:
    """Whether a rank was told to stop by then. Raises UserError, on all ranks, if the gradient was not finite."""
    asked, bad = read()
    if bad:
        fail_nonfinite(step, seen)
    return asked


def main(argv=None):
    cfg, dry = parse_config(argv)
    dry_run(cfg, dry) if dry else train(cfg)


if __name__ == "__main__":
    data.command(main)
