"""Figures against torch-fidelity itself and against a network that is known in closed form."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

import data
import evaluate
import sample
import train
from data import UserError
from model import TiM
from transition import TRANSPORTS, interpolate


class Tiny(FeatureExtractorBase):
    """A small stand-in for Inception: a random projection of 8 x 8 means, its weights in a file."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
        super().__init__(name, features_list)
        weights = torch.load(feature_extractor_weights_path, weights_only=True)
        self.features, self.scores = weights["features"], weights["scores"]

    @staticmethod
    def get_provided_features_list():
        return evaluate.FEATURES, evaluate.SCORES

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return evaluate.SCORES if metric == "isc" else evaluate.FEATURES

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, x):
        small = torch.nn.functional.adaptive_avg_pool2d(x.float() / 128 - 1, 8).flatten(1)
        features = (small @ self.features).relu()
        found = {evaluate.FEATURES: features, evaluate.SCORES: features @ self.scores}
        return tuple(found[k] for k in self.features_list)


if "tiny" not in torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY:
    torch_fidelity.register_feature_extractor("tiny", Tiny)


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """Weights of the stand-in, and everything written under tmp_path."""
    g = torch.Generator().manual_seed(0)
    weights = {"features": torch.randn(192, 24, generator=g) / 14, "scores": torch.randn(24, 10, generator=g)}
    torch.save(weights, tmp_path / "tiny.pth")
    monkeypatch.setattr(evaluate, "EXTRACTOR", "tiny")
    monkeypatch.setattr(evaluate, "said", set())
    monkeypatch.chdir(tmp_path)


