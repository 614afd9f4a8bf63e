from pathlib import Path

import pytest
from safetensors.torch import load_file

from model import TiM

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def golden():
    """Outputs, samples and targets of the released code for a small class-conditional network, and its weights."""
    return load_file(HERE / "reference_c2i.safetensors")


@pytest.fixture(scope="session")
def golden_text():
    """The same for a small text-conditional network: outputs on a square, a wide and a tall grid."""
    return load_file(HERE / "reference_t2i.safetensors")


@pytest.fixture(scope="session")
def golden_model(golden):
    sizes = dict(channels=4, patch=2, depth=2, width=48, heads=2, adaln=16, classes=10, projector=(1, 40, 24))
    model = TiM(**sizes).eval().requires_grad_(False)
    model.load_state_dict({k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")})
    return model


@pytest.fixture(scope="session")
def near():
    """Assert that two tensors differ by at most `bound` of the second's largest value."""

    def check(found, expected, bound=1e-5):
        assert found.shape == expected.shape
        scale, worst = expected.abs().max(), (found - expected).abs().max()
        assert worst <= bound * scale, f"off by {float(worst / scale):.2e} of the magnitude, more than {bound:g}"

    return check
