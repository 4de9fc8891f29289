"""Patch operators on a GPU: embedding of visible patches, the loss at masked ones, energy of oriented gradients."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.case import Check, Timing
from swath.kernels.dispatch import use
from swath.kernels.embed import reference as plain_embedding
from swath.kernels.embed import visible_patch_embedding
from swath.kernels.hog import hog_energy
from swath.kernels.hog import reference as plain_hog
from swath.kernels.patch_loss import masked_patch_loss
from swath.kernels.patch_loss import reference as plain_loss

# (batch, bands, side, patch, width, kept): MAE B of RGB, of Sentinel-2, of a hyperspectral tile; one that fits no tile
SHAPES = [(128, 3, 224, 16, 768, 49), (128, 13, 224, 16, 768, 49), (64, 200, 64, 8, 768, 16), (3, 5, 98, 14, 200, 37)]
_BYTES_PER_US, _BF16_PER_US, _TF32_PER_US = 4.3e6, 9.9e8, 4.9e8  # an H200
_Shape = tuple[int, int, int, int, int, int]
_Ways = dict[str, Callable[[], Callable[[], object]]]


def _inputs(shape: _Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Images in fp32, as they are trained on; kept and masked places; a prediction in `dtype`; weights."""
    torch.manual_seed(0)
    batch, bands, side, patch, width, kept = shape
    order = torch.rand(batch, (side // patch) ** 2).argsort(dim=1).to(device)
    values = bands * patch**2
    return {
        "images": torch.randn(batch, bands, side, side, device=device),
        "kept": order[:, :kept],
        "masked": order[:, kept:],
        "prediction": torch.randn(batch, order.shape[1] - kept, values, device=device, dtype=dtype).requires_grad_(),
        "weight": (torch.randn(width, bands, patch, patch, device=device) / values**0.5).requires_grad_(),
        "bias": torch.randn(width, device=device, requires_grad=True),
        "valid": torch.rand(batch, 1, side, side, device=device) > 0.2,
    }


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def checks(device: torch.device) -> Iterator[Check]:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            for every in (False, True):
                name = f"embedding {shape} {str(dtype)[6:]}{' all patches' if every else ''}"
                yield Check(name, partial(_embedding_error, shape, device, dtype, every))
            for valid in (False, True):
                name = f"patch loss {shape} {str(dtype)[6:]}{' valid' if valid else ''}"
                yield Check(name, partial(_loss_error, shape, device, dtype, valid))
    yield Check("hog energy", partial(_hog_error, SHAPES[1], device))


def _embedding_error(shape: _Shape, device: torch.device, dtype: torch.dtype, every: bool) -> float:
    """Against float64. Operands of 8 bits make sums of n terms of size s off by 2⁻⁸ s √n; fp32 by a few 2⁻²⁴ of the largest."""
    given = _inputs(shape, device, dtype)
    index = None if every else given["kept"]
    images, weight, bias = tensors = given["images"].requires_grad_(), given["weight"], given["bias"]
    with use(visible_patch_embedding="triton"), _autocast(device, dtype):
        got = visible_patch_embedding(images, weight, bias, index)
    assert got.dtype == dtype
    exact = x, w, b = tuple(t.detach().double().requires_grad_() for t in tensors)
    expected = plain_embedding.visible_patch_embedding(x, w, b, index)
    grad = torch.randn_like(got)
    results = [got, *torch.autograd.grad(got, tensors, grad)]
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    share = 2e-2 if dtype == torch.bfloat16 else 5e-6
    pairs = zip(results, wanted, strict=True)
    return max(float((a - b).detach().abs().max() / (share * b.detach().abs().max())) for a, b in pairs)


def _loss_error(shape: _Shape, device: torch.device, dtype: torch.dtype, valid: bool) -> float:
    """Against float64. Inputs are read exactly and summed in fp32; only the gradient is rounded to the prediction's dtype."""
    given, patch = _inputs(shape, device, dtype), (shape[3], shape[3])
    mask, prediction = given["valid"] if valid else None, given["prediction"]
    with use(masked_patch_loss="triton"), _autocast(device, dtype):
        got = masked_patch_loss(prediction, given["images"], given["masked"], patch=patch, valid_b1hw=mask)
    exact = prediction.detach().double().requires_grad_()
    expected = plain_loss.masked_patch_loss(exact, given["images"].double(), given["masked"], patch=patch, valid_b1hw=mask)
    grad = torch.rand_like(got[0])
    (mine,), (theirs,) = torch.autograd.grad(got[0], prediction, grad), torch.autograd.grad(expected[0], exact, grad.double())
    pairs = zip(got, expected, strict=True)
    errors = [float((a - b).detach().abs().max() / (5e-6 * b.detach().abs().max())) for a, b in pairs]
    share = 2**-7 if dtype == torch.bfloat16 else 5e-6
    return max(*errors, float((mine - theirs).abs().max() / (share * theirs.abs().max())))


def _hog_error(shape: _Shape, device: torch.device) -> float:
    """Against the CPU: a gradient on the border of two orientations may fall to either, a few of the 256 of a patch."""
    images, patch = _inputs(shape, device, torch.float32)["images"][:4], (shape[3], shape[3])
    expected = plain_hog.hog_energy(images.cpu(), patch)
    return float((hog_energy(images, patch).cpu() - expected).abs().max() / (1e-3 * expected.max()))


def timings(device: torch.device) -> Iterator[Timing]:
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES[:3]:
            yield _embedding_timing(shape, device, dtype)
            yield _loss_timing(shape, device, dtype)
    batch, bands, side, patch, *_ = SHAPES[0]

    def hog(energy: Callable[..., Tensor]) -> Callable[[], object]:
        images = torch.randn(batch, bands, side, side, device=device)
        return lambda: energy(images, (patch, patch))

    ways: _Ways = {"ours": lambda: hog(hog_energy), "nine bands at once": lambda: hog(_scattered_energy)}
    yield Timing(f"hog energy {SHAPES[0][:4]}", ways, floor_us=4 * batch * bands * side**2 / _BYTES_PER_US)


def _embedding_timing(shape: _Shape, device: torch.device, dtype: torch.dtype) -> Timing:
    """Forward and the gradients of weight and bias. Floor: two products, or the visible pixels and the result twice."""
    batch, bands, _, patch, width, kept = shape

    def way(embed: Callable[..., Tensor]) -> Callable[[], object]:
        given = _inputs(shape, device, dtype)
        grad = torch.randn(batch, kept, width, device=device, dtype=dtype)

        def run() -> object:
            with _autocast(device, dtype):
                out = embed(given["images"], given["weight"], given["bias"], given["kept"])
            return torch.autograd.grad(out, (given["weight"], given["bias"]), grad)

        return run

    def ours(*tensors: Tensor) -> Tensor:
        with use(visible_patch_embedding="triton"):
            return visible_patch_embedding(*tensors)

    def all_then_gather(images: Tensor, weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
        x_bnd = F.conv2d(images, weight, bias, stride=patch).flatten(2).transpose(1, 2)
        return x_bnd.gather(1, index[..., None].expand(-1, -1, width))

    ways: _Ways = {
        "ours": lambda: way(ours),
        "gather, then linear": lambda: way(plain_embedding.visible_patch_embedding),
        "convolution of all, then gather": lambda: way(all_then_gather),
    }
    rows, values = batch * kept, bands * patch**2
    products = 4 * rows * values * width / (_BF16_PER_US if dtype == torch.bfloat16 else _TF32_PER_US)
    moved = 2 * (4 * rows * values + dtype.itemsize * rows * width) / _BYTES_PER_US
    return Timing(f"embedding {shape} {str(dtype)[6:]} fwd+bwd", ways, floor_us=max(products, moved))


def _loss_timing(shape: _Shape, device: torch.device, dtype: torch.dtype) -> Timing:
    """Forward and the prediction's gradient. Floor: pixels and prediction read twice, the gradient written."""
    batch, bands, side, patch, _, kept = shape

    def way(loss: Callable[..., Tensor]) -> Callable[[], object]:
        given = _inputs(shape, device, dtype)
        prediction, images, masked = given["prediction"], given["images"], given["masked"]
        return lambda: torch.autograd.grad(loss(prediction, images, masked).sum(), prediction)

    def ours(prediction: Tensor, images: Tensor, index: Tensor) -> Tensor:
        with use(masked_patch_loss="triton"):
            return masked_patch_loss(prediction, images, index, patch=(patch, patch))[0]

    def gathered(prediction: Tensor, images: Tensor, index: Tensor) -> Tensor:
        return plain_loss.masked_patch_loss(prediction, images, index, patch=(patch, patch))[0]

    def full_target(prediction: Tensor, images: Tensor, index: Tensor) -> Tensor:
        """The published way of making targets: of all patches; then those that are masked."""
        split = images.view(batch, bands, side // patch, patch, side // patch, patch)
        target = split.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, prediction.shape[2])
        target = (target - target.mean(dim=2, keepdim=True)) / (target.var(dim=2, keepdim=True) + 1e-6).sqrt()
        target = target.gather(1, index[..., None].expand_as(prediction))
        return ((prediction.float() - target) ** 2).mean(dim=2)

    ways: _Ways = {
        "ours": lambda: way(ours),
        "reference": lambda: way(gathered),
        "target of all patches": lambda: way(full_target),
    }
    number = batch * ((side // patch) ** 2 - kept) * bands * patch**2
    floor = number * (2 * 4 + 3 * dtype.itemsize) / _BYTES_PER_US
    return Timing(f"patch loss {shape} {str(dtype)[6:]} fwd+bwd", ways, floor_us=floor)


def _scattered_energy(images_bchw: Tensor, patch: tuple[int, int]) -> Tensor:
    """The published way of making histograms, a plane of the image for each of nine orientations; then our energy."""
    bands = images_bchw.shape[1]
    across = images_bchw.new_tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    padded = F.pad(images_bchw, (1, 1, 1, 1), mode="reflect")
    gx, gy = (F.conv2d(padded, k.expand(bands, 1, 3, 3), groups=bands) for k in (across, across.T))
    plane = (torch.atan2(gx, gy) / torch.pi * 9).floor().long() % 9
    planes_bcohw = gx.new_zeros(*gx.shape[:2], 9, *gx.shape[2:])
    planes_bcohw.scatter_(2, plane[:, :, None], torch.hypot(gx, gy)[:, :, None])
    length = F.avg_pool2d(planes_bcohw.flatten(1, 2), 8).unflatten(1, (bands, 9)).norm(dim=2).mean(dim=1)
    return F.avg_pool2d(length[:, None], (patch[0] // 8, patch[1] // 8)).flatten(1)


def launches() -> Iterator[Callable[[], object]]:
    """Calls on CPU tensors whose kernels are compiled ahead of time, at the sizes of the first two shapes."""
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES[:2]:
            yield partial(_launch, (4, *shape[1:]), dtype)


def _launch(shape: _Shape, dtype: torch.dtype) -> None:
    given, patch = _inputs(shape, torch.device("cpu"), dtype), (shape[3], shape[3])
    images = given["images"]
    with use(visible_patch_embedding="triton", masked_patch_loss="triton"):
        with _autocast(images.device, dtype):
            tokens = visible_patch_embedding(images, given["weight"], given["bias"], given["kept"])
        tokens.sum().backward()
        for valid in (None, given["valid"]):
            error, _, _ = masked_patch_loss(given["prediction"], images, given["masked"], patch=patch, valid_b1hw=valid)
            error.sum().backward()
