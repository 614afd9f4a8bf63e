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
    wanted = dict(cuda=torch.device(device).type == "cuda", feature_extractor_weights_path=path, verbose=False)
    try:
        if path is not None:
            torch.load(path, map_location="cpu", weights_only=True)             # refuses code, which the library runs
        net = create_feature_extractor(EXTRACTOR, [FEATURES, SCORES], **wanted)
        if not wanted["cuda"]:
            net = net.to(memory_format=torch.channels_last)                     # a third less time; features to 1e-5
        return net, digest(path) if path else "default"
    except OSError as error:
        raise UserError(f"Inception's weights ({path}) not read or fetched: {error}; give --inception PATH") from error
    except Exception as error:                                                  # as many kinds as there are wrong files
        why = " ".join(str(error).split())[:200]
        raise UserError(f"--inception {path}: not torch-fidelity's weights of {EXTRACTOR} ({why})") from error


def extract(net, pictures: Pictures, n: int, device):
    """Features (n, D) and class scores (n, classes) of the first n pictures, float32, and their [height, width]."""
    parts, size = [], pictures.read(0).shape[1:]
    with ThreadPoolExecutor(4) as pool, tqdm(total=n, desc=f"features of {pictures.name}", unit="img") as bar:
        for start in range(0, n, BATCH):
            x = list(pool.map(pictures.read, range(start, min(n, start + BATCH))))
            for i, shape in enumerate((picture.shape[1:] for picture in x), start):
                if shape != size:
                    rule = f"mixed sizes, picture {i} is {shape} and the first {size} (height, width)"
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
    if path != "demo" and folder.is_dir() and not any(any(folder.glob(name)) for name in known):
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in data.PICTURES)
        if not files:
            raise UserError(f"{path}: no pictures in it; expected files such as .png or .jpg, idx files, or CIFAR-10's")
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

    def enough(name, n):
        if n < wanted:
            way = f"ask for --num {n} or fewer, or give a larger one"
            raise UserError(f"--num {wanted}: the reference {name} has {n} pictures; {way}")

    path, stats = Path(a.reference).expanduser(), None
    if path.suffix == ".safetensors":
        known = read_features(path, tag)
        enough(path, known.n)
        return known
    if path.suffix == ".npz":
        pictures, stats = open_npz(path)
        if pictures is None:
            return Reference(str(path), 0, "unknown (statistics)", stats)
    else:
        pictures = open_pictures(a.reference, a.side)
    n = pictures.n if a.reference_num is None else a.reference_num
    if not 2 <= n <= pictures.n:
        raise UserError(f"--reference_num {n}: {pictures.name} holds {pictures.n} pictures; ask for 2 to {pictures.n}")
    if stats is None:
        enough(pictures.name, n)
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


def sampled_rows(a, n: int):
    """Rows to score, one per guidance and number of steps, and the folder for results.

    A row is (what the table shows of it, what it is recorded with, a function that gives its pictures). Samples lie in
    a folder that names all they depend on, so what is there is not drawn again and nothing stale is scored.
    """
    model, row, config, results, about = open_network(a)
    classes, rows = list(range(len(config["data"]["classes"]))), []
    guidances = a.guidance or [config["train"]["guidance"]]
    if set(guidances) != {1} and not config["train"]["drop"]:
        raise UserError(f"--guidance {guidances}: the run had --drop 0 and knows no condition to guide from; use 1")
    if min(a.steps) < 1 or not 0 <= a.interval[0] <= a.interval[1] <= 1:
        raise UserError(f"--steps {a.steps}, --interval {a.interval}: steps from 1; rising fractions within 0 and 1")
    decode = data.decoder(config["data"], a.device, a.autoencoder)
    way = f"{a.precision}_{a.interval[0]:g}_{a.interval[1]:g}{'_strict' * a.strict_interval}"
    for g in guidances:
        options = dict(guidance=g, interval=a.interval, strict=a.strict_interval)
        for k in a.steps:
            trace, network = [], f"{config['step']}_{about['weights'][:8]}"
            folder = results / network / f"seed{a.seed}_guidance{g:g}_{way}" / f"steps_{k}"
            one = sample.images(model, row, config, [0], a.seed, k, classes, decode, trace=trace, **options)

            def draw(k=k, options=options, folder=folder):
                job = dict(num=n, out=str(folder), steps=[k], batch=a.batch, seed=a.seed, save_latents=False)
                with contextlib.redirect_stdout(sys.stderr):
                    job = argparse.Namespace(**job)
                    sample.many(model, row, config, job, about["checkpoint"], classes, options, decode)
                if dist.is_initialized():
                    dist.barrier()
                return file_pictures(folder, [folder / f"{i:06}.png" for i in range(n)], None)

            shown = dict(row=f"guidance {g:g}", steps=k, NFE=sum(passes for _, _, passes in trace))
            rows.append((shown, about | options | dict(size=list(one.shape[1:3])), draw))
    return rows, results


