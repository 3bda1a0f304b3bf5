"""Sources: their settings, their declarations, and a source opened from its settings.

Pure Python: a recipe is checked without the libraries that read its sources. A source's code is imported when it is first
opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from bessemer.core.config import Config, setting
from bessemer.core.errors import ConfigError
from bessemer.core.progress import Progress
from bessemer.core.registry import Registry
from bessemer.core.usercode import is_user_function
from bessemer.data.plugins import SourceOpener, SourcePlugin, Strings
from bessemer.data.sources.source import Source

_DOCUMENT_BYTES = 16 << 20
_FILE_BYTES = 128 << 20
Extractor = Literal["bessemer", "resiliparse", "trafilatura", "union"]


class SourceSettings(Config):
    """What the settings of every source have, those of other packages too."""

    source: str = setting(..., "kind of source")

    def plugins(self) -> list[tuple[str, str]]:
        own = [] if is_user_function(self.source) else [("bessemer.sources", self.source)]
        return sorted({*super().plugins(), *own})


class PathsSource(SourceSettings):
    """What every source that reads files has."""

    name: str | None = setting(
        None, "what the documents' `source` says; the kind where it is not given. Two sources need two names", min_length=1
    )
    paths: Strings = setting(..., "files, folders and patterns such as `dumps/*.gz`", min_length=1, affects_output=False)
    license: str | None = setting(None, "licence of everything in it that states none itself, best as an SPDX identifier")
    max_document_bytes: int = setting(_DOCUMENT_BYTES, "longer documents are set aside and counted", unit="bytes", ge=1)


class WheelsSource(SourceSettings):
    """Documentation inside pinned packages, read from the wheel's zip and never installed."""

    source: Literal["wheels"] = setting("wheels", "kind of source")
    lock: str = setting(
        "quickstart", "name of a lock that ships with bessemer, or a requirements file with hashes", affects_output=False
    )
    optional: bool = setting(
        False, "go on without this source, and say so, when the package index cannot be reached", affects_output=False
    )


class PythonDocsSource(SourceSettings):
    """Docstrings of the running interpreter's standard library."""

    source: Literal["python_docs"] = setting("python_docs", "kind of source")


class CanariesSource(SourceSettings):
    """Canaries: random texts in a known number of copies, planted to measure what a model memorises."""

    source: Literal["canaries"] = setting("canaries", "kind of source")
    seed: int = setting(0, "another seed gives other canaries")
    draws: int = setting(4, "canaries of each kind and number of repetitions", ge=1)
    repetitions: list[Annotated[int, Field(ge=1)]] = setting(
        default_factory=lambda: [1, 2, 4, 8, 16, 32, 64], description="how often canaries stand in the corpus", min_length=1
    )
    replaced: float = setting(
        0.1, "share of a near-copy's words that are others than the canary's; 0: no canaries with near-copies", ge=0, lt=1
    )
    words: int = setting(32, "length of a canary", unit="words", ge=2)
    suffix_words: int = setting(8, "words at the end of a canary that a model is asked for", unit="words", ge=1)
    vocabulary: list[str] = setting(
        default_factory=list,
        description="words that canaries are made of, in any language; empty: 256 short English ones. More of them, and longer "
        "canaries, are harder to guess",
    )

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Self:
        if self.suffix_words >= self.words:
            raise ValueError(f"suffix_words: a canary of {self.words} words needs some before its suffix")
        if self.vocabulary and len(set(self.vocabulary)) < 16:
            raise ValueError("vocabulary: name at least 16 different words, or canaries are alike")
        if any(word.split() != [word] for word in self.vocabulary):
            raise ValueError("vocabulary: a word has no white space and is not empty")
        if len(set(self.repetitions)) < len(self.repetitions):
            raise ValueError("repetitions: name each number once; draws says how many canaries have it")
        return self


class FilesSource(SourceSettings):
    """Text on this machine: .txt, .md and .jsonl, plain, compressed or in archives."""

    source: Literal["files"] = setting("files", "kind of source")
    license: str | None = setting(None, "licence of everything in it that states none itself")
    name: str = setting("files", "what the documents' `source` says; two sources of files need two names", min_length=1)
    paths: Strings = setting(..., "files, folders and patterns such as `texts/*.md`", min_length=1, affects_output=False)
    max_document_bytes: int = setting(
        100_000, "a longer text file becomes several documents, cut at blank lines", unit="bytes", ge=1
    )


