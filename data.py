"""Pictures to latents to batches, and network space back to pictures.

    torchrun --nproc_per_node=8 data.py encode --images imagenet/train --out latents  # or resume
    python data.py encode --native --size 256 512 --images pictures --out latents     # in buckets
    python data.py inspect latents                          # statistics, checksums, a contact sheet

A data set has a `spec`, which a checkpoint stores, and `read(indices, rng)`, which gives a `Batch`
in network space (mean 0, deviation about 1). `batches` makes an endless stream of them, a function
of (seed, step, slot). Reading uses numpy: torch would start more OpenMP threads in each thread.
"""

import argparse
import hashlib
import importlib
import io
import json
import math
import os
import re
import signal
import sys
import tarfile
import textwrap
import uuid
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from itertools import count, zip_longest
from pathlib import Path, PurePosixPath
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm import tqdm

DEMO = Path(__file__).parent / "demo"
TORCHVISION = {"fashion": "FashionMNIST", "mnist": "MNIST"}
TORCHVISION |= {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
NAMED = ("demo", "emoji", *TORCHVISION)
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
AUTOENCODERS = {  # name: path on the model hub, scale of network space
    "sd-vae": ("stabilityai/sd-vae-ft-ema", 0.18215),
    "dc-ae": ("mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers", 0.41407),
}
BY_CHANNELS = {4: ("sd-vae", 8), 32: ("dc-ae", 32)}  # and pixels per latent position and side
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of its channels
CACHE = 2**30  # bytes of cropped pictures that a process keeps in memory
TILED = 1024**2  # pixels of a picture above which it is decoded in tiles
GEMMA = "google/gemma-3-1b-it"  # the text encoder of the released weights
BYTES = {"encoder": "bytes", "length": 64, "width": 128}  # the text encoder that needs no download
TABLE = 4096  # up to this many captions are encoded once and kept on the device
# indexed by 16 random bits it gives a normal number
NORMAL = torch.special.ndtri((torch.arange(65536).double() + 0.5) / 65536).float().numpy()


# --- Errors, arguments, processes, files ----------------------------------------------------------


class UserError(Exception):
    """Something the user can put right. The message names the value, the rule and the way out."""


def require(condition, message: str) -> None:
    if not condition:
        raise UserError(message)


@contextmanager
def explain(kind, rule: str, way: str):
    """An error of this kind, or tuple of kinds, becomes a UserError: "RULE (its first line); WAY"."""
    try:
        yield
    except kind as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        why = lines[-1 if "Traceback" in str(error) else 0]  # torch's checkpoints quote theirs
        raise UserError(f"{rule} ({why}); {way}") from error


def command(main) -> None:
    """Run a command. A UserError, or a file that cannot be read or written, is one line on stderr
    and exit status 2; Ctrl-C is status 130."""
    try:
        main()
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)    # a second Ctrl-C does not wait for threads
        sys.exit(130)


def number(kind, low, high, rule: str):
    """An argparse type: an int or float with low <= value <= high."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:                    # nan is in no range
            raise argparse.ArgumentTypeError(f"{text!r} must be {rule}")
        return value

    return parse


LARGEST, LARGEST_INT = sys.float_info.max, 2**63 - 1
positive_int = number(int, 1, LARGEST_INT, "a whole number, at least 1 and below 2^63")
natural = number(int, 0, LARGEST_INT, "a whole number, at least 0 and below 2^63")
positive_float = number(float, math.ulp(0), LARGEST, "a finite number above 0")
non_negative_float = number(float, 0, LARGEST, "a finite number, at least 0")
share = number(float, 0, 1, "a number from 0 to 1")


def flag(default, text: str, kind=None, **how):
    """A field of a record of flags: default, help, the type of a value, keywords of add_argument."""
    return field(default=default, metadata={"help": text, "type": kind, **how})


def add_flags(parser, record, groups=None) -> None:
    """A flag per field of a record, whose values are the defaults; what is not given is not in the result.

    groups  {first field: title} of the parts of --help
    """
    group = parser
    for f in fields(record):
        if f.name in (groups or {}):
            group = parser.add_argument_group(groups[f.name])
        how, value = dict(f.metadata), getattr(record, f.name)
        if f.type in (bool, bool | None):
            how["action"] = argparse.BooleanOptionalAction
            del how["type"]
        else:
            how["type"] = how["type"] or f.type
        if value not in (None, "", ()):
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            how["help"] += f" (default {shown})"
        how["help"] = how["help"].replace("%", "%%")
        names = ["-n", "--num"] if f.name == "num" else [f"--{f.name}"]
        group.add_argument(*names, default=argparse.SUPPRESS, **how)


def rng(*key: int, device="cpu") -> torch.Generator:
    """A generator that is a function of the key alone, e.g. (seed, index). Zeros at its end count for
    nothing: (0, 5, 0) is (0, 5)."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)