def scored(a, rows, n: int, net, reference: Reference, about: dict, results: Path):
    """Rows of the table, each written to eval.jsonl as soon as it is known."""
    if reference.features is not None:
        real = floor(reference, n, a.device)
        about = about | dict(floor=real)
        yield dict(row=f"real, n = {real['n']}", steps=None, NFE=None) | {k: real[k] for k in METRICS}
    for shown, how, draw in rows:
        features, scores, _ = extract(net, draw(), n, a.device)
        got = shown | metrics(features, scores, reference, a.device)
        append(results / "eval.jsonl", how | got | about)
        yield got


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


def fid(a):
    if a.per_category:
        return by_category(a)
    n, first, got = a.num, True, []
    if a.images:
        pictures = open_pictures(a.images, a.side)
        n, results = pictures.n if n is None else n, Path(a.cache if a.images == "demo" else a.images)
        if not 10 <= n <= pictures.n:
            raise UserError(f"--num {n}: {a.images} holds {pictures.n} pictures; ask for 10 to {pictures.n}")
        how = dict(images=a.images, size=list(pictures.read(0).shape[1:]))
        rows = [(dict(row=Path(a.images).name[-23:], steps=None, NFE=None), how, lambda: pictures)]
    else:
        n = 50000 if n is None else n
        if n < 10:
            raise UserError(f"--num {n}: at least 10 pictures")
        if "RANK" in os.environ:
            dist.init_process_group("gloo", timeout=timedelta(days=1))          # rank 0 scores while the others sample
            first = dist.get_rank() == 0
            if a.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        rows, results = sampled_rows(a, n)
    if first:
        net, tag = load_extractor(a.inception, a.device)
        reference = open_reference(a, net, tag, n)
        for _, how, _ in rows:
            if reference.size and how["size"] != reference.size:
                rule = f"pictures are {how['size']}, those of the reference {reference.size} (height, width)"
                raise UserError(f"{rule}; give --side to crop folders to one size, or another reference")
        about = dict(n=n, reference=reference.name, reference_n=reference.n, preprocessing=reference.preprocessing)
        about |= dict(inception=tag, torch_fidelity=torch_fidelity.__version__)
        title = f"n = {n}; reference {reference.name}: {reference.n or '?'} pictures, {reference.preprocessing}.\n"
        title += "Figures at another n do not compare with these. First row: real against real, the floor."
        if reference.n < 2 * n:
            title += f"\nThe reference has less than 2 x {n}: the floor is unknown, or of fewer pictures and too high."
        got = table(title, scored(a, rows, n, net, reference, about, results))
        draw_curve([row for row in got if row["NFE"]], n, results / "fid.png")
        print(f"{results / 'eval.jsonl'}: {len(rows)} more records")
        got = [dict(n=n) | row for row in got]
    else:
        for _, _, draw in rows:
            draw()
    if dist.is_initialized():
        dist.destroy_process_group()
    return got


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
    if rows:
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
    net, size = train.see(model, row), lambda v: v.flatten(1).norm(dim=1).clamp(min=1e-12)
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
    nets = dict(fp64=copy.deepcopy(model).double(), fp32=model, bf16=lower_precision(copy.deepcopy(model)))
    double = [v.double() for v in (x, eps, t, r)]
    exact = transition.exact_derivative(train.see(nets["fp64"], row), row, *double, y)
    for h in (0.001, 0.005, 0.01, 0.02, 0.05):
        errors = {}
        for name, net in nets.items():
            df_dt = transition.finite_difference(
                train.see(net, row), row, *(double if name == "fp64" else (x, eps, t, r)), y, h
            )
            errors[name] = float((df_dt - exact).norm() / exact.norm())
        yield dict(h=f"{h:g}") | errors


