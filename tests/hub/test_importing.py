"""Published checkpoints become folders of ours: fixtures keep their numbers, every key counts, and no file is executed."""

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from swath.hub import importing
from swath.hub.contracts import PUBLISHED, read_contracts
from swath.hub.importing import import_published
from swath.hub.kinds import KINDS, kind_of
from swath.hub.load import load_backbone
from swath.launch.cli import main
from swath.shards.bands import InputContract, Normalisation
from swath.shards.draw import Draw
from swath.shards.errors import InputError
from swath.shards.prepare import prepare
from swath.shards.reader import Chips, ShardReader, Stored
from tests.parity import kinds, kinds_hyper, kinds_mamba, kinds_satmae, kinds_selective, kinds_spectralgpt
from tests.parity.fixtures import ROOT, Fixture, folders, read
from tests.parity.kinds import KINDS as RUN
from tests.shard_folders import make_shards

# Of each kind of fixture that is a whole model, what `swath import` calls its code.
IMPORTED = {
    "mae": "mae", "selectivemae": "selectivemae", "satmae_groupc": "satmae", "satmae_temporal": "satmae",
    "satmae_pp_groupc": "satmae_pp", "satmae_pp_rgb": "satmae_pp", "spectralgpt": "spectralgpt", "roma_pretrain": "roma",
    "roma_finetune_model": "roma", "rsmamba": "rsmamba", "less_mae": "less",
}  # fmt: skip
FIXTURES = [folder for folder in folders() if json.loads((folder / "meta.json").read_text())["kind"] in IMPORTED]
whole = pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
needs_fixtures = pytest.mark.skipif(not FIXTURES, reason=f"no golden fixtures under {ROOT}; set SWATH_GOLDEN")


def written(fixture: Fixture, path: Path, state: dict[str, Tensor] | None = None, **told: Any) -> Path:
    """The fixture's weights in a file as training scripts leave it, with their arguments."""
    held = {
        "model": state or fixture.part("state"),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "epoch": 3,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(**fixture.config, output_dir="/somewhere/else", lr=np.float64(1e-3), **told),
    }
    torch.save(held, path)
    return path


def asked(fixture: Fixture) -> dict[str, Any]:
    """What cannot be told from a file: which bands the weights of LESS, which take any, are to see."""
    if fixture.kind != "less_mae":
        return {}
    optical, radar = (fixture.tensors[f"in.{name}"].shape[1] for name in ("optical", "radar"))
    assert radar == 2
    return {"bands": [*PUBLISHED["optical"][0][0].names[:optical], "VV", "VH"]}


def imported(folder: Path, to: Path) -> tuple[Fixture, Any]:
    fixture = read(folder)
    to.mkdir()
    made = import_published(IMPORTED[fixture.kind], written(fixture, to / "file.pth"), to / "folder", **asked(fixture))
    return fixture, made


@whole
def test_fixtures_keep_their_numbers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixture's own run, with the weights and options that lie in the imported folder."""
    fixture, _ = imported(folder, tmp_path / "import")
    place = tmp_path / "import" / "folder"
    config = json.loads((place / "config.json").read_text())
    again = load_backbone(place)
    tensors = {f"backbone.{name}": tensor for name, tensor in again.backbone.state_dict().items()}
    if config["objective"] is not None:
        tensors |= load_file(place / "objective.safetensors")

    def fill(objective: Any, *more: Any) -> None:
        own = objective.state_dict()
        named = {}
        for name, tensor in tensors.items():  # the fixture's run calls the modality something of its own
            part, _, rest = name.partition(f".{next(iter(again.contracts))}.")
            named[next(n for n in (name, f"{part}.rgb.{rest}", f"{part}.image.{rest}") if n in own)] = tensor
        objective.load_state_dict(named, strict=True)
        for mine, theirs in ((objective.config, config["objective"]["options"]), (objective.backbone.config, again.options)):
            for key, value in theirs.items():
                # wavelengths come with the batch; stages are shares of a run's length, which a checkpoint has not; and an encoder
                # without blocks has no MLP
                if key not in ("wavelength_nm", "stages") and not (key == "mlp_ratio" and not getattr(mine, "depth", 1)):
                    assert json.loads(json.dumps(getattr(mine, key))) == value, key

    for module in (kinds, kinds_selective, kinds_spectralgpt, kinds_hyper, kinds_satmae.satmae, kinds_satmae.satmae_pp):
        monkeypatch.setattr(module, "load_published", fill)
    monkeypatch.setattr("swath.pretrain.objectives.roma.load_published", fill)
    for name in ("from_published", "rsmamba_from_published"):
        monkeypatch.setattr(kinds_mamba, name, lambda state, config: again.backbone.state_dict())
    fixture.check(RUN[fixture.kind](fixture))


