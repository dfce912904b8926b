"""PEFT and transformers know the method as if it were their own."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import cluscomp_peft
from cluscomp_peft import ClusCompConfig, ClusCompModel, ClusCompQuantizationConfig
from tests import warm


def test_the_type_is_a_full_member_of_the_enum():
    member = PeftType.CLUSCOMP
    assert member in PeftType and member in list(PeftType)
    assert PeftType("CLUSCOMP") is member is PeftType["CLUSCOMP"]
    assert member == "CLUSCOMP" and hash(member) == hash("CLUSCOMP") and member.value == "CLUSCOMP"
    assert (member.name, str(member.value), f"{member.value}") == ("CLUSCOMP", "CLUSCOMP", "CLUSCOMP")
    assert json.dumps({"peft_type": member}) == '{"peft_type": "CLUSCOMP"}'
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert PeftType.LORA != member


def test_the_registries_hold_the_classes():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["CLUSCOMP"] is ClusCompConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.CLUSCOMP] is ClusCompModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.CLUSCOMP] == "cluscomp_"
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["cluscomp"] is ClusCompQuantizationConfig
    assert "cluscomp" in AUTO_QUANTIZER_MAPPING


def test_registering_again_does_nothing():
    before = list(PeftType)
    cluscomp_peft.register()
    assert list(PeftType) == before


def test_configs_survive_files_and_pickles(tmp_path):
    config = ClusCompConfig(bits=3, num_blocks=4, target_modules=["q_proj"], train_scales=True)
    config.save_pretrained(tmp_path)
    for loaded in (
        PeftConfig.from_pretrained(tmp_path),
        ClusCompConfig.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
    ):
        assert isinstance(loaded, ClusCompConfig)
        assert loaded.to_dict() == config.to_dict()
        assert not loaded.is_saved
    quantization = ClusCompQuantizationConfig(bits=2.5, scales=True)
    assert ClusCompQuantizationConfig.from_dict(quantization.to_dict()).to_dict() == quantization.to_dict()


def test_the_public_names_exist():
    for name in cluscomp_peft.__all__:
        assert getattr(cluscomp_peft, name) is not None
    assert cluscomp_peft.__all__ == sorted(cluscomp_peft.__all__)


def test_the_runner_is_named_where_it_helps():
    with pytest.raises(KeyError, match="NO_SUCH_METHOD"):
        PeftConfig.from_peft_type(peft_type="NO_SUCH_METHOD")
    assert "cluscomp_peft.run" in cluscomp_peft.__doc__


HEAVY = ("peft", "transformers.quantizers.auto", "transformers.modeling_utils", "numba", "triton")
REGISTERED = (
    "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as quantizers\n"
    "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as tuners\n"
    "from peft.utils import PeftType\n"
    "from cluscomp_peft import ClusCompConfig, ClusCompModel\n"
    "assert 'cluscomp' in quantizers and tuners[PeftType.CLUSCOMP] is ClusCompModel\n"
    "assert ClusCompConfig().peft_type is PeftType.CLUSCOMP\n"
)


def fresh(code: str, python: str | None = None) -> None:
    """Runs code in a process that has imported neither PEFT nor transformers."""
    done = subprocess.run([python or warm.python("torch"), "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_neither_peft_nor_models():
    imports = "import sys, cluscomp_peft, cluscomp_peft.cli, cluscomp_peft.compress.stream.workers\n"
    fresh(f"{imports}assert not [name for name in {HEAVY} if name in sys.modules]", sys.executable)


@pytest.mark.parametrize(
    "first",
    [
        "import peft, cluscomp_peft",
        "import cluscomp_peft; from transformers import AutoModelForCausalLM",
        "import cluscomp_peft.hf.quantizer",
        "import cluscomp_peft.tuner.config",
    ],
)
def test_whatever_is_imported_first_all_is_registered(first):
    fresh(f"{first}\n{REGISTERED}")


@pytest.mark.parametrize(
    "theirs, ours, imports, name",
    [
        ("peft", "tuner.model", "from peft import LoraConfig", "ClusCompConfig"),
        ("transformers", "hf.quantizer", "from transformers.quantizers import auto", "ClusCompQuantizationConfig"),
    ],
)
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_what_cannot_register_breaks_no_import_but_its_own(first, theirs, ours, imports, name):
    order = [imports, "import cluscomp_peft"] if first == "theirs" else ["import cluscomp_peft", imports]
    fresh(f"""
import sys, warnings
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "cluscomp_peft.{ours}":
            raise AttributeError("moved elsewhere")
sys.meta_path.insert(0, Broken())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {order[0]}
    {order[1]}
said = [str(w.message) for w in caught if "cannot register" in str(w.message)]
assert len(said) == 1 and "{theirs}" in said[0] and "moved elsewhere" in said[0], said
assert cluscomp_peft.kmeans
for _ in range(2):
    try:
        cluscomp_peft.{name}
    except ImportError as error:
        assert "cannot register with the {theirs} that is installed" in str(error), error
    else:
        raise AssertionError("it works without being registered")
""")


def test_absent_names_are_absent():
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchName'"):
        _ = cluscomp_peft.NoSuchName
    assert set(cluscomp_peft.__all__) <= set(dir(cluscomp_peft))


def test_a_system_without_file_locks_imports_and_loads(dense_dir, tmp_path):
    """As on Windows, where there is no fcntl; `compress`, which locks its folder, says so."""
    program = (
        "import sys; sys.modules['fcntl'] = None\n"
        "import cluscomp_peft\n"
        "from cluscomp_peft.cli import main\n"
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(dense_dir)!r})\n"
        "print('loaded', flush=True)\n"
        f"sys.exit(main(['compress', {str(dense_dir)!r}, {str(tmp_path / 'out')!r}, '--bits', '4']))\n"
    )
    run = subprocess.run([warm.python("torch"), "-c", program], capture_output=True, text=True)
    assert "loaded" in run.stdout and run.returncode != 0
    assert "locks its folder with fcntl, which this system lacks" in run.stderr
    assert "Traceback" not in run.stderr
