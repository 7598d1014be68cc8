"""Captions of LR images by any image-to-text model of transformers that lies in a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from dp2osr.errors import UserError
from dp2osr.models import folders
from dp2osr.shards import to_uint8


class Captioner:
    """An image-to-text model with what prepares its inputs.

    question: the text that the model is given with each image, in its chat template where it has one; may be empty.
    max_tokens: length of a caption at most.
    """

    def __init__(self, folder: Path, *, question: str, max_tokens: int, device: torch.device) -> None:
        if not folder.is_dir():
            raise UserError(f"caption model {folder}: no such folder")
        self.model = _load(AutoModelForImageTextToText, folder).to(device).requires_grad_(False).eval()
        self.processor = _load(AutoProcessor, folder)
        self.images, self.tokenizer = self.processor, getattr(self.processor, "tokenizer", self.processor)
        if not hasattr(self.processor, "image_processor"):  # an encoder and a decoder that were put together
            self.processor = None
            self.images, self.tokenizer = _load(AutoImageProcessor, folder), _load(AutoTokenizer, folder)
        self.text = self._text(question)
        self.max_tokens, self.device = max_tokens, device

    def _text(self, question: str) -> str:
        """Return what is given with an image: the question, in the model's chat template where it has one."""
        if not getattr(self.processor, "chat_template", None):
            return question
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(turns, add_generation_prompt=True))

    def _inputs(self, images: Sequence[torch.Tensor]) -> Any:
        pixels = [to_uint8(image) for image in images]
        if self.text and self.processor is not None:
            self.tokenizer.padding_side = "left"
            texts = [self.text] * len(pixels)
            return self.processor(images=pixels, text=texts, padding=True, return_tensors="pt")
        if self.text:
            raise UserError("config: caption.question: this model takes none; wanted an empty one")
        return self.images(images=pixels, return_tensors="pt")

    @torch.no_grad()
    def describe(self, images: Sequence[torch.Tensor]) -> list[str]:
        """Return a caption in one line of each LR image (3, H, W) RGB in [0, 1]: at each word the likeliest one."""
        inputs = self._inputs(images).to(self.device, self.model.dtype)  # of dtypes, real numbers alone change theirs
        found = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=self.max_tokens)
        asked = inputs.get("input_ids")
        if asked is not None and torch.equal(found[:, : asked.shape[1]], asked):
            found = found[:, asked.shape[1] :]  # a decoder repeats what it was asked before it answers
        return [" ".join(text.split()) for text in self.tokenizer.batch_decode(found, skip_special_tokens=True)]


def _load(kind: Any, folder: Path) -> Any:
    return folders.load(kind, folder, what="caption model")
