"""Buckets, sizes beyond the trained one, time shift, tiled decoding and benchmark layouts; with tiny networks."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import evaluate
import sample
import train
from data import UserError
from model import SIZES, TiM, rope_table
from transition import TRANSPORTS, diffusion_count, resolution_shift, sample_times, shift_times

diffusers = pytest.importorskip("diffusers")
ROOT = Path(data.__file__).parent
ENV = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
RATIOS = [(1, 4), (2, 7), (2, 5), (1, 2), (3, 4), (1, 1), (4, 3), (2, 1), (5, 2), (4, 1)]


def launch(script, *arguments, ranks=0):
    """Run a command line for real; returns what it said."""
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    line = [sys.executable, *many, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(line, env=ENV, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def tiny_autoencoder(folder, channels):
    """A random AutoencoderDC of 2^(len(channels) - 1) pixels per place."""
    torch.manual_seed(0)
    n = len(channels)
    diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=channels, decoder_block_out_channels=channels, encoder_layers_per_block=(1,) * n,
        decoder_layers_per_block=(1,) * n, encoder_qkv_multiscales=((),) * n, decoder_qkv_multiscales=((),) * n,
        upsample_block_type="interpolate", downsample_block_type="stride_conv", scaling_factor=0.41407,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """40 captioned pictures of ten ratios, and autoencoders of 2 and 32 pixels per place."""
    root, source, lines = tmp_path_factory.mktemp("native"), data.demo(), []
    (root / "pictures").mkdir()
    for i in range(40):
        a, b = RATIOS[i % 10]
        size = round(90 * (b / a) ** 0.5), round(90 * (a / b) ** 0.5)
        Image.fromarray(source.pixels[i, 0]).resize(size, Image.BICUBIC).save(root / f"pictures/{i:02}.png")
        lines.append(json.dumps(dict(image_file=f"{i:02}.png", captions=[f"thing {i % 10}", "a picture"])))
    (root / "pictures/captions.jsonl").write_text("\n".join(lines) + "\n")
    tiny_autoencoder(root / "dc", (4, 8))
    tiny_autoencoder(root / "dc32", (4, 4, 4, 8, 8, 8))
    return root


def native(place, out, *more, images="pictures", **how):
    line = ["encode", "--native", "--images", place / images, "--out", out, "--autoencoder", place / "dc",
            "--size", 64, "--patch", 2, "--batch", 4, "--shard", 4, "--device", "cpu", *more]  # fmt: skip
    launch("data.py", *line, **how) if how else data.main([str(v) for v in line])
    return out


@pytest.fixture(scope="session")
def buckets(place):
    return native(place, place / "set")


def save_network(path, **network):
    """A class network whose output is not zero, and its configuration."""
    torch.manual_seed(0)
    model = TiM(**SIZES["demo"] | dict(depth=1, width=32, heads=2, adaln=8) | network)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    train_record = dict(transport="tim", guidance=1.0, drop=0.1)
    network = dict(SIZES["demo"] | dict(depth=1, width=32, heads=2, adaln=8) | network)
    return model, dict(model=network, train=train_record, step=1)


@pytest.fixture(scope="session")
def checkpoint(place):
    """A class network in pixel space, 8 x 8, patch 2."""
    model, config = save_network(place, channels=3, patch=2, classes=4)
    spec = dict(kind="pixels", shape=[3, 8, 8], mean=127.0, std=50.0, classes=list("abcd"))
    sample.save(place / "pixels.safetensors", model.state_dict(), config | dict(data=spec))
    return place / "pixels.safetensors"


@pytest.fixture(scope="session")
def writer(place):
    """A text network in pixel space, 8 x 8, patch 2."""
    model, config = save_network(place, channels=3, patch=2, caption=128)
    spec = dict(kind="pixels", shape=[3, 8, 8], mean=127.0, std=50.0, classes=[], text=dict(data.BYTES))
    sample.save(place / "text.safetensors", model.state_dict(), config | dict(data=spec))
    return place / "text.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# Buckets


@pytest.mark.parametrize("side, step", [(256, 16), (512, 32), (1024, 32), (4096, 32), (64, 4), (32, 8), (24, 8)])
def test_buckets_have_one_area_and_all_ratios(side, step):
    table = data.bucket_sizes(side, step)
    area = np.array([h * w for h, w in table])
    assert all(h % step == w % step == 0 for h, w in table) and len(table) <= 33
    assert (side, side) in table and {(w, h) for h, w in table} == set(table)
    assert area.max() < 1.1 * area.min() and (np.abs(area / side**2 - 1) <= data.SLACK).all()
    assert min(h / w for h, w in table) == 0.25 if side // step % 4 == 0 else True
    if side // step >= 16:
        assert data.crop_bound(table) < 0.12 if side // step == 16 else data.crop_bound(table) < 0.07


@pytest.fixture(scope="module")
def counts():
    """How 10,000 pictures of random sizes fall into the buckets of 512 pixels, 32 a step."""
    chance, table = np.random.default_rng(0), data.bucket_sizes(512, 32)
    ratio = np.exp(chance.normal(0, 0.4, 10000))
    of = np.abs(np.log([h / w for h, w in table])[None] - np.log(ratio)[:, None]).argmin(1)
    return tuple(np.bincount(of, minlength=len(table)).tolist())


@pytest.mark.parametrize("mix, slots", [(1, 1), (2, 4)])
def test_every_picture_comes_once_in_each_round_of_its_bucket(counts, mix, slots):
    """After e epochs no picture was seen more than e times, and none less than e - 1, where its bucket fills a unit."""
    n, batch = sum(counts), 64 // slots
    of, seen, size = np.repeat(np.arange(len(counts)), counts), np.zeros(n, int), np.array(counts)
    unit, ends = 64 // mix, []
    for e in range(1, 4):                                                       # units done by the end of epoch e
        ends.append(int(sum(e * size // unit)))
    done, rounds = 0, [Counter() for _ in counts]
    for step in range(ends[-1] // mix + 1):
        for slot in range(slots):
            index = data.bucket_positions(counts, batch, 0, step, slot, slots, mix)
            assert len(set(of[index])) == 1                                     # one bucket a batch
            np.add.at(seen, index, 1)
            bucket = of[index[0]]
            rounds[bucket].update(index.tolist())
        for held in rounds:                                                     # within a bucket, rounds never overlap
            assert not held or max(held.values()) - min(held[i] if len(held) else 0 for i in held) <= max(
                1, math.ceil(unit / min(c for c in counts if c)))
        done += mix
        for e, end in enumerate(ends, 1):
            if done - mix < end <= done:
                full = size[of] >= unit
                late = (done - end) and 1                                       # the step goes on into the next epoch
                assert seen[full].max() <= e + late and seen[full].min() >= e - 1
    assert (seen[size[of] >= unit] > 0).all()


def test_each_round_of_a_bucket_is_a_permutation():
    """Batches of one bucket, put in their order, are one shuffled round after the other: no picture is lost."""
    counts, unit, stream = (40, 23, 9), 8, {0: {}, 1: {}, 2: {}}
    first = np.cumsum([0, *counts])
    for number in range(72 * 6 // unit):                                        # in epochs of 9 units, 6 times
        index = data.bucket_positions(counts, unit, 5, number, 0, 1)
        bucket = int(np.searchsorted(first, index[0], side="right")) - 1
        done = sum(c * e // unit for e in [0] for c in counts)
        stream[bucket].setdefault(number, index - first[bucket])
        assert done == 0
    for bucket, count in enumerate(counts):
        seen = Counter(np.concatenate(list(stream[bucket].values())).tolist())
        assert set(seen) == set(range(count)) and max(seen.values()) - min(seen.values()) <= 1
        total = sum(seen.values())
        assert abs(total - 6 * count) <= unit                                   # buckets advance in step


def test_plan_is_a_function_of_seed_and_step_and_of_no_number_of_ranks(counts):
    """1, 2 and 4 ranks see the same set at every step, with one bucket a step and with several; any step is free."""
    for mix, ranks in ((1, (1, 2, 4)), (2, (2, 4, 8)), (4, (4, 8))):
        for step in (0, 7, 156, 157, 5_000_003):
            sets = []
            for of in ranks:
                parts = [data.bucket_positions(counts, 64 // of, 3, step, slot, of, mix) for slot in range(of)]
                sets.append(np.sort(np.concatenate(parts)).tolist())
            assert all(s == sets[0] for s in sets) and len(sets[0]) == 64
            assert sets[0] != np.sort(data.bucket_positions(counts, 64, 4, step, 0, 1)).tolist()
            data.unit_order.cache_clear()                                       # nothing hangs on what was asked before
            data.orders.cache_clear()
            again = data.bucket_positions(counts, 64 // ranks[0], 3, step, 0, ranks[0], mix)
            assert set(again.tolist()) <= set(sets[0])


def test_tokens_of_batches_lie_within_ten_percent(counts):
    table = np.array(data.bucket_sizes(512, 32))
    tokens, ends = table.prod(1) // 32**2, np.cumsum(counts)
    for mix in (1, 4):
        totals = []
        for step in range(400):
            units = [data.bucket_positions(counts, 64 // mix, 0, step, slot, mix, mix) for slot in range(mix)]
            totals.append(sum(64 // mix * tokens[np.searchsorted(ends, index[0], side="right")] for index in units))
        assert max(totals) <= 1.1 * min(totals) and len(set(totals)) > 1


# ---------------------------------------------------------------------------------------------------------------------
# Pictures to buckets


def test_set_of_buckets_reads_back_what_was_encoded(place, buckets, capsys):
    meta = json.loads((buckets / "meta.json").read_text())
    assert meta["count"] == 40 and meta["factor"] == 2 and not meta["skipped"]
    table = data.bucket_sizes(64, 4)
    assert [tuple(b[:2]) for b in meta["buckets"]] == [s for s in table if list(s) in [b[:2] for b in meta["buckets"]]]
    assert len(meta["buckets"]) == 10 and all(count == 4 for *_, count in meta["buckets"])
    source = data.open_data(str(buckets), (4, 32, 32))
    assert source.spec["buckets"] == [[h // 2, w // 2] for h, w, _ in meta["buckets"]]
    vae = diffusers.AutoencoderDC.from_pretrained(place / "dc")
    for i in (0, 13, 39):                                                       # whole picture: scaled, then cut
        name, (h, w) = int(source.labels[i]), meta["buckets"][i // 4][:2]
        picture = Image.open(place / f"pictures/{name:02}.png").convert("RGB")
        assert abs(math.log(picture.height / picture.width) - math.log(h / w)) < 0.125
        pixels = torch.from_numpy(data.crop(picture, h, w).copy())[None] / 127.5 - 1
        with torch.no_grad():
            want = [vae.encode(x).latent[0].numpy() * 0.41407 for x in (pixels, pixels.flip(3))]
        found = source.read(np.array([i]), np.random.default_rng(0))[0]
        assert min(np.abs(found - z).max() for z in want) < 5e-3
    data.main(["inspect", str(buckets), "--sheet", str(place / "sheet.png"), "--device", "cpu"])
    shown = capsys.readouterr().out
    assert "bucket   16 x 64 " in shown and shown.count("bucket") == 10 and Image.open(place / "sheet.png").size[0] > 64


def test_crop_covers_without_stretching():
    """A circle stays a circle, and at most the rounding is lost on one side only."""
    y, x = np.mgrid[:300, :500]
    disc = (((x - 250) ** 2 + (y - 150) ** 2) < 100**2).astype(np.uint8) * 255
    out = data.crop(Image.fromarray(np.stack([disc] * 3, 2)), 48, 84)[0] > 127
    rows, columns = np.flatnonzero(out.any(1)), np.flatnonzero(out.any(0))
    assert abs(len(rows) - len(columns)) <= 1 and abs(len(columns) - 200 * 84 / 500) <= 1.5
    square = Image.fromarray(data.demo().pixels[0, 0]).convert("RGB")
    np.testing.assert_array_equal(data.crop(square, 20), data.crop(square, 20, 20))


def test_odd_pictures_are_turned_kept_or_listed_with_a_reason(place, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    ramp = np.linspace(0, 255, 64 * 128).reshape(64, 128)
    wide = Image.fromarray(ramp.astype(np.uint8)).convert("RGB")                # 64 high, 128 wide
    exif = Image.Exif()
    exif[0x0112] = 6                                                            # to be turned by a quarter
    wide.save(folder / "turned.jpg", exif=exif, quality=95)
    wide.save(folder / "turned.png", exif=exif)
    wide.save(folder / "turned.tif", tiffinfo={0x0112: 6})
    wide.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    Image.fromarray((ramp * 257).astype(np.uint16)).save(folder / "deep.png")
    Image.fromarray((ramp * 257).astype(np.uint16)).save(folder / "deep.tif")
    wide.save(folder / "moving.gif", save_all=True, append_images=[wide.transpose(Image.ROTATE_180)], duration=50)
    wide.resize((16, 8)).save(folder / "small.png")
    Image.new("RGB", (1, 5000)).save(folder / "strip.png")
    Image.fromarray(ramp.astype(np.float32)).save(folder / "float.tif")
    (folder / "broken.png").write_bytes(b"nothing")
    wide.rotate(90, expand=True).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:200])
    out = native(tmp_path, tmp_path / "set", "--autoencoder", place / "dc")
    meta, shown = json.loads((out / "meta.json").read_text()), capsys.readouterr().out
    assert [b for *b, _ in meta["buckets"]] == [[44, 92], [92, 44]] and meta["count"] == 8
    assert [count for *_, count in meta["buckets"]] == [6, 4]                   # two of them do not open after all
    why = dict([line for part in (meta, *meta["shards"]) for line in part["skipped"]])
    assert set(why) == {"strip.png", "float.tif", "broken.png", "cut.png"}
    assert "5000x1 is beyond all ratios" in why["strip.png"] and "no known white" in why["float.tif"]
    assert "1 pictures are smaller than their bucket: scaled up" in shown and "skipped strip.png" in shown
    source = data.open_data(str(out))
    files = {f: k for k, f in enumerate(sorted(p.name for p in folder.iterdir()))}
    sources = {label: k for k, label in enumerate(source.labels)}
    assert files and sources
    upright = np.asarray(data.open_picture(("", folder / "turned.png", 0, -1), upright=True), float)
    assert upright.shape == (128, 64, 3) and upright[:, 0].mean() > upright[:, -1].mean()
    for name, bound in (("turned.jpg", 3), ("turned.tif", 0.1)):
        found = np.asarray(data.open_picture(("", folder / name, 0, -1), upright=True), float)
        assert np.abs(found - upright).mean() < bound, name
    flat = np.asarray(wide, float)
    for name, bound in (("cmyk.jpg", 3), ("deep.png", 1), ("deep.tif", 1), ("moving.gif", 1.5)):
        found = np.asarray(data.open_picture(("", folder / name, 0, -1), upright=True), float)
        assert np.abs(found - flat).mean() < bound, name
    still = np.asarray(data.open_picture(("", folder / "turned.png", 0, -1)))
    assert still.shape == (64, 128, 3)                                          # square sets: as ADM reads it
    out = native(tmp_path, tmp_path / "fewer", "--autoencoder", place / "dc", "--skip_small")
    skipped = dict(json.loads((out / "meta.json").read_text())["skipped"])
    assert skipped["small.png"] == "8x16 is smaller than its bucket, 44x92" and len(skipped) == 3


def test_buckets_of_the_authors_files_are_kept(place, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    named = {"a.png": "64-56x72", "b.png": "64-72x56", "c.png": "128-128x128", "d.png": None, "e.png": "64-44x92"}
    with (folder / "captions.jsonl").open("w") as lines:
        for name, bucket in named.items():
            Image.new("RGB", (80, 80)).save(folder / name)
            line = dict(image_file=name, captions=[name]) | (dict(bucket=bucket) if bucket else {})
            lines.write(json.dumps(line) + "\n")
    out = native(tmp_path, tmp_path / "set", "--autoencoder", place / "dc")
    meta = json.loads((out / "meta.json").read_text())
    assert meta["buckets"] == [[56, 72, 1], [64, 64, 1], [72, 56, 1]]
    (name, why), (cut, share) = meta["skipped"]
    assert name == "c.png" and "128x128" in why and cut == "e.png" and "52% of 80x80 would be cut" in share
    assert data.open_data(str(out)).labels.tolist() == [0, 3, 1]


def test_a_picture_that_changed_since_its_header_was_read_is_listed(place, tmp_path):
    (tmp_path / "pictures/one").mkdir(parents=True)
    for name in "ab":
        Image.new("RGB", (40, 160)).save(tmp_path / f"pictures/one/{name}.png")
    out = native(tmp_path, tmp_path / "set", "--autoencoder", place / "dc")
    (out / "latents_00000.safetensors").unlink()
    Image.new("RGB", (160, 40)).save(tmp_path / "pictures/one/b.png")
    native(tmp_path, out, "--autoencoder", place / "dc")
    ((name, why),) = json.loads((out / "meta.json").read_text())["shards"][0]["skipped"]
    assert name == "one/b.png" and "it is 40x160" in why


def test_bad_settings_of_buckets_are_refused(place, buckets, tmp_path):
    for match, more in (("multiple of 4", ["--size", 66]), ("fits no --native", ["--features", "x"]),
                        ("begun with", ["--size", 128])):  # fmt: skip
        with pytest.raises(UserError, match=match):
            native(place, buckets if match == "begun with" else tmp_path / "set", *more)
    shutil.copytree(buckets, tmp_path / "begun")
    with pytest.raises(UserError, match="begun with --native"):                 # or squares would fill its shards
        data.main(["encode", "--images", str(place / "pictures"), "--out", str(tmp_path / "begun"), "--size", "64",
                   "--autoencoder", str(place / "dc"), "--patch", "2", "--shard", "4", "--device", "cpu"])  # fmt: skip
    with pytest.raises(UserError, match=r"--patch 3: .* must be a multiple"):
        train.network_of(train.Config(patch=3), (4, 33, 33), 3, buckets=[[16, 64]])


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_ten_ratios_from_pictures_to_samples(place, tmp_path):
    """Encode, train and go on as two processes, then draw three sizes; through the command lines alone."""
    both, one = native(place, tmp_path / "set", "--patch", 4, ranks=2), native(place, tmp_path / "one", "--patch", 4)
    names = {f.name for f in one.iterdir()}
    assert {f.name for f in both.iterdir()} == names
    assert all((both / name).read_bytes() == (one / name).read_bytes() for name in names)
    line = ["--data", both, "--patch", 4, "--batch", 4, "--mix", 2, "--runs", tmp_path, "--log_every", 1, "--warmup", 0]
    line += ["--save_every", 2, "--shift", 64]
    launch("train.py", *line, "--name", "whole", "--steps", 4, ranks=2)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")                     # as if it had been killed at update 3
    shutil.rmtree(tmp_path / "parts/checkpoints/step_00000004")
    (tmp_path / "parts/ema.safetensors").unlink()
    assert "from update 2" in launch("train.py", *line, "--name", "parts", "--steps", 4, ranks=2)
    whole, parts = (load_file(tmp_path / name / "ema.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    sizes = ("24x80", "64x64", "96x48")
    sample.main(["--checkpoint", str(tmp_path / "parts"), "--prompts", "thing 1", "thing 2", "--steps", "2", "--size",
                 *sizes, "--out", str(tmp_path / "grid.png"), "--device", "cpu"])  # fmt: skip
    for size in sizes:
        h, w = map(int, size.split("x"))
        scale = max(1, 64 // h)
        found = Image.open(tmp_path / f"grid_{size}.png").size
        assert found[0] == (2 * w + 2) * scale and found[1] >= h * scale


def test_recompiles_are_bounded_by_the_buckets(monkeypatch):
    """Three numbers of tokens, with gradients and without: six graphs, shared by all blocks and seen once each."""
    from torch._dynamo.testing import CompileCounter

    counter, plain = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: plain(self, backend=counter, **how))
    torch._dynamo.reset()
    cfg = train.Config(compile=True, patch=2, batch=4)
    torch.manual_seed(0)
    model = train.shard(TiM(2, 2, **SIZES["demo"], classes=3), None, cfg, False)
    for _ in range(3):
        for h, w in ((4, 16), (6, 12), (10, 6), (16, 4)):
            x, y = torch.randn(4, 2, h, w), torch.arange(4) % 3
            loss, *_ = train.objective(model, model, TRANSPORTS["tim"], cfg, 0.01, x, y, data.rng(0))
            loss.backward()
    torch._dynamo.reset()
    assert counter.frame_count == 6


# ---------------------------------------------------------------------------------------------------------------------
# Time shift


def test_shift_moves_odds_by_the_root_of_the_tokens():
    row, t = TRANSPORTS["tim"], torch.linspace(0, 1, 101, dtype=torch.float64)
    assert resolution_shift(1024, 256) == 2 and resolution_shift(64, 256) == 0.5 and resolution_shift(64, 0) == 1
    for s in (0.5, 2.0, 3.0):
        moved = shift_times(row, t, s)
        assert moved[0] == 0 and moved[-1] == 1 and (moved.diff() > 0).all()
        inner = slice(1, -1)
        torch.testing.assert_close(moved[inner] / (1 - moved[inner]), s * t[inner] / (1 - t[inner]))
    for name in ("vp", "ve", "edm", "trigflow"):
        with pytest.raises(UserError, match="--shift 256.*use 0"):
            train.check(train.Config(transport=name, kernel="constant", shift=256))


def test_training_draws_shifted_times_and_keeps_the_shares(monkeypatch):
    row, seen = TRANSPORTS["tim"], []
    for s in (1.0, 2.0):
        t, r = sample_times(row, 4000, 0.5, 0.1, data.rng(0), shift=s)
        assert (t[:2000] == r[:2000]).all() and (r <= t).all() and abs((r == 0).float().mean() - 0.1) < 0.02
        seen.append((t, r))
    torch.testing.assert_close(seen[1][0], shift_times(row, seen[0][0], 2.0))
    drawn = []
    monkeypatch.setattr(train, "sample_times", lambda *a: drawn.append(a[7:]) or sample_times(*a))
    model = TiM(2, 2, **SIZES["demo"], classes=3)
    for base, which in ((0, "later"), (16, "earlier")):
        cfg = train.Config(shift=base, diffusion_at=which, patch=2)
        x = torch.randn(4, 2, 16, 16)
        train.objective(model, model, row, cfg, 0.01, x, torch.zeros(4, dtype=torch.long), data.rng(0))
    assert drawn == [(1.0, "later"), (2.0, "earlier")] and diffusion_count(4, 0.5) == 2


def test_samples_follow_the_shift_of_training(checkpoint, monkeypatch):
    model, row, config = sample.load(checkpoint)
    traces = []
    for base, size in ((0, (16, 16)), (16, (8, 8)), (16, (16, 16))):
        here = sample.at_size(config | dict(train=config["train"] | dict(shift=base)), size, 1)
        trace = []
        x = sample.latents(model, row, here, [0], 0, 4, [1], trace=trace)
        assert x.shape == (1, 3, *size)
        traces.append([t for t, *_ in trace])
    assert traces[0] == traces[1] == [1, 0.75, 0.5, 0.25]
    assert traces[2] == pytest.approx([1, 6 / 7, 2 / 3, 0.4])


# ---------------------------------------------------------------------------------------------------------------------
# Any size


def test_positions_on_any_grid_and_their_stretch():
    h, w, head, theta = 6, 10, 32, 10000.0
    rate = theta ** (-torch.arange(0, 16, 2).double() / 16)
    column, row = torch.arange(60) % w, torch.arange(60) // w
    want = torch.cat([torch.outer(column.double(), rate), torch.outer(row.double(), rate)], 1)
    cos, sin = rope_table(h, w, head, theta, "grid", torch.device("cpu"))
    torch.testing.assert_close(cos, want.cos().float())
    torch.testing.assert_close(sin, want.sin().float())
    swapped = torch.cat([torch.outer((torch.arange(60) % h).double(), rate),
                         torch.outer((torch.arange(60) // h).double(), rate)], 1)  # fmt: skip
    torch.testing.assert_close(rope_table(h, w, head, theta, "released", torch.device("cpu"))[0], swapped.cos().float())
    _, ntk = rope_table(h, 2 * w, head, theta, "grid", torch.device("cpu"), ("ntk", h, w))
    last = ntk[2 * w - 1].asin()                                                # the end of the first row
    assert last[7] == pytest.approx(float((2 * w - 1) / 2 * rate[7]), rel=1e-4)  # slowest: as over half the columns
    torch.testing.assert_close(ntk[1, 0], torch.tensor(1.0).sin())              # quickest: as ever
    torch.testing.assert_close(ntk[2 * w, 8:], rate.sin().float())              # rows are as long as in training
    _, linear = rope_table(h, 2 * w, head, theta, "grid", torch.device("cpu"), ("linear", h, w))
    torch.testing.assert_close(linear[3, :8], (1.5 * rate).sin().float())


def test_sizes_are_asked_for_by_command(checkpoint, tmp_path, capsys):
    ask = lambda *more: sample.main(["--checkpoint", str(checkpoint), "--steps", "1", "--device", "cpu", *more])
    for wrong, way in (("9x8", "multiples of 2.*nearest is 8x8"), ("16x21", "nearest is 16x20"), ("1x8", "2x8")):
        with pytest.raises(UserError, match=way):
            ask("--size", wrong)
    for wrong in ("8", "8x", "0x8", "axb"):
        with pytest.raises(SystemExit) as stop:
            ask("--size", wrong)
        assert stop.value.code == 2 and "expected heightxwidth" in capsys.readouterr().err
    with pytest.raises(UserError, match="--shift 0: "):
        ask("--shift", "0")
    pictures = {}
    for scale in ("none", "ntk", "linear"):
        out = tmp_path / scale
        ask("--size", "16x8", "32x32", "--rope_scale", scale, "-n", "3", "--out", str(out))
        assert Image.open(out / "16x8/000002.png").size == (8, 16)
        assert Image.open(out / "32x32/000000.png").size == (32, 32)
        pictures[scale] = np.asarray(Image.open(out / "32x32/000001.png"), int)
        assert json.loads((tmp_path / scale / "32x32.json").read_text())["size"] == "32x32"
    assert "32x32: 256 tokens, 3 at a time: about" in capsys.readouterr().out
    assert np.abs(pictures["ntk"] - pictures["none"]).max() > 0 < np.abs(pictures["linear"] - pictures["none"]).max()
    ask("--aspect", "2:5", "5:2", "--size", "32x32", "-n", "1", "--out", str(tmp_path / "wide"))
    assert sorted(p.name for p in (tmp_path / "wide").iterdir() if p.is_dir()) == ["20x50", "50x20"]
    ask("-n", "1", "--out", str(tmp_path / "plain"))
    with pytest.raises(UserError, match="size = None, not 16x16"):
        ask("--size", "16x16", "-n", "1", "--out", str(tmp_path / "plain"))


def test_memory_is_foretold(checkpoint):
    """The network's pass, by the allocator; its first use excepted."""
    model = TiM(8, 1, depth=2, width=128, heads=2, adaln=32, classes=3).requires_grad_(False)
    z, y = torch.randn(1, 8, 32, 32), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        ((_, peak),) = evaluate.measure([lambda: model(z, z[:, 0, 0, 0], z[:, 0, 0, 0], y)], torch.device("cpu"), 1)
    need = sample.memory_needed(model, (8, 32, 32), 1, 32)
    assert need["network"] * 1024 == pytest.approx(peak, rel=0.1)
    assert need["weights"] * 2**30 == sum(4 * p.numel() for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Tiles


@pytest.mark.parametrize("h, w", [(20, 64), (64, 64), (41, 77), (3, 40)])
def test_tiles_of_a_local_decoder_leave_no_trace(h, w):
    """Where a place decodes to its own pixels alone, tiles and the whole agree, at any size; every tile is whole."""
    z, sizes = torch.randn(1, 3, h, w), set()

    def decode(part):
        sizes.add(tuple(part.shape[2:]))
        return part.repeat_interleave(4, 2).repeat_interleave(4, 3)

    found = data.decode_tiles(decode, z, 4, tile=64, overlap=16)
    torch.testing.assert_close(found, decode(z))
    assert sizes == {(min(h, 16), min(w, 16)), (h, w)}


def test_tiles_fade_linearly():
    """Tiles that disagree by a constant meet in a ramp over the overlap, not in a step."""
    level = iter((0.0, 1.0))
    flat = lambda z: torch.full((1, 3, 64, 64), next(level))
    out = data.decode_tiles(flat, torch.zeros(1, 1, 16, 28), 4, 64, 16)[0, 0]
    assert (out[:, :48] == 0).all() and (out[:, 64:] == 1).all()
    torch.testing.assert_close(out[0, 48:64], (torch.arange(16) + 0.5) / 16)


def test_tiles_are_near_the_whole_picture(place, monkeypatch):
    """With an autoencoder whose reach is shorter than the overlap, the edges of tiles leave a few levels at most."""
    spec = dict(kind="latents", autoencoder=str(place / "dc"), scale=0.4, shift=0.0, shape=[4, 8, 8])
    decode, z = data.decoder(spec), torch.randn(1, 4, 300, 400)
    whole = decode(z)
    monkeypatch.setattr(data, "TILED", 512**2)
    tiled = decode(z)
    assert whole.shape == tiled.shape == (1, 600, 800, 3) and whole.std() > 5
    off = np.abs(whole.astype(int) - tiled)
    assert off.max() <= 5 and off.mean() < 0.01


LARGE = """
import resource, sys, torch, data, sample
model, row, config = sample.load(sys.argv[1])
decode = data.decoder(config["data"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = sample.at_size(config, (4096, 4096), decode.factor)
x = sample.images(model, row, config, [0], 0, 1, [0], decode)
print(*x.shape[1:], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)
"""


def test_4096_pixels_fit_in_a_gigabyte(place):
    """16,384 tokens, decoded in tiles; in one piece the decoder alone would take more."""
    model, config = save_network(place, channels=4, patch=1, classes=1, heads=1, width=16)
    spec = dict(kind="latents", autoencoder=str(place / "dc32"), scale=0.4, shift=0.0, shape=[4, 8, 8], classes=["a"])
    sample.save(place / "large.safetensors", model.state_dict(), config | dict(data=spec))
    line = [sys.executable, "-c", LARGE, place / "large.safetensors"]
    run = subprocess.run(line, env=ENV, capture_output=True, text=True)
    assert not run.returncode, run.stderr
    *shape, megabytes = map(float, run.stdout.split())
    print(f"4096 x 4096: {megabytes:.0f} MiB more than before")
    assert shape == [4096, 4096, 3] and megabytes < 1000


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks


def layout(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_geneval_layout_on_two_ranks_and_again(writer, tmp_path):
    lines = ['{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
             '{"prompt":  "“zwei” Äpfel \\u00fc & <b>", "tag": "x"}', '{"prompt": "three"}']  # fmt: skip
    (tmp_path / "meta.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    line = ["--checkpoint", writer, "--bench", "geneval", "--prompts", tmp_path / "meta.jsonl", "--steps", 2]
    line += ["--batch", 4]
    launch("sample.py", *line, "--out", tmp_path / "two", ranks=2)
    alone = [str(v) for v in (*line, "--batch", 100, "--device", "cpu", "--out", tmp_path / "one")]
    sample.main(alone)
    names = [f"{i:05}/{name}" for i in range(3) for name in ("grid.png", "metadata.jsonl")]
    names += [f"{i:05}/samples/{k:05}.png" for i in range(3) for k in range(4)]
    assert layout(tmp_path / "two") == layout(tmp_path / "one") == set(names)
    for i, text in enumerate(lines):
        assert (tmp_path / f"two/{i:05}/metadata.jsonl").read_bytes() == text.encode()
    four = [np.asarray(Image.open(tmp_path / f"two/00001/samples/{k:05}.png")) for k in range(4)]
    want = np.concatenate([np.concatenate(four[:2], 1), np.concatenate(four[2:], 1)])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "two/00001/grid.png")), want)
    assert len({p.tobytes() for p in four}) == 4
    for name in names[6:]:
        pair = [np.asarray(Image.open(tmp_path / folder / name), int) for folder in ("one", "two")]
        assert np.abs(pair[0] - pair[1]).max() <= 1, name                       # of rounding, in another batch
    (tmp_path / "one/00001/grid.png").unlink()
    before = {name: (tmp_path / "one" / name).stat().st_mtime_ns for name in names if name != "00001/grid.png"}
    sample.main(alone)
    after = {name: (tmp_path / "one" / name).stat().st_mtime_ns for name in names}
    assert all((after[k] == v) == (not k.startswith("00001")) for k, v in before.items())


