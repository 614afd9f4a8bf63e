"""The paper's formulas against autograd, closed forms and a network that is known exactly.

What is parametrised over `ALL` takes up a new transport by itself; the tables below are facts of the
paper's own rows and need none of a new one.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from oracle import (
    ALL, NAMES, S, S_NULL, Network, flow, guided_flow, ideal, instant, pair, posterior, reach, seeded,
    times, variance,
)  # fmt: skip

from sample import generate
from transition import (
    KERNELS, SIGMA_FLOOR, TAUS, TRANSPORTS, adaptive, cat, check_weight, choose, each, edm,
    exact_derivative, expand, finite_difference, guided_pair, interpolate, network_f, output_from_x,
    residual, sample_loss, sample_times, shift_times, slope, solve, step, step_coefficients,
    time_weight, transition_target, vp_beta,
)  # fmt: skip

each_transport = pytest.mark.parametrize("transport", ALL, ids=NAMES)
close = torch.testing.assert_close


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def relative(found, exact):
    return float((found - exact).norm() / exact.norm())


def state(transport, t, s=S):
    """States at t of data of deviation s."""
    x = pair(t)[0]
    return x * expand(variance(transport, t, s).sqrt(), x)


def ratio(transport, t, r):
    """B/B' as the target uses it: what one unit of df/dt takes away."""
    one = torch.ones(len(t), 1, dtype=t.dtype)
    without = transition_target(transport, one, one, t, r, 0 * one)
    return (without - transition_target(transport, one, one, t, r, one))[:, 0]


def forward_slope(g, t):
    """dg/dt by forward-mode autograd; the code's own is reverse-mode."""
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(g(forward_ad.make_dual(t, torch.ones_like(t)))).tangent
    return torch.zeros_like(t) if tangent is None else tangent


def b_slope(transport, t, r):
    """B', d/dt at fixed r."""
    return forward_slope(lambda s: step_coefficients(transport, s, r)[1], t)


# --- The table ------------------------------------------------------------------------------------


def root(t):
    return (vp_beta(t) ** 2 + 1).sqrt()


def wave(t):
    return (math.pi / 2 * t).sin() + (math.pi / 2 * t).cos()


def radii(s, t, r):
    return (t**2 + s**2).sqrt() * (r**2 + s**2).sqrt()


