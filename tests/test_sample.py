"""The sampler against exact flows and the released code's samples, and the command line against bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import flow, ideal, lively, variance
from PIL import Image
from safetensors.torch import load_file, save_file

import data
from data import UserError
from sample import generate, images, initial_noise, latents, load, main, save
from transition import TRANSPORTS

SAMPLE = Path(__file__).parent.parent / "sample.py"
each_row = pytest.mark.parametrize("row", TRANSPORTS.values(), ids=TRANSPORTS)
UNSEE = dict(edm=lambda c: (4 * c).exp(), vp=lambda c: c / 999, ve=lambda c: 2 * c.exp())  # c_noise backwards


class Oracle:
    """The ideal network in the place of a model: it is shown c_noise, in fp32, and counts what it is asked."""

    classes, calls, predict = 10, 0, "f"

    def __init__(self, row):
        self.row, self.net, self.unsee = row, ideal(row), UNSEE.get(row.name, lambda c: c)

    def __call__(self, x, t, r, y):
        assert t.dtype == r.dtype == torch.float32 and len(x) == len(t) == len(r) == len(y)
        t, r = (self.unsee(s.double()).clamp(self.row.t_min, self.row.t_max) for s in (t, r))
        self.calls += len(x)
        return self.net(x, t, r)


def gauss(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(z):
    return torch.zeros(len(z), dtype=torch.long)


# ---------------------------------------------------------------------------------------------------------------------
# The sampler


@each_row
def test_one_step_is_as_good_as_128(row):
    z = gauss(5, 1, 2, 2)
    start = torch.full((5,), row.t_max, dtype=torch.float64)
    exact = flow(row)(z * row.sigma(start[0]), start, torch.full_like(start, row.t_min))
    for steps in (1, 2, 7, 128):
        found = generate(Oracle(row), row, z, labels(z), steps)
        assert found.dtype == torch.float64
        assert (found - exact).abs().max() < 1e-4 * exact.abs().max(), steps


@each_row
def test_any_falling_list_of_times_composes(row):
    z, (low, high) = gauss(4, 1, 2, 2), (row.t_min, row.t_max)
    times = [high, *(high - share * (high - low) for share in (0.3, 0.35, 0.9)), low]
    direct = generate(Oracle(row), row, z, labels(z), [high, low])
    for given in (times, torch.tensor(times, dtype=torch.float64), np.array(times)):
        found = generate(Oracle(row), row, z, labels(z), given)
        assert (found - direct).abs().max() < 1e-4 * direct.abs().max()
    part = generate(Oracle(row), row, z, labels(z), times[:3])  # stopping early gives the state there
    at = torch.full((4,), times[2], dtype=torch.float64)
    start = torch.full((4,), high, dtype=torch.float64)
    exact = flow(row)(z * row.sigma(start[0]), start, at)
    assert (part - exact).abs().max() < 1e-4 * exact.abs().max()


def test_equal_steps_are_equal_and_shifted_ones_have_shifted_odds():
    row, z = TRANSPORTS["tim"], gauss(1, 1, 2, 2)
    trace = []
    generate(Oracle(row), row, z, labels(z), 4, trace=trace)
    assert [s[:2] for s in trace] == [(1, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0)]
    trace = []
    generate(Oracle(row), row, z, labels(z), 4, shift=3.0, trace=trace)
    assert [s[1] / (1 - s[1]) for s in trace] == pytest.approx([9, 3, 1, 0])


def test_a_network_of_r_equal_t_alone_is_sampled_the_ordinary_way():
    """f = t - r, so one that is always shown r = t says 0 and leaves the noise where it is."""

    class Interval:
        classes, predict = 10, "f"

        def __call__(self, x, t, r, y):
            return (t - r)[:, None, None, None].expand(x.shape)

    row, z, spec = TRANSPORTS["otfm"], initial_noise((1, 2, 2), 0, [0, 1]), dict(shape=[1, 2, 2])
    assert (generate(Interval(), row, z, labels(z), 3) - z).abs().min() > 0.1
    torch.testing.assert_close(generate(Interval(), row, z, labels(z), 3, local=True), z)
    for share, expected in ((1.0, z), (0.5, generate(Interval(), row, z, labels(z), 3))):
        network = torch.nn.Linear(1, 1)
        network.forward, network.classes, network.predict = Interval().__call__, 10, "f"
        found = latents(network, row, dict(data=spec, train=dict(share_diffusion=share)), [0, 1], 0, 3, [0])
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("steps", [0, -1, [1.0], [0.5, 0.5], [0.2, 0.4], [1.1, 0.0], [1.0, -0.1]])
def test_steps_and_times_that_cannot_be_are_refused(steps):
    row, z = TRANSPORTS["tim"], gauss(1, 1, 2, 2)
    with pytest.raises(UserError, match="at least 1 step" if isinstance(steps, int) else "must fall"):
        generate(Oracle(row), row, z, labels(z), steps)


def test_network_evaluations_are_counted_not_claimed():
    row, z = TRANSPORTS["otfm"], gauss(3, 1, 2, 2)
    for options, expected in (
        (dict(), 4),
        (dict(guidance=2.0), 8),  # "8 NFE" with guidance is 4 steps of 2,
        (dict(guidance=2.0, strict=True), 7),  # and 7 where the interval leaves out t = 1
        (dict(guidance=2.0, interval=(0.0, 0.75)), 7),  # both ends count
        (dict(guidance=2.0, interval=(0.0, 0.75), strict=True), 6),
        (dict(guidance=2.0, interval=(0.25, 0.6)), 6),
        (dict(guidance=2.0, interval=(0.25, 0.6), strict=True), 5),
    ):
        oracle, trace = Oracle(row), []
        generate(oracle, row, z, labels(z), 4, trace=trace, **options)
        assert sum(copies for *_, copies in trace) == oracle.calls / len(z) == expected, options


def test_the_interval_is_a_share_of_the_range():
    row, z, trace = TRANSPORTS["ve"], gauss(1, 1, 2, 2), []
    generate(Oracle(row), row, z, labels(z), 10, guidance=2.0, interval=(0.35, 0.65), trace=trace)
    assert [copies for *_, copies in trace] == [1, 1, 1, 1, 2, 2, 2, 1, 1, 1]


def test_guidance_moves_away_from_no_condition():
    """A network of the label alone: f = 1 with a class and 0 without, so guidance g gives f = g."""

    class Label:
        classes, predict = 10, "f"

        def __call__(self, x, t, r, y):
            return (y < 10).to(x)[:, None, None, None].expand(x.shape)

    z = gauss(2, 1, 2, 2)
    for g in (0.0, 1.0, 2.5):
        found = generate(Label(), TRANSPORTS["otfm"], z, labels(z), 3, guidance=g)
        torch.testing.assert_close(found, z - g)
        null = generate(Label(), TRANSPORTS["otfm"], z, labels(z), 3, guidance=g, null=labels(z) + 1)
        torch.testing.assert_close(null, z - 1)


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_renewed_noise_keeps_the_marginal_variance(share):
    row, z = TRANSPORTS["otfm"], gauss(20000, 1, 1, 1)
    at, drawn = torch.linspace(1, 0.2, 101, dtype=torch.float64), []

    def noise(k):
        drawn.append(k)
        return gauss(*z.shape, seed=k + 1)

    found = generate(Oracle(row), row, z, labels(z), at, stochastic=share, noise=noise)
    assert drawn == list(range(1, 99))  # not in the first step, not in the last
    assert found.var() == pytest.approx(float(variance(row, at[-1])), rel=0.03)
    plain = generate(Oracle(row), row, z, labels(z), at)
    kept = torch.corrcoef(torch.stack([found.flatten(), plain.flatten()]))[0, 1]
    assert kept < (0.9 if share == 0.2 else 0.6)  # and it is other noise
    with pytest.raises(UserError, match="otfm"):
        generate(Oracle(TRANSPORTS["tim"]), TRANSPORTS["tim"], z, labels(z), 4, stochastic=share, noise=noise)


def test_captions_are_guided_by_the_captions_given_as_none():
    model, row = lively(classes=None, caption=7), TRANSPORTS["otfm"]
    z, captions, mask = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 7), torch.ones(2, 5).bool()
    null = (torch.zeros_like(captions), mask)
    ones, zeros = torch.ones(2), torch.zeros(2)
    f_cond, f_null = (model(z, ones, zeros, y) for y in ((captions, mask), null))
    found = generate(model, row, z, (captions, mask), 1, 3.0, null=null)
    torch.testing.assert_close(found, z - f_null - 3 * (f_cond - f_null), rtol=1e-4, atol=1e-4)


GOLDEN = [("otfm", 1, 1), ("otfm", 2, 1), ("otfm", 8, 1), ("otfm", 1, 2.5), ("otfm", 2, 2.5), ("otfm", 8, 2.5),
          ("trigflow", 4, 1), ("vp", 4, 1), ("ve", 4, 1)]  # fmt: skip


@pytest.mark.parametrize("name, steps, guidance", GOLDEN)
def test_samples_of_the_released_code(golden, golden_model, near, name, steps, guidance):
    row, z = TRANSPORTS[name], golden["sample.z"]
    if name == "vp":
        z = z / row.sigma(torch.tensor(row.t_max))  # theirs starts from z itself; sigma(1) is .99998
    found = generate(golden_model, row, z, golden["sample.y"], steps, guidance, (0, 0.6), strict=True)
    near(found, golden[f"sample.{name}.steps{steps}.cfg{guidance}{'.interval0-0.6' if guidance != 1 else ''}"])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and checkpoints

MODEL = dict(channels=1, patch=2, depth=2, width=32, heads=2, adaln=16, classes=5)
CONFIG = dict(
    model=MODEL, step=7, data=dict(kind="pixels", shape=[1, 4, 4], mean=100.0, std=50.0, classes=list("abcde")),
    train=dict(transport="tim", guidance=1.5, drop=0.1),
)  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run folder as training leaves it."""
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    save(folder / "ema.safetensors", lively(**MODEL).state_dict(), CONFIG)
    return folder


