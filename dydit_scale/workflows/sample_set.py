"""The folder of a set of pictures: what is wanted in it, how it was made, which blocks are there.

sampling.json                       what the pictures depend on; a start that would make others is refused
blocks/block-000000.safetensors     the first ``batch`` pictures, written aside and renamed, with a SHA-256
prompts.txt                         line i is the prompt, or the class, of picture i
pictures/000000.png                 or .mp4, if asked for
drawn.json                          how fast the last start drew
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dydit_scale.checkpoint.files import file_digest, rename_synced, write_synced
from dydit_scale.checkpoint.manifest import MANIFEST
from dydit_scale.data.video import require_av
from dydit_scale.models.families.dit import class_labels
from dydit_scale.models.family import Prompts, SampleConfig
from dydit_scale.models.registry import family_of
from dydit_scale.parallel.world import World, gather_objects
from dydit_scale.sampling.blocks import Blocks, DamagedBlockError
from dydit_scale.sampling.generate import sampler_timesteps
from dydit_scale.workflows.folders import told_when_full
from dydit_scale.workflows.runs import LoadedRun
from dydit_scale.workflows.sample import PackOptions

SETTINGS_FILE, PROMPTS_FILE, RESULT_FILE = "sampling.json", "prompts.txt", "drawn.json"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How many pictures, and where to."""

    num: int
    """Of pictures, or clips."""
    out: Path
    """Folder of the set."""
    npz: Path | None = None
    """File with all of them."""
    pictures: bool = False
    """Also as numbered PNG, or MP4."""
    prompts: Sequence[str] = ()
    """They take turns; none for all classes in turn."""
    fps: int = 8
    """Of clips as MP4."""

    @property
    def npz_aside(self) -> Path:
        """Where the npz is written before it has its name."""
        assert self.npz is not None, "no npz is wanted"
        return self.npz.with_name(f".{self.npz.name}.part")

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"--num: expected 1 or more pictures, got {self.num}")
        if self.npz is None and not self.pictures:
            raise ValueError("nothing to write: give --npz FILE, --pictures, or both")
        if self.npz is not None and (self.npz.suffix != ".npz" or self.npz.is_dir()):
            raise ValueError(f"--npz {self.npz}: expected a file that ends in .npz")
        if not 1 <= self.fps <= 50:
            raise ValueError(f"--fps: expected 1 to 50, got {self.fps}")

    def blocks(self, size: int) -> Blocks:
        """Of so many pictures each."""
        return Blocks(self.out / "blocks", size, self.num)

    @property
    def picture_folder(self) -> Path:
        """Of PNG and MP4."""
        return self.out / "pictures"

    def picture_name(self, number: int, *, clip: bool) -> str:
        """Of one file; names sort as numbers do."""
        return f"{number:0{max(6, len(str(self.num - 1)))}d}.{'mp4' if clip else 'png'}"


@dataclass(frozen=True)
class Subjects:
    """What is to be seen, in turn."""

    prompts: list[str]
    labels: np.ndarray | None
    """Classes int64, for models of classes."""

    def of(self, numbers: range) -> list[str]:
        """The prompts of these pictures."""
        return [self.prompts[i % len(self.prompts)] for i in numbers]

    @property
    def digest(self) -> str:
        """How many, and which."""
        return f"{len(self.prompts)}:{hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()[:16]}"


def find_subjects(run: LoadedRun, prompts: Sequence[str]) -> Subjects:
    """The prompts that are given, or all classes; ValueError if the model does not know one, or needs them."""
    family = family_of(run.pipeline)
    if odd := [prompt for prompt in prompts if not prompt.strip() or len(prompt.splitlines()) > 1]:
        raise ValueError(f"prompt {odd[0]!r}: expected one line of text, for prompts are noted a line each")
    if family.reads_text:
        if not prompts:
            raise ValueError(f"run {run.folder}: its model reads text; give --prompts FILE or --prompt TEXT")
        return Subjects(list(prompts), None)
    classes = family.num_classes(run.pipeline.transformer.config)
    prompts = list(prompts) or [str(label) for label in range(classes or 1)]
    if classes is None:
        return Subjects(prompts, None)
    return Subjects(prompts, class_labels(run.pipeline, Prompts(captions=prompts), classes).numpy())


def check_request(run: LoadedRun, settings: SampleConfig, wanted: Wanted) -> None:
    """Raise ValueError if the model cannot draw so, or the pictures would lie among others."""
    family_of(run.pipeline).latent_shape(run.pipeline, settings.size)
    sampler_timesteps(run.pipeline, settings)
    if not wanted.pictures:
        return
    if settings.frames > 1:
        require_av()
    expected = {wanted.picture_name(i, clip=settings.frames > 1) for i in range(wanted.num)}
    if others := sorted(path.name for path in wanted.picture_folder.glob("*") if path.name not in expected):
        raise ValueError(
            f"{wanted.picture_folder}: holds {others[0]} and {len(others) - 1} more files that are none of these "
            f"{wanted.num} pictures; take them away, or choose another --out"
        )


