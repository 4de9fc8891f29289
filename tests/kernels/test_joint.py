"""Joint attention is the formula, on torch's and on xformers' kernels."""

import pytest
import torch
from torch import Tensor

from swath.kernels.dispatch import use
from swath.kernels.joint import joint_attention, xformers


def _formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    score = q @ k.mT * scale
    if mask is None:
        return score.softmax(-1) @ v
    seen = mask if mask.ndim == 2 else mask[:, None]
    return score.masked_fill(~seen, -1e30).softmax(-1).masked_fill(~seen, 0) @ v


def _inputs(tokens: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, tokens, width, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]


def _mask(kind: str, tokens: int, device: str = "cpu") -> Tensor | None:
    if kind == "none":
        return None
    mask = torch.rand((tokens, tokens) if kind == "shared" else (2, tokens, tokens), device=device) < 0.5
    mask[..., 0, :] = False
    return mask


@pytest.mark.parametrize(("tokens", "width"), [(1, 5), (37, 12), (197, 16)])
@pytest.mark.parametrize("kind", ["none", "shared", "each"])
def test_equals_the_formula_with_gradients(tokens: int, width: int, kind: str) -> None:
    inputs, mask = _inputs(tokens, width), _mask(kind, tokens)
    grad = torch.randn(2, 3, tokens, width)
    got, expected = joint_attention(*inputs, mask=mask, scale=0.3), _formula(*inputs, mask=mask, scale=0.3)
    assert torch.allclose(got, expected, atol=3e-6)
    for mine, theirs in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    if mask is not None:
        assert (got[:, :, 0] == 0).all(), "a row that sees nothing is 0"


def test_gradcheck() -> None:
    inputs = _inputs(5, 3, torch.float64)
    mask = _mask("each", 5)
    assert torch.autograd.gradcheck(lambda *x: joint_attention(*x, mask=mask), inputs)


def test_compile_export_and_autocast() -> None:
    inputs = _inputs(9, 8)
    compiled = torch.compile(joint_attention, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*inputs), joint_attention(*inputs), atol=1e-6)

    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return joint_attention(q, k, v)

    plain = tuple(x.detach() for x in inputs)
    assert torch.allclose(torch.export.export(Layer(), plain).module()(*plain), joint_attention(*plain), atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert joint_attention(inputs[0], inputs[1].bfloat16(), inputs[2]).dtype == torch.bfloat16


def test_empty() -> None:
    assert joint_attention(*[torch.zeros(0, 2, 3, 4)] * 3).shape == (0, 2, 3, 4)
    assert joint_attention(*[torch.zeros(2, 2, 0, 4)] * 3).shape == (2, 2, 0, 4)


def test_errors_name_the_argument() -> None:
    q = torch.zeros(2, 3, 4, 5)
    for wrong, words in (
        ({"q": q[0]}, r"q must be .* \(3, 4, 5\)"),
        ({"k": q[:, :, :2]}, r"k must be as q, \(2, 3, 4, 5\), not \(2, 3, 2, 5\)"),
        ({"v": q.double()}, "v is torch.float64, q is torch.float32"),
        ({"mask": torch.ones(4, 5, dtype=torch.bool)}, r"mask must be bool, \(\[2,\] 4, 4\).*\(4, 5\)"),
        ({"mask": torch.ones(4, 4)}, "mask must be bool"),
        ({"k": q.to("meta")}, "k is on meta, q is on cpu"),
    ):
        with pytest.raises(ValueError, match=words):
            joint_attention(**{"q": q, "k": q, "v": q, **wrong})  # pyright: ignore[reportArgumentType]


def test_xformers_refuses_a_cpu_tensor() -> None:
    with use(joint_attention="xformers"), pytest.raises(ValueError, match="xformers cannot take a tensor on cpu") as error:
        joint_attention(*_inputs(4, 4))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["none", "shared", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xformers_equals_torch(kind: str, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("xformers needs a GPU")
    if (reason := xformers.missing("cuda")) is not None:
        pytest.skip(reason)
    pytest.importorskip("xformers.ops")
    inputs, mask = _inputs(197, 16, dtype, "cuda"), _mask(kind, 197, "cuda")
    grad = torch.randn_like(inputs[0])
    expected = joint_attention(*inputs, mask=mask)
    with use(joint_attention="xformers"):
        got = joint_attention(*inputs, mask=mask)
    # bf16 has 8 bits; shares and gradients are rounded to them at other places in the two
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    assert torch.allclose(got, expected, atol=tolerance)
    for mine, theirs in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        assert torch.allclose(mine, theirs, atol=2 * tolerance)
