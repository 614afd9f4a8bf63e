"""Scores against torch-fidelity and CLIP themselves, jumps against a network in closed form."""

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from launch import shell, torchrun
from oracle import ALL, NAMES, ideal, lively
from PIL import Image
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import data
import evaluate
import sample
from data import Spec
from transition import TRANSPORTS

LOGITS = "logits_unbiased"
SCORES = {  # in our rows, and in torch-fidelity's
    "FID": "frechet_inception_distance", "KID": "kernel_inception_distance_mean",
    "KID sd": "kernel_inception_distance_std", "precision": "precision", "recall": "recall",
    "IS": "inception_score_mean",
}  # fmt: skip


class Tiny(FeatureExtractorBase):
    """A stand-in for Inception: a random projection of 8 x 8 means, its weights in a file."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
        super().__init__(name, features_list)
        weights = torch.load(feature_extractor_weights_path, weights_only=True)
        if "features" not in weights:
            raise RuntimeError("Missing key(s) in state_dict")
        self.features, self.logits = weights["features"], weights["logits"]

    @staticmethod
    def get_provided_features_list():
        return evaluate.FEATURES, LOGITS

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return LOGITS if metric == "isc" else evaluate.FEATURES

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, x):
        small = torch.nn.functional.adaptive_avg_pool2d(x.float() / 128 - 1, 8).flatten(1)
        features = (small @ self.features).relu()
        found = {evaluate.FEATURES: features, LOGITS: features @ self.logits}
        return tuple(found[k] for k in self.features_list)


if "tiny" not in torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY:
    torch_fidelity.register_feature_extractor("tiny", Tiny)


def save_tiny(folder: Path, seed=0, classifier=1.0) -> None:
    rng = torch.Generator().manual_seed(seed)
    weights = {"features": torch.randn(192, 24, generator=rng) / 14}
    weights["logits"] = torch.randn(24, 10, generator=rng) * classifier
    torch.save(weights, folder / "tiny.pth")


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """The stand-in and its weights; everything is written under tmp_path."""
    save_tiny(tmp_path)
    monkeypatch.setattr(evaluate, "EXTRACTOR", "tiny")
    monkeypatch.chdir(tmp_path)


def draw_pictures(n: int, seed: int, side=16) -> np.ndarray:
    """uint8 (n, side, side, 3): smooth noise."""
    low = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(p).resize((side, side))) for p in low])


def pictures(folder: Path, n: int, seed: int, side=16) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(draw_pictures(n, seed, side)):
        Image.fromarray(picture).save(folder / f"{i:06}.png")
    return folder


def checkpoint(folder: Path, classes="abc", text=None, seed=0, network=None, **train) -> Path:
    """A run folder of a lively network for pictures of 16 x 16."""
    sizes = dict(channels=3, patch=8, depth=1, width=16, heads=2, adaln=8, classes=len(classes))
    sizes |= {"classes": None, "caption": text["width"]} if text else {}
    sizes |= network or {}
    spec = Spec("pixels", (3, 16, 16), 128.0, 60.0, tuple(() if text else classes), text=text)
    train = {"transport": "tim", "guidance": 1.0, "drop": 0.1} | train
    config = {"model": sizes, "data": spec.to_json(), "train": train, "step": 7}
    folder.mkdir(parents=True)
    sample.save(folder / "ema.safetensors", lively(seed, **sizes).state_dict(), config)
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return checkpoint(tmp_path / "runs" / "small")


@pytest.fixture
def real(tmp_path) -> Path:
    return pictures(tmp_path / "real", 30, 9)


def fid(*args) -> None:
    evaluate.main(["fid", "--inception", "tiny.pth", "--device", "cpu", *map(str, args)])


def records(folder, name="eval") -> list[dict]:
    """Of a run; or, where this is a folder of pictures, of it among all that were scored."""
    of_run = sorted(Path(folder).rglob(f"{name}.jsonl"), key=lambda file: len(file.parts))
    file = [*of_run, Path(f"runs/eval/{name}.jsonl")][0]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row for row in rows if of_run or row["images"] == str(folder)]


def scores(row: dict) -> dict:
    return {name: row[name] for name in SCORES}


def torch_fidelitys(first, second, subset, **how) -> dict:
    """The scores as torch-fidelity itself gives them."""
    found = torch_fidelity.calculate_metrics(
        input1=first, input2=second, fid=True, kid=True, prc=True, isc=True, kid_subset_size=subset,
        feature_extractor="tiny", feature_extractor_weights_path="tiny.pth", cuda=False,
        cache=False, save_cpu_ram=True, verbose=False, **how,
    )  # fmt: skip
    return pytest.approx({ours: found[theirs] for ours, theirs in SCORES.items()}, abs=1e-6)


# --- Scores ---------------------------------------------------------------------------------------


def test_scores_of_two_folders_are_torch_fidelitys(tmp_path, monkeypatch):
    a, b = pictures(tmp_path / "a", 30, 1), pictures(tmp_path / "b", 70, 2)
    pictures(b / "deeper", 1, 3)
    pictures(b / ".ipynb_checkpoints", 5, 4)  # hidden: no pictures
    for rank in "10":  # one of which scores and writes
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        fid("--images", a, "--reference", b)
    (got,) = records(a)
    shutil.rmtree(b / ".ipynb_checkpoints")
    assert scores(got) == torch_fidelitys(str(a), str(b), 15, samples_find_deep=True)
    assert got["n"] == 30 and got["reference_n"] == 71
    assert {"commit", "torch", "time", "inception", "reference"} <= got.keys()


@pytest.mark.parametrize("n, subset", [(1200, 1000), (50, 25)])
def test_subsets_of_kid_are_of_1000_or_of_half(n, subset):
    for k, name in enumerate("ab"):
        np.savez(f"{name}.npz", arr_0=draw_pictures(n + k, k, side=8))
    fid("--images", "a.npz", "--reference", "b.npz")
    a, b = (evaluate.open_npz(Path(f"{name}.npz"), None)[0] for name in "ab")
    assert scores(records("runs")[0]) == torch_fidelitys(a, b, subset)


def test_the_floor_is_of_other_real_pictures_at_the_n_of_the_rows(tmp_path, capsys):
    a, real = pictures(tmp_path / "a", 20, 1), pictures(tmp_path / "real", 70, 2)
    fid("--images", a, "--reference", real, "--reference_num", 40)
    floor = records(a)[0]["floor"]
    assert f"{floor['FID']:.4g}" in capsys.readouterr().out
    cfg = evaluate.FidConfig(reference_num=40)
    used, others = evaluate.split_reference(cfg, evaluate.open_pictures(str(real), None), 20)
    assert len(used) == 40 and len(others) == 20 == floor["n"]
    assert not {p.file for p in used.items} & {p.file for p in others.items}
    assert scores(floor) == torch_fidelitys(others, used, 10)
    (tmp_path / "used").mkdir()
    for p in used.items:
        shutil.copy(p.file, tmp_path / "used" / p.name)
    fid("--images", a, "--reference", "used")  # all of whose pictures are used
    again = records(a)[1]
    assert "no floor" in capsys.readouterr().err
    assert again["floor"] == dict.fromkeys(SCORES) | {"n": 0}
    assert scores(again) == pytest.approx(scores(records(a)[0]), abs=1e-6)


def test_an_npz_scores_as_the_folder_of_its_pictures(tmp_path):
    """As a reference in each published form, and as what is scored."""
    a, b = pictures(tmp_path / "a", 20, 1), pictures(tmp_path / "b", 40, 2)
    images = draw_pictures(40, 2)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    features = Tiny("tiny", [evaluate.FEATURES], "tiny.pth")(x)[0].double()
    statistics = {"mu": features.mean(0).numpy(), "sigma": np.cov(features.numpy(), rowvar=False)}
    np.savez("statistics.npz", **statistics)
    np.savez("images.npz", arr_0=images)
    np.savez("both.npz", arr_0=images[:15], **statistics)  # fewer than are scored, as published
    np.savez("a.npz", arr_0=draw_pictures(20, 1))
    for name in (b, "statistics.npz", "images.npz", "both.npz"):
        fid("--images", a, "--reference", name)
    fid("--images", "a.npz", "--reference", b)
    folder, by_statistics, by_images, by_both = records(a)
    assert scores(records("runs")[0]) == scores(folder) == scores(by_images)
    assert by_statistics["FID"] == pytest.approx(folder["FID"], abs=1e-4)  # mean in fp64, not fp32
    assert by_statistics["KID"] is None and by_statistics["floor"]["FID"] is None
    assert by_both["FID"] == by_statistics["FID"] and by_both["KID"] not in (None, folder["KID"])


def test_pictures_are_those_that_training_reads(tmp_path):
    """Pixel for pixel: transparency, 16 bits, EXIF, greys, a link, any size."""
    root, rng = tmp_path / "odd", np.random.default_rng(0)
    pictures(root / "a", 6, 1, side=37)
    noise = rng.integers(0, 256, (40, 52, 4), np.uint8)
    Image.fromarray(noise).save(root / "a" / "clear.png")
    Image.fromarray(noise[..., 0]).save(root / "a" / "grey.bmp")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(root / "a" / "deep.png")
    turn = Image.Exif()
    turn[0x0112] = 6
    Image.fromarray(noise[:, :, :3]).save(root / "a" / "turned.jpg", exif=turn)
    pictures(tmp_path / "elsewhere", 3, 2, side=21)
    os.symlink(tmp_path / "elsewhere", root / "b")
    pictures(root / "c", 3, 3, side=16)
    trained = data.open_data(str(root), side=16, mirror=False)
    x = trained.read(np.arange(len(trained)), rng).x
    seen = evaluate.open_pictures(str(root), 16)
    assert len(seen) == len(x) == 16 and torch.equal(torch.stack([*seen]), x)
    again = evaluate.open_pictures(str(next(Path("datasets").iterdir())), None)
    assert torch.equal(torch.stack([*again]), x)
    np.savez("odd.npz", arr_0=draw_pictures(4, 1, side=37))
    assert torch.equal(evaluate.open_npz(Path("odd.npz"), 16)[0][2], seen[2])
    assert evaluate.open_pictures("demo", 20)[0].shape == (3, 20, 20)  # grey ones, too
    fid("--images", root, "--reference", next(Path("datasets").iterdir()), "--side", 16)
    assert records(root)[0]["FID"] == pytest.approx(0, abs=1e-3) and records(root)[0]["side"] == 16


def test_some_of_a_set_are_spread_over_it(tmp_path):
    """Not the first by name, which may be of one class."""
    for k, name in enumerate("ab"):
        (tmp_path / "all" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (8, 8), (0, 99 + 99 * k, i)).save(tmp_path / "all" / name / f"{i}.png")
    for images in ("all", "all/a"):
        fid("--images", images, "--reference", "all", "--reference_num", 10, "-n", 10)
    assert records("all")[0]["FID"] < 0.02 * records("all/a")[0]["FID"]


@pytest.mark.parametrize("reference", ["b", "b.npz"])
def test_kept_features_are_of_these_pictures_and_these_weights(reference, tmp_path):
    def draw_others(seed):
        pictures(tmp_path / "b", 20, seed)
        np.savez("b.npz", arr_0=draw_pictures(20, seed))

    a, no_classifier = pictures(tmp_path / "a", 20, 1), lambda seed: save_tiny(tmp_path, seed, 0.0)
    for seed, change in enumerate((draw_others, draw_others, no_classifier), 2):
        change(seed)
        fid("--images", a, "--reference", reference)
        fid("--images", a, "--reference", reference)  # from what is kept
    rows = [scores(row) for row in records(a)]
    assert rows[::2] == rows[1::2] and len({row["FID"] for row in rows}) == 3
    assert rows[2]["IS"] is not None and rows[4]["IS"] is None
    assert rows[4] | {"IS": 1.0} == torch_fidelitys("a", "b", 10)


def test_inception_has_torch_fidelitys_features(monkeypatch):
    """With random weights, as the genuine ones are a download."""
    monkeypatch.undo()  # the stand-in
    evaluate.register_inception()
    kind = torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY[evaluate.EXTRACTOR]
    ours, theirs = (k.__new__(k) for k in (kind, FeatureExtractorInceptionV3))
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: {})
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    for net in (ours, theirs):
        torch.manual_seed(0)
        net.__init__("name", [evaluate.FEATURES], "weights")
    x = torch.randint(256, (2, 3, 28, 28), dtype=torch.uint8)
    (got,), (want,) = ours(x), theirs(x)
    assert got.shape == (2, 2048) and (got - want).norm() < 1e-5 * want.norm() > 0


# --- Sampling -------------------------------------------------------------------------------------


def test_rows_of_a_network_and_of_its_milestone(run, real, capsys):
    """Two evaluations a step where it is guided by a second pass, one with guide_range. What is
    drawn is not drawn again. All lines are in one plot."""
    args = "--reference", real, "-n", 20, "--steps", 1, 3, "--guidance", 1, 2
    fid("--checkpoint", run, *args, "--batch", 7)
    first = records(run)
    files = {f: f.stat().st_mtime_ns for f in (run / "eval").rglob("0*.png")}
    assert len(files) == 4 * 20
    next(iter(files)).unlink()

    milestone = run / "checkpoints" / "step_00000007"
    checkpoint(milestone, seed=1, network={"guide_range": [1, 4]})
    fid("--checkpoint", run, milestone, *args, "--plot", "both.png")
    assert sum(f.stat().st_mtime_ns != files[f] for f in files) == 1
    again, other = records(run), records(milestone)
    assert [row["NFE"] for row in again] == [1, 3, 2, 6] * 2
    assert [scores(row) for row in first] == [scores(row) for row in again[4:]]
    assert {"n", "reference", "weights", "seed", "guidance", "precision"} <= first[0].keys()
    assert [row["NFE"] for row in other] == [1, 3, 1, 3]
    assert {row["weights"] for row in other} == {sample.load(milestone)[2]["digest"]}
    out = capsys.readouterr().out
    assert f"{run}, " in out and f"{milestone}, " in out  # told apart by the whole path
    pytest.importorskip("matplotlib")
    assert Image.open("both.png").size[0] > 100


def test_guidance_is_the_checkpoints_unless_given(real, tmp_path):
    how = {"guidance": 2.0, "interval": [0.0, 0.5], "strict_interval": True}
    path = checkpoint(tmp_path / "run", **how)
    args = "--checkpoint", path, "--reference", real, "-n", 10, "--steps", 4, "--seed", 5
    fid(*args)
    fid(*args, "--interval", 0, 1, "--no-strict_interval", "--guidance", 3)
    fid(*args, "--seed", 6)
    own, given, other = records(path)
    assert own["NFE"] == 4 + 1 and given["NFE"] == 8  # guided at t = .25 alone
    assert own["FID"] != other["FID"]
    model, transport, _ = sample.load(path)
    z = sample.initial_noise((3, 16, 16), 5, [4])
    options = {"interval": (0.0, 0.5), "strict": True}
    x = sample.generate(model, transport, z, torch.tensor([1]), 4, 2.0, **options)
    want = data.to_pixels(x, 128.0, 60.0)[0].astype(int)
    found = [np.asarray(Image.open(f)) for f in (path / "eval").glob("guidance2_*/000004.png")]
    assert min(np.abs(x - want).max() for x in found) <= 1  # of the second of three classes


@pytest.mark.parametrize("folders, shares", [
    ({"a": 20, "b": 10, "c": 6}, (10, 5, 3)), ({"a": 9, "b": 9, "c": 9}, (6, 6, 6)),
    ({"a": 20, "b": 10, "d": 6}, (6, 6, 6)),  # other classes
])  # fmt: skip
def test_classes_are_drawn_as_the_reference_has_them(folders, shares, run, tmp_path, monkeypatch):
    asked, draw = [], sample.Sampler.draw

    def note(self, indices, conditions, steps, seed):
        asked.extend(conditions)
        return draw(self, indices, conditions, steps, seed)

    monkeypatch.setattr(sample.Sampler, "draw", note)
    for seed, (name, n) in enumerate(folders.items()):
        pictures(tmp_path / "own" / name, n, seed)
    fid("--checkpoint", run, "--reference", "own", "-n", 18, "--steps", 1)
    assert np.bincount(asked) == pytest.approx(shares, abs=1) and len(asked) == 18
    assert (records(run)[0]["classes"] == "even") == (shares == (6, 6, 6))


SCRIPT = """
import sys
sys.path.append({tests!r})
import data, evaluate, test_evaluate
evaluate.EXTRACTOR, write = "tiny", data.write_picture
def note(picture, path):
    print(f"drawn {{data.ranks()[0]}} {{path.name}}", flush=True)
    write(picture, path)
