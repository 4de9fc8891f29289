"""The selective scan: each implementation equals the reference, forward and every gradient, in whatever order and packing."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swath.kernels.dispatch import use
from swath.kernels.scan import cpu, reference, selective_scan
from swath.kernels.scan.op import OPERATOR

Given = dict[str, Any]  # tensors by argument


def inputs(
    batch: int, length: int, width: int, states: int, groups: int | None = None, directions: int | None = None,
    *, shared: bool = True, sequences: int | None = None, without: tuple[str, ...] = (), dtype: torch.dtype = torch.float64,
) -> Given:  # fmt: skip
    """Random arguments; softplus sees both of its branches."""
    torch.manual_seed(0)
    lead = () if directions is None else (directions,)
    group = () if groups is None else (groups,)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    given = {
        "u": normal(*(() if shared else lead), batch, length, width),
        "delta": normal(*lead, batch, length, width) * 2,
        "A": -torch.rand(*lead, width, states, dtype=torch.float64) - 0.05,
        "B": normal(*lead, batch, length, *group, states),
        "C": normal(*lead, batch, length, *group, states),
        "D": normal(*lead, width),
        "z": normal(batch, length, width),
        "delta_bias": normal(width) + torch.where(torch.arange(width) == 0, 20.0, 0.0),
        "initial_state": normal(*lead, sequences or batch, width, states),
    }
    return {name: value.to(dtype).requires_grad_() for name, value in given.items() if name not in without}


def outcome(way: Callable[..., Any], given: Given, **options: Any) -> dict[str, Tensor]:
    """Result, last state, and every gradient of a random combination of both."""
    y, last = way(**given, delta_softplus=True, return_last_state=True, **options)
    torch.manual_seed(1)
    total = (y * torch.randn(y.shape, dtype=torch.float64).to(y.dtype)).sum()
    total = total + (last * torch.randn(last.shape, dtype=torch.float64).to(last.dtype)).sum()
    grads = torch.autograd.grad(total, list(given.values()))
    return {"y": y.detach(), "last": last.detach()} | {f"grad of {n}": g for n, g in zip(given, grads, strict=True)}


def compare(got: dict[str, Tensor], expected: dict[str, Tensor], share: float) -> None:
    """Differences are within `share` of each tensor's largest value."""
    for name, value in expected.items():
        assert got[name].shape == value.shape and got[name].dtype == value.dtype, name
        worst = (got[name].double() - value.double()).abs().max().item() if value.numel() else 0.0
        assert worst <= share * max(1.0, value.double().abs().max().item() if value.numel() else 0.0), (
            f"{name}: off by {worst:.2e}"
        )


def orders(*shape: int, length: int) -> Tensor:
    return torch.rand(*shape, length).argsort(dim=-1)


CASES: dict[str, tuple[Given, dict[str, Any]]] = {}


def case(name: str, given: Given, **options: Any) -> None:
    CASES[name] = (given, options)


for _length in (1, 16, 37, 197):
    case(f"length {_length}", inputs(2, _length, 6, 4))
case("one of everything", inputs(1, 1, 1, 1))
case("nothing optional", inputs(2, 37, 5, 8, without=("D", "z", "delta_bias", "initial_state")))
for _states in (1, 8, 64):
    case(f"{_states} states", inputs(1, 21, 3, _states))
for _groups in (1, 2, 4):
    case(f"{_groups} groups", inputs(2, 19, 12, 3, _groups))
case("reverse", inputs(2, 37, 6, 4), reverse=True)
case("one order for all", inputs(3, 37, 6, 4), order=orders(length=37).int())
case("an order per sample", inputs(3, 37, 6, 4), order=orders(3, length=37))
case("mask", inputs(3, 37, 6, 4, 2), mask=torch.rand(3, 37) > 0.4)
case("nothing present", inputs(2, 20, 6, 4), mask=torch.zeros(2, 20, dtype=torch.bool))
case("directions", inputs(2, 37, 6, 4, 2, 3))
case("directions apart", inputs(2, 37, 6, 4, None, 2, shared=False), reduce="none")
case("an order per direction", inputs(2, 37, 6, 4, None, 4), order=orders(4, length=37), reverse=True)
case("per direction before per sample", inputs(2, 20, 6, 4, None, 2), order=orders(2, length=20))
case(
    "an order per direction and sample", inputs(3, 21, 6, 4, None, 2), order=orders(2, 3, length=21), mask=torch.rand(3, 21) > 0.5
)
_packing = torch.tensor([0, 3, 3, 24, 41])
case("packed", inputs(1, 41, 6, 4, 3, sequences=4), cu_seqlens=_packing)
case("packed backwards", inputs(1, 41, 6, 4, None, 2, sequences=4), cu_seqlens=_packing.int(), reverse=True,
     mask=torch.rand(1, 41) > 0.3)  # fmt: skip
