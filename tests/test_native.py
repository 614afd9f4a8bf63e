"""Native resolution: pictures keep resolution and aspect ratio, in buckets of equal work."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import DataSet, DataSpec, UserError

diffusers = pytest.importorskip("diffusers")
RATIOS = [(1, 4), (2, 7), (2, 5), (1, 2), (3, 4), (1, 1), (4, 3), (2, 1), (5, 2), (4, 1)]


# --------------------------------------------------------------------------------------------------
# Buckets


@pytest.mark.parametrize("side, step", [(256, 16), (512, 32), (1024, 32), (4096, 32), (64, 4), (32, 8), (24, 8)])
def test_buckets_have_one_area_and_all_ratios(side, step):
    table = data.bucket_sizes(side, step)
    area = np.array([h * w for h, w in table])
    assert all(h % step == w % step == 0 for h, w in table) and len(table) <= 33
    assert (side, side) in table and {(w, h) for h, w in table} == set(table)
    assert area.max() == side**2 and (area.min() > 0.88 * side**2 or side // step < 4)
    assert all(1 / 4 <= h / w <= 4 for h, w in table)
    if side // step >= 16:
        gaps = np.diff(np.log([h / w for h, w in table]))
        assert gaps.max() < 0.26 and table[0][1] == 4 * table[0][0]             # at most 12% are cut away


def test_a_picture_goes_to_the_largest_area_that_it_fills():
    tables = [data.bucket_sizes(side, 32) for side in (256, 512, 1024)]
    for size, side in (
        ((256, 256), 256), ((511, 511), 256), ((300, 700), 256), ((512, 512), 512), ((511, 2000), 512),
        ((1023, 1023), 512), ((1023, 1500), 1024), ((700, 1600), 1024), ((5000, 5000), 1024),
    ):  # fmt: skip
        found, why = data.choose_bucket(list(size), tables, False)
        assert not why and found[0] <= size[0] and found[1] <= size[1]          # never enlarged
        assert 0.85 < found[0] * found[1] / side**2 <= 1, (size, found)
        assert abs(math.log(found[0] / found[1] * size[1] / size[0])) < 0.2
    found, why = data.choose_bucket([8, 16], tables, False)
    assert found is None and "8x16 is smaller than " in why and "--upscale" in why
    found, why = data.choose_bucket([8, 16], tables, True)
    assert not why and math.prod(found) <= 256**2
    for size in ([10, 5000], [5000, 10]):
        found, why = data.choose_bucket(size, tables, True)
        assert found is None and "beyond the ratios" in why


# --------------------------------------------------------------------------------------------------
# The stream


def native_set(counts, sizes, shape=(4, 32, 32)):
    """A set whose pictures are their own numbers."""
    ends = np.cumsum([0, *counts]).tolist()
    buckets = [range(a, b) for a, b in zip(ends, ends[1:])]
    spec = DataSpec("latents", shape, classes=("a",), buckets=tuple(sizes))

    def load(indices, rng):
        k = int(np.searchsorted(ends, indices[0], side="right")) - 1
        x = np.broadcast_to(indices[:, None, None, None], (len(indices), 1, *sizes[k])).astype(np.float32)
        return x, None, indices

    return DataSet(spec, np.zeros(ends[-1]), load, buckets=buckets)


@pytest.fixture(scope="module")
def wide():
    """2,000 pictures in buckets of three areas and eleven ratios, 32 latent positions at most."""
    tables = [size for side in (8, 16, 32) for size in data.bucket_sizes(side, 2)[::3]]
    counts = np.random.default_rng(0).multinomial(2000, np.full(len(tables), 1 / len(tables)))
    counts[:2] = [3, 1]                                                         # and two that are all but empty
    return native_set(counts.tolist(), tables)


def take(n, *args, **more):
    return [batch.x for _, batch in zip(range(n), data.batches(*args, **more))]


@pytest.mark.parametrize("batch, patch", [(1, 2), (3, 1), (8, 2)])
def test_micro_batches_are_equal_work(wide, batch, patch):
    """Tokens within the budget, and above half of it unless the bucket has no more pictures."""
    budget = batch * (32 // patch) ** 2
    for x in take(200, wide, batch, 0, [0], 1, patch=patch):
        tokens = len(x) * (x.shape[2] // patch) * (x.shape[3] // patch)
        bucket = wide.buckets[wide.spec.buckets.index(tuple(x.shape[2:]))]
        assert tokens <= budget and (tokens > budget / 2 or len(x) == len(bucket))


def test_an_epoch_has_each_picture_at_most_once_and_all_but_the_remainders(wide):
    sizes = data.native_sizes(wide, 4, 2)
    per_epoch = sum(len(bucket) // size for bucket, size in zip(wide.buckets, sizes))
    stream, epochs = take(3 * per_epoch, wide, 4, 5, [0], 1, patch=2), []
    for e in range(3):
        parts = stream[e * per_epoch : (e + 1) * per_epoch]
        seen = Counter(int(v) for x in parts for v in x[:, 0, 0, 0])
        assert max(seen.values()) == 1
        for bucket, size in zip(wide.buckets, sizes):
            assert sum(i in seen for i in bucket) == len(bucket) // size * size
        epochs.append([x[:, 0, 0, 0].tolist() for x in parts])
    assert epochs[0] != epochs[1] != epochs[2]
    missing = [set(range(len(wide))) - {int(v) for part in epoch for v in part} for epoch in epochs]
    assert not set.intersection(*missing) or len(set.intersection(*missing)) < len(missing[0])
    runs = [tuple(x.shape[2:]) for x in stream[:per_epoch]]
    assert sum(a != b for a, b in zip(runs, runs[1:])) > per_epoch / 2          # buckets are mixed


def test_the_stream_is_a_function_of_seed_and_number_for_any_grouping(wide):
    """One process with four slots, two with two, four with one, and any start: the same batches."""
    whole = take(24, wide, 4, 1, [0, 1, 2, 3], 4, patch=2)
    for groups in ([[0, 1], [2, 3]], [[0], [1], [2], [3]]):
        parts = [take(6 * len(slots), wide, 4, 1, slots, 4, patch=2) for slots in groups]
        for k, x in enumerate(whole):
            step, slot = divmod(k, 4)
            of = next(g for g, slots in enumerate(groups) if slot in slots)
            mine = parts[of][step * len(groups[of]) + groups[of].index(slot)]
            assert torch.equal(mine, x)
    later = take(8, wide, 4, 1, [0, 1, 2, 3], 4, start=4, patch=2)
    assert all(torch.equal(a, b) for a, b in zip(later, whole[16:]))
    far = take(1, wide, 4, 1, [3], 4, start=10**6, patch=2)
    assert torch.equal(far[0], take(4, wide, 4, 1, [0, 1, 2, 3], 4, start=10**6, patch=2)[3])
    other = take(24, wide, 4, 2, [0], 1, patch=2)
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(whole, other))


# --------------------------------------------------------------------------------------------------
# Pictures to buckets


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """40 captioned pictures of ten ratios and two areas, and an autoencoder of 2 pixels per position."""
    root, lines = tmp_path_factory.mktemp("native"), []
    (root / "pictures").mkdir()
    numbers = np.random.default_rng(0)
    for i in range(40):
        a, b = RATIOS[i % 10]
        area = 100 if i < 20 else 50
        size = round(area * (b / a) ** 0.5), round(area * (a / b) ** 0.5)
        noise = numbers.integers(256, size=(7, 7, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.BICUBIC).save(root / f"pictures/{i:02}.png")
        lines.append(json.dumps(dict(image_file=f"{i:02}.png", captions=[f"thing {i % 10}", "a picture"])))
    (root / "pictures/captions.jsonl").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(4, 8), decoder_block_out_channels=(4, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        upsample_block_type="interpolate", downsample_block_type="stride_conv", scaling_factor=0.41407,
    ).save_pretrained(root / "dc")  # fmt: skip
    return root


def native(place, out, *more, images="pictures", size=(32, 64)):
    line = ["encode", "--native", "--images", place / images, "--out", out, "--autoencoder", place / "dc",
            "--size", *size, "--patch", 2, "--batch", 4, "--shard", 4, "--device", "cpu", *more]  # fmt: skip
    data.main([str(v) for v in line])
    return out


@pytest.fixture(scope="session")
def native_folder(place):
    return native(place, place / "set")


def test_a_native_set_reads_back_what_was_encoded(place, native_folder, tmp_path, capsys):
    meta = json.loads((native_folder / "meta.json").read_text())
    assert meta["count"] == 40 and meta["factor"] == 2 and not meta["skipped"]
    source = data.open_data(str(native_folder))
    spec = source.spec
    assert spec.shape == (4, 32, 32) and len(source) == 40 == sum(map(len, source.buckets))
    assert spec.buckets == tuple((h // 2, w // 2) for h, w, _ in meta["buckets"]) and len(spec.buckets) == 16
    vae = diffusers.AutoencoderDC.from_pretrained(place / "dc")
    for (h, w), bucket in zip(spec.buckets, source.buckets):
        batch = source.read(bucket, np.random.default_rng(0))
        assert batch.x.shape == (len(bucket), 4, h, w)
        number = int(source.labels[bucket[0]])
        picture = Image.open(place / f"pictures/{number:02}.png").convert("RGB")
        pixels = torch.from_numpy(data.crop(picture, 2 * h, 2 * w))[None] / 127.5 - 1
        with torch.no_grad():
            want = [vae.encode(x).latent[0] * 0.41407 for x in (pixels, pixels.flip(3))]
        assert min((batch.x[0] - z).abs().max() for z in want) < 5e-3
        assert source.captions[batch.y[0]] in (f"thing {number % 10}", "a picture")
        assert picture.height >= 2 * h and picture.width >= 2 * w and (number < 20) == (h * w > 16 * 17)
    data.main(["inspect", str(native_folder), "--sheet", str(tmp_path / "sheet.png"), "--device", "cpu"])
    shown = capsys.readouterr().out
    assert shown.count("bucket ") == 16
    stream = take(30, source, 4, 0, [0], 1, patch=2)
    assert {tuple(x.shape[2:]) for x in stream} == set(spec.buckets)


def test_any_number_of_ranks_writes_the_same_native_set(place, native_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in "201":
        monkeypatch.setenv("RANK", rank)
        native(place, tmp_path / "ranks")
    both = [{f.name: f.read_bytes() for f in folder.iterdir()} for folder in (native_folder, tmp_path / "ranks")]
    assert both[0] == both[1]


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
    wide.save(folder / "moving.gif", save_all=True, append_images=[wide.transpose(Image.ROTATE_180)], duration=50)
    wide.resize((16, 8)).save(folder / "small.png")
    Image.new("RGB", (1, 5000)).save(folder / "strip.png")
    Image.fromarray(ramp.astype(np.float32)).save(folder / "float.tif")
    (folder / "broken.png").write_bytes(b"nothing")
    wide.rotate(90, expand=True).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:200])
    out = native(place, tmp_path / "set", images=folder, size=(64,))
    meta, shown = json.loads((out / "meta.json").read_text()), capsys.readouterr().out
    assert [b for *b, _ in meta["buckets"]] == [[44, 92], [92, 44]]
    why = dict([line for part in (meta, *meta["shards"]) for line in part["skipped"]])
    assert set(why) == {"strip.png", "float.tif", "broken.png", "cut.png", "small.png"} and meta["count"] == 6
    assert "5000x1 is beyond the ratios" in why["strip.png"] and "no known white" in why["float.tif"]
    assert "8x16 is smaller than" in why["small.png"] and "--upscale" in why["small.png"]
    assert "6 of 11 pictures, 5 skipped" in shown and "skipped strip.png" in shown
    upright = np.asarray(data.open_picture(folder / "turned.png", upright=True), float)
    assert upright.shape == (128, 64, 3) and upright[:, 0].mean() > upright[:, -1].mean()
    for name, bound in (("turned.jpg", 3), ("turned.tif", 0.1)):
        found = np.asarray(data.open_picture(folder / name, upright=True), float)
        assert np.abs(found - upright).mean() < bound, name
    assert data.open_picture(folder / "turned.png").size == (128, 64)           # square sets: as ADM reads it
    out = native(place, tmp_path / "more", "--upscale", images=folder, size=(64,))
    meta = json.loads((out / "meta.json").read_text())
    assert meta["count"] == 7 and "small.png" not in json.dumps(meta["skipped"])
    assert len(data.open_data(str(out))) == 7


def test_bad_settings_of_buckets_are_refused(place, native_folder, tmp_path):
    for match, more in (("must be a multiple of 4", ["--size", 66]), ("not for --native", ["--features", "x"])):
        with pytest.raises(UserError, match=match):
            native(place, tmp_path / "set", *more)
    with pytest.raises(UserError, match="plan.json was written with size = 64, not 32"):
        native(place, native_folder, size=(32,))
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures/a.png")
    with pytest.raises(UserError, match="no picture fits a bucket.*8x8 is smaller"):
        native(place, tmp_path / "set", images=tmp_path / "pictures")
