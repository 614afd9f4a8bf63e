"""Folders and tars of pictures, as people have them: read right, refused, or named on stderr."""

import io
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT, log, shell
from PIL import Image, features

import data
import evaluate
import sample
import train
from data import UserError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """What is prepared and trained lies in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)


def photo(height=40, width=64):
    """Smooth in both directions, so that each of its eight orientations is another picture."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 / width, y * 255 / height, 80 + 0 * x], 2).astype(np.uint8)


def save(file, pixels=None, **options):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(file, **options)


# --- One way to open a picture --------------------------------------------------------------------


def opened(file):
    return np.asarray(data.open_picture(file), float)


def test_transparency_is_composited_on_white():
    alpha = np.zeros((8, 8, 4), np.uint8)
    alpha[:, 4:, 3] = 128  # a soft black shadow
    shadow, palette = Image.fromarray(alpha), Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    save("rgba.png", shadow)
    save("la.png", shadow.convert("LA"))
    save("a.webp", shadow, lossless=True)
    save("p.png", palette, transparency=1)
    save("p.gif", palette, transparency=1)
    save("rgb.png", Image.new("RGB", (8, 8)), transparency=(0, 0, 0))
    for name in ("rgba.png", "la.png", "a.webp"):
        found = opened(name)
        assert (found[:, :4] == 255).all() and abs(found[:, 4:] - 127).max() <= 1, name
    for name in ("p.png", "p.gif", "rgb.png"):
        assert (opened(name) == 255).all(), name


