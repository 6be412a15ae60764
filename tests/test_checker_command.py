"""The command for a folder of answers."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checker.command import check_file, main

NET = """
import torch.nn as nn
import model  # the student's own, beside this file
print("not part of the table")
class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
class {}(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = model.layers()
    def forward(self, x):
        return self.layers(x)
class Other(nn.Module):
    {}
if __name__ == "__main__":
    raise SystemExit("this would train")
"""
LAYERS = """
from torch import nn
def layers():
    return nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""

DIGITS = """
import torch.nn as nn
class ForDigits(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def test_a_folder_of_answers_is_one_table(tmp_path, capsys):
    """The class Net, another one, a function Net, and files that fail in their own ways."""
    files = {
        "net.py": NET.format("Net", "pass"),
        "mine.py": NET.format("Mine", "def __init__(self, a): pass"),
        "function.py": LAYERS.replace("layers", "Net"),
        "fails.py": "import nothing_such",
        "leaves.py": "import os; os._exit(3)",
        "empty.py": "",
        "digits.py": DIGITS,
        "notebook.ipynb": "{}",
    }
    folder = tmp_path / "torch"  # whose name must not hide the package
    folder.mkdir()
    for name, text in {**files, "model.py": LAYERS}.items():
        (folder / name).write_text(text)
    main([*(str(folder / name) for name in files), "--csv", str(tmp_path / "table.csv")])
    lines, notes = capsys.readouterr().out.split("\n\n")
    rows = {
        line.split()[0]: line.split()[1:]
        for line in lines.splitlines()
        if line.startswith(str(tmp_path))
    }
    assert len(set(map(len, rows.values()))) == 1 and len(rows) == 8
    net, mine, function, *errors = rows.values()
    assert (net[0], mine[0], function[0]) == ("Net", "Mine", "Net") and net[1:] == mine[
        1:
    ] == function[1:]
    assert {cell for cells in errors for cell in cells} == {"error"}
    assert net[1:5] == ["BROKEN", "BROKEN", "BROKEN", "holds"]
    for text in (
        "ModuleNotFoundError: No module named 'nothing_such'",
        "with exit code 3",
        "no class of a network",
        "ForDigits does not run on (2, 3, 32, 32) images",
        "ValueError: this is no Python file",
    ):
        assert text in " ".join(notes.split())
    assert "three convolutions in each: 1: C1 has 1 convolution: layers.0 3x3 3->10" in notes
    head, *cells = csv.reader((tmp_path / "table.csv").read_text(encoding="utf-8").splitlines())
    assert head[:3] == ["file", "network", "four blocks"] and head[-1] == "error"
    assert (
        [len(row) for row in cells] == [13] * 8
        and cells[0][5] == "holds: none"
        and "nothing_such" in cells[3][-1]
    )


OLD_SESSIONS = """
import torch.nn as nn
from .block import Convolution  # of the package that the file's folder is
from models.block import Convolution
class Answer(nn.Sequential):
    def __init__(self):
        super().__init__(Convolution(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
class Older(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 10, 3), nn.MaxPool2d(9), nn.MaxPool2d(3), nn.Flatten())
class Broken(nn.Module):
    def __init__(self):
        super(Net, self).__init__()
"""


def test_a_table_that_cannot_be_written_is_one_line_and_still_shown(tmp_path, capsys):
    (tmp_path / "net.py").write_text(LAYERS.replace("layers", "Net"))
    with pytest.raises(
        SystemExit, match="^checker: .*table.csv could not be written \\(No such file or directory"
    ):
        main([str(tmp_path / "net.py"), "--csv", str(tmp_path / "nowhere" / "table.csv")])
    assert "holds" in capsys.readouterr().out


def test_of_several_networks_in_a_file_the_one_that_keeps_the_most_rules_counts(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "block.py").write_text("from torch.nn import Conv2d as Convolution")
    (tmp_path / "models" / "model.py").write_text(OLD_SESSIONS)
    name, rows = check_file(str(tmp_path / "models" / "model.py"))
    assert name == "Answer" and rows[3].verdict == "holds"


HIDING = """
from torch import nn
import model, layout, rows  # layout and rows are names of the checker's modules, too
import albumentations_stays_out
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(*model.layers(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def test_from_any_folder_and_no_file_of_a_student_hides_a_module_from_the_checker(tmp_path):
    files = {
        "net.py": HIDING,
        "model.py": "from torch import nn\ndef layers(): return [nn.Conv2d(3, 10, 3)]",
        "albumentations_stays_out.py": "import sys; assert 'albumentations' not in sys.modules",
    }
    for name in ("csv", "types", "random", "torch"):
        files[f"{name}.py"] = "raise SystemExit('this hides a module')"
    for name in ("rules", "rows", "layout", "tracer"):
        files[f"{name}.py"] = ""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, Path(__file__).parent.parent / "checker", "net.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "net.py" in result.stdout and "C1 has 1 convolution: 0 3x3" in result.stdout


def test_a_file_that_does_not_end_is_stopped(tmp_path):
    (tmp_path / "endless.py").write_text("while True: pass")
    assert check_file(str(tmp_path / "endless.py"), timeout=1) == "took longer than 1 seconds"


def test_the_help_says_that_files_are_executed(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "The files are executed" in text
        and "the network is Net, or else the nn.Module class that keeps" in text
    )
