"""What a published checkpoint is of: sizes from the shapes of its tensors, the rest from its script's arguments or the user.

One function for each kind of `kinds.KINDS`. Letters: d width, p patch.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swath.backbones import group_vit, less, mamba, rsmamba, spectral_vit, temporal_vit, vim, vit, vmamba
from swath.backbones.base import sincos_grid
from swath.pretrain.exported import LARGEST_SIDE
from swath.pretrain.objectives import selective_mae
from swath.shards.errors import InputError

# Heads cannot be told from weights; these are the published ones of an encoder's and a decoder's width.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_DECODER_HEADS = {256: 8, 512: 16}
_ROMA_HEAD = 64  # width of one head of its decoder, whatever the decoder's


@dataclass
class Source:
    """A checkpoint's tensors, what its script was told (`args`), what the user says of it (`asked`, by our options' names)."""

    state: dict[str, Tensor]
    args: Mapping[str, Any]
    asked: Mapping[str, Any]
    front: str = ""  # what was cut from the names

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """Of a tensor of so many axes; InputError where there is none."""
        if name not in self.state:
            raise InputError(f"{self.front}{name} is missing")
        shape = tuple(self.state[name].shape)
        if len(shape) != axes or not all(shape):
            raise InputError(f"{self.front}{name} is of shape {shape}; it should have {axes} axes")
        return shape

    def count(self, pattern: str) -> int:
        """How many numbers stand behind the names that match, counted from 0: the `(\\d+)` of the pattern."""
        found = {int(match[1]) for name in self.state if (match := re.match(pattern, name))}
        if absent := set(range(len(found))) - found:
            where = pattern.replace(r"(\d+)", str(min(absent))).replace("\\", "")
            raise InputError(f"there is nothing of {self.front}{where}")
        return len(found)

    def said(self, *names: str) -> Any:
        """The first of the script's arguments that is there, None where none is."""
        return next((self.args[name] for name in names if self.args.get(name) is not None), None)

    def number(self, *names: str) -> float | None:
        """Of what was said; InputError for anything but a finite number."""
        value = self.said(*names)
        if value is None or (isinstance(value, int | float) and math.isfinite(value)):
            return value
        raise InputError(f"its script's argument {' or '.join(names)} is {str(value)[:40]!r}, which is no number")

    def side(self, *names: str) -> int | None:
        """Pixels; InputError for what no image has."""
        value = self.number(*names)
        if value is None or (value == int(value) and 0 < value <= LARGEST_SIDE):
            return None if value is None else int(value)
        raise InputError(f"its script's argument {' or '.join(names)} is {value}, which is no side of an image in pixels")

    def has(self, *fronts: str) -> bool:
        return any(name.startswith(fronts) for name in self.state)

    def ratio(self, hidden: str, width: int) -> float:
        """An MLP's: such that int(width · ratio) is its hidden width."""
        if hidden not in self.state:
            return 4.0
        wide = self.shape(hidden, 2)[0]
        made = wide / width
        return made if int(width * made) == wide else math.nextafter(made, math.inf)

    def heads(self, width: int, option: str = "heads") -> int:
        """InputError where neither the user, nor the script's arguments, nor a published size tells them."""
        decoder = option != "heads"
        known = self.asked.get(option) or self.said("decoder_num_heads" if decoder else "num_heads")
        known = known or (_DECODER_HEADS if decoder else _HEADS).get(width)
        if not isinstance(known, int) or known < 1 or width % known:
            whose = "the decoder" if decoder else "the encoder"
            raise InputError(f"how many heads {whose} of width {width} has cannot be told: --option {option}=N")
        return known


@dataclass
class Architecture:
    """What to build. `family` is the backbone's module; `contract` one of `contracts.PUBLISHED`, `bands` how many the weights
    take of its one modality (0: any number, of one or several); `objective` (name, options), None where only the encoder is
    there. Names that begin with one of `left_out` belong to neither, but to a classifier for instance."""

    family: Any
    options: dict[str, Any]
    contract: str
    bands: int
    objective: tuple[str, dict[str, Any]] | None = None
    left_out: tuple[str, ...] = ("head.",)
    dates: int = 1


def _square(shape: tuple[int, ...], name: str) -> int:
    if shape[-1] != shape[-2]:
        raise InputError(f"{name} is of shape {shape}; patches should be square")
    return shape[-1]


