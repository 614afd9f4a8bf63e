"""From a checkpoint to pictures, in any number of steps.

    python sample.py --steps 1 2 128               # newest run; a grid, a row per number of steps
    python sample.py --checkpoint runs/demo -n 1000 --steps 8 --out pictures
    python sample.py --checkpoint c2i_model_256.safetensors --classes 207 360   # released weights
    python sample.py --checkpoint runs/emoji --prompts "red apple" "blue heart" --steps 1 8
    python sample.py --checkpoint runs/demo --image shoe.png --strength 0.6 --classes Sandal Bag
    python sample.py --checkpoint runs/demo --export demo.safetensors
"""

import argparse
import json
import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import data
from data import DataSpec, UserError, explain, require
from model import TiM, lower_precision
from transition import (
    TRANSPORTS, Transport, cat, interpolate, output_from_x, resolution_shift, shift_times, solve,
    step_coefficients,
)  # fmt: skip

NO_CONDITION = -1  # stands for no class and no text where a condition is a number

# --- Checkpoints ----------------------------------------------------------------------------------


def save(path: Path, state: dict[str, Tensor], config: dict) -> None:
    """One safetensors file of weights, with their configuration as metadata; whole or absent."""
    aside = path.with_name(f"{path.name}.tmp")
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    with explain(Exception, f"{path}: cannot be written", "choose another folder"):
        save_file(state, aside, metadata={"tim": json.dumps(config)})
        os.replace(aside, path)


def load(path, device="cpu") -> tuple[TiM, Transport, dict]:
    """Model (fp32, evaluation mode, no projector), transport and configuration of a checkpoint.

    path     a run folder, a file that `save` wrote, a released file, or OWNER/REPO/FILE on the hub
    returns  config has "model" (arguments of TiM), "data" (DataSpec as JSON), "train" and "step"
    raises   UserError if it is missing, cut short, not a TiM checkpoint, or its tensors do not fit
    """
    file = checkpoint_file(path)
    state, config = read_tensors(file, device)
    try:
        config = config or recognise(state, file)
        transport = TRANSPORTS[config["train"]["transport"]]
        with torch.device("meta"):
            model = TiM(**(config["model"] | {"projector": None}))
        model.load_state_dict(state, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:400]
        raise UserError(f"{file} does not fit a network of this version: {why}") from error
    return model.eval().requires_grad_(False), transport, config


def checkpoint_file(path) -> Path:
    """The file of a run folder, a file itself, or else OWNER/REPO/FILE from the hub."""
    file = Path(path, "ema.safetensors") if Path(path).is_dir() else Path(path)
    on_hub = re.fullmatch(r"([\w.-]+/[\w.-]+)/(.+\.(?:safetensors|bin|pt|pth))", str(path))
    if on_hub and not file.is_file() and not file.parent.is_dir():
        way = "pip install huggingface_hub, or download it and give its path"
        with explain(Exception, f"{path}: not here, nor on the hub", way):
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(*on_hub.groups()))
    require(file.is_file(), f"{path}: there is no file {file}; run train.py, or fix the path")
    return file


def read_tensors(file: Path, device) -> tuple[dict, dict | None]:
    """The tensors in fp32, without a projector's, and the configuration if `save` wrote the file.

    Cast one by one, and the file opened for each, so that neither a copy nor its pages pile up.
    """
    state, config = {}, None
    with explain(Exception, f"{file}: not a whole file of plain weights", "get it again"):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as f:
                config = json.loads((f.metadata() or {}).get("tim", "null"))
                names = list(f.keys())
            for name in names:
                with safe_open(file, "pt") as f:
                    state[name] = f.get_tensor(name).to(device, torch.float32)
        else:
            stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # no code
            for name in list(stored):
                state[name] = stored.pop(name).to(device, torch.float32)
    return {k: v for k, v in state.items() if not k.startswith("projector.")}, config


