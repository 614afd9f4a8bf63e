"""The network against the released code's outputs; its precision, positions and conditions."""

import math

import pytest
import torch
from conftest import weights_in
from oracle import lively, pair, seeded

from model import SIZES, TiM, lower_precision, rope_table
from transition import (
    TRANSPORTS, exact_derivative, finite_difference, network_f, output_from_x, sample_times,
    transition_target,
)  # fmt: skip

close = torch.testing.assert_close
TEXT = dict(classes=None, caption=7)
each_transport = pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS)


def batch(n=6, channels=3, h=8, w=8, classes=5):
    rng = seeded(5)
    t = torch.rand(n, generator=rng)
    r = t * torch.rand(n, generator=rng)
    return torch.randn(n, channels, h, w, generator=rng), t, r, torch.arange(n) % (classes + 1)


def captions(n, length=5):
    """Features of text and a mask; every second text is shorter."""
    mask = torch.arange(length) < torch.tensor([length, 3]).repeat(n)[:n, None]
    return torch.randn(n, length, TEXT["caption"], generator=seeded(7)), mask


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def inside(transport, place):
    """Times at these places of the range, or of its lower part where it is long."""
    return transport.t_min + place * (min(transport.t_max, 2.0) - transport.t_min)


# --- The released code's own numbers --------------------------------------------------------------

GOLDEN = dict(depth=2, width=48, heads=2, adaln=16, projector=(1, 40, 24))
GOLDEN_CLASSES = GOLDEN | dict(channels=4, patch=2, classes=10)
GOLDEN_TEXT = GOLDEN | dict(channels=8, patch=1, caption=20)


def test_forward_and_projected_tokens_of_the_released_code(golden, golden_model, near):
    inputs = [golden[k] for k in ("x", "t", "r", "y")]
    f, tokens = golden_model(*inputs, aligned=True)
    near(f, golden["out"])
    near(tokens, golden["h_proj"])
    assert torch.equal(golden_model(*inputs), f)


@pytest.mark.parametrize("shape", ["square", "landscape", "portrait"])
def test_text_outputs_of_the_released_code(golden_text, near, shape):
    x, t, r, caption, out = (golden_text[f"{shape}.{k}"] for k in ("x", "t", "r", "caption", "out"))
    model = TiM(**GOLDEN_TEXT, rope_layout="released").eval().requires_grad_(False)
    model.load_state_dict(weights_in(golden_text))
    near(model(x, t, r, caption), out)


@pytest.mark.parametrize(
    "parameters, tensors, size, sizes",
    [
        (664_128_016, 607, "XL", dict(channels=4, patch=2, classes=1000)),
        (664_164_896, 607, "XL", dict(channels=32, patch=1, classes=1000)),
        (864_978_080, 894, "XL", dict(channels=32, patch=1, caption=1152)),
        (128_828_224, 271, "B", dict(channels=4, patch=4, classes=1000)),
    ],
)
def test_released_parameter_counts(parameters, tensors, size, sizes):
    with torch.device("meta"):
        state = TiM(**SIZES[size], **sizes).state_dict()
    assert (sum(p.numel() for p in state.values()), len(state)) == (parameters, tensors)


@pytest.mark.parametrize("arguments", [GOLDEN_CLASSES, GOLDEN_TEXT], ids=["classes", "text"])
def test_what_is_switched_on_adds_its_tensors_to_the_released_ones(golden, golden_text, arguments):
    released = shapes(weights_in(golden_text if "caption" in arguments else golden))
    assert shapes(TiM(**arguments).state_dict()) == released
    for part, switch in (
        ("guide_embedder", dict(guide_range=(1, 2.5))),
        ("projector", dict(projector=None)),
        ("delta_embedder", dict(shared_time=True)),
        ("qkv_d", dict(interval_attention=False)),
    ):
        other = shapes(TiM(**arguments | switch).state_dict())
        changed = dict(other.items() ^ released.items())
        assert changed and all(part in name.split(".") for name in changed)


# --- Positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["grid", "released"])
@pytest.mark.parametrize("h, w", [(2, 3), (3, 2), (4, 4), (24, 40)])
def test_each_token_turns_by_its_place(h, w, layout):
    """The first half with its column n mod w, the second with its row n div w; released: by h."""
    side = w if layout == "grid" else h
    high, low = torch.tensor([divmod(n, side) for n in range(h * w)], dtype=torch.float64).T
    rate = 10000.0 ** (-torch.arange(6, dtype=torch.float64) / 6)
    angle = torch.cat([torch.outer(low, rate), torch.outer(high, rate)], 1)
    table = rope_table(h, w, 24, 10000.0, layout, torch.device("cpu"))
    for found, expected in zip(table, (angle.cos(), angle.sin())):
        close(found, expected.float(), rtol=0, atol=1e-6)


