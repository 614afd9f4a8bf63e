"""Pictures, the data sets that hold them, the stream, and the helpers that every stage uses."""

import argparse
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

import data
from data import DataSpec, UserError

ROOT = Path(data.__file__).parent


def pictures(folder, n, side=20, name="{:03}.png"):
    """n different grey pictures in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        Image.new("RGB", (side, side), (k % 256,) * 3).save(folder / name.format(k))
    return folder


def first(n, data_set, *key, **more):
    return [batch for _, batch in zip(range(n), data.batches(data_set, *key, **more))]


def greys(data_set, x):
    """The grey value of each picture of a batch."""
    return np.rint(x[:, 0, 0, 0].numpy() * data_set.spec.std + data_set.spec.mean).astype(int)


# --------------------------------------------------------------------------------------------------
# Errors, arguments, processes, files


@pytest.mark.parametrize("kind, good, bad", [
    (data.positive_int, ["1", "12"], ["0", "-1", "1.5", "nan", "inf", "x"]),
    (data.natural, ["0", "3"], ["-1", "0.5", "nan", ""]),
    (data.positive_float, ["1e-9", "2"], ["0", "-1", "nan", "inf", "x"]),
    (data.non_negative_float, ["0", "0.5"], ["-0.1", "nan", "-inf", "inf"]),
    (data.share, ["0", "1", "0.3"], ["1.1", "-0.1", "nan", "inf"]),
])  # fmt: skip
def test_argument_types_name_the_value_and_the_rule(kind, good, bad):
    for text in good:
        assert kind(text) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' must be a"):
            kind(text)


def fake_cuda(monkeypatch, available=True, gpus=2, bf16=True):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    return chosen


def test_each_process_takes_the_gpu_of_its_local_rank(monkeypatch):
    chosen = fake_cuda(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert data.open_device() == data.open_device("cuda") == torch.device("cuda", 1)
    assert data.open_device("cuda:0") == torch.device("cuda", 0) and chosen == [1, 1, 0]
    assert data.open_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="--device cuda: there are 2 GPUs, not 3; use --device cpu"):
        data.open_device("cuda")
    with pytest.raises(UserError, match="--device cuda:x: not available; use --device cpu"):
        data.open_device("cuda:x")


def test_a_device_that_is_not_there_is_named_with_the_way_out(monkeypatch):
    fake_cuda(monkeypatch, available=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert data.open_device("auto") == torch.device("cpu")                      # mps only by name
    assert data.open_device("mps").type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "cuda:0", "mps", "tpu", "cuda:x"):
        with pytest.raises(UserError, match=f"--device {name}: .*--device cpu"):
            data.open_device(name)


def test_bf16_is_used_where_the_gpu_has_it(monkeypatch):
    cpu, cuda, mps = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")
    for has in (True, False):
        fake_cuda(monkeypatch, bf16=has)
        assert data.pick_dtype(cuda) == (torch.bfloat16 if has else torch.float32)
    assert data.pick_dtype(cpu) == data.pick_dtype(mps) == torch.float32
    assert data.pick_dtype(cpu, "bf16") == data.pick_dtype(cuda, "bf16") == torch.bfloat16
    assert data.pick_dtype(cuda, "fp32") == torch.float32
    with pytest.raises(UserError, match="bf16.*mps"):
        data.pick_dtype(mps, "bf16")


def test_ranks_come_from_the_environment(monkeypatch):
    assert data.ranks() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert data.ranks() == (3, 8)


def test_a_claim_names_the_first_difference_the_file_and_the_way_out(tmp_path):
    file = tmp_path / "plan.json"
    data.claim(file, {"size": 32, "classes": ("a", "b"), "none": None})
    data.claim(file, {"size": 32, "classes": ["a", "b"]})
    with pytest.raises(UserError, match=r"plan.json was written with size = 32, not 64; .*delete"):
        data.claim(file, {"size": 64, "classes": ["a", "c"]})
    with pytest.raises(UserError, match="classes = b, not c"):
        data.claim(file, {"size": 32, "classes": ["a", "c"]})
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_of_many_claims_at_once_one_wins(tmp_path, monkeypatch):
    def attempt(k):
        try:
            data.claim(file, {"k": k})
            return k
        except UserError:
            return None

    for links in (True, False):
        if not links:
            monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError("no links")))
        file = tmp_path / f"{links}.json"
        won = {k for k in data.in_threads(attempt, range(32), 8) if k is not None}
        assert json.loads(file.read_text())["k"] in won and (len(won) == 1 or not links)


def test_files_are_complete_or_not_there_and_names_are_unique(tmp_path):
    data.write_text(tmp_path / "a.txt", "zwölf\n")
    assert (tmp_path / "a.txt").read_bytes() == "zwölf\n".encode()
    assert len({data.aside(tmp_path / "a") for _ in range(100)}) == 100
    assert data.digest_file(tmp_path / "a.txt") == hashlib.sha256("zwölf\n".encode()).hexdigest()[:16]
    data.write_picture(np.zeros((4, 6, 3), np.uint8), tmp_path / "a.png")
    data.write_picture(Image.new("L", (6, 4)), tmp_path / "a.jpg")
    assert Image.open(tmp_path / "a.png").size == (6, 4) and Image.open(tmp_path / "a.jpg").format == "JPEG"
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "a.png", "a.jpg"}


def test_errors_end_a_command_with_one_line(capsys):
    def fail():
        data.require(False, "--x 3: at most 2")

    with pytest.raises(SystemExit) as stop:
        data.command(fail)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: --x 3: at most 2\n"


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_ends_without_a_traceback(presses):
    """A second one does not wait for the threads that still read."""
    body = "for _ in data.in_threads(time.sleep, [%d] * 99, 2): pass" % (1 if presses == 1 else 60)
    script = f"import data, time\ndef main():\n print('go', flush=True)\n {body}\ndata.command(main)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job hears none
    process = subprocess.Popen([sys.executable, "-c", script], preexec_fn=heard, **pipes)
    assert process.stdout.readline() == "go\n"
    for _ in range(presses):
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in error


def test_importing_is_quick_and_portable():
    script = "import sys, data; print([m for m in sys.modules if m in %r])"
    heavy = ["torchvision", "diffusers", "transformers", "torch_fidelity"]
    done = subprocess.run([sys.executable, "-c", script % heavy], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    text = (ROOT / "data.py").read_text()
    assert not any(word in text for word in ("import resource", "import fcntl", "os.pread", "os.fork"))


# --------------------------------------------------------------------------------------------------
# Named sets


def test_demo_is_the_first_of_fashion_mnist():
    source = data.open_data("demo")
    assert len(source) == 10000 and source.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert np.bincount(source.labels).tolist() == [942, 1027, 1016, 1019, 974, 989, 1021, 1022, 990, 1000]
    assert round(source.spec.mean, 2) == 73.01 and source.spec.shape == (1, 28, 28)
    assert source.describe().startswith("10,000 pictures of 10 classes: T-shirt 942, trouser 1,027, ")
    assert source.buckets == [range(10000)] and source.features_shape is None


def test_opening_prints_nothing(tmp_path, capsys):
    data.open_data("demo")
    data.open_data("emoji")
    data.open_data(str(pictures(tmp_path / "set/a", 3).parent))
    said = capsys.readouterr()
    assert said.out == said.err == ""


def idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(head + array.tobytes())


@pytest.fixture
def torchvision_sets(tmp_path, monkeypatch):
    """The layouts of torchvision in datasets/, and no network."""
    datasets = pytest.importorskip("torchvision.datasets")
    numbers = np.random.default_rng(0)
    root = tmp_path / "datasets"
    for name in ("MNIST", "FashionMNIST"):
        (root / name / "raw").mkdir(parents=True)
        for part, n in (("train", 30), ("t10k", 10)):
            images = numbers.integers(256, size=(n, 28, 28), dtype=np.uint8)
            idx(root / name / f"raw/{part}-images-idx3-ubyte", images)
            idx(root / name / f"raw/{part}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 10)
    for kind, folder, key, names in ((datasets.CIFAR10, "cifar-10-batches-py", "labels", 10),
                                     (datasets.CIFAR100, "cifar-100-python", "fine_labels", 100)):  # fmt: skip
        (root / folder).mkdir()
        record = {"data": numbers.integers(256, size=(20, 3072), dtype=np.uint8), key: list(range(20))}
        record[key] = [k % names for k in range(20)]
        for part in ("train_list", "test_list"):
            lists = [[name, None] for name, _ in getattr(kind, part)]
            monkeypatch.setattr(kind, part, lists)
            for name, _ in lists:
                (root / folder / name).write_bytes(pickle.dumps(record))
        meta = {kind.meta["key"]: [f"class {k}" for k in range(names)]}
        (root / folder / kind.meta["filename"]).write_bytes(pickle.dumps(meta))
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})
        monkeypatch.setattr(kind, "download", refuse)
    monkeypatch.setattr(datasets.MNIST, "resources", [(file, None) for file, _ in datasets.MNIST.resources])
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse)
    monkeypatch.chdir(tmp_path)
    return root


def refuse(*args, **kwargs):
    raise RuntimeError("no network")


def test_torchvision_sets_are_read_from_their_files(torchvision_sets, monkeypatch):
    grey, colour = (1, 28, 28), (3, 32, 32)
    for name, shape, n, mirrored in (("mnist", grey, 30, False), ("fashion", grey, 30, False),
                                     ("cifar10", colour, 100, True), ("cifar100", colour, 20, True)):
        if mirrored:
            monkeypatch.setattr(f"torchvision.datasets.{data.TORCHVISION[name]}.download", lambda self: None)
        source = data.open_data(name)
        assert source.spec.shape == shape and len(source) == n and source.labels[:3].tolist() == [0, 1, 2]
        x = source.read(np.zeros(64, int), np.random.default_rng(0)).x
        assert bool((x != x[:1]).any()) == mirrored
        still = data.open_data(name, mirror=False).read(np.zeros(64, int), np.random.default_rng(0)).x
        assert (still == still[:1]).all()
    raw = pickle.loads((torchvision_sets / "cifar-100-python/train").read_bytes())["data"][0]
    assert greys(source, still[:1])[0] == raw[0] and source.spec.classes[3] == "class 3"
    assert data.open_data("fashion").spec.classes[9] == "ankle boot"
    assert data.open_data("mnist").spec.classes == tuple("0123456789")


def test_without_network_or_torchvision_the_way_out_is_said(torchvision_sets, monkeypatch):
    (torchvision_sets / "MNIST/raw/train-images-idx3-ubyte").unlink()
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz.* into datasets/MNIST/raw"):
        data.open_data("mnist")
    with pytest.raises(UserError, match=r"no network.*cifar-10-python.tar.gz into datasets"):
        data.open_data("cifar10")
    monkeypatch.setenv("RANK", "1")  # rank 0 downloads, the others never do
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", lambda self: pytest.fail("downloads"))
    assert len(data.open_data("cifar10"))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match="pip install torchvision"):
        data.open_data("fashion")


# --------------------------------------------------------------------------------------------------
# Pictures in files


def test_class_folders_are_cropped_scaled_and_mirrored(tmp_path):
    for k in range(6):                                                          # dark left, bright right, 30 x 20
        ramp = np.tile(np.linspace(0, 250, 30), (20, 1)).astype(np.uint8)
        (tmp_path / f"set/kind {k % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(ramp).save(tmp_path / f"set/kind {k % 2}/{k}.png")
    source = data.open_data(str(tmp_path / "set"), 16)
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1] and source.spec.classes == ("kind 0", "kind 1")
    assert source.describe() == "6 pictures of 2 classes: kind 0 3, kind 1 3"
    x = source.read(np.arange(6).repeat(50), np.random.default_rng(0)).x
    assert x.shape == (300, 3, 16, 16) and x.dtype == torch.float32
    assert abs(x.mean()) < 1e-4 and abs(x.std() - 1) < 1e-3
    rising = x[:, 0, 8, -1] > x[:, 0, 8, 0]
    assert 0.4 < rising.float().mean() < 0.6                                    # half of them mirrored
    assert (x[~rising][0] == x[rising][0].flip(2)).all()
    x = data.open_data(str(tmp_path / "set"), 16, mirror=False).read(np.arange(6), np.random.default_rng(0)).x
    assert (x[:, 0, 8, -1] > x[:, 0, 8, 0]).all()


def test_crop_covers_without_stretching():
    y, x = np.mgrid[:300, :500]
    disc = (((x - 250) ** 2 + (y - 150) ** 2) < 100**2).astype(np.uint8) * 255
    out = data.crop(Image.fromarray(np.stack([disc] * 3, 2)), 48, 84)[0] > 127
    rows, columns = np.flatnonzero(out.any(1)), np.flatnonzero(out.any(0))
    assert abs(len(rows) - len(columns)) <= 1 and abs(len(columns) - 200 * 84 / 500) <= 1.5


def test_transparency_is_composited_on_white_and_deep_grey_is_kept(tmp_path):
    alpha = np.zeros((8, 8, 4), np.uint8)
    alpha[:, 4:, 3] = 128                                                       # a soft black shadow
    rgba, palette = Image.fromarray(alpha), Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    rgba.save(tmp_path / "rgba.png")
    rgba.convert("LA").save(tmp_path / "la.png")
    palette.save(tmp_path / "p.png", transparency=1)
    for name in ("rgba.png", "la.png"):
        found = np.asarray(data.open_picture(tmp_path / name))
        assert (found[:, :4] == 255).all() and (abs(found[:, 4:].astype(int) - 127) <= 1).all(), name
    assert (np.asarray(data.open_picture(tmp_path / "p.png")) == 255).all()
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    deep = np.asarray(data.open_picture(tmp_path / "deep.png"), float)[..., 0]
    assert abs(deep - ramp / 257).max() <= 1
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="no known white"):
        data.open_picture(tmp_path / "float.tif")


def test_broken_pictures_are_listed_once_and_replaced_by_the_next(tmp_path, capsys):
    folder = pictures(tmp_path / "set/a", 10).parent
    whole = (folder / "a/004.png").read_bytes()
    (folder / "a/003.png").write_bytes(b"nothing")
    (folder / "a/004.png").write_bytes(whole[:50])
    pictures(folder / "b", 2, name="x{}.png")
    (folder / "b/x1.png").write_bytes(b"")                                      # the last of all: replaced by the first
    for order in (np.arange(12), np.arange(12)[::-1]):
        source = data.open_data(str(folder), 8, mirror=False)
        batch = source.read(order, np.random.default_rng(0))
        want = np.array([0, 1, 2, 5, 5, 5, 6, 7, 8, 9, 0, 0])[order]
        assert greys(source, batch.x).tolist() == want.tolist()
        assert batch.y.tolist() == np.array([0] * 10 + [1, 0])[order].tolist()  # the label of what is shown
        said = capsys.readouterr().err
        assert said.count("is skipped") == 3 and said.count("a/004.png is skipped: ") == 1
    for file in folder.rglob("*.png"):
        file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="none of 12 pictures can be opened"):
        data.open_data(str(folder))


def test_a_disk_that_fails_is_no_broken_picture(tmp_path):
    source = data.open_data(str(pictures(tmp_path / "set/a", 3).parent), 8)
    source.load.args[0].__self__.cache.clear()
    (tmp_path / "set/a/001.png").unlink()
    with pytest.raises(UserError, match="001.png: cannot be read.*check the disk"):
        source.read([1], np.random.default_rng(0))


def test_statistics_are_of_evenly_spaced_pictures(tmp_path):
    """300 pictures of a dark class, then 200 of a bright one: a slice of 256 would be dark."""
    for name, n, grey in (("a", 300, 0), ("b", 200, 200)):
        (tmp_path / name).mkdir()
        for k in range(n):
            Image.new("RGB", (4, 4), (grey,) * 3).save(tmp_path / name / f"{k:03}.bmp")
    spec = data.open_data(str(tmp_path), 4).spec
    assert spec.mean == pytest.approx(80, abs=1) and spec.std == pytest.approx(98, abs=1)


def test_a_second_epoch_decodes_nothing(tmp_path, monkeypatch):
    folder, opened, lock = pictures(tmp_path / "set/a", 30).parent, [], threading.Lock()
    plain = data.open_picture

    def counted(file, upright=False):
        with lock:
            opened.append(1)
        return plain(file, upright)

    monkeypatch.setattr(data, "open_picture", counted)
    source = data.open_data(str(folder), 8)
    first(9, source, 10, 0, [0], 1)
    assert len(opened) == 30
    monkeypatch.setattr(data, "CACHE", 10 * 3 * 8 * 8)                          # room for ten
    source = data.open_data(str(folder), 8)
    files = source.load.args[0].__self__
    assert len(files.cache) <= 10 + 8 and len(opened) == 60
    first(6, source, 10, 0, [0], 1)
    assert len(opened) > 60 + 30 and len(files.cache) <= 10 + 8


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "test", "validation")])
def test_splits_are_not_classes(tmp_path, names):
    for name in names:
        pictures(tmp_path / "set" / name / "cat", 2)
    with pytest.raises(UserError, match="are splits, not classes; give one of them, such as .*rain"):
        data.open_data(str(tmp_path / "set"))
    assert data.open_data(str(tmp_path / "set" / names[0])).spec.classes == ("cat",)
    pictures(tmp_path / "set/dog", 1)                                           # then they are the user's classes
    assert len(data.open_data(str(tmp_path / "set")).spec.classes) == len(names) + 1


def test_odd_folders_are_refused_with_a_way_out(tmp_path):
    with pytest.raises(UserError, match="no such folder or .tar; give one, or one of demo, emoji, fashion"):
        data.open_data(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no pictures"):
        data.open_data(str(tmp_path))
    pictures(pictures(tmp_path / "set/a", 1).parent, 1)
    with pytest.raises(UserError, match="000.png.* lies beside the class folders"):
        data.open_data(str(tmp_path / "set"))
    with pytest.raises(UserError, match="demo has no features"):
        data.open_data("demo", features=True)
    assert data.open_data(str(tmp_path / "set/a")).describe() == "1 pictures of 1 classes: pictures 1"


def test_hidden_folders_are_not_classes(tmp_path):
    folder = pictures(tmp_path / "set/a", 4).parent
    pictures(pictures(folder / "b", 2).parent / ".ipynb_checkpoints", 1)
    assert data.open_data(str(folder)).spec.classes == ("a", "b")


def test_a_set_is_recognised_by_its_content(tmp_path):
    folder = pictures(tmp_path / "one/a", 4).parent
    pictures(folder / "b", 2)
    mark = data.open_data(str(folder), 8).fingerprint()
    folder.rename(tmp_path / "moved")
    assert data.open_data(str(tmp_path / "moved"), 8).fingerprint() == mark
    (tmp_path / "moved/a/003.png").rename(tmp_path / "moved/b/003.png")
    assert data.open_data(str(tmp_path / "moved"), 8).fingerprint() != mark
    assert data.open_data("demo").fingerprint() != data.open_data("emoji").fingerprint()


# --------------------------------------------------------------------------------------------------
# Records


def test_specs_survive_json_and_unknown_keys():
    spec = DataSpec("latents", (4, 32, 32), classes=("a", "b"), autoencoder="sd-vae", scale=0.2, factor=8,
                    buckets=((32, 32), (16, 64)), text={"encoder": "bytes"}, prompts=("x",))  # fmt: skip
    record = json.loads(json.dumps(spec.to_json()))
    assert record == spec.to_json() and DataSpec.from_json(record) == spec
    other = dict(kind="pixels", shape=[1, 28, 28], mean=73.0, std=90.3, classes=["a"], more=1)
    assert DataSpec.from_json(other) == DataSpec("pixels", (1, 28, 28), 73.0, 90.3, ("a",))


def test_what_does_not_fit_is_refused():
    spec = data.open_data("demo").spec
    data.check_fits(spec)
    data.check_fits(spec, 1, 28, 10, "")
    for asked, rule in (({"channels": 3}, "channels 1"), ({"side": 32}, "height 28"), ({"classes": 100}, "classes 10"),
                        ({"autoencoder": "sd-vae"}, "autoencoder ")):  # fmt: skip
        with pytest.raises(UserError, match=f"the data have {rule}, the configuration asks for"):
            data.check_fits(spec, **asked)
    noise = data.random_data((4, 8, 8), 7)
    data.check_fits(noise.spec, 4, 8, 7, "sd-vae")
    assert noise.read([0, 1], np.random.default_rng(0)).x.shape == (2, 4, 8, 8)
    with pytest.raises(UserError, match="--data random"):
        data.random_data((0, 8, 8), 7)


def test_pixels_come_back_as_they_were():
    source = data.open_data("demo")
    x = source.read(np.arange(50), None).x
    pixels = data.Decoder(source.spec)(x)
    raw, _ = source.load.args[0](np.arange(50))
    assert abs(x.std() - 1) < 0.1 and (pixels[..., 0] == raw[:, 0]).all()
    noise = data.random_data((4, 8, 8), 7)
    assert data.Decoder(noise.spec)(torch.zeros(2, 4, 8, 8)).tolist() == np.full((2, 8, 8, 3), 128).tolist()


def test_a_picture_file_goes_to_network_space(tmp_path):
    Image.new("RGB", (40, 60), (10, 200, 30)).save(tmp_path / "a.png")
    spec = DataSpec("pixels", (3, 8, 4), mean=100.0, std=50.0)
    x = data.encode_picture(tmp_path / "a.png", spec, "cpu")
    assert x.shape == (1, 3, 8, 4) and x[0, :, 0, 0].tolist() == pytest.approx([-1.8, 2, -1.4])
    grey = data.encode_picture(tmp_path / "a.png", DataSpec("pixels", (1, 8, 8)), "cpu")
    assert grey.shape == (1, 1, 8, 8) and grey[0, 0, 0, 0] == pytest.approx(124, abs=1)
    (tmp_path / "b.png").write_bytes(b"x")
    with pytest.raises(UserError, match="b.png: not a picture"):
        data.encode_picture(tmp_path / "b.png", spec, "cpu")


def test_grids_have_gaps_and_names():
    rows = np.zeros((2, 3, 8, 10, 3), np.uint8)
    assert data.grid(rows).size == (3 * 12 - 2, 2 * 10 - 2)
    assert data.grid(rows, gap=0).size == (30, 16)
    assert data.grid(rows[..., :1], scale=4).mode == "L"
    plain, named = data.grid(rows, 8), data.grid(rows, 8, ["a cat"] * 3, ["1 step", "2 steps"])
    left, below = named.width - plain.width, named.height - plain.height
    assert left > 40 and below > 40
    kept = named.crop((left, 0, named.width, plain.height))
    assert (np.asarray(kept) == np.asarray(plain)).all()
    assert np.asarray(named.crop((0, 0, left, plain.height))).min() < 50        # something is written
    assert np.asarray(named.crop((left, plain.height, named.width, named.height))).min() < 50


# --------------------------------------------------------------------------------------------------
# The stream


def hand_made(folder):
    """A latent set of three shards in the first edition's form, with features."""
    numbers, shards, added = np.random.default_rng(1), [], []
    folder.mkdir()
    for k, n in enumerate((20, 20, 13)):
        z = numbers.standard_normal((n, 2, 8, 5, 3)).astype(np.float16)
        labels = numbers.integers(3, size=n)
        save_file({"latents": z, "labels": labels}, folder / f"latents_{k:05}.safetensors")
        tokens = numbers.standard_normal((n, 2, 6, 7)).astype(np.float16)
        save_file({"features": tokens, "labels": np.zeros(n, np.int64)}, folder / f"features_{k:05}.safetensors")
        shards.append(dict(file=f"latents_{k:05}.safetensors", count=n))
        added.append(dict(file=f"features_{k:05}.safetensors", count=n))
    meta = dict(kind="latents", autoencoder="sd-vae", scale=0.18215, shift=0.1, shape=[4, 5, 3], moments=True,
                classes=["a", "b", "c"], count=53, pictures=53, shards=shards)  # fmt: skip
    meta["features"] = dict(name="x", grid=2, shards=added)
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


