"""What `lemo estimate` says, held against real steps, closed forms, and itself."""

import json
from dataclasses import replace

import memory_estimate as benchmark
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from lemo_hf import LemoConfig
from lemo_hf.cli import main
from lemo_hf.errors import LemoError
from lemo_hf.loading import without_peft_deprecation
from lemo_hf.profiling.estimate import estimator as estimating
from lemo_hf.profiling.estimate import model_shapes, plot, tables
from lemo_hf.profiling.estimate.cards import GIB, find_card, read_bytes
from lemo_hf.profiling.estimate.estimator import CUDA_CONTEXT, LENGTH_STEP, Estimator, _largest
from lemo_hf.profiling.estimate.fake_model import fake_model
from lemo_hf.profiling.estimate.model_shapes import SHAPES, read_model_config
from lemo_hf.profiling.estimate.step_model import StepSettings, build_model, forward_loss
from lemo_hf.profiling.estimate.step_trace import trace_step
from lemo_hf.profiling.estimate.tables import Outlook, document, estimate_methods, look_out, table
from lemo_hf.profiling.flops import FlopCounter
from lemo_hf.profiling.live_bytes import LiveBytes
from lemo_hf.registry import ARCHITECTURES, lemo_config_from

KEPT_ROWS = LemoConfig(keep_ratio=0.5, checkpoint="kept_rows", segment_size=512)


def small_config(family="llama"):
    return AutoConfig.for_model(family, **benchmark.FAMILIES[family])


def config_file(tmp_path, **changes):
    values = {"model_type": "llama", **benchmark.FAMILIES["llama"], **changes}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return path


# Against real steps


@pytest.mark.parametrize("place", [1, 2, 5])  # the others in the tests below
def test_estimate_is_the_peak_of_a_real_step(place):
    settings = benchmark.compared_settings(512)[place]
    found = benchmark.measure(small_config(), settings)
    estimated = Estimator(small_config(), on_gpu=False).estimate(settings).total_bytes
    assert estimated == pytest.approx(found["live_bytes"], rel=0.002)
    assert estimated == pytest.approx(found["allocator_bytes"], rel=0.01)  # operators' own buffers among it


@pytest.mark.parametrize("checkpointing", [False, True])
def test_estimate_is_the_peak_of_a_plain_call_of_a_plain_model(checkpointing):
    # Nothing of the tracing in it: the stock class, called as a training loop calls it.
    with without_peft_deprecation():
        adapted = get_peft_model(
            AutoModelForCausalLM.from_config(small_config()),
            LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
            autocast_adapter_dtype=False,
        )
    model = adapted.bfloat16().train()
    if checkpointing:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    ids = torch.randint(0, 256, (1, 512))
    with LiveBytes(model) as live:
        live.label([ids], "inputs")
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    estimate = Estimator(small_config(), on_gpu=False).estimate(
        StepSettings(512, "checkpointing" if checkpointing else "stock", adapter_dtype="bfloat16")
    )
    assert estimate.live_bytes - estimate.parts["optimizer"] == pytest.approx(live.peak_bytes, rel=0.005)


@pytest.mark.parametrize(("family", "place"), [("mistral", 3), ("qwen3", 4), ("opt", 2), ("qwen2", 6)])
def test_estimate_holds_for_every_family(family, place):
    settings = benchmark.compared_settings(256)[place]
    found = benchmark.measure(small_config(family), settings)
    estimated = Estimator(small_config(family), on_gpu=False).estimate(settings).total_bytes
    assert estimated == pytest.approx(found["live_bytes"], rel=0.005)