STEPS = {  # A and B, worked out by hand
    "otfm": (lambda t, r: 1 + 0 * t, lambda t, r: r - t),
    "trigflow": (lambda t, r: (t - r).cos(), lambda t, r: (r - t).sin()),
    "edm": (lambda t, r: (1 + r * t) / radii(1, t, r), lambda t, r: (t - r) / radii(1, t, r)),
    "edm(.5)": (
        lambda t, r: (0.25 + r * t) / radii(0.5, t, r), lambda t, r: 0.5 * (t - r) / radii(0.5, t, r)
    ),
    "vp": (lambda t, r: root(t) / root(r), lambda t, r: (vp_beta(r) - vp_beta(t)) / root(r)),
    "ve": (lambda t, r: 1 + 0 * t, lambda t, r: t - r),
    "tim": (lambda t, r: wave(r) / wave(t), lambda t, r: (math.pi / 2 * (r - t)).sin() / wave(t)),
}  # fmt: skip
ROWS = {  # range, c_noise, and what makes the times of training standard normal
    "otfm": (0, 1, lambda t: t, lambda t: t.logit() + 0.4),
    "trigflow": (0, 1.57, lambda t: t, lambda t: (t.tan().log() + 1) / 1.6),
    "edm": (0.01, 80, lambda t: t.log() / 4, lambda t: (t.log() + 1.2) / 1.2),
    "vp": (1e-5, 1, lambda t: 999 * t, torch.special.ndtri),
    "ve": (0.02, 100, lambda t: (t / 2).log(),
           lambda t: torch.special.ndtri((t / 0.02).log() / math.log(5000))),
    "tim": (0, 1, lambda t: t, lambda t: t.logit() + 0.4),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_the_closed_forms(name):
    transport = dict(zip(NAMES, ALL))[name]
    t, r = times(transport)
    for found, expected in zip(step_coefficients(transport, t, r), STEPS[name]):
        close(found, expected(t, r), rtol=1e-10, atol=1e-12)


@each_transport
def test_slopes_are_those_of_forward_mode_and_of_differences(transport):
    t, r = times(transport)
    h = 1e-5 * t
    coefficients = transport.alpha, transport.sigma, transport.alpha_hat, transport.sigma_hat
    for g in (*coefficients, transport.c_noise):
        close(slope(g, t), forward_slope(g, t), rtol=1e-10, atol=1e-12)
        close(slope(g, t), (g(t + h) - g(t - h)) / (2 * h), rtol=1e-6, atol=1e-8)
    b = step_coefficients(transport, t, r)[1]
    close(ratio(transport, t, r), b / b_slope(transport, t, r), rtol=1e-9, atol=1e-12)


def test_slopes_and_targets_need_no_gradient_mode_and_leave_no_graph():
    """Training takes them inside and outside of no_grad: the same numbers, without a graph."""
    t, r = times(TRANSPORTS["tim"])
    x, eps = pair(t)
    t_grad = t.clone().requires_grad_()
    for transport in TRANSPORTS.values():
        free = slope(transport.sigma, t), transition_target(transport, x, eps, t, r, x)
        with torch.no_grad():
            quiet = slope(transport.sigma, t), transition_target(transport, x, eps, t, r, x)
        for found, expected in zip(quiet, free):
            assert torch.equal(found, expected) and not found.requires_grad
        assert not slope(transport.sigma, t_grad).requires_grad and t_grad.grad is None
    assert slope(TRANSPORTS["tim"].sigma, t).abs().min() > 0


@pytest.mark.parametrize("name", ROWS)
def test_ranges_draws_and_what_the_network_sees_are_the_papers(name):
    transport, (low, high, c_noise, normal) = TRANSPORTS[name], ROWS[name]
    assert (transport.name, transport.t_min, transport.t_max) == (name, low, high)
    close(transport.c_noise(double(0.1, 0.7)), c_noise(double(0.1, 0.7)), rtol=1e-12, atol=0)
    assert normal_distance(normal(draws(transport))) < 0.015


def test_vp_keeps_its_precision_near_zero_in_fp32():
    t = torch.tensor([1e-5, 1e-4, 1e-2, 0.5, 1.0])
    exact = [math.sqrt(math.expm1(19.9 * s**2 / 2 + 0.1 * s)) for s in t.double().tolist()]
    close(vp_beta(t), torch.tensor(exact), rtol=2e-6, atol=0)


@each_transport
def test_a_perfect_network_lands_on_the_path(transport):
    t, r = times(transport)
    x, eps = pair(t)
    x_t, f = interpolate(transport, x, eps, t), residual(transport, x, eps, t)
    close(step(transport, x_t, f, t, r), interpolate(transport, x, eps, r))
    for found, expected in zip(solve(transport, x_t, f, t), (x, eps)):
        close(found, expected, rtol=1e-8, atol=1e-8)
    a, b = step_coefficients(transport, t, t)
    close(a, torch.ones_like(t))
    assert b.abs().max() < 1e-12


def test_times_of_two_shapes_are_refused():
    with pytest.raises(ValueError):
        step_coefficients(TRANSPORTS["tim"], torch.ones(2), torch.tensor(0.5))


# --- The closed-form oracle -----------------------------------------------------------------------


def in_steps(transport, net, x, n):
    """x at t_max, carried to t_min in n steps."""
    path = transport.times(n).expand(len(x), -1).unbind(1)
    for t, r in zip(path[:-1], path[1:]):
        x = step(transport, x, net(x, t, r), t, r)
    return x


@each_transport
def test_the_ideal_network_is_a_flow(transport):
    """Exact steps, composed = direct, one step = 128 steps."""
    t, r = times(transport)
    x_t, net = state(transport, t), ideal(transport)
    direct = step(transport, x_t, net(x_t, t, r), t, r)
    close(direct, flow(transport)(x_t, t, r), rtol=1e-11, atol=1e-12)
    middle = (t * r).sqrt()
    halfway = step(transport, x_t, net(x_t, t, middle), t, middle)
    composed = step(transport, halfway, net(halfway, middle, r), middle, r)
    close(composed, direct, rtol=1e-9, atol=1e-11)
    one, many = (in_steps(transport, net, x_t, n) for n in (1, 128))
    close(many, one, rtol=1e-9, atol=1e-11)


@each_transport
def test_the_ideal_network_is_the_fixed_point_of_the_target(transport):
    t, r = times(transport)
    x_t, net = pair(t)[0], ideal(transport)
    x, eps = posterior(transport, x_t, t)
    df_dt = exact_derivative(net, transport, x, eps, t, r, None)
    close(transition_target(transport, x, eps, t, r, df_dt), net(x_t, t, r), rtol=1e-8, atol=1e-9)
    wrong = transition_target(transport, x, eps, t, r, 1.1 * df_dt)
    assert (wrong - net(x_t, t, r)).abs().max() > 1e-3  # and the derivative matters to it
    dde = finite_difference(net, transport, x, eps, t, r, x, 1e-3)
    close(transition_target(transport, x, eps, t, r, dde), net(x_t, t, r), rtol=1e-3, atol=1e-3)


@each_transport
def test_the_target_becomes_the_residual_as_r_nears_t(transport):
    t, r = times(transport)
    x, eps = pair(t)
    df_dt, u = torch.randn(x.shape, dtype=x.dtype, generator=seeded(3)), residual(transport, x, eps, t)
    close(transition_target(transport, x, eps, t, t, df_dt), u, rtol=1e-12, atol=1e-12)
    near = [t - width * (t - r) for width in (1e-3, 1e-4)]
    off = [(transition_target(transport, x, eps, t, s, df_dt) - u).abs().max() for s in near]
    assert off[0] / off[1] == pytest.approx(10, rel=0.05)  # linearly in t - r
    found, near_t = ideal(transport)(x, t, t - 1e-5 * (t - r)), instant(transport)(x, t)
    close(found, near_t, rtol=1e-3, atol=1e-4)


@each_transport
def test_fp32_is_enough_for_the_formulas(transport):
    t, r, _ = sample_times(transport, 5000, seeded(7), share_diffusion=0.2, share_consistency=0.2)
    x, eps, df_dt = torch.randn(3, 5000, 1, generator=seeded(8))
    exact = transition_target(transport, *(v.double() for v in (x, eps, t, r, df_dt)))
    found = transition_target(transport, x, eps, t, r, df_dt)
    assert ((found - exact).abs() / (1 + exact.abs())).max() < 1e-3
    true = step_coefficients(transport, t.double(), r.double())
    for found, exact in zip(step_coefficients(transport, t, r), true):
        assert ((found - exact).abs() / (1 + exact.abs())).max() < 1e-5


# --- Steps of sampling ----------------------------------------------------------------------------


@each_transport
def test_times_span_the_range_and_fractions_are_their_places(transport):
    for n in (1, 2, 8, 128):
        t = transport.times(n)
        assert t.dtype == torch.float64 and len(t) == n + 1 and (t.diff() < 0).all()
        assert (t[0], t[-1]) == (transport.t_max, transport.t_min)
        close(transport.fraction(t), torch.linspace(1, 0, n + 1, dtype=torch.float64))


SPACED = [t for t in TRANSPORTS.values() if t.rho != 1]


@pytest.mark.parametrize("n", [8, 32])
@pytest.mark.parametrize("transport", SPACED, ids=lambda t: t.name)
def test_the_spacing_of_a_transport_lands_closer_than_equal_steps(transport, n):
    """A network that knows the slope of the flow alone, as one trained on r = t: first-order steps."""
    net = Network(lambda x_t, t, r, y: instant(transport)(x_t, r))  # must be shown r = t
    plain = replace(transport, c_noise=lambda t: t)
    z, y = torch.randn(8, 1, 1, 1, dtype=torch.float64, generator=seeded(1)), torch.zeros(8).long()
    high, low = transport.t_max, transport.t_min
    exact = flow(transport)(z * transport.sigma(double(high)), double(high), double(low))
    equal = torch.linspace(high, low, n + 1, dtype=torch.float64)
    errors = [
        relative(generate(net, plain, z, y, steps, diffusion_only=True), exact) for steps in (n, equal)
    ]
    assert errors[0] < 0.5 * errors[1], errors


# --- A network that predicts x, and the derivative along the network's own path -------------------


@each_transport
def test_a_perfect_prediction_of_x_is_a_perfect_f(transport):
    """Wherever sigma >= SIGMA_FLOOR; below it eps_hat is scaled down and x_hat stays."""
    t, r = times(transport)
    x_t = state(transport, t)
    f = ideal(transport)(x_t, t, r)
    x_hat = solve(transport, x_t, f, t)[0]
    found, large = output_from_x(transport, x_hat, x_t, t), transport.sigma(t) >= SIGMA_FLOOR
    assert large.sum() > 20
    close(found[large], f[large], rtol=1e-9, atol=1e-10)
    low = double(transport.t_min)
    x, eps = pair(low)
    found = output_from_x(transport, x, interpolate(transport, x, eps, low), low)
    scale = (transport.sigma(low) / SIGMA_FLOOR).clamp(max=1)
    close(found, residual(transport, x, scale * eps, low))


@each_transport
def test_the_own_path_has_the_same_expectation_and_less_variance_where_data_spread_widely(transport):
    """Given x_t the pair (x, eps) is Gaussian, and the target is linear in it: two points of the
    posterior, a deviation up and one down, give its expectation and its variance exactly. The
    variance falls where the flow spreads states (data of a large deviation, on the transports that
    predict a velocity) and rises on those that predict eps.
    """
    wide = 2.0
    t, r = times(transport)
    x_t, net = state(transport, t, wide), ideal(transport, flow(transport, wide))
    mean, eps_mean = posterior(transport, x_t, t, wide)
    spread = expand(wide * transport.sigma(t) / variance(transport, t, wide).sqrt(), x_t)
    own = solve(transport, x_t, instant(transport, wide)(x_t, t), t)
    close(own, (mean, eps_mean), rtol=1e-8, atol=1e-8)

    def targets(path=None):
        found = []
        for sign in (-1, 1):
            x = mean + sign * spread
            eps = (x_t - expand(transport.alpha(t), x_t) * x) / expand(transport.sigma(t), x_t)
            df_dt = exact_derivative(net, transport, *(path or (x, eps)), t, r, None)
            found.append(transition_target(transport, x, eps, t, r, df_dt))
        return (found[0] + found[1]) / 2, (found[0] - found[1]).square().mean() / 4

    (data_mean, data_variance), (own_mean, own_variance) = targets(), targets(own)
    close(data_mean, net(x_t, t, r), rtol=1e-7, atol=1e-8)
    close(own_mean, net(x_t, t, r), rtol=1e-7, atol=1e-8)
    if transport.name in ("otfm", "trigflow", "edm", "tim"):
        assert own_variance < 0.6 * data_variance


# --- What is printed wrong elsewhere --------------------------------------------------------------


def test_erratum_tim_slope_lacks_pi():
    transport = TRANSPORTS["tim"]
    t, r = times(transport)
    printed = -0.5 * wave(r) / (1 + (math.pi * t).sin())
    true = b_slope(transport, t, r)
    close(true / printed, torch.full_like(t, math.pi), rtol=1e-10, atol=0)


def test_erratum_vp_step_divides_by_the_wrong_root():
    transport = TRANSPORTS["vp"]
    t, r = times(transport)
    x, eps = pair(t, 1)
    a, _ = step_coefficients(transport, t, r)
    printed = (vp_beta(r) - vp_beta(t)) / root(t)
    x_t, f = interpolate(transport, x, eps, t), residual(transport, x, eps, t)
    off = expand(a, x) * x_t + expand(printed, x) * f - interpolate(transport, x, eps, r)
    assert off.abs().max() > 0.5  # sampling is affected,
    printed_slope = b_slope(transport, t, r) * root(r) / root(t)
    close(printed / printed_slope, ratio(transport, t, r))  # training is not: the root cancels


def test_erratum_edm_and_vp_alpha_lack_a_root():
    """Both transports promise unit variance."""
    for transport, s in ((TRANSPORTS["vp"], 1.0), (edm(1.0), 1.0), (edm(0.5), 0.5)):
        t = times(transport)[0]
        close(variance(transport, t, s), torch.ones_like(t), rtol=1e-10, atol=0)
        printed = replace(transport, alpha=lambda t, transport=transport: transport.alpha(t) ** 2)
        assert (variance(printed, t, s) - 1).abs().max() > 0.05


@pytest.mark.parametrize("s, agrees", [(0.5, False), (1.0, True)])
def test_erratum_edm_with_sigma_data_cubed(s, agrees):
    transport, t, r = edm(s), double(1.0), double(0.0)
    theirs = replace(transport, alpha=lambda t: s / (t**2 + s**2).sqrt())  # what their solve assumes
    x, eps = pair(t)
    a, b = step_coefficients(theirs, t, r)
    x_r = a * interpolate(transport, x, eps, t) + b * residual(transport, x, eps, t)
    assert torch.allclose(x_r, interpolate(transport, x, eps, r)) == agrees
    assert torch.allclose(ratio(theirs, t, r), ratio(transport, t, r)) == agrees


# --- The time derivative --------------------------------------------------------------------------


def bent(x_t, t, r, y):
    """A network that bends in everything it sees."""
    return (x_t * 0.3).sin() * (expand(t, x_t).log1p() + expand(r, x_t).cos())


def test_forward_mode_needs_no_graph_and_is_exact():
    transport = TRANSPORTS["tim"]
    t, r = times(transport)
    x, eps = pair(t)
    saw = []

    def net(x_t, s, r, y):
        saw.append(torch.is_grad_enabled() or x_t.requires_grad)
        return (x_t * expand(s, x_t)).sin()

    found = exact_derivative(net, transport, x, eps, t, r, None)
    speed = expand(slope(transport.alpha, t), x) * x + expand(slope(transport.sigma, t), x) * eps
    x_t = interpolate(transport, x, eps, t)
    close(found, (x_t * expand(t, x)).cos() * (speed * expand(t, x) + x_t))
    assert saw == [False] and not found.requires_grad


@pytest.mark.parametrize("at", ["inside", "t_max"])
@each_transport
def test_finite_difference_is_second_order(transport, at):
    """At t_max, too, where all samples begin: it asks the network a little beyond."""
    t, r = times(transport, gap=0.1)
    if at == "t_max":
        t = torch.full_like(t, transport.t_max)
    x, eps = pair(t)
    exact = exact_derivative(bent, transport, x, eps, t, r, None)
    widths = (reach(transport) * width for width in (1e-3, 5e-4, 3e-5))
    error = [relative(finite_difference(bent, transport, x, eps, t, r, x, h), exact) for h in widths]
    assert error[0] / error[1] == pytest.approx(4, rel=0.1) and error[2] < 1e-4, error


@each_transport
def test_finite_difference_is_central_but_near_r(transport):
    """Never r > t; one pass of a double batch; h is meant in what the network sees."""
    top, low = transport.t_max, transport.t_min
    inside = low + 0.3 * (top - low)
    t, r, h = double(top, top, inside, inside), torch.full((4,), low).double(), 1e-5 * reach(transport)
    r[1:3] = (t - 0.1 * h / slope(transport.c_noise, t))[1:3]  # nearer than h
    x, eps = pair(t)
    calls = []

    def net(x_t, s, r, y):
        calls.append((s, r))
        close(x_t, interpolate(transport, torch.cat([x, x]), torch.cat([eps, eps]), s))
        return bent(x_t, s, r, y)

    found = finite_difference(net, transport, x, eps, t, r, x, h)
    ((s, seen_r),) = calls
    late, early = s.chunk(2)
    assert (s >= seen_r).all() and (s >= low).all() and (late > t).all()
    assert (early[1:3] == r[1:3]).all() and (early[[0, 3]] < t[[0, 3]]).all()
    width = transport.c_noise(late[3]) - transport.c_noise(early[3])
    assert float(width) == pytest.approx(2 * h, rel=1e-3)
    close(found, exact_derivative(bent, transport, x, eps, t, r, None), rtol=2e-3, atol=2e-3)


def test_finite_difference_divides_by_the_rounded_distance():
    """In fp32 t + h rounds; a network that is linear in t shows if the divisor rounds with it."""
    t = torch.rand(1000, generator=seeded(0)) * 0.5 + 0.45
    x, net = torch.zeros(1000, 1), lambda x_t, t, r, y: t[:, None]
    found = finite_difference(net, TRANSPORTS["otfm"], x, x, t, torch.zeros_like(t), x, 1e-6)
    assert (found == 1).all()


# --- Guidance in the target, and as a condition ---------------------------------------------------


@pytest.mark.parametrize("w_cond", [0.0, 0.75])
@each_transport
def test_guided_target_has_the_guided_flow_as_fixed_point_for_every_guidance(transport, w_cond):
    """x | class ~ N(0, S^2), x ~ N(0, S_NULL^2), a guidance w per sample, which the network sees.
    If its output is the exact flow of the guided field of w, E[target | x_t] is that output.

    Replacing the residual alone, and taking df/dt along the data's path, has another fixed point.
    """
    t, r = times(transport)
    x_t = pair(t, 1)[0]
    w = double(1.0, 1.5, 4.0).repeat(len(t))[: len(t)]
    net = ideal(transport, guided_flow(transport, w))
    x, eps = posterior(transport, x_t, t)
    u, f_null = residual(transport, x, eps, t), instant(transport, S_NULL)(x_t, t)
    f_cond = f_null + w[:, None] * (u - f_null)  # the fixed point at r = t
    w_gt = w * (1 - w_cond)
    new = guided_pair(transport, x, eps, t, f_cond if w_cond else None, f_null, w_gt, w_cond)
    close(interpolate(transport, *new, t), x_t, rtol=1e-9, atol=1e-9)
    close(residual(transport, *new, t), f_cond, rtol=1e-9, atol=1e-9)

    f_star = net(x_t, t, r)
    df_dt = exact_derivative(net, transport, *new, t, r, None)
    close(transition_target(transport, *new, t, r, df_dt), f_star, rtol=1e-7, atol=1e-8)
    df_dt = exact_derivative(net, transport, x, eps, t, r, None)
    theirs = transition_target(transport, x, eps, t, r, df_dt) - u + f_cond
    off = (theirs - f_star).abs().amax(1)
    assert off[w == 1].max() < 1e-6 and off[w > 1].max() > 0.05 * f_star.abs().max()


@pytest.mark.parametrize("w", [1.0, 1.5, 4.0])
@each_transport
def test_a_network_that_knows_its_guidance_samples_the_guided_flow_in_any_number_of_steps(transport, w):
    """And the same network's flow is that of two passes a step, guided by the same w, as steps grow."""
    def known(x_t, t, r, y):
        return ideal(transport, guided_flow(transport, y[1]))(x_t, t, r)

    def two(x_t, t, r, y):
        cond, null = instant(transport)(x_t, t), instant(transport, S_NULL)(x_t, t)
        return torch.where(expand(y == 0, x_t), cond, null)

    plain = replace(transport, c_noise=lambda t: t)
    z, y = torch.randn(8, 1, 1, 1, dtype=torch.float64, generator=seeded(1)), torch.zeros(8).long()
    high, low = double(transport.t_max), double(transport.t_min)
    exact = guided_flow(transport, w)(z * transport.sigma(high), high, low)
    for n in (1, 2, 128):
        found = generate(Network(known, (1, 4)), plain, z, y, n, w)
        assert relative(found, exact) < 1e-4, n
    found = generate(Network(two), plain, z, y, 512, w, diffusion_only=True)
    assert relative(found, exact) < 0.05


# --- Conditions -----------------------------------------------------------------------------------


def test_conditions_are_joined_and_chosen_through_nested_tuples():
    def condition(start):
        """As text with a guidance: ((features, mask), w)."""
        features = start + torch.arange(12.0).reshape(3, 2, 2)
        return (features, features[:, :, 0] > start + 2), features[:, 0, 1]

    first, second, mask = condition(0), condition(100), torch.tensor([True, False, True])
    joined, chosen = cat(first, second), choose(mask, first, second)
    for get in (lambda y: y[0][0], lambda y: y[0][1], lambda y: y[1]):
        a, b = get(first), get(second)
        assert torch.equal(get(joined), torch.cat([a, b]))
        assert torch.equal(get(chosen), torch.stack([a[0], b[1], a[2]]))
        assert torch.equal(get(each(lambda part: part[1:], first)), a[1:])
    labels = torch.arange(3)
    assert cat(labels, labels).tolist() == [0, 1, 2] * 2
    assert choose(mask, labels, labels + 7).tolist() == [0, 8, 2]


# --- Weights and losses ---------------------------------------------------------------------------


def test_time_weight_is_the_kernel_of_the_distance():
    transport, s = TRANSPORTS["tim"], 0.7
    pairs = [(0.9, 0.2), (1.0, 0.0), (0.5, 0.5), (0.0, 0.0)]
    taus = {
        "identity": lambda t: t, "tan": math.tan, "ratio": lambda t: t / (1 - t) if t < 1 else math.inf
    }  # fmt: skip
    kernels = {
        "constant": lambda d: 1, "reciprocal": lambda d: 1 / (s + d), "sqrt": lambda d: (s + d) ** -0.5,
        "square": lambda d: 1 / (s + d) ** 2, "soft_min_snr": lambda d: 1 / (s * s + d * d),
    }  # fmt: skip
    t, r = torch.tensor(pairs).unbind(1)
    for tau, g in taus.items():
        for kernel, k in kernels.items():
            expected = torch.tensor([1.0 if a == b else k(g(a) - g(b)) for a, b in pairs])
            close(time_weight(transport, t, r, tau, kernel, s), expected)


@pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS)
@pytest.mark.parametrize("tau", TAUS)
def test_weights_are_finite_or_the_tau_is_refused(transport, tau):
    """Where tau has a pole within the range, no kernel but the constant is taken."""
    t = torch.linspace(transport.t_min, transport.t_max, 101)
    r = (t + transport.t_min) / 2
    rises = bool((TAUS[tau][0](t).diff() > 0).all())
    for kernel in KERNELS:
        if rises or kernel == "constant":
            weight = time_weight(transport, t, r, tau, kernel, 1.0)
            assert weight.isfinite().all() and (weight >= 0).all()
        else:
            with pytest.raises(ValueError):
                time_weight(transport, t, r, tau, kernel, 1.0)
    if not rises:
        with pytest.raises(ValueError):
            check_weight(transport, tau)


