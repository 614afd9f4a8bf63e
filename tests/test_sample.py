"""The sampler against exact flows and the released code's samples; loading; the command."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIG, MODEL
from launch import ROOT, shell, torchrun
from oracle import flow, ideal, lively, posterior, variance
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import sample
from data import Spec, UserError
from sample import (
    class_numbers, generate, initial_noise, load, main, numbered, open_sampler, save, write_pictures
)  # fmt: skip
from transition import SIGMA_FLOOR, TRANSPORTS, expand, residual, solve

CPU = torch.device("cpu")
OTFM, TIM, VE = (TRANSPORTS[name] for name in ("otfm", "tim", "ve"))
each_transport = pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS)
posix = pytest.mark.skipif(os.name == "nt", reason="modes, and files that are replaced while open")


def unsee(transport, seen):
    """The times that the network was shown, by bisection of c_noise."""
    seen, place = seen.double().unique(return_inverse=True)
    low, high = (torch.full_like(seen, end) for end in (transport.t_min, transport.t_max))
    for _ in range(60):
        middle = (low + high) / 2
        below = transport.c_noise(middle) < seen
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low[place]


class Oracle:
    """The ideal network in the place of a model: it is shown c_noise, in fp32, and counts its calls.

    One that predicts x gives the x of the pair behind the state and f. `diffusion`: the ideal one
    of plain diffusion, which must be shown r = t.
    """

    classes, guide_range = 10, None

    def __init__(self, transport, predict="f", diffusion=False):
        self.transport, self.predict, self.diffusion, self.calls = transport, predict, diffusion, 0

    def __call__(self, x, t, r, y):
        assert t.dtype == r.dtype == torch.float32 and len(x) == len(t) == len(r) == len(y)
        assert torch.equal(t, r) == self.diffusion
        t, r = (unsee(self.transport, s) for s in (t, r))
        self.calls += len(x)
        if self.diffusion:
            return residual(self.transport, *posterior(self.transport, x, t), t)
        f = ideal(self.transport)(x, t, r)
        return f if self.predict == "f" else solve(self.transport, x, f, t)[0]


def gauss(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=rng)


def labels(z):
    return torch.zeros(len(z), dtype=torch.long)


def exact(transport, z, t):
    """The state that the flow carries the noise z to, at time t."""
    start = torch.full((len(z),), transport.t_max, dtype=torch.float64)
    return flow(transport)(z * transport.sigma(start[0]), start, torch.full_like(start, t))


def near_enough(found, expected, bound=1e-4):
    assert (found - expected).abs().max() < bound * expected.abs().max()


# --- The walk -------------------------------------------------------------------------------------


@each_transport
def test_one_step_is_as_good_as_128(transport):
    z = gauss(5, 1, 2, 2)
    for steps in (1, 2, 7, 128, np.int64(3)):
        found = generate(Oracle(transport), transport, z, labels(z), steps)
        assert found.dtype == torch.float64
        near_enough(found, exact(transport, z, transport.t_min))


@each_transport
def test_a_network_that_predicts_x_lands_where_one_that_predicts_f_does(transport):
    """To the last time at which sigma is at least its floor; below it, eps_hat is scaled down."""
    z = gauss(5, 1, 2, 2)
    grid = torch.linspace(0.99, 0.0, 200, dtype=torch.float64)
    times = transport.t_min + grid * (transport.t_max - transport.t_min)
    above = times[transport.sigma(times) >= SIGMA_FLOOR]
    for count in (1, 4):
        inner = torch.linspace(len(above) - 1, 0, count + 1).round().long().flip(0)[1:]
        to = torch.cat([torch.tensor([transport.t_max], dtype=torch.float64), above[inner]])
        found = generate(Oracle(transport, "x"), transport, z, labels(z), to)
        near_enough(found, exact(transport, z, float(to[-1])))


@each_transport
def test_any_falling_list_of_times_composes(transport):
    z, (low, high) = gauss(4, 1, 2, 2), (transport.t_min, transport.t_max)
    times = [high, *(high - part * (high - low) for part in (0.3, 0.35, 0.9)), low]
    for given in (times, torch.tensor(times, dtype=torch.float64), np.array(times)):
        found = generate(Oracle(transport), transport, z, labels(z), given)
        near_enough(found, exact(transport, z, low))
    part = generate(Oracle(transport), transport, z, labels(z), times[:3])  # stopping early
    near_enough(part, exact(transport, z, times[2]))


def test_steps_are_equal_on_0_to_1_and_shifted_ones_have_shifted_odds():
    z, trace = gauss(1, 1, 2, 2), []
    generate(Oracle(TIM), TIM, z, labels(z), 4, trace=trace)
    assert [s[:2] for s in trace] == [(1, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0)]
    for shift in (3.0, 0.3, 0.01):  # 1 + (shift - 1) is not quite the shift
        trace = []
        generate(Oracle(TIM), TIM, z, labels(z), 4, shift=shift, trace=trace)
        odds = [s[1] / (1 - s[1]) for s in trace]
        assert trace[0][0] == 1 and odds == pytest.approx([3 * shift, shift, shift / 3, 0])


@pytest.mark.parametrize("name", ["edm", "ve"])
def test_where_times_span_decades_eight_steps_are_spaced_so_that_diffusion_lands_close(name):
    transport, z, error = TRANSPORTS[name], gauss(9, 1, 2, 2), {}
    equal = torch.linspace(transport.t_max, transport.t_min, 9, dtype=torch.float64)
    for way, steps in (("spaced", 8), ("equal", equal)):
        model = Oracle(transport, diffusion=True)
        found = generate(model, transport, z, labels(z), steps, diffusion_only=True)
        error[way] = (found - exact(transport, z, transport.t_min)).norm()
    assert error["spaced"] < 0.5 * error["equal"], error


BAD_STEPS = [0, -1, np.int64(0), [1.0], [0.5, 0.5], [0.2, 0.4], [1.1, 0.0], [1.0, -0.1], [0.9, 0.0]]


@pytest.mark.parametrize("steps", [*BAD_STEPS, [1.0, float("nan"), 0.0]])
def test_steps_and_times_that_cannot_be_are_refused(steps):
    z = gauss(1, 1, 2, 2)
    with pytest.raises(UserError):
        generate(Oracle(TIM), TIM, z, labels(z), steps)


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_renewed_noise_keeps_the_marginal_variance(share):
    z, drawn = gauss(20000, 1, 1, 1), []
    at = torch.linspace(1, 0.2, 101, dtype=torch.float64)

    def noise(k):
        drawn.append(k)
        return gauss(*z.shape, seed=k + 1)

    how = dict(stochastic=share, noise=noise)
    found = generate(Oracle(OTFM), OTFM, z, labels(z), at, **how)
    assert drawn == list(range(1, 99))  # not in the first step, not in the last
    assert found.var() == pytest.approx(float(variance(OTFM, at[-1])), rel=0.03)
    plain = generate(Oracle(OTFM), OTFM, z, labels(z), at)
    kept = torch.corrcoef(torch.stack([found.flatten(), plain.flatten()]))[0, 1]
    assert kept < (0.9 if share == 0.2 else 0.6)  # and it is other noise
    with pytest.raises(UserError, match="otfm"):
        generate(Oracle(TIM), TIM, z, labels(z), 4, **how)


CASES = [("otfm", steps, guidance) for steps in (1, 2, 8) for guidance in (1, 2.5)]
CASES += [(name, 4, 1) for name in ("trigflow", "vp", "ve")]


@pytest.mark.parametrize("name, steps, guidance", CASES)
def test_samples_of_the_released_code(golden, golden_model, near, name, steps, guidance):
    transport, z = TRANSPORTS[name], golden["sample.z"]
    if name == "vp":
        z = z / transport.sigma(torch.tensor(transport.t_max))  # theirs starts from z itself
    times = torch.linspace(transport.t_max, transport.t_min, steps + 1, dtype=torch.float64)
    how = dict(interval=(0, 0.6), strict=True)
    found = generate(golden_model, transport, z, golden["sample.y"], times, guidance, **how)
    interval = ".interval0-0.6" if guidance != 1 else ""
    near(found, golden[f"sample.{name}.steps{steps}.cfg{guidance}{interval}"])


# --- Guidance -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transport, steps, interval, strict, guided",
    [
        (OTFM, 4, (0, 1), False, [0, 1, 2, 3]),  # "8 NFE" with guidance is 4 steps of 2,
        (OTFM, 4, (0, 1), True, [1, 2, 3]),  # and 7 where the interval leaves out t = 1
        (OTFM, 4, (0, 0.75), False, [1, 2, 3]),  # both ends count
        (OTFM, 4, (0.25, 0.6), False, [2, 3]),
        (OTFM, 4, (0.25, 0.6), True, [2]),
        (OTFM, 10, (0.3, 1), False, range(8)),  # 3 of ten steps are 0.30000000000000004
        (OTFM, 20, (0.15, 0.55), True, range(10, 17)),
        (OTFM, 12, (1 / 6, 5 / 6), False, range(2, 11)),
        (OTFM, 3, (1 / 3, 2 / 3), False, [1, 2]),
        (OTFM, 3, (1 / 3, 2 / 3), True, []),
        (VE, 10, (0.35, 0.65), False, [4, 5, 6]),  # a share of the steps, not of t
    ],
)
def test_evaluations_are_counted_and_doubled_within_the_interval(
    transport, steps, interval, strict, guided
):
    z, oracle, trace = gauss(3, 1, 2, 2), Oracle(transport), []
    how = dict(interval=interval, strict=strict, trace=trace)
    generate(oracle, transport, z, labels(z), steps, 2.0, **how)
    assert [copies for *_, copies in trace] == [2 if k in guided else 1 for k in range(steps)]
    assert oracle.calls / len(z) == steps + len(guided)


def test_guidance_moves_away_from_no_condition():
    """A network of the label alone: f = 1 with a class and 0 without, so guidance g gives f = g."""

    class Label:
        classes, predict, guide_range = 10, "f", None

        def __call__(self, x, t, r, y):
            return (y < 10).to(x)[:, None, None, None].expand(x.shape)

    z = gauss(2, 1, 2, 2)
    for g in (0.0, 1.0, 2.5):
        found = generate(Label(), OTFM, z, labels(z), 3, guidance=g)
        torch.testing.assert_close(found, z - g)
        found = generate(Label(), OTFM, z, labels(z), 3, guidance=g, null=labels(z) + 1)
        torch.testing.assert_close(found, z - 1)  # where a class stands for none


def test_a_network_that_knows_its_guidance_is_shown_it_in_one_evaluation():
    class Guided:
        classes, predict, guide_range = 10, "f", (1.0, 4.0)
        seen = []

        def __call__(self, x, t, r, y):
            y, w = y
            self.seen.append((float(t[0]), *w.tolist()))
            return expand(w, x).to(x).expand(x.shape)

    z, trace = gauss(2, 1, 2, 2), []
    how = dict(guidance=3.0, interval=(0.5, 0.75), trace=trace)
    found = generate(Guided(), OTFM, z, labels(z), 4, **how)
    assert Guided.seen == [(t, w, w) for t, w in ((1, 1), (0.75, 3), (0.5, 3), (0.25, 1))]
    assert [copies for *_, copies in trace] == [1, 1, 1, 1]
    torch.testing.assert_close(found, z - (1 + 3 + 3 + 1) / 4)
    for w in (0.5, 4.1, float("nan")):
        with pytest.raises(UserError, match="--guidance"):
            generate(Guided(), OTFM, z, labels(z), 4, w)


# --- How a checkpoint is sampled ------------------------------------------------------------------

THIRD = {"guidance": 2.5, "interval": [0.25, 0.75], "strict_interval": True}
SECOND = {"guidance": 2.5, "guidance_low": 0.25, "guidance_high": 0.75, "guidance_strict": True}
PIXELS = Spec("pixels", (1, 4, 4), 100.0, 50.0)


def save_run(run, train=(), model=(), seed=0):
    config = CONFIG | {"model": MODEL | dict(model), "train": CONFIG["train"] | dict(train)}
    state = lively(**{"seed": seed} | config["model"]).state_dict()
    save(run / "ema.safetensors", state, config)


@pytest.mark.parametrize(
    "record, flags, changed",
    [
        (THIRD, "", {}),
        (SECOND, "", {}),
        (THIRD, "--guidance 1", {"guidance": 1.0}),
        (THIRD, "--guidance 4", {"guidance": 4.0}),
        (THIRD, "--interval 0 1", {"interval": (0.0, 1.0)}),
        (SECOND, "--interval 0 1", {"interval": (0.0, 1.0)}),
        (THIRD, "--no-strict_interval", {"strict": False}),
        (THIRD, "--stochastic 0.3", {"stochastic": 0.3}),
        (THIRD, "--shift 2", {"shift": 2.0}),
        (THIRD, "--seed 5", {"seed": 5}),
        (THIRD | {"shift_tokens": 1}, "", {"shift": 2.0}),  # 4 tokens of a base of 1
        (THIRD | {"shift_tokens": 1}, "--shift 5", {"shift": 5.0}),
        (THIRD | {"share_diffusion": 1.0}, "", {"diffusion_only": True}),
    ],
)
def test_pictures_are_drawn_as_the_checkpoint_says_unless_given(
    run, tmp_path, record, flags, changed
):
    save_run(run, {"transport": "otfm"} | record)

    def draw(seed=0, **how):
        noise = partial(initial_noise, (1, 4, 4), seed, range(3), CPU)
        saved = dict(guidance=2.5, interval=(0.25, 0.75), strict=True, noise=noise)
        return generate(load(run)[0], OTFM, noise(), torch.arange(3), 4, **saved | how)

    argv = ["--checkpoint", run, "--device", "cpu", "--steps", 4, "-n", 3, "--out", tmp_path / "out"]
    main([*map(str, argv), *flags.split()])
    drawn = np.stack([*pictures(tmp_path / "out").values()])[..., None].astype(int)
    assert np.abs(drawn - data.Decoder(PIXELS)(draw(**changed))).max() <= 1
    assert not changed or (draw(**changed) - draw()).abs().max() > 0.01  # it matters


def test_guidance_that_the_network_was_not_trained_for_is_refused(run, tmp_path, refused):
    argv = ["--checkpoint", run, "--device", "cpu", "--steps", 2, "--out", tmp_path / "new" / "a.png"]
    save_run(run, {"guidance": 1.0, "drop": 0.0})
    assert "--guidance" in refused(main, *argv, "--guidance", 2)
    save_run(run, {"guidance": 2.0}, {"guide_range": [1.0, 4.0]})
    for w in ("4.5", "0.9"):
        message = refused(main, *argv, "--guidance", w)
        assert "--guidance" in message and "1 to 4" in message
    assert not (tmp_path / "new").exists()
    for w in ("1", "4"):
        main([*map(str, argv), "--guidance", w])


# --- Noise ----------------------------------------------------------------------------------------


def test_noise_is_normal_and_a_function_of_all_bits_of_its_key():
    """torch's generator on the CPU seeds itself from 32 bits: 1737 and 43705 were equal."""
    keys = [(42, 1737), (42, 43705), (0, 0), (2**32, 0), (0, 1), (1, 0), (2**63 - 1, 0), (0, 2**32)]
    noises = [initial_noise((1, 4, 4), seed, [i]) for seed, i in keys]
    noises += [initial_noise((1, 4, 4), 42, [1737], "cpu", step) for step in (1, 2)]
    assert len({tuple(z.flatten().tolist()) for z in noises}) == len(noises)
    many = initial_noise((1, 20, 20), 0, range(100))
    assert many.dtype == torch.float32 and abs(many.mean()) < 0.02
    assert many.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("stochastic", [0.0, 0.5])
