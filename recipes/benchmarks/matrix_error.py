"""What is the relative error of real weight matrices, without any data? ClusComp against round to nearest and NF4.

    python recipes/benchmarks/matrix_error.py MATRICES.safetensors [--conv1d] [--bits 2 3 4]

For every 2-D tensor [out, in] of the file (`--conv1d`: [in, out], as GPT-2 stores them): ‖W − Ŵ‖ / ‖W‖, and how far
the largest weight lies from the mean, in standard deviations: few such weights are what breaks quantisers. NF4 and RTN
take a scale (RTN also a minimum) for 64 weights, half a bit; ClusComp's bits are true bits.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from baselines import nf4, round_to_nearest
from harness import Results, Row, arguments, settings_of, table
from safetensors.torch import load_file
from torch import nn

from cluscomp_peft.compress.policy import Policy


def main() -> None:
    parser = arguments(__doc__, "matrix_error")
    parser.add_argument("file", help="safetensors")
    parser.add_argument("--conv1d", action="store_true", help="tensors are [in, out]")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    options = parser.parse_args()
    results = Results(options.results, settings_of(options, "file", "conv1d"), options.fresh)
    tensors = {name: tensor for name, tensor in sorted(load_file(options.file).items()) if tensor.ndim == 2}
    methods = [f"{method} {bits}" for bits in options.bits for method in ("ClusComp", "RTN")] + ["NF4"]

    def measure(job: Row) -> Row:
        tensor = tensors[job["matrix"]]
        weight = (tensor.t() if options.conv1d else tensor).float().contiguous()
        sigmas = float((weight - weight.mean()).abs().max() / weight.std())
        return {"sigmas": sigmas, "error": error_of(weight, job["method"])}

    jobs = [{"matrix": name, "method": method} for name in tensors for method in methods]
    rows = results.complete(jobs, measure)
    worst = max(rows, key=lambda row: row["sigmas"])
    lines = [
        {"name": f"median of {len(tensors)} matrices", **_by_method(rows, statistics.median)},
        {"name": f"{worst['matrix']} ({worst['sigmas']:.0f} σ)"}
        | _by_method([row for row in rows if row["matrix"] == worst["matrix"]], max),
    ]
    # RTN's scale and minimum for 64 weights take half a bit, and NF4's fp32 scale too.
    titles = {"ClusComp": "{}", "RTN": "{}.5", "NF4": "{} 4.5"}
    columns = {titles[method.split()[0]].format(method): f"{{{method}:.4f}}" for method in methods}
    print(table(lines, {"": "{name}", **columns}))


def _by_method(rows: list[Row], over: Callable[[list[float]], float]) -> dict[str, float]:
    methods = dict.fromkeys(row["method"] for row in rows)
    return {method: over([row["error"] for row in rows if row["method"] == method]) for method in methods}


def error_of(weight: torch.Tensor, method: str) -> float:
    """‖W − Ŵ‖ / ‖W‖ of a weight [out, in]."""
    kind, _, bits = method.partition(" ")
    if kind == "ClusComp":
        policy = Policy(bits=int(bits))
        found = policy.cluster("matrix", weight, policy.spec_for("matrix", *weight.shape)).decode(torch.float32)
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight.clone()
        model = nn.Sequential(nn.ModuleList([layer]))
        if kind == "NF4":
            nf4(model)
        else:
            round_to_nearest(model, int(bits))
        found = layer.weight.detach()
    return float((found - weight).norm() / weight.norm())


if __name__ == "__main__":
    main()
