"""Training: the step against equations by hand, many ranks, every field, presets, bad calls."""

import contextlib
import hashlib
import math
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from launch import (
    TINY, assert_same, flags_of, in_turn, log, losses, no_picture, succeed, train_here, weights
)  # fmt: skip
from oracle import lively
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import sample
import train
from model import SIZES
from transition import TRANSPORTS, network_f

CPU, FP32 = torch.device("cpu"), torch.float32
SPEC = data.Spec("pixels", (2, 4, 4), classes=("a", "b", "c"))

# --- The objective --------------------------------------------------------------------------------

PLAIN = replace(train.Config(), patch=2, h=1e-3, adaptive=False, cosine=False, drop=0.3)
GUIDANCE = {  # and other parts of the loss
    "plain": {},
    "guided": {"guide_gt": 1.7, "guide_cond": 0.4, "guide_low": 0.3, "guide_high": 0.6, "cosine": True},
    "drawn": {"guide_range": (1.5, 3.0), "guide_cond": 0.4, "adaptive": True},
}


def micro_batch(n=8, seed=0):
    x, y = torch.randn(n, 2, 4, 4, generator=data.seeded(seed)), torch.arange(n) % 3
    return train.MicroBatch(x, y, torch.full_like(y, 3))


def column(t):
    return t[:, None, None, None]


def linear_f(model):
    """The paper's f of a network on the linear path, written out."""

    def f(x_t, t, r, y):
        out = model(x_t, t, r, y)
        if model.predict == "f":
            return out
        return (x_t - column(1 - t) * out) / column(t).clamp(min=0.05) - out

    return f


def listener(f, heard):
    """f, which notes the arguments of its pass that learns: the one that is not without gradient."""

    def g(*args, **how):
        if torch.is_grad_enabled():
            heard.append(args)
        return f(*args, **how)

    return g


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("derivative", ["dde", "jvp"])
@pytest.mark.parametrize(
    "predict, tangent",
    [("f", "data"), ("x", "data"), ("f", "network"), ("x", "network"), ("x", "average")],
)
def test_the_objective_is_the_papers_equation(derivative, predict, tangent, guidance):
    """The loss against Eq. 9 written out for the linear path, with df/dt by autograd in float64. With
    guidance, data and noise change places with the pair that has the guided velocity and the same x_t."""
    switches = {"derivative": derivative, "tangent": tangent, "predict": predict, "weight_sigma": 0.6}
    cfg = replace(PLAIN, transport="otfm", **switches, **GUIDANCE[guidance])
    known = {"channels": 2, "classes": 3, "predict": predict, "guide_range": cfg.guide_range or None}
    model, average = (lively(seed, **known).double() for seed in (0, 1))
    transport, n, heard = TRANSPORTS["otfm"], 24, []
    x, y, null, _ = micro_batch(n)
    x = x.double()
    f, f_ema = (network_f(m, transport, predict) for m in (model, average))
    rng = data.seeded(1)
    loss, metrics = train.objective(listener(f, heard), f_ema, transport, cfg, x, y, null, rng)

    ((x_t, t, r, shown),) = heard
    f, f_ema, t, r = linear_f(model), linear_f(average), t.double(), r.double()
    assert torch.equal(metrics["t"].double(), t) and torch.equal(metrics["r"].double(), r)
    assert (t[:12] == r[:12]).all() and (t[12:] > r[12:]).all()
    label, w, none = shown, 1.7, null
    if cfg.guide_range:
        (label, w), none = shown, (null, shown[1])
        assert ((w == 1) | ((1.5 <= w) & (w <= 3.0))).all() and len(w.unique()) > n / 2
        w = column(w.double()) * (1 - 0.4)
    dropped = label == 3
    assert 0 < dropped.sum() < n and (label == torch.where(dropped, 3, y)).all()
    eps = (x_t - column(1 - t) * x) / column(t)
    velocity = eps - x
    if guidance != "plain":
        f_cond, f_null = f_ema(x_t, t, t, shown), f_ema(x_t, t, t, none)
        guided = w * velocity + 0.4 * f_cond + (1 - w - 0.4) * f_null
        inside = ~dropped & (cfg.guide_low <= t) & (t <= cfg.guide_high)
        assert 0 < inside.sum() < n
        velocity = torch.where(column(inside), guided, velocity)
    slope = velocity
    if tangent != "data":
        slope = (f if tangent == "network" else f_ema)(x_t, t, t, shown)
    with sdpa_kernel(SDPBackend.MATH):
        out, df_dt = torch.func.jvp(
            lambda s: f(x_t + column(s - t) * slope, s, r, shown), (t,), (torch.ones_like(t),)
        )
    target = velocity - column(t - r) * df_dt
    want = (out - target).square().mean((1, 2, 3))
    if cfg.cosine:
        want += (1 - torch.cosine_similarity(out, target, dim=1, eps=1e-2)).mean((1, 2))
    divided = want / (want + 1e-5) if cfg.adaptive else want
    weight = torch.where(t == r, 1.0, (0.6 + torch.tan(t) - torch.tan(r)).rsqrt())
    near = dict(rtol=2e-3, atol=5e-4, check_dtype=False)
    torch.testing.assert_close(metrics["loss"], want, **near)
    torch.testing.assert_close(loss, (weight * divided).mean(), **near)


