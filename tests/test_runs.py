"""A run and what it leaves: signals, kills and faults, one owner, its log, its record, its start."""

import contextlib
import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launch import (
    ROOT, command, end, flags_of, log, losses, shell, start, torchrun, train_here, weights,
    with_signal,
)  # fmt: skip
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import evaluate
import sample
import train
from model import SIZES
from sample import draw_grid

# --- A process alone ------------------------------------------------------------------------------


def test_a_process_alone_uses_no_collective(tmp_path, monkeypatch):
    """Training, resume, a grid and many pictures: no group, no collective."""
    names = "all_reduce broadcast broadcast_object_list all_gather all_gather_object barrier reduce"
    for name in (*names.split(), "init_process_group", "new_group", "gather", "scatter"):
        monkeypatch.setattr(dist, name, lambda *args, **how: pytest.fail("a collective, alone"))
    train_here(tmp_path, "--steps", 2)
    run = train_here(tmp_path, "--steps", 4, "--sample_every", 3, pictures=True)
    checkpoint = ["--checkpoint", str(run), "--device", "cpu", "--steps", "2"]
    sample.main([*checkpoint, "--out", str(tmp_path / "grid.png")])
    sample.main([*checkpoint, "-n", "3", "--out", str(tmp_path / "many")])
    assert len(list((tmp_path / "many").glob("*.png"))) == 3


def test_the_demo_makes_no_float64_on_the_device(tmp_path, no_float64, monkeypatch):
    """Training, the log, a grid and `consistency` of the demo, on a device that refuses float64."""
    small = lambda sampler, conditions, steps, *where: draw_grid(sampler, conditions[:2], [2], *where)
    monkeypatch.setattr(train, "draw_grid", small)
    flags = ["--steps", "2", "--batch", "4", "--log_every", "2", "--runs", str(tmp_path)]
    train.main([*flags, "--device", "mps"])
    assert (tmp_path / "demo/samples/step_00000002.png").is_file()
    how = ["--checkpoint", str(tmp_path / "demo"), "-n", "4", "--batch", "4", "--device", "mps"]
    evaluate.main(["consistency", *how])
    assert (tmp_path / "demo/eval/consistency.jsonl").is_file()


def test_the_start_needs_no_posix_module_and_warns_of_nothing(tmp_path):
    """As on Windows, where these modules are not; a lock is then taken in another way."""
    code = """
import sys
blocked = dict.fromkeys(["resource", "fcntl", "pwd", "grp", "termios"])
sys.modules.update(blocked)
import transition, model, data, sample, train, evaluate
for name in blocked:
    del sys.modules[name]
data.command(train.main)
"""
    argv = [sys.executable, "-W", "error::FutureWarning", "-c", code, *flags_of(tmp_path, "--steps", 1)]
    process = start(argv)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and err == "" and "chosen" in out


def test_an_older_python_is_named_at_once():
    code, text = shell([sys.executable, "-c", "import sys; sys.version_info = (3, 10, 9); import data"])
    assert code and len(text.splitlines()) == 1 and "3.11" in text


@pytest.mark.parametrize("stage", ["train", "sample", "evaluate", "data"])
def test_a_missing_package_is_named_at_once(stage):
    """As outside of the environment."""
    code = f"import sys; sys.modules.update(numpy=None, torch=None); import {stage}"
    code, text = shell([sys.executable, "-c", code])
    assert code and len(text.splitlines()) == 1 and "pip install" in text


@pytest.mark.parametrize("name, value", [("RANK", "3"), ("WORLD_SIZE", "4")])
def test_one_variable_left_over_from_a_job_is_one_process(tmp_path, monkeypatch, name, value):
    for other in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    run = train_here(tmp_path, "--steps", 2)
    assert train.checkpoints(run) and len(log(run)) == 2


# --- Signals --------------------------------------------------------------------------------------

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
posix = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
FOR_EVER = ["--steps", 100_000, "--save_every", 100_000]


