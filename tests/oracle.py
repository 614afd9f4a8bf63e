"""What the tests measure against: data whose ideal network is known in closed form.

For x ~ N(0, s^2) the state has variance v(t) = alpha^2 s^2 + sigma^2, the flow carries x_t to
sqrt(v(r) / v(t)) x_t, and so the ideal network is f*(x_t, t, r) = (sqrt(v(r) / v(t)) - A) / B x_t.
"""

import torch

from model import TiM
from transition import TRANSPORTS, TimeMixture, edm, expand, sample_times, step_coefficients

ALL = [*TRANSPORTS.values(), edm(sigma_data=0.5)]
NAMES = [*TRANSPORTS, "edm(.5)"]
S = 0.6  # deviation of the oracle's data


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def times(transport, n=400, gap=0.05):
    """Float64 pairs t > r as in training, `gap` of what the network sees apart or more."""
    t, r = (s.double() for s in sample_times(transport, n, TimeMixture(0, 0), seeded(1)))
    ends = transport.c_noise(
        torch.tensor([max(transport.t_min, 1e-9), transport.t_max], dtype=torch.float64)
    )
    keep = transport.c_noise(t) - transport.c_noise(r) > gap * (ends[1] - ends[0])
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
    return expand(transport.alpha(t) * s**2 / v, x_t) * x_t, expand(
        transport.sigma(t) / v, x_t
    ) * x_t


def flow(transport, s=S):
    """(x_t, t, r, y) -> x_r, exactly."""
    return lambda x_t, t, r, y=None: (
        expand((variance(transport, r, s) / variance(transport, t, s)).sqrt(), x_t) * x_t
    )


def ideal(transport, carry=None):
    """The network f* that a flow map (default: the oracle's) stands for, (x_t, t, r, y) -> f."""
    carry = carry or flow(transport)

    def net(x_t, t, r, y=None):
        a, b = (expand(g, x_t) for g in step_coefficients(transport, t, r))
        return (carry(x_t, t, r) - a * x_t) / b

    return net


def lively(seed=0, **changes):
    """A small TiM whose every weight is random: as initialised, branches and output are closed."""
    sizes = dict(channels=3, patch=2, depth=2, width=32, heads=2, adaln=16, classes=5)
    model = TiM(**(sizes | changes)).eval().requires_grad_(False)
    rng = seeded(seed)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=rng) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.2))
    return model