@torch.no_grad()
def consistency(a):
    model, row, config, results, about = open_network(a)
    spec, span = config["data"], row.t_max - row.t_min
    if a.num < 1:
        raise UserError(f"--num {a.num}: at least 1 picture a row")
    source = data.open_data(trained_on(a, config), spec["shape"], len(spec["classes"]))
    together = data.same_shape(source)

    def bins():
        for low, high in zip(LENGTHS[:-1], LENGTHS[1:]):
            parts = []
            for start in range(0, a.num, a.batch):
                n, rng = min(a.batch, a.num - start), np.random.default_rng((a.seed, start))
                index = together[rng.integers(len(together), size=n)]
                x, y = torch.from_numpy(source.read(index, rng)), torch.from_numpy(source.labels[index])
                eps = sample.initial_noise(x.shape[1:], a.seed, range(start, start + n))
                length = span * (low + (high - low) * rng.random(n))
                late = row.t_min + length + (span - length) * rng.random(n)     # so that r >= t_min
                times = late, late - length * rng.random(n), late - length
                t, s, r = (torch.from_numpy(v).float().clamp(row.t_min, row.t_max) for v in times)
                parts.append(identity(model, row, *(v.to(a.device) for v in (x, eps, t, s, r, y))))
            jump, own, target = (torch.cat([p[k] for p in parts]) for k in ("jump", "own", "target"))
            middle = dict(jump=float(jump.median()), own=float(own.median()), target=float(target.mean()))
            yield dict(length=f"{low:g} to {high:g}") | middle

    title = f"{a.num} pictures a row, length t - r as share of the range; medians, of the last column the mean\n"
    title += "jump: t -> r against t -> s -> r; own: f against its target on its own path; target: on the data's"
    got = table(title, bins())
    n = min(a.num, a.batch, len(together))
    x, y = source.read(together[:n], np.random.default_rng(a.seed)), source.labels[together[:n]]
    x, y = torch.from_numpy(x).to(a.device), torch.from_numpy(y).to(a.device)
    times = (row.t_min + span * torch.rand(2, n, generator=data.rng(a.seed), dtype=torch.float64)).float().to(a.device)
    eps = sample.initial_noise(x.shape[1:], a.seed, range(n), a.device)
    inputs = x, eps, times.amax(0), times.amin(0), y
    errors = table("relative error of df/dt by difference, by its half width h", derivative_errors(model, row, *inputs))
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
    for start in tqdm(range(0, len(pairs), a.batch), unit="batch"):
        files, captions = zip(*pairs[start : start + a.batch])
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
    x = torch.from_numpy(pictures).float().flatten(1, 2)                        # (n, H W, C)
    x = x.expand(-1, -1, 3)
    word = torch.cdist(x, torch.tensor([list(map(float, v)) for v in COLOURS.values()])).argmin(2)
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
    parts = {"seen": data.open_data(place, spec["shape"])}
    if place == "emoji":
        parts["held out"] = data.emoji(held_out=True)
    pictures, names, groups, spans = [], [], [], {}
    for part, source in parts.items():
        index = data.same_shape(source)
        index = index[np.linspace(0, len(index) - 1, min(len(index), 5000)).astype(int)]
        some_each = filter(len, np.array_split(index, 50))
        pictures += [decode(torch.from_numpy(source.read(some, chance))) for some in some_each]
        spans[part] = range(len(names), len(names) + len(index))
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
            options = dict(guidance=guidance, texts=texts, decode=decode)
            for steps in a.steps:
                drawn = [
                    sample.images(model, row, config, range(k, min(k + a.batch, a.num)), a.seed, steps, range(len(own)),
                                  **options) for k in range(0, a.num, a.batch)
                ]  # fmt: skip
                got = caption_scores(np.concatenate(drawn), [own[i % len(own)] for i in range(a.num)], real)
                yield dict(row=part, steps=steps) | got
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


def measure(actions, device, repeats: int, limit: float = 20.0) -> list[tuple[float, float]]:
    """Median seconds of each action() after warm-up, and the peak MiB it allocates beyond what was there.

    They take turns, so that what else the machine does falls on all alike: at least one turn, at most `repeats`, none
    begun after `limit` seconds per action. What the device has no memory for is nan.
    """
    cuda, peaks, times, actions = device.type == "cuda", [], [], list(actions)
    wait = (lambda: torch.cuda.synchronize(device)) if cuda else lambda: None
    for i, action in enumerate(actions):
        try:
            action()
            if cuda:
                wait()
                before = torch.cuda.memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)
                action()
                wait()
                peaks.append((torch.cuda.max_memory_allocated(device) - before) / 2**20)
            else:                                                               # the allocator's own events
                with torch.autograd.profiler.profile(profile_memory=True) as profile:
                    action()
                events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
                held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
                peaks.append(float(held.max(initial=0)) / 2**20)
        except torch.OutOfMemoryError:
            actions[i] = None
            peaks.append(math.nan)
    begin = time.perf_counter()
    while not times or len(times) < repeats and time.perf_counter() - begin < limit * len(peaks):
        times.append([])
        for action in actions:
            start = time.perf_counter() if action else math.nan
            action and action()
            wait()
            times[-1].append(time.perf_counter() - start)
    return [(statistics.median(column), peak) for column, peak in zip(zip(*times), peaks)]


