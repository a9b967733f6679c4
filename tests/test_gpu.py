"""What only a GPU can show: `pytest -m gpu`. Not run where these lines were written, for want of one."""

import json

import pytest
import torch

from sft_phi3v import run
from sft_phi3v.phi3_v import SDPA_BY_ROW, Phi3VForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_gpu_computes_what_the_cpu_computes(tiny_folder, tiny_processor):
    from PIL import Image

    image = Image.effect_noise((500, 300), 60)
    inputs = tiny_processor(
        images=image, text="<|user|>\n<|image_1|>\nWhat?<|end|>\n<|assistant|>\n", return_tensors="pt"
    )
    model = Phi3VForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        found = model.cuda()(**inputs.to("cuda")).logits.cpu()
    assert torch.allclose(found, expected, atol=1e-3)


def test_bytes_and_rows_behind_each_other_are_what_the_cpu_makes_of_padded_pixels(tiny_folder, tiny_processor):
    from PIL import Image

    from sft_phi3v.collator import Collator, only_supervised

    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Noise, and nothing else."}]
    sizes = [(500, 300), (90, 700)]
    rows = [{"images": [Image.effect_noise(size, 60)], "messages": turns, "row": row} for row, size in enumerate(sizes)]
    model = Phi3VForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(**Collator(tiny_processor)(rows)).loss
        model = Phi3VForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, attn_implementation=SDPA_BY_ROW)
        batch = Collator(tiny_processor, padding_free=True)(rows)
        batch = {key: one.cuda() if torch.is_tensor(one) else one for key, one in batch.items()}
        batch = only_supervised(batch)
        logits = model.cuda().eval()(**batch).logits[0]
        found = torch.nn.functional.cross_entropy(logits, batch["shift_labels"][0])
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_run_with_every_lever_trains(write_recipe, tmp_path):
    keys = {"use_cpu": None, "bf16": True, "dtype": "bfloat16", "activation_checkpointing": True, "logging_steps": 1}
    keys |= {"padding_free": True, "max_tokens_per_batch": 2000, "per_device_train_batch_size": None}
    keys |= {"checkpointed_layers": "auto", "feature_cache": str(tmp_path / "features")}
    run.main([write_recipe(**keys, max_steps=20)])
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_four_bit_qlora_in_bfloat16_trains(write_recipe, tmp_path):
    keys = {"use_cpu": None, "bf16": True, "dtype": "bfloat16", "activation_checkpointing": True, "logging_steps": 1}
    run.main([write_recipe(**keys, max_steps=20)])
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
