"""Pictures of the text benchmarks: where their scorers look for them, from a tiny network."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIG
from oracle import lively
from PIL import Image

import data
import sample

TEXTS = ["two red apples", "a \u7ea2 bird\nin the sky", ""]


@pytest.fixture
def draw(tmp_path):
    """The command line that draws a benchmark with a text network on the encoder "bytes"."""
    sizes = dict(channels=3, patch=2, depth=1, width=32, heads=2, adaln=8, caption=128)
    spec = data.DataSpec("pixels", (3, 4, 4), 100.0, 50.0, text=data.BYTES)
    config = CONFIG | {"model": sizes, "data": spec.to_json()}
    state = lively(**sizes | {"classes": None}).state_dict()
    sample.save(tmp_path / "t.safetensors", state, config)
    base = ["--checkpoint", tmp_path / "t.safetensors", "--device", "cpu", "--steps", 2]

    def command(kind, source, *more):
        return [*map(str, [*base, "--bench", kind, "--prompts", source, *more])]

    return command


def geneval(folder: Path) -> Path:
    lines = [json.dumps({"tag": "counting", "prompt": text}) for text in TEXTS]
    (folder / "evaluation_metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "evaluation_metadata.jsonl"


def dpg(folder: Path) -> Path:
    (folder / "prompts").mkdir()
    for name, text in zip("cab", TEXTS):
        (folder / "prompts" / f"{name}.txt").write_text(text + "\n", "utf-8")
    (folder / "prompts" / "notes.md").write_text("no prompt")
    return folder / "prompts"


def mjhq(folder: Path) -> Path:
    kinds = ("food", "animals", "food")
    table = {f"k{i}": {"category": kinds[i], "prompt": text} for i, text in enumerate(TEXTS)}
    (folder / "meta_data.json").write_text(json.dumps(table))
    return folder / "meta_data.json"


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


SAMPLES = [f"0000{i}/samples/0000{k}.png" for i in range(3) for k in range(4)]
BESIDE = [f"0000{i}/{name}" for i in range(3) for name in ("grid.png", "metadata.jsonl")]
FILES = {
    "geneval": {*SAMPLES, *BESIDE},
    "dpg": {"a.png", "b.png", "c.png"},
    "mjhq": {"food/k0.jpg", "animals/k1.jpg", "food/k2.jpg"},
}


@pytest.mark.parametrize("kind, write", [("geneval", geneval), ("dpg", dpg), ("mjhq", mjhq)])
def test_a_benchmark_is_laid_out_for_its_scorer_and_goes_on_where_it_stopped(
    draw, tmp_path, kind, write
):
    out = tmp_path / "out"
    argv = draw(kind, write(tmp_path), "--out", out, "--batch", 5)
    sample.main(argv)
    assert files(out) == FILES[kind] | {"captions.jsonl"}
    pictures = sorted(p for p in out.rglob("*") if p.suffix in (".png", ".jpg"))
    before = {p: (p.stat().st_mtime_ns, np.asarray(Image.open(p)).astype(int)) for p in pictures}
    gone = pictures[-1]
    gone.unlink()
    sample.main(argv)
    again = {p: (p.stat().st_mtime_ns, np.asarray(Image.open(p)).astype(int)) for p in pictures}
    assert [p for p in pictures if again[p][0] != before[p][0]] == [gone]
    assert np.abs(again[gone][1] - before[gone][1]).max() <= 1


def single(tmp_path, prompts, n):
    """The pictures that noise 0 to n - 1 gives for prompts in equal runs, int (n, H, W, 3)."""
    path = tmp_path / "t.safetensors"
    sampler = sample.open_sampler(path, data.open_device("cpu"), prompts=prompts)
    conditions = [i * len(prompts) // n for i in range(n)]
    return sampler.draw(range(n), conditions, 2, 0).astype(int)


def mosaic(four):
    return np.concatenate([np.concatenate(four[:2], 1), np.concatenate(four[2:], 1)])


def near(path, expected, bound=1):
    assert np.abs(np.asarray(Image.open(path)) - expected).max() <= bound


def test_geneval_has_four_pictures_their_grid_and_the_original_line(draw, tmp_path):
    source, out = geneval(tmp_path), tmp_path / "out"
    sample.main(draw("geneval", source, "--out", out))
    drawn = single(tmp_path, TEXTS, 12)
    for i, line in enumerate(source.read_text().splitlines()):
        for k in range(4):
            near(out / f"0000{i}/samples/0000{k}.png", drawn[4 * i + k])
        near(out / f"0000{i}/grid.png", mosaic(drawn[4 * i : 4 * i + 4]))
        assert (out / f"0000{i}/metadata.jsonl").read_text() == line


def test_dpg_has_a_mosaic_of_four_by_the_name_of_the_prompt(draw, tmp_path):
    sample.main(draw("dpg", dpg(tmp_path), "--out", tmp_path / "out"))
    drawn = single(tmp_path, [TEXTS[1], TEXTS[2], TEXTS[0]], 12)  # files a, b, c
    for i, name in enumerate("abc"):
        near(tmp_path / "out" / f"{name}.png", mosaic(drawn[4 * i : 4 * i + 4]))


def test_mjhq_has_a_picture_by_category_and_key(draw, tmp_path):
    sample.main(draw("mjhq", mjhq(tmp_path), "--out", tmp_path / "out", "--size", 32, 32))
    with Image.open(tmp_path / "out/food/k2.jpg") as picture:
        assert picture.format == "JPEG" and picture.size == (32, 32)
    lines = (tmp_path / "out/captions.jsonl").read_text().splitlines()
    names = ["food/k0.jpg", "animals/k1.jpg", "food/k2.jpg"]
    expected = [{"image_file": file, "captions": [text]} for file, text in zip(names, TEXTS)]
    assert [json.loads(line) for line in lines] == expected


@pytest.mark.parametrize(
    "kind, text",
    [
        ("geneval", "no json"),
        ("geneval", '{"tag": "counting"}'),
        ("geneval", "[1]"),
        ("geneval", ""),
        ("geneval", None),
        ("dpg", "a file, not a folder"),
        ("dpg", None),
        ("mjhq", "no json"),
        ("mjhq", "[1]"),
        ("mjhq", '{"k": {"prompt": "a"}}'),
        ("mjhq", '{"k": {"prompt": "a", "category": "../b"}}'),
        ("mjhq", '{"k": {"prompt": "a", "category": "/b"}}'),
        ("mjhq", "{}"),
    ],
)
def test_wrong_prompts_are_refused_in_one_line(draw, tmp_path, refused, kind, text):
    source = tmp_path / "prompts"
    if text is not None:
        source.write_text(text)
    message = refused(sample.main, *draw(kind, source, "--out", tmp_path / "out"))
    assert message.startswith(f"error: --prompts {source}: ") and not (tmp_path / "out").exists()


def test_a_benchmark_takes_one_source_of_prompts_and_a_folder(draw, refused):
    assert "give --out FOLDER" in refused(sample.main, *draw("dpg", "x"))
    for more in (["-n", 2], ["another"]):
        message = refused(sample.main, *draw("dpg", "x", *more, "--out", "y"))
        assert "--bench dpg: give --prompts FILE (dpg: FOLDER) alone" in message