@whole
def test_every_key_counts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One key is missing, another is not known, a third of another shape: named as in the file, and nothing is written."""
    fixture = read(folder)
    state, to = fixture.part("state"), tmp_path / "to"

    def refused(changed: dict[str, Tensor]) -> str:
        monkeypatch.setattr(importing, "read_published", lambda *_: (changed, fixture.config))
        with pytest.raises(InputError) as caught:
            import_published(IMPORTED[fixture.kind], tmp_path / "file.pth", to, **asked(fixture))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    free = ("head.", "decoder_embed1", "pos_embed_probs", "get_token_probs", "hog.")  # neither the encoder's nor the decoder's
    names = [name for name in state if not name.startswith(free)]
    for name in names[:: max(1, len(names) // 12)]:
        said = refused({key: tensor for key, tensor in state.items() if key != name})
        # a single block has no number there, and ours counts
        assert name.replace("up_block.", "up_block1.") in said or name in said, f"{name}: {said}"
    assert "surprise.weight" in refused(state | {"surprise.weight": torch.zeros(2)})
    norm = next(name for name in reversed(names) if "norm" in name)
    assert refused(state | {norm: torch.zeros(7)})
    assert not list(tmp_path.iterdir())


@needs_fixtures
@pytest.mark.slow
@whole
def test_imports_export_again(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from swath.hub.export import export

    _, made = imported(folder, tmp_path / "import")
    place = export(tmp_path / "import" / "folder", tmp_path / "export")  # compares features, bit for bit, in a clean process
    again = load_backbone(place)
    assert (again.name, again.options, again.contracts) == (made.loaded.name, made.loaded.options, made.loaded.contracts)
    ours = made.loaded.backbone.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in again.backbone.state_dict().items())
    assert not any(word in (place / "config.json").read_text() for word in ("/somewhere", str(tmp_path)))
    assert "imported from published" in (place / "README.md").read_text()


# --- reading ---


class Touch:
    """Would make a file, were it unpickled as pickles ask."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def small(**changed: Any) -> dict[str, Tensor]:
    """A MAE of one block and width 192, whose heads are known by that: encoder and decoder."""
    torch.manual_seed(0)
    from swath.backbones.base import create, sincos_grid
    from swath.pretrain import objective

    options = {"decoder_width": 256, "decoder_depth": 1, "decoder_heads": 8}
    backbone = create("vit_tiny_patch8", bands=3, image_size=32, depth=1)
    made = objective.build("mae", backbone, (32, 32), {"rgb": 3}, **options)
    state: dict[str, Tensor] = {}
    for name, tensor in made.state_dict().items():
        published = name.removeprefix("backbone.").replace("heads.rgb.linear.0.", "decoder_pred.")
        if published.startswith("decoder."):
            inner = published.removeprefix("decoder.")
            published = inner if inner == "mask_token" else f"decoder_{inner}"
        state[published] = tensor.clone()
    place = torch.arange(4)
    for name, width in (("pos_embed", 192), ("decoder_pos_embed", 256)):
        state[name] = torch.cat([torch.zeros(1, width), sincos_grid(width, place, place).float()])[None]
    return state | changed