@pytest.fixture
def unheard():
    """A signal that nobody handles fails the test, not the suite."""

    def fail(number, frame):
        raise AssertionError(f"signal {number} was not handled")

    first = {number: signal.signal(number, fail) for number in SIGNALS}
    yield
    for number, handler in first.items():
        signal.signal(number, handler)


def sent(monkeypatch, at, *numbers):
    """Send these signals to this process during update `at`, counted from 1."""
    monkeypatch.setattr(train, "train_step", with_signal(train.train_step, at, *numbers))


@posix
@pytest.mark.parametrize("numbers", ["SIGTERM", "SIGHUP", "SIGTERM SIGTERM SIGHUP SIGTERM", "SIGINT"])
def test_a_signal_saves_and_ends(tmp_path, monkeypatch, unheard, numbers):
    numbers = [getattr(signal, name) for name in numbers.split()]
    sent(monkeypatch, 3, *numbers)
    with pytest.raises(KeyboardInterrupt) if signal.SIGINT in numbers else contextlib.nullcontext():
        train_here(tmp_path, *FOR_EVER)
    assert [c.name for c in train.checkpoints(tmp_path / "run")] == ["step_00000003"]
    assert list(losses(tmp_path / "run")) == [1, 2, 3]
    monkeypatch.undo()
    assert list(losses(train_here(tmp_path, "--steps", 5))) == [1, 2, 3, 4, 5]


@posix
def test_nohup_ignores_a_hang_up(tmp_path, monkeypatch):
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sent(monkeypatch, 2, signal.SIGHUP)
    try:
        assert max(losses(train_here(tmp_path, "--steps", 4))) == 4
    finally:
        signal.signal(signal.SIGHUP, handler)


@posix
def test_a_stop_in_the_last_update_is_no_stop(tmp_path, capfd, monkeypatch, unheard):
    """Nothing is left to do, so nothing is asked for: no status 130, and no call to run it again."""
    sent(monkeypatch, 2, signal.SIGINT)
    train_here(tmp_path, "--steps", 2)
    assert "again to go on" not in capfd.readouterr().out
    assert [c.name for c in train.checkpoints(tmp_path / "run")] == ["step_00000002"]


@posix
@pytest.mark.parametrize("thread", [False, True], ids=["main thread", "another thread"])
def test_training_from_python_leaves_handlers_as_they_were(tmp_path, thread):
    """Also where it ends with an error; only the main thread may set handlers."""
    mine, faults = (lambda *args: None), []
    first = {number: signal.signal(number, mine) for number in SIGNALS}

    def go(*flags):
        try:
            train_here(tmp_path, *flags)
        except data.UserError as error:
            faults.append(error)

    try:
        for flags in (["--steps", 1], ["--steps", 2, "--lr", 0.5]):
            if thread:
                worker = threading.Thread(target=go, args=flags)
                worker.start()
                worker.join()
            else:
                go(*flags)
            assert [signal.getsignal(number) for number in SIGNALS] == [mine] * len(SIGNALS)
        assert len(faults) == 1 and train.checkpoints(tmp_path / "run")
    finally:
        for number, handler in first.items():
            signal.signal(number, handler)


def wait_for_step(run, step, process, between=lambda: time.sleep(0.05)):
    deadline = time.monotonic() + 300
    while not ((run / "log.jsonl").exists() and max(losses(run), default=0) >= step):
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline
        between()


def saved_by(run) -> int:
    """The update of the one checkpoint, which must be the last of the log."""
    (saved,) = train.checkpoints(run)
    assert int(saved.name[5:]) == max(losses(run)) and (saved / "ema.safetensors").is_file()
    return int(saved.name[5:])


@posix
def test_ctrl_c_saves_although_nobody_reads_what_is_said(tmp_path):
    """As where it also ends the `tee` behind a pipe; status 130, so that `train.py && ...` ends."""
    process = start(command(tmp_path, *FOR_EVER))
    try:
        wait_for_step(tmp_path / "run", 3, process)
        process.stdout.close()
        process.stderr.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=100) == 130
    finally:
        end(process)
    saved_by(tmp_path / "run")


