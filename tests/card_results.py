"""Results of a run as tests of the model card take them."""

from lemo_hf.hub.model_card import Interval, PerplexityComparison, RunResults, StockRun
from lemo_hf.models.lemo_config import LemoConfig

ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def results(**changes):
    values = {
        "base_model": "some-org/some-model",
        "data": "data set some-org/books, train",
        "seq_len": 4096,
        "lemo": LemoConfig().to_dict(),
        "base_config": {"rope_parameters": ROPE, "max_position_embeddings": 4096},
        "datasets": ["some-org/books"],
        "recipe": "model: some-org/some-model\n",
        "steps": 25,
        "train_seconds": 61.7,
        "kept_share": [0.512, 0.498],
        "recall": [0.961, None],
        "recall_chance": 0.487,
        "perplexity_before": Interval(88.217, 86.1, 90.4, 12345),
        "perplexity_after": Interval(72.209, 70.5, 74.0, 12345),
        "provenance": {
            "commit": None,
            "versions": {"torch": "2.99"},
            "machine": {"python": "3.99", "processor": "CPU X", "threads": 2},
        },
    }
    return RunResults(**(values | changes))


STOCK = StockRun(
    comparisons=[
        PerplexityComparison("steps", 25, 25, 73.1, 72.9, 0.27, -0.1, 0.64),
        PerplexityComparison("time", 45, 25, 70.5, 72.9, -3.29, -4.0, -2.58),
    ],
    saved_bytes=400 * 2**20,
    step_flops=2e12,
    step_seconds=4.0,
)
