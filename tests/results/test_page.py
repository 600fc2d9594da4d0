"""The results page and the README's tables hold everything, whatever the ledger lacks, and say what they show."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from hypdefect.errors import ConfigError
from hypdefect.evaluation import TWIN
from hypdefect.methods import METHODS
from hypdefect.results import ledger
from hypdefect.results.page import replace_results
from hypdefect.results.sections import current_sections
from jobs import report
from tests.ledger_rows import as_table
from tests.results.ledgers import MAIN, ablations, curvature, generated, true_differences


def run_report(home: Path, monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setenv("HYPDEFECT_HOME", str(home))
    monkeypatch.setattr("sys.argv", ["jobs/report.py", *args])
    report.main()


class Page(HTMLParser):
    """Tags, links and text of a page; complains of a tag that is closed by another."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data.replace("\xa0", " ")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.seen if name == tag]


ODD = {
    "single": generated(MAIN, label="single", shots=(1,), draws=2, partitions=1),
    "once": generated(MAIN, label="once", shots=(1, 5), draws=1, partitions=1, classes=tuple("abcdefghijklmnopqr")),
    "names": generated(
        MAIN,
        label="names",
        split="random",
        draws=2,
        classes=("mono <good>", "a_very_long_name_of_a_defect_class_without_end", "b & many words in a long name"),
    ),
    "alone": generated({("hypdfs", "plain", ""): 0.0}, label="alone", shots=(1, 5), draws=2),
    "without": generated({("prototype", "plain", ""): 0.0}, label="without", shots=(1, 5), draws=2),
}
PEERS = [name for name in METHODS if name != "hypdfs"]
ODD["many"] = generated(
    MAIN | {(name, features, ""): 0.001 * i for i, name in enumerate(PEERS) for features in ("plain", "meta")},
    label="many",
    shots=(5,),
    draws=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a ledger with whole and odd tasks, made by the job."""
    home = tmp_path_factory.mktemp("report")
    for part in (generated(MAIN), curvature(), *ablations().values(), *ODD.values()):
        ledger.append(part, home)
    with pytest.MonkeyPatch.context() as patch:
        run_report(home, patch, "--out", str(home / "out"), "--no-features")
    return home / "out"


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "index.html").read_text())


def test_the_page_holds_everything_and_needs_nothing_else(folder: Path, page: Page) -> None:
    pictures = {path.name for path in folder.glob("*.png")}
    wanted = {"mtd-grouped": ("ablation", "ahead", "confusion", "curvature", "shots")}
    wanted |= {f"{label}-grouped": ("ahead", "confusion", "shots") for label in ("single", "once", "many")}
    wanted |= {"names-random": ("ahead", "confusion", "shots")}
    wanted |= {f"{label}-grouped": ("confusion", "shots") for label in ("alone", "without")}
    assert pictures == {f"{slug}-{name}.png" for slug, names in wanted.items() for name in names}
    images = page.all("img")
    assert len(images) == len(pictures)
    assert all(str(image["src"]).startswith("data:image/png;base64,") and image["alt"] for image in images)
    links = [a["href"] for a in page.all("a")]
    assert {f"#{section['id']}" for section in page.all("section")} == set(links) == {f"#{slug}" for slug in wanted}
    assert not page.all("script")
    assert not page.all("link")
    for text in ("0123456789ab-dirty", "3 partitions × 3 draws", "mono <good>", "tip adapter f", TWIN):
        assert text in page.text
    assert "python jobs/evaluate.py --dataset mtd --methods all" in page.text


def test_the_tables_hold_the_numbers(page: Page) -> None:
    (section,) = current_sections(as_table(generated(MAIN)))
    for difference in true_differences(section).values():
        assert str(difference) in page.text
    assert "real+synthetic" in page.text
    assert "without the ODE" in page.text
    assert " (6.0)" in page.text  # the calibration error of right probabilities
    assert "c learned" in page.text
    assert {"ours", "twin"} <= {row.get("class") for row in page.all("tr")}
    assert {"ahead", "level", "best", "left", "faint"} <= {cell.get("class") for cell in page.all("td")}


def test_odd_ledgers_are_said_as_they_are(page: Page) -> None:
    assert "inf" not in page.text
    assert "nan" not in page.text.lower()
    assert f"Beside the {len(PEERS)} peers on plain features" in page.text
    assert "On plain features HypDFS reaches" in page.text
    assert "HypDFS is not among the methods" in page.text
    assert "One draw gives no interval" in page.text


def test_what_is_missing_is_said_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what the features would show, where there are none."""
    monkeypatch.setenv("HYPDEFECT_DATA", str(tmp_path / "nothing"))
    ledger.append(generated({key: MAIN[key] for key in MAIN if key[1] == "plain"}, shots=(1,)), tmp_path)
    run_report(tmp_path, monkeypatch)
    page = Page((tmp_path / "report" / "index.html").read_text())
    assert "not measured here. Made by python jobs/reproduce.py hypdfs --datasets mtd --studies curvature" in page.text
    assert "Ablations: not measured here. Made by python jobs/reproduce.py hypdfs --datasets mtd --studies" in page.text
    assert "Its c = 0 twin was not run." in page.text
    assert "Pictures of the features: not drawn" in page.text
    assert "python jobs/extract.py --dataset mtd --split grouped" in page.text


def test_elsewhere_than_on_the_papers_set_the_study_of_all_parts_is_named(page: Page) -> None:
    (other,) = current_sections(as_table(generated(MAIN, label="neu_seg")))
    command = "--datasets neu_seg --studies parts --split grouped --draws 3 --partitions 3"
    assert other.study_command("parts", "adapter").endswith(command)
    assert other.study_command("curvature") == ""
    assert "Ablations: not measured here. Measured on mtd." in page.text  # sets of no known reader


def test_readme_block_is_replaced_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.append(generated(MAIN), tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(
        "# before\n<!-- results: begin -->\nold\n<!-- results: end -->\nafter ünïcode\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    run_report(tmp_path, monkeypatch, "--readme", "README.md")
    first = readme.read_text(encoding="utf-8")
    assert first.startswith("# before\n<!-- results: begin -->\nMade by `python jobs/report.py --readme README.md`")
    assert first.endswith("<!-- results: end -->\nafter ünïcode\n")
    assert "old" not in first
    rows = [line.split("|")[1:-1] for line in first.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {2 + 3 + 3}
    (section,) = current_sections(as_table(generated(MAIN)))
    difference = true_differences(section)["tip_adapter_f", "plain", "", 5]
    cells = next([cell.strip() for cell in row] for row in rows if row[0].strip() == "tip adapter f")
    assert cells[-1] == str(difference)
    assert [row[0].strip() for row in rows][2:4] == ["**HypDFS**", f"HypDFS, {TWIN}"]
    run_report(tmp_path, monkeypatch, "--readme", "README.md")
    assert readme.read_text(encoding="utf-8") == first
    run_report(tmp_path, monkeypatch, "--readme", "README.md", "--peers", "1")
    kept = [line.split("|")[1].strip() for line in readme.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    assert kept[2:] == ["**HypDFS**", f"HypDFS, {TWIN}", "HypDFS", "prototype", "shrinkage lda"]
    assert "Left out: 3 rows of peers that read lower at K = 5." in readme.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text", ["nothing", "<!-- results: end -->\n<!-- results: begin -->", "<!-- results: begin -->"]
)
def test_a_readme_without_markers_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ConfigError, match="results: begin"):
        replace_results(path, "new")
    assert path.read_text() == text
