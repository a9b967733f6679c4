"""What one layer keeps for its backward pass, and what it needs beside that while it works: bytes, from sizes alone.

Each term names the tensor that it counts. Sizes follow the code of transformers' Phi3 and CLIP, PEFT's LoRA layers and
bitsandbytes' 4-bit linear; `docs/fit.md` has the formulae in a table, with what they were compared with.

    a linear with LoRA, p > 0:  x → dropout → A → B     keeps the mask (1 byte a number), the dropped x, and A's output
    the same weight, frozen:    x → W                   keeps nothing of x: no gradient of W is wanted
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Numerics:
    """
    In what the numbers of a step are kept.

    Args:
        stored (`int`): Bytes of a weight that is not quantised, and of the stream of hidden states.
        autocast (`int`, *optional*): Bytes that `bf16` or `fp16` computes in; `None` without either.
        quantised (`bool`): Whether the decoder's linears are.
        full (`bool`): Whether weights themselves are trained, and not adapters.
        rank (`int`): LoRA's.
        dropout (`float`): LoRA's.
        attention (`str`): `"eager"` keeps tokens × tokens numbers per head, others do not.
        padded (`bool`): Whether rows differ in length: sdpa then takes a mask of tokens × tokens numbers per row.
        cuda (`bool`): On a CPU, a dropout mask is as wide as what is dropped, and norms are not float32.
    """

    stored: int
    autocast: int | None
    quantised: bool
    full: bool
    rank: int
    dropout: float
    attention: str
    padded: bool
    cuda: bool = True

    @property
    def compute(self) -> int:
        """Bytes of a linear's output."""
        return self.autocast or self.stored

    @property
    def adapter(self) -> int:
        """Bytes that an adapter computes in: its weights are float32."""
        return self.autocast or 4

    @property
    def casts(self) -> bool:
        """Whether PEFT makes its adapters' input float32: not where a 4-bit linear meets CUDA's autocast."""
        return not (self.quantised and self.autocast and self.cuda)

    def without_quantisation(self) -> "Numerics":
        """The same for parts that are never quantised."""
        return Numerics(**{**vars(self), "quantised": False})


@dataclass(frozen=True)
class Layer:
    """
    Bytes of one layer, for all tokens of a batch.

    Args:
        saved (`int`): Kept from its forward to its backward pass.
        working (`int`): Most that it needs beside `saved`, in either pass.
        stream (`int`): Its input: all that activation checkpointing keeps.
        less (`int`): How much less is kept where the input needs no gradient.
    """

    saved: int
    working: int
    stream: int
    less: int


def _adapted(tokens: int, width: int, size: int, kind: Numerics, *, fresh: bool = True) -> tuple[int, int]:
    """
    What LoRA on one linear keeps, and of that the dropout's mask. `size`: bytes per number of its input of `width`;
    `fresh`: whether nothing else keeps that input.
    """
    given = 4 if kind.casts else size
    mask = tokens * width * (1 if kind.cuda else given) if kind.dropout else 0
    shared = not kind.dropout and given == kind.adapter and given == size and not fresh
    return mask + (0 if shared else tokens * width * kind.adapter) + tokens * kind.rank * kind.adapter, mask