def test_what_would_be_executed_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted, path = tmp_path / "planted", tmp_path / "evil.pth"
    told = argparse.Namespace(lr=Touch(planted))
    for held in ({"model": small(), "args": told}, {"model": small(), "args": Touch(planted)}, {"model": Touch(planted)}):
        torch.save(held, path)
        assert main(["import", "mae", str(path), "--to", str(tmp_path / "to")]) == 2
        torch.save(held, path, _use_new_zipfile_serialization=False)
        assert main(["import", "mae", str(path), "--to", str(tmp_path / "to")]) == 2
    path.write_bytes(pickle.dumps(Touch(planted)))
    assert main(["import", "mae", str(path), "--to", str(tmp_path / "to")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 7 and all("cannot be read as weights only: " in line for line in said)
    assert all("it asks for posix.mkdir, which was not called" in line for line in said[:6]), said
    assert not planted.exists() and not (tmp_path / "to").exists()
    pickle.loads(path.read_bytes())
    assert planted.exists(), "the pickle would have done it"


@pytest.mark.parametrize("kind", [".pth", ".safetensors"])
def test_a_truncated_file_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"file{kind}"
    save_file(small(), path) if kind == ".safetensors" else torch.save({"model": small()}, path)
    whole_file = path.read_bytes()
    for length in (0, 9, len(whole_file) // 3, len(whole_file) - 30):
        path.write_bytes(whole_file[:length])
        assert main(["import", "mae", str(path), "--to", str(tmp_path / "to")]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and str(path) in said and "cannot be read" in said
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_sizes_are_not_believed(tmp_path: Path) -> None:
    """A tensor of few bytes that claims to be large, by a stride of 0, is refused before anything of that size is made."""
    wide = torch.zeros(1).expand(10**12)
    torch.save({"model": small(norm=wide)}, tmp_path / "file.pth")
    with pytest.raises(InputError, match="norm is no plain tensor, or claims more numbers than the file holds"):
        import_published("mae", tmp_path / "file.pth", tmp_path / "to")
    with pytest.raises(InputError, match="is not a file"):
        import_published("mae", tmp_path / "none.pth", tmp_path / "to")


class As:
    """In a pickle, a call of `make` with arguments."""

    def __init__(self, make: Any, *given: Any) -> None:
        self.make, self.given = make, given

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.make, self.given


def test_numbers_of_numpy_are_read_without_its_types(tmp_path: Path) -> None:
    """Plain ones are what they were; a type of any size, or a state for a type that all share, does nothing."""
    scalar = np.float64(0).__reduce__()[0]
    path = tmp_path / "file.pth"
    given = argparse.Namespace(mask_ratio=np.float64(0.5), norm_pix_loss=np.bool_(True))
    torch.save({"model": small(), "args": given}, path)
    made = import_published("mae", path, tmp_path / "plain")
    assert made.task is not None and (made.task["mask_ratio"], made.task["normalise_patches"]) == (0.5, True)
    for number, odd in enumerate((As(np.dtype, "V2000000000"), As(np.dtype, [("a", "f8"), ("b", "O")]), np.dtype("O"))):
        torch.save({"model": small(), "args": argparse.Namespace(lr=As(scalar, odd, b"x" * 8))}, path)
        with pytest.raises(InputError, match="cannot be read as weights only"):
            import_published("mae", path, tmp_path / f"odd{number}")
    torch.save({"model": small(), "args": argparse.Namespace(lr=np.dtype(">f8"))}, path)
    import_published("mae", path, tmp_path / "swapped")
    assert np.dtype("f8").byteorder in "=<"


@pytest.mark.parametrize(
    "told", [{"mask_ratio": "high"}, {"mask_ratio": float("nan")}, {"mask_ratio": [0.5]}, {"decoder_num_heads": "many"}]
)
def test_odd_arguments_are_refused_in_one_line(told: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": small(), "args": argparse.Namespace(**told)}, tmp_path / "file.pth")
    code = main(["import", "mae", str(tmp_path / "file.pth"), "--to", str(tmp_path / "to")])
    said = capsys.readouterr().err
    assert (code, said.count("\n"), (tmp_path / "to").exists()) == (2, 1, False), said


@pytest.mark.parametrize("changed", [torch.complex64, torch.int64, None], ids=str)
def test_weights_are_finite_floats(changed: torch.dtype | None, tmp_path: Path) -> None:
    norm = torch.full((192,), torch.nan) if changed is None else torch.ones(192, dtype=changed)
    torch.save({"model": small(**{"norm.weight": norm})}, tmp_path / "file.pth")
    with pytest.raises(InputError, match=r"norm.weight (is of torch|holds numbers that are not finite)"):
        import_published("mae", tmp_path / "file.pth", tmp_path / "to")


def test_a_model_larger_than_its_file_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide patch embedding, and many blocks that have one small tensor each, would be a terabyte."""
    wide = {"patch_embed.proj.weight": torch.zeros(8192, 3, 1, 1), "patch_embed.proj.bias": torch.zeros(8192)}
    wide |= {"cls_token": torch.zeros(1, 1, 8192), "pos_embed": torch.ones(1, 2, 8192)}
    wide |= {f"blocks.{n}.norm1.weight": torch.zeros(8192) for n in range(300)}
    torch.save({"model": wide, "args": argparse.Namespace(num_heads=64)}, tmp_path / "file.pth")
    made = torch.empty

    def little(*size: Any, **more: Any) -> Tensor:
        tensor = made(*size, **more)
        assert tensor.is_meta or tensor.nbytes < 1 << 24
        return tensor

    monkeypatch.setattr(torch, "empty", little)
    with pytest.raises(InputError, match=r"norm1.bias is missing"):
        import_published("mae", tmp_path / "file.pth", tmp_path / "to")
    torch.save({"model": small()}, tmp_path / "file.pth")
    for option in ("objective.decoder_depth=100000000", "image_size=1000000000", "depth=x"):
        assert main(["import", "mae", str(tmp_path / "file.pth"), "--to", str(tmp_path / "to"), "--option", option]) == 2


# --- what the tensors cannot tell ---


def test_heads_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {name: tensor for name, tensor in small().items() if not name.startswith(("decoder_", "mask_token"))}
    state = {n: t[..., :48] if n in ("cls_token", "pos_embed") or n.startswith("norm.") else t for n, t in state.items()}
    state |= {"patch_embed.proj.weight": torch.zeros(48, 3, 8, 8), "patch_embed.proj.bias": torch.zeros(48)}
    from swath.backbones.base import sincos_grid

    state["pos_embed"] = torch.cat([torch.zeros(1, 48), sincos_grid(48, torch.arange(4), torch.arange(4)).float()])[None]
    state = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")}
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "file.safetensors")
    command = ["import", "mae", str(tmp_path / "file.safetensors"), "--to", str(tmp_path / "to")]
    assert main(command) == 2
    assert "how many heads the encoder of width 48 has cannot be told: --option heads=N" in capsys.readouterr().err
    assert main([*command, "--option", "head=4"]) == 2
    assert main([*command, "--heads", "5"]) == 2
    assert main([*command, "--heads", "4"]) == 0
    assert load_backbone(tmp_path / "to").options["heads"] == 4
    assert main([*command, "--heads", "4"]) == 2
    assert "holds an export already; choose another folder" in capsys.readouterr().err


def test_an_encoder_alone(tmp_path: Path) -> None:
    """Bare, under the prefix of what was around it, and with positions that fine-tuning moved."""
    state = {name: tensor for name, tensor in small().items() if not name.startswith(("decoder_", "mask_token"))}
    for name, prefix in (("bare", ""), ("ddp", "module."), ("inside", "encoder.")):
        torch.save({prefix + key: tensor for key, tensor in state.items()}, tmp_path / f"{name}.pth")
        made = import_published("MAE", tmp_path / f"{name}.pth", tmp_path / name)
        assert made.objective is None and not (tmp_path / name / "objective.safetensors").exists()
        assert torch.equal(load_backbone(tmp_path / name).backbone.state_dict()["norm.weight"], state["norm.weight"])
    torch.save({"model": state | {"head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)}}, tmp_path / "head.pth")
    assert import_published("mae", tmp_path / "head.pth", tmp_path / "head").left_out == ["head.weight", "head.bias"]
    moved = state | {"pos_embed": state["pos_embed"] + 0.1 * torch.randn_like(state["pos_embed"])}
    torch.save({"model": moved}, tmp_path / "moved.pth")
    backbone: Any = import_published("mae", tmp_path / "moved.pth", tmp_path / "moved").loaded.backbone
    images = torch.randn(2, 3, 32, 32)
    patches = torch.nn.functional.conv2d(images, moved["patch_embed.proj.weight"], moved["patch_embed.proj.bias"], stride=8)
    x = torch.cat([moved["cls_token"].expand(2, -1, -1), patches.flatten(2).transpose(1, 2)], dim=1) + moved["pos_embed"]
    with torch.no_grad():
        expected = backbone.norm(backbone.blocks[0](x))
        found = backbone(images)
    torch.testing.assert_close(torch.cat([found.prefix, found.tokens], dim=1), expected)
    torch.save({"model": small(pos_embed=moved["pos_embed"])}, tmp_path / "both.pth")
    with pytest.raises(InputError, match=r"pos_embed .* is not the fixed sin-cos table"):
        import_published("mae", tmp_path / "both.pth", tmp_path / "both")


# --- contracts ---


def test_other_bands_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": small()}, tmp_path / "file.pth")
    command = ["import", "mae", str(tmp_path / "file.pth"), "--to", str(tmp_path / "to")]
    turned = PUBLISHED["imagenet"][0][0]
    turned = turned.model_copy(update={"bands": turned.bands[::-1]})
    (tmp_path / "turned.json").write_text(turned.model_dump_json())
    (tmp_path / "ten.json").write_text(json.dumps({"a": PUBLISHED["fmow_sentinel"][0][0].model_dump(mode="json")}))
    (tmp_path / "none.json").write_text("{}")
    for more, what in (
        (["--bands", "blue,green,red"], "in another order"),
        (["--bands", "red,green"], "others"),
        (["--bands", ""], "others"),
        (["--contract", str(tmp_path / "turned.json")], "in another order"),
        (["--contract", str(tmp_path / "ten.json")], "the weights take 3 bands, and --contract names 10"),
        (["--contract", str(tmp_path / "none.json")], "holds no input contract"),
        (["--contract", str(tmp_path / "absent.json")], "cannot be read"),
        (["--option", "bands=4"], "bands"),
    ):
        assert main([*command, *more]) == 2
        said = capsys.readouterr().err
        assert what in said and said.count("\n") == 1, said
    assert not (tmp_path / "to").exists()
    other = turned.model_copy(
        update={"sensor": "mine", "bands": tuple(b.model_copy(update={"name": b.name[0]}) for b in turned.bands)}
    )
    (tmp_path / "other.json").write_text(other.model_dump_json())
    assert main([*command, "--contract", str(tmp_path / "other.json")]) == 0
    assert load_backbone(tmp_path / "to").contract == other


def test_a_clipped_contract(tmp_path: Path) -> None:
    """SatMAE's rule by hand: what is two deviations from the mean or further becomes 0 or 1."""
    ((contract,), _) = PUBLISHED["fmow_sentinel"]
    mean, std = 1184.38, 650.28  # of B02
    values = torch.tensor([mean - 3 * std, mean - 2 * std, mean, mean + std, mean + 2 * std, 9000.0])
    pixels = torch.full((1, 10, 1, 6), 1000.0)
    pixels[0, 0, 0] = values
    one = torch.ones(1, dtype=torch.float64)
    stored = Stored(pixels, None, torch.tensor([[1, 6]]), scale=1e-4 * one, add=0 * one)
    number = torch.zeros(1, dtype=torch.int64)
    batch = prepare(Chips({"sentinel2": stored}, id=number, visit=number, label=number), {"sentinel2": contract}, (1, 6))
    torch.testing.assert_close(batch.images["sentinel2"][0, 0, 0], torch.tensor([0, 0, 0.5, 0.75, 1, 1]), atol=1e-6, rtol=0)
    again = InputContract.model_validate(contract.model_dump(mode="json"))
    assert again == contract and Normalisation(mean=(0,), std=(1,), pixels=(1,)).clip is None


def test_kinds_by_other_spellings() -> None:
    assert kind_of("SatMAE++") is kind_of("satmae-pp") is KINDS["satmae_pp"] and kind_of("Selective-MAE") is KINDS["selectivemae"]
    with pytest.raises(InputError, match="there are mae, selectivemae"):
        kind_of("dino")


def test_the_command_lists_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(KINDS)
    assert main(["import", "mae"]) == 2


# --- going on ---


def test_pretraining_goes_on_from_an_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the commands that the documentation names; the loss before the first step is that of the imported weights."""
    shards = make_shards(tmp_path / "shards", samples=20)
    torch.save({"model": small(), "args": argparse.Namespace(norm_pix_loss=False, mask_ratio=0.5)}, tmp_path / "file.pth")
    folder = tmp_path / "import"
    assert main(["import", "mae", str(tmp_path / "file.pth"), "--to", str(folder), "--contract", str(shards)]) == 0
    said = capsys.readouterr().out
    assert "objective: mae" in said and "bands: image red, green, blue" in said
    assert not any(str(tmp_path) in (folder / name).read_text() for name in ("config.json", "recipe.yaml"))
    short = ["train.max_steps=1", "train.global_batch=8", "train.precision=fp32", "train.threads=1", "health.samples=8"]
    more = [f"train.init={folder}", f"data.train={shards}", f"run.dir={tmp_path / 'run'}", *short]
    assert main(["pretrain", str(folder / "recipe.yaml"), *more]) == 0
    row = json.loads((tmp_path / "run" / "health.jsonl").read_text().splitlines()[0])
    made = importing.read("mae", tmp_path / "file.pth", contracts=read_contracts(shards))
    objective: Any = made.objective
    assert objective.config.mask_ratio == 0.5 and not objective.config.normalise_patches
    reader = ShardReader(shards)
    chips = reader.chips(np.linspace(0, len(reader) - 1, 8).astype(np.int64))
    batch = prepare(chips, made.loaded.contracts, (32, 32))
    with torch.no_grad():
        outcome = objective.eval()(batch, Draw(0, batch.id, batch.visit))
    assert row["step"] == 0 and row["loss"] == pytest.approx(float(outcome.numerator / outcome.weight), rel=1e-6)
    assert main(["probe", "knn", str(folder), "--train", str(shards), "--test", str(shards), "--from-scratch", "0"]) == 0