def draw(cfg, n=4000, seed=0):
    """The pass that learns of an objective whose network is 0: x_t, t, r, y."""
    heard, f = [], lambda x_t, t, r, y: 0 * x_t
    x, y, null = torch.ones(n, 1, 2, 2), torch.zeros(n).long(), torch.ones(n).long()
    transport = TRANSPORTS[cfg.transport]
    _, metrics = train.objective(listener(f, heard), f, transport, cfg, x, y, null, data.seeded(seed))
    assert metrics["loss"].isfinite().all()
    return heard[0]


def test_shares_of_times_conditions_and_guidance_are_those_asked_for():
    shares = {"share_diffusion": 0.4, "share_consistency": 0.25, "drop": 0.2}
    _, t, r, (y, w) = draw(replace(PLAIN, **shares, guide_range=(1.5, 3.0)))
    for found, want in ((t == r, 0.4), (r == 0, 0.25), (y == 1, 0.2), (w == 1, 0.1)):
        assert float(found.float().mean()) == pytest.approx(want, abs=0.025)  # three deviations
    assert w[w > 1].log().mean() == pytest.approx(math.log(1.5 * 3.0) / 2, abs=0.02)


def test_the_alignment_loss_is_added_and_logged(tmp_path):
    """1 - the mean cosine of a picture's tokens and features; a line of the log has its average."""
    cfg, (x, y, null, _) = replace(PLAIN, align=0.5), micro_batch()
    model, transport = lively(channels=2, classes=3, projector=(1, 8, 6)), TRANSPORTS["tim"]
    features, seen = torch.randn(8, 4, 6, generator=data.seeded(2)), []
    model.projector.register_forward_hook(lambda module, args, out: seen.append(out))
    f = network_f(model, transport, "f")
    loss, metrics = train.objective(f, f, transport, cfg, x, y, null, data.seeded(1), features)
    want = 1 - torch.cosine_similarity(seen[-1], features, dim=2).mean(1)
    torch.testing.assert_close(metrics["alignment"], want)
    plain = replace(cfg, align=0.0)
    plain, _ = train.objective(f, f, transport, plain, x, y, null, data.seeded(1))
    torch.testing.assert_close(loss, plain + 0.5 * want.mean())

    written = train.Log(tmp_path, replace(cfg, steps=1), transport, CPU, 0, {})
    written.add(torch.ones(()), metrics, 0.0)
    written.flush()
    (line,) = log(tmp_path)
    assert line["alignment"] == pytest.approx(float(want.mean()), rel=1e-5)
    assert line["loss"] == pytest.approx(float(metrics["loss"].mean()), rel=1e-5)


# --- The update -----------------------------------------------------------------------------------


def build(*flags, **changes):
    """A configuration and its networks, on a CPU, of SPEC."""
    cfg = replace(train.parse_config(flags_of("unused", *flags))[0], h=1e-3, precision="fp32", **changes)
    return cfg, train.build(cfg, train.network_arguments(cfg, SPEC), CPU)


def update(cfg, networks, step, parts):
    return train.train_step(networks, TRANSPORTS[cfg.transport], cfg, SPEC, step, parts)


def noting(networks, found):
    """A hook of the optimizer that notes the gradients it is given."""
    return lambda *args: found.append([p.grad.double() for p in networks.model.parameters()])


def test_an_update_is_adamw_with_clipping_warm_up_fall_and_average():
    """Eight updates against the equations of AdamW and of the average, written out in float64."""
    cfg, networks = build(
        "--steps", 8, "--warmup", 3, "--decay", 0.5, "--lr", 0.01, "--beta2", 0.8, "--clip", 0.1,
        "--weight_decay", 0.3, "--ema", 0.4,
    )  # fmt: skip
    rates = [1 / 3, 2 / 3, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4]  # three of warm-up, the last four fall
    averages = [1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 0.4, 0.4, 0.4]  # (1 + n) / (10 + n), or less
    given = []
    networks.optimizer.register_step_pre_hook(noting(networks, given))
    weights = [p.detach().double().clone() for p in networks.model.parameters()]
    average = [p.clone() for p in weights]
    m, v = ([torch.zeros_like(p) for p in weights] for _ in range(2))
    for step, (rate, decay) in enumerate(zip(rates, averages), 1):
        norm, _ = update(cfg, networks, step - 1, [micro_batch(seed=step)])
        (grads,) = given
        given.clear()
        after = math.sqrt(sum(float(g.square().sum()) for g in grads))
        assert after == pytest.approx(min(float(norm), 0.1), rel=1e-4) and norm > 0.1
        for k, g in enumerate(grads):
            m[k] = 0.9 * m[k] + 0.1 * g
            v[k] = 0.8 * v[k] + 0.2 * g**2
            direction = m[k] / (1 - 0.9**step) / ((v[k] / (1 - 0.8**step)).sqrt() + 1e-6)
            weights[k] = weights[k] * (1 - 0.01 * rate * 0.3) - 0.01 * rate * direction
            average[k] = decay * average[k] + (1 - decay) * weights[k]
        for net, want in ((networks.model, weights), (networks.ema, average)):
            for p, q in zip(net.parameters(), want, strict=True):
                torch.testing.assert_close(p.detach().double(), q, rtol=1e-4, atol=2e-6)


