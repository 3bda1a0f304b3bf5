"""Encoders of pictures in llama.cpp's `mmproj` files: out and in again, and as llama.cpp reads them."""

import numpy as np
import pytest
import torch

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.images import chat_prompt
from bessemer.model.formats import ExportOptions, export_model, find_model, import_model
from bessemer.model.formats import gguf_mmproj as mmproj_files
from bessemer.model.formats import gguf_mmproj_native as native
from bessemer.model.formats.gguf_mmproj import export_vision_gguf, find_mmproj, read_mmproj
from bessemer.model.vision.folder import is_vision_folder, load_vision_language, read_vision_language
from bessemer.model.vision.pictures import Picture
from bessemer.model.vision.preprocessing import read_preprocessor
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.cases import slow_but
from tests.model.picture_files import drawn, write_gemma3_model, write_llava_model, write_picture_model, write_qwen_model

gguf = pytest.importorskip("gguf")

FORMS = {
    "llava": write_llava_model,
    "smolvlm": write_picture_model,
    "gemma3": write_gemma3_model,
    "qwen2.5-vl": write_qwen_model,
}


@pytest.fixture(scope="module", params=sorted(FORMS))
def written(request, tmp_path_factory):
    """A form's folder and the GGUF file of its decoder, with the `mmproj` beside."""
    folder = tmp_path_factory.mktemp(request.param)
    FORMS[request.param](folder)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    notes = export_model(folder, path, "gguf")
    assert any("mmproj-model.gguf beside it" in note for note in notes)
    # those of this small encoder are not
    assert any("windows are 112 pixels wide" in note for note in notes) == (request.param == "qwen2.5-vl")
    return folder, path


def test_a_form_comes_back_as_it_went_out(written, tmp_path):
    folder, path = written
    assert find_mmproj(path) == path.with_name("mmproj-model.gguf")
    import_model(find_model(str(path)), tmp_path / "back")
    ours, back = load_vision_language(folder), load_vision_language(tmp_path / "back")
    assert ours.config.vision == back.config.vision
    assert (ours.config.image_token_id, ours.config.tokens_per_tile) == (
        back.config.image_token_id,
        back.config.tokens_per_tile,
    )
    assert read_preprocessor(tmp_path / "back") == read_preprocessor(folder)
    unused = {"encoder.post_layernorm.weight", "encoder.post_layernorm.bias"} if ours.config.model_type == "llava" else set()
    for name, tensor in ours.vision.state_dict().items():
        if name not in unused:
            # Gemma's norm goes out with 1 added
            assert (back.vision.state_dict()[name] - tensor).abs().max() <= 1e-6, name
    prepared = read_preprocessor(folder).prepare(Picture.of(np.asarray(drawn(40, 30))))
    pixels = read_preprocessor(folder).pixels(prepared)
    count = ours.config.tokens_per_tile * len(prepared.tiles)
    if ours.config.vision.is_native:
        count = prepared.rows * prepared.columns
        assert ours.config.rope_sections == back.config.rope_sections == (2, 2, 2)
    image = torch.full((1, count), ours.config.image_token_id)
    tokens = torch.cat([torch.tensor([[3, 4]]), image, torch.tensor([[5, 6, 7]])], dim=1)
    with torch.no_grad():
        assert (ours(tokens, pixels) - back(tokens, pixels)).abs().max() < 1e-4


def test_an_engine_answers_from_the_two_files_as_from_the_folder(written):
    folder, path = written
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    answers = []
    for place in (folder, path):
        engine = Engine(place, device="cpu", config=EngineConfig(kv_memory=0.01, cpu_kernels="off"))
        parts = [{"type": "image", "image": Picture.of(np.asarray(drawn(40, 30)))}, {"type": "text", "text": "what is it?"}]
        prompt = chat_prompt(engine.tokenizer, [{"role": "user", "content": parts}])
        answers.append(engine.generate([prompt], params)[0].token_ids)
    assert answers[0] == answers[1]


