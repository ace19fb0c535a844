"""The page on the run directory lists all events and fields as the code declares them."""

from pathlib import Path
from typing import get_args

from pydantic_core import PydanticUndefined

from sage.common.training import AnyRunEvent, RunEvent, StepMetrics

PAGE = Path(__file__).parents[2] / "docs/internals/run-directory.md"
BEGIN, END = "<!-- events: begin -->\n", "<!-- events: end -->\n"


def table() -> str:
    lines = ["| event | fields |", "|---|---|"]
    for event in get_args(AnyRunEvent):
        fields = [
            f"`{name}`{'' if field.default is PydanticUndefined else '?'} {field.description}"
            for name, field in event.model_fields.items()
            if name not in RunEvent.model_fields and (event.__name__ != "StepEvent" or name not in StepMetrics.model_fields)
        ]
        fields += ["every figure of the table below"] if event.__name__ == "StepEvent" else []
        lines.append(f"| `{event.model_fields['event'].default}`: {event.__doc__} | {' '.join(fields) or '-'} |")
    lines += ["", "| figure of a step | unit | meaning |", "|---|---|---|"]
    for name, field in StepMetrics.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        lines.append(f"| `{name}`? | {extra['unit'] or '-'} | {field.description} |")
    return "\n".join(lines) + "\n"


def test_the_page_on_the_run_directory_lists_every_event_and_field() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == table(), f"run `python {Path(__file__).name}` to write the table anew"


if __name__ == "__main__":
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}", encoding="utf-8")
