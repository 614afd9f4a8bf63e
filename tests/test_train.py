"""Training for real: the step against equations by hand, many ranks, resume, kills, refusals."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace

import pytest
import torch
import torch.distributed as dist
from launch import (
    ENV, ROOT, TINY, assert_same, command, flags_of, in_turn, log, losses, no_picture, shell, succeed,
    train_here, weights,
)  # fmt: skip
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import evaluate
import sample
import train
import transition
from model import SIZES, TiM
from transition import TRANSPORTS

CPU, FP32 = torch.device("cpu"), torch.float32

# -------------------------------------------------------------------------------------------------
# The step


def small(predict="f", **changes):
    """A configuration, its network in float64 with weights unlike those at first, and a batch."""
    cfg = replace(train.Config(), patch=2, h=0.005, drop=0.1, **changes)
    torch.manual_seed(0)
    model = TiM(2, 2, **SIZES["demo"], classes=3, predict=predict).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return cfg, model, data.Batch(torch.randn(8, 2, 4, 4).double(), torch.arange(8) % 3)


def objective(cfg, model, batch, rng, average=None):
    f, f_ema = (sample.network_f(m, TRANSPORTS[cfg.transport]) for m in (model, average or model))
    return train.objective(f, f_ema, TRANSPORTS[cfg.transport], cfg, batch, rng)


@pytest.mark.parametrize("derivative", ["dde", "jvp"])
@pytest.mark.parametrize(
    "predict, tangent",
    [("f", "data"), ("x", "data"), ("f", "network"), ("x", "network"), ("x", "average")],
)
def test_the_objective_is_the_papers_equation(derivative, predict, tangent):
    """The loss against Eq. 9 written out for the linear path, with df/dt by autograd in float64."""
    switches = {"derivative": derivative, "tangent": tangent, "adaptive": False, "cosine": False}
    cfg, model, batch = small(predict, transport="otfm", **switches)
    cfg = replace(cfg, drop=0.0, h=1e-4)
    average = small(predict)[1]
    with torch.no_grad():
        for p in average.parameters():
            p *= 1.3
    loss, raw, t, r, _ = objective(cfg, model, batch, data.rng(1), average)
    rng, x, y = data.rng(1), batch.x, batch.y
    torch.rand(8, generator=rng), torch.randn(2, 8, generator=rng), torch.rand(8, generator=rng)
    eps = torch.randn(x.shape, generator=rng)
    column = lambda t: t[:, None, None, None]

    def f(x_t, t, r, model=model):
        out = model(x_t, t, r, y)
        if predict == "f":
            return out
        noise = (x_t - column(1 - t) * out) / column(t).clamp(min=0.05)
        return noise - out

    x_t = column(1 - t) * x + column(t) * eps
    slope = eps - x  # dx_t/dt of the pair
    if tangent != "data":
        slope = f(x_t, t, t, model if tangent == "network" else average).detach()
    with sdpa_kernel(SDPBackend.MATH):
        out, df_dt = torch.func.jvp(
            lambda s: f(x_t + column(s - t) * slope, s, r), (t.double(),), (torch.ones(8).double(),)
        )
    target = eps - x - column(t - r) * df_dt
    want = (out - target).square().mean((1, 2, 3))
    weight = torch.where(t == r, 1.0, (1 + torch.tan(t) - torch.tan(r)).rsqrt())
    assert (t[:4] == r[:4]).all() and (t[4:] > r[4:]).all()
    torch.testing.assert_close(raw.float(), want.detach().float(), rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(loss.float(), (weight * want).mean().float(), rtol=2e-4, atol=2e-4)


def test_slots_draw_different_noise_times_and_drops():
    cfg, model, batch = small()
    draw = lambda slot: objective(cfg, model, batch, data.rng(0, 3, slot, 1))[1:4]
    for a, b, again in zip(draw(0), draw(1), draw(1)):
        assert (a != b).any() and (b == again).all()


def test_the_alignment_loss_is_added_and_logged(tmp_path):
    """1 - the mean cosine of a picture's tokens and features; a line of the log has its average."""
    cfg, model, batch = small(align=0.5)
    model.projector, model.tap = torch.nn.Linear(128, 6).double(), 2
    batch = replace(batch, features=torch.randn(8, 4, 6).double())
    seen = []
    model.projector.register_forward_hook(lambda module, args, out: seen.append(out))
    loss, raw, t, r, alignment = objective(cfg, model, batch, data.rng(1))
    want = 1 - torch.cosine_similarity(seen[-1].float(), batch.features, dim=2).mean(1)
    torch.testing.assert_close(alignment, want)
    plain = objective(replace(cfg, align=0.0), model, batch, data.rng(1))[0]
    torch.testing.assert_close(loss, plain + 0.5 * want.mean())

    line = train.Log(tmp_path, replace(cfg, steps=1), CPU, 0, {})
    line.add(torch.ones(()), raw.float(), t, r, alignment.float(), 0.0)
    line.flush(1)
    assert log(tmp_path)[-1]["alignment"] == pytest.approx(float(want.mean()), rel=1e-5)