case("packed in order", inputs(1, 41, 6, 4, sequences=4), cu_seqlens=_packing,
     order=torch.cat([first + torch.randperm(n) for first, n in ((0, 3), (3, 21), (24, 17))]))  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_cpu_equals_the_reference(name: str) -> None:
    given, options = CASES[name]
    # float64, so that what differs is the order of sums only
    compare(outcome(selective_scan, given, **options), outcome(reference.selective_scan, given, **options), 1e-12)


def test_chunks_without_gradients_are_longer_and_give_the_same() -> None:
    given = inputs(2, 197, 6, 4, None, 2)
    with torch.no_grad():
        y: Any = selective_scan(**given)
    again: Any = selective_scan(**given)
    assert torch.equal(y, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions(dtype: torch.dtype) -> None:
    given = inputs(2, 197, 40, 16, 2, dtype=dtype)
    got, expected = outcome(selective_scan, given), outcome(reference.selective_scan, given)
    # both keep an fp32 state; results are rounded once, to half a unit in the last place of the largest value at most
    compare(got, expected, {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype])


def test_a_long_sequence_in_fp32_is_as_exact_as_the_reference() -> None:
    given = inputs(1, 1000, 24, 16, dtype=torch.float32)
    exact = outcome(reference.selective_scan, {n: v.detach().double().requires_grad_() for n, v in given.items()})
    compare({n: v.double() for n, v in outcome(selective_scan, given).items()}, exact, 1e-5)


def test_gradcheck_of_the_reference() -> None:
    given = inputs(2, 5, 4, 2, 2, 2)
    fixed = {
        "delta_softplus": True,
        "order": orders(2, length=5),
        "mask": torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]]).bool(),
    }

    def function(*values: Tensor) -> Any:
        return reference.selective_scan(**dict(zip(given, values, strict=True)), **fixed, return_last_state=True)

    assert torch.autograd.gradcheck(function, tuple(given.values()))


def test_only_some_gradients_and_only_the_last_state() -> None:
    given = inputs(2, 20, 6, 4)
    plain = {name: value.detach() for name, value in given.items()}
    plain["B"].requires_grad_()
    grads = []
    for way in (selective_scan, reference.selective_scan):
        _, last = way(**plain, return_last_state=True)
        grads += torch.autograd.grad(last.sum(), [plain["B"]])
    assert torch.allclose(*grads, atol=1e-12)


def test_what_is_masked_is_not_looked_at() -> None:
    mask = torch.rand(2, 30) > 0.5
    given = inputs(2, 30, 6, 4, without=("initial_state",))
    expected = outcome(selective_scan, given, mask=mask)
    for name in ("u", "delta", "B", "C", "z"):
        given[name] = torch.where(mask[..., None], given[name].detach(), float("nan")).requires_grad_()
    compare(outcome(selective_scan, given, mask=mask), expected, 0.0)
    assert (expected["y"][~mask] == 0).all() and (expected["grad of u"][~mask] == 0).all()


def test_dropped_tokens_are_as_if_they_were_not_there() -> None:
    mask = torch.rand(1, 30) > 0.5
    given = inputs(1, 30, 6, 4)
    kept = {n: (v[:, mask[0]] if n in ("u", "delta", "B", "C", "z") else v).detach().requires_grad_() for n, v in given.items()}
    whole, part = outcome(selective_scan, given, mask=mask), outcome(selective_scan, kept)
    assert torch.allclose(whole["last"], part["last"], atol=1e-12) and torch.allclose(whole["y"][mask], part["y"][0], atol=1e-12)


def test_packing_is_each_sequence_alone() -> None:
    given = inputs(1, 41, 6, 4, sequences=4)
    packed = selective_scan(**given, cu_seqlens=_packing)
    assert isinstance(packed, Tensor)
    for number, (first, end) in enumerate([(0, 3), (3, 3), (3, 24), (24, 41)]):
        alone = {n: v[:, first:end] if n in ("u", "delta", "B", "C", "z") else v for n, v in given.items()}
        alone["initial_state"] = given["initial_state"][number : number + 1]
        assert torch.allclose(packed[:, first:end], selective_scan(**alone), atol=1e-12)  # type: ignore[arg-type]


def test_an_order_is_permuted_copies() -> None:
    order = torch.randperm(37)
    given = inputs(2, 37, 6, 4)
    copies = {n: v[:, order] if n in ("u", "delta", "B", "C", "z") else v for n, v in given.items()}
    visited, copied = selective_scan(**given, order=order), selective_scan(**copies)
    assert isinstance(visited, Tensor) and torch.equal(visited[:, order], copied)  # type: ignore[arg-type]


