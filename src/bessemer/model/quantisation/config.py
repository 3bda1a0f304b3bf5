"""Settings of quantisation, and the schemes that they may name. Imports no PyTorch.

The settings are those of the stage `quantize`, of `bessemer quantize`, and of the Python call. A scheme is a class of
`base.Scheme`; another package adds one by an entry point of the group `bessemer.quantisation`, whose object is a
`SchemePlugin`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import ValidationInfo, field_validator, model_validator

from bessemer.core.config import Config, setting
from bessemer.core.errors import ConfigError
from bessemer.core.registry import Plugin, Registry

#: Entry points of other packages' schemes.
GROUP = "bessemer.quantisation"

_SCHEMES = "bessemer.model.quantisation.schemes"


@dataclass(frozen=True)
class SchemePlugin(Plugin[Any]):
    """A class of schemes (`base.Scheme`), which loads PyTorch.

    settings_read: of the stage's settings, those that it heeds. is_calibrated: whether gptq and awq can choose its codes,
    which are then an `IntegerScheme`'s. for_ends: whether the setting `head` may name it. is_made: whether
    weights are quantised to it here; else it is that of files."""

    settings_read: tuple[str, ...] = ()
    is_calibrated: bool = False
    for_ends: bool = True
    is_made: bool = True


SCHEMES: Registry[Any] = Registry(
    "scheme",
    GROUP,
    [
        SchemePlugin(
            "int8",
            "weights of 8 bits, a scale for each output",
            f"{_SCHEMES}:Int8",
            settings_read=("group_size", "search_clip"),
            is_calibrated=True,
        ),
        SchemePlugin(
            "int4",
            "weights of 4 bits, a scale for each group of inputs",
            f"{_SCHEMES}:Int4",
            settings_read=("group_size", "symmetric", "search_clip"),
            is_calibrated=True,
        ),
        SchemePlugin(
            "nf4",
            "weights of 4 bits, of 16 numbers for normal weights, as bitsandbytes has them",
            "bessemer.model.quantisation.nf4:NF4",
            for_ends=False,
        ),
        SchemePlugin(
            "w8a8",
            "as int8, and activations become int8 row by row",
            f"{_SCHEMES}:W8A8",
            settings_read=("search_clip",),
            is_calibrated=True,
            for_ends=False,
        ),
        SchemePlugin(
            "fp8",
            "weights of 8 bits in floating point, a scale for each block of 128 by 128, as files have them",
            "bessemer.model.quantisation.fp8:Fp8",
            is_made=False,
        ),
        SchemePlugin(
            "nvfp4",
            "weights of 4 bits in floating point, a scale of 8 bits for each 16, as files have them",
            "bessemer.model.quantisation.fp4:Nvfp4",
            is_made=False,
        ),
        SchemePlugin(
            "gguf",
            "the blocks of a GGUF file in Q5_0, Q5_1, a K type from Q4_K on, IQ4 or MXFP4, as they are; no setting may name it",
            "bessemer.model.quantisation.blocks:GgufBlocks",
            is_made=False,
        ),
    ],
)


def scheme_plugin(name: str) -> SchemePlugin:
    """The declaration of a scheme, ours or another package's. Raises ConfigError when there is none."""
    plugin = SCHEMES.find(name)
    if not isinstance(plugin, SchemePlugin):
        raise ConfigError(f"the entry point {name!r} of {GROUP} is not a SchemePlugin")
    return plugin


#: Version: raised when the same settings and inputs give other codes than before (golden outputs in the tests), or when
#: their quality is measured otherwise.
QUANTIZE_VERSION = 2

#: Sizes of a group of int4.
GROUP_SIZES = (128, 64, 32)


