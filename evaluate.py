"""Figures of a trained network: quality over the number of steps, its own identity, captions, speed.

    python evaluate.py fid --reference demo --num 2000 --steps 1 2 8      # newest run; torchrun shares the sampling
    python evaluate.py consistency                                        # a long jump against two; error of df/dt by h
    python evaluate.py clip --images pictures                             # pictures beside captions.jsonl
    python evaluate.py captions                                           # are prompts followed, also unseen ones?
    python evaluate.py speed --config demo --batch 64                     # takes every flag of train.py
"""

import argparse
import contextlib
import copy
import hashlib
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch_fidelity
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch_fidelity import metric_isc, metric_kid, metric_prc
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.utils import create_feature_extractor
from tqdm import tqdm

import data
import sample
import train
import transition
from data import UserError
from model import Linear, TiM, lower_precision

# ---------------------------------------------------------------------------------------------------------------------
# Tables and records


def table(title: str, rows) -> list[dict]:
    """Print flat records as they come, the keys of the first as heads; returns them."""
    out, text = [], lambda v: f"{v:.4g}" if isinstance(v, float) else "-" if v is None else str(v)
    print(f"\n{title}")
    for row in rows:
        if not out:
            print(" " * 24 + "".join(f"{k:>12}" for k in list(row)[1:]))
        name, *cells = map(text, row.values())
        print(f"{name:24}" + "".join(f"{c:>12}" for c in cells), flush=True)
        out.append(row)
    return out


def provenance() -> dict:
    """What every figure is recorded with: commit (-dirty where files were changed), torch, time."""
    git, commit = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"], None
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    return dict(commit=commit, torch=torch.__version__, time=time.strftime("%Y-%m-%dT%H:%M:%S"))


def chunks(n: int, size: int) -> list[range]:
    """0 .. n - 1 in runs of `size`, the last what is left."""
    return [range(k, min(k + size, n)) for k in range(0, n, size)]


def append(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record | provenance()) + "\n")


