"""Measurements of a trained network: FID over the number of steps, consistency, CLIP score, speed.

    python evaluate.py fid --reference demo -n 2000 --steps 1 2 8    # torchrun shares the sampling
    python evaluate.py fid --reference photos --images pictures      # a folder instead of a network
    python evaluate.py consistency                                   # one jump against two
    python evaluate.py clip --images pictures                        # pictures and captions.jsonl
    python evaluate.py speed --config demo --batch 64                # takes every flag of train.py
"""

import argparse
import copy
import hashlib
import itertools
import json
import math
import subprocess
import sys
import time
import zipfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import data
import sample
import train
import transition
from data import DataSpec, UserError, explain, flag, require
from model import TiM, lower_precision


def print_row(row: dict, heads: bool = False) -> None:
    """One line of a table, the first value wide; `heads` prints the keys above it."""
    cells = [f"{v:.4g}" if isinstance(v, float) else "-" if v is None else v for v in row.values()]
    for name, *rest in [list(row), cells] if heads else [cells]:
        print(f"{name:28}" + "".join(f"{cell:>12}" for cell in rest), flush=True)


def append_record(file: Path, record: dict) -> None:
    """One more line of JSON, with the commit (-dirty where files were changed), torch and time."""
    git, here = ["git", "describe", "--always", "--dirty", "--exclude=*"], Path(__file__).parent
    try:
        commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = None
    when = time.strftime("%Y-%m-%dT%H:%M:%S")
    line = json.dumps(record | {"commit": commit, "torch": torch.__version__, "time": when})
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(line + "\n")


def results_folder(checkpoint: Path) -> Path:
    return checkpoint / "eval" if checkpoint.is_dir() else Path("runs/eval")


def digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


# --- fid: pictures --------------------------------------------------------------------------------

INTEGER = data.positive_int
FINITE = data.number(float, -data.LARGEST, data.LARGEST, "a finite number")


@dataclass(frozen=True)
class FidConfig:
    """The flags of `fid`."""

    reference: str = flag("", f"folder of pictures, .npz, or {', '.join(data.NAMED)}", required=True)
    reference_num: int | None = flag(None, "use this many of its pictures", INTEGER)
    images: str = flag("", "score this folder of pictures instead of a network")
    checkpoint: tuple = flag((), "default: the newest run", Path, nargs="+")
    num: int | None = flag(None, "pictures (default: 50000, or all of --images)", INTEGER)
    steps: tuple = flag((1, 2, 4, 8, 16, 32, 64, 128), "numbers of steps", INTEGER, nargs="+")
    guidance: tuple | None = flag(None, "default: the checkpoint's", FINITE, nargs="+")
    interval: tuple | None = flag(None, "guide at these fractions of the times (default: the checkpoint's)",
        data.share, nargs=2, metavar=("LOW", "HIGH"))
    strict_interval: bool | None = flag(None, "without its ends")
    stochastic: float | None = flag(None, "noise added per step, see sample.py", data.non_negative_float)
    precision: str = flag("auto", "of attention, MLP", choices=("auto", "fp32", "bf16"))
    autoencoder: str | None = flag(None, "folder or hub name (default: the checkpoint's)", str)
    side: int | None = flag(None, "crop pictures of --images and --reference to this", INTEGER)
    inception: str | None = flag(None, "weights in torch-fidelity's form (default: fetched)", str)
    cache: Path = flag(Path("runs/reference"), "folder of the reference's features")
    plot: Path | None = flag(None, "PNG of FID over steps (default: beside the records)", Path)
    seed: int = flag(0, "of the noise", data.natural)
    batch: int = flag(100, "pictures per pass", INTEGER)
    device: str = flag("auto", "auto (cuda, else cpu), cuda, mps or cpu")  # fmt: skip


