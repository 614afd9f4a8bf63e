"""Figures of a trained network: quality over the number of steps, its own identity, captions, speed.

    python evaluate.py fid --reference demo --num 2000 --steps 1 2 8      # newest run; torchrun shares the sampling
    python evaluate.py consistency                                        # a long jump against two short ones
    python evaluate.py clip --images pictures                             # pictures beside captions.jsonl
    python evaluate.py speed --config demo --batch 64                     # takes every flag of train.py
"""

import argparse
import contextlib
import copy
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.utils import create_feature_extractor
from tqdm import tqdm

import data
import sample
import train
from data import UserError
from model import SIZES, Linear, TiM, lower_precision
from transition import (
    diffusion_count,
    exact_derivative,
    finite_difference,
    interpolate,
    sample_times,
    solve,
    step,
    transition_target,
)

# ---------------------------------------------------------------------------------------------------------------------
# Tables and records


def show(*cells, width=11) -> None:
    """One line of a table: numbers to the right, the first cell to the left."""
    texts = [f"{c:.4g}" if isinstance(c, float) else "-" if c is None else str(c) for c in cells]
    print(texts[0].ljust(26) + "".join(" " + text.rjust(width) for text in texts[1:]), flush=True)


def provenance() -> dict:
    """What a figure must be read with: the commit (with -dirty where files were changed), versions, the time."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        return dict(commit=commit or None, torch=torch.__version__, time=time.strftime("%Y-%m-%dT%H:%M:%S"))
    return dict(commit=None, torch=torch.__version__, time=time.strftime("%Y-%m-%dT%H:%M:%S"))


def append(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def digest(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def open_network(a):
    """The checkpoint that --checkpoint names, or the newest: model, row, config, weights file, folder for results."""
    path = Path(a.checkpoint or sample.newest())
    model, row, config = sample.load(path, a.device)
    if a.precision == "bf16":
        lower_precision(model)
    file = path / "ema.safetensors" if path.is_dir() else path
    return model, row, config, file, file.parent / "eval"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures to features

EXTRACTOR, FEATURES, SCORES = "inception-v3-compat", "2048", "logits_unbiased"  # torch-fidelity's names
BATCH = 64  # torch-fidelity's, so that rounding is the same too


@dataclass
class Pictures:
    """A set of pictures to compare: read(i) gives uint8 (3, H, W), key stands for content and preprocessing."""

    name: str
    n: int
    read: Callable[[int], np.ndarray]
    key: str
    preprocessing: str = "as stored, RGB"


@dataclass
class Features:
    """What is known of a reference: mean and covariance for FID, and features (n, D) float32 for the rest, or None."""

    name: str
    n: int
    preprocessing: str
    stats: dict
    features: torch.Tensor | None
    size: tuple | None = None


def load_extractor(path, device):
    """torch-fidelity's Inception from the file `path` (None: its own download), and a tag of the weights.

    raises  UserError if the file is missing, holds code or another network, or the download fails.
    """
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"--inception {path}: no such file; give the weights in torch-fidelity's form")
        try:
            torch.load(path, map_location="cpu", weights_only=True)                # refuses code; the library does not
        except Exception as error:
            raise UserError(f"--inception {path}: not a file of plain tensors ({str(error).splitlines()[0]})") from error
    wanted = dict(cuda=torch.device(device).type == "cuda", feature_extractor_weights_path=path, verbose=False)
    try:
        return create_feature_extractor(EXTRACTOR, [FEATURES, SCORES], **wanted), digest(path) if path else "torch-fidelity"
    except OSError as error:
        raise UserError(f"torch-fidelity cannot fetch its weights ({error}); give them with --inception PATH") from error
    except (RuntimeError, TypeError, AttributeError) as error:
        first = str(error).splitlines()[:2]
        raise UserError(f"--inception {path}: weights of another network ({' '.join(first)})") from error


def extract(net, pictures: Pictures, n: int, device):
    """Features (n, D) and class scores of the first n pictures, float32 on the CPU, and their (height, width)."""
    parts, size = [], None
    with ThreadPoolExecutor(4) as pool, tqdm(total=n, desc=f"features of {pictures.name}", unit="img") as bar:
        for start in range(0, n, BATCH):
            x = list(pool.map(pictures.read, range(start, min(n, start + BATCH))))
            size = size or x[0].shape[1:]
            for i, picture in enumerate(x, start):
                if picture.shape[1:] != size:
                    rule = f"picture {i} is {picture.shape[1:]}, the first is {size}"
                    raise UserError(f"{pictures.name}: mixed sizes, {rule} (height, width); give --side to crop them all")
            parts.append([f.cpu() for f in net(torch.from_numpy(np.stack(x)).to(device))])
            bar.update(len(x))
    return *(torch.cat(part) for part in zip(*parts)), size


said = set()


def read_file(path: Path, side: int | None, folder) -> np.ndarray:
    """uint8 (3, H, W), as stored or cropped to `side`. Grey is repeated and alpha dropped, and that is said once a folder."""
    if side:
        return data.read_picture(path, side)
    try:
        with Image.open(path) as picture:
            mode, pixels = picture.mode, np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a whole picture ({error}); remove it or make it again") from error
    if mode != "RGB" and folder not in said:
        said.add(folder)
        tqdm.write(f"note: {folder} holds pictures in mode {mode}; read as RGB (grey repeated, alpha dropped)", sys.stderr)
    return pixels


def folder_pictures(folder: Path, files: list[Path], side: int | None) -> Pictures:
    stamp = [(str(f.relative_to(folder)), *(f.stat().st_size, f.stat().st_mtime_ns)) for f in files]
    how = f"shorter side to {side}, centre crop, RGB" if side else "as stored, RGB"
    key = hashlib.sha256(json.dumps([stamp, how]).encode()).hexdigest()
    return Pictures(str(folder), len(files), lambda i: read_file(files[i], side, folder), key, how)


def array_pictures(name, pixels: np.ndarray) -> Pictures:
    """uint8 (n, C, H, W) with one channel or three."""
    key = hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
    return Pictures(name, len(pixels), lambda i: np.broadcast_to(pixels[i], (3, *pixels.shape[2:])), key)


def open_pictures(path: str, side: int | None) -> Pictures:
    """A folder of pictures (at any depth), or a data set of `data.open_data` that holds pixels.

    Folders are known by names, sizes and times of change; arrays by their bytes.
    """
    folder = Path(path).expanduser()
    if path != "demo" and folder.is_dir() and not [*folder.glob("train-images*-ubyte*"), *folder.glob("data_batch_*.bin")]:
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in data.PICTURES)
        if not files:
            raise UserError(f"{path}: no pictures in it; expected files such as .png or .jpg")
        return folder_pictures(folder, files, side)
    source = data.open_data(path)
    if not hasattr(source, "pixels"):
        raise UserError(f"{path}: holds no pictures; give a folder of pictures, demo, .npz or cached features")
    if side and source.pixels.shape[2:] != (side, side):
        raise UserError(f"--side {side}: {path} holds {source.pixels.shape[2:]}; --side is for folders of pictures")
    return array_pictures(path, source.pixels)


def open_reference(a, net, tag, device) -> Features:
    """The reference in any form, computed once: features lie in a.cache under a key of content, preprocessing, weights.

    a.reference  folder or data set, see `open_pictures`; .npz with mu and sigma, arr_0 (n, H, W, 3) uint8, or both;
                 or .safetensors from the cache.
    a.reference_num  use this many pictures, drawn once and for all; None = all.
    """
    path, stats = Path(a.reference).expanduser(), None
    if path.suffix == ".safetensors":
        return read_features(path, tag)
    if path.suffix == ".npz":
        try:
            with np.load(path) as archive:
                if {"mu", "sigma"} <= set(archive.files):
                    stats = dict(mu=archive["mu"].astype(np.float64), sigma=archive["sigma"].astype(np.float64))
                images = archive["arr_0"] if "arr_0" in archive.files else None
        except (OSError, ValueError, EOFError, KeyError) as error:
            raise UserError(f"--reference {path}: not a readable .npz of arrays ({error})") from error
        if images is None:
            if stats is None:
                raise UserError(f"--reference {path}: holds neither mu and sigma nor arr_0")
            return Features(str(path), 0, "unknown (statistics)", stats, None)
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise UserError(f"--reference {path}: arr_0 is {images.dtype} {images.shape}, expected uint8 (n, H, W, 3)")
        pictures = array_pictures(str(path), images.transpose(0, 3, 1, 2))
    else:
        pictures = open_pictures(a.reference, a.side)
    n = pictures.n if a.reference_num is None else a.reference_num
    if not 2 <= n <= pictures.n:
        raise UserError(f"--reference_num {n}: {pictures.name} holds {pictures.n} pictures; ask for 2 to {pictures.n}")
    order = np.random.default_rng(0).permutation(pictures.n) if n < pictures.n else np.arange(n)
    chosen = replace(pictures, read=lambda i: pictures.read(order[i]))
    key = hashlib.sha256(json.dumps([pictures.key, pictures.preprocessing, n, EXTRACTOR, tag]).encode()).hexdigest()
    file = Path(a.cache) / f"{key[:16]}.safetensors"
    if not file.is_file():
        features, _, size = extract(net, chosen, n, device)
        about = dict(name=pictures.name, n=n, preprocessing=pictures.preprocessing, weights=tag, size=size)
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".tmp")
        save_file({"features": features}, aside, metadata={"reference": json.dumps(about)})
        os.replace(aside, file)
    known = read_features(file, tag)
    return replace(known, name=pictures.name, stats=stats or known.stats)


def read_features(path: Path, tag) -> Features:
    try:
        with safe_open(path, "pt") as file:
            features, about = file.get_tensor("features"), json.loads(file.metadata()["reference"])
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not cached features of a reference ({error})") from error
    if about.pop("weights") != tag:
        raise UserError(f"{path}: features of another network than --inception gives; give the pictures, or those weights")
    size = tuple(about.pop("size"))
    return Features(**about, stats=fid_features_to_statistics(features), features=features, size=size)


def metrics(features, scores, reference: Features, device) -> dict:
    """FID; KID, precision and recall where the reference has features; Inception Score where `scores` say something."""
    mine, other = fid_features_to_statistics(features), reference.stats
    if mine["mu"].shape != other["mu"].shape:
        raise UserError(f"{reference.name}: statistics of {len(other['mu'])} features, this network has {features.shape[1]}")
    mine["mu"] = mine["mu"].astype(other["mu"].dtype)
    out = dict(fid=fid_statistics_to_metric(mine, other, False)["frechet_inception_distance"])
    if reference.features is not None:
        subset = min(1000, len(features), len(reference.features))
        kid = kid_features_to_metric(features, reference.features, kid_subset_size=subset, verbose=False)
        pair = features.to(device), reference.features.to(device)
        near = prc_features_to_metric(*pair, save_cpu_ram=True, verbose=False)
        out |= dict(kid=kid["kernel_inception_distance_mean"], kid_std=kid["kernel_inception_distance_std"])
        out |= dict(kid_subset=subset, precision=near["precision"], recall=near["recall"])
    if scores is not None and scores.any():                                     # all zero where there is no classifier
        score = isc_features_to_metric(scores)
        out |= dict(inception_score=score["inception_score_mean"], inception_score_std=score["inception_score_std"])
    return out


def floor(reference: Features, n: int, device) -> tuple[dict, int]:
    """Real against real: n pictures of the reference against the others; half of them where it has fewer than 2 n."""
    n, order = min(n, reference.n // 2), torch.randperm(reference.n, generator=data.rng(0))
    rest = reference.features[order[n:]]
    others = replace(reference, features=rest, stats=fid_features_to_statistics(rest))
    return metrics(reference.features[order[:n]], None, others, device), n


# ---------------------------------------------------------------------------------------------------------------------
# fid


def fid(a):
    if a.images and a.num is not None and a.num < 10 or not a.images and (a.num or 50000) < 10:
        raise UserError(f"--num {a.num}: at least 10 pictures")
    if a.images:
        return fid_of_folder(a)
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(days=1))              # rank 0 scores while the others sample
        if a.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        fid_of_network(a, "RANK" not in os.environ or dist.get_rank() == 0)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def prepare(a, n: int):
    """Everything that can be wrong with the reference, before anything is sampled: (net, reference, function for a row)."""
    net, tag = load_extractor(a.inception, a.device)
    reference = open_reference(a, net, tag, a.device)
    if reference.features is not None and reference.n < n:
        way = f"ask for --num {reference.n} or fewer, or give a larger one"
        raise UserError(f"--num {n}: the reference {reference.name} has {reference.n} pictures; {way}")
    about = dict(n=n, reference=reference.name, reference_n=reference.n, preprocessing=reference.preprocessing)
    about |= dict(inception=tag, torch_fidelity=torch_fidelity.__version__, **provenance())
    of = f"{reference.n:,} pictures, {reference.preprocessing}" if reference.n else reference.preprocessing
    print(f"n = {n:,} against {reference.name} ({of}). Figures at another n do not compare with these.")
    show("", "steps", "NFE", "FID", "KID x 1000", "+-", "precision", "recall", "IS")
    if reference.features is None:
        print("floor: not known, the reference holds statistics and no pictures")
    else:
        real, m = floor(reference, n, a.device)
        about["floor"] = dict(n=m, **real)
        show_row(f"floor: real, n = {m}", None, None, real)
        if m < n:
            print(f"  (the reference has no 2 x {n:,} pictures; at n = {m:,} the floor is higher than at {n:,})")
    return net, reference, about


def show_row(name, steps, nfe, got: dict) -> None:
    kid, spread = (got[k] * 1000 if k in got else None for k in ("kid", "kid_std"))
    show(name, steps, nfe, got["fid"], kid, spread, *map(got.get, ("precision", "recall", "inception_score")))


def same_size(size, reference: Features, name) -> None:
    if reference.size and tuple(size) != tuple(reference.size):
        rule = f"{name} are {tuple(size)}, those of the reference {reference.name} {reference.size} (height, width)"
        raise UserError(f"{rule}; give --side to crop a folder to the same size, or another reference")


def fid_of_folder(a) -> None:
    pictures = open_pictures(a.images, a.side)
    n = pictures.n if a.num is None else a.num
    if not 10 <= n <= pictures.n:
        raise UserError(f"--num {n}: {a.images} holds {pictures.n} pictures; ask for 10 to {pictures.n}")
    net, reference, about = prepare(a, n)
    features, scores, size = extract(net, pictures, n, a.device)
    same_size(size, reference, f"the pictures of {a.images}")
    got = metrics(features, scores, reference, a.device)
    show_row(Path(a.images).name[-26:], None, None, got)
    path = Path(a.images) / "eval.jsonl" if Path(a.images).is_dir() else Path("eval.jsonl")
    append(path, dict(images=a.images, **got, **about))


def fid_of_network(a, first: bool) -> None:
    model, row, config, file, results = open_network(a)
    classes = list(range(len(config["data"]["classes"])))
    n = 50000 if a.num is None else a.num
    guidances = a.guidance or [config["train"]["guidance"]]
    if set(guidances) != {1} and not config["train"]["drop"]:
        raise UserError(f"--guidance {guidances}: {file} was trained with --drop 0 and knows no condition to guide from")
    if min(a.steps) < 1 or a.batch < 1:
        raise UserError(f"--steps {a.steps}, --batch {a.batch}: at least 1")
    net, reference, about = prepare(a, n) if first else (None, None, None)
    tag, rows = digest(file), []
    way = a.precision + ("" if tuple(a.interval) == (0, 1) else f"_{a.interval[0]:g}_{a.interval[1]:g}{'_strict' * a.strict_interval}")
    for g in guidances:
        options = dict(guidance=g, interval=a.interval, strict=a.strict_interval)
        for k in a.steps:
            folder = results / f"update{config['step']}_{tag[:8]}" / f"seed{a.seed}_guidance{g:g}_{way}" / f"steps_{k}"
            if first:
                trace = []
                one = sample.images(model, row, config, [0], a.seed, k, classes, trace=trace, **options)
                same_size(one.shape[1:3], reference, "the samples")
            with contextlib.redirect_stdout(sys.stderr):
                job = argparse.Namespace(num=n, out=str(folder), steps=[k], batch=a.batch, seed=a.seed)
                sample.many(model, row, config, job, classes, options)
            if dist.is_initialized():
                dist.barrier()
            if not first:
                continue
            nfe = sum(passes for _, _, passes in trace)
            drawn = folder_pictures(folder, [folder / f"{i:06}.png" for i in range(n)], None)
            features, scores, _ = extract(net, drawn, n, a.device)
            got = metrics(features, scores, reference, a.device)
            show_row(f"guidance {g:g}", k, nfe, got)
            how = dict(checkpoint=str(file), weights=tag, update=config["step"], steps=k, nfe=nfe, guidance=g)
            how |= dict(interval=list(a.interval), strict=a.strict_interval, seed=a.seed, dtype=a.precision)
            append(results / "eval.jsonl", how | got | about)
            rows.append((g, nfe, got["fid"]))
    if first:
        draw_curve(rows, n, about.get("floor"), results / "fid.png")
        print(f"{results / 'eval.jsonl'}: {len(rows)} records")


def draw_curve(rows, n, real, path: Path) -> None:
    """FID over NFE, a line per guidance; without matplotlib nothing but a line of text."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print(f"no {path}: matplotlib is not installed")
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for g in dict.fromkeys(g for g, _, _ in rows):
        line = sorted((nfe, value) for gg, nfe, value in rows if gg == g)
        axes.plot(*zip(*line), "o-", label=f"guidance {g:g}")
    if real:
        axes.axhline(real["fid"], color="grey", ls=":", label=f"real, n = {real['n']}")
    axes.set(xscale="log", yscale="log", xlabel="network evaluations per picture", ylabel=f"FID, n = {n}")
    axes.legend()
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------------------------------------------------------------
# consistency

