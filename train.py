"""Training: configurations, the step of the paper, sharding, checkpoints, log, and the run itself.

    python train.py                                              # demo on the embedded pictures
    python train.py --data FOLDER --name mine                    # one folder of pictures per class
    torchrun --nproc_per_node=16 train.py --config imagenet_xl   # again = resume
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import data  # first: it says so where the packages are missing

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
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import Spec, UserError, explain, finite, flag, natural, non_negative_float, positive_float
from data import positive_int, require, share
from model import SIZES, TiM, lower_precision
from sample import Sampler, check_guidance, draw_grid, load, sampling_options, save
from transition import (
    KERNELS, TAUS, TRANSPORTS, Transport, adaptive, cat, check_weight, choose, each,
    exact_derivative, finite_difference, guided_pair, interpolate, network_f, resolution_shift,
    sample_loss, sample_times, solve, time_weight, transition_target,
)  # fmt: skip

# --- Configuration --------------------------------------------------------------------------------

# a checkpoint of a single process warns that torch.distributed is not in use
warnings.filterwarnings("ignore", "torch.distributed is disabled")


@dataclass(frozen=True)
class Config:
    """One run. Every field is a flag; the record travels in the checkpoint. "auto", 0 or nothing:
    `resolve` fills it in, and prints what it chose. The defaults are the paper's objective on the demo's
    data, no preset: from Python, `main([...])`, or `train(replace(PRESETS["demo"], name="mine"))`."""

    data: str = flag("demo", "demo, emoji, fashion, mnist, cifar10, cifar100, random, or a folder:\n"
        "a set of data.py prepare, pictures in a folder per class, or pictures with captions")
    text_encoder: str = flag("word_hashes", "of captions: word_hashes, or of transformers, a folder "
        "or hub name")
    autoencoder: str = flag("", "latents must be of this autoencoder: sd-vae, dc-ae, a folder")
    mirror: bool | None = flag(None, "mirror pictures at random; default: where there are classes, except\n"
        "for demo, fashion and mnist")
    channels: int = flag(0, "channels of the data; 0 = theirs", natural)
    side: int = flag(0, "height and width of the data; 0 = theirs, 64 for folders", natural)
    classes: int = flag(0, "number of classes; 0 = the data's", natural)
    caption: int = flag(0, "width of the features of captions; 0 = the encoder's", natural)
    size: str = flag("demo", "entry of model.SIZES", choices=tuple(SIZES))
    patch: int = flag(0, "side of a token in pixels or latents; 0 = it fits the data", natural)
    predict: str = flag("f", "what the output is read as: the paper's f, or x", choices=("f", "x"))
    shared_time: bool = flag(False, "ablation: one time encoder for t and t - r")
    interval_attention: bool = flag(True, "attention sees t - r")
    caption_mask: bool = flag(True, "padding of captions is hidden; the released weights see it")
    rope_layout: str = flag("grid", "token positions off squares", choices=("grid", "released"))
    transport: str = flag("tim", "entry of transition.TRANSPORTS", choices=tuple(TRANSPORTS))
    share_diffusion: float = flag(0.5, "share of samples with r = t", share)
    share_consistency: float = flag(0.1, "share of samples with r = t_min", share)
    time_mean: float | None = flag(None, "mean of the draw of times; default the transport's", finite)
    time_std: float | None = flag(None, "deviation of that draw; default the transport's", positive_float)
    diffusion_at: str = flag("later", "of its two draws, the time of a sample with r = t",
        choices=("later", "one", "earlier"))
    shift_tokens: int = flag(0, "tokens of a picture whose times are not shifted: those of others\n"
        "are, by s = sqrt(tokens / this); 0 = no shift", natural)
    derivative: str = flag("dde", "df/dt by difference or by autodiff", choices=("dde", "jvp"))
    tangent: str = flag("data", "df/dt along the path of the data's pair (x, eps), as in\n"
        "the paper, or of the pair that the network or its average sees at (t, t)",
        choices=("data", "network", "average"))
    h: float = flag(0.0, "half width of the difference; 0 = as measured for the transport", non_negative_float)
    tau: str = flag("tan", "interval weighting: function of time", choices=tuple(TAUS))
    kernel: str = flag("sqrt", "interval weighting: of tau(t) - tau(r)", choices=tuple(KERNELS))
    weight_sigma: float = flag(1.0, "interval weighting: sigma of the kernel", non_negative_float)
    cosine: bool = flag(True, "add 1 - cosine over channels to the loss")
    adaptive: bool = flag(True, "divide each sample's loss by itself")
    guide_gt: float = flag(1.0, "guidance in the target: weight of the data's own target",
        finite)
    guide_cond: float = flag(0.0, "guidance in the target: weight of the conditional prediction",
        finite)
    guide_range: tuple = flag((), "guidance as a condition: drawn between LOW and HIGH, or 1, for\n"
        "each sample, in the target and shown to the network, in place of --guide_gt; without\n"
        "numbers: none", positive_float, nargs="*", metavar="LOW HIGH")
    guide_low: float = flag(0.0, "guidance in the target from this fraction of the times", share)
    guide_high: float = flag(1.0, "guidance in the target up to this fraction", share)
    align: float = flag(0.0, "weight of the loss that aligns tokens with features", non_negative_float)
    align_depth: int = flag(8, "block that is aligned; the authors: 4 for B, 8 for XL", positive_int)
    align_encoder: str = flag("nvidia/C-RADIOv2-B", "image encoder of these features: a folder or hub name")
    drop: float = flag(0.1, "share of conditions dropped", share)
    init: str = flag("", "start from the weights of this run folder, file or hub name")
    init_anyway: bool = flag(False, "allow --init from another transport or prediction")
    steps: int = flag(1000, "length of training in updates", positive_int)
    batch: int = flag(0, "pictures per update over all ranks; 0 = it fits the device", natural)
    accumulate: int = flag(1, "micro-batches per update and rank", positive_int)
    lr: float = flag(2e-3, "AdamW's peak learning rate", positive_float)
    warmup: int = flag(100, "updates of linear warm-up", natural)
    decay: float = flag(0.0, "last share of the updates in which the rate falls to zero", share)
    beta2: float = flag(0.95, "AdamW's second beta, below 1", share)
    weight_decay: float = flag(0.01, "AdamW's weight decay", non_negative_float)
    clip: float = flag(1.0, "largest gradient norm", positive_float)
    ema: float = flag(0.9999, "decay of the averaged weights; (1 + n) / (10 + n) if less", share)
    precision: str = flag("auto", "of attention and MLP; auto = bf16 on GPUs that have it, fp32 for\n"
        "networks up to 256 wide", choices=("auto", "fp32", "bf16"))
    replicate: int = flag(1, "copies of the sharded network, dividing the ranks", positive_int)
    checkpointing: bool = flag(False, "recompute each block's activations in the backward pass")
    compile: bool = flag(False, "compile the blocks")
    device: str = flag("auto", "auto = cuda, else cpu; or cuda, mps, cpu",
        choices=("auto", "cuda", "mps", "cpu"))
    config: str = flag("demo", "preset")
    name: str = flag("", "folder under runs/; default the preset's name, or that of --data")
    runs: str = flag("runs", "folder of the run folders")
    seed: int = flag(0, "of weights, data order, noise and times", natural)
    log_every: int = flag(50, "updates per log line", positive_int)
    save_every: int = flag(1000, "updates per checkpoint; the end has one, too", positive_int)
    keep: int = flag(2, "newest checkpoints to keep", positive_int)
    keep_every: int = flag(0, "also keep checkpoints at multiples of this; 0 = none", natural)
    sample_every: int = flag(0, "updates per sample grid; 0 = eight grids in all", natural)
    guidance: float = flag(1.0, "default guidance of sampling", finite)
    interval: tuple = flag((0.0, 1.0), "default interval of that guidance, fractions of the times",
        share, nargs=2, metavar=("LOW", "HIGH"))
    strict_interval: bool = flag(False, "by default sampling leaves out the ends of the interval")


GROUPS = {"data": "data", "size": "network", "transport": "objective", "init": "optimisation",
          "precision": "machine", "config": "run"}  # first field: title in --help

IMAGENET = Config(
    data="latents/imagenet256", autoencoder="sd-vae", channels=4, side=32, classes=1000, size="XL",
    patch=2, steps=750_000, batch=512, lr=2e-4, warmup=0, compile=True, log_every=100,
    save_every=5_000, keep_every=50_000, sample_every=10_000, guidance=2.5, interval=(0.0, 0.6),
    strict_interval=True,
)
LATENT_512 = {"data": "latents/imagenet512", "autoencoder": "dc-ae", "channels": 32, "side": 16,
              "patch": 1, "guidance": 3.0, "interval": (0.0, 0.7)}
GUIDED = {"guide_gt": 1.0, "guide_cond": 0.75, "guide_low": 0.3, "guide_high": 0.8, "guidance": 1.0}
SMALL = Config(
    time_mean=0.0, time_std=1.6, cosine=False, predict="x", tangent="network", ema=0.998, decay=0.2,
    log_every=20,
)
ANY_GUIDANCE = {"guide_range": (1.0, 2.5), "guidance": 2.0}
PRESETS = {
    "demo": replace(SMALL, steps=3600, lr=3e-3, **ANY_GUIDANCE),
    "emoji": replace(
        SMALL, data="emoji", size="emoji", patch=8, steps=3500, batch=32, lr=1.5e-3, **ANY_GUIDANCE,
    ),
    # 256 tokens, 512 epochs: 1.4 hours of one H100 at 40% of its bf16 peak, computed from 4.5
    # forward passes of 17 GFLOPs a picture, not yet measured
    "cifar10": replace(
        SMALL, data="cifar10", channels=3, side=32, classes=10, size="S", patch=2, steps=100_000,
        batch=256, lr=6e-4, warmup=1000, ema=0.9999, cosine=True, compile=True,
        sample_every=5_000, log_every=100,
    ),
    # the authors' recipes on the paper's transport: README, "What differs"
    "imagenet_b": replace(IMAGENET, size="B", patch=4, steps=100_000, batch=1024, lr=4e-4),
    "imagenet_xl": IMAGENET,
    "imagenet_xl_512": replace(IMAGENET, **LATENT_512),
    "imagenet_xl_guided": replace(IMAGENET, **GUIDED),
    "imagenet_xl_512_guided": replace(IMAGENET, **LATENT_512 | GUIDED),
    "t2i_xl": replace(
        IMAGENET, **LATENT_512 | {"data": "latents/t2i", "guidance": 2.5, "interval": (0.0, 1.0)},
        classes=0, text_encoder=data.GEMMA, caption=1152, time_mean=0.0, time_std=1.6,
        steps=500_000, batch=2048, accumulate=2, lr=4e-4,
    ),
}  # fmt: skip
FREE = set(  # what a resumed run may change: a data set is compared by its contents
    "data steps log_every save_every sample_every keep keep_every guidance interval strict_interval "
    "device compile runs config name init init_anyway checkpointing replicate accumulate".split()
)


def parse_config(argv=None) -> tuple[Config, int]:
    """--config NAME picks a preset, --FIELD VALUE replaces one field; argparse refuses the rest.

    returns  the configuration, and the number of ranks of a --dry_run (0 = train).
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", choices=PRESETS, default="demo")
    preset = PRESETS[first.parse_known_args(argv)[0].config]
    parser = argparse.ArgumentParser(
        description=__doc__, usage="train.py [--config PRESET] [--FIELD VALUE ...]",
        allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="say what it would take, and stop")
    parser.add_argument("--world_size", type=positive_int, default=1, help="of --dry_run (default 1)")
    data.add_flags(parser, preset, GROUPS)
    given = vars(parser.parse_args(argv))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    dry_run, world_size = given.pop("dry_run"), given.pop("world_size")
    require(dry_run or world_size == 1, "--world_size: only with --dry_run; torchrun sets it")
    return check(replace(preset, **given)), world_size if dry_run else 0


