"""Training: configurations, the step of the paper, sharding, checkpoints, log.

    python train.py                                              # demo on the embedded pictures
    python train.py --data FOLDER --name mine                    # one folder of pictures per class
    torchrun --nproc_per_node=16 train.py --config imagenet_xl   # again = resume
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict
)  # fmt: skip
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
from data import DataSpec, UserError, explain, flag, require
from model import SIZES, TiM, lower_precision
from sample import NO_CONDITION, Sampler, draw_grid, load, network_f, sampling_options, save
from transition import (
    KERNELS, TAUS, TRANSPORTS, TimeMixture, Transport, adaptive, cat, check_weight,
    exact_derivative, expand, finite_difference, fixed_diffusion, guided_pair, interpolate,
    resolution_shift, sample_loss, sample_times, solve, time_weight, transition_target,
)  # fmt: skip

# --- Configuration --------------------------------------------------------------------------------


# a checkpoint of a single process warns that torch.distributed is not in use
warnings.filterwarnings("ignore", "torch.distributed is disabled")
POSITIVE, NATURAL = data.positive_int, data.natural
FLOAT, NOT_NEGATIVE, SHARE = data.positive_float, data.non_negative_float, data.share


@dataclass(frozen=True)
class Config:
    """One run. Every field is a flag; the record travels in the checkpoint."""

    data: str = flag("demo", "demo, emoji, fashion, mnist, cifar10, cifar100, random, or a folder:\n"
        "latents of data.py encode, pictures in a folder per class, or pictures with captions")
    text_encoder: str = flag("bytes", "of captions: bytes, or a folder or hub name of transformers")
    autoencoder: str = flag("", "latents must be of this autoencoder: sd-vae, dc-ae, a folder")
    mirror: bool | None = flag(None, "mirror pictures at random; default: where there are classes, except\n"
        "for demo, fashion and mnist")
    channels: int = flag(0, "channels of the data; 0 = theirs", NATURAL)
    side: int = flag(0, "height and width of the data; 0 = theirs, 64 for folders", NATURAL)
    classes: int = flag(0, "number of classes; 0 = the data's", NATURAL)
    caption: int = flag(0, "width of the features of captions; 0 = the encoder's", NATURAL)
    size: str = flag("demo", "entry of model.SIZES", choices=tuple(SIZES))
    patch: int = flag(0, "side of a token in pixels or latents; 0 = it fits the data", NATURAL)
    predict: str = flag("f", "what the output is read as: the paper's f, or x", choices=("f", "x"))
    shared_time: bool = flag(False, "ablation: one time encoder for t and t - r")
    interval_attention: bool = flag(True, "attention sees t - r")
    caption_mask: bool = flag(True, "padding of captions is hidden; the released weights see it")
    rope_layout: str = flag("grid", "token positions off squares", choices=("grid", "released"))
    transport: str = flag("tim", "entry of transition.TRANSPORTS", choices=tuple(TRANSPORTS))
    share_diffusion: float = flag(0.5, "share of samples with r = t", SHARE)
    share_consistency: float = flag(0.1, "share of samples with r = t_min", SHARE)
    time_mean: float | None = flag(None, "mean of the draw of times; default the transport's", float)
    time_std: float | None = flag(None, "deviation of that draw; default the transport's", FLOAT)
    diffusion_at: str = flag("later", "of its two draws, the time of a sample with r = t",
        choices=("later", "one", "earlier"))
    shift_tokens: int = flag(0, "tokens of a picture whose times are not shifted: those of others\n"
        "are, by s = sqrt(tokens / this); 0 = no shift", NATURAL)
    derivative: str = flag("dde", "df/dt by difference or by autodiff", choices=("dde", "jvp"))
    tangent: str = flag("data", "df/dt along the path of the data's pair (x, eps), as in\n"
        "the paper, or of the pair that the network or its average sees at (t, t)",
        choices=("data", "network", "average"))
    h: float = flag(0.0, "half width of the difference; 0 = .001 in fp32, .01 in bf16", NOT_NEGATIVE)
    tau: str = flag("tan", "interval weighting: function of time", choices=tuple(TAUS))
    kernel: str = flag("sqrt", "interval weighting: of tau(t) - tau(r)", choices=tuple(KERNELS))
    weight_sigma: float = flag(1.0, "interval weighting: sigma of the kernel", NOT_NEGATIVE)
    cosine: bool = flag(True, "add 1 - cosine over channels to the loss")
    adaptive: bool = flag(True, "divide each sample's loss by itself")
    guide_gt: float = flag(1.0, "guidance in the target: weight of the data's own target")
    guide_cond: float = flag(0.0, "guidance in the target: weight of the conditional prediction")
    guide_range: tuple = flag((), "show the network its guidance, drawn between these two, or 1", FLOAT,
        nargs=2, metavar=("LOW", "HIGH"))
    guide_low: float = flag(0.0, "guidance in the target from this fraction of the times", SHARE)
    guide_high: float = flag(1.0, "guidance in the target up to this fraction", SHARE)
    align: float = flag(0.0, "weight of the loss that aligns tokens with features", NOT_NEGATIVE)
    align_depth: int = flag(8, "block that is aligned; the authors: 4 for B, 8 for XL", POSITIVE)
    drop: float = flag(0.1, "share of conditions dropped", SHARE)
    init: str = flag("", "start from the weights of this run folder, file or hub name")
    init_anyway: bool = flag(False, "allow --init from another transport or prediction")
    steps: int = flag(1000, "length of training in updates", POSITIVE)
    batch: int = flag(0, "pictures per update over all ranks; 0 = it fits the device", NATURAL)
    accumulate: int = flag(1, "micro-batches per update and rank", POSITIVE)
    lr: float = flag(2e-3, "AdamW's peak learning rate", FLOAT)
    warmup: int = flag(100, "updates of linear warm-up", NATURAL)
    decay: float = flag(0.0, "last share of the updates in which the rate falls to zero", SHARE)
    beta2: float = flag(0.95, "AdamW's second beta, below 1", SHARE)
    weight_decay: float = flag(0.01, "AdamW's weight decay", NOT_NEGATIVE)
    clip: float = flag(1.0, "largest gradient norm", FLOAT)
    ema: float = flag(0.9999, "decay of the averaged weights; (1 + n) / (10 + n) if less", SHARE)
    precision: str = flag("auto", "of attention and MLP; auto = bf16 on GPUs that have it",
        choices=("auto", "fp32", "bf16"))
    replicate: int = flag(1, "copies of the sharded network, dividing the ranks", POSITIVE)
    checkpointing: bool = flag(False, "recompute each block's activations in the backward pass")
    compile: bool = flag(False, "compile the blocks")
    device: str = flag("auto", "auto = cuda, else cpu; or cuda, mps, cpu",
        choices=("auto", "cuda", "mps", "cpu"))
    name: str = flag("", "folder under runs/; default the preset's name, or that of --data")
    runs: str = flag("runs", "folder of the run folders")
    seed: int = flag(0, "of weights, data order, noise and times", NATURAL)
    log_every: int = flag(50, "updates per log line", POSITIVE)
    save_every: int = flag(1000, "updates per checkpoint; the end has one, too", POSITIVE)
    keep: int = flag(2, "newest checkpoints to keep", POSITIVE)
    keep_every: int = flag(0, "also keep checkpoints at multiples of this; 0 = none", NATURAL)
    tensorboard: bool = flag(False, "write tensorboard events into the run folder, too")
    sample_every: int = flag(0, "updates per sample grid; 0 = at the end only", NATURAL)
    guidance: float = flag(1.0, "default guidance of sampling")
    guidance_low: float = flag(0.0, "default interval of guidance, fraction of the times", SHARE)
    guidance_high: float = flag(1.0, "default interval of guidance, fraction of the times", SHARE)
    guidance_strict: bool = flag(False, "by default sampling leaves out the ends of the interval")


GROUPS = {"data": "data", "size": "network", "transport": "objective", "init": "optimisation",
          "precision": "machine", "name": "run"}  # first field: title in --help

IMAGENET = Config(
    data="latents/imagenet256", autoencoder="sd-vae", channels=4, side=32, classes=1000, size="XL",
    patch=2, steps=750_000, batch=512, lr=2e-4, warmup=0, compile=True, log_every=100,
    save_every=5_000, keep_every=50_000, sample_every=10_000, guidance=2.5, guidance_high=0.6,
    guidance_strict=True,
)
LATENT_512 = {"data": "latents/imagenet512", "autoencoder": "dc-ae", "channels": 32, "side": 16,
              "patch": 1, "guidance": 3.0, "guidance_high": 0.7}
GUIDED = {"guide_gt": 1.0, "guide_cond": 0.75, "guide_low": 0.3, "guide_high": 0.8, "guidance": 1.0}
SMALL = Config(
    time_mean=0.0, time_std=1.6, cosine=False, predict="x", tangent="network", guide_gt=2.0,
    ema=0.998, decay=0.2, log_every=20,
)
PRESETS = {
    # fp32 on GPUs, too: a network this small is bound by launches, and bf16 has more of them
    "demo": replace(SMALL, patch=7, steps=3600, batch=64, lr=3e-3, precision="fp32"),
    "emoji": replace(
        SMALL, data="emoji", size="emoji", patch=8, steps=3500, batch=32, lr=1.5e-3,
        precision="fp32",
    ),
    # 256 tokens, 512 epochs: 1.4 hours of one H100 at 40% of its bf16 peak, computed from 4.5
    # forward passes of 17 GFLOPs a picture, not yet measured
    "cifar10": replace(
        SMALL, data="cifar10", channels=3, side=32, classes=10, size="S", patch=2, steps=100_000,
        batch=256, lr=6e-4, warmup=1000, ema=0.9999, cosine=True, guide_gt=1.0, compile=True,
        sample_every=5_000, log_every=100,
    ),
    # the authors' recipes on the paper's transport: README, "What differs"
    "imagenet_b": replace(IMAGENET, size="B", patch=4, steps=100_000, batch=1024, lr=4e-4),
    "imagenet_xl": IMAGENET,
    "imagenet_xl_512": replace(IMAGENET, **LATENT_512),
    "imagenet_xl_guided": replace(IMAGENET, **GUIDED),
    "imagenet_xl_512_guided": replace(IMAGENET, **LATENT_512 | GUIDED),
    "t2i_xl": replace(
        IMAGENET, **LATENT_512 | {"data": "latents/t2i", "guidance": 2.5, "guidance_high": 1.0},
        classes=0, text_encoder=data.GEMMA, caption=1152, time_mean=0.0, time_std=1.6,
        steps=500_000, batch=2048, accumulate=2, lr=4e-4,
    ),
}  # fmt: skip
FREE = set(  # what a resumed run may change: a data set is compared by its contents
    "data steps log_every save_every sample_every keep keep_every guidance guidance_low "
    "guidance_high guidance_strict device compile runs name tensorboard init init_anyway "
    "checkpointing replicate accumulate".split()
)


def parse_config(argv=None) -> tuple[Config, int]:
    """--config NAME picks a preset, --FIELD VALUE replaces one field; argparse refuses the rest.

    returns  the configuration, and the number of ranks of a --dry_run (0 = train).
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", choices=PRESETS, default="demo", help="preset (default demo)")
    preset = PRESETS[first.parse_known_args(argv)[0].config]
    parser = argparse.ArgumentParser(
        description=__doc__, usage="train.py [--config PRESET] [--FIELD VALUE ...]", parents=[first],
        allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="say what it would take, and stop")
    parser.add_argument("--world_size", type=POSITIVE, default=1, help="of --dry_run (default 1)")
    data.add_flags(parser, preset, GROUPS)
    given = vars(parser.parse_args(argv))
    name, dry_run, world_size = (given.pop(k) for k in ("config", "dry_run", "world_size"))
    require(dry_run or world_size == 1, "--world_size: only with --dry_run; torchrun sets it")
    if given.get("data", preset.data) != preset.data and not preset.channels:
        # not the preset's data, and the preset fixes no shape: what depends on them is found anew
        known = Path(given["data"]).expanduser().resolve().name
        name = f"{known}_{name}" if known in PRESETS else known or name
        preset = replace(preset, patch=0, batch=0, sample_every=250)
    if given.get("size", preset.size) != preset.size:
        preset = replace(preset, precision="auto")
    was, now = TRANSPORTS[preset.transport], TRANSPORTS[given.get("transport", preset.transport)]
    if now.mean is None or (now.t_min, now.t_max) != (was.t_min, was.t_max):
        preset = replace(preset, time_mean=None, time_std=None)  # the times of another range
    cfg = replace(preset, **given)
    return check(replace(cfg, name=cfg.name or name)), world_size if dry_run else 0