def recognise(state: dict[str, Tensor], file) -> dict:
    """The configuration of a released file, from its tensors: all trained on otfm, predicting f.

    Not in the file: the latents' side, 32 for 4 channels (256 px) and 16 for 32 (512 px), and the
    authors' guidance and interval (without its ends). KeyError if a tensor is missing.
    """
    known = "x_embedder.proj.weight" in state
    require(known, f"{file}: no TiM network, it has no x_embedder.proj.weight; give another file")
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    model = {
        "channels": channels, "patch": patch, "width": width,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "heads": width // len(state["blocks.0.attn.q_norm.weight"]),
        "adaln": len(state["blocks.0.adaLN_modulation.fc1_g.weight"]),
        "shared_time": "delta_embedder.mlp.0.weight" not in state,
        "interval_attention": "blocks.0.attn.qkv_d.weight" in state,
    }  # fmt: skip
    side, guidance, high = (32, 2.5, 0.6) if channels == 4 else (16, 3.0, 0.7)
    classes, text = (), None
    if "y_embedder.mlp.fc2.weight" in state:
        caption, guidance, high = len(state["y_embedder.norm.weight"]), 2.5, 1.0
        model |= {"caption": caption, "rope_layout": "released", "caption_mask": False}
        text = {"encoder": data.GEMMA, "length": 256, "width": caption}
    else:
        model["classes"] = len(state["y_embedder.embedding_table.weight"]) - 1
        classes = tuple(str(i) for i in range(model["classes"]))
    name, factor = data.BY_CHANNELS.get(channels, ("", 1))
    spec = DataSpec(
        "latents", (channels, side, side), classes=classes, text=text, autoencoder=name,
        scale=data.AUTOENCODERS.get(name, ("", 1.0))[1], factor=factor,
    )  # fmt: skip
    train = {
        "transport": "otfm", "drop": 0.1, "guidance": guidance, "guidance_low": 0.0,
        "guidance_high": high, "guidance_strict": True,
    }  # fmt: skip
    return {"model": model, "data": spec.to_json(), "train": train, "step": None}


def newest(runs="runs") -> Path:
    """The run folder under `runs` whose exported weights are youngest."""
    found = sorted(Path(runs).glob("*/ema.safetensors"), key=lambda p: p.stat().st_mtime)
    require(found, f"no checkpoint under {runs}/; run `python train.py`, or give --checkpoint PATH")
    return found[-1].parent


# --- The sampler ----------------------------------------------------------------------------------


def network_f(model: TiM, transport: Transport, texts=None):
    """The paper's f(x_t, t, r, y) of a TiM, for training, guidance, sampling and figures alike.

    The network sees c_noise of the times and, with `texts` (data.Texts), the features of captions
    for their numbers; if it predicts x, its output is turned into f.
    returns  a function (x_t, t, r, y, aligned=False) -> f (B, C, H, W); with aligned, f and tokens
    """

    def f(x_t, t, r, y, aligned=False):
        w = None
        if model.guide_range:
            y, w = y
        if texts:
            y = texts(y)
        elif model.classes is not None:
            y = y.masked_fill(y < 0, model.classes)  # NO_CONDITION is the last row of the table
        if w is not None:
            y = (y, w)
        seen = x_t, transport.c_noise(t), transport.c_noise(r), y
        out, tokens = model(*seen, aligned=True) if aligned else (model(*seen), None)
        if model.predict == "x":
            out = output_from_x(transport, out, x_t, t)
        return (out, tokens) if aligned else out

    return f


def initial_noise(shape, seed: int, indices, device="cpu", *step: int) -> Tensor:
    """N(0, I), (n, *shape) float32: a function of seed and index, and of the step if given."""
    noise = [torch.randn(*shape, generator=data.rng(seed, i, *step)) for i in indices]
    return torch.stack(noise).to(device)