class Pictures(torch.utils.data.Dataset):
    """Pictures as uint8 RGB (3, H, W), turned as EXIF says, resized and cropped to `side` as
    torch-fidelity does.

    items  files, or what `read` turns into PIL images; `stamp` stands for what it reads from
    key    stands for the content; of files, by their names, sizes and times of change
    """

    def __init__(self, name: str, items: list, side: int | None = None, read=Image.open, stamp=""):
        self.name, self.items, self.side, self.read, self.stamp = name, items, side, read, stamp

    @cached_property
    def key(self) -> str:
        known = self.items
        if self.read is Image.open:
            known = [(str(f), (stat := f.stat()).st_size, stat.st_mtime_ns) for f in known]
        return f"{Path(self.name).stem}_{digest(self.name, known, self.side, self.stamp, 'upright')}"

    def part(self, indices) -> "Pictures":
        items = [self.items[i] for i in indices]
        return Pictures(self.name, items, self.side, self.read, self.stamp)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> torch.Tensor:
        from torchvision.transforms import functional as vision

        with explain(Exception, f"{self.items[i]}: not a whole picture", "remove it"):
            picture = ImageOps.exif_transpose(self.read(self.items[i])).convert("RGB")
        if self.side:
            picture = vision.center_crop(vision.resize(picture, self.side), self.side)
        return vision.pil_to_tensor(picture)

    def __getitems__(self, batch: list[int]) -> list[torch.Tensor]:
        return list(data.in_threads(self.__getitem__, batch, 4))


def open_pictures(name: str, side: int | None) -> Pictures:
    """Those of a folder, at any depth, or of a data set."""
    if name in data.NAMED:
        source = data.open_data(name, mirror=False)
        decode, rng = data.Decoder(source.spec), np.random.default_rng  # of which nothing is drawn
        read = lambda i: data.to_image(decode(source.read([i], rng(0)).x)[0])
        return Pictures(name, list(range(len(source))), side, read, source.fingerprint())
    files = sorted(f for f in Path(name).rglob("*") if f.suffix.lower() in data.PICTURES)
    files = [f for f in files if not any(p[0] == "." for p in f.relative_to(name).parts)]
    require(files, f"{name}: no pictures in it; give a folder of some, or one of {', '.join(data.NAMED)}")
    return Pictures(name, files, side)


def open_npz(path: Path, side: int | None) -> tuple[Pictures, dict]:
    """The pictures of arr_0, and mu and sigma; either may be missing."""
    wrong = OSError, ValueError, EOFError, zipfile.BadZipFile
    failed = explain(wrong, f"--reference {path}: not a readable .npz of arrays", "give another")
    with failed, np.load(path) as archive:
        arrays = {k: archive[k] for k in archive.files if k in ("mu", "sigma", "arr_0")}
    images, statistics = arrays.get("arr_0", np.empty((0, 1, 1, 3), np.uint8)), {}
    if "mu" in arrays and "sigma" in arrays:  # in the types of torch-fidelity's own
        statistics = {"mu": np.float32(arrays["mu"]), "sigma": np.float64(arrays["sigma"])}
    fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
    rule = "expected arr_0 as uint8 (n, H, W, 3), or mu and sigma, or both; found"
    found = {k: f"{v.dtype} {v.shape}" for k, v in arrays.items()}
    require(fits and (statistics or len(images)), f"--reference {path}: {rule} {found}")
    read, stamp = lambda i: data.to_image(images[i]), data.digest_file(path)
    return Pictures(str(path), list(range(len(images))), side, read, stamp), statistics


def open_reference(cfg: FidConfig, n: int, features: Path) -> Pictures:
    """The real pictures to compare n others with.

    mu and sigma of an .npz go to where torch-fidelity keeps the statistics of these pictures in its
    cache `features`; there may be no pictures beside them, and then FID is the only score.
    """
    if cfg.reference.endswith(".npz"):
        real, statistics = open_npz(Path(cfg.reference), cfg.side)
    else:
        real, statistics = open_pictures(cfg.reference, cfg.side), {}
    if len(real):
        num, rule = cfg.reference_num or len(real), f"{real.name} holds {len(real)} pictures"
        require(2 <= num <= len(real), f"--reference_num {num}: {rule}; at least 2 of them")
        require(statistics or n <= num, f"--num {n}: the reference {rule}, of which {num} are used")
        real = real.part(np.linspace(0, len(real) - 1, num).round().astype(int))
    if statistics:
        torch.save(statistics, features / f"{real.key}-{EXTRACTOR}-stat-fid-{FEATURES}.pt")
    return real


# --- fid: scores ----------------------------------------------------------------------------------

EXTRACTOR, FEATURES = "inception-channels-last", "2048"  # names of network and layer
SCORES = {
    "FID": "frechet_inception_distance", "KID": "kernel_inception_distance_mean",
    "KID sd": "kernel_inception_distance_std", "precision": "precision", "recall": "recall",
    "IS": "inception_score_mean",
}  # fmt: skip


