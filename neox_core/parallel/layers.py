"""What a rank runs: the model's layers in the form in which a pipeline calls them.

Each layer is made from the model's own (model/llama.py), takes over its parts under their names, so that a state_dict
stays the same, and computes the same. What it does besides, it says in its own forward: how hidden states enter and
leave regions that ranks split, which additions and norms are one pass, and what is computed again.
"""

from __future__ import annotations

from torch import Tensor, nn

from neox_core.model import FinalNorm, OutputHead, TokenEmbedding, TransformerBlock
from neox_core.model.add_norm import Addends, add, add_norm, norm_add
from neox_core.model.elementwise import fused_on_cuda
from neox_core.model.llama import MLP, Attention, RMSNorm
from neox_core.parallel.activation_checkpointing import NoCheckpointing
from neox_core.parallel.tensor_parallel import SplitRegion
from neox_core.parallel.weight_gradients import AccumulatingNorm, linear_outputs

Passed = Tensor | tuple[Tensor, Tensor]
"""What a pipeline passes from layer to layer: token ids [B,T] or hidden states [B,T,D]; where rows are packs of
documents, with the positions [B,T] within these."""


class PipelineLayer(nn.Module):
    """A layer that passes positions on, if there are any."""

    def __init__(self) -> None:
        super().__init__()
        self.region: SplitRegion | None = None
        """How ranks that split the layer exchange; None: one rank has it all."""

    def forward(self, passed: Passed) -> Passed:
        """What the layer before passed -> what the next one gets"""
        if isinstance(passed, Tensor):
            return self.compute(passed, None)
        x, positions_BT = passed
        return self.compute(x, positions_BT), positions_BT

    def compute(self, x: Tensor, positions_BT: Tensor | None) -> Tensor:
        """The layer's own work: ids or hidden states -> hidden states [B,T,D]"""
        raise NotImplementedError

    def _enter(self, x_BTD: Tensor) -> Tensor:
        return x_BTD if self.region is None else self.region.enter(x_BTD)

    def _leave(self, partial_BTD: Tensor) -> Tensor:
        return partial_BTD if self.region is None else self.region.leave(partial_BTD)


class SplitEmbedding(PipelineLayer):
    """Each rank looks up the ids in its part of the vocabulary; others contribute zeros to the sum."""

    def __init__(self, embedding: TokenEmbedding) -> None:
        super().__init__()
        self.word_embeddings = embedding.word_embeddings

    def compute(self, x: Tensor, positions_BT: Tensor | None) -> Tensor:
        """ids [B,T] -> [B,T,D]"""
        if self.region is None:
            vectors: Tensor = self.word_embeddings(x)
            return vectors
        size = self.word_embeddings.num_embeddings
        first = size * self.region.rank
        foreign = (x < first) | (x >= first + size)
        vectors = self.word_embeddings((x - first).masked_fill(foreign, 0))
        return self._leave(zeros_at(vectors, foreign))


@fused_on_cuda
def zeros_at(vectors_BTD: Tensor, positions_BT: Tensor) -> Tensor:
    """The vectors, with zeros at the positions that are true."""
    return vectors_BTD.masked_fill(positions_BT.unsqueeze(-1), 0)