def sampling_times(transport: Transport, steps, shift=1.0, strength=1.0) -> Tensor:
    """Falling times, float64 on the CPU: equal `steps` from a fraction `strength` of the range down
    to its end, then shifted; or the list `steps` itself. UserError if they do not fit."""
    low, high = transport.t_min, transport.t_max
    if isinstance(steps, (int, np.integer)):
        require(steps >= 1, f"--steps {steps}: a sample takes at least 1 step")
        first = low + strength * (high - low)
        times = torch.linspace(first, low, int(steps) + 1, dtype=torch.float64)
        times = shift_times(transport, times, shift)
        if strength == 1:
            times[0] = high  # which a shift below 1/2 rounds
    else:
        times = torch.as_tensor(steps, dtype=torch.float64)
    rule = f"must fall, within [{low:g}, {high:g}] of {transport.name!r}"
    falls = len(times) > 1 and bool((times.diff() < 0).all())
    require(falls and times[0] <= high and times[-1] >= low, f"times {times.tolist()} {rule}")
    return times


@torch.no_grad()
def generate(
    model: TiM, transport: Transport, z: Tensor, y, steps, guidance: float = 1.0, *,
    interval=(0.0, 1.0), strict=False, null=None, shift=1.0, stochastic=0.0, local=False,
    noise: Callable[[int], Tensor] | None = None, start: Tensor | None = None, strength=1.0,
    trace: list | None = None,
) -> Tensor:  # fmt: skip
    """Carry noise to data: x_r = A x_t + B f, once per step.

    z           (B, C, H, W) ~ N(0, I); the state keeps its type, fp32 or fp64
    y           condition of the model, (B,) classes or a tuple (features, mask)
    steps       a number of equal steps in t, or falling times; the first is t_max without `start`
    guidance    g: f = f_null + g (f_cond - f_null), one pass of twice the batch, where t lies in
                `interval`, fractions of the transport's range with the ends; `strict`: without
    null        the condition that stands for none; default the no-class row
    shift       of a number of steps, see `shift_times`
    stochastic  s >= 0, otfm only: all steps but the first and the last are Euler-Maruyama steps of
                the reverse SDE whose noise has variance 2 s t dt; noise(k), (B, C, H, W) ~ N(0, I),
                is that of step k. Biased below about 50 steps
    local       show the network r = t at every step: for one that was trained on r = t alone
    start       (B or 1, C, H, W) clean: begin with it, noised by z to the first time, for a number
                of steps the fraction `strength` of the range
    trace       gets (t, r, network evaluations per picture) of each step: NFE is counted
    returns     (B, C, H, W), x at the last time. UserError for times that do not fit the transport
    """
    times, t_max = sampling_times(transport, steps, shift, strength), transport.t_max
    if start is None:
        require(times[0] == t_max, f"times {times.tolist()}: must begin at {t_max:g}, or give `start`")
        x = z * float(transport.sigma(times[0]))
    else:
        x = interpolate(transport, start, z, times[:1].float().to(z.device))
    rule = f"is for 'otfm', this network was trained on {transport.name!r}"
    require(not stochastic or transport.name == "otfm", f"--stochastic {stochastic:g} {rule}")
    if model.guide_range:
        low, high = model.guide_range
        fits = guidance == 1 or low <= guidance <= high
        require(fits, f"--guidance {guidance:g}: the network was trained with 1 and {low:g} to {high:g}")
        y, guidance = (y, torch.full((len(z),), float(guidance), device=z.device)), 1.0
    if null is None and guidance != 1:
        require(model.classes is not None, "a text network is guided by `null`, features of no text")
        null = torch.full_like(y, model.classes)
    f_of = network_f(model, transport)
    low, high = (round(end, 9) for end in interval)

    for k, (t, r) in enumerate(zip(times[:-1], times[1:])):
        fraction = round(float((t - transport.t_min) / (t_max - transport.t_min)), 9)
        guided = guidance != 1 and (low < fraction < high if strict else low <= fraction <= high)
        copies = 2 if guided else 1
        t_seen = t.float().to(x.device).expand(copies * len(x))
        r_seen = t_seen if local else r.float().to(x.device).expand(copies * len(x))
        if guided:
            f_cond, f_null = f_of(cat(x, x), t_seen, r_seen, cat(y, null)).to(x.dtype).chunk(2)
            f = f_null + guidance * (f_cond - f_null)
        else:
            f = f_of(x, t_seen, r_seen, y).to(x.dtype)
        if stochastic and 0 < k < len(times) - 2:
            eps = solve(transport, x, f, t_seen[:1].to(x.dtype))[1]
            renewed = float((2 * stochastic * t * (t - r)).sqrt())
            x = x - float(t - r) * (f + stochastic * eps) + renewed * noise(k).to(x)
        else:
            a, b = step_coefficients(transport, t, r)  # `transition.step`, A and B in float64
            x = float(a) * x + float(b) * f
        if trace is not None:
            trace.append((float(t), float(r), copies))
    return x


