"""The matrix objective × backbone: what is legal trains, what is not is refused with its reason before any data moves."""

import json
import re

import pytest
import torch

from swath.backbones.base import create
from swath.backbones.base import registry as backbones
from swath.launch.cli import main
from swath.pretrain.config import read_recipe
from swath.pretrain.objective import build, pairs, registry
from swath.shards.errors import InputError
from tests.small_objectives import batch_of, small, smooth_images

PAIRS = [(objective, backbone, why) for objective, row in pairs().items() for backbone, why in row.items()]
LEGAL = [pytest.param(o, b, id=f"{o}-{b}") for o, b, why in PAIRS if why is None]
ILLEGAL = [pytest.param(o, b, why, id=f"{o}-{b}") for o, b, why in PAIRS if why is not None]


def test_every_objective_and_family_is_in_it() -> None:
    assert {o for o, _, _ in PAIRS} == set(registry.names())
    assert {b for _, b, _ in PAIRS} == set(backbones.families().values())
    assert {o for o, _, why in PAIRS if why is None} == set(registry.names()), "each trains something"


@pytest.mark.parametrize(("name", "backbone"), LEGAL)
def test_a_legal_pair_trains(name: str, backbone: str) -> None:
    """The loss of one batch with one draw falls by a tenth in eight steps; from the second on, since what a moving average of
    statistics makes before the first is no target yet."""
    objective = small(name, backbone).train()
    batch, draw = batch_of(smooth_images(objective, 2))
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(8):
        outcome = objective(batch, draw)
        loss = outcome.numerator / outcome.weight
        optimizer.zero_grad()
        loss.backward()
        reached = [p.grad for p in objective.backbone.parameters() if p.grad is not None]
        assert reached and all(torch.isfinite(g).all() for g in reached) and any(g.any() for g in reached)
        optimizer.step()
        objective.after_step(torch.tensor(False))
        losses.append(loss.item())
        assert outcome.numerator.dtype == torch.float32 and outcome.numerator.ndim == outcome.weight.ndim == 0
    assert losses[-1] < 0.9 * max(losses[:2]), losses


@pytest.mark.parametrize(("name", "backbone", "why"), ILLEGAL)
def test_an_illegal_pair_is_refused(name: str, backbone: str, why: str) -> None:
    """By `build`, and when a recipe is read, in one line with the reason."""
    with torch.device("meta"):
        made = create(backbone, **backbones.entry(backbone).build.tiny)
    with pytest.raises(ValueError, match=f"objective {name} cannot train {type(made).__name__}: {re.escape(why)}"):
        build(name, made, (64, 64), {"image": made.config.bands})


@pytest.mark.parametrize(("name", "backbone", "why"), ILLEGAL)
def test_an_illegal_pair_is_refused_when_the_recipe_is_read(name: str, backbone: str, why: str) -> None:
    bands = backbones.entry(backbone).build.tiny["bands"]
    text = f"run: {{dir: x}}\ndata: {{train: y}}\nbackbone: {{name: {backbone}, bands: {bands}}}\nobjective: {{name: {name}}}"
    with pytest.raises(InputError, match=f"objective.name: {name} cannot train {backbone}: ") as refused:
        read_recipe(text, [], name="test")
    assert "\n" not in str(refused.value)


def test_a_legal_recipe_is_read() -> None:
    """Also where the bands, which only the data tell, decide whether a pair is legal: twelve are three groups of four."""
    legal = [(o, b) for o, b, why in PAIRS if why is None]
    for name, backbone in [*legal, ("spectralgpt", "group_vit_base_patch8")]:
        text = f"run: {{dir: x}}\ndata: {{train: y}}\nbackbone: {{name: {backbone}}}\nobjective: {{name: {name}}}"
        read_recipe(text, [], name="test")


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    """The matrix has a line per family and a column per objective, and a name gives the reasons, in at most 120 columns."""
    assert main(["objectives"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == registry.names() and max(map(len, [head, *lines])) <= 120
    cells = {line.split()[0]: line.split()[1:] for line in lines[: len(backbones.families())]}
    families = {backbone: backbones.entry(backbone).build.__module__.split(".")[-1] for _, backbone, _ in PAIRS}
    assert len(set(families.values())) == len(families), "short names are distinct"
    for name, backbone, why in PAIRS:
        assert cells[families[backbone]][registry.names().index(name)] == ("yes" if why is None else "-")
    for name in registry.names():
        assert main(["objectives", name]) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 120
        shown = " ".join(text.split())
        assert all(f"{families[b]} {' '.join((why or 'yes').split())}" in shown for o, b, why in PAIRS if o == name)


def test_the_command_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["objectives", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert {(o, why) for o, row in whole.items() for why in row.values()} == {(o, why) for o, _, why in PAIRS}
    assert main(["objectives", "mae", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == whole["mae"]
    assert main(["objectives", "ma"]) == 2
    assert "did you mean mae?" in capsys.readouterr().err
