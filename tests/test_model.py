"""The network against the released code's outputs; its precision, positions and conditions."""

import math

import pytest
import torch
from conftest import weights_in
from oracle import lively, pair, seeded
from torch.autograd import forward_ad

from model import SIZES, TiM, attend, lower_precision, rope_table, rotate
from transition import (
    TRANSPORTS, exact_derivative, finite_difference, network_f, output_from_x, sample_times,
    transition_target,
)  # fmt: skip

close = torch.testing.assert_close
TEXT = dict(classes=None, caption=7)


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


def rope(h, w, head, layout="grid"):
    return rope_table(h, w, head, 10000.0, layout, torch.device("cpu"))


def inside(transport, place):
    """Times at these places of the range, or of its lower part where it is long."""
    return transport.t_min + place * (min(transport.t_max, 2.0) - transport.t_min)


# --- The released code's own numbers --------------------------------------------------------------


def test_forward_and_projected_tokens_of_the_released_code(golden, golden_model, near):
    inputs = [golden[k] for k in ("x", "t", "r", "y")]
    f, tokens = golden_model(*inputs, aligned=True)
    near(f, golden["out"])
    near(tokens, golden["h_proj"])
    assert torch.equal(golden_model(*inputs), f)


GOLDEN = dict(depth=2, width=48, heads=2, adaln=16, projector=(1, 40, 24))
GOLDEN_CLASSES = GOLDEN | dict(channels=4, patch=2, classes=10)
GOLDEN_TEXT = GOLDEN | dict(channels=8, patch=1, caption=20)


@pytest.mark.parametrize("shape", ["square", "landscape", "portrait"])
def test_text_outputs_of_the_released_code(golden_text, near, shape):
    x, t, r, caption, out = (golden_text[f"{shape}.{k}"] for k in ("x", "t", "r", "caption", "out"))
    for layout in ("released", "grid"):
        model = TiM(**GOLDEN_TEXT, rope_layout=layout).eval().requires_grad_(False)
        model.load_state_dict(weights_in(golden_text))
        if layout == "released" or shape == "square":
            near(model(x, t, r, caption), out)
        else:  # the positions do matter
            assert (model(x, t, r, caption) - out).abs().max() > 0.1 * out.abs().max()


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
        aligned = TiM(**SIZES[size], **sizes, projector=(8, 2048, 768)).state_dict()
    assert (sum(p.numel() for p in state.values()), len(state)) == (parameters, tensors)
    extra = aligned.keys() - state.keys()
    assert extra == {f"projector.{i}.{k}" for i in (0, 2, 4) for k in ("weight", "bias")}


# --- Positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("h, w", [(2, 3), (3, 2), (4, 4), (24, 40)])
def test_each_token_turns_by_its_column_and_row(h, w):
    cos, sin = rope(h, w, 24)
    assert cos.shape == sin.shape == (h * w, 12) and cos.dtype == torch.float32
    rate = 10000.0 ** (-torch.arange(6, dtype=torch.float64) / 6)
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    angle = torch.cat([column.reshape(-1, 1) * rate, row.reshape(-1, 1) * rate], 1)
    close(cos, angle.cos().float(), rtol=0, atol=1e-6)
    close(sin, angle.sin().float(), rtol=0, atol=1e-6)


def test_the_released_layout_is_another_one_off_the_square():
    """Of token n the first half turns with n mod h, the second with n div h."""
    assert all(torch.equal(a, b) for a, b in zip(rope(4, 4, 8, "released"), rope(4, 4, 8)))
    h, w = 2, 6
    places = [divmod(n, h) for n in range(h * w)]
    angles = torch.tensor([[low, low / 100, high, high / 100] for high, low in places])
    for found, expected in zip(rope(h, w, 8, "released"), (angles.cos(), angles.sin())):
        close(found, expected)


def test_rotation_is_a_complex_product_and_keeps_only_distances():
    h, w, K = 3, 5, 16
    table = rope(h, w, K)
    x = torch.randn(2, 3, h * w, K, dtype=torch.float64, generator=seeded(0))
    unit = torch.complex(*(part.double() for part in table))
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * unit
    close(rotate(x, table), torch.view_as_real(turned).flatten(-2))
    assert rotate(x.bfloat16(), table).dtype == torch.bfloat16
    q, k = (rotate(v.expand(h * w, K), table) for v in (x[0, 0, 0], x[0, 0, 1]))
    logits = (q @ k.T).view(h, w, h, w)
    close(logits[1:, 2:, 1:, 2:], logits[:-1, :-2, :-1, :-2], rtol=1e-5, atol=1e-5)


