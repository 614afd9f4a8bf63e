"""The measuring itself: FLOPs against their formula, time against a known one, the table end to end."""

import json
import time
from dataclasses import replace

import pytest
import torch
from oracle import lively

import evaluate
import sample
import train
from transition import TRANSPORTS, exact_derivative, finite_difference

CPU = torch.device("cpu")


def inputs(model):
    rng = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 4, 3, 8, 12, generator=rng)
    t = torch.rand(4, generator=rng) * 0.5 + 0.5
    return sample.network_f(model, TRANSPORTS["tim"]), TRANSPORTS["tim"], x, eps, t, t * 0.3, torch.arange(4)


def test_flops_are_those_of_the_layers_and_of_attention():
    width, depth, tokens, heads, head = 32, 2, 24, 2, 16
    model = lively()
    f, _, x, _, t, r, y = inputs(model)
    linear = sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1 and
                 any(part in n for part in ("attn.qkv.", "attn.proj", "mlp.fc", "final_layer.linear", "x_embedder")))
    attention = depth * 4 * tokens * tokens * heads * head
    _, flops, memory = evaluate.measure(lambda: f(x, t, r, y), CPU, 0.01)
    assert memory is None and width == heads * head
    assert flops == pytest.approx(4 * (2 * tokens * linear + attention), rel=0.1)  # and the conditions
    _, double, _ = evaluate.measure(lambda: finite_difference(*inputs(model), 0.005), CPU, 0.01)
    assert double == 2 * flops


def test_plain_jvp_is_the_exact_derivative():
    args = inputs(lively())
    torch.testing.assert_close(evaluate.plain_jvp(*args), exact_derivative(*args))


def test_time_is_measured_and_lack_of_memory_is_told():
    seconds, flops, _ = evaluate.measure(lambda: time.sleep(0.05), CPU, 0.3)
    assert seconds == pytest.approx(0.05, rel=0.5) and flops == 0

    def too_much():
        raise torch.OutOfMemoryError("no room")

    seconds, _, _ = evaluate.measure(too_much, CPU, 0.1)
    assert seconds != seconds


@pytest.mark.parametrize("config", ["demo", "emoji", "t2i_xl"])
def test_the_table_of_a_preset(config, tmp_path, monkeypatch, capfd):
    flags = "--patch 14 --size demo --channels 1 --side 28 --batch 4 --autoencoder="
    if config == "emoji":
        flags = "--size demo --batch 4"
    monkeypatch.setitem(train.SIZES, "demo", {"depth": 1, "width": 16, "heads": 2, "adaln": 8})
    flags += f" --device cpu --precision fp32 --no-compile --runs {tmp_path} --sampling_steps 2 --seconds 0.01"
    evaluate.main(["speed", "--config", config, *flags.split()])
    record = json.loads((tmp_path / "speed.jsonl").read_text())
    rows = {row["what"]: row for row in record["rows"]}
    flops = {name: row["GFLOPs"] for name, row in rows.items()}
    assert len(rows) == 5 + 3 + 2 and all(v > 0 for v in flops.values())
    assert flops["update, diffusion only"] < flops["update, DDE"] < flops["update, DDE, own path"]
    assert flops["update, DDE"] < flops["update, DDE, guided target"]
    assert flops["sampling, 2 steps, guided 1.5"] == 2 * flops["sampling, 2 steps, guided 1"]
    assert rows["update, diffusion only"]["x diffusion"] == 1 and rows["update, DDE"]["of matmul"] > 0
    assert record["config"]["batch"] == 4 and {"commit", "device", "matmul"} <= record.keys()
    out, err = capfd.readouterr()
    assert "TFLOP/s" in out and "profiler" not in err and err.count("\n") < 10


def test_alignment_needs_no_features_here(tmp_path):
    cfg = replace(train.parse_config(["--config", "demo", "--batch", "4"])[0], align=0.5)
    cfg, network, batch, texts = evaluate.open_setting(cfg, CPU, torch.float32)
    assert "projector" not in network and texts is None and batch.x.shape == (4, 1, 28, 28)


def test_speed_refuses_what_train_refuses(capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["speed", "--config", "demo", "--bach", "3"])
    assert stop.value.code == 2 and "--bach" in capsys.readouterr().err
