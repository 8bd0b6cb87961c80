from card_results import STOCK, results

from lemo_hf.hub.card_tables import literal
from lemo_hf.hub.model_card import Interval, render_card
from lemo_hf.models.lemo_config import LemoConfig


def test_stock_lora_stands_beside_the_run():
    own = results(batch=1, saved_bytes=100 * 2**20, step_flops=1e12, step_seconds=1.0, stock=STOCK)
    text = render_card(own, "mine")
    for row in (
        "| 73.100 | 72.900 | +0.27 % (-0.10 to +0.64) |",
        "45 steps against 25 (difference with its 95 % interval) | 70.500 | 72.900 | -3.29 % (-4.00 to -2.58) |",
        "by one forward pass of 1 × 4096 tokens | 100 MiB | 400 MiB | 0.25 of stock |",
        "| 1000 G | 2000 G | 0.50 of stock |",
        "| 1.00 s | 4.00 s | 0.25 of stock |",
    ):
        assert row in text
    assert "No stock LoRA run" not in text
    alone = render_card(results(saved_bytes=12 * 2**30, peak_gpu_bytes=41.5 * 2**30), "mine")
    assert "| Saved for the backward pass by one forward pass | 12.0 GiB |\n" in alone
    assert "| Peak GPU memory while training, weights included | 41.5 GiB |\n" in alone
    assert "Memory was not measured" not in alone


def test_a_fine_tune_that_is_worse_than_its_base_says_so():
    said = "higher than its base model's"
    assert said in render_card(results(perplexity_before=Interval(70.0, None, None, 5)), "mine")
    assert said not in render_card(results(), "mine")


def test_a_run_that_went_on_from_an_adapter_compares_with_that_one(tmp_path):
    text = render_card(results(started_from=str(tmp_path / "first")), "mine")
    assert "| Went on from | adapter `first` |" in text
    assert "| Before this run, with the adapter it started from | 88.217 |" in text
    assert "Base model, same config" not in text
    assert "Base model, same config" in render_card(results(), "mine")


def test_every_selection_has_its_words():
    for lemo, words in (
        (LemoConfig(), "sampled: drawn anew at each step, uniformly |"),
        (LemoConfig(draws="by_layer"), "sampled: drawn anew at each step and layer, uniformly |"),
        (LemoConfig(sampling_temperature=0.5), "by informativeness, temperature 0.5, as the pattern predictors see it"),
        (LemoConfig(selection="ratio", score_source="true"), "the most informative ones, by the layer's own queries and keys"),
        (LemoConfig(selection="threshold", keep_ratio=[0.25, 0.75]), "| Budget of the thresholds | 0.25 to 0.75, by layer of"),
        (LemoConfig(dense_layers=[0, -1]), "| Layers that keep every token | 0, -1 |"),
        (LemoConfig(), "| Attention in training | exact: dense forward pass, gradient of the kept tokens |"),
        (LemoConfig(attention_forward="sparse"), "sparse: kept tokens attend to kept tokens, gradient of the kept tokens |"),
        (LemoConfig(attention_forward="sparse", nearby_tokens=7), "kept tokens, dropped ones to the last 7 tokens, gradient"),
        (
            LemoConfig(attention_forward="kept_keys"),
            "kept_keys: every token attends to the kept tokens and to the last 256, gradient",
        ),
        (LemoConfig(attention_forward="kept_keys", nearby_tokens=7), "to the kept tokens and to the last 7, gradient"),
        (LemoConfig(checkpoint="kept_rows"), "stores its kept rows and recomputes"),
    ):
        assert words in render_card(results(lemo=lemo.to_dict()), "mine"), lemo


def test_values_in_a_card_are_formatted_python():
    value = {"rope_type": "yarn", "factor": 4.0, "say": 'a "b"', "on": True, "none": None, "layers": [1, "x"]}
    text = literal(value)
    assert eval(text) == value
    assert text.startswith('{"rope_type": "yarn", "factor": 4.0,')
