import pytest

from orpo_trl.config import SettingsError
from orpo_trl.durations import read_duration
from orpo_trl.recipe.parse import build_settings, load_recipe


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("45m", 2700), ("3h50m", 13800), ("1d2h", 93600), ("1d 2h 3m 4s", 93784), (90, 90), (0.5, 0.5)],
    ids=str,
)
def test_time_is_read_in_seconds(text, seconds):
    assert read_duration(text) == seconds


@pytest.mark.parametrize("value", ["", "3", "h", "50m3h", "3h50", "-1h", "0s", 0, -5, float("nan"), True], ids=repr)
def test_anything_else_is_refused(value):
    with pytest.raises(ValueError, match="expected a time such as 90s, 45m, 3h50m or 1d2h"):
        read_duration(value)


@pytest.mark.parametrize(("value", "taken"), [("3h50m", "3h50m"), ("90", 90)])
def test_recipe_takes_text_and_seconds(value, taken):
    assert build_settings(load_recipe(["recipes/quickstart.yaml", "--stop_after", value]))[2].stop_after == taken


def test_wrong_time_is_a_problem_of_its_key(tmp_path):
    from orpo_trl import ORPOConfig

    with pytest.raises(SettingsError) as raised:
        ORPOConfig(str(tmp_path), stop_after="soon")
    assert [problem.keys for problem in raised.value.problems] == [("stop_after",)]
