"""Contract tests of what `cluscomp_peft.upstream.torch` lists."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import nn
from torch._C._functorch import maybe_current_level
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map_only

from cluscomp_peft.upstream import torch as room
from tests.upstream.contract import contract


def internals(*names: str):
    texts = [room.INTERNALS[name][1] for name in names]
    return contract(room, *[f"INTERNALS.{name}" for name in names], says="\n".join(texts))


@internals("_parameters")
def test_own_parameters_are_in_a_dict_also_under_init_empty_weights():
    layer = nn.Linear(3, 2, bias=False)
    assert layer._parameters == {"weight": layer.weight, "bias": None}
    with init_empty_weights():
        layer._parameters["weight"] = nn.Parameter(torch.ones(2, 3))
    assert not layer.weight.is_meta and bool((layer(torch.ones(3)) == 3).all())
    assert list(layer.state_dict()) == ["weight"]


@internals("_buffers", "_non_persistent_buffers_set")
def test_own_buffers_are_in_a_dict_and_kept_out_of_state_dicts():
    layer = nn.Linear(3, 2)
    layer.register_buffer("kept", torch.ones(1), persistent=False)
    assert layer._buffers == {"kept": layer.kept} and layer._non_persistent_buffers_set == {"kept"}
    assert "kept" not in layer.state_dict() and layer.half().kept.dtype == torch.float16
    del layer._buffers["kept"]
    layer._non_persistent_buffers_set.discard("kept")
    layer.register_buffer("kept", torch.ones(1))
    assert "kept" in layer.state_dict()


@internals("_forward_hooks", "_forward_pre_hooks")
def test_hooks_are_in_dicts():
    layer = nn.Linear(3, 2)
    assert not layer._forward_hooks and not layer._forward_pre_hooks
    handles = [layer.register_forward_hook(print), layer.register_forward_pre_hook(print)]
    assert len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 1
    for handle in handles:
        handle.remove()
    assert not layer._forward_hooks and not layer._forward_pre_hooks


class Watched(nn.Linear):
    seen: list

    def _apply(self, fn, recurse=True):
        self.seen.append(fn(torch.empty(0)).dtype)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.seen.append((set(state_dict), prefix))
        args[-1].append("an error of ours")
        super()._load_from_state_dict(state_dict, prefix, *args)


@internals("_apply")
def test_casts_and_moves_go_through_one_method():
    layer = Watched(3, 2)
    layer.seen = []
    layer.to(torch.bfloat16)
    nn.Sequential(layer).half().cpu()
    assert layer.seen == [torch.bfloat16, torch.float16, torch.float32]


@internals("_load_from_state_dict")
def test_loading_calls_each_module_and_raises_the_errors_in_its_last_argument():
    layer = Watched(3, 2)
    layer.seen = []
    model = nn.Sequential(layer)
    with pytest.raises(RuntimeError, match="an error of ours"):
        model.load_state_dict(model.state_dict())
    assert layer.seen == [({"0.weight", "0.bias"}, "0.")]


class Empty(torch.Tensor):
    @staticmethod
    def __new__(cls, size):
        return torch.Tensor._make_wrapper_subclass(cls, size, dtype=torch.bfloat16, device="cpu")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        ones = lambda empty: torch.ones(empty.shape, dtype=empty.dtype)  # noqa: E731
        args, kwargs = tree_map_only(Empty, ones, (args, kwargs or {}))
        return func(*args, **kwargs)


@internals("_make_wrapper_subclass", "DisableTorchFunctionSubclass", "_pytree", "_C")
def test_a_tensor_without_memory_answers_and_is_replaced_where_numbers_are_needed():
    empty = Empty((2**30, 2**30))
    assert empty.shape == (2**30, 2**30) and empty.dtype == torch.bfloat16 and empty.device.type == "cpu"
    small = Empty((3, 2))
    assert torch.equal(torch.cat([small, small]), torch.ones(6, 2, dtype=torch.bfloat16))  # in a list
    x = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    F.linear(x, small).sum().backward()
    assert bool((x.grad == 3).all())
    assert len(tree_leaves(({"a": [x, small]}, (x,)))) == 3


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names, self.branches = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        self.branches += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@internals("_python_dispatch", "_get_current_dispatch_mode", "_schema", "_local_scalar_dense")
def test_a_mode_sees_ops_by_name_and_can_be_asked_for():
    assert _get_current_dispatch_mode() is None
    x = torch.ones(2, requires_grad=True)
    with Names() as mode:
        assert _get_current_dispatch_mode() is mode
        y = torch.ops.aten.mul(x, x).sum()
        y.backward()
        assert bool(y > 1) and y.item() == 2
    assert mode.names[0] == "aten::mul" and mode.names.count("aten::mul") >= 2  # forward and backward
    assert mode.branches == 2
    assert _get_current_dispatch_mode() is None


@internals("maybe_current_level", "_functorch")
def test_transforms_are_seen():
    levels = []

    def watched(x):
        levels.append(maybe_current_level())
        return x.sum()

    watched(torch.ones(2))
    torch.func.vmap(watched)(torch.ones(2, 2))
    torch.func.grad(watched)(torch.ones(2))
    assert levels[0] is None and None not in levels[1:]


@internals("_unsafe_view", "_is_view")
def test_an_unsafe_view_may_be_changed_in_place():
    class Viewing(torch.autograd.Function):
        owned = False

        @staticmethod
        def forward(ctx, x):
            y = (x * 2).view(4)
            assert y._is_view()
            return torch.ops.aten._unsafe_view(y, y.shape) if Viewing.owned else y

        @staticmethod
        def backward(ctx, grad):
            return grad.view(2, 2) * 2

    for Viewing.owned in (False, True):
        x = torch.ones(2, 2, requires_grad=True)
        y = Viewing.apply(x)
        if Viewing.owned:
            assert not y._is_view()
            y.add_(1)
            y.sum().backward()
            assert bool((x.grad == 2).all())


@internals("_ConvNd")
def test_all_convolutions_have_one_class():
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    assert all(issubclass(kind, _ConvNd) for kind in kinds) and not issubclass(nn.Linear, _ConvNd)


@internals("_is_amx_tile_supported")
def test_matrix_units_can_be_asked_for():
    assert torch.cpu._is_amx_tile_supported() in (False, True)


@internals("_cuda_getCurrentRawStream")
@pytest.mark.gpu
def test_the_current_stream_has_a_number():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert torch._C._cuda_getCurrentRawStream(torch.cuda.current_device()) == stream.cuda_stream


def test_a_failed_contract_says_what_breaks():
    @internals("_apply")
    def broken():
        raise io.UnsupportedOperation("gone")

    with pytest.raises(AssertionError, match=r"torch .*_apply\.\n.*answers\sthe dtype.*\nUnsupportedOperation: gone"):
        broken()
