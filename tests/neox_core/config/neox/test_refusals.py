"""What files of GPT-NeoX's configs/ folder ask for that is not done here: the reason that matters comes first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neox_core.config.neox.yaml_import import import_neox
from neox_core.errors import ConfigError
from tests.neox_core.config.neox.test_yaml_import import LLEMMA_34B, do_import, write

PYTHIA: dict[str, Any] = {"norm": "layernorm", "rotary-pct": 0.25, "gpt-j-residual": True, "no-weight-tying": True}
SCALING = {"bf16": True, "enabled": True, "loss_scale": 0, "initial_scale_power": 12, "hysteresis": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data_path": "data/enwik8", "log_dir": "logs"}, "'num_layers' is not in the files: add the file"),
        (PYTHIA, r"^GPT-NeoX key 'norm' is 'layernorm'.*; not supported either: rotary_pct, gpt_j_residual$"),
        (
            {"attention_config": [[["rwkv"], 12]], "rotary_pct": 0.25, "bf16": SCALING},
            r"'attention_config' names \['rwkv'\]",
        ),
        ({"attention_config": [[["mamba"], 24]], "norm": "rmsnorm"}, r"key 'attention_config' names \['mamba'\]"),
        ({"attention_config": [["gmlp", 24]]}, r"key 'attention_config' names \['gmlp'\]"),
        ({"attention_config": 5}, r"key 'attention_config' names \['5'\]"),
        ({"attention_config": [[[["flash"]], 24]]}, "key 'attention_config' names"),
        ({"adapter_config": {"enabled": True}}, "'adapter_config'.*all parameters are trained"),
        ({"sliding_window_width": 4096}, "'sliding_window_width' is 4096.*every position attends to all before it"),
        ({"fim-rate": 0.5, "extra-sentinel-tokens": 3}, "'fim_rate' is 0.5.*either: extra_sentinel_tokens$"),
        ({"num_experts": 4, "moe_expert_parallel_size": 1}, "'num_experts' is 4.*there are no experts"),
        ({"use_mup": True, "mup_d_model_base": 256, "coord_check_nseeds": 1}, "'use_mup' is True"),
        ({"train_impl": "reinforce", "kl_impl": "abs", "serve_model_weights": True}, "'train_impl' is 'reinforce'"),
        ({"deepspeed_extra_args": {"zero_hpz_partition_size": 8}}, "'deepspeed_extra_args.zero_hpz_partition_size' is"),
    ],
)
def test_the_first_reason_is_the_one_that_matters(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        import_neox([write(tmp_path / "file.yml", content)])


def test_a_default_is_named_only_where_the_files_ask_for_nothing_else(tmp_path: Path) -> None:
    llama = {"num_layers": 32, "hidden_size": 4096, "norm": "rmsnorm", "pos_emb": "rotary", "no_weight_tying": True}
    llama |= {"use_bias_in_attn_linear": False, "mlp_type": "llama"}
    message = (
        r"'hidden_dropout' is 0.1 \(GPT-NeoX's default.*not supported either: attention_dropout, lr_decay_style, tok"
    )
    with pytest.raises(ConfigError, match=message):
        import_neox([write(tmp_path / "file.yml", llama)])


def test_logs_of_deepspeed_and_names_of_runs_change_nothing(tmp_path: Path) -> None:
    """Of configs/19M.yml, and of configurations that name their W&B runs."""
    extra = {"comms_logger": {"enabled": True}, "ssh_port": 2222}
    found = do_import(tmp_path, deepspeed_extra_args=extra, wandb_run_name="baseline")
    listed = {key: value for key, value, _ in found.ineffective}
    assert listed["deepspeed_extra_args"] == extra
    assert listed["wandb_run_name"] == "baseline"


def test_loss_scaling_that_stands_within_bf16_is_listed(tmp_path: Path) -> None:
    found = do_import(tmp_path, bf16=SCALING)
    assert {"bf16.bf16", "bf16.loss_scale", "bf16.initial_scale_power"} <= {key for key, _, _ in found.ineffective}


@pytest.mark.parametrize(
    ("removed", "changes", "message"),
    [
        ("", {"data_path": "/data/web"}, "data_path and train_data_paths are both set"),
        ("train-data-paths", {"train_data_paths": "/data/web"}, "'/data/web', which is not a list of paths"),
        ("valid-data-paths", {"valid_data_paths": []}, r"'valid_data_paths' is \[\], which is not a list of paths"),
        ("train-data-weights", {"train_data_weights": 2}, "2, which is not a list of numbers"),
        ("vocab-file", {"vocab_file": 5}, "'vocab_file' is 5, which is not text"),
        ("", {"attention_type": ["groupedquery"]}, "'attention_type' is .*, which is not text"),
        ("", {"checkpoint_activations": "full"}, "'full': give true or false"),
        ("", {"num_kv_heads": True}, "'num_kv_heads' is True, which is not a number"),
        ("", {"intermediate_size": 0}, "'intermediate_size' is 0.0, which is not a whole number from 1 on"),
        ("", {"make_vocab_size_divisible_by": "x"}, "'make_vocab_size_divisible_by' is 'x', which is not a number"),
        ("", {"optimizer": {"params": "fast"}}, "'optimizer.params' is 'fast', which is not a mapping"),
        ("", {"optimizer": {"params": {"lr": 1e-4, "betas": 0.9}}}, "0.9, which is not a list of two numbers"),
        ("", {"optimizer": {"params": {"lr": 1e-4, "weight_decay": 0.2}}}, "weight_decay 0.1 and .* 0.2 disagree"),
    ],
)
def test_a_value_of_another_kind_is_refused(
    removed: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        do_import(tmp_path, removed, **changes)


def test_no_pipeline_is_written_as_zero_and_no_warmup_too(tmp_path: Path) -> None:
    found = do_import(tmp_path, pipe_parallel_size=0, warmup_iters=0, num_nodes=-1).config
    assert found["parallel"]["pipeline"] == 1
    assert found["train"]["schedule"]["warmup_steps"] == 0
    assert found["train"]["steps"] == LLEMMA_34B["train_iters"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan"])
def test_numbers_that_are_none(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^GPT-NeoX key 'warmup' is .*, which is not a number$"):
        do_import(tmp_path, "warmup_iters", warmup=value)


def test_a_vocab_file_that_is_no_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"'vocab_file' names .*tokenizer\.json, which is no SentencePiece model"):
        do_import(tmp_path, **{"vocab-file": "tokenizer.json"})
