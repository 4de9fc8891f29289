"""The same backbone in other people's benchmarks: torchgeo-bench, TerraTorch, and by timm's registry TorchGeo and whatever else
asks timm for its models. Each package is imported where it is asked for.

Images come as those packages hand them over; `scale` and `add` bring them to the contract's unit (value · scale + add), and the
contract decides the rest as it does in a probe: nodata, normalisation, wavelengths. Place and time are not told.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swath.backbones.base import Context, create
from swath.hub.load import load_backbone
from swath.probes.heads import resize
from swath.probes.maps import encode_levels
from swath.shards.bands import Band, InputContract
from swath.shards.errors import InputError
from swath.shards.prepare import prepare
from swath.shards.reader import Chips, Stored
from swath.shards.sensors import SENSORS, band

Numbers = float | Sequence[float] | Tensor
STRIDES = (4, 8, 16, 32)  # of the maps that timm's models of this kind have
# what torchgeo-bench and TerraTorch call bands: our common names
_COMMON = {
    "coastal_aerosol": "coastal", "red_edge_1": "rededge071", "red_edge_2": "rededge075", "red_edge_3": "rededge078",
    "red_edge_4": "nir08", "nir_broad": "nir", "nir_narrow": "nir08", "water_vapour": "nir09", "water_vapor": "nir09",
    "swir_cirrus": "cirrus", "swir_1": "swir16", "swir_2": "swir22", "r": "red", "g": "green", "b": "blue",
}  # fmt: skip


class Plain(nn.Module):
    """An image in, a vector out, trainable, in eval mode until `train()`.

    `backbone` is a run, a checkpoint, an export or a Hub id; without `pretrained` its weights are drawn anew. `scale` and `add`
    are numbers, or one for each channel of a date: after a data module that standardises, its std and mean times the factor to
    the contract's unit. `bands`, names or common names in the order of the images' channels, may be more than the contract's and
    in another order; the contract's are picked. `size`, a side in pixels, is what images are resized to, by default nothing.
    `gsd_m` says how large their pixels are, by default as in the contract. `num_features` is the width of the vector.

    Raises InputError for bands that the images lack, and for a scale or a size that cannot be.
    """

    channels: Tensor

    def __init__(
        self,
        backbone: Path | str,
        bands: Sequence[str] | None = None,
        *,
        scale: Numbers,
        add: Numbers = 0.0,
        size: int | None = None,
        gsd_m: float | None = None,
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        loaded = load_backbone(backbone)
        contract = loaded.contract
        given = list(contract.names if bands is None else bands)
        chosen = _places(contract, given, loaded.name)
        scales, adds = _each(scale, given, "scale"), _each(add, given, "add")
        if not all(value > 0 for value in scales):
            raise InputError(f"scale must be above 0, not {scale}")
        self.backbone = loaded.backbone if pretrained else create(loaded.name, **loaded.options).eval()
        self.contract = _of_images(contract, [scales[place] for place in chosen], [adds[place] for place in chosen])
        self.size, self.gsd_m = size, gsd_m or contract.gsd_m or float("nan")
        self.image_size = (size, size) if size else loaded.size
        self.num_channels, self.num_features = contract.dates * len(given), loaded.backbone.pooled_width
        if size is not None:
            try:
                self.backbone.grid(size, size)
            except ValueError as error:
                raise InputError(f"size={size}: {error}") from None
        dates = range(contract.dates)
        self.register_buffer("channels", torch.tensor([d * len(given) + p for d in dates for p in chosen]), persistent=False)

    def prepared(self, images_bchw: Tensor) -> tuple[Tensor, Context]:
        """(B, C, H, W) as in training, 0 where there are no data, and what the backbone is told besides."""
        if images_bchw.shape[1] != self.num_channels:
            raise InputError(f"images have {images_bchw.shape[1]} channels; {self.num_channels} were announced")
        pixels, name = images_bchw[:, self.channels], self.contract.modality
        count, device = len(pixels), pixels.device
        one = torch.ones(count, dtype=torch.float64, device=device)
        number, unknown = torch.zeros(count, dtype=torch.int64, device=device), one * float("nan")
        stored = Stored(pixels, None, one.new_tensor(pixels.shape[2:]).expand(count, 2), one, one * 0)
        meta = {"gsd_m": one * self.gsd_m, "lat": unknown, "lon": unknown}
        size = (self.size, self.size) if self.size else (pixels.shape[2], pixels.shape[3])
        batch = prepare(Chips({name: stored}, number, number, number, meta), {name: self.contract}, size)
        dtype = next(self.backbone.parameters()).dtype
        return batch.images[name].to(dtype), Context(batch.wavelength_nm[name], batch.meta["gsd_m"])

    def forward(self, images_bchw: Tensor) -> Tensor:
        """(B, num_features)."""
        return self.backbone(*self.prepared(images_bchw)).pooled


class Maps(Plain):
    """TerraTorch's form: a list of maps (B, D, H, W), the finest first, and their widths as `out_channels`.

    They are a pyramid's own; of a backbone of one scale there are four, what passes after each quarter of its blocks, for necks
    to set apart. TerraTorch pads images to even multiples of `patch_size`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        with torch.no_grad():
            _, found = self.encoded(torch.zeros(1, self.num_channels, *self.image_size))
        if not found:
            raise InputError("this backbone has no maps for a decoder")
        self.out_channels = [one.shape[1] for one in found]
        same = len({one.shape[2:] for one in found}) == 1
        self.patch_size = None if self.size else self.backbone.mask_unit // (1 if same else 2)

    def forward(self, images_bchw: Tensor, **rest: Any) -> list[Tensor]:  # type: ignore[override]
        """Of images, or of series (B, C, T, H, W); what else is in a batch (`rest`) is not told."""
        if images_bchw.dim() == 5:
            images_bchw = images_bchw.transpose(1, 2).flatten(1, 2)
        return self.encoded(images_bchw)[1]

    def encoded(self, images_bchw: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pooled features (B, D), and the maps."""
        return encode_levels(self.backbone, *self.prepared(images_bchw), several=True)


class Strided(Maps):
    """timm's form with `features_only`: maps at strides 4, 8, 16 and 32, those of `out_indices`, and `feature_info`."""

    def __init__(self, *args: Any, out_indices: Sequence[int] | None = None, **options: Any) -> None:
        from timm.models import FeatureInfo  # type: ignore[import-not-found]

        super().__init__(*args, **options)
        if len(self.out_channels) != len(STRIDES):
            raise InputError(f"this backbone has {len(self.out_channels)} maps; {len(STRIDES)} are needed")
        chosen = range(len(STRIDES)) if out_indices is None else out_indices
        levels = zip(self.out_channels, STRIDES, strict=True)
        info = [{"num_chs": width, "reduction": stride, "module": f"stage{stride}"} for width, stride in levels]
        self.feature_info = FeatureInfo(info, tuple(range(len(STRIDES))[index] for index in chosen))

    def forward(self, images_bchw: Tensor, **rest: Any) -> list[Tensor]:  # type: ignore[override]
        found, (rows, columns) = super().forward(images_bchw), images_bchw.shape[-2:]
        chosen = [(found[index], STRIDES[index]) for index in self.feature_info.out_indices]
        return [resize(level, (-(-rows // stride), -(-columns // stride))) for level, stride in chosen]


class Classifier(Plain):
    """timm's form: `num_classes` scores from the features, or with 0 the features."""

    def __init__(self, *args: Any, num_classes: int = 0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, images_bchw: Tensor) -> Tensor:
        """(B, num_classes)."""
        return self.head(super().forward(images_bchw))


def register_timm(name: str, backbone: Path | str, bands: Sequence[str] | None = None, **own: Any) -> None:
    """Make the backbone known to timm as `name`: `timm.create_model(name, pretrained=True, num_classes=10)`, also with
    `features_only=True`. So TorchGeo takes it: Classification(model=name, weights=True, …), and for maps
    SemanticSegmentation(model="upernet", backbone=f"tu-{name}", weights=True, …). `own` are options of `Plain`.

    ImportError where timm is not installed (pip install timm).
    """
    from timm.models import register_model  # type: ignore[import-not-found]

    if not name.isidentifier():
        raise InputError(f"{name!r} cannot be the name of a model of timm: letters, digits and _ can")

    def entry(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        in_chans: int | None = None,
        num_classes: int = 0,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ) -> nn.Module:
        options = {**own, "pretrained": pretrained}
        with torch.device("cpu"):  # segmentation_models_pytorch builds a first one on the meta device, where nothing can be read
            if features_only:
                made: Plain = Strided(backbone, bands, out_indices=out_indices, **options)
            else:
                made = Classifier(backbone, bands, num_classes=num_classes, **options)
        if in_chans not in (None, made.num_channels):
            raise InputError(f"{name} takes {made.num_channels} channels, not {in_chans}; say which bands the images have")
        return made.train()

    entry.__name__ = name
    register_model(entry)


def register_terratorch() -> None:
    """Make `swath_backbone` known to TerraTorch: `backbone: swath_backbone`, `backbone_path: FOLDER` and, each with
    `backbone_` before it, the options of `Plain`. ImportError where TerraTorch is not installed (pip install terratorch)."""
    from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY  # type: ignore[import-not-found]

    def swath_backbone(path: str, **options: Any) -> nn.Module:
        return Maps(path, **options).train()

    TERRATORCH_BACKBONE_REGISTRY.register(swath_backbone)


def torchgeo_bench(bands: Sequence[Any], backbone: Path | str, **options: Any) -> nn.Module:
    """A `BenchModel` of torchgeo-bench: `_target_: swath.probes.adapters.torchgeo_bench` in its model's YAML, and beside it
    `backbone:` and options of `Plain`; what else stands there is the benchmark's. Its segmentation reads the maps as
    `levels.0`, the finest, to `levels.3`. ImportError where it is not installed (pip install torchgeo-bench, Python 3.12)."""
    from torchgeo_bench.models.interface import BenchModel  # type: ignore[import-not-found]

    theirs = {name: options.pop(name) for name in ("normalization", "name", "eval") if name in options}
    names = [one.name for one in bands]

    class SwathBench(BenchModel):
        def __init__(self) -> None:
            super().__init__(bands=list(bands), **theirs | {"normalization": "identity"})  # the contract's, in Maps
            self.maps = Maps(backbone, names, **options)
            self.levels = nn.ModuleList(nn.Identity() for _ in self.maps.out_channels)  # where its probe hooks in

        def _forward_patch_features(self, images: Tensor) -> Tensor:
            pooled, found = self.maps.encoded(images)
            for level, one in zip(self.levels, found, strict=True):
                level(one)
            return pooled

    return SwathBench().requires_grad_(False)


def _places(contract: InputContract, given: Sequence[str], name: str) -> list[int]:
    """Where among the channels `given` each band of the contract is."""
    sensor = SENSORS.get(contract.sensor)
    only = sensor is not None and all(one.common_name != "nir" for one in sensor.bands.values())

    def called(label: str) -> set[str]:
        plain = _COMMON.get(label.lower(), label.lower())
        plain = "nir08" if plain == "nir" and only else plain  # Landsat's near infrared is a narrow one
        return {label.lower(), plain, band(plain, sensor).name.lower()}

    def of(wanted: Band) -> list[int]:
        known = called(wanted.name) | ({wanted.common_name.lower()} if wanted.common_name else set())
        return [place for place, label in enumerate(given) if known & called(label)]

    found = {wanted.name: of(wanted) for wanted in contract.bands}
    if lacking := [wanted for wanted, places in found.items() if len(places) != 1]:
        raise InputError(
            f"backbone {name} takes {', '.join(contract.names)}; of {', '.join(given)} none, or several, is {', '.join(lacking)}"
        )
    return [places[0] for places in found.values()]


def _each(value: Numbers, given: Sequence[str], what: str) -> list[float]:
    """One number for each channel of a date."""
    numbers = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
    if len(numbers) not in (1, len(given)):
        raise InputError(f"{what} has {len(numbers)} numbers; the images have the {len(given)} bands {', '.join(given)}")
    return numbers if len(numbers) == len(given) else numbers * len(given)


def _of_images(contract: InputContract, scale: Sequence[float], add: Sequence[float]) -> InputContract:
    """The contract of numbers x for which x · scale + add are those of `contract`."""
    statistics = contract.normalisation
    changed: Mapping[str, Any] = {
        "mean": tuple((mean - a) / s for mean, s, a in zip(statistics.mean, scale, add, strict=True)),
        "std": tuple((std or 1.0) / s for std, s in zip(statistics.std, scale, strict=True)),  # as `prepare` takes 0 for 1
    }
    return contract.model_copy(update={"normalisation": statistics.model_copy(update=dict(changed))})
