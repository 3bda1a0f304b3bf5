"""Settings of the stage `pictures`. Imports neither PyTorch nor a reader of pages."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import field_validator, model_validator

from bessemer.core.config import Config, setting
from bessemer.core.usercode import is_user_function
from bessemer.data.plugins import Strings

#: Raised when the same settings and inputs give other rows than before.
PICTURES_VERSION = 1

#: Words of which a text says nothing about a picture, where it consists of them.
BOILERPLATE = (
    *("image", "img", "picture", "pic", "photo", "photograph", "thumbnail", "thumb", "screenshot", "graphic", "figure", "alt"),
    *("logo", "icon", "avatar", "banner", "button", "spacer", "placeholder", "loading", "advertisement", "ad", "sponsored"),
    *("share", "print", "search", "menu", "close", "home", "next", "previous", "read", "more", "click", "here", "enlarge"),
    *(
        "profile",
        "user",
        "author",
        "cover",
        "header",
        "footer",
        "background",
        "untitled",
        "null",
        "undefined",
        "none",
        "default",
    ),
    *("bild", "foto", "immagine", "imagen", "imagem", "facebook", "twitter", "instagram", "youtube", "linkedin", "pinterest"),
)


class PictureSource(Config):
    """Pages or documents whose pictures are read."""

    source: Literal["html", "warc", "pdf"] = setting(
        ..., "html: saved pages with their pictures in the same tree or archive; warc: both in one archive; pdf: documents"
    )
    name: str | None = setting(None, "what the rows' `source` says; the kind where it is not given", min_length=1)
    paths: Strings = setting(..., "files, folders and patterns such as `dumps/*.gz`", min_length=1, affects_output=False)
    license: str | None = setting(None, "licence of everything in it that states none itself, best as an SPDX identifier")
    base_url: str | None = setting(None, "of html: address of the tree's root, from which pages get theirs")

    @model_validator(mode="after")
    def _base_is_of_a_tree(self) -> Self:
        if self.base_url is not None and self.source != "html":
            raise ValueError("base_url: the address of a tree of saved pages; other sources know their addresses")
        return self

    @property
    def title(self) -> str:
        """What its rows say."""
        return self.name or self.source


class PicturesConfig(Config):
    """Pictures with their captions and alt texts, and which of them become rows."""

    sources: list[PictureSource] = setting(..., "where pictures are found", min_length=1)
    min_side: int = setting(64, "least length of a picture's shorter side", unit="pixels", ge=1)
    max_aspect: float = setting(4.0, "how many times as long as the shorter side the longer may be", ge=1)
    near_duplicates: int | None = setting(
        6,
        "most bits, of 64, in which perceptual hashes of near-duplicates differ; the first of them is kept; none: all are",
        unit="bits",
        ge=0,
        le=15,
    )
    min_words: int = setting(3, "fewest words of a text, in Chinese and Japanese characters", unit="words", ge=1)
    max_characters: int = setting(1000, "longest text", unit="characters", ge=1)
    boilerplate: list[str] = setting(
        default_factory=lambda: list(BOILERPLATE),
        description="words, in small letters, of which a text says nothing where at least half of its words are among them",
    )
    most_of_a_text: int | None = setting(
        3, "most pictures with the same text, of which more are a site's furniture; none: no limit", unit="pictures", ge=1
    )
    languages: list[str] = setting(
        default_factory=list, description="languages (ISO 639) of texts that are kept, by the filter `language`; empty: all"
    )
    licenses: list[str] = setting(
        default_factory=list, description="licences that are kept; empty: all, also where none is stated"
    )
    opted_out: Literal["drop", "keep"] = setting("drop", "pictures of pages that object to training or mining")
    filters: list[str] = setting(
        default_factory=list,
        description="functions of one's own, `file.py:function`: called with a row, a text says why it is left out",
        code=True,
    )
    max_side: int | None = setting(None, "pictures with a longer side are made smaller; none: they stay as they are", ge=16)
    max_picture_bytes: int = setting(32 << 20, "larger files of pictures are left out", unit="bytes", ge=1)
    max_page_bytes: int = setting(16 << 20, "larger pages are left out", unit="bytes", ge=1)
    max_file_bytes: int = setting(256 << 20, "larger PDF files are left out", unit="bytes", ge=1)
    seconds: float = setting(60.0, "longest time for one PDF file", unit="seconds", gt=0)

    @field_validator("filters")
    @classmethod
    def _are_functions(cls, names: list[str]) -> list[str]:
        for name in names:
            if not is_user_function(name):
                raise ValueError(f"{name!r} must be file.py:function")
        return names

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        titles = [source.title for source in self.sources]
        if len(set(titles)) < len(titles):
            raise ValueError("sources: two of them need two names")
        return self
