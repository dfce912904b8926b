"""The model card: front matter that a hub can read, and numbers as the report has them."""

from huggingface_hub import ModelCard

from cluscomp_peft.compress.report.card import model_card

SUMMARY = {"source": "some: folder/#1", "true_bits": 3.1234, "relative_error": 0.05, "bytes": 2.5e6}


def test_a_hub_reads_its_front_matter():
    data = ModelCard(model_card("tiny-3bit", {**SUMMARY, "calibration": None}, 14, {})).data
    assert (data.library_name, data.tags, data.base_model) == ("transformers", ["cluscomp"], "some: folder/#1")


def test_it_says_what_was_measured():
    card = model_card("tiny-3bit", {**SUMMARY, "calibration": "text.jsonl"}, 14, {"dense": 3.5, "compressed": 3.61234})
    assert "# tiny-3bit" in card and "14 weight matrices" in card
    assert "| 3.123 | 0.0500 | 2.5 MB | text.jsonl |" in card
    assert "the loss is 3.6123 nats per token, that of the dense model 3.5000; no task was measured" in " ".join(
        card.split()
    )
    without = model_card("tiny-3bit", {**SUMMARY, "calibration": None}, 14, {})
    assert "| none |" in without and "nats" not in without
    assert 'AutoModelForCausalLM.from_pretrained("tiny-3bit")' in without