def test_captioned_latents_are_mirrored_only_if_asked_for(tmp_path):
    """Captions may tell left from right; sets of classes are mirrored."""
    made = Path(hand_made(tmp_path / "set"))
    mirrored = lambda mirror: data.open_data(str(made), mirror=mirror).load.args[3]
    assert mirrored(None) and mirrored(True) and not mirrored(False)
    meta = json.loads((made / "meta.json").read_text()) | {"classes": []}
    (made / "meta.json").write_text(json.dumps(meta))
    lines = [json.dumps({"image_file": f"{i}.png", "captions": ["a"]}) for i in range(53)]
    (made / "captions.jsonl").write_text("\n".join(lines))
    assert mirrored(True) and not mirrored(None) and not mirrored(False)


def stream_digest(n, stream):
    sha = hashlib.sha256()
    for _, batch in zip(range(n), stream):
        for part in (batch.x, batch.y, batch.features):
            if part is not None:
                sha.update(part.numpy().tobytes())
    return sha.hexdigest()[:16]


def test_the_streams_are_those_of_the_first_edition(tmp_path):
    """Digests, and numbers, that the first edition gave: order, mirror images, posterior, captions."""
    demo, made = data.open_data("demo"), hand_made(tmp_path / "set")
    pixels, _ = demo.load.args[0](np.arange(100))
    mirrored = data.in_memory(pixels, demo.labels[:100], classes="abcdefghij", mirror=True)
    for source, batch, slots, of, start, n, want in (
        (demo, 6, [0, 1], 2, 1, 5, "bf8369ca475a40a5"),
        (mirrored, 6, [1], 2, 0, 5, "275ca0989a745cf0"),
        (data.open_data("emoji"), 6, [0], 1, 0, 5, "b7b49f16525e77c0"),
        (data.open_data(made), 19, [0, 1], 2, 0, 5, "e245ba0b3ea8bdbd"),
        (data.open_data(made, features=True), 19, [0, 1], 2, 0, 5, "4e26a4fbc52ef143"),
        (data.random_data((4, 3, 3), 10), 6, [0], 1, 0, 3, "4509f10d921ca02f"),
        (data.random_data((4, 3, 3), 0), 6, [0], 1, 0, 3, "2480ddde4a45600a"),
    ):
        assert stream_digest(n, data.batches(source, batch, 3, slots, of, start)) == want
    assert (demo.spec.mean, demo.spec.std) == pytest.approx((73.00877385204082, 90.27458084713916), rel=1e-12)
    assert data.picture_indices(100, 6, 3, 40, 1, 2).tolist() == [47, 11, 96, 26, 86, 31]
    found = torch.randn(3, generator=data.rng(1, 2, 3)).tolist()
    assert found == pytest.approx([-0.21289509534835815, 0.4050273895263672, 0.37525662779808044])