def test_accumulation_is_the_mean_of_its_micro_batches():
    cfg, model, batch = small(clip=1e9)
    parts = [data.Batch(batch.x[:4], batch.y[:4]), data.Batch(batch.x[4:], batch.y[4:])]
    total = 0
    for slot, part in enumerate(parts):
        total = total + objective(cfg, model, part, data.rng(cfg.seed, 5, slot, 1))[0] / 2
    total.backward()
    want, found = [p.grad.clone() for p in model.parameters()], []
    model.zero_grad()

    class Spy(torch.optim.SGD):
        def step(self):
            found.extend(p.grad.clone() for p in model.parameters())

    ema = TiM(2, 2, **SIZES["demo"], classes=3).double()
    networks = train.Networks(model, ema, Spy(model.parameters(), 1.0))
    train.train_step(networks, TRANSPORTS[cfg.transport], cfg, 5, parts)
    for a, b in zip(want, found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_micro_batch_of_one_has_the_asked_share_of_r_equal_t():
    cfg, model, batch = small(share_diffusion=0.67, share_consistency=0.0)
    one, equal = data.Batch(batch.x[:1], batch.y[:1]), 0
    f = lambda x_t, t, r, y: 0 * x_t
    for k in range(300):
        _, raw, t, r, _ = train.objective(f, f, TRANSPORTS["tim"], cfg, one, data.rng(k))
        equal += int(t == r)
        assert raw.isfinite().all()
    assert equal / 300 == pytest.approx(0.67, abs=0.09)  # three deviations


def test_runs_with_a_micro_batch_of_one(tmp_path):
    run = train_here(tmp_path, "--batch", 2, "--accumulate", 2, "--steps", 4)
    assert all(math.isfinite(loss) for loss in losses(run).values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("derivative", ["dde", "jvp"])
def test_a_step_does_not_wait_for_the_gpu(dtype, derivative):
    """Every switch that adds work, micro-batches of which part has r = t by chance, the log."""
    switches = (
        "--derivative",
        derivative,
        "--tangent",
        "network",
        "--predict",
        "x",
        "--guide_cond",
        ".5",
    )
    argv = flags_of("unused", *switches, "--share_diffusion", ".3", "--guide_low", ".2")
    cfg = replace(train.parse_config(argv)[0], h=0.01)
    device, transport = torch.device("cuda", 0), TRANSPORTS[cfg.transport]
    train.connect(device)
    try:
        spec = data.DataSpec("random", (2, 4, 4), classes=("a", "b", "c"))
        networks = train.build(cfg, train.network_arguments(cfg, spec), device, dtype)
        parts = [
            data.Batch(torch.randn(5, 2, 4, 4), torch.arange(5) % 3).to(device) for _ in range(2)
        ]
        train.train_step(networks, transport, cfg, 0, parts)  # loads kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        norm, seen = train.train_step(networks, transport, cfg, 1, parts)
        read = train.read_later(torch.stack([norm, (~norm.isfinite()).to(norm)]))
        torch.cuda.set_sync_debug_mode("default")
        assert read()[1] == 0 and len(seen[0]) == 10
    finally:
        torch.cuda.set_sync_debug_mode("default")
        if dist.is_initialized():
            dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------
# The walk of updates

WALKS = {  # flags: losses of the first edition, commit e0fb964
    "--guide_gt 1.5 --accumulate 4 --steps 20": [
        3.37377477, 4.88831723, 3.82046959, 4.08222812, 3.96957153, 4.12852386, 4.29675323,
        3.9425846, 4.01769426, 3.99537364, 4.34367496, 3.61460459, 4.97803056, 4.34686223, 4.0454756,
        3.89626324, 4.85024339, 3.18292114, 3.51565939, 3.67210206,
    ],
    "--guide_gt 1 --cosine": [
        2.98769528, 3.39540929, 2.95335388, 2.91434202, 3.10440183, 2.70447814, 2.6548537, 3.14071354,
    ],
    "--guide_gt 1 --guide_cond .75 --guide_low .3 --guide_high .8 --cosine --derivative jvp "
    "--transport otfm": [
        2.98769528, 3.399176, 2.94936812, 2.86410239, 3.09612203, 2.77652282, 2.74141657, 3.05717054,
    ],
    "--guide_gt 1 --transport edm --time_mean -1 --tau identity --kernel soft_min_snr": [
        33.8019161, 1.48991495, 1.78048101, 3.91521379, 1.58566868, 5.30180579, 1.66668883, 3.40805393,
    ],
    "--guide_gt 2 --classes 0 --shift_tokens 2 --diffusion_at earlier": [
        6.9989863, 8.09718943, 7.84836125, 6.43713796, 7.98613119, 7.13832796, 7.47053647, 8.89394063,
    ],
    "--guide_gt 1 --no-adaptive --precision bf16": [
        1.98769532, 2.4307735, 1.91363101, 1.91790843, 2.10083954, 1.71262011, 1.7784681, 2.16154796,
    ],
}  # fmt: skip


@pytest.mark.parametrize("flags", WALKS)
def test_the_walk_of_updates_is_that_of_the_first_edition(flags, tmp_path, monkeypatch):
    """Slopes are rounded as they were then. All digits agree on the processor that they are of (AVX2);
    with AVX-512 they differ by up to 2e-5."""
    by_jvp = lambda g, t: torch.func.jvp(g, (t,), (torch.ones_like(t),))[1]
    monkeypatch.setattr(transition, "slope", by_jvp)
    run = train_here(tmp_path, "--steps", 8, *flags.split())
    assert list(losses(run).values()) == pytest.approx(WALKS[flags], rel=1e-4)


GUIDED = ["--guide_gt", 1.5, "--steps", 12]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """12 updates of one process with four micro-batches: the draws of four ranks."""
    return train_here(tmp_path_factory.mktemp("reference"), *GUIDED, "--accumulate", 4)


def test_exact_slopes_keep_the_walk(reference):
    """Slopes by reverse mode differ in rounding only."""
    want = WALKS["--guide_gt 1.5 --accumulate 4 --steps 20"][:12]
    assert list(losses(reference).values()) == pytest.approx(want, rel=2e-5)


def test_four_ranks_walk_like_one(reference, tmp_path):
    """With copies of shards and recomputed activations, too: the same losses and weights."""
    flags = ["--replicate", 2, "--checkpointing", "--name", "four"]
    in_turn(tmp_path, 4, [flags_of(tmp_path, *GUIDED, *flags)])
    one, four = losses(reference), losses(tmp_path / "four")
    assert len(four) == 12 and abs(four[1] - four[12]) > 0.1
    assert max(abs(one[s] - four[s]) for s in one) < 1e-5
    assert_same(weights(reference), weights(tmp_path / "four"), atol=1e-5, rtol=1e-5)


# Everything that 2 ranks do, in one start of them: (name, flags), each with 3 updates.
BOTH = [
    "--predict",
    "x",
    "--tangent",
    "network",
    "--guide_gt",
    1,
    "--guide_cond",
    0.5,
    "--steps",
    3,
]
SHARDED = {
    "dde": BOTH,
    "average": [*BOTH, "--tangent", "average", "--guide_cond", 0],
    "jvp": [*BOTH, "--derivative", "jvp"],
    "captions dde": [*BOTH, "--classes", 0, "--transport", "otfm"],
    "captions jvp": [*BOTH, "--classes", 0, "--derivative", "jvp", "--transport", "trigflow"],
}
HALF = {name: [*SHARDED[name], "--precision", "bf16"] for name in ("jvp", "captions dde")}


@pytest.fixture(scope="module")
def two_ranks(reference, tmp_path_factory):
    """The folder of runs that 2 ranks made in turn, and what each rank was refused."""
    runs = tmp_path_factory.mktemp("two")
    first = ["--guide_gt", 1.5, "--name", "moved", "--accumulate", 4]
    train_here(runs, *first, "--steps", 4)
    succeed(runs, *first, "--steps", 8)
    lines = [flags_of(runs, *GUIDED, "--name", "moved", "--accumulate", 2)]
    lines += [flags_of(runs, *flags, "--name", name) for name, flags in SHARDED.items()]
    lines += [flags_of(runs, *flags, "--name", f"{name}, bf16") for name, flags in HALF.items()]
    lines += [flags_of(runs, "--batch", 7, "--name", "odd")]
    (runs / "file").write_text("")
    lines += [flags_of(runs / "file", "--steps", 2)]
    return runs, in_turn(runs, 2, lines, pictures=True)[0]


def test_resume_is_exact_and_moves_between_world_sizes(reference, two_ranks):
    moved = two_ranks[0] / "moved"
    before = [losses(moved)[s] for s in range(1, 9)]  # 4, then a new process: bit-equal
    assert before == [losses(reference)[s] for s in range(1, 9)]
    assert_same(weights(reference), weights(moved), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SHARDED)
def test_both_switches_train_sharded_as_alone(two_ranks, tmp_path, name):
    """Both with guidance in the target; classes or captions; DDE or JVP; bf16 comes close."""
    alone = train_here(tmp_path, *SHARDED[name], "--accumulate", 2)
    sharded, half = two_ranks[0] / name, two_ranks[0] / f"{name}, bf16"
    assert losses(sharded) == pytest.approx(losses(alone), rel=2e-5)
    if name in HALF:
        assert losses(half) == pytest.approx(losses(alone), rel=0.02)
        assert losses(half) != losses(alone)
    assert_same(weights(alone), weights(sharded), atol=2e-5, rtol=1e-4)
    model, _, config = sample.load(sharded)
    assert model.predict == config["model"]["predict"] == config["train"]["predict"] == "x"


def test_each_switch_changes_the_walk_and_none_the_first_loss_at_rest(tmp_path):
    """At the start the output is 0: f is 0, x_hat is 0; later every switch leads elsewhere."""
    seen = {}
    for flags in (
        "--tangent data",
        "--tangent network",
        "--predict x",
        "--predict x --tangent network",
        "--predict x --tangent average",
    ):
        run = train_here(tmp_path / flags.strip("-"), *flags.split(), "--steps", 3, "--guide_gt", 1)
        seen[flags] = list(losses(run).values())
    assert seen["--tangent data"][0] == seen["--tangent network"][0]
    assert len({values[2] for values in seen.values()}) == 5


def test_bad_input_stops_every_rank(two_ranks):
    for said in two_ranks[1]:
        assert len(said) == 2 and "--batch 7: must be a multiple of 2 ranks" in said[0]
        assert "Not a directory" in said[1]
    assert not (two_ranks[0] / "odd").exists()


def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.init_device_mesh("cpu", (1,))


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "alone"])
def test_bf16_casts_weights_and_no_inputs(sharded):
    """Attention and MLP compute in bf16; times, the residual stream, c, d and adaLN stay fp32."""
    mesh = group_of_one() if sharded else None
    try:
        cfg = replace(train.Config(), size="demo", patch=2)
        network = {"channels": 2, "patch": 2, **SIZES["demo"], "classes": 3}
        model, ema, _ = train.build(cfg, network, CPU, FP32 if sharded else torch.bfloat16)
        if sharded:
            model, ema = (train.wrap(m, mesh, cfg, torch.bfloat16) for m in (model, ema))
        block, seen = model.blocks[1], {}
        note = lambda name: lambda module, inputs: seen.update({name: inputs[0].dtype})
        made = lambda name: lambda module, inputs, out: seen.update({name: out.dtype})
        of_block = lambda module, inputs: seen.update(block={v.dtype for v in inputs[:3]})
        block.register_forward_pre_hook(of_block)
        block.attn.proj.register_forward_pre_hook(note("attention"))
        block.attn.q_norm.register_forward_hook(made("q"))
        block.mlp.fc2.register_forward_pre_hook(note("mlp"))
        block.adaLN_modulation.fc2.register_forward_pre_hook(note("adaLN"))
        keep = lambda module, inputs: seen.update(t=inputs[0].clone())
        model.t_embedder.register_forward_pre_hook(keep)
        t, low = torch.tensor([0.9013, 0.5007]), torch.bfloat16
        inputs = torch.randn(2, 2, 4, 4), t, t * 0.3, torch.tensor([0, 1])
        ema.blocks[0].mlp.fc2.register_forward_pre_hook(note("average"))
        f = model(*inputs)
        ema(*inputs)
        assert torch.equal(seen.pop("t"), t) and f.dtype == FP32 and seen.pop("average") == low
        assert seen == {"block": {FP32}, "attention": low, "q": low, "mlp": low, "adaLN": FP32}
        f.sum().backward()  # reshards
        assert all(p.dtype == p.grad.dtype == FP32 for p in model.parameters())  # the masters
    finally:
        if sharded:
            dist.destroy_process_group()


