"""Files of weights: released ones, of the second edition, of half precision; what must be refused."""

import pickle
import select
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import lively
from safetensors.torch import save_file

import data
import sample
import train
from model import SIZES, TiM, lower_precision

ROOT = Path(train.__file__).parent
NETWORK = dict(channels=4, patch=2, depth=2, width=48, heads=2, adaln=16)


def without_projector(weights):
    return {k: v for k, v in weights.items() if not k.startswith("projector.")}


def write(weights, file):
    (save_file if file.suffix == ".safetensors" else torch.save)(weights, file)
    return file


@pytest.fixture
def released(tmp_path, golden_weights):
    """A file with the names and the configuration of a released one, but small."""
    return write(golden_weights, tmp_path / "released.safetensors")


# --- Recognised by their tensors ------------------------------------------------------------------


@pytest.mark.parametrize("projector", [True, False])
@pytest.mark.parametrize("ending", ["safetensors", "bin", "pt"])
def test_a_released_file_is_recognised_and_samples_as_the_authors(
    tmp_path, golden, golden_weights, projector, ending
):
    """End to end from the file: the golden samples, with guidance in the strict interval too."""
    weights = golden_weights if projector else without_projector(golden_weights)
    model, transport, config = sample.load(write(weights, tmp_path / f"released.{ending}"))
    known = NETWORK | dict(classes=10, shared_time=False, interval_attention=True)
    assert config["model"] == known and transport.name == "otfm" and model.predict == "f"
    options = sample.sampling_options(config)
    guided = {k: options[k] for k in ("guidance", "interval", "strict")}
    assert guided == {"guidance": 2.5, "interval": (0.0, 0.6), "strict": True}
    z, y = golden["sample.z"], golden["sample.y"]
    for steps in (1, 2, 8):
        for name, how in (("cfg1", {}), ("cfg2.5.interval0-0.6", options)):
            found = sample.generate(model, transport, z, y, steps, **how)
            expected = golden[f"sample.otfm.steps{steps}.{name}"]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "channels, patch, kind, autoencoder, scale, side, factor, guided",
    [
        (4, 2, dict(classes=1000), "sd-vae", 0.18215, 32, 8, (2.5, (0.0, 0.6), True)),
        (32, 1, dict(classes=1000), "dc-ae", 0.41407, 16, 32, (3.0, (0.0, 0.7), True)),
        (32, 1, dict(caption=1152), "dc-ae", 0.41407, 16, 32, (2.5, (0.0, 1.0), True)),
    ],
)
def test_the_three_released_shapes_and_their_guidance_are_known(
    channels, patch, kind, autoencoder, scale, side, factor, guided
):
    with torch.device("meta"):
        state = TiM(channels, patch, **SIZES["XL"], **kind, projector=(8, 2048, 768)).state_dict()
    config = sample.recognise(without_projector(state), "file")
    given = {k: v for k, v in config["model"].items() if k in SIZES["XL"] or k in kind}
    assert given == SIZES["XL"] | kind
    spec = data.Spec.from_json(config["data"])
    assert spec.shape == (channels, side, side)
    assert (spec.autoencoder, spec.factor, spec.mean) == (autoencoder, factor, 0)
    assert 1 / spec.std == pytest.approx(scale)
    options = sample.sampling_options(config)
    assert (options["guidance"], options["interval"], options["strict"]) == guided
    if "caption" in kind:
        assert config["model"]["rope_layout"] == "released" and spec.text["width"] == 1152
        assert config["model"]["caption_mask"] is False and spec.text["encoder"] == data.GEMMA
    else:
        assert len(spec.classes) == 1000


def test_bf16_with_fp32_times_stays_near_fp32_over_250_steps(released, golden):
    model, transport, _ = sample.load(released)
    z, y = golden["sample.z"], golden["sample.y"]
    full = sample.generate(model, transport, z, y, 250)
    low = sample.generate(lower_precision(model), transport, z, y, 250)
    assert (low - full).norm() / full.norm() < 1e-2


def test_released_weights_are_announced_as_such(released, monkeypatch, tmp_path, capsys):
    """They have no step; decoded by a stand-in, as their autoencoder is a download."""
    decode = lambda x: np.zeros((len(x), 8, 8, 3), np.uint8)
    monkeypatch.setattr(data, "Decoder", lambda *arguments: decode)
    argv = ["--checkpoint", released, "--steps", 1, "--classes", 0, "--device", "cpu"]
    sample.main([*map(str, argv), "--out", str(tmp_path / "grid.png")])
    assert "released weights, guidance 2.5" in capsys.readouterr().out
    assert (tmp_path / "grid.png").is_file()


