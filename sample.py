"""From a checkpoint to pictures, in any number of steps.

    python sample.py --steps 1 2 128               # newest run; a grid, a row per number of steps
    python sample.py --checkpoint runs/demo -n 1000 --steps 8 --out pictures
    python sample.py --checkpoint runs/demo -n 50000 --steps 2 --out samples.npz
    python sample.py --checkpoint c2i_model_256.safetensors --classes 207 360   # released weights
    python sample.py --checkpoint runs/emoji --prompts "red apple" "blue heart" --steps 1 8
"""

import argparse
import hashlib
import json
import math
import re
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import data  # first: it says so where the packages are missing

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from data import Spec, UserError, explain, require
from model import TiM, lower_precision
from transition import (
    SIGMA_FLOOR, TRANSPORTS, Transport, cat, network_f, resolution_shift, shift_times, solve,
    step_coefficients,
)  # fmt: skip

# --- Checkpoints ----------------------------------------------------------------------------------


def save(path: Path, state: dict[str, Tensor], config: dict) -> None:
    """One safetensors file of weights, with their configuration as metadata; whole or absent, on
    the disk, and readable as the umask says."""
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    failed = explain(Exception, f"{path}: cannot be written; free the disk or choose another folder")
    with failed, data.replacing(path) as file:
        file.touch()  # with the umask's mode: safetensors makes private files
        mode = file.stat().st_mode
        save_file(state, file, metadata={"tim": json.dumps(config)})
        file.chmod(mode)
        data.sync(file)


def load(path, device="cpu") -> tuple[TiM, Transport, dict]:
    """Model (fp32, evaluation mode, no projector), transport and configuration of a checkpoint.

    path     a run folder, a folder of its checkpoints, a file that `save` wrote, a released file,
             or OWNER/REPO/FILE on the hub
    returns  config has "model" (arguments of TiM), "data" (Spec as JSON), "train", "step" and
             "digest", of the file as it was read
    raises   UserError if it is missing, cut short, not a TiM checkpoint, or its tensors do not fit
    """
    file = checkpoint_file(path)
    state, config, digest = read_tensors(file, device)
    try:
        config = (config or recognise(state, file)) | {"digest": digest}
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
    inside = sorted(found.parent for found in Path(path).glob("*/ema.safetensors"))
    on_hub = re.fullmatch(r"([\w.-]+/[\w.-]+)/(.+\.(?:safetensors|bin|pt|pth))", str(path))
    if on_hub and not file.is_file() and not file.parent.is_dir():
        way = "pip install huggingface_hub, or download it and give its path"
        with explain(Exception, f"{path}: not here, nor on the hub; {way}"):
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(*on_hub.groups()))
    way = f"give {inside[-1]}" if inside else "run train.py, or fix the path"
    require(file.is_file(), f"{path}: there is no file {file}; {way}")
    return file


def read_tensors(file: Path, device) -> tuple[dict, dict | None, str]:
    """The tensors in fp32, without a projector's; the configuration if `save` wrote the file; its
    digest. One opening: a training may replace the file meanwhile."""
    state, config, sha = {}, None, hashlib.sha256()

    def keep(name, tensor):  # cast one by one, so that no copy piles up
        sha.update(name.encode())
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        if not name.startswith("projector."):
            state[name] = tensor.to(device, torch.float32)

    with explain(Exception, f"{file}: not a whole file of plain weights; get it again"):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as stored:
                config = json.loads((stored.metadata() or {}).get("tim", "null"))
                for name in stored.keys():
                    keep(name, stored.get_tensor(name))
            return state, config, sha.hexdigest()[:16]
        with file.open("rb") as stream:
            stored = torch.load(stream, map_location="cpu", weights_only=True)  # runs no code
    tables = stored if isinstance(stored, dict) else {}
    plain = all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tables.items())
    require(tables and plain, f"{file}: holds no table of tensors by name, but "
            f"{list(tables)[:5] or type(stored).__name__}; save the weights alone, such as "
            "torch.save(x['ema'], FILE)")  # fmt: skip
    while stored:
        keep(*stored.popitem())
    return state, config, sha.hexdigest()[:16]


