"""Run by each of several ranks: encodes the data of the world that is given, then trains on them."""

from __future__ import annotations

import sys
from pathlib import Path

from dydit_scale.parallel.world import close, init_world
from dydit_scale.train.loop import train
from dydit_scale.workflows.encode import encode_data
from tests.train.encoded_worlds import encoded_recipe


def main(made: Path, out: Path) -> None:
    world = init_world(device="cpu")
    encode_data(encoded_recipe(made, "flux", made / "shards"), out / "encoded", world, batch=4)
    run = str(out / "encoded-run")
    train(encoded_recipe(made, "flux", out / "encoded", run=run, engine={"name": "fsdp"}), world)
    close(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
