"""Released files: recognised by their tensors, sampled, fine-tuned, exported; what must be refused."""

import json
import pickle
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import sample
import train
from model import SIZES, TiM, lower_precision

ROOT = Path(train.__file__).parent
NETWORK = dict(channels=4, patch=2, depth=2, width=48, heads=2, adaln=16)


def without_projector(weights):
    return {k: v for k, v in weights.items() if not k.startswith("projector.")}


@pytest.fixture
def released(tmp_path, golden_weights):
    """A file with the names and the configuration of a released one, but small."""
    save_file(golden_weights, tmp_path / "released.safetensors")
    return tmp_path / "released.safetensors"


# --- Recognised by their tensors ------------------------------------------------------------------


@pytest.mark.parametrize("projector", [True, False])
@pytest.mark.parametrize("ending", ["safetensors", "bin", "pt"])
def test_a_released_file_is_recognised_and_samples_as_the_authors(
    tmp_path, golden, golden_weights, projector, ending
):
    """End to end from the file: the golden samples, with guidance in the strict interval too."""
    file, weights = tmp_path / f"released.{ending}", golden_weights
    weights = weights if projector else without_projector(weights)
    (save_file if ending == "safetensors" else torch.save)(weights, file)
    model, transport, config = sample.load(file)
    known = NETWORK | dict(classes=10, shared_time=False, interval_attention=True)
    assert config["model"] == known and transport.name == "otfm" and model.predict == "f"
    assert config["data"]["autoencoder"] == "sd-vae" and config["data"]["scale"] == 0.18215
    options = sample.sampling_options(config)
    guided = {k: options[k] for k in ("guidance", "interval", "strict")}
    assert guided == {"guidance": 2.5, "interval": (0.0, 0.6), "strict": True}
    z, y = golden["sample.z"], golden["sample.y"]
    for steps in (1, 2, 8):
        plain = sample.generate(model, transport, z, y, steps)
        expected = golden[f"sample.otfm.steps{steps}.cfg1"]
        torch.testing.assert_close(plain, expected, atol=1e-5, rtol=1e-5)
        found = sample.generate(model, transport, z, y, steps, **options)
        expected = golden[f"sample.otfm.steps{steps}.cfg2.5.interval0-0.6"]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "channels, patch, kind, autoencoder, side, factor, guided",
    [
        (4, 2, dict(classes=1000), "sd-vae", 32, 8, (2.5, (0.0, 0.6), True)),
        (32, 1, dict(classes=1000), "dc-ae", 16, 32, (3.0, (0.0, 0.7), True)),
        (32, 1, dict(caption=1152), "dc-ae", 16, 32, (2.5, (0.0, 1.0), True)),
    ],
)
def test_the_three_released_shapes_and_their_guidance_are_known(
    channels, patch, kind, autoencoder, side, factor, guided
):
    with torch.device("meta"):
        state = TiM(channels, patch, **SIZES["XL"], **kind, projector=(8, 2048, 768)).state_dict()
    config = sample.recognise(without_projector(state), "file")
    given = {k: v for k, v in config["model"].items() if k in SIZES["XL"] or k in kind}
    assert given == SIZES["XL"] | kind
    spec = data.DataSpec.from_json(config["data"])
    assert spec.shape == (channels, side, side)
    assert (spec.autoencoder, spec.factor) == (autoencoder, factor)
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


# --- Loaded in fp32, whatever the file holds ------------------------------------------------------


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_the_size_become_fp32(tmp_path, golden_weights, ending, dtype):
    file = tmp_path / f"half.{ending}"
    half = {name: tensor.to(dtype) for name, tensor in golden_weights.items()}
    (save_file if ending == "safetensors" else torch.save)(half, file)
    model, _, _ = sample.load(file)
    for name, p in model.state_dict().items():
        assert p.dtype == torch.float32 and torch.equal(p, half[name].float()), name
    seen = []
    model.t_embedder.register_forward_hook(lambda layer, args, out: seen.extend([args[0], out]))
    x, t = torch.randn(1, 4, 4, 4), torch.tensor([0.7])
    assert model(x, t, t, torch.tensor([0])).dtype == torch.float32
    assert {s.dtype for s in seen} == {torch.float32}