def pictures(folder: Path, n: int, seed: int, side=16, mode="RGB") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        low = rng.integers(0, 256, (4, 4, len(mode) if mode != "L" else 1), np.uint8)
        image = Image.fromarray(low[..., 0] if mode == "L" else low).resize((side, side))
        image.save(folder / f"{i:06}.png")
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with a small random network for the embedded pictures."""
    torch.manual_seed(0)
    network = dict(channels=1, patch=7, depth=1, width=16, heads=2, adaln=8, classes=10)
    model = TiM(**network)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    config = dict(model=network, data=data.demo().spec, train=asdict(train.Config()), step=7)
    (tmp_path / "runs" / "small").mkdir(parents=True)
    sample.save(tmp_path / "runs" / "small" / "ema.safetensors", model.state_dict(), config)
    return tmp_path / "runs" / "small"


def fid(*args):
    evaluate.main(["fid", "--inception", "tiny.pth", "--device", "cpu", *map(str, args)])


def records(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def test_agrees_with_torch_fidelity_on_two_folders(tmp_path):
    a, b = pictures(tmp_path / "a", 30, 1), pictures(tmp_path / "b", 70, 2)
    fid("--images", a, "--reference", b)
    got = records(a / "eval.jsonl")[0]
    want = torch_fidelity.calculate_metrics(
        input1=str(a), input2=str(b), fid=True, kid=True, prc=True, isc=True, kid_subset_size=15, cuda=False,
        feature_extractor="tiny", feature_extractor_weights_path="tiny.pth", verbose=False, cache=False,
    )  # fmt: skip
    pairs = {
        "FID": "frechet_inception_distance", "KID": "kernel_inception_distance_mean",
        "KID sd": "kernel_inception_distance_std", "precision": "precision", "recall": "recall",
        "IS": "inception_score_mean",
    }  # fmt: skip
    for mine, theirs in pairs.items():
        assert got[mine] == pytest.approx(want[theirs], abs=1e-6), mine
    assert got["n"] == 30 and got["reference_n"] == 70 and got["floor"]["n"] == 30
    assert got["torch_fidelity"] == torch_fidelity.__version__


def test_reads_the_published_npz_form(tmp_path, capsys):
    a, b = pictures(tmp_path / "a", 20, 1), pictures(tmp_path / "b", 40, 2)
    fid("--images", a, "--reference", b)
    cached = next((tmp_path / "runs" / "reference").glob("*.safetensors"))
    stats = evaluate.read_features(cached, evaluate.digest("tiny.pth")).stats
    images = np.stack([np.asarray(Image.open(f)) for f in sorted(b.glob("*.png"))])
    np.savez(tmp_path / "stats.npz", **stats)
    np.savez(tmp_path / "images.npz", arr_0=images)
    np.savez(tmp_path / "both.npz", arr_0=images[:15], **stats)     # fewer than are scored, as published
    for name in ("stats.npz", "images.npz", "both.npz", cached):
        fid("--images", a, "--reference", name)
    folder, by_stats, by_images, by_both, by_cache = records(a / "eval.jsonl")
    assert by_images["FID"] == by_cache["FID"] == folder["FID"] and by_images["KID"] == folder["KID"]
    assert by_stats["FID"] == pytest.approx(folder["FID"], abs=1e-4)            # mean in fp64 instead of fp32
    assert by_both["FID"] == by_stats["FID"] and by_both["KID"] != folder["KID"] and by_stats["KID"] is None


def test_no_inception_score_without_a_classifier(tmp_path):
    weights = torch.load("tiny.pth")
    torch.save(weights | dict(scores=torch.zeros(24, 10)), "tiny.pth")
    a = pictures(tmp_path / "a", 20, 1)
    fid("--images", a, "--reference", a)
    got = records(a / "eval.jsonl")[0]
    assert got["IS"] is None and got["FID"] == pytest.approx(0, abs=1e-4)


def test_grey_and_alpha_are_converted_and_said_once(tmp_path, capsys):
    rgb = pictures(tmp_path / "rgb", 20, 5)
    for mode in ("L", "RGBA"):
        (tmp_path / mode).mkdir()
        for f in rgb.glob("*.png"):
            Image.open(f).convert(mode).save(tmp_path / mode / f.name)
    fid("--images", tmp_path / "L", "--reference", rgb)
    assert capsys.readouterr().err.count("mode L") == 1
    fid("--images", tmp_path / "RGBA", "--reference", rgb)
    assert capsys.readouterr().err.count("mode RGBA") == 1
    assert records(tmp_path / "RGBA" / "eval.jsonl")[0]["FID"] == pytest.approx(0, abs=1e-4)


def test_side_crops_folders_of_mixed_sizes(tmp_path):
    a, b = pictures(tmp_path / "a", 10, 1), pictures(tmp_path / "b", 10, 1, side=20)
    pictures(b / "deeper", 10, 2, side=24)
    fid("--images", a, "--reference", b, "--side", 16)
    assert "16" in records(a / "eval.jsonl")[0]["preprocessing"]


def test_reference_is_computed_once_until_it_changes(tmp_path, monkeypatch):
    a, b, done = pictures(tmp_path / "a", 10, 1), pictures(tmp_path / "b", 20, 2), []
    keep = evaluate.extract
    monkeypatch.setattr(evaluate, "extract", lambda net, p, n, device: done.append(p.name) or keep(net, p, n, device))
    for _ in range(2):
        fid("--images", a, "--reference", b)
    assert done == [str(b), str(a), str(a)]
    pictures(b, 21, 3)
    fid("--images", a, "--reference", b)
    fid("--images", a, "--reference", b, "--reference_num", 15)
    assert done[3:] == [str(b), str(a), str(b), str(a)]


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def test_rows_over_steps_and_nothing_is_drawn_twice(run, capsys):
    args = "--checkpoint", run, "--reference", "demo", "--reference_num", 100, "--num", 20, "--steps", 1, 3
    args += "--guidance", 1, 2
    fid(*args, "--batch", 7)
    files = {f: f.stat().st_mtime_ns for f in (run / "eval").rglob("0*.png")}
    assert len(files) == 4 * 20
    next(iter(files)).unlink()
    fid(*args)
    again = {f: f.stat().st_mtime_ns for f in files}
    assert sum(again[f] != files[f] for f in files) == 1
    first, second = records(run / "eval" / "eval.jsonl")[:4], records(run / "eval" / "eval.jsonl")[4:]
    assert [r["NFE"] for r in first] == [1, 3, 2, 6] and [r["FID"] for r in first] == [r["FID"] for r in second]
    assert {"commit", "n", "reference", "preprocessing", "seed", "guidance", "torch_fidelity"} <= first[0].keys()
    out = capsys.readouterr().out
    assert "do not compare" in out and "real, n = 20" in out


def test_samples_are_those_of_the_sampler(run, tmp_path):
    pictures(tmp_path / "demo", 3, 1)                                           # not the data set
    fid("--checkpoint", run, "--reference", "demo", "--reference_num", 30, "--num", 12, "--steps", 2, "--batch", 5)
    model, row, config = sample.load(run)
    want = sample.images(model, row, config, list(range(12)), 0, 2, list(range(10)), guidance=1.0)
    files = sorted((run / "eval").rglob("0*.png"))
    got = np.stack([np.asarray(Image.open(f)) for f in files])
    assert len(files) == 12 and np.abs(got.astype(int) - want[..., 0]).max() <= 1


@pytest.mark.slow
def test_two_ranks_draw_what_one_draws(run, tmp_path):
    args = "--checkpoint {} --reference demo --reference_num 30 -n 11 --steps 2 --inception tiny.pth --device cpu"
    shutil.copytree(run, tmp_path / "copy")
    fid(*args.format(run).split())
    code = "import evaluate, test_evaluate; evaluate.EXTRACTOR = 'tiny'; evaluate.main()"
    script = tmp_path / "two.py"
    root = Path(evaluate.__file__).parent
    script.write_text(f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'tests')!r}]\n{code}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), "fid"]
    done = subprocess.run(launch + args.format(tmp_path / "copy").split(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    one, two = (sorted((p / "eval").rglob("0*.png")) for p in (run, tmp_path / "copy"))
    assert len(one) == len(two) == 11
    for a, b in zip(one, two):
        assert np.abs(np.asarray(Image.open(a)).astype(int) - np.asarray(Image.open(b))).max() <= 1
    assert len(records(tmp_path / "copy" / "eval" / "eval.jsonl")) == 1


def test_curve(run, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [dict(row=f"guidance {g}", NFE=n, FID=50.0 / n) for g in (1, 2) for n in (1, 2, 8)]
    evaluate.draw_curve(rows, 100, tmp_path / "fid.png")
    assert Image.open(tmp_path / "fid.png").size[0] > 100


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def spoil(folder: Path) -> Path:
    (folder / "000003.png").write_bytes((folder / "000003.png").read_bytes()[:60])
    return folder


BAD = {
    "fewer in the reference": (["--images", "a", "--reference", "few"], "--num 20: the reference few has 12"),
    "more than the folder": (["--images", "a", "--num", "21", "--reference", "b"], "--num 21: a holds 20"),
    "few": (["--images", "a", "--num", "9", "--reference", "b"], "--num 9"),
    "mixed sizes": (["--images", "a", "--reference", "mixed"], r"mixed sizes, picture 12 is \(20, 20\)"),
    "other size": (["--images", "a", "--reference", "large"], r"\[16, 16\].*\[20, 20\].*--side"),
    "corrupt": (["--images", "a", "--reference", "corrupt"], "corrupt/000003.png: not a whole picture"),
    "no folder": (["--images", "a", "--reference", "nowhere"], "nowhere"),
    "no pictures": (["--images", "a", "--reference", "empty"], "empty: no pictures"),
    "reference_num": (["--images", "a", "--reference", "b", "--reference_num", "41"], "holds 40"),
    "npz without arrays": (["--images", "a", "--reference", "odd.npz"], "neither mu and sigma nor arr_0"),
    "npz of other images": (["--images", "a", "--reference", "grey.npz"], "expected uint8"),
    "statistics of another network": (["--images", "a", "--reference", "wide.npz"], "statistics of 30 features"),
    "no npz": (["--images", "a", "--reference", "missing.npz"], "not a readable"),
    "not cached features": (["--images", "a", "--reference", "tiny.pth.safetensors"], "not cached features"),
    "no weights": (["--images", "a", "--reference", "b", "--inception", "gone.pth"], r"\(gone.pth\) not read"),
    "device": (["--images", "a", "--reference", "b", "--device", "abacus"], "--device abacus"),
    "steps": (["--steps", "0", "--reference", "b"], r"--steps \[0\]"),
    "seed": (["--seed", "-1", "--reference", "b"], "--seed -1"),
    "interval": (["--interval", "0.5", "0.2", "--reference", "b"], "--interval"),
    "no checkpoint": (["--checkpoint", "gone", "--reference", "b"], "--checkpoint gone"),
}


@pytest.mark.parametrize("args, message", BAD.values(), ids=BAD)
def test_bad_input_is_named(args, message, tmp_path, run):
    pictures(tmp_path / "a", 20, 1), pictures(tmp_path / "b", 40, 2), pictures(tmp_path / "few", 12, 3)
    pictures(tmp_path / "large", 30, 4, side=20), spoil(pictures(tmp_path / "corrupt", 30, 5))
    (tmp_path / "empty").mkdir()
    pictures(tmp_path / "mixed", 30, 6, side=20), pictures(tmp_path / "mixed", 12, 6)
    np.savez("odd.npz", x=np.ones(3)), np.savez("grey.npz", arr_0=np.ones((9, 4, 4), np.uint8))
    np.savez("wide.npz", mu=np.ones(30), sigma=np.eye(30)), Path("tiny.pth.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match=message):
        fid(*args)


def test_features_of_other_weights_or_of_another_number_are_refused(tmp_path):
    a = pictures(tmp_path / "a", 20, 1)
    fid("--images", a, "--reference", a)
    cached = next((tmp_path / "runs" / "reference").glob("*.safetensors"))
    fid("--images", a, "--reference", cached, "--reference_num", 20)
    with pytest.raises(UserError, match="--reference_num 15: .* holds features of 20"):
        fid("--images", a, "--reference", cached, "--num", 10, "--reference_num", 15)
    weights = torch.load("tiny.pth")
    torch.save(weights | dict(scores=torch.zeros(24, 10)), "tiny.pth")
    with pytest.raises(UserError, match="other weights"):
        fid("--images", a, "--reference", cached)


@pytest.mark.parametrize("content", [dict(a=torch.ones(2)), print], ids=["another network", "code"])
def test_weights_of_another_network_are_refused(content, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "EXTRACTOR", "inception-v3-compat")
    torch.save(content, "tiny.pth")
    with pytest.raises(UserError, match="not torch-fidelity.s weights"):
        fid("--images", pictures(tmp_path / "a", 10, 1), "--reference", "demo")


def test_bad_input_ends_with_status_two(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        data.command(lambda: fid("--images", pictures(tmp_path / "a", 10, 1), "--reference", "nowhere"))
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit) as stop:
        fid("--reference", "demo", "--stepz", "3")
    assert stop.value.code == 2


# ---------------------------------------------------------------------------------------------------------------------
# Consistency


@pytest.mark.parametrize("name", ["otfm", "trigflow", "vp", "tim"])
def test_the_ideal_network_is_consistent(name):
    """For Gaussian data of deviation s the ideal network is f* = (sqrt(var(r) / var(t)) - A) / B x_t."""
    row, s, B = TRANSPORTS[name], 0.7, 64
    u = torch.rand(3, B, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort(0).values
    r, m, t = row.t_min + (0.05 + 0.8 * u) * (row.t_max - row.t_min)

    def ideal(x_t, t, r):
        var = lambda t: row.alpha(t) ** 2 * s**2 + row.sigma(t) ** 2
        r = torch.where(t == r, t * (1 - 1e-7), r)                              # the limit at r = t
        a, b = evaluate.transition.step_coefficients(row, t, r)
        return evaluate.transition.expand(((var(r) / var(t)).sqrt() - a) / b, x_t) * x_t

    seen = float(row.c_noise(torch.ones(1)))
    model = lambda x_t, t, r, y: ideal(x_t, t / seen, r / seen)                 # c_noise is linear in these rows
    x, eps = s * torch.randn(B, 1, 4, 4, dtype=torch.float64), torch.randn(B, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        got = evaluate.identity(model, row, x, eps, t, m, r, None)
    assert got["jump"].max() < 1e-6 and got["own"].max() < 1e-4
    assert (interpolate(row, x, eps, t) - x).norm() > 0 and got["target"].mean() > 1e-3
    broken = lambda x_t, t, r, y: model(x_t, t, t * 0.5 + r * 0.5, y)
    with torch.no_grad():
        assert evaluate.identity(broken, row, x, eps, t, m, r, None)["jump"].median() > 1e-3


def test_consistency_command(run, capsys):
    evaluate.main(["consistency", "--checkpoint", str(run), "--num", "6", "--batch", "4", "--device", "cpu"])
    (record,) = records(run / "eval" / "consistency.jsonl")
    assert len(record["table"]) == len(evaluate.LENGTHS) - 1 and record["update"] == 7
    assert all(np.isfinite(v) for row in record["table"] for v in list(row.values())[1:])
    assert "0.75 to 1" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# CLIP


def test_clip_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        evaluate.main(["clip", "--images", str(tmp_path)])


def test_clip_of_a_small_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {c: i for i, c in enumerate(letters + ["<|startoftext|>", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=8)
    ends = dict(bos_token_id=vocabulary["<|startoftext|>"], eos_token_id=vocabulary["<|endoftext|>"], pad_token_id=1)
    text = dict(size, vocab_size=len(vocabulary), max_position_embeddings=16, **ends)
    vision = dict(size, image_size=16, patch_size=8)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    side = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.CLIPProcessor(transformers.CLIPImageProcessor(**side), tokenizer).save_pretrained(tmp_path / "clip")
    folder = pictures(tmp_path / "a", 5, 1)
    lines = [dict(file=f"{i:06}.png", caption=c) for i, c in enumerate(("red", "a cat", "hat", "blue", "no"))]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["clip", "--images", str(folder), "--model", str(tmp_path / "clip"), "--device", "cpu", "--batch"]
    evaluate.main(command + ["2"])
    evaluate.main(command + ["5"])
    two, five = records(folder / "eval.jsonl")
    assert two["n"] == 5 and 0 <= two["CLIP"] <= 100 and two["CLIP"] == pytest.approx(five["CLIP"], abs=1e-3)
    (folder / "captions.jsonl").write_text("{}")
    with pytest.raises(UserError, match="captions.jsonl"):
        evaluate.main(command + ["2"])


# ---------------------------------------------------------------------------------------------------------------------
# The genuine network


@pytest.mark.slow
@pytest.mark.skipif("TIM_INCEPTION" not in os.environ, reason="TIM_INCEPTION does not name torch-fidelity's weights")
def test_the_genuine_network_on_two_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "EXTRACTOR", "inception-v3-compat")
    pixels = data.demo().pixels
    for name, start in (("a", 0), ("b", 50)):
        (tmp_path / name).mkdir()
        for i in range(12):
            Image.fromarray(pixels[start + i, 0]).save(tmp_path / name / f"{i:06}.png")
    fid("--images", "a", "--reference", "b", "--inception", os.environ["TIM_INCEPTION"])
    want = torch_fidelity.calculate_metrics(
        input1="a", input2="b", fid=True, cuda=False, cache=False, verbose=False,
        feature_extractor_weights_path=os.environ["TIM_INCEPTION"],
    )  # fmt: skip
    assert records("a/eval.jsonl")[0]["FID"] == pytest.approx(want["frechet_inception_distance"], rel=1e-6)