def test_the_rate_is_that_of_the_log_and_without_a_fall_constant(tmp_path):
    run = train_here(tmp_path, "--steps", 4, "--warmup", 2, "--lr", 1e-3)
    assert [line["lr"] for line in log(run)] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])


def test_slots_draw_different_noise_times_and_drops(monkeypatch):
    """A rank draws what the micro-batch of its number draws in a process alone."""
    cfg, networks = build()
    part = micro_batch()
    draws = lambda step, parts: update(cfg, networks, step, parts)[1]["t"]
    alone = draws(3, [part, part])
    assert (alone[:8] != alone[8:]).all() and (draws(4, [part]) != alone[:8]).all()
    monkeypatch.setattr(data, "ranks", lambda: (1, 2))
    assert torch.equal(draws(3, [part]), alone[8:])


def test_accumulation_is_the_mean_of_its_micro_batches(monkeypatch):
    parts, found = [micro_batch(seed=1), micro_batch(seed=2)], []
    for rank, own in ((0, parts), (0, parts[:1]), (1, parts[1:])):  # both, then each by its slot
        cfg, networks = build("--clip", 1e9)
        networks.optimizer.register_step_pre_hook(noting(networks, found))
        monkeypatch.setattr(data, "ranks", lambda rank=rank: (rank, 1))
        update(cfg, networks, 5, own)
    for whole, a, b in zip(*found, strict=True):
        torch.testing.assert_close(whole, (a + b) / 2, rtol=1e-4, atol=1e-7)


def test_the_seed_is_of_weights_noise_times_and_order(tmp_path, monkeypatch):
    """Each by itself: of the same weights and pictures other times are drawn, and so on."""
    (cfg, networks), (_, other) = build("--seed", 0), build("--seed", 1)
    table = lambda networks: networks.model.y_embedder.embedding_table.weight
    assert (table(networks) != table(other)).all()
    times = [update(replace(cfg, seed=k), networks, 0, [micro_batch()])[1]["t"] for k in (0, 1, 0)]
    assert (times[0] != times[1]).all() and torch.equal(times[0], times[2])

    monkeypatch.chdir(photos(tmp_path))
    own = "--data photos --channels 0 --classes 0 --side 8 --no-mirror --steps 1".split()
    monkeypatch.setattr(train, "draw_grid", no_picture)
    shown = []
    for k in (0, 1, 0):  # what the network is fed: pixels as they are, in the order of the stream
        run = train_here(tmp_path / f"{len(shown)}", *own, "--seed", k, pictures=True)
        shown.append((run / "samples/data.png").read_bytes())
    assert shown[0] != shown[1] and shown[0] == shown[2]


def test_checkpointing_recomputes_and_compiling_compiles(monkeypatch):
    """Neither changes a number, so that no other test would notice their absence."""
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *args, **how: calls.append("compiled"))
    for flags in ("", "--checkpointing", "--compile"):
        _, networks = build(*flags.split())
        for block in networks.model.blocks:
            block.mlp.register_forward_hook(lambda *args: calls.append("block"))
        x, y, _, _ = micro_batch()
        networks.model(x, torch.ones(8), torch.zeros(8), y).sum().backward()
    depth = SIZES["demo"]["depth"]  # passes: 1, then 2, then 1; compiled: network and average
    assert calls.count("block") == 4 * depth and calls.count("compiled") == 2 * depth


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("derivative", ["dde", "jvp"])
def test_a_step_does_not_wait_for_the_gpu(precision, derivative, tmp_path):
    """Every switch that adds work, micro-batches of which part has r = t by chance, the log."""
    switches = "--tangent network --predict x --guide_cond .5 --share_diffusion .3 --guide_low .2"
    argv = flags_of("unused", "--derivative", derivative, *switches.split(), "--precision", precision)
    cfg, device = replace(train.parse_config(argv)[0], h=0.01), torch.device("cuda", 0)
    networks = train.build(cfg, train.network_arguments(cfg, SPEC), device)
    parts = [train.MicroBatch(*(part.to(device) for part in micro_batch(5, k)[:3])) for k in (0, 1)]
    written = train.Log(tmp_path, cfg, TRANSPORTS[cfg.transport], device, 0, {})
    written.add(*update(cfg, networks, 0, parts), 0.0)  # loads kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        written.add(*update(cfg, networks, 1, parts), 0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    written.flush()
    assert log(tmp_path)[-1]["step"] == 2


# --- Ranks ----------------------------------------------------------------------------------------

GUIDED = ["--guide_gt", 1.5, "--steps", 12]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """12 updates of one process with four micro-batches: the draws of four ranks."""
    flags = [*GUIDED, "--accumulate", 4, "--save_every", 4, "--keep", 9]
    return train_here(tmp_path_factory.mktemp("reference"), *flags)


def test_four_ranks_walk_like_one(reference, tmp_path):
    """With copies of shards and recomputed activations, too: the same losses and weights."""
    flags = ["--replicate", 2, "--checkpointing", "--name", "four"]
    in_turn(tmp_path, 4, [flags_of(tmp_path, *GUIDED, *flags)])
    one, four = losses(reference), losses(tmp_path / "four")
    assert len(four) == 12 and abs(four[1] - four[12]) > 0.1
    assert max(abs(one[s] - four[s]) for s in one) < 1e-5
    assert_same(weights(reference), weights(tmp_path / "four"), atol=1e-5, rtol=1e-5)


