"""Model cards: of a compressed checkpoint, of one that an adapter was merged into, of an adapter."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download

__all__ = ["adapter_card", "license_of", "loading_example", "merged_card", "model_card", "renamed_card"]

_IMPORT = """\
# pip install cluscomp_peft: without it PEFT stops with KeyError: 'CLUSCOMP', and transformers loads random weights
import cluscomp_peft"""
_METHOD = """\
Method: ClusComp, Liao et al., "ClusComp: A Simple Paradigm for Model Compression and Efficient Finetuning", Findings
of ACL 2025, arXiv:2503.13089.
"""


def loading_example(name: str) -> str:
    """Python that loads the checkpoint `name`, generates, and finetunes it."""
    place = json.dumps(name, ensure_ascii=False)
    return f"""{_IMPORT}
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained({place}), AutoTokenizer.from_pretrained({place})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
model = get_peft_model(model, cluscomp_peft.ClusCompConfig(task_type="CAUSAL_LM"))  # to finetune the codebooks"""


def license_of(source: str) -> str | None:
    """The licence that the card of a model names; folder or hub id. None where there is no card, or it names none."""
    try:
        path = os.path.join(source, "README.md") if os.path.isdir(source) else hf_hub_download(source, "README.md")
        found = ModelCard.load(path, ignore_metadata_errors=True).data.license
    except Exception:
        return None  # no network, no card, or none that can be read: a card without a licence says nothing wrong
    return found if isinstance(found, str) else None


def model_card(
    name: str, summary: Mapping[str, Any], matrices: int, losses: Mapping[str, float], licence: str | None = None
) -> str:
    """README.md of a compressed checkpoint.

    Args:
        name (`str`): Of the checkpoint.
        summary: Of its report.
        matrices (`int`): How many are clustered.
        losses: Of the dense and the compressed model on held-out text, nats per token; empty where none was measured.
        licence (`str`, *optional*): Of the dense model.
    """
    calibration = summary["calibration"] or "none"
    measured, evaluation = "no task was measured", summary.get("evaluation")
    text = evaluation["text"] if evaluation else "held-out calibration text"
    found = evaluation or losses
    if found:
        measured = (
            f"on {text}, the loss is {found['compressed']:.4f} nats per token, that of the dense model "
            f"{found['dense']:.4f}; no task was measured"
        )
    text = f"""# {name}

`{_source_name(summary)}`, compressed with ClusComp: {matrices} weight matrices are stored as integer codes and
codebooks.

| true bits per weight | relative error of the weights | weight files | calibration text |
|---|---|---|---|
| {summary["true_bits"]:.3f} | {summary["relative_error"]:.4f} | {summary["bytes"] / 1e6:.1f} MB | {calibration} |

True bits count codes, codebooks and scales of the clustered matrices. The relative error is ‖W − Ŵ‖ / ‖W‖ over all of
them; {measured}.

```python
{loading_example(name)}
```

{_METHOD}"""
    return _card(text, "transformers", summary, licence)


def merged_card(
    name: str, summary: Mapping[str, Any], matrices: int, story: str, licence: str | None = None, section: str = ""
) -> str:
    """README.md of a checkpoint whose codebooks were trained.

    Args:
        name, matrices, licence: As for [`model_card`].
        summary: Of the report as it is after training; empty for a dense model.
        story (`str`): How it was trained, in a sentence.
        section (`str`): More of it, in Markdown.
    """
    what = f"`{_source_name(summary)}`, compressed with ClusComp and trained" if matrices else "A finetuned model"
    size = ""
    if matrices:
        size = f" {summary['true_bits']:.3f} true bits per weight in {matrices} matrices, codebooks counted; "
        size += f"{summary['bytes'] / 1e6:.1f} MB of weight files."
    text = f"""# {name}

{what}. {story}{size}

```python
{loading_example(name)}
```

{section}{_METHOD}"""
    return _card(text, "transformers", summary, licence)


def adapter_card(
    name: str, base: str, bits: float, summary: Mapping[str, Any], story: str, licence: str | None = None
) -> str:
    """README.md of an adapter.

    Args:
        name (`str`): Of the adapter.
        base (`str`): The compressed model that it belongs to; folder or hub id.
        bits (`float`): True bits per weight of the base.
        summary: Of the report of the base; empty where it has none.
        story (`str`): How it was trained, in a sentence.
        licence (`str`, *optional*): Of the base.
    """
    place = json.dumps(base if _is_hub_id(base) else os.path.basename(os.path.abspath(base)), ensure_ascii=False)
    text = f"""# {name}

An adapter of ClusComp: deltas of the codebooks of {place[1:-1]} ({bits:.3f} true bits per weight). {story} It fits
these codes alone, which is checked when it is loaded.

```python
{_IMPORT}
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained({place}), AutoTokenizer.from_pretrained({place})
model = PeftModel.from_pretrained(model, {json.dumps(name, ensure_ascii=False)})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
```

Merging it is exact and stays compressed: `cluscomp merge {name} OUT`, or `model.merge_and_unload()`.

{_METHOD}"""
    return _card(text, "peft", summary if summary else {"source": base}, licence)


def renamed_card(text: str, places: Mapping[str, str], base: str | None = None) -> str:
    """A card as the hub shall have it.

    Args:
        text (`str`): The card that lies in a folder.
        places: Names of folders, as its words and its code have them, to hub ids.
        base (`str`, *optional*): Hub id of the model that it was made from, for the front matter.
    """
    for name, repo in places.items():
        text = text.replace(json.dumps(name, ensure_ascii=False), json.dumps(repo))
        text = text.replace(f"cluscomp merge {name} OUT", f"cluscomp merge BASE OUT --adapter {repo}")
        text = text.replace(f"deltas of the codebooks of {name} (", f"deltas of the codebooks of {repo} (")
        text = text.replace(f"\n# {name}\n", f"\n# {repo}\n")
    card = ModelCard(text)
    if base is not None:
        card.data["base_model"] = base
    return str(card)


def _card(text: str, library: str, summary: Mapping[str, Any], licence: str | None) -> str:
    source = summary.get("source", "")
    base = source if _is_hub_id(source) else None  # a folder of this machine says nothing on another
    data = ModelCardData(library_name=library, tags=["cluscomp"], base_model=base, license=licence)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"))


def _source_name(summary: Mapping[str, Any]) -> str:
    """A dense model as its card calls it: by its hub id, or the name of its folder."""
    source = summary.get("source", "")
    return source if _is_hub_id(source) else os.path.basename(os.path.abspath(source))


def _is_hub_id(source: str) -> bool:
    return not os.path.exists(source) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None
