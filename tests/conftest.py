import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # here and in processes that tests start: with two threads, some
# processors sum otherwise, and what must be equal to the bit is not

import pytest
import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import data
import model as network
from model import TiM
from sample import save

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def golden():
    """Outputs, samples and targets of the released code for a small class-conditional network."""
    return load_file(HERE / "reference_c2i.safetensors")


@pytest.fixture(scope="session")
def golden_text():
    """The same, conditional on text: outputs on a square, a wide and a tall grid."""
    return load_file(HERE / "reference_t2i.safetensors")


def weights_in(tensors):
    found = {k: v for k, v in tensors.items() if k.startswith("weights.")}
    return {k.removeprefix("weights."): v for k, v in found.items()}


@pytest.fixture(scope="session")
def golden_weights(golden):
    """Names and tensors as in a released file, with its projector."""
    return weights_in(golden)


@pytest.fixture(scope="session")
def golden_model(golden_weights):
    sizes = dict(channels=4, patch=2, depth=2, width=48, heads=2, adaln=16, classes=10)
    model = TiM(**sizes, projector=(1, 40, 24)).eval().requires_grad_(False)
    model.load_state_dict(golden_weights)
    return model


@pytest.fixture(scope="session")
def near():
    """Assert that two tensors differ by at most `bound` of the second's largest value."""

    def check(found, expected, bound=1e-5):
        assert found.shape == expected.shape
        scale, worst = expected.abs().max(), (found - expected).abs().max()
        assert worst <= bound * scale, f"off by {float(worst / scale):.2e} of it, over {bound:g}"

    return check


@pytest.fixture
def refused(capsys):
    """Run a command that must end with exit status 2 and one line on stderr; returns that line."""

    def check(main, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            data.command(lambda: main([str(a) for a in argv]))
        message = capsys.readouterr().err
        assert stopped.value.code == 2 and "Traceback" not in message
        assert message.startswith("usage: ") or len(message.splitlines()) == 1, message
        return message

    return check


MODEL = dict(channels=1, patch=2, depth=2, width=32, heads=2, adaln=16, classes=5)
CONFIG = {
    "model": MODEL,
    "data": {
        "kind": "pixels", "shape": [1, 4, 4], "mean": 100.0, "std": 50.0,
        "classes": ["ape", "bee", "cat", "dog", "emu"],
    },
    "train": {"transport": "tim", "guidance": 1.5, "drop": 0.1},
    "step": 7,
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run folder as training leaves it: a lively network for pictures of 4 x 4 pixels."""
    from oracle import lively

    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    save(folder / "ema.safetensors", lively(**MODEL).state_dict(), CONFIG)
    return folder


# --- A device without float64 ---------------------------------------------------------------------


class OnDevice(torch.Tensor):
    """A tensor that `NoFloat64` pretends to be on its device."""


class OnDeviceGenerator(torch.Generator):
    """A generator of that device: what is drawn with it is there."""

    device = torch.device("mps")

    def __new__(cls, device="cpu"):
        if torch.device(device).type == "cpu":
            return torch._C.Generator()
        return super().__new__(cls)


def is_tensor(x):
    return isinstance(x, torch.Tensor)


class NoFloat64(TorchFunctionMode):
    """Pretend that "mps" is a device here that, as the true one, has no float64 and shares no memory.

    Its tensors are on the CPU, of the class OnDevice, as is all that is made from them. A result in
    float64 or complex128 among them is refused, and so is one operation on tensors of both devices,
    but for numbers (0-d). Counts the operations on the device.
    """

    MOVES = {torch.Tensor.to, torch.Tensor.copy_, torch.Tensor.cpu, torch.Tensor.data.__set__}
    MOVES |= {torch.Tensor.type, torch.Tensor.set_, torch.Tensor.grad.__set__}

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if is_tensor(x)]
        here = any(isinstance(x, OnDevice) for x in tensors)
        if func is torch._has_compatible_shallow_copy_type:
            return not here or all(isinstance(x, OnDevice) for x in tensors)
        if func == torch.Tensor.device.__get__:
            return torch.device("mps") if here else func(*args)
        if func is torch.Tensor.cpu:
            func, args = torch.Tensor.to, (args[0], "cpu")

        target = kwargs.get("device")
        if func is torch.Tensor.to:
            named = [a for a in args[1:] if isinstance(a, (str, torch.device))]
            target = target or (named[0] if named else None)
            if len(args) > 1 and is_tensor(args[1]):
                target = "mps" if isinstance(args[1], OnDevice) else "cpu"
            here = isinstance(args[0], OnDevice)
        elif isinstance(kwargs.get("generator"), OnDeviceGenerator) and target is None:
            raise RuntimeError(f"{func}: expected a generator of the cpu, found one of mps")
        if target is not None:
            here = torch.device(target).type == "mps"

        def plain(x):  # the device's name for torch, which has none such
            on = isinstance(x, (str, torch.device)) and str(x).startswith("mps")
            return torch.device("cpu") if on else x

        if here and func not in self.MOVES:
            strays = [x for x in tensors if not isinstance(x, OnDevice) and x.ndim > 0]
            if strays:
                shapes = [tuple(x.shape) for x in strays]
                raise RuntimeError(f"{func}: tensors {shapes} of the cpu among those of mps")
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*tree_map(plain, args), **tree_map(plain, kwargs))
            self.operations += here
            return tree_map(lambda x: self.place(x, here, func), found)

    def place(self, x, here, func):
        if not is_tensor(x):
            return x
        if not here:
            return x.as_subclass(torch.Tensor) if type(x) is OnDevice else x
        if x.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{func}: mps has no {x.dtype}, asked for in shape {tuple(x.shape)}")
        return x if isinstance(x, OnDevice) else x.as_subclass(OnDevice)


@pytest.fixture
def no_float64(monkeypatch):
    """Within the test every command runs on a device that refuses float64, see `NoFloat64`.

    Whatever --device says. The test fails if nothing ran there.
    """
    monkeypatch.setattr(data, "open_device", lambda name="auto": torch.device("mps"))
    monkeypatch.setattr(torch, "Generator", OnDeviceGenerator)
    network.rope_table.cache_clear()
    with NoFloat64() as mode:
        yield mode
    network.rope_table.cache_clear()
    assert mode.operations > 100
