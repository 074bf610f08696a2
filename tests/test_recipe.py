import pytest

from orpo_trl.recipe import RECIPES, RecipeError, parse_recipe, resolve_engine


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)


def test_override_wins_over_recipe_wins_over_default(tmp_path):
    recipe = write(tmp_path, f"output_dir: {tmp_path}\nbeta: 0.3\nmax_length: 99\nbf16: false\n")
    model, data, training = parse_recipe([recipe, "--max_length", "77", "--dataset_name=rows.jsonl"])
    assert (training.beta, training.max_length, training.learning_rate) == (0.3, 77, 5e-6)
    assert data.dataset_name == "rows.jsonl"
    assert model.from_scratch is False


@pytest.mark.parametrize(("value", "expected"), [("true", True), ("false", False), ("out/checkpoint-3",) * 2])
def test_resume_finds_the_latest_checkpoint_or_takes_a_folder(tmp_path, value, expected):
    recipe = write(tmp_path, f"output_dir: {tmp_path}\nbf16: false\n")
    assert parse_recipe([recipe, "--resume_from_checkpoint", value])[2].resume_from_checkpoint == expected


def test_number_in_exponent_form_is_a_number(tmp_path):
    """YAML 1.1 reads `5e-6` as a string."""
    _, _, training = parse_recipe([write(tmp_path, f"output_dir: {tmp_path}\nlearning_rate: 5e-6\nbf16: false\n")])
    assert training.learning_rate == 5e-6


def test_mixture(tmp_path):
    text = f"output_dir: {tmp_path}\nbf16: false\ndatasets:\n- path: a\n  fraction: 0.5\n- path: b\n  fraction: 0.5\n"
    _, data, _ = parse_recipe([write(tmp_path, text)])
    assert data.datasets == [{"path": "a", "fraction": 0.5}, {"path": "b", "fraction": 0.5}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1\nbeta: 0.1\n", "unknown keys `lerning_rate`"),
        ("beta: -1\n", "`beta` must be"),
        ("beta: null\n", "`beta` must be"),
        ("1: beta\n", "a key that is not a name: 1"),
        ("- beta\n", "a mapping of keys to values, got list"),
        ("beta: [\n", "not a YAML file"),
        ("", "got NoneType"),
    ],
)
def test_wrong_recipe_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(RecipeError) as error:
        parse_recipe([write(tmp_path, text)])
    assert message in str(error.value)
    assert "recipe.yaml" in str(error.value)


def test_missing_recipe_is_named():
    with pytest.raises(RecipeError, match=r"recipes/absent.yaml does not exist"):
        parse_recipe(["recipes/absent.yaml"])


@pytest.mark.parametrize("arguments", [[], ["--beta", "1"], ["{recipe}", "--beta", "x"]])
def test_wrong_command_line_ends_with_status_2(tmp_path, arguments, capsys):
    recipe = write(tmp_path, f"output_dir: {tmp_path}\n")
    with pytest.raises(SystemExit) as ended:
        parse_recipe([argument.replace("{recipe}", recipe) for argument in arguments])
    assert ended.value.code == 2


def test_unknown_override_is_named(tmp_path):
    with pytest.raises(RecipeError, match="Unknown overrides --betta 1"):
        parse_recipe([write(tmp_path, f"output_dir: {tmp_path}\nbf16: false\n"), "--betta", "1"])
    with pytest.raises(RecipeError, match="Unknown overrides --bet 1"):  # no abbreviations
        parse_recipe([write(tmp_path, f"output_dir: {tmp_path}\nbf16: false\n"), "--bet", "1"])


def test_engine_of_the_recipe(monkeypatch):
    assert resolve_engine("zero3") is None  # one process has nothing to shard
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert resolve_engine("zero3") == str(RECIPES / "deepspeed" / "zero3.json")
    assert (RECIPES / "deepspeed" / "zero2.json").is_file()
    assert resolve_engine("my.json") == "my.json"
    assert resolve_engine(None) is None


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP"])
def test_accelerate_config_wins_over_the_recipes_engine(monkeypatch, engine):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    assert resolve_engine("zero3") is None


def test_engine_override(tmp_path, monkeypatch):
    recipe = write(tmp_path, f"output_dir: {tmp_path}\nbf16: false\ndeepspeed: zero3\n")
    for arguments in (["--deepspeed", "zero2"], ["--deepspeed=zero2"], []):
        _, _, training = parse_recipe([recipe, *arguments])
        assert not training.deepspeed