def test_patches_keep_their_place_on_any_grid():
    """With every branch closed a token sees its own patch; outputs are by row, column, channel."""
    sizes = dict(channels=3, patch=2, depth=1, width=16, heads=2, adaln=8, classes=2)
    model = TiM(**sizes).requires_grad_(False)
    linear = model.final_layer.linear
    linear.bias.copy_(torch.arange(12.0))
    x, t = torch.zeros(1, 3, 4, 6), torch.ones(1)
    f = model(x, t, t, torch.zeros(1, dtype=torch.long))
    for c in range(3):
        for i in range(4):
            for j in range(6):
                assert f[0, c, i, j] == (i % 2 * 2 + j % 2) * 3 + c
    linear.weight.normal_()
    before = model(x, t, t, torch.zeros(1, dtype=torch.long))
    x[0, 1, 3, 2] = 1.0
    changed = (model(x, t, t, torch.zeros(1, dtype=torch.long)) != before)[0].any(0)
    assert changed[2:4, 2:4].any() and changed.sum() == changed[2:4, 2:4].sum()


# --- Precision ------------------------------------------------------------------------------------


def test_bf16_attention_and_mlp_stay_near_fp32():
    x, t, r, y = batch(64)
    exact, f = lively()(x, t, r, y), lower_precision(lively())(x, t, r, y)
    error = (f - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.004  # with all products in bf16 it would be twice one rounding
    assert f.dtype == torch.float32


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("kind", [{}, TEXT, dict(guide_range=(1, 2.5))], ids=["class", "text", "guided"])
def test_what_stays_fp32_under_bf16(kind, masters):
    """All but attention and MLP of the blocks; with masters the weights keep fp32, too."""
    model, (x, t, r, y) = lower_precision(lively(**kind), masters=masters), batch()
    low = {"attn", "cross_attn", "mlp"}
    parts = {n: p.dtype for n, p in model.named_parameters()}
    for name, dtype in parts.items():
        is_low = name.startswith("blocks") and name.split(".")[2] in low and not masters
        assert dtype == (torch.bfloat16 if is_low else torch.float32), name
    seen, inner = [], []
    for block in model.blocks:
        block.register_forward_hook(lambda layer, inputs, out: seen.extend([*inputs[:3], out]))
        block.adaLN_modulation.register_forward_hook(lambda layer, inputs, out: seen.append(out))
        block.attn.proj.register_forward_hook(lambda layer, inputs, out: inner.append(out))
        block.mlp.fc1_x.register_forward_hook(lambda layer, inputs, out: inner.append(out))
    times = [m for n, m in model.named_children() if n in ("t_embedder", "delta_embedder", "guide_embedder")]
    for layer in (model.x_embedder, *times, model.final_layer):
        layer.register_forward_hook(lambda layer, inputs, out: seen.extend([inputs[0], out]))
    y = captions(len(x)) if kind == TEXT else y
    assert model(x, t, r, (y, t + 1) if "guide_range" in kind else y).dtype == torch.float32
    assert {s.dtype for s in seen} == {torch.float32} and {s.dtype for s in inner} == {torch.bfloat16}


def test_times_reach_the_network_unrounded():
    model, (x, t, r, y) = lower_precision(lively()), batch()
    seen = []
    for layer in (model.t_embedder, model.delta_embedder):
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    model(x, t, r, y)
    assert {s.dtype for s in seen} == {torch.float32}
    assert any(torch.equal(s, t) for s in seen) and any(torch.equal(s, t - r) for s in seen)
    for bad in ((t.bfloat16(), r), (t, r.half())):
        with pytest.raises(TypeError):
            model(x, *bad, y)


def test_double_weights_give_double_outputs():
    x, t, r, y = batch()
    f = lively().double()(x.double(), t.double(), r.double(), y)
    assert f.dtype == torch.float64
    close(f.float(), lively()(x, t, r, y), rtol=1e-4, atol=1e-5)


# --- The derivative through the network -----------------------------------------------------------


def guided(kind):
    """A lively network in float64 that knows its guidance, and conditions of 4 pictures."""
    y = captions(4) if kind == "text" else torch.tensor([0, 1, 2, 5])
    y = (y[0].double(), y[1]) if kind == "text" else y
    changes = TEXT if kind == "text" else {}
    return lively(**changes, guide_range=(1, 2.5)).double(), (y, torch.tensor([1, 1.3, 1.9, 2.5]).double())


@pytest.mark.parametrize("kind", ["plain", "classes", "text"])
@pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS)
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


