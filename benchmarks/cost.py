"""What objectives cost: arithmetic beside the published graphs, and SatMAE and SatMAE++ beside plain re-implementations.

    python -m benchmarks.cost --out benchmarks/results/cost.json

GFLOP per image are of one forward and backward pass, matrix products, convolutions and attention (scans are not counted).
`gflop` counts attention's backward pass as four products, as in a graph that keeps its scores, which the published figures are
of; `gflop_run` as five where ours makes the scores again instead of keeping them. Steps are forward, backward and optimiser,
alternating in one process; see `step.py`.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.step import PlainBlock, Step, swath_step, timed
from swath.backbones import base
from swath.launch.recipes import find
from swath.pretrain import cost, objective
from swath.pretrain.config import Recipe, read_recipe
from swath.shards.draw import Draw
from swath.shards.prepare import Batch

# recipe → bands, published GFLOP per image forward and backward (of the released code, with a counter as below)
TABLE: dict[str, tuple[int, float | None]] = {
    "mae_vit_base": (3, 58.5),
    "selective_mae_vit_base": (3, 26.8),
    "satmae_group_vit_base": (10, 132.3),
    "satmae_pp_group_vit_base": (10, 175.2),
    "spectralgpt_base": (12, 81.9),
    "latent_vit_base": (3, None),
    "roma_mamba_base": (3, None),
    "arm_mamba_base": (3, None),
}
TIMED = {"satmae": "satmae_group_vit_base", "satmae_pp": "satmae_pp_group_vit_base"}
GROUPS = ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))


# The published graphs, written plainly: unfused attention, every patch embedded and then picked, the whole decoder, the loss
# everywhere times a mask, convolutions on contiguous images. Shapes follow Cong et al. 2022 and Noman et al. 2024.


class PlainSatMAE(nn.Module):
    def __init__(self, size: int = 96, patch: int = 8, width: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.patch, self.places, inside = patch, (size // patch) ** 2, 512
        tokens = self.places * len(GROUPS)
        self.embed = nn.ModuleList([nn.Conv2d(len(group), width, patch, patch) for group in GROUPS])
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, tokens + 1, width) * 0.02, requires_grad=False)
        self.blocks = nn.ModuleList([PlainBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.to_decoder = nn.Linear(width, inside)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, inside))
        self.decoder_position = nn.Parameter(torch.randn(1, tokens + 1, inside) * 0.02, requires_grad=False)
        self.decoder = nn.ModuleList([PlainBlock(inside, 16) for _ in range(8)])
        self.decoder_norm = nn.LayerNorm(inside, eps=1e-6)
        self.predict = nn.ModuleList([nn.Linear(inside, len(group) * patch**2) for group in GROUPS])

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The predicted image, bands one group after the other, and its masked error."""
        x = torch.cat([e(images[:, g]).flatten(2).transpose(1, 2) for e, g in zip(self.embed, GROUPS, strict=True)], dim=1)
        x = x + self.position[:, 1:]
        b, n, d = x.shape
        keep = n // 4
        shuffle = torch.rand(b, n).argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        x = torch.gather(x, 1, shuffle[:, :keep, None].repeat(1, 1, d))
        mask = torch.gather((torch.arange(n) >= keep).float().repeat(b, 1), 1, restore)
        x = torch.cat([(self.cls + self.position[:, :1]).expand(b, -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.to_decoder(self.norm(x))
        filled = torch.cat([x[:, 1:], self.mask_token.repeat(b, n - keep, 1)], dim=1)
        filled = torch.gather(filled, 1, restore[..., None].repeat(1, 1, x.shape[2]))
        x = torch.cat([x[:, :1], filled], dim=1) + self.decoder_position
        for block in self.decoder:
            x = block(x)
        x = self.decoder_norm(x)[:, 1:]
        parts = [p(part) for p, part in zip(self.predict, x.split(self.places, dim=1), strict=True)]
        p, side = self.patch, images.shape[2] // self.patch
        made = torch.cat([part.reshape(b, self.places, -1, p * p).transpose(1, 2) for part in parts], dim=1)
        target = images.reshape(b, -1, side, p, side, p).transpose(3, 4).reshape(made.shape)
        error = ((made - target) ** 2).mean(dim=-1)
        masks = mask.reshape(b, len(GROUPS), self.places)
        loss = sum((error[:, list(g)].mean(dim=1) * masks[:, i]).sum() for i, g in enumerate(GROUPS)) / mask.sum()
        image = made.reshape(b, -1, side, side, p, p).transpose(3, 4).reshape(images.shape)
        return image, torch.as_tensor(loss)

    def forward(self, images: Tensor) -> Tensor:
        return self.reconstruct(images)[1]


class PlainNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width, 1, 1)), nn.Parameter(torch.zeros(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        away = x - x.mean(dim=1, keepdim=True)
        return away / ((away**2).mean(dim=1, keepdim=True) + 1e-6).sqrt() * self.weight + self.bias


class PlainUp(nn.Module):
    def __init__(self, bands: int) -> None:
        super().__init__()
        width = 4 * bands
        self.up, self.up_norm = nn.ConvTranspose2d(width, width, 4, 2, 1), PlainNorm(width)
        self.inner = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
        self.norm, self.out = PlainNorm(width), nn.Conv2d(width, bands, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.leaky_relu(self.up_norm(self.up(x)))
        x = self.norm(x + self.inner(x) * 0.5)
        return x, self.out(x)


class PlainSatMAEPP(PlainSatMAE):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(10, 40, 1), nn.GELU(), PlainNorm(40))
        self.up1, self.up2 = PlainUp(10), PlainUp(10)

    def forward(self, images: Tensor) -> Tensor:
        half = F.interpolate(images, scale_factor=0.5, mode="bilinear")
        made, loss = self.reconstruct(F.interpolate(half, scale_factor=0.5, mode="bilinear"))
        x, made2 = self.up1(self.enter(made))
        _, made4 = self.up2(x)
        return 0.6 * loss + 0.2 * (made2 - half).abs().mean() + 0.2 * (made4 - images).abs().mean()


PLAIN: dict[str, Any] = {"satmae": PlainSatMAE, "satmae_pp": PlainSatMAEPP}


def plain_step(name: str, batch: int) -> Step:
    model = PLAIN[name]()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.95), weight_decay=0.05)
    side = 96 * (4 if name == "satmae_pp" else 1)
    images = torch.randn(batch, 10, side, side)

    def step() -> None:
        loss = model(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def recipe_of(name: str) -> Recipe:
    text, found = find(name)
    return read_recipe(text, ["data.train=unused", "run.dir=unused"], name=found)


def once(recipe: Recipe, bands: int) -> Step:
    """One forward and backward pass of an image."""
    assert recipe.data.size is not None
    task, size = dict(recipe.objective), recipe.data.size
    backbone = base.create(**{"bands": bands, "image_size": size, **recipe.backbone})
    model = objective.build(task.pop("name"), backbone, (size, size), {"image": bands}, **task)
    ids, side = torch.arange(1), size * model.scale
    batch = Batch({"image": torch.randn(1, bands, side, side)}, {}, ids, ids, torch.ones(1))
    return lambda: model(batch, Draw(0, ids, ids)).numerator.backward()


def flops_of_kept_scores(step: Step) -> int:
    """As `cost.flops`, attention's backward pass counted as twice the forward."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    counted = {
        attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda _, q, k, v, *__, **___: 2 * sdpa_flop_count(q, k, v),
    }
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        step()
    return counter.get_total_flops()


def table() -> list[dict[str, Any]]:
    """Arithmetic of one image, of each objective beside its published form."""
    rows = []
    for name, (bands, published) in TABLE.items():
        step = once(recipe_of(name), bands)
        gflop, run = (round(count(step) / 1e9, 2) for count in (flops_of_kept_scores, cost.flops))
        rows.append({"recipe": name, "published": published, "gflop": gflop, "gflop_run": run})
        print(rows[-1], file=sys.stderr)
    return rows


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Images/s of plain in fp32 and of ours in fp32 and bf16, and ratios pair by pair."""
    make = swath_step(recipe_of(TIMED[name]), 10, 96, args.batch)
    steps = {"plain": plain_step(name, args.batch), "fp32": make("fp32"), "bf16": make("bf16")}
    seconds: dict[str, list[float]] = {which: [] for which in steps}
    for which, step in steps.items():
        print(f"{name}: warm-up {which}: {timed(step):.2f} s", file=sys.stderr)
    for number in range(args.alternations):
        for which, step in steps.items():
            seconds[which].append(timed(step))
        shown = ", ".join(f"{which} {s[-1]:.2f} s" for which, s in seconds.items())
        print(f"{name}: alternation {number + 1}: {shown}", file=sys.stderr)
    ratios = {
        which: [p / o for p, o in zip(seconds["plain"], s, strict=True)] for which, s in seconds.items() if which != "plain"
    }
    return {
        "images_per_second": {which: round(args.batch / statistics.median(s), 3) for which, s in seconds.items()},
        "ratio_to_plain": {
            which: {"median": round(statistics.median(r), 3), "min": round(min(r), 3), "max": round(max(r), 3)}
            for which, r in ratios.items()
        },
        "seconds": {which: [round(x, 4) for x in s] for which, s in seconds.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--alternations", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--time", nargs="*", choices=sorted(TIMED), default=sorted(TIMED), help="objectives to time")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result = {
        "command": " ".join(["python", "-m", "benchmarks.cost", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}",
        "batch": args.batch,
        "flops": table(),
        "steps": {name: compare(name, args) for name in args.time},
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