# Everything that 2 ranks do, in one start of them: (name, flags), each with 3 updates.
BOTH = "--predict x --tangent network --guide_gt 1 --guide_cond .5 --steps 3".split()
SHARDED = {
    "dde": BOTH,
    "average": [*BOTH, "--tangent", "average", "--guide_cond", 0],
    "jvp": [*BOTH, "--derivative", "jvp"],
    "range": [*BOTH, "--guide_range", 1, 2.5],
    "captions dde": [*BOTH, "--classes", 0, "--transport", "otfm"],
    "captions jvp": [*BOTH, "--classes", 0, "--derivative", "jvp", "--transport", "trigflow"],
    "compiled": [*BOTH, "--compile", "--checkpointing"],
}
HALF = {name: [*SHARDED[name], "--precision", "bf16"] for name in ("jvp", "captions dde")}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The folder of runs that 2 ranks made in turn, and what each rank was refused."""
    runs = tmp_path_factory.mktemp("two")
    first = ["--guide_gt", 1.5, "--name", "moved", "--accumulate", 4, "--keep", 9]
    train_here(runs, *first, "--steps", 4)
    succeed(runs, *first, "--steps", 8)
    lines = [flags_of(runs, *GUIDED, "--name", "moved", "--accumulate", 2)]
    lines += [flags_of(runs, *flags, "--name", name) for name, flags in SHARDED.items()]
    lines += [flags_of(runs, *flags, "--name", f"{name}, bf16") for name, flags in HALF.items()]
    lines += [flags_of(runs, "--batch", 7, "--name", "odd"), flags_of(__file__, "--steps", 2)]
    lines += [["told", *flags_of(runs, "--steps", 9, "--name", "told")]]
    lines += [["apart", *flags_of("runs", "--steps", 2)]]
    lines += [["--config", "imagenet_xl", "--runs", str(runs), "--device", "cpu"]]
    return runs, in_turn(runs, 2, lines, pictures=True)[0]


def test_resume_is_exact_and_moves_between_world_sizes(reference, two_ranks):
    """Four updates, four of a new process, bit for bit; then four of two ranks."""
    moved, place = two_ranks[0] / "moved", "checkpoints/step_00000008"
    assert [losses(moved)[s] for s in range(1, 9)] == [losses(reference)[s] for s in range(1, 9)]
    assert_same(weights(reference / place), weights(moved / place), atol=0, rtol=0)
    assert_same(weights(reference), weights(moved), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SHARDED)
def test_switches_train_sharded_as_alone(two_ranks, tmp_path, name):
    """With guidance in the target or as a condition; classes, captions; DDE, JVP; compiled; in bf16
    they come close."""
    plain = ["--no-compile", "--no-checkpointing", "--accumulate", 2]
    alone = train_here(tmp_path, *SHARDED[name], *plain)
    sharded, half = two_ranks[0] / name, two_ranks[0] / f"{name}, bf16"
    assert losses(sharded) == pytest.approx(losses(alone), rel=1e-4 if name == "compiled" else 2e-5)
    if name in HALF:
        assert losses(half) == pytest.approx(losses(alone), rel=0.02)
        assert losses(half) != losses(alone)
    assert_same(weights(alone), weights(sharded), atol=2e-5, rtol=1e-4)
    model, _, config = sample.load(sharded)
    assert model.predict == config["model"]["predict"] == config["train"]["predict"] == "x"


def test_a_signal_to_one_rank_stops_and_saves_all(two_ranks):
    told = two_ranks[0] / "told"
    assert [c.name for c in train.checkpoints(told)] == ["step_00000003"] and max(losses(told)) == 3


def test_bad_input_stops_every_rank(two_ranks):
    """So do folders that are not the same: half a checkpoint on each machine would load nowhere. The
    message about a missing set gives the command that prepares it."""
    runs, (first, second) = two_ranks
    assert first == second and len(first) == 4
    batch, file, apart, absent = first
    assert "--batch 7" in batch and __file__ in file and "same folder" in apart
    for part in ("data.py prepare", "--out latents/imagenet256", "--autoencoder sd-vae", "--size 256"):
        assert part in absent
    assert not (runs / "odd").exists() and not (runs / "imagenet_xl").exists()
    assert not list(runs.glob("*.apart*/runs/run/checkpoints/*"))


@contextlib.contextmanager
def group(world_size=1, rank=0):
    """A process group: of one, which computes, or of more, whose collectives do nothing."""
    kind, store = "gloo", dist.HashStore()
    if world_size > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        kind, store = "fake", FakeStore()
    dist.init_process_group(kind, store=store, rank=rank, world_size=world_size)
    try:
        yield dist.init_device_mesh("cpu", (world_size,))
    finally:
        dist.destroy_process_group()


LOW = replace(train.Config(), size="demo", patch=2, precision="bf16")
NETWORK = {"channels": 2, "patch": 2, **SIZES["demo"], "classes": 3}


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "alone"])
def test_bf16_casts_weights_and_no_inputs(sharded):
    """Attention and MLP compute in bf16; times, the residual stream, c, d and adaLN stay fp32."""
    with group() if sharded else contextlib.nullcontext() as mesh:
        networks = train.build(replace(LOW, precision="fp32") if sharded else LOW, NETWORK, CPU)
        model, ema = networks.model, networks.ema
        if sharded:
            model, ema = (train.shard(m, mesh, LOW, m is model) for m in (model, ema))
        block, seen = model.blocks[1], {}
        note = lambda name: lambda module, inputs: seen.update({name: inputs[0].dtype})
        made = lambda name: lambda module, inputs, out: seen.update({name: out.dtype})
        of_block = lambda module, inputs: seen.update(block={v.dtype for v in inputs[:3]})
        block.register_forward_pre_hook(of_block)
        block.attn.proj.register_forward_pre_hook(note("attention"))
        block.attn.q_norm.register_forward_hook(made("q"))
        block.mlp.fc2.register_forward_hook(made("mlp"))
        block.adaLN_modulation.fc2.register_forward_hook(made("adaLN"))
        ema.blocks[0].mlp.fc2.register_forward_hook(made("average"))
        keep = lambda module, inputs: seen.update(t=inputs[0].clone())
        model.t_embedder.register_forward_pre_hook(keep)
        t, low = torch.tensor([0.9013, 0.5007]), torch.bfloat16
        inputs = micro_batch(2).x, t, t * 0.3, torch.tensor([0, 1])
        f = model(*inputs)
        ema(*inputs)
        assert torch.equal(seen.pop("t"), t) and f.dtype == FP32 and seen.pop("average") == low
        assert seen == {"block": {FP32}, "attention": low, "q": low, "mlp": low, "adaLN": FP32}
        f.sum().backward()  # reshards
        assert all(p.dtype == p.grad.dtype == FP32 for p in model.parameters())  # the masters


def test_bf16_alone_is_what_fsdp_computes():
    """Output and gradients of two micro-batches: in bf16 bit for bit."""
    alone = train.build(LOW, NETWORK, CPU).model
    state = lively(**NETWORK).state_dict()
    alone.load_state_dict(state)
    with group() as mesh:
        sharded = train.build(replace(LOW, precision="fp32"), NETWORK, CPU).model
        sharded.load_state_dict(state)
        sharded = train.shard(sharded, mesh, LOW, True)
        for k in range(2):
            (x, y, _, _), t = micro_batch(2, k), torch.tensor([0.2, 0.9])
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
            assert (a.grad - b.grad.to_local()).abs().max() <= exact * a.grad.abs().max(), name


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_trains_is_gathered_once_an_update(monkeypatch, accumulate):
    """A micro-batch is three passes of the network, one of its average, which has no backward."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    calls, gather = [], groups.foreach_all_gather
    monkeypatch.setattr(groups, "foreach_all_gather", lambda *a: calls.append(1) or gather(*a))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with group(2):
        cfg, networks = build("--tangent", "network")
        units = 2 * len(networks.model.blocks) + 1
        update(cfg, networks, 0, [micro_batch()] * accumulate)
        assert len(calls) == (1 + accumulate) * units
        assert all(isinstance(p, DTensor) for p in networks.model.parameters())  # resharded


