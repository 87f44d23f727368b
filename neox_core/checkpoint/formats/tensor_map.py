"""One description of where every tensor lives in Meta's, NeoX's and Hugging Face's layouts.

Each conversion, in any direction, reads this table; none has rules of its own. Pure arithmetic on rows and columns:
no tensor is touched here. Weights are [rows = outputs, columns = inputs], as torch.nn.Linear keeps them; a vector
counts as one row.

The table speaks of whole tensors, under Hugging Face's full names and in its order of rows. `stored_tensors` says what
a file of a layout holds: each of its tensors as blocks, rectangles of a whole tensor with the rows and columns where
the file has them. Two things differ between the layouts apart from names and cuts:

* RoPE pairs. Meta rotates rows (2i, 2i+1) of a head (interleaved), NeoX and Hugging Face rows (i, i + head_dim/2)
  (halves), so the rows of wq and wk are permuted within each head.
* NeoX fuses q, k and v per tensor-parallel rank: for each of the rank's query heads its head_dim rows of q, then the
  next head_dim·kv_heads/heads rows of the rank's k, then as many of its v. With more ranks than KV heads,
  ranks / kv_heads neighbours have the same KV head. Where a head's width is no multiple of the query heads per KV head,
  that form does not exist, and the fused tensor goes by KV heads: each one's queries, its k and its v, as Megatron's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from neox_core.config import ModelConfig
from neox_core.errors import ConfigError

QKV = "attention.query_key_value.weight"
QKV_BIAS = "attention.query_key_value.bias"


class Form(Enum):
    """A layout of files."""

    META = "Meta"
    META_ROWS = "Meta, as of Llama 3"
    """Shards cut the embedding by rows, of which each stands for a token; before they cut it by columns."""
    NEOX = "NeoX"
    HUGGINGFACE = "Hugging Face"

    @property
    def is_meta(self) -> bool:
        """Meta's names and order of rows."""
        return self in (Form.META, Form.META_ROWS)


@dataclass(frozen=True)
class TensorLayout:
    """One tensor as Meta and Hugging Face have it, and where NeoX puts it. Names lack the layer's prefix."""

    neox: str
    meta: str
    huggingface: str
    axes: tuple[str, ...]
    """What each dimension counts: vocab, hidden, query, key_value, ffn or head."""
    meta_split: int | None
    """Dimension that Meta's shards cut; None: every shard has the whole tensor."""
    neox_split: int | None
    """Dimension that NeoX's tensor-parallel ranks cut; None: every rank has the whole tensor."""
    rotary: bool = False
    """Rows are RoPE pairs, so their order differs between Meta and the others."""

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(_size(axis, model) for axis in self.axes)

    def split(self, form: Form) -> int | None:
        """Dimension that the form's files cut; None: each has the whole tensor."""
        if form is Form.META_ROWS and self.axes[0] == "vocab":
            return 0
        return self.meta_split if form.is_meta else {Form.NEOX: self.neox_split, Form.HUGGINGFACE: None}[form]


def _size(axis: str, model: ModelConfig) -> int:
    sizes = {
        "vocab": model.vocab_size,
        "hidden": model.hidden_size,
        "query": model.num_attention_heads * model.head_dim,
        "key_value": model.num_kv_heads * model.head_dim,
        "ffn": model.intermediate_size,
        "head": model.head_dim,
    }
    return sizes[axis]


