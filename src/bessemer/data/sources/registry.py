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

OWN_SOURCES = (
    SourcePlugin(
        "wheels",
        "documentation inside pinned packages",
        f"{_ORIGINS}.wheels:open_wheels",
        settings.WheelsSource,
        f"{_ORIGINS}.wheels:wheels_fingerprint",
    ),
    SourcePlugin(
        "python_docs",
        "docstrings of the interpreter's standard library",
        f"{_ORIGINS}.python_docs:open_python_docs",
        settings.PythonDocsSource,
    ),
    SourcePlugin("files", "text and JSONL files", f"{_FORMATS}.files:open_files", settings.FilesSource),
    SourcePlugin("warc", "web archives", f"{_FORMATS}.warc:open_warc", settings.WarcSource),
    SourcePlugin("html", "saved web pages", f"{_FORMATS}.html:open_html", settings.HtmlSource),
    SourcePlugin("urls", "addresses and sitemaps, fetched", f"{_ORIGINS}.urls:open_urls", settings.UrlsSource),
    SourcePlugin(
        "common_crawl",
        "pages of some domains out of a crawl of Common Crawl",
        f"{_ORIGINS}.common_crawl:open_common_crawl",
        settings.CommonCrawlSource,
    ),
    SourcePlugin("epub", "electronic books", f"{_FORMATS}.epub:open_epub", settings.EpubSource),
    SourcePlugin("pdf", "the text layer of PDF files", f"{_FORMATS}.pdf:open_pdf", settings.PdfSource),
    SourcePlugin("latex", "papers in LaTeX", f"{_FORMATS}.latex:open_latex", settings.LatexSource),
    SourcePlugin("mediawiki", "dumps of wikis", f"{_FORMATS}.mediawiki:open_mediawiki", settings.MediaWikiSource),
    SourcePlugin("docs", "trees of documentation", f"{_ORIGINS}.docs:open_docs", settings.DocsSource),
    SourcePlugin("code", "trees and archives of code", f"{_FORMATS}.code:open_code", settings.CodeSource),
    SourcePlugin(
        "stack_exchange",
        "dumps of Stack Exchange",
        f"{_FORMATS}.stack_exchange:open_stack_exchange",
        settings.StackExchangeSource,
    ),
    SourcePlugin("discourse", "topics of forums", f"{_FORMATS}.discourse:open_discourse", settings.DiscourseSource),
    SourcePlugin("mbox", "archives of mailing lists", f"{_FORMATS}.mbox:open_mbox", settings.MboxSource),
    SourcePlugin("chats", "conversations as JSON lines", f"{_FORMATS}.chats:open_chats", settings.ChatsSource),
    SourcePlugin("tables", "Parquet, CSV and JSON lines", f"{_FORMATS}.tables:open_tables", settings.TablesSource),
    SourcePlugin(
        "hugging_face",
        "data sets of the Hugging Face Hub",
        f"{_ORIGINS}.hugging_face:open_hugging_face",
        settings.HuggingFaceSource,
    ),
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
