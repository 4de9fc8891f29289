"""Every family: trained a few steps, exported, loaded where only torch, transformers, safetensors and Pillow are, in the newest
transformers 4 and 5: features, maps and images of the processor equal to the bit, also after save_pretrained and from_pretrained.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from swath.backbones.base import create, registry
from swath.hub.export import _expected, write_export
from tests.hub.clean import clean_environment
from tests.hub.elsewhere import run_elsewhere
from tests.hub.made import contract, loaded

pytest.importorskip("transformers")
FAMILIES = {name: build for build, name in registry.families().items()}

# Run in a clean environment: what is wrong with each folder of argv[1], as JSON. argv[2] is where they are saved again, or "-".
CHECK = """
import importlib.util, json, sys, traceback
from pathlib import Path
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

for name in ("swath", "einops", "sklearn", "matplotlib", "scipy", "torchvision", "timm", "accelerate"):
    assert importlib.util.find_spec(name) is None, f"{name} is here"
folders, again = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(int(sys.argv[3]))

def check(folder):
    expected = load_file(folders.parent / f"{folder.name}.safetensors")
    model, report = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    made = {"pixel_values": processor(expected["raw"], scale=1.0)["pixel_values"]}
    assert not model.training
    with torch.inference_mode():
        output = model(made["pixel_values"], output_hidden_states=True)
    made |= {"last_hidden_state": output.last_hidden_state, "pooler_output": output.pooler_output}
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert output.last_hidden_state.shape[2] == model.config.hidden_size
    kind = get_class_from_dynamic_module("modeling_swath.SwathBackbone", str(folder))
    backbone = kind.from_pretrained(folder)
    images = made["pixel_values"]
    with torch.inference_mode():
        maps = backbone(images).feature_maps
    for stride, level, channels in zip((4, 8, 16, 32), maps, backbone.channels):
        assert level.shape == (2, channels, -(-images.shape[2] // stride), -(-images.shape[3] // stride)), (stride, level.shape)
        if f"map_{stride}" in expected:
            made[f"map_{stride}"] = level
    for name, tensor in made.items():
        assert torch.equal(tensor, expected[name]), name
    if transformers.__version__.startswith("4."):
        from transformers import AutoBackbone
        one = AutoBackbone.from_pretrained(folder, trust_remote_code=True, out_features=["stage3"])
        with torch.inference_mode():
            assert torch.equal(one(images).feature_maps[0], maps[2])
    sum(level.float().square().mean() for level in backbone.train()(images).feature_maps).backward()
    assert any(p.grad is not None and p.grad.any() for p in backbone.parameters())
    for bad in (expected["raw"][:, :-1], torch.zeros(2, expected["raw"].shape[1] + 1, *images.shape[2:])):
        try:
            processor(bad, scale=1.0)
        except ValueError as error:
            assert "\\n" not in str(error) and processor.input_contract["bands"][0]["name"] in str(error)
        else:
            raise AssertionError("it takes other bands")
    if again != "-":
        model.save_pretrained(Path(again) / folder.name)
        processor.save_pretrained(Path(again) / folder.name)

wrong = {}
for folder in sorted(folders.iterdir()):
    try:
        check(folder)
        wrong[folder.name] = None
    except Exception:
        wrong[folder.name] = traceback.format_exc()[-1500:]
assert "swath" not in sys.modules
print(json.dumps({"version": transformers.__version__, "wrong": wrong}))
"""


def trained(name: str) -> torch.nn.Module:
    """The family's small one after three steps that change every parameter that they reach, running statistics too."""
    torch.manual_seed(0)
    backbone = create(name, **FAMILIES[name].tiny).train()
    images = torch.randn(2, backbone.config.bands, backbone.config.image_size, backbone.config.image_size)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-2)
    for _ in range(3):
        features = backbone(images)
        (features.pooled.square().mean() + features.tokens.sub(1).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return backbone.eval()


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of exports by family, and beside it what each one's source gives."""
    folder = tmp_path_factory.mktemp("families") / "exports"
    with pytest.MonkeyPatch.context() as patch:  # what verifies an export does less than this test
        patch.setattr("swath.hub.export._verify", lambda folder, scratch: None)
        patch.setattr("os.fsync", lambda file: None)  # a busy disk takes seconds for each of two hundred files
        for name in FAMILIES:
            backbone: Any = trained(name)
            side = backbone.config.image_size
            dates = getattr(backbone.config, "frames", 1)
            bands = contract(*(f"B{n:02d}" for n in range(backbone.config.bands // dates)), side=side)
            bands = bands.model_copy(update={"dates": dates})
            options = dataclasses.asdict(backbone.config)
            source = dataclasses.replace(
                loaded(), backbone=backbone, contracts={bands.modality: bands}, size=(side, side), name=name, options=options
            )
            write_export(source, folder / name)
            save_file(_expected(source)[1], folder.parent / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module", params=[None, ">=4.50,<5"], ids=["transformers-5", "transformers-4"])
def found(request: pytest.FixtureRequest, exports: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is wrong with each family's export, and with what is saved again of it, which another process loads."""
    at = tmp_path_factory.mktemp("clean")
    python = clean_environment(at / "environment", request.param)
    saved = at / "saved"
    saved.mkdir()
    for expected in exports.parent.glob("*.safetensors"):
        (at / expected.name).symlink_to(expected)
    made: dict[str, Any] = {}
    for part, folders, again in (("export", exports, str(saved)), ("round trip", saved, "-")):
        (at / part).mkdir()
        printed = run_elsewhere(CHECK, folders, again, str(torch.get_num_threads()), at=at / part, python=python)
        made[part] = json.loads(printed.splitlines()[-1])
    return made


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_clean_environment_gives_the_features_of_the_source(name: str, found: dict[str, Any]) -> None:
    for part, report in found.items():
        assert report["wrong"][name] is None, f"{part}, transformers {report['version']}: {report['wrong'][name]}"
