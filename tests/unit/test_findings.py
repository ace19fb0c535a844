from pathlib import Path

import pytest

from sage.cli.dataset_view import raise_for_missing
from sage.common.errors import DatasetError
from sage.libs.finetune.data.findings import Code, Findings
from sage.libs.finetune.data.linting import DatasetReport, read_samples
from sage.libs.finetune.data.preferences import parser_of


def test_repeated_findings_about_a_sample_count_as_one_sample() -> None:
    findings = Findings()
    for line in range(1, 8):
        for _ in range(3):
            findings.add(Code.MESSAGE_LOST, f"data.jsonl:{line}")
    [found] = findings
    assert (found.count, found.places) == (7, [f"data.jsonl:{line}" for line in range(1, 6)])


@pytest.mark.parametrize(("line", "code"), [(None, "no_answers"), (1, "line_not_found")])
def test_a_dataset_of_prompts_has_no_sample_to_show(tmp_path: Path, line: int | None, code: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Name a colour."}\n')
    report = DatasetReport(data)
    assert len(list(read_samples(report, parser_of("grpo")))) == 1
    with pytest.raises(DatasetError, match="answer") as raised:
        raise_for_missing(report, line)
    assert raised.value.code == code