def recognise(state: dict[str, Tensor], file) -> dict:
    """The configuration of a released file, from its tensors: all trained on otfm, predicting f.

    Not in the file: the latents' side, 32 for 4 channels (256 px) and 16 for 32 (512 px), and the
    authors' guidance and interval (without its ends). KeyError if a tensor is missing.
    """
    ours = "x_embedder.proj.weight" in state
    require(ours, f"{file}: no TiM network, it has no x_embedder.proj.weight; give another file")
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
    known = {n: (name, scale, factor) for name, (_, scale, n, factor) in data.AUTOENCODERS.items()}
    name, scale, factor = known.get(channels, ("", 1.0, 1))
    spec = Spec(
        "latents", (channels, side, side), std=1 / scale, classes=classes, autoencoder=name,
        factor=factor, text=text,
    )  # fmt: skip
    train = {"transport": "otfm", "drop": 0.1, "guidance": guidance, "interval": (0.0, high),
             "strict_interval": True}  # fmt: skip
    return {"model": model, "data": spec.to_json(), "train": train, "step": None}


def newest(runs="runs") -> Path:
    """The run folder under `runs` whose exported weights are youngest."""
    found = sorted(Path(runs).glob("*/ema.safetensors"), key=lambda p: p.stat().st_mtime)
    require(found, f"no checkpoint under {runs}/; run `python train.py`, or give --checkpoint PATH")
    return found[-1].parent


# --- The sampler ----------------------------------------------------------------------------------


def initial_noise(shape, seed: int, indices, device="cpu", *step: int) -> Tensor:
    """N(0, I), (n, *shape) float32: a function of seed and index, and of the step if given."""
    noise = [torch.randn(*shape, generator=data.seeded(seed, i, *step)) for i in indices]
    return torch.stack(noise).to(device)


def sampling_times(transport: Transport, steps, shift=1.0, floor=0.0) -> Tensor:
    """Falling times, float64 on the CPU: a number of steps as the transport spaces them, shifted, or
    the list `steps` itself. UserError if they do not fall from t_max, within the range.

    floor  no step but the last ends where sigma(t) is smaller. There `output_from_x` scales the noise
           down, so that each step would leave some of it: 128 steps were worse than 32
    """
    low, high = transport.t_min, transport.t_max
    if isinstance(steps, (int, np.integer)):
        require(steps >= 1, f"--steps {steps}: a sample takes at least 1 step")
        for n in range(int(steps), 4 * int(steps)):  # so many that what is left is as many as asked for
            times = shift_times(transport, transport.times(n), shift)
            times = times[(transport.sigma(times) >= floor) | (times == times[-1])]
            if len(times) > steps:
                break
        times[0] = high  # which a shift below 1/2 rounds
    else:
        times = torch.as_tensor(steps, dtype=torch.float64).reshape(-1)
    falls = len(times) > 1 and bool((times.diff() < 0).all())
    require(falls and times[0] == high and times[-1] >= low, f"times {times.tolist()} must fall "
            f"from {high:g}, within [{low:g}, {high:g}] of {transport.name!r}")  # fmt: skip
    return times