@pytest.mark.parametrize("form", ["sparse", "kept_keys"])
def test_predictors_of_signed_means_are_estimated_without_rotary_positions(form):
    """What their pairs of features hold cannot be asked of shapes."""
    lemo = LemoConfig(attention_forward=form, selection="ratio", block_reduction="mean", predictor_features=8, segment_size=256)
    settings = StepSettings(256, lemo=lemo)
    found = benchmark.measure(small_config("opt"), settings)
    estimate = Estimator(small_config("opt"), on_gpu=False).estimate(settings)
    assert estimate.parts["predictors"] > 0
    assert estimate.live_bytes == pytest.approx(found["live_bytes"], rel=0.01)


def test_estimate_of_the_embedded_model():
    settings = StepSettings(1024, lemo=KEPT_ROWS, batch_size=2, autocast=True, targets=("q_proj", "down_proj"), lora_r=4)
    config = read_model_config(benchmark.EMBEDDED)
    found = benchmark.measure(config, settings)
    estimate = Estimator(benchmark.EMBEDDED, on_gpu=False).estimate(settings)
    assert estimate.live_bytes == pytest.approx(found["live_bytes"], rel=0.005)
    assert estimate.layers == 6


@pytest.mark.parametrize(
    ("lemo", "moment"),
    [
        (LemoConfig(keep_ratio=[0.25, 0.75, 0.25, 0.5, 0.75], dense_layers=[-1], selection="ratio"), "the loss"),
        # The first layer, run again on every row, needs more than what the others have left behind.
        (LemoConfig(keep_ratio=0.1, dense_layers=[0], checkpoint="kept_rows"), "the backward of layer 0 of 0 to 4"),
    ],
    ids=["shares", "dense first"],
)
def test_layers_of_different_kinds_are_laid_together(lemo, moment):
    model = ARCHITECTURES["llama"][1](lemo_config_from(small_config(), lemo)).train().bfloat16()
    with without_peft_deprecation():
        adapter = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        adapted = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if "lemo_predictor" in name:
            parameter.data = parameter.data.float()
    ids = torch.randint(0, 256, (1, 1024))
    with LiveBytes(adapted) as live:
        live.label([ids], "inputs")
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    settings = StepSettings(1024, lemo=lemo, adapter_dtype="bfloat16")
    estimate = Estimator(small_config(), on_gpu=False).estimate(settings)
    assert estimate.moment == moment
    assert estimate.live_bytes - estimate.parts["optimizer"] == pytest.approx(live.peak_bytes, rel=0.003)


def test_one_layer_of_each_kind_is_traced():
    def places(lemo):
        return trace_step(small_config(), StepSettings(128, lemo=lemo), on_gpu=False).place_of_layer

    assert places(KEPT_ROWS) == [0, 1, 1, 1, 1]
    assert places(LemoConfig(keep_ratio=[0.5, 0.5, 0.3, 0.3, 0.5], dense_layers=[-1])) == [0, 1, 2, 2, 3]


# Against closed forms


def test_parameters_and_optimizer_of_an_8b_model():
    estimate = Estimator("Llama-3-8B").estimate(StepSettings(1024, adapter_dtype="bfloat16", method="stock"))
    hidden, key_width, width, vocabulary, layers = 4096, 1024, 14336, 128256, 32
    layer = 2 * hidden * hidden + 2 * hidden * key_width + 3 * hidden * width + 2 * hidden
    weights = 2 * (layers * layer + 2 * vocabulary * hidden + hidden)
    adapter = 2 * layers * 8 * (2 * (hidden + hidden) + 2 * (hidden + key_width))
    assert estimate.parts["weights"] == pytest.approx(weights, abs=1024)  # rotary frequencies beside them
    assert estimate.parts["adapter"] == adapter
    assert estimate.parts["optimizer"] == 2 * adapter


