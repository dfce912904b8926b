"""Layers whose weight a model computes with instead of calling them: found by a dry pass, dense in every way in."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from peft import get_peft_model
from torch import nn

from cluscomp_peft import ClusCompConfig, ClusCompQuantizationConfig
from cluscomp_peft.clustered_weight import clustered_weights
from cluscomp_peft.codes import ClusterSpec
from cluscomp_peft.compress.budget.called import computed_with, handed_to_kernels
from cluscomp_peft.compress.budget.targets import dense_linears
from cluscomp_peft.compress.budget.uses import weight_uses
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.compress.policy import Policy
from tests.conftest import logits_of

SMALL = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
ZAMBA = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], mamba_d_state=8, n_mamba_heads=4,
    mamba_headdim=16, mamba_ngroups=1, num_mem_blocks=1, chunk_size=8, adapter_rank=4,
)  # fmt: skip
MODELS = {
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(**SMALL, state_size=4)),
    "mamba 2": lambda: hf.Mamba2ForCausalLM(
        hf.Mamba2Config(**SMALL, state_size=4, head_dim=16, num_heads=4, n_groups=1, chunk_size=8)
    ),
    "zamba 2": lambda: hf.Zamba2ForCausalLM(hf.Zamba2Config(**ZAMBA)),
    "bamba": lambda: hf.BambaForCausalLM(
        hf.BambaConfig(
            **SMALL, **HEADS, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
            mamba_chunk_size=8,
        )
    ),
    "jamba": lambda: hf.JambaForCausalLM(
        hf.JambaConfig(
            **SMALL, **HEADS, attn_layer_period=2, attn_layer_offset=1, num_experts=1, mamba_d_state=4
        )
    ),
    "rwkv": lambda: hf.RwkvForCausalLM(hf.RwkvConfig(**SMALL, context_length=32, rescale_every=1)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, **HEADS, num_local_experts=4)),
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32,
            patch_size=8,
        )
    ),
}  # fmt: skip
COMPUTED = {
    "mamba": {"mixer.dt_proj"},
    "jamba": {"mamba.dt_proj"},
    "rwkv": {"attention.output", "feed_forward.value"},  # rescaled in place for inference
}
HANDED = {
    "mamba": {"mixer.x_proj", "mixer.out_proj"},
    "mamba 2": {"mixer.out_proj"},
    "zamba 2": {"mamba.out_proj"},
    "bamba": {"mamba.out_proj"},
}
SETTINGS = dict(group_size=2, num_clusters=16)


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def ends(names, parts: int = 2) -> set[str]:
    return {".".join(name.split(".")[-parts:]) for name in names}


class Written(nn.Module):
    """Code of a user's own, which no input is known for."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.asked, self.held, self.branch, self.far, self.unused = (
            nn.Linear(8, 8) for _ in range(7)
        )
        self.fused = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(self.called(x), self.read.weight)
        if isinstance(self.asked.weight, torch.Tensor) and x.dtype != self.asked.weight.dtype:
            x = x.to(self.asked.weight.dtype)
        held = self.held.weight
        x = self.held(self.asked(x)).to(held.device)
        if self.fused:
            x = x @ self.branch.weight
        return self.branch(self._last(x))

    def _last(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.far.weight.t()

    def reset(self) -> None:
        nn.init.zeros_(self.unused.weight)


@pytest.mark.parametrize("kind", MODELS)
def test_a_dry_pass_finds_what_is_computed_with(kind):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    model = made(kind)
    before = torch.get_rng_state()
    assert ends(computed_with(model)) == COMPUTED.get(kind, set())
    assert ends(handed_to_kernels(model)) == HANDED.get(kind, set())
    assert torch.equal(torch.get_rng_state(), before) and torch.get_default_dtype() == torch.float32
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    with torch.device("meta"):  # as the command and from_pretrained have it, and in any block
        assert computed_with(type(model)(model.config)) == computed_with(model)
    everywhere = {name for name, _ in model.named_modules() if ends([name]) & COMPUTED.get(kind, set())}
    assert computed_with(model).keys() == everywhere


def test_where_no_pass_can_go_the_source_tells_what_no_condition_keeps_from_running():
    model = Written()
    assert {path: use.conditional for path, use in weight_uses(Written).items()} == {
        "read": False, "far": False, "branch": True,
    }  # fmt: skip
    assert computed_with(nn.Sequential(model)).keys() == {"0.read", "0.far"} and not handed_to_kernels(model)
    assert {name for name, _ in dense_linears(model)} == {"called", "asked", "held", "branch", "unused"}
    for base in ("clustered", "dense"):
        with pytest.raises(
            ValueError, match="target_modules names read, where an adapter has no effect: the model co"
        ):
            get_peft_model(Written(), ClusCompConfig(**SETTINGS, base=base, target_modules=["called", "read"]))
        adapted = get_peft_model(Written(), ClusCompConfig(**SETTINGS, base=base, target_modules="all-linear"))
        adapted(torch.randn(3, 8)).sum().backward()


def test_torchs_encoder_looks_before_it_reads():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2).eval()
    assert not computed_with(encoder) and ends(dict(dense_linears(encoder)), 1) == {"linear1", "linear2"}


