from __future__ import annotations

import pytest

from dydit_scale.cli.main import main
from dydit_scale.workflows.export import FORMATS


def test_the_command_offers_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "{" + ",".join(FORMATS) + "}" in "".join(capsys.readouterr().out.split())