class FusedBlock(PipelineLayer):
    """TransformerBlock with each addition and the norm after it in one pass."""

    attention: Attention
    mlp: MLP
    input_layernorm: AccumulatingNorm
    post_attention_layernorm: AccumulatingNorm
    post_feedforward_layernorm: AccumulatingNorm

    def __init__(self, block: TransformerBlock) -> None:
        super().__init__()
        self.norms_after = block.norms_after
        for name, part in block.named_children():
            self.add_module(name, AccumulatingNorm.of(part) if isinstance(part, RMSNorm) else part)
        self.checkpointing = NoCheckpointing()
        """What is kept for the backward pass."""

    def compute(self, x: Tensor, positions_BT: Tensor | None) -> Tensor:
        """[B,T,D] -> [B,T,D]"""
        return self.checkpointing.run(self._block_then_norms if self.norms_after else self._block, x, positions_BT)

    # Results are passed on without a name where a later product does not need them: a name would keep their memory.
    def _block(self, x_BTD: Tensor, positions_BT: Tensor | None) -> Tensor:
        x_BTD, normed_BTD = self._add_norm(self.input_layernorm, x_BTD)
        h_BTD, normed_BTD = self._add_norm(
            self.post_attention_layernorm, x_BTD, *self._attention(normed_BTD, positions_BT)
        )
        return add(h_BTD, *self._mlp(normed_BTD))

    def _block_then_norms(self, x_BTD: Tensor, positions_BT: Tensor | None) -> Tensor:
        after, last = self.post_attention_layernorm, self.post_feedforward_layernorm
        attended_BTD = add(*self._attention(x_BTD, positions_BT))
        h_BTD = norm_add(attended_BTD, x_BTD, after.scale, after.eps, after.accumulator)
        return norm_add(add(*self._mlp(h_BTD)), h_BTD, last.scale, last.eps, last.accumulator)

    def _add_norm(self, norm: AccumulatingNorm, x_BTD: Tensor, *addends_BTD: Tensor) -> tuple[Tensor, Tensor]:
        total_BTD, normed_BTD = add_norm(x_BTD, addends_BTD, norm.scale, norm.eps, norm.accumulator)
        return total_BTD, self.checkpointing.repeatable(normed_BTD, norm, total_BTD)

    def _attention(self, normed_BTD: Tensor, positions_BT: Tensor | None) -> Addends:
        attention, checkpointing = self.attention, self.checkpointing
        return self._project_out(
            checkpointing.recomputed(
                attention.attend,
                *self._project_in(normed_BTD, attention.query_key_value),
                positions_BT,
                not checkpointing.keeps_arguments,
            ),
            attention.dense,
        )

    def _mlp(self, normed_BTD: Tensor) -> Addends:
        mlp, recomputed = self.mlp, self.checkpointing.recomputed
        return self._project_out(recomputed(mlp.activate, *self._project_in(normed_BTD, mlp.w1, mlp.w3)), mlp.w2)

    def _project_in(self, normed_BTD: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
        if self.region is None:
            products = linear_outputs(normed_BTD, *linears)
        else:
            products = self.region.enter_linears(normed_BTD, self.checkpointing.repeatable, *linears)
        return tuple(p if x.bias is None else p + x.bias for p, x in zip(products, linears, strict=True))

    def _project_out(self, x_BTI: Tensor, linear: nn.Linear) -> Addends:
        if self.region is None:
            addends: Addends = linear_outputs(x_BTI, linear)
        else:
            addends = self.region.linear_leaves(x_BTI, linear)
        return addends if linear.bias is None else (addends[0] + linear.bias, *addends[1:])


class LastNorm(PipelineLayer):
    """FinalNorm, where positions end."""

    def __init__(self, final: FinalNorm) -> None:
        super().__init__()
        self.norm = final.norm

    def forward(self, passed: Passed) -> Tensor:
        """[B,T,D] -> [B,T,D]"""
        normed: Tensor = self.norm(passed if isinstance(passed, Tensor) else passed[0])
        return normed


class ChunkedHead(PipelineLayer):
    """OutputHead in two parts: a pipeline passes hidden states on to the loss, which takes logits chunk by chunk."""

    def __init__(self, head: OutputHead) -> None:
        super().__init__()
        self.final_linear = head.final_linear

    def compute(self, x: Tensor, positions_BT: Tensor | None) -> Tensor:
        """Hidden states of this rank's tokens -> those of all that `project` takes: [B,T,D]"""
        return self._enter(x)

    def project(self, x_BTD: Tensor) -> Tensor:
        """[B,T,D] -> this rank's part of the logits [B,T,V]"""
        logits: Tensor = self.final_linear(x_BTD)
        return logits
