"""The ONNX files against PyTorch, and what they and the export say of themselves."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="pip install -r requirements-export.txt")
pytest.importorskip("onnxruntime", reason="pip install -r requirements-export.txt")

from dataset import CLASSES, load_dataset, normalise  # noqa: E402
from evaluate import temperature_of  # noqa: E402
from export import __main__ as command  # noqa: E402
from export import latency  # noqa: E402
from export.int8 import saturates  # noqa: E402
from export.layers import fold, unfold  # noqa: E402
from export.runtime import accuracy, open_model, predict  # noqa: E402
from model import NetDilated  # noqa: E402
from pretrained import load, load_metrics, save  # noqa: E402

ROOT = Path(__file__).parent.parent
FLOAT32, INT8 = (ROOT / "export" / name for name in (command.FLOAT32, command.INT8))
RESULTS = json.loads((ROOT / "export" / "results.json").read_text())


@pytest.fixture(scope="module")
def sample():
    """The sample's 1,000 test images."""
    return load_dataset("test", "sample")


@pytest.fixture(scope="module")
def expected(sample):
    """PyTorch's logits of them."""
    model, _ = load(NetDilated)
    with torch.inference_mode():
        batches = torch.from_numpy(sample.data).split(250)
        return torch.cat([model(normalise(batch)) for batch in batches]).numpy()


def values(proto):
    """Return the initialisers of a model as arrays, by name."""
    return {each.name: onnx.numpy_helper.to_array(each) for each in proto.graph.initializer}


def metadata(path):
    return open_model(path).get_modelmeta().custom_metadata_map


def test_the_float32_file_gives_pytorchs_probabilities_image_for_image(sample, expected):
    session = open_model(FLOAT32)
    logits, probabilities = (
        predict(session, sample.data, name) for name in ("logits", "probabilities")
    )
    temperature = temperature_of(load_metrics("NetDilated"))
    scaled = torch.from_numpy(expected / temperature).softmax(1).numpy()
    assert (logits.argmax(1) == expected.argmax(1)).all()
    assert np.abs(probabilities - scaled).max() < 1e-4


def test_the_float32_file_means_the_same_to_onnxs_reference_implementation(sample):
    from onnx.reference import ReferenceEvaluator

    images = sample.data[:2]
    (logits,) = ReferenceEvaluator(str(FLOAT32)).run(["logits"], {"images": images})
    assert np.abs(logits - predict(open_model(FLOAT32), images)).max() < 1e-4


def test_the_int8_file_has_the_committed_accuracy_and_is_close_to_float32(sample, expected):
    session = open_model(INT8)
    committed = RESULTS["models"][command.INT8]
    assert abs(accuracy(session, sample.data, sample.targets) - committed["sample_accuracy"]) <= 0.3
    assert np.mean(predict(session, sample.data).argmax(1) == expected.argmax(1)) > 0.98
    assert committed["test_accuracy"] > load_metrics("NetDilated")["test_accuracy"] - 0.3
    assert (
        committed["test_accuracy_fake_quantised"]
        > load_metrics("NetDilated")["test_accuracy"] - 0.3
    )


def test_no_sum_of_two_products_of_int8_leaves_16_bits():
    kernels = [value for name, value in values(onnx.load(INT8)).items() if value.dtype == np.int8]
    assert sum(kernel.size for kernel in kernels if kernel.ndim > 1) > 180_000
    assert max(np.abs(kernel.astype(int)).max() for kernel in kernels) <= 64  # 2 * 255 * 64 < 2**15


@pytest.mark.parametrize(
    "path, limit", [(FLOAT32, 800_000), (INT8, 300_000)], ids=["float32", "int8"]
)
def test_a_file_is_small_and_says_what_it_is(path, limit):
    facts, measured = metadata(path), RESULTS["models"][path.name]
    assert path.stat().st_size < limit
    assert facts["labels"].split(",") == list(CLASSES)
    assert facts["weights_sha256"] == RESULTS["sha256"] == load_metrics("NetDilated")["sha256"]
    assert facts["license"] == "MIT" and "CIFAR-10" in facts["origin"]
    assert facts["test_accuracy"].startswith(f"{measured['test_accuracy']:.2f} %")
    proto = onnx.load(path)
    assert [each.version for each in proto.opset_import] == [13]
    (images,) = proto.graph.input
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    shape = [each.dim_param or each.dim_value for each in images.type.tensor_type.shape.dim]
    assert shape == ["N", 32, 32, 3]


