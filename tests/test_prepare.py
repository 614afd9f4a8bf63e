"""`data.py prepare`: what is stored, in what order it survives what, and how it is trained on."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from launch import ENV, log, shell, torchrun, train_here
from PIL import Image
from tiny import save_dc, save_dino, save_kl

import data
import train
from data import UserError

diffusers = pytest.importorskip("diffusers")
NATIVE = ("--native", "--patch", 2)
RATIOS = [(1, 4), (2, 7), (2, 5), (1, 2), (3, 4), (1, 1), (4, 3), (2, 1), (5, 2), (4, 1)]


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CHUNK", 16)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """40 pictures in 3 classes, 30 captioned ones of ten ratios and two areas, and tiny networks."""
    root, numbers = tmp_path_factory.mktemp("prepare"), np.random.default_rng(0)
    for name in [f"pictures/class {i % 3}/{i:04}.png" for i in range(40)]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise = numbers.integers(256, size=(6, 7, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((48, 40), Image.BICUBIC).save(root / name)
    lines = []
    (root / "ratios").mkdir()
    for i in range(30):
        (a, b), area = RATIOS[i % 10], 100 if i < 20 else 50
        size = round(area * (b / a) ** 0.5), round(area * (a / b) ** 0.5)
        noise = numbers.integers(256, size=(7, 7, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.BICUBIC).save(root / f"ratios/{i:02}.png")
        texts = [f"thing {i} “ü”\n", "a picture"]
        lines.append(json.dumps({"image_file": f"{i:02}.png", "captions": texts}) + "\n")
    (root / "ratios/captions.jsonl").write_text("".join(lines[::-1]))
    save_kl(root / "kl")
    save_dc(root / "dc")
    save_dino(root / "dino")
    return root


def flags(place, out, *more, images="pictures", autoencoder="kl", size=(32,)):
    """Of a prepare command; an autoencoder of "" stores pixels."""
    line = ["prepare", "--images", place / images, "--out", out, "--size", *size, "--batch", 4]
    autoencoder = "dc" if "--native" in more else autoencoder
    line += ["--autoencoder", place / autoencoder] if autoencoder else []
    return [*map(str, [*line, "--device", "cpu", *more])]


def prepare(place, out, *more, **how):
    data.main(flags(place, out, *more, **how))
    return out


def native(place, out, *more, **how):
    how = {"images": "ratios", "size": (32, 64)} | how
    return prepare(place, out, *NATIVE, *more, **how)


@pytest.fixture(scope="module")
def latents(place):
    return prepare(place, place / "latents", "--pixels")


@pytest.fixture(scope="module")
def native_set(place):
    return native(place, place / "native", "--pixels")


def contents(folder):
    """Of a set, without what it keeps of its own making."""
    files = {f.name: f.read_bytes() for f in sorted(folder.iterdir())}
    return {name: raw for name, raw in files.items() if name != "lock"}


def cropped(place, side=32):
    files = sorted((place / "pictures").rglob("*.png"))
    return torch.from_numpy(np.stack([data.crop(data.open_picture(f), side) for f in files]))


def encode(folder, pixels):
    """Mean and deviation of the posterior, or the latent, of diffusers itself; uint8 (B, 3, H, W)."""
    with torch.no_grad():
        if folder.name == "dc":
            net = diffusers.AutoencoderDC.from_pretrained(folder)
            return net.encode(pixels / 127.5 - 1).latent
        net = diffusers.AutoencoderKL.from_pretrained(folder)
        posterior = net.encode(pixels / 127.5 - 1).latent_dist
        return torch.cat([posterior.mean, posterior.std], 1)


def everything(source, seed=0):
    return source.read(np.arange(len(source)), np.random.default_rng(seed))


# --- What is stored -------------------------------------------------------------------------------


def test_latents_are_those_of_picture_and_mirror_image_in_fp32(place, latents, tmp_path):
    """In plain .npy files, memory-mapped; a bf16 encoder would be off by ten times the bound."""
    stored = np.load(latents / "x_32x32.npy", mmap_mode="r")
    assert stored.shape == (40, 2, 8, 16, 16) and stored.dtype == np.float16
    pixels = cropped(place)
    for k, view in enumerate((pixels, pixels.flip(3))):
        np.testing.assert_allclose(stored[:, k], encode(place / "kl", view), rtol=1e-3, atol=1e-3)
    source = data.open_data(str(latents))
    spec = source.spec
    assert isinstance(source.arrays[0], np.memmap) and len(source) == 40
    assert (spec.kind, spec.shape, spec.factor, spec.mean) == ("latents", (4, 16, 16), 2, 0.1)
    assert spec.std == pytest.approx(1 / 0.7) and spec.classes == ("class 0", "class 1", "class 2")
    means = prepare(place, tmp_path / "means", "--means")
    assert (np.load(means / "x_32x32.npy") == stored[:, :, :4]).all()
    low = prepare(place, tmp_path / "low", "--precision", "bf16")
    assert np.abs(np.load(low / "x_32x32.npy") - stored).max() > 5e-3
    assert data.PrepareConfig().precision == "fp32"  # on GPUs, too


@pytest.mark.parametrize("out", ["latents", "native"])
def test_pixels_are_kept_behind_latents_and_mirrored_with_them(place, latents, native_set, out):
    source, vae = data.open_data(str(place / out), mirror=True), "kl" if out == "latents" else "dc"
    for bucket in source.buckets:
        batch = source.read(np.array(bucket).repeat(4), np.random.default_rng(0))
        assert batch.pixels.dtype == torch.uint8 and len(batch.pixels.unique(dim=0)) > len(bucket)
        want = encode(place / vae, batch.pixels)
        torch.testing.assert_close(batch.x.float(), want, rtol=2e-3, atol=5e-3)


def test_pixels_without_an_autoencoder(place, tmp_path):
    source = data.open_data(str(prepare(place, tmp_path / "set", autoencoder="")), mirror=False)
    assert torch.equal(everything(source).x, cropped(place)) and source.spec.kind == "pixels"
    x = data.network_space(everything(source).x, source.spec, data.seeded(0))
    assert abs(x.mean()) < 1e-3 and abs(x.std() - 1) < 1e-3


def test_statistics_are_of_pictures_of_all_classes(tmp_path):
    """300 of a dark class, then 200 of a bright one: the first 256 would be dark."""
    for k in range(500):
        file = tmp_path / f"set/{'ab'[k // 300]}/{k:03}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (200 * (k // 300),) * 3).save(file)
    out = prepare(tmp_path, tmp_path / "out", images="set", autoencoder="", size=(4,))
    spec = data.open_data(str(out)).spec
    assert spec.mean == pytest.approx(80, abs=1) and spec.std == pytest.approx(98, abs=1)


def test_captions_are_read_by_offset(place, native_set):
    """Whatever the order of their lines, and whatever the letters; each belongs to its picture."""
    source = data.open_data(str(native_set))
    assert len(source.captions) == 30
    for i in (29, 0, 7):
        assert source.captions[i] == [f"thing {i} “ü”\n", "a picture"]
    for bucket in source.buckets:
        texts = source.read(np.array(bucket).repeat(8), np.random.default_rng(0)).y
        named = [text for text in texts if text != "a picture"]
        own = source.labels[source.rows[np.array(bucket)]]
        assert {int(text.split()[1]) for text in named} == set(own.tolist()) and len(named) < len(texts)


# --- Stopped, and run again -----------------------------------------------------------------------

def test_killed_and_run_again_on_other_ranks_is_the_same_bit_by_bit(place, tmp_path, monkeypatch):
    """As one process that nothing interrupts. The half set is refused; what a kill leaves goes."""
    out, whole, script = tmp_path / "set", tmp_path / "whole", tmp_path / "chunks.py"
    script.write_text("import data\ndata.CHUNK = 2\ndata.command(data.main)\n")
    monkeypatch.setattr(data, "CHUNK", 2)
    line = flags(place, out, *NATIVE, "--pixels", "--batch", 1, images="ratios", size=(32, 64))
    quiet = {"env": ENV, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, script, *line], **quiet)
    while len(list(out.glob("done/*.json"))) < 4 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() != 0 and 4 <= len(list(out.glob("done/*.json"))) < 15
    with pytest.raises(UserError, match="set"):
        data.open_data(str(out))
    (out / "done/000009.json.0.tmp").write_text("[[")
    (out / "x_9x9.npy.0.tmp").write_bytes(b"half")
    code, text = shell([*torchrun(2), script, *line])
    assert code == 0, text
    line[line.index(str(out))] = str(whole)
    data.main(line)
    assert contents(out) == contents(whole)
    before = {f: f.stat().st_mtime_ns for f in whole.glob("*.npy")}
    data.main(line)  # a complete set is left alone
    assert {f: f.stat().st_mtime_ns for f in whole.glob("*.npy")} == before


def test_a_full_disk_is_one_line_and_the_set_goes_on(place, latents, tmp_path, monkeypatch, capsys):
    """Full at each write in turn: meta.json comes last, and no chunk is made twice."""
    out, sync, opened, crop = tmp_path / "set", os.fsync, [], data.open_cropped
    monkeypatch.setattr(data, "open_cropped", lambda e, size: opened.append(e) or crop(e, size))
    room = [0]

    def fsync(handle):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    for writes in [0, 3, 10, 10, 6, *range(40)]:  # 9 fill a chunk
        room[0] = writes
        try:
            data.command(lambda: data.main(flags(place, out, "--pixels")))
            break
        except SystemExit as stopped:
            assert stopped.code == 2 and not (out / "meta.json").exists()
    said = capsys.readouterr().err.splitlines()
    assert len(said) > 6 and all("No space" in line for line in said)
    monkeypatch.undo()
    times = Counter(e.name for e in opened)
    assert contents(out) == contents(latents) and max(times.values()) < len(said) / 2


OTHER = [  # flags that do not fit the set which is there
    ({"size": (64,)}, []), ({}, ["--native"]), ({}, ["--means"]), ({}, ["--no-pixels"]),
    ({}, ["--precision", "bf16"]), ({"autoencoder": "dc"}, []), ({"autoencoder": ""}, ["--no-pixels"]),
    ({"images": "fewer"}, []),
]  # fmt: skip


@pytest.mark.parametrize("how, more", OTHER)
def test_other_settings_into_the_same_folder_are_refused(place, latents, how, more, refused):
    if not (place / "fewer").exists():
        shutil.copytree(place / "pictures", place / "fewer")
        (place / "fewer/class 1").rename(place / "fewer/class x")
    before = contents(latents)
    message = refused(data.main, *flags(place, latents, "--pixels", *more, **how))
    assert "plan.json" in message and contents(latents) == before


BAD = [
    ("--images", ["--images", "nowhere"]), ("--size", ["--size", 31]), ("--size", ["--size", 32, 64]),
    ("--size", ["--native", "--patch", 2, "--size", 66]), ("--size", ["--size", 0]),
    ("--batch", ["--batch", 0]), ("--autoencoder", ["--autoencoder", "./nowhere"]),
    ("--pixels", ["--autoencoder", "", "--pixels"]), ("--device", ["--device", "tpu"]),
    ("--precision", ["--precision", "fp8"]), ("--images", ["--native", "--size", 4096]),
    ("--out", ["--out", "INSIDE"]), ("--features", ["--features", "x"]), ("--shard", ["--shard", 5]),
]  # fmt: skip


@pytest.mark.parametrize("flag, more", BAD)
def test_bad_calls_are_refused_and_leave_nothing(place, flag, more, tmp_path, refused):
    before = sorted(place.rglob("*"))
    more = [str(place / "pictures/set") if word == "INSIDE" else word for word in more]
    assert flag in refused(data.main, *flags(place, tmp_path / "set", *more))
    assert sorted(place.rglob("*")) == before and not (tmp_path / "set/meta.json").exists()


def test_damaged_and_old_sets_are_refused(latents, tmp_path):
    for name in ("cut", "gone", "labels", "old"):
        shutil.copytree(latents, tmp_path / name)
    raw = (latents / "x_32x32.npy").read_bytes()
    (tmp_path / "cut/x_32x32.npy").write_bytes(raw[:-7])
    (tmp_path / "gone/labels.npy").unlink()
    np.save(tmp_path / "labels/labels.npy", np.arange(40))
    (tmp_path / "old/meta.json").write_text('{"kind": "latents", "shards": []}')
    for name in ("cut", "gone", "labels", "old"):
        with pytest.raises(UserError, match=name):
            data.open_data(str(tmp_path / name))


# --- Native sets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side, step", [(256, 16), (512, 32), (1024, 32), (4096, 32), (64, 4), (24, 8)])
def test_buckets_have_one_area_and_all_ratios(side, step):
    table = data.bucket_sizes(side, step)
    area = np.array([h * w for h, w in table])
    assert all(h % step == w % step == 0 for h, w in table)
    assert (side, side) in table and {(w, h) for h, w in table} == set(table)
    assert area.max() == side**2 and (area.min() > 0.88 * side**2 or side // step < 4)
    assert all(1 / 4 <= h / w <= 4 for h, w in table)
    if side // step >= 16:
        gaps = np.diff(np.log([h / w for h, w in table]))
        assert gaps.max() < 0.26 and table[0][1] == 4 * table[0][0]  # at most 12% are cut away


def test_a_picture_goes_to_the_largest_area_that_it_fills():
    tables = [data.bucket_sizes(side, 32) for side in (256, 512, 1024)]
    for size, side in (
        ((256, 256), 256), ((511, 511), 256), ((300, 700), 256), ((512, 512), 512),
        ((511, 2000), 512), ((1023, 1500), 1024), ((700, 1600), 1024), ((5000, 5000), 1024),
    ):  # fmt: skip
        found = data.choose_bucket(size, tables, False)
        assert found[0] <= size[0] and found[1] <= size[1]  # never enlarged
        assert 0.85 < found[0] * found[1] / side**2 <= 1, (size, found)
        assert abs(math.log(found[0] / found[1] * size[1] / size[0])) < 0.2
    with pytest.raises(ValueError, match="8x16 .* --upscale"):
        data.choose_bucket((8, 16), tables, False)
    assert math.prod(data.choose_bucket((8, 16), tables, True)) <= 256**2
    for size in ((10, 5000), (5000, 10)):
        with pytest.raises(ValueError, match="10"):
            data.choose_bucket(size, tables, True)


def test_a_native_set_reads_back_what_was_encoded(place, native_set):
    source = data.open_data(str(native_set), mirror=False)
    assert len(source) == 30 == sum(map(len, source.buckets)) and source.spec.shape == (8, 32, 32)
    for (h, w), bucket in zip(source.spec.buckets, source.buckets):
        batch = source.read(np.array(bucket), np.random.default_rng(0))
        assert batch.x.shape == (len(bucket), 8, h, w)
        number = int(source.labels[source.rows[bucket[0]]])
        picture = data.open_picture(place / f"ratios/{number:02}.png")
        pixels = torch.from_numpy(data.crop(picture, 2 * h, 2 * w))[None]
        assert torch.equal(batch.pixels[:1], pixels)  # and latents are those of the pixels, above
        assert picture.height >= 2 * h and picture.width >= 2 * w  # never enlarged
    stream = data.batches(source, 4, 0, [0], 1, patch=2)
    assert {tuple(next(stream).x.shape[2:]) for _ in range(40)} == set(source.spec.buckets)


def test_what_fits_no_bucket_is_named_and_left_out(place, tmp_path, capsys):
    folder, wide = tmp_path / "pictures", Image.linear_gradient("L").resize((128, 64)).convert("RGB")
    folder.mkdir()
    for name, size in (("wide", (128, 64)), ("small", (16, 8)), ("strip", (1, 5000))):
        wide.resize(size).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"nothing")
    for more, kept in (([], 1), (["--upscale"], 2)):
        out = native(place, tmp_path / f"set {kept}", *more, images=folder, size=(64,))
        source, said = data.open_data(str(out)), capsys.readouterr().err
        assert len(source) == kept and f"{4 - kept} pictures" in said
        assert all(name in said for name in ("broken.png", "strip.png"))
        assert ("small.png" in said) == (kept == 1)


# --- Back to pictures -----------------------------------------------------------------------------


def test_a_decoder_undoes_mean_and_deviation(place, latents):
    vae = diffusers.AutoencoderKL.from_pretrained(place / "kl")
    spec, z = data.open_data(str(latents)).spec, torch.randn(5, 4, 16, 16)
    with torch.no_grad():
        want = (vae.decode(z).sample * 127.5 + 127.5).clamp(0, 255).permute(0, 2, 3, 1)
    decode = data.Decoder(spec)
    found = decode((z - 0.1) * 0.7)
    assert found.shape == (5, 32, 32, 3) and decode.factor == 2
    assert np.abs(found - want.numpy()).max() < 0.51
    with pytest.raises(UserError, match="--autoencoder"):
        data.Decoder(spec, "cpu", str(place / "dc"))


@pytest.mark.parametrize("autoencoder, channels", [("kl", 4), ("dc", 8)])
def test_large_pictures_are_decoded_in_tiles(place, monkeypatch, autoencoder, channels):
    """Of a size that is no multiple of the tile's; away from the seams as in one piece."""
    spec = data.Spec("latents", (channels, 16, 16), autoencoder=str(place / autoencoder))
    decode, x = data.Decoder(spec), torch.randn(2, channels, 21, 38)
    if autoencoder == "dc":
        decode.vae.tile_sample_min_height = decode.vae.tile_sample_min_width = 32
        decode.vae.tile_sample_stride_height = decode.vae.tile_sample_stride_width = 24
    whole = decode(x)
    monkeypatch.setattr(data, "TILED", 42 * 76 - 1)
    tiled = decode(x)
    assert tiled.shape == whole.shape == (2, 42, 76, 3) and (tiled != whole).any()
    gap = np.abs(tiled.astype(int) - whole)[:, :8, :8].mean()
    assert gap < np.abs(128 - whole.astype(int)).mean()
    assert (decode(x[..., :37]) == data.Decoder(spec)(x[..., :37])).all()  # and is off again


