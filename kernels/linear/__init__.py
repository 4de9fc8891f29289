"""x W^T + b. The reference is torch's; training in fp32 on a CPU takes oneDNN's kernels, which are faster and as exact."""

import torch
from torch import Tensor, nn

from swath.kernels.dispatch import Implementation, Operator, everywhere, on_cpu
from swath.kernels.linear import reference
from swath.kernels.linear.cpu import AVAILABLE, linear_cpu

_ROWS = 64  # below this, calling costs more than the product


def _missing(device_type: str) -> str | None:
    return on_cpu(device_type) or (None if AVAILABLE else "this torch has no oneDNN linear operator")


OPERATOR = Operator("linear", Implementation("cpu", _missing), Implementation("reference", everywhere))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, K), weight (N, K), bias (N,) → (…, N), any floating dtype; as `torch.nn.functional.linear`.

    Inference always takes the reference, so that features are the same bits wherever they are computed.
    """
    if _fast(x, weight):
        return linear_cpu(x, weight, bias)
    return reference.linear(x, weight, bias)


def _fast(x: Tensor, weight: Tensor) -> bool:
    return (
        torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.numel() >= _ROWS * x.shape[-1]
        and OPERATOR.choose(x.device) == "cpu"
    )


class Linear(nn.Linear):
    """`torch.nn.Linear` with the dispatch above."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
