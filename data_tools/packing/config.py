"""What ``dydit data pack`` is asked for: where captions and labels come from, what is converted and left out."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import ImageColor

CAPTIONS_FROM = ("files", "name")
LABELS_FROM = ("files", "folder")
FORMATS = ("auto", "png", "jpeg", "webp")
ANIMATED = ("first", "refuse")


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """All that the shards depend on beside their inputs."""

    caption_from: str = "files"
    """``files``: beside the input, in a metadata file or a column; ``name``: the file's name, its dashes and
    underscores as spaces."""
    labels_from: str = "files"
    """``files``: from a json beside the input or a column; ``folder``: the first folder of its path is its class."""
    image_column: str | None = None
    """Column of a table with paths or bytes; None to guess."""
    caption_column: str | None = None
    """Column of a table with captions; None to guess."""
    label_column: str | None = None
    """Column of a table with labels, numbers or names; None to guess."""
    root: str | None = None
    """Folder at which a table's paths start and which they may not leave; None for that of the table."""
    format: str = "auto"
    """Of pictures that are converted; ``auto`` makes a JPEG of a JPEG and a PNG of all else."""
    background: str = "white"
    """Colour under transparent pictures, as CSS writes it."""
    animated: str = "first"
    """Of animated pictures, take the first frame or drop them (``refuse``)."""
    max_side: int | None = None
    """Pictures with a longer side are shrunk to it."""
    min_side: int = 1
    """Pictures and clips with a shorter side are dropped."""
    max_aspect: float | None = None
    """Longer by shorter side, beyond which pictures and clips are dropped."""
    min_caption: int = 1
    """Characters; shorter captions are left out."""
    max_caption: int | None = None
    """Characters; longer captions are left out."""
    min_frames: int = 1
    """Clips with fewer frames are dropped."""
    keep_duplicates: bool = False
    """Pack inputs with equal bytes more than once."""
    shuffle: bool = False
    """Mix the inputs over the shards, by a hash of their names."""
    samples_per_shard: int = 2048
    """Inputs planned for a shard, at most."""
    shard_mib: int = 256
    """MiB of inputs planned for a shard, at most; a larger input has a shard of its own."""

    def __post_init__(self) -> None:
        for name, known in (
            ("caption_from", CAPTIONS_FROM),
            ("labels_from", LABELS_FROM),
            ("format", FORMATS),
            ("animated", ANIMATED),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("max_side", "min_side", "min_caption", "min_frames", "samples_per_shard", "shard_mib"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.max_aspect is not None and not self.max_aspect >= 1:
            raise ValueError(f"max_aspect: longer by shorter side is at least 1, got {self.max_aspect}")
        if self.max_caption is not None and self.max_caption < self.min_caption:
            raise ValueError(f"max_caption: {self.max_caption} is below min_caption, {self.min_caption}")
        if self.max_side is not None and self.max_side < self.min_side:
            raise ValueError(f"max_side: {self.max_side} is below min_side, {self.min_side}")
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise ValueError(f"background: {error}; expected a colour such as white or #202020") from error