def sampling_options(config: dict, **given) -> dict:
    """How to sample a checkpoint, as keywords of `generate`: what is given, else what it says.

    given   guidance, interval, strict, stochastic, shift; None is not given. Without a shift, it
            follows from the number of tokens, where the network was trained so (`Sampler.latents`)
    raises  UserError for guidance of a network that knows no missing condition, and for bad values
    """
    train = config["train"]
    options = {
        "guidance": train["guidance"], "strict": train.get("guidance_strict", False),
        "interval": (train.get("guidance_low", 0.0), train.get("guidance_high", 1.0)),
        "stochastic": 0.0, "local": train.get("share_diffusion") == 1,
    }  # fmt: skip
    options |= {name: value for name, value in given.items() if value is not None}
    options["interval"] = low, high = tuple(options["interval"])
    guidance, transport = options["guidance"], TRANSPORTS[train["transport"]]
    require(math.isfinite(guidance), f"--guidance {guidance}: not a finite number")
    require(0 <= low <= high <= 1, f"--interval {low:g} {high:g}: two rising fractions in [0, 1]")
    rule = "the checkpoint was trained with --drop 0 and knows no missing condition; use 1"
    require(guidance == 1 or train["drop"], f"--guidance {guidance:g}: {rule}")
    fits = options.get("shift", 1) == 1 or (transport.t_min, transport.t_max) == (0, 1)
    require(fits, f"--shift: needs times in [0, 1], the network was trained on {transport.name!r}")
    return options


@dataclass
class Sampler:
    """A checkpoint that is ready to draw: picture i is a function of seed, i and its condition."""

    model: TiM
    transport: Transport
    config: dict  # as `load` gives it
    spec: DataSpec  # with the size to draw
    decode: Callable[[Tensor], np.ndarray]  # network space to uint8 pictures
    texts: data.Texts | None  # of the prompts; a condition is then the number of a prompt
    options: dict  # keywords of `generate`
    record: dict  # all that a picture depends on, but steps, seed and condition
    start: Tensor | None = None  # (1, C, H, W), a picture to start from, noised to `strength`
    strength: float = 1.0

    def latents(self, indices, conditions, steps, seed: int, trace=None) -> Tensor:
        """Samples in network space (n, C, H, W); a class or prompt number for each index."""
        device, shape = next(self.model.parameters()).device, self.spec.shape
        noise = partial(initial_noise, shape, seed, indices, device)
        tokens = shape[1] * shape[2] // self.model.patch**2
        shift = resolution_shift(tokens, self.config["train"].get("shift_tokens", 0))
        options = {"shift": shift, "noise": noise, "trace": trace} | self.options
        options |= {"start": self.start, "strength": self.strength}
        known = self.texts.null if self.texts else len(self.spec.classes)
        valid = len(conditions) == len(indices) and all(-1 <= k < known for k in conditions)
        rule = f"one for each index, from 0 to {known - 1}, or -1 for none"
        require(valid, f"conditions {list(conditions)}: {rule}")
        y = torch.tensor(conditions, device=device)
        if self.texts:
            self.texts.fetch(y)
            options["null"] = self.texts(torch.full_like(y, self.texts.null))
            y = self.texts(y)
        return generate(self.model, self.transport, noise(), y, steps, **options)

    def draw(self, indices, conditions, steps, seed: int) -> np.ndarray:
        """`latents`, decoded: uint8 (n, H, W, C)."""
        return self.decode(self.latents(indices, conditions, steps, seed))

    def condition_name(self, number: int) -> str:
        return self.texts.captions[number] if self.texts else self.spec.classes[number]