def test_where_both_fit_an_order_is_per_direction() -> None:
    given, order = inputs(2, 20, 6, 4, None, 2), orders(2, length=20)
    for way in (selective_scan, reference.selective_scan):
        first: Any = way(**given, order=order)
        assert torch.equal(first, way(**given, order=order[:, None].expand(-1, 2, -1)))  # type: ignore[arg-type]


def test_twice_gives_the_same_bits() -> None:
    given = inputs(3, 100, 24, 16, 2, 2, dtype=torch.float32)
    compare(outcome(selective_scan, given), outcome(selective_scan, given), 0.0)


def test_empty_and_constant_input() -> None:
    for shape in ((0, 5), (2, 0)):
        given = inputs(*shape, 6, 4)
        for way in (selective_scan, reference.selective_scan):
            y, last = way(**given, return_last_state=True)
            assert y.shape == (*shape, 6) and torch.equal(last, given["initial_state"])
            (grad,) = torch.autograd.grad(y.sum() + last.sum(), [given["initial_state"]])
            assert (grad == 1).all() and grad.shape == last.shape
    zeros = {name: torch.zeros_like(value).requires_grad_() for name, value in inputs(2, 9, 4, 3).items()}
    compare(outcome(selective_scan, zeros), outcome(reference.selective_scan, zeros), 1e-12)


def canonical(given: Given, **options: Any) -> reference.Scan:
    arguments: dict[str, Any] = dict.fromkeys(inspect.signature(reference.canonical).parameters)
    arguments |= {"reduce": "sum"} | given | options
    return reference.canonical(**arguments)


def test_opcheck() -> None:
    from swath.kernels.scan.op import scan

    given = inputs(2, 17, 4, 3, 2, dtype=torch.float32)
    torch.library.opcheck(scan, (*canonical(given), True, False, True, True))
    given = inputs(1, 9, 4, 3, None, 2, without=("D", "z", "delta_bias"), sequences=2, dtype=torch.float32)
    x = canonical(
        given, order=orders(2, length=9), mask=torch.rand(1, 9) > 0.5, cu_seqlens=torch.tensor([0, 0, 9]), reduce="none"
    )
    torch.library.opcheck(scan, (*x, True, True, False, True))