@torch.no_grad()
def generate(
    model: TiM, transport: Transport, z: Tensor, y, steps, guidance: float = 1.0, *,
    interval=(0.0, 1.0), strict=False, null=None, shift=1.0, stochastic=0.0, diffusion_only=False,
    noise: Callable[[int], Tensor] | None = None, trace: list | None = None,
) -> Tensor:  # fmt: skip
    """Carry noise to data: x_r = A x_t + B f, once per step.

    z           (B, C, H, W) ~ N(0, I); the state keeps its type, fp32 or fp64
    y           condition of the model, (B,) classes or a tuple (features, mask)
    steps       a number of steps (`Transport.times`), or falling times, the first t_max
    guidance    g: f = f_null + g (f_cond - f_null), one pass of twice the batch, where t lies in
                `interval`, fractions of the transport's range with the ends; `strict`: without. A
                network with a guide_range is shown g instead, or 1 outside the interval: one pass
    null        the condition that stands for none; default the no-class row
    shift       of a number of steps, see `shift_times`
    stochastic  s >= 0, otfm only: all steps but the first and the last are Euler-Maruyama steps of
                the reverse SDE whose noise has variance 2 s t dt; noise(k), (B, C, H, W) ~ N(0, I),
                is that of step k. Biased below about 50 steps
    diffusion_only  show the network r = t at every step: for one that was trained on r = t alone
    trace       gets (t, r, network evaluations per picture) of each step: NFE is counted
    returns     (B, C, H, W), x at the last time. UserError for what does not fit transport or model
    """
    floor = SIGMA_FLOOR if model.predict == "x" else 0.0
    times = sampling_times(transport, steps, shift, floor)
    f_of = network_f(model, transport, model.predict)
    check_stochastic(transport, stochastic)
    check_guidance(model.guide_range, guidance, interval)
    if null is None and guidance != 1 and not model.guide_range:
        require(model.classes is not None, "a text network is guided by `null`, features of no text")
        null = torch.full_like(y, model.classes)
    low, high = (round(end, 9) for end in interval)
    x = z * float(transport.sigma(times[0]))

    def guided_at(t) -> bool:
        place = round(float(transport.fraction(t)), 9)
        inside = low < place < high if strict else low <= place <= high
        return guidance != 1 and inside

    def evaluations(t) -> int:
        """Of the network for one picture at t: 2 where it is guided by a second pass."""
        return 2 if guided_at(t) and not model.guide_range else 1

    def field(x, t, r):
        """The guided f(x_t, t, r, y), in the type of x. t, r: 0-d float64 on the CPU, for exact steps;
        the network sees float32, as in training."""
        n = evaluations(t) * len(x)
        t_seen = t.float().to(x.device).expand(n)
        r_seen = t_seen if diffusion_only else r.float().to(x.device).expand(n)
        if model.guide_range:
            shown = torch.full((n,), guidance if guided_at(t) else 1.0, device=x.device)
            return f_of(x, t_seen, r_seen, (y, shown)).to(x.dtype)
        if not guided_at(t):
            return f_of(x, t_seen, r_seen, y).to(x.dtype)
        f_cond, f_null = f_of(cat(x, x), t_seen, r_seen, cat(y, null)).to(x.dtype).chunk(2)
        return f_null + guidance * (f_cond - f_null)

    for k, (t, r) in enumerate(zip(times[:-1], times[1:])):
        f = field(x, t, r)
        if stochastic and 0 < k < len(times) - 2:
            eps = solve(transport, x, f, t[None].to(x))[1]
            renewed = float((2 * stochastic * t * (t - r)).sqrt())
            x = x - float(t - r) * (f + stochastic * eps) + renewed * noise(k).to(x)
        else:
            a, b = step_coefficients(transport, t, r)  # `transition.step`, A and B in float64
            x = float(a) * x + float(b) * f
        if trace is not None:
            trace.append((float(t), float(r), evaluations(t)))
    return x


def check_stochastic(transport: Transport, stochastic: float) -> None:
    require(not stochastic or transport.name == "otfm", f"--stochastic {stochastic:g} is for 'otfm', "
            f"this network was trained on {transport.name!r}")  # fmt: skip


def check_guidance(guide_range, guidance: float, interval) -> None:
    """UserError for a guidance that is not a finite number, or was not in the training."""
    low, high = interval
    require(math.isfinite(guidance), f"--guidance {guidance}: not a finite number")
    require(0 <= low <= high <= 1, f"--interval {low:g} {high:g}: two rising fractions in [0, 1]")
    if guide_range:
        least, most = guide_range
        require(guidance == 1 or least <= guidance <= most, f"--guidance {guidance:g}: the network "
                f"knows 1 and {least:g} to {most:g}; give one of these")  # fmt: skip


def sampling_options(
    config: dict, guidance=None, interval=None, strict=None, stochastic=None, shift=None
) -> dict:
    """How to sample a checkpoint, as keywords of `generate`: what is given, or for None what it says.

    Without a shift, it follows from the number of tokens, where the network was trained so, see
    `Sampler.latents`. UserError for guidance of a network that knows no missing condition, and for
    bad values.
    """
    train = config["train"]
    given = {"guidance": guidance, "interval": interval, "strict": strict, "stochastic": stochastic,
             "shift": shift}  # fmt: skip
    # the second edition's names of the interval's ends, and of leaving them out
    ends = train.get("guidance_low", 0.0), train.get("guidance_high", 1.0)
    left_out = train.get("guidance_strict", False)
    options = {
        "guidance": train["guidance"], "interval": train.get("interval", ends),
        "strict": train.get("strict_interval", left_out),
        "stochastic": 0.0, "diffusion_only": train.get("share_diffusion") == 1,
    }  # fmt: skip
    options |= {name: value for name, value in given.items() if value is not None}
    options["interval"] = tuple(options["interval"])
    guidance, transport = options["guidance"], TRANSPORTS[train["transport"]]
    check_guidance(config["model"].get("guide_range"), guidance, options["interval"])
    require(guidance == 1 or train["drop"], f"--guidance {guidance:g}: the checkpoint was trained "
            "with --drop 0 and knows no missing condition; use 1")  # fmt: skip
    fits = transport.on_unit_interval or options.get("shift", 1) == 1
    require(fits, f"--shift: needs times in [0, 1], the network was trained on {transport.name!r}")
    check_stochastic(transport, options["stochastic"])
    return options


