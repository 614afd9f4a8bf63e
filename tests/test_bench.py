"""The measuring itself: FLOPs against their formula, time against a known one, both tables."""

import json
import math
import time

import bench
import pytest
import torch
from conftest import CONFIG
from oracle import lively

import data
import model
import sample
from transition import TRANSPORTS, exact_derivative, finite_difference, network_f

CPU = torch.device("cpu")


def inputs():
    x, eps = torch.randn(2, 4, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    t, transport = torch.linspace(0.5, 0.9, 4), TRANSPORTS["tim"]
    return network_f(lively(), transport, "f"), transport, x, eps, t, t * 0.3, torch.arange(4)


def test_flops_are_those_of_the_layers_and_of_attention():
    width, depth, tokens = 32, 2, 24
    parts = ("attn.qkv.", "attn.proj", "mlp.fc", "final_layer.linear", "x_embedder")
    weights = [p for n, p in lively().named_parameters() if any(part in n for part in parts)]
    linear = sum(p.numel() for p in weights if p.ndim > 1)
    f, _, x, _, t, r, y = inputs()
    _, flops, memory = bench.measure(lambda: f(x, t, r, y), CPU, 0.01)
    expected = 4 * (2 * tokens * linear + depth * 4 * tokens * tokens * width)
    assert memory is None and flops == pytest.approx(expected, rel=0.1)  # and the conditions
    assert bench.measure(lambda: finite_difference(*inputs(), 0.005), CPU, 0.01)[1] == 2 * flops


def test_plain_jvp_is_the_exact_derivative():
    torch.testing.assert_close(bench.plain_jvp(*inputs()), exact_derivative(*inputs()))


def test_time_is_measured_and_lack_of_memory_is_told():
    def too_much():
        raise torch.OutOfMemoryError("no room")

    assert 0.05 <= bench.measure(lambda: time.sleep(0.05), CPU, 0.2)[0] < 0.5
    assert math.isnan(bench.measure(too_much, CPU, 0.1)[0])


@pytest.mark.parametrize("config", ["demo", "emoji", "t2i_xl"])
def test_the_table_of_a_preset(config, tmp_path, monkeypatch):
    monkeypatch.setitem(model.SIZES, "demo", {"depth": 1, "width": 16, "heads": 2, "adaln": 8})
    flags = "--size demo --batch 4 --accumulate 1 --device cpu --no-compile --sampling_steps 2"
    flags += " --side 8 --patch 4" if config == "t2i_xl" else ""
    bench.main(f"--config {config} --seconds 0.01 --runs {tmp_path} {flags}".split())
    rows = json.loads((tmp_path / "bench.jsonl").read_text())["rows"]
    flops = {row["what"]: row["GFLOPs"] for row in rows}
    assert len(rows) == 5 + 3 + 2 and all(row["ms"] > 0 and row["of matmul"] > 0 for row in rows)
    assert flops["update, diffusion only"] < flops["update, DDE"] < flops["update, DDE, own path"]
    assert flops["update, DDE"] < flops["update, DDE, guided target"]
    assert flops["sampling, 2 steps, guided 1.5"] == 2 * flops["sampling, 2 steps, guided 1"]


def test_errors_of_the_difference_fall_with_h_squared_until_rounding(tmp_path):
    network = dict(channels=1, patch=14, depth=2, width=32, heads=2, adaln=16, classes=10)
    spec = data.open_data("demo").spec.to_json()
    config = CONFIG | {"model": network, "data": spec, "train": CONFIG["train"] | {"data": "demo"}}
    sample.save(tmp_path / "a.safetensors", lively(**network).state_dict(), config)
    rows = bench.errors(tmp_path / "a.safetensors", 8, CPU, 0)
    fp64, fp32, bf16 = ([row[name] for row in rows[:3]] for name in ("fp64", "fp32", "bf16"))
    assert fp64[1] / fp64[0] == pytest.approx((0.001 / 0.0003) ** 2, rel=0.5)
    assert bf16[0] > 10 * fp32[0] > 10 * fp64[0] and bf16[2] < bf16[0]


def test_flags_that_train_refuses_are_refused(refused):
    assert "--bach" in refused(bench.main, "--config", "demo", "--bach", 3)
    assert "gone" in refused(bench.main, "--errors", "gone")