def is_guided(cfg: Config) -> bool:
    """Whether the target is guided."""
    return bool(cfg.guide_range) or (cfg.guide_gt, cfg.guide_cond) != (1, 0)


def check(cfg: Config) -> Config:
    """Raise UserError for values that cannot work together, before anything is built."""
    transport = TRANSPORTS[cfg.transport]
    total = cfg.share_diffusion + cfg.share_consistency
    require(total <= 1, f"--share_diffusion plus --share_consistency is {total:g}: at most 1")
    require(cfg.drop or not is_guided(cfg), "guidance in the target needs a dropped condition: --drop 0.1")
    require(cfg.beta2 < 1, f"--beta2 {cfg.beta2:g}: below 1")
    require(cfg.guide_cond < 1, f"--guide_cond {cfg.guide_cond:g}: below 1; the guidance that is "
            "learned is --guide_gt / (1 - this)")  # fmt: skip
    require(cfg.guide_low <= cfg.guide_high, f"--guide_low {cfg.guide_low:g}: at most --guide_high, "
            f"which is {cfg.guide_high:g}")  # fmt: skip
    if cfg.guide_range:
        two = len(cfg.guide_range) == 2 and 1 <= cfg.guide_range[0] < cfg.guide_range[1]
        require(two, f"--guide_range {cfg.guide_range}: two rising numbers, at least 1")
        require(cfg.guide_gt == 1, f"--guide_gt {cfg.guide_gt:g}: guidance is drawn from --guide_range; "
                "give that one without numbers")  # fmt: skip
    check_guidance(cfg.guide_range, cfg.guidance, cfg.interval)
    require(cfg.drop or cfg.guidance == 1, f"--guidance {cfg.guidance:g}: needs a dropped condition: "
            "--drop 0.1")  # fmt: skip
    plain = "/" not in cfg.name and not cfg.name.startswith(".")
    require(plain, f"--name {cfg.name}: one folder name, without / or a leading dot; give another --name")
    fits = transport.on_unit_interval or not cfg.shift_tokens
    require(fits, f"--shift_tokens {cfg.shift_tokens}: needs times in [0, 1], not those of "
            f"{cfg.transport!r}; use 0")  # fmt: skip
    if cfg.kernel != "constant":
        with explain(ValueError, f"--tau {cfg.tau}: give another, or another --transport"):
            check_weight(transport, cfg.tau)
    return cfg