def test_bf16_alone_is_what_fsdp_computes():
    """Output and gradients of two micro-batches: in bf16 bit for bit."""
    cfg = replace(train.Config(), size="demo", patch=2)
    network = {"channels": 2, "patch": 2, **SIZES["demo"], "classes": 3}
    alone = train.build(cfg, network, CPU, torch.bfloat16).model
    with torch.no_grad():
        for p in alone.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    state = {name: p.clone() for name, p in alone.state_dict().items()}
    mesh = group_of_one()
    try:
        sharded = train.build(cfg, network, CPU, FP32).model
        sharded.load_state_dict(state)
        sharded = train.wrap(sharded, mesh, cfg, torch.bfloat16)
        for k in range(2):
            x, t, y = torch.randn(2, 2, 4, 4), torch.rand(2), torch.tensor([0, 1])
            for model in (alone, sharded):
                if model is sharded:
                    model.set_requires_gradient_sync(k == 1)
                with torch.no_grad():
                    model(x, t, t / 2, y)  # as the difference does, before the pass that learns
            found = [model(x, t, t / 2, y) for model in (alone, sharded)]
            assert torch.equal(*found)
            for f in found:
                f.square().mean().backward()
        for (name, a), b in zip(alone.named_parameters(), sharded.parameters()):
            exact = 0 if name.startswith("blocks") else 1e-6  # in fp32 two sums differ in order
            assert (a.grad - train.local(b.grad)).abs().max() <= exact * a.grad.abs().max()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_trains_is_gathered_once_an_update(monkeypatch, accumulate):
    """A micro-batch is three passes of the network, one of its average, which has no backward."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups
    from torch.testing._internal.distributed.fake_pg import FakeStore

    calls, gather = [], groups.foreach_all_gather
    monkeypatch.setattr(groups, "foreach_all_gather", lambda *a: calls.append(1) or gather(*a))
    cfg = replace(train.parse_config(flags_of("unused", "--tangent", "network"))[0], h=0.01)
    monkeypatch.setenv("WORLD_SIZE", "2")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        spec = data.DataSpec("random", (2, 4, 4), classes=("a", "b", "c"))
        network = train.network_arguments(cfg, spec)
        networks = train.build(cfg, network, CPU, torch.bfloat16)
        units = 2 * len(networks.model.blocks) + 1
        batch = data.Batch(torch.randn(4, 2, 4, 4), torch.arange(4) % 3)
        train.train_step(networks, TRANSPORTS[cfg.transport], cfg, 0, [batch] * accumulate)
        assert len(calls) == (1 + accumulate) * units
        assert all(isinstance(p, DTensor) for p in networks.model.parameters())  # resharded
    finally:
        dist.destroy_process_group()


def test_every_rank_holds_its_share():
    """Parameters, and with them gradients, optimizer and average, at XL's shapes: total / ranks."""
    code = """
import torch, torch.distributed as dist, train
from torch.testing._internal.distributed.fake_pg import FakeStore
from model import SIZES, TiM
for world in (2, 16):
    dist.init_process_group("fake", store=FakeStore(), rank=world - 1, world_size=world)
    with torch.device("meta"):
        model = TiM(4, 2, **SIZES["XL"], classes=1000)
    total = sum(p.numel() for p in model.parameters())
    train.wrap(model, dist.init_device_mesh("cpu", (world,)), train.Config(), torch.bfloat16)
    print(sum(p.to_local().numel() for p in model.parameters()) * world / total)
    dist.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert [float(v) for v in done.stdout.split()] == pytest.approx([1, 1], abs=0.05), done.stderr


@pytest.mark.slow
def test_compiled_blocks_walk_like_eager_ones(tmp_path):
    eager = train_here(tmp_path, "--steps", 6, "--name", "eager", "--accumulate", 2)
    succeed(tmp_path, "--steps", 6, "--name", "compiled", "--compile", "--checkpointing", ranks=2)
    found = losses(tmp_path / "compiled")
    assert max(abs(value - found[s]) for s, value in losses(eager).items()) < 1e-4


# -------------------------------------------------------------------------------------------------
# A process alone


def test_a_process_alone_uses_no_collective(tmp_path, monkeypatch):
    """Training, resume, a grid and many pictures: no group, no collective."""

    def refuse(*args, **more):
        raise AssertionError("a collective in a process alone")

    names = (
        "all_reduce",
        "broadcast",
        "broadcast_object_list",
        "all_gather",
        "all_gather_object",
        "barrier",
    )
    for name in (*names, "init_process_group", "new_group", "reduce", "gather", "scatter"):
        monkeypatch.setattr(dist, name, refuse)
    train_here(tmp_path, "--steps", 2, "--predict", "x")
    flags = ["--steps", 4, "--predict", "x", "--sample_every", 3]
    run = train_here(tmp_path, *flags, pictures=True)
    checkpoint = ["--checkpoint", str(run), "--device", "cpu"]
    sample.main([*checkpoint, "--steps", "2", "--out", str(tmp_path / "grid.png")])
    sample.main([*checkpoint, "--steps", "2", "-n", "3", "--out", str(tmp_path / "many")])
    assert len(list((tmp_path / "many").glob("*.png"))) == 3


def test_the_demo_makes_no_float64_on_the_device(tmp_path, no_float64):
    """Training, the log and the grids of the demo, on a device that refuses float64."""
    flags = ["--steps", "3", "--batch", "4", "--log_every", "2", "--runs", str(tmp_path)]
    train.main([*flags, "--device", "mps"])
    assert no_float64.operations > 1000 and (tmp_path / "demo/samples/step_00000003.png").is_file()


def test_consistency_makes_no_float64_on_the_device_and_uses_no_collective(tmp_path, no_float64, monkeypatch):
    for name in ("all_reduce", "broadcast_object_list", "all_gather_object", "init_process_group"):
        monkeypatch.setattr(dist, name, lambda *args, **more: pytest.fail("a collective, alone"))
    flags = ["--steps", "2", "--batch", "4", "--runs", str(tmp_path), "--device", "mps"]
    train.main(flags)
    how = ["--checkpoint", str(tmp_path / "demo"), "-n", "4", "--batch", "4", "--device", "mps"]
    evaluate.main(["consistency", *how])
    assert (tmp_path / "demo/eval/consistency.jsonl").is_file()


def test_every_stage_imports_without_posix_modules():
    """`resource` and others are blocked; no stage names one, or a call that Windows lacks."""
    stages = "transition, model, data, sample, train, evaluate"
    block = "import sys; sys.modules.update(dict.fromkeys(['resource', 'fcntl', 'pwd', 'grp', 'termios']))"
    code, text = shell([sys.executable, "-c", f"{block}; import {stages}"])
    assert code == 0, text
    for stage in stages.split(", "):
        source = (ROOT / f"{stage}.py").read_text()
        for word in (
            "import resource",
            "fcntl",
            "os.fork",
            "os.pread",
            "posix_fadvise",
            "SIGALRM",
            "getuid",
        ):
            assert word not in source, (stage, word)


def test_the_start_warns_of_nothing(tmp_path):
    argv = command(tmp_path, "--steps", 1)
    done = subprocess.run(
        [argv[0], "-W", "error::FutureWarning", *argv[1:]], env=ENV, capture_output=True
    )
    assert done.returncode == 0 and done.stderr == b"", done.stderr


# -------------------------------------------------------------------------------------------------
# Signals, kills, faults


def wait_for_step(run, step, process):
    for _ in range(1200):
        if (run / "log.jsonl").exists() and max(losses(run), default=0) >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise TimeoutError


@pytest.mark.parametrize("ranks, number", [(0, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_ends_with_a_checkpoint(tmp_path, ranks, number):
    argv = command(tmp_path, "--steps", 100_000, "--save_every", 100_000, ranks=ranks)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(argv, env=ENV, **pipes)
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert "run again to go on" in out, err
    assert ranks or process.returncode == 130  # torchrun itself reports the signal
    (saved,) = train.checkpoints(tmp_path / "run")
    assert int(saved.name[5:]) == max(losses(tmp_path / "run"))


def test_a_signal_saves_although_nobody_reads_what_is_said(tmp_path):
    """As where Ctrl-C also ends the `tee` behind a pipe."""
    argv = command(tmp_path, "--steps", 100_000, "--save_every", 100_000)
    process = subprocess.Popen(argv, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for_step(tmp_path / "run", 3, process)
    process.stderr.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=100) == 0
    assert len(train.checkpoints(tmp_path / "run")) == 1


def test_a_second_interrupt_ends_at_once(tmp_path):
    code = """
