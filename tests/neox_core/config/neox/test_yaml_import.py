"""GPT-NeoX's files in, our configuration out: written here from the facts, in both of the styles in use."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from neox_core.config import RunConfig, load_config
from neox_core.config.neox.keys import FIXED, INEFFECTIVE, MAPPED, OFF
from neox_core.config.neox.yaml_import import NeoxImport, import_neox, to_yaml
from neox_core.errors import ConfigError
from tests.paths import ROOT

ARCHITECTURE: dict[str, Any] = {
    "pos_emb": "rotary",
    "rotary_pct": 1,
    "no_weight_tying": True,
    "gpt_j_residual": False,
    "output_layer_parallelism": "column",
    "norm": "rmsnorm",
    "rms_norm_epsilon": 1.0e-5,
    "scaled_upper_triang_masked_softmax_fusion": True,
    "bias_gelu_fusion": False,
    "use_bias_in_norms": False,
    "use_bias_in_attn_linear": False,
    "mlp_type": "llama",
    "activation": "silu",
    "make_vocab_size_divisible_by": 1,
    "max_position_embeddings": 4096,
    "seq_length": 4096,
}
RECIPE: dict[str, Any] = {
    "zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 1260000000, "cpu_offload": False},
    "data_impl": "mmap",
    "checkpoint_activations": True,
    "checkpoint_num_layers": 1,
    "partition_activations": True,
    "gradient_clipping": 1.0,
    "weight_decay": 0.1,
    "hidden_dropout": 0,
    "attention_dropout": 0.0,
    "precision": "bfloat16",
    "fp32_allreduce": True,
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "lr_decay_style": "cosine",
    "decay_lr_to": 0.033,
    "warmup_iters": 500,
    "log_interval": 1,
    "wall_clock_breakdown": True,
    "tokenizer_type": "SPMTokenizer",
    "vocab-file": "codellama/tokenizer.model",
    "save": "/checkpoints/run",
    "load": "/converted/codellama",
    "finetune": True,
    "use_wandb": True,
    "wandb_group": "replication",
    "wandb_project": "math",
    "wandb_team": "lab",
    "launcher": "slurm",
    "deepspeed_slurm": True,
}
LLEMMA_7B: dict[str, Any] = {
    "pipe_parallel_size": 0,
    "model_parallel_size": 2,
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "rotary_emb_base": 10000,
    "attention_config": [[["flash"], 32]],
    "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1.0e-8}},
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "train_iters": 48000,
    "lr_decay_iters": 48000,
    "checkpoint_factor": 500,
    "eval_interval": 250,
    "eval_iters": 50,
}
LLEMMA_34B: dict[str, Any] = LLEMMA_7B | {
    "model_parallel_size": 8,
    "num_layers": 48,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "attention_type": "groupedquery",
    "num_kv_heads": 8,
    "rotary_emb_base": 1000000,
    "attention_config": [[["flash"], 48]],
    "optimizer": {"type": "Adam", "params": {"lr": 5e-5, "betas": [0.9, 0.95], "eps": 1.0e-8}},
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 16,
    "train_iters": 12000,
    "lr_decay_iters": 12000,
    "checkpoint_factor": 250,
    "eval_iters": 25,
}
MIXTURE: dict[str, Any] = {
    "train-data-paths": [
        f"/data/train/{name}/{name}_text_document"
        for name in ("arxiv-rp", "open-web-math", "code-with-proofsteps", "pile-sample", "code-rp")
    ],
    "train-data-weights": [2, 4, 1, 0.147368, 0.221053],
    "valid-data-paths": [
        f"/data/validation/{name}_text_document" for name in ("arxiv-rp", "open-web-math", "code-with-proofsteps")
    ],
    "test-data-paths": [
        f"/data/test/{name}_text_document" for name in ("arxiv-rp", "open-web-math", "code-with-proofsteps")
    ],
}
WHOLE = ARCHITECTURE | RECIPE | LLEMMA_34B | MIXTURE


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def load_written(result: NeoxImport, folder: Path) -> RunConfig:
    path = folder / "imported.yml"
    path.write_text(to_yaml(result))
    return load_config(path)


def do_import(folder: Path, *removed: str, **changes: Any) -> NeoxImport:
    content = {key: value for key, value in WHOLE.items() if key not in removed} | changes
    return import_neox([write(folder / "whole.yml", content)])


def recipe(config: RunConfig) -> dict[str, Any]:
    """What the numbers of a run depend on; not where things lie, nor how jobs are placed."""
    content = config.model_dump(mode="json", exclude={"name", "workdir", "storage", "base_model", "wandb", "evaluate"})
    for place in ("input", "max_epochs"):
        del content["data"][place]
    del content["tokenizer"]["model"]
    content["launch"] = {key: content["launch"][key] for key in ("executor", "nodes", "ranks_per_node")}
    return content


@pytest.mark.parametrize(("name", "facts"), [("llemma_7b", LLEMMA_7B), ("llemma_34b", LLEMMA_34B)])
def test_llemmas_files_give_our_configs(name: str, facts: dict[str, Any], tmp_path: Path) -> None:
    dashed = {key.replace("_", "-"): value for key, value in RECIPE.items()}
    paths = [
        write(tmp_path / f"{name}.yml", ARCHITECTURE | facts),
        write(tmp_path / "train.yml", dashed),
        write(tmp_path / "data_mixture.yml", MIXTURE),
    ]
    result = import_neox(paths)
    imported, ours = recipe(load_written(result, tmp_path)), recipe(load_config(ROOT / "configs" / f"{name}.yml"))
    if name == "llemma_7b":  # the size of its vocabulary is in the tokenizer, which is not there
        assert "model.vocab_size" in dict(result.todo)
        ours["model"]["vocab_size"] = imported["model"]["vocab_size"]
    assert imported == ours


def test_every_key_is_mapped_or_listed(tmp_path: Path) -> None:
    result = do_import(tmp_path)
    listed = {key.split(".")[0] for key, _, _ in result.ineffective}
    given = {key.replace("-", "_") for key in WHOLE}
    assert given - listed <= MAPPED
    assert {"save", "load", "norm", "hidden_dropout", "zero_optimization", "gpt_j_residual", "data_types"} <= listed
    assert all(reason for _, _, reason in result.ineffective)


def test_tables_are_disjoint() -> None:
    tables = [set(MAPPED), set(FIXED), set(OFF), set(INEFFECTIVE)]
    assert sum(map(len, tables)) == len(set.union(*tables))


def test_written_file_tells_what_to_do_and_what_had_no_effect(tmp_path: Path) -> None:
    result = do_import(tmp_path)
    comment = " ".join(re.sub(r"^# ?", "", line) for line in to_yaml(result).splitlines() if line.startswith("#"))
    comment = re.sub(r"\s+", " ", comment)
    for key, what in result.todo:
        assert f"- {key}: {what}" in comment
    assert "- save: '/checkpoints/run' (checkpoints go to storage.url)" in comment
    todo = dict(result.todo)
    assert {"workdir", "storage.url", "base_model.path", "data.input", "tokenizer.model", "model.vocab_size"} <= set(
        todo
    )
    assert "/converted/codellama" in todo["base_model.path"]
    assert "launch.nodes" in todo


def test_vocabulary_comes_from_the_tokenizer_and_is_padded_as_neox_does(tmp_path: Path) -> None:
    tokenizer = str(ROOT / "data/tokenizers/demo-2048.model")
    result = do_import(tmp_path, "vocab-file", vocab_file=tokenizer, make_vocab_size_divisible_by=200)
    assert result.config["model"]["vocab_size"] == 3200  # 2048, to the next multiple of 200 x TP 8
    assert "model.vocab_size" not in dict(result.todo)


def test_defaults_are_neox_defaults_and_are_named(tmp_path: Path) -> None:
    removed = ("weight_decay", "rms_norm_epsilon", "warmup_iters", "decay_lr_to", "eval_interval")
    result = do_import(tmp_path, *removed)
    train = result.config["train"]
    assert train["optimizer"]["weight_decay"] == 0.01
    assert train["schedule"] == {"warmup_steps": 120, "decay_steps": 12000, "min_lr_ratio": 0.0}
    assert train["validation"]["interval"] == 1000
    assert result.config["model"]["norm_eps"] == 1e-8
    assert "train.optimizer.weight_decay" in dict(result.todo)


def test_min_lr_becomes_a_ratio_and_text_numbers_are_read(tmp_path: Path) -> None:
    optimizer = {"type": "Adam", "params": {"lr": "2e-4", "betas": [0.9, 0.95]}}
    result = do_import(tmp_path, "decay_lr_to", min_lr="2e-5", optimizer=optimizer)
    assert result.config["train"]["schedule"]["min_lr_ratio"] == pytest.approx(0.1)
    assert load_written(result, tmp_path).train.optimizer.lr == 2e-4


def test_batch_follows_the_gpus_that_the_file_names(tmp_path: Path) -> None:
    result = do_import(tmp_path, num_nodes=4, num_gpus=16)
    # micro batch 2 x accumulation 16 x 64 / TP 8 data-parallel ranks
    assert result.config["train"]["global_batch_tokens"] == 2 * 16 * 8 * 4096
    assert "launch.nodes" not in dict(result.todo)
    with pytest.raises(ConfigError, match=r"train_batch_size 1000 is not micro batch 2 x accumulation 16 x 8"):
        do_import(tmp_path, num_nodes=4, num_gpus=16, train_batch_size=1000)


def test_validation_only_sources_get_no_training_share(tmp_path: Path) -> None:
    valid = [*MIXTURE["valid-data-paths"], "/data/validation/wiki_text_document"]
    result = do_import(tmp_path, **{"valid-data-paths": valid})
    assert result.config["data"]["sources"]["wiki"] == {"weight": 0}
    assert result.config["data"]["eval_sources"][-1] == "wiki"
    assert "data.eval_sources" in dict(result.todo)


def test_storage_and_wandb_when_the_file_has_them(tmp_path: Path) -> None:
    result = do_import(tmp_path, s3_path="s3://bucket/run")
    assert result.config["storage"] == {"url": "s3://bucket/run"}
    assert "storage.url" not in dict(result.todo)
    assert result.config["wandb"] == {"mode": "online", "project": "math", "entity": "lab"}
    assert do_import(tmp_path, use_wandb=False).config["wandb"]["mode"] == "disabled"


def test_null_is_as_if_it_were_not_set(tmp_path: Path) -> None:
    result = do_import(tmp_path, sparsity_config=None, num_kv_heads=64)
    assert ("sparsity_config", None, "null is as if it were not set") in result.ineffective


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bias_in_attn_linear": True}, "'use_bias_in_attn_linear' is True"),
        ({"activation": "gelu"}, "'activation' 'gelu' are not supported together"),
        ({"pos_emb": "alibi"}, "'pos_emb' is 'alibi'"),
        ({"attention_dropout": 0.1}, "'attention_dropout' is 0.1"),
        ({"norm": "layernorm"}, "'norm' is 'layernorm'"),
        ({"attention_config": [[["sparse_fixed", "global"], 24]]}, r"'attention_config' names \['sparse_fixed'\]"),
        ({"sparsity_config": {"block": 16}}, "'sparsity_config'"),
        ({"moe_num_experts": 8}, "'moe_num_experts' is 8"),
        ({"no_weight_tying": False}, "'no_weight_tying' is False"),
        ({"no_weight_tying": 1}, "'no_weight_tying' is 1"),
        ({"fp16": {"enabled": True}}, "ask for fp16"),
        ({"precision": "fp16"}, "ask for fp16"),
        ({"precision": "fp32"}, "disagree"),
        ({"optimizer": {"type": "Lion", "params": {"lr": 1e-4}}}, "'optimizer.type' is 'Lion'"),
        ({"optimizer": {"type": "Adam", "params": {}}}, "'optimizer.params.lr' is not in the files"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1e-4, "beta": 1}}}, "'beta'"),
        ({"optimizer": {"type": "Adam", "params": {"lr": "fast"}}}, "'fast', which is not a number"),
        ({"zero_optimization": {"stage": 3}}, "'zero_optimization.stage' is 3"),
        ({"zero_optimization": {"stagee": 1}}, "did you mean 'stage'"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "'data_types.grad_accum_dtype' is 'bf16'"),
        ({"gpt_j_residual": True}, "'gpt_j_residual' is True"),
        ({"lr_decay_style": "linear"}, "'lr_decay_style' is 'linear'"),
        ({"tokenizer_type": "HFTokenizer"}, "'tokenizer_type' is 'HFTokenizer'"),
        ({"curriculum_learning": {"enabled": True}}, "'curriculum_learning'"),
        ({"hidden_sise": 1}, "unknown GPT-NeoX key 'hidden_sise': did you mean 'hidden_size'"),
        ({"zzz": 1}, "unknown GPT-NeoX key 'zzz': it is not among"),
        ({"hidden-size": 8192}, "are the same GPT-NeoX key"),
        ({"batch_size": 4}, "train_micro_batch_size_per_gpu 2, batch_size 4"),
        ({"attention_type": "multihead"}, "disagree"),
        ({"train_data_weights": [1, 2]}, "are the same GPT-NeoX key"),
        ({"train-data-weights": [1, 2]}, "5 train_data_paths but 2 train_data_weights"),
        ({"num_kv_heads": 6}, "num_kv_heads"),
        ({"num_nodes": 1, "num_gpus": 4}, "not divisible by model_parallel_size x"),
        ({"min_lr": 1e-6}, "min_lr and decay_lr_to are both set"),
        ({"train_iters": 12.5}, "not a whole number"),
    ],
)
def test_what_cannot_be_done_is_an_error(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        do_import(tmp_path, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["norm", "pos_emb", "hidden_dropout", "no_weight_tying"])
def test_an_absent_key_has_the_default_of_neox_which_is_another_model(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"'{key}' is .* \(GPT-NeoX's default"):
        do_import(tmp_path, key)


def test_files_that_disagree(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yml", WHOLE)
    with pytest.raises(ConfigError, match=r"'seq-length' is 4096 in .*a\.yml and 2048 in .*b\.yml"):
        import_neox([first, write(tmp_path / "b.yml", {"seq-length": 2048})])
    assert (
        import_neox([first, write(tmp_path / "c.yml", {"seq-length": 4096})]).config["train"]["sequence_length"] == 4096
    )
    with pytest.raises(ConfigError, match="name at least one"):
        import_neox([])


def todays(folder: Path, *removed: str, **changes: Any) -> NeoxImport:
    """A file of a GPT-NeoX without mlp_type."""
    gated = {"activation": "swiglu", "intermediate_size": 86016, "mlp_multiple_of": 256, "use_bias_in_mlp": False}
    gated = {key: value for key, value in gated.items() if key not in removed}
    return do_import(folder, "mlp_type", *removed, **(gated | changes))


def test_todays_gated_mlp_is_a_third_as_wide_as_its_intermediate_size(tmp_path: Path) -> None:
    """The values of GPT-NeoX's configs/llama2 (7B, 13B, 70B) and configs/llama/30B, and those models' widths."""
    for hidden, given, width in (
        (4096, 32768, 11008),
        (5120, 41472, 13824),
        (8192, 86016, 28672),
        (6656, 53248, 17920),
    ):
        found = todays(tmp_path, hidden_size=hidden, intermediate_size=given).config["model"]
        assert found["intermediate_size"] == width
    assert todays(tmp_path, "intermediate_size").config["model"]["intermediate_size"] == 11008  # of 4 x 8192
    found = todays(tmp_path, "intermediate_size", expansion_factor=10.5).config["model"]
    assert found["intermediate_size"] == 28672
    assert todays(tmp_path, mlp_multiple_of=1).config["model"]["intermediate_size"] == 28672
    # Of its configurations for Llama 3 8B: the multiple is the width itself.
    assert (
        todays(tmp_path, intermediate_size=14336, mlp_multiple_of=14336).config["model"]["intermediate_size"] == 14336
    )
    # A file with mlp_type means the width itself, as before.
    assert do_import(tmp_path, intermediate_size=22016).config["model"]["intermediate_size"] == 22016


def test_todays_defaults(tmp_path: Path) -> None:
    found = todays(tmp_path, "hidden_dropout", "attention_dropout", "weight_decay", "use_bias_in_mlp")
    assert found.config["train"]["optimizer"]["weight_decay"] == 0.1
    assert any("no biases in the MLP" in what for _, what in found.todo)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bias_in_mlp": True}, "'use_bias_in_mlp' is True"),
        ({"activation": "silu"}, "'activation' is 'silu' without mlp_type, which is another MLP"),
        ({"activation": None}, r"'activation' is 'gelu' \(GPT-NeoX's default"),
        ({"mlp_type": "llama"}, "not supported together"),
        ({"expansion_factor": 4}, "intermediate_size and expansion_factor are both set"),
        ({"te_mha": True}, "'te_mha' is True"),
        ({"bf16": {"enabled": True, "loss": 1}}, "bf16: unknown GPT-NeoX key 'loss'"),
        ({"train-data-weights": [1, 2, "x", 1, 1]}, "'x', which is not a number"),
    ],
)
def test_what_todays_files_may_not_ask_for(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        todays(tmp_path, **changes)


def test_nothing_within_a_section_is_dropped_in_silence(tmp_path: Path) -> None:
    optimizer = LLEMMA_34B["optimizer"] | {"params": {"lr": 1e-4, "torch_adam": True}}
    fp16 = {"enabled": False, "loss_scale": 0, "initial_scale_power": 12}
    found = do_import(tmp_path, optimizer=optimizer, fp16=fp16, launcher="pdsh")
    listed = {key: value for key, value, _ in found.ineffective}
    expected = {"optimizer.params.torch_adam": True, "fp16.loss_scale": 0, "fp16.initial_scale_power": 12}
    assert expected.items() <= listed.items()
    assert listed["launcher"] == "pdsh"
    assert found.config["launch"]["executor"] == "auto"


def test_sources_of_paths_that_end_alike_or_come_twice(tmp_path: Path) -> None:
    data = {
        "train-data-paths": ["/a/web/text_document", "/b/code/text_document", "/a//web/./text_document", "/c/math"],
        "train-data-weights": [1, 2, 3, 4],
        "valid-data-paths": ["/b/code/text_document"],
        "test-data-paths": ["/b/code/text_document"],
    }
    found = do_import(tmp_path, **data).config["data"]
    assert found["sources"] == {
        "web-text_document": {"weight": 4},
        "code-text_document": {"weight": 2},
        "math": {"weight": 4},
    }
    assert found["eval_sources"] == ["code-text_document"]
