"""What the tests measure against: data whose ideal network is known in closed form.

For x ~ N(0, s^2) the state has variance v(t) = alpha^2 s^2 + sigma^2, the flow carries x_t to
sqrt(v(r) / v(t)) x_t, and so the ideal network is f*(x_t, t, r) = (sqrt(v(r) / v(t)) - A) / B x_t.
"""

import torch

from model import TiM
from transition import TRANSPORTS, edm, expand, residual, sample_times, step_coefficients

ALL = [*TRANSPORTS.values(), edm(sigma_data=0.5)]
NAMES = [*TRANSPORTS, "edm(.5)"]
S = 0.6  # deviation of the oracle's data
S_NULL = 1.0  # and of data without a condition, where there is guidance


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def reach(transport):
    """The width of the transport's range, in what the network sees."""
    low, high = max(transport.t_min, 1e-9), transport.t_max
    low, high = transport.c_noise(torch.tensor([low, high], dtype=torch.float64))
    return float(high - low)


def times(transport, n=400, gap=0.05):
    """Float64 pairs t > r as in training, `gap` of the reach apart or more."""
    t, r, _ = sample_times(transport, n, seeded(1), share_diffusion=0, share_consistency=0)
    t, r = t.double(), r.double()
    keep = transport.c_noise(t) - transport.c_noise(r) > gap * reach(transport)
    assert keep.sum() > 20
    return t[keep], r[keep]


def pair(t, *shape):
    """A picture and its noise per time, float64."""
    rng = seeded(2)
    return torch.randn(2, len(t), *(shape or (2, 1, 1)), dtype=torch.float64, generator=rng)


def variance(transport, t, s=S):
    return transport.alpha(t) ** 2 * s**2 + transport.sigma(t) ** 2


def posterior(transport, x_t, t, s=S):
    """E[x | x_t], E[eps | x_t]; the target is linear in the pair: this gives E[target | x_t]."""
    v = variance(transport, t, s)
    x_part, eps_part = transport.alpha(t) * s**2 / v, transport.sigma(t) / v
    return expand(x_part, x_t) * x_t, expand(eps_part, x_t) * x_t


def instant(transport, s=S):
    """(x_t, t, r, y) -> E[residual | x_t]: the ideal network at r = t, whatever r is."""
    return lambda x_t, t, r=None, y=None: residual(transport, *posterior(transport, x_t, t, s), t)


def flow(transport, s=S):
    """(x_t, t, r, y) -> x_r, exactly."""
    return lambda x_t, t, r, y=None: (
        expand((variance(transport, r, s) / variance(transport, t, s)).sqrt(), x_t) * x_t
    )


def guided_flow(transport, w):
    """(x_t, t, r, y) -> x_r of the field f_null + w (f_cond - f_null), exactly; w (B,) or a number.

    x ~ N(0, S^2) with the condition, N(0, S_NULL^2) without. d ln(x_t) / dt is affine in the residual
    over x_t, so it is mixed by the same weights, and the factors of both flows by their powers.
    """
    cond, null = flow(transport), flow(transport, S_NULL)

    def carry(x_t, t, r, y=None):
        one = torch.ones_like(t)
        return expand(cond(one, t, r) ** w * null(one, t, r) ** (1 - w), x_t) * x_t

    return carry


def ideal(transport, carry=None):
    """The network f* that a flow map (default: the oracle's) stands for, (x_t, t, r, y) -> f."""
    carry = carry or flow(transport)

    def net(x_t, t, r, y=None):
        a, b = (expand(g, x_t) for g in step_coefficients(transport, t, r))
        return (carry(x_t, t, r) - a * x_t) / b

    return net


class Network:
    """A function (x_t, t, r, y) -> f in the place of a model; its transport must show it t itself."""

    predict, classes = "f", 1

    def __init__(self, function, guide_range=None):
        self.function, self.guide_range = function, guide_range

    def __call__(self, x, t, r, y):
        return self.function(x, t.to(x.dtype), r.to(x.dtype), y)


def lively(seed=0, **changes):
    """A small TiM whose every weight is random: as initialised, branches and output are closed."""
    sizes = dict(channels=3, patch=2, depth=2, width=32, heads=2, adaln=16, classes=5)
    model = TiM(**(sizes | changes)).eval().requires_grad_(False)
    rng = seeded(seed)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=rng) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.2))
    return model
