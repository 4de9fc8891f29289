"""A backbone for other bands is the one that it was, told less; what it is told to overlook stands where everybody looks."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from swath.backbones.base import Context, Features, ProductKeep, create, places, registry
from swath.hub.adapt import Wish, adapt, adapted, command
from swath.hub.card import card
from swath.hub.load import Loaded, load_backbone
from swath.launch.cli import main
from swath.probes.features import extract, require_contract
from swath.shards.bands import Band, InputContract
from swath.shards.errors import InputError
from swath.shards.reader import ShardReader
from tests.hub.made import contract, loaded, save_run, write_shards

NAMES = registry.families()
SLICED = [name for build, name in NAMES.items() if name.split("_")[0] not in ("group", "spectral", "wave", "less", "temporal")]


def of(name: str, names: tuple[str, ...] | None = None, dates: int = 1, **options: object) -> Loaded:
    """A tiny untrained backbone of a family, on bands B00, B01, … with wavelengths."""
    tiny = {**registry.entry(name).build.tiny, **options}
    torch.manual_seed(0)
    backbone = create(name, **tiny).eval()
    for part in backbone.parameters():  # nothing stays at a zero that hides what was lost
        part.data += 0.02 * torch.randn_like(part)
    made = contract(*(names or (f"B{n:02d}" for n in range(tiny["bands"] // dates))), side=tiny["image_size"])
    bands = tuple(band.model_copy(update={"wavelength_nm": 450.0 + 100 * n}) for n, band in enumerate(made.bands))
    spread = made.normalisation.model_copy(update={"mean": tuple(0.1 + 0.01 * n for n in range(len(bands)))})
    made = made.model_copy(update={"bands": bands, "dates": dates, "normalisation": spread})
    return dataclasses.replace(
        loaded(), backbone=backbone, contracts={"optical": made}, size=(tiny["image_size"],) * 2, name=name,
        options=dataclasses.asdict(backbone.config),
    )  # fmt: skip


def images(source: Loaded) -> torch.Tensor:
    height, width = source.size
    channels = source.contract.channels
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def close(one: torch.Tensor, two: torch.Tensor) -> None:
    """To 1e-6 of the largest: sums of fp32 that leave out zeros are cut otherwise."""
    assert one.shape == two.shape
    assert (one - two).abs().max() <= 1e-6 * max(1.0, two.abs().max().item())


@torch.inference_mode()
def features(source: Loaded, x: torch.Tensor, ctx: Context | None = None) -> Features:
    return source.backbone(x, ctx)


@pytest.mark.parametrize("name", SLICED)
def test_bands_left_out_are_standardised_zeros(name: str) -> None:
    source = of(name)
    names = source.contract.names
    chosen = (names[-1], names[0])  # another order too
    small = adapted(source, Wish(chosen))
    assert small.contract.names == chosen and small.contract.normalisation.mean == tuple(
        source.contract.normalisation.mean[names.index(n)] for n in chosen
    )
    x = images(source)
    index = [names.index(n) for n in chosen]
    zeroed = torch.zeros_like(x)
    zeroed[:, index] = x[:, index]
    got, full = features(small, x[:, index]), features(source, zeroed)
    close(got.pooled, full.pooled)
    close(got.tokens, full.tokens)
    lost = source.backbone.tokenize(zeroed).x - source.backbone.tokenize(x).x
    assert lost.abs().max() > 1e-2  # the bands do matter, and at the first layer weigh most
    close(small.backbone.tokenize(x[:, index]).x, source.backbone.tokenize(zeroed).x)
    again = create(small.name, **json.loads(json.dumps(small.options)))  # as config.json keeps them
    again.load_state_dict(small.backbone.state_dict())
    if hasattr(small.backbone, "fill") and isinstance(small.backbone.fill, torch.nn.Parameter):
        assert torch.equal(small.backbone.fill, source.backbone.fill[index])


def test_frames_lose_the_same_bands() -> None:
    source = of("temporal_vit_base_patch16", dates=3)
    small = adapted(source, Wish(("B01",)))
    x = images(source)
    zeroed = x.clone()
    zeroed[:, ::2] = 0
    close(features(small, x[:, 1::2]).pooled, features(source, zeroed).pooled)
    flat = of("temporal_vit_base_patch16")
    close(features(adapted(flat, Wish(("B01", "B03", "B05"))), x[:, 1::2]).pooled, features(flat, zeroed).pooled)
    with pytest.raises(InputError, match="same bands of each, frame by frame"):
        adapted(flat, Wish(("B01", "B02", "B05")))


def kept(source: Loaded, x: torch.Tensor, groups: list[int]) -> torch.Tensor:
    """The pooled features of the tokens of some groups alone."""
    with torch.inference_mode():
        tokens = source.backbone.tokenize(x)
        count = tokens.grid[2] * tokens.grid[3]
        product = ProductKeep(torch.tensor([groups]).expand(len(x), -1), torch.arange(count).expand(len(x), -1))
        keep = product if "product" in source.backbone.traits else places(product, tokens.grid)
        return source.backbone.encode(tokens, keep).pooled


@pytest.mark.parametrize("attention", ["joint", "axial", "kronecker"])
def test_groups_go_as_a_whole(attention: str) -> None:
    names = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
    source = of("group_vit_base_patch8", names, attention=attention)
    chosen = ("B12", "B11", "B05", "B8A", "B07", "B06")
    small = adapted(source, Wish(chosen))
    x = images(source)
    close(features(small, x[:, [names.index(n) for n in chosen]]).pooled, kept(source, x, [1, 2]))
    twice = adapted(small, Wish(("B11", "B12")))
    close(features(twice, x[:, [8, 9]]).pooled, kept(source, x, [2]))
    with pytest.raises(InputError, match=r"the groups are B02, B03, B04, B08 \| B05, B06, B07, B8A \| B11, B12"):
        adapted(source, Wish(("B02", "B03", "B04")))


def test_cubes_go_as_a_whole_in_any_order() -> None:
    source = of("spectral_vit_base_patch8")
    small = adapted(source, Wish(("B06", "B07", "B08", "B00", "B01", "B02")))
    x = images(source)
    close(features(small, x[:, [6, 7, 8, 0, 1, 2]]).pooled, kept(source, x, [0, 2]))
    for chosen in (("B00", "B01"), ("B01", "B00", "B02"), ("B00", "B01", "B02", "B03")):
        with pytest.raises(InputError, match=r"B00, B01, B02 \| B03, B04, B05 \| B06, B07, B08"):
            adapted(source, Wish(chosen))


@pytest.mark.parametrize("radar", [0, 1])
def test_a_group_of_one_band_goes_alone(radar: int) -> None:
    source = of("less_base_patch16", radar=radar)
    x, nm = images(source), [band.wavelength_nm for band in source.contract.bands]
    source.backbone = create(source.name, **{**source.options, "wavelength_nm": nm})
    source.backbone.load_state_dict(loaded_state := of("less_base_patch16", radar=radar).backbone.state_dict())
    source.backbone.eval()
    small = adapted(source, Wish(("B00", "B02")))
    close(features(small, x[:, [0, 2]]).pooled, kept(source, x, [0, 2]))
    assert len(small.backbone.state_dict()) == len(loaded_state)
    if radar:
        with pytest.raises(InputError, match="radar bands come last: B02"):
            adapted(source, Wish(("B02", "B00")))
        assert "radar_patch_embed.mix.weight" not in adapted(source, Wish(("B00",))).backbone.state_dict()


def test_new_bands_get_weights_from_their_wavelengths() -> None:
    source = of("wave_vit_base_patch16")
    x = images(source)
    nm = [650.0, 1600.0]
    theirs = contract("B02", "B11").model_copy(
        update={"bands": (Band(name="B02", wavelength_nm=650.0), Band(name="B11", wavelength_nm=1600.0))}
    )
    small = adapted(source, Wish(data=theirs))
    close(features(small, x[:, :2]).pooled, features(source, x[:, :2], Context(wavelength_nm=torch.tensor(nm))).pooled)
    assert small.contract.normalisation.mean == pytest.approx((0.12, 0.2))  # of the weights, and of the data
    assert "new, with weights from their wavelengths: B11" in small.origin["adapted"][0]
    with pytest.raises(InputError, match=r"no band B11.*come from --data"):
        adapted(source, Wish(("B02", "B11")))
    bare = theirs.model_copy(update={"bands": (theirs.bands[0], Band(name="VV"))})
    with pytest.raises(InputError, match="VV has no wavelength"):
        adapted(source, Wish(data=bare))
    with pytest.raises(InputError, match=r"vit_tiny_patch8 cannot be adapted.*weights for B02, B03, B04, B08 only, none for B11"):
        adapted(loaded(), Wish(data=theirs))


def test_an_adapted_folder_reads_and_says_what_was_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    run = save_run(loaded(), tmp_path / "run")
    words = ["--bands", "B8,B02", "--map", "B8=B08", "--accept", "level,normalisation"]
    assert main(["adapt", str(run), *words, "--to", str(tmp_path / "small")]) == 0
    assert "map: band B8 of the data is B08 of the weights" in capsys.readouterr().out
    small = load_backbone(tmp_path / "small")
    assert small.contract.names == ("B8", "B02") and small.contract.accepts == ("level", "normalisation")
    x = torch.randn(2, 4, 16, 16)
    zeroed = torch.stack([x[:, 0], 0 * x[:, 0], 0 * x[:, 0], x[:, 3]], dim=1)
    close(features(small, x[:, [3, 0]]).pooled, features(loaded(), zeroed).pooled)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    lines = config["origin"]["adapted"]
    assert config["input_contract"]["accepts"] == ["level", "normalisation"] and len(lines) == 4
    text = (tmp_path / "small" / "README.md").read_text()
    assert "## Adapted" in text and all(line in text for line in lines) and str(tmp_path) not in text
    assert "## Adapted" not in card(loaded(), loaded().origin)
    monkeypatch.setattr("swath.hub.export._verify", lambda *_: None)  # once is enough
    assert main(["adapt", str(tmp_path / "small"), "--bands", "B02", "--to", str(tmp_path / "smaller")]) == 0
    assert len(load_backbone(tmp_path / "smaller").origin["adapted"]) == 5


def shards(folder: Path, bands: InputContract) -> ShardReader:
    pixels = np.random.default_rng(0).integers(1000, 3000, (6, len(bands.bands), 16, 16)).astype(np.uint16)
    return ShardReader(write_shards(folder, pixels, [0, 1] * 3, bands=bands))


def test_a_refusal_names_the_command_that_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, it is run, and then the data are taken."""
    pytest.importorskip("transformers")
    monkeypatch.setattr("swath.hub.export._verify", lambda *_: None)
    run = save_run(loaded(), tmp_path / "run")
    theirs = contract("B02", "b4").model_copy(
        update={"level": "L1C", "bands": (Band(name="B02", wavelength_nm=492.4), Band(name="b4", wavelength_nm=664.6))}
    )
    reader = shards(tmp_path / "shards", theirs)
    with pytest.raises(InputError) as caught:
        require_contract(load_backbone(run), reader)
    told = str(caught.value).rpartition("what would do: ")[2]
    assert told == f"swath adapt {run} --bands B02,b4 --map b4=B04 --accept level,wavelength --to DIR"
    assert main([*told.replace("DIR", str(tmp_path / "adapted")).split()[1:]]) == 0
    assert extract(load_backbone(tmp_path / "adapted"), reader, progress=False).x.shape == (6, 24)