def test_picture_i_is_the_same_in_any_batch(run, stochastic):
    save_run(run, {"transport": "otfm"})
    sampler, conditions = open_sampler(run, CPU, stochastic=stochastic), [i % 5 for i in range(12)]
    whole = sampler.latents(range(12), conditions, 4, 3)
    for part in ([7], [5, 2, 11], range(12)[::-1]):
        found = sampler.latents(part, [conditions[i] for i in part], 4, 3)
        torch.testing.assert_close(found, whole[list(part)], rtol=1e-4, atol=1e-5)
    pixels = sampler.draw(range(12), conditions, 4, 3)
    assert pixels.shape == (12, 4, 4, 1) and pixels.dtype == np.uint8
    for wrong in ([3], [5] * 12, [-2] * 12):
        with pytest.raises(UserError, match="conditions"):
            sampler.draw(range(12), wrong, 4, 3)


# --- Loading --------------------------------------------------------------------------------------


def same_weights(model, state):
    return all(torch.equal(p, state[name]) for name, p in model.named_parameters())


def test_a_checkpoint_gives_back_what_was_saved(run):
    for path in (run, run / "ema.safetensors", str(run)):
        model, transport, config = load(path)
        assert transport is TIM and config.items() >= CONFIG.items() and not model.training
        assert same_weights(model, lively(**MODEL).state_dict()) and model.predict == "f"
        assert not any(p.requires_grad for p in model.parameters())
        assert config["digest"] == load(run)[2]["digest"]
    save_run(run, model={"predict": "x"}, seed=1)
    again, _, other = load(run)
    assert again.predict == "x" and other["digest"] != config["digest"]