@dataclass
class Sampler:
    """A checkpoint that is ready to draw: picture i is a function of seed, i and its condition."""

    model: TiM
    transport: Transport
    config: dict  # as `load` gives it
    spec: Spec  # with the size to draw
    decode: Callable[[Tensor], np.ndarray]  # network space to uint8 pictures
    conditions: object  # data.ClassConditions or data.TextConditions
    names: tuple[str, ...]  # classes or prompts; a condition is the number of one
    options: dict  # keywords of `generate`
    record: dict  # all that a picture depends on, but steps, seed and condition

    def latents(self, indices, conditions, steps, seed: int, trace=None) -> Tensor:
        """Samples in network space (n, C, H, W); a class or prompt number for each index."""
        known, shape = len(self.names), self.spec.shape
        require(len(conditions) == len(indices) > 0, f"{len(conditions)} conditions for {len(indices)} "
                "indices: give as many, at least one")  # fmt: skip
        for k in conditions:
            valid = isinstance(k, (int, np.integer)) and -1 <= k < known
            require(valid, f"condition {k!r}: a number from 0 to {known - 1}, in the order of `.names`, "
                    "or -1 for none")  # fmt: skip
        if self.spec.text:
            y, null = self.conditions(["" if k < 0 else self.names[k] for k in conditions])
        else:
            y, null = self.conditions(conditions)
        device = next(self.model.parameters()).device
        noise = partial(initial_noise, shape, seed, indices, device)
        tokens = shape[1] * shape[2] // self.model.patch**2
        shift = resolution_shift(tokens, self.config["train"].get("shift_tokens", 0))
        options = {"shift": shift, "noise": noise, "trace": trace, "null": null} | self.options
        return generate(self.model, self.transport, noise(), y, steps, **options)

    def draw(self, indices, conditions, steps, seed: int = 0) -> np.ndarray:
        """`latents`, decoded: uint8 (n, H, W, C)."""
        return self.decode(self.latents(indices, conditions, steps, seed))


def open_sampler(
    path, device="cpu", precision="auto", *, prompts=None, autoencoder=None, text_encoder=None, **given
) -> Sampler:
    """Load a checkpoint and what it draws with. What is None, the checkpoint says.

    prompts  the conditions of a text network; None: those that its training showed
    autoencoder, text_encoder  folder or hub name, where what the checkpoint names is elsewhere
    given    guidance, interval, strict, stochastic, shift: see `sampling_options`
    """
    model, transport, config = load(path)
    device = torch.device(device)
    options, spec = sampling_options(config, **given), Spec.from_json(config["data"])
    dtype = data.pick_dtype(device, precision)
    record = options | {
        "weights": config["digest"], "step": config["step"], "precision": str(dtype),
        "autoencoder": autoencoder or spec.autoencoder,
    }  # fmt: skip
    if spec.text:
        require(not isinstance(prompts, str), "prompts: a list of texts, not one")
        names = tuple(prompts or spec.prompts)
        require(names, f'{path} draws from text: give --prompts "a red apple" or --prompts_file')
        for text in names:
            require(data.printable(text) == text, f"--prompts {text!a}: not text in UTF-8; set the "
                    "terminal to it, or give --prompts_file")  # fmt: skip
        record["text_encoder"] = text_encoder or spec.text["encoder"]
    else:
        require(not prompts, f"--prompts: {path} was trained on classes; give --classes")
        names = spec.classes
    conditions = data.open_conditions(spec, device, not model.caption_mask, text_encoder, names)
    decoder = data.Decoder(spec, device, autoencoder)
    lower_precision(model.to(device), dtype)
    return Sampler(model, transport, config, spec, decoder, conditions, names, options, record)


# --- Pictures -------------------------------------------------------------------------------------