@pytest.mark.parametrize(
    ("method", "lemo", "rows"),
    [
        ("stock", None, 18),
        ("checkpointing", None, 1),
        ("liger", None, 12.5),
        # Of dropped rows with shared attention a quarter of H each for key and value.
        ("lemo", LemoConfig(keep_ratio=0.5), 6.25 + 0.25),
        ("lemo", LemoConfig(keep_ratio=0.5, attention_forward="kept_keys"), 6.25 + 0.25),
        ("lemo", LemoConfig(keep_ratio=0.25, attention_forward="sparse", selection="ratio"), 3.125),
        ("lemo", LemoConfig(keep_ratio=0.5, checkpoint="kept_rows"), 1 + 0.25),
        ("lemo", LemoConfig(keep_ratio=0.5, checkpoint="kept_rows", attention_forward="kept_keys"), 1 + 0.25),
        ("lemo", LemoConfig(keep_ratio=0.5, checkpoint="kept_rows", attention_forward="sparse"), 0.5),
    ],
)
def test_a_layer_leaves_the_rows_that_the_formulae_say(method, lemo, rows):
    settings = StepSettings(4096, method, lemo, adapter_dtype="bfloat16")
    trace = trace_step(read_model_config("Llama-3-8B"), settings, on_gpu=True)
    stretch = trace.stretches["forward", 1]
    left = stretch.after.total() - stretch.before.total()
    row = 4096 * 4096 * 2
    # Log-sum-exp, adapters' r numbers, norms' statistics: at most 0.07 H.
    assert rows <= left / row <= rows + 0.07


def test_flops_are_those_that_the_flop_counter_counts():
    settings = StepSettings(512, "checkpointing", adapter_dtype="bfloat16")
    mode = FakeTensorMode()
    model = fake_model(lambda: build_model(small_config(), settings, list(range(5))), mode)
    with mode, FlopCounter(model) as counter:
        forward_loss(model, torch.zeros(1, 512, dtype=torch.long), settings).backward()
    estimate = Estimator(small_config()).estimate(settings)
    assert sum(estimate.flops.values()) == counter.flops.total
    assert set(estimate.flops) == {"layers forward", "head and loss", "layers backward"}