def test_a_milestone_is_loaded_from_its_folder(run):
    milestone, state = run / "checkpoints" / "step_00000004", lively(seed=1, **MODEL).state_dict()
    milestone.mkdir(parents=True)
    save(milestone / "ema.safetensors", state, CONFIG | {"step": 4})
    model, _, config = load(milestone)
    assert same_weights(model, state) and config["step"] == 4 and load(run)[2]["step"] == 7


REPLACE = """
import itertools, os, shutil, sys
*sources, file = sys.argv[1:]
for source in itertools.cycle(sources):
    shutil.copyfile(source, file + ".aside")
    os.replace(file + ".aside", file)
"""


@posix
def test_a_file_that_is_replaced_while_it_is_read_is_one_checkpoint_or_the_other(run, tmp_path):
    known, file = {}, run / "ema.safetensors"
    sources = [tmp_path / f"{seed}.safetensors" for seed in (0, 1)]
    for seed, source in enumerate(sources):
        state = lively(seed=seed, **MODEL).state_dict()
        save(source, state, CONFIG)
        known[load(source)[2]["digest"]] = state
    before, seen = file.stat().st_ino, set()
    writer = subprocess.Popen([sys.executable, "-c", REPLACE, *map(str, [*sources, file])])
    try:
        while file.stat().st_ino == before:
            assert writer.poll() is None
        for _ in range(60):
            model, _, config = load(run)
            assert same_weights(model, known[config["digest"]])
            seen.add(config["digest"])
    finally:
        writer.kill()
        writer.wait()
    assert len(seen) == 2


