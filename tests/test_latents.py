"""Latent sets: what is encoded, how it is read, what happens to bad input; with tiny random autoencoders."""

import json
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

import data
from data import UserError

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
ROOT = Path(data.__file__).parent


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with 40 pictures in 3 classes and tiny networks: kl, dc, dino."""
    root = tmp_path_factory.mktemp("latents")
    source = data.open_data("demo")
    pixels = data.Decoder(source.spec)(source.read(np.arange(40), None).x)
    for i in range(40):
        path = root / f"pictures/class {source.labels[i] % 3}/{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i, ..., 0]).resize((48, 40), Image.BICUBIC).save(path)
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, scaling_factor=0.7, shift_factor=0.1,
        sample_size=32,
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


# --------------------------------------------------------------------------------------------------
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
    spec = data.open_data(str(moments)).spec
    assert (spec.factor, spec.scale, spec.shape, spec.buckets) == (2, 0.7, (4, 16, 16), ())


def test_autoencoder_without_posterior(place, tmp_path):
    out = encode(place, tmp_path / "dc", autoencoder="dc")
    vae = diffusers.AutoencoderDC.from_pretrained(place / "dc")
    source = data.open_data(str(out))
    assert source.spec.scale == 0.41407 and source.spec.shape == (8, 16, 16)
    with torch.no_grad():
        z = vae.encode(pictures(place) / 127.5 - 1).latent
        mirrored = vae.encode(pictures(place).flip(3) / 127.5 - 1).latent
    x = source.read(np.arange(40), np.random.default_rng(0)).x
    error = [(x / 0.41407 - want).abs().amax((1, 2, 3)) for want in (z, mirrored)]
    assert (torch.minimum(*error) < 5e-3).all() and (error[0] < error[1]).any() and (error[0] > error[1]).any()
    still = data.open_data(str(out), mirror=False).read(np.arange(40), np.random.default_rng(0)).x
    assert (still / 0.41407 - z).abs().max() < 5e-3


def test_read_draws_from_the_posterior(place, moments, tmp_path):
    """Over many draws, mean and deviation are the stored ones in network space, and --means stores just the mean."""
    source = data.open_data(str(moments))
    stored = load_file(moments / "latents_00000.safetensors")["latents"][0].astype(np.float64)
    x = source.read(np.zeros(4000, int), np.random.default_rng(0)).x.numpy().astype(np.float64)
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
    decode = data.Decoder(spec)
    found = decode((z - spec.shift) * spec.scale)
    assert found.shape == (5, 32, 32, 3) and decode.factor == 2
    assert np.abs(found - want.clamp(0, 255).permute(0, 2, 3, 1).numpy()).max() < 0.51
    with pytest.raises(UserError, match="has 8 channels, the latents have 4 channels; they were made with"):
        data.Decoder(spec, "cpu", str(place / "dc"))


@pytest.mark.parametrize("autoencoder", ["kl", "dc"])
def test_large_pictures_are_decoded_in_tiles(place, monkeypatch, autoencoder):
    """Of a size that is no multiple of the tile's; away from the seams as in one piece; small ones in one piece."""
    channels = {"kl": 4, "dc": 8}[autoencoder]
    spec = data.DataSpec("latents", (channels, 16, 16), autoencoder=str(place / autoencoder))
    decode = data.Decoder(spec)
    x = torch.randn(2, channels, 21, 38)
    if autoencoder == "dc":
        decode.vae.tile_sample_min_height = decode.vae.tile_sample_min_width = 32
        decode.vae.tile_sample_stride_height = decode.vae.tile_sample_stride_width = 24
    whole = decode(x)
    monkeypatch.setattr(data, "TILED", 42 * 76 - 1)
    tiled = decode(x)
    assert tiled.shape == whole.shape == (2, 42, 76, 3) and (tiled != whole).any()
    assert np.abs(tiled.astype(int) - whole)[:, :8, :8].mean() < np.abs(128 - whole.astype(int)).mean()
    assert (decode(x[..., :37]) == data.Decoder(spec)(x[..., :37])).all()       # and tiling is off again


