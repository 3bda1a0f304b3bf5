"""Settings of the stage `vision`. Imports no PyTorch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from bessemer.core.config import Config, setting

#: Raised when the same settings and inputs give another model than before.
VISION_VERSION = 1


class VisionStageConfig(Config):
    """The stage `vision`: a language model gets an encoder of pictures and a projector, which are then trained by `sft`."""

    shorthand: ClassVar[str | None] = "encoder"

    encoder: str | None = setting(
        None,
        "folder of a SigLIP or CLIP, whose encoder is taken with its weights (its files, not its place, enter the key); "
        "none: a new one of the sizes below",
        affects_output=False,
    )
    projector: Literal["pixel_shuffle", "mlp"] = setting(
        "pixel_shuffle",
        "from the encoder to the decoder: squares of patches joined, then one matrix (Idefics3, SmolVLM); or two layers over "
        "each patch (LLaVA)",
    )
    scale_factor: int = setting(2, "pixel_shuffle: patches along a side that become one token", ge=1)
    splits: bool = setting(False, "pixel_shuffle: whether a large picture is read in tiles, too, beside the whole made small")
    most_tiles: int = setting(4, "splits: tiles along a side, at most", ge=1, le=16)
    image_size: int = setting(32, "of a new encoder: side of the square that a picture is made", unit="pixels", ge=4)
    patch_size: int = setting(8, "of a new encoder: side of a patch", unit="pixels", ge=1)
    hidden_size: int = setting(128, "of a new encoder: width", ge=8)
    intermediate_size: int | None = setting(
        None, "of a new encoder: width within the feed-forward network; none: three times the width"
    )
    num_hidden_layers: int = setting(3, "of a new encoder: layers", ge=1)
    num_attention_heads: int = setting(4, "of a new encoder: heads", ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.encoder is not None:
            return self
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        if self.projector == "pixel_shuffle" and (self.image_size // self.patch_size) % self.scale_factor:
            side = self.image_size // self.patch_size
            raise ValueError(f"scale_factor {self.scale_factor} does not divide a side of {side} patches")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divided by {self.num_attention_heads} heads")
        return self

    def encoder_values(self) -> dict[str, Any]:
        """The `config.json` of a new encoder: SigLIP's kind."""
        return {
            "model_type": "siglip_vision_model" if self.projector == "mlp" else "smolvlm_vision",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size or 3 * self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
        }
