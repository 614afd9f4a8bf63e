"""Pictures to latents to batches, and network space back to pictures.

    torchrun --nproc_per_node=8 data.py encode --images imagenet/train --out latents    # again = go on where it stopped
    python data.py encode --native --images pictures --out latents     # buckets that keep the pictures' aspect ratios
    python data.py inspect latents                                  # counts, statistics, checksums, a contact sheet

A data set has `spec`, what a checkpoint must remember of it, `labels` (n,) int64 and `read(index, rng)`, which gives
float32 pictures or latents in network space (mean 0, deviation about 1). `batches` turns one into an endless stream
that is a function of (seed, step, slot) alone. Reading is numpy's: torch in the reading threads would start a second
team of OpenMP threads each, which slowed training on two cores by 1.2 and more.
"""

import argparse
import gzip
import hashlib
import importlib
import io
import json
import math
import os
import re
import resource
import sys
import tarfile
import textwrap
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import count, groupby, product, zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm import tqdm

DEMO = Path(__file__).parent / "demo"
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
AUTOENCODERS = {  # name: place on the model hub, latent channels, scale of network space
    "sd-vae": ("stabilityai/sd-vae-ft-ema", 4, 0.18215),
    "dc-ae": ("mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers", 32, 0.41407),
}
BY_CHANNELS = {channels: (name, scale) for name, (_, channels, scale) in AUTOENCODERS.items()}
FACTORS = {"sd-vae": 8, "dc-ae": 32}  # pixels per latent place and side
TILED = 1024**2  # pixels of a picture beyond which it is decoded in tiles
NAMED = 0.25  # share of a picture that a bucket named in captions.jsonl may cut away
SLACK = 0.045  # areas of buckets lie this near to the base area, so tokens of two batches differ by less than 10%
GEMMA = "google/gemma-3-1b-it"  # the text encoder of the released weights
BYTES = dict(encoder="bytes", length=64, width=128)  # the one that needs no download, see `sample.hash_words`
TABLE = 4096  # captions up to here are encoded once and kept on the device, more of them batch by batch


class UserError(Exception):
    """Something the user can put right. The message names the value, the rule and the way out."""


def command(main):
    """Run a command line; a UserError becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def rng(*key: int, device="cpu") -> torch.Generator:
    """A generator that is a function of the key alone, such as (seed, step, slot) or (seed, image index)."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)


def in_threads(function, jobs, threads: int, ahead: int = 0):
    """function(*job) of each job, in order, from threads that work up to `ahead` jobs ahead (or 4 per thread)."""
    with ThreadPoolExecutor(threads) as pool:
        queue = deque()
        for job in jobs:
            queue.append(pool.submit(function, *job))
            if len(queue) >= (ahead or 4 * threads):
                yield queue.popleft().result()
        yield from (future.result() for future in queue)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures on disk


def in_tar(stream, file: str, base: int, folder: str):
    """Pictures in a tar and the tars within, as (name, file, offset, bytes); nothing is unpacked."""
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                name, ending = os.path.splitext(folder + member.name.removeprefix("./"))
                if ending.lower() == ".tar":
                    yield from in_tar(tar.extractfile(member), file, base + member.offset_data, name + "/")
                elif ending.lower() in PICTURES:
                    yield name + ending, file, base + member.offset_data, member.size
    except tarfile.TarError as error:
        raise UserError(f"{file}: not a whole, uncompressed tar ({error}); fetch it again or unpack it") from error


def list_pictures(root) -> list[tuple[str, str, int, int]]:
    """Every picture under a folder or in a tar as (name, file, offset, bytes), sorted by name.

    A tar stands for a folder of its name, so a tar of one tar per class (ImageNet's) lists like its unpacked tree.
    """
    root, found = Path(root), []
    walk = [(root.parent, [], [root.name])] if root.is_file() else os.walk(root, followlinks=True)
    for folder, _, names in walk:
        for name in names:
            path, ending = os.path.join(folder, name), os.path.splitext(name)[1].lower()
            inside = "" if root.is_file() else os.path.relpath(path, root)
            if ending == ".tar":
                with open(path, "rb") as stream:
                    found += in_tar(stream, path, 0, inside and inside[:-4] + "/")
            elif ending in PICTURES and not name.startswith("."):
                found.append((inside, path, 0, -1))
    if not found:
        raise UserError(f"{root}: no pictures; expected a folder or tar of them per class, or captions.jsonl with them")
    return sorted(found)


def label_pictures(root, names: list[str]) -> tuple[list[str], np.ndarray]:
    """Sorted class names and each picture's label: the first folder that not all share; one class if there is none."""
    parts, depth = [n.split("/") for n in names], 0
    while all(len(p) > depth + 2 and p[depth] == parts[0][depth] for p in parts):
        depth += 1
    beside = [n for n, p in zip(names, parts) if len(p) == depth + 1]
    if beside and len(beside) < len(names):
        raise UserError(f"{root}: {beside[0]} lies beside the class folders; move it into one, or away")
    of = [Path(root).stem if beside else p[depth] for p in parts]
    classes = sorted(set(of))
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array([number[name] for name in of])


def read_bytes(entry, most: int = -1) -> bytes:
    """A picture's file, or its first `most` bytes. A disk that fails is a UserError: a set must not shrink because a
    mount went away."""
    _, file, offset, size = entry                       # both -1: to the end of the file
    try:
        with open(file, "rb") as stream:
            stream.seek(offset)
            return stream.read(min((n for n in (size, most) if n >= 0), default=-1))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error}); see to the disk, then run again") from error


def open_picture(entry, upright: bool = False) -> Image.Image:
    """The picture (an animation's first frame) as RGB; upright: turned as its EXIF says. raises ValueError if broken.

    Square sets leave EXIF alone, as ADM does, whose statistics and latents others compare with.
    """
    raw = read_bytes(entry)
    try:
        with Image.open(io.BytesIO(raw)) as picture:
            picture = ImageOps.exif_transpose(picture) if upright else picture
            if picture.mode == "F":
                raise ValueError("floating-point pictures have no known white")
            if picture.mode.startswith("I"):            # 16 bits of grey, which `convert` would clip to white
                picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
            return picture.convert("RGB")
    except Exception as error:                          # decoders raise anything from SyntaxError to OverflowError
        raise ValueError(fault(error)) from error


def fault(error) -> str:
    """An error in words that are the same on every rank: Pillow names its buffer by an address."""
    return re.sub(r" <_io\.BytesIO[^>]*>", "", f"{type(error).__name__}: {error}")


def upright_size(entry) -> list[int] | str:
    """[height, width] as EXIF turns it, from the header alone, or the reason why there is none."""
    for most in (2**16, -1):                            # some formats keep their header at the end
        raw = read_bytes(entry, most)
        try:
            with Image.open(io.BytesIO(raw)) as picture:
                turned = picture.format != "TIFF" and Image.Image.getexif(picture).get(0x0112, 1) > 4
                return [*picture.size] if turned else [picture.height, picture.width]
        except Exception as error:
            reason = fault(error)
    return reason


