"""Files as students hand them in: each holds the same network, which has to be found in it."""

import json
import sys

import pytest

from checker.rules import Limits
from checker.sandbox import Job
from checker.server import check_files, preload

HEAD = "import torch\nimport torch.nn as nn\nimport torch.nn.functional as F\n"
NET = """
class Net(nn.Module):
    def __init__(self{arguments}):
        super(Net, self).__init__()
        {first}
        def cb(a, b, s=1, d=1):
            return nn.Sequential(nn.Conv2d(a, b, 3, s, d, d), nn.BatchNorm2d(b), nn.ReLU())
        def sep(a, b):
            return nn.Sequential(nn.Conv2d(a, a, 3, 1, 1, groups=a), nn.Conv2d(a, b, 1), nn.ReLU())
        self.block1 = nn.Sequential(cb(3, 16), cb(16, 16), cb(16, 16, 2))
        self.block2 = nn.Sequential(cb(16, 16), sep(16, 16), cb(16, 16, 2))
        self.block3 = nn.Sequential(cb(16, 16, 1, 2), cb(16, 16), cb(16, 16, 2))
        self.block4 = nn.Sequential(cb(16, 16), cb(16, 16), cb(16, 16, 2))
        self.fc = nn.Linear(16, {classes})
    def forward(self, x):
        x = self.block4(self.block3(self.block2(self.block1(x))))
        x = F.avg_pool2d(x, 2).view(-1, 16)
        return F.log_softmax(self.fc(x), dim=-1)
"""
DIGITS = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 10, 3)
    def forward(self, x):
        return self.conv(x).mean((2, 3))
