"""Convolutions with fewer multiplications: Winograd's minimal filtering, for float32 on a CPU.

A filter of r taps that gives m outputs looks at n = m + r - 1 inputs x and takes m r multiplications if done
as written, but n are enough (Winograd 1980; for neural networks Lavin and Gray 2016, arXiv:1509.09308):

    y = A [(G g) · (B x)]      A (m, n), G (n, r), B (n, n);  · is elementwise

G g is computed once for a kernel. A and B are small and fixed, and with C channels the elementwise products
become n matrix products, over which A and B cost little. Two axes are filtered by both in turn: 3x3 taps for
4x2 outputs take 24 multiplications in place of 72. Long filters are cut into pieces of 4 taps, which share
B x: 11 taps for 4 outputs take 21 in place of 44.

Results are those of the convolution up to rounding, about 2e-6 of the output's scale (tests/test_cpu.py), a
fiftieth of what is asked of a stage.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# Where the polynomials are evaluated, in the order of use; infinity is one point more. Of small numbers these
# lose least to rounding (Barabasz et al. 2020, arXiv:1803.10986, look for such).
POINTS = (0.0, 1.0, -1.0, 0.5, -2.0, 2.0)
TILE = (4, 2)  # outputs in time and in frequency
PIECE = 4  # outputs of a filter over time alone, and taps of a piece of it where there are more than 3
SCRATCH = 2**21  # floats in the largest temporary: more would leave the cache, fewer make small products


@cache
def filter_matrices(outputs: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """A (m, n), G (n, r) and B (n, n) of the minimal filter F(m, r), in float64.

    The product of polynomials of r and m coefficients is found from its values at n points; filtering is the
    transpose of that (Lavin and Gray 2016, section 4).
    """
    points = torch.tensor(POINTS[: outputs + taps - 2], dtype=torch.float64)

    def values(degree: int) -> Tensor:
        """Of polynomials with so many coefficients, at all points: (n, degree)."""
        at_infinity = torch.eye(degree, dtype=torch.float64)[-1:]
        return torch.cat([points[:, None] ** torch.arange(degree), at_infinity])

    return values(outputs).t(), values(taps), torch.linalg.inv(values(outputs + taps - 1)).t()


def kernel_2d(weight: Tensor) -> Tensor:
    """A convolution's weight (O, C, 3, 3) -> the kernel that `conv_2d` takes, (24, C, O)."""
    g_h, g_w = (filter_matrices(m, 3)[1] for m in TILE)
    kernel = torch.einsum("yi, xj, o c i j -> y x c o", g_h, g_w, weight.double())
    return rearrange(kernel, "y x c o -> (y x) c o").to(weight.dtype).contiguous()