def digest(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def open_network(a, text=False):
    """The checkpoint that --checkpoint names, or the newest: model, row, config, folder of results, record of it."""
    path = Path(a.checkpoint or sample.newest())
    if a.seed < 0 or a.batch < 1:
        raise UserError(f"--seed {a.seed}, --batch {a.batch}: a seed is at least 0, a batch at least 1")
    model, row, config = sample.load(path, a.device)
    if text != ("text" in config["data"]):
        way = "captions, or sample.py --prompts_file FILE --num N, then fid --images"
        raise UserError(f"{path} was trained on " + ("classes; use fid or consistency" if text else f"text; use {way}"))
    if a.precision == "bf16":
        lower_precision(model)
    file = path / "ema.safetensors" if path.is_dir() else path
    about = dict(checkpoint=str(file), weights=digest(file), update=config["step"], seed=a.seed, dtype=a.precision)
    return model, row, config, file.parent / "eval", about


def trained_on(a, config) -> str:
    """--data, or what the checkpoint says it was trained on."""
    if not (place := a.data or config["train"].get("data")):
        raise UserError("the checkpoint does not say what it was trained on; give --data")
    return place


# ---------------------------------------------------------------------------------------------------------------------
# fid: pictures to features

EXTRACTOR, FEATURES, SCORES = "inception-v3-compat", "2048", "logits_unbiased"  # torch-fidelity's names
BATCH = 64  # torch-fidelity's, so that rounding is the same too


@dataclass
class Pictures:
    """A set of pictures: read(i) gives uint8 (3, H, W); key stands for content and preprocessing."""

    name: str
    n: int
    read: Callable[[int], np.ndarray]
    key: str
    preprocessing: str = "as stored, RGB"


@dataclass
class Reference:
    """Mean and covariance for FID, and features (n, D) float32 for the rest; None and n = 0 where there are none."""

    name: str
    n: int
    preprocessing: str
    stats: dict
    features: torch.Tensor | None = None
    size: list | None = None  # height, width


def load_extractor(path, device):
    """torch-fidelity's Inception from a file (None: its own download), and a tag of the weights.

    raises  UserError if the file is missing, holds code or another network, or the download fails.
    """
    cuda = torch.device(device).type == "cuda"
    try:
        if path is not None:
            torch.load(path, map_location="cpu", weights_only=True)             # refuses code, which the library runs
        wanted = dict(cuda=cuda, feature_extractor_weights_path=path, verbose=False)
        net = create_feature_extractor(EXTRACTOR, [FEATURES, SCORES], **wanted)
    except Exception as error:                                                  # as many kinds as there are wrong files
        rule = "not read or fetched" if isinstance(error, OSError) else f"not torch-fidelity's weights of {EXTRACTOR}"
        why = " ".join(str(error).split())[:200]
        raise UserError(f"Inception's weights ({path}) {rule}: {why}; give another --inception PATH") from error
    # channels last takes a third less time on a CPU and changes features by 1e-5
    return net if cuda else net.to(memory_format=torch.channels_last), digest(path) if path else "default"


def extract(net, pictures: Pictures, n: int, device):
    """Features (n, D) and class scores (n, classes) of the first n pictures, float32, and their [height, width]."""
    parts, size = [], pictures.read(0).shape[1:]
    with ThreadPoolExecutor(4) as pool, tqdm(total=n, desc=f"features of {pictures.name}", unit="img") as bar:
        for numbers in chunks(n, BATCH):
            x = list(pool.map(pictures.read, numbers))
            for i, picture in zip(numbers, x):
                if picture.shape[1:] != size:
                    rule = f"mixed sizes, picture {i} is {picture.shape[1:]} and the first {size} (height, width)"
                    raise UserError(f"{pictures.name}: {rule}; give --side to crop them all")
            parts.append([f.cpu() for f in net(torch.from_numpy(np.stack(x)).to(device))])
            bar.update(len(x))
    return *(torch.cat(part) for part in zip(*parts)), list(size)


said = set()


def read_file(path: Path, side: int | None) -> np.ndarray:
    """uint8 (3, H, W), as stored or cropped. Grey is repeated and alpha dropped, which is said once."""
    try:
        with Image.open(path) as picture:
            mode, whole = picture.mode, picture.convert("RGB")
            pixels = data.crop(whole, side) if side else np.asarray(whole).transpose(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a whole picture ({error}); remove it or make it again") from error
    if mode != "RGB" and mode not in said:
        said.add(mode)
        tqdm.write(f"note: {path} and more in mode {mode} are read as RGB, grey repeated, alpha dropped", sys.stderr)
    return pixels


def file_pictures(folder: Path, files: list[Path], side: int | None) -> Pictures:
    """Files in a folder. Their content is known by names, sizes and times of change: reading a million takes hours."""
    how = f"shorter side to {side}, centre crop, RGB" if side else "as stored, RGB"
    stamp = [(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    key = hashlib.sha256(json.dumps([stamp, how]).encode()).hexdigest()
    return Pictures(str(folder), len(files), lambda i: read_file(files[i], side), key, how)


def array_pictures(name, pixels: np.ndarray) -> Pictures:
    """uint8 (n, C, H, W) with one channel or three."""
    key = hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
    return Pictures(name, len(pixels), lambda i: np.broadcast_to(pixels[i], (3, *pixels.shape[2:])), key)


def open_pictures(path: str, side: int | None) -> Pictures:
    """A folder of pictures at any depth, or a data set of `data.open_data` that holds pixels."""
    folder, known = Path(path).expanduser(), ("train-images*-ubyte*", "data_batch_*.bin")
    named = path == "demo" or any(any(folder.glob(name)) for name in known)
    files = [] if named else sorted(f for f in folder.rglob("*") if f.suffix.lower() in data.PICTURES)
    if files:
        return file_pictures(folder, files, side)
    source = data.open_data(path)
    if not hasattr(source, "pixels") or side not in (None, source.pixels.shape[2]):
        raise UserError(f"{path}, --side {side}: only folders of pictures can be cropped, and only pictures compared")
    return array_pictures(path, source.pixels)


def open_npz(path: Path) -> tuple[Pictures | None, dict | None]:
    """Published reference batches: arr_0 (n, H, W, 3) uint8, statistics mu and sigma, or both."""
    try:
        with np.load(path) as archive:
            held = {k: archive[k] for k in ("mu", "sigma", "arr_0") if k in archive.files}
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--reference {path}: not a readable .npz of arrays ({error})") from error
    stats = {k: held[k].astype(np.float64) for k in ("mu", "sigma")} if {"mu", "sigma"} <= held.keys() else None
    images = held.get("arr_0")
    if images is None and stats is None:
        raise UserError(f"--reference {path}: holds neither mu and sigma nor arr_0")
    if images is not None and (images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8):
        raise UserError(f"--reference {path}: arr_0 is {images.dtype} {images.shape}, expected uint8 (n, H, W, 3)")
    return None if images is None else array_pictures(str(path), images.transpose(0, 3, 1, 2)), stats


def open_reference(a, net, tag, wanted: int) -> Reference:
    """The reference in any form, computed once: features lie in a.cache under content, preprocessing and weights.

    a.reference      what `open_pictures` or `open_npz` reads, or .safetensors from the cache.
    a.reference_num  use this many of its pictures, always the same ones; None = all.
    wanted           pictures to compare with it; fewer in the reference are an error, but for published statistics.
    """
    path, stats, known = Path(a.reference).expanduser(), None, None
    if path.suffix == ".safetensors":
        pictures = known = read_features(path, tag)
    elif path.suffix == ".npz":
        pictures, stats = open_npz(path)
    else:
        pictures = open_pictures(a.reference, a.side)
    if pictures is None:
        return Reference(str(path), 0, "unknown (statistics)", stats)
    n = pictures.n if a.reference_num is None else a.reference_num
    if known and n != known.n:
        raise UserError(f"--reference_num {n}: {path} holds features of {known.n} pictures; leave it out")
    if not 2 <= n <= pictures.n:
        raise UserError(f"--reference_num {n}: {pictures.name} holds {pictures.n} pictures; ask for 2 to {pictures.n}")
    if n < wanted and stats is None:
        way = f"ask for --num {n} or fewer, or give a larger one"
        raise UserError(f"--num {wanted}: the reference {pictures.name} has {n} pictures; {way}")
    if known:
        return known
    key = hashlib.sha256(json.dumps([pictures.key, pictures.preprocessing, n, EXTRACTOR, tag]).encode()).hexdigest()
    file = Path(a.cache) / f"{key[:16]}.safetensors"
    if not file.is_file():
        order = np.random.default_rng(0).permutation(pictures.n)[:n] if n < pictures.n else range(n)
        features, _, size = extract(net, replace(pictures, read=lambda i: pictures.read(order[i])), n, a.device)
        about = dict(name=pictures.name, n=n, preprocessing=pictures.preprocessing, size=size, weights=tag)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": features}, file.with_suffix(".tmp"), metadata={"reference": json.dumps(about)})
        os.replace(file.with_suffix(".tmp"), file)
    known = read_features(file, tag)
    return replace(known, name=pictures.name, stats=stats or known.stats)


def read_features(path: Path, tag) -> Reference:
    try:
        with safe_open(path, "pt") as file:
            features, about = file.get_tensor("features"), json.loads(file.metadata()["reference"])
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not cached features of a reference ({error})") from error
    if about.pop("weights") != tag:
        raise UserError(f"{path}: features of other weights than --inception gives; use those, or give the pictures")
    return Reference(**about, features=features, stats=fid_features_to_statistics(features))


def metrics(features, scores, reference: Reference, device) -> dict:
    """FID; KID, precision and recall where the reference has features; Inception Score where there is a classifier."""
    mine, other, out = fid_features_to_statistics(features), reference.stats, dict.fromkeys(METRICS)
    if mine["mu"].shape != other["mu"].shape:
        raise UserError(f"{reference.name}: statistics of {len(other['mu'])} features, not {len(mine['mu'])}")
    mine["mu"] = mine["mu"].astype(other["mu"].dtype)
    out["FID"] = fid_statistics_to_metric(mine, other, False)["frechet_inception_distance"]
    if reference.features is not None:
        fewest = min(len(features), reference.n)
        subset = 1000 if fewest >= 1000 else fewest // 2                        # of all of them, the sd would be 0
        got = metric_kid.kid_features_to_metric(features, reference.features, kid_subset_size=subset, verbose=False)
        out |= {"KID": got["kernel_inception_distance_mean"], "KID sd": got["kernel_inception_distance_std"]}
        pair = features.to(device), reference.features.to(device)
        out |= metric_prc.prc_features_to_metric(*pair, save_cpu_ram=True, verbose=False)
        del out["f_score"]
    if scores is not None and scores.any():                                     # all zero where there is no classifier
        out["IS"] = metric_isc.isc_features_to_metric(scores)["inception_score_mean"]
    return out


METRICS = "FID", "KID", "KID sd", "precision", "recall", "IS"


def floor(reference: Reference, n: int, device) -> dict:
    """Real against real: n pictures of the reference against the others, or half of it where it has less than 2 n."""
    n, order = min(n, reference.n // 2), torch.randperm(reference.n, generator=data.rng(0))
    rest = reference.features[order[n:]]
    others = replace(reference, n=len(rest), features=rest, stats=fid_features_to_statistics(rest))
    return dict(n=n) | metrics(reference.features[order[:n]], None, others, device)


# ---------------------------------------------------------------------------------------------------------------------
# fid: rows


def folder_rows(a):
    """The one row of --images, as `sampled_rows` gives them."""
    pictures = open_pictures(a.images, a.side)
    n, size = pictures.n if a.num is None else a.num, list(pictures.read(0).shape[1:])
    if not 10 <= n <= pictures.n:
        raise UserError(f"--num {n}: {a.images} holds {pictures.n} pictures; ask for 10 to {pictures.n}")
    rows = [(dict(row=Path(a.images).name[-23:], steps=None, NFE=None), dict(images=a.images, size=size), pictures)]
    return n, size, Path(a.cache if a.images == "demo" else a.images), rows


def sampled_rows(a):
    """A row per guidance and number of steps, its pictures drawn when it is asked for.

    returns  number of pictures a row, their [height, width], folder for results, and the rows: what the table shows of
             one, what it is recorded with, and its Pictures. Samples lie in a folder that names all they depend on, so
             what is there is not drawn again and nothing stale is scored.
    """
    n = 50000 if a.num is None else a.num
    if n < 10:
        raise UserError(f"--num {n}: at least 10 pictures")
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(days=1))              # rank 0 scores while the others sample
        if a.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    model, row, config, results, about = open_network(a)
    guidances = a.guidance or [config["train"]["guidance"]]
    if set(guidances) != {1} and not config["train"]["drop"]:
        raise UserError(f"--guidance {guidances}: the run had --drop 0 and knows no condition to guide from; use 1")
    if min(a.steps) < 1 or not 0 <= a.interval[0] <= a.interval[1] <= 1:
        raise UserError(f"--steps {a.steps}, --interval {a.interval}: steps from 1; rising fractions within 0 and 1")
    decode, classes = data.decoder(config["data"], a.device, a.autoencoder), range(len(config["data"]["classes"]))
    size = [side * decode.factor for side in config["data"]["shape"][1:]]
    weights = results / f"{config['step']}_{about['weights'][:8]}"
    way = f"{a.precision}_{a.interval[0]:g}_{a.interval[1]:g}{'_strict' * a.strict_interval}"

    def rows():
        for g, k in itertools.product(guidances, a.steps):
            options, trace = dict(guidance=g, interval=a.interval, strict=a.strict_interval), []
            sample.latents(model, row, config, [0], a.seed, k, classes, trace=trace, **options)
            folder = weights / f"seed{a.seed}_guidance{g:g}_{way}" / f"steps_{k}"
            job = argparse.Namespace(num=n, out=str(folder), steps=[k], batch=a.batch, seed=a.seed, save_latents=False)
            with contextlib.redirect_stdout(sys.stderr):
                sample.many(model, row, config, job, about["checkpoint"], list(classes), options, decode)
            if dist.is_initialized():
                dist.barrier()
            shown = dict(row=f"guidance {g:g}", steps=k, NFE=sum(passes for _, _, passes in trace))
            files = [folder / f"{i:06}.png" for i in range(n)]
            yield shown, about | options | dict(size=size), file_pictures(folder, files, None)

    return n, size, results, rows()


def score(a, n: int, size: list, results: Path, rows) -> list[dict]:
    """The table of `rows` against --reference, each row written to eval.jsonl as soon as it is known."""
    net, tag = load_extractor(a.inception, a.device)
    reference = open_reference(a, net, tag, n)
    if reference.size and size != reference.size:
        rule = f"pictures are {size}, those of the reference {reference.size} (height, width)"
        raise UserError(f"{rule}; give --side to crop folders to one size, or another reference")
    about = dict(n=n, reference=reference.name, reference_n=reference.n, preprocessing=reference.preprocessing)
    about |= dict(inception=tag, torch_fidelity=torch_fidelity.__version__)

    def scored():
        if reference.features is not None:
            about["floor"] = real = floor(reference, n, a.device)
            yield dict(row=f"real, n = {real['n']}", steps=None, NFE=None) | {k: real[k] for k in METRICS}
        for shown, how, pictures in rows:
            features, scores, _ = extract(net, pictures, n, a.device)
            got = shown | metrics(features, scores, reference, a.device)
            append(results / "eval.jsonl", how | got | about)
            yield got

    title = f"n = {n}; reference {reference.name}: {reference.n or '?'} pictures, {reference.preprocessing}.\n"
    title += "Figures at another n do not compare with these. First row: real against real, the floor."
    if reference.n < 2 * n:
        title += f"\nThe reference has less than 2 x {n}: the floor is unknown, or of fewer pictures and too high."
    got = table(title, scored())
    if curve := [row for row in got if row["NFE"]]:
        draw_curve(curve, n, results / "fid.png")
    print(f"{results / 'eval.jsonl'}: {len(got) - ('floor' in about)} more records")
    return [dict(n=n) | row for row in got]


def fid(a):
    """Pictures of a network or of --images against a reference. Under torchrun all ranks draw and the first scores."""
    if a.per_category:
        return by_category(a)
    n, size, results, rows = folder_rows(a) if a.images else sampled_rows(a)
    first = not dist.is_initialized() or dist.get_rank() == 0
    got = score(a, n, size, results, rows) if first else list(rows)
    if dist.is_initialized():
        dist.destroy_process_group()
    return got


def by_category(a):
    """`fid` of a folder of folders (MJHQ-30K), as a whole and each against the reference's folder of that name."""
    images, reference = Path(a.images or ""), Path(a.reference)
    names = sorted(p.name for p in images.iterdir() if p.is_dir()) if a.images and images.is_dir() else []
    if not names or a.num is not None:
        raise UserError(f"--per_category goes with --images FOLDER of folders, without --num; {images} has none")
    if missing := [name for name in names if not (reference / name).is_dir()]:
        raise UserError(f"--reference {reference}: has no folder {missing[0]} as --images has; leave it out of both")
    rows = []
    for name in ("", *names):
        job = dict(images=str(images / name), reference=str(reference / name), per_category=False)
        *_, got = fid(argparse.Namespace(**vars(a) | job))
        rows.append(dict(category=name or "all", n=got["n"]) | {k: got[k] for k in METRICS})
    table(f"{images} against {reference}, by category. Few pictures have a high FID: compare at one n", rows)


def draw_curve(rows, n, path: Path) -> None:
    """FID over NFE, a line per guidance, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["row"] for row in rows):
        points = sorted((row["NFE"], row["FID"]) for row in rows if row["row"] == name)
        axes.plot(*zip(*points), "o-", label=name)
    axes.legend()
    axes.set(xscale="log", yscale="log", xlabel="network evaluations per picture", ylabel=f"FID, n = {n}")
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------------------------------------------------------------
# consistency

LENGTHS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # bins of (t - r), as shares of the row's range


def identity(model, row, x, eps, t, s, r, y) -> dict:
    """Errors of an any-step network at t >= s >= r, each (B,).

    jump    |x_{t->r} - x_{t->s->r}| over |x_{t->r} - x_t|: one jump against two. 0 for a perfect network.
    own     |f - target| over |f|, the target on the path that the network itself follows at t, (x, eps) solved from
            f(x_t, t, t), so that no noise of the data is in it. 0 for a perfect network.
    target  mean square of f - target as trained on, x and eps of the data: a perfect network keeps their variance.
    """
    net, size = sample.see(model, row), lambda v: v.flatten(1).norm(dim=1).clamp(min=1e-12)
    x_t = transition.interpolate(row, x, eps, t)
    f = net(x_t, t, r, y)
    direct = transition.step(row, x_t, f, t, r)
    x_s = transition.step(row, x_t, net(x_t, t, s, y), t, s)
    composed = transition.step(row, x_s, net(x_s, s, r, y), s, r)
    gaps = []
    for pair in (transition.solve(row, x_t, net(x_t, t, t, y), t), (x, eps)):
        df_dt = transition.exact_derivative(net, row, *pair, t, r, y)
        gaps.append(f - transition.transition_target(row, *pair, t, r, df_dt))
    jump = size(direct - composed) / size(direct - x_t)
    return dict(jump=jump, own=size(gaps[0]) / size(f), target=gaps[1].square().flatten(1).mean(1))


def derivative_errors(model, row, x, eps, t, r, y):
    """Relative error of df/dt by `finite_difference` over h, against forward-mode autodiff in float64, a row per h.

    fp64 shows truncation alone, fp32 and bf16 (attention and MLP) what rounding adds: the choice of h.
    """
    single, double = (x, eps, t, r), [v.double() for v in (x, eps, t, r)]
    ways = dict(fp64=(copy.deepcopy(model).double(), double), fp32=(model, single))
    ways["bf16"] = lower_precision(copy.deepcopy(model)), single
    ways = {name: (sample.see(net, row), row, *inputs, y) for name, (net, inputs) in ways.items()}
    exact = transition.exact_derivative(*ways["fp64"])
    for h in (0.001, 0.005, 0.01, 0.02, 0.05):
        gaps = {name: transition.finite_difference(*way, h) - exact for name, way in ways.items()}
        yield dict(h=f"{h:g}") | {name: float(gap.norm() / exact.norm()) for name, gap in gaps.items()}


@torch.no_grad()
def consistency(a):
    model, row, config, results, about = open_network(a)
    spec, span = config["data"], row.t_max - row.t_min
    if a.num < 1:
        raise UserError(f"--num {a.num}: at least 1 picture a row")
    source = data.open_data(trained_on(a, config), spec["shape"], len(spec["classes"]))
    together = data.same_shape(source)

    def draw(index, rng, numbers):
        """Pictures and labels number `index`, and the noise of samples number `numbers`: x, eps, y."""
        x, y = (torch.from_numpy(v).to(a.device) for v in (source.read(index, rng), source.labels[index]))
        return x, sample.initial_noise(x.shape[1:], a.seed, numbers, a.device), y

    def bins():
        for low, high in itertools.pairwise(LENGTHS):
            parts = []
            for numbers in chunks(a.num, a.batch):
                n, rng = len(numbers), np.random.default_rng((a.seed, numbers.start))
                x, eps, y = draw(together[rng.integers(len(together), size=n)], rng, numbers)
                length = span * (low + (high - low) * rng.random(n))
                late = row.t_min + length + (span - length) * rng.random(n)     # so that r >= t_min
                times = late, late - length * rng.random(n), late - length
                times = (torch.from_numpy(v).float().clamp(row.t_min, row.t_max).to(a.device) for v in times)
                parts.append(identity(model, row, x, eps, *times, y))
            jump, own, target = (torch.cat([p[k] for p in parts]) for k in ("jump", "own", "target"))
            middle = dict(jump=float(jump.median()), own=float(own.median()), target=float(target.mean()))
            yield dict(length=f"{low:g} to {high:g}") | middle

    title = f"{a.num} pictures a row, length t - r as share of the range; medians, of the last column the mean\n"
    title += "jump: t -> r against t -> s -> r; own: f against its target on its own path; target: on the data's"
    got = table(title, bins())
    n = min(a.num, a.batch, len(together))
    x, eps, y = draw(together[:n], np.random.default_rng(a.seed), range(n))
    times = row.t_min + span * torch.rand(2, n, generator=data.rng(a.seed), dtype=torch.float64)
    t, r = times.sort(0, descending=True).values.float().to(a.device)
    rows = derivative_errors(model, row, x, eps, t, r, y)
    errors = table("relative error of df/dt by difference, by its half width h", rows)
    append(results / "consistency.jsonl", about | dict(n=a.num, table=got, derivative=errors))
    print(f"{results / 'consistency.jsonl'}: 1 more record")


# ---------------------------------------------------------------------------------------------------------------------
# clip


@torch.no_grad()
def clip(a):
    """100 max(cosine, 0) between each picture and its caption, averaged."""
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError as error:
        raise UserError("clip needs the package transformers; install it with `pip install transformers`") from error
    folder = Path(a.images)
    form = 'a captions.jsonl with {"file": ..., "caption": ...} a line'
    try:
        lines = [json.loads(line) for line in (folder / "captions.jsonl").open("rb") if line.strip()]
        pairs = [(folder / line["file"], line["caption"]) for line in lines][: a.num]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--images {folder}: expected {form} ({error!r})") from error
    if len(pairs) < (a.num or 1) or a.batch < 1:
        raise UserError(f"--num {a.num}, --batch {a.batch}: {folder} holds {len(pairs)} captions")
    try:
        model, processor = (kind.from_pretrained(a.model) for kind in (CLIPModel, CLIPProcessor))
    except (OSError, ValueError) as error:
        raise UserError(f"--model {a.model}: {str(error).splitlines()[0]}; give a hub name or a folder") from error
    model.to(a.device).eval()
    scores = []
    for numbers in tqdm(chunks(len(pairs), a.batch), unit="batch"):
        files, captions = zip(*(pairs[i] for i in numbers))
        pixels = [read_file(f, None) for f in files]
        fed = processor(text=list(captions), images=pixels, return_tensors="pt", padding=True, truncation=True)
        out = model(**fed.to(a.device))
        scores.append(100 * F.cosine_similarity(out.image_embeds, out.text_embeds).clamp(min=0).cpu())
    score, n = torch.cat(scores), len(pairs)
    error = float(score.std() / n**0.5) if n > 1 else None
    got = dict(images=folder.name[-23:], CLIP=float(score.mean()), error=error, n=n)
    table("CLIP score, with its standard error", [got])
    append(folder / "eval.jsonl", got | dict(images=a.images, model=a.model))


# ---------------------------------------------------------------------------------------------------------------------
# captions

COLOURS = dict(  # word: what most pixels of such a picture look like, here those of the font's hearts
    red=(244, 67, 54), orange=(255, 152, 0), yellow=(255, 204, 50), green=(124, 179, 66), blue=(25, 118, 210),
    purple=(171, 71, 188), pink=(255, 148, 189), brown=(183, 109, 84), black=(66, 66, 66), grey=(147, 147, 147),
    white=(224, 224, 224),
)  # fmt: skip


def glance(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (n, H, W, C) -> (n, 64 C): the picture in 8 x 8 cells, what the nearest real picture is measured by."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return F.adaptive_avg_pool2d(x, 8).flatten(1)


def dominant_colours(pictures: np.ndarray) -> list[str]:
    """The word of COLOURS that is nearest to most pixels of each, not counting a near-white background."""
    x = torch.from_numpy(pictures).float().flatten(1, 2).expand(-1, -1, 3)      # (n, H W, 3), also of grey
    word = torch.cdist(x, torch.tensor(list(COLOURS.values()), dtype=torch.float32)).argmin(2)
    votes = (F.one_hot(word, len(COLOURS)) * (x.amin(2) < 240)[..., None]).sum(1)
    return [list(COLOURS)[k] if n else "white" for n, k in zip(*(v.tolist() for v in votes.max(1)))]


def caption_scores(pictures, own, real, others=False) -> dict:
    """How well pictures agree with the captions of the real pictures number `own`.

    real    (glances, names, groups) of all real pictures. others: the nearest may not be the own one.
    name    the nearest real picture bears the prompt's name; ten: one of the ten nearest does
    colour  of prompts with a word of COLOURS, the dominant colour is that; n: how many pictures these are
    group   the nearest real picture is of the prompt's group
    """
    glances, names, groups = real
    distance = torch.cdist(glance(pictures), glances)
    if others:
        distance[torch.arange(len(own)), torch.as_tensor(own)] = math.inf
    nearest = distance.topk(min(10, len(names)), largest=False).indices.tolist()
    words = [(set(re.findall(r"\w+", names[i].lower())) & COLOURS.keys()) for i in own]
    agree = [colour in word for colour, word in zip(dominant_colours(pictures), words) if word]
    share = lambda hits: sum(hits) / len(hits) if hits else None
    return dict(
        name=share([names[near[0]] == names[i] for near, i in zip(nearest, own)]),
        ten=share([names[i] in [names[k] for k in near] for near, i in zip(nearest, own)]),
        colour=share(agree), n=len(agree),
        group=share([groups[near[0]] == groups[i] for near, i in zip(nearest, own)]) if any(groups) else None,
    )  # fmt: skip


@torch.no_grad()
def captions(a):
    """Are prompts followed? Sampled pictures against the real ones, seen and held-out names apart."""
    model, row, config, results, about = open_network(a, text=True)
    if a.num < 1 or min(a.steps) < 1:
        raise UserError(f"--num {a.num}, --steps {a.steps}: at least 1 each")
    spec, place = config["data"], trained_on(a, config)
    guidance = config["train"]["guidance"] if a.guidance is None else a.guidance
    decode, chance = data.decoder(spec, a.device, a.autoencoder), np.random.default_rng(0)
    sets = {"seen": data.open_data(place, spec["shape"])}
    if place == "emoji":
        sets["held out"] = data.emoji(held_out=True)
    pictures, names, groups, spans = [], [], [], {}
    for name, source in sets.items():
        index = data.same_shape(source)
        index = index[np.linspace(0, len(index) - 1, min(len(index), 5000)).astype(int)]
        parts = filter(len, np.array_split(index, 50))
        pictures += [decode(torch.from_numpy(source.read(few, chance))) for few in parts]
        spans[name] = range(len(names), len(names) + len(index))
        names += [source.captions[k] for k in source.captions.draw(source.labels[index], chance)]
        groups += [source.records[i][2] for i in index] if hasattr(source, "records") else [""] * len(index)
    pictures = np.concatenate(pictures)
    real = glance(pictures), names, groups

    def rows():
        for part, span in spans.items():
            own = [span[k] for k in np.linspace(0, len(span) - 1, min(len(span), a.num)).astype(int)]
            other = [own[k - len(own) // 2] for k in range(len(own))]           # pictures of other captions
            yield dict(row=f"{part}: random caption", steps=None) | caption_scores(pictures[other], own, real)
            texts = sample.encode_prompts([names[i] for i in own], config, a.device, a.text_encoder)
            prompts, options = range(len(own)), dict(guidance=guidance, texts=texts, decode=decode)
            for k in a.steps:
                draw = lambda numbers: sample.images(model, row, config, numbers, a.seed, k, prompts, **options)
                drawn = np.concatenate([draw(numbers) for numbers in chunks(a.num, a.batch)])
                got = caption_scores(drawn, [own[i % len(own)] for i in range(a.num)], real)
                yield dict(row=part, steps=k) | got
            yield dict(row=f"{part}: nearest other", steps=None) | caption_scores(pictures[own], own, real, others=True)
            yield dict(row=f"{part}: real", steps=None) | caption_scores(pictures[own], own, real)

    title = f"{a.num} pictures a row at guidance {guidance:g}, nearest of {len(names)} real ones of {place} in 8 x 8\n"
    title += "name: of the nearest, ten: of the ten nearest; colour: dominant, of n with one's name; group: nearest's"
    got = table(title, rows())
    append(results / "eval.jsonl", about | dict(captions=got, n=a.num, guidance=guidance, data=place))
    print(f"{results / 'eval.jsonl'}: 1 more record")


# ---------------------------------------------------------------------------------------------------------------------
# speed


def forward_flops(model: TiM, tokens: int, caption: int = 0) -> tuple[int, int]:
    """Useful FLOPs of one forward of one picture, counted from the architecture: (linear layers, attention products).

    tokens, caption  numbers of picture and caption tokens. A layer works on the tokens it sees; embeddings, modulation
    and interval projection see one row a picture. Norms, gates and softmax are not counted, as is the custom.
    """
    linear = 2 * tokens * model.x_embedder.proj.weight.numel()
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and not name.startswith("projector"):
            single = any(part in name for part in ("adaLN", "qkv_d", "t_embedder", "delta_embedder"))
            rows = caption if "cross_attn.kv" in name or "y_embedder" in name else 1 if single else tokens
            twice = name.startswith("t_embedder") and model.delta_embedder is None
            linear += 2 * rows * layer.weight.numel() * (2 if twice else 1)
    width = model.head * model.blocks[0].attn.heads
    return linear, len(model.blocks) * 4 * tokens * (tokens + caption) * width


def peak_memory(action, device) -> float:
    """MiB that action() allocates beyond what was there."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        action()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.autograd.profiler.profile(profile_memory=True) as profile:       # the allocator's own events
        action()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return float(held.max(initial=0)) / 2**20


def measure(actions, device, repeats: int, limit: float = 20.0) -> list[tuple[float, float]]:
    """Median seconds of each action() after warm-up, and its `peak_memory`; nan where the device has too little of it.

    They take turns, so that what else the machine does falls on all alike: at least one turn, at most `repeats`, none
    begun after `limit` seconds per action.
    """
    actions, peaks, turns = list(actions), [], []
    for i, action in enumerate(actions):
        try:
            action()
            peaks.append(peak_memory(action, device))
        except torch.OutOfMemoryError:
            actions[i] = None
            peaks.append(math.nan)

    def clock():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    begin = clock()
    while not turns or len(turns) < repeats and clock() - begin < limit * len(actions):
        turns.append([])
        for action in actions:
            start = clock()
            action and action()
            turns[-1].append(clock() - start if action else math.nan)
    return list(zip(map(statistics.median, zip(*turns)), peaks))


def matmul_rates(model, rows: int, repeats: int) -> dict:
    """FLOP/s of plain matrix products in the type of `model`: at the shapes of one block on `rows` tokens, and at a
    large square."""
    block, like = model.blocks[0], model.blocks[0].attn.qkv.weight
    layers = block.attn.qkv, block.attn.proj, block.mlp.fc1_g, block.mlp.fc1_x, block.mlp.fc2
    shapes = [(rows, layer.in_features, layer.out_features) for layer in layers]
    side, out = 8192 if like.is_cuda else 2048, {}
    for name, sizes in (("shapes", shapes), ("square", [(side, side, side)])):
        normal = lambda *size: torch.randn(*size, device=like.device).to(like.dtype)
        pairs = [(normal(m, k), normal(n, k)) for m, k, n in sizes]
        ((seconds, _),) = measure([lambda pairs=pairs: [F.linear(p, w) for p, w in pairs]], like.device, repeats)
        out[name] = sum(2 * m * k * n for m, k, n in sizes) / seconds
    return out


def attention_kernel(net, inputs) -> str:
    """The kernel that torch chose for attention, by its profile of one pass of `net`(*inputs) without gradients."""
    with torch.no_grad(), torch.profiler.profile() as profile:
        net(*inputs)
    names = {e.key.removeprefix("aten::_scaled_dot_product_") for e in profile.key_averages()}
    return ", ".join(sorted(n for n in names if n.startswith(("flash", "efficient", "cudnn", "fused", "attention"))))


def plain_jvp(net, row, x, eps, t, r, y):
    """df/dt by torch.func.jvp as one would write it down: attention as plain products and, because gradients are on
    (nothing here asks for any), torch's own rules instead of the network's."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        path = lambda s: net(transition.interpolate(row, x, eps, s), s, r, y)
        return torch.func.jvp(path, (t,), (torch.ones_like(t),))[1]


def setting(cfg, device):
    """What a configuration leaves to the data and the text encoder, looked up where it does.

    returns  shape (C, H, W) of the data; tokens of a caption (0: classes); arguments of TiM; and where there are
             captions sample.Texts of one, noise instead of an encoder's features, as only the time counts.
    """
    shape, classes, length, caption = (cfg.channels, cfg.side, cfg.side), cfg.classes, 256, cfg.caption
    if not (all(shape) and (classes or caption)):
        spec = data.open_data(cfg.data, shape, classes).spec
        shape, classes = tuple(spec["shape"]), len(spec["classes"])
    if not (classes or caption):
        length, caption = (sample.load_text_encoder(cfg.text_encoder)[1][k] for k in ("length", "width"))
    network = train.network_of(cfg, shape, classes, caption=caption)
    if not caption:
        return shape, 0, network, None
    encode = lambda texts: (torch.randn(len(texts), length, caption), torch.ones(len(texts), length, dtype=torch.bool))
    return shape, length, network, sample.Texts(data.Captions([["noise"]]), encode, device)


def derivative_rows(exact_net, net, row, h, inputs, repeats):
    """The paper's Table 2 on the samples with r < t: `net` computes as training does, `exact_net` in fp32."""
    parts = zip(*(v.split(32) for v in inputs))                                 # its attention takes memory
    exact = torch.cat([transition.exact_derivative(exact_net, row, *part) for part in parts])
    halves = lambda *args: torch.cat([net(*half) for half in zip(*(v.chunk(2) for v in args))])
    ways = {
        "DDE, one pass": lambda: transition.finite_difference(net, row, *inputs, h),
        "DDE, two passes": lambda: transition.finite_difference(halves, row, *inputs, h),
        "JVP, torch.func.jvp": lambda: plain_jvp(net, row, *inputs),
        "JVP, exact_derivative": lambda: transition.exact_derivative(net, row, *inputs),
    }
    for (name, way), (seconds, peak) in zip(ways.items(), measure(ways.values(), exact.device, repeats)):
        with FlopCounterMode(display=False) as counter:
            error = math.nan if math.isnan(seconds) else float((way() - exact).norm() / exact.norm())
        yield dict(derivative=name, ms=1e3 * seconds, GFLOPs=counter.get_total_flops() / 1e9, MiB=peak, error=error)


def training_rows(cfg, network, row, h, flops, rates, bf16, x, y, repeats, texts):
    """A whole update, built and sharded as train.py does. Peak memory has weights, average and moments in it."""
    (linear, attention), forward = flops, sum(flops)
    free = len(x) - transition.diffusion_count(len(x), cfg.share_diffusion)
    plain = replace(cfg, guide_gt=1.0, guide_cond=0.0)
    model, ema, optimizer = train.build(cfg, network, x.device, bf16)
    kept = 16 * sum(p.numel() for p in model.parameters()) / 2**20              # four tensors of fp32
    arms = {  # name: (configuration, useful FLOPs beside the forward and backward of the batch)
        "diffusion only": (replace(plain, share_diffusion=1.0, share_consistency=0.0), 0),
        "DDE": (replace(plain, derivative="dde"), 2 * free * forward),
        "JVP": (replace(plain, derivative="jvp"), free * (2 * linear + 3 * attention)),
        "DDE + model guidance": (replace(plain, derivative="dde", guide_cond=0.75), 2 * (free + len(x)) * forward),
    }

    def update(arm):
        loss, *_ = train.objective(model, ema, row, arm, h, x, y, data.rng(0, 0, device=x.device), texts=texts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), arm.clip)
        optimizer.step()
        optimizer.zero_grad()
        train.update_average(ema, model, 0.999)

    costs = measure([lambda arm=arm: update(arm) for arm, _ in arms.values()], x.device, repeats)
    for (name, (_, extra)), (seconds, peak) in zip(arms.items(), costs):
        useful = 3 * len(x) * forward + extra
        cost = {"ms": 1e3 * seconds, "x diffusion": seconds / costs[0][0], "images/s": len(x) / seconds}
        shares = {f"of {k}": useful / seconds / rate for k, rate in rates.items()}
        yield dict(step=name) | cost | {"MiB": kept + peak, "GFLOPs": useful / 1e9} | shares


def sampling_inputs(shape, n: int, texts, device):
    """Noise and condition of n pictures."""
    y = torch.zeros(n, dtype=torch.int64, device=device)
    return sample.initial_noise(shape, 0, range(n), device), texts(y) if texts else y


def sampling_rows(models, row, z, y, steps, flops, rates, repeats):
    """Noise to network space. models, rates: of "fp32" and, where it is known, of "bf16"."""
    for name, guidance, k in itertools.product(models, (1.0, 1.5), steps):
        trace = []
        run = lambda: sample.generate(models[name], row, z, y, k, guidance, null=y, trace=trace)
        ((seconds, _),) = measure([run], z.device, repeats)
        nfe = sum(passes for _, _, passes in trace[:k])
        speed = {"ms": 1e3 * seconds, "images/s": len(z) / seconds}
        share = {"of shapes": len(z) * nfe * sum(flops) / seconds / rates[name]["shapes"]}
        yield dict(sampling=f"{name}, guidance {guidance:g}", steps=k, NFE=nfe) | speed | share


def decoding_rows(autoencoder: str, shape, batch: int, device, repeats):
    """Latents to pixels on the host, as sample.py decodes them."""
    decode = data.decoder(dict(kind="latents", autoencoder=autoencoder, shape=shape, scale=1.0, shift=0.0), device)
    z = torch.randn(batch, *shape, device=device)
    ((seconds, peak),) = measure([lambda: decode(z)], device, repeats)
    yield {"decoding": f"{autoencoder[-20:]}, fp32", "ms": 1e3 * seconds, "images/s": batch / seconds, "MiB": peak}


def resolution_rows(a, cfg, device):
    """Time and memory of one unguided picture by its side and NFE, computed from shapes; on a GPU measured as well."""
    cuda, factor = device.type == "cuda", data.FACTORS.get(cfg.autoencoder, 1)
    (channels, *_), length, network, texts = setting(cfg, device)
    row = transition.TRANSPORTS[cfg.transport]
    with torch.device(device if cuda else "meta"):
        model = TiM(**network).requires_grad_(False)
    if cfg.precision != "fp32":
        lower_precision(model)
    for side in a.sizes:
        if side % (factor * cfg.patch):
            raise UserError(f"--sizes {side}: must be a multiple of {factor * cfg.patch}, pixels per place x patch")
        shape, tokens = (channels, side // factor, side // factor), (side // factor // cfg.patch) ** 2
        linear, attention = forward_flops(model, tokens, length)
        need = sample.memory_needed(model, shape, 1, factor)
        for n in a.steps:
            flops = n * (linear + attention)
            got = dict(pixels=f"{side} x {side}", tokens=tokens, NFE=n, TFLOPs=flops / 1e12)
            got |= {"attention": attention / (linear + attention), f"s at {a.tflops:g}T": flops / a.tflops / 1e12}
            got |= {"GiB": need["weights"] + need["network"], "s measured": None, "GiB measured": None}
            if cuda:
                z, y = sampling_inputs(shape, 1, texts, device)
                run = lambda: sample.generate(model, row, z, y, n, null=y)
                ((got["s measured"], peak),) = measure([run], device, a.repeats)
                got["GiB measured"] = need["weights"] + peak / 1024
            yield got


def speed_tables(a, cfg, device) -> dict:
    """Four tables of one network: derivative, update, sampling, decoding; returned with what they were measured on."""
    torch.manual_seed(cfg.seed)
    shape, length, network, texts = setting(cfg, device)
    row, n, cuda = transition.TRANSPORTS[cfg.transport], cfg.batch, device.type == "cuda"
    model = TiM(**network).to(device).requires_grad_(False)
    for p in model.parameters():
        if not p.any():                                                         # an output of zero has no derivative
            torch.nn.init.normal_(p, std=0.02)
    models, bf16 = {"fp32": model}, cfg.precision == "bf16" or (cfg.precision == "auto" and cuda)
    if bf16 or cuda or device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        models["bf16"] = lower_precision(copy.deepcopy(model))
    if cfg.compile:
        for block in (block for model in models.values() for block in model.blocks):
            block.compile()
    nets, kind = {k: sample.see(model, row, texts) for k, model in models.items()}, "bf16" if bf16 else "fp32"
    h, tokens = train.difference_width(cfg, bf16), shape[1] * shape[2] // cfg.patch**2
    flops, size = forward_flops(model, tokens, length), sum(p.numel() for p in model.parameters())
    name = torch.cuda.get_device_name(device) if cuda else f"{device.type}, {torch.get_num_threads()} threads"
    print(f"{cfg.name}: {size:,} parameters, {tokens} tokens, {sum(flops) / 1e9:.4g} GFLOPs a picture, on {name}")
    rates = {k: matmul_rates(model, n * tokens, a.repeats) for k, model in models.items()}
    for k, rate in rates.items():
        of = " and ".join(f"{v / 1e9:.5g} GFLOP/s at the {which}" for which, v in rate.items())
        print(f"matmul in {k}: {of} (of the network, large)")

    rng = data.rng(cfg.seed, device=device)
    x, eps = torch.randn(2, n, *shape, generator=rng, device=device)
    y = torch.randint(network.get("classes", 1), (n,), generator=rng, device=device)
    how = cfg.share_diffusion, cfg.share_consistency, rng, cfg.time_mean, cfg.time_std, 1.0, cfg.diffusion_at
    t, r = transition.sample_times(row, n, *how)
    out = dict(device=name, parameters=size, tokens=tokens, flops=sum(flops), matmul=rates, h=h)
    out["attention"] = {k: attention_kernel(net, (x, t, r, y)) for k, net in nets.items()}
    print("attention in " + "; ".join(f"{k}: {kernel}" for k, kernel in out["attention"].items()))
    free = slice(transition.diffusion_count(n, cfg.share_diffusion), None)
    if len(x[free]):
        title = f"df/dt of {len(x[free])} pictures in {kind}, h {h:g}. FLOPs by torch's counter, error to fp32 JVP"
        inputs = [v[free] for v in (x, eps, t, r, y)]
        out["derivative"] = table(title, derivative_rows(nets["fp32"], nets[kind], row, h, inputs, a.repeats))
    title = f"An update on {n} pictures in {kind}, compile {cfg.compile}. Useful FLOPs, their share of the matmul rates"
    rows = training_rows(cfg, network, row, h, flops, rates[kind], bf16, x, y, a.repeats, texts)
    out["training"] = table(title, rows)
    count = a.sample_batch or (n if cuda else min(n, 16))
    rows = sampling_rows(models, row, *sampling_inputs(shape, count, texts, device), a.steps, flops, rates, a.repeats)
    out["sampling"] = table(f"Sampling, {count} pictures at a time, no decoding", rows)
    try:
        rows = decoding_rows(cfg.autoencoder, shape, count, device, a.repeats) if cfg.autoencoder else ()
        out["decoding"] = rows and table(f"Decoding, {count} pictures at a time", rows)
    except UserError as error:
        print(f"\nDecoding was not measured: {error}")
    return out


def speed(a, *rest):
    """Tables of one network in one run; every flag of train.py, in `rest`, changes it."""
    cfg, _ = train.parse_config(["--config", a.config, *rest])
    device = train.connect(cfg.device)
    try:
        if a.sizes:
            title = f"{cfg.size}/{cfg.patch}, one picture, without decoding; computed at {a.tflops:g} TFLOP/s"
            out = dict(rows=table(title, resolution_rows(a, cfg, device)))
        else:
            out = speed_tables(a, cfg, device)
    finally:
        dist.destroy_process_group()
    path = Path(a.out or Path(cfg.runs) / f"{'resolution' if a.sizes else 'speed'}_{cfg.name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(config=asdict(cfg)) | out | provenance(), indent=1))
    print(f"\n{path}")


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_arguments(argv=None):
    """The arguments, and what is left over for train.py's own parser under `speed`."""
    shape = dict(allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    p = argparse.ArgumentParser(description=__doc__, **shape)
    commands, gpu = p.add_subparsers(dest="command", required=True), torch.cuda.is_available()

    def add(name, text, network=True):
        arg = commands.add_parser(name, help=text, description=text, **shape).add_argument
        if network:
            arg("--checkpoint", help="run folder or file (default: the newest under runs/)")
            arg("--seed", type=int, default=0, help="of the noise (default 0)")
            arg("--precision", choices=("fp32", "bf16"), default="bf16" if gpu else "fp32",
                help="of attention and MLP (default: bf16 on cuda)")  # fmt: skip
        if name != "speed":
            arg("--device", default="cuda" if gpu else "cpu", help="default: cuda, else cpu")
            arg("--batch", type=int, default=100, help="pictures per pass (default 100)")
        return arg

    arg = add("fid", "FID, KID, precision, recall and Inception Score over the number of steps")
    arg("--reference", required=True, help="folder of pictures, demo, folder of a data set, .npz, or cached features")
    arg("--reference_num", type=int, help="use so many of its pictures (default: all)")
    arg("--images", help="score this folder of pictures instead of sampling")
    arg("-n", "--num", type=int, help="pictures to score (default: 50000, or all of --images); behind torchrun\n"
        "write -n, as it takes --num for its own --numa_binding")  # fmt: skip
    arg("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128], help="a row each (default 1 2 4 .. 128)")
    arg("--guidance", type=float, nargs="+", help="1 = off, several make a sweep (default: what the run says)")
    arg("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
        help="guide only at these times, as fractions of the range, ends included (default 0 1)")  # fmt: skip
    arg("--strict_interval", action="store_true", help="leave the ends of the interval out")
    arg("--per_category", action="store_true", help="--images and --reference hold folders (MJHQ-30K): each, too")
    arg("--side", type=int, help="crop pictures of folders to so many pixels (default: as stored)")
    arg("--autoencoder", help="place of the autoencoder, for latents (default: what the checkpoint names)")
    arg("--inception", help="weights in torch-fidelity's form (default: torch-fidelity downloads its own)")
    arg("--cache", default="runs/reference", help="folder for features of references (default runs/reference)")
    arg = add("consistency", "a jump against two composed, and f against its own target, by length of the interval")
    arg("--data", help="pictures to start from (default: what the run was trained on)")
    arg("--num", type=int, default=200, help="pictures per row (default 200)")
    arg = add("captions", "are prompts followed: names of nearest real pictures, colours, groups, over steps")
    arg("--data", help="captioned set to compare with (default: what the run was trained on)")
    arg("--num", type=int, default=400, help="pictures per row (default 400)")
    arg("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 32], help="a row each (default 1 2 4 8 32)")
    arg("--guidance", type=float, help="1 = off (default: what the run says)")
    arg("--autoencoder", help="place of the autoencoder, for latents (default: what the checkpoint names)")
    arg("--text_encoder", help="place of the text encoder (default: what the checkpoint names)")
    arg = add("clip", "CLIP score of pictures with captions.jsonl; needs transformers", network=False)
    arg("--images", required=True, help='folder with captions.jsonl, {"file": ..., "caption": ...} a line')
    arg("--num", type=int, help="only the first so many (default: all)")
    arg("--model", default="openai/clip-vit-large-patch14", help="hub name or folder (default %(default)s)")
    arg = add("speed", "derivative, training step, sampling. Further flags are those of train.py", network=False)
    arg("--config", choices=train.PRESETS, required=True, help="preset of train.py")
    arg("--steps", type=int, nargs="+", default=[1, 2, 8, 128], help="of sampling (default 1 2 8 128)")
    arg("--sizes", type=int, nargs="+", help="only compute time and memory of one picture of these sides, in pixels")
    arg("--tflops", type=float, default=156.0, help="rate to compute time by --sizes with, 10^12 FLOP/s\n"
        "(default 156, half of an A100's peak in bf16)")  # fmt: skip
    arg("--sample_batch", type=int, help="pictures per pass of sampling (default: --batch, at most 16 on a CPU)")
    arg("--repeats", type=int, default=10, help="per figure, at most 20 s; medians are shown (default 10)")
    arg("--out", help="JSON file (default runs/speed_NAME.json)")
    a, rest = p.parse_known_args(argv)
    if rest and a.command != "speed":
        p.error(f"unrecognized arguments: {' '.join(rest)}")
    return a, rest


def main(argv=None):
    a, rest = parse_arguments(argv)
    try:
        torch.empty(0, device=getattr(a, "device", "cpu"))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {a.device}: not to be had here ({str(error).splitlines()[0]}); try cpu") from error
    commands = dict(fid=fid, consistency=consistency, captions=captions, clip=clip, speed=speed)
    commands[a.command](a, *rest)


if __name__ == "__main__":
    data.command(main)