def test_another_unit_and_sensor_take_the_statistics_of_the_data(tmp_path: Path) -> None:
    bands = tuple(Band(name=name, common_name=name) for name in ("red", "green", "blue"))
    theirs = contract("red", "green", "blue").model_copy(
        update={"modality": "rgb", "sensor": "unknown", "unit": "digital number", "bands": bands, "nodata": None}
    )
    theirs = theirs.model_copy(update={"normalisation": theirs.normalisation.model_copy(update={"mean": (90.0,) * 3})})
    source = loaded()
    common = zip(source.contract.bands, ("blue", "green", "red", "nir"), strict=True)
    named = tuple(band.model_copy(update={"common_name": name}) for band, name in common)
    source.contracts = {"optical": source.contract.model_copy(update={"bands": named})}
    reader = shards(tmp_path / "rgb", theirs)
    told = command(source, theirs, "rgb shards")
    assert told == (
        "swath adapt BACKBONE --bands red,green,blue --map red=B04,green=B03,blue=B02 "
        "--accept sensor,unit,wavelength,normalisation --data 'rgb shards' --to DIR"
    )
    wish = Wish(
        ("red", "green", "blue"), {"red": "B04", "green": "B03", "blue": "B02"},
        ("sensor", "unit", "wavelength", "normalisation"), theirs,
    )  # fmt: skip
    small = adapted(source, wish)
    assert small.contract.normalisation.mean == (90.0,) * 3 and small.contract.nodata is None
    assert require_contract(small, reader).modality == "rgb"
    assert extract(small, reader, progress=False).x.shape == (6, 24)
    assert any(line.startswith("nodata: none, as the data have it, instead of 0") for line in small.origin["adapted"])


