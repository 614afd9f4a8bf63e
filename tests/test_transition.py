"""The paper's formulas against autograd, closed forms and a network that is known exactly."""

import math
from dataclasses import replace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from oracle import ALL, NAMES, S, flow, ideal, pair, posterior, seeded, times, variance

from transition import (
    KERNELS,
    SIGMA_FLOOR,
    TAUS,
    TRANSPORTS,
    TimeMixture,
    adaptive,
    check_weight,
    edm,
    exact_derivative,
    expand,
    finite_difference,
    fixed_diffusion,
    guided_pair,
    interpolate,
    output_from_x,
    residual,
    sample_loss,
    sample_times,
    shift_times,
    slope,
    solve,
    step,
    step_coefficients,
    time_weight,
    transition_target,
    vp_beta,
)

each_transport = pytest.mark.parametrize("transport", ALL, ids=NAMES)
close = torch.testing.assert_close


def beta_slope(t):
    b = vp_beta(t)
    return (19.9 * t + 0.1) * (b**2 + 1) / (2 * b)


def root(t):
    return (vp_beta(t) ** 2 + 1).sqrt()


def wave(t):
    return (math.pi / 2 * t).sin() + (math.pi / 2 * t).cos()


def closed_edm(s):
    def radius(t):
        return (t**2 + s**2).sqrt()

    return (
        lambda t, r: (s**2 + r * t) / (radius(t) * radius(r)),
        lambda t, r: s * (t - r) / (radius(t) * radius(r)),
        lambda t, r: s * (s**2 + r * t) / (radius(r) * radius(t) ** 3),
        lambda t, r: (t - r) * (t**2 + s**2) / (s**2 + r * t),
    )


CLOSED = {  # A, B, B', B/B', worked out by hand
    "otfm": (
        lambda t, r: 1 + 0 * t,
        lambda t, r: r - t,
        lambda t, r: -1 + 0 * t,
        lambda t, r: t - r,
    ),
    "trigflow": (
        lambda t, r: (t - r).cos(),
        lambda t, r: (r - t).sin(),
        lambda t, r: -(r - t).cos(),
        lambda t, r: (t - r).tan(),
    ),
    "edm": closed_edm(1.0),
    "edm(.5)": closed_edm(0.5),
    "vp": (
        lambda t, r: root(t) / root(r),
        lambda t, r: (vp_beta(r) - vp_beta(t)) / root(r),
        lambda t, r: -beta_slope(t) / root(r),
        lambda t, r: (vp_beta(t) - vp_beta(r)) / beta_slope(t),
    ),
    "ve": (lambda t, r: 1 + 0 * t, lambda t, r: t - r, lambda t, r: 1 + 0 * t, lambda t, r: t - r),
    "tim": (
        lambda t, r: wave(r) / wave(t),
        lambda t, r: (math.pi / 2 * (r - t)).sin() / wave(t),
        lambda t, r: -math.pi / 2 * wave(r) / (1 + (math.pi * t).sin()),
        lambda t, r: 2 / math.pi * (math.pi / 2 * (t - r)).sin() * wave(t) / wave(r),
    ),
}


def ratio(transport, t, r):
    """B/B' as the target uses it: what one unit of df/dt takes away."""
    zero = torch.zeros(len(t), 1, dtype=t.dtype)
    one = torch.ones_like(zero)
    return (
        transition_target(transport, one, one, t, r, zero)
        - transition_target(transport, one, one, t, r, one)
    )[:, 0]


def forward_slope(g, t):
    """dg/dt by forward-mode autograd; the code's own is reverse-mode."""
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(g(forward_ad.make_dual(t, torch.ones_like(t)))).tangent
    return torch.zeros_like(t) if tangent is None else tangent


# --- The table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport, name", list(zip(ALL, NAMES)), ids=NAMES)
def test_step_and_target_coefficients_are_the_closed_forms(transport, name):
    t, r = times(transport)
    a, b, b_slope, b_ratio = (g(t, r) for g in CLOSED[name])
    for found, expected in zip(step_coefficients(transport, t, r), (a, b)):
        close(found, expected, rtol=1e-10, atol=1e-12)
    close(
        forward_slope(lambda s: step_coefficients(transport, s, r)[1], t),
        b_slope,
        rtol=1e-9,
        atol=1e-12,
    )
    close(ratio(transport, t, r), b_ratio, rtol=1e-9, atol=1e-12)


