"""Latent sets: what is encoded, how it is read, what happens to bad input; with tiny random autoencoders."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import data
import evaluate
import sample
import train
from data import UserError
from model import SIZES, TiM
from transition import TRANSPORTS

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with 40 real pictures in 3 classes and tiny networks: kl, dc, dino."""
    root = tmp_path_factory.mktemp("latents")
    source = data.demo()
    for i in range(40):
        path = root / f"pictures/class {source.labels[i] % 3}/{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.pixels[i, 0]).resize((48, 40), Image.BICUBIC).save(path)
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, scaling_factor=0.7, shift_factor=0.1,
    ).save_pretrained(root / "kl")  # fmt: skip
    diffusers.AutoencoderDC(
        latent_channels=8, attention_head_dim=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        upsample_block_type="interpolate", downsample_block_type="stride_conv", scaling_factor=0.41407,
    ).save_pretrained(root / "dc")  # fmt: skip
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    dino = transformers.Dinov2Config(**small, image_size=28, patch_size=14)
    transformers.Dinov2Model(dino).save_pretrained(root / "dino")
    return root


def encode(place, out, *more, images="pictures", autoencoder="kl", size=32):
    data.main(["encode", "--images", str(place / images), "--out", str(out), "--autoencoder", str(place / autoencoder),
               "--size", str(size), "--batch", "4", "--shard", "16", "--device", "cpu", *map(str, more)])  # fmt: skip
    return out


@pytest.fixture(scope="session")
def moments(place):
    return encode(place, place / "moments")


def contents(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def pictures(place, side=32):
    files = sorted((place / "pictures").rglob("*.png"))
    return torch.from_numpy(np.stack([data.crop(Image.open(f).convert("RGB"), side) for f in files]))


# ---------------------------------------------------------------------------------------------------------------------
# What is stored


def test_stored_moments_are_those_of_picture_and_mirror_image(place, moments):
    vae = diffusers.AutoencoderKL.from_pretrained(place / "kl")
    stored = np.concatenate([load_file(f)["latents"] for f in sorted(moments.glob("latents_*"))])
    x = pictures(place) / 127.5 - 1
    with torch.no_grad():
        for half, view in enumerate((x, x.flip(3))):
            posterior = vae.encode(view).latent_dist
            want = torch.cat([posterior.mean, posterior.std], 1).numpy()
            np.testing.assert_allclose(stored[:, half], want, rtol=2e-3, atol=2e-3)
    meta = json.loads((moments / "meta.json").read_text())
    assert (meta["count"], meta["scale"], meta["shift"], meta["shape"]) == (40, 0.7, 0.1, [4, 16, 16])
    assert meta["classes"] == ["class 0", "class 1", "class 2"]


def test_autoencoder_without_posterior(place, tmp_path):
    out = encode(place, tmp_path / "dc", autoencoder="dc")
    vae = diffusers.AutoencoderDC.from_pretrained(place / "dc")
    source = data.open_data(str(out), (8, 16, 16), 3)
    assert source.spec["scale"] == 0.41407
    with torch.no_grad():
        z = vae.encode(pictures(place) / 127.5 - 1).latent
        mirrored = vae.encode(pictures(place).flip(3) / 127.5 - 1).latent
    x = source.read(np.arange(40), np.random.default_rng(0))
    error = [np.abs(x / 0.41407 - want.numpy()).max((1, 2, 3)) for want in (z, mirrored)]
    assert (np.minimum(*error) < 5e-3).all() and (error[0] < error[1]).any() and (error[0] > error[1]).any()


def test_read_draws_from_the_posterior(place, moments, tmp_path):
    """Over many draws, mean and deviation are the stored ones in network space, and --means stores just the mean."""
    source = data.open_data(str(moments))
    stored = load_file(moments / "latents_00000.safetensors")["latents"][0].astype(np.float64)
    x = source.read(np.zeros(4000, int), np.random.default_rng(0)).astype(np.float64)
    want = (stored[:, :4].mean(0) - 0.1) * 0.7                                  # over both halves, as often each
    spread = np.sqrt((stored[:, 4:] ** 2).mean(0) + stored[:, :4].var(0)) * 0.7
    assert (np.abs(x.mean(0) - want) < 6 * spread / 4000**0.5).all()
    np.testing.assert_allclose(x.std(0), spread, rtol=0.1)
    means = encode(place, tmp_path / "means", "--means")
    np.testing.assert_array_equal(load_file(means / "latents_00000.safetensors")["latents"][0], stored[:, :4])


def test_decoder_undoes_scale_and_shift(place, moments):
    vae = diffusers.AutoencoderKL.from_pretrained(place / "kl")
    spec = data.open_data(str(moments)).spec
    z = torch.randn(5, 4, 16, 16)
    with torch.no_grad():
        want = vae.decode(z).sample * 127.5 + 127.5
    found = data.decoder(spec, at_once=2)((z - spec["shift"]) * spec["scale"])
    assert found.shape == (5, 32, 32, 3)
    assert np.abs(found - want.clamp(0, 255).permute(0, 2, 3, 1).numpy()).max() < 0.51
    pixels = data.demo()
    x = pixels.read(np.arange(3), None)
    assert (data.decoder(pixels.spec)(torch.from_numpy(x))[..., 0] == pixels.pixels[:3, 0]).all()


def test_same_bytes_again_and_from_two_ranks(place, moments, tmp_path, monkeypatch):
    assert contents(encode(place, tmp_path / "again")) == contents(moments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        encode(place, tmp_path / "ranks")
        assert (tmp_path / "ranks/meta.json").exists() == (rank == "0")
    assert contents(tmp_path / "ranks") == contents(moments)


def test_tars_are_read_like_their_trees(place, moments, tmp_path):
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        tar.add(place / "pictures", "train")
    with tarfile.open(tmp_path / "train.tar", "w") as outer:                    # a tar of class tars, as ImageNet ships
        for folder in sorted((place / "pictures").iterdir()):
            with tarfile.open(tmp_path / f"{folder.name}.tar", "w") as inner:
                for f in folder.iterdir():
                    inner.add(f, f.name)
            outer.add(tmp_path / f"{folder.name}.tar", f"{folder.name}.tar")
    (tmp_path / "classes").mkdir()
    for folder in (place / "pictures").iterdir():
        shutil.move(tmp_path / f"{folder.name}.tar", tmp_path / "classes")
    want = {k: v for k, v in contents(moments).items() if k.startswith("latents")}
    for images in ("whole.tar", "train.tar", "classes"):
        out = encode(place, tmp_path / f"set of {images}", images=tmp_path / images)
        assert {k: v for k, v in contents(out).items() if k.startswith("latents")} == want, images
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:30000])
    with pytest.raises(UserError, match="not a whole, uncompressed tar"):
        data.list_pictures(tmp_path / "cut.tar")


