"""The paper in symbols: transports, transitions, the training target and its time derivative, weights and times.

Transition Models (arXiv 2509.04394). A network f = f_theta(x_t, t, r) carries a state x_t from time t to any earlier
time r <= t in one step, x_r = A(t, r) x_t + B(t, r) f. Everything here is a pure function of tensors: no network, no
device, no hidden randomness.

    x    clean data or latent, (B, C, H, W)         t    from-time, (B,) float32 or float64
    eps  noise ~ N(0, I), same shape                r    to-time, (B,), r <= t
    x_t  state, alpha(t) x + sigma(t) eps           f    network output, same shape as x
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

Coefficient = Callable[[Tensor], Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# The table of transports (paper, Table 1)


@dataclass(frozen=True)
class Transport:
    """One row of the table: a path from data to noise, and what the network predicts on it.

    Only these four coefficients are typed; A, B and all slopes follow from them, so nothing can drift apart.
    """

    name: str
    t_min: float
    t_max: float
    alpha: Coefficient  # x_t = alpha x + sigma eps
    sigma: Coefficient
    alpha_hat: Coefficient  # f = alpha_hat x + sigma_hat eps, the best output at r = t
    sigma_hat: Coefficient
    draw: Callable[[Tensor, float, float], Tensor]  # (standard normal, mean, std) -> t, before the clamp to the range
    mean: float = -0.4  # of that draw, as the authors train
    std: float = 1.0
    c_noise: Coefficient = lambda t: t  # what the network is shown instead of t and of r


def logit_normal(n: Tensor, mean: float, std: float) -> Tensor:
    return torch.sigmoid(mean + std * n)


def log_normal(n: Tensor, mean: float, std: float) -> Tensor:
    return torch.exp(mean + std * n)


def edm(sigma_data: float) -> Transport:
    """EDM (Karras et al. 2022) with its preconditioning folded in: x_t has unit variance if x has sigma_data**2."""
    s = sigma_data
    return Transport(
        "edm", 0.01, 80.0, mean=-1.2, std=1.2, draw=log_normal, c_noise=lambda t: t.log() / 4,
        alpha=lambda t: 1 / (t**2 + s**2).sqrt(), sigma=lambda t: t / (t**2 + s**2).sqrt(),
        alpha_hat=lambda t: t / (s * (t**2 + s**2).sqrt()), sigma_hat=lambda t: -s / (t**2 + s**2).sqrt(),
    )  # fmt: skip


def vp_beta(t: Tensor) -> Tensor:
    """Noise-to-signal ratio of the variance-preserving path. expm1: exp(.) - 1 is off by 2% at t = 1e-5 in fp32."""
    return torch.expm1(19.9 * t**2 / 2 + 0.1 * t).sqrt()


TRANSPORTS = {
    row.name: row
    for row in (
        Transport(
            "otfm", 0.0, 1.0, draw=logit_normal,
            alpha=lambda t: 1 - t, sigma=lambda t: t,
            alpha_hat=lambda t: -torch.ones_like(t), sigma_hat=torch.ones_like,
        ),
        Transport(
            "trigflow", 0.0, 1.57, mean=-1.0, std=1.6, draw=lambda n, mean, std: log_normal(n, mean, std).atan(),
            alpha=torch.cos, sigma=torch.sin,
            alpha_hat=lambda t: -t.sin(), sigma_hat=torch.cos,
        ),
        edm(sigma_data=1.0),
        Transport(
            "vp", 1e-5, 1.0, c_noise=lambda t: 999 * t,
            draw=lambda n, mean, std: 1e-5 + (1 - 1e-5) * torch.special.ndtr(n),  # ndtr(normal) is uniform
            alpha=lambda t: 1 / (vp_beta(t) ** 2 + 1).sqrt(), sigma=lambda t: vp_beta(t) / (vp_beta(t) ** 2 + 1).sqrt(),
            alpha_hat=torch.zeros_like, sigma_hat=torch.ones_like,
        ),
        Transport(
            "ve", 0.02, 100.0, c_noise=lambda t: (t / 2).log(),
            draw=lambda n, mean, std: 0.02 * 5000 ** torch.special.ndtr(n),  # log-uniform
            alpha=torch.ones_like, sigma=lambda t: t,
            alpha_hat=torch.zeros_like, sigma_hat=lambda t: -torch.ones_like(t),
        ),
        Transport(
            "tim", 0.0, 1.0, draw=logit_normal,
            alpha=lambda t: (math.pi / 2 * t).cos(), sigma=lambda t: (math.pi / 2 * t).sin(),
            alpha_hat=lambda t: -torch.ones_like(t), sigma_hat=torch.ones_like,
        ),
    )
}  # fmt: skip


def expand(t: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...), ready to multiply x."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def slope(g: Coefficient, t: Tensor) -> Tensor:
    """dg/dt of an elementwise function, exact, by forward-mode autodiff: (B,) -> (B,)."""
    return torch.func.jvp(g, (t,), (torch.ones_like(t),))[1]


# ---------------------------------------------------------------------------------------------------------------------
# States and steps


def interpolate(row: Transport, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The state x_t = alpha(t) x + sigma(t) eps (Eq. 1). x, eps (B, ...), t (B,) -> (B, ...)."""
    return expand(row.alpha(t), x) * x + expand(row.sigma(t), x) * eps


