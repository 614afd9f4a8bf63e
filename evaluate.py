"""Measurements of a trained network: FID over the number of steps, consistency, CLIP score.

    python evaluate.py fid --reference demo -n 2000 --steps 1 2 8    # torchrun shares the sampling
    python evaluate.py fid --reference photos --images pictures      # a folder instead of a network
    python evaluate.py consistency                                   # one jump against two
    python evaluate.py clip --images pictures                        # pictures and captions.jsonl
"""

import argparse
import io
import itertools
import json
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import data  # first: it says so where the packages are missing

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import sample
import transition
from data import Spec, UserError, explain, flag, require


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
    data.say(f"added to {file}")


RESULTS = Path("runs/eval")  # where there is no run folder


def results_folder(checkpoint: Path) -> Path:
    return checkpoint / "eval" if checkpoint.is_dir() else RESULTS


# --- fid: pictures --------------------------------------------------------------------------------

INTEGER = data.positive_int


@dataclass(frozen=True)
class FidConfig:
    """The flags of `fid`."""

    reference: str = flag("", f"folder of pictures, .npz, or {', '.join(data.SETS)}", required=True)
    reference_num: int | None = flag(None, "compare with this many of its pictures, and as many as are\n"
        "scored of the rest for the floor, real against real (default: all, no floor)", INTEGER)
    images: str = flag("", "score this folder or .npz of pictures instead of a network")
    checkpoint: tuple = flag((), "default: the newest run", Path, nargs="+")
    num: int | None = flag(None, "pictures (default: 50000, or all of --images)", INTEGER,
        short=["-n"])
    steps: tuple = flag((1, 2, 4, 8, 16, 32, 64, 128), "numbers of steps", INTEGER, nargs="+")
    guidance: tuple | None = flag(None, "default: the checkpoint's", data.finite, nargs="+")
    interval: tuple | None = flag(None, "guide at these fractions of the times (default: the checkpoint's)",
        data.share, nargs=2, metavar=("LOW", "HIGH"))
    strict_interval: bool | None = flag(None, "without its ends")
    stochastic: float | None = flag(None, "noise added per step, see sample.py", data.non_negative_float)
    precision: str = flag("auto", "of attention, MLP", choices=("auto", "fp32", "bf16"))
    autoencoder: str | None = flag(None, "folder or hub name (default: the checkpoint's)", str)
    side: int | None = flag(None, "crop pictures of --images and --reference to this", INTEGER)
    inception: str | None = flag(None, "weights-inception-2015-12-05-6726825d.pth of torch-fidelity's\n"
        "releases (default: fetched)", str)
    cache: Path = flag(Path("runs/reference"), "folder of the reference's features")
    plot: Path | None = flag(None, "PNG of FID over steps (default: fid.png in eval/ of the run)", Path)
    seed: int = flag(0, "of the noise", data.natural)
    batch: int = flag(100, "pictures per pass", INTEGER)
    device: str = flag("auto", "auto (cuda, else cpu), cuda, mps or cpu")  # fmt: skip


