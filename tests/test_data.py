"""Pictures in pixel space: the layouts that are read, the scale, the stream, bad input."""

import gzip
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import UserError


def idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes((gzip.compress if path.suffix == ".gz" else bytes)(head + array.tobytes()))


def numbers(*shape):
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def test_demo_is_the_first_of_fashion_mnist():
    source = data.open_data("demo")
    assert source.pixels.shape == (10000, 1, 28, 28) and source.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert np.bincount(source.labels).tolist() == [942, 1027, 1016, 1019, 974, 989, 1021, 1022, 990, 1000]
    assert source.pixels[0, 0, :3].max() == 0 and round(float(source.pixels.mean()), 2) == 73.01
    assert source.spec["classes"][9] == "ankle boot" and source.spec["shape"] == [1, 28, 28]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_sets(tmp_path, ending):
    pixels, labels = numbers(20, 9, 7), np.arange(20, dtype=np.uint8) % 4
    idx(tmp_path / f"train-images-idx3-ubyte{ending}", pixels)
    idx(tmp_path / f"train-labels-idx1-ubyte{ending}", labels)
    source = data.open_data(str(tmp_path))
    assert (source.pixels[:, 0] == pixels).all() and (source.labels == labels).all()
    assert source.spec["classes"] == ["0", "1", "2", "3"]                       # numbers, where nothing names them
    (tmp_path / "classes.txt").write_text("a b c d")
    assert data.open_data(str(tmp_path)).spec["classes"] == ["a", "b", "c", "d"]
    (tmp_path / "classes.txt").write_text("a b c")
    with pytest.raises(UserError, match="label 3 beyond"):
        data.open_data(str(tmp_path))


def test_idx_sets_have_the_names_of_fashion_mnist_only_if_they_are_it(tmp_path):
    labels = data.open_data("demo").labels.astype(np.uint8)
    idx(tmp_path / "train-images-idx3-ubyte", np.zeros((10000, 1, 1), np.uint8))
    idx(tmp_path / "train-labels-idx1-ubyte", labels)
    assert data.open_data(str(tmp_path)).spec["classes"][0] == "T-shirt"
    idx(tmp_path / "train-labels-idx1-ubyte", labels[::-1].copy())              # such as MNIST, as many digits
    assert data.open_data(str(tmp_path)).spec["classes"][0] == "0"


def test_bad_idx_sets_are_refused(tmp_path):
    idx(tmp_path / "train-images-idx3-ubyte", numbers(5, 4, 4))
    with pytest.raises(UserError, match="no train-labels"):
        data.open_data(str(tmp_path))
    idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(4, np.uint8))
    with pytest.raises(UserError, match="5 pictures and 4 labels"):
        data.open_data(str(tmp_path))
    images = tmp_path / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(UserError, match="not a whole idx file"):
        data.open_data(str(tmp_path))


def test_cifar_sets(tmp_path):
    pixels, labels = numbers(6, 3, 32, 32), np.array([3, 9, 0, 1, 1, 2], np.uint8)
    rows = [bytes([y]) + x.tobytes() for x, y in zip(pixels, labels)]
    for k in (1, 0):
        (tmp_path / f"data_batch_{k + 1}.bin").write_bytes(b"".join(rows[3 * k : 3 * k + 3]))
    source = data.open_data(str(tmp_path), (3, 32, 32), 10)
    assert (source.pixels == pixels).all() and (source.labels == labels).all() and source.mirror
    assert source.spec["classes"] == list("0123456789")
    (tmp_path / "batches.meta.txt").write_text("airplane automobile bird cat deer dog frog horse ship truck\n")
    assert data.open_data(str(tmp_path)).spec["classes"][3] == "cat"
    (tmp_path / "data_batch_2.bin").write_bytes(b"".join(rows[3:])[:-7])
    with pytest.raises(UserError, match="no multiple of 3073"):
        data.open_data(str(tmp_path))


