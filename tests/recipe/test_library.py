import re
import runpy
import subprocess
import sys

import pytest
from support.small import REPOSITORY

from orpo_trl.recipe.library import FIELDS, RecipeHeader, read_header, shipped_recipes

MAKER = runpy.run_path(str(REPOSITORY / "scripts" / "make_recipes_readme.py"))
GROUPS, readme, memory_text, with_memory = (MAKER[name] for name in ("GROUPS", "readme", "memory_text", "with_memory"))

HEADER = """\
# A title: with a colon
#
#   first command
#   second command
#
# Reproduces: something
# over two lines: with a colon.
#
# Source: a.
#
# Hardware: b.
#
# Expect: c.
#
# Inferred: nothing.
#
# Needs: d.

beta: 0.1   # Conflicts: not a header any more
"""


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_header_is_read_up_to_the_first_setting(tmp_path):
    header = read_header(write(tmp_path, HEADER))
    assert (header.name, header.title) == ("mine", "A title: with a colon")
    assert header.commands == ("first command", "second command")
    assert header.fields["Reproduces"] == "something over two lines: with a colon."
    assert header.fields["Inferred"] == "nothing."
    assert header.fields["Needs"] == "d."
    assert "Conflicts" not in header.fields


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# Source: a.\n", "", "no `Source:`"),
        ("# Source: a.\n", "# Source:\n", "no `Source:`"),
        ("#   first command\n#   second command\n", "", "no command"),
        ("# A title: with a colon", "#", "no title"),
        ("# Source: a.", "# Sauce: a.", "line 9: expected one of `Reproduces:`"),
        ("# Needs: d.", "# Source: d.", "line 17: expected one of"),
        ("# Needs: d.", "# A note.", "got 'A note.'"),
    ],
)
def test_incomplete_header_is_an_error_that_names_the_file(tmp_path, old, new, message):
    assert old in HEADER
    with pytest.raises(ValueError, match=r"mine\.yaml") as error:
        read_header(write(tmp_path, HEADER.replace(old, new)))
    assert message in str(error.value)


def test_shipped_recipes_all_have_complete_headers_and_are_listed_in_the_overview():
    recipes = shipped_recipes()
    assert {recipe.name for recipe in recipes} == {path.stem for path in (REPOSITORY / "recipes").glob("*.yaml")}
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(recipe.name for recipe in recipes)
    for recipe in recipes:
        assert set(recipe.fields) <= set(FIELDS)


def test_headers_of_the_authors_models_name_where_their_code_differs():
    conflicts = {recipe.name: recipe.fields["Conflicts"] for recipe in shipped_recipes() if "mistral" in recipe.name}
    for name in ("mistral_alpha", "mistral_beta", "mistral_capybara"):
        for difference in ("count `<s>`", "ties and on pairs that are equal once cut", "`prompt_turns: first`"):
            assert difference in conflicts[name], name
    assert "row with a system turn" in conflicts["mistral_capybara_released"]


def test_overview_is_made_from_the_headers():
    """If this fails: `python scripts/make_recipes_readme.py` makes the file again."""
    assert (REPOSITORY / "recipes" / "README.md").read_text(encoding="utf-8") == readme(shipped_recipes())


@pytest.mark.slow
def test_memory_of_each_header_is_what_the_estimate_gives_and_fits_the_hardware():
    """If this fails: `python scripts/make_recipes_readme.py` makes the headers again."""
    for recipe in shipped_recipes():
        text = (REPOSITORY / "recipes" / f"{recipe.name}.yaml").read_text(encoding="utf-8")
        memory = memory_text(recipe)
        assert with_memory(text, memory) == text, recipe.name
        if memory is not None:
            gib, gigabytes = (float(re.search(pattern, found)[1]) for pattern, found in (
                (r"at most ([\d.]+) GiB", memory), (r"(\d+) GB", recipe.fields["Hardware"])
            ))  # fmt: skip
            assert gib * 2**30 < 0.9 * gigabytes * 1e9, recipe.name
    on_a_cpu = {recipe.name for recipe in shipped_recipes() if "Memory" not in recipe.fields}
    assert on_a_cpu == {"quickstart", "smollm2_135m", "smollm2_135m_lora", "smollm2_135m_ultrafeedback"}


def test_overview_names_recipes_that_it_does_not_list():
    fields = {str(word): "x" for word in FIELDS}
    with pytest.raises(ValueError, match="differ in stray"):
        readme([*shipped_recipes(), RecipeHeader("stray", "Stray", ("run",), fields)])
    with pytest.raises(ValueError, match="differ in quickstart"):
        readme([recipe for recipe in shipped_recipes() if recipe.name != "quickstart"])


def test_overview_holds_every_field_and_links_to_every_file():
    text = readme(shipped_recipes())
    for recipe in shipped_recipes():
        assert text.count(f"({recipe.name}.yaml)") == 2  # the table and the section
        assert all(value in text for value in (*recipe.fields.values(), *recipe.commands))


def test_library_needs_neither_torch_nor_yaml():
    """So `orpo-trl recipes` lists them at once."""
    code = "import sys, orpo_trl.recipe.library; print({'torch', 'transformers', 'yaml'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert result.stdout.strip() == "set()"
