"""What it costs to compute with 4-bit weights: each linear makes its whole weight anew before it multiplies.

    python benchmarks/dequantise.py        # on the GPU, in bfloat16; where there is none on one CPU thread, in float32

For Phi-3's four linear shapes and some numbers of tokens: bitsandbytes' dequantisation alone, the product with a weight
that is not quantised, and the whole 4-bit linear (forward, with double quantisation). Ratios are to the plain product.
On a CPU it is processor time, which others on the machine hardly change.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn

HIDDEN, INNER = 3072, 8192
SHAPES = {  # in → out
    "qkv_proj": (HIDDEN, 3 * HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_up_proj": (HIDDEN, 2 * INNER),
    "down_proj": (INNER, HIDDEN),
}


def seconds(work: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """The middle one of some times, after one that does not count."""
    clock, times = time.perf_counter if device.type == "cuda" else time.process_time, []
    for _ in range(repeats + 1):
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512, 2560])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_num_threads(1)
    # As in training on a CPU (`model.py`): repacked for inference, a 4-bit weight has no gradient.
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, one thread"
    print(f"{where}, {dtype}, torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}\n")
    print("| linear | tokens | plain product, ms | dequantised alone | 4-bit linear |\n|---|---|---|---|---|")
    torch.manual_seed(0)
    for name, (given, made) in SHAPES.items():
        weight = torch.randn(made, given, dtype=dtype) / given**0.5
        linear = in_4bit(weight.clone()).to(device)
        weight = weight.to(device)
        alone = seconds(
            partial(dequantize_4bit, linear.weight, linear.weight.quant_state), device, repeats=options.repeats
        )
        for tokens in options.tokens:
            # It needs a gradient, as in training: without, bitsandbytes may take a kernel that is for generation.
            inputs = torch.randn(1, tokens, given, dtype=dtype, device=device, requires_grad=True)
            plain = seconds(partial(nn.functional.linear, inputs, weight), device, repeats=options.repeats)
            whole = seconds(partial(linear, inputs), device, repeats=options.repeats)
            cells = f"{1e3 * plain:,.1f} | ×{alone / plain:.2f} | ×{whole / plain:.2f}"
            print(f"| `{name}` {given} → {made} | {tokens:,} | {cells} |", flush=True)


def in_4bit(weight: torch.Tensor) -> nn.Module:
    """A linear with that weight, which is quantised when it is moved to its device."""
    made, given = weight.shape
    linear = bitsandbytes.nn.Linear4bit(
        given, made, bias=False, compute_dtype=weight.dtype, compress_statistics=True, quant_type="nf4"
    )
    linear.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=linear
    )
    return linear


if __name__ == "__main__":
    main()