def resolve(cfg: Config, spec: Spec, device: torch.device, world_size: int) -> Config:
    """Fill in what was left to the data and the device, print it, and refuse what does not divide.

    Patch: the smallest that divides the sides and leaves at most 4 x 4 tokens up to 32 pixels,
    8 x 8 beyond, 16 x 16 of latents. Batch: 256 pictures on a GPU; on a CPU 64 of few tokens, else
    32. Networks up to 256 wide are bound by launches, of which bf16 has more.
    """
    transport, (height, width) = TRANSPORTS[cfg.transport], spec.shape[1:]
    sides = [height, width, *np.ravel(spec.buckets).astype(int).tolist()]
    most = 16 if spec.kind == "latents" else 4 if height <= 32 else 8
    fits = [p for p in range(1, height + 1) if all(side % p == 0 for side in sides)]
    patch = cfg.patch or next(p for p in fits if height // p <= most or p == fits[-1])
    require(patch in fits, f"--patch {patch}: {height}x{width} must be a multiple of it; one of "
            f"{', '.join(map(str, fits))} fits")  # fmt: skip
    tokens = (height // patch) * (width // patch)
    one_rank = 256 if device.type == "cuda" else 64 if tokens <= 16 else 32
    small = cfg.precision == "auto" and SIZES[cfg.size]["width"] <= 256
    dtype = torch.float32 if small else data.pick_dtype(device, cfg.precision)
    of_data = Path(cfg.data).expanduser().resolve().name
    h_fp32, h_bf16 = transport.h
    filled = {
        "patch": patch, "batch": cfg.batch or one_rank * world_size * cfg.accumulate,
        "precision": "bf16" if dtype == torch.bfloat16 else "fp32",
        "h": cfg.h or (h_bf16 if dtype == torch.bfloat16 else h_fp32),
        "sample_every": cfg.sample_every or max(1, math.ceil(cfg.steps / 8)),
        "name": cfg.name or (cfg.config if cfg.data == PRESETS[cfg.config].data else of_data),
    }  # fmt: skip
    chosen = [f"--{name} {value}" for name, value in filled.items() if value != getattr(cfg, name)]
    if chosen:
        data.say(f"chosen for {height}x{width} ({tokens} tokens) on {device.type}: {' '.join(chosen)}")
    cfg, parts = replace(cfg, **filled), world_size * cfg.accumulate
    larger = cfg.batch // parts * parts + parts
    require(cfg.batch % parts == 0, f"--batch {cfg.batch}: must be a multiple of {world_size} ranks x "
            f"{cfg.accumulate} micro-batches; {larger} is")  # fmt: skip
    require(world_size % cfg.replicate == 0, f"--replicate {cfg.replicate}: must divide the number of "
            f"ranks, {world_size}")  # fmt: skip
    return cfg


# --- The step -------------------------------------------------------------------------------------


def objective(f, f_ema, transport: Transport, cfg: Config, x, y, null, rng, features=None):
    """The paper's algorithm on one micro-batch.

    f, f_ema  the network and its average, see `transition.network_f`
    x         (B, C, H, W) of unit variance; y, null: its conditions and none, as the network takes them
    rng       the only source of randomness; cfg.h is half the width of the difference
    features  (B, N, F) of an image encoder, with cfg.align
    returns   the loss to descend (0-d), and what the log averages, {name: (B,)}, with t and r
    """
    shift = resolution_shift(x.shape[2] * x.shape[3] // cfg.patch**2, cfg.shift_tokens)
    t, r, same = sample_times(                                                         # (B,), (B,)
        transport, len(x), rng, share_diffusion=cfg.share_diffusion, mean=cfg.time_mean,
        share_consistency=cfg.share_consistency, std=cfg.time_std, diffusion_at=cfg.diffusion_at,
        shift=shift,
    )
    eps = torch.randn(x.shape, generator=rng, device=x.device)                       # (B, C, H, W)
    dropped = torch.rand(len(x), generator=rng, device=x.device) < cfg.drop
    y, w_gt = choose(dropped, null, y), cfg.guide_gt
    if cfg.guide_range:
        w = draw_guidance(cfg, len(x), rng)                                                  # (B,)
        y, null = (y, w), (null, w)
        w_gt = w * (1 - cfg.guide_cond)                 # what is learned is w_gt / (1 - w_cond) = w
    x_t = interpolate(transport, x, eps, t)                                  # fixed from here on

    pair = x, eps                                           # whose residual is the target at r = t
    if is_guided(cfg):                       # not where the condition is dropped: there is no other
        place = transport.fraction(t)
        use = ~dropped & (cfg.guide_low <= place) & (place <= cfg.guide_high)
        f_cond, f_null = predictions(f_ema, cfg, x_t, t, y, null)
        guided = guided_pair(transport, x, eps, t, f_cond, f_null, w_gt, cfg.guide_cond)
        pair = choose(use, guided, pair)

    df_dt = torch.zeros_like(x)
    if same < len(x):                              # the first samples have r = t, and B = 0 for it
        f_path = {"data": None, "network": f, "average": f_ema}[cfg.tangent]
        some = [each(lambda part: part[same:], condition) for condition in (pair, t, r, y)]
        df_dt[same:] = time_derivative(f, f_path, transport, cfg, *some)
    target = transition_target(transport, *pair, t, r, df_dt)

    metrics = {"t": t, "r": r}
    if cfg.align:
        out, tokens = f(x_t, t, r, y, aligned=True)                              # tokens (B, N, F)
        alignment = (1 - torch.cosine_similarity(tokens.float(), features, dim=2)).mean(1)   # (B,)
        metrics["alignment"] = alignment.detach()
    else:
        out, alignment = f(x_t, t, r, y), 0.0
    raw = sample_loss(out, target, cfg.cosine)                                               # (B,)
    weight = time_weight(transport, t, r, cfg.tau, cfg.kernel, cfg.weight_sigma)
    loss = weight * (adaptive(raw) if cfg.adaptive else raw) + cfg.align * alignment
    return loss.mean(), metrics | {"loss": raw.detach()}


def draw_guidance(cfg: Config, n: int, rng) -> torch.Tensor:
    """w (n,): log-uniform over cfg.guide_range, a tenth of them 1."""
    low, high = cfg.guide_range
    u, one = torch.rand(2, n, generator=rng, device=rng.device)
    return torch.where(one < 0.1, torch.ones_like(u), low * (high / low) ** u)


@torch.no_grad()
def predictions(f_ema, cfg: Config, x_t, t, y, null):
    """The average's f at r = t with the condition, None where nothing asks for it, and without."""
    if not cfg.guide_cond:
        return None, f_ema(x_t, t, t, null)
    s = cat(t, t)
    return f_ema(cat(x_t, x_t), s, s, cat(y, null)).chunk(2)


def time_derivative(f, f_path, transport: Transport, cfg: Config, pair, t, r, y):
    """df/dt (B, C, H, W) along the path of a pair (x, eps), or, with f_path, of the pair that this
    function sees behind x_t. The target is linear in df/dt, so where that pair is the conditional
    mean, the expectation of the target given x_t is the same (arXiv 2512.02012)."""
    if f_path is not None:
        with torch.no_grad():
            x_t = interpolate(transport, *pair, t)
            pair = solve(transport, x_t, f_path(x_t, t, t, y), t)
    if cfg.derivative == "jvp":
        return exact_derivative(f, transport, *pair, t, r, y)
    return finite_difference(f, transport, *pair, t, r, y, cfg.h)


class Networks(dcp.stateful.Stateful):
    """What training changes, and a checkpoint holds: model, its average, optimizer."""

    def __init__(self, model, ema, optimizer):
        self.model, self.ema, self.optimizer = model, ema, optimizer

    def state_dict(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "ema": get_model_state_dict(self.ema)}

    def load_state_dict(self, state: dict) -> None:
        parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.model, self.optimizer, **parts)
        set_model_state_dict(self.ema, state["ema"])


class MicroBatch(NamedTuple):
    """On the device: x as it is stored, conditions and none, features to align with."""

    x: torch.Tensor
    y: object
    null: object
    features: torch.Tensor | None = None


def train_step(networks: Networks, transport, cfg: Config, spec: Spec, step: int, parts: list):
    """One update, without a host sync. parts: the micro-batches of this rank.

    All draws are a function of (seed, step, slot), slot = rank * accumulate + k: two ranks of one
    slot and one rank of two draw the same. Returns the gradient norm (0-d), and what the log averages
    over this rank's pictures, {name: (n,)}.
    """
    model, ema, optimizer = networks.model, networks.ema, networks.optimizer
    f, f_ema = (network_f(net, transport, cfg.predict) for net in (model, ema))
    seen = []
    for k, (x, y, null, features) in enumerate(parts):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(k + 1 == len(parts))  # summed over ranks at the last
            model.set_reshard_after_backward(k + 1 == len(parts))
        slot = data.ranks()[0] * len(parts) + k
        rng = data.seeded(cfg.seed, step, slot, 1, device=x.device)  # 1: no key of sampling, (seed, i)
        x = data.network_space(x, spec, rng)
        loss, metrics = objective(f, f_ema, transport, cfg, x, y, null, rng, features)
        (loss / len(parts)).backward()
        seen.append(metrics)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(cfg, step)
    optimizer.step()
    optimizer.zero_grad()
    update_average(ema, model, min(cfg.ema, (1 + step) / (10 + step)))
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm, {name: torch.cat([metrics[name] for metrics in seen]) for name in seen[0]}


def learning_rate(cfg: Config, step: int) -> float:
    """Linear warm-up, constant, and, if cfg.decay, a linear fall to zero over that last share."""
    fall = (cfg.steps - step) / (cfg.decay * cfg.steps) if cfg.decay else 1.0
    return cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup), fall)