LENGTHS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # bins of (t - r), as shares of the row's range


def identity(model, row, x, eps, t, s, r, y) -> dict:
    """Three errors of an any-step network, each (B,), 0 for a perfect one but for the last.

    jump    |x_{t->r} - x_{t->s->r}| over |x_{t->r} - x_t|: one jump against two.
    own     |f - target| over |f|, the target on the path that the network itself follows at t, (x, eps) solved from
            f(x_t, t, t): no noise of the data in it.
    target  mean square of f - target as trained on, x and eps of the data: even the best network keeps their variance.
    """
    net = train.see(model, row)
    size = lambda v: v.flatten(1).norm(dim=1)
    x_t = interpolate(row, x, eps, t)
    f = net(x_t, t, r, y)
    direct = step(row, x_t, f, t, r)
    x_s = step(row, x_t, net(x_t, t, s, y), t, s)
    composed = step(row, x_s, net(x_s, s, r, y), s, r)
    gaps = []
    for pair in (solve(row, x_t, net(x_t, t, t, y), t), (x, eps)):
        df_dt = exact_derivative(net, row, *pair, t, r, y)
        gaps.append(f - transition_target(row, *pair, t, r, df_dt))
    jump = size(direct - composed) / size(direct - x_t).clamp(min=1e-12)
    return dict(jump=jump, own=size(gaps[0]) / size(f).clamp(min=1e-12), target=gaps[1].square().flatten(1).mean(1))


