"""The network against the released code's outputs; its precision, positions and conditions."""

import math

import pytest
import torch
from conftest import weights_in
from oracle import lively, pair, seeded
from torch.autograd import forward_ad

import data
from model import SIZES, TiM, attend, lower_precision, rope_table, rotate
from sample import NO_CONDITION, network_f
from transition import TRANSPORTS, exact_derivative, finite_difference, output_from_x


def batch(n=6, channels=3, h=8, w=8, classes=5):
    rng = seeded(5)
    t = torch.rand(n, generator=rng)
    r = t * torch.rand(n, generator=rng)
    return torch.randn(n, channels, h, w, generator=rng), t, r, torch.arange(n) % (classes + 1)


# --- The released code's own numbers --------------------------------------------------------------


def test_forward_and_projected_tokens_of_the_released_code(golden, golden_model, near):
    f, tokens = golden_model(*(golden[k] for k in ("x", "t", "r", "y")), aligned=True)
    near(f, golden["out"])
    near(tokens, golden["h_proj"])
    assert torch.equal(golden_model(*(golden[k] for k in ("x", "t", "r", "y"))), f)


@pytest.mark.parametrize("shape", ["square", "landscape", "portrait"])
def test_text_outputs_of_the_released_code(golden_text, near, shape):
    sizes = dict(
        channels=8, patch=1, depth=2, width=48, heads=2, adaln=16, caption=20, projector=(1, 40, 24)
    )
    x, t, r, caption, out = (golden_text[f"{shape}.{k}"] for k in ("x", "t", "r", "caption", "out"))
    weights = weights_in(golden_text)
    for layout in ("released", "grid"):
        model = TiM(**sizes, rope_layout=layout).eval().requires_grad_(False)
        model.load_state_dict(weights)
        if layout == "released" or shape == "square":
            near(model(x, t, r, caption), out)
        else:
            assert (
                model(x, t, r, caption) - out
            ).abs().max() > 0.1 * out.abs().max()  # the positions do matter


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


def test_sizes_as_released():
    assert {k: (v["depth"], v["width"], v["heads"], v["adaln"]) for k, v in SIZES.items() if k in ("B", "XL")} == {
        "B": (12, 768, 12, 256), "XL": (28, 1152, 16, 384),
    }  # fmt: skip


# --- Positions ------------------------------------------------------------------------------------


GRIDS = [(2, 3), (3, 2), (4, 4), (24, 40)]


