"""The helpers that every stage uses, sets by name, the stream of batches, and back to pictures."""

import argparse
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launch import ENV
from PIL import Image

import data
import sample
from data import Spec, UserError

# --- Errors, arguments, files, devices ------------------------------------------------------------


@pytest.mark.parametrize("kind, good, bad", [
    (data.positive_int, ["1", "12"], ["0", "-1", "1.5", "nan", "inf", "x", str(2**63)]),
    (data.natural, ["0", "3"], ["-1", "0.5", "nan", "", str(2**63)]),
    (data.positive_float, ["1e-9", "2"], ["0", "-1", "nan", "inf", "x", "1e400"]),
    (data.non_negative_float, ["0", "0.5"], ["-0.1", "nan", "-inf", "inf"]),
    (data.finite, ["0", "-0.5"], ["nan", "-inf", "inf", "x"]),
    (data.share, ["0", "1", "0.3"], ["1.1", "-0.1", "nan", "inf"]),
])  # fmt: skip
def test_types_of_arguments_name_the_value_that_they_refuse(kind, good, bad):
    for text in good:
        assert kind(text) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(repr(text))):
            kind(text)


@pytest.mark.parametrize("error", [UserError("--x 3: at most 2"), OSError(28, "No space", "a.npy")])
def test_what_a_user_can_put_right_is_one_line_and_status_2(refused, error):
    def fail(argv):
        raise error

    assert str(error) in refused(fail)
    with pytest.raises(ZeroDivisionError):  # a fault of the code keeps its traceback
        data.command(lambda: 1 / 0)


def test_a_terminal_that_cannot_show_a_name_ends_nothing():
    script = "import data; data.command(lambda: (data.say('\\u732b'), data.note('\\udce9')))"
    env = ENV | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "732b" in done.stdout and "dce9" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_ends_without_a_traceback(presses):
    """A second one does not wait for threads that still read."""
    seconds = 1 if presses == 1 else 60
    body = f"for _ in data.in_threads(time.sleep, [{seconds}] * 99, 2): pass"
    script = f"import data, time\ndef main():\n print('go', flush=True)\n {body}\ndata.command(main)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENV}
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # jobs in the background hear none
    process = subprocess.Popen([sys.executable, "-c", script], preexec_fn=heard, **pipes)
    assert process.stdout.readline() == "go\n"
    for _ in range(presses):
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in error


def test_files_are_complete_or_as_they_were(tmp_path, monkeypatch):
    """Pictures, text, and weights."""
    data.write_text(tmp_path / "a.txt", "zwölf\n")
    data.write_picture(np.zeros((4, 6, 3), np.uint8), tmp_path / "a.png")
    data.write_picture(Image.new("L", (6, 4)), tmp_path / "a.jpg")
    sample.save(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {"step": 1})
    assert Image.open(tmp_path / "a.png").size == (6, 4)
    assert Image.open(tmp_path / "a.jpg").format == "JPEG"

    def full(handle):
        raise OSError(28, "No space left on device")

    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        data.write_text(tmp_path / "a.txt", "thirteen\n")
    with pytest.raises(UserError, match="a.safetensors.*No space"):
        sample.save(tmp_path / "a.safetensors", {"a": torch.zeros(2)}, {"step": 2})
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before and len(before) == 4
    assert (tmp_path / "a.txt").read_bytes() == "zwölf\n".encode()


def test_settings_that_files_depend_on_are_written_once(tmp_path):
    file = tmp_path / "plan.json"
    data.claim(file, {"size": 32, "classes": ("a", "b"), "none": None})
    data.claim(file, {"size": 32, "classes": ["a", "b"]})
    for key, changed in (("size", {"size": 64}), ("more", {"more": 1}), ("classes", {"classes": []})):
        with pytest.raises(UserError, match=f"plan.json.* {key} "):
            data.claim(file, {"size": 32, "classes": ["a", "b"]} | changed)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    file.write_text("{")
    with pytest.raises(UserError, match="plan.json"):
        data.claim(file, {"size": 32})


@pytest.fixture
def cuda(monkeypatch):
    """Two GPUs, with bf16 or without; whether there are, and which were chosen."""
    state = SimpleNamespace(there=True, bf16=True, chosen=[])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: not state.there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: state.there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", state.chosen.append)
    has_bf16 = lambda including_emulation=True: including_emulation or state.bf16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", has_bf16)
    return state


def refuse_devices(*names):
    for name in names:
        with pytest.raises(UserError, match=f"--device {name}"):
            data.open_device(name)


