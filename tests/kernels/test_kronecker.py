"""Kronecker attention without its product equals the formula with it, and the published block."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from swath.kernels.dispatch import use
from swath.kernels.kronecker import fold, kronecker_attention, op, reference
from tests.parity import fixtures

# B, R, H, C, N, dc, ds, Dout; each way is the cheapest of one of them
SHAPES = [
    (2, 1, 3, 5, 37, 4, 6, 10),
    (1, 8, 2, 4, 9, 2, 3, 7),
    (3, 2, 2, 13, 20, 3, 8, 33),
    (2, 3, 1, 1, 1, 2, 2, 1),
    (1, 1, 2, 3, 197, 4, 16, 48),
]
WAYS = ["positions", "channels", "product"]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """qc, kc, vc, qs, ks, vs, weight, bias."""
    torch.manual_seed(0)
    b, r, h, c, n, dc, ds, width = shape
    branch = [s for length, d in ((c, dc), (n, ds)) for s in ((b, r, h, length, d), (b, r, h, length, d), (b, h, length, d))]
    made = [torch.randn(s, dtype=dtype) for s in (*branch, (width, h * dc * ds), (width,))]
    made[6] /= (h * dc * ds) ** 0.5
    return [x.requires_grad_() for x in made]


def _mask(kind: str, batch: int, length: int) -> Tensor | None:
    if kind == "none":
        return None
    mask = torch.rand((length, length) if kind == "shared" else (batch, length, length)) < 0.5
    mask[..., 0, :] = False
    return mask


def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "_SMALLEST", 1)
    monkeypatch.setattr(fold, "_PIECE", {"cpu": 600, "gpu": 600})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["none", "shared", "each"])
def test_equals_the_reference_with_gradients(shape: tuple[int, ...], kind: str) -> None:
    inputs, mask, mask_c = _inputs(shape), _mask(kind, shape[0], shape[4]), _mask(kind, shape[0], shape[3])
    got = kronecker_attention(*inputs, mask=mask, mask_c=mask_c, scale_c=0.4, scale_s=0.3)
    expected = reference.kronecker_attention(*inputs, mask=mask, mask_c=mask_c, scale_c=0.4, scale_s=0.3)
    grad = torch.randn_like(expected)
    assert torch.allclose(got, expected, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=5e-5)
    if mask is not None:
        assert torch.allclose(got[:, :, 0], inputs[7].expand_as(got[:, :, 0])), "of a row that sees nothing the bias is left"
        assert torch.allclose(got[:, 0], inputs[7].expand_as(got[:, 0])), "of a channel that sees none too"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_each_way_in_pieces_and_whole(way: str, small: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "plan", lambda *_: way)
    if small:
        _small_pieces(monkeypatch)
    b, r, h, c, n, dc, ds, width = shape
    torch.manual_seed(0)
    oc, os = torch.randn(b, r, h, c, dc, dtype=torch.float64), torch.randn(b, r, h, n, ds, dtype=torch.float64)
    weight, bias = torch.randn(width, h * dc * ds, dtype=torch.float64), torch.randn(width, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (oc, os, weight, bias)]
    count = len(list(fold.pieces(oc, os, width, way)))
    assert count > 1 if small and oc.numel() > 10 else count == 1
    expected = F.linear(torch.einsum("brhic,brhjs->bijhcs", oc, os).flatten(3), weight, bias)
    got = op.kronecker_projection(*inputs, False)
    grad = torch.randn_like(expected)
    assert torch.allclose(got, expected)
    for mine, theirs in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        assert torch.allclose(mine, theirs)


def test_the_plan_takes_the_cheapest() -> None:
    def plan(r: int, c: int, n: int, dc: int, fused: bool = False) -> str:
        return fold.plan(torch.empty(8, r, 12, c, dc), torch.empty(8, r, 12, n, 16), 768, fused)

    assert fold.arithmetic(torch.Size((1, 1, 12, 200, 4)), torch.Size((1, 1, 12, 64, 16)), 768) == {
        "positions": 64 * 768 * 768 + 12800 * 48 * 768,
        "channels": 200 * 768 * 768 + 12800 * 192 * 768,
        "product": 12800 * 768 * 769,
    }
    assert plan(1, 200, 64, 4) == "positions" and plan(1, 13, 256, 4) in ("positions", "channels")
    assert plan(64, 13, 256, 4) == "product", "a rank above the factors' widths"
    assert plan(8, 13, 256, 4, fused=True) == "product", "the tile writes nothing in between"


class _Largest(TorchDispatchMode):
    """Remembers the most numbers that any tensor made within had."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, Tensor):
                self.most = max(self.most, x.untyped_storage().nbytes() // x.element_size())
        return made


@pytest.mark.parametrize("way", WAYS)
def test_the_product_is_never_held(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    b, _, h, c, n, dc, ds, _ = shape = (2, 2, 4, 20, 100, 4, 8, 32)
    product = c * n * h * dc * ds  # of one sample
    inputs = _inputs(shape)
    oc, os, weight, bias = (x.detach() for x in (inputs[0], inputs[3], inputs[6], inputs[7]))
    with _Largest() as forward:
        y = fold.forward(oc, os, weight, bias, way)
    with _Largest() as backward:
        fold.backward(torch.ones_like(y), oc, os, weight, way)
    assert forward.most == y.numel() < product and backward.most <= y.numel()
    monkeypatch.setattr(fold, "plan", lambda *_: way)
    with _Largest() as everything:  # the branches too; this sees the operator from outside
        kronecker_attention(*inputs).sum().backward()
    assert everything.most <= y.numel()
    with _Largest() as formula:
        reference.kronecker_attention(*inputs)
    assert formula.most >= b * product, "the measure sees a product where there is one"


def test_gradcheck_of_the_reference_and_of_the_operator() -> None:
    inputs = _inputs((2, 2, 2, 3, 4, 2, 2, 3), torch.float64)
    call = functools.partial(reference.kronecker_attention, mask=_mask("each", 2, 4))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *x: kronecker_attention(*x), inputs, fast_mode=True)


def test_opcheck() -> None:
    inputs = _inputs((2, 2, 2, 3, 4, 2, 2, 3))
    oc, os, weight, bias = (inputs[i] for i in (0, 3, 6, 7))
    torch.library.opcheck(op.kronecker_projection, (oc, os, weight, bias, False))
    torch.library.opcheck(op.kronecker_projection, (oc, os.detach(), weight, None, False))


def test_compile_and_export() -> None:
    inputs = _inputs((2, 1, 2, 5, 7, 4, 4, 12))

    class Layer(torch.nn.Module):
        def forward(self, *x: Tensor) -> Tensor:
            return kronecker_attention(*x)

    compiled, expected = torch.compile(Layer(), fullgraph=True, backend="aot_eager")(*inputs), Layer()(*inputs)
    assert torch.allclose(compiled, expected, atol=1e-6)
    grad = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(compiled, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-5)
    plain = tuple(x.detach() for x in inputs)
    assert torch.allclose(torch.export.export(Layer(), plain).module()(*plain), expected, atol=1e-6)


def test_bf16_and_autocast() -> None:
    inputs = _inputs((2, 1, 3, 5, 37, 4, 6, 10))
    rounded = [x.bfloat16() for x in inputs]
    exact = reference.kronecker_attention(*(x.float() for x in rounded))
    # bf16 has 8 bits: the branches, the folded weight and the result are rounded, each to 2^-9 of values of about 2
    assert torch.allclose(kronecker_attention(*rounded).float(), exact, atol=3e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = kronecker_attention(*inputs)
    assert mixed.dtype == torch.bfloat16 and torch.allclose(mixed.float(), exact, atol=3e-2)
    grad = torch.randn(mixed.shape)
    mine = torch.autograd.grad(mixed, inputs, grad.bfloat16())
    for one, other in zip(mine, torch.autograd.grad(reference.kronecker_attention(*inputs), inputs, grad), strict=True):
        assert one.dtype == torch.float32 and (one - other).norm() <= 3e-2 * other.norm().clamp(min=1e-2)


def test_operations_are_counted() -> None:
    inputs = _inputs((2, 1, 2, 5, 7, 4, 4, 12))
    with FlopCounterMode(display=False) as counter:
        op.kronecker_projection(inputs[0], inputs[3], inputs[6], inputs[7], False).sum().backward()
    least = min(fold.arithmetic(inputs[0].shape, inputs[3].shape, 12).values())
    assert counter.get_total_flops() == 3 * 2 * least


def test_empty() -> None:
    for shape in ((0, 1, 2, 3, 4, 2, 2, 5), (2, 1, 2, 0, 4, 2, 2, 5), (2, 1, 2, 3, 0, 2, 2, 5)):
        inputs = _inputs(shape)
        y = kronecker_attention(*inputs)
        assert y.shape == (shape[0], shape[3], shape[4], 5)
        y.sum().backward()
        assert inputs[6].grad is not None and (inputs[6].grad == 0).all()


def test_errors_name_the_argument() -> None:
    names = ("qc", "kc", "vc", "qs", "ks", "vs", "weight", "bias")
    fine = dict(zip(names, (x.detach() for x in _inputs((2, 3, 2, 4, 5, 2, 3, 7))), strict=True))
    for wrong, words in (
        ({"qc": fine["qc"][0]}, r"qc must be \(B, R, H, length, width\), not \(3, 2, 4, 2\)"),
        ({"ks": fine["qc"]}, r"ks must be as qs, \(2, 3, 2, 5, 3\), not \(2, 3, 2, 4, 2\)"),
        ({"vc": fine["vs"]}, r"vc must be \(2, 2, 4, 2\).*not \(2, 2, 5, 3\)"),
        ({"qs": fine["qs"][:, :1], "ks": fine["ks"][:, :1]}, r"qc and qs must agree .* \(2, 3, 2, 4, 2\) and \(2, 1, 2, 5, 3\)"),
        ({"weight": fine["weight"][:, :5]}, r"weight must be \(Dout, 12\).*not \(7, 5\)"),
        ({"bias": fine["bias"][:3]}, r"bias must be \(7,\).*not \(3,\)"),
        ({"mask": torch.ones(4, 4, dtype=torch.bool)}, r"mask must be bool, \(\[2,\] 5, 5\), not torch.bool \(4, 4\)"),
        ({"mask_c": torch.ones(5, 5)}, r"mask_c must be bool, \(\[2,\] 4, 4\), not torch.float32 \(5, 5\)"),
        ({"weight": fine["weight"].double()}, "weight is torch.float64, qc is torch.float32"),
        ({"vs": fine["vs"].to("meta")}, "vs is on meta, qc is on cpu"),
    ):
        with pytest.raises(ValueError, match=words):
            kronecker_attention(**{**fine, **wrong})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("implementation", ["fold", "reference"])
def test_the_published_block(implementation: str) -> None:
    folder = fixtures.ROOT / "less_low_rank_block"
    if not folder.exists():
        pytest.skip(f"there is no fixture {folder.name}")
    fixture = fixtures.read(folder)
    heads, rank = fixture.config["num_heads"], fixture.config["rank"]
    state = {k: v.requires_grad_(v.is_floating_point()) for k, v in fixture.part("state").items()}
    out = fixture.part("out")

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def branch(name: str) -> tuple[Tensor, Tensor, Tensor]:
        x_ble = norm(out[f"pooled_{name}"], f"{name}_norm")
        qk = linear(x_ble, f"attn.{name}_branch.qk").unflatten(-1, (2, heads, rank, -1)).permute(2, 0, 4, 3, 1, 5)
        return qk[0], qk[1], linear(x_ble, f"attn.{name}_branch.v").unflatten(-1, (heads, -1)).transpose(1, 2)

    with use(kronecker_attention=implementation):
        got = kronecker_attention(
            *branch("channel"), *branch("spatial"), state["attn.proj.weight"], state["attn.proj.bias"],
            mask=out["perception_mask"].bool(),
        )  # fmt: skip
    tensors = fixture.meta["tensors"]
    assert torch.allclose(got, out["attn"], rtol=0, atol=tensors["out.attn"]["atol"])
    x = fixture.tensors["in.x"] + got
    y = x + linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")
    assert torch.allclose(y, out["y"], rtol=0, atol=tensors["out.y"]["atol"])
    (y * fixture.tensors["in.grad_out"]).sum().backward()
    checked = [n for n in state if n.startswith(("attn.", "channel_norm.", "spatial_norm."))]
    assert len(checked) == 14
    for name in checked:
        grad = state[name].grad
        assert grad is not None
        assert torch.allclose(grad, fixture.tensors[f"grad.{name}"], rtol=0, atol=tensors[f"grad.{name}"]["atol"]), name