@posix
def test_a_closed_terminal_saves(tmp_path):
    """SIGHUP, and what is said from then on is an error of the terminal."""
    import fcntl
    import termios

    ours, theirs = os.openpty()
    terminal = {name: theirs for name in ("stdin", "stdout", "stderr")}
    become = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    process = start(command(tmp_path, *FOR_EVER), preexec_fn=become, **terminal)
    os.close(theirs)

    def read():
        if select.select([ours], [], [], 0.05)[0]:
            os.read(ours, 4096)

    try:
        wait_for_step(tmp_path / "run", 3, process, read)
        os.close(ours)
        assert process.wait(timeout=100) == 0
    finally:
        end(process)
    saved_by(tmp_path / "run")


@posix
def test_a_second_interrupt_ends_at_once(tmp_path, monkeypatch):
    """In the middle of an update, without a checkpoint; the first waits for its end."""
    seen = []

    def slow(*args):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            seen.append("goes on")
        time.sleep(100)

    monkeypatch.setattr(train, "train_step", slow)
    with pytest.raises(KeyboardInterrupt):
        train_here(tmp_path, *FOR_EVER)
    assert seen[:1] == ["goes on"] and not train.checkpoints(tmp_path / "run")


def children(pid: int) -> list[int]:
    lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    return [int(a) for a, b in (line.split() for line in lines.splitlines()) if int(b) == pid]


@posix
def test_sigterm_to_torchrun_and_its_workers_several_times_saves(tmp_path):
    """What Slurm sends reaches each of them, and torchrun sends its own to its workers."""
    process = start(command(tmp_path, *FOR_EVER, ranks=2))
    try:
        wait_for_step(tmp_path / "run", 3, process)
        workers = children(process.pid)
        assert len(workers) >= 2
        for _ in range(4):
            for pid in (process.pid, *workers):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            time.sleep(0.1)
        process.communicate(timeout=100)
    finally:
        end(process)
    saved_by(tmp_path / "run")


# --- One owner, kills and faults ------------------------------------------------------------------


@posix
def test_a_run_has_one_owner_until_it_is_gone(tmp_path, refused):
    """Also gone by kill -9: no lock is left behind."""
    process = start(command(tmp_path, *FOR_EVER))
    try:
        wait_for_step(tmp_path / "run", 1, process)
        assert "--name" in refused(train.main, *flags_of(tmp_path, "--steps", 2, "--seed", 1))
        train_here(tmp_path, "--steps", 1, "--name", "beside")
        assert process.poll() is None
    finally:
        end(process)
    assert train.checkpoints(train_here(tmp_path, "--steps", 2))


@pytest.mark.parametrize("log_every", [4, 1])
def test_a_bad_update_is_never_saved(tmp_path, monkeypatch, log_every):
    """Also where it is the very one that is due: the sixth, of a checkpoint every three."""
    made, count = train.to_micro_batch, []

    def planted(*args):
        count.append(1)
        part = made(*args)
        if len(count) == 6:
            part.x[0] = math.nan
        return part

    monkeypatch.setattr(train, "to_micro_batch", planted)
    with pytest.raises(data.UserError) as said:
        train_here(tmp_path, "--steps", 9, "--save_every", 3, "--log_every", log_every)
    first = 5 if log_every == 4 else 6
    assert f"updates {first} to 6" in str(said.value) and "loss_" in str(said.value)
    assert [c.name for c in train.checkpoints(tmp_path / "run")] == ["step_00000003"]
    assert all(v.isfinite().all() for v in weights(tmp_path / "run").values())
    monkeypatch.undo()
    assert max(losses(train_here(tmp_path, "--steps", 9, "--save_every", 3))) == 9


