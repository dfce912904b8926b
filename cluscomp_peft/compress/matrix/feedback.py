"""Error feedback: codes and codebook of one matrix, chosen for its outputs instead of its weights.

K-means makes ‖W − Ŵ‖² small. What counts is the error of the layer's output over calibration inputs x,

    L(Ŵ) = tr (W − Ŵ) H (W − Ŵ)ᵀ,      H = E[x xᵀ]  [in, in]

Groups run along the output dimension, so a vector belongs to one input channel and H couples channels only; three
steps, each of which never raises L (the first lowers it from where K-means ended in all but odd cases):

    carry      channel by channel in the order of falling H_ii: nearest centroids; the error is carried over to the
               channels still to come, which make up for it            GPTQ (Frantar et al. 2022, arXiv 2210.17323)
    settle     given all codes, L is quadratic in the codebook: conjugate gradients to its minimum
    revisit    given the codebook, each channel in turn takes the centroids nearest to
               v̂_i + (R H)_i / H_ii,  R = V − V̂: coordinate descent, exact for that channel

All of it happens in the scaled space V = W / (s_out · s_in), H' = s_in H s_in, and runs at the speed of matmul: inside
a block of channels errors are carried at once, to the others by one product a block. The paper has no such step; there
the reconstruction of blocks alone repairs the codes' choice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...clustering.search import Nearest
from ...codes import group

__all__ = ["cholesky", "damp", "feedback_factor", "refine_codes"]

_BLOCK = 128
_DAMPING = 0.01  # of the mean of H's diagonal, added to it: H is estimated from finitely many tokens


def refine_codes(
    weight: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    hessian: torch.Tensor,
    *,
    sweeps: int = 3,
    solver_steps: int = 3,
    threads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Better codes and codebook for the layer's outputs.

    Args:
        weight (`torch.Tensor`): V [out, in] fp32, already divided by the scales.
        codes (`torch.Tensor`): [in, groups] int64, from K-means.
        codebook (`torch.Tensor`): [n, g] fp32.
        hessian (`torch.Tensor`): H' [in, in] fp32, E[x xᵀ] times s_in on both sides.
        sweeps (`int`): Rounds of revisit and settle after the first pass. On SmolLM2-135M at 3.1 bits a second one
            lowers L by 1 to 2 %, a third by another 1 %, a fourth by 0.6 %.
        solver_steps (`int`): Steps of conjugate gradients of one settle. There 3 end within 0.3 % of 12.
        threads (`int`, *optional*): Of the search for centroids.

    Returns:
        codes [in, groups] int64 and codebook [n, g] fp32.
    """
    hessian = damp(hessian)
    order = torch.argsort(hessian.diagonal(), descending=True)
    # A channel a row, so that the vectors of a channel lie together: [in, groups · g], padded with zeros.
    vectors = group(weight, codebook.shape[1]).flatten(1)[order].contiguous()
    hessian = hessian[order]
    problem = _Problem(vectors, hessian[:, order].contiguous(), weight.shape[0])
    del hessian
    found = codes[order]
    slope = problem.slope(codebook, found)
    candidate = problem.carry(Nearest(codebook, threads), found)
    other = problem.slope(codebook, candidate)
    if problem.loss(codebook, candidate, other) < problem.loss(codebook, found, slope):
        found, slope = candidate, other
    del candidate, other
    codebook = problem.settle(codebook, found, slope, solver_steps)
    for _ in range(sweeps):
        found = problem.revisit(codebook, found, slope, Nearest(codebook, threads))
        codebook = problem.settle(codebook, found, slope, solver_steps)
    result = torch.empty_like(found)
    result[order] = found
    return result, codebook


def damp(hessian: torch.Tensor) -> torch.Tensor:
    """H plus 1 % of the mean of its diagonal, so that channels that calibration never excited count a little."""
    return _raise_diagonal(hessian, max(_DAMPING * float(hessian.diagonal().mean()), 1e-30), hessian.dtype)


def cholesky(hessian: torch.Tensor) -> torch.Tensor:
    """The lower Cholesky factor of H, fp64; of H with a larger diagonal where H is not positive.

    Raises:
        ValueError: If no diagonal helps.
    """
    mean = float(hessian.diagonal().mean())
    for damping in (0.0, 0.01, 0.1, 1.0):
        lower, info = torch.linalg.cholesky_ex(_raise_diagonal(hessian, damping * mean, torch.float64))
        if int(info) == 0:
            return lower
    raise ValueError("the second moments of the inputs are not positive; calibrate on other text.")


