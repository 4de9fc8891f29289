"""The published MAE graph, written plainly, to measure against: unfused attention, every patch embedded, loss over all patches.

Not a part of swath, and no shortcut of swath is in it. Shapes and hyper-parameters follow He et al. 2022.
"""

import torch
from torch import Tensor, nn


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
