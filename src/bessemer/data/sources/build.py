"""Sources from their settings. The code of a source is imported when it is first opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bessemer.core.progress import Progress
from bessemer.data.sources.config import SourceSettings
from bessemer.data.sources.registry import source_plugin
from bessemer.data.sources.source import Source


def open_source(settings: SourceSettings, folder: Path, cache: Path) -> Source:
    """The source that the settings describe; its paths are relative to `folder`, downloads lie in `cache`.

    Raises SourceError or ConfigError when what the settings name does not exist.
    """
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
    from bessemer.data.sources.io.paths import ContentFingerprints
    from bessemer.data.sources.io.tree import FileSource
    from bessemer.data.sources.origins.hugging_face import HuggingFace

    source = open_source(settings, folder.absolute(), cache)
    if isinstance(source, (FileSource, HuggingFace)):
        return source.fingerprint(ContentFingerprints(cache, progress))
    return source.fingerprint()