# --- Of the second edition ------------------------------------------------------------------------


SECOND = {  # what such a file says of its data, and the same today
    "pixels": (
        dict(kind="pixels", shape=[3, 8, 8], mean=90.0, std=60.0, scale=1.0, shift=0.0),
        data.Spec("pixels", (3, 8, 8), 90.0, 60.0),
    ),
    "latents": (
        dict(kind="latents", shape=[3, 8, 8], mean=0.0, std=1.0, scale=0.25, shift=0.5, factor=8),
        data.Spec("latents", (3, 8, 8), 0.5, 4.0, factor=8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SECOND)
def test_a_checkpoint_of_the_second_edition_is_sampled_as_it_says(tmp_path, kind):
    sizes = dict(channels=3, patch=2, depth=2, width=32, heads=2, adaln=16, classes=5)
    network, (about, expected) = lively(), SECOND[kind]
    trained = dict(transport="edm", drop=0.1, guidance=2.0, guidance_low=0.1, guidance_high=0.7,
                   guidance_strict=True, text_encoder="bytes", tensorboard=False)  # fmt: skip
    record = {"model": sizes | {"predict": "x"}, "data": about, "train": trained, "step": 9}
    sample.save(tmp_path / "ema.safetensors", network.state_dict(), record)
    model, transport, config = sample.load(tmp_path)
    assert transport.name == "edm" and model.predict == "x" and config["step"] == 9
    assert data.Spec.from_json(config["data"]) == expected
    options = sample.sampling_options(config)
    assert (options["guidance"], options["interval"], options["strict"]) == (2.0, (0.1, 0.7), True)
    for name, p in model.state_dict().items():
        assert torch.equal(p, network.state_dict()[name]), name


# --- Loaded in fp32, whatever the file holds ------------------------------------------------------


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_the_size_become_fp32(tmp_path, golden_weights, ending, dtype):
    half = {name: tensor.to(dtype) for name, tensor in golden_weights.items()}
    model, _, _ = sample.load(write(half, tmp_path / f"half.{ending}"))
    for name, p in model.state_dict().items():
        assert p.dtype == torch.float32 and torch.equal(p, half[name].float()), name


LOADING = """
import sys, sample

def load(path):
    model, transport, config = sample.load(path)
    return sum(float(p.sum()) for p in model.parameters())  # touches every page

load(sys.argv[1])  # what torch and safetensors take themselves
for path in sys.argv[2:]:
    print("ready", flush=True)
    input()
    load(path)
print("ready")
"""


def memory(process) -> int:
    """Bytes that a process holds now; not pages of a mapped file, which the system may take back."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells the memory")
def test_loading_a_bf16_file_takes_no_more_than_its_fp32_size_and_a_tenth(tmp_path, released):
    """A second copy of all, in the file's type, would make it 1.5 times the size."""
    with torch.device("meta"):
        shapes = TiM(4, 2, depth=5, width=640, heads=10, adaln=256, classes=1000).state_dict()
    half = {k: torch.ones(v.shape, dtype=torch.bfloat16) for k, v in shapes.items()}
    files = [write(half, tmp_path / f"half.{ending}") for ending in ("safetensors", "pt")]
    size = sum(4 * v.numel() for v in shapes.values())
    command = [sys.executable, "-c", LOADING, *map(str, (released, *files))]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    with subprocess.Popen(command, bufsize=0, **pipes) as process:
        assert process.stdout.readline() == b"ready\n"
        for file in files:
            before, seen = memory(process), []
            process.stdin.write(b"\n")
            while not select.select([process.stdout], [], [], 0.001)[0]:
                seen.append(memory(process))
            process.stdout.readline()
            assert 0.8 < (max(seen) - before) / size < 1.1, file.name


# --- By hub name ----------------------------------------------------------------------------------


def hub(monkeypatch, download):
    """Put `download` where huggingface_hub has its download function; None: no such package."""
    package = types.ModuleType("huggingface_hub") if download else None
    if package:
        package.hf_hub_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)


def test_a_checkpoint_is_fetched_by_owner_repository_and_file(released, monkeypatch, tmp_path):
    asked = []
    hub(monkeypatch, lambda repo, file: asked.append((repo, file)) or str(released))
    monkeypatch.chdir(tmp_path)
    name = "GoodEnough/TiM-C2I/weights/c2i_model_256.safetensors"
    found, expected = (sample.load(path)[0].state_dict() for path in (name, released))
    assert set(asked) == {("GoodEnough/TiM-C2I", "weights/c2i_model_256.safetensors")}
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    fresh = TiM(**NETWORK, classes=10)
    train.start_from(fresh, replace(train.Config(), init=name, transport="otfm"))
    assert torch.equal(fresh.x_embedder.proj.weight, expected["x_embedder.proj.weight"])

    asked.clear()
    folder = tmp_path / "GoodEnough" / "TiM-C2I"  # what lies here goes before the hub
    folder.mkdir(parents=True)
    (folder / "mine.safetensors").write_bytes(released.read_bytes())
    sample.load("GoodEnough/TiM-C2I/mine.safetensors")
    assert not asked


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
def test_what_cannot_be_fetched_is_refused(refused, monkeypatch, tmp_path, download, path, why):
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, download)
    message = refused(sample.main, "--device", "cpu", "--checkpoint", path)
    assert path in message and why in message


