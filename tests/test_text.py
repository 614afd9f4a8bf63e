"""Text to image: training and sampling on captions."""

import json
import shutil

import pytest
import test_text_data
import torch
from launch import assert_same, flags_of, in_turn, losses, train_here, weights
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import sample
import train
from data import UserError
from model import SIZES, TiM
from transition import TRANSPORTS

gemma, folder, ODD = test_text_data.gemma, test_text_data.folder, test_text_data.ODD
CPU, FP32 = torch.device("cpu"), torch.float32


def on(folder, *flags):
    """Flags of a short run on captioned pictures of 16 x 16."""
    pictures = ["--data", folder, "--channels", 3, "--side", 16, "--classes", 0, "--patch", 8]
    return [*pictures, "--guide_gt", 1.5, "--ema", 0.5, *flags]


def text_network(**changes):
    torch.manual_seed(0)
    sizes = {
        "channels": 3,
        "patch": 4,
        "depth": 2,
        "width": 32,
        "heads": 2,
        "adaln": 16,
        "caption": 128,
    }
    model = TiM(**sizes | changes).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def texts_of(*captions):
    return data.Texts(
        data.Captions([[c] for c in captions]), data.load_text_encoder("bytes"), "cpu"
    )


@pytest.mark.parametrize("masked", [True, False])
def test_a_picture_does_not_depend_on_its_batch_mates(masked):
    """Alone or beside longer and shorter captions: the same but for rounding; not so without the mask."""
    model, prompts = text_network(caption_mask=masked), ["red", "", "the " * 30, "blue heart"]
    spec = data.DataSpec("pixels", (3, 8, 8))

    def draw(indices, prompts):
        options = {"guidance": 2.0}
        texts = texts_of(*prompts)
        sampler = sample.Sampler(
            model, TRANSPORTS["tim"], {"train": {}}, spec, None, texts, options, {}
        )  # fmt: skip
        return sampler.latents(indices, range(len(prompts)), 3, seed=3)

    together = draw(range(4), prompts)
    for i, prompt in enumerate(prompts):
        gap = (draw([i], [prompt])[0] - together[i]).abs().max() / together[i].abs().max()
        assert gap < 1e-4 if masked or i == 2 else gap > 1e-3, (masked, prompt)


@pytest.mark.parametrize("tangent", ["data", "network", "average"])
@pytest.mark.parametrize("guide", [1.0, 2.0])
@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_a_dropped_caption_is_the_empty_one(drop, guide, tangent):
    """What a step shows the network is the caption or, dropped or to guide from, that of ""."""
    texts, model = texts_of("red", "blue"), text_network()
    want, _ = data.load_text_encoder("bytes")(["red", "blue", ""])
    batch, shown = data.Batch(torch.randn(8, 3, 8, 8), torch.arange(8) % 2), []
    model.y_embedder.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    f = sample.network_f(model, TRANSPORTS["tim"], texts)
    cfg = train.Config(drop=drop, guide_gt=guide, tangent=tangent, patch=4, h=0.005)
    train.objective(f, f, TRANSPORTS["tim"], cfg, batch, data.rng(0))
    seen = {int((want == v).all(-1).all(-1).nonzero()) for part in shown for v in part}
    assert seen == ({2} if drop else {0, 1}) | ({2} if guide == 2 else set())


@pytest.mark.parametrize("table", [4096, 2])
def test_training_resumes_exactly(folder, tmp_path, monkeypatch, table):
    """Six updates, or three and three, with features at hand or encoded by batch: the same."""
    monkeypatch.setattr(data, "TABLE", table)
    whole = train_here(tmp_path / "whole", *on(folder, "--steps", 6))
    parts = train_here(tmp_path / "parts", *on(folder, "--steps", 3))
    file = parts / "checkpoints/step_00000003/config.json"
    record = json.loads(file.read_text())
    del record["train"]["caption"]  # of a run from before this setting
    file.write_text(json.dumps(record))
    train_here(tmp_path / "parts", *on(folder, "--steps", 6))
    assert_same(weights(whole), weights(parts), atol=0, rtol=0)
    assert losses(whole) == losses(parts)
    if table == 2:
        monkeypatch.setattr(data, "TABLE", 4096)
        at_hand = train_here(tmp_path / "table", *on(folder, "--steps", 6))
        assert losses(at_hand) == pytest.approx(losses(whole), rel=1e-5)


def test_two_ranks_train_as_one(folder, tmp_path):
    """Also with the own path and a prediction of x; one rank says what is wrong with the captions."""
    switches = {"plain": [], "both": ["--predict", "x", "--tangent", "network"]}
    flags = {
        name: on(folder, *more, "--steps", 4, "--name", name) for name, more in switches.items()
    }
    _, said = in_turn(tmp_path, 2, [flags_of(tmp_path, *line) for line in flags.values()])
    assert said.count("7 broken lines") == 2  # once a run
    for name, line in flags.items():
        one = train_here(tmp_path / "one", *line, "--accumulate", 2)
        assert losses(tmp_path / name) == pytest.approx(losses(one), rel=1e-4)


