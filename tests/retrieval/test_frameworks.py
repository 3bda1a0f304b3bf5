"""Retrievers of LangChain (by its standard tests), LlamaIndex and Haystack, each in an engine or pipeline of theirs."""

from __future__ import annotations

import pytest

from bessemer.retrieval.config import IndexConfig
from bessemer.retrieval.index import IndexedDocument, build_index, open_index
from bessemer.retrieval.search import search
from bessemer.retrieval.store import Filter

pytest.importorskip("lancedb")
standard = pytest.importorskip("langchain_tests.integration_tests", reason="beside retrievers")
pytestmark = pytest.mark.peer(name="retrievers")

DOCUMENTS = [
    IndexedDocument("iron.md", "# Iron\n\nIron rusts in water.", "Metals"),
    *(IndexedDocument(f"{number}.md", f"Iron number {number} is of the smith called {number}.") for number in range(5)),
    IndexedDocument("wages.md", "Iron wages.", groups=("staff",)),
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("frameworks") / "index"
    build_index(DOCUMENTS, place, IndexConfig(embedder="none"))
    return place


# the plugin that runs its asynchronous test warns of the others
@pytest.mark.filterwarnings("ignore:The test .* is marked")
@pytest.mark.asyncio
class TestLangChain(standard.RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def place(self, folder):
        self.folder = folder

    @property
    def retriever_constructor(self):
        from bessemer.retrieval.frameworks.langchain import BessemerRetriever

        return BessemerRetriever

    @property
    def retriever_constructor_params(self):
        return {"index": self.folder}

    @property
    def retriever_query_example(self):
        return "what of iron?"

    def test_passages_are_those_of_the_search_with_their_places(self):
        retriever = self.retriever_constructor(index=str(self.folder), k=2, where=Filter(groups=frozenset()))
        expected = search(open_index(self.folder), "iron water", 2, where=Filter(groups=frozenset()))
        found = retriever.invoke("iron water")
        assert [one.page_content for one in found] == [hit.passage.text for hit in expected]
        assert found[0].metadata["document"] == "iron.md" and found[0].metadata["headings"] == "Iron"
        start, end = found[0].metadata["start"], found[0].metadata["end"]
        assert DOCUMENTS[0].text.encode()[start:end].decode() == found[0].page_content
        assert all("wages" not in one.metadata["document"] for one in retriever.invoke("iron wages", k=9))


def test_a_query_engine_of_llama_index_answers_from_an_index(folder):
    core = pytest.importorskip("llama_index.core")
    from llama_index.core.llms import MockLLM
    from llama_index.core.query_engine import RetrieverQueryEngine

    from bessemer.retrieval.frameworks.llama_index import BessemerRetriever

    retriever = BessemerRetriever(folder, similarity_top_k=2)
    engine = RetrieverQueryEngine.from_args(retriever, llm=MockLLM())
    answer = engine.query("iron in water")
    assert answer.source_nodes[0].node.text == "Iron rusts in water."
    # the model in place of one repeats its prompt, which has the passage with its headings
    assert "headings: Iron" in str(answer) and "Iron rusts in water." in str(answer) and "ranks" not in str(answer)
    assert isinstance(answer.source_nodes[0], core.schema.NodeWithScore)


def test_a_pipeline_of_haystack_answers_from_an_index_and_is_saved(folder):
    haystack = pytest.importorskip("haystack")
    from haystack.components.builders import PromptBuilder

    from bessemer.core.errors import ConfigError
    from bessemer.retrieval.frameworks.haystack import BessemerRetriever

    pipeline = haystack.Pipeline()
    pipeline.add_component("find", BessemerRetriever(folder, top_k=2))
    prompt = PromptBuilder("{% for one in documents %}{{ one.content }} {% endfor %}{{ query }}", required_variables="*")
    pipeline.add_component("prompt", prompt)
    pipeline.connect("find.documents", "prompt.documents")
    asked = {"find": {"query": "iron in water"}, "prompt": {"query": "Why?"}}
    said = pipeline.run(asked)["prompt"]["prompt"]
    assert said.startswith("Iron rusts in water.") and said.endswith("Why?")
    again = haystack.Pipeline.loads(pipeline.dumps(), allowed_modules=["bessemer.retrieval.frameworks.haystack"])
    assert again.run(asked)["prompt"]["prompt"] == said
    assert len(BessemerRetriever(folder).run("iron", top_k=1)["documents"]) == 1
    with pytest.raises(ConfigError, match="with a filter is not saved"):
        BessemerRetriever(folder, where=Filter(groups=frozenset())).to_dict()