def ranks() -> tuple[int, int]:
    """(rank, world_size), from torchrun's environment."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def open_device(name: str = "auto") -> torch.device:
    """auto: cuda if available, else cpu. With cuda, a process takes the GPU of its LOCAL_RANK."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
        if mps and not cuda:
            say("note: auto takes the CPU; --device mps is not yet measured", sys.stderr)
    kind, _, index = name.partition(":")
    index = index or os.environ.get("LOCAL_RANK", "0")
    available = kind == "cpu" or (kind == "cuda" and cuda) or (kind == "mps" and mps)
    require(available and index.isdigit(), f"--device {name}: not available; use --device cpu")
    if kind != "cuda":
        return torch.device(kind)
    index, gpus = int(index), torch.cuda.device_count()
    require(index < gpus, f"--device {name}: there are {gpus} GPUs, not {index + 1}; use --device cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def pick_dtype(device: torch.device, asked: str = "auto") -> torch.dtype:
    """bfloat16 or float32. auto: bfloat16 where the GPU has it in hardware."""
    require(asked in ("auto", "fp32", "bf16"), f"precision {asked}: one of auto, fp32, bf16")
    if asked == "auto" and device.type == "cuda":
        asked = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    require(asked != "bf16" or device.type != "mps", "--precision bf16: not on mps; use fp32")
    return torch.bfloat16 if asked == "bf16" else torch.float32


def say(message: str, stream=None) -> None:
    """A line on stdout or another stream, from the first process only."""
    if ranks()[0] == 0:
        print(message, file=stream, flush=True)


def in_threads(function, jobs, threads: int, ahead: int = 0):
    """function(job) of each job, in order; threads work `ahead` jobs ahead (default 4 each)."""
    pool, queue = ThreadPoolExecutor(threads), deque()
    try:
        for job in jobs:
            queue.append(pool.submit(function, job))
            if len(queue) >= (ahead or 4 * threads):
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def aside(path) -> Path:
    """A name beside `path` that nothing else uses. It is written, then renamed to `path`."""
    return Path(path).with_name(f"{Path(path).name}.{uuid.uuid4().hex}.tmp")


def write_text(path, text: str) -> None:
    temporary = aside(path)
    temporary.write_bytes(text.encode())
    os.replace(temporary, path)


def read_json(path) -> dict:
    with explain(ValueError, f"{path}: not valid JSON", "restore or delete it"):
        return json.loads(Path(path).read_text("utf-8"))


def claim(file, record: dict) -> None:
    """Write the settings that the files of a folder depend on. UserError if others are there already."""
    file, temporary = Path(file), aside(file)
    temporary.write_bytes(json.dumps(record, indent=1).encode())
    try:
        os.link(temporary, file)                        # fails if the file is there
    except OSError:
        if not file.exists():                           # a file system without links
            os.replace(temporary, file)
    temporary.unlink(missing_ok=True)
    record, found = json.loads(json.dumps(record)), read_json(file)
    for key in record | found:
        old, new = found.get(key), record.get(key)
        if isinstance(old, list) and isinstance(new, list) and old != new:
            old, new = next((a, b) for a, b in zip_longest(old, new) if a != b)
        way = "use the same, give another --out, or delete both that file and its folder"
        require(old == new, f"{file} was written with {key} = {old}, not {new}; {way}")


def digest_file(path) -> str:
    """The first 16 hex digits of the file's SHA-256."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


# --- Pictures and captions on disk ----------------------------------------------------------------


class Entry(NamedTuple):
    """A file in a folder, or in a tar, where it has an offset and the path `inside` the tar."""

    name: str                                           # from the root; a tar counts as a folder
    file: str
    offset: int = 0
    size: int = -1
    inside: str = ""

    def read(self) -> bytes:
        """A failing disk is a UserError: a set must not shrink because a mount is gone."""
        failed = explain(OSError, f"{self.file}: cannot be read", "check the disk")
        with failed, open(self.file, "rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)


def list_files(root) -> list[Entry]:
    """The files of a tar, or of a folder and its tars, by name, but no hidden ones. Nothing is
    unpacked."""
    root, found, paths = Path(root), {}, [Path(root)]
    if root.is_dir():
        folders = os.walk(root, followlinks=True)
        paths = [Path(folder, name) for folder, _, names in folders for name in names]
    for path in paths:
        name = path.relative_to(root).as_posix()
        if path != root and path.suffix != ".tar":
            found[name] = Entry(name, str(path))
            continue
        folder = "" if path == root else name[:-4] + "/"
        rule, way = f"{path}: not a complete, uncompressed tar", "download it again or unpack it"
        with explain(tarfile.TarError, rule, way), tarfile.open(path, mode="r:") as tar:
            members = [(m, m.name.removeprefix("./")) for m in tar if m.isfile()]
        for m, inside in members:
            found[folder + inside] = Entry(folder + inside, str(path), m.offset_data, m.size, inside)
    hidden = lambda name: any(part.startswith(".") for part in name.split("/"))
    return [found[name] for name in sorted(found) if not hidden(name)]


@contextmanager
def decoder(file):
    """A picture as Pillow opens it. An error of any type becomes a ValueError, with the same words on
    every rank: Pillow names a buffer by its address."""
    try:
        with Image.open(file) as picture:
            yield picture
    except Exception as error:
        text = re.sub(r" <_io\.BytesIO[^>]*>", "", str(error))
        raise ValueError(f"{type(error).__name__}: {text}") from error


def open_picture(file, upright: bool = False) -> Image.Image:
    """A path or binary stream as an RGB picture; transparency is composited on white.

    upright  turned as its EXIF says; `encode` of squares ignores EXIF, as ADM does.
    raises   ValueError if it cannot be decoded.
    """
    with decoder(file) as picture:
        picture = ImageOps.exif_transpose(picture) if upright else picture
        if picture.mode == "F":
            raise ValueError("floating-point pictures have no known white")
        if picture.mode.startswith("I"):                # 16-bit grey, which `convert` would clip
            picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
        elif picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def crop(picture: Image.Image, height: int, width: int = 0) -> np.ndarray:
    """uint8 (3, height, width): halved while possible, scaled to cover it, the centre cut out.

    As ADM (Dhariwal and Nichol 2021) does, whose statistics others compare with.
    """
    width = width or height
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.BOX)
    scale = max(width / picture.width, height / picture.height)
    w, h = (round(s * scale) for s in picture.size)
    left, top = (w - width) // 2, (h - height) // 2
    picture = picture.resize((w, h), Image.BICUBIC).crop((left, top, left + width, top + height))
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def open_cropped(entry: Entry, size, upright: bool = False) -> tuple[np.ndarray | None, str]:
    """uint8 (3, *size) and "", or None and why it cannot be decoded."""
    raw = io.BytesIO(entry.read())
    try:
        return crop(open_picture(raw, upright), *size), ""
    except ValueError as error:
        return None, str(error)


def label_pictures(root, pictures: list[Entry]) -> tuple[list[str], np.ndarray]:
    """Sorted class names and each picture's label: the first folder that differs. The name of a tar
    counts only if it has no folders inside."""
    paths, depth = [(p.inside if "/" in p.inside else p.name).split("/") for p in pictures], 0
    while all(len(p) > depth + 2 and p[depth] == paths[0][depth] for p in paths):
        depth += 1
    flat = ["/".join(p) for p in paths if len(p) == depth + 1]
    if len(flat) == len(paths):
        return ["pictures"], np.zeros(len(paths), np.int64)
    require(not flat, f"{root}: {flat[:1]} lies beside the class folders; move it into one")
    names, labels = np.unique([path[depth] for path in paths], return_inverse=True)
    classes = names.tolist()
    splits = len(classes) > 1 and {name.lower() for name in classes} <= SPLITS
    way = f"give one of them, such as {Path(root) / classes[0]}"
    require(not splits, f"{root}: the folders {', '.join(classes)} are splits, not classes; {way}")
    return classes, labels


def parse_caption(line: bytes) -> tuple[str, list[str]]:
    """A line of captions.jsonl {image_file, captions} or metadata.jsonl {file_name, text}."""
    record = json.loads(line.decode("utf-8-sig"))
    name = record["file_name"] if "file_name" in record else record["image_file"]
    keys = ("captions", "text", "caption", "prompt")
    texts = next((record[key] for key in keys if key in record), None)
    texts = [texts] if isinstance(texts, str) else texts
    valid = texts and isinstance(texts, list) and all(isinstance(t, str) for t in [name, *texts])
    if not valid:
        raise ValueError("the name must be a string, the captions a string or a list of some")
    "".join(texts).encode()                             # ValueError: half a surrogate pair
    return name, texts


def read_captions(raw: bytes, file: str) -> dict[str, list[str]]:
    """Lines of captions as {picture: captions}. Broken ones are listed and skipped."""
    found, faults = {}, []
    for number, line in enumerate(raw.split(b"\n"), 1):  # splitlines() would also cut at U+2028
        try:
            if line.strip():
                name, texts = parse_caption(line)
                found[name] = texts
        except (ValueError, KeyError, TypeError) as error:
            faults.append(f"  line {number}: {type(error).__name__}: {error}")
    example = '{"image_file": "a.png", "captions": ["a text", ...]}'
    why = faults[0].strip() if faults else "it is empty"
    require(found, f"{file}: no line has the form {example}; {why}")
    if faults:
        say("\n".join([f"{file}: {len(faults)} broken lines are skipped", *faults[:20]]), sys.stderr)
    return found


def read_sidecar(entry: Entry) -> str:
    """The caption in a .txt, or under "caption" in a .json; "" if there is none."""
    try:
        text = entry.read().decode("utf-8-sig")
        return (json.loads(text)["caption"] if entry.name.endswith(".json") else text).strip()
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


def find_captions(root, files: list[Entry], pictures: list[Entry]) -> dict[str, list[str]]:
    """{picture: captions}, of the first source that exists: captions.jsonl, metadata.jsonl (names
    are relative to its folder), texts beside the pictures, NAME.txt or else NAME.json."""
    for title in ("captions.jsonl", "metadata.jsonl"):
        found = {}
        for table in (f for f in files if PurePosixPath(f.name).name == title):
            folder = table.name.removesuffix(title)
            for name, texts in read_captions(table.read(), table.file).items():
                found[folder + name] = texts
        if found:
            some = any(p.name in found for p in pictures)
            require(some, f"{title} names none of the pictures, but {list(found)[:3]}")
            return found
    names = {os.path.splitext(p.name)[0]: p.name for p in pictures}
    beside = [f for f in files if f.name.endswith((".json", ".txt"))]
    beside = [f for f in beside if os.path.splitext(f.name)[0] in names]
    found = {}
    for file, text in zip(beside, in_threads(read_sidecar, beside, 16)):
        if text:                                        # files are sorted: NAME.txt comes later
            found[names[os.path.splitext(file.name)[0]]] = [text]
    rule = f"texts lie beside {len(found)} of {len(pictures)} pictures, too few for captions"
    few = 0 < len(found) < len(pictures) / 2
    require(not few, f"{root}: {rule}; remove them, or the pictures without one")
    return found


class Found(NamedTuple):
    """Pictures with classes and labels (n,), or with captions, then labels are 0 to n - 1."""

    pictures: list[Entry]
    classes: list[str]
    labels: np.ndarray
    captions: list[list[str]]


def find_pictures(root) -> Found:
    """The pictures of a folder or tar. If any has a caption, those without are left out."""
    files = list_files(root)
    pictures = [f for f in files if os.path.splitext(f.name)[1].lower() in PICTURES]
    require(pictures, f"{root}: no pictures; expected a folder of them per class, or captions")
    texts = find_captions(root, files, pictures)
    if not texts:
        return Found(pictures, *label_pictures(root, pictures), [])
    kept = [p for p in pictures if p.name in texts]
    without = len(pictures) - len(kept)
    if without:
        say(f"{root}: {without} of {len(pictures)} pictures have no text, left out", sys.stderr)
    return Found(kept, [], np.arange(len(kept)), [texts[p.name] for p in kept])


class Captions:
    """Captions by number, one or several per picture. `null`, the number after the last, is that of
    the empty caption; it is also how many there are."""

    def __init__(self, lists):
        self.texts = [text for texts in lists for text in texts]
        self.ends = np.cumsum([len(texts) for texts in lists])
        self.null = len(self.texts)

    def __getitem__(self, number: int) -> str:
        return "" if number == self.null else self.texts[number]

    def digest(self) -> str:
        raw = [text.encode() for text in self.texts]
        cuts = np.cumsum([0, *map(len, raw)])
        content = b"".join(raw) + cuts.tobytes() + self.ends.tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def draw(self, pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The number of one caption of each picture."""
        first = np.where(pictures > 0, self.ends[pictures - 1], 0)
        return first + rng.integers(self.ends[pictures] - first)


# --- Data sets ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSpec:
    """What a network must know of its data. It is stored in checkpoints."""

    kind: str                                           # "pixels", "latents" or "random"
    shape: tuple[int, ...]                              # (C, H, W)
    mean: float = 0.0                                   # of pixels
    std: float = 1.0
    classes: tuple[str, ...] = ()
    autoencoder: str = ""
    scale: float = 1.0                                  # network space is (latent - shift) * scale
    shift: float = 0.0
    factor: int = 1                                     # pixels per latent position and side
    buckets: tuple[tuple[int, int], ...] = ()           # (H, W) of a native set, in network space
    text: dict | None = None                            # encoder, length, width, captions (digest)
    prompts: tuple[str, ...] = ()                       # for sample grids

    def to_json(self) -> dict:
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_json(record: dict) -> "DataSpec":
        values = {f.name: record[f.name] for f in fields(DataSpec) if f.name in record}
        for key in ("shape", "classes", "prompts"):
            values[key] = tuple(values.get(key, ()))
        values["buckets"] = tuple(tuple(size) for size in values.get("buckets", ()))
        return DataSpec(**values)


@dataclass(frozen=True)
class Batch:
    x: Tensor                                           # (B, C, H, W) float32, network space
    y: Tensor                                           # (B,) int64, class or caption number
    features: Tensor | None = None                      # (B, N, F) float32

    def to(self, device) -> "Batch":
        parts = [part for part in (self.x, self.y, self.features) if part is not None]
        if torch.device(device).type == "cuda":
            parts = [part.pin_memory() for part in parts]
        return Batch(*(part.to(device, non_blocking=True) for part in parts))


@dataclass
class DataSet:
    """A source of arrays, and the labels or captions that belong to them."""

    spec: DataSpec
    labels: np.ndarray                                  # (n,) int64, class or number of the picture
    load: Callable                                      # (indices, rng) -> x, features, indices read
    captions: Captions | None = None
    contents: list[str] | None = None                   # names or digests, for the fingerprint
    buckets: list[range] | None = None                  # indices that can be read together
    features_shape: tuple[int, int] | None = None       # (N, F)

    def __post_init__(self):
        self.labels = self.labels.astype(np.int64)
        self.buckets = self.buckets or [range(len(self.labels))]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices, rng: np.random.Generator) -> Batch:
        """Pictures of one bucket, with a random view and a random caption of each."""
        x, features, indices = self.load(np.asarray(indices), rng)
        y = self.labels[indices]
        if self.captions is not None:
            y = self.captions.draw(y, rng)
        return Batch(*(torch.from_numpy(part) for part in (x, y, features) if part is not None))

    def describe(self) -> str:
        """One line: the number of pictures, and their classes or captions."""
        if self.captions is not None:
            return f"{len(self):,} pictures with {self.captions.null:,} captions"
        classes = self.spec.classes
        counts = zip(classes[:10], np.bincount(self.labels, minlength=len(classes)))
        shown = ", ".join(f"{name} {n:,}" for name, n in counts)
        more = ", ..." if len(classes) > 10 else ""
        return f"{len(self):,} pictures of {len(classes)} classes: {shown}{more}"

    def fingerprint(self) -> str:
        """16 hex digits of what the set holds, wherever it lies: labels, captions, and pixels, digests
        of shards or, of pictures in files, their names."""
        captions = self.captions.digest() if self.captions is not None else ""
        record = json.dumps([self.contents, self.spec.classes, captions])
        return hashlib.sha256(record.encode() + self.labels.tobytes()).hexdigest()[:16]