def open_sampler(
    path, device, precision="auto", *, prompts=None, autoencoder=None, text_encoder=None, **given
) -> Sampler:
    """Load a checkpoint and what it draws with. What is None, the checkpoint says.

    prompts  the conditions of a text network; None: those that its training showed
    autoencoder, text_encoder  folder or hub name, where what the checkpoint names is elsewhere
    given    guidance, interval, strict, stochastic, shift: see `sampling_options`
    """
    model, transport, config = load(path)
    device = torch.device(device)
    options, spec = sampling_options(config, **given), DataSpec.from_json(config["data"])
    dtype, texts = data.pick_dtype(device, precision), None
    record = options | {
        "weights": data.digest_file(checkpoint_file(path)), "step": config["step"],
        "precision": str(dtype), "autoencoder": autoencoder or spec.autoencoder,
    }  # fmt: skip
    if spec.text:
        require(not isinstance(prompts, str), "prompts: a list of texts, not one")
        prompts = list(prompts or spec.prompts)
        require(prompts, f'{path} draws from text: give --prompts "a red apple" or --prompts_file')
        name = text_encoder or spec.text["encoder"]
        encoder = data.load_text_encoder(name, device, spec.text["length"], not model.caption_mask)
        width, known = encoder.spec["width"], config["model"]["caption"]
        rule = f"{path} was trained with {known} of {spec.text['encoder']}"
        require(width == known, f"--text_encoder {name}: features are {width} wide, {rule}")
        texts = data.Texts(data.Captions([[prompt] for prompt in prompts]), encoder, device)
        record["text_encoder"] = name
    else:
        require(not prompts, f"--prompts: {path} was trained on classes; give --classes")
    decoder = data.Decoder(spec, device, autoencoder)
    lower_precision(model.to(device), dtype)
    return Sampler(model, transport, config, spec, decoder, texts, options, record)


# --- Pictures -------------------------------------------------------------------------------------


def make_folder(folder: Path) -> None:
    with explain(OSError, f"--out: {folder} cannot be made", "give another"):
        folder.mkdir(parents=True, exist_ok=True)