import sys, time, train
def slow(*args):
    print("in a step", flush=True)
    time.sleep(200)
train.train_step = slow
train.main(sys.argv[1:])
"""
    argv = [sys.executable, "-c", code, *flags_of(tmp_path, "--steps", 5)]
    process = subprocess.Popen(argv, env=ENV, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "in a step" in line:
            break
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # the first waits for the step
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT


def test_a_planted_nan_stops_both_ranks_and_saves_nothing_of_it(tmp_path):
    argv = command(
        tmp_path, "--steps", 50, "--save_every", 4, ranks=2, script="tests/planted_nan.py"
    )
    code, text = shell(argv)
    assert code != 0 and "step 9: the gradient is not finite (rank 1: l = nan, t = 0." in text, text
    assert text.count("error: step 9") == 2 and max(losses(tmp_path / "run")) <= 10
    assert train.checkpoints(tmp_path / "run")[-1].name == "step_00000008"
    assert all(v.isfinite().all() for v in weights(tmp_path / "run").values())


@pytest.mark.slow
def test_kill_nine_while_writing_loses_nothing(tmp_path):
    """Ten kills at random moments of back-to-back checkpoint writing; the newest is always whole."""
    code, text = shell([sys.executable, ROOT / "tests/kill_nine.py", tmp_path], timeout=900)
    assert code == 0 and text.count("whole") == 10, text


def test_full_disk_keeps_the_older_checkpoint(tmp_path):
    """Writing fails half way, at a limit of the file size: a message, and the older one is there."""
    train_here(tmp_path, "--steps", 2)
    limit = (
        "import resource, sys, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20));"
    )
    limit += (
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.argv = sys.argv[1:];"
    )
    limit += "runpy.run_path(sys.argv[0], run_name='__main__')"
    argv = command(tmp_path, "--steps", 4)
    code, text = shell([argv[0], "-c", limit, *argv[1:]])
    said = text.strip().splitlines()[-1]
    assert code == 2 and said.startswith("error: ") and "older ones are whole" in said, text
    assert "Traceback" not in text, text
    assert [c.name for c in train.checkpoints(tmp_path / "run")] == ["step_00000002"]
    train_here(tmp_path, "--steps", 4)


def test_a_damaged_checkpoint_is_named_in_one_line(tmp_path):
    run = train_here(tmp_path, "--steps", 2)
    for part in train.checkpoints(run)[-1].glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:1000])
    code, text = shell(command(tmp_path, "--steps", 4))
    said = text.strip().splitlines()[-1]
    assert code == 2 and said.startswith("error: ") and "remove it to go on" in said, text
    assert "CheckpointException" not in said, said                              # but what torch met
    assert "Traceback" not in text, text


def test_resuming_needs_no_file_that_the_run_began_with(finished, tmp_path):
    start = tmp_path / "start.safetensors"
    shutil.copy(finished / "run" / "ema.safetensors", start)
    train_here(tmp_path, "--steps", 2, "--init", start)
    start.unlink()
    assert len(log(train_here(tmp_path, "--steps", 3, "--init", start))) == 3


def test_a_rate_that_fell_for_another_end_is_told(tmp_path, capsys):
    train_here(tmp_path, "--steps", 2, "--decay", 0.5)
    train_here(tmp_path, "--steps", 3, "--decay", 0.5)
    assert "was to end at update 2; its rate fell towards that end" in capsys.readouterr().err


def test_the_curve_is_drawn_of_a_log_that_a_crash_cut_short(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [{"config": {}}, {"step": 1, "loss_25": 2.0}, {"step": 2, "loss_25": 1.0}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 3, "los'
    (tmp_path / "log.jsonl").write_text(text)
    train.draw_curve(tmp_path)
    assert (tmp_path / "curve.png").is_file()


def test_the_rate_in_the_log_is_that_of_updates(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "write_checkpoint", lambda *args: time.sleep(3))
    run = train_here(tmp_path, "--steps", 3, "--save_every", 1, "--log_every", 1)
    assert all(line["images_per_s"] > 8 / 3 for line in log(run))


def test_what_rank_0_meets_is_raised_on_all(monkeypatch):
    def fail(problem):
        raise problem

    for problem, kind in (
        (OSError("no space"), data.UserError), (data.UserError("fix it"), data.UserError),
        (KeyError("a bug"), KeyError),
    ):  # fmt: skip
        heard = []
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "broadcast_object_list", heard.extend)
        with pytest.raises(kind):
            train.first_rank(fail, problem)
        assert heard == [str(problem)]                                          # so no rank waits for ever


def test_old_checkpoints_go_and_milestones_stay(tmp_path):
    run = train_here(tmp_path, "--steps", 8, "--save_every", 1, "--keep", 2, "--keep_every", 3)
    assert [int(c.name[5:]) for c in train.checkpoints(run)] == [3, 6, 7, 8]


# -------------------------------------------------------------------------------------------------
# A run and its record


def test_loss_falls_and_the_grid_has_its_rows(tmp_path):
    """Flow matching on the demo's pictures, for a minute's part: 5 rows of 10 labelled columns."""
    flags = (
        "--data demo --channels 1 --side 28 --classes 10 --patch 7 --steps 60 --batch 16 --lr 2e-3"
    )
    flags += " --guide_gt 1 --share_diffusion 1 --share_consistency 0"
    run = train_here(tmp_path, *flags.split(), pictures=True)
    values = list(losses(run).values())
    assert sum(values[-10:]) < 0.6 * sum(values[:10])
    with Image.open(run / "samples/step_00000060.png") as picture:
        assert picture.width > 10 * 28 and picture.height > 5 * 28


def test_a_run_leaves_what_the_readme_says(tmp_path):
    """log.jsonl: a line of the configuration, then lines with these keys; grids; curve.png."""
    flags = ["--steps", 6, "--log_every", 2, "--sample_every", 3]
    run = train_here(tmp_path, *flags, pictures=True)
    first, *lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    assert first["config"]["steps"] == 6 and {"begin", "torch", "world_size"} <= first.keys()
    always = {"step", "loss", "grad_norm", "images_per_s", "waiting", "lr"}
    for line in lines:
        assert always <= line.keys() <= always | {*train.BINS, "memory_gib"}
    assert [line["step"] for line in lines] == [2, 4, 6] and "loss_equal" in lines[0]
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        "step_00000003.png",
        "step_00000006.png",
    ]
    pytest.importorskip("matplotlib")
    with Image.open(run / "curve.png") as curve:
        assert curve.width > 300


def test_a_run_that_is_done_says_so(tmp_path, capsys):
    run = train_here(tmp_path, "--steps", 4)
    train_here(tmp_path, "--steps", 3)
    said = capsys.readouterr().out
    assert f"{run}: already at update 4" in said and len(log(run)) == 4


def test_the_checkpoint_remembers_what_the_network_predicts(tmp_path, refused):
    run = train_here(tmp_path, "--predict", "x", "--steps", 2)
    model, transport, config = sample.load(run)
    assert model.predict == "x" and config["train"]["predict"] == "x"
    x, t, y = torch.randn(2, 2, 4, 4), torch.full((2,), 0.7), torch.tensor([0, 1])
    f = sample.network_f(model, transport)(x, t, t / 2, y)
    x_hat = model(x, t, t / 2, y)
    torch.testing.assert_close(f, transition.output_from_x(transport, x_hat, x, t))
    assert (f - x_hat).abs().max() > 0.1
    said = refused(train.main, *flags_of(tmp_path, "--predict", "f", "--steps", 3))
    assert "predict = x, not f" in said


@pytest.fixture
def released(golden_model, tmp_path, monkeypatch):
    """A file like the released ones (trained on otfm, predicting f), and flags of its network."""
    sizes = {"depth": 2, "width": 48, "heads": 2, "adaln": 16}
    monkeypatch.setitem(SIZES, "demo", sizes)
    save_file(golden_model.state_dict(), tmp_path / "c2i.safetensors")
    flags = ["--channels", 4, "--classes", 10, "--steps", 1, "--guide_gt", 1, "--init"]
    return [*flags, tmp_path / "c2i.safetensors"]


def test_released_weights_are_not_trained_on_another_transport_unasked(released, tmp_path, refused):
    refuse = lambda *flags: refused(train.main, *flags_of(tmp_path, *released, *flags))
    said = refuse()
    assert (
        "trained with transport otfm" in said
        and "--transport otfm" in said
        and "--init_anyway" in said
    )
    said = refuse("--transport", "otfm", "--predict", "x")
    assert "trained with predict f" in said and "--predict f" in said
    assert not (tmp_path / "run").exists()
    start = load_file(released[-1])["x_embedder.proj.weight"]
    for name, flags in (
        ("same", ["--transport", "otfm"]),
        ("on", ["--init_anyway", "--predict", "x"]),
    ):
        run = train_here(tmp_path, *released, *flags, "--name", name, "--lr", "1e-9")
        torch.testing.assert_close(weights(run)["x_embedder.proj.weight"], start)


def test_init_with_other_classes_keeps_the_rest(released, tmp_path):
    more = ["--transport", "otfm", "--classes", 4, "--lr", "1e-9"]
    found = weights(train_here(tmp_path, *released, *more, "--classes", 4))
    old, table = load_file(released[-1]), "y_embedder.embedding_table.weight"
    assert len(found[table]) == 5
    torch.testing.assert_close(found[table][-1], old[table][-1])
    torch.testing.assert_close(found["blocks.1.attn.qkv.weight"], old["blocks.1.attn.qkv.weight"])


# -------------------------------------------------------------------------------------------------
# Configurations and refusals


def test_presets_carry_the_authors_guidance():
    want = {  # guidance, interval: of 256, 512 pixels and text; models guided in training need none
        "imagenet_b": (2.5, 0.6), "imagenet_xl": (2.5, 0.6), "imagenet_xl_512": (3.0, 0.7),
        "t2i_xl": (2.5, 1.0), "imagenet_xl_guided": (1.0, 0.6), "imagenet_xl_512_guided": (1.0, 0.7),
    }  # fmt: skip
    for name, (guidance, high) in want.items():
        config = {"train": asdict(train.PRESETS[name])}
        options = sample.sampling_options(config)
        assert options["guidance"] == guidance and options["strict"], name
        assert guidance == 1 or options["interval"] == (0.0, high), name


def test_help_prints_the_defaults_of_the_chosen_preset(capsys):
    for preset in ("demo", "t2i_xl", "cifar10"):
        with pytest.raises(SystemExit):
            train.main(["--config", preset, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        for f in fields(train.Config):
            assert f"--{f.name}" in said, f.name
        for name in ("patch", "steps", "batch", "lr", "guide_gt", "guidance_high"):
            text = {f.name: f.metadata["help"] for f in fields(train.Config)}[name]
            value = getattr(train.PRESETS[preset], name)
            assert f"{' '.join(text.split())} (default {value})" in said, (preset, name)


def test_the_network_is_that_of_the_configuration():
    cfg = replace(train.Config(), size="demo", patch=2, predict="x", interval_attention=False)
    spec = data.DataSpec("random", (3, 8, 8), classes=("a", "b"))
    network = train.network_arguments(cfg, spec)
    model = TiM(**network)
    assert (model.channels, model.patch, model.classes, model.predict) == (3, 2, 2, "x")
    assert model.blocks[0].attn.qkv_d is None
    text = replace(spec, classes=(), text={"width": 6})
    assert TiM(**train.network_arguments(cfg, text)).classes is None


def test_large_presets_run_on_noise(tmp_path):
    """--data random stands for the latents of any autoencoder, to time a preset."""
    flags = (
        "--config imagenet_xl --data random --size demo --patch 8 --batch 2 --steps 1 --no-compile"
    )
    train.main([*flags.split(), "--device", "cpu", "--runs", str(tmp_path)])
    assert [c.name for c in train.checkpoints(tmp_path / "imagenet_xl")] == ["step_00000001"]


def test_the_cifar10_preset_runs(tmp_path, monkeypatch):
    """20 updates at a demo's width on a stand-in for torchvision's set."""
    datasets = pytest.importorskip("torchvision.datasets")

    class StandIn(datasets.CIFAR10):
        def __init__(self, root, train=True, download=False):
            rng = torch.Generator().manual_seed(0)
            self.data = torch.randint(
                256, (40, 32, 32, 3), generator=rng, dtype=torch.uint8
            ).numpy()
            self.targets, self.classes = (
                [i % 10 for i in range(40)],
                [f"class {i}" for i in range(10)],
            )

    monkeypatch.setattr(datasets, "CIFAR10", StandIn)
    flags = (
        "--config cifar10 --size demo --batch 2 --steps 20 --no-compile --log_every 5 --device cpu"
    )
    monkeypatch.setattr(train, "sample_grid", no_picture)
    train.main([*flags.split(), "--runs", str(tmp_path)])
    assert len(log(tmp_path / "cifar10")) == 4
    cfg = train.PRESETS["cifar10"]
    model = sample.load(tmp_path / "cifar10")[0]
    assert (model.channels, model.patch, model.classes) == (3, cfg.patch, 10) and cfg.patch == 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("finished")
    train_here(runs, "--steps", 2)
    (runs / "tests/nothing").mkdir(parents=True)
    (runs / "file").write_text("")
    return runs


REFUSED = [
    ("--config imagenet_xxl", "invalid choice: 'imagenet_xxl'"),
    ("--lr fast", "'fast' must be a finite number"),
    ("--stepz 3", "unrecognized arguments: --stepz"),
    ("--steps 0", "argument --steps: '0' must be a whole number"),
    ("--h -1", "argument --h"),
    ("--drop 1.5", "argument --drop: '1.5' must be a number from 0 to 1"),
    ("--transport edm --tau tan", "tau 'tan' is valid for t <= 1.571, not for 'edm'"),
    ("--transport vp --time_mean 1", "--time_mean, --time_std: times of 'vp' are uniform"),
    (
        "--transport ve --time_std 1 --kernel constant",
        "times of 've' are uniform",
    ),
    ("--share_diffusion .7 --share_consistency .4", "is 1.1: at most 1"),
    ("--guide_cond 1", "--guide_cond 1: the guidance that is learned is"),
    ("--world_size 2", "--world_size: only with --dry_run"),
    ("--steps 4 --precision bf16", "train precision = fp32, not bf16"),
    ("--steps 4 --h .01", "train h = 0.001, not 0.01"),
    ("--drop 0 --guide_gt 2", "needs a dropped condition: --drop 0.1"),
    ("--accumulate 3", "--batch 8: must be a multiple of 1 ranks x 3 micro-batches; 9 is"),
    ("--replicate 2", "--replicate 2: must divide the number of ranks, 1"),
    ("--replicate 0", "argument --replicate: '0' must be a whole number"),
    ("--dry_run --replicate 2", "--replicate 2: must divide the number of ranks, 1"),
    ("--dry_run --replicate 0", "argument --replicate: '0' must be a whole number"),
    ("--dry_run --world_size 0", "argument --world_size"),
    ("--dry_run --channels 0", "give --channels, --side, and --classes or --caption"),
    ("--patch 3", "--patch 3: 4x4 must be a multiple of it; one of 1, 2, 4 fits"),
    ("--data nowhere", "--data nowhere: no such folder"),
    ("--data tests/nothing", "no pictures"),
    ("--data demo", "channels 1, the configuration asks for 2"),
    ("--data random --channels 0", "--data random: give --channels, --side"),
    ("--steps 4 --lr .5", "was trained with train lr = 0.001, not 0.5"),
    ("--steps 4 --size S", "was trained with train size = demo, not S"),
    ("--name other --init nowhere", "error: nowhere: there is no file nowhere"),
    ("--guide_low .9 --guide_high .8", "--guide_low 0.9: at most --guide_high, which is 0.8"),
    ("--guidance_low .5 --guidance_high 0", "--guidance_low 0.5: at most --guidance_high"),
    ("--transport edm", "--tau tan (tau 'tan' is valid for t <= 1.571, not for 'edm'"),
    ("--transport edm --tau identity --shift_tokens 9", "--shift_tokens 9: needs times in [0, 1]"),
    (f"--seed {2**63}", f"--seed: '{2**63}' must be a whole number"),
    ("--beta2 1", "--beta2 1: below 1"),
    ("--name other --init run --patch 1", "run does not fit the network (Error(s) in loading"),
    ("--data .", "lies in --data .; give another --runs"),
    ("--data demo --runs demo/x", "channels 1, the configuration asks for 2"),
    ("--data file", "--data file: no such folder or .tar"),
    ("--name a/b", "--name a/b: one folder name"),
    ("--name other --runs file", "Not a directory"),
    ("--name other --align 1", "features"),
    ("--device cuda", "--device cuda: not available; use --device cpu"),
]


@pytest.mark.parametrize("flags, said", REFUSED)
def test_bad_input_gets_one_line_and_leaves_nothing(finished, flags, said, refused, monkeypatch):
    """In this process, where torch is loaded already; the exit status is the shell's."""
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(finished)
    before = sorted(finished.rglob("*"))
    heard = refused(train.main, *flags_of(finished, *flags.split()))
    assert said in " ".join(heard.split())
    assert sorted(finished.rglob("*")) == before


