"""Masked patches are never copied, embedded or made targets of: no new tensor is as large as all patches would be."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swath.kernels.dispatch import interpreted, use
from swath.kernels.embed import reference as embed_reference
from swath.kernels.embed import visible_patch_embedding
from swath.kernels.patch_loss import masked_patch_loss

BATCH, BANDS, SIDE, PATCH, WIDTH = 4, 3, 32, 4, 40
PLACES, VALUES, KEPT = (SIDE // PATCH) ** 2, BANDS * PATCH**2, 16
MASKED = PLACES - KEPT


class Allocations(TorchDispatchMode):
    """Bytes of the largest storage that an operator made; what it was given, and views of it, do not count."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return made


def largest(call: Callable[[], Tensor]) -> int:
    with Allocations() as allocations:
        call().sum().backward()
    return allocations.largest


@pytest.mark.parametrize("way", ["cpu", "reference"])
def test_embedding_makes_nothing_as_large_as_all_patches(way: str) -> None:
    images, index = torch.randn(BATCH, BANDS, SIDE, SIDE), torch.randint(PLACES, (BATCH, KEPT))
    weight = torch.randn(WIDTH, BANDS, PATCH, PATCH, requires_grad=True)
    with use(visible_patch_embedding=way):
        visible = largest(lambda: visible_patch_embedding(images, weight, None, index))
        assert visible < 4 * BATCH * PLACES * min(VALUES, WIDTH) / 2
        assert largest(lambda: visible_patch_embedding(images, weight)) >= 4 * BATCH * PLACES * VALUES, "else nothing is measured"


@pytest.mark.parametrize("valid", [False, True])
def test_loss_makes_no_target_of_the_whole_image(valid: bool) -> None:
    images, index = torch.randn(BATCH, BANDS, SIDE, SIDE), torch.stack([torch.randperm(PLACES)[:MASKED] for _ in range(BATCH)])
    prediction = torch.randn(BATCH, MASKED, VALUES, requires_grad=True)
    mask = torch.ones(BATCH, 1, SIDE, SIDE, dtype=torch.bool) if valid else None
    most = largest(lambda: masked_patch_loss(prediction, images, index, patch=(PATCH, PATCH), valid_b1hw=mask)[0])
    assert most == 4 * BATCH * MASKED * VALUES < 4 * BATCH * PLACES * VALUES


@pytest.mark.skipif(not interpreted(), reason="needs triton and TRITON_INTERPRET=1")
def test_triton_makes_results_and_partial_sums_only() -> None:
    from swath.kernels.embed import triton as embed
    from swath.kernels.patch_loss import triton as loss

    images, index = torch.randn(2, 2, 8, 8), torch.tensor([[0, 5, 9], [15, 2, 3]])
    weight, grad = torch.randn(5, 2, 2, 2), torch.randn(2, 3, 5)
    assert torch.allclose(
        embed.forward(images, weight, None, index), embed_reference.visible_patch_embedding(images, weight, None, index)
    )
    prediction, outer = torch.randn(2, 3, 8), torch.randn(2, 3)
    made: list[int] = []
    results: list[Tensor] = []
    for call in (
        lambda: embed.forward(images, weight, None, index),
        lambda: embed.backward_weight(grad, images, weight, index),
        lambda: loss.forward(prediction, images, index, (2, 2), True, 1e-6, None)[0],
        lambda: loss.backward(outer, prediction, images, index, outer, outer.abs() + 1, (2, 2), None),
    ):
        created: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

            def noting(make: Callable[..., Tensor], created: list[int] = created) -> Callable[..., Tensor]:
                def made_and_noted(*args: object, **kwargs: object) -> Tensor:
                    tensor = make(*args, **kwargs)
                    created.append(tensor.numel())
                    return tensor

                return made_and_noted

            patch.setattr(torch, "empty", noting(empty))
            patch.setattr(torch, "empty_like", noting(empty_like))
            patch.setattr(Tensor, "new_empty", noting(new_empty))
            results.append(call())
        made.append(max(created))
    assert made == [2 * 3 * 5, 5 * 8, 2 * 3, 2 * 3 * 8] and all(result.isfinite().all() for result in results)