def test_patches_keep_their_place_on_any_grid():
    """With every branch closed a token sees its own patch; outputs are by row, column, channel."""
    sizes = dict(channels=3, patch=2, depth=1, width=16, heads=2, adaln=8, classes=2)
    model = TiM(**sizes).requires_grad_(False)
    linear = model.final_layer.linear
    linear.bias.copy_(torch.arange(12.0))
    x, t, y = torch.zeros(1, 3, 4, 6), torch.ones(1), torch.zeros(1, dtype=torch.long)
    c, i, j = torch.meshgrid(torch.arange(3), torch.arange(4), torch.arange(6), indexing="ij")
    assert torch.equal(model(x, t, t, y)[0], ((i % 2 * 2 + j % 2) * 3 + c).float())
    linear.weight.normal_()
    before = model(x, t, t, y)
    x[0, 1, 3, 2] = 1.0
    changed = (model(x, t, t, y) != before)[0].any(0)
    assert changed[2:4, 2:4].any() and changed.sum() == changed[2:4, 2:4].sum()


# --- Precision ------------------------------------------------------------------------------------


def test_other_types_of_weights_stay_near_fp32():
    """bf16 attention and MLP; and all in double."""
    x, t, r, y = batch(64)
    exact, f = lively()(x, t, r, y), lower_precision(lively())(x, t, r, y)
    error = (f - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.004  # with all products in bf16 it would be twice one rounding
    double = lively().double()(x.double(), t.double(), r.double(), y)
    assert double.dtype == torch.float64
    close(double.float(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("kind", [{}, TEXT, dict(guide_range=(1, 2.5))], ids=["class", "text", "guided"])
def test_what_stays_fp32_under_bf16(kind, masters):
    """All but attention and MLP of the blocks, times unrounded; with masters the weights, too."""
    model, (x, t, r, y) = lower_precision(lively(**kind), masters=masters), batch()
    for name, p in model.named_parameters():
        low = name.startswith("blocks") and name.split(".")[2] in ("attn", "cross_attn", "mlp")
        assert p.dtype == (torch.bfloat16 if low and not masters else torch.float32), name
    seen, inner = [], []
    hear = lambda layer, inputs, out: seen.extend([*inputs[:3], out])
    for block in model.blocks:
        block.register_forward_hook(hear)
        block.adaLN_modulation.register_forward_hook(hear)
        for layer in (block.attn.proj, block.mlp.fc1_x):
            layer.register_forward_hook(lambda layer, inputs, out: inner.append(out))
    for name, layer in model.named_children():
        if name not in ("blocks", "y_embedder"):
            layer.register_forward_hook(hear)
    y = captions(len(x)) if kind == TEXT else y
    assert model(x, t, r, (y, t + 1) if "guide_range" in kind else y).dtype == torch.float32
    assert {s.dtype for s in seen} == {torch.float32} and {s.dtype for s in inner} == {torch.bfloat16}
    assert any(torch.equal(s, t) for s in seen) and any(torch.equal(s, t - r) for s in seen)


# --- The derivative through the network -----------------------------------------------------------


def guided(kind):
    """A lively network in float64 that knows its guidance, and conditions of 4 pictures."""
    y, changes, w = torch.tensor([0, 1, 2, 5]), {}, torch.tensor([1, 1.3, 1.9, 2.5])
    if kind == "text":
        features, mask = captions(4)
        y, changes = (features.double(), mask), TEXT
    return lively(**changes, guide_range=(1, 2.5)).double(), (y, w.double())


@pytest.mark.parametrize("kind", ["plain", "classes", "text"])
@each_transport
def test_forward_mode_and_differences_agree_through_the_network(transport, kind):
    """The last two of a network that knows its guidance."""
    model, y = (lively().double(), torch.tensor([0, 1, 2, 5])) if kind == "plain" else guided(kind)
    t = inside(transport, torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64))
    r = t * torch.tensor([0.1, 0.5, 0.3, 0.7], dtype=torch.float64) + transport.t_min * 0.9
    x, eps = pair(t, 3, 4, 6)
    f = network_f(model, transport, "f")
    exact = exact_derivative(f, transport, x, eps, t, r, y)
    found = [finite_difference(f, transport, x, eps, t, r, y, h) for h in (2e-3, 1e-3, 1e-5)]
    error = [float((df_dt - exact).norm() / exact.norm()) for df_dt in found]
    assert error[0] / error[1] == pytest.approx(4, rel=0.05) and error[2] < 1e-6


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-3), (torch.bfloat16, 0.1)])
@each_transport
def test_a_transports_own_h_makes_a_target_near_that_of_forward_mode(transport, dtype, bound):
    """Times as in training; relative to the target in float64, on average over pictures. Too wide an
    h bends, too narrow a one drowns in rounding: a new transport may need an h of its own."""
    t, r, _ = sample_times(transport, 128, seeded(3), share_diffusion=0, share_consistency=0.2)
    x, eps = torch.randn(2, 128, 3, 8, 8, generator=seeded(4))
    y = torch.arange(128) % 6
    f, exact_f = network_f(lower_precision(lively(), dtype), transport, "f"), lively().double()
    df_dt = finite_difference(f, transport, x, eps, t, r, y, transport.h[dtype == torch.bfloat16])
    found = transition_target(transport, x, eps, t, r, df_dt)
    x, eps, t, r = (part.double() for part in (x, eps, t, r))
    df_dt = exact_derivative(network_f(exact_f, transport, "f"), transport, x, eps, t, r, y)
    exact = transition_target(transport, x, eps, t, r, df_dt)
    error = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert error.mean() < bound