def test_compile_export_and_autocast() -> None:
    given = inputs(2, 16, 6, 4, None, 2, dtype=torch.float32)
    order = orders(2, length=16)

    class Scan(torch.nn.Module):
        def forward(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor,
                    initial_state: Tensor) -> Any:  # fmt: skip
            return selective_scan(u, delta, A, B, C, D, z, delta_bias, True, order=order, initial_state=initial_state,
                                  return_last_state=True)  # fmt: skip

    compiled = torch.compile(Scan(), fullgraph=True, backend="aot_eager")

    def through(**values: Any) -> Any:
        values = {name: value for name, value in values.items() if name in given}
        return compiled(**values)

    compare(outcome(through, given), outcome(selective_scan, given, order=order), 1e-6)
    plain = {name: value.detach() for name, value in given.items()}
    program = torch.export.export(Scan(), (), plain)
    assert torch.allclose(program.module()(**plain)[0], Scan()(**plain)[0])
    assert any("swath.selective_scan" in str(node.target) for node in program.graph.nodes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Scan()(**plain)[0].dtype == torch.float32, "each input keeps its dtype"
        assert Scan()(**plain | {"u": plain["u"].bfloat16()})[0].dtype == torch.bfloat16


def test_forced_implementations() -> None:
    given = inputs(2, 9, 4, 3, dtype=torch.float32)
    with use(selective_scan="reference"):
        compare(outcome(selective_scan, given), outcome(reference.selective_scan, given), 0.0)
    with use(selective_scan="mamba_ssm"), pytest.raises(ValueError, match="mamba_ssm cannot take a tensor on cpu"):
        selective_scan(**given)
    with pytest.raises(ValueError, match="there is no implementation 'fastest'"), use(selective_scan="fastest"):
        pass


NO_MAMBA = OPERATOR.implementations["mamba_ssm"].missing("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(NO_MAMBA is not None, reason=f"mamba_ssm: {NO_MAMBA}")
@pytest.mark.parametrize("without", [(), ("D", "z", "delta_bias")])
def test_mamba_ssm_equals_the_reference(without: tuple[str, ...]) -> None:
    given = inputs(2, 197, 64, 16, 1, without=("initial_state", *without), dtype=torch.float32)
    given = {name: value.detach().cuda().requires_grad_() for name, value in given.items()}
    with use(selective_scan="mamba_ssm"):
        y: Any = selective_scan(**given, delta_softplus=True, order=torch.randperm(197, device="cuda"))
    assert y.shape == given["u"].shape
    with use(selective_scan="mamba_ssm"):
        got = outcome_of_y(selective_scan, given)
    compare(got, outcome_of_y(reference.selective_scan, given), 2e-5)  # its exponentials are approximate


def outcome_of_y(way: Callable[..., Any], given: Given) -> dict[str, Tensor]:
    """As `outcome`, without the last state, for which mamba-ssm has no gradient."""
    y = way(**given, delta_softplus=True)
    grads = torch.autograd.grad(y.square().sum(), list(given.values()))
    return {"y": y.detach()} | {f"grad of {n}": g for n, g in zip(given, grads, strict=True)}


GOOD = inputs(2, 9, 4, 3, 2)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "u of another length": ({"u": torch.zeros(2, 8, 4)}, r"u must be \(2, 9, 4\) where delta is \(2, 9, 4\), not \(2, 8, 4\)"),
    "delta without batch": ({"delta": torch.zeros(9, 4)}, r"delta must be \(B, L, D\) where A is \(4, 3\), not \(9, 4\)"),
    "A of one dimension": ({"A": torch.zeros(4)}, r"A must be \(D, N\), or \(K, D, N\)"),
    "A of another width": ({"A": torch.zeros(5, 3)}, r"A must be \(4, 3\)"),
    "C unlike B": ({"C": torch.zeros(2, 9, 3)}, r"B \(2, 9, 2, 3\) and C \(2, 9, 3\) must have one shape"),
    "groups that do not divide": ({"B": torch.zeros(2, 9, 3, 3)}, "3 groups, which do not divide the 4 channels"),
    "D": ({"D": torch.zeros(3)}, r"D must be \(4,\)"),
    "z": ({"z": torch.zeros(9, 4)}, r"z must be \(2, 9, 4\)"),
    "delta_bias": ({"delta_bias": torch.zeros(1)}, "delta_bias must be"),
    "an integer u": ({"u": torch.zeros(2, 9, 4, dtype=torch.int64)}, "u must be floating point, not torch.int64"),
    "another device": ({"z": torch.zeros(2, 9, 4, device="meta")}, "z is on meta, u on cpu"),
    "initial_state": ({"initial_state": torch.zeros(1, 4, 3)}, r"initial_state must be \(2, 4, 3\)"),
    "mask of floats": ({"mask": torch.ones(2, 9)}, "mask must be bool"),
    "mask of another shape": ({"mask": torch.ones(9, dtype=torch.bool)}, r"mask must be bool \(2, 9\)"),
    "order of floats": ({"order": torch.arange(9.0)}, "order must be int32 or int64"),
    "order of another length": ({"order": torch.arange(8)}, r"order must be \(9,\) or \(2, 9\), not \(8,\)"),
    "order out of range": ({"order": torch.arange(1, 10)}, "order must be in 0 … 8, but has 1 … 9"),
    "order below range": ({"order": torch.arange(-1, 8)}, "order must be in 0 … 8, but has -1 … 7"),
    "order that repeats": ({"order": torch.zeros(9, dtype=torch.int64)}, "visit each of the 9 places once"),
    "packing of a batch": ({"cu_seqlens": torch.tensor([0, 9])}, "packs sequences into a batch of 1"),
    "reduce": ({"reduce": "mean"}, "reduce must be 'sum' or 'none'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_bad_arguments(name: str, implementation: str) -> None:
    wrong, message = BAD[name]
    with use(selective_scan=implementation), pytest.raises(ValueError, match=message):
        selective_scan(**GOOD | wrong)


def test_an_order_must_stay_within_its_sequence() -> None:
    given = inputs(1, 9, 4, 3, without=("initial_state",))
    with pytest.raises(ValueError, match="order must stay within each sequence"):
        selective_scan(**given, cu_seqlens=torch.tensor([0, 4, 9]), order=torch.arange(9).flip(0))


@pytest.mark.parametrize("ends", [[0, 5], [1, 9], [0, 6, 4, 9], [-2, 9], [0, 12, 9]])
def test_bad_packings(ends: list[int]) -> None:
    given = inputs(1, 9, 4, 3, without=("initial_state",))
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the length 9"):
        selective_scan(**given, cu_seqlens=torch.tensor(ends))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


def test_the_states_of_all_steps_are_never_there_at_once() -> None:
    given = inputs(8, 196, 384, 16, dtype=torch.float32)
    x = canonical({n: given[n].detach() for n in ("u", "delta", "A", "B", "C")})
    with Largest() as seen:
        y, _, kept = cpu.forward(x, True, False, True, True)
        cpu.backward(x, True, False, True, kept, y, None)
    assert seen.elements <= 8 * 196 * 384 * 16 / 8