class Pictures(torch.utils.data.Dataset):
    """Pictures as uint8 RGB (3, H, W), opened and cropped as training does.

    items  what read(item) makes an RGB picture of; side: cropped to it, or None: whole
    key    stands for the content; labels: class numbers, where known
    """

    def __init__(self, name: str, items: list, read, key: str, side=None, classes=(), labels=None):
        self.name, self.items, self.read, self.key = name, items, read, key
        self.side, self.classes, self.labels = side, tuple(classes), labels

    def part(self, indices) -> "Pictures":
        indices = [int(i) for i in indices]
        key = f"{self.key}_{data.digest(indices)}"
        labels = None if self.labels is None else self.labels[indices]
        items = [self.items[i] for i in indices]
        return Pictures(self.name, items, self.read, key, self.side, self.classes, labels)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> torch.Tensor:
        picture = self.read(self.items[i])
        if self.side:
            return torch.from_numpy(data.crop(picture, self.side))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def __getitems__(self, batch: list[int]) -> list[torch.Tensor]:
        return list(data.in_threads(self.__getitem__, batch, 4))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the first."""
        return tuple(self[0].shape[1:])


def read_entry(entry: data.Entry) -> Image.Image:
    with explain(ValueError, f"{entry.file}: {entry.name} is not a whole picture; remove it"):
        return data.open_picture(io.BytesIO(entry.read()))


def read_array(pixels: np.ndarray) -> Image.Image:
    """(H, W, 1 or 3)."""
    return data.to_image(np.ascontiguousarray(pixels)).convert("RGB")


def open_pictures(name: str, side: int | None) -> Pictures:
    """Those of a folder, at any depth, by the listing that training uses; or of a data set."""
    if name in data.SETS or Path(name, "plan.json").is_file():
        source = data.open_data(name)
        arrays = source.pixels or source.arrays
        require(arrays[0].dtype == np.uint8, f"{name}: holds latents and no pixels; give pictures")
        starts = source.starts

        def read(row):
            k = int(np.searchsorted(starts, row, side="right")) - 1
            return read_array(arrays[k][row - starts[k]].transpose(1, 2, 0))

        key = f"{Path(name).name}_{source.fingerprint}_{side}"
        labels = None if source.captions is not None else source.labels[source.rows]
        return Pictures(name, source.rows.tolist(), read, key, side, source.spec.classes, labels)
    require(Path(name).is_dir(), f"{name}: no such folder; give one of pictures, or one of "
            f"{', '.join(data.SETS)}")  # fmt: skip
    entries, others = data.list_pictures(name)
    data.say_unread(name, others)
    stats = [Path(e.file).stat() for e in entries]
    stamps = [(e.name, s.st_size, s.st_mtime_ns) for e, s in zip(entries, stats)]
    key = f"{Path(name).stem}_{data.digest(stamps, side)}"
    try:
        classes, labels = data.label_pictures(name, entries)
    except UserError:  # a folder that could not be trained on can still be scored
        classes, labels = (), None
    return Pictures(name, entries, read_entry, key, side, classes, labels)


def open_npz(path: Path, side: int | None) -> tuple[Pictures, dict]:
    """The pictures of arr_0, and mu and sigma; either may be missing."""
    wrong = OSError, ValueError, EOFError, zipfile.BadZipFile
    with explain(wrong, f"{path}: not a readable .npz of arrays; give another"):
        raw = path.read_bytes()
        with np.load(io.BytesIO(raw)) as archive:
            arrays = {k: archive[k] for k in archive.files if k in ("mu", "sigma", "arr_0")}
    images, statistics = arrays.get("arr_0", np.empty((0, 1, 1, 3), np.uint8)), {}
    if "mu" in arrays and "sigma" in arrays:  # in the types of torch-fidelity's own
        statistics = {"mu": np.float32(arrays["mu"]), "sigma": np.float64(arrays["sigma"])}
    fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
    found = {k: f"{v.dtype} {v.shape}" for k, v in arrays.items()}
    require(fits and (statistics or len(images)), f"{path}: expected arr_0 as uint8 (n, H, W, 3), or mu "
            f"and sigma, or both; found {found}")  # fmt: skip
    read = lambda i: read_array(images[i])
    key = f"{path.stem}_{data.digest(raw)}_{side}"
    return Pictures(str(path), list(range(len(images))), read, key, side), statistics


def open_reference(cfg: FidConfig) -> tuple[Pictures, dict]:
    """The real pictures, and the mu and sigma of an .npz; either may be missing."""
    if cfg.reference.endswith(".npz"):
        return open_npz(Path(cfg.reference), cfg.side)
    return open_pictures(cfg.reference, cfg.side), {}


def check_size(name, size: tuple[int, int], real: Pictures) -> None:
    if len(real):
        require(size == real.size, f"{name} has pictures of {size}, {real.name} of {real.size} (height, "
                "width); --side crops those of folders and sets")  # fmt: skip


def split_reference(cfg: FidConfig, real: Pictures, n: int) -> tuple[Pictures, Pictures]:
    """The real pictures to compare n others with, and n of the rest, for the floor; or none."""
    num = cfg.reference_num or len(real)
    require(2 <= num <= len(real), f"--reference_num {num}: {real.name} holds {len(real)} pictures; at "
            "least 2 of them")  # fmt: skip
    require(n <= num, f"--num {n}: the reference {real.name} holds {len(real)} pictures, of which {num} "
            "are used")  # fmt: skip
    used = data.spread(len(real), num)
    rest = np.setdiff1d(np.arange(len(real)), used)
    if len(rest) < n:
        data.note(f"no floor: {n} real pictures beside the reference are needed, {len(rest)} are left; "
                  "see --reference_num")  # fmt: skip
        rest = rest[:0]
    return real.part(used), real.part(rest[data.spread(len(rest), n)])


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
        way = "mixed sizes need --side, and --inception weights in torch-fidelity's form"
        if isinstance(error, OSError):
            way = "offline, give --inception FILE"
        raise UserError(f"{pictures.name} against {real.name}: {reason}; {way}") from error
    if found.get("inception_score_std", 1) < 1e-9:
        del found["inception_score_mean"]  # weights without a classifier: its outputs are zero
    return {short: found.get(name) for short, name in SCORES.items()}


class Table:
    """Prints the floor (n other pictures of the reference against it), then a row each.

    mu and sigma of an .npz go to where torch-fidelity keeps the statistics of these pictures in its
    cache; there may be no pictures beside them, and then FID is the only score.
    """

    def __init__(self, cfg: FidConfig, real: Pictures, statistics: dict, n: int, device: torch.device):
        weights = "default"
        found = not cfg.inception or Path(cfg.inception).is_file()
        require(found, f"--inception {cfg.inception}: no such file; fix the path")
        if cfg.inception:  # torch-fidelity would run code that is in it; `read_tensors` does not
            weights = sample.read_tensors(Path(cfg.inception), "cpu")[2]
        features = cfg.cache / f"features_{weights}"
        features.mkdir(parents=True, exist_ok=True)
        self.options = {
            "feature_extractor": EXTRACTOR, "feature_extractor_weights_path": cfg.inception,
            "cache_root": str(features), "cuda": device.type == "cuda", "save_cpu_ram": True,
            "verbose": sys.stderr.isatty(),
        }  # fmt: skip
        floor, others = dict.fromkeys(SCORES), ()
        if statistics:
            torch.save(statistics, features / f"{real.key}-{EXTRACTOR}-stat-fid-{FEATURES}.pt")
        else:
            real, others = split_reference(cfg, real, n)
        self.real = real
        data.say(f"Inception takes about .1 s a picture on a CPU core: {n} a row, and once {len(real)} of "
                 "the reference")  # fmt: skip
        if len(others):
            floor = score(others, real, self.options | {"input1_cache_name": others.key})
        print(f"{n} pictures a row against {cfg.reference}; other numbers do not compare")
        print_row({"row": f"real, n = {len(others)}", "steps": None, "NFE": None} | floor, heads=True)
        self.record = {"n": n, "reference": cfg.reference, "reference_n": len(real)}
        self.record |= {"side": cfg.side, "inception": features.name, "floor": floor | {"n": len(others)}}

    def add(self, row: dict, pictures: Pictures, file: Path, about: dict) -> float:
        """Score pictures, print and append their row; returns their FID."""
        row = row | score(pictures, self.real, self.options)
        print_row(row)
        append_record(file, about | row | self.record)
        return row["FID"]


# --- fid: the command -----------------------------------------------------------------------------


def fid(cfg: FidConfig) -> None:
    """A row of scores per checkpoint, guidance and number of steps, or one of a folder of pictures."""
    device = data.open_device(cfg.device)
    if not cfg.images:
        score_networks(cfg, device)
    elif data.ranks()[0] == 0:
        npz = cfg.images.endswith(".npz")
        pictures = open_npz(Path(cfg.images), cfg.side)[0] if npz else open_pictures(cfg.images, cfg.side)
        n, known = cfg.num or len(pictures), len(pictures)
        require(10 <= n <= known, f"--num {n}: {cfg.images} holds {known}; at least 10")
        row = {"row": Path(cfg.images).name, "steps": None, "NFE": None}
        pictures, (real, statistics) = pictures.part(data.spread(known, n)), open_reference(cfg)
        check_size(cfg.images, pictures.size, real)
        table = Table(cfg, real, statistics, n, device)
        table.add(row, pictures, RESULTS / "eval.jsonl", {"images": cfg.images})


def class_shares(real: Pictures | None, classes: tuple[str, ...], n: int) -> tuple[list[int], str]:
    """n class numbers in the reference's shares of these classes, or evenly where it has other ones;
    and a word for the row."""
    known = real is not None and real.labels is not None and real.classes == classes
    counts = np.bincount(real.labels, minlength=len(classes)) if known else np.ones(len(classes))
    if (counts == counts[0]).all():
        return [i % len(classes) for i in range(n)], "even"
    labels = np.sort(real.labels)[data.spread(len(real.labels), n)]
    return np.random.default_rng(0).permutation(labels).tolist(), "as the reference"


def score_networks(cfg: FidConfig, device: torch.device) -> None:
    """All ranks draw, the first scores."""
    n = cfg.num or 50_000
    require(n >= 10, f"--num {n}: at least 10 pictures")
    paths, curves = cfg.checkpoint or [sample.newest()], {}
    for path in paths:
        sample.checkpoint_file(path)  # is it there?
    require(not cfg.plot or cfg.plot.suffix == ".png", f"--plot {cfg.plot}: name a .png file")
    first, real, table = data.ranks()[0] == 0, None, None
    if first:  # before the ranks are connected, as opening a set is a matter of all of them
        real, statistics = open_reference(cfg)
    data.connect(torch.device("cpu"))
    for path, guidance in itertools.product(paths, cfg.guidance or [None]):
        sampler = sample.open_sampler(
            path, device, cfg.precision, autoencoder=cfg.autoencoder, guidance=guidance,
            interval=cfg.interval, strict=cfg.strict_interval, stochastic=cfg.stochastic,
        )  # fmt: skip
        require(not sampler.spec.text, f"{path} was trained on text; draw with sample.py --prompts_file "
                "FILE -n N, then fid --images")  # fmt: skip
        if first:
            check_size(path, tuple(k * sampler.decode.factor for k in sampler.spec.shape[1:]), real)
            table = table or Table(cfg, real, statistics, n, device)
        name, classes = f"{path}, guidance {sampler.options['guidance']:g}", sampler.spec.classes
        conditions, shares = data.first_rank(class_shares, table and table.real, classes, n)
        for steps in cfg.steps:
            pictures, evaluations = draw(sampler, cfg, conditions, steps, results_folder(path))
            if table:
                row = {"row": name, "steps": steps, "NFE": evaluations}
                about = sampler.record | {"checkpoint": str(path), "seed": cfg.seed, "classes": shares}
                found = table.add(row, pictures, results_folder(path) / "eval.jsonl", about)
                curves.setdefault(name, []).append((evaluations, found))
    if table:
        data.plot(cfg.plot or results_folder(paths[-1]) / "fid.png", curves, xlabel="NFE per picture",
                  ylabel=f"FID, n = {n}", xscale="log")  # fmt: skip
    if dist.is_initialized():
        dist.destroy_process_group()


def draw(sampler, cfg: FidConfig, conditions: list[int], steps: int, results: Path):
    """Draw what is not there yet, all ranks together; the folder is named by all it depends on.

    returns  the pictures, and the evaluations of the network for one of them, counted
    """
    trace = []
    sampler.latents([0], [0], steps, cfg.seed, trace)  # one picture, only to count
    name = f"guidance{sampler.options['guidance']:g}_steps{steps}"
    key = data.digest(sampler.record, steps, cfg.seed, conditions)
    jobs = sample.numbered(len(conditions), conditions)
    folder = results / f"{name}_{key}"
    sample.write_pictures(sampler, jobs, steps, cfg.seed, cfg.batch, folder)
    data.everyone(None)  # waits for all
    entries = [data.Entry(file, str(folder / file)) for file, *_ in jobs]
    pictures = Pictures(str(folder), entries, read_entry, key)
    return pictures, sum(evaluations for *_, evaluations in trace)


# --- consistency ----------------------------------------------------------------------------------

LENGTHS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # bins of t - r, see `Transport.fraction`


def jump_errors(f, transport, x, eps, t, s, r, y) -> dict:
    """Errors of an any-step network f at t >= s >= r, (B,) each.

    jump    |x_{t->r} - x_{t->s->r}| over |x_{t->r} - x_t|: 0 for a perfect network
    own     |f - target| over |f| along the path that the network itself follows at t, without the
            data's noise: (x, eps) solved from f(x_t, t, t). 0 for a perfect network
    target  mean square of f - target as in training: a perfect network keeps the data's variance
    """
    norm = lambda v: v.flatten(1).norm(dim=1).clamp(min=1e-12)
    x_t = transition.interpolate(transport, x, eps, t)
    f_r = f(x_t, t, r, y)
    x_r = transition.step(transport, x_t, f_r, t, r)
    x_s = transition.step(transport, x_t, f(x_t, t, s, y), t, s)
    x_s_r = transition.step(transport, x_s, f(x_s, s, r, y), s, r)
    gaps = []
    for pair in (transition.solve(transport, x_t, f(x_t, t, t, y), t), (x, eps)):
        df_dt = transition.exact_derivative(f, transport, *pair, t, r, y)
        gaps.append(f_r - transition.transition_target(transport, *pair, t, r, df_dt))
    jump, own = norm(x_r - x_s_r) / norm(x_r - x_t), norm(gaps[0]) / norm(f_r)
    return {"jump": jump, "own": own, "target": gaps[1].square().flatten(1).mean(1)}


@torch.no_grad()
def consistency(checkpoint, data_name, num: int, seed: int, batch: int, device: str) -> None:
    """num pictures of a data set, by default the checkpoint's, per length of the jump; in fp32. A
    network with a guide_range is measured at guidance 1."""
    path, device = checkpoint or sample.newest(), data.open_device(device)
    model, transport, config = sample.load(path, device)
    spec, name = Spec.from_json(config["data"]), data_name or config["train"].get("data")
    require(name, f"{path} does not say what it was trained on; give --data")
    source = data.open_data(name, spec.shape[1], mirror=False)
    data.check_fits(source.spec, *spec.shape[:2], len(spec.classes), spec.autoencoder)
    wanted = not spec.text or source.captions is not None
    require(wanted, f"--data {name} has no captions, which {path} was trained on")
    conditions = data.open_conditions(spec, device, not model.caption_mask)
    f, bucket = transition.network_f(model, transport, model.predict), max(source.buckets, key=len)
    rows = []
    for least, most in itertools.pairwise(LENGTHS):
        parts = []
        for start in range(0, num, batch):
            n, rng = min(batch, num - start), np.random.default_rng((seed, start))
            some = source.read(rng.integers(bucket.start, bucket.stop, n), rng)
            x = data.network_space(some.x.to(device), spec, data.seeded(seed, start, 3, device=device))
            eps = sample.initial_noise(x.shape[1:], seed, range(start, start + n), device)
            u = torch.from_numpy(rng.random((3, n)))
            length = least + (most - least) * u[0]
            t = length + (1 - length) * u[1]
            times = transport.at(torch.stack([t, t - length * u[2], t - length])).float().to(device)
            y, _ = conditions(some.y)
            y = (y, torch.ones(n, device=device)) if model.guide_range else y
            parts.append(jump_errors(f, transport, x, eps, *times, y))
        jump, own, target = (torch.cat([part[k] for part in parts]) for k in parts[0])
        row = {"length t - r, of the range": f"{least:g} to {most:g}", "jump": float(jump.median())}
        rows.append(row | {"own": float(own.median()), "target": float(target.mean())})
        print_row(rows[-1], heads=least == 0)
    print("medians of jump (t to r against t to s to r), own (f to its target); mean of target")
    about = {"checkpoint": str(path), "step": config["step"], "n": num, "seed": seed, "data": name}
    about["weights"] = config["digest"]
    append_record(results_folder(path) / "consistency.jsonl", about | {"table": rows})


# --- clip -----------------------------------------------------------------------------------------


@torch.no_grad()
def clip(images: Path, num: int | None, model: str, batch: int, device: str) -> None:
    """100 max(cosine, 0) of the first `num` pictures and their captions, averaged."""
    device, file = data.open_device(device), images / "captions.jsonl"
    texts = data.read_captions(file.read_bytes(), str(file))
    require(len(texts) >= (num or 1), f"--num {num}: {file} has captions of {len(texts)} pictures")
    pairs = [(name, text) for name in list(texts)[:num] for text in texts[name]]
    load = partial(data.load_pretrained, "transformers", option=f"--model {model}", path=model)
    net, processor = load("CLIPModel").to(device).eval(), load("CLIPProcessor")
    scores = []
    for start in range(0, len(pairs), batch):
        names, captions = zip(*pairs[start : start + batch])
        pixels = [read_entry(data.Entry(name, str(images / name))) for name in names]
        options = {"return_tensors": "pt", "padding": True, "truncation": True}
        out = net(**processor(text=list(captions), images=pixels, **options).to(device))
        cosine = torch.cosine_similarity(out.image_embeds, out.text_embeds)
        scores += (100 * cosine.clamp(min=0)).tolist()
    error = float(np.std(scores, ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else None
    row = {"images": images.name, "CLIP": float(np.mean(scores)), "error": error, "n": len(scores)}
    print_row(row, heads=True)
    append_record(RESULTS / "clip.jsonl", row | {"images": str(images), "model": model})


# --- The commands ---------------------------------------------------------------------------------


def main(argv=None) -> None:
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("fid", help="FID and other scores over steps", allow_abbrev=False,
                            formatter_class=form)  # fmt: skip
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

    flags = vars(parser.parse_args(argv))
    command = flags.pop("command")
    if command == "fid":
        fid(FidConfig(**flags))
    elif command == "consistency":
        consistency(**flags)
    else:
        clip(**flags)


if __name__ == "__main__":
    data.command(main)