def _side(places: int, patch: int, name: str) -> int:
    """Pixels of a square image of so many places."""
    side = math.isqrt(places)
    if side * side != places:
        token = "; cls_token is missing" if math.isqrt(places - 1) ** 2 == places - 1 else ""
        raise InputError(f"{name} has {places} places, which are no square{token}")
    return side * patch


# --- masked autoencoders ---


def _trunk(source: Source, patch: int, width: int, own: int = 0) -> dict[str, Any]:
    """Options that every transformer of these has; `own` channels of a position tell no place. Its table has a class row."""
    _, rows, channels = source.shape("pos_embed", 3)
    if own and channels != width - own:
        raise InputError(f"pos_embed is {channels} wide; it should be {width - own}")
    return {
        "image_size": _side(rows - 1, patch, "pos_embed"), "patch": patch, "width": width,
        "depth": source.count(r"blocks\.(\d+)\."), "heads": source.heads(width),
        "mlp_ratio": source.ratio("blocks.0.mlp.fc1.weight", width),
    }  # fmt: skip


def _decoder(source: Source, table: str = "decoder_pos_embed") -> dict[str, Any] | None:
    """Options that the decoders of MAE's family have, with a `table` of positions; None where there is no decoder."""
    if not source.has("decoder_", "mask_token", "proj_up_", "up_block"):
        return None
    source.shape(table, 3)
    width = source.shape("mask_token", 3)[2]
    options = {
        "decoder_width": width, "decoder_depth": source.count(r"decoder_blocks\.(\d+)\."),
        "decoder_heads": source.heads(width, "objective.decoder_heads"),
        "mlp_ratio": source.ratio("decoder_blocks.0.mlp.fc1.weight", width),
    }  # fmt: skip
    if (ratio := source.number("mask_ratio")) is not None:
        options["mask_ratio"] = float(ratio)
    return options


def _standardised(source: Source, default: bool) -> dict[str, Any]:
    said = source.said("norm_pix_loss")
    return {"normalise_patches": default if said is None else bool(said)}


