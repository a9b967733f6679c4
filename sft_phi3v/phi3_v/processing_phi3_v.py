"""Text and pictures become `input_ids`, `attention_mask`, `pixel_values` and `image_sizes`.

The text is cut at its picture tags `<|image_1|>`, `<|image_2|>`, …; every piece is tokenised on its own and starts
with `<s>`, so that a `<s>` follows each picture (this is what the released models were trained on):

    "<|user|>\\n<|image_1|>\\nWhat?"  →  <s> <|user|> ▁ \\n  <|image|>×757  <s> ▁ \\n W hat ?

A string given to the processor is parsed as the original parses it: whatever looks like a special token or a picture
tag is one. The content of chat messages (`apply_chat_template(tokenize=True)`) is plain text instead: a user who types
`<|end|>`, `<|assistant|>` or `<|image_1|>` neither ends a turn, nor opens one, nor adds a picture.
"""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from PIL.Image import Image
from tokenizers import Encoding, Tokenizer, normalizers
from transformers import BatchFeature, ProcessorMixin, TokenizersBackend

from sft_phi3v.phi3_v.image_processing_phi3_v import Phi3VImageProcessor, as_picture

IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")
# Stands for a "<" that is plain text, until the tokenizer's normaliser turns it back. A Unicode noncharacter, which no
# text interchange may contain; being one character long, it leaves all offsets as they are.
LITERAL = "\ufdd0"
# Keywords that transformers and TRL hand to every processor and that change nothing here.
HARMLESS = {
    f"return_{name}" for name in ("attention_mask", "text_replacement_offsets", "token_type_ids", "mm_token_type_ids")
}


