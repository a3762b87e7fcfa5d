"""Which tokens top_k, top_p and min_p leave to sample from, in that order (as in Transformers).

A filter keeps every token at or above a threshold, so that equal logits are kept or dropped together and the result is a function of
the values alone, whatever order a device sorts ties in.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def build_keep_mask(logits: Tensor, params: npt.NDArray[np.void]) -> Tensor:
    """Return bool [R, V], True for the tokens that may be sampled; at least one a row.

    Args:
        logits: float64 [R, V], already divided by the temperature.
        params: the rows' sampling parameters, records of ``SAMPLING_DTYPE`` [R].
    """
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp_()  # probabilities as a share of the largest one
    threshold = _column(params["min_p"], logits)
    has_top_k = (params["top_k"] > 0) & (params["top_k"] < logits.shape[1])
    has_top_p = params["top_p"] < 1
    if has_top_k.any() or has_top_p.any():
        threshold = threshold.maximum(_largest_thresholds(weights, params, has_top_k, has_top_p))
    return ~(weights < threshold)  # so that NaN is kept, where the sampler sees it


def _largest_thresholds(
    weights: Tensor, params: npt.NDArray[np.void], has_top_k: npt.NDArray[np.bool_], has_top_p: npt.NDArray[np.bool_]
) -> Tensor:
    """Return [R, 1], the smallest weight that top_k and top_p keep; 0 where a row has neither."""
    ordered = _sort_descending(weights)
    kth = torch.from_numpy(np.where(has_top_k, params["top_k"], 1) - 1).to(weights.device)[:, None]
    by_count = ordered.gather(1, kth) * _column(has_top_k, weights)
    kept = ordered * (ordered >= by_count)
    mass = kept.cumsum(dim=-1)
    wanted = mass[:, -1:] * _column(params["top_p"], weights)
    last = ((mass - kept < wanted).sum(dim=-1, keepdim=True) - 1).clamp_(min=0)
    by_mass = ordered.gather(1, last) * _column(has_top_p, weights)
    return by_count.maximum(by_mass)


def _sort_descending(values: Tensor) -> Tensor:
    if values.device.type == "cpu":  # NumPy sorts with vector instructions, nine times as fast as torch
        return -torch.from_numpy(np.sort(-values.numpy(), axis=-1))
    return values.sort(dim=-1, descending=True).values


def _column(values: npt.NDArray[np.generic], like: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.float64)).to(like.device)[:, None]
