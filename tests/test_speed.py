"""The measuring itself: FLOPs against torch's counter, memory against a known allocation, the tables end to end."""

import json
import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import evaluate
from model import TiM
from transition import TRANSPORTS, exact_derivative, finite_difference

SMALL = dict(channels=3, patch=2, depth=2, width=64, heads=2, adaln=32)
KINDS = {
    "classes": dict(classes=10),
    "captions": dict(caption=48),
    "one time encoder": dict(classes=10, shared_time=True),
    "plain attention": dict(classes=10, interval_attention=False),
    "projector": dict(classes=10, projector=(1, 32, 16)),
}


def network(**kind):
    torch.manual_seed(0)
    model = TiM(**SMALL, **kind)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t = torch.randn(4, 3, 8, 12), torch.rand(4) * 0.5 + 0.5
    y = torch.randn(4, 7, 48) if "caption" in kind else torch.arange(4)
    return model, x, t, t * 0.3, y


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_useful_flops_agree_with_the_counter(kind):
    model, x, t, r, y = network(**kind)
    linear, attention = evaluate.forward_flops(model, 4 * 6, 7 if "caption" in kind else 0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        f = model(x.requires_grad_(), t, r, y)
    assert forward.get_total_flops() == pytest.approx(4 * (linear + attention), rel=0.01)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        f.sum().backward()
    assert backward.get_total_flops() == pytest.approx(8 * (linear + attention), rel=0.01)


def test_flops_of_the_derivatives():
    model, eps, t, r, y = network(classes=10)
    model.requires_grad_(False)
    row, x, forward = TRANSPORTS["tim"], torch.randn_like(eps), 4 * sum(evaluate.forward_flops(model, 24))
    inputs = x, eps, t, r, y
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as dde:  # fused CPU attention is not counted
        finite_difference(model, row, *inputs, 0.005)
    assert dde.get_total_flops() == pytest.approx(2 * forward, rel=0.01)
    torch.testing.assert_close(evaluate.plain_jvp(model, row, *inputs), exact_derivative(model, row, *inputs))


def test_measure_counts_memory_and_time():
    cpu, megabytes = torch.device("cpu"), 8
    allocate, sleep = lambda: torch.empty(megabytes * 2**18).sum(), lambda: time.sleep(0.05)
    (_, peak), (seconds, none) = evaluate.measure([allocate, sleep], cpu, 3)
    assert peak == pytest.approx(megabytes, rel=0.01) and none == 0
    assert seconds == pytest.approx(0.05, rel=0.5)

    def too_much():
        raise torch.OutOfMemoryError("no room")

    (seconds, peak), (slept, _) = evaluate.measure([too_much, sleep], cpu, 2)
    assert seconds != seconds and peak != peak and slept == pytest.approx(0.05, rel=0.5)
    begin = time.perf_counter()
    evaluate.measure([sleep], cpu, 1000, limit=0.2)
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize("config", ["demo", "t2i_xl"])
def test_the_three_tables(config, tmp_path, capsys):
    flags = "--patch 14 --size demo --channels 1 --side 28 --batch 8 --steps 1 2 --repeats 1 --sample_batch 2"
    out, flags = tmp_path / "speed.json", flags + " --device cpu --precision fp32 --no-compile --autoencoder="
    evaluate.main(["speed", "--config", config, *flags.split(), "--out", str(out)])
    got = json.loads(out.read_text())
    assert [row["step"] for row in got["training"]] == ["diffusion only", "DDE", "JVP", "DDE + model guidance"]
    one, two, plain, exact = got["derivative"]
    assert one["GFLOPs"] == two["GFLOPs"] and one["error"] == pytest.approx(two["error"], rel=0.05)
    assert plain["error"] < 1e-5 and exact["error"] < 1e-5 < one["error"] < 0.05
    assert [(row["steps"], row["NFE"]) for row in got["sampling"][:4]] == [(1, 1), (2, 2), (1, 2), (2, 4)]
    assert all(0 < row["of shapes"] for row in got["training"] + got["sampling"])
    assert got["attention"] == {"fp32": "flash_attention_for_cpu"}
    assert got["config"]["patch"] == 14 and {"commit", "device", "matmul"} <= got.keys()
    assert "GFLOP/s" in capsys.readouterr().out


def test_speed_refuses_what_train_refuses(capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["speed", "--config", "demo", "--bach", "3"])
    assert stop.value.code == 2 and "--bach" in capsys.readouterr().err