def test_the_file_has_as_many_weights_as_it_says():
    counted = sum(
        value.size
        for name, value in values(onnx.load(FLOAT32)).items()
        if re.match(r"(C\d|O)\.", name)
    )
    norms = sum(
        each.norm.weight.numel()
        for name in ("C1", "C2", "C3", "C4")
        for each in getattr(NetDilated(), name)
    )
    assert counted == int(metadata(FLOAT32)["parameters"]) == RESULTS["parameters"]
    assert counted == load_metrics("NetDilated")["parameters"] - norms


def test_folding_keeps_the_function_of_any_network():
    torch.manual_seed(0)
    model = NetDilated().train()
    model(torch.randn(8, 3, 32, 32))  # other statistics and, below, other scales than at the start
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.eval()
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    content = command.share(command.build(model, 1.0), fold(model)).SerializeToString()
    with torch.inference_mode():
        logits = model(normalise(images)).numpy()
    assert np.abs(predict(open_model(content), images) - logits).max() < 1e-3 * np.abs(logits).max()


def test_unfolding_agrees_with_the_layers_of_the_model():
    from model import MirrorConv2d

    conv = MirrorConv2d(4, 6)
    x = torch.randn(1, 4, 5, 5)
    kernel = torch.from_numpy(unfold(conv.weight.detach().numpy(), "standard"))
    assert torch.allclose(torch.nn.functional.conv2d(x, kernel, padding=1), conv(x), atol=1e-6)


def test_other_weights_are_exported_beside_them_with_no_accuracy(tmp_path, monkeypatch, capsys):
    metrics = {**load_metrics("NetDilated"), "history": {}, "test_accuracy": 99.9}
    metrics = save(NetDilated(), metrics, tmp_path)
    monkeypatch.setattr(command, "CALIBRATION", 50)
    command.main([str(tmp_path)])
    for name in (command.FLOAT32, command.INT8):
        facts = metadata(tmp_path / name)
        assert facts["weights_sha256"] == metrics["sha256"] != RESULTS["sha256"]
        assert not {"test_accuracy", "license"} & set(facts)
    assert "99.9" not in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert str(tmp_path) in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"no model", "too new"], ids=["damaged", "opset"])
def test_a_file_that_onnx_runtime_cannot_open_is_one_line(content, tmp_path):
    if content == "too new":
        proto = onnx.load(FLOAT32)
        proto.opset_import[0].version = 999
        content = proto.SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="pip install -U onnxruntime") as error:
        open_model(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_weights_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^export: .*NetDilated.pt is not there"):
        command.main([str(tmp_path)])


def test_saturation_is_found_by_adding():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "avx2" not in flags:
        pytest.skip("no x86 with AVX2")
    assert saturates() != ("avx512_vnni" in flags or "avx_vnni" in flags)


def test_the_python_of_the_readme_classifies_a_picture_without_torch():
    text = (ROOT / "export" / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in block.splitlines() if line]) <= 10
    no_torch = "import sys; sys.modules['torch'] = None\n"
    result = subprocess.run(
        [sys.executable, "-c", no_torch + block],
        cwd=ROOT / "export",
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ship")


def test_latency_is_measured_for_each_name_and_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "NAMES", (command.FLOAT32, command.INT8))
    output = tmp_path / "latency.json"
    latency.main(["--repeats", "1", "--seconds", "0", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert {row["name"] for row in rows} == {command.FLOAT32, command.INT8}
    assert all(row["ms_for_one_image"] > 0 and row["images_per_second"] > 0 for row in rows)


def test_pytorch_is_measured_with_the_same_images():
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    assert latency.pytorch(torch.get_num_threads())(images).shape == (2, 10)


def test_onnx_runtime_is_measured_in_a_process_without_torch():
    code = "import sys\nfrom export import latency\nlatency.measure('NetDilated.onnx', 1, 0)\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
