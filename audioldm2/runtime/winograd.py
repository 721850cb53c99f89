"""Convolutions with fewer multiplications: Winograd's minimal filtering, for float32 on a CPU.

A filter of r taps computes m outputs from n = m + r - 1 inputs x. Done directly this takes m r
multiplications, but n are enough (Winograd 1980; for neural networks Lavin and Gray 2016, arXiv:1509.09308):

    y = A [(G g) · (B x)]      A (m, n), G (n, r), B (n, n);  · is elementwise

G g is computed once for a kernel. A and B are small and fixed, and with C channels the elementwise products
become n matrix products, next to which A and B cost little. Two axes are filtered one after the other: 3x3
taps for 4x2 outputs take 24 multiplications instead of 72. Long filters are cut into pieces of 4 taps, which
share B x: 11 taps for 4 outputs take 21 instead of 44.

Results equal those of the convolution up to rounding, about 2e-6 of the output's scale
(tests/runtime/test_cpu.py).
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# Where the polynomials are evaluated, in the order of use; the last point is always infinity. For small
# filters these lose least to rounding (Barabasz et al. 2020, arXiv:1803.10986).
POINTS = (0.0, 1.0, -1.0, 0.5, -2.0, 2.0)
TILE = (4, 2)  # outputs of a two-dimensional filter, in time and in frequency
TILE_1D = 4  # outputs of a one-dimensional filter
MAX_TAPS_1D = 3  # longer one-dimensional filters are cut into pieces ...
PIECE_TAPS = 4  # ... of this many taps
MAX_SCRATCH_FLOATS = 2**21  # in a temporary: more would not fit the cache, fewer make small products


@cache
def filter_matrices(outputs: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """A (m, n), G (n, r) and B (n, n) of the minimal filter F(m, r), in float64.

    The product of polynomials of r and m coefficients is found from its values at n points; filtering is the
    transpose of that (Lavin and Gray 2016, section 4).
    """
    # On the CPU, whatever the caller's default device is: the result is cached.
    points = torch.tensor(POINTS[: outputs + taps - 2], dtype=torch.float64, device="cpu")

    def values(coefficients: int) -> Tensor:
        """Values at all n points of the monomials of a polynomial, (n, coefficients)."""
        at_infinity = torch.eye(coefficients, dtype=torch.float64, device="cpu")[-1:]
        powers = torch.arange(coefficients, device="cpu")
        return torch.cat([points[:, None] ** powers, at_infinity])

    return values(outputs).t(), values(taps), torch.linalg.inv(values(outputs + taps - 1)).t()


def kernel_2d(weight: Tensor) -> Tensor:
    """Transform a convolution's weight (O, C, 3, 3) into the kernel that `conv_2d` takes, (24, C, O)."""
    g = torch.kron(*(filter_matrices(m, 3)[1] for m in TILE))  # (24, 9)
    return _transformed(g, weight.flatten(2))