def test_keys_and_tensors_are_called_as_in_llama_cpp(written):
    folder, path = written
    reader = gguf.GGUFReader(find_mmproj(path))
    config = read_vision_language(folder)
    value = {name: field.contents() for name, field in reader.fields.items()}
    keys = gguf.Keys
    assert value[keys.General.ARCHITECTURE] == "clip" and value[keys.General.TYPE] == "mmproj"
    projector = {"llava": "mlp", "smolvlm": "idefics3", "gemma3": "gemma3", "qwen2_5_vl": "qwen2.5vl_merger"}[config.model_type]
    assert value[keys.Clip.PROJECTOR_TYPE] == projector and value[keys.Clip.HAS_VISION_ENCODER] is True
    assert value[keys.ClipVision.EMBEDDING_LENGTH] == config.vision.hidden_size
    assert value[keys.ClipVision.FEED_FORWARD_LENGTH] == config.vision.intermediate_size
    assert value[keys.ClipVision.BLOCK_COUNT] == config.vision.num_hidden_layers
    assert value[keys.ClipVision.Attention.HEAD_COUNT] == config.vision.num_attention_heads
    if not config.vision.is_native:
        assert value[keys.ClipVision.IMAGE_SIZE] == config.vision.image_size
    assert value[keys.ClipVision.PROJECTION_DIM] == config.text.hidden_size
    assert len(value[keys.ClipVision.IMAGE_MEAN]) == 3
    # the names by which the converters of llama.cpp map those of Hugging Face
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, config.vision.num_hidden_layers)
    theirs = {"llava": "vision_tower.vision_model.", "gemma3": "vision_tower.vision_model.", "smolvlm": "model.vision_model."}
    named = {tensor.name for tensor in reader.tensors}
    vision = load_vision_language(folder).vision
    if config.vision.is_native:
        check_names_of_qwen(path, reader, known, vision)
        return
    for name in vision.encoder.state_dict():
        if config.model_type == "llava" and name.startswith("post_layernorm"):
            continue
        module = theirs[config.model_type] + name
        mapped = known.get_name(module, try_suffixes=(".weight", ".bias"))
        assert mapped in named, (module, mapped)