@pytest.mark.parametrize("kind", COMPUTED)
def test_it_stays_dense_in_the_command_and_on_the_fly(kind, tmp_path):
    made(kind).save_pretrained(tmp_path / "dense")
    settings = ClusCompQuantizationConfig(**SETTINGS)
    report = compress_checkpoint(str(tmp_path / "dense"), str(tmp_path / "out"), settings)
    assert "(the model computes with its weight instead of calling it)" in report["coverage"]
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    fly = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=settings)
    tokens = torch.arange(3, 13)[None]
    expected = logits_of(loaded.dequantize(), tokens)
    for model in (hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), fly):
        names = ends(name for name, _ in clustered_weights(model))
        assert names and not names & COMPUTED[kind]
        assert torch.allclose(logits_of(model, tokens), expected, atol=1e-5)
    target = sorted(COMPUTED[kind])[:1]
    with pytest.raises(ValueError, match=rf"names '{target[0]}', but it stays dense \(.*the model computes with"):
        compress_checkpoint(
            str(tmp_path / "dense"),
            str(tmp_path / "no"),
            ClusCompQuantizationConfig(**SETTINGS, target_modules=target),
        )


@pytest.mark.parametrize("base", ["compressed", "born", "dense"])
def test_an_adapter_leaves_out_what_it_has_no_effect_on(base, tmp_path, capsys):
    made("mamba").save_pretrained(tmp_path / "dense")
    settings = ClusCompQuantizationConfig(**SETTINGS) if base == "compressed" else None
    own = {"compressed": {}, "born": SETTINGS, "dense": dict(base="dense", **SETTINGS)}[base]

    def load() -> nn.Module:
        return hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=settings)

    for target, reason in (("dt_proj", "the model computes with"), ("out_proj", "the model hands its weight to a k")):
        if base != "compressed" or target != "dt_proj":  # which is no clustered layer
            with pytest.raises(
                ValueError, match=rf"names backbone\.layers\.0\.mixer\.{target} and 1 more.*: {reason}"
            ):
                get_peft_model(load(), ClusCompConfig(**own, target_modules=["in_proj", target]))
    capsys.readouterr()
    model = get_peft_model(load(), ClusCompConfig(**own))
    assert ends(model.base_model.targeted_module_names) == {"mixer.in_proj"}
    assert "mixer.out_proj" in (line := capsys.readouterr().err.splitlines()[-1]) and "hands its weight" in line
    model.train()(
        input_ids=torch.arange(3, 13)[None], labels=torch.arange(3, 13)[None], use_cache=False
    ).loss.backward()
    gradients = [value.grad for name, value in model.named_parameters() if value.requires_grad]
    assert gradients and all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_a_kernel_that_is_handed_the_weight_of_a_clustered_layer_computes_with_the_right_one():
    class Fused(torch.autograd.Function):
        """As those of mamba_ssm: a function of its own, which keeps the weight for its backward pass."""

        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return F.linear(x, weight)

        @staticmethod
        def backward(ctx, grad):
            _, weight = ctx.saved_tensors
            return grad @ weight, None

    layer = Policy().cluster("layer", nn.Linear(12, 10, bias=False), ClusterSpec(2, 12))
    x = torch.randn(20, 12, requires_grad=True)
    for result in (Fused.apply(x, layer.weight), layer(x)):
        (gradient,) = torch.autograd.grad(result.sum(), x)
        assert torch.allclose(result, x @ layer.decode(torch.float32).t(), atol=1e-6)
        assert torch.allclose(gradient, layer.decode(torch.float32).sum(0).expand(20, 12), atol=1e-6)


def test_a_model_that_was_changed_after_it_was_made_is_asked_by_name():
    model = made("mamba")
    model.backbone.layers[1].mixer.dt_proj = nn.Identity()
    names = ends(dict(dense_linears(model)), 3)
    assert "1.mixer.in_proj" in names and not {"0.mixer.dt_proj", "1.mixer.dt_proj"} & names
