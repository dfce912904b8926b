"""Damaged checkpoints and adapters: a seeded generator of them, and the process that loads one after another.

    python -m tests.damage FOLDER BACKEND < numbers of cases > a line of JSON for each

FOLDER holds `dense`, what is made of it (`compressed`, `shards`: the same in several files), a model with clustered
embeddings and a mixture (`embeddings`, `experts`), for each another one of the same shapes and other numbers
(`compressed-other`), and in `adapters` one of each kind, with another beside it too. A verdict is

    same       the logits are those of the sound files
    refused    an error of a clear kind
    numbers    other logits, and the damage lies in numbers that nothing vouches for (see `_VOUCHED`)
    said       other logits, and a warning that tensors are missing or not those of the config
    FAULT      anything else

The test beside this file watches the process, and starts another where it ends.
"""

from __future__ import annotations

import json
import logging
import random
import resource
import shutil
import struct
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BASES = ["compressed", "shards", "embeddings", "experts"]  # of checkpoints
KINDS = ["compressed", "born", "dense", "embeddings", "experts"]  # of adapters, by their base
CHECKPOINTS = ADAPTERS = 200
MODEL, ADAPTER = "model.safetensors", "adapter_model.safetensors"
_CONFIG = {MODEL: "config.json", ADAPTER: "adapter_config.json"}
_MEMORY = 1 << 29  # bytes that loading a file of 100 KB may map beside what is there
_RESIDENT = 48 << 20  # and may use

# Whatever a JSON file may say instead of the right thing.
_VALUES: list[Any] = [
    None, True, 0, -1, 1, 3, 13, 4096, 2**31, 2**63, 10**40, 0.5, 1e400, float("nan"), "", "x", "all-linear", "\ud800",
    "\x1b[31m", [], [1], ["x"], {}, {"x": 1}, {"*": {"group_size": 1}}, [[[[]]]],
]  # fmt: skip
# Fields of config.json that only say another model, or how many layers transformers itself shall make.
_MODEL_FIELDS = ["hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size"]
_LAYOUT = ["group_size", "num_clusters", "num_blocks", "scale_in", "scale_out", "x"]
# Codes of a checkpoint are vouched for by a digest; in an adapter also the codebooks that it carries. Dense weights,
# codebooks of a checkpoint and deltas are numbers like any other, except that they have to be finite.
_VOUCHED = ("codes", "code_digest", "base_layer.codebook", "base_layer.scale_in", "base_layer.scale_out")
_SAID = ("newly initialized", "MISSING", "missing", "other codebooks")
_OURS = ("codes", "codebook", "scale_in", "scale_out", "code_digest", "values")


