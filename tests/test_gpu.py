"""What only a GPU can show: `pytest -m gpu`. Not run where these lines were written, for want of one."""

import json

import pytest
import torch

from sft_phi3v import run
from sft_phi3v.phi3_v import Phi3VForCausalLM

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


def test_four_bit_qlora_in_bfloat16_trains(write_recipe, tmp_path):
    keys = {"use_cpu": None, "bf16": True, "dtype": "bfloat16", "activation_checkpointing": True, "logging_steps": 1}
    run.main([write_recipe(**keys, max_steps=20)])
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
