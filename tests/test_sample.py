"""The sampler against exact flows and the released code's samples; the command against bad input."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIG, MODEL
from oracle import flow, ideal, lively, variance
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import sample
from data import DataSpec, UserError
from sample import (
    Sampler,
    class_numbers,
    generate,
    initial_noise,
    load,
    main,
    numbered,
    open_sampler,
    sampling_options,
    save,
    write_pictures,
)
from transition import SIGMA_FLOOR, TRANSPORTS, expand, interpolate, solve

ROOT = Path(sample.__file__).parent
CPU = torch.device("cpu")
each_transport = pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS)
UNSEE = {  # c_noise backwards, where it is not t itself
    "edm": lambda c: (4 * c).exp(),
    "vp": lambda c: c / 999,
    "ve": lambda c: 2 * c.exp(),
}


class Oracle:
    """The ideal network in the place of a model: it is shown c_noise, in fp32, and counts its calls.

    One that predicts x gives the x of the pair behind the state and f.
    """

    classes = 10

    def __init__(self, transport, predict="f"):
        self.transport, self.predict, self.calls = transport, predict, 0
        self.net, self.unsee = ideal(transport), UNSEE.get(transport.name, lambda c: c)

    def __call__(self, x, t, r, y):
        assert t.dtype == r.dtype == torch.float32 and len(x) == len(t) == len(r) == len(y)
        low, high = self.transport.t_min, self.transport.t_max
        t, r = (self.unsee(s.double()).clamp(low, high) for s in (t, r))
        self.calls += len(x)
        f = self.net(x, t, r)
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
    for steps in (1, 2, 7, 128):
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
        f, x = (
            generate(Oracle(transport, predict), transport, z, labels(z), to)
            for predict in ("f", "x")
        )
        near_enough(x, f, 1e-5)  # times are shown in fp32
        near_enough(x, exact(transport, z, float(to[-1])))


@each_transport
def test_a_predicted_x_is_the_sample_of_one_step(transport):
    """A step to t_min with the x of the pair behind it ends on that x, up to noise of sigma(t_min)."""
    z = gauss(5, 1, 2, 2)
    oracle = Oracle(transport, "x")
    found = generate(oracle, transport, z, labels(z), 1)
    start = torch.full((5,), transport.t_max, dtype=torch.float64)
    x_t = z * transport.sigma(start[0])
    x_hat = oracle(
        x_t, *(transport.c_noise(s).float() for s in (start, start * 0 + transport.t_min)), z
    )
    low = torch.tensor([transport.t_min], dtype=torch.float64)
    alpha, sigma = float(transport.alpha(low)), float(transport.sigma(low))
    assert ((found - alpha * x_hat).abs() <= 1e-4 + 3 * sigma * z.abs().max()).all()


@each_transport
def test_any_falling_list_of_times_composes(transport):
    z, (low, high) = gauss(4, 1, 2, 2), (transport.t_min, transport.t_max)
    times = [high, *(high - part * (high - low) for part in (0.3, 0.35, 0.9)), low]
    direct = generate(Oracle(transport), transport, z, labels(z), [high, low])
    for given in (times, torch.tensor(times, dtype=torch.float64), np.array(times)):
        near_enough(generate(Oracle(transport), transport, z, labels(z), given), direct)
    part = generate(Oracle(transport), transport, z, labels(z), times[:3])  # stopping early
    near_enough(part, exact(transport, z, times[2]))


def test_equal_steps_are_equal_and_shifted_ones_have_shifted_odds():
    transport, z = TRANSPORTS["tim"], gauss(1, 1, 2, 2)
    trace = []
    generate(Oracle(transport), transport, z, labels(z), 4, trace=trace)
    assert [s[:2] for s in trace] == [(1, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0)]
    trace = []
    generate(Oracle(transport), transport, z, labels(z), 4, shift=3.0, trace=trace)
    assert [s[1] / (1 - s[1]) for s in trace] == pytest.approx([9, 3, 1, 0])
    for shift in (0.01, 0.3):  # 1 + (shift - 1) is not quite the shift
        generate(Oracle(transport), transport, z, labels(z), 4, shift=shift, trace=trace)
        assert trace[-4][0] == 1


@pytest.mark.parametrize("kind", [np.int64, np.int32, int])
def test_a_number_of_steps_may_be_numpys(kind):
    transport, z = TRANSPORTS["tim"], gauss(2, 1, 2, 2)
    found = generate(Oracle(transport), transport, z, labels(z), kind(4))
    assert torch.equal(found, generate(Oracle(transport), transport, z, labels(z), 4))


@pytest.mark.parametrize(
    "steps, words",
    [
        (0, "at least 1 step"),
        (-1, "at least 1 step"),
        (np.int64(0), "at least 1 step"),
        ([1.0], "must fall"),
        ([0.5, 0.5], "must fall"),
        ([0.2, 0.4], "must fall"),
        ([1.1, 0.0], "must fall"),
        ([1.0, -0.1], "must fall"),
        ([1.0, float("nan"), 0.0], "must fall"),
        ([0.9, 0.0], "must begin at 1, or give `start`"),
        ([0.9, 0.5], "must begin at 1, or give `start`"),
    ],
)
def test_steps_and_times_that_cannot_be_are_refused(steps, words):
    transport, z = TRANSPORTS["tim"], gauss(1, 1, 2, 2)
    with pytest.raises(UserError, match=words):
        generate(Oracle(transport), transport, z, labels(z), steps)


@each_transport
def test_a_start_is_noised_to_the_first_time_and_carried_on(transport):
    z, clean = gauss(4, 1, 2, 2), gauss(4, 1, 2, 2, seed=1)
    place = 0.6 if transport.t_max <= 2 else 0.01
    time = transport.t_min + place * (transport.t_max - transport.t_min)
    t, r = (torch.full((4,), s, dtype=torch.float64) for s in (time, transport.t_min))
    expected = flow(transport)(interpolate(transport, clean, z, t), t, r)
    given = [time, (time + transport.t_min) / 2, transport.t_min]
    for times in (given[::2], given):
        found = generate(Oracle(transport), transport, z, labels(z), times, start=clean)
        near_enough(found, expected, 1e-3)


class Bland(torch.nn.Linear):
    """A network of the interval alone, f = t - r."""

    classes, predict, patch = 10, "f", 1

    def __init__(self):
        super().__init__(1, 1)

    def forward(self, x, t, r, y):
        return expand(t - r, x).expand(x.shape)


def sampler_of(model, transport, train=(), shape=(1, 2, 2), **options):
    """A Sampler around any network, without files."""
    config = CONFIG | {"train": CONFIG["train"] | {"transport": transport.name, **dict(train)}}
    spec = DataSpec("pixels", shape, 100.0, 50.0, tuple("abcde"))
    chosen = sampling_options(config, **{"guidance": 1.0, **options})
    return Sampler(model, transport, config, spec, data.Decoder(spec), None, chosen, {})


def test_a_network_of_r_equal_t_alone_is_sampled_the_ordinary_way():
    """One that is always shown r = t says 0 and leaves the noise where it is."""
    transport, z = TRANSPORTS["otfm"], initial_noise((1, 2, 2), 0, [0, 1])
    assert (generate(Bland(), transport, z, labels(z), 3) - z).abs().min() > 0.1
    torch.testing.assert_close(generate(Bland(), transport, z, labels(z), 3, local=True), z)
    for share, expected in ((1.0, z), (0.5, generate(Bland(), transport, z, labels(z), 3))):
        sampler = sampler_of(Bland(), transport, {"share_diffusion": share})
        torch.testing.assert_close(sampler.latents([0, 1], [0, 0], 3, 0), expected)


def test_network_evaluations_are_counted_not_claimed():
    transport, z = TRANSPORTS["otfm"], gauss(3, 1, 2, 2)
    for options, expected in (
        (dict(), 4),
        (dict(guidance=2.0), 8),  # "8 NFE" with guidance is 4 steps of 2,
        (dict(guidance=2.0, strict=True), 7),  # and 7 where the interval leaves out t = 1
        (dict(guidance=2.0, interval=(0.0, 0.75)), 7),  # both ends count
        (dict(guidance=2.0, interval=(0.0, 0.75), strict=True), 6),
        (dict(guidance=2.0, interval=(0.25, 0.6)), 6),
        (dict(guidance=2.0, interval=(0.25, 0.6), strict=True), 5),
    ):
        oracle, trace = Oracle(transport), []
        generate(oracle, transport, z, labels(z), 4, trace=trace, **options)
        assert sum(copies for *_, copies in trace) == oracle.calls / len(z) == expected, options


def test_the_interval_is_a_share_of_the_range():
    transport, z, trace = TRANSPORTS["ve"], gauss(1, 1, 2, 2), []
    how = dict(guidance=2.0, interval=(0.35, 0.65), trace=trace)
    generate(Oracle(transport), transport, z, labels(z), 10, **how)
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
        how = dict(guidance=g, null=labels(z) + 1)
        torch.testing.assert_close(
            generate(Label(), TRANSPORTS["otfm"], z, labels(z), 3, **how), z - 1
        )


@pytest.mark.parametrize("steps, ends", [(10, (0.3, 1.0)), (20, (0.15, 0.55)), (12, (1 / 6, 5 / 6)), (3, (1 / 3, 2 / 3))])
def test_the_ends_of_the_interval_are_in_it_unless_strict(steps, ends):
    """In spite of rounding: 0.3 of ten steps is 0.30000000000000004."""
    model, transport, z = Oracle(TRANSPORTS["otfm"]), TRANSPORTS["otfm"], gauss(1, 1, 1, 1)
    low, high = (round(end * steps) for end in ends)
    for strict, expected in ((False, range(low, high + 1)), (True, range(low + 1, high))):
        trace = []
        how = dict(interval=ends, strict=strict, trace=trace, null=labels(z))
        generate(model, transport, z, labels(z), steps, 2.0, **how)
        assert [round(t * steps) for t, _, n in trace if n == 2] == list(expected)[::-1]


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_renewed_noise_keeps_the_marginal_variance(share):
    transport, z = TRANSPORTS["otfm"], gauss(20000, 1, 1, 1)
    at, drawn = torch.linspace(1, 0.2, 101, dtype=torch.float64), []

    def noise(k):
        drawn.append(k)
        return gauss(*z.shape, seed=k + 1)

    how = dict(stochastic=share, noise=noise)
    found = generate(Oracle(transport), transport, z, labels(z), at, **how)
    assert drawn == list(range(1, 99))  # not in the first step, not in the last
    assert found.var() == pytest.approx(float(variance(transport, at[-1])), rel=0.03)
    plain = generate(Oracle(transport), transport, z, labels(z), at)
    kept = torch.corrcoef(torch.stack([found.flatten(), plain.flatten()]))[0, 1]
    assert kept < (0.9 if share == 0.2 else 0.6)  # and it is other noise
    with pytest.raises(UserError, match="otfm"):
        generate(Oracle(TRANSPORTS["tim"]), TRANSPORTS["tim"], z, labels(z), 4, **how)


def test_captions_are_guided_by_the_captions_given_as_none():
    model, transport = lively(classes=None, caption=7), TRANSPORTS["otfm"]
    z, captions, mask = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 7), torch.ones(2, 5).bool()
    null = (torch.zeros_like(captions), mask)
    ones, zeros = torch.ones(2), torch.zeros(2)
    f_cond, f_null = (model(z, ones, zeros, y) for y in ((captions, mask), null))
    found = generate(model, transport, z, (captions, mask), 1, 3.0, null=null)
    expected = z - f_null - 3 * (f_cond - f_null)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="`null`"):
        generate(model, transport, z, (captions, mask), 1, 3.0)


@pytest.mark.parametrize(
    "name, steps, guidance",
    [
        *(("otfm", steps, guidance) for steps in (1, 2, 8) for guidance in (1, 2.5)),
        *((name, 4, 1) for name in ("trigflow", "vp", "ve")),
    ],
)
def test_samples_of_the_released_code(golden, golden_model, near, name, steps, guidance):
    transport, z = TRANSPORTS[name], golden["sample.z"]
    if name == "vp":
        z = z / transport.sigma(torch.tensor(transport.t_max))  # theirs starts from z itself
    how = dict(interval=(0, 0.6), strict=True)
    found = generate(golden_model, transport, z, golden["sample.y"], steps, guidance, **how)
    interval = ".interval0-0.6" if guidance != 1 else ""
    near(found, golden[f"sample.{name}.steps{steps}.cfg{guidance}{interval}"])


# --- How a checkpoint is sampled ------------------------------------------------------------------


GUIDED = {"guidance": 2.5, "guidance_low": 0.1, "guidance_high": 0.6, "guidance_strict": True}


def test_guidance_interval_and_strictness_come_from_the_checkpoint_unless_given():
    config = {"train": {"transport": "otfm", "drop": 0.1} | GUIDED}
    saved = {"guidance": 2.5, "interval": (0.1, 0.6), "strict": True, "stochastic": 0.0}
    assert sampling_options(config) == saved | {"local": False}
    given = {
        "guidance": 1.0,
        "interval": (0.0, 1.0),
        "strict": False,
        "stochastic": 0.3,
        "shift": 2.0,
    }
    for key, value in given.items():
        assert sampling_options(config, **{key: value}) == saved | {"local": False, key: value}
    assert sampling_options(config, **given) == {"local": False} | given
    first_edition = {"train": {"transport": "tim", "guidance": 1.5, "drop": 0.1}}
    expected = {"guidance": 1.5, "interval": (0.0, 1.0), "strict": False, "stochastic": 0.0}
    assert sampling_options(first_edition) == expected | {"local": False}


def test_the_command_guides_as_the_checkpoint_says(run, tmp_path, monkeypatch):
    config = CONFIG | {"train": CONFIG["train"] | GUIDED}
    save(run / "ema.safetensors", lively(**MODEL).state_dict(), config)
    seen = []

    def spy(*args, **how):
        seen.append({k: how[k] for k in ("guidance", "interval", "strict")})
        return generate(*args, **how)

    monkeypatch.setattr(sample, "generate", spy)
    argv = ["--checkpoint", str(run), "--device", "cpu", "--steps", "2"]
    main([*argv, "--out", str(tmp_path / "a.png")])
    assert seen.pop() == {"guidance": 2.5, "interval": (0.1, 0.6), "strict": True}
    flags = ["--guidance", "3", "--interval", "0", "0.5", "--no-strict_interval"]
    main([*argv, "--out", str(tmp_path / "a.png"), *flags])
    assert seen.pop() == {"guidance": 3.0, "interval": (0.0, 0.5), "strict": False}
    sampler = open_sampler(run, CPU)
    sampler.latents([0], [1], 2, 0)
    assert seen.pop() == {"guidance": 2.5, "interval": (0.1, 0.6), "strict": True}


def test_guidance_needs_a_network_that_knows_no_condition(run, refused):
    config = CONFIG | {"train": CONFIG["train"] | {"guidance": 1.0, "drop": 0.0}}
    save(run / "ema.safetensors", lively(**MODEL).state_dict(), config)
    argv = ["--checkpoint", run, "--device", "cpu"]
    assert "--drop 0" in refused(main, *argv, "--guidance", 2)
    out = run / "new" / "grid.png"
    main([*map(str, argv), "--steps", "1", "--out", str(out)])
    assert out.exists()


def test_times_are_shifted_by_the_tokens_as_trained_unless_given():
    transport = TRANSPORTS["otfm"]
    for train, options, odds in (
        ({}, {}, 1.0),
        ({"shift_tokens": 1}, {}, 2.0),  # 4 tokens of a base of 1
        ({"shift_tokens": 1}, {"shift": 5.0}, 5.0),
    ):
        trace = []
        sampler = sampler_of(Bland(), transport, train, **options)
        sampler.latents([0], [0], 2, 0, trace)
        middle = trace[0][1]
        assert middle / (1 - middle) == pytest.approx(odds)


def test_few_steps_of_a_stochastic_sampler_are_warned_of(run, tmp_path, capsys):
    config = CONFIG | {"train": CONFIG["train"] | {"transport": "otfm"}}
    save(run / "ema.safetensors", lively(**MODEL).state_dict(), config)
    argv = ["--checkpoint", str(run), "--device", "cpu", "--out", str(tmp_path / "a.png")]
    for flags, warned in (
        (["--steps", "4", "--stochastic", "0.2"], True),
        (["--steps", "50", "--stochastic", "0.2"], False),
        (["--steps", "4"], False),
    ):
        main([*argv, "--classes", "0", *flags])
        said = capsys.readouterr()
        assert ("biased" in said.out + said.err) == warned, flags


# --- Pictures and checkpoints ---------------------------------------------------------------------


def test_noise_is_a_function_of_seed_and_index():
    whole = initial_noise((1, 4, 4), 3, range(6))
    assert torch.equal(initial_noise((1, 4, 4), 3, [4, 1]), whole[[4, 1]])
    assert not torch.equal(initial_noise((1, 4, 4), 4, range(6)), whole)
    assert len({tuple(z.flatten().tolist()) for z in whole}) == 6
    many = initial_noise((1, 20, 20), 0, range(100))
    assert many.dtype == torch.float32 and abs(many.mean()) < 0.02
    assert many.std() == pytest.approx(1, abs=0.02)


def test_picture_i_is_the_same_in_any_batch(run):
    sampler = open_sampler(run, "cpu")
    conditions = [i % 5 for i in range(12)]
    whole = sampler.latents(range(12), conditions, 3, 0)
    for size in (1, 5):
        parts = [range(12)[k : k + size] for k in range(0, 12, size)]
        found = [sampler.latents(part, [conditions[i] for i in part], 3, 0) for part in parts]
        torch.testing.assert_close(torch.cat(found), whole, rtol=1e-4, atol=1e-5)
    pixels = sampler.draw(range(12), conditions, 3, 0)
    assert pixels.shape == (12, 4, 4, 1) and pixels.dtype == np.uint8
    with pytest.raises(UserError, match=r"conditions \[3\]: one for each index, from 0 to 4"):
        sampler.draw(range(12), [3], 3, 0)
    some = sampler.draw([7, 2], [conditions[7], conditions[2]], 3, 0)
    assert np.abs(some.astype(int) - pixels[[7, 2]]).max() <= 1  # a rounding apart at most


def test_renewed_noise_is_a_function_of_seed_and_index_too(run):
    config = CONFIG | {"train": {"transport": "otfm", "guidance": 1.0, "drop": 0.1}}
    save(run / "ema.safetensors", lively(**MODEL).state_dict(), config)
    whole, plain = (
        open_sampler(run, CPU, stochastic=s).draw(range(6), [0] * 6, 4, 0).astype(int)
        for s in (0.5, 0.0)
    )
    part = open_sampler(run, CPU, stochastic=0.5).draw([5, 2], [0, 0], 4, 0).astype(int)
    assert np.abs(part - whole[[5, 2]]).max() <= 1 and np.abs(whole - plain).max() > 10


def test_a_checkpoint_gives_back_what_was_saved(run):
    for path in (run, run / "ema.safetensors", str(run)):
        model, transport, config = load(path)
        assert transport is TRANSPORTS["tim"] and config == CONFIG and not model.training
        for name, p in lively(**MODEL).named_parameters():
            found = model.get_parameter(name)
            assert torch.equal(p, found) and not found.requires_grad


@pytest.mark.parametrize("predict", ["f", "x"])
def test_a_checkpoint_remembers_what_its_network_predicts(run, predict):
    config = CONFIG | {"model": MODEL | {"predict": predict}}
    save(run / "ema.safetensors", lively(**MODEL).state_dict(), config)
    assert load(run)[0].predict == predict
    save(
        run / "ema.safetensors", lively(**MODEL).state_dict(), CONFIG
    )  # as before there was a choice
    assert load(run)[0].predict == "f"


def pictures(folder):
    return {p.name: np.asarray(Image.open(p)) for p in sorted(Path(folder).glob("*.png"))}


def same(first, second):
    """The same files, and in each the same picture but for a rounding."""
    assert first.keys() == second.keys()
    return all(np.abs(first[k].astype(int) - second[k]).max() <= 1 for k in first)


def test_the_command_draws_a_grid_and_says_whose(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["--steps", "1", "3", "--classes", "emu", "0", "CAT", "--device", "cpu"])  # the newest run
    said = capsys.readouterr().out
    assert "weights of step 7" in said and "guidance 1.5" in said and "emu, ape, cat" in said
    assert Image.open("samples.png").size > (3 * 64, 2 * 64)  # pixels 16 wide, and labels
    (
        tmp_path / "runs" / "demo" / "checkpoints"
    ).mkdir()  # its checkpoint was deleted; these are drawn
    main(["--steps", "1", "--device", "cpu"])
    assert "weights of step 7" in capsys.readouterr().out


def test_many_pictures_are_the_same_in_any_batch_and_go_on_where_they_stopped(run, tmp_path):
    common = ["--checkpoint", str(run), "--steps", "2", "-n", "7", "--device", "cpu"]
    main([*common, "--out", str(tmp_path / "whole")])
    whole = pictures(tmp_path / "whole")
    assert list(whole) == [f"{i:06}.png" for i in range(7)] and whole["000000.png"].shape == (4, 4)
    main([*common, "--out", str(tmp_path / "small"), "--batch", "2"])
    assert same(whole, pictures(tmp_path / "small"))
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "whole").iterdir()}
    (tmp_path / "whole" / "000003.png").unlink()
    main([*common, "--out", str(tmp_path / "whole")])
    assert [p.name for p in sorted(made) if p.stat().st_mtime_ns != made[p]] == ["000003.png"]
    assert same(whole, pictures(tmp_path / "whole"))


def test_ranks_share_the_pictures_of_one_process(run, tmp_path):
    argv = ["sample.py", "--checkpoint", str(run), "--steps", "2", "--device", "cpu"]
    main([*argv[1:], "-n", "7", "--out", str(tmp_path / "alone")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *argv]
    command += ["-n", "7", "--batch", "2", "--out", str(tmp_path / "shared")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    assert same(pictures(tmp_path / "alone"), pictures(tmp_path / "shared"))
    left = [p.name for p in tmp_path.rglob("*.tmp")]
    assert not left


def test_four_pictures_of_one_file_make_a_mosaic_in_the_folder_of_its_name(run, tmp_path):
    sampler = open_sampler(run, CPU)
    jobs = [(f"kind{i // 4}/{i // 4}.png", i, i // 4) for i in range(12)]
    for batch, out in ((100, "whole"), (5, "small"), (1, "one")):
        write_pictures(sampler, jobs, 2, 0, batch, tmp_path / out)
    single = sampler.draw(range(12), [i // 4 for i in range(12)], 2, 0)[..., 0].astype(int)
    for out in ("whole", "small", "one"):
        for k in range(3):
            found = np.asarray(Image.open(tmp_path / out / f"kind{k}" / f"{k}.png")).astype(int)
            a, b, c, d = single[4 * k : 4 * k + 4]
            assert np.abs(found - np.block([[a, b], [c, d]])).max() <= 1


def test_a_folder_is_claimed_by_all_that_its_pictures_depend_on(run, tmp_path, refused):
    out = tmp_path / "out"
    argv = ["--checkpoint", run, "--steps", 2, "--device", "cpu", "--out", out, "-n", 3]
    main([*map(str, argv)])
    record = json.loads((tmp_path / "out.json").read_text())
    expected = {
        "precision": "torch.float32", "autoencoder": "", "step": 7, "steps": 2, "seed": 0,
        "guidance": 1.5, "interval": [0.0, 1.0], "strict": False, "stochastic": 0.0,
        "weights": data.digest_file(run / "ema.safetensors"), "shape": [1, 4, 4],
    }  # fmt: skip
    assert record.items() >= expected.items()
    for flags, key in (
        (["--seed", 1], "seed"), (["--guidance", 2], "guidance"), (["--precision", "bf16"], "precision"),
        (["--interval", 0, 0.5], "interval"), (["--strict_interval"], "strict"),
        (["--classes", 2, 1, 0], "conditions"), (["--size", 6, 6], "shape"), (["--shift", 2], "shift"),
    ):  # fmt: skip
        message = refused(main, *argv, *flags)
        assert key in message and str(tmp_path / "out.json") in message, message
    main([*map(str, argv), "--batch", "1"])  # this changes no picture


def test_pictures_of_another_maker_are_neither_counted_nor_replaced(run, tmp_path, refused):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "000000.png").write_text("mine")
    argv = ["--checkpoint", run, "--device", "cpu", "--steps", 1, "-n", 2]
    assert "holds files, but there is no" in refused(main, *argv, "--out", tmp_path / "mine")
    assert [f.name for f in tmp_path.glob("mine*")] == ["mine"]
    assert (tmp_path / "mine" / "000000.png").read_text() == "mine"


def test_classes_in_another_order_are_other_pictures(run, tmp_path, refused):
    argv = [
        "--checkpoint",
        run,
        "--device",
        "cpu",
        "--steps",
        1,
        "--out",
        tmp_path / "out",
        "-n",
        2,
    ]
    main([*map(str, argv), "--classes", "0", "3"])
    assert "conditions" in refused(main, *argv, "--classes", 3, 0)
    main([*map(str, argv), "--classes", "ape", "dog"])  # the same by name


def test_a_run_trained_again_to_the_same_step_does_not_fill_up_the_old_folder(
    run, tmp_path, refused
):
    argv = [
        "--checkpoint",
        run,
        "--device",
        "cpu",
        "--steps",
        1,
        "--out",
        tmp_path / "out",
        "-n",
        2,
    ]
    main([*map(str, argv)])
    (tmp_path / "out" / "000001.png").unlink()
    save(run / "ema.safetensors", lively(seed=1, **MODEL).state_dict(), CONFIG)
    message = refused(main, *argv)
    assert "weights" in message and str(tmp_path / "out.json") in message and "--out" in message
    assert not (tmp_path / "out" / "000001.png").exists()


TEXT = {"channels": 3, "patch": 2, "depth": 1, "width": 32, "heads": 2, "adaln": 8, "caption": 128}


@pytest.fixture
def text_run(tmp_path):
    """A run that was trained on captions with the text encoder "bytes"."""
    spec = DataSpec("pixels", (3, 4, 4), 100.0, 50.0, text=data.BYTES, prompts=("sun", "red apple"))
    config = CONFIG | {"model": TEXT, "data": spec.to_json()}
    path = tmp_path / "text.safetensors"
    save(path, lively(**{"classes": None} | TEXT).state_dict(), config)
    return path


def test_prompts_are_drawn_in_turn_and_written_beside_the_pictures(text_run, tmp_path):
    argv = ["--checkpoint", str(text_run), "--device", "cpu", "--steps", "2"]
    main([*argv, "-n", "5", "--out", str(tmp_path / "own")])
    lines = [
        json.loads(line) for line in (tmp_path / "own" / "captions.jsonl").read_text().splitlines()
    ]
    texts = ["sun", "red apple", "sun", "red apple", "sun"]
    assert lines == [{"image_file": f"{i:06}.png", "captions": [t]} for i, t in enumerate(texts)]
    assert data.open_data(str(tmp_path / "own"), side=4).captions is not None  # trains as it is
    record = json.loads((tmp_path / "own.json").read_text())
    assert record["text_encoder"] == "bytes"
    main([*argv, "-n", "2", "--out", str(tmp_path / "own")])  # fewer: the other lines stay
    assert len((tmp_path / "own" / "captions.jsonl").read_text().splitlines()) == 5
    with pytest.raises(UserError, match="prompts: a list of texts"):
        open_sampler(text_run, CPU, prompts="red apple")
    with pytest.raises(UserError, match="precision fp16: one of"):
        open_sampler(text_run, CPU, "fp16")

    file = tmp_path / "prompts.txt"
    file.write_text("red apple\nblue heart\n")
    main([*argv, "--prompts_file", str(file), "-n", "2", "--out", str(tmp_path / "asked")])
    own, asked = pictures(tmp_path / "own"), pictures(tmp_path / "asked")
    assert len(asked) == 2 and not np.array_equal(asked["000000.png"], own["000000.png"])
    sampler = open_sampler(text_run, CPU, prompts=["red apple", "blue heart"])
    assert same(asked, {f"{i:06}.png": p for i, p in enumerate(sampler.draw([0, 1], [0, 1], 2, 0))})


def test_a_text_network_is_guided_by_the_empty_text(text_run):
    drawn = {g: open_sampler(text_run, CPU, guidance=g).latents([0], [0], 1, 0) for g in (1.0, 3.0)}
    none = open_sampler(text_run, CPU, prompts=[""], guidance=1.0).latents([0], [0], 1, 0)
    expected = none + 3 * (drawn[1.0] - none)  # one step is linear in f
    torch.testing.assert_close(drawn[3.0], expected, rtol=1e-4, atol=1e-4)


# --- From a picture -------------------------------------------------------------------------------


def test_a_picture_is_forgotten_at_strength_1_and_kept_near_0():
    """With the ideal network for it: of pixels in network space, at any number of steps."""
    transport = TRANSPORTS["tim"]

    class Model(torch.nn.Linear):
        classes, predict, patch = 10, "f", 1

        def forward(self, x, t, r, y):
            return Oracle(transport)(x.double(), t, r, y).float()

    sampler = sampler_of(Model(1, 1), transport, shape=(1, 4, 4))
    picture = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(3))

    def draw(start, strength):
        return replace(sampler, start=start, strength=strength).latents([0, 1], [0, 0], 2, 0)

    plain = sampler.latents([0, 1], [0, 0], 2, 0)
    torch.testing.assert_close(draw(picture, 1.0), plain, rtol=1e-4, atol=1e-4)
    assert (draw(picture, 0.01) - picture).abs().max() < 0.1
    halfway = draw(picture, 0.5)
    assert (halfway - picture).abs().max() > 0.3 and (halfway - plain).abs().max() > 0.3
    trace = []
    replace(sampler, start=picture, strength=0.5).latents([0], [0], 4, 0, trace)
    assert [step[0] for step in trace] == pytest.approx([0.5, 0.375, 0.25, 0.125])
    with pytest.raises(UserError, match="must fall"):
        draw(picture, 0.0)


def test_a_picture_to_start_from_is_turned_as_its_camera_says(tmp_path):
    exif, half = Image.Exif(), np.zeros((40, 40), np.uint8)
    exif[0x0112], half[:, 20:] = 6, 255  # to be turned by a quarter: then the lower half is white
    Image.fromarray(half).save(tmp_path / "in.jpg", exif=exif, quality=95)
    spec = data.DataSpec("pixels", (1, 4, 4), 127.5, 127.5, ("a",))
    x = data.encode_picture(tmp_path / "in.jpg", spec, "cpu")[0, 0]
    assert (x[0] < -0.8).all() and (x[3] > 0.8).all()


def test_the_command_starts_from_a_picture(run, tmp_path, refused):
    shades = np.arange(0, 240, 15, dtype=np.uint8).reshape(4, 4)
    Image.fromarray(shades).save(tmp_path / "in.png")
    argv = [
        "--checkpoint",
        run,
        "--device",
        "cpu",
        "--steps",
        1,
        "-n",
        1,
        "--image",
        tmp_path / "in.png",
    ]
    for strength in (0.01, 0.99):
        main([*map(str, argv), "--out", str(tmp_path / f"{strength}"), "--strength", str(strength)])
    near, far = (pictures(tmp_path / f"{s}")["000000.png"].astype(int) for s in (0.01, 0.99))
    assert np.abs(near - shades).mean() < 5 < np.abs(far - shades).mean()
    record = json.loads((tmp_path / "0.01.json").read_text())
    assert record["strength"] == 0.01
    assert record["image"] == data.digest_file(tmp_path / "in.png")
    (tmp_path / "in.png").write_text("no picture")
    message = refused(main, *argv, "--out", tmp_path / "x")
    assert "in.png" in message and "not a picture" in message
    assert "gone.png" in refused(main, *argv[:-1], tmp_path / "gone.png", "--out", tmp_path / "x")
    for strength in ("nan", "1.5", "-0.1"):
        assert "--strength" in refused(main, *argv, "--out", tmp_path / "x", "--strength", strength)
    message = refused(main, *argv[:-2], "--out", tmp_path / "x", "--strength", 0.5)
    assert "--strength 0.5: only with --image PICTURE" in message


def test_a_full_disk_is_met_before_all_is_drawn(run, tmp_path, monkeypatch):
    """An error of a thread that writes ends the command after one more batch."""
    sampler, drawn = open_sampler(run, CPU), []
    draw = sampler.draw
    monkeypatch.setattr(sampler, "draw", lambda *args: drawn.append(args[0]) or draw(*args))

    def fail(picture, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "write_picture", fail)
    with pytest.raises(OSError, match="No space left"):
        sample.write_pictures(sampler, sample.numbered(12, [0]), 1, 0, 2, tmp_path / "many")
    assert len(drawn) == 2


# --- A device without float64 ---------------------------------------------------------------------


def test_the_pretended_device_refuses_what_the_true_one_would(no_float64):
    """The helper itself: float64, by whatever way, and tensors of two devices in one operation."""
    mps = data.open_device("cpu")
    x, double = torch.zeros(3, device=mps), torch.zeros(3, dtype=torch.float64)
    assert (x + 1).device == x.device == mps and x.cpu().device.type == "cpu"
    for asked in (
        x.double,
        lambda: torch.zeros(3, dtype=torch.float64, device=x.device),
        lambda: double.to(mps),
        lambda: x.to(torch.complex128),
        lambda: torch.arange(3.0, device=mps).type(torch.float64),
    ):
        with pytest.raises(TypeError, match="no torch.(float64|complex128)"):
            asked()
    with pytest.raises(RuntimeError, match="cpu among those of mps"):
        torch.zeros(3) + x
    assert (double.to(mps, torch.float32) + x + double[0]).dtype == torch.float32
    layer = torch.nn.Linear(3, 2).to(mps)
    for _ in range(30):
        layer(x + 1).sum().backward()
    assert layer.weight.device == layer.weight.grad.device == mps
    rng = data.rng(0, device=mps)
    assert torch.randn(2, generator=rng, device=rng.device).device == mps


@pytest.mark.parametrize("predict", ["f", "x"])
def test_sampling_makes_no_float64_on_the_device(run, tmp_path, no_float64, predict):
    config = CONFIG | {"model": MODEL | {"predict": predict}}
    config["train"] = CONFIG["train"] | {"transport": "otfm"} | GUIDED
    save(run / "ema.safetensors", lively(**MODEL).state_dict(), config)
    Image.new("L", (4, 4), 99).save(tmp_path / "in.png")
    argv = ["--checkpoint", str(run), "--steps", "1", "3"]
    main([*argv, "--out", str(tmp_path / "grid.png")])
    flags = ["-n", "3", "--stochastic", "0.5", "--shift", "2"]
    main([*argv, "--out", str(tmp_path / "many"), *flags])
    main([*argv, "--out", str(tmp_path / "grid.png"), "--image", str(tmp_path / "in.png")])
    found = pictures(tmp_path / "many" / "steps_3")
    drawn = open_sampler(run, CPU, stochastic=0.5, shift=2.0).draw(range(3), range(3), 3, 0)
    assert same(found, {f"{i:06}.png": p[..., 0] for i, p in enumerate(drawn)})


def test_texts_make_no_float64_on_the_device(text_run, tmp_path, no_float64):
    main(["--checkpoint", str(text_run), "--steps", "2", "--out", str(tmp_path / "grid.png")])


# --- Bad input: a message that names the value, the rule and the way out, and exit status 2 -------


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
        ("cut short", "not a whole file of plain weights"),
        ("text", "not a whole file of plain weights"),
        ("empty", "not a whole file of plain weights"),
        ("foreign", "1 channels: no autoencoder is known"),
        ("foreign record", "does not fit a network of this version"),
        ("missing", "blocks.1.attn.proj.bias"),
        ("unknown", "extra.weight"),
        ("misshapen", "x_embedder.proj.bias"),
    ],
)
def test_damaged_checkpoints_are_refused(run, refused, how, words):
    damage(run / "ema.safetensors", how)
    message = refused(main, "--checkpoint", run, "--device", "cpu")
    assert words in message and ("ema.safetensors" in message or how == "foreign")


def test_missing_checkpoints_are_refused(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    assert "train.py" in refused(main, "--device", "cpu")
    for path in ("nowhere", tmp_path, tmp_path / "no" / "such" / "ema.safetensors"):
        message = refused(main, "--checkpoint", path, "--device", "cpu")
        assert str(path) in message and "train.py" in message


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--steps 0", "--steps: '0' must be a whole number, at least 1"),
        ("--steps 4 -1", "--steps: '-1'"),
        ("--steps many", "--steps: 'many'"),
        ("--steps nan", "--steps: 'nan'"),
        ("--classes 5", "--classes 5: classes are 0 to 4, or names: ape, bee, cat, dog, emu"),
        ("--classes 0 -1", "--classes"),
        ("--classes zebra", "--classes zebra: classes are 0 to 4, or names: ape"),
        ("--prompts sun", "--prompts: "),
        ("--batch 0", "--batch: '0'"),
        ("-n 0 --out x", "-n/--num: '0'"),
        ("-n many --out x", "-n/--num: 'many'"),
        ("-n 3", "-n and --bench write many pictures; give --out FOLDER"),
        ("--out folder.png", "--out folder.png: a grid is one .png file"),
        ("--out picture.jpg", "--out picture.jpg: a grid is one .png file; or give -n for many"),
        ("--device nowhere", "--device nowhere: not available; use --device cpu"),
        ("--seed -1", "--seed: '-1' must be a whole number, at least 0"),
        ("--seed nan", "--seed: 'nan'"),
        ("--stochastic 0.2", "--stochastic 0.2 is for 'otfm'"),
        ("--stochastic -0.2", "--stochastic: '-0.2'"),
        ("--stochastic nan", "--stochastic: 'nan'"),
        ("--guidance nan", "--guidance nan: not a finite number"),
        ("--guidance inf", "--guidance inf: not a finite number"),
        ("--interval 0.6 0", "--interval 0.6 0: two rising fractions"),
        ("--interval 0 nan", "--interval: 'nan' must be a number from 0 to 1"),
        ("--shift nan", "--shift: 'nan'"),
        ("--shift 0", "--shift: '0'"),
        ("--size 5 4", "--size 5 4: sides must be multiples of 2; the nearest is 4 4"),
        ("--precision fp8", "invalid choice: 'fp8'"),
        ("--cfg 2", "unrecognized arguments: --cfg"),
        ("--image gone.png", "gone.png"),
        ("--image gone.png --strength 0", "--strength: '0' must be a number above 0, at most 1"),
        (f"--seed {2**63}", f"--seed: '{2**63}' must be a whole number"),
        ("--prompts_file gone.txt", "--prompts_file gone.txt"),
        ("--prompts_file gone.txt --prompts sun", "give one of them"),
    ],
)
def test_bad_arguments_are_refused(run, tmp_path, monkeypatch, refused, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    flags = arguments.split()
    device = [] if "--device" in flags else ["--device", "cpu"]
    assert words in refused(main, "--checkpoint", run, *device, *flags)


def test_a_place_that_cannot_be_a_folder_is_refused(run, tmp_path, refused):
    (tmp_path / "file").write_text("")
    argv = ["--checkpoint", run, "--device", "cpu", "--steps", 1, "--out"]
    for flags in ([tmp_path / "file" / "grid.png"], [tmp_path / "file", "-n", 2]):
        message = refused(main, *argv, *flags)
        assert "--out" in message and "cannot be made" in message


def test_a_gpu_that_is_not_there_is_refused(run, monkeypatch, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refused(main, "--checkpoint", run, "--device", "cuda")
    assert "--device cuda: not available; use --device cpu" in message


def test_a_text_network_takes_prompts_not_classes(text_run, refused):
    argv = ["--checkpoint", text_run, "--device", "cpu"]
    assert "give --prompts" in refused(main, *argv, "--classes", 0)
    message = refused(main, *argv, "--text_encoder", "/no/such/folder")
    assert "--text_encoder /no/such/folder: there is no such folder" in message


def test_classes_are_asked_for_by_name_or_number():
    names = ("ankle boot", "T-shirt", "7")
    assert class_numbers(["t-shirt", "0", "Ankle Boot", "7"], names, False) == [1, 0, 0, 2]
    assert class_numbers(None, tuple("abcdefghijklm"), False) == list(range(10))
    assert class_numbers(None, tuple("abcdefghijklm"), True) == list(range(13))
    assert numbered(3, [4, 2]) == [("000000.png", 0, 4), ("000001.png", 1, 2), ("000002.png", 2, 4)]


def test_a_picture_that_cannot_be_written_is_not_passed_over(run, tmp_path, monkeypatch):
    def full(picture, path):
        raise OSError("disk full")

    monkeypatch.setattr(data, "write_picture", full)
    with pytest.raises(OSError, match="disk full"):
        argv = ["--checkpoint", str(run), "-n", "3", "--out", str(tmp_path / "out")]
        main([*argv, "--steps", "1", "--device", "cpu"])


def test_the_shell_sees_one_line_and_status_2(tmp_path):
    argv = [sys.executable, ROOT / "sample.py", "--checkpoint", tmp_path / "gone"]
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
    with pytest.raises(UserError, match="disk full.*choose another folder"):
        save(path, dict(a=torch.zeros(2)), dict(step=2))
    assert torch.equal(load_file(path)["a"], torch.ones(2))
    assert json.loads(json.dumps(CONFIG)) == CONFIG  # the record survives its trip as JSON
