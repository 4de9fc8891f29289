"""SelectiveMAE (Wang et al. 2024, "Harnessing Massive Satellite Imagery with Efficient Masked Image Modeling", MiliLab).

Patches that say much are encoded, some of the others are predicted, the rest is left alone; what is predicted only looks at what
was encoded. Letters: b sample, h w pixels, n places of the grid, k encoded, m predicted, p prefix, t = p + k, d width, q head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swath.backbones.base import Backbone, gather, sincos_grid
from swath.backbones.vit import EPS, ViTConfig, check_table, from_published, init_weights
from swath.kernels.hog import hog_descriptor, hog_energy
from swath.pretrain.decoder import CrossBlock, Positions, at, check_sizes
from swath.pretrain.masking import Grid, kept, token_validity
from swath.pretrain.objective import Draws, Objective, Outcome, context, of_samples, register, seen_pixels
from swath.pretrain.objectives import mae
from swath.pretrain.pixels import PixelHead
from swath.shards.prepare import Batch

_FLAT = 1e-6  # odds of a patch without any gradient, where 1 is the image's mean
# Parts of released files: parameters that no output depends on, and the constants of the gradients.
DEAD = ("decoder_embed1", "pos_embed_probs", "get_token_probs", "get_token_probs_linear", "hog")


@dataclass(frozen=True)
class SelectiveMAEConfig:
    """1 - `mask_ratio` of the tokens are encoded and `predicted_ratio` predicted. `first_ratio` of the encoded are drawn by the
    energy of their gradients, the others added in `rounds` by their likeness to those, as `stages` says: shares of the run at
    which adding the most similar begins to turn into, and is, adding the least similar, and the same from there to random ones.

    `compat: uniform` draws as the released code does, by a score that is the same for every patch up to rounding.
    """

    mask_ratio: float = 0.85
    predicted_ratio: float = 0.25
    first_ratio: float = 0.5
    rounds: int = 2
    stages: tuple[float, float, float, float] = (280 / 800, 300 / 800, 580 / 800, 600 / 800)
    decoder_width: int = 512
    decoder_depth: int = 12
    decoder_heads: int = 16
    mlp_ratio: float = 4.0
    normalise_patches: bool = True
    compat: Literal["uniform"] | None = None


@dataclass
class Selection:
    """Places of the grid, each ascending: encoded (B, K) and predicted (B, M); counted (B, M) bool, which of these are targets;
    enough (B,) bool, which samples have valid tokens enough."""

    encoded: Tensor
    predicted: Tensor
    counted: Tensor
    enough: Tensor


@register(SelectiveMAEConfig, {"selective_mae": {}})
class SelectiveMAE(Objective):
    """Mean squared error at the predicted tokens, a mean within each sample. Tokens of all dates and groups are chosen among
    alike."""

    needs = frozenset({"sparse"})

    @classmethod
    def refusal(cls, backbone: Backbone) -> str | None:
        if "product" in backbone.traits:
            return "it encodes tokens that are picked one by one; this backbone takes products of groups and positions only"
        return super().refusal(backbone)

    def __init__(
        self, config: SelectiveMAEConfig, backbone: Backbone, image_size: tuple[int, int], channels: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        if not 0 <= config.predicted_ratio <= 1:
            raise ValueError(f"predicted_ratio must be within 0 … 1, not {config.predicted_ratio}")
        if config.rounds < 1 or not 0 <= config.first_ratio <= 1:
            raise ValueError(f"rounds must be at least 1, first_ratio within 0 … 1, not {config.rounds} and {config.first_ratio}")
        stages = list(config.stages)
        if len(stages) != 4 or stages != sorted(stages) or not 0 <= stages[0] <= stages[-1] <= 1:
            raise ValueError(f"stages must be four ascending shares of the run, within 0 … 1, not {config.stages}")
        grid = backbone.grid(*image_size)
        self.counts(grid)
        groups, width = grid[0] * grid[1], config.decoder_width
        self.decoder = CrossDecoder(backbone.width, width, config.decoder_depth, config.decoder_heads, config.mlp_ratio)
        self.positions = Positions(width, grid)
        # a modality has a head of its own
        self.heads = nn.ModuleDict(
            {
                name: PixelHead(width, backbone.channels if groups > 1 else (tuple(range(count)),), backbone.mask_unit)
                for name, count in channels.items()
            }
        )

    def forward(self, batch: Batch, draw: Draws) -> Outcome:
        ((modality, images_bchw),) = batch.images.items()
        images_bchw, valid_bthw = seen_pixels(batch, modality)
        head = self.heads[modality]
        assert isinstance(head, PixelHead)
        tokens = self.backbone.tokenize(images_bchw, context(batch, modality, self.backbone, draw))
        odds_bn = self.odds(images_bchw, valid_bthw, head.channels)
        chosen = self.select(tokens.x, odds_bn, valid_bthw, tokens.grid, draw)
        features = self.backbone.encode(tokens, chosen.encoded)
        memory_btd = torch.cat([features.prefix, features.tokens], dim=1)
        made = head(self.decode(memory_btd, chosen.predicted, tokens.grid))
        error_bm, mean_bm, spread_bm = head.error(made, images_bchw, chosen.predicted, valid_bthw, self.config.normalise_patches)
        loss_b = (error_bm * chosen.counted).sum(dim=1) / chosen.counted.sum(dim=1).clamp_min(1)
        weight_b = batch.weight * chosen.enough

        def picture() -> dict[str, Tensor]:
            made_there = head.paste(made, chosen.predicted, mean_bm, spread_bm, images_bchw)
            unseen_bm = _others(chosen.encoded, odds_bn.shape[1])
            blank_bm = torch.zeros_like(unseen_bm, dtype=torch.float32)
            nothing = [blank_bm[..., None].expand(-1, -1, values.shape[2]) for values in made]
            seen_bchw = head.paste(nothing, unseen_bm, blank_bm, blank_bm, images_bchw)["seen"]
            whole_bchw = torch.where(made_there["seen"].isnan(), made_there["reconstruction"], seen_bchw)
            return {"input": images_bchw, "seen": seen_bchw, "reconstruction": whole_bchw}

        return of_samples({"pixels": (1.0, loss_b)}, weight_b, modality, picture)

    def counts(self, grid: Grid) -> tuple[int, int, int]:
        """How many tokens of a grid are drawn first, encoded altogether, and predicted; ValueError where one of these is none, or
        both are more than all. 196 tokens by default: 14, 29, 49."""
        tokens, config = grid[0] * grid[1] * grid[2] * grid[3], self.config
        encoded, predicted = kept(tokens, config.mask_ratio), int(tokens * config.predicted_ratio)
        if encoded < 1 or predicted < 1 or encoded + predicted > tokens:
            raise ValueError(
                f"mask_ratio {config.mask_ratio} and predicted_ratio {config.predicted_ratio} encode {encoded} and predict "
                f"{predicted} of {tokens} tokens; each must be at least 1, both together at most {tokens}"
            )
        # of the tokens, not of the encoded ones, which are rounded already; as the released code counts
        return max(1, int(tokens * (1 - config.mask_ratio) * config.first_ratio)), encoded, predicted

    @torch.no_grad()
    def odds(self, images_bchw: Tensor, valid_bthw: Tensor | None, channels: tuple[tuple[int, ...], ...]) -> Tensor:
        """(B, N) above 0: how much likelier than others a token is drawn. Proportional to the energy of its oriented gradients,
        so on a flat image uniform; or the softmax of the released code's score."""
        patch = (self.backbone.mask_unit, self.backbone.mask_unit)
        scores = []
        for number, group in enumerate(channels):
            own_bchw = images_bchw[:, group]
            if self.config.compat == "uniform":
                scores.append(released_score(own_bchw, patch))
                continue
            date = 0 if valid_bthw is None else number * valid_bthw.shape[1] // len(channels)
            valid_b1hw = None if valid_bthw is None else valid_bthw[:, date : date + 1]
            scores.append(hog_energy(own_bchw, patch, cell=_cell(patch[0]), valid_b1hw=valid_b1hw))
        score_bn = torch.cat(scores, dim=1)
        if self.config.compat == "uniform":
            return score_bn.softmax(dim=1)
        mean_b1 = score_bn.mean(dim=1, keepdim=True)
        return score_bn / torch.where(mean_b1 > 0, mean_b1, 1.0) + _FLAT

    @torch.no_grad()
    def select(self, x_bnd: Tensor, odds_bn: Tensor, valid_bthw: Tensor | None, grid: Grid, draw: Draws) -> Selection:
        """Which tokens are encoded and which predicted: of a sample that has valid ones for it, valid ones only."""
        first, encoded, predicted = self.counts(grid)
        able_bn = torch.ones_like(odds_bn, dtype=torch.bool)
        enough_b = able_bn.any(dim=1)
        if valid_bthw is not None:
            valid_bn = token_validity(valid_bthw, grid)
            enough_b = valid_bn.sum(dim=1) > encoded
            able_bn = valid_bn | ~enough_b[:, None]
        odds_bn = odds_bn * able_bn
        chosen_bk = self.expand(x_bnd, draw.choose("first", odds_bn, first), able_bn, encoded, draw)
        free_bn = able_bn.scatter(1, chosen_bk, False)
        predicted_bm = draw.choose("predicted", odds_bn * free_bn, predicted).sort(dim=1).values
        return Selection(chosen_bk.sort(dim=1).values, predicted_bm, free_bn.gather(1, predicted_bm), enough_b)

    @torch.no_grad()
    def expand(self, x_bnd: Tensor, chosen_bk: Tensor, able_bn: Tensor, encoded: int, draw: Draws) -> Tensor:
        """(B, encoded): after the chosen, in the order in which they are added, the most and the least similar and random ones
        among the able.

        How similar a token is: the largest cosine of its embedding, position included, with that of any chosen one.
        """
        # in float64, which autocast leaves alone, and in which near ties fall the same way elsewhere
        unit_bnd = F.normalize(x_bnd.double(), dim=2)
        missing = encoded - chosen_bk.shape[1]
        each = missing // self.config.rounds
        for number in range(self.config.rounds):
            count = each if number < self.config.rounds - 1 else missing - each * number
            near, far, others = self.mixture(count)
            free_bn = able_bn.scatter(1, chosen_bk, False)
            added: list[Tensor] = []
            if near or far:
                closest_bn = closeness(unit_bnd, chosen_bk)
                # ascending, those that cannot be added at the other end
                last_bn = closest_bn.masked_fill(~free_bn, torch.inf).argsort(dim=1, stable=True)
                first_bn = closest_bn.masked_fill(~free_bn, -torch.inf).argsort(dim=1, stable=True)
                added = [first_bn[:, first_bn.shape[1] - near :], last_bn[:, :far]]
            if others:
                free_bn = free_bn.scatter(1, torch.cat(added, dim=1), False) if added else free_bn
                added.append(draw.choose(f"random{number}", free_bn.float(), others))
            chosen_bk = torch.cat([chosen_bk, *added], dim=1)
        return chosen_bk

    def mixture(self, count: int) -> tuple[int, int, int]:
        """Of so many tokens to add: how many are the most similar, the least similar, and random, at this point of the run."""
        to_far, far, to_random, random = self.config.stages
        near = int((1 - _ramp(self.progress, to_far, far)) * count)
        least = int((1 - _ramp(self.progress, to_random, random)) * (count - near))
        return near, least, count - near - least

    def decode(self, memory_btd: Tensor, predicted_bm: Tensor, grid: Grid) -> Tensor:
        """(B, M, D) decoder features at the predicted places."""
        return self.decoder(memory_btd, at(self.positions(grid, memory_btd.device), predicted_bm))


