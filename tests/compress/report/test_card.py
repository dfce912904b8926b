"""The model card: front matter that a hub can read, and numbers as the report has them."""

from huggingface_hub import ModelCard

from cluscomp_peft.compress.report.card import adapter_card, license_of, merged_card, model_card

SUMMARY = {"source": "someone/tiny", "true_bits": 3.1234, "relative_error": 0.05, "bytes": 2.5e6}


def test_a_hub_reads_its_front_matter():
    data = ModelCard(model_card("tiny-3bit", {**SUMMARY, "calibration": None}, 14, {})).data
    assert (data.library_name, data.tags, data.base_model) == ("transformers", ["cluscomp"], "someone/tiny")


def test_a_folder_of_this_machine_is_no_base_model(tmp_path):
    source = tmp_path / "some: folder #1"
    source.mkdir()
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    summary = {**SUMMARY, "source": str(source), "calibration": None}
    for text in (
        model_card("tiny-3bit", summary, 14, {}, license_of(str(source))),
        merged_card("tiny-3bit", summary, 14, "It was trained.", license_of(str(source))),
        adapter_card("adapter", str(source), 3.1, summary, "It was trained.", license_of(str(source))),
    ):
        data = ModelCard(text).data
        assert (data.base_model, data.license) == (None, "apache-2.0")
        assert "some: folder #1" in text and str(tmp_path) not in text and "model.generate(" in text


def test_a_model_without_a_card_has_no_licence(tmp_path):
    assert license_of(str(tmp_path)) is None and license_of("someone/absent") is None


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
