"""The network: a diffusion transformer that knows where it is (t) and how far it goes (t - r).

Tensor names, shapes and numerics are those of the released TiM weights: they load as they are.

    B  batch          N  tokens         K  head size, D / H
    C  channels       D  width          L  text tokens
    S  side           H  heads          p  patch

`lower_precision` puts attention and MLP in bf16; times, their embeddings, adaLN, the residual
stream, the patch embedding and the last layer stay fp32, or a finite difference over time drowns in
rounding.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

SIZES = {  # adaln: hidden width of each block's modulation
    "demo": dict(depth=4, width=128, heads=4, adaln=64),
    "emoji": dict(depth=3, width=256, heads=4, adaln=64),
    "S": dict(depth=12, width=384, heads=6, adaln=128),
    "B": dict(depth=12, width=768, heads=12, adaln=256),
    "L": dict(depth=24, width=1024, heads=16, adaln=344),
    "XL": dict(depth=28, width=1152, heads=16, adaln=384),
}


def unpack(x):
    """x and its tangent where forward-mode autodiff runs without gradients; else x and None."""
    plain = torch.compiler.is_compiling() or torch.is_grad_enabled()
    return (x, None) if plain else forward_ad.unpack_dual(x)


class Linear(nn.Linear):
    """A linear layer that computes in `dtype` or else in its weight's type, whatever comes in."""

    dtype = None

    def forward(self, x):
        dtype = self.dtype or self.weight.dtype
        weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        x, dx = unpack(x.to(dtype))
        out = F.linear(x, weight, bias)
        if dx is None:
            return out
        return forward_ad.make_dual(out, F.linear(dx, weight))  # torch's own rule also adds x 0