data.write_picture = note
evaluate.main()
"""


@pytest.mark.slow
def test_ranks_share_the_sampling_and_one_writes(run, real, tmp_path):
    copy, script = shutil.copytree(run, tmp_path / "copy"), tmp_path / "two.py"
    data.main("prepare --images real --out set --size 16".split())  # opened by rank 0 alone
    args = "--reference set -n 11 --steps 2 --batch 3".split()
    fid("--checkpoint", run, *args)
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    more = ["--checkpoint", copy, "--inception", "tiny.pth", "--device", "cpu"]
    code, text = shell([*torchrun(2), script, "fid", *args, *more])
    assert code == 0, text
    drawn = Counter(re.findall(r"drawn \d (\d+)\.png", text))
    assert len(drawn) == 11 == drawn.total() and "drawn 0" in text and "drawn 1" in text
    one, two = (sorted((path / "eval").rglob("0*.png")) for path in (run, copy))
    for a, b in zip(one, two, strict=True):
        assert np.abs(np.asarray(Image.open(a)).astype(int) - np.asarray(Image.open(b))).max() <= 1
    (row,) = records(copy)
    assert row["n"] == 11 and text.count(" a row against ") == 1


# --- Consistency ----------------------------------------------------------------------------------


class Ideal:
    """The ideal network, with its limit at r = t; in float64 inside."""

    predict, guide_range, caption_mask = "f", None, True

    def __init__(self, transport):
        self.f = ideal(transport)

    def __call__(self, x_t, t, r, y=None):
        x, t, r = x_t.double(), t.double(), r.double()
        return self.f(x, t, torch.where(t == r, t * (1 - 1e-7), r)).to(x_t.dtype)


@pytest.mark.parametrize("transport", ALL, ids=NAMES)
def test_jumps_of_the_ideal_network_have_no_error(transport):
    f, rng = Ideal(transport), torch.Generator().manual_seed(0)
    broken = lambda x_t, t, r, y: 1.1 * f(x_t, t, r)
    u = torch.rand(3, 64, dtype=torch.float64, generator=rng).sort(0).values
    r, s, t = transport.t_min + (0.05 + 0.8 * u) * (transport.t_max - transport.t_min)
    x, eps = torch.randn(2, 64, 1, 4, 4, dtype=torch.float64, generator=rng)
    with torch.no_grad():
        got = evaluate.jump_errors(f, transport, x, eps, t, s, r, None)
        wrong = evaluate.jump_errors(broken, transport, x, eps, t, s, r, None)
    assert got["jump"].max() < 1e-6 and got["own"].max() < 1e-3 and got["target"].min() > 0
    assert wrong["jump"].median() > 1e-3 and wrong["own"].median() > 1e-3


def test_an_ideal_network_is_consistent(monkeypatch):
    spec = data.open_data("demo").spec.to_json()
    config = {"data": spec, "train": {"data": "demo"}, "step": 1, "digest": ""}
    transport = TRANSPORTS["tim"]  # whose networks see t itself
    monkeypatch.setattr(sample, "load", lambda *args: (Ideal(transport), transport, config))
    evaluate.main("consistency --checkpoint x -n 6 --batch 4 --device cpu".split())
    (record,) = records("runs", "consistency")
    assert all(row["jump"] < 1e-4 and row["own"] < 1e-2 for row in record["table"])
    assert all(row["target"] > 0.1 for row in record["table"]) and len(record["table"]) > 3


@pytest.mark.parametrize("how", [{}, {"guide_range": [1, 3]}, {"predict": "x"}, "text"], ids=str)
def test_consistency_of_a_network(how, tmp_path, capsys):
    """Of the set that is named; captions are encoded, guidance is 1."""
    own, text = pictures(tmp_path / "set" / "a", 8, 1).parent, None
    if how == "text":
        how, text = {}, data.HASHES
        lines = [json.dumps({"image_file": f"a/{i:06}.png", "captions": ["a"]}) for i in range(8)]
        (own / "captions.jsonl").write_text("\n".join(lines))
    path = checkpoint(tmp_path / "run", "a", text, network=how) / "ema.safetensors"
    evaluate.main(f"consistency --checkpoint {path} --data {own} -n 3 --device cpu".split())
    (record,) = records("runs", "consistency")
    values = [row[name] for row in record["table"] for name in ("jump", "own", "target")]
    assert np.isfinite(values).all() and min(values) > 1e-4 and record["step"] == 7
    assert f"{values[-1]:.4g}" in capsys.readouterr().out


# --- CLIP -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A small CLIP of random weights."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {c: i for i, c in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    size["projection_dim"] = 8
    ends = dict(bos_token_id=len(letters), eos_token_id=len(letters) + 1, pad_token_id=1)
    text = dict(size, vocab_size=len(vocabulary), max_position_embeddings=16, **ends)
    vision = dict(size, image_size=16, patch_size=8)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    side = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    images = transformers.CLIPImageProcessor(**side)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_clip_is_the_mean_cosine_of_all_captions_without_negative_ones(clip, tmp_path):
    import transformers

    folder, white = pictures(tmp_path / "a", 4, 1), Image.new("RGBA", (16, 16), "white")
    clear = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8))
    clear.save(folder / "000000.png")
    pairs = [(0, "red"), (1, "a cat"), (1, "two"), (2, "blue"), (2, "dog"), (3, "no"), (0, "on a line")]
    lines = [{"image_file": f"{i:06}.png", "captions": [text]} for i, text in pairs]
    lines[1:3] = [{"image_file": "000001.png", "captions": ["a cat", "two"]}]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = f"clip --images {folder} --model {clip} --device cpu --batch".split()
    for more in (["2"], ["50"], ["2", "-n", "1"]):
        evaluate.main([*command, *more])

    net = transformers.CLIPModel.from_pretrained(clip)
    processor, cosines = transformers.CLIPProcessor.from_pretrained(clip), []
    for i, text in pairs:
        picture = Image.open(folder / f"{i:06}.png").convert("RGBA")
        picture = Image.alpha_composite(white, picture).convert("RGB")
        with torch.no_grad():
            out = net(**processor(text=[text], images=[picture], return_tensors="pt"))
        cosines.append(float(torch.cosine_similarity(out.image_embeds, out.text_embeds)))
    assert min(cosines) < -0.01 < 0.01 < max(cosines)
    two, many, first = records(folder, "clip")
    scored = 100 * np.clip(cosines, 0, None)
    assert (two["n"], many["n"], first["n"]) == (7, 7, 2)  # captions, not pictures
    assert [two["CLIP"], many["CLIP"]] == pytest.approx([scored.mean()] * 2, abs=1e-3)
    assert first["CLIP"] == pytest.approx(scored[[0, -1]].mean(), abs=1e-3)


# --- Bad calls ------------------------------------------------------------------------------------

FOLDERS = "fid --images a --reference b --reference_num 20"
NETWORK = "fid --checkpoint runs/small --reference b --reference_num 20 -n 10 --steps 1"
JUMPS = "consistency --checkpoint runs/small --data b"
FILES = {  # files and folders that the line must name
    FOLDERS + " --reference": "nowhere empty corrupt odd.npz grey.npz wide.npz cut.npz missing.npz",
    FOLDERS + " --images": "nowhere missing.npz", FOLDERS + " --inception": "gone.pth code.pth",
    NETWORK + " --checkpoint": "nowhere runs/text", JUMPS + " --checkpoint": "nowhere",
    "clip --images": "a broken",
}  # fmt: skip
FLAGS = {  # flags whose name it must have
    FOLDERS: "--num 21, --num 9, --reference_num 41, --inception other.pth, --device abacus, --stepz 3, "
    "--side 0",
    NETWORK: "--plot x.xyz, --interval 0.5 0.2, --interval 0 2, --guidance nan, --steps 0, --seed -1, "
    "--num 0, --batch 0, --stochastic 1, --precision half",
    JUMPS: "--data nowhere, --num 0", "clip --images texts": "--num 3, --model ./nowhere",
}
BAD = [(f"{call} {name}", name) for call, names in FILES.items() for name in names.split()]
BAD += [(f"{call} {words}", words.split()[0]) for call in FLAGS for words in FLAGS[call].split(", ")]
BAD += [
    ("fid --images a", "--reference"),
    (FOLDERS + " --reference few --reference_num 12", "--num 20"),
    (FOLDERS + " --images mixed -n 20", "--side"),
    (FOLDERS + " --reference large", "--side"),
    (NETWORK + " --reference large", "--side"),
    ("consistency --checkpoint runs/small", "--data"),
    ("consistency --checkpoint runs/small --data emoji", "height"),
    ("consistency --checkpoint runs/text --data a", "--data a"),
]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> Path:
    """A folder with good and bad input of every kind."""
    root = tmp_path_factory.mktemp("spoiled")
    for name, n, side in (("a", 20, 16), ("b", 40, 16), ("few", 12, 16), ("large", 40, 20)):
        pictures(root / name, n, 1, side)
    pictures(root / "mixed", 30, 6, side=20)
    pictures(root / "mixed", 12, 6)
    shutil.copytree(root / "b", root / "corrupt")
    for file in (root / "corrupt").iterdir():
        file.write_bytes(file.read_bytes()[:60])
    (root / "empty").mkdir()
    for name, line in (("texts", {"image_file": "000000.png", "captions": "a"}), ("broken", {})):
        pictures(root / name, 1, 1)
        (root / name / "captions.jsonl").write_text(json.dumps(line))
    np.savez(root / "odd.npz", x=np.ones(3))
    np.savez(root / "grey.npz", arr_0=np.ones((9, 4, 4), np.uint8))
    np.savez(root / "wide.npz", mu=np.ones(30), sigma=np.eye(30))
    (root / "cut.npz").write_bytes((root / "wide.npz").read_bytes()[:300])
    torch.save({"a": torch.ones(2)}, root / "other.pth")
    torch.save(print, root / "code.pth")
    save_tiny(root)
    checkpoint(root / "runs" / "small")
    checkpoint(root / "runs" / "text", text=data.HASHES)
    return root


@pytest.mark.parametrize("call, named", BAD)
def test_a_bad_call_is_refused(call, named, spoiled, monkeypatch, refused):
    """Status 2 and one line; nothing is left but in the caches of references and of sets."""
    monkeypatch.chdir(spoiled)
    caches = {"reference", "datasets"}
    inside = lambda: {f for f in spoiled.rglob("*") if f.is_file() and not caches & {*f.parts}}
    before, words = inside(), call.split()
    if words[0] == "fid":
        words[1:1] = ["--inception", "tiny.pth"]
    if "--device" not in words:
        words += ["--device", "cpu"]
    assert named in refused(evaluate.main, *words)
    assert inside() == before
