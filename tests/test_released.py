"""Files of weights: released ones, of the second edition, of half precision; what must be refused."""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import lively
from safetensors.torch import save_file

import data
import sample
import train
from model import SIZES, TiM

ROOT = Path(train.__file__).parent
NETWORK = dict(channels=4, patch=2, depth=2, width=48, heads=2, adaln=16)


def without_projector(weights):
    return {k: v for k, v in weights.items() if not k.startswith("projector.")}


def write(weights, file):
    """Weights, a .pth in torch's older format; or bytes as they are."""
    if isinstance(weights, bytes):
        file.write_bytes(weights)
    elif file.suffix == ".safetensors":
        save_file(weights, file)
    else:
        torch.save(weights, file, _use_new_zipfile_serialization=file.suffix != ".pth")
    return file


@pytest.fixture
def released(tmp_path, golden_weights):
    """A file with the names and the configuration of a released one, but small."""
    return write(golden_weights, tmp_path / "released.safetensors")


def assert_sampled_with(config, guidance, interval):
    options = sample.sampling_options(config)
    expected = {"guidance": guidance, "interval": interval, "strict": True}
    assert {k: options[k] for k in expected} == expected
    return options


# --- Recognised by their tensors, or by what is written beside them -------------------------------


@pytest.mark.parametrize("projector", [True, False])
@pytest.mark.parametrize("ending", ["safetensors", "bin", "pt", "pth"])
def test_a_released_file_is_recognised_and_samples_as_the_authors(
    tmp_path, golden, golden_weights, projector, ending
):
    """End to end from the file: the golden samples, with guidance in the strict interval too."""
    weights = golden_weights if projector else without_projector(golden_weights)
    model, transport, config = sample.load(write(weights, tmp_path / f"released.{ending}"))
    known = NETWORK | dict(classes=10, shared_time=False, interval_attention=True)
    assert config["model"] == known and transport.name == "otfm" and model.predict == "f"
    options = assert_sampled_with(config, 2.5, (0.0, 0.6))
    z, y = golden["sample.z"], golden["sample.y"]
    for steps in (1, 2, 8):
        for name, how in (("cfg1", {}), ("cfg2.5.interval0-0.6", options)):
            found = sample.generate(model, transport, z, y, steps, **how)
            expected = golden[f"sample.otfm.steps{steps}.{name}"]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "channels, patch, kind, autoencoder, scale, side, factor, guided",
    [
        (4, 2, dict(classes=1000), "sd-vae", 0.18215, 32, 8, (2.5, (0.0, 0.6))),
        (32, 1, dict(classes=1000), "dc-ae", 0.41407, 16, 32, (3.0, (0.0, 0.7))),
        (32, 1, dict(caption=1152), "dc-ae", 0.41407, 16, 32, (2.5, (0.0, 1.0))),
    ],
)
def test_the_three_released_shapes_and_their_guidance_are_known(
    channels, patch, kind, autoencoder, scale, side, factor, guided
):
    with torch.device("meta"):
        state = TiM(channels, patch, **SIZES["XL"], **kind).state_dict()
    config = sample.recognise(state, "file")
    assert config["model"].items() >= (SIZES["XL"] | kind).items()
    assert_sampled_with(config, *guided)
    spec = data.Spec.from_json(config["data"])
    assert spec.shape == (channels, side, side)
    assert (spec.autoencoder, spec.factor, spec.mean) == (autoencoder, factor, 0)
    assert 1 / spec.std == pytest.approx(scale)
    if "caption" in kind:
        assert config["model"]["rope_layout"] == "released" and spec.text["width"] == 1152
        assert config["model"]["caption_mask"] is False and spec.text["encoder"] == data.GEMMA
    else:
        assert len(spec.classes) == 1000


SECOND = {  # what a file of the second edition says of its data, and the same today
    "pixels": (dict(mean=90.0, std=60.0, scale=1.0, shift=0.0), dict(mean=90.0, std=60.0)),
    "latents": (dict(mean=0.0, std=1.0, scale=0.25, shift=0.5), dict(mean=0.5, std=4.0)),
}


