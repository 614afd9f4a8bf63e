"""Pictures to batches: the demo set, idx and CIFAR-10 files, folders; and network space back to pictures.

A data set has `spec`, what a checkpoint must remember of it, `labels` (n,) int64 and `read(index, rng)`, which gives
float32 pictures in network space (mean 0, deviation about 1). `batches` turns one into an endless stream that is a
function of (seed, step, slot) alone. Reading is numpy's: torch in the reading threads would start a second team of
OpenMP threads each, which slowed training on two cores by 1.7.
"""

import gzip
import json
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

DEMO = Path(__file__).parent / "demo"
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


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


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


class Pixels:
    """Pictures in memory: uint8 (n, C, H, W), labels (n,)."""

    def __init__(self, name, pixels, labels, classes, mirror):
        if len(pixels) != len(labels) or not len(pixels):
            raise UserError(f"{name}: {len(pixels)} pictures and {len(labels)} labels; expected as many, and some")
        if labels.max() >= len(classes):
            raise UserError(f"{name}: label {labels.max()} beyond the {len(classes)} classes")
        self.pixels, self.labels, self.mirror = pixels, labels.astype(np.int64), mirror
        self.spec = pixel_spec(pixels[:: max(1, len(pixels) // 10000)], classes)

    def read(self, index, rng):
        x = normalise(self.spec, self.pixels[index])
        return flip(x, rng) if self.mirror else x


class PictureFolder:
    """One folder per class, pictures of any format and size in it (ImageNet's layout), read when asked for."""

    def __init__(self, path, side):
        classes = sorted(p.name for p in path.iterdir() if p.is_dir())
        files = [(f, k) for k, c in enumerate(classes) for f in sorted((path / c).rglob("*")) if f.suffix.lower() in PICTURES]
        if not files:
            raise UserError(f"{path}: no pictures; expected idx files, data_batch_*.bin, or one folder per class with pictures")
        self.files, self.side = [f for f, _ in files], side or 64
        self.labels = np.array([k for _, k in files])
        some = self.files[:: max(1, len(files) // 256)][:256]
        self.spec = pixel_spec(np.stack([read_picture(f, self.side) for f in some]), classes)

    def read(self, index, rng):
        x = normalise(self.spec, np.stack([read_picture(self.files[i], self.side) for i in index]))
        return flip(x, rng)


class RandomLatents:
    """Noise in the shape of latents, to drive a preset without data: `--data random`."""

    def __init__(self, shape, classes, n=1_281_167):
        self.spec = dict(kind="random", shape=list(shape), classes=[str(i) for i in range(classes)])
        self.labels = np.arange(n) % classes

    def read(self, index, rng):
        return rng.standard_normal((len(index), *self.spec["shape"]), np.float32)


def read_picture(path, side: int) -> np.ndarray:
    """A picture file as uint8 (3, side, side): shorter side scaled to `side`, centre cropped."""
    try:
        with Image.open(path) as picture:
            picture = picture.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a picture that can be opened ({error}); remove it or mend it") from error
    scale = side / min(picture.size)
    w, h = (max(side, round(s * scale)) for s in picture.size)
    left, top = (w - side) // 2, (h - side) // 2
    picture = picture.resize((w, h), Image.LANCZOS).crop((left, top, left + side, top + side))
    return np.asarray(picture).transpose(2, 0, 1)


def pixel_spec(sample: np.ndarray, classes) -> dict:
    mean, std = float(sample.mean()), float(sample.std())
    return dict(kind="pixels", shape=list(sample.shape[1:]), mean=mean, std=std or 1.0, classes=list(classes))


def normalise(spec, x: np.ndarray) -> np.ndarray:
    return (x.astype(np.float32) - np.float32(spec["mean"])) / np.float32(spec["std"])


def flip(x: np.ndarray, rng) -> np.ndarray:
    """Mirror each picture with probability one half."""
    return np.where(rng.random((len(x), 1, 1, 1)) < 0.5, x[..., ::-1], x)


def read_idx(path: Path) -> np.ndarray:
    """An array in the idx format of MNIST and Fashion-MNIST, gzipped or not."""
    raw = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])] if len(raw) > 3 else []
    if not shape or raw[:3] != b"\0\0\x08" or len(raw) != 4 + 4 * len(shape) + np.prod(shape):
        raise UserError(f"{path}: not a whole idx file of bytes; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def class_names(path: Path, n: int) -> list[str]:
    return path.read_text().split() if path.is_file() else [str(i) for i in range(n)]


def demo() -> Pixels:
    """The first 10,000 training pictures of Fashion-MNIST, in the repository as one lossless sprite."""
    info = json.loads((DEMO / "fashion.json").read_text())
    sprite = np.asarray(Image.open(DEMO / "fashion.png"))
    pixels = sprite.reshape(100, 28, 100, 28).transpose(0, 2, 1, 3).reshape(10000, 1, 28, 28)
    return Pixels("demo", pixels, np.array(list(map(int, info["labels"]))), info["classes"], mirror=False)


def open_data(path: str, shape=None, classes: int = 0):
    """A data set by its place.

    path     "demo"; "random" (noise of `shape`, for speed); or a folder with idx files (train-images-idx3-ubyte[.gz]),
             CIFAR-10's binary files (data_batch_1.bin ...), or one folder of pictures per class.
    shape    (C, H, W) of the network, 0 or None where the data decide; classes likewise.
    raises   UserError if there is no such folder, nothing readable in it, or it does not fit shape and classes.
    """
    folder = Path(path).expanduser()
    if path == "demo":
        data = demo()
    elif path == "random":
        if not (shape and all(shape) and classes):
            raise UserError(f"--data random with shape {shape} and {classes} classes: give --channels, --side, --classes")
        data = RandomLatents(shape, classes)
    elif not folder.is_dir():
        raise UserError(f"--data {path}: no such folder; give a folder, 'demo' or 'random'")
    elif idx := sorted(folder.glob("train-images*-ubyte*")):
        labels = sorted(folder.glob("train-labels*-ubyte*"))
        if not labels:
            raise UserError(f"{folder}: {idx[0].name} has no train-labels-idx1-ubyte beside it")
        pixels, labels = read_idx(idx[0])[:, None], read_idx(labels[0])
        names = json.loads((DEMO / "fashion.json").read_text())["classes"] if len(pixels) == 60000 else None
        data = Pixels(path, pixels, labels, names or class_names(folder / "classes.txt", int(labels.max()) + 1), mirror=False)
    elif batches := sorted(folder.glob("data_batch_*.bin")):
        raw = np.concatenate([np.fromfile(b, np.uint8) for b in batches])
        if len(raw) % 3073:
            raise UserError(f"{folder}: data_batch_*.bin hold {len(raw)} bytes, no multiple of 3073; fetch them again")
        raw = raw.reshape(-1, 3073)
        names = class_names(folder / "batches.meta.txt", 10)
        data = Pixels(path, raw[:, 1:].reshape(-1, 3, 32, 32), raw[:, 0].astype(np.int64), names, mirror=True)
    else:
        data = PictureFolder(folder, shape[1] if shape else 0)
    found = (*data.spec["shape"], len(data.spec["classes"]))
    for name, want, have in zip(("channels", "height", "width", "classes"), (*(shape or (0, 0, 0)), classes), found):
        if want and want != have:
            raise UserError(f"--data {path} has {name} {have}, the configuration asks for {want}; change one of the two")
    return data


# ---------------------------------------------------------------------------------------------------------------------
# The stream


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def positions(n: int, batch: int, seed: int, step: int, slot: int, slots: int) -> np.ndarray:
    """Which pictures slot `slot` of `slots` sees at `step`: every picture once an epoch, a new order each epoch."""
    place = (step * slots + slot) * batch + np.arange(batch)
    return np.array([epoch_order(n, seed, e)[i] for e, i in zip(place // n, place % n)])


def batches(data, batch: int, seed: int, slots: list[int], of: int, step: int = 0, ahead: int = 4):
    """Endless (x (batch, C, H, W) float32, y (batch,) int64), one per slot and step, from `step` on.

    A slot is one process's micro-batch in one step; `of` is how many there are over all processes. Reads ahead in
    threads; the stream is the same for any number of them, and any step can be gone to at no cost.
    """

    def make(k):
        s, slot = step + k // len(slots), slots[k % len(slots)]
        index = positions(len(data.labels), batch, seed, s, slot, of)
        return data.read(index, np.random.default_rng((seed, s, slot))), data.labels[index]

    with ThreadPoolExecutor(ahead) as pool:
        queue = deque(pool.submit(make, k) for k in range(ahead))
        for k in count(ahead):
            yield tuple(map(torch.from_numpy, queue.popleft().result()))
            queue.append(pool.submit(make, k))


# ---------------------------------------------------------------------------------------------------------------------
# Back to pictures


def to_pixels(spec: dict, x: Tensor) -> np.ndarray:
    """Network space (B, C, H, W) back to uint8 pictures (B, H, W, C)."""
    if spec["kind"] == "random":                                                # noise was learnt, so show it as it is
        x = x[:, :3] * 40 + 128
    else:
        x = x * spec["std"] + spec["mean"]
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def grid(rows: np.ndarray, gap: int = 2, scale: int = 1) -> Image.Image:
    """uint8 (rows, columns, H, W, C) to one picture, white gaps between, each pixel `scale` wide."""
    r, c, h, w, k = rows.shape
    sheet = np.full((r, h + gap, c, w + gap, k), 255, np.uint8)
    sheet[:, :h, :, :w] = rows.transpose(0, 2, 1, 3, 4)
    sheet = sheet.reshape(r * (h + gap), c * (w + gap), k)[:-gap, :-gap]
    return to_image(sheet.repeat(scale, 0).repeat(scale, 1))
