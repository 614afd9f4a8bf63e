"""Text to image: encoders, conditions, training and sampling on captions, released weights."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import weights_in
from launch import assert_same, losses, train_here, weights
from oracle import lively
from PIL import Image
from tiny import save_gemma, save_kl

import data
import sample
import train
from data import UserError
from model import SIZES
from transition import TRANSPORTS, network_f

CPU = torch.device("cpu")
ODD = ["", "x" * 10_000, "long " * 2_000, "👩‍🚀 🏳️‍🌈", "سماء زرقاء", "红苹果", "a\tb\n\u2028c “d” \\u0041"]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    save_gemma(folder)
    return folder


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Twelve pictures of 16 x 16 as a set of pixels, with two or three captions each."""
    root, lines = tmp_path_factory.mktemp("captioned"), []
    (root / "pictures").mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i,) * 3).save(root / f"pictures/{i:02}.png")
        texts = [f"picture {i}", ODD[i % len(ODD)] or f"number {i}", "same for all"][: 2 + i % 2]
        lines.append(json.dumps({"image_file": f"{i:02}.png", "captions": texts}) + "\n")
    (root / "pictures/captions.jsonl").write_text("".join(lines))
    line = ["prepare", "--images", root / "pictures", "--out", root / "set", "--size", 16]
    data.main([*map(str, line)])
    return root / "set"


# --- Encoders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["word_hashes", "gemma"])
def test_odd_captions_have_features_that_do_not_depend_on_company(name, gemma):
    encode = data.load_text_encoder(str(gemma) if name == "gemma" else name)
    features, mask = encode(ODD)
    lengths = mask.sum(1)
    assert features.shape == (len(ODD), encode.spec["length"], encode.spec["width"])
    assert features.isfinite().all() and lengths[0] == lengths.min() == 1
    assert torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None])  # padding is on the right
    for text, row, n in zip(ODD, features, lengths):
        alone, own = encode([text])
        assert own.shape == (1, n) and own.all()
        torch.testing.assert_close(row[:n], alone[0], atol=1e-5, rtol=1e-4)


def test_gemma_is_asked_as_the_released_network_was(gemma):
    """Last hidden state of the decoder, begin mark, no template, right padding, 256 tokens."""
    transformers = pytest.importorskip("transformers")
    model = transformers.Gemma3ForCausalLM.from_pretrained(gemma)
    ids = transformers.AutoTokenizer.from_pretrained(gemma)("red apple")["input_ids"]
    assert ids[0] == 2 and len(ids) == 10
    want = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
    for how, texts, length, lengths in (
        ({}, ["red apple", "y" * 999], 256, [10, 256]),
        ({}, ["red apple", "sun"], 10, [10, 4]),
        (dict(pad_to_length=True), ["red apple"], 256, [10]),
        (dict(length=7), ["red apple", "sun"], 7, [7, 4]),
    ):
        encode = data.load_text_encoder(str(gemma), **how)
        spec = {"encoder": str(gemma), "length": how.get("length", 256), "width": 20}
        features, mask = encode(texts)
        assert encode.spec == spec and mask.sum(1).tolist() == lengths
        assert features.shape == (len(texts), length, 20)
        n = min(length, 10)
        torch.testing.assert_close(features[:1, :n], want[:, :n], atol=1e-5, rtol=1e-5)


def test_words_are_hashed_the_same_everywhere_and_similar_words_are_close():
    word = data.hash_word("apple")  # saved networks depend on it
    np.testing.assert_allclose(word[:3], [-0.5643508, 2.0390084, -1.8433748], rtol=1e-5)
    assert word.shape == (128,) and abs(np.square(word).mean() - 1) < 0.4
    near = lambda a, b: float(np.corrcoef(data.hash_word(a), data.hash_word(b))[0, 1])
    assert near("heart", "hearts") > 0.3 > abs(near("heart", "apple"))
    for name in ("word_hashes", "bytes"):  # its name in the second edition
        one, two = data.load_text_encoder(name)(["Red apple", "red APPLE!"])[0]
        assert torch.equal(one[:3], two[:3])