def kernel_1d(weight: Tensor) -> Tensor:
    """Transform a convolution's weight (O, C, taps) into the kernel of `conv_1d`, (pieces, points, C, O)."""
    taps = weight.shape[2]
    piece = taps if taps <= MAX_TAPS_1D else PIECE_TAPS
    pieces = -(-taps // piece)
    # The last piece is shorter where `piece` does not divide `taps`: its missing taps are zeros.
    g = torch.block_diag(*[filter_matrices(TILE_1D, piece)[1]] * pieces)[:, :taps]  # (pieces · points, taps)
    return rearrange(_transformed(g, weight), "(j n) c o -> j n c o", j=pieces)


def _transformed(g: Tensor, weight: Tensor) -> Tensor:
    """G g of every filter, for G (n, r) and weight (O, C, r): (n, C, O), laid out as (n, O, C).

    One matrix product in the weight's own precision, which costs a tenth of the same in float64.
    """
    filters = rearrange(weight, "o c r -> r (o c)")
    return rearrange(g.to(weight.dtype) @ filters, "n (o c) -> n c o", o=len(weight))


def conv_2d(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution with a padding of 1, which keeps the size: (B, C, H, W) -> (B, O, H, W).

    Args:
        x: (B, C, H, W); fastest in the channels-last memory format.
        kernel: from `kernel_2d`.
        bias: (O,).

    Returns:
        (B, O, H, W) in the channels-last memory format.
    """
    batch, channels, height, width = x.shape
    points, _, channels_out = kernel.shape
    (m_h, m_w), (tiles_h, tiles_w) = TILE, (-(-height // TILE[0]), -(-width // TILE[1]))
    a = torch.kron(filter_matrices(m_h, 3)[0], filter_matrices(m_w, 3)[0]).to(x.dtype)  # (8, 24)
    b = torch.kron(filter_matrices(m_h, 3)[2], filter_matrices(m_w, 3)[2]).to(x.dtype)  # (24, 24)
    x = rearrange(x, "b c h w -> b h w c")
    y = x.new_empty(batch, tiles_h, m_h, tiles_w, m_w, channels_out)
    # Some tile rows of one image at a time, or some whole images, in temporaries that stay in the cache.
    row_size = points * tiles_w * max(channels, channels_out)
    rows = max(1, min(tiles_h, MAX_SCRATCH_FLOATS // row_size))
    images = max(1, MAX_SCRATCH_FLOATS // (row_size * tiles_h))
    for image in range(0, batch, images):
        for row in range(0, tiles_h, rows):
            out = y[image : image + images, row : row + rows]
            first, last = row * m_h - 1, (row + out.shape[1]) * m_h + 1  # of the rows that the tiles read
            part = x[image : image + images, max(first, 0) : last]
            above = max(-first, 0)
            below = last - first - above - part.shape[1]
            part = F.pad(part, (0, 0, 1, 1 + tiles_w * m_w - width, above, below))
            tiles = part.unfold(1, m_h + 2, m_h).unfold(2, m_w + 2, m_w)
            seen = b @ rearrange(tiles, "b th tw c y x -> (y x) (b th tw c)")
            product = torch.bmm(rearrange(seen, "n (t c) -> n t c", c=channels), kernel)
            result = a @ rearrange(product, "n t o -> n (t o)")
            result = result.view(m_h, m_w, len(out), out.shape[1], tiles_w, channels_out)
            torch.add(rearrange(result, "y x b th tw o -> b th y tw x o"), bias, out=out)
    y = rearrange(y, "b th y tw x o -> b (th y) (tw x) o")[:, :height, :width]
    return rearrange(y, "b h w o -> b o h w").contiguous(memory_format=torch.channels_last)


def conv_1d(x: Tensor, kernel: Tensor, bias: Tensor, taps: int, dilation: int = 1) -> Tensor:
    """A convolution over time of an odd number of taps, padded to keep the length: (B, C, L) -> (B, O, L).

    Args:
        x: (B, C, L); fastest where it lies in memory as (B, L, C).
        kernel: from `kernel_1d`.
        bias: (O,).
        taps: number of taps of the convolution's weight.
        dilation: distance between the taps; every `dilation`-th sample is filtered as a sequence of its own.

    Returns:
        (B, O, L), which lies in memory as (B, L, O).
    """
    batch, channels, length = x.shape
    pieces, points, _, channels_out = kernel.shape
    a, _, b = (matrix.to(x.dtype) for matrix in filter_matrices(TILE_1D, points - TILE_1D + 1))
    tiles = -(-length // (TILE_1D * dilation))
    y = x.new_empty(batch, tiles, TILE_1D, dilation, channels_out)
    x = rearrange(x, "b c l -> b l c")
    rows = max(1, min(tiles, MAX_SCRATCH_FLOATS // (points * dilation * max(channels, channels_out))))
    for sequence, result in zip(x, y, strict=True):
        for start in range(0, tiles, rows):
            out = result[start : start + rows]
            count = len(out)
            # The samples that the tiles read; those of later pieces are further on.
            first = (start * TILE_1D - taps // 2) * dilation
            last = first + ((count + pieces - 2) * TILE_1D + points) * dilation
            part = sequence[max(first, 0) : max(last, 0)]
            before = max(-first, 0)
            part = F.pad(part, (0, 0, before, last - first - before - len(part)))
            part = rearrange(part, "(t d) c -> t d c", d=dilation)
            seen = b @ rearrange(part.unfold(0, points, TILE_1D), "t d c n -> n (t d c)")
            seen = rearrange(seen, "n (t c) -> n t c", c=channels)  # all dilation · tiles
            product = torch.bmm(seen[:, : count * dilation], kernel[0])
            for piece in range(1, pieces):
                # The taps of a later piece meet what the first piece meets in a later tile.
                later = seen[:, piece * dilation : (piece + count) * dilation]
                product.baddbmm_(later, kernel[piece])
            filtered = a @ rearrange(product, "n t o -> n (t o)")
            filtered = rearrange(filtered, "m (t d o) -> t m d o", d=dilation, o=channels_out)
            torch.add(filtered, bias, out=out)
    y = rearrange(y, "b t m d o -> b (t m d) o")[:, :length].contiguous()
    return rearrange(y, "b l o -> b o l")
