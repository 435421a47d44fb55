"""What a run refuses before anything is loaded: a batch that does not divide, data that the model cannot learn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dydit_scale.checkpoint.store import Checkpoint
from dydit_scale.data.reader import check_times
from dydit_scale.data.shards import ShardIndex
from dydit_scale.data.stream import ShardStream
from dydit_scale.models.loading import family_of_base, transformer_config
from dydit_scale.parallel.world import World
from dydit_scale.train.recipe import Recipe


def check_batch(recipe: Recipe, world: World) -> None:
    """ValueError, with the nearest sizes that fit, unless batches divide over ranks and micro-batches, and these divide
    what the data give of one size."""
    accumulation, ranks = recipe.train.accumulation, world.world_size
    for name, parts in (("batch_size", ranks * accumulation), ("evaluate_samples", ranks)):
        size = getattr(recipe.train, name)
        if size % parts:
            micro = f" x {accumulation} micro-batches" if parts > ranks else ""
            raise ValueError(
                f"train.{name} {size}: not divisible by {ranks} ranks{micro}; "
                f"the nearest that fit are {max(parts, size - size % parts)} and {size - size % parts + parts}"
            )
    recipe.data.check_micro_batch(recipe.train.batch_size // ranks // accumulation)


def check_data(recipe: Recipe, index: ShardIndex | ShardStream) -> None:
    """ValueError if the base's model cannot learn from such samples: captions or classes that it needs and no sample
    has, a class beyond its last one, clips of another length, or rectangles for a model of squares. Of a stream nothing
    is known beforehand."""
    base, folder = recipe.model.base, index.place
    family = family_of_base(base)
    if recipe.data.frames > 1 and not family.makes_videos:
        raise ValueError(
            f"data.frames {recipe.data.frames}: {family.pipeline_class.__name__} makes pictures, not clips; "
            "set data.frames to 1, which takes one frame of each clip"
        )
    lengths = family.clip_lengths(transformer_config(base, family))
    if recipe.data.frames not in lengths:
        raise ValueError(
            f"data.frames {recipe.data.frames}: the model of {base} makes clips of {lengths[0]}; set data.frames to "
            "that, and data.images_per_clip for single pictures"
        )
    if recipe.data.buckets and not family.any_size:
        raise ValueError(
            f"data.buckets: {family.pipeline_class.__name__} makes squares of one size, which its table of positions "
            "was made for; set data.buckets to false"
        )
    if isinstance(index, ShardStream):
        return
    check_times(recipe.data, index)
    good = index.good
    captions = bool((good & index.has_caption).any())
    if family.reads_text:
        if not captions:
            raise ValueError(
                f"{folder}: no sample has a caption, and {family.pipeline_class.__name__} learns from captions; "
                "add a .txt or .json to each sample, or choose a base of classes"
            )
        return
    classes = family.num_classes(transformer_config(base, family))
    if classes is None:
        return
    if index.labels is None:
        if not captions:
            raise ValueError(
                f"{folder}: no sample has a class; add a .cls (0 to {classes - 1}) to each, or the class's name as .txt"
            )
        return
    without = np.flatnonzero(good & (index.labels < 0))
    if len(without):
        raise ValueError(
            f"{folder}: {index.name(int(without[0]))} has no class while others do ({len(without)} samples in all), "
            "and would be learnt as a picture of none; add a .cls to each, or take these samples out"
        )
    beyond = np.flatnonzero(good & (index.labels >= classes))
    if len(beyond):
        first = int(beyond[0])
        raise ValueError(
            f"{folder}: {index.name(first)} has class {index.labels[first]}, but the model of {base} knows the classes "
            f"0 to {classes - 1} ({len(beyond)} samples in all); choose a base with more classes, or mend the labels"
        )


def check_same(checkpoint: Checkpoint, folder: Path, *, data: str, base: str) -> None:
    """ValueError if data or base are not those that the checkpoint was made with."""
    for name, now in (("data", data), ("base", base)):
        if (then := checkpoint.meta.get(name)) != now:
            raise ValueError(
                f"run {folder}: its {name} changed since step {checkpoint.step} "
                f"(digest {str(then)[:12]}, now {now[:12]}); a resume would mix two. "
                f"Put the old {name} back, or start a new run=FOLDER"
            )