FP32 = [(name, torch.float32, 2e-3) for name in TRANSPORTS]
BF16 = [(name, torch.bfloat16, 0.1) for name in ("otfm", "trigflow", "edm", "vp", "ve", "tim")]


@pytest.mark.parametrize("name, dtype, bound", FP32 + BF16)
def test_a_transports_own_h_makes_a_target_near_that_of_forward_mode(name, dtype, bound):
    """Times as in training; relative to the target in float64, on average over pictures. Too wide an
    h bends, too narrow a one drowns in rounding: a new transport may need an h of its own."""
    transport = TRANSPORTS[name]
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


@pytest.mark.parametrize("moves", ["qkv", "q", "v", "k"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_has_the_tangent_of_plain_products(moves, masked):
    rng, sizes = seeded(0), (5, 7, 7) * 2
    q, k, v, *d = (torch.randn(2, 3, n, 8, generator=rng, dtype=torch.float64) for n in sizes)
    mask = torch.rand(2, 1, 1, 7, generator=rng) < 0.6 if masked else None
    d = [x * (name in moves) for name, x in zip("qkv", d)]

    def plain(q, k, v):
        scores = q @ k.mT / 8**0.5
        return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(3) @ v

    out, dout = torch.func.jvp(plain, (q, k, v), tuple(d))
    with torch.no_grad(), forward_ad.dual_level():
        args = [forward_ad.make_dual(x, dx) if dx.any() else x for x, dx in zip((q, k, v), d)]
        found, tangent = forward_ad.unpack_dual(attend(*args, mask))
    close(found, out)
    close(tangent, dout)
    close(attend(q, k, v, mask), out)


# --- The paper's f of a network -------------------------------------------------------------------


@pytest.mark.parametrize("predict", ["f", "x"])
@pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS)
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


def test_the_ablations_change_what_they_name():
    x, t, r, y = batch()
    full, shared, plain = lively(), lively(shared_time=True), lively(interval_attention=False)
    names, without_d, without_qkv_d = (shapes(m.state_dict()).keys() for m in (full, shared, plain))
    assert names - without_d == {n for n in names if n.startswith("delta_embedder")} != set()
    assert names - without_qkv_d == {n for n in names if "qkv_d" in n} != set()
    for model in (full, shared, plain):
        assert (model(x, t, r, y) - model(x, t, t, y)).abs().max() > 0.1  # all know how far they go


@pytest.mark.parametrize("arguments", [GOLDEN_CLASSES, GOLDEN_TEXT], ids=["classes", "text"])
def test_without_guide_range_the_tensors_are_the_released_ones(golden, golden_text, arguments):
    released = shapes(weights_in(golden_text if "caption" in arguments else golden))
    assert shapes(TiM(**arguments).state_dict()) == released
    knows = shapes(TiM(**arguments, guide_range=(1, 2.5)).state_dict())
    new = {name: knows.pop(name) for name in knows.keys() - released.keys()}
    assert knows == released and new and all(name.startswith("guide_embedder.") for name in new)


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


def test_padding_is_not_seen_unless_asked_for():
    x, t, r, _ = batch(2)
    features, mask = captions(2)
    mask, other = mask.flip(0), features.flip(0).clone()
    features = features.flip(0)
    other[0, 3:] = 9.0
    for sees in (True, False):
        model = lively(**TEXT, caption_mask=sees)
        f = model(x, t, r, (features, mask))
        differs = (f != model(x, t, r, (other, mask))).flatten(1).any(1).tolist()
        assert differs == [not sees, False]
        close(f[:1], model(x[:1], t[:1], r[:1], features[:1, : 3 if sees else 5]))


@pytest.mark.parametrize("wrong", [dict(classes=None), dict(caption=4), dict(heads=3), dict(heads=16)])
def test_networks_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError):
        lively(**wrong)


def test_sides_off_the_patch_are_refused():
    for size in (dict(h=7), dict(w=9)):
        with pytest.raises(ValueError):
            lively()(*batch(**size))
