"""Training steps of a recipe beside a plain re-implementation of the published graph, alternating in one process.

    python benchmarks/step.py mae_vit_base --batch 16 --out benchmarks/results/step_mae_vit_base.json

A step is forward, backward and optimiser. Figures are images/s (median) and the ratio swath / plain pair by pair, so that a
busy machine slows both alike. Plain runs in fp32 with torch's default AdamW, as published on a CPU; swath in fp32 and in bf16,
and `auto_picks` says which of them is the default precision here. Peak memory is that of a fresh process after three steps.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swath.backbones import base
from swath.launch.recipes import find
from swath.pretrain import objective, precision
from swath.pretrain.config import read_recipe
from swath.pretrain.optimizer import adamw
from swath.shards.draw import Draw
from swath.shards.prepare import Batch

Step = Callable[[], None]


# The published graph, written plainly: unfused attention, every patch embedded, loss over all patches. No shortcut of swath is
# in it; shapes and hyper-parameters follow He et al. 2022.


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)) * (d // self.heads) ** -0.5
        x = x + self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, d))
        return x + self.mlp(self.norm2(x))


class PlainMAE(nn.Module):
    def __init__(
        self, *, bands: int, size: int, patch: int, width: int, depth: int, heads: int, decoder_width: int, decoder_depth: int,
        decoder_heads: int, mask_ratio: float, normalise_patches: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch, self.mask_ratio, self.normalise = patch, mask_ratio, normalise_patches
        count = (size // patch) ** 2
        self.embed = nn.Conv2d(bands, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, count + 1, width) * 0.02, requires_grad=False)
        self.blocks = nn.ModuleList([PlainBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.to_decoder = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_position = nn.Parameter(torch.randn(1, count + 1, decoder_width) * 0.02, requires_grad=False)
        self.decoder = nn.ModuleList([PlainBlock(decoder_width, decoder_heads) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.predict = nn.Linear(decoder_width, patch**2 * bands)

    def patchify(self, images: Tensor) -> Tensor:
        b, c, h, w = images.shape
        p = self.patch
        x = images.reshape(b, c, h // p, p, w // p, p)
        return torch.einsum("nchpwq->nhwpqc", x).reshape(b, (h // p) * (w // p), p * p * c)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position[:, 1:]
        b, n, d = x.shape
        keep = int(n * (1 - self.mask_ratio))
        shuffle = torch.rand(b, n, device=x.device).argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        x = torch.gather(x, 1, shuffle[:, :keep, None].repeat(1, 1, d))
        mask = torch.ones(b, n, device=x.device)
        mask[:, :keep] = 0
        mask = torch.gather(mask, 1, restore)
        x = torch.cat([(self.cls + self.position[:, :1]).expand(b, -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.to_decoder(self.norm(x))
        filled = torch.cat([x[:, 1:], self.mask_token.repeat(b, n - keep, 1)], dim=1)
        filled = torch.gather(filled, 1, restore[..., None].repeat(1, 1, x.shape[2]))
        x = torch.cat([x[:, :1], filled], dim=1) + self.decoder_position
        for block in self.decoder:
            x = block(x)
        prediction = self.predict(self.decoder_norm(x))[:, 1:]
        target = self.patchify(images)
        if self.normalise:
            target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6) ** 0.5
        loss = ((prediction - target) ** 2).mean(dim=-1)
        return (loss * mask).sum() / mask.sum()


def swath_step(recipe: Any, bands: int, size: int, batch: int) -> Callable[[precision.Precision], Step]:
    """The trainer's arithmetic on blank data: masks from draws, forward, backward, fused AdamW."""
    task = dict(recipe.objective)
    backbone = base.create(**{"bands": bands, "image_size": size, **recipe.backbone})
    model = objective.build(task.pop("name"), backbone, (size, size), {"image": bands}, **task)
    optimizer = adamw(model, weight_decay=0.05, betas=(0.9, 0.95))
    images = torch.randn(batch, bands, size * model.scale, size * model.scale)
    ids = torch.arange(batch)
    visit = [0]

    def make(chosen: precision.Precision) -> Step:
        def step() -> None:
            visit[0] += 1
            visits = torch.full_like(ids, visit[0])
            with precision.autocast(chosen, images.device):
                outcome = model(Batch({"image": images}, {}, ids, visits, torch.ones(batch)), Draw(0, ids, visits))
            (outcome.numerator / batch).backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            optimizer.grad_scale = outcome.weight / batch  # type: ignore[attr-defined]
            optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return make


