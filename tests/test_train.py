"""Training for real: processes over gloo, resume, signals, kills, planted faults, the step against autograd by hand."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import train
from model import SIZES, TiM
from transition import TRANSPORTS

ROOT = Path(train.__file__).parent
ENV = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
TINY = "--data random --channels 2 --side 4 --classes 3 --patch 2 --batch 8".split()
TINY += "--lr 1e-3 --warmup 0 --decay 0 --log_every 1 --no-compile".split()


def command(runs, *flags, ranks=0, script="train.py"):
    alone = [sys.executable]
    many = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    return [*(many if ranks else alone), str(ROOT / script), *TINY, "--runs", str(runs), *map(str, flags)]


def run(runs, *flags, **how):
    done = subprocess.run(command(runs, *flags, **how), env=ENV, capture_output=True, text=True, timeout=150)
    return done.returncode, done.stdout + done.stderr


def succeed(runs, *flags, **how):
    code, text = run(runs, *flags, **how)
    assert code == 0, text
    return text


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "step" in line}


def weights(folder):
    return load_file(folder / "ema.safetensors")


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], **tolerance, msg=lambda m, k=k: f"{k}: {m}")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """20 updates of one process with four micro-batches: the draws of four ranks."""
    runs = tmp_path_factory.mktemp("reference")
    succeed(runs, "--steps", 20, "--accumulate", 4, "--guide_gt", 1.5, "--name", "one")
    return runs / "one"


WALK = [  # before attention, rotation and modulation were made faster, in fp32
    3.373775, 4.888317, 3.820470, 4.082228, 3.969572, 4.128524, 4.296753, 3.942585, 4.017694, 3.995374, 4.343675,
    3.614605, 4.978031, 4.346862, 4.045476, 3.896263, 4.850243, 3.182921, 3.515659, 3.672102,
]  # fmt: skip


def test_no_lever_changes_the_walk(reference):
    assert list(losses(reference).values()) == pytest.approx(WALK, rel=1e-4)


def test_four_ranks_walk_like_one(reference, tmp_path):
    """Hybrid sharding and recomputed activations, too: 2 copies of 2 shards, same losses and weights."""
    flags = ["--steps", 20, "--guide_gt", 1.5, "--replicate", 2, "--checkpointing", "--name", "four"]
    succeed(tmp_path, *flags, ranks=4)
    one, four = losses(reference), losses(tmp_path / "four")
    assert len(four) == 20 and abs(four[1] - four[20]) > 0.1
    assert max(abs(one[s] - four[s]) for s in one) < 1e-5
    assert_same(weights(reference), weights(tmp_path / "four"), atol=1e-5, rtol=1e-5)


def test_resume_is_exact_and_moves_between_world_sizes(reference, tmp_path):
    flags = ["--guide_gt", 1.5, "--name", "moved"]
    succeed(tmp_path, *flags, "--steps", 7, "--accumulate", 4)
    succeed(tmp_path, *flags, "--steps", 14, "--accumulate", 4)                 # same world: bit-equal
    assert [losses(tmp_path / "moved")[s] for s in range(1, 15)] == [losses(reference)[s] for s in range(1, 15)]
    succeed(tmp_path, *flags, "--steps", 20, "--accumulate", 2, ranks=2)
    assert_same(weights(reference), weights(tmp_path / "moved"), atol=1e-5, rtol=1e-5)


def test_large_presets_run_on_noise(tmp_path):
    """--data random stands for the latents of any autoencoder, so that a preset's speed needs no data."""
    assert "all 1 updates are done" in succeed(tmp_path, "--config", "imagenet_xl", "--size", "demo", "--steps", 1)


def test_jvp_and_bf16_run_sharded(tmp_path):
    succeed(tmp_path, "--steps", 3, "--derivative", "jvp", "--precision", "bf16", "--reduce", "bf16", ranks=2)
    assert all(0 < v < 10 for v in losses(tmp_path / "demo").values())


