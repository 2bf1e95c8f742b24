"""The torchvision hook, tried on stand-in torchvisions in fresh interpreters."""

import subprocess
import sys
from pathlib import Path

import pytest

from m3_plugin.host import torchvision_ops

# Imports its parts in torchvision's order: extension first, then the shape functions.
_PACKAGE = {
    "__init__.py": "from torchvision import extension, _meta_registrations\n",
    "extension.py": "",
    "_meta_registrations.py": (
        "import torch\n"
        "for op in ('nms', 'qnms'):\n"
        "    torch.library.register_fake('torchvision::' + op)(lambda *args: None)\n"
    ),
}
_WORKING_EXTENSION = (
    "import torch\n"
    "library = torch.library.Library('torchvision', 'DEF')\n"
    "for op in ('nms', 'qnms'):\n"
    "    library.define(op + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
    "    library.impl(op, lambda dets, scores, iou_threshold: scores, 'CPU')\n"
)
# An installed hook would be found by name and used instead of the module under test.
_HOOK = (
    "import sys\n"
    "sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != '_DeclareBeforeUse']\n"
    "from m3_plugin.host.torchvision_ops import declare_missing_ops\n"
    "declare_missing_ops(); declare_missing_ops()\n"
    "assert sum(type(f).__name__ == '_DeclareBeforeUse' for f in sys.meta_path) == 1\n"
)
_NO_HOOK = _HOOK.split("from")[0]


def _write(directory: Path, **changed: str) -> None:
    package = directory / "torchvision"
    package.mkdir()
    for name, text in {**_PACKAGE, **changed}.items():
        (package / name).write_text(text)


def _python(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(directory)!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=directory, check=False
    )


def test_without_the_hook_the_import_dies(tmp_path: Path) -> None:
    _write(tmp_path)
    result = _python(f"{_NO_HOOK}import torchvision", tmp_path)
    assert "operator torchvision::nms does not exist" in result.stderr


def test_missing_schemas_are_declared_when_torchvision_is_imported(tmp_path: Path) -> None:
    _write(tmp_path)
    code = (
        f"{_HOOK}assert 'torch' not in sys.modules\n"
        "import torchvision, torch\n"
        "assert torch.ops.torchvision.nms and torch.ops.torchvision.qnms\n"
    )
    result = _python(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_working_extension_is_left_alone(tmp_path: Path) -> None:
    _write(tmp_path, **{"extension.py": _WORKING_EXTENSION})
    code = (
        f"{_HOOK}import torchvision, torch\n"
        "from m3_plugin.host import torchvision_ops\n"
        "assert not torchvision_ops._libraries\n"
        "assert torch.ops.torchvision.nms(torch.ones(1), torch.ones(1), 0.5) == 1\n"
    )
    result = _python(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_nothing_is_imported_where_torchvision_is_absent(tmp_path: Path) -> None:
    code = (
        f"{_HOOK}"
        "sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        "try:\n    import torchvision\n"
        "except ModuleNotFoundError:\n    assert 'torch' not in sys.modules\n"
        "else:\n    raise AssertionError\n"
    )
    result = _python(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_install_and_remove(tmp_path: Path) -> None:
    copy, pth = torchvision_ops.install(str(tmp_path))
    torchvision_ops.install(str(tmp_path))
    # site.addsitedir reads .pth files as the start of python does.
    code = (
        f"{_NO_HOOK}import site; site.addsitedir({str(tmp_path)!r})\n"
        "assert any(type(f).__name__ == '_DeclareBeforeUse' for f in sys.meta_path)\n"
        "assert not {'torch', 'm3_plugin', 'torchvision'} & set(sys.modules)\n"
    )
    result = _python(code, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert torchvision_ops.remove(str(tmp_path)) == [pth, copy]
    assert torchvision_ops.remove(str(tmp_path)) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.vllm
def test_the_torchvision_installed_here_can_be_imported(tmp_path: Path) -> None:
    code = f"{_HOOK}from torchvision.transforms.v2 import functional"
    result = _python(code, tmp_path)
    assert result.returncode == 0, result.stderr