@each_transport
def test_slopes_are_those_of_forward_mode_and_of_differences(transport):
    t = times(transport)[0]
    h = 1e-5 * t
    for g in (
        transport.alpha,
        transport.sigma,
        transport.alpha_hat,
        transport.sigma_hat,
        transport.c_noise,
    ):
        close(slope(g, t), forward_slope(g, t), rtol=1e-10, atol=1e-12)
        close(slope(g, t), (g(t + h) - g(t - h)) / (2 * h), rtol=1e-6, atol=1e-8)


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


def test_ranges_and_what_the_network_sees():
    seen = dict(
        otfm=1,
        trigflow=1,
        edm=lambda t: math.log(t) / 4,
        vp=999,
        ve=lambda t: math.log(t / 2),
        tim=1,
    )
    ends = dict(
        otfm=(0, 1), trigflow=(0, 1.57), edm=(0.01, 80), vp=(1e-5, 1), ve=(0.02, 100), tim=(0, 1)
    )
    for name, transport in TRANSPORTS.items():
        assert (transport.t_min, transport.t_max) == ends[name] and transport.name == name
        for t in (0.1, 0.7):
            expected = seen[name](t) if callable(seen[name]) else seen[name] * t
            assert float(transport.c_noise(torch.tensor(t, dtype=torch.float64))) == pytest.approx(
                expected, rel=1e-12
            )


def test_vp_keeps_its_precision_near_zero_in_fp32():
    t = torch.tensor([1e-5, 1e-4, 1e-2, 0.5, 1.0])
    exact = [math.sqrt(math.expm1(19.9 * s**2 / 2 + 0.1 * s)) for s in t.double().tolist()]
    close(vp_beta(t), torch.tensor(exact), rtol=2e-6, atol=0)
    plain = ((19.9 * t**2 / 2 + 0.1 * t).exp() - 1).sqrt()
    assert abs(plain[0] / exact[0] - 1) > 0.005  # what expm1 is for


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
    with pytest.raises(ValueError, match="one shape"):
        step_coefficients(TRANSPORTS["tim"], torch.ones(2), torch.tensor(0.5))


# --- The closed-form oracle -----------------------------------------------------------------------


@each_transport
def test_the_ideal_network_is_a_flow(transport):
    """The identity, exact steps, composed = direct, one step = 128 steps."""
    t, r = times(transport)
    x_t, net = pair(t)[0] * expand(variance(transport, t).sqrt(), pair(t)[0]), ideal(transport)
    direct = step(transport, x_t, net(x_t, t, r), t, r)
    close(direct, flow(transport)(x_t, t, r), rtol=1e-11, atol=1e-12)
    middle = (t * r).sqrt()
    halfway = step(transport, x_t, net(x_t, t, middle), t, middle)
    close(
        step(transport, halfway, net(halfway, middle, r), middle, r), direct, rtol=1e-9, atol=1e-11
    )
    ends = [
        torch.full_like(t, s)
        for s in torch.linspace(transport.t_max, transport.t_min, 129, dtype=torch.float64)
    ]
    many = x_t
    for s, s_next in zip(ends[:-1], ends[1:]):
        many = step(transport, many, net(many, s, s_next), s, s_next)
    close(
        many,
        step(transport, x_t, net(x_t, ends[0], ends[-1]), ends[0], ends[-1]),
        rtol=1e-9,
        atol=1e-11,
    )


@each_transport
def test_the_ideal_network_is_the_fixed_point_of_the_target(transport):
    t, r = times(transport)
    x_t = pair(t)[0]
    x, eps = posterior(transport, x_t, t)
    net = ideal(transport)
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
    df_dt = torch.randn_like(x)
    close(
        transition_target(transport, x, eps, t, t, df_dt),
        residual(transport, x, eps, t),
        rtol=1e-12,
        atol=1e-12,
    )
    off = [
        (
            transition_target(transport, x, eps, t, t - width * (t - r), df_dt)
            - residual(transport, x, eps, t)
        )
        .abs()
        .max()
        for width in (1e-3, 1e-4)
    ]
    assert off[0] / off[1] == pytest.approx(10, rel=0.05)  # linearly in t - r
    x, eps = posterior(transport, x, t)
    near_t = t - 1e-5 * (t - r)
    close(
        ideal(transport)(interpolate(transport, x, eps, t), t, near_t),
        residual(transport, x, eps, t),
        rtol=1e-3,
        atol=1e-4,
    )


