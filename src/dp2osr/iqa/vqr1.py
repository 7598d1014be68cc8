"""VisualQuality-R1 (Wu et al. 2025) as a metric: a Qwen2.5-VL, tuned to rate images, that says how it came to a rating.

It runs through transformers' own classes, from a folder, in bfloat16 as published, one image at a time and always with
the likeliest next token, so that a score depends on nothing but the image. Its authors sample from the 50 likeliest;
what else the folder's generation_config.json says, such as a penalty on repetition, stays in force. The answer is read
strictly: whatever is no number from 1.00 to 5.00 in the answer tag is no score.
"""

import logging
import re
from typing import Any

import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from dp2osr.config_metrics import Vqr1Settings
from dp2osr.errors import UserError
from dp2osr.models import folders
from dp2osr.shards import to_uint8
from dp2osr.weights import locate

LOG = logging.getLogger("iqa")
# The prompt of the paper's Table 1, word for word: the model was trained on it.
PROMPT = (
    "You are doing the image quality assessment task. Here is the question: What is your overall rating on the quality "
    "of this picture? The rating should be a float between 1 and 5, rounded to two decimal places, with 1 representing "
    "very poor quality and 5 representing excellent quality. First output the thinking process in <think> </think> "
    "tags and then output the final answer with only one score in <answer> </answer> tags."
)
_ANSWER = re.compile(r"\s*<answer>\s*([1-5]\.[0-9]{2})\s*</answer>\s*")
SHOWN = 120  # characters of an answer that are logged where it holds no score


def parse_score(text: str) -> float:
    """Return the score in [1, 5] of an answer; NaN unless, after the thinking, there is it alone, with two decimals."""
    match = _ANSWER.fullmatch(text.rpartition("</think>")[2])
    score = float(match[1]) if match else float("nan")
    return score if score <= 5 else float("nan")


class VisualQuality(nn.Module):
    """The model with what prepares its inputs; called as pyiqa's metrics are."""

    def __init__(self, settings: Vqr1Settings, *, device: torch.device) -> None:
        super().__init__()
        self.folder = locate(settings.model)
        if not self.folder.is_dir():
            raise UserError(f"metric 'vqr1': model {self.folder}: no such folder (iqa.vqr1.model)")
        what = "metric 'vqr1': model"
        self.processor: Any = folders.load(Qwen2_5_VLProcessor, self.folder, what=what)
        options = {"dtype": torch.bfloat16, "use_safetensors": True}
        self.model: Any = folders.load(Qwen2_5_VLForConditionalGeneration, self.folder, what=what, **options)
        if not self.processor.chat_template:
            raise UserError(f"metric 'vqr1': model {self.folder}: no chat template, wanted Qwen2.5-VL's files")
        self.model.to(device).requires_grad_(False).eval()
        self.model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
        self.max_tokens = settings.max_tokens

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the scores (B,) float64 of images (B, 3, H, W) RGB in [0, 1], NaN where an answer holds none."""
        scores = []
        for image in images:
            text = self.answer(image)
            scores.append(parse_score(text))
            if scores[-1] != scores[-1]:
                LOG.warning("vqr1: no score in the answer, which ends: %r", text[-SHOWN:])
        return torch.tensor(scores, dtype=torch.float64)

    @torch.no_grad()
    def answer(self, image: torch.Tensor) -> str:
        """Return what the model says of an image (3, H, W) RGB in [0, 1]."""
        content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
        turns = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True, add_vision_id=True)
        inputs = self.processor(images=[to_uint8(image)], text=[text], return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)  # of dtypes, real numbers alone change theirs
        found = self.model.generate(**inputs, num_beams=1, max_new_tokens=self.max_tokens)
        said = found[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.tokenizer.decode(said, skip_special_tokens=True))
