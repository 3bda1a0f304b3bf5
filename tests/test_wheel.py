"""What travels in the wheel: lists, recipes, locks and the extractor's model are data files, which a build can forget."""

import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]


def test_every_file_of_the_package_is_in_the_wheel_and_nothing_else(tmp_path):
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path))
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "bessemer").rglob("*") if path.is_file()}
    assert inside == {name for name in package if "__pycache__" not in name}
    kinds = {name.rpartition(".")[2] for name in inside}
    assert {"yaml", "lock", "json", "css", "js", "svg", "jinja", "txt", "py", "cpp", "h"} <= kinds
