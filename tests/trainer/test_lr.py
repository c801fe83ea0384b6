"""Learning rates against the field's golden numbers and formulas."""

import math

import pytest

from trainer.lr import LearningRate
from trainer.settings import LearningRateSettings

# MindFormers' test_lr.py: peak 0.005, warm-up 10, total 20, at steps 1, 10 and 19 (end 1e-7 where it is used).
GOLDEN = {
    "constant": ({}, (5e-4, 0.005, 0.005)),
    "linear": ({}, (5e-4, 0.005, 5e-4)),
    "cosine": ({}, (5e-4, 0.005, 0.00012236)),
    "polynomial": ({"min": 1e-7}, (5e-4, 0.005, 0.00050009)),
    "wsd": ({"min": 1e-7, "decay": 5}, (5e-4, 0.005, 0.00100008)),
}


@pytest.mark.parametrize("schedule", GOLDEN)
def test_schedule_gives_mindformers_numbers(schedule):
    options, expected = GOLDEN[schedule]
    rates = LearningRate(LearningRateSettings(schedule=schedule, warmup=10, **options), 0.005, 20)
    assert [rates.rate(step) for step in (1, 10, 19)] == pytest.approx(expected, abs=5e-9)


def test_inverse_square_root_follows_its_formula():
    rates = LearningRate(LearningRateSettings(schedule="inverse_sqrt", warmup=100, min=1e-4), 2e-3, 10_000)
    assert rates.rate(50) == pytest.approx(1e-3)
    assert rates.rate(100) == pytest.approx(2e-3)
    assert rates.rate(400) == pytest.approx(2e-3 * math.sqrt(100 / 400))
    assert rates.rate(9_999_999) == pytest.approx(2e-3 * math.sqrt(100 / 10_000))
    low = LearningRate(LearningRateSettings(schedule="inverse_sqrt", warmup=1, min=1e-4), 2e-3, 10_000)
    assert low.rate(10_000) == 1e-4


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial", "wsd"])
def test_decay_ends_at_the_minimum_and_stays_there(schedule):
    rates = LearningRate(LearningRateSettings(schedule=schedule, warmup=3, min=1e-5), 1e-3, 50)
    assert rates.rate(50) == pytest.approx(1e-5)
    assert rates.rate(80) == pytest.approx(1e-5)


def test_polynomial_uses_its_power():
    rates = LearningRate(LearningRateSettings(schedule="polynomial", power=2.0), 1.0, 10)
    assert rates.rate(5) == pytest.approx(0.25)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "polynomial", "inverse_sqrt", "wsd"])
def test_warm_up_longer_than_the_run_is_legal(schedule):
    rates = LearningRate(LearningRateSettings(schedule=schedule, warmup=100), 1.0, 10)
    assert [rates.rate(step) for step in (1, 10)] == pytest.approx([0.01, 0.1])
