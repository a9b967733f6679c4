"""What vLLM asks of a processor; benchmarks/vllm_parity.py asks vLLM itself."""

import subprocess
import sys
from importlib.metadata import entry_points

import torch
from PIL import Image

from sft_phi3v.vllm_plugin import Phi3VProcessor


def test_pictures_come_padded_to_one_shape_and_the_model_drops_the_padding(tiny_folder, tiny_processor):
    images = [Image.effect_noise((640, 480), 50), Image.effect_noise((100, 100), 50)]
    text = "<|user|>\n<|image_1|>\n<|image_2|>\nWhat?<|end|>\n<|assistant|>\n"
    ours = tiny_processor(text=[text], images=images, num_crops=4, return_tensors="pt")
    processor = Phi3VProcessor.from_pretrained(tiny_folder, num_crops=4)
    found = processor(text=[text], images=images, return_tensors="pt")
    assert torch.equal(found["input_ids"], ours["input_ids"])
    assert found["pixel_values"].shape == (2, 5, 3, 336, 336)
    counts = ((ours["image_sizes"] // 336).prod(dim=1) + 1).tolist()
    rows = zip(found["pixel_values"], ours["pixel_values"].split(counts), counts, strict=True)
    for padded, crops, count in rows:
        assert torch.equal(padded[:count], crops)
        assert not padded[count:].any()
    assert processor(text=["<|user|>\nHi<|end|>\n"], return_tensors="pt").keys() == {"input_ids", "attention_mask"}


def test_it_answers_vllms_questions_in_the_originals_words(tiny_folder):
    processor = Phi3VProcessor.from_pretrained(tiny_folder, num_crops=4)
    assert processor.img_tokens[:2] == ["<|image_1|>", "<|image_2|>"]
    assert processor.calc_num_image_tokens_from_image_size(width=1000, height=600) == 757


def test_vllm_finds_it_and_from_then_on_folders_load_with_it(tiny_folder):
    (found,) = entry_points(group="vllm.general_plugins", name="phi3_v")
    assert found.value == "sft_phi3v.vllm_plugin:register"
    code = f"""
from importlib.metadata import entry_points
(found,) = entry_points(group="vllm.general_plugins", name="phi3_v")
found.load()()
from transformers import AutoConfig, AutoProcessor
print(type(AutoProcessor.from_pretrained({str(tiny_folder)!r})).__module__)
print(AutoConfig.from_pretrained({str(tiny_folder)!r}).rope_parameters["rope_type"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["sft_phi3v.vllm_plugin", "longrope"], done.stderr