def test_deep_and_inked_pictures_keep_their_greys_or_are_refused():
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    save("deep.png", ramp)
    save("deep.tif", ramp)
    Path("deep.pgm").write_bytes(b"P5 8 8 65535\n" + ramp.astype(">u2").tobytes())
    for name in ("deep.png", "deep.tif", "deep.pgm"):
        assert abs(opened(name)[..., 0] - ramp / 257).max() <= 1, name
    save("cmyk.jpg", Image.fromarray(photo()).convert("CMYK"), quality=95)
    assert abs(opened("cmyk.jpg") - photo()).mean() < 4
    save("float.tif", ramp.astype(np.float32))
    save("twelve.png", ramp // 16)  # 16 levels would be left of it
    for name in ("float.tif", "twelve.png"):
        with pytest.raises(ValueError):
            data.open_picture(name)


TURNED = {  # orientation: the stored pixels, upright, by what EXIF says of row 0 and column 0
    1: lambda s: s, 2: lambda s: s[:, ::-1], 3: lambda s: s[::-1, ::-1], 4: lambda s: s[::-1],
    5: lambda s: s.swapaxes(0, 1), 6: lambda s: np.rot90(s, -1),
    7: lambda s: s[::-1, ::-1].swapaxes(0, 1), 8: lambda s: np.rot90(s),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", TURNED)
def test_pictures_are_turned_as_their_cameras_say(orientation, suffix):
    """TIFF, too, which Pillow turns by itself; a native set puts it into the right bucket."""
    exif, name = Image.Exif(), f"a.{suffix}"
    exif[0x0112] = orientation
    how = {"tif": {"tiffinfo": {0x0112: orientation}}, "jpg": {"exif": exif, "quality": 95},
           "png": {"exif": exif}, "webp": {"exif": exif, "lossless": True}}  # fmt: skip
    save(name, photo(), **how[suffix])
    want = TURNED[orientation](photo())
    assert opened(name).shape == want.shape and abs(opened(name) - want).mean() < 4
    size = data.find_bucket(data.Entry("a", name), [data.bucket_sizes(32, 4)], False)
    assert (size[0] > size[1]) == (want.shape[0] > want.shape[1])


def test_a_wrong_tag_beside_the_orientation_loses_nothing():
    body = struct.pack("<d", 2.5)  # the unit of resolution, as a float
    fields = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x0128, 12, 1, 38)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + fields + struct.pack("<I", 0) + body
    save("a/0.jpg", photo(), exif=exif)
    assert data.open_picture("a/0.jpg").size == (40, 64)
    assert evaluate.open_pictures("a", None)[0].shape == (3, 64, 40)


def test_crop_covers_without_stretching():
    y, x = np.mgrid[:300, :500]
    disc = (((x - 250) ** 2 + (y - 150) ** 2) < 100**2).astype(np.uint8) * 255
    out = data.crop(Image.fromarray(np.stack([disc] * 3, 2)), 48, 84)[0] > 127
    rows, columns = np.flatnonzero(out.any(1)), np.flatnonzero(out.any(0))
    assert abs(len(rows) - len(columns)) <= 1 and abs(len(columns) - 200 * 84 / 500) <= 1.5
    assert abs(rows.mean() - 23.5) <= 1 and abs(columns.mean() - 41.5) <= 1


def test_crop_is_that_of_adm():
    """guided_diffusion/image_datasets.py, center_crop_arr, written out."""
    noise = np.random.default_rng(0).integers(256, size=(150, 210, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    while min(*picture.size) >= 2 * 32:
        picture = picture.resize(tuple(x // 2 for x in picture.size), resample=Image.BOX)
    scale = 32 / min(*picture.size)
    picture = picture.resize(tuple(round(x * scale) for x in picture.size), resample=Image.BICUBIC)
    array = np.array(picture)
    y, x = (array.shape[0] - 32) // 2, (array.shape[1] - 32) // 2
    want = array[y : y + 32, x : x + 32].transpose(2, 0, 1)
    assert (data.crop(Image.fromarray(noise), 32) == want).all()


@pytest.mark.parametrize("size", [(30000, 1), (1, 30000), (70000, 2)])
def test_a_line_takes_ordinary_memory(size):
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = data.crop(Image.new("RGB", size, (9, 9, 9)), 256)
    assert found.shape == (3, 256, 256) and (found == 9).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3 * before  # some 0.5 GB


def many_kinds(root):
    """Pictures of all kinds, in folders and behind links; two that cannot be read."""
    plain, ramp = Image.fromarray(photo()), np.linspace(0, 65535, 2560).reshape(40, 64)
    exif, soft = Image.Exif(), plain.copy()
    exif[0x0112] = 6
    soft.putalpha(Image.fromarray(photo()[..., 0]))
    kinds = {"jpg": "RGB", "png": "RGB", "bmp": "RGB", "ppm": "RGB", "jp2": "RGB", "tga": "RGB",
             "gif": "P", "tif": "CMYK", "JPEG": "L", "webp": "RGB"}  # fmt: skip
    for suffix, mode in kinds.items():
        save(root / f"a/plain.{suffix}", plain.convert(mode))
    for mode in ("1", "L", "LA", "P", "RGBA"):
        save(root / f"b/{mode}.png", soft.convert(mode))
    save(root / "b/palette.png", plain.quantize(16), transparency=3)
    save(root / "b/deep.png", ramp.astype(np.uint16))
    save(root / "b/turned.jpg", plain, exif=exif)
    save(root / "b/turned.tif", plain, tiffinfo={0x0112: 8})
    save(root / "b/moving.gif", plain, save_all=True, append_images=[plain.rotate(180)])
    save(root / "b/line.png", plain.resize((900, 1)))
    save(root / "b/name.of.a.jpg", plain, format="PNG")
    if features.check("avif"):
        save(root / "b/x.avif", plain)
    (root / "b/broken.png").write_bytes((root / "a/plain.png").read_bytes()[:70])
    save(root / "b/twelve.png", (ramp / 16).astype(np.uint16))
    save(root / "c.png/inside.png", plain)
    (root / "meta.json").write_text("{}")  # somebody's, not of a set
    save("elsewhere/linked.png", soft)
    (root / "d").symlink_to(Path("elsewhere").absolute())


@pytest.mark.skipif(os.name == "nt", reason="symbolic links")
def test_fid_and_clip_see_pixel_for_pixel_what_training_sees(tmp_path):
    many_kinds(tmp_path / "set")
    source = data.open_data("set", 24, mirror=False)
    trained = source.read(np.arange(len(source)), np.random.default_rng(0)).x
    compared, whole = (evaluate.open_pictures("set", side) for side in (24, None))
    names = [entry.name for entry in compared.items]
    bad = {"b/broken.png", "b/twelve.png"}  # left out of the one, refused by the other
    assert bad < set(names) and len(source) == len(names) - 2 >= 23
    k = 0
    for i, name in enumerate(names):
        if name in bad:
            with pytest.raises(UserError, match=name):
                compared[i]
        else:
            assert torch.equal(trained[k], compared[i]), name
            picture = Image.fromarray(whole[i].numpy().transpose(1, 2, 0))
            assert (data.crop(picture, 24) == trained[k].numpy()).all(), name
            k += 1
    assert compared.classes == source.spec.classes
    assert compared.labels[[n not in bad for n in names]].tolist() == source.labels[source.rows].tolist()
    (made,) = Path("datasets").iterdir()
    again = evaluate.open_pictures(str(made), None)  # what was prepared can be scored as it is
    assert len(again) == len(trained) and torch.equal(again[3], trained[3])


# --- Layouts --------------------------------------------------------------------------------------

PIC, REFUSED = object(), None


def by_folder(*names, depth=0):
    """{picture: its class}."""
    return {name: name.split("/")[depth] for name in names}


def pictures(*names):
    return dict.fromkeys(names, PIC)


def lines(captions, name="image_file", texts="captions"):
    rows = ({name: k, texts: v} for k, v in captions.items())
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(captions):
    return {"captions.jsonl": lines(captions)}


TWO, FLAT = pictures("a/0.png", "a/1.png", "b/0.png", "b/1.png"), pictures("0.png", "1.png", "2.png")
AB, ONE = by_folder(*TWO), dict.fromkeys(FLAT, "pictures")
TEXTS = {"0.txt": "null", "1.txt": "eins", "2.txt": "zwölf"}
CAPTIONS = {"0.png": ["null"], "1.png": ["eins"], "2.png": ["zwölf"]}
TABLE, BOX = table(CAPTIONS), "0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.2 0.2\n"
HF = {k: v[0] for k, v in CAPTIONS.items()}
XAB, PNGS = ("x/a/0.png", "x/b/0.png"), ("a.png/0.png", "b.png/0.png")
DEEP = ("a/x/0.png", "a/y/0.png", "b/0.png")
ODD_SUFFIXES = ("a/0.PNG", "b/0.Jpeg", "c/0.jfif", "d/0.jpe")
SHARDS = pictures("00000/0.png", "00000/1.png", "01000/2.png")
ODD_TEXT = {"0.png": ["a\u2028b", "👩‍🚀 שלום", "x" * 9999, "\\u0041"]}
HIDDEN = pictures(".cache/0.png", "a/._0.png") | {".DS_Store": "x"}
UNREAD = {"c/0.heic": "x", "c/1.heic": "x", "c/2.dng": "x", "c/3": "x", "c.zip": "x", "d.tar": "x"}
LINKS = {"../o/0.png": PIC, "../1.png": PIC, "c": ("->", "../o"), "a/2.png": ("->", "../../1.png")}
LAYOUTS = {  # title: files; what is read, {picture: class or captions}; words that are said
    "class folders": (TWO, AB, ()),
    "one folder more": (pictures(*XAB), by_folder(*XAB, depth=1), ()),
    "deeper folders": (pictures(*DEEP), by_folder(*DEEP), ()),
    "no folders": (FLAT, ONE, ()),
    "folders called as pictures": (pictures(*PNGS), by_folder(*PNGS), ()),
    "names by case": (pictures("Cat/0.png", "cat/0.png"), by_folder("Cat/0.png", "cat/0.png"), ()),
    "other ways to write suffixes": (pictures(*ODD_SUFFIXES), by_folder(*ODD_SUFFIXES), ()),
    "pictures beside folders": (TWO | {"9.png": PIC}, REFUSED, ("9.png",)),
    "nothing": ({"x.parquet": "PAR1"}, REFUSED, ("no pictures",)),
    "files that are not read": (TWO | UNREAD, AB, ("2 .heic", "1 .dng", "1 3", "1 .zip", "1 .tar")),
    "hidden files": (TWO | HIDDEN, AB, ("2 .png",)),
    "links": (TWO | LINKS, AB | {"../o/0.png": "c", "../1.png": "a"}, ()),
    "links that lead back": (TWO | {"a/up": ("->", ".."), "b/b": ("->", "../a")}, AB, ("2 links",)),
    "a link to nowhere": (TWO | {"a/2.png": ("->", "gone.png")}, AB, ("1 links", "a/2.png")),
    # shards and labels
    "numbered folders": (SHARDS, by_folder(*SHARDS), ("00000",)),
    "shards": (pictures("part-0000/0.png", "part-0001/0.png"),
               by_folder("part-0000/0.png", "part-0001/0.png"), ("part-0000",)),
    "tars": ({"0.tar": "x", "1.tar": "x"}, REFUSED, ("no pictures", "unpack")),
    "labels of StyleGAN": (SHARDS | {"dataset.json": "{}"}, REFUSED, ("dataset.json",)),
    "labels beside pictures": (FLAT | {"0.cls": "3"}, REFUSED, ("0.cls",)),
    "labels in other files": (FLAT | {"0.xml": "<a/>", "0.json": "{}"}, ONE, ("1 .xml", "1 .json")),
    # captions
    "captions.jsonl": (FLAT | TABLE, CAPTIONS, ()),
    "metadata.jsonl": (FLAT | {"metadata.jsonl": lines(HF, "file_name", "text")}, CAPTIONS, ()),
    "a table in a folder": (pictures("x/0.png", "y/0.png")
                            | {"x/captions.jsonl": lines({"0.png": "x"})}, REFUSED,
                            ("x/captions.jsonl",)),
    "lines of one picture": ({"0.png": PIC, "captions.jsonl": 2 * lines({"0.png": ["1"]})},
                             {"0.png": ["1", "1"]}, ()),
    "odd texts": ({"0.png": PIC, "captions.jsonl": lines(ODD_TEXT)}, ODD_TEXT, ()),
    "absent pictures": (FLAT | table(CAPTIONS | {"7.png": "x", "8.png": "y"}), CAPTIONS,
                        ("2 ", "7.png")),
    "only absent pictures": (FLAT | table({"7.png": "x"}), REFUSED, ("7.png",)),
    "pictures without a line": (FLAT | table({"1.png": "eins"}), {"1.png": ["eins"]},
                                ("2 of 3", "0.png")),
    "empty captions": (FLAT | table({"0.png": ["", "null"], "1.png": " ", "2.png": ["zwölf"]}),
                       {"0.png": ["null"], "2.png": ["zwölf"]}, ("2 pictures", "1 of 3")),
    "an empty table": (FLAT | {"captions.jsonl": "\n\n"}, REFUSED, ("captions.jsonl",)),
    "a table and texts": (FLAT | TEXTS | TABLE, CAPTIONS, ("3 .txt",)),
    "two kinds of tables": (FLAT | TABLE | {"metadata.jsonl": "{}"}, CAPTIONS, ("1 .jsonl",)),
    "other tables": (FLAT | {"metadata.csv": "file_name,text\n", "captions.json": "{}"}, ONE,
                     ("1 .csv", "1 .json")),
    "texts": (FLAT | TEXTS, CAPTIONS, ()),
    "texts in capitals": (FLAT | {k.upper(): v for k, v in TEXTS.items()}, CAPTIONS, ()),
    "texts of other suffixes": (FLAT | {"0.caption": "eins", "0.png.txt": "eins"}, ONE,
                                ("1 .caption", "1 .txt")),
    "an empty text": (FLAT | TEXTS | {"1.txt": " \n"}, {k: CAPTIONS[k] for k in ("0.png", "2.png")},
                      ("1 pictures", "1 of 3")),
    "one text of many": (TWO | {"a/0.txt": "eins"}, REFUSED, ("1 of 4",)),
    "a README": (TWO | {"README.txt": "licence"}, AB, ("1 .txt",)),
    "boxes of YOLO": (FLAT | dict.fromkeys(TEXTS, BOX), REFUSED, ("numbers",)),
    "boxes elsewhere": ({"x/0.png": PIC, "labels/0.txt": BOX}, by_folder("x/0.png"), ("1 .txt",)),
}  # fmt: skip
KINDS = [  # names of folders, and whether they are splits of a set
    (("train", "val"), True), (("Train", "TEST"), True), (("train2017", "val2017"), True),
    (("X_train_HR", "X_valid_HR"), True), (("trainA", "trainB", "testA", "testB"), True),
    (("train", "test", "unlabeled"), True), (("train",), False),
    (("cup", "hat", "jar", "test tube", "training bench"), False), (("n01440764", "n01443537"), False),
]  # fmt: skip


def make(root: Path, files: dict) -> dict[int, str]:
    """Write a layout; returns {grey value: name} of its pictures."""
    greys = {}

    def content(name, value):
        if value is not PIC:
            return value.encode() if isinstance(value, str) else value
        grey, raw = 5 * len(greys), io.BytesIO()
        greys[grey] = name
        kind = "PNG" if name.lower().endswith(".png") else "JPEG"
        Image.new("RGB", (9, 9), (grey,) * 3).save(raw, kind)
        return raw.getvalue()

    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, tuple):
            path.symlink_to(value[1])
        else:
            path.write_bytes(content(name, value))
    return greys


def as_read(source, greys):
    """{picture: class or captions} of a data set, by the grey values of its pictures."""
    found = {}
    x = source.read(np.arange(len(source)), np.random.default_rng(0)).x
    for grey, label in zip(x.float().mean((1, 2, 3)), source.labels[source.rows]):
        name = greys[5 * round(float(grey) / 5)]
        found[name] = source.captions[label] if source.captions else source.spec.classes[label]
    assert len(found) == len(source)
    return found


def assert_refused(*words):
    """The folder "set" is, in one line, and nothing is prepared."""
    with pytest.raises(UserError) as error:
        data.open_data("set", 8)
    said = str(error.value)
    assert len(said.splitlines()) == 1 and all(word in said for word in words), said
    assert not Path("datasets").exists()


@pytest.mark.skipif(os.name == "nt", reason="symbolic links")
@pytest.mark.parametrize("title", LAYOUTS)
def test_a_layout_is_read_right_refused_or_named(title, tmp_path, capsys):
    files, truth, words = LAYOUTS[title]
    greys = make(tmp_path / "set", files)
    if truth is REFUSED:
        assert_refused(*words)
        return
    found, said = as_read(data.open_data("set", 8), greys), capsys.readouterr().err
    assert found == truth and bool(said) == bool(words), said
    assert all(word in said for word in words), said


@pytest.mark.parametrize("inside", ["", "x/y/"])
@pytest.mark.parametrize("names, splits", KINDS)
def test_splits_are_not_classes(names, splits, inside, tmp_path):
    make(tmp_path / "set", pictures(*(f"{inside}{k}/0.png" for k in names)))
    if splits:
        assert_refused(names[0])
    else:
        assert data.open_data("set", 8).spec.classes == names


@pytest.mark.parametrize("files", [TABLE, TEXTS], ids=["table", "texts"])
@pytest.mark.parametrize("encoding, reads", [
    ("utf-8", True), ("utf-8-sig", True), ("utf-16", True), ("latin-1", False), ("utf-16-le", False),
    ("utf-32", False),
])  # fmt: skip
def test_captions_in_another_encoding_are_read_right_or_refused(files, encoding, reads, tmp_path):
    windows = {k: v.replace("\n", "\r\n").encode(encoding) for k, v in files.items()}
    greys = make(tmp_path / "set", FLAT | windows)
    if reads:
        assert as_read(data.open_data("set", 8), greys) == CAPTIONS
    else:
        assert_refused("set/", next(iter(files)).split(".")[1])


BROKEN = [
    "{", '{"captions": ["no name"]}', '{"image_file": "1.png", "captions": []}', "[]", "3", "null",
    '{"image_file": "1.png", "captions": [3]}', '{"image_file": 4, "captions": ["a"]}',
    '{"image_file": "1.png", "captions": ["a half \\ud83d"]}', '{"file_name": "1.png", "label": 3}',
]  # fmt: skip


@pytest.mark.parametrize("line", BROKEN)
def test_the_first_broken_line_is_refused_with_file_and_number(line, tmp_path):
    table = f"{lines(CAPTIONS)}\n{line}\n{{\n"
    make(tmp_path / "set", FLAT | {"captions.jsonl": table})
    with pytest.raises(UserError, match=r"set/captions.jsonl, line 5\b"):
        data.open_data("set", 8)


def test_broken_pictures_are_named_and_left_out(tmp_path, capsys):
    greys = make(tmp_path / "set", TWO)
    raw = (tmp_path / "set/a/1.png").read_bytes()
    (tmp_path / "set/a/1.png").write_bytes(raw[:50])
    (tmp_path / "set/a/2.png").write_bytes(b"")
    source = data.open_data("set", 8)
    said = capsys.readouterr().err
    assert "2 pictures" in said and "a/1.png" in said and "a/2.png" in said
    assert as_read(source, greys) == {k: v for k, v in AB.items() if k != "a/1.png"}
    for file in (tmp_path / "set").rglob("*.png"):
        file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="set"):
        data.open_data("set", 8)


@pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8")
def test_names_in_another_encoding_work(tmp_path):
    for name in (b"caf\xe9/\xe8.png", b"tea/0.png", "\u732b/0.png".encode()):
        path = tmp_path / "set" / os.fsdecode(name)
        save(path, photo())
    source = data.open_data("set", 8)
    assert source.labels.tolist() == [0, 1, 2] and source.spec.classes[1:] == ("tea", "\u732b")
    json.dumps(source.spec.to_json()).encode()
    source.spec.classes[0].encode()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
@pytest.mark.parametrize("closed", ["set/a", "set/a/0.png"])
def test_what_may_not_be_read_ends_in_one_line_and_no_smaller_set(closed, tmp_path, refused):
    make(tmp_path / "set", TWO)
    (tmp_path / closed).chmod(0)
    tmp_path.chmod(0o777)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        assert closed in refused(lambda argv: data.open_data("set", 8))
    finally:
        if root:
            os.seteuid(0)
        (tmp_path / closed).chmod(0o755)
    assert not list(Path("datasets").glob("*/meta.json"))


# --- Prepared once --------------------------------------------------------------------------------


def touched(file, seconds=2):
    at = file.stat().st_mtime_ns + seconds * 10**9
    os.utime(file, ns=(at, at))


def test_a_folder_is_prepared_once_and_again_when_it_changes(tmp_path):
    """Another folder under datasets/ for every state of it, and never a stale one."""
    root, flat = tmp_path / "set", np.zeros((9, 9, 3), np.uint8)
    for name in ("a/0.bmp", "a/1.bmp", "b/0.bmp"):
        save(root / name, flat)
    first = data.open_data("set", 8)
    (made,) = Path("datasets").iterdir()
    stamps = {file: file.stat().st_mtime_ns for file in made.iterdir()}
    assert data.open_data("set", 8).fingerprint == first.fingerprint
    assert isinstance(first.arrays[0], np.memmap)  # memory does not grow with the set
    assert {file: file.stat().st_mtime_ns for file in made.iterdir()} == stamps

    def repaint():
        save(root / "a/0.bmp", flat + 200)  # of the same size in bytes
        touched(root / "a/0.bmp")

    changes = [
        lambda: save(root / "b/1.bmp", flat), lambda: (root / "b/1.bmp").rename(root / "b/2.bmp"),
        lambda: (root / "b/2.bmp").rename(root / "a/2.bmp"), lambda: (root / "a/2.bmp").unlink(),
        repaint, lambda: (root / "b").rename(root / "c"),
    ]  # fmt: skip
    prints = []
    for change in changes:
        change()
        found = data.open_data("set", 8)
        prints.append(found.fingerprint)
    assert prints[3] == first.fingerprint  # as it was
    assert len(set(prints)) == 6 == len(list(Path("datasets").iterdir()))
    assert found.read([0], np.random.default_rng(0)).x.unique().tolist() == [200]
    assert data.open_data("set", 16).spec.shape == (3, 16, 16)
    root.rename(tmp_path / "moved")  # a set is known by what it holds, not by where it lies
    assert data.open_data("moved", 8).fingerprint == found.fingerprint


def test_another_caption_is_another_set(tmp_path):
    make(tmp_path / "set", FLAT | TEXTS)
    first = data.open_data("set", 8)
    (tmp_path / "set/1.txt").write_text("zwei")
    second = data.open_data("set", 8)
    assert (first.captions[1], second.captions[1]) == (["eins"], ["zwei"])
    assert first.fingerprint != second.fingerprint


def test_class_folders_are_mirrored_and_captioned_pictures_are_not(tmp_path):
    """Captions may tell left from right."""
    for root, text in (("classes", ""), ("captions", "left")):
        save(tmp_path / root / "a/0.png", photo(64, 64))
        if text:
            (tmp_path / root / "a/0.txt").write_text(text)
        for mirror, want in ((None, not text), (True, True), (False, False)):
            source = data.open_data(root, 16, mirror)
            x = source.read(np.zeros(60, int), np.random.default_rng(0)).x
            rising = (x[:, 0, 8, -1] > x[:, 0, 8, 0]).float().mean()
            assert (0.2 < rising < 0.8) == want and (want or rising == 1)
    left, right = x[0], source.arrays[0][0]
    assert (left.numpy() == right).all()


# --- python train.py --data FOLDER ----------------------------------------------------------------

SHORT = "--steps 2 --log_every 1 --batch 4 --size demo --device cpu".split()


def own(*flags):
    argv = [*SHORT, *map(str, flags)]
    train.main(argv)
    return argv


def test_the_line_of_the_readme_trains_on_class_folders_and_samples(tmp_path):
    """As a shell starts it, with no flag that makes it fit; only the cut picture is named."""
    for i, size in enumerate([(90, 60), (61, 100), (64, 64), (33, 47), (200, 70)]):
        save(tmp_path / f"holiday pictures/sea/{i}.png", photo(*size))
        save(tmp_path / f"holiday pictures/hills/{i}.jpg", photo(*size)[..., 0])
    whole = (tmp_path / "holiday pictures/hills/3.jpg").read_bytes()
    (tmp_path / "holiday pictures/hills/cut.jpg").write_bytes(whole[: len(whole) // 2])
    code, text = shell([sys.executable, ROOT / "train.py", "--data", "holiday pictures", *SHORT])
    assert code == 0 and text.count("cut.jpg") == 1 and "hills 5" in text and "sea 5" in text, text
    run = Path("runs/holiday pictures")  # without --name the run has the folder's
    (step,) = run.glob("checkpoints/step_*")
    spec = json.loads((step / "config.json").read_text())["data"]
    assert spec["shape"] == [3, 64, 64] and spec["classes"] == ["hills", "sea"]
    assert {"data.png", "step_00000002.png"} <= {p.name for p in (run / "samples").iterdir()}
    sample.main(["--classes", "sea", "Hills", "--steps", "1", "--device", "cpu"])
    with Image.open("samples.png") as grid:
        assert grid.width >= 2 * 64


def test_what_sampling_writes_can_be_trained_on(tmp_path):
    """Captions beside pictures train a text network; -n leaves captions.jsonl."""
    make(tmp_path / "set", FLAT | TEXTS)
    own("--data", "set", "--side", 15)  # of any side
    assert sample.load("runs/set")[0].classes is None
    flags = "--checkpoint runs/set -n 4 --steps 1 --out drawn --device cpu".split()
    sample.main([*flags, "--prompts", "red", "a blue one"])
    source = data.open_data("drawn", 15)
    assert [source.captions[i] for i in range(4)] == 2 * [["red"], ["a blue one"]]
    own("--data", "drawn", "--side", 15)


def test_a_moved_set_resumes_and_a_changed_one_is_refused(tmp_path, refused):
    for name in ("a/0.bmp", "a/1.bmp", "b/0.bmp"):
        save(tmp_path / "set" / name, photo(16, 16))
    own("--data", "set", "--side", 16, "--name", "run")
    (tmp_path / "set").rename(tmp_path / "moved")
    more = "--data moved --side 16 --name run --steps 3".split()
    own(*more)
    save(tmp_path / "moved/a/0.bmp", 255 - photo(16, 16))  # of the same size in bytes
    touched(tmp_path / "moved/a/0.bmp")
    assert "--data" in refused(train.main, *SHORT, *more)
    assert [line["step"] for line in log(Path("runs/run"))] == [1, 2, 3]


def test_a_picture_more_is_named_and_not_its_prompt(tmp_path, refused):
    make(tmp_path / "set", FLAT | TEXTS)
    more = "--data set --side 16 --name run".split()
    own(*more)
    assert "--side" in refused(train.main, *SHORT, *more, "--side", "8")  # not the pictures
    make(tmp_path / "set", {"3.png": PIC, "3.txt": "drei"})
    said = refused(train.main, *SHORT, *more, "--steps", "3")
    assert "--data" in said and "drei" not in said


@pytest.mark.parametrize("flags", [
    "--patch 7", "--channels 1", "--classes 5", "--init no", "--data texts --text_encoder ./nowhere",
    "--data splits", "--data nowhere", "--align 1 --align_encoder ./nowhere", "--runs set/runs",
])  # fmt: skip
def test_a_run_that_cannot_start_leaves_nothing(flags, tmp_path, refused):
    splits = pictures("train/0.png", "val/0.png")
    for name, files in (("set", TWO), ("texts", FLAT | TEXTS), ("splits", splits)):
        make(tmp_path / name, files)
    before = sorted(tmp_path.rglob("*"))
    message = refused(train.main, *SHORT, "--data", "set", *flags.split())
    assert flags.split()[-2] in message or flags.split()[-1] in message
    after = {p for p in tmp_path.rglob("*") if "datasets" not in p.parts}
    assert after == set(before)