def test_an_encoder_that_is_not_there_is_named(tmp_path, monkeypatch):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match=f"--text_encoder {path}"):
            data.load_text_encoder(str(path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        data.load_text_encoder(str(tmp_path))


# --- Conditions -----------------------------------------------------------------------------------


def test_classes_as_conditions():
    y, null = data.ClassConditions(10, CPU)([3, -1, 0])
    assert y.tolist() == [3, 10, 0] and null.tolist() == [10, 10, 10] and y.dtype == torch.int64


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("multiple", [1, 8])
def test_captions_as_conditions(known, multiple):
    """Encoded once, or batch by batch: the same features. null is the empty text, of one length."""
    encode, texts = data.load_text_encoder("word_hashes"), ["a blue heart", "sun", "", "sun", "red " * 9]
    want, mask = encode([*texts, ""])
    padding = -want.shape[1] % multiple
    want, mask = F.pad(want, (0, 0, 0, padding)), F.pad(mask, (0, padding))
    all_texts = [*texts, "never drawn"] if known else ()
    (y, seen), (null, null_seen) = data.TextConditions(encode, CPU, all_texts, multiple)(texts)
    assert torch.equal(y, want[:5]) and torch.equal(seen, mask[:5]) and y.shape[1] % multiple == 0
    assert torch.equal(null, want[[5] * 5]) and torch.equal(null_seen, mask[[5] * 5])


def text_network(**changes):
    return lively(channels=3, patch=4, classes=None, caption=128, **changes)


@pytest.mark.parametrize("masked", [True, False])
def test_a_picture_does_not_depend_on_its_batch_mates(masked):
    """Beside longer and shorter captions: the same but for rounding; not so without the mask."""
    model, prompts = text_network(caption_mask=masked), ["red", "", "the " * 30, "blue heart"]
    spec = data.Spec("pixels", (3, 8, 8), text=data.HASHES)
    conditions = data.TextConditions(data.load_text_encoder("word_hashes"), CPU)
    sampler = sample.Sampler(model, TRANSPORTS["tim"], {"train": {}}, spec, None, conditions,
                             prompts, {"guidance": 2.0}, {})  # fmt: skip
    together = sampler.latents(range(4), range(4), 3, seed=3)
    for i, prompt in enumerate(prompts):
        alone = sampler.latents([i], [i], 3, seed=3)[0]
        gap = (alone - together[i]).abs().max() / together[i].abs().max()
        assert gap < 1e-4 if masked or i == 2 else gap > 1e-3, (masked, prompt)


@pytest.mark.parametrize("tangent", ["data", "network", "average"])
@pytest.mark.parametrize("guide", [1.0, 2.0])
@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_a_dropped_caption_is_the_empty_one(drop, guide, tangent):
    """What a step shows the network is the caption or, dropped or to guide from, that of ""."""
    encode, model, shown = data.load_text_encoder("word_hashes"), text_network(), []
    want, _ = encode(["red", "blue", ""])
    y, null = data.TextConditions(encode, CPU)(["red", "blue"] * 4)
    model.y_embedder.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    f = network_f(model, TRANSPORTS["tim"], "f")
    cfg = train.Config(drop=drop, guide_gt=guide, tangent=tangent, patch=4, h=0.005)
    x = torch.randn(8, 3, 8, 8)
    train.objective(f, f, TRANSPORTS["tim"], cfg, x, y, null, data.seeded(0))
    seen = {int((want == v).all(-1).all(-1).nonzero()) for part in shown for v in part}
    assert seen == ({2} if drop else {0, 1}) | ({2} if guide == 2 else set())


# --- Training and sampling ------------------------------------------------------------------------


def test_training_resumes_exactly_whether_captions_are_encoded_once_or_by_batch(
    captioned, tmp_path, monkeypatch
):
    """Six updates, or three and three; features at hand, or encoded batch by batch: the same."""
    flags = ["--data", captioned, "--channels", 3, "--side", 16, "--classes", 0, "--patch", 8]
    flags += ["--guide_gt", 1.5, "--ema", 0.5, "--steps"]
    found = []
    for table in (4096, 2):
        monkeypatch.setattr(data, "TABLE", table)
        whole = train_here(tmp_path / f"{table}/whole", *flags, 6)
        parts = [train_here(tmp_path / f"{table}/parts", *flags, steps) for steps in (3, 6)][1]
        assert_same(weights(whole), weights(parts), atol=0, rtol=0)
        assert losses(whole) == losses(parts)
        found.append(losses(whole))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_gemma_from_pictures_to_pictures(captioned, gemma, tmp_path, refused):
    """prepare, train, sample, with a tiny autoencoder and a tiny Gemma; nothing is asked again."""
    save_kl(tmp_path / "kl")
    make = ["prepare", "--images", captioned.parent / "pictures", "--size", 16, "--device", "cpu"]
    make += ["--autoencoder", tmp_path / "kl", "--out", tmp_path / "set"]
    data.main([*map(str, make)])
    latents = ["--data", tmp_path / "set", "--channels", 4, "--side", 8, "--classes", 0]
    latents += ["--text_encoder", gemma, "--steps", 3]
    path = train_here(tmp_path, *latents, pictures=True)
    config = sample.load(path)[2]
    assert config["data"]["text"] == {"encoder": str(gemma), "length": 256, "width": 20}
    assert config["model"]["caption"] == 20 and len(losses(path)) == 3
    assert {"data.png", "step_00000003.png"} <= {p.name for p in (path / "samples").iterdir()}

    argv = ["--checkpoint", path, "--steps", 1, 2, "--device", "cpu", "--out", tmp_path / "grid.png"]
    sample.main([*map(str, argv), "--prompts", *ODD])
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > len(ODD) * 16 and grid.height > 2 * 16
    shutil.copytree(gemma, tmp_path / "moved")  # --text_encoder says where it is now
    drawn = [
        sample.open_sampler(path, CPU, prompts=["a"], text_encoder=where).latents([0], [0], 1, 0)
        for where in (None, str(tmp_path / "moved"))
    ]
    torch.testing.assert_close(*drawn)
    for where in ("word_hashes", tmp_path / "none"):
        assert "--text_encoder" in refused(sample.main, *argv, "--text_encoder", where)


def test_the_emoji_preset_trains_and_draws_its_prompts(tmp_path):
    flags = ["--steps", "2", "--batch", "4", "--device", "cpu", "--runs", str(tmp_path)]
    train.main(["--config", "emoji", *flags])
    config = sample.load(tmp_path / "emoji")[2]
    assert "red apple" in config["data"]["prompts"] and config["train"]["size"] == "emoji"
    assert (tmp_path / "emoji/samples/step_00000002.png").is_file()


def test_a_text_network_needs_captions():
    cfg = train.PRESETS["t2i_xl"]
    for classes in ("ab", ""):
        with pytest.raises(UserError):
            train.network_arguments(cfg, data.Spec("latents", (32, 16, 16), classes=tuple(classes)))
    fits = data.Spec("latents", (32, 16, 16), text={"width": 1152})
    assert train.network_arguments(cfg, fits)["caption"] == 1152


# --- Released weights -----------------------------------------------------------------------------


@pytest.fixture
def released(golden_text, tmp_path):
    """A file like the released text weights: the golden network."""
    torch.save(weights_in(golden_text), tmp_path / "t2i_model.bin")
    return tmp_path / "t2i_model.bin"


def test_released_text_weights_sample_with_a_local_gemma(released, gemma, tmp_path, refused):
    """A released file says which encoder it wants; its prompts are read by a tiny Gemma here."""
    model, transport, config = sample.load(released)
    assert config["data"]["text"] == {"encoder": data.GEMMA, "length": 256, "width": 20}
    assert "--prompts" in refused(sample.main, "--checkpoint", released, "--device", "cpu")

    spec = config["data"] | {"kind": "pixels"}  # no autoencoder here
    sample.save(tmp_path / "mine.safetensors", model.state_dict(), config | {"data": spec})
    prompts = ["red apple", "sun"]
    sampler = sample.open_sampler(
        tmp_path / "mine.safetensors", CPU, prompts=prompts, text_encoder=str(gemma)
    )
    found = sampler.latents([0, 1], [0, 1], 1, seed=0)
    features, mask = data.load_text_encoder(str(gemma), pad_to_length=True)([*prompts, ""])
    assert features.shape[1] == 256  # padding is seen, as trained
    z = sample.initial_noise(config["data"]["shape"], 0, range(2))
    y, null = (features[:2], mask[:2]), (features[[2, 2]], mask[[2, 2]])
    want = sample.generate(model, transport, z, y, 1, 2.5, null=null, strict=True)
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


def test_released_text_weights_are_trained_on_as_they_were(released, monkeypatch):
    """--init names the flags of padding and of token positions that the file needs."""
    old = sample.load(released)[2]["model"]
    monkeypatch.setitem(SIZES, "demo", {k: old[k] for k in ("depth", "width", "heads", "adaln")})
    spec = data.Spec("pixels", (old["channels"], 4, 4), text={"width": 20})
    flags = ["--transport", "otfm", "--predict", "f", "--init", str(released), "--size", "demo"]

    def build(*more):
        cfg, _ = train.parse_config([*flags, "--patch", str(old["patch"]), *more])
        cfg = train.replace(cfg, precision="fp32", guide_range=())
        return train.build(cfg, train.network_arguments(cfg, spec), CPU)

    for given, missing in (([], "--no-caption_mask"), (["--no-caption_mask"], "--rope_layout released")):
        with pytest.raises(UserError, match=missing):
            build(*given)
    networks = build("--no-caption_mask", "--rope_layout", "released")
    assert_same(networks.model.state_dict(), sample.load(released)[0].state_dict())