@torch.no_grad()
def update_average(ema, model, decay: float) -> None:
    """Of a sharded tensor this rank's part."""
    local = lambda p: p.to_local() if isinstance(p, DTensor) else p
    averaged, live = ([local(p) for p in m.parameters()] for m in (ema, model))
    torch._foreach_lerp_(averaged, live, 1 - decay)


# --- The network ----------------------------------------------------------------------------------


def network_arguments(cfg: Config, spec: Spec, features: int = 0) -> dict:
    """Arguments of TiM for data of this spec; features: their width, where tokens are aligned."""
    caption = spec.text["width"] if spec.text else 0
    require(spec.classes or caption, f"--data {cfg.data} has neither classes nor captions; give a "
            "set with one folder per class, or pictures with captions")  # fmt: skip
    require(cfg.caption in (0, caption), f"--caption {cfg.caption}: --data {cfg.data} with --text_encoder "
            f"{cfg.text_encoder} gives {caption}, 0 where there are classes; change either")  # fmt: skip
    depth = SIZES[cfg.size]["depth"]
    require(not cfg.align or cfg.align_depth <= depth, f"--align_depth {cfg.align_depth}: of {depth} blocks")
    network = {"channels": spec.shape[0], "patch": cfg.patch, **SIZES[cfg.size]}
    network |= {"caption": caption or None, "classes": None if caption else len(spec.classes)}
    for name in ("predict", "shared_time", "interval_attention", "rope_layout", "caption_mask"):
        network[name] = getattr(cfg, name)
    network["guide_range"] = list(cfg.guide_range) or None
    network["projector"] = [cfg.align_depth, 2048, features] if cfg.align else None
    return network