def test_picture_folders_are_cropped_scaled_and_mirrored(tmp_path):
    for k in range(6):                                                          # dark left, bright right, 30 x 20
        ramp = np.tile(np.linspace(0, 250, 30), (20, 1)).astype(np.uint8)
        (tmp_path / f"set/kind {k % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(ramp).save(tmp_path / f"set/kind {k % 2}/{k}.png")
    source = data.open_data(str(tmp_path / "set"), (3, 16, 16))
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1] and source.spec["classes"] == ["kind 0", "kind 1"]
    x = source.read(np.arange(6).repeat(50), np.random.default_rng(0))
    assert x.shape == (300, 3, 16, 16) and x.dtype == np.float32
    assert abs(x.mean()) < 1e-4 and abs(x.std() - 1) < 1e-4
    rising = x[:, 0, 8, -1] > x[:, 0, 8, 0]
    assert 0.4 < rising.mean() < 0.6                                            # half of them mirrored
    assert (x[~rising][0] == x[rising][0][..., ::-1]).all()
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(tmp_path / "set", "set")
    (tmp_path / "tars").mkdir()
    (tmp_path / "set.tar").rename(tmp_path / "tars/set.tar")
    packed = data.open_data(str(tmp_path / "tars"), (3, 16, 16))
    assert (packed.pixels[range(6)] == source.pixels[range(6)]).all() and (packed.labels == source.labels).all()
    broken = tmp_path / "set/kind 1/3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UserError, match="kind 1/3.png is no picture that opens"):
        data.open_data(str(tmp_path / "set"), (3, 16, 16))


def test_reasons_are_the_same_on_every_rank(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    entry = "a.png", tmp_path / "a.png", 0, -1
    reasons = {data.upright_size(entry) for _ in range(3)}                      # plan.json holds them and is compared
    assert len(reasons) == 1 and "0x" not in reasons.pop()
    with pytest.raises(ValueError, match="cannot identify") as error:
        data.open_picture(entry)
    assert "0x" not in str(error.value)


def test_pixels_come_back_as_they_were():
    source = data.open_data("demo")
    x = source.read(np.arange(50), None)
    assert abs(x.std() - 1) < 0.1
    assert (data.to_pixels(source.spec, torch.from_numpy(x))[..., 0] == source.pixels[:50, 0]).all()


@pytest.mark.parametrize("slots, batch", [(1, 12), (2, 6), (4, 3)])
def test_a_step_has_the_same_pictures_on_any_number_of_slots(slots, batch):
    n, seen = 100, []
    for step in range(25):                                                      # three epochs of 100 pictures
        parts = [data.positions(n, batch, 7, step, slot, slots) for slot in range(slots)]
        assert (np.concatenate(parts) == data.positions(n, 12, 7, step, 0, 1)).all()
        seen += np.concatenate(parts).tolist()
    assert [sorted(seen[e * n : e * n + n]) for e in range(3)] == [list(range(n))] * 3
    assert seen[:n] != seen[n : 2 * n] and seen[:12] != data.positions(n, 12, 8, 0, 0, 1).tolist()


def test_the_stream_is_a_function_of_seed_step_and_slot():
    source = data.open_data("demo")
    take = lambda k, *key, **how: [b for _, b in zip(range(k), data.batches(source, 8, *key, **how))]
    whole = take(6, 0, [0, 1], 2)                                               # steps 0, 1, 2 of two slots
    later = take(2, 0, [0, 1], 2, step=2)
    one = take(3, 0, [1], 2, ahead=1)
    for a, b in [*zip(whole[4:], later), *zip(whole[1::2], one)]:
        assert (a[0] == b[0]).all() and (a[1] == b[1]).all() and a[0].dtype == torch.float32
    x, y = whole[0]
    index = data.positions(10000, 8, 0, 0, 0, 2)
    assert (y.numpy() == source.labels[index]).all() and (x.numpy() == source.read(index, None)).all()


def test_threads_keep_the_order_and_do_not_run_away():
    begun, lock = [], threading.Lock()

    def work(k):
        with lock:
            begun.append(k)
        time.sleep(0.002 * (k % 3))
        return k

    stream = data.in_threads(work, ((k,) for k in range(10**9)), threads=3, ahead=5)
    assert [next(stream) for _ in range(20)] == list(range(20))
    stream.close()
    assert max(begun) < 30


@pytest.mark.parametrize("path, shape, classes, rule", [
    ("nowhere", None, 0, "no such folder"),
    ("random", None, 0, "give --channels, --side"),
    ("demo", (3, 0, 0), 0, "has channels 1"),
    ("demo", (0, 32, 32), 0, "has height 28"),
    ("demo", None, 100, "has classes 10"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(path, shape, classes, rule):
    with pytest.raises(UserError, match=rule):
        data.open_data(path, shape, classes)
