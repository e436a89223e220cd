"""The branch against its equations in float64, and what it promises a training loop: memory, dtypes, transforms."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from headstart.lora.branch import add_branch, linear, product

# Norm of the error over the norm of the value: a few roundings of each dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
DTYPES = list(TOLERANCE)
SCALING = 0.7
KINDS = [{}, {"bias": True, "anchored": True}, {"dora": True}, {"dora": True, "bias": True}]


@dataclass(frozen=True)
class Layer:
    """The arguments of `linear` for a random layer, DoRA's and the anchor left out where they are None."""

    W: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor | None = None
    frozen: tuple[Tensor, Tensor] | None = None
    magnitude: Tensor | None = None
    norm: Tensor | None = None
    transposed: bool = False

    def __call__(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        weight = self.W.t().contiguous() if self.transposed else self.W
        options: dict[str, Any] = {"frozen": self.frozen, "dropout": dropout, "transposed": self.transposed}
        return linear(
            x, weight, self.bias, self.A, self.B, SCALING, magnitude=self.magnitude, norm=self.norm, **options
        )

    def leaves(self) -> dict[str, Tensor]:
        named = {"A": self.A, "B": self.B, "bias": self.bias, "magnitude": self.magnitude}
        return {name: leaf for name, leaf in named.items() if leaf is not None}

    def oracle(self, x: Tensor, kept: Tensor | float = 1.0) -> Tensor:
        """The equations, dense. `kept` is the dropout mask over its mean."""
        change = self.B @ self.A
        if self.frozen is not None:
            change = change - self.frozen[1] @ self.frozen[0]
        y = x @ self.W.T + SCALING * (x * kept) @ change.T
        if self.magnitude is not None and self.norm is not None:
            y = y * torch.where(self.norm == 0, torch.ones_like(self.norm), self.magnitude / self.norm.clamp(min=1e-30))
        return y if self.bias is None else y + self.bias

    def double(self) -> Layer:
        """An independent float64 copy whose leaves ask for gradients."""

        def wide(t: Tensor | None, leaf: bool = True) -> Any:
            return None if t is None else t.detach().double().requires_grad_(leaf)

        frozen = None if self.frozen is None else (wide(self.frozen[0], False), wide(self.frozen[1], False))
        A, B, bias, magnitude = wide(self.A), wide(self.B), wide(self.bias), wide(self.magnitude)
        return Layer(wide(self.W, False), A, B, bias, frozen, magnitude, wide(self.norm, False), self.transposed)


def layer(
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    m: int = 24,
    n: int = 20,
    r: int = 4,
    bias: bool = False,
    anchored: bool = False,
    dora: bool = False,
    transposed: bool = False,
) -> Layer:
    """A layer whose factors are float32 masters (float64 in a float64 layer) and ask for gradients."""
    master = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = master) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    made = Layer(normal(m, n, dtype=dtype), normal(r, n), normal(m, r), transposed=transposed)
    if bias:
        made = replace(made, bias=normal(m, dtype=dtype).requires_grad_())
    if anchored:
        made = replace(made, frozen=(normal(r, n), normal(m, r)))
    if dora:
        made = replace(made, magnitude=(1 + normal(m).abs()).requires_grad_(), norm=1 + normal(m).abs())
    made.A.requires_grad_()
    made.B.requires_grad_()
    return made


def tokens(made: Layer, *shape: int) -> Tensor:
    n = made.A.shape[1]
    return torch.randn(*shape, n, device=made.W.device, dtype=made.W.dtype, requires_grad=True)


def kept_by(seed: int, x: Tensor, p: float) -> Tensor:
    """d(x)/x: what dropout does from this seed, seen through a branch that is the identity."""
    n = x.shape[-1]
    eye = torch.eye(n, device=x.device, dtype=torch.float64)
    torch.manual_seed(seed)
    return linear(torch.ones(x.shape).to(eye), torch.zeros_like(eye), None, eye, eye, 1.0, dropout=p)


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def gradients(y: Tensor, leaves: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype)), strict=True))