def conv_2d(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution that keeps the size, padded with zeros: (B, C, H, W) -> (B, O, H, W).

    Args:
        x: float32; fastest where it lies in memory as (B, H, W, C).
        kernel: from `kernel_2d`.
        bias: (O,).

    Returns:
        (B, O, H, W), which lies in memory as (B, H, W, O).
    """
    batch, channels, height, width = x.shape
    points, _, channels_out = kernel.shape
    (m_h, m_w), (tiles_h, tiles_w) = TILE, (-(-height // TILE[0]), -(-width // TILE[1]))
    a = torch.kron(filter_matrices(m_h, 3)[0], filter_matrices(m_w, 3)[0]).to(x.dtype)  # (m, n)
    b = torch.kron(filter_matrices(m_h, 3)[2], filter_matrices(m_w, 3)[2]).to(x.dtype)  # (n, n)
    x = rearrange(x, "b c h w -> b h w c")
    x = F.pad(x, (0, 0, 1, 1 + tiles_w * m_w - width, 1, 1 + tiles_h * m_h - height))
    tiles = x.unfold(1, m_h + 2, m_h).unfold(2, m_w + 2, m_w)  # (B, tiles_h, tiles_w, C, n_h, n_w)
    tiles = rearrange(tiles, "b th tw c y x -> b th y x tw c")
    y = x.new_empty(batch, tiles_h, m_h, tiles_w, m_w, channels_out)
    # A block of tile rows at a time, in the same temporaries: they stay in the cache.
    rows = max(1, min(tiles_h, SCRATCH // (points * tiles_w * max(channels, channels_out))))
    scratch = [x.new_empty(points * rows * tiles_w * max(channels, channels_out)) for _ in range(2)]

    def temporary(which: int, *shape: int) -> Tensor:
        return scratch[which][: shape[0] * shape[1] * shape[2]].view(shape)

    for image, out in zip(tiles, y, strict=True):
        for source, target in zip(image.split(rows), out.split(rows), strict=True):
            count = len(source) * tiles_w
            taken = temporary(0, points, count, channels)
            taken.view(m_h + 2, m_w + 2, len(source), tiles_w, channels).copy_(
                rearrange(source, "th y x tw c -> y x th tw c")
            )
            seen = temporary(1, points, count, channels)
            torch.mm(b, taken.flatten(1), out=seen.flatten(1))
            product = temporary(0, points, count, channels_out)
            torch.bmm(seen, kernel, out=product)
            result = temporary(1, m_h * m_w, count, channels_out)
            torch.mm(a, product.flatten(1), out=result.flatten(1))
            result = result.view(m_h, m_w, len(source), tiles_w, channels_out)
            torch.add(rearrange(result, "y x th tw o -> th y tw x o"), bias, out=target)
    y = rearrange(y, "b th y tw x o -> b (th y) (tw x) o")
    return rearrange(y[:, :height, :width], "b h w o -> b o h w")


def kernel_1d(weight: Tensor) -> Tensor:
    """A convolution's weight (O, C, taps) -> the kernel that `conv_1d` takes, (pieces, points, C, O)."""
    taps = weight.shape[2] if weight.shape[2] <= 3 else PIECE
    pieces = -(-weight.shape[2] // taps)
    weight = F.pad(weight, (0, pieces * taps - weight.shape[2]))
    weight = rearrange(weight, "o c (j r) -> j r c o", r=taps)
    g = filter_matrices(PIECE, taps)[1]
    return torch.einsum("n r, j r c o -> j n c o", g, weight.double()).to(weight.dtype).contiguous()


def conv_1d(x: Tensor, kernel: Tensor, bias: Tensor, taps: int, dilation: int = 1) -> Tensor:
    """A convolution over time of an odd number of taps that keeps the length: (B, C, L) -> (B, O, L).

    Args:
        x: float32; fastest where it lies in memory as (B, L, C).
        kernel: from `kernel_1d`.
        bias: (O,).
        taps: of the convolution's weight.
        dilation: between the taps; every `dilation`-th sample is a sequence of its own.

    Returns:
        (B, O, L), which lies in memory as (B, L, O).
    """
    batch, channels, length = x.shape
    pieces, points, _, channels_out = kernel.shape
    a, _, b = (matrix.to(x.dtype) for matrix in filter_matrices(PIECE, points - PIECE + 1))
    tiles = -(-length // (PIECE * dilation))
    y = x.new_empty(batch, tiles, PIECE, dilation, channels_out)
    before = taps // 2 * dilation
    after = ((tiles + pieces - 1) * PIECE + points - PIECE) * dilation - length - before
    x = F.pad(rearrange(x, "b c l -> b l c"), (0, 0, before, max(after, 0)))
    rows = max(1, min(tiles, SCRATCH // (points * dilation * max(channels, channels_out))))
    for sequence, out in zip(x, y, strict=True):
        for start in range(0, tiles, rows):
            count = min(rows, tiles - start)
            first = start * PIECE * dilation
            used = ((count + pieces - 1) * PIECE + points - PIECE) * dilation
            steps = sequence[first : first + used].view(-1, dilation, channels)
            taken = rearrange(steps.unfold(0, points, PIECE), "t d c n -> n t d c")
            seen = (b @ taken.reshape(points, -1)).view(points, -1, channels)
            product = torch.bmm(seen[:, : count * dilation], kernel[0])
            for piece in range(1, pieces):
                # A tile's later taps meet what the tiles after it see.
                later = seen[:, piece * dilation : (piece + count) * dilation]
                product.baddbmm_(later, kernel[piece])
            result = (a @ product.view(points, -1)).view(PIECE, count, dilation, channels_out)
            torch.add(rearrange(result, "m t d o -> t m d o"), bias, out=out[start : start + count])
    return rearrange(rearrange(y, "b t m d o -> b (t m d) o")[:, :length], "b l o -> b o l")
