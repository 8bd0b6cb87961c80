"""What a run with another adapter, base or set of trained weights saves, loads back whole, predictors included."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from training_runs import RandomText, curve, tiny_arguments
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TrainerCallback

from lemo_hf import AutoLemoModelForCausalLM, LemoConfig, LemoTrainer
from lemo_hf.errors import LemoError
from lemo_hf.hub.lemo_files import predictor_tensors
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.training.compatible_options import keep_trainable

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
BLOCK = {"block_size": 8, "predictor_rank": 8, "predictor_features": 8, "selection": "ratio", "keep_ratio": 0.4}
BITS = {4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}, 8: {"load_in_8bit": True}}
CASES = {
    "dora": (None, {"use_dora": True, "target_modules": [*ATTENTION, "down_proj"]}),
    "4bit": (4, {"target_modules": ATTENTION}),
    "4bit, dora, kept rows": (4, {"use_dora": True, "target_modules": ATTENTION}),
    "4bit, kept keys, kept rows": (4, {"target_modules": ATTENTION}),
    "8bit": (8, {"target_modules": ATTENTION, "use_rslora": True}),
    "ends": (None, {"target_modules": [*ATTENTION, "lm_head"], "modules_to_save": ["embed_tokens"]}),
    "tokens": (None, {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [5, 7]}}),
    "full": (None, None),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    # Where a CPU lays 4-bit matrices out for inference, their rows must be whole blocks of 64.
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def quantization(bits):
    return {} if bits is None else {"quantization_config": BitsAndBytesConfig(**BITS[bits])}


@pytest.mark.parametrize("case", CASES)
def test_a_run_loads_back_with_its_predictors(case, base, tmp_path):
    bits, adapter = CASES[case]
    torch.manual_seed(0)
    form = {"attention_forward": "kept_keys", "nearby_tokens": 7} if "kept keys" in case else {}
    block = LemoConfig(**BLOCK, **form, checkpoint="kept_rows" if "kept rows" in case else "none")
    model = AutoLemoModelForCausalLM.from_pretrained(base, lemo=block, dtype=torch.float32, **quantization(bits))
    if bits is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if adapter is not None:
        model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **adapter))
    before = {name: value.clone() for name, value in predictor_tensors(sparse_backbone(model)).items()}
    args = tiny_arguments(tmp_path / "run", max_steps=2, learning_rate=5e-2, predictor_documents=2)
    trainer = LemoTrainer(model, args, train_dataset=RandomText())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert trainer.state.log_history[-2]["kept_share"] < 0.5

    loaded = AutoLemoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32, **quantization(bits))
    assert isinstance(loaded, PeftModel) == (adapter is not None)
    found, wanted = predictor_tensors(sparse_backbone(loaded)), predictor_tensors(sparse_backbone(model))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert any(before[name].shape != wanted[name].shape or not torch.equal(before[name], wanted[name]) for name in wanted)
    assert all(weight.dtype == torch.float32 and not weight.requires_grad for weight in found.values())
    tokens = {"input_ids": RandomText()[0]["input_ids"][None]}
    keep_trainable(loaded)  # evaluation rounds otherwise where a CPU lays 4-bit weights out anew
    with torch.no_grad():
        got, expected = loaded.eval()(**tokens).logits, model.eval()(**tokens).logits
        untrained = (
            AutoLemoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **quantization(bits)).eval()(**tokens).logits
        )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, untrained, rtol=1e-3, atol=1e-3)

    # And it trains on: as sparsely, and with the gradients that the run's own model has, whatever phases and probes it ran.
    trainable = {} if adapter is None else {"is_trainable": True}
    again = AutoLemoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32, **quantization(bits), **trainable)
    batch = {name: values[None] for name, values in RandomText()[1].items()}
    gradients = []
    for each in (again, model):
        each.zero_grad()
        each.train()(**batch).loss.backward()
        assert max(sparse_backbone(each).lemo_kept_shares) < 0.5
        gradients.append({name: weight.grad for name, weight in each.named_parameters() if weight.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(
            gradients[0][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_4bit_weights_laid_out_for_inference_are_refused(base, tmp_path):
    model = AutoLemoModelForCausalLM.from_pretrained(base, lemo=LemoConfig(**BLOCK), dtype=torch.float32, **quantization(4))
    model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=ATTENTION))
    matrix = model.get_base_model().model.layers[1].mlp.up_proj
    matrix.weight.quant_state.packing_format_for_cpu = True  # as bitsandbytes marks it
    with pytest.raises(LemoError, match=r"no gradient passes them; .*layers.1.mlp.up_proj; load the model anew"):
        LemoTrainer(model, tiny_arguments(tmp_path), train_dataset=RandomText())


class StopAt(TrainerCallback):
    """Ends a run in the middle of its third step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise InterruptedError


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_run_on_few_bits_resumes_with_the_same_curve(bits, base, tmp_path):
    def trainer(folder, *callbacks):
        torch.manual_seed(0)
        block = LemoConfig(**BLOCK, checkpoint="kept_rows")
        model = AutoLemoModelForCausalLM.from_pretrained(base, lemo=block, dtype=torch.float32, **quantization(bits))
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=ATTENTION))
        saving = {"save_strategy": "steps", "save_steps": 2}
        args = tiny_arguments(tmp_path / folder, max_steps=4, predictor_documents=2, probe_steps=1, **saving)
        return LemoTrainer(model, args, train_dataset=RandomText(), callbacks=list(callbacks))

    straight = trainer("straight")
    straight.train()
    with pytest.raises(InterruptedError):
        trainer("stopped", StopAt()).train()
    resumed = trainer("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert curve(resumed) == curve(straight)
    assert len(curve(resumed)) == 4