class CrossDecoder(nn.Module):
    """A mask token and a position per predicted place, cross-attention blocks, a norm (CrossMAE, Fu et al. 2024)."""

    def __init__(self, inside: int, width: int, depth: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        check_sizes("decoder", width, depth, heads, mlp_ratio)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList([CrossBlock(inside, width, heads, mlp_ratio) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=EPS)
        init_weights(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, memory_btd: Tensor, position_bmd: Tensor) -> Tensor:
        x_bmd = (self.mask_token + position_bmd).to(memory_btd.dtype)
        for block in self.blocks:
            x_bmd = block(x_bmd, memory_btd)
        return self.norm(x_bmd)


def closeness(unit_bnd: Tensor, chosen_bk: Tensor) -> Tensor:
    """(B, N): the largest cosine of each of the unit vectors with any of the chosen ones."""
    return (unit_bnd @ gather(unit_bnd, chosen_bk).transpose(1, 2)).amax(dim=2)


def released_score(images_bchw: Tensor, patch: tuple[int, int]) -> Tensor:
    """(B, N): the mean of each patch's standardised descriptor, as the released code has it. That is 0 but for rounding."""
    descriptor_bnv = hog_descriptor(images_bchw, patch, cell=_cell(patch[0]), window=patch[0])
    spread_bn1 = (descriptor_bnv.var(dim=2, keepdim=True) + 1e-6).sqrt()
    return ((descriptor_bnv - descriptor_bnv.mean(dim=2, keepdim=True)) / spread_bn1).mean(dim=2)


def _cell(patch: int) -> int:
    """The published 8 pixels, or the next smaller size that divides the patch."""
    return max(cell for cell in range(1, 9) if patch % cell == 0)


def _ramp(progress: float, start: float, end: float) -> float:
    """0 up to `start`, 1 from `end` on, linear between them."""
    if progress >= end:
        return 1.0
    return 0.0 if progress <= start else (progress - start) / (end - start)


def _others(index_bk: Tensor, count: int) -> Tensor:
    """(B, count - K), ascending: the places that are not in `index`."""
    taken_bn = torch.zeros(len(index_bk), count, dtype=torch.bool, device=index_bk.device).scatter(1, index_bk, True)
    return taken_bn.argsort(dim=1, stable=True)[:, : count - index_bk.shape[1]]


def load_published(objective: SelectiveMAE, backbone_config: ViTConfig, state: Mapping[str, Tensor]) -> None:
    """Load the released code's `model` dictionary, strict about every key but those of weights that are dead there."""
    encoder: dict[str, Tensor] = {}
    ours: dict[str, Tensor] = {}
    (modality,) = objective.heads
    for name, tensor in state.items():
        if name.partition(".")[0] in DEAD:
            continue
        if name == "decoder_pos_embed":
            place = torch.arange(backbone_config.image_size // backbone_config.patch)
            check_table(tensor, sincos_grid(objective.config.decoder_width, place, place), name)
        elif name.startswith(("decoder_", "mask_token")):
            ours[published_name(name, modality)] = tensor
        else:
            encoder[name] = tensor
    ours.update({f"backbone.{name}": tensor for name, tensor in from_published(encoder, backbone_config).items()})
    objective.load_state_dict(ours, strict=True)


_PUBLISHED = {"norm1": "norm_query", "norm2": "norm"}


def published_name(name: str, modality: str) -> str:
    """What a parameter of the released decoder is called here."""
    parts = mae.published_name(name, modality).split(".")
    return ".".join(_PUBLISHED.get(part, part) for part in parts if part != "cross_attn")
