"""demo/benchmarks.py: pictures where the scorers look for them, from a tiny network."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIG
from launch import shell
from oracle import lively
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))
import benchmarks
import data
import sample

SCRIPT = Path(benchmarks.__file__)
TEXTS = ["two red apples", "a \u7ea2 bird\nin the sky", ""]
SIZES = dict(channels=3, patch=2, depth=1, width=32, heads=2, adaln=8, caption=128)


@pytest.fixture
def argv(tmp_path):
    """Flags of a text network on the encoder "word_hashes"."""
    spec = data.Spec("pixels", (3, 4, 4), 100.0, 50.0, text=data.HASHES)
    config = CONFIG | {"model": SIZES, "data": spec.to_json()}
    state = lively(**SIZES | {"classes": None}).state_dict()
    sample.save(tmp_path / "t.safetensors", state, config)
    flags = ["--checkpoint", tmp_path / "t.safetensors", "--device", "cpu", "--steps", 2]
    return [*map(str, flags), "--out", str(tmp_path / "out")]


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


def mosaic(four):
    return np.concatenate([np.concatenate(four[:2], 1), np.concatenate(four[2:], 1)])


def expected(kind: str, checkpoint) -> dict[str, np.ndarray]:
    """Each file and its picture: noise 0, 1, 2, ... and the prompts, each four times but for mjhq."""
    order = [1, 2, 0] if kind == "dpg" else [0, 1, 2]  # its files, a b c, by name
    copies = 1 if kind == "mjhq" else 4
    sampler = sample.open_sampler(checkpoint, "cpu", prompts=[TEXTS[i] for i in order])
    drawn = sampler.draw(range(3 * copies), np.repeat(range(3), copies).tolist(), 2, 0)
    four = [drawn[copies * i : copies * i + copies] for i in range(3)]
    if kind == "mjhq":
        return dict(zip(("food/k0.jpg", "animals/k1.jpg", "food/k2.jpg"), drawn))
    if kind == "dpg":
        return {f"{name}.png": mosaic(part) for name, part in zip("abc", four)}
    found = {f"0000{i}/samples/0000{k}.png": four[i][k] for i in range(3) for k in range(4)}
    return found | {f"0000{i}/grid.png": mosaic(four[i]) for i in range(3)}


@pytest.mark.parametrize("write", [geneval, dpg, mjhq])
def test_a_benchmark_is_laid_out_for_its_scorer_and_goes_on_where_it_stopped(argv, tmp_path, write):
    out, kind, source = tmp_path / "out", write.__name__, write(tmp_path)
    argv = [kind, "--prompts", str(source), *argv, "--batch", "5"]
    benchmarks.main(argv)
    pictures = expected(kind, tmp_path / "t.safetensors")
    lines = {f"0000{i}/metadata.jsonl" for i in range(3)} if kind == "geneval" else set()
    there = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert there == {*pictures, *lines, "captions.jsonl"}
    for name, picture in pictures.items():
        found = np.asarray(Image.open(out / name)).astype(int)
        if name.endswith(".jpg"):
            data.write_picture(picture, tmp_path / "same.jpg")
            picture = np.asarray(Image.open(tmp_path / "same.jpg"))
        assert np.abs(found - picture).max() <= (8 if name.endswith(".jpg") else 1), name
    if kind == "geneval":  # the original lines, to the byte
        found = [(out / f"0000{i}/metadata.jsonl").read_bytes() for i in range(3)]
        assert found == source.read_bytes().splitlines()
    before = {name: (out / name).stat().st_mtime_ns for name in pictures}
    gone = "00001/samples/00002.png" if kind == "geneval" else list(pictures)[1]
    (out / gone).unlink()
    benchmarks.main(argv)
    assert [n for n in pictures if (out / n).stat().st_mtime_ns != before[n]] == [gone]


def test_captions_name_each_picture_and_other_prompts_do_not_mix(argv, tmp_path, refused):
    benchmarks.main(["mjhq", "--prompts", str(mjhq(tmp_path)), *argv, "--size", "32", "16"])
    with Image.open(tmp_path / "out/food/k2.jpg") as picture:
        assert picture.format == "JPEG" and picture.size == (16, 32)
    lines = map(json.loads, (tmp_path / "out/captions.jsonl").read_text().splitlines())
    names = ["food/k0.jpg", "animals/k1.jpg", "food/k2.jpg"]
    assert {line["image_file"]: line["captions"] for line in lines} == {
        name: [text] for name, text in zip(names, TEXTS)
    }
    for kind, prompts in (("mjhq", mjhq(tmp_path)), ("dpg", dpg(tmp_path))):
        again = [kind, "--prompts", prompts, *argv, "--size", 32, 16]
        benchmarks.main([*map(str, again)])
        if prompts.is_dir():
            (prompts / "a.txt").write_text("others")
        else:
            prompts.write_text(prompts.read_text().replace("apples", "pears"))
        assert "conditions" in refused(benchmarks.main, *again)


def test_two_ranks_in_another_folder_draw_what_one_process_does(argv, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = ["geneval", "--prompts", geneval(tmp_path), *argv, "--batch", 4]
    monkeypatch.setenv("RANK", "0")
    benchmarks.main([*map(str, argv)])
    assert len(list((tmp_path / "out").glob("*/grid.png"))) == 2  # 0 and 2; the last rank finds all
    code, text = shell([sys.executable, SCRIPT, *argv], cwd=tmp_path, env=os.environ | {"RANK": "1"})
    assert code == 0, text
    for name, picture in expected("geneval", tmp_path / "t.safetensors").items():
        found = np.asarray(Image.open(tmp_path / "out" / name)).astype(int)
        assert np.abs(found - picture).max() <= 1, name


@pytest.mark.parametrize(
    "kind, text",
    [
        ("geneval", "no json"), ("geneval", '{"tag": "counting"}'), ("geneval", "[1]"),
        ("geneval", '{"prompt": 3}'), ("geneval", ""), ("geneval", None),
        ("dpg", "a file, not a folder"), ("dpg", None),
        ("mjhq", "no json"), ("mjhq", "[1]"), ("mjhq", '{"k": {"prompt": "a"}}'), ("mjhq", "{}"),
        ("mjhq", '{"k": {"prompt": "a", "category": "../b"}}'),
        ("mjhq", '{"k": {"prompt": "a", "category": "/b"}}'),
    ],
)  # fmt: skip
def test_wrong_prompts_are_refused_and_leave_nothing(argv, tmp_path, refused, kind, text):
    source = tmp_path / "prompts"
    if text is not None:
        source.write_text(text)
    assert "--prompts" in refused(benchmarks.main, kind, "--prompts", source, *argv)
    assert not list(tmp_path.glob("out*"))