def check(cfg: Config) -> Config:
    """Raise UserError for values that cannot work together, before anything is built."""
    transport = TRANSPORTS[cfg.transport]
    for name, value in asdict(cfg).items():
        finite = not isinstance(value, float) or math.isfinite(value)
        require(finite, f"--{name} {value}: not a finite number")
    total = cfg.share_diffusion + cfg.share_consistency
    require(total <= 1, f"--share_diffusion plus --share_consistency is {total:g}: at most 1")
    guides = bool(cfg.guide_range) or (cfg.guide_gt, cfg.guide_cond) != (1, 0)
    require(cfg.drop or not guides, "guidance in the target needs a dropped condition: --drop 0.1")
    rule = "the guidance that is learned is --guide_gt / (1 - this); below 1"
    require(cfg.beta2 < 1, f"--beta2 {cfg.beta2:g}: below 1")
    require(cfg.guide_cond < 1, f"--guide_cond {cfg.guide_cond:g}: {rule}")
    for kind in ("guide", "guidance"):
        low, high = getattr(cfg, f"{kind}_low"), getattr(cfg, f"{kind}_high")
        require(low <= high, f"--{kind}_low {low:g}: at most --{kind}_high, which is {high:g}")
    plain = "/" not in cfg.name and not cfg.name.startswith(".")
    require(plain, f"--name {cfg.name}: one folder name, without / or a leading dot; give another --name")
    installed = not cfg.tensorboard or importlib.util.find_spec("tensorboard")
    require(installed, "--tensorboard needs the package: pip install tensorboard")
    drawn = cfg.time_mean is None and cfg.time_std is None
    rule = f"times of {cfg.transport!r} are uniform or log-uniform and have neither; leave them out"
    require(drawn or transport.mean is not None, f"--time_mean, --time_std: {rule}")
    unit = (transport.t_min, transport.t_max) == (0, 1)
    rule = f"needs times in [0, 1], not those of {cfg.transport!r}; use 0"
    require(unit or not cfg.shift_tokens, f"--shift_tokens {cfg.shift_tokens}: {rule}")
    if cfg.kernel != "constant":
        with explain(ValueError, f"--tau {cfg.tau}", "give either flag"):
            check_weight(transport, cfg.tau)
    return cfg


