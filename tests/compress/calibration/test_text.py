"""Reading text, cutting token windows, and the activation statistics that weight the clustering."""

from __future__ import annotations

import json
import lzma
import tracemalloc

import pytest
import torch

from cluscomp_peft.compress.calibration.text import read_documents, token_windows
from tests.conftest import WORDS

ROWS = [
    {"text": "w1 w2\nw3"},
    {"prompt": "w4 ", "completion": "w5"},
    {"messages": [{"role": "user", "content": "w6"}, {"role": "assistant", "content": "w7 é"}]},
]
DOCUMENTS = ["w1 w2\nw3", "w4 w5", "user: w6\nassistant: w7 é"]


def write(path, text: str) -> str:
    data = text.encode()
    path.write_bytes(lzma.compress(data) if path.suffix.lower() == ".xz" else data)
    return str(path)


def jsonl(rows: list) -> str:
    return "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


# -- read_documents


NAMES = ["rows.jsonl", "rows.json", "rows.ndjson", "ROWS.JSONL", "rows.Json"]


@pytest.mark.parametrize("name", [*NAMES, *(f"{name}.xz" for name in NAMES), "rows.jsonl.XZ"])
def test_a_row_of_any_known_shape_is_one_document_and_blank_lines_are_none(tmp_path, name):
    assert read_documents(write(tmp_path / name, jsonl(ROWS))) == DOCUMENTS


@pytest.mark.parametrize("name", ["book.txt", "book.txt.xz", "README"])
def test_plain_text_is_one_document(tmp_path, name):
    text = 'w1 w2\n\n{"text": "w3"}\n'
    assert read_documents(write(tmp_path / name, text)) == [text]


def test_messages_go_through_the_chat_template_of_the_tokenizer(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    path = write(tmp_path / "rows.jsonl", jsonl(ROWS))
    assert read_documents(path, tokenizer) == [*DOCUMENTS[:2], "<user>w6<assistant>w7 é"]


def test_a_tokenizer_without_a_template_reads_messages_as_turns(tmp_path, tokenizer):
    assert read_documents(write(tmp_path / "rows.jsonl", jsonl(ROWS)), tokenizer) == DOCUMENTS


def test_the_text_that_comes_with_the_package(tokenizer):
    documents = read_documents("builtin", tokenizer)
    assert len(documents) > 250 and sum(len(document.encode()) for document in documents) > 250_000
    assert len({document[:60] for document in documents}) == len(documents)
    assert sum("assistant: " in document for document in documents) > 50  # conversations
    written = "".join(documents)
    assert all(script in written for script in ("def ", "SELECT", "\\frac", "ß", "é", "я", "中", "の", "한", "ع", "ह"))


PARTS = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "w6 "}, "w8"]},
        {"role": "assistant", "content": "w7"},
    ]
}


def test_a_message_in_parts_is_the_text_of_its_parts(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "rows.jsonl", jsonl([PARTS]))
    assert read_documents(path) == ["user: w6 w8\nassistant: w7"]
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    assert read_documents(path, tokenizer) == ["<user>w6 w8<assistant>w7"]
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m['content'] %}[{{ part.text or part }}]{% endfor %}{% endif %}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert read_documents(path, tokenizer) == ["<user>[w6 ][w8]<assistant>w7"]


@pytest.mark.parametrize("name", ["bomb.txt.xz", "bomb.jsonl.xz"])
def test_a_file_that_unpacks_to_more_than_text_does_is_refused(tmp_path, name):
    """A hundred million characters in 15 kB; no more of them is held than the limit."""
    path = tmp_path / name
    path.write_bytes(lzma.compress(b"a" * 100_000_000, preset=0))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"{name} unpacks to more than 16,777,216 characters"):
            read_documents(str(path))
        assert tracemalloc.get_traced_memory()[1] < 64_000_000
    finally:
        tracemalloc.stop()


def test_rows_of_white_space_are_left_out(tmp_path):
    path = write(tmp_path / "rows.jsonl", jsonl([{"text": " \n"}, {"text": "w1"}, {"text": ""}]))
    assert read_documents(path) == ["w1"]


def test_a_missing_file_is_named(tmp_path):
    path = str(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match=r"absent\.jsonl is not a file"):
        read_documents(path)
    with pytest.raises(ValueError, match="is not a file"):
        read_documents(str(tmp_path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.xz", "a.txt.xz"])
def test_a_file_without_text_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="holds no text"):
        read_documents(write(tmp_path / name, " \n\n"))


@pytest.mark.parametrize("name", ["rows.jsonl.xz", "book.txt.xz"])
def test_a_cut_off_xz_file_is_refused(tmp_path, name):
    path = tmp_path / name
    write(path, jsonl([{"text": " ".join(WORDS)}] * 50))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"{name}.* cut off"):
        read_documents(str(path))


