"""Names of torch that its documentation does not promise, and which of our files touch them.

Unlike those of the other libraries they are used where they are needed: most of them in calls of some microseconds, or
in subclasses of torch's own classes. `tests/upstream/test_torch.py` holds each to what is relied on.
"""

from __future__ import annotations

__all__ = ["INTERNALS"]

_EVERYWHERE = ("",)

INTERNALS: dict[str, tuple[tuple[str, ...], str]] = {
    "_parameters": (
        _EVERYWHERE,
        "The own parameters of a module by name, None for absent ones; writing into it puts a parameter in place also "
        "while accelerate's init_empty_weights replaces `register_parameter`. If they are kept elsewhere, nothing "
        "is clustered, merged or loaded.",
    ),
    "_buffers": (_EVERYWHERE, "The same of buffers; if they are kept elsewhere, merging cannot be taken back."),
    "_non_persistent_buffers_set": (
        ("tuner/",),
        "Names of the buffers that are in no state dict; if it is called otherwise, an adapter that was merged, "
        "unmerged and merged again may be saved with the buffers that merging keeps.",
    ),
    "_forward_hooks": (
        ("tuner/",),
        "Hooks of a module's calls; if they are kept elsewhere, a layer reads the numbers of a module that FSDP or "
        "ZeRO-3 has to gather first.",
    ),
    "_forward_pre_hooks": (("tuner/",), "The same of the hooks before its calls."),
    "_apply": (
        ("clustered_weight.py",),
        "What `to`, `half` and `cuda` call with a function of tensors; if they call something else, a layer answers "
        "the dtype that the model had before it was cast.",
    ),
    "_load_from_state_dict": (
        ("tuner/",),
        "What load_state_dict calls for each module, with the state dict, the prefix and last the list of errors; if "
        "it does not, merged numbers are mixed with unmerged ones.",
    ),
    "_make_wrapper_subclass": (
        ("lazy_weight.py",),
        "Makes a tensor without memory; if it is called otherwise, no layer has a `weight` to answer with.",
    ),
    "DisableTorchFunctionSubclass": (
        ("lazy_weight.py",),
        "Inside of it a call of a subclass does not come back to its `__torch_function__`; if it does, asking a "
        "weight for its dtype never ends.",
    ),
    "_pytree": (
        ("lazy_weight.py", "plan/"),
        "`tree_map_only` and `tree_leaves`, which reach the tensors in nested arguments; if they pass some over, code "
        "that computes with a weight gets one without numbers.",
    ),
    "_python_dispatch": (
        ("plan/", "ops/"),
        "`TorchDispatchMode`, which sees every op below autograd, and `_get_current_dispatch_mode`.",
    ),
    "_get_current_dispatch_mode": (
        ("ops/",),
        "The mode that sees ops now, or None; if it is called otherwise, calls go past profilers and fake tensors.",
    ),
    "maybe_current_level": (
        ("ops/",),
        "The level of the functorch transform that is running, or None; if it is called otherwise, `vmap` and `grad` "
        "go past calls without a trace.",
    ),
    "_unsafe_view": (
        ("ops/",),
        "A view that autograd takes for a tensor of its own; if it does not, changing an output in place fails.",
    ),
    "_is_view": (("ops/",), "Whether autograd takes a tensor for a view; if not, see `_unsafe_view`."),
    "_schema": (("plan/",), "The name of an op; if it is kept elsewhere, plans leave out what our ops hold."),
    "_local_scalar_dense": (
        ("plan/",),
        "The op behind `item` and `bool`; if it is another one, no model with a branch on values can be planned.",
    ),
    "_ConvNd": (
        ("compress/",),
        "The class of all convolutions, whose 3-D weights are no experts; if it is another, they are refused.",
    ),
    "_is_amx_tile_supported": (
        ("ops/",),
        "Whether the CPU has matrix units for bf16; if it is called otherwise, gradients of bf16 take longer.",
    ),
    "_cuda_getCurrentRawStream": (
        ("ops/",),
        "The number of a device's current stream; if it is called otherwise, no kernel is launched.",
    ),
    "_C": (("lazy_weight.py", "ops/"), "The module that has some of the above."),
    "_functorch": (("ops/",), "The module that has `maybe_current_level`."),
}
"""Name → (files of ours that touch it, by how their paths begin; what is relied on, and what breaks)."""
