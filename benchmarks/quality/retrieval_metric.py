"""Retrieval accuracy as an `evaluate.Metric`, by task, length and depth; it loads without a network.

```python
metric = RetrievalMetric()                  # or evaluate.load(the path of this file)
metric.add_batch(predictions=[1, 0], references=[{"task": "passkey", "tokens": 4096, "depth": 0.1}, ...])
metric.compute()                            # {"accuracy": ..., "questions": ..., "passkey": ..., "4096_tokens": ..., "depth_0.1": ...}
```
"""

from collections import defaultdict
from typing import Any

import datasets
import evaluate


class RetrievalMetric(evaluate.Metric):
    """Share of questions whose whole answer is right, in [0, 1].

    Args:
        **kwargs: As for `evaluate.Metric`. Nothing is written to disk unless several processes take part.
    """

    def __init__(self, config_name: str | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(config_name=config_name, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        question = {"task": datasets.Value("string"), "tokens": datasets.Value("int64"), "depth": datasets.Value("float64")}
        return evaluate.MetricInfo(
            description="Share of retrieval questions whose answer is right, by task, length and depth.",
            citation="",
            inputs_description=(
                "predictions: 1 where every token of the answer is the most likely one, else 0. references: task, length of the "
                "context in tokens, and depth of the line asked for, a fraction in [0, 1]."
            ),
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": question}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        if not len(predictions):
            raise ValueError("accuracy of no questions; 0 predictions; add some")
        answers: dict[str, list[int]] = defaultdict(list)
        for right, asked in zip(predictions, references, strict=True):
            for name in ("accuracy", asked["task"], f"{asked['tokens']}_tokens", f"depth_{asked['depth']:g}"):
                answers[name].append(int(right))
        return {name: sum(given) / len(given) for name, given in answers.items()} | {"questions": len(predictions)}
