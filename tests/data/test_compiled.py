"""Loops are compiled again when something changes that they have from another file."""

import shutil
import subprocess
import sys
from pathlib import Path

import bessemer

PROGRAM = """
import sys
from pathlib import Path
from bessemer.data.text import compiled

def answer(number):
    for name in ("loop", "middle", "table"):
        sys.modules.pop(f"bessemer.data.text.{name}", None)
    compiled.imports_hash.cache_clear()
    Path(sys.argv[1], "table.py").write_text(f"NUMBER = {number}\\n")
    from bessemer.data.text.loop import double
    found = double(1)
    return found, sum(double.stats.cache_hits.values())

print([answer(number) for number in (3, 3, 4, 3)])
"""


def test_a_change_in_an_imported_file_compiles_a_loop_again(tmp_path):
    text = tmp_path / "bessemer" / "data" / "text"
    text.mkdir(parents=True)
    package = Path(bessemer.__file__).parent
    for name in ("__init__.py", "data/__init__.py", "data/text/__init__.py", "data/text/compiled.py"):
        shutil.copy(package / name, tmp_path / "bessemer" / name)
    shutil.copytree(package / "core", tmp_path / "bessemer" / "core", ignore=shutil.ignore_patterns("__pycache__"))
    (text / "middle.py").write_text("from bessemer.data.text.table import NUMBER\n")
    loop = "from bessemer.data.text.compiled import compiled\nfrom bessemer.data.text.middle import NUMBER\n"
    (text / "loop.py").write_text(loop + "@compiled\ndef double(factor):\n    return 2 * factor * NUMBER\n")
    command = [sys.executable, "-B", "-c", PROGRAM, str(text)]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(tmp_path)})
    assert said.stdout.strip() == "[(6, 0), (6, 1), (8, 0), (6, 0)]"