def test_how_strongly_the_derivative_enters():
    """sup |B/B'|: 1 for otfm, at (1, 0); .7685 for tim, at (.75, 0); trigflow: a pole at pi/2."""
    t, r = torch.meshgrid(*[torch.linspace(0, 1, 401, dtype=torch.float64)] * 2, indexing="ij")
    t, r = t[t > r], r[t > r]
    for name, most, at in (("otfm", 1.0, 1.0), ("tim", 0.7685, 0.75)):
        found = ratio(TRANSPORTS[name], t, r).abs()
        place = found.argmax()
        assert (found[place], t[place], r[place]) == (
            pytest.approx(most, abs=1e-4),
            pytest.approx(at, abs=0.005),
            0,
        )
    assert ratio(TRANSPORTS["trigflow"], torch.tensor([1.57]), torch.tensor([0.0])) > 1000


@each_transport
def test_fp32_is_enough_for_the_formulas(transport):
    t, r = sample_times(transport, 5000, TimeMixture(0.2, 0.2), seeded(7))
    x, eps, df_dt = torch.randn(3, 5000, 1, generator=seeded(8))
    exact = transition_target(transport, *(v.double() for v in (x, eps, t, r, df_dt)))
    assert (
        (transition_target(transport, x, eps, t, r, df_dt) - exact).abs() / (1 + exact.abs())
    ).max() < 2e-4
    for found, true in zip(
        step_coefficients(transport, t, r), step_coefficients(transport, t.double(), r.double())
    ):
        assert ((found - true).abs() / (1 + true.abs())).max() < 1e-5


# --- A network that predicts x, and the derivative along the network's own path -------------------


@each_transport
def test_a_perfect_prediction_of_x_is_a_perfect_f(transport):
    """Wherever sigma >= SIGMA_FLOOR; below it eps_hat is scaled down and x_hat stays."""
    t, r = times(transport)
    x_t = pair(t)[0] * expand(variance(transport, t).sqrt(), pair(t)[0])
    f = ideal(transport)(x_t, t, r)
    x_hat = solve(transport, x_t, f, t)[0]
    found, large = output_from_x(transport, x_hat, x_t, t), transport.sigma(t) >= SIGMA_FLOOR
    assert large.sum() > 20
    close(found[large], f[large], rtol=1e-9, atol=1e-10)
    x, eps = pair(t)
    close(
        output_from_x(transport, x, interpolate(transport, x, eps, t), t)[large],
        residual(transport, x, eps, t)[large],
    )
    low = torch.full((1,), transport.t_min, dtype=torch.float64)
    assert output_from_x(transport, x[:1], x[:1], low).isfinite().all()


@each_transport
def test_the_own_path_has_the_same_expectation_and_less_variance_where_data_spread_widely(
    transport,
):
    """Given x_t the pair (x, eps) is Gaussian, and the target is linear in it: two points of the
    posterior, a deviation up and one down, give its expectation and its variance exactly. The
    variance falls where the flow spreads states (data of a large deviation, on the transports that
    predict a velocity) and rises on those that predict eps.
    """
    wide = 2.0
    t, r = times(transport)
    x_t, net = (
        pair(t)[0] * expand(variance(transport, t, wide).sqrt(), pair(t)[0]),
        ideal(transport, flow(transport, wide)),
    )
    mean, eps_mean = posterior(transport, x_t, t, wide)
    spread = expand((wide**2 * transport.sigma(t) ** 2 / variance(transport, t, wide)).sqrt(), x_t)
    own = solve(
        transport, x_t, residual(transport, mean, eps_mean, t), t
    )  # f*(x_t, t, t) is the mean of the residual
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
    assert (own_variance < 0.6 * data_variance) == (transport.name not in ("vp", "ve"))


# --- What is printed wrong elsewhere --------------------------------------------------------------


def test_erratum_tim_slope_lacks_pi():
    transport = TRANSPORTS["tim"]
    t, r = times(transport)
    printed = -0.5 * wave(r) / (1 + (math.pi * t).sin())
    true = forward_slope(lambda s: step_coefficients(transport, s, r)[1], t)
    close(true / printed, torch.full_like(t, math.pi), rtol=1e-10, atol=0)
    close(
        ratio(transport, t, r) * true, step_coefficients(transport, t, r)[1], rtol=1e-9, atol=1e-12
    )