def matmul_rates(model, rows: int, device, dtype, repeats: int) -> dict:
    """FLOP/s of plain matrix products: at the shapes of one block on `rows` tokens, and at a large square."""
    block, side, out = model.blocks[0], 8192 if device.type == "cuda" else 2048, {}
    layers = block.attn.qkv, block.attn.proj, block.mlp.fc1_g, block.mlp.fc1_x, block.mlp.fc2
    shapes = [(rows, layer.in_features, layer.out_features) for layer in layers]
    for name, sizes in (("shapes", shapes), ("square", [(side, side, side)])):
        normal = lambda *size: torch.randn(*size, device=device).to(dtype)
        pairs = [(normal(m, k), normal(n, k)) for m, k, n in sizes]
        ((seconds, _),) = measure([lambda pairs=pairs: [F.linear(p, w) for p, w in pairs]], device, repeats)
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


class NoiseTexts:
    """Stands for sample.Texts where only the time counts: random features (B, L, F) of L real tokens each."""

    def __init__(self, length: int, width: int, device):
        self.features, self.null = torch.randn(1, length, width, device=device), 1

    def __call__(self, y):
        features = self.features.expand(len(y), -1, -1)
        return features, torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)


def derivative_rows(model, low, row, h, inputs, repeats, texts=None):
    """The paper's Table 2 on the samples with r < t: `low` computes as training does, `model` is its fp32 twin."""
    net, device = train.see(low, row, texts), inputs[0].device
    parts = zip(*(v.split(32) for v in inputs))                                 # its attention takes memory
    exact = torch.cat([transition.exact_derivative(train.see(model, row, texts), row, *part) for part in parts])
    halves = lambda *args: torch.cat([net(*half) for half in zip(*(v.chunk(2) for v in args))])
    ways = {
        "DDE, one pass": lambda: transition.finite_difference(net, row, *inputs, h),
        "DDE, two passes": lambda: transition.finite_difference(halves, row, *inputs, h),
        "JVP, torch.func.jvp": lambda: plain_jvp(net, row, *inputs),
        "JVP, exact_derivative": lambda: transition.exact_derivative(net, row, *inputs),
    }
    for (name, way), (seconds, peak) in zip(ways.items(), measure(ways.values(), device, repeats)):
        with FlopCounterMode(display=False) as counter:
            error = math.nan if math.isnan(seconds) else float((way() - exact).norm() / exact.norm())
        yield dict(derivative=name, ms=1e3 * seconds, GFLOPs=counter.get_total_flops() / 1e9, MiB=peak, error=error)


def training_rows(cfg, network, row, h, flops, rates, bf16, x, y, repeats, texts=None):
    """A whole update, built and sharded as train.py does. Peak memory has weights, average and moments in it."""
    linear, attention = flops
    device, free = x.device, len(x) - transition.diffusion_count(len(x), cfg.share_diffusion)
    plain = replace(cfg, guide_gt=1.0, guide_cond=0.0)
    model, ema, optimizer = train.build(cfg, network, device, bf16)
    kept = 16 * sum(p.numel() for p in model.parameters()) / 2**20              # four tensors of fp32
    forward, once = linear + attention, None
    ways = {  # name: (configuration, useful FLOPs beside the forward and backward of the batch)
        "diffusion only": (replace(plain, share_diffusion=1.0, share_consistency=0.0), 0),
        "DDE": (replace(plain, derivative="dde"), 2 * free * forward),
        "JVP": (replace(plain, derivative="jvp"), free * (2 * linear + 3 * attention)),
        "DDE + model guidance": (replace(plain, derivative="dde", guide_cond=0.75), 2 * (free + len(x)) * forward),
    }

    def update(arm):
        loss, *_ = train.objective(model, ema, row, arm, h, x, y, data.rng(0, 0, device=device), texts=texts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), arm.clip)
        optimizer.step()
        optimizer.zero_grad()
        train.update_average(ema, model, 0.999)

    costs = measure([lambda arm=arm: update(arm) for arm, _ in ways.values()], device, repeats)
    for (name, (_, extra)), (seconds, peak) in zip(ways.items(), costs):
        once, useful = once or seconds, 3 * len(x) * forward + extra
        shares = {f"of {k}": useful / seconds / rate for k, rate in rates.items()}
        cost = {"ms": 1e3 * seconds, "x diffusion": seconds / once, "images/s": len(x) / seconds}
        yield dict(step=name) | cost | {"MiB": kept + peak, "GFLOPs": useful / 1e9} | shares