def test_sharded_bf16_casts_weights_and_no_inputs():
    """Under FSDP in bf16 attention and MLP compute in bf16; times, the residual stream, c, d and adaLN stay fp32."""
    train.connect("cpu")
    try:
        torch.manual_seed(0)
        model = TiM(2, 2, **SIZES["demo"], classes=3)
        train.shard(model, dist.init_device_mesh("cpu", (1,)), train.PRESETS["demo"], True)
        block, seen = model.blocks[1], {}
        note = lambda name: lambda module, inputs: seen.update({name: inputs[0].dtype})
        block.register_forward_pre_hook(lambda module, inputs: seen.update(block={v.dtype for v in inputs[:3]}))
        block.attn.proj.register_forward_pre_hook(note("attention"))
        block.mlp.fc2.register_forward_pre_hook(note("mlp"))
        block.adaLN_modulation.fc2.register_forward_pre_hook(note("adaLN"))
        model.t_embedder.register_forward_pre_hook(lambda module, inputs: seen.update(t=inputs[0].clone()))
        t = torch.tensor([0.9013, 0.5007])
        f = model(torch.randn(2, 2, 4, 4), t, t * 0.3, torch.tensor([0, 1]))
        low, full = torch.bfloat16, torch.float32
        assert torch.equal(seen.pop("t"), t) and f.dtype == full
        assert seen == dict(block={full}, attention=low, mlp=low, adaLN=full)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_compiled_blocks_walk_like_eager_ones(tmp_path):
    for name, flags in (("eager", ["--no-compile"]), ("compiled", ["--compile", "--checkpointing"])):
        succeed(tmp_path, "--steps", 10, "--name", name, *flags, ranks=2)
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert max(abs(eager[s] - compiled[s]) for s in eager) < 1e-4


@pytest.mark.parametrize("world", [2, 16])
def test_every_rank_holds_its_share(world):
    """Parameters (and with them gradients, optimizer and average) within 5% of total / ranks, at XL's real shapes."""
    code = """
import sys, torch, torch.distributed as dist, train
from torch.testing._internal.distributed.fake_pg import FakeStore
from model import SIZES, TiM
world = int(sys.argv[1])
dist.init_process_group("fake", store=FakeStore(), rank=world - 1, world_size=world)
with torch.device("meta"):
    model = TiM(4, 2, **SIZES["XL"], classes=1000)
total = sum(p.numel() for p in model.parameters())
train.shard(model, dist.init_device_mesh("cpu", (world,)), train.PRESETS["demo"], True)
print(sum(p.to_local().numel() for p in model.parameters()) * world / total)
"""
    done = subprocess.run([sys.executable, "-c", code, str(world)], env=ENV, capture_output=True, text=True, cwd=ROOT)
    assert abs(float(done.stdout) - 1) < 0.05, done.stderr


def objective_inputs(**changes):
    cfg = replace(train.PRESETS["demo"], channels=2, side=4, classes=3, batch=8, **changes)
    torch.manual_seed(0)
    model = TiM(2, 2, **SIZES["demo"], classes=3).double()
    for p in model.parameters():                                                # away from the zeros it starts with
        torch.nn.init.normal_(p, std=0.05)
    return cfg, model, torch.randn(8, 2, 4, 4).double(), torch.arange(8) % 3


def test_slots_draw_different_noise_times_and_drops():
    cfg, model, x, y = objective_inputs(drop=0.5)
    draw = lambda slot: train.objective(model, model, TRANSPORTS["tim"], cfg, 0.005, x, y, data.rng(0, 3, slot, 1))
    seen, again = [draw(0), draw(1)], draw(1)
    for a, b, c in zip(seen[0][1:], seen[1][1:], again[1:]):
        assert (a != b).any() and (b == c).all()


def test_accumulation_is_the_mean_of_its_slots():
    cfg, model, x, y = objective_inputs(clip=1e9, lr=1.0, guide_gt=1.0)
    row, parts = TRANSPORTS["tim"], [(x[:4], y[:4]), (x[4:], y[4:])]
    total = 0
    for slot, (a, b) in enumerate(parts):
        total = total + train.objective(model, model, row, cfg, 0.005, a, b, data.rng(cfg.seed, 5, slot, 1))[0] / 2
    total.backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    got = []

    class Spy(torch.optim.SGD):
        def step(self):
            got.extend(p.grad.clone() for p in model.parameters())

    ema = TiM(2, 2, **SIZES["demo"], classes=3).double()
    train.train_step(model, ema, Spy(model.parameters(), 1.0), row, cfg, 0.005, 5, parts, [0, 1])
    for a, b in zip(want, got):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("derivative", ["dde", "jvp"])