def half_width(cfg: Config, dtype: torch.dtype) -> float:
    """h of the finite difference: truncation wants a small one, rounding in bf16 a larger one."""
    return cfg.h or (0.01 if dtype == torch.bfloat16 else 0.001)


# --- The step -------------------------------------------------------------------------------------


def objective(f, f_ema, transport: Transport, cfg: Config, batch: data.Batch, rng):
    """The paper's algorithm on one micro-batch.

    f, f_ema  the network and its average as (x_t, t, r, y) -> f, see `sample.network_f`
    batch     x (B, C, H, W) of unit variance, y (B,) classes or numbers of captions, features
    rng       the only source of randomness; cfg.h is half the width of the difference
    returns   the loss to descend (0-d), and for the log raw loss, t, r and alignment, (B,) each
    """
    x, shape = batch.x, batch.x.shape
    dropped = torch.rand(len(x), generator=rng, device=x.device) < cfg.drop
    y = batch.y.masked_fill(dropped, NO_CONDITION)                                           # (B,)
    t, r = sample_times(transport, len(x), time_mixture(cfg, shape), rng)              # (B,), (B,)
    eps = torch.randn(shape, generator=rng, device=x.device)                         # (B, C, H, W)
    if cfg.guide_range:
        y = (y, draw_guidance(cfg, len(x), rng))
    if cfg.guide_range or (cfg.guide_gt, cfg.guide_cond) != (1, 0):
        x, eps = guide(f_ema, transport, cfg, x, eps, t, y)
    df_dt = time_derivative(f, f_ema, transport, cfg, x, eps, t, r, y)
    target = transition_target(transport, x, eps, t, r, df_dt)

    x_t, alignment = interpolate(transport, x, eps, t), torch.zeros_like(t)
    if cfg.align:
        out, tokens = f(x_t, t, r, y, aligned=True)                              # tokens (B, N, F)
        similarity = torch.cosine_similarity(tokens.float(), batch.features, dim=2)
        alignment = (1 - similarity).mean(1)                                                 # (B,)
    else:
        out = f(x_t, t, r, y)
    raw = sample_loss(out, target, cfg.cosine)                                               # (B,)
    weight = time_weight(transport, t, r, cfg.tau, cfg.kernel, cfg.weight_sigma)
    loss = weight * (adaptive(raw) if cfg.adaptive else raw) + cfg.align * alignment
    return loss.mean(), raw.detach(), t, r, alignment.detach()


def draw_guidance(cfg: Config, n: int, rng) -> torch.Tensor:
    """w (n,): log-uniform over cfg.guide_range, a tenth of them 1."""
    low, high = cfg.guide_range
    u, one = torch.rand(2, n, generator=rng, device=rng.device)
    return torch.where(one < 0.1, torch.ones_like(u), low * (high / low) ** u)