PEAK = """
import sys, time, torch, sample

def peak():
    line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

sample.load(sys.argv[1])  # what torch and safetensors take themselves
before, began = peak(), time.time()
model, transport, config = sample.load(sys.argv[2])
total = sum(float(p.sum()) for p in model.parameters())  # touches every page
print(time.time() - began, peak() - before)
if len(sys.argv) > 3:
    x = sample.generate(model, transport, torch.randn(1, 4, 32, 32), torch.tensor([207]), 1)
    print(float(x.std()))
"""


def measured(*argv):
    """Seconds and bytes of memory that loading the second file takes, in a process of its own."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc/self/status here, which tells the peak of memory")
    command = [sys.executable, "-c", PEAK, *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return list(map(float, done.stdout.split()))


def test_loading_a_bf16_file_takes_no_more_than_its_fp32_size_and_a_tenth(tmp_path, released):
    """A second copy of all, in the file's type, would make it 1.5 times the size."""
    with torch.device("meta"):
        sizes = dict(depth=5, width=640, heads=10, adaln=256)
        shapes = TiM(4, 2, **sizes, classes=1000).state_dict()
    file = tmp_path / "bf16.safetensors"
    save_file({k: torch.ones(v.shape, dtype=torch.bfloat16) for k, v in shapes.items()}, file)
    size = sum(4 * v.numel() for v in shapes.values())
    assert size > 100e6
    _, grown = measured(released, file)
    assert 0.8 * size < grown < 1.1 * size, grown / size


@pytest.mark.slow
def test_xl_loads_in_place_and_takes_a_step(tmp_path, released):
    """664,128,016 parameters: at most 15 s and the file's size + 10% of memory, then one step."""
    file = tmp_path / "xl.safetensors"
    with torch.device("meta"):
        shapes = TiM(4, 2, **SIZES["XL"], classes=1000).state_dict()
    assert sum(v.numel() for v in shapes.values()) == 664_128_016
    save_file({k: torch.randn(v.shape) * 0.02 for k, v in shapes.items()}, file)
    seconds, grown, deviation = measured(released, file, "step")
    assert seconds < 15 and grown < 1.1 * file.stat().st_size and 0 < deviation < 100


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
    model, transport, _ = sample.load(name)
    assert set(asked) == {("GoodEnough/TiM-C2I", "weights/c2i_model_256.safetensors")}
    for (key, found), expected in zip(
        model.named_parameters(), sample.load(released)[0].parameters()
    ):
        assert torch.equal(found, expected), key
    cfg = replace(train.Config(), init=name, transport="otfm")
    fresh = TiM(**NETWORK, classes=10)
    train.start_from(fresh, cfg)
    assert torch.equal(fresh.x_embedder.proj.weight, model.x_embedder.proj.weight)

    asked.clear()
    folder = tmp_path / "GoodEnough" / "TiM-C2I"  # what lies here goes before the hub
    folder.mkdir(parents=True)
    (folder / "mine.safetensors").write_bytes(released.read_bytes())
    sample.load("GoodEnough/TiM-C2I/mine.safetensors")
    assert not asked


def test_a_hub_name_without_package_or_network_says_what_to_do(refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    argv = ["--device", "cpu", "--checkpoint", "GoodEnough/TiM-C2I/c2i.safetensors"]

    def offline(repo, file):
        raise OSError("no route to the hub\nand more lines of that")

    for download, why in ((None, "huggingface_hub"), (offline, "no route to the hub")):
        hub(monkeypatch, download)
        message = refused(sample.main, *argv)
        assert why in message and "pip install huggingface_hub, or download it" in message
        assert "GoodEnough/TiM-C2I/c2i.safetensors" in message
    message = refused(sample.main, *argv[:3], "runs/gone/ema.pth/x")
    assert "there is no" in message  # no name of a file of weights: not looked for on the hub


# --- Exported and trained on ----------------------------------------------------------------------


def test_export_and_back_is_bit_equal(released, tmp_path, golden_weights, refused):
    own = tmp_path / "own.safetensors"
    sample.main(["--checkpoint", str(released), "--export", str(own), "--device", "cpu"])
    expected, found = without_projector(golden_weights), load_file(own)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in found)
    first, second = sample.load(released), sample.load(own)
    assert first[1] is second[1] and json.loads(json.dumps(first[2])) == second[2]
    message = refused(sample.main, "--checkpoint", own, "--export", "x.pt")
    assert "--export x.pt: name a .safetensors file" in message
    message = refused(
        sample.main, "--checkpoint", own, "--export", tmp_path / "no" / "x.safetensors"
    )
    assert "cannot be written" in message and "choose another folder" in message