def test_noise_is_a_function_of_seed_and_index():
    whole = initial_noise((1, 4, 4), 3, range(6))
    assert torch.equal(initial_noise((1, 4, 4), 3, [4, 1]), whole[[4, 1]])
    assert not torch.equal(initial_noise((1, 4, 4), 4, range(6)), whole)
    assert len({tuple(z.flatten().tolist()) for z in whole}) == 6
    many = initial_noise((1, 20, 20), 0, range(100))
    assert many.dtype == torch.float32 and abs(many.mean()) < 0.02 and many.std() == pytest.approx(1, abs=0.02)


def test_picture_i_is_the_same_in_any_batch(run):
    model, row, config = load(run)
    z, y = initial_noise((1, 4, 4), 0, range(12)), torch.arange(12) % 5
    whole = generate(model, row, z, y, 3, guidance=2.0)
    for size in (1, 5):
        parts = torch.cat([generate(model, row, *p, 3, guidance=2.0) for p in zip(z.split(size), y.split(size))])
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    pixels = images(model, row, config, range(12), 0, 3, [0, 3])
    assert pixels.shape == (12, 4, 4, 1) and pixels.dtype == np.uint8
    some = images(model, row, config, [7, 2], 0, 3, [0, 3])
    assert np.abs(some.astype(int) - pixels[[7, 2]]).max() <= 1  # a rounding apart at most