def write_pictures(sampler: Sampler, jobs: list, steps, seed: int, batch: int, folder: Path):
    """Draw jobs into a folder, shared over ranks; a file that is there is not drawn again.

    jobs    (file, index of the noise, condition) of each picture; four of one file: a mosaic
    folder  FOLDER.json beside it holds all that its pictures depend on, so that no settings mix
    """
    rank, world_size = data.ranks()
    make_folder(folder)
    ours = not any(folder.iterdir()) or Path(f"{folder}.json").is_file()  # a claim comes first
    require(ours, f"{folder}: holds files, but there is no {folder}.json of them; give another --out")
    about = {"steps": steps, "seed": seed, "shape": list(sampler.spec.shape)}
    data.claim(Path(f"{folder}.json"), sampler.record | about)
    files = {}
    for file, index, condition in jobs:
        files.setdefault(file, []).append((index, condition))
    names, size = list(files), max(1, batch * len(files) // len(jobs))
    parts = [names[k : k + size] for k in range(0, len(names), size)]
    with ThreadPoolExecutor(2) as pool:
        writes = []
        for part in tqdm(parts[rank::world_size], f"{steps} steps", disable=rank > 0):
            todo = [name for name in part if not (folder / name).exists()]
            if not todo:
                continue
            indices, conditions = zip(*(picture for name in todo for picture in files[name]))
            drawn = sampler.draw(indices, conditions, steps, seed)
            for write in writes:
                write.result()  # raises what a thread met; at most one batch waits
            writes = []
            for name, pictures in zip(todo, np.split(drawn, len(todo))):
                picture = pictures[0]
                if len(pictures) == 4:  # dpg: four jobs share a file name
                    picture = data.grid(pictures.reshape(2, 2, *pictures.shape[1:]), gap=0)
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                writes.append(pool.submit(data.write_picture, picture, folder / name))
        for write in writes:
            write.result()


def numbered(n: int, conditions: list[int]) -> list[tuple[str, int, int]]:
    """Jobs of n pictures 000000.png, 000001.png, ... of the conditions in turn."""
    return [(f"{i:06}.png", i, conditions[i % len(conditions)]) for i in range(n)]


def draw_grid(sampler: Sampler, conditions: list[int], steps: list[int], seed: int, path: Path):
    """A row per number of steps, a column per condition, all rows from the same noise."""
    one = path.suffix == ".png" and not path.is_dir()
    require(one, f"--out {path}: a grid is one .png file; or give -n for many")
    require(len(conditions) <= 100, f"{len(conditions)} columns are too many for a grid; give -n")
    rows = np.stack([sampler.draw(range(len(conditions)), conditions, n, seed) for n in steps])
    names = [sampler.condition_name(k) for k in conditions]
    labels = [f"{n} step" + "s" * (n > 1) for n in steps]
    picture = data.grid(rows, scale=max(1, 64 // rows.shape[2]), names=names, row_names=labels)
    if data.ranks()[0] == 0:
        make_folder(path.parent)
        data.write_picture(picture, path)


# --- Benchmarks: prompts from their own files, pictures where their scorers look for them ---------


def read_benchmark(kind: str, source: Path) -> tuple[list[str], list[tuple], list[bytes]]:
    """Prompts, jobs and, for geneval, metadata of a benchmark; four pictures a prompt, mjhq one.

    geneval  evaluation_metadata.jsonl, {"prompt", ...} a line: 00000/samples/00000.png to 00003.png
    dpg      a folder of .txt files: NAME.png, the four as a mosaic
    mjhq     meta_data.json, {key: {"category", "prompt"}}: category/key.jpg
    """
    lines, wrong = [], (OSError, ValueError, KeyError, TypeError, AttributeError)
    with explain(wrong, f"--prompts {source}: not the prompts of {kind}", "give its own file"):
        if kind == "geneval":
            lines = [line for line in source.read_bytes().split(b"\n") if line.strip()]
            prompts = [json.loads(line)["prompt"] for line in lines]
            files = [f"{i:05}/samples/{k:05}.png" for i in range(len(lines)) for k in range(4)]
        elif kind == "dpg":
            texts = sorted(source.glob("*.txt"))
            prompts = [file.read_text("utf-8").removesuffix("\n") for file in texts]
            files = [f"{file.stem}.png" for file in texts for k in range(4)]
        else:
            table = json.loads(source.read_text("utf-8"))
            prompts = [entry["prompt"] for entry in table.values()]
            files = [f"{entry['category']}/{key}.jpg" for key, entry in table.items()]
        inside = all(".." not in Path(file).parts and not Path(file).is_absolute() for file in files)
        require(prompts and inside, f"--prompts {source}: no prompts, or files outside of --out")
    return prompts, [(f, i, i * len(prompts) // len(files)) for i, f in enumerate(files)], lines


def finish_geneval(folder: Path, lines: list[bytes]) -> None:
    """grid.png, and the line as metadata.jsonl, of each prompt whose four pictures are there: every
    rank does this at its end, so the last one finds all."""
    for i, line in enumerate(lines):
        prompt = folder / f"{i:05}"
        four = [prompt / "samples" / f"{k:05}.png" for k in range(4)]
        if all(file.is_file() for file in four) and not (prompt / "grid.png").is_file():
            (prompt / "metadata.jsonl").write_bytes(line)
            pictures = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in four])
            mosaic = data.grid(pictures.reshape(2, 2, *pictures.shape[1:]), gap=0)
            data.write_picture(mosaic, prompt / "grid.png")


# --- The command ----------------------------------------------------------------------------------


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, usage="sample.py [--FLAG VALUE ...]", allow_abbrev=False,
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    add, on_off, positive = p.add_argument, argparse.BooleanOptionalAction, data.positive_int
    add("--checkpoint", help="run folder, file or OWNER/REPO/FILE on the hub (default: newest run)")
    add("--steps", type=positive, nargs="+", default=[1, 2, 8], help="each a row (default 1 2 8)")
    add("--classes", nargs="+", help="numbers or names (default: the first ten; all with -n)")
    add("--prompts", nargs="+", help='texts (default: of the training); "" is no text')
    add("--prompts_file", type=Path, help="file with a text per line")
    add("--guidance", type=float, help="scale, 1 = off (default: the checkpoint's)")
    add("--interval", type=data.share, nargs=2, metavar=("LOW", "HIGH"),
        help="guide only where the time, as a fraction of the transport's range, lies between\n"
        "these (default: the checkpoint's)")
    add("--strict_interval", action=on_off, help="without its ends (default: the checkpoint's)")
    add("--stochastic", type=data.non_negative_float,
        help="s of the noise of variance 2 s t (t - r) that each step adds, otfm only (default 0);\n"
        "biased below 50 steps: the variance is 11%% too large at 4")
    add("--shift", type=data.positive_float,
        help="s of t -> s t / (1 + (s - 1) t) (default: as trained, by the number of tokens)")
    add("--seed", type=data.natural, default=0, help="of the noise (default 0)")
    add("-n", "--num", type=positive, help="write this many pictures into the folder --out, not a\n"
        "grid; torchrun has a --num of its own, so write -n behind it; run again to continue")
    add("--out", type=Path, help="grid PNG (default samples.png); folder for -n and --bench")
    add("--batch", type=positive, default=100, help="pictures per pass (default 100)")
    add("--image", type=Path, help="start from this picture, noised to --strength")
    add("--strength", type=data.number(float, math.ulp(0), 1, "a number above 0, at most 1"),
        help="fraction of the times to begin at (default 0.6)")
    add("--size", type=positive, nargs=2, metavar=("H", "W"), help="pixels (default: as trained)")
    add("--autoencoder", help="folder or hub name (default: what the checkpoint names)")
    add("--text_encoder", help="folder or hub name (default: what the checkpoint names)")
    add("--bench", choices=("geneval", "dpg", "mjhq"), help="draw the prompts of a benchmark:\n"
        "--prompts is its file (dpg: folder), --out gets the layout that its scorer reads")
    add("--export", type=Path, metavar="FILE", help="write one .safetensors file, and stop")
    add("--device", default="auto", help="auto (default: cuda, else cpu), cuda, mps or cpu")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of attention\n"
        "and MLP; auto (default) is bf16 on GPUs that have it in hardware, else fp32")
    return p.parse_args(argv)  # fmt: skip


def class_numbers(asked: list[str] | None, known: tuple[str, ...], many: bool) -> list[int]:
    """Class numbers for --classes, each a number or a name. Default: the first ten, with `many` all."""
    if asked is None:
        return list(range(len(known) if many else min(10, len(known))))
    numbers = {str(i): i for i in range(len(known))}
    numbers |= {known[i].casefold(): i for i in reversed(range(len(known)))}  # of equals, the first
    rule = f"classes are 0 to {len(known) - 1}, or names: {', '.join(known[:12])}"
    for text in asked:
        require(text.casefold() in numbers, f"--classes {text}: {rule}")
    return [numbers[text.casefold()] for text in asked]


def read_prompts(file: Path) -> list[str]:
    wrong = OSError, UnicodeError
    with explain(wrong, f"--prompts_file {file}: not text in UTF-8", "give another file"):
        return file.read_text("utf-8").removesuffix("\n").split("\n")


def resized(sampler: Sampler, size: list[int]) -> DataSpec:
    """The spec for pictures of another size, (height, width) in pixels, than trained at."""
    spec, step = sampler.spec, sampler.spec.factor * sampler.model.patch
    nearest = [max(1, round(side / step)) * step for side in size]
    rule = f"sides must be multiples of {step}; the nearest is {nearest[0]} {nearest[1]}"
    require(nearest == size, f"--size {size[0]} {size[1]}: {rule}")
    return replace(spec, shape=(spec.shape[0], size[0] // spec.factor, size[1] // spec.factor))


def main(argv=None):
    a = parse_arguments(argv)
    path, device = a.checkpoint or newest(), data.open_device(a.device)
    if a.export:
        require(a.export.suffix == ".safetensors", f"--export {a.export}: name a .safetensors file")
        model, _, config = load(path)
        save(a.export, model.state_dict(), config)
        print(f"{a.export}: {sum(p.numel() for p in model.parameters()):,} parameters of {path}")
        return
    require(a.out or not (a.num or a.bench), "-n and --bench write many pictures; give --out FOLDER")
    require(not (a.prompts and a.prompts_file), "--prompts and --prompts_file: give one of them")
    require(a.image or a.strength is None, f"--strength {a.strength}: only with --image PICTURE")
    prompts = read_prompts(a.prompts_file) if a.prompts_file else a.prompts
    if a.bench:
        alone = a.prompts and len(a.prompts) == 1 and not a.num
        require(alone, f"--bench {a.bench}: give --prompts FILE (dpg: FOLDER) alone, without -n")
        prompts, jobs, metadata = read_benchmark(a.bench, Path(a.prompts[0]))
    sampler = open_sampler(
        path, device, a.precision, prompts=prompts, autoencoder=a.autoencoder,
        text_encoder=a.text_encoder, guidance=a.guidance, interval=a.interval,
        strict=a.strict_interval, stochastic=a.stochastic, shift=a.shift,
    )  # fmt: skip
    if a.size:
        sampler.spec = resized(sampler, a.size)
    if a.image:
        sampler.start = data.encode_picture(a.image, sampler.spec, device, a.autoencoder)
        sampler.strength = 0.6 if a.strength is None else a.strength
        sampler.record |= {"image": data.digest_file(a.image), "strength": sampler.strength}
    if a.stochastic and min(a.steps) < 50:
        data.say(f"note: --stochastic {a.stochastic:g} is biased at few steps (variance +11% at 4)")
    step, guidance = sampler.config["step"], sampler.options["guidance"]
    what = "released weights" if step is None else f"weights of step {step}"
    data.say(f"{path}: {what}, guidance {guidance:g}")

    if sampler.texts:
        require(a.classes is None, f"--classes: {path} was trained on texts; give --prompts")
        conditions = list(range(sampler.texts.null))
    else:
        conditions = class_numbers(a.classes, sampler.spec.classes, a.num is not None)
    names = [sampler.condition_name(k) for k in conditions]
    if not (a.num or a.bench):
        out = a.out or Path("samples.png")
        draw_grid(sampler, conditions, a.steps, a.seed, out)
        data.say(f"{out}: rows of {a.steps} steps, columns {', '.join(names)}")
        return
    if not a.bench:
        jobs = numbered(a.num, conditions)
    sampler.record["conditions"] = data.Captions([[name] for name in names]).digest()
    for steps in a.steps:
        folder = a.out / f"steps_{steps}" if len(a.steps) > 1 else a.out
        write_pictures(sampler, jobs, steps, a.seed, a.batch, folder)
        if a.bench == "geneval":
            finish_geneval(folder, metadata)
        if sampler.texts and data.ranks()[0] == 0:
            file, known = folder / "captions.jsonl", {}
            if file.is_file():  # of a call with a larger -n
                known = data.read_captions(file.read_bytes(), str(file))
            known |= {name: [names[k]] for name, _, k in jobs}
            lines = [json.dumps({"image_file": k, "captions": v}) for k, v in known.items()]
            data.write_text(file, "\n".join(lines) + "\n")
        data.say(f"{folder}: {len(jobs)} pictures at {steps} steps")


if __name__ == "__main__":
    data.command(main)
