"""The kinds of published checkpoints that `swath import` knows: what each is called, and what reads it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from swath.hub.architecture import (
    Architecture,
    Source,
    of_arm,
    of_less,
    of_mae,
    of_roma,
    of_rsmamba,
    of_satmae,
    of_satmae_pp,
    of_selectivemae,
    of_spectralgpt,
    of_vim,
    of_vmamba,
)
from swath.pretrain.objectives import hyper_mae, mae, roma, satmae, satmae_pp, selective_mae, spectralgpt
from swath.shards.errors import InputError


@dataclass(frozen=True)
class Kind:
    """`describe` says what a checkpoint is of. `licence` is that of the published code, as far as it has one."""

    describe: Callable[[Source], Architecture]
    title: str
    licence: str | None = None


KINDS: dict[str, Kind] = {
    "mae": Kind(of_mae, "MAE (He et al. 2022), ImageNet", "CC-BY-NC-4.0"),
    "selectivemae": Kind(of_selectivemae, "SelectiveMAE (Wang et al. 2024), aerial RGB"),
    "satmae": Kind(of_satmae, "SatMAE (Cong et al. 2022): band groups, dates or RGB", "CC-BY-NC-4.0"),
    "satmae_pp": Kind(of_satmae_pp, "SatMAE++ (Noman et al. 2024): band groups or RGB", "Apache-2.0"),
    "spectralgpt": Kind(of_spectralgpt, "SpectralGPT (Hong et al. 2024), 12 Sentinel-2 bands", "GPL-3.0"),
    "roma": Kind(of_roma, "RoMA (Wang et al. 2025), aerial RGB: pretrained or fine-tuned"),
    "arm": Kind(of_arm, "ARM (Ren et al. 2024), ImageNet"),
    "vim": Kind(of_vim, "Vision Mamba (Zhu et al. 2024), ImageNet"),
    "vmamba": Kind(of_vmamba, "VMamba (Liu et al. 2024), ImageNet"),
    "rsmamba": Kind(of_rsmamba, "RSMamba (Chen et al. 2024), aerial RGB"),
    "less": Kind(of_less, "LESS ViT and its hyperspectral MAE (Si et al. 2025)"),
}


def kind_of(name: str) -> Kind:
    """By its name, in whatever spelling of case, hyphen and plus. InputError lists those that there are."""
    plain = name.lower().replace("++", "_pp").replace("+", "_p").replace("-", "_")
    found = KINDS.get(plain) or KINDS.get(plain.replace("_", "")) or KINDS.get(plain.removesuffix("pp").rstrip("_") + "_pp")
    if found is None:
        raise InputError(f"no published kind is called {name!r}; there are {', '.join(KINDS)}")
    return found


_LOAD: dict[str, Callable[[Any, Any, dict[str, Tensor]], None]] = {
    "mae": mae.load_published,
    "selective_mae": selective_mae.load_published,
    "satmae": lambda objective, config, state: satmae.load_published(objective, state),
    "satmae_pp": lambda objective, config, state: satmae_pp.load_published(objective, state),
    "spectralgpt": spectralgpt.load_published,
    "roma": roma.load_published,
    "arm": roma.load_published,
    "hyper_mae": hyper_mae.load_published,
}


def load(objective: Any, name: str, config: Any, state: dict[str, Tensor]) -> None:
    """Fill an objective, named `name`, from a published checkpoint. ValueError or RuntimeError where it does not fit."""
    _LOAD[name](objective, config, state)
