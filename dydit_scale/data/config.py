"""The part of a recipe that says what is read and how."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dydit_scale.data.mixture import whole_shares
from dydit_scale.data.remote import is_url


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several data sets that are read together. What is null is as in ``data``."""

    path: str
    """Folder with the shards and their index."""
    weight: float = 1.0
    """Its share of the samples, in proportion to the other sources' weights and whatever its size; positive. One that
    cannot be met within a twentieth in rounds of 1,000 is refused."""
    frames: int | None = None
    """``data.frames`` of this source; 1 makes a source of pictures beside those of clips."""
    frame_stride: int | None = None
    """``data.frame_stride`` of this source."""
    fps: float | None = None
    """``data.fps`` of this source."""
    images_per_clip: int | None = None
    """``data.images_per_clip`` of this source."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty; expected a folder of shards")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be a positive number, got {self.weight}; leave out what is not wanted")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read and how."""

    path: str = ""
    """Folder with the shards and their index, or its URL: s3://, gs://, hf:// or https://; or name several under
    ``sources``. In mode stream also the name of shards in it, with braces: DIR/shard-{000..099}.tar."""
    sources: tuple[SourceConfig, ...] = ()
    """Data sets that are mixed by weight, in place of ``path``."""
    mode: str = "indexed"
    """indexed: any position can be read, so a resume is exact, on any number of ranks. stream: shards without an index,
    from end to end, drawn with replacement; pictures only, not exactly resumable."""
    cache: str = ""
    """Folder on the node's own disk that keeps whole shards of a URL; empty reads each sample from the store."""
    cache_gib: float = 100.0
    """What the folder may hold, all processes of the node together; the shards in use must fit."""
    image_size: int = 32
    """Side of the square pictures, in pixels; others are resized on the shorter side and cropped at the centre."""
    buckets: bool = False
    """Read each picture in the nearest of several aspect ratios, all of about ``image_size`` squared pixels, in place
    of the square; each micro-batch is of one ratio."""
    bucket_step: int = 64
    """Both sides of a bucket are multiples of it."""
    max_aspect: float = 2.0
    """The longer side of a bucket is at most so many times the shorter one; what lies beyond is cropped."""
    bucket_batch: int = 8
    """Consecutive samples that come from one bucket and one source. Micro-batches must divide it; the order of samples
    depends on it, but not on micro-batches."""
    caption_dropout: float = 0.1
    """Share of positions without their caption ("" in its place) and label (-1), for classifier-free guidance."""
    frames: int = 1
    """Frames of a clip, from a start drawn for each position; 1 makes pictures, of clips one frame."""
    frame_stride: int = 1
    """A clip takes every so many-th frame of its source."""
    fps: float | None = None
    """Frames a second of a clip, taken by the times at which its source shows them; where it shows fewer they repeat.
    None takes them by number, see frame_stride."""
    images_per_clip: int = 0
    """Single pictures of other samples that follow each clip's frames, for joint training on clips and pictures."""
    workers: int = 0
    """Processes that read and decode; 0 does it in the training process. The batches are the same."""
    bad_samples: int = 100
    """How many different unusable samples of a source one process puts up with, those marked in the index included."""

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.sources):
            given = f"both (path {self.path!r} and {len(self.sources)} sources)" if self.path else "neither"
            raise ValueError(f"data.path, data.sources: expected one folder of shards or a list of them, got {given}")
        self._check_storage()
        if self.image_size < 1:
            raise ValueError(f"data.image_size must be at least 1, got {self.image_size}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"data.caption_dropout must lie in [0, 1], got {self.caption_dropout}")
        if self.frames < 1 or self.frame_stride < 1:
            raise ValueError(
                f"data.frames and data.frame_stride must be at least 1, got {self.frames} and {self.frame_stride}"
            )
        if self.fps is not None and not (0 < self.fps < math.inf and self.frame_stride == 1):
            raise ValueError(
                f"data.fps is {self.fps} with data.frame_stride {self.frame_stride}; expected a positive number and "
                "a frame_stride of 1"
            )
        if self.images_per_clip < 0 or (self.images_per_clip and self.frames == 1):
            raise ValueError(
                f"data.images_per_clip is {self.images_per_clip} with data.frames {self.frames}; expected 0 or more "
                "beside clips of at least 2 frames, and 0 for pictures"
            )
        if self.workers < 0:
            raise ValueError(f"data.workers cannot be negative, got {self.workers}")
        if self.bad_samples < 0:
            raise ValueError(f"data.bad_samples cannot be negative, got {self.bad_samples}")
        self._check_buckets()
        for number, source in enumerate(self.sources):
            try:
                self._alone(source)
            except ValueError as error:
                raise ValueError(f"data.sources[{number}]: {error}") from error
        whole_shares(self.weights)

    def split(self) -> tuple[DataConfig, ...]:
        """Each source as if it were read alone, with a ``path`` of its own."""
        return tuple(self._alone(source) for source in self.sources) or (self,)

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the sources."""
        return tuple(source.weight for source in self.sources) or (1.0,)

    @property
    def unit(self) -> int:
        """Samples that a micro-batch must divide; 0 if it need not, because all are of one size and source."""
        return self.bucket_batch if self.buckets or len(self.sources) > 1 else 0

    def check_micro_batch(self, micro_batch: int) -> None:
        """ValueError, saying what to set, if some micro-batches would hold several sizes or sources."""
        if self.unit and self.unit % micro_batch:
            sizes = [str(size) for size in range(1, self.unit + 1) if self.unit % size == 0]
            raise ValueError(
                f"data.bucket_batch {self.unit}: cannot be cut in micro-batches of {micro_batch}, each of one bucket "
                f"and one source; set data.bucket_batch={math.lcm(self.unit, micro_batch)} (or another multiple of "
                f"{micro_batch}), or train.batch_size and train.accumulation to micro-batches of {', '.join(sizes)}"
            )

    def _check_storage(self) -> None:
        if self.mode not in ("indexed", "stream"):
            raise ValueError(f"data.mode must be indexed or stream, got {self.mode!r}")
        if not self.cache_gib > 0:
            raise ValueError(f"data.cache_gib must be positive, got {self.cache_gib}")
        paths = [self.path] if self.path else [source.path for source in self.sources]
        urls = [is_url(path) for path in paths]  # refuses those that are not to be opened
        if self.cache and not any(urls):
            raise ValueError(f"data.cache {self.cache}: {', '.join(paths)} is local already; leave data.cache empty")
        if self.mode == "stream" and (self.cache or self.frames > 1 or self.fps or self.buckets or self.sources):
            raise ValueError(
                "data.mode stream reads one folder of pictures in squares and keeps no shards: expected data.frames 1, "
                f"data.buckets false, no data.sources, and data.cache empty; got {self.frames}, {self.buckets}, "
                f"{len(self.sources)} and {self.cache!r}. Index the shards for these"
            )

    def _alone(self, source: SourceConfig) -> DataConfig:
        own = {name: getattr(source, name) for name in ("frames", "frame_stride", "fps", "images_per_clip")}
        given = {name: value for name, value in own.items() if value is not None}
        cache = self.cache if is_url(source.path) else ""
        return replace(self, path=source.path, sources=(), cache=cache, **given)

    def _check_buckets(self) -> None:
        if self.bucket_step < 1 or self.bucket_batch < 1:
            raise ValueError(
                "data.bucket_step and data.bucket_batch must be at least 1, "
                f"got {self.bucket_step} and {self.bucket_batch}"
            )
        if not 1 <= self.max_aspect < math.inf:
            raise ValueError(f"data.max_aspect must be a number of at least 1, got {self.max_aspect}")
        if self.buckets and (over := self.image_size % self.bucket_step):
            near = [size for size in (self.image_size - over, self.image_size - over + self.bucket_step) if size]
            raise ValueError(
                f"data.image_size {self.image_size}: with data.buckets expected a multiple of data.bucket_step "
                f"{self.bucket_step}; take {' or '.join(map(str, near))}, or another step"
            )
