"""A reward function, as GRPO asks it: an answer is the better, the shorter it is; it does not repeat the question."""


def reward(prompts: list[str], completions: list[str], **_columns: object) -> list[float]:
    """Return a number for each completion; higher is better."""
    return [-len(said) / 1000 - (asked in said) for asked, said in zip(prompts, completions, strict=True)]