def float_flags():
    return [f.name for f in fields(train.Config) if f.type in (float, float | None)]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_flag_takes_what_is_not_finite(value, refused):
    for name in float_flags():
        said = refused(train.main, *TINY, f"--{name}={value}")
        assert f"--{name}" in said and "finite" in said or "from 0 to 1" in said, (name, said)


def test_a_preset_gives_way_to_a_transport_without_mean_and_deviation():
    for transport in ("vp", "ve"):
        argv = ["--transport", transport, "--kernel", "constant"]
        assert train.parse_config(argv)[0].time_mean is None
        with pytest.raises(data.UserError, match="--shift_tokens 4: needs times in"):
            train.parse_config([*argv, "--shift_tokens", "4"])
    for transport, mean in (("otfm", 0.0), ("tim", 0.0), ("trigflow", None)):  # of one range, or not
        assert train.parse_config(["--transport", transport])[0].time_mean == mean


def test_only_its_own_names_are_checkpoints_of_a_run(tmp_path):
    """A copy that the user made is neither resumed from nor deleted, and other files do not matter."""
    train.main(flags_of(tmp_path, "--steps", 1))
    made = tmp_path / "run" / "checkpoints"
    shutil.copytree(made / "step_00000001", made / "step_00000001_good")
    (made / "step_notes.txt").write_text("")
    train.main(flags_of(tmp_path, "--steps", 3, "--save_every", 1, "--keep", 1, "--keep_every", 9))
    kept = ["step_00000001_good", "step_00000003", "step_notes.txt"]
    assert sorted(file.name for file in made.iterdir()) == kept


