"""The sampler against exact flows and the released code's samples; loading; the command."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIG, MODEL
from launch import ROOT, shell, torchrun
from oracle import Network, flow, ideal, instant, lively, variance
from PIL import Image
from safetensors import safe_open

import data
import sample
from data import Spec, UserError
from sample import (
    class_numbers, generate, initial_noise, load, main, numbered, open_sampler, save, write_pictures
)  # fmt: skip
from transition import SIGMA_FLOOR, TRANSPORTS, expand, solve

CPU = torch.device("cpu")
OTFM, TIM, VE = (TRANSPORTS[name] for name in ("otfm", "tim", "ve"))
posix = pytest.mark.skipif(os.name == "nt", reason="modes, and files that are replaced while open")


class Oracle(Network):
    """The ideal network of a transport, which must show it the time itself: it has another c_noise.

    It counts its calls. One that predicts x gives the x of the pair behind the state and f.
    """

    def __init__(self, transport, predict="f"):
        super().__init__(ideal(transport))
        self.transport, self.predict, self.calls = replace(transport, c_noise=lambda t: t), predict, 0

    def __call__(self, x, t, r, y):
        assert t.dtype == r.dtype == torch.float32 and len(x) == len(t) == len(r) == len(y)
        self.calls += len(x)
        f = super().__call__(x, t, r, y)
        return f if self.predict == "f" else solve(self.transport, x, f, t.to(x.dtype))[0]


def gauss(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=rng)


def walk(model, z, steps, *guidance, transport=None, **how):
    """From noise, with class 0 as the condition; and the (t, r, evaluations) of its steps."""
    trace, y = [], torch.zeros(len(z), dtype=torch.long)
    transport = transport or model.transport
    return generate(model, transport, z, y, steps, *guidance, trace=trace, **how), trace


# --- The walk -------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS)
def test_any_way_down_ends_where_the_exact_flow_does(transport):
    """In any number of steps, as the transport spaces them; over any falling times, to t_min or not.
    So does a network that predicts x, but that no list of times may go on below the floor of sigma."""
    z, (low, high) = gauss(4, 1, 2, 2), (transport.t_min, transport.t_max)
    times = torch.tensor([0, 0.3, 0.35, 0.9, 1], dtype=torch.float64)
    times = high - times * (high - low)
    times[-1] = low
    above = torch.linspace(high, low, 200, dtype=torch.float64)
    above = above[transport.sigma(above) >= SIGMA_FLOOR]
    ways = [(predict, steps, low) for predict in "fx" for steps in (1, 2, 7, 128, np.int64(3))]
    ways += [("f", kind(times), low) for kind in (torch.clone, torch.Tensor.tolist, torch.Tensor.numpy)]
    ways += [("f", times[:3], times[2])]
    ways += [("x", above[chosen], above[chosen][-1]) for chosen in ([0, -1], slice(None, None, 45))]
    for predict, steps, end in ways:
        found, trace = walk(Oracle(transport, predict), z, steps)
        start, end = (torch.full((len(z),), float(t), dtype=torch.float64) for t in (high, end))
        expected = flow(transport)(z * transport.sigma(start[0]), start, end)
        assert found.dtype == torch.float64 and trace[-1][1] == end[0]
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
        if isinstance(steps, int):
            spaced = [t for t, *_ in trace] == transport.times(steps)[:-1].tolist()
            assert len(trace) == steps and (spaced or predict == "x")


def test_shifted_steps_have_shifted_odds():
    for shift in (1.0, 3.0, 0.3, 0.01):  # 1 + (shift - 1) is not quite the shift
        _, trace = walk(Oracle(TIM), gauss(1, 1, 2, 2), 4, shift=shift)
        odds = [r / (1 - r) for _, r, _ in trace]
        assert trace[0][0] == 1 and odds == pytest.approx([3 * shift, shift, shift / 3, 0])


def test_plain_diffusion_is_shown_r_equal_t_and_lands_near_in_many_steps():
    def diffusion(x, t, r, y):
        assert torch.equal(t, r)
        return instant(OTFM)(x, t)

    z = gauss(4, 1, 2, 2)
    found, _ = walk(Network(diffusion), z, 128, transport=OTFM, diffusion_only=True)
    exact, _ = walk(Oracle(OTFM), z, 1)
    assert (found - exact).norm() < 0.02 * exact.norm()


BAD_STEPS = [0, -1, np.int64(0), [1.0], [1.0, 0.5, 0.5], [1.0, 0.2, 0.4], [1.0, float("nan"), 0.0]]


@pytest.mark.parametrize("steps", [*BAD_STEPS, [1.1, 0.0], [1.0, -0.1], [0.9, 0.0]])
def test_steps_and_times_that_cannot_be_are_refused(steps):
    with pytest.raises(UserError):
        walk(Oracle(TIM), gauss(1, 1, 2, 2), steps)


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_renewed_noise_keeps_the_marginal_variance(share):
    z, drawn = gauss(20000, 1, 1, 1), []
    at = torch.linspace(1, 0.2, 101, dtype=torch.float64)

    def noise(k):
        drawn.append(k)
        return gauss(*z.shape, seed=k + 1)

    how = dict(stochastic=share, noise=noise)
    found, _ = walk(Oracle(OTFM), z, at, **how)
    assert drawn == list(range(1, 99))  # not in the first step, not in the last
    assert found.var() == pytest.approx(float(variance(OTFM, at[-1])), rel=0.03)
    plain, _ = walk(Oracle(OTFM), z, at)
    kept = torch.corrcoef(torch.stack([found.flatten(), plain.flatten()]))[0, 1]
    assert kept < (0.9 if share == 0.2 else 0.6)  # and it is other noise
    with pytest.raises(UserError, match="otfm"):
        walk(Oracle(TIM), z, 4, **how)


@pytest.mark.parametrize("name", ["otfm", "trigflow", "vp", "ve"])
def test_samples_of_the_released_code(golden, golden_model, near, name):
    """With guidance, and in other numbers of steps, in test_released.py."""
    transport, z, steps = TRANSPORTS[name], golden["sample.z"], 2 if name == "otfm" else 4
    if name == "vp":
        z = z / transport.sigma(torch.tensor(transport.t_max))  # theirs starts from z itself
    times = torch.linspace(transport.t_max, transport.t_min, steps + 1, dtype=torch.float64)
    found = generate(golden_model, transport, z, golden["sample.y"], times)
    near(found, golden[f"sample.{name}.steps{steps}.cfg1"])


# --- Guidance -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transport, steps, interval, strict, guided",
    [
        (OTFM, 4, (0, 1), False, [0, 1, 2, 3]),  # "8 NFE" with guidance is 4 steps of 2,
        (OTFM, 4, (0, 1), True, [1, 2, 3]),  # and 7 where the interval leaves out t = 1
        (OTFM, 4, (0, 0.75), False, [1, 2, 3]),  # both ends count
        (OTFM, 4, (0.25, 0.6), True, [2]),
        (OTFM, 10, (0.3, 1), False, range(8)),  # 3 of ten steps are 0.30000000000000004
        (OTFM, 20, (0.15, 0.55), True, range(10, 17)),
        (OTFM, 3, (1 / 3, 2 / 3), False, [1, 2]),
        (OTFM, 3, (1 / 3, 2 / 3), True, []),
        (VE, 10, (0.35, 0.65), False, [4, 5, 6]),  # a share of the steps, not of t
    ],
)
def test_evaluations_are_counted_and_doubled_within_the_interval(
    transport, steps, interval, strict, guided
):
    z, oracle = gauss(3, 1, 2, 2), Oracle(transport)
    _, trace = walk(oracle, z, steps, 2.0, interval=interval, strict=strict)
    assert [copies for *_, copies in trace] == [2 if k in guided else 1 for k in range(steps)]
    assert oracle.calls / len(z) == steps + len(guided)


def test_guidance_moves_away_from_no_condition():
    """A network of the label alone: f = 1 with class 0, and 0 without: guidance g gives f = g."""
    z = gauss(2, 1, 2, 2)
    label = Network(lambda x, t, r, y: expand((y == 0).to(x), x).expand(x.shape))
    for g in (0.0, 1.0, 2.5):
        for null, f in ((None, g), (torch.zeros(2, dtype=torch.long), 1)):  # or a class stands for none
            found, _ = walk(label, z, 3, g, transport=OTFM, null=null)
            torch.testing.assert_close(found, z - f)


def test_a_network_that_knows_its_guidance_is_shown_it_in_one_evaluation():
    z, seen = gauss(2, 1, 2, 2), []

    def shown(x, t, r, y):
        seen.append((float(t[0]), *y[1].tolist()))
        return expand(y[1], x).to(x).expand(x.shape)

    model = Network(shown, guide_range=(1.0, 4.0))
    found, trace = walk(model, z, 4, 3.0, transport=OTFM, interval=(0.5, 0.75))
    assert seen == [(t, w, w) for t, w in ((1, 1), (0.75, 3), (0.5, 3), (0.25, 1))]
    assert [copies for *_, copies in trace] == [1, 1, 1, 1]
    torch.testing.assert_close(found, z - (1 + 3 + 3 + 1) / 4)
    for w in (0.5, 4.1, float("nan")):
        with pytest.raises(UserError, match="--guidance"):
            walk(model, z, 4, w, transport=OTFM)


# --- How a checkpoint is sampled ------------------------------------------------------------------

THIRD = {"guidance": 2.5, "interval": [0.25, 0.75], "strict_interval": True}


def save_run(run, train=(), model=(), seed=0):
    config = CONFIG | {"model": MODEL | dict(model), "train": CONFIG["train"] | dict(train)}
    state = lively(**{"seed": seed} | config["model"]).state_dict()
    save(run / "ema.safetensors", state, config)
    return state


def command(*argv):
    main(["--device", "cpu", *map(str, argv)])


def pictures(folder):
    return {p.name: np.asarray(Image.open(p)) for p in sorted(Path(folder).glob("*.png"))}


def same(first, second):
    """The same files, and in each the same picture but for a rounding; `second` may be a batch."""
    if isinstance(second, np.ndarray):
        second = {f"{i:06}.png": p for i, p in enumerate(second)}
    assert first.keys() == second.keys()
    return all(np.abs(first[k].astype(int) - np.squeeze(second[k])).max() <= 1 for k in first)


@pytest.mark.parametrize(
    "record, flags, changed",
    [
        ({}, "", {}),
        ({}, "--guidance 1", {"guidance": 1.0}),
        ({}, "--guidance 4", {"guidance": 4.0}),
        ({}, "--interval 0 1", {"interval": (0.0, 1.0)}),
        ({}, "--no-strict_interval", {"strict": False}),
        ({}, "--stochastic 0.3", {"stochastic": 0.3}),
        ({}, "--shift 2", {"shift": 2.0}),
        ({}, "--seed 5", {"seed": 5}),
        ({"shift_tokens": 1}, "", {"shift": 2.0}),  # 4 tokens of a base of 1
        ({"shift_tokens": 1}, "--shift 5", {"shift": 5.0}),
        ({"share_diffusion": 1.0}, "", {"diffusion_only": True}),
    ],
)
def test_pictures_are_drawn_as_the_checkpoint_says_unless_given(
    run, tmp_path, record, flags, changed
):
    save_run(run, {"transport": "otfm"} | THIRD | record)

    def draw(seed=0, **how):
        noise = partial(initial_noise, (1, 4, 4), seed, range(3), CPU)
        saved = dict(guidance=2.5, interval=(0.25, 0.75), strict=True, noise=noise)
        return generate(load(run)[0], OTFM, noise(), torch.arange(3), 4, **saved | how)

    command("--checkpoint", run, "--steps", 4, "-n", 3, "--out", tmp_path / "out", *flags.split())
    decode = data.Decoder(Spec("pixels", (1, 4, 4), 100.0, 50.0))
    assert same(pictures(tmp_path / "out"), decode(draw(**changed)))
    assert not changed or (draw(**changed) - draw()).abs().max() > 0.01  # it matters


def test_guidance_that_the_network_was_not_trained_for_is_refused(run, tmp_path, refused):
    argv = ["--checkpoint", run, "--device", "cpu", "--steps", 2, "--out", tmp_path / "new/a.png"]
    save_run(run, {"guidance": 1.0, "drop": 0.0})
    assert "--guidance" in refused(main, *argv, "--guidance", 2)
    save_run(run, {"guidance": 2.0}, {"guide_range": [1.0, 4.0]})
    assert "1 to 4" in refused(main, *argv, "--guidance", 4.5)
    assert not (tmp_path / "new").exists()
    command(*argv, "--guidance", 4)


def test_noise_is_a_function_of_seed_index_and_step():
    """Of all their bits, and normal: `data.seeded` has tests of its own."""
    keys = [(42, 1737), (42, 43705), (0, 0), (2**32, 0), (0, 1), (1, 0), (0, 2**32), (42, 1737, 1)]
    noises = [initial_noise((1, 4, 4), seed, [i], "cpu", *step) for seed, i, *step in keys]
    assert len({tuple(z.flatten().tolist()) for z in noises}) == len(keys)
    many = initial_noise((1, 20, 20), 0, range(100))
    assert many.dtype == torch.float32 and abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


# --- Checkpoints ----------------------------------------------------------------------------------


def same_weights(model, state):
    return all(torch.equal(p, state[name]) for name, p in model.named_parameters())


def test_a_checkpoint_gives_back_what_was_saved(run):
    """From the folder of a run, of one of its milestones, or the file."""
    milestone, state = run / "checkpoints" / "step_00000004", save_run(run)
    milestone.mkdir(parents=True)
    older = save_run(milestone, model={"predict": "x"}, seed=1)
    for path in (run, run / "ema.safetensors", str(run)):
        model, transport, config = load(path)
        assert transport is TIM and config.items() >= CONFIG.items() and not model.training
        assert same_weights(model, state) and model.predict == "f"
        assert not any(p.requires_grad for p in model.parameters())
        assert config["digest"] == load(run)[2]["digest"]
    again, _, other = load(milestone)
    assert same_weights(again, older) and again.predict == "x" and other["digest"] != config["digest"]


@posix
def test_a_file_that_is_replaced_while_it_is_read_is_one_checkpoint(run, monkeypatch):
    """By a training, just before every opening and again just after."""
    train = lambda seed: save_run(run, {"guidance": 1.0 + seed}, seed=seed)
    seeds, state = count(1), train(1)
    _, _, record = load(run)
    train(0)

    def replacing(*args):
        train(next(seeds))
        stored = safe_open(*args)
        train(next(seeds))
        return stored

    monkeypatch.setattr(sample, "safe_open", replacing)
    model, _, config = load(run)
    assert same_weights(model, state) and config == record


@pytest.fixture
def argv(run):
    return ["--checkpoint", run, "--steps", 2]


@posix
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_readable_as_the_umask_says(argv, tmp_path, umask, mode):
    before, new = os.umask(umask), tmp_path / "new"
    try:
        new.mkdir()
        save(new / "a.safetensors", {"a": torch.ones(1)}, {})
        command(*argv, "-n", 1, "--out", new / "x.npz")
    finally:
        os.umask(before)
    made = [p for p in new.rglob("*") if p.is_file()]
    assert {p.suffix for p in made} == {".safetensors", ".npz", ".png", ".json"}
    assert {p.stat().st_mode & 0o777 for p in made} == {mode}


# --- Many pictures --------------------------------------------------------------------------------


def test_the_command_draws_a_grid_and_says_whose(run, tmp_path, monkeypatch, capsys, refused):
    monkeypatch.chdir(tmp_path)
    for name, moment in (("a", 1), ("z", 2)):
        older = run.with_name(name)
        older.mkdir()
        save_run(older)
        os.utime(older / "ema.safetensors", (moment, moment))
    command("--steps", 1, 3, "--classes", "emu", 0, "CAT")  # of the newest run
    said = capsys.readouterr().out
    for part in (str(Path("runs/demo")), "step 7", "guidance 1.5", "emu, ape, cat"):
        assert part in said
    assert Image.open("samples.png").size > (3 * 64, 2 * 64)  # pixels 16 wide, and labels
    assert "runs/z" in refused(main, "--device", "cpu", "--checkpoint", "runs")  # of those inside
    assert "101 columns" in refused(main, "--device", "cpu", "--classes", *[0] * 101)


def test_many_pictures_go_on_where_they_stopped_in_any_batch(run, argv, tmp_path):
    save_run(run, {"transport": "otfm"})
    argv += ["--steps", 4, "-n", 7, "--stochastic", 0.5, "--out"]
    command(*argv, tmp_path / "whole")
    whole = pictures(tmp_path / "whole")
    assert list(whole) == [f"{i:06}.png" for i in range(7)] and whole["000000.png"].shape == (4, 4)
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "whole").iterdir()}
    (tmp_path / "whole" / "000003.png").unlink()
    command(*argv, tmp_path / "whole", "--batch", 2)
    assert [p.name for p in sorted(made) if p.stat().st_mtime_ns != made[p]] == ["000003.png"]
    assert same(whole, pictures(tmp_path / "whole"))
    code, text = shell([*torchrun(2), ROOT / "sample.py", *argv, tmp_path / "two", "--batch", 2])
    assert code == 0 and same(whole, pictures(tmp_path / "two")), text
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_npz_holds_the_pictures_of_the_folder(argv, tmp_path, monkeypatch, refused):
    command(*argv, "-n", 12, "--out", tmp_path / "x.npz", "--steps", 1, 2)
    command(*argv, "-n", 12, "--out", tmp_path / "alone")
    for folder in (tmp_path / "x" / "steps_1", tmp_path / "x" / "steps_2"):
        with np.load(folder.with_suffix(".npz")) as archive:
            assert archive.files == ["arr_0"]
            found = archive["arr_0"]
        assert found.shape == (12, 4, 4, 3) and found.dtype == np.uint8
        assert np.array_equal(found, [np.stack([p] * 3, 2) for p in pictures(folder).values()])
    assert same(pictures(folder), pictures(tmp_path / "alone"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--out" in refused(main, *argv, "--device", "cpu", "-n", 2, "--out", tmp_path / "y.npz")
    assert not list(tmp_path.glob("y*"))


def test_a_folder_is_claimed_by_all_that_its_pictures_depend_on(run, argv, tmp_path, refused):
    save_run(run, {"transport": "otfm"})
    argv += ["--device", "cpu", "-n", 3, "--out", tmp_path / "out"]
    command(*argv)
    (tmp_path / "out" / "000001.png").unlink()
    for flags, key in (
        ("--seed 1", "seed"), ("--guidance 2", "guidance"), ("--precision bf16", "precision"),
        ("--interval 0 .5", "interval"), ("--strict_interval", "strict"), ("--shift 2", "shift"),
        ("--classes 2 1 0", "conditions"), ("--size 6 6", "shape"), ("--steps 3", "steps"),
        ("--stochastic .1 --steps 50", "stochastic"),
    ):  # fmt: skip
        message = refused(main, *argv, *flags.split())
        assert key in message and "out.json" in message and "--out" in message, message
    save_run(run, {"transport": "otfm"}, seed=1)  # trained again to the same step
    assert "weights" in refused(main, *argv)
    assert not (tmp_path / "out" / "000001.png").exists()
    save_run(run, {"transport": "otfm"})
    command(*argv, "--batch", 1, "--classes", "ape", "bee", "cat", 3, 4)  # the same by name
    assert len(pictures(tmp_path / "out")) == 3
    (tmp_path / "mine").mkdir()  # pictures of another maker are neither counted nor replaced
    (tmp_path / "mine" / "000000.png").write_text("mine")
    assert "--out" in refused(main, *argv, "--out", tmp_path / "mine")
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
    for n, batches in ((12, 2), (2, 1)):
        drawn.clear()
        with pytest.raises(OSError, match="No space left"):
            write_pictures(sampler, numbered(n, [0]), 1, 0, 2, tmp_path / f"many{n}")
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


@pytest.fixture
def text_run(tmp_path):
    """A run that was trained on captions."""
    spec = Spec("pixels", (3, 4, 4), 100.0, 50.0, text=data.HASHES, prompts=("sun", "red apple"))
    state = lively(**{"classes": None} | TEXT).state_dict()
    save(tmp_path / "text.safetensors", state, CONFIG | {"model": TEXT, "data": spec.to_json()})
    return tmp_path / "text.safetensors"


def captions_in(folder):
    lines = map(json.loads, (Path(folder) / "captions.jsonl").read_text().splitlines())
    return {line["image_file"]: line["captions"] for line in lines}


def test_prompts_are_drawn_in_turn_and_written_beside_the_pictures(text_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--checkpoint", text_run, "--steps", 2, "-n"]
    command(*argv, 5, "--out", "own")
    texts = ["sun", "red apple", "sun", "red apple", "sun"]
    expected = {f"{i:06}.png": [text] for i, text in enumerate(texts)}
    assert captions_in("own") == expected
    assert data.open_data("own", side=4).captions.texts == texts  # trains as it is
    command(*argv, 2, "--out", "own")  # fewer: the other lines stay
    assert captions_in("own") == expected
    command(*argv, 2, "--out", "asked", "--prompts", "red apple", "blue heart")
    asked = pictures("asked")
    assert not np.array_equal(asked["000000.png"], pictures("own")["000000.png"])
    sampler = open_sampler(text_run, CPU, prompts=["red apple", "blue heart"])
    drawn = sampler.draw([0, 1], [0, 1], 2, 0)
    assert same(asked, drawn) and drawn.dtype == np.uint8 and drawn.shape == (2, 4, 4, 3)
    for wrong in ([0], [2, 2], [-2, 0]):
        with pytest.raises(UserError, match="condition"):
            sampler.draw([0, 1], wrong, 2, 0)
    for wrong in (dict(prompts="red apple"), dict(precision="fp16")):
        with pytest.raises(UserError):
            open_sampler(text_run, CPU, **wrong)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_file_of_prompts_is_read_as_its_editor_wrote_it(text_run, tmp_path, encoding, line_end):
    file, texts = tmp_path / "prompts.txt", ["red apple", "", "caf\u00e9"]
    file.write_bytes(line_end.join([*texts, ""]).encode(encoding))
    argv = ["--checkpoint", text_run, "--steps", 1, "-n", 4, "--prompts_file", file, "--out"]
    command(*argv, tmp_path / "out")
    assert list(captions_in(tmp_path / "out").values()) == [[text] for text in [*texts, texts[0]]]


def test_a_text_network_is_guided_by_the_empty_text(text_run):
    drawn = {g: open_sampler(text_run, CPU, guidance=g).latents([0], [0], 1, 0) for g in (1.0, 3.0)}
    none = open_sampler(text_run, CPU, prompts=[""], guidance=1.0).latents([0], [0], 1, 0)
    expected = none + 3 * (drawn[1.0] - none)  # one step is linear in f
    torch.testing.assert_close(drawn[3.0], expected, rtol=1e-4, atol=1e-4)
    model, z = load(text_run)[0], torch.randn(1, 3, 4, 4)
    with pytest.raises(UserError):  # it has no row that stands for none
        generate(model, TIM, z, torch.randn(1, 5, 128), 1, 3.0)


@pytest.mark.parametrize("model", [{}, {"predict": "x"}, {"guide_range": [1.0, 4.0]}])
def test_sampling_makes_no_float64_on_the_device(run, text_run, tmp_path, no_float64, model):
    x = torch.zeros(3, device="mps")
    for wrong in (x.double, lambda: x + torch.zeros(3), lambda: x.to(torch.complex128)):
        with pytest.raises((TypeError, RuntimeError), match="mps"):  # the pretended device itself
            wrong()
    command("--checkpoint", text_run, "--steps", 2, "--out", tmp_path / "grid.png")
    save_run(run, {"transport": "otfm"} | THIRD, model)
    argv = ["--checkpoint", run, "--steps", 1, 3, "--out"]
    command(*argv, tmp_path / "grid.png")
    command(*argv, tmp_path / "many", "-n", 3, "--stochastic", 0.5, "--shift", 2)
    sampler = open_sampler(run, CPU, stochastic=0.5, shift=2.0)
    assert same(pictures(tmp_path / "many" / "steps_3"), sampler.draw(range(3), range(3), 3, 0))


# --- Bad calls: exit status 2, one line that names the flag or file, nothing left behind ----------

BAD = """
--steps 0; --steps 4 -1; --steps many; --steps nan; --step 4; --batch 0; --cfg 2; --precision fp8
--classes 5; --classes 0 -1; --classes zebra; --prompts sun; --size 5 4; --image folder.png
-n 0 --out x; -n many --out x; -n 3; --out x.png -n 3; --device nowhere; --device cuda; --device cuda:1
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
    before, flags = sorted(tmp_path.rglob("*")), call.removeprefix("text ").split()
    checkpoint = text_run if call.startswith("text ") else run
    device = [] if "--device" in flags else ["--device", "cpu"]
    message = refused(main, "--checkpoint", checkpoint, *device, *flags)
    assert flags[0] in message and sorted(tmp_path.rglob("*")) == before
    assert Path("file").read_text() == ""


@pytest.mark.parametrize("indices, conditions, steps, seed", [
    ([0], [0, 1], 1, 0), ([], [], 1, 0), ([0], ["ape"], 1, 0), ([0], [9], 1, 0), ([0], [0], 2.5, 0),
])  # fmt: skip
def test_bad_calls_from_python_are_refused(run, indices, conditions, steps, seed):
    sampler = open_sampler(run)
    with pytest.raises(UserError):
        sampler.draw(indices, conditions, steps, seed)
    with pytest.raises(TypeError, match="guidence"):
        open_sampler(run, guidence=1.0)


def test_the_shell_sees_one_line_and_status_2_where_there_is_no_run(tmp_path):
    argv = [sys.executable, ROOT / "sample.py"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "--checkpoint" in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
