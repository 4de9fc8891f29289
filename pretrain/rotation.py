"""RoMA's adaptive rotation (Wang et al. 2025, "RoMA: Scaling up Mamba-based Foundation Models for Remote Sensing"): of each image
the window that is richest in texture is turned by a random angle.

Letters: b sample, c band, h w pixels, r q rows and columns of patches, n patches, p pixels of a patch, s local binary codes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from swath.pretrain.objective import Draws

TOLERANCE = 0.1  # of an image's standard deviation: a neighbour that is brighter by less is noise
CODES = 256
_AROUND = [(row, column) for row in range(3) for column in range(3) if (row, column) != (1, 1)]


@dataclass
class Turned:
    """images (B, C, H, W) of which a square window was turned; valid (B, 1, H, W) bool of them, None where all pixels are; the
    window's top, left and side (B,) int64 in patches; angle (B,) float32, radians, counter-clockwise."""

    images: Tensor
    valid: Tensor | None
    top: Tensor
    left: Tensor
    side: Tensor
    angle: Tensor

    def window(self, rows: int, columns: int) -> Tensor:
        """(B, rows · columns) bool: the patches of the window."""
        row_br1, column_b1q = self._from_corner(rows, columns, self.top, self.left)
        side_b11 = self.side[:, None, None]
        return ((row_br1 >= 0) & (row_br1 < side_b11) & (column_b1q >= 0) & (column_b1q < side_b11)).flatten(1)

    def released_window(self, rows: int, columns: int, patch: int) -> Tensor:
        """(B, rows · columns) bool: what the published code takes for the window. Its corner is divided by the patch once too
        often, and its rows and columns are added in pairs, which leaves the diagonal."""
        row_br1, column_b1q = self._from_corner(rows, columns, self.top // patch, self.left // patch)
        return ((row_br1 == column_b1q) & (row_br1 >= 0) & (row_br1 < self.side[:, None, None])).flatten(1)

    def _from_corner(self, rows: int, columns: int, top_b: Tensor, left_b: Tensor) -> tuple[Tensor, Tensor]:
        row_r1 = torch.arange(rows, device=top_b.device)[:, None]
        column_1q = torch.arange(columns, device=top_b.device)[None]
        return row_r1 - top_b[:, None, None], column_1q - left_b[:, None, None]


@torch.no_grad()
def rotate(
    images_bchw: Tensor, valid_b1hw: Tensor | None, draw: Draws, patch: int, sides: Sequence[int], max_angle: float
) -> Turned:
    """Each image with its richest window of one of `sides` patches turned by uniform(-max_angle, max_angle) degrees, from the
    stream "angle". Sides that the image is too small for become its smaller side. What is given is left as it is."""
    score_brq = texture(images_bchw, patch, valid_b1hw)
    top_b, left_b, side_b = richest_window(score_brq, sides)
    angle_b = (draw.uniform("angle", 1)[:, 0] * 2 - 1) * math.radians(max_angle)
    return turn(images_bchw, valid_b1hw, top_b, left_b, side_b, angle_b, patch)


@torch.no_grad()
def texture(images_bchw: Tensor, patch: int, valid_b1hw: Tensor | None = None) -> Tensor:
    """(B, rows, columns) float32 in [0, 1): how many different local binary patterns each patch has, 0 where it is flat.

    Every pixel of the bands' mean gets a code of 8 bits, one for each neighbour that is brighter (Ojala et al. 2002) by more than
    `TOLERANCE`; the score is 1 - L2 norm of the density of a patch's codes. The published score is that norm itself, of codes
    within scrambled patches: it is greatest for a flat patch, against its purpose, which is to find what is rich in content.
    Only codes whose nine pixels are valid count; beyond the border lies what lies at it.
    """
    grey_b1hw = images_bchw.float().mean(dim=1, keepdim=True)
    step_b111 = TOLERANCE * _spread(grey_b1hw, valid_b1hw)
    height, width = grey_b1hw.shape[2:]
    around = F.pad(grey_b1hw, (1, 1, 1, 1), mode="replicate")
    code_b1hw = torch.zeros_like(grey_b1hw, dtype=torch.int64)
    for bit, (row, column) in enumerate(_AROUND):
        brighter = around[:, :, row : row + height, column : column + width] > grey_b1hw + step_b111
        code_b1hw += brighter.long() << bit
    counts_b1hw = torch.ones_like(grey_b1hw)
    if valid_b1hw is not None:
        counts_b1hw = (F.max_pool2d((~valid_b1hw).float(), 3, 1, 1) == 0).float()
    layout = "b 1 (r p) (q k) -> b (r q) (p k)"
    code_bnp, counts_bnp = (rearrange(x, layout, p=patch, k=patch) for x in (code_b1hw, counts_b1hw))
    seen_bns = counts_bnp.new_zeros(*code_bnp.shape[:2], CODES).scatter_add_(2, code_bnp, counts_bnp)
    total_bn = counts_bnp.sum(dim=2)
    norm_bn = seen_bns.square().sum(dim=2).sqrt() / total_bn.clamp_min(1)
    return torch.where(total_bn > 0, 1 - norm_bn, 0.0).unflatten(1, (height // patch, width // patch))


def _spread(grey_b1hw: Tensor, valid_b1hw: Tensor | None) -> Tensor:
    """(B, 1, 1, 1) standard deviation over valid pixels; summed in float64, so that no choice hangs on the order of the sum."""
    x = grey_b1hw.double()
    counts = torch.ones_like(x) if valid_b1hw is None else valid_b1hw.double()
    total = counts.sum(dim=(2, 3), keepdim=True).clamp_min(1)
    mean = (x * counts).sum(dim=(2, 3), keepdim=True) / total
    return (((x - mean).square() * counts).sum(dim=(2, 3), keepdim=True) / total).sqrt().float()


@torch.no_grad()
def richest_window(score_brq: Tensor, sides: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """top, left and side (B,) int64, in patches, of one window in each image.

    The window holds the patch with the best score and, of such windows, has the greatest sum. It is of the greatest of `sides`
    for which its mean is at least the image's, else of the smallest one. A side that the image is too small for is its own.
    """
    rows, columns = score_brq.shape[1:]
    best_b = score_brq.flatten(1).argmax(dim=1)
    row_b1, column_b1 = (best_b // columns)[:, None], (best_b % columns)[:, None]
    mean_b = score_brq.mean(dim=(1, 2))
    top_b, left_b, side_b = torch.zeros_like(best_b), torch.zeros_like(best_b), torch.zeros_like(best_b)
    for number, side in enumerate(sorted({min(side, rows, columns) for side in sides})):
        window_brq = F.avg_pool2d(score_brq[:, None], side, 1)[:, 0]
        tops, lefts = (torch.arange(n, device=best_b.device) for n in window_brq.shape[1:])
        holds_br = (tops <= row_b1) & (row_b1 < tops + side)
        holds_bq = (lefts <= column_b1) & (column_b1 < lefts + side)
        window_brq = window_brq.masked_fill(~(holds_br[:, :, None] & holds_bq[:, None]), -1.0)
        richest_b, place_b = window_brq.flatten(1).max(dim=1)
        taken_b = (richest_b >= mean_b) if number else torch.ones_like(mean_b, dtype=torch.bool)
        top_b = torch.where(taken_b, place_b // len(lefts), top_b)
        left_b = torch.where(taken_b, place_b % len(lefts), left_b)
        side_b = torch.where(taken_b, side, side_b)
    return top_b, left_b, side_b


@torch.no_grad()
def turn(
    images_bchw: Tensor, valid_b1hw: Tensor | None, top_b: Tensor, left_b: Tensor, side_b: Tensor, angle_b: Tensor, patch: int
) -> Turned:
    """The images with each one's window (in patches) turned about its centre, bilinearly.

    A pixel whose source would lie outside the window stays what it is: corners are neither black nor from elsewhere. One that is
    interpolated from an invalid pixel is invalid, and 0.
    """
    height, width = images_bchw.shape[2:]
    y_1h1 = torch.arange(height, device=angle_b.device)[None, :, None]
    x_11w = torch.arange(width, device=angle_b.device)[None, None]
    half_b11 = (side_b * (patch / 2)).float()[:, None, None]
    centre_y, centre_x = ((corner_b * patch).float()[:, None, None] + half_b11 - 0.5 for corner_b in (top_b, left_b))
    cos_b11, sin_b11 = angle_b.cos()[:, None, None], angle_b.sin()[:, None, None]
    dy_bhw, dx_bhw = torch.broadcast_tensors(y_1h1 - centre_y, x_11w - centre_x)
    from_y, from_x = cos_b11 * dy_bhw + sin_b11 * dx_bhw, cos_b11 * dx_bhw - sin_b11 * dy_bhw
    reach_b11 = half_b11 - 0.5  # the centres of the window's last pixels
    near_bhw = torch.maximum(dy_bhw.abs(), dx_bhw.abs()) < half_b11
    within_bhw = torch.maximum(from_y.abs(), from_x.abs()) <= reach_b11 + 1e-3  # quarter turns are not exact in float32
    moved_b1hw = (near_bhw & within_bhw)[:, None]
    from_y, from_x = (torch.maximum(torch.minimum(d, reach_b11), -reach_b11) for d in (from_y, from_x))
    # grid_sample's coordinates: -1 and 1 are the image's outer edges
    grid_bhw2 = torch.stack(
        [(2 * (centre_x + from_x) + 1) / width - 1, (2 * (centre_y + from_y) + 1) / height - 1], dim=3
    )  # fmt: skip
    sampled = F.grid_sample(images_bchw.float(), grid_bhw2, padding_mode="border", align_corners=False)
    turned_bchw = torch.where(moved_b1hw, sampled.to(images_bchw.dtype), images_bchw)
    if valid_b1hw is not None:
        whole = F.grid_sample(valid_b1hw.float(), grid_bhw2, padding_mode="border", align_corners=False) > 0.999
        valid_b1hw = torch.where(moved_b1hw, whole, valid_b1hw)
        turned_bchw = torch.where(valid_b1hw, turned_bchw, 0.0)
    return Turned(turned_bchw, valid_b1hw, top_b, left_b, side_b, angle_b)