def test_settings_younger_than_a_run_do_not_stop_it(finished, tmp_path, refused):
    """Those of network and data, too; a long difference is cut in the message."""
    shutil.copytree(finished / "run", tmp_path / "run")
    file = train.checkpoints(tmp_path / "run")[-1] / "config.json"
    record = json.loads(file.read_text())
    del record["data"]["prompts"], record["model"]["rope_layout"]
    file.write_text(json.dumps(record))
    train.main(flags_of(tmp_path, "--steps", 4))
    file.write_text("{")
    shutil.rmtree(train.checkpoints(tmp_path / "run")[-1])
    said = refused(train.main, *flags_of(tmp_path, "--steps", 4))
    assert f"{file}: not valid JSON" in said
    file.write_text(json.dumps(record | {"data": record["data"] | {"classes": ["none"] * 1000}}))
    said = refused(train.main, *flags_of(tmp_path, "--steps", 4))
    assert "was trained with data classes = ['none'" in said and len(said) < 900


def test_a_stop_in_the_last_update_is_no_stop(tmp_path, capfd, monkeypatch):
    """Nothing is left to do, so nothing is asked for."""
    update, told_once = train.train_step, []

    def told(*args):
        if not told_once:
            told_once.append(os.kill(os.getpid(), signal.SIGTERM))
        return update(*args)

    monkeypatch.setattr(train, "train_step", told)
    was = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        train.main(flags_of(tmp_path, "--steps", 2))
    finally:
        for number, action in zip((signal.SIGTERM, signal.SIGINT), was):
            signal.signal(number, action)
    said = capfd.readouterr()
    assert "all 2 updates are done" in said.out and "again = end at once" in said.err


