"""vLLM with our plug-in, in an environment of its own that has vllm and this package installed.

`CLUSCOMP_VLLM_PYTHON` names its python; without it these tests skip.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cluscomp_peft.cli import main
from tests.export.test_gguf import SIZES, byte_level
from tests.mixtures import tiny_mixture

pytestmark = pytest.mark.slow

GREEDY = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompts, settings = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    engine = LLM(folder, dtype="float32", max_model_len=128, max_num_seqs=4, **settings)
    sampling = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    with open(sys.argv[4], "w") as file:  # vLLM prints into stdout too
        json.dump([list(output.outputs[0].token_ids) for output in outputs], file)
"""
ENVIRONMENT = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def python() -> str:
    path = os.environ.get("CLUSCOMP_VLLM_PYTHON")
    if not path:
        pytest.skip("CLUSCOMP_VLLM_PYTHON names no environment with vllm")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A Llama with grouped queries, tied embeddings and heads of a size that vLLM's attention takes, compressed."""
    dense, target = tmp_path_factory.mktemp("dense"), str(tmp_path_factory.mktemp("made") / "out")
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 384, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, head_dim=64))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)  # or every token follows every other
    model.save_pretrained(dense)
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for message in messages %}<|turn|>{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(dense)
    assert main(["compress", str(dense), target, "--bits", "3"]) == 0
    return target


def greedy(folder: str, prompt: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor([prompt])
    made = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), min_new_tokens=64, max_new_tokens=64, do_sample=False
    )
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("settings", [{"enforce_eager": True}, {}])
def test_greedy_tokens_are_those_of_transformers(python, folder, settings, tmp_path):
    prompts = [[1, 50, 60, 70], [1, *range(100, 140)]]
    script, made = tmp_path / "greedy.py", tmp_path / "made.json"  # processes of vLLM import the script anew
    script.write_text(GREEDY)
    arguments = [python, str(script), folder, json.dumps(prompts), json.dumps(settings), str(made)]
    run = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(made.read_text()) == [greedy(folder, prompt) for prompt in prompts]


def test_tensor_parallelism_is_refused(python, folder, tmp_path):
    script, settings = tmp_path / "greedy.py", {"tensor_parallel_size": 2, "enforce_eager": True}
    script.write_text(GREEDY)
    arguments = [python, str(script), folder, "[[1]]", json.dumps(settings), str(tmp_path / "made.json")]
    environment = {**ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # or it asks for a socket for each rank
    run = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode != 0 and "cannot be cut for tensor parallelism" in run.stdout + run.stderr


def test_a_flipped_code_is_noticed(python, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "damaged")
    path = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("v_proj.codes"))
    tensors[key][3, 1] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    script = tmp_path / "greedy.py"
    script.write_text(GREEDY)
    arguments = [
        python,
        str(script),
        str(path.parent),
        "[[1]]",
        '{"enforce_eager": true}',
        str(tmp_path / "made.json"),
    ]
    run = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert run.returncode != 0 and "not the ones it was saved with" in run.stdout + run.stderr


ASK = """
import json, sys
from cluscomp_peft.serving.vllm import ClusCompConfigOfVllm

try:
    ClusCompConfigOfVllm.from_config(json.load(open(sys.argv[1]))["quantization_config"])
except ValueError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("what", ["embeddings", "experts", "neither"])
def test_what_is_not_served_is_refused_by_name_and_with_a_cure(python, what, tmp_path):
    model = tiny_mixture("mixtral") if what == "experts" else LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(tmp_path / "dense")
    flags = ["--bits", "6", "--calibration", "none", *(["--embeddings"] if what == "embeddings" else [])]
    assert main(["compress", str(tmp_path / "dense"), str(tmp_path / "out"), *flags]) == 0
    arguments = [python, "-c", ASK, str(tmp_path / "out" / "config.json")]
    said = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert said.returncode == 0, said.stderr[-3000:]
    lines = [line for line in said.stdout.splitlines() if line.startswith("refused: ")]
    if what == "neither":
        assert not lines
    else:
        assert f"the {what} of this checkpoint are clustered" in lines[0] and "--to dense" in lines[0]


def test_the_server_answers_a_chat(python, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; that command itself asks for a package called vllm, which vllm-cpu is not.
    serve = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", str(port)]
    serve += ["--enforce-eager", "--max-model-len", "128", "--served-model-name", "tiny", "--host", "127.0.0.1"]
    server = subprocess.Popen(serve, env=ENVIRONMENT, start_new_session=True)
    try:
        deadline = time.monotonic() + 900
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(1)
        body = {"model": "tiny", "max_tokens": 8, "messages": [{"role": "user", "content": "The quick brown fox"}]}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            answer = json.load(response)
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert answer["usage"]["completion_tokens"] == 8 or answer["choices"][0]["finish_reason"] == "stop"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False
