import re

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lemo_hf.errors import LemoError
from lemo_hf.evaluation.perplexity import Perplexity
from lemo_hf.hub.lemo_files import write_json
from lemo_hf.hub.model_card import BEGIN, END, Interval, RunResults, render_card, write_model_card
from lemo_hf.models.lemo_config import LemoConfig

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT reads it

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


def test_metadata_lets_the_hub_file_the_adapter():
    data = ModelCard(render_card(results(), "mine")).data
    assert data.library_name == "peft"
    assert data.base_model == "some-org/some-model"
    assert data.datasets == ["some-org/books"]
    assert {"lemo", "lora", "long-context"} <= set(data.tags)


def test_numbers_are_those_of_the_results():
    text = render_card(results(), "mine")
    for shown in (
        "| 25 |",
        "62 s on CPU X",
        "88.217",
        "70.500 to 74.000",
        "| 0 | 0.512 | 0.961 |",
        "| 1 | 0.498 |  |",
        "0.487",
        "torch 2.99",
    ):
        assert shown in text
    other = render_card(results(perplexity_after=Interval(1.5, 1.25, 1.75, 7), kept_share=[0.1, 0.2]), "mine")
    assert "1.500 | 1.250 to 1.750 | 7" in other
    assert "72.209" not in other
    assert "| 0 | 0.100 |" in other


def test_what_was_not_measured_is_left_out():
    bare = results(
        perplexity_before=None, perplexity_after=None, kept_share=None, recall=None, steps=None, train_seconds=None, recipe=""
    )
    text = render_card(bare, "mine")
    for said in ("No held-out text was evaluated", "Memory was not measured", "no recall to report", "No stock LoRA run"):
        assert said in text
    for absent in ("Kept share", "Predictor recall", "Training time", "Optimizer steps", "None", "```yaml"):
        assert absent not in text


def test_rendering_again_keeps_what_a_person_added():
    first = render_card(results(), "mine")
    edited = first.replace("library_name: peft", "library_name: peft\nlicense: mit\nlanguage: en").replace(
        "- lora\n", "- lora\n- my-tag\n"
    )
    edited = edited.replace(BEGIN, f"A word before.\n\n{BEGIN}") + "\n## My notes\n\nTried on my corpus.\n"
    edited = edited.replace("72.209", "1.0")  # what stands between the markers is not theirs
    again = render_card(results(steps=50), "mine", edited)
    card = ModelCard(again)
    assert card.data.license == "mit"
    assert card.data.language == "en"
    assert "my-tag" in card.data.tags
    assert again.index("A word before.") < again.index(BEGIN) < again.index(END) < again.index("Tried on my corpus.")
    assert "| 50 |" in again
    assert "72.209" in again
    assert render_card(results(steps=50), "mine", again) == again


def test_a_hand_written_card_without_markers_is_kept_whole():
    text = render_card(results(), "mine", "---\nlicense: mit\n---\n\nMy own card.\n")
    assert text.index(END) < text.index("My own card.")


def test_cards_that_tools_write_do_not_pile_up(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)  # writes PEFT's default card
    assert "More Information Needed" in (tmp_path / "README.md").read_text()
    local = results(base_model=str(tmp_path / "base"), datasets=[])
    write_model_card(local, tmp_path, "mine")
    first = (tmp_path / "README.md").read_text()
    assert "More Information Needed" not in first
    assert str(tmp_path) not in first  # a local folder is nobody else's business, and the Hub refuses it as base_model
    model.save_pretrained(tmp_path)  # PEFT edits the card that is there
    write_model_card(local, tmp_path, "mine")
    assert (tmp_path / "README.md").read_text() == first
    assert "base_model" not in ModelCard(first).data.to_dict()


def test_a_baseline_without_elimination_does_not_claim_it():
    text = render_card(results(lemo=LemoConfig(enabled=False).to_dict()), "mine")
    assert "dense baseline" in text
    assert "leaves tokens out" not in text


def test_the_loading_example_runs_and_gives_the_models_logits(tiny_llama, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama.save_pretrained(base)
    config = {"rope_parameters": ROPE, "max_position_embeddings": 2048}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, **config), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(adapter)
    text = render_card(results(base_model="org/base", base_config=config), "mine", adapter=str(adapter))
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("org/base", str(base))
    code = "\n".join(line for line in code.splitlines() if "AutoTokenizer" not in line)
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "PeftModel": PeftModel}
    exec(code, names)
    ids = torch.arange(100)[None]
    with torch.no_grad():
        assert torch.equal(names["model"](ids).logits, model.eval()(ids).logits)


def test_intervals_come_from_the_documents():
    measured = Interval.of(Perplexity((20.0, 25.0, 24.0), (10, 10, 10)))
    assert measured.low < measured.value < measured.high
    assert measured.value == pytest.approx(torch.tensor(2.3).exp().item())
    alone = Interval.of(Perplexity((20.0,), (10,)))
    assert alone.low is None
    assert "one document" in render_card(results(perplexity_after=alone), "mine")


def test_results_file_comes_back(tmp_path):
    write_json(tmp_path / "results.json", results().to_dict())
    assert RunResults.read(tmp_path / "results.json") == results()
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(LemoError, match="cannot be read"):
        RunResults.read(tmp_path / "results.json")