@pytest.mark.parametrize("old_format", [True, False])
@pytest.mark.parametrize("ending", ["pth", "pt", "bin"])
def test_plain_weights_of_torch_save_are_read(tmp_path, old_format, ending):
    state, file = lively(**MODEL).state_dict(), tmp_path / f"a.{ending}"
    torch.save(state, file, _use_new_zipfile_serialization=not old_format)
    assert same_weights(load(file)[0], state)


def test_a_spec_of_the_second_edition_means_what_it_did():
    latents = dict(kind="latents", shape=[4, 2, 2], mean=0.0, std=1.0, scale=0.25, shift=0.5)
    pixels = dict(kind="pixels", shape=[4, 2, 2], mean=100.0, std=50.0, scale=1.0, shift=0.0)
    x = torch.randn(3, 4, 2, 2)
    for record, expected in ((latents, (x - 0.5) * 0.25), (pixels, (x - 100) / 50)):
        spec = Spec.from_json(record | {"classes": ["a"], "text": None})
        torch.testing.assert_close(data.network_space(x, spec, data.seeded(0)), expected)
        assert Spec.from_json(spec.to_json()) == spec


@posix
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_readable_as_the_umask_says(argv, tmp_path, umask, mode):
    before, new = os.umask(umask), tmp_path / "new"
    try:
        new.mkdir()
        save(new / "a.safetensors", {"a": torch.ones(1)}, {})
        main([*argv, "-n", "1", "--out", str(new / "x.npz")])
    finally:
        os.umask(before)
    made = [p for p in new.rglob("*") if p.is_file()]
    assert {p.suffix for p in made} == {".safetensors", ".npz", ".png", ".json"}
    assert {p.stat().st_mode & 0o777 for p in made} == {mode}