@pytest.mark.parametrize("world_size, replicate", [(2, 1), (16, 1), (16, 4)])
def test_every_rank_holds_its_share(monkeypatch, world_size, replicate):
    """Parameters, and with them gradients, optimizer and average, at XL's shapes: total / shards."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    cfg = replace(train.Config(), size="XL", replicate=replicate)
    network = {"channels": 4, "patch": 2, **SIZES["XL"] | {"depth": 2}, "classes": 1000}
    with group(world_size):
        model = train.build(cfg, network, CPU).model
        total = sum(p.numel() for p in model.parameters())
        held = sum(p.to_local().numel() for p in model.parameters())
        assert held * world_size / replicate / total == pytest.approx(1, abs=0.05)


def test_what_rank_0_meets_is_raised_on_all(monkeypatch):
    """So no rank waits for ever."""

    def fail(problem):
        raise problem

    for problem in (OSError("no space"), data.UserError("fix it")):
        heard = []
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "broadcast_object_list", heard.extend)
        with pytest.raises(data.UserError):
            data.first_rank(fail, problem)

        def hear(said, told=heard):
            said[:] = told

        with monkeypatch.context() as patch:
            patch.setattr(data, "ranks", lambda: (1, 2))
            patch.setattr(dist, "broadcast_object_list", hear)
            with pytest.raises(data.UserError, match=str(problem)):
                data.first_rank(fail, problem)
    with pytest.raises(KeyError):
        data.first_rank(fail, KeyError("a fault of the code"))


# --- Every field of the configuration -------------------------------------------------------------

SAME = {  # fields that change how or where a run computes, not what: what shows that they work
    "device": "tests with a GPU, and a bad call without one",
    "replicate": "test_every_rank_holds_its_share, test_four_ranks_walk_like_one",
    "checkpointing": "test_checkpointing_recomputes_and_compiling_compiles",
    "compile": "test_checkpointing_recomputes_and_compiling_compiles, test_switches...",
}
OWN = "--channels 0 --classes 0 --side 8 --data "
PHOTOS, TEXTS, GEMMA = OWN + "photos", OWN + "texts", OWN + "texts --text_encoder gemma"
NATIVE = "--channels 0 --classes 0 --side 0 --data native"
ALIGNED = PHOTOS + " --align 1 --align_depth 1 --align_encoder dino"
CHANGES = {  # field: flags that change it; or flags of both runs, and those that change it
    "data": (PHOTOS, "--data others"), "text_encoder": (TEXTS, "--text_encoder gemma"),
    "autoencoder": (PHOTOS, "--autoencoder sd-vae"), "mirror": (PHOTOS, "--no-mirror"),
    "channels": "--channels 1", "side": "--side 8", "classes": "--classes 4",
    "caption": (TEXTS, "--caption 7"), "size": "--size emoji", "patch": "--patch 1",
    "predict": "--predict x", "shared_time": "--shared_time",
    "interval_attention": "--no-interval_attention", "caption_mask": (GEMMA, "--no-caption_mask"),
    "rope_layout": (NATIVE, "--rope_layout released"), "transport": "--transport otfm",
    "share_diffusion": "--share_diffusion .25", "share_consistency": "--share_consistency .5",
    "time_mean": "--time_mean 1", "time_std": "--time_std .5", "diffusion_at": "--diffusion_at one",
    "shift_tokens": "--shift_tokens 2", "derivative": "--derivative jvp",
    "tangent": "--tangent average", "h": "--h .05", "tau": "--tau identity",
    "kernel": "--kernel square", "weight_sigma": "--weight_sigma 2", "cosine": "--cosine",
    "adaptive": "--no-adaptive", "guide_gt": "--guide_gt 1.5", "guide_cond": "--guide_cond .5",
    "guide_range": ("--guide_gt 1", "--guide_range 1.5 3"), "guide_low": "--guide_low .5",
    "guide_high": "--guide_high .5", "align": (ALIGNED, "--align .5"),
    "align_depth": (ALIGNED, "--align_depth 2"), "align_encoder": (ALIGNED, "--align_encoder dino2"),
    "drop": "--drop .5", "init": "--init start.safetensors", "steps": "--steps 3", "batch": "--batch 4",
    "init_anyway": ("--init start.safetensors --predict x", "--init_anyway"),
    "accumulate": "--accumulate 2", "lr": "--lr 2e-3", "warmup": "--warmup 2", "decay": "--decay .5", "beta2": "--beta2 .9",
    "weight_decay": "--weight_decay .1", "clip": "--clip .1", "ema": "--ema .05",
    "precision": "--precision bf16", "config": ("--guidance 2", "--config imagenet_xl"),
    "name": "--name other", "runs": "--runs {0}/elsewhere", "seed": "--seed 1", "log_every": "--log_every 2",
    "save_every": "--save_every 2", "keep": ("--save_every 1", "--keep 3"),
    "keep_every": ("--save_every 1 --keep 1", "--keep_every 2"), "sample_every": "--sample_every 2",
    "guidance": "--guidance 2", "interval": ("--guidance 2", "--interval .6 .9"),
    "strict_interval": ("--guidance 2", "--strict_interval"),
}  # fmt: skip
REFUSES = {"autoencoder": (0, 1), "caption": (0, 1), "init_anyway": (1, 0)}  # runs that are refused


def photos(place, name="photos", seed=0) -> Path:
    """place/NAME: a dozen pictures of noise, half of them wide, half tall, of two classes."""
    rng = np.random.default_rng(seed)
    for i in range(12):
        folder = place / name / ("cat" if i % 4 < 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        shape = (24, 40) if i % 2 else (40, 24)
        pixels = rng.integers(256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(shape[::-1], Image.NEAREST).save(folder / f"{i}.png")
    return place


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """flags -> what a run of a tiny network did, in a folder with all that its flags may name: losses
    and other logged values, weights, files, what it would draw; or that it was refused."""
    place, traces, drawn = photos(tmp_path_factory.mktemp("walk")), {}, []
    photos(place, "others", seed=1)
    shutil.copytree(place / "photos", place / "texts")
    for file in (place / "texts").rglob("*.png"):
        file.with_suffix(".txt").write_text(f"a {'very ' * (len(traces) % 3)}small {file.stem}")

    def draw(sampler, columns, steps, seed, path):
        path.touch()
        drawn.append(sampler.latents([0, 1], [0, 1], 2, seed=0))

    def trace(flags):
        runs = f"runs{len(traces)}"
        drawn.clear()
        with inside():
            try:
                flags = f"--runs {runs}/runs --steps 4 --sample_every 4 {flags}"
                train.main([*TINY, *flags.format(runs).split()])
            except data.UserError:
                return {}
        (written,) = (place / runs).rglob("log.jsonl")
        times, sha = {"images_per_s", "waiting"}, hashlib.sha256()
        for name, tensor in weights(written.parent).items():
            sha.update(name.encode() + tensor.numpy().tobytes())
        return {
            "log": [{k: v for k, v in line.items() if k not in times} for line in log(written.parent)],
            "weights": sha.hexdigest(), "drawn": [x.numpy().tobytes() for x in drawn],
            "files": sorted(str(f.relative_to(place / runs)) for f in (place / runs).rglob("*")),
        }  # fmt: skip

    def run(flags, again=False):
        if again or flags not in traces:
            traces[flags + again * " "] = trace(flags)
        return traces[flags + again * " "]

    @contextlib.contextmanager
    def inside():
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            patch.setitem(SIZES, "demo", dict(depth=2, width=32, heads=2, adaln=16))
            patch.setitem(SIZES, "emoji", dict(depth=2, width=48, heads=2, adaln=16))
            patch.setattr(train, "draw_grid", draw)
            patch.setattr(train, "draw_curve", no_picture)
            yield

    with inside():
        with contextlib.suppress(pytest.skip.Exception):
            tiny.save_gemma("gemma")
            tiny.save_dino("dino")
            shutil.copytree("dino", "dino2")
            state = load_file("dino2/model.safetensors")
            save_file({k: 1.5 * v for k, v in state.items()}, "dino2/model.safetensors", {"format": "pt"})
        data.main("prepare --images photos --out native --native --size 16 --patch 2".split())
        train.main([*TINY, "--runs", "first", "--steps", "2"])
        os.rename("first/run/ema.safetensors", "start.safetensors")
    return run


def test_every_field_of_the_configuration_is_listed():
    """A new one: what does it change? It is listed with a value that shows it, or with the reason."""
    assert sorted([*CHANGES, *SAME]) == sorted(f.name for f in fields(train.Config))


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_changes_the_run(walk, name):
    if "gemma" in str(CHANGES[name]) or "dino" in str(CHANGES[name]):
        pytest.importorskip("transformers")
    base, change = CHANGES[name] if isinstance(CHANGES[name], tuple) else ("", CHANGES[name])
    assert f"--{name} " in change + " " or f"--no-{name}" in change
    without, with_it = walk(base), walk(f"{base} {change}")
    assert (not without, not with_it) == REFUSES.get(name, (False, False))
    assert without != with_it


def test_the_same_flags_do_the_same_and_how_it_is_computed_changes_nothing(walk):
    """Or the test above would show nothing."""
    assert walk("") == walk("", again=True) == walk("--checkpointing")


# --- Presets --------------------------------------------------------------------------------------

RECIPES = {  # of the authors: depth, width, heads, adaLN, patch; channels, side; times; batch, rate,
    "imagenet_b": ((12, 768, 12, 256), 4, (4, 32), (-0.4, 1.0), 1024, 4e-4, 100_000, 2.5, 0.6),
    "imagenet_xl": ((28, 1152, 16, 384), 2, (4, 32), (-0.4, 1.0), 512, 2e-4, 750_000, 2.5, 0.6),
    "imagenet_xl_512": ((28, 1152, 16, 384), 1, (32, 16), (-0.4, 1.0), 512, 2e-4, 750_000, 3.0, 0.7),
    "t2i_xl": ((28, 1152, 16, 384), 1, (32, 16), (0.0, 1.6), 2048, 4e-4, 500_000, 2.5, 1.0),
}  # updates; guidance of sampling and the end of its interval, ends left out
COMMON = {
    "share_diffusion": 0.5, "share_consistency": 0.1, "derivative": "dde", "tangent": "data",
    "predict": "f", "tau": "tan", "kernel": "sqrt", "weight_sigma": 1.0, "cosine": True,
    "adaptive": True, "drop": 0.1, "beta2": 0.95, "weight_decay": 0.01, "warmup": 0, "decay": 0.0,
    "clip": 1.0, "ema": 0.9999, "diffusion_at": "later", "shift_tokens": 0, "shared_time": False,
    "interval_attention": True, "strict_interval": True, "save_every": 5_000, "keep_every": 50_000,
}  # fmt: skip


@pytest.mark.parametrize("name", [*RECIPES, "imagenet_xl_guided", "imagenet_xl_512_guided"])
def test_presets_are_the_authors_recipes(name):
    """Written out from their configurations; milestones are ours."""
    cfg, known = train.PRESETS[name], name.removesuffix("_guided")
    sizes, patch, data_of, times, batch, lr, steps, guidance, high = RECIPES[known]
    assert tuple(SIZES[cfg.size].values()) == sizes and cfg.patch == patch
    assert (cfg.channels, cfg.side) == data_of and cfg.classes == (0 if name == "t2i_xl" else 1000)
    default = TRANSPORTS[cfg.transport]
    found = [own if own is not None else of for own, of in
             ((cfg.time_mean, default.mean), (cfg.time_std, default.std))]  # fmt: skip
    assert tuple(found) == times and (cfg.batch, cfg.lr, cfg.steps) == (batch, lr, steps)
    in_target = (cfg.guide_gt, cfg.guide_cond, cfg.guide_low, cfg.guide_high)
    if name != known:  # guided in the target; sampled without
        guidance = 1.0
        assert in_target == (1.0, 0.75, 0.3, 0.8)
    else:
        assert in_target[:2] == (1.0, 0.0) and not cfg.guide_range
    assert cfg.guidance == guidance and cfg.interval == (0.0, high)
    assert {field: getattr(cfg, field) for field in COMMON} == COMMON


PARAMETERS = {  # and tensors, as published
    "imagenet_b": (128_828_224, 271), "imagenet_xl": (664_128_016, 607),
    "imagenet_xl_512": (664_164_896, 607), "t2i_xl": (864_978_080, 894),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_dry_run_is_exact_arithmetic(name, capsys):
    """Parameters as published; fp32 weights, their average and AdamW's two, each over the shards."""
    n, tensors = PARAMETERS[name]
    for flags, shards, whole in (
        ("--world_size 16 --accumulate 1", 16, False),
        ("--world_size 16 --replicate 4", 4, False),
        ("--world_size 4 --accumulate 2", 4, True),  # gradients are whole until they are summed
    ):
        train.main(["--config", name, "--dry_run", *flags.split()])
        text = capsys.readouterr().out
        assert f"{n:,} parameters in {tensors} tensors" in text
        assert "--precision bf16" in text or torch.cuda.is_available()  # planned where no GPU is
        lines = [line.split() for line in text.splitlines() if line.endswith("a rank")]
        sizes = {line[0]: float(line[1]) for line in lines}
        weights = 4 * n / shards / 2**30
        gradients = 4 * n / 2**30 if whole else weights
        want = {"weights": weights, "average": weights, "optimizer": 2 * weights, "gradients": gradients}
        want["total"] = sum(want.values())
        assert sizes == pytest.approx(want, abs=1e-3)
        if name != "imagenet_xl":
            return
        assert "384,000,000 images = 299.7 epochs" in text and "256 tokens" in text


