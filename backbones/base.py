"""What every backbone is: a tokenizer, an encoder, declared traits, and a name in one registry (DESIGN §2.5).

Letters: b sample, c band, h w pixels, n places of the grid, k kept tokens, d width.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Context:
    """What is known of a batch besides its pixels; tensors of (B,) or (C,), each may be absent.

    wavelength_nm (C,); gsd_m in metres after cropping, lat and lon in degrees of the crop's centre, time in seconds since 1970
    (UTC), all (B,). drop (B,) is a draw, uniform in [0, 1): in training, where and when are withheld from samples below 0.5.
    """

    wavelength_nm: Tensor | None = None
    gsd_m: Tensor | None = None
    lat: Tensor | None = None
    lon: Tensor | None = None
    time: Tensor | None = None
    drop: Tensor | None = None


@dataclass
class ProductKeep:
    """Kept groups × kept positions of a grid: groups (B, g) and positions (B, n), int64, each ascending."""

    groups: Tensor
    positions: Tensor


Keep = Tensor | ProductKeep  # (B, K) int64 places, ascending in raster order of the grid; or a product


@dataclass
class Tokens:
    """x (B, K, D) embedded tokens; grid (dates, groups, rows, columns); keep their places, None when all N are there;
    box (N, 4) top, left, height, width in pixels of every place; present (B, K) bool, False for a token that is to be as if it
    were not there, None when all are."""

    x: Tensor
    grid: tuple[int, int, int, int]
    box: Tensor
    keep: Keep | None = None
    present: Tensor | None = None


@dataclass
class Features:
    """pooled (B, D); tokens (B, K, D) after the final norm; prefix (B, P, D) class and register tokens;
    maps {stride: (B, D, H, W)}, empty for a kept subset; taps {block number: (B, P + K, D)}, -1 what enters the first."""

    pooled: Tensor
    tokens: Tensor
    prefix: Tensor
    maps: dict[int, Tensor] = field(default_factory=dict)
    taps: dict[int, Tensor] = field(default_factory=dict)


class Recomputed(nn.Module):
    """A block that, with `recompute` set, trades its activations for a second forward pass; a subclass has `compute`."""

    recompute = False
    compute: Callable[..., Tensor]

    def forward(self, *args: Any) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, *args, use_reentrant=False)
        return self.compute(*args)


class Backbone(nn.Module):
    """Base of every backbone. `traits` says what it can do:

    sparse: any subset of tokens can be embedded and encoded; without it, what is masked is masked in pixels (`hide`), in units of
    `mask_unit` pixels. ordered: the order of tokens carries meaning. causal: one direction, by clusters of `config.cluster`²
    patches, in which no token sees a later one. product: a kept subset must be a ProductKeep. any_bands: images may have any
    number of bands.
    """

    traits: ClassVar[frozenset[str]] = frozenset()
    band_axes: ClassVar[Mapping[str, int]] = {}  # the parameters that have a slice for each channel of the image: its axis
    tiny: ClassVar[dict[str, Any]]  # options that make a small one of any of its names, `bands` and `image_size` among them
    config: Any
    width: int
    pooled_width: int
    depth: int
    mask_unit: int  # side in pixels of what can be masked: the patch, or the total stride
    fill: nn.Parameter  # (C,) what stands for a masked pixel of each band, where pixels are masked

    def grid(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(dates, groups, rows, columns) of tokens for an image size; ValueError when the patch does not divide it."""
        raise NotImplementedError

    @property
    def channels(self) -> tuple[tuple[int, ...], ...]:
        """The channels of the image behind each (date, group) of the grid, in its order."""
        return (tuple(range(self.config.bands)),)

    def tokenize(self, images_bchw: Tensor, ctx: Context | None = None, keep: Keep | None = None) -> Tokens:
        """Embed the image; with `keep`, only those places are ever projected."""
        raise NotImplementedError

    def encode(self, tokens: Tokens, keep: Keep | None = None, taps: Sequence[int] = ()) -> Features:
        """Encode tokens; `keep` picks among tokens that were all embedded."""
        raise NotImplementedError

    def with_bands(
        self, names: Sequence[str], chosen: Sequence[str], wavelength_nm: Sequence[float | None]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(options that change, parameters) of this backbone for images of the bands `chosen`, in that order.

        `names` are the bands of its images now, of one date; `wavelength_nm` those of the chosen ones, None where a band has
        none. A band left out counts as zero everywhere, which after normalisation is its mean; families with tokens for groups of
        bands, or with weights made from wavelengths, say what it means there. Raises ValueError for what cannot be.
        """
        channels = self.channels_of(names, chosen)
        state = {
            name: tensor.index_select(self.band_axes[name], torch.tensor(channels, device=tensor.device))
            if name in self.band_axes
            else tensor
            for name, tensor in self.state_dict().items()
        }
        return {"bands": len(channels)}, state

    def channels_of(self, names: Sequence[str], chosen: Sequence[str]) -> list[int]:
        """The channels of the image, date after date, that hold the bands `chosen`; ValueError for bands without weights."""
        if new := [name for name in chosen if name not in names]:
            raise ValueError(
                f"{type(self).__name__} has weights for {', '.join(names)} only, none for {', '.join(new)}; "
                "a backbone that makes weights from wavelengths (wave_vit, less) would take new bands"
            )
        dates = range(self.config.bands // len(names))
        return [date * len(names) + names.index(name) for date in dates for name in chosen]

    def hide(self, images_bchw: Tensor, hidden_bhw: Tensor) -> Tensor:
        """The images with the units where `hidden` (B, H / mask_unit, W / mask_unit) is True replaced by the learned `fill`."""
        pixels_b1hw = hidden_bhw.repeat_interleave(self.mask_unit, 1).repeat_interleave(self.mask_unit, 2)[:, None]
        return torch.where(pixels_b1hw, self.fill.to(images_bchw.dtype)[:, None, None], images_bchw)

    def forward(self, images_bchw: Tensor, ctx: Context | None = None) -> Features:
        return self.encode(self.tokenize(images_bchw, ctx))


@dataclass(frozen=True)
class Entry:
    """What a registered name stands for: the class, its configuration dataclass, and the options that the name fixes."""

    build: Any
    config: type
    preset: dict[str, Any]


class Registry:
    """Names to classes that register themselves; `kind` is what messages call them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def register(self, config: type, presets: dict[str, dict[str, Any]]) -> Callable[[type], type]:
        """Class decorator: each name of `presets` builds the class from `config(**preset, **options)`."""

        def add(build: type) -> type:
            self._entries.update({name: Entry(build, config, preset) for name, preset in presets.items()})
            return build

        return add

    def names(self) -> list[str]:
        return sorted(self._entries)

    def families(self) -> dict[Any, str]:
        """One name of every class."""
        return {entry.build: name for name, entry in sorted(self._entries.items(), reverse=True)}

    def entry(self, name: str) -> Entry:
        """The entry called `name`; ValueError with the nearest name if there is none."""
        if name not in self._entries:
            raise ValueError(f"no {self.kind} is called {name!r}{nearest(name, self.names())}")
        return self._entries[name]

    def configure(self, name: str, **options: Any) -> Any:
        """The configuration of `name` with `options`; ValueError for unknown ones, with the nearest that exists."""
        entry = self.entry(name)
        known = [f.name for f in fields(entry.config)]
        for option in options:
            if option not in known:
                raise ValueError(f"{name} has no option {option!r}{nearest(option, known)}; it has {', '.join(known)}")
        return entry.config(**{**entry.preset, **options})


def nearest(word: str, known: Sequence[str]) -> str:
    """' (did you mean …?)' for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


registry = Registry("backbone")
register = registry.register


def create(name: str, **options: Any) -> Backbone:
    """A registered backbone. Raises ValueError for unknown names and options, and for sizes that do not fit."""
    return registry.entry(name).build(registry.configure(name, **options))


def sincos(width: int, places: Tensor) -> Tensor:
    """(N, width) float64: sines then cosines of places (N,) at frequencies 10000^(-k / (width / 2)) (MAE's table)."""
    half = width // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=places.device) / half)
    angle = places.double()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_grid(width: int, rows: Tensor, columns: Tensor) -> Tensor:
    """(R·C, width) float64 in raster order: the first half of the channels holds the column, the second the row."""
    by_column = sincos(width // 2, columns)[None].expand(len(rows), -1, -1)
    by_row = sincos(width // 2, rows)[:, None].expand(-1, len(columns), -1)
    return torch.cat([by_column, by_row], dim=2).flatten(0, 1)


def places(keep: Keep, grid: tuple[int, int, int, int]) -> Tensor:
    """(B, K) int64 places in raster order of the grid (dates, groups, rows, columns), of a product as well."""
    if isinstance(keep, Tensor):
        return keep
    per_group = grid[2] * grid[3]
    return (keep.groups[:, :, None] * per_group + keep.positions[:, None]).flatten(1)


def gather(x_bnd: Tensor, index_bk: Tensor) -> Tensor:
    """(B, K, D): the rows `index_bk` of each sample."""
    return x_bnd.gather(1, index_bk[..., None].expand(-1, -1, x_bnd.shape[2]))


def mean_of(x_bkd: Tensor, present_bk: Tensor | None) -> Tensor:
    """(B, D) mean of the tokens that are present; zero where none is."""
    if present_bk is None:
        return x_bkd.mean(dim=1)
    total_bd = torch.where(present_bk[..., None], x_bkd, 0.0).sum(dim=1)
    return total_bd / present_bk.sum(dim=1, keepdim=True).clamp_min(1)


def whole_groups(groups: Sequence[Sequence[int]], channels: Sequence[int], names: Sequence[str]) -> list[int]:
    """The numbers of the `groups` of channels that are all among `channels`; ValueError where some of a group are not."""
    shares = [len(set(group) & set(channels)) / len(group) for group in groups]
    if any(0 < share < 1 for share in shares):
        shown = " | ".join(", ".join(names[channel % len(names)] for channel in group) for group in groups)
        raise ValueError(f"tokens are of groups of bands, so a group stays or goes as a whole; the groups are {shown}")
    return [number for number, share in enumerate(shares) if share]


def fitting(ours: dict[str, Tensor], build: Any, config: Any) -> dict[str, Tensor]:
    """`ours` itself; ValueError naming what is left over, missing or of another shape for `build(config)`."""
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in build(config).state_dict().items()}
    wrong = [f"no {name}" for name in wanted if name not in ours]
    wrong += [
        f"{name} is {tuple(tensor.shape)}, and would have to be {wanted[name]}"
        for name, tensor in ours.items()
        if name in wanted and tuple(tensor.shape) != wanted[name]
    ]
    if unknown := sorted(set(ours) - set(wanted)):
        wrong.append(f"these are no weights of this encoder: {', '.join(unknown)}")
    if wrong:
        raise ValueError(f"published weights do not fit {config}: {'; '.join(wrong)}")
    return ours
