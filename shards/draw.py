"""Every random choice that touches a sample (DESIGN §2.4): a pure function of who is asking, not of when or where.

The generator is counter-based: the key (seed, sample id, visit, stream name, index) is folded through SplitMix64's
finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) in wrapping 64-bit arithmetic.
"""

import torch
from torch import Tensor

from swath.shards.identity import hash_text

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def signed(value: int) -> int:
    """The 64-bit pattern of `value` as torch's int64 holds it."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on an int64 tensor of any shape: a bijection whose every output bit depends on every input."""
    x = x + signed(_GOLDEN)
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * signed(_MIX1)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * signed(_MIX2)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def hashes(seed: int, stream: str, first: int, count: int) -> Tensor:
    """(count,) int64: the hash of (seed, stream, index) for index first .. first + count - 1."""
    key = mix(mix(torch.tensor(signed(seed))) ^ hash_text(stream))
    return mix(torch.arange(first, first + count) ^ key)


class Draw:
    """Draws of a batch of samples. `ids` and `visits` are (B,) int64; results are on their device."""

    def __init__(self, seed: int, ids: Tensor, visits: Tensor) -> None:
        key = mix(torch.tensor(signed(seed), device=ids.device))
        self._key_b = mix(mix(ids ^ key) ^ visits)

    def uniform(self, stream: str, n: int) -> Tensor:
        """(B, n) float32 in [0, 1): the top 24 bits of each hash times 2^-24."""
        key_b1 = mix(self._key_b ^ hash_text(stream))[:, None]
        bits_bn = mix(torch.arange(n, device=key_b1.device)[None] ^ key_b1)
        return ((bits_bn >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24

    def order(self, stream: str, n: int) -> Tensor:
        """(B, n) int64: a permutation of 0 .. n-1 per sample, the stable argsort of `uniform`."""
        return self.uniform(stream, n).argsort(dim=1, stable=True)

    def choose(self, stream: str, scores: Tensor, k: int) -> Tensor:
        """(B, k) int64: k different columns of `scores` (B, n) per sample, each next one drawn with odds that are its score.

        Exponential races (Efraimidis and Spirakis 2006), in float64. What is not above 0, or not a number, comes after the rest.
        """
        odds_bn = torch.nan_to_num(scores.double(), nan=0.0, neginf=0.0).clamp_min(0)
        wait_bn = -torch.log1p(-(self.uniform(stream, scores.shape[1]).double() + 2.0**-25))
        last_bn = torch.where(odds_bn > 0, 0.0, 1.0)
        race_bn = wait_bn / torch.where(odds_bn > 0, odds_bn, 1.0)
        # those with odds first, each part by its race: two stable sorts
        order_bn = race_bn.argsort(dim=1, stable=True)
        order_bn = order_bn.gather(1, last_bn.gather(1, order_bn).argsort(dim=1, stable=True))
        return order_bn[:, :k]
