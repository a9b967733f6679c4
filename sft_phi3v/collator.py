"""Examples become one batch with labels, padded or without padding: the ONE place that decides what is supervised.

The rule: the words of every assistant turn, and the `<|end|>` that stops it. Nothing else: no system or user word, no
picture, no `<s>`, no header of a turn, no padding.

    ids     <s> <|user|> \\n <|image|> <s> \\n What ? <|end|> \\n <|assistant|> A    hat  <|end|> \\n  <|endoftext|>
    labels   .     .     .      .      .   .   .   .    .     .       .       A    hat  <|end|>  .        .

The whole conversation is tokenised once, and the chat template's generation markers say which characters the assistant
wrote. Ids are never searched (user text may look like a header), and the padding id never decides anything (it is also
an end-of-text token).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from trl.data_utils import prepare_multimodal_messages

from sft_phi3v.phi3_v import Phi3VProcessor

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of one example: all of them, those of pictures, and the supervised ones; and its pictures' sizes."""

    tokens: int
    image_tokens: int
    supervised: int
    sizes: tuple[tuple[int, int], ...] = ()  # (width, height) of each picture, in pixels


@dataclass(frozen=True)
class Collator:
    """
    Makes batches for training.

    Args:
        processor ([`Phi3VProcessor`]): Tokenizer and image processor.
        max_length (`int`, *optional*): Longest row allowed, in tokens; a longer one is an error, never cut.
        pad_to_multiple_of (`int`, *optional*): Rounds the padded length up.
        padding_free (`bool`, *optional*): Whether rows lie behind each other in a batch of one ([`flattened`]).
        features (`Callable`, *optional*):
            Gives the `image_features` and `image_sizes` of examples, in place of pixels; their pictures are not decoded
            ([`~sft_phi3v.features.Features`]).
    """

    processor: Phi3VProcessor
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    padding_free: bool = False
    features: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]] | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Args:
            examples (`list[dict]`): `{"images": [PIL.Image], "messages": [...], "row": int}` each, in TRL's
                conversational format: any number of turns and of pictures, also none. One that only fills up the last
                batch says `"repeated": True`, and nothing in it is supervised.

        Returns:
            `dict`: `input_ids`, `attention_mask` and `labels`, int64 `(batch, length)`, or what
            [`flattened`] makes of them; where any row has a picture also `pixel_values`, uint8 `(local crops, 3, 336,
            336)`, which the model normalises, and `image_sizes`, `(pictures, 2)`; with `features` these in place of
            `pixel_values`.

        Raises:
            ValueError: If a row is longer than `max_length`, has nothing to learn, or its picture cannot be read.
        """
        pixels = {"do_normalize": False, "return_pixel_values": self.features is None}
        batch = self._tokenize(examples, padding=True, return_tensors="pt", **pixels)
        if self.features is not None:
            batch |= self.features(examples)
        supervised = batch.pop("assistant_masks").bool()
        labels = batch["input_ids"].masked_fill(~supervised, IGNORED)
        for example, mask, found in zip(examples, batch["attention_mask"], supervised, strict=True):
            self._check(example, int(mask.sum()), int(found.sum()))
        for row, example in zip(labels, examples, strict=True):
            if example.get("repeated"):
                row[:] = IGNORED
        batch["labels"] = labels
        return flattened(batch) if self.padding_free else batch

    def lengths(self, example: dict[str, Any]) -> Lengths:
        """
        Counts the tokens of an example from the sizes of its pictures, without decoding them.

        Args:
            example (`dict`): As for `__call__`.

        Returns:
            [`Lengths`]: Numbers of tokens.

        Raises:
            ValueError: If it cannot be turned into a batch.
        """
        return self.all_lengths([example])[0]

    def all_lengths(self, examples: list[dict[str, Any]]) -> list[Lengths]:
        """As [`Collator.lengths`], for many examples: many at once take a third less time each."""
        try:
            batch = self._tokenize(examples, return_pixel_values=False, expand_image_tokens=False)
        except ValueError:
            if len(examples) == 1:
                raise
            return [self.lengths(example) for example in examples]  # now the error names the row
        found = []
        for example, ids, mask in zip(examples, batch["input_ids"], batch["assistant_masks"], strict=True):
            sizes = tuple(image.size for image in example.get("images") or [])
            try:
                image_tokens = sum(self.processor.image_processor.num_image_tokens(*size) for size in sizes)
            except ValueError as error:
                raise ValueError(f"Row {example.get('row')}: {error}") from None
            tokens = len(ids) - len(sizes) + image_tokens  # in these ids each picture is one token
            found.append(Lengths(tokens, image_tokens, supervised=sum(mask), sizes=sizes))
        return found

    def supervised(self, example: dict[str, Any]) -> tuple[list[int], list[bool]]:
        """The ids of one example, and which of them are supervised. Of its pictures only the sizes are asked for."""
        row = self._tokenize([example], return_pixel_values=False)
        return row["input_ids"][0], [bool(one) for one in row["assistant_masks"][0]]

    def fits(self, lengths: Lengths) -> bool:
        """Whether a row of these lengths may be trained on."""
        return self.max_length is None or lengths.tokens <= self.max_length

    def _check(self, example: dict[str, Any], tokens: int, supervised: int) -> None:
        if self.max_length is not None and tokens > self.max_length:
            raise ValueError(
                f"Row {example.get('row')} has {tokens} tokens, more than max_length {self.max_length}. A row is "
                "never cut: raise max_length, lower num_crops, or set `overlong: drop`."
            )
        if supervised == 0:
            raise ValueError(f"Row {example.get('row')} has nothing to learn: no assistant turn in its messages.")

    def _tokenize(self, examples: list[dict[str, Any]], **kwargs: Any) -> dict[str, Any]:
        return_tensors = kwargs.pop("return_tensors", "auto")
        try:
            conversations = [
                prepare_multimodal_messages(example["messages"], example.get("images") or []) for example in examples
            ]
            batch = self.processor.apply_chat_template(
                conversations,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                return_tensors=return_tensors,
                processor_kwargs={
                    "padding_side": "right",
                    "pad_to_multiple_of": self.pad_to_multiple_of,
                    **kwargs,
                },
            )
        except (OSError, ValueError) as error:
            rows = [example.get("row") for example in examples]
            raise ValueError(f"Rows {rows} cannot be turned into a batch: {error}") from error
        return dict(batch)


def flattened(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """
    Rows behind each other, without padding.

    Args:
        batch (`dict[str, torch.Tensor]`): `input_ids`, `attention_mask` and `labels`, `(batch, length)`; and others.

    Returns:
        `dict`: `input_ids`, `labels` and `position_ids`, int64 `(1, tokens)`; positions start again in each row, none
        of which is predicted from the one before. What TRL's own padding-free batches hold for the attention:
        `cu_seq_lens_q` and `cu_seq_lens_k`, int32 `(rows + 1,)`, and `max_length_q` and `max_length_k`, `int`.
    """
    mask = batch.pop("attention_mask").bool()
    lengths = mask.sum(dim=1)
    starts = torch.nn.functional.pad(lengths.cumsum(dim=0), (1, 0)).int()
    batch["labels"][:, 0] = IGNORED
    flat = {key: batch.pop(key)[mask].unsqueeze(0) for key in ("input_ids", "labels")}
    flat["position_ids"] = torch.cat([torch.arange(length) for length in lengths.tolist()]).unsqueeze(0)
    longest = int(lengths.max())
    bounds = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    return {**flat, **bounds, **batch}


def row_numbers(batch: dict[str, Any]) -> torch.Tensor:
    """Which row each position of a batch belongs to: `(batch, length)`, or `(1, tokens)` of a flattened one."""
    labels = batch["labels"]
    if "cu_seq_lens_q" not in batch:
        return torch.arange(len(labels), device=labels.device).unsqueeze(1).expand_as(labels)
    lengths = batch["cu_seq_lens_q"].diff()
    return torch.arange(len(lengths), device=labels.device).repeat_interleave(lengths).unsqueeze(0)


def only_supervised(batch: dict[str, Any]) -> dict[str, Any]:
    """
    A batch of which the model gives only what is compared with a label: a few of thousands of positions.

    Args:
        batch (`dict`): Of [`Collator`].

    Returns:
        `dict`: The batch without `labels`; `shift_labels`, `(1, kept)`, the ids that are to be predicted; and
        `kept_positions`, `(kept,)`, the positions in the flattened batch that they are predicted from. Where nothing is
        supervised it is one position without a label, so that a loss of zero still has gradients.
    """
    others = {key: value for key, value in batch.items() if key != "labels"}
    following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
    kept = torch.nonzero(following != IGNORED).flatten()
    if not len(kept):
        kept = kept.new_zeros(1)
    return {**others, "shift_labels": following[kept].unsqueeze(0), "kept_positions": kept}