def test_sample_loss_and_its_adaptive_division():
    f, target = torch.randn(2, 3, 4, 5, 6, generator=seeded(0))
    mean = torch.stack([((a - b) ** 2).mean() for a, b in zip(f, target)])
    cosine = [(a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)) for a, b in zip(f, target)]
    close(sample_loss(f, target, False), mean)
    close(sample_loss(f, target, True), mean + torch.stack([(1 - c).mean() for c in cosine]))
    assert (sample_loss(f, f, True) < 1e-5).all()

    loss = torch.tensor([4.0, 1e-3, 0.0], requires_grad=True)
    value = adaptive(loss)
    value.sum().backward()
    close(value.detach(), torch.tensor([1.0, 0.990099, 0.0]), rtol=1e-5, atol=1e-6)
    close(loss.grad, 1 / (loss.detach() + 1e-5))  # the divisor is a constant


# --- Times of training ----------------------------------------------------------------------------


def draws(transport, **options):
    options = {"share_diffusion": 0, "share_consistency": 0} | options
    t, r, _ = sample_times(transport, 20000, seeded(3), **options)
    return torch.cat([t, r]).double()  # the later and the earlier of two draws: together, the draws


def normal_distance(n):
    """Kolmogorov and Smirnov's, to the standard normal distribution."""
    place = (torch.arange(len(n), dtype=torch.float64) + 0.5) / len(n)
    return float((torch.special.ndtr(n.sort().values) - place).abs().max())