"""


def net(arguments="", first="pass", classes="10", name="Net"):
    text = NET.replace("{arguments}", arguments).replace("{first}", first)
    return text.replace("{classes}", classes).replace("Net", name)


PLAIN = HEAD + net()


def notebook(*cells):
    """Return a notebook of code cells; a cell may be a pair of code and printed text."""
    made = []
    for cell in cells:
        code, shown = cell if isinstance(cell, tuple) else (cell, "")
        outputs = [{"output_type": "stream", "name": "stdout", "text": shown.splitlines(True)}]
        outputs.append({"output_type": "display_data", "data": {"image/png": "x"}})
        made.append({"cell_type": "code", "source": code.splitlines(True), "outputs": outputs})
    made.insert(0, {"cell_type": "markdown", "source": ["# Net"]})
    return json.dumps({"cells": made, "nbformat": 4, "metadata": {}})


LOG = """EPOCH: 1
Loss=0.9 Batch_id=390 Accuracy=99.99: 100%|##########| 391/391
Test set: Average loss: 1.2000, Accuracy: 5512/10000 (55.12%)
EPOCH: 2
Test set: Average loss: 0.5000, Accuracy: 8612/10000 (86.12%)
EPOCH: 3
Test set: Average loss: 0.5100, Accuracy: 8590/10000 (85.90%)
"""
GUESSED = "the arguments are guesses by their names"
CUT = "only imports, classes, functions and constants were executed (as a whole: "

FILES = {  # name of the file: its code, the network that the row names, a part of a note
    # arguments of the constructor
    "plain.py": (PLAIN, "Net", ""),
    "norm_type.py": (
        HEAD + net(", norm_type", "assert norm_type in ('BN', 'LN', 'GN')"),
        "Net(norm_type='BN')",
        GUESSED,
    ),
    "norm.py": (HEAD + net(", norm", "{'bn': 1, 'gn': 2}[norm]"), "Net(norm='bn')", GUESSED),
    "dropout.py": (HEAD + net(", dropout_value", "nn.Dropout(dropout_value)"), "", GUESSED),
    "classes.py": (
        HEAD + net(", num_classes", classes="num_classes", name="Model"),
        "Model(num_classes=10)",
        GUESSED,
    ),
    "five.py": (
        HEAD + net(", in_channels, base, num_classes, dropout, norm=None", classes="num_classes"),
        "Net(in_channels=3, base=16, num_classes=10, dropout=0.1)",
        GUESSED,
    ),
    "builds.py": (
        HEAD + net(", a, b, n, d", classes="n") + "model = Net(32, 64, 10, d=0.03)\n",
        "Net(32, 64, 10, d=0.03)",
        "",
    ),
    "in_main.py": (
        HEAD + net(", n", classes="n") + "N = 10\ndef main():\n    model = Net(N).to('cuda')\n",
        "Net(10)",
        "",
    ),
    "data.py": (
        HEAD
        + "from dataclasses import dataclass\n@dataclass\nclass Config:\n    n: int = 9\n"
        + net(", c", classes="c.n")
        + "open('nothing')\nnet = Net(Config(n=10))\n",
        "Net(Config(n=10))",
        CUT,
    ),
    "config.py": (
        HEAD + "class Config:\n    n = 10\n" + net(", c", classes="c.n") + "net = Net(Config)\n",
        "Net(Config)",
        "",
    ),
    # which network
    "numbered.py": (
        HEAD + "".join(net(name=f"Net{n}") for n in (1, 2, 3, 4)) + "model = Net3()\n",
        "Net3",
        "also in this file: Net1, Net2, Net4",
    ),
    "last.py": (HEAD + net(name="First") + net(), "Net", "also in this file: First"),
    "digits.py": (
        HEAD + net(name="ForColours") + DIGITS,
        "ForColours",
        "also in this file, but not for this task: Net does not run on (2, 3, 32, 32) images",
    ),
    "instance.py": (HEAD + net(name="_Part") + "model = nn.Sequential(_Part())\n", "model", ""),
    "wrapped.py": (PLAIN + "model = nn.DataParallel(Net())\n", "Net", ""),
    "function.py": (
        "def get_model():\n    from plain import Net\n    return Net()\n",
        "get_model",
        "",
    ),
    # imports
    "missing.py": (
        "import pandas_profiling, wandb\nfrom torchsummaryX import summary\nwandb.init(1)\n"
        + PLAIN
        + "summary(Net().to('cpu'), (3, 32, 32))\n@wandb.watch\ndef train(): pass\n",
        "Net",
        "missing packages, stood in for: pandas_profiling, wandb, torchsummaryX",
    ),
    "writer.py": (
        "from torch.utils.tensorboard import SummaryWriter\nw = SummaryWriter('runs')\n" + PLAIN,
        "Net",
        "",
    ),
    "lightning.py": (
        "import pytorch_lightning as pl\n" + PLAIN.replace("nn.Module", "pl.LightningModule"),
        "Net",
        "stood in for: pytorch_lightning",
    ),
    "neighbour.py": ("from parts.answer import Net\nfrom above import x\n", "Net", ""),
    "optional.py": (
        "try:\n    import google.colab\nexcept ImportError:\n    pass\n" + PLAIN,
        "",
        "",
    ),
    # module level
    "cuda.py": (PLAIN + "model = Net().to('cuda')\n", "Net", CUT + "RuntimeError: "),
    "arguments.py": (
        "import argparse\nparser = argparse.ArgumentParser()\n"
        "parser.add_argument('--lr', required=True)\nargs = parser.parse_args()\n" + PLAIN,
        "Net",
        CUT + "SystemExit 2)",
    ),
    "defaults.py": (
        "import argparse\nparser = argparse.ArgumentParser()\n"
        "parser.add_argument('--n', default=10)\nargs = parser.parse_args()\n"
        + HEAD
        + net(", n", classes="n")
        + "def main():\n    model = Net(args.n)\n",
        "Net(10)",
        "",
    ),
    "branches.py": (
        "import torch, os\nif torch.cuda.is_available():\n    raise ValueError\nelse:\n    N = 10\n"
        "if os.system('exit 1'):\n    N = 9\nopen('nothing')\n" + HEAD + net(classes="N"),
        "Net",
        CUT,
    ),
    "asks.py": ("epochs = int(input('epochs? '))\n" + PLAIN, "Net", CUT + "EOFError"),
    "exits.py": (PLAIN + "import sys\nsys.exit(0)\n", "Net", CUT + "SystemExit 0)"),
    "exits_hard.py": (PLAIN + "import os\nos._exit(3)\n", "Net", CUT + "ended its process with"),
    "reads.py": ("text = open('data/train.csv').read()\n" + PLAIN, "Net", CUT + "FileNotFound"),
    "sequential.py": (
        PLAIN + "open('nothing')\nmodel = nn.Sequential(Net(), nn.Identity()).to('cuda')\n",
        "model",
        CUT,
    ),
    "only_on_cuda.py": (
        PLAIN.replace("x = F.avg", "x = x + torch.zeros(1).cuda()\n        x = F.avg"),
        "Net",
        "",
    ),
    "exported.py": ("# coding\n!pip install x \\\n    y\n%matplotlib inline\n" + PLAIN, "Net", ""),
    # notebooks
    "plain.ipynb": (
        notebook(
            "!pip install torchsummary\n%matplotlib inline\n" + HEAD,
            net(),
            "from torchsummary import summary\nsummary(Net().to('cuda'), (3, 32, 32))",
            ("for epoch in range(3):\n    train(epoch)\n", LOG),
        ),
        "Net",
        "",
    ),
    "twice.ipynb": (
        notebook(HEAD, net().replace("s, d, d", "s, 1"), "this is no code", "%%time\n" + net()),
        "Net",
        "",
    ),
    "arguments.ipynb": (
        notebook(HEAD + net(", norm, n", classes="n"), "model = Net('x', n=10).cuda()"),
        "Net('x', n=10)",
        "",
    ),
    "writes.ipynb": (
        notebook("%%writefile mine.py\n" + PLAIN, "%%bash\nls", "from mine import Net"),
        "Net",
        "",
    ),
    "alias.ipynb": (
        notebook("from plain import Net as TheNet", "model = TheNet().to(device)"),
        "TheNet",
        "",
    ),
    "imports.ipynb": (notebook("%cd x\nfrom plain import Net\nnet = Net().cuda()"), "Net", ""),
}
NO_VERDICT = {  # name of the file: its code, a part of the reason
    "empty.py": ("", "there is no class of a network"),
    "unknown.py": ("import nothing_such", "these packages are missing: nothing_such"),
    "needs.py": (
        "from einops import rearrange\n"
        + PLAIN.replace("x = F", "x = rearrange(x)\n        x = F"),
        "Net does not run on (2, 3, 32, 32) images (No module named 'einops')",
    ),
    "syntax.py": ("print 'hello'\n" + PLAIN, "SyntaxError: Missing parentheses in call to 'print'"),
    "hundred.py": (HEAD + net(classes="100"), "Net turns (2, 3, 32, 32) images into (2, 100)"),
    "strange.py": (
        HEAD + net(", qqq"),
        "Net: TypeError: Net.__init__() missing 1 required positional argument: 'qqq'",
    ),
    "bad.ipynb": ("{", "this notebook can't be read"),
    "text.txt": ("", "this is neither a Python file nor a notebook"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Check all files in one run: {name: result}."""
    folder = tmp_path_factory.mktemp("course") / "answers"
    (folder / "parts").mkdir(parents=True)
    (folder.parent / "above.py").write_text("x = 1")
    (folder / "parts" / "answer.py").write_text(PLAIN)
    for name, (text, *_) in {**FILES, **NO_VERDICT}.items():
        (folder / name).write_text(text)
    names = list({**FILES, **NO_VERDICT})
    jobs = [Job(folder / name, "", Limits(), 30) for name in names]
    chosen = [(folder / "numbered.py", "Net2"), (folder / "classes.py", "Model(num_classes=9 + 1)")]
    chosen.append((folder / "numbered.py", "Nothing"))
    jobs += [Job(file, wanted, Limits(), 30) for file, wanted in chosen]
    names += [f"{file.name}:{wanted}" for file, wanted in chosen]
    preload([text for text, *_ in FILES.values()])
    return dict(zip(names, check_files(jobs, 2), strict=True))