def register_inception() -> None:
    """torch-fidelity's Inception with its weights in channels-last order: 1.7 times as fast on a CPU,
    the same features but for rounding."""
    from torch_fidelity import register_feature_extractor, registry
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if EXTRACTOR in registry.FEATURE_EXTRACTORS_REGISTRY:
        return

    class ChannelsLast(FeatureExtractorInceptionV3):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.to(memory_format=torch.channels_last)

    register_feature_extractor(EXTRACTOR, ChannelsLast)


def score(pictures: Pictures, real: Pictures, options: dict) -> dict:
    """SCORES by torch_fidelity.calculate_metrics; FID alone if `real` is published statistics."""
    import torch_fidelity

    metrics = {"fid": True}
    if len(real):
        size, known = (tuple(p[0].shape[1:]) for p in (pictures, real))
        rule = f"{pictures.name} holds pictures of {size}, {real.name} of {known}"
        require(size == known, f"{rule} (height, width); give --side, or a --reference of that size")
        fewest = min(len(pictures), len(real))
        metrics |= {"kid": True, "prc": True, "isc": True}
        metrics["kid_subset_size"] = 1000 if fewest >= 1000 else fewest // 2  # all: no deviation
    inputs = {"input1": pictures, "input2": real, "input2_cache_name": real.key}
    register_inception()
    try:
        found = torch_fidelity.calculate_metrics(**inputs, **metrics, **options)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split(". ")[0].split())[:200]
        reason = reason or "statistics of another number of features"
        way = "mixed sizes need --side; offline, give --inception FILE in torch-fidelity's form"
        raise UserError(f"{pictures.name} against {real.name}: {reason}; {way}") from error
    if found.get("inception_score_std", 1) < 1e-9:
        del found["inception_score_mean"]  # weights without a classifier: its outputs are zero
    return {short: found.get(name) for short, name in SCORES.items()}