def test_a_planted_nan_stops_both_ranks_before_the_save(tmp_path):
    """Update 10, on rank 1 alone, is bad and due to be saved; rank 0 says so."""
    every = ["--steps", 50, "--save_every", 5, "--log_every", 4]
    argv = [*torchrun(2), ROOT / "tests/planted_nan.py", 1, *flags_of(tmp_path, *every)]
    code, text = shell(argv)
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code and "updates 9 to 10" in line and "loss_" in line
    assert train.checkpoints(tmp_path / "run")[-1].name == "step_00000005"
    assert all(v.isfinite().all() for v in weights(tmp_path / "run").values())


def test_an_error_of_all_ranks_is_one_line(tmp_path):
    """Whether each met it by itself, or rank 0 for all."""
    for flags in (["--share_diffusion", 1], ["--data", "nowhere"]):
        code, text = shell(command(tmp_path, *flags, ranks=2))
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert code and flags[0] in line


@posix
@pytest.mark.slow
def test_kill_nine_while_writing_loses_nothing(tmp_path):
    """Ten kills at random moments of back-to-back checkpoint writing; the newest is always whole."""
    code, text = shell([sys.executable, ROOT / "tests/kill_nine.py", tmp_path], timeout=900)
    assert code == 0 and text.count("whole") == 10, text


@posix
def test_a_checkpoint_is_on_the_disk_before_an_older_one_goes(tmp_path, monkeypatch):
    """Its files, its folder, and the folder that names it: a power cut must not take both."""
    train_here(tmp_path, "--steps", 1, "--keep", 1)
    synced, found, sync = set(), [], os.fsync

    def keep(file):
        synced.add(os.fstat(file).st_ino)
        sync(file)

    def checked(change):
        def do(path, *args, **how):
            if Path(path).name == "step_00000001":
                new = tmp_path / "run/checkpoints/step_00000002"
                for file in (*new.iterdir(), new, new.parent):
                    found.append((file.name, file.stat().st_ino in synced))
            return change(path, *args, **how)

        return do

    monkeypatch.setattr(os, "fsync", keep)
    monkeypatch.setattr(os, "replace", checked(os.replace))
    monkeypatch.setattr(shutil, "rmtree", checked(shutil.rmtree))
    train_here(tmp_path, "--steps", 2, "--keep", 1)
    assert {"config.json", "ema.safetensors", "step_00000002", "checkpoints"} < dict(found).keys()
    assert all(dict(found).values()), found


def test_leftovers_of_a_killed_save_go_at_the_next_start(tmp_path):
    run = train_here(tmp_path, "--steps", 1)
    shutil.copytree(train.checkpoints(run)[0], run / "checkpoints/step_00000002.tmp")
    (run / "ema.safetensors.0123.tmp").write_bytes(b"")
    for _ in range(2):  # the newest weights are linked again at each start
        train_here(tmp_path, "--steps", 1)
        assert not list(run.rglob("*.tmp"))


@posix
def test_full_disk_keeps_the_older_checkpoint(tmp_path, refused, monkeypatch):
    """Writing fails half way, at a limit of the file size: a message, and the older one is there."""
    import resource

    train_here(tmp_path, "--steps", 2)
    limits, ignore = resource.getrlimit(resource.RLIMIT_FSIZE), signal.SIG_IGN
    handler = signal.signal(signal.SIGXFSZ, ignore)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        assert "step_00000004" in refused(train.main, *flags_of(tmp_path, "--steps", 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [c.name for c in train.checkpoints(tmp_path / "run")] == ["step_00000002"]
    train_here(tmp_path, "--steps", 4)


def test_a_damaged_checkpoint_is_named_in_one_line(tmp_path, refused):
    run = train_here(tmp_path, "--steps", 2)
    for part in train.checkpoints(run)[-1].glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:1000])
    assert "step_00000002" in refused(train.main, *flags_of(tmp_path, "--steps", 4))