def decoder_layer(
    *,
    rows: int,
    tokens: int,
    hidden: int,
    inner: int,
    heads: int,
    kv_heads: int,
    kind: Numerics,
    adapted: bool,
    given: int | None = None,
) -> Layer:
    """
    One layer of Phi-3's decoder.

    Args:
        rows (`int`): Rows of the batch.
        tokens (`int`): Tokens per row, with padding.
        hidden (`int`): `hidden_size`.
        inner (`int`): `intermediate_size`.
        heads (`int`): Heads of queries.
        kv_heads (`int`): Heads of keys and values.
        kind ([`Numerics`]): In what numbers are kept.
        adapted (`bool`): Whether its four linears have LoRA.
        given (`int`, *optional*): Positions that the layer gives, and runs its MLP on: of the last one, a few.

    Returns:
        [`Layer`]: Bytes.
    """
    n, compute, stored = rows * tokens, kind.compute, kind.stored
    m = n if given is None else given
    keys = hidden * kv_heads // heads
    each = hidden * 4 + 4  # the input in float32, and one number per token
    if kind.full:
        each += hidden * stored  # for the gradient of its weight
    norm, norm_2 = n * each, m * each
    attention = n * hidden * compute + n * (keys if kv_heads == heads else 2 * hidden) * compute  # rotated, repeated
    scores = rows * heads * tokens * tokens
    if kind.attention == "eager":
        attention += n * hidden * compute + scores * (4 + (compute if compute != 4 else 0))  # a copy of the values
    else:
        attention += n * (2 * hidden + 2 * keys) * compute  # all of qkv_proj, of which values are a part; the output
        attention += n * heads * 4
        if kind.attention == "sdpa" and kind.padded:
            attention += rows * tokens * tokens * compute
    swiglu = m * 3 * inner * compute  # gate and up, silu(gate)
    if kind.full:  # at_o: attention gives its output in the layout of the queries, and o_proj reads a copy
        at_qkv = at_o = n * hidden * compute
        at_gate, at_down = m * hidden * compute, m * inner * compute
        masked = 0
    elif adapted:
        at_qkv, masked = _adapted(n, hidden, stored, kind)
        at_o, _ = _adapted(n, hidden, compute, kind)
        at_gate, _ = _adapted(m, hidden, stored, kind)
        at_down, _ = _adapted(m, inner, compute, kind)
    else:
        at_qkv = at_o = at_gate = at_down = masked = 0
    saved = norm + norm_2 + attention + swiglu + at_qkv + at_o + at_gate + at_down
    streams = n * hidden * stored
    working = max(
        # forward, at down_proj: the product, the float32 input of the adapter, that after dropout, three streams
        _at_input(m, inner, kind, adapted) + m * hidden * compute + 2 * streams,
        # forward, at gate_up_proj: base, adapter and their sum, where what follows is not there yet
        m * 2 * inner * (compute + 2 * max(compute, kind.adapter)) * adapted + streams
        + m * hidden * (4 if adapted and kind.casts else 0) - swiglu - at_down,
        # backward, at down_proj: gradients of its input, by base and by adapter, and their sum
        m * inner * (3 * compute if adapted else compute) - at_down + 2 * streams,
        # backward, through SwiGLU: gradients of gate, up and the product
        m * 3 * inner * compute - at_down + 2 * streams,
        # backward, through attention: gradients of its output, and of queries, keys and values
        n * 2 * (hidden + keys) * compute - swiglu - at_down - at_gate - norm_2 - at_o + 2 * streams,
    )  # fmt: skip
    if kind.attention == "eager":  # backward, at the softmax, where the rest of the layer is gone
        working = max(working, scores * 8 - swiglu - at_down - at_gate - norm_2 - at_o)
    return Layer(saved, max(working, 0), streams, norm + masked)


def _at_input(n: int, inner: int, kind: Numerics, adapted: bool) -> int:
    """What is there for a moment while a linear with LoRA reads an input of `inner` numbers."""
    if kind.full or not adapted:
        return n * inner * (0 if kind.full else kind.compute)
    product = n * inner * kind.compute if kind.dropout or kind.casts else 0
    given = 4 if kind.casts else kind.compute
    as_float = n * inner * 4 if kind.casts and kind.compute != 4 else 0
    dropped = n * inner * given if kind.dropout and given != kind.adapter else 0
    return product + as_float + dropped


def vision_layer(*, patches: int, width: int, inner: int, heads: int, kind: Numerics, adapted: bool) -> Layer:
    """
    One layer of CLIP that is trained or adapted.

    Args:
        patches (`int`): Patches of all crops, with one CLS each.
        width (`int`): CLIP's `hidden_size`.
        inner (`int`): CLIP's `intermediate_size`.
        heads (`int`): Heads.
        kind ([`Numerics`]): In what numbers are kept.
        adapted (`bool`): Whether its six linears have LoRA.

    Returns:
        [`Layer`]: Bytes.
    """
    kind = kind.without_quantisation()
    compute, stored = kind.compute, kind.stored
    norm = patches * width * (4 if kind.cuda and kind.autocast else stored) + patches * 8
    attention = patches * width * 4 * compute + patches * heads * 4
    gelu = patches * inner * 2 * compute  # x and sigmoid(1.702·x)
    if kind.full:
        # Of what is cast, q, k and v make a copy each; else they share their input.
        linears = patches * ((2 if compute == stored else 4) * width + inner) * compute
    elif adapted:
        same = not kind.dropout and stored == kind.adapter == 4  # q, k and v then share their input
        each, _ = _adapted(patches, width, stored, kind)
        shared = 2 * patches * width * 4 if same else 0
        at_out, _ = _adapted(patches, width, compute, kind, fresh=False)
        fc2, _ = _adapted(patches, inner, compute, kind)
        linears = 4 * each - shared + at_out + fc2
    else:
        linears = 0
    streams = patches * width * stored
    working = max(
        _at_input(patches, inner, kind, adapted) + patches * width * compute + 2 * streams,
        patches * inner * 4 * compute + 2 * streams - (fc2 if adapted and not kind.full else patches * inner * compute),
    )
    return Layer(2 * norm + attention + gelu + linears, working, streams, norm)


def vision_forward(*, crops: int, patches: int, width: int, inner: int, heads: int, kind: Numerics) -> int:
    """
    Most that CLIP needs while it only reads so many crops: three streams, and `x`, `σ(1.702·x)` and their product. If
    attention is eager: two streams, queries, keys and values, and scores, twice in float32.
    """
    gelu = crops * patches * (3 * inner * kind.compute + 3 * width * kind.stored)
    if kind.attention != "eager":
        return gelu
    streams = crops * patches * width * (2 * kind.stored + 3 * kind.compute)
    return max(gelu, streams + crops * heads * patches**2 * (8 + kind.compute))