def build(cfg: Config, network: dict, device: torch.device) -> Networks:
    """The network, its average and the optimizer, sharded over all ranks.

    bf16 has two ways here. A rank alone has nothing to shard and runs without FSDP, whose copies and
    hooks cost more than an update on one GPU: its fp32 weights are cast at every pass. FSDP casts
    while it gathers, which halves what goes over the wire.
    """
    torch.set_rng_state(data.seeded(cfg.seed, 0, 0, 2).get_state())  # every rank the same weights
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
            if cfg.precision == "bf16":
                lower_precision(part, masters=True)
    model, ema = shard(model, mesh, cfg, trains=True), shard(ema, mesh, cfg, trains=False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), eps=1e-6,
        weight_decay=cfg.weight_decay, fused=device.type != "mps",
    )  # fmt: skip
    return Networks(model, ema, optimizer)


def shard(model, mesh, cfg: Config, trains: bool):
    """Checkpointed and compiled blocks, as cfg has it, and with a mesh FSDP2, a unit per block: fp32
    master weights and reduction, attention and MLP in cfg.precision.

    adaLN is a unit of its own and stays fp32; inputs are never cast: bf16 would make t +- h noise.
    An update runs the network two to four times: what trains is gathered once for all of them and
    resharded by its backward pass; the average has none and is resharded at once.
    """
    keep = {"reshard_after_forward": not trains}
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    low = replace(whole, param_dtype=torch.bfloat16) if cfg.precision == "bf16" else whole
    for block in model.blocks:
        if cfg.checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if cfg.compile:
            block.compile(dynamic=False)  # each shape of a native set is compiled as it is
        if mesh is not None:
            fully_shard(block.adaLN_modulation, mesh=mesh, mp_policy=whole, **keep)
            fully_shard(block, mesh=mesh, mp_policy=low, **keep)
    return model if mesh is None else fully_shard(model, mesh=mesh, mp_policy=whole, **keep)


def start_from(model: TiM, cfg: Config) -> None:
    """--init: weights of a run, a file or the hub. With another number of classes the class rows
    start fresh, but for the row of no class; a guide_embedder that the file lacks does, too; all
    else must fit, transport and prediction too."""
    old, transport, _ = load(cfg.init)
    trained = {"transport": transport.name, "predict": old.predict}
    if old.classes is None:
        trained |= {"caption_mask": old.caption_mask, "rope_layout": old.rope_layout}
    for name, was in trained.items():
        now = getattr(cfg, name)
        way = {True: f"--{name}", False: f"--no-{name}"}.get(was, f"--{name} {was}")
        require(was == now or cfg.init_anyway, f"--init {cfg.init}: was trained with {name} {was}; give "
                f"{way}, or --init_anyway to train it onto {now}")  # fmt: skip
    kinds = {True: "texts", False: "classes"}
    was, now = kinds[old.classes is None], kinds[model.classes is None]
    require(was == now, f"--init {cfg.init}: was trained on {was}, --data {cfg.data} has {now}; give "
            "other data")  # fmt: skip
    state, fresh = old.state_dict(), model.state_dict()
    table = "y_embedder.embedding_table.weight"
    if table in state and table in fresh and len(state[table]) != len(fresh[table]):
        state[table] = torch.cat([fresh[table][:-1], state[table][-1:]])
    new = ("projector.", "guide_embedder.")
    state |= {k: v for k, v in fresh.items() if k.startswith(new) and k not in state}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f"--init {cfg.init} does not fit the network ({why}); give the --size, --patch "
                        "and kind of data that it was trained with") from error  # fmt: skip