def test_a_line_that_a_crash_cut_swallows_no_other(tmp_path):
    """Neither the configuration of the next start, nor the curve."""
    run = train_here(tmp_path, "--steps", 2)
    file = run / "log.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    train_here(tmp_path, "--steps", 3, pictures=True)
    read = []
    for line in file.read_text().splitlines():
        with contextlib.suppress(ValueError):
            read.append(json.loads(line))
    assert [line["begin"] for line in read if "config" in line] == [0, 2]
    assert [line["step"] for line in read if "step" in line] == [1, 3]
    pytest.importorskip("matplotlib")
    assert (run / "curve.png").is_file()


def test_init_given_to_a_run_that_goes_on_is_told_and_not_read(tmp_path, capsys):
    """Also where the file that it began with is gone."""
    file = tmp_path / "start.safetensors"
    shutil.copy(train_here(tmp_path, "--steps", 1, "--name", "first") / "ema.safetensors", file)
    train_here(tmp_path, "--steps", 2, "--init", file)
    assert "--init" not in capsys.readouterr().err
    file.unlink()
    assert len(log(train_here(tmp_path, "--steps", 3, "--init", file))) == 3
    assert f"--init {file}" in capsys.readouterr().err


def test_a_rate_that_fell_for_another_end_is_told(tmp_path, capsys):
    train_here(tmp_path, "--steps", 2, "--decay", 0.5)
    train_here(tmp_path, "--steps", 3, "--decay", 0.5)
    assert "update 2" in capsys.readouterr().err


def test_the_rate_in_the_log_is_that_of_updates(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "write_checkpoint", lambda *args: time.sleep(1.5))
    run = train_here(tmp_path, "--steps", 3, "--save_every", 1, "--log_every", 1)
    assert all(line["images_per_s"] > 8 / 1.5 for line in log(run))


# --- A run and its record -------------------------------------------------------------------------


def test_old_checkpoints_go_and_milestones_stay_and_load(tmp_path):
    run = train_here(tmp_path, "--steps", 8, "--save_every", 1, "--keep", 2, "--keep_every", 3)
    assert [int(c.name[5:]) for c in train.checkpoints(run)] == [3, 6, 7, 8]
    networks = {c.name: sample.load(c) for c in (*train.checkpoints(run), run)}
    assert [config["step"] for _, _, config in networks.values()] == [3, 6, 7, 8, 8]
    assert len({config["digest"] for _, _, config in networks.values()}) == 4
    sampler = sample.open_sampler(run / "checkpoints/step_00000003", "cpu")
    assert sampler.draw([0], [1], 2, seed=0).shape == (1, 4, 4, 1)


def test_only_its_own_names_are_checkpoints_of_a_run(tmp_path):
    """A copy that the user made is neither resumed from nor deleted, and other files do not matter."""
    made = train_here(tmp_path, "--steps", 1) / "checkpoints"
    shutil.copytree(made / "step_00000001", made / "step_00000001_good")
    (made / "step_notes.txt").write_text("")
    train_here(tmp_path, "--steps", 3, "--save_every", 1, "--keep", 1, "--keep_every", 9)
    kept = ["step_00000001_good", "step_00000003", "step_notes.txt"]
    assert sorted(file.name for file in made.iterdir()) == kept


def test_loss_falls_and_a_run_leaves_what_the_readme_says(tmp_path):
    """Flow matching on the demo's pictures, for a minute's part. log.jsonl: a line of the configuration,
    then lines with these keys; grids of 5 rows and 10 labelled columns; curve.png."""
    flags = "--data demo --channels 1 --side 28 --classes 10 --patch 7 --steps 60 --batch 16 --lr 2e-3"
    flags += " --guide_gt 1 --share_diffusion 1 --share_consistency 0 --log_every 2 --sample_every 30"
    run = train_here(tmp_path, *flags.split(), pictures=True)
    first, *lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    assert first["config"]["steps"] == 60 and {"begin", "torch", "world_size"} <= first.keys()
    always = {"step", "loss", "grad_norm", "images_per_s", "waiting", "lr"}
    for line in lines:
        assert always <= line.keys() <= always | {*train.BINS, "memory_gib"}
    assert [line["step"] for line in lines] == list(range(2, 61, 2)) and "loss_equal" in lines[0]
    values = [line["loss"] for line in lines]
    assert sum(values[-5:]) < 0.6 * sum(values[:5])
    samples = ["data.png", "step_00000030.png", "step_00000060.png"]
    assert sorted(p.name for p in (run / "samples").iterdir()) == samples
    with Image.open(run / "samples/step_00000060.png") as picture:
        assert picture.width > 10 * 28 and picture.height > 5 * 28
    with Image.open(run / "samples/data.png") as picture:  # the first 16 that the network is fed
        assert picture.width > 8 * 28 and picture.height > 2 * 28
        assert np.asarray(picture).std() > 30
    pytest.importorskip("matplotlib")
    with Image.open(run / "curve.png") as curve:
        assert curve.width > 300


