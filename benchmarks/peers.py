"""The training step and what others offer for it, on the same architecture and cards, one after the other in one call.

    python -m benchmarks.peers 7b --micro-batch 2             # one GPU
    python -m benchmarks.peers 7b --micro-batch 4 --gpus 2    # tensor parallelism, and data parallelism, of two

65,536 random tokens a step and GPU at sequence 4096, clip by the global norm and fused AdamW; each has as many tokens
a micro batch as fit, from --micro-batch down. The last line is JSON.

On one GPU: transformers' Llama, compiled: all in bf16, which is less work than ours, whose gradients and Adam states
are fp32, with and without Liger's kernels; and with fp32 parameters, gradients and Adam states, computed in bf16 by
autocast, as its Trainer does with bf16=True. Layers are computed again where there is no room else. Needs transformers
and liger-kernel.

On several: torchtitan's FSDP against our data parallelism and our tensor parallelism, and its tensor parallelism, plain
and asynchronous, against ours (benchmarks/torchtitan_step.py). What has no room is computed again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.commands import at_least, require_gpus, run_json, torchrun, why

STEP_TOKENS, SEQUENCE = 65536, 4096


@dataclass(frozen=True)
class Setup:
    """How transformers' Llama is trained."""

    dtype: torch.dtype = torch.bfloat16
    """Of parameters, gradients and Adam states; what is not bf16 is computed under autocast."""
    liger: bool = False


PEERS = {
    "transformers, compiled": Setup(),
    "transformers, compiled, Liger": Setup(liger=True),
    "transformers, compiled, fp32 states": Setup(torch.float32),
}
Result = dict[str, Any]
Rates = dict[str, Result]
"""By name, as `run_json` gives them: what failed says so."""


def main() -> None:
    """Run ours and each peer in processes of their own, and print the ratios."""
    options = _options()
    require_gpus(options.gpus, options.model)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # only after what runs: its memory is then free
    if options.peer:
        sys.stdout.write(json.dumps(_measure_peer(options)) + "\n")
        return
    common = [options.model, "--steps", str(options.steps)]
    common += ["--layers", str(options.layers)] if options.layers else []
    micro_batch = ["--micro-batch", str(options.micro_batch)]
    if options.gpus == 1:
        ours = {"ours": _run(torchrun(1, "benchmarks.train_step", *common, *micro_batch))}
        peer = [sys.executable, "-m", "benchmarks.peers", *common, *micro_batch, "--peer"]
        peers = {name: _run([*peer, name]) for name in PEERS}
    else:
        ours, peers = _several(options.gpus, common, options.micro_batch)
    _compare(ours, peers)


def _several(gpus: int, common: list[str], micro_batch: int) -> tuple[Rates, Rates]:
    """Ours in two layouts, and torchtitan in as many and more."""
    tensor = ["--tp", str(gpus)]
    ours = {f"ours, TP {gpus}": tensor, f"ours, DP {gpus}": ["--activation-checkpointing", "auto"]}

    def measure(module: str, rows: Mapping[str, list[str]]) -> Rates:
        return {name: _largest(torchrun(gpus, module, *common, *row), micro_batch) for name, row in rows.items()}

    return measure("benchmarks.train_step", ours), measure("benchmarks.torchtitan_step", titan_rows(gpus))


def titan_rows(gpus: int) -> dict[str, list[str]]:
    """torchtitan's layouts by name, as options of benchmarks/torchtitan_step.py."""
    tensor = ["--tp", str(gpus)]
    return {
        f"torchtitan, TP {gpus}": tensor,
        f"torchtitan, asynchronous TP {gpus}": [*tensor, "--async-tp"],
        f"torchtitan, FSDP {gpus}": [],
        f"torchtitan, FSDP {gpus}, selective": ["--activation-checkpointing", "selective"],
    }


def _largest(command: list[str], micro_batch: int) -> Result:
    """The result with the largest micro batch that runs."""
    while True:
        found = _run([*command, "--micro-batch", str(micro_batch)])
        if "failed" not in found or micro_batch == 1:
            return found
        micro_batch //= 2