def write_pictures(sampler: Sampler, jobs: list, steps, seed: int, batch: int, folder: Path):
    """Draw jobs into a folder, shared over ranks; a file that is there is not drawn again.

    jobs    (file, index of the noise, condition) of each picture
    folder  FOLDER.json beside it holds all that its pictures depend on, so that no settings mix
    """
    rank, world_size = data.ranks()
    with explain(OSError, f"--out: {folder} cannot be made; give another"):
        data.make_folder(folder)
    ours = not any(folder.iterdir()) or Path(f"{folder}.json").is_file()  # written before any picture
    require(ours, f"{folder}: holds files, but there is no {folder}.json of them; give another --out")
    about = {"steps": steps, "seed": seed, "shape": list(sampler.spec.shape)}
    data.claim(Path(f"{folder}.json"), sampler.record | about)
    parts = [jobs[k : k + batch] for k in range(0, len(jobs), batch)]

    def write(file, picture):
        data.make_folder(file.parent)
        data.write_picture(picture, file)

    with ThreadPoolExecutor(2) as pool:
        writes = ()
        for part in tqdm(parts[rank::world_size], f"{steps} steps", disable=rank > 0):
            todo = [job for job in part if not (folder / job[0]).exists()]
            if not todo:
                continue
            files, indices, conditions = zip(*todo)
            drawn = sampler.draw(indices, conditions, steps, seed)
            list(writes)  # raises what a thread met; at most one batch waits
            writes = pool.map(write, [folder / file for file in files], drawn)
        list(writes)


def numbered(n: int, conditions: list[int]) -> list[tuple[str, int, int]]:
    """Jobs of n pictures 000000.png, 000001.png, ... of the conditions in turn."""
    return [(f"{i:06}.png", i, conditions[i % len(conditions)]) for i in range(n)]


def write_npz(folder: Path, jobs: list, path: Path) -> None:
    """The pictures of a folder in the form of ADM's scorers: arr_0, uint8 (N, H, W, 3); one by one."""
    rows = (np.asarray(Image.open(folder / name).convert("RGB")) for name, *_ in jobs)
    first = next(rows)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(jobs), *first.shape)}
    with data.replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for row in chain([first], rows):
                file.write(row.tobytes())


def write_captions(sampler: Sampler, jobs: list, folder: Path) -> None:
    """captions.jsonl of the pictures of a text network; with those of a call with a larger -n."""
    file, known = folder / "captions.jsonl", {}
    if file.is_file():
        known = data.read_captions(file.read_bytes(), str(file))
    known |= {name: [sampler.names[k]] for name, _, k in jobs}
    lines = [json.dumps({"image_file": k, "captions": v}) for k, v in known.items()]
    data.write_text(file, "\n".join(lines) + "\n")


