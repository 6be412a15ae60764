"""The command for a folder of answers: its table, and what files can't do to the instructor's."""

import codecs
import csv
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from answers import ConvBlocks
from checker import command
from checker.command import Progress, main
from checker.report import rule_names, short_names
from checker.rules import Limits, check_rules
from checker.sandbox import Job, copy_with_neighbours
from checker.server import check_files
from dataset import train_transform
from test_checker_students import PLAIN, notebook

SMALL = """
import torch.nn as nn
class {}(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""
NET = SMALL.format("Net")
OLD_CALL = """
import albumentations as A
mean = [255 * each for each in (0.4914, 0.4822, 0.4465)]
train_transforms = A.Compose([A.HorizontalFlip(), A.ShiftScaleRotate(), A.CoarseDropout(max_holes=1,
    max_height=16, max_width=16, min_holes=1, min_height=16, min_width=16, fill_value=mean,
    mask_fill_value=None, p=0.5)])
test_transforms = A.Compose([A.Normalize()])
"""


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return [str(folder / f"{name}.py") for name in files]


# ---------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Run the command on a folder: its status, what it printed, and the cells of its CSV."""
    folder = tmp_path_factory.mktemp("course") / "answers"
    folder.mkdir()
    long_name = "a_network_of_a_name_" * 3
    write(
        folder,
        kept=OLD_CALL + PLAIN,
        copied=PLAIN.replace("Net", "Mine").replace("block", "part"),
        other=SMALL.format(long_name) + "\nclass Schön(Net if 0 else nn.Module): pass\n",
        fails="import nothing_such\nraise ValueError('=1+1 \\x1b[31m')",
        **{"a_file_of_a_long_name_" * 4: NET},
    )
    (folder / "trained.ipynb").write_text(notebook(PLAIN, ("pass", "Test Accuracy: 85.5%")))
    (folder / "lib").mkdir()
    (folder / "lib" / "helper.py").write_text("def train(): pass")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "old.py").write_text("")
    path = folder.parent / "table.csv"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *text, **_: printed.extend(text))
        status = main([str(folder), "--csv", str(path)])
    assert path.read_bytes().startswith(codecs.BOM_UTF8)
    return (
        status,
        "\n".join(printed),
        list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines())),
    )


def test_a_folder_of_answers_is_a_table_that_fits_and_that_any_encoding_can_print(table):
    status, text, _ = table
    assert status == 3  # a file has no verdict
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110 and text.replace("ö", "").isascii() and "\x1b" not in text
    rows = {line.split()[0]: line.split() for line in lines if re.match(r"\w\S*\s\s", line)}
    assert rows["file"][3:] == [chr(ord("A") + place) for place in range(16)]
    assert "".join(rows["kept.py"][3:]) == "hhhhhhhhhhnhhhho"
    assert "".join(rows["copied.py"][3:]) == "hhhhhhhhhhn-----"
    assert "".join(rows["trained.ipynb"][3:]) == "hhhhhhhhhhc-----"
    assert "".join(rows["other.py"][3:]) == "BBBhBBBhhhn-----"
    assert rows["fails.py"][1:3] == ["no", "verdict"] and "helper" not in text
    assert "K claimed: test accuracy: best 85.5 % (cell 3), last 85.5 % (cell 3)" in text
    assert "F BROKEN: a depthwise-separable convolution: 0: no grouped convolution" in text
    assert "augmentation: of 2 transforms, train_transforms" in text


def test_identical_networks_share_a_mark(table):
    _, text, cells = table
    marks = {Path(row[0]).name: row[2] for row in cells[1:]}
    assert marks["kept.py"] == marks["copied.py"] == marks["trained.ipynb"] != marks["other.py"]
    assert f"the same network, {marks['kept.py']}: copied.py, kept.py, trained.ipynb" in text


def test_the_csv_has_all_measurements(table):
    _, _, (head, *cells) = table
    assert head[:4] == ["file", "network", "copy", "four blocks"] and head[-1] == "error"
    rows = {Path(row[0]).name: dict(zip(head, row, strict=True)) for row in cells}
    assert rows["other.py"]["a dilated convolution"] == "BROKEN: 0"
    assert rows["kept.py"]["no pooling but the final one"] == "holds: none"
    hole = rows["kept.py"]["CoarseDropout: one 16x16 hole"]
    assert hole.startswith("holds: 16x16: old argument names, which albumentations 2 ignores")
    assert "num_holes_range=(1, 1)" in hole and rows["kept.py"]["Resize"].startswith("optional")
    assert "its definitions alone" in rows["fails.py"]["error"]


@pytest.mark.parametrize(
    "text, status", [(PLAIN, 0), (NET, 1), ("", 3)], ids=["holds", "broken", "no verdict"]
)
def test_the_exit_status(tmp_path, text, status):
    assert main(write(tmp_path, answer=text)) == status


