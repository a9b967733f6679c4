"""How near the estimate of memory comes, on a machine without a GPU.

    python benchmarks/memory.py                 # mid-size models, real numbers, a whole step each
    python benchmarks/memory.py --full_size     # Phi-3-vision's own sizes, on tensors without data: no memory needed

Every tensor that a training step makes is counted while it lives, the parameters' own apart; what is alive between the
forward and the backward pass is `kept`, the most at any time is `peak`. Tensors without data (torch's fake tensors) run
the same code and the same operations and have every property but their numbers.
"""

import argparse
import platform
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import bitsandbytes
import torch
from models import config_of, quantise
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl.trainer.utils import add_fused_lm_head

from sft_phi3v.estimate import Setting, Shape, Step, weights_of
from sft_phi3v.model import checkpoint_layers, target_pattern
from sft_phi3v.phi3_v import SDPA_BY_ROW, Phi3VConfig, Phi3VForCausalLM
from sft_phi3v.phi3_v.modeling_phi3_v import Phi3VModel


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on, as long as they live."""

    def __init__(self, ignored: Iterator[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}
        for tensor in ignored:
            self.known[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        self.peak = max(self.peak, self.now)
        return made

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        self.now -= self.known.pop(key)


@dataclass(frozen=True)
class Case:
    """One setting, on one model, with one batch."""

    name: str
    config: Phi3VConfig
    setting: Setting
    shape: Shape
    padding_free: bool = False


@dataclass(frozen=True)
class Measured:
    """Bytes: of parameters, gradients and optimiser; and without parameters, kept between the passes, and at most."""

    parameters: int
    gradients: int
    optimiser: int
    reads: int  # at most, while CLIP and projector read, if they are frozen; else 0
    kept: int
    loss: int  # at most, while the loss and its gradient are computed
    back: int  # at most, while layers are gone through backwards


def build(case: Case) -> nn.Module:
    """The model as a run would train it: quantised, adapted, its weights of a dtype; their numbers mean nothing."""
    setting = case.setting
    dtype = getattr(torch, setting.dtype)
    case.config._attn_implementation = SDPA_BY_ROW if case.padding_free else setting.attention
    with torch.device("meta"):
        model = Phi3VForCausalLM(case.config)
    _materialise(model, dtype)
    if setting.bits == 4:
        quantise(model, setting, "cpu")
    if setting.lora:
        pattern = target_pattern(setting.adapt, model)
        model.requires_grad_(False)
        with torch.device("meta"):
            adapted = get_peft_model(
                model,
                LoraConfig(r=setting.rank, lora_dropout=setting.dropout, target_modules=pattern),
                low_cpu_mem_usage=True,
            )
        _materialise(adapted, torch.float32, only="lora_")
        model = adapted
    base = model.get_base_model() if setting.lora else model
    base.model.vision_batch_size = setting.vision_batch_size
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    if setting.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        if setting.checkpointed is not None:
            checkpoint_layers(model, setting.checkpointed)
        if setting.lora:
            model.enable_input_require_grads()
    return model.train()


def _materialise(model: nn.Module, dtype: torch.dtype, only: str = "") -> None:
    for prefix, module in model.named_modules():
        if only not in prefix:
            continue
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                filled = torch.full(weight.shape, 0.01, dtype=dtype)
                module._parameters[name] = nn.Parameter(filled, requires_grad=weight.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                whole = torch.arange(buffer.numel()).view(buffer.shape)
                module._buffers[name] = torch.ones(buffer.shape) if buffer.is_floating_point() else whole


def batch_of(case: Case) -> dict[str, Any]:
    """
    Ids with one run of image tokens per row and labels at its end, as training hands them to the model. What
    `only_supervised` finds in the labels is written down here: tensors without data cannot be looked through.
    """
    shape = case.shape
    ids = torch.full((shape.rows, shape.tokens), 5)
    ids[:, 4 : 4 + shape.image_tokens] = case.config.image_token_id
    before_labels = torch.arange(shape.tokens - shape.supervised - 1, shape.tokens - 1)
    kept = (torch.arange(shape.rows).unsqueeze(1) * shape.tokens + before_labels).flatten()
    batch = {
        "input_ids": ids,
        "shift_labels": torch.full((1, shape.rows * shape.supervised), 7),
        "kept_positions": kept,
        "image_sizes": torch.tensor([[side * 336 for side in grid_of(shape)]] * shape.rows),
    }
    if case.setting.features:
        width = torch.bfloat16 if case.setting.autocast else getattr(torch, case.setting.dtype)
        batch["image_features"] = torch.zeros(shape.rows * shape.image_tokens, case.config.hidden_size, dtype=width)
    else:
        batch["pixel_values"] = torch.zeros(shape.rows * (shape.crops - 1), 3, 336, 336, dtype=torch.uint8)
    if case.padding_free:
        starts = torch.arange(shape.rows + 1, dtype=torch.int32) * shape.tokens
        batch["input_ids"] = ids.view(1, -1)
        batch["position_ids"] = torch.arange(shape.tokens).repeat(shape.rows).unsqueeze(0)
        batch |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
        batch |= {"max_length_q": shape.tokens, "max_length_k": shape.tokens}
    return batch


def grid_of(shape: Shape) -> tuple[int, int]:
    """The square or nearly square grid of so many local crops."""
    (width, height), *_ = shape.sizes
    return height // 336, width // 336


@contextmanager
def without_values(case: Case) -> Iterator[None]:
    """Lets the model run on tensors without data, where it would look at ids and sizes to check them."""

    read = Phi3VModel.get_image_features

    def features(self: Phi3VModel, pixel_values: torch.Tensor, _: Any) -> torch.Tensor:
        height, width = grid_of(case.shape)
        sizes: Any = SimpleNamespace(tolist=lambda: [(height * 336, width * 336)] * case.shape.rows)
        return read(self, pixel_values, sizes)

    def place(self: Phi3VModel, ids: torch.Tensor, embeds: torch.Tensor, found: torch.Tensor, _: Any) -> torch.Tensor:
        return embeds.masked_scatter((ids == self.config.image_token_id).unsqueeze(-1), found.to(embeds))

    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(mock.patch.object(Phi3VModel, "get_image_features", features))
        stack.enter_context(mock.patch.object(Phi3VModel, "_place", place))
        yield


def reads_alone(case: Case) -> bool:
    """Whether CLIP reads, and keeps nothing of it."""
    return case.setting.lora and not case.setting.features and "vision_tower" not in case.setting.adapt


def measure(case: Case, *, data: bool = True) -> Measured:
    """
    Runs one training step and counts.

    Args:
        case (`Case`): What is run.
        data (`bool`, *optional*, defaults to `True`): Whether with numbers; else nothing is computed, only counted.

    Returns:
        `Measured`: Bytes.
    """
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    with nullcontext() if data else without_values(case):
        model = build(case)
        every = [*model.parameters(), *model.buffers()]
        states = [weight.quant_state for weight in every if isinstance(weight, bitsandbytes.nn.Params4bit)]
        constants = [tensor for state in states for tensor in _tensors(state)]
        live = Live(iter([*every, *constants]))
        peaks: list[int] = []

        def note(*_: Any) -> None:
            peaks.append(live.peak)
            live.peak = live.now

        def at_last_hidden_state(_: Any, __: Any, output: Any) -> None:
            note()
            output.last_hidden_state.register_hook(note)

        inner = model.get_base_model().model if case.setting.lora else model.model
        inner.multi_modal_projector.register_forward_hook(note)
        inner.register_forward_hook(at_last_hidden_state)
        with live:
            batch = batch_of(case)
            with torch.autocast("cpu", torch.bfloat16, enabled=case.setting.autocast):
                output = model(**batch, fused_lm_head=True)
            loss = -output.log_probs.sum()
            kept = live.now
            del output
            loss.backward()
            del loss
        trained = [weight for weight in model.parameters() if weight.grad is not None]
        optimiser = torch.optim.AdamW(trained, fused=data)
        optimiser.step()
        moments = [value for state in optimiser.state.values() for key, value in state.items() if key != "step"]
        return Measured(
            parameters=sum(_bytes(tensor) for tensor in [*model.parameters(), *constants]),
            gradients=sum(_bytes(weight.grad) for weight in trained),
            optimiser=sum(_bytes(tensor) for tensor in moments),
            reads=peaks[0] if reads_alone(case) else 0,
            kept=kept,
            loss=peaks[-1],
            back=live.peak,
        )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(state: Any) -> list[torch.Tensor]:
    own = [state.absmax, state.code, state.offset] + ([] if state.state2 is None else _tensors(state.state2))
    return [tensor for tensor in own if tensor is not None]


def estimated(case: Case) -> Measured:
    """The same figures, by arithmetic."""
    step = Step(case.setting, case.config, weights_of(case.config), case.shape)
    moments = {name: sum(parts.values()) for name, parts in step.moments().items()}
    return Measured(
        parameters=sum(step.weights_stored().values()) + (4 * step.trained if case.setting.lora else 0),
        gradients=4 * step.trained,
        optimiser=step.optimiser(),
        reads=moments["CLIP reads"] if reads_alone(case) else 0,
        kept=step.kept(),
        loss=max(moments["loss"], moments["loss backwards"]),
        back=max(most for name, most in moments.items() if name.endswith(" back")),
    )


def mid_size() -> list[Case]:
    """Models of up to a tenth of a billion weights, in every way of training them."""
    middle = config_of(512, 4, 8, 1536, 6)
    wide = config_of(1024, 3, 16, 2816, 3, 512)
    one = Shape(1, 800, 757, 5, 20, ((672, 672),))
    two = replace(one, rows=2)
    small = Shape(2, 400, 313, 2, 24, ((336, 336),))
    qlora = Setting(bits=4, nested=True, rank=32, cuda=False)
    lora = Setting(rank=32, cuda=False)
    every = replace(lora, adapt=("language_model", "projector", "vision_tower"))
    full = Setting(dtype="float32", lora=False, cuda=False)
    return [
        Case("QLoRA", middle, qlora, one),
        Case("QLoRA, no checkpointing", middle, replace(qlora, checkpointing=False), one),
        Case("QLoRA, 2 of 4 layers checkpointed", middle, replace(qlora, checkpointed=2), one),
        Case("QLoRA, float32", wide, replace(qlora, dtype="float32", autocast=False, dropout=0.0), small),
        Case("LoRA", middle, lora, two),
        Case("LoRA, padding-free", middle, lora, two, True),
        Case("LoRA, CLIP reads 2 crops at once", middle, replace(lora, vision_batch_size=2), two),
        Case("LoRA, cached features", middle, replace(lora, features=True), two),
        Case("LoRA, no checkpointing", middle, replace(lora, checkpointing=False), two),
        Case("LoRA, padding-free, no checkpointing", middle, replace(lora, checkpointing=False), two, True),
        Case("LoRA, no dropout, no checkpointing", wide, replace(lora, checkpointing=False, dropout=0.0), one),
        Case("LoRA on all parts", middle, every, one),
        Case("LoRA on all parts, CLIP reads 2 crops at once", middle, replace(every, vision_batch_size=2), one),
        Case("LoRA, eager attention", wide, replace(lora, attention="eager", checkpointing=False), small),
        Case("full", middle, full, one),
        Case("full, 1 of 4 layers checkpointed", middle, replace(full, checkpointed=1), one),
        Case("full, no checkpointing", middle, replace(full, checkpointing=False), one),
        Case("full, float32", wide, replace(full, autocast=False), small),
    ]


def full_size() -> list[Case]:
    """Phi-3-vision, 16 crops unless said otherwise. No 4-bit: bitsandbytes cannot quantise what has no data."""
    real = config_of(3072, 32, 32, 8192, 24)
    one = Shape(1, 2600, 2509, 17, 40, ((1344, 1344),))
    two = replace(one, rows=2)
    few = Shape(4, 850, 757, 5, 40, ((672, 672),))
    lora = Setting(rank=32, cuda=False)
    full = Setting(dtype="float32", lora=False, cuda=False)
    every = ("language_model", "projector", "vision_tower")
    return [
        Case("LoRA", real, lora, one),
        Case("LoRA, 12 of 32 layers checkpointed", real, replace(lora, checkpointed=12), one),
        Case("LoRA, 31 of 32 layers checkpointed", real, replace(lora, checkpointed=31), one),
        Case("LoRA, 2 rows", real, lora, two),
        Case("LoRA, 2 rows, CLIP reads 8 crops at once", real, replace(lora, vision_batch_size=8), two),
        Case("LoRA, 2 rows, cached features", real, replace(lora, features=True), two),
        Case("LoRA, 4 rows of 4 crops, no checkpointing", real, replace(lora, checkpointing=False), few),
        Case("LoRA, no checkpointing, no dropout", real, replace(lora, checkpointing=False, dropout=0.0), one),
        Case("LoRA on all parts", real, replace(lora, adapt=every), one),
        Case("full", real, full, one),
        Case("full, 4 rows of 4 crops, no checkpointing", real, replace(full, checkpointing=False), few),
    ]


def _compared(counted: int, other: int) -> str:
    if not counted:
        return "–"
    off = f"{other / counted - 1:+.1%}"
    return f"{counted / 1e6:,.1f} / {other / 1e6:,.1f} ({'0%' if off[1:] == '0.0%' else off})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full_size", action="store_true", help="Phi-3-vision itself, on tensors without data")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Python {platform.python_version()}; MB: measured / estimated\n")
    columns = ["weights, adapters", "gradients", "optimiser", "CLIP reads", "kept", "at the loss", "layers back"]
    print(f"| setting | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for case in full_size() if options.full_size else mid_size():
        # Tensors without data have no values to see that nothing is padding, so that sdpa always gets its mask.
        case = replace(case, shape=replace(case.shape, padded=True)) if options.full_size else case
        found, said = measure(case, data=not options.full_size), estimated(case)
        cells = []
        for name, counted in vars(found).items():
            other = getattr(said, name)
            cells.append(_compared(counted, other))
        print(f"| {case.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