# --- Alignment ------------------------------------------------------------------------------------


def of_the_encoder(place, pixels, tokens):
    """Its tokens of pictures, by transformers itself: 14 pixels a patch, as ImageNet is normalised."""
    transformers = pytest.importorskip("transformers")
    net = transformers.AutoModel.from_pretrained(place / "dino")
    size, how = (14 * tokens[0], 14 * tokens[1]), {"mode": "bicubic", "antialias": True}
    x = torch.nn.functional.interpolate(pixels / 255, size, **how).clamp(0, 1)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    with torch.no_grad():
        return net((x - mean) / std).last_hidden_state[:, 1:]


@pytest.mark.parametrize("kind", ["pixels", "latents", "native"])
def test_alignment_follows_the_picture_that_the_network_sees(place, latents, native_set, kind, tmp_path):
    """Also where it is mirrored; it trains, and its loss is logged and falls."""
    folder = {"latents": latents, "native": native_set}.get(kind) or prepare(
        place, tmp_path / "pixels", autoencoder=""
    )
    source = data.open_data(str(folder), mirror=True)
    encoder = data.load_network("transformers", "--align_encoder", str(place / "dino"))
    patch = {"pixels": 8, "latents": 4, "native": 2}[kind]
    cfg = train.replace(train.Config(), patch=patch)
    batch = next(data.batches(source, 12, 0, [0], 1, patch=patch))
    part = train.to_micro_batch(batch, lambda y: (y, y), encoder, cfg, "cpu")
    tokens = tuple(side // patch for side in batch.x.shape[2:])
    shown = batch.x if kind == "pixels" else batch.pixels
    assert part.features.shape == (len(batch.x), math.prod(tokens), 16)
    want = of_the_encoder(place, shown.float(), tokens)
    torch.testing.assert_close(part.features, want, rtol=1e-4, atol=1e-4)

    c, side = source.spec.shape[:2]
    flags = ["--data", folder, "--mirror", "--channels", c, "--side", side, "--patch", patch]
    flags += ["--classes", 0, "--align", 5, "--align_encoder", place / "dino", "--align_depth", 2]
    line = log(train_here(tmp_path, *flags, "--steps", 6, "--name", kind))
    assert len(line) == 6 and 0 < line[-1]["alignment"] < line[0]["alignment"] < 1.5


def test_alignment_needs_pixels(place, tmp_path, refused):
    out = prepare(place, tmp_path / "set")
    more = ["--data", out, "--align", "1", "--align_encoder", place / "dino", "--runs", tmp_path / "r"]
    assert "--align" in refused(train.main, *more) and not (tmp_path / "r").exists()


# --- Speed ----------------------------------------------------------------------------------------

READER = """
import sys, time
import data
def memory():  # MB of this process that no file backs
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))
def read(source, steps):
    began, stream = time.process_time(), data.batches(source, 100, 0, [0], 1)
    for _ in range(steps):
        next(stream)
    return steps * 100 / (time.process_time() - began)
read(data.open_data("demo"), 4)  # starts threads and such
before, source = memory(), data.open_data(sys.argv[1])
read(source, 40)  # an epoch: from now on it is in the cache of the system
print(max(read(source, 40) for _ in range(3)), memory() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_reader_is_small_and_quick(latents, tmp_path, count=4000):
    """Moments as of ImageNet, 131 MB: 2,000 a second and core or more, and none of it in memory."""
    out = shutil.copytree(latents, tmp_path / "set")
    meta = json.loads((out / "meta.json").read_text()) | {"sizes": [[64, 64]], "pixels": False}
    meta["spec"] |= {"shape": [4, 32, 32]}
    (out / "meta.json").write_text(json.dumps(meta))
    np.save(out / "labels.npy", np.arange(count) % 3)
    shape = (count, 2, 8, 32, 32)
    np.lib.format.open_memmap(out / "x_64x64.npy", "w+", np.float16, shape).flush()
    code, text = shell([sys.executable, "-c", READER, out])
    assert code == 0, text
    rate, megabytes = map(float, text.split())
    assert rate > 2000 and megabytes < 65, text