_EMBEDDING = (
    TensorLayout("word_embeddings.weight", "tok_embeddings.weight", "embed_tokens.weight", ("vocab", "hidden"), 1, 0),
)
_TRANSFORMER = (
    TensorLayout("input_layernorm.scale", "attention_norm.weight", "input_layernorm.weight", ("hidden",), None, None),
    TensorLayout(QKV, "attention.wq.weight", "self_attn.q_proj.weight", ("query", "hidden"), 0, 0, rotary=True),
    TensorLayout(QKV, "attention.wk.weight", "self_attn.k_proj.weight", ("key_value", "hidden"), 0, 0, rotary=True),
    TensorLayout(QKV, "attention.wv.weight", "self_attn.v_proj.weight", ("key_value", "hidden"), 0, 0),
    TensorLayout("attention.dense.weight", "attention.wo.weight", "self_attn.o_proj.weight", ("hidden", "query"), 1, 1),
    TensorLayout(
        "post_attention_layernorm.scale",
        "ffn_norm.weight",
        "post_attention_layernorm.weight",
        ("hidden",),
        None,
        None,
    ),
    TensorLayout("mlp.w1.weight", "feed_forward.w1.weight", "mlp.gate_proj.weight", ("ffn", "hidden"), 0, 0),
    TensorLayout("mlp.w2.weight", "feed_forward.w2.weight", "mlp.down_proj.weight", ("hidden", "ffn"), 1, 1),
    TensorLayout("mlp.w3.weight", "feed_forward.w3.weight", "mlp.up_proj.weight", ("ffn", "hidden"), 0, 0),
)
_AFTER_QKV, _AFTER_DENSE = 4, 5
_QKV_BIAS = tuple(
    TensorLayout(QKV_BIAS, f"attention.w{name}.bias", f"self_attn.{name}_proj.bias", (axis,), 0, 0, rotary=name != "v")
    for name, axis in (("q", "query"), ("k", "key_value"), ("v", "key_value"))
)
_OUTPUT_BIAS = (
    TensorLayout("attention.dense.bias", "attention.wo.bias", "self_attn.o_proj.bias", ("hidden",), None, None),
)
_HEAD_NORMS, _PROJECTION_NORMS = (
    tuple(
        TensorLayout(
            f"attention.{n}_norm.scale", f"attention.{n}_norm.weight", f"self_attn.{n}_norm.weight", (axis,), cut, cut
        )
        for n, axis in zip(("q", "k"), axes, strict=True)
    )
    for axes, cut in ((("head", "head"), None), (("query", "key_value"), 0))
)
_QK_NORM = {None: (), "head": _HEAD_NORMS, "projection": _PROJECTION_NORMS}
_LAST = "post_feedforward_layernorm"
_LAST_NORM = (TensorLayout(f"{_LAST}.scale", f"{_LAST}.weight", f"{_LAST}.weight", ("hidden",), None, None),)
"""Of blocks with norms after attention and MLP, which lack the first norm."""
_FINAL_NORM = (TensorLayout("norm.scale", "norm.weight", "norm.weight", ("hidden",), None, None),)
_OUTPUT = (TensorLayout("final_linear.weight", "output.weight", "lm_head.weight", ("vocab", "hidden"), 0, 0),)


@dataclass(frozen=True)
class Layer:
    """One layer of NeoX's sequence and the tensors in it."""

    index: int
    """Position in NeoX's sequence: embedding 0, transformer layer l at l + 2, final norm L + 3, output L + 4."""
    tensors: tuple[TensorLayout, ...]
    meta_prefix: str
    huggingface_prefix: str
    tied: bool = False
    """Its tensor is the embedding's: NeoX's files have both, Hugging Face's and the optimizer one."""

    def name(self, tensor: TensorLayout, form: Form) -> str:
        """Full name of one of its tensors in a form's files; NeoX's lacks `sequential.{index}.`, which not all have."""
        if form is Form.NEOX:
            return tensor.neox
        if form.is_meta:
            return self.meta_prefix + tensor.meta
        return self.huggingface_prefix + tensor.huggingface


def iterate_layers(model: ModelConfig) -> Iterator[Layer]:
    """All layers that hold weights, in the order of computation."""
    family, layers = model.differences, model.num_layers
    further = (_QKV_BIAS if family.qkv_bias or model.attention_bias else ()) + _QK_NORM[family.qk_norm]
    further += _TRANSFORMER[_AFTER_QKV:_AFTER_DENSE] + (_OUTPUT_BIAS if model.attention_bias else ())
    block = _TRANSFORMER[:_AFTER_QKV] + further + _TRANSFORMER[_AFTER_DENSE:]  # in the order of the model's parameters
    block = block[1:] + _LAST_NORM if family.norms_after else block
    yield Layer(0, _EMBEDDING, "", "model.")
    for number in range(layers):
        yield Layer(number + 2, block, f"layers.{number}.", f"model.layers.{number}.")
    yield Layer(layers + 3, _FINAL_NORM, "", "model.")
    yield Layer(layers + 4, _OUTPUT, "", "", model.tied_embeddings)


@dataclass(frozen=True)
class Block:
    """A rectangle of a whole tensor, and where a file's tensor has it."""

    whole: str
    """The whole tensor's name."""
    rows: range
    columns: range
    at_rows: range
    """As many as `rows`; the step is 2 where RoPE pairs are interleaved."""
    at_columns: range
    replica: int
    """0, or the number of a copy: several files have the same rectangle."""


@dataclass(frozen=True)
class StoredLayout:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]