def test_a_checkpoint_is_complete_or_not_there(tmp_path, monkeypatch):
    """A write that breaks off leaves the older file as it was."""
    path = tmp_path / "ema.safetensors"
    save(path, dict(a=torch.ones(2)), dict(step=1))

    def fail(state, aside, metadata):
        Path(aside).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(sample, "save_file", fail)
    with pytest.raises(UserError, match="disk full"):
        save(path, dict(a=torch.zeros(2)), dict(step=2))
    assert torch.equal(load_file(path)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["ema.safetensors"]


# --- Many pictures --------------------------------------------------------------------------------


def pictures(folder):
    return {p.name: np.asarray(Image.open(p)) for p in sorted(Path(folder).glob("*.png"))}


def same(first, second):
    """The same files, and in each the same picture but for a rounding."""
    assert first.keys() == second.keys()
    return all(np.abs(first[k].astype(int) - second[k]).max() <= 1 for k in first)


@pytest.fixture
def argv(run):
    return ["--checkpoint", str(run), "--steps", "2", "--device", "cpu"]


def test_the_command_draws_a_grid_and_says_whose(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["--steps", "1", "3", "--classes", "emu", "0", "CAT", "--device", "cpu"])  # the newest run
    said = capsys.readouterr().out
    assert "step 7" in said and "guidance 1.5" in said and "emu, ape, cat" in said
    assert Image.open("samples.png").size > (3 * 64, 2 * 64)  # pixels 16 wide, and labels


def test_many_pictures_go_on_where_they_stopped_in_any_batch(argv, tmp_path):
    argv += ["-n", "7", "--out", str(tmp_path / "whole")]
    main(argv)
    whole = pictures(tmp_path / "whole")
    assert list(whole) == [f"{i:06}.png" for i in range(7)] and whole["000000.png"].shape == (4, 4)
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "whole").iterdir()}
    (tmp_path / "whole" / "000003.png").unlink()
    main([*argv, "--batch", "2"])
    assert [p.name for p in sorted(made) if p.stat().st_mtime_ns != made[p]] == ["000003.png"]
    assert same(whole, pictures(tmp_path / "whole"))


