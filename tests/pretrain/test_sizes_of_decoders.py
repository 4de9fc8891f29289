"""Sizes that no decoder can have are refused when an objective is built, in one line that names the option: never by a traceback
of the first step."""

from dataclasses import fields
from typing import Any

import pytest

from swath.pretrain.config import read_recipe
from swath.pretrain.masking import kept
from swath.pretrain.objective import pairs, registry
from swath.shards.errors import InputError
from tests.small_objectives import SMALL, small

WRONG: list[tuple[str, Any]] = [
    ("width", 0), ("width", 22), ("heads", 0), ("heads", -2), ("heads", 7), ("depth", -1), ("mlp_ratio", 0.0),
    ("mlp_ratio", -1.0), ("rank", 0), ("channel_width", 0),
]  # fmt: skip


def options(name: str) -> list[tuple[str, Any]]:
    """What is wrong of an objective's own options, whose decoder may be called predictor."""
    known = {field.name for field in fields(registry.entry(name).config)}
    named = [(full, value) for part, value in WRONG for full in (part, f"decoder_{part}", f"predictor_{part}") if full in known]
    # a width of 22 is divisible by its two heads; learned positions, and places beside groups, need no more
    return [(full, value) for full, value in named if value != 22 or name not in ("spectralgpt", "satmae", "satmae_pp")]


BACKBONE = {name: next(backbone for backbone, why in row.items() if why is None) for name, row in pairs().items()}
CASES = [(name, option, value) for name in registry.names() for option, value in options(name)]


def test_every_decoder_is_in_it() -> None:
    assert {name for name, option, _ in CASES if option in SMALL and option.endswith("heads")} == set(registry.names())


@pytest.mark.parametrize(("name", "option", "value"), CASES)
def test_sizes_that_cannot_be_are_refused(name: str, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option) as refused:
        small(name, BACKBONE[name], **{option: value})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf"])
def test_what_is_no_number_is_refused_when_the_recipe_is_read(number: str) -> None:
    """Of a backbone's options and an objective's, as of the others."""
    text = "run: {dir: x}\ndata: {train: y}\nbackbone: {name: vit_tiny_patch8}\nobjective: {name: mae}"
    with pytest.raises(InputError) as refused:
        read_recipe(text, [f"objective.mask_ratio={number}", f"backbone.mlp_ratio={number}"], name="test")
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()] == ["backbone.mlp_ratio", "objective.mask_ratio"]


@pytest.mark.parametrize("ratio", [float("nan"), float("inf"), -float("inf")])
def test_no_tokens_are_counted_of_such_a_ratio(ratio: float) -> None:
    with pytest.raises(ValueError, match="mask_ratio"):
        kept(196, ratio)