def test_dpg_and_mjhq_layouts(writer, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts").mkdir()
    for name, text in (("partiprompts12", "a long prompt\n"), ("7", "“seven”")):
        (tmp_path / f"prompts/{name}.txt").write_text(text, encoding="utf-8")
    line = ["--checkpoint", str(writer), "--steps", "1", "--device", "cpu", "--bench"]
    folder, out = str(tmp_path / "prompts"), str(tmp_path / "dpg")
    sample.main([*line, "dpg", "--prompts", folder, "--out", out, "--size", "16x16"])
    assert layout(tmp_path / "dpg") == {"partiprompts12.png", "7.png"}
    assert Image.open(tmp_path / "dpg/7.png").size == (32, 32)
    few = str(tmp_path / "few")                                                 # one at a time: the same pictures
    sample.main([*line, "dpg", "--prompts", folder, "--out", few, "--size", "16x16", "--batch", "1"])
    assert np.asarray(Image.open(f"{few}/7.png")).tolist() == np.asarray(Image.open(f"{out}/7.png")).tolist()
    table = {"k1": dict(category="animals", prompt="a cat"), "k2": dict(category="food", prompt="Brot & Öl")}
    (tmp_path / "meta_data.json").write_text(json.dumps(table))
    mjhq = [*line, "mjhq", "--prompts", str(tmp_path / "meta_data.json"), "--out", str(tmp_path / "mjhq")]
    sample.main(mjhq)
    assert layout(tmp_path / "mjhq") == {"animals/k1.jpg", "food/k2.jpg", "captions.jsonl"}
    with Image.open(tmp_path / "mjhq/food/k2.jpg") as picture:
        assert picture.format == "JPEG" and picture.size == (8, 8)
    told = [json.loads(text) for text in (tmp_path / "mjhq/captions.jsonl").read_text().splitlines()]
    assert told[1] == dict(file="food/k2.jpg", caption="Brot & Öl")
    with pytest.raises(UserError, match="seed = 0, not 1"):
        sample.main([*mjhq, "--seed", "1"])
    (tmp_path / "out.json").write_text(json.dumps({"k": dict(category="../x", prompt="a")}))
    for kind, prompts, match in (
        ("geneval", tmp_path / "prompts", "wants a .jsonl"), ("dpg", tmp_path / "meta_data.json", "wants a folder"),
        ("mjhq", tmp_path / "out.json", "outside"), ("dpg", tmp_path, "holds no prompt"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            sample.main([*line, kind, "--prompts", str(prompts), "--out", str(tmp_path / "none")])


def test_a_class_network_has_no_benchmark(checkpoint, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}')
    with pytest.raises(UserError, match="trained on classes"):
        sample.main(["--checkpoint", str(checkpoint), "--bench", "geneval", "--prompts", str(tmp_path / "a.jsonl"),
                     "--out", str(tmp_path / "out")])  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def test_fid_by_category_scores_each_folder_against_its_own(tmp_path, monkeypatch):
    chance, jobs = np.random.default_rng(0), []
    for root, level in (("ours", 10), ("theirs", 40)):
        for category in ("animals", "food"):
            (tmp_path / root / category).mkdir(parents=True)
            for i in range(12):
                pixels = Image.fromarray(chance.integers(0, level, (8, 8, 3), np.uint8))
                pixels.save(tmp_path / root / category / f"{i}.jpg")
    plain = evaluate.fid

    def score(a):
        if a.per_category:
            return plain(a)
        jobs.append((a.images, a.reference))
        return [dict(n=0), dict(n=12) | dict.fromkeys(evaluate.METRICS, 1.0)]

    monkeypatch.setattr(evaluate, "fid", score)
    ask = ["fid", "--images", str(tmp_path / "ours"), "--reference", str(tmp_path / "theirs"), "--per_category"]
    evaluate.main([*ask, "--device", "cpu"])
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert [tuple(map(Path, job)) for job in jobs] == [(ours / k, theirs / k) for k in ("", "animals", "food")]
    (tmp_path / "ours/people").mkdir()
    with pytest.raises(UserError, match="no folder people"):
        evaluate.main([*ask, "--device", "cpu"])


def test_table_of_resolution_is_computed_from_the_shapes(tmp_path, capsys):
    evaluate.main(["speed", "--config", "imagenet_xl_512", "--sizes", "1024", "4096", "--steps", "1", "32",
                   "--precision", "bf16", "--device", "cpu", "--out", str(tmp_path / "table.json")])  # fmt: skip
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(row["tokens"], row["NFE"]) for row in rows] == [(1024, 1), (1024, 32), (16384, 1), (16384, 32)]
    assert rows[1]["TFLOPs"] == pytest.approx(32 * rows[0]["TFLOPs"])
    assert rows[2]["TFLOPs"] * 1e12 == pytest.approx(2 * 16384 * 493e6 + 28 * 4 * 16384**2 * 1152, rel=0.15)
    with pytest.raises(UserError, match="--sizes 1000: must be a multiple of 32"):
        evaluate.main(["speed", "--config", "imagenet_xl_512", "--sizes", "1000", "--device", "cpu"])