def test_a_file_that_is_no_xz_under_an_xz_name_is_refused(tmp_path):
    path = tmp_path / "book.txt.xz"
    path.write_text("w1 w2")
    with pytest.raises(ValueError, match=r"book\.txt\.xz cannot be read"):
        read_documents(str(path))


@pytest.mark.parametrize("name", ["rows.jsonl", "book.txt"])
def test_text_that_is_not_utf8_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes('{"text": "é"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name}.* not UTF-8"):
        read_documents(str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "is no JSON"),
        ('{"body": "w1"}', "has none of `text`"),
        ('{"text": 3}', "has none of `text`"),
        ('{"prompt": "w1"}', "has none of `text`"),
        ('["w1"]', "has none of `text`"),
        ('"w1"', "has none of `text`"),
        ('{"messages": [{"role": "user"}]}', "without `role` and `content`"),
        ('{"messages": ["w1"]}', "without `role` and `content`"),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}', "neither text nor a list of"),
        ('{"messages": [{"role": "user", "content": 3}]}', "neither text nor a list of"),
        ('{"text": "\\ud800"}', "holds half a character"),
        ("[" * 100_000, "is no JSON that can be read"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.xz"])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, name, line, message):
    # The blank line counts: an editor must find the row at this number.
    path = write(tmp_path / name, f'{{"text": "w1"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=message) as error:
        read_documents(path)
    assert f"{path}:3 " in str(error.value)


# -- token_windows


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def test_documents_are_joined_by_eos_and_every_token_is_read_once(tokenizer):
    documents = ["w1 w2 w3", "w4", "w5 w6 w7 w8"]
    windows = token_windows(documents, tokenizer, 4)
    stream = ids("w1 w2 w3 <eos> w4 <eos> w5 w6 w7 w8 <eos>")
    assert [window.tolist() for window in windows] == [[stream[:4]], [stream[4:8]], [stream[8:]]]
    assert all(window.dtype == torch.int64 for window in windows)


def test_a_last_window_of_one_token_is_dropped(tokenizer):
    windows = token_windows(["w1 w2 w3 w4"], tokenizer, 4)
    assert [window.tolist() for window in windows] == [[ids("w1 w2 w3 w4")]]


def test_max_tokens_ends_the_stream_exactly(tokenizer):
    documents = ["w1 w2 w3", "w4 w5 w6", "w7"]
    windows = token_windows(documents, tokenizer, 3, max_tokens=5)
    assert torch.cat(windows, 1).tolist() == [ids("w1 w2 w3 <eos> w4")]
    everything = token_windows(documents, tokenizer, 3)
    more = token_windows(documents, tokenizer, 3, max_tokens=99)
    assert [window.tolist() for window in more] == [window.tolist() for window in everything]


def test_a_tokenizer_without_eos_joins_documents_directly(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "eos_token_id", None, raising=False)
    assert torch.cat(token_windows(["w1", "w2 w3"], tokenizer, 8), 1).tolist() == [ids("w1 w2 w3")]


def test_a_token_beyond_the_embeddings_is_refused(tokenizer):
    documents = ["w1 w40"]
    last = WORDS.index("w40")
    assert len(token_windows(documents, tokenizer, 4, vocab_size=last + 1)) == 1
    with pytest.raises(ValueError, match=rf"token {last}.* {last} embeddings"):
        token_windows(documents, tokenizer, 4, vocab_size=last)


def test_too_little_text_and_too_short_windows_are_refused(tokenizer):
    with pytest.raises(ValueError, match="1 tokens, at least 2"):
        token_windows([""], tokenizer, 4)
    with pytest.raises(ValueError, match="1 tokens, at least 2"):
        token_windows(["w1 w2"], tokenizer, 4, max_tokens=1)
    with pytest.raises(ValueError, match="seqlen=1"):
        token_windows(["w1 w2 w3"], tokenizer, 1)


# -- hub ids


def test_a_hub_id_is_read_as_a_stream(monkeypatch, tokenizer):
    asked = {}

    def load_dataset(name, config, split, streaming):
        asked.update(name=name, config=config, split=split, streaming=streaming)
        return iter([{"text": "one"}, {"prompt": "two ", "completion": "three"}, {"text": " "}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read_documents("owner/words:small", tokenizer) == ["one", "two three"]
    assert asked == {"name": "owner/words", "config": "small", "split": "train", "streaming": True}


def test_a_hub_row_without_text_is_named(monkeypatch, tokenizer):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: iter([{"text": "one"}, {"label": 3}]))
    with pytest.raises(ValueError, match="owner/words, row 2 has none of"):
        read_documents("owner/words", tokenizer)


@pytest.mark.parametrize("path", ["absent.txt", "folder/absent.jsonl", "a/b/c", "/a/b"])
def test_a_missing_file_is_not_taken_for_a_hub_id(path, tokenizer):
    with pytest.raises(ValueError, match="is not a file"):
        read_documents(path, tokenizer)