def time_mixture(cfg: Config, shape) -> TimeMixture:
    """Of pictures (B, C, H, W): the shift of times is by their number of tokens."""
    shift = resolution_shift(shape[2] * shape[3] // cfg.patch**2, cfg.shift_tokens)
    shares = cfg.share_diffusion, cfg.share_consistency
    return TimeMixture(*shares, cfg.time_mean, cfg.time_std, cfg.diffusion_at, shift)


def time_derivative(f, f_ema, transport: Transport, cfg: Config, x, eps, t, r, y):
    """df/dt (B, C, H, W) where r < t, and zero for the first samples, with r = t, that need none.

    Along the path of (x, eps) or, for cfg.tangent "network" or "average", of the pair that the
    network or its average sees behind x_t. The target is linear in df/dt, so where that pair is the
    conditional mean, the expectation of the target given x_t is the same (arXiv 2512.02012).
    """
    df_dt = torch.zeros_like(x)
    moving = slice(fixed_diffusion(len(x), cfg.share_diffusion), None)  # see `sample_times`
    x, eps, t, r = (v[moving] for v in (x, eps, t, r))
    y = tuple(v[moving] for v in y) if isinstance(y, tuple) else y[moving]
    if not len(x):
        return df_dt
    if cfg.tangent != "data":
        with torch.no_grad():
            x_t, own = interpolate(transport, x, eps, t), f if cfg.tangent == "network" else f_ema
            x, eps = solve(transport, x_t, own(x_t, t, t, y), t)
    if cfg.derivative == "jvp":
        df_dt[moving] = exact_derivative(f, transport, x, eps, t, r, y)
    else:
        df_dt[moving] = finite_difference(f, transport, x, eps, t, r, y, cfg.h)
    return df_dt


@torch.no_grad()
def guide(f_ema, transport: Transport, cfg: Config, x, eps, t, y):
    """(x, eps) of a guided residual, where t is in cfg's range and the condition not dropped."""
    w_gt, number = cfg.guide_gt, y
    if cfg.guide_range:
        number, w = y
        w_gt = expand(w * (1 - cfg.guide_cond), x)
    null = torch.full_like(number, NO_CONDITION)
    null = (null, w) if cfg.guide_range else null
    x_t, f_cond = interpolate(transport, x, eps, t), None
    if cfg.guide_cond:
        s = cat(t, t)
        f_cond, f_null = f_ema(cat(x_t, x_t), s, s, cat(y, null)).chunk(2)
    else:
        f_null = f_ema(x_t, t, t, null)
    pair = guided_pair(transport, x, eps, t, f_cond, f_null, w_gt, cfg.guide_cond)
    fraction = (t - transport.t_min) / (transport.t_max - transport.t_min)
    use = (number != NO_CONDITION) & (cfg.guide_low <= fraction) & (fraction <= cfg.guide_high)
    return tuple(torch.where(expand(use, x), new, old) for new, old in zip(pair, (x, eps)))


class Networks(NamedTuple):
    model: torch.nn.Module
    ema: torch.nn.Module
    optimizer: torch.optim.Optimizer


def train_step(networks: Networks, transport, cfg: Config, step: int, batches, texts=None):
    """One update, without a host sync. batches: a data.Batch per micro-batch of this rank.

    All draws are a function of (seed, step, slot), slot = rank * accumulate + k: two ranks of one
    slot and one rank of two draw the same. Returns the gradient norm (0-d), and of this rank's pictures
    raw loss, t, r and alignment.
    """
    model, ema, optimizer = networks
    f, f_ema = network_f(model, transport, texts), network_f(ema, transport, texts)
    seen = []
    for k, batch in enumerate(batches):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(k + 1 == len(batches))
            model.set_reshard_after_backward(k + 1 == len(batches))
        slot = data.ranks()[0] * len(batches) + k
        rng = data.rng(cfg.seed, step, slot, 1, device=batch.x.device)  # 1: not a key of sampling
        loss, *parts = objective(f, f_ema, transport, cfg, batch, rng)
        (loss / len(batches)).backward()
        seen.append(parts)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(cfg, step)
    optimizer.step()
    optimizer.zero_grad()
    update_average(ema, model, min(cfg.ema, (1 + step) / (10 + step)))
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm, [torch.cat(parts) for parts in zip(*seen)]


def learning_rate(cfg: Config, step: int) -> float:
    """Linear warm-up, constant, and, if cfg.decay, a linear fall to zero over that last share."""
    fall = (cfg.steps - step) / (cfg.decay * cfg.steps) if cfg.decay else 1.0
    return cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup), fall)


def local(p: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return p.to_local() if isinstance(p, DTensor) else p


@torch.no_grad()
def update_average(ema, model, decay: float) -> None:
    averaged, live = ([local(p) for p in m.parameters()] for m in (ema, model))
    torch._foreach_lerp_(averaged, live, 1 - decay)


# --- Many ranks. A process alone has no group: no collective ever runs there ----------------------


def connect(device: torch.device) -> None:
    """Join the ranks that torchrun started, if it did."""
    torch._dynamo.config.suppress_errors = device.type == "cpu"  # no C++ compiler: run uncompiled
    torch._dynamo.config.recompile_limit = 512  # one a shape: buckets, captions, batches
    torch._dynamo.config.accumulated_recompile_limit = 512
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)


def wrap(model, mesh, cfg: Config, dtype: torch.dtype):
    """Checkpointed and compiled blocks, as cfg has it, and with a mesh FSDP2, a unit per block: fp32
    master weights and reduction, attention and MLP in `dtype`.

    adaLN is a unit of its own and stays fp32; inputs are never cast: bf16 would make t +- h noise.
    An update runs the network two to four times: what trains is gathered once for all of them and
    resharded by its backward pass; the average has none and is resharded at once.
    """
    trains = model.x_embedder.proj.weight.requires_grad  # the average does not
    keep = {"reshard_after_forward": not trains}
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    low = replace(whole, param_dtype=torch.bfloat16) if dtype == torch.bfloat16 else whole
    for block in model.blocks:
        if cfg.checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if cfg.compile:
            block.compile(dynamic=False)  # each shape of a native set is compiled as it is
        if mesh is not None:
            fully_shard(block.adaLN_modulation, mesh=mesh, mp_policy=whole, **keep)
            fully_shard(block, mesh=mesh, mp_policy=low, **keep)
    if mesh is None:
        return model
    return fully_shard(model, mesh=mesh, mp_policy=whole, **keep)


def first_rank(action, *args) -> None:
    """Run action(*args) on rank 0 while the others wait; an error is raised on all: none hangs."""
    problem = None
    if data.ranks()[0] == 0:
        try:
            action(*args)
        except Exception as error:
            problem = error
    said = [problem and str(problem)]
    if dist.is_initialized():
        dist.broadcast_object_list(said)
    if problem and not isinstance(problem, (OSError, UserError)):
        raise problem  # a fault of the code, with its traceback
    require(said[0] is None, said[0])


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def read_later(tensor: torch.Tensor):
    """A function that gives the tensor's values and waits for no work that is queued after now."""
    if tensor.device.type != "cuda":
        return tensor.tolist
    host, event = torch.empty_like(tensor, device="cpu", pin_memory=True), torch.cuda.Event()
    host.copy_(tensor, non_blocking=True)
    event.record()

    def read():
        event.synchronize()
        return host.tolist()

    return read