def test_limits_are_options_and_a_pattern_is_expanded(tmp_path, capsys):
    write(tmp_path, one=PLAIN, two=PLAIN)
    options = ["--max-parameters", "1,000", "--min-receptive-field", "200", "--long"]
    assert main([str(tmp_path / "*.py"), f"{tmp_path}/one.py:Net", *options]) == 1
    text = capsys.readouterr().out
    assert text.count("J BROKEN: fewer than 1,000 parameters") == 3
    assert text.count("E BROKEN: receptive field above 200: ") == 3
    assert "B holds: three convolutions in each: 3 3 3 3" in text and "one.py:Net" in text


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["nothing.py"], "nothing.py: there is no such file"),
        (["*.nothing"], "there is no such file"),
        (["{folder}"], "no Python file and notebook in it"),
        (["{folder}", "--timeout", "0"], "'0': choose a number above 0"),
        (["{folder}", "--max-parameters", "many"], "'many': choose a number above 0"),
        ([], "the following arguments are required: FILE"),
    ],
)
def test_an_error_of_the_command_is_one_line(tmp_path, capsys, arguments, text):
    with pytest.raises(SystemExit) as error:
        main([each.format(folder=tmp_path) for each in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and text in lines[-1]


def test_a_table_that_cannot_be_written_is_one_line_and_still_shown(tmp_path, capsys):
    path = str(tmp_path / "nowhere" / "table.csv")
    assert main([*write(tmp_path, net=NET), "--csv", path]) == 2
    shown = capsys.readouterr()
    assert "net.py" in shown.out and f"{path} could not be written (No such file" in shown.err


def test_the_help_says_that_files_are_executed(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "The code is executed." in text and "Accidents are caught; malice is not" in text


def test_paths_are_shortened_to_what_differs(tmp_path):
    assert short_names(["/a/b/anna/model.py", "/a/b/ben/model.py"]) == ["anna", "ben"]
    assert short_names(["/a/b/x.py", "/a/b/c/y.py"]) == ["x.py", "c/y.py"]
    assert short_names(["/a/b/x.py"]) == ["x.py"]


def test_the_progress_bar_is_drawn_on_a_terminal_only(capsys, monkeypatch):
    progress = Progress(4)
    progress.show(2)
    assert not capsys.readouterr().err
    monkeypatch.setattr(progress, "shown", True)
    progress.show(2)
    progress.clear()
    assert "[###############...............] 2 of 4, 0 s" in capsys.readouterr().err


HIDING = """
from torch import nn
import model, layout, rows  # layout and rows are names of the checker's modules, too
import lean
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(*model.layers(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def test_from_any_folder_and_no_file_of_a_student_hides_a_module_from_the_checker(tmp_path):
    write(
        tmp_path,
        net=HIDING,
        model="from torch import nn\ndef layers(): return [nn.Conv2d(3, 10, 3)]",
        lean="import sys\nassert not {'albumentations', 'cv2', 'torch._dynamo'} & {*sys.modules}",
        **{name: "raise SystemExit('mine')" for name in ("csv", "types", "random", "torch")},
        **dict.fromkeys(("rules", "rows", "layout", "tracer"), ""),
    )
    home = Path(__file__).parent.parent / "checker"
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        [sys.executable, home, "net.py"], cwd=tmp_path, env=environment, capture_output=True
    )
    text = result.stdout.decode()
    assert result.returncode == 1 and not result.stderr, result.stderr
    assert "C1 has 1 convolution: 0 3x3 3->10" in text and "only imports" not in text


# ---------------------------------------------------------------- accidents

ACCIDENTS = {  # name of the file: its code, and a part of its error, "" if it has a verdict
    "loop": ("while True: pass", "took longer than"),
    "forward": (NET + "    def forward(self, x):\n        while True: pass\n", "took longer than"),
    "forks": (
        "import subprocess, time\nfor _ in range(80): subprocess.Popen(['sleep', '99'])\n"
        "time.sleep(99)",
        "more than 64 processes",
    ),
    "bomb": ("import os\nwhile True: os.fork()\n", "its definitions alone: there is no class"),
    "daemon": (
        "import os, subprocess\nsubprocess.Popen(['sleep', '7654'], start_new_session=True)\n"
        "if os.fork() == 0:\n    os.setsid()\n    os.execvp('sleep', ['sleep', '7654'])\n" + NET,
        "",
    ),
    "forked": ("import os\nos.fork()\n" + NET, ""),
    "deletes": (
        "import glob, os, shutil, sys\nopen(sys.argv[0], 'w').write('')\n"
        "for each in ('.', '..', '../..', '../../..', '~', '$TMPDIR'):\n"
        "    shutil.rmtree(os.path.expandvars(os.path.expanduser(each)), ignore_errors=True)\n"
        + NET,
        "",
    ),
    "prints": ("import sys\nfor _ in range(100): print('x' * 10**6, file=sys.stderr)\n" + NET, ""),
    "writes": ("f = open('big', 'wb')\nfor _ in range(9): f.write(bytes(10**7))", "File too large"),
    "forges": (
        "import json, os, sys\nrows = [['four blocks', '4', 'holds']] * 16\n"
        "text = json.dumps({'network': 'x', 'rows': rows, 'notes': [], 'mark': '', 'offline': 1})\n"
        "for number in range(3, 99):\n    try: os.write(number, text.encode())\n"
        "    except OSError: pass\nos._exit(0)\n",
        "with exit code 0, without a result",
    ),
    "closes": ("import os\nos.closerange(0, 99)\n" + NET, ""),
    "kills": ("import os\nos.killpg(0, 9)", "by a signal (SIGKILL)"),
    "crashes": ("import ctypes\nctypes.string_at(0)", "by a signal (SIGSEGV)"),
    "threads": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=[999]).start()\n" + NET,
        "",
    ),
    "downloads": ("import socket\nsocket.create_connection(('1.1.1.1', 80), 2)\n" + NET, ""),
    "leaves": ("import os\nos.chdir('/')\n" + NET, ""),
    "big": ("import torch\nx = torch.empty(5 * 2**30, dtype=torch.uint8)", "RuntimeError"),
    "good": (NET, ""),
}


def running(text):
    """Return the processes whose command line has a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [path.parent.name] if text.encode() in path.read_bytes() else []
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def accidents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course") / "answers"
    folder.mkdir()
    (folder / "precious.txt").write_text("not to be lost")
    files = write(folder, **{name: text for name, (text, _) in ACCIDENTS.items()})
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}
    seconds = {name: 4 if "took" in reason else 30 for name, (_, reason) in ACCIDENTS.items()}
    seconds["bomb"] = 4
    pairs = zip(files, seconds.values(), strict=True)
    jobs = [Job(Path(file), "", Limits(), timeout) for file, timeout in pairs]
    results = dict(zip(ACCIDENTS, check_files(jobs, 4), strict=True))
    after = {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}
    assert after == before
    return results


@pytest.mark.parametrize("name", ACCIDENTS)
def test_an_accident_of_a_file_is_its_own(accidents, name):
    result, reason = accidents[name], ACCIDENTS[name][1]
    if reason:
        assert reason in result["error"]
    else:
        assert result["network"] == "Net" and result["rows"][1][1].startswith("1: C1 has 1")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="only Linux adopts what leaves")
def test_nothing_that_a_file_has_started_is_left(accidents):
    assert "error" not in accidents["daemon"] and not running("sleep\x007654")


def test_where_the_system_can_deny_it_there_is_no_network(accidents):
    result = accidents["downloads"]
    if result["offline"]:
        assert "unreachable" in " ".join(result["notes"])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="only Linux ends all with the command")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_command_ends_the_files(tmp_path, number):
    mark = str(8000 + number)
    text = f"import subprocess\nsubprocess.Popen(['sleep', '{mark}'], start_new_session=True)\n"
    files = write(tmp_path, endless=text + "while True: pass\n")
    command = os.fork()  # quicker than another Python
    if not command:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(files))
    end = time.monotonic() + 20
    while not running(f"sleep\x00{mark}") and time.monotonic() < end:
        time.sleep(0.05)
    assert running(f"sleep\x00{mark}")
    os.kill(command, number)
    assert os.waitpid(command, 0)[1] == (number if number == signal.SIGKILL else 130 << 8)
    while running(f"sleep\x00{mark}") and time.monotonic() < end:
        time.sleep(0.05)
    assert not running(f"sleep\x00{mark}")


