"""The page in a real browser: what it shows, and that it stays on its own."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from support.evaluations import evaluation, mt_bench, preferences
from support.run_folders import MISTRAL, history, metrics, sample, write_run

from orpo_trl.evaluations import write_evaluation
from orpo_trl.report.write import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the path")

EVIL = (
    "<script>document.title = 'taken'</script><img src=https://example.com/x.png onerror=\"document.title = 'taken'\">"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    groups = {f"eval_lengths/{low}-{low + 99}/{name}": 0.5 for low in (1, 101) for name in ("accuracies", "margins")}
    folders = [
        write_run(
            folder / name / ("a_very_long_name_without_a_space_" * 3 + name),
            [*history(200), {"step": 200, **groups}],
            samples=[sample(3, completion=EVIL), sample(6, completion=EVIL, prompt="long" * 5_000)],
            recipe=f"model_name_or_path: {MISTRAL}\nbeta: {beta}\noutput_dir: {'x' * 300}\nseed: {'7' * 90}{beta}\n",
        )
        for name, beta in (("one", 0), ("two", 1), ("three", 2))
    ]
    for one in (evaluation("alpaca_eval_2", {"win_rate": 11.0}), mt_bench(notes=[EVIL]), preferences(template=EVIL)):
        write_evaluation(folders[0], one)
    (written,) = write_report(folders, folder / "report.html")
    return written


@pytest.fixture(scope="module")
def page_of_one(tmp_path_factory) -> Path:
    """One run, evaluated before training, that answered a conversation."""
    before = {"step": 0, **metrics(0, prefix="eval_")}
    chat = sample(6, prompt="<|user|>\nlong" + "word" * 900 + "</s>", last_turn=[9, 40], special_tokens=["<|user|>"])
    folder = write_run(tmp_path_factory.mktemp("single") / "run", [before, *history(200)], samples=[chat])
    (written,) = write_report([folder])
    return written


def measured(page: Path, folder: Path, width: int, script: str) -> dict:
    """What an expression of JavaScript gives, where `d` is the page in a frame of this width.

    In a frame, since a window is at least 500 pixels wide.
    """
    wrapper = folder / "frame.html"
    wrapper.write_text(
        f"<iframe id=f src='{page.as_uri()}' style='border:0;width:{width}px;height:900px'></iframe><pre id=o></pre>"
        f"<script>f.onload = () => {{ const d = f.contentDocument; o.textContent = JSON.stringify({script}) }}</script>"
    )
    dom = chromium(
        folder / "profile", "--allow-file-access-from-files", "--virtual-time-budget=3000", "--dump-dom",
        f"--window-size={max(width, 500) + 50},1000", wrapper.as_uri(),
    ).stdout  # fmt: skip
    return json.loads(dom.split('<pre id="o">')[1].split("</pre>")[0])


def chromium(profile: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_page_shows_its_figures_runs_no_script_and_says_nothing_on_the_console(page, tmp_path):
    shot = tmp_path / "shot.png"
    done = chromium(
        tmp_path / "profile", f"--screenshot={shot}", "--window-size=1280,2000", "--enable-logging=stderr", "--v=0",
        page.as_uri(),
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    colours = Image.open(shot).convert("RGB").getcolors(2**24) or []
    assert {(0, 0x72, 0xB2), (0xD5, 0x5E, 0)} <= {colour for _, colour in colours}  # the first two runs' lines
    dom = chromium(tmp_path / "profile", "--dump-dom", page.as_uri()).stdout
    assert "<script" not in dom
    assert "&lt;script&gt;document.title = 'taken'&lt;/script&gt;" in dom
    assert "<title>taken" not in dom


def test_page_asks_the_network_for_nothing(page, tmp_path):
    log = tmp_path / "net.json"
    chromium(tmp_path / "profile", f"--log-net-log={log}", "--dump-dom", page.as_uri())
    text = log.read_text(encoding="utf-8")
    assert '"constants"' in text
    assert "example.com" not in text
    assert "www.w3.org" not in text


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_page_never_scrolls_sideways(page, tmp_path, width):
    found = measured(
        page, tmp_path, width,
        "{scroll: d.documentElement.scrollWidth, width: d.documentElement.clientWidth, images: d.images.length,"
        " loaded: [...d.images].filter(i => i.complete && i.naturalWidth).length, taken: d.title == 'taken'}",
    )  # fmt: skip
    assert found["scroll"] <= found["width"] <= width
    assert found["images"] == found["loaded"] == 11
    assert not found["taken"]


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_curves_of_one_run_stand_beside_its_table_where_there_is_room(page_of_one, tmp_path, width):
    found = measured(
        page_of_one, tmp_path, width,
        "{scroll: d.documentElement.scrollWidth, width: d.documentElement.clientWidth,"
        " table: d.querySelector('#runs .wide').getBoundingClientRect(),"
        " figure: d.querySelector('figure').getBoundingClientRect()}",
    )  # fmt: skip
    assert found["scroll"] <= found["width"] <= width
    table, figure = found["table"], found["figure"]
    if width == 1280:
        assert table["right"] <= figure["left"]
        assert table["top"] < figure["bottom"] < table["bottom"]
    else:
        assert figure["top"] >= table["bottom"]