def test_help_prints_the_defaults_of_the_chosen_preset(capsys):
    for preset in ("demo", "t2i_xl", "cifar10"):
        with pytest.raises(SystemExit):
            train.main(["--config", preset, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        for f in fields(train.Config):
            assert f"--{f.name}" in said, f.name
        for name in ("patch", "steps", "batch", "lr", "guide_gt"):
            text = {f.name: f.metadata["help"] for f in fields(train.Config)}[name]
            value = getattr(train.PRESETS[preset], name)
            assert f"{' '.join(text.split())} (default {value})" in said, (preset, name)


# --- Bad calls ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("finished")
    train_here(runs, "--steps", 2)
    (runs / "nothing").mkdir()
    (runs / "file").write_text("")
    return runs


REFUSED = {  # flags: what the one line must name
    "--config imagenet_xxl": "--config", "--lr fast": "--lr", "--stepz 3": "--stepz",
    "--steps 0": "--steps", "--h -1": "--h", "--drop 1.5": "--drop", "--beta2 1": "--beta2",
    "--transport edm --tau tan": "--tau", "--transport edm": "--transport",
    "--transport edm --tau identity --shift_tokens 9": "--shift_tokens",
    "--transport vp --kernel constant --shift_tokens 4": "--shift_tokens",
    "--share_diffusion .7 --share_consistency .4": "--share_consistency",
    "--guide_cond 1": "--guide_cond", "--drop 0 --guide_gt 2": "--drop",
    "--drop 0 --guide_gt 1 --guide_range 1 2": "--drop", "--guide_range 2 1": "--guide_range",
    "--guide_range .5 2": "--guide_range", "--guide_range 2": "--guide_range",
    "--guide_range 1 2": "--guide_gt", "--guide_gt 1 --guide_range 1 2 --guidance 3": "--guidance",
    "--guide_low .9 --guide_high .8": "--guide_low",
    "--interval .5 0": "--interval", "--interval 0 2": "--interval",
    "--world_size 2": "--world_size", "--dry_run --world_size 0": "--world_size",
    "--accumulate 3": "--batch", "--replicate 2": "--replicate", "--replicate 0": "--replicate",
    "--dry_run --replicate 2": "--replicate", "--dry_run --channels 0": "--channels",
    "--patch 3": "--patch", f"--seed {2**63}": "--seed", "--precision fp64": "--precision",
    "--align_depth 9 --align 1": "--align", "--name a/b": "--name", "--name .hidden": "--name",
    "--data nowhere": "--data", "--data nothing": "nothing", "--data file": "--data",
    "--data demo": "channels", "--data random --channels 0": "--channels", "--data .": "--runs",
    "--name other --runs file": "file", "--name other --init nowhere": "nowhere",
    "--name other --init run --patch 1": "--init", "--name other --init run --predict x": "--predict",
    "--steps 4 --precision bf16": "--precision", "--steps 4 --h .01": "--h ", "--steps 4 --patch 1": "--patch", "--steps 4 --lr .5": "--lr",
    "--steps 4 --size S": "--size", "--steps 4 --seed 1": "--seed", "--device cuda": "--device",
    "--name other --classes 0 --no-caption_mask": "--caption_mask",
    "--name other --classes 0 --caption 7": "--caption",
}  # fmt: skip


@pytest.mark.parametrize("flags", REFUSED)
def test_bad_calls_get_one_line_and_leave_nothing(finished, flags, refused, monkeypatch):
    """In this process, where torch is loaded already; the exit status is the shell's."""
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(finished)
    before = sorted(finished.rglob("*"))
    heard = refused(train.main, *flags_of(finished, *flags.split()))
    assert REFUSED[flags] in " ".join(heard.split())
    assert sorted(finished.rglob("*")) == before


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_flag_takes_what_is_not_finite(value, refused):
    for f in fields(train.Config):
        if f.type in (float, float | None):
            assert f"--{f.name}" in refused(train.main, *TINY, f"--{f.name}={value}")


def test_a_small_network_computes_in_fp32_unless_asked(tmp_path):
    """Where a GPU would choose bf16, launches of a small network cost more than it saves."""
    resolved = lambda *flags: train.resolve(
        train.parse_config(flags_of("unused", *flags))[0], SPEC, torch.device("cuda"), 1
    ).precision
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_bf16_supported", lambda **how: True)
        assert [resolved(), resolved("--size", "B")] == ["fp32", "bf16"]
        assert resolved("--precision", "bf16") == "bf16"
        assert resolved("--size", "B", "--precision", "fp32") == "fp32"