# --- Checkpoints ----------------------------------------------------------------------------------


def training_state(networks: Networks) -> dict:
    model, optimizer = get_state_dict(networks.model, networks.optimizer)
    return {"model": model, "optimizer": optimizer, "ema": get_model_state_dict(networks.ema)}


def checkpoints(run: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted((run / "checkpoints").glob("step_" + 8 * "[0-9]"))


def write_checkpoint(run: Path, step: int, networks: Networks, record: dict) -> None:
    """Write aside, rename when complete, then remove old ones: a complete one is always there."""
    final = run / "checkpoints" / f"step_{step:08d}"
    aside, record = final.with_suffix(".tmp"), record | {"step": step}
    first_rank(lambda: shutil.rmtree(aside, ignore_errors=True))
    way = "older ones are whole; free the disk and run again"
    with explain((CheckpointException, OSError), f"{aside} not written", way):
        alone = not dist.is_initialized()
        dcp.save(training_state(networks), checkpoint_id=aside, no_dist=alone)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(networks.ema, options=options)

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


def resume(run: Path, networks: Networks, record: dict) -> int:
    """Load the newest complete checkpoint, if any; returns the number of updates done.

    raises UserError if it was made with other settings, by name: only those in FREE may differ.
    """
    found = checkpoints(run)
    if not found:
        return 0
    old = data.read_json(found[-1] / "config.json")
    old["train"] = asdict(Config()) | old["train"]  # settings younger than the run
    for part, free in (("train", FREE), ("model", set()), ("data", {"mean", "std"})):
        compared = sorted(record[part].keys() & old[part].keys() - free)
        for name in sorted(compared, key=lambda name: name != "precision"):  # h follows from it
            was, now = old[part][name], json.loads(json.dumps(record[part][name]))
            rule = f"{found[-1]} was trained with {part} {name} = {str(was)[:200]}"
            require(was == now, f"{rule}, not {str(now)[:200]}; set it back or use a new --name")
    same = old.get("fingerprint", record["fingerprint"]) == record["fingerprint"]
    for name in ("mean", "std"):  # of files, which the fingerprint knows by name
        same = same and math.isclose(old["data"][name], record["data"][name], rel_tol=0.01)
    rule = "was trained on other pictures or captions than --data has now"
    require(same, f"{found[-1]} {rule}; use those or a new --name")
    state = training_state(networks)  # to be filled in place
    way = "remove it to go on from the one before"
    with explain((CheckpointException, OSError), f"{found[-1]} cannot be read", way):
        dcp.load(state, checkpoint_id=found[-1], no_dist=not dist.is_initialized())
    parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    set_state_dict(networks.model, networks.optimizer, **parts)
    set_model_state_dict(networks.ema, state["ema"])
    if record["train"]["decay"] and record["train"]["steps"] != old["train"]["steps"]:
        end = f"was to end at update {old['train']['steps']}; its rate fell towards that end"
        data.say(f"note: {found[-1]} {end}", sys.stderr)
    return old["step"]


# --------------------------------------------------------------------------------------------------
# The log: log.jsonl, a line of averages every cfg.log_every updates (README, "Seeing the run")

EDGES = (0.0, 0.25, 0.5, 0.75)  # bins of (t - r) over the transport's range: r = t, four quarters
BINS = ("loss_equal", "loss_25", "loss_50", "loss_75", "loss_100")


class Log:
    """Sums on the device since the last line; every rank adds, rank 0 writes."""

    def __init__(self, run: Path, cfg: Config, device, begin: int, about: dict):
        self.cfg, transport = cfg, TRANSPORTS[cfg.transport]
        self.span = transport.t_max - transport.t_min
        self.edges = torch.tensor(EDGES, device=device)
        self.first, self.board = data.ranks()[0] == 0, None
        self.terminal = self.first and sys.stderr.isatty()
        self.bar = tqdm(total=cfg.steps, initial=begin, disable=not self.terminal)
        if self.first:
            self.file = (run / "log.jsonl").open("a")
            self.write(about)
            if cfg.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(run)
        self.clear()

    def clear(self):
        self.sums = torch.zeros(3, len(BINS), device=self.edges.device)  # loss, count, alignment
        self.norm, self.steps, self.waited, self.began = 0.0, 0, 0.0, time.perf_counter()

    def write(self, line: dict):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def add(self, norm, loss, t, r, alignment, waited: float):
        length = torch.bucketize((t - r) / self.span, self.edges)
        self.sums.index_add_(1, length, torch.stack([loss, torch.ones_like(loss), alignment]))
        self.norm, self.steps, self.waited = self.norm + norm, self.steps + 1, self.waited + waited
        self.bar.update()

    def flush(self, step: int):
        """Averages over all ranks since the last line; every rank must call it."""
        loss, count, alignment = sum_over_ranks(self.sums).tolist()
        spent = time.perf_counter() - self.began
        line = {"step": step, "loss": sum(loss) / sum(count)}
        line["grad_norm"] = float(self.norm) / self.steps
        line |= {name: a / b for name, a, b in zip(BINS, loss, count) if b}
        line |= {"images_per_s": sum(count) / spent, "waiting": self.waited / spent}
        line["lr"] = learning_rate(self.cfg, step - 1)
        if self.cfg.align:
            line["alignment"] = sum(alignment) / sum(count)
        if self.edges.is_cuda:
            line["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        left = spent / self.steps * (self.cfg.steps - step)
        self.clear()
        if not self.first:
            return
        self.write(line)
        shown = f"loss {line['loss']:.4f} (r = t {line.get('loss_equal', math.nan):.4f})"
        shown += f"  {line['images_per_s']:.0f} img/s"
        self.bar.set_postfix_str(shown)
        if not self.terminal:
            print(f"step {step} of {self.cfg.steps}  {shown}  {left:.0f} s left", flush=True)
        if self.board:
            for name, value in line.items():
                self.board.add_scalar(name, value, step)


def draw_curve(run: Path) -> None:
    """runs/NAME/curve.png: the loss by length of the interval, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = {}  # by step, as updates that were lost in a crash were made again
    for text in (run / "log.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):  # a line that a crash cut short
            line = json.loads(text)
            lines[line.get("step", 0)] = line
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in BINS:
        points = [(step, line[name]) for step, line in sorted(lines.items()) if name in line]
        axes.plot(*zip(*points or [(1, math.nan)]), label=name.replace("loss_equal", "r = t"))
    axes.set(xlabel="updates", ylabel="raw loss", yscale="log", title="by t - r, % of the range")
    axes.legend()
    figure.savefig(run / "curve.png", dpi=120)


def fail_nonfinite(step: int, seen) -> None:
    """The gradient was not finite, as every rank knows: say where, on all of them."""
    (rank, world_size), bad = data.ranks(), []
    for loss, t, r in zip(*(values.tolist() for values in seen[:3])):
        if not math.isfinite(loss):
            bad.append(f"rank {rank}: l = {loss:g}, t = {t:g}, r = {r:g}")
    parts = [bad] * world_size
    if dist.is_initialized():
        dist.all_gather_object(parts, bad)
    where = [line for part in parts for line in part] or [f"finite losses, t <= {seen[1].max():g}"]
    raise UserError(
        f"step {step}: the gradient is not finite ({'; '.join(where[:4])}). Nothing of it was saved, "
        "the last checkpoint is good. Try a lower --lr or --precision fp32, and look at the data"
    )


# --- Set-up ---------------------------------------------------------------------------------------


def fill_in(cfg: Config, spec: DataSpec, device: torch.device, world_size=1) -> Config:
    """Fill in what was left to the data and the device: patch and batch, each 0.

    Patch: the smallest that divides the sides and leaves at most 4 x 4 tokens up to 32 pixels,
    8 x 8 beyond, 16 x 16 of latents. Batch: 256 pictures on a GPU; on a CPU 64 of few tokens, else 32.
    """
    height, width = spec.shape[1:]
    sides = [height, width, *np.ravel(spec.buckets).astype(int).tolist()]
    most = 4 if height <= 32 else 8
    if spec.kind == "latents":
        most = 16
    fits = [p for p in range(1, height + 1) if all(side % p == 0 for side in sides)]
    patch = cfg.patch or next(p for p in fits if height // p <= most or p == fits[-1])
    rule = f"{height}x{width} must be a multiple of it; one of {', '.join(map(str, fits))} fits"
    require(patch in fits, f"--patch {patch}: {rule}")
    tokens = (height // patch) * (width // patch)
    batch = cfg.batch
    if not batch:
        one_rank = 256 if device.type == "cuda" else 64 if tokens <= 16 else 32
        batch = one_rank * world_size
    if (patch, batch) != (cfg.patch, cfg.batch):
        found = f"{height}x{width} pictures, --patch {patch} = {tokens} tokens, --batch {batch}"
        data.say(f"chosen for these data on {device.type}: {found}")
    return replace(cfg, patch=patch, batch=batch)


def network_arguments(cfg: Config, spec: DataSpec, features=None) -> dict:
    """Arguments of TiM for data of this spec; features (N, F) of a picture are aligned with."""
    caption = spec.text["width"] if spec.text else 0
    rule = "give a set with one folder per class, or pictures with captions"
    require(spec.classes or caption, f"--data {cfg.data} has neither classes nor captions; {rule}")
    rule = f"the text encoder {cfg.text_encoder} gives {caption}; change either"
    require(cfg.caption in (0, caption), f"--caption {cfg.caption}: {rule}")
    network = {"channels": spec.shape[0], "patch": cfg.patch, **SIZES[cfg.size]}
    network |= {"caption": caption} if caption else {"classes": len(spec.classes)}
    for name in ("predict", "shared_time", "interval_attention", "rope_layout"):
        network[name] = getattr(cfg, name)
    if cfg.guide_range:
        network["guide_range"] = list(cfg.guide_range)
    if caption:
        network["caption_mask"] = cfg.caption_mask
    if cfg.align:
        tokens = spec.shape[1] * spec.shape[2] // cfg.patch**2
        depth, rule = SIZES[cfg.size]["depth"], "encode them with another --grid, or --align_depth"
        fits = features and features[0] == tokens and cfg.align_depth <= depth
        require(fits, f"--align: features {features} for {tokens} tokens, {depth} blocks; {rule}")
        network["projector"] = [cfg.align_depth, 2048, features[1]]
    return network


def build(cfg: Config, network: dict, device: torch.device, dtype: torch.dtype) -> Networks:
    """The network, its average and the optimizer, sharded over all ranks.

    A rank alone has nothing to shard and runs without FSDP, whose copies and hooks cost more than
    an update on one GPU; the fp32 master weights of bf16 are then cast at every pass.
    """
    torch.manual_seed(cfg.seed)  # every rank the same weights
    model, ema = TiM(**network), TiM(**network).requires_grad_(False)
    if cfg.init:
        start_from(model, cfg)
    ema.load_state_dict(model.state_dict())
    mesh, world_size = None, data.ranks()[1]
    if world_size > 1:  # FSDP moves what it shards to the device
        shape, names = (world_size,), None
        if cfg.replicate > 1:
            shape, names = (cfg.replicate, world_size // cfg.replicate), ("replicate", "shard")
        mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=names)
    else:
        for part in (model.to(device), ema.to(device)):
            if dtype == torch.bfloat16:
                lower_precision(part, masters=True)
    model, ema = wrap(model, mesh, cfg, dtype), wrap(ema, mesh, cfg, dtype)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), eps=1e-6,
        weight_decay=cfg.weight_decay, fused=device.type != "mps",
    )  # fmt: skip
    return Networks(model, ema, optimizer)


def start_from(model: TiM, cfg: Config) -> None:
    """--init: weights of a run, a file or the hub. With another number of classes the class rows
    start fresh, but for the row of no class; all else must fit, transport and prediction too."""
    old, transport, _ = load(cfg.init)
    for name, was in (("transport", transport.name), ("predict", old.predict)):
        now = getattr(cfg, name)
        way = f"give --{name} {was}, or --init_anyway to train them onto {now}"
        fits = was == now or cfg.init_anyway
        require(fits, f"--init {cfg.init}: was trained with {name} {was}; {way}")
    for name in ("caption_mask", "rope_layout") if old.classes is None else ():
        was = getattr(old, name)
        way = "--no-caption_mask" if was is False else f"--{name} {was}"
        fits = was == getattr(model, name)
        require(fits, f"--init {cfg.init}: was trained with {name} {was}; give {way}")
    state, fresh = old.state_dict(), model.state_dict()
    table = "y_embedder.embedding_table.weight"
    if table in state and table in fresh and len(state[table]) != len(fresh[table]):
        state[table] = torch.cat([fresh[table][:-1], state[table][-1:]])
    state |= {k: v for k, v in fresh.items() if k.startswith("projector.")}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        way = "give the --size, --patch and kind of data that it was trained with"
        why = " ".join(str(error).split())[:300]
        raise UserError(f"--init {cfg.init} does not fit the network ({why}); {way}") from error


def dry_run(cfg: Config, world_size: int) -> None:
    """Print what a run would be and take, from the shapes of network and pictures alone."""
    if cfg.data in ("demo", "emoji"):  # they are in the repository
        spec = data.open_data(cfg.data).spec
        caption = 0 if spec.classes else data.BYTES["width"]
        known = {"channels": spec.shape[0], "side": spec.shape[1], "classes": len(spec.classes)}
        cfg = replace(cfg, caption=caption, **known)
    known = cfg.channels and cfg.side and (cfg.classes or cfg.caption)
    rule = "give --channels, --side, and --classes or --caption"
    require(known, f"--dry_run does not open --data {cfg.data}: {rule}")
    text = {"width": cfg.caption} if cfg.caption else None
    shape, classes = (cfg.channels, cfg.side, cfg.side), tuple(map(str, range(cfg.classes)))
    spec = DataSpec("latents" if cfg.autoencoder else "pixels", shape, classes=classes, text=text)
    cfg = fill_in(cfg, spec, torch.device("cuda"), world_size)
    check_divides(cfg, world_size)
    share, tokens = cfg.batch // (world_size * cfg.accumulate), (cfg.side // cfg.patch) ** 2
    with torch.device("meta"):
        model = TiM(**network_arguments(replace(cfg, align=0.0), spec))
        x, t, y = torch.empty(share, *shape), torch.empty(share), torch.empty(share).long()
        y = torch.empty(share, 256, cfg.caption) if cfg.caption else y  # captions of full length
    if cfg.precision != "fp32":
        lower_precision(model)
    own, saved = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def count(v):  # flash attention keeps no N x N matrix, which the meta device does
        scores = v.shape[-2:] == (tokens, tokens) and tokens != model.head
        if v.untyped_storage()._cdata not in own and not scores:
            saved[v.untyped_storage()._cdata] = v.untyped_storage().nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(count, lambda v: v):
        model(x, t, t, y)
    n = sum(p.numel() for p in model.parameters())
    activations, depth = sum(saved.values()), len(model.blocks)
    if cfg.checkpointing:  # of one block, and the inputs of all
        activations = activations // depth + 4 * depth * share * tokens * SIZES[cfg.size]["width"]
    shards, images = world_size // cfg.replicate, cfg.steps * cfg.batch
    tensors = len(list(model.parameters()))
    print(f"{cfg.name}: {cfg.size}/{cfg.patch}, {n:,} parameters in {tensors} tensors")
    epochs = f" = {images / 1_281_167:.1f} epochs of ImageNet" if cfg.classes == 1000 else ""
    print(f"{cfg.steps:,} updates x {cfg.batch} = {images:,} images{epochs}")
    print(f"{world_size} ranks, {depth} blocks in {shards} shards, {share} images a micro-batch")
    alone = world_size == 1  # then only what is cast to bf16 is there twice
    gathered = sum(p.nbytes for p in model.parameters() if not alone or p.dtype == torch.bfloat16)
    gradients = 4 * n / (shards if cfg.accumulate == 1 else 1)  # whole until they are summed
    sizes = {"weights": 4 * n / shards, "gradients": gradients, "optimizer": 8 * n / shards,
             "average": 4 * n / shards, "gathered": gathered, "activations": activations}
    for name, size in (sizes | {"total": sum(sizes.values())}).items():
        print(f"  {name:16} {size / 2**30:8.3f} GiB a rank")


def check_divides(cfg: Config, world_size: int) -> None:
    """Raise UserError unless the batch and the copies divide over the ranks."""
    parts = world_size * cfg.accumulate
    rule = f"must be a multiple of {world_size} ranks x {cfg.accumulate} micro-batches"
    larger = cfg.batch // parts * parts + parts
    require(cfg.batch % parts == 0, f"--batch {cfg.batch}: {rule}; {larger} is")
    divides = world_size % cfg.replicate == 0
    require(divides, f"--replicate {cfg.replicate}: must divide the number of ranks, {world_size}")


# --- The run --------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the loop needs, made by `set_up`."""

    folder: Path
    cfg: Config  # with nothing left open
    transport: Transport
    networks: Networks
    dataset: object  # see data.open_data
    texts: data.Texts | None  # of the set's captions
    sampler: Sampler  # draws the grids with the averaged weights
    record: dict  # what a checkpoint remembers
    device: torch.device
    begin: int


def set_up(cfg: Config, device: torch.device, dtype: torch.dtype) -> Run:
    """Data, network and the newest checkpoint. Nothing is written before all of it fits."""
    world_size = data.ranks()[1]
    folder, transport = Path(cfg.runs) / cfg.name, TRANSPORTS[cfg.transport]
    if cfg.data == "random":
        dataset = data.random_data((cfg.channels, cfg.side, cfg.side), cfg.classes)
    else:
        source = Path(cfg.data).expanduser()
        own = cfg.data not in ("", *data.NAMED) and not (source / "meta.json").is_file()
        inside = own and source.resolve() in folder.resolve().parents
        require(not inside, f"--runs {cfg.runs}: lies in --data {cfg.data}; give another --runs")
        if cfg.data in data.TORCHVISION:  # rank 0 may have to download it
            first_rank(data.open_data, cfg.data)
        dataset = data.open_data(cfg.data, cfg.side, cfg.align > 0, cfg.mirror)
        data.check_fits(dataset.spec, cfg.channels, cfg.side, cfg.classes, cfg.autoencoder)
    spec = dataset.spec
    cfg = fill_in(cfg, spec, device, world_size)
    check_divides(cfg, world_size)
    texts = grid_texts = None
    if dataset.captions is not None:
        padded = not cfg.caption_mask
        encoder = data.load_text_encoder(cfg.text_encoder, device, pad_to_length=padded)
        texts = data.Texts(dataset.captions, encoder, device, 64 if cfg.compile else 1)
        some = np.linspace(0, texts.null - 1, min(10, texts.null)).astype(int)
        prompts = spec.prompts or tuple(dataset.captions[i][:1000] for i in some)
        text = encoder.spec | {"captions": dataset.captions.digest()}
        spec = replace(spec, text=text, prompts=prompts)
        grid_texts = data.Texts(data.Captions([[prompt] for prompt in prompts]), encoder, device)
    network = network_arguments(cfg, spec, dataset.features_shape)
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    cfg = replace(cfg, h=half_width(cfg, dtype), precision=precision)
    record = {"model": network, "data": spec.to_json(), "train": asdict(cfg)}
    record["fingerprint"] = dataset.fingerprint()
    init = "" if checkpoints(folder) else cfg.init  # resuming overwrites the weights
    networks = build(replace(cfg, init=init), network, device, dtype)
    begin = resume(folder, networks, record)
    try:
        decoder = data.Decoder(spec, device)
    except UserError as error:  # a run must not end because its pictures cannot be decoded
        data.say(f"sample grids show latent channels: {error}")
        decoder = data.Decoder(replace(spec, kind="random"), device)
    options = sampling_options(record)
    sampler = Sampler(
        networks.ema, transport, config=record, spec=spec, decode=decoder, texts=grid_texts,
        options=options, record={},
    )  # fmt: skip
    first_rank(lambda: (folder / "checkpoints").mkdir(parents=True, exist_ok=True))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    weights = sum(p.numel() for p in networks.model.parameters())
    data.say(f"{folder}: {dataset.describe()}")
    what = f"{weights:,} parameters, {world_size} x {name}, {str(dtype)[6:]}, h = {cfg.h:g}"
    data.say(f"{folder}: {what}, from update {begin}")
    return Run(folder, cfg, transport, networks, dataset, texts, sampler, record, device, begin)


def loop(run: Run, stop: list) -> tuple[int, bool]:
    """Updates until all are done or a signal is in `stop`; returns how many, and if it stopped."""
    cfg, (rank, world_size) = run.cfg, data.ranks()
    about = {"config": asdict(cfg), "begin": run.begin, "torch": torch.__version__}
    about["world_size"] = world_size
    log = Log(run.folder, cfg, run.device, run.begin, about)
    slots = [rank * cfg.accumulate + k for k in range(cfg.accumulate)]
    of = world_size * cfg.accumulate
    stream = data.batches(run.dataset, cfg.batch // of, cfg.seed, slots, of, run.begin, cfg.patch)
    unread, stopping, done = None, False, run.begin
    while done < cfg.steps and not stopping:
        began = time.perf_counter()
        batches = [next(stream) for _ in slots]
        if run.texts:
            run.texts.fetch(torch.cat([batch.y for batch in batches]))
        waited = time.perf_counter() - began
        batches = [batch.to(run.device) for batch in batches]
        norm, seen = train_step(run.networks, run.transport, cfg, done, batches, run.texts)
        log.add(norm, *seen, waited)

        # What all ranks must agree on: was anyone told to stop, is the gradient finite? Read one
        # step late, so that no step waits for its own result; a checkpoint is never written unread.
        told = torch.full_like(norm, float(bool(stop)))
        status = sum_over_ranks(torch.stack([told, (~norm.isfinite()).to(norm)]))
        stopping = unread is not None and check_status(*unread)
        unread = done, seen, read_later(status)
        done += 1
        saving = stopping or done == cfg.steps or done % cfg.save_every == 0
        if saving:
            check_status(*unread)  # for its error alone: a stop is acted on one update later
        if saving or done % cfg.log_every == 0:
            log.flush(done)
        began = time.perf_counter()
        if saving:
            write_checkpoint(run.folder, done, run.networks, run.record)
        if done == cfg.steps or (cfg.sample_every and done % cfg.sample_every == 0):
            sample_grid(run, done)
        log.began += time.perf_counter() - began  # the rate is that of updates
    log.bar.close()
    return done, stopping


def check_status(step: int, seen, read) -> bool:
    """Whether a rank was told to stop by then. UserError, on all, for a non-finite gradient."""
    told, bad = read()
    if bad:
        fail_nonfinite(step, seen)
    return told > 0


def sample_grid(run: Run, step: int) -> None:
    """A row per number of steps, a column per class or prompt; every rank joins, rank 0 writes."""
    known = run.sampler.texts.null if run.sampler.texts else len(run.sampler.spec.classes)
    columns = list(range(min(10, known)))
    path = run.folder / "samples" / f"step_{step:08d}.png"
    with torch.compiler.set_stance("force_eager"):  # no compiling for a picture's batch
        draw_grid(run.sampler, columns, [1, 2, 4, 8, 32], run.cfg.seed, path)


def train(cfg: Config) -> None:
    """Train or resume; every rank of a torchrun calls it with the same configuration."""
    device = data.open_device(cfg.device)
    dtype = data.pick_dtype(device, cfg.precision)
    connect(device)
    stop = []  # the signals seen

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        with contextlib.suppress(OSError):  # nobody may be listening any more
            os.write(2, b"\nstopping after this update, then saving; again = end at once\n")

    try:
        run = set_up(cfg, device, dtype)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)
        done, stopped = loop(run, stop)
        if run.begin >= cfg.steps:
            data.say(f"{run.folder}: already at update {run.begin}; raise --steps to go on")
        elif stopped and done < cfg.steps:
            data.say(f"{run.folder}: stopped after update {done}, run again to go on")
            if signal.SIGINT in stop:
                raise KeyboardInterrupt  # status 130, so that `train.py && ...` does not go on
        else:
            if data.ranks()[0] == 0:
                draw_curve(run.folder)
            samples = run.folder / "samples"
            data.say(f"{run.folder}: all {done} updates are done, samples in {samples}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv=None):
    cfg, world_size = parse_config(argv)
    if world_size:
        dry_run(cfg, world_size)
    else:
        train(cfg)


if __name__ == "__main__":
    data.command(main)