def test_erratum_vp_step_divides_by_the_wrong_root():
    transport = TRANSPORTS["vp"]
    t, r = times(transport)
    x, eps = pair(t, 1)
    a, b = step_coefficients(transport, t, r)
    printed = (vp_beta(r) - vp_beta(t)) / root(t)
    x_t, f, x_r = (
        interpolate(transport, x, eps, t),
        residual(transport, x, eps, t),
        interpolate(transport, x, eps, r),
    )
    close(expand(a, x) * x_t + expand(b, x) * f, x_r, rtol=1e-9, atol=1e-10)
    assert (
        expand(a, x) * x_t + expand(printed, x) * f - x_r
    ).abs().max() > 0.5  # sampling is affected,
    close(
        printed / (-beta_slope(t) / root(t)), ratio(transport, t, r)
    )  # training is not: the root cancels


def test_erratum_edm_and_vp_alpha_lack_a_root():
    for transport, s in ((TRANSPORTS["vp"], 1.0), (edm(1.0), 1.0), (edm(0.5), 0.5)):
        t = times(transport)[0]
        close(
            variance(transport, t, s), torch.ones_like(t), rtol=1e-10, atol=0
        )  # both transports promise unit variance
        printed = replace(transport, alpha=lambda t, transport=transport: transport.alpha(t) ** 2)
        assert (variance(printed, t, s) - 1).abs().max() > 0.05


def test_erratum_edm_with_sigma_data_cubed():
    t, r = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for s, agrees in ((0.5, False), (1.0, True)):
        transport = edm(s)
        theirs = replace(
            transport, alpha=lambda t, s=s: s / (t**2 + s**2).sqrt()
        )  # the path their solve assumes
        found, other = (
            [float(g) for g in (*step_coefficients(q, t, r), ratio(q, t, r))]
            for q in (transport, theirs)
        )
        x, eps = pair(t)
        a, b = step_coefficients(theirs, t, r)
        x_r = a * interpolate(transport, x, eps, t) + b * residual(transport, x, eps, t)
        lands = torch.allclose(x_r, interpolate(transport, x, eps, r))
        assert lands == agrees
        if agrees:
            assert found == pytest.approx(other, rel=1e-12)
        else:
            assert found == pytest.approx([0.447, 0.894, 5.0], abs=5e-4)
            assert other == pytest.approx([0.248, 0.497, 45.0], abs=5e-4)


def test_erratum_jvp_is_forward_mode():
    """It needs no graph: nothing requires a gradient, in or out, and the result is exact."""
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


# --- The time derivative --------------------------------------------------------------------------


def bent(x_t, t, r, y):
    """A network that bends in everything it sees."""
    return (x_t * 0.3).sin() * (expand(t, x_t).log1p() + expand(r, x_t).cos())


@each_transport
def test_finite_difference_is_second_order(transport):
    t, r = times(transport, gap=0.1)
    seen = 0.01 * (999 if transport.name == "vp" else 1)
    inside = (
        transport.c_noise(t)
        < transport.c_noise(torch.tensor(transport.t_max, dtype=torch.float64)) - seen
    )
    t, r = t[inside], r[inside]
    x, eps = pair(t)
    exact = exact_derivative(bent, transport, x, eps, t, r, None)
    error = [
        (finite_difference(bent, transport, x, eps, t, r, x, h) - exact).norm()
        for h in (seen, seen / 2, seen / 20)
    ]
    assert error[0] / error[1] == pytest.approx(4, rel=0.1)
    assert error[2] / exact.norm() < 1e-4


@each_transport
def test_finite_difference_is_central_but_near_r(transport):
    """Never r > t; at t_max the network is asked a little beyond; one pass of a double batch."""
    top, low = transport.t_max, transport.t_min
    t = torch.tensor(
        [top, top, low + 0.3 * (top - low), low + 0.3 * (top - low)], dtype=torch.float64
    )
    r = torch.tensor(
        [low, top - 1e-6 * top, low + 0.3 * (top - low) - 1e-7, low], dtype=torch.float64
    )
    x, eps = pair(t)
    calls = []

    def net(x_t, s, r, y):
        calls.append((s, r))
        close(x_t, interpolate(transport, torch.cat([x, x]), torch.cat([eps, eps]), s))
        return bent(x_t, s, r, y)

    h = 1e-5 * (999 if transport.name == "vp" else 1)
    found = finite_difference(net, transport, x, eps, t, r, x, h)
    (s, seen_r), = calls  # fmt: skip
    assert (s >= seen_r).all() and (s >= low).all()
    late, early = s.chunk(2)
    assert (late > t).all() and (early[1:3] == r[1:3]).all() and (early[[0, 3]] < t[[0, 3]]).all()
    width = transport.c_noise(late[3]) - transport.c_noise(early[3])
    assert float(width) == pytest.approx(2 * h, rel=1e-3)  # h is meant in what the network sees
    close(found, exact_derivative(bent, transport, x, eps, t, r, None), rtol=2e-3, atol=2e-3)