def test_a_checkpoint_gives_back_what_was_saved(run):
    for path in (run, run / "ema.safetensors", str(run)):
        model, row, config = load(path)
        assert row is TRANSPORTS["tim"] and config == CONFIG and not model.training
        for name, p in lively(**MODEL).named_parameters():
            assert torch.equal(p, model.get_parameter(name)) and not model.get_parameter(name).requires_grad


def pictures(folder):
    return {p.name: np.asarray(Image.open(p)) for p in sorted(Path(folder).iterdir())}


def test_commands_write_a_grid_and_single_pictures(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["--steps", "1", "3", "--classes", "4", "0", "2", "--device", "cpu"])  # the newest run below runs/
    sheet = Image.open("samples.png")
    cell = 4 * (64 // 4) + 2 * (64 // 4)
    assert sheet.size == (3 * cell - 32, 2 * cell - 32)
    assert "guidance 1.5" in capsys.readouterr().out

    common = ["--checkpoint", str(run), "--steps", "2", "--num", "7", "--device", "cpu"]
    main([*common, "--out", "whole"])
    whole = pictures("whole")
    assert list(whole) == [f"{i:06}.png" for i in range(7)] and whole["000000.png"].shape == (4, 4)
    for rank in (0, 1):  # two ranks and another batch size write the same set
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        main([*common, "--out", "shared", "--batch", "2"])
    shared = pictures("shared")
    assert whole.keys() == shared.keys()
    assert all(np.abs(whole[k].astype(int) - shared[k]).max() <= 1 for k in whole)
    monkeypatch.undo()
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "whole").iterdir()}
    (tmp_path / "whole" / "000003.png").unlink()  # a broken run goes on where it was
    main([*common, "--out", str(tmp_path / "whole")])
    assert [p.name for p in sorted(made) if p.stat().st_mtime_ns != made[p]] == ["000003.png"]
    assert all(np.abs(whole[k].astype(int) - p).max() <= 1 for k, p in pictures(tmp_path / "whole").items())


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: a message that names the value, the rule and the way out, and exit status 2


def refused(capsys, *argv):
    """The message with which the command line refuses these arguments."""
    with pytest.raises(SystemExit) as stopped:
        data.command(lambda: main(["--device", "cpu", *map(str, argv)]))
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def damage(path, how):
    state = load_file(path)
    if how == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    elif how == "text":
        path.write_text("not a checkpoint")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        save_file(state, path)
    elif how == "foreign record":
        save_file(state, path, metadata={"tim": "[1, 2]"})
    elif how == "missing":
        del state["blocks.1.attn.proj.bias"]
        save(path, state, CONFIG)
    elif how == "unknown":
        save(path, state | {"extra.weight": torch.zeros(2)}, CONFIG)
    elif how == "misshapen":
        save(path, state | {"x_embedder.proj.bias": torch.zeros(3)}, CONFIG)