def test_a_run_that_is_done_says_so(tmp_path, capsys):
    run = train_here(tmp_path, "--steps", 4)
    train_here(tmp_path, "--steps", 3)
    assert "--steps" in capsys.readouterr().out.splitlines()[-1] and len(log(run)) == 4


def test_settings_younger_than_a_run_do_not_stop_it(tmp_path, refused):
    """Those of network and data, too; a long difference is cut in the message."""
    train_here(tmp_path, "--steps", 2)
    file = train.checkpoints(tmp_path / "run")[-1] / "config.json"
    record = json.loads(file.read_text())
    del record["data"]["prompts"], record["model"]["rope_layout"], record["train"]["guide_range"]
    file.write_text(json.dumps(record))
    train_here(tmp_path, "--steps", 4)
    shutil.rmtree(train.checkpoints(tmp_path / "run")[-1])
    for text in ("{", json.dumps(record | {"data": record["data"] | {"classes": ["none"] * 1000}})):
        file.write_text(text)
        said = refused(train.main, *flags_of(tmp_path, "--steps", 4))
        assert str(file.parent) in said and len(said) < 900


@pytest.fixture
def released(golden_model, tmp_path, monkeypatch):
    """A file like the released ones (trained on otfm, predicting f), and flags of its network."""
    sizes = {"depth": 2, "width": 48, "heads": 2, "adaln": 16}
    monkeypatch.setitem(SIZES, "demo", sizes)
    save_file(golden_model.state_dict(), tmp_path / "c2i.safetensors")
    flags = ["--channels", 4, "--classes", 10, "--steps", 1, "--guide_gt", 1, "--lr", "1e-9", "--init"]
    return [*flags, tmp_path / "c2i.safetensors"]


def test_released_weights_are_not_trained_on_another_transport_unasked(released, tmp_path, refused):
    refuse = lambda *flags: refused(train.main, *flags_of(tmp_path, *released, *flags))
    said = refuse()
    assert "--transport otfm" in said and "--init_anyway" in said
    assert "--predict f" in refuse("--transport", "otfm", "--predict", "x")
    assert not (tmp_path / "run").exists()
    before = load_file(released[-1])["x_embedder.proj.weight"]
    for name, flags in (
        ("same", ["--transport", "otfm"]),
        ("on", ["--init_anyway", "--predict", "x"]),
        ("guided", ["--transport", "otfm", "--guide_range", 1, 2]),  # its embedding of w is new
    ):
        run = train_here(tmp_path, *released, *flags, "--name", name)
        torch.testing.assert_close(weights(run)["x_embedder.proj.weight"], before)


def test_init_with_other_classes_keeps_the_rest(released, tmp_path):
    run = train_here(tmp_path, *released, "--transport", "otfm", "--classes", 4)
    found, old, table = weights(run), load_file(released[-1]), "y_embedder.embedding_table.weight"
    assert len(found[table]) == 5
    torch.testing.assert_close(found[table][-1], old[table][-1])
    torch.testing.assert_close(found["blocks.1.attn.qkv.weight"], old["blocks.1.attn.qkv.weight"])