def test_captions_travel_in_the_order_of_the_latents(place, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for i, f in enumerate(sorted((place / "pictures").rglob("*.png"))[:5]):
        shutil.copy(f, folder / f"{i}.png")
    lines = [dict(image_file=f"{i}.png", captions=[f"“{i}” ü"]) for i in (3, 1, 4)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = encode(place, tmp_path / "set", images=folder)
    found = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert [line["captions"] for line in found] == [["“1” ü"], ["“3” ü"], ["“4” ü"]]
    assert data.open_data(str(out)).labels.tolist() == [0, 1, 2]
    (folder / "captions.jsonl").write_text("no json\n")
    with pytest.raises(UserError, match="line 1"):
        encode(place, tmp_path / "other", images=folder)


# ---------------------------------------------------------------------------------------------------------------------
# Interruption and bad input


def test_killed_and_run_again_keeps_finished_shards(place, tmp_path):
    command = [sys.executable, "data.py", "encode", "--images", place / "pictures", "--out", tmp_path / "set",
               "--device", "cpu", "--autoencoder", place / "kl", "--size", "32", "--batch", "1", "--shard", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (tmp_path / "set/latents_00003.safetensors").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "set").glob("latents_*.safetensors")}
    assert 4 <= len(before) < 20
    with pytest.raises(UserError, match="stopped after"):
        data.open_data(str(tmp_path / "set"))
    encode(place, tmp_path / "set", "--batch", 1, "--shard", 2)
    encode(place, tmp_path / "clean", "--batch", 1, "--shard", 2)
    assert all((tmp_path / "set" / name).stat().st_mtime_ns == at for name, at in before.items())
    whole = {k: v for k, v in contents(tmp_path / "set").items() if not k.endswith(".tmp")}
    assert whole == contents(tmp_path / "clean")


def test_broken_pictures_are_listed_skipped_and_counted(place, tmp_path, capsys):
    shutil.copytree(place / "pictures", tmp_path / "pictures")
    files = sorted((tmp_path / "pictures").rglob("*.png"))
    files[3].write_bytes(b"no picture")
    files[20].write_bytes(files[20].read_bytes()[:200])
    out = encode(place, tmp_path / "set", images=tmp_path / "pictures")
    meta = json.loads((out / "meta.json").read_text())
    names = [name for shard in meta["shards"] for name, _ in shard["skipped"]]
    assert names == [str(f.relative_to(tmp_path / "pictures")) for f in (files[3], files[20])]
    assert meta["count"] == 38 == len(data.open_data(str(out)).labels)
    shown = capsys.readouterr().out
    assert "2 skipped" in shown and names[0] in shown


def test_full_disk_loses_nothing_complete(place, moments, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = len((moments / "latents_00000.safetensors").read_bytes())
    shutil.copytree(moments, tmp_path / "set")
    (tmp_path / "set/meta.json").unlink()
    (tmp_path / "set/latents_00001.safetensors").unlink()
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole // 2, hard))
    try:
        with pytest.raises(UserError, match="not written.*free the disk"):
            encode(place, tmp_path / "set")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(f.name[8:13] for f in (tmp_path / "set").glob("latents*")) == ["00000", "00002"]
    assert contents(encode(place, tmp_path / "set")) == contents(moments)


def test_bad_input_is_refused_by_name(place, moments, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    fewer = tmp_path / "fewer"
    shutil.copytree(place / "pictures", fewer)
    (fewer / "class 1").rename(fewer / "class x")
    for match, more, named in (
        ("no pictures", [], dict(images=tmp_path / "none")),
        ("no such folder or tar", [], dict(images=tmp_path / "nowhere")),
        ("multiple of 2", [], dict(size=31)),
        ("does not load", [], dict(autoencoder="nowhere")),
        ("begun with size 32, not 64", [], dict(size=64)),
        ("begun with classes class 1, not class 2", [], dict(images=fewer)),
        ("begun with autoencoder", [], dict(autoencoder="dc")),
        ("--batch 0", ["--batch", 0], {}),
    ):
        with pytest.raises(UserError, match=match):
            encode(place, moments if "begun" in match else tmp_path / "set", *more, **named)
    for match, more in (
        ("channels 4.*asks for 32", dict(shape=(32, 16, 16))),
        ("height 16.*asks for 32", dict(shape=(4, 32, 32))),
        ("classes 3.*asks for 1000", dict(classes=1000)),
        ("autoencoder .*kl.*asks for sd-vae", dict(autoencoder="sd-vae")),
        ("no features", dict(features=True)),
    ):
        with pytest.raises(UserError, match=match):
            data.open_data(str(moments), **more)


def test_without_diffusers_all_but_the_autoencoder_works(moments, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    data.main(["inspect", str(moments), "--sheet", str(tmp_path / "sheet.png"), "--device", "cpu"])
    assert "no contact sheet" in (shown := capsys.readouterr().out) and "pip install diffusers" in shown
    assert next(data.batches(data.open_data(str(moments)), 4, 0, [0], 1))[0].shape == (4, 4, 16, 16)


def test_broken_sets_are_refused(moments, tmp_path):
    shard = "latents_00001.safetensors"
    for name in ("cut", "flipped", "labels", "gone"):
        shutil.copytree(moments, tmp_path / name)
    raw = (moments / shard).read_bytes()
    (tmp_path / "cut" / shard).write_bytes(raw[:-7])
    with pytest.raises(UserError, match=f"{shard}.*header says"):
        data.open_data(str(tmp_path / "cut"))
    (tmp_path / "flipped" / shard).write_bytes(raw[:-5000] + bytes([raw[-5000] ^ 1]) + raw[-4999:])
    with pytest.raises(UserError, match=f"{shard}: wrong checksum"):
        data.main(["inspect", str(tmp_path / "flipped"), "--sheet", str(tmp_path / "sheet.png")])
    meta = json.loads((moments / "meta.json").read_text())
    (tmp_path / "labels/meta.json").write_text(json.dumps(meta | dict(classes=["one", "two"])))
    with pytest.raises(UserError, match="label 2 beyond the 2 classes"):
        data.open_data(str(tmp_path / "labels"))
    (tmp_path / "gone" / shard).unlink()
    command = [sys.executable, "data.py", "inspect", tmp_path / "gone"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and shard in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Features, the authors' layout, speed


def test_features_are_added_and_follow_their_latents(place, moments, tmp_path):
    shutil.copytree(moments, tmp_path / "set")
    out = encode(place, tmp_path / "set", "--features", place / "dino", "--grid", 2)
    assert (out / "latents_00000.safetensors").read_bytes() == (moments / "latents_00000.safetensors").read_bytes()
    source = data.open_data(str(out), features=True)
    net = transformers.AutoModel.from_pretrained(place / "dino")
    x, y, tokens = next(data.batches(source, 8, 0, [0], 1))
    assert x.shape == (8, 4, 16, 16) and tokens.shape == (8, 4, 16) and tokens.dtype == torch.float32
    index = data.positions(40, 8, 0, 0, 0, 1)
    pixels = torch.nn.functional.interpolate(pictures(place)[index] / 255, (28, 28), mode="bicubic", antialias=True)
    pixels = (pixels.clamp(0, 1) - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
    pixels = pixels / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    half = np.random.default_rng((0, 0, 0)).integers(2, size=8)                 # what read() draws first
    pixels = torch.where(torch.from_numpy(half).bool().view(-1, 1, 1, 1), pixels.flip(3), pixels)
    with torch.no_grad():
        want = net(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(tokens, want, rtol=2e-3, atol=5e-3)
    assert len(next(data.batches(data.open_data(str(out)), 8, 0, [0], 1))) == 2
    with pytest.raises(UserError, match="begun with grid 2, not 4"):
        encode(place, out, "--features", place / "dino", "--grid", 4)


def test_alignment_loss_is_one_minus_the_cosine():
    """It moves the projector, costs nothing when it is off, and vanishes where the tokens are the features."""
    torch.manual_seed(0)
    model = TiM(4, 2, **SIZES["demo"], classes=3, projector=[2, 32, 16])
    x, y, features = torch.randn(4, 4, 8, 8), torch.arange(4) % 3, torch.randn(4, 16, 16)
    args = model, model, TRANSPORTS["tim"]

    def loss(align, features=None):
        return train.objective(*args, train.Config(align=align, align_depth=2), 0.005, x, y, data.rng(0), features)[0]

    off, one, two = loss(0.0), loss(1.0, features), loss(2.0, features)
    torch.testing.assert_close(two - one, one - off)
    assert 0 < float((one - off).detach()) < 2
    one.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.projector.parameters())
    seen = []
    model.projector.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    loss(1.0, features)
    assert len(seen) == 1                                                       # in the pass with gradients alone
    torch.testing.assert_close(loss(1.0, 3 * seen[0]), off)
    loss(0.0)
    assert len(seen) == 2


@pytest.mark.parametrize("stored_scale", [1.0, 0.18215])
def test_authors_layout(tmp_path, stored_scale):
    z = np.random.default_rng(0).normal(size=(6, 2, 4, 8, 8)).astype(np.float32) / 0.18215
    for i in range(6):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        tensors = dict(latent=(z[i] * np.float32(stored_scale)), label=np.array([5 - i]))
        save_file(tensors, tmp_path / f"{i % 2}/{i}.safetensors")
    source = data.open_data(str(tmp_path), (4, 8, 8), 6, "sd-vae")
    assert source.labels.tolist() == [5, 3, 1, 4, 2, 0]
    x = source.read(np.array([3, 3, 3, 3]), np.random.default_rng(1))
    assert all(min(np.abs(v - z[1, half] * 0.18215).max() for half in (0, 1)) < 1e-5 for v in x)
    save_file(dict(latent=z[0]), tmp_path / "0/8.safetensors")
    with pytest.raises(UserError, match="8.safetensors.*one label"):
        data.open_data(str(tmp_path))


READER = """
import sys, time
import data
def memory(what):                                       # MB; ru_maxrss would remember the parent's
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(what))
def read(source, steps):
    began, stream = time.perf_counter(), data.batches(source, 128, 0, [0], 1)
    for _ in range(steps):
        next(stream)
    return steps * 128 / (time.perf_counter() - began)
read(data.demo(), 4)                                    # starts threads and such
open("/proc/self/clear_refs", "w").write("5")           # the peak starts here
before, began = memory("VmRSS"), time.perf_counter()
source = data.open_data(sys.argv[1])
opened = time.perf_counter() - began
rate = max(read(source, 60) for _ in range(5))
print(len(source.labels), opened, rate, memory("VmHWM") - before, memory("VmHWM"), source.labels[-1])
"""


def synthetic(folder, count, shard, halves):
    """A set of the real form whose latents are holes in sparse files."""
    folder.mkdir()
    meta = dict(kind="latents", autoencoder="sd-vae", scale=0.18215, shift=0.0, shape=[4, 32, 32], moments=halves == 8,
                classes=[str(i) for i in range(1000)], count=count, shards=[])  # fmt: skip
    for k, first in enumerate(range(0, count, shard)):
        n = min(shard, count - first)
        size = n * 2 * halves * 32 * 32 * 2
        head = dict(labels=dict(dtype="I64", shape=[n], data_offsets=[0, 8 * n]),
                    latents=dict(dtype="F16", shape=[n, 2, halves, 32, 32], data_offsets=[8 * n, 8 * n + size]))
        head = json.dumps(head).encode()
        name = f"latents_{k:05}.safetensors"
        with open(folder / name, "wb") as f:
            f.write(len(head).to_bytes(8, "little") + head + (np.arange(first, first + n) % 1000).tobytes())
            f.truncate(8 + len(head) + 8 * n + size)
        meta["shards"].append(dict(file=name, count=n))
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize("count, halves", [(1_281_167, 8), (4096, 8)])
def test_reader_of_a_million_is_small_and_quick(tmp_path, count, halves):
    """Moments of ImageNet's size: opened in seconds, flat in memory; of a set within the page cache: the speed."""
    folder = synthetic(tmp_path / "set", count, 1024, halves)
    run = subprocess.run([sys.executable, "-c", READER, folder], cwd=ROOT, capture_output=True, text=True)
    assert not run.returncode, run.stderr
    found, opened, rate, megabytes, whole, last = map(float, run.stdout.split())
    print(f"{count} latents: opened in {opened:.2f} s, {rate:.0f} latents/s, {megabytes:.0f} MB of {whole:.0f} MB")
    assert (found, last) == (count, (count - 1) % 1000)
    assert opened < 5 and megabytes < 300 and rate > 2000


# ---------------------------------------------------------------------------------------------------------------------
# All of it


@pytest.mark.slow
@pytest.mark.parametrize("autoencoder", ["kl", "dc"])
def test_encode_inspect_train_sample_decode(place, tmp_path, autoencoder, capsys):
    aligned = autoencoder == "kl"                                               # one of the two with the alignment loss
    out = encode(place, tmp_path / "set", *(["--features", place / "dino", "--grid", 4] if aligned else []),
                 autoencoder=autoencoder)  # fmt: skip
    data.main(["inspect", str(out), "--sheet", str(tmp_path / "sheet.png")])
    shown = capsys.readouterr().out
    assert "40 x" in shown and "checksums are right" in shown and Image.open(tmp_path / "sheet.png").size > (200, 100)
    command = [sys.executable, "train.py", "--data", out, "--steps", "50", "--batch", "16", "--patch", "4"]
    command += ["--runs", tmp_path / "runs"]
    command += ["--align", "0.5", "--align_depth", "2"] if aligned else []
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not run.returncode, run.stderr
    model, row, config = sample.load(tmp_path / "runs/demo")
    names = safe_open(tmp_path / "runs/demo/ema.safetensors", "pt").keys()
    assert any(k.startswith("projector.") for k in names) == aligned and not hasattr(model, "projector")
    sample.main(["--checkpoint", str(tmp_path / "runs/demo"), "--steps", "1", "2", "--out", str(tmp_path / "grid.png")])
    assert Image.open(tmp_path / "grid.png").size == ((3 * 34 - 2) * 2, (2 * 34 - 2) * 2)
    x = sample.latents(model, row, config, range(3), 0, 2, [0, 1, 2])
    pixels = data.decoder(config["data"])(x)
    assert pixels.shape == (3, 32, 32, 3) and pixels.dtype == np.uint8 and pixels.std() > 0
    elsewhere = str(place / ("dc" if aligned else "kl"))
    with pytest.raises(data.UserError, match="channels, the latents have"):
        sample.main(["--checkpoint", str(tmp_path / "runs/demo"), "--autoencoder", elsewhere])


def test_speed_times_the_decoder(place, tmp_path, capsys):
    flags = "--config imagenet_b --size demo --channels 8 --side 4 --patch 2 --batch 2 --steps 1 --repeats 1"
    for autoencoder, n in ((place / "dc", 1), (place / "nothing", 0)):
        out = tmp_path / "speed.json"
        device = ["--no-compile", "--device", "cpu", "--precision", "fp32"]
        evaluate.main(["speed", *flags.split(), *device, "--autoencoder", str(autoencoder), "--out", str(out)])
        rows = json.loads(out.read_text()).get("decoding", [])
        assert len(rows) == n and all(row["images/s"] > 0 and row["MiB"] > 0 for row in rows)
    assert "Decoding was not measured" in capsys.readouterr().out
