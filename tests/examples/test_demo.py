"""The demo as a newcomer runs it, with the accuracy that it promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
@pytest.mark.slow
def test_demo_learns_to_detect(tmp_path):
    command = [sys.executable, "-m", "examples.demo", "--folder", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=880)
    assert result.returncode == 0, result.stderr
    box_ap50, mask_ap50 = map(float, re.search(r"box AP50 ([\d.]+), mask AP50 ([\d.]+)", result.stdout).groups())
    assert box_ap50 >= 0.7
    assert mask_ap50 >= 0.7
    assert len(list((tmp_path / "run1").glob("*.png"))) == 12
