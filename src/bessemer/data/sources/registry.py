"""Declarations of the sources: of each its settings and the function that opens it.

Pure Python: a recipe is checked without the libraries that read its sources.
"""

from __future__ import annotations

from bessemer.core.errors import ConfigError
from bessemer.core.registry import Registry
from bessemer.core.usercode import is_user_function
from bessemer.data.plugins import SourceOpener, SourcePlugin
from bessemer.data.sources import config as settings

_FORMATS = "bessemer.data.sources.formats"
_ORIGINS = "bessemer.data.sources.origins"


def _own(package: str, name: str, description: str, kind: type[settings.SourceSettings]) -> SourcePlugin:
    """A source whose module is called as it is, and opened by the module's function `open_NAME`."""
    return SourcePlugin(name, description, f"{package}.{name}:open_{name}", kind)


OWN_SOURCES = (
    SourcePlugin(
        "wheels",
        "documentation inside pinned packages",
        f"{_ORIGINS}.wheels:open_wheels",
        settings.WheelsSource,
        f"{_ORIGINS}.wheels:wheels_fingerprint",
    ),
    _own(_ORIGINS, "python_docs", "docstrings of the interpreter's standard library", settings.PythonDocsSource),
    _own(_FORMATS, "files", "text and JSONL files", settings.FilesSource),
    _own(_FORMATS, "warc", "web archives", settings.WarcSource),
    _own(_FORMATS, "html", "saved web pages", settings.HtmlSource),
    _own(_ORIGINS, "urls", "addresses and sitemaps, fetched", settings.UrlsSource),
    _own(_ORIGINS, "common_crawl", "pages of some domains out of a crawl of Common Crawl", settings.CommonCrawlSource),
    _own(_FORMATS, "epub", "electronic books", settings.EpubSource),
    _own(_FORMATS, "pdf", "the text layer of PDF files", settings.PdfSource),
    _own(_FORMATS, "latex", "papers in LaTeX", settings.LatexSource),
    _own(_FORMATS, "mediawiki", "dumps of wikis", settings.MediaWikiSource),
    _own(_ORIGINS, "docs", "trees of documentation", settings.DocsSource),
    _own(_FORMATS, "code", "trees and archives of code", settings.CodeSource),
    _own(_FORMATS, "stack_exchange", "dumps of Stack Exchange", settings.StackExchangeSource),
    _own(_FORMATS, "discourse", "topics of forums", settings.DiscourseSource),
    _own(_FORMATS, "mbox", "archives of mailing lists", settings.MboxSource),
    _own(_FORMATS, "chats", "conversations as JSON lines", settings.ChatsSource),
    _own(_FORMATS, "tables", "Parquet, CSV and JSON lines", settings.TablesSource),
    _own(_ORIGINS, "hugging_face", "data sets of the Hugging Face Hub", settings.HuggingFaceSource),
)
SOURCES: Registry[SourceOpener] = Registry("source", "bessemer.sources", OWN_SOURCES)

#: What `source: file.py:function` means; no name of the registry.
USER_SOURCE = SourcePlugin("user", "a user's own function", f"{_ORIGINS}.user:open_user_function", settings.UserSource)


def source_plugin(name: str) -> SourcePlugin:
    """The declaration of a source, ours or another package's, or that of a `file.py:function`.

    Raises ConfigError when there is none, or its settings are not those of a source.
    """
    if is_user_function(name):
        return USER_SOURCE
    plugin = SOURCES.find(name)
    if not isinstance(plugin, SourcePlugin) or plugin.settings is None:
        raise ConfigError(f"the entry point {name!r} of {SOURCES.group} is not a SourcePlugin with settings")
    if not issubclass(plugin.settings, settings.SourceSettings):
        raise ConfigError(f"the settings of the source {name!r} are not SourceSettings")
    return plugin