# --- Trained on -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, dict(projector=(1, 40, 24)), dict(classes=7), dict(guide_range=(1, 2.5))]
)
def test_training_starts_from_released_weights(released, golden_weights, changes):
    """All of the file arrives. With other classes the class rows are fresh, but for that of none;
    what the file lacks, a projector and the encoder of guidance, is fresh, too."""
    cfg = replace(train.Config(), init=str(released), transport="otfm")
    table, weights = "y_embedder.embedding_table.weight", without_projector(golden_weights)
    model = TiM(**NETWORK | dict(classes=10) | changes)
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    train.start_from(model, cfg)
    state = model.state_dict()
    for k in weights.keys() - {table}:
        assert torch.equal(state[k], weights[k]), k
    for k in state.keys() - weights.keys():
        assert torch.equal(state[k], fresh[k]), k
    assert torch.equal(state[table][-1], weights[table][-1])
    rows = fresh if "classes" in changes else weights
    assert torch.equal(state[table][:-1], rows[table][:-1])


def test_training_from_weights_of_another_kind_is_refused(released):
    cfg = replace(train.Config(), init=str(released), transport="otfm")
    wrong = [(dict(depth=1), cfg), ({}, replace(cfg, transport="tim")), ({}, replace(cfg, predict="x"))]
    for changes, other in wrong:
        with pytest.raises(data.UserError):
            train.start_from(TiM(**NETWORK | changes, classes=10), other)
    train.start_from(TiM(**NETWORK, classes=10), replace(cfg, transport="tim", init_anyway=True))


# --- What is no checkpoint ------------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a pickle ran')",))


def test_what_is_no_checkpoint_is_refused(tmp_path, golden_weights, refused):
    """In one line that names the file and, where tensors do not fit, one of them."""
    weights, name = golden_weights, "blocks.1.mlp.fc2.bias"
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(dict(a=Code())))
    for ending in ("safetensors", "pt"):
        whole = write(weights, tmp_path / f"whole.{ending}").read_bytes()
        (tmp_path / f"half.{ending}").write_bytes(whole[:300_000])
    bad = {
        "evil.pt": dict(a=Code()), "nested.pt": dict(model=weights),
        "missing.safetensors": {k: v for k, v in weights.items() if k != name},
        "unknown.safetensors": weights | dict(extra=torch.zeros(1)),
        "misshapen.safetensors": weights | {name: torch.zeros(3)},
        "foreign.safetensors": dict(a=torch.zeros(1)),
    }  # fmt: skip
    for file, tensors in bad.items():
        write(tensors, tmp_path / file)
    said = {"missing.safetensors": name, "unknown.safetensors": "extra", "misshapen.safetensors": name}
    for file in (*bad, "evil.bin", "half.safetensors", "half.pt", "nowhere.safetensors"):
        message = refused(sample.main, "--checkpoint", tmp_path / file)
        assert file in message and said.get(file, "") in message, message


def test_latents_need_an_autoencoder_that_fits(released, tmp_path, monkeypatch, refused):
    (tmp_path / "vae").mkdir()
    argv = ["--checkpoint", released, "--device", "cpu"]
    assert "--autoencoder" in refused(sample.main, *argv, "--autoencoder", tmp_path / "vae")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install diffusers" in refused(sample.main, *argv)