def stored_tensors(layer: Layer, model: ModelConfig, form: Form, parts: int = 1, part: int = 0) -> list[StoredLayout]:
    """The tensors of one layer in the file number `part` of `parts`: a Meta shard or a tensor-parallel rank."""
    grouped: dict[str, list[TensorLayout]] = {}
    for tensor in layer.tensors:
        grouped.setdefault(layer.name(tensor, form), []).append(tensor)
    return [_stored(name, layer, group, model, form, parts, part) for name, group in grouped.items()]


def _stored(
    name: str, layer: Layer, group: list[TensorLayout], model: ModelConfig, form: Form, parts: int, part: int
) -> StoredLayout:
    blocks: list[Block] = []
    for position, tensor in enumerate(group):
        rows, columns, replica = _share(tensor, model, form, parts, part)
        fused = position if len(group) > 1 else None
        blocks += [
            Block(layer.name(tensor, Form.HUGGINGFACE), run, columns, at, range(len(columns)), replica)
            for run, at in _runs(tensor, model, form, parts, rows, fused)
        ]
    height, width = sum(len(block.rows) for block in blocks), len(blocks[0].columns)
    if len(group[0].axes) > 1:
        return StoredLayout(name, (height, width), tuple(blocks))
    return StoredLayout(name, (height,), tuple(_as_row(block) for block in blocks))


def _as_row(block: Block) -> Block:
    """A block of a vector, which was cut as a column."""
    return replace(block, rows=block.columns, columns=block.rows, at_rows=block.at_columns, at_columns=block.at_rows)


def _share(tensor: TensorLayout, model: ModelConfig, form: Form, parts: int, part: int) -> tuple[range, range, int]:
    """Rows and columns of the whole tensor that a part has, and the number of the copy."""
    shape = tensor.shape(model)
    height, width = shape if len(shape) > 1 else (shape[0], 1)
    split = tensor.split(form)
    if split is None:
        return range(height), range(width), part
    copies = max(1, parts // model.num_kv_heads) if tensor.axes[split] == "key_value" else 1
    size = shape[split] * copies // parts
    mine = range(part // copies * size, (part // copies + 1) * size)
    rows, columns = (mine, range(width)) if split == 0 else (range(height), mine)
    return rows, columns, part % copies


def _runs(
    tensor: TensorLayout, model: ModelConfig, form: Form, parts: int, rows: range, fused: int | None
) -> list[tuple[range, range]]:
    """Runs of the part's rows, and the rows of the file's tensor that hold them. `fused`: q 0, k 1, v 2 of NeoX."""
    width = model.head_dim
    if tensor.rotary and form.is_meta:
        half = width // 2
        return [
            (range(head + second * half, head + (second + 1) * half), range(at + second, at + width, 2))
            for at, head in enumerate_by(width, rows)
            for second in (0, 1)
        ]
    if fused is None:
        return [(rows, range(len(rows)))]
    heads, kv_heads = model.num_attention_heads // parts, max(1, model.num_kv_heads // parts)
    groups = kv_heads if model.grouped_qkv else heads
    queries, share = width * heads // groups, width * kv_heads // groups
    size = queries if fused == 0 else share
    stride, offset = queries + 2 * share, (0, queries, queries + share)[fused]
    return [
        (range(start, start + size), range(group * stride + offset, group * stride + offset + size))
        for group, start in enumerate(range(rows.start, rows.stop, size))
    ]


def enumerate_by(width: int, rows: range) -> Iterator[tuple[int, int]]:
    """Starts of the groups of `width` rows: relative to the first row, and absolute."""
    return ((start - rows.start, start) for start in range(rows.start, rows.stop, width))


def check_divides(model: ModelConfig, parts: int, what: str) -> None:
    """Raise ConfigError if the model cannot be cut into so many parts; `what` names the setting."""
    heads, kv_heads = model.num_attention_heads, model.num_kv_heads
    for name in ("num_attention_heads", "intermediate_size", "vocab_size"):
        if getattr(model, name) % parts:
            padding = (
                f": pad it to a multiple of {parts} (llemma convert --vocab-multiple {parts}; in a run, "
                "model.vocab_size with model.unpadded_vocab_size)"
                if name == "vocab_size"
                else ""
            )
            raise ConfigError(f"{what} {parts} does not divide model.{name} {getattr(model, name)}{padding}")
    if kv_heads % parts and parts % kv_heads:
        raise ConfigError(
            f"{what} {parts} does not divide model.num_kv_heads {kv_heads} of {heads} heads and is no multiple of it"
        )
