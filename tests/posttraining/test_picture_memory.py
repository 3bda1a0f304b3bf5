"""The memory of a step on pictures that is said before is that of the step, counted tensor by tensor."""

import gc
from itertools import product

import pytest
import torch

from bessemer.core.progress import Silent
from bessemer.distributed.mesh import ALONE
from bessemer.model.adapters.trained import add_adapters
from bessemer.model.vision.config import read_vision_language_config
from bessemer.model.vision.costs import PicturesOfStep, parameters, reading_memory
from bessemer.model.vision.encoder import Pixels
from bessemer.model.vision.folder import initial_vision_language
from bessemer.model.vision.trained import VisionDecoder
from bessemer.posttraining.picture_memory import pictures_of_rows, step_memory
from bessemer.posttraining.preference.config import PreferenceConfig
from bessemer.posttraining.preference.stage import preference
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.stage import rl
from bessemer.posttraining.sft.config import SFTConfig
from bessemer.posttraining.sft.stage import sft
from bessemer.training.data.batch import Batch
from bessemer.training.model_setup import prepare_model
from bessemer.training.objectives import NextTokenObjective
from bessemer.training.optim.optimizers import build_optimizers, freeze_parameters
from bessemer.training.runtime import Runtime
from bessemer.training.step_timing import _with_pictures
from bessemer.training.trainer import Trainer
from tests.cases import slow, slow_but
from tests.scaling.live_memory import LiveMemory, storage_bytes

from . import test_picture_preferences as preferences
from . import test_picture_rewards as rewards
from .test_picture_training import PROJECTOR_ALONE, folder  # noqa: F401

preferred, asked = preferences.colours, rewards.colours

