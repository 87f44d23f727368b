"""What this software uses of DeepSpeed's insides, in one place: a new version that changes any of it fails a test.

DeepSpeed promises none of this. A public name is here where it is overridden or where its signature matters.
"""

from __future__ import annotations

from collections.abc import Mapping

from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import TrainSchedule
from deepspeed.runtime.utils import PartitionedTensor

METHODS: Mapping[type, Mapping[str, str]] = {
    PipelineEngine: {
        # Overridden.
        "_train_schedule": "",
        "_inference_schedule": "micro_batches",
        "eval_batch": "data_iter, return_logits, compute_loss, reduce_output, bcast_loss, num_micro_batches",
        "_do_optimizer_sanity_check": "basic_optimizer",
        "_configure_bf16_optimizer": "optimizer",
        "_exec_forward_pass": "buffer_id",
        "_exec_backward_pass": "buffer_id",
        "_exec_recv_grads": "buffer_id",
        "_exec_reduce_grads": "",
        "_exec_optimizer_step": "lr_kwargs",
        "_bf16_reduce_grads": "",
        "_take_model_step": "lr_kwargs",
        "_aggregate_total_loss": "",
        "_next_batch": "",
        "_recv_tensor_meta": "send_stage",
        # Called.
        "train_batch": "data_iter",
        "_scale_loss_by_gas": "prescaled_loss, eval_micro_batches",
        "gradient_accumulation_steps": "",
        "gradient_clipping": "",
        "is_last_stage": "",
        "load_checkpoint": "load_dir, tag, load_module_strict, load_optimizer_states, load_lr_scheduler_states, "
        "load_module_only, custom_load_fn",
        "save_checkpoint": "save_dir, tag, client_state, save_latest, exclude_frozen_parameters",
        "set_train_batch_size": "train_batch_size",
        "train_micro_batch_size_per_gpu": "",
        "zero_allgather_bucket_size": "",
    },
    BF16_Optimizer: {
        # Overridden.
        "accumulate_hp_grads_and_remove_lp": "lp_param, group_idx, param_idx",
        "step": "closure",
        "zero_grad": "set_to_none",
        "clear_hp_grads": "",
        "state_dict": "",
        "_load_legacy_checkpoint": "state_dict_list, load_optimizer_states, load_from_fp32_weights",
        "_restore_from_bit16_weights": "",
        # Called.
        "clear_lp_grads": "set_to_none",
    },
    TrainSchedule: {"__init__": "micro_batches, stages, stage_id", "steps": ""},
    PipelineModule: {"_partition_layers": "method", "_set_bounds": "start, stop", "mpu": ""},
    LayerSpec: {"build": "log"},
    CheckpointEngine: {
        "create": "info",
        "save": "state_dict, path",
        "commit": "info",
        "load": "path, map_location",
        "preserves_storage_sharing": "",
    },
    PartitionedTensor: {"from_meta": "meta, local_part, group, device"},
}
"""Parameters of each method, without `self`, by the class that has it or inherits it."""

ATTRIBUTES: Mapping[type, tuple[str, ...]] = {
    PipelineEngine: (
        "_INSTRUCTION_MAP",
        "_grad_layer_buf",
        "agg_additional_losses",
        "agg_train_loss",
        "checkpoint_engine",
        "device",
        "dp_world_size",
        "fwd_outputs",
        "global_samples",
        "global_steps",
        "grad_layer",
        "is_pipe_partitioned",
        "loss",
        "micro_batches",
        "micro_steps",
        "mpu",
        "num_stages",
        "optimizer",
        "param_names",
        "pipe_buffers",
        "seq_data_parallel_group",
        "skipped_steps",
        "stage_id",
        "timers",
        "total_loss",
        "using_bf16_optimizer",
    ),
    BF16_Optimizer: (
        "bf16_groups",
        "bf16_groups_flat",
        "bf16_partitioned_groups",
        "clip_grad",
        "dp_process_group",
        "fp32_groups_flat_partition",
        "fp32_groups_gradient_flat_partition",
        "fp32_groups_gradients",
        "fp32_groups_gradients_flat",
        "fp32_groups_has_gradients",
        "optimizer",
        "param_groups",
        "param_names",
        "real_dp_process_group",
    ),
    PipelineModule: ("_topo", "global_rank", "parts"),
    PartitionedTensor: (
        "even_split",
        "group",
        "local_data",
        "num_parts",
        "orig_device",
        "orig_size",
        "rank",
    ),
}
"""Attributes that are read or set: on the class, or on `self` in its code."""

EXPECTED: Mapping[type, tuple[str, ...]] = {
    PipelineEngine: ("_global_grad_norm",),
    BF16_Optimizer: ("_hp_mapping",),
}
"""Names that the class's code looks up on the optimizer or on parameters: what is set there must be looked for."""
