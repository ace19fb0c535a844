from pathlib import Path

import pytest

from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.data.sources import Source


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("/a.jsonl", "/a.jsonl", 1),
        ("/a.jsonl=0.5", "/a.jsonl", 0.5),
        ("/a=3", "/a", 3),
        ("/a=1e-05", "/a", 1e-05),
        ("/a=b", "/a=b", 1),
    ],
)
def test_a_dataset_may_have_a_weight(text: str, path: str, weight: float) -> None:
    source = Source.parse(text)
    assert source == Source(Path(path), weight)
    assert Source.parse(str(source)) == source


def test_an_existing_path_with_an_equals_sign_has_no_weight(tmp_path: Path) -> None:
    folder = tmp_path / "lr=0.001"
    folder.mkdir()
    source = Source.parse(str(folder))
    assert source == Source(folder, 1)
    folder.rmdir()
    assert Source.parse(str(source)) == source  # a run reads the same text again from its directory
    assert Source.parse(f"{folder}=2") == Source(folder, 2)


@pytest.mark.parametrize("text", ["/a=0", "/a=0.0", "/a=1e999", "~nosuchuser/a.jsonl"])
def test_an_invalid_weight_and_an_unknown_user_s_home_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Source.parse(text)


def test_a_name_too_long_for_a_file_does_not_crash() -> None:
    assert Source.parse("a" * 5000).weight == 1


@pytest.mark.parametrize("option", ["dataset_path", "eval_path", "output_dir"])
def test_the_home_of_an_unknown_user_is_rejected_in_every_option(option: str) -> None:
    values = {"base_model": "m", "dataset_path": "d", "output_dir": "o", option: "~nosuchuser/x"}
    with pytest.raises(ValueError, match="home folder of this user is not known"):
        FinetuneConfig.model_validate(values)
