"""Does a network trained on the embedded emoji follow prompts, also names that it never saw? By hand:

    python tests/emoji_captions.py runs/emoji --num 400 --steps 1 2 4 8 32 --guidance 1.5

Each sampled picture is compared with all real ones in 8 x 8 cells. Columns:
name    the nearest real picture bears the prompt's name; ten: one of the ten nearest does
colour  the dominant colour is the one that the name says, of the n names that say one
group   the nearest real picture is of the prompt's group (faces, flags, ...)
Rows "random caption" and "real" are floor and ceiling, "nearest other" the best of another emoji.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import evaluate  # noqa: E402
import sample  # noqa: E402

COLOURS = {  # what most pixels of such a picture look like, here those of the font's hearts
    "red": (244, 67, 54), "orange": (255, 152, 0), "yellow": (255, 204, 50), "green": (124, 179, 66),
    "blue": (25, 118, 210), "purple": (171, 71, 188), "pink": (255, 148, 189), "brown": (183, 109, 84),
    "black": (66, 66, 66), "grey": (147, 147, 147), "white": (224, 224, 224),
}  # fmt: skip


def cells(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (n, H, W, 3) -> (n, 192): the mean colours of 8 x 8 cells."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return F.adaptive_avg_pool2d(x, 8).flatten(1)


def dominant_colours(pictures: np.ndarray) -> list[str]:
    """The word of COLOURS that is nearest to most pixels, the near-white background left out."""
    x = torch.from_numpy(pictures).float().flatten(1, 2)                        # (n, H W, 3)
    nearest = torch.cdist(x, torch.tensor(list(COLOURS.values())).float()).argmin(2)
    shown = (x.amin(2) < 240).unsqueeze(2)
    votes = (F.one_hot(nearest, len(COLOURS)) * shown).sum(1)                   # (n, colours)
    most, word = votes.max(1)
    return [list(COLOURS)[k] if n else "white" for n, k in zip(most.tolist(), word.tolist())]


def share(hits: list[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


def caption_scores(pictures: np.ndarray, own: list[int], real, records, others=False) -> dict:
    """How well pictures agree with the captions of the real pictures number `own`.

    real     (m, 192) cells of all real pictures; records: name and group of each
    others   the nearest may not be the own one
    """
    distance = torch.cdist(cells(pictures), real)
    if others:
        distance[torch.arange(len(own)), torch.tensor(own)] = torch.inf
    nearest = distance.topk(10, largest=False).indices.tolist()
    names, groups = zip(*records)
    said = [set(re.findall(r"\w+", names[i].lower())) & COLOURS.keys() for i in own]
    agree = [colour in words for colour, words in zip(dominant_colours(pictures), said) if words]
    return {
        "name": share([names[few[0]] == names[i] for few, i in zip(nearest, own)]),
        "ten": share([names[i] in [names[k] for k in few] for few, i in zip(nearest, own)]),
        "colour": share(agree),
        "n": len(agree),
        "group": share([groups[few[0]] == groups[i] for few, i in zip(nearest, own)]),
    }


def real_pictures():
    """All emoji: pictures (n, 32, 32, 3), (name, group) of each, and the indices of either part."""
    info = json.loads((data.DEMO / "emoji.json").read_text("utf-8"))
    pictures, records, parts = [], [], {}
    for part, held_out in (("seen", False), ("held out", True)):
        source = data.open_emoji(held_out)
        batch = source.read(np.arange(len(source)), np.random.default_rng(0))
        pictures.append(batch.x.permute(0, 2, 3, 1).numpy())
        parts[part] = range(len(records), len(records) + len(source))
        known = [(name, group) for name, _, group in info["name, emoji, group"]]
        records += [r for r in known if (r[0] in info["held_out"]) == held_out]
    return np.concatenate(pictures), records, parts


@torch.no_grad()
def measure(checkpoint: Path, num: int, steps: list[int], guidance: float | None, batch: int) -> list[dict]:
    pictures, records, parts = real_pictures()
    real, rows = cells(pictures), []

    def add(name, k, drawn, own, others=False):
        rows.append({"row": name, "steps": k} | caption_scores(drawn, own, real, records, others))
        evaluate.print_row(rows[-1], heads=len(rows) == 1)

    for part, span in parts.items():
        own = [span[i] for i in np.linspace(0, len(span) - 1, min(len(span), num)).astype(int)]
        half = len(own) // 2
        add(f"{part}: random caption", None, pictures[own[half:] + own[:half]], own)
        prompts = [records[i][0] for i in own]
        sampler = sample.open_sampler(checkpoint, data.open_device(), prompts=prompts, guidance=guidance)
        for k in steps:
            jobs = [range(start, min(start + batch, num)) for start in range(0, num, batch)]
            drawn = [sampler.draw(job, [i % len(own) for i in job], k, 0) for job in jobs]
            add(part, k, np.concatenate(drawn), [own[i % len(own)] for i in range(num)])
        add(f"{part}: nearest other", None, pictures[own], own, others=True)
        add(f"{part}: real", None, pictures[own], own)
    record = sampler.record | {"checkpoint": str(checkpoint), "n": num, "captions": rows}
    evaluate.append_record(evaluate.results_folder(checkpoint) / "captions.jsonl", record)
    return rows


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="default: the newest run")
    parser.add_argument("--num", type=data.positive_int, default=400, help="pictures a row")
    parser.add_argument("--steps", type=data.positive_int, nargs="+", default=[1, 2, 4, 8, 32])
    parser.add_argument("--guidance", type=float, help="default: the checkpoint's")
    parser.add_argument("--batch", type=data.positive_int, default=100)
    a = parser.parse_args(argv)
    measure(a.checkpoint or sample.newest(), a.num, a.steps, a.guidance, a.batch)


if __name__ == "__main__":
    data.command(main)
