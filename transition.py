"""The paper in symbols: transports, steps, the target and its derivative, weights, times.

Transition Models (arXiv 2509.04394). A network f = f_theta(x_t, t, r) carries a state x_t from time
t to any earlier time r <= t in one step, x_r = A(t, r) x_t + B(t, r) f. Everything here is a pure
function of tensors: no network, no device, no hidden randomness.

    x    clean data or latent, (B, C, H, W)      t    from-time, (B,) float32 or float64
    eps  noise ~ N(0, I), same shape             r    to-time, (B,), r <= t
    x_t  state, alpha(t) x + sigma(t) eps        f    network output, same shape as x
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

Coefficient = Callable[[Tensor], Tensor]

# --- The table of transports (paper, Table 1) -----------------------------------------------------


@dataclass(frozen=True)
class Transport:
    """A path from data to noise and what the network predicts on it; all else follows from that."""

    name: str
    t_min: float
    t_max: float
    alpha: Coefficient  # x_t = alpha x + sigma eps
    sigma: Coefficient
    alpha_hat: Coefficient  # f = alpha_hat x + sigma_hat eps, the best output at r = t
    sigma_hat: Coefficient
    draw: Callable[[Tensor, float, float], Tensor]  # (normal, mean, std) -> t, unclamped
    mean: float | None = None  # defaults of that draw; None where it has no such parameters
    std: float | None = None
    c_noise: Coefficient = lambda t: t  # what the network is shown instead of t and of r
    h: tuple[float, float] = (0.001, 0.01)  # of `finite_difference` in fp32 and bf16, as measured
    rho: float = 1.0  # sampling times are equally spaced in t^(1/rho), see `times`

    @property
    def on_unit_interval(self) -> bool:
        return (self.t_min, self.t_max) == (0, 1)

    def fraction(self, t: Tensor) -> Tensor:
        """The place of a time between t_min and t_max, 0 to 1, on the scale of `times`."""
        low, high = (end ** (1 / self.rho) for end in (self.t_min, self.t_max))
        return ((t ** (1 / self.rho) - low) / (high - low)).clamp(0, 1)

    def at(self, fraction: Tensor) -> Tensor:
        """The time at a place between 0 and 1: `fraction` inverted."""
        low, high = (end ** (1 / self.rho) for end in (self.t_min, self.t_max))
        return ((low + (high - low) * fraction) ** self.rho).clamp(self.t_min, self.t_max)

    def times(self, n: int) -> Tensor:
        """n + 1 falling times of n steps, t_max to t_min, float64: equal steps of t^(1/rho) (Karras
        et al. 2022, Eq. 5). Where t spans decades, equal steps of t leave all work to the last."""
        t = self.at(torch.linspace(1, 0, n + 1, dtype=torch.float64))
        t[0], t[-1] = self.t_max, self.t_min  # not their rounded powers
        return t


OTFM = Transport(
    "otfm", t_min=0.0, t_max=1.0, mean=-0.4, std=1.0,
    draw=lambda n, mean, std: torch.sigmoid(mean + std * n),
    alpha=lambda t: 1 - t, sigma=lambda t: t,
    alpha_hat=lambda t: -torch.ones_like(t), sigma_hat=torch.ones_like,
)  # fmt: skip
TRIGFLOW = Transport(
    "trigflow", t_min=0.0, t_max=1.57, mean=-1.0, std=1.6,
    draw=lambda n, mean, std: (mean + std * n).exp().atan(),
    alpha=torch.cos, sigma=torch.sin, alpha_hat=lambda t: -t.sin(), sigma_hat=torch.cos,
)  # fmt: skip


def edm(sigma_data: float) -> Transport:
    """EDM (Karras et al. 2022), preconditioned: x_t has unit variance if x has sigma_data^2."""
    s = sigma_data
    return Transport(
        "edm", t_min=0.01, t_max=80.0, mean=-1.2, std=1.2, h=(0.003, 0.03), rho=7.0,
        draw=lambda n, mean, std: (mean + std * n).exp(), c_noise=lambda t: t.log() / 4,
        alpha=lambda t: 1 / (t**2 + s**2).sqrt(), sigma=lambda t: t / (t**2 + s**2).sqrt(),
        alpha_hat=lambda t: t / (s * (t**2 + s**2).sqrt()),
        sigma_hat=lambda t: -s / (t**2 + s**2).sqrt(),
    )  # fmt: skip


def vp_beta(t: Tensor) -> Tensor:
    """Noise-to-signal ratio of VP. expm1, because exp(.) - 1 is off by 2% at t = 1e-5 in fp32."""
    return torch.expm1(19.9 * t**2 / 2 + 0.1 * t).sqrt()


VP = Transport(
    "vp", t_min=1e-5, t_max=1.0, h=(0.01, 0.1),  # the network sees 999 t
    draw=lambda n, mean, std: 1e-5 + (1 - 1e-5) * torch.special.ndtr(n),  # uniform
    c_noise=lambda t: 999 * t,
    alpha=lambda t: 1 / (vp_beta(t) ** 2 + 1).sqrt(),
    sigma=lambda t: vp_beta(t) / (vp_beta(t) ** 2 + 1).sqrt(),
    alpha_hat=torch.zeros_like, sigma_hat=torch.ones_like,
)  # fmt: skip
VE = Transport(
    "ve", t_min=0.02, t_max=100.0, h=(0.003, 0.03), rho=7.0,
    draw=lambda n, mean, std: 0.02 * 5000 ** torch.special.ndtr(n),  # log-uniform
    c_noise=lambda t: (t / 2).log(),
    alpha=torch.ones_like, sigma=lambda t: t,
    alpha_hat=torch.zeros_like, sigma_hat=lambda t: -torch.ones_like(t),
)  # fmt: skip
TIM = replace(  # times and output of otfm on the circle of trigflow
    OTFM, name="tim",
    alpha=lambda t: (math.pi / 2 * t).cos(), sigma=lambda t: (math.pi / 2 * t).sin(),
)  # fmt: skip

# A new transport is one more record here: the tests take it up by themselves.
TRANSPORTS = {t.name: t for t in (OTFM, TRIGFLOW, edm(sigma_data=1.0), VP, VE, TIM)}


def expand(t: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...), ready to multiply x."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def slope(g: Coefficient, t: Tensor) -> Tensor:
    """dg/dt of an elementwise function, exact, by autodiff: (B,) -> (B,)."""
    with torch.enable_grad():
        s = t.detach().requires_grad_()
        return torch.autograd.grad((g(s) + 0 * s).sum(), s)[0]  # 0 * s: g may be constant


# --- States and steps -----------------------------------------------------------------------------


def interpolate(transport: Transport, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The state x_t = alpha(t) x + sigma(t) eps. x, eps (B, ...), t (B,) -> (B, ...)."""
    return expand(transport.alpha(t), x) * x + expand(transport.sigma(t), x) * eps