class HeadNorm(nn.LayerNorm):
    """Over the size of a head, in the type of what comes in."""

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(K)) v, fused. q (B, H, N, K) -> same; mask broadcasts to (B, H, N, L).

    Fused attention has no forward-mode rule, so here is one: with P the softmax and P' its tangent,
    dout = P' v + P dv, P' = P (S' - sum(P S')), S' = (dq k^T + q dk^T) / sqrt(K), each N x L.
    """
    (q, dq), (k, dk), (v, dv) = unpack(q), unpack(k), unpack(v)
    out = F.scaled_dot_product_attention(q, k, v, mask)
    if dq is None and dk is None and dv is None:
        return out
    dq, dk, dv = (torch.zeros_like(x) if dx is None else dx for x, dx in ((q, dq), (k, dk), (v, dv)))
    scores, slopes = q @ k.mT, dq @ k.mT + q @ dk.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    scale = q.shape[3] ** -0.5
    p = (scores * scale).softmax(3)
    slopes = p * slopes * scale
    dout = slopes @ v - slopes.sum(3, keepdim=True) * out + p @ dv
    return forward_ad.make_dual(out, dout)


class SwiGLU(nn.Module):
    """fc2(silu(fc1_g x) * fc1_x x)."""

    def __init__(self, inner, hidden, outer):
        super().__init__()
        self.fc1_g, self.fc1_x = Linear(inner, hidden), Linear(inner, hidden)
        self.fc2 = Linear(hidden, outer)

    def forward(self, x):
        return self.fc2(F.silu(self.fc1_g(x)) * self.fc1_x(x))


class PatchEmbedder(nn.Module):
    """Pictures to tokens; a convolution's weight, computed as one matrix product."""

    def __init__(self, channels, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x):                                          # (B, C, h p, w p) -> (B, h w, D)
        p = self.proj.kernel_size[0]
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))                       # (B, C, h, p, w, p)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)                   # (B, h w, C p p)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class TimeEmbedder(nn.Module):
    """256 sinusoids of a time, not multiplied by 1000, then an MLP. (B,) -> (B, D)."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(Linear(256, width), nn.SiLU(), Linear(width, width))

    def forward(self, t):
        k = torch.arange(128, dtype=t.dtype, device=t.device)
        angle = t[:, None] * 10000.0 ** (-k / 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], 1))


class LabelEmbedder(nn.Module):
    """A row per class; the last row means no class. (B,) -> (B, D)."""

    def __init__(self, classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class CaptionEmbedder(nn.Module):
    """Features of text to tokens of unit variance. (B, L, features) -> (B, L, D)."""

    def __init__(self, features, width):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(features, eps=1e-5), SwiGLU(features, 4 * width, width)
        self.last = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)          # no weights

    def forward(self, x):
        return self.last(self.mlp(self.norm(x.to(self.norm.weight.dtype))))


@lru_cache(maxsize=64)
def rope_table(h, w, head, theta, layout, device):
    """Rotation of each token by its position on an h x w grid: cos and sin, (h w, K/2) float32.

    The first half of the head turns with the column, the second with the row, each pair of numbers
    at its own rate theta^(-2k / (K/2)). layout "grid": token n is at column n mod w, row n div w.
    "released": n mod h and n div h, as the released weights were trained; differs off squares only.
    Computed in float64 on the CPU: some devices have no float64.
    """
    side = w if layout == "grid" else h
    index = torch.arange(h * w, dtype=torch.float64)
    column, row = index % side, index // side
    rate = theta ** (-torch.arange(0, head // 2, 2, dtype=torch.float64) / (head // 2))
    angle = torch.cat([torch.outer(column, rate), torch.outer(row, rate)], 1)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x, rope):
    """Turn the interleaved pairs (a, b) of each head by its token's angles: (B, H, N, K) -> same"""
    cos, sin = rope
    pairs = x.to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():           # which fuses real numbers and knows no complex ones
        a, b = pairs.unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1)
    else:                                                    # one pass over memory instead of seven
        turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)
        turned = torch.view_as_real(turned)
    return turned.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Interval-aware self-attention: q, k, v of every token are shifted by W_d phi(t - r)."""

    def __init__(self, width, heads, interval):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.qkv_d = Linear(width, 3 * width, bias=False) if interval else None
        self.q_norm = HeadNorm(width // heads, eps=1e-5)
        self.k_norm = HeadNorm(width // heads, eps=1e-5)
        self.proj = Linear(width, width)

    def forward(self, x, d, rope):                                  # (B, N, D), (B, D) -> (B, N, D)
        qkv = self.qkv(x)
        if self.qkv_d is not None:
            qkv = qkv + self.qkv_d(d)[:, None]
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, H, N, K)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        x = attend(q, k, v)                                                           # (B, H, N, K)
        return self.proj(x.transpose(1, 2).flatten(2))                                   # (B, N, D)


class CrossAttention(nn.Module):
    """Picture tokens look at text tokens; only the picture side has positions."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.kv = Linear(width, width), Linear(width, 2 * width)
        self.proj = Linear(width, width)
        self.q_norm = HeadNorm(width // heads, eps=1e-5)
        self.k_norm = HeadNorm(width // heads, eps=1e-5)

    def forward(self, x, text, mask, rope):                      # (B, N, D), (B, L, D) -> (B, N, D)
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)                  # (B, H, N, K)
        k, v = self.kv(text).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), rope), self.k_norm(k)
        mask = None if mask is None else mask[:, None, None]             # (B, 1, 1, L), True = look
        return self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class Block(nn.Module):
    """Self-attention, cross-attention to text, if there is any, MLP: each shifted, scaled, gated."""

    def __init__(self, width, heads, adaln, interval, cross):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)  # for all branches
        self.attn = Attention(width, heads, interval)
        self.cross_attn = CrossAttention(width, heads) if cross else None
        self.mlp = SwiGLU(width, 4 * width * 2 // 3, width)
        self.adaLN_modulation = SwiGLU(width, adaln, (9 if cross else 6) * width)

    def forward(self, x, c, d, rope, text=None, mask=None):              # (B, N, D), (B, D), (B, D)
        triples = self.adaLN_modulation(c).unflatten(1, (-1, 3, 1, x.shape[2]))
        attn, *cross, mlp = triples.unbind(1)                                   # each (B, 3, 1, D)
        shift, scale, gate = attn.unbind(1)                                             # (B, 1, D)
        x = x + gate * self.attn(modulate(self.norm(x), shift, scale), d, rope)
        if self.cross_attn is not None:
            shift, scale, gate = cross[0].unbind(1)
            x = x + gate * self.cross_attn(modulate(self.norm(x), shift, scale), text, mask, rope)
        shift, scale, gate = mlp.unbind(1)
        return x + gate * self.mlp(modulate(self.norm(x), shift, scale))


class FinalLayer(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = Linear(width, out)
        self.adaLN_modulation = SwiGLU(width, width // 2, 2 * width)

    def forward(self, x, c):                                    # (B, N, D), (B, D) -> (B, N, p p C)
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, 2)
        return self.linear(modulate(self.norm(x), shift, scale))


class TiM(nn.Module):
    """f_theta(x_t, t, r, y).

    channels, patch          C and p; heights and widths must be multiples of p
    depth, width, heads      of the transformer; adaln: hidden width of each block's modulation
    classes | caption        class-conditional with this many classes, or width of features of text
    predict                  what the output is read as, the paper's "f" or "x": `transition.network_f`
    guide_range              (low, high): the network knows its guidance w, see `forward`
    shared_time              ablation: one time encoder for t and t - r
    interval_attention       False is the ablation without W_d
    rope_layout, rope_theta  see `rope_table`
    caption_mask             False: padding is seen too, as the released text weights were trained
    projector                None or (tap depth, hidden, features): an MLP on the tokens after a
                             block, for the alignment loss; runs with `aligned=True` only
    """

    def __init__(
        self, channels, patch, depth, width, heads, adaln, classes=None, caption=None, predict="f",
        shared_time=False, interval_attention=True, rope_layout="grid", rope_theta=10000.0,
        caption_mask=True, guide_range=None, projector=None,
    ):  # fmt: skip
        super().__init__()
        if (classes is None) == (caption is None):
            raise ValueError(f"classes={classes}, caption={caption}: give exactly one of them")
        if width % heads or (width // heads) % 4:
            raise ValueError(f"width {width}, {heads} heads: the head size must be a multiple of 4")
        self.channels, self.patch, self.head = channels, patch, width // heads
        self.classes, self.predict, self.caption_mask = classes, predict, caption_mask
        self.rope_layout, self.rope_theta = rope_layout, rope_theta
        self.guide_range = guide_range
        self.x_embedder = PatchEmbedder(channels, patch, width)
        self.t_embedder = TimeEmbedder(width)
        self.delta_embedder = None if shared_time else TimeEmbedder(width)
        self.guide_embedder = TimeEmbedder(width) if guide_range else None
        if caption is None:
            self.y_embedder = LabelEmbedder(classes, width)
        else:
            self.y_embedder = CaptionEmbedder(caption, width)
        sizes = width, heads, adaln, interval_attention, caption is not None
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * channels)
        if projector:
            self.tap, hidden, features = projector
            self.projector = nn.Sequential(
                Linear(width, hidden), nn.SiLU(),
                Linear(hidden, hidden), nn.SiLU(),
                Linear(hidden, features),
            )  # fmt: skip
        self.init_weights()

    def init_weights(self):
        """Xavier for products; as the authors, small normals for the class table and t_embedder,
        zeros where a branch ends."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view, of a kernel too
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        if self.classes is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        ends = [m.adaLN_modulation.fc2 for m in (*self.blocks, self.final_layer)]
        for last in (*ends, self.final_layer.linear):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x, t, r, y, aligned=False):
        """Output (B, C, height, width) in fp32 (fp64 for fp64 weights); with `aligned` also tokens.

        x     (B, C, height, width), multiples of the patch; height and width may differ
        t, r  (B,) float32 or float64, r <= t, as the network sees them (the transport's c_noise)
        y     (B,) int64 in [0, classes], classes = no class; or features of text (B, L, caption),
              alone or as a tuple with a mask (B, L) bool, True for real tokens. With a guide_range a
              tuple of that and the guidance w, (B,): the network then is the guided field of w
        raises  ValueError for a size off the patch, TypeError for times of less than fp32
        """
        if x.shape[2] % self.patch or x.shape[3] % self.patch:
            size = f"{x.shape[2]}x{x.shape[3]}"
            raise ValueError(f"{size}: both sides must be multiples of the patch, {self.patch}")
        if t.dtype.itemsize < 4 or r.dtype.itemsize < 4:
            raise TypeError(f"times in {t.dtype}, {r.dtype}: bf16 is too coarse; pass float32")
        dtype = self.x_embedder.proj.weight.dtype
        h, w = x.shape[2] // self.patch, x.shape[3] // self.patch
        rope = rope_table(h, w, self.head, self.rope_theta, self.rope_layout, x.device)
        d = (self.delta_embedder or self.t_embedder)((t - r).to(dtype))                     # (B, D)
        c = self.t_embedder(t.to(dtype)) + d
        if self.guide_embedder is not None:
            y, guidance = y
            c = c + self.guide_embedder(guidance.to(dtype).log())
        text = mask = None
        if self.classes is not None:
            c = c + self.y_embedder(y)
        else:
            features, mask = y if isinstance(y, tuple) else (y, None)
            text = self.y_embedder(features)
            mask = mask if self.caption_mask else None
        x = self.x_embedder(x.to(dtype))                                                 # (B, N, D)
        tokens = None
        for i, block in enumerate(self.blocks):
            x = block(x, c, d, rope, text, mask)
            if aligned and i + 1 == self.tap:
                tokens = self.projector(x)
        x = self.final_layer(x, c)                                                 # (B, h w, p p C)
        x = x.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (h, w))   # (B, h, w, p, p, C)
        f = x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.channels, h * self.patch, -1)
        return (f, tokens) if aligned else f


def lower_precision(model: TiM, dtype=torch.bfloat16, masters=False) -> TiM:
    """Put attention and MLP in `dtype`, in place; the rest stays as it is. With `masters`, for
    training, the weights keep their type and are cast at every pass."""
    for block in model.blocks:
        for part in filter(None, (block.attn, block.cross_attn, block.mlp)):
            if masters:
                part.apply(lambda layer: setattr(layer, "dtype", dtype))  # read by Linear
            else:
                part.to(dtype)
    return model