def test_neighbours_are_copied_up_to_a_size_and_others_not(tmp_path):
    home = tmp_path / "course" / "anna"
    (home / "parts").mkdir(parents=True)
    (home / ".git").mkdir()
    for name, size in (
        ("model.py", 10),
        ("large.py", 2**20 + 1),
        ("weights.pt", 10),
        ("parts/block.py", 10),
        (".git/config.py", 10),
        ("../utils.py", 10),
        ("../ben/model.py", 10),
        *((f"../data{number:02}.csv", 2**20) for number in range(22)),
    ):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_bytes(bytes(size))
    copy = copy_with_neighbours(home / "model.py", tmp_path / "copy")
    files = [path for path in copy.parent.parent.rglob("*") if path.is_file()]
    assert copy.parent.name == "anna" and copy.parent.parent.name == "course"
    names = {str(path.relative_to(copy.parent.parent)) for path in files}
    assert {"anna/model.py", "anna/parts/block.py", "utils.py", "ben/model.py"} <= names
    assert not names & {"anna/large.py", "anna/weights.pt", "anna/.git/config.py"}
    assert sum(path.stat().st_size for path in files) <= 20 * 2**20


def test_a_system_without_fork_is_told_so(monkeypatch, capsys):
    monkeypatch.delattr(command.os, "fork")
    with pytest.raises(SystemExit):
        main(["."])
    assert "use Linux, macOS or WSL" in capsys.readouterr().err


def test_the_table_has_a_column_for_every_rule():
    """A rule that is added to `check_rules` alone would not be shown."""
    rows = check_rules(ConvBlocks(), train_transform())
    columns = rule_names(Limits())
    assert [row.rule for row in rows] == [rule for rule in columns if rule != "test accuracy"]