class PictureFiles:
    """Pictures in files or tars, cropped when first asked for and kept, up to CACHE bytes of them.

    A picture that cannot be decoded is named once on stderr; the next one takes its place.
    """

    def __init__(self, entries: list[Entry], side: int):
        self.entries, self.side = entries, side
        self.cache, self.broken = {}, set()             # threads share them

    def find(self, index: int) -> tuple[np.ndarray, int]:
        """uint8 (3, side, side) of this picture or the next that can be decoded, and its index."""
        n = len(self.entries)
        for k in (i % n for i in range(index, index + n)):
            if k in self.cache:
                return self.cache[k], k
            if k in self.broken:
                continue
            entry = self.entries[k]
            picture, why = open_cropped(entry, (self.side, self.side), upright=True)
            if not why:
                if (len(self.cache) + 1) * picture.nbytes <= CACHE:
                    self.cache[k] = picture
                return picture, k
            if k not in self.broken:                    # as another thread may have said so
                self.broken.add(k)
                print(f"{entry.file}: {entry.name} is skipped: {why}", file=sys.stderr)
        file = self.entries[0].file
        raise UserError(f"{file}: none of {n} pictures can be opened; give other files")

    def take(self, indices) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (B, 3, side, side), and the indices of what was read."""
        pictures, found = zip(*(self.find(int(i)) for i in indices))
        return np.stack(pictures), np.array(found)


def load_pixels(take, spec: DataSpec, mirror: bool, indices, rng):
    """What take(indices) gives, in network space, half of it mirrored if asked for."""
    pixels, indices = take(indices)
    x = (pixels.astype(np.float32) - np.float32(spec.mean)) / np.float32(spec.std)
    if mirror:
        x = np.where(rng.random((len(x), 1, 1, 1)) < 0.5, x[..., ::-1], x)
    return x, None, indices


def pixel_spec(some: np.ndarray, classes=(), prompts=()) -> DataSpec:
    """With mean and deviation of some of the pictures, uint8 (n, C, H, W)."""
    mean, std = float(some.mean()), float(some.std()) or 1.0
    return DataSpec("pixels", some.shape[1:], mean, std, tuple(classes), prompts=prompts)


def in_memory(pixels, labels, classes=(), captions=None, mirror=False, prompts=()) -> DataSet:
    """uint8 (n, C, H, W) as a data set."""
    spec = pixel_spec(pixels[:: max(1, len(pixels) // 10000)], classes, prompts)
    load = partial(load_pixels, lambda indices: (pixels[indices], indices), spec, mirror)
    return DataSet(spec, labels, load, captions, [hashlib.sha256(pixels.tobytes()).hexdigest()])


def open_demo(mirror: bool) -> DataSet:
    """The first 10,000 training pictures of Fashion-MNIST, in the repository as one PNG."""
    info = read_json(DEMO / "fashion.json")
    sprite = np.asarray(Image.open(DEMO / "fashion.png")).reshape(100, 28, 100, 28)
    pixels = sprite.transpose(0, 2, 1, 3).reshape(10000, 1, 28, 28)
    labels = np.array([int(digit) for digit in info["labels"]])
    return in_memory(pixels, labels, info["classes"], mirror=mirror)


def open_emoji(held_out: bool = False, mirror: bool = False) -> DataSet:
    """1,600 Noto emoji, 32 x 32, captioned with their names, less those held out; or only those."""
    info = read_json(DEMO / "emoji.json")
    names = [name for name, *_ in info["name, emoji, group"]]
    kept = [i for i, name in enumerate(names) if (name in info["held_out"]) == held_out]
    sprite = np.asarray(Image.open(DEMO / "emoji.png")).reshape(25, 32, 64, 32, 3)
    pixels = sprite.transpose(0, 2, 4, 1, 3).reshape(1600, 3, 32, 32)[kept]
    captions = Captions([[names[i]] for i in kept])
    prompts = ("red apple", "blue heart", "sun", "cat face", "panda")
    prompts += ("orange heart", "purple circle", "green square")
    return in_memory(pixels, np.arange(len(kept)), (), captions, mirror, prompts)


def open_torchvision(name: str, mirror: bool | None) -> DataSet:
    """fashion, mnist, cifar10 or cifar100 from datasets/, downloaded there the first time."""
    with explain(ImportError, f"--data {name} needs torchvision", "pip install torchvision"):
        from torchvision import datasets
    kind, cifar = getattr(datasets, TORCHVISION[name]), name.startswith("cifar")
    files = [kind.filename] if cifar else [file for file, _ in kind.resources]
    folder = "datasets" if cifar else f"datasets/{kind.__name__}/raw"
    way = f"connect to the network once, or put {', '.join(files)} into {folder}"
    with explain(Exception, f"--data {name}: not available", way):  # of the network or of the disk
        source = kind("datasets", train=True, download=ranks()[0] == 0)  # see train.set_up
    labels = torch.as_tensor(source.targets).numpy()
    if cifar:
        pixels = source.data.transpose(0, 3, 1, 2)
        return in_memory(pixels, labels, source.classes, mirror=mirror is not False)
    classes = read_json(DEMO / "fashion.json")["classes"] if name == "fashion" else "0123456789"
    return in_memory(source.data.numpy()[:, None], labels, classes, mirror=bool(mirror))


def open_folder(root: Path, side: int, mirror: bool | None) -> DataSet:
    """Pictures in files. Class folders are mirrored; captions may tell left from right."""
    found = find_pictures(root)
    files, n = PictureFiles(found.pictures, side), len(found.pictures)
    some = np.linspace(0, n - 1, min(n, 256)).astype(int).tolist()  # spread over all classes
    some = np.stack([picture for picture, _ in in_threads(files.find, some, 8)])
    spec = pixel_spec(some, found.classes)
    captions = Captions(found.captions) if found.captions else None
    mirror = not captions if mirror is None else mirror
    load = partial(load_pixels, files.take, spec, mirror)
    return DataSet(spec, found.labels, load, captions, [p.name for p in found.pictures])


def open_shard(path):
    rule, way = f"{path}: not a complete safetensors file", "delete it and encode again"
    with explain(SafetensorError, rule, way):
        return safe_open(path, "numpy")


class Shards:
    """One tensor that runs on over many safetensors files, which stay memory-mapped."""

    def __init__(self, folder: Path, shards: list[dict], name: str):
        files = [open_shard(folder / shard["file"]) for shard in shards]
        self.slices = [file.get_slice(name) for file in files]
        self.shapes = [rows.get_shape() for rows in self.slices]
        self.starts = np.cumsum([0, *(shape[0] for shape in self.shapes)])
        self.labels = np.concatenate([file.get_tensor("labels") for file in files])

    def read(self, indices, half) -> np.ndarray:
        """(B,) indices, (B,) 0 for the picture or 1 for its mirror image -> (B, ...) float16."""
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        rows = zip(shards.tolist(), (indices - self.starts[shards]).tolist(), half.tolist())
        return np.stack([self.slices[shard][row, h] for shard, row, h in rows])


def load_latents(latents: Shards, features: Shards | None, spec, mirror: bool, indices, rng):
    """Of the picture or its mirror image, drawn from the posterior if that is stored."""
    half = rng.integers(2, size=len(indices)) * mirror
    z = latents.read(indices, half).astype(np.float32)  # (B, C or 2 C, h, w)
    if z.shape[1] == 2 * spec.shape[0]:
        z, std = np.split(z, 2, axis=1)
        bits = rng.integers(2**64, size=-(-z.size // 4), dtype=np.uint64).view(np.uint16)
        z = z + std * NORMAL.take(bits[: z.size]).reshape(z.shape)
    x = (z - np.float32(spec.shift)) * np.float32(spec.scale)
    if features is None:
        return x, None, indices
    return x, features.read(indices, half).astype(np.float32), indices


def open_latents(folder: Path, want_features: bool, mirror: bool | None) -> DataSet:
    """A set that `encode` wrote. Those of classes are mirrored; captions may tell left from right."""
    meta = read_json(folder / "meta.json")
    latents = Shards(folder, meta["shards"], "latents")
    n, starts = len(latents.labels), latents.starts.tolist()
    rule = f"{n} labels, meta.json says {meta['count']}; encode it again"
    require(n == starts[-1] == meta["count"], f"{folder}: {rule}")
    buckets = {}                                        # {(H, W): range}, one after the other
    for shape, start, end in zip(latents.shapes, starts, starts[1:]):
        if end > start:
            size = tuple(shape[-2:])
            first = buckets[size].start if size in buckets else start
            buckets[size] = range(first, end)
    meta["buckets"] = list(buckets) if "buckets" in meta else []
    spec, captions, features, features_shape = DataSpec.from_json(meta), None, None, None
    if not spec.classes:
        file = folder / "captions.jsonl"
        texts = read_captions(file.read_bytes(), str(file))
        rule = f"captions of {len(texts)} pictures, not of {meta['pictures']}"
        require(len(texts) == meta["pictures"], f"{file}: {rule}; restore what encode wrote")
        captions = Captions(texts.values())
    if want_features and "features" in meta:
        features = Shards(folder, meta["features"]["shards"], "features")
        same = np.array_equal(features.starts, latents.starts)
        require(same, f"{folder}: features of other pictures; delete features_* and encode again")
        features_shape = tuple(features.shapes[0][2:])
    contents = [shard.get("sha256", shard["file"]) for shard in meta["shards"]]
    mirror = bool(spec.classes) if mirror is None else mirror
    load, ranges = partial(load_latents, latents, features, spec, mirror), list(buckets.values())
    return DataSet(spec, latents.labels, load, captions, contents, ranges, features_shape)


def random_data(shape, classes: int) -> DataSet:
    """Noise, to run a preset without data; with captions if there are no classes."""
    require(all(shape), "--data random: give --channels, --side, and --classes if not captions")
    texts = [[f"picture {i}, " + "noise " * (i % 64)] for i in range(2 * TABLE)]
    spec = DataSpec("random", tuple(shape), classes=tuple(str(i) for i in range(classes)))
    labels = np.arange(1_281_167) % (classes or len(texts))

    def load(indices, rng):
        return rng.standard_normal((len(indices), *shape), np.float32), None, indices

    return DataSet(spec, labels, load, None if classes else Captions(texts))


def open_data(path: str, side=0, features=False, mirror: bool | None = None) -> DataSet:
    """A data set by name or path.

    path      demo, emoji, fashion, mnist, cifar10, cifar100; a folder that `encode` wrote; a folder
              or tar of pictures, in a folder per class or with captions (see `find_captions`).
    side      of pictures in files, after the centre crop (default 64).
    features  read() then gives the features that `encode --features` stored.
    mirror    half of them as mirror images; None: those of CIFAR and of class folders.
    """
    folder = Path(path).expanduser()
    if path == "demo":
        data = open_demo(bool(mirror))
    elif path == "emoji":
        data = open_emoji(mirror=bool(mirror))
    elif path in TORCHVISION:
        data = open_torchvision(path, mirror)
    elif (folder / "meta.json").is_file():
        data = open_latents(folder, features, mirror)
    else:
        done = len(list(folder.glob("latents_*.safetensors")))
        unfinished = (folder / "plan.json").is_file()
        require(not unfinished, f"--data {path}: encoding stopped after {done} shards; run it again")
        there = path and (folder.is_dir() or (folder.is_file() and folder.suffix == ".tar"))
        require(there, f"--data {path}: no such folder or .tar; give one, or one of {', '.join(NAMED)}")
        data = open_folder(folder, side or 64, mirror)
    require(len(data), f"--data {path}: no picture of it could be opened; encode others")
    n, last = len(data.spec.classes), data.labels.max()
    require(not n or last < n, f"--data {path}: label {last} beyond the {n} classes; encode it again")
    require(not features or data.features_shape, f"--data {path} has no features; encode --features")
    return data


def check_fits(spec: DataSpec, channels=0, side=0, classes=0, autoencoder="") -> None:
    """raises UserError where the data differ from what is asked for; 0 and "" ask for nothing."""
    asked = {"channels": channels, "height": side, "width": side, "classes": classes}
    found = dict(zip(asked, [*spec.shape, len(spec.classes)]))
    if spec.kind != "random":                           # noise stands for any latents
        asked["autoencoder"], found["autoencoder"] = autoencoder, spec.autoencoder
    for name, value in asked.items():
        rule = f"the data have {name} {found[name]}, the configuration asks for {value}"
        require(not value or value == found[name], f"{rule}; change either")


# --- The stream -----------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def picture_indices(n: int, batch: int, seed: int, step: int, slot: int, of: int) -> np.ndarray:
    """Indices for slot `slot` of `of` at `step`: all n once an epoch, in a new order each time."""
    numbers = range((step * of + slot) * batch, (step * of + slot + 1) * batch)
    return np.array([epoch_order(n, seed, k // n)[k % n] for k in numbers])


@lru_cache(maxsize=2)
def epoch_batches(buckets: tuple, sizes: tuple, seed: int, epoch: int) -> list[np.ndarray]:
    """Each bucket, shuffled, is cut into whole batches of its size, and these are shuffled."""
    rng, parts = np.random.default_rng((seed, epoch)), []
    for bucket, size in zip(buckets, sizes):
        order = bucket.start + rng.permutation(len(bucket))
        parts += [order[k : k + size] for k in range(0, len(order) - size + 1, size)]
    return [parts[i] for i in rng.permutation(len(parts))]


def native_sizes(data: DataSet, batch: int, patch: int) -> tuple[int, ...]:
    """How many pictures of each bucket have at most as many tokens as `batch` of spec.shape."""
    budget = batch * math.prod(side // patch for side in data.spec.shape[1:])
    tokens = [math.prod(side // patch for side in size) for size in data.spec.buckets]
    return tuple(min(len(bucket), max(1, budget // n)) for bucket, n in zip(data.buckets, tokens))


def batches(data: DataSet, batch: int, seed: int, slots: list[int], of: int, start=0, patch=1):
    """Endless stream of `Batch`, one per step and slot, from step `start` on, read in threads.

    batch  pictures; of a native set, as many as have the tokens of `batch` of spec.shape at most.
    slots  the micro-batches of this process in a step; `of` is their number over all processes.
    """
    buckets = tuple(data.buckets)
    sizes = native_sizes(data, batch, patch) if data.spec.buckets else ()
    per_epoch = sum(len(bucket) // size for bucket, size in zip(buckets, sizes))

    def read(place):
        step, slot = place
        if not sizes:
            indices = picture_indices(len(data), batch, seed, step, slot, of)
            return data.read(indices, np.random.default_rng((seed, step, slot)))
        number = step * of + slot
        indices = epoch_batches(buckets, sizes, seed, number // per_epoch)[number % per_epoch]
        return data.read(indices, np.random.default_rng((seed, number)))

    return in_threads(read, ((step, slot) for step in count(start) for slot in slots), 4, ahead=4)


# --- Pretrained networks, and captions to features ------------------------------------------------


def load_pretrained(library: str, kind: str, flag: str, path: str):
    """library.kind.from_pretrained(path). raises UserError that says what to install or to give."""
    way = "give a folder or hub name, as of hf download NAME --local-dir FOLDER"
    absent = str(path).startswith((".", "/", "~")) and not os.path.isdir(path)
    require(not absent, f"{flag}: there is no such folder; {way}")
    with explain(ImportError, f"{flag} needs {library}", f"pip install {library}"):
        package = importlib.import_module(library)
    package.utils.logging.set_verbosity_error()
    package.utils.logging.disable_progress_bar()
    with explain(Exception, f"{flag}: does not load", way):  # errors of hub and files share no type
        return getattr(package, kind).from_pretrained(path)


def load_network(library: str, flag: str, path: str, device="cpu", dtype=torch.float32):
    """A pretrained network of diffusers or transformers, frozen."""
    network = load_pretrained(library, "AutoModel", flag, path)
    return network.to(device, dtype).eval().requires_grad_(False)


@lru_cache(maxsize=2**16)
def hash_word(word: str) -> np.ndarray:
    """A fixed normal vector (width,): a quarter of its variance is the word's own, the rest that of
    its runs of 3 bytes, so words of similar spelling are close."""
    raw = f"<{word}>".encode()
    pieces = [raw] + [raw[i : i + 3] for i in range(min(max(1, len(raw) - 2), 64))]
    hashes = [hashlib.shake_256(piece).digest(2 * BYTES["width"]) for piece in pieces]
    v = NORMAL[np.stack([np.frombuffer(h, "<u2") for h in hashes])]
    return 0.25**0.5 * v[0] + (0.75 / len(v[1:])) ** 0.5 * v[1:].sum(0)


class WordHashes:
    """The text encoder "bytes", without weights: a start mark, then a hash of each word."""

    spec = BYTES

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        most = BYTES["length"] - 1
        lists = [["", *re.findall(r"\w+|[^\w\s]", text.casefold())[:most]] for text in captions]
        length = np.array([len(words) for words in lists])
        features = np.zeros((len(lists), length.max(), BYTES["width"]), np.float32)
        for row, words in zip(features, lists):
            row[: len(words)] = [hash_word(word) for word in words]
        mask = np.arange(length.max()) < length[:, None]
        return torch.from_numpy(features), torch.from_numpy(mask)


class TextEncoder:
    """A frozen encoder of transformers: texts -> last hidden state (n, L, F), mask (n, L) bool.

    Padded on the right, no chat template. pad_to_length: L is always `length`, so that a network
    which sees the padding sees the same whatever else is encoded.
    """

    def __init__(self, path: str, net, tokenizer, length: int, pad_to_length: bool):
        self.net = net.get_encoder() if net.config.is_encoder_decoder else net
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
        self.tokenizer, self.padding = tokenizer, "max_length" if pad_to_length else True
        self.empty = "" if tokenizer("")["input_ids"] else tokenizer.pad_token
        longest = getattr(self.net.config, "max_position_embeddings", length)
        self.length = min(length, tokenizer.model_max_length, longest)
        self.spec = {"encoder": path, "length": self.length, "width": self([""])[0].shape[2]}

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        texts = [text or self.empty for text in captions]
        options = {"padding": self.padding, "truncation": True, "max_length": self.length}
        tokens = self.tokenizer(texts, return_tensors="pt", **options).to(self.net.device)
        parts = []
        for i in range(0, len(texts), 64):
            part = {key: value[i : i + 64] for key, value in tokens.items()}
            parts.append(self.net(**part).last_hidden_state)
        return torch.cat(parts), tokens["attention_mask"].bool()


def load_text_encoder(name: str, device="cpu", length: int = 256, pad_to_length: bool = False):
    """`WordHashes` for "bytes", or the `TextEncoder` of a folder or hub name; both have `.spec`."""
    if name == "bytes":
        require(not pad_to_length, "the encoder 'bytes' needs --caption_mask, its padding is hidden")
        return WordHashes()
    flag, path = f"--text_encoder {name}", os.path.abspath(name) if os.path.isdir(name) else name
    net = load_network("transformers", flag, path, device, pick_dtype(torch.device(device)))
    tokenizer = load_pretrained("transformers", "AutoTokenizer", flag, path)
    kinds = AttributeError, TypeError, ValueError, RuntimeError
    with explain(kinds, f"{flag}: not a model of text", f"give another, such as {GEMMA}"):
        return TextEncoder(path, net, tokenizer, length, pad_to_length)


class Texts:
    """A table of encoded captions: numbers (B,) int64 -> features (B, L, F), mask (B, L) bool.

    Up to TABLE captions are encoded once, here; of more, `fetch` encodes those of a coming batch.
    multiple  L is a multiple of it: compiled code wants few different lengths.
    """

    def __init__(self, captions: Captions, encoder, device, multiple: int = 1):
        self.captions, self.encoder, self.null = captions, encoder, captions.null
        self.device, self.multiple = device, multiple
        if captions.null <= TABLE:
            self.encode(range(captions.null + 1))
            self.encoder = None                         # frees its memory

    def fetch(self, y: Tensor) -> None:
        if self.encoder is not None:
            self.encode(sorted({*y.tolist(), self.null}))

    def encode(self, numbers) -> None:
        texts = [self.captions[i] for i in numbers]
        row = {text: k for k, text in enumerate(dict.fromkeys(texts))}  # equal captions share a row
        self.numbers = torch.tensor(list(numbers), device=self.device)
        self.rows = torch.tensor([row[text] for text in texts], device=self.device)
        features, mask = self.encoder(list(row))
        padding = -mask.shape[1] % self.multiple
        self.features = F.pad(features.to(self.device), (0, 0, 0, padding))
        self.mask = F.pad(mask.to(self.device), (0, padding))

    def __call__(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y = y.masked_fill(y < 0, self.null)             # sample.NO_CONDITION
        rows = self.rows[torch.searchsorted(self.numbers, y)]
        return self.features[rows], self.mask[rows]


# --- Autoencoders, and back to pictures -----------------------------------------------------------


def load_autoencoder(name: str, device="cpu", dtype=torch.float32):
    """An autoencoder, its pixels per latent position and side, and its part of a spec: latents z
    are (z - shift) * scale in network space."""
    local = os.path.abspath(name) if os.path.isdir(name) else name
    path, scale = AUTOENCODERS.get(name, (local, 0.0))
    vae = load_network("diffusers", f"--autoencoder {name}", path, device, dtype)
    factor = getattr(vae, "spatial_compression_ratio", 0)
    factor = factor or 2 ** (len(vae.config["block_out_channels"]) - 1)
    scale, shift = scale or vae.config["scaling_factor"], vae.config.get("shift_factor") or 0.0
    name = name if name in AUTOENCODERS else path
    return vae, factor, {"autoencoder": name, "scale": scale, "shift": shift}


@torch.no_grad()
def encode_pictures(vae, means: bool, x: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float16 (B, 2, C or 2 C, h, w), not scaled: of picture and mirror
    image, the posterior's mean and standard deviation, or the mean alone."""
    x = (x.to(vae.device).float() / 127.5 - 1).to(vae.dtype)
    out = vae.encode(torch.cat([x, x.flip(3)]))
    if "latent" in out:
        z = out.latent                                  # DC-AE has no posterior
    else:
        p = out.latent_dist
        z = p.mean if means else torch.cat([p.mean, (p.logvar.float() / 2).exp()], 1)
    return z.half().unflatten(0, (2, -1)).transpose(0, 1)