@each_transport
def test_the_derivative_at_the_first_time_of_sampling_is_second_order(transport):
    """All samples begin at t_max: stopping there, one-sided, is many times less exact."""
    t = torch.full((50,), transport.t_max, dtype=torch.float64)
    r = transport.t_min + (transport.t_max - transport.t_min) * torch.linspace(
        0.05, 0.9, 50, dtype=torch.float64
    )
    x, eps = pair(t)
    exact, h = (
        exact_derivative(bent, transport, x, eps, t, r, None),
        0.001 * (999 if transport.name == "vp" else 1),
    )

    def error(found):
        return float((found - exact).norm() / exact.norm())

    width, along = (
        h / slope(transport.c_noise, t),
        lambda s: bent(interpolate(transport, x, eps, s), s, r, None),
    )
    one_sided = error((along(t) - along(t - width)) / expand(width, x))
    central = error(finite_difference(bent, transport, x, eps, t, r, x, h))
    assert central < 1e-3 and one_sided > 20 * central, (central, one_sided)


def test_finite_difference_divides_by_the_rounded_distance():
    """In fp32 t + h rounds; a network that is linear in t shows if the divisor rounds with it."""
    transport = TRANSPORTS["otfm"]
    t = torch.rand(1000, generator=seeded(0)) * 0.5 + 0.45
    x = torch.zeros(1000, 1)
    found = finite_difference(
        lambda x_t, t, r, y: t[:, None], transport, x, x, t, torch.zeros_like(t), x, 1e-6
    )
    assert (found == 1).all()


# --- Guidance in the target -----------------------------------------------------------------------

S_NULL, WEIGHTS = 1.0, [(1.0, 0.75), (1.5, 0.0)]  # guidance 4 and 1.5


def rate(transport, k, t):
    """d ln(x_t) / dt of the flow whose residual is k(t) x_t."""
    one = torch.ones_like(t)
    x, eps = solve(transport, one, k(t), t)
    return slope(transport.alpha, t) * x + slope(transport.sigma, t) * eps


def guided_flow(transport, k):
    """The flow map of that field by quadrature in float64."""
    nodes = torch.linspace(0, 1, 801, dtype=torch.float64)  # Simpson, in ln(t + .01)

    def carry(x_t, t, r, y=None):
        a, b = (t + 0.01).log()[:, None], (r + 0.01).log()[:, None]
        s = (a + (b - a) * nodes).exp() - 0.01
        values = rate(transport, k, s.flatten()).reshape(s.shape) * (s + 0.01) * (b - a)
        integral = (values[:, 0:-1:2] + 4 * values[:, 1::2] + values[:, 2::2]).sum(1) / 2400
        return expand(integral.exp(), x_t) * x_t

    return carry


@pytest.mark.parametrize("w_gt, w_cond", WEIGHTS)
@each_transport
def test_guided_target_has_the_guided_flow_as_fixed_point(transport, w_gt, w_cond):
    """x | class ~ N(0, S^2), x ~ N(0, 1): the fixed point is the exact flow of the guided field.

    Guidance is w_gt / (1 - w_cond). Replacing only the residual, and taking df/dt along the data's
    path, has another fixed point.
    """
    t, r = times(transport)
    t, r = t[:24], r[:24]
    x_t = pair(t, 1)[0]

    def k(t, s):  # E[residual | x_t] = k x_t
        one = torch.ones_like(t)
        return residual(transport, *posterior(transport, one, t, s), t)

    w = w_gt / (1 - w_cond)
    guided = lambda t: w * k(t, S) + (1 - w) * k(t, S_NULL)
    net = ideal(transport, guided_flow(transport, guided))
    x, eps = posterior(transport, x_t, t)
    f_cond, f_null = expand(guided(t), x_t) * x_t, expand(k(t, S_NULL), x_t) * x_t
    new = guided_pair(transport, x, eps, t, f_cond if w_cond else None, f_null, w_gt, w_cond)
    close(interpolate(transport, *new, t), x_t, rtol=1e-9, atol=1e-9)
    mixed = w_gt * residual(transport, x, eps, t) + w_cond * f_cond + (1 - w_gt - w_cond) * f_null
    close(residual(transport, *new, t), mixed, rtol=1e-9, atol=1e-9)
    close(residual(transport, *new, t), f_cond, rtol=1e-9, atol=1e-9)

    h = 1e-4 * (999 if transport.name == "vp" else 1)
    f_star = net(x_t, t, r)
    ours = transition_target(
        transport, *new, t, r, finite_difference(net, transport, *new, t, r, x_t, h)
    )
    theirs = transition_target(
        transport, x, eps, t, r, finite_difference(net, transport, x, eps, t, r, x_t, h)
    )
    theirs = theirs - residual(transport, x, eps, t) + residual(transport, *new, t)
    scale = f_star.abs().max()
    assert (ours - f_star).abs().max() < 1e-4 * scale
    assert (theirs - f_star).abs().max() > 0.05 * scale