def draw_grid(sampler: Sampler, conditions: list[int], steps: list[int], seed: int, path: Path):
    """A row per number of steps, a column per condition, all rows from the same noise."""
    one = path.suffix == ".png" and not path.is_dir()
    require(one, f"--out {path}: a grid is one .png file; or give -n for many")
    require(len(conditions) <= 100, f"{len(conditions)} columns are too many for a grid; give -n")
    rows = np.stack([sampler.draw(range(len(conditions)), conditions, n, seed) for n in steps])
    names = [sampler.names[k] for k in conditions]
    labels = [f"{n} step" + "s" * (n > 1) for n in steps]
    picture = data.grid(rows, scale=max(1, 64 // rows.shape[2]), names=names, row_names=labels)
    if data.ranks()[0] == 0:
        with explain(OSError, f"--out {path}: cannot be written; give another"):
            data.make_folder(path.parent)
            data.write_picture(picture, path)


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
    add("--out", type=Path, help="grid PNG (default samples.png); folder for -n, or an .npz of ADM")
    add("--batch", type=positive, default=100, help="pictures per pass (default 100)")
    add("--size", type=positive, nargs=2, metavar=("H", "W"), help="pixels (default: as trained)")
    add("--autoencoder", help="folder or hub name (default: what the checkpoint names)")
    add("--text_encoder", help="folder or hub name (default: what the checkpoint names)")
    add("--device", default="auto", help="auto (default: cuda, else cpu), cuda, mps or cpu")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of attention\n"
        "and MLP; auto (default) is bf16 on GPUs that have it in hardware, else fp32")
    return p.parse_args(argv)  # fmt: skip


def class_numbers(asked: list[str] | None, known: tuple[str, ...], many: bool) -> list[int]:
    """Class numbers for --classes, each a name, exact or else in other case, or a number. Default:
    the first ten, with `many` all."""
    if asked is None:
        return list(range(len(known) if many else min(10, len(known))))
    numbers = {str(i): i for i in range(len(known))}
    numbers |= {known[i].casefold(): i for i in reversed(range(len(known)))}  # of equals, the first
    numbers |= {known[i]: i for i in reversed(range(len(known)))}
    found = [numbers.get(text, numbers.get(text.casefold())) for text in asked]
    for text, k in zip(asked, found):
        require(k is not None, f"--classes {text}: classes are 0 to {len(known) - 1}, or names: "
                f"{', '.join(known[:12])}")  # fmt: skip
    return found


def read_prompts(file: Path) -> list[str]:
    with explain(OSError, f"--prompts_file {file}: cannot be read; give another file"):
        raw = file.read_bytes()
    return data.read_text(raw, f"--prompts_file {file}").removesuffix("\n").split("\n")


def resized(sampler: Sampler, size: list[int]) -> Spec:
    """The spec for pictures of another size, (height, width) in pixels, than trained at."""
    spec, multiple = sampler.spec, sampler.spec.factor * sampler.model.patch
    nearest = [max(1, round(side / multiple)) * multiple for side in size]
    require(nearest == size, f"--size {size[0]} {size[1]}: sides must be multiples of {multiple}; the "
            f"nearest is {nearest[0]} {nearest[1]}")  # fmt: skip
    return replace(spec, shape=(spec.shape[0], size[0] // spec.factor, size[1] // spec.factor))


def main(argv=None):
    a = parse_arguments(argv)
    path, device = a.checkpoint or newest(), data.open_device(a.device)
    many = a.out and a.out.suffix not in (".png", ".jpg")
    require(many or not a.num, f"--out {a.out}: -n writes many pictures; give a folder, or a file .npz")
    require(not (a.prompts and a.prompts_file), "--prompts and --prompts_file: give one of them")
    prompts = read_prompts(a.prompts_file) if a.prompts_file else a.prompts
    sampler = open_sampler(
        path, device, a.precision, prompts=prompts, autoencoder=a.autoencoder,
        text_encoder=a.text_encoder, guidance=a.guidance, interval=a.interval,
        strict=a.strict_interval, stochastic=a.stochastic, shift=a.shift,
    )  # fmt: skip
    if a.size:
        sampler.spec = resized(sampler, a.size)
    step, guidance = sampler.config["step"], sampler.options["guidance"]
    what = "released weights" if step is None else f"weights of step {step}"
    data.say(f"{path}: {what}, guidance {guidance:g}")
    if sampler.spec.text:
        require(a.classes is None, f"--classes: {path} was trained on texts; give --prompts")
        conditions = list(range(len(sampler.names)))
    else:
        conditions = class_numbers(a.classes, sampler.names, a.num is not None)
    names = [sampler.names[k] for k in conditions]
    if a.stochastic and min(a.steps) < 50:
        data.note(f"--stochastic {a.stochastic:g} is biased at few steps (variance +11% at 4)")
    if not a.num:
        out = a.out or Path("samples.png")
        draw_grid(sampler, conditions, a.steps, a.seed, out)
        data.say(f"{out}: rows of {a.steps} steps, columns {', '.join(names)}")
        return
    sampler.record["conditions"] = data.digest(names)
    jobs, npz = numbered(a.num, conditions), a.out.suffix == ".npz"
    require(not npz or data.ranks()[1] == 1, f"--out {a.out}: with several ranks give a folder; then "
            "the same command in one process with the .npz")  # fmt: skip
    for steps in a.steps:
        folder = a.out.with_suffix("") if npz else a.out
        folder = folder / f"steps_{steps}" if len(a.steps) > 1 else folder
        write_pictures(sampler, jobs, steps, a.seed, a.batch, folder)
        if sampler.spec.text and data.ranks()[0] == 0:
            write_captions(sampler, jobs, folder)
        data.say(f"{folder}: {len(jobs)} pictures at {steps} steps")
        if npz:
            file = folder.with_name(folder.name + ".npz")
            write_npz(folder, jobs, file)
            data.say(f"{file}: the same as one array")


if __name__ == "__main__":
    data.command(main)