def test_training_starts_from_released_weights(released, golden_weights):
    """All but a table of another number of classes arrives: its class rows are fresh, its last row is
    kept."""
    cfg = replace(train.Config(), init=str(released), transport="otfm")
    table, weights = "y_embedder.embedding_table.weight", without_projector(golden_weights)
    for classes, projector in ((10, None), (10, (1, 40, 24)), (7, None)):
        model = TiM(**NETWORK, classes=classes, projector=projector)
        fresh = {k: v.clone() for k, v in model.state_dict().items()}
        train.start_from(model, cfg)
        state = model.state_dict()
        for k in weights.keys() - {table}:
            assert torch.equal(state[k], weights[k]), k
        assert torch.equal(state[table][-1], weights[table][-1])
        rows = weights if classes == 10 else fresh
        assert torch.equal(state[table][:-1], rows[table][:-1])
        assert all(torch.equal(state[k], fresh[k]) for k in state if k.startswith("projector."))
    with pytest.raises(data.UserError, match="does not fit.*blocks.1"):
        train.start_from(TiM(**NETWORK | dict(depth=1), classes=10), cfg)


# --- What is no checkpoint ------------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a pickle ran')",))


def test_what_is_no_checkpoint_is_refused(tmp_path, golden_weights, refused):
    weights, name = golden_weights, "blocks.1.mlp.fc2.bias"
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(dict(a=Code())))
    torch.save(dict(a=Code()), tmp_path / "evil.pt")
    torch.save(dict(model=weights), tmp_path / "nested.pt")
    save_file(weights, tmp_path / "whole.safetensors")
    (tmp_path / "half.safetensors").write_bytes(
        (tmp_path / "whole.safetensors").read_bytes()[:300_000]
    )
    torch.save(weights, tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:300_000])
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "missing.safetensors")
    save_file(weights | dict(extra=torch.zeros(1)), tmp_path / "unknown.safetensors")
    save_file(weights | {name: torch.zeros(3)}, tmp_path / "misshapen.safetensors")
    save_file(dict(a=torch.zeros(1)), tmp_path / "foreign.safetensors")
    broken = "not a whole file of plain weights"
    said = {
        "evil.bin": [broken], "evil.pt": [broken], "nested.pt": [broken],
        "half.safetensors": [broken], "half.pt": [broken],
        "missing.safetensors": ["Missing key", name], "unknown.safetensors": ["Unexpected", "extra"],
        "misshapen.safetensors": ["size mismatch", name, "[3]", "[48]"],
        "foreign.safetensors": ["no x_embedder.proj.weight"], "nowhere.safetensors": ["there is no"],
    }  # fmt: skip
    for file, words in said.items():
        message = refused(sample.main, "--checkpoint", tmp_path / file)
        assert file in message and all(word in message for word in words), message
        assert "code in a pickle ran" not in message


def test_latents_need_an_autoencoder_that_fits(released, tmp_path, monkeypatch, refused):
    (tmp_path / "vae").mkdir()
    argv = ["--checkpoint", released, "--device", "cpu"]
    message = refused(sample.main, *argv, "--autoencoder", tmp_path / "vae")
    assert f"--autoencoder {tmp_path / 'vae'}" in message
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install diffusers" in refused(sample.main, *argv)


def test_released_weights_are_announced_as_such(released, monkeypatch, tmp_path, capsys):
    """They have no step; decoded by a stand-in, as their autoencoder is a download."""
    decode = lambda x: np.zeros((len(x), 8, 8, 3), np.uint8)
    monkeypatch.setattr(data, "Decoder", lambda *arguments: decode)
    argv = ["--checkpoint", released, "--steps", 1, "--classes", 0, "--device", "cpu"]
    sample.main([*map(str, argv), "--out", str(tmp_path / "grid.png")])
    assert f"{released}: released weights, guidance 2.5" in capsys.readouterr().out