@pytest.mark.parametrize(
    "how, words",
    [
        ("cut short", "not a whole file of weights"),
        ("text", "not a whole file of weights"),
        ("empty", "not a whole file of weights"),
        ("foreign", "1 channels: no autoencoder is known"),
        ("foreign record", "is not one of this version"),
        ("missing", "missing blocks.1.attn.proj.bias"),
        ("unknown", "unknown extra.weight"),
        ("misshapen", "x_embedder.proj.bias (3,) instead of (32,)"),
    ],
)
def test_damaged_checkpoints_are_refused(run, capsys, how, words):
    damage(run / "ema.safetensors", how)
    message = refused(capsys, "--checkpoint", run)
    assert words in message and ("ema.safetensors" in message or how == "foreign")


def test_missing_checkpoints_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "train.py" in refused(capsys)
    for path in ("nowhere", tmp_path):
        message = refused(capsys, "--checkpoint", path)
        assert str(path) in message and "train.py" in message


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--steps 0", "--steps 0: at least 1"),
        ("--steps 4 -1", "--steps -1: at least 1"),
        ("--steps many", "invalid int value: 'many'"),
        ("--classes 5", "--classes 5: "),
        ("--classes 0 -1", "knows classes 0 to 4"),
        ("--batch 0", "--batch 0: at least 1"),
        ("--num 0 --out x", "--num 0: at least 1"),
        ("--out picture.jpg", "--out picture.jpg: a grid goes into one .png"),
        ("--device nowhere", "--device nowhere: "),
        ("--num 3", "--num 3 needs --out"),
        ("--seed -1", "--seed -1: at least 0"),
        ("--stochastic 0.2", "'otfm'"),
        ("--stochastic -0.2", "--stochastic -0.2: at least 0"),
        ("--interval 0.6 0", "--interval 0.6 0: two rising fractions"),
        ("--interval 0 nan", "two rising fractions"),
        ("--precision fp8", "invalid choice: 'fp8'"),
        ("--cfg 2", "unrecognized arguments: --cfg"),
    ],
)
def test_bad_arguments_are_refused(run, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, "--checkpoint", run, *arguments.split())


def test_renewed_noise_is_a_function_of_seed_and_index_too(run):
    config = CONFIG | dict(train=dict(transport="otfm", guidance=1.0, drop=0.1))
    save(run / "ema.safetensors", lively(**MODEL).state_dict(), config)
    model, row, config = load(run, "cpu")
    whole, plain = (images(model, row, config, range(6), 0, 4, [0], stochastic=s).astype(int) for s in (0.5, 0.0))
    part = images(model, row, config, [5, 2], 0, 4, [0], stochastic=0.5).astype(int)
    assert np.abs(part - whole[[5, 2]]).max() <= 1 and np.abs(whole - plain).max() > 10


def test_a_picture_that_cannot_be_written_is_not_passed_over(run, tmp_path):
    (tmp_path / "out" / "steps_8" / "000001.tmp").mkdir(parents=True)  # a folder where the file must go
    with pytest.raises(OSError):
        main(["--checkpoint", str(run), "--num", "3", "--out", str(tmp_path / "out"), "--device", "cpu"])


def test_guidance_needs_a_network_that_knows_no_condition(run, capsys):
    config = CONFIG | dict(train=dict(transport="tim", guidance=1.0, drop=0.0))
    save(run / "ema.safetensors", lively(**MODEL).state_dict(), config)
    assert "--drop 0" in refused(capsys, "--checkpoint", run, "--guidance", 2)
    main(["--checkpoint", str(run), "--steps", "1", "--device", "cpu", "--out", str(run / "new" / "grid.png")])
    assert (run / "new" / "grid.png").exists()


def test_the_shell_sees_one_line_and_status_2(tmp_path):
    argv = [sys.executable, SAMPLE, "--checkpoint", tmp_path / "gone"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_a_checkpoint_is_complete_or_not_there(tmp_path, monkeypatch):
    """A write that breaks off leaves the older file as it was."""
    path = tmp_path / "ema.safetensors"
    save(path, dict(a=torch.ones(2)), dict(step=1))

    def fail(state, aside, metadata):
        Path(aside).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("sample.save_file", fail)
    with pytest.raises(OSError):
        save(path, dict(a=torch.zeros(2)), dict(step=2))
    assert torch.equal(load_file(path)["a"], torch.ones(2))
    assert json.loads(json.dumps(CONFIG)) == CONFIG  # the record survives its trip as JSON
