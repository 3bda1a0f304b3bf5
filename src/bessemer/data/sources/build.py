"""From a source's settings to what reads it. Each reader's libraries are loaded when it is first asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bessemer.core.config import Config
from bessemer.core.hashing import hash_file
from bessemer.core.progress import Progress
from bessemer.core.usercode import load_user_function
from bessemer.data.config import FilesSource, PythonDocsSource, UserSource, WheelsSource
from bessemer.data.sources import config as settings
from bessemer.data.sources.http.fetch import Limits
from bessemer.data.sources.io.tree import FileSource, Format
from bessemer.data.sources.source import Source

if TYPE_CHECKING:
    from bessemer.data.sources.formats.tables import Columns
    from bessemer.data.sources.formats.warc import Warc
    from bessemer.data.sources.origins.lock import Pin


def open_source(source: Config, folder: Path, cache: Path) -> Source:
    """The reader of a source; its paths are relative to `folder`, what it fetches lies in `cache`.

    Raises SourceError or ConfigError when what the settings name does not exist.
    """
    if isinstance(source, WheelsSource):
        from bessemer.data.sources.origins.lock import lock_path
        from bessemer.data.sources.origins.wheels import Wheels

        return Wheels(lock_path(source.lock, folder), cache)
    if isinstance(source, PythonDocsSource):
        from bessemer.data.sources.origins.python_docs import PythonDocs

        return PythonDocs()
    if isinstance(source, FilesSource):
        from bessemer.data.sources.formats.files import files_source

        return files_source(source.paths, folder, source.max_document_bytes, source.license)
    if isinstance(source, UserSource):
        from bessemer.data.sources.origins.user import UserFunction

        load_user_function(source.source, folder)  # a mistake is found before anything is read
        return UserFunction(source.source, folder, source.options)
    if isinstance(source, settings.PathsSource):
        return FileSource(tuple(source.paths), folder, _format(source), source.license)
    if isinstance(source, settings.UrlsSource):
        from bessemer.data.sources.origins.urls import Urls

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
        from bessemer.data.sources.origins.common_crawl import CommonCrawl

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
        from bessemer.data.sources.origins.hugging_face import HuggingFace

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


def source_fingerprint(
    source: Config, *, cache: Path, folder: Path = Path(), fetch: bool = True, progress: Progress | None = None
) -> Any:
    """What a source's documents depend on beyond its settings, as a JSON value for the stage's key.

    An optional source of wheels is fetched here, since whether it can be decides what is collected; with `fetch`
    false only the cache is looked at.
    Raises SourceError or ConfigError when what the source names does not exist.
    """
    if isinstance(source, WheelsSource):
        from bessemer.data.sources.origins.lock import lock_path, read_lock

        path = lock_path(source.lock, folder)
        if source.optional and not _available(read_lock(path), cache, fetch, progress):
            return {"lock": None}
        return {"lock": hash_file(path)}
    return open_source(source, folder.absolute(), cache).fingerprint()


def _available(pins: list[Pin], cache: Path, fetch: bool, progress: Progress | None) -> bool:
    from bessemer.data.sources.origins.lock import DownloadError, cached_wheel, fetch_wheels

    if not fetch:
        return all(cached_wheel(pin, cache) for pin in pins)
    try:
        return bool(fetch_wheels(pins, cache, progress))
    except DownloadError:
        return False


def _format(source: settings.PathsSource) -> Format:
    most = source.max_document_bytes
    if isinstance(source, settings.WarcSource):
        return _warc(source)
    if isinstance(source, settings.HtmlSource):
        from bessemer.data.sources.formats.html import Html
        from bessemer.data.sources.formats.pages import Extraction

        return Html(most, Extraction(source.extractor), source.base_url)
    if isinstance(source, settings.EpubSource):
        from bessemer.data.sources.formats.epub import Epub

        return Epub(source.max_file_bytes, most, source.by_chapter)
    if isinstance(source, settings.PdfSource):
        from bessemer.data.sources.formats.pdf import Pdf

        return Pdf(source.max_file_bytes, most, source.seconds)
    if isinstance(source, settings.LatexSource):
        from bessemer.data.sources.formats.latex import Latex

        return Latex(source.max_file_bytes, most, source.seconds)
    if isinstance(source, settings.MediaWikiSource):
        from bessemer.data.sources.formats.mediawiki import MediaWiki

        return MediaWiki(most, tuple(source.namespaces), source.seconds)
    if isinstance(source, settings.DocsSource):
        from bessemer.data.sources.formats.pages import Extraction
        from bessemer.data.sources.origins.docs import Docs

        return Docs(most, Extraction(source.extractor))
    if isinstance(source, settings.CodeSource):
        from bessemer.data.sources.formats.code import Code

        return Code(most, tuple(source.languages))
    if isinstance(source, settings.StackExchangeSource):
        from bessemer.data.sources.formats.stack_exchange import StackExchange

        return StackExchange(most, source.min_score)
    if isinstance(source, settings.DiscourseSource):
        from bessemer.data.sources.formats.discourse import Discourse

        return Discourse(source.max_file_bytes, most, source.base_url)
    if isinstance(source, settings.MboxSource):
        from bessemer.data.sources.formats.mbox import Mbox

        return Mbox(most)
    if isinstance(source, settings.ChatsSource):
        from bessemer.data.sources.formats.chats import Chats

        return Chats(most, source.messages)
    assert isinstance(source, settings.TablesSource)
    from bessemer.data.sources.formats.tables import Tables

    return Tables(source.max_file_bytes, most, _columns(source.columns))


def _warc(source: settings.WarcSource | settings.FetchingSource, *, by_url: bool = False) -> Warc:
    from bessemer.data.sources.formats.pages import Extraction
    from bessemer.data.sources.formats.warc import Warc

    return Warc(source.max_document_bytes, Extraction(source.extractor), by_url)


def _limits(source: settings.FetchingSource) -> Limits:
    # Some bytes more than a document may have: a page is larger than its text, and an archive's record than its page.
    most = 4 * source.max_document_bytes + (1 << 20)
    return Limits(source.user_agent, source.seconds, most, retries=source.retries, allow_private=source.allow_private)


def _columns(columns: settings.ColumnsConfig) -> Columns:
    from bessemer.data.sources.formats.tables import Columns

    return Columns(
        columns.text,
        columns.id,
        columns.url,
        columns.license,
        columns.language,
        None if columns.metadata is None else tuple(columns.metadata),
    )