@pytest.mark.parametrize("h, w", GRIDS)
def test_each_token_turns_by_its_column_and_row(h, w):
    K = 24
    cos, sin = rope_table(h, w, K, 10000.0, "grid", torch.device("cpu"))
    assert cos.shape == sin.shape == (h * w, K // 2) and cos.dtype == torch.float32
    for n in range(h * w):
        for k in range(K // 4):
            rate = 10000 ** (-2 * k / (K / 2))
            for place, half in ((n % w, 0), (n // w, K // 4)):
                assert float(cos[n, half + k]) == pytest.approx(math.cos(place * rate), abs=1e-6)
                assert float(sin[n, half + k]) == pytest.approx(math.sin(place * rate), abs=1e-6)


def test_the_released_layout_is_another_one_off_the_square():
    def table(h, w, layout):
        return torch.cat(rope_table(h, w, 8, 10000.0, layout, torch.device("cpu")), 1)

    assert torch.equal(table(4, 4, "released"), table(4, 4, "grid"))
    true = (table(24, 40, "released") - table(24, 40, "grid")).abs().amax(1) < 1e-6
    assert true.float().mean() == pytest.approx(0.025, abs=1e-3)
    h, w = 2, 6
    expected = [
        divmod(n, h) for n in range(h * w)
    ]  # n mod h in the first half, n div h in the second
    angles = torch.tensor([[low, low / 100, high, high / 100] for high, low in expected])
    torch.testing.assert_close(table(h, w, "released"), torch.cat([angles.cos(), angles.sin()], 1))


def test_rotation_is_a_complex_product_and_keeps_only_distances():
    h, w, K = 3, 5, 16
    rope = rope_table(h, w, K, 10000.0, "grid", torch.device("cpu"))
    x = torch.randn(2, 3, h * w, K, dtype=torch.float64, generator=seeded(0))
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(
        *(p.double() for p in rope)
    )
    torch.testing.assert_close(rotate(x, rope), torch.view_as_real(turned).flatten(-2))
    assert rotate(x.bfloat16(), rope).dtype == torch.bfloat16
    q, k = (rotate(v.expand(h * w, K), rope) for v in (x[0, 0, 0], x[0, 0, 1]))
    logits = (q @ k.T).view(h, w, h, w)
    torch.testing.assert_close(
        logits[1:, 2:, 1:, 2:], logits[:-1, :-2, :-1, :-2], rtol=1e-5, atol=1e-5
    )


def test_patches_keep_their_place_on_any_grid():
    """With every branch closed a token sees its own patch; outputs are by row, column, channel."""
    model = TiM(channels=3, patch=2, depth=1, width=16, heads=2, adaln=8, classes=2).requires_grad_(
        False
    )
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
    model, (x, t, r, y) = lively(), batch(64)
    exact = model(x, t, r, y)
    f = lower_precision(lively())(x, t, r, y)
    error = (f - exact).norm() / exact.norm()
    assert (
        1e-4 < error < 0.004
    )  # one bf16 rounding; with all products in bf16 it would be twice that
    assert f.dtype == torch.float32


def test_what_stays_fp32_under_bf16():
    model = lower_precision(lively())
    low = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert low == {
        n
        for n, _ in model.named_parameters()
        if ".attn." in n or ".mlp." in n and n.startswith("blocks")
    }
    seen = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda block, inputs, output: seen.extend([*inputs[:3], output])
        )
        block.adaLN_modulation.register_forward_hook(
            lambda layer, inputs, output: seen.append(output)
        )
    for layer in (model.x_embedder, model.t_embedder, model.delta_embedder, model.final_layer):
        layer.register_forward_hook(lambda layer, inputs, output: seen.extend([inputs[0], output]))
    x, t, r, y = batch()
    model(x, t, r, y)
    assert len(seen) == 2 * 5 + 4 * 2 and {s.dtype for s in seen} == {torch.float32}
    text = lower_precision(lively(classes=None, caption=7))
    low = {name.split(".")[2] for name, p in text.named_parameters() if p.dtype == torch.bfloat16}
    assert low == {"attn", "cross_attn", "mlp"}


def test_times_reach_the_network_unrounded():
    model, (x, t, r, y) = lower_precision(lively()), batch()
    seen = []
    for layer in (model.t_embedder, model.delta_embedder):
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    model(x, t, r, y)
    assert {s.dtype for s in seen} == {torch.float32}
    assert any(torch.equal(s, t) for s in seen) and any(torch.equal(s, t - r) for s in seen)
    for bad in ((t.bfloat16(), r), (t, r.half())):
        with pytest.raises(TypeError, match="pass float32"):
            model(x, *bad, y)


def test_double_weights_give_double_outputs():
    x, t, r, y = batch()
    f = lively().double()(x.double(), t.double(), r.double(), y)
    assert f.dtype == torch.float64
    torch.testing.assert_close(f.float(), lively()(x, t, r, y), rtol=1e-4, atol=1e-5)


# --- The derivative through the network -----------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS)
def test_forward_mode_and_differences_agree_through_the_network(transport):
    model, y = lively().double(), torch.tensor([0, 1, 2, 5])
    place = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    t = transport.t_min + place * (min(transport.t_max, 2.0) - transport.t_min)
    r = t * torch.tensor([0.1, 0.5, 0.3, 0.7], dtype=torch.float64) + transport.t_min * 0.9
    x, eps = pair(t, 3, 4, 6)
    exact = exact_derivative(network_f(model, transport), transport, x, eps, t, r, y)
    error = [
        (
            (
                finite_difference(network_f(model, transport), transport, x, eps, t, r, y, h)
                - exact
            ).norm()
            / exact.norm()
        ).item()
        for h in (2e-3, 1e-3, 1e-5)
    ]
    assert error[0] / error[1] == pytest.approx(4, rel=0.05) and error[2] < 1e-6


@pytest.mark.parametrize("moves", ["qkv", "q", "v", "k"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_has_the_tangent_of_plain_products(moves, masked):
    rng = seeded(0)
    q, k, v, *d = (
        torch.randn(2, 3, n, 8, generator=rng, dtype=torch.float64) for n in (5, 7, 7) * 2
    )
    mask = torch.rand(2, 1, 1, 7, generator=rng) < 0.6 if masked else None
    d = [x * (name in moves) for name, x in zip("qkv", d)]

    def plain(q, k, v):
        scores = q @ k.mT / 8**0.5
        return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(3) @ v

    out, dout = torch.func.jvp(plain, (q, k, v), tuple(d))
    with torch.no_grad(), forward_ad.dual_level():
        args = [forward_ad.make_dual(x, dx) if dx.any() else x for x, dx in zip((q, k, v), d)]
        found, tangent = forward_ad.unpack_dual(attend(*args, mask))
    torch.testing.assert_close(found, out)
    torch.testing.assert_close(tangent, dout)
    torch.testing.assert_close(attend(q, k, v, mask), out)


def test_rounding_does_not_drown_the_difference():
    """h = .005 in fp32, .02 in bf16; with all products in bf16 the latter would be off by .2."""
    transport, (x, t, r, y) = TRANSPORTS["tim"], batch(64)
    t, r = 0.1 + 0.8 * t, 0.5 * r
    eps = torch.randn(x.shape, generator=seeded(6))
    model = lively()
    exact = exact_derivative(
        network_f(lively().double(), transport),
        transport,
        x.double(),
        eps.double(),
        t.double(),
        r.double(),
        y,
    )
    for net, h, bound in ((model, 0.005, 0.002), (lower_precision(lively()), 0.02, 0.1)):
        found = finite_difference(network_f(net, transport), transport, x, eps, t, r, y, h)
        assert ((found - exact).norm() / exact.norm()) < bound


# --- The paper's f of a network -------------------------------------------------------------------


@pytest.mark.parametrize("predict", ["f", "x"])
@pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS)
def test_f_shows_the_network_c_noise_and_turns_a_predicted_x_into_f(transport, predict):
    model, (x, place, _, y) = lively(predict=predict, projector=(1, 12, 7)), batch()
    t = transport.t_min + (0.1 + 0.8 * place) * (min(transport.t_max, 2.0) - transport.t_min)
    r = transport.t_min + 0.5 * (t - transport.t_min)
    raw, raw_tokens = model(x, transport.c_noise(t), transport.c_noise(r), y, aligned=True)
    expected = raw if predict == "f" else output_from_x(transport, raw, x, t)
    f = network_f(model, transport)
    assert torch.equal(f(x, t, r, y), expected)
    found, tokens = f(x, t, r, y, aligned=True)
    assert torch.equal(found, expected) and torch.equal(tokens, raw_tokens)
    if predict == "x":
        assert (found - raw).abs().max() > 0.1


def test_no_condition_is_the_last_row_of_classes_or_the_null_text():
    transport, (x, t, r, y) = TRANSPORTS["tim"], batch()
    none = torch.full_like(y, NO_CONDITION)
    f = network_f(lively(), transport)
    assert torch.equal(f(x, t, r, none), f(x, t, r, torch.full_like(y, 5)))
    assert (f(x, t, r, none) - f(x, t, r, torch.zeros_like(y))).abs().max() > 0.01

    encoder = data.load_text_encoder("bytes")
    texts = data.Texts(data.Captions([["red apple"], ["sun"]]), encoder, "cpu")
    model = lively(classes=None, caption=encoder.spec["width"])
    f, y = network_f(model, transport, texts), torch.tensor([0, 1, 0, 1, 2, NO_CONDITION])
    seen = encoder(["red apple", "sun", "red apple", "sun", "", ""])
    torch.testing.assert_close(f(x, t, r, y), model(x, t, r, seen), rtol=1e-5, atol=1e-5)


# --- Conditions, switches, errors -----------------------------------------------------------------


def test_a_fresh_network_gives_zero_and_starts_as_the_released_one():
    torch.manual_seed(0)
    model, (x, t, r, y) = (
        TiM(**SIZES["demo"], channels=3, patch=2, classes=100).requires_grad_(False),
        batch(),
    )
    assert (model(x, t, r, y) == 0).all()
    for name in ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"):
        assert model.get_submodule(name).weight.std() == pytest.approx(0.02, rel=0.1)
    for name in (
        "blocks.0.attn.qkv",
        "blocks.3.mlp.fc1_x",
        "delta_embedder.mlp.0",
        "x_embedder.proj",
    ):
        w = model.get_submodule(name).weight.flatten(1)
        assert w.abs().max() == pytest.approx(
            math.sqrt(6 / sum(w.shape)), rel=0.02
        )  # xavier's bound
    assert all(
        (p == 0).all()
        for n, p in model.named_parameters()
        if n.endswith("bias") and "norm" not in n
    )


def test_the_ablations_change_what_they_name():
    x, t, r, y = batch()
    full, shared, plain = lively(), lively(shared_time=True), lively(interval_attention=False)
    names = lambda model: {n for n, _ in model.named_parameters()}
    assert (
        names(full) - names(shared)
        == {n for n in names(full) if n.startswith("delta_embedder")}
        != set()
    )
    assert names(full) - names(plain) == {n for n in names(full) if "qkv_d" in n} != set()
    for model in (full, shared, plain):
        assert (model(x, t, r, y) - model(x, t, t, y)).abs().max() > 0.1  # all know how far they go


def test_attention_itself_knows_the_interval():
    """With the conditions held, a change of t - r reaches q, k and v through W_d."""
    block = lively().blocks[0]
    x, d = torch.randn(2, 6, 32), torch.randn(2, 32)
    rope = rope_table(2, 3, 16, 10000.0, "grid", torch.device("cpu"))
    assert (block.attn(x, d, rope) - block.attn(x, 2 * d, rope)).abs().max() > 1e-2
    shifted = block.attn.qkv(x) + (block.attn.qkv_d.weight @ d[..., None]).transpose(1, 2)
    block.attn.qkv.forward = lambda x: shifted
    block.attn.qkv_d = None
    torch.testing.assert_close(block.attn(x, d, rope), lively().blocks[0].attn(x, d, rope))


def test_padding_is_not_seen_unless_asked_for():
    rng = seeded(7)
    x, t, r, _ = batch(2)
    captions = torch.randn(2, 5, 7, generator=rng)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    other = captions.clone()
    other[0, 3:] = 9.0
    for sees in (True, False):
        model = lively(classes=None, caption=7, caption_mask=sees)
        f = model(x, t, r, (captions, mask))
        differs = (f != model(x, t, r, (other, mask))).flatten(1).any(1).tolist()
        assert differs == [not sees, False]
        torch.testing.assert_close(
            f[:1], model(x[:1], t[:1], r[:1], captions[:1, : 3 if sees else 5])
        )


def test_sizes_that_cannot_work_are_refused():
    sizes = dict(channels=3, patch=2, depth=1, width=32, heads=2, adaln=8)
    for wrong in (dict(), dict(classes=3, caption=4)):
        with pytest.raises(ValueError, match="classes"):
            TiM(**sizes, **wrong)
    for wrong in (dict(heads=3), dict(heads=16)):
        with pytest.raises(ValueError, match="heads"):
            TiM(**(sizes | wrong), classes=3)
    x, t, r, y = batch(h=7)
    with pytest.raises(ValueError, match="7x8: both sides must be multiples of the patch, 2"):
        lively()(x, t, r, y)