class QuantizeConfig(Config):
    """How a model's weights become codes of 8 or 4 bits."""

    shorthand: ClassVar[str | None] = "scheme"

    scheme: str = setting(
        "int8",
        "int8: weights of 8 bits, a scale for each output; int4: of 4 bits, a scale for each group of inputs; nf4: of 4 bits, "
        "16 numbers for normal weights, in the form of bitsandbytes; w8a8: as int8, and activations become int8 row by row; or "
        "one of an installed package.",
        plugins=GROUP,
    )
    method: Literal["rtn", "gptq", "awq"] = setting(
        "rtn",
        "How codes are chosen. rtn: the nearest one; gptq: so that a layer's outputs change least, one input's error made up "
        "for by the next inputs (Frantar et al. 2022); awq: the nearest one after inputs with large activations were made "
        "larger (Lin et al. 2023). gptq and awq read calibration text.",
    )
    group_size: Literal[32, 64, 128] | None = setting(
        None,
        "Inputs that share a scale; absent: 128 for int4, all of them for int8. A matrix whose inputs it does not divide gets "
        "the next smaller one.",
        unit="weights",
    )
    symmetric: bool = setting(True, "int4: zero is the middle code; false: each group has a zero of its own.")
    search_clip: bool = setting(
        False, "rtn: choose for each scale the range with the smallest squared error, instead of the whole one."
    )
    head: str = setting(
        "int8",
        "Scheme of the embedding and the head, int8 or int4; none: as they are, the default of nf4. gptq and awq leave it to "
        "rounding.",
        plugins=GROUP,
    )
    calibration_tokens: int = setting(65_536, "gptq, awq: tokens of calibration text.", unit="tokens", ge=256)
    calibration_length: int = setting(
        512, "gptq, awq: tokens of a row of calibration text; at most the model's context.", unit="tokens", ge=16
    )
    activation_order: bool = setting(True, "gptq: begin with the inputs that carry most, when their errors can be made up for.")
    damping: float = setting(0.01, "gptq: share of the mean diagonal of the Hessian that is added to it.", gt=0, le=1)
    quality_tokens: int = setting(
        32_768, "Held-out tokens on which the quantised model is compared with the original; 0: not.", unit="tokens", ge=0
    )

    speed_tokens: int = setting(
        64, "Tokens of each of 8 answers that both models are timed with; 0: not.", unit="tokens", affects_output=False, ge=0
    )
    price_per_hour: float | None = setting(
        None,
        "Price of the machine for an hour, in any currency: the report then says what a million tokens cost.",
        affects_output=False,
        gt=0,
    )

    @field_validator("scheme", "head")
    @classmethod
    def _known_scheme(cls, name: str, info: ValidationInfo) -> str:
        if info.field_name == "head" and name == "none":
            return name
        try:
            plugin = scheme_plugin(name)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if not plugin.is_made:
            raise ValueError(f"{name} is what GGUF files hold; to make one: bessemer export MODEL out.gguf --dtype q4_k_m")
        if info.field_name == "head" and not plugin.for_ends:
            raise ValueError(f"{name} is not for the embedding and the head")
        return name

    @model_validator(mode="before")
    @classmethod
    def _suit_nf4(cls, values: Any) -> Any:
        """bitsandbytes leaves the ends as they are."""
        return {"head": "none", **values} if isinstance(values, dict) and values.get("scheme") == "nf4" else values

    @model_validator(mode="after")
    def _check(self) -> Self:
        scheme = scheme_plugin(self.scheme)
        if self.group_size is not None and "group_size" not in scheme.settings_read:
            raise ValueError(f"group_size: {self.scheme} has one scale for an output; leave it out")
        if not self.symmetric and "symmetric" not in scheme.settings_read:
            raise ValueError("symmetric: false is for int4")
        if self.search_clip and "search_clip" not in scheme.settings_read:
            raise ValueError(f"search_clip: {self.scheme} has one range; leave it out")
        if self.is_calibrated and not scheme.is_calibrated:
            raise ValueError(f"method: {self.scheme} is rounded to nearest; choose rtn")
        if self.search_clip and self.method != "rtn":
            raise ValueError(f"search_clip is for method: rtn; {self.method} searches by itself")
        return self

    @property
    def is_calibrated(self) -> bool:
        """Whether text is needed to choose the codes."""
        return self.method != "rtn"
