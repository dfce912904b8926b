"""The model card of a compressed checkpoint: how to load it, what was measured, and whose method it is."""

from __future__ import annotations

import json
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

__all__ = ["loading_example", "model_card"]


def loading_example(name: str) -> str:
    """Python that loads the checkpoint `name` and finetunes it."""
    return f"""import cluscomp_peft  # pip install cluscomp_peft; where it is absent, transformers loads random weights
from peft import get_peft_model
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({json.dumps(name, ensure_ascii=False)})
model = get_peft_model(model, cluscomp_peft.ClusCompConfig(task_type="CAUSAL_LM"))  # to finetune the codebooks"""


def model_card(name: str, summary: dict[str, Any], matrices: int, losses: dict[str, float]) -> str:
    """README.md of a checkpoint.

    Args:
        name (`str`): Of the checkpoint.
        summary (`dict`): Of its report.
        matrices (`int`): How many are clustered.
        losses: Of the dense and the compressed model on held-out text, nats per token; empty where none was measured.
    """
    calibration = summary["calibration"] or "none"
    measured = "no task was measured"
    if losses:
        measured = (
            f"on held-out calibration text, the loss is {losses['compressed']:.4f} nats per token, that of the dense "
            f"model {losses['dense']:.4f}; no task was measured"
        )
    data = ModelCardData(library_name="transformers", tags=["cluscomp"], base_model=summary["source"])
    text = f"""# {name}

`{summary["source"]}`, compressed with ClusComp: {matrices} weight matrices are stored as integer codes and codebooks.

| true bits per weight | relative error of the weights | weight files | calibration text |
|---|---|---|---|
| {summary["true_bits"]:.3f} | {summary["relative_error"]:.4f} | {summary["bytes"] / 1e6:.1f} MB | {calibration} |

True bits count codes, codebooks and scales of the clustered matrices. The relative error is ‖W − Ŵ‖ / ‖W‖ over all of
them; {measured}.

```python
{loading_example(name)}
```

Method: ClusComp, Liao et al., "ClusComp: A Simple Paradigm for Model Compression and Efficient Finetuning", Findings
of ACL 2025, arXiv:2503.13089.
"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"))