@pytest.mark.parametrize("slots, batch", [(1, 12), (2, 6), (4, 3)])
def test_a_step_has_the_same_pictures_on_any_number_of_slots(slots, batch):
    n, seen = 100, []
    for step in range(25):                                                      # three epochs of 100 pictures
        parts = [data.picture_indices(n, batch, 7, step, slot, slots) for slot in range(slots)]
        assert (np.concatenate(parts) == data.picture_indices(n, 12, 7, step, 0, 1)).all()
        seen += np.concatenate(parts).tolist()
    assert [sorted(seen[e * n : e * n + n]) for e in range(3)] == [list(range(n))] * 3
    assert seen[:n] != seen[n : 2 * n] and seen[:12] != data.picture_indices(n, 12, 8, 0, 0, 1).tolist()


def test_the_stream_is_a_function_of_seed_step_and_slot():
    source = data.open_data("demo")
    whole = first(6, source, 8, 0, [0, 1], 2)                                   # steps 0, 1, 2 of two slots
    later, one = first(2, source, 8, 0, [0, 1], 2, 2), first(3, source, 8, 0, [1], 2)
    for a, b in [*zip(whole[4:], later), *zip(whole[1::2], one)]:
        assert (a.x == b.x).all() and (a.y == b.y).all() and a.x.dtype == torch.float32
    index = data.picture_indices(10000, 8, 0, 0, 0, 2)
    assert (whole[0].y.numpy() == source.labels[index]).all()
    assert (whole[0].x == source.read(index, None).x).all() and (whole[0].to("cpu").x == whole[0].x).all()


def test_threads_keep_the_order_and_do_not_run_away():
    begun, lock = [], threading.Lock()

    def work(k):
        with lock:
            begun.append(k)
        time.sleep(0.002 * (k % 3))
        return k

    stream = data.in_threads(work, range(10**9), threads=3, ahead=5)
    assert [next(stream) for _ in range(20)] == list(range(20))
    stream.close()
    assert max(begun) < 30