def plain_step(recipe: Any, bands: int, size: int, batch: int) -> Step:
    entry = base.registry.configure(**{"bands": bands, "image_size": size, **recipe.backbone})
    task = objective.registry.configure(**recipe.objective)
    model = PlainMAE(
        bands=bands, size=size, patch=entry.patch, width=entry.width, depth=entry.depth, heads=entry.heads,
        decoder_width=task.decoder_width, decoder_depth=task.decoder_depth, decoder_heads=task.decoder_heads,
        mask_ratio=task.mask_ratio, normalise_patches=task.normalise_patches,
    )  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.95), weight_decay=0.05)
    images = torch.randn(batch, bands, size, size)

    def step() -> None:
        loss = model(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def timed(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def peak_memory(which: str, args: argparse.Namespace) -> float:
    """MiB of peak resident set of a fresh process after three steps."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (which, args))


def _peak(which: str, args: argparse.Namespace) -> float:
    torch.set_num_threads(args.threads)
    step = build(which, args)
    for _ in range(3):
        step()
    # not getrusage: its maximum is inherited from the parent
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def build(which: str, args: argparse.Namespace) -> Step:
    recipe = recipe_of(args)
    if which == "plain":
        return plain_step(recipe, args.bands, args.size, args.batch)
    return swath_step(recipe, args.bands, args.size, args.batch)("bf16" if which == "bf16" else "fp32")


def recipe_of(args: argparse.Namespace) -> Any:
    text, name = find(args.recipe)
    return read_recipe(text, ["data.train=unused", "run.dir=unused"], name=name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--bands", type=int, default=3)
    parser.add_argument("--alternations", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    recipe = recipe_of(args)
    make = swath_step(recipe, args.bands, args.size, args.batch)
    steps = {"plain": plain_step(recipe, args.bands, args.size, args.batch), "fp32": make("fp32"), "bf16": make("bf16")}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        print(f"warm-up {name}: {timed(step):.2f} s", file=sys.stderr)
    for number in range(args.alternations):
        for name, step in steps.items():
            seconds[name].append(timed(step))
        print(f"alternation {number + 1}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items()), file=sys.stderr)
    pick, gain = precision.choose(torch.device("cpu"), make_pass(recipe, args))
    result = {
        "command": " ".join(["python", "benchmarks/step.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}",
        "images_per_second": {n: round(args.batch / statistics.median(s), 3) for n, s in seconds.items()},
        "ratio_to_plain": {
            n: {
                "median": round(statistics.median(p / o for p, o in zip(seconds["plain"], s, strict=True)), 3),
                "min": round(min(p / o for p, o in zip(seconds["plain"], s, strict=True)), 3),
                "max": round(max(p / o for p, o in zip(seconds["plain"], s, strict=True)), 3),
            }
            for n, s in seconds.items()
            if n != "plain"
        },
        "auto_picks": pick,
        "auto_gain": round(gain, 3),
        "peak_memory_mib": {name: round(peak_memory(name, args)) for name in steps},
        "seconds": {n: [round(x, 4) for x in s] for n, s in seconds.items()},
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def make_pass(recipe: Any, args: argparse.Namespace) -> Step:
    """Forward and backward alone, what `auto` measures."""
    task = dict(recipe.objective)
    backbone = base.create(**{"bands": args.bands, "image_size": args.size, **recipe.backbone})
    model = objective.build(task.pop("name"), backbone, (args.size, args.size), {"image": args.bands}, **task)
    ids = torch.arange(args.batch)
    batch = Batch({"image": torch.zeros(args.batch, args.bands, args.size, args.size)}, {}, ids, ids, torch.ones(args.batch))

    def step() -> None:
        model(batch, Draw(0, ids, ids)).numerator.backward()

    return step


if __name__ == "__main__":
    sys.exit(main())