class Case:
    """One damage: to what, of which kind, in which way it is loaded."""

    def __init__(self, number: int) -> None:
        self.number, self.random = number, random.Random(number)
        self.adapter = number >= CHECKPOINTS
        pick = self.random.choice
        self.base = pick(KINDS if self.adapter else BASES)
        self.loader = pick(["peft", "peft", "mixin"]) if self.adapter else "causal"
        self.file = ADAPTER if self.adapter else MODEL
        self.numbers_only = False  # the damage lies in numbers that nothing vouches for
        self.what = ""

    def make(self, root: Path, folder: Path) -> None:
        """A damaged copy of sound files in `folder`."""
        shutil.copytree(root / self.base, folder)
        shards = sorted(folder.glob("*.safetensors"))
        self.path = self.random.choice(shards)
        ways = [self.flip, self.flip, self.header, self.header, self.cut, self.tensors, self.tensors, self.config]
        ways += [self.config, self.config, self.layout, self.swap]
        if self.base == "shards":
            ways += [self.index, self.index]
        self.random.choice(ways)(root, folder)

    def flip(self, root: Path, folder: Path) -> None:
        """A bit of a tensor."""
        data = bytearray(self.path.read_bytes())
        length, header = _header(data)
        name = self.random.choice([key for key in header if key != "__metadata__"])
        start, end = header[name]["data_offsets"]
        where = 8 + length + self.random.randrange(start, end)
        bit = self.random.randrange(8)
        data[where] ^= 1 << bit
        self.path.write_bytes(bytes(data))
        self.numbers_only = not name.endswith(_VOUCHED)
        self.what = f"bit {bit} of byte {where} in {name}"

    def header(self, root: Path, folder: Path) -> None:
        """Names, shapes, dtypes and offsets."""
        data = self.path.read_bytes()
        length, header = _header(data)
        names = [key for key in header if key != "__metadata__"]
        name, other = self.random.choice(names), self.random.choice(names)
        way = self.random.choice(["shape", "dtype", "offsets", "swap", "rename", "drop", "huge", "bytes"])
        entry = header[name]
        if way == "shape":
            entry["shape"] = self.random.choice(
                [entry["shape"][::-1], [*entry["shape"], 1], [], [0], entry["shape"][:1]]
            )
        elif way == "dtype":
            entry["dtype"] = self.random.choice(["F16", "BF16", "I16", "F32", "I32", "U8", "I8", "F8_E4M3", "x"])
            self.numbers_only = not name.endswith(_OURS)  # of dense weights transformers takes what it is given
        elif way == "offsets":
            entry["data_offsets"][self.random.randrange(2)] += self.random.choice([-8, 1, 8, 2**40])
        elif way == "swap":
            header[name], header[other] = header[other], header[name]
            self.numbers_only = not name.endswith(_VOUCHED) and not other.endswith(_VOUCHED)
            if header[name]["dtype"] != header[other]["dtype"] or header[name]["shape"] != header[other]["shape"]:
                self.numbers_only = False
        elif way == "rename":
            header[self.random.choice([name + "x", name.replace(".", ".x", 1), "x", ""])] = header.pop(name)
        elif way == "drop":
            del header[name]
        elif way == "huge":
            entry["shape"] = [2**31, 2**31]
        text = json.dumps(header).encode()
        if way == "bytes":
            text = bytearray(text)
            for _ in range(3):
                text[self.random.randrange(len(text))] = self.random.randrange(256)
        self.path.write_bytes(struct.pack("<Q", len(text)) + bytes(text) + data[8 + length :])
        self.what = f"header: {way} of {name}" + (f" and {other}" if way == "swap" else "")

    def cut(self, root: Path, folder: Path) -> None:
        """Not all of a file, or more."""
        data = self.path.read_bytes()
        way = self.random.choice(["cut", "empty", "more", "length", "gone"])
        if way == "gone":
            self.path.unlink()
        else:
            where = self.random.randrange(len(data))
            length = struct.pack("<Q", self.random.choice([0, 7, 2**20, 2**40, 2**63]))
            self.path.write_bytes(
                {"cut": data[:where], "empty": b"", "more": data + bytes(64), "length": length + data[8:]}[way]
            )
        self.what = f"file: {way}"

    def tensors(self, root: Path, folder: Path) -> None:
        """Tensors that are missing, too much, of other values."""
        tensors = load_file(self.path)
        names = sorted(tensors)
        ours = [name for name in names if name.endswith(_OURS)] or names
        name = self.random.choice(ours)
        way = self.random.choice(["missing", "leftover", "stray", "nan", "inf", "cast", "wider", "zero", "scalar"])
        value = tensors[name]
        if way == "missing":
            name = self.random.choice(names)
            del tensors[name]
        elif way == "leftover":
            where = self.random.choice(["lm_head", "model.layers.7.mlp.up_proj", name.rpartition(".")[0], "x"])
            tensors[f"{where}.{self.random.choice(['codes', 'codebook', 'weight', 'x'])}"] = value.clone()
        elif way == "stray":
            codes = [name for name in ours if name.endswith("codes")] or ours
            name = self.random.choice(codes)
            tensors[name] = torch.full_like(tensors[name], 255 if tensors[name].dtype == torch.uint8 else 65504)
            self.numbers_only = not name.endswith(_VOUCHED)
        elif way in ("nan", "inf"):
            floats = [name for name in ours if tensors[name].is_floating_point()] or ours
            name = self.random.choice(floats)
            if tensors[name].is_floating_point():
                tensors[name].view(-1)[0] = float(way)
                self.numbers_only = not name.endswith(_OURS)
        elif way == "cast":
            to = self.random.choice([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
            tensors[name] = value.to(to)
            self.numbers_only = value.is_floating_point() and to.is_floating_point
        elif way == "wider":
            tensors[name] = torch.cat([value, value[:1]])
        elif way == "zero":
            tensors[name] = torch.zeros_like(value)
            self.numbers_only = not name.endswith(_VOUCHED)
        elif way == "scalar":
            tensors[name] = value.view(-1)[0].clone()
        save_file(tensors, self.path, metadata={"format": "pt"})
        self.what = f"tensor: {way} {name}"

    def config(self, root: Path, folder: Path) -> None:
        """A field of the config."""
        path = folder / _CONFIG[self.file]
        content = json.loads(path.read_text())
        fields = content if self.adapter else content["quantization_config"]
        way = self.random.choice(["field", "field", "field", "drop", "text", "model"])
        key = self.random.choice(sorted(fields))
        value = self.random.choice(_VALUES)
        if way == "model" and not self.adapter:
            key = self.random.choice(_MODEL_FIELDS)
            content[key] = value = self.random.choice([None, 0, -1, 1, 16, 64, "x", [], 0.5])
        elif way == "drop":
            del fields[key]
        elif way != "text":
            fields[key] = value
        text = json.dumps(content)
        if way == "text":
            where = self.random.randrange(len(text))
            text = self.random.choice([text[:where], text[:where] + "\0" + text[where:], "[]", "null", "[" * 9999, ""])
        path.write_text(text)
        self.what = f"config: {way} {key} {value!r:.40}" if way != "text" else "config: text"

    def layout(self, root: Path, folder: Path) -> None:
        """How matrices are stored, by the config."""
        path = folder / _CONFIG[self.file]
        content = json.loads(path.read_text())
        layout = (content if self.adapter else content["quantization_config"])["layout"]
        if not layout:  # an older adapter; here none
            return self.config(root, folder)
        name = self.random.choice(sorted(layout))
        way = self.random.choice(["field", "field", "field", "drop", "rename", "more", "drop field"])
        key, value = self.random.choice(_LAYOUT), self.random.choice([*_VALUES, 2, 4, 12, 16])
        if way == "field":
            layout[name][key] = value
        elif way == "drop":
            del layout[name]
        elif way == "rename":
            layout[self.random.choice(["x", name + ".x", name.replace("*", "0"), "*"])] = layout.pop(name)
        elif way == "more":
            layout[self.random.choice(["lm_head", "model.layers.0.mlp.up_proj", "x"])] = {key: value}
        else:
            layout[name].pop(key, None)
        path.write_text(json.dumps(content))
        self.what = f"layout: {way} {name} {key} {value!r:.40}"

    def swap(self, root: Path, folder: Path) -> None:
        """A file of another model of the same shapes, or one of another kind."""
        name = self.random.choice([self.file, _CONFIG[self.file]])
        if self.base == "shards":
            one, two = sorted(folder.glob("*.safetensors"))[:2]
            data = one.read_bytes()
            one.write_bytes(two.read_bytes())
            two.write_bytes(data)
            self.what = "swap: two shards"
            return
        shutil.copy(root / f"{self.base}-other" / name, folder / name)
        self.what = f"swap: {name} of another"

    def index(self, root: Path, folder: Path) -> None:
        """The index of several files."""
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        places = content["weight_map"]
        name = self.random.choice(sorted(places))
        way = self.random.choice(["drop", "other", "absent", "outside", "type", "gone", "text"])
        others = [place for place in set(places.values()) if place != places[name]]
        if way == "drop":
            del places[name]
        elif way == "other":
            places[name] = sorted(others)[0]
        elif way == "absent":
            places[name] = "absent.safetensors"
        elif way == "outside":
            places[name] = "../../../etc/passwd"
        elif way == "type":
            content["weight_map"] = self.random.choice([None, [], 7, {name: 7}])
        path.write_text("{" if way == "text" else json.dumps(content))
        if way == "gone":
            path.unlink()
        self.what = f"index: {way} of {name}"


def base_of(kind: str) -> str:
    """The folder of the model that an adapter is for."""
    return "dense" if kind in ("born", "dense") else kind


def _header(data: bytes | bytearray) -> tuple[int, dict[str, Any]]:
    length = struct.unpack("<Q", data[:8])[0]
    return length, json.loads(data[8 : 8 + length])


def judge(case: Case, folder: Path, root: Path, sound: dict[str, torch.Tensor], tokens: torch.Tensor) -> dict:
    """Loads a damaged folder and says what came of it."""
    before = _peak(anew=True)
    verdict = _load(case, folder, root, sound, tokens)
    used = _peak() - before
    return verdict if used <= _RESIDENT else {"verdict": "FAULT", "why": f"{used:,} bytes of memory"}


def _load(case: Case, folder: Path, root: Path, sound: dict[str, torch.Tensor], tokens: torch.Tensor) -> dict:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        with torch.no_grad(), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            if case.adapter:
                model = AutoModelForCausalLM.from_pretrained(root / base_of(case.base)).eval()
                if case.loader == "peft":
                    model = PeftModel.from_pretrained(model, str(folder)).eval()
                else:
                    model.load_adapter(str(folder))
            else:
                model = AutoModelForCausalLM.from_pretrained(folder).eval()
            logits = model(input_ids=tokens).logits
    except Exception as error:
        return {"verdict": "refused", **_clear(error)}
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    if torch.equal(logits, sound[case.base]):
        return {"verdict": "same"}
    said += [str(warning.message) for warning in warned]
    if any(words in text for text in said for words in _SAID):
        return {"verdict": "said"}
    if case.numbers_only:
        return {"verdict": "numbers"}
    return {"verdict": "FAULT", "why": f"other logits in silence, finite {bool(logits.isfinite().all())}"}


def _clear(error: Exception) -> dict[str, str]:
    """What an error says; a fault where it was not raised on purpose by our own code."""
    frames = traceback.extract_tb(error.__traceback__)
    owners = ("cluscomp_peft", "transformers", "peft", "accelerate", "huggingface_hub")
    inner = [frame for frame in frames if any(f"/{owner}/" in frame.filename for owner in owners)]
    found = {"error": type(error).__name__, "message": str(error)[:300], "where": ""}
    if inner:
        found["where"] = f"{'/'.join(Path(inner[-1].filename).parts[-3:])}:{inner[-1].lineno}"
    if isinstance(error, MemoryError):
        return {**found, "verdict": "FAULT", "why": "no clear end"}
    if inner and "/cluscomp_peft/" in inner[-1].filename:
        return {**found, **_of_ours(error, frames[-1])}
    return found


def _of_ours(error: Exception, last: traceback.FrameSummary) -> dict[str, str]:
    raised = "/cluscomp_peft/" in last.filename and (last.line or "").startswith("raise")
    if raised and isinstance(error, (ValueError, TypeError, OSError, RuntimeError)) and str(error):
        return {}
    return {"verdict": "FAULT", "why": "a traceback of ours that nobody meant"}


def _peak(anew: bool = False) -> int:
    """Bytes that the process had in memory at most; from now on with `anew`."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell")


def main(root: Path, backend: str) -> None:
    """Reads numbers of cases, writes verdicts."""
    import pytest
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tests.ops.harness import use_backend

    torch.set_num_threads(1)
    if backend != "own":
        use_backend(pytest.MonkeyPatch(), backend)
    tokens = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(1))
    sound: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name in BASES:
            sound[name] = AutoModelForCausalLM.from_pretrained(root / name).eval()(input_ids=tokens).logits
        adapted = {}
        for kind in KINDS:
            model = AutoModelForCausalLM.from_pretrained(root / base_of(kind))
            adapted[kind] = PeftModel.from_pretrained(model, root / "adapters" / kind).eval()(input_ids=tokens).logits
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MEMORY,) * 2)
    print("ready", flush=True)
    for line in sys.stdin:
        case = Case(int(line))
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "damaged"
            if case.adapter:
                case.make(root / "adapters", folder)
            else:
                case.make(root, folder)
            verdict = judge(case, folder, root, adapted if case.adapter else sound, tokens)
        print(json.dumps({"case": case.number, "what": case.what, "base": case.base, **verdict}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