def test_objective_is_the_papers_equation(derivative):
    """The loss of one batch against Eq. 9 typed out for the linear path, with df/dt by autograd in float64."""
    switches = dict(derivative=derivative, drop=0.0, adaptive=False, cosine=False, guide_gt=1.0)
    cfg, model, x, y = objective_inputs(transport="otfm", **switches)
    loss, raw, t, r = train.objective(model, model, TRANSPORTS["otfm"], cfg, 1e-4, x, y, data.rng(1))
    rng = data.rng(1)
    torch.rand(8, generator=rng), torch.randn(2, 8, generator=rng), torch.rand(8, generator=rng)
    eps = torch.randn(x.shape, generator=rng)
    path = lambda s: model((1 - s)[:, None, None, None] * x + s[:, None, None, None] * eps, s, r, y)
    with sdpa_kernel(SDPBackend.MATH):
        f, df_dt = torch.func.jvp(path, (t,), (torch.ones_like(t),))
    target = eps - x - (t - r)[:, None, None, None] * df_dt
    want = (f - target).square().mean((1, 2, 3))
    weight = torch.where(t == r, 1.0, (1 + torch.tan(t) - torch.tan(r)).rsqrt())
    assert (t[:4] == r[:4]).all() and (t[4:] > r[4:]).all()
    torch.testing.assert_close(raw.float(), want.detach().float(), rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(loss.float(), (weight * want).mean().float(), rtol=2e-4, atol=2e-4)


def test_loss_falls_and_the_grid_has_its_rows(tmp_path):
    succeed(tmp_path, "--data", "demo", "--channels", 1, "--side", 28, "--classes", 10, "--patch", 7, "--steps", 60,
            "--batch", 16, "--lr", 2e-3, "--guide_gt", 1, "--share_diffusion", 1, "--share_consistency", 0)  # fmt: skip
    values = list(losses(tmp_path / "demo").values())
    assert sum(values[-10:]) < 0.6 * sum(values[:10])
    from PIL import Image

    picture = Image.open(tmp_path / "demo/samples/step_00000060.png")
    assert picture.size == ((10 * 30 - 2) * 2, (len(train.GRID_STEPS) * 30 - 2) * 2)


def wait_for_step(folder, step, process):
    for _ in range(600):
        if (folder / "log.jsonl").exists() and max(losses(folder), default=0) >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise TimeoutError


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_signal_ends_with_a_checkpoint(tmp_path, ranks):
    flags = ["--steps", 100_000, "--save_every", 100_000]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command(tmp_path, *flags, ranks=ranks), env=ENV, stdout=pipe, stderr=pipe, text=True)
    wait_for_step(tmp_path / "demo", 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "run again to go on" in out, err
    assert ranks or process.returncode == 0                                     # torchrun itself reports the signal
    (saved,) = train.checkpoints(tmp_path / "demo")
    assert int(saved.name[5:]) == max(losses(tmp_path / "demo"))


def test_a_planted_nan_stops_both_ranks_and_saves_nothing_of_it(tmp_path):
    code, text = run(tmp_path, "--steps", 50, "--save_every", 4, ranks=2, script="tests/planted_nan.py")
    assert code != 0 and "step 9: the gradient is not finite (rank 1: l = nan, t = 0." in text
    assert text.count("error: step 9") == 2 and max(losses(tmp_path / "demo")) <= 10
    saved = train.checkpoints(tmp_path / "demo")
    assert saved[-1].name == "step_00000008"
    assert all(v.isfinite().all() for v in weights(tmp_path / "demo").values())


@pytest.mark.slow
def test_kill_nine_while_writing_loses_nothing(tmp_path):
    """Ten kills at random moments of back-to-back checkpoint writing; each time the newest one is whole."""
    script = [sys.executable, str(ROOT / "tests/kill_nine.py"), str(tmp_path)]
    done = subprocess.run(script, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.stdout.count("whole") == 10, done.stdout + done.stderr


def test_full_disk_keeps_the_older_checkpoint(tmp_path, monkeypatch):
    """Writing fails half way on a file-size limit, as on a full disk: a message, and the older one is still there."""
    succeed(tmp_path, "--steps", 2)
    limit = "import resource, sys, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20));"
    limit += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.argv = sys.argv[1:];"
    limit += "runpy.run_path(sys.argv[0], run_name='__main__')"
    flags = command(tmp_path, "--steps", 4)
    done = subprocess.run([flags[0], "-c", limit, *flags[1:]], env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "older ones are whole" in done.stderr, done.stderr
    assert [c.name for c in train.checkpoints(tmp_path / "demo")] == ["step_00000002"]
    succeed(tmp_path, "--steps", 4)


def test_old_checkpoints_go_and_milestones_stay(tmp_path):
    succeed(tmp_path, "--steps", 8, "--save_every", 1, "--keep", 2, "--keep_every", 3)
    assert [int(c.name[5:]) for c in train.checkpoints(tmp_path / "demo")] == [3, 6, 7, 8]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("finished")
    succeed(runs, "--steps", 2)
    (runs / "file").write_text("")
    (runs / "tests/nothing").mkdir(parents=True)
    return runs


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--config", "imagenet_xxl"], "invalid choice: 'imagenet_xxl'"),
        (["--lr", "fast"], "invalid float value: 'fast'"),
        (["--stepz", "3"], "unrecognized arguments: --stepz"),
        (["--steps", "0"], "--steps 0: must be positive"),
        (["--h", "-1"], "--h -1.0: must be 0 or more"),
        (["--drop", "1.5"], "--drop 1.5: a share lies in [0, 1]"),
        (["--transport", "edm", "--tau", "tan"], "tau 'tan' stands times up to 1.571, the row 'edm' goes to 80"),
        (["--drop", "0", "--guide_gt", "2"], "need a network that knows no condition"),
        (["--accumulate", "3"], "--batch 8 must divide over 1 ranks x 3 micro-batches"),
        (["--patch", "3"], "--patch 3: 4x4 must be a multiple of it"),
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--data", "tests/nothing"], "no pictures"),
        (["--data", "demo"], "has channels 1, the configuration asks for 2"),
        (["--steps", "4", "--lr", "0.5"], "was trained with train lr = 0.001, not 0.5"),
        (["--steps", "4", "--size", "S"], "was trained with train size = demo, not S"),
        (["--init", "nowhere"], "nowhere: there is no nowhere"),
    ],
)
def test_bad_input_gets_a_message(finished, flags, said, capsys, monkeypatch):
    """In this process, where torch is loaded already; the exit status is what the shell would see."""
    monkeypatch.chdir(finished)
    runs = ["--runs", str(finished), *(["--name", "other"] if "--init" in flags else [])]
    with pytest.raises(SystemExit) as stop:
        data.command(lambda: train.main([*TINY, *runs, *flags]))
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_bad_input_stops_every_rank(finished):
    code, text = run(finished / "file", "--steps", 2, ranks=2)
    assert code != 0 and text.count("Not a directory") >= 2, text
    code, text = run(finished, "--steps", 4, "--batch", 7, ranks=2)
    assert code != 0 and text.count("--batch 7 must divide over 2 ranks") == 2, text


def test_dry_run_says_what_xl_takes(capsys):
    train.main(["--config", "imagenet_xl", "--dry_run", "--world_size", "16"])
    text = capsys.readouterr().out
    assert "664,128,016 parameters in 607 tensors" in text and "384,000,000 images = 299.7 epochs" in text
    sizes = {line.split()[0]: float(line.split()[-4]) for line in text.splitlines() if line.endswith("a rank")}
    assert sizes["weights"] == pytest.approx(664_128_016 * 4 / 16 / 2**30, abs=1e-3)
    assert sizes["optimizer"] == pytest.approx(2 * sizes["weights"], abs=2e-3) and 5 < sizes["activations"] < 40
