"""Scores against torch-fidelity itself and against a network that is known in closed form."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from oracle import ideal, variance
from PIL import Image
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import data
import evaluate
import sample
import train
from data import UserError
from model import TiM
from transition import TRANSPORTS

LOGITS = "logits_unbiased"


class Tiny(FeatureExtractorBase):
    """A small stand-in for Inception: a random projection of 8 x 8 means, its weights in a file."""

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


def test_consistency_of_a_text_network_needs_captions(monkeypatch):
    spec = replace(data.open_data("demo").spec, classes=(), text={"encoder": "bytes", "length": 8, "width": 4})
    config = {"data": spec.to_json(), "train": {"data": "demo"}, "step": 1}
    monkeypatch.setattr(sample, "load", lambda *args: (None, TRANSPORTS["tim"], config))
    with pytest.raises(UserError, match="--data demo has no captions"):
        evaluate.main(["consistency", "--checkpoint", "x", "--device", "cpu"])


def save_tiny(folder: Path) -> None:
    g = torch.Generator().manual_seed(0)
    weights = {"features": torch.randn(192, 24, generator=g) / 14, "logits": torch.randn(24, 10, generator=g)}
    torch.save(weights, folder / "tiny.pth")


def test_inception_has_torch_fidelitys_features(monkeypatch):
    """With random weights, as the genuine ones are a download."""
    monkeypatch.undo()                                                              # EXTRACTOR is not the stand-in
    evaluate.register_inception()
    kind = torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY[evaluate.EXTRACTOR]
    ours, theirs = kind.__new__(kind), FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: {})
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    for net in (ours, theirs):
        torch.manual_seed(0)
        net.__init__("name", [evaluate.FEATURES], "weights")
    x = torch.randint(256, (2, 3, 28, 28), dtype=torch.uint8)
    (got,), (want,) = ours(x), theirs(x)
    assert ours.Conv2d_1a_3x3.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert got.shape == (2, 2048) and (got - want).norm() < 1e-5 * want.norm() > 0


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """Weights of the stand-in, and everything written under tmp_path."""
    save_tiny(tmp_path)
    monkeypatch.setattr(evaluate, "EXTRACTOR", "tiny")
    monkeypatch.chdir(tmp_path)


def pictures(folder: Path, n: int, seed: int, side=16) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        low = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(low).resize((side, side)).save(folder / f"{i:06}.png")
    return folder


def checkpoint(folder: Path, **given) -> Path:
    """A run folder with a small random network for the embedded pictures."""
    torch.manual_seed(0)
    network = {"channels": 1, "patch": 7, "depth": 1, "width": 16, "heads": 2, "adaln": 8, "classes": 10}
    network["predict"] = given.get("predict", "f")
    model = TiM(**network)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    spec = data.open_data("demo").spec.to_json()
    config = {"model": network, "data": spec, "train": asdict(train.Config()) | given, "step": 7}
    folder.mkdir(parents=True)
    sample.save(folder / "ema.safetensors", model.state_dict(), config)
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return checkpoint(tmp_path / "runs" / "small")


@pytest.fixture
def real(tmp_path) -> Path:
    """A reference in the size of the embedded pictures."""
    return pictures(tmp_path / "real", 30, 9, side=28)


def fid(*args):
    evaluate.main(["fid", "--inception", "tiny.pth", "--device", "cpu", *map(str, args)])


def records(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --------------------------------------------------------------------------------------------------
# Scores


def test_agrees_with_torch_fidelity_on_two_folders(tmp_path):
    a, b = pictures(tmp_path / "a", 30, 1), pictures(tmp_path / "b", 70, 2)
    pictures(b / "deeper", 1, 3)
    fid("--images", a, "--reference", b)
    got = records(a / "eval.jsonl")[0]
    want = torch_fidelity.calculate_metrics(
        input1=str(a), input2=str(b), fid=True, kid=True, prc=True, isc=True, kid_subset_size=15, cuda=False,
        feature_extractor="tiny", feature_extractor_weights_path="tiny.pth", verbose=False, cache=False, save_cpu_ram=True,
        samples_find_deep=True,
    )  # fmt: skip
    for mine, theirs in evaluate.SCORES.items():
        assert got[mine] == pytest.approx(want[theirs], abs=1e-6), mine
    assert got["n"] == 30 and got["reference_n"] == 71 and got["floor"]["n"] == 30
    assert {"commit", "torch", "time", "inception", "reference"} <= got.keys()


def test_side_crops_folders_as_torch_fidelity_does(tmp_path):
    a, b = pictures(tmp_path / "a", 10, 1, side=20), pictures(tmp_path / "b", 10, 1, side=24)
    for k, f in enumerate([*a.glob("*.png"), *b.glob("*.png")]):
        Image.open(f).resize((19 + k, 39 - k)).save(f)
    pictures(b / "deeper", 10, 2, side=28)
    fid("--images", a, "--reference", b, "--side", 16)
    want = torch_fidelity.calculate_metrics(
        input1=str(a), input2=str(b), fid=True, cuda=False, feature_extractor="tiny", samples_find_deep=True,
        feature_extractor_weights_path="tiny.pth", samples_resize_and_crop=16, verbose=False, cache=False, save_cpu_ram=True,
    )  # fmt: skip
    got = records(a / "eval.jsonl")[0]
    assert got["FID"] == pytest.approx(want["frechet_inception_distance"], abs=1e-6) and got["side"] == 16


def test_reads_the_published_npz_forms(tmp_path):
    a, b = pictures(tmp_path / "a", 20, 1), pictures(tmp_path / "b", 40, 2)
    images = np.stack([np.asarray(Image.open(f)) for f in sorted(b.glob("*.png"))])
    features = Tiny("tiny", [evaluate.FEATURES], "tiny.pth")(torch.from_numpy(images).permute(0, 3, 1, 2))[0].double()
    statistics = {"mu": features.mean(0).numpy(), "sigma": np.cov(features.numpy(), rowvar=False)}
    np.savez("statistics.npz", **statistics)
    np.savez("images.npz", arr_0=images)
    np.savez("both.npz", arr_0=images[:15], **statistics)                       # fewer than are scored, as published
    for name in (b, "statistics.npz", "images.npz", "both.npz"):
        fid("--images", a, "--reference", name)
    folder, by_statistics, by_images, by_both = records(a / "eval.jsonl")
    assert [by_images[k] for k in evaluate.SCORES] == [folder[k] for k in evaluate.SCORES]
    assert by_statistics["FID"] == pytest.approx(folder["FID"], abs=1e-4)       # mean in fp64, not fp32
    assert by_statistics["KID"] is None and by_statistics["floor"]["FID"] is None
    assert by_both["FID"] == by_statistics["FID"] and by_both["KID"] not in (None, folder["KID"])


def test_no_inception_score_without_a_classifier(tmp_path):
    weights = torch.load("tiny.pth")
    torch.save(weights | {"logits": torch.zeros(24, 10)}, "tiny.pth")
    a = pictures(tmp_path / "a", 20, 1)
    fid("--images", a, "--reference", a)
    got = records(a / "eval.jsonl")[0]
    assert got["IS"] is None and got["FID"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_grey_and_alpha_are_read_as_rgb(mode, tmp_path):
    rgb = pictures(tmp_path / "rgb", 20, 5)
    (tmp_path / mode).mkdir()
    for f in rgb.glob("*.png"):
        grey = Image.open(f).convert("L")
        grey.convert(mode).save(tmp_path / mode / f.name)
        grey.convert("RGB").save(f)
    fid("--images", tmp_path / mode, "--reference", rgb)
    assert records(tmp_path / mode / "eval.jsonl")[0]["FID"] == pytest.approx(0, abs=1e-4)


def test_features_are_kept_until_the_pictures_or_the_weights_change(tmp_path):
    a, b = pictures(tmp_path / "a", 10, 1), pictures(tmp_path / "b", 20, 2)
    kept = lambda: {f for f in (tmp_path / "runs/reference").rglob("b_*-features-*") if f.is_file()}
    fid("--images", a, "--reference", b)
    first = kept()
    fid("--images", a, "--reference", b)
    assert kept() == first and first
    pictures(b, 21, 3)
    fid("--images", a, "--reference", b)
    assert len(kept()) == 2 * len(first)
    weights = torch.load("tiny.pth")
    torch.save(weights | {"features": -weights["features"]}, "tiny.pth")    # another network
    fid("--images", a, "--reference", b)
    assert len(kept()) == 3 * len(first)
    values = [r["FID"] for r in records(a / "eval.jsonl")]
    assert values[0] == values[1] and len(set(values)) == 3


def test_a_data_set_is_read_as_it_is_and_in_part(tmp_path, monkeypatch):
    """Of 1,561 pictures only those that are scored are decoded, and none is written."""
    decoded, read = [], data.DataSet.read
    note = lambda self, i, rng: decoded.append(i[0]) or read(self, i, rng)
    monkeypatch.setattr(data.DataSet, "read", note)
    for _ in range(2):
        fid("--images", "emoji", "-n", 20, "--reference", "emoji", "--reference_num", 50)
    cache = tmp_path / "runs/reference"
    first, second = records(cache / "eval.jsonl")
    assert first["FID"] == second["FID"] and not list(cache.rglob("*.png"))
    assert first["reference_n"] == 50 and first["n"] == 20
    spread = [*np.linspace(0, 1560, 50).round(), *np.linspace(0, 1560, 20).round()]
    assert set(decoded) == set(map(int, spread))
    pixels = read(data.open_emoji(), [7], np.random.default_rng(0)).x
    want = data.Decoder(data.open_emoji().spec)(pixels)[0]
    again = evaluate.open_pictures("emoji", None)
    found, one, other = again[7], again.part(range(9)), again.part(range(10))
    assert again.part([*range(9)]).key == one.key != other.key
    assert (found.numpy() == want.transpose(2, 0, 1)).all()


def test_other_pictures_in_an_npz_of_the_same_name_have_another_key():
    keys = []
    for value in (3, 4):
        np.savez("images.npz", arr_0=np.full((4, 8, 8, 3), value, np.uint8))
        pictures, statistics = evaluate.open_npz(Path("images.npz"), None)
        keys.append(pictures.key)
        assert (pictures[1] == value).all() and not statistics
    assert keys[0] != keys[1]


def test_grey_pictures_of_a_set_are_scored_in_three_channels():
    grey = evaluate.open_pictures("demo", 20)[3]
    assert grey.shape == (3, 20, 20) and (grey[0] == grey[2]).all() and grey.float().std() > 1


# --------------------------------------------------------------------------------------------------
# Sampling


def test_rows_over_steps_and_nothing_is_drawn_twice(run, real, capsys):
    args = "--checkpoint", run, "--reference", real, "-n", 20, "--steps", 1, 3
    args += "--guidance", 1, 2
    fid(*args, "--batch", 7)
    files = {f: f.stat().st_mtime_ns for f in (run / "eval").rglob("0*.png")}
    assert len(files) == 4 * 20
    next(iter(files)).unlink()
    fid(*args)
    again = {f: f.stat().st_mtime_ns for f in files}
    assert sum(again[f] != files[f] for f in files) == 1
    found = records(run / "eval" / "eval.jsonl")
    assert [r["NFE"] for r in found] == [1, 3, 2, 6] * 2
    assert [r["FID"] for r in found[:4]] == [r["FID"] for r in found[4:]]
    assert {"commit", "n", "reference", "weights", "seed", "guidance", "precision"} <= found[0].keys()
    assert "real, n = 15" in capsys.readouterr().out


def test_interval_and_strictness_are_the_checkpoints_unless_given(real, tmp_path):
    path = checkpoint(tmp_path / "run", guidance=2.0, guidance_high=0.5, guidance_strict=True)
    args = "--checkpoint", path, "--reference", real, "-n", 10, "--steps", 4
    fid(*args)
    fid(*args, "--interval", 0, 1, "--no-strict_interval", "--guidance", 3)
    own, given = records(path / "eval" / "eval.jsonl")
    assert (own["guidance"], own["interval"], own["strict"]) == (2.0, [0.0, 0.5], True)
    assert (given["guidance"], given["interval"], given["strict"]) == (3.0, [0.0, 1.0], False)
    assert own["NFE"] == 4 + 1 and given["NFE"] == 8                            # guided at t = .25 alone
    model, transport, _ = sample.load(path)
    options = {"interval": (0.0, 0.5), "strict": True}
    z = sample.initial_noise((1, 28, 28), 0, [3])
    want = sample.generate(model, transport, z, torch.tensor([3]), 4, 2.0, **options)
    want = data.Decoder(data.open_data("demo").spec)(want)[0, ..., 0]
    found = next((path / "eval").glob("guidance2_*/000003.png"))
    assert np.abs(np.asarray(Image.open(found)).astype(int) - want).max() <= 1


def test_several_checkpoints_are_lines_of_one_plot(real, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    paths = [checkpoint(tmp_path / place / "run", predict=place) for place in ("f", "x")]
    args = "--reference", real, "-n", 10, "--steps", 1, 2, "--plot", "both.png"
    fid("--checkpoint", *paths, *args)
    assert Image.open("both.png").size[0] > 100
    out = capsys.readouterr().out
    assert all(f"{path}, guidance 1" in out for path in paths)  # told apart by their whole path


def test_the_size_of_a_network_is_compared_before_it_draws(real, tmp_path):
    """That of the first before the floor, that of any other before its scores."""
    path = checkpoint(tmp_path / "small")
    small = pictures(tmp_path / "small_pictures", 30, 9, side=20)
    with pytest.raises(UserError, match=r"\(20, 20\), not \(28, 28\).*--side"):
        fid("--checkpoint", path, "--reference", small, "-n", 10, "--steps", 1)
    assert not (path / "eval").exists()
    drawn, known = (evaluate.open_pictures(str(folder), None) for folder in (real, small))
    with pytest.raises(UserError, match=r"of \(28, 28\), .* of \(20, 20\)"):
        evaluate.score(drawn, known, {})


def test_hidden_files_are_no_pictures(tmp_path):
    pictures(tmp_path / "all" / ".ipynb_checkpoints", 10, 1)
    pictures(tmp_path / "all" / "a", 10, 2)
    assert len(evaluate.open_pictures(str(tmp_path / "all"), None)) == 10


def test_some_pictures_of_a_folder_are_spread_over_it(tmp_path, monkeypatch):
    """Not the first by name, which may be of one class."""
    pictures(tmp_path / "all" / "a", 10, 1)
    pictures(tmp_path / "all" / "b", 10, 2)
    seen = []
    monkeypatch.setattr(evaluate, "open_table", lambda *args: lambda row, some, *rest: seen.append(some))
    fid("--images", tmp_path / "all", "--reference", "demo", "-n", 10)
    assert [file.parent.name for file in seen[0].items] == ["a"] * 5 + ["b"] * 5


@pytest.mark.slow
def test_two_ranks_draw_what_one_draws(run, real, tmp_path):
    args = "--checkpoint {} --reference real -n 11 --steps 2 --inception tiny.pth --device cpu"
    shutil.copytree(run, tmp_path / "copy")
    fid(*args.format(run).split())
    root = Path(evaluate.__file__).parent
    code = "import evaluate, test_evaluate; evaluate.EXTRACTOR = 'tiny'; evaluate.main()"
    script = tmp_path / "two.py"
    script.write_text(f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'tests')!r}]\n{code}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), "fid"]
    done = subprocess.run(launch + args.format(tmp_path / "copy").split(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    one, two = (sorted((p / "eval").rglob("0*.png")) for p in (run, tmp_path / "copy"))
    assert len(one) == len(two) == 11
    for a, b in zip(one, two):
        assert np.abs(np.asarray(Image.open(a)).astype(int) - np.asarray(Image.open(b))).max() <= 1
    assert len(records(tmp_path / "copy" / "eval" / "eval.jsonl")) == 1


# --------------------------------------------------------------------------------------------------
# Bad input

BAD = {
    "fewer in the reference": (["--images", "a", "--reference", "few"], "--num 20: .* few holds 12"),
    "more than the folder": (["--images", "a", "-n", "21", "--reference", "b"], "--num 21: a holds 20"),
    "few": (["--images", "a", "-n", "9", "--reference", "b"], "--num 9"),
    "mixed sizes": (["--images", "a", "--reference", "mixed"], "mixed.*--side"),
    "other size": (["--images", "a", "--reference", "large"], r"\(20, 20\), not \(16, 16\).*--side"),
    "plot": (["--reference", "b", "--plot", "x.xyz"], "--plot x.xyz: name a .png file"),
    "corrupt": (["--images", "a", "--reference", "corrupt"], "corrupt/000003.png: not a whole picture"),
    "no folder": (["--images", "a", "--reference", "nowhere"], "nowhere"),
    "no pictures": (["--images", "a", "--reference", "empty"], "empty: no pictures"),
    "reference_num": (["--images", "a", "--reference", "b", "--reference_num", "41"], "holds 40"),
    "npz without arrays": (["--images", "a", "--reference", "odd.npz"], "expected arr_0 as .* or mu and sigma.* found {}"),
    "npz of other images": (["--images", "a", "--reference", "grey.npz"], "expected arr_0 as uint8 .* found .*(9, 4, 4)"),
    "statistics of others": (["--images", "a", "--reference", "wide.npz"], "statistics of another number"),
    "npz cut short": (["--images", "a", "--reference", "cut.npz"], "cut.npz: not a readable"),
    "no npz": (["--images", "a", "--reference", "missing.npz"], "not a readable"),
    "no weights": (["--images", "a", "--reference", "b", "--inception", "gone.pth"], "gone.pth: .*No such file"),
    "other weights": (["--images", "a", "--reference", "b", "--inception", "other.pth"], "--inception"),
    "code": (["--images", "a", "--reference", "b", "--inception", "code.pth"], "code.pth: not a whole file of plain weights"),
    "device": (["--images", "a", "--reference", "b", "--device", "abacus"], "--device abacus"),
    "interval": (["--interval", "0.5", "0.2", "--reference", "b", "-n", "10"], "--interval"),
    "no checkpoint": (["--checkpoint", "gone", "--reference", "b", "-n", "10"], "gone: there is no file gone"),
}


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> Path:
    """A folder with good and bad input of every kind, and a run."""
    root = tmp_path_factory.mktemp("spoiled")
    for name, n, side in (("a", 20, 16), ("b", 40, 16), ("few", 12, 16), ("large", 30, 20), ("corrupt", 30, 16)):
        pictures(root / name, n, 1, side)
    pictures(root / "mixed", 30, 6, side=20)
    pictures(root / "mixed", 12, 6)
    (root / "empty").mkdir()
    cut = root / "corrupt/000003.png"
    cut.write_bytes(cut.read_bytes()[:60])
    np.savez(root / "odd.npz", x=np.ones(3))
    np.savez(root / "grey.npz", arr_0=np.ones((9, 4, 4), np.uint8))
    np.savez(root / "wide.npz", mu=np.ones(30), sigma=np.eye(30))
    (root / "cut.npz").write_bytes((root / "wide.npz").read_bytes()[:300])
    torch.save({"a": torch.ones(2)}, root / "other.pth")
    torch.save(print, root / "code.pth")
    save_tiny(root)
    checkpoint(root / "runs" / "small")
    return root


@pytest.mark.parametrize("args, message", BAD.values(), ids=BAD)
def test_bad_input_is_named(args, message, spoiled, monkeypatch):
    monkeypatch.chdir(spoiled)
    with pytest.raises(UserError, match=message):
        fid(*args)


@pytest.mark.parametrize("flags", [["--stepz", "3"], ["--steps", "0"], ["--seed", "-1"], ["-n", "0"],
                                   ["--guidance", "nan"], ["--interval", "0", "2"], ["--side", "0"]])  # fmt: skip
def test_bad_flags_end_with_status_two(flags):
    with pytest.raises(SystemExit) as stop:
        fid("--reference", "demo", *flags)
    assert stop.value.code == 2


def test_bad_input_is_one_line(tmp_path, capsys):
    pictures(tmp_path / "a", 10, 1)
    with pytest.raises(SystemExit) as stop:
        data.command(lambda: fid("--images", "a", "--reference", "nowhere"))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# Consistency


@pytest.mark.parametrize("name", ["otfm", "trigflow", "vp", "tim"])
def test_the_ideal_network_is_consistent(name):
    transport, s, B = TRANSPORTS[name], 0.6, 64
    u = torch.rand(3, B, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort(0).values
    r, m, t = transport.t_min + (0.05 + 0.8 * u) * (transport.t_max - transport.t_min)
    net = ideal(transport)

    def f(x_t, t, r, y):
        return net(x_t, t, torch.where(t == r, t * (1 - 1e-7), r), y)           # the limit at r = t

    def broken(x_t, t, r, y):
        return f(x_t, t, t * 0.5 + r * 0.5, y)

    x, eps = s * torch.randn(B, 1, 4, 4, dtype=torch.float64), torch.randn(B, 1, 4, 4, dtype=torch.float64)
    assert variance(transport, t).min() > 0
    with torch.no_grad():
        got = evaluate.jump_errors(f, transport, x, eps, t, m, r, None)
        wrong = evaluate.jump_errors(broken, transport, x, eps, t, m, r, None)
    assert got["jump"].max() < 1e-6 and got["own"].max() < 1e-4 and got["target"].mean() > 1e-3
    assert wrong["jump"].median() > 1e-3


@pytest.mark.parametrize("predict", ["f", "x"])
def test_consistency_of_a_run(predict, tmp_path, capsys):
    path = checkpoint(tmp_path / "run", predict=predict)
    evaluate.main(["consistency", "--checkpoint", str(path), "-n", "6", "--batch", "4", "--device", "cpu"])
    (record,) = records(path / "eval" / "consistency.jsonl")
    assert len(record["table"]) == len(evaluate.LENGTHS) - 1 and record["step"] == 7
    assert all(np.isfinite(v) for row in record["table"] for v in list(row.values())[1:])
    fp64 = [row["fp64"] for row in record["derivative"]]
    assert fp64[0] < 1e-3 and fp64 == sorted(fp64)
    assert "0.75 to 1" in capsys.readouterr().out


def test_consistency_of_a_lone_file_of_captions(tmp_path):
    network = {"channels": 3, "patch": 8, "depth": 1, "width": 16, "heads": 2, "adaln": 8, "caption": 128}
    spec = data.open_data("emoji").spec.to_json() | {"text": data.BYTES}
    config = {"model": network, "data": spec, "train": asdict(train.Config(data="emoji")), "step": 1}
    model = TiM(**network)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    sample.save(tmp_path / "emoji.safetensors", model.state_dict(), config)
    evaluate.main(["consistency", "--checkpoint", "emoji.safetensors", "-n", "3", "--device", "cpu"])
    (record,) = records(tmp_path / "runs/eval/consistency.jsonl")
    assert record["table"][-1]["jump"] > 0
    with pytest.raises(UserError, match="was trained on text"):
        fid("--checkpoint", "emoji.safetensors", "--reference", "emoji", "--reference_num", 20, "-n", 10)


# --------------------------------------------------------------------------------------------------
# CLIP


def test_clip_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FileNotFoundError, match="captions.jsonl"):  # before a model is asked for
        evaluate.main(["clip", "--images", str(tmp_path)])
    (tmp_path / "captions.jsonl").write_text('{"image_file": "a.png", "captions": ["a"]}')
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
    captions = ["red", ["a cat", "two"], ["hat"], "blue", "no"]
    lines = [{"image_file": f"{i:06}.png", "captions": c} for i, c in enumerate(captions)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["clip", "--images", str(folder), "--model", str(tmp_path / "clip"), "--device", "cpu", "--batch"]
    evaluate.main(command + ["2"])
    evaluate.main(command + ["5"])
    two, five = records(folder / "eval.jsonl")
    assert two["n"] == 5 and 0 <= two["CLIP"] <= 100 and two["CLIP"] == pytest.approx(five["CLIP"], abs=1e-3)
    with pytest.raises(UserError, match="--num 6: .* has 5 captions"):
        evaluate.main(command + ["2", "-n", "6"])
    (folder / "captions.jsonl").write_text("{}")
    with pytest.raises(UserError, match="captions.jsonl"):
        evaluate.main(command + ["2"])
