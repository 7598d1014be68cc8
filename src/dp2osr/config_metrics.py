"""The section `iqa` of the configuration: groups of metrics, and the settings of the metrics that have any."""

from typing import Annotated

from pydantic import Field

from dp2osr.strict import Count, Name, Probability, Strict


class NiqeSettings(Strict):
    """NIQE fitted on the HR images of one dataset; block size in pixels."""

    dataset: str
    block_size: Annotated[int, Field(ge=16)]
    sharpness: Probability


class Vqr1Settings(Strict):
    """VisualQuality-R1: its folder or `hub:` name, and how long its answer may get."""

    model: str
    max_tokens: Count


class IqaSettings(Strict):
    """Metric groups (name -> metric names); a group is one kind of scoring job. `test_only`: some groups' names."""

    groups: dict[Name, list[str]]
    test_only: list[str]
    batch_size: Count
    niqe: NiqeSettings
    vqr1: Vqr1Settings
