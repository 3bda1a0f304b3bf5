"""Pictures that are not ours: files of matplotlib's sample data, sent as they are through OpenAI's and Anthropic's clients to
models of all forms, are answered as by `transformers` with its own processors."""

import base64
import io
from pathlib import Path

import anthropic
import openai
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from bessemer.inference.engine import Engine, EngineConfig
from bessemer.model.vision.pictures import read_picture
from tests.model.picture_files import write_gemma3_model, write_llava_model, write_picture_model, write_qwen_model

matplotlib = pytest.importorskip("matplotlib")

#: A photograph of 512 × 600 pixels as JPEG, and a logo with transparent parts as PNG.
FILES = {"grace_hopper.jpg": "image/jpeg", "logo2.png": "image/png"}
FORMS = {
    "smolvlm": (write_picture_model, SmolVLMImageProcessorPil),
    "llava": (write_llava_model, CLIPImageProcessorPil),
    "gemma3": (write_gemma3_model, Gemma3ImageProcessorPil),
    "qwen2.5-vl": (write_qwen_model, Qwen2VLImageProcessorPil),
}
ASKED = "what is this?"


def data_of(name):
    return (Path(matplotlib.get_data_path()) / "sample_data" / name).read_bytes()


def on_white(data):
    """By Pillow alone."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


@pytest.fixture(scope="module", params=FORMS)
def form(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("form")
    write, processor = FORMS[request.param]
    write(folder)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    return Engine(folder, device="cpu", config=EngineConfig(kv_memory=0.01)), theirs, processor.from_pretrained(folder)


@torch.no_grad()
def answered_by_transformers(form, data):
    """Eight greedy tokens of `transformers`, on the pixels of its own processor, with as many image tokens as the form has."""
    engine, theirs, processor = form
    given = {**processor(images=[[on_white(data)]], return_tensors="pt")}
    given.pop("num_crops", None)
    content = [{"type": "image"}, {"type": "text", "text": ASKED}]
    asked = engine.tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = torch.tensor([engine.pictures.expand(asked, [read_picture(data)]).ids])
    is_image = (ids == engine.pictures.image_token_id).long()
    kind = theirs.config.model_type
    given |= (
        {"token_type_ids": is_image} if kind == "gemma3" else {"mm_token_type_ids": is_image} if kind == "qwen2_5_vl" else {}
    )
    made = theirs.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0,
        eos_token_id=engine.tokenizer.eos_ids, **given,
    )  # fmt: skip
    return ids.shape[1], made[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_others_is_answered_as_by_transformers(form, connected, name):
    engine, data = form[0], data_of(name)
    prompt_tokens, wanted = answered_by_transformers(form, data)
    text, encoded = engine.tokenizer.decode(wanted), base64.b64encode(data).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:{FILES[name]};base64,{encoded}"}},
        {"type": "text", "text": ASKED},
    ]
    asked = {"model": "tiny", "max_tokens": 8}
    by_openai = connected(openai.OpenAI, engine, "/v1").chat.completions.create(
        messages=[{"role": "user", "content": parts}], temperature=0, **asked
    )
    assert by_openai.choices[0].message.content == text
    assert by_openai.usage.prompt_tokens == prompt_tokens
    source = {"type": "base64", "media_type": FILES[name], "data": encoded}
    parts = [{"type": "image", "source": source}, {"type": "text", "text": ASKED}]
    by_anthropic = connected(anthropic.Anthropic, engine).messages.create(
        messages=[{"role": "user", "content": parts}], extra_body={"temperature": 0}, **asked
    )
    assert "".join(block.text for block in by_anthropic.content) == text


def test_answers_to_the_files_differ(form):
    assert Image.open(io.BytesIO(data_of("logo2.png"))).mode == "RGBA"
    _, first = answered_by_transformers(form, data_of("grace_hopper.jpg"))
    _, second = answered_by_transformers(form, data_of("logo2.png"))
    assert first != second