@pytest.mark.parametrize("form", ["exact", "kept_keys"])
def test_on_a_gpu_attention_of_dropped_rows_is_one_operator_whatever_the_length(form):
    """The CPU's strips would be thousands of operators, and their scores would count as traffic."""
    lemo = LemoConfig(attention_forward=form, nearby_tokens=96 if form == "kept_keys" else None)

    def costs(tokens, on_gpu):
        trace = trace_step(small_config(), StepSettings(tokens, lemo=lemo), on_gpu)
        return [trace.stretches[name, 1].costs for name in ("forward", "backward")]

    short, long = costs(512, True), costs(4096, True)
    assert list(map(len, short)) == list(map(len, long))
    assert list(map(len, costs(512, False))) < list(map(len, costs(1024, False)))
    # Heads are as wide as the model, half of the rows kept. Forward Q K^T and P V; backward five products of kept pairs, three
    # with dropped keys.
    pairs, kept, seen = 4096 * 4097 // 2, 2048 * 2049 // 2, 96 * 4096 - 96 * 95 // 2
    seen = seen if form == "kept_keys" else pairs
    forward = (pairs + seen) // 2
    attention = [sum(cost.flops for cost in stretch if cost.attention) for stretch in long]
    assert attention == [2 * 128 * 2 * forward, 2 * 128 * (5 * kept + 3 * (seen // 4))]


def test_bytes_by_length_are_the_polynomial_at_a_length_that_was_held_out():
    settings = StepSettings(1, lemo=KEPT_ROWS)
    estimator = Estimator(small_config())
    needed = estimator.curve(settings, (1024, 1536, 2048))
    traced = estimator.estimate(replace(settings, seq_len=4096)).total_bytes
    assert needed(4096) == pytest.approx(traced, abs=64)  # slack is a whole number of bytes


# What fits


@pytest.mark.parametrize("limit", [0, 5, 49, 50, 1000, 10**6])
@pytest.mark.parametrize(
    "needed", [lambda x: 5 * x, lambda x: x * x + 4, lambda x: 5 * (x // 7) + 5], ids=["line", "square", "steps"]
)
def test_search_finds_the_largest_that_fits(needed, limit):
    expected = max((number for number in range(1, 101) if needed(number) <= limit), default=0)
    assert _largest(needed, limit, (25, 75), 100) == expected


@pytest.mark.parametrize("tried", [2048, 8192])  # the answer lies beyond the one and within the other
def test_longest_sequence_fits_and_the_next_does_not(tried, monkeypatch):
    monkeypatch.setattr(estimating, "TRIED_LENGTH", tried)
    # A GPU's step: on a CPU the scores of dropped keys grow to a bound, and no line leads past it.
    memory = CUDA_CONTEXT + 25 * 2**20
    estimator = Estimator(small_config(), memory=memory)
    settings = StepSettings(1024, lemo=LemoConfig(checkpoint="kept_rows", segment_size=512))
    longest = estimator.longest(settings)
    assert longest % LENGTH_STEP == 0
    assert 2048 < longest < 8192
    needed = [estimator.estimate(replace(settings, seq_len=length)).total_bytes for length in (longest, longest + LENGTH_STEP)]
    assert needed[0] <= memory < needed[1]


def test_kept_share_fits_and_a_larger_one_does_not(monkeypatch):
    monkeypatch.setattr(Estimator, "longest", lambda estimator, settings: 1792)
    estimator = Estimator(small_config())
    settings = StepSettings(1024)
    estimator.memory = estimator.estimate(settings).total_bytes  # what 0.5 needs, 8 of 16 blocks
    share = estimator.kept_share(settings)
    assert share == 0.5
    more = replace(settings, lemo=LemoConfig(keep_ratio=0.51))
    assert estimator.estimate(more).fits is False
    assert look_out(estimator, estimator.estimate(more)).advice == (
        "1024 tokens do not fit; LeMo keeps up to 0.5 of the blocks in 0.6 GiB (exact, checkpoint none); LeMo exact 0.51 fits 1792 tokens"
    )


# What a person sees


@pytest.fixture(scope="module")
def card_estimator():
    return Estimator(small_config(), card=find_card("h100 80gb"))


def test_table_adds_up_and_says_what_is_assumed(card_estimator):
    estimate = card_estimator.estimate(StepSettings(4096, lemo=KEPT_ROWS))
    shown = table(estimate, Outlook(8192, 0.5, "enough"))
    assert sum(estimate.parts.values()) == estimate.live_bytes
    assert estimate.total_bytes == estimate.live_bytes + estimate.slack_bytes + estimate.context_bytes
    for words in (
        "assumed, not measured",
        "CUDA context (assumed)",
        "highest moment:",
        "fits into 79.6 GiB of H100-80GB",
        "advice:",
    ):
        assert words in shown
    assert "note: 4096 tokens are more than the model's context of 2048" in shown
    assert "note: dense perplexity is not estimated; " in shown, "memory and time never stand alone"


def test_methods_stand_side_by_side_without_those_that_do_not_exist():
    names = [one.settings.name for one in estimate_methods(Estimator(small_config("opt")), StepSettings(256))]
    assert "Liger" not in names
    forms = ["LeMo exact 0.5", "LeMo sparse 0.5", "LeMo kept keys 0.5, 256 nearby tokens"]
    rows = [f"{form}, kept-row checkpointing" for form in forms]
    assert names == ["stock LoRA", "stock + checkpointing", *forms, *rows]


def test_every_method_is_drawn_with_a_mark_of_its_own():
    assert len(set(plot._MARKERS)) >= len(tables.method_settings(StepSettings(256)))


def test_document_is_json_with_its_provenance(card_estimator):
    estimate = card_estimator.estimate(StepSettings(1024, lemo=KEPT_ROWS))
    read = json.loads(json.dumps(document(estimate, Outlook(8192, 0.5, "enough"), [estimate])))
    assert {"commit", "versions", "machine", "assumptions", "estimate", "outlook"} <= read.keys()
    assert read["estimate"]["total_bytes"] == estimate.total_bytes
    assert read["estimate"]["settings"]["lemo"]["checkpoint"] == "kept_rows"
    assert any("dense perplexity is not estimated" in note for note in read["estimate"]["notes"])


def test_command_prints_writes_json_and_draws(tmp_path, capsys, monkeypatch):
    def two_methods(settings):
        return [replace(settings, method=method) for method in ("stock", "lemo")]

    monkeypatch.setattr(estimating, "TRIED_LENGTH", 2048)
    for module in (tables, plot):
        monkeypatch.setattr(module, "method_settings", two_methods)
    files = [tmp_path / "out.json", tmp_path / "out.png"]
    words = f"estimate --model {config_file(tmp_path)} --seq-len 1024 --gpu-memory 24GiB --method all --keep auto"
    with pytest.raises(SystemExit) as done:
        main([*words.split(), "--json", str(files[0]), "--plot", str(files[1])])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert "LeMo exact 1" in shown
    assert "tokens fit with" in shown
    assert [one["method"] for one in json.loads(files[0].read_text())["methods"]] == ["stock LoRA", "LeMo exact 1"]
    assert files[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--gpu", "H10"], "no such card in the table; 'H10'; choose one of A100-40GB"),
        (["--gpu-memory", "80 gigs"], "not an amount of memory; '80 gigs'; write it as 80GiB or 80GB"),
        (
            ["--gpu-memory", "1MiB", "--keep", "auto"],
            "no kept share fits 256 tokens into 0.0 GiB; the smallest, 0.01, needs 0.6 GiB; use --checkpoint",
        ),
        (["--keep", "auto"], "nothing to fit into; neither a card nor an amount of memory is given; add --gpu or --gpu-memory"),
        (["--keep", "most"], "not a kept share; 'most'; give a number in (0, 1], or auto"),
        (["--keep", "1.5"], "keep_ratio is the share of blocks kept and must be in (0, 1]; got 1.5"),
        (["--method", "magic"], "no such method; 'magic'; choose one of stock"),
        (["--adapter-dtype", "int8"], "no such adapter_dtype; 'int8'; choose one of bfloat16"),
        (["--targets", "q_proj,qkv"], "no linear layer of this name; 'qkv'; choose targets among down_proj"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, line, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        main(["estimate", "--model", str(config_file(tmp_path)), "--seq-len", "256", *arguments])
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("lemo: " + line)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"hidden_size": None}, "config lacks hidden_size"),
        ({"vocab_size": None}, "config lacks vocab_size"),
        ({"model_type": None}, "config lacks model_type"),
        ({"model_type": "gpt2"}, "no estimate for model type 'gpt2'"),
        ({"num_hidden_layers": 0}, "config lacks num_hidden_layers"),
        ({"rms_norm_eps": "small"}, "config cannot be read"),
    ],
)
def test_bad_config_is_named(changes, line, tmp_path):
    with pytest.raises(LemoError, match=line):
        read_model_config(config_file(tmp_path, **changes))


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("llama", "intermediate_size"),
        ("llama", "num_hidden_layers"),
        ("llama", "max_position_embeddings"),
        ("mistral", "num_key_value_heads"),
        ("qwen2", "num_key_value_heads"),
        ("qwen3", "head_dim"),
        ("opt", "ffn_dim"),
        ("opt", "vocab_size"),
    ],
)
@pytest.mark.parametrize("place", ["file", "folder", "hub"])
def test_another_models_sizes_are_not_put_in_place_of_missing_ones(family, field, place, tmp_path, monkeypatch):
    values = {"model_type": family, **benchmark.FAMILIES[family]}
    del values[field]
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = {"file": tmp_path / "config.json", "folder": tmp_path, "hub": "someone/model"}[place]
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda model: (dict(values), {}))
    with pytest.raises(LemoError, match=rf"config lacks {field}; '.*'; write the model's {field} into its config.json"):
        read_model_config(model)


