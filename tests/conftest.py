"""Fixtures that several test folders share: Microsoft's public data files, and a small stand-in for its tokenizer."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

REPOSITORY = Path(__file__).resolve().parents[1]
REFERENCE = REPOSITORY.parent / "shared" / "reference"
TINY_CONFIG = REPOSITORY / "tests" / "data" / "goldens" / "model" / "checkpoints" / "tiny_mha" / "config.json"
MICROSOFT_VERSIONS = ("phi3_vision", "phi3_5_vision")


def microsoft_folder(version: str) -> Path:
    """The folder with the config and tokenizer files of one released model; skips the test where it is absent."""
    folder = REFERENCE / version
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"Microsoft's files of {version} are not in the repository: {folder} does not exist")
    return folder


@pytest.fixture(scope="session", params=MICROSOFT_VERSIONS)
def reference_folder(request):
    return microsoft_folder(request.param)


SPACE = "\u2581"  # Llama's visible space
MERGED_WORDS = ("Price", "scarf", "What", "this", "coat", "blue", "red", "the", "is")


def special_tokens() -> dict[int, AddedToken]:
    """The 48 added tokens of both released models, with the flag that decides about whitespace on their right."""

    def token(content: str, *, rstrip: bool = False, special: bool = True) -> AddedToken:
        return AddedToken(content, rstrip=rstrip, lstrip=False, normalized=False, special=special)

    tokens = {0: token("<unk>"), 1: token("<s>"), 2: token("</s>", rstrip=True, special=False)}
    tokens[32000] = token("<|endoftext|>")
    tokens[32001] = token("<|assistant|>", rstrip=True)
    tokens[32006] = token("<|system|>")
    tokens[32007] = token("<|end|>")
    tokens[32010] = token("<|user|>")
    tokens[32044] = token("<|image|>", rstrip=True)
    placeholders = [id for id in range(32002, 32044) if id not in tokens]
    tokens |= {id: token(f"<|placeholder{k}|>", rstrip=True) for k, id in enumerate(placeholders, start=1)}
    return tokens


def small_tokenizer() -> Tokenizer:
    """Byte-fallback BPE that behaves like the released tokenizer, with the same ids for everything structural.

    Text costs one token per character, apart from `MERGED_WORDS`, whose first piece differs after a space: enough to
    notice a lost or doubled word-start mark. The other ids below 32000 are filler.
    """
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary[SPACE] = 29871
    characters = [chr(code) for code in range(33, 127)]
    merges = [(SPACE, character) for character in characters]  # first, so that a space sticks to the word it opens
    for word in MERGED_WORDS:
        for start in (SPACE + word[0], word[0]):
            merges += [(start + word[1:end], word[end]) for end in range(1, len(word))]
    pieces = characters + [left + right for left, right in merges]
    for id, piece in enumerate(dict.fromkeys(pieces), start=1000):
        vocabulary[piece] = id
    used = set(vocabulary.values())
    vocabulary |= {f"filler{id}": id for id in range(32000) if id not in used}

    model = BPE(vocabulary, list(dict.fromkeys(merges)), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for id, token in sorted(special_tokens().items()):
        tokenizer.add_tokens([token])
        assert tokenizer.token_to_id(token.content) == id
    return tokenizer


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """A model folder in the form of Microsoft's (flat config, `LlamaTokenizer` declared), with the small tokenizer."""
    folder = tmp_path_factory.mktemp("small_phi3_v")
    small_tokenizer().save(str(folder / "tokenizer.json"))
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {str(id): {flag: getattr(token, flag) for flag in flags} for id, token in special_tokens().items()}
    tokenizer_config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|system|>", "<|end|>", "<|user|>", "<|end|>"],
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "legacy": False,
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    preprocessor_config = {
        "num_crops": 4,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Phi3VImageProcessor",
        "processor_class": "Phi3VProcessor",
        "num_img_tokens": 144,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_config))
    (folder / "config.json").write_text(TINY_CONFIG.read_text())
    return folder