@pytest.mark.parametrize("name", FILES)
def test_the_network_of_a_file_is_found(results, name):
    _, network, note = FILES[name]
    result = results[name]
    assert "error" not in result, result
    assert {row[2] for row in result["rows"][:10]} == {"holds"}
    assert result["mark"] == results["plain.py"]["mark"]
    assert result["network"] == (network or result["network"])
    assert note in "; ".join(result["notes"])
    assert bool(note) or not any(CUT in each for each in result["notes"])


@pytest.mark.parametrize("name", NO_VERDICT)
def test_a_file_without_a_verdict_has_its_reason_in_one_line(results, name):
    error = results[name]["error"]
    assert NO_VERDICT[name][1] in error and "\n" not in error


def test_the_network_can_be_chosen(results):
    assert results["numbered.py:Net2"]["network"] == "Net2"
    assert results["classes.py:Model(num_classes=9 + 1)"]["network"] == "Model(num_classes=9 + 1)"
    assert results["numbered.py:Nothing"]["error"] == "there is no Nothing in this file"


def test_the_claimed_accuracy_is_what_a_notebook_printed(results):
    row = ["test accuracy", "best 86.12 % (epoch 2, cell 5), last 85.9 % (epoch 3, cell 5)"]
    assert results["plain.ipynb"]["rows"][10] == [*row, "claimed"]
    assert results["plain.py"]["rows"][10] == ["test accuracy", "none found", "none found"]


def test_albumentations_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "albumentations", None)
    file = tmp_path / "net.py"
    file.write_text(f"import albumentations as A\nt = A.Compose([A.HorizontalFlip()])\n{PLAIN}")
    (result,) = check_files([Job(file, "", Limits(), 30)], 1)
    assert result["network"] == "Net" and len(result["rows"]) == 11