class UserSource(SourceSettings):
    """A user's own `file.py:function`, which yields dicts with a `text` and, if it has one, a stable `id`."""

    source: str = setting(..., "`file.py:function`, relative to the recipe", code=True)
    name: str | None = setting(None, "what the documents' `source` says; the function's name where it is not given")
    options: dict[str, Any] = setting(default_factory=dict, description="keyword arguments for the function")


class WarcSource(PathsSource):
    """Web archives: pages of WARC files, and the text of WET files, plain or with .gz or .zst."""

    source: Literal["warc"] = setting("warc", "kind of source")
    extractor: Extractor = setting("bessemer", "how a page's main text is found")


class HtmlSource(PathsSource):
    """Trees and archives of saved pages."""

    source: Literal["html"] = setting("html", "kind of source")
    extractor: Extractor = setting("bessemer", "how a page's main text is found")
    base_url: str | None = setting(None, "address of the tree's root, from which pages get theirs")


class FetchingSource(SourceSettings):
    """What every source that asks servers has."""

    name: str | None = setting(None, "what the documents' `source` says; the kind where it is not given", min_length=1)
    license: str | None = setting(None, "licence of pages that state none themselves")
    extractor: Extractor = setting("bessemer", "how a page's main text is found")
    max_document_bytes: int = setting(_DOCUMENT_BYTES, "larger pages are set aside and counted", unit="bytes", ge=1)
    max_pages: int | None = setting(None, "most pages that are fetched; all where it is not given", ge=1)
    user_agent: str = setting(
        "bessemer/1 (+research crawler)",
        "how the fetcher names itself; say who you are and how to reach you",
        affects_output=False,
    )
    seconds: float = setting(30.0, "longest time for one answer", unit="seconds", gt=0, affects_output=False)
    retries: int = setting(3, "further attempts, with growing waits, where they may help", ge=0, le=10, affects_output=False)
    allow_private: bool = setting(False, "may addresses inside a network be asked, such as localhost?")


class UrlsSource(FetchingSource):
    """Lists of addresses and sitemaps, fetched politely into the cache."""

    source: Literal["urls"] = setting("urls", "kind of source")
    urls: Strings = setting(default_factory=list, description="addresses of pages")
    lists: Strings = setting(default_factory=list, description="files with an address a line", affects_output=False)
    sitemaps: Strings = setting(default_factory=list, description="addresses of sitemaps, or of indexes of them")
    delay_seconds: float = setting(
        1.0,
        "least time between two requests to a host; a robots.txt may ask for more",
        unit="seconds",
        ge=0,
        affects_output=False,
    )
    hosts_at_once: int = setting(8, "hosts that are asked side by side", ge=1, le=256, affects_output=False)

    @field_validator("sitemaps")
    @classmethod
    def _something(cls, value: list[str], info: Any) -> list[str]:
        if not (value or info.data.get("urls") or info.data.get("lists")):
            raise ValueError("a source of urls needs `urls`, `lists` or `sitemaps`")
        return value


class CommonCrawlSource(FetchingSource):
    """The pages of some domains out of one of Common Crawl's crawls, found by its index."""

    source: Literal["common_crawl"] = setting("common_crawl", "kind of source")
    crawl: str = setting(..., "the crawl, such as `CC-MAIN-2025-30`", pattern=r"^[A-Za-z0-9-]+$")
    domains: Strings = setting(..., "domains, their subdomains included", min_length=1)
    index: str = setting("https://index.commoncrawl.org", "server of the index", affects_output=False)
    data: str = setting("https://data.commoncrawl.org", "server of the archives", affects_output=False)
    delay_seconds: float = setting(0.2, "time before each request", unit="seconds", ge=0, affects_output=False)
    requests_at_once: int = setting(4, "requests under way at a time", ge=1, le=64, affects_output=False)


class WholeFilesSource(PathsSource):
    """What every source that holds a file in memory has."""

    max_file_bytes: int = setting(_FILE_BYTES, "larger files are set aside and counted", unit="bytes", ge=1)


class EpubSource(WholeFilesSource):
    """Electronic books."""

    source: Literal["epub"] = setting("epub", "kind of source")
    by_chapter: bool = setting(False, "make a document of each chapter instead of each book")