def test_what_cannot_be_helped_says_why() -> None:
    theirs = contract("B02", "B99")
    told = command(loaded(), theirs)
    assert told.startswith("make shards with these bands") and "none for B99" in told
    series = contract().model_copy(update={"dates": 3})
    assert "--dates-per-sample" in command(loaded(), series)
    far = contract("B05").model_copy(update={"bands": (Band(name="B2", wavelength_nm=1600.0),)})
    assert "none for B2" in command(loaded(), far)  # written like B02, but another band


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (Wish(), "nothing to adapt"),
        (Wish(("B02", "B02")), "--bands B02,B02: band names repeat: B02, B02$"),
        (Wish(("B2",)), r"no band B2 \(did you mean B02\?\)"),
        (Wish(rename={"x": "B99"}), "write theirs=ours"),
        (Wish(rename={"B03": "B02"}), "two bands B03; map the other"),
        (Wish(rename={"x": "B02", "y": "B02"}), "one band two names"),
    ],
)  # fmt: skip
def test_bad_wishes_are_refused_in_one_line(wish: Wish, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        adapted(loaded(), wish)
    assert "\n" not in str(caught.value)


def test_an_unknown_relaxation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--accept levl \(did you mean level\?\)"):
        adapt(tmp_path, tmp_path / "x", accept=["levl"])
    assert not (tmp_path / "x").exists()


def test_data_contracts_are_written_as_before() -> None:
    assert "accepts" not in contract().model_dump() and "accepts" not in contract().model_dump_json()