def sampling_rows(networks, row, shape, steps, batch, flops, rates, device, repeats, texts=None):
    """Noise to network space. networks: {"fp32": model, "bf16": ...}."""
    z, y = sample.initial_noise(shape, 0, range(batch), device), torch.zeros(batch, dtype=torch.int64, device=device)
    y, null = (texts(y), texts(y)) if texts else (y, None)
    first = lambda v: tuple(map(first, v)) if isinstance(v, tuple) else None if v is None else v[:1]
    for name, model in networks.items():
        for guidance, k in ((g, k) for g in (1.0, 1.5) for k in steps):
            trace = []
            sample.generate(model, row, z[:1], first(y), k, guidance, null=first(null), trace=trace)
            run = lambda: sample.generate(model, row, z, y, k, guidance, null=null)
            ((seconds, _),), nfe = measure([run], device, repeats), sum(passes for _, _, passes in trace)
            speed = {"ms": 1e3 * seconds, "images/s": batch / seconds}
            share = {"of shapes": batch * nfe * sum(flops) / seconds / rates[name]["shapes"]}
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
    network = train.network_of(cfg, (cfg.channels, cfg.side, cfg.side), cfg.classes, caption=cfg.caption)
    with torch.device(device if cuda else "meta"):
        model = TiM(**network).requires_grad_(False)
    if cfg.precision != "fp32":
        lower_precision(model)
    row = transition.TRANSPORTS[cfg.transport]
    for side in a.sizes:
        if side % (factor * cfg.patch):
            raise UserError(f"--sizes {side}: must be a multiple of {factor * cfg.patch}, pixels per place x patch")
        shape = cfg.channels, side // factor, side // factor
        tokens = (shape[1] // cfg.patch) ** 2
        linear, attention = forward_flops(model, tokens, 256 if cfg.caption else 0)
        need = sample.memory_needed(model, shape, 1, factor)
        for n in a.steps:
            flops = n * (linear + attention)
            got = dict(pixels=f"{side} x {side}", tokens=tokens, NFE=n, TFLOPs=flops / 1e12)
            got |= {"attention": attention / (linear + attention), f"s at {a.tflops:g}T": flops / a.tflops / 1e12}
            got |= {"GiB": need["weights"] + need["network"], "s measured": None, "GiB measured": None}
            if cuda:
                y = torch.zeros(1, 256, cfg.caption) if cfg.caption else torch.zeros(1, dtype=torch.int64)
                z, y = sample.initial_noise(shape, 0, [0], device), y.to(device)
                run = lambda n=n, z=z, y=y: sample.generate(model, row, z, y, n, null=y)
                ((got["s measured"], peak),) = measure([run], device, a.repeats)
                got["GiB measured"] = need["weights"] + peak / 1024
            yield got


def speed(a, rest):
    """Three tables of one network in one run; every flag of train.py changes it."""
    cfg, _ = train.parse_config(["--config", a.config, *rest])
    device = train.connect(cfg.device)
    try:
        if a.sizes:
            title = f"{cfg.size}/{cfg.patch}, one picture, without decoding; computed at {a.tflops:g} TFLOP/s"
            rows = table(title, resolution_rows(a, cfg, device))
            path = Path(a.out or Path(cfg.runs) / f"resolution_{cfg.name}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(dict(config=asdict(cfg), rows=rows) | provenance(), indent=1))
        else:
            speed_tables(a, cfg, device)
    finally:
        dist.destroy_process_group()


def speed_tables(a, cfg, device):
    shape, classes, row = (cfg.channels, cfg.side, cfg.side), cfg.classes, transition.TRANSPORTS[cfg.transport]
    length, caption = 256, cfg.caption
    if not (all(shape) and (classes or caption)):
        spec = data.open_data(cfg.data, shape, classes).spec
        shape, classes = tuple(spec["shape"]), len(spec["classes"])
    if not (classes or caption):
        length, caption = (sample.load_text_encoder(cfg.text_encoder)[1][k] for k in ("length", "width"))
    network = train.network_of(cfg, shape, classes, caption=caption)
    texts = NoiseTexts(length, caption, device) if caption else None
    torch.manual_seed(cfg.seed)
    model = TiM(**network).to(device).requires_grad_(False)
    for p in model.parameters():
        if not p.any():                                                         # an output of zero has no derivative
            torch.nn.init.normal_(p, std=0.02)
    cuda, cpu, n = device.type == "cuda", device.type == "cpu", cfg.batch
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and cuda)
    types, networks = dict(fp32=torch.float32), {"fp32": model}
    if bf16 or cuda or cpu and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        types["bf16"], networks["bf16"] = torch.bfloat16, lower_precision(copy.deepcopy(model))
    if cfg.compile:
        for block in (block for model in networks.values() for block in model.blocks):
            block.compile()
    kind, h, rng = "bf16" if bf16 else "fp32", train.difference_width(cfg, bf16), data.rng(cfg.seed, device=device)
    tokens = shape[1] * shape[2] // cfg.patch**2
    flops, rates = forward_flops(model, tokens, length if texts else 0), {}
    name = torch.cuda.get_device_name(device) if cuda else f"{device.type}, {torch.get_num_threads()} threads"
    size = sum(p.numel() for p in model.parameters())
    print(f"{cfg.name}: {size:,} parameters, {tokens} tokens, {sum(flops) / 1e9:.4g} GFLOPs a picture, on {name}")
    for k, dtype in types.items():
        rates[k] = matmul_rates(model, n * tokens, device, dtype, a.repeats)
        of = " and ".join(f"{rate / 1e9:.5g} GFLOP/s at the {which}" for which, rate in rates[k].items())
        print(f"matmul in {k}: {of} (of the network, large)")

    x, eps = torch.randn(2, n, *shape, generator=rng, device=device)
    y = torch.randint(classes or 1, (n,), generator=rng, device=device)
    t, r = transition.sample_times(row, n, cfg.share_diffusion, cfg.share_consistency, rng, cfg.time_mean, cfg.time_std)
    inputs = tuple(v[transition.diffusion_count(n, cfg.share_diffusion) :] for v in (x, eps, t, r, y))
    out = dict(config=asdict(cfg), device=name, parameters=size, tokens=tokens, flops=sum(flops), matmul=rates, h=h)
    out["attention"] = {k: attention_kernel(train.see(net, row, texts), (x, t, r, y)) for k, net in networks.items()}
    print("attention in " + "; ".join(f"{k}: {kernel}" for k, kernel in out["attention"].items()))
    if len(inputs[0]):
        title = f"df/dt of {len(inputs[0])} pictures in {kind}, h {h:g}. FLOPs by torch's counter, error to fp32 JVP"
        rows = derivative_rows(networks["fp32"], networks[kind], row, h, inputs, a.repeats, texts)
        out["derivative"] = table(title, rows)
    title = f"An update on {n} pictures in {kind}, compile {cfg.compile}. Useful FLOPs, their share of the matmul rates"
    rows = training_rows(cfg, network, row, h, flops, rates[kind], bf16, x, y, a.repeats, texts)
    out["training"] = table(title, rows)
    count = a.sample_batch or (n if cuda else min(n, 16))
    rows = sampling_rows(networks, row, shape, a.steps, count, flops, rates, device, a.repeats, texts)
    out["sampling"] = table(f"Sampling, {count} pictures at a time, no decoding", rows)
    try:
        rows = decoding_rows(cfg.autoencoder, shape, count, device, a.repeats) if cfg.autoencoder else ()
        out["decoding"] = rows and table(f"Decoding, {count} pictures at a time", rows)
    except UserError as error:
        print(f"\nDecoding was not measured: {error}")
    path = Path(a.out or Path(cfg.runs) / f"speed_{cfg.name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(out | provenance(), indent=1))
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


COMMANDS = dict(fid=fid, consistency=consistency, captions=captions, clip=clip)


def main(argv=None):
    a, rest = parse_arguments(argv)
    try:
        torch.empty(0, device=getattr(a, "device", "cpu"))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {a.device}: not to be had here ({str(error).splitlines()[0]}); try cpu") from error
    speed(a, rest) if a.command == "speed" else COMMANDS[a.command](a)


if __name__ == "__main__":
    data.command(main)