class PdfSource(WholeFilesSource):
    """The text layer of PDF files."""

    source: Literal["pdf"] = setting("pdf", "kind of source")
    seconds: float = setting(60.0, "longest time for one file", unit="seconds", gt=0)


class LatexSource(WholeFilesSource):
    """Papers: arXiv's tar files, and folders and archives of single papers."""

    source: Literal["latex"] = setting("latex", "kind of source")
    seconds: float = setting(20.0, "longest time for one paper", unit="seconds", gt=0)


class MediaWikiSource(PathsSource):
    """XML dumps of Wikipedia and other wikis."""

    source: Literal["mediawiki"] = setting("mediawiki", "kind of source")
    namespaces: list[int] = setting(default_factory=lambda: [0], description="numbers of the namespaces that are read")
    seconds: float = setting(20.0, "longest time for one page", unit="seconds", gt=0)


class DocsSource(PathsSource):
    """Documentation: Markdown and reStructuredText trees, and HTML inside packages."""

    source: Literal["docs"] = setting("docs", "kind of source")
    extractor: Extractor = setting("bessemer", "how a page's main text is found")


class CodeSource(PathsSource):
    """Git checkouts and archives of code."""

    source: Literal["code"] = setting("code", "kind of source")
    languages: list[str] = setting(default_factory=list, description="languages that are read; empty reads every known one")
    max_document_bytes: int = setting(1 << 20, "longer files are set aside and counted", unit="bytes", ge=1)


class StackExchangeSource(PathsSource):
    """`Posts.xml` of the Stack Exchange dumps: each question with its answers."""

    source: Literal["stack_exchange"] = setting("stack_exchange", "kind of source")
    min_score: int | None = setting(None, "questions with a lower score are left out")


class DiscourseSource(WholeFilesSource):
    """Topics of Discourse forums as JSON."""

    source: Literal["discourse"] = setting("discourse", "kind of source")
    base_url: str | None = setting(None, "address of the forum, from which topics get theirs")


class MboxSource(PathsSource):
    """Archives of mailing lists."""

    source: Literal["mbox"] = setting("mbox", "kind of source")


class ChatsSource(PathsSource):
    """Conversations as JSON lines."""

    source: Literal["chats"] = setting("chats", "kind of source")
    messages: str | None = setting(None, "key of the list of messages; the usual ones are tried where it is not given")


class ColumnsConfig(Config):
    """Which columns hold what."""

    text: str = setting("text", "column of the text")
    id: str | None = setting(None, "column of a name that never changes; a column `id` is used where there is one")
    url: str | None = setting(None, "column of the address")
    license: str | None = setting(None, "column of the licence")
    language: str | None = setting(None, "column of the language")
    metadata: list[str] | None = setting(None, "columns kept as metadata; all others where it is not given")


class TablesSource(WholeFilesSource):
    """Parquet, CSV and JSON lines."""

    source: Literal["tables"] = setting("tables", "kind of source")
    columns: ColumnsConfig = Field(default_factory=ColumnsConfig, description="which columns hold what")


class HuggingFaceSource(SourceSettings):
    """Data sets of the Hugging Face Hub, streamed, or in a folder as `datasets` reads and writes them."""

    source: Literal["hugging_face"] = setting("hugging_face", "kind of source")
    name: str | None = setting(None, "what the documents' `source` says; the kind where it is not given", min_length=1)
    dataset: str = setting(..., "the data set, such as `HuggingFaceFW/fineweb`, or its folder", min_length=1)
    configuration: str | None = setting(None, "its configuration, such as `sample-10BT`")
    split: str = setting("train", "its split")
    revision: str | None = setting(None, "a commit, so that a repeat reads the same rows")
    columns: ColumnsConfig = Field(default_factory=ColumnsConfig, description="which columns hold what")
    license: str | None = setting(None, "licence of rows that state none")
    max_document_bytes: int = setting(_DOCUMENT_BYTES, "longer documents are set aside and counted", unit="bytes", ge=1)


_CODE = "bessemer.data.sources"


def _own(module: str, name: str, description: str, kind: type[SourceSettings]) -> SourcePlugin:
    """A source that the function `open_NAME` of one of our modules opens."""
    return SourcePlugin(name, description, f"{_CODE}.{module}:open_{name}", kind)


