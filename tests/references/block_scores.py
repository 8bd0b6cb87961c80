"""Block scores and informativeness by loops over token pairs, in Python floats."""

from torch import Tensor


def brute_block_scores(
    query: Tensor, key: Tensor, block_size: int, scale: float, window: int | None = None, reduction: str = "max"
) -> list[list[float]]:
    """S from `(tokens, heads, head_dim)` queries and `(tokens, key_value_heads, head_dim)` keys."""
    tokens, heads, _ = query.shape
    group = heads // key.shape[1]
    q, k = query.double().tolist(), key.double().tolist()
    blocks = (tokens + block_size - 1) // block_size
    scores = [[0.0] * blocks for _ in range(blocks)]
    for i in range(tokens):
        for j in range(i + 1):
            if window is not None and i - j >= window:
                continue
            total = 0.0
            for head in range(heads):
                dot = sum(a * b for a, b in zip(q[i][head], k[j][head // group], strict=True))
                total += max(0.0, dot * scale) if reduction == "max" else dot * scale
            m, n = i // block_size, j // block_size
            if reduction == "max":
                scores[m][n] = max(scores[m][n], total / heads)
            else:
                rows, columns = (min(tokens - block * block_size, block_size) for block in (m, n))
                scores[m][n] += total / heads / (rows * columns)
    return scores


def brute_informativeness(scores: list[list[float]]) -> list[float]:
    """I from S by its definition."""
    blocks = len(scores)
    result = []
    for n in range(blocks):
        as_keys = sum(scores[m][n] for m in range(n + 1, blocks))
        as_queries = sum(scores[n][m] for m in range(n))
        result.append((as_keys + as_queries) / (blocks - 1) if blocks > 1 else 0.0)
    return result
