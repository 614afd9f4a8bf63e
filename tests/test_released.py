"""Released files: recognised by their tensors, sampled, fine-tuned, exported; and what must be refused."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import sample
import train
from model import SIZES, TiM, lower_precision

GOLDEN = Path(__file__).parent / "reference_c2i.safetensors"


def golden_weights(projector=True):
    with safe_open(GOLDEN, "pt") as f:
        names = [k for k in f.keys() if k.startswith("weights.")]
        state = {k.removeprefix("weights."): f.get_tensor(k) for k in names}
    return {k: v for k, v in state.items() if projector or not k.startswith("projector.")}


def fails(argv, capsys, main=sample.main):
    with pytest.raises(SystemExit) as stop:
        data.command(lambda: main([str(a) for a in argv]))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("projector", [True, False])
@pytest.mark.parametrize("ending", ["safetensors", "bin", "pt"])
def test_a_released_file_is_recognised_and_samples_as_the_authors(tmp_path, projector, ending):
    """End to end from the file: the golden samples, guidance in the strict interval too, to 1e-5."""
    file = tmp_path / f"released.{ending}"
    (save_file if ending == "safetensors" else torch.save)(golden_weights(projector), file)
    model, row, config = sample.load(file)
    want = dict(channels=4, patch=2, depth=2, width=48, heads=2, adaln=16, classes=10, shared_time=False)
    assert config["model"] == want | dict(interval_attention=True) and row.name == "otfm"
    assert config["data"]["autoencoder"] == "sd-vae" and config["data"]["scale"] == 0.18215
    assert config["train"]["guidance"] == 2.5 and tuple(config["train"]["interval"]) == (0, 0.6)
    golden = load_file(GOLDEN)
    z, y = golden["sample.z"], golden["sample.y"]
    for steps in (1, 2, 8):
        plain = sample.generate(model, row, z, y, steps)
        torch.testing.assert_close(plain, golden[f"sample.otfm.steps{steps}.cfg1"], atol=1e-5, rtol=1e-5)
        guided = sample.generate(model, row, z, y, steps, 2.5, (0, 0.6), strict=True)
        want = golden[f"sample.otfm.steps{steps}.cfg2.5.interval0-0.6"]
        torch.testing.assert_close(guided, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "channels, patch, kind, autoencoder, side",
    [
        (4, 2, dict(classes=1000), "sd-vae", 32),
        (32, 1, dict(classes=1000), "dc-ae", 16),
        (32, 1, dict(caption=1152), "dc-ae", 16),
    ],
)
def test_the_three_released_shapes_are_known(channels, patch, kind, autoencoder, side):
    with torch.device("meta"):
        model = TiM(channels, patch, **SIZES["XL"], **kind, projector=(8, 2048, 768))
    config = sample.recognise(model.state_dict(), "file")
    given = {k: v for k, v in config["model"].items() if k in SIZES["XL"] or k in kind}
    assert given == SIZES["XL"] | kind
    assert config["data"]["autoencoder"] == autoencoder and config["data"]["shape"] == [channels, side, side]
    if "caption" in kind:
        assert config["model"]["rope_layout"] == "released" and config["model"]["caption_mask"] is False


def test_bf16_with_fp32_times_stays_near_fp32_over_250_steps(tmp_path):
    save_file(golden_weights(), tmp_path / "released.safetensors")
    model, row, _ = sample.load(tmp_path / "released.safetensors")
    golden = load_file(GOLDEN)
    full = sample.generate(model, row, golden["sample.z"], golden["sample.y"], 250)
    low = sample.generate(lower_precision(model), row, golden["sample.z"], golden["sample.y"], 250)
    assert (low - full).norm() / full.norm() < 1e-2


def test_latents_are_sampled_without_an_autoencoder(tmp_path, monkeypatch, capsys):
    save_file(golden_weights(), tmp_path / "released.safetensors")
    flags = ["--checkpoint", tmp_path / "released.safetensors", "--steps", "1", "2", "--classes", "7", "3"]
    sample.main([str(f) for f in [*flags, "--save_latents", "--out", tmp_path / "grid.safetensors"]])
    grid = load_file(tmp_path / "grid.safetensors")
    assert {k: tuple(v.shape) for k, v in grid.items()} == {"steps_1": (2, 4, 32, 32), "steps_2": (2, 4, 32, 32)}
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install diffusers" in fails(flags, capsys)
    many = [*flags[:2], "--steps", 1, "--num", 5, "--batch", 2, "--save_latents", "--out", tmp_path / "many"]
    sample.main([str(f) for f in many])
    parts = [load_file(p) for p in sorted((tmp_path / "many").glob("*.safetensors"))]
    assert torch.cat([p["index"] for p in parts]).tolist() == [0, 1, 2, 3, 4]
    assert "holds samples with seed = 0, not 1" in fails([*many, "--seed", 1], capsys)


def test_export_and_back_is_bit_equal(tmp_path, capsys):
    save_file(golden_weights(), tmp_path / "released.safetensors")
    sample.main(["--checkpoint", str(tmp_path / "released.safetensors"), "--export", str(tmp_path / "own.safetensors")])
    released, own = golden_weights(projector=False), load_file(tmp_path / "own.safetensors")
    assert released.keys() == own.keys() and all(torch.equal(released[k], own[k]) for k in own)
    first, second = (sample.load(tmp_path / f"{name}.safetensors") for name in ("released", "own"))
    assert first[1] is second[1] and json.loads(json.dumps(first[2])) == second[2]
    assert "give such a name" in fails(["--checkpoint", tmp_path / "own.safetensors", "--export", "x.pt"], capsys)


def test_training_starts_from_released_weights(tmp_path):
    """All but a table of another number of classes arrives; its class rows are fresh and its last row is kept."""
    save_file(golden_weights(), tmp_path / "released.safetensors")
    network = dict(channels=4, patch=2, depth=2, width=48, heads=2, adaln=16)
    table, released = "y_embedder.embedding_table.weight", golden_weights(projector=False)
    for classes, projector in ((10, None), (10, (1, 40, 24)), (7, None)):
        model = TiM(**network, classes=classes, projector=projector)
        fresh = {k: v.clone() for k, v in model.state_dict().items()}
        train.start_from(model, tmp_path / "released.safetensors")
        state = model.state_dict()
        for k in released.keys() - {table}:
            assert torch.equal(state[k], released[k]), k
        assert torch.equal(state[table][-1], released[table][-1])
        assert torch.equal(state[table][:-1], (released if classes == 10 else fresh)[table][:-1])
        assert all(torch.equal(state[k], fresh[k]) for k in state if k.startswith("projector."))
    with pytest.raises(data.UserError, match="blocks.1.* missing|unknown blocks.1"):
        train.start_from(TiM(**network | dict(depth=1), classes=10), tmp_path / "released.safetensors")


class Code:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a pickle ran')",))


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    weights = golden_weights()
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(dict(a=Code())))
    torch.save(dict(a=Code()), tmp_path / "evil.pt")
    torch.save(dict(model=weights), tmp_path / "nested.pt")
    save_file(weights, tmp_path / "whole.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:300_000])
    torch.save(weights, tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:300_000])
    name = "blocks.1.mlp.fc2.bias"
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "missing.safetensors")
    save_file(weights | dict(extra=torch.zeros(1)), tmp_path / "unknown.safetensors")
    save_file(weights | {name: torch.zeros(3)}, tmp_path / "misshapen.safetensors")
    save_file(dict(a=torch.zeros(1)), tmp_path / "foreign.safetensors")
    said = {
        "evil.bin": "not a whole file of weights|holds more than weights", "evil.pt": "holds more than weights",
        "nested.pt": "not a plain dictionary of tensors", "half.safetensors": "not a whole file of weights",
        "half.pt": "not a whole file of weights", "missing.safetensors": f"missing {name}",
        "unknown.safetensors": "unknown extra", "misshapen.safetensors": f"{name} (3,) instead of (48,)",
        "foreign.safetensors": "no x_embedder.proj.weight", "nowhere.safetensors": "there is no",
    }  # fmt: skip
    for file, texts in said.items():
        error = fails(["--checkpoint", tmp_path / file], capsys)
        assert any(text in error for text in texts.split("|")), error
    whole = ["--checkpoint", tmp_path / "whole.safetensors", "--save_latents"]
    assert "knows classes 0 to 9" in fails([*whole, "--classes", 10], capsys)
    assert "--steps 0: at least 1" in fails([*whole, "--steps", 0], capsys)
    (tmp_path / "vae").mkdir()
    assert "error:" in fails([*whole[:2], "--autoencoder", tmp_path / "vae"], capsys)


@pytest.mark.slow
def test_xl_loads_in_place_and_takes_a_step(tmp_path):
    """664,128,016 parameters: at most 15 s and the file's size + 10% of memory, then one step."""
    file = tmp_path / "xl.safetensors"
    with torch.device("meta"):
        shapes = TiM(4, 2, **SIZES["XL"], classes=1000).state_dict()
    assert sum(v.numel() for v in shapes.values()) == 664_128_016
    save_file({k: torch.randn(v.shape) * 0.02 for k, v in shapes.items()}, file)
    code = """
import resource, sys, time, torch, sample
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, began = peak(), time.time()
model, row, config = sample.load(sys.argv[1])
total = sum(float(p.sum()) for p in model.parameters())
print(time.time() - began, peak() - before)
x = sample.generate(model, row, torch.randn(1, 4, 32, 32), torch.tensor([207]), 1)
print(float(x.std()))
"""
    root = Path(train.__file__).parent
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, cwd=root)
    seconds, grown, deviation = map(float, done.stdout.split())
    assert seconds < 15 and grown < 1.1 * file.stat().st_size and 0 < deviation < 100, done