def saved_storages(run: Any) -> dict[int, int]:
    """Address -> bytes of everything that autograd keeps for the backward of `run`."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return storages


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchored"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients_are_the_equations(dtype, bias, anchored, dora, dropout, transposed, device):
    made = layer(dtype, device, bias=bias, anchored=anchored, dora=dora, transposed=transposed)
    for shape in [(7,), (3, 16)]:
        x = tokens(made, *shape)
        kept = kept_by(5, x, dropout)
        torch.manual_seed(5)
        y = made(x, dropout)
        exact, x64 = made.double(), x.detach().double().requires_grad_()
        expected = exact.oracle(x64, kept)
        dy = torch.randn_like(y)
        found = {"y": y, **gradients(y, {"x": x, **made.leaves()}, dy)}
        wanted = {"y": expected, **gradients(expected, {"x": x64, **exact.leaves()}, dy)}
        assert y.dtype == dtype
        for name, value in found.items():
            assert error(value, wanted[name]) < TOLERANCE[dtype], name
        for name, leaf in {"x": x, **made.leaves()}.items():
            assert found[name].dtype == leaf.dtype


@pytest.mark.parametrize("options", KINDS)
def test_gradcheck(options, device):
    made = layer(torch.float64, device, m=5, n=4, r=2, **options)
    leaves = made.leaves()

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return replace(made, **dict(zip(leaves, values, strict=True)))(x)

    assert torch.autograd.gradcheck(run, (tokens(made, 3), *leaves.values()))


def test_a_second_derivative_is_refused_not_wrong():
    made = layer()
    (dx,) = torch.autograd.grad(made(x := tokens(made, 3)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("options", [{}, {"anchored": True, "bias": True}, {"dora": True}])
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
def test_any_leading_shape(shape, options, dropout, device):
    made = layer(device=device, **options)
    x = tokens(made, *shape)
    y = made(x, dropout)
    y.sum().backward()
    assert y.shape == (*shape, 24)
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert_close(made(x), made.oracle(x))


def test_strided_inputs_give_the_same(device):
    made = layer(device=device, anchored=True)
    x = torch.randn(6, 20, 5, device=device).transpose(1, 2)[:, ::2].requires_grad_()
    dense = x.detach().contiguous().requires_grad_()
    for p in (0.0, 0.1, 0.5):
        torch.manual_seed(0)
        y = made(x, p)
        torch.manual_seed(0)
        z = made(dense, p)
        dy = torch.randn_like(y)
        assert_close(y, z)
        strided, contiguous = (gradients(out, {"x": of, **made.leaves()}, dy) for out, of in [(y, x), (z, dense)])
        for name, gradient in strided.items():
            assert_close(gradient, contiguous[name])


# --- The anchored start ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_untrained_anchor_leaves_the_output_alone(dtype, dropout, device):
    made = layer(dtype, device, m=96, n=64, bias=True)
    made = replace(made, frozen=(made.A.detach().clone(), made.B.detach().clone()))
    for count in (3, 100):
        x = tokens(made, count).detach()
        base = F.linear(x, made.W, made.bias)
        y = made(x, dropout)
        assert error(y, base.double()) <= torch.finfo(dtype).eps
        if dtype.itemsize == 2:
            exact = F.linear(x.double(), made.W.double(), made.bias.double())
            assert ((y - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-5).all(), "one rounding"
        assert torch.equal(add_branch(base, x, made.A, made.B, SCALING, frozen=made.frozen, dropout=dropout), base)


def test_bf16_sees_what_training_moved_under_an_anchor(device):
    """The change here is below half a digit of the factors: [B | −B₀]·[A ; A₀] in bf16 would lose most of it."""
    made = layer(torch.bfloat16, device, m=96, n=64)
    A0, B0 = made.A.detach(), made.B.detach()
    moved = replace(made, A=A0 * (1 + 1e-3 * torch.randn_like(A0)), B=B0 * (1 + 1e-3 * torch.randn_like(B0)))
    moved = replace(moved, W=torch.zeros_like(made.W), frozen=(A0, B0))
    x = tokens(made, 16).detach()
    assert error(moved(x), moved.double().oracle(x.double())) < TOLERANCE[torch.bfloat16]


# --- What is kept, and what is computed ------------------------------------------------------------------------------


@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_that_share_an_input_keep_it_once(dtype, anchored, device):
    layers = [layer(dtype, device, anchored=anchored) for _ in range(3)]
    x = tokens(layers[0], 4, 16)
    storages = saved_storages(lambda: [made(x) for made in layers])
    for made in layers:
        for held in (made.W, made.A, made.B, *(made.frozen or ())):
            storages.pop(held.untyped_storage().data_ptr(), None)
    assert storages.pop(x.untyped_storage().data_ptr())
    h = 64 * 4 * dtype.itemsize
    assert sorted(storages.values()) == [h, h, h]


@pytest.mark.parametrize(("p", "bound"), [(0.05, 0.3), (0.5, 1.0)])
def test_dropout_keeps_at_most_a_byte_for_each_entry(p, bound, device):
    made = layer(torch.bfloat16, device, n=64)
    x = tokens(made, 32, 64)
    plain, dropped = (sum(saved_storages(lambda q=q: made(x, q)).values()) for q in (0.0, p))
    assert dropped - plain <= (bound if x.is_cpu else 1.0) * x.numel()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_dora_keeps_one_tensor_as_wide_as_the_output(bias, device):
    made = layer(torch.bfloat16, device, dora=True, bias=bias)
    x, kept = tokens(made, 64), []
    storages = saved_storages(lambda: kept.append(made(x)))
    address = kept[0].untyped_storage().data_ptr()
    wide = [size for size in storages.values() if size == kept[0].untyped_storage().nbytes()]
    assert len(wide) == 1
    assert (address in storages) is not bias, "without a bias it is the output, that the next operation keeps too"


def test_autocast_keeps_no_cast_copies(device):
    made = layer(torch.float32, device, m=100, n=90)
    x = tokens(made, 64)
    with torch.autocast(device.type, torch.bfloat16):
        storages = saved_storages(lambda: made(x))
    held = {t.untyped_storage().data_ptr() for t in (x, made.W, made.A, made.B)}
    assert sum(size for address, size in storages.items() if address not in held) == 64 * 4 * 2


def test_nothing_is_kept_where_nothing_trains(device):
    made = layer(device=device, anchored=True)
    made.A.requires_grad_(False)
    made.B.requires_grad_(False)
    assert not saved_storages(lambda: made(tokens(made, 8).detach()))
    with torch.no_grad():
        assert not saved_storages(lambda: made(tokens(made, 8)))


@pytest.mark.parametrize("asking", ["x", "A", "B", "bias", "magnitude"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_each_gradient_alone_is_the_same(asking, dropout, device):
    made = layer(device=device, anchored=True, dora=True, bias=asking != "magnitude")
    x = tokens(made, 40)
    leaves = {"x": x, **made.leaves()}
    torch.manual_seed(1)
    y = made(x, dropout)
    together = gradients(y, leaves, dy := torch.randn_like(y))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == asking)
    torch.manual_seed(1)
    alone = gradients(made(x, dropout), {asking: leaves[asking]}, dy)
    assert_close(alone[asking], together[asking])


def test_a_weight_that_trains_gets_its_gradient(device):
    made = layer(device=device, bias=True, dora=True, anchored=True)
    weight = made.W.clone().requires_grad_()
    x = tokens(made, 6)
    made = replace(made, W=weight)
    leaves = {"W": weight, "x": x, **made.leaves()}
    exact, x64 = made.double(), x.detach().double().requires_grad_()
    W64 = exact.W.detach().requires_grad_()
    exact = replace(exact, W=W64)
    y, expected = made(x), exact.oracle(x64)
    dy = torch.randn_like(y)
    wanted = gradients(expected, {"W": W64, "x": x64, **exact.leaves()}, dy)
    for name, gradient in gradients(y, leaves, dy).items():
        assert error(gradient, wanted[name]) < TOLERANCE[torch.float32], name


# --- Dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.05, 0.2, 0.6])
def test_dropout_drops_its_share_independently_and_rescales_the_rest(p, device):
    kept = kept_by(0, torch.empty(500, 400, device=device), p)
    dropped = kept == 0
    assert_close(kept[~dropped], torch.full_like(kept[~dropped], 1 / (1 - p)))
    count = kept.numel()
    for share, expected in [
        (dropped, p),
        (dropped[:, 1:] & dropped[:, :-1], p * p),
        (dropped[1:] & dropped[:-1], p * p),
        (dropped[:, 2:] & ~dropped[:, 1:-1] & dropped[:, :-2], p * p * (1 - p)),
    ]:
        assert abs(share.double().mean().item() - expected) < 5 * (expected / count) ** 0.5
    assert_close(dropped.double().mean(0).std(), torch.tensor((p * (1 - p) / 500) ** 0.5).double(), rtol=0.2, atol=0)


def test_dropout_follows_the_global_seed(device):
    x = torch.empty(30, 20, device=device)
    first, again, other = kept_by(0, x, 0.1), kept_by(0, x, 0.1), kept_by(1, x, 0.1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(0)
    made = layer(device=device)
    assert not torch.equal(made(x.detach().normal_(), 0.1), made(x, 0.1)), "two calls draw twice"


def test_dropping_everything_leaves_the_base(device):
    made = layer(device=device)
    x = tokens(made, 8)
    y = made(x, 1.0)
    assert_close(y, F.linear(x, made.W))
    assert not torch.autograd.grad(y.sum(), made.B)[0].any()


# --- DoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_zero_row_has_gain_one_and_no_gradient(dtype, device):
    made = layer(dtype, device, dora=True)
    norm = made.norm.clone()
    norm[3] = 0
    with torch.no_grad():
        made.W[3], made.B[3], made.magnitude[3] = 0, 0, 0
    made = replace(made, norm=norm)
    x = tokens(made, 40)
    y = made(x)
    found = gradients(y, {"x": x, **made.leaves()}, torch.randn_like(y))
    assert all(value.isfinite().all() for value in (y, *found.values()))
    assert not y[:, 3].any()
    assert found["magnitude"][3] == 0
    assert found["B"][3].any(), "gain one: the row can still learn a direction"


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_magnitude_of_zero_gets_its_gradient(dtype, bias, device):
    made = layer(dtype, device, dora=True, bias=bias)
    with torch.no_grad():
        made.magnitude[2] = 0
    x = tokens(made, 40)
    exact = made.double()
    y, expected = made(x), exact.oracle(x.detach().double())
    dy = torch.randn_like(y)
    found, wanted = (gradients(out, {"m": of.magnitude}, dy) for out, of in [(y, made), (expected, exact)])
    assert error(found["m"], wanted["m"]) < TOLERANCE[dtype]
    assert (y[:, 2] - (0 if made.bias is None else made.bias[2])).double().abs().max() < 1e-15


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dora_survives_an_operation_in_place_on_its_output(dropout, device):
    made = layer(device=device, dora=True, anchored=True)
    x = tokens(made, 40)
    leaves = {"x": x, **made.leaves()}
    results = []
    for activation in (F.relu, F.relu_):
        torch.manual_seed(2)
        y = activation(made(x, dropout))
        results.append(gradients(y, leaves, torch.ones_like(y)))
    for name, gradient in results[0].items():
        assert_close(results[1][name], gradient)


# --- Dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"transposed": True}])
def test_mixed_dtypes_fail_as_in_a_linear_layer(options, device):
    made = layer(torch.bfloat16, device, **options)
    x = torch.randn(3, 20, device=device)
    with pytest.raises(RuntimeError) as theirs:
        F.linear(x, made.W, made.bias)
    with pytest.raises(RuntimeError) as ours:
        made(x)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_factors_of_any_dtype_get_gradients_of_it(factors, device):
    made = layer(torch.bfloat16, device)
    made = replace(made, A=made.A.detach().to(factors).requires_grad_(), B=made.B.detach().to(factors).requires_grad_())
    made(tokens(made, 8)).sum().backward()
    assert made.A.grad.dtype == made.B.grad.dtype == factors


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_decides_the_dtype(given, weight, device):
    made = layer(weight, device, bias=True, anchored=True)
    x = tokens(made, 40).detach().to(given).requires_grad_()
    exact, x64 = made.double(), x.detach().double().requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        y = made(x)
        dy = torch.randn_like(y)
        inside = gradients(y, {"x": x, **made.leaves()}, dy)
    expected = exact.oracle(x64)
    wanted = gradients(expected, {"x": x64, **exact.leaves()}, dy)
    with torch.autocast(device.type, torch.bfloat16):
        outside = made(x)
    outside = gradients(outside, {"x": x, **made.leaves()}, dy)
    assert y.dtype == torch.bfloat16
    assert error(y, expected) < TOLERANCE[torch.bfloat16]
    for name, gradient in inside.items():
        assert gradient.dtype == {"x": x, **made.leaves()}[name].dtype
        assert error(gradient, wanted[name]) < TOLERANCE[torch.bfloat16], name
        assert_close(outside[name], gradient)


def test_autocast_leaves_float64_alone(device):
    made = layer(torch.float64, device, anchored=True)
    x = tokens(made, 3)
    with torch.autocast(device.type, torch.bfloat16):
        y = made(x)
    assert error(y, made.oracle(x)) < TOLERANCE[torch.float64]


def test_a_weight_of_another_class_is_left_to_its_own_product():
    """Quantised and distributed weights are subclasses of Tensor, and know F.linear."""
    called = []

    class Stored(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    made = layer(anchored=True)
    x = tokens(made, 3)
    y = replace(made, W=made.W.as_subclass(Stored))(x)
    assert F.linear in called
    assert torch.mm not in called
    assert_close(y.as_subclass(torch.Tensor), made.oracle(x))


@pytest.mark.parametrize("options", KINDS)
def test_meta_tensors_go_through(options):
    assert layer(device="meta", **options)(torch.empty(2, 3, 20, device="meta"), 0.1).shape == (2, 3, 24)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_a_default_device_or_dtype_changes_nothing(p):
    made = layer(torch.bfloat16, dora=True)
    x = tokens(made, 40)
    torch.manual_seed(3)
    y = made(x, p)
    torch.manual_seed(3)
    with torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            z = made(x, p)
            z.sum().backward()
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(y, z)


# --- A layer that computes its own output ----------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchored"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_branch_is_the_branch_of_linear(dtype, anchored, dropout, device):
    made = replace(layer(dtype, device, anchored=anchored))
    without = replace(made, W=torch.zeros_like(made.W))
    x = tokens(made, 3, 16)
    base = torch.randn(3, 16, 24, device=device, dtype=dtype, requires_grad=True)
    torch.manual_seed(4)
    y = add_branch(base, x, made.A, made.B, SCALING, frozen=made.frozen, dropout=dropout)
    torch.manual_seed(4)
    z = without(x, dropout)
    assert y.dtype == dtype
    assert error(y, (base.double() + z.double()).detach()) < TOLERANCE[dtype]
    dy = torch.randn_like(y)
    leaves = {"x": x, **made.leaves()}
    found, wanted = gradients(y, {"base": base, **leaves}, dy), gradients(z, leaves, dy)
    assert torch.equal(found.pop("base"), dy)
    for name, gradient in found.items():
        assert error(gradient, wanted[name].double()) < TOLERANCE[dtype], name


@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_y", [torch.float32, torch.bfloat16], ids=str)
def test_add_branch_keeps_the_dtype_of_the_output(of_y, of_x, device):
    made = layer(device=device)
    x = tokens(made, 8).detach().to(of_x).requires_grad_()
    y = add_branch(base := torch.randn(8, 24, device=device, dtype=of_y), x, made.A, made.B, SCALING)
    assert y.dtype == of_y
    expected = base.double() + SCALING * x.detach().double() @ (made.B @ made.A).double().T
    assert error(y, expected.detach()) < TOLERANCE[torch.bfloat16]
    assert torch.autograd.grad(y.sum(), x)[0].dtype == of_x


# --- Transforms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("options", [{}, {"anchored": True}, {"dora": True}, {"dora": True, "bias": True}])
def test_gradient_checkpointing_changes_nothing(options, reentrant, device):
    made = layer(device=device, **options)
    x = tokens(made, 40)
    leaves = {"x": x, **made.leaves()}

    def block(x: Tensor) -> Tensor:
        return F.relu_(made(F.gelu(x), 0.1)) if made.magnitude is not None else F.silu(made(x, 0.1))

    torch.manual_seed(6)
    block(x).square().sum().backward()
    plain = {name: leaf.grad for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    torch.manual_seed(6)
    checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    for name, leaf in leaves.items():
        assert_close(leaf.grad, plain[name])


@pytest.mark.parametrize(
    ("options", "dtype"), [({"anchored": True, "bias": True}, torch.float32), ({"dora": True}, torch.bfloat16)]
)
def test_compiles_as_one_graph(options, dtype, device):
    made = layer(dtype, device, **options)
    x = tokens(made, 40)
    leaves = {"x": x, **made.leaves()}

    def run(x: Tensor, p: float) -> Tensor:
        return add_branch(made(x, p), x, made.A, made.B, SCALING, frozen=made.frozen)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    y, z = run(x, 0.0), compiled(x, 0.0)
    dy = torch.randn_like(y)
    assert error(z, y.double().detach()) < TOLERANCE[dtype]
    eager = gradients(y, leaves, dy)
    for name, gradient in gradients(z, leaves, dy).items():
        assert error(gradient, eager[name].double()) < TOLERANCE[dtype], name
    assert compiled(x.detach(), 0.5).isfinite().all()


def test_inference_mode_runs_every_kind(device):
    for options in ({}, {"anchored": True}, {"dora": True}, {"dora": True, "bias": True}):
        made = layer(device=device, **options)
        with torch.inference_mode():
            x = torch.randn(40, 20, device=device)
            assert_close(made(x), made.oracle(x))


# --- 16-bit products on a CPU without them ---------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["emulated", "native"])
def small_tiles(request, monkeypatch):
    """Both routes of the large product on any CPU, with tiles that do not divide the shapes."""
    monkeypatch.setattr(product, "_emulated", lambda dtype: request.param and dtype.itemsize == 2)
    monkeypatch.setattr(product, "TOKENS", 32)
    monkeypatch.setattr(product, "ROWS", 7)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_both_routes_of_the_large_product_are_the_equations(dtype, options, dropout, transposed):
    test_output_and_gradients_are_the_equations(
        dtype,
        options.get("bias", False),
        options.get("anchored", False),
        options.get("dora", False),
        dropout,
        transposed,
        torch.device("cpu"),
    )


@pytest.mark.parametrize("anchored", [False, True])
def test_a_float64_layer_with_float32_factors_computes_in_float64(anchored):
    from torch import nn

    from headstart import LoraConfig, adapt, merge

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8)).double().eval()
    x, base = torch.randn(5, 12, dtype=torch.float64), copy.deepcopy(model)
    init = "pissa" if anchored else "random"
    adapter = adapt(model, LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=init))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += torch.randn_like(parameter) / 10
    (found,) = adapter.layers().values()
    A, B = (factor.detach().double() for factor in found.factors)
    change = B @ A if found.anchor is None else B @ A - found.anchor[1].double() @ found.anchor[0].double()
    exact = base(x) + 1.5 * x @ change.T
    assert_close(model(x), exact, rtol=0, atol=1e-14)
    merge(model)
    assert_close(model(x), exact, rtol=0, atol=1e-14)
