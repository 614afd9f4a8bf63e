"""Pictures of the paper's text benchmarks, laid out as their scorers read them.

    python demo/benchmarks.py geneval --prompts evaluation_metadata.jsonl --out geneval --steps 8
    python demo/benchmarks.py dpg --prompts ELLA/dpg_bench/prompts --out dpg --size 1024 1024
    python demo/benchmarks.py mjhq --prompts MJHQ-30K/meta_data.json --out mjhq --guidance 1.5

torchrun shares the pictures; run the same again to go on.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import sample
from data import explain, require


def read_benchmark(kind: str, source: Path) -> tuple[list[str], list[tuple], list[bytes]]:
    """Prompts, jobs of `sample.write_pictures`, and the lines of geneval; four pictures a prompt,
    mjhq one.

    geneval  evaluation_metadata.jsonl, {"prompt", ...} a line: 00000/samples/00000.png to 00003.png
    dpg      a folder of .txt files: NAME.0.png to NAME.3.png
    mjhq     meta_data.json, {key: {"category", "prompt"}}: category/key.jpg
    """
    lines, where = [], f"--prompts {source}"
    wrong = (OSError, ValueError, KeyError, TypeError, AttributeError)
    with explain(wrong, f"{where}: not the prompts of {kind}; give its own file"):
        if kind == "geneval":
            lines = [line for line in source.read_bytes().splitlines() if line.strip()]
            prompts = [json.loads(line)["prompt"] for line in lines]
            files = [f"{i:05}/samples/{k:05}.png" for i in range(len(lines)) for k in range(4)]
        elif kind == "dpg":
            texts = sorted(source.glob("*.txt"))
            prompts = [data.read_text(file.read_bytes(), f"--prompts {file}") for file in texts]
            prompts = [text.removesuffix("\n") for text in prompts]
            files = [f"{file.stem}.{k}.png" for file in texts for k in range(4)]
        else:
            table = json.loads(source.read_bytes())
            prompts = [entry["prompt"] for entry in table.values()]
            files = [f"{entry['category']}/{key}.jpg" for key, entry in table.items()]
    fits = prompts and all(isinstance(text, str) for text in prompts)
    inside = all(".." not in Path(file).parts and not Path(file).is_absolute() for file in files)
    require(fits and inside, f"{where}: no prompts of {kind}, or files outside of --out; give its own")
    return prompts, [(file, i, i * len(prompts) // len(files)) for i, file in enumerate(files)], lines


def write_mosaic(files: list[Path], mosaic: Path) -> bool:
    """Four pictures as one, where all are there and it is not; whether it was made."""
    if mosaic.is_file() or not all(file.is_file() for file in files):
        return False
    pictures = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    data.make_folder(mosaic.parent)
    data.write_picture(data.grid(pictures.reshape(2, 2, *pictures.shape[1:]), gap=0), mosaic)
    return True


def finish(kind: str, drawn: Path, out: Path, jobs: list, lines: list[bytes]) -> list[tuple]:
    """geneval: grid.png and the line as metadata.jsonl of each prompt; dpg: the mosaic NAME.png. Every
    rank does this at its end, so the last one finds all. Returns the jobs of the scorer's pictures."""
    if kind == "mjhq":
        return jobs
    found = []
    for i in range(0, len(jobs), 4):
        files = [drawn / file for file, *_ in jobs[i : i + 4]]
        name = files[0].name.removesuffix(".0.png") + ".png"
        prompt = files[0].parent.parent
        mosaic = out / name if kind == "dpg" else prompt / "grid.png"
        if write_mosaic(files, mosaic) and kind == "geneval":
            (prompt / "metadata.jsonl").write_bytes(lines[i // 4])
        found.append((name, *jobs[i][1:]))
    return found if kind == "dpg" else jobs


def parse_arguments(argv=None):
    style = argparse.RawTextHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=style)
    add, positive = p.add_argument, data.positive_int
    add("kind", choices=("geneval", "dpg", "mjhq"))
    add("--prompts", type=Path, required=True, help="the benchmark's file of prompts; dpg: its folder")
    add("--out", type=Path, required=True, help="folder of the pictures")
    add("--checkpoint", help="run folder, file or OWNER/REPO/FILE on the hub (default: newest run)")
    add("--steps", type=positive, default=8, help="default 8")
    add("--guidance", type=float, help="default: the checkpoint's")
    add("--interval", type=data.share, nargs=2, metavar=("LOW", "HIGH"), help="of the guidance")
    add("--strict_interval", action=argparse.BooleanOptionalAction, help="without its ends")
    add("--size", type=positive, nargs=2, metavar=("H", "W"), help="pixels (default: as trained)")
    add("--seed", type=data.natural, default=0, help="of the noise (default 0)")
    add("--batch", type=positive, default=100, help="pictures per pass (default 100)")
    add("--autoencoder", help="folder or hub name (default: what the checkpoint names)")
    add("--text_encoder", help="folder or hub name (default: what the checkpoint names)")
    add("--device", default="auto", help="auto (default: cuda, else cpu), cuda, mps or cpu")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="as of sample.py")
    return p.parse_args(argv)


def main(argv=None) -> None:
    a = parse_arguments(argv)
    prompts, jobs, lines = read_benchmark(a.kind, a.prompts)
    sampler = sample.open_sampler(
        a.checkpoint or sample.newest(), data.open_device(a.device), a.precision, prompts=prompts,
        autoencoder=a.autoencoder, text_encoder=a.text_encoder, guidance=a.guidance,
        interval=a.interval, strict=a.strict_interval,
    )  # fmt: skip
    if a.size:
        sampler.spec = sample.resized(sampler, a.size)
    sampler.record["conditions"] = data.digest(prompts)
    drawn = a.out.with_name(a.out.name + "_parts") if a.kind == "dpg" else a.out
    sample.write_pictures(sampler, jobs, a.steps, a.seed, a.batch, drawn)
    found = finish(a.kind, drawn, a.out, jobs, lines)
    if data.ranks()[0] == 0:
        data.make_folder(a.out)
        sample.write_captions(sampler, found, a.out)
    data.say(f"{a.out}: {len(jobs)} pictures of {len(prompts)} prompts at {a.steps} steps")


if __name__ == "__main__":
    data.command(main)