def residual(transport: Transport, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What f should be at r = t: alpha_hat(t) x + sigma_hat(t) eps. x, eps (B, ...), t (B,)."""
    return expand(transport.alpha_hat(t), x) * x + expand(transport.sigma_hat(t), x) * eps


def solve(transport: Transport, x_t: Tensor, f: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The pair (x, eps) behind a state and an output: `interpolate` and `residual` inverted."""
    alpha, sigma = expand(transport.alpha(t), x_t), expand(transport.sigma(t), x_t)
    alpha_hat, sigma_hat = expand(transport.alpha_hat(t), x_t), expand(transport.sigma_hat(t), x_t)
    det = sigma_hat * alpha - alpha_hat * sigma
    return (sigma_hat * x_t - sigma * f) / det, (alpha * f - alpha_hat * x_t) / det


SIGMA_FLOOR = 0.05  # smallest sigma that a prediction of x is divided by, see `output_from_x`


def output_from_x(transport: Transport, x_hat: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The f of a predicted x: alpha_hat x_hat + sigma_hat (x_t - alpha x_hat) / max(sigma, floor).

    x_hat, x_t (B, ...), t (B,). Exact where sigma(t) >= SIGMA_FLOOR. Below it eps_hat is scaled
    down, or an error of x_hat, divided by almost nothing, would dominate the loss (2511.13720).
    """
    sigma = transport.sigma(t).clamp(min=SIGMA_FLOOR)
    eps_hat = (x_t - expand(transport.alpha(t), x_t) * x_hat) / expand(sigma, x_t)
    return residual(transport, x_hat, eps_hat, t)


def step_coefficients(transport: Transport, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (A, B) of x_r = A x_t + B f (Eq. 5, 6): what `solve`, then `interpolate` at r, give.
    t, r (B,), t_min <= r <= t <= t_max; t = r gives A = 1, B = 0. ValueError if shapes differ."""
    if t.shape != r.shape:
        raise ValueError(f"t {tuple(t.shape)}, r {tuple(r.shape)}: expand them to one shape first")
    alpha, sigma = transport.alpha(t), transport.sigma(t)
    alpha_hat, sigma_hat = transport.alpha_hat(t), transport.sigma_hat(t)
    det = sigma_hat * alpha - alpha_hat * sigma
    a = (transport.alpha(r) * sigma_hat - transport.sigma(r) * alpha_hat) / det
    b = (transport.sigma(r) * alpha - transport.alpha(r) * sigma) / det
    return a, b


def step(transport: Transport, x_t: Tensor, f: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """One transition x_t -> x_r (Eq. 5). x_t, f (B, ...), t, r (B,) -> (B, ...)."""
    a, b = step_coefficients(transport, t, r)
    return expand(a, x_t) * x_t + expand(b, x_t) * f


# --- The target and its time derivative -----------------------------------------------------------


def transition_target(transport: Transport, x, eps, t, r, df_dt: Tensor) -> Tensor:
    """What f(x_t, t, r) is trained towards (Eq. 9), ' = d/dt at fixed r:

        alpha_hat x + sigma_hat eps + (B / B') (alpha_hat' x + sigma_hat' eps - df/dt)

    x, eps, df_dt (B, ...), t, r (B,) -> (B, ...). At r = t, B is 0 and the target is `residual`, u.
    Why: along the path A x_t + B u is x_r, whatever t is, and A x_t + B f must not change with t
    either. So d/dt of B (f - u) is 0: B' (f - u) + B (df/dt - u') = 0.
    """
    b = step_coefficients(transport, t, r)[1]
    b_slope = slope(lambda s: step_coefficients(transport, s, r)[1], t)
    x_part = expand(slope(transport.alpha_hat, t), x) * x
    eps_part = expand(slope(transport.sigma_hat, t), x) * eps
    return residual(transport, x, eps, t) + expand(b / b_slope, x) * (x_part + eps_part - df_dt)


def guided_pair(transport: Transport, x, eps, t, f_cond, f_null, w_gt, w_cond: float):
    """The pair (x, eps) with the same x_t whose residual is guided: model guidance in the target.

    The residual becomes w_gt residual + w_cond f_cond + (1 - w_gt - w_cond) f_null; f_cond, f_null:
    the network at r = t with its condition and without (f_cond may be None if w_cond is 0); w_gt: a
    number, or one per sample (B,). The fixed point is guidance w_gt / (1 - w_cond) with none at
    sampling. The authors replace the residual alone; with the pair, df/dt follows the guided path,
    and so do long steps.
    """
    w_gt = expand(w_gt, x) if isinstance(w_gt, Tensor) else w_gt
    guided = w_gt * residual(transport, x, eps, t) + (1 - w_gt - w_cond) * f_null
    if w_cond:
        guided = guided + w_cond * f_cond
    return solve(transport, interpolate(transport, x, eps, t), guided, t)


# --- The network as a function, and its conditions ------------------------------------------------


def network_f(network, transport: Transport, predict: str):
    """The paper's f(x_t, t, r, y) of a network, for training, guidance and sampling alike.

    The network sees c_noise of the times. predict: what its output is read as, "f" or "x".
    returns  a function (x_t, t, r, y, aligned=False) -> f (B, ...); with aligned, (f, tokens)
    """

    def read(out, x_t, t):
        return output_from_x(transport, out, x_t, t) if predict == "x" else out

    def f(x_t, t, r, y, aligned=False):
        seen = x_t, transport.c_noise(t), transport.c_noise(r), y
        if not aligned:
            return read(network(*seen), x_t, t)
        out, tokens = network(*seen, aligned=True)
        return read(out, x_t, t), tokens

    return f


def each(function, *conditions):
    """function(*tensors) over conditions: tensors with the batch first, or tuples of conditions."""
    if isinstance(conditions[0], tuple):
        return tuple(each(function, *parts) for parts in zip(*conditions))
    return function(*conditions)


def cat(first, second):
    """Two conditions, or two tensors, as one batch."""
    return each(lambda a, b: torch.cat([a, b]), first, second)


def choose(mask: Tensor, first, second):
    """Of two conditions the first where mask (B,), else the second."""
    return each(lambda a, b: torch.where(expand(mask, a), a, b), first, second)


# --- The derivative -------------------------------------------------------------------------------


@torch.no_grad()
def finite_difference(f, transport: Transport, x, eps, t, r, y, h: float) -> Tensor:
    """df/dt along the path of (x, eps) at fixed r by a central difference (DDE, Eq. 10).

    f  the network, (x_t, t, r, y) -> (B, ...); runs once on a double batch, without gradients
    h  half the width, in what the network sees (c_noise); `Transport.h` has what was measured
    One-sided where t - h would fall below r; central at t_max too: path and embedding go on
    smoothly to t_max + h. Divides by the distance of the rounded times: rounding costs nothing.
    """
    width = h / slope(transport.c_noise, t)
    late, early = t + width, torch.maximum(t - width, r)
    s = torch.cat([late, early])
    x_s = interpolate(transport, cat(x, x), cat(eps, eps), s)
    f_late, f_early = f(x_s, s, cat(r, r), cat(y, y)).chunk(2)
    return (f_late - f_early) / expand(late - early, x)


@torch.no_grad()
def exact_derivative(f, transport: Transport, x, eps, t, r, y) -> Tensor:
    """The same by forward-mode autodiff (JVP), for f whose every operation has a forward-mode rule:
    torch's fused attention has none, `model.attend` has its own. Compiled code runs eagerly."""
    with torch.compiler.set_stance("force_eager"), forward_ad.dual_level():
        s = forward_ad.make_dual(t, torch.ones_like(t))
        out = f(interpolate(transport, x, eps, s), s, r, y)
        return forward_ad.unpack_dual(out).tangent


# --- The loss and its weight ----------------------------------------------------------------------


def sample_loss(f: Tensor, target: Tensor, cosine: bool) -> Tensor:
    """Per-sample distance (B,): mean square (Eq. 13) and, as the authors' code, 1 - cosine."""
    loss = (f - target).square().flatten(1).mean(1)
    if cosine:  # of the channels at each position; its slope at f = 0 is 1 / eps
        similarity = torch.cosine_similarity(f, target, dim=1, eps=1e-2)
        loss = loss + (1 - similarity).flatten(1).mean(1)
    return loss


def adaptive(loss: Tensor) -> Tensor:
    """l / (stopgrad(l) + 1e-5), as in the authors' code: the gradient of log(l + 1e-5), so that the
    minimiser is not the conditional mean. Its value is about 1: write the raw loss to the log."""
    return loss / (loss.detach() + 1e-5)


TAUS = {  # name: (tau(t), the end of the times for which it is valid; at it, a weight may be 0)
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


def check_weight(transport: Transport, tau: str) -> None:
    """Raise ValueError where tau is not valid over the transport's range: no training on NaN."""
    limit = TAUS[tau][1]
    if transport.t_max > limit:
        raise ValueError(f"tau {tau!r} is valid for t <= {limit:.4g}, not for {transport.name!r}; use "
                         "tau 'identity' or the kernel 'constant'")


def time_weight(transport: Transport, t, r, tau: str, kernel: str, sigma: float) -> Tensor:
    """w(t, r) = k(tau(t) - tau(r)), and 1 where r = t (Eq. 11, 12). t, r (B,) -> (B,). tau "tan" is
    literally tan(t) with t in [0, 1]; tan(pi t / 2) would send w to 0 at t = 1."""
    if kernel != "constant":
        check_weight(transport, tau)
    distance = TAUS[tau][0](t) - TAUS[tau][0](r)
    return torch.where(t == r, torch.ones_like(t), KERNELS[kernel](distance, sigma))


# --- Times ----------------------------------------------------------------------------------------


def shift_times(transport: Transport, t: Tensor, shift: float) -> Tensor:
    """t -> s t / (1 + (s - 1) t): more noise for more tokens (s > 1); keeps 0, 1 and the order."""
    if shift == 1:
        return t
    if not transport.on_unit_interval or not 0 < shift < math.inf:
        raise ValueError(f"shift {shift:g} of {transport.name!r}: it must be positive, over [0, 1]")
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(tokens: int, base: int) -> float:
    """s of `shift_times` for this many tokens: sqrt(tokens / base), or 1 (off) if base is 0. Source:
    Stable Diffusion 3 (arXiv 2403.03206), Eq. 23: equal uncertainty at m times the tokens."""
    return math.sqrt(tokens / base) if base else 1.0


def sample_times(
    transport: Transport, n: int, rng: torch.Generator, *, share_diffusion=0.5, share_consistency=0.1,
    mean=None, std=None, diffusion_at="later", shift=1.0,
):  # fmt: skip
    """Two draws each, t the later and r the earlier; some samples then get r = t or r = t_min.

    share_diffusion    of the samples have r = t, plain diffusion, which needs no derivative: the first
                       n * share; that number is rounded down, or up with the probability of its
                       fraction, so that the share is met on average at any n
    share_consistency  of all samples have r = t_min, too
    mean, std          of the transport's draw; None: its own
    diffusion_at       where r = t: the "later" draw, the "earlier", or "one" of both. The later, the
                       authors' choice, hardly trains small times: where one draw is below a time
                       with chance p, the later is with p^2
    shift              see `shift_times`
    returns  t, r (n,) float32 on the generator's device, t_min <= r <= t <= t_max; and how many
             samples, the first ones, surely have r = t: those after them need a derivative
    """
    device = rng.device
    mean, std = transport.mean if mean is None else mean, transport.std if std is None else std
    draws = transport.draw(torch.randn(2, n, generator=rng, device=device), mean, std)
    draws = shift_times(transport, draws.clamp(transport.t_min, transport.t_max), shift)
    t, r = draws.max(0).values, draws.min(0).values
    diffusion_time = draws[0]
    if diffusion_at != "one":
        diffusion_time = t if diffusion_at == "later" else r
    # of the samples with r < t, so many that they are this share of all
    u = torch.rand(n, generator=rng, device=device) * (1 - share_diffusion)
    r = r.masked_fill(u < share_consistency, transport.t_min)
    same = math.floor(n * share_diffusion + 1e-9)
    fraction = n * share_diffusion - same
    is_diffusion = torch.arange(n, device=device) < same
    if fraction > 1e-6:
        is_diffusion[same] = torch.rand((), generator=rng, device=device) < fraction
    t = torch.where(is_diffusion, diffusion_time, t)
    return t, torch.where(is_diffusion, t, r), same
