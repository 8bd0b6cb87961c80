"""Perplexity as an `evaluate.Metric`: gathers documents' losses over batches and processes, and loads without a network.

```python
metric = PerplexityMetric("dense")          # or evaluate.load(the path of this file, "dense")
metric.add_batch(predictions=measured.nll_sums, references=measured.token_counts)
metric.compute()                            # {"dense_perplexity": ..., "dense_loss": ..., "tokens": ..., "documents": ...}
```
"""

import math
from typing import Any

import datasets
import evaluate


class PerplexityMetric(evaluate.Metric):
    """exp of the summed negative log-likelihood over the number of tokens.

    Args:
        config_name: "dense" (the forward that stock `transformers` serves) or "sparse" (the training-time one); it becomes
            the prefix of the result, so that one is never taken for the other.
        **kwargs: As for `evaluate.Metric`. Nothing is written to disk unless several processes take part.
    """

    config_name: str

    def __init__(self, config_name: str | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(config_name=config_name or "dense", **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name == "default":  # what evaluate.load makes of no name
            self.config_name = "dense"
        if self.config_name not in ("dense", "sparse"):
            raise ValueError(f"no such perplexity; {self.config_name!r}; choose 'dense' or 'sparse'")
        return evaluate.MetricInfo(
            description="Token-exact perplexity from summed losses and token counts of documents.",
            citation="",
            inputs_description=(
                "predictions: summed negative log-likelihood of each document, nats. references: labelled tokens of each."
            ),
            features=datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        tokens = int(sum(references))
        if tokens == 0:
            raise ValueError(f"perplexity of no tokens; {len(references)} documents; add documents with labelled tokens")
        loss = math.fsum(predictions) / tokens
        return {
            f"{self.config_name}_perplexity": math.exp(loss),
            f"{self.config_name}_loss": loss,
            "tokens": tokens,
            "documents": len(references),
        }