def dry_run(cfg: Config, world_size: int) -> None:
    """Print what a run would be and take, by arithmetic alone; activations are not in it."""
    if cfg.data in ("demo", "emoji"):  # they are in the repository
        spec = data.open_data(cfg.data).spec
        caption = 0 if spec.classes else data.HASHES["width"]
        cfg = replace(cfg, channels=spec.shape[0], side=spec.shape[1], classes=len(spec.classes),
                      caption=caption)  # fmt: skip
    complete = cfg.channels and cfg.side and (cfg.classes or cfg.caption)
    require(complete, f"--dry_run does not open --data {cfg.data}: give --channels, --side, and --classes "
            "or --caption")  # fmt: skip
    text = {"width": cfg.caption} if cfg.caption else None
    shape, classes = (cfg.channels, cfg.side, cfg.side), tuple(map(str, range(cfg.classes)))
    spec = Spec("latents" if cfg.autoencoder else "pixels", shape, classes=classes, text=text)
    cfg = resolve(cfg, spec, torch.device("cuda"), world_size)
    with torch.device("meta"):
        model = TiM(**network_arguments(replace(cfg, align=0.0), spec))
        x, t, y = torch.empty(1, *shape), torch.empty(1), torch.empty(1).long()
        y = torch.empty(1, 256, cfg.caption) if cfg.caption else y  # captions of full length
        y = (y, t) if cfg.guide_range else y
    with FlopCounterMode(display=False) as counter:
        model(x, t, t, y)
    moving = 1 - cfg.share_diffusion  # need a derivative, twice f, and its path
    passes = 3 + moving * (2 + (cfg.tangent != "data"))
    passes += (1 + bool(cfg.guide_cond)) * is_guided(cfg)
    n, tokens = sum(p.numel() for p in model.parameters()), (cfg.side // cfg.patch) ** 2
    shards, images = world_size // cfg.replicate, cfg.steps * cfg.batch
    flops = counter.get_total_flops()
    print(f"{cfg.name}: {cfg.size}/{cfg.patch}, {n:,} parameters in {len(list(model.parameters()))} tensors")
    epochs = f" = {images / 1_281_167:.1f} epochs of ImageNet" if cfg.classes == 1000 else ""
    print(f"{cfg.steps:,} updates x {cfg.batch} = {images:,} images{epochs}, {tokens} tokens each")
    print(f"{passes:g} forward passes of {flops / 1e9:.3g} GFLOPs an image, "
          f"{passes * flops * cfg.batch / 1e12:.4g} TFLOPs an update")  # fmt: skip
    print(f"{world_size} ranks, {shards} shards, "
          f"{cfg.batch // (world_size * cfg.accumulate)} images a micro-batch")  # fmt: skip
    gradients = 4 * n / (shards if cfg.accumulate == 1 else 1)  # whole until they are summed
    sizes = {"weights": 4 * n / shards, "gradients": gradients, "optimizer": 8 * n / shards,
             "average": 4 * n / shards}
    for name, size in (sizes | {"total": sum(sizes.values())}).items():
        print(f"  {name:10} {size / 2**30:8.3f} GiB a rank")
    print("without activations and gathered weights: --data random --steps 3 prints the peak on a GPU")


# --- Checkpoints ----------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """The complete ones, oldest first."""
    found = (run / "checkpoints").glob("step_*")
    return sorted((f for f in found if f.name[5:].isdigit()), key=lambda f: int(f.name[5:]))


def publish(run: Path, newest: Path) -> None:
    """Make RUN/ema.safetensors that of the newest checkpoint: a link, or a copy where there are none."""
    source = newest / "ema.safetensors"
    with data.replacing(run / "ema.safetensors") as file:
        try:
            os.link(source, file)
        except OSError:
            shutil.copyfile(source, file)


def write_checkpoint(run: Path, step: int, networks: Networks, record: dict) -> None:
    """Write aside, wait for the disk, rename, then remove old ones: a complete one is always there."""
    final, record = run / "checkpoints" / f"step_{step:08d}", record | {"step": step}
    aside = final.with_suffix(".tmp")
    data.first_rank(shutil.rmtree, aside, True)
    failed = f"{aside} not written; older ones are whole; free the disk and run again"
    with explain((CheckpointException, OSError), failed):
        dcp.save({"train": networks}, checkpoint_id=aside, no_dist=not dist.is_initialized())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(networks.ema, options=options)

    def complete():
        save(aside / "ema.safetensors", whole, record)
        data.write_text(aside / "config.json", json.dumps(record, indent=1))
        data.sync(aside)  # its files are, by those who wrote them
        os.replace(aside, final)
        data.sync(final.parent)
        publish(run, final)
        prune(run, record["train"]["keep"], record["train"]["keep_every"])

    data.first_rank(complete)


def prune(run: Path, keep: int, every: int) -> None:
    """Remove all checkpoints but the newest `keep` and, if `every`, those of its multiples."""
    for old in checkpoints(run)[:-keep]:
        if not every or int(old.name[5:]) % every:
            os.replace(old, old.with_suffix(".tmp"))  # half of one must not count as complete
            shutil.rmtree(old.with_suffix(".tmp"), ignore_errors=True)


def compare(found: Path, record: dict) -> int:
    """The number of updates of a checkpoint. UserError if it was made with other settings, by name:
    only those in FREE may differ."""
    old, names = data.read_json(found / "config.json"), [f.name for f in fields(Config)]
    now, defaults = json.loads(json.dumps([record, asdict(Config())]))
    old["train"] = defaults | old["train"]  # settings younger than the run

    def same(part: str, names) -> None:
        for name in names:
            if name not in FREE and name in old[part]:
                was, asked = old[part][name], now[part][name]
                what = f"--{name}" if part == "train" else f"{part} {name}"
                require(was == asked, f"{found} was trained with {what} {str(was)[:200]}, not "
                        f"{str(asked)[:200]}; set it back or use a new --name")  # fmt: skip

    same("train", names[: names.index("size")])  # what the data are asked to be
    require(old.get("fingerprint") == now["fingerprint"], f"{found} was trained on other pictures or "
            "captions than --data has now; use those or a new --name")  # fmt: skip
    same("train", ["precision", *names])  # h follows from precision
    same("model", now["model"])
    same("data", now["data"].keys() - {"mean", "std"})
    ending = old["train"]["steps"]
    fell = old["step"] > (1 - now["train"]["decay"]) * ending
    if fell and now["train"]["steps"] != ending:
        data.note(f"{found} was to end at update {ending}, and its rate fell towards that; a new --name "
                  "trains with the whole rate")  # fmt: skip
    return old["step"]


def remove_leftovers(run: Path) -> None:
    for folder in (run / "checkpoints").glob("step_*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)
    for file in run.glob("ema.safetensors.*.tmp"):
        file.unlink()


def resume(run: Path, networks: Networks, record: dict) -> int:
    """Load the newest complete checkpoint, if any; returns the number of updates done. Leftovers of
    a killed save are removed."""
    data.first_rank(remove_leftovers, run)
    found = data.first_rank(checkpoints, run)
    if not found:
        return 0
    step = data.first_rank(compare, found[-1], record)
    with explain((CheckpointException, OSError), f"{found[-1]} cannot be read; remove it to go on from "
                 "the one before"):  # fmt: skip
        state = {"train": networks}
        dcp.load(state, checkpoint_id=found[-1], no_dist=not dist.is_initialized())
    data.first_rank(publish, run, found[-1])
    return step


# --------------------------------------------------------------------------------------------------
# The log: log.jsonl, a line of averages every cfg.log_every updates (README, "Seeing the run")

EDGES = (0.0, 0.25, 0.5, 0.75)  # bins of (t - r) over the transport's range: r = t, four quarters
BINS = ("loss_equal", "loss_25", "loss_50", "loss_75", "loss_100")


class Log:
    """Sums on the device since the last line; every rank adds, rank 0 writes."""

    def __init__(self, run: Path, cfg: Config, transport: Transport, device, begin: int, about: dict):
        self.cfg, self.transport, self.done = cfg, transport, begin
        self.edges, self.file = torch.tensor(EDGES, device=device), None
        writes = data.ranks()[0] == 0
        self.terminal = writes and sys.stderr.isatty()
        self.bar = tqdm(total=cfg.steps, initial=begin, disable=not self.terminal)
        if writes:
            path = run / "log.jsonl"
            cut = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")  # by a crash
            self.file = path.open("a")
            if cut:
                self.file.write("\n")
            self.write(about)
        self.clear()

    def clear(self):
        self.bins = torch.zeros(2, len(BINS), device=self.edges.device)  # sums of loss, counts
        self.sums, self.norm, self.bad = {}, 0.0, 0
        self.steps, self.waited, self.began = 0, 0.0, time.perf_counter()

    def write(self, line: dict):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def add(self, norm, metrics: dict, waited: float):
        """Of one update: gradient norm (0-d), {name: (n,)}, seconds of waiting for data."""
        t, r = (self.transport.fraction(metrics[name]) for name in ("t", "r"))
        length, loss = torch.bucketize(t - r, self.edges), metrics["loss"]
        self.bins.index_add_(1, length, torch.stack([loss, torch.ones_like(loss)]))
        for name in metrics.keys() - {"t", "r", "loss"}:
            self.sums[name] = self.sums.get(name, 0.0) + metrics[name].sum()
        self.norm, self.bad = self.norm + norm, self.bad + ~norm.isfinite()
        self.steps, self.waited, self.done = self.steps + 1, self.waited + waited, self.done + 1
        self.bar.update()

    def leave_out(self, seconds: float):
        """Time of checkpoints and pictures: the rate in the log is that of updates."""
        self.began += seconds

    def flush(self):
        """Averages over all ranks since the last line; every rank must call it. UserError, on all
        of them, if a gradient was not finite."""
        names = sorted(self.sums)
        sums = torch.cat([self.bins.flatten(), *(self.sums[name].reshape(1) for name in names)])
        if dist.is_initialized():
            dist.all_reduce(sums)
        sizes = [len(BINS), len(BINS), len(names)]
        loss, count, others = (part.tolist() for part in sums.split(sizes))
        n, spent = sum(count), time.perf_counter() - self.began
        line = {"step": self.done, "loss": sum(loss) / n, "grad_norm": float(self.norm) / self.steps}
        worst = [name for name, value in zip(BINS, loss) if not math.isfinite(value)]
        data.first_rank(require, not int(self.bad), f"updates {self.done - self.steps + 1} to {self.done}: "
                        f"{int(self.bad)} gradients were not finite (losses by t - r: "
                        f"{', '.join(worst) or 'finite'}). Nothing of it was saved, the last checkpoint "
                        "is good. Try a lower --lr or --precision fp32, and look at the data")  # fmt: skip
        line |= {name: a / b for name, a, b in zip(BINS, loss, count) if b}
        line |= {name: value / n for name, value in zip(names, others)}
        line |= {"images_per_s": n / spent, "waiting": self.waited / spent}
        line["lr"] = learning_rate(self.cfg, self.done - 1)
        if self.bins.is_cuda:
            line["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        left = spent / self.steps * (self.cfg.steps - self.done)
        self.clear()
        if self.file is None:
            return
        self.write(line)
        shown = f"loss {line['loss']:.4f} (r = t {line.get('loss_equal', math.nan):.4f})"
        shown += f"  {line['images_per_s']:.0f} img/s"
        if "memory_gib" in line:
            shown += f"  {line['memory_gib']:.1f} GiB"
        self.bar.set_postfix_str(shown)
        if not self.terminal:
            data.say(f"step {self.done} of {self.cfg.steps}  {shown}  {left:.0f} s left")

    def close(self):
        self.bar.close()
        if self.file is not None:
            self.file.close()


def draw_curve(run: Path) -> None:
    """runs/NAME/curve.png: the loss by length of the interval."""
    lines = {}  # by step, as updates that were lost in a crash were made again
    for text in (run / "log.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):  # a line that a crash cut short
            line = json.loads(text)
            lines[line.get("step", 0)] = line
    curves = {name: [(k, line[name]) for k, line in lines.items() if name in line] for name in BINS}
    data.plot(run / "curve.png", curves, xlabel="updates", ylabel="raw loss", yscale="log",
              title="by t - r, % of the range")  # fmt: skip


# --- The run --------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening():
    """The list of signals that asked for an end: SIGTERM, SIGHUP, Ctrl-C, as often as they come; only
    a second Ctrl-C ends at once. Handlers live in the main thread, within the `with`."""
    seen, hang_up = [], getattr(signal, "SIGHUP", None)  # Windows has none

    def on_signal(number, frame):
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        if not seen:
            with contextlib.suppress(OSError):  # nobody may be listening any more
                os.write(2, b"\nstopping after this update, then saving; Ctrl-C again ends at once\n")
        seen.append(number)

    numbers = [signal.SIGTERM, signal.SIGINT]
    # under nohup a hang-up is ignored; torchrun passes on what it acts on itself
    if hang_up and (signal.getsignal(hang_up) != signal.SIG_IGN or data.ranks()[1] > 1):
        numbers.append(hang_up)
    main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, on_signal) for number in numbers if main_thread}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_rank(asked: bool) -> bool:
    """Whether it holds on any of them: one number over all, on the CPU."""
    told = torch.tensor([int(asked)])
    if dist.is_initialized():
        dist.all_reduce(told)
    return bool(told)


def open_dataset(cfg: Config) -> data.DataSet:
    """The data that cfg asks for, or a UserError on all ranks."""
    source = Path(cfg.data).expanduser()
    inside = cfg.data not in data.SETS and source.is_dir() and data.lies_in(cfg.runs, source)
    require(not inside, f"--runs {cfg.runs}: lies in --data {cfg.data}; give another --runs")
    if cfg.data == "random":
        return data.random_data((cfg.channels, cfg.side, cfg.side), cfg.classes)
    absent = cfg.data not in data.SETS and not Path(cfg.data).expanduser().exists()
    if cfg.autoencoder:
        *_, factor = data.AUTOENCODERS.get(cfg.autoencoder, (8,))
        data.first_rank(require, not absent, f"--data {cfg.data}: not there yet; make it: torchrun "
                        f"--nproc_per_node=8 data.py prepare --images FOLDER --out {cfg.data} "
                        f"--autoencoder {cfg.autoencoder} --size {(cfg.side or 32) * factor}")  # fmt: skip
    dataset, fixed = data.open_data(cfg.data, cfg.side, cfg.mirror), (cfg.channels, cfg.side, cfg.classes)
    data.first_rank(data.check_fits, dataset.spec, *fixed, cfg.autoencoder)
    return dataset


def prepare_conditions(cfg: Config, dataset: data.DataSet, device):
    """What makes conditions of classes or captions, the names of those in sample grids, and the spec
    with its text."""
    spec, captions = dataset.spec, dataset.captions
    if captions is None:
        return data.ClassConditions(len(spec.classes), device), spec.classes[:10], spec
    encoder = data.load_text_encoder(cfg.text_encoder, device, pad_to_length=not cfg.caption_mask)
    some = data.spread(len(captions), min(10, len(captions)))
    prompts = spec.prompts or tuple(captions[i][0][:1000] for i in some)
    texts = captions.texts if len(captions) <= data.TABLE else ()
    known = (*texts, *prompts) if 0 < len(texts) <= data.TABLE else ()
    conditions = data.TextConditions(encoder, device, known, 64 if cfg.compile else 1)
    return conditions, prompts, replace(spec, text=encoder.spec, prompts=prompts)


def open_image_encoder(cfg: Config, dataset: data.DataSet, device):
    """With cfg.align the frozen network of its features, and their width; else None and 0."""
    if not cfg.align:
        return None, 0
    seen = dataset.pixels or dataset.spec.shape[0] == 3
    require(seen, f"--align: --data {cfg.data} keeps no pixels; prepare it with --pixels")
    option = f"--align_encoder {cfg.align_encoder}"
    encoder = data.load_network("transformers", option, cfg.align_encoder, device)
    probe = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    return encoder, data.encode_features(encoder, probe, (4, 4)).shape[2]


def open_decoder(spec: Spec, device) -> data.Decoder:
    """A run must not end because its pictures cannot be decoded."""
    try:
        return data.Decoder(spec, device)
    except UserError as error:
        data.note(f"pictures show latent channels: {error}")
        return data.Decoder(replace(spec, kind="pixels", mean=128.0, std=40.0), device)


@contextlib.contextmanager
def picture_may_fail():
    """A full disk at a picture does not end a run."""
    try:
        yield
    except (OSError, UserError) as error:
        data.note(f"a picture is not written: {error}")


def show_data(path: Path, part: MicroBatch, batch: data.Batch, spec: Spec, decode, rng) -> None:
    """samples/data.png: the first pictures as the network is fed them, with classes or captions."""
    n = min(32, len(part.x))
    n = n // 8 * 8 or n
    pixels = decode(data.network_space(part.x, spec, rng)[:n])
    names = batch.y if isinstance(batch.y, list) else [spec.classes[k] for k in batch.y.tolist()]
    rows = pixels.reshape(-1, min(8, n), *pixels.shape[1:])
    with picture_may_fail():
        data.make_folder(path.parent)
        data.write_picture(data.grid(rows, max(1, 64 // rows.shape[2]), names[:n]), path)


def train(cfg: Config) -> None:
    """Train or resume; every rank of a torchrun calls it with the same configuration."""
    device, transport = data.open_device(cfg.device), TRANSPORTS[cfg.transport]
    torch._dynamo.config.suppress_errors = device.type == "cpu"  # no C++ compiler: run uncompiled
    torch._dynamo.config.recompile_limit = 512  # one a shape: buckets, captions, batches
    torch._dynamo.config.accumulated_recompile_limit = 512
    data.connect(device)
    rank, world_size = data.ranks()

    # data and conditions
    dataset = open_dataset(cfg)
    cfg = data.first_rank(resolve, cfg, dataset.spec, device, world_size)
    conditions, names, spec = prepare_conditions(cfg, dataset, device)
    encoder, width = open_image_encoder(cfg, dataset, device)

    # network; nothing is written before all of it fits
    run, network = Path(cfg.runs) / cfg.name, network_arguments(cfg, spec, width)
    record = {"model": network, "data": spec.to_json(), "train": asdict(cfg)}
    record["fingerprint"] = dataset.fingerprint
    going_on = data.first_rank(checkpoints, run)
    if cfg.init and going_on:
        data.note(f"--init {cfg.init} is not read: {run} goes on from {going_on[-1].name}")
    networks = build(replace(cfg, init="" if going_on else cfg.init), network, device)
    data.first_rank(data.make_folder, run / "checkpoints")

    with data.owning(run):
        begin = done = resume(run, networks, record)
        sampler = Sampler(
            model=networks.ema, transport=transport, config=record, spec=spec, names=names,
            decode=open_decoder(spec, device), conditions=conditions,
            options=sampling_options(record), record={},
        )  # fmt: skip
        about = {"config": asdict(cfg), "begin": begin, "torch": torch.__version__}
        log = Log(run, cfg, transport, device, begin, about | {"world_size": world_size})
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        weights = sum(p.numel() for p in networks.model.parameters())
        data.say(f"{run}: {dataset.describe()}")
        data.say(f"{run}: {weights:,} parameters, {world_size} x {gpu}, {cfg.precision}, from update {begin}")

        # updates, until all are done or a signal came
        slots, of = [rank * cfg.accumulate + k for k in range(cfg.accumulate)], world_size * cfg.accumulate
        stream = data.batches(dataset, cfg.batch // of, cfg.seed, slots, of, begin, cfg.patch)
        with listening() as signals:
            stopping = False
            while done < cfg.steps and not stopping:
                began = time.perf_counter()
                batches = list(islice(stream, len(slots)))
                waited = time.perf_counter() - began
                parts = [to_micro_batch(batch, conditions, encoder, cfg, device) for batch in batches]
                if done == begin and rank == 0:
                    rng = data.seeded(cfg.seed, done, 0, 1, device=device)
                    show_data(run / "samples" / "data.png", parts[0], batches[0], spec, sampler.decode, rng)
                norm, metrics = train_step(networks, transport, cfg, spec, done, parts)
                log.add(norm, metrics, waited)
                done += 1

                stopping = any_rank(bool(signals))
                saving = stopping or done == cfg.steps or done % cfg.save_every == 0
                if saving or done % cfg.log_every == 0:
                    log.flush()  # raises, on all ranks, before a bad update is saved
                began = time.perf_counter()
                if saving:
                    write_checkpoint(run, done, networks, record)
                if done == cfg.steps or done % cfg.sample_every == 0:  # every rank joins
                    file, columns = run / "samples" / f"step_{done:08d}.png", list(range(len(names)))
                    with picture_may_fail(), torch.compiler.set_stance("force_eager"):
                        draw_grid(sampler, columns, [1, 2, 4, 8, 32], cfg.seed, file)
                log.leave_out(time.perf_counter() - began)
        log.close()
        if rank == 0 and begin < cfg.steps == done:
            draw_curve(run)
    if dist.is_initialized():  # here alone: after an error the others may be in a collective
        dist.destroy_process_group()

    if begin >= cfg.steps:
        data.say(f"{run}: already at update {begin}; raise --steps to go on")
    elif done == cfg.steps:
        data.say(f"{run}: all {done} updates are done, samples in {run / 'samples'}")
    else:
        data.say(f"{run}: stopped after update {done}, run again to go on")
        if signal.SIGINT in signals:
            raise KeyboardInterrupt  # status 130, so that `train.py && ...` does not go on


def to_micro_batch(batch: data.Batch, conditions, encoder, cfg: Config, device) -> MicroBatch:
    """To the device; conditions and features are made here, once a batch."""
    x, (y, null), features = data.to_device(batch.x, device), conditions(batch.y), None
    if encoder is not None:
        pixels = x if batch.pixels is None else data.to_device(batch.pixels, device)
        tokens = tuple(side // cfg.patch for side in x.shape[2:])
        features = data.encode_features(encoder, pixels, tokens)
    return MicroBatch(x, y, null, features)


def main(argv=None):
    cfg, world_size = parse_config(argv)
    if world_size:
        dry_run(cfg, world_size)
    else:
        train(cfg)


if __name__ == "__main__":
    data.command(main)