def crop(picture: Image.Image, height: int, width: int = 0) -> np.ndarray:
    """uint8 (3, height, width), or a square: halved while that is possible, scaled to cover it, the centre cut out.

    As in ADM (Dhariwal and Nichol 2021), whose statistics and latents others compare with.
    """
    width = width or height
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.BOX)
    scale = max(width / picture.width, height / picture.height)
    w, h = (round(s * scale) for s in picture.size)
    picture = picture.resize((w, h), Image.BICUBIC)
    left, top = (w - width) // 2, (h - height) // 2
    return np.asarray(picture.crop((left, top, left + width, top + height))).transpose(2, 0, 1)


def bucket_sizes(side: int, step: int, limit: float = 4.0) -> list[tuple[int, int]]:
    """At most 33 sizes (height, width), from wide to tall: multiples of `step`, areas within SLACK of side^2, ratios
    to 1:limit. A picture goes to the nearest ratio and loses at most `crop_bound` of its area."""
    n = side // step
    short = {round(v) for v in np.geomspace(n / limit**0.5, n, 17)} - {0}
    pairs = {(h, round(n * n / h)) for h in short}
    fits = [(h, w) for h, w in pairs if w <= limit * h and abs(h * w / n**2 - 1) <= SLACK]
    return sorted({(step * a, step * b) for h, w in fits for a, b in ((h, w), (w, h))}, key=lambda s: s[0] / s[1])


def cut_away(size, bucket) -> float:
    """The share of a picture (height, width) that is lost where it covers `bucket`."""
    return 1 - math.exp(-abs(math.log(size[0] / size[1] * bucket[1] / bucket[0])))


def crop_bound(buckets) -> float:
    """The largest share of a picture that rounding its ratio to the nearest of `buckets` cuts away."""
    return 1 - math.exp(-np.diff(np.log([h / w for h, w in buckets])).max(initial=0) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Text


def read_captions(source: Path) -> dict[str, dict]:
    """captions.jsonl as {image_file: its line}, with "captions" a list. Broken lines are listed and skipped."""
    found, faults = {}, []
    if not source.is_file():
        raise UserError(f"{source} is missing: a line {{image_file, captions}} per picture; put it back")
    with source.open("rb") as lines:                    # not splitlines(): it also cuts at U+2028, which JSON may hold
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                name, texts = record["image_file"], record["captions"]
                texts = [texts] if isinstance(texts, str) else texts
                if not texts or not isinstance(texts, list) or not all(isinstance(t, str) for t in (*texts, name)):
                    raise ValueError("image_file must be a string, captions a list of some")
                "".join(texts).encode()                                         # half a surrogate pair is no text
                found[name] = record | dict(captions=texts)
            except (ValueError, KeyError, TypeError) as error:
                if line.strip():
                    faults.append(f"  line {number}: {type(error).__name__}: {error}")
    if not found:
        why = faults[0].strip() if faults else "empty"
        raise UserError(f'{source}: no line is {{"image_file": "a.png", "captions": ["a text", ...]}}; {why}')
    if faults and os.environ.get("RANK", "0") == "0":
        print("\n".join([f"{source}: {len(faults)} broken lines are skipped", *faults[:20]]), file=sys.stderr)
    return found


def find_pictures(root) -> tuple[list, list[str], np.ndarray, list | None]:
    """Pictures of a folder or tar, as (entries of `list_pictures`, class names, labels, lines of captions.jsonl).

    With captions.jsonl: the pictures that it names and their lines, in one order, and no class; without it no lines.
    """
    files, source = list_pictures(root), Path(root) / "captions.jsonl"
    if not source.is_file():
        return files, *label_pictures(root, [f[0] for f in files]), None
    records = read_captions(source)
    files = [f for f in files if f[0] in records]
    if not files:
        raise UserError(f"{source} names none of the pictures under {root}; image_file is relative to that folder")
    if len(files) < len(records) and os.environ.get("RANK", "0") == "0":
        absent = sorted(records.keys() - {f[0] for f in files})
        print(f"{source}: {len(absent)} lines name no picture: {', '.join(absent[:20])}", file=sys.stderr)
    return files, [], np.arange(len(files)), [records[f[0]] for f in files]


class Captions:
    """The captions of a set by number, one or several a picture; the number after the last, `null`, is no caption."""

    def __init__(self, lists):
        self.ends = np.cumsum([len(texts) for texts in lists])
        flat = [text.encode() for texts in lists for text in texts]
        self.bytes, self.cuts, self.null = b"".join(flat), np.cumsum([0, *map(len, flat)]), len(flat)

    def __getitem__(self, number: int) -> str:
        return "" if number == self.null else self.bytes[self.cuts[number] : self.cuts[number + 1]].decode()

    def digest(self) -> str:
        return hashlib.sha256(self.bytes + self.cuts.tobytes() + self.ends.tobytes()).hexdigest()[:16]

    def draw(self, picture: np.ndarray, chance) -> np.ndarray:
        """The number of one of each picture's captions."""
        first = np.where(picture > 0, self.ends[picture - 1], 0)
        return first + chance.integers(self.ends[picture] - first)


# ---------------------------------------------------------------------------------------------------------------------
# Shards on disk

NORMAL = torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536).float().numpy()  # its quantiles


def open_tensor(path, name) -> tuple[int, list[int], int]:
    """A tensor of a safetensors file as (descriptor, shape, where it begins). raises UserError if missing or cut."""
    try:
        fd = os.open(path, os.O_RDONLY)
        length = int.from_bytes(os.pread(fd, 8, 0), "little")
        head = json.loads(os.pread(fd, min(length, 10**8), 8))
        want = 8 + length + max(v["data_offsets"][1] for k, v in head.items() if k != "__metadata__")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no safetensors file that opens ({error}); delete it and encode it again") from error
    if want != (have := os.fstat(fd).st_size):
        raise UserError(f"{path}: has {have} bytes, its header says {want}; delete it and encode it again")
    return fd, head[name]["shape"], 8 + length + head[name]["data_offsets"][0]


class Rows:
    """One tensor that runs on over many shards, read row by row at its place.

    Positioned reads rather than a memory map: they come from the same page cache, but mapped pages would count as
    memory of each process, and a page fault stops every thread of the interpreter where a read lets them run.
    """

    def __init__(self, files, name):
        low, high = resource.getrlimit(resource.RLIMIT_NOFILE)                  # a descriptor per shard
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(low, min(high, 2**16)), high))
        self.files, (self.fds, shapes, places) = files, zip(*(open_tensor(f, name) for f in files))
        self.shape, counts = shapes[0][1:], [shape[0] for shape in shapes]
        self.ends = np.cumsum(counts)
        self.zeros = np.array(places) - (self.ends - counts) * 2 * np.prod(self.shape)  # where row 0 would be; float16

    def read(self, index, half) -> np.ndarray:
        """Half `half[i]` (0 or 1: picture or mirror image) of row `index[i]`, for all i: (B, ...) float16."""
        out = np.empty((len(index), *self.shape[1:]), np.float16)
        shard = np.searchsorted(self.ends, index, side="right")
        place = self.zeros[shard] + (index * 2 + half) * out[0].nbytes
        for row, s, offset in zip(out, shard.tolist(), place.tolist()):
            if os.preadv(self.fds[s], [row], offset) != row.nbytes:
                raise UserError(f"{self.files[s]}: was cut short while it was read; encode it again")
        return out