def test_a_picture_file_becomes_its_mean_latent(place, moments):
    spec = data.open_data(str(moments)).spec
    file = sorted((place / "pictures").rglob("*.png"))[0]
    stored = load_file(moments / "latents_00000.safetensors")["latents"][0, 0, :4].astype(np.float32)
    found = data.encode_picture(file, spec, torch.device("cpu"))
    np.testing.assert_allclose(found[0], (stored - 0.1) * np.float32(0.7), atol=2e-3)


def test_same_bytes_again_and_from_two_ranks(place, moments, tmp_path, monkeypatch):
    assert contents(encode(place, tmp_path / "again")) == contents(moments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        encode(place, tmp_path / "ranks")
        assert (tmp_path / "ranks/meta.json").exists() == (rank == "0")
    assert contents(tmp_path / "ranks") == contents(moments)


def test_more_ranks_than_shards(place, moments, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    for rank in "43210":
        monkeypatch.setenv("RANK", rank)
        encode(place, tmp_path / "ranks")
    assert contents(tmp_path / "ranks") == contents(moments)


def test_tars_are_encoded_like_their_trees(place, moments, tmp_path):
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        tar.add(place / "pictures", "train")
    (tmp_path / "classes").mkdir()
    for folder in sorted((place / "pictures").iterdir()):                       # a tar per class
        with tarfile.open(tmp_path / f"classes/{folder.name}.tar", "w") as tar:
            for file in folder.iterdir():
                tar.add(file, file.name)
    want = {k: v for k, v in contents(moments).items() if k.startswith("latents")}
    for images in ("whole.tar", "classes"):
        out = encode(place, tmp_path / f"set of {images}", images=tmp_path / images)
        assert {k: v for k, v in contents(out).items() if k.startswith("latents")} == want, images


def test_captions_travel_in_the_order_of_the_latents(place, tmp_path, capsys):
    """From captions.jsonl and from texts beside the pictures alike."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for i, f in enumerate(sorted((place / "pictures").rglob("*.png"))[:5]):
        shutil.copy(f, folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"beside {i}")
    lines = [dict(image_file=f"{i}.png", captions=[f"“{i}” ü"]) for i in (3, 1, 4)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = encode(place, tmp_path / "set", images=folder)
    found = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert found == [dict(image_file=f"{i}.png", captions=[f"“{i}” ü"]) for i in (1, 3, 4)]
    source = data.open_data(str(out))
    assert source.labels.tolist() == [0, 1, 2] and source.describe() == "3 pictures with 3 captions"
    (folder / "captions.jsonl").unlink()
    source = data.open_data(str(encode(place, tmp_path / "beside", images=folder)))
    batch = source.read([3, 0], np.random.default_rng(0))
    assert [source.captions[k] for k in batch.y] == ["beside 3", "beside 0"]
    (folder / "captions.jsonl").write_text("no json\n")
    with pytest.raises(UserError, match="line 1"):
        encode(place, tmp_path / "other", images=folder)
    (out / "captions.jsonl").write_text('{"image_file": "0.png", "captions": "a"}\n')
    with pytest.raises(UserError, match="captions of 1 pictures, not of 3; restore"):
        data.open_data(str(out))
    (out / "captions.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="captions.jsonl"):
        data.open_data(str(out))


# --------------------------------------------------------------------------------------------------
# Interruption and bad input


def test_killed_and_run_again_keeps_finished_shards(place, tmp_path):
    command = [sys.executable, "data.py", "encode", "--images", place / "pictures", "--out", tmp_path / "set",
               "--device", "cpu", "--autoencoder", place / "kl", "--size", "32", "--batch", "1", "--shard", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (tmp_path / "set/latents_00003.safetensors").exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
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
    skipped = dict(line for shard in meta["shards"] for line in shard["skipped"])
    assert list(skipped) == [str(f.relative_to(tmp_path / "pictures")) for f in (files[3], files[20])]
    assert not any("0x" in why for why in skipped.values())                     # the same words on every rank
    assert meta["count"] == 38 == len(data.open_data(str(out)))
    shown = capsys.readouterr().out
    assert "38 of 40 pictures, 2 skipped" in shown and files[3].name in shown
    for file in files:
        file.write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the pictures could be opened"):
        encode(place, tmp_path / "none", images=tmp_path / "pictures")
    with pytest.raises(UserError, match="no picture of it could be opened; encode others"):
        data.open_data(str(tmp_path / "none"))
    before = sorted((tmp_path / "pictures").rglob("*"))
    for out in (tmp_path / "pictures", tmp_path / "pictures" / "latents"):
        with pytest.raises(UserError, match="pictures; give a folder outside of it"):
            encode(place, out, images=tmp_path / "pictures")
    assert sorted((tmp_path / "pictures").rglob("*")) == before


def test_full_disk_loses_nothing_complete(place, moments, tmp_path):
    resource = pytest.importorskip("resource")
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


def test_bad_input_is_refused_by_name(place, moments, tmp_path):
    (tmp_path / "none").mkdir()
    fewer = tmp_path / "fewer"
    shutil.copytree(place / "pictures", fewer)
    (fewer / "class 1").rename(fewer / "class x")
    for match, more, named in (
        ("no pictures", [], dict(images=tmp_path / "none")),
        ("no such folder or tar", [], dict(images=tmp_path / "nowhere")),
        ("multiple of 2", [], dict(size=31)),
        ("several need --native", ["--size", 32, 64], {}),
        ("there is no such folder", [], dict(autoencoder="nowhere")),
        ("plan.json was written with size = 32, not 64", [], dict(size=64)),
        ("plan.json was written with native = False, not True", ["--native"], {}),
        ("plan.json was written with classes = class 1, not class 2", [], dict(images=fewer)),
        ("plan.json was written with autoencoder", [], dict(autoencoder="dc")),
    ):
        with pytest.raises(UserError, match=match):
            encode(place, moments if "plan" in match else tmp_path / "set", *more, **named)
    with pytest.raises(SystemExit):
        encode(place, tmp_path / "set", "--batch", 0)
    with pytest.raises(UserError, match="no features"):
        data.open_data(str(moments), features=True)


def test_without_diffusers_all_but_the_autoencoder_works(moments, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    data.main(["inspect", str(moments), "--sheet", str(tmp_path / "sheet.png"), "--device", "cpu"])
    assert "no contact sheet" in (shown := capsys.readouterr().out) and "pip install diffusers" in shown
    assert next(data.batches(data.open_data(str(moments)), 4, 0, [0], 1)).x.shape == (4, 4, 16, 16)


def test_inspect_shows_what_a_set_is(place, moments, tmp_path, capsys):
    data.main(["inspect", str(moments), "--sheet", str(tmp_path / "sheet.png"), "--device", "cpu"])
    shown = capsys.readouterr().out
    assert "40 pictures of 3 classes: class 0 18," in shown and "all checksums are right" in shown
    assert Image.open(tmp_path / "sheet.png").size == (8 * 34 - 2, 4 * 34 - 2)


def test_broken_sets_are_refused(moments, tmp_path):
    shard = "latents_00001.safetensors"
    for name in ("cut", "flipped", "labels", "gone"):
        shutil.copytree(moments, tmp_path / name)
    raw = (moments / shard).read_bytes()
    (tmp_path / "cut" / shard).write_bytes(raw[:-7])
    with pytest.raises(UserError, match=f"{shard}: not a complete safetensors file"):
        data.open_data(str(tmp_path / "cut"))
    (tmp_path / "flipped" / shard).write_bytes(raw[:-5000] + bytes([raw[-5000] ^ 1]) + raw[-4999:])
    with pytest.raises(UserError, match=f"{shard}: wrong checksum"):
        data.main(["inspect", str(tmp_path / "flipped"), "--sheet", str(tmp_path / "sheet.png")])
    meta = json.loads((moments / "meta.json").read_text())
    (tmp_path / "labels/meta.json").write_text(json.dumps(meta | dict(classes=["one", "two"])))
    with pytest.raises(UserError, match="label 2 beyond the 2 classes"):
        data.open_data(str(tmp_path / "labels"))
    (tmp_path / "gone" / shard).unlink()
    with pytest.raises(FileNotFoundError, match=shard):
        data.open_data(str(tmp_path / "gone"))


# --------------------------------------------------------------------------------------------------
# Features, speed


def test_features_are_added_and_follow_their_latents(place, moments, tmp_path):
    shutil.copytree(moments, tmp_path / "set")
    out = encode(place, tmp_path / "set", "--features", place / "dino", "--grid", 2)
    assert (out / "latents_00000.safetensors").read_bytes() == (moments / "latents_00000.safetensors").read_bytes()
    source = data.open_data(str(out), features=True)
    net = transformers.AutoModel.from_pretrained(place / "dino")
    batch = next(data.batches(source, 8, 0, [0], 1))
    assert batch.x.shape == (8, 4, 16, 16) and batch.features.dtype == torch.float32
    assert batch.features.shape == (8, 4, 16) and source.features_shape == (4, 16)
    index = data.picture_indices(40, 8, 0, 0, 0, 1)
    pixels = torch.nn.functional.interpolate(pictures(place)[index] / 255, (28, 28), mode="bicubic", antialias=True)
    pixels = (pixels.clamp(0, 1) - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
    pixels = pixels / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    half = np.random.default_rng((0, 0, 0)).integers(2, size=8)                 # what read() draws first
    pixels = torch.where(torch.from_numpy(half).bool().view(-1, 1, 1, 1), pixels.flip(3), pixels)
    with torch.no_grad():
        want = net(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(batch.features, want, rtol=2e-3, atol=5e-3)
    assert next(data.batches(data.open_data(str(out)), 8, 0, [0], 1)).features is None
    with pytest.raises(UserError, match="features.json was written with grid = 2, not 4"):
        encode(place, out, "--features", place / "dino", "--grid", 4)


def test_any_number_of_threads_reads_the_same(moments):
    source, found = data.open_data(str(moments)), []
    want = [source.read(np.arange(40), np.random.default_rng(k)).x for k in range(8)]

    def work(k):
        found.append((k, source.read(np.arange(40), np.random.default_rng(k)).x))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(torch.equal(x, want[k]) for k, x in found)


READER = """
import sys, time
import data
def memory(what):                                       # MB of this process that no file backs
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(what))
def read(source, steps):
    began, stream = time.process_time(), data.batches(source, 128, 0, [0], 1)
    for _ in range(steps):
        next(stream)
    return steps * 128 / (time.process_time() - began)    # of one core
read(data.open_data("demo"), 4)                         # starts threads and such
before, began = memory("RssAnon"), time.perf_counter()
source = data.open_data(sys.argv[1])
opened = time.perf_counter() - began
rate = max(read(source, 8) for _ in range(6))
print(len(source), opened, rate, memory("RssAnon") - before, source.labels[-1])
"""


def synthetic(folder, count, shard):
    """A set of the real form whose latents, 4 x 32 x 32 moments, are holes in sparse files."""
    folder.mkdir()
    meta = dict(kind="latents", autoencoder="sd-vae", scale=0.18215, shift=0.0, shape=[4, 32, 32], moments=True,
                classes=[str(i) for i in range(1000)], count=count, shards=[])  # fmt: skip
    for k, first in enumerate(range(0, count, shard)):
        n = min(shard, count - first)
        size = n * 2 * 8 * 32 * 32 * 2
        head = dict(labels=dict(dtype="I64", shape=[n], data_offsets=[0, 8 * n]),
                    latents=dict(dtype="F16", shape=[n, 2, 8, 32, 32], data_offsets=[8 * n, 8 * n + size]))
        head = json.dumps(head).encode()
        name = f"latents_{k:05}.safetensors"
        with open(folder / name, "wb") as f:
            f.write(len(head).to_bytes(8, "little") + head + (np.arange(first, first + n) % 1000).tobytes())
            f.truncate(8 + len(head) + 8 * n + size)
        meta["shards"].append(dict(file=name, count=n))
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_reader_of_many_is_small_and_quick(tmp_path, count=200_000):
    """Moments as of ImageNet: opened in seconds, flat in memory, at least 2,000 a second and process."""
    folder = synthetic(tmp_path / "set", count, 1024)
    run = subprocess.run([sys.executable, "-c", READER, folder], cwd=ROOT, capture_output=True, text=True)
    assert not run.returncode, run.stderr
    found, opened, rate, megabytes, last = map(float, run.stdout.split())
    print(f"{count} latents: opened in {opened:.2f} s, {rate:.0f} latents/s, {megabytes:.0f} MB")
    assert (found, last) == (count, (count - 1) % 1000)
    assert opened < 5 and megabytes < 300 and rate > 2000