@pytest.mark.parametrize("kind", SECOND)
def test_a_checkpoint_of_the_second_edition_is_sampled_as_it_says(tmp_path, kind):
    sizes = dict(channels=3, patch=2, depth=2, width=32, heads=2, adaln=16, classes=5)
    (about, today), shape = SECOND[kind], (3, 8, 8)
    trained = dict(transport="edm", drop=0.1, guidance=2.0, guidance_low=0.1, guidance_high=0.7,
                   guidance_strict=True, text_encoder="bytes", tensorboard=False)  # fmt: skip
    about = about | {"kind": kind, "shape": shape, "factor": 8}
    record = {"model": sizes | {"predict": "x"}, "data": about, "train": trained, "step": 9}
    state = lively().state_dict()
    sample.save(tmp_path / "ema.safetensors", state, record)
    model, transport, config = sample.load(tmp_path)
    assert transport.name == "edm" and model.predict == "x" and config["step"] == 9
    assert data.Spec.from_json(config["data"]) == data.Spec(kind, shape, factor=8, **today)
    assert_sampled_with(config, 2.0, (0.1, 0.7))
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())


def test_released_weights_are_announced_as_such(released, monkeypatch, tmp_path, capsys):
    """They have no step; decoded by a stand-in, as their autoencoder is a download."""
    decode = lambda x: np.zeros((len(x), 8, 8, 3), np.uint8)
    monkeypatch.setattr(data, "Decoder", lambda *arguments: decode)
    argv = ["--checkpoint", released, "--steps", 1, "--classes", 0, "--device", "cpu"]
    sample.main([*map(str, argv), "--out", str(tmp_path / "grid.png")])
    assert "released weights, guidance 2.5" in capsys.readouterr().out
    assert (tmp_path / "grid.png").is_file()


# --- Loaded in fp32, whatever the file holds ------------------------------------------------------


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_the_size_become_fp32(tmp_path, golden_weights, ending, dtype):
    half = {name: tensor.to(dtype) for name, tensor in golden_weights.items()}
    model, _, _ = sample.load(write(half, tmp_path / f"half.{ending}"))
    for name, p in model.state_dict().items():
        assert p.dtype == torch.float32 and torch.equal(p, half[name].float()), name


LOADING = """
import sys, threading, time, sample

def memory():  # bytes; not pages of a mapped file, which the system may take back
    lines = open("/proc/self/status").read().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    while True:
        seen.append(memory())
        time.sleep(0.001)

def load(path):
    model, transport, config = sample.load(path)
    return sum(float(p.sum()) for p in model.parameters())  # touches every page

load(sys.argv[1])  # what torch and safetensors take themselves
seen = []
threading.Thread(target=watch, daemon=True).start()
for path in sys.argv[2:]:
    before = memory()
    seen.clear()
    load(path)
    print(max(seen) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells the memory")
def test_loading_a_bf16_file_takes_no_more_than_its_fp32_size_and_a_tenth(tmp_path, released):
    """A second copy of all, in the file's type, would make it 1.5 times the size."""
    with torch.device("meta"):
        shapes = TiM(4, 2, depth=5, width=640, heads=10, adaln=256, classes=1000).state_dict()
    half = {k: torch.ones(v.shape, dtype=torch.bfloat16) for k, v in shapes.items()}
    files = [write(half, tmp_path / f"half.{ending}") for ending in ("safetensors", "pt")]
    size = sum(4 * v.numel() for v in shapes.values())
    command = [sys.executable, "-c", LOADING, *map(str, (released, *files))]
    taken = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(0.8 < int(line) / size < 1.1 for line in taken.split()), taken


# --- By hub name ----------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Puts a function where huggingface_hub has its download; None: no such package."""
    monkeypatch.chdir(tmp_path)

    def put(download):
        package = download and SimpleNamespace(hf_hub_download=download)
        monkeypatch.setitem(sys.modules, "huggingface_hub", package)

    return put


def test_a_checkpoint_is_fetched_by_owner_repository_and_file(released, hub):
    asked = []
    hub(lambda repo, file: asked.append((repo, file)) or str(released))
    name = "GoodEnough/TiM-C2I/weights/c2i_model_256.safetensors"
    fresh = TiM(**NETWORK, classes=10)
    train.start_from(fresh, replace(train.Config(), init=name, transport="otfm"))
    expected = sample.load(released)[0].state_dict()
    for found in (sample.load(name)[0].state_dict(), fresh.state_dict()):
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert asked == 2 * [("GoodEnough/TiM-C2I", "weights/c2i_model_256.safetensors")]
    Path("GoodEnough/TiM-C2I").mkdir(parents=True)  # what lies here goes before the hub
    Path("GoodEnough/TiM-C2I/mine.safetensors").write_bytes(released.read_bytes())
    sample.load("GoodEnough/TiM-C2I/mine.safetensors")
    assert len(asked) == 2


def offline(repo, file):
    raise OSError("no route to the hub\nand more lines of that")


