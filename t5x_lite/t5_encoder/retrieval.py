"""Metrics of retrieval. Must not depend on models or texts."""

import numpy as np
from jaxtyping import Float, Int

_QUERIES_AT_ONCE = 1024


def retrieved(
    queries_NE: Float[np.ndarray, "N E"], answers_ME: Float[np.ndarray, "M E"], right_N: Int[np.ndarray, " N"]
) -> tuple[dict[str, float], Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Find the answers of queries by the product of their embeddings.

    Args:
      right_N: the index of each query's right answer.

    Returns:
      The metrics, in per cent: `retrieval@1`, `@5` and `@10`, the share of queries whose right answer is among the
      first k, and `mrr`, the mean of 1 / rank. An answer as near as the right one ranks before it. Then the nearest
      answer of each query, and its similarity.
    """
    ranks, best, similarity = [], [], []
    for start in range(0, len(queries_NE), _QUERIES_AT_ONCE):
        similarity_NM = queries_NE[start : start + _QUERIES_AT_ONCE] @ answers_ME.T
        right_N1 = right_N[start : start + _QUERIES_AT_ONCE, None]
        is_farther_NM = similarity_NM < np.take_along_axis(similarity_NM, right_N1, axis=1)  # not where one is NaN
        ranks.append(np.sum(~is_farther_NM, axis=1))
        best.append(np.argmax(similarity_NM, axis=1))
        similarity.append(np.max(similarity_NM, axis=1))
    rank_N = np.concatenate(ranks)
    metrics = {f"retrieval@{k}": 100.0 * float(np.mean(rank_N <= k)) for k in (1, 5, 10)}
    return metrics | {"mrr": 100.0 * float(np.mean(1.0 / rank_N))}, np.concatenate(best), np.concatenate(similarity)