def residual(row: Transport, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What f should be where r = t: alpha_hat(t) x + sigma_hat(t) eps. x, eps (B, ...), t (B,) -> (B, ...)."""
    return expand(row.alpha_hat(t), x) * x + expand(row.sigma_hat(t), x) * eps


def solve(row: Transport, x_t: Tensor, f: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The pair (x, eps) that a state and an output stand for: the inverse of `interpolate` and `residual` together."""
    a, s, a_hat, s_hat = (expand(g(t), x_t) for g in (row.alpha, row.sigma, row.alpha_hat, row.sigma_hat))
    det = s_hat * a - a_hat * s
    return (s_hat * x_t - s * f) / det, (a * f - a_hat * x_t) / det


SIGMA_FLOOR = 0.05  # of a prediction of x: below it eps_hat would be an error of x_hat, divided by nearly nothing


def output_from_x(row: Transport, x_hat: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The output f that a predicted x stands for: alpha_hat x_hat + sigma_hat (x_t - alpha x_hat) / max(sigma, floor).

    x_hat, x_t (B, ...), t (B,) -> (B, ...). Exact where sigma(t) >= SIGMA_FLOOR; below it eps_hat is scaled down.
    source  x-prediction with a loss on the velocity: JiT (arXiv 2511.13720).
    """
    eps_hat = (x_t - expand(row.alpha(t), x_t) * x_hat) / expand(row.sigma(t).clamp(min=SIGMA_FLOOR), x_t)
    return residual(row, x_hat, eps_hat, t)


def step_coefficients(row: Transport, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (A, B) of a transition, x_r = A x_t + B f (Eq. 5, 6).

    t, r     (B,) with row.t_min <= r <= t <= row.t_max; t = r gives A = 1, B = 0.
    returns  two (B,) tensors: `solve` for (x, eps), then `interpolate` at r. Exact for any length when f is exact.
    raises   ValueError if t and r differ in shape.
    """
    if t.shape != r.shape:
        raise ValueError(f"t {tuple(t.shape)} and r {tuple(r.shape)} must have one shape; expand the scalar time first")
    det = row.sigma_hat(t) * row.alpha(t) - row.alpha_hat(t) * row.sigma(t)
    a = (row.alpha(r) * row.sigma_hat(t) - row.sigma(r) * row.alpha_hat(t)) / det
    b = (row.sigma(r) * row.alpha(t) - row.alpha(r) * row.sigma(t)) / det
    return a, b


def step(row: Transport, x_t: Tensor, f: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """One transition x_t -> x_r (Eq. 5). x_t, f (B, ...), t, r (B,) -> (B, ...)."""
    a, b = step_coefficients(row, t, r)
    return expand(a, x_t) * x_t + expand(b, x_t) * f


# ---------------------------------------------------------------------------------------------------------------------
# The target and its time derivative


def transition_target(row: Transport, x: Tensor, eps: Tensor, t: Tensor, r: Tensor, df_dt: Tensor) -> Tensor:
    """What f(x_t, t, r) is trained towards (Eq. 9), ' = d/dt at fixed r:

        alpha_hat x + sigma_hat eps + (B / B') (alpha_hat' x + sigma_hat' eps - df/dt)

    x, eps, df_dt (B, ...), t, r (B,) -> (B, ...). B/B' is 0 at r = t, where the target is `residual`.
    """
    b = step_coefficients(row, t, r)[1]
    b_slope = slope(lambda s: step_coefficients(row, s, r)[1], t)
    drift = expand(slope(row.alpha_hat, t), x) * x + expand(slope(row.sigma_hat, t), x) * eps
    return residual(row, x, eps, t) + expand(b / b_slope, x) * (drift - df_dt)


def guided_pair(row: Transport, x: Tensor, eps: Tensor, t: Tensor, f_cond, f_null: Tensor, w_gt: float, w_cond: float):
    """The pair (x, eps) with the same state x_t whose residual is guided: model guidance in the target.

    The residual becomes w_gt residual + w_cond f_cond + (1 - w_gt - w_cond) f_null, with f_cond, f_null the network at
    r = t with its condition and without (f_cond may be None if w_cond is 0). Its fixed point is guidance
    w_gt / (1 - w_cond) without any at sampling. Handing on the pair, and not only the residual, makes `df_dt` the
    derivative along the guided path, so the fixed point is the flow of the guided field, for long steps too.
    """
    guided = w_gt * residual(row, x, eps, t) + (1 - w_gt - w_cond) * f_null
    if w_cond:
        guided = guided + w_cond * f_cond
    return solve(row, interpolate(row, x, eps, t), guided, t)


def twice(y):
    """A condition (a tensor or a tuple of tensors, batch first) for two copies of the batch."""
    return tuple(map(twice, y)) if isinstance(y, tuple) else torch.cat([y, y])


@torch.no_grad()
def finite_difference(net, row: Transport, x: Tensor, eps: Tensor, t: Tensor, r: Tensor, y, h: float) -> Tensor:
    """df/dt along the path of (x, eps) at fixed r by a central difference (DDE, Eq. 10): one pass of a double batch.

    net      (x_t, t, r, y) -> f; runs without gradients.
    h        half the width of the difference, in what the network sees (c_noise), so one h suits every row.
    returns  (B, ...) like x. Where t - h would fall below r the difference is one-sided; at t_max the network is asked
             about t_max + h, where its embedding and the path go on smoothly, so the jump that every sample begins
             with is taught as exactly as all others. Divides by the distance of the rounded times, so rounding t + h
             costs nothing.
    """
    width = h / slope(row.c_noise, t)
    late, early = t + width, torch.maximum(t - width, r)
    s = torch.cat([late, early])
    f_late, f_early = net(interpolate(row, twice(x), twice(eps), s), s, twice(r), twice(y)).chunk(2)
    return (f_late - f_early) / expand(late - early, x)


@torch.no_grad()
def exact_derivative(net, row: Transport, x: Tensor, eps: Tensor, t: Tensor, r: Tensor, y) -> Tensor:
    """df/dt along the path of (x, eps) at fixed r by forward-mode autodiff (JVP): what `finite_difference` approaches.

    Same arguments and result. All that net does needs a forward-mode rule (fused attention has none of torch's,
    `model.attend` has its own); compiled code runs eagerly.
    """
    with torch.compiler.set_stance("force_eager"), forward_ad.dual_level():
        s = forward_ad.make_dual(t, torch.ones_like(t))
        f = net(interpolate(row, x, eps, s), s, r, y)
        return forward_ad.unpack_dual(f).tangent


# ---------------------------------------------------------------------------------------------------------------------
# The loss and its weight


def sample_loss(f: Tensor, target: Tensor, cosine: bool) -> Tensor:
    """Per-sample distance l (B,): mean square, plus 1 - cosine over channels (averaged over places) if `cosine`."""
    loss = (f - target).square().flatten(1).mean(1)
    if cosine:
        alike = torch.cosine_similarity(f, target, dim=1, eps=1e-2)             # at f = 0 its slope is target / eps
        loss = loss + (1 - alike).flatten(1).mean(1)
    return loss


def adaptive(loss: Tensor) -> Tensor:
    """l / (stopgrad(l) + 1e-5): every sample pulls equally hard. Its value says nothing, so log l itself."""
    return loss / (loss.detach() + 1e-5)


TAUS = {  # name: (tau(t), largest t it stands)
    "identity": (lambda t: t, math.inf),
    "tan": (torch.tan, math.pi / 2),
    "ratio": (lambda t: t / (1 - t), 1.0),
}
KERNELS = {
    "constant": lambda d, s: torch.ones_like(d),
    "reciprocal": lambda d, s: 1 / (s + d),
    "sqrt": lambda d, s: (s + d).rsqrt(),
    "square": lambda d, s: (s + d) ** -2,
    "soft_min_snr": lambda d, s: 1 / (s**2 + d**2),
}


def check_weight(row: Transport, tau: str) -> None:
    """Raise ValueError where tau is not finite over the row's range, rather than train on NaN."""
    limit = TAUS[tau][1]
    if row.t_max > limit:
        rule = f"tau {tau!r} stands times up to {limit:.4g}, the row {row.name!r} goes to {row.t_max:g}"
        raise ValueError(f"{rule}; use tau 'identity' or the kernel 'constant'")


def time_weight(row: Transport, t: Tensor, r: Tensor, tau: str, kernel: str, sigma: float) -> Tensor:
    """w(t, r) = k(tau(t) - tau(r)), and 1 where r = t (Eq. 11, 12). t, r (B,) -> (B,).

    tau "tan" is literally tan(t) with t in [0, 1]; tan(pi t / 2) would send w to 0 at t = 1. See `check_weight`.
    """
    if kernel == "constant":
        return torch.ones_like(t)
    check_weight(row, tau)
    distance = TAUS[tau][0](t) - TAUS[tau][0](r)
    return torch.where(t == r, torch.ones_like(t), KERNELS[kernel](distance, sigma))


# ---------------------------------------------------------------------------------------------------------------------
# Times


def shift_times(row: Transport, t: Tensor, shift: float) -> Tensor:
    """t -> s t / (1 + (s - 1) t): more noise for more tokens (s > 1); keeps 0, 1 and the order.

    raises  ValueError for rows that do not run over [0, 1].
    """
    if shift == 1:
        return t
    if (row.t_min, row.t_max) != (0.0, 1.0) or shift <= 0:
        raise ValueError(f"time shift {shift:g} on {row.name!r}: a shift is positive and needs a row over [0, 1]")
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(tokens: int, base: int) -> float:
    """s of `shift_times` for a picture of so many tokens: sqrt(tokens / base), 1 where base is 0 (no shift).

    source  Stable Diffusion 3 (arXiv 2403.03206), Eq. 23: at m times the tokens, t of the same uncertainty.
    """
    return math.sqrt(tokens / base) if base else 1.0


def diffusion_count(n: int, share_diffusion: float) -> int:
    """How many of n samples have r = t. Fixed, so that the others make a batch of one size for `finite_difference`."""
    return round(n * share_diffusion)


def sample_times(
    row: Transport, n: int, share_diffusion: float, share_consistency: float, rng: torch.Generator,
    mean: float | None = None, std: float | None = None, shift: float = 1.0, diffusion_at: str = "later",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The mixture of times: two draws each, t the later and r the earlier.

    The first `diffusion_count` samples have r = t (plain diffusion, no derivative needed); of all samples, a share
    `share_consistency` on average has r = t_min. mean, std None: the row's own.
    diffusion_at  the time of samples with r = t: "later" of the two draws, as the authors; "earlier"; or "one" draw.
                  Small times decide how clean many steps come out, and with "later" they hardly occur: where one draw
                  falls below a time with chance p, the later of two does with p**2.
    returns  t, r (n,) float32 on the generator's device, row.t_min <= r <= t <= row.t_max.
    """
    device = rng.device
    normal = torch.randn(2, n, generator=rng, device=device)
    times = row.draw(normal, row.mean if mean is None else mean, row.std if std is None else std)
    times = shift_times(row, times.clamp(row.t_min, row.t_max), shift)
    t, r = times.max(0).values, times.min(0).values
    plain = dict(later=t, one=times[0], earlier=r)[diffusion_at]
    place, chance = torch.arange(n, device=device), torch.rand(n, generator=rng, device=device)
    r = torch.where(chance * (1 - share_diffusion) < share_consistency, torch.full_like(r, row.t_min), r)
    alike = place < diffusion_count(n, share_diffusion)
    return torch.where(alike, plain, t), torch.where(alike, plain, r)