def feedback_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of H⁻¹, fp32: row i says what an error of channel i does to those after it.

    With J turning the order round and J H J = L Lᵀ it is J L⁻¹ J: H⁻¹ itself, as large as H in fp64, is not needed.
    """
    lower = cholesky(hessian.flip(0, 1))
    inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, inverse, upper=False)
    return inverse.float().flip(0, 1)


def _raise_diagonal(matrix: torch.Tensor, by: float, dtype: torch.dtype) -> torch.Tensor:
    raised = matrix.to(dtype, copy=True)
    raised.diagonal().add_(by)
    return raised


class _Problem:
    """V as rows of channels [in, groups · g], H in the same order; the padding of the last group costs nothing.

    The slope H (V − V̂) [in, groups · g] goes along with codes and codebook: each step leaves it as its own changes
    make it, so that the product of H with all of V is needed once.
    """

    def __init__(self, vectors: torch.Tensor, hessian: torch.Tensor, out_features: int) -> None:
        self.vectors, self.hessian, self.out = vectors, hessian, out_features

    def decode(self, codebook: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """V̂ [in, groups · g]; the padding is made equal to V's, zero."""
        values = F.embedding(codes, codebook).flatten(1)
        values[:, self.out :] = 0
        return values

    def slope(self, codebook: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return self.hessian @ (self.vectors - self.decode(codebook, codes))

    def loss(self, codebook: torch.Tensor, codes: torch.Tensor, slope: torch.Tensor) -> float:
        return float((slope * (self.vectors - self.decode(codebook, codes))).sum(dtype=torch.float64))

    def carry(self, nearest: Nearest, known: torch.Tensor) -> torch.Tensor:
        """Codes of one pass of error feedback, channel by channel; those of K-means are probably near."""
        factor = feedback_factor(self.hessian)
        factor /= factor.diagonal()[:, None].clone()
        left = self.vectors.clone()
        codes = torch.empty_like(known)
        for start in range(0, len(left), _BLOCK):
            block = slice(start, start + _BLOCK)
            own, behind = factor[block, block], factor[block, start + _BLOCK :]
            codes[block], errors = nearest.sweep(left[block], -own, known[block], True, self.out)
            left[start + _BLOCK :].addmm_(behind.t(), errors, alpha=-1)
        return codes

    def revisit(
        self, codebook: torch.Tensor, codes: torch.Tensor, slope: torch.Tensor, nearest: Nearest
    ) -> torch.Tensor:
        """Codes after each channel in turn took what is best for it; `slope` goes along."""
        found = torch.empty_like(codes)
        diagonal = self.hessian.diagonal()[:, None]
        for start in range(0, len(codes), _BLOCK):
            block = slice(start, start + _BLOCK)
            wanted = self.decode(codebook, codes[block]) + slope[block] / diagonal[block]
            own = (self.hessian[block, block] / diagonal[block]).t()  # of channel i on k: H_ki / H_kk
            found[block], moved = nearest.sweep(wanted, own, codes[block], False, self.out)
            slope.addmm_(self.hessian[:, block], moved)
        return found

    def settle(self, codebook: torch.Tensor, codes: torch.Tensor, slope: torch.Tensor, steps: int) -> torch.Tensor:
        """The codebook that minimises L for these codes, by conjugate gradients from the present one; `slope` goes
        along."""
        flat = codes.flatten()

        def gather(matrix: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(codebook).index_add_(0, flat, matrix.view(-1, codebook.shape[1]))

        # Preconditioned by the diagonal of the curvature's own part: Σ H_ii over the vectors of a centroid.
        scale = torch.zeros(len(codebook), device=codebook.device)
        diagonal = self.hessian.diagonal().repeat_interleave(codes.shape[1])
        scale.index_add_(0, flat, diagonal)
        scale = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))[:, None]
        best = codebook.clone()
        rest = gather(slope)
        z = scale * rest
        direction, power = z.clone(), float((rest * z).sum(dtype=torch.float64))
        first = power
        for _ in range(steps):
            if power <= 1e-8 * first:
                break
            change = self.hessian @ self.decode(direction, codes)
            image = gather(change)
            bend = float((direction * image).sum(dtype=torch.float64))
            if bend <= 0:
                break
            best.add_(direction, alpha=power / bend)
            slope.sub_(change, alpha=power / bend)
            rest.sub_(image, alpha=power / bend)
            z = scale * rest
            previous, power = power, float((rest * z).sum(dtype=torch.float64))
            direction = z + (power / previous) * direction
        return best
