"""From a checkpoint to pictures, in any number of steps.

    python sample.py --steps 1 2 128                          # newest run; a grid, one row per number of steps
    python sample.py --checkpoint runs/demo --num 1000 --steps 8 --out pictures
    python sample.py --checkpoint c2i_model_256.safetensors --steps 1 2 128 --classes 207 360     # released weights
    python sample.py --checkpoint runs/demo --export demo.safetensors
    python sample.py --checkpoint runs/mine --size 1024x1536 --rope_scale ntk --steps 8
    python sample.py --checkpoint runs/emoji --prompts "red apple" "blue heart" --steps 1 8 --guidance 1.5
"""

import argparse
import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import data
from data import UserError
from model import TiM, lower_precision
from transition import TRANSPORTS, Transport, output_from_x, resolution_shift, shift_times, solve, step_coefficients

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save(path: Path, state: dict[str, Tensor], config: dict) -> None:
    """One safetensors file of weights with its configuration in the metadata; complete, or not there."""
    aside = path.with_name(path.name + ".tmp")
    save_file({k: v.contiguous() for k, v in state.items()}, aside, metadata={"tim": json.dumps(config)})
    os.replace(aside, path)


def load(path, device="cpu") -> tuple[TiM, Transport, dict]:
    """The network of a checkpoint, in fp32 and evaluation mode, its transport and its configuration.

    path     a run folder (its newest ema.safetensors), a file that `save` wrote, or a released TiM file, which is
             recognised by its tensors. A projector, which only training uses, is left out.
    returns  model, row, config; config holds "model" (arguments of TiM), "data" (spec), "train" (a plain record) and
             "step". Weights are mapped from the file, not copied, where the device is the CPU.
    raises   UserError if it is missing, cut short, not a TiM checkpoint, or its tensors do not fit, by name.
    """
    path = Path(path)
    file = path / "ema.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"--checkpoint {path}: there is no {file}; train one with `python train.py`, or mend the path")
    state, config = read_tensors(file, device)
    state = {k: v for k, v in state.items() if not k.startswith("projector.")}
    config = config or recognise(state, file)
    try:
        row = TRANSPORTS[config["train"]["transport"]]
        with torch.device("meta"):
            model = TiM(**(config["model"] | dict(projector=None)))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: its configuration is not one of this version ({error}); export it again") from error
    fill(model, state, file)
    return model.eval().requires_grad_(False), row, config