class Phi3VProcessor(ProcessorMixin):
    r"""
    Image processor and tokenizer of Phi-3-Vision in one.

    Args:
        image_processor ([`Phi3VImageProcessor`]): Cuts pictures into crops.
        tokenizer ([`~transformers.TokenizersBackend`]): Phi-3's tokenizer.
        chat_template (`str`, *optional*): Defaults to this package's, which marks what the assistant generates.
    """

    image_processor: Phi3VImageProcessor
    tokenizer: TokenizersBackend

    def __init__(
        self, image_processor: Phi3VImageProcessor, tokenizer: TokenizersBackend, chat_template: str | None = None
    ):
        if chat_template is None:
            chat_template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = "<|image|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.bos_token_id = tokenizer.bos_token_id

    @classmethod
    def _load_tokenizer_from_pretrained(
        cls, sub_processor_type: str, pretrained_model_name_or_path: str, subfolder: str = "", **kwargs: Any
    ) -> TokenizersBackend:
        # AutoTokenizer chooses the class by what else lies in the folder, and the class changes the ids.
        # tokenizer.json says everything, and this class alone takes it as it is.
        return TokenizersBackend.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        # The published chat template takes no pictures and marks nothing; one that marks its turns was saved by us or
        # written by the user, and stays.
        if "endgeneration" not in (processor_dict.get("chat_template") or ""):
            processor_dict["chat_template"] = None
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    def save_pretrained(self, save_directory: str, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """
        Saves everything; `preprocessor_config.json` too, in which other loaders look for `num_crops`.

        What these would stumble over is put right: names of remote code that is not in the folder, and a tokenizer
        configuration that transformers 4 cannot read.
        """
        self.image_processor.save_pretrained(save_directory)
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        for name in ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
            path = Path(save_directory, name)
            settings = _without(json.loads(path.read_text(encoding="utf-8")), "auto_map")
            if name == "preprocessor_config.json":
                settings["num_img_tokens"] = self.image_processor.num_img_tokens
            if name == "tokenizer_config.json":
                settings = _for_every_version(settings)
            path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        return files

    @cached_property
    def _tokenizer_with_literals(self) -> Tokenizer:
        """The tokenizer, with one more step: after the special tokens were found, LITERAL becomes "<" again."""
        tokenizer = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        steps = [tokenizer.normalizer] if tokenizer.normalizer is not None else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(LITERAL, "<")])
        return tokenizer

    @cached_property
    def _added(self) -> dict[int, int]:
        """Ids of the special tokens, and how many characters long they are."""
        return {token: len(added.content) for token, added in self.tokenizer.added_tokens_decoder.items()}

    def __call__(
        self,
        images: Image | list[Image] | list[list[Image]] | None = None,
        text: str | list[str] | None = None,
        videos: None = None,
        audio: None = None,
        *,
        num_crops: int | None = None,
        padding: bool | str = False,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        return_offsets_mapping: bool = False,
        return_pixel_values: bool = True,
        do_normalize: bool | None = None,
        expand_image_tokens: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            images (`PIL.Image.Image`, `list` or nested `list`, *optional*):
                Pictures: one list per text, or a flat list for all texts, in the order of the tags' numbers. Paths,
                URLs and arrays `(height, width, 3)` of bytes do as well.
            text (`str` or `list[str]`): Texts, with `<|image_1|>`-style tags where pictures go. Tags may come in any
                order and may repeat; each text counts from 1.
            num_crops (`int`, *optional*): Overrides the image processor's.
            padding, padding_side, pad_to_multiple_of, max_length: As for any tokenizer. Padding takes place only here.
            truncation (`bool`, *optional*): Applies to texts without pictures only: cutting through a picture would
                break it, and the original ignores it too.
            add_special_tokens (`bool`, *optional*, defaults to `True`):
                Puts `<s>` in front. A text with pictures always has it, as the released models expect.
            return_tensors (`str`, *optional*): "pt" for tensors; lists otherwise (pixels are tensors in any case).
            return_pixel_values (`bool`, *optional*, defaults to `True`):
                `False` gives the ids alone, from the sizes of the pictures: nothing is decoded.
            do_normalize (`bool`, *optional*):
                `False` gives pixels as bytes, a fifth of the memory, which the model normalises on its device.
            expand_image_tokens (`bool`, *optional*, defaults to `True`):
                `False` gives one image token per picture, for who only counts: thousands of equal ids say no more.

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask`, `(batch, length)`; with pictures also `pixel_values`,
            float32 `(crops, 3, 336, 336)`, or as bytes the local ones of them, and `image_sizes`, int64
            `(pictures, 2)`, in the order of appearance.

        Raises:
            ValueError: If tags and pictures do not match one to one.
        """
        if unknown := kwargs.keys() - HARMLESS:
            raise TypeError(f"Phi3VProcessor does not know {', '.join(sorted(unknown))}.")
        if videos is not None or audio is not None:
            raise ValueError("Phi-3-Vision reads text and pictures; videos and audio cannot be given.")
        if text is None:
            if images is None:
                raise ValueError("Give text, pictures, or both.")
            return self.image_processor(_flatten(images), **_given(num_crops=num_crops), return_tensors=return_tensors)
        texts = [text] if isinstance(text, str) else list(text)
        pictures = _pictures_per_text(texts, images)
        encoded = [
            self._encode(one, row, num_crops, add_special_tokens, expand_image_tokens)
            for one, row in zip(texts, pictures, strict=True)
        ]
        if truncation and max_length is not None:
            for row, ids in zip(pictures, encoded, strict=True):
                if not row:
                    ids["input_ids"] = ids["input_ids"][:max_length]
                    ids["offset_mapping"] = ids["offset_mapping"][:max_length]
        batch = self._pad(encoded, padding, padding_side, pad_to_multiple_of, max_length, return_offsets_mapping)
        if return_pixel_values and any(pictures):
            batch |= self._pixels(pictures, [row["order"] for row in encoded], num_crops, do_normalize)
        # apply_chat_template() asks for offsets to mark what is supervised, and goes through them row by row.
        if isinstance(text, str) and return_tensors is None and not pictures[0] and not return_offsets_mapping:
            batch = {key: value[0] for key, value in batch.items()}  # one text in, one row out, as tokenizers do
        return BatchFeature(batch, tensor_type=return_tensors, skip_tensor_conversion=["offset_mapping"])

    def _encode(
        self, text: str, images: list[Image], num_crops: int | None, add_special_tokens: bool, expand: bool
    ) -> dict[str, list[Any]]:
        """Ids of one text, with their character offsets; `order` lists the pictures as they appear, counted from 0."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        order: list[int] = []

        def add_text(start: int, end: int) -> None:
            # <s> and image tokens stand for no character: at (0, 0) they belong to no generation span.
            if add_special_tokens or images:
                ids.append(self.bos_token_id)
                offsets.append((0, 0))
            encoding = self._tokenizer_with_literals.encode(text[start:end], add_special_tokens=False)
            ids.extend(encoding.ids)
            offsets.extend(self._offsets(encoding, start))

        start = 0
        for tag in IMAGE_TAG.finditer(text) if images else ():
            add_text(start, tag.start())
            start = tag.end()
            order.append(int(tag[1]) - 1)
            image = images[order[-1]]
            count = self.image_processor.num_image_tokens(image.width, image.height, num_crops) if expand else 1
            ids += [self.image_token_id] * count
            offsets += [(0, 0)] * count
        add_text(start, len(text))
        return {"input_ids": ids, "offset_mapping": offsets, "order": order}

    def _offsets(self, encoding: Encoding, start: int) -> list[tuple[int, int]]:
        """Offsets in the whole text. Some special tokens swallow the whitespace behind them: theirs end before it."""
        added = self._added
        return [
            (start + first, start + (min(last, first + added[token]) if token in added else last))
            for token, (first, last) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def _pad(
        self,
        encoded: list[dict[str, list]],
        padding: bool | str,
        padding_side: str | None,
        pad_to_multiple_of: int | None,
        max_length: int | None,
        return_offsets_mapping: bool,
    ) -> dict[str, Any]:
        padded = self.tokenizer.pad(
            {"input_ids": [row["input_ids"] for row in encoded]},
            padding=padding,
            padding_side=padding_side,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=True,
            verbose=False,
        )
        batch = {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}
        if return_offsets_mapping:
            left = (padding_side or self.tokenizer.padding_side) == "left"
            batch["offset_mapping"] = []
            for row, ids in zip(encoded, padded["input_ids"], strict=True):
                filler = [(0, 0)] * (len(ids) - len(row["input_ids"]))
                batch["offset_mapping"].append(
                    filler + row["offset_mapping"] if left else row["offset_mapping"] + filler
                )
        return batch

    def _pixels(
        self, pictures: list[list[Image]], orders: list[list[int]], num_crops: int | None, do_normalize: bool | None
    ) -> dict[str, Any]:
        """Crops and sizes of all rows, pictures in the order of appearance; one that is named twice comes twice."""
        shown = [row[picture] for row, order in zip(pictures, orders, strict=True) for picture in order]
        found = self.image_processor(shown, **_given(num_crops=num_crops, do_normalize=do_normalize))
        return {"pixel_values": found["pixel_values"], "image_sizes": found["image_sizes"]}

    def apply_chat_template(self, conversation: Any, *args: Any, tokenize: bool = False, **kwargs: Any) -> Any:
        """
        As [`~transformers.ProcessorMixin.apply_chat_template`]; with `tokenize=True` the content of the messages is
        plain text, whatever it looks like, and only `{"type": "image"}` parts are pictures.
        """
        if tokenize:
            conversation = _as_literal(conversation)
        return super().apply_chat_template(conversation, *args, tokenize=tokenize, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """
        Args:
            pretrained_model_name_or_path (`str`): Folder or Hub id. Microsoft's own folders are read as they are.
            num_crops (`int`, *optional*): Overrides the folder's number of crops.
        """
        num_crops = kwargs.pop("num_crops", None)
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if num_crops is not None:
            processor.image_processor.num_crops = num_crops
        return processor


def _without(value: Any, key: str) -> Any:
    """A JSON value without that key, at any depth."""
    if isinstance(value, list):
        return [_without(entry, key) for entry in value]
    if not isinstance(value, dict):
        return value
    return {name: _without(entry, key) for name, entry in value.items() if name != key}


def _for_every_version(settings: dict[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json` in words that transformers 4 and 5 both know, and of which they make the same ids."""
    kept = {key: value for key, value in settings.items() if key not in ("backend", "is_local", "local_files_only")}
    special = kept.pop("extra_special_tokens", None)
    if isinstance(special, list):
        kept["additional_special_tokens"] = list(dict.fromkeys(special))
    elif special:
        kept["extra_special_tokens"] = special
    return kept | {"tokenizer_class": "PreTrainedTokenizerFast"}


def _as_literal(value: Any) -> Any:
    """Replaces "<" by LITERAL in the content of all messages; roles, pictures and everything else stay as they are."""
    if isinstance(value, list | tuple):
        return [_as_literal(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    literal = dict(value)
    if isinstance(value.get("content"), str):
        literal["content"] = value["content"].replace("<", LITERAL)
    elif value.get("content") is not None:
        literal["content"] = [
            {**part, "text": part["text"].replace("<", LITERAL)} if part.get("type") == "text" else part
            for part in value["content"]
        ]
    return literal


def _given(**kwargs: Any) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if value is not None}


def _flatten(images: Any) -> list[Image]:
    if not isinstance(images, list | tuple):
        return [as_picture(images)]
    return [picture for entry in images for picture in _flatten(entry)]


def _pictures_per_text(texts: list[str], images: Any) -> list[list[Image]]:
    """Deals the pictures out to the texts and checks that each text's tags number them from 1 without a gap."""
    numbers = [sorted({int(number) for number in IMAGE_TAG.findall(text)}) for text in texts]
    if isinstance(images, list | tuple) and any(isinstance(entry, list | tuple) for entry in images):
        if len(images) != len(texts):
            raise ValueError(f"Got pictures for {len(images)} texts, but {len(texts)} texts.")
        pictures = [_flatten(entry or []) for entry in images]
    elif len(texts) == 1:
        pictures = [_flatten([] if images is None else images)]
    else:
        flat = _flatten([] if images is None else images)
        if len(flat) != sum(len(found) for found in numbers):
            raise ValueError(f"The texts have {sum(len(found) for found in numbers)} pictures, but got {len(flat)}.")
        ends = [sum(len(found) for found in numbers[: row + 1]) for row in range(len(texts))]
        pictures = [flat[end - len(found) : end] for end, found in zip(ends, numbers, strict=True)]
    for row, (found, given) in enumerate(zip(numbers, pictures, strict=True)):
        if found != list(range(1, len(given) + 1)):
            raise ValueError(
                f"Text {row} has the picture tags {[f'<|image_{number}|>' for number in found]}, but got {len(given)} "
                "pictures: the tags must number the pictures from 1 without a gap. (To use such a tag as plain text, "
                "pass it as the content of a chat message.)"
            )
    return pictures


__all__ = ["Phi3VProcessor"]