def test_ranks_share_the_pictures_of_one_process(argv, tmp_path):
    main([*argv, "-n", "7", "--out", str(tmp_path / "alone")])
    line = [*torchrun(2), ROOT / "sample.py", *argv, "-n", 7, "--batch", 2, "--out", tmp_path / "two"]
    code, text = shell(line)
    assert code == 0, text
    assert same(pictures(tmp_path / "alone"), pictures(tmp_path / "two"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_npz_holds_the_pictures_of_the_folder(argv, tmp_path, monkeypatch, refused):
    main([*argv, "-n", "12", "--out", str(tmp_path / "x.npz"), "--steps", "1", "2"])
    main([*argv, "-n", "12", "--out", str(tmp_path / "alone")])
    for folder in (tmp_path / "x" / "steps_1", tmp_path / "x" / "steps_2"):
        with np.load(folder.with_suffix(".npz")) as archive:
            assert archive.files == ["arr_0"]
            found = archive["arr_0"]
        assert found.shape == (12, 4, 4, 3) and found.dtype == np.uint8
        assert np.array_equal(found, [np.stack([p] * 3, 2) for p in pictures(folder).values()])
    assert same(pictures(folder), pictures(tmp_path / "alone"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--out" in refused(main, *argv, "-n", 2, "--out", tmp_path / "y.npz")
    assert not list(tmp_path.glob("y*"))


def test_a_folder_is_claimed_by_all_that_its_pictures_depend_on(run, argv, tmp_path, refused):
    save_run(run, {"transport": "otfm"})
    argv += ["-n", "3", "--out", str(tmp_path / "out")]
    main(argv)
    (tmp_path / "out" / "000001.png").unlink()
    for flags, key in (
        ("--seed 1", "seed"), ("--guidance 2", "guidance"), ("--precision bf16", "precision"),
        ("--interval 0 .5", "interval"), ("--strict_interval", "strict"), ("--shift 2", "shift"),
        ("--classes 2 1 0", "conditions"), ("--size 6 6", "shape"), ("--stochastic .1", "stochastic"),
        ("--steps 3", "steps"),
    ):  # fmt: skip
        message = refused(main, *argv, *flags.split())
        assert key in message and "out.json" in message and "--out" in message, message
    save_run(run, {"transport": "otfm"}, seed=1)  # trained again to the same step
    assert "weights" in refused(main, *argv)
    assert not (tmp_path / "out" / "000001.png").exists()
    save_run(run, {"transport": "otfm"})
    main([*argv, "--batch", "1", "--classes", "ape", "bee", "cat", "3", "4"])  # the same by name
    assert len(pictures(tmp_path / "out")) == 3


def test_pictures_of_another_maker_are_neither_counted_nor_replaced(argv, tmp_path, refused):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "000000.png").write_text("mine")
    assert "--out" in refused(main, *argv, "-n", 2, "--out", tmp_path / "mine")
    assert [f.name for f in tmp_path.glob("mine*")] == ["mine"]
    assert (tmp_path / "mine" / "000000.png").read_text() == "mine"


def test_a_full_disk_is_met_before_all_is_drawn(run, tmp_path, monkeypatch):
    """An error of a thread that writes ends the command after one more batch."""
    sampler, drawn = open_sampler(run, CPU), []
    draw = sampler.draw
    monkeypatch.setattr(sampler, "draw", lambda *args: drawn.append(args[0]) or draw(*args))

    def fail(picture, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "write_picture", fail)
    for count, batches in ((12, 2), (2, 1)):
        drawn.clear()
        with pytest.raises(OSError, match="No space left"):
            write_pictures(sampler, numbered(count, [0]), 1, 0, 2, tmp_path / f"many{count}")
        assert len(drawn) == batches


def test_classes_are_asked_for_by_name_or_number():
    names = ("ankle boot", "T-shirt", "7")
    assert class_numbers(["t-shirt", "0", "Ankle Boot", "7"], names, False) == [1, 0, 0, 2]
    assert class_numbers(["turkey", "Turkey"], ("Turkey", "turkey"), False) == [1, 0]
    assert class_numbers(["1", "10", "0"], ("1", "10", "2"), False) == [0, 1, 0]  # names come first
    assert class_numbers(None, tuple("abcdefghijklm"), False) == list(range(10))
    assert class_numbers(None, tuple("abcdefghijklm"), True) == list(range(13))
    assert numbered(3, [4, 2]) == [("000000.png", 0, 4), ("000001.png", 1, 2), ("000002.png", 2, 4)]


# --- Texts ----------------------------------------------------------------------------------------

TEXT = {"channels": 3, "patch": 2, "depth": 1, "width": 32, "heads": 2, "adaln": 8, "caption": 128}


def save_text_run(path, encoder="word_hashes"):
    text = data.HASHES | {"encoder": encoder}
    spec = Spec("pixels", (3, 4, 4), 100.0, 50.0, text=text, prompts=("sun", "red apple"))
    state = lively(**{"classes": None} | TEXT).state_dict()
    save(path, state, CONFIG | {"model": TEXT, "data": spec.to_json()})


@pytest.fixture
def text_run(tmp_path):
    """A run that was trained on captions."""
    save_text_run(tmp_path / "text.safetensors")
    return tmp_path / "text.safetensors"


def captions_in(folder):
    lines = map(json.loads, (Path(folder) / "captions.jsonl").read_text().splitlines())
    return {line["image_file"]: line["captions"] for line in lines}


def test_prompts_are_drawn_in_turn_and_written_beside_the_pictures(text_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--checkpoint", str(text_run), "--device", "cpu", "--steps", "2", "-n"]
    main([*argv, "5", "--out", "own"])
    texts = ["sun", "red apple", "sun", "red apple", "sun"]
    expected = {f"{i:06}.png": [text] for i, text in enumerate(texts)}
    assert captions_in("own") == expected
    assert data.open_data("own", side=4).captions.texts == texts  # trains as it is
    main([*argv, "2", "--out", "own"])  # fewer: the other lines stay
    assert captions_in("own") == expected
    main([*argv, "2", "--out", "asked", "--prompts", "red apple", "blue heart"])
    own, asked = pictures("own"), pictures("asked")
    assert len(asked) == 2 and not np.array_equal(asked["000000.png"], own["000000.png"])
    sampler = open_sampler(text_run, CPU, prompts=["red apple", "blue heart"])
    assert same(asked, {f"{i:06}.png": p for i, p in enumerate(sampler.draw([0, 1], [0, 1], 2, 0))})
    for wrong in (dict(prompts="red apple"), dict(precision="fp16")):
        with pytest.raises(UserError):
            open_sampler(text_run, CPU, **wrong)
    save_text_run(text_run, "bytes")  # its name in the second edition
    main([*argv, "5", "--out", "second"])
    assert same(own, pictures("second"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_file_of_prompts_is_read_as_its_editor_wrote_it(text_run, tmp_path, encoding, line_end):
    file = tmp_path / "prompts.txt"
    file.write_bytes(line_end.join(["red apple", "caf\u00e9", ""]).encode(encoding))
    argv = ["--checkpoint", text_run, "--device", "cpu", "--steps", 1, "-n", 2]
    main([*map(str, argv), "--prompts_file", str(file), "--out", str(tmp_path / "out")])
    assert list(captions_in(tmp_path / "out").values()) == [["red apple"], ["caf\u00e9"]]


def test_a_text_network_is_guided_by_the_empty_text(text_run):
    drawn = {g: open_sampler(text_run, CPU, guidance=g).latents([0], [0], 1, 0) for g in (1.0, 3.0)}
    none = open_sampler(text_run, CPU, prompts=[""], guidance=1.0).latents([0], [0], 1, 0)
    expected = none + 3 * (drawn[1.0] - none)  # one step is linear in f
    torch.testing.assert_close(drawn[3.0], expected, rtol=1e-4, atol=1e-4)
    model, z = load(text_run)[0], torch.randn(1, 3, 4, 4)
    with pytest.raises(UserError):  # it has no row that stands for none
        generate(model, TIM, z, torch.randn(1, 5, 128), 1, 3.0)


# --- A device without float64 ---------------------------------------------------------------------


def test_the_pretended_device_refuses_what_the_true_one_would(no_float64):
    """The helper itself: float64, by whatever way, and tensors of two devices in one operation."""
    mps = data.open_device("cpu")
    x, double = torch.zeros(3, device=mps), torch.zeros(3, dtype=torch.float64)
    assert (x + 1).device == x.device == mps and x.cpu().device.type == "cpu"
    for asked in (x.double, lambda: double.to(mps), lambda: x.to(torch.complex128)):
        with pytest.raises(TypeError, match="no torch.(float64|complex128)"):
            asked()
    with pytest.raises(RuntimeError, match="cpu among those of mps"):
        torch.zeros(3) + x
    for _ in range(100):
        x = x + double[0]
    assert x.dtype == torch.float32


@pytest.mark.parametrize("model", [{}, {"predict": "x"}, {"guide_range": [1.0, 4.0]}])
def test_sampling_makes_no_float64_on_the_device(run, text_run, tmp_path, no_float64, model):
    main(["--checkpoint", str(text_run), "--steps", "2", "--out", str(tmp_path / "grid.png")])
    save_run(run, {"transport": "otfm"} | THIRD, model)
    argv = ["--checkpoint", str(run), "--steps", "1", "3"]
    main([*argv, "--out", str(tmp_path / "grid.png")])
    main([*argv, "--out", str(tmp_path / "many"), "-n", "3", "--stochastic", "0.5", "--shift", "2"])
    found = pictures(tmp_path / "many" / "steps_3")
    drawn = open_sampler(run, CPU, stochastic=0.5, shift=2.0).draw(range(3), range(3), 3, 0)
    assert same(found, {f"{i:06}.png": p[..., 0] for i, p in enumerate(drawn)})


# --- Bad calls: exit status 2, one line that names the flag or file, nothing left behind ----------


def files_in(folder):
    return sorted((str(p), p.stat().st_size) for p in Path(folder).rglob("*"))


def damage(path, how):
    state, config = load_file(path), CONFIG
    if how == "gone":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    elif how in ("text", ""):
        path.write_text(how)
    elif how == "foreign":
        save_file({"other": torch.ones(2)}, path)
    elif how == "foreign record":
        save_file(state, path, metadata={"tim": "[1, 2]"})
    else:
        if how == "of tomorrow":
            config = CONFIG | {"train": CONFIG["train"] | {"transport": how}}
        elif how in state:
            del state[how]
        else:
            state[how.removeprefix("misshapen ")] = torch.zeros(3)
        save(path, state, config)


DAMAGES = ["gone", "cut short", "text", "", "foreign", "foreign record", "blocks.1.attn.proj.bias"]


@pytest.mark.parametrize("how", [*DAMAGES, "extra", "misshapen x_embedder.proj.bias", "of tomorrow"])
def test_damaged_checkpoints_are_refused(run, tmp_path, refused, how):
    damage(run / "ema.safetensors", how)
    before = files_in(tmp_path)
    message = refused(main, "--checkpoint", run, "--device", "cpu", "--out", tmp_path / "a.png")
    assert "ema.safetensors" in message and files_in(tmp_path) == before
    assert how in DAMAGES[:6] or how.split()[-1] in message  # it names the tensor


def test_a_table_inside_of_a_table_is_refused_by_its_keys(tmp_path, refused):
    torch.save({"ema": lively(**MODEL).state_dict(), "step": 3}, tmp_path / "nested.pth")
    message = refused(main, "--checkpoint", tmp_path / "nested.pth", "--device", "cpu")
    assert "nested.pth" in message and "ema" in message and "step" in message


def test_the_newest_run_must_be_there(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    assert "--checkpoint" in refused(main, "--device", "cpu")


BAD = """
--steps 0; --steps 4 -1; --steps many; --steps nan; --step 4; --batch 0; --cfg 2; --precision fp8
--classes 5; --classes 0 -1; --classes zebra; --prompts sun; --size 5 4; --image folder.png
-n 0 --out x; -n many --out x; -n 3; --device nowhere; --device cuda; --device cuda:1
--out folder.png; --out picture.jpg; --out x.npz; --out file/grid.png; --out file -n 2
--seed -1; --seed nan; --seed 9223372036854775808; --guidance nan; --guidance inf
--stochastic 0.2; --stochastic 0.2 -n 2 --out x; --stochastic -0.2; --stochastic nan
--interval 0.6 0; --interval 0 nan; --interval 0 2; --interval 0; --shift nan; --shift 0
text --classes 0; text --prompts_file gone.txt; text --prompts_file latin1.txt
text --prompts_file gone.txt --prompts sun; text --prompts caf\udce9; text --text_encoder /no/such
"""


@pytest.mark.parametrize("call", [call.strip() for call in BAD.strip().replace("\n", ";").split(";")])
def test_bad_calls_are_refused(run, text_run, tmp_path, monkeypatch, refused, call):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("folder.png").mkdir()
    Path("file").write_text("")
    Path("latin1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    before, flags = files_in(tmp_path), call.removeprefix("text ").split()
    checkpoint = text_run if call.startswith("text ") else run
    device = [] if "--device" in flags else ["--device", "cpu"]
    message = refused(main, "--checkpoint", checkpoint, *device, *flags)
    assert flags[0] in message and files_in(tmp_path) == before


def test_the_shell_sees_one_line_and_status_2(tmp_path):
    argv = [sys.executable, ROOT / "sample.py", "--checkpoint", tmp_path / "gone"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