def test_a_process_takes_the_gpu_of_its_local_rank(cuda, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert data.open_device() == data.open_device("cuda") == torch.device("cuda", 1)
    assert data.open_device("cuda:0") == torch.device("cuda", 0) and cuda.chosen == [1, 1, 0]
    assert data.open_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    refuse_devices("cuda", "cuda:x", "cuda:7", "mps")
    monkeypatch.delenv("RANK")  # a variable that a job has left over makes no rank
    assert data.ranks() == (0, 1) and data.open_device("cuda") == torch.device("cuda", 0)
    cuda.there = False
    refuse_devices("cuda", "cuda:0", "tpu")
    assert data.open_device("auto") == torch.device("cpu")  # mps only by name
    assert data.open_device("mps").type == "mps"


def test_bf16_is_used_where_the_gpu_has_it(cuda):
    for has, kind, asked, expected in (
        (True, "cuda", "auto", torch.bfloat16), (False, "cuda", "auto", torch.float32),
        (True, "cpu", "auto", torch.float32), (True, "mps", "auto", torch.float32),
        (True, "cpu", "bf16", torch.bfloat16), (False, "cuda", "bf16", torch.bfloat16),
        (True, "cuda", "fp32", torch.float32),
    ):  # fmt: skip
        cuda.bf16 = has
        assert data.pick_dtype(torch.device(kind), asked) == expected
    with pytest.raises(UserError, match="bf16.*mps"):
        data.pick_dtype(torch.device("mps"), "bf16")


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
    with pytest.raises(ZeroDivisionError):
        list(data.in_threads(lambda k: 1 / k, [2, 1, 0], 2))


# --- Randomness -----------------------------------------------------------------------------------

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_a_generator_is_a_function_of_all_bits_of_its_key(device):
    """2^32 is not 0; the order of asking and the global generator do not matter."""

    def draw(*key):
        rng = data.seeded(*key, device=device)
        return tuple(torch.randn(8, generator=rng, device=device).tolist())

    keys = [(1 << k,) for k in range(63)] + [(0,), (2**32 + 1,), (42, 1737), (42, 43705)]
    keys += [(0, 1), (0, 2**32), (1, 0, 1), (0, 1, 1), (1, 1), (5, 3), (3, 5)]
    found = {key: draw(*key) for key in keys}
    assert len(set(found.values())) == len(keys)
    for key in reversed(keys):
        torch.manual_seed(sum(key) % 1000)
        state = torch.get_rng_state()
        assert draw(*key) == found[key]
        assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


def test_draws_are_normal_and_independent():
    """Along a generator, and over the first draws of generators of neighbouring keys."""
    long = torch.randn(10**6, generator=data.seeded(0), dtype=torch.float64)
    first = torch.stack([torch.randn(2, generator=data.seeded(7, i)) for i in range(4000)]).double()
    for x in (long, *first.T):
        near = lambda value, want, spread: abs(float(value) - want) < 5 * spread / len(x) ** 0.5
        assert near(x.mean(), 0, 1) and near((x**2).mean(), 1, 2**0.5)
        assert near((x**4).mean(), 3, 96**0.5) and near((x[1:] * x[:-1]).mean(), 0, 1)


# --- Sets by name ---------------------------------------------------------------------------------


def test_demo_is_the_first_of_fashion_mnist():
    source = data.open_data("demo")
    assert len(source) == 10000 and source.spec.shape == (1, 28, 28)
    assert source.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    counts = [942, 1027, 1016, 1019, 974, 989, 1021, 1022, 990, 1000]
    assert np.bincount(source.labels).tolist() == counts
    x = source.read(np.zeros(20, int), np.random.default_rng(0)).x
    assert x.dtype == torch.uint8 and (x == x[:1]).all()  # never mirrored


def test_held_out_emoji_are_not_trained_on_but_their_words_are():
    seen, held = data.open_data("emoji"), data.open_emoji(held_out=True)
    names, unseen = set(seen.captions.texts), set(held.captions.texts)
    assert len(seen) + len(held) == 1600 and len(held) == 39 and not names & unseen
    assert {"red apple", "blue heart", "sun", "cat face"} <= names and "orange heart" in unseen
    words = lambda texts: set(re.findall(r"\w+", " ".join(texts)))
    assert words(unseen) <= words(names) and seen.spec.prompts


@pytest.fixture
def torchvision_sets(tmp_path, monkeypatch):
    """The layouts of torchvision in datasets/, of any checksum, and no network."""
    datasets = pytest.importorskip("torchvision.datasets")
    numbers, root = np.random.default_rng(0), tmp_path / "datasets"
    for name in ("MNIST", "FashionMNIST"):
        raw = root / name / "raw"
        raw.mkdir(parents=True)
        for part, n in (("train", 30), ("t10k", 10)):
            images = numbers.integers(256, size=(n, 28, 28), dtype=np.uint8)
            labels = np.arange(n, dtype=np.uint8) % 10
            for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
                head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
                (raw / f"{part}-{kind}-ubyte").write_bytes(head + array.tobytes())
    for kind, key, n in ((datasets.CIFAR10, "labels", 10), (datasets.CIFAR100, "fine_labels", 100)):
        folder = root / kind.base_folder
        folder.mkdir()
        pixels = numbers.integers(256, size=(20, 3072), dtype=np.uint8)
        record = {"data": pixels, key: [k % n for k in range(20)]}
        files = {name: record for name, _ in kind.train_list + kind.test_list}
        files[kind.meta["filename"]] = {kind.meta["key"]: [f"class {k}" for k in range(n)]}
        for name, content in files.items():
            (folder / name).write_bytes(pickle.dumps(content))

    def refuse(*args, **kwargs):
        raise RuntimeError("no network")

    for module in ("torchvision.datasets.cifar", "torchvision.datasets.mnist"):
        monkeypatch.setattr(f"{module}.download_and_extract_archive", refuse)
        monkeypatch.setattr(f"{module}.check_integrity", lambda path, md5=None: os.path.isfile(path))
    monkeypatch.chdir(tmp_path)
    return root


def test_torchvision_sets_are_read_from_their_files(torchvision_sets):
    for name, shape, n in (("mnist", (1, 28, 28), 30), ("fashion", (1, 28, 28), 30),
                           ("cifar10", (3, 32, 32), 100), ("cifar100", (3, 32, 32), 20)):  # fmt: skip
        source = data.open_data(name)
        assert source.spec.shape == shape and len(source) == n
        assert source.labels[:3].tolist() == [0, 1, 2]
        x, still = (
            found.read(np.zeros(64, int), np.random.default_rng(0)).x
            for found in (source, data.open_data(name, mirror=False))
        )
        assert bool((x != x[:1]).any()) == (shape[0] == 3) and (still == still[:1]).all()
    stored = pickle.loads((torchvision_sets / "cifar-100-python/train").read_bytes())["data"][0]
    assert (still[0].flatten().numpy() == stored).all() and source.spec.classes[3] == "class 3"
    assert data.open_data("fashion").spec.classes[9] == "ankle boot"
    assert data.open_data("mnist").spec.classes == tuple("0123456789")


def test_without_network_the_files_to_fetch_are_named(torchvision_sets, monkeypatch):
    (torchvision_sets / "MNIST/raw/train-images-idx3-ubyte").unlink()
    (torchvision_sets / "cifar-10-batches-py/data_batch_5").unlink()
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz.*datasets/MNIST/raw"):
        data.open_data("mnist")
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz.*datasets"):
        data.open_data("cifar10")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises((UserError, ImportError), match="torchvision"):
        data.open_data("fashion")


def test_specs_survive_json_and_keys_of_other_versions():
    spec = Spec("latents", (4, 32, 32), 0.1, 5.5, ("a", "b"), "sd-vae", 8, ((32, 32), (16, 64)),
                {"encoder": "word_hashes"}, ("x",))  # fmt: skip
    record = json.loads(json.dumps(spec.to_json()))
    assert record == spec.to_json() and Spec.from_json(record) == spec
    other = dict(kind="pixels", shape=[1, 28, 28], mean=73.0, std=90.3, classes=["a"], more=1)
    assert Spec.from_json(other) == Spec("pixels", (1, 28, 28), 73.0, 90.3, ("a",))


def test_data_that_do_not_fit_are_refused():
    spec = data.open_data("demo").spec
    data.check_fits(spec)
    data.check_fits(spec, 1, 28, 10, "")
    for asked in ({"channels": 3}, {"side": 32}, {"classes": 100}, {"autoencoder": "sd-vae"}):
        with pytest.raises(UserError, match=str(*asked.values())):
            data.check_fits(spec, **asked)
    for path in ("nowhere", "", "demo.tar"):
        with pytest.raises(UserError, match="--data"):
            data.open_data(path)


# --- The stream -----------------------------------------------------------------------------------


def numbered(n=100):
    """Pictures that are their own numbers, mirrored at random, with three captions each."""
    pixels = np.zeros((n, 3, 2, 2), np.uint8)
    pixels[:, 0], pixels[:, 1, :, 0] = np.arange(n)[:, None, None], 200
    captions = [[f"{i} {k}" for k in "abc"] for i in range(n)]
    return data.in_memory(pixels, range(n), captions=captions, mirror=True)


def take(n, *args, **more):
    """The first n batches of a stream."""
    return [batch for _, batch in zip(range(n), data.batches(*args, **more))]


def numbers(batches):
    return [int(v) for batch in batches for v in batch.x[:, 0, 0, 0]]


def same(a, b):
    return torch.equal(a.x, b.x) and list(a.y) == list(b.y)


@pytest.mark.parametrize("kind", ["plain", "native"])
@pytest.mark.parametrize("ranks, accumulate", [(1, 4), (2, 2), (4, 1)])
def test_any_split_of_a_step_into_ranks_and_micro_batches_reads_the_same(
    native, kind, ranks, accumulate
):
    """Pictures, mirror images and captions of six steps, in any grouping and from any step."""
    source = native if kind == "native" else numbered()
    read = lambda n, slots, start, seed=7: take(n, source, 3, seed, slots, 4, start, 2)
    for start in (0, 10**6):
        whole = read(24, [0, 1, 2, 3], start)
        for rank in range(ranks):
            slots = [rank * accumulate + k for k in range(accumulate)]
            want = [whole[step * 4 + slot] for step in range(6) for slot in slots]
            assert all(map(same, read(6 * accumulate, slots, start), want))
            assert all(map(same, read(accumulate, slots, start + 5), want[5 * accumulate :]))
        assert numbers(whole) != numbers(read(24, [0, 1, 2, 3], start, seed=8))


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_an_epoch_has_each_picture_once_in_a_new_order(slots):
    """The pictures of a step do not depend on the number of its micro-batches."""
    batches = take(25 * slots, numbered(), 12 // slots, 7, list(range(slots)), slots)
    seen = numbers(batches)
    assert [int(text.split()[0]) for batch in batches for text in batch.y] == seen  # each its own
    epochs = [seen[e : e + 100] for e in (0, 100, 200)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert seen == numbers(take(25, numbered(), 12, 7, [0], 1))


def test_mirror_image_and_caption_are_drawn_by_seed_step_and_slot():
    """Of a set of one picture, where nothing else differs."""
    draws = {}
    for seed in (0, 1):
        batches = take(160, numbered(1), 1, seed, [0, 1], 2)
        views = [(int(batch.x[0, 1, 0, 0]), *batch.y) for batch in batches]
        draws |= {(seed, slot): views[slot::2] for slot in (0, 1)}
    for views in draws.values():  # all six that there are, each about as often
        assert len(views) == 80 and sorted(Counter(views).values())[0] > 3 and len(set(views)) == 6
    assert len(set(map(tuple, draws.values()))) == 4


def test_rows_that_are_left_out_are_never_read():
    source = numbered()
    kept = data.DataSet(source.spec, source.arrays, np.where(source.labels % 3, source.labels, -1),
                        source.captions, True, "")  # fmt: skip
    seen = numbers(take(11, kept, 6, 0, [0], 1))
    assert len(kept) == 66 and sorted(seen) == [i for i in range(100) if i % 3]


@pytest.fixture(scope="module")
def native():
    """2,000 pictures, their own numbers, in buckets of three areas and eleven ratios."""
    sizes = [size for side in (8, 16, 32) for size in data.bucket_sizes(side, 2)[::3]]
    counts = np.random.default_rng(0).multinomial(2000, np.full(len(sizes), 1 / len(sizes)))
    counts[:3] = [3, 1, 2]  # some are all but empty
    ends = np.cumsum([0, *counts])
    arrays = [np.broadcast_to(np.arange(a, b, dtype=np.float32)[:, None, None, None], (b - a, 1, *size))
              for a, b, size in zip(ends, ends[1:], sizes)]  # fmt: skip
    labels = np.zeros(ends[-1], int)
    labels[ends[2] : ends[3]] = -1  # and one bucket is left out
    spec = Spec("latents", (1, 32, 32), classes=("a",), buckets=tuple(sizes))
    return data.DataSet(spec, arrays, labels, None, False, "")


@pytest.mark.parametrize("batch, patch", [(1, 2), (3, 1), (8, 2)])
def test_a_native_epoch_is_each_picture_but_remainders_in_micro_batches_of_equal_work(
    native, batch, patch
):
    """Tokens within the budget, and above half of it unless the bucket has no more pictures."""
    budget, sizes = batch * (32 // patch) ** 2, data.native_sizes(native, batch, patch)
    per_epoch = sum(len(b) // size for b, size in zip(native.buckets, sizes) if size)
    stream = take(3 * per_epoch, native, batch, 5, [0], 1, patch=patch)
    epochs = [stream[e * per_epoch : (e + 1) * per_epoch] for e in range(3)]
    for epoch in epochs:
        seen = Counter(numbers(epoch))
        assert max(seen.values()) == 1 and seen.keys() <= set(native.rows)
        for bucket, size in zip(native.buckets, sizes):
            some = sum(int(row) in seen for row in native.rows[bucket.start : bucket.stop])
            assert some == (len(bucket) // size * size if size else 0)
    mates = [sorted(numbers([part]) for part in epoch) for epoch in epochs]
    assert mates[0] != mates[1] != mates[2]  # not the order of batches alone is another one
    shapes = [tuple(part.x.shape[2:]) for part in epochs[0]]
    assert sum(a != b for a, b in zip(shapes, shapes[1:])) > per_epoch / 2  # buckets are mixed
    for part, (h, w) in zip(epochs[0], shapes):
        tokens = len(part.x) * (h // patch) * (w // patch)
        bucket = native.buckets[native.spec.buckets.index((h, w))]
        assert tokens <= budget and (tokens > budget / 2 or len(part.x) == len(bucket))


# --- Network space, and back ----------------------------------------------------------------------


def test_network_space_has_mean_0_and_deviation_1_and_pixels_come_back():
    source = data.open_data("demo")
    rows = source.read(np.arange(2000), np.random.default_rng(0)).x
    x = data.network_space(rows, source.spec, data.seeded(0))
    assert x.dtype == torch.float32 and abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02
    assert (data.Decoder(source.spec)(x)[..., 0] == rows[:, 0].numpy()).all()
    far = data.Decoder(source.spec)(torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1))
    assert far.flatten().tolist() == [0, 255]
    noise = data.random_data((4, 8, 8), 7)
    assert data.Decoder(noise.spec)(torch.randn(2, 4, 8, 8)).shape == (2, 8, 8, 3)


def test_latents_are_drawn_from_their_posterior():
    """Mean and deviation are stored side by side; the draw is a function of the generator."""
    stored = torch.tensor([3.0, -1.0, 0.5, 2.0]).view(1, 4, 1, 1).half().expand(40000, 4, 1, 1)
    spec = Spec("latents", (2, 1, 1), mean=0.5, std=2.0)
    x = data.network_space(stored, spec, data.seeded(0))
    assert x.shape == (40000, 2, 1, 1)
    assert x.mean((0, 2, 3)).tolist() == pytest.approx([1.25, -0.75], abs=0.02)
    assert x.std((0, 2, 3)).tolist() == pytest.approx([0.25, 1.0], rel=0.02)
    assert torch.equal(x, data.network_space(stored, spec, data.seeded(0)))
    assert not torch.equal(x, data.network_space(stored, spec, data.seeded(1)))
    means = data.network_space(stored[:, :2], spec, data.seeded(0))  # of those without a deviation
    assert means[0].flatten().tolist() == [1.25, -0.75]


def test_grids_have_gaps_and_names():
    rows = np.zeros((2, 3, 8, 10, 3), np.uint8)
    rows[1, 2] = (10, 20, 30)
    grid = data.grid(rows)
    assert grid.size == (3 * 12 - 2, 2 * 10 - 2) and data.grid(rows, gap=0).size == (30, 16)
    assert grid.getpixel((24, 10)) == (10, 20, 30) and grid.getpixel((23, 9)) == (255,) * 3
    pixels = np.arange(0, 240, 40, dtype=np.uint8).reshape(2, 3)
    grey = data.grid(pixels[None, None, :, :, None], scale=4)
    assert grey.mode == "L" and (np.asarray(grey) == pixels.repeat(4, 0).repeat(4, 1)).all()
    plain = data.grid(rows, 8)
    named = data.grid(rows, 8, ["a cat"] * 3, ["1 step", "2 steps"])
    left, below = named.width - plain.width, named.height - plain.height
    assert left > 40 and below > 10
    kept = named.crop((left, 0, named.width, plain.height))
    assert (np.asarray(kept) == np.asarray(plain)).all()
    for box in ((0, 0, left, plain.height), (left, plain.height, named.width, named.height)):
        assert np.asarray(named.crop(box)).min() < 50  # something is written there
    each = data.grid(rows, 8, [f"\udce9 {'long ' * 90} {k}" for k in range(6)])
    assert each.width == plain.width and each.height > named.height  # a strip below every row