def test_missing_tensorboard_leaves_nothing(tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    said = refused(train.main, *flags_of(tmp_path, "--tensorboard", "--steps", 1))
    assert "pip install tensorboard" in said
    assert not (tmp_path / "run").exists()


def test_a_dry_run_knows_the_sets_of_the_repository(capsys):
    for preset, n in (("demo", "1,400,153"), ("emoji", "5,315,132")):
        train.main(["--config", preset, "--dry_run"])
        assert f"{n} parameters" in capsys.readouterr().out


def test_dry_run_says_what_xl_takes(capsys):
    train.main(["--config", "imagenet_xl", "--dry_run", "--world_size", "16"])
    text = capsys.readouterr().out
    assert "664,128,016 parameters in 607 tensors" in text
    assert "384,000,000 images = 299.7 epochs" in text
    lines = [line.split() for line in text.splitlines() if line.endswith("a rank")]
    sizes = {line[0]: float(line[-4]) for line in lines}
    assert sizes["weights"] == pytest.approx(664_128_016 * 4 / 16 / 2**30, abs=1e-3)
    assert sizes["optimizer"] == pytest.approx(2 * sizes["weights"], abs=2e-3)
    blocks = 28 * (1152 * 1152 * 7 + 3 * 1152 * 3072 + 1152 * 5 + 2 * 3072 + 4 * 72)  # in bf16
    assert sizes["gathered"] == pytest.approx((4 * 664_128_016 - 2 * blocks) / 2**30, abs=1e-3)
    assert 5 < sizes["activations"] < 40
    for flags, gathered, gradients in (
        ("--batch 32", 2 * blocks, 4 * 664_128_016),
        ("--batch 32 --precision fp32", 0, 4 * 664_128_016),
        ("--world_size 2 --replicate 2", 4 * 664_128_016 - 2 * blocks, 4 * 664_128_016),
        ("--world_size 4 --accumulate 2", 4 * 664_128_016 - 2 * blocks, 4 * 664_128_016),
        ("--world_size 4", 4 * 664_128_016 - 2 * blocks, 664_128_016),
    ):
        train.main(["--config", "imagenet_xl", "--dry_run", *flags.split()])
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        sizes = {line[0]: float(line[1]) for line in lines if line[-2:] == ["a", "rank"]}
        assert sizes["gathered"] == pytest.approx(gathered / 2**30, abs=1e-3), flags
        assert sizes["gradients"] == pytest.approx(gradients / 2**30, abs=1e-3), flags


def test_fp32_of_a_preset_is_of_its_size():
    precision = lambda text: train.parse_config(text.split())[0].precision
    assert precision("") == precision("--config emoji") == "fp32"
    assert precision("--data photos") == "fp32"
    assert precision("--size B") == precision("--config cifar10") == "auto"
    assert precision("--size B --precision bf16") == "bf16"