def open_table(cfg: FidConfig, n: int, device: torch.device, size: tuple[int, int]):
    """Open the reference and print the floor: at most n of its pictures against others of them.

    size     (height, width) of what will be scored
    returns  a function that scores pictures, prints and appends their row, and gives their FID
    """
    weights = "default"
    if cfg.inception:
        sample.read_tensors(Path(cfg.inception), "cpu")  # refuses code; torch-fidelity would run it
        weights = data.digest_file(cfg.inception)
    features = cfg.cache / f"features_{weights}"
    features.mkdir(parents=True, exist_ok=True)
    options = {
        "feature_extractor": EXTRACTOR, "feature_extractor_weights_path": cfg.inception,
        "cache_root": str(features), "cuda": device.type == "cuda", "save_cpu_ram": True,
        "verbose": sys.stderr.isatty(),
    }  # fmt: skip
    real = open_reference(cfg, n, features)
    half, floor = min(n, len(real) // 2), dict.fromkeys(SCORES)
    if half:
        rule = f"{tuple(real[0].shape[1:])}, not {size} as what is compared (height, width)"
        fits = size == real[0].shape[1:]
        require(fits, f"{real.name} has pictures of {rule}; --side crops those of folders and sets")
        order = torch.randperm(len(real), generator=data.rng(0))
        first, rest = real.part(order[:half]), real.part(order[half:])
        floor = score(first, rest, options | {"input1_cache_name": first.key})
    print(f"{n} pictures a row against {cfg.reference}; other numbers do not compare")
    print_row({"row": f"real, n = {half}", "steps": None, "NFE": None} | floor, heads=True)
    record = {"n": n, "reference": cfg.reference, "reference_n": len(real), "side": cfg.side}
    record |= {"inception": features.name, "floor": floor | {"n": half}}

    def add(row: dict, pictures: Pictures, file: Path, about: dict) -> float:
        row = row | score(pictures, real, options)
        print_row(row)
        append_record(file, about | row | record)
        return row["FID"]

    return add


# --- fid: the command -----------------------------------------------------------------------------


def fid(cfg: FidConfig) -> None:
    """A row of scores per checkpoint, guidance and number of steps, or one of a folder of pictures."""
    device = data.open_device(cfg.device)
    if not cfg.images:
        score_networks(cfg, device)
    elif data.ranks()[0] == 0:
        pictures = open_pictures(cfg.images, cfg.side)
        n, known = cfg.num or len(pictures), len(pictures)
        require(10 <= n <= known, f"--num {n}: {cfg.images} holds {known}; at least 10")
        folder = cfg.cache if cfg.images in data.NAMED else Path(cfg.images)
        row = {"row": Path(cfg.images).name, "steps": None, "NFE": None}
        pictures = pictures.part(np.linspace(0, known - 1, n).round().astype(int))
        add = open_table(cfg, n, device, tuple(pictures[0].shape[1:]))
        add(row, pictures, folder / "eval.jsonl", {"images": cfg.images})


def score_networks(cfg: FidConfig, device: torch.device) -> None:
    """All ranks draw, the first scores."""
    (rank, world_size), n = data.ranks(), cfg.num or 50_000
    require(n >= 10, f"--num {n}: at least 10 pictures")
    paths, curves = cfg.checkpoint or [sample.newest()], {}
    for path in paths:
        sample.checkpoint_file(path)  # is it there?
    require(not cfg.plot or cfg.plot.suffix == ".png", f"--plot {cfg.plot}: name a .png file")
    add = None
    if world_size > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # scoring takes its time
    for path, guidance in itertools.product(paths, cfg.guidance or [None]):
        sampler = sample.open_sampler(
            path, device, cfg.precision, autoencoder=cfg.autoencoder, guidance=guidance,
            interval=cfg.interval, strict=cfg.strict_interval, stochastic=cfg.stochastic,
        )  # fmt: skip
        way = "draw with sample.py --prompts_file FILE -n N, then fid --images"
        require(not sampler.texts, f"{path} was trained on text; {way}")
        if rank == 0 and not add:  # once it is known that there is something to score
            size = tuple(side * sampler.decode.factor for side in sampler.spec.shape[1:])
            add = open_table(cfg, n, device, size)
        name = f"{path}, guidance {sampler.options['guidance']:g}"
        for steps in cfg.steps:
            pictures, evaluations = draw(sampler, cfg, n, steps, results_folder(path))
            if add:
                row = {"row": name, "steps": steps, "NFE": evaluations}
                about = sampler.record | {"checkpoint": str(path), "seed": cfg.seed}
                found = add(row, pictures, results_folder(path) / "eval.jsonl", about)
                curves.setdefault(name, []).append((evaluations, found))
    if add:
        plot_curves(curves, n, cfg.plot or results_folder(paths[-1]) / "fid.png")
    if dist.is_initialized():
        dist.destroy_process_group()


def draw(sampler, cfg: FidConfig, n: int, steps: int, results: Path) -> tuple[Pictures, int]:
    """Draw what is not there yet, all ranks together; the folder is named by all it depends on.

    returns  the pictures, and the evaluations of the network for one of them, counted
    """
    trace = []
    sampler.latents([0], [0], steps, cfg.seed, trace)
    name = f"guidance{sampler.options['guidance']:g}_steps{steps}"
    folder = results / f"{name}_{digest(sampler.record, steps, cfg.seed)}"
    jobs = sample.numbered(n, list(range(len(sampler.spec.classes))))
    sample.write_pictures(sampler, jobs, steps, cfg.seed, cfg.batch, folder)
    if dist.is_initialized():
        dist.barrier()
    files = [folder / file for file, _, _ in jobs]
    return Pictures(str(folder), files), sum(evaluations for _, _, evaluations in trace)


def plot_curves(curves: dict, n: int, path: Path) -> None:
    """FID over evaluations of the network, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points)), "o-", label=name)
    axes.legend()
    axes.set(xlabel="NFE per picture", ylabel=f"FID, n = {n}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    figure.savefig(path, dpi=150)


# --- consistency ----------------------------------------------------------------------------------

LENGTHS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # bins of t - r, as fractions of the transport's range


def jump_errors(f, transport, x, eps, t, s, r, y) -> dict:
    """Errors of an any-step network f at t >= s >= r, (B,) each.

    jump    |x_{t->r} - x_{t->s->r}| over |x_{t->r} - x_t|: 0 for a perfect network
    own     |f - target| over |f| along the path that the network itself follows at t, without the
            data's noise: (x, eps) solved from f(x_t, t, t). 0 for a perfect network
    target  mean square of f - target as in training: a perfect network keeps the data's variance
    """
    size = lambda v: v.flatten(1).norm(dim=1).clamp(min=1e-12)
    x_t = transition.interpolate(transport, x, eps, t)
    f_r = f(x_t, t, r, y)
    x_r = transition.step(transport, x_t, f_r, t, r)
    x_s = transition.step(transport, x_t, f(x_t, t, s, y), t, s)
    x_s_r = transition.step(transport, x_s, f(x_s, s, r, y), s, r)
    gaps = []
    for pair in (transition.solve(transport, x_t, f(x_t, t, t, y), t), (x, eps)):
        df_dt = transition.exact_derivative(f, transport, *pair, t, r, y)
        gaps.append(f_r - transition.transition_target(transport, *pair, t, r, df_dt))
    jump, own = size(x_r - x_s_r) / size(x_r - x_t), size(gaps[0]) / size(f_r)
    return {"jump": jump, "own": own, "target": gaps[1].square().flatten(1).mean(1)}


def derivative_errors(model, transport, texts, x, eps, t, r, y) -> list[dict]:
    """Relative error of df/dt by difference over its half width h, against autodiff in fp64.

    fp64 shows truncation alone, fp32 and bf16 (attention, MLP) what rounding adds: the choice of h.
    """
    single, double = (x, eps, t, r), [v.double() for v in (x, eps, t, r)]
    models = {"fp64": copy.deepcopy(model).double(), "fp32": model}
    models["bf16"] = lower_precision(copy.deepcopy(model))
    nets = {name: sample.network_f(net, transport, texts) for name, net in models.items()}
    exact, rows = transition.exact_derivative(nets["fp64"], transport, *double, y), []
    for h in (0.001, 0.005, 0.01, 0.02, 0.05):
        row = {"half width h": f"{h:g}"}
        for name, f in nets.items():
            inputs = double if name == "fp64" else single
            gap = transition.finite_difference(f, transport, *inputs, y, h) - exact
            row[name] = float(gap.norm() / exact.norm())
        rows.append(row)
    return rows


@torch.no_grad()
def consistency(checkpoint, data_name, num: int, seed: int, batch: int, device: str) -> None:
    """num pictures of a data set, by default the checkpoint's, per length of the jump; in fp32."""
    path, device = checkpoint or sample.newest(), data.open_device(device)
    model, transport, config = sample.load(path, device)
    spec, name = DataSpec.from_json(config["data"]), data_name or config["train"].get("data")
    require(name, f"{path} does not say what it was trained on; give --data")
    source = data.open_data(name, spec.shape[1], mirror=False)
    data.check_fits(source.spec, *spec.shape[:2], len(spec.classes), spec.autoencoder)
    texts = None
    if spec.text:
        require(source.captions, f"--data {name} has no captions, which {path} was trained on")
        length, padded = spec.text["length"], not model.caption_mask
        encoder = data.load_text_encoder(spec.text["encoder"], device, length, padded)
        texts = data.Texts(source.captions, encoder, device)
    f, bucket, rows = sample.network_f(model, transport, texts), max(source.buckets, key=len), []
    low, span = transport.t_min, transport.t_max - transport.t_min
    for least, most in itertools.pairwise(LENGTHS):
        parts = []
        for start in range(0, num, batch):
            n, rng = min(batch, num - start), np.random.default_rng((seed, start))
            some = source.read(rng.integers(bucket.start, bucket.stop, n), rng).to(device)
            eps = sample.initial_noise(some.x.shape[1:], seed, range(start, start + n), device)
            u = torch.from_numpy(rng.random((3, n)))
            length = span * (least + (most - least) * u[0])
            t = low + length + (span - length) * u[1]
            times = torch.stack([t, t - length * u[2], t - length]).float()
            times = times.clamp(low, transport.t_max).to(device)
            if texts:
                texts.fetch(some.y)
            parts.append(jump_errors(f, transport, some.x, eps, *times, some.y))
        jump, own, target = (torch.cat([part[k] for part in parts]) for k in parts[0])
        row = {"length t - r, of the range": f"{least:g} to {most:g}", "jump": float(jump.median())}
        rows.append(row | {"own": float(own.median()), "target": float(target.mean())})
        print_row(rows[-1], heads=least == 0)
    print("medians of jump (t to r against t to s to r), own (f to its target); mean of target\n")
    print("relative error of df/dt by difference, on the last batch of the longest intervals")
    errors = []
    if device.type != "mps":  # which has no fp64
        errors = derivative_errors(model, transport, texts, some.x, eps, times[0], times[2], some.y)
    for row in errors:
        print_row(row, heads=row is errors[0])
    about = {"checkpoint": str(path), "step": config["step"], "n": num, "seed": seed, "data": name}
    about["weights"] = data.digest_file(sample.checkpoint_file(path))
    file = results_folder(path) / "consistency.jsonl"
    append_record(file, about | {"table": rows, "derivative": errors})


# --- clip -----------------------------------------------------------------------------------------


@torch.no_grad()
def clip(images: Path, num: int | None, model: str, batch: int, device: str) -> None:
    """100 max(cosine, 0) of the first `num` pictures and their captions, averaged."""
    device, file = data.open_device(device), images / "captions.jsonl"
    pairs = list(data.read_captions(file.read_bytes(), str(file)).items())[:num]
    require(len(pairs) >= (num or 1), f"--num {num}: {file} has {len(pairs)} captions")
    load = partial(data.load_pretrained, "transformers", flag=f"--model {model}", path=model)
    net, processor = load("CLIPModel").to(device).eval(), load("CLIPProcessor")
    pictures, scores = Pictures(str(images), [images / name for name, _ in pairs]), []
    for start in range(0, len(pairs), batch):
        part = range(start, min(start + batch, len(pairs)))
        texts, pixels = [pairs[i][1][0] for i in part], [pictures[i] for i in part]
        options = {"return_tensors": "pt", "padding": True, "truncation": True}
        out = net(**processor(text=texts, images=pixels, **options).to(device))
        cosine = torch.cosine_similarity(out.image_embeds, out.text_embeds)
        scores += (100 * cosine.clamp(min=0)).tolist()
    error = float(np.std(scores, ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else None
    row = {"images": images.name, "CLIP": float(np.mean(scores)), "error": error, "n": len(scores)}
    print_row(row, heads=True)
    append_record(images / "eval.jsonl", row | {"model": model})


# --- speed ----------------------------------------------------------------------------------------


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
    eager = torch.compiler.set_stance("force_eager")
    with eager, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        along = lambda s: f(transition.interpolate(transport, x, eps, s), s, r, y)
        return torch.func.jvp(along, (t,), (torch.ones_like(t),))[1]


def open_setting(cfg: train.Config, device: torch.device, dtype: torch.dtype) -> tuple:
    """cfg with nothing left open, arguments of TiM, a batch (noise where the preset knows its
    shape) and texts (of noise for features, as only the time counts)."""
    shape, texts = (cfg.channels, cfg.side, cfg.side), None
    if all(shape) and (cfg.classes or cfg.caption):
        source = data.random_data(shape, cfg.classes)
    else:
        source = data.open_data(cfg.data, cfg.side)
    spec = source.spec
    if source.captions is not None:
        length, width = (256, cfg.caption) if cfg.caption else (8, data.BYTES["width"])

        def encode(captions):
            mask = torch.ones(len(captions), length, dtype=torch.bool)
            return torch.randn(len(captions), length, width), mask

        texts = data.Texts(source.captions, encode, device)
        spec = replace(spec, text={"width": width})
    cfg = train.fill_in(replace(cfg, align=0.0), spec, device)
    batch = next(data.batches(source, cfg.batch, cfg.seed, [0], 1, patch=cfg.patch)).to(device)
    if texts:
        texts.fetch(batch.y)
    cfg = replace(cfg, h=train.half_width(cfg, dtype))
    return cfg, train.network_arguments(cfg, spec), batch, texts


def speed(cfg: train.Config, sampling_steps: list[int], seconds: float) -> None:
    """Time of updates, of df/dt and of sampling, each measured for about `seconds`."""
    device = data.open_device(cfg.device)
    dtype = data.pick_dtype(device, cfg.precision)
    cfg, network, batch, texts = open_setting(cfg, device, dtype)
    transport, n, x, y = transition.TRANSPORTS[cfg.transport], len(batch.x), batch.x, batch.y
    plain = replace(cfg, guide_gt=1.0, guide_cond=0.0, derivative="dde", tangent="data")
    updates = {
        "update, diffusion only": replace(plain, share_diffusion=1.0, share_consistency=0.0),
        "update, DDE": plain,
        "update, JVP": replace(plain, derivative="jvp"),
        "update, DDE, guided target": replace(plain, guide_cond=0.75),
        "update, DDE, own path": replace(plain, tangent="network"),
    }
    train.connect(device)
    networks, actions = train.build(cfg, network, device, dtype), {}
    for name, arm in updates.items():
        actions[name] = partial(train.train_step, networks, transport, arm, 0, [batch], texts)
    model = TiM(**network).to(device).eval().requires_grad_(False)  # as sample.py draws
    lower_precision(model, dtype)
    rng = data.rng(cfg.seed, device=device)
    t, r = transition.sample_times(transport, n, train.time_mixture(cfg, x.shape), rng)
    inputs = sample.network_f(networks.ema, transport, texts), transport, x, torch.randn_like(x), t, r, y
    actions["df/dt, DDE"] = partial(transition.finite_difference, *inputs, cfg.h)
    actions["df/dt, exact_derivative"] = partial(transition.exact_derivative, *inputs)
    actions["df/dt, torch.func.jvp"] = partial(plain_jvp, *inputs)
    z, null = torch.randn_like(x), None
    if texts:
        y, null = texts(y), texts(torch.full_like(y, texts.null))
    for guidance, k in itertools.product((1.0, 1.5), sampling_steps):
        draw_some = partial(sample.generate, model, transport, z, y, k, guidance, null=null)
        actions[f"sampling, {k} steps, guided {guidance:g}"] = draw_some
    side = 8192 if device.type == "cuda" else 1024
    square = torch.randn(side, side, device=device).to(dtype)
    rate = 2 * side**3 / measure(lambda: square @ square, device, seconds)[0]
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    parameters, first, rows = sum(p.numel() for p in model.parameters()), None, []
    print(f"{cfg.name}: {parameters:,} parameters, batches of {tuple(x.shape)}, {dtype}, {what}")
    print(f"matrix product of side {side}: {rate / 1e12:.4g} TFLOP/s")
    for name, action in actions.items():
        spent, flops, peak = measure(action, device, seconds)
        first = first or spent
        row = {"what": name, "ms": 1e3 * spent, "images/s": n / spent, "GFLOPs": flops / 1e9}
        row |= {"of matmul": flops / spent / rate, "MiB": peak, "x diffusion": spent / first}
        print_row(row, heads=not rows)
        rows.append(row)
    about = {"config": asdict(cfg), "device": what, "parameters": parameters, "matmul": rate}
    append_record(Path(cfg.runs) / "speed.jsonl", about | {"rows": rows})
    if dist.is_initialized():
        dist.destroy_process_group()


# --- The commands ---------------------------------------------------------------------------------


def parse_arguments(argv=None) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and for `speed` those that are left to train.py."""
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("fid", help="FID and other scores over steps", allow_abbrev=False)
    data.add_flags(p, FidConfig)

    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--batch", default=100, help="pictures per pass (default 100)", type=INTEGER)
    add("--device", default="auto", help="auto (default: cuda, else cpu), cuda, mps or cpu")
    with_shared = partial(commands.add_parser, parents=[shared], allow_abbrev=False)

    add = with_shared("consistency", help="one jump against two, by length").add_argument
    add("--checkpoint", type=Path, help="run folder or file (default: the newest run)")
    add("--data", dest="data_name", help="default: what the checkpoint was trained on")
    add("-n", "--num", default=200, help="pictures a row (default 200)", type=INTEGER)
    add("--seed", type=data.natural, default=0, help="of the noise (default 0)")

    add = with_shared("clip", help="CLIP score of pictures and their captions").add_argument
    add("--images", type=Path, required=True, help="folder with captions.jsonl")
    add("-n", "--num", help="only the first N", type=INTEGER)
    add("--model", default="openai/clip-vit-large-patch14", help="default %(default)s")

    text = "updates, df/dt and sampling; takes the flags of train.py, too"
    add = commands.add_parser("speed", help=text, allow_abbrev=False).add_argument
    add("--sampling_steps", type=INTEGER, nargs="+", default=[1, 8], help="default 1 8")
    add("--seconds", type=data.positive_float, default=5.0, help="per figure (default 5)")

    a, rest = parser.parse_known_args(argv)
    if rest and a.command != "speed":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return a, rest


def main(argv=None) -> None:
    a, rest = parse_arguments(argv)
    flags = vars(a)
    command = flags.pop("command")
    if command == "fid":
        fid(FidConfig(**flags))
    elif command == "consistency":
        consistency(**flags)
    elif command == "clip":
        clip(**flags)
    else:
        speed(train.parse_config(rest)[0], **flags)


if __name__ == "__main__":
    data.command(main)