OWN_SOURCES = (
    SourcePlugin(
        "wheels",
        "documentation inside pinned packages",
        f"{_CODE}.docs:open_wheels",
        WheelsSource,
        f"{_CODE}.docs:wheels_fingerprint",
    ),
    _own("python_docs", "python_docs", "docstrings of the interpreter's standard library", PythonDocsSource),
    _own("canaries", "canaries", "random texts, planted to measure what a model memorises", CanariesSource),
    _own("files", "files", "text and JSONL files", FilesSource),
    _own("warc", "warc", "web archives", WarcSource),
    _own("html", "html", "saved web pages", HtmlSource),
    _own("web", "urls", "addresses and sitemaps, fetched", UrlsSource),
    _own("web", "common_crawl", "pages of some domains out of a crawl of Common Crawl", CommonCrawlSource),
    _own("epub", "epub", "electronic books", EpubSource),
    _own("papers", "pdf", "the text layer of PDF files", PdfSource),
    _own("papers", "latex", "papers in LaTeX", LatexSource),
    _own("mediawiki", "mediawiki", "dumps of wikis", MediaWikiSource),
    _own("docs", "docs", "trees of documentation", DocsSource),
    _own("code", "code", "trees and archives of code", CodeSource),
    _own("forums", "stack_exchange", "dumps of Stack Exchange", StackExchangeSource),
    _own("forums", "discourse", "topics of forums", DiscourseSource),
    _own("mbox", "mbox", "archives of mailing lists", MboxSource),
    _own("files", "chats", "conversations as JSON lines", ChatsSource),
    _own("tables", "tables", "Parquet, CSV and JSON lines", TablesSource),
    SourcePlugin(
        "hugging_face",
        "data sets of the Hugging Face Hub",
        f"{_CODE}.hugging_face:open_hugging_face",
        HuggingFaceSource,
        f"{_CODE}.hugging_face:hugging_face_fingerprint",
    ),
)
SOURCES: Registry[SourceOpener] = Registry("source", "bessemer.sources", OWN_SOURCES)

#: What `source: file.py:function` means; no name of the registry.
USER_SOURCE = SourcePlugin("user", "a user's own function", f"{_CODE}.user:open_user_function", UserSource)


def source_plugin(name: str) -> SourcePlugin:
    """The declaration of a source, ours or another package's, or that of a `file.py:function`. Raises ConfigError when there is
    none, or its settings are not those of a source."""
    if is_user_function(name):
        return USER_SOURCE
    plugin = SOURCES.find(name)
    if not isinstance(plugin, SourcePlugin) or plugin.settings is None:
        raise ConfigError(f"the entry point {name!r} of {SOURCES.group} is not a SourcePlugin with settings")
    if not issubclass(plugin.settings, SourceSettings):
        raise ConfigError(f"the settings of the source {name!r} are not SourceSettings")
    return plugin


def source_name(source: SourceSettings) -> str:
    """The name under which a source's documents are kept and from which their ids are made."""
    stated: str | None = getattr(source, "name", None)
    return stated or source.source.rpartition(":")[2]


def open_source(settings: SourceSettings, folder: Path, cache: Path) -> Source:
    """The source that the settings describe; its paths are relative to `folder`, downloads lie in `cache`. Raises SourceError
    or ConfigError when what the settings name does not exist."""
    return source_plugin(settings.source).load()(settings, folder, cache)


def source_fingerprint(
    settings: SourceSettings, *, cache: Path, folder: Path = Path(), fetch: bool = True, progress: Progress | None = None
) -> Any:
    """What a source's documents depend on beyond its settings, as a JSON value for the stage's key.

    fetch: whether the source may fetch what decides over its documents; otherwise it looks at the cache alone.
    Raises SourceError or ConfigError when what the source names does not exist.
    """
    own = source_plugin(settings.source).load_fingerprint()
    if own is not None:
        return own(settings, folder, cache, fetch, progress)
    from bessemer.data.sources.io.file_source import FileSource
    from bessemer.data.sources.io.paths import ContentFingerprints

    source = open_source(settings, folder.absolute(), cache)
    if isinstance(source, FileSource):
        return source.fingerprint(ContentFingerprints(cache, progress))
    return source.fingerprint()
