"""Does importing vlmx first make torchvision and timm importable, at no cost?"""

import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_timm_and_torchvision_work_after_importing_vlmx_except_for_missing_operators() -> None:
    done = run(
        "import vlmx, timm, torch, torchvision\n"
        "from torchvision.extension import _has_ops\n"
        "from torchvision.transforms import v2\n"
        "print(tuple(v2.CenterCrop(2)(torch.zeros(3, 5, 5)).shape))\n"
        "try:\n"
        "    kept = torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([1.0]), 0.5)\n"
        "    print(_has_ops(), kept.tolist())\n"
        "except (RuntimeError, NotImplementedError):\n"
        "    print(_has_ops(), 'refused')"
    )
    assert done.returncode == 0, done.stderr
    shape, nms = done.stdout.splitlines()
    assert shape == "(3, 2, 2)"
    assert nms in {"True [0]", "False refused"}


def test_installing_twice_adds_one_finder_and_imports_nothing_heavy() -> None:
    done = run(
        "import sys\n"
        "from vlmx import torchvision_guard\n"
        "torchvision_guard.install(); torchvision_guard.install()\n"
        "print(sum(type(f).__name__ == '_Guard' for f in sys.meta_path))\n"
        "print('torch' in sys.modules, 'torchvision' in sys.modules)"
    )
    assert done.stdout.split() == ["1", "False", "False"], done.stderr