TEXT = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
VISION = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 128,
    "patch_size": 8,
}
#: Encoders that take more than their decoders.
FORMS = {
    "smolvlm": {"model_type": "smolvlm", "scale_factor": 4, "text_config": TEXT, "vision_config": VISION},
    "llava": {
        "model_type": "llava",
        "text_config": TEXT,
        "vision_config": VISION | {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"},
        "vision_feature_layer": -1,
    },
    "gemma3": {
        "model_type": "gemma3",
        "mm_tokens_per_image": 64,
        "boi_token_index": 3,
        "eoi_token_index": 4,
        "text_config": TEXT | {"model_type": "gemma3_text", "sliding_window": 64, "query_pre_attn_scalar": 32},
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "tie_word_embeddings": False,
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "text_config": TEXT
        | {"model_type": "qwen2_5_vl_text", "rope_theta": 1e4}
        | {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
        "vision_config": {"hidden_size": 96, "intermediate_size": 256, "depth": 4, "num_heads": 4, "patch_size": 8}
        | {"window_size": 64, "fullatt_block_indexes": [1]},
    },
}
WAYS = {
    "all": {},
    "encoder frozen": {"freeze": ["vision.encoder.*"]},
    "language model": {"freeze": ["vision.*"]},
    "encoder alone": {"freeze": ["embed_tokens.*", "layers.*", "norm.*", "lm_head.*"]},
    "adapter": {"adapter": {"rank": 4, "merge": True}},
    "micro-batches": {"micro_batch_size": 2},
}


def config_of(form):
    return read_vision_language_config(FORMS[form] | {"image_token_id": 7, "image_token_index": 7})


def counted(vision, config):
    """Most bytes of a second step, with the optimizer's means, and its batch."""
    model = VisionDecoder.of(initial_vision_language(vision, seed=1))
    runtime = Runtime.of(config, torch.device("cpu"))
    if config.low_rank is None:
        freeze_parameters(model, config)
    else:
        add_adapters(model, rank=4, scale=1.0)
    prepare_model(model, config, runtime, ALONE)
    optimizers = build_optimizers(model, config)
    objective = NextTokenObjective(vision.text)
    trainer = Trainer(model, optimizers, objective, runtime, gradient_clip=1.0, micro_batch_size=config.micro_batch_size)
    shape = (config.batch_size, config.context_length)
    tokens_BT = torch.randint(8, 512, shape, generator=torch.Generator().manual_seed(1))
    positions_BT = torch.arange(shape[1]).expand(shape).contiguous()
    batch = _with_pictures(Batch(tokens_BT, tokens_BT, positions_BT, torch.ones_like(tokens_BT)), vision)
    trainer.step(batch)
    states = [state.values() for optimizer in optimizers for state in optimizer.state.values()]
    means = [value for values in states for value in values if isinstance(value, torch.Tensor) and value.ndim]
    standing = [*model.parameters(), *model.buffers(), *means]
    gc.collect()
    with LiveMemory([*standing, tokens_BT]) as live:
        trainer.step(batch)
    return storage_bytes(standing) + live.peak, batch


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("form", "way", "dtype"),
    slow_but([("smolvlm", "all", "float32")], product(FORMS, WAYS, ("float32", "bfloat16"))),
)
def test_the_memory_that_is_said_is_that_of_a_step(form, way, dtype):
    vision = config_of(form)
    settings = {"data": ["a.jsonl"], "dtype": dtype, "steps": 2, "compile": False, "batch_size": 4, "context_length": 512}
    config = SFTConfig.parse(settings | {"optimizer": "adamw", "threads": 1} | WAYS[way], "sft")
    found, batch = counted(vision, config)
    said = step_memory(config, vision, pictures_of_rows(batch, config.micro_batch_size or 4, vision))
    # what a decoder keeps whose weights learn nothing is not taken off
    most = 1.25 if way == "encoder alone" else 1.1
    assert 0.9 * found <= said.peak <= most * found
    assert said.parts["encoder of pictures"] >= 4 * sum(parameters(vision))


@pytest.mark.usefixtures("one_thread")
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_memory_of_reading_a_picture_is_that_of_the_encoder(form, dtype):
    config = config_of(form)
    vision = initial_vision_language(config, seed=1).vision.requires_grad_(False).to(dtype)
    if config.vision.is_native:
        pixels, shown = Pixels(torch.randn(1600, 384), shapes=torch.tensor([[40, 40]])), PicturesOfStep(1600, 400)
    else:
        pixels, shown = Pixels(torch.randn(5, 3, 128, 128)), PicturesOfStep.of_tiles(config, 5)
    vision(pixels)
    gc.collect()
    with LiveMemory([*vision.parameters()]) as live:
        vision(pixels._replace(values=pixels.values.clone()))
    said = reading_memory(config, shown, dtype.itemsize)
    assert said.kept + said.passing == pytest.approx(live.peak, rel=0.1)
    assert said.weights == storage_bytes(vision.parameters())


def test_pictures_are_counted_by_row_and_each_once():
    vision = config_of("smolvlm")
    rows = torch.zeros(3, 512, dtype=torch.int64)
    batch = _with_pictures(Batch(rows, rows), vision)
    assert pictures_of_rows(batch, 2, vision) == PicturesOfStep.of_tiles(vision, 2)
    twice = batch.vector_of_token_BT.clone()
    twice[0, 64:80] = twice[0, :16]
    shown = pictures_of_rows(Batch(rows, rows, vector_of_token_BT=twice, pictures=batch.pictures), 1, vision)
    assert (shown.patches, shown.vectors) == (256, 32)


class Said(Silent):
    """What a run says."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def test_sft_says_it_before_the_first_step(folder, tmp_path):  # noqa: F811
    said = Said()
    settings = {"data": ["rows.jsonl"], "batch_size": 2, "context_length": 256, "steps": 1, "dtype": "float32"}
    settings |= {"compile": False, "validation_share": 0, "freeze": PROJECTOR_ALONE, "threads": 1}
    sft(SFTConfig.parse(settings, "sft"), folder / "model", None, tmp_path, seed=1, device="cpu", folder=folder, progress=said)
    (line,) = [line for line in said.lines if line.startswith("  a step takes about")]
    assert "encoder of pictures" in line


@pytest.mark.slow
def test_preference_and_rl_say_it_too(preferred, asked, tmp_path):
    for train, config, place in (
        (preference, PreferenceConfig.parse(preferences.SETTINGS | {"steps": 1, "threads": 1}, "preference"), preferred),
        (rl, RLConfig.parse(rewards.SETTINGS | {"steps": 1, "beta": 0.1}, "rl"), asked),
    ):
        said, out = Said(), tmp_path / config.__class__.__name__
        out.mkdir()
        train(config, place / "model", out, seed=1, device="cpu", folder=place, progress=said)
        (line,) = [line for line in said.lines if line.startswith("  a step takes about")]
        assert "encoder of pictures" in line
