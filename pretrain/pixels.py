"""From decoder features to pixels of masked tokens, of whatever bands and date each token is.

Letters: b sample, c channel, h w pixels, g (date, group), n places of the grid, m predicted tokens, d width, v values of a patch
(row, column, band fastest).
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from swath.backbones.vit import init_weights
from swath.kernels.linear import Linear
from swath.kernels.patch_loss import masked_patch_loss
from swath.pretrain.masking import fill


class PixelHead(nn.Module):
    """`channels` of the image are behind each group of tokens. Groups of one size share a linear layer, unless `shared` says no;
    else each has its own."""

    def __init__(self, width: int, channels: tuple[tuple[int, ...], ...], patch: int, shared: bool = True) -> None:
        super().__init__()
        self.channels, self.patch = channels, patch
        self.shared = shared and len({len(group) for group in channels}) == 1
        heads = channels[:1] if self.shared else channels
        self.linear = nn.ModuleList([Linear(width, patch**2 * len(group)) for group in heads])
        init_weights(self)

    def forward(self, x_bmd: Tensor) -> list[Tensor]:
        """(B, M, V) from every layer: each token's own group is picked where it is compared."""
        return [linear(x_bmd) for linear in self.linear]

    def error(
        self, made: list[Tensor], images_bchw: Tensor, index_bm: Tensor, valid_bthw: Tensor | None, normalise: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Error, mean and spread (B, M) of each token against its own patch, as `masked_patch_loss`; index in raster order of the
        grid (dates, groups, rows, columns)."""
        places = (images_bchw.shape[2] // self.patch) * (images_bchw.shape[3] // self.patch)
        patch = (self.patch, self.patch)
        if self.shared:
            return masked_patch_loss(
                made[0], self.stacked(images_bchw), index_bm, patch=patch, normalise=normalise, valid_b1hw=self._valid(valid_bthw)
            )
        group_bm, place_bm = index_bm // places, index_bm % places
        total: tuple[Tensor, ...] | None = None
        for number, (prediction_bmv, group) in enumerate(zip(made, self.channels, strict=True)):
            valid_b1hw = None if valid_bthw is None else valid_bthw[:, self._date(number, valid_bthw)][:, None]
            own = masked_patch_loss(
                prediction_bmv, images_bchw[:, group], place_bm, patch=patch, normalise=normalise, valid_b1hw=valid_b1hw
            )
            total = (
                own if total is None else tuple(torch.where(group_bm == number, a, b) for a, b in zip(own, total, strict=True))
            )
        assert total is not None
        return total[0], total[1], total[2]

    def paste(
        self, made: list[Tensor], index_bm: Tensor, mean_bm: Tensor, spread_bm: Tensor, images_bchw: Tensor
    ) -> dict[str, Tensor]:
        """Input, what the encoder saw, and the input with its masked patches replaced by the reconstruction; all (B, C, H, W)."""
        rows, columns = images_bchw.shape[2] // self.patch, images_bchw.shape[3] // self.patch
        seen, whole = images_bchw.clone(), images_bchw.clone()
        for number, group in enumerate(self.channels):
            layout = {"p": self.patch, "q": self.patch, "h": rows, "w": columns, "c": len(group)}
            flat_bnv = rearrange(images_bchw[:, group], "b c (h p) (w q) -> b (h w) (p q c)", **layout)
            values_bmv = made[0 if self.shared else number].float() * spread_bm[..., None] + mean_bm[..., None]
            # tokens of other groups go to a row that is cut off again
            place_bm = torch.where(index_bm // (rows * columns) == number, index_bm % (rows * columns), rows * columns)
            spare_bnv = torch.cat([flat_bnv, flat_bnv[:, :1]], dim=1)
            for image, values in ((whole, values_bmv), (seen, torch.full_like(values_bmv, float("nan")))):
                pasted_bnv = fill(values, place_bm, spare_bnv)[:, :-1]
                image[:, group] = rearrange(pasted_bnv, "b (h w) (p q c) -> b c (h p) (w q)", **layout)
        return {"input": images_bchw, "seen": seen, "reconstruction": whole}

    def stacked(self, images_bchw: Tensor) -> Tensor:
        """(B, c, G · H, W): groups of one size below each other, so that patches in raster order are tokens of the grid."""
        order = [channel for group in self.channels for channel in group]
        return rearrange(images_bchw[:, order], "b (g c) h w -> b c (g h) w", g=len(self.channels))

    def _valid(self, valid_bthw: Tensor | None) -> Tensor | None:
        if valid_bthw is None:
            return None
        each_bghw = valid_bthw.repeat_interleave(len(self.channels) // valid_bthw.shape[1], dim=1)
        return each_bghw.flatten(1, 2)[:, None]

    def _date(self, number: int, valid_bthw: Tensor) -> int:
        return number * valid_bthw.shape[1] // len(self.channels)
