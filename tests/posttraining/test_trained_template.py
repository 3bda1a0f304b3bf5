"""The chat template of training, kept with models and adapters, and what the server makes of it."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from bessemer.assistant.tool_formats import TOOL_FORMATS, format_of
from bessemer.core.errors import ArtefactError
from bessemer.core.progress import Silent
from bessemer.inference.engine import EngineConfig
from bessemer.model.storage.tuned_folder import merge_adapter
from bessemer.posttraining.data.encoding import encode_turns
from bessemer.posttraining.sft.config import SFTConfig
from bessemer.posttraining.sft.stage import sft
from bessemer.serving.runtime.models import ModelSetup
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.tokenization.trained_template import TrainedTemplate, read_trained_template, write_trained_template
from tests.posttraining.test_turns import CALLS, PLAIN, TOOLS, parsed, turns_of

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"steps": 1, "batch_size": 1, "context_length": 96, "dtype": "float32", "compile": False, "validation_share": 0.0}


def with_another_template(folder, to):
    shutil.copytree(folder, to)
    (to / "chat_template.jinja").write_text(load_tokenizer(folder).chat_template + "{# changed #}", encoding="utf-8")
    return to


def setup(folder, **options):
    return ModelSetup(folder, "model", device="cpu", engine=EngineConfig(cpu_kernels="off", max_num_seqs=1), **options)


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    """An adapter and the model with it merged, of the stage `sft`."""
    out = tmp_path_factory.mktemp("sft")
    (out / "run").mkdir()
    (out / "rows.jsonl").write_text("".join(json.dumps({"messages": PLAIN[:2]}) + "\n" for _ in range(4)), encoding="utf-8")
    config = SFTConfig.parse(SETTINGS | {"data": ["rows.jsonl"], "adapter": {"rank": 2, "merge": True}}, "sft")
    sft(config, model_folder, None, out / "run", folder=out, seed=1, device="cpu", progress=Silent())
    return out / "run"


def test_a_stage_keeps_the_template_of_its_training_and_the_format_of_calls(model_folder, trained, tmp_path):
    record = TrainedTemplate(load_tokenizer(model_folder).template_hash, "hermes")
    assert read_trained_template(model_folder) is None
    assert read_trained_template(trained / "model") == read_trained_template(trained / "adapter") == record
    merge_adapter(model_folder, trained / "adapter", tmp_path / "merged")
    assert read_trained_template(tmp_path / "merged") == record


def test_a_model_of_another_template_than_its_training_is_not_served_unless_told(trained, tmp_path):
    setup(trained / "model").open_engine().close()
    changed = with_another_template(trained / "model", tmp_path / "changed")
    with pytest.raises(ArtefactError, match=r"was trained with another chat template .* --other-template"):
        setup(changed).open_engine()
    setup(changed, other_template=True).open_engine().close()


def test_an_adapter_on_a_base_of_another_template_is_not_served_unless_told(model_folder, trained, tmp_path):
    adapters = {"tuned": trained / "adapter"}
    setup(model_folder, adapters=adapters).open_engine().close()
    changed = with_another_template(model_folder, tmp_path / "changed")
    with pytest.raises(ArtefactError, match=r"adapter: was trained with another chat template"):
        setup(changed, adapters=adapters).open_engine()
    setup(changed, adapters=adapters, other_template=True).open_engine().close()


def test_calls_are_read_by_the_format_that_was_trained(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    assert format_of(tokenizer) is TOOL_FORMATS["hermes"].load()
    write_trained_template(folder, TrainedTemplate(tokenizer.template_hash, "mistral"))
    assert format_of(load_tokenizer(folder)) is TOOL_FORMATS["mistral"].load()


def test_transformers_parses_answers_by_what_is_written_beside_the_model(trained):
    tokenizer = load_tokenizer(trained / "model")
    peer = AutoTokenizer.from_pretrained(trained / "model")
    for context, learnt in turns_of(encode_turns((), CALLS, tokenizer, TOOLS)):
        thinking, text, calls = parsed(tokenizer, context, learnt, TOOLS)
        theirs = peer.parse_response(tokenizer.decode(learnt, skip_special=False), prefix=tokenizer.decode(context, False))
        assert (theirs.get("reasoning_content", "").strip(), theirs.get("content", "").strip()) == (thinking, text)
        assert [(call["function"]["name"], call["function"]["arguments"]) for call in theirs.get("tool_calls", ())] == calls