def test_a_config_from_the_hub_is_read_like_a_file(tmp_path, monkeypatch):
    values = {"model_type": "llama", **benchmark.FAMILIES["llama"]}
    del values["num_key_value_heads"]  # as many as heads: what old configs of Llama mean by it
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda model: (values | {"_commit_hash": "abc"}, {}))
    config = read_model_config("someone/model")
    assert (config.num_hidden_layers, config.intermediate_size, config.num_key_value_heads) == (5, 448, 4)
    other = {"model_type": "gpt2", "n_embd": 768}
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda model: (other, {}))
    with pytest.raises(LemoError, match="no estimate for model type 'gpt2'; 'someone/model'"):
        read_model_config("someone/model")


def test_every_type_has_its_sizes():
    assert model_shapes._GIVEN_OF_TYPE.keys() == ARCHITECTURES.keys()
    for name, values in SHAPES.items():
        assert {*model_shapes._GIVEN, *model_shapes._GIVEN_OF_TYPE[values["model_type"]]} <= values.keys(), name


def test_model_that_cannot_be_found_is_named(tmp_path):
    with pytest.raises(LemoError, match="no config found for the model; 'nobody/nothing'"):
        read_model_config("nobody/nothing")
    with pytest.raises(LemoError, match="folder holds no config"):
        read_model_config(tmp_path)
    with pytest.raises(LemoError, match="Liger has no functions for model type 'opt'"):
        Estimator(small_config("opt")).estimate(StepSettings(256, "liger"))


