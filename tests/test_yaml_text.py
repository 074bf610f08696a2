import pytest

from orpo_trl.yaml_text import Yaml11Reader, YamlReader, from_yaml, to_yaml_line

TEXT = "a: no\nb: 5e-6\nc: 2026-11-23\nd: 0x1F\ne: {f: [1, null]}\n"


def test_versions_differ_in_truth_values_alone_here():
    values = {"a": "no", "b": 5e-6, "c": "2026-11-23", "d": 31, "e": {"f": [1, None]}}
    assert YamlReader().read(TEXT) == from_yaml(TEXT) == values
    assert Yaml11Reader().read(TEXT) == {**values, "a": False}


@pytest.mark.parametrize("kind", [YamlReader, Yaml11Reader])
@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("a: &x [1]\nb: *x\n", 2, "not YAML: aliases (`*name`) are not read; write the value out"),
        ("a: 1\nb: {c: 1,\n  c: 2}\n", 3, "`c` stands here and in line 2; keep one of them"),
        ("a: !env HOME\n", 1, "the tag !env is not read"),
        ("? [a]\n: b\n", 1, "a key must be a name, received a list or a mapping"),
        ("a: " + "[" * 5000, None, "nested too deep"),
    ],
)
def test_both_versions_refuse_the_same(kind, text, line, problem):
    reader = kind()
    reader.read(text)
    assert [(found.line, found.text) for found in reader.problems] == [(line, problem)]


def test_number_that_python_does_not_take_is_a_problem():
    reader = Yaml11Reader()
    reader.read("a: !!int five\n")
    assert "not YAML" in reader.problems[0].text


def test_first_problem_is_raised_with_its_line():
    with pytest.raises(ValueError, match=r"^line 2: `a` stands here and in line 1"):
        from_yaml("a: 1\na: 2\na: 3\n")


@pytest.mark.parametrize(
    ("value", "text"), [(5e-6, "5.0e-6"), ("no", "'no'"), (None, "null"), ([], "[]"), ({"a": [1, "b"]}, "{a: [1, b]}")]
)
def test_value_in_one_line(value, text):
    assert to_yaml_line(value) == text
