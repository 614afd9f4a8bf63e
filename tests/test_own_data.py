"""python train.py --data FOLDER: pictures as people have them, with no flag but the folder."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from launch import ENV, ROOT, log, no_picture, shell, weights
from PIL import Image

import data
import evaluate
import sample
import train

SHORT = "--steps 6 --log_every 2 --batch 8 --size demo --device cpu --sample_every 0".split()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Runs and pictures lie in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def own(monkeypatch):
    """Train in this process as `python train.py` with these flags would; returns its folder."""
    monkeypatch.setattr(train.signal, "signal", lambda *args: None)
    monkeypatch.setattr(train, "sample_grid", no_picture)
    monkeypatch.setattr(train, "draw_curve", no_picture)

    def run(*flags, short=SHORT):
        argv = [*short, *map(str, flags)]
        train.main(argv)
        return train.Path("runs") / train.parse_config(argv)[0].name

    return run


def paint(file, size, colour, mode="RGB"):
    """A picture of one colour with a dark corner at the left."""
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new(mode, size, colour)
    picture.paste(Image.new(mode, (size[0] // 4, size[1] // 4)), (0, 0))
    picture.save(file)


@pytest.fixture
def classes(tmp_path):
    """Class folders as they are found: mixed sizes, grey, and RGBA with a soft shadow."""
    root = tmp_path / "holiday pictures"
    sizes = [(90, 60), (61, 100), (64, 64), (33, 47), (200, 70)]
    for i in range(10):
        paint(root / "sea" / f"{i}.png", sizes[i % 5], (20, 60 + i, 200))
        paint(root / "hills" / f"{i}.jpg", sizes[(i + 2) % 5], (40, 160 + i, 30))
    paint(root / "hills" / "grey.png", (80, 80), 128, "L")
    shadow = np.zeros((70, 70, 4), np.uint8)  # black, ever more transparent
    shadow[..., 3] = np.linspace(0, 90, 70).astype(np.uint8)
    Image.fromarray(shadow, "RGBA").save(root / "sea" / "shadow.png")
    return root


@pytest.fixture
def with_a_cut_picture(classes):
    whole = (classes / "hills" / "3.jpg").read_bytes()
    (classes / "hills" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return classes


def test_the_readme_line_trains_on_class_folders_and_samples(with_a_cut_picture, tmp_path):
    """As a shell starts it, with no flag that makes it fit; only the cut picture is complained of."""
    argv = [sys.executable, ROOT / "train.py", "--data", with_a_cut_picture, "--name", "mine"]
    code, text = shell([*argv, "--steps", 3, "--size", "demo", "--batch", 8])
    assert code == 0, text
    assert re.search(r"chosen .*64x64 pictures, --patch 8 = 64 tokens, --batch 8", text), text
    assert text.count("cut.jpg is skipped") == 1 and "hills 12" in text and "sea 11" in text
    spec = json.loads((tmp_path / "runs/mine/checkpoints/step_00000003/config.json").read_text())[
        "data"
    ]
    assert spec["shape"] == [3, 64, 64] and spec["classes"] == ["hills", "sea"]
    assert (tmp_path / "runs/mine/samples/step_00000003.png").is_file()
    sample.main(["--classes", "sea", "Hills", "--steps", "1", "--device", "cpu"])
    with Image.open("samples.png") as grid:
        assert grid.width >= 2 * 64


@pytest.mark.parametrize("side, patch", [(64, 8), (60, 10), (32, 8), (30, 10), (28, 7)])
def test_side_and_patch_fit_each_other(classes, own, side, patch, capsys):
    """Without --name the run has the folder's; what was chosen is said with its reason."""
    run = own("--data", classes, "--side", side, "--steps", 1, "--batch", 2)
    assert run.name == "holiday pictures" and sample.load(run)[0].patch == patch
    tokens = (side // patch) ** 2
    assert f"{side}x{side} pictures, --patch {patch} = {tokens} tokens" in capsys.readouterr().out


def test_the_batch_that_is_chosen_suits_the_device():
    spec = data.DataSpec("pixels", (3, 64, 64), classes=("a", "b"))
    cfg, _ = train.parse_config(["--data", "somewhere"])
    assert train.fill_in(cfg, spec, torch.device("cpu")).batch == 32
    assert train.fill_in(cfg, spec, torch.device("cuda")).batch == 256
    few = data.DataSpec("pixels", (3, 28, 28), classes=("a", "b"))
    assert train.fill_in(cfg, few, torch.device("cpu")).batch == 64


def test_a_patch_that_does_not_fit_names_those_that_do(classes, refused, tmp_path):
    said = refused(train.main, "--data", classes, "--name", "mine", "--patch", 7)
    assert "--patch 7: 64x64 must be a multiple of it; one of 1, 2, 4, 8, 16, 32, 64 fits" in said
    assert not (tmp_path / "runs").exists()


def test_transparent_pictures_train_on_white(classes, own):
    run = own("--data", classes)
    (step,) = train.checkpoints(run)
    spec = data.DataSpec.from_json(json.loads((step / "config.json").read_text())["data"])
    source = data.open_data(str(classes))
    shadow = [p.name for p in data.find_pictures(classes).pictures].index("sea/shadow.png")
    x = source.read([shadow], np.random.default_rng(0)).x * spec.std + spec.mean
    assert x.min() > 150 and x.max() > 250  # never near its black


def test_pictures_are_turned_as_their_cameras_say(tmp_path):
    """In training and as a reference alike."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter: the dark corner at the left is then at the right
    picture = Image.new("RGB", (32, 32), "white")
    picture.paste(Image.new("RGB", (16, 16)), (0, 0))
    (tmp_path / "turned" / "a").mkdir(parents=True)
    picture.save(tmp_path / "turned" / "a" / "0.jpg", exif=exif, quality=95)
    source = data.open_data(str(tmp_path / "turned"), side=32, mirror=False)
    trained = source.read([0], np.random.default_rng(0)).x[0]
    compared = evaluate.open_pictures(str(tmp_path / "turned"), None)[0].float() - 128
    for x in (trained, compared):
        assert x[:, 4:12, 20:28].max() < 0 < x[:, 4:12, 4:12].min()


def test_no_mirror_leaves_left_and_right_alone(classes, own):
    left = lambda x: bool(
        x[0, :, :8, :8].mean() < x[0, :, :8, -8:].mean()
    )  # where the dark corner is
    for flag, want in (("--no-mirror", {True}), ("--mirror", {True, False})):
        run = own("--data", classes, flag, "--name", flag.strip("-"))
        config = json.loads(next(run.glob("checkpoints/*/config.json")).read_text())
        assert config["train"]["mirror"] is (flag == "--mirror")
        source = data.open_data(str(classes), mirror=config["train"]["mirror"])
        draws = [left(source.read([14], np.random.default_rng(seed)).x) for seed in range(30)]
        assert set(draws) == want


@pytest.fixture
def captioned(tmp_path):
    """As img2dataset leaves them: 000000.jpg with 000000.txt; one without text, one with .json."""
    root = tmp_path / "laion"
    for i in range(12):
        paint(root / f"{i:06}.jpg", (48 + 7 * i, 64), (20 * i, 100, 255 - 20 * i))
        if i < 10:
            (root / f"{i:06}.txt").write_text(f"colour number {i}\n")
    (root / "000010.json").write_text(json.dumps({"caption": "the tenth", "url": "somewhere"}))
    return root


def test_captions_beside_pictures_train_a_text_network(captioned, own, capsys):
    run = own("--data", captioned)
    heard = capsys.readouterr()
    assert run.name == "laion" and "11 pictures with 11 captions" in heard.out
    assert "1 of 12 pictures have no text, left out" in heard.err
    model, _, config = sample.load(run)
    assert model.classes is None and config["data"]["text"]["encoder"] == "bytes"
    sample.main(
        ["--prompts", "colour number 3", "", "--steps", "2", "--out", "a.png", "--device", "cpu"]
    )
    assert train.Path("a.png").is_file()


def test_what_sampling_writes_can_be_trained_on(captioned, own):
    """-n with captions leaves captions.jsonl in the one format that is read."""
    run = own("--data", captioned)
    flags = ["--checkpoint", run, "-n", 4, "--steps", 1, "--out", "drawn", "--device", "cpu"]
    sample.main([*map(str, flags), "--prompts", "red", "a blue one"])
    source = data.open_data("drawn")
    assert len(source) == 4 and [source.captions[i] for i in range(2)] == ["red", "a blue one"]
    assert len(log(own("--data", "drawn", "--steps", 2))) == 1


def test_splits_are_not_trained_on_as_classes(tmp_path, refused):
    for split in ("train", "val"):
        paint(tmp_path / "parts" / split / "cat" / "0.png", (20, 20), (9, 9, 9))
    said = refused(train.main, "--data", "parts")
    assert "splits, not classes" in said and "parts/train" in said
    assert not (tmp_path / "runs").exists()


def test_a_moved_set_resumes_and_a_changed_one_is_refused(classes, own, refused, tmp_path):
    """A set is known by what it holds, not by where it lies."""
    run = own("--data", classes, "--name", "mine", "--steps", 2)
    moved = classes.rename(tmp_path / "elsewhere")
    assert own("--data", moved, "--name", "mine", "--steps", 4) == run
    assert [line["step"] for line in log(run)] == [2, 4]
    more = [*SHORT, "--name", "mine", "--data", moved]
    paint(moved / "sea" / "new.png", (64, 64), (0, 0, 250))
    assert "other pictures" in refused(train.main, *more)
    (moved / "sea" / "new.png").unlink()
    kept = {file: file.read_bytes() for file in moved.rglob("*.png")}
    for file in kept:
        paint(file, (64, 64), (250, 250, 250))
    assert "other pictures" in refused(train.main, *more)
    for file, raw in kept.items():
        file.write_bytes(raw)
    (moved / "sea").rename(moved / "ocean")
    assert "data classes" in refused(train.main, *more)
    assert [c.name for c in train.checkpoints(run)] == ["step_00000002", "step_00000004"]


def test_a_run_made_again_does_not_mix_its_pictures(classes, own, refused):
    """The weights are part of what a folder of pictures is known by; the message names the file."""
    draw = ["-n", "2", "--steps", "1", "--out", "out", "--device", "cpu"]
    run = own("--data", classes, "--steps", 2)
    old = weights(run)
    sample.main(draw)
    train.shutil.rmtree(run)
    own("--data", classes, "--steps", 2, "--seed", 1)
    assert any((old[k] != v).any() for k, v in weights(run).items())
    said = refused(sample.main, *draw)
    assert "out.json" in said and "weights" in said


def test_nothing_is_left_of_a_run_that_could_not_start(classes, refused, tmp_path):
    for flags in (
        ["--text_encoder", "nowhere/at/all", "--caption", 5],
        ["--channels", 1],
        ["--init", "no"],
    ):
        refused(train.main, "--data", classes, *flags)
    assert not (tmp_path / "runs").exists()


def test_hundreds_of_pictures_show_something_soon():
    """The preset for own data saves and draws within the first minutes of two cores."""
    cfg, _ = train.parse_config(["--data", "somewhere"])
    assert cfg.sample_every == 250 and cfg.log_every <= 50 and cfg.size == "demo"
    assert "OMP_NUM_THREADS" in ENV
