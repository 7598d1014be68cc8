"""Which blocks of a backbone are gathered at a time; what two processes make of it is in tests/integration."""

from pathlib import Path

from diffusers import FluxTransformer2DModel, UNet2DConditionModel

from dp2osr.models.sharding import blocks


def test_blocks_of_both_backbones(tiny_model: Path, tiny_flux: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    assert blocks(unet) == [*unet.down_blocks, unet.mid_block, *unet.up_blocks] and len(blocks(unet)) == 5
    flux = FluxTransformer2DModel.from_pretrained(tiny_flux / "transformer")
    assert blocks(flux) == [*flux.transformer_blocks, *flux.single_transformer_blocks] and len(blocks(flux)) == 4