def _compare(ours: Rates, peers: Rates) -> None:
    rows = {name: row for name, row in (ours | peers).items() if "failed" not in row}
    rates = {name: float(row["tokens_per_second"]) for name, row in rows.items()}
    present = [name for name in ours if name in rates]
    failed = {name: why(row) for name, row in (ours | peers).items() if "failed" in row}
    missing = "; ".join(f"{name}: {why}" for name, why in failed.items())
    if not present:
        raise SystemExit(f"our own step failed: {missing}")
    for name, rate in rates.items():
        ratios = "   ".join(f"{own} / this {rates[own] / rate:6.3f}" for own in present)
        sys.stdout.write(f"{name:34} {rate:10,.0f} tokens/s a GPU   {ratios}\n")
    result: Result = {"tokens_per_second": rates, "rows": rows}
    if missing:
        result["failed"] = missing
    sys.stdout.write(json.dumps(result) + "\n")
    if missing:
        raise SystemExit(f"not measured: {missing}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["7b", "34b-slice", "tiny"])
    parser.add_argument("--layers", type=at_least(1), help="fewer layers than the model has")
    parser.add_argument("--micro-batch", type=at_least(1), default=1)
    parser.add_argument("--gpus", type=at_least(1), default=1)
    parser.add_argument("--steps", type=at_least(3), default=6, help="the first two are not counted")
    parser.add_argument("--peer", choices=PEERS, help="only this one, in this process")
    options = parser.parse_args()
    if (sequences := STEP_TOKENS // SEQUENCE) % options.micro_batch:
        parser.error(f"--micro-batch {options.micro_batch} does not divide the {sequences} sequences of a GPU's step")
    return options


def _run(command: Sequence[str]) -> Result:
    """What a command found, or how it failed; either is shown at once, as all of them take minutes."""
    found = run_json(command)
    failed = found.get("failed")
    outcome = f"failed: {failed}" if failed else f"{found['tokens_per_second']:,.0f} tokens/s a GPU"
    sys.stdout.write(f"{' '.join(command)}\n    {outcome}\n")
    sys.stdout.flush()
    return found


def _measure_peer(options: argparse.Namespace) -> Result:
    """With the largest micro batch that fits; if there is none, with layers computed again."""
    sizes = [options.micro_batch >> halvings for halvings in range(options.micro_batch.bit_length())]
    for again, micro_batch in itertools.product((False, True), sizes):
        try:
            rate = _peer_rate(options, micro_batch, again)
            return {"micro_batch": micro_batch, "computed_again": again, "tokens_per_second": rate}
        except torch.cuda.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()  # after the exception has let its tensors go
    sys.exit("not even a micro batch of 1 fits with layers computed again: take fewer with --layers")


def _peer_rate(options: argparse.Namespace, micro_batch: int, again: bool) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _peer(options, device)
    if again:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    vocabulary, micro_batches = model.config.vocab_size, STEP_TOKENS // (micro_batch * SEQUENCE)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=PEERS[options.peer].dtype != torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    seconds = []
    for _ in range(options.steps):
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(micro_batches):
            shape = (micro_batch, SEQUENCE)
            ids = torch.randint(vocabulary, shape, generator=generator, device=device)
            with mixed:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss / micro_batches
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    counted = sorted(seconds[2:])
    return STEP_TOKENS / counted[len(counted) // 2]


def _peer(options: argparse.Namespace, device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.train_step import base_config

    setup = PEERS[options.peer]
    if setup.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model = base_config(options.model, options.layers).model
    config = LlamaConfig(
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_kv_heads,
        vocab_size=model.vocab_size,
        max_position_embeddings=SEQUENCE,
        rope_theta=model.rope_theta,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        dtype=setup.dtype,
    )
    torch.set_default_dtype(setup.dtype)
    with device:
        peer = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    peer.train()
    # The kernel that serves it best here; torch's own first choice is slower on Hopper.
    torch.backends.cuda.enable_flash_sdp(not _has_cudnn_attention(device))
    for layer in peer.model.layers:
        layer.compile()
    return peer


def _has_cudnn_attention(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability() >= (9, 0)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
