"""The benchmark of the end of an evaluation, on few images: what it prints, and that it notices a difference."""

import pytest

from tools import benchmark_evaluation

ARGUMENTS = ["--images", "4", "--repeats", "2", "--vs", "pycocotools"]


def test_numbers_agree_and_are_printed(capsys):
    assert benchmark_evaluation.main(ARGUMENTS) == 0
    lines = capsys.readouterr().out.splitlines()
    for start in ("boxes of COCO's sizes", "whole images"):
        (line,) = [line for line in lines if line.startswith(start)]
        median, least, most = map(float, line.split()[-3:])
        assert 0 < least <= median <= most
    for kind in ("box", "mask"):
        (line,) = [line.split() for line in lines if line.startswith(f"{kind} ")]
        assert len(line) == 5 and line[3].endswith("x") and float(line[4]) < 1e-9


@pytest.mark.parametrize(("change", "code"), [(1e-7, 0), (1e-5, 1)])
def test_a_difference_is_told_by_the_exit_code(monkeypatch, change, code):
    run = benchmark_evaluation.run_pycocotools
    monkeypatch.setattr(benchmark_evaluation, "run_pycocotools", lambda *arguments: run(*arguments) + change)
    assert benchmark_evaluation.main(ARGUMENTS) == code