def check_names_of_qwen(path, reader, known, vision):
    """The converter of llama.cpp splits query, key and value, and the frames of a patch; the decoder's sections are keys."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = [
        *(f"visual.{name}" for name in vision.encoder.state_dict()),
        *(f"visual.merger.{n}" for n in vision.projector.state_dict()),
    ]
    split = [name.replace("qkv", part) for name in names for part in ("qkv" if "qkv" in name else " ")]
    mapped = {known.get_name(name, try_suffixes=(".weight", ".bias")) for name in split}
    assert mapped | {"v.patch_embd.weight.1"} == set(tensors)
    assert tuple(tensors["v.patch_embd.weight.1"].shape)[::-1] == (32, 3, 4, 4)
    keys, width = gguf.Keys, vision.config.vision.hidden_size
    value = {name: field.contents() for name, field in reader.fields.items()}
    assert (value[keys.ClipVision.WINDOW_SIZE], value[keys.ClipVision.N_WA_PATTERN], value[keys.ClipVision.USE_SILU]) == (
        16,
        2,
        True,
    )
    assert (value[keys.ClipVision.SPATIAL_MERGE_SIZE], value[keys.ClipVision.IMAGE_MAX_PIXELS]) == (2, 2560)
    key = torch.from_numpy(tensors["v.blk.1.attn_k.bias"].data.copy())
    assert torch.equal(key, vision.encoder.blocks[1].attn.qkv.bias[width : 2 * width])
    text = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert text["general.architecture"] == "qwen2vl" and text["qwen2vl.rope.dimension_sections"] == [2, 2, 2, 0]


def test_a_file_without_keys_of_ours_is_read_as_llama_cpp_reads_it(written, tmp_path, monkeypatch):
    folder, _ = written
    whole = mmproj_files._keys
    monkeypatch.setattr(
        mmproj_files,
        "_keys",
        lambda *given: {key: value for key, value in whole(*given).items() if not key.startswith("bessemer.")},
    )
    # of published models, whose heads are 128 wide
    monkeypatch.setattr(native, "_SECTIONS", (2, 2, 2))
    export_vision_gguf(folder, tmp_path / "model.gguf")
    ours = load_vision_language(folder)
    read = read_mmproj(tmp_path / "mmproj-model.gguf", ours.config.text, load_tokenizer(folder))
    pixels = read_preprocessor(folder).pixels(read_preprocessor(folder).prepare(Picture.of(np.asarray(drawn(32, 32)))))
    with torch.no_grad():
        assert (read.vision(pixels) - ours.vision(pixels)).abs().max() < (1e-2 if ours.config.model_type == "llava" else 1e-4)
    kind = {"llava": "LlavaImageProcessor", "smolvlm": "Idefics3ImageProcessor", "gemma3": "Gemma3ImageProcessor"}
    kind["qwen2_5_vl"] = "Qwen2VLImageProcessor"
    assert read.values["image_processor_type"] == kind[ours.config.model_type]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "most"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 2e-2), ("q4_k_m", 2e-3)])
def test_number_types_round_as_they_say(written, tmp_path, dtype, most):
    folder, _ = written
    notes = export_model(folder, tmp_path / "model.gguf", "gguf", ExportOptions(dtype=dtype))
    assert any("the encoder of pictures is in f16" in note for note in notes) == (dtype == "q4_k_m")
    ours = load_vision_language(folder)
    read = read_mmproj(tmp_path / "mmproj-model.gguf", ours.config.text, load_tokenizer(folder))
    for name, tensor in read.vision.state_dict().items():
        before = ours.vision.state_dict()[name]
        if "post_layernorm" not in name:
            assert (tensor - before).abs().max() <= most * max(1.0, float(before.abs().max())), name


def test_what_does_not_go_together_is_named(written, tmp_path):
    folder, path = written
    ours, tokenizer = load_vision_language(folder), load_tokenizer(folder)
    file = find_mmproj(path)
    wider = ours.config.text.with_changes(hidden_size=96)
    with pytest.raises(ArtefactError, match="it is of a decoder 48 wide, and this one is 96 wide"):
        read_mmproj(file, wider, tokenizer)
    with pytest.raises(ArtefactError, match="has no control token <"):
        other = {"gemma3": write_picture_model}.get(ours.config.model_type, write_gemma3_model)
        other(tmp_path / "other")
        read_mmproj(file, ours.config.text, load_tokenizer(tmp_path / "other"))
    with pytest.raises(ArtefactError, match=r"missing\.gguf: cannot be read"):
        read_mmproj(tmp_path / "missing.gguf", ours.config.text, tokenizer)
    with pytest.raises(ArtefactError, match=r"the architecture '\w+' is not supported; supported: clip"):
        read_mmproj(path, ours.config.text, tokenizer)
    with pytest.raises(ArtefactError, match=r"this is the encoder of pictures of a model \(mmproj\)"):
        Engine(file, config=EngineConfig(kv_memory=0.01))
    with pytest.raises(ConfigError, match=r"mmproj: of a GGUF file, and .* is none"):
        Engine(folder, config=EngineConfig(kv_memory=0.01, mmproj=str(file)))


def test_a_decoder_with_a_file_beside_it_that_is_not_read_is_opened_alone(written, tmp_path, monkeypatch, capsys):
    folder, _ = written
    whole = mmproj_files._keys
    monkeypatch.setattr(mmproj_files, "_keys", lambda *given: whole(*given) | {"clip.projector_type": "qwen3vl_merger"})
    export_vision_gguf(folder, tmp_path / "model.gguf")
    engine = Engine(tmp_path / "model.gguf", config=EngineConfig(kv_memory=0.01, cpu_kernels="off"))
    assert engine.pictures is None
    said = capsys.readouterr()
    assert "reads no pictures: " in said.out + said.err and "'qwen3vl_merger' are not read" in said.out + said.err
    notes = import_model(find_model(str(tmp_path / "model.gguf")), tmp_path / "back")
    assert notes[0].startswith("the decoder alone is read: ") and not is_vision_folder(tmp_path / "back")
    named = EngineConfig(kv_memory=0.01, mmproj=str(tmp_path / "mmproj-model.gguf"))
    with pytest.raises(ArtefactError, match="are not read"):
        Engine(tmp_path / "model.gguf", config=named)


@pytest.mark.parametrize("written", slow_but(["llava"], sorted(FORMS)), indirect=True)
def test_damaged_files_are_named(written, tmp_path, monkeypatch):
    folder, _ = written
    ours, tokenizer = load_vision_language(folder), load_tokenizer(folder)
    whole = mmproj_files._keys

    def refused(match, **changes):
        monkeypatch.setattr(mmproj_files, "_keys", lambda *given: whole(*given) | changes)
        export_vision_gguf(folder, tmp_path / "model.gguf")
        with pytest.raises(ArtefactError, match=match):
            read_mmproj(tmp_path / "mmproj-model.gguf", ours.config.text, tokenizer)

    refused("pictures projected by 'resampler' are not read", **{"clip.projector_type": "resampler"})
    layers = ours.config.vision.num_hidden_layers
    refused(rf"tensor 'v\.blk\.{layers}\.\w+\.weight' is missing", **{"clip.vision.block_count": layers + 1})
    fewer = {"clip.vision.block_count": layers - 1, "bessemer.feature_layers": "-1"}
    refused(rf"unexpected tensor 'v\.blk\.{layers - 1}\.", **fewer)
    refused("has the shape", **{"clip.vision.feed_forward_length": 40})
    refused("9,000 layers, and", **{"clip.vision.block_count": 9000})
    refused("Expecting value", **{"bessemer.preprocessor": "nothing"})