def _vit(source: Source, contract: str) -> Architecture:
    width, bands, *_ = shape = source.shape("patch_embed.proj.weight", 4)
    patch = _square(shape, "patch_embed.proj.weight")
    options = {"bands": bands, **_trunk(source, patch, width)}
    table, place = source.state["pos_embed"], torch.arange(options["image_size"] // patch)
    if not source.has("decoder_", "mask_token") and table.shape[2] == width and width % 4 == 0:
        fixed_nd = sincos_grid(width, place, place).float()
        if table[0, 0].any() or (table[0, 1:] - fixed_nd).abs().max() > 1e-5:  # fine-tuned: pretraining never moves it
            options["positions"] = "learned"
    return Architecture(vit, options, contract, bands)


def of_mae(source: Source) -> Architecture:
    made, decoder = _vit(source, "imagenet"), _decoder(source)
    if decoder is not None:
        made.objective = "mae", decoder | _standardised(source, True)
    return made


def of_selectivemae(source: Source) -> Architecture:
    made = _vit(source, "aerial")
    made.left_out = (*selective_mae.DEAD, *made.left_out)
    alive = {name: tensor for name, tensor in source.state.items() if name.partition(".")[0] not in selective_mae.DEAD}
    rest = Source(alive, source.args, source.asked)
    decoder = _decoder(rest)
    if decoder is None:
        return made
    chosen = source.said("select")
    if isinstance(chosen, dict):  # as the selector is told
        decoder |= {"mask_ratio": 1 - chosen["keep_rate"], "first_ratio": chosen["init_rate"] / chosen["keep_rate"]}
    if (share := source.number("kept_mask_ratio")) is not None:
        decoder["predicted_ratio"] = float(share)
    made.objective = "selective_mae", decoder | _standardised(source, True) | {"compat": "uniform"}
    return made


def _groups(source: Source) -> Architecture:
    """SatMAE's encoder of band groups."""
    count = source.count(r"patch_embed\.(\d+)\.")
    shapes = [source.shape(f"patch_embed.{n}.proj.weight", 4) for n in range(count)]
    width, sizes = shapes[0][0], [shape[1] for shape in shapes]
    patch = _square(shapes[0], "patch_embed.0.proj.weight")
    groups = source.asked.get("groups") or source.said("grouped_bands", "channel_groups")
    if not groups and sizes == [len(group) for group in group_vit.SENTINEL2]:
        groups = group_vit.SENTINEL2
    if not isinstance(groups, list | tuple) or [len(group) for group in groups] != sizes:
        raise InputError(
            f"which bands are in its groups of {', '.join(map(str, sizes))} cannot be told: --option groups=[[0,1],[2,…]]"
        )
    own = source.shape("channel_embed", 3)[2]
    options = {
        "bands": sum(sizes), **_trunk(source, patch, width, own), "group_width": own,
        "groups": tuple(tuple(int(band) for band in group) for group in groups),
    }  # fmt: skip
    return Architecture(group_vit, options, "fmow_sentinel", sum(sizes))


def _frames(source: Source) -> Architecture:
    """SatMAE's encoder of dates."""
    width, bands, *_ = shape = source.shape("patch_embed.proj.weight", 4)
    own = width - source.shape("pos_embed", 3)[2]
    frames = source.asked.get("frames") or 3
    patch = _square(shape, "patch_embed.proj.weight")
    options = {"bands": frames * bands, "frames": frames, "date_width": own // 3, **_trunk(source, patch, width, own)}
    return Architecture(temporal_vit, options, "fmow_rgb", bands, dates=frames)


def of_satmae(source: Source) -> Architecture:
    decoder = _decoder(source)
    if source.has("patch_embed.0."):
        made = _groups(source)
        if decoder is not None:
            own = source.shape("decoder_channel_embed", 3)[2]
            decoder |= {"group_width": own, "spatial_mask": bool(source.said("spatial_mask")), "compat": "order"}
            made.objective = "satmae", decoder | _standardised(source, False)
        return made
    if source.shape("pos_embed", 3)[2] == source.shape("patch_embed.proj.weight", 4)[0]:
        made = _vit(source, "fmow_rgb")  # of one image it is MAE
        if decoder is not None:
            made.objective = "mae", decoder | _standardised(source, True)
        return made
    made = _frames(source)
    if decoder is not None:
        decoder["date_width"] = (decoder["decoder_width"] - source.shape("decoder_pos_embed", 3)[2]) // 3
        made.objective = "satmae", decoder | _standardised(source, True)
    return made


def of_satmae_pp(source: Source) -> Architecture:
    decoder = _decoder(source)
    groups = source.has("patch_embed.0.")
    made = _groups(source) if groups else _vit(source, "fmow_rgb")
    if decoder is None:
        return made
    decoder["blocks"] = max(1, len({name.partition(".")[0] for name in source.state if name.startswith("up_block")}))
    if groups:
        own = source.shape("decoder_channel_embed", 3)[2]
        decoder |= {"group_width": own, "spatial_mask": bool(source.said("spatial_mask")), "compat": "order"}
    made.objective = "satmae_pp", decoder
    return made


def of_spectralgpt(source: Source) -> Architecture:
    width, _, cube, *_ = shape = source.shape("patch_embed.proj.weight", 5)
    patch = _square(shape, "patch_embed.proj.weight")
    places, groups = (source.shape(f"pos_embed_{axis}", 3)[1] for axis in ("spatial", "temporal"))
    options = {
        "bands": cube * groups, "cube": cube, "image_size": _side(places, patch, "pos_embed_spatial"), "patch": patch,
        "width": width, "depth": source.count(r"blocks\.(\d+)\."), "heads": source.heads(width),
        "mlp_ratio": source.ratio("blocks.0.mlp.fc1.weight", width),
    }  # fmt: skip
    made = Architecture(spectral_vit, options, "spectralgpt", cube * groups)
    if (decoder := _decoder(source, "decoder_pos_embed_spatial")) is not None:
        made.objective = "spectralgpt", decoder | _standardised(source, False) | {"compat": "sum"}
    return made


def of_less(source: Source) -> Architecture:
    """Its heads, ranks and factors follow from shapes; how many bands it sees does not, since all share one embedding."""
    state = {name.removeprefix("encoder."): tensor for name, tensor in source.state.items()}
    inner = Source(state, source.args, source.asked, "encoder." if source.has("encoder.") else "")
    width = inner.shape("cls_token", 3)[2]
    kind = "optical" if inner.has("optical_patch_embed.") else "radar"
    patch = _square(inner.shape(f"{kind}_patch_embed.proj.0.weight", 5), f"{kind}_patch_embed.proj.0.weight")
    sees = inner.said("use_perception_field_mask")
    reach = 0.0 if sees is False else float(inner.number("attention_radius") or 640)
    options = {
        "patch": patch, "width": width, "depth": inner.count(r"blocks\.(\d+)\."), **_lattice(inner, "blocks.0.", width),
        "image_size": inner.side("img_size", "crop_size", "input_size") or 128, "perception_m": reach,
        "gsd_m": float(inner.number("resolution") or 10), "compat": True,
    }  # fmt: skip
    kinds = [kind for kind in ("optical", "radar") if inner.has(f"{kind}_patch_embed.")]
    made = Architecture(less, options, "+".join(kinds), 0)
    if not source.has("decoder."):
        return made
    front = "decoder.decoder_blocks.0."
    decoder = source.shape("decoder.decoder_embed.weight", 2)[0]
    found = _lattice(source, front, decoder)
    given: dict[str, Any] = {
        "decoder_width": decoder, "decoder_depth": source.count(r"decoder\.decoder_blocks\.(\d+)\."),
        "decoder_heads": found["heads"], "decoder_channel_width": found["channel_width"], "decoder_rank": found["rank"],
        "decoder_layer_scale": found["layer_scale"], "mlp_ratio": found["mlp_ratio"], "compat": True,
    }  # fmt: skip
    for ours in ("mask_ratio", "channel_mask_ratio"):
        if (ratio := source.number(ours)) is not None:
            given[ours] = float(ratio)
    if (only := source.said("modal")) is not None:
        given["passes"] = (only,)
    made.objective = "hyper_mae", given | _standardised(source, True)
    return made


def _lattice(source: Source, front: str, width: int) -> dict[str, Any]:
    """Options of a low-rank block: of its factors, channel · spatial = width · heads."""
    channel, spatial = (source.shape(f"{front}{axis}_norm.weight", 1)[0] for axis in ("channel", "spatial"))
    heads = channel * spatial // width
    if not heads or channel % heads or channel * spatial != width * heads:
        raise InputError(f"{front}channel_norm of {channel} and spatial_norm of {spatial} do not make a width of {width}")
    return {
        "heads": heads, "channel_width": channel // heads,
        "rank": source.shape(f"{front}attn.channel_branch.qk.weight", 2)[0] // (2 * channel),
        "mlp_ratio": source.ratio(f"{front}mlp.fc1.weight", width),
        "qk_norm": f"{front}attn.channel_branch.q_norm.weight" in source.state,
        "layer_scale": 1.0 if f"{front}ls1.gamma" in source.state else 0.0,
    }  # fmt: skip


# --- state spaces ---


def _mixer(source: Source, front: str, width: int) -> dict[str, Any]:
    inner, states = source.shape(f"{front}A_log", 2)
    return {"states": states, "expand": inner // width}


def _column(source: Source, contract: str) -> Architecture:
    """ARM's and RoMA's column, pretrained in one direction or fine-tuned in four."""
    width, bands, *_ = shape = source.shape("patch_embed.proj.weight", 4)
    patch = _square(shape, "patch_embed.proj.weight")
    token = "cls_token" in source.state
    several = sum(name.startswith("layers.0.mixer.") for name in source.state)  # tensors, two of which are shared by directions
    options: dict[str, Any] = {
        "bands": bands, "patch": patch, "width": width, "depth": source.count(r"layers\.(\d+)\."), "class_token": token,
        "image_size": _side(source.shape("pos_embed", 3)[1] - token, patch, "pos_embed"),
        "positions": "learned" if token else "sincos", "final_norm": "norm_f.weight" in source.state,
        "directions": 1 if several <= len(mamba.PER_DIRECTION) + 2 else 4,
        **_mixer(source, "layers.0.mixer.", width),
    }  # fmt: skip
    if token:
        options["pool"] = "halves" if source.said("global_pool") else "class"
    if "mask" in source.state:  # the first cluster sees itself only
        seen = int((source.state["mask"][0] == 0).sum())
        options["cluster"] = math.isqrt(seen)
    made = Architecture(mamba, options, contract, bands)
    if not source.has(*(name for name in mamba.NOT_OURS if name != "head.")):
        return made
    decoder = source.shape("ar_token", 3)[2]
    for name, axes in (("dec_pos_embed", 3), ("mask", 2)):  # constants, which must be those that we compute
        source.shape(name, axes)
    task: dict[str, Any] = {
        "decoder_width": decoder, "decoder_depth": source.count(r"dec_block\.(\d+)\."),
        "decoder_heads": source.asked.get("objective.decoder_heads") or max(1, decoder // _ROMA_HEAD),
        "mlp_ratio": source.ratio("dec_block.0.mlp.fc1.weight", decoder),
    }  # fmt: skip
    made.objective = "arm", task | _standardised(source, True)
    return made


def of_arm(source: Source) -> Architecture:
    return _column(source, "imagenet")


def of_roma(source: Source) -> Architecture:
    made = _column(source, "aerial")
    if made.objective is not None:
        made.objective = "roma", made.objective[1] | {"compat": "released"}
    return made


def of_vim(source: Source) -> Architecture:
    width, bands, *_ = shape = source.shape("patch_embed.proj.weight", 4)
    patch = _square(shape, "patch_embed.proj.weight")
    token = "cls_token" in source.state
    options = {
        "bands": bands, "patch": patch, "width": width, "depth": source.count(r"layers\.(\d+)\."), "class_token": token,
        "image_size": _side(source.shape("pos_embed", 3)[1] - token, patch, "pos_embed"),
        "pool": "class" if token else "mean", **_mixer(source, "layers.0.mixer.", width),
    }  # fmt: skip
    return Architecture(vim, options, "imagenet", bands)


def of_vmamba(source: Source) -> Architecture:
    half, bands, *_ = source.shape("patch_embed.0.weight", 4)
    depths = tuple(source.count(rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(4))
    first = next((f"layers.{stage}.blocks.0." for stage in range(4) if depths[stage]), "layers.0.blocks.0.")
    width = source.shape(f"{first}norm.weight", 1)[0]
    inner = source.shape(f"{first}op.out_norm.weight", 1)[0]
    states = source.shape(f"{first}op.A_logs", 2)[1]
    options = {
        "bands": bands, "image_size": source.side("img_size", "input_size") or 224, "width": 2 * half, "depths": depths,
        "states": states, "ratio": inner / width, "gate": source.shape(f"{first}op.in_proj.weight", 2)[0] == 2 * inner,
        "mlp_ratio": source.ratio(f"{first}mlp.fc1.weight", width), "conv_bias": f"{first}op.conv2d.bias" in source.state,
    }  # fmt: skip
    return Architecture(vmamba, options, "imagenet", bands, left_out=("classifier.head.",))


def of_rsmamba(source: Source) -> Architecture:
    inner = Source({n.removeprefix("backbone."): t for n, t in source.state.items()}, source.args, source.asked)
    width, bands, *_ = shape = inner.shape("patch_embed.projection.weight", 4)
    patch = _square(shape, "patch_embed.projection.weight")
    stride = source.asked.get("stride") or source.side("stride") or patch // 2
    side = math.isqrt(places := inner.shape("pos_embed", 3)[1])
    if side * side != places:
        raise InputError(f"pos_embed has {places} places, which are no square (there is no class token here)")
    gates = next((tensor for name, tensor in inner.state.items() if name.startswith("gate_layers.")), None)
    kind = str(source.said("path_type") or "")
    paths = source.asked.get("paths") or (len(gates) if gates is not None else None)
    paths = paths or (3 if "shuffle" in kind else 2 if "reverse" in kind else 1 if kind else None)
    if paths is None:
        raise InputError("without gates its paths cannot be told: --option paths=N (1 forward, 2 and reverse, 3 and shuffled)")
    options = {
        "bands": bands, "image_size": (side - 1) * stride + patch, "patch": patch, "stride": stride, "width": width,
        "depth": inner.count(r"layers\.(\d+)\."), "inner": inner.shape("layers.0.in_proj.weight", 2)[0] // 2,
        "states": inner.shape("layers.0.A_log", 2)[1], "paths": paths, "merge": "mean" if gates is None else "gate",
    }  # fmt: skip
    return Architecture(rsmamba, options, "aerial", bands)