# --- Weights, losses, times -----------------------------------------------------------------------


def test_time_weight_is_the_kernel_of_the_distance():
    transport, s = TRANSPORTS["tim"], 0.7
    t, r = torch.tensor([0.9, 1.0, 0.5, 0.0]), torch.tensor([0.2, 0.0, 0.5, 0.0])
    taus = dict(
        identity=lambda t: t, tan=math.tan, ratio=lambda t: t / (1 - t) if t < 1 else math.inf
    )
    kernels = dict(
        constant=lambda d: 1, reciprocal=lambda d: 1 / (s + d), sqrt=lambda d: 1 / math.sqrt(s + d),
        square=lambda d: 1 / (s + d) ** 2, soft_min_snr=lambda d: 1 / (s * s + d * d),
    )  # fmt: skip
    assert taus.keys() == TAUS.keys() and kernels.keys() == KERNELS.keys()
    for tau in taus:
        for kernel in kernels:
            pairs = zip(t.tolist(), r.tolist())
            expected = [
                1 if a == b else kernels[kernel](taus[tau](a) - taus[tau](b)) for a, b in pairs
            ]
            close(
                time_weight(transport, t, r, tau, kernel, s),
                torch.tensor(expected, dtype=torch.float32),
            )


def test_time_weight_refuses_a_tau_beyond_its_pole():
    refused = {
        ("tan", "edm"),
        ("tan", "ve"),
        ("ratio", "edm"),
        ("ratio", "ve"),
        ("ratio", "trigflow"),
    }
    for tau in TAUS:
        for transport in TRANSPORTS.values():
            t = torch.tensor([transport.t_max])
            if (tau, transport.name) in refused:
                with pytest.raises(ValueError, match=f"(?s){tau}.*{transport.name}.*constant"):
                    check_weight(transport, tau)
                with pytest.raises(ValueError, match=transport.name):
                    time_weight(transport, t, t / 2, tau, "sqrt", 1.0)
                assert time_weight(transport, t, t / 2, tau, "constant", 1.0) == 1
            else:
                weight = time_weight(transport, t, t / 2, tau, "sqrt", 1.0)
                assert weight.isfinite().all() and (weight >= 0).all()


def test_sample_loss_and_its_adaptive_division():
    rng = seeded(0)
    f, target = torch.randn(2, 3, 4, 5, 6, generator=rng)
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


def draws(transport, **options):
    t, r = sample_times(transport, 20000, TimeMixture(0, 0, **options), seeded(3))
    return torch.cat([t, r]).double()  # the later and the earlier of two draws: together, the draws


def test_times_are_drawn_as_each_row_says():
    def logit(t):
        return (t / (1 - t)).log()

    unit = dict(  # what makes each transport's times standard normal
        otfm=lambda t: logit(t) + 0.4, tim=lambda t: logit(t) + 0.4,
        trigflow=lambda t: (t.tan().log() + 1.0) / 1.6, edm=lambda t: (t.log() + 1.2) / 1.2,
        vp=lambda t: torch.special.ndtri(t),
        ve=lambda t: torch.special.ndtri((t / 0.02).log() / math.log(5000)),
    )  # fmt: skip
    for name, transport in TRANSPORTS.items():
        n = unit[name](draws(transport)).sort().values
        place = (torch.arange(len(n), dtype=torch.float64) + 0.5) / len(n)
        assert (torch.special.ndtr(n) - place).abs().max() < 0.015, (
            name
        )  # Kolmogorov-Smirnov, 40,000 draws
    wide = logit(draws(TRANSPORTS["otfm"], mean=0.0, std=1.6))
    assert (wide.mean().abs(), wide.std()) == (
        pytest.approx(0, abs=0.03),
        pytest.approx(1.6, rel=0.02),
    )
    odds = [
        (s / (1 - s)).log().mean()
        for s in (draws(TRANSPORTS["otfm"]), draws(TRANSPORTS["otfm"], shift=3.0))
    ]
    assert odds[1] - odds[0] == pytest.approx(math.log(3), rel=1e-4)