@pytest.mark.parametrize(
    "download, path, why",
    [
        (None, "GoodEnough/TiM-C2I/c2i.safetensors", "pip install huggingface_hub"),
        (offline, "GoodEnough/TiM-C2I/c2i.safetensors", "no route to the hub"),
        (None, "runs/gone/ema.pth/x", "there is no"),  # no name of a file of weights
    ],
)
def test_what_cannot_be_fetched_is_refused(refused, hub, download, path, why):
    hub(download)
    message = refused(sample.main, "--device", "cpu", "--checkpoint", path)
    assert path in message and why in message


# --- Trained on -----------------------------------------------------------------------------------


@pytest.fixture
def cfg(released):
    return replace(train.Config(), init=str(released), transport="otfm")


@pytest.mark.parametrize(
    "changes", [{}, dict(projector=(1, 40, 24)), dict(classes=7), dict(guide_range=(1, 2.5))]
)
def test_training_starts_from_released_weights(cfg, golden_weights, changes):
    """All of the file arrives. With other classes the class rows are fresh, but for that of none;
    what the file lacks, a projector and the encoder of guidance, is fresh, too."""
    table, weights = "y_embedder.embedding_table.weight", without_projector(golden_weights)
    model = TiM(**NETWORK | dict(classes=10) | changes)
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    train.start_from(model, cfg)
    state = model.state_dict()
    for k in state.keys() - {table}:
        assert torch.equal(state[k], weights.get(k, fresh[k])), k
    assert torch.equal(state[table][-1], weights[table][-1]) and state.keys() >= weights.keys()
    rows = fresh if "classes" in changes else weights
    assert torch.equal(state[table][:-1], rows[table][:-1])


def test_training_from_weights_of_another_kind_is_refused(cfg):
    for changes, other in (({}, dict(transport="tim")), ({}, dict(predict="x")), (dict(depth=1), {})):
        with pytest.raises(data.UserError):
            train.start_from(TiM(**NETWORK | changes, classes=10), replace(cfg, **other))
    train.start_from(TiM(**NETWORK, classes=10), replace(cfg, transport="tim", init_anyway=True))


# --- What is no checkpoint ------------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a pickle ran')",))


def test_what_is_no_checkpoint_is_refused(tmp_path, golden_weights, refused):
    """In one line that names the file and, where tensors do not fit, one of them."""
    weights, name = golden_weights, "blocks.1.mlp.fc2.bias"
    whole = {e: write(weights, tmp_path / f"whole.{e}").read_bytes() for e in ("safetensors", "pt")}
    bad = {  # file: what is in it, and what is said of it
        "evil.bin": (pickle.dumps(dict(a=Code())), ""),
        "evil.pt": (dict(a=Code()), ""),
        "half.safetensors": (whole["safetensors"][:300_000], ""),
        "half.pt": (whole["pt"][:300_000], ""),
        "text.safetensors": (b"text", ""),
        "empty.safetensors": (b"", ""),
        "nested.pth": (dict(ema=weights, step=3), "'ema', 'step'"),
        "numbered.pt": ({0: torch.zeros(1)}, ""),
        "foreign.safetensors": (dict(a=torch.zeros(1)), "x_embedder"),
        "missing.safetensors": ({k: v for k, v in weights.items() if k != name}, name),
        "unknown.safetensors": (weights | dict(extra=torch.zeros(1)), "extra"),
        "misshapen.safetensors": (weights | {name: torch.zeros(3)}, name),
    }
    said = {}
    for file, (content, about) in bad.items():
        write(content, tmp_path / file)
        said[file] = about
    record = {"model": NETWORK, "train": {"transport": "of tomorrow"}}
    sample.save(tmp_path / "younger.safetensors", weights, record)
    save_file(weights, tmp_path / "list.safetensors", metadata={"tim": "[1, 2]"})
    (tmp_path / "run").mkdir()
    said |= {"younger.safetensors": "of tomorrow", "list.safetensors": "", "run": "ema.safetensors"}
    before = sorted(tmp_path.iterdir())
    for file in (*said, "nowhere.safetensors"):
        argv = ["--checkpoint", tmp_path / file, "--device", "cpu", "--out", tmp_path / "a.png"]
        message = refused(sample.main, *argv)
        assert file in message and said.get(file, "") in message, message
    assert sorted(tmp_path.iterdir()) == before


def test_latents_need_an_autoencoder_that_fits(released, tmp_path, monkeypatch, refused):
    (tmp_path / "vae").mkdir()
    argv = ["--checkpoint", released, "--device", "cpu"]
    assert "--autoencoder" in refused(sample.main, *argv, "--autoencoder", tmp_path / "vae")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install diffusers" in refused(sample.main, *argv)
