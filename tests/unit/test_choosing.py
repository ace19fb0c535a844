"""How tokens are chosen: filters, penalties, and separate random numbers for each answer."""

from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sage.llm.workers.choosing import Chooser
from sage.llm.workers.sampling import Sampling

VOCABULARY = 700
DRAWS = 4000


def logits_of(seed: int) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def chooser(prompt: list[int] | None = None, **sampling: Any) -> Chooser:
    return Chooser(Sampling(max_tokens=1, **sampling), None, prompt or [1])


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 40, "top_p": 0.9, "min_p": 0.02}, {"top_p": 1e-9}],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tokens_are_drawn_with_the_probabilities_that_the_filters_of_transformers_give(
    filters: dict[str, Any], temperature: float
) -> None:
    logits = logits_of(1)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in filters:
            warpers.append(warper(filters[name]))
    expected = warpers(torch.tensor([[1]]), logits[None].clone())[0].softmax(-1)
    drawing = chooser(seed=1, temperature=temperature, **filters)
    drawn = torch.tensor([drawing.choose([], logits) for _ in range(DRAWS)]).bincount(minlength=VOCABULARY) / DRAWS
    assert not drawn[expected == 0].any()
    assert float((drawn - expected).abs().max()) < 5 * (0.25 / DRAWS) ** 0.5  # five standard deviations


def test_top_p_keeps_nearly_all_tokens_if_they_are_equally_probable() -> None:
    flat = torch.zeros(VOCABULARY)
    drawing = chooser(seed=1, temperature=1.0, top_p=0.99)
    assert len({drawing.choose([], flat) for _ in range(DRAWS)}) > 600


def test_the_repetition_penalty_equals_the_penalty_of_transformers() -> None:
    penalized, answer = chooser(prompt=[3, 4], temperature=0.0, repetition_penalty=1.7), list[int]()
    theirs = RepetitionPenaltyLogitsProcessor(1.7)
    for step in range(30):
        logits = logits_of(step)
        expected = int(theirs(torch.tensor([[3, 4, *answer]]), logits[None].clone()).argmax())
        answer.append(penalized.choose(answer, logits))
        assert answer[-1] == expected


def test_penalties_apply_to_tokens_of_the_answer_and_do_not_change_the_given_logits() -> None:
    penalized, answer = (
        chooser(temperature=0.0, frequency_penalty=0.5, presence_penalty=1.0, logit_bias={7: 2.0}),
        list[int](),
    )
    for step in range(40):
        logits = logits_of(step % 3)
        before = logits.clone()
        expected = logits.clone()
        for token in set(answer):
            expected[token] -= 0.5 * answer.count(token) + 1.0
        expected[7] += 2.0
        answer.append(penalized.choose(answer, logits))
        assert answer[-1] == int(expected.argmax())
        assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "sampling", [{"presence_penalty": 0.01}, {"frequency_penalty": 0.01}, {"repetition_penalty": 1.001}], ids=str
)
def test_penalties_are_not_rounded_to_the_model_s_precision(sampling: dict[str, float]) -> None:
    logits = torch.full((5,), 20.0, dtype=torch.bfloat16)  # the next smaller bfloat16 number is 19.875
    assert chooser(prompt=[0], temperature=0.0, **sampling).choose([0], logits) == 1


def test_a_seed_gives_the_same_tokens_whatever_other_answers_draw() -> None:
    def drawn(others: int) -> list[int]:
        mine, rest = chooser(seed=5, temperature=1.0), [chooser(temperature=1.0) for _ in range(others)]
        return [[mine.choose([], logits_of(step)), *(other.choose([], logits_of(step)) for other in rest)][0]
                for step in range(20)]  # fmt: skip

    assert drawn(0) == drawn(3)
    assert [chooser(temperature=1.0).choose([], torch.zeros(VOCABULARY)) for _ in range(9)] != [
        chooser(temperature=1.0).choose([], torch.zeros(VOCABULARY)) for _ in range(9)
    ]
