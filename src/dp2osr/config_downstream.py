"""The `downstream` section: benchmarks of other vision tasks that restored photographs are put to."""

from typing import Annotated, Literal

from pydantic import Field

from dp2osr.strict import Count, Probability, Strict

EXTRA = {"detection": "pycocotools", "segmentation": "torchmetrics"}  # packages of the extra `downstream`
SOURCES = ("hr", "lr")  # the HR photograph, and the LR one enlarged by bicubic interpolation


class DownstreamSettings(Strict):
    """One benchmark: photographs with annotations, how LR is made of them, and the model that sees the restorations."""

    kind: Literal["detection", "segmentation", "text"]
    images: str
    annotations: str
    lr: str
    dataset: str
    model: str
    architecture: str
    num_seeds: Count
    tile: Annotated[int, Field(ge=0)]
    max_images: Annotated[int, Field(ge=0)]
    max_pixels: Count
    max_rejected_share: Probability
    num_shards: Count
    bootstrap: Count