def digest(tensors: dict) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        sha.update(np.ascontiguousarray(tensors[name]).view(np.uint8))
    return sha.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


class Pixels:
    """Pictures, uint8 (n, C, H, W) in memory or `PictureFiles`, and labels (n,); `sample` of them gives the scale."""

    def __init__(self, pixels, labels, classes=(), mirror=False, sample=None):
        some = pixels[sample or slice(None, None, max(1, len(labels) // 10000))]
        self.pixels, self.labels, self.mirror = pixels, labels.astype(np.int64), mirror
        mean, std = float(some.mean()), float(some.std()) or 1.0
        self.spec = dict(kind="pixels", shape=list(some.shape[1:]), mean=mean, std=std, classes=list(classes))

    def read(self, index, rng):
        x = (self.pixels[index].astype(np.float32) - np.float32(self.spec["mean"])) / np.float32(self.spec["std"])
        return np.where(rng.random((len(x), 1, 1, 1)) < 0.5, x[..., ::-1], x) if self.mirror else x


class PictureFiles:
    """Pictures in files or tars, opened when they are asked for: `files[index]` is uint8 (B, 3, side, side)."""

    def __init__(self, files, side):
        self.files, self.side = files, side

    def __getitem__(self, index):
        try:
            return np.stack([crop(open_picture(file := self.files[i]), self.side) for i in index])
        except ValueError as error:
            raise UserError(f"{file[1]}: {file[0]} is no picture that opens ({error}); remove it or mend it") from error


class Latents:
    """A set that `encode` wrote: picture or mirror image by chance, a draw from the posterior where it was kept."""

    def __init__(self, folder, features=False):
        meta = json.loads((folder / "meta.json").read_text())
        known = ("kind", "autoencoder", "scale", "shift", "shape", "classes", "factor")
        self.spec = {k: meta[k] for k in known if k in meta}
        added = meta.get("features", {}).get("shards", [])
        self.moments, self.shards, self.features = meta["moments"], meta["shards"] + added, None
        rows = lambda shards, name: Rows([folder / shard["file"] for shard in shards], name)
        of = groupby(meta["shards"], key=lambda shard: shard.get("bucket"))     # a set of squares is one bucket
        self.buckets = [rows(shards, "latents") for _, shards in of]
        counts = [int(bucket.ends[-1]) for bucket in self.buckets]
        self.ends = np.cumsum(counts)
        if "buckets" in meta:
            self.counts, self.spec["buckets"] = counts, [list(bucket.shape[-2:]) for bucket in self.buckets]
        labels = [safe_open(folder / shard["file"], "numpy").get_tensor("labels") for shard in meta["shards"]]
        self.labels = np.concatenate(labels)
        if not len(self.labels) == self.ends[-1] == meta["count"]:
            raise UserError(f"{folder}: {len(self.labels)} labels, meta.json counts {meta['count']}; encode it again")
        if not self.spec["classes"]:
            records = read_captions(folder / "captions.jsonl")
            if len(records) != meta["pictures"]:
                rule = f"{len(records)} captions for {meta['pictures']} pictures"
                raise UserError(f"{folder / 'captions.jsonl'}: {rule}; put back the one that encode wrote")
            self.captions = Captions([record["captions"] for record in records.values()])
        if features and added:
            self.features = rows(added, "features")
            if (self.features.ends != self.buckets[0].ends).any():
                raise UserError(f"{folder}: features of other pictures; delete features_* and encode again")

    def read(self, index, rng):
        """Rows of one bucket."""
        bucket = int(np.searchsorted(self.ends, index[0], side="right"))
        rows, place = self.buckets[bucket], index - (self.ends[bucket - 1] if bucket else 0)
        half = rng.integers(2, size=len(index))
        x = np.empty((len(index), self.spec["shape"][0], *rows.shape[-2:]), np.float32)
        for part in (slice(k, k + 16) for k in range(0, len(x), 16)):           # small arrays stay in the cache
            z = rows.read(place[part], half[part]).astype(np.float32)           # (16, C or 2 C, h, w)
            if self.moments:                            # normals of 16 bits, as fine as what is stored, and quick
                z, std = np.split(z, 2, axis=1)
                bits = rng.integers(2**64, size=-(-z.size // 4), dtype=np.uint64).view(np.uint16)
                z = z + std * NORMAL.take(bits[: z.size]).reshape(z.shape)
            x[part] = (z - np.float32(self.spec["shift"])) * np.float32(self.spec["scale"])
        return (x, self.features.read(index, half).astype(np.float32)) if self.features else x


class LatentFiles:
    """The authors' layout: a safetensors file per picture with its latent [2, C, h, w] (picture, mirror) and label."""

    def __init__(self, folder):
        found = (os.path.join(p, n) for p, _, names in os.walk(folder) for n in names if n.endswith(".safetensors"))
        self.files = np.array(sorted(map(os.fsencode, found)))                  # packed: a million fit
        some = np.stack([self.open(i)[0] for i in range(0, len(self.files), max(1, len(self.files) // 256))])
        if some.shape[2] not in BY_CHANNELS:
            raise UserError(f"{folder}: {some.shape[2]} channels; a file per picture is read for {list(BY_CHANNELS)}")
        name, scale = BY_CHANNELS[some.shape[2]]
        self.scale = np.float32(1 if some.std() < scale**-0.5 else scale)       # were they stored scaled?
        labels = in_threads(lambda i: self.open(i)[1], zip(range(len(self.files))), threads=16)
        self.labels = np.array(list(tqdm(labels, "labels", len(self.files), disable=None)))
        self.spec = dict(kind="latents", autoencoder=name, scale=scale, shift=0.0, shape=list(some.shape[2:]))
        self.spec["classes"] = [str(i) for i in range(self.labels.max() + 1)]

    def open(self, i) -> tuple[np.ndarray, int]:
        path = os.fsdecode(self.files[i])
        try:
            tensors = load_file(path)
            (latent,), (label,) = ([v for v in tensors.values() if (v.ndim == 4) == k] for k in (True, False))
            return latent, int(label.reshape(()))
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{path}: expected a latent [2, C, h, w] and one label ({error}); remove it") from error

    def read(self, index, rng):
        halves = rng.integers(2, size=len(index))
        return np.stack([self.open(i)[0][half] for i, half in zip(index, halves)]).astype(np.float32) * self.scale


class RandomLatents:
    """Noise in the shape of latents, to drive a preset without data: `--data random`. Without classes, captioned."""

    def __init__(self, shape, classes, n=1_281_167):
        self.spec = dict(kind="random", shape=list(shape), classes=[str(i) for i in range(classes)])
        self.labels = np.arange(n) % (classes or 2 * TABLE)
        if not classes:
            self.captions = Captions([[f"picture {i}, " + "noise " * (i % 64)] for i in range(2 * TABLE)])

    def read(self, index, rng):
        return rng.standard_normal((len(index), *self.spec["shape"]), np.float32)


def read_idx(path: Path) -> np.ndarray:
    """An array in the idx format of MNIST and Fashion-MNIST, gzipped or not."""
    raw = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])] if len(raw) > 3 else []
    if not shape or raw[:3] != b"\0\0\x08" or len(raw) != 4 + 4 * len(shape) + np.prod(shape):
        raise UserError(f"{path}: not a whole idx file of bytes; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def open_idx(images: Path) -> Pixels:
    """MNIST's layout. Classes are those of classes.txt, Fashion-MNIST's own where the labels are its, or numbers."""
    labels = sorted(images.parent.glob("train-labels*-ubyte*"))
    if not labels:
        raise UserError(f"{images.parent}: {images.name} has no train-labels-idx1-ubyte beside it")
    pixels, labels = read_idx(images)[:, None], read_idx(labels[0])
    if len(pixels) != len(labels) or not len(pixels):
        rule = f"{len(pixels)} pictures and {len(labels)} labels"
        raise UserError(f"{images.parent}: {rule}; expected as many, and some")
    names, fashion = images.with_name("classes.txt"), json.loads((DEMO / "fashion.json").read_text())
    if not names.is_file() and "".join(map(str, labels[:10000])) == fashion["labels"]:
        return Pixels(pixels, labels, fashion["classes"])
    return Pixels(pixels, labels, class_names(names, int(labels.max()) + 1))


def open_cifar(parts: list[Path]) -> Pixels:
    """CIFAR-10's binary layout: a byte of label and 3 x 32 x 32 of picture, again and again."""
    raw = np.concatenate([np.fromfile(part, np.uint8) for part in parts])
    if not len(raw) or len(raw) % 3073:
        rule = f"data_batch_*.bin hold {len(raw)} bytes, no multiple of 3073"
        raise UserError(f"{parts[0].parent}: {rule}; fetch them again")
    raw, names = raw.reshape(-1, 3073), class_names(parts[0].with_name("batches.meta.txt"), 10)
    return Pixels(raw[:, 1:].reshape(-1, 3, 32, 32), raw[:, 0], names, mirror=True)


def open_folder(folder: Path, side: int) -> Pixels:
    """Pictures of any format, a folder or tar per class, or with captions.jsonl, opened when they are asked for."""
    files, classes, labels, lines = find_pictures(folder)
    some = range(0, len(files), max(1, len(files) // 256))[:256]
    data = Pixels(PictureFiles(files, side or 64), labels, classes, mirror=not lines, sample=some)
    if lines:                                           # and no mirror images: a caption may tell left from right
        data.captions = Captions([line["captions"] for line in lines])
    return data


def class_names(path: Path, n: int) -> list[str]:
    return path.read_text().split() if path.is_file() else [str(i) for i in range(n)]


def demo() -> Pixels:
    """The first 10,000 training pictures of Fashion-MNIST, in the repository as one lossless sprite."""
    info = json.loads((DEMO / "fashion.json").read_text())
    sprite = np.asarray(Image.open(DEMO / "fashion.png"))
    pixels = sprite.reshape(100, 28, 100, 28).transpose(0, 2, 1, 3).reshape(10000, 1, 28, 28)
    return Pixels(pixels, np.array(list(map(int, info["labels"]))), info["classes"])


def emoji(held_out: bool = False) -> Pixels:
    """1,600 Noto emoji of 32 x 32 with their names, less the few whose names are held out of training; or only those.

    `records` keeps (name, emoji, group) of each picture.
    """
    info = json.loads((DEMO / "emoji.json").read_text("utf-8"))
    sprite = np.asarray(Image.open(DEMO / "emoji.png"))
    pixels = sprite.reshape(25, 32, 64, 32, 3).transpose(0, 2, 4, 1, 3).reshape(1600, 3, 32, 32)
    records = list(info["name, emoji, group"])
    kept = [i for i, (name, *_) in enumerate(records) if (name in info["held_out"]) == held_out]
    data = Pixels(pixels[kept], np.arange(len(kept)))
    data.records = [records[i] for i in kept]
    data.captions = Captions([[name] for name, *_ in data.records])
    data.spec["prompts"] = "red apple|blue heart|sun|cat face|panda|orange heart|purple circle|green square".split("|")
    return data


def open_data(path: str, shape=None, classes: int = 0, autoencoder: str = "", features: bool = False):
    """A data set by its place.

    path      "demo"; "emoji"; "random" (noise of `shape`, for speed); or a folder: latents that `encode` wrote, a
              safetensors file per picture, idx files (train-images-idx3-ubyte[.gz]), CIFAR-10's binary files
              (data_batch_1.bin ...), one folder (or tar) of pictures per class, or pictures with captions.jsonl.
    shape     (C, H, W) of the network, 0 or None where the data decide; classes and autoencoder likewise.
    features  read() then gives (x, features (B, T, F) float32), and `batches` (x, y, features).
    raises    UserError if there is no such folder, nothing readable in it, or it does not fit what is asked for.
    """
    folder = Path(path).expanduser()
    endings = (os.path.splitext(name)[1].lower() for _, _, names in os.walk(folder) for name in names)
    if path == "demo":
        data = demo()
    elif path == "emoji":
        data = emoji()
    elif path == "random":
        if not (shape and all(shape)):
            raise UserError(f"--data random with shape {shape}: give --channels, --side, and --classes if not captions")
        data = RandomLatents(shape, classes)
    elif not folder.is_dir():
        raise UserError(f"--data {path}: no such folder; give a folder, 'demo', 'emoji' or 'random'")
    elif (folder / "meta.json").is_file():
        data = Latents(folder, features)
    elif (folder / "plan.json").is_file():
        done = len(list(folder.glob("latents_*.safetensors")))
        raise UserError(f"--data {path}: encoding stopped after {done} shards; run the same data.py encode again")
    elif images := sorted(folder.glob("train-images*-ubyte*")):
        data = open_idx(images[0])
    elif parts := sorted(folder.glob("data_batch_*.bin")):
        data = open_cifar(parts)
    elif next((e for e in endings if e in PICTURES | {".safetensors", ".tar"}), "") == ".safetensors":
        data = LatentFiles(folder)
    else:
        data = open_folder(folder, shape[1] if shape else 0)
    if data.spec["classes"] and data.labels.max() >= len(data.spec["classes"]):
        raise UserError(f"{path}: label {data.labels.max()} beyond the {len(data.spec['classes'])} classes")
    if features and getattr(data, "features", None) is None:
        raise UserError(f"--data {path} has no features; add them: data.py encode --features NAME and its other flags")
    known = data.spec.get("autoencoder", autoencoder if path == "random" else "")  # noise stands for any latents
    found = (*data.spec["shape"], len(data.spec["classes"]), known)
    want = (*(shape or (0, 0, 0)), classes, autoencoder)
    for name, asked, have in zip(("channels", "height", "width", "classes", "autoencoder"), want, found):
        if asked and asked != have:
            raise UserError(f"--data {path} has {name} {have}, the configuration asks for {asked}; change either")
    return data


# ---------------------------------------------------------------------------------------------------------------------
# The stream


@lru_cache(maxsize=64)
def orders(*bucket: int):
    """Shuffles n pictures by a key, and remembers the last two orders of the whole set, or of each bucket."""
    return lru_cache(maxsize=2)(lambda n, *key: np.random.default_rng(key).permutation(n))


def shuffled(place: np.ndarray, n: int, seed: int, *bucket: int) -> np.ndarray:
    """Which of n pictures stand at these places, where all n come again and again, in a new order each time."""
    return np.array([orders(*bucket)(n, seed, e, *bucket)[i] for e, i in zip(place // n, place % n)])


def positions(n: int, batch: int, seed: int, step: int, slot: int, slots: int) -> np.ndarray:
    """Which pictures slot `slot` of `slots` sees at `step`: every picture once an epoch, a new order each epoch."""
    return shuffled((step * slots + slot) * batch + np.arange(batch), n, seed)


@lru_cache(maxsize=4)
def unit_order(counts: tuple[int, ...], unit: int, seed: int, epoch: int) -> list[tuple[int, int]]:
    """The units of an epoch, shuffled, as (bucket, number of the unit within its bucket since the beginning).

    By the end of epoch e (from 1) a bucket of c pictures has given all its whole units of e c pictures; what is left
    of it, less than a unit, waits for the next epoch.
    """
    spans = [range(c * epoch // unit, c * (epoch + 1) // unit) for c in counts]
    units = [(bucket, k) for bucket, span in enumerate(spans) for k in span]
    return [units[i] for i in np.random.default_rng((seed, epoch)).permutation(len(units))]


def bucket_positions(counts, batch: int, seed: int, step: int, slot: int, slots: int, mix: int = 1) -> np.ndarray:
    """`positions` of a set of buckets of `counts` pictures, one after the other; a slot's are all of one bucket.

    A step is `mix` units of one bucket each, and a unit is shared by slots / mix slots, so a step has the same pictures
    on any number of slots. Each bucket walks through all its pictures in a new order each time; over the epochs the
    buckets advance in step, so after e epochs no picture has been seen more than e times, and none less than e - 1
    times, if its bucket has a unit of pictures.
    """
    share = slots // mix
    unit, (part, within) = batch * share, divmod(slot, share)
    number = step * mix + part
    epoch = number * unit // sum(counts)                                        # or one of the next
    while (done := sum(c * (epoch + 1) // unit for c in counts)) <= number:
        epoch += 1
    order = unit_order(counts, unit, seed, epoch)
    bucket, k = order[number - done + len(order)]
    place = k * unit + within * batch + np.arange(batch)
    return sum(counts[:bucket]) + shuffled(place, counts[bucket], seed, bucket)


def same_shape(data) -> np.ndarray:
    """Numbers of pictures that can be read together: all of them, or those of the largest bucket."""
    counts = list(getattr(data, "counts", [len(data.labels)]))
    largest = int(np.argmax(counts))
    return sum(counts[:largest]) + np.arange(counts[largest])


def batches(data, batch: int, seed: int, slots: list[int], of: int, step: int = 0, ahead: int = 4, mix: int = 1):
    """Endless (x (batch, C, H, W) float32, y (batch,) int64[, features]), one per slot and step, from `step` on.

    y is the class, or the number of one of the picture's captions.

    A slot is one process's micro-batch in one step; `of` is how many there are over all processes, `mix` how many
    buckets a step has where the set has buckets. Reads ahead in threads; the stream is the same for any number of
    them, and any step can be gone to at no cost.
    """
    counts = tuple(getattr(data, "counts", ()))

    def make(step, slot):
        place = batch, seed, step, slot, of
        index = bucket_positions(counts, *place, mix) if counts else positions(len(data.labels), *place)
        chance = np.random.default_rng((seed, step, slot))
        x, y = data.read(index, chance), data.labels[index]
        y = data.captions.draw(y, chance) if hasattr(data, "captions") else y
        return (x[0], y, *x[1:]) if isinstance(x, tuple) else (x, y)

    for parts in in_threads(make, ((s, slot) for s in count(step) for slot in slots), threads=ahead, ahead=ahead):
        yield tuple(map(torch.from_numpy, parts))


# ---------------------------------------------------------------------------------------------------------------------
# Back to pictures


def to_pixels(spec: dict, x: Tensor) -> np.ndarray:
    """Network space (B, C, H, W) back to uint8 pictures (B, H, W, C); of latents a glance at the first channels."""
    x = x * spec["std"] + spec["mean"] if spec["kind"] == "pixels" else x[:, :3] * 40 + 128
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def grid(rows: np.ndarray, gap: int = 2, scale: int = 1, names: list[str] = ()) -> Image.Image:
    """uint8 (rows, columns, H, W, C) to one picture, white gaps between, each pixel `scale` wide, names below."""
    r, c, h, w, k = rows.shape
    sheet = np.pad(rows, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255).transpose(0, 2, 1, 3, 4)
    sheet = sheet.reshape(r * (h + gap), c * (w + gap), k)[: r * (h + gap) - gap, : c * (w + gap) - gap]
    sheet = to_image(sheet.repeat(scale, 0).repeat(scale, 1))
    if not names:
        return sheet
    below, font = Image.new(sheet.mode, (sheet.width, sheet.height + 56), "white"), ImageFont.load_default(11)
    below.paste(sheet)
    for k, name in enumerate(names):                                            # four lines, cut at the column's edge
        cell, lines = Image.new(sheet.mode, (w * scale, 56), "white"), textwrap.wrap(name[:200], max(1, w * scale // 6))
        ImageDraw.Draw(cell).multiline_text((1, 1), "\n".join(lines[:4]), "black", font, spacing=2)
        below.paste(cell, (k * (w + gap) * scale, sheet.height))
    return below


def load_network(library: str, flag: str, place: str, device="cpu", dtype=torch.float32, tokenizer=False):
    """A pretrained network of diffusers or transformers, frozen; or the tokenizer that belongs to it."""
    try:
        library = importlib.import_module(library)
    except ImportError as error:
        raise UserError(f"{flag} needs {library} ({error}); pip install {library}") from error
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    try:
        network = (library.AutoTokenizer if tokenizer else library.AutoModel).from_pretrained(place)
    except Exception as error:                          # the hub's and the file's errors share no type
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{flag}: {place} does not load ({reason}); give a folder or hub name") from error
    return network if tokenizer else network.to(device, dtype).eval().requires_grad_(False)


def load_autoencoder(name: str, device="cpu", dtype=torch.float32):
    """An autoencoder, its pixels per place and side, and its part of a spec: latents z of it are (z - shift) * scale
    in network space."""
    place, _, scale = AUTOENCODERS.get(name, (os.path.abspath(name) if os.path.isdir(name) else name, 0, 0))
    vae = load_network("diffusers", f"--autoencoder {name}", place, device, dtype)
    factor = getattr(vae, "spatial_compression_ratio", 0) or 2 ** (len(vae.config["block_out_channels"]) - 1)
    scale, shift = scale or vae.config["scaling_factor"], vae.config.get("shift_factor") or 0.0
    return vae, factor, dict(autoencoder=name if name in AUTOENCODERS else place, scale=scale, shift=shift)


@torch.no_grad()
def decode_tiles(decode, z: Tensor, factor: int, tile: int = 512, overlap: int = 128) -> Tensor:
    """Latents (1, C, h, w) to (1, 3, H, W) by overlapping tiles that fade linearly into each other.

    tile, overlap  in pixels. Memory is that of one tile and of the result. All tiles have one size, the last ends at
                   the border: diffusers' own tiling may end in a sliver, and differs between its autoencoders.
    """

    def axis(n):
        """Of n places: where tiles begin, their length, how one fades (in pixels), and all their fades added up."""
        length = min(n, tile // factor)
        starts = sorted({*range(0, n - length, length - overlap // factor), n - length})
        fade = (torch.arange(length * factor, device=z.device) + 0.5) / overlap
        fade, total = torch.minimum(fade, fade.flip(0)).clamp(max=1), torch.zeros(n * factor, device=z.device)
        for start in starts:
            total[start * factor :][: len(fade)] += fade
        return starts, length, fade, total

    (tops, h, down, rows), (lefts, w, across, columns) = map(axis, z.shape[2:])
    out = torch.zeros(1, 3, len(rows), len(columns), device=z.device)
    for i, j in product(tops, lefts):
        part = decode(z[:, :, i : i + h, j : j + w]) * (down[:, None] * across)
        out[:, :, i * factor :, j * factor :][:, :, : h * factor, : w * factor] += part
    return out.div_(rows[:, None]).div_(columns)


def decoder(spec: dict, device="cpu", autoencoder: str | None = None, at_once: int = 16):
    """A function from network space (B, C, h, w) to uint8 pictures (B, H, W, C), whatever kind of data the spec names.

    Latents are decoded in fp32, `at_once` at a time of up to 512 x 512 pixels, fewer of larger ones, and those beyond
    TILED pixels in tiles; `autoencoder` is a place to load from instead of the spec's. `.factor`: pixels per place.
    """
    if spec["kind"] != "latents":
        decode = partial(to_pixels, spec)
        decode.factor = 1
        return decode
    if not (autoencoder or spec["autoencoder"]):
        raise UserError(f"{spec['shape'][0]} channels: no autoencoder is known; give --autoencoder, or --save_latents")
    vae, factor, _ = load_autoencoder(autoencoder or spec["autoencoder"], device)
    if vae.config["latent_channels"] != spec["shape"][0]:
        raise UserError(f"--autoencoder {autoencoder} has {vae.config['latent_channels']} channels, the latents have "
                        f"{spec['shape'][0]}; they were made with {spec['autoencoder']}")  # fmt: skip
    as_pixels = dict(kind="pixels", mean=127.5, std=127.5)
    plain = lambda z: vae.decode(z).sample

    @torch.no_grad()
    def decode(z):
        z = z.to(device, torch.float32) / spec["scale"] + spec["shift"]
        area = z.shape[2] * z.shape[3] * factor**2
        how = partial(decode_tiles, plain, factor=factor) if area > TILED else plain
        parts = z.split(1 if area > TILED else max(1, min(at_once, at_once * 512**2 // area)))
        return np.concatenate([to_pixels(as_pixels, how(part)) for part in parts])

    decode.factor = factor
    return decode


# ---------------------------------------------------------------------------------------------------------------------
# The commands: encode and inspect


@torch.no_grad()
def encode_pictures(vae, means: bool, x: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) -> float16 (B, 2, C or 2 C, h, w), unscaled: picture and mirror image, mean and deviation."""
    x = (x.to(vae.device).float() / 127.5 - 1).to(vae.dtype)
    out = vae.encode(torch.cat([x, x.flip(3)]))
    if "latent" in out:
        z = out.latent                                                          # DC-AE has no posterior
    else:
        p = out.latent_dist
        z = p.mean if means else torch.cat([p.mean, (p.logvar.float() / 2).exp()], 1)
    return z.half().unflatten(0, (2, -1)).transpose(0, 1)


def feature_maker(name: str, grid: int, device, dtype):
    """A frozen image encoder: uint8 (B, 3, S, S), scaled to its patch times grid -> float16 (B, 2, grid^2, F)."""
    net = load_network("transformers", f"--features {name}", name, device, dtype)
    side, radio = grid * net.config.patch_size, hasattr(net.config, "norm_mean")  # RADIO normalises by itself
    mean, std = ((0, 0, 0), (1, 1, 1)) if radio else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (mean, std))

    @torch.no_grad()
    def features(x):
        x = F.interpolate(x.to(device).float() / 255, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        x = ((x - mean) / std).to(dtype)
        out = net(torch.cat([x, x.flip(3)]))
        tokens = out["features"] if "features" in out else out.last_hidden_state
        return tokens[:, -grid * grid :].half().unflatten(0, (2, -1)).transpose(0, 1)  # without class and registers

    return features


def write_text(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(text)
    os.replace(aside, path)


def write_shard(path: Path, tensors: dict, record: dict) -> float:
    """A shard is complete or it is not there. Returns the seconds it took."""
    began, aside = time.perf_counter(), path.with_suffix(".tmp")
    try:
        save_file(tensors, aside, metadata={"tim": json.dumps(record | dict(sha256=digest(tensors)))})
        with open(aside, "rb+") as written:
            os.fsync(written.fileno())
        aside.chmod(0o644)                              # safetensors makes files that only their owner can read
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path}: not written ({error}); the others are whole: free the disk, run again") from error
    return time.perf_counter() - began


def claim(file: Path, plan: dict) -> None:
    """Say what a set is made of before its first shard; refuse to go on with one made of something else."""
    if not file.is_file():
        write_text(file, json.dumps(plan, indent=1))
    old = json.loads(file.read_text())
    for key in plan | old:
        was, now = old.get(key), plan.get(key)
        if was != now:
            if key == "buckets" and not (was and now):
                how = "with" if was else "without"
                raise UserError(f"{file.parent} was begun {how} --native; do so again, or give another --out")
            if isinstance(was, list) and isinstance(now, list):
                was, now = next((w, n) for w, n in zip_longest(was, now) if w != n)
            raise UserError(f"{file.parent} was begun with {key} {was}, not {now}; give that, or another --out")


def finish(out: Path, shards: int) -> dict | None:
    """Write meta.json from the shards' own records, if all are there; whoever comes last does so with effect."""
    records = {}
    for kind in ("latents", "features"):
        files = [out / f"{kind}_{k:05}.safetensors" for k in range(shards)]
        if all(f.is_file() for f in files):
            records[kind] = [dict(file=f.name) | json.loads(safe_open(f, "numpy").metadata()["tim"]) for f in files]
    if "latents" not in records:
        return None
    meta = json.loads((out / "plan.json").read_text())
    meta |= dict(count=sum(shard["count"] for shard in records["latents"]), shards=records["latents"])
    if "features" in records:
        meta["features"] = json.loads((out / "features.json").read_text()) | dict(shards=records["features"])
    write_text(out / "meta.json", json.dumps(meta, indent=1))
    return meta


def plan_buckets(a, step: int, files, captions, sizes) -> tuple[dict, list]:
    """Which pictures go to which bucket, {(height, width): indices}, and [name, reason] of those that go to none.

    A caption's own "bucket" ("...-HxW") rules over the nearest ratio. `sizes` are from `upright_size`.
    """
    table = bucket_sizes(a.size, step)
    ratios, bound = np.log([h / w for h, w in table]), crop_bound(table)
    groups, skipped, small = {}, [], 0
    for i, size in enumerate(sizes):
        try:
            if isinstance(size, str):
                raise ValueError(size)
            (h, w), named = size, captions and re.search(r"(\d+)x(\d+)$", str(captions[i].get("bucket", "")))
            bucket = (int(named[1]), int(named[2])) if named else table[np.abs(ratios - math.log(h / w)).argmin()]
            area = bucket[0] * bucket[1] / a.size**2
            if named and (bucket[0] % step or bucket[1] % step or not abs(area - 1) <= SLACK):
                rule = f"no multiple of {step} with an area within {SLACK:.1%} of {a.size}^2"
                raise ValueError(f"its bucket {named[0]} is {rule}")
            cut = cut_away(size, bucket)
            if named and cut > max(bound, NAMED) + 1e-6:
                raise ValueError(f"{cut:.0%} of {h}x{w} would be cut away by its bucket {named[0]}")
            if not named and cut > bound + 1e-6:
                raise ValueError(f"{h}x{w} is beyond all ratios: {cut:.0%} would be cut away, at most {bound:.0%} is")
            if h < bucket[0] or w < bucket[1]:
                small += 1
                if a.skip_small:
                    raise ValueError(f"{h}x{w} is smaller than its bucket, {bucket[0]}x{bucket[1]}")
            groups.setdefault(bucket, []).append(i)
        except ValueError as error:
            skipped.append([files[i][0], str(error)])
    if not groups:
        raise UserError(f"--images {a.images}: no picture goes to a bucket; the first: {': '.join(skipped[0])}")
    if small and os.environ.get("RANK", "0") == "0":
        print(f"{small:,} pictures are smaller than their bucket: {'skipped' if a.skip_small else 'scaled up'}")
    return dict(sorted(groups.items(), key=lambda item: item[0][0] / item[0][1])), skipped


def plan_set(a, files, classes, labels, captions) -> tuple[dict, list]:
    """Load the networks and write what the set is made of, or hold it against what its folder says.

    returns  the makers of its tensors, {kind: function}, and per shard the pictures' (height, width) and their indices
    """
    out, device = Path(a.out), a.device
    if not device:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    fast = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = "bfloat16" if a.precision == "bf16" or (fast and not a.precision) else "float32"
    vae, factor, network = load_autoencoder(a.autoencoder, device, getattr(torch, precision))
    step = factor * a.patch
    if a.size % step:
        raise UserError(f"--size {a.size}: must be a multiple of {step}, this autoencoder's pixels per place x --patch")
    makers, groups = {"latents": partial(encode_pictures, vae, a.means)}, {(a.size, a.size): range(len(files))}
    probe, channels = makers["latents"](torch.zeros(1, 3, a.size, a.size)), vae.config["latent_channels"]
    listing = hashlib.sha256("\n".join(f"{f[0]} {k}" for f, k in zip(files, labels)).encode()).hexdigest()
    plan = dict(
        kind="latents", size=a.size, **network, shape=[channels, *probe.shape[3:]], moments=probe.shape[2] > channels,
        precision=precision, shard=a.shard, pictures=len(files), classes=classes, listing=listing,
    )  # fmt: skip
    if a.native:
        sizes = out / f"sizes_{listing[:16]}.json"      # from the pictures' headers, read once
        if not sizes.is_file():
            seen = tqdm(in_threads(upright_size, zip(files), a.workers), "sizes", len(files), disable=None)
            write_text(sizes, json.dumps(list(seen)))
        groups, skipped = plan_buckets(a, step, files, captions, json.loads(sizes.read_text()))
        plan |= dict(buckets=[[h, w, len(v)] for (h, w), v in groups.items()], factor=factor, skipped=skipped)
    if captions:
        plan["captions"] = Captions([line["captions"] for line in captions]).digest()
    claim(out / "plan.json", plan)
    if a.features:
        makers["features"] = feature_maker(a.features, a.grid, device, getattr(torch, precision))
        claim(out / "features.json", dict(name=a.features, grid=a.grid, precision=precision))
    if captions:
        write_text(out / "captions.jsonl", "".join(json.dumps(line) + "\n" for line in captions))
    return makers, [(size, v[k : k + a.shard]) for size, v in groups.items() for k in range(0, len(v), a.shard)]


def open_cropped(file, size, upright: bool):
    """The picture, or why there is none, and the CPU seconds of decoding and of resizing."""
    began = time.thread_time()
    try:
        picture = open_picture(file, upright)
        opened = time.thread_time()
        if upright and cut_away(picture.size[::-1], size) > 0.55:
            raise ValueError(f"it is {picture.height}x{picture.width}, its header or an older file said otherwise")
        return crop(picture, *size), dict(decode=opened - began, resize=time.thread_time() - opened)
    except ValueError as error:
        return str(error), dict(decode=time.thread_time() - began, resize=0.0)


def make_shards(a, makers, todo, spent, bar):
    """Yields (path, tensors, record) of each file in `todo`, whose pictures are decoded ahead in threads.

    todo   per shard {kind: path} of what it lacks, its pictures' (height, width), and [(file, label), ...]
    spent  gets the seconds of each kind of work, bar the number of pictures
    """
    wanted = ((file, size, a.native) for _, size, pictures in todo for file, _ in pictures)
    stream = in_threads(open_cropped, wanted, a.workers, ahead=4 * a.batch)
    for paths, size, pictures in todo:
        parts, kept, skipped = {kind: [] for kind in paths}, [], []
        for batch in (pictures[k : k + a.batch] for k in range(0, len(pictures), a.batch)):
            x = []
            for (file, label), (picture, seconds) in zip(batch, stream):
                spent.update(seconds)
                if isinstance(picture, str):
                    skipped.append([file[0], picture])
                else:
                    kept.append(label)
                    x.append(picture)
            tick, n = time.perf_counter(), len(x)
            x = torch.from_numpy(np.stack(x or [np.zeros((3, *size), np.uint8)]))  # one for the shape where all fail
            for kind, part in parts.items():
                part.append(makers[kind](x)[:n].cpu().numpy())
                if not np.isfinite(part[-1]).all():
                    raise UserError(f"{kind} of {batch[0][0][0]} and after overflow fp16; use another encoder")
            spent["network"] += time.perf_counter() - tick
            bar.update(len(batch))
        record = dict(count=len(kept), skipped=skipped) | (dict(bucket=size) if a.native else {})
        for kind, part in parts.items():
            tensors = {kind: np.concatenate(part).copy(), "labels": np.array(kept, np.int64)}  # copy: in order
            yield paths[kind], tensors, record


def encode(a) -> None:
    """Pictures to shards: `plan_set` says what goes into each, `make_shards` fills them, `write_shard` stores one while
    the next is made, `finish` sums up. Each rank takes every world-th shard, so ranks need not talk."""
    rank, world, out = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), Path(a.out)
    for name in ("size", "batch", "shard", "workers", "grid", "patch"):
        if getattr(a, name) < 1:
            raise UserError(f"--{name} {getattr(a, name)}: at least 1")
    if a.native and a.features:
        raise UserError(f"--features {a.features}: a square of features fits no --native picture; leave one out")
    if not Path(a.images).exists():
        raise UserError(f"--images {a.images}: no such folder or tar")
    files, classes, labels, captions = find_pictures(a.images)
    try:
        out.mkdir(parents=True, exist_ok=True)
        makers, shards = plan_set(a, files, classes, labels, captions)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error})") from error

    todo = []
    for k in range(rank, len(shards), world):
        lacks = {kind: path for kind in makers if not (path := out / f"{kind}_{k:05}.safetensors").is_file()}
        if lacks:
            size, span = shards[k]
            todo.append((lacks, size, [(files[i], labels[i]) for i in span]))
    spent, n, began = Counter(), sum(len(pictures) for *_, pictures in todo), time.perf_counter()
    with tqdm(total=n, unit="img", disable=rank > 0, mininterval=0.1 if sys.stderr.isatty() else 30) as bar:
        made = make_shards(a, makers, todo, spent, bar)
        spent["write"] = sum(in_threads(write_shard, made, threads=1, ahead=1 + len(makers)))
    if todo and rank == 0:
        whole, each = time.perf_counter() - began, ", ".join(f"{k} {1000 * v / n:.2f}" for k, v in spent.items())
        print(f"{n / whole:.1f} pictures/s; ms per picture: {each} (decode and resize over {a.workers} threads); "
              f"the network worked {spent['network'] / whole:.0%} of the time")  # fmt: skip
    if (meta := finish(out, len(shards))) and (rank == 0 or todo):
        skipped = [line for part in (meta, *meta["shards"]) for line in part.get("skipped", [])]
        print(f"{out}: {meta['count']:,} pictures of {len(classes)} classes, {len(skipped)} skipped")
        for name, reason in skipped[:20]:
            print(f"  skipped {name}: {reason}")
        if not meta["count"]:
            raise UserError(f"--images {a.images}: none of {len(files)} pictures could be opened")


def inspect(a) -> None:
    """What a set is, whether it is whole, and how it looks."""
    data = open_data(a.set)
    spec, counts = data.spec, getattr(data, "counts", [len(data.labels)])
    print(f"{a.set}: {sum(counts):,} x {spec['shape']}, {spec['kind']} {spec.get('autoencoder', '')}")
    if names := spec["classes"]:
        held = np.bincount(data.labels, minlength=len(names))
        print(f"{len(names)} classes of {held.min():,} to {held.max():,}: {', '.join(names[:10])} ...")
    for (h, w), n in zip(spec.get("buckets", []), counts):
        print(f"bucket {h:4} x {w:<4} {n:12,} pictures")
    ends, most = np.cumsum(counts), 2048 // len(counts)
    some = [np.linspace(end - n, end - 1, min(most, n), dtype=np.int64) for end, n in zip(ends, counts) if n]
    xs = [data.read(index, np.random.default_rng(0)) for index in some]
    print("channel mean deviation, of network space (it wants 0 and 1)")
    for c in range(spec["shape"][0]):
        values = np.concatenate([x[:, c].ravel() for x in xs])
        print(f"{c:7} {values.mean():8.3f} {values.std():8.3f}")
    if isinstance(data, Latents):
        for shard in tqdm(data.shards, "checksums", disable=None):
            file = Path(a.set).expanduser() / shard["file"]
            if digest(load_file(file)) != shard["sha256"]:
                raise UserError(f"{file}: wrong checksum; delete it and encode again")
        print(f"{len(data.shards)} checksums are right")
    try:
        decode = decoder(spec, a.device, a.autoencoder)
    except UserError as error:
        print(f"no contact sheet: {error}")
        return
    most = max(1, 32 // len(xs))
    pixels = [p for x in xs for p in decode(torch.from_numpy(x[:: max(1, len(x) // most)][:most]))]
    h, w, _ = np.max([p.shape for p in pixels], axis=0)
    pixels = [np.pad(p, ((0, h - p.shape[0]), (0, w - p.shape[1]), (0, 0)), constant_values=255) for p in pixels]
    columns = min(8, len(pixels))
    rows = len(pixels) // columns
    grid(np.stack(pixels[: rows * columns]).reshape(rows, columns, h, w, -1)).save(a.sheet)
    print(f"contact sheet: {a.sheet}")


def parse_arguments(argv=None):
    style = dict(allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    parser = argparse.ArgumentParser(description=__doc__, **style)
    verbs = parser.add_subparsers(required=True)
    p = verbs.add_parser("encode", description="Pictures to latents; again = go on; also under torchrun.", **style)
    p.set_defaults(run=encode)
    p.add_argument("--images", required=True, help="folder or tar: class folders or tars, or with captions.jsonl")
    p.add_argument("--out", required=True, help="folder of the set")
    p.add_argument("--autoencoder", default="sd-vae", help="sd-vae, dc-ae, a folder or a hub name (default sd-vae)")
    p.add_argument("--means", action="store_true", help="keep the posterior's mean only (default: and its deviation)")
    p.add_argument("--native", action="store_true", help="keep aspect ratios: buckets of about --size x --size pixels")
    p.add_argument("--skip_small", action="store_true", help="list pictures smaller than their bucket, do not scale up")
    p.add_argument("--features", help="keep features of an image encoder too: DINOv2 or RADIO, folder or hub name")
    cores = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    for name, default, text in (
        ("size", 256, "pixels per side, after the centre crop; --native: of the base square"),
        ("batch", 64, "pictures per pass of the network"),
        ("shard", 1024, "pictures per file"), ("grid", 16, "feature tokens per side"),
        ("patch", 1, "of the network to come: sizes are multiples of it, in latent places"),
        ("workers", cores, "threads that decode pictures, per rank"),
    ):  # fmt: skip
        p.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    p.add_argument("--device", help="default: this rank's cuda device, else cpu")
    p.add_argument("--precision", choices=("fp32", "bf16"), help="of the networks (default: bf16 where the GPU has it)")
    p = verbs.add_parser("inspect", description="What a set is, whether it is whole, and how it looks.", **style)
    p.set_defaults(run=inspect)
    p.add_argument("set", help="folder of a set, or demo")
    p.add_argument("--autoencoder", help="for the contact sheet (default: the one the set was made with)")
    p.add_argument("--sheet", default="samples_contact.png", help="its contact sheet (default samples_contact.png)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda, else cpu")
    return parser.parse_args(argv)


def main(argv=None):
    a = parse_arguments(argv)
    a.run(a)


if __name__ == "__main__":
    command(main)