@each_transport
def test_the_mixture_of_times(transport):
    n = 20001
    t, r = sample_times(transport, n, TimeMixture(0.5, 0.1), seeded(4))
    assert t.dtype == r.dtype == torch.float32 and t.shape == r.shape == (n,)
    assert (transport.t_min <= r).all() and (r <= t).all() and (t <= transport.t_max + 1e-6).all()
    count = fixed_diffusion(n, 0.5)
    assert count == 10000 and (t[:count] == r[:count]).all()
    lowest = (r[count:] == torch.tensor(transport.t_min)).sum() / n
    assert lowest == pytest.approx(0.1, abs=0.01)
    assert ((r[count:] < t[count:]) & (r[count:] > transport.t_min)).sum() / n == pytest.approx(
        0.4, abs=0.01
    )
    again = sample_times(transport, n, TimeMixture(0.5, 0.1), seeded(4))
    assert torch.equal(t, again[0]) and torch.equal(r, again[1])
    t, r = sample_times(transport, 8, TimeMixture(1.0, 0.0), seeded(4))
    assert torch.equal(t, r)
    t, r = sample_times(transport, 8, TimeMixture(0.0, 1.0), seeded(4))
    assert (r == torch.tensor(transport.t_min)).all()


@pytest.mark.parametrize("n", [1, 3, 64])
@pytest.mark.parametrize("share", [0.5, 0.3, 0.0, 1.0])
def test_the_share_of_r_equal_t_is_met_on_average_in_micro_batches_of(n, share):
    """Where no whole number of samples has the share, one sample gets r = t by chance."""
    mixture, rng, repeats = TimeMixture(share, 0.1 * (1 - share)), seeded(5), 2400 // n
    equal, lowest = [], []
    for _ in range(repeats):
        t, r = sample_times(TRANSPORTS["tim"], n, mixture, rng)
        equal.append((t == r).sum().item())
        lowest.append(((r == 0) & (t > 0)).sum().item())
    sure = fixed_diffusion(n, share)
    assert sure == math.floor(n * share + 1e-9)
    assert min(equal) >= sure and max(equal) <= math.ceil(n * share)
    assert sum(equal) / (n * repeats) == pytest.approx(share, abs=0.03)
    assert sum(lowest) / (n * repeats) == pytest.approx(mixture.share_consistency, abs=0.02)


@pytest.mark.parametrize("diffusion_at", ["later", "one", "earlier"])
@each_transport
def test_draws_of_a_batch_that_divides_are_those_of_the_first_edition(transport, diffusion_at):
    """Bit-equal: what was trained before can be trained again. The first edition, in its order."""
    mixture, rng, n = TimeMixture(0.5, 0.1, diffusion_at=diffusion_at), seeded(4), 64
    drawn = transport.draw(torch.randn(2, n, generator=rng), transport.mean, transport.std)
    drawn = drawn.clamp(transport.t_min, transport.t_max)
    t, r = drawn.max(0).values, drawn.min(0).values
    plain = {"later": t, "one": drawn[0], "earlier": r}[diffusion_at]
    place, chance = torch.arange(n), torch.rand(n, generator=rng)
    r = torch.where(chance * (1 - 0.5) < 0.1, torch.full_like(r, transport.t_min), r)
    expected = torch.where(place < 32, plain, t), torch.where(place < 32, plain, r)
    rng = seeded(4)
    found = sample_times(transport, n, mixture, rng)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(torch.rand(1, generator=rng), after_64())  # nothing more was drawn


def after_64():
    """The number that follows 128 normal and 64 uniform ones."""
    rng = seeded(4)
    torch.randn(2, 64, generator=rng)
    torch.rand(64, generator=rng)
    return torch.rand(1, generator=rng)