@pytest.mark.parametrize("predict", ["f", "x"])
@each_transport
def test_f_shows_the_network_c_noise_and_turns_a_predicted_x_into_f(transport, predict):
    model, (x, place, _, y) = lively(projector=(1, 12, 7)), batch()
    t = inside(transport, 0.1 + 0.8 * place)
    r = transport.t_min + 0.5 * (t - transport.t_min)
    raw, raw_tokens = model(x, transport.c_noise(t), transport.c_noise(r), y, aligned=True)
    expected = raw if predict == "f" else output_from_x(transport, raw, x, t)
    f = network_f(model, transport, predict)
    assert torch.equal(f(x, t, r, y), expected)
    found, tokens = f(x, t, r, y, aligned=True)
    assert torch.equal(found, expected) and torch.equal(tokens, raw_tokens)


# --- Conditions, switches, errors -----------------------------------------------------------------


def test_a_fresh_network_gives_zero_and_starts_as_the_released_one():
    torch.manual_seed(0)
    model = TiM(**SIZES["demo"], channels=3, patch=2, classes=100).requires_grad_(False)
    assert (model(*batch()) == 0).all()
    for name in ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"):
        assert model.get_submodule(name).weight.std() == pytest.approx(0.02, rel=0.1)
    for name in ("blocks.0.attn.qkv", "blocks.3.mlp.fc1_x", "delta_embedder.mlp.0", "x_embedder.proj"):
        w = model.get_submodule(name).weight.flatten(1)
        xavier = math.sqrt(6 / sum(w.shape))
        assert w.abs().max() == pytest.approx(xavier, rel=0.02)
    for name, p in model.named_parameters():
        assert not name.endswith("bias") or "norm" in name or (p == 0).all(), name


@pytest.mark.parametrize("switch", [{}, dict(shared_time=True), dict(interval_attention=False)])
def test_every_ablation_knows_how_far_it_goes(switch):
    model, (x, t, r, y) = lively(**switch), batch()
    assert (model(x, t, r, y) - model(x, t, t, y)).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["classes", "text"])
def test_each_picture_is_drawn_with_its_own_guidance(kind):
    """y is (y, w): every w gives another output, a picture's is that of its own w alone. It is seen
    as log w: trained weights depend on it."""
    model, (y, w) = guided(kind)
    x, t, r, _ = (part.double() for part in batch(4))
    seen = []
    model.guide_embedder.register_forward_hook(lambda layer, inputs, out: seen.append(inputs[0]))
    f = model(x, t, r, (y, w))
    close(seen, [w.log()])
    for i in range(len(w)):
        same = model(x, t, r, (y, w[i].expand(4)))
        off = (same - f).abs().flatten(1).amax(1)
        assert off[i] < 1e-12 and (off[torch.arange(4) != i] > 1e-3).all()
    single = lambda part: part[:1]
    first = (tuple(map(single, y)) if kind == "text" else single(y)), w[:1]
    close(model(x[:1], t[:1], r[:1], first), f[:1])


@pytest.mark.parametrize("sees", [True, False])
def test_padding_is_not_seen_unless_asked_for(sees):
    model, (x, t, r, _) = lively(**TEXT, caption_mask=sees), batch(2)
    features, mask = (part.flip(0) for part in captions(2))
    other = features.clone()
    other[0, 3:] = 9.0
    f = model(x, t, r, (features, mask))
    differs = (f != model(x, t, r, (other, mask))).flatten(1).any(1).tolist()
    assert differs == [not sees, False]
    close(f[:1], model(x[:1], t[:1], r[:1], features[:1, : 3 if sees else 5]))


def test_sizes_sides_and_times_that_cannot_work_are_refused():
    for wrong in (dict(classes=None), dict(caption=4), dict(heads=3), dict(heads=16)):
        with pytest.raises(ValueError):
            lively(**wrong)
    for side in (dict(h=7), dict(w=9)):
        with pytest.raises(ValueError):
            lively()(*batch(**side))
    x, t, r, y = batch()
    for coarse in ((t.bfloat16(), r), (t, r.half())):
        with pytest.raises(TypeError):
            lively()(x, *coarse, y)
