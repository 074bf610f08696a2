import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orpo_trl.recipe.files import Place, RecipeError, find_recipe, read_recipe, read_value
from orpo_trl.yaml_text import to_yaml

# PyYAML takes these for line ends.
_TEXT = st.text(st.characters(exclude_characters="\x85\u2028\u2029"))


def write(folder, **files):
    """Recipes by name; returns the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def problems(path):
    return [str(problem).replace(str(path.parent) + "/", "") for problem in read_recipe(path).problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-6", 5e-6), ("1e3", 1e3), ("-1", -1), ("+.5", 0.5), ("1.", 1.0), ("0x1F", 31), ("0o17", 15), ("010", 10),
        (".inf", float("inf")), ("-.inf", -float("inf")), ("true", True), ("FALSE", False), ("null", None), ("~", None),
        ("", None), ("no", "no"), ("on", "on"), ("yes", "yes"), ("2026-11-23", "2026-11-23"), ("1_000", "1_000"),
        ("12:30", "12:30"), ("a b", "a b"), ("[1, a]", [1, "a"]), ("{a: 1}", {"a": 1}), ("[", "["), ("1.2.3", "1.2.3"),
    ],
)  # fmt: skip
def test_values_are_read_as_yaml_1_2(text, value):
    assert read_value(text) == value
    assert type(read_value(text)) is type(value)


@given(st.floats(allow_nan=False) | st.integers() | st.booleans() | st.none())
def test_what_yaml_writes_is_read_back(value):
    text = yaml.safe_dump(value).splitlines()[0]
    assert read_value(text) == value


@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), _TEXT | st.floats(allow_nan=False), min_size=1))
def test_settings_are_read_as_they_were_written(tmp_path_factory, settings):
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    settings = {f"k_{name}": value for name, value in settings.items()}
    path.write_text(to_yaml(settings))
    recipe = read_recipe(path)
    assert recipe.settings == settings == yaml.safe_load(path.read_text())
    assert not recipe.problems


def test_child_replaces_what_its_parents_say_in_order(tmp_path):
    path = write(
        tmp_path,
        r="extends: [a.yaml, b.yaml]\nc: child\n",
        a="extends: base.yaml\na: a\nb: a\nc: a\n",
        b="b: b\nc: b\n",
        base="a: base\nd: base\n",
    )
    recipe = read_recipe(path)
    assert recipe.settings == {"a": "a", "d": "base", "b": "b", "c": "child"}
    assert not recipe.problems
    places = {key: Path(str(recipe.place(key))).name for key in recipe.settings}
    assert places == {"a": "a.yaml:2", "d": "base.yaml:2", "b": "b.yaml:1", "c": "r.yaml:2"}


def test_a_shared_grandparent_undoes_no_parent(tmp_path):
    files = {"a": "extends: base.yaml\nx: a\n", "b": "extends: base.yaml\ny: b\n", "base": "x: base\ny: base\n"}
    path = write(tmp_path, r="extends: [a.yaml, b.yaml]\n", **files)
    assert read_recipe(path).settings == {"x": "a", "y": "b"}


@pytest.mark.parametrize("name", ["qwen_0.5b", "qwen_0.5b.yaml"])
def test_shipped_parent_whose_name_has_a_dot(tmp_path, name):
    recipe = read_recipe(write(tmp_path, r=f"extends: {name}\n"))
    assert recipe.settings["model_name_or_path"] == "Qwen/Qwen2.5-0.5B"


def test_parents_are_found_beside_their_file_and_among_the_shipped_recipes(tmp_path):
    (tmp_path / "sub").mkdir()
    path = write(tmp_path / "sub", r="extends: ../base.yaml\n")
    write(tmp_path, base="extends: quickstart.yaml\nbeta: 0.7\n")
    recipe = read_recipe(path)
    assert (recipe.settings["beta"], recipe.settings["max_length"]) == (0.7, 128)
    assert not recipe.problems


def test_nested_values_are_replaced_whole_or_by_dotted_key(tmp_path):
    path = write(
        tmp_path,
        r="extends: base.yaml\nm.b: 3\nd.1.path: z\nnew.part: 1\nw: {y: 2}\n",
        base="m: {a: 1, b: 2}\nd:\n- path: x\n- path: y\nw: {x: 1}\n",
    )
    recipe = read_recipe(path)
    assert recipe.settings == {
        "m": {"a": 1, "b": 3}, "d": [{"path": "x"}, {"path": "z"}], "new": {"part": 1}, "w": {"y": 2},
    }  # fmt: skip
    assert recipe.place("m", "b") == Place(str(path), 2)
    assert recipe.place("new") == recipe.place("new", "part") == Place(str(path), 4)
    assert recipe.place("d", 0, "path") == Place(str(tmp_path / "base.yaml"), 3)
    assert not recipe.problems


@pytest.mark.parametrize("key", ["a.b.c", "d.x", "d.7", "d.1.x"])
def test_dotted_key_without_a_value_to_set_a_part_of_is_named(tmp_path, key):
    path = write(tmp_path, r=f"a: 1\nd: [1, 2]\n{key}: 3\n")
    assert problems(path)[0].startswith(f"r.yaml:3: `{key}`")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3: `a` stands here and in line 1"),
        ("a:\n  b: 1\n  b: 2\n", "r.yaml:3: `b` stands here and in line 2"),
        ("a: &x [1]\nb: *x\n", "r.yaml:2: not YAML: aliases"),
        ("a: &x [*x]\n", "r.yaml:1: not YAML: aliases"),
        ("a: 1\nb: [\n", "r.yaml:3: not YAML"),
        ("a: 1\n\tb: 1\n", "r.yaml:2: not YAML"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: not YAML"),
        ("a: !!python/object:os.system x\n", "r.yaml:1: the tag tag:yaml.org,2002:python/object:os.system is not read"),
        ("a: !env HOME\n", "r.yaml:1: the tag !env is not read"),
        ("a: !x [1]\n", "r.yaml:1: the tag !x is not read"),
        ("1: a\n", "r.yaml:1: a key must be a name, received '1'"),
        ("? [a]\n: b\n", "r.yaml:1: a key must be a name, received a list or a mapping"),
        ("- a\n", "r.yaml: a recipe is a mapping of keys to values, received a list"),
        ("", "r.yaml: a recipe is a mapping of keys to values, received nothing"),
        ("a: \x00\n", "r.yaml: not YAML"),
        ("a: " + "[" * 5000, "r.yaml: nested too deep"),
        ("b: 1\na: ${ORPO_NO_SUCH}\n", "r.yaml:2: the environment variable ORPO_NO_SUCH is not set"),
        ("extends: 3\n", "r.yaml:1: `extends`: expected a file or a list of files, received 3"),
        ("a: 1\nextends: absent.yaml\n", "r.yaml:2: `extends`: there is no file absent.yaml"),
        ("m.a: 1\nm: {b: 2}\n", "r.yaml:1: `m.a` and `m` both stand here"),
        ("extends: " + "x" * 300 + "\n", "r.yaml:1: `extends`: there is no file xxx"),
        ("extends: r.yaml\n", "r.yaml:1: `extends` goes in a circle: r.yaml → r.yaml"),
    ],
)
def test_wrong_file_is_a_problem_with_its_line(tmp_path, text, found):
    path = write(tmp_path, r=text)
    assert found in problems(path)[0]
    assert len(problems(path)) == 1


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("m.a: 1\nm: {b: 2}\n", ("m.a",)),
        ("a:\n- {b: 1, b: 2}\n", ("a", 0, "b")),
        ("extends: 3\n", ("extends",)),
        ("[", ()),
    ],
)
def test_problem_has_the_path_of_its_value(tmp_path, text, path):
    (problem,) = read_recipe(write(tmp_path, r=text)).problems
    assert problem.path == path


def test_circle_through_several_files_is_drawn(tmp_path):
    path = write(tmp_path, r="extends: a.yaml\nx: 1\n", a="y: 1\nextends: b.yaml\n", b="extends: [a.yaml]\n")
    assert problems(path) == ["b.yaml:1: `extends` goes in a circle: r.yaml → a.yaml → b.yaml → a.yaml"]


@pytest.mark.parametrize("content", [b"a: \xff\xfe\n", None])
def test_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "r.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    assert problems(path)[0].startswith("r.yaml: the recipe cannot be read")


def test_environment_variables_where_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("ORPO_STEPS", "1e2")
    monkeypatch.setenv("ORPO_HOME", "/data")
    path = write(
        tmp_path, r="a: ${ORPO_STEPS}\nb: '${ORPO_STEPS}'\nc: ${ORPO_HOME}/x\nd: $ORPO_HOME\ne: [\"${ORPO_HOME}\"]\n"
    )
    recipe = read_recipe(path)
    assert recipe.settings == {"a": 100.0, "b": "1e2", "c": "/data/x", "d": "$ORPO_HOME", "e": ["/data"]}
    assert recipe.secrets[("c",)] == "${ORPO_HOME}/x"


@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!|>'\"#\n \t,?%@`0.~"), max_size=60))
def test_any_text_is_settings_or_problems(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text(text)
    recipe = read_recipe(path)
    assert isinstance(recipe.settings, dict)
    for problem in recipe.problems:
        assert problem.place.file == str(path)
        assert re.match(rf"{re.escape(str(path))}(:\d+)?: ", str(problem))
    if not recipe.problems:
        assert set(recipe.settings) <= set(yaml.load(text, yaml.BaseLoader)) | {"extends"} or "." in text


def test_shipped_recipe_is_found_by_name_and_by_path_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "recipes/quickstart.yaml"):
        assert find_recipe(name).name == "quickstart.yaml"
        assert find_recipe(name).is_file()
    (tmp_path / "quickstart").write_text("beta: 1\n")
    assert find_recipe("quickstart") == Path("quickstart")


@pytest.mark.parametrize(("name", "hint"), [("recipes/quickstrat.yaml", "`quickstart`"), ("x/y/zzz.yaml", "no such")])
def test_recipe_that_does_not_exist_is_named(name, hint):
    with pytest.raises(RecipeError, match=f"{name}: there is no such recipe") as error:
        find_recipe(name)
    assert hint in str(error.value)
