"""Small benchmarks of other vision tasks in the layout in which the true ones are published, and models that see them.

The photographs are coloured rectangles on grey. The transformers models are random and tiny, in their true layout.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (96, 72)  # width, height of a photograph, px
RED, BLUE = (220, 40, 40), (40, 60, 220)


Rectangle = tuple[int, int, int, int, tuple[int, int, int]]  # x, y, width, height, px; colour


def mark(number: int) -> Rectangle:
    """Return what sets a photograph apart from the others of its set."""
    return 0, 68, 4 * number + 4, 4, BLUE


def photo(path: Path, *rectangles: Rectangle) -> Path:
    """Write a grey photograph with rectangles on it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((SIZE[1], SIZE[0], 3), 128, np.uint8)
    for x, y, width, height, colour in rectangles:
        pixels[y : y + height, x : x + width] = colour
    Image.fromarray(pixels).save(path)
    return path


def coco_categories() -> list[dict[str, Any]]:
    """Return COCO's 80 categories with their ids, which have gaps."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights as Weights

    names = Weights.COCO_V1.meta["categories"]
    return [{"id": number, "name": name} for number, name in enumerate(names) if name not in ("__background__", "N/A")]


def coco(folder: Path, *, count: int = 3) -> tuple[Path, Path]:
    """Write a COCO set of `count` photographs with a person and a tv each; returns images and annotations."""
    images, annotations = [], []
    for number in range(count):
        name = f"{number + 1:012d}"
        photo(folder / "val2017" / f"{name}.png", mark(number), (8, 8, 40, 32, RED), (56, 40, 24, 24, BLUE))
        images.append({"id": 100 + number, "file_name": f"{name}.png", "width": SIZE[0], "height": SIZE[1]})
        for category, box in ((1, [8, 8, 40, 32]), (72, [56, 40, 24, 24])):
            annotation = {"image_id": 100 + number, "category_id": category, "bbox": box}
            annotations.append(annotation | {"id": len(annotations) + 1, "area": box[2] * box[3], "iscrowd": 0})
    path = folder / "instances_val2017.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": coco_categories()}))
    return folder / "val2017", path


def ade(folder: Path, *, count: int = 3) -> tuple[Path, Path]:
    """Write an ADE20K set: JPEGs, and PNGs with 0 = other, 1..150 = classes; returns images and annotations."""
    labels = folder / "annotations" / "validation"
    labels.mkdir(parents=True)
    for number in range(count):
        name = f"ADE_val_{number + 1:08d}"
        photo(folder / "images" / "validation" / f"{name}.jpg", mark(number), (8, 8, 40, 32, RED))
        plane = np.zeros((SIZE[1], SIZE[0]), np.uint8)
        plane[8:40, 8:48], plane[40:64] = 13, 150
        Image.fromarray(plane).save(labels / f"{name}.png")
    return folder / "images" / "validation", labels


def icdar(folder: Path, *, count: int = 3) -> tuple[Path, Path]:
    """Write an ICDAR 2015 set: photographs, and gt_img_N.txt with a byte order mark; returns images and annotations."""
    (folder / "gt").mkdir(parents=True)
    for number in range(1, count + 1):
        photo(folder / "images" / f"img_{number}.png", mark(number), (8, 8, 40, 16, RED), (56, 40, 24, 24, BLUE))
        lines = ["8,8,48,8,48,24,8,24,Hello, world", "56,40,80,40,80,64,56,64,###"]
        (folder / "gt" / f"gt_img_{number}.txt").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8-sig")
    return folder / "images", folder / "gt"


def yolos(folder: Path, labels: dict[int, str]) -> Path:
    """Write a random YOLOS detector with these labels."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[64, 64],
        patch_size=16,
        num_detection_tokens=5,
        use_mid_position_embeddings=False,
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
    )
    return _save(folder, YolosForObjectDetection, config, YolosImageProcessor(size={"height": 64, "width": 64}))


def segformer(folder: Path, classes: int = 150) -> Path:
    """Write a random SegFormer for some classes."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    config = SegformerConfig(
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=8,
        num_labels=classes,
    )
    processor = SegformerImageProcessor(size={"height": 64, "width": 64}, do_reduce_labels=True)
    return _save(folder, SegformerForSemanticSegmentation, config, processor)


def text_detector(folder: Path) -> Path:
    """Write a random PP-OCRv5 text detector, a third as wide as the smaller of the two that are published."""
    from transformers import PPOCRV5MobileDetConfig, PPOCRV5MobileDetForObjectDetection
    from transformers import PPOCRV5ServerDetImageProcessor as Processor

    stages = {"out_features": ["stage2", "stage3", "stage4", "stage5"], "out_indices": [2, 3, 4, 5]}
    config = PPOCRV5MobileDetConfig(
        backbone_config={"model_type": "pp_lcnet_v3", "scale": 0.25, "divisor": 16, **stages},
        neck_out_channels=16,
        layer_list_out_channels=[8, 8, 8, 8],
    )
    return _save(folder, PPOCRV5MobileDetForObjectDetection, config, Processor())


def _save(folder: Path, kind: Any, config: Any, processor: Any) -> Path:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