def test_gemma_from_pictures_to_pictures(folder, gemma, tmp_path, capsys, refused):
    """encode, train, sample, with a tiny autoencoder and a tiny Gemma; nothing is asked again."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4,
    ).save_pretrained(tmp_path / "kl")  # fmt: skip
    encode = [
        "encode",
        "--images",
        folder,
        "--out",
        tmp_path / "set",
        "--autoencoder",
        tmp_path / "kl",
    ]
    data.main([*map(str, encode), "--size", "16", "--device", "cpu", "--workers", "1"])
    assert "7 broken lines are skipped" in capsys.readouterr().err
    latents = ["--data", tmp_path / "set", "--channels", 4, "--side", 8, "--classes", 0]
    latents += ["--text_encoder", gemma, "--steps", 5]
    path = train_here(tmp_path, *latents, pictures=True)
    config = json.loads(next(path.glob("checkpoints/*/config.json")).read_text())
    text = config["data"]["text"]
    assert len(text.pop("captions")) == 16
    assert text == {"encoder": str(gemma), "length": 256, "width": 20}
    assert config["model"]["caption"] == 20
    assert len(losses(path)) == 5 and (path / "samples/step_00000005.png").is_file()

    out, base = tmp_path / "grid.png", ["--checkpoint", path, "--steps", 1, 2, "--device", "cpu"]
    argv = [*base, "--guidance", 1.5, "--out"]
    sample.main([*map(str, argv), str(out), "--prompts", *ODD])
    with Image.open(out) as grid:
        assert grid.width > len(ODD) * 16 and grid.height > 2 * 16
    (tmp_path / "prompts.txt").write_text("red\n\nпривет", "utf-8")
    many = [*argv, tmp_path / "many", "--prompts_file", tmp_path / "prompts.txt", "-n", 7]
    sample.main(list(map(str, many)))
    lines = (tmp_path / "many/steps_2/captions.jsonl").read_text().splitlines()
    drawn = [json.loads(line) for line in lines]
    texts = ["red", "", "привет", "red", "", "привет", "red"]
    assert [line["captions"] for line in drawn] == [[text] for text in texts]
    assert all((tmp_path / "many/steps_2" / line["image_file"]).is_file() for line in drawn)

    assert "was trained on texts" in refused(sample.main, *argv, out, "--classes", 1)
    assert "features are 128 wide" in refused(sample.main, *argv, out, "--text_encoder", "bytes")
    (tmp_path / "long.txt").write_text("a\n" * 101)
    long = [*argv, out, "--prompts_file", tmp_path / "long.txt"]
    assert "101 columns are too many for a grid; give -n" in refused(sample.main, *long)
    missing = [*argv, out, "--prompts_file", tmp_path / "none"]
    assert "not text in UTF-8" in refused(sample.main, *missing)
    assert "no such folder" in refused(sample.main, *argv, out, "--text_encoder", tmp_path / "none")

    captions = tmp_path / "set/captions.jsonl"
    captions.write_text(captions.read_text().replace("picture 5", "picture X"))
    again = flags_of(tmp_path, *latents)
    assert "data text" in refused(train.main, *again)  # other captions are another set
    captions.write_text('{"image_file": "0.png", "captions": "a"}\n')
    assert "captions of 1 pictures" in refused(train.main, *again)


@pytest.fixture
def released(golden_text, tmp_path):
    """A file like the released text weights: the golden network."""
    state = {k[8:]: v for k, v in golden_text.items() if k.startswith("weights.")}
    torch.save(state, tmp_path / "t2i_model.bin")
    return tmp_path / "t2i_model.bin"


def test_released_text_weights_sample_with_a_local_gemma(released, gemma, tmp_path, refused):
    """A released file says which encoder it wants; its prompts are read by a tiny Gemma here."""
    model, transport, config = sample.load(released)
    assert config["data"]["text"] == {"encoder": data.GEMMA, "length": 256, "width": 20}
    assert "give --prompts" in refused(sample.main, "--checkpoint", released, "--device", "cpu")
    sample.main(["--checkpoint", str(released), "--export", str(tmp_path / "out.safetensors")])
    assert load_file(tmp_path / "out.safetensors").keys() == model.state_dict().keys()

    spec = config["data"] | {"kind": "random"}  # no autoencoder here
    sample.save(tmp_path / "mine.safetensors", model.state_dict(), config | {"data": spec})
    prompts = ["red apple", "sun"]
    sampler = sample.open_sampler(
        tmp_path / "mine.safetensors", CPU, prompts=prompts, text_encoder=str(gemma)
    )
    found = sampler.latents([0, 1], [0, 1], 1, seed=0)
    encode = data.load_text_encoder(str(gemma), pad_to_length=True)
    features, mask = encode([*prompts, ""])  # padding is seen, as trained
    assert features.shape[1] == 256
    z = sample.initial_noise(config["data"]["shape"], 0, range(2))
    y, null = (features[:2], mask[:2]), (features[[2, 2]], mask[[2, 2]])
    want = sample.generate(model, transport, z, y, 1, 2.5, null=null, strict=True)
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


def test_released_text_weights_are_trained_on_as_they_were(released, monkeypatch):
    """--init says which of the flags of padding and of token positions the file needs."""
    old = sample.load(released)[2]["model"]
    monkeypatch.setitem(SIZES, "demo", {k: old[k] for k in ("depth", "width", "heads", "adaln")})
    spec = data.DataSpec("random", (old["channels"], 4, 4), text={"width": 20})
    flags = [
        "--transport",
        "otfm",
        "--predict",
        "f",
        "--init",
        str(released),
        "--patch",
        str(old["patch"]),
    ]
    for more, rule in (
        ([], "--no-caption_mask"),
        (["--no-caption_mask"], "--rope_layout released"),
        (None, None),
    ):
        more = ["--no-caption_mask", "--rope_layout", "released"] if more is None else more
        cfg, _ = train.parse_config([*flags, "--size", "demo", *more])
        network = train.network_arguments(cfg, spec)
        if rule:
            with pytest.raises(UserError, match=rule):
                train.build(cfg, network, CPU, FP32)
        else:
            assert_same(
                train.build(cfg, network, CPU, FP32).model.state_dict(), load_as_saved(released)
            )


def load_as_saved(file):
    return sample.load(file)[0].state_dict()


def test_prompts_are_refused_by_a_network_of_classes(golden_model, tmp_path, refused):
    save_file(golden_model.state_dict(), tmp_path / "classes.safetensors")
    argv = ["--checkpoint", tmp_path / "classes.safetensors", "--device", "cpu", "--prompts", "a"]
    assert "give --classes" in refused(sample.main, *argv)


def test_the_emoji_preset_trains_and_draws_its_prompts(tmp_path):
    train.main(
        [
            "--config",
            "emoji",
            "--steps",
            "2",
            "--batch",
            "4",
            "--device",
            "cpu",
            "--runs",
            str(tmp_path),
        ]
    )
    config = sample.load(tmp_path / "emoji")[2]
    assert "red apple" in config["data"]["prompts"] and config["train"]["size"] == "emoji"
    assert (tmp_path / "emoji/samples/step_00000002.png").is_file()


def test_a_text_preset_needs_captions():
    spec = data.DataSpec("latents", (32, 16, 16), classes=tuple("ab"))
    with pytest.raises(UserError, match="--caption 1152"):
        train.network_arguments(train.PRESETS["t2i_xl"], spec)
    neither = data.DataSpec("latents", (32, 16, 16))
    with pytest.raises(UserError, match="neither classes nor captions"):
        train.network_arguments(train.PRESETS["t2i_xl"], neither)
    cfg, _ = train.parse_config(
        ["--config", "t2i_xl", "--no-caption_mask", "--rope_layout", "released"]
    )
    text = data.DataSpec("latents", (32, 16, 16), text={"width": 1152})
    network = train.network_arguments(cfg, text)
    assert not network["caption_mask"] and network["rope_layout"] == "released"


def test_the_full_preset_is_the_released_network(capsys):
    train.main(["--config", "t2i_xl", "--dry_run", "--world_size", "16"])
    said = capsys.readouterr().out
    assert "864,978,080 parameters in 894 tensors" in said and "1,024,000,000 images" in said
    cfg, _ = train.parse_config(["--config", "t2i_xl"])
    times = cfg.transport, cfg.time_mean, cfg.time_std
    assert times == ("tim", 0.0, 1.6) and (cfg.guidance, cfg.drop, cfg.lr) == (2.5, 0.1, 4e-4)
    assert (cfg.autoencoder, cfg.text_encoder) == ("dc-ae", "google/gemma-3-1b-it")


def test_another_text_encoder_folder_draws_the_same(folder, tmp_path, gemma):
    """The folder of the encoder may have moved: --text_encoder says where it is now."""
    run = train_here(tmp_path, *on(folder, "--text_encoder", gemma, "--steps", 1))
    moved = shutil.copytree(gemma, tmp_path / "moved")
    draw = lambda **given: sample.open_sampler(run, CPU, prompts=["a"], **given).latents(
        [0], [0], 1, 0
    )
    torch.testing.assert_close(draw(), draw(text_encoder=str(moved)))
