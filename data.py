"""Pictures and captions to arrays to batches, and network space back to pictures.

    python data.py prepare --images FOLDER --out SET                     # pixels, 64 x 64
    torchrun --nproc_per_node=8 data.py prepare --images imagenet/train --out latents/imagenet256 \\
        --autoencoder sd-vae --size 256                                  # again = go on
    python data.py prepare --images FOLDER --out SET --autoencoder dc-ae --native --size 256 512

A data set is arrays and a record: pictures or latents, in memory or memory-mapped; classes or
captions; a `Spec`. `batches` is an endless stream of their rows, a function of (seed, step, slot),
and `network_space` makes of them what a network is trained on: mean 0, deviation about 1.
"""

import argparse
import hashlib
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import uuid
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from itertools import count
from pathlib import Path, PurePosixPath
from typing import NamedTuple

if sys.version_info < (3, 11):
    sys.exit(f"error: this is Python {sys.version.split()[0]}; 3.11 or newer is needed")

try:
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from PIL import Image, ImageDraw, ImageFont
    from torch import Tensor
    from tqdm import tqdm
except ImportError as missing:
    sys.exit(f"error: {missing}; source .venv/bin/activate, or pip install -r requirements.txt")

DEMO = Path(__file__).parent / "demo"
PREPARED = Path("datasets")  # where folders of pictures are prepared, and torchvision downloads to
TORCHVISION = {"fashion": "FashionMNIST", "mnist": "MNIST"}
TORCHVISION |= {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
PICTURES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif"}
PICTURES |= {".tiff", ".ppm", ".pgm", ".jp2", ".tga"}
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of trainA, X_train_HR, VAL2017
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
AUTOENCODERS = {  # name: path on the model hub; scale, channels of its latents; pixels a position
    "sd-vae": ("stabilityai/sd-vae-ft-ema", 0.18215, 4, 8),
    "dc-ae": ("mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers", 0.41407, 32, 32),
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of its channels
CHUNK = 1024  # rows of a prepared set that are filled, or filled again, at once
TILED = 1024**2  # pixels of a picture above which it is decoded in tiles
GEMMA = "google/gemma-3-1b-it"  # the text encoder of the released weights
HASHES = {"encoder": "word_hashes", "length": 64, "width": 128}  # the one that needs no download
TABLE = 4096  # at most this many captions of a set are encoded once and kept on the device


# --- Errors, arguments, randomness ----------------------------------------------------------------

# What a user can put right is a UserError: `require` raises one where a condition fails, `explain`
# makes one of an error of a library, `first_rank` raises on all ranks what rank 0 met. `command`
# prints it. A ValueError of one picture of many is caught by `attempt`, and the picture left out.


class UserError(Exception):
    """Something the user can put right. The message names the value, the rule and the way out."""


def require(condition, message: str) -> None:
    if not condition:
        raise UserError(message)


@contextmanager
def explain(kind, message: str):
    """An error of this kind, or tuple of kinds, becomes a UserError: "MESSAGE (its first sentence)"."""
    try:
        yield
    except kind as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        why = lines[-1 if "Traceback" in str(error) else 0]  # torch's checkpoints quote theirs
        raise UserError(f"{message} ({why.split('. ')[0]})") from error


def command(main) -> None:
    """Run a command. A UserError, or a file that cannot be read or written, is one line on stderr
    and exit status 2; Ctrl-C is status 130. Names that a terminal cannot show are escaped.

    Of an error that all ranks meet, rank 0 speaks at once, and torchrun ends the others before they do.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (UserError, OSError) as error:
        if ranks()[0]:
            time.sleep(10 if int(os.environ.get("LOCAL_RANK", 0)) else 5)
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C does not wait for threads
        sys.exit(130)


def number(kind, low, high, rule: str):
    """An argparse type: an int or float with low <= value <= high."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # nan is in no range
            raise argparse.ArgumentTypeError(f"{text!r} must be {rule}")
        return value

    return parse


LARGEST, LARGEST_INT = sys.float_info.max, 2**63 - 1
positive_int = number(int, 1, LARGEST_INT, "a whole number, at least 1 and below 2^63")
natural = number(int, 0, LARGEST_INT, "a whole number, at least 0 and below 2^63")
positive_float = number(float, math.ulp(0), LARGEST, "a finite number above 0")
non_negative_float = number(float, 0, LARGEST, "a finite number, at least 0")
finite = number(float, -LARGEST, LARGEST, "a finite number")
share = number(float, 0, 1, "a number from 0 to 1")


def flag(default, text: str, kind=None, **how):
    """A field of a record of flags: default, help, type of a value, keywords of add_argument."""
    return field(default=default, metadata={"help": text, "type": kind, **how})


def add_flags(parser, record, groups=None) -> None:
    """A flag per field of a record, whose values are the defaults; what is not given is not in the
    result. groups: {first field: title} of the parts of --help."""
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
        short = how.pop("short", ())
        group.add_argument(*short, f"--{f.name}", default=argparse.SUPPRESS, **how)


def seeded(*key: int, device="cpu") -> torch.Generator:
    """A generator that is a function of the whole key alone, e.g. (seed, index). Zeros at its end
    count for nothing: (0, 5, 0) is (0, 5)."""
    low, high = [k % 2**32 for k in key], [k >> 32 for k in key]  # words: (2^32,) is not (0, 1)
    sequence = np.random.SeedSequence(low, spawn_key=high if any(high) else ())
    generator = torch.Generator(device)
    if generator.device.type != "cpu":
        return generator.manual_seed(int(sequence.generate_state(1, np.uint64)[0]) >> 1)
    # manual_seed takes 32 bits alone on the CPU, and of 50,000 samples two are equal. So the words
    # of its Mersenne twister are set: 624 of 64 bits, behind 24 bytes, each with a value of 32
    state = generator.manual_seed(0).get_state()
    state[24 : 24 + 8 * 624].numpy().view(np.uint64)[:] = sequence.generate_state(624)
    return generator.set_state(state)


# --- Processes and devices ------------------------------------------------------------------------


def ranks() -> tuple[int, int]:
    """(rank, world_size) from torchrun's environment: RANK and WORLD_SIZE both, else one process."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def connect(device: torch.device) -> None:
    """Join the ranks that torchrun started, if it did. Objects go over gloo, also with GPUs."""
    if ranks()[1] > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # others wait while rank 0 lists a folder or scores; torchrun ends all where one dies
        dist.init_process_group(backend, timeout=timedelta(hours=12))


def everyone(value) -> list:
    """The value of each rank, on every rank."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def first_rank(action, *args):
    """What action(*args) returns on rank 0, on every rank; the others wait. Its UserError or OSError is
    a UserError on all of them, so that none hangs; torchrun ends all after a fault of the code."""
    said = [None, None]  # message of the error, result
    if ranks()[0] == 0:
        try:
            said = [None, action(*args)]
        except (OSError, UserError) as error:
            said = [str(error), None]
    if dist.is_initialized():
        dist.broadcast_object_list(said)
    require(said[0] is None, said[0])
    return said[1]


def say(message: str, stream=None) -> None:
    """A line on stdout or another stream, from the first process only. That nobody reads it any
    more, a closed terminal or the `tee` behind a pipe, ends nothing."""
    stream = stream or sys.stdout
    if ranks()[0] == 0:
        try:
            print(message, file=stream, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def note(message: str) -> None:
    """A line on stderr, from the first process only."""
    say(f"note: {message}", sys.stderr)


def open_device(name: str = "auto") -> torch.device:
    """auto: cuda if available, else cpu. With cuda, a process takes the GPU of its LOCAL_RANK."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
        if mps and not cuda:
            note("auto takes the CPU; --device mps is not yet measured")
    kind, _, index = name.partition(":")
    index = index or (os.environ.get("LOCAL_RANK", "0") if ranks()[1] > 1 else "0")
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
    if asked == "auto" and device.type == "cuda":  # or a dry run, without one
        absent = not torch.cuda.is_available()
        has_bf16 = absent or torch.cuda.is_bf16_supported(including_emulation=False)
        asked = "bf16" if has_bf16 else "fp32"
    require(asked != "bf16" or device.type != "mps", "--precision bf16: not on mps; use fp32")
    return torch.bfloat16 if asked == "bf16" else torch.float32


def to_device(tensor: Tensor, device) -> Tensor:
    """Without waiting where that is safe: from pinned memory to CUDA; other devices wait."""
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def spread(total: int, n: int) -> np.ndarray:
    """n of the numbers below `total`, evenly over all of them."""
    return np.linspace(0, total - 1, n if total else 0).round().astype(int)


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


def attempt(function, *args, **options) -> tuple:
    """What it returns, and ""; or None, and the message of its ValueError."""
    try:
        return function(*args, **options), ""
    except ValueError as error:
        return None, str(error)


# --- Files ----------------------------------------------------------------------------------------


@contextmanager
def replacing(path):
    """A name beside `path` to write to; it becomes `path` if all goes well, else it is removed."""
    temporary = Path(path).with_name(f"{Path(path).name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


def lies_in(path, folder) -> bool:
    """Whether a path is a folder, or lies anywhere below it."""
    return Path(folder).resolve() in (Path(path).resolve(), *Path(path).resolve().parents)


def sync(path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    if os.name == "nt" and Path(path).is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if Path(path).is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path, text: str) -> None:
    """Complete or not there, and on the disk."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())
        sync(temporary)


def read_json(path) -> dict:
    with explain(ValueError, f"{path}: not valid JSON; restore or delete it"):
        return json.loads(Path(path).read_text("utf-8"))


def digest(*parts) -> str:
    """16 hex digits of bytes, and of anything that JSON can write."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
    return sha.hexdigest()[:16]


def claim(file, record: dict) -> None:
    """Write the settings that the files of a folder depend on. UserError if others are there."""
    file, record = Path(file), json.loads(json.dumps(record))
    if not file.exists():
        write_text(file, json.dumps(record, indent=1))
    found = read_json(file)
    for key in record | found:
        old, new = found.get(key), record.get(key)
        require(old == new, f"{file} was written with {key} = {old}, not {new}; use the same, give "
                "another --out, or delete both that file and its folder")  # fmt: skip


@contextmanager
def owning(folder: Path):
    """Own a folder that all ranks see, for the `with` or the life of the process, however it ends.
    UserError, on all of them, if another process owns it, or if they do not see the same one."""
    held = []
    first_rank(lambda: held.append(take_lock(folder)))
    try:
        check_shared(folder)
        yield
    finally:
        for file in held:
            file.close()


def take_lock(folder: Path):
    file = (folder / "lock").open("a+")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(f"{folder}: another process writes there; wait for its end, or give another "
                        "--name or --out") from None  # fmt: skip
    except OSError as error:
        note(f"{folder}: no locks on this file system ({error}); start no second process on it")
    return file


def check_shared(folder: Path) -> None:
    """UserError, on all ranks, where they do not see the same folder."""
    token = first_rank(lambda: uuid.uuid4().hex)
    file = folder / f"token.{token}"
    first_rank(lambda: file.write_text(token))
    for _ in range(5):
        seen = all(everyone(file.is_file()))
        if seen:
            break
        time.sleep(1)
    first_rank(lambda: file.unlink(missing_ok=True))
    first_rank(require, seen, f"{folder.absolute()}: not the same folder on all nodes; the ranks need "
               "a shared one")  # fmt: skip


def printable(text: str) -> str:
    """A name with what is not text in it (surrogates of a file name in another encoding) as ?."""
    return text.encode("utf-8", "replace").decode()


def read_text(raw: bytes, where: str) -> str:
    """Text in UTF-8, or in what its mark says. UserError for another encoding."""
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    with explain(UnicodeError, f"{where}: not text in UTF-8; save it as UTF-8"):
        text = raw.decode(encoding).replace("\r\n", "\n")
        if "\0" in text:
            raise UnicodeError("there are zeros between its letters: UTF-16 or UTF-32 without a mark")
        return text


# --- Pictures in folders --------------------------------------------------------------------------


class Entry(NamedTuple):
    """A file in a folder."""

    name: str  # from the folder, with /
    file: str

    def read(self) -> bytes:
        """A failing disk is a UserError: a set must not shrink because a mount is gone."""
        with explain(OSError, f"{self.file}: cannot be read; check the disk"):
            return Path(self.file).read_bytes()


def list_files(root) -> list[Entry]:
    """The files of a folder by name, links followed; each folder once, and real ones before links to
    them. What a link repeats, or leads nowhere with, is named on stderr."""
    folders, links, seen, files, wrong = [str(root)], [], set(), [], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        place = os.path.realpath(folder)
        if place in seen:
            wrong.append(folder)
            continue
        seen.add(place)
        for item in sorted(os.scandir(folder), key=lambda item: item.name):
            if item.is_dir():
                (links if item.is_symlink() else folders).append(item.path)
            elif item.is_file():
                files.append(Entry(Path(item.path).relative_to(root).as_posix(), item.path))
            else:
                wrong.append(item.path)
    if wrong:
        note(f"{root}: {len(wrong)} links lead nowhere, or to a folder that is read already: "
             f"{printable(wrong[0])}")  # fmt: skip
    return sorted(files)


def list_pictures(root) -> tuple[list[Entry], list[Entry]]:
    """The pictures of a folder, the one listing that training and FID see; and its other files. What
    is hidden is named, if it is pictures, and left out."""
    candidates, others = [], []
    is_picture = lambda e: os.path.splitext(e.name)[1].lower() in PICTURES
    is_hidden = lambda e: any(part.startswith(".") for part in e.name.split("/"))
    for entry in list_files(root):
        (candidates if is_picture(entry) else others).append(entry)
    pictures = [e for e in candidates if not is_hidden(e)]
    say_unread(root, [e for e in candidates if is_hidden(e)])
    others = [e for e in others if not is_hidden(e)]
    if not pictures:
        say_unread(root, others)
    require(pictures, f"{root}: no pictures in it; expected files such as .png and .jpg; unpack archives")
    return pictures, others


def say_unread(root, entries: list[Entry]) -> None:
    """Name by suffix, with their number, the files that lie there and are not read."""
    kinds = Counter(os.path.splitext(e.name)[1] or PurePosixPath(e.name).name for e in entries)
    if kinds:
        shown = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(12))
        note(f"{root}: not read: {printable(shown)}, such as {printable(entries[0].name)}")


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
ORIENTATION = 0x0112  # the tag of EXIF that says how to turn a picture


@contextmanager
def pillow(file):
    """A picture as Pillow opens it. An error of any type becomes a ValueError, with the same words
    on every rank: Pillow names a buffer by its address."""
    try:
        with Image.open(file) as picture:
            yield picture
    except MemoryError:
        raise
    except Exception as error:
        text = re.sub(r" <_io\.BytesIO[^>]*>", "", str(error))
        raise ValueError(f"{type(error).__name__}: {text}") from error


def open_picture(file, upright: bool = True) -> Image.Image:
    """A path or binary stream as an RGB picture, transparency composited on white: the one way in
    which training, FID and CLIP open one. upright: turned as its EXIF says. ValueError if it is not
    whole, or has no known white."""
    with pillow(file) as picture:
        picture.load()
        turn = TURNS.get(picture.getexif().get(ORIENTATION)) if upright else None
        picture = picture if turn is None else picture.transpose(turn)
        if picture.mode == "F":
            raise ValueError("floating-point pictures have no known white")
        if picture.mode.startswith("I"):  # 16-bit grey, which `convert` would clip
            grey = np.asarray(picture)
            if 0 < grey.max() < 2**14:  # values of 12 bits, say: 16 levels would be left
                raise ValueError(f"16-bit, but none above {grey.max()}: nearly black; scale it to 65535")
            picture = Image.fromarray((grey >> 8).clip(0, 255).astype(np.uint8))
        elif picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def crop(picture: Image.Image, height: int, width: int = 0) -> np.ndarray:
    """uint8 (3, height, width): halved while possible, scaled to cover it, the centre cut out.

    As ADM (Dhariwal and Nichol 2021) does, whose statistics others compare with. Of a picture that
    is many times as long as wide, the centre is cut out before it is scaled: memory is ordinary.
    """
    width = width or height
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.BOX)
    scale = max(width / picture.width, height / picture.height)
    long_w, long_h = math.ceil(8 * width / scale), math.ceil(8 * height / scale)
    if picture.width > long_w or picture.height > long_h:
        w, h = min(picture.width, long_w), min(picture.height, long_h)
        left, top = (picture.width - w) // 2, (picture.height - h) // 2
        picture = picture.crop((left, top, left + w, top + h))
    w, h = (round(s * scale) for s in picture.size)
    left, top = (w - width) // 2, (h - height) // 2
    picture = picture.resize((w, h), Image.BICUBIC).crop((left, top, left + width, top + height))
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def open_cropped(entry: Entry, size) -> np.ndarray:
    """uint8 (3, *size). ValueError if it cannot be decoded."""
    return crop(open_picture(io.BytesIO(entry.read())), *size)


def find_splits(names: list[str]) -> tuple[bool, bool]:
    """Whether folders are splits of a set, such as train and val; and whether any name has a word of
    one, such as trainA or X_test_HR. Half of them do for splits, and of two kinds; or all do."""
    words = [{word.lower() for word in WORD.findall(name)} & SPLITS for name in names]
    kinds = {word[:2] for word in set().union(*words)}  # tr(aining), va(lidation), de(v), te(sting)
    half = 2 * sum(map(bool, words)) >= len(names)
    return (len(kinds) > 1 and half) or (len(names) > 1 and all(words)), any(words)


def label_pictures(root, pictures: list[Entry]) -> tuple[list[str], np.ndarray]:
    """Sorted class names and each picture's label: the first folder that differs."""
    paths, depth = [p.name.split("/") for p in pictures], 0
    while all(len(p) > depth + 2 and p[depth] == paths[0][depth] for p in paths):
        depth += 1
    flat = ["/".join(p) for p in paths if len(p) == depth + 1]
    if len(flat) == len(paths):
        return ["pictures"], np.zeros(len(paths), np.int64)
    require(not flat, f"{root}: {flat[:1]} lies beside the class folders; move it into one")
    classes, labels = np.unique([path[depth] for path in paths], return_inverse=True)
    splits, words = find_splits(classes.tolist())
    shown = printable(", ".join(classes[:4]))
    require(not splits, f"{root}: the folders {shown} are splits of a set, not classes; give one of "
            f"them, such as {Path(root, *paths[0][:depth], classes[0])}")  # fmt: skip
    numbered = all(re.fullmatch(r"(part|shard)?\W?\d{4,}", name.lower()) for name in classes.tolist())
    if len(classes) > 1 and (numbered or words):
        note(f"{root}: are {shown} classes? Folders of such names are often parts of one set")
    return [printable(name) for name in classes.tolist()], labels


def parse_caption(line: str) -> tuple[str, list[str]]:
    """A line of captions.jsonl {image_file, captions} or metadata.jsonl {file_name, text}."""
    record = json.loads(line)
    name = record["file_name"] if "file_name" in record else record["image_file"]
    texts = record["captions"] if "captions" in record else record["text"]
    texts = [texts] if isinstance(texts, str) else texts
    if not (texts and isinstance(texts, list) and all(isinstance(t, str) for t in [name, *texts])):
        raise ValueError("the name must be a string, the captions a string or a list of some")
    "".join(texts).encode()  # ValueError: half a surrogate pair
    return name, texts


def read_captions(raw: bytes, file: str) -> dict[str, list[str]]:
    """Lines of captions as {picture: captions}; lines of one picture add up. UserError for the
    first line that is not one."""
    found = {}
    for n, line in enumerate(read_text(raw, file).split("\n"), 1):  # splitlines() cuts at U+2028
        if line.strip():
            rule = f'{file}, line {n}: not of the form {{"image_file": "a.png", "captions": ["a text"]}}'
            with explain((ValueError, KeyError, TypeError), f"{rule}; mend or remove it"):
                name, texts = parse_caption(line)
            found.setdefault(name, []).extend(texts)
    require(found, f"{file}: it is empty; write a line per picture")
    return found


def without_empty(root, captions: dict[str, list[str]]) -> dict[str, list[str]]:
    """Pictures with captions that say something; the others are named by their number."""
    kept = {name: [t for t in texts if t.strip()] for name, texts in captions.items()}
    empty = [name for name, texts in kept.items() if len(texts) < len(captions[name])]
    if empty:
        note(f"{root}: empty captions of {len(empty)} pictures are left out, such as of {printable(empty[0])}")
    return {name: texts for name, texts in kept.items() if texts}


def find_captions(root, pictures, others) -> tuple[dict[str, list[str]], list[Entry]]:
    """{picture: captions} of the first source that exists: captions.jsonl, metadata.jsonl, NAME.txt
    beside NAME.jpg; and the other files that are left."""
    tables = sorted(f for f in others if f.name in ("captions.jsonl", "metadata.jsonl"))
    if tables:
        table, known = tables[0], {p.name for p in pictures}
        found = read_captions(table.read(), table.file)
        absent = [name for name in found if name not in known]
        require(len(absent) < len(found), f"{table.file} names none of the pictures, but {absent[:3]}; "
                "names are relative to its folder")  # fmt: skip
        if absent:
            note(f"{table.file}: {len(absent)} of its names are no picture there, such as {absent[0]!r}")
        return without_empty(root, found), [f for f in others if f != table]
    stems = {os.path.splitext(p.name)[0]: p.name for p in pictures}
    beside = [f for f in others if f.name.lower().endswith(".txt") and f.name[:-4] in stems]
    read = lambda f: read_text(f.read(), f"{root}/{f.name}").strip()
    texts = {stems[f.name[:-4]]: [text] for f, text in zip(beside, in_threads(read, beside, 16))}
    texts = without_empty(root, texts)
    require(len(texts) == 0 or 2 * len(texts) >= len(pictures), f"{root}: texts lie beside "
            f"{len(texts)} of {len(pictures)} pictures, too few for captions; remove them, or the "
            "pictures without one")  # fmt: skip
    words = any(re.search(r"[^\W\d_]", text) for (text,) in texts.values())
    require(words or not texts, f"{root}: the texts beside the pictures are numbers, no captions "
            "(boxes of objects?); remove them")  # fmt: skip
    return texts, sorted(set(others) - set(beside))


class Found(NamedTuple):
    """Pictures with classes and labels (n,), or with captions, then labels are 0 to n - 1."""

    pictures: list[Entry]
    classes: list[str]
    labels: np.ndarray
    captions: list[list[str]]

    def digest(self, *more) -> str:
        """16 hex digits of names, sizes, labels and captions, wherever they lie."""
        sizes = [os.stat(p.file).st_size for p in self.pictures]
        names = [p.name for p in self.pictures]
        return digest(names, sizes, self.labels.tolist(), self.classes, self.captions, more)


def find_pictures(root) -> Found:
    """The pictures of a folder. If any has a caption, those without are left out, with a
    note; so is all that is not read. UserError where labels lie there in another form."""
    pictures, others = list_pictures(root)
    for file in others:
        folder, _, name = file.name.rpartition("/")
        labels = name == "dataset.json" or name.endswith(".cls")
        require(not labels, f"{root}: the labels are in {name}, which is not read; move the pictures "
                "into a folder per class")  # fmt: skip
        table = folder and name in ("captions.jsonl", "metadata.jsonl")
        require(not table, f"{root}: the captions are in {file.name}; give {Path(root, folder)}, or write "
                "one captions.jsonl for the whole folder")  # fmt: skip
    texts, others = find_captions(root, pictures, others)
    say_unread(root, others)
    if not texts:
        return Found(pictures, *label_pictures(root, pictures), [])
    kept = [p for p in pictures if p.name in texts]
    mute = [p.name for p in pictures if p.name not in texts]
    if mute:
        note(f"{root}: {len(mute)} of {len(pictures)} pictures have no text and are left out, such as "
             f"{printable(mute[0])}")  # fmt: skip
    return Found(kept, [], np.arange(len(kept)), [texts[p.name] for p in kept])


# --- Data sets ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """What a network must know of its data. It is stored in checkpoints."""

    kind: str  # "pixels" or "latents"
    shape: tuple[int, ...]  # (C, H, W)
    mean: float = 0.0  # network space is (stored - mean) / std, of pixels and of latents
    std: float = 1.0
    classes: tuple[str, ...] = ()
    autoencoder: str = ""
    factor: int = 1  # pixels per latent position and side
    buckets: tuple[tuple[int, int], ...] = ()  # (H, W) of a native set, in network space
    text: dict | None = None  # encoder, length, width
    prompts: tuple[str, ...] = ()  # for sample grids

    def to_json(self) -> dict:
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_json(record: dict) -> "Spec":
        values = {f.name: record[f.name] for f in fields(Spec) if f.name in record}
        for key in ("shape", "classes", "prompts"):
            values[key] = tuple(values.get(key, ()))
        values["buckets"] = tuple(tuple(size) for size in values.get("buckets", ()))
        if "scale" in record and record["kind"] == "latents":  # as the second edition wrote it
            values |= {"mean": record.get("shift", 0.0), "std": 1 / record["scale"]}
        return Spec(**values)


class Captions:
    """The texts of picture i, captions[i], are a line of JSON, read where it lies: in memory or in
    a mapped file. lines: uint8; offsets: (n + 1,) of the lines."""

    def __init__(self, lines: np.ndarray, offsets: np.ndarray):
        self.lines, self.offsets = lines, offsets

    @staticmethod
    def of(lists: list[list[str]]) -> "Captions":
        lines = [json.dumps({"captions": texts}).encode() + b"\n" for texts in lists]
        offsets = np.cumsum([0, *map(len, lines)])
        return Captions(np.frombuffer(b"".join(lines), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> list[str]:
        return json.loads(bytes(self.lines[self.offsets[i] : self.offsets[i + 1]]))["captions"]

    @property
    def texts(self) -> list[str]:
        """All of them, in order: of a small set."""
        return [text for i in range(len(self)) for text in self[i]]


class Batch(NamedTuple):
    """Rows as they are stored, and their classes or one caption of each."""

    x: Tensor  # (B, C, H, W), uint8 pixels, or float16 latents: C means, or C means, C deviations
    y: Tensor | list[str]
    pixels: Tensor | None = None  # (B, 3, H, W) uint8, of the pictures behind latents


@dataclass
class DataSet:
    """Arrays and a record. Rows are numbered through all arrays, of which there is one a size: with
    arrays of 3 and 2 pictures (starts 0, 3, 5), row 4 is arrays[1][1]. Where row 1 is left out, picture
    2 of the set is row 3: rows are 0, 2, 3, 4, an index counts in them, labels are of rows."""

    spec: Spec
    arrays: list[np.ndarray]  # each (n, C, H, W), or (n, 2, C, H, W) of picture and mirror image
    labels: np.ndarray  # (n,) class, or number of the captions; -1: the row is left out
    captions: Captions | None
    mirror: bool  # half of the pictures are read as their mirror images
    fingerprint: str  # of what the set holds, wherever it lies
    pixels: list[np.ndarray] | None = None  # uint8 (n, 3, H, W), with --pixels

    def __post_init__(self):
        self.labels = np.asarray(self.labels, np.int64)
        self.starts = np.cumsum([0, *map(len, self.arrays)])
        self.rows = np.flatnonzero(self.labels >= 0)
        ends = np.searchsorted(self.rows, self.starts).tolist()
        self.buckets = [range(a, b) for a, b in zip(ends, ends[1:])]  # indices of one size each

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices, rng: np.random.Generator) -> Batch:
        """Pictures of one size, each as it is or mirrored, each with one of its captions."""
        rows = self.rows[indices]
        k = int(np.searchsorted(self.starts, rows[0], side="right")) - 1
        inside, flip = rows - self.starts[k], rng.integers(2, size=len(rows)) * self.mirror
        sources = [self.arrays[k], self.pixels[k]] if self.pixels else [self.arrays[k]]
        x, *pixels = (torch.from_numpy(pick_views(array, inside, flip)) for array in sources)
        labels = self.labels[rows]
        if self.captions is None:
            return Batch(x, torch.from_numpy(labels), *pixels)
        texts = [self.captions[i] for i in labels.tolist()]
        return Batch(x, [t[rng.integers(len(t))] for t in texts], *pixels)

    def describe(self) -> str:
        """One line: the number of pictures, those left out, and their classes or captions."""
        out = len(self.labels) - len(self.rows)
        number = f"{len(self):,} pictures" + (f" ({out:,} left out)" if out else "")
        if self.captions is not None:
            return f"{number} with captions"
        classes = self.spec.classes
        counts = np.bincount(self.labels[self.rows], minlength=len(classes))
        shown = ", ".join(f"{name} {n:,}" for name, n in zip(classes[:10], counts))
        more = ", ..." if len(classes) > 10 else ""
        return f"{number} of {len(classes)} classes: {shown}{more}"


def pick_views(array: np.ndarray, rows: np.ndarray, flip: np.ndarray) -> np.ndarray:
    """Rows of an array, mirrored where flip is 1: stored so, or turned here."""
    if array.ndim == 5:
        return array[rows, flip]
    x = array[rows]
    x[flip == 1] = x[flip == 1][..., ::-1]
    return x


def network_space(x: Tensor, spec: Spec, rng: torch.Generator) -> Tensor:
    """Stored rows (B, ...) on any device -> float32 (B, C, H, W), mean 0, deviation about 1; drawn
    from the posterior where its deviation is stored."""
    x = x.float()
    if x.shape[1] == 2 * spec.shape[0] and spec.kind == "latents":
        mean, std = x.chunk(2, 1)
        x = mean + std * torch.randn(mean.shape, generator=rng, device=x.device)
    return (x - spec.mean) / spec.std


def in_memory(pixels, labels, classes=(), captions=None, mirror=False, prompts=()) -> DataSet:
    """uint8 (n, C, H, W) as a data set, with captions as a list of texts per picture."""
    some = pixels[:: max(1, len(pixels) // 10000)]
    mean, std = float(some.mean()), float(some.std()) or 1.0
    spec = Spec("pixels", pixels.shape[1:], mean, std, tuple(classes), prompts=prompts)
    labels = np.asarray(labels, np.int64)
    content = digest(pixels.tobytes(), labels.tobytes(), list(classes), captions)
    return DataSet(spec, [pixels], labels, captions and Captions.of(captions), mirror, content)


def open_demo() -> DataSet:
    """The first 10,000 training pictures of Fashion-MNIST, in the repository as one PNG."""
    info = read_json(DEMO / "fashion.json")
    sprite = np.asarray(Image.open(DEMO / "fashion.png")).reshape(100, 28, 100, 28)
    pixels = sprite.transpose(0, 2, 1, 3).reshape(10000, 1, 28, 28)
    return in_memory(pixels, [int(digit) for digit in info["labels"]], info["classes"])


def open_emoji(held_out: bool = False) -> DataSet:
    """1,600 Noto emoji, 32 x 32, captioned with their names, less those held out; or only those."""
    info = read_json(DEMO / "emoji.json")
    names = [name for name, *_ in info["name, emoji, group"]]
    kept = [i for i, name in enumerate(names) if (name in info["held_out"]) == held_out]
    sprite = np.asarray(Image.open(DEMO / "emoji.png")).reshape(25, 32, 64, 32, 3)
    pixels = sprite.transpose(0, 2, 4, 1, 3).reshape(1600, 3, 32, 32)[kept]
    prompts = ("red apple", "blue heart", "sun", "cat face", "panda")
    prompts += ("orange heart", "purple circle", "green square")
    captions = [[names[i]] for i in kept]
    return in_memory(pixels, range(len(kept)), captions=captions, prompts=prompts)


def open_torchvision(name: str) -> DataSet:
    """fashion, mnist, cifar10 or cifar100 from datasets/, downloaded there the first time."""
    from torchvision import datasets

    kind, cifar = getattr(datasets, TORCHVISION[name]), name.startswith("cifar")
    files = [kind.filename] if cifar else [file for file, _ in kind.resources]
    folder = PREPARED if cifar else PREPARED / kind.__name__ / "raw"
    way = f"connect to the network once, or put {', '.join(files)} into {folder}"
    if not cifar:
        way += ", unpacked: the .gz of another packer have other checksums"
    fetch = partial(kind, str(PREPARED), train=True)

    def download():
        with explain(Exception, f"--data {name}: not available; {way}"):  # of the network or the disk
            fetch(download=True)

    first_rank(download)
    source = fetch()
    labels = torch.as_tensor(source.targets).numpy()
    if cifar:
        pixels = np.ascontiguousarray(source.data.transpose(0, 3, 1, 2))
        return in_memory(pixels, labels, source.classes, mirror=True)
    classes = read_json(DEMO / "fashion.json")["classes"] if name == "fashion" else "0123456789"
    return in_memory(source.data.numpy()[:, None], labels, classes)


SETS = {"demo": open_demo, "emoji": open_emoji}
SETS |= {name: partial(open_torchvision, name) for name in TORCHVISION}


def random_data(shape, classes: int) -> DataSet:
    """Noise, to run a preset without data; with captions if there are no classes."""
    require(all(shape), "--data random: give --channels, --side, and --classes if not captions")
    n, source = 1024, np.random.default_rng(0)
    x = 128 + 40 * source.standard_normal((n, *shape), np.float32)
    captions = [[f"picture {i}, take {k} " + "noise " * (i % 64) for k in range(8)] for i in range(n)]
    spec = Spec("pixels", tuple(shape), 128.0, 40.0, tuple(str(i) for i in range(classes)))
    labels = np.arange(n) % (classes or n)
    return DataSet(spec, [x], labels, None if classes else Captions.of(captions), False, "random")


def open_prepared(folder: Path) -> DataSet:
    """A set that `prepare` wrote, memory-mapped. Those of classes are mirrored; captions may tell
    left from right."""
    meta = read_json(folder / "meta.json")
    require("sizes" in meta, f"{folder}: a set of the second edition of this project; prepare it again")
    with explain((OSError, ValueError), f"{folder}: not a whole set; delete it and prepare it again"):
        open_all = lambda name: [
            np.load(folder / f"{name}_{h}x{w}.npy", mmap_mode="r") for h, w in meta["sizes"]
        ]
        arrays, labels = open_all("x"), np.load(folder / "labels.npy")
        pixels, captions = open_all("pixels") if meta["pixels"] else None, None
        if meta["captions"]:
            lines = np.memmap(folder / "captions.jsonl", np.uint8, "r")
            captions = Captions(lines, np.load(folder / "offsets.npy", mmap_mode="r"))
    spec = Spec.from_json(meta["spec"])
    return DataSet(spec, arrays, labels, captions, not captions, meta["fingerprint"], pixels)


def open_data(path: str, side: int = 0, mirror: bool | None = None) -> DataSet:
    """A data set by name or path; all ranks call it.

    path    a name in SETS; a folder that `prepare` wrote; or a folder of pictures, in a folder
            per class or with captions (see `find_captions`), which is prepared once
    side    of pictures in files, after the centre crop (default 64)
    mirror  half of them as mirror images; None: those of CIFAR and of class folders
    """
    folder = Path(path).expanduser()
    if path in SETS:
        found = SETS[path]()
    elif path and first_rank((folder / "plan.json").is_file):
        require((folder / "meta.json").is_file(), f"--data {path}: preparing it has not ended; run "
                "the same `data.py prepare` again")  # fmt: skip
        found = open_prepared(folder)
    else:
        there = path and folder.is_dir()
        first_rank(require, there, f"--data {path}: no such folder; give one, or one of {', '.join(SETS)}")
        found = open_prepared(prepare_folder(folder, side or 64))
    if mirror is not None:
        found.mirror = mirror
    n = len(found.spec.classes)
    require(len(found), f"--data {path}: no picture of it could be opened; prepare others")
    require(not n or found.labels.max() < n, f"--data {path}: a label beyond the {n} classes")
    return found


def check_fits(spec: Spec, channels=0, side=0, classes=0, autoencoder="") -> None:
    """UserError where the data differ from what is asked for; 0 and "" ask for nothing."""
    asked = {"channels": channels, "height": side, "width": side, "classes": classes,
             "autoencoder": autoencoder}  # fmt: skip
    found = *spec.shape, len(spec.classes), spec.autoencoder
    for (name, value), theirs in zip(asked.items(), found):
        require(not value or value == theirs, f"the data have {name} {theirs}, the configuration asks "
                f"for {value}; change either")  # fmt: skip


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


def native_sizes(dataset: DataSet, batch: int, patch: int) -> tuple[int, ...]:
    """How many pictures of each bucket have at most as many tokens as `batch` of spec.shape."""
    budget = batch * math.prod(side // patch for side in dataset.spec.shape[1:])
    tokens = [math.prod(side // patch for side in size) for size in dataset.spec.buckets]
    return tuple(min(len(bucket), max(1, budget // n)) for bucket, n in zip(dataset.buckets, tokens))


def batches(dataset: DataSet, batch: int, seed: int, slots: list[int], of: int, start=0, patch=1):
    """Endless stream of `Batch`, one per step and slot, from step `start` on, read in threads.

    batch  pictures; of a native set, as many as have the tokens of `batch` of spec.shape at most
    slots  the micro-batches of this process in a step; `of` is their number over all processes
    """
    full = [k for k, bucket in enumerate(dataset.buckets) if len(bucket)]  # of others all is left out
    buckets, sizes = tuple(dataset.buckets[k] for k in full), ()
    if dataset.spec.buckets:
        sizes = tuple(native_sizes(dataset, batch, patch)[k] for k in full)
    per_epoch = sum(len(bucket) // size for bucket, size in zip(buckets, sizes))

    def read(place):
        step, slot = place
        rng = np.random.default_rng((seed, step, slot))
        if not sizes:
            return dataset.read(picture_indices(len(dataset), batch, seed, step, slot, of), rng)
        k = step * of + slot
        return dataset.read(epoch_batches(buckets, sizes, seed, k // per_epoch)[k % per_epoch], rng)

    return in_threads(read, ((step, slot) for step in count(start) for slot in slots), 4, ahead=4)


# --- Conditions: classes and captions as the network takes them -----------------------------------


def load_pretrained(library: str, kind: str, option: str, path: str):
    """library.kind.from_pretrained(path). UserError that says what to install or to give."""
    way = "give a folder or hub name, as of hf download NAME --local-dir FOLDER"
    absent = str(path).startswith((".", "/", "~")) and not os.path.isdir(path)
    require(not absent, f"{option}: there is no such folder; {way}")
    with explain(ImportError, f"{option} needs {library}: pip install {library}"):
        package = importlib.import_module(library)
    package.utils.logging.set_verbosity_error()
    package.utils.logging.disable_progress_bar()
    with explain(Exception, f"{option}: does not load; {way}"):  # errors of hub and files share no type
        return getattr(package, kind).from_pretrained(path)


def load_network(library: str, option: str, path: str, device="cpu", dtype=torch.float32):
    """A pretrained network of diffusers or transformers, frozen."""
    network = load_pretrained(library, "AutoModel", option, path)
    return network.to(device, dtype).eval().requires_grad_(False)


@lru_cache(maxsize=2**16)
def hash_word(word: str) -> np.ndarray:
    """A fixed normal vector (width,): a quarter of its variance is the word's own, the rest that of
    its runs of 3 bytes, so words of similar spelling are close."""
    raw = f"<{word}>".encode()
    pieces = [raw] + [raw[i : i + 3] for i in range(min(max(1, len(raw) - 2), 64))]
    hashes = [hashlib.shake_256(piece).digest(2 * HASHES["width"]) for piece in pieces]
    bits = np.stack([np.frombuffer(h, "<u2") for h in hashes]).astype(np.float64)
    v = torch.special.ndtri(torch.from_numpy((bits + 0.5) / 65536)).float().numpy()
    return 0.25**0.5 * v[0] + (0.75 / len(v[1:])) ** 0.5 * v[1:].sum(0)


class WordHashes:
    """The text encoder "word_hashes", without weights: a start mark, then a hash of each word."""

    spec = HASHES

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        most = HASHES["length"] - 1
        lists = [["", *re.findall(r"\w+|[^\w\s]", text.casefold())[:most]] for text in captions]
        length = np.array([len(words) for words in lists])
        features = np.zeros((len(lists), length.max(), HASHES["width"]), np.float32)
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
    """`WordHashes`, or the `TextEncoder` of a folder or hub name; both have `.spec`."""
    if name in ("word_hashes", "bytes"):  # its name in the second edition
        require(not pad_to_length, f"the encoder {name!r} needs --caption_mask, its padding is hidden")
        return WordHashes()
    option, path = f"--text_encoder {name}", os.path.abspath(name) if os.path.isdir(name) else name
    net = load_network("transformers", option, path, device, pick_dtype(torch.device(device)))
    tokenizer = load_pretrained("transformers", "AutoTokenizer", option, path)
    kinds = AttributeError, TypeError, ValueError, RuntimeError
    with explain(kinds, f"{option}: not a model of text; give another, such as {GEMMA}"):
        return TextEncoder(path, net, tokenizer, length, pad_to_length)


class ClassConditions:
    """Class numbers as the network takes them; the number after the last stands for no class."""

    def __init__(self, classes: int, device):
        self.classes, self.device = classes, device

    def __call__(self, numbers) -> tuple[Tensor, Tensor]:
        """y and null, (B,) int64 each, of class numbers (B,); -1 is no class."""
        y = to_device(torch.as_tensor(numbers), self.device)
        null = torch.full_like(y, self.classes)
        return torch.where(y < 0, null, y), null


class TextConditions:
    """Captions as the network takes them: features (B, L, F) and a mask (B, L), L of the longest.

    known     texts of a small set, encoded once, here; without them a batch's are, when it is asked
    multiple  L is a multiple of it: compiled code wants few different lengths
    """

    def __init__(self, encoder, device, known=(), multiple: int = 1):
        self.encoder, self.device, self.multiple = encoder, device, multiple
        self.rows, self.table = {}, ()
        if known:
            self.rows, self.table = self.encode(known)
            self.encoder = None  # frees its memory

    def encode(self, texts) -> tuple[dict, tuple[Tensor, Tensor]]:
        """{text: row}, and the rows: features, mask. The first is of the empty text."""
        rows = {text: k for k, text in enumerate(dict.fromkeys(["", *texts]))}
        features, mask = self.encoder(list(rows))
        padding = -mask.shape[1] % self.multiple
        features, mask = F.pad(features, (0, 0, 0, padding)), F.pad(mask, (0, padding))
        return rows, (to_device(features, self.device), to_device(mask, self.device))

    def __call__(self, texts: list[str]) -> tuple:
        """y and null, each (features, mask), of texts; the empty text is null, too."""
        rows, table = (self.rows, self.table) if self.rows else self.encode(texts)
        index = to_device(torch.tensor([rows[text] for text in texts]), self.device)
        y = tuple(part[index] for part in table)
        return y, tuple(part[index * 0] for part in table)


def open_conditions(spec: Spec, device, pad_to_length: bool, encoder: str | None = None, known=()):
    """What makes conditions of class numbers, or of texts, `known` ones encoded here if they are few.
    encoder: folder or hub name, where that of the spec is elsewhere."""
    if not spec.text:
        return ClassConditions(len(spec.classes), device)
    name, width = encoder or spec.text["encoder"], spec.text["width"]
    net = load_text_encoder(name, device, spec.text["length"], pad_to_length)
    require(net.spec["width"] == width, f"--text_encoder {name}: features are {net.spec['width']} wide, "
            f"the network was trained with {width} of {spec.text['encoder']}")  # fmt: skip
    return TextConditions(net, device, known if len(known) <= TABLE else ())


# --- Autoencoders and image encoders --------------------------------------------------------------


def load_autoencoder(name: str, device="cpu", dtype=torch.float32):
    """An autoencoder, and its part of a `Spec`: latents are (z - mean) / std in network space."""
    local = os.path.abspath(name) if os.path.isdir(name) else name
    path, scale, *_ = AUTOENCODERS.get(name, (local, 0.0))
    vae = load_network("diffusers", f"--autoencoder {name}", path, device, dtype)
    factor = getattr(vae, "spatial_compression_ratio", 0)
    factor = factor or 2 ** (len(vae.config["block_out_channels"]) - 1)
    scale, shift = scale or vae.config["scaling_factor"], vae.config.get("shift_factor") or 0.0
    name = name if name in AUTOENCODERS else path
    return vae, {"autoencoder": name, "std": 1 / scale, "mean": shift, "factor": factor}


@torch.no_grad()
def encode_pictures(vae, means: bool, x: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float16 (B, 2, C or 2 C, h, w), not scaled: of picture and mirror
    image, the posterior's mean and standard deviation, or the mean alone."""
    x = (x.to(vae.device).float() / 127.5 - 1).to(vae.dtype)
    out = vae.encode(torch.cat([x, x.flip(3)]))
    if "latent" in out:
        z = out.latent  # DC-AE has no posterior
    else:
        p = out.latent_dist
        z = p.mean if means else torch.cat([p.mean, (p.logvar.float() / 2).exp()], 1)
    return z.half().unflatten(0, (2, -1)).transpose(0, 1)


@torch.no_grad()
def encode_features(net, pixels: Tensor, tokens: tuple[int, int]) -> Tensor:
    """uint8 (B, 3, H, W), resized to (h, w) patches of an image encoder, DINOv2 or RADIO -> its
    tokens (B, h w, F) float32, without class token and registers."""
    size = tuple(side * net.config.patch_size for side in tokens)
    x = pixels.to(net.device).float() / 255
    x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
    if not hasattr(net.config, "norm_mean"):  # RADIO normalises by itself
        mean, std = torch.tensor(IMAGENET, device=x.device).view(2, 3, 1, 1)
        x = (x - mean) / std
    out = net(x.to(net.dtype))
    found = getattr(out, "features", None)  # RADIO's
    found = out.last_hidden_state if found is None else found
    return found[:, -math.prod(tokens) :].float()


# --- Back to pictures -----------------------------------------------------------------------------


def to_pixels(x: Tensor, mean: float, std: float) -> np.ndarray:
    """(B, C, H, W) -> uint8 (B, H, W, 1 or 3), the first channels."""
    x = (x[:, : 3 if x.shape[1] >= 3 else 1] * std + mean).round().clamp(0, 255)
    return x.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


class Decoder:
    """Network space (B, C, h, w) -> uint8 pictures (B, H, W, C), `.factor` times as high and wide.

    Latents are decoded in float32, in tiles if the picture has more than TILED pixels.
    autoencoder: a path to load instead of the spec's.
    """

    def __init__(self, spec: Spec, device="cpu", autoencoder: str | None = None):
        self.spec, self.device, self.vae, self.factor = spec, device, None, 1
        if spec.kind != "latents":
            return
        path, channels = autoencoder or spec.autoencoder, spec.shape[0]
        require(path, f"{channels} channels: no autoencoder is known; give --autoencoder")
        self.vae, known = load_autoencoder(path, device)
        self.factor, have = known["factor"], self.vae.config["latent_channels"]
        require(have == channels, f"--autoencoder {path} has {have} channels, the latents {channels}; "
                f"they were made with {spec.autoencoder}")  # fmt: skip

    @torch.no_grad()
    def __call__(self, x: Tensor) -> np.ndarray:
        if self.spec.kind == "pixels":
            return to_pixels(x, self.spec.mean, self.spec.std)
        z = x.to(self.device, torch.float32) * self.spec.std + self.spec.mean
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
    """uint8 (R, C, H, W, K) as one picture with white gaps, each pixel `scale` wide; below, names
    of columns, or of each picture (R C of them); at the left, names of rows."""
    r, c, h, w, k = rows.shape
    per_picture = len(names) == r * c and r > 1  # a strip of names below every row
    h, w, gap = h * scale, w * scale, gap * scale
    wrap = lambda name, width: textwrap.wrap(printable(name)[:200], max(1, width // 6))[:4]
    left, below = 64 if row_names else 0, 14 * max((len(wrap(name, w)) for name in names), default=0)
    stride = h + gap + (below if per_picture else 0)
    size = left + c * (w + gap) - gap, r * stride - gap + (0 if per_picture else below)
    sheet = Image.new("L" if k == 1 else "RGB", size, "white")
    for i, j in np.ndindex(r, c):
        picture = to_image(rows[i, j]).resize((w, h), Image.NEAREST)
        sheet.paste(picture, (left + j * (w + gap), i * stride))
    labels = [(name, left, h, 0, i * stride) for i, name in enumerate(row_names)]
    for n, name in enumerate(names):
        row = n // c if per_picture else r - 1
        labels.append((name, w, below, left + n % c * (w + gap), row * stride + h))
    for name, width, height, x, y in labels:  # wrapped, and cut at the edges of its cell
        cell = Image.new(sheet.mode, (width, height), "white")
        text, font = "\n".join(wrap(name, width)), ImageFont.load_default(11)
        ImageDraw.Draw(cell).multiline_text((1, 1), text, "black", font, spacing=2)
        sheet.paste(cell, (x, y))
    return sheet


def write_picture(picture, path) -> None:
    """uint8 (H, W, C) or a PIL image as PNG, or JPEG if the name says so; complete or not there."""
    image = picture if isinstance(picture, Image.Image) else to_image(picture)
    jpeg = Path(path).suffix.lower() in (".jpg", ".jpeg")
    with replacing(path) as temporary:
        image.save(temporary, "JPEG" if jpeg else "PNG", quality=95)


def plot(path, curves: dict, **axes_settings) -> None:
    """{name: points (x, y)} as lines, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say(f"{path} is not drawn: that needs matplotlib")
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points) or [(1, math.nan)]), ".-", label=name)
    axes.set(**axes_settings)
    axes.legend()
    figure.savefig(path, dpi=120)


# --- The command: prepare -------------------------------------------------------------------------


@dataclass(frozen=True)
class PrepareConfig:
    """The flags of `data.py prepare`."""

    images: str = flag("", "folder of pictures: class folders, or with captions", required=True)
    out: str = flag("", "folder of the set", required=True)
    autoencoder: str = flag("", "store latents of sd-vae, dc-ae, a folder or hub name, not pixels")
    means: bool = flag(False, "store the posterior's mean only")
    pixels: bool = flag(False, "also keep the pixels behind the latents, for train.py --align")
    native: bool = flag(False, "keep aspect ratios, in buckets")
    upscale: bool = flag(False, "enlarge what is below the smallest size")
    size: tuple = flag((), "pixels per side (default 64, of latents 256); --native: of squares of "
        "the buckets' areas", positive_int, nargs="+")
    patch: int = flag(1, "of the network to come: sizes are multiples of it", positive_int)
    batch: int = flag(64, "pictures per pass of the autoencoder", positive_int)
    workers: int = flag(0, "threads per rank that decode pictures; 0 = its share of the cores", natural)
    device: str = flag("auto", "auto, cpu, cuda, mps")
    precision: str = flag("fp32", "of the autoencoder", choices=("auto", "fp32", "bf16"))  # fmt: skip


def bucket_sizes(side: int, multiple: int) -> list[tuple[int, int]]:
    """At most 33 (height, width), from wide to tall: multiples of `multiple` of ratios up to 1:4, whose
    area is that of the square or a little less."""
    n = side // multiple
    short = {round(h) for h in np.geomspace(n / 2, n, 17)} - {0}
    sizes = {(h, min(4 * h, n * n // h)) for h in short}
    sizes |= {(w, h) for h, w in sizes}
    return sorted(((h * multiple, w * multiple) for h, w in sizes), key=lambda size: size[0] / size[1])


def choose_bucket(size, tables: list, upscale: bool) -> tuple[int, int]:
    """The nearest ratio of the largest area that a picture (height, width) fills as it is. ValueError
    if there is none. tables: `bucket_sizes` from small to large."""
    h, w = size
    if max(h, w) > 4.5 * min(h, w):
        raise ValueError(f"{h}x{w} is beyond the ratios from 1:4 to 4:1")
    nearest = [min(table, key=lambda b: abs(math.log(h / w * b[1] / b[0]))) for table in tables]
    fitting = [b for b in nearest if h >= b[0] and w >= b[1]]
    if not fitting and not upscale:
        raise ValueError("{}x{} is smaller than {}x{}; see --upscale".format(h, w, *nearest[0]))
    return (fitting or nearest[:1])[-1]


def find_bucket(entry: Entry, tables: list, upscale: bool) -> tuple[int, int]:
    """`choose_bucket` of a picture as EXIF turns it; only its header is decoded."""
    with pillow(io.BytesIO(entry.read())) as picture:  # Pillow turns TIFFs by itself
        turned = picture.format != "TIFF" and picture.getexif().get(ORIENTATION, 1) > 4
        size = picture.size if turned else picture.size[::-1]
    return choose_bucket(size, tables, upscale)


def sort_by_size(cfg: PrepareConfig, multiple: int, pictures: list[Entry]) -> tuple[dict, list]:
    """{(height, width): indices} from wide to tall, and (name, reason) of those that fit none."""
    side = max(cfg.size)
    if not cfg.native:
        return {(side, side): list(range(len(pictures)))}, []
    tables = [bucket_sizes(size, multiple) for size in sorted(cfg.size)]
    groups, skipped = {}, []
    find = partial(attempt, find_bucket, tables=tables, upscale=cfg.upscale)
    found = in_threads(find, pictures, cfg.workers)
    for i, (size, why) in enumerate(tqdm(found, "sizes", len(pictures), disable=None)):
        if why:
            skipped.append((pictures[i].name, why))
        else:
            groups.setdefault(size, []).append(i)
    require(groups, f"--images {cfg.images}: no picture fits a bucket; the first: {skipped[:1]}")
    order = sorted(groups, key=lambda size: (size[0] / size[1], size))
    return {size: groups[size] for size in order}, skipped


def make_arrays(out: Path, groups: dict, makers: dict) -> None:
    """An .npy file of zeros per size and maker; each is complete or not there."""
    for (h, w), indices in groups.items():
        for name, make in makers.items():
            path = out / f"{name}_{h}x{w}.npy"
            if not path.is_file():
                row = make(torch.zeros(1, 3, h, w, dtype=torch.uint8)).cpu().numpy()
                shape = len(indices), *row.shape[1:]
                with replacing(path) as temporary:
                    np.lib.format.open_memmap(temporary, "w+", row.dtype, shape).flush()


def fill_chunk(cfg: PrepareConfig, makers: dict, size, first: int, entries: list[Entry]) -> list:
    """Rows `first` and on of the arrays of this size. Plain writes at the rows' offset: a writable
    map, shared between machines, tears pages. Returns [row, name, reason] of what is left out."""
    skipped, (h, w) = [], size
    stream = in_threads(partial(attempt, open_cropped, size=size), entries, cfg.workers, ahead=2 * cfg.batch)
    for k in range(0, len(entries), cfg.batch):
        x = np.zeros((len(entries[k : k + cfg.batch]), 3, h, w), np.uint8)
        for i, (pixels, why) in zip(range(len(x)), stream):  # in this order, or it takes one too many
            if why:
                skipped.append([first + k + i, entries[k + i].name, why])
            else:
                x[i] = pixels
        for name, make in makers.items():
            rows = make(torch.from_numpy(x)).cpu().numpy()
            require(np.isfinite(rows).all(), f"{name} of {entries[k].name} and after overflow float16; "
                    "use another encoder")  # fmt: skip
            path = Path(cfg.out) / f"{name}_{h}x{w}.npy"
            with path.open("r+b") as file:
                file.seek(np.load(path, mmap_mode="r").offset + (first + k) * rows[0].nbytes)
                file.write(np.ascontiguousarray(rows))
                file.flush()
                os.fsync(file.fileno())
    return skipped


def finish(cfg: PrepareConfig, found: Found, groups: dict, spec: Spec, skipped: list) -> None:
    """When all rows are filled: labels, captions, then meta.json. Says what is left out."""
    out, labels = Path(cfg.out), {size: found.labels[indices] for size, indices in groups.items()}
    for mark in sorted((out / "done").glob("*.json")):
        size, left_out = read_json(mark)
        for row, name, why in left_out:
            labels[tuple(size)][row] = -1
            skipped.append([name, why])
    most = max(labels, key=lambda size: (labels[size] >= 0).sum())
    kept = np.flatnonzero(labels[most] >= 0)
    require(len(kept), f"--images {cfg.images}: none of the pictures could be opened, such as {skipped[:1]}")
    if spec.kind == "pixels":  # of pictures spread over all classes
        array = np.load(out / "x_{}x{}.npy".format(*most), mmap_mode="r")
        some = array[kept[spread(len(kept), min(256, len(kept)))]]
        spec = replace(spec, mean=float(some.mean()), std=float(some.std()) or 1.0)
    np.save(out / "labels.npy", np.concatenate(list(labels.values())))
    if found.captions:
        pairs = zip(found.pictures, found.captions)
        lines = [json.dumps({"image_file": p.name, "captions": texts}) + "\n" for p, texts in pairs]
        write_text(out / "captions.jsonl", "".join(lines))
        np.save(out / "offsets.npy", np.cumsum([0, *map(len, lines)]))
    files = ((out / name).read_bytes() for name in ("plan.json", "labels.npy"))
    content = digest(*files, spec.mean, spec.std)  # these tell other pictures of the same names and sizes
    meta = {"spec": spec.to_json(), "sizes": list(groups), "pixels": cfg.pixels, "skipped": skipped,
            "captions": bool(found.captions), "fingerprint": content}
    for leftover in out.glob("*.tmp"):  # of a killed one
        leftover.unlink()
    for file in (*out.glob("*.npy"), out):
        sync(file)
    write_text(out / "meta.json", json.dumps(meta, indent=1))
    shutil.rmtree(out / "done", ignore_errors=True)
    n = len(found.pictures)
    say(f"{out}: {sum((k >= 0).sum() for k in labels.values()):,} of {n:,} pictures")
    if skipped:
        shown = "".join(f"\n  {printable(name)}: {why}" for name, why in skipped[:20])
        note(f"{out}: {len(skipped)} pictures are left out:{shown}")


def prepare(cfg: PrepareConfig, found: Found | None = None) -> None:
    """Pictures to a set. Ranks fill every world_size-th chunk; where it was stopped, it goes on."""
    (rank, world_size), out = ranks(), Path(cfg.out)
    require(Path(cfg.images).is_dir(), f"--images {cfg.images}: no such folder")
    require(not lies_in(out, cfg.images), f"--out {out}: lies in --images {cfg.images}; give a folder "
            "outside of it")  # fmt: skip
    require(cfg.native or len(cfg.size) <= 1, f"--size {cfg.size}: several need --native")
    require(cfg.autoencoder or not cfg.pixels, "--pixels: without --autoencoder the set is of pixels")
    require(max(cfg.size, default=0) <= 2**14, f"--size {cfg.size}: at most {2**14} pixels a side")
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    size = cfg.size or ((256,) if cfg.autoencoder else (64,))
    cfg = replace(cfg, size=size, workers=cfg.workers or max(1, cores))
    as_it_is = lambda pixels: pixels
    makers, vae, factor, channels = {"x": as_it_is}, {}, 1, 3
    if cfg.autoencoder:
        device = open_device(cfg.device)
        net, vae = load_autoencoder(cfg.autoencoder, device, pick_dtype(device, cfg.precision))
        makers = {"x": partial(encode_pictures, net, cfg.means)}
        if cfg.pixels:
            makers["pixels"] = as_it_is
        factor, channels = vae["factor"], net.config["latent_channels"]
    multiple = factor * cfg.patch
    whole = all(side % multiple == 0 for side in size)
    require(whole, f"--size {cfg.size}: must be a multiple of {multiple}, the autoencoder's pixels per "
            "position times --patch")  # fmt: skip

    found = found or first_rank(find_pictures, cfg.images)
    groups, skipped = first_rank(sort_by_size, cfg, multiple, found.pictures)
    free = {"images", "out", "batch", "workers", "device", "autoencoder"}
    plan = {k: v for k, v in asdict(cfg).items() if k not in free} | vae | {"listing": found.digest()}
    first_rank(make_folder, out)
    first_rank(claim, out / "plan.json", plan)
    if first_rank((out / "meta.json").is_file):
        say(f"{out}: complete already")
        return
    sizes = [(h // factor, w // factor) for h, w in groups] if cfg.native else ()
    shape = channels, max(cfg.size) // factor, max(cfg.size) // factor
    kind, classes = "latents" if vae else "pixels", tuple(found.classes)
    spec = Spec(kind, shape, classes=classes, buckets=tuple(sizes), **vae)
    with owning(out), explain(OSError, f"{out}: not written; free the disk and run the same again"):
        first_rank(make_folder, out / "done")
        first_rank(make_arrays, out, groups, makers)
        chunks = [(size, k) for size in groups for k in range(0, len(groups[size]), CHUNK)]
        for k in tqdm(range(rank, len(chunks), world_size), "prepare", disable=True if rank else None):
            (size, first), mark = chunks[k], out / "done" / f"{k:06}.json"
            if not mark.is_file():
                entries = [found.pictures[i] for i in groups[size][first : first + CHUNK]]
                write_text(mark, json.dumps([size, fill_chunk(cfg, makers, size, first, entries)]))
        everyone(None)  # waits for all
        first_rank(finish, cfg, found, groups, spec, skipped)


def prepare_folder(root: Path, side: int) -> Path:
    """Pictures in files as a set of pixels in datasets/, made once; returns its folder."""

    listing = []  # on rank 0

    def name():
        found = find_pictures(root)
        listing.append(found)
        times = [os.stat(p.file).st_mtime_ns for p in found.pictures]
        return PREPARED / f"{printable(root.resolve().stem)}-{found.digest(times, side)}"

    first_rank(require, not lies_in(PREPARED, root), f"--data {root}: holds the working directory, "
               "where it would be prepared; start from another one")  # fmt: skip
    out = first_rank(name)
    if not first_rank((out / "meta.json").is_file):
        say(f"{root}: preparing it as {out}, once")
        prepare(PrepareConfig(images=str(root), out=str(out), size=(side,)), first_rank(listing.pop))
    return out


def main(argv=None):
    style = {"allow_abbrev": False, "formatter_class": argparse.RawTextHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **style)
    commands = parser.add_subparsers(dest="command", required=True)
    add_flags(commands.add_parser("prepare", help="pictures to a set; again = go on", **style), PrepareConfig)
    values = vars(parser.parse_args(argv))
    values.pop("command")
    values["size"] = tuple(values.get("size", ()))
    connect(torch.device("cpu"))
    prepare(PrepareConfig(**values))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    command(main)