def test_mean_deviation_and_shift_of_the_draw():
    otfm = TRANSPORTS["otfm"]
    assert normal_distance((draws(otfm, mean=0.5, std=1.6).logit() - 0.5) / 1.6) < 0.015
    odds = draws(otfm, shift=3.0).logit() - draws(otfm).logit()
    assert float(odds.mean()) == pytest.approx(math.log(3), rel=1e-4)


@pytest.mark.parametrize("share, lowest", [(0.5, 0.1), (0.2, 0.3), (1.0, 0.0), (0.0, 1.0)])
@each_transport
def test_the_mixture_of_times(transport, share, lowest):
    n, shares = 20001, {"share_diffusion": share, "share_consistency": lowest}
    t, r, same = sample_times(transport, n, seeded(4), **shares)
    low = torch.tensor(transport.t_min)
    assert t.dtype == r.dtype == torch.float32 and t.shape == r.shape == (n,)
    assert (low <= r).all() and (r <= t).all() and (t <= transport.t_max + 1e-6).all()
    assert same == math.floor(n * share) and (t[:same] == r[:same]).all()
    rest = r[same + 1 :]  # one more sample may have r = t
    assert float((rest == low).sum()) / n == pytest.approx(lowest, abs=0.01)
    inside = (rest < t[same + 1 :]) & (rest > low)
    assert float(inside.sum()) / n == pytest.approx(1 - share - lowest, abs=0.01)
    again = sample_times(transport, n, seeded(4), **shares)
    assert torch.equal(t, again[0]) and torch.equal(r, again[1])