def made_by(run: LoadedRun, settings: SampleConfig, subjects: Subjects, packing: PackOptions) -> dict[str, Any]:
    """All that the pictures depend on but ``batch``, which may have to be found; for JSON."""
    return {
        "checkpoint": file_digest(run.checkpoint.path / MANIFEST)[:16],
        "step": run.checkpoint.step,
        "precision": run.recipe.engine.precision,
        **{name: value for name, value in asdict(settings).items() if name != "batch"},
        "prompts": subjects.digest,
        "fixed_tokens": packing.fixed_tokens,
        "execution": packing.execution,
        **{name: value for name, value in _rounding(packing).items() if value},
    }


def _rounding(packing: PackOptions) -> dict[str, Any]:
    """Ways to run that change pictures, too; absent where they are off, as from sets without these options."""
    return {name: getattr(packing, name) for name in ("share_scores", "weights", "fused_tokens")}


def recorded_batch(wanted: Wanted, making: dict[str, Any], batch: int | None) -> int | None:
    """The batch of the blocks that are there; ``batch`` if there are none.

    Raises ValueError if they were made otherwise, naming all that differs, or the folder holds other things.
    """
    recorded = wanted.out / SETTINGS_FILE
    if not recorded.is_file():
        if held := sorted(path.name for path in wanted.out.iterdir() if not path.name.startswith(".")):
            raise ValueError(
                f"{wanted.out}: holds {held[0]}, but no {SETTINGS_FILE} that says how pictures in it were made; choose "
                "another --out"
            )
        return batch
    try:
        found = dict(json.loads(recorded.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{recorded}: cannot be read ({error}); choose another --out") from error
    now = {**making, "batch": found.get("batch") if batch is None else batch}
    if different := [f"{n} {found.get(n)}, now {now.get(n)}" for n in {**found, **now} if found.get(n) != now.get(n)]:
        raise ValueError(
            f"{wanted.out}: its pictures were made otherwise: {'; '.join(different)}. Two kinds would be mixed: put "
            "these back, or choose another --out"
        )
    return now["batch"]


def begin(wanted: Wanted, making: dict[str, Any], settings: SampleConfig, missing: int) -> None:
    """Say how pictures are made before the first is; ValueError if the disk does not hold the ``missing`` ones."""
    blocks = wanted.blocks(settings.batch).folder
    blocks.mkdir(exist_ok=True)
    for aside in (*blocks.glob(".*.part"), *([wanted.npz_aside] if wanted.npz else [])):
        aside.unlink(missing_ok=True)
    _check_space(wanted, missing, settings)
    text = json.dumps({**making, "batch": settings.batch}, indent=1) + "\n"
    write_whole(wanted.out / SETTINGS_FILE, text.encode())


def _check_space(wanted: Wanted, missing: int, settings: SampleConfig) -> None:
    """Blocks and the npz hold plain pixels, so that their sizes are known."""
    places = {wanted.out: missing}
    if wanted.npz is not None:
        wanted.npz.parent.mkdir(parents=True, exist_ok=True)
        places[wanted.npz.parent] = places.get(wanted.npz.parent, 0) + wanted.num
    needed: dict[int, int] = {}
    for folder, count in places.items():
        disk = folder.stat().st_dev
        needed[disk] = needed.get(disk, 0) + count * settings.height * settings.width * 3 * settings.frames
        if (free := shutil.disk_usage(folder).free) < needed[disk]:
            raise ValueError(
                f"{folder}: {needed[disk] / 2**30:.1f} GiB of pictures are to be written, {free / 2**30:.1f} GiB are "
                "free; free some space, or choose another disk"
            )


def missing_blocks(blocks: Blocks, world: World) -> list[int]:
    """Blocks that are not there, or not whole. Collective: each rank reads a share."""
    share = range(world.rank, len(blocks), world.world_size)
    there = [block for block in share if blocks.path(block).is_file()]
    bad, hidden = [], not (world.is_main and there)
    for block in tqdm(there, desc="comparing checksums", unit="block", disable=hidden, dynamic_ncols=True):
        try:
            blocks.read(block)
        except DamagedBlockError as error:
            tqdm.write(f"{error}; it is drawn again")
            bad.append(block)
    found = gather_objects(world, [*bad, *sorted(set(share) - set(there))])
    return sorted(block for part in found for block in part)


def write_whole(path: Path, data: bytes) -> None:
    """Aside first: a file that has its name is whole. ValueError if the disk is full."""
    aside = path.with_name(f".{path.name}.part")
    with told_when_full(path.parent, "the blocks that are missing"):
        write_synced(aside, data)
        rename_synced(aside, path)