def encode_picture(path, spec: DataSpec, device, autoencoder: str | None = None) -> Tensor:
    """A picture file, cropped to the size of the spec, in network space: (1, C, H, W) float32."""
    channels, height, width = spec.shape
    require(spec.kind != "random", f"{path}: a network that was trained on noise reads no pictures")
    with explain(ValueError, f"{path}: not a picture that opens", "give another"):
        picture = open_picture(path, upright=True)
    if spec.kind == "pixels":
        picture = picture.convert("L").convert("RGB") if channels == 1 else picture
        x = torch.from_numpy(crop(picture, height, width)[None, :channels])
        return (x.to(device).float() - spec.mean) / spec.std
    vae, factor, _ = load_autoencoder(autoencoder or spec.autoencoder, device)
    x = torch.from_numpy(crop(picture, height * factor, width * factor)[None])
    return (encode_pictures(vae, True, x)[:, 0].float() - spec.shift) * spec.scale


def to_pixels(x: Tensor, mean: float, std: float) -> np.ndarray:
    """(B, C, H, W) -> uint8 (B, H, W, C)."""
    x = (x * std + mean).round().clamp(0, 255)
    return x.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


class Decoder:
    """Network space (B, C, h, w) -> uint8 pictures (B, H, W, C), `.factor` times as high and wide.

    Latents are decoded in float32, in tiles if the picture has more than TILED pixels.

    autoencoder  a path to load instead of the spec's.
    """

    def __init__(self, spec: DataSpec, device="cpu", autoencoder: str | None = None):
        self.spec, self.device, self.vae, self.factor = spec, device, None, 1
        if spec.kind != "latents":
            return
        path, channels = autoencoder or spec.autoencoder, spec.shape[0]
        require(path, f"{channels} channels: no autoencoder is known; give --autoencoder")
        self.vae, self.factor, _ = load_autoencoder(path, device)
        have = self.vae.config["latent_channels"]
        rule = f"the latents have {channels} channels; they were made with {spec.autoencoder}"
        require(have == channels, f"--autoencoder {path} has {have} channels, {rule}")

    @torch.no_grad()
    def __call__(self, x: Tensor) -> np.ndarray:
        if self.spec.kind == "pixels":
            return to_pixels(x, self.spec.mean, self.spec.std)
        if self.spec.kind == "random":
            return to_pixels(x[:, :3], 128, 40)
        z = x.to(self.device, torch.float32) / self.spec.scale + self.spec.shift
        area = z.shape[2] * z.shape[3] * self.factor**2
        self.vae.disable_tiling()
        if area > TILED:
            self.vae.enable_tiling()
        parts = z.split(max(1, min(16, 16 * 512**2 // area)))
        pixels = [to_pixels(self.vae.decode(part).sample, 127.5, 127.5) for part in parts]
        return np.concatenate(pixels)


def to_image(pixels: np.ndarray) -> Image.Image:
    """uint8 (H, W, 1 or 3)."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def grid(rows: np.ndarray, scale: int = 1, names=(), row_names=(), gap: int = 2) -> Image.Image:
    """uint8 (R, C, H, W, K) as one picture with white gaps, each pixel `scale` wide; names of
    columns below, names of rows at the left."""
    r, c, h, w, k = rows.shape
    h, w, gap = h * scale, w * scale, gap * scale
    left, below, bottom = 64 if row_names else 0, 56 if names else 0, r * (h + gap) - gap
    size = left + c * (w + gap) - gap, bottom + below
    sheet = Image.new("L" if k == 1 else "RGB", size, "white")
    for i, j in np.ndindex(r, c):
        picture = to_image(rows[i, j]).resize((w, h), Image.NEAREST)
        sheet.paste(picture, (left + j * (w + gap), i * (h + gap)))
    labels = [(name, w, below, left + j * (w + gap), bottom) for j, name in enumerate(names)]
    labels += [(name, left, h, 0, i * (h + gap)) for i, name in enumerate(row_names)]
    for name, width, height, x, y in labels:            # wrapped, and cut at the edges of its cell
        cell = Image.new(sheet.mode, (width, height), "white")
        text = "\n".join(textwrap.wrap(name[:200], max(1, width // 6))[:4])
        font = ImageFont.load_default(11)
        ImageDraw.Draw(cell).multiline_text((1, 1), text, "black", font, spacing=2)
        sheet.paste(cell, (x, y))
    return sheet


def write_picture(picture, path) -> None:
    """uint8 (H, W, C) or a PIL image as PNG, or JPEG if the name says so; complete or not there."""
    image = picture if isinstance(picture, Image.Image) else to_image(picture)
    jpeg = Path(path).suffix.lower() in (".jpg", ".jpeg")
    temporary = aside(path)
    image.save(temporary, "JPEG" if jpeg else "PNG", quality=95)
    os.replace(temporary, path)


# --- The commands: encode and inspect -------------------------------------------------------------


@dataclass(frozen=True)
class EncodeConfig:
    """The flags of `data.py encode`."""

    images: str = flag("", "folder or tar: class folders, or with captions", required=True)
    out: str = flag("", "folder of the set", required=True)
    autoencoder: str = flag("sd-vae", "sd-vae, dc-ae, folder or hub name")
    means: bool = flag(False, "store the posterior's mean only")
    native: bool = flag(False, "keep aspect ratios, in buckets")
    upscale: bool = flag(False, "enlarge what is below the smallest size")
    features: str = flag("", "also features of DINOv2 or RADIO: a folder or hub name")
    size: tuple = flag((256,), "pixels per side; --native: of squares of the buckets' areas",
        positive_int, nargs="+")
    batch: int = flag(64, "pictures per pass of the network", positive_int)
    shard: int = flag(1024, "pictures per file", positive_int)
    grid: int = flag(16, "feature tokens per side", positive_int)
    patch: int = flag(1, "of the network to come, in latent positions: sizes are multiples",
        positive_int)
    workers: int = flag(0, "threads per rank that decode pictures; 0 = its share of the cores", natural)
    device: str = flag("auto", "auto, cpu, cuda, mps")
    precision: str = flag("auto", "of the networks", choices=("auto", "fp32", "bf16"))  # fmt: skip


def bucket_sizes(side: int, step: int) -> list[tuple[int, int]]:
    """At most 33 (height, width), from wide to tall: multiples of `step` of ratios up to 1:4, whose
    area is that of the square or a little less."""
    n = side // step
    short = {round(h) for h in np.geomspace(n / 2, n, 17)} - {0}
    sizes = {(h, min(4 * h, n * n // h)) for h in short}
    sizes |= {(w, h) for h, w in sizes}
    return sorted(((h * step, w * step) for h, w in sizes), key=lambda size: size[0] / size[1])


def choose_bucket(size, tables: list, upscale: bool) -> tuple[tuple | None, str]:
    """The nearest ratio of the largest area that a picture (height, width) fills as it is, and "";
    or None and why there is none.

    tables  `bucket_sizes` from small to large.
    """
    h, w = size
    if max(h, w) > 4.5 * min(h, w):
        return None, f"{h}x{w} is beyond the ratios from 1:4 to 4:1"
    nearest = [min(table, key=lambda b: abs(math.log(h / w * b[1] / b[0]))) for table in tables]
    fitting = [b for b in nearest if h >= b[0] and w >= b[1]]
    if not fitting and not upscale:
        return None, "{}x{} is smaller than {}x{}; see --upscale".format(h, w, *nearest[0])
    return (fitting or nearest[:1])[-1], ""


def find_bucket(entry: Entry, tables: list, upscale: bool) -> tuple[tuple | None, str]:
    """`choose_bucket` of a picture as EXIF turns it; its header is read alone."""
    raw = io.BytesIO(entry.read())
    try:
        with decoder(raw) as picture:
            turned = picture.format != "TIFF" and picture.getexif().get(0x0112, 1) > 4
            return choose_bucket(picture.size if turned else picture.size[::-1], tables, upscale)
    except ValueError as error:
        return None, str(error)


def plan_buckets(cfg: EncodeConfig, step: int, pictures: list[Entry]) -> tuple[dict, list]:
    """{(height, width): indices} from wide to tall, and [name, reason] of those that fit none."""
    tables = [bucket_sizes(side, step) for side in sorted(cfg.size)]
    groups, skipped = {}, []
    find = partial(find_bucket, tables=tables, upscale=cfg.upscale)
    found = in_threads(find, pictures, cfg.workers)
    for i, (size, why) in enumerate(tqdm(found, "sizes", len(pictures), disable=None)):
        if why:
            skipped.append([pictures[i].name, why])
        else:
            groups.setdefault(size, []).append(i)
    require(groups, f"--images {cfg.images}: no picture fits a bucket; the first: {skipped[:1]}")
    order = sorted(groups, key=lambda size: (size[0] / size[1], size))
    return {size: groups[size] for size in order}, skipped


@torch.no_grad()
def encode_features(net, grid: int, x: Tensor) -> Tensor:
    """uint8 (B, 3, S, S), resized to grid x grid patches of an image encoder -> float16
    (B, 2, grid^2, F) of the picture and its mirror image."""
    side = grid * net.config.patch_size
    x = x.to(net.device).float() / 255
    x = F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    if not hasattr(net.config, "norm_mean"):            # RADIO normalises by itself
        mean, std = torch.tensor(IMAGENET, device=x.device).view(2, 3, 1, 1)
        x = (x - mean) / std
    x = x.to(net.dtype)
    out = net(torch.cat([x, x.flip(3)]))
    tokens = out["features"] if "features" in out else out.last_hidden_state
    tokens = tokens[:, -grid * grid :].half()           # without class token and registers
    return tokens.unflatten(0, (2, -1)).transpose(0, 1)


def plan_set(cfg: EncodeConfig, found: Found, out: Path) -> tuple[dict, list]:
    """Load the networks and claim the folder.

    returns  {kind: function} that make the tensors; per shard (height, width) and indices
    """
    device = open_device(cfg.device)
    dtype = pick_dtype(device, cfg.precision)
    vae, factor, network = load_autoencoder(cfg.autoencoder, device, dtype)
    step, side, n = factor * cfg.patch, max(cfg.size), len(found.pictures)
    rule = f"must be a multiple of {step}, the autoencoder's pixels per position times --patch"
    require(all(size % step == 0 for size in cfg.size), f"--size {cfg.size}: {rule}")
    makers = {"latents": partial(encode_pictures, vae, cfg.means)}
    probe = makers["latents"](torch.zeros(1, 3, side, side))
    channels = vae.config["latent_channels"]
    listing = "\n".join(f"{p.name} {k}" for p, k in zip(found.pictures, found.labels))
    plan = {"kind": "latents", "native": cfg.native, "size": side, **network, "factor": factor}
    plan |= {"shape": [channels, *probe.shape[3:]], "moments": probe.shape[2] > channels}
    plan |= {"precision": str(dtype).removeprefix("torch."), "shard": cfg.shard, "pictures": n}
    plan |= {"classes": found.classes, "listing": hashlib.sha256(listing.encode()).hexdigest()}
    plan |= {"captions": Captions(found.captions).digest()}
    groups = {(side, side): list(range(n))}
    if cfg.native:
        groups, plan["skipped"] = plan_buckets(cfg, step, found.pictures)
        plan["buckets"] = [[h, w, len(indices)] for (h, w), indices in groups.items()]
    out.mkdir(parents=True, exist_ok=True)
    claim(out / "plan.json", plan)
    if cfg.features:
        asked = f"--features {cfg.features}"
        net = load_network("transformers", asked, cfg.features, device, dtype)
        makers["features"] = partial(encode_features, net, cfg.grid)
        record = {"name": cfg.features, "grid": cfg.grid, "precision": plan["precision"]}
        claim(out / "features.json", record)
    if found.captions:
        pairs = zip(found.pictures, found.captions)
        lines = [json.dumps({"image_file": p.name, "captions": texts}) + "\n" for p, texts in pairs]
        write_text(out / "captions.jsonl", "".join(lines))
    shards = []
    for size, indices in groups.items():
        shards += [(size, indices[k : k + cfg.shard]) for k in range(0, len(indices), cfg.shard)]
    return makers, shards


def encode_shard(cfg: EncodeConfig, kind: str, make, size, pictures: list) -> tuple[dict, dict]:
    """[(Entry, label)] -> {kind: (n, ...) float16, "labels": (n,)} of a shard, and its record."""
    parts, labels, skipped = [], [], []
    read = partial(open_cropped, size=size, upright=cfg.native)
    stream = in_threads(read, (entry for entry, _ in pictures), cfg.workers, ahead=4 * cfg.batch)
    for k in range(0, len(pictures), cfg.batch):
        x = []
        for (entry, label), (picture, why) in zip(pictures[k : k + cfg.batch], stream):
            if why:
                skipped.append([entry.name, why])
            else:
                x.append(picture)
                labels.append(label)
        made = make(torch.from_numpy(np.stack(x or [np.zeros((3, *size), np.uint8)])))
        parts.append(made[: len(x)].cpu().numpy())      # without pictures, empty of that shape
        rule = f"{kind} of {pictures[k][0].name} and after overflow float16; use another encoder"
        require(np.isfinite(parts[-1]).all(), rule)
    tensor = np.ascontiguousarray(np.concatenate(parts))  # safetensors stores bytes as they lie
    record = {"count": len(labels), "skipped": skipped}
    if cfg.native:
        record["bucket"] = size
    return {kind: tensor, "labels": np.array(labels, np.int64)}, record


def checksum(tensors: dict) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        sha.update(np.ascontiguousarray(tensors[name]).view(np.uint8))
    return sha.hexdigest()


def write_shard(path: Path, tensors: dict, record: dict) -> None:
    """A shard is complete or not there."""
    temporary, record = aside(path), record | {"sha256": checksum(tensors)}
    way = "the other shards are complete: free the disk and run again"
    try:
        with explain((OSError, SafetensorError), f"{path}: not written", way):
            save_file(tensors, temporary, {"tim": json.dumps(record)})
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
            temporary.chmod(0o644)                      # safetensors makes private files
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def finish(out: Path, shards: int) -> dict | None:
    """Write meta.json from the records of the shards, if all are there, those of features too."""
    meta = read_json(out / "plan.json")
    kinds = ["latents", "features"] if (out / "features.json").is_file() else ["latents"]
    for kind in kinds:
        files = [out / f"{kind}_{k:05}.safetensors" for k in range(shards)]
        if not all(file.is_file() for file in files):
            return None
        stored = [json.loads(open_shard(file).metadata()["tim"]) for file in files]
        records = [{"file": f.name} | record for f, record in zip(files, stored)]
        if kind == "latents":
            meta |= {"count": sum(record["count"] for record in records), "shards": records}
        else:
            meta["features"] = read_json(out / "features.json") | {"shards": records}
    write_text(out / "meta.json", json.dumps(meta, indent=1))
    return meta


def encode(cfg: EncodeConfig) -> None:
    """Pictures to shards. Each rank makes every world_size-th, so ranks need not communicate."""
    (rank, world_size), out = ranks(), Path(cfg.out)
    require(Path(cfg.images).exists(), f"--images {cfg.images}: no such folder or tar")
    inside = Path(cfg.images).resolve() in (out.resolve(), *out.resolve().parents)
    require(not inside, f"--out {out}: lies in --images {cfg.images}; give a folder outside of it")
    require(cfg.native or len(cfg.size) == 1, f"--size {cfg.size}: several need --native")
    require(not (cfg.native and cfg.features), "--features: not for --native pictures")
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cfg = replace(cfg, workers=cfg.workers or max(1, cores))
    found = find_pictures(cfg.images)
    makers, shards = plan_set(cfg, found, out)
    made = 0
    for kind, make in makers.items():
        for k in tqdm(range(rank, len(shards), world_size), kind, disable=rank > 0):
            size, indices = shards[k]
            path = out / f"{kind}_{k:05}.safetensors"
            if not path.is_file():
                pictures = [(found.pictures[i], found.labels[i]) for i in indices]
                write_shard(path, *encode_shard(cfg, kind, make, size, pictures))
                made += 1
    meta = finish(out, len(shards))
    if meta and (rank == 0 or made):
        skipped = [line for part in (meta, *meta["shards"]) for line in part.get("skipped", [])]
        n = len(found.pictures)
        print(f"{out}: {meta['count']:,} of {n:,} pictures, {len(skipped)} skipped")
        for name, why in skipped[:20]:
            print(f"  skipped {name}: {why}")
        require(meta["count"], f"--images {cfg.images}: none of the pictures could be opened")


def inspect(path: str, device: str, autoencoder: str | None, sheet: str) -> None:
    data = open_data(path)
    print(f"{path}: {data.describe()}; {data.spec.kind} {data.spec.shape} {data.spec.autoencoder}")
    for (h, w), bucket in zip(data.spec.buckets, data.buckets):
        print(f"bucket {h:4} x {w:<4} {len(bucket):12,} pictures")
    most = max(data.buckets, key=len)
    some = np.linspace(most[0], most[-1], min(1024, len(most))).astype(int)
    x = data.read(some, np.random.default_rng(0)).x
    for c, values in enumerate(x.transpose(0, 1)):
        print(f"channel {c}: mean {values.mean():.3f} and deviation {values.std():.3f}, near 0 and 1?")
    if data.spec.kind == "latents":
        folder = Path(path).expanduser()
        meta = read_json(folder / "meta.json")
        shards = meta["shards"] + meta.get("features", {}).get("shards", [])
        for shard in tqdm(shards, "checksums", disable=None):
            right = checksum(load_file(folder / shard["file"])) == shard["sha256"]
            require(right, f"{folder / shard['file']}: wrong checksum; delete it and encode again")
        print("all checksums are right")
    try:
        decode = Decoder(data.spec, open_device(device), autoencoder)
    except UserError as error:
        print(f"no contact sheet: {error}")
        return
    columns = min(8, len(x))
    rows = min(4, len(x) // columns)
    pixels = decode(x[:: len(x) // (rows * columns)][: rows * columns])
    write_picture(grid(pixels.reshape(rows, columns, *pixels.shape[1:])), sheet)
    print(f"contact sheet: {sheet}")


def parse_arguments(argv=None) -> argparse.Namespace:
    style = {"allow_abbrev": False, "formatter_class": argparse.RawTextHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **style)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("encode", help="pictures to latents; again = resume", **style)
    add_flags(p, EncodeConfig)
    p = commands.add_parser("inspect", help="what a set is, whether it is complete", **style)
    p.add_argument("path", help="name or folder of a set")
    p.add_argument("--autoencoder", help="for the contact sheet (that of the set)")
    p.add_argument("--sheet", default="samples_contact.png", help="its contact sheet")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (auto)")
    return parser.parse_args(argv)


def main(argv=None):
    values = vars(parse_arguments(argv))
    if values.pop("command") == "encode":
        encode(EncodeConfig(**values))
    else:
        inspect(**values)


if __name__ == "__main__":
    command(main)