@pytest.mark.parametrize("n", [1, 3, 64])
@pytest.mark.parametrize("share", [0.5, 0.3, 0.0, 1.0])
def test_the_share_of_r_equal_t_is_met_on_average_in_micro_batches_of(n, share):
    """Where no whole number of samples has the share, one sample gets r = t by chance."""
    shares = {"share_diffusion": share, "share_consistency": 0.1 * (1 - share)}
    rng, repeats = seeded(5), 2400 // n
    equal, lowest = [], []
    for _ in range(repeats):
        t, r, same = sample_times(TRANSPORTS["tim"], n, rng, **shares)
        assert same == math.floor(n * share + 1e-9)
        equal.append((t == r).sum().item())
        lowest.append(((r == 0) & (t > 0)).sum().item())
    assert min(equal) >= same and max(equal) <= math.ceil(n * share)
    assert sum(equal) / (n * repeats) == pytest.approx(share, abs=0.03)
    assert sum(lowest) / (n * repeats) == pytest.approx(0.1 * (1 - share), abs=0.02)


def test_which_of_two_draws_a_sample_with_r_equal_t_takes():
    transport, count, found = TRANSPORTS["otfm"], 10000, {}
    for which in ("later", "one", "earlier"):
        found[which] = sample_times(transport, 20000, seeded(4), diffusion_at=which)[:2]
        for part, as_before in zip(found[which], found["later"]):  # the others stay what they were
            assert torch.equal(part[count:], as_before[count:])
    later, one, earlier = (t[:count] for t, _ in found.values())
    assert ((one == later) | (one == earlier)).all() and (earlier < later).all()
    assert (one == later).float().mean() == pytest.approx(0.5, abs=0.02)
    assert normal_distance(one.double().logit() + 0.4) < 0.02
    low = torch.special.ndtri(torch.tensor(0.2)).sub(0.4).sigmoid()  # a fifth of the draws lie below
    shares = [(v < low).float().mean().item() for v in (later, one, earlier)]
    assert shares == pytest.approx([0.04, 0.2, 0.36], abs=0.015)


@pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS)
def test_shifted_times_have_shifted_odds_or_are_refused(transport):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert shift_times(transport, t, 1.0) is t
    if (transport.t_min, transport.t_max) != (0, 1):
        with pytest.raises(ValueError):
            shift_times(transport, t, 2.0)
        return
    for s in (0.5, 3.0):
        shifted = shift_times(transport, t, s)
        assert shifted[0] == 0 and shifted[-1] == 1 and (shifted.diff() > 0).all()
        close((shifted / (1 - shifted))[:-1], (s * t / (1 - t))[:-1])
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError):
            shift_times(transport, t, bad)


# --- The released code's own numbers --------------------------------------------------------------


@pytest.mark.parametrize("name", ["otfm", "trigflow", "vp", "ve"])
def test_training_quantities_of_the_released_code(golden, golden_model, near, name):
    transport = TRANSPORTS[name]
    names = ("x_t", "t", "r", "dfdt", "target")
    x_t, t, r, df_dt, target = (golden[f"train.{name}.{k}"] for k in names)
    x, eps, y = golden["train.x"], golden["train.z"], golden["y"]
    near(interpolate(transport, x, eps, t), x_t)
    near(transition_target(transport, x, eps, t, r, df_dt), target)

    net = network_f(golden_model, transport, "f")
    h = 0.005 * slope(transport.c_noise, t)  # theirs is in t itself
    apart = t > r  # at r = t theirs asks about r > t, ours is one-sided
    found, f = finite_difference(net, transport, x, eps, t, r, y, h), net(x_t, t, r, y)
    near((f + 0.01 * found)[apart], (f + 0.01 * df_dt)[apart])  # the difference, before / 2h


def test_weight_of_the_released_code(golden, near):
    t, r = golden["train.otfm.t"], golden["train.otfm.r"]
    weight = time_weight(TRANSPORTS["otfm"], t, r, "tan", "sqrt", 1.0)
    near(weight, golden["train.weight.sqrt_tan.n_diffusion1"])