def read_tensors(file: Path, device) -> tuple[dict, dict | None]:
    """Tensors of a .safetensors, or of a .bin or .pt that holds nothing else, and our configuration if it has one."""
    try:
        if file.suffix in (".bin", ".pt", ".pth"):
            state = torch.load(file, map_location=device, weights_only=True, mmap=True)
            if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
                raise UserError(f"{file}: not a plain dictionary of tensors; save the network's state_dict alone")
            return state, None
        with safe_open(file, "pt", device=str(device)) as f:
            state = {k: f.get_tensor(k) for k in f.keys()}
            return state, json.loads((f.metadata() or {}).get("tim", "null"))
    except pickle.UnpicklingError as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{file}: holds more than weights and is not opened ({why}); get a safetensors file") from error
    except (SafetensorError, json.JSONDecodeError, RuntimeError, EOFError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{file}: not a whole file of weights ({why}); copy or download it again") from error


def recognise(state: dict[str, Tensor], file) -> dict:
    """The configuration of a released file, read off its tensors: they all were trained on the row otfm.

    The side of the latents is not in the file: it is 32 for 4 channels (256 px) and 16 for 32 (512 px), as released.
    """
    def size(name, axis):
        if name not in state:
            raise UserError(f"{file}: no {name} in it, so no TiM network; give a file of train.py, --export or TiM's")
        return state[name].shape[axis]

    width, channels, patch = (size("x_embedder.proj.weight", axis) for axis in (0, 1, 2))
    text = "y_embedder.mlp.fc2.weight" in state
    model = dict(
        channels=channels, patch=patch, width=width,
        depth=1 + max((int(k.split(".")[1]) for k in state if k.startswith("blocks.")), default=-1),
        heads=width // size("blocks.0.attn.q_norm.weight", 0),
        adaln=size("blocks.0.adaLN_modulation.fc1_g.weight", 0),
        shared_time=not any(k.startswith("delta_embedder.") for k in state),
        interval_attention=any(k.endswith(".qkv_d.weight") for k in state),
    )  # fmt: skip
    if text:
        model |= dict(caption=size("y_embedder.norm.weight", 0), rope_layout="released", caption_mask=False)
    else:
        model["classes"] = size("y_embedder.embedding_table.weight", 0) - 1
    name, scale = data.BY_CHANNELS.get(channels, ("", 1.0))
    side, guidance, interval = (32, 2.5, (0, 0.6)) if channels == 4 else (16, 3.0, (0, 0.7))
    spec = dict(kind="latents", autoencoder=name, scale=scale, shift=0.0, shape=[channels, side, side])
    spec["classes"] = [str(i) for i in range(model.get("classes", 0))]
    if text:
        spec["text"] = dict(encoder=data.GEMMA, length=256, width=model["caption"])
    train = dict(transport="otfm", guidance=2.5 if text else guidance, interval=(0, 1) if text else interval, drop=0.1)
    return dict(model=model, data=spec, train=train, step=None)


def fill(model: TiM, state: dict[str, Tensor], file) -> None:
    """Put tensors in place of the (meta) weights; refuse missing, unknown and misshapen ones by name."""
    want = model.state_dict()
    faults = [f"missing {k}" for k in want.keys() - state.keys()] + [f"unknown {k}" for k in state.keys() - want.keys()]
    faults += [
        f"{k} {tuple(state[k].shape)} instead of {tuple(want[k].shape)}"
        for k in want.keys() & state.keys()
        if want[k].shape != state[k].shape
    ]
    if faults:
        raise UserError(f"{file} does not fit the network: {'; '.join(sorted(faults)[:5])} ({len(faults)} in all)")
    model.load_state_dict(state, assign=True)


def newest(runs="runs") -> Path:
    found = sorted(Path(runs).glob("*/ema.safetensors"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError(f"no checkpoint under {runs}/; train one with `python train.py`, or give --checkpoint PATH")
    return found[-1].parent


# ---------------------------------------------------------------------------------------------------------------------
# Captions to features


class Texts:
    """Caption numbers to what the network sees of them: (B,) int64 -> features (B, L, F), mask (B, L) bool.

    Of up to data.TABLE captions the features are worked out once, here; of more, `fetch` does so for each coming batch.
    """

    def __init__(self, captions: data.Captions, encode, device, multiple: int = 1):
        self.captions, self.encode, self.device, self.null = captions, encode, device, captions.null
        self.multiple = multiple                                                # of L: compiled code wants few lengths
        self.whole = captions.null <= data.TABLE
        if self.whole:
            self.gather(range(captions.null + 1))
            self.encode = None                                                  # lets go of the encoder

    def fetch(self, y) -> None:
        if not self.whole:
            self.gather(sorted({*y.tolist(), self.null}))

    def gather(self, numbers) -> None:
        slot, texts = {}, [self.captions[i] for i in numbers]
        rows = [slot.setdefault(text, len(slot)) for text in texts]             # equal captions share a row
        self.numbers, self.rows = (torch.tensor(list(v), device=self.device) for v in (numbers, rows))
        features, mask = (v.to(self.device) for v in self.encode(list(slot)))
        more = -mask.shape[1] % self.multiple
        self.features, self.mask = F.pad(features, (0, 0, 0, more)), F.pad(mask, (0, more))

    def __call__(self, y):
        row = self.rows[torch.searchsorted(self.numbers, y)]
        return self.features[row], self.mask[row]


@lru_cache(maxsize=2**16)
def hash_word(word: str) -> np.ndarray:
    """A fixed vector (width,) of normals for a word: a quarter its own, the rest of its runs of 3 bytes, so that like
    words look alike: kernel regression from names to emoji found unseen ones best so."""
    raw = f"<{word}>".encode()
    pieces = [raw] + [raw[i : i + 3] for i in range(min(max(1, len(raw) - 2), 64))]
    bits = [np.frombuffer(hashlib.shake_256(piece).digest(2 * data.BYTES["width"]), "<u2") for piece in pieces]
    v = data.NORMAL[np.stack(bits)]
    return 0.25**0.5 * v[0] + (0.75 / len(v[1:])) ** 0.5 * v[1:].sum(0)


def hash_words(captions: list[str]) -> tuple[Tensor, Tensor]:
    """The encoder without weights: a caption is a mark and its words, each a hash of its letters, whatever its case."""
    lists = [["", *re.findall(r"\w+|[^\w\s]", text.casefold())[: data.BYTES["length"] - 1]] for text in captions]
    length = np.array([len(words) for words in lists])
    features = np.zeros((len(lists), length.max(), data.BYTES["width"]), np.float32)
    for row, words in zip(features, lists):
        row[: len(words)] = [hash_word(word) for word in words]
    return torch.from_numpy(features), torch.from_numpy(np.arange(length.max()) < length[:, None])


def load_text_encoder(name: str, device="cpu", length: int = 256, whole: bool = False):
    """A frozen text encoder: list of str -> features (n, L, F), mask (n, L) bool; and its part of a spec.

    name    "bytes", or a folder or hub name of transformers (an encoder-decoder gives its encoder). The last hidden
            state, in bf16 on GPUs that have it; padded on the right and cut to the longest caption at hand, at most
            `length` tokens; no chat template.
    whole   pad to `length`, so that a network that sees the padding too sees the same whatever else is encoded.
    raises  UserError that says what to install or to download.
    """
    if name == "bytes":
        return hash_words, dict(data.BYTES)
    flag, place = f"--text_encoder {name}", os.path.abspath(name) if os.path.isdir(name) else name
    try:
        if place.startswith((".", "/", "~")) and not os.path.isdir(place):
            raise UserError(f"{flag}: there is no such folder")
        fast = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        net = data.load_network("transformers", flag, place, device, torch.bfloat16 if fast else torch.float32)
        tokenizer = data.load_network("transformers", flag, place, tokenizer=True)
    except UserError as error:
        hub = name if "/" in name.strip("/.") and not os.path.isabs(name) else data.GEMMA
        way = f"pip install transformers, `hf download {hub} --local-dir FOLDER`, then --text_encoder FOLDER"
        raise UserError(f"{error}. {way}; 'bytes' needs nothing, for a network trained with it") from error
    net = net.get_encoder() if net.config.is_encoder_decoder else net
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    length = min(length, tokenizer.model_max_length, getattr(net.config, "max_position_embeddings", length))

    none = "" if tokenizer("")["input_ids"] else tokenizer.pad_token            # some have no mark of the beginning

    @torch.no_grad()
    def encode(captions):
        captions = [text or none for text in captions]
        how = dict(padding="max_length" if whole else True, truncation=True, max_length=length)
        tokens = tokenizer(captions, **how, return_tensors="pt").to(device)
        parts = [{k: v[i : i + 64] for k, v in tokens.items()} for i in range(0, len(captions), 64)]
        return torch.cat([net(**part).last_hidden_state for part in parts]), tokens["attention_mask"].bool()

    try:
        return encode, dict(encoder=place, length=length, width=encode([""])[0].shape[2])
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{flag}: gives no last hidden state of a text ({error}); give a text model") from error


# ---------------------------------------------------------------------------------------------------------------------
# The sampler


def see(model, row, texts=None):
    """The network as the paper writes it, f(x_t, t, r, y): it is shown c_noise(t), c_noise(r), and captions' features
    for their numbers, and its output is f, or the x that f is made of."""
    look = texts or (lambda y: y)

    def f(x_t, t, r, y, aligned=False):
        how = dict(aligned=True) if aligned else {}
        out = model(x_t, row.c_noise(t), row.c_noise(r), look(y), **how)
        if model.predict == "f":
            return out
        out, *tokens = out if aligned else (out,)
        out = output_from_x(row, out, x_t, t)
        return (out, *tokens) if aligned else out

    return f


def initial_noise(shape, seed: int, index, device="cpu", *step: int) -> Tensor:
    """N(0, I), (len(index), *shape) float32. Image i's noise is a function of (seed, i), and of the step if given."""
    return torch.stack([torch.randn(*shape, generator=data.rng(seed, i, *step)) for i in index]).to(device)


def guided(y, null):
    """The condition and then no condition, as one batch of twice the size."""
    return tuple(map(guided, y, null)) if isinstance(y, tuple) else torch.cat([y, null])


@torch.no_grad()
def generate(
    model: TiM, row: Transport, z: Tensor, y, steps, guidance: float = 1.0, interval=(0.0, 1.0), *,
    strict: bool = False, null=None, shift: float = 1.0, stochastic: float = 0.0, local: bool = False,
    noise: Callable[[int], Tensor] | None = None, trace: list | None = None,
) -> Tensor:  # fmt: skip
    """Carry noise to data: x_r = A x_t + B f, once per step.

    z           (B, C, H, W) ~ N(0, I); the state keeps its type (fp32 or fp64), times are worked out in fp64.
    y           condition of the model. null: what stands for none; default the no-class row.
    steps       a number of equal steps in t, or the falling list of times itself, t_max first.
    guidance    g: f = f_null + g (f_cond - f_null), one pass of twice the batch, where t lies in `interval`, given as
                fractions of the row's range, both ends included; `strict` leaves the ends out, as the authors do.
    shift       of the times, see `shift_times`.
    stochastic  s >= 0, otfm only: the share of noise renewed in every step but the first and the last; needs
                noise(k), (B, C, H, W) ~ N(0, I) for step k.
    local       show the network r = t at every step: the ordinary way, for one trained on r = t alone.
    trace       a list that gets (t, r, network evaluations per picture) per step, so NFE is counted, not claimed.
    returns     (B, C, H, W), x at the last time.
    raises      UserError for steps < 1 or times that do not fall within the row's range.
    """
    if isinstance(steps, int):
        if steps < 1:
            raise UserError(f"--steps {steps}: a sample takes at least 1 step")
        times = torch.linspace(row.t_max, row.t_min, steps + 1, dtype=torch.float64)
        times = shift_times(row, times, shift)
    else:
        times = torch.as_tensor(steps, dtype=torch.float64)
        if len(times) < 2 or (times.diff() >= 0).any() or times[0] > row.t_max or times[-1] < row.t_min:
            raise UserError(f"times {times.tolist()} must fall, within [{row.t_min:g}, {row.t_max:g}] of {row.name!r}")
    if stochastic and row.name != "otfm":
        raise UserError(f"--stochastic {stochastic:g} is for the row 'otfm', this network was trained on {row.name!r}")
    if null is None and model.classes is not None:
        null = torch.full_like(y, model.classes)
    low, high = (row.t_min + share * (row.t_max - row.t_min) for share in interval)
    x, net = z * row.sigma(times[0]).to(z), see(model, row)
    for k, (t, r) in enumerate(zip(times[:-1], times[1:])):
        guide = guidance != 1 and (low < t < high if strict else low <= t <= high)
        copies = 2 if guide else 1
        shown = (t, t if local else r)
        seen = (s.float().to(x.device).expand(copies * len(x)) for s in shown)
        f = net(torch.cat([x] * copies), *seen, guided(y, null) if guide else y).to(x.dtype)
        if guide:
            f_cond, f_null = f.chunk(2)
            f = f_null + guidance * (f_cond - f_null)
        if stochastic and 0 < k < len(times) - 2:
            eps = solve(row, x, f, t[None].to(x))[1]
            x = x - (t - r) * (f + stochastic * eps) + (2 * stochastic * t * (t - r)).sqrt() * noise(k).to(x)
        else:
            a, b = step_coefficients(row, t, r)
            x = a.to(x) * x + b.to(x) * f
        if trace is not None:
            trace.append((float(t), float(r), copies))
    return x


def class_of(index: int, classes: list[int]) -> int:
    return classes[index % len(classes)]


def latents(model, row, config, index, seed: int, steps, classes: list[int], texts=None, **options) -> Tensor:
    """Samples in network space (n, C, H, W): image i has noise (seed, i) and class classes[i mod len(classes)].

    texts  Texts of the prompts for a text network; the classes are then their numbers.
    """
    device, shape = next(model.parameters()).device, config["data"]["shape"]
    z = initial_noise(shape, seed, index, device)
    y = torch.tensor([class_of(i, classes) for i in index], device=device)
    if texts:
        texts.fetch(y)
        y, options["null"] = texts(y), texts(torch.full_like(y, texts.null))
    noise = lambda k: initial_noise(shape, seed, index, device, k)
    local = config["train"].get("share_diffusion") == 1
    if base := config["train"].get("shift"):
        options.setdefault("shift", resolution_shift(z[0, 0].numel() // model.patch**2, base))
    return generate(model, row, z, y, steps, noise=noise, local=local, **options)


def images(model, row, config, index, seed: int, steps, classes: list[int], decode=None, **options) -> np.ndarray:
    """`latents` as uint8 pictures (len(index), H, W, C); decode: what `data.decoder` gave for config["data"]."""
    decode = decode or data.decoder(config["data"], next(model.parameters()).device)
    return decode(latents(model, row, config, index, seed, steps, classes, **options))


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def two_numbers(mark: str):
    """A parser of arguments such as 1024x1536 (height x width) or 2:5."""

    def parse(text: str) -> tuple[int, int]:
        first, _, second = text.partition(mark)
        if not (first.isdecimal() and second.isdecimal() and int(first) and int(second)):
            raise argparse.ArgumentTypeError(f"{text}: expected height{mark}width in whole numbers")
        return int(first), int(second)

    return parse


def asked_sizes(a, config, patch: int, factor: int) -> list[tuple[int, int]]:
    """Heights and widths in pixels that --size and --aspect ask for; none where neither does.

    raises  UserError with the nearest size allowed: sides are multiples of the autoencoder's pixels per place x patch.
    """
    step, (_, *base), sizes = factor * patch, config["data"]["shape"], a.size or []
    nearest = lambda side: max(1, round(side / step)) * step
    for h, w in sizes:
        if h % step or w % step:
            rule = f"sides must be multiples of {step}, pixels per place of the autoencoder x patch"
            raise UserError(f"--size {h}x{w}: {rule}; the nearest is {nearest(h)}x{nearest(w)}")
    if a.aspect:
        areas = [h * w for h, w in sizes] or [base[0] * base[1] * factor**2]
        sizes = [(nearest((s * h / w) ** 0.5), nearest((s * w / h) ** 0.5)) for s in areas for h, w in a.aspect]
    return sizes


def at_size(config, size: tuple[int, int], factor: int, **how) -> dict:
    """The configuration for pictures of another size than trained at; "drawn" in it says how."""
    shape = [config["data"]["shape"][0], size[0] // factor, size[1] // factor]
    return config | dict(drawn=dict(size=f"{size[0]}x{size[1]}") | how, data=config["data"] | dict(shape=shape))


def memory_needed(model: TiM, shape, copies: int, factor: int) -> dict[str, float]:
    """GiB of sampling `copies` pictures at a time (twice the batch where guided), without the attention's N x N, which
    flash kernels never hold: the weights, a pass of the network, and the pictures while one of them is decoded.

    A pass peaks in the MLP: 44 bytes per token and width in fp32, 30 with bf16 products (measured, and the same at all
    depths and widths). What the autoencoder takes for a tile or a small picture is not in it.
    """
    weights, size = list(model.parameters()), model.blocks[0].attn.qkv.weight.dtype.itemsize
    tokens, width = shape[1] * shape[2] // model.patch**2, model.blocks[0].attn.qkv.in_features
    own, one = sum(p.nbytes for p in weights), 3 * shape[1] * shape[2] * factor**2
    passing, pixels = copies * tokens * width * (44 if size == 4 else 30), one * 4 * 3 + one * copies
    return {k: v / 2**30 for k, v in dict(weights=own, network=passing, pictures=pixels).items()}


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--checkpoint", help="run folder, exported or released file (default: the newest run under runs/)")
    add("--steps", type=int, nargs="+", default=[1, 2, 8], help="numbers of steps, a row each (default 1 2 8)")
    add("--prompts", nargs="+", help="texts, a column each (default: ten of the training); \"\" = no caption")
    add("--prompts_file", help="file with a text per line")
    add("--text_encoder", help="its place: a folder or hub name (default: what the checkpoint names)")
    add("--classes", type=int, nargs="+", help="classes to draw, a column each (default: the first ten)")
    add("--guidance", type=float, help="1 = off (default: what the checkpoint was trained for)")
    add("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="guide only at these times, as fractions of the range, ends included\n(default 0 1; released: theirs)")
    add("--strict_interval", action="store_true", help="leave the ends of the interval out, as the authors do")
    add("--stochastic", type=float, default=0.0, help="share of noise renewed per step, otfm only (default 0)")
    add("--seed", type=int, default=0, help="of the noise (default 0)")
    add("-n", "--num", type=int, help="write so many single pictures into --out instead of a grid; under torchrun all\n"
        "ranks share the work (say -n there, --num is torchrun's own); run again to go on")
    add("--out", help="grid PNG (default samples.png), or the folder for --num")
    add("--batch", type=int, default=100, help="pictures per pass (default 100; beyond 512x512 by --size fewer)")
    add("--autoencoder", help="place of the autoencoder: a folder or hub name (default: what the checkpoint names)")
    add("--save_latents", action="store_true", help="write latents as safetensors, undecoded; needs no autoencoder")
    add("--size", type=two_numbers("x"), nargs="+", metavar="HxW",
        help="of the pictures in pixels, several in turn (default: as trained)")
    add("--aspect", type=two_numbers(":"), nargs="+", metavar="H:W",
        help="shapes of the same area instead, such as 2:5")
    add("--rope_scale", choices=("none", "ntk", "linear"), default="none",
        help="beyond the trained side, stretch RoPE: its slow rotations, or all of them (default none)")
    add("--rope_layout", choices=("grid", "released"), help="token places (default: the checkpoint's; see README)")
    add("--shift", type=float, help="s of t -> s t / (1 + (s - 1) t) (default: what training says for this size)")
    add("--bench", choices=("geneval", "dpg", "mjhq"), help="draw a benchmark: --prompts is its prompt file (dpg:\n"
        "folder), --out gets the layout its scorer wants; also under torchrun, run again to go on")
    add("--export", metavar="FILE", help="write weights and configuration as one .safetensors file, and stop")
    add("--compile", action="store_true", help="compile the blocks; pays from some thousand pictures on")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda, else cpu")
    add("--precision", choices=("fp32", "bf16"), help="of attention and MLP (default: bf16 on cuda)")
    return p.parse_args(argv)  # fmt: skip


def read_prompts(a, path, config) -> list[str]:
    """The prompts of a text network, none for one of classes; UserError for what does not go together."""
    if "text" not in config["data"]:
        if a.prompts or a.prompts_file:
            raise UserError(f"--prompts: {path} was trained on classes, not on texts; give --classes")
        return []
    if a.classes is not None:
        raise UserError(f"--classes {a.classes}: {path} was trained on texts; give --prompts")
    if a.prompts and a.prompts_file:
        raise UserError(f"--prompts and --prompts_file {a.prompts_file}: give one of them")
    try:
        text = Path(a.prompts_file).read_text("utf-8") if a.prompts_file else None
        prompts = config["data"].get("prompts", []) if text is None else text.removesuffix("\n").split("\n")
        prompts = a.prompts or prompts
        "".join(prompts).encode()
    except (OSError, UnicodeError) as error:
        raise UserError(f"--prompts, --prompts_file {a.prompts_file}: no text in UTF-8 to be had ({error})") from error
    if a.num is None and len(prompts) > 100:
        raise UserError(f"--prompts: {len(prompts)} are too many for a grid; give --num {len(prompts)} --out FOLDER")
    if not prompts:
        raise UserError(f'{path} draws from text; say what: --prompts "a red apple" or --prompts_file FILE')
    return prompts


def encode_prompts(prompts: list[str], config, device, place: str | None = None):
    """Prompts as `Texts`. Up to data.TABLE of them are encoded here and the encoder is let go of, so that it and
    the network need not be in memory together."""
    text = config["data"]["text"]
    whole = not config["model"].get("caption_mask", True)
    encode, found = load_text_encoder(place or text["encoder"], device, text["length"], whole)
    if found["width"] != config["model"]["caption"]:
        rule = f"its features are {found['width']} wide, the network knows {config['model']['caption']}"
        raise UserError(f"--text_encoder {found['encoder']}: {rule}; it was trained with {text['encoder']}")
    return Texts(data.Captions([[prompt] for prompt in prompts]), encode, device)


def check_arguments(a, path, config, prompts) -> tuple[list[int], dict]:
    """The classes (or numbers of prompts) to draw and the options of `generate`; UserError for what cannot be."""
    known = len(prompts or config["data"]["classes"])
    columns = known if prompts or a.num is not None else min(10, known)
    classes = list(range(columns)) if a.classes is None else a.classes
    for k in classes:
        if not 0 <= k < known:
            raise UserError(f"--classes {k}: {path} knows classes 0 to {known - 1}")
    asked = dict(steps=(min(a.steps), 1), batch=(a.batch, 1), seed=(a.seed, 0), stochastic=(a.stochastic, 0))
    if a.num is not None:
        asked["num"] = (a.num, 1)
    for name, (value, bound) in asked.items():
        if not value >= bound:
            raise UserError(f"--{name} {value:g}: at least {bound}")
    interval = a.interval or config["train"].get("interval", (0.0, 1.0))
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise UserError(f"--interval {interval[0]:g} {interval[1]:g}: two rising fractions within 0 and 1")
    ending = ".safetensors" if a.save_latents else ".png"
    if a.num is None and not a.bench and a.out and not a.out.endswith(ending):
        raise UserError(f"--out {a.out}: a grid goes into one {ending} file; give such a name, or --num for many")
    if a.num is not None and not a.out:
        raise UserError(f"--num {a.num} needs --out FOLDER")
    if a.shift is not None:
        try:
            shift_times(TRANSPORTS[config["train"]["transport"]], torch.ones(1), a.shift)
        except ValueError as error:
            raise UserError(f"--shift {a.shift:g}: {error}") from error
    guidance = config["train"]["guidance"] if a.guidance is None else a.guidance
    if guidance != 1 and not config["train"]["drop"]:
        rule = f"{path} was trained with --drop 0 and knows no condition to guide from"
        raise UserError(f"--guidance {guidance:g}: {rule}; use 1")
    options = dict(guidance=guidance, interval=interval, strict=a.strict_interval, stochastic=a.stochastic)
    return classes, options | ({} if a.shift is None else dict(shift=a.shift))


def main(argv=None):
    a = parse_arguments(argv)
    path = a.checkpoint or newest()
    try:
        if a.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=a.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {a.device}: not to be had here ({str(error).splitlines()[0]}); try cpu") from error
    model, row, config = load(path)
    if a.export:
        if not a.export.endswith(".safetensors"):
            raise UserError(f"--export {a.export}: the file is a .safetensors one; give such a name")
        save(Path(a.export), model.state_dict(), config)
        print(f"{a.export}: {sum(p.numel() for p in model.parameters()):,} parameters of {path}")
        return
    bench = read_bench(a) if a.bench else None
    prompts = [text for text, *_ in bench] if bench else read_prompts(a, path, config)
    if bench and "text" not in config["data"]:
        raise UserError(f"--bench {a.bench}: {path} was trained on classes, not on texts")
    classes, options = check_arguments(a, path, config, prompts)
    if prompts:
        options["texts"] = encode_prompts(prompts, config, a.device, a.text_encoder)
    model.to(a.device)
    if (a.precision or ("bf16" if a.device.startswith("cuda") else "fp32")) == "bf16":
        lower_precision(model)
    for block in model.blocks if a.compile else ():
        block.compile()
    decode = None if a.save_latents else data.decoder(config["data"], a.device, a.autoencoder)
    spec, how = config["data"], {}
    factor = decode.factor if decode else spec.get("factor") or data.FACTORS.get(spec["autoencoder"], 0)
    if (a.size or a.aspect) and not factor:
        raise UserError("--size, --aspect with --save_latents: pixels per place are unknown; leave --save_latents out")
    if a.rope_scale != "none":
        model.rope_stretch = (a.rope_scale, *(side // model.patch for side in spec["shape"][1:]))
        how["rope_scale"] = a.rope_scale
    if a.rope_layout:
        model.rope_layout = how["rope_layout"] = a.rope_layout
    sizes = asked_sizes(a, config, model.patch, factor)
    for h, w in sizes or [(0, 0)]:
        b = argparse.Namespace(**vars(a))
        if h:
            here = at_size(config, (h, w), factor, **how)
            b.batch = max(1, min(a.batch, a.batch * 512**2 // (h * w)))
            if len(sizes) > 1:
                out = Path(a.out or "samples.png")
                many_files = a.bench or a.num is not None
                b.out = str(out / f"{h}x{w}" if many_files else out.with_stem(f"{out.stem}_{h}x{w}"))
            say_memory(model, here, b, factor, len(classes), options["guidance"])
        else:
            here = config | (dict(drawn=how) if how else {})
        if bench:
            draw_bench(model, row, here, b, path, bench, options, decode)
        elif a.num is not None:
            many(model, row, here, b, path, classes, options, decode)
        else:
            one_grid(model, row, here, b, path, classes, options, decode, prompts)


def say_memory(model, config, a, factor: int, columns: int, guidance: float) -> None:
    """Before anything is drawn."""
    together = min(a.batch, columns if a.num is None and not a.bench else a.num or a.batch)
    need = memory_needed(model, config["data"]["shape"], together * (1 + (guidance != 1)), factor)
    tokens = config["data"]["shape"][1] * config["data"]["shape"][2] // model.patch**2
    parts = ", ".join(f"{name} {size:.2f}" for name, size in need.items())
    what = f"{config['drawn']['size']}: {tokens:,} tokens, {together} at a time"
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{what}: about {sum(need.values()):.2f} GiB ({parts}) and the autoencoder's own", flush=True)


def one_grid(model, row, config, a, path, classes, options, decode, prompts) -> None:
    """A row per number of steps, a column per class or prompt, all rows from the same noise."""
    parts = [range(s, min(s + a.batch, len(classes))) for s in range(0, len(classes), a.batch)]
    draw = lambda n: torch.cat([latents(model, row, config, p, a.seed, n, classes, **options) for p in parts])
    out = Path(a.out or ("samples.safetensors" if a.save_latents else "samples.png"))
    out.parent.mkdir(parents=True, exist_ok=True)
    if a.save_latents:
        save(out, {f"steps_{n}": draw(n) for n in a.steps}, dict(data=config["data"], classes=prompts or classes))
    else:
        rows = [decode(draw(n)) for n in a.steps]
        data.grid(np.stack(rows), scale=max(1, 64 // rows[0].shape[1]), names=prompts).save(out)
    names = prompts or [config["data"]["classes"][k] for k in classes]
    print(f"{out}: rows {a.steps} steps, columns {', '.join(names)}, guidance {options['guidance']:g}, from {path}")


def many(model, row, config, a, path, classes, options, decode):
    """--num pictures as {index:06}.png (or latents, a file per batch), shared over ranks, written by threads.

    What is there already is not drawn again; FOLDER.json beside it says what it is, so that no two settings mix.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    shown = {k: v for k, v in options.items() if k != "texts"}
    if texts := options.get("texts"):
        shown["prompts"] = [texts.captions[k] for k in classes]
    for n in a.steps:
        folder = Path(a.out) / (f"steps_{n}" if len(a.steps) > 1 else "")
        folder.mkdir(parents=True, exist_ok=True)
        claim(Path(f"{folder}.json"), shown | config.get("drawn", {}) | dict(
            checkpoint=str(path), step=config["step"], steps=n, seed=a.seed, classes=classes, latents=a.save_latents))
        batches = [range(s, min(s + a.batch, a.num)) for s in range(0, a.num, a.batch)][rank::world]
        writes, total = [], sum(map(len, batches))
        with ThreadPoolExecutor(2) as pool, tqdm(total=total, desc=f"{n} steps", disable=rank > 0, unit="img") as bar:
            for batch in batches:
                whole = folder / f"latents_{batch[0]:06}_{batch[-1]:06}.safetensors"
                todo = [i for i in batch if not (whole if a.save_latents else folder / f"{i:06}.png").exists()]
                x = latents(model, row, config, todo, a.seed, n, classes, **options) if todo else None
                if todo and a.save_latents:
                    save(whole, dict(latents=x, index=torch.tensor(todo)), dict(data=config["data"]))
                elif todo:
                    writes += [pool.submit(write_png, p, folder / f"{i:06}.png") for i, p in zip(todo, decode(x))]
                bar.update(len(batch))
        for write in writes:
            write.result()                                                      # raises what the thread met
        if texts and rank == 0:                                                 # as evaluate.py clip reads them
            lines = (dict(file=f"{i:06}.png", caption=shown["prompts"][class_of(i, classes)]) for i in range(a.num))
            (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if rank == 0:
        print(f"{a.out}: {a.num} pictures at {a.steps} steps, guidance {options['guidance']:g}")


def claim(file: Path, record: dict) -> None:
    """Write what a folder of samples is; UserError if it is something else already."""
    record = json.loads(json.dumps(record))
    if not file.exists():
        data.write_text(file, json.dumps(record, indent=1))
    found = json.loads(file.read_text())
    for name in record.keys() | found.keys():
        if record.get(name) != found.get(name):
            rule = f"{file.with_suffix('')} holds samples with {name} = {found.get(name)}, not {record.get(name)}"
            raise UserError(f"{rule}; give another --out, or empty it")


def write_png(pixels, path: Path):
    write_image(data.to_image(pixels), path)


def write_image(image, path: Path):
    """Complete or not there; JPEG of quality 95 where the name says .jpg, else PNG."""
    aside = path.with_suffix(".tmp")
    image.save(aside, "JPEG" if path.suffix == ".jpg" else "PNG", quality=95)
    os.replace(aside, path)


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks


def read_bench(a) -> list[tuple[str, str, bytes]]:
    """(prompt, its place under --out, its original line) of a benchmark's own prompt file, in the file's order.

    geneval  evaluation_metadata.jsonl, {"prompt", ...} a line: FOLDER/00000/
    dpg      the folder of its .txt files: FOLDER/NAME.png
    mjhq     meta_data.json, {key: {"category", "prompt"}}: FOLDER/category/key.jpg
    """
    if not a.prompts or len(a.prompts) != 1 or a.prompts_file or not a.out or a.num is not None or a.save_latents:
        raise UserError(f"--bench {a.bench}: goes with --prompts FILE and --out DIR, without --num and --save_latents")
    source, form = Path(a.prompts[0]), dict(
        geneval='a .jsonl file with {"prompt": ...} a line', dpg="a folder of .txt files",
        mjhq='a .json file, {key: {"category": ..., "prompt": ...}}',
    )  # fmt: skip
    try:
        if a.bench == "geneval":
            lines = [line for line in source.read_bytes().split(b"\n") if line.strip()]
            found = [(json.loads(line)["prompt"], f"{i:05}", line) for i, line in enumerate(lines)]
        elif a.bench == "dpg":
            files = sorted(f for f in source.iterdir() if f.suffix == ".txt")
            found = [(f.read_bytes().decode().removesuffix("\n"), f"{f.stem}.png", b"") for f in files]
        else:
            table = json.loads(source.read_bytes())
            found = [(v["prompt"], f"{v['category']}/{key}.jpg", b"") for key, v in table.items()]
        for prompt, place, _ in found:
            if not isinstance(prompt, str) or ".." in place.split("/") or place.startswith("/"):
                raise ValueError(f"{place}: not a prompt, or a place outside of --out")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--prompts {source}: --bench {a.bench} wants {form[a.bench]} ({error!r})") from error
    if not found:
        raise UserError(f"--prompts {source}: holds no prompt; --bench {a.bench} wants {form[a.bench]}")
    return found


def draw_bench(model, row, config, a, path, bench, options, decode) -> None:
    """A benchmark's pictures in the places its scorer looks in, shared over ranks; what is there is not drawn again.

    geneval  NAME/samples/00000.png .. 00003.png, NAME/metadata.jsonl (the original line) and, last, NAME/grid.png
    dpg      one PNG a prompt, 2 x 2 pictures without a gap; mjhq: one JPEG a prompt, and captions.jsonl for `clip`
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    each = 1 if a.bench == "mjhq" else 4
    numbers = [k for k in range(len(bench)) for _ in range(each)]               # picture i is of prompt numbers[i]
    shown = {k: v for k, v in options.items() if k != "texts"} | config.get("drawn", {})
    texts = hashlib.sha256("\0".join(text for text, *_ in bench).encode()).hexdigest()[:16]
    for n in a.steps:
        folder, writes = Path(a.out) / (f"steps_{n}" if len(a.steps) > 1 else ""), []
        folder.mkdir(parents=True, exist_ok=True)
        claim(Path(f"{folder}.json"), shown | dict(
            checkpoint=str(path), step=config["step"], steps=n, seed=a.seed, bench=a.bench, prompts=texts))
        last = [folder / place / "grid.png" if a.bench == "geneval" else folder / place for _, place, _ in bench]
        size = max(1, a.batch // each)
        parts = [range(s, min(s + size, len(bench))) for s in range(0, len(bench), size)][rank::world]
        bar = tqdm(total=sum(map(len, parts)), desc=f"{n} steps", disable=rank > 0, unit="prompt")
        with ThreadPoolExecutor(2) as pool, bar:
            for part in parts:
                if todo := [k for k in part if not last[k].exists()]:
                    index = [k * each + i for k in todo for i in range(each)]
                    few = [index[s : s + a.batch] for s in range(0, len(index), a.batch)]
                    draw = lambda part, n=n: decode(latents(model, row, config, part, a.seed, n, numbers, **options))
                    pixels = np.concatenate([draw(part) for part in few])
                    pixels = pixels.reshape(len(todo), each, *pixels.shape[1:])
                    writes += [pool.submit(write_bench, a.bench, last[k], p, bench[k][2]) for k, p in zip(todo, pixels)]
                bar.update(len(part))
            for write in writes:
                write.result()                                                  # raises what the thread met
        if a.bench == "mjhq" and rank == 0:
            lines = "".join(json.dumps(dict(file=place, caption=text)) + "\n" for text, place, _ in bench)
            (folder / "captions.jsonl").write_text(lines)
    if rank == 0:
        print(f"{a.out}: {len(bench)} prompts of {a.bench}, {each} pictures each, at {a.steps} steps")


def write_bench(kind: str, last: Path, pixels: np.ndarray, line: bytes) -> None:
    """The pictures (1 or 4, H, W, C) of one prompt; `last` is the file that says they are all there."""
    last.parent.mkdir(parents=True, exist_ok=True)
    if kind == "geneval":
        (last.parent / "samples").mkdir(exist_ok=True)
        for i, picture in enumerate(pixels):
            write_png(picture, last.parent / "samples" / f"{i:05}.png")
        (last.parent / "metadata.jsonl").write_bytes(line)
    one = data.to_image(pixels[0]) if kind == "mjhq" else data.grid(pixels.reshape(2, 2, *pixels.shape[1:]), gap=0)
    write_image(one, last)


if __name__ == "__main__":
    data.command(main)
