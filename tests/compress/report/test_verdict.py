"""The lines in which a compression ends."""

from __future__ import annotations

from cluscomp_peft.compress.report.verdict import A_LOT, verdict

SUMMARY = {
    "source": "dense",
    "source_bytes": 269e6,
    "bytes": 98.25e6,
    "clustered_bytes": 41.15e6,
    "not_calibrated": None,
}


def test_sizes_and_losses():
    lines, warnings = verdict(SUMMARY, {"dense": 2.0, "compressed": 2.1}, "out")
    assert lines == [
        "weight files 269.0 → 98.2 MB, of which 57.1 MB are embeddings and whatever else stays dense",
        "loss on held-out calibration text: 2.1000 nats per token, dense 2.0000 (perplexity 8.17, dense 7.39)",
    ]
    assert not warnings


def test_a_model_that_lost_a_lot():
    (warning,) = verdict(SUMMARY, {"dense": 2.0, "compressed": 2.01 + A_LOT}, "out")[1]
    assert warning.startswith("The model lost 0.31 nats") and "cluscomp finetune recover" in warning


def test_what_was_not_measured():
    lines, warnings = verdict({**SUMMARY, "not_calibrated": "the tokenizer is missing"}, {}, "out")
    assert len(lines) == 1
    assert warnings[0].endswith("cluscomp evaluate out --teacher dense --data TEXT")
    assert warnings[1].endswith("which loses more: the tokenizer is missing.")


def test_the_text_of_the_user_judges():
    evaluation = {"text": "mine.txt", "tokens": 100, "dense": 1.0, "compressed": 1.01 + A_LOT}
    lines, warnings = verdict({**SUMMARY, "evaluation": evaluation}, {"dense": 2.0, "compressed": 2.1}, "out")
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "loss on mine.txt (100 tokens)",
        "loss on held-out calibration text",
    ]
    assert warnings[0].startswith("The model lost 0.31 nats")
    assert len(verdict({**SUMMARY, "evaluation": evaluation}, {}, "out")[1]) == 1