@torch.no_grad()
def consistency(a):
    model, row, config, file, results = open_network(a)
    spec, table, span = config["data"], [], row.t_max - row.t_min
    if a.num < 1 or a.batch < 1:
        raise UserError(f"--num {a.num}, --batch {a.batch}: at least 1")
    source = data.open_data(a.data or config["train"]["data"], spec["shape"], len(spec["classes"]))
    print(f"{file}: {a.num} pictures a row, t uniform; s between t and r. Medians; target: mean")
    show("length, share of range", "jump", "own", "target")
    for low, high in zip(LENGTHS[:-1], LENGTHS[1:]):
        parts = []
        for start in range(0, a.num, a.batch):
            n, rng = min(a.batch, a.num - start), np.random.default_rng((a.seed, start))
            index = rng.integers(len(source.labels), size=n)
            x, y = torch.from_numpy(source.read(index, rng)), torch.from_numpy(source.labels[index])
            eps = sample.initial_noise(x.shape[1:], a.seed, range(start, start + n))
            length = span * (low + (high - low) * rng.random(n))
            late = row.t_min + length + (span - length) * rng.random(n)         # so that r >= t_min
            times = late, late - length * rng.random(n), late - length
            t, s, r = (torch.from_numpy(v).float().clamp(row.t_min, row.t_max) for v in times)
            parts.append(identity(model, row, *(v.to(a.device) for v in (x, eps, t, s, r, y))))
        got = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
        table.append(dict(low=low, high=high, jump=float(got["jump"].median()), own=float(got["own"].median()), target=float(got["target"].mean())))
        show(f"{low:g} to {high:g}", *list(table[-1].values())[2:])
    about = dict(checkpoint=str(file), weights=digest(file), update=config["step"], n=a.num, seed=a.seed, dtype=a.precision)
    append(results / "consistency.jsonl", about | provenance() | dict(table=table))
    print(f"{results / 'consistency.jsonl'}: 1 record")


