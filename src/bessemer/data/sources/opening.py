"""From a source's settings to what reads it. Each reader's libraries are loaded when it is first asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bessemer.core.config import Config
from bessemer.data.sources import config as settings
from bessemer.data.sources.fetch import Limits
from bessemer.data.sources.source import Source
from bessemer.data.sources.tree import FileSource, Format

if TYPE_CHECKING:
    from bessemer.data.sources.tables import Columns
    from bessemer.data.sources.warc import Warc


def open_source(source: Config, folder: Path, cache: Path) -> Source:
    """The reader of a source of `sources/config.py`; its paths are relative to `folder`, what it fetches lies in `cache`."""
    if isinstance(source, settings.PathsSource):
        return FileSource(tuple(source.paths), folder, _format(source), source.license)
    if isinstance(source, settings.UrlsSource):
        from bessemer.data.sources.urls import Urls

        return Urls(
            cache,
            folder,
            _limits(source),
            _warc(source, by_url=True),
            urls=tuple(source.urls),
            lists=tuple(source.lists),
            sitemaps=tuple(source.sitemaps),
            max_pages=source.max_pages,
            delay_seconds=source.delay_seconds,
            hosts_at_once=source.hosts_at_once,
            license=source.license,
        )
    if isinstance(source, settings.CommonCrawlSource):
        from bessemer.data.sources.common_crawl import CommonCrawl

        return CommonCrawl(
            cache,
            source.crawl,
            tuple(source.domains),
            _limits(source),
            _warc(source),
            index=source.index,
            data=source.data,
            max_pages=source.max_pages,
            delay_seconds=source.delay_seconds,
            requests_at_once=source.requests_at_once,
            license=source.license,
        )
    if isinstance(source, settings.HuggingFaceSource):
        from bessemer.data.sources.hugging_face import HuggingFace

        return HuggingFace(
            source.dataset,
            source.max_document_bytes,
            source.configuration,
            source.split,
            source.revision,
            _columns(source.columns),
            source.license,
            place if (place := folder / source.dataset).is_dir() else None,
        )
    raise AssertionError(f"no reader for {type(source).__name__}")


def _format(source: settings.PathsSource) -> Format:
    most = source.max_document_bytes
    if isinstance(source, settings.WarcSource):
        return _warc(source)
    if isinstance(source, settings.HtmlSource):
        from bessemer.data.sources.html import Html
        from bessemer.data.sources.pages import Extraction

        return Html(most, Extraction(source.extractor), source.base_url)
    if isinstance(source, settings.EpubSource):
        from bessemer.data.sources.epub import Epub

        return Epub(source.max_file_bytes, most, source.by_chapter)
    if isinstance(source, settings.PdfSource):
        from bessemer.data.sources.pdf import Pdf

        return Pdf(source.max_file_bytes, most, source.seconds)
    if isinstance(source, settings.LatexSource):
        from bessemer.data.sources.latex import Latex

        return Latex(source.max_file_bytes, most, source.seconds)
    if isinstance(source, settings.MediaWikiSource):
        from bessemer.data.sources.mediawiki import MediaWiki

        return MediaWiki(most, tuple(source.namespaces), source.seconds)
    if isinstance(source, settings.DocsSource):
        from bessemer.data.sources.docs import Docs
        from bessemer.data.sources.pages import Extraction

        return Docs(most, Extraction(source.extractor))
    if isinstance(source, settings.CodeSource):
        from bessemer.data.sources.code import Code

        return Code(most, tuple(source.languages))
    if isinstance(source, settings.StackExchangeSource):
        from bessemer.data.sources.stack_exchange import StackExchange

        return StackExchange(most, source.min_score)
    if isinstance(source, settings.DiscourseSource):
        from bessemer.data.sources.discourse import Discourse

        return Discourse(source.max_file_bytes, most, source.base_url)
    if isinstance(source, settings.MboxSource):
        from bessemer.data.sources.mbox import Mbox

        return Mbox(most)
    if isinstance(source, settings.ChatsSource):
        from bessemer.data.sources.chats import Chats

        return Chats(most, source.messages)
    assert isinstance(source, settings.TablesSource)
    from bessemer.data.sources.tables import Tables

    return Tables(source.max_file_bytes, most, _columns(source.columns))


def _warc(source: settings.WarcSource | settings.FetchingSource, *, by_url: bool = False) -> Warc:
    from bessemer.data.sources.pages import Extraction
    from bessemer.data.sources.warc import Warc

    return Warc(source.max_document_bytes, Extraction(source.extractor), by_url)


def _limits(source: settings.FetchingSource) -> Limits:
    # Some bytes more than a document may have: a page is larger than its text, and an archive's record than its page.
    most = 4 * source.max_document_bytes + (1 << 20)
    return Limits(source.user_agent, source.seconds, most, retries=source.retries, allow_private=source.allow_private)


def _columns(columns: settings.ColumnsConfig) -> Columns:
    from bessemer.data.sources.tables import Columns

    return Columns(
        columns.text,
        columns.id,
        columns.url,
        columns.license,
        columns.language,
        None if columns.metadata is None else tuple(columns.metadata),
    )