FIRST_EDITION = {  # name: t[0], t[1], t[41], sum of t, sum of r, of 64 draws
    "otfm": (0.4062236547, 0.7033385634, 0.2141351700, 33.26813429, 24.33230600),
    "trigflow": (0.3632220328, 1.2250952721, 0.0869165882, 45.71971909, 29.09800496),
    "edm": (0.3086588681, 1.3714878559, 0.1022624373, 67.68463100, 36.02191553),
    "vp": (0.5081433058, 0.8967507482, 0.1840211004, 41.04259408, 28.85644960),
    "ve": (1.5157184601, 41.5030860901, 0.0958712474, 1318.91339174, 714.34952879),
    "tim": (0.4062236547, 0.7033385634, 0.2141351700, 33.26813429, 24.33230600),
}


@pytest.mark.parametrize("name", FIRST_EDITION)
def test_draws_of_64_are_the_first_editions_numbers(name):
    """To fp32's rounding, which differs between processors."""
    t, r = sample_times(TRANSPORTS[name], 64, TimeMixture(), seeded(4))
    found = [*t[[0, 1, 41]].tolist(), t.double().sum().item(), r.double().sum().item()]
    assert found == pytest.approx(FIRST_EDITION[name], rel=1e-5)
    assert r[41].item() == pytest.approx(TRANSPORTS[name].t_min)


def test_which_of_two_draws_a_sample_with_r_equal_t_takes():
    transport, n, count = TRANSPORTS["otfm"], 20000, 10000
    found = {}
    for which in ("later", "one", "earlier"):
        t, r = sample_times(transport, n, TimeMixture(diffusion_at=which), seeded(4))
        assert (t[:count] == r[:count]).all()
        found[which] = t, r
    for t, r in found.values():  # the others stay what they were
        assert torch.equal(t[count:], found["later"][0][count:]) and torch.equal(
            r[count:], found["later"][1][count:]
        )
    later, one, earlier = (found[which][0][:count] for which in found)
    assert ((one == later) | (one == earlier)).all() and (earlier < later).all()
    assert (one == later).float().mean() == pytest.approx(0.5, abs=0.02)
    normal = ((one / (1 - one)).log() + 0.4).double().sort().values
    place = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    assert (torch.special.ndtr(normal) - place).abs().max() < 0.02
    low = (
        torch.special.ndtri(torch.tensor(0.2)).sub(0.4).sigmoid()
    )  # a fifth of the draws lie below
    shares = [(v < low).float().mean().item() for v in (later, one, earlier)]
    assert shares == pytest.approx([0.04, 0.2, 0.36], abs=0.015)


def test_shifted_times_have_shifted_odds():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for name in ("otfm", "tim"):
        transport = TRANSPORTS[name]
        for s in (0.5, 3.0):
            shifted = shift_times(transport, t, s)
            assert shifted[0] == 0 and shifted[-1] == 1 and (shifted.diff() > 0).all()
            close((shifted / (1 - shifted))[:-1], (s * t / (1 - t))[:-1])
        assert shift_times(transport, t, 1.0) is t
        with pytest.raises(ValueError, match="positive"):
            shift_times(transport, t, 0.0)
    for name in ("trigflow", "edm", "vp", "ve"):
        with pytest.raises(ValueError, match=name):
            shift_times(TRANSPORTS[name], t, 2.0)


# --- The released code's own numbers --------------------------------------------------------------


@pytest.mark.parametrize("name", ["otfm", "trigflow", "vp", "ve"])
def test_training_quantities_of_the_released_code(golden, golden_model, near, name):
    transport = TRANSPORTS[name]
    x_t, t, r, df_dt, target = (
        golden[f"train.{name}.{k}"] for k in ("x_t", "t", "r", "dfdt", "target")
    )
    x, eps, y = golden["train.x"], golden["train.z"], golden["y"]
    near(interpolate(transport, x, eps, t), x_t)
    near(transition_target(transport, x, eps, t, r, df_dt), target)

    def net(x_t, t, r, y):
        return golden_model(x_t, transport.c_noise(t), transport.c_noise(r), y)

    h = 0.005 * slope(transport.c_noise, t)  # theirs is in t itself
    apart = t > r  # at r = t theirs asks about r > t, ours is one-sided
    found = finite_difference(net, transport, x, eps, t, r, y, h)
    f = net(x_t, t, r, y)
    near(
        (f + 0.01 * found)[apart], (f + 0.01 * df_dt)[apart]
    )  # the difference itself, not rounding over 2h


def test_weight_of_the_released_code(golden, near):
    weight = time_weight(
        TRANSPORTS["otfm"], golden["train.otfm.t"], golden["train.otfm.r"], "tan", "sqrt", 1.0
    )
    near(weight, golden["train.weight.sqrt_tan.n_diffusion1"])