# ---------------------------------------------------------------------------------------------------------------------
# clip


@torch.no_grad()
def clip(a):
    """100 max(cosine, 0) of each picture with its caption, averaged."""
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError as error:
        raise UserError("clip needs the package transformers; install it with `pip install transformers`") from error
    folder = Path(a.images)
    if not (folder / "captions.jsonl").is_file():
        raise UserError(f"--images {folder}: no captions.jsonl in it; a line each: {{\"file\": ..., \"caption\": ...}}")
    try:
        lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines() if line.strip()]
        pairs = [(folder / line["file"], line["caption"]) for line in lines]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/captions.jsonl: expected {{\"file\": ..., \"caption\": ...}} a line ({error!r})") from error
    if a.num is not None and not 1 <= a.num <= len(pairs) or not pairs:
        raise UserError(f"--num {a.num}: {folder}/captions.jsonl holds {len(pairs)} captions")
    pairs, scores = pairs[: a.num], []
    try:
        model, processor = CLIPModel.from_pretrained(a.model).to(a.device).eval(), CLIPProcessor.from_pretrained(a.model)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {a.model}: {str(error).splitlines()[0]}; give a name on the hub or a folder") from error
    for start in tqdm(range(0, len(pairs), a.batch), unit="batch"):
        files, captions = zip(*pairs[start : start + a.batch])
        pixels = [read_file(f, None, folder).transpose(1, 2, 0) for f in files]
        fed = processor(text=list(captions), images=pixels, return_tensors="pt", padding=True, truncation=True)
        out = model(**fed.to(a.device))
        scores.append(F.cosine_similarity(out.image_embeds, out.text_embeds).clamp(min=0).cpu())
    score = 100 * torch.cat(scores)
    error = float(score.std() / len(score) ** 0.5) if len(score) > 1 else None
    show("", "CLIP score", "+-", "n")
    show(str(a.model)[-26:], float(score.mean()), error, len(score))
    append(folder / "eval.jsonl", dict(clip=float(score.mean()), error=error, n=len(score), model=a.model, **provenance()))


# ---------------------------------------------------------------------------------------------------------------------
# speed


def forward_flops(model: TiM, tokens: int, caption: int = 0) -> tuple[int, int]:
    """Useful FLOPs of one forward of one picture, counted from the architecture: (linear layers, attention products).

    tokens, caption  numbers of picture and caption tokens. A layer works on the tokens it sees; embeddings, modulation
    and interval projection see one row per picture. Norms, gates and softmax are not counted, as is the custom.
    """
    linear = 2 * tokens * model.x_embedder.proj.weight.numel()
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and not name.startswith("projector"):
            rows = 1 if "adaLN" in name or "qkv_d" in name or "t_embedder" in name or "delta_embedder" in name else tokens
            rows = caption if "cross_attn.kv" in name or "y_embedder" in name else rows
            rows *= 2 if name.startswith("t_embedder") and model.delta_embedder is None else 1
            linear += 2 * rows * layer.weight.numel()
    width = model.head * model.blocks[0].attn.heads
    return linear, len(model.blocks) * 4 * tokens * (tokens + caption) * width


def synchronise(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(action, device, repeats: int, limit: float = 20.0, memory: bool = True):
    """Median seconds of action() after warm-up, and the peak bytes it allocates beyond what was there.

    Stops at `repeats`, or when `limit` seconds are spent and it ran at least once.
    """
    peak = None
    if memory and device.type == "cpu":                                        # the allocator's own events
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            action()
        events = sorted((e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]")
        peak = int(np.cumsum([size for _, size in events]).max(initial=0))
    else:
        action()
    if device.type == "cuda":
        action()                                                                # the first one compiled and tuned
        synchronise(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    times, begin = [], time.perf_counter()
    while len(times) < repeats and (not times or time.perf_counter() - begin < limit):
        start = time.perf_counter()
        action()
        synchronise(device)
        times.append(time.perf_counter() - start)
    if device.type == "cuda" and memory:
        peak = torch.cuda.max_memory_allocated(device) - before
    return statistics.median(times), peak


def matmul_rates(model, rows: int, device, dtype, repeats: int) -> dict:
    """FLOP/s of plain matrix products: at the shapes of one block on `rows` tokens, and at a large square."""
    block = model.blocks[0]
    layers = block.attn.qkv, block.attn.proj, block.mlp.fc1_g, block.mlp.fc1_x, block.mlp.fc2
    shapes = [(rows, layer.in_features, layer.out_features) for layer in layers]
    side, out = 8192 if device.type == "cuda" else 2048, {}
    for name, sizes in (("shapes", shapes), ("square", [(side, side, side)])):
        pairs = [(torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)) for m, k, n in sizes]
        seconds, _ = measure(lambda pairs=pairs: [F.linear(p, w) for p, w in pairs], device, repeats, memory=False)
        out[name] = sum(2 * m * k * n for m, k, n in sizes) / seconds
    return out


def plain_jvp(net, row, x, eps, t, r, y):
    """df/dt by torch.func.jvp as one would write it down, attention as plain products."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda s: net(interpolate(row, x, eps, s), s, r, y), (t,), (torch.ones_like(t),))[1]


def speed_derivative(model, low, row, cfg, h, inputs, repeats):
    """The paper's Table 2 on the samples with r < t: `low` computes as training does, `model` is its fp32 twin."""
    x, eps, t, r, y, device = *inputs, inputs[0].device
    exact, net = exact_derivative(train.see(model, row), row, *inputs), train.see(low, row)
    halves = lambda *args: torch.cat([net(*half) for half in zip(*(v.chunk(2) for v in args))])
    ways = {
        "DDE, one pass": lambda: finite_difference(net, row, *inputs, h),
        "DDE, two passes": lambda: finite_difference(halves, row, *inputs, h),
        "JVP, torch.func.jvp": lambda: plain_jvp(net, row, *inputs),
        "JVP, exact_derivative": lambda: exact_derivative(net, row, *inputs),
    }
    print(f"\nThe derivative df/dt of {len(x)} pictures; FLOPs as torch counts what is run; error against the JVP in fp32")
    show("", "ms", "GFLOPs", "peak MiB", "error")
    for name, way in ways.items():
        with FlopCounterMode(display=False) as counter:
            error = float((way() - exact).norm() / exact.norm())
        seconds, peak = measure(way, device, repeats)
        show(name, seconds * 1e3, counter.get_total_flops() / 1e9, peak / 2**20, error)
        yield dict(name=name, seconds=seconds, flops=counter.get_total_flops(), peak_bytes=peak, error=error)


def speed_training(model, row, cfg, h, flops, rates, bf16, batch, device, repeats):
    """A whole update, sharded over one rank as train.py does it. Peak memory counts weights, averages and moments too."""
    linear, attention = flops
    x, y = batch
    free = len(x) - diffusion_count(len(x), cfg.share_diffusion)
    ema, plain = copy.deepcopy(model).requires_grad_(False), replace(cfg, guide_gt=1.0, guide_cond=0.0)
    if device.type != "mps":
        mesh = dist.init_device_mesh(device.type, (1,))
        model, ema = train.shard(model, mesh, bf16), train.shard(ema, mesh, bf16)
    if cfg.compile:
        for block in (*model.blocks, *ema.blocks):
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=device.type in ("cuda", "cpu"))
    dde, guided, forward = 2 * free * (linear + attention), 2 * len(x), linear + attention
    ways = {  # name: (configuration, useful FLOPs beside the forward and backward of the batch)
        "diffusion only": (replace(plain, share_diffusion=1.0, share_consistency=0.0), 0),
        "DDE": (replace(plain, derivative="dde"), dde),
        "JVP": (replace(plain, derivative="jvp"), free * (2 * linear + 3 * attention)),
        "DDE + model guidance": (replace(plain, derivative="dde", guide_cond=0.75), dde + guided * forward),
    }
    print(f"\nThe training step, {len(x)} pictures, {'bf16' if bf16 else 'fp32'}, compile {cfg.compile}; shares of the matmul rate")
    show("", "ms", "x diffusion", "images/s", "peak MiB", "GFLOPs", "of shapes", "of square")
    kept = 16 * sum(p.numel() for p in model.parameters())                      # fp32 weights, average, two moments
    once = None
    for name, (arm, extra) in ways.items():

        def update(arm=arm):
            loss, *_ = train.objective(model, ema, row, arm, h, x, y, data.rng(0, 0, device=device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), arm.clip)
            optimizer.step()
            optimizer.zero_grad()
            train.update_average(ema, model, 0.999)

        update()                                                                # moments exist from the first one on
        seconds, peak = measure(update, device, repeats)
        useful = 3 * len(x) * forward + extra
        once, share = once or seconds, {k: useful / seconds / rate for k, rate in rates.items()}
        cells = len(x) / seconds, (kept + peak) / 2**20, useful / 1e9, share["shapes"], share["square"]
        show(name, seconds * 1e3, seconds / once, *cells)
        record = dict(name=name, seconds=seconds, over_diffusion=seconds / once, images_per_s=len(x) / seconds)
        yield record | dict(peak_bytes=kept + peak, useful_flops=useful, share_of_matmul=share)


def speed_sampling(networks, row, shape, steps, batch, flops, rates, device, repeats):
    """Latents only, from noise on the device. networks: {"fp32": model, "bf16": ...}."""
    z = sample.initial_noise(shape, 0, range(batch), device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)
    print(f"\nSampling {batch} pictures at a time; share of the matmul rate at the network's shapes")
    show("", "steps", "NFE", "ms", "images/s", "of shapes")
    for name, model in networks.items():
        for guidance in (1.0, 1.5):
            for k in steps:
                trace = []
                run = lambda trace=trace: sample.generate(model, row, z, y, k, guidance, trace=trace)
                seconds, _ = measure(run, device, repeats, memory=False)
                nfe = sum(copies for _, _, copies in trace[:k])
                share = batch * nfe * sum(flops) / seconds / rates[name]["shapes"]
                show(f"{name}, guidance {guidance:g}", k, nfe, seconds * 1e3, batch / seconds, share)
                yield dict(dtype=name, guidance=guidance, steps=k, nfe=nfe, seconds=seconds, images_per_s=batch / seconds, share=share)


def speed(a, rest):
    """Three tables of one network in one run. The network is random, and its zero layers too: zeros have no derivative."""
    cfg = train.parse_config(["--config", a.config, *rest])
    device = train.connect(cfg.device)
    try:
        speed_tables(a, cfg, device)
    finally:
        dist.destroy_process_group()


def speed_tables(a, cfg, device):
    shape, classes, row = (cfg.channels, cfg.side, cfg.side), cfg.classes, train.TRANSPORTS[cfg.transport]
    if not (all(shape) and classes):
        spec = data.open_data(cfg.data, shape, classes).spec
        shape, classes = tuple(spec["shape"]), len(spec["classes"])
    torch.manual_seed(cfg.seed)
    ablations = dict(shared_time=cfg.shared_time, interval_attention=cfg.interval_attention)
    model = TiM(channels=shape[0], patch=cfg.patch, **SIZES[cfg.size], classes=classes, **ablations).to(device)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and device.type == "cuda")
    fast = bf16 or device.type == "cuda" or device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    networks = {"fp32": copy.deepcopy(model).requires_grad_(False)}
    networks |= {"bf16": lower_precision(copy.deepcopy(networks["fp32"]))} if fast else {}
    if cfg.compile:
        for block in (block for network in networks.values() for block in network.blocks):
            block.compile()
    kind, h, rng = "bf16" if bf16 else "fp32", train.difference_width(cfg, bf16), data.rng(cfg.seed, device=device)
    tokens, n = shape[1] * shape[2] // cfg.patch**2, cfg.batch
    flops = forward_flops(model, tokens)
    types = dict(fp32=torch.float32, bf16=torch.bfloat16)
    rates = {k: matmul_rates(model, n * tokens, device, types[k], a.repeats) for k in networks}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    size = sum(p.numel() for p in model.parameters())
    print(f"{a.config}: {size:,} parameters, {tokens} tokens, {sum(flops) / 1e9:.4g} GFLOPs forward a picture, on {name}")
    for k, rate in rates.items():
        print(f"{k} matmul: {rate['shapes'] / 1e9:.5g} GFLOP/s at the network's shapes, {rate['square'] / 1e9:.5g} at a large square")

    x, eps = torch.randn(2, n, *shape, generator=rng, device=device)
    y = torch.randint(classes, (n,), generator=rng, device=device)
    t, r = sample_times(row, n, cfg.share_diffusion, cfg.share_consistency, rng, cfg.time_mean, cfg.time_std)
    free = slice(diffusion_count(n, cfg.share_diffusion), None)
    inputs = tuple(v[free] for v in (x, eps, t, r, y))
    out = dict(config=train.asdict(cfg), device=name, parameters=size, tokens=tokens, forward_flops=sum(flops), matmul=rates)
    out |= provenance() | dict(h=h)
    if len(inputs[0]):
        tables = speed_derivative(networks["fp32"], networks[kind], row, cfg, h, inputs, a.repeats)
        out["derivative"] = list(tables)
    count = a.sample_batch or (n if device.type == "cuda" else min(n, 16))
    out["training"] = list(speed_training(model, row, cfg, h, flops, rates[kind], bf16, (x, y), device, a.repeats))
    out["sampling"] = list(speed_sampling(networks, row, shape, a.steps, count, flops, rates, device, a.repeats))
    path = Path(a.out or Path(cfg.runs) / f"speed_{cfg.name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(out, indent=1))
    print(f"\n{path}")


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_arguments(argv=None):
    """The arguments, and what is left over for train.py's parser under `speed`."""
    shape = dict(allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    p = argparse.ArgumentParser(description=__doc__, **shape)
    commands = p.add_subparsers(dest="command", required=True)
    gpu = torch.cuda.is_available()

    def add(name, text, checkpoint=True):
        q = commands.add_parser(name, help=text, description=text, **shape)
        if checkpoint:
            q.add_argument("--checkpoint", help="run folder or file (default: the newest under runs/)")
            q.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
            q.add_argument("--precision", choices=("fp32", "bf16"), default="bf16" if gpu else "fp32",
                           help="of attention and MLP (default: bf16 on cuda, else fp32)")  # fmt: skip
        if name != "speed":
            q.add_argument("--device", default="cuda" if gpu else "cpu", help="default: cuda, else cpu")
            q.add_argument("--batch", type=int, default=100, help="pictures per pass (default 100)")
        return q

    q = add("fid", "FID, KID, precision, recall, Inception Score over the number of steps")
    q.add_argument("--reference", required=True, help="folder of pictures, demo, a data set's folder, .npz, or cached features")
    q.add_argument("--reference_num", type=int, help="use so many of its pictures (default: all)")
    q.add_argument("--images", help="score this folder of pictures instead of sampling")
    q.add_argument("--num", type=int, help="pictures to score (default: 50000, or all of --images)")
    q.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128], help="a row each (default 1 2 4 ... 128)")
    q.add_argument("--guidance", type=float, nargs="+", help="1 = off; several make a sweep (default: what the run says)")
    q.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
                   help="guide only at these times, as fractions of the range, ends included (default 0 1)")  # fmt: skip
    q.add_argument("--strict_interval", action="store_true", help="leave the ends of the interval out")
    q.add_argument("--side", type=int, help="crop pictures of folders to this many pixels (default: as stored)")
    q.add_argument("--inception", help="weights file in torch-fidelity's form (default: torch-fidelity downloads its own)")
    q.add_argument("--cache", default="runs/reference", help="folder of reference features (default runs/reference)")
    q = add("consistency", "a jump against two composed, and f against its own target, by length")
    q.add_argument("--data", help="pictures to start from (default: what the run was trained on)")
    q.add_argument("--num", type=int, default=200, help="pictures per row (default 200)")
    q = add("clip", "CLIP score of pictures with captions.jsonl; needs transformers", checkpoint=False)
    q.add_argument("--images", required=True, help="folder with captions.jsonl, a line each: {\"file\": ..., \"caption\": ...}")
    q.add_argument("--num", type=int, help="only the first so many (default: all)")
    q.add_argument("--model", default="openai/clip-vit-large-patch14", help="hub name or folder (default %(default)s)")
    q = add("speed", "derivative, training step and sampling; further flags are those of train.py", checkpoint=False)
    q.add_argument("--config", choices=train.PRESETS, required=True, help="preset of train.py")
    q.add_argument("--steps", type=int, nargs="+", default=[1, 2, 8, 128], help="of sampling (default 1 2 8 128)")
    q.add_argument("--sample_batch", type=int, help="pictures per pass of sampling (default: --batch; 16 on a CPU)")
    q.add_argument("--repeats", type=int, default=10, help="per figure, medians are shown (default 10, or 20 s)")
    q.add_argument("--out", help="JSON (default runs/speed_NAME.json)")
    a, rest = p.parse_known_args(argv)
    if rest and a.command != "speed":
        p.error(f"unrecognized arguments: {' '.join(rest)}")
    return a, rest


def main(argv=None):
    a, rest = parse_arguments(argv)
    {"fid": fid, "consistency": consistency, "clip": clip}[a.command](a) if a.command != "speed" else speed(a, rest)


if __name__ == "__main__":
    data.command(main)