def test_words_for_cards_memory_and_shapes():
    assert find_card("NVIDIA GeForce RTX 4090").name == "RTX-4090"
    assert find_card("a100").name == "A100-80GB"
    assert [read_bytes(text) for text in ("80GiB", "1.5 gb", "512MiB", "7")] == [80 * GIB, 15 * 10**8, 2**29, 7]
    assert read_model_config("llama-3-8b").vocab_size == 128256
    assert all(read_model_config(name).num_hidden_layers == values["num_hidden_layers"] for name, values in SHAPES.items())


# The page


def test_page_shows_the_committed_result():
    page = benchmark.PAGE.read_text()
    assert benchmark.updated(page, json.loads(benchmark.RESULT.read_text())) == page


def test_committed_result_is_what_is_estimated_now():
    rows = json.loads(benchmark.RESULT.read_text())["shapes"]
    row = next(
        row for row in rows if row["model"] == "Llama-3-8B" and row["method"] == "LeMo exact 0.5" and row["seq_len"] == 8192
    )
    estimate = Estimator("Llama-3-8B", card=find_card(benchmark.CARD)).estimate(StepSettings(8192, adapter_dtype="bfloat16"))
    # A change of the models that moves memory by more makes the page stale: run benchmarks/memory_estimate.py again.
    assert estimate.live_bytes == pytest.approx(row["live_bytes"], rel=0.02)
    assert sum(estimate.flops.values()) == pytest.approx(row["flops"], rel=0.02)
    assert estimate.seconds == pytest.approx(row["seconds"], rel=0.02)


def test_gpu_peaks_are_compared_where_a_result_holds_them(tmp_path):
    settings = {"seq_len": 256, "method": "lemo", "lemo": {"keep_ratio": 0.5}, "adapter_dtype": "bfloat16"}
    rows = [{"model": "OPT-1.3B", "estimate_settings": settings, "peak_allocated_bytes": 3 * GIB}, {"model": "other"}]
    (tmp_path / "gpu.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "other.json").write_text(json.dumps([1]))
    (row,) = benchmark.compare_on_gpu(tmp_path)
    assert row["source"] == "gpu.json"
    assert 2.4 * GIB < row["estimated_bytes"] < 4 * GIB
    assert "3072.00" in benchmark.comparison_table([row])
