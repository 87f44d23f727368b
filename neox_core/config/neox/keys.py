"""The keys of GPT-NeoX's configuration that the importer knows, and what becomes of each.

After GPT-NeoX's configs/neox_arguments.md and Llemma's two configurations. Every key is in exactly one table: MAPPED
(has a counterpart here), FIXED (one behaviour here, so only that value is accepted), OFF (a feature that is absent
here), or INEFFECTIVE (changes nothing that a run here computes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fixed:
    """A key of which only some values describe what is done here."""

    accepted: tuple[Any, ...]
    reason: str
    default: Any = None
    """What GPT-NeoX does when the key is absent; None: nothing that matters here."""
    default_today: Any = None
    """The same since `mlp_type` is gone, where it is another."""


def _by_key(keys_of: Mapping[str, str]) -> dict[str, str]:
    """{reason: 'key key'} -> {key: reason}."""
    return {key: reason for reason, keys in keys_of.items() for key in keys.split()}


MAPPED = frozenset(
    _by_key(
        {
            "model": """num_layers hidden_size num_attention_heads num_kv_heads attention_type intermediate_size
                mlp_multiple_of expansion_factor mlp_type activation seq_length rotary_emb_base rms_norm_epsilon""",
            "tokenizer": "padded_vocab_size make_vocab_size_divisible_by vocab_file",
            "parallel": "model_parallel_size pipe_parallel_size zero_optimization",
            "optimizer": "optimizer lr weight_decay gradient_clipping clip_grad",
            "schedule": "train_iters lr_decay_iters warmup warmup_iters min_lr decay_lr_to",
            "batch": """train_micro_batch_size_per_gpu batch_size gradient_accumulation_steps gas train_batch_size
                num_nodes num_gpus world_size global_num_gpus launcher""",
            "loop": "checkpoint_factor save_interval eval_interval eval_iters log_interval checkpoint_activations seed",
            "precision": "precision bf16 fp16 data_types",
            "data": "data_path train_data_paths train_data_weights valid_data_paths test_data_paths",
            "other": "use_wandb wandb_project wandb_team s3_path",
        }
    )
)

FIXED: Mapping[str, Fixed] = {
    "norm": Fixed(("rmsnorm", "te_rmsnorm"), "RMSNorm is the only norm", default="layernorm"),
    "pos_emb": Fixed(("rotary",), "rotary positions are the only ones", default="learned"),
    "rotary_pct": Fixed((1,), "the whole head is rotated"),
    "no_weight_tying": Fixed((True,), "embedding and output head are untied", default=False),
    "use_bias_in_attn_linear": Fixed((False,), "there are no biases", default=True),
    "use_bias_in_norms": Fixed((False,), "there are no biases"),
    "use_bias_in_mlp": Fixed((False,), "there are no biases"),
    "hidden_dropout": Fixed((0,), "there is no dropout", default=0.1, default_today=0.0),
    "attention_dropout": Fixed((0,), "there is no dropout", default=0.1, default_today=0.0),
    "lr_decay_style": Fixed(("cosine",), "warmup and cosine are the only schedule", default="linear"),
    "tokenizer_type": Fixed(("SPMTokenizer",), "SentencePiece is the only tokenizer", default="GPT2BPETokenizer"),
    "optimizer_type": Fixed(("adam", "Adam"), "AdamW is the only optimizer"),
    "zero_stage": Fixed((0, 1, 2), "ZeRO stage 1 is used; stages 0 and 2 give the same numbers"),
    "model_arch": Fixed(("gpt2",), "a decoder is the only architecture"),
    "moe_num_experts": Fixed((1,), "there are no experts"),
    "num_experts": Fixed((1,), "there are no experts"),
    "context_parallel_size": Fixed((1,), "sequences are not split for attention"),
    "dataset_impl": Fixed(("gpt2",), "documents are packed into full sequences"),
    "train_impl": Fixed(("normal",), "the loss is next-token cross-entropy"),
    "pack_impl": Fixed(("packed",), "documents are packed into full sequences"),
    "checkpoint_scale": Fixed(("linear",), "checkpoints come at a fixed interval"),
    "fp32_allreduce": Fixed((True,), "gradients are always reduced in fp32"),
    "communication_data_type": Fixed(("fp32",), "gradients are always reduced in fp32"),
    "gradient_predivide_factor": Fixed((1,), "gradients are averaged in fp32"),
    "mup_init_scale": Fixed((1,), "there is no muP"),
    "mup_attn_temp": Fixed((1,), "there is no muP"),
    "mup_output_temp": Fixed((1,), "there is no muP"),
    "mup_embedding_mult": Fixed((1,), "there is no muP"),
}

OFF: Mapping[str, str] = _by_key(
    {
        "attention and MLP follow each other, each with its own norm": "gpt_j_residual gpt_j_tied",
        "attention scores are scaled by the head's width alone": "apply_query_key_layer_scaling",
        "every position attends to all before it": "sliding_window_width",
        "attention is Llama's": "use_qk_layernorm rotary_interleaved",
        "attention is dense": "sparsity_config sparse_attention",
        "layers do not share parameters": "num_unique_layers",
        "all parameters are trained": "soft_prompt_tuning adapter_config",
        "documents are read from left to right": "fim_rate extra_sentinel_tokens",
        "the loss is computed in fp32": "fp16_lm_cross_entropy",
        "training is in bf16 or fp32": "te_fp8 amp",
        "the optimizer is AdamW with fp32 states": "use_bnb_optimizer sparse_gradients prescale_gradients",
        "there is no muP": "use_mup coord_check save_base_shapes",
        "the schedule is warmup and cosine": "scheduler",
        "weights are given, not made from document counts": "weight_by_num_documents",
        "every token counts in the loss": "eod_mask_loss loss_on_targets_only label_data_paths packing",
        "the loss is next-token cross-entropy on text": """train_label_data_paths test_label_data_paths
            valid_label_data_paths train_reward_data_paths test_reward_data_paths valid_reward_data_paths
            pos_train_data_paths neg_train_data_paths pos_train_label_data_paths neg_train_label_data_paths
            pos_valid_data_paths neg_valid_data_paths pos_valid_label_data_paths neg_valid_label_data_paths
            pos_test_data_paths neg_test_data_paths pos_test_label_data_paths neg_test_label_data_paths""",
        "layers are torch's own, without fp8": """te_columnparallel te_rowparallel te_layernorm_mlp te_mha
            te_fp8_mha""",
        "the recipe is the same for the whole run": """curriculum_learning data_efficiency elasticity
            compression_training""",
        "the length of a run is given in steps": "train_epochs",
        "the length of the decay is given in steps, by lr_decay_iters": "lr_decay_fraction",
        "checkpoints come at a fixed interval": "extra_save_iters",
        "activations stay on the device": "checkpoint_in_cpu",
    }
)

INEFFECTIVE: Mapping[str, str] = _by_key(
    {
        "every layer has dense causal attention; its kernel is chosen when training starts": "attention_config",
        "rotary positions need no table of a given size": "max_position_embeddings",
        "the norm is RMSNorm": "layernorm_epsilon scalenorm_epsilon",
        "it belongs to another architecture": """rpe_num_buckets rpe_max_distance opt_pos_emb_offset gmlp_attn_dim
            mamba_selective_scan_fusion mamba_causal_conv_fusion mamba_inner_func_fusion mamba_selective_fp32_params
            mamba_use_bias_in_conv mamba_use_bias_in_linears dim_att head_size ffn_dim""",
        "there are no experts": """moe_top_k moe_type moe_loss_coeff moe_expert_interval moe_expert_parallel_size
            expert_interval use_tutel moe_train_capacity_factor moe_eval_capacity_factor moe_min_capacity
            moe_token_dropping create_moe_param_group moe_use_residual moe_glu moe_lbl_in_fp32 moe_jitter_eps
            enable_expert_tensor_parallelism moe_aux_loss_coeff""",
        "the loss is next-token cross-entropy, to which it does not belong": """dpo_fp32 dpo_reference_free dpo_beta
            kto_fp32 kto_desirable_weight kto_undesirable_weight kto_beta z_loss allow_chopped fp32_reinforce kl_impl
            kl_div_beta reinforce_leave_one_out online_dataserver_ips online_dataserver_ports serve_model_weights
            weight_server_port""",
        "weights come from base_model": """init_method init_method_std output_layer_init_method
            use_cpu_initialization""",
        "the output head is split over the vocabulary; the numbers are the same": "output_layer_parallelism",
        "kernels are chosen here, and softmax is in fp32": """scaled_upper_triang_masked_softmax_fusion
            use_flashattn_swiglu scaled_masked_softmax_fusion bias_gelu_fusion bias_dropout_fusion rope_fusion
            rmsnorm_fusion layernorm_fusion attention_softmax_in_fp32""",
        "it changes speed, not numbers": """sequence_parallel pipe_partition_method is_pipe_parallel
            zero_reduce_scatter zero_contiguous_gradients zero_reduce_bucket_size zero_allgather_bucket_size""",
        "tables of rotary positions are in no checkpoint here": "rotary_save_freqs_buffer",
        "the feature that it belongs to is off": """te_fp8_format te_fp8_wgrad te_fp8_amax_history_len
            te_fp8_amax_compute_algo te_fp8_margin param_sharing_style weighted_sampler_alpha base_shapes_file
            mup_width_scale mup_rp_embedding_mult mup_lr mup_std mup_d_model_base mup_hidden_size mup_save
            coord_check_nsteps coord_check_nseeds""",
        "each block is one checkpointed unit (train.activation_checkpointing)": """checkpoint_num_layers
            partition_activations synchronize_each_layer contiguous_checkpointing profile_backward
            deepspeed_activation_checkpointing activation_checkpointing""",
        "prepare-data makes token files from text, one folder per split": """data_impl mmap_warmup use_shared_fs
            num_workers short_seq_prob split""",
        "each source is evaluated on its own": "valid_data_weights test_data_weights",
        "a SentencePiece model needs no merge file": "merge_file",
        "the schedule always follows the configuration": "override_lr_scheduler use_checkpoint_lr_scheduler",
        "checkpoints go to storage.url": "save",
        "weights are converted from base_model.path, in Meta's format": "load",
        "a run starts from base_model, or resumes by itself from its own last checkpoint": """finetune iteration
            no_load_optim no_load_rng load_universal""",
        "checkpoints are whole, and all are kept in the object store": """no_save_optim no_save_rng
            keep_last_n_checkpoints checkpoint s3_chunk_size""",
        "convert and export compare logits themselves": "checkpoint_validation_with_forward_pass",
        "the flow decides what runs": """do_train do_valid do_test save_iters exit_interval config_files git_hash
            user_script""",
        "W&B runs are named after the run; the host is W&B's own setting": """wandb_group wandb_host
            wandb_run_name wandb_init_all_ranks wandb""",
        "metrics go to W&B and to metrics.jsonl": """use_comet comet_workspace comet_project comet_experiment_name
            comet_tags comet_others comet_experiment tensorboard_dir tensorboard csv_monitor log_dir
            log_grad_pct_zeros log_param_norm log_grad_norm log_optimizer_states log_gradient_noise_scale
            gradient_noise_scale_n_batches gradient_noise_scale_cpu_offload steps_per_print wall_clock_breakdown
            dump_state flops_profiler comms_logger char_level_ppl memory_profiling memory_profiling_path profile
            profile_step_start profile_step_stop""",
        "the engine sets it itself": """distributed_backend local_rank rank lazy_mpu_init deepspeed deepscale
            deepscale_config deepspeed_mpi deepspeed_slurm adlr_autoresume adlr_autoresume_interval onnx_safe
            autotuning autotuning_run""",
        "launch describes the job; SLURM places it": """hostfile include exclude master_port master_addr force_multi
            detect_nvlink_pairs no_ssh_check ssh_port comment account""",
        "of DeepSpeed's own settings it holds only such as change no numbers": "deepspeed_extra_args",
        "bf16 needs no loss scaling": "loss_scale loss_scale_window hysteresis min_scale dynamic_loss_scale",
        "it concerns text generation": """text_gen_type temperature top_p top_k return_logits maximum_tokens
            prompt_end sample_input_file sample_output_file num_samples recompute eval_results_prefix eval_tasks
            precompute_model_name""",
        "it is a variable of GPT-NeoX's own": "curriculum_seqlen",
    }
)

ZERO_FIXED: Mapping[str, Fixed] = {
    "stage": FIXED["zero_stage"],
    "cpu_offload": Fixed((False,), "optimizer states stay on the device"),
    "offload_optimizer": Fixed((False,), "optimizer states stay on the device"),
    "offload_param": Fixed((False,), "parameters stay on the device"),
}
ZERO_INEFFECTIVE = frozenset(
    _by_key(
        {
            "speed": """allgather_partitions allgather_bucket_size overlap_comm reduce_scatter reduce_bucket_size
                contiguous_gradients load_from_fp32_weights round_robin_gradients elastic_checkpoint
                ignore_unused_parameters"""
        }
    )
)
DATA_TYPES: Mapping[str, Fixed] = {
    "grad_accum_dtype": Fixed(("fp32",), "gradients are always accumulated in fp32"),
}

_SCALING = """enabled type fp16 bf16 auto_cast loss_scale loss_scale_window hysteresis consecutive_hysteresis
    min_loss_scale initial_scale_power fp16_master_weights_and_grads immediate_grad_update"""
PRECISION_KEYS: Mapping[str, frozenset[str]] = {section: frozenset(_SCALING.split()) for section in ("bf16", "fp16")}
"""Keys within bf16 and fp16; only `enabled` and `type` say anything about a run here."""

KNOWN_KEYS = MAPPED | FIXED.keys() | OFF.keys() | INEFFECTIVE.keys()
